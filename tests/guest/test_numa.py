# SPDX-License-Identifier: MIT
"""Memory nodes: which one serves, what happens when it is full, and what is refused.

Where pages really are is asked of the kernel (move_pages with no target), not of us.
"""

from __future__ import annotations

import ctypes
import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from device import CHUNK, PAGE, SYSFS, Raw, address_of, nodes_with_memory, read, write
from process import libc
from tensormem import abi

NODES = nodes_with_memory()
ALL = sum(1 << node for node in NODES)
DEFAULT, LOCAL = abi.Numa.DEFAULT, abi.Numa.LOCAL
BIND, INTERLEAVE = abi.Numa.BIND, abi.Numa.INTERLEAVE
NOZERO, PAGED = abi.AllocFlag.NOZERO, abi.AllocFlag.PAGED
MOVE_PAGES, MBIND = 239, 235

two_nodes = pytest.mark.skipif(len(NODES) < 2, reason="needs two memory nodes (--numa 2)")


@pytest.fixture(autouse=True)
def anywhere() -> Iterator[None]:
    cpus = os.sched_getaffinity(0)
    yield
    os.sched_setaffinity(0, cpus)


def run_on(node: int) -> None:
    text = Path(f"/sys/devices/system/node/node{node}/cpulist").read_text().strip()
    bounds = [(r.split("-")[0], r.split("-")[-1]) for r in text.split(",")]
    os.sched_setaffinity(0, {c for a, b in bounds for c in range(int(a), int(b) + 1)})


def where(address: int, length: int) -> set[int]:
    """The nodes of the pages of a mapping, which is touched first."""
    count = length // PAGE
    ctypes.memset(address, 1, length)
    pages = (ctypes.c_void_p * count)(*(address + i * PAGE for i in range(count)))
    status = (ctypes.c_int * count)()
    libc.syscall.argtypes = None
    arguments = (ctypes.c_long(0), ctypes.c_ulong(count), pages, ctypes.c_void_p(None), status,
                 ctypes.c_int(0))  # fmt: skip
    assert libc.syscall(ctypes.c_long(MOVE_PAGES), *arguments) == 0
    return set(status)


def nodes_of(client: Raw, item: abi.Alloc) -> set[int]:
    mapping = client.map_tensor(item)
    found = where(address_of(mapping), len(mapping))
    mapping.close()
    return found


def counts(name: str) -> dict[int, int]:
    return {node: read(f"node{node}/{name}") for node in NODES}


def gained(name: str, before: dict[int, int]) -> dict[int, int]:
    return {node: count - before[node] for node, count in counts(name).items()}


def refill(chunks: int) -> None:
    """No reserve, nothing free, and this capacity."""
    assert write("chunk/reserve", 0) == 0
    assert write("chunk/capacity", 0) == 0
    assert write("chunk/capacity", chunks) == 0


# On any machine


def test_the_nodes_are_the_kernels(raw: Raw) -> None:
    assert raw.info().nodes == ALL
    assert sorted(p.name for p in SYSFS.glob("node*")) == [f"node{node}" for node in NODES]
    for name in ("capacity", "total", "free", "used"):
        assert sum(counts(name).values()) == read(f"chunk/{name}"), name


ABSENT = 1 << (max(NODES) + 1)


@pytest.mark.parametrize(
    ("numa", "nodes"),
    [
        (DEFAULT, 1), (LOCAL, 1), (LOCAL, ALL), (BIND, 0), (BIND, ABSENT), (BIND, ALL | ABSENT),
        (BIND, 1 << 63), (INTERLEAVE, ABSENT), (INTERLEAVE, (1 << 64) - 1), (4, 0), (4, 1),
        (0xFFFFFFFF, 1),
    ],
)  # fmt: skip
def test_bad_policies_and_masks(raw: Raw, numa: int, nodes: int) -> None:
    assert raw.set_numa(BIND, 1 << NODES[-1]) == 0
    assert raw.set_numa(numa, nodes) == errno.EINVAL
    assert raw.try_alloc(PAGE, numa=numa, nodes=nodes)[0] == errno.EINVAL
    # what was set before is still in force
    before = counts("hits")
    raw.alloc(PAGE)
    assert gained("hits", before)[NODES[-1]] == 1


