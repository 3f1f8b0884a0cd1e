#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Nanoseconds of an allocation and a free on the host: the core beside malloc() of others.

Slab below a page, buddy from there on; see core_alloc.c. Wall time of this machine: it is printed and
bounds nothing. mimalloc and jemalloc are measured where they are installed.
"""

from __future__ import annotations

import ctypes.util
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "build/bench"
LIBRARY = "../../build/host/libtensormem_core.a"

#: peer → the Debian package that has its library
PEERS = {"mimalloc": "libmimalloc2.0", "jemalloc": "libjemalloc2"}


def build() -> Path:
    subprocess.run(["make", "-s", "-C", "tests/host", LIBRARY], cwd=ROOT, check=True)
    OUT.mkdir(parents=True, exist_ok=True)
    program = OUT / "core_alloc"
    subprocess.run(
        ["cc", "-std=gnu11", "-O2", "-DNDEBUG", "-Wall", "-Wextra", "-Werror", "-Ikmod", "-Itests/host",
         "-o", program, "tests/bench/core_alloc.c", OUT.parent / "host" / Path(LIBRARY).name],
        cwd=ROOT, check=True,
    )  # fmt: skip
    return program


def nanoseconds(program: Path, what: str, preload: str = "") -> dict[int, float]:
    """By size; ``what`` is the program's argument, ``preload`` a library in front of the C library's malloc."""
    environment = {**os.environ, "LD_PRELOAD": preload}
    result = subprocess.run([program, what], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return {int(size): float(ns) for size, ns in (line.split() for line in result.stdout.splitlines())}


def main() -> None:
    program = build()
    columns = {"core": nanoseconds(program, "core"), "libc": nanoseconds(program, "malloc")}
    for peer, package in PEERS.items():
        if library := ctypes.util.find_library(peer):
            columns[peer] = nanoseconds(program, "malloc", library)
        else:
            print(f"{peer} is not installed and not measured: apt-get install {package}")
    print(f"{'size':>8}{'pool':>7}" + "".join(f"{name:>10}" for name in columns) + "   ns, alloc and free")
    for size in columns["core"]:
        pool = "slab" if size < 4096 else "buddy"
        print(f"{size:>8}{pool:>7}" + "".join(f"{column[size]:>10.1f}" for column in columns.values()))


if __name__ == "__main__":
    main()
