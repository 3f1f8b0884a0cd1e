# SPDX-License-Identifier: MIT
"""Lines of the scaling benchmark: runs in the guest, on as many CPUs as it has.

How often a lock was contended per 1000 operations, ours and the kernel's own in one
boot. It is a count: time means nothing where CPUs are emulated.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

MODULE = Path(__file__).parents[2] / "kmod/tests/tm_scale.ko"
FILES = Path("/sys/kernel/debug/tm_scale")
EVENT = Path("/sys/kernel/tracing/events/lock/contention_begin")
ALLOCATORS = ("tensormem_alloc", "alloc_pages", "tensormem_slab", "kmem_cache")


def contended() -> int:
    """Events since the histogram was set."""
    lines = (EVENT / "hist").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.strip().startswith("Hits:"))


def per_1000(allocator: str) -> float:
    (EVENT / "trigger").write_text("hist:keys=flags")
    try:
        operations = int((FILES / allocator).read_text())
        return 1000 * contended() / operations
    finally:
        (EVENT / "trigger").write_text("!hist:keys=flags")


def main() -> None:
    subprocess.run(["insmod", MODULE], check=True)
    for allocator in ALLOCATORS:
        (FILES / allocator).read_text()  # warm: chunks are there, caches are filled
    found = "".join(f"{per_1000(allocator):>17.2f}" for allocator in ALLOCATORS)
    print(f"# {os.cpu_count():>4}{found}")
    subprocess.run(["rmmod", "tm_scale"], check=True)


if __name__ == "__main__":
    main()
