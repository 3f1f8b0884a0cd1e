# SPDX-License-Identifier: MIT
"""Where things are: the project's tree and the cache outside it."""

from __future__ import annotations

import os
from pathlib import Path

QEMU_DIR = Path(__file__).resolve().parent.parent
TREE = QEMU_DIR.parent
BUILD = TREE / "build"


def kmod_dir() -> Path:
    """The module's source; ``TENSORMEM_KMOD`` points the tool at another module, for its own tests."""
    override = os.environ.get("TENSORMEM_KMOD")
    return Path(override).resolve() if override else TREE / "kmod"


def cache_dir() -> Path:
    """The cache, shared by all checkouts of the project."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "tensormem"
