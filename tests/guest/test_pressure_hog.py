# SPDX-License-Identifier: MIT
"""A small board on which somebody takes nearly all memory: what can go goes, nothing else does, nobody is killed.

He takes 95 % of what is available at his start and of three quarters of what is evictable then: more than there is.

Evictable is what tensormem holds and could do without: its free chunks, the blocks of cached prefixes, and of idle
sequences what packing saves (of zeros, all but a page for each block).
"""

from __future__ import annotations

import mmap
import os
import random
import time
import zlib
from pathlib import Path

import pytest

from device import CHUNK, KV, PAGE, Raw, Seq, View, chain, full, read, tokens, wait_for, weights, write
from process import status_of
from tensormem import abi

RAM = os.sysconf("SC_PHYS_PAGES") * PAGE
pytestmark = pytest.mark.skipif(RAM > 600 << 20, reason="needs a small board (--memory 512M)")

#: 16 blocks of 8 tokens make a chunk.
FAT = full(2, CHUNK // 256, element=2)
PER_CHUNK, TOKENS = 16, 8
STEP = 8 << 20
EACH = 20  # chunks of each that is evictable


def oom_kills() -> int:
    text = Path("/proc/vmstat").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("oom_kill "))


def given() -> int:
    """Bytes that have gone to the system and not come back."""
    return (read("chunk/shrunk") - read("chunk/grown")) * CHUNK


