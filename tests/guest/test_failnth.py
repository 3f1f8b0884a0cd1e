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
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from device import CHUNK, DEVICE, PAGE, SYSFS, Raw, read, write
from tensormem import abi

NOZERO, HUGE, PAGED = abi.AllocFlag.NOZERO, abi.AllocFlag.HUGE, abi.AllocFlag.PAGED
PINNED = abi.AllocFlag.PINNED
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


def drop_kept(client: Raw) -> None:
    """Have the shrinker take what is kept for reuse."""
    for _ in range(20):
        if client.info().kept == 0:
            return
        Path("/proc/sys/vm/drop_caches").write_text("2")
    pytest.fail("still kept")


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


ALLOCS = [
    *({"size": size, "kind": abi.Kind.KV}
      for size in (1, 3 * PAGE, 1 << 20, CHUNK, 2 * CHUNK + 5 * PAGE)),
    {"size": 64, "kind": abi.Kind.ACTIVATIONS},
    {"size": CHUNK, "kind": abi.Kind.WEIGHTS, "flags": PAGED},
    *({"size": CHUNK + PAGE, "kind": abi.Kind.KV, "flags": flags}
      for flags in (NOZERO, HUGE, PINNED)),
    {"size": 2 * CHUNK, "kind": abi.Kind.KV, "numa": abi.Numa.INTERLEAVE},
]  # fmt: skip


@pytest.mark.parametrize("request_", ALLOCS, ids=str)
def test_alloc_from_an_empty_pool(raw: Raw, request_: dict, settings: None) -> None:
    item = abi.Alloc(**request_)

    def check(result: int) -> None:
        info = raw.info()
        assert info.nr_tensors == (result == 0)
        # a tensor whose handle could not be told is freed: with NOZERO it is kept
        assert info.kept == 0 or item.flags == NOZERO
        assert (info.used > info.kept) == (result == 0)
        if result == 0:
            assert raw.free(item.handle) == 0
        drop_kept(raw)
        assert read("buddy/used_pages") == read("chunk/used") == 0
        empty_pool()
        item.handle = 0

    empty_pool()
    results = sweep(lambda: raw.ioctl(abi.IOC_ALLOC, item), check)
    assert {errno.ENOMEM, errno.EFAULT} <= results


def test_alloc_batch(raw: Raw, settings: None) -> None:
    sizes = [1, PAGE * 2, CHUNK, 1 << 18] * 3
    items = (abi.Alloc * len(sizes))(*(abi.Alloc(size=s, kind=abi.Kind.KV) for s in sizes))
    batch = abi.Batch(items=ctypes.addressof(items), count=len(items), item_size=ctypes.sizeof(items[0]))

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
    numa = abi.SetNuma(numa=abi.Numa.BIND, nodes=1)
    for request, value in (
        (abi.IOC_QUERY, query), (abi.IOC_INFO, info), (abi.IOC_SET_QUOTA, quota),
        (abi.IOC_SET_NUMA, numa),
    ):  # fmt: skip
        assert sweep(lambda r=request, v=value: raw.ioctl(r, v)) == {errno.EFAULT}
    assert raw.info().quota == 1 << 30


@pytest.mark.parametrize("flags", [HUGE, PAGED])
def test_mmap_and_faults(raw: Raw, flags: int) -> None:
    """A mapping that fails leaves nothing, a fault that fails can be had again."""
    item = raw.alloc(2 * CHUNK + PAGE, flags=flags)
    size = 2 * CHUNK
    data = b"\x33" * size
    whole = raw.map_tensor(item)
    whole[:size] = data
    whole.close()
    maps: list[mmap.mmap] = []

    def call() -> int:
        try:
            maps.append(raw.map(size, item.offset))
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
        return ctypes.get_errno() if libc.madvise(address, size, populate_read) else 0

    def check(_: int) -> None:
        assert view[:] == data
        assert libc.madvise(address, size, mmap.MADV_DONTNEED) == 0

    check(0)
    sweep(populate, check)


def test_a_block_falls_apart(raw: Raw) -> None:
    """mprotect of a part: it is done, or ENOMEM and all is as before."""
    item = raw.alloc(CHUNK, flags=HUGE)
    mapping = raw.map_tensor(item)
    data = b"\x44" * CHUNK
    mapping[:] = data
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    everything = mmap.PROT_READ | mmap.PROT_WRITE

    def call() -> int:
        failed = libc.mprotect(address + 5 * PAGE, 3 * PAGE, mmap.PROT_READ)
        return ctypes.get_errno() if failed else 0

    def check(_: int) -> None:
        assert libc.mprotect(address, CHUNK, everything) == 0
        assert mapping[:] == data
        mapping[:] = data

    assert errno.ENOMEM in sweep(call, check)
    mapping.close()


