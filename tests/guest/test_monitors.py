# SPDX-License-Identifier: MIT
"""The eBPF tools beside known workloads: each tells exactly what happened, with bcc and without.

A compiler takes its time in an emulated machine, so tools that watch the same are started together.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from device import CHUNK, PAGE, RT, TRACING, Raw, full, read, weights, write
from monitor import BPF, Monitor, documents
from tensormem import abi

N = 23
MS = 10**6
CLI = (sys.executable, "-m", "tensormem", "monitor")
Told = dict[str, list[dict[str, Any]]]


def tensors() -> None:
    """N tensors come, are touched once each, and go; N more stay until the end of their client."""
    with Raw() as raw:
        for keep in (False, True):
            _, _, items = raw.alloc_batch([PAGE * (1 + i) for i in range(N)])
            for item in [] if keep else items:
                mapping = raw.map_tensor(item)
                mapping[0] = 1
                mapping.close()
            if not keep:
                assert raw.free_batch([item.handle for item in items])[0] == 0
        during()


def objects() -> None:
    """N steps of each kind with a KV cache, a model slot and an arena of the RT pool."""
    with Raw() as raw:
        with raw.kv([full(1, PAGE // 8)], max_sequences=32) as kv:
            seq = kv.open()
            for _ in range(N):
                assert kv.extend(seq, 1) == 0
            children = [kv.fork(seq, N - 1) for _ in range(N)]
            for child in (*children, seq):
                assert kv.end(child) == 0
        flags = abi.OpenFlag.CREATE | abi.OpenFlag.EXCL | abi.OpenFlag.WRITE
        with raw.slot("llama", flags, mode=0o600) as slot:
            for i in range(N):
                slot.swap(weights(i, PAGE))
            assert slot.remove() == 0
        with raw.rt(CHUNK) as rt:
            rt.fill_up()
            interrupted(rt)
            for _ in range(N):
                assert rt.alloc_errno(4096, deadline_ns=MS) != 0
        during()


def interrupted(rt: RT) -> None:
    """A wait that a signal ends, and then this thread sleeps for other reasons."""
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    # again and again: the first may come before the wait
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
    assert rt.alloc_errno(4096, deadline_ns=3600 * 1000 * MS) == errno.EINTR
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    time.sleep(0.3)


#: What a workload does while all that it made is still there.
during: Callable[[], None] = lambda: None


def watched(monitors: Sequence[Monitor], work: Callable[[], None]) -> Told:
    """What each told of a workload that began when all watched, and was there still when they ended."""
    global during
    told: Told = {}

    def end() -> None:
        for monitor in monitors:
            told[monitor.name] = documents(monitor.end())

    with ExitStack() as stack:
        for monitor in monitors:
            stack.callback(monitor.close)
        for monitor in monitors:
            monitor.ready()
        during = end
        work()
    return told


@pytest.fixture(scope="module")
def of_tensors() -> Told:
    me = ("-p", str(os.getpid()))
    return watched(
        [Monitor("tmsnoop", "-j", *me), Monitor("tmlat", "-j", *me), Monitor("tmtop", "-j"), Monitor("tmleak", "-j")],
        tensors,
    )


@pytest.fixture(scope="module")
def of_objects() -> tuple[Told, int]:
    """And how many chunks the pool took meanwhile."""
    names = ("tmkv", "tmswap", "tmpressure", "tmdeadline")
    monitors = [Monitor(name, "-j", command=(*CLI, name)) for name in names]
    reserve, capacity = read("chunk/reserve"), read("chunk/capacity")
    try:
        for name, value in (("reserve", 0), ("capacity", 0), ("capacity", capacity)):
            assert write(f"chunk/{name}", value) == 0
        grown = 0

        def work() -> None:
            nonlocal grown
            grown = read("chunk/grown")
            objects()
            grown = read("chunk/grown") - grown

        return watched(monitors, work), grown
    finally:
        for monitor in monitors:
            monitor.close()
        assert write("chunk/reserve", reserve) == 0


def lines(told: Sequence[dict[str, Any]], **fields: Any) -> list[dict[str, Any]]:
    """Those lines that have all these fields."""
    return [line for line in told if all(line.get(name) == value for name, value in fields.items())]


def only(told: Sequence[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    (line,) = lines(told, **fields)
    return line


@pytest.mark.parametrize("name", ["tmsnoop", "tmlat", "tmtop", "tmleak"])
def test_told_and_nothing_lost(name: str, of_tensors: Told) -> None:
    assert of_tensors[name][-1]["lost"] == 0
    assert {line["tool"] for line in of_tensors[name]} == {name}


def test_told_by_snoop(of_tensors: Told) -> None:
    told = of_tensors["tmsnoop"]
    sizes = [PAGE * (1 + i) for i in range(N)]
    allocs, frees = lines(told, event="alloc"), lines(told, event="free")
    assert [line["size"] for line in allocs] == sizes * 2
    assert [line["size"] for line in frees] == sizes
    assert {(line["kind"], line["pool"]) for line in allocs} == {("kv", "buddy")}
    assert {line["handle"] for line in allocs[:N]} == {line["handle"] for line in frees}
    assert len(lines(told, event="fault")) == N
    assert {line["pid"] for line in told[:-1]} == {os.getpid()}
    # two batches of allocations and one of frees, to the end of the trace; all calls were good
    calls = [line["cmd"] for line in lines(told, event="ioctl", ret=0)]
    assert calls == [0x20, 0x21, 0x20]
    assert told[-1]["totals"]["alloc"] == 2 * N
    times = [line["seconds"] for line in told[:-1]]
    assert times == sorted(times)


def test_told_by_lat(of_tensors: Told) -> None:
    told = of_tensors["tmlat"]
    alloc = only(told, event="alloc")
    assert (alloc["count"], alloc["pool"]) == (2 * N, "buddy")
    assert sum(alloc["buckets"].values()) == 2 * N
    assert only(told, event="fault")["count"] == N
    assert {line["cmd"]: line["count"] for line in lines(told, event="ioctl")} == {"0x20": 2, "0x21": 1}


def test_told_by_top(of_tensors: Told) -> None:
    row = only(of_tensors["tmtop"], pid=os.getpid())
    total = PAGE * N * (N + 1) // 2
    assert (row["allocs"], row["frees"], row["faults"], row["calls"]) == (2 * N, N, N, 3)
    assert row["bytes"] == 2 * total
    # the buddy pool rounds up, by less than a half
    assert total <= row["held"] < 2 * total
    assert row["comm"] in Path("/proc/self/comm").read_text()


def test_told_by_leak(of_tensors: Told) -> None:
    told = of_tensors["tmleak"]
    assert (told[0]["outstanding"], told[0]["bytes"]) == (N, PAGE * N * (N + 1) // 2)
    assert (told[0]["alloc"], told[0]["free"]) == (2 * N, N)
    (origin,) = [line for line in told if "kernel" in line]
    assert (origin["count"], origin["pid"]) == (N, os.getpid())
    assert any("tm_device_ioctl" in name for name in origin["kernel"])
    assert origin["user"]


@pytest.mark.parametrize("name", ["tmkv", "tmswap", "tmpressure", "tmdeadline"])
def test_told_of_objects_and_nothing_lost(name: str, of_objects: tuple[Told, int]) -> None:
    assert of_objects[0][name][-1]["lost"] == 0


def test_told_by_kv(of_objects: tuple[Told, int]) -> None:
    row = only(of_objects[0]["tmkv"][:-1])
    assert (row["extends"], row["tokens"], row["forks"]) == (N, N, N)
    # each child's last block is not full, and is copied
    assert row["copies"] == N
    assert row["lookups"] == row["evicted"] == row["packs"] == 0


def test_told_by_swap(of_objects: tuple[Told, int]) -> None:
    told = of_objects[0]["tmswap"]
    for step in ("stage", "load", "commit"):
        found = lines(told, step=step)
        assert [line["slot"] for line in found] == ["llama"] * N
        assert [line["generation"] for line in found] == sorted(line["generation"] for line in found)
    assert all(line["error"] == 0 and line["size"] == PAGE for line in lines(told, step="load"))
    # the slot goes with its last two generations; those freed by a worker may be told later
    assert N - 2 <= len(lines(told, step="retire")) <= N
    assert all(line["after_ns"] > 0 for line in lines(told, step="commit"))


def test_told_by_pressure(of_objects: tuple[Told, int]) -> None:
    told, grown = of_objects
    rows = lines(told["tmpressure"], event="chunk_grow", detail="")
    assert sum(row["count"] for row in rows) == grown > 0
    marks = told["tmpressure"][0]["watermarks"]
    assert 0 < marks["min"] < marks["low"] < marks["high"] < marks["free"]


def test_told_by_deadline(of_objects: tuple[Told, int]) -> None:
    told = of_objects[0]["tmdeadline"]
    misses = [line for line in told if "had_ns" in line]
    assert len(misses) == N
    for miss in misses:
        assert (miss["pid"], miss["size"]) == (os.getpid(), 4096)
        # the deadline is a time of day, and the call begins a little after it was chosen
        assert 0 < miss["had_ns"] <= MS and miss["waited_ns"] > 0
        assert any("tm_rt" in name for name in miss["kernel"])
        # not what ran in the wait that a signal ended, nor after it
        assert sum(one["ns"] for one in miss["ran"]) <= miss["waited_ns"]
    assert only(told, waits=N + 1)["missed"] == N
    # it slept, so something else ran, if only the idle task
    assert any(miss["ran"] for miss in misses)


#: What the histograms of the kernel are to count of both workloads, by tool and event.
COUNTED = {
    "tmlat": {"alloc": 2 * N, "fault": N, "kv_extend": N},
    "tmtop": {"alloc": 2 * N, "free": 2 * N, "fault": N},
    "tmleak": {"alloc": 2 * N, "free": 2 * N},
    "tmdeadline": {"rt_wait": N + 1, "rt_miss": N},
    "tmswap": {"model_stage": N, "model_load": N, "model_commit": N},
    "tmkv": {"kv_extend": N, "kv_fork": N, "kv_copy": N},
    "tmpressure": {},
}


@pytest.fixture
def no_bcc(tmp_path: Path) -> dict[str, str]:
    """An environment whose Python has no bcc."""
    (tmp_path / "bcc.py").write_text("raise ImportError('there is none')\n")
    return {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ['PYTHONPATH']}"}


@pytest.fixture
def traced(no_bcc: dict[str, str]) -> Iterator[Callable[..., Monitor]]:
    """Monitors without bcc, all of them gone at the end, and their trace instances with them."""
    with ExitStack() as stack:

        def start(name: str, *arguments: str) -> Monitor:
            monitor = Monitor(name, *arguments, command=(*CLI, name), env=no_bcc)
            stack.callback(monitor.close)
            return monitor.ready()

        yield start
    assert not list((TRACING / "instances").glob("tensormem-*"))


def test_told_by_tracefs(traced: Callable[..., Monitor]) -> None:
    monitors = [traced(name, "-j") for name in COUNTED]
    tensors_then_objects()
    for monitor in monitors:
        assert "there is none" in "".join(monitor.said), "it does not say why"
        told = documents(monitor.end())
        counts: dict[str, int] = {}
        for line in told[:-1]:
            counts[line["event"]] = counts.get(line["event"], 0) + line["count"]
        assert {event: counts.get(event) for event in COUNTED[monitor.name]} == COUNTED[monitor.name], monitor.name
        assert (told[-1]["total"], told[-1]["lost"]) == (sum(counts.values()), 0)


def tensors_then_objects() -> None:
    global during
    during = lambda: None
    tensors()
    objects()


def test_told_by_the_trace(traced: Callable[..., Monitor]) -> None:
    monitor = traced("tmsnoop", "-j", "-p", str(os.getpid()))
    tensors_then_objects()
    told = documents(monitor.end(signal.SIGTERM))
    allocs = lines(told, event="alloc")
    assert [int(line["size"]) for line in allocs] == [PAGE * (1 + i) for i in range(N)] * 2
    assert len(lines(told, event="rt_miss")) == len(lines(told, event="kv_extend")) == N
    assert told[-1]["lost"] == 0


def test_tracefs_in_text(traced: Callable[..., Monitor]) -> None:
    monitor = traced("tmkv", "-T", "0.2", "2")
    told = monitor.lines()
    assert told[-1].endswith("events, 0 lost")
    snoop = traced("tmsnoop")
    tensors_then_objects()
    told = snoop.end()
    assert max(map(len, told)) < 80
    assert sum(" alloc " in line for line in told) == 2 * N


def test_of_one_process_and_its_end() -> None:
    """A child and we do the same: only the child's is told. It ends by itself, in text."""
    script = (
        "import sys; from device import PAGE, Raw\n"
        f"raw = Raw(); sys.stdin.readline(); raw.alloc_batch([PAGE] * {N}); raw.close()\n"
        "print('done', flush=True); sys.stdin.readline()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": f"{Path(__file__).parent}:{os.environ['PYTHONPATH']}"},
    )  # fmt: skip
    monitor = Monitor("tmsnoop", "-T", "-p", str(child.pid), "-e", "alloc,free")
    try:
        monitor.ready()
        tensors_then_objects()
        assert child.stdin and child.stdout
        child.stdin.write("go\n")
        child.stdin.flush()
        assert child.stdout.readline() == "done\n"
        told = monitor.end()
    finally:
        monitor.close()
        child.kill()
        child.communicate()
    assert max(map(len, told)) < 80
    assert sum(" alloc " in line for line in told) == sum(" free " in line for line in told) == N
    assert told[-1] == f"{2 * N} events, 0 lost"


