# SPDX-License-Identifier: MIT
"""Building the kernel module, and static programs for the guest, in the build root."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import buildroot, paths, store
from .errors import GuestError
from .kernels import Kernel
from .log import say, step

MADE = (".ko", ".o", ".mod", ".cmd", ".mod.c", ".order", ".symvers", ".a")
# The map makes the kernel's warnings name files as they are called in the tree.
UNTRACED = " -DNOTRACE"
KCFLAGS = "-Werror -fmacro-prefix-map=/build/=kmod/"


@dataclass(frozen=True)
class Extras:
    """Checks that a build can have beside the compiler's own."""

    sparse: bool = False
    w1: bool = False

    def arguments(self) -> list[str]:
        """What to give to make; sparse looks at every file, also those that are up to date."""
        return (["C=2", "CF=-Wsparse-error"] if self.sparse else []) + (["W=1"] if self.w1 else [])


def build(kernel: Kernel, extras: Extras | None = None, untraced: bool = False) -> Path:
    """Build ``kmod/`` for ``kernel`` with warnings as errors; returns the folder with its ``.ko`` files.

    Untraced, its tracepoints are compiled out.

    Raises GuestError with the compiler's output if that fails.
    """
    source = paths.kmod_dir()
    if not (source / "Kbuild").exists() and not (source / "Makefile").exists():
        raise GuestError(f"there is no kernel module to build: {source} has neither Kbuild nor Makefile")
    copy = paths.BUILD / _copies(source) / (kernel.spec.name + ("-untraced" if untraced else ""))
    with store.locked(copy.with_suffix(".lock"), f"the module for {kernel.spec.name}"):
        stamp = copy / ".built-for"
        # Object files of another kernel version are of no use to make, and it does not notice.
        if copy.exists() and (not stamp.exists() or stamp.read_text() != str(kernel.path)):
            shutil.rmtree(copy)
        changed = mirror_sources(source, copy)
        if stamp.exists() and not changed and extras is None:
            return copy
        stamp.unlink(missing_ok=True)
        command = [
            "make",
            "-C",
            kernel.headers,
            "M=/build",
            "ARCH=arm64",
            f"-j{os.cpu_count()}",
            "--no-print-directory",
        ]
        command += [
            f"CROSS_COMPILE={buildroot.CROSS_PREFIX}",
            f"CC={buildroot.CROSS_PREFIX}gcc",
            f"KCFLAGS={KCFLAGS}{UNTRACED if untraced else ''}",
        ]
        checks = extras.arguments() if extras else []
        with step(f"building the module for {kernel.spec.name}", f"Linux {kernel.version}"):
            result = buildroot.run(
                [*command, *checks, "modules"],
                binds=[(copy, "/build")],
                read_only=[(kernel.path / "src", "/usr/src")],
            )
        output = result.stdout.replace("/build/", "kmod/")
        if result.returncode != 0:
            raise GuestError(f"the module does not build for {kernel.spec.name}:\n{output.strip()}")
        if "warning:" in output.lower():
            say(f"building the module for {kernel.spec.name} gave warnings:\n{output.strip()}")
        stamp.write_text(str(kernel.path))
    return copy


def _copies(source: Path) -> str:
    """Another module's copies, in the tool's own tests, must not come in the way of the real one's."""
    return "kmod" if source == paths.TREE / "kmod" else f"kmod-{store.key_of(str(source))}"


def mirror_sources(source: Path, copy: Path) -> bool:
    """Bring ``copy`` up to date with ``source`` and tell if it was not.

    What a build made there stays, times stay as they are.
    """
    changed = False
    copy.mkdir(parents=True, exist_ok=True)
    manifest = copy / ".sources.json"
    known = set(json.loads(manifest.read_text())) if manifest.exists() else set()
    present = set()
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        if not path.is_file() or path.name.endswith(MADE) or any(part.startswith(".") for part in name.parts):
            continue
        present.add(str(name))
        target = copy / name
        status = path.stat()
        if target.exists():
            old = target.stat()
            if (old.st_mtime_ns, old.st_size) == (status.st_mtime_ns, status.st_size):
                continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
        changed = True
    for gone in known - present:
        (copy / gone).unlink(missing_ok=True)
        changed = True
    manifest.write_text(json.dumps(sorted(present)))
    return changed


def compile_programs(sources: Sequence[Path], outputs: Sequence[Path], static: bool = True) -> None:
    """Compile each of ``sources`` to an arm64 program with threads, where it is not up to date.

    ``kmod/include/uapi`` is on the include path. Raises GuestError with the compiler's output.
    """
    for source, output in zip(sources, outputs, strict=True):
        newest = max(path.stat().st_mtime for path in (source, *source.parent.glob("*.h")))
        if output.exists() and output.stat().st_mtime >= newest:
            continue
        output.parent.mkdir(parents=True, exist_ok=True)
        flags = [
            *(["-static"] if static else []),
            "-O2",
            "-g",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-pthread",
            "-I/source/include/uapi",
        ]
        command = [
            f"{buildroot.CROSS_PREFIX}gcc",
            *flags,
            f"/build/{source.name}",
            "-o",
            f"/out/{output.name}",
        ]
        uapi = paths.kmod_dir()
        result = buildroot.run(
            command,
            binds=[(output.parent, "/out")],
            read_only=[(source.parent, "/build"), *([(uapi, "/source")] if uapi.is_dir() else [])],
        )
        if result.returncode != 0:
            raise GuestError(f"{source} does not compile:\n{result.stdout.strip()}")


def guest_programs() -> list[tuple[str, Path]]:
    """Compile ``tests/guest/**/*.c``, and those of the package, which find a compiler on a board and none in a guest.

    Returns each program's place in the guest's tree and its file here.
    """
    made: list[tuple[str, Path]] = []
    # another malloc() can be preloaded into the package's
    for folder, static in (("tests/guest", True), ("pyctl/src/tensormem", False)):
        sources = sorted((paths.TREE / folder).rglob("*.c"))
        names = [str(source.relative_to(paths.TREE).with_suffix("")) for source in sources]
        outputs = [paths.BUILD / "guest-programs" / name for name in names]
        with store.locked(paths.BUILD / "guest-programs.lock", "the guest's programs"):
            compile_programs(sources, outputs, static)
        made += zip(names, outputs, strict=True)
    return made
