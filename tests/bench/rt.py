# SPDX-License-Identifier: MIT
"""Rows of rt.json: runs in the guest, prints ``NAME OURS PEER`` lines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

MODULE = Path(__file__).parents[2] / "kmod/tests/tm_bench_rt.ko"


def kernel() -> None:
    """The rows of tm_bench_rt.c."""
    subprocess.run(["insmod", MODULE], check=True)
    print(Path("/sys/kernel/debug/tm_bench_rt").read_text(), end="", flush=True)
    subprocess.run(["rmmod", "tm_bench_rt"], check=True)


def main() -> None:
    kernel()
    subprocess.run([Path(sys.argv[1]) / "rt_late"], check=True)


if __name__ == "__main__":
    main()
