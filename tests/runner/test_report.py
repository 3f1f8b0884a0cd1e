# SPDX-License-Identifier: MIT
"""What a failed stage shows: each failed test's own words, and the end of the log."""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import quoteattr

import pytest
import run


def stage(folder: Path, tests: dict[str, str]) -> run.Counts:
    """The counts of a stage with these tests: what each holds in junit.xml."""
    cases = "".join(f'<testcase classname="f" name={quoteattr(name)}>{text}</testcase>' for name, text in tests.items())
    (folder / "junit.xml").write_text(f"<testsuite>{cases}</testsuite>")
    return run.count_junit(folder / "junit.xml")


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log"
    path.write_text("".join(f"line {i}\n" for i in range(500)) + "the kernel reported trouble\n")
    return path


def failure(why: str, lines: int) -> str:
    return f'<failure message="{why}&#10;more">' + "".join(f"{why} {i}\n" for i in range(lines)) + "</failure>"


def test_outcomes_are_counted_by_name(tmp_path: Path) -> None:
    counts = stage(
        tmp_path, {"good": "", "bad": failure("is 1", 3), "left": "<error message='lost'>e</error>", "no": "<skipped/>"}
    )
    assert (counts.passed, counts.failed, counts.skipped) == (1, 2, 1)
    assert counts.bad == ["f::bad: is 1", "f::left: lost"]


@pytest.mark.parametrize("failures", [1, 3, 200])
def test_every_failure_has_its_say(tmp_path: Path, log: Path, failures: int) -> None:
    shown = run.explain(stage(tmp_path, {f"t{i}": failure(f"no{i}", 90) for i in range(failures)}), log)
    for i in range(failures):
        assert f"FAILED f::t{i}: no{i}" in shown
    assert f"no{failures - 1} 89" in shown or failures == 200
    # the guest's report of a splat comes after pytest's
    assert shown[-1] == "the kernel reported trouble"
    assert len(shown) <= max(run.SHOWN, failures) + run.END


def test_a_stage_without_a_report_shows_its_log(log: Path) -> None:
    shown = run.explain(run.Counts(failed=1, bad=["exit code 125"]), log)
    assert len(shown) == run.SHOWN
    assert shown[-1] == "the kernel reported trouble"
