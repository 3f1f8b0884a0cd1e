# SPDX-License-Identifier: MIT
"""The ioctls as such: numbers, struct sizes, tails, flags and bad addresses."""

from __future__ import annotations

import ctypes
import errno
import os

import pytest

from device import CHUNK, PAGE, Raw, nodes_with_memory, read, round_up
from tensormem import abi


def test_info_tells_what_the_machine_has(raw: Raw) -> None:
    info = raw.info()
    assert info.abi_version == abi.ABI_VERSION
    assert info.page_size == os.sysconf("SC_PAGE_SIZE")
    assert info.chunk_size == CHUNK
    ram = os.sysconf("SC_PHYS_PAGES") * PAGE
    assert ram <= info.window_size <= 16 * ram
    assert info.window_size & (info.window_size - 1) == 0
    assert info.cache_line in (32, 64, 128, 256)
    assert (info.used, info.kept, info.nr_tensors, info.pad) == (0, 0, 0, 0)
    assert info.nodes == sum(1 << node for node in nodes_with_memory())
    assert info.quota == read("clients/default_quota")


@pytest.mark.parametrize("number", [0x06, 0x0F, 0x14, 0x1F, 0x23, 0xFF])
def test_unknown_numbers(raw: Raw, number: int) -> None:
    assert raw.ioctl(abi.iowr(number, 8), abi.Free()) == errno.ENOTTY


def test_foreign_magic_and_direction(raw: Raw) -> None:
    info = abi.Info()
    assert raw.ioctl(abi.IOC_INFO ^ (1 << 8), info) == errno.ENOTTY
    for direction in (0, 1, 2):
        request = abi.IOC_INFO & ~(3 << 30) | direction << 30
        assert raw.ioctl(request, info) == errno.ENOTTY


CALLS = [
    (0x00, abi.Info, 0),
    (0x01, abi.Quota, 8),
    (0x02, abi.SetNuma, 4),
    (0x10, abi.Alloc, 24),
    (0x11, abi.Free, 4),
    (0x12, abi.Query, 4),
    (0x13, abi.Export, 20),
]


def good_request(struct: type[abi.Struct], raw: Raw, handle: int) -> abi.Struct:
    """A call that succeeds; those that name a tensor name @handle."""
    if struct is abi.Alloc:
        return abi.Alloc(size=1, kind=abi.Kind.KV)
    if struct is abi.Quota:
        return abi.Quota(bytes=raw.info().quota)
    return struct() if struct in (abi.Info, abi.SetNuma) else struct(handle=handle)


@pytest.mark.parametrize(("number", "struct", "least"), CALLS)
def test_older_callers(raw: Raw, number: int, struct: type[abi.Struct], least: int) -> None:
    """A shorter struct works down to what every version has had, and is not overrun."""
    for size in range(0, ctypes.sizeof(struct), 4):
        handle = raw.alloc(PAGE).handle
        value = good_request(struct, raw, handle)
        buffer = bytearray(bytes(value)[:size] + b"\xa5" * (ctypes.sizeof(struct) - size))
        result = raw.ioctl(abi.iowr(number, size), buffer)
        assert result == (0 if size >= least else errno.EINVAL), size
        assert buffer[size:] == b"\xa5" * (ctypes.sizeof(struct) - size)
        if struct is abi.Alloc and result == 0:
            assert raw.free(abi.Alloc.from_buffer(buffer).handle) == 0
        if struct is abi.Export and result == 0:
            os.close(abi.Export.from_buffer(buffer).fd)
        freed = struct is abi.Free and result == 0
        assert raw.free(handle) == (errno.ENOENT if freed else 0)


