# SPDX-License-Identifier: MIT
"""KV caches of the Python library on the real device; its own tests drive it on a memfd."""

from __future__ import annotations

import array
import gc
import os
import random
import signal
import socket
from collections.abc import Iterator

import numpy as np
import pytest

import tensormem
from device import CHUNK, PAGE, read
from process import dies
from tensormem import KVCache, KVGroup, KVSequence, errors

#: Two heads of a float16 each fill a page with 8 tokens.
DIM = PAGE // 8 // 2 // 2
PLAIN = [KVGroup(layers=3, heads=2, dim=DIM)]
MIXED = [
    KVGroup(layers=2, heads=2, dim=DIM),
    KVGroup(layers=2, heads=1, dim=4 * DIM, dtype=np.float32, window=20),
    KVGroup(layers=1, state=(3, 50), dtype=np.float32),
]


@pytest.fixture
def kv() -> Iterator[KVCache]:
    with tensormem.open() as client, client.kv_cache(PLAIN, max_tokens=512, block_tokens=8) as cache:
        yield cache


def fill(seq: KVSequence, layers: int, first: int, end: int, seed: int) -> None:
    dice = np.random.default_rng(seed)
    for layer in range(layers):
        for part in (seq.k(layer), seq.v(layer)):
            part[first:end] = dice.normal(size=(end - first, *part.shape[1:])).round(1)


def copies(seq: KVSequence, layers: int) -> list[np.ndarray]:
    return [part.copy() for layer in range(layers) for part in (seq.k(layer), seq.v(layer))]


