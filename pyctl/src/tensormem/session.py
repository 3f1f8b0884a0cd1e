# SPDX-License-Identifier: MIT
"""The books of one descriptor: what the kernel holds for it and who still needs that.

An array's base is an :class:`Export`; the export holds the mapping and what it shows
(:class:`Held`: a tensor, a sequence). When the last view goes, so does the export,
and when neither an export nor a name is left, what was held goes back to the kernel.

Finalizers run anywhere, also inside the garbage collector while this thread holds
the lock of this or of another session. They therefore only append to the session's
queue and then *try* the lock; whoever holds it settles the queue after letting go.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import mmap
import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from enum import Enum, auto
from typing import Any, TypeVar

import numpy as np

from . import abi, errors
from .device import Device

__all__ = ["BatchError", "Event", "Export", "Held", "Session", "address"]

_S = TypeVar("_S", bound=abi.Struct)


class Held:
    """Something of the kernel's with a handle, and who still needs it."""

    __slots__ = ("exports", "freed", "handle", "mapping", "named", "pid", "session")

    def __init__(self, session: Session, handle: int) -> None:
        """Note a thing that this process just made."""
        self.session = session
        self.handle = handle
        self.pid = os.getpid()
        self.named = True  # an object of the user's stands for it, or a call is at work on it
        self.exports = 0  # exports alive, or dead and still in the queue
        self.freed = False  # the user said so
        self.mapping: mmap.mmap | None = None

    @property
    def alive(self) -> bool:
        """True until it goes back to the kernel, which may use the handle again."""
        return self.session.live.get(self.handle) is self

    def after_fork(self) -> None:
        """Make it usable in a child of fork()."""


class Export:
    """What arrays have as their base; its end is the end of the views."""

    __slots__ = ("__weakref__", "address", "held", "mapping", "size")

    def __init__(self, held: Held, address: int, size: int) -> None:
        """Show ``size`` bytes; the caller has counted the export."""
        # its own reference to the mapping: memory in sight cannot be unmapped
        self.mapping = held.mapping
        self.held = held
        self.address = address
        self.size = size

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {
            "version": 3,
            "typestr": "|u1",
            "shape": (self.size,),
            "data": (self.address, False),
        }

    def __del__(self) -> None:
        self.held.session.post(Event.EXPORT_GONE, self.held)


class BatchError(Exception):
    """A batch call failed; never leaves the package."""

    def __init__(self, number: int, index: int) -> None:
        """Note the errno and the item."""
        super().__init__(number, index)
        self.errno, self.index = number, index


class Event(Enum):
    """What finalizers and finished calls tell a session."""

    EXPORT_GONE = auto()  # an export died
    NAME_GONE = auto()  # the user's object for it died
    CLIENT_GONE = auto()  # the object for the descriptor died without close()
    CALL_DONE = auto()  # a call that was under way has ended


