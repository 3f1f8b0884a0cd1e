# SPDX-License-Identifier: MIT
"""A tensormem device without a kernel: the ABI on a memfd.

It implements the header's rules (handles, offsets, quota, capacity, nodes, reuse,
slabs, batches all or none) on a sparse file, so mappings are real shared memory. Freed
memory is filled with POISON: an array that outlives its tensor is seen at once.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from dataclasses import dataclass

from fakekv import FakeKV, State
from fakemodel import FakeGeneration, FakeSlot, Models
from fakert import FakeRT, RTPool
from tensormem import abi

PAGE = mmap.PAGESIZE
CHUNK = 2 << 20
WINDOW = 256 << 20
POISON = 0xDB
LINE = 64


@dataclass
class Held:
    """One tensor of the fake."""

    size: int
    kind: int
    pool: int
    offset: int
    length: int
    asked: abi.Alloc

    def alike(self, a: abi.Alloc) -> bool:
        """Say whether its memory would do for the request."""
        b = self.asked
        return (self.kind, self.length, b.pool, b.flags, b.numa, b.nodes) == (
            a.kind, -(-a.size // PAGE) * PAGE, a.pool, a.flags, a.numa, a.nodes,
        )  # fmt: skip


class FakeDmaBuf:
    """A tensor's part of the fake's memfd, as a descriptor of its own."""

    def __init__(self, memory: int, offset: int, write: bool) -> None:
        self.fd, self.offset, self.write = os.dup(memory), offset, write
        self.syncs: list[int] = []
        self.fail: list[int] = []  # an errno for each call to come

    def ioctl(self, request: int, argument: abi.Struct) -> None:
        if self.fail:
            raise OSError(self.fail.pop(0), "injected")
        assert request == 0x40086200  # DMA_BUF_IOCTL_SYNC of linux/dma-buf.h
        self.syncs.append(int.from_bytes(bytes(argument), "little"))

    def map(self, offset: int, length: int, *, write: bool = True) -> mmap.mmap:
        if write and not self.write:
            raise OSError(errno.EACCES, "read-only")
        access = mmap.PROT_READ | (mmap.PROT_WRITE if write else 0)
        return mmap.mmap(self.fd, length, mmap.MAP_SHARED, access, offset=self.offset + offset)

    def read(self, size: int, timeout: float | None) -> bytes:
        raise AssertionError("nothing to read")

    def pread(self, size: int, offset: int) -> bytes:
        raise AssertionError("no contents")

    def poll(self, events: int, timeout: float | None) -> int:
        raise AssertionError("nobody polls it")

    def other(self, fd: int) -> FakeDmaBuf:
        raise AssertionError("makes no descriptors")

    def fileno(self) -> int:
        return self.fd

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


@dataclass
class Slab:
    """Pages that small tensors of one class share."""

    offset: int
    length: int
    size: int
    free: set[int]


class FakeDevice:
    """Stands in for tensormem.device.KernelDevice."""

    def __init__(
        self,
        *,
        window: int = WINDOW,
        quota: int = WINDOW,
        capacity: int = WINDOW,
        max_batch: int = 4,
        abi_version: int = abi.ABI_VERSION,
        window_mapping: bool = True,
        nodes: int = 0b11,
        memlock: int = WINDOW,
        mapping: abi.Mapping = abi.Mapping.BLOCK,
        models: Models | None = None,
        rt: RTPool | None = None,
        region: int = 0,
    ) -> None:
        self.region = region
        self.fd = os.memfd_create("tensormem-fake", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, window)
        self.window, self.quota, self.capacity = window, quota, capacity
        self.max_batch, self.abi_version = max_batch, abi_version
        self.window_mapping = window_mapping
        self.nodes, self.memlock, self.mapping = nodes, memlock, mapping
        self.numa: tuple[int, int] = (abi.Numa.LOCAL, 0)
        self.tensors: dict[int, Held] = {}
        self.parked: list[Held] = []
        self.slabs: list[Slab] = []
        self.allocs: list[abi.Alloc] = []
        self.next_handle = 1
        self.calls: list[int] = []
        self.budget, self.most = (1 << 64) - 1, (1 << 64) - 1
        self.maps: list[tuple[int, int]] = []
        self.fail: dict[int, int] = {}  # request -> errno
        self.fail_map_after: int | None = None
        self.lock = threading.Lock()
        self.caches: dict[int, FakeKV] = {}  # by descriptor
        self.exports: dict[int, FakeDmaBuf] = {}  # by descriptor
        self.models = Models() if models is None else models
        self.rt = RTPool() if rt is None else rt

    # -- the Device protocol ---------------------------------------------------

    def ioctl(self, request: int, argument: abi.Struct) -> None:
        if self.fd < 0:
            raise OSError(errno.EBADF, "closed")
        assert (request >> 16) & 0x3FFF == ctypes.sizeof(argument)
        with self.lock:
            self.calls.append(request)
            if request in self.fail:
                raise OSError(self.fail[request], "injected")
            self._dispatch(request, argument)

    def map(self, offset: int, length: int, *, write: bool = True) -> mmap.mmap:
        assert write
        if (offset, length) == (0, self.window):
            if not self.window_mapping:
                raise OSError(errno.ENOMEM, "no address space")
        else:
            if offset % PAGE or length % PAGE:
                raise OSError(errno.EINVAL, "not whole pages")
            if not any(o <= offset and offset + length <= o + n for o, n in self._regions()):
                raise OSError(errno.EINVAL, "not one tensor")
            if self.fail_map_after is not None and len(self.maps) >= self.fail_map_after:
                raise OSError(errno.ENOMEM, "no address space")
        self.maps.append((offset, length))
        return mmap.mmap(self.fd, length, offset=offset)

    def read(self, size: int, timeout: float | None) -> bytes:
        raise AssertionError("a client has nothing to read")

    def pread(self, size: int, offset: int) -> bytes:
        raise AssertionError("a client has no contents")

    def poll(self, events: int, timeout: float | None) -> int:
        raise AssertionError("nobody polls it")

    def other(self, fd: int) -> FakeKV | FakeSlot | FakeGeneration | FakeRT | FakeDmaBuf:
        if fd in self.exports:
            return self.exports[fd]
        return self.caches.get(fd) or self.rt.descriptors.get(fd) or self.models.descriptors[fd]

    def fileno(self) -> int:
        return self.fd

    def close(self) -> None:
        assert self.fd >= 0, "closed twice"
        os.close(self.fd)
        self.fd = -1

    # -- the kernel's part -------------------------------------------------------

    def _regions(self) -> list[tuple[int, int]]:
        """Return what is taken of the window, sorted."""
        regions = [(t.offset, t.length) for t in self.tensors.values() if t.pool != abi.Pool.SLAB]
        regions += [(t.offset, t.length) for t in self.parked]
        return sorted(regions + [(s.offset, s.length) for s in self.slabs])

    @property
    def kept(self) -> int:
        return sum(t.length for t in self.parked)

    @property
    def used(self) -> int:
        return sum(length for _, length in self._regions())

    def _dispatch(self, request: int, a: abi.Struct) -> None:
        if isinstance(a, abi.Info):
            a.abi_version, a.page_size, a.chunk_size = self.abi_version, PAGE, CHUNK
            a.window_size, a.quota, a.used = self.window, self.quota, self.used
            a.nr_tensors, a.max_batch, a.cache_line = len(self.tensors), self.max_batch, LINE
            a.kept, a.nodes = self.kept, self.nodes
        elif isinstance(a, abi.Quota):
            if a.bytes < self.used:
                raise OSError(errno.EBUSY, "")
            if a.bytes > self.window:
                raise OSError(errno.EPERM, "")
            self.quota = a.bytes
        elif isinstance(a, abi.Budget):
            if not a.bytes:
                raise OSError(errno.EINVAL, "")
            if a.bytes > max(self.budget, self.most):
                raise OSError(errno.EPERM, "")
            self.budget = a.bytes
        elif isinstance(a, abi.Bandwidth):
            a.budget, a.moved = self.budget, sum(item.size for item in self.allocs)
            a.period_ns, a.client = 10_000_000, 7
        elif isinstance(a, abi.SetNuma):
            self._check_numa(a)
            self.numa = (a.numa or abi.Numa.LOCAL, a.nodes)
        elif isinstance(a, abi.Alloc):
            self._alloc(a)
            self.allocs.append(type(a).from_buffer_copy(a))
        elif isinstance(a, abi.Free):
            self._free(a)
        elif isinstance(a, abi.Query):
            self._query(a)
        elif isinstance(a, abi.Export):
            self._export(a)
        elif isinstance(a, abi.Batch):
            self._batch(request, a)
        elif isinstance(a, abi.KVCreate):
            cache = FakeKV(State(a, self.max_batch), self.window_mapping)
            self.caches[cache.fd] = cache
            a.fd = cache.fd
        elif isinstance(a, abi.ModelOpen):
            self.models.open(a)
        elif isinstance(a, abi.RTOpen):
            self.rt.open(a)
        else:
            raise OSError(errno.ENOTTY, "")

    def _check_numa(self, a: abi.Alloc | abi.SetNuma) -> None:
        masked = a.numa in (abi.Numa.BIND, abi.Numa.INTERLEAVE)
        if a.numa not in list(abi.Numa) or a.nodes & ~self.nodes or (a.nodes and not masked):
            raise OSError(errno.EINVAL, "")
        if a.numa == abi.Numa.BIND and not a.nodes:
            raise OSError(errno.EINVAL, "")

    def _pool(self, a: abi.Alloc) -> int:
        """Check a request and say which pool serves it."""
        flags, both = abi.AllocFlag(a.flags), abi.AllocFlag.HUGE | abi.AllocFlag.PAGED
        known = both | abi.AllocFlag.NOZERO | abi.AllocFlag.PINNED
        if not 0 < a.size <= self.window or a.pad or a.flags & ~known or both in flags:
            raise OSError(errno.EINVAL, "")
        if a.kind not in list(abi.Kind) or a.pool not in list(abi.Pool):
            raise OSError(errno.EINVAL, "")
        self._check_numa(a)
        shared = not flags & abi.AllocFlag.PINNED and a.numa == abi.Numa.DEFAULT
        if a.pool == abi.Pool.SLAB and (a.size >= PAGE or not shared):
            raise OSError(errno.EINVAL, "")
        if a.pool == abi.Pool.DMA and a.numa != abi.Numa.DEFAULT:
            raise OSError(errno.EINVAL, "")
        if a.pool == abi.Pool.DMA:
            self._check_region(a.size)
        if a.pool:
            return int(a.pool)
        if a.size <= PAGE // 2 and a.kind != abi.Kind.KV and shared:
            return abi.Pool.SLAB
        return abi.Pool.CHUNK if a.size > CHUNK - PAGE else abi.Pool.BUDDY

    def _check_region(self, size: int) -> None:
        """There is one of so many bytes, or none."""
        if not self.region:
            raise OSError(errno.ENODEV, "")
        used = sum(t.length for t in self.tensors.values() if t.pool == abi.Pool.DMA)
        if used + -(-size // CHUNK) * CHUNK > self.region:
            raise OSError(errno.ENOSPC, "")

    def _place(self, length: int, unit: int) -> int:
        """Charge and find room, if need be at the cost of what is parked."""
        for last in (False, True):
            number = 0
            if self.used + length > self.quota:
                number = errno.EDQUOT
            elif self.used + length > self.capacity:
                number = errno.ENOSPC
            if number and (last or not self.parked):
                raise OSError(number, "")
            if number:
                for held in self.parked:
                    self._poison(held.offset, held.length)
                self.parked.clear()
        offset = 0
        for begin, size in self._regions():
            if offset + length <= begin:
                break
            offset = -(-(begin + size) // unit) * unit
        if offset + length > self.window:
            raise OSError(errno.ENOBUFS, "")
        return offset

    def _poison(self, offset: int, length: int) -> None:
        os.pwrite(self.fd, bytes([POISON]) * length, offset)

    def _small(self, size: int) -> int:
        """Take an object: whole lines of odd numbers do not fill a page, so some straddle."""
        size = 1 << max(3, (size - 1).bit_length()) if size <= LINE else -(-size // LINE) * LINE
        slab = next((s for s in self.slabs if s.size == size and s.free), None)
        if slab is None:
            length = PAGE if PAGE % size == 0 else 8 * PAGE
            begin = self._place(length, length)
            slab = Slab(begin, length, size, set(range(begin, begin + length - size + 1, size)))
            self.slabs.append(slab)
        offset = min(slab.free)
        slab.free.remove(offset)
        return offset

    def _slab(self, offset: int) -> Slab:
        return next(s for s in self.slabs if s.offset <= offset < s.offset + s.length)

    def _alloc(self, a: abi.Alloc) -> None:
        pool = self._pool(a)
        flags = abi.AllocFlag(a.flags)
        asked = type(a).from_buffer_copy(a)
        unit = CHUNK if a.pool in (abi.Pool.CHUNK, abi.Pool.DMA) else PAGE
        length = -(-a.size // unit) * unit
        pinned = sum(
            t.length
            for t in [*self.tensors.values(), *self.parked]
            if t.asked.flags & abi.AllocFlag.PINNED
        )
        reused = next((t for t in self.parked if t.alike(a)), None)
        if pool == abi.Pool.SLAB:
            offset = self._small(a.size)
            length = self._slab(offset).size
        elif reused is not None and abi.AllocFlag.NOZERO in flags:
            self.parked.remove(reused)
            offset, length = reused.offset, reused.length
        else:
            if abi.AllocFlag.PINNED in flags and pinned + length > self.memlock:
                raise OSError(errno.EPERM, "")
            offset = self._place(length, CHUNK if length >= CHUNK else PAGE)
            reused = None
        if reused is None or abi.AllocFlag.NOZERO not in flags:
            os.pwrite(self.fd, bytes(length), offset)
        a.handle, a.offset = self.next_handle, offset
        self.next_handle += 1
        self.tensors[a.handle] = Held(a.size, a.kind, pool, offset, length, asked)

    def _free(self, a: abi.Free) -> None:
        if a.flags:
            raise OSError(errno.EINVAL, "")
        if a.handle not in self.tensors:
            raise OSError(errno.ENOENT, "")
        held = self.tensors.pop(a.handle)
        keeps = held.pool not in (abi.Pool.SLAB, abi.Pool.DMA)
        if keeps and held.asked.flags & abi.AllocFlag.NOZERO:
            self.parked.append(held)
            return
        self._poison(held.offset, held.length)
        if held.pool == abi.Pool.SLAB:
            slab = self._slab(held.offset)
            slab.free.add(held.offset)
            if len(slab.free) == slab.length // slab.size:
                self.slabs.remove(slab)

    def _export(self, a: abi.Export) -> None:
        if a.handle not in self.tensors:
            raise OSError(errno.ENOENT, "")
        t = self.tensors[a.handle]
        if t.pool == abi.Pool.SLAB:
            raise OSError(errno.EOPNOTSUPP, "")
        shared = FakeDmaBuf(self.fd, t.offset, not a.flags & abi.ExportFlag.READ_ONLY)
        a.fd, a.size = shared.fd, -(-t.size // PAGE) * PAGE
        self.exports[shared.fd] = shared

    def _query(self, a: abi.Query) -> None:
        if a.handle not in self.tensors:
            raise OSError(errno.ENOENT, "")
        t = self.tensors[a.handle]
        a.kind, a.pool, a.size, a.length, a.offset = t.kind, t.pool, t.size, t.length, t.offset
        a.held, a.alloc_flags = t.length, t.asked.flags
        if t.pool != abi.Pool.SLAB:
            a.nr_chunks = t.length // CHUNK if t.asked.pool != abi.Pool.BUDDY else 0
            a.nr_runs = (t.length - a.nr_chunks * CHUNK).bit_count()
        a.mapping = abi.Mapping.PAGES
        huge = t.kind == abi.Kind.WEIGHTS and not t.asked.flags & abi.AllocFlag.PAGED
        if a.nr_chunks and (huge or t.asked.flags & abi.AllocFlag.HUGE):
            a.mapping = self.mapping

    def _batch(self, request: int, a: abi.Batch) -> None:
        if not 0 < a.count <= self.max_batch or a.flags:
            raise OSError(errno.EINVAL, "")
        item = {abi.IOC_ALLOC_BATCH: abi.Alloc, abi.IOC_FREE_BATCH: abi.Free}[request]
        assert a.item_size == ctypes.sizeof(item)
        array = (item * a.count).from_address(a.items)
        if item is abi.Free:
            names = [x.handle for x in array]
            for i, name in enumerate(names):
                if name not in self.tensors or name in names[:i]:
                    a.failed = i
                    raise OSError(errno.ENOENT, "")
        done = []
        for i, x in enumerate(array):
            try:
                self._dispatch(0, x)
                done.append(x)
            except OSError:
                a.failed = i
                for y in done:
                    self._free(abi.Free(handle=y.handle))
                raise
        a.failed = a.count
