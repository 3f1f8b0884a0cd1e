"""placeholder"""
from __future__ import annotations
from pathlib import Path
from . import apt
REQUEST = apt.Request("kernel-debug", ("trixie",), ("linux-source-6.12",), "amd64", "linux-source-")
def material() -> object:
    return {}
def build(tree: Path, artefact: Path) -> None:
    raise NotImplementedError
