# SPDX-License-Identifier: MIT
"""The settings of the system that tensormem's users trip over: found, advised, why, and the change.

Changing them is a transaction. What was there before is in a journal on disk before anything is
touched; what fails is taken back at once, and :func:`revert` puts everything back, also after a
crash in the middle. A value of a running kernel comes with a file that sets it at the next boot.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import errors

__all__ = ["JOURNAL", "Advice", "Change", "advise", "apply", "revert"]

#: The environment variable that names another root directory, for tests.
ROOT_VARIABLE = "TENSORMEM_ROOT"

JOURNAL = "/var/lib/tensormem/tune.json"

_THP = "/sys/kernel/mm/transparent_hugepage/enabled"
_HUGEPAGES = "/proc/sys/vm/nr_hugepages"
_SWAPPINESS = "/proc/sys/vm/swappiness"
_TMPFILES = "/etc/tmpfiles.d/tensormem.conf"
_SYSCTL = "/etc/sysctl.d/60-tensormem.conf"
_CMDLINES = ("/boot/firmware/cmdline.txt", "/boot/cmdline.txt")
_UNITS = ("/etc/systemd/system", "/run/systemd/system", "/usr/local/lib/systemd/system",
          "/usr/lib/systemd/system", "/lib/systemd/system")  # fmt: skip
_HEAD = "# made by 'tensormem tune --apply'; 'tensormem tune --revert' takes it back\n"

Run = Callable[[Sequence[str]], None]


@dataclass(frozen=True)
class Change:
    """One file, and what it is to hold.

    Attributes:
        path: from the root directory.
        content: what to write.
        live: a value of the running kernel: written in place, and read back by its own rules.
    """

    path: str
    content: str
    live: bool = False

    def show(self) -> str:
        """Write it as somebody would do it by hand."""
        if self.live:
            return f"echo {self.content} > {self.path}"
        lines = [line for line in self.content.splitlines() if not line.startswith("#")]
        return f"{self.path}: {' | '.join(lines)}"


@dataclass(frozen=True)
class Advice:
    """One setting.

    Attributes:
        name: a short word.
        found: its value now.
        advised: what it should be; the same where there is nothing to do.
        why: in one sentence.
        changes: what makes it so; empty where it is so, or where only a human can.
        by_hand: what a human has to do.
        reboot: it works after the next boot.
    """

    name: str
    found: str
    advised: str
    why: str
    changes: tuple[Change, ...] = ()
    by_hand: str = ""
    reboot: bool = False


def _root(root: str | os.PathLike[str] | None) -> Path:
    return Path(root or os.environ.get(ROOT_VARIABLE) or "/")


class _Files:
    """The files under a root directory."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def at(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def text(self, path: str) -> str | None:
        try:
            return self.at(path).read_text(errors="surrogateescape")
        except OSError:
            return None

    def live(self, path: str) -> str | None:
        """Return a kernel's value; of several to choose from the one in brackets."""
        text = self.text(path)
        if text is None:
            return None
        chosen = re.search(r"\[([^\]]+)\]", text)
        return chosen[1] if chosen else text.strip()


def _merged(files: _Files, path: str, lines: dict[str, str]) -> str:
    """Return one of our own files with lines added or replaced, each known by how it begins."""
    kept = [
        line
        for line in (files.text(path) or "").splitlines()
        if line and not line.startswith("#") and not any(line.startswith(k) for k in lines)
    ]
    return _HEAD + "".join(f"{line}\n" for line in [*kept, *lines.values()])


def _thp(files: _Files) -> Advice:
    why = (
        "with 'always' the kernel compacts memory for every program, and competes with tensormem"
        " for 2 MiB pieces; with 'madvise' those that ask still get them, numpy among them"
    )
    found = files.live(_THP)
    if found is None:
        return Advice("thp", "absent", "absent", "this kernel has no transparent huge pages")
    if found == "madvise":
        return Advice("thp", found, found, why)
    # the line is made where it is written: other advice may write the same file
    return Advice("thp", found, "madvise", why, (Change(_THP, "madvise", live=True),))


def _hugepages(files: _Files) -> Advice:
    found = files.live(_HUGEPAGES)
    if found is None:
        return Advice("hugepages", "absent", "absent", "this kernel has no hugetlb pages")
    info = dict(re.findall(r"^(HugePages_\w+):\s+(\d+)", files.text("/proc/meminfo") or "", re.M))
    used = int(info.get("HugePages_Total", 0)) - int(info.get("HugePages_Free", 0))
    used += int(info.get("HugePages_Rsvd", 0))
    if found == "0" or used > 0:
        reason = f"{used} of them are in use by somebody" if used > 0 else "none are set aside"
        return Advice("hugepages", found, found, reason)
    why = "nobody uses these pages, and while they are set aside tensormem cannot have their memory"
    return Advice("hugepages", found, "0", why, (Change(_HUGEPAGES, "0", live=True),))


