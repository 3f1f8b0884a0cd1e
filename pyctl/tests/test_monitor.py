# SPDX-License-Identifier: MIT
"""``tensormem monitor``: which tool runs, when histograms take its place, and how they are read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tensormem import TensormemError, tracehist
from tensormem.cli import cli
from tensormem.commands import monitor

HIST = """\
# event histogram
#
# trigger info: hist:keys=pool,latency_ns.log2:vals=hitcount,latency_ns:sort=hitcount [active]
#

{ pool:          3, latency_ns: ~ 2^12 } hitcount:          3  latency_ns:       9000
{ pool:          2, latency_ns: ~ 2^13 } hitcount:         20  latency_ns:     130000

Totals:
    Hits: 25
    Entries: 2
    Dropped: 2
"""
TRACE = (
    "         python3-181     [001] .....    99.250000: tensormem_alloc: client=3 handle=1 kind=kv "
    "pool=buddy size=4096 held=4096 offset=0x1000 latency_ns=1500\n"
)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for tools, and no tracefs."""
    monkeypatch.setenv("TENSORMEM_BPF", str(tmp_path))
    monkeypatch.setenv("TENSORMEM_TRACING", str(tmp_path / "no-tracefs"))
    monkeypatch.setattr(monitor, "_python", lambda: "/bin/sh")
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["monitor", *arguments])


def test_histograms_are_parsed() -> None:
    counts, dropped = tracehist.parse_hist(HIST)
    assert [count.count for count in counts] == [3, 20]
    assert counts[1].keys == {"pool": "2", "latency_ns": "8192"}
    assert counts[1].sums == {"latency_ns": 130000}
    assert dropped == 2
    news = counts[1].since(tracehist.Count(counts[1].keys, 15, {"latency_ns": 100000}))
    assert (news.count, news.sums) == (5, {"latency_ns": 30000})
    assert counts[1].since(None) is counts[1]


def test_keys_of_text_are_parsed() -> None:
    (count,), dropped = tracehist.parse_hist(
        "{ slot: llama, with a comma                    , generation:   4 } hitcount:   23\n"
    )
    assert count.keys["generation"] == "4"
    assert (count.count, count.sums, dropped) == (23, {}, 0)


def test_an_empty_histogram() -> None:
    totals = "\nTotals:\n    Hits: 0\n    Entries: 0\n    Dropped: 0\n"
    assert tracehist.parse_hist(totals) == ([], 0)
    assert tracehist.parse_hist("") == ([], 0)


@pytest.mark.parametrize(
    ("comm", "flags"),
    [("python3", "....."), ("<idle>", "d.h2."), ("a-b c-1", "...1."), ("kworker/0:1", "dNs..")],
)
def test_events_are_parsed(comm: str, flags: str) -> None:
    line = TRACE.replace("python3", comm).replace(".....", flags)
    event = tracehist.parse_event(line)
    assert event is not None
    assert (event.comm, event.tid, event.seconds, event.event) == (comm, 181, 99.25, "alloc")
    assert event.values["pool"] == "buddy"
    assert event.values["latency_ns"] == "1500"


@pytest.mark.parametrize("line", ["", "\n", "# tracer: nop\n", "CPU:0 [LOST 12 EVENTS]\n", "x"])
def test_other_lines_are_no_events(line: str) -> None:
    assert tracehist.parse_event(line) is None


def test_each_histogram_has_its_own_event() -> None:
    assert set(tracehist.MONITORS) == {
        "tmlat", "tmtop", "tmsnoop", "tmleak", "tmpressure", "tmdeadline", "tmswap", "tmkv",
    }  # fmt: skip
    for histograms in tracehist.MONITORS.values():
        paths = [histogram.path for histogram in histograms]
        assert len(paths) == len(set(paths))
        assert all(path.startswith(("tensormem/tensormem_", "vmscan/")) for path in paths)


def test_a_process_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TensormemError, match="no process"):
        tracehist.Instance("tmkv", 1 << 30)


