# SPDX-License-Identifier: MIT
"""Deadlines: who waits is served in order, or told so in time; blocks move to make room."""

from __future__ import annotations

import errno
import os
import random
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from conftest import USAGE, settled
from device import CHUNK, KASAN, RT, SYSFS, Raw, events, read, wait_for
from process import killed_at_random
from tensormem import abi

ABSOLUTE, RESERVED, MOVABLE = abi.RTFlag.ABSOLUTE, abi.RTFlag.RESERVED, abi.RTFlag.MOVABLE
MS, SECOND = 10**6, 10**9
#: Longer than any test: who waits so long has been forgotten.
LONG = 300 * SECOND
SIXTEENTH = CHUNK // 16


@pytest.fixture
def rt(raw: Raw) -> Iterator[RT]:
    with raw.rt(CHUNK, movable=1024) as arena:
        yield arena


class Request(threading.Thread):
    """An allocation that waits, in a thread of its own."""

    def __init__(self, rt: RT, size: int, deadline_ns: int = LONG, flags: int = 0, served: list | None = None) -> None:
        super().__init__()
        self.rt, self.served = rt, served
        self.arguments = size, deadline_ns, flags
        before = rt.info().waiting
        self.start()
        wait_for(lambda: rt.info().waiting == before + 1)

    def run(self) -> None:
        self.result, self.item = self.rt.try_alloc(*self.arguments)
        if self.served is not None:
            self.served.append(self)

    def block(self) -> abi.RTAlloc:
        self.join(60)
        assert not self.is_alive(), "it still waits"
        assert self.result == 0, errno.errorcode[self.result]
        return self.item

    def error(self) -> int:
        self.join(60)
        assert not self.is_alive(), "it still waits"
        return self.result


def bucket(nanoseconds: int) -> int:
    return max(nanoseconds, 1).bit_length() - 1


# Misses


@pytest.mark.parametrize("flags", [0, ABSOLUTE, MOVABLE])
def test_not_before_the_deadline(rt: RT, flags: int) -> None:
    """ETIMEDOUT, and not a nanosecond too early; each is counted, in the histogram of what time it had."""
    rt.alloc(CHUNK)
    deadlines = (100_000, MS, 10 * MS, (1 << 27) - 1)
    for number, deadline in enumerate(deadlines, 1):
        before, counts = rt.histogram("missed"), rt.counts()
        begin = time.monotonic_ns()
        result = rt.alloc_errno(256, deadline + begin * bool(flags & ABSOLUTE), flags)
        end = time.monotonic_ns()
        assert result == errno.ETIMEDOUT
        assert end >= begin + deadline
        assert rt.counts() == {**counts, "misses": number, "waits": number}
        new = [now - old for now, old in zip(rt.histogram("missed"), before, strict=True)]
        assert sum(new) == 1
        assert new.index(1) <= bucket(deadline)
    # half of the last one is not lost on the way to it
    assert new.index(1) >= bucket(deadline) - 1
    assert sum(rt.histogram("missed")) == rt.read("misses") == len(deadlines)


def test_a_deadline_that_has_passed(rt: RT) -> None:
    """It does not wait; a block that is there is had."""
    past = time.monotonic_ns() - SECOND
    block = rt.alloc(CHUNK, past, ABSOLUTE)
    assert rt.alloc_errno(256, past, ABSOLUTE) == errno.ETIMEDOUT
    assert (rt.info().misses, rt.info().blocks) == (1, 1)
    assert rt.histogram("missed")[0] == 1  # it had no time at all
    assert rt.free(block.handle) == 0
    assert rt.alloc_errno(256, past, ABSOLUTE) == 0


def test_who_was_late_is_not_served(rt: RT) -> None:
    """What is freed after a miss is there for others."""
    block = rt.alloc(CHUNK)
    for _ in range(20):
        assert rt.alloc_errno(CHUNK, MS) == errno.ETIMEDOUT
        assert rt.free(block.handle) == 0
        assert rt.info().free == CHUNK
        block = rt.alloc(CHUNK)
    assert (rt.info().blocks, rt.info().waiting) == (1, 0)


