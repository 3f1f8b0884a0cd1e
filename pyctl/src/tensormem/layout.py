# SPDX-License-Identifier: MIT
"""What memory looks like: chunks and page tables, from the module's debugfs files.

The files are described in ``docs/ABI/debugfs-tensormem``; root alone may read them. What the bits
of a descriptor mean is the Arm architecture's (VMSAv8-64, stage 1) and, for those left to
software, Linux's.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from . import abi, errors, system

__all__ = [
    "DEFAULT_ROOT",
    "PURPOSES",
    "STATES",
    "Attributes",
    "Chunk",
    "Entry",
    "Layout",
    "Place",
    "Run",
    "Stretch",
    "chunks",
    "decode",
    "find",
    "frames",
    "lay_out",
    "page_flags",
    "parse_chunks",
    "parse_walk",
    "walk",
]

_T = TypeVar("_T")

DEFAULT_ROOT = "/sys/kernel/debug/tensormem"

#: The environment variable that names another directory, for tests.
ROOT_VARIABLE = "TENSORMEM_DEBUGFS"

#: What a chunk can be: in nobody's use (the first four), whole, or in the buddy pool.
STATES = ("zeroed", "dirty", "split", "zeroing", "chunk", "buddy")

#: Who can have a whole chunk: tensors by their kind, then the other objects.
PURPOSES = ("weights", "kv", "activations", "protocol", "cache", "model", "rt", "module")

#: Entries that the contiguous bit makes one in the TLB: by log2 of the page size, and level.
_CONTIGUOUS = {12: {3: 16, 2: 16}, 14: {3: 128, 2: 32}, 16: {3: 32, 2: 32}}

#: Linux's use of MAIR_EL1, by AttrIndx.
_MEMORY = ("normal", "normal, tagged", "normal, not cached", "device nGnRnE", "device nGnRE")

_SHAREABLE = ("not shareable", "reserved", "outer shareable", "inner shareable")

#: Bits of /proc/kpageflags that say something about a page of ours, or of its neighbours.
_PAGE_FLAGS = {
    0: "locked", 2: "referenced", 3: "uptodate", 4: "dirty", 5: "lru", 7: "slab", 10: "buddy",
    11: "mmap", 12: "anon", 14: "swapbacked", 15: "compound_head", 16: "compound_tail", 17: "huge",
    18: "unevictable", 20: "nopage", 21: "ksm", 22: "thp", 24: "zero_page", 26: "pgtable",
    32: "reserved",
}  # fmt: skip

_DEVICE_LINK = "/dev/tensormem"
_PIDFD_GETFD = 438

_AS_ROOT = "run it as root; frames and page tables are nobody else's to see"


# -- chunks ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """Contiguous used pages in a chunk of the buddy pool.

    Attributes:
        index: its first page within the chunk.
        pages: how many, a power of two.
        movable: compaction may move it.
        arriving: compaction is just moving it here.
    """

    index: int
    pages: int
    movable: bool = True
    arriving: bool = False


@dataclass(frozen=True)
class Chunk:
    """One chunk as it was at one moment.

    Attributes:
        node: its memory node.
        number: its number there.
        frame: page frame number of its first page.
        state: one of :data:`STATES`.
        purpose: one of :data:`PURPOSES`, of a chunk whose state is ``chunk``; else None.
        charged: it is on the bill of a memory cgroup.
        runs: what is used of it, in order, when its state is ``buddy``.
    """

    node: int
    number: int
    frame: int
    state: str
    purpose: str | None
    charged: bool
    runs: tuple[Run, ...] = ()

    def used(self, page_size: int) -> int:
        """Return how many of its pages are in use."""
        if self.state == "chunk":
            return system.CHUNK_SIZE // page_size
        return sum(run.pages for run in self.runs)


_RUN = re.compile(r"(\d+)\+(\d+)(u?)(a?)", re.ASCII)


def _run(text: str) -> Run:
    match = _RUN.fullmatch(text)
    if match is None:
        raise ValueError(text)
    return Run(int(match[1]), int(match[2]), not match[3], bool(match[4]))


def _chunk(line: str) -> Chunk:
    node, number, frame, state, purpose, charged, *runs = line.split()
    if state not in STATES or (state == "chunk") == (purpose == "-"):
        raise ValueError(line)
    return Chunk(
        int(node), int(number), int(frame, 16), state, None if purpose == "-" else purpose,
        bool(int(charged)), tuple(_run(run) for run in runs),
    )  # fmt: skip


def _parse(name: str, text: str, parse: Callable[[str], _T]) -> list[_T]:
    found = []
    for line in text.splitlines():
        try:
            found.append(parse(line))
        except ValueError:
            raise errors.IncompatibleModule(
                f"the loaded module's {name} has a line that this package does not know: {line!r}",
                "load a tensormem module that matches this package",
            ) from None
    return found


def parse_chunks(text: str) -> list[Chunk]:
    """Return what the lines of the file ``chunks`` say.

    Raises:
        IncompatibleModule: a line is not one of this ABI.
    """
    return _parse("chunks", text, _chunk)


def _path(name: str, root: str | os.PathLike[str] | None) -> Path:
    return Path(root or os.environ.get(ROOT_VARIABLE) or DEFAULT_ROOT) / name


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Say what it means that a file of debugfs cannot be opened."""
    try:
        yield
    except FileNotFoundError:
        raise errors.NotAvailable(
            f"{path} does not exist",
            "load the module with 'sudo modprobe tensormem', and as root mount debugfs:"
            " 'mount -t debugfs none /sys/kernel/debug'",
        ) from None
    except PermissionError as error:
        raise errors.NotPermitted(f"{path} is for root", _AS_ROOT, error.errno) from None