def _swappiness(files: _Files) -> Advice:
    found = files.live(_SWAPPINESS)
    if found is None:
        return Advice("swappiness", "absent", "absent", "this kernel does not swap")
    areas = [line.split()[0] for line in (files.text("/proc/swaps") or "").splitlines()[1:] if line]
    if not areas:
        return Advice("swappiness", found, found, "there is no swap, so it says nothing")
    if all("/zram" in area for area in areas):
        wanted, why = 100, (
            "swap is compressed memory only: to use it costs less than to read a model kept in the"
            " page cache from the card again"
        )  # fmt: skip
        fine = int(found) >= wanted
    else:
        wanted, why = 10, (
            "swap is on a disk or card: what tensormem holds never goes there, and swapping the"
            " rest early keeps the card busy while models are read from it"
        )  # fmt: skip
        fine = int(found) <= wanted
    if fine:
        return Advice("swappiness", found, found, why)
    return Advice("swappiness", found, str(wanted), why,
                  (Change(_SWAPPINESS, str(wanted), live=True),))  # fmt: skip


def _boot_flag(files: _Files, name: str, flag: str, there: bool, why: str) -> Advice:
    if there:
        return Advice(name, "on", "on", why)
    running = (files.text("/proc/cmdline") or "").split()
    if flag in running:
        return Advice(name, "off", "off", f"{flag} is set and this kernel has it not built in")
    path = next((p for p in _CMDLINES if files.text(p) is not None), None)
    if path is None:
        by_hand = (
            f"add {flag} to GRUB_CMDLINE_LINUX in /etc/default/grub, run 'sudo update-grub', reboot"
        )
        return Advice(name, "off", "on", why, by_hand=by_hand, reboot=True)
    text = files.text(path) or ""
    if flag in text.split():
        return Advice(name, "off until reboot", "on", why, by_hand="reboot", reboot=True)
    # written with the others: two flags are two words of one line
    return Advice(name, "off", "on", why, (Change(path, flag),), reboot=True)


def _cgroup(files: _Files) -> Advice:
    there = "memory" in (files.text("/sys/fs/cgroup/cgroup.controllers") or "").split()
    why = "without the memory controller no service can be bounded, and nothing charged to it"
    return _boot_flag(files, "cgroup", "cgroup_enable=memory", there, why)


def _psi(files: _Files) -> Advice:
    there = files.text("/proc/pressure/memory") is not None
    why = "pressure stall information says that memory is short before anything stalls for long"
    return _boot_flag(files, "psi", "psi=1", there, why)


def _jemalloc(files: _Files, unit: str) -> Advice:
    if not re.fullmatch(r"[A-Za-z0-9:_.@\\-]+\.service", unit):
        raise errors.InvalidArgument(f"{unit!r} names no service", "write it like NAME.service")
    main = unit if "@" not in unit else re.sub(r"@.*\.service", "@.service", unit)
    names = [f"{folder}/{each}" for folder in _UNITS for each in (unit, main)]
    if not any(files.at(name).is_file() for name in names):
        raise errors.InvalidArgument(
            f"systemd has no unit {unit}", "'systemctl list-unit-files' has those there are"
        )
    why = (
        "malloc of glibc keeps what threads freed in arenas of their own; jemalloc gives it back,"
        " which tensormem's pools can then have"
    )
    path = f"/etc/systemd/system/{unit}.d/60-tensormem-jemalloc.conf"
    found = sorted(files.at("/usr/lib").glob("*/libjemalloc.so.2"))
    if not found:
        return Advice("jemalloc", "not installed", f"preloaded in {unit}", why,
                      by_hand="'sudo apt install libjemalloc2', then this again")  # fmt: skip
    library = "/" + str(found[0].relative_to(files.root))
    for folder in _UNITS:
        units = [files.at(f"{folder}/{unit}"), *files.at(f"{folder}/{unit}.d").glob("*.conf")]
        for each in units:
            other = each != files.at(path) and each.is_file()
            if other and "LD_PRELOAD=" in each.read_text(errors="replace"):
                where = "/" + str(each.relative_to(files.root))
                return Advice("jemalloc", f"other preload in {where}", f"preloaded in {unit}", why,
                              by_hand=f"add {library} to LD_PRELOAD in {where}")  # fmt: skip
    content = f"{_HEAD}[Service]\nEnvironment=LD_PRELOAD={library}\n"
    if files.text(path) == content:
        return Advice("jemalloc", f"preloaded in {unit}", f"preloaded in {unit}", why)
    return Advice("jemalloc", "not preloaded", f"preloaded in {unit}", why,
                  (Change(path, content),),
                  by_hand=f"'sudo systemctl restart {unit}' when it suits")  # fmt: skip


