# SPDX-License-Identifier: MIT
"""Allocating and freeing: sizes, kinds, pools, batches, limits, and a model of it all."""

from __future__ import annotations

import errno
import itertools
import os
import random

import pytest

from device import CHUNK, KINDS, PAGE, Raw, read, round_up, wait_for, word, write
from tensormem import abi

HUGE, PAGED = abi.AllocFlag.HUGE, abi.AllocFlag.PAGED
EVERY_LIMIT = (1 << 64) - 1


SIZES = [1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE, CHUNK // 2, CHUNK - PAGE, CHUNK - PAGE + 1,
         CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 7]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "size"),
    # small ones of the other kinds are the slab's: test_small.py
    [(k, s) for k in KINDS for s in SIZES if k == abi.Kind.KV or s > PAGE // 2],
)
def test_sizes_and_kinds(raw: Raw, kind: abi.Kind, size: int) -> None:
    item = raw.alloc(size, kind)
    assert item.handle != 0
    assert item.offset % PAGE == 0
    if round_up(size, PAGE) >= CHUNK:
        assert item.offset % CHUNK == 0
    result, query = raw.query(item.handle)
    assert (result, query.size, query.kind) == (0, size, kind)
    assert query.held == round_up(size, PAGE) == raw.info().used == read("clients/bytes")
    assert query.nr_chunks == round_up(size, PAGE) // CHUNK
    assert query.nr_runs == (round_up(size, PAGE) % CHUNK // PAGE).bit_count()
    assert query.pool == (abi.Pool.CHUNK if query.nr_chunks else abi.Pool.BUDDY)
    assert read("chunk/used") == query.nr_chunks
    assert read("buddy/used_pages") == round_up(size, PAGE) % CHUNK // PAGE
    assert raw.free(item.handle) == 0
    assert raw.info().used == 0


def test_bad_sizes(raw: Raw) -> None:
    window = raw.info().window_size
    for size in (0, window + 1, 1 << 63, (1 << 63) - 1, EVERY_LIMIT, EVERY_LIMIT - PAGE + 2):
        assert raw.try_alloc(size)[0] == errno.EINVAL, hex(size)
    for size in (window, window - PAGE + 1, window // 2):
        assert raw.try_alloc(size)[0] == errno.ENOSPC, hex(size)
    assert raw.info().used == 0


@pytest.mark.parametrize("kind", [0, 5, 255, 256 + 1, 0xFFFFFFFF])
def test_unknown_kinds(raw: Raw, kind: int) -> None:
    assert raw.try_alloc(PAGE, kind=kind)[0] == errno.EINVAL


@pytest.mark.parametrize("pool", [3, 255, 256 + 1, 0xFFFFFFFF])
def test_unknown_pools(raw: Raw, pool: int) -> None:
    assert raw.try_alloc(PAGE, pool=pool)[0] == errno.EINVAL


def test_no_dma_pool(raw: Raw) -> None:
    if word("dma/node") != "none":
        pytest.skip("the device tree has a region")
    assert [read(f"dma/{name}") for name in ("total", "used", "free")] == [0, 0, 0]
    for size in (1, CHUNK, raw.info().window_size):
        assert raw.try_alloc(size, pool=abi.Pool.DMA)[0] == errno.ENODEV
    assert raw.try_alloc(0, pool=abi.Pool.DMA)[0] == errno.EINVAL
    assert raw.info().used == 0


def test_naming_a_pool(raw: Raw) -> None:
    one = raw.alloc(1, pool=abi.Pool.CHUNK)
    big = raw.alloc(3 * CHUNK, pool=abi.Pool.BUDDY)
    first, second = raw.query(one.handle)[1], raw.query(big.handle)[1]
    assert (first.pool, first.nr_chunks, first.nr_runs) == (abi.Pool.CHUNK, 1, 0)
    assert (first.held, first.length) == (CHUNK, PAGE)
    assert (second.pool, second.nr_chunks, second.nr_runs) == (abi.Pool.BUDDY, 0, 6)
    assert raw.free_batch([one.handle, big.handle])[0] == 0


def test_handles_of_others_and_of_the_dead(raw: Raw) -> None:
    item = raw.alloc(PAGE)
    with Raw() as other:
        for call in (lambda h: other.free(h), lambda h: other.query(h)[0]):
            assert call(item.handle) == errno.ENOENT
        assert other.map_errno(PAGE, item.offset) == errno.ENOENT
        assert other.free_batch([item.handle])[0] == errno.ENOENT
    assert raw.query(item.handle)[0] == 0
    assert raw.free(item.handle) == 0
    for handle in (item.handle, 0, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF):
        assert raw.free(handle) == errno.ENOENT
        assert raw.query(handle)[0] == errno.ENOENT


def test_a_stale_handle_does_not_name_the_next_tensor(raw: Raw) -> None:
    seen = set()
    for _ in range(300):
        handle = raw.alloc(PAGE).handle
        assert handle not in seen
        seen.add(handle)
        assert raw.free(handle) == 0


def test_batches(raw: Raw) -> None:
    sizes = [random.Random(1).randrange(1, CHUNK // 4) for _ in range(257)]
    result, batch, items = raw.alloc_batch(sizes)
    assert (result, batch.failed) == (0, len(sizes))
    assert len({item.handle for item in items}) == len(sizes)
    queries = (abi.Query * len(sizes))(*(abi.Query(handle=item.handle) for item in items))
    result, batch = raw.batch(abi.IOC_QUERY_BATCH, queries)
    assert (result, batch.failed) == (0, len(sizes))
    assert [q.size for q in queries] == sizes
    assert [q.offset for q in queries] == [item.offset for item in items]
    used = raw.info().used
    assert used == sum(round_up(s, PAGE) for s in sizes)

    handles = [item.handle for item in items]
    for bad, at in (([*handles[:5], handles[2]], 5), ([0, *handles], 0), ([*handles, 1 << 30], 257)):
        result, batch = raw.free_batch(bad)
        assert (result, batch.failed) == (errno.ENOENT, at)
        assert raw.info().used == used
        assert raw.info().nr_tensors == len(sizes)
    result, batch = raw.free_batch(handles)
    assert (result, batch.failed) == (0, len(sizes))
    assert raw.info().used == 0


@pytest.mark.parametrize("at", [0, 1, 31, 63])
@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        ({"size": 0, "kind": 1}, errno.EINVAL),
        ({"size": PAGE, "kind": 9}, errno.EINVAL),
        ({"size": PAGE, "kind": 1, "flags": 16}, errno.EINVAL),
        ({"size": PAGE, "kind": 1, "flags": HUGE | PAGED}, errno.EINVAL),
        ({"size": PAGE, "kind": 1, "numa": 4}, errno.EINVAL),
        ({"size": PAGE, "kind": 1, "pad": 1}, errno.EINVAL),
        ({"size": PAGE, "kind": 1, "pool": 77}, errno.EINVAL),
        ({"size": 1 << 40, "kind": 1}, errno.EINVAL),
        ({"size": 1 << 30, "kind": 1}, errno.EDQUOT),
    ],
)
def test_a_bad_member_undoes_the_batch(raw: Raw, at: int, bad: dict, expected: int) -> None:
    kept = raw.alloc(PAGE)
    assert raw.set_quota(1 << 29) == 0
    items = (abi.Alloc * 64)(*(abi.Alloc(size=3 * PAGE, kind=1) for _ in range(64)))
    items[at] = abi.Alloc(**bad)
    free, zeroed = read("buddy/used_pages"), read("chunk/used")
    result, batch = raw.batch(abi.IOC_ALLOC_BATCH, items)
    assert (result, batch.failed) == (expected, at)
    assert (raw.info().nr_tensors, raw.info().used) == (1, PAGE)
    assert (read("buddy/used_pages"), read("chunk/used")) == (free, zeroed)
    assert all(item.handle == 0 for item in items)
    assert raw.free(kept.handle) == 0


def test_the_largest_batch(raw: Raw) -> None:
    count = raw.info().max_batch
    result, batch, items = raw.alloc_batch([1] * count)
    assert (result, batch.failed) == (0, count)
    assert raw.info().used == count * PAGE
    assert raw.free_batch([item.handle for item in items])[0] == 0


def test_quota(raw: Raw, settings: None) -> None:
    assert write("clients/default_quota", 10 * PAGE) == 0
    with Raw() as client:
        assert client.info().quota == 10 * PAGE
        first = client.alloc(4 * PAGE)
        assert client.try_alloc(6 * PAGE + 1)[0] == errno.EDQUOT
        second = client.alloc(6 * PAGE)
        assert client.try_alloc(1)[0] == errno.EDQUOT
        assert client.set_quota(10 * PAGE - 1) == errno.EBUSY
        assert client.free(first.handle) == 0
        assert client.set_quota(6 * PAGE) == 0
        assert client.try_alloc(1)[0] == errno.EDQUOT
        assert client.set_quota(10 * PAGE) == 0
        assert client.alloc(4 * PAGE).handle
        assert client.set_quota(11 * PAGE) == 0  # root
        assert client.free(second.handle) == 0
    # what an ordinary user may do
    with Raw() as client:
        pid = os.fork()
        if pid == 0:
            os.setuid(65534)
            codes = (client.set_quota(11 * PAGE), client.set_quota(5 * PAGE),
                     client.set_quota(10 * PAGE), client.set_quota(EVERY_LIMIT))  # fmt: skip
            os._exit(0 if codes == (errno.EPERM, 0, 0, errno.EPERM) else 1)
        assert os.waitpid(pid, 0)[1] == 0
    # whoever was here before keeps what it had, and may always lower it
    pid = os.fork()
    if pid == 0:
        os.setuid(65534)
        codes = (raw.set_quota(1 << 40), raw.set_quota(1 << 41), raw.set_quota(1 << 39))
        os._exit(0 if codes == (0, errno.EPERM, 0) else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert raw.info().quota == 1 << 39
    assert raw.set_quota(EVERY_LIMIT) == 0
    assert raw.info().quota == EVERY_LIMIT


def test_a_whole_chunk_is_charged_whole(raw: Raw) -> None:
    assert raw.set_quota(CHUNK - 1) == 0
    assert raw.try_alloc(1, pool=abi.Pool.CHUNK)[0] == errno.EDQUOT
    assert raw.set_quota(CHUNK) == 0
    assert raw.try_alloc(1, pool=abi.Pool.CHUNK)[0] == 0
    assert raw.info().used == CHUNK


def test_capacity(raw: Raw, settings: None) -> None:
    assert write("chunk/reserve", 0) == 0
    assert write("chunk/capacity", 8) == 0
    assert read("chunk/total") <= 8
    items = [raw.alloc(CHUNK) for _ in range(7)]
    small = raw.alloc(PAGE)
    assert read("chunk/total") == 8
    assert raw.try_alloc(CHUNK)[0] == errno.ENOSPC
    assert raw.try_alloc(CHUNK, pool=abi.Pool.CHUNK)[0] == errno.ENOSPC
    # what is left in the buddy pool's chunk is still to be had, whatever its runs
    fallbacks = read("buddy/fallbacks")
    rest = raw.alloc(CHUNK - PAGE)
    assert raw.query(rest.handle)[1].held == CHUNK - PAGE
    assert raw.try_alloc(1)[0] == errno.ENOSPC
    assert raw.free_batch([rest.handle, small.handle])[0] == 0
    # a chunk that fell empty serves the other pool
    assert read("buddy/chunks") == 0
    assert raw.try_alloc(CHUNK, pool=abi.Pool.CHUNK)[0] == 0
    assert read("buddy/fallbacks") >= fallbacks
    # a lower capacity takes effect as memory is freed
    assert write("chunk/capacity", 2) == 0
    assert read("chunk/total") == 8
    assert raw.free_batch([item.handle for item in items])[0] == 0
    assert read("chunk/total") == 2
    assert raw.info().nr_tensors == 1


def test_a_hopeless_request_does_not_drain_the_pool(raw: Raw) -> None:
    grown = read("chunk/grown")
    size = (read("chunk/capacity") + 1) * CHUNK
    assert raw.try_alloc(size)[0] == errno.ENOSPC
    assert raw.try_alloc(size, pool=abi.Pool.BUDDY)[0] == errno.ENOSPC
    assert read("chunk/grown") == grown


def test_the_reserve_never_stands_in_the_way(raw: Raw, settings: None) -> None:
    """All of the capacity can be had while the reserve worker has a chunk in hand."""
    for _ in range(10):
        assert write("chunk/reserve", 0) == 0
        assert write("chunk/capacity", 0) == 0
        assert write("chunk/capacity", 8) == 0
        assert write("chunk/reserve", 8) == 0
        result, _, items = raw.alloc_batch([CHUNK] * 8)
        assert result == 0
        assert raw.free_batch([item.handle for item in items])[0] == 0
        assert write("chunk/capacity", 1) == 0
        wait_for(lambda: read("chunk/total") <= 1)
        assert write("chunk/reserve", 0) == 0


def test_fallback_to_smaller_runs_is_counted(raw: Raw, settings: None) -> None:
    assert write("chunk/reserve", 0) == 0
    assert write("chunk/capacity", 2) == 0
    pages = CHUNK // PAGE
    # pinned: compaction would make a chunk of what is free
    result, _, items = raw.alloc_batch([PAGE] * (2 * pages), flags=abi.AllocFlag.PINNED)
    assert result == 0
    # free every other page: half of the memory, and no two of them together
    assert raw.free_batch([item.handle for item in items[::2]])[0] == 0
    before = read("buddy/fallbacks")
    assert raw.try_alloc(CHUNK, pool=abi.Pool.CHUNK)[0] == errno.ENOSPC
    assert read("buddy/fallbacks") == before
    item = raw.alloc(pages * PAGE // 2)
    assert read("buddy/fallbacks") == before + 1
    query = raw.query(item.handle)[1]
    assert (query.nr_chunks, query.nr_runs) == (0, pages // 2)
    mapping = raw.map_tensor(item)
    for page in range(pages // 2):
        assert mapping[page * PAGE] == 0
        mapping[page * PAGE] = page % 251 + 1
    assert all(mapping[p * PAGE] == p % 251 + 1 for p in range(pages // 2))
    mapping.close()


def test_reserve_is_kept_ready(raw: Raw, settings: None) -> None:
    assert write("chunk/reserve", 6) == 0
    wait_for(lambda: read("chunk/zeroed") == 6)
    grown = read("chunk/grown")
    items = [raw.alloc(CHUNK) for _ in range(6)]
    wait_for(lambda: read("chunk/zeroed") == 6)
    assert read("chunk/grown") <= grown + 6
    assert raw.free_batch([item.handle for item in items])[0] == 0
    assert read("chunk/free") >= 6
    # above the reserve nothing is given back until somebody asks
    assert write("chunk/reserve", 1) == 0
    wait_for(lambda: read("chunk/free") == 1 and read("chunk/zeroed") == 1)
    assert write("chunk/reserve", 0) == 0
    assert read("chunk/total") == 0


def test_the_shrinker_returns_free_chunks(raw: Raw, settings: None) -> None:
    assert write("chunk/reserve", 1) == 0
    items = [raw.alloc(CHUNK) for _ in range(12)]
    assert raw.free_batch([item.handle for item in items])[0] == 0
    assert read("chunk/free") >= 12
    shrunk = read("chunk/shrunk")
    for _ in range(20):
        with open("/proc/sys/vm/drop_caches", "w") as caches:
            caches.write("2")
        if read("chunk/free") <= 1:
            break
    assert read("chunk/free") <= 1
    assert read("chunk/shrunk") >= shrunk + 11


@pytest.mark.parametrize("seed", range(4))
def test_random_operations_against_a_model(raw: Raw, seed: int) -> None:
    """10^3 random calls; offsets never overlap, contents stay, counters are exact."""
    dice = random.Random(seed)
    window = raw.map_window()
    live: dict[int, tuple[abi.Alloc, int]] = {}
    for step in range(1000):
        if live and dice.random() < 0.5:
            chosen = dice.sample(sorted(live), min(len(live), dice.choice((1, 1, 1, 4, 16))))
            for handle in chosen:
                check_pattern(window, *live[handle])
            if len(chosen) == 1:
                assert raw.free(chosen[0]) == 0
            else:
                assert raw.free_batch(chosen)[0] == 0
            for handle in chosen:
                del live[handle]
        elif sum(item.size for item, _ in live.values()) < 64 << 20:
            count = dice.choice((1, 1, 1, 8))
            sizes = [dice.choice((1, PAGE, PAGE * 3, PAGE * 7 + 5, 1 << 17, 1 << 20, CHUNK,
                                  CHUNK + PAGE)) for _ in range(count)]  # fmt: skip
            result, _, items = raw.alloc_batch(sizes)
            assert result == 0
            for item in items:
                assert item.handle not in live
                check_zero(window, item)
                live[item.handle] = (item, dice.randrange(1, 256))
                write_pattern(window, *live[item.handle])
        spans = sorted((i.offset, round_up(i.size, PAGE)) for i, _ in live.values())
        assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(spans))
        info = raw.info()
        assert info.nr_tensors == len(live), step
        assert info.used == sum(round_up(i.size, PAGE) for i, _ in live.values()), step
    for item, value in live.values():
        check_pattern(window, item, value)
    window.close()


def places(item: abi.Alloc) -> list[int]:
    """First and last byte of some of its pages."""
    pages = round_up(item.size, PAGE) // PAGE
    chosen = sorted({0, pages // 3, pages // 2, pages - 1})
    return [p * PAGE + at for p in chosen for at in (0, PAGE - 1)]


def check_zero(window, item: abi.Alloc) -> None:
    for at in places(item):
        assert window[item.offset + at] == 0


def write_pattern(window, item: abi.Alloc, value: int) -> None:
    for at in places(item):
        window[item.offset + at] = value


def check_pattern(window, item: abi.Alloc, value: int) -> None:
    for at in places(item):
        assert window[item.offset + at] == value
