# SPDX-License-Identifier: MIT
"""The prefix cache: what vLLM's block-pool tests pin down, tenants, windows, states, events."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import select
import signal
import threading
import time

import pytest

from device import CHUNK, KV, PAGE, Raw, Seq, View, chain, full, pattern, state, tokens, window
from process import dies, readable
from tensormem import abi

TOKEN = PAGE // 8
#: 16 blocks of 8 tokens make a chunk, and the limit of most caches here.
FAT = full(2, CHUNK // 256)
STORED, REMOVED, CLEARED = abi.KVEventType
Known = tuple[int, bytes, bytes, int, int]


def cache(raw: Raw, *groups: abi.KVGroup, **fields: int) -> KV:
    values = {"block_tokens": 8, "limit": CHUNK, "flags": abi.KV_EVENTS, "max_sequences": 40}
    return raw.kv(groups or [FAT], **{**values, **fields})


def publish(kv: KV, view: View, tag: object, blocks: int, tenant: int = 0) -> tuple[Seq, list[bytes]]:
    """A sequence of full blocks, published."""
    seq, names = kv.open(tenant, blocks * 8), chain(tag, blocks)
    view.write(seq, tokens(tag, 0, blocks * 8))
    assert kv.publish(seq, names) == 0
    return seq, names


def found(kv: KV, names: list[bytes], tenant: int = 0) -> int:
    """How many blocks of a prefix there are; changes nothing."""
    seq = kv.open(tenant)
    before = kv.counts()
    result, matched = kv.peek(seq, names)
    assert result == 0
    assert kv.counts() == before
    assert kv.end(seq) == 0
    return matched


def cached_names(kv: KV, *chains: list[bytes]) -> list[list[int]]:
    """Which blocks of each chain can be found, each by itself."""
    there = []
    for names in chains:
        seq, got = kv.open(), []
        for i, name in enumerate(names):
            # a chain of one block asks for this one alone
            if kv.peek(seq, [name])[1]:
                got.append(i)
        assert kv.end(seq) == 0
        there.append(got)
    return there


def briefly(events: list[abi.KVEvent]) -> list[tuple[int, bytes]]:
    return [(e.type, bytes(e.hash.bytes)) for e in events]


def test_a_prefix_is_found_and_shared(raw: Raw) -> None:
    with cache(raw) as kv:
        view = kv.view()
        first, names = publish(kv, view, "a", 4)
        assert found(kv, names) == 4
        second = kv.open()
        assert kv.lookup(second, names + chain("other", 3)) == (0, 4)
        query = kv.query(second)
        assert (query.length, query.held, query.shared) == (32, 4 * kv.block_bytes(), query.held)
        info = kv.info()
        assert (info.lookups, info.hits, info.copies) == (7, 4, 0)
        assert info.used == 4 * kv.block_bytes()
        assert info.cached == 0
        view.check(second, tokens("a", 0, 32))
        assert kv.extend(second, 3) == 0
        view.write(second, tokens("b", 32, 35))
        assert kv.end(first) == 0
        view.check(second, tokens("a", 0, 32) | tokens("b", 32, 35))
        assert kv.end(second) == 0
        assert kv.info().cached == kv.info().used == 4 * kv.block_bytes()
        third = kv.open()
        assert kv.lookup(third, names[:3]) == (0, 3)
        view.check(third, tokens("a", 0, 24))
        assert kv.info().cached == kv.block_bytes()
        view.close()


def test_no_match_is_no_error(raw: Raw) -> None:
    with cache(raw) as kv:
        view = kv.view()
        _, names = publish(kv, view, "a", 3)
        seq = kv.open()
        # the middle alone is no prefix
        for wrong in (chain("b", 2), [*chain("b", 1), *names], [bytes(16)]):
            assert kv.lookup(seq, wrong) == (0, 0)
            assert kv.query(seq).length == 0
        assert kv.lookup(seq, [names[0], bytes(16), names[2]]) == (0, 1)
        assert kv.query(seq).length == 8
        view.close()


def test_errors_of_publish_lookup_and_adopt(raw: Raw) -> None:
    with cache(raw) as kv:
        view = kv.view()
        seq, names = publish(kv, view, "a", 3)
        assert kv.extend(seq, 7) == 0
        before, events = kv.counts(), kv.events()
        assert len(events) == 3
        new = chain("new", 5)
        for first, count in ((3, 1), (2, 2), (0, 4), (4, 1), ((1 << 32) - 1, 1), ((1 << 32) - 1, 2)):
            assert kv.publish(seq, new[:count], first) == errno.EINVAL  # not full
        for first, wrong in ((0, new[:1]), (1, [names[1], new[0]]), (0, names[::-1])):
            assert kv.publish(seq, wrong, first) == errno.EINVAL  # another hash
        assert kv.publish(seq, names) == 0  # the same again is nothing
        assert kv.publish(seq, names[1:2], 1) == 0
        assert kv.lookup(seq, names) == (errno.EINVAL, 0)  # not empty
        for block, count in ((0, 7), (4, 8), (3, 8), (5, 0), (1, 9), (1 << 31, 0), (3, 3)):
            assert kv.adopt(seq, block, names[0], count)[0] == errno.EINVAL, (block, count)
        assert kv.adopt(seq, 0, new[0])[0] == errno.ENODATA
        empty = kv.open()
        before["sequences"] += 1
        assert kv.adopt(empty, 1, names[1])[0] == errno.EINVAL
        assert kv.adopt(empty, 0, new[0])[0] == errno.ENODATA
        assert kv.adopt(empty, 0, names[0], 9)[0] == errno.EINVAL
        assert kv.counts() == before
        assert kv.events() == []
        assert kv.query(seq).length == 31
        view.check(seq, tokens("a", 0, 24))
        view.close()


def test_no_hash_before_the_block_is_full(raw: Raw) -> None:
    """And no new block until the last is full."""
    with cache(raw) as kv:
        seq, names = kv.open(), chain("a", 3)
        for length in range(1, 25):
            assert kv.extend(seq, 1) == 0
            assert kv.info().used == -(-length // 8) * kv.block_bytes()
            full_blocks = length // 8
            if length % 8:
                assert kv.publish(seq, names[full_blocks : full_blocks + 1], full_blocks) == errno.EINVAL
            else:
                assert kv.publish(seq, names[full_blocks - 1 : full_blocks], full_blocks - 1) == 0
            assert found(kv, names) == full_blocks


def test_tenants(raw: Raw) -> None:
    """No hit across tenants, whoever asks for what; the same names can be of both."""
    with cache(raw) as kv:
        view = kv.view()
        names = chain("x", 2)
        publish(kv, view, "x", 2, tenant=1)
        for tenant in (0, 2, 1 << 63, (1 << 64) - 1):
            assert found(kv, names, tenant) == 0
            seq = kv.open(tenant)
            assert kv.lookup(seq, names) == (0, 0)
            assert kv.adopt(seq, 0, names[0])[0] == errno.ENODATA
            assert kv.end(seq) == 0
        theirs = kv.open(2, 16)
        view.write(theirs, tokens("theirs", 0, 16))
        assert kv.publish(theirs, names) == 0
        for tenant, tag in ((1, "x"), (2, "theirs")):
            seq = kv.open(tenant)
            assert kv.lookup(seq, names) == (0, 2)
            view.check(seq, tokens(tag, 0, 16))
        assert [e.tenant for e in kv.events()] == [1, 1, 2, 2]
        view.close()


def evicted(kv: KV, blocks: int) -> list[bytes]:
    """What goes when so many blocks are wanted of a full cache, in order."""
    kv.events()
    seq = kv.open(tokens=blocks * 8)
    events = kv.events()
    assert {e.type for e in events} <= {REMOVED}
    assert kv.end(seq) == 0
    return [bytes(e.hash.bytes) for e in events]


def test_the_order_of_eviction(raw: Raw) -> None:
    """Least recently used first, of one sequence the suffix first; what is used never."""
    with cache(raw) as kv:
        view = kv.view()
        a, names_a = publish(kv, view, "a", 3)
        b, names_b = publish(kv, view, "b", 3)
        c, names_c = publish(kv, view, "c", 3)
        d, names_d = publish(kv, view, "d", 3)
        for seq in (b, a, d):
            assert kv.end(seq) == 0
        # a hit makes it the newest when it ends
        again = kv.open()
        assert kv.lookup(again, names_b) == (0, 3)
        assert kv.end(again) == 0
        expected = [*names_a[::-1], *names_d[::-1], *names_b[::-1]]
        assert evicted(kv, 4) == []  # what is free comes first
        for i, name in enumerate(expected):
            assert evicted(kv, 5 + i) == [name]
        assert kv.info().evictions == 9
        assert found(kv, names_c) == 3
        view.check(c, tokens("c", 0, 24))
        assert kv.extend(kv.open(), 14 * 8) == errno.ENOSPC
        view.close()


def test_parts_of_a_prefix_age_apart(raw: Raw) -> None:
    """A hit on the first blocks renews those and not what follows."""
    with cache(raw) as kv:
        view = kv.view()
        a, names_a = publish(kv, view, "a", 6)
        assert kv.end(a) == 0
        b, names_b = publish(kv, view, "b", 4)
        assert kv.end(b) == 0
        seq = kv.open()
        assert kv.lookup(seq, names_a[:2]) == (0, 2)
        assert kv.end(seq) == 0
        order = [*names_a[:1:-1], *names_b[::-1], *names_a[1::-1]]
        assert evicted(kv, 16) == order
        view.close()


def test_blocks_without_a_hash_go_at_once(raw: Raw) -> None:
    """An unhashed block is used before a hashed one is given up."""
    with cache(raw) as kv:
        view = kv.view()
        seq = kv.open(tokens=16 * 8)
        names = chain("a", 5)
        assert kv.publish(seq, names) == 0
        assert kv.end(seq) == 0
        info = kv.info()
        assert info.cached == info.used == 5 * kv.block_bytes()
        assert evicted(kv, 11) == []
        assert evicted(kv, 12) == [names[4]]
        assert found(kv, names) == 4
        view.close()


def test_a_hit_is_never_its_own_victim(raw: Raw) -> None:
    """A full cache: the lookup and the adoption that need room take it from others."""
    groups = [full(CHUNK // PAGE // 16 - 4, TOKEN), state(4, PAGE)]
    with cache(raw, *groups) as kv:
        view = kv.view()
        names = chain("a", 4)
        seq = kv.open(tokens=32)
        view.write(seq, tokens("a", 0, 32))
        view.memory[view.span(seq, 0, 0, 1)] = pattern("a", 0, PAGE)
        assert kv.publish(seq, names) == 0
        assert kv.end(seq) == 0
        # all that is free is taken; the rest is the cached prefix
        filler = kv.open()
        while kv.info().evictions == 0 and kv.extend(filler, 8) == 0:
            pass
        left = found(kv, names)
        assert kv.info().evictions > 0
        before = kv.counts()
        late = kv.open()
        result, matched = kv.lookup(late, names)
        if result:
            assert result == errno.ENOSPC
            assert kv.end(late) == 0
            assert {**before, "sequences": before["sequences"]} == kv.counts()
        else:
            assert matched == left
            view.check(late, tokens("a", 0, matched * 8))
        view.close()


def test_a_lookup_that_finds_no_room(raw: Raw) -> None:
    """The copy of the state does not fit: ENOSPC, nothing changed, and what was hit is still there."""
    pages = CHUNK // PAGE
    with cache(raw, full(pages // 8, TOKEN), state(pages // 8, PAGE)) as kv:
        view = kv.view()
        names = chain("a", 3)
        seq = kv.open(tokens=24)
        view.write(seq, tokens("a", 0, 24))
        assert kv.publish(seq, names) == 0
        assert kv.end(seq) == 0  # three blocks and a state of eight are cached
        other = kv.open(tokens=24)  # and four are in use
        assert kv.info().used == CHUNK
        late = kv.open()
        before, order = kv.counts(), kv.events()
        assert kv.lookup(late, names) == (errno.ENOSPC, 0)
        assert kv.counts() == before
        assert kv.events() == []
        assert found(kv, names) == 3
        assert kv.truncate(other, 8) == errno.ENODATA
        assert kv.end(other) == 0
        assert kv.lookup(late, names) == (0, 3)
        view.check(late, tokens("a", 0, 24))
        assert len(order) == 4
        view.close()


def test_an_allocation_that_fails_evicts_nothing(raw: Raw) -> None:
    with cache(raw) as kv:
        view = kv.view()
        a, names = publish(kv, view, "a", 6)
        used = kv.open(tokens=8 * 8)
        assert kv.end(a) == 0
        kv.events()
        before = kv.counts()
        for more in (65, 9 * 8, 500):
            assert kv.extend(used, more) == errno.ENOSPC
        assert kv.extend_batch([(used, 8), (kv.open(), 64)])[0] == errno.ENOSPC
        before["sequences"] += 1
        assert kv.counts() == before
        assert kv.events() == []
        assert found(kv, names) == 6
        # and the order of eviction is as before
        assert kv.extend(used, 8 * 4) == 0
        assert [n for _, n in briefly(kv.events())] == names[:3:-1]
        view.close()


def test_a_reused_block_has_no_hash(raw: Raw) -> None:
    with cache(raw) as kv:
        view = kv.view()
        a, names = publish(kv, view, "a", 16)
        assert kv.end(a) == 0
        b = kv.open(tokens=16 * 8)
        assert cached_names(kv, names) == [[]]
        view.check(b, dict.fromkeys(range(16)))
        new = chain("b", 16)
        assert kv.publish(b, new) == 0
        assert found(kv, names) == 0
        assert found(kv, new) == 16
        view.close()


def test_duplicates_go_one_by_one(raw: Raw) -> None:
    """Two that computed the same: each is evicted by itself; events tell what can be found."""
    with cache(raw) as kv:
        view = kv.view()
        a, names = publish(kv, view, "same", 2)
        b, _ = publish(kv, view, "same", 2)
        assert kv.info().used == 4 * kv.block_bytes()
        assert briefly(kv.events()) == [(STORED, n) for n in names]
        assert kv.end(a) == 0
        assert kv.end(b) == 0
        assert kv.info().cached == 4 * kv.block_bytes()
        for blocks, events, left in ((13, 0, 2), (14, 0, 2), (15, 1, 1), (16, 1, 0)):
            gone = evicted(kv, blocks)
            assert len(gone) == events
            assert found(kv, names) == left
        assert cached_names(kv, names) == [[]]
        view.close()


def test_a_shared_block_has_its_count(raw: Raw) -> None:
    with cache(raw) as kv:
        view = kv.view()
        a, names = publish(kv, view, "a", 2)
        others = [kv.open() for _ in range(5)]
        for seq in others:
            assert kv.lookup(seq, names) == (0, 2)
        everybody = [a, *others]
        random.Random(1).shuffle(everybody)
        for seq in everybody:
            info = kv.info()
            assert (info.used, info.cached) == (2 * kv.block_bytes(), 0)
            view.check(seq, tokens("a", 0, 16))
            assert kv.end(seq) == 0
        assert kv.info().cached == 2 * kv.block_bytes()
        view.close()


def test_reset(raw: Raw) -> None:
    with cache(raw) as kv:
        view = kv.view()
        a, names = publish(kv, view, "a", 3)
        plain, empty = kv.open(tokens=1), kv.open()
        kv.events()
        for seq in (a, plain):
            before = kv.counts()
            assert kv.reset() == errno.EBUSY
            assert kv.counts() == before
            assert found(kv, names) == 3
            assert kv.end(seq) == 0
        assert kv.events() == []
        assert kv.reset() == 0
        assert found(kv, names) == 0
        info = kv.info()
        assert (info.used, info.cached, info.held, info.sequences) == (0, 0, 0, 1)
        assert [e.type for e in kv.events()] == [CLEARED]
        assert kv.reset() == 0
        assert kv.end(empty) == 0
        # the names are free again
        publish(kv, view, "a", 3)
        assert found(kv, names) == 3
        view.close()


def test_a_partial_hit_is_a_copy(raw: Raw) -> None:
    """The source stays cached and as it was, whatever the copy's owner writes."""
    with cache(raw) as kv:
        view = kv.view()
        a, names = publish(kv, view, "a", 3)
        assert kv.end(a) == 0
        for count in (1, 5, 7):
            seq = kv.open()
            assert kv.lookup(seq, names[:2]) == (0, 2)
            copies = kv.info().copies
            assert kv.adopt(seq, 2, names[2], count) == (0, 16 + count)
            assert kv.info().copies == copies + 1
            assert kv.query(seq).shared == 0
            view.check(seq, tokens("a", 0, 16 + count))
            assert kv.extend(seq, 8) == 0
            view.write(seq, tokens("mine", 16, 24 + count))
            assert kv.info().copies == copies + 1
            check = kv.open()
            assert kv.lookup(check, names) == (0, 3)
            view.check(check, tokens("a", 0, 24))
            assert kv.end(check) == 0
            # the copy has no hash: another may be given
            assert kv.publish(seq, chain(("mine", count), 1), 2) == 0
            assert kv.end(seq) == 0
        assert found(kv, names) == 3
        view.close()


