# SPDX-License-Identifier: MIT
"""The demo's last part: a control loop that must not wait, while everything else is drowning.

The loop is a process of its own: locked in memory, SCHED_FIFO where that is allowed. Each tick
it takes the buffers of three messages, fills them, and checks and frees those of some ticks ago.
It does so once in a reservation of the RT pool and once with malloc. Meanwhile a model generates
text, somebody takes memory and lets go of it, and every CPU is busy; processes, too.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import json
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .. import client as client_module
from .. import errors, histogram
from ..realtime import RTClient, rt
from ..safetensors import load_into
from . import PROMPT
from .load import die_with
from .model import Decoder, encode
from .run import opened

__all__ = [
    "CLASSES",
    "KEPT",
    "Clock",
    "Heap",
    "Messages",
    "Pool",
    "Process",
    "Report",
    "Run",
    "run",
    "turns",
]

#: Most bytes of each message of a tick: a command, a frame from a bus, a picture.
CLASSES = (1 << 10, 16 << 10, 256 << 10)

#: Messages of each class that there are at a time: one is checked and freed so many ticks later.
KEPT = 4

#: The arena: twice what is reserved, rounded up to chunks.
_ARENA = 2 * KEPT * sum(CLASSES)

#: What a generating process tells in a line.
_TOKENS = 8

_MCL_CURRENT, _MCL_FUTURE = 1, 2
_TIMER_ABSTIME = 1
_FIFO_PRIORITY = 50

_libc = ctypes.CDLL(None, use_errno=True)
_libc.malloc.restype = ctypes.c_void_p
_libc.malloc.argtypes = [ctypes.c_size_t]
_libc.free.restype = None
_libc.free.argtypes = [ctypes.c_void_p]
_libc.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t]


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


# -- the loop ----------------------------------------------------------------------------


class Messages(Protocol):
    """Where messages lie: one for each class and slot at a time."""

    def take(self, kind: int, slot: int, size: int) -> int:
        """Return the address of so many bytes.

        Raises:
            MemoryError, TimeoutError: there are none.
        """
        ...

    def give(self, kind: int, slot: int) -> None:
        """Free what was taken."""
        ...


class Pool:
    """Messages in a reservation of the RT pool."""

    def __init__(self, client: RTClient, deadline_ns: int) -> None:
        """Reserve what a loop has at a time."""
        for size in CLASSES:
            client.reserve(size, KEPT)
        self._base = int(np.frombuffer(client.memory, np.uint8).ctypes.data)
        self._buffers = [
            [client.buffer(size, deadline_ns, reserved=True) for _ in range(KEPT)]
            for size in CLASSES
        ]

    def take(self, kind: int, slot: int, size: int) -> int:
        """See :meth:`Messages.take`."""
        return self._base + self._buffers[kind][slot].take()

    def give(self, kind: int, slot: int) -> None:
        """See :meth:`Messages.give`."""
        self._buffers[kind][slot].give()


class Heap:
    """Messages on the heap of the C library."""

    def __init__(self) -> None:
        """Begin with none."""
        self._at = [[0] * KEPT for _ in CLASSES]

    def take(self, kind: int, slot: int, size: int) -> int:
        """See :meth:`Messages.take`."""
        found = _libc.malloc(size)
        if not found:
            raise MemoryError
        self._at[kind][slot] = found
        return int(found)

    def give(self, kind: int, slot: int) -> None:
        """See :meth:`Messages.give`."""
        _libc.free(self._at[kind][slot])


class Clock:
    """CLOCK_MONOTONIC."""

    def now(self) -> int:
        """Return the time in ns."""
        return time.monotonic_ns()

    def sleep_until(self, due: int) -> None:
        """Sleep to a point in time."""
        until = _Timespec(*divmod(due, 1_000_000_000))
        while (
            _libc.clock_nanosleep(time.CLOCK_MONOTONIC, _TIMER_ABSTIME, ctypes.byref(until), None)
            == errno.EINTR
        ):
            pass


@dataclass(frozen=True)
class Run:
    """What a loop has seen. Times are in ns, distributions in buckets of :mod:`..histogram`.

    Attributes:
        ticks: those there were.
        missed: those not done when the next one was due, or left out for that.
        refused: messages that could not be had.
        wrong: messages that had changed when they were freed.
        work: how long a tick took, from when the loop woke up.
        median: of these times.
        longest: likewise.
        late: how late the loop woke up.
        latest: the longest of these times.
        minor: page faults while it ran; those that had to read something not counted.
        major: those that had.
        fifo: it was a real-time task.
        locked: its memory was locked.
    """

    ticks: int
    missed: int
    refused: int
    wrong: int
    work: list[int]
    median: int
    longest: int
    late: list[int]
    latest: int
    minor: int
    major: int
    fifo: bool = False
    locked: bool = False


class _Loop:
    """The work of a tick."""

    def __init__(self, messages: Messages) -> None:
        self._messages = messages
        # the same sizes for every memory; what is filled in tells messages apart
        sizes = random.Random(1)
        self._sizes = [[sizes.randint(size // 2, size) for size in CLASSES] for _ in range(997)]
        self._patterns = [
            [bytes([1 + kind * KEPT + slot]) * size for slot in range(KEPT)]
            for kind, size in enumerate(CLASSES)
        ]
        self._taken = [[(0, 0)] * KEPT for _ in CLASSES]
        self._number = self.refused = self.wrong = 0

    def tick(self) -> None:
        number = self._number
        self._number += 1
        slot = number % KEPT
        sizes = self._sizes[number % len(self._sizes)]
        for kind in range(len(CLASSES)):
            self._give(kind, slot)
            size = sizes[kind]
            try:
                address = self._messages.take(kind, slot, size)
            except (MemoryError, TimeoutError):
                self.refused += 1
                continue
            ctypes.memmove(address, self._patterns[kind][slot], size)
            self._taken[kind][slot] = (address, size)

    def _give(self, kind: int, slot: int) -> None:
        address, size = self._taken[kind][slot]
        if address:
            self.wrong += _libc.memcmp(address, self._patterns[kind][slot], size) != 0
            self._messages.give(kind, slot)
            self._taken[kind][slot] = (0, 0)

    def end(self) -> None:
        for kind in range(len(CLASSES)):
            for slot in range(KEPT):
                self._give(kind, slot)


def turns(messages: Messages, ticks: int, period_ns: int, clock: Clock) -> Run:
    """Run the loop.

    Args:
        messages: where they lie.
        ticks: how many, from the first that is due to the last.
        period_ns: from one to the next.
        clock: the time.
    """
    loop = _Loop(messages)
    work, late = [0] * ticks, [0] * ticks
    before = resource.getrusage(resource.RUSAGE_SELF)
    begin = clock.now() + period_ns
    tick = done = missed = 0
    while tick < ticks:
        due = begin + tick * period_ns
        clock.sleep_until(due)
        start = clock.now()
        loop.tick()
        end = clock.now()
        work[done], late[done] = end - start, max(0, start - due)
        done += 1
        # what is over already is left out, or one that is late would make all others late
        following = max(tick + 1, min(ticks, (end - begin) // period_ns))
        missed += following - tick - 1 + (end > due + period_ns)
        tick = following
    after = resource.getrusage(resource.RUSAGE_SELF)
    loop.end()
    return Run(
        ticks=ticks,
        missed=missed,
        refused=loop.refused,
        wrong=loop.wrong,
        work=histogram.count(work[:done]),
        median=int(statistics.median(work[:done])),
        longest=max(work[:done]),
        late=histogram.count(late[:done]),
        latest=max(late[:done]),
        minor=after.ru_minflt - before.ru_minflt,
        major=after.ru_majflt - before.ru_majflt,
    )


def _become_realtime() -> dict[str, bool]:
    """Lock the process in memory and make it a real-time task, as far as that is allowed."""
    locked = _libc.mlockall(_MCL_CURRENT | _MCL_FUTURE) == 0
    fifo = False
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(_FIFO_PRIORITY))
        fifo = True
    gc.collect()
    gc.freeze()
    gc.disable()
    return {"fifo": fifo, "locked": locked}


def _measure(memory: str, ticks: int, period_ns: int) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        messages: Messages = Heap()
        if memory == "pool":
            messages = Pool(stack.enter_context(rt(_ARENA)), period_ns)
        status = _become_realtime()
        print("{}", flush=True)
        sys.stdin.readline()
        return {**asdict(turns(messages, ticks, period_ns, Clock())), **status}


# -- what goes on meanwhile --------------------------------------------------------------------


def _generate() -> Generator[int, None, None]:
    """Generate text, over and over, on tensor memory; yield with each token."""
    with client_module.open() as client, opened("b") as (path, config, _):
        decoder, prompt = Decoder(load_into(client, path), config, client), encode(PROMPT)
        while True:
            decoder.reset()
            yield from decoder.generate(prompt, config.context - len(prompt))


def _hog_size() -> int:
    """Return what a hog may take: a quarter of what there is."""
    text = Path("/proc/meminfo").read_text()
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.M)
    return int(found[1]) * 1024 // 4 if found else 16 << 20


class Process:
    """A process of the demo; used as a context manager it is ended.

    It ends with this one, however that ends.
    """

    def __init__(self, role: str, *arguments: object) -> None:
        """Start it."""
        self.role = role
        module = "load" if role in ("hog", "spin") else "control"
        words = [role, str(os.getpid()), *map(str, arguments)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"tensormem.demo.{module}", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # who interrupts the demo interrupts this process, which ends the others
            process_group=0,
        )

    def _failed(self, answer: dict[str, Any] | None) -> errors.TensormemError:
        if answer is None:
            return errors.TensormemError(
                f"the process '{self.role}' has ended", "look at what it said above, and at dmesg"
            )
        return errors.TensormemError(
            f"the process '{self.role}' failed: {answer['error']}", answer.get("remedy")
        )

    def go(self) -> None:
        """Let it begin, if it is one that waits for that."""
        assert self._process.stdin is not None
        # one that has ended is noticed by who wants an answer
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(b"\n")
            self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Wait for a line of it, and return the document in it.

        Raises:
            TensormemError: it has failed.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer: dict[str, Any] | None = json.loads(line) if line.endswith(b"\n") else None
        if answer is None or "error" in answer:
            raise self._failed(answer)
        return answer

    def wait(self, seconds: float) -> bool:
        """Say whether it ends in this time."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
            return True
        return False

    def end(self) -> int:
        """End one that works until it is told; return the lines that it had to say still.

        Raises:
            TensormemError: it has ended by itself.
        """
        ended = self._process.poll() is not None
        self._process.kill()
        assert self._process.stdout is not None
        lines = self._process.stdout.read().splitlines()
        if ended:
            raise self._failed(json.loads(lines[-1]) if lines and b"error" in lines[-1] else None)
        return len(lines)

    def __enter__(self) -> Process:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End it, and wait until it has ended."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


