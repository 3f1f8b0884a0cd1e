# SPDX-License-Identifier: MIT
"""``tensormem events``: what happens in the module, a line for each event."""

from __future__ import annotations

import errno
import json
import time
from typing import Any

import click

from .. import netlink
from ..console import Command

__all__ = ["events"]


def _document(event: netlink.Event | netlink.Missed) -> dict[str, Any]:
    head = {"group": event.group, "kind": event.kind, "seq": event.seq}
    if isinstance(event, netlink.Missed):
        return {**head, "count": event.count}
    return {**head, "time": event.time, **event.fields}


def _show(name: str, value: int | str | bool) -> str:
    if isinstance(value, bool):
        value = "yes" if value else "no"
    elif name == "error":
        value = errno.errorcode.get(int(value), str(value))
    return f"{name}={value}"


def _line(event: netlink.Event | netlink.Missed) -> str:
    if isinstance(event, netlink.Missed):
        events = "1 event" if event.count == 1 else f"{event.count} events"
        return click.style(f"{'':14}  {event.group:<9}  missed {events}", fg="yellow")
    fields = " ".join(_show(name, value) for name, value in event.fields.items())
    return f"{event.time / 1e9:14.6f}  {event.group:<9}  {event.kind:<16}  {fields}".rstrip()


@click.command(cls=Command)
@click.option(
    "-g", "--group", "groups", type=click.Choice(list(netlink.GROUPS)), multiple=True,
    help="Listen to this group; may be given again. Default: all.",
)  # fmt: skip
@click.option("-n", "--count", type=click.IntRange(1), metavar="NUMBER", help="Events to wait for.")
@click.option(
    "-t", "--timeout", type=click.FloatRange(0), metavar="SECONDS", help="Time after which to end."
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print a JSON document a line instead of text."
)
def events(
    groups: tuple[str, ...], count: int | None, timeout: float | None, as_json: bool
) -> None:
    """Print what happens in the module, as it happens, until stopped (Ctrl-C).

    Times are seconds since the machine was started. The groups slots, rt and kv take root.
    """
    end = None if timeout is None else time.monotonic() + timeout
    with netlink.Events(groups or None) as reader:
        try:
            while count is None or count > 0:
                event = reader.read(None if end is None else end - time.monotonic())
                if event is None:
                    break
                click.echo(json.dumps(_document(event)) if as_json else _line(event))
                if count is not None:
                    count -= 1
        except KeyboardInterrupt:
            pass