def chunks(root: str | os.PathLike[str] | None = None) -> list[Chunk]:
    """Look at every chunk that the module holds, one after the other: the pools go on meanwhile.

    Args:
        root: another directory than the default, for tests.

    Raises:
        NotAvailable: debugfs is not mounted, or the module is not loaded.
        NotPermitted: the caller is not root.
        IncompatibleModule: the module's file is of another ABI.
    """
    path = _path("chunks", root)
    with _explained(path):
        text = path.read_text()
    return parse_chunks(text)


# -- page tables -----------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One entry of a page table.

    Attributes:
        address: the first address it is for.
        name: what Linux calls its level: ``pgd``, ``p4d``, ``pud``, ``pmd`` or ``pte``.
        shift: log2 of the bytes it is for.
        bits: how many bits of the address, from ``shift`` on, are its index.
        index: its place in its table.
        descriptor: the entry itself.
        what: ``table`` (it leads to another table), ``leaf`` (a page or a block), ``none``
            (empty) or ``other`` (not for the CPU: swapped out, or on the move).
        frame: page frame number of the table, page or block; None where there is none.
        node: memory node of a page or block; None for others, and for what is no memory.
    """

    address: int
    name: str
    shift: int
    bits: int
    index: int
    descriptor: int
    what: str
    frame: int | None = None
    node: int | None = None

    @property
    def size(self) -> int:
        """Bytes that it is for."""
        return 1 << self.shift

    @property
    def high_bit(self) -> int:
        """The highest bit of the address that is of its index."""
        return self.shift + self.bits - 1

    def level(self, page_shift: int) -> int:
        """Return the architecture's number of its level: 3 has the pages."""
        return 3 - (self.shift - page_shift) // (page_shift - 3)

    def folded(self, page_shift: int) -> int:
        """Return how many entries, with this one, share an entry of the TLB; 1 without the bit."""
        if self.what != "leaf" or not decode(self.descriptor).contiguous:
            return 1
        return _CONTIGUOUS[page_shift].get(self.level(page_shift), 1)


@dataclass(frozen=True)
class Attributes:
    """What the bits of a page's or block's descriptor say, beside the address.

    Attributes:
        valid: the CPU uses it; else an access faults (PROT_NONE).
        user: EL0 may access it.
        writable: software lets it be written; the CPU may still have to ask first.
        read_only: the CPU faults on a write, or marks the entry when ``dbm`` is set.
        dirty: it was written to, as Linux sees it.
        accessed: the access flag.
        memory: the memory type of AttrIndx, in Linux's table.
        shareable: ``inner shareable`` and so on; in tables for addresses of 52 bits these are
            address bits, and this says nothing.
        not_global: only for one address space (ASID).
        user_no_execute: UXN; likewise ``kernel_no_execute``, PXN.
        kernel_no_execute: see above.
        contiguous: the entries around it may share an entry of the TLB.
        dbm: the CPU may make it writable by itself.
        special: a mapping without a struct page behind it, for Linux.
    """

    valid: bool
    user: bool
    writable: bool
    read_only: bool
    dirty: bool
    accessed: bool
    memory: str
    shareable: str
    not_global: bool
    user_no_execute: bool
    kernel_no_execute: bool
    contiguous: bool
    dbm: bool
    special: bool

    def names(self) -> tuple[str, ...]:
        """Return the bits that are set by their names; those of Linux in small letters."""
        named = {
            "VALID": self.valid, "AF": self.accessed, "nG": self.not_global, "USER": self.user,
            "RDONLY": self.read_only, "DBM": self.dbm, "CONT": self.contiguous,
            "UXN": self.user_no_execute, "PXN": self.kernel_no_execute, "dirty": self.dirty,
            "special": self.special,
        }  # fmt: skip
        return tuple(name for name, isset in named.items() if isset)


