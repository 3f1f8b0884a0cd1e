# SPDX-License-Identifier: MIT
"""The RT pool: memory that is there in time.

::

    with tensormem.rt("4M", priority=10) as rt:
        rt.reserve(2048, 16)  # 16 blocks of up to 2 KiB that nobody can take away
        with rt.alloc(1500, reserved=True) as block:
            block.buffer()[:4] = b"ping"

        frame = rt.buffer(1500, reserved=True)  # for a loop: nothing is made in it
        while running:
            offset = frame.take()
            struct.pack_into("<Id", rt.memory, offset, number, value)
            frame.give()

An arena is mapped once, with all of its pages. :class:`RTClient` is one who allocates in it;
several may share an arena and see each other's memory.

Who keeps what alive: an array or a buffer of a block keeps the block, as long as nobody frees
that by name; a block that is dropped is freed when the last array of it is gone.
``block.free()`` is different from ``client.free(array)``: it gives the memory back at once,
because who has a deadline cannot wait for a garbage collector. Arrays of it stay mapped and can
be touched, but what they show is the arena's: the next block is likely to lie there. Likewise
what is known of a movable block when it is not pinned any more.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import math
import operator
import os
import resource
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, SupportsIndex, cast

import numpy as np
import numpy.typing as npt

from . import abi, errors, histogram
from .abi import RTFlag
from .closing import Closing
from .device import DEFAULT_PATH, Device, KernelDevice
from .session import Event, Export, Held, Session, address
from .units import format_size, parse_size

__all__ = [
    "RTBlock",
    "RTBuffer",
    "RTClient",
    "RTInfo",
    "SelfTest",
    "open_rt",
    "rt",
    "self_test",
]

#: Bytes, or a text such as ``"4M"``.
Size = SupportsIndex | str

#: Gives a device to open arenas with.
Opener = Callable[[], contextlib.AbstractContextManager[Device]]

_U32 = (1 << 32) - 1
_LATEST = (1 << 63) - 1


@dataclass(frozen=True)
class RTInfo:
    """What the kernel says about an arena and one client of it.

    Attributes:
        size: bytes of the arena.
        granule: bytes; all offsets are multiples of it.
        clients: of the arena.
        free: bytes of the arena that are neither reserved nor allocated.
        largest: bytes of a block that could be had now outside of reservations.
        reserved: bytes laid aside for this client, with two granules for each size.
        used: bytes that it has allocated, also of what is reserved for it.
        blocks: blocks it has.
        priority: its priority.
        waiting: calls of it that wait now.
        allocs: blocks that it ever got.
        refused: requests that were refused because there was no room.
        misses: deadlines that were missed.
        waits: requests that had to wait.
        moves: blocks of the arena that were moved.
    """

    size: int
    granule: int
    clients: int
    free: int
    largest: int
    reserved: int
    used: int
    blocks: int
    priority: int
    waiting: int
    allocs: int
    refused: int
    misses: int
    waits: int
    moves: int


class _Deadline(NamedTuple):
    """A deadline as the kernel takes it; 0 for none."""

    ns: int
    absolute: bool


def _integer(value: SupportsIndex, what: str, smallest: int, largest: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise errors.InvalidArgument(f"{what} of {value!r} is not an integer") from None
    if not smallest <= number <= largest:
        raise errors.InvalidArgument(
            f"{what} of {number} is not possible", f"pass one from {smallest} to {largest}"
        )
    return number


def _bytes(value: Size, what: str) -> int:
    number = parse_size(value) if isinstance(value, str) else value
    return _integer(number, what, 1, _LATEST)


def _deadline(deadline_ns: SupportsIndex, absolute: bool) -> _Deadline:
    try:
        number = operator.index(deadline_ns)
    except TypeError:
        raise errors.InvalidArgument(
            f"a deadline of {deadline_ns!r} is not a number of nanoseconds",
            "pass an integer: 1_000_000 is a millisecond",
        ) from None
    if number < 0:
        raise errors.InvalidArgument(
            f"a deadline of {number} ns is over already",
            "for one that may have passed use absolute=True, and a time of time.monotonic_ns()",
        )
    if number > _LATEST:
        raise errors.InvalidArgument(f"a deadline of {number} ns is beyond 2^63 ns", "ask for less")
    # 0 is no deadline for the kernel
    return _Deadline(max(1, number), True) if absolute else _Deadline(number, False)


def _flags(deadline: _Deadline, reserved: bool, movable: bool) -> RTFlag:
    flags = RTFlag.ABSOLUTE if deadline.absolute else RTFlag(0)
    if reserved:
        flags |= RTFlag.RESERVED
    return flags | RTFlag.MOVABLE if movable else flags


def _item(size: Size, deadline: _Deadline, reserved: bool, movable: bool) -> abi.RTAlloc:
    return abi.RTAlloc(
        size=_bytes(size, "a block"),
        deadline_ns=deadline.ns,
        flags=_flags(deadline, reserved, movable),
    )


class _Block(Held):
    """One block, and how often this process has pinned it."""

    __slots__ = ("movable", "offset", "pins", "size")
    session: _Session

    def __init__(self, session: _Session, item: abi.RTAlloc) -> None:
        super().__init__(session, int(item.handle))
        self.offset, self.size = int(item.offset), int(item.size)
        self.movable = RTFlag.MOVABLE in RTFlag(item.flags)
        self.pins = 1  # a movable one is born pinned, any other always is
        self.mapping = session.window


class _Session(Session):
    """Descriptor, mapping and books of one RT client."""

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        found = self.call(abi.IOC_RT_INFO, abi.RTInfo(), "this is not an RT client")
        self.size, self.granule = int(found.size), int(found.granule)
        try:
            self.window = device.map(0, self.size)
        except (OSError, OverflowError) as error:
            raise errors.OutOfMemory(
                f"cannot map an arena of {format_size(self.size)} ({error})",
                "make a smaller one, or raise the limit on address space (ulimit -v)",
            ) from None
        self.base = address(self.window)

    def error(
        self, number: int, cause: str | None = None, remedy: str | None = None
    ) -> errors.TensormemError:
        """Return the exception for an errno; the cause says what could not be done."""
        plain = errors.from_errno(number, None, remedy, rt=True)
        if cause is None or type(plain) is errors.TensormemError:
            return errors.from_errno(number, cause, remedy, rt=True)
        return errors.from_errno(number, f"{cause}, {plain.cause}", plain.remedy, rt=True)

    def no_longer(self) -> errors.Closed:
        """Return the exception for a call after close()."""
        return errors.Closed("this RT client is closed", "make another with tensormem.rt()")

    def hold(self) -> None:
        """Keep the descriptor open, like a call that is under way until it says CALL_DONE."""
        with self.locked():
            if self.closed:
                raise self.no_longer()
            self.calls += 1

    # -- allocate ------------------------------------------------------------

    def patiently(
        self, request: int, argument: abi.Struct, items: Sequence[abi.RTAlloc], deadline: _Deadline
    ) -> None:
        """Make a call that may wait; signals whose handlers return do not end it (PEP 475).

        Raises:
            OSError: with the errno of the ABI.
        """
        begin = time.monotonic_ns()
        try:
            self.device.ioctl(request, argument)
        except InterruptedError:
            self.again(request, argument, items, deadline, begin)

    def again(
        self,
        request: int,
        argument: abi.Struct,
        items: Sequence[abi.RTAlloc],
        deadline: _Deadline,
        begin: int,
    ) -> None:
        """Make a call again that a signal has ended, for the time that is left since it began."""
        relative = deadline.ns and not deadline.absolute
        try:
            while True:
                for item in items if relative else ():
                    item.deadline_ns = max(1, begin + deadline.ns - time.monotonic_ns())
                with contextlib.suppress(InterruptedError):
                    self.device.ioctl(request, argument)
                    return
        finally:
            for item in items:
                item.deadline_ns = deadline.ns

    def allocate(self, items: Sequence[abi.RTAlloc], deadline: _Deadline) -> list[_Block]:
        """Allocate all items or none."""
        array = (abi.RTAlloc * len(items))(*items)
        batch = abi.Batch(
            items=ctypes.addressof(array), count=len(items), item_size=ctypes.sizeof(abi.RTAlloc)
        )
        with self.calling():
            try:
                if len(items) == 1:
                    self.patiently(abi.IOC_RT_ALLOC, array[0], [array[0]], deadline)
                else:
                    self.patiently(abi.IOC_RT_ALLOC_BATCH, batch, list(array), deadline)
            except OSError as error:
                index = min(batch.failed, len(items) - 1)
                place = index if len(items) > 1 else None
                raise self.refusal(error.errno or 0, array[index], place) from None
            blocks = [_Block(self, item) for item in array]
            with self.locked():
                for block in blocks:
                    self.live[block.handle] = block
            return blocks

    def refusal(
        self, number: int, item: abi.RTAlloc, index: int | None = None
    ) -> errors.TensormemError:
        """Say which request failed and why."""
        what = f"cannot allocate {format_size(item.size)}"
        if index is not None:
            what = f"item {index}: {what}"
        flags = RTFlag(item.flags)
        longest = abi.RT_STEP * self.granule
        if number == errno.EINVAL and item.size > self.size:
            cause = f"{what}, the arena has {format_size(self.size)}"
            return errors.InvalidArgument(cause, "ask for less, or make a larger arena")
        if number == errno.EINVAL and RTFlag.MOVABLE in flags and item.size > longest:
            cause = f"{what}, a movable block has {format_size(longest)} at most"
            return errors.InvalidArgument(cause, "ask for less, or do without movable=True")
        if number == errno.EINVAL and RTFlag.MOVABLE in flags and RTFlag.RESERVED in flags:
            cause = f"{what}, a movable block never comes from a reservation"
            return errors.InvalidArgument(cause, "choose movable=True or reserved=True")
        if number == errno.ENOSPC and RTFlag.RESERVED in flags:
            cause = f"{what}, the reservation has no block left that it would take"
            return errors.ArenaFull(cause, "free some, or reserve more with rt.reserve()")
        return self.error(number, what)

    def export(self, block: _Block) -> npt.NDArray[np.uint8]:
        """Return the bytes of a block as an array whose base keeps it."""
        with self.locked():
            if not block.alive:
                raise _freed(block)
            if block.movable and not block.pins:
                raise errors.InvalidArgument(
                    f"block {block.handle} is not pinned and may lie anywhere",
                    "look at it inside 'with block.pinned() as view:'",
                )
            block.exports += 1
        return np.asarray(Export(block, self.base + block.offset, block.size))

    # -- release -------------------------------------------------------------

    def free(self, blocks: Sequence[_Block]) -> None:
        """Free blocks at once, all or none."""
        with self.calling():
            with self.locked():
                for place, block in enumerate(blocks):
                    if not block.alive or block in blocks[:place]:
                        raise _freed(block)
                    if block.pid != os.getpid():
                        raise errors.NotPermitted(
                            f"block {block.handle} was allocated by the parent process",
                            "free it there",
                        )
                # a fixed block's handle may be another's the moment it is free
                for block in blocks:
                    block.freed = True
                    del self.live[block.handle]
            self.give_back(blocks)

    def give_back(self, gone: Sequence[Held]) -> None:
        """Free blocks, with one call for many."""
        pid = os.getpid()
        mine = [block for block in gone if block.pid == pid]
        for block in gone:
            block.mapping = None
        for begin in range(0, len(mine), abi.RT_MAX_BATCH):
            part = mine[begin : begin + abi.RT_MAX_BATCH]
            if len(part) == 1:
                self.call(abi.IOC_RT_FREE, abi.RTBlock(handle=part[0].handle), "cannot free")
                continue
            items = (abi.RTBlock * len(part))(*(abi.RTBlock(handle=b.handle) for b in part))
            batch = abi.Batch(
                items=ctypes.addressof(items), count=len(part), item_size=ctypes.sizeof(abi.RTBlock)
            )
            try:
                self.call(abi.IOC_RT_FREE_BATCH, batch, "cannot free blocks")
            except errors.NoSuchBlock:
                # another process that has this client was first: the others are to go still
                for block in part:
                    with contextlib.suppress(errors.NoSuchBlock):
                        self.call(abi.IOC_RT_FREE, abi.RTBlock(handle=block.handle))
                raise


def _freed(block: _Block) -> errors.NoSuchBlock:
    return errors.NoSuchBlock(f"block {block.handle} was freed", "free each block once")


class RTBlock:
    """One block. Get one from :meth:`RTClient.alloc`.

    Used as a context manager it is freed at the end of the block. One that is dropped is freed
    when the last array of it is gone. For one thread at a time.
    """

    def __init__(self, block: _Block) -> None:
        """Not for users; see :meth:`RTClient.alloc`."""
        self._block = block

    @property
    def handle(self) -> int:
        """Its name, never 0."""
        return self._block.handle

    @property
    def offset(self) -> int:
        """Where it lies in the arena; of a movable one, where it lay when it was last pinned."""
        return self._block.offset

    @property
    def size(self) -> int:
        """Bytes asked for."""
        return self._block.size

    @property
    def movable(self) -> bool:
        """True if it may be moved while it is not pinned."""
        return self._block.movable

    @property
    def pins(self) -> int:
        """How often it is pinned; 1 for one that is not movable."""
        return self._block.pins

    @property
    def freed(self) -> bool:
        """True once :meth:`free` was called or the RT client was closed."""
        return self._block.freed or not self._block.named

    def buffer(self) -> memoryview:
        """Return the memory, writable, format ``B``, ``size`` bytes long.

        Raises:
            NoSuchBlock: it was freed.
            InvalidArgument: it is movable and not pinned.
        """
        return self._bytes().data

    def array(self, shape: Any, dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
        """Return the memory as an array, without a copy; its bytes begin at the block's first.

        Raises:
            NoSuchBlock: it was freed.
            InvalidArgument: it has fewer bytes than shape and dtype take; or it is movable and
                not pinned.
        """
        kind = np.dtype(dtype)
        dims = tuple(operator.index(n) for n in (shape if np.iterable(shape) else (shape,)))
        size = math.prod(dims) * kind.itemsize
        if kind.hasobject or any(n < 0 for n in dims) or size > self.size:
            raise errors.InvalidArgument(
                f"an array of shape {dims} and dtype {kind} does not fit into a block of"
                f" {self.size} bytes",
                "allocate a larger block, and use a plain numeric dtype",
            )
        return self._bytes()[:size].view(kind).reshape(dims)

    def _bytes(self) -> npt.NDArray[np.uint8]:
        if not self._block.named:
            raise _freed(self._block)
        return self._block.session.export(self._block)

    # -- movable ones --------------------------------------------------------

    def pin(self) -> int:
        """Keep it where it is until it is unpinned as often, and return its offset.

        Raises:
            NoSuchBlock: it was freed.
            Closed: the RT client was closed.
        """
        return self._pin(abi.IOC_RT_PIN, 1)

    def unpin(self) -> None:
        """Let it be moved. What is known of its place is worth nothing from then on.

        Raises:
            InvalidArgument: it is not movable, or not pinned.
            NoSuchBlock: it was freed.
            Closed: the RT client was closed.
        """
        if not self._block.movable or not self._block.pins:
            what = "pinned" if self._block.movable else "movable"
            raise errors.InvalidArgument(
                f"block {self.handle} is not {what}", "unpin what alloc(movable=True) or pin() gave"
            )
        self._pin(abi.IOC_RT_UNPIN, -1)

    def _pin(self, request: int, step: int) -> int:
        block = self._block
        with block.session.calling():
            if not block.alive:
                raise _freed(block)
            if block.movable:
                found = block.session.call(request, abi.RTBlock(handle=block.handle))
                block.pins += step
                if step > 0:
                    block.offset = int(found.offset)
        return block.offset

    @contextlib.contextmanager
    def pinned(self) -> Iterator[memoryview]:
        """Give its memory, which does not move until the end of the ``with`` block.

        The view is released then, and slices and arrays of it have to be gone.

        Raises:
            Busy: one of them is not: the block stays pinned.
            As :meth:`pin`.
        """
        self.pin()
        array = self._bytes()
        export, view = weakref.ref(cast(Export, array.base)), array.data
        del array
        failed = True
        try:
            yield view
            failed = False
        finally:
            view.release()
            if export() is None:
                if self._block.movable and self._block.alive:
                    self.unpin()
            elif not failed:
                raise errors.Busy(
                    f"an array of block {self.handle} is in use still, so it stays pinned",
                    "drop it before the end of the with block",
                )

    # -- the end -------------------------------------------------------------

    def free(self) -> None:
        """Free it at once. Arrays of it show from now on whatever the arena puts there.

        Raises:
            NoSuchBlock: it was freed before.
            NotPermitted: it was allocated before a fork, by the parent.
            Closed: the RT client was closed.
        """
        self._block.session.free([self._block])

    def __enter__(self) -> RTBlock:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Free it unless that was done before."""
        if not self.freed:
            self.free()

    def __del__(self) -> None:
        block = getattr(self, "_block", None)
        if block is not None and block.named:
            block.session.post(Event.NAME_GONE, block)

    def __repr__(self) -> str:
        """Name handle, size and place."""
        state = ", freed" if self.freed else f" at {self.offset}"
        return f"<RTBlock {self.handle}: {format_size(self.size)}{state}>"


