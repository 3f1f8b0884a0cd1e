# SPDX-License-Identifier: MIT
"""``tensormem bench``: measurements of this machine."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import asdict
from typing import Any

import click

from .. import allocators as library
from ..console import Group, emit, json_option, table

__all__ = ["bench"]


@click.group(cls=Group)
def bench() -> None:
    """Measure this machine: the module beside what there is without it."""


def _memory(memory: library.Memory | None) -> dict[str, Any] | None:
    if memory is None:
        return None
    return {**asdict(memory), "taken": memory.taken, "ratio": round(memory.ratio, 4)}


def _document(result: library.Result, among: list[library.Result]) -> dict[str, Any]:
    return {
        **asdict(result),
        "ours": library.ALLOCATORS[result.allocator].ours,
        "ns_each": None if result.missing else round(result.ns_each, 1),
        "full": _memory(result.full),
        "half": _memory(result.half),
        "better": library.better(result, among),
    }


def _rate(count: float) -> str:
    return f"{count / 1e6:.1f}M" if count >= 1e6 else f"{count / 1e3:.1f}K"


def _report(results: list[library.Result]) -> None:
    for shape in dict.fromkeys(result.shape for result in results):
        of_shape = [result for result in results if result.shape == shape]
        rows: list[tuple[str, ...]] = [("", "ns", "per s", "full", "half")]
        for result in of_shape:
            if result.missing or result.full is None or result.half is None:
                rows.append((result.allocator, "-", "-", "-", "-"))
                continue
            ratios = (f"{result.full.ratio:.2f}", f"{result.half.ratio:.2f}")
            ns = result.ns_each
            rows.append((result.allocator, f"{ns:.0f}", _rate(1e9 / ns), *ratios))
        click.echo(f"{library.SHAPES[shape]}\n")
        notes = [click.style("better", bold=True), *(_note(result, results) for result in of_shape)]
        for line, note in zip(table(rows), notes, strict=True):
            click.echo(f"{line}  {note}".rstrip())
        click.echo()
    click.echo("  ns: to allocate an object, touch its pages and free it")
    click.echo("  full: memory over the bytes of all objects; half: over what is left when every")
    click.echo("  other one is freed. Memory is what the process has, what its client holds in")
    click.echo("  the module, and the kernel's objects for it. better: the peers that are.")


def _note(result: library.Result, among: list[library.Result]) -> str:
    if result.missing:
        return result.missing
    return ", ".join(library.better(result, among))


@bench.command("allocators")
@click.option(
    "-n", "--objects", type=click.IntRange(1000, 100_000_000), default=library.OBJECTS,
    show_default=True, metavar="NUMBER",
    help="Small objects; single takes a tenth, and of tensors a five-hundredth comes and goes.",
)  # fmt: skip
@click.option(
    "--only", type=click.Choice(list(library.ALLOCATORS)), multiple=True,
    help="Measure these and no others; may be given several times.",
)  # fmt: skip
@json_option
def allocators(objects: int, only: tuple[str, ...], as_json: bool) -> None:
    """Compare the module's pools with malloc of glibc, jemalloc and mimalloc.

    bump is one tensor with objects one after the other, as in an arena; slab allocates many
    objects with a call, single each with its own; buddy and chunk are pools; reuse is
    the pool by size, with memory that comes back unzeroed. jemalloc and mimalloc are
    measured where their libraries are installed (Debian: libjemalloc2, libmimalloc3).

    A C program does the work; it is compiled at first use, with cc or what CC names.
    """
    results: list[library.Result] = []
    steps = library.plan(only)
    runs = library.run(objects, only)
    with contextlib.ExitStack() as stack:
        bar = None
        if not as_json:
            bar = stack.enter_context(
                click.progressbar(length=len(steps), label="measuring", file=sys.stderr)
            )
        for result in runs:
            results.append(result)
            if bar is not None:
                bar.update(1)
    if as_json:
        emit({"objects": objects, "rows": [_document(r, results) for r in results]})
    else:
        _report(results)
