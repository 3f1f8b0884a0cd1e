# SPDX-License-Identifier: MIT
"""Every file of sysfs: documented, readable, one value; the writable ones by root only."""

from __future__ import annotations

import errno
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from device import CHUNK, KINDS, PAGE, SYSFS, Raw, Slot, read, write
from tensormem import abi

ABI = Path(__file__).parents[2] / "docs/ABI/sysfs-class-misc-tensormem"
WRITABLE = ("chunk/capacity", "chunk/reserve", "clients/default_quota", "rt/size", "rt/ready",
            "pressure/low", "pressure/high",
            "bandwidth/period_us", "bandwidth/throttle", "bandwidth/reclaim",
            "bandwidth/client_budget", "core0/budget")  # fmt: skip


FOLDERS = ("chunk", "buddy", "slab", "clients", "dispatch", "kv", "model", "rt", "board", "pressure",
           "bandwidth", "dma")  # fmt: skip
WRITE_ONLY = ("buddy/compact",)
WORDS = ("kv/codec", "board/name", "pressure/level", "bandwidth/event", "dma/node")
#: Which hold 64 numbers.
HISTOGRAMS = ("latency", "missed")


def files() -> list[str]:
    folders = [SYSFS / folder for folder in FOLDERS] + [*SYSFS.glob("node*"), *SYSFS.glob("core*")]
    paths = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return sorted(str(path.relative_to(SYSFS)) for path in paths)


def numbers() -> list[str]:
    words = [f for f in files() if f.startswith("dispatch/") or f in WORDS or f.endswith("/state")]
    return [f for f in files() if f not in words and f not in WRITE_ONLY and f.split("/")[-1] not in HISTOGRAMS]


@pytest.fixture
def objects(raw: Raw, slot: Slot) -> Iterator[None]:
    """A model and an RT client, which have files of their own."""
    slot.swap(bytes(PAGE))
    with raw.rt():
        yield


@pytest.mark.usefixtures("objects")
def test_each_file_is_documented_and_each_documented_file_exists() -> None:
    documented = re.findall(r"^What:\s+/sys/class/misc/tensormem/(\S+)", ABI.read_text(), re.M)
    # a name of the manual's may stand for several: node<N>, dispatch/<kind>
    patterns = [re.sub(r"<\w+>", "[a-z0-9]+", name) for name in documented]
    names = files()
    for name in names:
        assert any(re.fullmatch(pattern, name) for pattern in patterns), name
    for pattern in patterns:
        assert any(re.fullmatch(pattern, name) for name in names), pattern


@pytest.mark.usefixtures("objects")
def test_each_holds_one_number() -> None:
    for name in numbers():
        assert re.fullmatch(r"\d+\n", (SYSFS / name).read_text()), name
    for name in (f for f in files() if f.split("/")[-1] in HISTOGRAMS):
        assert re.fullmatch(r"\d+( \d+){63}\n", (SYSFS / name).read_text()), name


@pytest.mark.usefixtures("objects")
def test_modes() -> None:
    for name in files():
        mode = (SYSFS / name).stat().st_mode & 0o777
        writable = name in (*WRITABLE, "bandwidth/event") or re.fullmatch(r"rt/\d+/priority|core\d+/budget", name)
        expected = 0o644 if writable else 0o200 if name in WRITE_ONLY else 0o444
        assert mode == expected, name


@pytest.mark.parametrize("name", WRITABLE)
@pytest.mark.parametrize("value", ["", "x", "-1", "1.5", "1k", "18446744073709551616", "0x"])
def test_malformed_values(name: str, value: str) -> None:
    before = read(name)
    assert write(name, value + "\n") in (errno.EINVAL, errno.ERANGE)
    assert read(name) == before


def test_values_out_of_range(settings: None) -> None:
    ram = os.sysconf("SC_PHYS_PAGES") * PAGE // CHUNK
    assert write("chunk/capacity", ram + 1000) == errno.EINVAL
    assert write("chunk/capacity", 4294967296) == errno.ERANGE
    assert write("chunk/reserve", read("chunk/capacity") + 1) == errno.EINVAL
    assert write("chunk/capacity", 0) == 0
    assert read("chunk/total") == 0
    with Raw() as client:
        assert client.try_alloc(1)[0] == errno.ENOSPC


