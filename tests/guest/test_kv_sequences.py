# SPDX-License-Identifier: MIT
"""Sequences grow, shrink and end: what is in them, what is past them, what it costs."""

from __future__ import annotations

import ctypes
import errno
import mmap
import random
import signal

import pytest

from device import (
    CHUNK,
    KV,
    PAGE,
    Raw,
    Seq,
    View,
    full,
    pattern,
    read,
    round_up,
    state,
    tokens,
    window,
    write,
)  # fmt: skip
from process import dies, libc, readable, writable
from tensormem import abi

TOKEN = PAGE // 8
#: 16 blocks of 8 tokens make a chunk.
FAT = full(CHUNK // PAGE // 16, TOKEN)
MIXED = [full(2, TOKEN), window(20, 3, 2 * TOKEN), state(2, PAGE + 5)]


def used_by(kv: KV, *lengths: int) -> int:
    """Bytes of the blocks of sequences that share nothing."""
    total = 0
    for length in filter(None, lengths):
        for i, group in enumerate(kv.groups):
            blocks = -(-length // kv.block_tokens)
            if group.rule == abi.KVRule.WINDOW:
                blocks -= max(0, length - group.window) // kv.block_tokens
            total += kv.block_bytes(i) * (1 if group.rule == abi.KVRule.STATE else blocks)
    return total


def seen(view: View, seq: Seq, token: int, group: int = 0, plane: int = 0) -> bool:
    return readable(memoryview(view.memory)[view.span(seq, token, plane, group)])


def test_contents_stay_while_it_grows(raw: Raw) -> None:
    with raw.kv(MIXED, block_tokens=8, max_tokens=300) as kv:
        view, dice, length = kv.view(), random.Random(1), 0
        seq = kv.open()
        values: dict[int, object] = {}
        while length < 300:
            more = min(dice.choice((1, 1, 2, 7, 8, 9, 40)), 300 - length)
            assert kv.extend(seq, more) == 0
            fresh = tokens("grow", length, length + more)
            length += more
            first = max(0, length - 20) // 8 * 8
            view.write(seq, fresh, 0)
            view.write(seq, {t: v for t, v in fresh.items() if t >= first}, 1)
            values |= fresh
            view.memory[view.span(seq, 0, 1, 2)] = pattern(length, 1, PAGE + 5)
            last = {t: v for t, v in values.items() if t >= length - 30}
            view.check(seq, last, 0)
            view.check(seq, {t: v for t, v in last.items() if t >= first}, 1)
            assert view.memory[view.span(seq, 0, 1, 2)] == pattern(length, 1, PAGE + 5)
            assert kv.info().used == used_by(kv, length)
            query = kv.query(seq)
            assert (query.length, query.held, query.shared) == (length, used_by(kv, length), 0)
        view.check(seq, values, 0)
        view.close()


def test_cutting_and_growing_again(raw: Raw) -> None:
    """What is kept is kept; blocks that were cut off come back as zeros."""
    with raw.kv([full(2, TOKEN), full(1, 2 * TOKEN)], block_tokens=8) as kv:
        view, dice = kv.view(), random.Random(2)
        seqs = [kv.open() for _ in range(4)]
        models: dict[Seq, dict[int, object]] = {seq: {} for seq in seqs}
        for step in range(150):
            seq = dice.choice(seqs)
            model = models[seq]
            length = len(model)
            if length and dice.random() < 0.45:
                keep = dice.randrange(length + 1)
                assert kv.truncate(seq, keep) == 0
                models[seq] = {t: v for t, v in model.items() if t < keep}
                for group in (0, 1):
                    end = round_up(keep, 8)
                    assert not seen(view, seq, end, group)
                    assert not end or seen(view, seq, end - 1, group)
                continue
            more = dice.choice((1, 5, 8, 20))
            assert kv.extend(seq, more) == 0
            fresh = dict.fromkeys(range(round_up(length, 8), length + more))
            for group in (0, 1):
                view.check(seq, fresh, group)
                view.write(seq, tokens(step, length, length + more), group)
            model |= tokens(step, length, length + more)
            for other, values in models.items():
                view.check(other, values, step % 2)
            assert kv.info().used == used_by(kv, *map(len, models.values()))
        view.close()


def test_dirty_memory_is_zero_for_the_next(raw: Raw) -> None:
    """Other sequences, after a close or a truncation, and other caches and clients."""
    with raw.kv([FAT], limit=CHUNK) as kv:
        view = kv.view()
        planes = kv.groups[0].planes

        def dirty(seq: Seq) -> None:
            for plane in range(planes):
                at = view.place(seq, 0, plane)
                assert view.memory[at : at + 16 * PAGE] == bytes(16 * PAGE)
                view.memory[at : at + 16 * PAGE] = b"\xee" * (16 * PAGE)

        for _ in range(3):
            seq = kv.open(tokens=16 * 8)
            dirty(seq)
            assert kv.end(seq) == 0
        seq = kv.open()
        for _ in range(3):
            assert kv.extend(seq, 16 * 8) == 0
            dirty(seq)
            assert kv.truncate(seq, 0) == 0
        assert kv.extend(seq, 16 * 8) == 0
        dirty(seq)
        view.close()
        with Raw() as other, other.kv([FAT]) as theirs:
            assert kv.truncate(seq, 0) == 0
            look = theirs.view()
            mine = [theirs.open(tokens=16 * 8) for _ in range(4)]
            for seq in mine:
                for plane in range(planes):
                    at = look.place(seq, 0, plane)
                    assert look.memory[at : at + 16 * PAGE] == bytes(16 * PAGE)
            look.close()


def test_touching_what_is_not_there(raw: Raw) -> None:
    with raw.kv(MIXED, block_tokens=8, max_tokens=100) as kv:
        view = kv.view()
        seq, closed, empty = kv.open(tokens=9), kv.open(tokens=9), kv.open()
        view.write(closed, tokens(0, 0, 9))
        assert kv.end(closed) == 0
        memory = view.memory
        for group, plane in ((0, 0), (0, 1), (1, 0), (1, 2)):
            for t, there in ((0, True), (8, True), (15, True), (16, False), (24, False)):
                assert seen(view, seq, t, group, plane) == there
            assert not seen(view, closed, 0, group, plane)
            assert not seen(view, empty, 0, group, plane)
        assert seen(view, seq, 0, 2, 1)
        assert not seen(view, empty, 0, 2, 1)
        assert dies(lambda: memory[view.place(seq, 15)]) == 0
        for at in (view.place(seq, 16), view.place(seq, 16, 2, 1), view.place(closed),
                   view.place(empty, 0, 0, 2), kv.info().window_size - 1):  # fmt: skip
            assert dies(lambda at=at: memory[at]) == signal.SIGBUS
            assert dies(lambda at=at: memory.__setitem__(at, 1)) == signal.SIGBUS
        # the end of a place that is no plane's
        group = kv.groups[2]
        end = group.offset + group.planes * group.stride
        assert end < kv.info().sequence_size
        assert dies(lambda: memory[seq.offset + end]) == signal.SIGBUS
        # no later sequence in the place shows what was there
        for _ in range(kv.info().max_sequences):
            again = kv.open(tokens=1)
            if again.offset == closed.offset:
                break
            assert kv.end(again) == 0
        assert again.offset == closed.offset
        view.check(again, dict.fromkeys(range(8)))
        assert not seen(view, again, 8)
        view.close()


@pytest.mark.parametrize("touched", [False, True])
def test_blocks_leave_the_window(raw: Raw, touched: bool) -> None:
    """Not before nothing of them is needed, and whether they were mapped or not."""
    with raw.kv([window(20, 2, TOKEN), full(1, TOKEN)], block_tokens=8) as kv:
        view, seq, values = kv.view(), kv.open(), {}
        for length in range(1, 120):
            assert kv.extend(seq, 1) == 0
            values |= tokens("w", length - 1, length)
            view.write(seq, {length - 1: values[length - 1]})
            first = max(0, length - 20) // 8 * 8
            if touched:
                view.check(seq, {t: v for t, v in values.items() if t >= first})
            if first:
                assert not seen(view, seq, first - 1)
                assert not seen(view, seq, 0, 0, 1)
            assert kv.info().used == used_by(kv, length)
        view.check(seq, {t: v for t, v in values.items() if t >= first})
        assert dies(lambda: view.memory[view.place(seq, 0)]) == signal.SIGBUS
        # far ahead: what lies between is never there
        assert kv.extend(seq, 200) == 0
        first = (319 - 20) // 8 * 8
        assert not seen(view, seq, first - 1)
        view.check(seq, dict.fromkeys(range(first, 319)))
        # back: only as far as the window's blocks reach
        assert kv.truncate(seq, first + 19) == errno.ENODATA
        assert kv.truncate(seq, first + 20) == 0
        assert kv.truncate(seq, 100) == errno.ENODATA
        assert kv.query(seq).length == first + 20
        view.check(seq, dict.fromkeys(range(first, first + 20)))
        assert kv.truncate(seq, 0) == 0
        assert kv.info().used == 0
        view.close()


def test_a_state_does_not_go_back(raw: Raw) -> None:
    with raw.kv(MIXED, block_tokens=8) as kv:
        view, seq = kv.view(), kv.open(tokens=10)
        view.memory[view.span(seq, 0, 0, 2)] = pattern("s", 0, PAGE + 5)
        for length in (1, 8, 9):
            assert kv.truncate(seq, length) == errno.ENODATA
        assert kv.truncate(seq, 10) == 0
        assert view.memory[view.span(seq, 0, 0, 2)] == pattern("s", 0, PAGE + 5)
        assert kv.truncate(seq, 0) == 0
        assert not seen(view, seq, 0, 2)
        assert kv.extend(seq, 1) == 0
        assert view.memory[view.span(seq, 0, 0, 2)] == bytes(PAGE + 5)
        view.close()


def test_wrong_lengths(raw: Raw) -> None:
    with raw.kv([full(2, TOKEN)], max_tokens=100, block_tokens=8) as kv:
        seq = kv.open(tokens=60)
        before = kv.counts()
        for more, why in ((0, errno.EINVAL), (41, errno.ERANGE), (1 << 31, errno.ERANGE),
                          ((1 << 32) - 1, errno.ERANGE)):  # fmt: skip
            assert kv.extend(seq, more) == why
        for length in (61, 100, 101, (1 << 32) - 1):
            assert kv.truncate(seq, length) == errno.EINVAL
            assert kv.try_fork(seq, length)[0] == errno.EINVAL
        assert kv.counts() == before
        assert kv.query(seq).length == 60
        assert kv.extend(seq, 40) == 0
        assert kv.extend(seq, 1) == errno.ERANGE
        assert kv.query(seq).length == 100


def test_names(raw: Raw) -> None:
    """Those never given, stale, closed twice, of another cache: ENOENT, whatever the call."""
    with raw.kv([full(2, TOKEN)], max_sequences=3) as kv, raw.kv([full(2, TOKEN)]) as other:
        live = kv.open(tokens=8)
        stale = kv.open(tokens=8)
        assert kv.end(stale) == 0
        theirs = [other.open(tokens=8) for _ in range(8)]
        names = {s.name for s in theirs} - {live.name}
        wrong = [stale, Seq(0, 0), Seq(1, 0), Seq((1 << 32) - 1, 0), Seq(live.name + (1 << 16), 0)]
        before = kv.counts(), other.counts()
        for seq in wrong + [Seq(name, 0) for name in names]:
            for result in (
                kv.end(seq), kv.extend(seq, 1), kv.extend(seq, 0), kv.truncate(seq, 0),
                kv.try_fork(seq, 0)[0], kv.publish(seq, [bytes(16)]), kv.lookup(seq, [bytes(16)])[0],
                kv.peek(seq, [bytes(16)])[0], kv.adopt(seq, 0, bytes(16))[0],
                kv.try_query(seq)[0], kv.pack(seq)[0], kv.pack(seq, abi.KV_UNPACK)[0],
            ):  # fmt: skip
                assert result == errno.ENOENT, seq
        assert (kv.counts(), other.counts()) == before
        given = {live.name, stale.name}
        for _ in range(500):
            seq = kv.open()
            assert seq.name not in given
            given.add(seq.name)
            assert kv.end(seq) == 0
            assert kv.end(seq) == errno.ENOENT
        assert kv.end(live) == 0
        assert kv.try_open()[0] == 0


def test_the_limit(raw: Raw) -> None:
    """ENOSPC, and every count as before; what is closed can be had by the others."""
    with raw.kv([FAT], limit=2 * CHUNK, block_tokens=8) as kv:
        assert kv.info().limit == 2 * CHUNK
        a, b = kv.open(tokens=20 * 8), kv.open(tokens=11 * 8)
        view = kv.view()
        view.write(a, tokens("a", 0, 8))
        view.write(b, tokens("b", 80, 88))
        before = kv.counts()
        assert before["used"] == 31 * kv.block_bytes()
        for seq, more in ((a, 9), (b, 16), (a, 500)):
            assert kv.extend(seq, more) == errno.ENOSPC
            assert kv.counts() == before
        assert kv.extend(kv.open(), 9) == errno.ENOSPC
        assert kv.extend(b, 8) == 0
        assert kv.extend(a, 1) == errno.ENOSPC
        assert kv.info().held == kv.info().used == 2 * CHUNK
        view.check(a, tokens("a", 0, 8))
        view.check(b, tokens("b", 80, 88))
        assert kv.truncate(b, 80) == 0
        assert kv.extend(a, 16) == 0
        view.check(a, dict.fromkeys(range(160, 176)))
        assert kv.extend(a, 1) == errno.ENOSPC
        view.close()


def test_the_quota_and_the_capacity(raw: Raw, settings: None) -> None:
    with raw.kv([FAT], block_tokens=8) as kv:
        a = kv.open(tokens=8)
        tensor = raw.alloc(CHUNK, abi.Kind.WEIGHTS)
        assert raw.info().used == 2 * CHUNK
        assert raw.set_quota(3 * CHUNK) == 0
        assert kv.extend(a, 31 * 8) == 0
        assert raw.info().used == 3 * CHUNK
        assert kv.extend(a, 1) == errno.EDQUOT
        assert kv.extend(kv.open(), 100) == errno.EDQUOT
        assert kv.info().used == kv.info().held == 2 * CHUNK
        assert raw.set_quota(2 * CHUNK) == errno.EBUSY
        assert raw.free(tensor.handle) == 0
        assert kv.extend(a, 1) == 0
        assert raw.set_quota(64 * CHUNK) == 0
        # several chunks wanted and not all to be had: none is kept
        held = kv.info().held
        assert raw.set_quota(held + 2 * CHUNK) == 0
        assert kv.extend(a, 60 * 8) == errno.EDQUOT
        assert kv.info().held == raw.info().used == held
        assert raw.set_quota(64 * CHUNK) == 0
        assert write("chunk/reserve", 0) == 0
        assert write("chunk/capacity", read("chunk/used") + 1) == 0
        assert kv.extend(a, 60 * 8) == errno.ENOSPC
        assert kv.info().held == raw.info().used == held
        assert kv.query(a).length == 32 * 8 + 1
        assert kv.extend(a, 32 * 8 - 1) == 0
        assert kv.extend(a, 1) == errno.ENOSPC


def test_memory_comes_and_goes(raw: Raw) -> None:
    """By whole chunks, on the client's bill."""
    with raw.kv([FAT], max_sequences=20, max_tokens=160, block_tokens=8) as kv:
        assert raw.info().used == kv.info().held == read("kv/held") == 0
        seqs = [kv.open(tokens=40) for _ in range(20)]
        info = kv.info()
        assert info.used == 100 * kv.block_bytes()
        assert info.held == raw.info().used == read("kv/held") == round_up(info.used, CHUNK)
        random.Random(3).shuffle(seqs)
        for left in range(19, -1, -1):
            assert kv.end(seqs[left]) == 0
            info = kv.info()
            assert info.used == left * 5 * kv.block_bytes()
            assert info.held == raw.info().used
        assert raw.info().used == kv.info().held == read("chunk/used") == 0


def test_extend_batch(raw: Raw) -> None:
    with raw.kv(MIXED, block_tokens=8, max_tokens=100, limit=4 * CHUNK) as kv:
        view = kv.view()
        seqs = [kv.open(tokens=n) for n in (0, 1, 7, 8, 30)]
        result, batch, items = kv.extend_batch([(seq, 10) for seq in seqs])
        assert (result, batch.failed) == (0, 5)
        assert [item.length for item in items] == [10, 11, 17, 18, 40]
        for seq, item in zip(seqs, items, strict=True):
            assert kv.query(seq).length == item.length
            view.write(seq, tokens(seq.name, 0, item.length))
        gone = kv.open()
        assert kv.end(gone) == 0
        before = kv.counts()
        for bad, why in (
            ((gone, 1), errno.ENOENT),
            ((seqs[0], 1), errno.EINVAL),
            ((kv.open(), 0), errno.EINVAL),
            ((seqs[4], 61), errno.ERANGE),
        ):
            before["sequences"] = kv.info().sequences
            for place in (1, 3):
                wanted = [(seq, 20) for seq in seqs[:4]]
                wanted.insert(place, bad)
                result, batch, _ = kv.extend_batch(wanted)
                assert (result, batch.failed) == (why, place)
                assert kv.counts() == before
        assert [kv.query(seq).length for seq in seqs] == [10, 11, 17, 18, 40]
        for seq, length in zip(seqs, (10, 11, 17, 18, 40), strict=True):
            view.check(seq, tokens(seq.name, 0, length))
        view.close()


def test_a_batch_for_which_there_is_no_room(raw: Raw) -> None:
    with raw.kv([FAT], limit=CHUNK, block_tokens=8) as kv:
        seqs = [kv.open(tokens=n) for n in (8, 4, 8, 8)]
        before = kv.counts()
        result, batch, _ = kv.extend_batch([(seqs[0], 40), (seqs[1], 4), (seqs[2], 64), (seqs[3], 1)])
        assert (result, batch.failed) == (errno.ENOSPC, 2)
        assert kv.counts() == before
        result, batch, _ = kv.extend_batch([(seqs[0], 40), (seqs[1], 4), (seqs[2], 48), (seqs[3], 1)])
        assert (result, batch.failed) == (0, 4)
        assert kv.info().used == CHUNK


def test_a_batch_that_cannot_be_read_or_written(raw: Raw) -> None:
    with raw.kv([FAT], block_tokens=8) as kv:
        seqs = [kv.open(tokens=8) for _ in range(4)]
        memory = mmap.mmap(-1, 2 * PAGE)
        at = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for i, seq in enumerate(seqs):
            start = PAGE - 32 + 16 * i
            memory[start : start + 16] = bytes(abi.KVExtend(sequence=seq.name, tokens=9))
        before = kv.counts()
        for prot in (0, mmap.PROT_READ):
            assert libc.mprotect(at + PAGE, PAGE, prot) == 0
            batch = abi.Batch(items=at + PAGE - 32, count=4, item_size=16)
            assert kv.ioctl(abi.IOC_KV_EXTEND_BATCH, batch) == errno.EFAULT
            assert batch.failed == 2
            assert kv.counts() == before
        assert [kv.query(seq).length for seq in seqs] == [8] * 4


def test_items_of_another_age(raw: Raw) -> None:
    with raw.kv([full(2, TOKEN)], block_tokens=8) as kv:
        for size in (12, 16, 24, 64):
            seqs = [kv.open() for _ in range(3)]
            memory = bytearray(size * 3)
            for i, seq in enumerate(seqs):
                item = bytes(abi.KVExtend(sequence=seq.name, tokens=i + 1))[:size]
                memory[i * size : i * size + len(item)] = item
            array = (ctypes.c_ubyte * len(memory)).from_buffer(memory)
            batch = abi.Batch(items=ctypes.addressof(array), count=3, item_size=size)
            result = kv.ioctl(abi.IOC_KV_EXTEND_BATCH, batch)
            assert (result, batch.failed) == ((errno.EINVAL, 0) if size < 16 else (0, 3))
            assert [kv.query(seq).length for seq in seqs] == ([0] * 3 if result else [1, 2, 3])
            if size > 16:
                array[2 * size - 1] = 1
                assert kv.ioctl(abi.IOC_KV_EXTEND_BATCH, batch) == errno.EINVAL
                assert batch.failed == 1
                assert [kv.query(seq).length for seq in seqs] == [1, 2, 3]
            for seq in seqs:
                assert kv.end(seq) == 0


def test_the_kernel_reads_and_writes_it_too(raw: Raw) -> None:
    with raw.kv([full(2, TOKEN)], block_tokens=8) as kv:
        view, seq = kv.view(), kv.open(tokens=8)
        memory = memoryview(view.memory)
        assert writable(memory[view.span(seq, 0, 1, 0, 8)])
        assert not writable(memory[view.span(seq, 8)])
        # half of it is there
        assert not writable(memory[view.span(seq, 8, 0, 0, 8)])
        memory.release()
        view.close()