def test_adopt_at_any_position(raw: Raw) -> None:
    """A block of somebody else's in the middle or at the end, shared; what was there goes."""
    with cache(raw) as kv:
        view = kv.view()
        a, names = publish(kv, view, "a", 3)
        seq = kv.open(tokens=24)
        view.write(seq, tokens("s", 0, 24))
        used = kv.info().used
        assert kv.adopt(seq, 1, names[2]) == (0, 24)
        assert kv.info().used == used - kv.block_bytes()
        expected = tokens("s", 0, 24)
        expected |= {8 + t: ("a", 16 + t) for t in range(8)}
        view.check(seq, expected)
        assert kv.adopt(seq, 3, names[0], 8) == (0, 32)
        assert kv.adopt(seq, 4, names[0]) == (0, 40)
        expected |= {at + t: ("a", t) for at in (24, 32) for t in range(8)}
        view.check(seq, expected)
        assert kv.query(seq).shared == 3 * kv.block_bytes()
        # writes to it are its own, also where one block is in it twice
        view.write(seq, {33: "w", 9: "v"})
        view.check(seq, expected | {33: "w", 9: "v"})
        view.check(a, tokens("a", 0, 24))
        # replaced by itself
        assert kv.adopt(seq, 3, names[0]) == (0, 40)
        view.check(seq, expected | {33: "w", 9: "v"})
        assert kv.end(seq) == 0
        view.check(a, tokens("a", 0, 24))
        view.close()


