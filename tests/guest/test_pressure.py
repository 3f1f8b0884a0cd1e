# SPDX-License-Identifier: MIT
"""Pressure: each step gives exactly what it says, in order, until enough; and touches nothing that is in use."""

from __future__ import annotations

import ctypes
import errno
import itertools
import json
import mmap
import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from device import (
    CHUNK,
    KV,
    PAGE,
    PATIENCE,
    RT,
    SYSFS,
    Raw,
    Seq,
    Slot,
    View,
    becomes,
    chain,
    events,
    full,
    read,
    tokens,
    wait_for,
    weights,
    write,
)
from process import killed_at_random, libc
from tensormem import abi, errors, pressure

CHUNKS, PREFIXES, IDLE, WEIGHTS = abi.Relief
NOZERO = abi.AllocFlag.NOZERO
U32, U64 = (1 << 32) - 1, (1 << 64) - 1
RAM = os.sysconf("SC_PHYS_PAGES") * PAGE
#: 16 blocks of 8 tokens make a chunk.
FAT = full(2, CHUNK // 256, element=2)
PER_CHUNK, TOKENS = 16, 8
COUNTERS = ("reliefs", "fruitless", "oom_calls", "oom_given",
            *(f"{step.name.lower()}_{what}" for step in abi.Relief for what in ("calls", "given")))  # fmt: skip


def counters() -> dict[str, int]:
    return {name: read(f"pressure/{name}") for name in COUNTERS}


def level() -> str:
    return (SYSFS / "pressure/level").read_text().strip()


@pytest.fixture(autouse=True)
def empty(settings: None, watermarks: None) -> None:
    """No reserve, nothing free, no pressure: what is given back is the test's."""
    capacity = read("chunk/capacity")
    for name, value in (("pressure/low", 0), ("chunk/reserve", 0), ("chunk/capacity", 0),
                        ("chunk/capacity", capacity)):  # fmt: skip
        assert write(name, value) == 0
    becomes("chunk/total", 0)
    wait_for(lambda: level() == "none")


def leave(raw: Raw, chunks: int) -> None:
    """So many free chunks, in the pool and nobody's."""
    items = [raw.alloc(CHUNK, abi.Kind.WEIGHTS, abi.Pool.CHUNK) for _ in range(chunks)]
    for item in items:
        assert raw.free(item.handle) == 0
    assert read("chunk/free") == chunks


def park(raw: Raw, chunks: int) -> None:
    """So many chunks that are kept for reuse."""
    items = [raw.alloc(CHUNK, pool=abi.Pool.CHUNK, flags=NOZERO) for _ in range(chunks)]
    for item in items:
        assert raw.free(item.handle) == 0
    assert raw.info().kept == chunks * CHUNK


def cached(kv: KV, tag: str, blocks: int) -> list[bytes]:
    """So many cached blocks, of one sequence that is closed; their names."""
    view, seq, names = kv.view(), kv.open(tokens=blocks * TOKENS), chain(tag, blocks)
    view.write(seq, tokens(tag, 0, blocks * TOKENS))
    assert kv.publish(seq, names) == 0
    assert kv.end(seq) == 0
    view.close()
    return names


def live(kv: KV, tag: str, blocks: int) -> tuple[Seq, View, dict[int, object]]:
    view, seq, values = kv.view(), kv.open(tokens=blocks * TOKENS), tokens(tag, 0, blocks * TOKENS)
    view.write(seq, values)
    return seq, view, values


def still_there(kv: KV, names: list[bytes]) -> int:
    """How long a prefix of these could be had."""
    seq = kv.open()
    result, matched = kv.peek(seq, names)
    assert result == 0
    assert kv.end(seq) == 0
    return matched


def idle() -> None:
    """Longer than a sequence may be unused and not be idle."""
    time.sleep(1.1)


# One step at a time


@pytest.mark.parametrize(("asked", "given"), [(1, 1), (CHUNK, 1), (CHUNK + 1, 2), (3 * CHUNK - 1, 3), (5 * CHUNK, 5),
                                              (6 * CHUNK, 5), (U64, 5)])  # fmt: skip
def test_free_chunks(raw: Raw, asked: int, given: int) -> None:
    leave(raw, 5)
    before, shrunk = counters(), read("chunk/shrunk")
    assert raw.relieve(asked) == [given * CHUNK, 0, 0, 0]
    assert (read("chunk/free"), read("chunk/total")) == (5 - given, 5 - given)
    assert read("chunk/shrunk") == shrunk + given
    others = 0 if given * CHUNK >= asked else 1
    assert counters() == before | {
        "reliefs": before["reliefs"] + 1,
        "chunks_calls": before["chunks_calls"] + 1,
        "chunks_given": before["chunks_given"] + given * CHUNK,
        "prefixes_calls": before["prefixes_calls"] + others,
        "idle_calls": before["idle_calls"] + others,
        "weights_calls": before["weights_calls"] + others,
    }


def test_nothing_to_give(raw: Raw) -> None:
    before = counters()
    assert raw.relieve(U64) == [0, 0, 0, 0]
    changed = ("reliefs", "fruitless", "chunks_calls", "prefixes_calls", "idle_calls", "weights_calls")
    assert counters() == before | {name: before[name] + 1 for name in changed}


def test_the_reserve_goes_last_and_comes_back_when_it_may(raw: Raw) -> None:
    assert write("chunk/reserve", 3) == 0
    becomes("chunk/zeroed", 3)
    items = [raw.alloc(CHUNK, abi.Kind.WEIGHTS, abi.Pool.CHUNK, flags=0) for _ in range(2)]
    becomes("chunk/zeroed", 3)
    for item in items:
        assert raw.free(item.handle) == 0
    assert (read("chunk/free"), read("chunk/zeroed")) == (5, 3)
    assert raw.relieve(2 * CHUNK) == [2 * CHUNK, 0, 0, 0]
    assert (read("chunk/free"), read("chunk/zeroed")) == (3, 3)
    assert raw.relieve(2 * CHUNK) == [2 * CHUNK, 0, 0, 0]
    assert raw.relieve(U64) == [CHUNK, 0, 0, 0]
    # below the high watermark the pool zeroes what it has, and takes nothing
    assert write("pressure/high", RAM) == 0
    leave(raw, 1)
    becomes("chunk/zeroed", 1)
    assert read("chunk/total") == 1
    assert write("pressure/high", 0) == 0
    assert raw.free(raw.alloc(CHUNK, pool=abi.Pool.CHUNK).handle) == 0
    becomes("chunk/zeroed", 3)


def test_what_is_kept_for_reuse(raw: Raw) -> None:
    park(raw, 4)
    leave(raw, 1)
    assert raw.relieve(CHUNK) == [CHUNK, 0, 0, 0]
    assert raw.info().kept == 4 * CHUNK
    assert raw.relieve(2 * CHUNK) == [2 * CHUNK, 0, 0, 0]
    assert raw.info().kept == 2 * CHUNK
    assert raw.relieve(U64) == [2 * CHUNK, 0, 0, 0]
    assert (raw.info().kept, raw.info().used) == (0, 0)


def test_runs_kept_for_reuse_make_chunks(raw: Raw) -> None:
    items = [raw.alloc(CHUNK // 2, pool=abi.Pool.BUDDY, flags=NOZERO) for _ in range(6)]
    for item in items:
        assert raw.free(item.handle) == 0
    assert (read("buddy/chunks"), raw.info().kept) == (3, 3 * CHUNK)
    # the oldest first, as many as it takes
    assert raw.relieve(2 * CHUNK) == [2 * CHUNK, 0, 0, 0]
    assert (read("buddy/chunks"), raw.info().kept) == (1, CHUNK)


def test_cached_prefixes(raw: Raw) -> None:
    with raw.kv([FAT], block_tokens=TOKENS) as kv:
        names = cached(kv, "gone", 4 * PER_CHUNK)
        seq, view, values = live(kv, "stays", PER_CHUNK // 2)
        info, block = kv.info(), kv.block_bytes()
        assert (info.held, info.cached) == (5 * CHUNK, 4 * CHUNK)
        # half a chunk is free: three halves of one have to go for two
        assert raw.relieve(2 * CHUNK) == [0, 2 * CHUNK, 0, 0]
        after = kv.info()
        assert after.held == 3 * CHUNK
        assert after.evictions - info.evictions == PER_CHUNK * 3 // 2
        assert after.cached == info.cached - PER_CHUNK * 3 // 2 * block
        # of a sequence the end first
        assert still_there(kv, names) == 4 * PER_CHUNK - PER_CHUNK * 3 // 2
        view.check(seq, values)
        # what would not make a chunk stays
        assert raw.relieve(U64, PREFIXES) == [0, 2 * CHUNK, 0, 0]
        assert (kv.info().held, kv.info().cached) == (CHUNK, CHUNK // 2)
        assert still_there(kv, names) == PER_CHUNK // 2
        assert raw.relieve(U64, PREFIXES) == [0, 0, 0, 0]
        view.check(seq, values)
        view.close()


def test_what_is_free_in_a_cache_goes_before_what_is_cached(raw: Raw) -> None:
    with raw.kv([FAT], block_tokens=TOKENS, max_sequences=64) as kv:
        seqs = [kv.open() for _ in range(2 * PER_CHUNK)]
        names = cached(kv, "cached", 2)
        for seq in seqs:  # one block after the other, so that they lie side by side
            assert kv.extend(seq, TOKENS) == 0
        for number, seq in enumerate(seqs):
            if number % 2:
                assert kv.end(seq) == 0
        info = kv.info()
        # not so much that the cache itself would move pages
        assert CHUNK <= info.held - info.used < 2 * CHUNK
        assert raw.relieve(CHUNK) == [0, CHUNK, 0, 0]
        assert kv.info().evictions == info.evictions
        assert still_there(kv, names) == 2


def test_prefixes_of_all_caches_in_turn(raw: Raw) -> None:
    caches = [raw.kv([FAT], block_tokens=TOKENS) for _ in range(3)]
    for kv in caches:
        cached(kv, "any", 2 * PER_CHUNK)
    for rest in ((1, 2, 2), (1, 1, 2), (1, 1, 1)):
        assert raw.relieve(CHUNK) == [0, CHUNK, 0, 0]
        assert sorted(kv.info().held // CHUNK for kv in caches) == sorted(rest)
    assert raw.relieve(U64) == [0, 3 * CHUNK, 0, 0]
    assert all(kv.info().held == 0 for kv in caches)
    for kv in caches:
        kv.close()


def test_those_of_others_as_well(raw: Raw) -> None:
    with Raw() as other, other.kv([FAT], block_tokens=TOKENS) as kv:
        cached(kv, "theirs", PER_CHUNK)
        assert other.info().used == CHUNK
        assert raw.relieve(U64) == [0, CHUNK, 0, 0]
        assert other.info().used == 0


def fill(kv: KV, blocks: int) -> Seq:
    """A sequence of zeros: a page for each block, when it is packed."""
    seq = kv.open(tokens=blocks * TOKENS)
    time.sleep(0.05)  # one that is older than the next
    return seq


def test_idle_sequences(raw: Raw) -> None:
    with raw.kv([FAT], block_tokens=TOKENS) as kv:
        blocks, chunk = 2 * PER_CHUNK, CHUNK // PAGE
        seqs = [fill(kv, blocks) for _ in range(4)]
        idle()
        saved = 2 * chunk - blocks
        # the one that was used longest ago, as a whole
        assert raw.relieve(CHUNK) == [0, 0, CHUNK, 0]
        assert [kv.query(seq).packed for seq in seqs] == [blocks * PAGE, 0, 0, 0]
        assert kv.info().held == 7 * CHUNK
        # one more is enough for two: there was nearly one left
        assert raw.relieve(2 * CHUNK, IDLE) == [0, 0, 2 * CHUNK, 0]
        assert [kv.query(seq).packed for seq in seqs] == [blocks * PAGE, blocks * PAGE, 0, 0]
        left = 4 * saved // chunk - 3
        assert raw.relieve(U64, IDLE) == [0, 0, left * CHUNK, 0]
        assert all(kv.query(seq).packed == blocks * PAGE for seq in seqs)
        assert kv.info().held - kv.info().used < CHUNK
        assert raw.relieve(U64) == [0, 0, 0, 0]
        assert kv.info().packs == 4 * blocks
        view = kv.view()
        for seq in seqs:
            view.check(seq, dict.fromkeys(range(0, blocks * TOKENS, 5)))
        assert (kv.info().packed, kv.info().unpacks) == (0, 4 * blocks)
        view.close()


def test_a_sequence_in_use_is_not_packed(raw: Raw) -> None:
    with raw.kv([FAT], block_tokens=TOKENS) as kv:
        seq = kv.open(tokens=PER_CHUNK * TOKENS)
        for _ in range(20):
            begin = time.monotonic()
            assert kv.truncate(seq, PER_CHUNK * TOKENS - 1) == 0
            assert kv.extend(seq, 1) == 0
            assert raw.relieve(U64) == [0, 0, 0, 0]
            if time.monotonic() < begin + 1:
                break
        else:
            pytest.fail("the board is too slow for this")
        assert kv.query(seq).packed == 0


# Their order


def test_the_cheapest_first(raw: Raw, trace: None) -> None:
    with raw.kv([FAT], block_tokens=TOKENS) as kv:
        seq = fill(kv, 4 * PER_CHUNK)
        cached(kv, "cached", 2 * PER_CHUNK)
        idle()
        leave(raw, 2)
        assert raw.relieve(CHUNK) == [CHUNK, 0, 0, 0]
        assert raw.relieve(2 * CHUNK) == [CHUNK, CHUNK, 0, 0]
        assert kv.info().packs == 0
        assert raw.relieve(3 * CHUNK) == [0, CHUNK, 2 * CHUNK, 0]
        assert kv.query(seq).packed == 4 * PER_CHUNK * PAGE
        done = [(e["step"], int(e["wanted"]), int(e["given"])) for e in events("pressure_step")]
        assert done == [
            ("chunks", CHUNK, CHUNK),
            ("chunks", 2 * CHUNK, CHUNK), ("prefixes", CHUNK, CHUNK),
            ("chunks", 3 * CHUNK, 0), ("prefixes", 3 * CHUNK, CHUNK), ("idle", 2 * CHUNK, 2 * CHUNK),
        ]  # fmt: skip


def test_weights_go_last_and_come_back(raw: Raw, slot: Slot) -> None:
    data, path = weights("pressure", 3 * CHUNK), Path("/tmp/pressure.bin")
    path.write_bytes(data)
    fd = os.open(path, os.O_RDONLY)
    with slot.stage(fd, abi.StageFlag.EVICTABLE) as staged:
        assert slot.commit(staged.loaded().number) == 0
    os.close(fd)
    with raw.kv([FAT], block_tokens=TOKENS) as kv, slot.acquire() as gen:
        cached(kv, "cached", PER_CHUNK)
        raw.relieve(U64, CHUNKS)
        leave(raw, 1)
        assert raw.relieve(CHUNK) == [CHUNK, 0, 0, 0]
        assert raw.relieve(2 * CHUNK) == [0, CHUNK, 0, CHUNK]
        assert read("model/evicted") == CHUNK
        assert raw.relieve(U64) == [0, 0, 0, 2 * CHUNK]
        assert read("model/evicted") == 3 * CHUNK
        assert raw.relieve(U64) == [0, 0, 0, 0]
        assert os.pread(gen.fd, 3 * CHUNK, 0) == data
        assert read("model/evicted") == 0
        assert raw.relieve(1, WEIGHTS) == [0, 0, 0, CHUNK]
        assert os.pread(gen.fd, 3 * CHUNK, 0) == data
    path.unlink()


@pytest.mark.parametrize("steps", [1, 2, 4, 3, 5, 6, 7])
def test_only_the_steps_asked_for(raw: Raw, steps: int) -> None:
    with raw.kv([FAT], block_tokens=TOKENS) as kv:
        fill(kv, PER_CHUNK + 1)
        cached(kv, "cached", PER_CHUNK)
        idle()
        leave(raw, 1)
        before = counters()
        result, item = raw.try_relieve(3 * CHUNK, steps)
        assert result == 0
        chosen = [step for step in abi.Relief if steps >> step & 1]
        # without prefixes, what is free beside them comes with the idle
        assert [bool(given) for given in item.step] == [step in chosen for step in abi.Relief]
        after = counters()
        for step in abi.Relief:
            name = step.name.lower()
            assert after[f"{name}_calls"] - before[f"{name}_calls"] == (step in chosen)
            assert after[f"{name}_given"] - before[f"{name}_given"] == item.step[step]


def test_the_rt_pool_gives_nothing(raw: Raw) -> None:
    assert write("rt/ready", 4 * CHUNK) == 0
    with raw.rt(2 * CHUNK) as rt:
        assert rt.reserve(4096, 8) == 0
        view = rt.view()
        item = rt.alloc(4096, flags=abi.RTFlag.RESERVED)
        view[:] = weights("rt", len(view))
        leave(raw, 1)
        state, folder = rt.counts(), {name: read(f"rt/{name}") for name in ("size", "ready", "held", "used")}
        assert raw.relieve(U64) == [CHUNK, 0, 0, 0]
        assert view[:] == weights("rt", len(view))
        assert rt.counts() == state
        assert {name: read(f"rt/{name}") for name in folder} == folder
        others = [rt.alloc(4096, flags=abi.RTFlag.RESERVED) for _ in range(7)]
        assert len({other.offset for other in (item, *others)}) == 8
        view.close()


# Bad input


def test_malformed(raw: Raw) -> None:
    leave(raw, 1)
    before = counters()
    steps = len(abi.Relief)
    cases = [{"bytes": 0}, {"steps": U32}, {"steps": 1 + (1 << steps)}, *({"flags": 1 << bit} for bit in range(32)),
             *({"steps": 1 << bit} for bit in range(steps, 32))]  # fmt: skip
    for fields in cases:
        item = abi.Relieve(**{"bytes": CHUNK, **fields})
        assert raw.ioctl(abi.IOC_RELIEVE, item) == errno.EINVAL, fields
    assert (counters(), read("chunk/free")) == (before, 1)


def sized(size: int) -> int:
    return abi.iowr(3, size)


def test_every_size_of_the_struct(raw: Raw) -> None:
    whole = ctypes.sizeof(abi.Relieve)
    least = abi.Relieve.step.offset
    for size in range(whole + 24):
        leave(raw, 1)
        data = bytearray(bytes(abi.Relieve(bytes=1)).ljust(whole + 24, b"\0"))[: max(size, 1)]
        behind = bytearray(64)
        result = raw.ioctl(sized(size), data + behind)
        assert result == (0 if size >= least else errno.EINVAL), size
        assert read("chunk/free") == (0 if size >= least else 1), size
        raw.relieve(U64)
    # what comes back is as long as what was given
    leave(raw, 2)
    data = bytearray(bytes(abi.Relieve(bytes=CHUNK))[:least]) + bytearray(b"\xaa" * 32)
    assert raw.ioctl(sized(least), data) == 0
    assert int.from_bytes(data[least - 8 : least], "little") == CHUNK
    assert data[least:] == b"\xaa" * 32
    # a tail that nobody knows
    data = bytearray(bytes(abi.Relieve(bytes=CHUNK)) + bytes(7) + b"\1")
    assert raw.ioctl(sized(len(data)), data) == errno.EINVAL
    assert raw.ioctl(sized(PAGE + 1), bytearray(PAGE + 1)) == errno.EINVAL if PAGE < 1 << 14 else True
    assert read("chunk/free") == 1


def test_outputs_are_ignored_on_input(raw: Raw) -> None:
    item = abi.Relieve(bytes=1, given=U64, step=(U64, U64, U64))
    assert raw.ioctl(abi.IOC_RELIEVE, item) == 0
    assert (item.given, *item.step) == (0, 0, 0, 0, 0)


def test_memory_that_cannot_be_written_costs_nothing(raw: Raw) -> None:
    leave(raw, 1)
    before = counters()
    place = mmap.mmap(-1, PAGE)
    place[: ctypes.sizeof(abi.Relieve)] = bytes(abi.Relieve(bytes=CHUNK))
    address = ctypes.addressof(ctypes.c_char.from_buffer(place))
    for where, prot in ((address, mmap.PROT_READ), (address, 0), (0, None), (1 << 63, None)):
        if prot is not None:
            assert libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(PAGE), prot) == 0
        assert libc.ioctl(raw.fd, ctypes.c_ulong(abi.IOC_RELIEVE), ctypes.c_void_p(where)) == -1
        assert ctypes.get_errno() == errno.EFAULT
    assert (counters(), read("chunk/free")) == (before, 1)


def as_nobody(action: Callable[[], bool]) -> bool:
    """Whether it is true for one without capabilities, who has root's descriptors."""
    pid = os.fork()
    if pid == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        os._exit(0 if action() else 1)
    return os.waitpid(pid, 0)[1] == 0


def test_without_the_capability(raw: Raw) -> None:
    leave(raw, 1)
    before = counters()
    files = [os.open(SYSFS / "pressure" / name, os.O_WRONLY) for name in ("low", "high")]

    def refused(fd: int) -> bool:
        try:
            os.write(fd, b"0")
        except PermissionError:
            return True
        return False

    assert as_nobody(lambda: raw.try_relieve(CHUNK)[0] == errno.EPERM)
    assert as_nobody(lambda: raw.try_relieve(0)[0] == errno.EINVAL)
    assert as_nobody(lambda: all(refused(fd) for fd in files))
    assert (counters(), read("chunk/free")) == (before, 1)
    for fd in files:
        os.close(fd)


def test_only_a_client_can_be_asked(raw: Raw) -> None:
    with raw.kv([FAT]) as kv, raw.rt() as rt:
        for other in (kv, rt):
            assert other.ioctl(abi.IOC_RELIEVE, abi.Relieve(bytes=1)) == errno.ENOTTY


def test_watermarks_are_in_order() -> None:
    assert write("pressure/high", 0) == 0
    assert write("pressure/low", 1) == errno.EINVAL
    assert write("pressure/high", 64 << 20) == 0
    assert write("pressure/low", 64 << 20) == 0
    assert write("pressure/high", (64 << 20) - 1) == errno.EINVAL
    assert write("pressure/low", (64 << 20) + 1) == errno.EINVAL
    assert write("pressure/high", RAM + 1) == errno.EINVAL
    assert write("pressure/high", U64) == errno.EINVAL
    assert (read("pressure/low"), read("pressure/high")) == (64 << 20, 64 << 20)
    assert write("pressure/high", RAM) == 0
    for name in ("low", "high"):
        for value in ("", "x", "-1", "1M", str(1 << 64)):
            assert write(f"pressure/{name}", value + "\n") in (errno.EINVAL, errno.ERANGE)


def test_available_is_what_the_kernel_says() -> None:
    def told() -> int:
        line = next(x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemAvailable"))
        return int(line.split()[1]) << 10

    assert abs(read("pressure/available") - told()) < 32 << 20


# The level


class Hog:
    """So much memory in use."""

    def __init__(self, size: int) -> None:
        self.memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory.madvise(23)  # MADV_POPULATE_WRITE

    def close(self) -> None:
        self.memory.close()


@pytest.fixture
def scarce() -> Iterator[int]:
    """Less than half of the memory is available; how much."""
    hog = Hog(max(read("pressure/available") - RAM * 3 // 8, PAGE))
    yield read("pressure/available")
    hog.close()


def becomes_level(expected: str) -> None:
    wait_for(lambda: level() == expected, told=lambda: f"the level is {level()}, not {expected}")


MARGIN = 48 << 20


def make_scarce() -> None:
    """What there is comes to be little, by the watermarks."""
    assert write("pressure/high", RAM) == 0
    assert write("pressure/low", min(read("pressure/available") + MARGIN, RAM)) == 0


def test_levels_and_hysteresis(raw: Raw, scarce: int, trace: None) -> None:
    poll = select.poll()
    fd = os.open(SYSFS / "pressure/level", os.O_RDONLY)
    assert os.read(fd, 16) == b"none\n"
    poll.register(fd, select.POLLPRI)
    assert not poll.poll(0)
    assert write("pressure/high", RAM) == 0
    assert write("pressure/low", scarce - MARGIN) == 0  # above low, below high: as before
    leave(raw, 1)
    assert level() == "none"
    assert write("pressure/low", scarce + MARGIN) == 0
    becomes_level("low")
    assert poll.poll(60_000)
    assert os.pread(fd, 16, 0) == b"low\n"
    becomes("chunk/free", 0)
    # a higher one makes it critical; back where it was, it stays so until it is above low
    assert write("pressure/low", min(2 * (scarce + MARGIN), RAM)) == 0
    becomes_level("critical")
    assert write("pressure/low", scarce + MARGIN) == 0
    stays("critical")
    assert write("pressure/low", scarce - MARGIN) == 0
    becomes_level("low")
    assert write("pressure/low", 0) == 0
    stays("low")
    assert write("pressure/high", scarce - MARGIN) == 0
    becomes_level("none")
    os.close(fd)
    assert [e["level"] for e in events("pressure_level")] == ["low", "critical", "low", "none"]


def stays(expected: str) -> None:
    """The worker has looked again, and it is what it was."""
    done = read("pressure/reliefs")
    wait_for(lambda: read("pressure/reliefs") > done)
    assert level() == expected


def test_what_comes_free_below_the_high_watermark_is_given(raw: Raw) -> None:
    """The timer looks, also while nothing is to be had."""
    make_scarce()
    becomes_level("low")
    with raw.kv([FAT], block_tokens=TOKENS) as kv:
        cached(kv, "cached", 2 * PER_CHUNK)
        wait_for(lambda: kv.info().held == 0)
        seq, view, values = live(kv, "live", PER_CHUNK)
        park(raw, 2)
        wait_for(lambda: raw.info().kept == 0)
        view.check(seq, values)
        view.close()


def test_vain_attempts_become_rare(trace: None) -> None:
    before = counters()
    make_scarce()
    wait_for(lambda: read("pressure/fruitless") >= before["fruitless"] + 3)
    # each waits at least as long as the one before
    path = Path("/sys/kernel/tracing/trace")
    times = [float(line.split(": tensormem_pressure_step")[0].split()[-1])
             for line in path.read_text().splitlines() if "pressure_step: step=chunks" in line]  # fmt: skip
    waited = [b - a for a, b in itertools.pairwise(times)]
    assert waited[-1] > 1.5
    after = counters()
    assert after["chunks_given"] == before["chunks_given"]
    assert after["fruitless"] - before["fruitless"] == after["reliefs"] - before["reliefs"]


# All at once


def test_relief_beside_everything_else(raw: Raw) -> None:
    """Readers, writers, allocation and two who relieve: nobody sees anything but his own bytes."""
    end = threading.Event()
    faults: list[BaseException] = []

    def forever(work: Callable[[random.Random], None], seed: int) -> threading.Thread:
        def run() -> None:
            dice = random.Random(seed)
            try:
                while not end.is_set():
                    work(dice)
            except BaseException as error:
                faults.append(error)
                end.set()

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    with raw.kv([FAT], block_tokens=TOKENS, max_sequences=32) as kv:
        view = kv.view()
        kept = [live(kv, f"kept {i}", PER_CHUNK)[::2] for i in range(3)]
        tensor = raw.alloc(3 * CHUNK, abi.Kind.WEIGHTS)
        memory = raw.map_tensor(tensor)
        memory[:] = weights("crc", len(memory))
        crc = zlib.crc32(memory)
        rounds = [0]

        def read_kv(dice: random.Random) -> None:
            seq, values = dice.choice(kept)
            token = dice.randrange(PER_CHUNK * TOKENS)
            view.check(seq, {token: values[token]})

        def make_prefixes(dice: random.Random) -> None:
            seq = kv.open()
            blocks = dice.randrange(1, 2 * PER_CHUNK)
            assert kv.extend(seq, blocks * TOKENS) == 0
            token = dice.randrange(blocks * TOKENS)
            view.write(seq, {token: "mine"})
            view.check(seq, {token: "mine"})
            assert kv.publish(seq, chain(dice.random(), blocks)) == 0
            assert kv.end(seq) == 0

        def churn(dice: random.Random) -> None:
            with Raw() as other:
                items = [other.alloc(dice.choice((PAGE, CHUNK // 4, CHUNK)), flags=dice.choice((0, NOZERO)))
                         for _ in range(4)]  # fmt: skip
                for item in items:
                    assert other.free(item.handle) == 0

        def relieve(dice: random.Random) -> None:
            steps = dice.randrange(1 << len(abi.Relief))
            result, item = raw.try_relieve(dice.choice((1, CHUNK, 4 * CHUNK, U64)), steps)
            assert result == 0
            assert item.given == sum(item.step)
            rounds[0] += 1

        works = (read_kv, make_prefixes, churn, relieve, relieve)
        threads = [forever(work, seed) for seed, work in enumerate(works)]
        wait_for(lambda: rounds[0] >= 60 or end.is_set())
        end.set()
        for thread in threads:
            thread.join()
        assert not faults, faults
        assert zlib.crc32(memory) == crc
        for seq, values in kept:
            view.check(seq, values)
        memory.close()
        view.close()


def test_closing_a_cache_that_is_being_relieved(raw: Raw) -> None:
    """Whoever goes last frees it."""
    end = threading.Event()
    thread = threading.Thread(target=lambda: [raw.relieve(U64) for _ in iter(end.is_set, True)])
    thread.start()
    for number in range(12):
        with Raw() as other, other.kv([FAT], block_tokens=TOKENS) as kv:
            fill(kv, 2 * PER_CHUNK)
            cached(kv, f"cached {number}", PER_CHUNK)
    end.set()
    thread.join()
    becomes("kv/caches", 0)


def test_killed_in_the_middle(raw: Raw) -> None:
    dice = random.Random(7)

    def work(seed: int) -> None:
        mine = random.Random(seed)
        with Raw() as client, client.kv([FAT], block_tokens=TOKENS) as kv:
            while True:
                seq = kv.open(tokens=PER_CHUNK * TOKENS)
                if mine.random() < 0.7:
                    assert kv.publish(seq, chain(mine.random(), PER_CHUNK)) == 0
                    assert kv.end(seq) == 0
                elif kv.info().sequences > 4:
                    assert kv.end(seq) == 0
                client.relieve(mine.choice((CHUNK, U64)))

    with raw.kv([FAT], block_tokens=TOKENS) as kv:
        seq, view, values = live(kv, "mine", PER_CHUNK)
        for _ in range(5):
            killed_at_random(work, dice, 0.05, 0.8)
        view.check(seq, values)
        view.close()
    becomes("kv/caches", 0)
    raw.relieve(U64)
    assert raw.relieve(U64) == [0, 0, 0, 0]


def test_an_arena_is_made_while_memory_is_scarce(raw: Raw) -> None:
    """What relief gives others can have at once, the RT pool too."""
    make_scarce()
    becomes_level("low")
    with raw.rt(2 * CHUNK) as rt:
        assert isinstance(rt, RT)
        assert rt.reserve(CHUNK // 2, 2) == 0
        assert rt.alloc(CHUNK // 2, flags=abi.RTFlag.RESERVED).handle


# The library and the command line


def command(*arguments: str) -> dict[str, Any]:
    run = [sys.executable, "-m", "tensormem", "pressure", *arguments, "--json"]
    return json.loads(subprocess.run(run, check=True, capture_output=True, text=True).stdout)


def test_the_library(raw: Raw) -> None:
    leave(raw, 3)
    before = pressure.status()
    given = pressure.relieve("4M")
    assert (given.wanted, given.total) == (2 * CHUNK, 2 * CHUNK)
    assert given.steps == {"chunks": 2 * CHUNK, "prefixes": 0, "idle": 0, "weights": 0}
    assert pressure.relieve(1, ["prefixes", "idle"]).total == 0
    after = pressure.status()
    assert after.steps["chunks"].given - before.steps["chunks"].given == 2 * CHUNK
    assert (after.level, after.reliefs, after.fruitless) == ("none", before.reliefs + 2, before.fruitless + 1)
    now = pressure.set_watermarks(low="24M", high="48M")
    assert (now.low, now.high) == (read("pressure/low"), read("pressure/high")) == (24 << 20, 48 << 20)
    with pytest.raises(errors.InvalidArgument):
        pressure.set_watermarks(high=RAM + 1)


def test_the_command_line(raw: Raw) -> None:
    leave(raw, 3)
    assert command("relieve", "--bytes", "4M", "--step", "chunks")["total"] == 2 * CHUNK
    assert read("chunk/free") == 1


def test_watching_the_level() -> None:
    """It rises, and the watcher asks for what is missing."""
    reader, writer = os.pipe()
    done: list[pressure.Action] = []
    with pressure.LevelSource() as source:

        def watch() -> None:
            for action in pressure.watch(source, least=CHUNK, stop=reader):
                done.append(action)

        thread = threading.Thread(target=watch)
        thread.start()
        make_scarce()
        wait_for(lambda: done)
        os.write(writer, b"x")
        thread.join()
    assert done[0].source == "level"
    assert done[0].reason.startswith("the level rose from none to")
    assert done[0].relief.wanted == max(RAM - done[0].available, CHUNK)
    os.close(reader)
    os.close(writer)


def test_watch_ends_on_a_signal() -> None:
    run = [sys.executable, "-m", "tensormem", "pressure", "watch", "--json"]
    with subprocess.Popen(run, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        on = Path("/proc/pressure/memory").exists()
        assert json.loads(process.stdout.readline()) == {"source": "psi" if on else "level"}
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 0