@pytest.mark.usefixtures("objects")
def test_ordinary_users_read_and_do_not_write() -> None:
    pid = os.fork()
    if pid == 0:
        os.setuid(65534)
        good = all(read(name) >= 0 for name in numbers())
        refused = all(write(name, 1) == errno.EACCES for name in WRITABLE + WRITE_ONLY)
        os._exit(0 if good and refused else 1)
    assert os.waitpid(pid, 0)[1] == 0


def test_the_device_is_not_for_everybody() -> None:
    assert os.stat("/dev/tensormem").st_mode & 0o777 == 0o660
    pid = os.fork()
    if pid == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        try:
            os.open("/dev/tensormem", os.O_RDWR)
        except PermissionError:
            os._exit(0)
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0


def test_counters_of_the_buddy_pool(raw: Raw) -> None:
    names = ("allocs", "frees", "splits", "merges")
    before = {name: read(f"buddy/{name}") for name in names}
    assert read("buddy/chunks") == 0
    item = raw.alloc(PAGE)
    pages = CHUNK // PAGE
    assert read("buddy/chunks") == 1
    assert read("buddy/free_pages") == pages - 1
    assert raw.free(item.handle) == 0
    after = {name: read(f"buddy/{name}") for name in names}
    order = pages.bit_length() - 1
    assert {n: after[n] - before[n] for n in names} == {
        "allocs": 1, "frees": 1, "splits": order, "merges": order,
    }  # fmt: skip
    assert read("buddy/chunks") == 0


# The dispatch table


def table(kind: abi.Kind) -> list[tuple[int, int, abi.Pool, bool]]:
    """Rows of smallest size, largest size (0: none), pool and whether chunks become blocks."""
    rows = []
    for line in (SYSFS / "dispatch" / kind.name.lower()).read_text().splitlines():
        match = re.fullmatch(r"(\d+) (\d+|-) (slab|buddy|chunk)( huge)?", line)
        assert match, line
        low, high, pool, huge = match.groups()
        rows.append((int(low), 0 if high == "-" else int(high), abi.Pool[pool.upper()], bool(huge)))
    return rows


def test_there_is_a_table_for_each_kind() -> None:
    names = sorted(path.name for path in (SYSFS / "dispatch").iterdir())
    assert names == sorted(kind.name.lower() for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_covers_every_size_once(kind: abi.Kind) -> None:
    rows = table(kind)
    assert rows[0][0] == 1
    assert rows[-1][1] == 0
    for (_, high, pool, _), (low, _, above, _) in itertools.pairwise(rows):
        assert high + 1 == low
        assert pool != above
    assert [row[2] for row in rows][-2:] == [abi.Pool.BUDDY, abi.Pool.CHUNK]
    # what has a chunk's worth of pages takes a chunk
    assert rows[-1][0] == CHUNK - PAGE + 1
    assert [row[3] for row in rows] == [False] * (len(rows) - 1) + [kind == abi.Kind.WEIGHTS]


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_is_what_happens(raw: Raw, kind: abi.Kind) -> None:
    for low, high, pool, _ in table(kind):
        for size in {low, low + 1, (low + high) // 2, high - 1, high, low + 5 * CHUNK}:
            if size < low or (high and size > high):
                continue
            item = raw.alloc(size, kind)
            query = raw.query(item.handle)[1]
            assert query.pool == pool, size
            assert bool(query.nr_chunks) == (pool == abi.Pool.CHUNK), size
            assert bool(query.nr_runs) <= (pool != abi.Pool.SLAB), size
            assert raw.free(item.handle) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_overrides_the_table(raw: Raw, kind: abi.Kind) -> None:
    for pool, sizes in ((abi.Pool.SLAB, (1, PAGE // 2)),
                        (abi.Pool.BUDDY, (1, PAGE, CHUNK - 1, CHUNK, 3 * CHUNK + 1)),
                        (abi.Pool.CHUNK, (1, PAGE, CHUNK - 1, CHUNK, 3 * CHUNK + 1))):  # fmt: skip
        for size in sizes:
            item = raw.alloc(size, kind, pool)
            query = raw.query(item.handle)[1]
            assert query.pool == pool, size
            chunks = -(-size // CHUNK) if pool == abi.Pool.CHUNK else 0
            assert query.nr_chunks == chunks, size
            assert bool(query.nr_runs) == (pool == abi.Pool.BUDDY), size
            assert raw.free(item.handle) == 0