class Hog:
    """A process that takes memory step by step, and looks after it."""

    def __init__(self) -> None:
        there, here = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            # who has to be killed for memory, if anybody, is the one who takes it
            Path("/proc/self/oom_score_adj").write_text("1000")
            held: list[mmap.mmap] = []
            while os.read(there[0], 1) == b"+":
                held.append(mmap.mmap(-1, STEP, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
                for at in range(0, STEP, PAGE):
                    held[-1][at : at + 8] = (len(held) << 32 | at).to_bytes(8, "little")
                os.write(here[1], b".")
            good = all(memory[at : at + 8] == (i << 32 | at).to_bytes(8, "little")
                       for i, memory in enumerate(held, 1) for at in range(0, STEP, PAGE))  # fmt: skip
            os._exit(0 if good else 1)
        self.out, self.into = there[1], here[0]
        os.close(there[0])
        os.close(here[1])

    def grow(self) -> None:
        os.write(self.out, b"+")
        assert os.read(self.into, 1) == b".", "the hog was killed"

    def end(self) -> int:
        os.write(self.out, b"-")
        for fd in (self.out, self.into):
            os.close(fd)
        return os.waitpid(self.pid, 0)[1]


def cached(kv: KV, tag: str, chunks: int) -> None:
    seq = kv.open(tokens=chunks * PER_CHUNK * TOKENS)
    assert kv.publish(seq, chain(tag, chunks * PER_CHUNK)) == 0
    assert kv.end(seq) == 0


def crc(kv: KV, view: View, seq: Seq, count: int) -> int:
    """Of all of a sequence's bytes."""
    value = 0
    for plane in range(kv.groups[0].planes):
        value = zlib.crc32(view.memory[view.span(seq, 0, plane, tokens=count)], value)
    return value


def test_ninety_per_cent_of_what_is_evictable(raw: Raw, watermarks: None) -> None:
    shape = {"block_tokens": TOKENS, "max_tokens": EACH * PER_CHUNK * TOKENS}
    with raw.kv([FAT], **shape) as kv, raw.kv([FAT], **shape) as others, raw.rt(2 * CHUNK) as rt:
        view, count = kv.view(), 4 * PER_CHUNK * TOKENS
        live = kv.open(tokens=count)
        for plane in range(kv.groups[0].planes):  # that no codec makes smaller
            span = view.span(live, 0, plane, tokens=count)
            view.memory[span] = random.Random(plane).randbytes(span.stop - span.start)
        tensor = raw.alloc(8 * CHUNK, abi.Kind.WEIGHTS)
        memory = raw.map_tensor(tensor)
        for at in range(0, 8 * CHUNK, CHUNK):
            memory[at : at + CHUNK] = weights(at, CHUNK)
        weights.cache_clear()
        sums = crc(kv, view, live, count), zlib.crc32(memory)
        assert rt.reserve(4096, 64) == 0
        reserved, state = read("rt/held"), rt.counts()

        idle = others.open(tokens=EACH * PER_CHUNK * TOKENS)
        other = others.view()
        other.write(idle, tokens("bytes", 0, 1))  # one block is not all zeros
        cached(kv, "cached", EACH)
        items = [raw.alloc(CHUNK, abi.Kind.WEIGHTS, abi.Pool.CHUNK) for _ in range(EACH)]
        for item in items:
            assert raw.free(item.handle) == 0
        wait_for(lambda: read("chunk/zeroed") >= read("chunk/reserve"))
        time.sleep(1.1)  # until it is idle

        packed = EACH * CHUNK - EACH * PER_CHUNK * PAGE
        evictable = read("chunk/free") * CHUNK + kv.info().cached + packed
        assert evictable > 3 * EACH * CHUNK * 9 // 10
        # what the system needs itself for its programs is cached again when it is needed
        Path("/proc/sys/vm/drop_caches").write_text("1")
        available = read("pressure/available")
        size = (available + evictable * 3 // 4) * 95 // 100 // STEP * STEP
        # more than can be had without us
        assert size > available
        # as much as then is left, if all of it goes
        high = available + evictable - size + (16 << 20)
        assert write("pressure/high", max(high, read("pressure/low"))) == 0
        assert write("pressure/low", high - (8 << 20)) == 0
        kills, before = oom_kills(), given()

        hog = Hog()
        for _ in range(size // STEP):
            hog.grow()
        wait_for(lambda: given() - before >= evictable * 9 // 10,
                 told=lambda: f"given back: {given() - before} of {evictable}")  # fmt: skip
        assert (crc(kv, view, live, count), zlib.crc32(memory)) == sums
        # what is promised is there, and was not touched
        assert (read("rt/held"), rt.counts()) == (reserved, state)
        assert all(rt.alloc(4096, flags=abi.RTFlag.RESERVED).handle for _ in range(64))
        figures = {name: read(f"pressure/{name}") for name in
                   ("reliefs", "chunks_given", "prefixes_given", "idle_given", "oom_calls", "oom_given")}  # fmt: skip
        print(f"evictable {evictable >> 20} MiB, hog {size >> 20} MiB of {available >> 20} MiB available,"
              f" given back {given() - before >> 20} MiB: {figures}")  # fmt: skip
        assert hog.end() == 0
        assert oom_kills() == kills
        # and back: what was packed is as it was
        assert write("pressure/low", 0) == 0
        other.check(idle, tokens("bytes", 0, 1))
        other.check(idle, dict.fromkeys(range(1, EACH * PER_CHUNK * TOKENS, 7)))
        assert (crc(kv, view, live, count), zlib.crc32(memory)) == sums
        for each in (view, other):
            each.close()
        memory.close()


def test_a_hog_that_asks_for_too_much_is_killed_alone(raw: Raw) -> None:
    """When there is nothing left to give, the kernel kills as ever; what is ours is as it was."""
    with raw.kv([FAT], block_tokens=TOKENS) as kv:
        view, seq = kv.view(), kv.open(tokens=PER_CHUNK * TOKENS)
        values = tokens("mine", 0, PER_CHUNK * TOKENS)
        view.write(seq, values)
        kills, calls = oom_kills(), read("pressure/oom_calls")

        def take() -> None:
            Path("/proc/self/oom_score_adj").write_text("1000")
            held = []
            while True:
                held.append(b"\1" * STEP)

        status = status_of(take)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 99
        assert oom_kills() <= kills + 1
        if os.WIFSIGNALED(status):
            assert read("pressure/oom_calls") > calls
        view.check(seq, values)
        view.close()
