# SPDX-License-Identifier: MIT
"""``tensormem man``: the man pages of all commands."""

from __future__ import annotations

from pathlib import Path

import click

from .. import manual
from ..console import Command, emit, json_option

__all__ = ["man"]


@click.command(cls=Command)
@click.argument("directory", type=click.Path(file_okay=False))
@json_option
@click.pass_context
def man(ctx: click.Context, directory: str, as_json: bool) -> None:
    """Write a man page of each command into DIRECTORY.

    For all users: sudo tensormem man /usr/local/share/man/man1
    """
    root = ctx.find_root().command
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for words, command in manual.commands(root):
        path = folder / manual.page_name(words)
        path.write_text(manual.page(words, command, root), encoding="utf-8")
        written.append(path.name)
    if as_json:
        emit({"directory": directory, "pages": written})
    else:
        click.echo(f"{len(written)} pages in {directory}")
