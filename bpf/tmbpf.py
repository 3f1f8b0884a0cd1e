# SPDX-License-Identifier: MIT
"""What the monitors have in common: arguments, the program for the kernel, the loop, the output.

A monitor is a Tool: what to do at each event, as C text, and how to tell what came of it. It reads the module's own
tracepoints, of which tracefs tells the layout; of the kernel it knows nothing else, see include/.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import re
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

TRACING = Path(os.environ.get("TENSORMEM_TRACING", "/sys/kernel/tracing"))
INCLUDE = Path(__file__).resolve().parent / "include"
WIDTH = 79
#: Seconds between two looks at what the kernel has for a tool that tells each event.
POLL = 0.1
#: The tool cannot run here; see the line on stderr.
EXIT_NO_BPF = 3
#: What the C text has room for, in a record.
NUMBERS, TEXT = 8, 64
#: Bytes of the ring: what comes between two looks has to fit, at a hundred thousand events a second.
RING_SIZE = 2 << 20

Key = tuple[int, int, int, int]
Sum = tuple[int, int, int]
Sums = dict[Key, Sum]

COMMON = r"""
BPF_ARRAY(tm_lost, u64, 1);

static __always_inline void tm_lose(void)
{
	int zero = 0;
	u64 *lost = tm_lost.lookup(&zero);

	if (lost)
		__sync_fetch_and_add(lost, 1);
}

static __always_inline bool tm_skip(void)
{
	return TM_PID && (bpf_get_current_pid_tgid() >> 32) != TM_PID;
}
"""

#: Counts and sums of two values, by event and three numbers.
SUMS = r"""
struct tm_key { u32 event, a, b, c; };
struct tm_sum { u64 count, x, y; };

BPF_HASH(tm_sums, struct tm_key, struct tm_sum, 16384);

static __always_inline void tm_count(u32 event, u32 a, u32 b, u32 c, u64 x, u64 y)
{
	struct tm_key key = { event, a, b, c };
	struct tm_sum *sum, zero = {};

	sum = tm_sums.lookup_or_try_init(&key, &zero);
	if (!sum) {
		tm_lose();
		return;
	}
	__sync_fetch_and_add(&sum->count, 1);
	if (x)
		__sync_fetch_and_add(&sum->x, x);
	if (y)
		__sync_fetch_and_add(&sum->y, y);
}

/* The n with 2^n <= value; 0 for 0. */
static __always_inline u32 tm_log2(u64 value)
{
	return bpf_log2l(value) - 1;
}
"""

#: One record for each event, in the order of their time. Nobody is woken: the tool looks often enough.
RING = r"""
struct tm_record {
	u64 ns;
	u64 number[TM_NUMBERS];
	u32 event, pid, tid, cpu;
	char comm[16];
	char text[TM_TEXT];
};

BPF_RINGBUF_OUTPUT(tm_ring, TM_RING_PAGES);

/*
 * The name of who was last seen on each CPU: asking for it is a third of what a record costs, and the same one comes
 * again and again. It is asked for again after a millisecond, because it may change. Where programs can be preempted
 * two tasks may write at once; what they have mixed does not add up.
 */
struct tm_seen {
	u64 comm[2], until, sum;
};

BPF_ARRAY(tm_seen, struct tm_seen, TM_CPUS);

static __always_inline void tm_name(struct tm_record *record)
{
	volatile struct tm_seen *seen;
	u64 *comm = (u64 *)record->comm;
	int cpu = record->cpu;

	seen = tm_seen.lookup(&cpu);
	if (seen) {
		comm[0] = seen->comm[0];
		comm[1] = seen->comm[1];
		if (seen->sum == comm[0] + 3 * comm[1] + record->tid && record->ns < seen->until)
			return;
	}
	bpf_get_current_comm(record->comm, sizeof(record->comm));
	if (seen) {
		seen->comm[0] = comm[0];
		seen->comm[1] = comm[1];
		seen->until = record->ns + 1000000;
		seen->sum = comm[0] + 3 * comm[1] + record->tid;
	}
}

