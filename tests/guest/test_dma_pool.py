# SPDX-License-Identifier: MIT
"""The DMA pool: chunks side by side out of the device tree's region. Runs with --dma and --dma-pool, of either sort."""

from __future__ import annotations

import errno
import mmap
import os
import random
import re
import signal
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import tensormem
from conftest import USAGE, settled
from device import CHUNK, KASAN, PAGE, Raw, address_of, becomes, read, wait_for, weights, word
from edu import MEMORY, Edu
from failnth import can_fail, let_fail, sweep
from process import dies, hold, killed_at_random, let_go, loaded, registered, together
from tensormem import abi, layout

DMA = abi.Pool.DMA
DRIVER = Path("/sys/bus/platform/drivers/tensormem-dma")
NODE = "/tensormem-dma"
TREE = Path("/sys/firmware/devicetree/base/reserved-memory/tensormem")
#: Chunks of the region.
TOTAL = int.from_bytes((TREE / "size").read_bytes(), "big") // CHUNK
REUSABLE = (TREE / "reusable").exists()


def figures() -> tuple[int, int, int]:
    return read("dma/total"), read("dma/used"), read("dma/free")


@pytest.fixture(autouse=True)
def all_of_it_is_back() -> Iterator[None]:
    assert figures() == (TOTAL, 0, TOTAL)
    yield
    wait_for(lambda: figures() == (TOTAL, 0, TOTAL))


@pytest.fixture
def edu() -> Iterator[Edu]:
    with loaded("tm_edu"), Edu() as importer:
        yield importer


def frames(raw: Raw, item: abi.Alloc) -> list[int]:
    """The page frame of each of its pages."""
    window = raw.map_tensor(item)
    count = len(window) // PAGE
    for page in range(count):
        window[page * PAGE]
    found = [frame for frame in layout.frames(address_of(window), count) if frame is not None]
    window.close()
    assert len(found) == count
    return found


# What it is


def test_the_region_is_the_device_trees(raw: Raw) -> None:
    assert TOTAL > 8
    assert word("dma/node") == NODE
    assert len(list(DRIVER.glob("*/of_node"))) == 1
    item = raw.alloc(CHUNK, pool=DMA)
    assert figures() == (TOTAL, 1, TOTAL - 1)
    # it is none of the other pools'
    assert read("chunk/used") == read("buddy/used_pages") == 0
    assert read("clients/bytes") == CHUNK
    assert raw.free(item.handle) == 0