class RTBuffer(Closing):
    """A block that a loop takes and gives back, again and again; :meth:`RTClient.buffer` makes one.

    Taking and giving are a system call each, with arguments that were made beforehand. For one
    thread. Until it is closed it keeps the RT client's descriptor open.
    """

    def __init__(self, session: _Session, item: abi.RTAlloc, deadline: _Deadline) -> None:
        """Not for users; see :meth:`RTClient.buffer`."""
        self._session, self._item, self._deadline = session, item, deadline
        self._block = abi.RTBlock()
        self._pid = os.getpid()
        self._ioctl = session.device.ioctl
        self._open = False
        session.hold()
        self._open = True

    @property
    def offset(self) -> int | None:
        """Where it lies in the arena, or None while it is not taken."""
        return int(self._item.offset) if self._block.handle else None

    def take(self) -> int:
        """Allocate it and return its offset in the arena.

        Raises:
            ArenaFull: there is no room, and no deadline.
            DeadlineMissed: there was none by the deadline.
            InvalidArgument: it was taken before and not given back.
            Closed: it, or the RT client, was closed.
        """
        block, item = self._block, self._item
        if block.handle:
            raise errors.InvalidArgument("this buffer is taken already", "give() it back first")
        if self._session.closed or not self._open:
            raise self._session.no_longer()
        begin = time.monotonic_ns()
        try:
            try:
                self._ioctl(abi.IOC_RT_ALLOC, item)
            except InterruptedError:
                self._session.again(abi.IOC_RT_ALLOC, item, (item,), self._deadline, begin)
        except OSError as error:
            raise self._session.refusal(error.errno or 0, item) from None
        block.handle = item.handle
        return item.offset  # type: ignore[no-any-return]

    def give(self) -> None:
        """Free it.

        Raises:
            NoSuchBlock: it is not taken.
        """
        block = self._block
        if not block.handle:
            raise errors.NoSuchBlock("this buffer is not taken", "take() it first")
        try:
            self._ioctl(abi.IOC_RT_FREE, block)
        except OSError as error:
            raise self._session.error(error.errno or 0, "cannot free the buffer") from None
        finally:
            block.handle = 0

    def close(self) -> None:
        """Give it back if it is taken, and let go of the descriptor. A second time does nothing."""
        was_open, self._open = self._open, False
        if not was_open or self._pid != os.getpid():
            return
        try:
            if self._block.handle:
                self.give()
        finally:
            self._session.post(Event.CALL_DONE)

    def __del__(self) -> None:
        if getattr(self, "_open", False):
            self.close()


