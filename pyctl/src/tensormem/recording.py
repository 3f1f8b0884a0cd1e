# SPDX-License-Identifier: MIT
"""The module's whole state at one moment, and files of such moments: one JSON document a line.

``record`` writes them, ``report`` reads them, ``top --json`` prints them. A file may end in the
middle of a line, because whoever wrote it was killed: that line is left out and said so.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from . import errors, system

__all__ = ["VERSION", "Recording", "Sample", "counter_rate", "load", "parse", "sample",
           "unit", "write"]  # fmt: skip

#: Of the lines' form; a reader refuses a higher one.
VERSION = 1

#: Groups whose inner folders have readers of their own, or no values that change.
_OWN = ("dispatch", "model", "rt")


_BYTES = (
    ("pressure", "low"), ("pressure", "high"), ("pressure", "available"),
    ("bandwidth", "client_budget"),
)  # fmt: skip


def unit(group: str, file: str) -> str:
    """Return what a file of pressure/, bandwidth/ or core<N>/ is in: ``bytes``, ``ns``, nothing."""
    if (group, file) in _BYTES or file.endswith(("_bytes", "_given")):
        return "bytes"
    return "ns" if file.endswith("_ns") else ""


@dataclass(frozen=True)
class Sample:
    """Everything that can be read of the module, at about one moment.

    Attributes:
        time: seconds since 1970.
        kernel: its release.
        page_size: bytes.
        groups: as :attr:`tensormem.system.Status.groups`; folders in them are ``outer/inner``.
        slots: the model slots.
        rt: the RT pool; None where the module has none.
        kv: the KV caches that the caller may look at.
    """

    time: float
    kernel: str
    page_size: int
    groups: Mapping[str, system.Group]
    slots: tuple[system.SlotStatus, ...]
    rt: system.RTPoolStatus | None
    kv: system.KVCaches

    def get(self, group: str, name: str) -> int | None:
        """Return a number, or None where the module has no such file."""
        found = self.groups.get(group)
        return None if found is None else found.get(name)

    def text(self, group: str, name: str) -> str:
        """Return what a file holds, as text; nothing where there is no such file."""
        found = self.groups.get(group)
        return "" if found is None else str(found.values.get(name, ""))

    def document(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {
            "version": VERSION,
            "time": self.time,
            "kernel": self.kernel,
            "page_size": self.page_size,
            "chunk_size": system.CHUNK_SIZE,
            "groups": {name: dict(group.values) for name, group in self.groups.items()},
            "slots": [_plain(asdict(slot)) for slot in self.slots],
            "rt": None if self.rt is None else _plain(asdict(self.rt)),
            "kv": _plain(asdict(self.kv)),
        }


def _plain(value: Any) -> Any:
    """Return it with lists for tuples, as it comes back from JSON."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def sample(
    root: str | os.PathLike[str] | None = None,
    proc: str | os.PathLike[str] | None = None,
    *,
    now: Callable[[], float] = time.time,
) -> Sample:
    """Read everything.

    Args:
        root: another directory than the module's in sysfs, for tests.
        proc: another directory than /proc, for tests.
        now: a clock in seconds.

    Raises:
        NotAvailable: the module is not loaded.
    """
    moment = round(now(), 3)
    groups = {n: g for n, g in system.read(root).groups.items() if n != "dispatch"}
    top = system.root_path(root)
    for name in [n for n in groups if n not in _OWN]:
        try:
            inner = system.read(top / name).groups
        except errors.NotAvailable:
            continue  # it went meanwhile
        for folder, group in inner.items():
            groups[f"{name}/{folder}"] = system.Group(f"{name}/{folder}", group.values)
    return Sample(
        time=moment,
        kernel=os.uname().release,
        page_size=os.sysconf("SC_PAGE_SIZE"),
        groups=groups,
        slots=system.model_slots(root),
        rt=system.rt_pool(root) if "rt" in groups else None,
        kv=system.kv_caches(proc),
    )