static __always_inline struct tm_record *tm_begin(u32 event)
{
	struct tm_record *record = tm_ring.ringbuf_reserve(sizeof(*record));
	u64 id = bpf_get_current_pid_tgid();

	if (!record) {
		tm_lose();
		return NULL;
	}
	record->ns = bpf_ktime_get_ns();
	record->event = event;
	record->pid = id >> 32;
	record->tid = id;
	record->cpu = bpf_get_smp_processor_id();
	tm_name(record);
	return record;
}

static __always_inline void tm_end(struct tm_record *record)
{
	tm_ring.ringbuf_submit(record, BPF_RB_NO_WAKEUP);
}
"""


class NoBPF(Exception):
    """Why BPF programs cannot run here."""


class CRecord(ctypes.Structure):
    """A record as the kernel writes it."""

    _fields_ = (
        ("ns", ctypes.c_uint64),
        ("number", ctypes.c_uint64 * NUMBERS),
        ("event", ctypes.c_uint32),
        ("pid", ctypes.c_uint32),
        ("tid", ctypes.c_uint32),
        ("cpu", ctypes.c_uint32),
        ("comm", ctypes.c_char * 16),
        ("text", ctypes.c_char * TEXT),
    )


@dataclass(frozen=True)
class Field:
    """One field of an event."""

    name: str
    size: int
    signed: bool
    is_text: bool
    symbols: Mapping[int, str]

    def show(self, number: int) -> int | str:
        """The number as the event means it."""
        if self.symbols:
            return self.symbols.get(number, str(number))
        if self.signed and number >> 63:
            return number - (1 << 64)
        return number


@dataclass(frozen=True)
class Record:
    """One event that has happened."""

    seconds: float
    event: str
    pid: int
    tid: int
    cpu: int
    comm: str
    values: Mapping[str, int | str]


def tracepoint(event: str) -> tuple[str, str]:
    """The system and the name of an event; those of the module are known by what follows ``tensormem_``."""
    system, _, name = event.rpartition(":")
    return (system, name) if system else ("tensormem", f"tensormem_{event}")


def is_ours(event: str) -> bool:
    """Whether it is of the module, and not of the kernel."""
    return ":" not in event


def folder(event: str) -> Path:
    """Where tracefs has it."""
    system, name = tracepoint(event)
    return TRACING / "events" / system / name


def ours() -> list[str]:
    """All events of the module that is loaded."""
    found = (TRACING / "events/tensormem").glob("tensormem_*/format")
    return sorted(path.parent.name.removeprefix("tensormem_") for path in found)


def fields(event: str) -> list[Field]:
    """What an event carries, as tracefs tells it."""
    text = (folder(event) / "format").read_text()
    symbols: dict[str, dict[int, str]] = {}
    for name, entries in re.findall(r"__print_symbolic\(REC->(\w+), (\{.*?\})\)", text):
        symbols[name] = {int(number): word for number, word in re.findall(r'\{ (\d+), "([^"]*)" \}', entries)}
    found = []
    pattern = r"^\tfield:(.+?);\s*offset:\d+;\s*size:(\d+);\s*signed:([01]);"
    for declaration, size, signed in re.findall(pattern, text, re.M):
        kind, _, name = declaration.rpartition(" ")
        bare = name.partition("[")[0]
        if not bare.startswith("common_"):
            is_text = bare != name and kind.endswith("char")
            found.append(Field(bare, int(size), signed == "1", is_text, symbols.get(bare, {})))
    printed = re.findall(r"(\w+)=%", text[text.find("print fmt:") :])
    return sorted(found, key=lambda field: printed.index(field.name)) if is_ours(event) else found


def declare(event: str) -> str:
    """C text that gives the arguments of an event of the module names: what it prints, in that order."""
    members, values = [], []
    for place, field in enumerate(fields(event)):
        members.append(f"u64 {field.name};")
        # an argument that is shorter than its place comes without its sign
        values.append(f"({'s32' if field.signed and field.size == 4 else 'u64'})ctx->args[{place}]")
    return f"struct {{ {' '.join(members)} }} tm_args = {{ {', '.join(values)} }}, *args = &tm_args;"


def copy_fields(event: str) -> str:
    """C text that puts all fields of an event into a record."""
    lines = []
    numbers = [field for field in fields(event) if not field.is_text]
    for place, field in enumerate(numbers[:NUMBERS]):
        lines.append(f"record->number[{place}] = args->{field.name};")
    for field in [field for field in fields(event) if field.is_text][:1]:
        size = min(field.size, TEXT)
        lines.append(f"bpf_probe_read_kernel_str(record->text, {size}, (void *)args->{field.name});")
    return "\n".join(lines)


#: A probe's body that makes a record of the whole event.
WHOLE = "{ struct tm_record *record = tm_begin(TM_EVENT); if (record) { TM_FIELDS tm_end(record); } }"


def parse_seconds(text: str) -> float:
    """A time such as ``5ms``, ``250us``, ``1.5s`` or ``2`` in seconds."""
    fit = re.fullmatch(r"(\d+(?:\.\d+)?)(ns|us|ms|s|)", text)
    if fit is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time; write it like 5ms or 2s")
    return float(fit[1]) * {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "": 1.0}[fit[2]]


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def span(text: str) -> float:
    """A time that is longer than none."""
    seconds = parse_seconds(text)
    if seconds <= 0:
        raise argparse.ArgumentTypeError("no time at all")
    return seconds


def show_ns(value: float) -> str:
    """A time for people, in at most 6 characters."""
    for unit in ("ns", "us", "ms"):
        if value < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}s" if value < 999.5 else f"{value:.0f}s"


def show_size(value: float) -> str:
    """Bytes for people, in at most 6 characters; a sign before it where there is one."""
    sign, value = ("-", -value) if value < 0 else ("", value)
    for unit in ("", "K", "M", "G"):
        if value < 999.5:
            return f"{sign}{value:.3g}{unit}"
        value /= 1024
    return f"{sign}{value:.3g}T"


def draw(counts: Mapping[int, int], show: Callable[[float], str] = show_ns) -> Iterable[str]:
    """The lines of a histogram by powers of two."""
    if not counts:
        return
    most = max(counts.values())
    digits = max(7, len(str(most)))
    room = WIDTH - 24 - digits
    for bucket in range(min(counts), max(counts) + 1):
        count = counts.get(bucket, 0)
        low = show(1 << bucket if bucket else 0)
        label = f"{low:>8} ..{show(2 << bucket):>7}"
        yield f"{label} {count:>{digits}} |{'*' * (count * room // most):<{room}}|"


class Attached:
    """A program in the kernel, and what it has counted."""

    def __init__(self, text: str, flags: Sequence[str], events: Sequence[str]) -> None:
        """Compile, load and attach; raises NoBPF."""
        os.environ["BCC_KERNEL_SOURCE"] = str(INCLUDE)
        try:
            bcc = importlib.import_module("bcc")
            make = bcc.BPF
        except (ImportError, AttributeError, OSError) as error:
            raise NoBPF(f"bcc is not installed (Debian: python3-bpfcc): {error}") from error
        page = os.sysconf("SC_PAGE_SIZE")
        numbers = {"TM_PAGE_SIZE": page, "TM_RING_PAGES": RING_SIZE // page, "TM_NUMBERS": NUMBERS, "TM_TEXT": TEXT,
                   "TM_CPUS": os.sysconf("SC_NPROCESSORS_CONF")}  # fmt: skip
        try:
            self.bpf = make(text=text, cflags=[*(f"-D{name}={value}" for name, value in numbers.items()), *flags])
        except Exception as error:  # bcc raises no type of its own
            raise NoBPF(f"the program was refused by the compiler or the kernel: {error}") from error
        self.events = events
        self.fields = [fields(event) for event in events]
        self.take: Callable[[Record], None] | None = None
        if "tm_ring" in text:
            self.bpf["tm_ring"].open_ring_buffer(self._record)

    def sums(self) -> Sums:
        """All sums since the beginning."""
        table = self.bpf["tm_sums"]
        return {(k.event, k.a, k.b, k.c): (v.count, v.x, v.y) for k, v in table.items()}

    def lost(self) -> int:
        """Events that there was no room for."""
        return int(self.bpf["tm_lost"][ctypes.c_int(0)].value)

    def poll(self) -> None:
        """Hand over the records that there are."""
        self.bpf.ring_buffer_consume()

    def _record(self, context: object, data: int, size: int) -> int:
        raw = CRecord.from_address(ctypes.cast(data, ctypes.c_void_p).value or 0)
        if self.take is not None:
            self.take(decode(raw, self.events[raw.event], self.fields[raw.event]))
        return 0


def decode(raw: CRecord, event: str, layout: Sequence[Field]) -> Record:
    """A record as the tools have it. Numbers that no field of the event has are called ``extra0`` and so on."""
    values: dict[str, int | str] = {}
    numbers = [field for field in layout if not field.is_text]
    for place, field in enumerate(numbers[:NUMBERS]):
        values[field.name] = field.show(raw.number[place])
    for place in range(len(numbers), NUMBERS):
        values[f"extra{place - len(numbers)}"] = raw.number[place]
    for field in layout:
        if field.is_text:
            values[field.name] = raw.text.decode(errors="replace")
    comm = raw.comm.decode(errors="replace")
    return Record(raw.ns / 1e9, event, raw.pid, raw.tid, raw.cpu, comm, values)


def minus(now: Sums, before: Sums) -> Sums:
    """What came since."""
    news = {}
    for key, value in now.items():
        old = before.get(key, (0, 0, 0))
        if value[0] != old[0]:
            news[key] = (value[0] - old[0], value[1] - old[1], value[2] - old[2])
    return news


class Tool:
    """A monitor. Each has a name, what it is for, examples, and what it does at each event."""

    name = ""
    about = ""
    examples = ""
    #: C text before the probes: SUMS, RING, or both, and what else they need.
    code = SUMS
    #: What to do at each event; those that the module does not have are left out.
    probes: ClassVar[Mapping[str, str]] = {}
    #: Each event is told as it comes, not only at the ends of intervals.
    streams = False

    def __init__(self) -> None:
        """Nothing is told yet."""
        self.options = argparse.Namespace()
        self.events: list[str] = []
        self.bpf: Attached | None = None
        self.totals: dict[str, int] = {}

    # What tools have of their own.

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        """Options beside the common ones."""

    def check(self, parser: argparse.ArgumentParser) -> None:
        """Refuse options that do not go together."""

    def flags(self) -> list[str]:
        """Definitions for the C text."""
        return []

    def chosen(self) -> Mapping[str, str]:
        """The probes that the options ask for."""
        return self.probes

    def record(self, record: Record) -> None:
        """An event has come."""

    def report(self, sums: Sums, seconds: float) -> None:
        """An interval is over: what came in it."""

    # The same for all.

    def parser(self) -> argparse.ArgumentParser:
        """The command line."""
        parser = argparse.ArgumentParser(
            prog=self.name, description=textwrap.fill(self.about, WIDTH), epilog=f"examples:\n{self.examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        )  # fmt: skip
        parser.add_argument("-T", "--timestamp", action="store_true", help="begin with the time of day")
        parser.add_argument("-p", "--pid", type=positive, default=0, help="only what this process does")
        parser.add_argument("-j", "--json", action="store_true", help="lines of JSON")
        parser.add_argument("-d", "--duration", type=span, metavar="TIME", help="end after this long, such as 10s")
        self.arguments(parser)
        parser.add_argument("interval", nargs="?", type=span, help="seconds between reports; without: one at the end")
        parser.add_argument("count", nargs="?", type=positive, help="end after so many reports")
        return parser

    def program(self) -> str:
        """The C text; raises NoBPF where none of the events is there."""
        chosen = self.chosen()
        self.events = [event for event in chosen if (folder(event) / "format").exists()]
        if not self.events:
            raise NoBPF(f"{TRACING}/events has none of the events: is the module loaded, and are you root?")
        parts = [COMMON, self.code]
        for number, event in enumerate(self.events):
            body = chosen[event].replace("TM_EVENT", str(number))
            if "TM_FIELDS" in body:
                body = body.replace("TM_FIELDS", copy_fields(event))
            system, name = tracepoint(event)
            # whoever runs instead of a process is another one
            skip = "" if system == "sched" else "if (tm_skip()) return 0;"
            # those of the kernel have the layout that tracefs tells, and the module's arguments are what it prints
            head, names = f"TRACEPOINT_PROBE({system}, {name})", ""
            if is_ours(event):
                head, names = f"RAW_TRACEPOINT_PROBE({name})", declare(event)
            parts.append(f"{head}\n{{\n{skip}\n{names}\n{{\n{body}\n}}\nreturn 0;\n}}\n")
        return "\n".join(parts)

    def event(self, key: Key) -> str:
        """The event that a sum is of."""
        return self.events[key[0]]

    def print(self, line: str) -> None:
        """One line of text."""
        print(line.rstrip(), flush=True)

    def stamp(self) -> str:
        """What a line begins with, where -T asks for it."""
        return time.strftime("%H:%M:%S ") if self.options.timestamp else ""

    def emit(self, **values: Any) -> None:
        """One line of JSON."""
        print(json.dumps({"tool": self.name, "time": round(time.time(), 6), **values}), flush=True)

    def heading(self, columns: str) -> None:
        """The line above a table, or above all lines."""
        if not self.options.json:
            self.print((" " * 9 if self.options.timestamp and self.streams else self.stamp()) + columns)

    def header(self) -> None:
        """What comes before all else."""

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Run; returns the exit code."""
        parser = self.parser()
        self.options = parser.parse_args(arguments)
        self.check(parser)
        try:
            text = self.program()
            self.bpf = Attached(text, [f"-DTM_PID={self.options.pid}", *self.flags()], self.events)
        except NoBPF as error:
            print(f"{self.name}: {error}", file=sys.stderr)
            return EXIT_NO_BPF
        self.bpf.take = self._take
        missing = [event for event in self.chosen() if event not in self.events]
        without = f" (not in this module: {', '.join(missing)})" if missing else ""
        print(f"{self.name}: {len(self.events)} events watched{without}; Ctrl-C ends", file=sys.stderr, flush=True)
        try:
            self._loop(self.bpf)
        except BrokenPipeError:
            # nobody reads any more; what Python would still flush has nowhere to go
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0

    def _take(self, record: Record) -> None:
        self.totals[record.event] = self.totals.get(record.event, 0) + 1
        self.record(record)

    def _loop(self, bpf: Attached) -> None:
        ended = False

        def end(number: int, frame: FrameType | None) -> None:
            nonlocal ended
            ended = True

        signal.signal(signal.SIGINT, end)
        signal.signal(signal.SIGTERM, end)
        self.header()
        began = last = time.monotonic()
        stop = began + self.options.duration if self.options.duration else float("inf")
        tick = self.options.interval or float("inf")
        before: Sums = {}
        reports = 0
        while not ended:
            left = min(stop, last + tick) - time.monotonic()
            if left > 0:
                time.sleep(min(left, POLL))
            if "tm_ring" in self.code:
                bpf.poll()
            now = time.monotonic()
            if now >= last + tick:
                before = self._report(bpf, before, now - last)
                last = now
                reports += 1
                ended |= reports == self.options.count
            ended |= now >= stop
        if "tm_ring" in self.code:
            bpf.poll()
        if reports != self.options.count:
            self._report(bpf, before, time.monotonic() - last)
        self._end(bpf)

    def _report(self, bpf: Attached, before: Sums, seconds: float) -> Sums:
        now = bpf.sums() if "tm_sums" in self.code else {}
        self.report(minus(now, before), seconds)
        return now

    def _end(self, bpf: Attached) -> None:
        """The totals of a tool that tells events, and what any tool has lost."""
        lost = bpf.lost()
        if self.options.json:
            self.emit(totals=self.totals, lost=lost)
            return
        if self.streams:
            self.print(f"{sum(self.totals.values())} events, {lost} lost")
        elif lost:
            self.print(f"{lost} events lost: there was no room for their counts")