def _complete(files: _Files, advice: list[Advice]) -> list[Advice]:
    """Put together what goes into one file, and add what sets live values at the next boot."""
    flags: list[str] = []
    settings: dict[str, str] = {}
    done = []
    for each in advice:
        changes = list(each.changes)
        for number, change in enumerate(changes):
            if change.path in _CMDLINES:
                flags.append(change.content)
                line, *rest = (files.text(change.path) or "").split("\n")
                added = " ".join([line.rstrip(), *flags]).strip()
                changes[number] = Change(change.path, "\n".join([added, *rest]))
            elif change.path == _THP:
                line = f"w {_THP} - - - - {change.content}"
                text = _merged(files, _TMPFILES, {f"w {_THP} ": line})
                changes.append(Change(_TMPFILES, text))
            elif change.live:
                key = change.path.removeprefix("/proc/sys/").replace("/", ".")
                settings[f"{key} "] = f"{key} = {change.content}"
                changes.append(Change(_SYSCTL, _merged(files, _SYSCTL, settings)))
        done.append(Advice(each.name, each.found, each.advised, each.why, tuple(changes),
                           each.by_hand, each.reboot))  # fmt: skip
    return done


def advise(
    unit: str | None = None, *, root: str | os.PathLike[str] | None = None
) -> list[Advice]:  # fmt: skip
    """Look at all settings; change nothing.

    Args:
        unit: a systemd service that is to have jemalloc, or None.
        root: another root directory, for tests.

    Raises:
        InvalidArgument: there is no such service.
    """
    files = _Files(_root(root))
    found = [_thp(files), _hugepages(files), _swappiness(files), _cgroup(files), _psi(files)]
    if unit is not None:
        found.append(_jemalloc(files, unit))
    return _complete(files, found)


# -- changing --------------------------------------------------------------------------


def _beside(path: Path) -> Path:
    """Return where a file is written before it takes its place; a crash may leave it there."""
    return path.with_name(f".{path.name}.tensormem")


def _replace(path: Path, content: bytes, mode: int, owner: tuple[int, int] | None) -> None:
    """Write a file beside it and then over it, so that a crash leaves the old or the new one."""
    beside = _beside(path)
    try:
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(fd, "wb") as file:
            file.write(content)
            file.flush()
            if owner is not None:
                os.fchown(fd, *owner)
            # a boot partition has FAT, which has no modes
            with contextlib.suppress(PermissionError):
                os.fchmod(fd, mode)
            os.fsync(fd)
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@dataclass(frozen=True)
class _Entry:
    """What was at a path before, and what we put there."""

    path: str
    live: bool
    before: bytes | None
    mode: int
    uid: int
    gid: int
    after: bytes
    folders: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        return {
            "path": self.path, "live": self.live, "mode": self.mode, "uid": self.uid,
            "gid": self.gid, "folders": list(self.folders),
            "before": None if self.before is None else base64.b64encode(self.before).decode(),
            "after": base64.b64encode(self.after).decode(),
        }  # fmt: skip


def _entry(document: Any) -> _Entry:
    before = document["before"]
    return _Entry(
        str(document["path"]), bool(document["live"]),
        None if before is None else base64.b64decode(before, validate=True),
        int(document["mode"]), int(document["uid"]), int(document["gid"]),
        base64.b64decode(document["after"], validate=True),
        tuple(str(folder) for folder in document["folders"]),
    )  # fmt: skip


class _Journal:
    """The file that says what was before; entries in the order of the changes."""

    def __init__(self, files: _Files) -> None:
        self._files = files
        self._path = files.at(JOURNAL)

    def read(self) -> list[_Entry]:
        try:
            document = json.loads(self._path.read_text())
            if document["version"] != 1:
                raise ValueError(f"version {document['version']}")
            return [_entry(each) for each in document["entries"]]
        except FileNotFoundError:
            return []
        except (KeyError, TypeError, ValueError) as error:
            raise errors.TensormemError(
                f"{JOURNAL} is damaged ({error})",
                "put the settings back by hand, then remove it; it was changed by somebody else",
            ) from None

    def write(self, entries: Sequence[_Entry]) -> None:
        if not entries:
            self._path.unlink(missing_ok=True)
            _beside(self._path).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self._path.parent.rmdir()  # only when it is empty
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"version": 1, "entries": [e.document() for e in entries]}, indent=1)
        _replace(self._path, text.encode(), 0o600, None)


def _put(files: _Files, entry: _Entry, content: bytes) -> None:
    path = files.at(entry.path)
    if entry.live:
        path.write_bytes(content)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, content, entry.mode, (entry.uid, entry.gid))


