# SPDX-License-Identifier: MIT
"""Rows of allocators.json: runs in the guest, prints ``NAME OURS PEER`` lines."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import tensormem
from tensormem.demo import run
from tensormem.demo.model import HeapMemory, Memory, Model
from tensormem.safetensors import load

ROUNDS = 500
OBJECTS = 1_000_000


def of_arena() -> None:
    """The scratch arrays of a decode step, as the demo takes them: out of an arena, and from numpy."""
    with run.opened("b") as (path, config, _):
        weights = load(path)

    def step(memory: Memory) -> float:
        """Instructions to take all of them, and to let go of those of the last step."""
        model = Model(weights, config, memory)
        begin = 0
        for turn in range(ROUNDS + 20):
            if turn == 20:
                begin = time.perf_counter_ns()
            model._begin(1)
        return (time.perf_counter_ns() - begin) / ROUNDS

    with tensormem.open() as client:
        print(f"arena {step(client):.0f} {step(HeapMemory()):.0f}", flush=True)


def of_command() -> None:
    """Each pool beside each malloc, as the command measures it: time is instructions here."""
    command = ["tensormem", "bench", "allocators", "--json", "--objects", str(OBJECTS)]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)["rows"]
    missing = [f"{row['allocator']}: {row['missing']}" for row in found if row["missing"]]
    if missing:
        sys.exit("\n".join(missing))
    for ours in (row for row in found if row["ours"]):
        for peer in (row for row in found if row["shape"] == ours["shape"] and not row["ours"]):
            name, other = f"{ours['shape']}-{ours['allocator']}", peer["allocator"]
            print(f"{name}-{other} {ours['ns_each']} {peer['ns_each']}")
            print(f"{name}-half-{other} {ours['half']['ratio']} {peer['half']['ratio']}", flush=True)


def main() -> None:
    of_arena()
    of_command()


if __name__ == "__main__":
    main()
