# SPDX-License-Identifier: MIT
"""What a benchmark yields: rows with a bound, a file of them and a table."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "build/bench"


@dataclass(frozen=True)
class Row:
    """One line of the JSON file; lower is better everywhere."""

    name: str
    ours: float
    peer: float
    peer_name: str
    #: Most that ``ratio`` may be, or ``ours`` where ``bounded`` says so; None where the peer is known to be better.
    bound: float | None
    bounded: str = "ratio"
    unit: str = "instructions"
    clock: str = "icount"

    @property
    def ratio(self) -> float:
        return round(self.ours / self.peer, 6)

    @property
    def better(self) -> str | None:
        """Who is, where that is not ours."""
        return self.peer_name if self.ratio > 1 else None

    @property
    def good(self) -> bool:
        return self.bound is None or (self.ours if self.bounded == "ours" else self.ratio) <= self.bound


def write(name: str, rows: Iterable[Row]) -> None:
    """Write ``build/bench/NAME.json``."""
    lines = [{**asdict(row), "ratio": row.ratio, "better": row.better} for row in rows]
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / f"{name}.json").write_text(json.dumps(lines, indent=1) + "\n")


def table(rows: Iterable[Row]) -> None:
    print(f"{'row':<28}{'ours':>12}{'peer':>12}{'ratio':>8}{'bound':>9}      peer")
    for row in rows:
        digits = 4 if row.unit == "fraction" else 0
        bound = "-" if row.bound is None else f"{row.bound:.4f}"
        verdict = "OVER" if not row.good else "peer" if row.bound is None and row.better else "ok  "
        print(f"{row.name:<28}{row.ours:>12.{digits}f}{row.peer:>12.{digits}f}{row.ratio:>8.4f}"
              f"{bound:>9} {verdict} {row.peer_name}")  # fmt: skip


def host_program(name: str, library: str = "libtensormem_core.a") -> Path:
    """Build ``tests/bench/NAME.c`` for this machine, with the core.

    Raises:
        subprocess.CalledProcessError: it does not compile.
    """
    made = f"../../build/host/{library}"
    subprocess.run(["make", "-s", "-C", "tests/host", made], cwd=ROOT, check=True)
    OUT.mkdir(parents=True, exist_ok=True)
    program = OUT / name
    subprocess.run(
        ["cc", "-std=gnu11", "-O2", "-DNDEBUG", "-Wall", "-Wextra", "-Werror", "-Ikmod",
         "-Itests/host", "-o", program, f"tests/bench/{name}.c", OUT.parent / "host" / library],
        cwd=ROOT, check=True,
    )  # fmt: skip
    return program
