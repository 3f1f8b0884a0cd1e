# SPDX-License-Identifier: MIT
"""Rows of alloc.json: runs in the guest, prints ``NAME OURS PEER`` lines."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

SYSFS = Path("/sys/class/misc/tensormem")
MODULES = Path(__file__).parents[2] / "kmod/tests"
CHUNKS = 32


def fill_reserve(chunks: int) -> None:
    (SYSFS / "chunk/reserve").write_text(str(chunks))
    end = time.monotonic() + 60
    while int((SYSFS / "chunk/zeroed").read_text()) < chunks:
        if time.monotonic() > end:
            sys.exit("the reserve did not fill: give the guest more memory")
        time.sleep(0.05)


def main() -> None:
    fill_reserve(CHUNKS)
    for module in ("tm_bench", "tm_bench_slab"):
        subprocess.run(["insmod", MODULES / f"{module}.ko"], check=True)
        print((Path("/sys/kernel/debug") / module).read_text(), end="", flush=True)
        subprocess.run(["rmmod", module], check=True)
    for program in ("user_churn", "map_faults"):
        subprocess.run([Path(sys.argv[1]) / program], check=True)


if __name__ == "__main__":
    main()
