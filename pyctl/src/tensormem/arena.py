# SPDX-License-Identifier: MIT
"""Bump allocation on one tensor, for arrays that live as long as one step of a model.

A step of a decoder asks for the same scratch arrays each time and needs none of them
afterwards. An arena gives them out of one activations tensor, one after the other, and
takes them back all at once: no system call, no page fault and no zeroing.

It remembers what it gave. As long as a round asks for what the round before it asked for,
in the same order, it gets the very same array objects, and an allocation costs a
comparison. This is the region allocator of Ross (1967) with numpy's headers kept.

An array does not know that its arena was reset: it shows then what the next arrays have
written there. ``poison=True`` fills what is taken back with ``0xff`` bytes, NaN as floats,
so that a test sees who reads an array for too long.
"""

from __future__ import annotations

import math
import os
import weakref
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from . import errors
from .closing import Closing
from .form import Shape, array_form
from .units import format_size

if TYPE_CHECKING:
    from .client import Tensor

__all__ = ["Arena", "Scope"]


#: An array that was given out: for which shape and dtype, and where the next one may begin.
#: A plain tuple, since to find one again is all that an allocation costs.
_Made = tuple[object, npt.DTypeLike, npt.NDArray[Any], int]

#: In place of a shape that is never found again.
_NO_SHAPE = object()


class Scope:
    """A part of a round: at its end the arena is as it was at its beginning."""

    def __init__(self, arena: Arena) -> None:
        """Not for users; see :meth:`Arena.scope`."""
        self._arena = arena
        self._depth = self._next = -1

    def __enter__(self) -> Arena:
        """Begin it and return the arena."""
        arena = self._arena
        arena._check()
        if self._depth >= 0:
            raise errors.InvalidArgument("this scope has been entered before", "make another")
        arena._depth += 1
        self._depth, self._next = arena._depth, arena._next
        return arena

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take back what was allocated in it."""
        arena = self._arena
        if arena._depth != self._depth:
            raise errors.InvalidArgument(
                "a scope ends that is not the innermost", "end scopes in reverse order"
            )
        arena._depth -= 1
        if not arena.closed:
            arena._back_to(self._next)


class Arena(Closing):
    """Arrays out of one tensor, taken back together; from :meth:`Client.arena`.

    It provides memory as a client does (``empty``), so code that takes arrays from a client can
    take them from an arena. It is for one thread at a time, and for the process that
    made it.
    """

    def __init__(self, tensor: Tensor, line: int, *, poison: bool) -> None:
        """Not for users; see :meth:`Client.arena`."""
        self._tensor = tensor
        self._bytes = tensor.array(tensor.size, np.uint8)
        self._line = line
        self._poison = poison
        self._made: list[_Made] = []
        self._next = 0  # the first of them that this round has not asked for
        self._depth = 0
        self._peak = 0
        self._pid = os.getpid()
        _arenas.add(self)

    @property
    def size(self) -> int:
        """Bytes of the tensor."""
        return self._tensor.size

    @property
    def used(self) -> int:
        """Bytes given out now, and what alignment has skipped between them."""
        return self._made[self._next - 1][3] if self._next else 0

    @property
    def peak(self) -> int:
        """The most bytes that were ever given out at a time: the size that would have done."""
        return self._peak

    @property
    def closed(self) -> bool:
        """True once :meth:`close` was called."""
        return self._tensor.freed

    def empty(
        self,
        shape: Shape,
        dtype: npt.DTypeLike = np.float32,
        kind: str = "activations",
    ) -> npt.NDArray[Any]:
        """Return an array with undefined contents, in C order, aligned to a cache line.

        It is good until the scope it was made in ends, or :meth:`reset`. Memory is zero
        before it is given out for the first time, so what it shows is this client's own.

        Args:
            shape: a size or a sequence of sizes.
            dtype: any numpy dtype without objects.
            kind: an arena has ``activations`` and nothing else.

        Raises:
            InvalidArgument: shape, dtype or kind are not of these.
            ArenaFull: less is left. Nothing has changed.
            Closed: the arena was closed.
            NotPermitted: it belongs to the parent process.

        Whoever changes an array's own shape (``a.shape = ...``) gets it so again; reshape it.
        """
        i = self._next
        try:
            asked, form, array, _ = self._made[i]
        except IndexError:
            return self._make(shape, dtype, kind)
        # an equal dtype of another type (a string, a class) only takes the slow way;
        # 3.0 equals 3 and is no shape
        if (
            (asked is shape or (type(asked) is type(shape) and asked == shape))
            and form is dtype
            and kind == "activations"
        ):
            self._next = i + 1
            return array
        return self._make(shape, dtype, kind)

    def _make(self, shape: Shape, dtype: npt.DTypeLike, kind: str) -> npt.NDArray[Any]:
        self._check()
        if kind != "activations":
            raise errors.InvalidArgument(
                f"an arena has no {kind!r}", "take arrays of other kinds from the client"
            )
        dims, form = array_form(shape, dtype)
        begin = -(-self.used // self._line) * self._line
        end = begin + math.prod(dims) * form.itemsize
        if end > self.size:
            raise errors.ArenaFull(
                f"an array of {format_size(end - begin)} does not fit into an arena of"
                f" {format_size(self.size)} with {format_size(self.used)} in use",
                "make a larger arena, or reset it earlier",
            )
        array = np.ndarray(dims, form, self._bytes.data, begin)
        # who asks with anything else may change it
        key = shape if isinstance(shape, (int, np.integer, tuple)) else _NO_SHAPE
        self._peak = max(self._peak, end)
        del self._made[self._next :]
        self._made.append((key, dtype, array, end))
        self._next += 1
        return array

    def reset(self) -> None:
        """Take back all arrays: the next round begins.

        Raises:
            Busy: a scope has not ended.
            Closed: the arena was closed.
            NotPermitted: it belongs to the parent process.
        """
        self._check()
        if self._depth:
            raise errors.Busy(
                f"{self._depth} scopes of the arena have not ended", "reset it outside of them"
            )
        self._back_to(0)

    def scope(self) -> Scope:
        """Return a context manager; what is allocated in it goes at its end.

        Scopes nest: ``with arena.scope(): ... with arena.scope(): ...``.
        """
        return Scope(self)

    def close(self) -> None:
        """Free the tensor: at once, or when the last array of it is gone. Twice is fine.

        Raises:
            NotPermitted: it belongs to the parent process.
        """
        if self.closed:
            return
        self._check()
        self._made.clear()
        self._next = 0
        self._bytes = np.empty(0, np.uint8)
        self._tensor.free()

    def _back_to(self, first: int) -> None:
        if self._poison:
            begin = self._made[first - 1][3] if first else 0
            self._bytes[begin : self.used] = 0xFF
        self._next = min(first, len(self._made))

    def _leave(self) -> None:
        """In a child process: give nothing out, and write nothing into what the parent has."""
        self._made.clear()
        self._next = 0
        self._poison = False

    def _check(self) -> None:
        if self.closed:
            raise errors.Closed("the arena was closed")
        if self._pid != os.getpid():
            raise errors.NotPermitted(
                "the arena belongs to the parent process", "make one in the child"
            )

    def __repr__(self) -> str:
        """Say how full it is."""
        if self.closed:
            return "<Arena: closed>"
        return f"<Arena: {format_size(self.used)} of {format_size(self.size)}>"


#: Of this process. To find an array again is no place to ask whose it is, so a child forgets them.
_arenas: weakref.WeakSet[Arena] = weakref.WeakSet()


def _in_child() -> None:
    for arena in _arenas:
        arena._leave()


os.register_at_fork(after_in_child=_in_child)