def test_adopt_up_to_the_most_tokens(raw: Raw) -> None:
    with cache(raw, max_tokens=20) as kv:
        view = kv.view()
        _, names = publish(kv, view, "a", 2)
        seq = kv.open()
        assert kv.lookup(seq, [*names, names[0]]) == (0, 2)
        before = kv.counts()
        assert kv.adopt(seq, 2, names[0])[0] == errno.ERANGE
        assert kv.adopt(seq, 2, names[0], 5)[0] == errno.ERANGE
        assert kv.counts() == before
        assert kv.adopt(seq, 2, names[0], 4) == (0, 20)
        view.close()


@pytest.mark.parametrize("tokens_", [0, 3])
def test_what_an_adoption_moves_out_of_the_window(raw: Raw, tokens_: int) -> None:
    """It is not there any more, mapped before or not: its memory is somebody else's."""
    with cache(raw, window(16, 2, TOKEN)) as kv:
        view = kv.view()
        _, names = publish(kv, view, "a", 1)
        seq = kv.open(tokens=24)
        view.write(seq, tokens("s", 8, 24))
        for t in (8, 16):  # mapped
            assert view.memory[view.place(seq, t)] == pattern(("s", t), 0, TOKEN)[0]
        assert kv.adopt(seq, 3, names[0], tokens_) == (0, 24 + (tokens_ or 8))
        memory = memoryview(view.memory)
        gone = tokens_ == 0
        assert readable(memory[view.span(seq, 8)]) != gone
        if gone:
            assert dies(lambda: view.memory[view.place(seq, 8)]) == signal.SIGBUS
        view.check(seq, tokens("s", 16, 24))
        view.check(seq, {24 + t: ("a", t) for t in range(tokens_ or 8)})
        memory.release()
        view.close()


