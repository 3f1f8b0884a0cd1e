# SPDX-License-Identifier: MIT
"""Pictures of the pools: text for a terminal, PNG by matplotlib."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any, BinaryIO

import click

from . import errors, system
from .layout import Chunk
from .units import format_size

__all__ = ["Summary", "check", "draw", "legend", "png", "summary"]

#: Cells of a chunk of the buddy pool, unless it has fewer pages, and of a row of whole chunks.
CELLS = 64

#: Letter and colour of a chunk: of who has it whole, or of what it is else.
_CHUNKS = {
    "weights": ("W", "blue"), "kv": ("K", "bright_magenta"), "activations": ("A", "magenta"),
    "protocol": ("P", "cyan"), "cache": ("C", "bright_green"), "model": ("M", "bright_blue"),
    "rt": ("R", "bright_cyan"), "module": ("O", "yellow"), "buddy": ("b", "green"),
    "zeroed": ("z", "bright_black"), "dirty": ("d", "bright_black"), "split": ("s", "bright_black"),
    "zeroing": ("~", "bright_black"),
}  # fmt: skip

_WORDS = {
    "weights": "weights", "kv": "kv", "activations": "activations", "protocol": "protocol",
    "cache": "KV cache", "model": "model slot", "rt": "RT pool", "module": "other modules",
    "buddy": "buddy pool", "zeroed": "ready, zeroed", "dirty": "ready", "split": "ready, split",
    "zeroing": "being zeroed",
}  # fmt: skip

#: How full a cell is, from nothing to all.
_FULL = " ▂▄▆█"
_FULL_PLAIN = ".-=+#"

#: What a page of a chunk of the buddy pool can be, and its colour.
_FREE, _MOVABLE, _FIXED, _ARRIVING, _SHOWN = range(5)
_PAGE_COLOURS = ("bright_black", "green", "red", "magenta", "bright_yellow")
_PAGE_WORDS = (
    "free", "used", "used and not to be moved", "compaction moves there", "of the tensor",
)  # fmt: skip

#: A free page of a chunk in the buddy pool, on paper.
_HOLE = "#eef0f2"

#: The other colours on paper.
_PAPER = {
    "blue": "#1769aa", "green": "#2e7d32", "magenta": "#8e24aa", "cyan": "#00838f",
    "bright_green": "#7cb342", "bright_blue": "#64b5f6", "bright_cyan": "#4dd0e1",
    "yellow": "#e3a008", "red": "#c62828", "bright_magenta": "#ec407a", "bright_black": "#b4bec8",
    "bright_yellow": "#212121",
}  # fmt: skip


@dataclass(frozen=True)
class Summary:
    """What the chunks add up to.

    Attributes:
        whole: chunks in use as whole chunks.
        buddy: chunks that the buddy pool has.
        ready: chunks in nobody's use.
        used_pages: pages used in chunks of the buddy pool.
        free_pages: pages free in them.
        holes: stretches of free pages in them.
        largest: pages of the longest hole.
    """

    whole: int
    buddy: int
    ready: int
    used_pages: int
    free_pages: int
    holes: int
    largest: int


def _kind(chunk: Chunk) -> str:
    return chunk.purpose or chunk.state


def _marked(chunk: Chunk, page_size: int, shown: Set[int]) -> bool:
    """Whether any page of a whole chunk is to be marked: a tensor need not begin with it."""
    pages = range(chunk.frame, chunk.frame + system.CHUNK_SIZE // page_size)
    return chunk.state == "chunk" and not shown.isdisjoint(pages)


def _pages(chunk: Chunk, page_size: int, shown: Set[int]) -> list[int]:
    """Return what each page of a chunk of the buddy pool is."""
    pages = [_FREE] * (system.CHUNK_SIZE // page_size)
    for run in chunk.runs:
        what = _ARRIVING if run.arriving else _MOVABLE if run.movable else _FIXED
        pages[run.index : run.index + run.pages] = [what] * run.pages
    if shown:
        for index in range(len(pages)):
            if chunk.frame + index in shown:
                pages[index] = _SHOWN
    return pages


def _holes(chunk: Chunk, page_size: int) -> list[int]:
    """Return the lengths of the free stretches in a chunk of the buddy pool."""
    at, found = 0, []
    for run in chunk.runs:
        found.append(run.index - at)
        at = run.index + run.pages
    found.append(system.CHUNK_SIZE // page_size - at)
    return [length for length in found if length]


def summary(chunks: Sequence[Chunk], page_size: int) -> Summary:
    """Add up what chunks are used for."""
    buddy = [chunk for chunk in chunks if chunk.state == "buddy"]
    whole = sum(chunk.state == "chunk" for chunk in chunks)
    used = sum(chunk.used(page_size) for chunk in buddy)
    holes = [length for chunk in buddy for length in _holes(chunk, page_size)]
    return Summary(
        whole, len(buddy), len(chunks) - whole - len(buddy), used,
        len(buddy) * (system.CHUNK_SIZE // page_size) - used, len(holes), max(holes, default=0),
    )  # fmt: skip


def _row(cells: Iterable[tuple[str, tuple[str, str | None]]]) -> str:
    """Join cells of one character and two colours."""
    return "".join(
        click.style("".join(character for character, _ in alike), fg=colours[0], bg=colours[1])
        for colours, alike in itertools.groupby(cells, lambda cell: cell[1])
    )


def _strip(chunks: Sequence[Chunk], page_size: int, shown: Set[int]) -> Iterator[str]:
    for begin in range(0, len(chunks), CELLS):
        cells = []
        for chunk in chunks[begin : begin + CELLS]:
            letter, colour = _CHUNKS[_kind(chunk)]
            colours = ("white", colour)
            if _marked(chunk, page_size, shown):
                colours = ("black", _PAGE_COLOURS[_SHOWN])
            cells.append((letter, colours))
        yield f"  {_row(cells)}"


def _cells(pages: Sequence[int], plain: bool) -> str:
    glyphs = _FULL_PLAIN if plain else _FULL
    each, cells = max(1, len(pages) // CELLS), []
    for begin in range(0, len(pages), each):
        part = pages[begin : begin + each]
        used = sum(page != _FREE for page in part)
        glyph = glyphs[-(-used * (len(glyphs) - 1) // each)]
        # what is rarer matters more
        cells.append((glyph, (_PAGE_COLOURS[max(part)], None if plain else "black")))
    return _row(cells)


def draw(
    chunks: Sequence[Chunk], page_size: int, *, shown: Set[int] = frozenset(), plain: bool = False
) -> Iterator[str]:
    """Yield the lines of a picture: a cell for each chunk, then a row for each of the buddy pool.

    Args:
        chunks: what to draw.
        page_size: the kernel's.
        shown: frames of the pages to mark.
        plain: only ASCII.
    """
    total = summary(chunks, page_size)
    yield click.style(
        f"chunks of 2 MiB: {total.whole} whole, {total.buddy} in the buddy pool,"
        f" {total.ready} ready", bold=True,
    )  # fmt: skip
    for node in sorted({chunk.node for chunk in chunks}):
        yield from _strip([chunk for chunk in chunks if chunk.node == node], page_size, shown)
    if not total.buddy:
        return
    each = format_size(max(page_size, system.CHUNK_SIZE // CELLS))
    yield ""
    yield click.style(
        f"buddy pool, {each} a cell: {format_size(total.used_pages * page_size)} used,"
        f" {format_size(total.free_pages * page_size)} free in holes up to"
        f" {format_size(total.largest * page_size)}", bold=True,
    )  # fmt: skip
    for chunk in chunks:
        if chunk.state == "buddy":
            pages = _pages(chunk, page_size, shown)
            used = 100 * chunk.used(page_size) // len(pages)
            name = f"{chunk.node}:{chunk.number}"
            yield f"  {name:>6} {_cells(pages, plain)} {used:3} %"


def legend(chunks: Sequence[Chunk], *, marked: bool = False, width: int = 78) -> Iterator[str]:
    """Yield what the letters and colours mean, of those there are."""
    parts = []
    present = {_kind(chunk) for chunk in chunks}
    for kind, (letter, colour) in _CHUNKS.items():
        if kind in present:
            parts.append((letter, colour, _WORDS[kind]))
    line, length = " ", 1
    for letter, colour, words in parts:
        if length + len(words) + 4 > width:
            yield line
            line, length = " ", 1
        line += f" {click.style(letter, fg='white', bg=colour)} {words} "
        length += len(words) + 4
    yield line
    runs = [run for chunk in chunks for run in chunk.runs]
    if not runs:
        return
    there = {
        _MOVABLE: any(run.movable for run in runs), _FIXED: any(not run.movable for run in runs),
        _ARRIVING: any(run.arriving for run in runs), _SHOWN: marked,
    }  # fmt: skip
    meant = [
        click.style(_PAGE_WORDS[what], fg=_PAGE_COLOURS[what]) for what in there if there[what]
    ]
    yield "  pages: " + ", ".join(meant)


# -- on paper --------------------------------------------------------------------------


def _matplotlib(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "matplotlib":
            raise
        raise errors.TensormemError(
            "a PNG is drawn with the Python package matplotlib, which is missing",
            "install it: 'sudo apt install python3-matplotlib', or 'pip install"
            " tensormem[report]'; without --png the map is drawn here",
        ) from None


def check() -> None:
    """Ask for what :func:`png` takes, before anything is done for its picture.

    Raises:
        TensormemError: matplotlib is missing.
    """
    _matplotlib("matplotlib.figure")


def _paper(page: int) -> str:
    return _HOLE if page == _FREE else _PAPER[_PAGE_COLOURS[page]]


def _pixels(chunk: Chunk, page_size: int, shown: Set[int]) -> list[str]:
    """Return the colour of each page."""
    if chunk.state == "buddy":
        return [_paper(page) for page in _pages(chunk, page_size, shown)]
    marked = _marked(chunk, page_size, shown)
    colour = _paper(_SHOWN) if marked else _PAPER[_CHUNKS[_kind(chunk)][1]]
    return [colour] * (system.CHUNK_SIZE // page_size)


def png(
    file: BinaryIO, maps: Sequence[tuple[str, Sequence[Chunk], Set[int]]], page_size: int
) -> None:
    """Draw maps side by side, a row for each chunk and a column for each page.

    Args:
        file: where to write.
        maps: of each its title, its chunks, and what to mark as in :func:`draw`.
        page_size: the kernel's.

    Raises:
        TensormemError: matplotlib is missing.
    """
    figures, colors = _matplotlib("matplotlib.figure"), _matplotlib("matplotlib.colors")
    patches = _matplotlib("matplotlib.patches")
    rows = max(len(chunks) for _, chunks, _ in maps)
    figure = figures.Figure(figsize=(1 + 5.5 * len(maps), min(40.0, 1.6 + 0.2 * rows)), dpi=100)
    figure.set_layout_engine("constrained")
    meanings: dict[str, str] = {}  # in words -> colour
    sides = figure.subplots(1, len(maps), squeeze=False)[0]
    for axes, (title, chunks, shown) in zip(sides, maps, strict=True):
        blank = [["#ffffff"] * (system.CHUNK_SIZE // page_size)]
        # both of the same height, so that a chunk is as tall here as there
        lines = [_pixels(chunk, page_size, shown) for chunk in chunks]
        lines += blank * (max(rows, 1) - len(lines))
        axes.imshow([colors.to_rgba_array(line) for line in lines], aspect="auto",
                    interpolation="nearest")  # fmt: skip
        total = summary(chunks, page_size)
        axes.set_title(
            f"{title}: {total.whole} whole, {total.buddy} in the buddy pool, {total.ready} ready",
            fontsize=9,
        )
        axes.set_xticks([0, len(blank[0]) // 2, len(blank[0]) - 1],
                        ["0", "1 MiB", "2 MiB"], fontsize=8)  # fmt: skip
        step = max(1, -(-len(chunks) // 48))
        axes.set_yticks(range(0, len(chunks), step),
                        [f"{c.node}:{c.number}" for c in chunks[::step]], fontsize=7)  # fmt: skip
        axes.set_yticks([i - 0.5 for i in range(1, rows)], minor=True)
        axes.grid(which="minor", axis="y", color="#ffffff", linewidth=1)
        axes.tick_params(which="both", length=0)
        for chunk in chunks:
            if chunk.state == "buddy":
                for page in sorted(set(_pages(chunk, page_size, shown)) - {_SHOWN}):
                    meanings[f"buddy pool: {_PAGE_WORDS[page]}"] = _paper(page)
            elif chunk.state == "chunk":
                meanings[_WORDS[_kind(chunk)]] = _PAPER[_CHUNKS[_kind(chunk)][1]]
            else:
                meanings["ready"] = _PAPER[_CHUNKS[_kind(chunk)][1]]
        if shown:
            meanings[_PAGE_WORDS[_SHOWN]] = _paper(_SHOWN)
    handles = [patches.Patch(color=c, label=label) for label, c in meanings.items()]
    if handles:
        figure.legend(
            handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8
        )
    figure.savefig(file, format="png")
