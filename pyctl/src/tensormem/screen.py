# SPDX-License-Identifier: MIT
"""What ``tensormem top`` shows, and how it gets to the terminal.

:func:`frame` makes a picture of two samples, without a terminal. :class:`Painter` sends the lines
that differ from those that stand there: over a slow line that is what counts.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TextIO

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from . import histogram, system
from .recording import Sample, counter_rate, unit
from .units import format_ns, format_quota, format_size

__all__ = ["HELP", "ORDERS", "Painter", "View", "frame", "lines"]

#: What tables can be sorted by.
ORDERS = ("memory", "activity", "name")

HELP = """\
  s        sort the tables: by memory, activity, name
  r        relieve: ask how much memory is to go back to the system
  space    pause, and go on
  h        this help, and back
  q        quit

  Pools      used: in use by their clients; ready: to hand out at once
  KV caches  hits: blocks found of those asked for by hash, since the last line
             and altogether
  RT         p99: 99 of 100 requests with a deadline took less
  +N more    of a table, below; a taller terminal shows them"""

_SPARKS = " ▁▂▃▄▅▆▇█"
_PLAIN_SPARKS = " .:-=+*#@"


@dataclass
class View:
    """What the user has chosen.

    Attributes:
        order: one of :data:`ORDERS`.
        paused: the picture stands.
        help: the keys are shown.
        message: the last line, instead of the keys.
        interval: seconds between two samples.
    """

    order: str = ORDERS[0]
    paused: bool = False
    help: bool = False
    message: str = ""
    interval: float = 2.0


@dataclass(frozen=True)
class _Row:
    cells: tuple[str, ...]
    memory: int = 0
    activity: float = 0.0
    name: str = ""


@dataclass(frozen=True)
class _Section:
    """A table; its first column is to the left, and so is one without a head."""

    head: tuple[str, ...]
    widths: tuple[int, ...]
    rows: Sequence[_Row]
    foot: Sequence[Text] = field(default_factory=tuple)

    def lines(self, shown: int) -> int:
        return 1 + shown + len(self.foot)

    def render(self, shown: int, order: str) -> Iterable[RenderableType]:
        rows = self.rows
        if order == "memory":
            rows = sorted(rows, key=lambda row: -row.memory)
        elif order == "activity":
            rows = sorted(rows, key=lambda row: -row.activity)
        elif order == "name":
            rows = sorted(rows, key=lambda row: row.name)
        table = Table.grid(padding=(0, 1), pad_edge=False)
        for number, width in enumerate(self.widths):
            left = number == 0 or not self.head[number]
            justify: Literal["left", "right"] = "left" if left else "right"
            table.add_column(justify=justify, width=width, no_wrap=True, overflow="ellipsis")
        table.add_row(*(Text(each, "bold") for each in self._heads(shown)))
        for row in rows[:shown]:
            table.add_row(*(Text(cell) for cell in row.cells))
        yield table
        yield from self.foot

    def _heads(self, shown: int) -> tuple[str, ...]:
        left_out = len(self.rows) - shown
        if not left_out:
            return self.head
        return (f"{self.head[0]} +{left_out} more", *self.head[1:])


def _size(value: int | None) -> str:
    return "-" if value is None else format_size(value)


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)


def _rate(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}/s" if value >= 10 or value == 0 else f"{value:.1f}/s"


def _percent(part: int | None, whole: int | None) -> str:
    return f"{100 * part / whole:.1f} %" if part is not None and whole else "-"


def _times(value: int | None, size: int) -> int | None:
    return None if value is None else value * size


def _header(now: Sample, view: View, width: int) -> Text:
    clock = time.strftime("%H:%M:%S", time.localtime(now.time))
    state = "paused" if view.paused else f"every {view.interval:g} s"
    left = Text(f"tensormem  {clock}", "bold")
    level = now.text("pressure", "level")
    if level:
        calm = level in ("none", "0")
        left.append(f"  pressure {level}", "default" if calm else "bold red")
    right = Text(f"{now.text('board', 'name') or now.kernel}  {state}", "dim")
    left.truncate(max(0, width - 1))
    right.truncate(max(0, width - left.cell_len - 2), overflow="ellipsis")
    return Text.assemble(left, " " * (width - left.cell_len - right.cell_len), right)


def _bar(now: Sample, width: int) -> Text:
    total, free = now.get("chunk", "total"), now.get("chunk", "free")
    capacity = now.get("chunk", "capacity")
    if total is None or free is None or not capacity:
        return Text("chunk pool: the module does not say", "dim")
    # the two are not read at one moment
    free, size = min(free, total), system.CHUNK_SIZE
    label = (
        f" {format_size((total - free) * size)} used, {format_size(free * size)} ready"
        f" of {format_size(capacity * size)}"
    )
    room = max(4, width - len(label) - 2)
    full = min(room, -(-(total - free) * room // capacity))
    both = min(room, -(-total * room // capacity))
    return Text.assemble(
        "[", ("#" * full, "green"), ("=" * (both - full), "cyan"), "." * (room - both), "]", label
    )


def _pools(now: Sample, before: Sample | None) -> _Section:
    get, page, chunk = now.get, now.page_size, system.CHUNK_SIZE
    rows = []

    def add(name: str, used: int | None, ready: int | None, counters: Sequence[str]) -> None:
        if name not in now.groups:
            return
        rates = [(c, counter_rate(before, now, name, c)) for c in counters]
        note = ", ".join(f"{c} {_rate(r)}" for c, r in rates if r is not None)
        busy = sum(r for _, r in rates if r is not None)
        rows.append(_Row((name, _size(used), _size(ready), note), used or 0, busy, name))

    add("chunk", _times(get("chunk", "used"), chunk), _times(get("chunk", "free"), chunk),
        ("grown", "shrunk", "grow_failed"))  # fmt: skip
    add("buddy", _times(get("buddy", "used_pages"), page),
        _times(get("buddy", "free_pages"), page), ("allocs", "frees", "moved_pages"))  # fmt: skip
    pages, small = _times(get("slab", "pages"), page), get("slab", "bytes")
    spare = None if pages is None or small is None else pages - small
    add("slab", small, spare, ())
    if get("dma", "total"):
        add("dma", _times(get("dma", "used"), chunk), _times(get("dma", "free"), chunk), ())
    add("kv", get("kv", "held"), None, ())
    held, used = get("rt", "held"), get("rt", "used")
    spare = None if held is None or used is None else max(0, held - used)
    add("rt", used, spare, ("allocs", "misses", "waits"))
    return _Section(("pool", "used", "ready", ""), (12, 9, 9, 46), rows)


def _clients(now: Sample) -> Text | None:
    get = now.get
    if "clients" not in now.groups:
        return None
    return Text(
        f"{_number(get('clients', 'count'))} clients with {_number(get('clients', 'tensors'))}"
        f" tensors hold {_size(get('clients', 'bytes'))},"
        f" {_size(get('clients', 'kept'))} of it kept for reuse"
    )


def _kv(now: Sample, before: Sample | None) -> _Section | None:
    if not now.kv.caches and not now.kv.hidden:
        return None
    old = {} if before is None else {cache.id: cache for cache in before.kv.caches}
    rows = []
    for cache in now.kv.caches:
        hits, lookups = cache.get("hits"), cache.get("lookups")
        was = old.get(cache.id)
        recent, asked = None, 0
        if was is not None and hits is not None and lookups is not None:
            asked = lookups - (was.get("lookups") or 0)
            recent = hits - (was.get("hits") or 0)
        user = cache.users[0]
        more = f" +{len(cache.users) - 1}" if len(cache.users) > 1 else ""
        cells = (
            f"{cache.id} {user.command} ({user.pid}){more}",
            _size(cache.get("held")),
            _size(cache.get("cached")),
            _size(cache.get("limit")),
            _number(cache.get("sequences")),
            _percent(recent, asked),
            _percent(hits, lookups),
        )
        rows.append(_Row(cells, cache.get("held") or 0, asked, f"{cache.id:09}"))
    foot = []
    if now.kv.hidden:
        foot.append(Text(f"{now.kv.hidden} processes are others': run it with sudo", "dim"))
    return _Section(
        ("KV cache", "held", "cached", "limit", "seqs", "hits now", "all"),
        (25, 9, 9, 9, 5, 8, 7), rows, foot,
    )  # fmt: skip


def _slots(now: Sample) -> _Section | None:
    if not now.slots:
        return None
    rows = []
    for slot in now.slots:
        for each in slot.generations:
            size, loaded, readers = each.get("size"), each.get("loaded"), each.get("readers")
            private, shared = each.get("private_bytes") or 0, each.get("shared_bytes") or 0
            place = "cached" if each.get("cached") else "resident"
            done = each.state if each.state != "loading" else f"loading {_percent(loaded, size)}"
            cells = (
                f"{slot.name} {each.number}", done, place, _size(size),
                _size(private), _size(shared), _number(readers),
            )  # fmt: skip
            name = f"{slot.name} {each.number:09}"
            rows.append(_Row(cells, private + shared, readers or 0, name))
        if not slot.generations:
            rows.append(_Row((slot.name, "empty", "", "", "", "", ""), name=slot.name))
    return _Section(
        ("model slot", "state", "kept", "size", "private", "shared", "readers"),
        (20, 15, 8, 8, 8, 8, 7), rows,
    )  # fmt: skip


def _rt(now: Sample, before: Sample | None, sparks: str) -> _Section | None:
    if now.rt is None:
        return None
    old = {} if before is None or before.rt is None else {c.id: c for c in before.rt.clients}
    rows = []
    for client in now.rt.clients:
        was = old.get(client.id)
        allocs = client.get("allocs") or 0
        asked = allocs - (was.get("allocs") or 0) if was is not None else 0
        bound = histogram.percentile(client.latency, 0.99)
        cells = (
            f"{client.id} in arena {_number(client.get('arena'))}",
            _size(client.get("used")),
            _size(client.get("size")),
            _number(client.get("priority")),
            _number(client.get("blocks")),
            _number(client.get("waiting")),
            _number(client.get("misses")),
            "-" if bound is None else f"< {format_ns(bound)}",
        )
        rows.append(_Row(cells, client.get("used") or 0, asked, f"{client.id:09}"))
    foot = _histogram(now.rt.latency, sparks)
    return _Section(
        ("RT client", "used", "arena", "prio", "blocks", "waiting", "misses", "p99"),
        (20, 9, 9, 4, 7, 7, 7, 9), rows, foot,
    )  # fmt: skip


def _histogram(counts: Sequence[int], sparks: str) -> list[Text]:
    found = histogram.bounds(counts)
    if found is None:
        return [Text("RT requests with a deadline: none so far", "dim")]
    first, last = found
    top = max(counts)
    bars = "".join(
        sparks[-(-number * (len(sparks) - 1) // top)] for number in counts[first : last + 1]
    )
    total = sum(counts)
    half, most = histogram.percentile(counts, 0.5), histogram.percentile(counts, 0.99)
    return [
        Text.assemble(
            f"RT latency {format_ns(1 << first)} ",
            (bars, "cyan"),
            f" {format_ns(2 << last)}  {total} requests, p50 < {format_ns(half or 0)},"
            f" p99 < {format_ns(most or 0)}",
        )
    ]


def _value(group: str, file: str, value: int | str) -> str:
    if isinstance(value, str):
        return value.splitlines()[0] if value else "-"
    kind = unit(group, file)
    if kind == "bytes":
        return format_quota(value)
    return format_ns(value) if kind == "ns" else str(value)


def _pairs(now: Sample, before: Sample | None, name: str, width: int) -> list[Text]:
    """Write a group as pairs, without what is 0: modules differ in what they have."""
    line = Text(name, "bold")
    for file, value in now.groups[name].values.items():
        if value == 0:
            continue
        line.append(f"  {file} ", "dim").append(_value(name, file, value))
        rate = counter_rate(before, now, name, file)
        if rate and not unit(name, file):
            line.append(f" ({_rate(rate)})")
    return list(line.wrap(Console(width=width), width))


def _others(now: Sample, before: Sample | None, width: int) -> list[Text]:
    """Write pressure, bandwidth and the cores that have a budget."""
    names = [name for name in ("pressure", "bandwidth") if name in now.groups]
    names += [n for n in now.groups if re.fullmatch(r"core\d+", n) and now.get(n, "budget")]
    return [line for name in names for line in _pairs(now, before, name, width)]


def _share(sections: Sequence[_Section], room: int) -> list[int]:
    """Return how many rows each may show: one each first, then in turn."""
    shown = [0] * len(sections)
    room -= sum(section.lines(0) for section in sections)
    while room > 0:
        grew = False
        for number, section in enumerate(sections):
            if room > 0 and shown[number] < len(section.rows):
                shown[number] += 1
                room -= 1
                grew = True
        if not grew:
            break
    return shown


def frame(
    now: Sample, before: Sample | None, view: View, width: int, height: int, *, plain: bool = False
) -> list[RenderableType]:
    """Make the picture: at most ``height`` lines of ``width`` columns.

    Args:
        now: the newest sample.
        before: the one before it, for what happens in a second; None at the beginning.
        view: what the user has chosen.
        width: columns.
        height: lines.
        plain: only ASCII.
    """
    parts: list[RenderableType] = [_header(now, view, width)]
    foot = Text(view.message or "q quit  s sort  r relieve  space pause  h help", "reverse")
    foot.truncate(width, overflow="ellipsis")
    if not view.message:
        foot.append(f"  sorted by {view.order}", "reverse")
        foot.truncate(width)
    if view.help:
        body: list[RenderableType] = [Text(line) for line in HELP.splitlines()]
        return [*parts, *body[: height - 2], foot]
    parts.append(_bar(now, width))
    clients = _clients(now)
    sparks = _PLAIN_SPARKS if plain else _SPARKS
    found = [_pools(now, before), _kv(now, before), _slots(now), _rt(now, before, sparks)]
    sections = [section for section in found if section is not None]
    others = _others(now, before, width)
    if clients is not None:
        others.insert(0, clients)
    room = height - len(parts) - 1
    # the tables keep their heads and a row each
    least = sum(section.lines(min(1, len(section.rows))) for section in sections)
    others = others[: max(0, room - least)]
    shown = _share(sections, room - len(others))
    for section, rows in zip(sections, shown, strict=True):
        parts += section.render(rows, view.order)
    return [*parts, *others, foot]


def lines(console: Console, parts: Sequence[RenderableType], height: int) -> list[str]:
    """Return the picture's lines as the terminal gets them, at most so many."""
    with console.capture() as captured:
        for part in parts:
            console.print(part, crop=True, overflow="ellipsis", no_wrap=True, highlight=False)
    made = captured.get().split("\n")[:-1]
    # what has to go, goes above the last line
    return made if len(made) <= height else [*made[: height - 1], made[-1]]