class RTClient(Closing):
    """One who allocates in an arena of the RT pool. Get one from :func:`rt` or :meth:`Client.rt`.

    Use it as a context manager. All methods may be called from any thread.
    """

    def __init__(self, device: Device, opener: Opener | None = None) -> None:
        """Not for users; see :func:`rt` and :meth:`from_fd`."""
        self._opener = opener or _opener(DEFAULT_PATH)
        try:
            self._session = _Session(device)
        except BaseException:
            device.close()
            raise

    @classmethod
    def from_fd(cls, fd: int) -> RTClient:
        """Use an RT client whose descriptor came from another process.

        It is the same client: both can free its blocks. Who wants to be one of his own joins it.

        Args:
            fd: the descriptor; it belongs to the object from now on, also when this fails.

        Raises:
            IncompatibleModule: not an RT client.
        """
        return cls(KernelDevice.of(fd))

    @property
    def size(self) -> int:
        """Bytes of the arena."""
        return self._session.size

    @property
    def granule(self) -> int:
        """Bytes; all offsets are multiples of it."""
        return self._session.granule

    @property
    def closed(self) -> bool:
        """True once :meth:`close` was called."""
        return self._session.closed

    @property
    def memory(self) -> memoryview:
        """All bytes of the arena, writable: for ``struct.pack_into(format, rt.memory, offset, …)``.

        Raises:
            Closed: it was closed.
        """
        with self._session.calling():
            assert self._session.window is not None
            return memoryview(self._session.window)

    def fileno(self) -> int:
        """Return the descriptor; -1 once it is closed."""
        return self._session.device.fileno()

    def join(self, *, priority: SupportsIndex = 0) -> RTClient:
        """Return another client of the same arena, with reservations and blocks of its own.

        Args:
            priority: as for :func:`rt`.

        Raises:
            RTPoolFull: the arena has 255 clients.
            NotPermitted: a priority above 0 without CAP_SYS_NICE.
            Closed: it, or the client that opened it, was closed.
        """
        return open_rt(self._opener, None, self, priority, 0)

    # -- reservations --------------------------------------------------------

    def reserve(self, size: Size, count: SupportsIndex) -> None:
        """Lay blocks aside: as long as fewer than ``count`` are allocated, none is refused.

        A request is served by the class of the smallest blocks that are large enough, and from no
        other. docs/real-time.md tells why one reserves sizes and counts.

        Args:
            size: bytes of each.
            count: how many.

        Raises:
            ArenaFull: the arena has no room for them in one piece, or this client has 16 sizes.
            SizeReserved: this size is reserved already.
            NotPermitted: it takes CAP_SYS_NICE.
            InvalidArgument: sizes that are not possible.
            Closed: it was closed.
        """
        number = _bytes(size, "a reservation")
        self._reserve(number, _integer(count, "a count", 1, _U32))

    def unreserve(self, size: Size) -> None:
        """Give up what is reserved of a size.

        Raises:
            NotReserved: nothing is.
            ReservationInUse: a block of it is allocated.
            NotPermitted: it takes CAP_SYS_NICE.
            Closed: it was closed.
        """
        self._reserve(_bytes(size, "a reservation"), 0)

    def _reserve(self, size: int, count: int) -> None:
        session = self._session
        what = f"cannot reserve blocks of {format_size(size)}, {count} of them"
        if not count:
            what = f"cannot give up the reservation of {format_size(size)}"
        with session.calling():
            try:
                session.device.ioctl(abi.IOC_RT_RESERVE, abi.RTReserve(size=size, count=count))
            except OSError as error:
                number = error.errno or 0
                if number == errno.EPERM:
                    cause = f"{what}, this takes CAP_SYS_NICE"
                    raise errors.NotPermitted(cause, errors.RAISE_PRIORITY) from None
                if number == errno.ENOENT:
                    raise errors.NotReserved(f"{what}, there is none") from None
                if number == errno.ENOSPC:
                    raise errors.ArenaFull(
                        f"{what}, the arena has no room for it in one piece, or"
                        f" {abi.RT_MAX_CLASSES} sizes are reserved",
                        "reserve before anything is allocated, or make a larger arena",
                    ) from None
                raise session.error(number, what) from None

    # -- blocks --------------------------------------------------------------

    def alloc(
        self,
        size: Size,
        deadline_ns: SupportsIndex = 0,
        *,
        absolute: bool = False,
        reserved: bool = False,
        movable: bool = False,
    ) -> RTBlock:
        """Allocate a block; it shows what the arena's clients left there.

        Args:
            size: bytes.
            deadline_ns: nanoseconds until it has to be there: if the arena is full, blocks are
                moved and the call waits for somebody to free something. 0: at once or not at all.
            absolute: ``deadline_ns`` is a time of ``time.monotonic_ns()``. It may have passed.
            reserved: inside the reservation or not at all.
            movable: it may be moved while it is not pinned, to make room for others. Such a block
                is pinned at first, has at most 128 granules and never comes from a reservation.

        Raises:
            ArenaFull: there is no room, and no deadline.
            DeadlineMissed: there was none by the deadline.
            TooManyMovable: the arena was not made for as many.
            InvalidArgument: sizes or deadlines that are not possible.
            Closed: it was closed.
        """
        return self.alloc_many(
            [size], deadline_ns, absolute=absolute, reserved=reserved, movable=movable
        )[0]

    def alloc_many(
        self,
        sizes: Sequence[Size],
        deadline_ns: SupportsIndex = 0,
        *,
        absolute: bool = False,
        reserved: bool = False,
        movable: bool = False,
    ) -> list[RTBlock]:
        """Allocate blocks of these sizes with one call, all or none; see :meth:`alloc`.

        Args:
            sizes: up to 64.
            deadline_ns: for all of them.
            absolute: as for :meth:`alloc`, and so are the others.
            reserved: see there.
            movable: see there.
        """
        if len(sizes) > abi.RT_MAX_BATCH:
            raise errors.InvalidArgument(
                f"a batch of {len(sizes)} blocks is too many", f"{abi.RT_MAX_BATCH} are possible"
            )
        deadline = _deadline(deadline_ns, absolute)
        items = [_item(size, deadline, reserved, movable) for size in sizes]
        return [RTBlock(b) for b in self._session.allocate(items, deadline)] if items else []

    def free_many(self, blocks: Sequence[RTBlock]) -> None:
        """Free blocks, all or none, with one call for 64 of them; see :meth:`RTBlock.free`."""
        held = [block._block for block in blocks]
        for block in held:
            if block.session is not self._session:
                raise errors.NoSuchBlock(
                    f"block {block.handle} is not of this RT client", "free it where it is from"
                )
        self._session.free(held)

    def buffer(
        self,
        size: Size,
        deadline_ns: SupportsIndex = 0,
        *,
        absolute: bool = False,
        reserved: bool = False,
    ) -> RTBuffer:
        """Prepare a block that a loop takes and gives back; arguments as for :meth:`alloc`.

        Raises:
            InvalidArgument: sizes or deadlines that are not possible.
            Closed: it was closed.
        """
        deadline = _deadline(deadline_ns, absolute)
        return RTBuffer(self._session, _item(size, deadline, reserved, False), deadline)

    # -- questions and settings ----------------------------------------------

    def info(self) -> RTInfo:
        """Ask the kernel about the arena and this client.

        Raises:
            Closed: it was closed.
        """
        with self._session.calling():
            found = self._session.call(abi.IOC_RT_INFO, abi.RTInfo())
        return RTInfo(**{name: getattr(found, name) for name in RTInfo.__dataclass_fields__})

    @property
    def priority(self) -> int:
        """Who is served first when several wait: 0 to 99, the highest first. May be set.

        Raises:
            NotPermitted: raising it takes CAP_SYS_NICE.
            InvalidArgument: not one from 0 to 99.
            Closed: it was closed.
        """
        return self.info().priority

    @priority.setter
    def priority(self, value: SupportsIndex) -> None:
        number = _priority(value)
        with self._session.calling():
            try:
                self._session.device.ioctl(abi.IOC_RT_PRIORITY, abi.RTPriority(priority=number))
            except OSError as error:
                what = f"cannot set the priority to {number}"
                if error.errno == errno.EPERM:
                    cause = f"{what}, raising it takes CAP_SYS_NICE"
                    raise errors.NotPermitted(cause, errors.RAISE_PRIORITY) from None
                raise self._session.error(error.errno or 0, what) from None

    # -- the end -------------------------------------------------------------

    def close(self) -> None:
        """Refuse further calls and free what nothing shows.

        Arrays of blocks stay valid; the descriptor closes with the last of them. The arena goes
        with the last of its clients. A second close does nothing.
        """
        self._session.close()

    def __del__(self) -> None:
        session = getattr(self, "_session", None)
        if session is not None and not session.closed:
            session.post(Event.CLIENT_GONE)

    def __repr__(self) -> str:
        """Name the descriptor and the arena's size."""
        state = "closed" if self.closed else f"fd {self.fileno()}"
        return f"<tensormem.RTClient {state}, an arena of {format_size(self.size)}>"