def decode(descriptor: int) -> Attributes:
    """Return what a page's or a block's descriptor says."""

    def bit(number: int) -> bool:
        return bool(descriptor >> number & 1)

    index = descriptor >> 2 & 7
    return Attributes(
        valid=bit(0),
        user=bit(6),
        writable=bit(51) or not bit(7),
        read_only=bit(7),
        dirty=bit(55) or (bit(51) and not bit(7)),
        accessed=bit(10),
        memory=_MEMORY[index] if index < len(_MEMORY) else f"AttrIndx {index}",
        shareable=_SHAREABLE[descriptor >> 8 & 3],
        not_global=bit(11),
        user_no_execute=bit(54),
        kernel_no_execute=bit(53),
        contiguous=bit(52),
        dbm=bit(51),
        special=bit(56),
    )


def _entry(line: str) -> Entry:
    address, name, shift, bits, index, descriptor, what, *rest = line.split()
    expected = {"table": 1, "leaf": 2, "none": 0, "other": 0}
    if expected.get(what) != len(rest):
        raise ValueError(line)
    frame = int(rest[0], 16) if rest else None
    node = int(rest[1]) if what == "leaf" else None
    return Entry(
        int(address, 16), name, int(shift), int(bits), int(index), int(descriptor, 16), what,
        frame, None if node == -1 else node,
    )  # fmt: skip


def parse_walk(text: str) -> list[Entry]:
    """Return what the lines of the file ``walk`` say.

    Raises:
        IncompatibleModule: a line is not one of this ABI.
    """
    return _parse("walk", text, _entry)


def _refused(error: OSError, address: int, pid: int) -> errors.TensormemError:
    who = f"process {pid}" if pid else "this process"
    causes: dict[int, tuple[type[errors.TensormemError], str, str]] = {
        errno.EFAULT: (
            errors.InvalidArgument, f"nothing is mapped at {address:#x} of {who}",
            f"see /proc/{pid or 'self'}/maps for what is",
        ),
        errno.ERANGE: (
            errors.InvalidArgument, f"{address:#x} is not an address of user space",
            "the kernel's own page tables are not shown",
        ),
        errno.ESRCH: (
            errors.InvalidArgument, f"there is no process {pid}, or it has no memory of its own",
            "see ps(1); kernel threads and zombies have none",
        ),
        errno.EPERM: (errors.NotPermitted, f"you may not look into {who}", _AS_ROOT),
        errno.EOPNOTSUPP: (
            errors.InvalidArgument, f"{address:#x} of {who} is hugetlb memory",
            "its tables are shared between processes and are not walked",
        ),
    }  # fmt: skip
    if error.errno not in causes:
        raise error
    kind, cause, remedy = causes[error.errno]
    return kind(cause, remedy, error.errno)


def walk(
    address: int, length: int = 1, pid: int = 0, root: str | os.PathLike[str] | None = None
) -> list[Entry]:
    """Walk the page tables of a process for a range of addresses.

    Args:
        address: the first one.
        length: how many bytes; what is not mapped in between has no entry.
        pid: of which process; 0 is the caller's.
        root: another directory than the default, for tests.

    Returns:
        Every entry on the way once, in the order of the walk: a table's before those in it.

    Raises:
        InvalidArgument: nothing is mapped at ``address``, it is no address of user space, or there
            is no such process.
        NotAvailable: debugfs is not mounted, or the module is not loaded.
        NotPermitted: the caller is not root.
    """
    if not (0 <= address < 1 << 64 and 0 < length < 1 << 64 and 0 <= pid < 1 << 31):
        raise errors.InvalidArgument(
            f"no range to walk: {length} bytes at {address:#x} of process {pid}",
            "give an address of 64 bits, a length of 1 or more and a process's number",
        )
    path = _path("walk", root)
    with _explained(path):
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.write(fd, f"{pid} {address:#x} {length}".encode())
        parts = []
        while part := os.read(fd, 1 << 16):
            parts.append(part)
    except OSError as error:
        raise _refused(error, address, pid) from None
    finally:
        os.close(fd)
    return parse_walk(b"".join(parts).decode())