@pytest.mark.parametrize(("number", "struct", "least"), CALLS)
def test_newer_callers(raw: Raw, number: int, struct: type[abi.Struct], least: int) -> None:
    """A longer struct works while the tail is zero, and is refused when it asks for more."""
    size = ctypes.sizeof(struct)
    # the number of a call has 14 bits for the size
    for extra in (1, 4, 8, 64, min(PAGE, (1 << 14) - 1) - size):
        handle = raw.alloc(PAGE).handle
        value = good_request(struct, raw, handle)
        for at in {0, extra - 1}:
            tail = bytearray(extra)
            tail[at] = 1
            before = raw.info().nr_tensors
            request = abi.iowr(number, size + extra)
            assert raw.ioctl(request, bytearray(bytes(value)) + tail) == errno.EINVAL
            assert raw.info().nr_tensors == before
        buffer = bytearray(bytes(value)) + bytearray(extra)
        assert raw.ioctl(abi.iowr(number, size + extra), buffer) == 0
        assert buffer[size:] == bytes(extra)
        if struct is abi.Alloc:
            assert raw.free(abi.Alloc.from_buffer(buffer).handle) == 0
        if struct is abi.Export:
            os.close(abi.Export.from_buffer(buffer).fd)
        assert raw.free(handle) == (errno.ENOENT if struct is abi.Free else 0)


@pytest.mark.parametrize("extra", [-32, -24, -16, -4, 4, 24, 4000])
def test_items_of_another_age(raw: Raw, extra: int) -> None:
    """A batch takes its items' size from item_size, shorter or longer than ours."""
    size = ctypes.sizeof(abi.Alloc) + extra
    count = 5
    memory = (ctypes.c_ubyte * (size * count + 64))()
    for i in range(count):
        item = bytes(abi.Alloc(size=(i + 1) * PAGE, kind=abi.Kind.KV))[:size]
        ctypes.memmove(ctypes.byref(memory, i * size), item, len(item))
    batch = abi.Batch(items=ctypes.addressof(memory), count=count, item_size=size)
    result = raw.ioctl(abi.IOC_ALLOC_BATCH, batch)
    if size < 24:
        assert (result, batch.failed) == (errno.EINVAL, 0)
        return
    assert (result, batch.failed) == (0, count)
    assert bytes(memory[size * count :]) == bytes(64)
    handles = [int.from_bytes(memory[i * size + 20 : i * size + 24], "little") for i in range(5)]
    assert len(set(handles)) == count
    for i, handle in enumerate(handles):
        result, query = raw.query(handle)
        assert (result, query.size) == (0, (i + 1) * PAGE)
    # a tail that asks for something, in one item only
    if extra > 0:
        memory[size * 3 - 1] = 1
        batch.failed = 99
        assert raw.ioctl(abi.IOC_ALLOC_BATCH, batch) == errno.EINVAL
        assert batch.failed == 2
        assert raw.info().nr_tensors == count
    assert raw.free_batch(handles)[0] == 0


def test_bad_addresses(raw: Raw) -> None:
    for request in (
        abi.IOC_INFO, abi.IOC_SET_QUOTA, abi.IOC_SET_NUMA, abi.IOC_ALLOC, abi.IOC_FREE,
        abi.IOC_QUERY, abi.IOC_EXPORT,
        abi.IOC_ALLOC_BATCH, abi.IOC_FREE_BATCH, abi.IOC_QUERY_BATCH,
    ):  # fmt: skip
        for address in (0, 1, 4096, 1 << 47, (1 << 64) - 4096):
            assert ioctl_at(raw, request, address) == errno.EFAULT, hex(request)
    for address in (0, 1 << 47, (1 << 64) - 8):
        for request, size in (
            (abi.IOC_ALLOC_BATCH, 32), (abi.IOC_FREE_BATCH, 8), (abi.IOC_QUERY_BATCH, 56),
        ):  # fmt: skip
            batch = abi.Batch(items=address, count=2, item_size=size)
            assert raw.ioctl(request, batch) == errno.EFAULT
            assert batch.failed == 0
    assert raw.info().nr_tensors == 0


