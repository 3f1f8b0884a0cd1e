#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Benchmarks in the guest, where time counts instructions.

Each file of rows is one boot with --icount; ours and the peer are measured in it
side by side. Writes build/bench/NAME.json, prints a table, and exits with 1 when a
row is over its bound.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "build/bench"
GUEST = str(ROOT / "qemu/guest")


@dataclass(frozen=True)
class Bench:
    """A file of rows: the script that measures them, C programs it needs, its guest."""

    programs: tuple[str, ...]
    guest: tuple[str, ...]
    #: row → (peer, most that ours / peer may be)
    rows: dict[str, tuple[str, float]]


PAGES = "alloc_pages + __free_pages"

BENCHES = {
    "alloc": Bench(
        programs=("user_churn",),
        # init_on_alloc zeroes what the peer was not asked to zero
        guest=("--memory", "1G", "--append", "init_on_alloc=0"),
        rows={
            **{f"buddy-o{order}": (PAGES, 1.0) for order in range(4)},
            **{f"buddy-o{order}": (PAGES, 0.5) for order in range(4, 9)},
            "chunk-2m": (f"{PAGES}, zeroed", 0.05),
            "user-1m-churn": ("mmap + touch + munmap", 0.5),
        },
    ),
}


@dataclass(frozen=True)
class Row:
    """One line of the JSON file; lower is better everywhere."""

    name: str
    ours: float
    peer: float
    peer_name: str
    ratio: float
    bound: float
    unit: str = "instructions"
    clock: str = "icount"

    @property
    def good(self) -> bool:
        return self.ratio <= self.bound


def measure(name: str, bench: Bench) -> list[Row]:
    """Boot and measure.

    Raises:
        SystemExit: the guest failed, or its rows are not the ones expected.
    """
    for program in bench.programs:
        source = f"tests/bench/{program}.c"
        subprocess.run([GUEST, "cc", "-o", OUT / program, source], cwd=ROOT, check=True)
    command = [GUEST, "run", "--icount", "--timeout", "600", "--share", f"{OUT}:ro", *bench.guest,
               "--", "python3", f"tests/bench/{name}.py", f"/share/{OUT.name}"]  # fmt: skip
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        sys.exit(f"bench {name}: the guest ended with {result.returncode}")
    measured = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines()}
    if measured.keys() != bench.rows.keys():
        odd = sorted(measured.keys() ^ bench.rows.keys())
        sys.exit(f"bench {name}: missing or unknown rows: {', '.join(odd)}")
    rows = []
    for row, (peer_name, bound) in bench.rows.items():
        ours, peer = map(float, measured[row])
        rows.append(Row(row, ours, peer, peer_name, round(ours / peer, 4), bound))
    return rows


def table(rows: list[Row]) -> None:
    print(f"{'row':<16}{'ours':>10}{'peer':>10}{'ratio':>8}{'bound':>7}     peer")
    for row in rows:
        verdict = "ok  " if row.good else "OVER"
        print(f"{row.name:<16}{row.ours:>10.0f}{row.peer:>10.0f}{row.ratio:>8.3f}{row.bound:>7.2f}"
              f" {verdict} {row.peer_name}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="*", help=f"of {', '.join(BENCHES)}; default: all")
    parser.add_argument("--twice", action="store_true", help="demand that two boots agree to 1 %%")
    options = parser.parse_args()
    unknown = set(options.name) - BENCHES.keys()
    if unknown:
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")

    OUT.mkdir(parents=True, exist_ok=True)
    good = True
    for name in options.name or BENCHES:
        rows = measure(name, BENCHES[name])
        (OUT / f"{name}.json").write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")
        table(rows)
        good &= all(row.good for row in rows)
        if options.twice:
            for row, again in zip(rows, measure(name, BENCHES[name]), strict=True):
                if abs(again.ratio - row.ratio) > 0.01 * row.ratio:
                    print(f"{row.name}: {row.ratio} and {again.ratio} are over 1 % apart")
                    good = False
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