def frames(
    address: int, pages: int, pid: int = 0, proc: str | os.PathLike[str] | None = None
) -> list[int | None]:
    """Return the frames of some pages as /proc/PID/pagemap has them; None for what is not there.

    Raises:
        NotPermitted: the caller may not see them.
    """
    path = system.proc_path(proc) / (str(pid) if pid else "self") / "pagemap"
    page = os.sysconf("SC_PAGE_SIZE")
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(address // page * 8)
            data = file.read(pages * 8)
    except PermissionError as error:
        raise errors.NotPermitted(f"{path} is not for you", _AS_ROOT, error.errno) from None
    values = struct.unpack(f"={len(data) // 8}Q", data)
    return [v & (1 << 55) - 1 if v >> 63 else None for v in values]


def page_flags(frame: int, proc: str | os.PathLike[str] | None = None) -> tuple[str, ...]:
    """Return what /proc/kpageflags says about a frame; nothing where there is no such file."""
    try:
        with (system.proc_path(proc) / "kpageflags").open("rb", buffering=0) as file:
            file.seek(frame * 8)
            data = file.read(8)
    except OSError:
        return ()
    flags = int.from_bytes(data, "little")
    return tuple(name for number, name in _PAGE_FLAGS.items() if flags >> number & 1)


# -- tensors ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Stretch:
    """Addresses mapped alike: one size, the same flags, one node, frame after frame.

    Attributes:
        address: the first one.
        length: bytes.
        entry_size: bytes that an entry of the tables is for.
        folded: entries that share an entry of the TLB.
        frame: of its first page; None when nothing is mapped here.
        node: its memory node.
        flags: names of the bits set.
        tlb_entries: what all of it takes in a TLB.
    """

    address: int
    length: int
    entry_size: int
    folded: int
    frame: int | None
    node: int | None
    flags: tuple[str, ...]
    tlb_entries: int

    @property
    def reach(self) -> int:
        """Bytes that one entry of the TLB covers."""
        return self.entry_size * self.folded


@dataclass(frozen=True)
class Layout:
    """How a range of addresses is mapped.

    Attributes:
        address: the first one.
        size: bytes.
        page_size: the kernel's.
        stretches: what is mapped alike, in order; nothing is left out.
        tables: tables on the way, of all levels.
        tlb_entries: what all of it takes in a TLB.
    """

    address: int
    size: int
    page_size: int
    stretches: tuple[Stretch, ...]
    tables: int
    tlb_entries: int

    @property
    def mapped(self) -> int:
        """Bytes that have memory behind them."""
        return sum(s.length for s in self.stretches if s.frame is not None)

    def by_reach(self) -> dict[int, int]:
        """Return the bytes mapped, by what an entry of the TLB covers there."""
        found: dict[int, int] = {}
        for s in self.stretches:
            if s.frame is not None:
                found[s.reach] = found.get(s.reach, 0) + s.length
        return dict(sorted(found.items()))


class _Stretches:
    """Stretches in the making: what goes on as before makes the last one longer."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.done: list[Stretch] = []
        self._seen: set[tuple[int, int]] = set()

    def _goes_on(self, last: Stretch, new: Stretch) -> bool:
        if (last.entry_size, last.folded, last.node, last.flags) != (
            new.entry_size, new.folded, new.node, new.flags,
        ):  # fmt: skip
            return False
        if last.frame is None or new.frame is None:
            return last.frame == new.frame
        return new.frame == last.frame + last.length // self.page_size

    def add(self, new: Stretch) -> None:
        last = self.done[-1] if self.done else None
        if last is not None and self._goes_on(last, new):
            length, tlb = last.length + new.length, last.tlb_entries + new.tlb_entries
            self.done[-1] = replace(last, length=length, tlb_entries=tlb)
        else:
            self.done.append(new)

    def hole(self, begin: int, end: int) -> None:
        if begin < end:
            self.add(Stretch(begin, end - begin, self.page_size, 1, None, None, (), 0))

    def leaf(self, begin: int, end: int, entry: Entry) -> None:
        """Add the part of what an entry maps that is wanted."""
        assert entry.frame is not None
        folded = entry.folded(self.page_size.bit_length() - 1)
        reach = entry.size * folded
        flags = decode(entry.descriptor).names()
        # what is not valid is not in a TLB
        key = (reach, entry.address // reach)
        tlb = int("VALID" in flags and key not in self._seen)
        self._seen.add(key)
        frame = entry.frame + (begin - entry.address) // self.page_size
        self.add(
            Stretch(begin, end - begin, entry.size, folded, frame, entry.node, flags, tlb)
        )


def lay_out(entries: Sequence[Entry], address: int, size: int, page_size: int) -> Layout:
    """Return how a range is mapped, of the walk through it."""
    first, end = address // page_size * page_size, -(-(address + size) // page_size) * page_size
    stretches = _Stretches(page_size)
    at = first
    for entry in entries:
        begin, until = max(entry.address, at), min(entry.address + entry.size, end)
        if entry.what == "leaf" and begin < until:
            stretches.hole(at, begin)
            stretches.leaf(begin, until, entry)
            at = until
    stretches.hole(at, end)
    tables = sum(entry.what == "table" for entry in entries) + 1
    done = tuple(stretches.done)
    return Layout(first, end - first, page_size, done, tables, sum(s.tlb_entries for s in done))


# -- names of tensors ------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a process has something.

    Attributes:
        pid: the process; 0 is the caller's.
        address: the first address.
        size: bytes.
    """

    pid: int
    address: int
    size: int


def _take_descriptor(pid: int, number: int) -> int:
    """Return a descriptor of another process's open file."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOENT):
            raise
        raise errors.InvalidArgument(
            f"{pid} is a thread of a process", "name the process: Tgid in /proc/TID/status"
        ) from None
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        fd = int(libc.syscall(_PIDFD_GETFD, pidfd, number, 0))
        if fd < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return fd
    finally:
        os.close(pidfd)


def _clients(pid: int, proc: Path) -> list[int]:
    """Return a descriptor for each client that a process has open."""
    found: dict[str, int] = {}
    for link in (proc / str(pid) / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(link) == _DEVICE_LINK:
                text = (proc / str(pid) / "fdinfo" / link.name).read_text()
                match = re.search(r"^tensormem-client:\s*(\d+)$", text, re.MULTILINE)
                if match:
                    found.setdefault(match[1], int(link.name))
    return list(found.values())


def _mappings(pid: int, proc: Path, offset: int, length: int) -> list[int]:
    """Return where a process has mapped that part of a client's window."""
    areas: list[tuple[int, int, int]] = []
    for line in (proc / str(pid) / "maps").read_text().splitlines():
        area, _, begins, _, _, *name = line.split(maxsplit=5)
        if name != [_DEVICE_LINK]:
            continue
        first, end = (int(part, 16) for part in area.split("-"))
        begin = int(begins, 16)
        # mprotect() and madvise() of a part leave several lines
        if areas and areas[-1][1] == first and first - begin == areas[-1][0] - areas[-1][2]:
            first, _, begin = areas.pop()
        areas.append((first, end, begin))
    return [
        first + offset - begin
        for first, end, begin in areas
        if begin <= offset and offset + length <= begin + end - first
    ]


def find(pid: int, handle: int, proc: str | os.PathLike[str] | None = None) -> Place:
    """Find a tensor of another process.

    Args:
        pid: the process.
        handle: the tensor's name in its client.
        proc: another directory than /proc, for tests.

    Raises:
        InvalidArgument: there is no such process; it has no client, or several, no tensor of that
            name, or has not mapped it, or twice.
        NotPermitted: the caller may not look into it.
    """
    top = system.proc_path(proc)
    if handle >= 1 << 32:
        raise errors.InvalidArgument(f"{handle} is no handle", "it is what Tensor.handle says")
    try:
        clients = _clients(pid, top)
        if len(clients) != 1:
            many = f"{len(clients)} clients" if clients else "no client"
            raise errors.InvalidArgument(
                f"process {pid} has {many} of the module open",
                "a tensor has a name only in a process with one; give an address and --pid",
            )
        fd = _take_descriptor(pid, clients[0])
        try:
            query = abi.Query(handle=handle)
            fcntl.ioctl(fd, abi.IOC_QUERY, query)
        finally:
            os.close(fd)
        offset, size = int(query.offset), int(query.size)
        found = _mappings(pid, top, offset, size)
    except PermissionError as error:
        raise errors.NotPermitted(
            f"you may not look into process {pid}", _AS_ROOT, error.errno
        ) from None
    except OSError as error:
        if error.errno == errno.ENOENT and (top / str(pid)).exists():
            raise errors.InvalidArgument(
                f"process {pid} has no tensor {handle}", "the handle is what Tensor.handle says"
            ) from None
        if error.errno in (errno.EBADF, errno.ENOTTY):
            raise errors.InvalidArgument(
                f"process {pid} has just closed its client", "it may have another by now"
            ) from None
        if error.errno not in (errno.ENOENT, errno.ESRCH):
            raise
        raise errors.InvalidArgument(f"there is no process {pid}", "see ps(1)") from None
    if len(found) != 1:
        times = f"{len(found)} times" if found else "nowhere"
        raise errors.InvalidArgument(
            f"process {pid} has mapped tensor {handle} {times}", "give an address and --pid"
        )
    return Place(pid, found[0], size)
