# SPDX-License-Identifier: MIT
"""The debug kernel: Debian's source with the options of ``debug.config``, built once in the build root."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from . import apt, buildroot, cpio, paths
from .errors import GuestError
from .log import step

RECIPE = 1
VERSION = "6.12"
CONFIG = paths.QEMU_DIR / "debug.config"
REQUEST = apt.Request(
    "kernel-debug",
    ("trixie",),
    (f"linux-source-{VERSION}",),
    apt.host_arch(),
    rf"linux-source-{VERSION}$",
)
INSIDE = "/usr/src/linux-debug"
# The parts of a built tree that building a module needs; of the rest only the makefiles are kept.
NEEDED = ("arch/arm64", "include", "scripts", "tools")


def recipe() -> object:
    """What the kernel is made from beside its source."""
    return [RECIPE, CONFIG.read_text()]


def build(tree: Path, artefact: Path) -> None:
    """Build from the unpacked source package in ``tree`` into ``artefact``; raises GuestError."""
    source = artefact / "src/linux-debug"
    source.mkdir(parents=True)
    binds = [(artefact / "src", "/usr/src"), (tree, "/source")]
    archive = f"/source/usr/src/linux-source-{VERSION}.tar.xz"

    def make(*targets: str, what: str) -> str:
        command = [
            "make",
            "-C",
            INSIDE,
            "ARCH=arm64",
            f"CROSS_COMPILE={buildroot.CROSS_PREFIX}",
            *targets,
        ]
        result = buildroot.run(command, binds=[*binds, (CONFIG.parent, "/out")])
        buildroot.check(result, what)
        return result.stdout

    with step("unpacking the kernel's source", f"for the debug kernel {VERSION}"):
        unpack = ["tar", "-xf", archive, "-C", INSIDE, "--strip-components=1"]
        buildroot.check(buildroot.run(unpack, binds=binds), "tar")
    make("KCONFIG_ALLCONFIG=/out/debug.config", "allnoconfig", what="configuring the debug kernel")
    lost = lost_options(CONFIG.read_text(), (source / ".config").read_text())
    if lost:
        raise GuestError("the debug kernel's configuration lost options: " + ", ".join(lost))
    with step("building the debug kernel", "once; some 7 minutes on two cores"):
        make(f"-j{os.cpu_count()}", "Image", "modules", what="building the debug kernel")
    version = make("-s", "kernelrelease", what="make kernelrelease").split()[-1]
    shutil.move(source / "arch/arm64/boot/Image", artefact / "Image")
    _strip(source)
    (artefact / "boot.cpio").write_bytes(cpio.archive([cpio.directory("boot")]))
    (artefact / "kernel.json").write_text(json.dumps({"version": version}) + "\n")
    shutil.rmtree(tree)


def lost_options(fragment: str, config: str) -> list[str]:
    """The lines of ``fragment`` that ``config`` does not fulfil. Pure."""
    has = set(config.splitlines())
    lost = []
    for line in fragment.splitlines():
        unset = re.fullmatch(r"# (CONFIG_\w+) is not set", line)
        if unset:
            if any(have.startswith(f"{unset[1]}=") for have in has):
                lost.append(line)
        elif line.startswith("CONFIG_") and line not in has:
            lost.append(line)
    return lost


def _strip(source: Path) -> None:
    """Keep what modules are built with: a tenth of the tree."""
    for path in source.iterdir():
        if path.is_dir() and not any(part.split("/")[0] == path.name for part in NEEDED):
            shutil.rmtree(path)
        elif path.name.startswith("vmlinux") or path.suffix in (".o", ".a"):
            path.unlink()
    for path in (source / "arch").iterdir():
        if path.is_dir() and path.name != "arm64":
            shutil.rmtree(path)
    for path in source.rglob("*"):
        if path.suffix in (".o", ".a", ".cmd") and path.is_file() and "scripts" not in path.parts:
            path.unlink()
