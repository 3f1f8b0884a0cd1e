# SPDX-License-Identifier: MIT
"""A tensormem device without a kernel: the ABI on a memfd.

It implements the header's rules (handles, offsets, quota, capacity, batches all or
none) on a sparse file, so mappings are real shared memory. Freed memory is filled
with POISON: an array that outlives its tensor is seen at once.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from dataclasses import dataclass

from tensormem import abi

PAGE = mmap.PAGESIZE
CHUNK = 2 << 20
WINDOW = 256 << 20
POISON = 0xDB


@dataclass
class Held:
    """One tensor of the fake."""

    size: int
    kind: int
    pool: int
    offset: int
    length: int


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
    ) -> None:
        self.fd = os.memfd_create("tensormem-fake", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, window)
        self.window, self.quota, self.capacity = window, quota, capacity
        self.max_batch, self.abi_version = max_batch, abi_version
        self.window_mapping = window_mapping
        self.tensors: dict[int, Held] = {}
        self.next_handle = 1
        self.calls: list[int] = []
        self.maps: list[tuple[int, int]] = []
        self.fail: dict[int, int] = {}  # request -> errno
        self.fail_map_after: int | None = None
        self.lock = threading.Lock()

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

    def map(self, offset: int, length: int) -> mmap.mmap:
        if (offset, length) == (0, self.window):
            if not self.window_mapping:
                raise OSError(errno.ENOMEM, "no address space")
        else:
            held = [t for t in self.tensors.values() if t.offset == offset]
            if not held or length > held[0].length:
                raise OSError(errno.EINVAL, "not one tensor")
            if self.fail_map_after is not None and len(self.maps) >= self.fail_map_after:
                raise OSError(errno.ENOMEM, "no address space")
        self.maps.append((offset, length))
        return mmap.mmap(self.fd, length, offset=offset)

    def fileno(self) -> int:
        return self.fd

    def close(self) -> None:
        assert self.fd >= 0, "closed twice"
        os.close(self.fd)
        self.fd = -1

    # -- the kernel's part -------------------------------------------------------

    @property
    def used(self) -> int:
        return sum(t.length for t in self.tensors.values())

    def _dispatch(self, request: int, a: abi.Struct) -> None:
        if isinstance(a, abi.Info):
            a.abi_version, a.page_size, a.chunk_size = self.abi_version, PAGE, CHUNK
            a.window_size, a.quota, a.used = self.window, self.quota, self.used
            a.nr_tensors, a.max_batch, a.cache_line = len(self.tensors), self.max_batch, 64
        elif isinstance(a, abi.Quota):
            if a.bytes < self.used:
                raise OSError(errno.EBUSY, "")
            if a.bytes > self.window:
                raise OSError(errno.EPERM, "")
            self.quota = a.bytes
        elif isinstance(a, abi.Alloc):
            self._alloc(a)
        elif isinstance(a, abi.Free):
            self._free(a)
        elif isinstance(a, abi.Query):
            self._query(a)
        elif isinstance(a, abi.Batch):
            self._batch(request, a)
        else:
            raise OSError(errno.ENOTTY, "")

    def _alloc(self, a: abi.Alloc) -> None:
        kinds, pools = [int(k) for k in abi.Kind], [int(p) for p in abi.Pool]
        if not 0 < a.size <= self.window or a.kind not in kinds or a.pool not in pools or a.flags:
            raise OSError(errno.EINVAL, "")
        pool = a.pool or (abi.Pool.CHUNK if a.size >= CHUNK else abi.Pool.BUDDY)
        unit = CHUNK if pool == abi.Pool.CHUNK else PAGE
        length = -(-a.size // unit) * unit
        if self.used + length > self.quota:
            raise OSError(errno.EDQUOT, "")
        if self.used + length > self.capacity:
            raise OSError(errno.ENOSPC, "")
        offset = 0
        for held in sorted(self.tensors.values(), key=lambda t: t.offset):
            if offset + length <= held.offset:
                break
            offset = -(-(held.offset + held.length) // unit) * unit
        if offset + length > self.window:
            raise OSError(errno.ENOBUFS, "")
        os.pwrite(self.fd, bytes(length), offset)
        a.handle, a.offset = self.next_handle, offset
        self.next_handle += 1
        self.tensors[a.handle] = Held(a.size, a.kind, pool, offset, length)

    def _free(self, a: abi.Free) -> None:
        if a.flags:
            raise OSError(errno.EINVAL, "")
        if a.handle not in self.tensors:
            raise OSError(errno.ENOENT, "")
        held = self.tensors.pop(a.handle)
        os.pwrite(self.fd, bytes([POISON]) * held.length, held.offset)

    def _query(self, a: abi.Query) -> None:
        if a.handle not in self.tensors:
            raise OSError(errno.ENOENT, "")
        t = self.tensors[a.handle]
        a.kind, a.pool, a.size, a.length, a.offset = t.kind, t.pool, t.size, t.length, t.offset
        a.held = t.length
        whole = t.pool == abi.Pool.CHUNK
        a.nr_chunks, a.nr_runs = (t.length // CHUNK, 0) if whole else (0, 1)

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
