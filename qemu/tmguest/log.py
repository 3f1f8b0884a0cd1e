# SPDX-License-Identifier: MIT
"""Progress lines. They go to stderr only: stdout belongs to the command that runs in the guest."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator


def say(message: str) -> None:
    """Print one progress line on stderr."""
    print(f"guest: {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def step(doing: str, why: str) -> Iterator[None]:
    """Announce a slow step and, when it went well, how long it took."""
    say(f"{doing} ({why})")
    started = time.monotonic()
    yield
    say(f"{doing}: {time.monotonic() - started:.1f} s")