def test_window_groups_need_their_window_only(raw: Raw) -> None:
    """A lookup takes the longest prefix whose last tokens are there in the window's group."""
    with cache(raw, full(4, TOKEN), window(16, 2, TOKEN)) as kv:
        view, seq = kv.view(), kv.open()
        names = chain("a", 8)
        # as it decodes: what leaves the window is unpublished there or cached
        for block in range(8):
            assert kv.extend(seq, 8) == 0
            view.write(seq, tokens("f", block * 8, block * 8 + 8), 0)
            view.write(seq, tokens("w", block * 8, block * 8 + 8), 1)
            if block >= 5:
                assert kv.publish(seq, names[block : block + 1], block) == 0
        # of the full group 5 to 7 only, so no prefix begins
        assert found(kv, names) == 0
        assert kv.publish(seq, names[:5]) == 0
        # 0 to 3 have never been published in the window group, 4 has left it
        assert found(kv, names) == 8
        assert found(kv, names[:7]) == 7
        assert found(kv, names[:6]) == 0
        late = kv.open()
        assert kv.lookup(late, names[:7]) == (0, 7)
        view.check(late, tokens("f", 0, 56), 0)
        view.check(late, tokens("w", 40, 56), 1)
        memory = memoryview(view.memory)
        assert not readable(memory[view.span(late, 39, 0, 1)])
        memory.release()
        assert kv.query(late).held == 7 * kv.block_bytes(0) + 2 * kv.block_bytes(1)
        assert kv.extend(late, 8) == 0
        view.write(late, tokens("x", 56, 64), 1)
        view.check(seq, tokens("w", 48, 64), 1)
        view.close()


