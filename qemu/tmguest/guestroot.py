# SPDX-License-Identifier: MIT
"""The guest's root file system: a Debian trixie for arm64 with Python, as an ext4 image that all guests share.

No maintainer script runs (that would take an emulated machine 16 minutes), so the little they would have done is
done here.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from . import apt, buildroot, cpio, store
from .log import step

RECIPE = 2
PACKAGES = (
    "base-files", "base-passwd", "bash", "coreutils", "dash", "diffutils", "findutils", "gawk", "grep", "gzip",
    "hostname", "iproute2", "kmod", "less", "mount", "ncurses-base", "procps", "sed", "tar", "util-linux",
    "python3", "python3-bpfcc", "python3-click", "python3-numpy", "python3-prometheus-client", "python3-pyroute2",
    "python3-pytest", "python3-rich",
    "busybox-static",
    # peers of `tensormem bench allocators`
    "libjemalloc2", "libmimalloc3",
)  # fmt: skip
# A power of two, because QEMU's SD cards must have such a size.
IMAGE_SIZE = "1G"
LIBRARIES = "usr/lib/aarch64-linux-gnu"
WRAPPER = '#!/bin/sh\nPYTHONPATH=/tensormem/pyctl/src exec python3 -m tensormem "$@"\n'
ETC = {
    "hostname": "tensormem\n",
    "hosts": "127.0.0.1 localhost tensormem\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
    "profile": "export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin\n",
}


def _request() -> apt.Request:
    return apt.Request("guest-root", ("trixie",), PACKAGES, "arm64")


def prepare(update: bool = False) -> Path:
    """The artefact with ``root.img`` and ``busybox``; raises GuestError."""
    request = _request()
    return apt.obtain(request, lambda packages: _make(request, packages), update)


def _make(request: apt.Request, packages: list[apt.Package]) -> Path:
    def build(artefact: Path) -> None:
        root = artefact / "root"
        root.mkdir()
        apt.unpack(request, packages, root)
        (artefact / "busybox.cpio").write_bytes(
            cpio.archive([cpio.file("bin/busybox", (root / "usr/bin/busybox").read_bytes(), executable=True)])
        )
        _configure(root)
        with step("making the guest's root image", "done once"):
            # A module that does not compile only starts slower, so the outcome does not matter.
            compile_all = "python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash -s /source -p /"
            buildroot.run(
                ["sh", "-c", f"{compile_all} /source/usr/lib/python3 /source/usr/lib/python3.*"],
                binds=[(root, "/source")],
            )
            image = buildroot.image_command("/source", "/out/root.img", IMAGE_SIZE)
            result = buildroot.run(
                ["sh", "-c", f"{image} && rm -rf /out/root"],
                binds=[(artefact, "/out")],
                read_only=[(root, "/source")],
            )
            buildroot.check(result, "mke2fs")

    return store.get("guest-root", {"recipe": RECIPE, "packages": [asdict(p) for p in packages]}, build)


def _configure(root: Path) -> None:
    for path, target in (
        (f"{LIBRARIES}/libblas.so.3", "blas/libblas.so.3"),
        (f"{LIBRARIES}/liblapack.so.3", "lapack/liblapack.so.3"),
        ("usr/bin/awk", "gawk"),
        ("etc/mtab", "../proc/self/mounts"),
        ("etc/localtime", "../usr/share/zoneinfo/UTC"),
    ):
        (root / path).symlink_to(target)
    for name, text in ETC.items():
        (root / "etc" / name).write_text(text)
    masters = root / "usr/share/base-passwd"
    (root / "etc/passwd").write_text(
        (masters / "passwd.master").read_text().replace("root:*:", "root::") + "tester:x:1000:1000::/tmp:/bin/bash\n"
    )
    (root / "etc/group").write_text((masters / "group.master").read_text() + "tensormem:x:990:\ntester:x:1000:\n")
    wrapper = root / "usr/local/bin/tensormem"
    wrapper.parent.mkdir(parents=True, exist_ok=True)
    wrapper.write_text(WRAPPER)
    wrapper.chmod(0o755)
    for folder in ("tensormem", "share", "lib/modules", "dev", "proc", "sys", "run", "tmp", "root"):
        (root / folder).mkdir(parents=True, exist_ok=True)
