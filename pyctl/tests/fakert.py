# SPDX-License-Identifier: MIT
"""The RT pool without a kernel: the rules of the header, each arena on a memfd.

Memory that is freed is filled with POISON, and so is what a moved block leaves behind: who looks
at what is not his any more is seen at once. Time stands still but for a wait that nobody ends:
that takes the clock to its deadline.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from tensormem import abi
from tensormem.abi import RTFlag

CHUNK = 2 << 20
POISON = 0xDB
GRANULE = 128
MOVABLE = 1 << 31


def refuse(number: int) -> NoReturn:
    raise OSError(number, "refused")


@dataclass(eq=False)
class Block:
    """One block, or one item of a reservation; in granules."""

    client: FakeRT
    start: int
    length: int
    handle: int
    size_class: Class | None = None
    pins: int = 1

    @property
    def movable(self) -> bool:
        return self.handle >= MOVABLE


@dataclass(eq=False)
class Class:
    """Blocks of one size that are laid aside."""

    start: int
    size: int
    count: int
    free: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        return self.size * self.count


@dataclass(eq=False)
class Waiter:
    """A request that waits."""

    client: FakeRT
    length: int
    flags: RTFlag
    priority: int
    number: int
    size_class: Class | None
    block: Block | None = None


class RTPool:
    """The RT pool of a machine.

    Attributes:
        now: CLOCK_MONOTONIC, in ns.
        others: what others do while somebody waits, one for each time he is looked after. One that
            raises InterruptedError is a signal.
        nice: the caller has CAP_SYS_NICE.
        locked: bytes that the caller may lock.
    """

    def __init__(self, size: int = 64 << 20) -> None:
        self.size, self.nice, self.locked = size, True, size
        self.now = 1_000_000_000
        self.others: list[Callable[[], object]] = []
        self.arenas: list[Arena] = []
        self.descriptors: dict[int, FakeRT] = {}
        self.fail: dict[int, int] = {}  # request -> errno
        self.calls: list[int] = []
        self.map_error: int | None = None
        self.lock = threading.RLock()
        self.pid = os.getpid()

    @property
    def used(self) -> int:
        return sum(arena.size for arena in self.arenas)

    def open(self, a: abi.RTOpen) -> None:
        if a.flags or a.pad or a.priority > abi.RT_MAX_PRIORITY or a.movable > 65536:
            refuse(errno.EINVAL)
        if bool(a.size) == (a.arena >= 0) or (a.movable and not a.size):
            refuse(errno.EINVAL)
        if a.priority and not self.nice:
            refuse(errno.EPERM)
        if a.size:
            size = -(-a.size // CHUNK) * CHUNK
            if self.used + size > self.size:
                refuse(errno.ENOSPC)
            if self.used + size > self.locked:
                refuse(errno.EPERM)
            arena = Arena(self, size, a.movable)
            self.arenas.append(arena)
        else:
            try:
                os.fstat(a.arena)
            except OSError:
                refuse(errno.EBADF)
            if a.arena not in self.descriptors:
                refuse(errno.EINVAL)
            arena = self.descriptors[a.arena].arena
            if len(arena.clients) >= 255:
                refuse(errno.ENOSPC)
        a.fd = FakeRT(arena, a.priority).fd


class Arena:
    """The memory that some clients share."""

    def __init__(self, pool: RTPool, size: int, movable: int) -> None:
        self.pool, self.size, self.movable = pool, size, movable
        self.fd = os.memfd_create("tensormem-fake-rt", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)
        self.clients: list[FakeRT] = []
        self.blocks: dict[int, Block] = {}  # by handle
        self.waiters: list[Waiter] = []
        self.next_movable = self.moves = self.arrivals = 0

    def taken(self) -> list[tuple[int, int]]:
        """Return starts and lengths of what the heap has given, sorted."""
        found = [(b.start, b.length) for b in self.blocks.values() if b.size_class is None]
        found += [(c.start - 1, c.length + 2) for client in self.clients for c in client.classes]
        return sorted(found)

    def holes(self) -> list[tuple[int, int]]:
        found, here = [], 0
        for start, length in [*self.taken(), (self.size // GRANULE, 0)]:
            if start > here:
                found.append((here, start - here))
            here = start + length
        return found

    def find(self, length: int) -> int:
        for start, room in self.holes():
            if room >= length:
                return start
        refuse(errno.ENOSPC)

    def poison(self, start: int, length: int) -> None:
        os.pwrite(self.fd, bytes([POISON]) * length * GRANULE, start * GRANULE)

    def from_heap(self, client: FakeRT, length: int, flags: RTFlag) -> Block:
        handle = 0
        if RTFlag.MOVABLE in flags:
            if sum(b.movable for b in self.blocks.values()) >= self.movable:
                refuse(errno.ENFILE)
            handle = MOVABLE + self.next_movable
        else:
            length = max(length, 2)
        start = self.find(length)
        if handle:
            self.next_movable += 1
        block = Block(client, start, length, handle or start + 1)
        self.blocks[block.handle] = block
        return block

    def compact(self, length: int) -> bool:
        """Move blocks down, one by one, until there is a hole of this length; say whether."""
        for block in sorted(self.blocks.values(), key=lambda b: b.start):
            hole = next(((s, n) for s, n in self.holes() if s + n == block.start), None)
            if block.movable and not block.pins and hole:
                data = os.pread(self.fd, block.length * GRANULE, block.start * GRANULE)
                old, block.start = block.start, hole[0]
                self.poison(old, block.length)
                os.pwrite(self.fd, data, block.start * GRANULE)
                self.moves += 1
            if any(room >= length for _, room in self.holes()):
                return True
        return False

    def serve(self) -> None:
        """Give what there is to the first of those who wait, then to the next."""
        # what is free in a class is for its own, in order of arrival
        for waiter in sorted(self.waiters, key=lambda waiter: waiter.number):
            if waiter.size_class is not None and waiter.size_class.free:
                waiter.block = waiter.client.take_item(waiter.size_class)
                self.waiters.remove(waiter)
        while self.waiters:
            first = self.waiters[0]
            try:
                first.block = self.from_heap(first.client, first.length, first.flags)
            except OSError:
                if not self.compact(first.length):
                    return
                continue
            self.waiters.pop(0)

    def settle(self) -> None:
        """Free the arena when nobody has it."""
        if not self.clients and self.fd >= 0 and os.getpid() == self.pool.pid:
            self.poison(0, self.size // GRANULE)
            os.close(self.fd)
            self.fd = -1
            self.pool.arenas.remove(self)


class Mapping(mmap.mmap):
    """A mapping that says when it ends."""

    client: FakeRT

    def __del__(self) -> None:
        self.client.mappings -= 1
        self.client.settle()


class FakeRT:
    """A descriptor of an RT client; stands in for tensormem.device.KernelDevice."""

    def __init__(self, arena: Arena, priority: int) -> None:
        self.arena, self.pool, self.priority = arena, arena.pool, priority
        self.fd = os.dup(arena.fd)
        self.open, self.mappings = True, 0
        self.classes: list[Class] = []
        self.allocs = self.refused = self.misses = self.waits = 0
        arena.clients.append(self)
        self.pool.descriptors[self.fd] = self

    # -- the Device protocol ---------------------------------------------------

    def ioctl(self, request: int, argument: abi.Struct) -> None:
        assert self.fd >= 0, "closed"
        assert (request >> 16) & 0x3FFF == ctypes.sizeof(argument)
        with self.pool.lock:
            self.pool.calls.append(request)
            if request in self.pool.fail:
                refuse(self.pool.fail[request])
            self.dispatch(request, argument)

    def map(self, offset: int, length: int, *, write: bool = True) -> mmap.mmap:
        assert write
        assert (offset, length) == (0, self.arena.size)
        if self.pool.map_error:
            refuse(self.pool.map_error)
        mapping = Mapping(self.fd, length)
        mapping.client = self
        self.mappings += 1
        return mapping

    def read(self, size: int, timeout: float | None) -> bytes:
        raise AssertionError("an RT client has nothing to read")

    def pread(self, size: int, offset: int) -> bytes:
        raise AssertionError("an RT client is not read")

    def poll(self, events: int, timeout: float | None) -> int:
        raise AssertionError("nobody polls it")

    def other(self, fd: int) -> FakeRT:
        raise AssertionError("an RT client makes no descriptors")

    def fileno(self) -> int:
        return self.fd

    def close(self) -> None:
        assert self.fd >= 0, "closed twice"
        del self.pool.descriptors[self.fd]
        os.close(self.fd)
        self.fd, self.open = -1, False
        self.settle()

    def settle(self) -> None:
        """Free everything at the last close, of a descriptor or of a mapping."""
        if self.open or self.mappings or os.getpid() != self.pool.pid or self.arena.fd < 0:
            return
        for block in [b for b in self.arena.blocks.values() if b.client is self]:
            self.free(block)
        self.classes.clear()
        self.arena.clients.remove(self)
        self.arena.serve()
        self.arena.settle()

    # -- the kernel's part -------------------------------------------------------

    def dispatch(self, request: int, a: Any) -> None:
        if isinstance(a, abi.RTInfo):
            self._info(a)
        elif isinstance(a, abi.RTReserve):
            self._reserve(a)
        elif isinstance(a, abi.RTAlloc):
            self._alloc(a)
        elif isinstance(a, abi.RTPriority):
            if a.flags or a.priority > abi.RT_MAX_PRIORITY:
                refuse(errno.EINVAL)
            if a.priority > self.priority and not self.pool.nice:
                refuse(errno.EPERM)
            self.priority = a.priority
        elif isinstance(a, abi.Batch):
            self._batch(request, a)
        else:
            assert isinstance(a, abi.RTBlock)
            if a.flags:
                refuse(errno.EINVAL)
            block = self.find(a.handle)
            if request == abi.IOC_RT_FREE:
                self.free(block)
                self.arena.serve()
            elif request == abi.IOC_RT_PIN:
                block.pins += block.movable
                a.offset = block.start * GRANULE
            else:
                assert request == abi.IOC_RT_UNPIN
                if not block.movable:
                    refuse(errno.ENOENT)
                if not block.pins:
                    refuse(errno.EINVAL)
                block.pins -= 1
                self.arena.serve()

    def find(self, handle: int) -> Block:
        block = self.arena.blocks.get(handle)
        if block is None or block.client is not self:
            refuse(errno.ENOENT)
        return block

    def free(self, block: Block) -> None:
        self.arena.poison(block.start, block.length)
        if block.size_class is not None:
            block.size_class.free.append(block.start)
        del self.arena.blocks[block.handle]

    def _mine(self) -> list[Block]:
        return [b for b in self.arena.blocks.values() if b.client is self]

    def _info(self, a: abi.RTInfo) -> None:
        arena = self.arena
        a.size, a.granule, a.clients = arena.size, GRANULE, len(arena.clients)
        a.free = sum(room for _, room in arena.holes()) * GRANULE
        # a single granule is too small for a block of the heap
        a.largest = max((room for _, room in arena.holes() if room > 1), default=0) * GRANULE
        a.reserved = sum(c.length + 2 for c in self.classes) * GRANULE
        a.used = sum(b.length for b in self._mine()) * GRANULE
        a.blocks, a.priority = len(self._mine()), self.priority
        a.waiting = sum(w.client is self for w in arena.waiters)
        a.allocs, a.refused, a.misses = self.allocs, self.refused, self.misses
        a.waits, a.moves = self.waits, arena.moves

    def _reserve(self, a: abi.RTReserve) -> None:
        if not self.pool.nice:
            refuse(errno.EPERM)
        if not 0 < a.size <= self.arena.size or a.flags:
            refuse(errno.EINVAL)
        size = -(-a.size // GRANULE)
        found = next((c for c in self.classes if c.size == size), None)
        if not a.count:
            if found is None:
                refuse(errno.ENOENT)
            if len(found.free) < found.count:
                refuse(errno.EBUSY)
            self.classes.remove(found)
            self.arena.serve()
            return
        if found is not None:
            refuse(errno.EEXIST)
        if len(self.classes) == abi.RT_MAX_CLASSES:
            refuse(errno.ENOSPC)
        # a granule at both ends is no item's
        start = self.arena.find(size * a.count + 2) + 1
        self.classes.append(
            Class(start, size, a.count, [start + i * size for i in reversed(range(a.count))])
        )

    def _alloc(self, a: abi.RTAlloc) -> None:
        flags, length = RTFlag(a.flags), -(-a.size // GRANULE)
        movable = RTFlag.MOVABLE in flags
        if not 0 < a.size <= self.arena.size or a.flags >> 3 or a.deadline_ns >> 63:
            refuse(errno.EINVAL)
        if movable and (length > abi.RT_STEP or RTFlag.RESERVED in flags):
            refuse(errno.EINVAL)
        try:
            block = self._at_once(length, flags)
        except OSError as error:
            if not a.deadline_ns or error.errno != errno.ENOSPC or RTFlag.RESERVED in flags:
                self.refused += 1
                raise
            block = self._wait(length, flags, a)
        self.allocs += 1
        a.handle, a.offset = block.handle, block.start * GRANULE

    def _at_once(self, length: int, flags: RTFlag) -> Block:
        smallest = self._class(length, flags)
        if smallest is not None and smallest.free:
            return self.take_item(smallest)
        waiting = self.arena.waiters
        if RTFlag.RESERVED in flags or (waiting and waiting[0].priority >= self.priority):
            refuse(errno.ENOSPC)
        return self.arena.from_heap(self, length, flags)

    def _class(self, length: int, flags: RTFlag) -> Class | None:
        fits = [c for c in self.classes if c.size >= length and RTFlag.MOVABLE not in flags]
        return min(fits, key=lambda c: c.size, default=None)

    def take_item(self, of: Class) -> Block:
        start = of.free.pop()
        block = Block(self, start, of.size, start + 1, of)
        self.arena.blocks[block.handle] = block
        return block

    def _wait(self, length: int, flags: RTFlag, a: abi.RTAlloc) -> Block:
        pool, arena = self.pool, self.arena
        absolute = RTFlag.ABSOLUTE in flags
        end = a.deadline_ns if absolute else pool.now + a.deadline_ns
        size_class = self._class(length, flags)
        waiter = Waiter(self, length, flags, self.priority, arena.arrivals, size_class)
        arena.arrivals += 1
        place = next(
            (i for i, w in enumerate(arena.waiters) if w.priority < self.priority),
            len(arena.waiters),
        )
        arena.waiters.insert(place, waiter)
        if pool.now < end:
            arena.serve()
        self.waits += 1
        while waiter.block is None:
            try:
                if pool.others and pool.now < end:
                    pool.others.pop(0)()
                    continue
            except InterruptedError:
                arena.waiters.remove(waiter)
                refuse(errno.EINTR)
            if waiter.block is None:
                pool.now = max(pool.now, end)
                arena.waiters.remove(waiter)
                self.misses += 1
                refuse(errno.ETIMEDOUT)
        return waiter.block

    def _batch(self, request: int, a: abi.Batch) -> None:
        if not 0 < a.count <= abi.RT_MAX_BATCH or a.flags:
            refuse(errno.EINVAL)
        freeing = request == abi.IOC_RT_FREE_BATCH
        item = abi.RTBlock if freeing else abi.RTAlloc
        assert a.item_size == ctypes.sizeof(item)
        done: list[Any] = []
        for i, x in enumerate((item * a.count).from_address(a.items)):
            a.failed = i
            if freeing and x.handle in [y.handle for y in done]:
                refuse(errno.ENOENT)
            try:
                self.find(x.handle) if freeing else self._alloc(x)
            except OSError:
                for y in () if freeing else done:
                    self.free(self.find(y.handle))
                raise
            done.append(x)
        for x in done if freeing else ():
            self.free(self.find(x.handle))
        self.arena.serve()
        a.failed = a.count