def _priority(value: SupportsIndex) -> int:
    return _integer(value, "a priority", 0, abi.RT_MAX_PRIORITY)


def _refused(number: int, size: int, priority: int) -> errors.TensormemError:
    """Return the exception for an arena that was not made, or not joined."""
    if not size:
        what = "cannot join the arena"
        if number in (errno.EBADF, errno.EINVAL):
            return errors.InvalidArgument(
                f"{what}, this is no descriptor of an RT client", "pass rt.fileno() of an open one"
            )
        if number == errno.ENOSPC:
            return errors.RTPoolFull(f"{what}, it has 255 clients", "close one of them")
    else:
        what = f"cannot make an arena of {format_size(size)}"
        if number == errno.ENOSPC:
            return errors.RTPoolFull(f"{what}, the RT pool or the chunk pool has no room for it")
    if number == errno.EPERM and priority:
        cause = f"{what} with priority {priority}, no CAP_SYS_NICE or beyond RLIMIT_MEMLOCK"
        return errors.NotPermitted(cause, f"{errors.RAISE_PRIORITY}; {errors.RAISE_MEMLOCK}")
    if number == errno.EPERM:
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        cause = f"{what}, this user's pinned memory would exceed RLIMIT_MEMLOCK"
        cause += f", {format_size(limit)}" if limit >= 0 else ""
        return errors.NotPermitted(cause, f"ask for less, or {errors.RAISE_MEMLOCK}")
    plain = errors.from_errno(number)
    known = type(plain) is not errors.TensormemError
    return errors.from_errno(number, f"{what}, {plain.cause}" if known else what)


