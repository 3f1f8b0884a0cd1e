# SPDX-License-Identifier: MIT
"""``tensormem report``: a page of a recorded run."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import click

from .. import errors, recording
from ..console import Command, emit, json_option, replacing
from ..units import format_size

__all__ = ["report"]


def _drawing() -> Any:
    """Return the module that draws: the rest of the package does without its library."""
    try:
        return importlib.import_module("tensormem.report")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "matplotlib":
            raise
        raise errors.TensormemError(
            "'tensormem report' draws with the Python package matplotlib, which is missing",
            "install it: 'sudo apt install python3-matplotlib', or 'pip install"
            " tensormem[report]'; or copy the recording to a machine that has it",
        ) from None


@click.command(cls=Command)
@click.argument("recorded", type=click.Path(dir_okay=False), metavar="RUN.jsonl")
@click.option(
    "--html", type=click.Path(dir_okay=False), required=True, metavar="OUT.html",
    help="The page to write. It needs no other file and no network.",
)  # fmt: skip
@click.option("--title", metavar="TEXT", help="Its heading.  [default: the file's name]")
@json_option
def report(recorded: str, html: str, title: str | None, as_json: bool) -> None:
    """Make one self-contained page of a run that 'tensormem record' recorded.

    It has the pools, clients, KV hit rate, model slots, RT histogram, pressure and bandwidth over
    time, and says what was not recorded. The module is not needed.
    """
    run = recording.load(recorded)
    data = _drawing().page(run, title or Path(recorded).name).encode()
    with replacing(Path(html)) as file:
        file.write(data)
    size = len(data)
    if as_json:
        emit({"file": html, "bytes": size, "samples": len(run.samples), "cut_off": run.cut_off})
    else:
        click.echo(f"{html}: {len(run.samples)} samples, {format_size(size)}")
