# SPDX-License-Identifier: MIT
"""Allocators beside each other: the module's pools and ``malloc`` of three libraries.

A C program (``allocators.c``) does the work, a process for each allocator and shape, since
calls from Python would cost more than what they call. It is compiled at first use into the
user's cache. Peers are the process's own ``malloc``, with another library preloaded.

What counts as memory is the process's anonymous memory, what its client holds in the
module, and the kernel's objects that were added meanwhile: a tensor has one, and for
small ones that is most of it. Mapped tensor memory is not counted twice. The kernel's
objects are those of the whole system: on a machine that does much else the figure is coarse.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import errors
from .shared import shared

__all__ = ["ALLOCATORS", "SHAPES", "Allocator", "Memory", "Result", "program", "run"]

#: Objects of each shape, and for how many of them one tensor comes and goes.
OBJECTS = 1_000_000
TENSORS = 500
#: A call for each object: what one costs does not depend on how many there are.
SINGLE = 10

#: Who is so many times better is better: less is noise.
_AHEAD = 1.05

#: The program's exit code where an allocator is not there.
_NOT_HERE = 3

SHAPES = {
    "fixed": "objects of 64 B",
    "mixed": "objects of 16 to 256 B",
    "tensors": "tensors of 64 KiB to 4 MiB, coming and going",
}


@dataclass(frozen=True)
class Allocator:
    """One way to have memory.

    Attributes:
        name: what it is called here.
        method: what the program calls it.
        shapes: what it is for.
        libraries: of these the first that is there is preloaded.
        symbol: what the library has and no other.
    """

    name: str
    method: str
    shapes: tuple[str, ...]
    libraries: tuple[str, ...] = ()
    symbol: str = ""

    @property
    def ours(self) -> bool:
        """Whether it is of the module."""
        return self.method != "malloc"


_SMALL = ("fixed", "mixed")
_EVERY = tuple(SHAPES)
_MIMALLOC = ("libmimalloc.so.3", "libmimalloc.so.2", "libmimalloc.so.2.0")
_ALL = (
    *(Allocator(name, name, _SMALL) for name in ("bump", "slab", "single")),
    *(Allocator(name, name, ("tensors",)) for name in ("buddy", "chunk", "reuse")),
    Allocator("glibc", "malloc", _EVERY),
    Allocator("jemalloc", "malloc", _EVERY, ("libjemalloc.so.2",), "mallctl"),
    Allocator("mimalloc", "malloc", _EVERY, _MIMALLOC, "mi_malloc"),
)
ALLOCATORS = {each.name: each for each in _ALL}


@dataclass(frozen=True)
class Memory:
    """Memory at one moment, in bytes.

    Attributes:
        live: bytes of the objects that are there.
        anonymous: of the process, without its own books.
        held: of its client in the module.
        kernel: of the kernel's own objects, as far as they were added.
    """

    live: int
    anonymous: int
    held: int
    kernel: int

    @property
    def taken(self) -> int:
        """All of it."""
        return self.anonymous + self.held + self.kernel

    @property
    def ratio(self) -> float:
        """Bytes taken for each byte that is live."""
        return self.taken / self.live


@dataclass(frozen=True)
class Result:
    """What one allocator did with one shape.

    Attributes:
        shape: one of :data:`SHAPES`.
        allocator: one of :data:`ALLOCATORS`.
        missing: why it could not be measured; all that follows is 0 or None then.
        allocations: how many were made, and the memory touched.
        frees: how many were taken back: as many.
        ns: how long all of that took.
        full: memory with all objects there.
        half: memory after every other one was freed.
    """

    shape: str
    allocator: str
    missing: str | None = None
    allocations: int = 0
    frees: int = 0
    ns: int = 0
    full: Memory | None = None
    half: Memory | None = None

    @property
    def ns_each(self) -> float:
        """Nanoseconds for an object: allocate, touch, free."""
        return self.ns / self.allocations


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "tensormem"


def program() -> Path:
    """Return the program that measures, compiled if need be.

    Raises:
        NotAvailable: there is no compiler, or it refuses the program.
    """
    source = Path(__file__).with_suffix(".c")
    built = source.with_suffix("")
    if built.exists():
        return built
    header = shared("include") / "linux/tensormem.h"
    compiler = shlex.split(os.environ.get("CC") or "cc")
    key = hashlib.sha256(source.read_bytes() + header.read_bytes() + repr(compiler).encode())
    built = _cache() / f"allocators-{key.hexdigest()[:16]}"
    if built.exists():
        return built
    built.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=built.parent) as folder:
        made = Path(folder) / built.name
        # of the header's folder nothing but this header, where it is the system's
        command = [*compiler, "-O2", "-I", str(header.parents[1]), "-o", str(made), str(source)]
        try:
            result = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise errors.NotAvailable(
                f"there is no C compiler to build the benchmark with ({compiler[0]}:"
                f" {error.strerror})",
                "install one ('sudo apt install gcc libc6-dev'), or name one with CC=",
            ) from None
        if result.returncode:
            said = (result.stderr.strip() or "no message").splitlines()
            wrong = next((line for line in said if "error" in line), said[-1])
            raise errors.NotAvailable(
                f"the benchmark does not compile ({wrong})",
                "install the C library's headers ('sudo apt install libc6-dev')",
            )
        os.replace(made, built)
    return built


def _environment(library: str) -> dict[str, str]:
    mine = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    return {**mine, "LD_PRELOAD": library} if library else mine


def _library(path: Path, allocator: Allocator) -> str | None:
    """Return what to preload: empty for nothing, None where it is not installed."""
    if not allocator.libraries:
        return ""
    for name in allocator.libraries:
        # the loader only warns about what it cannot preload
        has = subprocess.run(
            [path, "has", allocator.symbol],
            env=_environment(name), capture_output=True, check=False,
        )  # fmt: skip
        if has.returncode == 0:
            return name
    return None


def _memory(figures: dict[str, int], when: str) -> Memory:
    return Memory(*(figures[f"{when}_{name}"] for name in ("live", "anonymous", "held", "kernel")))


def _measure(path: Path, allocator: Allocator, shape: str, count: int) -> Result:
    library = _library(path, allocator)
    if library is None:
        return Result(shape, allocator.name, f"{allocator.name} is not installed")
    child = subprocess.run(
        [path, allocator.method, shape, str(count)],
        env=_environment(library), capture_output=True, text=True, check=False,
    )  # fmt: skip
    if child.returncode:
        said = child.stderr.strip().splitlines()
        # err(3) begins with the program's name
        why = said[-1].partition(": ")[2] if said else f"status {child.returncode}"
        if child.returncode != _NOT_HERE:
            why = f"failed: {why}"
        return Result(shape, allocator.name, why)
    lines = (line.split() for line in child.stdout.splitlines())
    figures = {name: int(value) for name, value in lines}
    return Result(
        shape,
        allocator.name,
        None,
        figures["allocations"],
        figures["frees"],
        figures["ns"],
        _memory(figures, "full"),
        _memory(figures, "half"),
    )


def plan(only: Sequence[str] = ()) -> list[tuple[str, Allocator]]:
    """Return shapes and allocators that go together, shape by shape.

    Args:
        only: names of allocators; none for all.
    """
    chosen = [a for a in _ALL if not only or a.name in only]
    return [(shape, a) for shape in SHAPES for a in chosen if shape in a.shapes]


def run(objects: int = OBJECTS, only: Sequence[str] = ()) -> Iterator[Result]:
    """Measure, one after the other.

    Args:
        objects: how many of the small shapes. A tensor comes and goes for each 500 of
            them; where each object is a call, it is a tenth.
        only: names of allocators; none for all.

    Raises:
        NotAvailable: there is no compiler.
    """
    path = program()
    for shape, allocator in plan(only):
        divisor = TENSORS if shape == "tensors" else SINGLE if allocator.name == "single" else 1
        yield _measure(path, allocator, shape, objects // divisor)


def _times(factor: float) -> str:
    return f"{factor:.0f}x" if factor >= 10 else f"{factor:.1f}x"


def better(result: Result, among: Sequence[Result]) -> list[str]:
    """Say who is ahead of an allocator of ours: the fastest peer, and the one that takes least."""
    peers = [
        r
        for r in among
        if r.shape == result.shape and not r.missing and not ALLOCATORS[r.allocator].ours
    ]
    if result.missing or not peers or not ALLOCATORS[result.allocator].ours:
        return []
    assert result.half is not None
    found = []
    fastest = min(peers, key=lambda peer: peer.ns_each)
    if result.ns_each / fastest.ns_each >= _AHEAD:
        found.append(f"{fastest.allocator} {_times(result.ns_each / fastest.ns_each)} faster")
    least = min(peers, key=lambda peer: peer.half.ratio if peer.half else 0)
    assert least.half is not None
    if result.half.ratio / least.half.ratio >= _AHEAD:
        found.append(f"{least.allocator} {_times(result.half.ratio / least.half.ratio)} less")
    return found
