# SPDX-License-Identifier: MIT
"""``tensormem walk``: the way from an address to its memory, level by level."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import click

from .. import errors, layout, system
from ..console import Command, emit, json_option
from ..units import format_size
from .map import place

__all__ = ["picture", "walk"]

_COLOURS = ("magenta", "blue", "cyan", "green", "yellow")


def _ending(entry: layout.Entry, address: int, page_shift: int) -> Iterator[str]:
    """Yield what the last entry means."""
    if entry.what == "none":
        yield "  The entry is empty: an access faults, and the kernel fills it in."
        return
    if entry.what == "other" or entry.frame is None:
        yield "  The page is swapped out or on the move: an access faults."
        return
    attributes = layout.decode(entry.descriptor)
    where = (entry.frame << page_shift) + (address & (entry.size - 1))
    node = "no memory of a node" if entry.node is None else f"node {entry.node}"
    yield f"  physical address {where:#x}: frame {where >> page_shift:#x}, {node}"
    writes = "read and write" if attributes.writable else "read only"
    if not attributes.valid:
        writes = "no access (PROT_NONE)"
    yield f"  {attributes.memory} memory, {attributes.shareable}; {writes}"
    yield "  flags: " + " ".join(attributes.names())


def _cost(entries: Sequence[layout.Entry], page_shift: int) -> Iterator[str]:
    """Yield what a miss costs, and what other sizes would."""
    last = entries[-1]
    reads = len(entries)
    yield f"  A miss reads {reads} descriptors, one a level; each says where the next is. CPUs"
    yield "  keep those of the upper levels, and often read the last alone."
    if last.what != "leaf":
        return
    folded = last.folded(page_shift)
    size = format_size(last.size)
    covers = format_size(last.size * folded)
    chunk = system.CHUNK_SIZE
    if folded > 1:
        yield (
            f"  {folded} such entries of {size} may share one of the TLB (CONT), which then covers"
            f" {covers}."
        )
    else:
        yield f"  The entry of the TLB then covers {covers}."
    misses = -(-chunk // (last.size * folded))
    if misses > 1:
        yield f"  To read a chunk of 2 MiB takes {misses} of them; mapped as one, it would take 1."
    else:
        yield "  To read a chunk of 2 MiB takes 1 of them: nothing is to be gained."


def picture(
    entries: Sequence[layout.Entry], address: int, page_size: int, *, plain: bool = False
) -> Iterator[str]:
    """Yield the lines of a picture of one walk.

    Args:
        entries: of the walk of one address.
        address: that address.
        page_size: the kernel's.
        plain: only ASCII.
    """
    page_shift = page_size.bit_length() - 1
    last = entries[-1]
    corner, bar, arrow = ("`-", "|", "->") if plain else ("└─", "│", "→")
    # the address, as the levels cut it up
    names = [f"L{e.level(page_shift)} {e.high_bit}:{e.shift}" for e in entries]
    values = [str(entry.index) for entry in entries]
    names.append(f"offset {last.shift - 1}:0")
    values.append(f"{address & (last.size - 1):#x}")
    widths = [max(len(n), len(v)) for n, v in zip(names, values, strict=True)]
    separator = f" {bar} "
    colours = [_COLOURS[i % len(_COLOURS)] for i in range(len(names))]
    cells = list(zip(names, values, widths, colours, strict=True))
    yield "  bits   " + separator.join(click.style(n.ljust(w), fg=c) for n, _, w, c in cells)
    yield "  index  " + separator.join(click.style(v.ljust(w), fg=c) for _, v, w, c in cells)
    yield ""
    for depth, entry in enumerate(entries):
        level = f"L{entry.level(page_shift)} {entry.name}"
        indent = "  " + "   " * depth
        lead = f"{corner} " if depth else ""
        what = {
            "table": f"table {arrow} frame {entry.frame or 0:#x}",
            "leaf": f"{'page' if entry.shift == page_shift else 'block'} of"
            f" {format_size(entry.size)} {arrow} frame {entry.frame or 0:#x}",
            "none": "empty",
            "other": "not for the CPU",
        }[entry.what]
        name = click.style(f"{level}[{entry.index}]", fg=colours[depth], bold=True)
        yield f"{indent}{lead}{name} = {entry.descriptor:#018x}  {what}"
    yield ""
    yield from _ending(last, address, page_shift)
    yield ""
    yield from _cost(entries, page_shift)


def _document(entry: layout.Entry, page_shift: int) -> dict[str, Any]:
    document = asdict(entry)
    document.update(
        level=entry.level(page_shift), size=entry.size, high_bit=entry.high_bit
    )
    if entry.what == "leaf":
        document["attributes"] = asdict(layout.decode(entry.descriptor))
        document["folded"] = entry.folded(page_shift)
    return document


def _where(text: str, pid: int | None) -> tuple[int, int]:
    """Return the process and the address that the arguments name."""
    tensor = place(text)
    if tensor is not None:
        if pid is not None:
            raise click.UsageError("PID:HANDLE says which process: --pid goes without")
        return tensor.pid, tensor.address
    try:
        address = int(text, 0)
    except ValueError:
        raise click.UsageError(f"{text!r} is neither an address nor PID:HANDLE") from None
    if pid is None:
        raise click.UsageError("of which process? give --pid")
    return pid, address


@click.command(cls=Command)
@click.argument("where", metavar="ADDRESS|TENSOR")
@click.option("--pid", type=click.IntRange(1, (1 << 31) - 1), help="Whose address it is.")
@json_option
def walk(where: str, pid: int | None, as_json: bool) -> None:
    """Walk the page tables for one address, as the CPU does on a TLB miss.

    Each level shows the bits of the address that choose an entry, the entry, and where it leads.
    Then what the last one means, and what a miss costs. Of a TENSOR, named PID:HANDLE, it is the
    first address. It takes root.
    """
    process, address = _where(where, pid)
    page = os.sysconf("SC_PAGE_SIZE")
    entries = layout.walk(address, 1, process)
    if not entries:
        raise errors.InvalidArgument(
            f"nothing is mapped at {address:#x} of process {process} any more", "look again"
        )
    last, page_shift = entries[-1], page.bit_length() - 1
    seen = layout.frames(address, 1, process)
    flags: tuple[str, ...] = ()
    if last.what == "leaf" and last.frame is not None:
        flags = layout.page_flags(last.frame + (address & (last.size - 1)) // page)
    if as_json:
        emit({
            "pid": process, "address": address, "page_size": page,
            "entries": [_document(entry, page_shift) for entry in entries],
            "pagemap_frame": seen[0] if seen else None, "page_flags": list(flags),
        })  # fmt: skip
        return
    plain = not (sys.stdout.encoding or "").lower().startswith("utf")
    click.echo(click.style(
        f"address {address:#x} of process {process}, pages of {format_size(page)}", bold=True,
    ))  # fmt: skip
    click.echo()
    for line in picture(entries, address, page, plain=plain):
        click.echo(line)
    if flags:
        click.echo(f"\n  the page, as the kernel counts it: {' '.join(flags)}")