@pytest.mark.parametrize("size", [3 * PAGE, CHUNK])
def test_reuse(raw: Raw, size: int) -> None:
    """An allocation that fails leaves what is kept where it is, or gives it up: never lost."""
    window = raw.map_window()
    item = abi.Alloc(size=size, kind=abi.Kind.KV, flags=NOZERO)

    def park() -> None:
        if raw.info().kept == 0:
            assert raw.ioctl(abi.IOC_ALLOC, item) == 0
            window[item.offset : item.offset + 8] = b"contents"
            assert raw.free(item.handle) == 0

    def check(result: int) -> None:
        info = raw.info()
        assert info.nr_tensors == (result == 0)
        assert info.used == size
        assert info.kept == (0 if result == 0 else size)
        if result == 0:
            assert window[item.offset : item.offset + 8] == b"contents"
            assert raw.free(item.handle) == 0

    park()
    assert {errno.ENOMEM, errno.EFAULT} <= sweep(lambda: raw.ioctl(abi.IOC_ALLOC, item), check)
    window.close()


def test_reuse_in_a_batch(raw: Raw) -> None:
    """Some of it reused and some of it new: all or none, and what was reused is kept again."""
    size = 3 * PAGE
    first = [raw.alloc(size, abi.Kind.KV, flags=NOZERO).handle for _ in range(2)]
    assert raw.free_batch(first)[0] == 0
    items = (abi.Alloc * 4)(*(abi.Alloc(size=size, kind=abi.Kind.KV, flags=NOZERO)
                              for _ in range(4)))  # fmt: skip
    batch = abi.Batch(items=ctypes.addressof(items), count=4, item_size=ctypes.sizeof(abi.Alloc))

    def check(result: int) -> None:
        info = raw.info()
        assert info.nr_tensors == (4 if result == 0 else 0)
        if result == 0:
            assert info.kept == 0
            assert raw.free_batch([item.handle for item in items])[0] == 0
        else:
            assert 2 * size <= info.kept == info.used <= 4 * size
        if raw.info().kept != 2 * size:
            drop_kept(raw)
            again = [raw.alloc(size, abi.Kind.KV, flags=NOZERO).handle for _ in range(2)]
            assert raw.free_batch(again)[0] == 0

    results = sweep(lambda: raw.ioctl(abi.IOC_ALLOC_BATCH, batch), check)
    assert {errno.ENOMEM, errno.EFAULT} <= results


def test_free_for_reuse(raw: Raw) -> None:
    """Keeping it takes no memory: what fails is told before anything is freed."""
    item = abi.Free(handle=raw.alloc(CHUNK, flags=NOZERO).handle)

    def check(result: int) -> None:
        info = raw.info()
        assert (info.nr_tensors, info.used) == (0 if result == 0 else 1, CHUNK)
        assert info.kept == (CHUNK if result == 0 else 0)
        if result == 0:
            item.handle = raw.alloc(CHUNK, flags=NOZERO).handle

    assert {errno.ENOMEM, errno.EFAULT} <= sweep(lambda: raw.ioctl(abi.IOC_FREE, item), check)


def test_pinned_gives_back_what_it_counted(raw: Raw) -> None:
    """After every failure the whole RLIMIT_MEMLOCK is there again."""
    pid = os.fork()
    if pid == 0:
        item = abi.Alloc(size=4 * PAGE, kind=abi.Kind.KV, flags=PINNED)
        fd = os.open("/proc/thread-self/fail-nth", os.O_RDWR)
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (4 * PAGE, 4 * PAGE))
        os.setuid(65534)
        failed = 0
        for n in range(1, 200):
            os.pwrite(fd, b"%d" % n, 0)
            result = raw.ioctl(abi.IOC_ALLOC, item)
            unused = disarm(fd)
            failed += result != 0
            if result == 0:
                raw.free(item.handle)
            result, again = raw.try_alloc(4 * PAGE, abi.Kind.KV, flags=PINNED)
            if result or raw.free(again.handle):
                os._exit(2)
            if unused:
                os._exit(0 if failed > 3 else 3)
        os._exit(4)
    assert os.waitpid(pid, 0)[1] == 0


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