@pytest.mark.parametrize(
    ("numa", "nodes"),
    [(DEFAULT, 0), (LOCAL, 0), (BIND, ALL), (BIND, 1 << NODES[0]), (INTERLEAVE, 0),
     (INTERLEAVE, ALL)],
)  # fmt: skip
def test_good_policies_and_masks(raw: Raw, numa: int, nodes: int) -> None:
    raw.alloc(CHUNK + PAGE, numa=numa, nodes=nodes)
    assert raw.set_numa(numa, nodes) == 0
    raw.alloc(CHUNK + PAGE)
    assert raw.info().nr_tensors == 2


def test_unbound_memory_of_one_node(raw: Raw, settings: None) -> None:
    """What BIND refuses at the node's capacity; LOCAL gets from wherever there is some."""
    refill(4 * len(NODES))
    before = counts("fallbacks")
    for _ in range(4):
        raw.alloc(CHUNK, numa=BIND, nodes=1 << NODES[0])
    assert raw.try_alloc(CHUNK, numa=BIND, nodes=1 << NODES[0])[0] == errno.ENOSPC
    assert raw.try_alloc(PAGE, numa=BIND, nodes=1 << NODES[0])[0] == errno.ENOSPC
    assert raw.info().used == 4 * CHUNK
    assert gained("fallbacks", before) == dict.fromkeys(NODES, 0)
    result = raw.try_alloc(CHUNK)[0]
    assert result == (0 if len(NODES) > 1 else errno.ENOSPC)


# On several nodes


@two_nodes
def test_the_capacity_is_shared_by_memory(settings: None) -> None:
    assert write("chunk/reserve", 0) == 0
    memory = {}
    for node in NODES:
        text = Path(f"/sys/devices/system/node/node{node}/meminfo").read_text()
        memory[node] = int(text.split("MemTotal:")[1].split()[0])
    for capacity in (0, 1, 7, 64, 101):
        assert write("chunk/capacity", capacity) == 0
        shares = counts("capacity")
        assert sum(shares.values()) == capacity
        for node, share in shares.items():
            expected = capacity * memory[node] / sum(memory.values())
            assert abs(share - expected) <= 1 + capacity / 10, node


