# SPDX-License-Identifier: MIT
"""Every allocation inside every call fails once: an errno each time, nothing left.

Needs the debug kernel's fail-nth: the n-th allocation this thread makes in the
kernel fails. Sweeping n until the call gets through visits every rollback.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from device import CHUNK, DEVICE, PAGE, SYSFS, Raw, read, write
from tensormem import abi

DEBUGFS = Path("/sys/kernel/debug")

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/fail-nth").exists(), reason="needs the debug kernel (fault injection)"
)


@pytest.fixture(autouse=True)
def injection() -> Iterator[None]:
    """Let every allocation that may sleep fail, silently."""
    for kind in ("failslab", "fail_page_alloc"):
        for name, value in (("ignore-gfp-wait", "N"), ("ignore-gfp-highmem", "N"),
                            ("min-order", "0"), ("verbose", "0")):  # fmt: skip
            file = DEBUGFS / kind / name
            if file.exists():
                file.write_text(value)
    return


def disarm(fd: int) -> bool:
    """End the injection; True if the failure was still to come."""
    try:
        unused = int(os.pread(fd, 16, 0)) > 0
    except OSError:  # it came just now, to the read itself
        unused = True
    while True:
        try:
            os.pwrite(fd, b"0", 0)
        except OSError:
            continue
        return unused


def sweep(
    call: Callable[[], int], check: Callable[[int], object] = lambda _: None, most: int = 400
) -> set[int]:
    """Call with the 1st, 2nd, … failure injected, until one call meets none.

    Injected are allocations (ENOMEM) and copies from and to user space (EFAULT).
    Only the call itself runs under injection; ``check`` looks at what it left.
    """
    fd = os.open("/proc/thread-self/fail-nth", os.O_RDWR)
    results = set()
    try:
        for n in range(1, most):
            os.pwrite(fd, b"%d" % n, 0)
            result = call()
            unused = disarm(fd)
            check(result)
            if unused:  # the n-th opportunity never came
                assert result == 0
                return results
            assert result in (0, errno.ENOMEM, errno.EFAULT), f"n={n}: {result}"
            results.add(result)
    finally:
        disarm(fd)
        os.close(fd)
    pytest.fail(f"still failing after {most} injections")


def empty_pool(chunks: int = 64) -> None:
    """No reserve and no free chunk: each has to come from the system."""
    for name, value in (("chunk/reserve", 0), ("chunk/capacity", 0), ("chunk/capacity", chunks)):
        assert write(name, value) == 0
    assert read("chunk/total") == 0


def test_open(settings: None) -> None:
    fds: list[int] = []

    def call() -> int:
        try:
            fds.append(os.open(DEVICE, os.O_RDWR))
        except OSError as error:
            return error.errno or -1
        return 0

    def check(result: int) -> None:
        assert read("clients/count") == (result == 0)
        while fds:
            os.close(fds.pop())

    assert errno.ENOMEM in sweep(call, check)


@pytest.mark.parametrize("size", [1, 3 * PAGE, 1 << 20, CHUNK, 2 * CHUNK + 5 * PAGE])
def test_alloc_from_an_empty_pool(raw: Raw, size: int, settings: None) -> None:
    item = abi.Alloc(size=size, kind=abi.Kind.KV)

    def check(result: int) -> None:
        info = raw.info()
        assert info.nr_tensors == (result == 0)
        assert (info.used > 0) == (result == 0)
        if result == 0:
            assert raw.free(item.handle) == 0
        assert read("buddy/used_pages") == read("chunk/used") == 0
        empty_pool()
        item.handle = 0

    empty_pool()
    results = sweep(lambda: raw.ioctl(abi.IOC_ALLOC, item), check)
    assert {errno.ENOMEM, errno.EFAULT} <= results


def test_alloc_batch(raw: Raw, settings: None) -> None:
    sizes = [1, PAGE * 2, CHUNK, 1 << 18] * 3
    items = (abi.Alloc * len(sizes))(*(abi.Alloc(size=s, kind=abi.Kind.KV) for s in sizes))
    batch = abi.Batch(items=ctypes.addressof(items), count=len(items), item_size=32)

    def check(result: int) -> None:
        assert raw.info().nr_tensors == (len(sizes) if result == 0 else 0)
        if result == 0:
            assert batch.failed == len(sizes)
            assert raw.free_batch([item.handle for item in items])[0] == 0
        assert read("buddy/used_pages") == read("chunk/used") == 0
        empty_pool()

    empty_pool()
    results = sweep(lambda: raw.ioctl(abi.IOC_ALLOC_BATCH, batch), check)
    assert {errno.ENOMEM, errno.EFAULT} <= results


@pytest.mark.parametrize("count", [1, 8])
def test_free(raw: Raw, count: int) -> None:
    """A free either frees all it was asked to, or says why and frees nothing."""
    handles = [raw.alloc(PAGE).handle for _ in range(count)]
    mapping = raw.map_window()
    mapping[0] = 1
    items = (abi.Free * count)(*(abi.Free(handle=h) for h in handles))
    batch = abi.Batch(items=ctypes.addressof(items), count=count, item_size=8)

    def check(result: int) -> None:
        assert raw.info().nr_tensors == (0 if result == 0 else count)
        if result == 0:
            for i in range(count):
                items[i].handle = raw.alloc(PAGE).handle

    if count == 1:
        results = sweep(lambda: raw.ioctl(abi.IOC_FREE, items[0]), check)
    else:
        results = sweep(lambda: raw.ioctl(abi.IOC_FREE_BATCH, batch), check)
    assert {errno.ENOMEM, errno.EFAULT} <= results
    mapping.close()


def test_query_info_and_quota_need_no_memory(raw: Raw) -> None:
    item = raw.alloc(PAGE)
    query, info, quota = abi.Query(handle=item.handle), abi.Info(), abi.Quota(bytes=1 << 30)
    for request, value in (
        (abi.IOC_QUERY, query), (abi.IOC_INFO, info), (abi.IOC_SET_QUOTA, quota),
    ):  # fmt: skip
        assert sweep(lambda r=request, v=value: raw.ioctl(r, v)) == {errno.EFAULT}
    assert raw.info().quota == 1 << 30


def test_mmap_and_faults(raw: Raw) -> None:
    """A mapping that fails leaves nothing, a fault that fails can be had again."""
    item = raw.alloc(CHUNK + PAGE)
    data = b"\x33" * CHUNK
    whole = raw.map_tensor(item)
    whole[:CHUNK] = data
    whole.close()
    maps: list[mmap.mmap] = []

    def call() -> int:
        try:
            maps.append(raw.map(CHUNK, item.offset))
        except OSError as error:
            return error.errno or -1
        return 0

    assert errno.ENOMEM in sweep(call)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    view = maps.pop()
    for other in maps:
        other.close()
    address = ctypes.addressof(ctypes.c_char.from_buffer(view))
    populate_read = 22

    def populate() -> int:
        return ctypes.get_errno() if libc.madvise(address, CHUNK, populate_read) else 0

    def check(_: int) -> None:
        assert view[:] == data
        assert libc.madvise(address, CHUNK, mmap.MADV_DONTNEED) == 0

    check(0)
    sweep(populate, check)


def test_sysfs_writes(settings: None) -> None:
    file = os.open(SYSFS / "chunk/capacity", os.O_WRONLY)

    def call() -> int:
        try:
            os.pwrite(file, b"8", 0)
        except OSError as error:
            return error.errno or -1
        return 0

    def check(result: int) -> None:
        assert read("chunk/capacity") == (8 if result == 0 else 9)
        assert write("chunk/capacity", 9) == 0

    assert write("chunk/capacity", 9) == 0
    sweep(call, check)
    os.close(file)
