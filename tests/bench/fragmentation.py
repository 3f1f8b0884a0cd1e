#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""External fragmentation of the buddy pool at 90 % occupancy, before and after compaction.

A random trace runs through the allocator on the host (see fragmentation.c, which says
what the trace is). Writes build/bench/fragmentation.json, prints a table, and exits with
1 when the figure after compaction is over its bound. A row is the worst of several
seeds, beside the same trace without compaction. Cases with runs that do not move are
printed only: how many of them there are decides, not the allocator.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "build/bench"
LIBRARY = "../../build/host/libtensormem_core.a"

BOUND = 0.05
PEER = "without compaction"
SEEDS = range(1, 21)
#: For the cases without a bound.
FEW_SEEDS = range(1, 6)
PAGE_SHIFTS = {12: "", 14: "-16k"}
#: Runs that do not move, as fragmentation.c names the cases.
STUCK = ("unmovable", "pinned", "pages")


@dataclass(frozen=True)
class Row:
    """One line of the JSON file, as in measure.py; the bound is on ours, not on the ratio."""

    name: str
    ours: float
    peer: float
    peer_name: str
    ratio: float
    bound: float
    unit: str = "fraction"
    clock: str = "none (a trace through the allocator)"

    @property
    def good(self) -> bool:
        return self.ours <= self.bound


def build() -> Path:
    subprocess.run(["make", "-s", "-C", "tests/host", LIBRARY], cwd=ROOT, check=True)
    OUT.mkdir(parents=True, exist_ok=True)
    program = OUT / "fragmentation"
    subprocess.run(
        ["cc", "-std=gnu11", "-O2", "-DNDEBUG", "-Wall", "-Wextra", "-Werror", "-Ikmod", "-Itests/host",
         "-o", program, "tests/bench/fragmentation.c", OUT.parent / "host" / Path(LIBRARY).name],
        cwd=ROOT, check=True,
    )  # fmt: skip
    return program


def trace(program: Path, page_shift: int, case: str, seed: int) -> dict[str, float]:
    command = [str(program), str(page_shift), case, str(seed)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    pairs = (line.split() for line in result.stdout.splitlines())
    return {name: float(value) for name, value in pairs}


def worst(program: Path, page_shift: int, case: str, name: str, seeds: Iterable[int]) -> Row:
    """Run all seeds; prints the worst with what the row has no field for."""
    figures = max(
        (trace(program, page_shift, case, seed) for seed in seeds), key=lambda found: found["after"]
    )
    ours, peer = figures["after"], figures["before"]
    print(f"{name:<24}{ours:>8.4f}{peer:>8.4f}{figures['chunks-stuck']:>7.0f}{figures['given-up']:>9.0f}"
          f"{figures['moved-runs']:>8.0f}{figures['moved-pages']:>8.0f}"
          f"{figures['alloc-steps-median']:>7.0f}/{figures['alloc-steps-worst']:.0f}"
          f"{figures['free-steps-median']:>6.0f}/{figures['free-steps-worst']:.0f}")  # fmt: skip
    return Row(name, ours, peer, PEER, round(ours / peer, 4), BOUND)


def measure() -> list[Row]:
    """Build, run and print; the rows that have a bound.

    Raises:
        subprocess.CalledProcessError: the program does not build, or ends with an error.
    """
    program = build()
    print("Steps of one alloc and one free: median/worst turns of their loops.")
    print(f"{'row':<24}{'after':>8}{'before':>8}{'stuck':>7}{'given up':>9}{'runs':>8}{'pages':>8}"
          f"{'alloc':>9}{'free':>8}")  # fmt: skip
    rows = [
        worst(program, page_shift, "movable", f"after-compaction{suffix}", SEEDS)
        for page_shift, suffix in PAGE_SHIFTS.items()
    ]
    print("5 % do not move (no bound):")
    for page_shift, suffix in PAGE_SHIFTS.items():
        for case in STUCK:
            worst(program, page_shift, case, f"{case}{suffix}", FEW_SEEDS)
    return rows


def main() -> None:
    rows = measure()
    (OUT / "fragmentation.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    over = [row.name for row in rows if not row.good]
    if over:
        sys.exit(f"fragmentation: over {BOUND}: {', '.join(over)}")


if __name__ == "__main__":
    main()
