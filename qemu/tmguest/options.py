# SPDX-License-Identifier: MIT
"""What a guest is to be: the options of ``run`` and ``shell``, checked. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from .errors import GuestError

VIRT = "virt"
PI = "raspi3b"
MACHINES = (VIRT, PI)
PI_CPUS = 4


@dataclass(frozen=True)
class Share:
    """A folder of the host that the guest sees as ``/share/<name>``."""

    path: Path
    read_only: bool

    @property
    def name(self) -> str:
        """The folder's name in the guest."""
        return self.path.name


@dataclass(frozen=True)
class DmaPool:
    """A region that the device tree sets aside for the module."""

    size: int  # MiB
    reusable: bool  # lent to programs meanwhile


@dataclass(frozen=True)
class Options:
    """One guest."""

    kernel: str = "6.12"
    machine: str = VIRT
    cpu: str = ""
    cpus: int = 2
    memory: int = 2048
    numa: int = 1
    icount: bool = False
    dma: bool = False
    dma_pool: DmaPool | None = None
    shares: tuple[Share, ...] = ()
    timeout: float = 1800
    append: str = ""
    module: bool = True
    module_params: str = ""
    unload: bool = True
    untraced: bool = False
    command: tuple[str, ...] = field(default=())


def size(text: str) -> int:
    """A memory size (``512M``, ``2G``, ``2048``: MiB) in MiB; raises GuestError."""
    fields = re.fullmatch(r"(\d+)([MG]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if fields is None:
        raise GuestError(f"{text!r} is not a memory size; try 512M or 2G")
    return int(fields[1]) << (10 if fields[2].upper() == "G" else 0)


def share(text: str) -> Share:
    """Read ``DIR`` or ``DIR:ro``; raises GuestError if there is no such folder."""
    bare = text.removesuffix(":ro")
    path = Path(bare).resolve()
    if not path.is_dir():
        raise GuestError(f"--share: {bare} is not a folder")
    if "," in str(path):
        raise GuestError(f"--share: QEMU cannot take a comma in {path}")
    return Share(path, read_only=bare != text)


def dma_pool(text: str) -> DmaPool:
    """Read ``SIZE`` or ``SIZE:idle``; raises GuestError."""
    bare = text.removesuffix(":idle")
    mib = size(bare)
    if not mib or mib % 2:
        raise GuestError(f"--dma-pool: {bare} is not a number of chunks of 2 MiB")
    return DmaPool(mib, reusable=bare == text)


def check(wanted: Options) -> Options:
    """The options with what follows from them; raises GuestError on a combination that cannot be."""
    if wanted.machine == PI:
        for set_, flag in (
            (wanted.shares, "--share"),
            (wanted.numa > 1, "--numa"),
            (wanted.cpu, "--cpu"),
            (wanted.icount, "--icount"),
            (wanted.dma, "--dma"),
            (wanted.dma_pool, "--dma-pool"),
        ):
            if set_:
                raise GuestError(
                    f"{flag} does not work with --machine {PI}: it has no PCI, one node, four Cortex-A53"
                )
        if wanted.kernel in ("6.12-16k", "debug"):
            raise GuestError(f"{wanted.kernel} does not boot on {PI}: it lacks the board's drivers or page size")
        return _replace(wanted, cpus=PI_CPUS, memory=1024)
    names = [one.name for one in wanted.shares]
    for name in names:
        if names.count(name) > 1:
            raise GuestError(f"--share: two folders are called {name}")
    if wanted.icount:
        if wanted.numa > 1:
            raise GuestError("--icount has one CPU, so --numa has nothing to split")
        wanted = _replace(wanted, cpus=1)
    if wanted.cpus < 1 or wanted.memory < 256 or wanted.numa < 1:
        raise GuestError("a guest needs at least one CPU, one node and 256M of memory")
    if wanted.dma_pool and wanted.dma_pool.size > wanted.memory // 4:
        raise GuestError("--dma-pool is to leave the guest three quarters of its memory")
    return _replace(wanted, cpus=max(wanted.cpus, wanted.numa))


def _replace(wanted: Options, **changes: int) -> Options:
    return Options(**{**wanted.__dict__, **changes})
