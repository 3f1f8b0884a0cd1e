# SPDX-License-Identifier: MIT
"""Man pages, made of what the commands say of themselves with ``--help``.

Pages made when they are installed cannot be older than the commands. click's own help is plain
text with few rules: paragraphs, and option lists that it hands out in pieces.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import click

from . import __version__

__all__ = ["commands", "page", "page_name"]


def commands(
    root: click.Command, name: str = "tensormem"
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Yield each command that is not hidden, with the words that call it; groups first."""
    yield from _below(root, (name,))


def _below(
    command: click.Command, words: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield words, command
    if isinstance(command, click.Group):
        for name in sorted(command.commands):
            inner = command.commands[name]
            if not inner.hidden:
                yield from _below(inner, (*words, name))


def page_name(words: Sequence[str]) -> str:
    """Return the name of a page's file: ``tensormem-pool-set.1``."""
    return f"{'-'.join(words)}.1"


def _escape(text: str) -> str:
    """Write text so that roff takes nothing in it as its own."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    # a dot or a quote at the beginning of a line would be a request
    return re.sub(r"(?m)^(?=[.'])", r"\\&", text)


def _quoted(text: str) -> str:
    return '"' + _escape(text).replace('"', '""') + '"'


def _paragraphs(text: str) -> Iterator[str]:
    """Write paragraphs; what click would not wrap again is kept line by line."""
    for number, paragraph in enumerate(re.split(r"\n\s*\n", text.strip())):
        if number:
            yield ".PP"
        lines = [line.strip() for line in paragraph.splitlines()]
        if lines and lines[0] == "\b":
            yield ".nf"
            yield from map(_escape, lines[1:])
            yield ".fi"
        else:
            yield _escape(" ".join(lines))


def _context(words: Sequence[str], command: click.Command, root: click.Command) -> click.Context:
    """Return the context in which the command is called: its usage has all the words."""
    context = click.Context(root, info_name=words[0], **root.context_settings)
    found: click.Command = root
    for word in words[1:]:
        assert isinstance(found, click.Group)
        found = found.commands[word]
        context = click.Context(found, info_name=word, parent=context)
    assert found is command
    return context


def page(words: Sequence[str], command: click.Command, root: click.Command) -> str:
    """Return the page of a command.

    Args:
        words: those that call it, ``tensormem`` first.
        command: the command.
        root: ``tensormem`` itself.
    """
    context = _context(words, command, root)
    name = " ".join(words)
    help_text = re.sub(r"\f.*", "", command.help or "", flags=re.S)
    title, version = _quoted("-".join(words).upper()), _quoted(f"tensormem {__version__}")
    lines = [
        f'.TH {title} 1 "" {version} "User Commands"',
        ".SH NAME",
        f"{_escape('-'.join(words))} \\- {_escape(command.get_short_help_str(200).rstrip('.'))}",
        ".SH SYNOPSIS",
        f".B {_escape(name)}",
        _escape(" ".join(command.collect_usage_pieces(context))),
        ".SH DESCRIPTION",
        *_paragraphs(help_text),
        ".SH OPTIONS",
    ]
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            lines += [".TP", f".B {_escape(record[0])}", _escape(" ".join(record[1].split()))]
    if isinstance(command, click.Group):
        lines.append(".SH COMMANDS")
        for below, inner in list(_below(command, tuple(words)))[1:]:
            if len(below) == len(words) + 1:
                about = inner.get_short_help_str(200)
                lines += [".TP", f".BR {'-'.join(below)} (1)".replace("-", "\\-"), _escape(about)]
    lines.append(".SH EXIT STATUS")
    lines.append("0: fine. 1: a problem was found, or the operation failed. 2: wrong usage.")
    if len(words) > 1:
        lines += [".SH SEE ALSO", f".BR {_escape('-'.join(words[:-1]))} (1)"]
    return "\n".join(line for line in lines if line) + "\n"
