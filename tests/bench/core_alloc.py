# SPDX-License-Identifier: MIT
"""Nanoseconds of an allocation and a free on the host: the core beside malloc() of others.

Slab below a page, buddy from there on; see core_alloc.c. Wall time of this machine: it is
printed and bounds nothing. mimalloc and jemalloc are measured where they are installed.
"""

from __future__ import annotations

import ctypes.util
import os
import subprocess
from pathlib import Path

from rows import Row, host_program

#: peer → the Debian package that has its library
PEERS = {"mimalloc": "libmimalloc2.0", "jemalloc": "libjemalloc2"}


def nanoseconds(program: Path, what: str, preload: str = "") -> dict[int, float]:
    """By size; ``what`` is the program's argument, ``preload`` a library in front of the C library's malloc."""
    environment = {**os.environ, "LD_PRELOAD": preload}
    result = subprocess.run([program, what], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return {int(size): float(ns) for size, ns in (line.split() for line in result.stdout.splitlines())}


def measure() -> list[Row]:
    """Build, run and print; there is no row with a bound."""
    program = host_program("core_alloc")
    columns = {"core": nanoseconds(program, "core"), "libc": nanoseconds(program, "malloc")}
    for peer, package in PEERS.items():
        if library := ctypes.util.find_library(peer):
            columns[peer] = nanoseconds(program, "malloc", library)
        else:
            print(f"# {peer} is not installed and not measured: apt-get install {package}")
    print(f"# {'size':>8}{'pool':>7}" + "".join(f"{name:>10}" for name in columns) + "   ns")
    for size in columns["core"]:
        pool = "slab" if size < 4096 else "buddy"
        times = "".join(f"{column[size]:>10.1f}" for column in columns.values())
        print(f"# {size:>8}{pool:>7}{times}")
    return []
