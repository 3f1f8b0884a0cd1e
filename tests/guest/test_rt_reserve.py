# SPDX-License-Identifier: MIT
"""Reservations: what is promised is kept whatever anybody does, and the books are exact."""

from __future__ import annotations

import errno
import mmap
import os
import random
import signal
from collections.abc import Iterator

import pytest

from device import CHUNK, PAGE, RT, Raw, round_up, wait_for
from process import status_of
from tensormem import abi

RESERVED, MOVABLE = abi.RTFlag.RESERVED, abi.RTFlag.MOVABLE


@pytest.fixture
def rt(raw: Raw) -> Iterator[RT]:
    with raw.rt(CHUNK, movable=256) as arena:
        yield arena


def laid_aside(rt: RT, size: int, count: int) -> tuple[int, int]:
    """Bytes that a class takes, at least and at most: its items and what keeps its run apart."""
    unit = rt.info().granule
    least = round_up(size, unit) * count + 2 * unit
    return least, least + unit


# Admission


@pytest.mark.parametrize(("size", "count"), [(1, 1), (128, 99), (129, 7), (3 * PAGE + 1, 5), (CHUNK // 2, 1), (5, 999)])
def test_what_it_takes(rt: RT, size: int, count: int) -> None:
    before = rt.info()
    assert rt.reserve(size, count) == 0
    info = rt.info()
    least, most = laid_aside(rt, size, count)
    assert least <= info.reserved <= most
    assert info.free == before.free - info.reserved
    assert (info.used, info.blocks) == (0, 0)
    assert info.largest <= info.free
    assert rt.reserve(size, 0) == 0
    assert rt.counts() == {name: getattr(before, name) for name, *_ in before._fields_}


def test_impossible_reservations(rt: RT) -> None:
    before = rt.counts()
    for size in (0, CHUNK + 1, 1 << 40, 1 << 63, (1 << 64) - 1):
        for count in (0, 1, (1 << 32) - 1):
            assert rt.reserve(size, count) == errno.EINVAL
    unit = rt.info().granule
    granules = CHUNK // unit
    for size, count in ((CHUNK, 1), (CHUNK - unit, 1), (unit, granules - 1), (1, (1 << 32) - 1), (CHUNK, (1 << 32) - 1),
                        (unit, 1 << 31), (2 * unit, 1 << 31), (CHUNK // 2, 2), (unit, 1 << 25)):  # fmt: skip
        assert rt.reserve(size, count) == errno.ENOSPC, (size, count)
    assert rt.counts() == before
    # as much as there can be
    assert rt.reserve(CHUNK - 2 * unit, 1) == 0
    assert rt.info().free == 0
    assert rt.reserve(CHUNK - 2 * unit, 0) == 0
    assert rt.reserve(unit, granules - 2) == 0
    assert len(rt.fill(1, RESERVED)) == granules - 2


def test_sixteen_sizes(rt: RT) -> None:
    sizes = [200 * (i + 1) for i in range(abi.RT_MAX_CLASSES)]
    for size in sizes:
        assert rt.reserve(size, 2) == 0
    before = rt.counts()
    assert rt.reserve(5000, 1) == errno.ENOSPC
    assert rt.counts() == before
    for size in sizes:
        assert [rt.alloc_errno(size, flags=RESERVED) for _ in range(3)] == [0, 0, errno.ENOSPC]
    for block in range(2):
        assert rt.reserve(sizes[block], 0) == errno.EBUSY
    # another client has sixteen of its own
    with Raw() as client, client.join(rt) as other:
        for size in sizes:
            assert other.reserve(size, 1) == 0


def test_give_up(rt: RT) -> None:
    """Not what is in use, nor what there is not; then its room is everybody's."""
    unit = rt.info().granule
    assert rt.reserve(100, 0) == errno.ENOENT
    assert rt.reserve(3 * unit, 4) == 0
    for size in (3 * unit, 3 * unit - 1, 2 * unit + 1):
        assert rt.reserve(size, 2) == errno.EEXIST
    for size in (2 * unit, 3 * unit + 1):
        assert rt.reserve(size, 0) == errno.ENOENT
    items = [rt.alloc(3 * unit, flags=RESERVED) for _ in range(4)]
    for item in items:
        assert rt.reserve(3 * unit, 0) == errno.EBUSY
        assert rt.free(item.handle) == 0
    # by another size that is the same in granules
    assert rt.reserve(2 * unit + 1, 0) == 0
    assert (rt.info().reserved, rt.info().largest) == (0, CHUNK)
    for item in items:
        assert rt.free(item.handle) == errno.ENOENT


def test_only_in_one_piece(rt: RT) -> None:
    """Room that lies scattered is no room."""
    blocks = rt.fill(CHUNK // 64)
    for block in blocks[::2]:
        assert rt.free(block.handle) == 0
    before = rt.counts()
    assert before["free"] == CHUNK // 2
    assert rt.reserve(CHUNK // 64, 2) == errno.ENOSPC
    assert rt.reserve(PAGE, CHUNK // 64 // PAGE) == errno.ENOSPC
    assert rt.counts() == before
    assert rt.reserve(PAGE, CHUNK // 64 // PAGE - 1) == 0


# Which class


def test_the_smallest_that_serves(rt: RT) -> None:
    """Only that one: the blocks of larger classes are promised to larger requests."""
    unit = rt.info().granule
    for size, count in ((10 * unit, 2), (unit, 2), (40 * unit, 2)):
        assert rt.reserve(size, count) == 0
    for asked, item in ((1, unit), (unit + 1, 10 * unit), (10 * unit, 10 * unit), (11 * unit, 40 * unit)):
        free, used = rt.info().free, rt.info().used
        blocks = [rt.alloc(asked, flags=RESERVED) for _ in range(2)]
        assert rt.info().free == free
        assert rt.info().used == used + 2 * item
        assert rt.alloc_errno(asked, flags=RESERVED) == errno.ENOSPC
        # outside of it: from the heap, with nothing of the larger classes
        block = rt.alloc(asked)
        taken = free - rt.info().free
        assert taken == max(2 * unit, round_up(asked, unit))
        assert rt.info().used == used + 2 * item + taken
        assert rt.free_batch([b.handle for b in (block, *blocks)])[0] == 0
        assert (rt.info().free, rt.info().used) == (free, used)
    assert rt.alloc_errno(40 * unit + 1, flags=RESERVED) == errno.ENOSPC
    assert rt.alloc_errno(40 * unit + 1) == 0


def test_items_are_apart(rt: RT) -> None:
    """Each its own granules, at the same few places for ever."""
    unit = rt.info().granule
    assert rt.reserve(unit, 50) == 0
    assert rt.reserve(700, 20) == 0
    places: set[int] = set()
    dice = random.Random(3)
    for _ in range(10):
        blocks = rt.fill(unit, RESERVED) + rt.fill(700, RESERVED)
        assert len(blocks) == 70
        taken = [at // unit for b in blocks for at in range(b.offset, b.offset + b.size, unit)]
        assert len(set(taken)) == len(taken) == 50 + 20 * round_up(700, unit) // unit
        assert len({b.handle for b in blocks}) == 70
        places |= {b.offset for b in blocks}
        dice.shuffle(blocks)
        for block in blocks:
            assert rt.free(block.handle) == 0
    assert len(places) == 70


def test_movable_blocks_leave_it_alone(rt: RT) -> None:
    assert rt.reserve(256, 2) == 0
    free = rt.info().free
    block = rt.alloc(256, flags=MOVABLE)
    assert free - rt.info().free == 256
    assert len(rt.fill(256, RESERVED)) == 2
    assert rt.free(block.handle) == 0


# The promise


def scribble(view: mmap.mmap, block: abi.RTAlloc, tag: int) -> None:
    view[block.offset : block.offset + block.size] = bytes([tag]) * block.size


def intact(view: mmap.mmap, block: abi.RTAlloc, tag: int) -> bool:
    return view[block.offset : block.offset + block.size] == bytes([tag]) * block.size


def adversary(raw: Raw, rt: RT, tag: int) -> None:
    """Take all there is in blocks of any size, leave holes of the wrong size, and never stop."""
    dice = random.Random(tag)
    with raw.join(rt, priority=99) as mine:
        view = mine.view()
        while True:
            size = dice.choice((1, 100, 300, 1000, 5000, PAGE, 40_000))
            blocks: list[abi.RTAlloc] = []
            while len(blocks) < 200:
                result, block = mine.try_alloc(dice.randint(1, size), flags=MOVABLE * dice.randrange(2))
                if result:
                    break
                scribble(view, block, tag)
                blocks.append(block)
                if block.flags:
                    assert mine.unpin(block.handle) == 0
            dice.shuffle(blocks)
            for block in blocks:
                result, block.offset = mine.pin(block.handle)
                assert result == 0
                assert intact(view, block, tag)
                assert mine.free(block.handle) == 0
                if dice.randrange(20) == 0:
                    result, large = mine.try_alloc(CHUNK // 4, dice.choice((1000, 100_000, 3_000_000)))
                    assert result or mine.free(large.handle) == 0
            if mine.reserve(size, dice.randrange(1, 5)) == 0 and dice.randrange(2):
                mine.reserve(size, 0)
            for left in range(1, 6):
                mine.reserve(left * 100, 0)


CLASSES = {100: 16, 1500: 8, 20_000: 4, CHUNK // 8: 1}


@pytest.mark.parametrize("full", [False, True])
def test_the_promise(raw: Raw, full: bool) -> None:
    """While three processes take all the rest to pieces, what is reserved is there each time, and nobody else's."""
    with raw.rt(CHUNK, movable=300) as rt:
        for size, count in CLASSES.items():
            assert rt.reserve(size, count) == 0
        reserved = rt.info().reserved
        view, dice = rt.view(), random.Random(7)
        if full:
            rt.fill_up()
        children = []
        for tag in (1, 2, 3):
            pid = os.fork()
            if pid == 0:
                try:
                    adversary(raw, rt, tag)
                finally:
                    os._exit(98)
            children.append(pid)
        held: dict[int, list[abi.RTAlloc]] = {size: [] for size in CLASSES}
        most = dict.fromkeys(CLASSES, 0)
        for step in range(3000):
            size = dice.choice(list(CLASSES))
            blocks = held[size]
            if len(blocks) < CLASSES[size] and dice.random() < 0.7:
                smaller = max((s for s in CLASSES if s < size), default=0)
                result, block = rt.try_alloc(dice.randint(smaller // 128 * 128 + 129, size) if smaller else size,
                                             flags=RESERVED * dice.randrange(2))  # fmt: skip
                assert result == 0, (step, size, len(blocks), errno.errorcode[result])
                scribble(view, block, 0x80 + step % 100)
                block.flags = 0x80 + step % 100
                blocks.append(block)
                most[size] = max(most[size], len(blocks))
            elif blocks:
                block = blocks.pop(dice.randrange(len(blocks)))
                assert intact(view, block, block.flags)
                assert rt.free(block.handle) == 0
        assert most == CLASSES
        assert rt.info().reserved == reserved
        for blocks in held.values():
            for block in blocks:
                assert intact(view, block, block.flags)
        for pid in children:
            os.kill(pid, signal.SIGKILL)
        for pid in children:
            # none has ended before, for a block of its own that was not its own
            assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
        assert (rt.info().misses, rt.info().refused) == (0, 0)
        view.close()


def test_its_own_client_cannot_break_it(rt: RT) -> None:
    """What a client takes outside of its reservation costs it nothing of it."""
    assert rt.reserve(1000, 8) == 0
    items = [rt.alloc(1000, flags=RESERVED) for _ in range(3)]
    outside = rt.fill(5000) + rt.fill(1024)
    # five of those of 1024 were reserved ones
    assert (rt.info().free < 1024 or rt.info().largest < 1024)
    inside = [b for b in outside if b.size == 1024][:5]
    assert rt.alloc_errno(1000, flags=RESERVED) == errno.ENOSPC
    for block in inside:
        assert rt.free(block.handle) == 0
        assert rt.alloc_errno(1000, flags=RESERVED) == 0
    for item in items:
        assert rt.free(item.handle) == 0
        assert rt.alloc_errno(1000, flags=RESERVED) == 0


def test_waiters_do_not_touch_it(raw: Raw, rt: RT) -> None:
    """Nor does whoever waits, at whatever priority, come before it."""
    assert rt.reserve(1000, 4) == 0
    rt.fill_up()
    pid = os.fork()
    if pid == 0:
        with raw.join(rt, priority=99) as mine:
            os._exit(mine.alloc_errno(500, 600 * 10**9) != 0)
    with raw.join(rt) as other:
        wait_for(lambda: rt.info().clients == 3)
        for _ in range(200):
            blocks = [rt.alloc(1000, flags=RESERVED) for _ in range(4)]
            assert rt.free_batch([b.handle for b in blocks])[0] == 0
        assert os.waitpid(pid, os.WNOHANG)[0] == 0
        assert other.alloc_errno(1) == errno.ENOSPC
        # the room that is given up is its room
        assert rt.reserve(1000, 0) == 0
        assert os.waitpid(pid, 0)[1] == 0


# Clients come and go


@pytest.mark.parametrize("how", ["exit", "kill"])
def test_it_ends_with_its_client(raw: Raw, rt: RT, how: str) -> None:
    before = rt.counts()

    def child() -> None:
        mine = raw.join(rt)
        for i in range(16):
            assert mine.reserve(300 * (i + 1), 3) == 0
            assert all(mine.alloc_errno(300 * (i + 1), flags=RESERVED) == 0 for _ in range(i % 4))
        mine.fill(3000)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)

    for _ in range(5):
        assert status_of(child) == (signal.SIGKILL if how == "kill" else 0)
        wait_for(lambda: rt.info().clients == 1)
        assert rt.counts() == before


def test_races_of_admission(raw: Raw, rt: RT) -> None:
    """Four processes reserve until there is no room: the sum is what was laid aside, and not a byte more."""
    results = mmap.mmap(-1, PAGE)
    for turn in range(6):
        children = []
        begin, end, done = os.pipe(), os.pipe(), os.pipe()
        for number in range(4):
            pid = os.fork()
            if pid == 0:
                dice = random.Random(turn * 4 + number)
                mine = raw.join(rt)
                os.read(begin[0], 1)
                for i in range(16):
                    size = 1000 * (i + 1) + dice.randrange(900)
                    result = mine.reserve(size, dice.randint(1, 12))
                    if result not in (0, errno.ENOSPC):
                        os._exit(1)
                results[8 * number : 8 * number + 8] = mine.info().reserved.to_bytes(8, "little")
                os.write(done[1], b"x")
                os.read(end[0], 1)
                os._exit(0)
            children.append(pid)
        os.write(begin[1], bytes(4))
        for _ in children:
            os.read(done[0], 1)
        laid = [int.from_bytes(results[8 * i : 8 * i + 8], "little") for i in range(4)]
        assert sum(laid) + rt.info().free == CHUNK
        assert sum(laid) > CHUNK * 3 // 4
        os.write(end[1], bytes(4))
        for pid in children:
            assert os.waitpid(pid, 0)[1] == 0
        for fd in (*begin, *end, *done):
            os.close(fd)
        wait_for(lambda: rt.info().clients == 1)
        assert rt.info().largest == CHUNK
    results.close()
