# SPDX-License-Identifier: MIT
"""One page of a recorded run: plots as SVG inside it, nothing to fetch, light and dark.

matplotlib draws with placeholder colours, which become the page's CSS variables: so one drawing
serves both schemes, and the text in it stays text.
"""

from __future__ import annotations

import io
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator

from . import histogram, system
from .recording import Recording, Sample, unit
from .units import format_ns, format_size

__all__ = ["POINTS", "page"]

#: Points of a line, at most twice: of a longer run each is a stretch, with its two extremes.
POINTS = 1000

#: Lines of one plot: more nobody can tell apart.
LINES = 6

_INK, _GRID = "#010101", "#020202"
_COLOURS = [f"#0300{number:02x}" for number in range(LINES)]
_VARIABLES = {_INK: "--ink", _GRID: "--grid"} | {c: f"--c{n}" for n, c in enumerate(_COLOURS)}

#: States of a generation, in the order of the colours.
_STATES = ("active", "staged", "loading", "previous", "retired", "failed")

#: Likewise of levels of pressure.
_LEVELS = {"none": 2, "low": 4, "critical": 1}

_STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "tensormem", "path.simplify": False,
    "font.family": "sans-serif", "font.size": 9.0, "axes.titlesize": 10.0,
    "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _GRID, "grid.color": _GRID,
    "xtick.color": _INK, "ytick.color": _INK, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6, "legend.frameon": False, "legend.fontsize": 8.0,
}  # fmt: skip