@pytest.mark.parametrize("kind", abi.Kind)
@pytest.mark.parametrize("size", [1, CHUNK, 5 * CHUNK + 1])
def test_it_is_in_one_piece(raw: Raw, kind: abi.Kind, size: int) -> None:
    chunks = -(-size // CHUNK)
    item = raw.alloc(size, kind=kind, pool=DMA)
    query = raw.query(item.handle)[1]
    assert (query.pool, query.nr_chunks, query.nr_runs) == (DMA, chunks, 0)
    assert (query.size, query.length) == (size, -(-size // PAGE) * PAGE)
    assert (query.held, read("dma/used")) == (chunks * CHUNK, chunks)
    assert query.mapping == abi.Mapping.PAGES
    assert raw.info().used == chunks * CHUNK
    found = frames(raw, item)
    assert found == list(range(found[0], found[0] + query.length // PAGE))
    assert raw.free(item.handle) == 0


def test_all_of_it_and_no_more(raw: Raw) -> None:
    """Each chunk once; then an errno, which changes nothing; then in one piece."""
    items = [raw.alloc(CHUNK, pool=DMA) for _ in range(TOTAL)]
    assert figures() == (TOTAL, TOTAL, 0)
    firsts = sorted(frames(raw, item)[0] for item in items)
    assert [first - firsts[0] for first in firsts] == [n * (CHUNK // PAGE) for n in range(TOTAL)]
    assert raw.try_alloc(1, pool=DMA)[0] == errno.ENOSPC
    assert (figures(), raw.info().used) == ((TOTAL, TOTAL, 0), TOTAL * CHUNK)
    # others go on
    other = raw.alloc(CHUNK)
    assert raw.free_batch([item.handle for item in items] + [other.handle])[0] == 0
    whole = raw.alloc(TOTAL * CHUNK, pool=DMA)
    assert frames(raw, whole)[0] == firsts[0]
    assert raw.free(whole.handle) == 0


def test_gaps_that_are_too_small(raw: Raw) -> None:
    items = sorted((raw.alloc(CHUNK, pool=DMA) for _ in range(TOTAL)), key=lambda item: frames(raw, item)[0])
    # two of them, not neighbours, and later the one between
    assert raw.free_batch([items[3].handle, items[5].handle])[0] == 0
    assert figures() == (TOTAL, TOTAL - 2, 2)
    assert raw.try_alloc(CHUNK + 1, pool=DMA)[0] == errno.ENOSPC
    assert figures() == (TOTAL, TOTAL - 2, 2)
    assert raw.free(items[4].handle) == 0
    between = raw.alloc(3 * CHUNK, pool=DMA)
    assert figures() == (TOTAL, TOTAL, 0)
    rest = [item.handle for number, item in enumerate(items) if number not in (3, 4, 5)]
    assert raw.free_batch([between.handle, *rest])[0] == 0


def test_nobody_sees_what_another_left(raw: Raw) -> None:
    item = raw.alloc(TOTAL * CHUNK, pool=DMA)
    window = raw.map_tensor(item)
    for chunk in range(TOTAL):
        window[chunk * CHUNK : (chunk + 1) * CHUNK] = b"\xa5" * CHUNK
    window.close()
    assert raw.free(item.handle) == 0
    with Raw() as other:
        window = other.map_tensor(other.alloc(TOTAL * CHUNK, pool=DMA))
        for chunk in range(TOTAL):
            assert window[chunk * CHUNK : (chunk + 1) * CHUNK] == bytes(CHUNK)
        window.close()


def test_it_is_not_kept_for_reuse(raw: Raw) -> None:
    item = raw.alloc(CHUNK, pool=DMA, flags=abi.AllocFlag.NOZERO)
    window = raw.map_tensor(item)
    window[7] = 7
    window.close()
    assert raw.free(item.handle) == 0
    assert (figures(), raw.info().kept) == ((TOTAL, 0, TOTAL), 0)
    item = raw.alloc(CHUNK, pool=DMA, flags=abi.AllocFlag.NOZERO)
    window = raw.map_tensor(item)
    assert window[7] == 0
    window.close()
    assert raw.free(item.handle) == 0


@pytest.mark.parametrize("flags", [0, abi.AllocFlag.HUGE, abi.AllocFlag.PAGED, abi.AllocFlag.PINNED])
def test_flags(raw: Raw, flags: int) -> None:
    item = raw.alloc(2 * CHUNK, kind=abi.Kind.WEIGHTS, pool=DMA, flags=flags)
    query = raw.query(item.handle)[1]
    assert (query.mapping, query.alloc_flags) == (abi.Mapping.PAGES, flags)
    window = raw.map_tensor(item)
    window[0], window[-1] = 1, 2
    with raw.export(item.handle) as shared:
        view = shared.view()
        assert (view[0], view[-1], shared.size) == (1, 2, 2 * CHUNK)
        view.close()
    window.close()
    assert raw.free(item.handle) == 0


def test_the_library() -> None:
    with tensormem.open() as client:
        array = client.empty((TOTAL, CHUNK // 4), np.float32, pool="dma")
        array[:] = 3
        assert client.query(array).pool == "dma"
        with pytest.raises(tensormem.PoolExhausted, match="DMA pool's region has no such gap"):
            client.empty(1, pool="dma")
        with pytest.raises(tensormem.InvalidArgument, match="leave numa out"):
            client.empty(1, pool="dma", numa="local")
        assert (array == 3).all()
        del array
        client.empty(1, pool="dma")


# Bad input


def test_what_it_does_not_take(raw: Raw) -> None:
    nodes = raw.info().nodes
    for number, fields in (
        (errno.EINVAL, {"size": 0}),
        (errno.EINVAL, {"size": PAGE, "kind": 0}),
        (errno.EINVAL, {"size": PAGE, "pad": 1}),
        (errno.EINVAL, {"size": PAGE, "numa": abi.Numa.LOCAL}),
        (errno.EINVAL, {"size": PAGE, "numa": abi.Numa.BIND, "nodes": nodes}),
        (errno.EINVAL, {"size": PAGE, "nodes": nodes}),
        (errno.EINVAL, {"size": PAGE, "flags": abi.AllocFlag.HUGE | abi.AllocFlag.PAGED}),
        (errno.EINVAL, {"size": PAGE, "flags": 1 << 31}),
        (errno.EINVAL, {"size": PAGE, "pool": DMA + 1}),
        (errno.EINVAL, {"size": raw.info().window_size + 1}),
        (errno.ENOSPC, {"size": raw.info().window_size}),
        (errno.ENOSPC, {"size": TOTAL * CHUNK + 1}),
    ):
        assert raw.try_alloc(**{"pool": DMA, **fields})[0] == number, fields
    assert figures() == (TOTAL, 0, TOTAL)
    assert raw.info().used == 0


def test_a_batch_is_all_or_nothing(raw: Raw) -> None:
    result, batch, _ = raw.alloc_batch([CHUNK] * (TOTAL + 1), pool=DMA)
    assert (result, batch.failed) == (errno.ENOSPC, TOTAL)
    assert (figures(), raw.info().used) == ((TOTAL, 0, TOTAL), 0)


def test_quota(raw: Raw) -> None:
    """What is kept for reuse gives way to it as for any other."""
    assert raw.set_quota(3 * CHUNK) == 0
    kept = raw.alloc(CHUNK, flags=abi.AllocFlag.NOZERO)
    assert raw.free(kept.handle) == 0
    item = raw.alloc(2 * CHUNK + 1, pool=DMA)
    assert (raw.info().used, raw.info().kept) == (3 * CHUNK, 0)
    assert raw.try_alloc(1, pool=DMA)[0] == errno.EDQUOT
    assert raw.free(item.handle) == 0


# Who still has it


def test_who_holds_some_keeps_all_of_it(raw: Raw) -> None:
    """The dma-buf of one that is freed: it stays whole, on the bill, and nobody's."""
    item = raw.alloc(3 * CHUNK, pool=DMA)
    window = raw.map_tensor(item)
    window[CHUNK : CHUNK + PAGE] = b"\x5a" * PAGE
    shared = raw.export(item.handle)
    window.close()
    assert raw.free(item.handle) == 0
    assert figures() == (TOTAL, 3, TOTAL - 3)
    assert read("chunk/quarantined") == 3 * CHUNK // PAGE
    assert (raw.info().used, raw.info().kept) == (3 * CHUNK, 3 * CHUNK)
    rest = raw.alloc((TOTAL - 3) * CHUNK, pool=DMA)
    other = raw.map_tensor(rest)
    other[:PAGE] = b"\xff" * PAGE
    other.close()
    assert raw.try_alloc(1, pool=DMA)[0] == errno.ENOSPC
    view = shared.view()
    assert bytes(view[CHUNK : CHUNK + PAGE]) == b"\x5a" * PAGE
    view.close()
    shared.close()
    becomes("chunk/quarantined", 0)
    assert figures() == (TOTAL, TOTAL - 3, 3)
    assert raw.free(rest.handle) == 0


def test_the_module_stays_while_it_is_held() -> None:
    """Also when no client is left: a page of it must not be anybody else's before."""
    with Raw() as client:
        item = client.alloc(CHUNK, pool=DMA)
        shared = client.export(item.handle)
    becomes("clients/count", 0)
    assert figures() == (TOTAL, 1, TOTAL - 1)
    result = subprocess.run(["rmmod", "tensormem"], stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode != 0
    assert "in use" in result.stderr
    shared.close()


@pytest.mark.parametrize("of", ["tensor", "dma-buf"])
def test_nobody_pins_it(raw: Raw, of: str) -> None:
    """What pins for an I/O and what pins for good: an errno, and soon. The kernel copies it all the same."""
    item = raw.alloc(CHUNK, pool=DMA)
    other = raw.map_tensor(raw.alloc(CHUNK))
    shared = raw.export(item.handle)
    window = raw.map_tensor(item) if of == "tensor" else shared.view()
    window[:PAGE] = other[:PAGE] = weights("pinned", PAGE)
    # kernels before 6.5 register nothing that is a file's, once they have pinned it
    assert registered(address_of(other), PAGE) in (0, errno.EOPNOTSUPP)
    assert registered(address_of(window), PAGE) == errno.EEXIST
    with pytest.raises(FileExistsError):
        hold(address_of(window), PAGE)
    part, next_one = memoryview(window)[:PAGE], memoryview(window)[PAGE : 2 * PAGE]
    path = Path("/var/tmp/dma-direct.bin")
    path.write_bytes(bytes(PAGE))
    os.sync()
    direct, file = os.open(path, os.O_RDWR | os.O_DIRECT), os.open(path, os.O_RDWR)
    for move in (os.preadv, os.pwritev):
        with pytest.raises(OSError, match=r"File exists|Bad address"):
            move(direct, [part], 0)
    os.close(direct)
    assert os.pread(file, PAGE, 0) == bytes(PAGE)
    assert os.pwritev(file, [part], 0) == os.preadv(file, [next_one], 0) == PAGE
    assert window[PAGE : 2 * PAGE] == window[:PAGE] == weights("pinned", PAGE)
    os.close(file)
    path.unlink()
    part.release()
    next_one.release()
    window.close()
    shared.close()
    other.close()


def test_the_driver_goes_while_it_is_used(raw: Raw) -> None:
    """Unbound, it hands nothing out; who has memory keeps it; bound again once all is back."""
    (device,) = DRIVER.glob("*/of_node")
    name = device.parent.name
    item = raw.alloc(2 * CHUNK, pool=DMA)
    window = raw.map_tensor(item)
    window[0] = 1
    (DRIVER / "unbind").write_text(name)
    try:
        assert (figures(), word("dma/node")) == ((0, 2, 0), "none")
        assert raw.try_alloc(1, pool=DMA)[0] == errno.ENODEV
        with tensormem.open() as client, pytest.raises(tensormem.NoDmaPool, match=r"docs/dma\.md"):
            client.empty(1, pool="dma")
        window[CHUNK] = 2
        with raw.export(item.handle) as shared:
            view = shared.view()
            assert (view[0], view[CHUNK], view[1]) == (1, 2, 0)
            view.close()
        with pytest.raises(OSError, match="busy"):
            (DRIVER / "bind").write_text(name)
        window.close()
        assert raw.free(item.handle) == 0
        assert figures() == (0, 0, 0)
    finally:
        (DRIVER / "bind").write_text(name)
    assert (figures(), word("dma/node")) == ((TOTAL, 0, TOTAL), NODE)


def test_a_child_has_it_too(raw: Raw) -> None:
    item = raw.alloc(CHUNK + 1, pool=DMA)
    window = raw.map_tensor(item)
    window[0] = 1

    def child() -> None:
        assert window[0] == 1
        window[CHUNK] = 2

    assert dies(child) == 0
    assert window[CHUNK] == 2
    assert raw.free(item.handle) == 0
    assert dies(lambda: window[0]) == signal.SIGBUS
    window.close()


def test_a_device_has_it(raw: Raw, edu: Edu) -> None:
    """From its end to the device, and from there to its beginning; free at last when the device lets go."""
    chunks = 4
    item = raw.alloc(chunks * CHUNK, pool=DMA)
    window = raw.map_tensor(item)
    data = weights("region", MEMORY)
    window[-MEMORY:] = data
    shared = raw.export(item.handle)
    assert read("dma/bytes") == chunks * CHUNK
    assert edu.attach(shared.fd) == edu.map_for() == 0
    assert (edu.mapped.entries, edu.mapped.largest) == (1, chunks * CHUNK)
    assert edu.fetch(chunks * CHUNK - MEMORY) == edu.store(0) == 0
    assert window[:MEMORY] == data
    window.close()
    shared.close()
    assert raw.free(item.handle) == 0
    assert figures() == (TOTAL, chunks, TOTAL - chunks)
    assert edu.total() == (0, 2 * sum(data))
    assert edu.unmap() == edu.detach() == 0
    becomes("dma/used", 0)


# Of a region that is lent


def fill(region: range) -> list[mmap.mmap]:
    """Memory of ours until some of it is in the region; each piece has its number at both ends."""
    pieces: list[mmap.mmap] = []
    inside = 0
    while inside < 2 * CHUNK // PAGE:
        free = re.search(r"^MemFree:\s+(\d+)", Path("/proc/meminfo").read_text(), re.M)
        assert free
        assert int(free[1]) > 90 << 10, f"{inside} pages of {len(pieces)} pieces are in the region"
        piece = mmap.mmap(-1, CHUNK, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for at in range(0, CHUNK, PAGE):
            piece[at] = 1
        piece[:4] = piece[-4:] = struct.pack("<I", len(pieces))
        pieces.append(piece)
        inside += len(places(piece, region))
    return pieces


def places(piece: mmap.mmap, region: range) -> list[int]:
    """Which of its pages are in the region."""
    found = layout.frames(address_of(piece), CHUNK // PAGE)
    return [page for page, frame in enumerate(found) if frame in region]


@pytest.mark.skipif(not REUSABLE, reason="programs have none of it")
def test_what_programs_have_moves_out(raw: Raw) -> None:
    """Unless somebody has pinned a page of it: then it is as if there were no room."""
    whole = raw.alloc(TOTAL * CHUNK, pool=DMA)
    first = frames(raw, whole)[0]
    region = range(first, first + TOTAL * CHUNK // PAGE)
    assert raw.free(whole.handle) == 0
    pieces = fill(region)
    piece, page = next((piece, found[0]) for piece in reversed(pieces) if (found := places(piece, region)))
    pipe = hold(address_of(piece) + page * PAGE, PAGE)
    assert raw.try_alloc(TOTAL * CHUNK, pool=DMA)[0] == errno.ENOSPC
    assert (figures(), raw.info().used) == ((TOTAL, 0, TOTAL), 0)
    let_go(pipe)
    wait_for(lambda: raw.try_alloc(TOTAL * CHUNK, pool=DMA)[0] == 0)
    assert figures() == (TOTAL, TOTAL, 0)
    for number, piece in enumerate(pieces):
        assert not places(piece, region)
        assert piece[:4] == piece[-4:] == struct.pack("<I", number)
        piece.close()


# Memory that is not to be had; many at once


@can_fail
@pytest.mark.skipif(REUSABLE, reason="CMA tells none of its failures from another")
def test_failures(raw: Raw) -> None:
    let_fail()
    got: list[abi.Alloc] = []

    def call() -> int:
        result, item = raw.try_alloc(5 * CHUNK, pool=DMA)
        if result == 0:
            got.append(item)
        return result

    def check(result: int) -> None:
        assert read("dma/used") == (5 if result == 0 else 0)
        if result == 0:
            assert raw.free(got.pop().handle) == 0

    assert errno.ENOMEM in sweep(call, check)


def churn(seed: int, rounds: int) -> None:
    """Take and free in random order; nobody else ever writes into what one has."""
    dice = random.Random(seed)
    with Raw() as client:
        held: list[tuple[abi.Alloc, mmap.mmap, int]] = []
        for _ in range(rounds):
            if held and dice.randrange(2):
                item, window, value = held.pop(dice.randrange(len(held)))
                assert {window[at] for at in range(0, len(window), CHUNK // 2)} == {value}
                window.close()
                assert client.free(item.handle) == 0
                continue
            result, item = client.try_alloc(dice.randrange(1, 4 * CHUNK), pool=DMA)
            assert result in (0, errno.ENOSPC)
            if result == 0:
                window = client.map_tensor(item)
                offsets = range(0, len(window), CHUNK // 2)
                assert not any(window[at] for at in offsets)
                value = dice.randrange(1, 256)
                for at in offsets:
                    window[at] = value
                held.append((item, window, value))
        for _, window, _ in held:
            window.close()


def test_threads() -> None:
    assert together(lambda seed: churn(seed, 10 if KASAN else 40), 3) == []


def test_killed_at_random() -> None:
    dice = random.Random(4)
    for _ in range(2 if KASAN else 6):
        killed_at_random(lambda seed: churn(seed, 1 << 30), dice, 0.05, 0.5)
        assert settled(dict.fromkeys(USAGE, 0)) == dict.fromkeys(USAGE, 0)
        wait_for(lambda: figures() == (TOTAL, 0, TOTAL))