class Painter:
    """Sends pictures to a terminal: only the lines that changed."""

    def __init__(self, out: TextIO, size: Callable[[], tuple[int, int]]) -> None:
        """Begin with a terminal that shows nothing of ours.

        Args:
            out: the terminal.
            size: returns its columns and lines.
        """
        self._out = out
        self._size = size
        self._shown: list[str] = []
        self._extent = (0, 0)
        self._console = Console(file=out, force_terminal=True, legacy_windows=False)

    @property
    def plain(self) -> bool:
        """Whether the terminal takes ASCII only."""
        return not self._console.encoding.lower().startswith("utf")

    def enter(self) -> None:
        """Take the terminal's other screen, and hide the cursor."""
        self._out.write("\x1b[?1049h\x1b[?25l")
        self._extent = (0, 0)

    def leave(self) -> None:
        """Give both back."""
        self._out.write("\x1b[?25h\x1b[?1049l")
        self._out.flush()

    def paint(self, make: Callable[[int, int], Sequence[RenderableType]]) -> int:
        """Show what ``make(width, height)`` returns; return the characters it took."""
        extent = self._size()
        width, height = extent
        self._console.size = (width, height)
        made = lines(self._console, make(width, height), height)
        # the keys stand at the foot of the screen
        made[-1:] = [*[""] * (height - len(made)), *made[-1:]]
        sent = []
        if extent != self._extent:
            sent.append("\x1b[2J")
            self._shown, self._extent = [""] * height, extent
        for number, (old, new) in enumerate(zip(self._shown, made, strict=True), 1):
            if old != new:
                # the rest of the line is cleared first: behind a full one that would take its last
                sent.append(f"\x1b[{number};1H\x1b[K{new}")
        self._shown = made
        text = "".join(sent)
        if text:
            self._out.write(text)
            self._out.flush()
        return len(text)
