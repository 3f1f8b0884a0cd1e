# SPDX-License-Identifier: MIT
"""The build root: a Debian trixie with the compilers, entered by bubblewrap, as root or as an ordinary user."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path

from . import apt, store
from .errors import GuestError

RECIPE = 1
SHELL = (
    "base-files",
    "bash",
    "coreutils",
    "dash",
    "diffutils",
    "findutils",
    "gawk",
    "grep",
    "gzip",
    "sed",
    "tar",
)
# gcc to openssl are the host programs of a kernel build; beside them they add one second to making the root.
BUILD = (
    "bc", "bison", "flex", "gcc", "libc6-dev", "libelf-dev", "libssl-dev", "make", "pahole", "perl-base",
    "sparse",
)  # fmt: skip
IMAGES = ("e2fsprogs", "kmod", "python3", "xz-utils")
CROSS = ("gcc-aarch64-linux-gnu", "libc6-dev-arm64-cross")


# Debian's native compiler on arm64 answers to this name too.
CROSS_PREFIX = "aarch64-linux-gnu-"


def _request() -> apt.Request:
    cross = () if apt.host_arch() == "arm64" else CROSS
    return apt.Request("build-root", ("trixie",), SHELL + BUILD + IMAGES + cross, apt.host_arch())


def prepare(update: bool = False) -> Path:
    """The build root, made on first use; raises GuestError."""
    request = _request()
    return apt.obtain(request, lambda packages: _make(request, packages), update)


def _make(request: apt.Request, packages: list[apt.Package]) -> Path:
    def build(root: Path) -> None:
        apt.unpack(request, packages, root)
        for program, real in (("awk", "gawk"), ("yacc", "bison.yacc")):
            (root / "usr/bin" / program).symlink_to(real)
        for mountpoint in ("build", "source", "out", "usr/src"):
            (root / mountpoint).mkdir(parents=True, exist_ok=True)

    return store.get("build-root", {"recipe": RECIPE, "packages": [asdict(p) for p in packages]}, build)


@cache
def _bwrap_works() -> str:
    """Empty if bubblewrap can start a program here, else what it said."""
    probe = ["bwrap", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "true"]
    try:
        result = subprocess.run(probe, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "bwrap is not installed: run qemu/install-deps"
    if result.returncode == 0:
        return ""
    hint = ""
    switch = Path("/proc/sys/kernel/apparmor_restrict_unprivileged_userns")
    if switch.exists() and switch.read_text().strip() == "1":
        hint = (
            "\nThis system keeps ordinary users from user namespaces. Run as root, or allow them with: "
            "sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0"
        )
    return f"{result.stderr.strip()}{hint}"


def run(
    command: Sequence[str],
    binds: Sequence[tuple[Path, str]] = (),
    read_only: Sequence[tuple[Path, str]] = (),
    cwd: str = "/",
) -> subprocess.CompletedProcess[str]:
    """Run ``command`` as root of the build root, with host paths bound into it; its output is captured, both together.

    The caller looks at the exit code. Raises GuestError if the root cannot be entered.
    """
    root = prepare()
    problem = _bwrap_works()
    if problem:
        raise GuestError(f"cannot enter the build root: {problem}")
    arguments = ["bwrap", "--unshare-user", "--uid", "0", "--gid", "0", "--die-with-parent"]
    arguments += [
        "--ro-bind",
        str(root),
        "/",
        "--dev",
        "/dev",
        "--proc",
        "/proc",
        "--tmpfs",
        "/tmp",
    ]
    for host, inside in binds:
        arguments += ["--bind", str(host), inside]
    for host, inside in read_only:
        arguments += ["--ro-bind", str(host), inside]
    environment = {
        "PATH": f"/usr/sbin:/usr/bin:{os.defpath}",
        "HOME": "/tmp",
        "LC_ALL": "C.UTF-8",
        "TERM": "dumb",
    }
    arguments += ["--chdir", cwd, *command]
    return subprocess.run(
        arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", check=False, env=environment,
    )  # fmt: skip


def image_command(folder: str, image: str, size: str) -> str:
    """The shell command that makes a file system of a folder, both as the build root sees them.

    Without checksums, which would need one more module to reach the root; without a journal, as nothing is kept.
    """
    return f"mke2fs -q -t ext4 -O ^has_journal,^metadata_csum -m 0 -E root_owner=0:0 -d {folder} {image} {size}"


def check(result: subprocess.CompletedProcess[str], what: str) -> None:
    """Raise GuestError with the end of the output if ``result`` is a failure."""
    if result.returncode != 0:
        raise GuestError(f"{what} failed:\n" + "\n".join(result.stdout.strip().splitlines()[-30:]))
