# SPDX-License-Identifier: MIT
"""Tensors below a page: objects of a slab, in pages of one client."""

from __future__ import annotations

import errno
import itertools
import os
import random

import pytest

from conftest import USAGE, settled
from device import CHUNK, KINDS, PAGE, Raw, address_of, read, wait_for, write
from process import hold, killed_at_random, let_go
from tensormem import abi

SLAB, NOZERO = abi.Pool.SLAB, abi.AllocFlag.NOZERO
HALF = PAGE // 2


def alignment(client: Raw, size: int) -> int:
    """What the header promises for a tensor below a page."""
    return min(1 << (size - 1).bit_length(), client.info().cache_line)


@pytest.mark.parametrize("size", [1, 7, 8, 9, 24, 63, 64, 65, 100, 129, 700, 1000, HALF - 1, HALF])
def test_objects(raw: Raw, size: int) -> None:
    items = [raw.alloc(size) for _ in range(50)]
    spans = []
    for item in items:
        query = raw.query(item.handle)[1]
        assert (query.pool, query.size, query.offset) == (SLAB, size, item.offset)
        assert size <= query.held == query.length < PAGE
        assert (query.nr_chunks, query.nr_runs, query.mapping) == (0, 0, abi.Mapping.PAGES)
        assert item.offset % alignment(raw, size) == 0
        spans.append((item.offset, query.held))
    spans.sort()
    assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(spans))
    info = raw.info()
    assert info.nr_tensors == 50
    assert info.kept == 0
    assert info.used == read("clients/bytes") == read("buddy/used_pages") * PAGE
    assert sum(n for _, n in spans) <= info.used
    # many share a page
    assert info.used <= max(8 * PAGE, 2 * sum(n for _, n in spans))
    assert raw.free_batch([item.handle for item in items])[0] == 0
    assert (raw.info().used, read("buddy/used_pages")) == (0, 0)


def test_what_is_no_object(raw: Raw) -> None:
    """What has to be pinned or placed has pages of its own; KV is mapped and shared by the page."""
    for how in ({"kind": abi.Kind.KV}, {"flags": abi.AllocFlag.PINNED},
                {"numa": abi.Numa.LOCAL}, {"numa": abi.Numa.BIND, "nodes": 1}):  # fmt: skip
        query = raw.query(raw.alloc(100, **how).handle)[1]
        assert (query.pool, query.held, query.nr_runs) == (abi.Pool.BUDDY, PAGE, 1)
    for how in ({"flags": abi.AllocFlag.PINNED}, {"numa": abi.Numa.LOCAL},
                {"numa": abi.Numa.INTERLEAVE}):  # fmt: skip
        assert raw.try_alloc(100, pool=SLAB, **how)[0] == errno.EINVAL
    for size in (PAGE, PAGE + 1, CHUNK):
        assert raw.try_alloc(size, pool=SLAB)[0] == errno.EINVAL
    # by name all kinds may, and above half a page too
    for kind in KINDS:
        assert raw.query(raw.alloc(HALF + 1, kind, pool=SLAB).handle)[1].pool == SLAB
        assert raw.query(raw.alloc(100, kind, pool=SLAB).handle)[1].pool == SLAB


@pytest.mark.parametrize("seed", range(3))
def test_contents(raw: Raw, seed: int) -> None:
    """Zero at first, its own until it is freed, and no neighbour's."""
    dice = random.Random(seed)
    window = raw.map_window()
    live: dict[int, tuple[abi.Alloc, bytes]] = {}
    for _ in range(1500):
        if live and dice.random() < 0.48:
            item, data = live.pop(dice.choice(list(live)))
            assert window[item.offset : item.offset + item.size] == data
            assert raw.free(item.handle) == 0
        else:
            size = dice.choice((1, 8, 40, 64, 200, 513, 1500, HALF))
            item = raw.alloc(size)
            assert window[item.offset : item.offset + size] == bytes(size)
            data = dice.randbytes(size)
            window[item.offset : item.offset + size] = data
            live[item.handle] = item, data
    for item, data in live.values():
        assert window[item.offset : item.offset + item.size] == data
        assert raw.free(item.handle) == 0
    assert raw.info().used == 0
    window.close()


