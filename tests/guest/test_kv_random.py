# SPDX-License-Identifier: MIT
"""Random operations on KV caches against a reference model, with a CRC of every page: see kv_random.c."""

from __future__ import annotations

import json
import os
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from device import KASAN

PROGRAM = Path(__file__).parent / "kv_random"
#: Of all runs together; a tenth of it on kernels where it runs once more: under KASAN, with large pages.
TOTAL = 1_000_000
#: Runs at most, each with a seed of its own.
SEEDS = 10
LARGE_PAGES = os.sysconf("SC_PAGESIZE") > 4096

#: One worker: the model is exact. Runs and their shares of the total; two of them at a time.
ALONE = {
    "--shape full --tight": 6,
    "--shape window --tight": 4,
    "--shape state --quota": 4,
    "--shape groups --tight": 2,
    "--shape odd --tight": 4,
    "--shape full --maps 2": 4,
    "--shape groups --maps 2": 1,
    "--shape state": 2,
    "--shape large --private": 1,
}
#: Several, with sequences of their own in one cache.
TOGETHER = {
    "--shape window --threads 3 --reader": 4,
    "--shape full --tight --processes 2 --threads 2 --reader": 3,
    "--shape groups --tight --processes 3 --maps 2": 2,
    "--shape state --tight --threads 4 --reader": 2,
    "--shape large --private --threads 2": 1,
}
RUNS = ALONE | TOGETHER


def workers(options: str) -> int:
    words = options.split()
    value = {name: int(words[words.index(name) + 1]) for name in ("--threads", "--processes") if name in words}
    return value.get("--threads", 1) * value.get("--processes", 1)


def happens(options: str) -> list[str]:
    """What a run is not worth much without."""
    names = ["copies", "forked", "packs", "unpacks", "pages"]
    names += ["moved"] if "--private" in options else ["matched", "hits", "adopted"]
    if "--tight" in options or "--quota" in options:
        names += ["refused", "evictions"]
    return names + (["foreign"] if workers(options) > 1 else ["resets", "signals", "copied"])


def steps(options: str) -> int:
    """Of each worker of a run."""
    total = TOTAL // (10 if KASAN or LARGE_PAGES else 1)
    return total * RUNS[options] // sum(RUNS.values()) // workers(options) + 1


def once(options: str, seed: int) -> Counter[str]:
    each = steps(options)
    command = [PROGRAM, *options.split(), "--steps", str(each), "--seed", str(seed)]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert result.returncode == 0, f"{options}, seed {seed}: ended with {result.returncode}\n{result.stdout}"
    counts: Counter[str] = Counter(json.loads(result.stdout))
    assert counts["steps"] == each * workers(options)
    return counts


def run(options: str) -> Counter[str]:
    """What workers meet is in part the scheduler's choice: on until all of it has happened."""
    counts: Counter[str] = Counter()
    for seed in range(1, SEEDS + 1):
        counts += once(options, seed)
        missing = [name for name in happens(options) if not counts[name]]
        if not missing:
            print(options, seed, dict(counts))
            return counts
    pytest.fail(f"{options}: never happened in {SEEDS} runs: {missing} of {dict(counts)}")


def test_alone() -> None:
    """Contents, errnos, events and counters are just what the model says."""
    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(run, ALONE))


@pytest.mark.parametrize("options", TOGETHER)
def test_together(options: str) -> None:
    """Threads and processes that fork and find what the others have."""
    run(options)
