#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""What part of the memory held for KV caches is of no use: models as they are.

Requests run through the allocator on the host (see waste.c, which says what the peer
is). Writes build/bench/waste.json, prints a table, and exits with 1 when ours is over
its bound. Rows that end in -16k are for 16K pages with the layers of a group
interleaved; what 16K pages give without that is printed only.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "build/bench"
LIBRARY = "../../build/host/libtensormem_core.a"

BOUND = 0.05
PEER = "one size for all"


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
    program = OUT / "waste"
    subprocess.run(
        ["cc", "-std=gnu11", "-O2", "-DNDEBUG", "-Wall", "-Wextra", "-Werror", "-Ikmod",
         "-Itests/host", "-o", program, "tests/bench/waste.c", OUT.parent / "host" / Path(LIBRARY).name],
        cwd=ROOT, check=True,
    )  # fmt: skip
    return program


def traces(program: Path, page_shift: int, layout: str, suffix: str) -> list[Row]:
    """Run all traces; prints a line for each with what the row has no field for."""
    result = subprocess.run([program, str(page_shift), layout], stdout=subprocess.PIPE, text=True, check=True)
    rows = []
    for line in result.stdout.splitlines():
        name, ours, peer, tokens, worst, still, moved = line.split()
        row = Row(name + suffix, float(ours), float(peer), PEER,
                  round(float(ours) / float(peer), 4), BOUND)  # fmt: skip
        print(f"{row.name:<28}{row.ours:>8.4f}{row.peer:>8.4f}{row.ratio:>8.3f}"
              f"{tokens:>8}{worst:>8}{still:>9}{moved:>7}")  # fmt: skip
        rows.append(row)
    return rows


def measure() -> list[Row]:
    """Build, run and print; the rows that have a bound.

    Raises:
        subprocess.CalledProcessError: the program does not build, or ends with an error.
    """
    program = build()
    print(f"{'row':<28}{'ours':>8}{'peer':>8}{'ratio':>8}{'tokens':>8}{'worst':>8}"
          f"{'unmoved':>9}{'moved':>7}")  # fmt: skip
    rows = traces(program, 12, "apart", "") + traces(program, 14, "together", "-16k")
    print("16K pages, each layer's K and V an array of its own (no bound):")
    traces(program, 14, "apart", "")
    return rows


def main() -> None:
    rows = measure()
    (OUT / "waste.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    over = [row.name for row in rows if not row.good]
    if over:
        sys.exit(f"waste: over {BOUND}: {', '.join(over)}")


if __name__ == "__main__":
    main()
