# SPDX-License-Identifier: MIT
"""The context manager of everything that has a ``close()``."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

__all__ = ["Closing"]


class _Closable(Protocol):
    def close(self) -> object: ...


class Closing:
    """At the end of a ``with`` block it is closed."""

    __slots__ = ()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self: _Closable,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()
