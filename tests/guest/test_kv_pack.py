# SPDX-License-Identifier: MIT
"""Packing: not a bit is lost, memory comes back, a touch brings the contents back or fails."""

from __future__ import annotations

import errno
import random
import signal
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from device import (
    CHUNK,
    KV,
    PAGE,
    Raw,
    Seq,
    View,
    chain,
    full,
    pattern,
    round_up,
    state,
    tokens,
    wait_for,
    window,
)
from process import dies, readable, writable
from tensormem import abi

#: 16 blocks of 8 tokens make a chunk.
FAT = full(2, CHUNK // 256, element=2)


def halves(size: int, seed: int) -> bytes:
    """As keys and values are: normal, each channel with a scale and an offset of its own."""
    dice = np.random.default_rng(seed)
    rows = dice.normal(0, 1, (size // 128, 64)) * dice.uniform(0.1, 2, 64) + dice.normal(0, 1, 64)
    return rows.astype(np.float16).tobytes()


def sparse(size: int, seed: int) -> bytes:
    """Other numbers everywhere, but few: packs into a page or two."""
    words = np.zeros(size // 8, np.uint64)
    words[::512] = np.arange(len(words[::512])) + (seed << 20) + 1
    return words.tobytes()


DATA: dict[str, Callable[[int, int], bytes]] = {
    "zeros": lambda size, seed: bytes(size),
    "one": lambda size, seed: bytes(size - 1) + b"\1",
    "halves": halves,
    "sparse": sparse,
    "floats": lambda size, seed: np.random.default_rng(seed).normal(0, 1, size // 4).astype(np.float32).tobytes(),
    "counter": lambda size, seed: np.arange(seed, seed + size // 8, dtype=np.uint64).tobytes(),
    "ones": lambda size, seed: b"\xff" * size,
    "random": lambda size, seed: random.Random(seed).randbytes(size),
    "half random": lambda size, seed: random.Random(seed).randbytes(size // 2) + bytes(size - size // 2),
}


#: Of numbers taken for others, and with large pages, few or no blocks get smaller by a page.
SURE = ("zeros", "ones", "one", "sparse", "counter")


def contents(kv: KV, kind: str, blocks: int, group: int = 0, seed: int = 0) -> list[bytes]:
    """A plane's array, for each plane."""
    g = kv.groups[group]
    size = g.token_bytes * kv.block_tokens * blocks
    return [DATA[kind](size, seed + plane) for plane in range(g.planes)]


def put(view: View, seq: Seq, data: list[bytes], group: int = 0) -> None:
    for plane, array in enumerate(data):
        at = view.place(seq, 0, plane, group)
        view.memory[at : at + len(array)] = array


def holds(view: View, seq: Seq, data: list[bytes], group: int = 0) -> bool:
    at = [view.place(seq, 0, plane, group) for plane in range(len(data))]
    return all(view.memory[a : a + len(d)] == d for a, d in zip(at, data, strict=True))


def packed(kv: KV, seq: Seq) -> abi.KVPack:
    result, pack = kv.pack(seq)
    assert result == 0
    return pack


def test_packing_waits_for_sequences_to_be_idle(raw: Raw) -> None:
    """It is nearly full at once and then nobody calls. First here: no codec is loaded yet."""
    with raw.kv([FAT], block_tokens=8, limit=2 * CHUNK, max_sequences=32) as kv:
        seqs = [kv.open() for _ in range(15)]
        assert kv.extend_batch([(seq, 16) for seq in seqs])[0] == 0
        assert kv.info().used == 30 * kv.block_bytes()
        wait_for(lambda: kv.info().used <= 2 * CHUNK * 3 // 4)


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("element", [1, 2, 4, 8])
def test_not_a_bit_is_lost(raw: Raw, kind: str, element: int) -> None:
    with raw.kv([full(2, CHUNK // 256, element=element)], block_tokens=8) as kv:
        view, seq = kv.view(), kv.open(tokens=5 * 8)
        data = contents(kv, kind, 5, seed=element)
        put(view, seq, data)
        block = kv.block_bytes()
        assert kv.info().used == 5 * block
        pack = packed(kv, seq)
        assert pack.before == pack.blocks * block
        info, query = kv.info(), kv.query(seq)
        assert info.used == 5 * block - pack.before + pack.after
        assert (info.packed, info.unpacked) == (pack.after, pack.before)
        assert (query.packed, query.unpacked) == (pack.after, pack.before)
        assert query.held == info.used
        if kind == "random":
            assert pack.blocks == 0
        elif kind in SURE or (kind, element) in (("halves", 2), ("floats", 4)):
            assert pack.blocks == 5
        assert pack.after % PAGE == 0
        assert pack.after < pack.before or not pack.blocks
        if kind in ("zeros", "ones"):
            assert pack.after == 5 * PAGE
        if kind == "halves" and element == 2:
            assert pack.after < 0.95 * pack.before
        assert packed(kv, seq).blocks == 0
        assert holds(view, seq, data)
        info = kv.info()
        assert (info.used, info.packed, info.unpacked) == (5 * block, 0, 0)
        assert (info.packs, info.unpacks) == (pack.blocks, pack.blocks)
        # and by the call, which says how much it was
        again = packed(kv, seq)
        result, back = kv.pack(seq, abi.KV_UNPACK)
        assert (result, back.blocks) == (0, again.blocks)
        assert (back.before, back.after) == (again.after, again.before)
        assert kv.pack(seq, abi.KV_UNPACK)[1].blocks == 0
        assert holds(view, seq, data)
        view.close()


@pytest.mark.parametrize("touch", ["read", "write", "the kernel reads", "the kernel writes"])
def test_a_touch_brings_back_its_block(raw: Raw, touch: str) -> None:
    with raw.kv([FAT], block_tokens=8) as kv:
        view, seq = kv.view(), kv.open(tokens=6 * 8)
        data = contents(kv, "halves", 6)
        put(view, seq, data)
        assert packed(kv, seq).blocks == 6
        token = kv.groups[0].token_bytes
        for block in (3, 0, 5):
            at, index = view.place(seq, block * 8 + 2, 1) + 5, (block * 8 + 2) * token + 5
            before = kv.info().unpacks
            if touch == "read":
                assert view.memory[at] == data[1][index]
            elif touch == "write":
                view.memory[at] = 99
                data[1] = data[1][:index] + b"c" + data[1][index + 1 :]
            else:
                memory = memoryview(view.memory)[at : at + 3]
                assert (readable if touch == "the kernel reads" else writable)(memory)
                if touch == "the kernel writes":
                    data[1] = data[1][:index] + bytes(3) + data[1][index + 3 :]
                memory.release()
            assert kv.info().unpacks == before + 1
        assert kv.query(seq).unpacked == 3 * kv.block_bytes()
        assert holds(view, seq, data)
        assert kv.query(seq).unpacked == 0
        view.close()


def test_memory_comes_back(raw: Raw) -> None:
    """To the client, not only on paper: whole chunks."""
    with raw.kv([FAT], block_tokens=8, max_sequences=16) as kv:
        view = kv.view()
        seqs = [kv.open(tokens=8 * 8) for _ in range(16)]  # 8 chunks
        data = [contents(kv, "zeros" if i % 4 else "halves", 8, seed=i) for i in range(16)]
        for seq, arrays in zip(seqs, data, strict=True):
            put(view, seq, arrays)
        assert kv.info().held == raw.info().used == 8 * CHUNK
        for seq in seqs:
            assert packed(kv, seq).blocks == 8
        used = kv.info().used
        assert used < 3 * CHUNK
        # what is left in each chunk is moved together
        wait_for(lambda: kv.info().held <= round_up(used, CHUNK) + 2 * CHUNK)
        assert kv.info().moved > 0
        assert raw.info().used == kv.info().held
        with Raw() as other:
            assert other.alloc(4 * CHUNK, abi.Kind.WEIGHTS).handle
        for seq, arrays in zip(seqs, data, strict=True):
            assert holds(view, seq, arrays)
        assert kv.info().used == 8 * CHUNK
        view.close()


def test_pages_are_moved_under_the_readers(raw: Raw) -> None:
    """Chunks fall empty while sequences are read and written."""
    with raw.kv([full(2, CHUNK // 256)], block_tokens=8, max_sequences=64) as kv:
        view, stop, failures = kv.view(), threading.Event(), []
        seqs = [kv.open(tokens=2 * 8) for _ in range(64)]  # 8 chunks
        data = [[d[:-1] for d in contents(kv, "random", 2, seed=i)] for i in range(64)]
        for seq, arrays in zip(seqs, data, strict=True):
            put(view, seq, arrays)
        keep = range(0, 64, 5)

        turns = [0]

        def work() -> None:
            try:
                while not stop.is_set():
                    turns[0] += 1
                    for i in keep:
                        assert holds(view, seqs[i], data[i])
                        # in the gap after the data: what is written last counts
                        view.memory[view.place(seqs[i], 15, 1) + CHUNK // 256 - 1] = turns[0] % 256
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        for i, seq in enumerate(seqs):
            assert i in keep or kv.end(seq) == 0
        used = kv.info().used
        assert used == 26 * kv.block_bytes()
        wait_for(lambda: kv.info().held <= round_up(used, CHUNK) + CHUNK)
        stop.set()
        thread.join()
        assert not failures, failures[0]
        assert kv.info().moved > 0
        # as somebody sees it who has mapped nothing before: where the pages are now
        fresh = kv.view()
        for i in keep:
            assert holds(fresh, seqs[i], data[i])
            last = fresh.memory[fresh.place(seqs[i], 15, 1) + CHUNK // 256 - 1]
            assert last == turns[0] % 256
        fresh.close()
        view.close()


def test_what_is_not_packed(raw: Raw) -> None:
    """What others hold too, and the block that the next token goes to."""
    with raw.kv([FAT, state(3, 2 * PAGE + 7), window(16, 1, CHUNK // 128)], block_tokens=8) as kv:
        view, seq = kv.view(), kv.open(tokens=44)
        data = contents(kv, "halves", 6)
        put(view, seq, data)
        blob = [pattern("state", plane, 2 * PAGE + 7) for plane in range(3)]
        for plane in range(3):
            view.memory[view.span(seq, 0, plane, 1)] = blob[plane]
        child = kv.fork(seq, 44)
        # all but the state is shared or not full
        pack = packed(kv, seq)
        assert (pack.blocks, pack.before) == (1, kv.block_bytes(1))
        assert packed(kv, child).blocks == 1
        assert kv.end(child) == 0
        # 5 full blocks, and of the window 3 and 4
        pack = packed(kv, seq)
        assert (pack.blocks, pack.before) == (7, 5 * kv.block_bytes(0) + 2 * kv.block_bytes(2))
        assert holds(view, seq, data)
        for plane in range(3):
            assert view.memory[view.span(seq, 0, plane, 1)] == blob[plane]
            view.memory[view.span(seq, 0, plane, 1)] = bytes(2 * PAGE + 7)
        assert packed(kv, seq).blocks == 6
        assert kv.truncate(seq, 0) == 0
        info = kv.info()
        assert (info.used, info.packed, info.unpacked) == (0, 0, 0)
        view.close()


def test_children_of_packed_blocks(raw: Raw) -> None:
    """They share them packed; the one that ends within a block has a copy of its own."""
    with raw.kv([FAT], block_tokens=8) as kv:
        view, seq = kv.view(), kv.open(tokens=5 * 8)
        data = contents(kv, "halves", 5)
        put(view, seq, data)
        pack = packed(kv, seq)
        used = kv.info().used
        child, part = kv.fork(seq, 40), kv.fork(seq, 28)
        assert kv.info().used == used + kv.block_bytes()
        assert kv.query(child).packed == pack.after
        assert kv.query(child).shared == kv.query(child).held == pack.after
        assert packed(kv, child).blocks == 0
        token = kv.groups[0].token_bytes
        assert holds(view, part, [d[: 28 * token] for d in data])
        assert kv.info().unpacks == 3
        # one touch brings it back for all
        assert holds(view, seq, [d[: 24 * token] for d in data])
        assert kv.info().unpacks == 3
        view.memory[view.span(child, 0, 0, 0, 8)] = b"\x11" * (8 * token)
        view.memory[view.span(child, 32, 1, 0, 8)] = b"\x22" * (8 * token)
        assert holds(view, seq, data)
        assert view.memory[view.span(child, 0, 0, 0, 8)] == b"\x11" * (8 * token)
        assert view.memory[view.span(child, 24, 1, 0, 8)] == data[1][24 * token : 32 * token]
        assert view.memory[view.span(child, 32, 1, 0, 8)] == b"\x22" * (8 * token)
        assert view.memory[view.span(child, 32, 0, 0, 8)] == data[0][32 * token :]
        view.close()


def test_cut_inside_a_packed_block_and_grown(raw: Raw) -> None:
    with raw.kv([FAT], block_tokens=8) as kv:
        view, seq = kv.view(), kv.open(tokens=5 * 8)
        data = contents(kv, "halves", 5)
        put(view, seq, data)
        assert packed(kv, seq).blocks == 5
        assert kv.truncate(seq, 20) == 0
        assert kv.query(seq).unpacked == 3 * kv.block_bytes()
        assert kv.extend(seq, 15) == 0
        view.write(seq, tokens("new", 20, 35))
        token = kv.groups[0].token_bytes
        assert holds(view, seq, [d[: 20 * token] for d in data])
        view.check(seq, tokens("new", 20, 35) | dict.fromkeys(range(35, 40)))
        view.close()


def test_packed_blocks_in_the_prefix_cache(raw: Raw) -> None:
    """Found, adopted whole and in part, written, extended, evicted: as any others."""
    with raw.kv([FAT], block_tokens=8, limit=CHUNK, flags=abi.KV_EVENTS) as kv:
        view, seq, names = kv.view(), kv.open(tokens=6 * 8), chain("a", 6)
        data = contents(kv, "halves", 6)
        put(view, seq, data)
        assert kv.publish(seq, names) == 0
        token = kv.groups[0].token_bytes
        for how in ("whole", "part", "middle", "write"):
            assert packed(kv, seq).blocks == 6
            assert kv.end(seq) == 0
            info = kv.info()
            assert info.cached == info.used == info.packed
            seq = kv.open()
            if how == "whole":
                assert kv.lookup(seq, names) == (0, 6)
                assert holds(view, seq, data)
            elif how == "part":
                assert kv.lookup(seq, names[:2]) == (0, 2)
                assert kv.adopt(seq, 2, names[2], 3) == (0, 19)
                assert holds(view, seq, [d[: 19 * token] for d in data])
                assert kv.extend(seq, 5) == 0
                view.write(seq, tokens("x", 19, 24))
                assert holds(view, seq, [d[: 19 * token] for d in data])
            elif how == "middle":
                assert kv.extend(seq, 24) == 0
                assert kv.adopt(seq, 1, names[4]) == (0, 24)
                at, size = view.place(seq, 8, 1), 8 * token
                assert view.memory[at : at + size] == data[1][32 * token : 40 * token]
                view.check(seq, dict.fromkeys(range(8)))
            else:
                assert kv.lookup(seq, names[:3]) == (0, 3)
                view.write(seq, {5: "mine"})
                view.check(seq, {5: "mine"})
                assert view.memory[view.span(seq, 6)] == data[0][6 * token : 7 * token]
            assert kv.end(seq) == 0
            seq = kv.open()
            assert kv.lookup(seq, names) == (0, 6)
            assert holds(view, seq, data)
        assert packed(kv, seq).blocks == 6
        assert kv.end(seq) == 0
        kv.events()
        taker = kv.open(tokens=16 * 8)
        assert len(kv.events()) == 6
        info = kv.info()
        assert (info.packed, info.unpacked, info.cached, info.used) == (0, 0, 0, CHUNK)
        assert kv.end(taker) == 0
        assert kv.reset() == 0
        view.close()


@pytest.mark.parametrize("why", ["limit", "quota"])
def test_no_memory_to_bring_it_back(raw: Raw, why: str) -> None:
    """SIGBUS and never wrong data; the call says which errno; with room all is there again."""
    most, refusal = (0, errno.EDQUOT) if why == "quota" else (2 * CHUNK, errno.ENOSPC)
    with raw.kv([FAT], block_tokens=8, limit=most) as kv:
        view, seq = kv.view(), kv.open(tokens=12 * 8)
        data = contents(kv, "sparse", 12)
        put(view, seq, data)
        if why == "quota":
            assert raw.set_quota(2 * CHUNK) == 0
        pack = packed(kv, seq)
        assert pack.blocks == 12
        other = kv.open()
        while kv.extend(other, 8) == 0:
            pass
        assert kv.extend(other, 8) == refusal
        length = kv.query(other).length
        # nothing that packing could make room of
        others = contents(kv, "random", length // 8, seed=9)
        put(view, other, others)
        before = kv.counts()
        for block in (0, 11):
            at = view.place(seq, block * 8)
            assert dies(lambda at=at: view.memory[at]) == signal.SIGBUS
            assert dies(lambda at=at: view.memory.__setitem__(at, 1)) == signal.SIGBUS
        # and no fork that copies, nor a write to what is shared
        assert kv.try_fork(seq, 90)[0] == refusal
        assert kv.counts() == before
        # as much as there is room for
        free = kv.info().limit if why == "limit" else 2 * CHUNK
        result, _ = kv.pack(seq, abi.KV_UNPACK)
        assert result == refusal
        assert kv.info().used <= free
        assert kv.query(other).length == length
        assert holds(view, other, others)
        assert kv.end(other) == 0
        assert holds(view, seq, data)
        view.close()


def test_cached_blocks_make_room_for_it(raw: Raw) -> None:
    with raw.kv([FAT], block_tokens=8, limit=CHUNK) as kv:
        view, seq, names = kv.view(), kv.open(tokens=10 * 8), chain("b", 12)
        data = contents(kv, "halves", 10)
        put(view, seq, data)
        freed = packed(kv, seq)
        other = kv.open()
        while kv.extend(other, 8) == 0:
            pass
        blocks = kv.query(other).length // 8
        assert kv.publish(other, names[:blocks]) == 0
        assert kv.end(other) == 0
        assert kv.info().evictions == 0
        assert holds(view, seq, data)
        # of 16 blocks' room 10 are its own now
        assert kv.info().evictions >= blocks - 6
        assert kv.peek(kv.open(), names[:blocks])[1] == blocks - kv.info().evictions
        assert freed.blocks == 10
        view.close()


def fill(kv: KV, view: View, blocks: int, each: int) -> dict[Seq, list[bytes]]:
    """So many blocks, in sequences of so many."""
    seqs = {}
    for i in range(blocks // each):
        seq = kv.open(tokens=each * 8)
        seqs[seq] = contents(kv, "sparse", each, seed=i)
        put(view, seq, seqs[seq])
    return seqs


def test_idle_sequences_are_packed_when_it_is_nearly_full(raw: Raw) -> None:
    """Without being asked, and until a quarter is free; no more than that."""
    with raw.kv([FAT], block_tokens=8, limit=2 * CHUNK, max_sequences=32) as kv:
        view = kv.view()
        seqs = fill(kv, view, 26, 2)
        assert kv.info().packs == 0  # 26 of 32 is not nearly full
        time.sleep(2)
        assert kv.info().packs == 0
        seqs |= fill(kv, view, 4, 2)
        wait_for(lambda: kv.info().used <= 2 * CHUNK * 3 // 4)
        time.sleep(1.5)
        info = kv.info()
        assert info.used <= 2 * CHUNK * 3 // 4
        # each gives up almost two blocks: after four of them six of 30 are free
        assert info.packs == 8
        for seq, data in seqs.items():
            assert holds(view, seq, data)
        view.close()


def test_the_idlest_first_and_what_is_used_never(raw: Raw) -> None:
    with raw.kv([FAT], block_tokens=8, limit=CHUNK, max_sequences=16) as kv:
        view = kv.view()
        seqs = list(fill(kv, view, 4, 2))
        hot = kv.open(tokens=2 * 8)
        time.sleep(0.1)
        late = list(fill(kv, view, 6, 2))
        assert kv.extend(hot, 2 * 8) == 0
        kv.open(tokens=8)
        assert kv.info().used == 15 * kv.block_bytes()

        def packing() -> bool:
            assert kv.extend(hot, 1) == 0
            assert kv.truncate(hot, 4 * 8) == 0
            return kv.info().used <= CHUNK * 3 // 4

        wait_for(packing)
        assert kv.query(hot).packed == 0
        assert kv.query(seqs[0]).packed > 0
        if any(kv.query(seq).packed for seq in late):
            assert all(kv.query(seq).packed for seq in seqs)
        view.close()


def test_what_was_just_touched_is_not_packed_again(raw: Raw) -> None:
    """The gap between where packing begins and where it ends is there for that."""
    with raw.kv([FAT], block_tokens=8, limit=2 * CHUNK, max_sequences=32) as kv:
        view = kv.view()
        seqs = fill(kv, view, 30, 2)
        wait_for(lambda: kv.info().used <= 2 * CHUNK * 3 // 4)
        time.sleep(1.5)
        packs = kv.info().packs
        seq = next(seq for seq in seqs if kv.query(seq).packed)
        for _ in range(15):
            assert holds(view, seq, seqs[seq])
            time.sleep(0.2)
            assert kv.query(seq).packed == 0
        assert kv.info().packs == packs
        view.close()


def test_a_refusal_packs_too(raw: Raw) -> None:
    """Who cannot have memory may have it a while later: others' idle KV made room."""
    with raw.kv([FAT], block_tokens=8, max_sequences=32) as kv:
        view = kv.view()
        seqs = fill(kv, view, 16, 2)
        assert raw.set_quota(CHUNK) == 0
        late = kv.open()
        assert kv.extend(late, 8) == errno.EDQUOT
        wait_for(lambda: kv.extend(late, 8) == 0)
        assert kv.info().packs > 0
        # some other that is idle may have to go for each that comes back
        for seq, data in seqs.items():
            wait_for(lambda seq=seq: kv.pack(seq, abi.KV_UNPACK)[0] == 0)
            assert holds(view, seq, data)
            assert kv.pack(seq)[0] == 0
        view.close()


def test_packing_while_others_read_and_write(raw: Raw) -> None:
    with raw.kv([FAT], block_tokens=8) as kv:
        view, stop, failures = kv.view(), threading.Event(), []
        seqs = [kv.open(tokens=3 * 8) for _ in range(3)]
        for seq in seqs:
            view.write(seq, tokens(seq.name, 0, 24))

        def work(seq: Seq) -> None:
            dice, values = random.Random(seq.name), tokens(seq.name, 0, 24)
            try:
                while not stop.is_set():
                    t = dice.randrange(24)
                    values[t] = (seq.name, dice.random())
                    view.write(seq, {t: values[t]})
                    view.check(seq, values)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(seq,)) for seq in seqs]
        for thread in threads:
            thread.start()
        for _ in range(25):
            for seq in seqs:
                assert kv.pack(seq)[0] == 0
            child = kv.fork(seqs[0], 24)
            assert kv.pack(child)[0] == 0
            assert kv.end(child) == 0
        stop.set()
        for thread in threads:
            thread.join()
        assert not failures, failures[0]
        assert kv.info().packs > 25
        view.close()


def test_closing_while_it_packs(raw: Raw) -> None:
    """The last descriptor goes with work under way."""
    for _ in range(6):
        with raw.kv([FAT], block_tokens=8, limit=CHUNK) as kv:
            view = kv.view()
            fill(kv, view, 16, 4)
            assert kv.extend(kv.open(), 8) == errno.ENOSPC
            time.sleep(1.1)
            view.close()
    assert raw.info().used == 0
