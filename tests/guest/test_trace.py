# SPDX-License-Identifier: MIT
"""Tracepoints: a known workload, counted and read back field by field."""

from __future__ import annotations

import errno

from device import CHUNK, PAGE, TRACING, Raw, events, full, read, weights, write
from tensormem import abi


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


def test_calls(raw: Raw, trace: None) -> None:
    """One event for each call to each kind of descriptor, with what it returned."""
    item = raw.alloc(PAGE)
    assert raw.free(item.handle) == 0
    assert raw.free(item.handle) == errno.ENOENT
    with raw.kv([full(1, PAGE // 8)]) as kv:
        kv.open()
    with raw.rt(CHUNK) as rt:
        rt.info()
    flags = abi.OpenFlag.CREATE | abi.OpenFlag.EXCL | abi.OpenFlag.WRITE
    with raw.slot("test", flags, mode=0o600) as slot:
        with slot.load(weights(0, PAGE)) as gen:
            assert slot.abort(gen.number) == 0
        assert slot.remove() == 0
    calls = [(int(e["cmd"], 16), int(e["ret"])) for e in events("ioctl")]
    # KV_INFO, MODEL_INFO: by the fixtures that open them, however often they look
    assert [call for call in calls if call[0] not in (0x40, 0x60)] == [
        (0x10, 0), (0x11, 0), (0x11, -errno.ENOENT), (0x30, 0), (0x41, 0), (0x32, 0), (0x70, 0),
        (0x31, 0), (0x51, 0), (0x53, 0), (0x56, 0),
    ]  # fmt: skip
    assert len({e["client"] for e in events("ioctl")}) == 1
    assert all(int(e["latency_ns"]) > 0 for e in events("ioctl"))


def test_kv_faults(raw: Raw, trace: None) -> None:
    with raw.kv([full(1, PAGE // 8)]) as kv:
        block = kv.info().block_tokens
        seq = kv.open(tokens=block)
        view = kv.view()
        assert not events("kv_fault")
        view.write(seq, {0: "first"})
        view.check(seq, {0: "first"})
        (fault,) = events("kv_fault")
        assert (fault["write"], fault["ok"]) == ("1", "1")
        assert int(fault["page"]) == seq.offset // PAGE
        assert int(fault["latency_ns"]) > 0
        # what a fork shares is read-only: the next write faults once more
        kv.fork(seq, block)
        before = len(events("kv_fault"))
        view.write(seq, {0: "second"})
        assert [e["write"] for e in events("kv_fault")[before:]] == ["1"]
        view.close()


def test_model_faults(raw: Raw, trace: None) -> None:
    flags = abi.OpenFlag.CREATE | abi.OpenFlag.EXCL | abi.OpenFlag.WRITE
    with raw.slot("test", flags, mode=0o600) as slot:
        with slot.load(weights(0, 3 * PAGE)) as gen:
            view = gen.view()
            assert view[2 * PAGE] == weights(0, 3 * PAGE)[2 * PAGE]
            (fault,) = events("model_fault")
            assert (fault["slot"], int(fault["generation"])) == ("test", gen.number)
            assert (int(fault["page"]), int(fault["mapped"])) == (2, 3)
            view.close()
        assert slot.remove() == 0
