# SPDX-License-Identifier: MIT
"""KV caches: arrays, lifetimes, sharing and errors, on a cache that is a memfd."""

from __future__ import annotations

import ctypes
import errno
import gc
import itertools
import os
import random
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fake import FakeDevice
from fakekv import CHUNK, PAGE, POISON, FakeKV
from tensormem import (
    Client,
    KVCache,
    KVEvent,
    KVGroup,
    KVSequence,
    abi,
    errors,
)
from tensormem import kv as kv_module
from tensormem.device import KernelDevice

HERE = Path(__file__).parent

#: A page of one plane holds 16 tokens of these.
FULL = KVGroup(layers=2, heads=2, dim=PAGE // 64, dtype=np.float16)
TOKENS = 16
BLOCK = 4 * PAGE
WINDOW = KVGroup(layers=1, heads=2, dim=PAGE // 64, dtype=np.float16, window=24)
STATE = KVGroup(layers=1, dtype=np.float32, state=(3, 5))


def device_of(kv: KVCache) -> FakeKV:
    device = kv._session.device
    assert isinstance(device, FakeKV)
    return device


@pytest.fixture
def kv(client: Client) -> Iterator[KVCache]:
    with client.kv_cache([FULL], max_tokens=256, events=True) as kv:
        yield kv


def write(seq: KVSequence, begin: int, ids: npt.NDArray[np.int64]) -> None:
    """Give each token's K and V, in every layer, numbers of its own."""
    for layer in range(2):
        seq.k(layer)[begin : begin + len(ids)] = (ids % 1000)[:, None, None] + layer
        seq.v(layer)[begin : begin + len(ids)] = (ids % 1000)[:, None, None] + 1000 + layer


def check(seq: KVSequence, ids: npt.NDArray[np.int64]) -> None:
    assert seq.length == len(ids)
    for layer in range(2):
        want = np.broadcast_to((ids % 1000)[:, None, None] + layer, seq.k(layer).shape)
        np.testing.assert_array_equal(seq.k(layer), want)
        np.testing.assert_array_equal(seq.v(layer), want + 1000)


def put(seq: KVSequence, ids: list[int] | npt.NDArray[np.int64]) -> None:
    """Append tokens."""
    array = np.asarray(ids, np.int64)
    begin = seq.length
    seq.extend(len(array))
    write(seq, begin, array)


def ids(*parts: tuple[int, int]) -> list[int]:
    """Return token ids: of each part (first, how many)."""
    return [n for first, count in parts for n in range(first, first + count)]


# -- arrays ----------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False])
def test_arrays_are_the_memory_at_one_address(whole: bool) -> None:
    device = FakeDevice(window_mapping=whole)
    with Client(device) as client, client.kv_cache([FULL], max_tokens=256) as kv:
        fake = device_of(kv)
        one, seq = kv.sequence(), kv.sequence()
        assert len(fake.maps) == (1 if whole else 2)
        assert seq.length == 0
        assert seq.k(0).shape == (0, 2, PAGE // 64)
        assert seq.extend(5) == 5
        base = seq.k(1).ctypes.data
        assert seq.k(1).shape == (5, 2, PAGE // 64)
        assert seq.k(1).dtype == np.float16
        assert seq.k(1).flags.writeable
        assert seq.k(1).flags.c_contiguous
        assert not seq.k(1).any()
        seq.k(1)[:] = 7
        assert seq.extend(2 * TOKENS) == 5 + 2 * TOKENS
        assert seq.k(1).ctypes.data == base
        assert seq.k(1).shape[0] == seq.length == 5 + 2 * TOKENS
        assert (seq.k(1)[:5] == 7).all()
        assert not seq.k(1)[5:].any()
        seq.v(1)[36] = 3
        # where the header says: plane 2 is K of layer 1, plane 3 its V
        info, stride = seq.info(), 256 // TOKENS * PAGE
        assert info.offset == kv.info().sequence_size
        at = info.offset + 3 * stride + 36 * (PAGE // TOKENS)
        assert os.pread(fake.fd, 2, at) == np.float16(3).tobytes()
        at = info.offset + 2 * stride
        assert os.pread(fake.fd, 2, at) == np.float16(7).tobytes()
        one.extend(1)
        assert not one.k(1).any()


def test_layers_groups_and_states(client: Client) -> None:
    groups = [
        KVGroup([0, 2], 2, PAGE // 64),
        KVGroup([1], 4, PAGE // 64, np.int8, window=24),
        KVGroup(2, dtype="f4", state=(3, 5)),
        KVGroup(1, 1, PAGE // 64, np.float32),
    ]
    with client.kv_cache(groups, max_tokens=100) as kv:
        assert [g.layers for g in kv.groups] == [(0, 2), (1,), (2, 3), (4,)]
        seq = kv.sequence()
        with pytest.raises(errors.NotHeld, match="no state"):
            seq.state(2)
        seq.extend(70)
        arrays: list[npt.NDArray[Any]] = []
        for layer, shape, dtype in (
            (0, (2, PAGE // 64), np.float16),
            (2, (2, PAGE // 64), np.float16),
            (1, (4, PAGE // 64), np.int8),
            (4, (1, PAGE // 64), np.float32),
        ):
            for array in (seq.k(layer), seq.v(layer)):
                assert array.shape == (70, *shape)
                assert array.dtype == dtype
                arrays.append(array[seq.first(layer) :])
        for layer in (2, 3):
            assert seq.state(layer).shape == (3, 5)
            assert seq.state(layer).dtype == np.float32
            arrays.append(seq.state(layer))
        for i, array in enumerate(arrays):
            array[...] = i + 1
        for i, array in enumerate(arrays):
            assert (array == i + 1).all()
        assert [seq.first(n) for n in (0, 1, 2, 4)] == [0, 32, 0, 0]
        for wrong in (3, 5, -1):
            with pytest.raises(errors.InvalidArgument, match=f"no K and V for layer {wrong}"):
                seq.k(wrong)
        with pytest.raises(errors.InvalidArgument, match="no state for layer 0"):
            seq.state(0)


@pytest.mark.parametrize(
    ("group", "words"),
    [
        (KVGroup(0, 1, 1), "number of layers"),
        (KVGroup([], 1, 1), "no layers"),
        (KVGroup([1, 1], 1, 1), "layer 1 has its KV in two places"),
        (KVGroup([-1], 1, 1), "layer number of -1"),
        (KVGroup(1, 0, 1), "heads of 0"),
        (KVGroup(1, 1), "dim of 0"),
        (KVGroup(1, 1, 64, window=0), "window of 0"),
        (KVGroup(1, 1, 64, "nonsense"), "not a dtype"),
        (KVGroup(1, 1, 64, object), "no fixed bytes"),
        (KVGroup(1, 1 << 20, 1 << 20), "4 GiB"),
        (KVGroup(1, state=(0,)), "state's size of 0"),
        (KVGroup(1, 1.5, 64), "heads of 1.5 is not an integer"),  # type: ignore[arg-type]
    ],
)
def test_bad_groups(client: Client, group: KVGroup, words: str) -> None:
    with pytest.raises(errors.InvalidArgument, match=words):
        client.kv_cache([group], max_tokens=16)


def test_bad_caches(client: Client, device: FakeDevice) -> None:
    for kwargs, words in (
        ({"groups": []}, "0 groups"),
        ({"groups": [FULL] * 17}, "17 groups"),
        ({"max_tokens": 0}, "max_tokens of 0"),
        ({"max_tokens": 1 << 32}, "max_tokens"),
        ({"max_sequences": 65536}, "max_sequences"),
        ({"limit": 0}, "a limit of 0"),
        ({"block_tokens": 17}, f"17 tokens of {PAGE // 16} bytes.*multiple of 16"),
        ({"limit": 1, "groups": [KVGroup(16384, 2, PAGE // 64)]}, "at least one block"),
    ):
        arguments: dict[str, Any] = {"groups": [FULL], "max_tokens": 64} | kwargs
        with pytest.raises(errors.InvalidArgument, match=words):
            client.kv_cache(**arguments)
    assert not device.caches
    device.fail[abi.IOC_KV_CREATE] = errno.ENOTTY
    with pytest.raises(errors.IncompatibleModule, match="cannot make a KV cache"):
        client.kv_cache([FULL], max_tokens=64)
    device.fail[abi.IOC_KV_CREATE] = errno.EDQUOT
    with pytest.raises(errors.QuotaExceeded, match="quota of this client"):
        client.kv_cache([FULL], max_tokens=64)
    client.close()
    with pytest.raises(errors.Closed, match="open"):
        client.kv_cache([FULL], max_tokens=64)


def test_what_reaches_the_kernel(client: Client, device: FakeDevice) -> None:
    groups = [FULL, KVGroup(1, 2, PAGE // 64, np.int8, window=100), KVGroup(2, state=(4,))]
    with client.kv_cache(groups, 100, 3, limit=5 << 20, block_tokens=64) as kv:
        state = device_of(kv).state
        sent = [(g.rule, g.planes, g.token_bytes, g.window, g.element) for g in state.groups]
        assert sent == [
            (abi.KVRule.FULL, 4, PAGE // 16, 0, 2),
            (abi.KVRule.WINDOW, 2, PAGE // 32, 100, 1),
            (abi.KVRule.STATE, 2, 8, 0, 2),
        ]
        info = kv.info()
        assert (info.max_tokens, info.max_sequences, info.block_tokens) == (100, 3, 64)
        assert (kv.max_tokens, kv.max_sequences, kv.block_tokens) == (100, 3, 64)
        assert info.limit == 3 * CHUNK
        assert state.events is None


# -- lifetimes -------------------------------------------------------------------------


def test_a_closed_sequence_lives_as_long_as_its_arrays(kv: KVCache) -> None:
    seq = kv.sequence()
    put(seq, ids((0, 20)))
    view = seq.k(1)[3:5].reshape(-1)[::2]
    seq.close()
    assert seq.closed
    other = kv.sequence()
    put(other, ids((500, 20)))
    assert kv.info().sequences == 2
    assert set(view.tolist()) == {4, 5}
    calls: list[Callable[[], object]] = [
        seq.close, seq.fork, seq.info, seq.pack, seq.unpack, lambda: seq.k(0), lambda: seq.v(0),
        lambda: seq.extend(1), lambda: seq.truncate(0),
        lambda: seq.match([1]), lambda: seq.publish(range(20)), lambda: seq.adopt(0, bytes(16)),
        lambda: kv.extend([(other, 1), (seq, 1)]),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(errors.NoSuchSequence):
            call()
    assert other.length == 20
    view[:] = 9
    del view
    assert kv.info().sequences == 1
    check(other, np.arange(500, 520))


def test_a_dropped_sequence_closes_itself(kv: KVCache) -> None:
    seq = kv.sequence()
    seq.extend(3)
    keep = seq.k(0)
    keep[:] = 5
    del seq
    gc.collect()
    assert kv.info().sequences == 1
    assert (keep == 5).all()
    del keep
    assert kv.info().sequences == 0
    with kv.sequence() as seq:
        assert kv.info().sequences == 1
    assert kv.info().sequences == 0
    with kv.sequence() as seq:
        seq.close()  # the context manager does not mind


def test_a_closed_cache_lives_as_long_as_its_arrays(client: Client) -> None:
    kv = client.kv_cache([FULL], max_tokens=64)
    fake = device_of(kv)
    seq, idle = kv.sequence(), kv.sequence()
    put(seq, ids((0, 20)))
    idle.extend(1)
    array = seq.k(0)
    client.close()
    kv.close()
    kv.close()
    assert kv.closed
    assert seq.closed
    assert fake.fd >= 0
    assert len(fake.state.sequences) == 1
    assert array[7, 0, 0] == 7
    for call in (kv.info, kv.sequence, kv.reset, lambda: next(kv.events(0)), seq.info):
        with pytest.raises(errors.Closed, match=r"this KV cache is closed: make another"):
            call()
    with pytest.raises(errors.NoSuchSequence):
        seq.k(0)
    del array
    assert fake.fd == -1
    assert not fake.state.sequences


def test_a_dropped_cache_ends(client: Client) -> None:
    kv = client.kv_cache([FULL], max_tokens=64)
    fake = device_of(kv)
    seq = kv.sequence()
    seq.extend(1)
    array = seq.v(0)
    del kv
    gc.collect()
    assert fake.fd >= 0
    array[:] = 1
    del array, seq
    gc.collect()
    assert fake.fd == -1


def test_truncate_waits_for_arrays(kv: KVCache) -> None:
    state = device_of(kv).state
    seq = kv.sequence()
    put(seq, ids((0, 50)))
    (held,) = state.sequences.values()
    # within the block that is left: at once
    short = seq.k(0)[:10]
    seq.truncate(49)
    assert held.length == 49
    old = seq.v(1)
    seq.truncate(20)
    assert seq.length == seq.info().length == 20
    assert held.length == 49
    assert old.tolist()[48] == [[1049] * (PAGE // 64)] * 2
    check(seq, np.arange(20))
    with pytest.raises(errors.InvalidArgument):
        seq.truncate(21)
    # grows into what is there, then beyond
    put(seq, ids((700, 9)))
    assert (seq.length, held.length) == (29, 49)
    check(seq, np.array(ids((0, 20), (700, 9))))
    child = seq.fork()
    check(child, np.array(ids((0, 20), (700, 9))))
    put(seq, ids((800, 31)))
    assert (seq.length, held.length) == (60, 60)
    check(seq, np.array(ids((0, 20), (700, 9), (800, 31))))
    check(child, np.array(ids((0, 20), (700, 9))))
    old = seq.k(0)
    seq.truncate(0)
    calls: list[Callable[[], int]] = [lambda: seq.match([1]), lambda: seq.adopt(0, bytes(16))]
    for call in calls:
        with pytest.raises(errors.CacheInUse, match="arrays show tokens that were cut off"):
            call()
    assert held.length == 60
    del old
    del short
    assert seq.match([1, 2]) == 0
    assert held.length == 0


def test_truncate_of_a_window_and_of_a_state(client: Client) -> None:
    with client.kv_cache([WINDOW], max_tokens=256) as kv:
        seq = kv.sequence()
        seq.extend(70)
        assert seq.first(0) == 32
        seq.k(0)[32:] = 1
        view = seq.k(0)
        # without and with somebody in the way
        for _ in range(2):
            with pytest.raises(errors.NotHeld, match=r"to 55 tokens.*compute it"):
                seq.truncate(55)
            assert seq.length == 70
            assert seq.k(0)[69].all()
            view = seq.k(0)[:1]
        seq.truncate(60)
        assert seq.first(0) == 32
        assert view.shape[0] == 1
    with client.kv_cache([FULL, STATE], max_tokens=256) as kv:
        seq = kv.sequence()
        seq.extend(20)
        with pytest.raises(errors.NotHeld):
            seq.truncate(3)
        seq.truncate(20)
        state = seq.state(2)
        state[:] = 4
        with pytest.raises(errors.CacheInUse, match="arrays show its tokens"):
            seq.truncate(0)
        assert seq.length == 20
        assert (seq.state(2) == 4).all()
        del state
        seq.truncate(0)
        assert seq.length == 0
        seq.extend(1)
        assert not seq.state(2).any()
        seq.close()
        with pytest.raises(errors.NoSuchSequence):
            seq.state(2)


def test_random_lifetimes(client: Client) -> None:
    """No order of calls takes anything from an array, or leaves anything behind."""
    rng = random.Random(1)
    kv = client.kv_cache([FULL], max_tokens=128, max_sequences=6, limit=64 * BLOCK)
    fake = device_of(kv)
    seqs: list[tuple[KVSequence, list[int]]] = []
    views: list[tuple[npt.NDArray[Any], int]] = []
    refused = 0
    for step in range(3000):
        what = rng.choice(["open", "close", "drop", "fork", "extend", "truncate", "view", "forget"])
        seq, tokens = rng.choice(seqs) if seqs else (None, [])
        try:
            if what == "open":
                seqs.append((kv.sequence(), []))
            elif seq is None:
                continue
            elif what in ("close", "drop"):
                seqs = [pair for pair in seqs if pair[0] is not seq]
                if what == "close":
                    seq.close()
                seq = None
            elif what == "fork":
                at = rng.randint(0, len(tokens))
                seqs.append((seq.fork(at), tokens[:at]))
            elif what == "extend":
                fresh = [rng.randrange(1000) for _ in range(rng.randint(1, 40))]
                put(seq, fresh)
                tokens += fresh
            elif what == "truncate":
                del tokens[rng.randint(0, len(tokens)) :]
                seq.truncate(len(tokens))
            elif what == "view" and tokens:
                at = rng.randrange(len(tokens))
                views.append((seq.v(1)[at:], tokens[at] + 1001))
            elif what == "forget" and views:
                views.pop(rng.randrange(len(views)))
        except (errors.TooManySequences, errors.TooManyTokens):
            refused += 1
        for each, what_it_has in seqs:
            assert each.length == len(what_it_has)
        if step % 20 == 0:
            for each, what_it_has in seqs:
                check(each, np.array(what_it_has, np.int64))
            for array, _ in views:
                assert array.tobytes().count(bytes([POISON]) * 64) == 0
    assert refused > 50
    views += [(each.k(0), 0) for each, tokens in seqs if tokens]
    assert views
    kv.close()
    for array, _ in views:
        assert POISON not in array[0].tobytes()
    seq = None
    del seqs, each
    gc.collect()
    views.clear()
    assert fake.fd >= 0  # for one array
    del array
    gc.collect()
    assert fake.fd == -1
    assert not fake.state.sequences


def test_random_windows(client: Client) -> None:
    """What a window still has is right, whatever arrays are in the way of truncation."""
    rng = random.Random(2)
    kv = client.kv_cache([WINDOW], max_tokens=160, limit=64 * BLOCK)
    held = kv.sequence()
    tokens: list[int] = []
    views: list[npt.NDArray[Any]] = []
    counts = dict.fromkeys((errors.NotHeld, errors.CacheInUse, errors.TooManyTokens), 0)
    for _ in range(4000):
        try:
            match rng.randrange(6):
                case 0 | 1:
                    fresh = [rng.randrange(1, 200) for _ in range(rng.randint(1, 30))]
                    held.extend(len(fresh))
                    held.v(0)[len(tokens) :] = np.array(fresh)[:, None, None]
                    tokens += fresh
                case 2:
                    at = rng.choice([0, len(tokens), rng.randint(0, len(tokens))])
                    held.truncate(at)
                    del tokens[at:]
                case 3:
                    views.append(held.v(0)[-1:])
                case 4 | 5 if views:
                    views.pop()
        except tuple(counts) as error:
            counts[type(error)] += 1
        first = held.first(0)
        assert held.length == len(tokens)
        assert first <= max(0, len(tokens) - 24)
        np.testing.assert_array_equal(held.v(0)[first:, 1, 2], tokens[first:])
    assert min(counts.values()) > 30, counts


def test_in_a_child_process(kv: KVCache) -> None:
    fake = device_of(kv)
    seq = kv.sequence()
    put(seq, ids((0, 3)))
    lock = seq._place.lock
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            # the lock that a thread of the parent holds is a new one here
            seq.v(0)[1] = 44
            try:
                seq.close()
            except errors.NotPermitted:
                calls = len(fake.calls)
                mine = seq.fork()
                mine.close()
                del seq
                gc.collect()
                code = 0 if fake.calls[calls:] == [abi.IOC_KV_FORK, abi.IOC_KV_CLOSE] else 2
        finally:
            os._exit(code)
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert seq.v(0)[1, 0, 0] == 44
    seq.close()


def test_nothing_is_said_at_exit() -> None:
    code = textwrap.dedent("""
        import numpy as np
        from fake import FakeDevice
        from tensormem import Client, KVGroup
        kv = Client(FakeDevice()).kv_cache([KVGroup(2, 2, 64, np.float32)], max_tokens=64)
        seq = kv.sequence()
        seq.extend(3)
        array = seq.k(0)
        loop = [array]
        loop.append(loop)
        print(array.sum())
    """)
    result = subprocess.run(
        [sys.executable, "-X", "dev", "-c", code],
        env={**os.environ, "PYTHONPATH": f"{HERE.parent / 'src'}:{HERE}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "0.0\n", "")


def test_no_address_space_for_a_sequence() -> None:
    with Client(FakeDevice(window_mapping=False)) as client:
        kv = client.kv_cache([FULL], max_tokens=64)
        seq = kv.sequence()
        seq.extend(1)
        device_of(kv).fail_map = True
        for call in (kv.sequence, seq.fork):
            with pytest.raises(errors.OutOfMemory, match=r"cannot map .* of a sequence.*ulimit"):
                call()
        assert kv.info().sequences == 1
        kv.close()


# -- sharing ---------------------------------------------------------------------------


def test_fork(kv: KVCache) -> None:
    seq = kv.sequence(tenant=7)
    put(seq, ids((0, 40)))
    child = seq.fork()
    early = seq.fork(at=TOKENS)
    assert child.tenant == 7
    put(seq, ids((100, 4)))
    put(child, ids((200, 30)))
    check(seq, np.array(ids((0, 40), (100, 4))))
    check(child, np.array(ids((0, 40), (200, 30))))
    check(early, np.arange(TOKENS))
    info = early.info()
    assert info.held == info.shared == BLOCK
    assert child.info().shared == 2 * BLOCK
    child.k(0)[0] = 999
    assert seq.k(0)[0, 0, 0] == 0
    for at in (45, -1, 1 << 40):
        with pytest.raises(errors.InvalidArgument, match="a length of"):
            seq.fork(at)


def test_hashes_are_as_documented(kv: KVCache, client: Client) -> None:
    tokens = ids((1 << 40, 2 * TOKENS + 5))
    seq = kv.sequence(tenant=3)
    put(seq, tokens)
    assert seq.publish(tokens) == 2

    def digest(*parts: bytes) -> bytes:
        return blake2b(b"".join(parts), digest_size=16, person=b"tensormem-kv").digest()

    root = digest()
    first = digest(root, np.array(tokens[:TOKENS], "<i8").tobytes())
    second = digest(first, np.array(tokens[TOKENS : 2 * TOKENS], "<i8").tobytes())
    assert list(kv.events(timeout=0)) == [
        KVEvent("stored", 3, 0, first, 0, None),
        KVEvent("stored", 3, 0, second, 1, first),
    ]
    with client.kv_cache([FULL], 64, hash_seed=b"salt", events=True) as salted:
        seq = salted.sequence()
        put(seq, tokens)
        seq.publish(tokens)
        event = next(salted.events(0))
        assert event.hash == digest(digest(b"salt"), np.array(tokens[:TOKENS], "<i8").tobytes())


def test_match_of_whole_blocks(kv: KVCache) -> None:
    tokens = ids((0, 3 * TOKENS + 2))
    with kv.sequence(tenant=1) as seq:
        put(seq, tokens)
        assert seq.publish(tokens) == 3
        assert seq.publish(tokens) == 0
    for own, count in (
        (tokens, 3 * TOKENS),
        (tokens[: 3 * TOKENS], 2 * TOKENS),  # one token is left to compute
        (tokens[: 3 * TOKENS + 1], 3 * TOKENS),
        (tokens[: TOKENS + 5], TOKENS),
        (tokens[:TOKENS], 0),
        (tokens[:1], 0),
        ([], 0),
        (tokens[1:], 0),
        ([*tokens[: 2 * TOKENS], 5, *tokens[2 * TOKENS + 1 :]], 2 * TOKENS),
    ):
        for form in (own, tuple(own), np.array(own, np.uint16), np.array(own, np.int64)):
            seq = kv.sequence(tenant=1)
            assert seq.match(form, partial=False) == count
            check(seq, np.arange(count))
            # what was matched goes on as what was computed does
            put(seq, ids((count, 4 * TOKENS - count)))
            assert seq.publish(ids((0, 4 * TOKENS))) == 4 - count // TOKENS
            seq.close()
    with kv.sequence(tenant=2) as seq:
        assert seq.match(tokens) == 0
    with kv.sequence(tenant=1) as seq:
        put(seq, [1])
        with pytest.raises(errors.InvalidArgument, match="has 1 tokens already"):
            seq.match(tokens)


def test_match_of_a_part_of_a_block(kv: KVCache) -> None:
    seq = kv.sequence()
    base = ids((0, 2 * TOKENS))
    put(seq, base)
    seq.publish(base)
    # two that go on otherwise, and one of another tenant that would match further
    for tenant, tail in ((0, ids((100, 4), (900, 12))), (0, ids((100, 9), (800, 7))),
                         (9, ids((100, 16)))):  # fmt: skip
        other = kv.sequence(tenant)
        put(other, base + tail)
        other.publish(base + tail)
        other.close()
    for tail, count in (
        (ids((100, 30)), 9),
        (ids((100, 9), (800, 30)), 9 + 7),
        (ids((100, 6)), 5),  # one is left to compute
        (ids((100, 4), (1, 9)), 4),
        (ids((100, 4), (900, 12)), 15),
        (ids((99, 30)), 0),
        (ids((100, 1)), 0),
        ([], -1),
    ):
        other = kv.sequence()
        found = other.match(base + tail)
        if count == -1:  # the last block itself, but for one token
            assert found == 2 * TOKENS - 1
            check(other, np.arange(2 * TOKENS - 1))
            continue
        assert found == 2 * TOKENS + count
        check(other, np.array((base + tail)[:found]))
        assert other.publish(base + tail) == 0
        assert kv.sequence().match(base + tail, partial=False) == found // TOKENS * TOKENS
        other.close()
        gc.collect()


def test_a_part_of_a_block_that_was_evicted_is_forgotten(client: Client) -> None:
    with client.kv_cache([FULL], 256, limit=CHUNK) as kv:
        blocks = CHUNK // BLOCK
        with kv.sequence() as seq:
            put(seq, ids((0, TOKENS)))
            seq.publish(ids((0, TOKENS)))
        assert len(kv._known.blocks) == 1
        kept = []
        for _ in range(blocks // 16):
            kept.append(kv.sequence())
            kept[-1].extend(256)
        assert kv.info().evictions == 1
        kept.pop().close()
        seq = kv.sequence()
        assert seq.match(ids((0, 10))) == 0
        assert not kv._known.blocks
        assert not kv._known.children
        # no room for a copy is no reason to fail
        put(seq, ids((0, TOKENS)))
        seq.publish(ids((0, TOKENS)))
        kept.append(kv.sequence())
        kept[-1].extend(240)
        assert kv.info().used == kv.info().limit
        with kv.sequence() as last:
            assert last.match(ids((0, 10))) == 0
        assert len(kv._known.blocks) == 1


def test_what_is_known_of_blocks_is_bounded(client: Client) -> None:
    with client.kv_cache([FULL], 256, limit=CHUNK) as kv:
        most = CHUNK // BLOCK
        for i in range(2 * most):
            with kv.sequence() as seq:
                tokens = ids((i * TOKENS, TOKENS))
                put(seq, tokens)
                seq.publish(tokens)
            assert len(kv._known.blocks) == min(i + 1, most)
        ids_of_root = kv._known.children[0, kv._seed]
        assert [len(x) for x in ids_of_root] == [most, most]
        with kv.sequence() as seq:
            assert seq.match(tokens[:9]) == 8
        kv.reset()
        assert not kv._known.blocks


def test_known_blocks_against_a_naive_search() -> None:
    rng = random.Random(3)
    known = kv_module._Known(60)
    blocks: dict[tuple[int, bytes], tuple[int, ...]] = {}

    def raw(tokens: tuple[int, ...]) -> bytes:
        return np.array(tokens, "<i8").tobytes()

    for _ in range(4000):
        # few values, some of whose bytes alone would be a longer match than the tokens
        tokens = tuple(rng.choice([0, 1, 256, 257, 1 << 56, -1]) for _ in range(8))
        parent = bytes([rng.randrange(3)])
        action = rng.random()
        if action < 0.3:
            name = parent + raw(tokens)
            known.add(0, parent, name, raw(tokens))
            blocks[0, name] = tokens
            while len(blocks) > 60:
                blocks = {key: blocks[key] for key in known.blocks}
        elif action < 0.4 and blocks:
            key = rng.choice(list(blocks))
            known.drop(*key)
            del blocks[key]
        else:
            cut = tokens[: rng.randint(1, 8)]

            def common(other: tuple[int, ...], cut: tuple[int, ...] = cut) -> int:
                pairs = itertools.takewhile(lambda p: p[0] == p[1], zip(other, cut, strict=False))
                return len(list(pairs))

            best = max((common(t) for (_, n), t in blocks.items() if n[:1] == parent), default=0)
            count, name = known.find(0, parent, raw(cut))
            assert count == best
            if count:
                assert common(blocks[0, name]) == best
    assert set(known.blocks) == set(blocks)
    assert sum(len(names) for _, names in known.children.values()) == len(blocks)


def test_removed_events_are_heeded(client: Client) -> None:
    with client.kv_cache([FULL], 256, limit=CHUNK, events=True) as kv:
        with kv.sequence() as seq:
            put(seq, ids((0, 2 * TOKENS)))
            seq.publish(ids((0, 2 * TOKENS)))
        device_of(kv).state.evict()
        assert [e.type for e in kv.events(0)] == ["stored", "stored", "removed"]
        assert len(kv._known.blocks) == 1
        kv.reset()
        with kv.sequence() as seq:
            put(seq, ids((0, 16)))
            seq.publish(ids((0, 16)))
        assert [e.type for e in kv.events(0)] == ["cleared", "stored"]
        # what is known is at most too little
        assert not kv._known.blocks


def test_publish_by_and_by(kv: KVCache) -> None:
    tokens = ids((0, 100))
    seq = kv.sequence()
    count = 0
    for i in range(100):
        put(seq, [i])
        # the next token is known already, its KV is not there
        count += seq.publish(tokens[: i + 2])
        assert count == (i + 1) // TOKENS
    seq.extend(12)
    with pytest.raises(errors.InvalidArgument, match="first 96 tokens are not those"):
        seq.publish([*tokens[1:], *range(20)])
    seq.truncate(40)
    put(seq, ids((500, 72)))
    assert seq.publish(tokens[:40] + ids((500, 72))) == 5
    child = seq.fork(70)
    put(child, ids((600, 30)))
    assert child.publish(tokens[:40] + ids((500, 30), (600, 30))) == 2
    for tail, count in ((ids((500, 73)), 112), (ids((500, 30), (600, 27)), 96)):
        with kv.sequence() as other:
            assert other.match(tokens[:40] + tail, partial=False) == count
            check(other, np.array((tokens[:40] + tail)[:count]))
    seq = kv.sequence()
    seq.extend(100)
    for wrong in ([0.5] * 120, [[1] * 120] * 120, ["a"] * 120, [1 << 70] * 120):
        with pytest.raises(errors.InvalidArgument, match="not a list of token ids"):
            seq.publish(wrong)  # type: ignore[arg-type]


def test_publish_and_match_in_several_calls(client: Client) -> None:
    # the fake takes four items in one call
    with client.kv_cache([FULL], 256) as kv:
        tokens = ids((0, 256))
        with kv.sequence() as seq:
            put(seq, tokens)
            assert seq.publish(tokens) == 16
        seq = kv.sequence()
        assert seq.match([*tokens, 1], partial=False) == 240
        check(seq, np.arange(240))
        device_of(kv).state.evict()  # the last block
        calls = device_of(kv).calls
        assert [calls.count(n) for n in (abi.IOC_KV_PUBLISH, abi.IOC_KV_LOOKUP)] == [4, 1]


def test_adopt(kv: KVCache) -> None:
    donor = kv.sequence()
    put(donor, ids((0, 48)))
    donor.publish(ids((0, 48)))
    names = [e.hash for e in kv.events(0)]
    seq = kv.sequence()
    put(seq, ids((100, 32)))
    assert seq.adopt(0, names[2]) == 32
    assert seq.adopt(2, names[1]) == 48
    assert seq.adopt(3, names[0], tokens=5) == 53
    want = ids((32, 16), (116, 16), (16, 16), (0, 5))
    check(seq, np.array(want))
    # the blocks have names already; only what is between gets one
    assert seq.publish(want) == 1
    with pytest.raises(errors.NotHeld, match=r"cannot adopt block 0.*compute it"):
        seq.adopt(0, bytes(16))
    for index, count in ((3, None), (0, 3), (9, None), (4, None)):
        with pytest.raises(errors.InvalidArgument):
            seq.adopt(index, names[0], count)
    for wrong in (b"", bytes(15), bytes(17)):
        with pytest.raises(errors.InvalidArgument, match="pass 16 bytes"):
            seq.adopt(0, wrong)
    with pytest.raises(errors.InvalidArgument, match="number of tokens"):
        seq.adopt(3, names[0], TOKENS + 1)
    check(seq, np.array(want))
    # cut off, the block is no longer a foreign one
    seq.truncate(0)
    put(seq, ids((300, 16)))
    assert seq.publish(ids((300, 16))) == 1
    assert kv.sequence(1).tenant == 1
    with kv.sequence(1) as other, pytest.raises(errors.NotHeld):
        other.adopt(0, names[0])


def test_match_with_windows_and_states(client: Client) -> None:
    with client.kv_cache([FULL, WINDOW], 256) as kv:
        tokens = ids((0, 96))
        with kv.sequence() as seq:
            for begin in range(0, 96, TOKENS):
                put(seq, tokens[begin : begin + TOKENS])
                seq.k(2)[begin:] = np.array(tokens[begin : begin + TOKENS])[:, None, None]
                seq.publish(tokens[: begin + TOKENS])
        other = kv.sequence()
        assert other.match([*tokens, 5]) == 96
        assert other.first(2) == 64
        assert (other.k(2)[64:, 0, 0] == np.arange(64, 96)).all()
        check(other, np.arange(96))
    with client.kv_cache([FULL, STATE], 256) as kv:
        with kv.sequence() as seq:
            for begin in (0, 16, 32):
                put(seq, tokens[begin : begin + 16])
                seq.state(2)[:] = begin
                # never at the end of the second block
                if begin != 16:
                    seq.publish(tokens[: begin + 16])
        other = kv.sequence()
        assert other.match(tokens[:40]) == 16  # and no part of a block
        assert (other.state(2) == 0).all()
        third = kv.sequence()
        assert third.match(tokens[:50]) == 48
        assert (third.state(2) == 32).all()
        third.state(2)[:] = 1
        assert (other.state(2) == 0).all()


def test_from_fd(kv: KVCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process: a descriptor of its own, and nothing but the groups known."""
    state = device_of(kv).state
    monkeypatch.setattr(KernelDevice, "of", lambda fd: FakeKV(state))
    seq = kv.sequence()
    put(seq, ids((0, 40)))
    seq.publish(ids((0, 40)))
    with KVCache.from_fd(99, [FULL]) as there:
        assert there.fileno() != kv.fileno()
        other = there.sequence()
        assert other.match(ids((0, 50))) == 32  # parts are known to who published them
        check(other, np.arange(32))
        assert kv.info().sequences == there.info().sequences == 2
    assert kv.info().sequences == 1
    users = state.users
    for groups in ([WINDOW], [FULL, FULL], [KVGroup(2, 2, PAGE // 32)]):
        with pytest.raises(errors.InvalidArgument):
            KVCache.from_fd(99, groups)
    assert state.users == users


def test_from_fd_of_something_else() -> None:
    fd = os.open("/dev/null", os.O_RDWR)
    with pytest.raises(errors.IncompatibleModule):
        KVCache.from_fd(fd, [FULL])
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


# -- together, limits and questions ----------------------------------------------------


def test_extend_of_several(kv: KVCache, client: Client) -> None:
    a, b, c = (kv.sequence() for _ in range(3))
    assert kv.extend([(b, 3), (a, 20), (c, 1)]) == [3, 20, 1]
    assert [s.length for s in (a, b, c)] == [20, 3, 1]
    calls = device_of(kv).calls
    assert calls.count(abi.IOC_KV_EXTEND_BATCH) == 1
    assert abi.IOC_KV_EXTEND not in calls
    with pytest.raises(errors.TooManyTokens, match=f"extend sequence {a.handle} to 257 tokens"):
        kv.extend([(b, 3), (a, 237), (c, 1)])
    assert [s.info().length for s in (a, b, c)] == [20, 3, 1]
    # one of them has what it asks for
    put(c, ids((5, 99)))
    old = c.k(0)
    c.truncate(1)
    assert kv.extend([(c, 50), (a, 1), (b, 1)]) == [51, 21, 4]
    assert kv.extend([(c, 50), (a, 1)]) == [101, 22]
    assert old.shape[0] == 100
    assert kv.extend([]) == []
    for items, words in (
        ([(a, 1), (a, 1)], "twice"),
        ([(a, 0)], "number of tokens of 0"),
        ([(a, 1), (b, -1)], "number of tokens"),
        ([(kv.sequence(), 1) for _ in range(5)], "at most 4"),
    ):
        with pytest.raises(errors.InvalidArgument, match=words):
            kv.extend(items)
    with client.kv_cache([FULL], 16) as another:
        stranger = another.sequence()
        with pytest.raises(errors.InvalidArgument, match="another KV cache"):
            kv.extend([(a, 1), (stranger, 1)])
    assert a.length == 22
    with pytest.raises(errors.TooManyTokens):
        a.extend((1 << 32) - 1)


def test_batches_in_both_orders_do_not_block_each_other(kv: KVCache) -> None:
    a, b = kv.sequence(), kv.sequence()

    def work(items: list[tuple[KVSequence, int]]) -> None:
        for _ in range(100):
            kv.extend(items)

    threads = [threading.Thread(target=work, args=([(x, 1), (y, 1)],)) for x, y in ((a, b), (b, a))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert (a.length, b.length) == (200, 200)


def test_full(client: Client) -> None:
    with client.kv_cache([FULL], 256, max_sequences=9, limit=CHUNK) as kv:
        seqs = [kv.sequence() for _ in range(9)]
        with pytest.raises(errors.TooManySequences, match="begin a sequence") as info:
            kv.sequence()
        assert info.value.errno == errno.ENOBUFS
        with pytest.raises(errors.TooManySequences):
            seqs[0].fork()
        for seq in seqs[:8]:
            seq.extend(256)
        seqs[8].close()
        extra = kv.sequence()
        with pytest.raises(errors.CacheFull, match=r"to 1 tokens, the KV cache is at its limit"):
            extra.extend(1)
        assert extra.length == 0
        with pytest.raises(MemoryError):
            kv.extend([(extra, 1)])
        with pytest.raises(errors.CacheInUse, match="hold blocks"):
            kv.reset()


def test_errors_say_what_failed(kv: KVCache) -> None:
    seq = kv.sequence()
    seq.extend(20)
    fail = device_of(kv).fail
    calls: dict[int, Callable[[], object]] = {
        abi.IOC_KV_OPEN: kv.sequence,
        abi.IOC_KV_EXTEND: lambda: seq.extend(1),
        abi.IOC_KV_TRUNCATE: lambda: seq.truncate(1),
        abi.IOC_KV_FORK: lambda: seq.fork(1),
        abi.IOC_KV_PUBLISH: lambda: seq.publish(range(20)),
        abi.IOC_KV_ADOPT: lambda: seq.adopt(0, bytes(16)),
        abi.IOC_KV_QUERY: seq.info,
        abi.IOC_KV_PACK: seq.pack,
        abi.IOC_KV_INFO: kv.info,
    }
    for request, call in calls.items():
        for number in (errno.ENOMEM, errno.EDQUOT, errno.EINTR, errno.EXDEV):
            fail[request] = number
            with pytest.raises(errors.TensormemError) as info:
                call()
            assert info.value.errno == number
            del fail[request]
    assert seq.length == 20
    assert seq.publish(range(20)) == 1
    fail[abi.IOC_KV_LOOKUP] = errno.ENOMEM
    with kv.sequence() as other, pytest.raises(errors.OutOfMemory, match="look up a prefix"):
        other.match(range(20))
    fail.clear()
    fail[abi.IOC_KV_CLOSE] = errno.ENOENT
    with pytest.raises(errors.NoSuchSequence, match="cannot close a sequence"):
        seq.close()


def test_pack(kv: KVCache) -> None:
    seq = kv.sequence()
    put(seq, ids((0, 40)))
    assert seq.pack() == (2, 2 * BLOCK, BLOCK)
    info = kv.info()
    assert (info.packed, info.unpacked, info.packing) == (BLOCK, 2 * BLOCK, 0.5)
    assert (seq.info().packed, seq.info().unpacked) == (BLOCK, 2 * BLOCK)
    done = seq.unpack()
    assert (done.blocks, done.before, done.after) == (2, BLOCK, 2 * BLOCK)
    assert kv.info().packing is None
    assert (kv.info().packs, kv.info().unpacks) == (2, 2)
    device_of(kv).state.codec = False
    with pytest.raises(errors.NoCodec, match="modprobe zstd"):
        seq.pack()
    assert seq.unpack().blocks == 0


def test_info_and_events(kv: KVCache, client: Client) -> None:
    assert kv.info().hit_rate is None
    seq = kv.sequence()
    put(seq, ids((0, 20)))
    seq.publish(ids((0, 20)))
    with kv.sequence() as other:
        other.match(ids((0, 40)), partial=False)
    info = kv.info()
    assert (info.lookups, info.hits, info.hit_rate) == (2, 1, 0.5)
    assert (info.used, info.cached, info.sequences) == (2 * BLOCK, 0, 1)
    seq.close()
    info = kv.info()
    assert (info.used, info.cached, info.sequences) == (BLOCK, BLOCK, 0)
    assert info.sequence_size * info.max_sequences == info.window_size
    assert len(list(kv.events(0))) == 1
    assert list(kv.events(0)) == []
    with (
        client.kv_cache([FULL], 16) as silent,
        pytest.raises(errors.InvalidArgument, match="events=True"),
    ):
        next(silent.events(0))
    assert ctypes.sizeof(abi.KVEvent) == 56
    assert repr(kv).startswith(f"<KVCache fd {kv.fileno()}")
    assert repr(seq).endswith(", closed>")


def test_reading_a_real_descriptor() -> None:
    ours, theirs = os.pipe()
    device = KernelDevice.of(ours)
    assert device.fileno() == ours
    assert device.read(8, 0) == b""
    assert device.read(8, 0.001) == b""
    os.write(theirs, b"0123456789")
    assert device.read(8, None) == b"01234567"
    assert device.read(8, 0) == b"89"
    os.set_blocking(ours, False)
    os.close(theirs)
    assert device.read(8, None) == b""
    other = device.other(os.dup(ours))
    device.close()
    device.close()
    assert device.fileno() == -1
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(ours)
    other.close()


def test_tenants_are_64_bits(kv: KVCache) -> None:
    top = kv.sequence((1 << 64) - 1)
    put(top, ids((0, 20)))
    top.publish(ids((0, 20)))
    assert next(kv.events(0)).tenant == (1 << 64) - 1
    for wrong in (-1, 1 << 64, "a"):
        with pytest.raises(errors.InvalidArgument, match="a tenant"):
            kv.sequence(wrong)  # type: ignore[arg-type]