def test_the_tool_gets_the_arguments_and_its_exit_code_counts(tools: Path) -> None:
    (tools / "tmkv.py").write_text('echo "tmkv: 8 events watched" >&2; echo "$@" >out; exit 7\n')
    before = Path.cwd()
    os.chdir(tools)
    try:
        result = run("tmkv", "-j", "-p", "181", "1", "5")
    finally:
        os.chdir(before)
    assert (tools / "out").read_text() == "-j -p 181 1 5\n"
    assert result.exit_code == 7
    assert "events watched" in result.stderr


def test_json_is_an_option_of_the_command_too(tools: Path) -> None:
    (tools / "tmlat.py").write_text("")
    seen: list[list[str]] = []

    def ran(tool: Path, arguments: list[str]) -> tuple[int, str]:
        seen.append(list(arguments))
        return 0, ""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(monitor, "_run", ran)
        run("--json", "tmlat", "1", "5")
        run("tmlat", "-j", "1", "5")
    assert seen == [["-j", "1", "5"]] * 2


def test_wrong_usage_is_the_tools_own_words(tools: Path) -> None:
    (tools / "tmkv.py").write_text("echo 'usage: tmkv' >&2; echo 'tmkv: error: no' >&2; exit 2\n")
    result = run("tmkv", "--no-such")
    assert result.exit_code == 2
    assert "usage: tmkv\ntmkv: error: no\n" in result.stderr


def test_where_bpf_cannot_run_the_reason_is_one_line(tools: Path) -> None:
    (tools / "tmkv.py").write_text(
        "echo 'error: 20 lines of a compiler' >&2; echo 'tmkv: bcc is not installed' >&2; exit 3\n"
    )
    result = run("tmkv", "-T")
    assert result.exit_code == 1
    assert "lines of a compiler" not in result.stderr
    assert "tmkv: histograms of tracefs (bcc is not installed)\n" in result.stderr
    assert "cannot trace" in result.stderr
    assert "be root" in result.stderr


def test_what_histograms_cannot_do_is_said(tools: Path) -> None:
    result = run("--tracefs", "tmlat", "--by", "kind", "-j")
    assert "as asked for" in result.stderr
    assert "without --by: that takes BPF" in result.stderr
    assert "the eBPF tools are not installed" in run("tmlat").stderr


@pytest.mark.parametrize(
    "arguments", [["0"], ["1", "0"], ["-d", "x"], ["-p", "-1"], ["nan"], ["--no"]], ids=" ".join
)
def test_bad_arguments_without_bpf(tools: Path, arguments: list[str]) -> None:
    assert run("--tracefs", "tmkv", *arguments).exit_code == 2


def test_no_such_monitor(tools: Path) -> None:
    result = run("tmnone")
    assert result.exit_code == 2
    assert "tmsnoop" in result.stderr


def test_every_bound_is_shown_with_its_unit() -> None:
    assert monitor._show("latency_ns", "8192") == "latency<=8.19us"
    assert monitor._show("pool", "2") == "pool=2"


def test_json_of_a_report(capsys: pytest.CaptureFixture[str]) -> None:
    """Differences between looks, and the total of what was shown."""
    options = monitor._parser("tmkv").parse_args(["-j"])
    fallback = monitor._Fallback("tmkv", options)

    class Fake:
        counts_: dict[tuple[str, tuple[tuple[str, str], ...]], tracehist.Count]

        def counts(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], tracehist.Count]:
            return dict(self.counts_)

    key = ("kv_extend", (("cache", "2"),))
    fake = Fake()
    fake.counts_ = {key: tracehist.Count({"cache": "2"}, 3, {"tokens": 12})}
    seen = fallback.report(fake, {})  # type: ignore[arg-type]
    fake.counts_ = {key: tracehist.Count({"cache": "2"}, 23, {"tokens": 92})}
    seen = fallback.report(fake, seen)  # type: ignore[arg-type]
    fallback.report(fake, seen)  # type: ignore[arg-type]
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["count"] for line in lines] == [3, 20]
    assert [line["sums"]["tokens"] for line in lines] == [12, 80]
    assert fallback.total == 23
