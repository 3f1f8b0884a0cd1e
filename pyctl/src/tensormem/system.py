# SPDX-License-Identifier: MIT
"""Pools, totals, model slots, RT clients: from the module's sysfs files; KV caches: from /proc.

The files hold one value each; ``docs/ABI`` describes them. A file that the module
lacks reads as None, a file that this package does not know is left in
:attr:`Group.values`, so that package and module may differ in age.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from . import errors

__all__ = [
    "CHUNK_SIZE",
    "DEFAULT_ROOT",
    "GenerationStatus",
    "Group",
    "KVCaches",
    "KVStatus",
    "KVUser",
    "Numbers",
    "PoolLimits",
    "RTPoolStatus",
    "RTStatus",
    "Rule",
    "SlotStatus",
    "Status",
    "chunks",
    "compact",
    "descriptors",
    "kv_caches",
    "model_slots",
    "proc_path",
    "read",
    "root_path",
    "rt_client",
    "rt_pool",
    "set_chunk_pool",
    "set_rt_pool",
    "set_rt_priority",
    "write_value",
]

DEFAULT_ROOT = "/sys/class/misc/tensormem"

#: Bytes in a chunk, on every page size.
CHUNK_SIZE = 2 << 20

#: The environment variable that names another directory, for tests.
ROOT_VARIABLE = "TENSORMEM_SYSFS"

#: Likewise for /proc.
PROC_VARIABLE = "TENSORMEM_PROC"

#: What a descriptor of a KV cache is a link to.
_KV_LINK = "anon_inode:[tensormem-kv]"

_NODE = re.compile(r"node(\d+)\Z")
#: Folders that are no pools: of memory nodes and of cores.
_PLACE = re.compile(r"(node|core)\d+\Z")

_PRESENT = "load the module with 'sudo modprobe tensormem'; 'tensormem doctor' says more"


class Numbers:
    """Numbers by name, of which another module may have fewer.

    Attributes:
        values: name -> number.
    """

    values: Mapping[str, int]

    def get(self, name: str) -> int | None:
        """Return a number, or None where the module has no such file or line."""
        return self.values.get(name)


@dataclass(frozen=True)
class Group:
    """One directory of values.

    Attributes:
        name: ``chunk``, ``buddy``, ``slab``, ``clients``, ``dispatch``, ``node0`` or
            whatever else the module has.
        values: file name -> value: an int where the file holds one, else text.
    """

    name: str
    values: Mapping[str, int | str]

    def get(self, name: str) -> int | None:
        """Return a number, or None where the module has no such file."""
        value = self.values.get(name)
        return value if isinstance(value, int) else None


@dataclass(frozen=True)
class Rule:
    """One line of the dispatch table: the pool for tensors of some sizes.

    Attributes:
        smallest: bytes, from here
        largest: to here; None for any size above.
        pool: ``slab``, ``buddy`` or ``chunk``.
        huge: whole chunks are mapped as blocks where the kernel can.
    """

    smallest: int
    largest: int | None
    pool: str
    huge: bool


@dataclass(frozen=True)
class Status:
    """Everything in sysfs at one moment (the files are not read atomically)."""

    groups: Mapping[str, Group]

    def group(self, name: str) -> Group:
        """Return one group.

        Raises:
            IncompatibleModule: the module has none of this name.
        """
        if name not in self.groups:
            raise errors.IncompatibleModule(
                f"the loaded module has no '{name}' in sysfs",
                "load a tensormem module that matches this package",
            )
        return self.groups[name]

    def pools(self) -> list[Group]:
        """Return the groups that are pools, level 1 first."""
        order = ["chunk", "buddy", "slab"]
        others = ("bandwidth", "board", "clients", "dispatch", "model", "pressure")
        names = [n for n in self.groups if n not in others and not _PLACE.match(n)]
        names.sort(key=lambda n: order.index(n) if n in order else len(order))
        return [self.groups[n] for n in names]

    def nodes(self) -> dict[int, Group]:
        """Return the groups of the memory nodes, by number."""
        found = {int(m[1]): g for n, g in self.groups.items() if (m := _NODE.match(n))}
        return dict(sorted(found.items()))

    def dispatch(self) -> dict[str, list[Rule]]:
        """Return the dispatch table by kind; empty where the module shows none."""
        group = self.groups.get("dispatch")
        values = group.values if group else {}
        return {kind: _rules(str(values[kind])) for kind in sorted(values)}


def _rules(text: str) -> list[Rule]:
    rules = []
    for line in text.splitlines():
        smallest, largest, pool, *rest = line.split()
        last = None if largest == "-" else int(largest)
        rules.append(Rule(int(smallest), last, pool, "huge" in rest))
    return rules


@dataclass(frozen=True)
class PoolLimits:
    """Capacity and reserve of the chunk pool, in chunks."""

    capacity: int
    reserve: int


def root_path(root: str | os.PathLike[str] | None = None) -> Path:
    """Return the directory in use: the argument, ``TENSORMEM_SYSFS`` or the default."""
    return Path(root or os.environ.get(ROOT_VARIABLE) or DEFAULT_ROOT)


def proc_path(proc: str | os.PathLike[str] | None = None) -> Path:
    """Return the directory in use for ``/proc``: the argument, ``TENSORMEM_PROC`` or that."""
    return Path(proc or os.environ.get(PROC_VARIABLE) or "/proc")


def read(root: str | os.PathLike[str] | None = None) -> Status:
    """Read all groups.

    Args:
        root: another directory than the default, for tests.

    Raises:
        NotAvailable: the directory is missing: the module is not loaded.
    """
    top = root_path(root)
    if not top.is_dir():
        raise errors.NotAvailable(f"{top} does not exist, so the module is not loaded", _PRESENT)
    groups = {}
    for folder in sorted(p for p in top.iterdir() if p.is_dir() and not p.is_symlink()):
        values = _values(folder)
        if values and folder.name != "power":
            groups[folder.name] = Group(folder.name, values)
    return Status(groups)


def _values(folder: Path) -> dict[str, int | str]:
    """Read the files of a folder."""
    values: dict[str, int | str] = {}
    for file in sorted(p for p in folder.iterdir() if p.is_file()):
        try:
            text = file.read_text().strip()
        except (OSError, UnicodeDecodeError):
            continue  # write-only, not ours to read, or gone meanwhile
        values[file.name] = int(text) if text.isascii() and text.isdigit() else text
    return values


def set_chunk_pool(
    *,
    capacity: int | None = None,
    reserve: int | None = None,
    root: str | os.PathLike[str] | None = None,
) -> PoolLimits:
    """Set capacity and reserve of the chunk pool, in chunks; needs root.

    Args:
        capacity: most chunks the pool may hold, or None to leave it.
        reserve: chunks it keeps ready, or None to leave it.
        root: another directory than the default, for tests.

    Returns:
        Both values as the module reports them afterwards.

    Raises:
        NotAvailable: the module is not loaded.
        NotPermitted: the caller is not root.
        InvalidArgument: the module refuses the value, or the reserve would be
            larger than the capacity.
        OutOfMemory: the system cannot fill the reserve.
        TensormemError: another refusal. Where the second of two values is
            refused the first is set back.
    """
    group = read(root).group("chunk")
    old_capacity, old_reserve = group.get("capacity"), group.get("reserve")
    if old_capacity is None or old_reserve is None:
        raise errors.IncompatibleModule(
            "the loaded module has no chunk/capacity or chunk/reserve",
            "load a tensormem module that matches this package",
        )
    new_capacity = old_capacity if capacity is None else capacity
    new_reserve = old_reserve if reserve is None else reserve
    if new_reserve > new_capacity:
        raise errors.InvalidArgument(
            f"a reserve of {new_reserve} chunks does not fit into a capacity of {new_capacity}",
            "raise the capacity or lower the reserve",
        )
    folder = root_path(root) / "chunk"
    # capacity first when it grows and last when it shrinks, so that the reserve
    # fits at every moment
    steps = [("capacity", old_capacity, capacity), ("reserve", old_reserve, reserve)]
    if new_capacity < old_capacity:
        steps.reverse()
    done: list[tuple[str, int]] = []
    try:
        for name, old, new in steps:
            if new is not None:
                _write(folder / name, new)
                done.append((name, old))
    except errors.TensormemError:
        for name, old in reversed(done):
            _write(folder / name, old)
        raise
    after = read(root).group("chunk")
    return PoolLimits(after.get("capacity") or 0, after.get("reserve") or 0)


def compact(root: str | os.PathLike[str] | None = None) -> int:
    """Move runs together so that chunks of the buddy pool fall empty; needs root.

    Args:
        root: another directory than the default, for tests.

    Returns:
        The chunks that went back to the chunk pool meanwhile.

    Raises:
        NotAvailable: the module is not loaded.
        IncompatibleModule: the module cannot do it.
        NotPermitted: the caller is not root.
    """
    before = read(root).group("buddy").get("emptied")
    if before is None:
        raise errors.IncompatibleModule(
            "the loaded module has no buddy/compact",
            "load a tensormem module that matches this package",
        )
    _write(root_path(root) / "buddy" / "compact", 1)
    return (read(root).group("buddy").get("emptied") or 0) - before


def write_value(name: str, value: int, root: str | os.PathLike[str] | None = None) -> None:
    """Write a number to a file such as ``pressure/low``; needs root.

    Raises:
        NotPermitted: the caller is not root.
        InvalidArgument: the module refuses the value.
        TensormemError: another refusal.
    """
    _write(root_path(root) / name, value, {errno.EINVAL: "it is out of range; docs/ABI says which"})


_CHUNK_REMEDIES = {
    errno.EINVAL: "it is more than this machine could hold; ask for less",
    errno.EBUSY: "free tensors first; 'tensormem pool show' has what is used",
}


def _write(path: Path, value: int, remedies: Mapping[int, str] = _CHUNK_REMEDIES) -> None:
    try:
        with path.open("w") as file:
            file.write(str(value))
    except OSError as error:
        what = f"cannot set {path.parent.name}/{path.name} to {value}"
        number = error.errno or 0
        if number in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise errors.NotPermitted(f"{what}, this takes root", "run it with sudo") from None
        raise errors.from_errno(number, what, remedies.get(number)) from None


@dataclass(frozen=True)
class GenerationStatus(Numbers):
    """A generation of a model slot.

    Attributes:
        number: its number.
        state: as in :class:`tensormem.GenerationInfo`.
        values: name -> number: ``size``, ``loaded``, ``readers``, ``private_bytes``,
            ``shared_bytes``, ``error``, ``cached``, ``evictable``, ``evicted``, ``reloads``.
    """

    number: int
    state: str
    values: Mapping[str, int]


@dataclass(frozen=True)
class SlotStatus:
    """A model slot; the attributes as in :class:`tensormem.SlotInfo`."""

    name: str
    active: int
    previous: int
    staged: int
    uid: int
    gid: int
    mode: int
    generations: tuple[GenerationStatus, ...]


def model_slots(root: str | os.PathLike[str] | None = None) -> tuple[SlotStatus, ...]:
    """Return the model slots, by name; what goes while it is read is left out.

    Args:
        root: another directory than the default, for tests.

    Raises:
        NotAvailable: the module is not loaded.
    """
    top = root_path(root)
    if not top.is_dir():
        raise errors.NotAvailable(f"{top} does not exist, so the module is not loaded", _PRESENT)
    found = (_slot(folder) for folder in _folders(top / "model"))
    return tuple(slot for slot in found if slot is not None)


def _folders(top: Path) -> list[Path]:
    try:
        return sorted(p for p in top.iterdir() if p.is_dir())
    except OSError:
        return []  # no slot was ever made, or this one is gone


def _slot(folder: Path) -> SlotStatus | None:
    generations = []
    for inner in _folders(folder):
        values = _numbers(inner)
        state = _first_line(inner / "state")
        if state:
            generations.append(GenerationStatus(int(inner.name), state, values))
    generations.sort(key=lambda generation: generation.number)
    values = _numbers(folder)
    try:
        return SlotStatus(
            name=folder.name,
            active=values["active"],
            previous=values["previous"],
            staged=values["staged"],
            uid=values["uid"],
            gid=values["gid"],
            mode=int(_first_line(folder / "mode"), 8),
            generations=tuple(generations),
        )
    except (KeyError, ValueError):
        return None  # it was removed meanwhile


def _numbers(folder: Path) -> dict[str, int]:
    try:
        found = _values(folder)
    except OSError:
        return {}
    return {name: value for name, value in found.items() if isinstance(value, int)}


@dataclass(frozen=True)
class RTStatus(Numbers):
    """One RT client.

    Attributes:
        id: its number, as the kernel counts them.
        values: name -> number: ``arena`` (the number of that), ``size`` (its bytes) and what
            :class:`tensormem.RTInfo` has of the client.
        latency: how long its requests with a deadline took, in the buckets of
            :mod:`tensormem.histogram`.
        missed: how much time those that missed it had.
    """

    id: int
    values: Mapping[str, int]
    latency: tuple[int, ...]
    missed: tuple[int, ...]


@dataclass(frozen=True)
class RTPoolStatus(Numbers):
    """The RT pool.

    Attributes:
        values: name -> number: ``size``, ``ready``, ``held`` and ``used`` in bytes, ``arenas``; and
            of all clients there ever were ``allocs``, ``refused``, ``misses`` and ``waits``.
        clients: those there are, by number.
        latency: as in :class:`RTStatus`, likewise of all.
        missed: likewise.
    """

    values: Mapping[str, int]
    clients: tuple[RTStatus, ...]
    latency: tuple[int, ...]
    missed: tuple[int, ...]


def rt_pool(root: str | os.PathLike[str] | None = None) -> RTPoolStatus:
    """Return the RT pool and its clients; what goes while it is read is left out.

    Args:
        root: another directory than the default, for tests.

    Raises:
        NotAvailable: the module is not loaded.
        IncompatibleModule: it has no RT pool.
    """
    read(root).group("rt")
    top = root_path(root) / "rt"
    clients = (_rt_client(folder) for folder in _folders(top) if folder.name.isdigit())
    found = sorted((c for c in clients if c is not None), key=lambda c: c.id)
    return RTPoolStatus(
        _numbers(top), tuple(found), _counts(top / "latency"), _counts(top / "missed")
    )


def _rt_client(folder: Path) -> RTStatus | None:
    values = _numbers(folder)
    latency, missed = _counts(folder / "latency"), _counts(folder / "missed")
    return RTStatus(int(folder.name), values, latency, missed) if values else None


def _counts(path: Path) -> tuple[int, ...]:
    words = _first_line(path).split()
    return tuple(map(int, words)) if all(word.isdigit() for word in words) else ()


def set_rt_pool(
    *,
    size: int | None = None,
    ready: int | None = None,
    root: str | os.PathLike[str] | None = None,
) -> RTPoolStatus:
    """Set how much memory arenas may have, and how much is set aside beforehand; needs root.

    Args:
        size: bytes that all arenas together may have, or None to leave it.
        ready: bytes to take from the system at once and keep, or None to leave it.
        root: another directory than the default, for tests.

    Returns:
        The RT pool as it is afterwards.

    Raises:
        NotPermitted: the caller is not root.
        Busy: arenas have more.
        InvalidArgument: it is more than this machine could have, or more set aside than ``size``.
        OutOfMemory, PoolExhausted: it cannot be set aside.
        As :func:`rt_pool`.
    """
    rt_pool(root)
    folder = root_path(root) / "rt"
    for name, value in (("size", size), ("ready", ready)):
        if value is not None:
            _write(folder / name, value, _RT_REMEDIES)
    return rt_pool(root)


_RT_REMEDIES = {
    errno.EINVAL: "ask for less: 'tensormem rt size' has the bound of what is set aside",
    errno.EBUSY: "close arenas or set aside less first; 'tensormem rt list' has what is used",
    errno.ENOSPC: "raise the chunk pool's capacity with 'tensormem pool set chunk --capacity SIZE'",
}


def set_rt_priority(
    client: int, priority: int, root: str | os.PathLike[str] | None = None
) -> RTStatus:
    """Set the priority of an RT client; needs root.

    Args:
        client: its number.
        priority: 0 to 99.
        root: another directory than the default, for tests.

    Raises:
        InvalidArgument: there is no such client, or no such priority.
        NotPermitted: the caller is not root.
        As :func:`rt_pool`.
    """
    rt_client(client, root)
    path = root_path(root) / "rt" / str(client) / "priority"
    _write(path, priority, {errno.EINVAL: "it is one from 0 to 99"})
    return rt_client(client, root)


def rt_client(client: int, root: str | os.PathLike[str] | None = None) -> RTStatus:
    """Return one RT client.

    Raises:
        InvalidArgument: there is none of this number.
        As :func:`rt_pool`.
    """
    found = next((c for c in rt_pool(root).clients if c.id == client), None)
    if found is None:
        raise errors.InvalidArgument(
            f"there is no RT client {client}", "'tensormem rt list' has those there are"
        )
    return found


@dataclass(frozen=True)
class KVUser:
    """A process that has a KV cache open."""

    pid: int
    command: str


@dataclass(frozen=True)
class KVStatus(Numbers):
    """One KV cache.

    Attributes:
        id: its number, as the kernel counts them.
        users: who has it open.
        values: name -> number: those of :class:`tensormem.KVInfo`, and ``client``, whose
            bill it is on.
    """

    id: int
    users: tuple[KVUser, ...]
    values: Mapping[str, int]


@dataclass(frozen=True)
class KVCaches:
    """The KV caches of all processes that this user may look at.

    Attributes:
        caches: by number.
        hidden: processes that only root may look at.
    """

    caches: tuple[KVStatus, ...]
    hidden: int


def kv_caches(proc: str | os.PathLike[str] | None = None) -> KVCaches:
    """Find the KV caches of running processes by their descriptors.

    Args:
        proc: another directory than /proc, for tests.
    """
    users, values, hidden = descriptors(_KV_LINK, "tensormem-kv", proc)
    caches = tuple(KVStatus(n, tuple(users[n]), values[n]) for n in sorted(users))
    return KVCaches(caches, hidden)


def descriptors(
    link: str, key: str, proc: str | os.PathLike[str] | None = None
) -> tuple[dict[int, list[KVUser]], dict[int, dict[str, int]], int]:
    """Find what processes have open, by their descriptors.

    Args:
        link: what such a descriptor is a link to.
        key: the line of its fdinfo that has its number.
        proc: another directory than /proc, for tests.

    Returns:
        By number who has it open and what its fdinfo says; and the processes that only root may
        look at.
    """
    top = proc_path(proc)
    users: dict[int, list[KVUser]] = {}
    values: dict[int, dict[str, int]] = {}
    hidden = 0
    for process in sorted(
        (p for p in top.iterdir() if p.name.isdigit()), key=lambda p: int(p.name)
    ):
        try:
            found = _descriptors(process, link, key)
        except PermissionError:
            hidden += 1
            continue
        except OSError:
            continue  # it has ended
        for number, lines in found.items():
            command = _first_line(process / "comm") or "?"
            users.setdefault(number, []).append(KVUser(int(process.name), command))
            values[number] = lines
    return users, values, hidden


def _descriptors(process: Path, link: str, key: str) -> dict[int, dict[str, int]]:
    """Return number -> lines of what a process has open of that kind, each once."""
    found: dict[int, dict[str, int]] = {}
    for path in (process / "fd").iterdir():
        try:
            if os.readlink(path) != link:
                continue
            text = (process / "fdinfo" / path.name).read_text()
        except FileNotFoundError:
            continue  # closed meanwhile
        lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        numbers = {k: int(v) for k, v in lines.items() if v.strip().isdigit()}
        number = numbers.pop(key, None)
        if number is not None:
            common = ("pos", "flags", "mnt_id", "ino")
            found[number] = {k: v for k, v in numbers.items() if k not in common}
    return found


def _first_line(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def chunks(size: int) -> int:
    """Return the chunks that hold a size in bytes: rounded up, 0 for 0."""
    return -(-size // CHUNK_SIZE)
