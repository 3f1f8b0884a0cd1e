# SPDX-License-Identifier: MIT
"""Monitors that need no compiler: histograms that the kernel itself keeps of the module's events.

They are made in a trace instance of their own, so nobody else's tracing is disturbed, and are
gone with it. What the eBPF tools tell beyond counts and sums needs those.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import errors
from .closing import Closing

__all__ = ["MONITORS", "Count", "Event", "Histogram", "Instance", "parse_event", "parse_hist"]

TRACING = "/sys/kernel/tracing"

#: The environment variable that names another directory, for tests.
ROOT_VARIABLE = "TENSORMEM_TRACING"

_ROW = re.compile(r"\{ (.*?) \} hitcount:\s*(\d+)(.*)")
_EVENT = re.compile(
    r"\s*(?P<comm>.+?)-(?P<tid>\d+)\s+(?:\([\s\d-]+\)\s+)?\[\d+\]\s+\S+\s+"
    r"(?P<seconds>\d+\.\d+): (?P<event>\w+): (?P<fields>.*)"
)
_LOST = re.compile(r"CPU:\d+ \[LOST (\d+) EVENTS\]")


@dataclass(frozen=True)
class Histogram:
    """What to count: one of our events or ``system:event``, by keys, with sums of values."""

    event: str
    keys: tuple[str, ...]
    values: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """Where its folder is under ``events``."""
        system, _, name = self.event.rpartition(":")
        return f"{system}/{name}" if system else f"tensormem/tensormem_{name}"


def _latency(*events: str) -> tuple[Histogram, ...]:
    return tuple(Histogram(event, ("latency_ns.log2",), ("latency_ns",)) for event in events)


_RECLAIM = "vmscan:mm_vmscan_direct_reclaim_"

#: The histograms of each monitor. ``tmsnoop`` has none: it tells each event.
MONITORS: Mapping[str, tuple[Histogram, ...]] = {
    "tmlat": (
        Histogram("alloc", ("pool", "latency_ns.log2"), ("latency_ns",)),
        *_latency("rt_alloc", "kv_extend", "fault", "kv_fault", "model_fault", "chunk_grow"),
        Histogram("ioctl", ("cmd", "latency_ns.log2"), ("latency_ns",)),
        Histogram("pressure_step", ("step", "latency_ns.log2"), ("latency_ns",)),
    ),
    "tmtop": (
        Histogram("alloc", ("client",), ("size", "held")),
        Histogram("free", ("client",), ("size", "held")),
        Histogram("rt_alloc", ("client",), ("size",)),
        Histogram("fault", ("client",), ("mapped",)),
        Histogram("ioctl", ("client",)),
    ),
    "tmsnoop": (),
    "tmleak": (
        Histogram("alloc", ("client",), ("held",)),
        Histogram("free", ("client",), ("held",)),
        Histogram("rt_alloc", ("client",), ("size",)),
        Histogram("rt_free", ("client",)),
    ),
    "tmpressure": (
        Histogram("pressure_level", ("level",), ("given",)),
        Histogram("pressure_step", ("step",), ("wanted", "given")),
        Histogram("chunk_grow", ("node", "ok"), ("latency_ns",)),
        Histogram("chunk_shrink", ("node",)),
        Histogram(f"{_RECLAIM}begin", ("order",)),
        Histogram(f"{_RECLAIM}end", ("common_pid",), ("nr_reclaimed",)),
    ),
    "tmdeadline": (
        Histogram("rt_wait", ("client",), ("size",)),
        Histogram("rt_miss", ("client", "had_ns.log2"), ("size",)),
    ),
    "tmswap": (
        Histogram("model_stage", ("slot", "generation"), ("size",)),
        Histogram("model_load", ("slot", "generation"), ("size",)),
        *(
            Histogram(f"model_{step}", ("slot", "generation"))
            for step in ("commit", "rollback", "abort", "retire", "evict", "reload")
        ),
    ),
    "tmkv": (
        Histogram("kv_extend", ("client", "cache"), ("tokens", "latency_ns")),
        Histogram("kv_fork", ("client", "cache")),
        Histogram("kv_lookup", ("client", "cache"), ("asked", "matched")),
        Histogram("kv_copy", ("client", "cache"), ("bytes",)),
        Histogram("kv_evict", ("client", "cache"), ("blocks",)),
        Histogram("kv_pack", ("client", "cache"), ("before", "after")),
        Histogram("kv_unpack", ("client", "cache"), ("before", "after")),
        Histogram("kv_fault", ("client", "cache"), ("latency_ns",)),
    ),
}


@dataclass(frozen=True)
class Count:
    """One entry of a histogram.

    Attributes:
        keys: their names and what they are; of a time, the bound in ns it is not above.
        count: how many events.
        sums: of the values asked for.
    """

    keys: Mapping[str, str]
    count: int
    sums: Mapping[str, int]

    def since(self, before: Count | None) -> Count:
        """Return what has come since an earlier look."""
        if before is None:
            return self
        sums = {name: value - before.sums.get(name, 0) for name, value in self.sums.items()}
        return Count(self.keys, self.count - before.count, sums)


@dataclass(frozen=True)
class Event:
    """One event of the trace; ``tid`` is the thread's."""

    seconds: float
    event: str
    tid: int
    comm: str
    values: Mapping[str, str]