def test_histograms(rt: RT) -> None:
    """64 numbers each; of requests with a deadline only."""
    for name in ("latency", "missed"):
        assert rt.histogram(name) == [0] * 64
    for _ in range(10):
        rt.alloc(256)
    assert sum(rt.histogram("latency")) == 0
    for _ in range(7):
        rt.alloc(256, SECOND)
    assert sum(rt.histogram("latency")) == 7
    blocks = rt.fill_up()
    request = Request(rt, blocks[0].size)
    time.sleep(0.05)
    assert rt.free(blocks[0].handle) == 0
    request.block()
    histogram = rt.histogram("latency")
    assert sum(histogram) == 8
    assert sum(histogram[bucket(50 * MS) :]) >= 1
    assert sum(rt.histogram("missed")) == 0


# Serving


def test_a_free_serves(raw: Raw, rt: RT) -> None:
    """Of the same client or another; the block is what it asked for."""
    with raw.join(rt) as other:
        for waiter, holder in ((rt, rt), (other, rt), (rt, other)):
            blocks = [holder.alloc(CHUNK // 4) for _ in range(4)]
            request = Request(waiter, CHUNK // 4)
            assert request.is_alive()
            assert waiter.info().waits == waiter.info().misses + 1 + (waiter is rt and holder is other)
            assert holder.free(blocks[2].handle) == 0
            got = request.block()
            assert got.offset == blocks[2].offset
            assert waiter.free(got.handle) == 0
            del blocks[2]
            assert holder.free_batch([b.handle for b in blocks])[0] == 0
        assert (rt.info().misses, other.info().misses) == (0, 0)
        assert rt.info().largest == CHUNK


def test_a_batch_serves_several(rt: RT) -> None:
    blocks = [rt.alloc(SIXTEENTH) for _ in range(16)]
    requests = [Request(rt, SIXTEENTH) for _ in range(8)]
    assert rt.free_batch([b.handle for b in blocks[:8]])[0] == 0
    assert {r.block().offset for r in requests} == {b.offset for b in blocks[:8]}
    assert (rt.info().waits, rt.info().blocks, rt.info().waiting) == (8, 16, 0)


def test_what_is_not_reserved_any_more_serves(raw: Raw, rt: RT) -> None:
    with raw.join(rt) as other:
        assert other.reserve(CHUNK // 4, 2) == 0
        rt.fill_up()
        request = Request(rt, CHUNK // 4 + 5)
        assert other.reserve(CHUNK // 4, 0) == 0
        assert request.block().size > CHUNK // 4


def test_a_close_serves(raw: Raw, rt: RT) -> None:
    with raw.join(rt) as other:
        blocks = other.fill(SIXTEENTH)
        assert len(blocks) == 16
        request = Request(rt, 5 * SIXTEENTH)
        other.close()
        assert request.block().offset % rt.info().granule == 0
        assert rt.info().clients == 1


def test_an_item_serves_its_client(raw: Raw, rt: RT) -> None:
    """Who waits because what is reserved for it is in use gets it when it is freed, whoever else waits."""
    assert rt.reserve(1000, 1) == 0
    item = rt.alloc(1000)
    rt.fill_up()
    with raw.join(rt, 99) as other:
        first = Request(other, 1000)
        second = Request(rt, 700)
        assert rt.free(item.handle) == 0
        assert second.block().offset == item.offset
        assert first.is_alive()
        assert rt.free(second.item.handle) == 0
        assert rt.reserve(1000, 0) == 0
        first.block()


def test_by_priority_then_in_order(raw: Raw, rt: RT) -> None:
    """Highest first; of equal ones who came first, whoever frees and in whatever order they came."""
    priorities = [3, 50, 0, 50, 99, 3, 3, 98]
    clients = [raw.join(rt, priority) for priority in priorities]
    for turn in range(3):
        blocks = rt.fill(SIXTEENTH)
        served: list[Request] = []
        requests = [Request(client, SIXTEENTH, served=served) for client in clients]
        for count, block in enumerate(blocks[: len(requests)], 1):
            assert rt.free(block.handle) == 0
            wait_for(lambda n=count, so_far=served: len(so_far) == n)
        expected = sorted(requests, key=lambda r: -r.rt.info().priority)
        assert [requests.index(r) for r in served] == [requests.index(r) for r in expected], turn
        for request in requests:
            assert request.rt.free(request.block().handle) == 0
        assert rt.free_batch([b.handle for b in blocks[len(requests) :]])[0] == 0
    for client in clients:
        client.close()


def test_the_priority_is_that_of_when_it_began(raw: Raw, rt: RT) -> None:
    with raw.join(rt, 5) as one, raw.join(rt, 6) as two:
        blocks = rt.fill(SIXTEENTH)
        served: list[Request] = []
        first = Request(one, SIXTEENTH, served=served)
        second = Request(two, SIXTEENTH, served=served)
        assert one.set_priority(90) == 0
        third = Request(one, SIXTEENTH, served=served)
        for count in range(1, 4):
            assert rt.free(blocks[count].handle) == 0
            wait_for(lambda n=count: len(served) == n)
        assert served == [third, second, first]
        assert [r.block().size for r in served] == [SIXTEENTH] * 3


def test_nobody_barges_in(raw: Raw, rt: RT) -> None:
    """While one waits that is as important or more, others get nothing of what is free."""
    with raw.join(rt, 5) as waiter, raw.join(rt, 4) as less, raw.join(rt, 5) as equal, raw.join(rt, 6) as more:
        blocks = rt.fill(SIXTEENTH)
        request = Request(waiter, 2 * SIXTEENTH)
        # room enough for the others
        assert rt.free(blocks[0].handle) == 0
        assert rt.info().free == SIXTEENTH
        assert less.alloc_errno(256) == equal.alloc_errno(256) == errno.ENOSPC
        assert less.alloc_errno(256, MS) == equal.alloc_errno(256, MS) == errno.ETIMEDOUT
        block = more.alloc(256)
        assert request.is_alive()
        assert more.free(block.handle) == 0
        # two that are neighbours
        assert rt.free(blocks[1].handle) == 0
        assert request.block().size == 2 * SIXTEENTH
        assert less.alloc_errno(256) == errno.ENOSPC  # for want of memory
        assert rt.free(blocks[5].handle) == 0
        assert less.alloc_errno(256) == 0


def test_small_ones_do_not_starve_a_large_one(raw: Raw, rt: RT) -> None:
    """They come in an endless stream, and everything that is freed is soon too little for it: it is served still."""
    with raw.join(rt) as large:
        blocks = rt.fill(SIXTEENTH)
        served: list[Request] = []
        request = Request(large, CHUNK // 2, served=served)
        small = [Request(rt, SIXTEENTH, served=served) for _ in range(4)]
        for block in blocks[:8]:
            assert not served
            assert rt.free(block.handle) == 0
        request.block()
        assert served[0] is request
        assert all(r.is_alive() for r in small)
        for block in blocks[8:12]:
            assert rt.free(block.handle) == 0
        assert {r.block().offset for r in small} == {b.offset for b in blocks[8:12]}


def test_what_cannot_be_served_does_not_wait(raw: Raw) -> None:
    """No movable block where there may be none, whoever waits: nobody is held up by one that asks for it."""
    with raw.rt() as rt, raw.join(rt) as other:
        blocks = rt.fill_up()
        assert rt.alloc_errno(256, LONG, MOVABLE) == errno.ENFILE
        request = Request(other, 256)
        assert rt.alloc_errno(256, 2 * SECOND, MOVABLE) == errno.ENFILE
        assert (rt.info().waits, rt.info().misses) == (0, 0)
        assert rt.free_batch([b.handle for b in blocks])[0] == 0
        request.block()


def test_one_that_gives_up_lets_the_next_in(raw: Raw, rt: RT) -> None:
    """By its deadline or a signal: who waited behind it for less gets what there is."""
    with raw.join(rt, 9) as large:
        blocks = rt.fill(SIXTEENTH)
        hopeless = Request(large, CHUNK, 2 * SECOND)
        small = Request(rt, SIXTEENTH)
        assert rt.free(blocks[3].handle) == 0
        assert hopeless.error() == errno.ETIMEDOUT
        assert small.block().offset == blocks[3].offset
        assert (large.info().misses, rt.info().misses) == (1, 0)


def test_a_batch_waits_for_its_items(raw: Raw, rt: RT) -> None:
    """Each in its turn; what it has keeps while it waits for the rest."""
    with raw.join(rt) as other:
        blocks = other.fill(SIXTEENTH)
        assert other.free(blocks[0].handle) == 0
        results: list = []
        thread = threading.Thread(target=lambda: results.extend(rt.alloc_batch([SIXTEENTH] * 4, LONG)))
        thread.start()
        for count in range(1, 4):
            wait_for(lambda n=count: rt.info().waits == n)
            assert (rt.info().blocks, rt.info().waiting) == (count, 1)
            assert other.free(blocks[count].handle) == 0
        thread.join(60)
        result, batch, items = results
        assert (result, batch.failed) == (0, 4)
        assert [i.offset for i in items] == [b.offset for b in blocks[:4]]
        assert rt.info().waits == 3
        # and gives it back when time is up
        assert rt.free_batch([i.handle for i in items])[0] == 0
        result, batch, _ = rt.alloc_batch([SIXTEENTH] * 5, 50 * MS)
        assert (result, batch.failed) == (errno.ETIMEDOUT, 4)
        assert (rt.info().blocks, rt.info().free) == (0, 4 * SIXTEENTH)


# Compaction


def checkered(rt: RT, size: int, pinned: int = 0) -> tuple[dict[int, bytes], int]:
    """An arena full of movable blocks with contents of their own, every other one freed. Their bytes; room in holes.

    Every @pinned-th stays pinned.
    """
    view = rt.view()
    blocks = rt.fill(size, MOVABLE)
    contents = {}
    for i, block in enumerate(blocks):
        if i % 2:
            assert rt.free(block.handle) == 0
            continue
        data = random.Random(i).randbytes(size)
        view[block.offset : block.offset + size] = data
        contents[block.handle] = data
        if not pinned or i % (2 * pinned):
            assert rt.unpin(block.handle) == 0
    view.close()
    return contents, rt.info().free


def look_at(rt: RT, contents: dict[int, bytes]) -> dict[int, int]:
    """All blocks have their bytes; where they are."""
    view = rt.view()
    places = {}
    for handle, data in contents.items():
        result, places[handle] = rt.pin(handle)
        assert result == 0
        assert view[places[handle] : places[handle] + len(data)] == data
        assert rt.unpin(handle) == 0
    view.close()
    return places


@pytest.mark.parametrize("size", [128 * 128, 5000, 2000])
def test_what_is_scattered_is_brought_together(rt: RT, size: int) -> None:
    """Refused without a deadline, had with one; handles and contents of what moved are right."""
    contents, free = checkered(rt, size)
    before = look_at(rt, contents)
    assert rt.alloc_errno(free // 2) == errno.ENOSPC
    assert rt.info().moves == 0
    block = rt.alloc(free // 2, LONG)
    info = rt.info()
    assert (info.misses, info.free) == (0, free - max(256, -(-(free // 2) // 128) * 128))
    assert info.moves > 0
    places = look_at(rt, contents)
    assert places != before
    unit = info.granule
    taken = [at // unit for start in places.values() for at in range(start, start + size, unit)]
    mine = range(block.offset // unit, -(-(block.offset + block.size) // unit))
    assert len(set(taken)) == len(taken)
    assert not set(taken) & set(mine)
    assert rt.free_batch([*list(contents)[:63], block.handle])[0] == 0
    # all of what is left in one piece
    rt.alloc(rt.info().free * 31 // 32, LONG)
    look_at(rt, dict(list(contents.items())[63:]))


def test_pinned_blocks_stay(rt: RT) -> None:
    """And what can be had lies between them."""
    size = 4096
    contents, free = checkered(rt, size, pinned=8)
    handles = list(contents)
    pinned = handles[::8]
    before = look_at(rt, contents)
    assert rt.alloc_errno(free // 2, 50 * MS) == errno.ETIMEDOUT
    between = 7 * size
    for _ in range(len(pinned) - 1):
        rt.alloc(between, LONG)
    places = look_at(rt, contents)
    assert all(places[h] == before[h] for h in pinned)
    assert any(places[h] != before[h] for h in handles)


def test_pins_of_blocks_that_move(raw: Raw, rt: RT) -> None:
    """Whoever pins a block, sees it whole and in one place, while two others compact without end."""
    size = 128 * 128
    contents, free = checkered(rt, size)
    stop = threading.Event()

    def compact(client: RT, seed: int) -> None:
        dice = random.Random(seed)
        while not stop.is_set():
            result, block = client.try_alloc(dice.randrange(size, free // 2), 20 * MS)
            if result == 0:
                assert client.free(block.handle) == 0

    with raw.join(rt) as one, raw.join(rt) as two:
        threads = [threading.Thread(target=compact, args=(c, i)) for i, c in enumerate((one, two))]
        for thread in threads:
            thread.start()
        view, dice = rt.view(), random.Random(5)
        names = list(contents)
        for _ in range(1500):
            handle = dice.choice(names)
            result, at = rt.pin(handle)
            assert result == 0
            assert view[at : at + size] == contents[handle]
            data = dice.randbytes(64)
            view[at : at + 64] = data
            contents[handle] = data + contents[handle][64:]
            if dice.randrange(8) == 0:  # a new one in its place
                assert rt.free(handle) == 0
                names.remove(handle)
                del contents[handle]
                result, block = rt.try_alloc(size, flags=MOVABLE)
                if result == 0:
                    view[block.offset : block.offset + size] = data * (size // 64)
                    contents[block.handle] = data * (size // 64)
                    names.append(block.handle)
                    assert rt.unpin(block.handle) == 0
            else:
                assert rt.unpin(handle) == 0
            if len(names) < 20:
                break
        stop.set()
        for thread in threads:
            thread.join()
        assert rt.info().moves > 0
        look_at(rt, contents)
        view.close()


def test_freeing_what_was_moved(rt: RT) -> None:
    """All of it, and the arena is one piece again."""
    contents, free = checkered(rt, 3000)
    block = rt.alloc(free // 3, LONG)
    assert all(rt.free(handle) == 0 for handle in contents)
    assert all(rt.free(handle) == errno.ENOENT for handle in contents)
    assert rt.free(block.handle) == 0
    assert (rt.info().largest, rt.info().blocks) == (CHUNK, 0)


def test_an_unpin_lets_who_waits_compact(raw: Raw, rt: RT) -> None:
    """It has compacted in vain, waits, and begins again."""
    with raw.join(rt) as waiter:
        size = 8192
        contents, free = checkered(rt, size, pinned=1)
        pinned = list(contents)
        request = Request(waiter, free * 3 // 4)
        assert request.is_alive()
        for handle in pinned:
            assert rt.unpin(handle) == 0
        request.block()
        look_at(rt, contents)
        assert waiter.info().misses == 0


# Signals and ends


def test_a_signal_ends_the_wait(rt: RT, trace: None) -> None:
    """EINTR, and nothing was allocated; no miss."""
    rt.alloc(CHUNK)
    seen = []
    old = signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
    try:
        request = Request(rt, 256)
        assert request.ident is not None
        signal.pthread_kill(request.ident, signal.SIGUSR1)
        assert request.error() == errno.EINTR
    finally:
        signal.signal(signal.SIGUSR1, old)
    info = rt.info()
    assert (info.blocks, info.misses, info.waiting) == (1, 0, 0)
    assert [len(events(f"rt_{what}")) for what in ("wait", "interrupted", "miss")] == [1, 1, 0]
    assert seen


def test_a_stop_and_a_continue(raw: Raw, rt: RT) -> None:
    """A process that is stopped while it waits is served, or not: it has a block, or EINTR, and nothing is lost."""
    for served in (True, False):
        block = rt.alloc(CHUNK)
        pid = os.fork()
        if pid == 0:
            mine = raw.join(rt)
            result = mine.alloc_errno(CHUNK, LONG)
            os._exit({0: 10, errno.EINTR: 11}.get(result, 12))
        wait_for(lambda: sum(int(path.read_text()) for path in (SYSFS / "rt").glob("*/waiting")))
        os.kill(pid, signal.SIGSTOP)
        os.waitpid(pid, os.WUNTRACED)
        if served:
            assert rt.free(block.handle) == 0
        os.kill(pid, signal.SIGCONT)
        if not served:
            time.sleep(0.05)
            assert rt.free(block.handle) == 0
        assert os.WEXITSTATUS(os.waitpid(pid, 0)[1]) in (10, 11)
        wait_for(lambda: rt.info().clients == 1)
        assert rt.info().largest == CHUNK


def test_a_descriptor_closed_under_who_waits(raw: Raw, rt: RT) -> None:
    """It is open until the call is done."""
    block = rt.alloc(CHUNK)
    other = raw.join(rt)
    request = Request(other, CHUNK)
    other.close()
    assert rt.info().clients == 2
    assert rt.free(block.handle) == 0
    assert request.block().offset == 0
    wait_for(lambda: rt.info().clients == 1)
    assert rt.info().largest == CHUNK


def churn(raw: Raw, arena: RT, seed: int) -> None:
    """Hold, wait, compact and reserve, until killed."""
    dice = random.Random(seed)
    with raw.join(arena, dice.randrange(100)) as rt:
        view = rt.view()
        held: list[int] = []
        while True:
            kind = dice.randrange(10)
            if kind < 4:
                flags = MOVABLE * dice.randrange(2)
                size = dice.choice((100, 3000, 16000) if flags else (1, 5000, 100_000))
                result, block = rt.try_alloc(size, dice.choice((0, 50_000, MS, 20 * MS)), flags)
                if result == 0:
                    held.append(block.handle)
                    view[block.offset : block.offset + 8] = b"12345678"
                    if flags and dice.randrange(4):
                        rt.unpin(block.handle)
            elif kind < 6 and held:
                assert rt.free(held.pop(dice.randrange(len(held)))) == 0
            elif kind == 6:
                rt.alloc_errno(CHUNK // 2, 30 * MS)  # compacts, and waits
                if rt.info().blocks > len(held):
                    break
            elif kind == 7:
                if rt.reserve(2000, 10) == 0:
                    rt.fill(2000, RESERVED)
            elif kind == 8 and held:
                handle = dice.choice(held)
                if rt.pin(handle)[0] == 0:
                    rt.unpin(handle)
            elif kind == 9:
                rt.alloc_batch([1000] * 20, MS)
                break


def churn_on(raw: Raw, arena: RT, seed: int) -> None:
    while True:
        churn(raw, arena, seed)
        seed += 1


def test_sigkill_at_random_moments(raw: Raw, rt: RT) -> None:
    """Who holds, waits or compacts dies at any point: all it had is back, and the others go on."""
    dice = random.Random(21)
    mine = rt.alloc(5000, flags=MOVABLE)
    view = rt.view()
    view[mine.offset : mine.offset + 5000] = b"\x77" * 5000
    assert rt.unpin(mine.handle) == 0
    for _ in range(20 if KASAN else 50):
        killed_at_random(lambda seed: churn_on(raw, rt, seed), dice, 0.05, 0.4)
        wait_for(lambda: rt.info().clients == 1)
        info = rt.info()
        assert (info.blocks, info.reserved, info.waiting) == (1, 0, 0)
        assert info.free == CHUNK - info.used
        # all of the rest is there, and mine is where it can be
        rest = rt.alloc(CHUNK // 3, LONG)
        result, at = rt.pin(mine.handle)
        assert result == 0
        assert view[at : at + 5000] == b"\x77" * 5000
        assert rt.unpin(mine.handle) == 0
        assert rt.free(rest.handle) == 0
    view.close()


def test_sigkill_of_whole_arenas() -> None:
    """With their makers; the pool has all of it again."""

    def work(seed: int) -> None:
        while True:
            with Raw() as raw, raw.rt(2 * CHUNK, movable=100) as rt:
                churn(raw, rt, seed)
            seed += 1

    dice = random.Random(22)
    for _ in range(10):
        killed_at_random(work, dice, 0.1, 0.6)
        assert settled(dict.fromkeys(USAGE, 0)) == dict.fromkeys(USAGE, 0)


# Tracepoints


def test_traced(raw: Raw, rt: RT, trace: None) -> None:
    """Each block, each free, each wait, each miss and each move."""
    contents, free = checkered(rt, 8192)
    rt.alloc(free // 2, LONG)
    assert rt.alloc_errno(CHUNK, 5 * MS) == errno.ETIMEDOUT
    info = rt.info()
    assert len(events("rt_alloc")) == info.allocs
    assert len(events("rt_free")) == info.allocs - info.blocks
    assert len(events("rt_move")) == info.moves
    assert len(events("rt_miss")) == info.misses == 1
    assert len(events("rt_wait")) == info.waits == 2
    assert read("rt/used") == CHUNK
    look_at(rt, contents)
