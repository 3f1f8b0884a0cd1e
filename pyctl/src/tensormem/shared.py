# SPDX-License-Identifier: MIT
"""What the package has from the rest of the project: the eBPF tools, the module's header.

An installed package carries them in ``share`` (``setup.py`` puts them there); one that runs from
the project's tree takes them from where they are.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["shared"]

_PACKAGE = Path(__file__).parent
_IN_TREE = {"bpf": "bpf", "include": "kmod/include/uapi"}


def shared(name: str) -> Path:
    """Return the folder ``bpf`` or ``include``, whether it is there or not."""
    carried = _PACKAGE / "share" / name
    return carried if carried.exists() else _PACKAGE / "../../.." / _IN_TREE[name]
