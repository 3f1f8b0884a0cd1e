# SPDX-License-Identifier: MIT
"""The verdict of a benchmark: which rows are over their bound, and that it is the exit code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import measure
import pytest
import rows
from rows import Row

ROW = Row("some", 70, 100, "peer", 0.7)
FRACTION = Row("part", 0.05, 0.01, "peer", 0.05, "ours", "fraction", "none")


@pytest.fixture(autouse=True)
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in (rows, measure):
        monkeypatch.setattr(module, "OUT", tmp_path / "bench")
    return tmp_path / "bench"


def verdict(monkeypatch: pytest.MonkeyPatch, *runs: list[Row], options: tuple[str, ...] = ()) -> object:
    """The exit code of ``measure.py trace`` where ``trace`` yields one of ``runs`` each time."""
    results: Iterator[list[Row]] = iter(runs)
    monkeypatch.setattr(measure, "TRACES", {"trace": lambda: next(results)})
    monkeypatch.setattr("sys.argv", ["measure.py", "trace", *options])
    with pytest.raises(SystemExit) as ended:
        measure.main()
    return ended.value.code


def test_a_row_may_be_at_its_bound_and_not_over_it() -> None:
    assert ROW.ratio == 0.7
    assert ROW.good
    assert not replace(ROW, ours=70.1).good


def test_where_ours_is_bounded_the_peer_does_not_matter() -> None:
    assert FRACTION.ratio == 5
    assert FRACTION.good
    assert not replace(FRACTION, ours=0.0501).good
    assert not replace(FRACTION, ours=0.0501, peer=1).good


def test_where_the_peer_is_better_the_row_says_so_and_has_no_bound() -> None:
    behind = replace(ROW, ours=900, bound=None)
    assert (behind.ratio, behind.better, behind.good) == (9, "peer", True)
    assert replace(behind, ours=100).better is None


def test_the_file_has_every_field_and_the_ratio(out: Path) -> None:
    rows.write("some", [ROW, FRACTION])
    first, second = json.loads((out / "some.json").read_text())
    assert first == {
        "name": "some", "ours": 70, "peer": 100, "peer_name": "peer", "bound": 0.7,
        "bounded": "ratio", "unit": "instructions", "clock": "icount", "ratio": 0.7,
        "better": None,
    }  # fmt: skip
    assert (second["bounded"], second["unit"], second["clock"]) == ("ours", "fraction", "none")


def test_the_table_names_what_is_over(capsys: pytest.CaptureFixture[str]) -> None:
    behind = replace(ROW, name="slow", ours=200, bound=None)
    ahead = replace(behind, name="fast", ours=50)
    rows.table([ROW, replace(ROW, name="other", ours=71), replace(FRACTION, ours=0.0123), behind, ahead])
    _, good, over, fraction, slow, fast = capsys.readouterr().out.splitlines()
    assert good.split() == ["some", "70", "100", "0.7000", "0.7000", "ok", "peer"]
    assert over.split() == ["other", "71", "100", "0.7100", "0.7000", "OVER", "peer"]
    assert fraction.split() == ["part", "0.0123", "0.0100", "1.2300", "0.0500", "ok", "peer"]
    assert slow.split() == ["slow", "200", "100", "2.0000", "-", "peer", "peer"]
    assert fast.split() == ["fast", "50", "100", "0.5000", "-", "ok", "peer"]


def test_one_row_over_its_bound_fails_the_benchmark(monkeypatch: pytest.MonkeyPatch, out: Path) -> None:
    assert verdict(monkeypatch, [ROW, FRACTION]) == 0
    assert verdict(monkeypatch, [replace(ROW, ours=71), FRACTION]) == 1
    assert json.loads((out / "trace.json").read_text())[0]["ours"] == 71
    assert verdict(monkeypatch, [replace(ROW, ours=71)], [ROW], options=("trace",)) == 1


def test_a_benchmark_without_rows_writes_no_file(monkeypatch: pytest.MonkeyPatch, out: Path) -> None:
    assert verdict(monkeypatch, []) == 0
    assert not list(out.iterdir())


@pytest.mark.parametrize(("again", "code"), [(60.5, 0), (59.5, 0), (60.7, 1), (59.3, 1)])
def test_two_runs_agree_to_a_hundredth(monkeypatch: pytest.MonkeyPatch, again: float, code: int) -> None:
    first = replace(ROW, ours=60)
    assert verdict(monkeypatch, [first], [replace(first, ours=again)], options=("--twice",)) == code


def test_an_unknown_benchmark_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdict(monkeypatch, [ROW], options=("nonesuch",)) == 2
