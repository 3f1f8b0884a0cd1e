# SPDX-License-Identifier: MIT
"""Arguments, the program's text, reports in text and JSON, ends: all tools alike, then each its own."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

import tmbpf
from conftest import ROOT, Cell, FakeBPF, Made, Table

NAMES = ("tmlat", "tmtop", "tmsnoop", "tmleak", "tmpressure", "tmdeadline", "tmswap", "tmkv")
CLASSES = {
    "tmlat": "Lat", "tmtop": "Top", "tmsnoop": "Snoop", "tmleak": "Leak", "tmpressure": "Pressure",
    "tmdeadline": "Deadline", "tmswap": "Swap", "tmkv": "KV",
}  # fmt: skip
BAD = (["0"], ["-1"], ["x"], ["1", "0"], ["1", "2", "3"], ["-p", "0"], ["-p", "x"], ["-p", "1e3"], ["-d", "0"],
       ["-d", "5x"], ["-d", "-5s"], ["--no-such"], ["nan"], ["inf"])  # fmt: skip


def tool(name: str) -> tmbpf.Tool:
    made: tmbpf.Tool = getattr(importlib.import_module(name), CLASSES[name])()
    return made


def record(event: int, *numbers: int, text: str = "", pid: int = 181, ns: int = 10**9) -> tmbpf.CRecord:
    raw = tmbpf.CRecord(event=event, pid=pid, tid=pid, cpu=1, comm=b"python3", text=text.encode(), ns=ns)
    for place, number in enumerate(numbers):
        raw.number[place] = number
    return raw


def documents(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def narrow(text: str) -> None:
    assert [line for line in text.splitlines() if len(line) > tmbpf.WIDTH] == []


@pytest.mark.parametrize("name", NAMES)
def test_each_has_its_papers(name: str) -> None:
    assert tool(name).name == name
    assert os.access(ROOT / f"bpf/{name}.py", os.X_OK)
    page = (ROOT / f"docs/man/{name}.8").read_text()
    for section in ("NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXAMPLES", "SEE ALSO"):
        assert f"\n.SH {section}" in page or f'\n.SH "{section}"' in page
    text = page.replace("\\-", "-")
    for option in re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", tool(name).parser().format_usage()):
        assert option in text, f"the man page says nothing of {option}"
    narrow((ROOT / f"bpf/{name}_example.txt").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_help_is_narrow(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        tool(name).main(["-h"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    narrow(out)
    assert "examples:" in out


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("arguments", BAD, ids=" ".join)
def test_bad_arguments_are_refused(name: str, arguments: list[str], tracing: Path, bcc: Made) -> None:
    with pytest.raises(SystemExit) as ended:
        tool(name).main(arguments)
    assert ended.value.code == 2
    assert not bcc


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("tmsnoop", ["-e", "no_such"]), ("tmsnoop", ["-e", "alloc,"]), ("tmlat", ["-e", "free"]),
        ("tmlat", ["--by", "colour"]), ("tmlat", ["--signal", "USR1"]), ("tmlat", ["--over", "5ms"]),
        ("tmlat", ["--signal", "NONE", "--over", "5ms"]), ("tmtop", ["-s", "colour"]), ("tmtop", ["-n", "0"]),
        ("tmleak", ["-o", "long"]), ("tmleak", ["-s", "0"]), ("tmdeadline", ["-n", "-1"]),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)  # fmt: skip
def test_bad_options_of_their_own(name: str, arguments: list[str], tracing: Path, bcc: Made) -> None:
    with pytest.raises(SystemExit) as ended:
        tool(name).main(arguments)
    assert ended.value.code == 2
    assert not bcc


@pytest.mark.parametrize("name", NAMES)
def test_runs_with_nothing_to_tell(
    name: str, tracing: Path, bcc: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    bcc.setup = lambda bpf: bpf.tables.update(tm_signals=Table())
    assert tool(name).main(["-j", "-d", "10ms"]) == 0
    said = capsys.readouterr()
    assert documents(said.out)[-1]["lost"] == 0
    assert "events watched" in said.err
    (bpf,) = bcc
    assert "-DTM_PID=0" in bpf.cflags
    # no macro of ours is left, and each probe is of an event that is there
    assert "TM_EVENT" not in bpf.text and "TM_FIELDS" not in bpf.text
    probed = re.findall(r"RAW_TRACEPOINT_PROBE\((\w+)\)", bpf.text)
    assert probed
    for event in probed:
        assert (tracing / "events/tensormem" / event).is_dir()
    assert bpf.text.count("{") == bpf.text.count("}")


def test_arguments_are_what_is_printed(tracing: Path, bcc: Made) -> None:
    """In the order of the printed line, wherever the record has them; short ones that are signed with their sign."""
    folder = tracing / "events/tensormem/tensormem_model_load"
    text = (folder / "format").read_text()
    fields = text[: text.index("print fmt:")]
    (folder / "format").write_text(f'{fields}print fmt: "error=%d slot=%s size=%llu generation=%llu"\n')
    assert tmbpf.declare("model_load") == (
        "struct { u64 error; u64 slot; u64 size; u64 generation; } "
        "tm_args = { (s32)ctx->args[0], (u64)ctx->args[1], (u64)ctx->args[2], (u64)ctx->args[3] }, *args = &tm_args;"
    )
    assert [field.name for field in tmbpf.fields("model_load")] == ["error", "slot", "size", "generation"]


def module_events() -> list[tuple[str, str]]:
    """Classes and single events of the module's header, by name."""
    text = (ROOT / "kmod/trace.h").read_text()
    return re.findall(r"^(?:TRACE_EVENT|DECLARE_EVENT_CLASS)\((\w+),(.*?)^\);", text, re.M | re.S)


