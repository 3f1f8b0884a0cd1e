# SPDX-License-Identifier: MIT
"""Rows of dma.json: runs in the guest with --dma, prints ``NAME OURS PEER`` lines.

64 MiB for a device behind an IOMMU: a tensor of whole chunks through its dma-buf, and single pages that lie apart.
"""

from __future__ import annotations

import importlib
import mmap
import sys
from pathlib import Path
from typing import Any

import tensormem

sys.path.append(str(Path(__file__).parents[1] / "guest"))
edu = importlib.import_module("edu")
process = importlib.import_module("process")

SIZE = 64 << 20


def both(importer: Any, pages: int) -> tuple[int, int]:
    """Map calls, and instructions to map and unmap: not in the run in which calls are counted."""
    with edu.iommu_maps() as calls:
        importer.cost(pages)
    return calls[0], importer.cost(pages).ns


def main() -> None:
    with process.loaded("tm_edu"), edu.Edu() as importer:
        with tensormem.open() as client, client.alloc(SIZE, kind="weights", pool="chunk").export() as shared:
            if importer.attach(shared.fileno()):
                sys.exit("the device cannot be attached")
            ours = both(importer, 0)
        peer = both(importer, SIZE // mmap.PAGESIZE)
    for name, mine, theirs in zip(("iommu-maps-64m", "iommu-insns-64m"), ours, peer, strict=True):
        print(name, mine, theirs)


if __name__ == "__main__":
    main()
