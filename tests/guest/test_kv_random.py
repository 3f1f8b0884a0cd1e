# SPDX-License-Identifier: MIT
"""Random operations on KV caches against a reference model, with a CRC of every page: see kv_random.c."""

from __future__ import annotations

import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "kv_random"
#: Of all runs together; a tenth of it where every access is checked (KASAN).
TOTAL = 1_000_000
KASAN = any(line.split()[2] == "kasan_report" for line in Path("/proc/kallsyms").open())
LARGE_PAGES = os.sysconf("SC_PAGESIZE") > 4096

#: One worker: the model is exact. Two of them at a time.
ALONE = (
    "--shape full --tight",
    "--shape window --tight",
    "--shape state --quota",
    "--shape groups --tight",
    "--shape odd --tight",
    "--shape full --maps 2",
    "--shape groups --maps 2",
    "--shape state",
)
#: Several, with sequences of their own in one cache.
TOGETHER = (
    "--shape window --threads 3 --reader",
    "--shape full --tight --processes 2 --threads 2 --reader",
    "--shape groups --tight --processes 3 --maps 2",
    "--shape state --tight --threads 4 --reader",
)
EVERY_RUN = ("copies", "forked", "matched", "hits", "adopted", "packs", "unpacks", "pages")


def workers(options: str) -> int:
    words = options.split()
    value = {name: int(words[words.index(name) + 1]) for name in ("--threads", "--processes") if name in words}
    return value.get("--threads", 1) * value.get("--processes", 1)


def steps() -> int:
    """Of each run."""
    return TOTAL // (10 if KASAN else 5 if LARGE_PAGES else 1) // (len(ALONE) + len(TOGETHER)) + 1


def run(options: str) -> dict[str, int]:
    each = steps() // workers(options) + 1
    command = [PROGRAM, *options.split(), "--steps", str(each)]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert result.returncode == 0, f"{options}: ended with {result.returncode}\n{result.stdout}"
    counts: dict[str, int] = json.loads(result.stdout)
    print(options, counts)
    assert counts["steps"] == each * workers(options)
    missing = [name for name in EVERY_RUN if not counts[name]]
    if "--tight" in options or "--quota" in options:
        missing += [name for name in ("refused", "evictions") if not counts[name]]
    if workers(options) > 1:
        missing += [name for name in ("foreign",) if not counts[name]]
    else:
        missing += [name for name in ("resets", "signals", "copied") if not counts[name]]
    assert not missing, f"{options}: never happened: {missing}"
    return counts


def test_alone() -> None:
    """Contents, errnos, events and counters are just what the model says."""
    with ThreadPoolExecutor(2) as pool:
        assert len(list(pool.map(run, ALONE))) == len(ALONE)


@pytest.mark.parametrize("options", TOGETHER)
def test_together(options: str) -> None:
    """Threads and processes that fork and find what the others have."""
    run(options)
