# SPDX-License-Identifier: MIT
"""The kernels by name: Debian's, and the debug kernel that is built from Debian's source.

A kernel's artefact holds ``Image``, ``pi3.dtb`` (Debian's kernels), ``modules.img`` (the whole module tree as a file
system), ``boot.cpio`` (the few modules that reach the root file system), ``src/`` (what modules are built against,
seen as ``/usr/src`` in the build root) and ``kernel.json``.
"""

from __future__ import annotations

import json
import lzma
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from . import apt, buildroot, cpio, debugkernel, store
from .errors import GuestError
from .log import step

RECIPE = 4
DEFAULT = "6.12"
PARTS = r"linux-(image|binary|modules|base|headers|kbuild)-\d"
# In the order in which they are wanted; what they depend on comes before them, what a kernel has built in is left out.
BOOT_MODULES = (
    "virtio_pci", "virtio_blk", "virtio_console", "crc32c_generic", "ext4", "9pnet_virtio", "9p",
    "bcm2835", "sdhci-iproc", "mmc_block", "bcm2835-rng",
)  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """One kernel that can be asked for by name."""

    name: str
    suites: tuple[str, ...]
    flavour: str
    page_size: int = 4096
    what: str = ""

    @property
    def is_debug(self) -> bool:
        """Whether it is built here instead of fetched."""
        return self.flavour == "debug"


@dataclass(frozen=True)
class Kernel:
    """A kernel that is ready to boot and to build against."""

    spec: Spec
    version: str
    path: Path

    @property
    def headers(self) -> str:
        """The folder to build modules against, as the build root sees it."""
        return f"/usr/src/{'linux-debug' if self.spec.is_debug else f'linux-headers-{self.version}'}"


KERNELS = {
    spec.name: spec
    for spec in (
        Spec("6.12", ("trixie",), "arm64", what="Debian 13"),
        Spec(
            "6.12-16k",
            ("trixie",),
            "arm64-16k",
            16384,
            "Debian 13, 16K pages as on a Raspberry Pi 5",
        ),
        Spec("6.12-rt", ("trixie",), "rt-arm64", what="Debian 13, PREEMPT_RT"),
        Spec("6.1", ("bookworm",), "arm64", what="Debian 12"),
        Spec("newest", ("trixie-backports", "trixie"), "arm64", what="Debian 13 backports"),
        Spec(
            "debug",
            ("trixie",),
            "debug",
            what="KASAN, lockdep, kmemleak, UBSAN, fault injection, KUnit",
        ),
    )
}


def spec(name: str) -> Spec:
    """The kernel called ``name``; raises GuestError that lists the names there are."""
    try:
        return KERNELS[name]
    except KeyError:
        raise GuestError(f"no kernel is called {name!r}; there are {', '.join(KERNELS)}") from None


def _request(wanted: Spec) -> apt.Request:
    if wanted.is_debug:
        return debugkernel.REQUEST
    packages = (f"linux-image-{wanted.flavour}:arm64", f"linux-headers-{wanted.flavour}:arm64")
    return apt.Request(f"kernel-{wanted.name}", wanted.suites, packages, apt.host_arch(), PARTS)


def _material(wanted: Spec, packages: list[apt.Package]) -> object:
    recipe = debugkernel.recipe() if wanted.is_debug else RECIPE
    return {"recipe": recipe, "packages": [asdict(p) for p in packages]}


def cached(wanted: Spec) -> Kernel | None:
    """The kernel if it is in the cache; never goes to the network."""
    request = _request(wanted)
    if not apt.is_remembered(request):
        return None
    path = store.location(f"kernel-{wanted.name}", _material(wanted, apt.resolve(request)))
    return _open(wanted, path) if path.is_dir() else None


def prepare(wanted: Spec, update: bool = False) -> Kernel:
    """The kernel, fetched or built on first use; raises GuestError."""
    request = _request(wanted)
    return apt.obtain(request, lambda packages: _make(wanted, request, packages), update)


def _make(wanted: Spec, request: apt.Request, packages: list[apt.Package]) -> Kernel:
    def build(artefact: Path) -> None:
        tree = artefact / "tree"
        tree.mkdir()
        apt.unpack(request, packages, tree)
        if wanted.is_debug:
            debugkernel.build(tree, artefact)
        else:
            _arrange(tree, artefact)

    return _open(wanted, store.get(f"kernel-{wanted.name}", _material(wanted, packages), build))


def _open(wanted: Spec, path: Path) -> Kernel:
    version = json.loads((path / "kernel.json").read_text())["version"]
    return Kernel(wanted, str(version), path)


def _only(tree: Path, *patterns: str) -> Path:
    for pattern in patterns:
        found = sorted(tree.glob(pattern))
        if len(found) == 1:
            return found[0]
    raise GuestError(f"the kernel's packages have changed shape: no {' or '.join(patterns)}")


def _arrange(tree: Path, artefact: Path) -> None:
    """Turn unpacked kernel packages (whose layout has changed twice since 6.1) into the artefact."""
    modules = _only(tree, "usr/lib/modules/*", "lib/modules/*")
    version = modules.name
    shutil.move(_only(tree, "boot/vmlinuz-*", "usr/lib/modules/*/vmlinuz"), artefact / "Image")
    shutil.move(_only(tree, "usr/lib/linux-image-*/broadcom/bcm2837-rpi-3-b.dtb"), artefact / "pi3.dtb")
    sources = tree / "usr/src"
    kbuild = _only(tree, "usr/lib/linux-kbuild-*")
    (sources / kbuild.name).unlink(missing_ok=True)
    shutil.move(kbuild, sources / kbuild.name)
    for path in sources.glob("linux-headers-*/*"):
        if path.is_symlink() and kbuild.name in path.readlink().parts:
            target = f"../{kbuild.name}/{path.readlink().name}"
            path.unlink()
            path.symlink_to(target)
    shutil.move(sources, artefact / "src")
    with step("making the module tree's image", f"for Linux {version}"):
        image = buildroot.image_command("/source/lib/modules", "/out/modules.img", "512M")
        (tree / "lib").mkdir(exist_ok=True)
        if modules.parent != tree / "lib/modules":
            shutil.move(modules.parent, tree / "lib/modules")
        result = buildroot.run(
            ["sh", "-c", f"depmod -b /source {version} && {image}"],
            binds=[(tree, "/source"), (artefact, "/out")],
        )
        buildroot.check(result, "depmod and mke2fs")
        (artefact / "boot.cpio").write_bytes(boot_modules(tree / "lib/modules" / version))
    shutil.rmtree(tree)
    (artefact / "kernel.json").write_text(json.dumps({"version": version}) + "\n")


def boot_modules(tree: Path) -> bytes:
    """The modules that reach the root file system, uncompressed, as a cpio; their names begin with their turn."""
    needs: dict[str, list[str]] = {}
    for line in (tree / "modules.dep").read_text().splitlines():
        path, _, rest = line.partition(":")
        needs[path] = rest.split()
    by_name = {re.sub(r"\.ko(\.\w+)?$", "", Path(path).name): path for path in needs}
    order: list[str] = []
    for name in BOOT_MODULES:
        if name in by_name:
            # modules.dep lists what is needed first last.
            order += [path for path in (*reversed(needs[by_name[name]]), by_name[name]) if path not in order]
    entries = [cpio.directory("boot")]
    for turn, path in enumerate(order):
        data = (tree / path).read_bytes()
        if path.endswith(".xz"):
            data = lzma.decompress(data)
        entries.append(cpio.file(f"boot/{turn:02d}-{Path(path).name.removesuffix('.xz')}", data))
    return cpio.archive(entries)
