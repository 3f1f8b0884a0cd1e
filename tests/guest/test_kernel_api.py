# SPDX-License-Identifier: MIT
"""The in-kernel API: the sample module, its KUnit suite, and the slab's own check."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from device import PAGE, read, write
from process import MODULES, loaded

DEBUGFS = Path("/sys/kernel/debug")
#: KUnit suites of the sample module, and how many cases each has.
SUITES = {"tensormem": 7, "tensormem-rt": 5}


@pytest.fixture(autouse=True, scope="module")
def nothing_kept() -> Iterator[None]:
    """CPUs keep runs for the next module; compaction gives them back."""
    yield
    assert read("buddy/cached_pages")
    assert write("buddy/compact", 1) == 0
    assert read("buddy/cached_pages") == 0
    assert read("buddy/chunks") == 0


def test_the_sample_holds_what_it_was_asked_for() -> None:
    before = read("buddy/used_pages")
    with loaded("tm_sample", "frames=7", "size=65536"):
        frames = 7 * max(65536, PAGE) // PAGE
        headers = read("buddy/used_pages") - before - frames
        assert 0 < headers <= 8
    assert read("buddy/used_pages") == before


def test_a_sample_that_cannot_be_made_is_refused() -> None:
    before = read("buddy/used_pages")
    result = subprocess.run(["insmod", MODULES / "tm_sample.ko", "size=4194304"], check=False)
    assert result.returncode
    assert read("buddy/used_pages") == before


@pytest.mark.skipif(not (DEBUGFS / "kunit").exists(), reason="this kernel has no KUnit")
def test_kunit() -> None:
    with loaded("tm_sample"):
        told = {name: (DEBUGFS / "kunit" / name / "results").read_text() for name in SUITES}
    for name, results in told.items():
        cases = re.findall(r"^ +(ok|not ok) \d+ (\w+)", results, re.MULTILINE)
        assert len(cases) == SUITES[name], results
        assert all(verdict == "ok" for verdict, _ in cases), results


def test_the_slab_checks_itself_on_all_cpus() -> None:
    with loaded("tm_bench_slab"):
        assert (DEBUGFS / "tm_check_slab").read_text() == "ok\n"
