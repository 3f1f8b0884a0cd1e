# SPDX-License-Identifier: MIT
"""Every file of sysfs: documented, readable, one value; the writable ones by root only."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest

from device import CHUNK, PAGE, SYSFS, Raw, read, write

ABI = Path(__file__).parents[2] / "docs/ABI/sysfs-class-misc-tensormem"
WRITABLE = ("chunk/capacity", "chunk/reserve", "clients/default_quota")


def files() -> list[str]:
    return sorted(
        str(path.relative_to(SYSFS))
        for folder in ("chunk", "buddy", "clients")
        for path in (SYSFS / folder).iterdir()
    )


def test_each_file_is_documented_and_each_documented_file_exists() -> None:
    documented = re.findall(r"^What:\s+/sys/class/misc/tensormem/(\S+)", ABI.read_text(), re.M)
    assert sorted(documented) == files()


def test_each_holds_one_number() -> None:
    for name in files():
        assert re.fullmatch(r"\d+\n", (SYSFS / name).read_text()), name


def test_modes() -> None:
    for name in files():
        mode = (SYSFS / name).stat().st_mode & 0o777
        assert mode == (0o644 if name in WRITABLE else 0o444), name


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


def test_ordinary_users_read_and_do_not_write() -> None:
    pid = os.fork()
    if pid == 0:
        os.setuid(65534)
        good = all(read(name) >= 0 for name in files())
        refused = all(write(name, 1) == errno.EACCES for name in WRITABLE)
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
