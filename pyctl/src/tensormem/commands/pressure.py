# SPDX-License-Identifier: MIT
"""``tensormem pressure``: what the module does when the system is short of memory."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import click

from .. import pressure as library
from ..abi import Relief
from ..console import Group, emit, json_option, show_size, size_value, table
from ..units import format_size

__all__ = ["pressure"]

_MEANING = {
    "chunks": "free chunks, the reserve, what is kept for reuse",
    "prefixes": "KV: what is free, cached prefixes",
    "idle": "KV: idle sequences packed",
    "weights": "evictable weights",
    "OOM": "before the kernel would have killed somebody",
}


@click.group(cls=Group)
def pressure() -> None:
    """Show memory pressure, set its watermarks, give memory back."""


def _report(now: library.PressureStatus) -> None:
    colour = {"none": "green", "low": "yellow"}.get(now.level, "red")
    click.echo(f"  level      {click.style(now.level, fg=colour, bold=True)}")
    click.echo(f"  available  {format_size(now.available)}")
    click.echo(f"  low        {format_size(now.low)}   below that, memory is given back")
    click.echo(f"  high       {format_size(now.high)}   until there is so much\n")
    rows = [("step", "taken", "given back")]
    rows += [(name, str(step.calls), show_size(step.given)) for name, step in now.steps.items()]
    rows.append(("OOM", str(now.oom.calls), show_size(now.oom.given)))
    for line, row in zip(table(rows), rows, strict=True):
        click.echo(f"{line}  {_MEANING[row[0]]}" if row[0] in _MEANING else line)
    click.echo(f"\n  {now.reliefs} reliefs, {now.fruitless} of them with nothing to give")


@pressure.command("show")
@json_option
def pressure_show(as_json: bool) -> None:
    """Show watermarks, level, and what each step has given back."""
    now = library.status()
    if as_json:
        emit(asdict(now))
    else:
        _report(now)


@pressure.command("set")
@click.option(
    "--low", metavar="SIZE", callback=size_value,
    help="Give memory back when less is available; 0 for never.",
)  # fmt: skip
@click.option(
    "--high", metavar="SIZE", callback=size_value, help="Go on until so much is available."
)
@json_option
def pressure_set(low: int | None, high: int | None, as_json: bool) -> None:
    """Set the watermarks; takes root.

    What counts is the memory that is available without swapping, as in /proc/meminfo.
    """
    if low is None and high is None:
        raise click.UsageError("nothing to set: give --low, --high or both")
    now = library.set_watermarks(low=low, high=high)
    if as_json:
        emit({"low": now.low, "high": now.high, "level": now.level})
    else:
        click.echo(f"watermarks: low {format_size(now.low)}, high {format_size(now.high)}")


@pressure.command("relieve")
@click.option(
    "--bytes", "size", metavar="SIZE", callback=size_value, required=True,
    help="How much to give back, for example 64M.",
)  # fmt: skip
@click.option(
    "--step", "steps", multiple=True, type=click.Choice([s.name.lower() for s in Relief]),
    help="Only this step; can be given again. Else all, in their order.",
)  # fmt: skip
@json_option
def pressure_relieve(size: int, steps: tuple[str, ...], as_json: bool) -> None:
    """Give memory back to the system now; takes root.

    Nothing is lost but what can be had again: cached prefixes have to be computed,
    packed sequences come back by a touch.
    """
    given = library.relieve(size, steps)
    if as_json:
        emit(asdict(given))
        return
    click.echo(f"given back: {format_size(given.total)} of {format_size(given.wanted)}")
    for name, value in given.steps.items():
        if value:
            click.echo(f"  {name:<9} {format_size(value):>10}  {_MEANING[name]}")


@contextlib.contextmanager
def _stopped() -> Iterator[int]:
    """A descriptor that can be read once SIGINT or SIGTERM has come."""
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield reader
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reader)
        os.close(writer)


def _line(action: library.Action) -> str:
    clock = time.strftime("%H:%M:%S", time.localtime(action.time))
    given = f"{format_size(action.relief.total)} of {format_size(action.relief.wanted)}"
    return f"{clock}  {action.reason}: gave back {given}"


@pressure.command("watch")
@click.option(
    "--threshold", metavar="MS", type=click.IntRange(1, 1000), default=150, show_default=True,
    help="Milliseconds of a second that tasks may wait for memory (PSI).",
)  # fmt: skip
@click.option(
    "--bytes", "least", metavar="SIZE", callback=size_value, default="16M", show_default=True,
    help="What to give back at least each time.",
)  # fmt: skip
@json_option
def pressure_watch(threshold: int, least: int, as_json: bool) -> None:
    """Give memory back whenever tasks have to wait for it; takes root.

    Where the kernel measures that (PSI), before the module would do so by itself; elsewhere
    when the module's level rises. One line for each time (with --json a document a line),
    until SIGINT or SIGTERM.
    """
    with library.open_source(threshold * 1000) as source, _stopped() as stop:
        begin: dict[str, Any] = {"source": source.name}
        told = "tasks that wait (PSI)" if source.name == "psi" else "the module's level (no PSI)"
        click.echo(json.dumps(begin) if as_json else f"watching {told}")
        for action in library.watch(source, least=least, stop=stop):
            click.echo(json.dumps(asdict(action)) if as_json else _line(action))