def parse_hist(text: str) -> tuple[list[Count], int]:
    """Return the entries of a ``hist`` file, and how many events it had no room for."""
    counts = []
    for keys, count, rest in _ROW.findall(text):
        named = {}
        for key in keys.split(", "):
            name, _, value = key.partition(":")
            power = re.fullmatch(r"\s*~ 2\^(\d+)\s*", value)
            named[name.strip()] = str(1 << int(power[1])) if power else value.strip()
        sums = {name: int(value) for name, value in re.findall(r"(\w+):\s*(\d+)", rest)}
        counts.append(Count(named, int(count), sums))
    dropped = re.search(r"Dropped:\s*(\d+)", text)
    return counts, int(dropped[1]) if dropped else 0


def parse_event(line: str) -> Event | None:
    """Return the event that a line of the trace tells; None for a line of another kind."""
    found = _EVENT.fullmatch(line.rstrip("\n"))
    if found is None:
        return None
    values = dict(word.split("=", 1) for word in found["fields"].split() if "=" in word)
    name = found["event"].removeprefix("tensormem_")
    return Event(float(found["seconds"]), name, int(found["tid"]), found["comm"], values)


def _filter(pid: int) -> str:
    """Return the filter for a process: the kernel's is by thread, so those it has now."""
    if not pid:
        return ""
    try:
        threads = sorted(int(name) for name in os.listdir(f"/proc/{pid}/task"))
    except OSError:
        raise errors.TensormemError(f"there is no process {pid}", "look with ps") from None
    return "||".join(f"common_pid=={thread}" for thread in threads)


