# SPDX-License-Identifier: MIT
"""Rows of monitor.json: runs in the guest, prints ``NAME OURS PEER`` lines."""

from __future__ import annotations

import subprocess
from pathlib import Path

import tensormem

MODULE = Path(__file__).parents[2] / "kmod/tests/tm_bench_event.ko"


def events() -> None:
    """The row of tm_bench_event.c: nobody has listened since the module was loaded."""
    subprocess.run(["insmod", MODULE], check=True)
    row = Path("/sys/kernel/debug/tm_bench_event/idle").read_text()
    subprocess.run(["rmmod", "tm_bench_event"], check=True)
    with tensormem.events(["bandwidth"]) as reader:
        assert reader.state()["bandwidth"].seq == 0, "somebody listened"
    print(row, end="", flush=True)


def main() -> None:
    events()


if __name__ == "__main__":
    main()
