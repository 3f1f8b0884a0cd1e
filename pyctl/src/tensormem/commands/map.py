# SPDX-License-Identifier: MIT
"""``tensormem map``: what the pools look like."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from .. import layout, picture, system
from ..console import Command, emit, json_option, replacing, table
from ..units import format_size

__all__ = ["map_command", "place"]

_NAME = re.compile(r"(\d{1,10}):(\d{1,10})", re.ASCII)


def place(text: str) -> layout.Place | None:
    """Find the tensor that ``PID:HANDLE`` names; None for something else."""
    match = _NAME.fullmatch(text)
    return None if match is None else layout.find(int(match[1]), int(match[2]))


def _document(chunk: layout.Chunk) -> dict[str, Any]:
    runs = [asdict(run) for run in chunk.runs]
    return {**asdict(chunk), "runs": runs}


def _layout_document(name: str, place: layout.Place, found: layout.Layout) -> dict[str, Any]:
    stretches = [{**asdict(each), "reach": each.reach} for each in found.stretches]
    return {"tensor": name, "pid": place.pid, **asdict(found), "stretches": stretches}


def _marked(found: layout.Layout) -> Iterator[int]:
    for stretch in found.stretches:
        if stretch.frame is not None:
            yield from range(stretch.frame, stretch.frame + stretch.length // found.page_size)


def show_layout(found: layout.Layout) -> Iterator[str]:
    """Yield the lines that say how a range is mapped."""
    rows = [("address", "size", "mapped by", "TLB", "frame", "node", "flags")]
    for each in found.stretches:
        entry, folded = format_size(each.entry_size), each.folded
        how = "not mapped"
        if each.frame is not None:
            how = entry if folded == 1 else f"{entry} x {folded}"
        rows.append((
            f"{each.address:#x}", format_size(each.length), how, str(each.tlb_entries),
            "-" if each.frame is None else f"{each.frame:#x}",
            "-" if each.node is None else str(each.node), " ".join(each.flags),
        ))  # fmt: skip
    # the flags are of any length
    for number, (line, row) in enumerate(
        zip(table([row[:-1] for row in rows], left=1), rows, strict=True)
    ):
        flags = click.style(row[-1], bold=True) if number == 0 else row[-1]
        yield f"{line}  {flags}".rstrip()
    whole = "1 entry" if found.tlb_entries == 1 else f"{found.tlb_entries} entries"
    yield (
        f"  {format_size(found.mapped)} of {format_size(found.size)} mapped; a TLB needs {whole}"
        f" for it; {found.tables} tables lead there"
    )


@dataclass(frozen=True)
class _Look:
    """The chunks and the tensors asked for, at one moment."""

    title: str
    chunks: list[layout.Chunk]
    tensors: list[tuple[str, layout.Place, layout.Layout]]
    marked: frozenset[int]


def _look(title: str, places: Sequence[tuple[str, layout.Place]], page: int) -> _Look:
    tensors = []
    for name, at in places:
        entries = layout.walk(at.address, at.size, at.pid)
        tensors.append((name, at, layout.lay_out(entries, at.address, at.size, page)))
    marked = frozenset(frame for _, _, found in tensors for frame in _marked(found))
    return _Look(title, layout.chunks(), tensors, marked)


@click.command("map", cls=Command)
@click.argument("tensor", nargs=-1, metavar="[TENSOR]...")
@click.option(
    "--png", type=click.Path(dir_okay=False), metavar="FILE",
    help="Draw it into a file as well; takes matplotlib.",
)  # fmt: skip
@click.option("--compact", is_flag=True, help="Compact the buddy pool; show before and after.")
@json_option
def map_command(tensor: tuple[str, ...], png: str | None, compact: bool, as_json: bool) -> None:
    """Show what the pools look like: owner, occupancy and holes of each chunk.

    A TENSOR is marked, and its address, frames, flags and what it takes of a TLB are listed. It is
    named PID:HANDLE, for example 412:3, the handle being what Tensor.handle says in that process.
    What compaction moves is not mapped again until it is touched. It takes root.
    """
    page = os.sysconf("SC_PAGE_SIZE")
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(replacing(Path(png))) if png else None
        if file is not None:
            picture.check()
        places = []
        for name in tensor:
            at = place(name)
            if at is None:
                raise click.UsageError(f"{name!r} is not PID:HANDLE")
            places.append((name, at))
        looks = [_look("before", places, page)]
        emptied = None
        if compact:
            emptied = system.compact()
            looks.append(_look("after", places, page))
        if file is not None:
            maps = [(each.title if compact else "now", each.chunks, each.marked) for each in looks]
            picture.png(file, maps, page)
    last = looks[-1]
    if as_json:
        document: dict[str, Any] = {"page_size": page, "chunk_size": system.CHUNK_SIZE}
        document["chunks"] = [_document(chunk) for chunk in last.chunks]
        document["summary"] = asdict(picture.summary(last.chunks, page))
        if compact:
            document["before"] = [_document(chunk) for chunk in looks[0].chunks]
            document["emptied"] = emptied
        document["tensors"] = [_layout_document(*each) for each in last.tensors]
        emit(document)
        return
    plain = not (sys.stdout.encoding or "").lower().startswith("utf")
    for each in looks:
        if compact:
            click.echo(click.style(f"{each.title} compaction", underline=True))
        for line in picture.draw(each.chunks, page, shown=each.marked, plain=plain):
            click.echo(line)
        click.echo()
    every = [chunk for each in looks for chunk in each.chunks]
    for line in picture.legend(every, marked=any(each.marked for each in looks)):
        click.echo(line)
    for name, _, found in last.tensors:
        click.echo(click.style(f"\ntensor {name}", bold=True))
        for line in show_layout(found):
            click.echo(line)
    if png:
        click.echo(f"\n{png}: drawn")
