# SPDX-License-Identifier: MIT
"""Rows of model.json: runs in the guest, prints ``NAME OURS PEER`` lines."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> None:
    programs = Path(sys.argv[1])
    for name in ("model_swap", "model_torn"):
        # files in memory: what is compared is not the disk
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            subprocess.run([programs / name, folder], check=True)


if __name__ == "__main__":
    main()