@dataclass(frozen=True)
class Report:
    """What came out.

    Attributes:
        period_ns: from tick to tick.
        pool: the loop in the RT pool.
        malloc: the loop with malloc.
        tokens: what the model has generated meanwhile, about.
        hog: bytes that somebody took and gave back.
        busy: processes that kept CPUs busy.
        kept: every message was there in the RT pool, and none had changed.
    """

    period_ns: int
    pool: Run
    malloc: Run
    tokens: int
    hog: int
    busy: int
    kept: bool


def run(
    seconds: float,
    period_us: int,
    *,
    start: Callable[..., Process] = Process,
    each: Callable[[float], None] | None = None,
) -> Report:
    """Run both loops, one after the other, beside everything else.

    Args:
        seconds: how long each goes on.
        period_us: microseconds from tick to tick.
        start: starts a process.
        each: called now and then with the seconds that have passed since it was called last.

    Raises:
        TensormemError: a process has failed.
    """
    ticks = max(1, round(seconds * 1_000_000 / period_us))
    hog, busy = _hog_size(), os.cpu_count() or 1
    with contextlib.ExitStack() as stack:

        def started(*words: object) -> Process:
            process = stack.enter_context(start(*words))
            process.answer()
            return process

        # what keeps CPUs busy comes last, or all else would take long to start
        loops = [started("loop", memory, ticks, 1000 * period_us) for memory in ("pool", "malloc")]
        generator = started("generate")
        others = [started("hog", hog), *(started("spin") for _ in range(busy))]
        runs = []
        for loop in loops:
            loop.go()
            then = time.monotonic()
            while not loop.wait(0.2):
                now = time.monotonic()
                if each is not None:
                    each(now - then)
                then = now
            runs.append(Run(**loop.answer()))
        tokens = _TOKENS * generator.end()
        for process in others:
            process.end()
    pool, malloc = runs
    kept = not (pool.refused or pool.wrong or malloc.wrong)
    return Report(1000 * period_us, pool, malloc, tokens, hog, busy, kept)


def _work(role: str, *arguments: str) -> None:
    """Be the loop, or generate; tell in lines of JSON."""
    try:
        if role == "loop":
            memory, ticks, period = arguments
            print(json.dumps(_measure(memory, int(ticks), int(period))), flush=True)
            return
        for number, _ in enumerate(_generate()):
            if number % _TOKENS == 0:
                print("{}", flush=True)
    except (errors.TensormemError, OSError) as error:
        remedy = getattr(error, "remedy", None)
        cause = getattr(error, "cause", None) or str(error)
        print(json.dumps({"error": cause, "remedy": remedy}), flush=True)


if __name__ == "__main__":
    die_with(int(sys.argv[2]))
    _work(sys.argv[1], *sys.argv[3:])