class Session(ABC):
    """Descriptor, mapping and books."""

    def __init__(self, device: Device) -> None:
        """Begin; the session closes the device in the end."""
        self.device = device
        self.lock = threading.Lock()
        self.queue: deque[tuple[Event, Held | None]] = deque()
        self.live: dict[int, Held] = {}
        self.calls = 0  # under way
        self.closed = False
        self.orphaned = False
        self.finished = False
        self.window: mmap.mmap | None = None
        self.base = 0
        _sessions.add(self)

    def map_window(self, size: int) -> None:
        """Map the whole window if the address space has room for it."""
        # none (RLIMIT_AS, 39-bit addresses): each thing is mapped by itself
        with contextlib.suppress(OSError, OverflowError, ValueError):
            self.window = self.device.map(0, size)
            self.base = address(self.window)

    # -- calls ---------------------------------------------------------------

    def error(
        self, number: int, cause: str | None = None, remedy: str | None = None
    ) -> errors.TensormemError:
        """Return the exception for an errno."""
        return errors.from_errno(number, cause, remedy)

    def no_longer(self) -> errors.Closed:
        """Return the exception for a call after close()."""
        return errors.Closed()

    def call(self, request: int, argument: _S, cause: str | None = None) -> _S:
        """Make a call and return its argument."""
        try:
            self.device.ioctl(request, argument)
        except OSError as error:
            raise self.error(error.errno or 0, cause) from None
        return argument

    def batch(self, request: int, items: ctypes.Array[Any]) -> None:
        """Make a call for several items, all or none.

        Raises:
            BatchError: says which item failed.
        """
        batch = abi.Batch(
            items=ctypes.addressof(items),
            count=len(items),
            item_size=ctypes.sizeof(items._type_),
        )
        try:
            self.device.ioctl(request, batch)
        except OSError as error:
            raise BatchError(error.errno or 0, int(batch.failed)) from None

    @contextlib.contextmanager
    def calling(self) -> Iterator[None]:
        """Keep the descriptor open while a call is under way."""
        with self.locked():
            if self.closed:
                raise self.no_longer()
            self.calls += 1
        try:
            yield
        finally:
            self.post(Event.CALL_DONE)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock, and settle afterwards what came up meanwhile."""
        try:
            with self.lock:
                yield
        finally:
            self.drain()

    # -- release -------------------------------------------------------------

    @abstractmethod
    def give_back(self, gone: Sequence[Held]) -> None:
        """Return what this process made to the kernel; mappings of all are dropped."""

    def post(self, event: Event, held: Held | None = None) -> None:
        """Tell the session something; never blocks, so finalizers may call it."""
        self.queue.append((event, held))
        self.drain()

    def drain(self) -> None:
        """Settle the queue unless somebody else holds the lock: they will."""
        while self.queue and not _exiting:
            if not self.lock.acquire(blocking=False):
                return
            try:
                gone, over = self._settle()
            finally:
                self.lock.release()
            if gone:
                try:
                    self.give_back(gone)
                finally:
                    self.queue.append((Event.CALL_DONE, None))
            if over:
                self.device.close()

    def _settle(self) -> tuple[list[Held], bool]:
        """Empty the queue; return what to give back and whether to close. Lock held."""
        gone: list[Held] = []
        while self.queue:
            event, held = self.queue.popleft()
            if event is Event.CALL_DONE:
                self.calls -= 1
            elif event is Event.CLIENT_GONE:
                self.orphaned = True
            elif held is not None:
                if event is Event.EXPORT_GONE:
                    held.exports -= 1
                else:
                    held.named = False
                self._drop_unneeded(held, gone)
        if gone:
            self.calls += 1
        over = (
            (self.closed or self.orphaned)
            and not self.live
            and self.calls <= 0
            and not self.finished
        )
        if over:
            self.finished = True
            self.window = None
        return gone, over

    def _drop_unneeded(self, held: Held, gone: list[Held]) -> None:
        if held.alive and not held.exports and not held.named:
            del self.live[held.handle]
            gone.append(held)

    def release(self, names: Sequence[Held]) -> None:
        """Give up names; what nothing shows goes back at once."""
        gone: list[Held] = []
        with self.locked():
            for held in names:
                held.named = False
                self._drop_unneeded(held, gone)
            self.calls += 1
        try:
            self.give_back(gone)
        finally:
            self.post(Event.CALL_DONE)

    def close(self) -> None:
        """Refuse further calls; give back what nothing shows."""
        with self.locked():
            self.closed = True
            named = [held for held in self.live.values() if held.named]
        self.release(named)

    def after_fork(self) -> None:
        """Make the copy in a child usable: its threads are gone, locks may be stuck."""
        self.lock = threading.Lock()
        self.calls = 0
        for held in self.live.values():
            held.after_fork()


_sessions: weakref.WeakSet[Session] = weakref.WeakSet()
_exiting = False


def _after_fork() -> None:
    for session in list(_sessions):
        session.after_fork()


def _at_exit() -> None:
    # the kernel frees everything at the end of the process; finalizers that run
    # while the interpreter is taken apart leave it to that
    global _exiting
    _exiting = True


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)


def address(mapping: mmap.mmap) -> int:
    """Return where a mapping begins."""
    return int(np.frombuffer(mapping, np.uint8, 1).__array_interface__["data"][0])