def open_rt(
    opener: Opener,
    size: Size | None,
    arena: RTClient | int | None,
    priority: SupportsIndex,
    movable: SupportsIndex,
) -> RTClient:
    """Make an arena or join one; see :func:`rt`."""
    if (size is None) == (arena is None):
        raise errors.InvalidArgument(
            "an arena has a size or is joined", "pass either size or arena, and not both"
        )
    argument = abi.RTOpen(
        size=0 if size is None else _bytes(size, "an arena"),
        arena=-1,
        priority=_priority(priority),
        movable=_integer(movable, "movable", 0, 65536),
    )
    with contextlib.ExitStack() as stack:
        if isinstance(arena, RTClient):
            stack.enter_context(arena._session.calling())
            argument.arena = arena.fileno()
        elif arena is not None:
            argument.arena = _integer(arena, "a descriptor", 0, (1 << 31) - 1)
        device = stack.enter_context(opener())
        try:
            device.ioctl(abi.IOC_RT_OPEN, argument)
        except OSError as error:
            raise _refused(error.errno or 0, argument.size, argument.priority) from None
        return RTClient(device.other(argument.fd), opener)


@dataclass(frozen=True)
class SelfTest:
    """What :func:`self_test` found.

    Attributes:
        count: blocks that were asked for.
        refused: those refused.
        misses: those that did not come by their deadline.
        taking: how long it took to get each, in the buckets of :mod:`tensormem.histogram`.
        giving: likewise to free it.
        kept: none was refused, none late.
    """

    count: int
    refused: int
    misses: int
    taking: list[int]
    giving: list[int]
    kept: bool