def ioctl_at(raw: Raw, request: int, address: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
    return 0 if libc.ioctl(raw.fd, request, address) == 0 else ctypes.get_errno()


def test_results_that_cannot_be_written_are_undone(raw: Raw) -> None:
    """The struct is readable and not writable: EFAULT, and no tensor is left."""
    import mmap

    page = mmap.mmap(-1, PAGE)
    size = ctypes.sizeof(abi.Alloc)
    page[:size] = bytes(abi.Alloc(size=PAGE, kind=abi.Kind.KV))
    page[64 : 64 + size] = page[:size]
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    assert libc.mprotect(address, PAGE, mmap.PROT_READ) == 0
    assert ioctl_at(raw, abi.IOC_ALLOC, address) == errno.EFAULT
    batch = abi.Batch(items=address, count=2, item_size=64)
    assert raw.ioctl(abi.IOC_ALLOC_BATCH, batch) == errno.EFAULT
    assert raw.info().nr_tensors == 0
    assert raw.info().used == 0
    # half of the batch can be written
    double = mmap.mmap(-1, 2 * PAGE)
    at = ctypes.addressof(ctypes.c_char.from_buffer(double))
    double[PAGE - size : PAGE] = page[:size]
    double[PAGE : PAGE + size] = page[:size]
    assert libc.mprotect(at + PAGE, PAGE, mmap.PROT_READ) == 0
    batch = abi.Batch(items=at + PAGE - size, count=2, item_size=size)
    assert raw.ioctl(abi.IOC_ALLOC_BATCH, batch) == errno.EFAULT
    assert batch.failed == 1
    assert raw.info().nr_tensors == 0


def test_flags_and_counts_of_a_batch(raw: Raw) -> None:
    items = (abi.Alloc * 2)(*(abi.Alloc(size=1, kind=abi.Kind.KV) for _ in range(2)))
    limit = raw.info().max_batch
    for fields in ({"flags": 1}, {"flags": 1 << 31}, {"count": 0}, {"count": limit + 1},
                   {"count": 0xFFFFFFFF}, {"item_size": 0}, {"item_size": 23},
                   {"item_size": 0xFFFFFFFF}):  # fmt: skip
        for request in (abi.IOC_ALLOC_BATCH, abi.IOC_FREE_BATCH, abi.IOC_QUERY_BATCH):
            if request != abi.IOC_ALLOC_BATCH and fields == {"item_size": 23}:
                continue
            assert raw.batch(request, items, **fields)[0] == errno.EINVAL, fields
    assert raw.info().nr_tensors == 0


def test_unknown_flags(raw: Raw) -> None:
    known = sum(abi.AllocFlag)
    for bit in range(32):
        result, item = raw.try_alloc(PAGE, flags=1 << bit)
        assert result == (0 if known >> bit & 1 else errno.EINVAL), bit
        if result == 0:
            assert raw.query(item.handle)[1].alloc_flags == 1 << bit
            assert raw.free(item.handle) == 0
        assert raw.set_numa(abi.Numa.LOCAL, flags=1 << bit) == errno.EINVAL
        assert raw.try_alloc(PAGE, pad=1 << bit)[0] == errno.EINVAL
    item = raw.alloc(PAGE)
    for bit in range(32):
        assert raw.free(item.handle, flags=1 << bit) == errno.EINVAL
        query = abi.Query(handle=item.handle, flags=1 << bit)
        assert raw.ioctl(abi.IOC_QUERY, query) == errno.EINVAL
    assert raw.free(item.handle) == 0


def test_query_tells_all(raw: Raw) -> None:
    item = raw.alloc(3 * CHUNK + 5 * PAGE + 1, kind=abi.Kind.WEIGHTS)
    result, query = raw.query(item.handle)
    assert result == 0
    assert (query.handle, query.kind, query.pool, query.flags) == (
        item.handle, abi.Kind.WEIGHTS, abi.Pool.CHUNK, 0,
    )  # fmt: skip
    assert query.size == 3 * CHUNK + 5 * PAGE + 1
    assert query.length == round_up(query.size, PAGE) == query.held
    assert query.offset == item.offset
    assert query.nr_chunks == 3
    assert query.nr_runs == 2  # 6 pages: 4 + 2
    assert query.mapping in (*abi.Mapping,)
    assert query.alloc_flags == 0
    assert raw.free(item.handle) == 0
    assert raw.query(item.handle)[0] == errno.ENOENT
