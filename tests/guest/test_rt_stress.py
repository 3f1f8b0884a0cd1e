# SPDX-License-Identifier: MIT
"""Threads of several processes at the same arenas, some of them killed: see rt_stress.c."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from conftest import USAGE, settled

PROGRAM = Path(__file__).parent / "rt_stress"
#: Of each thread; fewer where every access is checked (KASAN).
KASAN = any(line.split()[2] == "kasan_report" for line in Path("/proc/kallsyms").open())
DEEDS = 1000 if KASAN else 8000


@pytest.mark.parametrize(
    ("workers", "threads", "arenas", "victims"),
    [
        (1, 4, 1, 0),  # threads of one process
        (2, 2, 1, 1),  # processes, one arena
        (2, 3, 2, 2),  # and two that are apart
    ],
)
def test_every_byte_is_its_owners(workers: int, threads: int, arenas: int, victims: int) -> None:
    """No block is torn, moved under a pin or given to two; what is reserved is there; all of it comes back."""
    command = [PROGRAM, "--deeds", DEEDS, "--workers", workers, "--threads", threads, "--arenas", arenas,
               "--victims", victims, "--seed", workers * 100 + victims]  # fmt: skip
    result = subprocess.run(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert result.returncode == 0, f"ended with {result.returncode}\n{result.stdout}"
    counts: dict[str, int] = json.loads(result.stdout)
    print(counts)
    assert counts["deeds"] >= DEEDS * workers * threads
    happened = ["allocs", "reserved", "movable", "batches", "refused", "timed_out", "in_time", "pins", "moved",
                "admitted", "rejoined", *(["killed"] if victims else [])]  # fmt: skip
    missing = [name for name in happened if not counts[name]]
    assert not missing, f"never happened: {missing}"
    assert settled(dict.fromkeys(USAGE, 0)) == dict.fromkeys(USAGE, 0)
