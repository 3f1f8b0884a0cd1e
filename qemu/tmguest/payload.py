# SPDX-License-Identifier: MIT
"""What a guest gets for one run: the project's tree, its modules, its programs, and what to do with them."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

from . import cpio, paths
from .kernels import Kernel
from .options import Options

GUESTSIDE = paths.QEMU_DIR / "guestside"
# Everything in the tree goes along but what the guest has no use for.
LEFT_OUT = ("build", "qemu", "__pycache__", "node_modules")
MODULE = "tensormem.ko"


def initrd(
    kernel: Kernel,
    options: Options,
    nonce: str,
    modules: Path | None,
    programs: list[tuple[str, Path]],
    busybox: Path,
    interactive: bool,
) -> bytes:
    """The whole initramfs: archives one after the other, as the kernel takes them."""
    run = cpio.archive(
        [
            *_static(),
            *_tree(modules, programs),
            cpio.file("guest.conf", _configuration(options, nonce, modules, interactive).encode()),
            cpio.file("command", f"exec {shlex.join(options.command)}\n".encode()),
        ]
    )
    return busybox.read_bytes() + (kernel.path / "boot.cpio").read_bytes() + run


def _static() -> list[cpio.Entry]:
    return [
        cpio.file("init", (GUESTSIDE / "init").read_bytes(), executable=True),
        cpio.file("relay.py", (GUESTSIDE / "relay.py").read_bytes()),
    ]


def _left_out(path: Path) -> bool:
    """Hidden files are the tools' own, and a folder with this file holds a Python environment of the host's."""
    return path.name in LEFT_OUT or path.name.startswith(".") or (path / "pyvenv.cfg").exists()


def _tree(modules: Path | None, programs: list[tuple[str, Path]]) -> list[cpio.Entry]:
    entries = cpio.tree(paths.TREE, "payload/tree", _left_out)
    if modules is not None:
        for path in sorted(modules.rglob("*.ko")):
            entries.append(cpio.file(f"payload/tree/kmod/{path.relative_to(modules)}", path.read_bytes()))
    for name, path in programs:
        entries.append(cpio.file(f"payload/tree/{name}", path.read_bytes(), executable=True))
    return entries


def _configuration(options: Options, nonce: str, modules: Path | None, interactive: bool) -> str:
    terminal = shutil.get_terminal_size()
    settings = {
        "MODE": "shell" if interactive else "run",
        "NONCE": nonce,
        "MODULE": f"/tensormem/kmod/{MODULE}" if modules is not None else "",
        "MODULE_PARAMS": options.module_params,
        "UNLOAD": "1" if options.unload else "0",
        # Python's hashes decide the order of its sets, and with it what a benchmark executes.
        "PYTHONHASHSEED": "0" if options.icount else "random",
        "SHARES": " ".join(f"{one.name}:{'ro' if one.read_only else 'rw'}" for one in options.shares),
        "STTY": f"rows {terminal.lines} cols {terminal.columns}",
        "TERM_NAME": "linux" if interactive else "dumb",
    }
    return "".join(f"{name}={shlex.quote(value)}\n" for name, value in settings.items())