def self_test(
    count: int, size: int, deadline_ns: int, *, now: Callable[[], int] = time.perf_counter_ns
) -> SelfTest:
    """Allocate and free in a reservation of an arena of its own, and note how long it took.

    Args:
        count: how often.
        size: bytes of each block.
        deadline_ns: nanoseconds until it has to be there.
        now: a clock in nanoseconds.

    Raises:
        NotPermitted: reservations take CAP_SYS_NICE.
        As :func:`rt`.
    """
    taking, giving, refused, misses = [0] * count, [0] * count, 0, 0
    # there is more than the block in it: where its class begins and ends
    with rt(size + (64 << 10)) as arena:
        arena.reserve(size, 1)
        with arena.buffer(size, deadline_ns, reserved=True) as buffer:
            for turn in range(count):
                begin = now()
                try:
                    buffer.take()
                except errors.ArenaFull:
                    refused += 1
                except errors.DeadlineMissed:
                    misses += 1
                taken = now()
                if buffer.offset is not None:
                    buffer.give()
                taking[turn], giving[turn] = taken - begin, now() - taken
    return SelfTest(
        count=count,
        refused=refused,
        misses=misses,
        taking=histogram.count(taking),
        giving=histogram.count(giving),
        kept=not refused and not misses,
    )


def _opener(path: str | os.PathLike[str]) -> Opener:
    @contextlib.contextmanager
    def opener() -> Iterator[Device]:
        device = KernelDevice(path)
        try:
            yield device
        finally:
            device.close()

    return opener


def rt(
    size: Size | None = None,
    *,
    arena: RTClient | int | None = None,
    priority: SupportsIndex = 0,
    movable: SupportsIndex = 0,
    path: str | os.PathLike[str] = DEFAULT_PATH,
) -> RTClient:
    """Make an arena of the RT pool, on the bill of a client of its own; or join one.

    Args:
        size: bytes, or a text such as ``"4M"``; rounded up to chunks of 2 MiB.
        arena: instead of ``size``, to join: a client of the arena, or a descriptor of one.
        priority: 0 to 99: who is served first when several wait. Above 0 it takes CAP_SYS_NICE.
        movable: movable blocks that may exist at a time, at most 65536; 0 to join.
        path: the device node.

    Raises:
        RTPoolFull: the RT pool or the chunk pool has no room; or the arena has 255 clients.
        NotPermitted: beyond RLIMIT_MEMLOCK, or the priority.
        QuotaExceeded, OutOfMemory: as they say.
        InvalidArgument: a size, priority or descriptor that is not possible.
        IncompatibleModule: the module has no RT pool.
        DeviceMissing: the module is not loaded.
        AccessDenied: this user may not open the device.
    """
    return open_rt(_opener(path), size, arena, priority, movable)