def test_publishing_names_what_a_window_still_holds(raw: Raw) -> None:
    with cache(raw, full(2, TOKEN), window(16, 2, TOKEN)) as kv:
        seq, names = kv.open(tokens=48), chain("a", 6)
        assert kv.publish(seq, names) == 0
        events = kv.events()
        assert [e.group for e in events if e.group == 1] == [1, 1]
        assert [(e.block, bytes(e.hash.bytes)) for e in events if e.group == 1] == [
            (4, names[4]), (5, names[5]),
        ]  # fmt: skip
        assert [e.block for e in events if e.group == 0] == list(range(6))
        assert found(kv, names) == 6
        assert found(kv, names[:5]) == 0


def test_states_are_kept_as_they_were(raw: Raw) -> None:
    """At the block where they were published, as a copy; a prefix ends only there."""
    with cache(raw, full(4, TOKEN), state(2, PAGE + 5)) as kv:
        view, seq = kv.view(), kv.open()
        names = chain("a", 6)

        def put(value: object) -> None:
            for plane in (0, 1):
                view.memory[view.span(seq, 0, plane, 1)] = pattern(value, plane, PAGE + 5)

        for block in range(6):
            assert kv.extend(seq, 8) == 0
            view.write(seq, tokens("f", block * 8, block * 8 + 8))
            put(block)
            copies = kv.info().copies
            if block in (1, 4):
                assert kv.publish(seq, names[block - 1 : block + 1], block - 1) == 0
                assert kv.info().copies == copies + 1
        assert kv.publish(seq, names[2:4], 2) == 0  # no state: it has moved on
        assert kv.info().copies == 2
        for count, matched in ((6, 5), (5, 5), (4, 2), (3, 2), (2, 2), (1, 0)):
            assert found(kv, names[:count]) == matched
        put("later")
        for count, value in ((5, 4), (3, 1)):
            late = kv.open()
            assert kv.lookup(late, names[:count]) == (0, value + 1)
            view.check(late, tokens("f", 0, (value + 1) * 8))
            for plane in (0, 1):
                data = view.memory[view.span(late, 0, plane, 1)]
                assert data == pattern(value, plane, PAGE + 5)
                # its own from here on
                view.memory[view.span(late, 0, plane, 1)] = bytes(PAGE + 5)
        assert kv.info().copies == 4
        late = kv.open()
        assert kv.lookup(late, names[:2]) == (0, 2)
        # a state is not adopted in part, and only where it was published
        assert kv.adopt(late, 2, names[2])[0] == errno.ENODATA
        assert kv.adopt(late, 2, names[4], 3)[0] == errno.EINVAL
        assert kv.adopt(late, 2, names[4]) == (0, 24)
        data = view.memory[view.span(late, 0, 1, 1)]
        assert data == pattern(4, 1, PAGE + 5)
        view.close()