@pytest.mark.parametrize(("name", "body"), module_events(), ids=[name for name, _ in module_events()])
def test_the_module_keeps_to_that_order(name: str, body: str) -> None:
    """Each argument is a field of its type, and printed in its turn: else a tool takes one for the other."""
    proto = re.search(r"TP_PROTO\((.*?)\),\s*TP_ARGS", body, re.S)
    printk = re.search(r'TP_printk\("([^"]*)"', body)
    assert proto and printk
    arguments = {part.split()[-1].lstrip("*"): " ".join(part.split()[:-1]) for part in proto[1].split(",")}
    fields = {field: kind for kind, field in re.findall(r"__field\((\w+), (\w+)\)", body)}
    fields |= dict.fromkeys(re.findall(r"__array\(char, (\w+),", body), "const char")
    assert arguments == fields
    assert list(arguments) == re.findall(r"(\w+)=%", printk[1])
    assert len(arguments) <= 12, "a raw tracepoint has no more"


@pytest.mark.parametrize("name", NAMES)
def test_without_bcc(
    name: str, tracing: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "bcc", None)
    assert tool(name).main([]) == tmbpf.EXIT_NO_BPF
    assert "python3-bpfcc" in capsys.readouterr().err


def test_another_package_called_bcc(
    tracing: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "bcc", json)
    assert tool("tmkv").main([]) == tmbpf.EXIT_NO_BPF
    assert "python3-bpfcc" in capsys.readouterr().err


def test_a_refused_program(tracing: Path, bcc: Made, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(bpf: FakeBPF) -> None:
        raise Exception("Failed to compile BPF module <text>")

    bcc.setup = refuse
    assert tool("tmkv").main([]) == tmbpf.EXIT_NO_BPF
    assert "Failed to compile" in capsys.readouterr().err


def test_without_the_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bcc: Made) -> None:
    monkeypatch.setattr(tmbpf, "TRACING", tmp_path)
    for name in NAMES:
        assert tool(name).main([]) == tmbpf.EXIT_NO_BPF
    assert not bcc