def test_two_clients_share_no_page(raw: Raw) -> None:
    """What one writes all over its page the other does not see."""
    with Raw() as other:
        mine, theirs = raw.alloc(64), other.alloc(64)
        a = raw.map(PAGE, mine.offset // PAGE * PAGE)
        b = other.map(PAGE, theirs.offset // PAGE * PAGE)
        assert a[:] == b[:] == bytes(PAGE)
        a[:] = b"\xaa" * PAGE
        assert b[:] == bytes(PAGE)
        assert other.map_errno(PAGE, mine.offset + CHUNK) == errno.ENOENT
        a.close()
        b.close()
    # the pages come back zero, also between the objects
    with Raw() as other:
        items = [other.alloc(64) for _ in range(4 * PAGE // 64)]
        for page in {item.offset // PAGE * PAGE for item in items}:
            mapping = other.map(PAGE, page)
            assert mapping[:] == bytes(PAGE)
            mapping.close()


def test_nozero_objects(raw: Raw) -> None:
    """They may show what this client left, and are zero without the flag."""
    window = raw.map_window()
    anchor = raw.alloc(64)  # keeps the slab
    item = raw.alloc(64)
    window[item.offset : item.offset + 64] = b"\x99" * 64
    assert raw.free(item.handle) == 0
    item = raw.alloc(64, flags=NOZERO)
    assert set(window[item.offset : item.offset + 64]) <= {0, 0x99}
    window[item.offset : item.offset + 64] = b"\x99" * 64
    assert raw.free(item.handle) == 0
    assert raw.info().kept == 0
    for _ in range(PAGE // 64):
        item = raw.alloc(64)
        assert window[item.offset : item.offset + 64] == bytes(64)
    assert raw.query(anchor.handle)[0] == 0
    window.close()


def test_the_quota_and_the_capacity(raw: Raw, settings: None) -> None:
    assert raw.set_quota(PAGE - 1) == 0
    assert raw.try_alloc(64)[0] == errno.EDQUOT
    assert raw.info().used == 0
    assert raw.set_quota(PAGE) == 0
    count = 0
    while raw.try_alloc(64)[0] == 0:
        count += 1
    assert count == PAGE // 64
    assert raw.try_alloc(64)[0] == errno.EDQUOT
    with Raw() as other:
        assert write("chunk/reserve", 0) == 0
        assert write("chunk/capacity", 0) == 0
        assert other.try_alloc(PAGE)[0] in (0, errno.ENOSPC)
        while other.try_alloc(PAGE)[0] == 0:
            pass
        assert other.try_alloc(64)[0] == errno.ENOSPC


def test_batches(raw: Raw) -> None:
    sizes = [random.Random(1).randrange(1, HALF) for _ in range(500)]
    result, batch, items = raw.alloc_batch(sizes, abi.Kind.ACTIVATIONS)
    assert (result, batch.failed) == (0, 500)
    assert len({item.offset for item in items}) == 500
    used = raw.info().used
    requests = (abi.Alloc * 10)(
        *(abi.Alloc(size=64, kind=abi.Kind.WEIGHTS) for _ in range(9)), abi.Alloc(size=64, kind=9)
    )
    result, batch = raw.batch(abi.IOC_ALLOC_BATCH, requests)
    assert (result, batch.failed) == (errno.EINVAL, 9)
    assert (raw.info().used, raw.info().nr_tensors) == (used, 500)
    handles = [item.handle for item in items]
    assert raw.free_batch([*handles, handles[3]])[0] == errno.ENOENT
    assert raw.info().nr_tensors == 500
    assert raw.free_batch(handles)[0] == 0
    assert raw.info().used == 0


def test_a_page_that_is_held_waits(raw: Raw) -> None:
    item = raw.alloc(64)
    mapping = raw.map(PAGE, item.offset // PAGE * PAGE)
    mapping[:] = b"\x31" * PAGE
    pipe = hold(address_of(mapping), PAGE)
    mapping.close()
    assert raw.free(item.handle) == 0
    assert read("chunk/quarantined") >= 1
    assert raw.info().kept == raw.info().used == read("chunk/quarantined") * PAGE
    assert os.read(pipe[0], PAGE) == b"\x31" * PAGE
    let_go(pipe)
    wait_for(lambda: read("chunk/quarantined") == 0)
    assert raw.info().used == 0


def test_close_with_others_beside_them() -> None:
    """Slabs, tensors and what is kept lie side by side in the window, and go together."""
    dice = random.Random(19)
    for _ in range(20):
        client = Raw()
        handles = []
        for _ in range(200):
            item = client.alloc(dice.choice((1, 64, HALF, PAGE, 5 * PAGE)), flags=dice.choice((0, NOZERO)))
            handles.append(item.handle)
        dice.shuffle(handles)
        assert client.free_batch(handles[:100])[0] == 0
        client.close()
    assert settled(dict.fromkeys(USAGE, 0)) == dict.fromkeys(USAGE, 0)


def churn(seed: int) -> None:
    dice = random.Random(seed)
    client = Raw()
    window = client.map_window()
    live: list[abi.Alloc] = []
    while True:
        sizes = [dice.choice((1, 64, 100, 900, HALF)) for _ in range(dice.randrange(1, 60))]
        result, _, items = client.alloc_batch(sizes, abi.Kind.ACTIVATIONS)
        assert result == 0
        for item in items:
            window[item.offset] = 1
        live += items
        dice.shuffle(live)
        assert client.free_batch([live.pop().handle for _ in range(len(live) // 2 + 1)])[0] == 0


def test_sigkill_at_random_moments() -> None:
    dice = random.Random(17)
    for _ in range(8):
        killed_at_random(churn, dice, 0.05, 0.4)
        assert settled(dict.fromkeys(USAGE, 0)) == dict.fromkeys(USAGE, 0)