_CSS = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1c2024;--grid:#c9ced4;--soft:#5b6570;
--c0:#1769aa;--c1:#c2410c;--c2:#2e7d32;--c3:#8e24aa;--c4:#9a6700;--c5:#c2185b}
@media(prefers-color-scheme:dark){:root{--paper:#15181c;--ink:#e6e9ec;--grid:#3d444c;
--soft:#9aa4ae;--c0:#64b5f6;--c1:#ff9e64;--c2:#81c784;--c3:#d69be8;--c4:#e3c04f;--c5:#f48fb1}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:72rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.4rem;margin:.2rem 0}h2{font-size:1.1rem;margin:2rem 0 .3rem}
p{margin:.3rem 0}.soft{color:var(--soft)}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:1rem}
figure{margin:0;min-width:0}figure svg{display:block;width:100%;height:auto}
details{font-size:.85rem}table{border-collapse:collapse;width:100%}
td,th{text-align:right;padding:.1rem .5rem;border-top:1px solid var(--grid)}
td:first-child,th:first-child{text-align:left}div.table{overflow-x:auto}
"""

_Show = Callable[[float], str]


@dataclass(frozen=True)
class _Line:
    """A value over time; NaN where there was none."""

    label: str
    values: Sequence[float]
    dashed: bool = False


@dataclass
class _Section:
    title: str
    figures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.3g}"


def _size(value: float) -> str:
    return format_size(int(value))


def _percent(value: float) -> str:
    return f"{value:.4g} %"


def _rate(value: float) -> str:
    return f"{_number(value)}/s"


def _thin(times: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Leave of a long line the lowest and the highest of each stretch."""
    if len(values) <= 2 * POINTS:
        return list(times), list(values)
    kept: list[int] = []
    for number in range(POINTS):
        stretch = range(number * len(values) // POINTS, (number + 1) * len(values) // POINTS)
        known = [i for i in stretch if not math.isnan(values[i])]
        if known:
            kept += sorted({min(known, key=values.__getitem__), max(known, key=values.__getitem__)})
        else:
            kept.append(stretch[0])
    return [times[i] for i in kept], [values[i] for i in kept]


def _svg(figure: Figure, label: str) -> str:
    """Return the drawing as part of a page."""
    out = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    head, rest = text.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    # its own numbering begins anew in each drawing, and a page has each id once
    rest = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", rest)
    for colour, variable in _VARIABLES.items():
        rest = rest.replace(colour, f"var({variable})")
    return f'{head} role="img" aria-label="{escape(label, quote=True)}">{rest}'


class _Page:
    """What the sections of one recording are made with."""

    def __init__(self, recording: Recording) -> None:
        self.samples = recording.samples
        start = self.samples[0].time
        self.times = [sample.time - start for sample in self.samples]
        self._names = 0

    def numbers(self, group: str, name: str, size: int = 1) -> list[float]:
        """Return a value over time."""
        found = (sample.get(group, name) for sample in self.samples)
        return [math.nan if value is None else value * size for value in found]

    def rates(self, values: Sequence[float]) -> list[float]:
        """Return how fast a counter grew up to each sample; one that fell began anew."""
        found = [math.nan]
        for old, new, begin, end in zip(
            values, values[1:], self.times, self.times[1:], strict=False
        ):
            known = end > begin and new >= old
            found.append((new - old) / (end - begin) if known else math.nan)
        return found

    def _figure(self, title: str, height: float, measured: bool = False) -> tuple[Figure, Axes]:
        """Begin a drawing; to measure its labels takes longer than all the rest."""
        figure = Figure(figsize=(4.8, height), layout="constrained" if measured else None)
        axes = figure.add_subplot()
        if not measured:
            figure.subplots_adjust(left=0.16, right=0.98, top=0.9, bottom=0.27)
        axes.set_title(title, loc="left")
        return figure, axes

    def _time_axis(self, axes: Axes) -> None:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _moment(value)))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        if self.times[-1] > 0:
            axes.set_xlim(0, self.times[-1])

    def _frame(self, drawing: str, table: str) -> str:
        inside = f'<div class="table">{table}</div>'
        return f"<figure>{drawing}<details><summary>Figures</summary>{inside}</details></figure>"

    def lines(self, title: str, lines: Sequence[_Line], show: _Show) -> str | None:
        """Draw lines over time; None where no line has a value."""
        lines = [line for line in lines if not all(map(math.isnan, line.values))]
        if not lines:
            return None
        with mpl.rc_context(_STYLE):
            figure, axes = self._figure(title, 2.6)
            for number, line in enumerate(lines):
                self._names += 1
                x, y = _thin(self.times, line.values)
                drawn = axes.plot(
                    x, y, label=line.label, color=_COLOURS[number % LINES],
                    linestyle="--" if line.dashed else "-",
                    marker="." if len(x) == 1 else "",
                )[0]  # fmt: skip
                drawn.set_gid(f"line{self._names}")
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: show(max(0.0, value))))
            if show is _size:
                # round in binary units
                top = max(v for line in lines for v in line.values if not math.isnan(v))
                step = 2.0 ** math.ceil(math.log2(max(top, 1) / 5))
                axes.yaxis.set_major_locator(MultipleLocator(step))
            else:
                axes.yaxis.set_major_locator(MaxNLocator(5, integer=show is _number))
            self._time_axis(axes)
            axes.legend(loc="upper left", bbox_to_anchor=(0, -0.12), ncols=3)
            drawing = _svg(figure, title)
        rows = []
        for line in lines:
            known = [value for value in line.values if not math.isnan(value)]
            cells = (known[0], min(known), max(known), known[-1])
            rows.append((line.label, *map(show, cells), str(len(known))))
        head = ("", "first", "lowest", "highest", "last", "samples")
        return self._frame(drawing, _table(head, rows))

    def bars(self, title: str, counts: Sequence[int], colour: str) -> str | None:
        """Draw a histogram of times; None for an empty one."""
        found = histogram.bounds(counts)
        if found is None:
            return None
        buckets = range(found[0], found[1] + 1)
        labels = [f"< {format_ns(2 << bucket)}" for bucket in buckets]
        with mpl.rc_context(_STYLE):
            figure, axes = self._figure(title, 2.6)
            self._names += 1
            heights = [counts[bucket] for bucket in buckets]
            for number, bar in enumerate(axes.bar(range(len(buckets)), heights, color=colour)):
                bar.set_gid(f"bar{self._names}-{number}")
            axes.set_yscale("symlog", linthresh=1)
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
            step = -(-len(labels) // 6)
            axes.set_xticks(range(0, len(labels), step), labels[::step], rotation=20, ha="right")
            drawing = _svg(figure, title)
        rows = [(label, str(counts[b])) for label, b in zip(labels, buckets, strict=True)]
        return self._frame(drawing, _table(("time", "requests"), rows))

    def spans(self, title: str, rows: Mapping[str, Sequence[str | None]]) -> str:
        """Draw for each row which state it was in, and when."""
        table = []
        with mpl.rc_context(_STYLE):
            figure, axes = self._figure(title, 1.3 + 0.22 * len(rows), measured=True)
            seen: set[str] = set()
            for place, (name, states) in enumerate(rows.items()):
                for state, begin, end in _runs(states, self.times):
                    self._names += 1
                    known = {s: n for n, s in enumerate(_STATES)} | _LEVELS
                    colour = _COLOURS[known.get(state, -1)]
                    bars = axes.broken_barh(
                        [(begin, end - begin)], (place - 0.35, 0.7), facecolors=colour,
                        label="" if state in seen else state,
                    )  # fmt: skip
                    bars.set_gid(f"span{self._names}")
                    seen.add(state)
                    table.append((name, state, _moment(begin), _moment(end)))
            axes.set_yticks(range(len(rows)), list(rows))
            axes.set_ylim(len(rows) - 0.5, -0.5)
            self._time_axis(axes)
            axes.legend(loc="upper left", bbox_to_anchor=(0, -0.25), ncols=4)
            drawing = _svg(figure, title)
        return self._frame(drawing, _table(("generation", "state", "from", "to"), table))


def _moment(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _runs(
    states: Sequence[str | None], times: Sequence[float]
) -> Iterator[tuple[str, float, float]]:
    """Yield each state with its begin, and its end: the first sample that shows another."""
    begin = 0
    for now in range(1, len(states) + 1):
        if now == len(states) or states[now] != states[begin]:
            state = states[begin]
            if state is not None:
                yield state, times[begin], times[min(now, len(times) - 1)]
            begin = now


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def row(cells: Sequence[str], kind: str) -> str:
        return "<tr>" + "".join(f"<{kind}>{escape(c)}</{kind}>" for c in cells) + "</tr>"

    return f"<table>{row(head, 'th')}{''.join(row(each, 'td') for each in rows)}</table>"


def _pools(page: _Page) -> _Section:
    section = _Section("Pools over time")
    chunk, size = system.CHUNK_SIZE, page.samples[0].page_size
    used = [
        _Line("capacity", page.numbers("chunk", "capacity", chunk), dashed=True),
        _Line("held", page.numbers("chunk", "total", chunk)),
        _Line("ready", page.numbers("chunk", "free", chunk)),
        _Line("large tensors", page.numbers("chunk", "used", chunk)),
        _Line("buddy pool", page.numbers("buddy", "chunks", chunk)),
    ]
    inside = [
        _Line("buddy, used", page.numbers("buddy", "used_pages", size)),
        _Line("buddy, free", page.numbers("buddy", "free_pages", size)),
        _Line("slab", page.numbers("slab", "pages", size)),
        _Line("kv", page.numbers("kv", "held")),
        _Line("rt", page.numbers("rt", "used")),
    ]
    moved = [
        _Line(what, page.rates(page.numbers("chunk", name)))
        for name, what in (("grown", "taken"), ("shrunk", "given back"), ("grow_failed", "refused"))
    ]
    _add(section, page.lines("Chunk pool", used, _size))
    _add(section, page.lines("Inside the pools", inside, _size))
    _add(section, page.lines("Chunks from and to the system", moved, _rate))
    return section


def _add(section: _Section, figure: str | None) -> None:
    if figure is not None:
        section.figures.append(figure)


def _clients(page: _Page) -> _Section:
    section = _Section("Clients")
    held = [
        _Line("held", page.numbers("clients", "bytes")),
        _Line("kept for reuse", page.numbers("clients", "kept")),
    ]
    count = [
        _Line("clients", page.numbers("clients", "count")),
        _Line("tensors", page.numbers("clients", "tensors")),
    ]
    _add(section, page.lines("Memory of all clients", held, _size))
    _add(section, page.lines("Clients and tensors", count, _number))
    return section


def _kv(page: _Page) -> _Section:
    section = _Section("KV caches")
    values: dict[int, list[Mapping[str, int]]] = {}
    names: dict[int, str] = {}
    for number, sample in enumerate(page.samples):
        for cache in sample.kv.caches:
            seen = values.setdefault(cache.id, [{}] * len(page.samples))
            seen[number] = cache.values
            names[cache.id] = " ".join([str(cache.id), *(u.command for u in cache.users[:1])])
    hidden = max(sample.kv.hidden for sample in page.samples)
    if hidden:
        section.notes.append(f"Not recorded: KV caches of {hidden} processes of other users."
                             " Record as root to have them.")  # fmt: skip
    if not values:
        return section

    def line(cache: int, name: str) -> list[float]:
        return [float(each.get(name, math.nan)) for each in values[cache]]

    def largest(cache: int) -> float:
        return max((v for v in line(cache, "held") if not math.isnan(v)), default=0)

    chosen = sorted(sorted(values, key=largest, reverse=True)[:LINES])
    if len(values) > LINES:
        section.notes.append(f"Drawn are the {LINES} largest of {len(values)} caches.")
    rates, held = [], []
    for number in chosen:
        hits, lookups = line(number, "hits"), line(number, "lookups")
        recent = [math.nan]
        for before, now in zip(
            zip(hits, lookups, strict=True), list(zip(hits, lookups, strict=True))[1:], strict=False
        ):
            asked = now[1] - before[1]
            recent.append(100 * (now[0] - before[0]) / asked if asked > 0 else math.nan)
        # between two looks nothing may have been asked: the last figure stands
        for place in range(1, len(recent)):
            if math.isnan(recent[place]) and not math.isnan(lookups[place]):
                recent[place] = recent[place - 1]
        rates.append(_Line(names[number], recent))
        held.append(_Line(names[number], line(number, "held")))
    rate = page.lines("Blocks found of those asked for by hash", rates, _percent)
    if rate is None:
        section.notes.append("No block was asked for by its hash, so there is no hit rate.")
    _add(section, rate)
    _add(section, page.lines("Memory held", held, _size))
    return section


def _slots(page: _Page) -> _Section:
    section = _Section("Model slots")
    rows: dict[str, list[str | None]] = {}
    for number, sample in enumerate(page.samples):
        for slot in sample.slots:
            for generation in slot.generations:
                name = f"{slot.name} {generation.number}"
                rows.setdefault(name, [None] * len(page.samples))[number] = generation.state
    if len(rows) > 40:
        section.notes.append(f"Drawn are the last 40 of {len(rows)} generations.")
        rows = dict(list(rows.items())[-40:])
    if rows:
        section.figures.append(page.spans("Generations and their states", rows))
    held = [_Line("held", page.numbers("model", "held"))]
    _add(section, page.lines("Memory of resident generations", held, _size))
    return section


def _grown(first: Sequence[int], last: Sequence[int]) -> list[int]:
    """Return what came in between; all of it where the counts began anew."""
    both = list(zip(first, last, strict=False))
    if len(first) != len(last) or any(new < old for old, new in both):
        return list(last)
    return [new - old for old, new in both]


def _rt(page: _Page) -> _Section:
    section = _Section("RT pool")
    pools = [sample.rt for sample in page.samples if sample.rt is not None]
    if not pools:
        return section
    latency = _grown(pools[0].latency, pools[-1].latency)
    missed = _grown(pools[0].missed, pools[-1].missed)
    drawn = page.bars("Requests with a deadline: time until the block was there", latency,
                      _COLOURS[0])  # fmt: skip
    if drawn is None:
        section.notes.append("No request with a deadline was made during the recording.")
    _add(section, drawn)
    _add(section, page.bars("Deadlines missed: the time they had", missed, _COLOURS[1]))
    used = [
        _Line("set aside", page.numbers("rt", "held")),
        _Line("in arenas", page.numbers("rt", "used")),
    ]
    _add(section, page.lines("Memory", used, _size))
    counts = [
        _Line(what, page.rates(page.numbers("rt", name)))
        for name, what in (("allocs", "blocks"), ("waits", "waited"), ("misses", "missed"),
                           ("refused", "refused"))
    ]  # fmt: skip
    _add(section, page.lines("Requests", counts, _rate))
    return section


def _other(page: _Page, groups: str, title: str) -> _Section:
    """Draw groups whose files differ between modules: sizes, what only grows, the rest."""
    section = _Section(title)
    files = sorted(
        {
            (name, file)
            for sample in page.samples
            for name, found in sample.groups.items()
            if re.fullmatch(groups, name)
            for file, value in found.values.items()
            if isinstance(value, int) and value < 1 << 63  # above: no bound
        }
    )
    sizes, moved, rates, levels = [], [], [], []
    for name, file in files:
        label = f"{name} {file}" if name.startswith("core") else file
        values = page.numbers(name, file)
        known = [value for value in values if not math.isnan(value)]
        grows = known == sorted(known) and known[0] != known[-1]
        if not any(known):
            continue  # nothing ever happened there
        kind = unit(name, file)
        if kind == "bytes" and file.endswith(("_bytes", "_given")):
            moved.append(_Line(label, page.rates(values)))
        elif kind == "bytes":
            sizes.append(_Line(label, values))
        elif kind == "ns":
            shares = [rate / 1e7 for rate in page.rates(values)]
            levels.append(_Line(f"{label.removesuffix('_ns')} (% of the time)", shares))
        elif grows:
            rates.append(_Line(label, page.rates(values)))
        else:
            levels.append(_Line(label, values))
    words = [sample.text("pressure", "level") for sample in page.samples]
    if groups == "pressure" and any(words):
        section.figures.append(page.spans("Level", {"level": [word or None for word in words]}))
    for what, lines, show in (
        ("Sizes", sizes, _size), ("Bytes in a second", moved, _size), ("Events", rates, _rate),
        ("Values", levels, _number),
    ):  # fmt: skip
        for number in range(0, len(lines), LINES):
            _add(section, page.lines(what, lines[number : number + LINES], show))
    if files and not section.figures:
        section.notes.append("Nothing happened there.")
    return section


#: Of each section: what it is about when it was not recorded, and why that may be.
_MISSING = {
    "Pools over time": "the module's sysfs shows no pools",
    "Clients": "the module's sysfs shows no clients",
    "KV caches": "no KV cache was open",
    "Model slots": "the module had no model slots",
    "RT pool": "the module has no RT pool",
    "Pressure": "the module has no pressure relief",
    "Bandwidth": "the module does not measure bandwidth",
}


def page(recording: Recording, title: str) -> str:
    """Return the page of a recorded run.

    Args:
        recording: the run.
        title: its heading, for example the file's name.
    """
    made = _Page(recording)
    first, last = recording.samples[0], recording.samples[-1]
    sections = (
        _pools(made), _clients(made), _kv(made), _slots(made), _rt(made),
        _other(made, "pressure", "Pressure"), _other(made, r"bandwidth|core\d+", "Bandwidth"),
    )  # fmt: skip
    body = [
        f"<h1>tensormem: {escape(title)}</h1>",
        f'<p class="soft">{escape(_about(first, last, len(recording.samples)))}</p>',
    ]
    if recording.cut_off:
        body.append("<p>The last line of the file was cut off and is left out.</p>")
    if len(recording.samples) > 2 * POINTS:
        body.append(
            f"<p>Of the {len(recording.samples)} samples each line shows the lowest and the highest"
            f" of {POINTS} stretches.</p>"
        )
    for section in sections:
        notes = list(section.notes)
        if not section.figures and not notes:
            notes.append(f"Not recorded: {_MISSING[section.title]}.")
        body.append(f"<section><h2>{escape(section.title)}</h2>")
        body += [f"<p>{escape(note)}</p>" for note in notes]
        if section.figures:
            body.append(f'<div class="plots">{"".join(section.figures)}</div>')
        body.append("</section>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        # no request of any kind, not even for an icon
        '<link rel="icon" href="data:,">'
        f"<title>tensormem: {escape(title)}</title><style>{_CSS}</style></head><body>"
        + "\n".join(body)
        + "</body></html>\n"
    )


def _about(first: Sample, last: Sample, count: int) -> str:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(first.time))
    board = first.text("board", "name")
    on = f"{board}, Linux {first.kernel}" if board else f"Linux {first.kernel}"
    samples = "sample" if count == 1 else "samples"
    span = _moment(last.time - first.time)
    return f"{when}, {span}, {count} {samples}; {on}, pages of {format_size(first.page_size)}"