def test_what_the_module_lacks_is_said(tracing: Path, bcc: Made, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool("tmkv").main(["-d", "1ms"]) == 0
    assert "kv_evict" in capsys.readouterr().err
    assert "kv_evict" not in bcc[0].text


def test_pid_reaches_the_kernel(tracing: Path, bcc: Made) -> None:
    tool("tmdeadline").main(["-p", "181", "-d", "1ms"])
    assert "-DTM_PID=181" in bcc[0].cflags
    probes = bcc[0].text.split("TRACEPOINT_PROBE")[1:]
    assert all("tm_skip()" in probe for probe in probes if "sched" not in probe[:8])


def test_intervals_are_differences(tracing: Path, bcc: Made, capsys: pytest.CaptureFixture[str]) -> None:
    """Sums grow in the kernel; each report tells what is new, and all of them together everything."""
    seen = 0

    def grow(bpf: FakeBPF) -> None:
        nonlocal seen
        seen += bpf.looks
        bpf.sum(0, 7, 1, 0, seen, 4 * seen, 1000 * seen)

    bcc.setup = lambda bpf: setattr(bpf, "each", grow)
    assert tool("tmkv").main(["-j", "0.005", "4"]) == 0
    lines = documents(capsys.readouterr().out)
    assert [line["extends"] for line in lines[:-1]] == [1, 2, 3, 4]
    assert sum(line["tokens"] for line in lines[:-1]) == 4 * 10
    assert lines[-1] == {"tool": "tmkv", "time": lines[-1]["time"], "totals": {}, "lost": 0}


def test_a_signal_ends_it_with_the_totals(tracing: Path, bcc: Made, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        bcc.setup = lambda bpf, number=number: bpf.rounds.extend(
            [[record(0, 4096, 4096)] * 23]
        )
        made = tool("tmsnoop")
        made.header = lambda number=number: os.kill(os.getpid(), number)  # type: ignore[method-assign]
        assert made.main(["-e", "alloc"]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == "23 events, 0 lost"


def test_lost_events_are_said(tracing: Path, bcc: Made, capsys: pytest.CaptureFixture[str]) -> None:
    bcc.setup = lambda bpf: setattr(bpf, "lost", 7)
    for name in NAMES:
        bcc.setup = lambda bpf: (setattr(bpf, "lost", 7), bpf.tables.update(tm_signals=Table()))[0]
        tool(name).main(["-d", "1ms"])
        assert "7 " in capsys.readouterr().out.splitlines()[-1]
        tool(name).main(["-j", "-d", "1ms"])
        assert documents(capsys.readouterr().out)[-1]["lost"] == 7


def test_fields(tracing: Path) -> None:
    fields = {field.name: field for field in tmbpf.fields("model_load")}
    assert list(fields) == ["slot", "generation", "size", "error"]
    assert fields["slot"].is_text and not fields["error"].is_text
    assert fields["error"].show(2**64 - 5) == -5
    assert fields["size"].show(2**64 - 5) == 2**64 - 5
    kind = next(field for field in tmbpf.fields("alloc") if field.name == "kind")
    assert (kind.show(2), kind.show(9)) == ("kv", "9")


def test_snoop_lines(tracing: Path, bcc: Made, capsys: pytest.CaptureFixture[str]) -> None:
    big = record(0, 2**40, 2**40, 2**45, 1500, 4_000_000_000, 4_000_000_000, 2, 2)
    bcc.setup = lambda bpf: bpf.rounds.append([record(0, 4096, 4096, 0, 1500, 3, 5, 2, 2), big])
    assert tool("tmsnoop").main(["-T", "-e", "alloc", "-d", "5ms"]) == 0
    out = capsys.readouterr().out
    narrow(out)
    head, first, _, total = out.splitlines()
    assert head.split() == ["SECONDS", "PID", "COMM", "EVENT", "FIELDS"]
    assert re.match(r"\d\d:\d\d:\d\d     1\.000000    181 python3    alloc +size=4K latency=1\.5us", first)
    assert total == "2 events, 0 lost"
    bcc.setup = lambda bpf: bpf.rounds.append([big])
    tool("tmsnoop").main(["-w", "-e", "alloc", "-d", "5ms"])
    assert "kind=kv pool=buddy offset=35184372088832" not in (wide := capsys.readouterr().out)
    for name in ("size=1T", "kind=kv", "pool=buddy", "offset=35184372088832", "handle=4000000000"):
        assert name in wide
    bcc.setup = lambda bpf: bpf.rounds.append([big])
    tool("tmsnoop").main(["-j", "-e", "alloc", "-d", "5ms"])
    line = documents(capsys.readouterr().out)[0]
    assert (line["size"], line["kind"], line["handle"], line["pid"]) == (2**40, "kv", 4_000_000_000, 181)


def test_lat(tracing: Path, bcc: Made, capsys: pytest.CaptureFixture[str]) -> None:
    def fill(bpf: FakeBPF) -> None:
        bpf.tables["tm_signals"] = Table({0: Cell(1), 1: Cell(22)})
        bpf.sum(0, 2 | 2 << 8, 12, 10, 20, 30000, 0)
        bpf.sum(0, 1 | 1 << 8, 21, 30, 3, 4 << 30, 0)

    bcc.setup = fill
    assert tool("tmlat").main(["-e", "alloc", "-d", "1ms", "--signal", "usr1", "--over", "5ms"]) == 0
    out = capsys.readouterr().out
    narrow(out)
    assert "alloc pool=buddy: 20, 1.5us on average" in out
    assert "22 signals sent, 1 not" in out
    assert f"-DTM_SIGNAL={int(signal.SIGUSR1)}" in bcc[0].cflags and "-DTM_OVER=5000000ULL" in bcc[0].cflags
    for by, found in (
        ("none", {(): 23}), ("kind", {("kv",): 20, ("weights",): 3}),
        ("kind,size", {("kv", "4K"): 20, ("weights", "2M"): 3}),
    ):  # fmt: skip
        assert tool("tmlat").main(["-e", "alloc", "-j", "-d", "1ms", "--by", by]) == 0
        lines = documents(capsys.readouterr().out)[:-1]
        parts = ("pool", "kind", "size")
        assert {tuple(line[p] for p in parts if p in line): line["count"] for line in lines} == found
        assert sum(sum(line["buckets"].values()) for line in lines) == 23


def test_top(tracing: Path, bcc: Made, capsys: pytest.CaptureFixture[str]) -> None:
    def fill(bpf: FakeBPF) -> None:
        bpf.sum(0, 5, 0, 0, 23, 23 << 20, 24 << 20)
        bpf.sum(1, 5, 0, 0, 3, 3 << 20, 4 << 20)
        bpf.sum(0, 6, 0, 0, 1, 2**50, 2**50)
        bpf.tables["tm_names"] = Table({Cell(5): Cell(pid=181, comm=b"a-long-name-1234")})

    bcc.setup = fill
    tool("tmtop").main(["-j", "-d", "5ms"])
    first, second, _ = documents(capsys.readouterr().out)
    assert (first["client"], second["client"]) == (6, 5)
    assert (second["allocs"], second["frees"], second["bytes"], second["held"]) == (23, 3, 23 << 20, 20 << 20)
    assert (second["pid"], second["comm"], first["comm"]) == (181, "a-long-name-1234", "?")
    tool("tmtop").main(["-n", "1", "-d", "5ms"])
    out = capsys.readouterr().out
    narrow(out)
    assert len(out.splitlines()) == 2


def test_leak(tracing: Path, bcc: Made, capsys: pytest.CaptureFixture[str]) -> None:
    def fill(bpf: FakeBPF) -> None:
        blocks = {n: Cell(ns=1000, size=4096, kernel=3, user=4, pid=181) for n in range(23)}
        bpf.tables["tm_blocks"] = Table({**blocks, 99: Cell(ns=1000, size=1 << 30, kernel=-1, user=-14, pid=7)})
        bpf.tables["tm_made"] = Table(enumerate(Cell(count) for count in (30, 6, 0, 0)))

    bcc.setup = fill
    tool("tmleak").main(["-j", "-d", "1ms"])
    total, large, small, _ = documents(capsys.readouterr().out)
    assert (total["alloc"], total["free"]) == (30, 6)
    assert "-DTM_SAMPLE=1" in bcc[-1].cflags
    assert (total["outstanding"], total["bytes"]) == (24, (1 << 30) + 23 * 4096)
    assert (large["count"], large["kernel"], large["user"]) == (1, [], [])
    assert small["count"] == 23 and small["kernel"][0].endswith("+0x1003")
    assert small["user"] == ["user_function [/usr/bin/program]", "0x2000"]
    tool("tmleak").main(["-d", "1ms", "-n", "1"])
    out = capsys.readouterr().out
    narrow(out)
    assert out.count("of process") == 1
    tool("tmleak").main(["-j", "-o", "999999999s", "-K", "-d", "1ms"])
    assert documents(capsys.readouterr().out)[0]["outstanding"] == 0
    assert "-DTM_KERNEL=0" in bcc[-1].cflags
    tool("tmleak").main(["-j", "-s", "16", "1ms", "2"])
    lines = documents(capsys.readouterr().out)
    assert [(line["alloc"], line["free"]) for line in lines if "alloc" in line] == [(30, 6), (0, 0)]
    assert "-DTM_SAMPLE=16" in bcc[-1].cflags


def test_deadline(tracing: Path, bcc: Made, capsys: pytest.CaptureFixture[str]) -> None:
    def fill(bpf: FakeBPF) -> None:
        # the event's three numbers, then the wait, two stacks, of which the kernel's is none, and its beginning
        bpf.rounds.append([record(1, 65536, 5_000_000, 9, 6_000_000, 2**32 - 1, 4, 500)])
        ran = {}
        waits = ((7, 100, 181, 500), (8, 4_000_000, 181, 500), (9, 10**9, 5, 500), (6, 10**9, 181, 400),
                 (6, 10**9, 181, 600))  # fmt: skip
        for pid, ns, waiter, since in waits:
            ran[Ran(waiter, pid, since)] = Cell(ns)
        bpf.tables["tm_ran"] = Table(ran)
        bpf.sum(0, 0, 0, 0, 2, 0, 0)

    bcc.setup = fill
    tool("tmdeadline").main(["-j", "-d", "5ms"])
    miss, waits, end = documents(capsys.readouterr().out)
    assert (miss["size"], miss["had_ns"], miss["waited_ns"], miss["client"]) == (65536, 5_000_000, 6_000_000, 9)
    assert (miss["kernel"], len(miss["user"])) == ([], 2)
    assert [(one["pid"], one["ns"]) for one in miss["ran"]] == [(8, 4_000_000), (7, 100)]
    # another thread's, and a wait that has only begun
    assert set(bcc[0].tables["tm_ran"]) == {(5, 9, 500), (181, 6, 600)}
    assert (waits["waits"], waits["missed"], end["totals"]) == (2, 1, {"rt_miss": 1})
    tool("tmdeadline").main(["-d", "5ms", "-n", "1"])
    out = capsys.readouterr().out
    narrow(out)
    assert "64K in 5ms" in out and out.count(" ran ") == 1


class Ran(tuple[int, int, int]):
    """Who ran while somebody waited, and since when he waited."""

    waiter = property(lambda self: self[0])
    pid = property(lambda self: self[1])
    since = property(lambda self: self[2])
    comm = b"hog"

    def __new__(cls, *parts: int) -> Ran:
        return super().__new__(cls, parts)


def test_swap(tracing: Path, bcc: Made, capsys: pytest.CaptureFixture[str]) -> None:
    staged = record(0, 4, 1 << 30, text="llama")
    loaded = record(1, 4, 1 << 30, 0, text="llama", ns=3 * 10**9)
    failed = record(1, 5, 1 << 30, 2**64 - 5, text="a-slot-of-a-name-that-is-longer-than-its-column")
    bcc.setup = lambda bpf: bpf.rounds.append([staged, loaded, failed])
    tool("tmswap").main(["-d", "5ms"])
    out = capsys.readouterr().out
    narrow(out)
    _, _, second, third, total = out.splitlines()
    assert re.search(r"llama +4 load +2s 1G$", second)
    assert third.endswith("EIO")
    assert total == "3 events, 0 lost"
    bcc.setup = lambda bpf: bpf.rounds.append([staged, loaded, failed])
    tool("tmswap").main(["-j", "-d", "5ms"])
    lines = documents(capsys.readouterr().out)
    assert [line.get("after_ns") for line in lines[:3]] == [0, 2 * 10**9, None]
    assert lines[2]["error"] == -5


def test_pressure(
    tracing: Path, bcc: Made, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("tmpressure")
    zones = tracing / "zoneinfo"
    zones.write_text("Node 0, zone DMA\n  pages free     10\n        boost    0\n        min      1\n"
                     "        low      2\n        high     3\n        spanned  99\n  pagesets\n    cpu: 0\n"
                     "              high: 50\n"
                     "Node 0, zone Normal\n  pages free     5\n        min      1\n")  # fmt: skip
    monkeypatch.setattr(module, "ZONEINFO", zones)
    monkeypatch.setattr(module, "SYSFS", tracing)
    bcc.setup = lambda bpf: (bpf.sum(0, 1, 0, 0, 23, 0, 23000), bpf.sum(0, 0, 0, 0, 1, 0, 5))[0]
    tool("tmpressure").main(["-j", "-d", "1ms"])
    marks, refused, grown, _ = documents(capsys.readouterr().out)
    page = os.sysconf("SC_PAGE_SIZE")
    assert marks["watermarks"] == {"free": 15 * page, "min": 2 * page, "low": 2 * page, "high": 3 * page}
    assert (grown["event"], grown["count"], grown["total_ns"]) == ("chunk_grow", 23, 23000)
    assert refused["detail"] == "refused"
    tool("tmpressure").main(["-d", "1ms"])
    narrow(capsys.readouterr().out)


def test_kv_table(tracing: Path, bcc: Made, capsys: pytest.CaptureFixture[str]) -> None:
    bcc.setup = lambda bpf: (bpf.sum(0, 5, 2, 0, 23, 92, 1000), bpf.sum(1, 5, 2, 0, 4, 40000, 39999))[0]
    tool("tmkv").main(["-d", "1ms"])
    out = capsys.readouterr().out
    narrow(out)
    assert out.splitlines()[1].split()[:5] == ["5", "2", "92", "0", "39999/40000"]


@pytest.mark.parametrize("value", [0, 1, 999, 999.4, 999.6, 1e6, 123456789, 1e15, 1e20])
def test_units_are_short(value: float) -> None:
    assert len(tmbpf.show_ns(value)) <= 6 or value > 1e12
    assert len(tmbpf.show_size(value)) <= 6 or value > 1e15


def test_histogram_is_drawn() -> None:
    lines = list(tmbpf.draw({0: 1, 10: 23, 40: 10**9}))
    assert len(lines) == 41
    assert max(map(len, lines)) <= tmbpf.WIDTH
    assert "*" in lines[-1] and " 23 |" in lines[10]
    assert list(tmbpf.draw({})) == []
