# SPDX-License-Identifier: MIT
"""What part of the memory held for KV caches is of no use: models as they are.

Requests run through the allocator on the host (see waste.c, which says what the peer
is). Rows that end in -16k are for 16K pages with the layers of a group interleaved;
what 16K pages give without that is printed only.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from rows import Row, host_program

BOUND = 0.05


def traces(program: Path, page_shift: int, layout: str, suffix: str) -> list[Row]:
    """Run all traces; prints a line for each with what the row has no field for."""
    command = [str(program), str(page_shift), layout]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    rows = []
    for line in result.stdout.splitlines():
        name, ours, peer, tokens, worst, still, moved = line.split()
        row = Row(name + suffix, float(ours), float(peer), "one size for all", BOUND, "ours",
                  "fraction", "none (a trace through the allocator)")  # fmt: skip
        print(f"# {row.name:<26}{row.ours:>8.4f}{tokens:>8}{worst:>8}{still:>9}{moved:>7}")
        rows.append(row)
    return rows


def measure() -> list[Row]:
    """Build, run and print; the rows that have a bound.

    Raises:
        subprocess.CalledProcessError: the program does not build, or ends with an error.
    """
    program = host_program("waste")
    print(f"# {'trace':<26}{'ours':>8}{'tokens':>8}{'worst':>8}{'unmoved':>9}{'moved':>7}")
    rows = traces(program, 12, "apart", "") + traces(program, 14, "together", "-16k")
    print("# 16K pages, each layer's K and V an array of its own (no bound):")
    traces(program, 14, "apart", "")
    return rows