def test_events_tell_the_parent(raw: Raw) -> None:
    with cache(raw) as kv:
        view = kv.view()
        names = chain("a", 4)
        seq = kv.open(9, tokens=32)
        assert kv.publish(seq, names[:2]) == 0
        assert kv.publish(seq, names[2:], 2) == 0
        told = [(e.type, e.block, e.group, e.pad, e.tenant, bytes(e.hash.bytes), bytes(e.parent.bytes))
                for e in kv.events()]  # fmt: skip
        parents = [bytes(16), *names]
        assert told == [(STORED, i, 0, 0, 9, names[i], parents[i]) for i in range(4)]
        # what was found and not published here: its name is the parent
        late = kv.open(9)
        assert kv.lookup(late, names[:3]) == (0, 3)
        assert kv.extend(late, 8) == 0
        other = chain("b", 1)
        assert kv.publish(late, other, 3) == 0
        (event,) = kv.events()
        assert (event.block, bytes(event.parent.bytes)) == (3, names[2])
        # nothing published before it: none
        third = kv.open(9, tokens=16)
        assert kv.publish(third, chain("c", 1), 1) == 0
        (event,) = kv.events()
        assert (event.block, bytes(event.parent.bytes)) == (1, bytes(16))
        # removed, in the order in which they go; a hash has its tenant
        for s in (seq, late, third):
            assert kv.end(s) == 0
        assert kv.events() == []
        kv.open(tokens=16 * 8)
        gone = kv.events()
        assert {e.type for e in gone} == {REMOVED}
        assert {e.tenant for e in gone} == {9}
        assert [bytes(e.hash.bytes) for e in gone] == [
            names[3], other[0], *names[2::-1], *chain("c", 1),
        ]  # fmt: skip
        view.close()


