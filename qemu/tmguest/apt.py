# SPDX-License-Identifier: MIT
"""Debian packages through a private apt configuration: resolved, remembered, verified by signature, unpacked.

The machine's own apt state is never touched, so this works as an ordinary user, on derivatives of Debian and for
other releases than the machine's. What a request resolved to is remembered in the cache; only a first use,
``--update`` or a package that is gone from the mirror goes to the network.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote

from . import paths, sources
from .errors import DownloadError, GuestError
from .log import step
from .store import key_of, locked

Made = TypeVar("Made")
KEYRINGS = ("debian-archive-keyring.gpg", "debian-archive-keyring.pgp")


@dataclass(frozen=True)
class Request:
    """Packages with all they depend on, for a machine of ``arch``, from ``suites`` (the first one is preferred)."""

    name: str
    suites: tuple[str, ...]
    packages: tuple[str, ...]
    arch: str
    keep: str = ""
    """A pattern: only packages whose name matches are kept, when the rest of the closure is of no use."""


@dataclass(frozen=True)
class Package:
    """One package as apt resolved it."""

    name: str
    version: str
    arch: str


@cache
def host_arch() -> str:
    """Debian's name of this machine's architecture; raises GuestError on one that has no build root."""
    try:
        arch = subprocess.run(
            ["dpkg", "--print-architecture"], check=True, capture_output=True, text=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise GuestError(f"this is not a Debian-like system (dpkg does not answer: {error})") from error
    if arch not in ("amd64", "arm64"):
        raise GuestError(f"the host is {arch}; the tools of the guest run on amd64 and arm64 (64-bit) systems")
    return arch


@cache
def mirror() -> str:
    """The mirror to use: ``TENSORMEM_MIRROR``, the machine's own, or mmdebstrap's built-in default."""
    chosen = os.environ.get("TENSORMEM_MIRROR")
    if chosen:
        return chosen.rstrip("/")
    return machine_mirror() or _mmdebstrap_mirror()


def machine_mirror() -> str | None:
    """The Debian mirror in the machine's apt configuration, if there is one (there is none on Ubuntu)."""
    etc = Path("/etc/apt")
    found: list[sources.Source] = []
    for path in [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))]:
        try:
            text = path.read_text()
        except OSError:
            continue
        if path.suffix == ".sources":
            found += sources.parse_deb822(text)
        elif path.suffix == ".list":
            found += sources.parse_list(text)
    return sources.debian_mirror(found)


def _mmdebstrap_mirror() -> str:
    """Let mmdebstrap write the sources of a root it never makes, and read them back."""
    with tempfile.TemporaryDirectory() as scratch:
        noted = Path(scratch) / "sources.list"
        hook = f'--setup-hook=cp "$1/etc/apt/sources.list" {shlex.quote(str(noted))}; exit 1'
        command = ["mmdebstrap", "--variant=custom", "--format=null", hook, "trixie", "/dev/null"]
        try:
            subprocess.run(command, capture_output=True, check=False)
        except OSError as error:
            raise GuestError(
                "no Debian mirror in /etc/apt and no mmdebstrap to name one: "
                "run qemu/install-deps, or set TENSORMEM_MIRROR to a Debian mirror"
            ) from error
        if noted.is_file():
            for source in sources.parse_list(noted.read_text()):
                return source.uris[0]
    raise GuestError("no Debian mirror found: set TENSORMEM_MIRROR to one")


def _keyring() -> Path:
    for name in KEYRINGS:
        path = Path("/usr/share/keyrings") / name
        if path.exists():
            return path
    raise GuestError("Debian's archive keys are missing: apt-get install debian-archive-keyring")


@cache
def _machine_options() -> tuple[str, ...]:
    """The machine's proxy and certificate settings as apt options: all else comes from the private configuration."""
    dump = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=False).stdout
    found = re.findall(r'^(Acquire::https?::\S+) "([^"]+)";$', dump, re.MULTILINE)
    return tuple(word for key, value in found for word in ("-o", f"{key}={value}"))


