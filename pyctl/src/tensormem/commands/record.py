# SPDX-License-Identifier: MIT
"""``tensormem record``: the module's state, again and again, into a file."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any, TextIO

import click

from .. import recording
from ..console import Command, emit, json_option

__all__ = ["INTERVAL", "record", "stopping"]

#: Shortest time between two samples: reading everything takes a part of it on a small board.
INTERVAL = 0.05


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """End a loop cleanly on SIGINT and SIGTERM: both leave the block."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            yield
    finally:
        signal.signal(signal.SIGTERM, before)


@click.command(cls=Command)
@click.option(
    "-i", "--interval", type=click.FloatRange(INTERVAL), default=1.0, show_default=True,
    metavar="SECONDS", help="Time between two samples.",
)  # fmt: skip
@click.option(
    "-n", "--count", type=click.IntRange(1), metavar="NUMBER", help="Samples to take."
)
@click.option(
    "-d", "--duration", type=click.FloatRange(0), metavar="SECONDS",
    help="Time after which to end.",
)  # fmt: skip
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, allow_dash=True), required=True,
    metavar="FILE", help="Where to, one JSON document a line; - for the standard output.",
)  # fmt: skip
@json_option
def record(
    interval: float, count: int | None, duration: float | None, output: str, as_json: bool
) -> None:
    """Record the state of the module into a file, until stopped (Ctrl-C).

    'tensormem report' makes a page of it. Only root sees the KV caches of everybody.
    """
    if as_json and output == "-":
        raise click.UsageError("--json prints a document of its own: name a file with -o")
    first = recording.sample()  # without the module no file is made
    taken = 0
    with contextlib.ExitStack() as stack:
        file: TextIO = sys.stdout
        if output != "-":
            # a line buffer, so that whoever follows the file sees whole lines
            file = stack.enter_context(open(output, "w", buffering=1))
        stack.enter_context(stopping())
        begin = due = time.monotonic()
        moment = first
        while True:
            recording.write(file, moment)
            taken += 1
            due = max(due + interval, time.monotonic())
            over = duration is not None and due - begin > duration
            if over or (count is not None and taken >= count):
                break
            time.sleep(max(0.0, due - time.monotonic()))
            moment = recording.sample()
    if as_json:
        emit({"file": output, "samples": taken})
    elif output != "-":
        click.echo(f"{taken} {'sample' if taken == 1 else 'samples'} in {output}")
