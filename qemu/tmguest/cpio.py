# SPDX-License-Identifier: MIT
"""Writing cpio archives in the "newc" format, which is what the kernel unpacks as an initramfs."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class Entry:
    """One file, directory or symbolic link (``data`` is then its target); it belongs to root."""

    name: str
    mode: int
    data: bytes = b""
    mtime: int = 0


def directory(name: str) -> Entry:
    """A directory entry."""
    return Entry(name, stat.S_IFDIR | 0o755)


def file(name: str, data: bytes, executable: bool = False, mtime: int = 0) -> Entry:
    """A regular file."""
    return Entry(name, stat.S_IFREG | (0o755 if executable else 0o644), data, mtime)


def symlink(name: str, target: str) -> Entry:
    """A symbolic link."""
    return Entry(name, stat.S_IFLNK | 0o777, target.encode())


def tree(source: Path, name: str, skip: Callable[[Path], bool]) -> list[Entry]:
    """What is below the folder ``source`` as entries below ``name``, without the paths that ``skip`` is true for."""
    entries = [directory(name)]
    for path in sorted(source.iterdir()):
        if skip(path):
            continue
        inside = f"{name}/{path.name}"
        if path.is_symlink():
            entries.append(symlink(inside, str(path.readlink())))
        elif path.is_dir():
            entries += tree(path, inside, skip)
        elif path.is_file():
            status = path.stat()
            entries.append(file(inside, path.read_bytes(), bool(status.st_mode & 0o100), int(status.st_mtime)))
    return entries


def archive(entries: Iterable[Entry]) -> bytes:
    """The archive; folders that no entry made are added before their content. Later entries win."""
    whole: dict[str, Entry] = {}
    for entry in entries:
        for parent in reversed(PurePosixPath(entry.name).parents):
            if str(parent) != ".":
                whole.setdefault(str(parent), directory(str(parent)))
        whole[entry.name] = entry
    parts = [_member(number, entry) for number, entry in enumerate(whole.values(), start=1)]
    parts.append(_member(0, Entry("TRAILER!!!", 0)))
    return _padded(b"".join(parts), 512)


def _member(inode: int, entry: Entry) -> bytes:
    name = entry.name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (
        inode,
        entry.mode,
        0,
        0,
        links,
        entry.mtime,
        len(entry.data),
        0,
        0,
        0,
        0,
        len(name),
        0,
    )
    header = b"070701" + b"".join(b"%08x" % field for field in fields)
    return _padded(header + name, 4) + _padded(entry.data, 4)


def _padded(data: bytes, multiple: int) -> bytes:
    return data + bytes(-len(data) % multiple)