def test_events_by_read_and_poll(raw: Raw) -> None:
    size = ctypes.sizeof(abi.KVEvent)
    with cache(raw) as kv:
        os.set_blocking(kv.fd, False)
        poll = select.poll()
        poll.register(kv.fd, select.POLLIN)
        assert poll.poll(0) == []
        with pytest.raises(BlockingIOError):
            os.read(kv.fd, size)
        for room in (0, 1, size - 1):
            with pytest.raises(OSError, match="Invalid argument"):
                os.read(kv.fd, room)
        seq, names = kv.open(tokens=40), chain("a", 5)
        assert kv.publish(seq, names) == 0
        assert poll.poll(0) == [(kv.fd, select.POLLIN)]
        read = [os.read(kv.fd, n) for n in (size, 2 * size - 1, 3 * size)]
        assert [len(data) // size for data in read] == [1, 1, 3]
        events = [abi.KVEvent.from_buffer_copy(data, at)
                  for data in read for at in range(0, len(data), size)]  # fmt: skip
        assert briefly(events) == [(STORED, name) for name in names]
        assert poll.poll(0) == []

        os.set_blocking(kv.fd, True)
        got: list[bytes] = []
        thread = threading.Thread(target=lambda: got.append(os.read(kv.fd, size)))
        thread.start()
        time.sleep(0.2)
        assert not got
        late = kv.open(tokens=8)
        assert kv.publish(late, chain("late", 1)) == 0
        thread.join(20)
        assert bytes(abi.KVEvent.from_buffer_copy(got[0]).hash.bytes) == chain("late", 1)[0]
        # a signal ends the wait
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGUSR1, signal.SIG_DFL)
            os.read(kv.fd, size)
            os._exit(1)
        time.sleep(0.2)
        os.kill(pid, signal.SIGUSR1)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGUSR1


def test_a_reader_with_a_bad_buffer_loses_nothing(raw: Raw) -> None:
    with cache(raw) as kv:
        view = kv.view()
        seq, names = kv.open(tokens=24), chain("a", 3)
        assert kv.publish(seq, names) == 0
        memory = memoryview(view.memory)
        nowhere = memory[view.span(seq, 24, 0, 0, 8)]
        with pytest.raises(OSError, match="Bad address"):
            os.readv(kv.fd, [nowhere])
        nowhere.release()
        memory.release()
        assert [n for _, n in briefly(kv.events())] == names
        view.close()


