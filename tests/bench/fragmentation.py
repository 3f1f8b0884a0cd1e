# SPDX-License-Identifier: MIT
"""External fragmentation of the buddy pool at 90 % occupancy, before and after compaction.

A random trace runs through the allocator on the host (see fragmentation.c, which says
what the trace is). A row is the worst of several seeds, beside the same trace without
compaction. Cases with runs that do not move are printed only: how many of them there
are decides, not the allocator.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path

from rows import Row, host_program

BOUND = 0.05
SEEDS = range(1, 21)
#: For the cases without a bound.
FEW_SEEDS = range(1, 6)
PAGE_SHIFTS = {12: "", 14: "-16k"}
#: Runs that do not move, as fragmentation.c names the cases.
STUCK = ("unmovable", "pinned", "pages")


def trace(program: Path, page_shift: int, case: str, seed: int) -> dict[str, float]:
    command = [str(program), str(page_shift), case, str(seed)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    pairs = (line.split() for line in result.stdout.splitlines())
    return {name: float(value) for name, value in pairs}


def worst(program: Path, page_shift: int, case: str, name: str, seeds: Iterable[int]) -> Row:
    """Run all seeds; prints the worst with what the row has no field for."""
    figures = max((trace(program, page_shift, case, seed) for seed in seeds), key=lambda found: found["after"])
    ours, peer = figures["after"], figures["before"]
    print(f"# {name:<22}{ours:>8.4f}{peer:>8.4f}{figures['chunks-stuck']:>7.0f}{figures['given-up']:>9.0f}"
          f"{figures['moved-runs']:>8.0f}{figures['moved-pages']:>8.0f}"
          f"{figures['alloc-steps-median']:>7.0f}/{figures['alloc-steps-worst']:.0f}"
          f"{figures['free-steps-median']:>6.0f}/{figures['free-steps-worst']:.0f}")  # fmt: skip
    return Row(name, ours, peer, "without compaction", BOUND, "ours", "fraction",
               "none (a trace through the allocator)")  # fmt: skip


def measure() -> list[Row]:
    """Build, run and print; the rows that have a bound.

    Raises:
        subprocess.CalledProcessError: the program does not build, or ends with an error.
    """
    program = host_program("fragmentation")
    print("# Steps of one alloc and one free: median/worst turns of their loops.")
    print(f"# {'row':<22}{'after':>8}{'before':>8}{'stuck':>7}{'given up':>9}{'runs':>8}{'pages':>8}"
          f"{'alloc':>9}{'free':>8}")  # fmt: skip
    rows = [
        worst(program, page_shift, "movable", f"after-compaction{suffix}", SEEDS)
        for page_shift, suffix in PAGE_SHIFTS.items()
    ]
    print("# 5 % do not move (no bound):")
    for page_shift, suffix in PAGE_SHIFTS.items():
        for case in STUCK:
            worst(program, page_shift, case, f"{case}{suffix}", FEW_SEEDS)
    return rows
