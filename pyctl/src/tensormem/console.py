# SPDX-License-Identifier: MIT
"""What all commands of the command line are made of: errors, JSON, tables, sizes."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import click

from . import errors
from .units import format_size, parse_size

__all__ = [
    "WIDTH", "Command", "Group", "emit", "json_option", "replacing", "show_number", "show_size",
    "size_value", "table",
]  # fmt: skip

#: Columns that a terminal has.
WIDTH = 80

_F = TypeVar("_F", bound=Callable[..., Any])


def json_option(function: _F) -> _F:
    """Give a command ``--json``; its callback gets ``as_json``."""
    return click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON document instead of text."
    )(function)


def emit(document: Any) -> None:
    """Print the one JSON document."""
    click.echo(json.dumps(document, indent=2))


def size_value(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Turn a size such as ``64M`` into bytes; a bad one is wrong usage."""
    try:
        return None if value is None else parse_size(value)
    except errors.InvalidArgument as error:
        raise click.BadParameter(str(error), ctx, param) from None


class Command(click.Command):
    """A command whose errors are one line, or one document with ``--json``."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run it; every error that has a remedy ends in exit code 1."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except errors.TensormemError as error:
            failure = error
        except OSError as error:
            name = f"{error.filename}: " if error.filename else ""
            failure = errors.TensormemError(
                f"{name}{error.strerror or error}", "see 'tensormem doctor'", error.errno
            )
        if ctx.params.get("as_json"):
            emit(
                {
                    "error": {
                        "type": type(failure).__name__,
                        "cause": failure.cause,
                        "remedy": failure.remedy,
                        "errno": failure.errno,
                    }
                }
            )
        else:
            click.echo(click.style("tensormem: ", fg="red") + str(failure), err=True)
        return ctx.exit(1)


class Group(click.Group):
    """A group of such commands."""

    command_class = Command
    group_class = type


def table(
    rows: Sequence[Sequence[str]], *, left: int = 1, rule_before_last: bool = False
) -> Iterable[str]:
    """Yield aligned lines: a head, then rows; the first ``left`` columns to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for number, row in enumerate(rows):
        if rule_before_last and number == len(rows) - 1:
            yield "  " + "-" * (sum(widths) + 2 * (len(widths) - 1))
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        line = ("  " + "  ".join(cells)).rstrip()
        yield click.style(line, bold=True) if number == 0 else line


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Write a file beside it and then over it: who has the old one open keeps it.

    Raises:
        TensormemError: it cannot be written; said before anything else is done.
    """
    if path.exists() and not path.is_file():
        raise errors.TensormemError(f"{path} is not a file", "name one, or one that is not there")
    try:
        fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise errors.TensormemError(
            f"{path} cannot be written: {error.strerror}",
            "name a file in a directory that you may write to", error.errno,
        ) from None  # fmt: skip
    try:
        with open(fd, "wb") as file:
            yield file
            mask = os.umask(0)
            os.umask(mask)
            os.fchmod(file.fileno(), 0o666 & ~mask)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def show_number(value: int | None) -> str:
    """Write a number; a dash for none."""
    return "-" if value is None else str(value)


def show_size(value: int | None, unit: int = 1) -> str:
    """Write a count of units of so many bytes as a size; a dash for none."""
    return "-" if value is None else format_size(value * unit)
