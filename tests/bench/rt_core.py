# SPDX-License-Identifier: MIT
"""The longest call of the RT core on the host, in instructions, beside malloc() and free().

See rt_core.c: instructions are counted by stepping through each call, so nothing else counts and two runs agree.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from rows import Row, host_program

#: Calls that set up or clear away: shown, and not bounded.
SETUP = {"reserve", "unreserve", "join", "leave"}
BOUND = 300


def worst(program: Path, what: str) -> dict[str, int]:
    """The longest of each call; ``what`` is the program's argument."""
    # the dynamic linker looks functions up at their first call: not here
    environment = {**os.environ, "LD_BIND_NOW": "1"}
    result = subprocess.run([program, what], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    longest = {}
    for line in result.stdout.splitlines():
        name, most, median, count = line.split()
        longest[name] = int(most)
        print(f"# {what:<8}{name:<16}worst {most:>7}  median {median:>5}  of {count}")
    return longest


def measure() -> list[Row]:
    """Build, run, print; one row."""
    program = host_program("rt_core")
    core = worst(program, "core")
    peer = worst(program, "malloc")
    ours = max(most for name, most in core.items() if name not in SETUP)
    return [Row("core-worst-insns", ours, max(peer.values()), "malloc, free", BOUND, "ours", clock="steps")]