class Instance(Closing):
    """A trace instance with a monitor's histograms, or with all events of the module."""

    def __init__(self, name: str, pid: int = 0) -> None:
        """Make it.

        Args:
            name: a key of :data:`MONITORS`.
            pid: only what this process does.

        Raises:
            TensormemError: no tracefs, no such events, or no right to it.
        """
        root = Path(os.environ.get(ROOT_VARIABLE, TRACING))
        self.folder = root / "instances" / f"tensormem-{os.getpid()}"
        chosen = _filter(pid)
        self.lost = 0
        self.histograms: list[Histogram] = []
        self._triggers: list[tuple[Path, str]] = []
        self._pipe: int | None = None
        self._part = b""
        _bury(root / "instances")
        try:
            self.folder.mkdir()
        except OSError as error:
            raise errors.TensormemError(
                f"cannot trace: {self.folder}: {error.strerror}",
                "be root; and mount tracefs on /sys/kernel/tracing",
            ) from None
        try:
            if MONITORS[name]:
                self._count(MONITORS[name], chosen)
            else:
                self._tell(chosen)
        except BaseException:
            self.close()
            raise

    def _count(self, histograms: Sequence[Histogram], chosen: str) -> None:
        for histogram in histograms:
            events = self.folder / "events" / histogram.path
            if not events.exists():
                continue
            trigger = f"hist:keys={','.join(histogram.keys)}"
            if histogram.values:
                trigger += f":vals={','.join(('hitcount', *histogram.values))}"
            trigger += ":size=4096"
            if chosen:
                trigger += f" if {chosen}"
            try:
                (events / "trigger").write_text(trigger)
            except OSError as error:
                raise errors.TensormemError(
                    f"the kernel refused a histogram of {histogram.event}: {error.strerror}",
                    "it needs CONFIG_HIST_TRIGGERS; without that 'tensormem status' shows counters",
                ) from None
            self._triggers.append((events / "trigger", trigger))
            self.histograms.append(histogram)
        if not self._triggers:
            raise _no_events()

    def _tell(self, chosen: str) -> None:
        events = self.folder / "events/tensormem"
        if not events.exists():
            raise _no_events()
        (events / "filter").write_text(chosen or "0")
        self._pipe = os.open(self.folder / "trace_pipe", os.O_RDONLY | os.O_NONBLOCK)
        (events / "enable").write_text("1")

    @property
    def watched(self) -> int:
        """How many events are watched."""
        if self.histograms:
            return len(self.histograms)
        return len(list((self.folder / "events/tensormem").glob("tensormem_*")))

    def counts(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], Count]:
        """Return all counts since the beginning, by event and keys."""
        found = {}
        self.lost = 0
        for histogram in self.histograms:
            text = (self.folder / "events" / histogram.path / "hist").read_text()
            counts, dropped = parse_hist(text)
            self.lost += dropped
            for count in counts:
                found[histogram.event, tuple(count.keys.items())] = count
        return found

    def events(self, seconds: float) -> Iterator[Event]:
        """Yield the events there are, after a wait for the first of so long at most."""
        assert self._pipe is not None
        ready = select.poll()
        ready.register(self._pipe, select.POLLIN)
        if not ready.poll(seconds * 1000):
            return
        while True:
            try:
                data = os.read(self._pipe, 1 << 16)
            except BlockingIOError:
                return
            if not data:
                return
            *lines, self._part = (self._part + data).split(b"\n")
            for line in lines:
                text = line.decode(errors="replace")
                lost = _LOST.search(text)
                self.lost += int(lost[1]) if lost else 0
                event = parse_event(text)
                if event is not None:
                    yield event

    def close(self) -> None:
        """Remove the triggers, which would keep the module, and the instance; again: nothing."""
        if self._pipe is not None:
            os.close(self._pipe)
            self._pipe = None
            (self.folder / "events/tensormem/enable").write_text("0")
        while self._triggers:
            path, trigger = self._triggers.pop()
            path.write_text(f"!{trigger}")
        if self.folder.exists():
            self.folder.rmdir()


def _bury(instances: Path) -> None:
    """Remove what monitors left that were killed: their triggers would keep the module."""
    for folder in instances.glob("tensormem-*"):
        if Path("/proc", folder.name.partition("-")[2]).exists():
            continue
        for path in folder.glob("events/*/*/trigger"):
            with contextlib.suppress(OSError):
                for line in path.read_text().splitlines():
                    if not line.startswith("#"):
                        path.write_text(f"!{line.partition(' [')[0]}")
        with contextlib.suppress(OSError):
            folder.rmdir()


def _no_events() -> errors.TensormemError:
    return errors.TensormemError(
        "the module's events are not there", "load the module with 'sudo modprobe tensormem'"
    )