def test_signals_and_reports_by_the_clock() -> None:
    """Who allocates too slowly is told so, once for each; another tool ends after its reports."""
    came = 0

    def count(number: int, frame: object) -> None:
        nonlocal came
        came += 1

    before = signal.signal(signal.SIGUSR1, count)
    lat = Monitor("tmlat", "-j", "-p", str(os.getpid()), "-e", "alloc", "--signal", "USR1", "--over", "1ns")
    clock = Monitor("tmpressure", "-j", "0.3", "3")
    try:
        lat.ready()
        with Raw() as raw:
            for _ in range(N):
                raw.alloc(PAGE)
            told = documents(lat.end())
        reports = documents(clock.ready().lines())
    finally:
        lat.close()
        clock.close()
        signal.signal(signal.SIGUSR1, before)
    assert came == N
    assert only(told, signals=N)["failed"] == 0
    assert sum("watermarks" in line for line in reports) == 3


def test_refused_usage() -> None:
    for name in COUNTED:
        result = subprocess.run([sys.executable, BPF / f"{name}.py", "0"], capture_output=True, check=False)
        assert result.returncode == 2
    result = subprocess.run([*CLI, "tmkv", "--no-such"], capture_output=True, check=False)
    assert result.returncode == 2
    result = subprocess.run([*CLI, "tmnone"], capture_output=True, check=False)
    assert result.returncode == 2


def test_a_module_that_goes_is_not_kept(no_bcc: dict[str, str]) -> None:
    """A tool killed without a chance leaves a trace instance; the next one does not stumble over it."""
    monitor = Monitor("tmkv", "-j", command=(*CLI, "tmkv"), env=no_bcc).ready()
    folder = TRACING / f"instances/tensormem-{monitor.process.pid}"
    assert folder.is_dir()
    monitor.close()
    assert folder.is_dir()
    again = Monitor("tmkv", "-j", command=(*CLI, "tmkv"), env=no_bcc).ready()
    assert not folder.is_dir()
    assert json.loads(again.end()[-1])["total"] == 0
    again.close()