def parse(document: Any) -> Sample:
    """Make a sample of what :meth:`Sample.document` returned.

    Raises:
        InvalidArgument: it is something else, or of a newer package.
    """
    try:
        if document["version"] > VERSION:
            raise errors.InvalidArgument(
                f"it is of version {document['version']}, this package reads up to {VERSION}",
                "use the package that recorded it, or a newer one",
            )
        rt = document["rt"]
        return Sample(
            time=float(document["time"]),
            kernel=str(document["kernel"]),
            page_size=int(document["page_size"]),
            groups={
                str(name): system.Group(str(name), _values(values))
                for name, values in document["groups"].items()
            },
            slots=tuple(_slot(each) for each in document["slots"]),
            rt=None if rt is None else _rt(rt),
            kv=_kv(document["kv"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, errors.TensormemError):
            raise
        raise errors.InvalidArgument(
            f"it is not what 'tensormem record' writes ({type(error).__name__}: {error})",
            "give a file that 'tensormem record' wrote",
        ) from None


def _values(values: Any) -> dict[str, int | str]:
    for value in values.values():
        if not isinstance(value, (int, str)) or isinstance(value, bool):
            raise TypeError(f"{value!r} is neither a number nor text")
    return {str(name): value for name, value in values.items()}


def _numbers(values: Any) -> dict[str, int]:
    if not all(type(value) is int for value in values.values()):
        raise TypeError("a value is no whole number")
    return {str(name): value for name, value in values.items()}


def _counts(values: Any) -> tuple[int, ...]:
    if not all(type(value) is int for value in values):
        raise TypeError("a histogram has something that is no count")
    return tuple(values)


def _slot(document: Any) -> system.SlotStatus:
    generations = tuple(
        system.GenerationStatus(int(g["number"]), str(g["state"]), _numbers(g["values"]))
        for g in document["generations"]
    )
    numbers = {n: int(document[n]) for n in ("active", "previous", "staged", "uid", "gid", "mode")}
    return system.SlotStatus(name=str(document["name"]), generations=generations, **numbers)


def _rt(document: Any) -> system.RTPoolStatus:
    clients = tuple(
        system.RTStatus(
            int(c["id"]), _numbers(c["values"]), _counts(c["latency"]), _counts(c["missed"])
        )
        for c in document["clients"]
    )
    return system.RTPoolStatus(
        _numbers(document["values"]),
        clients,
        _counts(document["latency"]),
        _counts(document["missed"]),
    )


def _kv(document: Any) -> system.KVCaches:
    caches = tuple(
        system.KVStatus(
            int(c["id"]),
            tuple(system.KVUser(int(u["pid"]), str(u["command"])) for u in c["users"]),
            _numbers(c["values"]),
        )
        for c in document["caches"]
    )
    return system.KVCaches(caches, int(document["hidden"]))


@dataclass(frozen=True)
class Recording:
    """A recorded run.

    Attributes:
        samples: in the order of their time; at least one.
        cut_off: the last line was not whole.
    """

    samples: Sequence[Sample]
    cut_off: bool


def write(file: TextIO, moment: Sample) -> None:
    """Append one line, at once."""
    file.write(json.dumps(moment.document(), separators=(",", ":")) + "\n")
    file.flush()


def load(path: str | os.PathLike[str]) -> Recording:
    """Read a recorded run.

    Raises:
        InvalidArgument: it is no such file, it is empty, or its times go backwards.
        OSError: it cannot be read.
    """
    samples: list[Sample] = []
    cut_off = False
    for number, line, whole in _lines(Path(path)):
        try:
            samples.append(parse(json.loads(line)))
        except (ValueError, RecursionError) as error:
            if not whole:
                cut_off = True
                break
            plain = not isinstance(error, errors.TensormemError)
            cause = "it is no JSON" if plain else str(getattr(error, "cause", error))
            raise errors.InvalidArgument(
                f"{path}, line {number}: {cause}", "give a file that 'tensormem record' wrote"
            ) from None
        if len(samples) > 1 and samples[-1].time < samples[-2].time:
            raise errors.InvalidArgument(
                f"{path}, line {number}: it is of an earlier time than the line before",
                "give one recorded run, not several joined; or sort the lines by their time",
            )
    if not samples:
        raise errors.InvalidArgument(
            f"{path} holds no sample", "record some with 'tensormem record -o FILE'"
        )
    return Recording(samples, cut_off)


def _lines(path: Path) -> Iterator[tuple[int, str, bool]]:
    """Yield number, text and whether it ends as a line does."""
    with path.open(errors="replace") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line, line.endswith("\n")


def counter_rate(before: Sample | None, after: Sample, group: str, name: str) -> float | None:
    """Return how fast a counter grew, per second; None where that cannot be told.

    A counter that fell was of a module that has been loaded again.
    """
    if before is None or after.time <= before.time:
        return None
    old, new = before.get(group, name), after.get(group, name)
    if old is None or new is None or new < old:
        return None
    return (new - old) / (after.time - before.time)