def test_no_events_unless_asked_for(raw: Raw) -> None:
    with cache(raw, flags=0) as kv:
        seq = kv.open(tokens=8)
        assert kv.publish(seq, chain("a", 1)) == 0
        with pytest.raises(OSError, match="Invalid argument"):
            os.read(kv.fd, 4096)
        assert select.select([kv.fd], [], [], 0)[0] == []
        assert kv.info().events_lost == 0


def test_events_that_nobody_reads(raw: Raw) -> None:
    """The oldest go, and are counted; those that are left are the latest, in order."""
    with cache(raw, full(1, TOKEN), max_tokens=8192) as kv:
        seq, per_turn = kv.open(tokens=1000), 125
        names = chain("e", per_turn * 40)
        for turn in range(40):
            assert kv.publish(seq, names[turn * per_turn : (turn + 1) * per_turn]) == 0
            assert kv.truncate(seq, 0) == 0
            assert kv.end(seq) == 0
            assert kv.reset() == 0
            seq = kv.open(tokens=1000)
        told = [(STORED, n) for n in names]
        for turn in range(39, -1, -1):
            told.insert((turn + 1) * per_turn, (CLEARED, bytes(16)))
        lost = kv.info().events_lost
        assert lost > 0
        assert briefly(kv.events()) == told[lost:]
        assert kv.info().events_lost == lost


def test_a_lookup_of_a_prefix_that_is_packed(raw: Raw) -> None:
    with cache(raw) as kv:
        view = kv.view()
        a, names = publish(kv, view, "a", 4)
        result, packed = kv.pack(a)
        assert (result, packed.blocks) == (0, 4)
        assert kv.end(a) == 0
        assert kv.info().cached == kv.info().packed == packed.after
        late = kv.open()
        assert kv.lookup(late, names) == (0, 4)
        view.check(late, tokens("a", 0, 32))
        assert kv.info().packed == 0
        view.close()


@pytest.mark.parametrize("seed", range(3))
def test_random_prefixes(raw: Raw, seed: int) -> None:
    """Conversations that branch, in a cache that is too small: what is found is right."""
    dice = random.Random(seed)
    with cache(raw, max_tokens=64, flags=0) as kv:
        view = kv.view()
        for step in range(120):
            # a path in a small tree; a name stands for all before it
            path = tuple(dice.randrange(2) for _ in range(dice.randrange(1, 7)))
            names = [chain(path[: i + 1], 1)[0] for i in range(len(path))]
            seq = kv.open()
            result, matched = kv.lookup(seq, names)
            assert result == 0
            values = {t: (path[: t // 8 + 1], t) for t in range(8 * len(path))}
            view.check(seq, {t: v for t, v in values.items() if t < 8 * matched})
            rest = {t: v for t, v in values.items() if t >= 8 * matched}
            if rest:
                assert kv.extend(seq, len(rest)) == 0
                view.write(seq, rest)
                assert kv.publish(seq, names[matched:], matched) == 0
            if step % 3 == 0:
                view.write(seq, {dice.randrange(len(values)): "scribble"})
            assert kv.end(seq) == 0
        info = kv.info()
        assert info.evictions > 10
        assert info.hits > 50
        view.close()


def test_processes_share_the_cache(raw: Raw) -> None:
    """What one publishes another finds, through a mapping of its own."""
    with cache(raw, flags=0) as kv:
        view = kv.view()
        _, names = publish(kv, view, "a", 4)
        pid = os.fork()
        if pid == 0:
            try:
                seq = kv.open()
                assert kv.lookup(seq, names) == (0, 4)
                view.check(seq, tokens("a", 0, 32))
                view.write(seq, tokens("child", 0, 32))
                mine, _ = publish(kv, view, "child", 2)
                assert kv.end(mine) == 0
            except BaseException:
                os._exit(1)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        seq = kv.open()
        assert kv.lookup(seq, chain("child", 2)) == (0, 2)
        view.check(seq, tokens("child", 0, 16))
        again = kv.open()
        assert kv.lookup(again, names) == (0, 4)
        view.check(again, tokens("a", 0, 32))
        view.close()