@two_nodes
@pytest.mark.parametrize("size", [PAGE, 1 << 18, CHUNK, 2 * CHUNK + PAGE])
def test_local_is_where_the_caller_runs(raw: Raw, size: int) -> None:
    for node in (*NODES, *reversed(NODES)):
        run_on(node)
        before = counts("hits"), counts("fallbacks"), counts("used"), counts("used_pages")
        item = raw.alloc(size, flags=PAGED)
        others = dict.fromkeys(set(NODES) - {node}, 0)
        extents = raw.query(item.handle)[1].nr_chunks + raw.query(item.handle)[1].nr_runs
        assert gained("hits", before[0]) == {node: extents, **others}
        assert gained("fallbacks", before[1]) == dict.fromkeys(NODES, 0)
        assert gained("used", before[2]) == {node: size // CHUNK, **others}
        assert gained("used_pages", before[3]) == {node: size % CHUNK // PAGE, **others}
        assert nodes_of(raw, item) == {node}
        assert raw.free(item.handle) == 0


@two_nodes
@pytest.mark.parametrize("way", ["call", "client"])
def test_bind_is_where_the_mask_says(raw: Raw, way: str) -> None:
    for here in NODES:
        run_on(here)
        for node in NODES:
            how = {"numa": BIND, "nodes": 1 << node}
            if way == "client":
                assert raw.set_numa(**how) == 0
                how = {}
            for size in (PAGE, CHUNK + PAGE):
                item = raw.alloc(size, flags=PAGED, **how)
                assert nodes_of(raw, item) == {node}
                assert raw.free(item.handle) == 0
    # all nodes: the nearest of them
    for here in NODES:
        run_on(here)
        item = raw.alloc(CHUNK, flags=PAGED, numa=BIND, nodes=ALL)
        assert nodes_of(raw, item) == {here}


@two_nodes
def test_a_call_says_more_than_its_client(raw: Raw) -> None:
    first, last = NODES[0], NODES[-1]
    run_on(first)
    assert raw.set_numa(BIND, 1 << last) == 0
    assert nodes_of(raw, raw.alloc(PAGE)) == {last}
    assert nodes_of(raw, raw.alloc(PAGE, numa=LOCAL)) == {first}
    assert nodes_of(raw, raw.alloc(PAGE, numa=BIND, nodes=1 << first)) == {first}
    assert nodes_of(raw, raw.alloc(PAGE)) == {last}
    assert raw.set_numa(DEFAULT) == 0
    assert nodes_of(raw, raw.alloc(PAGE)) == {first}
    with Raw() as other:
        assert raw.set_numa(BIND, 1 << last) == 0
        assert nodes_of(other, other.alloc(PAGE)) == {first}


@two_nodes
def test_small_tensors_follow_their_client(raw: Raw) -> None:
    for node in NODES:
        with Raw() as client:
            assert client.set_numa(BIND, 1 << node) == 0
            item = client.alloc(100)
            assert client.query(item.handle)[1].pool == abi.Pool.SLAB
            window = client.map_window()
            assert where(address_of(window) + item.offset // PAGE * PAGE, PAGE) == {node}
            window.close()


@two_nodes
@pytest.mark.parametrize("way", ["call", "client"])
@pytest.mark.parametrize("size", [CHUNK, 16 * PAGE])
def test_interleaved_in_turn(raw: Raw, way: str, size: int) -> None:
    how = {"numa": INTERLEAVE, "nodes": 0}
    if way == "client":
        assert raw.set_numa(**how) == 0
        how = {}
    items = [raw.alloc(size, flags=PAGED, **how) for _ in range(6 * len(NODES))]
    places = [nodes_of(raw, item) for item in items]
    assert all(places[i] != places[i + 1] for i in range(len(places) - 1))
    for node in NODES:
        assert places.count({node}) == 6
    # of a mask of one there is one
    item = raw.alloc(size, flags=PAGED, numa=INTERLEAVE, nodes=1 << NODES[1])
    assert nodes_of(raw, item) == {NODES[1]}


@two_nodes
def test_one_tensor_is_interleaved_by_chunk(raw: Raw) -> None:
    count = 3 * len(NODES)
    item = raw.alloc(count * CHUNK, flags=PAGED, numa=INTERLEAVE)
    mapping = raw.map_tensor(item)
    address = address_of(mapping)
    places = [where(address + i * CHUNK, CHUNK) for i in range(count)]
    for node in NODES:
        assert places.count({node}) == 3
    mapping.close()


@two_nodes
def test_falls_back_when_the_local_node_is_full(raw: Raw, settings: None) -> None:
    refill(4 * len(NODES))
    here, there = NODES[0], NODES[1]
    run_on(here)
    share = read(f"node{here}/capacity")
    before = counts("hits"), counts("fallbacks")
    items = [raw.alloc(CHUNK, flags=PAGED) for _ in range(share)]
    assert gained("hits", before[0])[here] == share
    assert gained("fallbacks", before[1]) == dict.fromkeys(NODES, 0)
    items.append(raw.alloc(CHUNK, flags=PAGED))
    assert gained("hits", before[0])[here] == share
    assert gained("fallbacks", before[1]) == {**dict.fromkeys(NODES, 0), there: 1}
    assert nodes_of(raw, items[-1]) == {there}
    while raw.try_alloc(CHUNK)[0] == 0:
        pass
    assert read("chunk/used") == 4 * len(NODES)
    # a local one is preferred as soon as there is one
    assert raw.free(items[0].handle) == 0
    assert nodes_of(raw, raw.alloc(CHUNK, flags=PAGED)) == {here}


@two_nodes
@pytest.mark.parametrize("numa", [BIND, INTERLEAVE])
def test_a_mask_is_never_left(raw: Raw, settings: None, numa: int) -> None:
    refill(4 * len(NODES))
    here, there = NODES[0], NODES[1]
    run_on(there)
    share = read(f"node{here}/capacity")
    only = {"numa": numa, "nodes": 1 << here}
    for _ in range(share):
        raw.alloc(CHUNK, **only)
    used, other = raw.info().used, read(f"node{there}/total")
    for size in (PAGE, CHUNK, 100 * PAGE):
        assert raw.try_alloc(size, **only)[0] == errno.ENOSPC
    # more than the node could ever hold, though not more than all
    assert raw.try_alloc((share + 1) * CHUNK, **only)[0] == errno.ENOSPC
    assert raw.info().used == used
    assert read(f"node{there}/total") == other
    assert raw.alloc(CHUNK, numa=BIND, nodes=1 << there).handle


@two_nodes
def test_what_is_kept_is_given_up_where_it_helps(raw: Raw, settings: None) -> None:
    """A full node takes back what is kept on it, not what another has kept longer."""
    refill(4 * len(NODES))
    here, there = NODES[0], NODES[1]
    with Raw() as other:
        for node in (there, here):
            count = read(f"node{node}/capacity")
            items = [other.alloc(CHUNK, flags=NOZERO, numa=BIND, nodes=1 << node)
                     for _ in range(count)]  # fmt: skip
            assert other.free_batch([item.handle for item in items])[0] == 0
        item = raw.alloc(CHUNK, flags=PAGED, numa=BIND, nodes=1 << here)
        assert nodes_of(raw, item) == {here}


@two_nodes
def test_reuse_asks_for_the_same_nodes(raw: Raw) -> None:
    window = raw.map_window()
    first = raw.alloc(PAGE, flags=NOZERO, numa=BIND, nodes=1 << NODES[0])
    window[first.offset] = 1
    assert raw.free(first.handle) == 0
    other = raw.alloc(PAGE, flags=NOZERO, numa=BIND, nodes=1 << NODES[1])
    assert window[other.offset] == 0
    again = raw.alloc(PAGE, flags=NOZERO, numa=BIND, nodes=1 << NODES[0])
    assert (again.offset, window[again.offset]) == (first.offset, 1)
    window.close()


@two_nodes
@pytest.mark.parametrize("flags", [PAGED, abi.AllocFlag.HUGE])
def test_the_kernel_does_not_move_it(raw: Raw, flags: int) -> None:
    """mbind() and move_pages() leave tensors where they are, and their contents alone."""
    here, there = NODES[0], NODES[1]
    item = raw.alloc(2 * CHUNK, flags=flags, numa=BIND, nodes=1 << here)
    mapping = raw.map_tensor(item)
    mapping[:] = data = random.Random(5).randbytes(2 * CHUNK)
    address = address_of(mapping)
    mask = ctypes.c_ulong(1 << there)
    bind, move = 2, 2
    for start, length in ((address + PAGE, PAGE), (address, 2 * CHUNK)):
        libc.syscall(ctypes.c_long(MBIND), ctypes.c_void_p(start), ctypes.c_ulong(length),
                     ctypes.c_long(bind), ctypes.byref(mask), ctypes.c_ulong(64),
                     ctypes.c_long(move))  # fmt: skip
        assert mapping[:] == data
    pages = (ctypes.c_void_p * 2)(address, address + CHUNK)
    targets, status = (ctypes.c_int * 2)(there, there), (ctypes.c_int * 2)()
    libc.syscall(ctypes.c_long(MOVE_PAGES), ctypes.c_long(0), ctypes.c_ulong(2), pages, targets,
                 status, ctypes.c_long(move))  # fmt: skip
    assert mapping[:] == data
    mapping.close()
    if flags == PAGED:
        assert nodes_of(raw, item) == {here}


@two_nodes
def test_small_runs_fall_back_too(raw: Raw, settings: None) -> None:
    refill(2 * len(NODES))
    run_on(NODES[0])
    before = counts("fallbacks")
    share = read(f"node{NODES[0]}/capacity")
    for _ in range(4 * share):
        raw.alloc(CHUNK // 4)
    assert gained("fallbacks", before) == dict.fromkeys(NODES, 0)
    assert nodes_of(raw, raw.alloc(CHUNK // 4)) == {NODES[1]}
    assert gained("fallbacks", before)[NODES[1]] == 1


def test_compaction_of_every_node(raw: Raw) -> None:
    """Two at once, on pools that both have something to move; and again with nothing."""
    rng = random.Random(11)
    items = []
    for node in NODES:
        for _ in range(900):
            result, item = raw.try_alloc(
                PAGE << rng.randrange(3), pool=abi.Pool.BUDDY, numa=abi.Numa.BIND, nodes=1 << node
            )
            assert result == 0
            items.append(item)
    rng.shuffle(items)
    window = raw.map_window()
    kept, loose = items[:300], items[300:]
    for item in kept:
        window[item.offset : item.offset + 4] = item.handle.to_bytes(4, "little")
    result, _ = raw.free_batch([item.handle for item in loose])
    assert result == 0
    chunks = read("buddy/chunks")
    for _ in range(2):
        children = []
        for _ in range(2):
            pid = os.fork()
            if pid == 0:
                os._exit(write("buddy/compact", 1))
            children.append(pid)
        assert all(os.waitpid(pid, 0)[1] == 0 for pid in children)
    assert read("buddy/chunks") < chunks
    for item in kept:
        assert window[item.offset : item.offset + 4] == item.handle.to_bytes(4, "little")
    window.close()