def same(seq: KVSequence, expected: list[np.ndarray], end: int) -> bool:
    now = [part for layer in range(len(expected) // 2) for part in (seq.k(layer), seq.v(layer))]
    return all(np.array_equal(a[:end], b[:end]) for a, b in zip(now, expected, strict=True))


def test_arrays_are_contiguous_and_do_not_move(kv: KVCache) -> None:
    seq = kv.sequence()
    address = None
    for length in (1, 7, 8, 9, 64, 300):
        assert seq.extend(length - seq.length) == length
        k = seq.k(2)
        assert (k.shape, k.dtype) == ((length, 2, DIM), np.float16)
        assert k.flags.c_contiguous and k.flags.writeable
        here = k.__array_interface__["data"][0]
        assert address in (None, here)
        address = here
        k[length - 1] = length
    assert [float(seq.k(2)[n - 1, 1, 0]) for n in (1, 7, 8, 9, 64, 300)] == [1, 7, 8, 9, 64, 300]
    assert not np.shares_memory(seq.k(2), seq.v(2))


def test_forks_are_apart(kv: KVCache) -> None:
    seq = kv.sequence()
    seq.extend(50)
    fill(seq, 3, 0, 50, seed=1)
    before = copies(seq, 3)
    child = seq.fork(44)
    assert same(child, before, 44)
    fill(child, 3, 0, 44, seed=2)
    assert same(seq, before, 50)
    theirs = copies(child, 3)
    fill(seq, 3, 0, 50, seed=3)
    assert same(child, theirs, 44)
    assert kv.info().copies >= 5


def test_windows_and_states() -> None:
    with tensormem.open() as client, client.kv_cache(MIXED, max_tokens=200, block_tokens=8) as kv:
        seq = kv.sequence()
        seq.extend(10)
        seq.state(4)[:] = 3.5
        assert seq.state(4).shape == (3, 50)
        for length in range(10, 100, 10):
            seq.k(2)[length - 10 : length] = length
            seq.extend(10)
        first = seq.first(2)
        assert first == (100 - 20) // 8 * 8
        assert float(seq.k(2)[first, 0, 0]) == (first // 10 + 1) * 10
        assert dies(lambda: seq.k(2)[first - 1].sum()) == signal.SIGBUS
        child = seq.fork()
        child.state(4)[:] = 1
        assert seq.state(4).min() == 3.5
        with pytest.raises(errors.NotHeld):
            seq.truncate(50)


def test_prefixes(kv: KVCache) -> None:
    """Published by one, matched by another, whole blocks shared and part of one copied."""
    dice = random.Random(1)
    ids = [dice.randrange(32000) for _ in range(60)]
    with kv.sequence() as seq:
        seq.extend(60)
        fill(seq, 3, 0, 60, seed=4)
        assert seq.publish(ids) == 7
        expected = copies(seq, 3)
    other = [*ids[:45], *(dice.randrange(32000) for _ in range(20))]
    late = kv.sequence()
    assert late.match(other) == 45  # five blocks, and five tokens of the sixth
    assert same(late, expected, 45)
    late.extend(20)
    fill(late, 3, 45, 65, seed=5)
    again = kv.sequence()
    assert again.match(ids) == 56
    assert same(again, expected, 56)
    assert kv.sequence(tenant=1).match(ids) == 0
    assert kv.sequence().match(other, partial=False) == 40
    info = kv.info()
    assert info.hit_rate
    assert info.copies == 1


def test_packing(kv: KVCache) -> None:
    seq = kv.sequence()
    seq.extend(64)
    fill(seq, 3, 0, 64, seed=6)
    expected = copies(seq, 3)
    packed = seq.pack()
    assert packed.blocks == 8 and packed.after < packed.before
    assert kv.info().packing == packed.after / packed.before
    assert same(seq, expected, 64)
    assert kv.info().packed == 0
    assert seq.pack().blocks == 8
    assert seq.unpack().blocks == 8
    assert same(seq, expected, 64)


def test_what_is_refused() -> None:
    with (
        tensormem.open() as client,
        client.kv_cache([KVGroup(1, heads=1, dim=CHUNK // 64)], max_tokens=64, max_sequences=2,
                        limit=CHUNK, block_tokens=8) as kv,
    ):  # fmt: skip
        seq = kv.sequence()
        seq.extend(16)
        with pytest.raises(errors.CacheFull):
            kv.sequence().extend(17)
        with pytest.raises(errors.TooManyTokens):
            seq.extend(49)
        other = kv.sequence()
        with pytest.raises(errors.TooManySequences):
            kv.sequence()
        with pytest.raises(errors.CacheInUse):
            kv.reset()
        other.close()
        with pytest.raises(errors.NoSuchSequence):
            other.extend(1)
        with pytest.raises(errors.NotHeld):
            seq.adopt(2, bytes(16))
        with pytest.raises(errors.InvalidArgument):
            client.kv_cache([KVGroup(1, heads=1, dim=3)], max_tokens=64, block_tokens=8)
        assert seq.length == 16


@pytest.mark.parametrize("order", range(4))
def test_no_order_of_dropping_ends_an_array(order: int) -> None:
    client = tensormem.open()
    kv = client.kv_cache(PLAIN, max_tokens=64, block_tokens=8)
    seq = kv.sequence()
    seq.extend(20)
    fill(seq, 3, 0, 20, seed=7)
    expected, k, part = seq.k(1).copy(), seq.k(1), seq.k(1)[9:]
    child = seq.fork()
    ends = [client.close, kv.close, lambda: None]
    random.Random(order).shuffle(ends)
    for end in ends:
        end()
        del end
        gc.collect()
        assert np.array_equal(k, expected)
    del client, kv, ends, child, seq
    gc.collect()
    assert np.array_equal(k, expected)
    del k
    gc.collect()
    assert np.array_equal(part, expected[9:])
    part[:] = 0  # a copy if it is shared, still
    assert read("kv/caches") == 1
    del part
    gc.collect()
    assert read("kv/caches") == read("kv/held") == 0


def test_another_process(kv: KVCache) -> None:
    """It makes the cache of a descriptor, finds what is published, and both go on."""
    ids = list(range(40))
    seq = kv.sequence()
    seq.extend(40)
    fill(seq, 3, 0, 40, seed=8)
    seq.publish(ids)
    expected = copies(seq, 3)
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    pid = os.fork()
    if pid == 0:
        try:
            _, ancillary, _, _ = theirs.recvmsg(1, socket.CMSG_SPACE(4))
            other = KVCache.from_fd(array.array("i", ancillary[0][2])[0], PLAIN)
            mine = other.sequence()
            assert mine.match([*ids, 1]) == 40
            assert same(mine, expected, 40)
            fill(mine, 3, 0, 40, seed=9)
            mine.extend(8)
        except BaseException:
            os._exit(1)
        os._exit(0)
    ours.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [kv.fileno()]))])
    assert os.waitpid(pid, 0)[1] == 0
    assert same(seq, expected, 40)


def test_events() -> None:
    with tensormem.open() as client, client.kv_cache(PLAIN, max_tokens=64, block_tokens=8, events=True) as kv:
        with kv.sequence(tenant=5) as seq:
            seq.extend(24)
            seq.publish(list(range(24)))
        kv.reset()
        events = list(kv.events(timeout=0))
        assert [(e.type, e.tenant, e.block) for e in events] == [
            ("stored", 5, 0), ("stored", 5, 1), ("stored", 5, 2), ("cleared", 0, 0),
        ]  # fmt: skip
        assert [e.parent for e in events[:3]] == [None, events[0].hash, events[1].hash]
