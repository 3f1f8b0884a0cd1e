# SPDX-License-Identifier: MIT
"""Tracepoints: a known workload, counted and read back field by field."""

from __future__ import annotations

from device import CHUNK, PAGE, TRACING, Raw, events, read, write


def test_alloc_and_free(raw: Raw, trace: None) -> None:
    sizes = [PAGE * (i + 1) for i in range(23)]
    _, _, items = raw.alloc_batch(sizes)
    assert raw.free_batch([item.handle for item in items])[0] == 0
    allocs, frees = events("alloc"), events("free")
    assert len(allocs) == len(frees) == 23
    assert [int(e["size"]) for e in allocs] == sizes
    assert [int(e["handle"]) for e in allocs] == [i.handle for i in items]
    assert [int(e["offset"], 16) for e in allocs] == [i.offset for i in items]
    assert {(e["kind"], e["pool"]) for e in allocs} == {("kv", "buddy")}
    assert all(0 < int(e["latency_ns"]) < 10**10 for e in allocs + frees)
    assert len({e["client"] for e in allocs + frees}) == 1


def test_faults(raw: Raw, trace: None) -> None:
    item = raw.alloc(64 * PAGE)
    mapping = raw.map_tensor(item)
    mapping[5 * PAGE] = 1
    faults = events("fault")
    assert int(faults[0]["page"]) == item.offset // PAGE + 5
    assert sum(int(e["mapped"]) for e in faults) == 64
    assert all(int(e["latency_ns"]) > 0 for e in faults)
    mapping.close()


def test_chunks_come_and_go(raw: Raw, trace: None, settings: None) -> None:
    assert write("chunk/reserve", 0) == 0
    assert write("chunk/capacity", 0) == 0
    total = read("chunk/total")
    (TRACING / "trace").write_text("")
    assert write("chunk/capacity", 16) == 0
    item = raw.alloc(5 * CHUNK)
    assert raw.free(item.handle) == 0
    assert write("chunk/capacity", 1) == 0
    grow, shrink = events("chunk_grow"), events("chunk_shrink")
    assert total == 0
    assert len(grow) == 5
    assert all(e["ok"] == "1" and int(e["latency_ns"]) > 0 for e in grow)
    assert len(shrink) == 4
    assert {e["chunk"] for e in shrink} < {e["chunk"] for e in grow}