class World:
    """One private apt configuration: a list of suites, seen from one architecture."""

    def __init__(self, suites: tuple[str, ...], arch: str) -> None:
        """Write the configuration; no network access yet."""
        self.suites = suites
        self.arch = arch
        architectures = sorted({host_arch(), "arm64"})
        lines = [f"deb [signed-by={_keyring()}] {mirror()} {suite} main" for suite in suites]
        self.dir = paths.cache_dir() / "apt" / f"{suites[0]}-{key_of([lines, architectures])}"
        self.lock = self.dir.with_suffix(".lock")
        self.stamp = self.dir / "updated"
        self.config = self.dir / f"apt-{arch}.conf"
        if self.config.exists():
            return
        for folder in (
            "state/lists/partial",
            "cache/archives/partial",
            "etc/parts",
            "etc/preferences",
        ):
            (self.dir / folder).mkdir(parents=True, exist_ok=True)
        (self.dir / "status").touch()
        (self.dir / "sources.list").write_text("\n".join(lines) + "\n")
        settings = {
            "Dir::State": self.dir / "state",
            "Dir::State::status": self.dir / "status",
            "Dir::Cache": self.dir / "cache",
            "Dir::Cache::pkgcache": "",
            "Dir::Cache::srcpkgcache": "",
            "Dir::Etc::main": "/dev/null",
            "Dir::Etc::parts": self.dir / "etc/parts",
            "Dir::Etc::preferencesparts": self.dir / "etc/preferences",
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::sourcelist": self.dir / "sources.list",
            "Dir::Etc::sourceparts": "/dev/null",
            "APT::Architecture": arch,
            "APT::Default-Release": suites[0],
            "APT::Install-Recommends": "false",
            "APT::Sandbox::User": "",
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
            "Debug::NoLocking": "true",
        }
        text = "".join(f'{key} "{value}";\n' for key, value in settings.items())
        seen = architectures if arch == host_arch() else [arch]
        text += "#clear APT::Architectures;\nAPT::Architectures { " + " ".join(f'"{one}";' for one in seen) + " };\n"
        fresh = self.config.with_suffix(f".{os.getpid()}")
        fresh.write_text(text)
        fresh.rename(self.config)

    def run(self, *command: str, cwd: Path | None = None) -> str:
        """Run an apt tool and return its stdout; raises DownloadError with its last lines if it fails."""
        result = subprocess.run(
            [command[0], *_machine_options(), *command[1:]],
            cwd=cwd,
            env={**os.environ, "APT_CONFIG": str(self.config), "LC_ALL": "C.UTF-8"},
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode != 0:
            tail = "\n".join((result.stderr or result.stdout).strip().splitlines()[-6:])
            raise DownloadError(f"{command[0]} {command[1]} failed:\n{tail}")
        return result.stdout

    def update(self, force: bool) -> None:
        """Fetch the package lists if there are none yet, or always with ``force``."""
        if self.stamp.exists() and not force:
            return
        with locked(self.lock, "package lists"):
            if self.stamp.exists() and not force:
                return
            with step(f"fetching package lists of {', '.join(self.suites)}", f"from {mirror()}"):
                full = World(self.suites, host_arch())
                full.run("apt-get", "update", "--error-on=any")
            self.stamp.touch()


def _remembered(request: Request) -> Path:
    return paths.cache_dir() / "resolved" / f"{request.name}-{key_of([asdict(request), host_arch()])}.json"


def resolve(request: Request, update: bool = False) -> list[Package]:
    """What ``request`` comes to, from memory unless it is new or ``update`` is set; raises DownloadError."""
    memory = _remembered(request)
    if memory.exists() and not update:
        return [Package(**fields) for fields in json.loads(memory.read_text())]
    world = World(request.suites, request.arch)
    world.update(force=update)
    output = world.run(
        "apt-get",
        "install",
        "--yes",
        "--print-uris",
        f"--target-release={request.suites[0]}",
        *request.packages,
    )
    packages = parse_uris(output, request.keep)
    if not packages:
        raise DownloadError(f"apt resolved {request.name} to nothing")
    memory.parent.mkdir(parents=True, exist_ok=True)
    fresh = memory.with_suffix(f".{os.getpid()}")
    fresh.write_text(json.dumps([asdict(package) for package in packages], indent=1) + "\n")
    fresh.rename(memory)
    return packages


def parse_uris(output: str, keep: str = "") -> list[Package]:
    """The packages in the output of ``apt-get --print-uris``: ``'URI' NAME_VERSION_ARCH.deb SIZE HASH``."""
    packages = []
    for line in output.splitlines():
        fields = re.match(r"'\S+' (?P<name>[^_\s]+)_(?P<version>[^_\s]+)_(?P<arch>[^_\s]+)\.deb ", line)
        if fields and re.match(keep, fields["name"]):
            packages.append(Package(fields["name"], unquote(fields["version"]), fields["arch"]))
    return sorted(packages, key=lambda package: (package.name, package.arch))


def is_remembered(request: Request) -> bool:
    """Whether ``request`` can be resolved without the network."""
    return _remembered(request).exists()


def obtain(request: Request, make: Callable[[list[Package]], Made], update: bool = False) -> Made:
    """Call ``make`` with what ``request`` comes to; again with new lists if the mirror no longer has that.

    What ``make`` raises passes through, a second DownloadError too.
    """
    packages = resolve(request, update)
    try:
        return make(packages)
    except DownloadError:
        return make(resolve(request, update=True))


def unpack(request: Request, packages: Sequence[Package], root: Path) -> None:
    """Download ``packages`` and unpack them into ``root``, without their maintainer scripts; raises DownloadError."""
    world = World(request.suites, request.arch)
    debs = root.with_name(root.name + ".debs")
    shutil.rmtree(debs, ignore_errors=True)
    debs.mkdir()
    try:
        with step(f"fetching {len(packages)} packages", f"for {request.name}"):
            world.run(
                "apt-get",
                "download",
                *(f"{p.name}:{p.arch}={p.version}" for p in packages),
                cwd=debs,
            )
        files = sorted(debs.glob("*.deb"))
        if len(files) != len(packages):
            raise DownloadError(f"apt fetched {len(files)} of {len(packages)} packages for {request.name}")
        with step(f"unpacking {request.name}", f"{sum(deb.stat().st_size for deb in files) >> 20} MiB"):
            # The package that owns the /bin -> usr/bin links has to come first.
            files.sort(key=lambda deb: not deb.name.startswith("base-files_"))
            if files[0].name.startswith("base-files_"):
                _extract(files.pop(0), root)
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(lambda deb: _extract(deb, root), files))
    finally:
        shutil.rmtree(debs, ignore_errors=True)


def _extract(deb: Path, root: Path) -> None:
    result = subprocess.run(["dpkg-deb", "-x", deb, root], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise GuestError(f"cannot unpack {deb.name}: {result.stderr.strip()}")