def _undo(files: _Files, entry: _Entry) -> None:
    """Put back what was there, unless it is there already."""
    path = files.at(entry.path)
    if not entry.live:
        _beside(path).unlink(missing_ok=True)
    if entry.before is not None:
        now = files.live(entry.path) if entry.live else None
        if not entry.live or now is None or now.encode() != entry.before:
            _put(files, entry, entry.before)
    elif path.exists():
        path.unlink()
    for folder in reversed(entry.folders):
        with contextlib.suppress(OSError):
            files.at(folder).rmdir()  # only when nobody put something there


def _look(files: _Files, change: Change) -> _Entry:
    """Note what is at a path."""
    path = files.at(change.path)
    if change.live:
        value = files.live(change.path) or ""
        return _Entry(change.path, True, value.encode(), 0, 0, 0, change.content.encode(), ())
    after = change.content.encode(errors="surrogateescape")
    folders = []
    folder = path.parent
    while not folder.exists():
        folders.append("/" + str(folder.relative_to(files.root)))
        folder = folder.parent
    if not path.exists():
        return _Entry(change.path, False, None, 0o644, os.geteuid(), os.getegid(), after,
                      tuple(reversed(folders)))  # fmt: skip
    about = path.stat()
    return _Entry(change.path, False, path.read_bytes(), about.st_mode & 0o7777, about.st_uid,
                  about.st_gid, after, ())  # fmt: skip


def _systemctl(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


@contextlib.contextmanager
def _explained(what: str, after: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = f"{what}: {error.filename or ''}: {error.strerror or error}".replace(": :", ":")
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise errors.NotPermitted(
                f"{where}, this takes root", "run it with sudo", error.errno
            ) from None
        raise errors.TensormemError(
            where, f"{after}; mend that and try again", error.errno
        ) from None
    except subprocess.CalledProcessError as error:
        raise errors.TensormemError(
            f"{what}: {' '.join(error.cmd)} failed with {error.returncode}",
            f"{after}; 'journalctl -b' may say more",
        ) from None


def apply(
    advice: Sequence[Advice], *, root: str | os.PathLike[str] | None = None, run: Run = _systemctl
) -> list[Change]:
    """Make all changes, or none.

    Args:
        advice: what :func:`advise` returned.
        root: another root directory, for tests.
        run: runs a command, for tests.

    Returns:
        The changes that were made: none the second time.

    Raises:
        NotPermitted: this takes root.
        TensormemError: one could not be made; all are taken back.
    """
    files = _Files(_root(root))
    # of several for one file the last one has all
    changes = {change.path: change for each in advice for change in each.changes}
    if not changes:
        return []
    journal = _Journal(files)
    with _explained("cannot apply", "nothing was changed"):
        old = journal.read()
        fresh = [_look(files, change) for change in changes.values()]
        known = {entry.path: entry for entry in old}
        merged = [e for e in old if e.path not in changes]
        for entry in fresh:
            first = known.get(entry.path)
            # what was before the first time is what revert puts back
            merged.append(
                entry if first is None
                else _Entry(first.path, first.live, first.before, first.mode, first.uid, first.gid,
                            entry.after, first.folders)
            )  # fmt: skip
        done: list[_Entry] = []
        try:
            journal.write(merged)
            for entry in fresh:
                done.append(entry)
                _put(files, entry, entry.after)
            if any(entry.path.startswith("/etc/systemd/") for entry in fresh):
                run(["systemctl", "daemon-reload"])
        except BaseException:
            for entry in reversed(done):
                _undo(files, entry)
            journal.write(old)
            raise
    return list(changes.values())


def revert(*, root: str | os.PathLike[str] | None = None, run: Run = _systemctl) -> list[str]:
    """Put everything back that :func:`apply` changed, also when it was killed.

    Args:
        root: another root directory, for tests.
        run: runs a command, for tests.

    Returns:
        The paths, in the order in which they were put back.

    Raises:
        Busy: somebody changed one of the files since; nothing was put back.
        NotPermitted: this takes root.
    """
    files = _Files(_root(root))
    journal = _Journal(files)
    with _explained("cannot revert", "the rest is kept in the journal"):
        entries = journal.read()
        for entry in entries:
            path = files.at(entry.path)
            if not entry.live and path.exists():
                now = path.read_bytes()
                if now not in (entry.after, entry.before):
                    raise errors.Busy(
                        f"{entry.path} was changed by somebody else since",
                        "keep what is yours elsewhere, put back what is in"
                        f" {JOURNAL} (after, in base64) or remove the file, and try again",
                    )
        back = []
        for entry in reversed(entries):
            _undo(files, entry)
            back.append(entry.path)
        if any(path.startswith("/etc/systemd/") for path in back):
            run(["systemctl", "daemon-reload"])
        journal.write([])
    return back
