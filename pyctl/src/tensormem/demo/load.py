# SPDX-License-Identifier: MIT
"""What goes on beside the control loop of :mod:`.control`, as processes that start quickly.

Nothing here imports numpy, which takes seconds on a slow board with busy CPUs.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator

__all__ = ["die_with", "hog", "spin", "work"]

_PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None)


def hog(size: int) -> Iterator[int]:
    """Take memory up to a size and let go of it, over and over; yield with each piece."""
    pieces: list[mmap.mmap] = []
    chance = random.Random(2)
    while True:
        piece = mmap.mmap(-1, chance.randint(1, max(1, size // 8)))
        for place in range(0, len(piece), mmap.PAGESIZE):
            piece[place] = 1
        pieces.append(piece)
        while sum(map(len, pieces)) > size - size // 8:
            pieces.pop(chance.randrange(len(pieces))).close()
        yield len(pieces)


def spin() -> Iterator[int]:
    """Keep a CPU busy."""
    while True:
        yield sum(range(10_000))


def die_with(parent: int) -> None:
    """End when the parent does, whatever ends it."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)


def work(role: str, *arguments: str) -> None:
    """Do one of these until somebody ends it; say when it has begun."""
    roles: dict[str, Callable[..., Iterator[int]]] = {"hog": hog, "spin": spin}
    try:
        for number, _ in enumerate(roles[role](*map(int, arguments))):
            if not number:
                print("{}", flush=True)
    except OSError as error:
        print(json.dumps({"error": str(error)}), flush=True)


if __name__ == "__main__":
    die_with(int(sys.argv[2]))
    work(sys.argv[1], *sys.argv[3:])
