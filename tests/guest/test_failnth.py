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

from device import CHUNK, DEVICE, PAGE, Raw, read, write
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


def sweep(call: Callable[[], int], allowed: set[int], most: int = 400) -> list[int]:
    """Call with the 1st, 2nd, … allocation failing, until one call meets no failure."""
    fd = os.open("/proc/thread-self/fail-nth", os.O_RDWR)
    results = []
    try:
        for n in range(1, most):
            os.pwrite(fd, str(n).encode(), 0)
            result = call()
            left = int(os.pread(fd, 16, 0))
            os.pwrite(fd, b"0", 0)
            if left:  # the n-th allocation never came
                assert result == 0
                return results
            assert result in allowed, f"n={n}: {errno.errorcode.get(result, result)}"
            results.append(result)
    finally:
        os.close(fd)
    pytest.fail(f"still failing after {most} injections")


def fresh(chunks: int = 64) -> None:
    """An empty pool without a reserve: every chunk has to come from the system."""
    assert write("chunk/reserve", 0) == 0
    assert write("chunk/capacity", 0) == 0
    assert write("chunk/capacity", chunks) == 0


ALLOWED = {0, errno.ENOMEM}


def test_open(settings: None) -> None:
    fds: list[int] = []

    def call() -> int:
        try:
            fds.append(os.open(DEVICE, os.O_RDWR))
        except OSError as error:
            return error.errno or -1
        return 0

    results = sweep(call, ALLOWED)
    assert results.count(errno.ENOMEM) >= 3  # file, client, inode
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize("size", [1, 3 * PAGE, 1 << 20, CHUNK, 2 * CHUNK + 5 * PAGE])
def test_alloc_from_an_empty_pool(raw: Raw, size: int, settings: None) -> None:
    item = abi.Alloc(size=size, kind=abi.Kind.KV)

    def call() -> int:
        result = raw.ioctl(abi.IOC_ALLOC, item)
        info = raw.info()
        assert info.nr_tensors == (result == 0)
        assert (info.used > 0) == (result == 0)
        if result == 0:
            assert raw.free(item.handle) == 0
            fresh_again()
        return result

    def fresh_again() -> None:
        # not under injection: it would use up the n-th allocation
        pass

    fresh()
    results = sweep(call, ALLOWED)
    assert errno.ENOMEM in results


def test_alloc_batch(raw: Raw, settings: None) -> None:
    sizes = [1, PAGE * 2, CHUNK, 1 << 18] * 3
    items = (abi.Alloc * len(sizes))(*(abi.Alloc(size=s, kind=abi.Kind.KV) for s in sizes))
    batch = abi.Batch(items=ctypes.addressof(items), count=len(items), item_size=32)

    def call() -> int:
        result = raw.ioctl(abi.IOC_ALLOC_BATCH, batch)
        assert (batch.failed == len(sizes)) == (result == 0)
        assert raw.info().nr_tensors == (len(sizes) if result == 0 else 0)
        if result == 0:
            for item in items:
                assert raw.free(item.handle) == 0
        return result

    fresh()
    results = sweep(call, ALLOWED)
    assert results.count(errno.ENOMEM) >= 12


def test_free(raw: Raw) -> None:
    """Freeing one tensor needs no memory, or says ENOMEM and frees nothing."""
    items = [raw.alloc(PAGE) for _ in range(64)]

    def call() -> int:
        before = raw.info().nr_tensors
        result = raw.free(items[-1].handle)
        assert raw.info().nr_tensors == before - (result == 0)
        if result == 0:
            items.pop()
        return result

    sweep(call, ALLOWED)


def test_free_batch(raw: Raw) -> None:
    def call() -> int:
        before = raw.info().nr_tensors
        array = (abi.Free * 8)(*(abi.Free(handle=h) for h in handles))
        batch = abi.Batch(items=ctypes.addressof(array), count=8, item_size=8)
        result = raw.ioctl(abi.IOC_FREE_BATCH, batch)
        assert raw.info().nr_tensors == before - (8 if result == 0 else 0)
        return result

    handles = [raw.alloc(PAGE).handle for _ in range(8)]
    sweep(call, ALLOWED)
    assert raw.info().nr_tensors == 0


def test_query_and_info_need_no_memory(raw: Raw) -> None:
    item = raw.alloc(PAGE)
    assert sweep(lambda: raw.query(item.handle)[0], ALLOWED) == []
    assert sweep(lambda: raw.ioctl(abi.IOC_INFO, abi.Info()), ALLOWED) == []
    assert sweep(lambda: raw.set_quota(1 << 30), ALLOWED) == []


def test_mmap_and_faults(raw: Raw) -> None:
    """A fault without memory is retried by the kernel; the data are right in the end."""
    item = raw.alloc(CHUNK + PAGE)
    whole = raw.map_tensor(item)
    whole[:] = b"\x33" * len(whole)
    whole.close()
    maps: list[mmap.mmap] = []

    def call() -> int:
        try:
            maps.append(raw.map(CHUNK, item.offset))
        except OSError as error:
            return error.errno or -1
        return 0

    results = sweep(call, ALLOWED)
    assert errno.ENOMEM in results
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    view = maps[0]
    address = ctypes.addressof(ctypes.c_char.from_buffer(view))
    populate_read = 22

    def populate() -> int:
        libc.madvise(address, CHUNK, mmap.MADV_DONTNEED)
        return ctypes.get_errno() if libc.madvise(address, CHUNK, populate_read) else 0

    sweep(populate, {0, errno.ENOMEM, errno.EFAULT})
    assert view[:] == b"\x33" * CHUNK


def test_sysfs_writes(settings: None) -> None:
    assert read("chunk/capacity") > 8
    assert set(sweep(lambda: write("chunk/capacity", 8), ALLOWED)) <= {errno.ENOMEM}
    assert read("chunk/capacity") == 8
