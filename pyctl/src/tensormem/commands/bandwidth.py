# SPDX-License-Identifier: MIT
"""``tensormem bandwidth``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import click

from .. import bandwidth as library
from .. import errors
from ..console import Group, emit, json_option, show_number, show_size, table
from ..units import format_ns, format_size, parse_size

__all__ = ["bandwidth"]


@click.group(cls=Group)
def bandwidth() -> None:
    """Bytes moved, traffic of cores, and budgets for both.

    The module counts what it moves itself: what it zeroes, copies, reads and compares. What
    programs do is seen by the cores' counters (PMU), where an event of it stands for
    memory traffic. A program sets its own budget with Client.set_bandwidth in Python.
    """


def _document(
    status: library.BandwidthStatus, found: Sequence[library.ClientStatus]
) -> dict[str, Any]:
    return {
        "event": None if status.event == library.NO_EVENT else status.event,
        **status.values,
        "moved": dict(status.moved),
        "clients": [
            {
                "id": client.id,
                **client.values,
                "users": [{"pid": u.pid, "command": u.command} for u in client.users],
            }
            for client in found
        ],
        "cores": [{"core": core.number, **core.values} for core in status.cores],
    }


def _budget(value: int | None) -> str:
    return "any" if value in (None, library.ANY) else format_size(value or 0)


def _time(value: int | None) -> str:
    return "-" if value is None else format_ns(value)


def _echo(rows: Sequence[Sequence[str]], left: int = 1) -> None:
    click.echo()
    for line in table(rows, left=left):
        click.echo(line)


def _clients(found: Sequence[library.ClientStatus]) -> None:
    if not found:
        click.echo("\nthere are no clients that this user may look at")
        return
    rows: list[Sequence[str]] = [
        ("client", "of", "moved", "budget", "now used", "excess", "waits", "waited")
    ]
    for client in found:
        get, user = client.get, client.users[0]
        who = f"{user.command} {user.pid}" + (
            f" +{len(client.users) - 1}" if client.users[1:] else ""
        )
        counts = [show_number(get(name)) for name in ("excess", "waits")]
        memory = [show_size(get("moved")), _budget(get("budget")), show_size(get("used"))]
        rows.append((str(client.id), who, *memory, *counts, _time(get("held_ns"))))
    _echo(rows, left=2)


def _cores(status: library.BandwidthStatus) -> None:
    if status.event == library.NO_EVENT:
        click.echo(
            "\ncores: no event of memory traffic was found here, so that only the module's own"
            " bytes\nare counted; 'tensormem bandwidth set --event NAME' tries another"
        )
        return
    limited = [core for core in status.cores if core.get("budget")]
    if not limited:
        click.echo(f"\ncores: none of {len(status.cores)} has a budget of {status.event}")
        return
    rows: list[Sequence[str]] = [
        ("core", "budget", "last period", "periods", "excess", "held", "exempt")
    ]
    for core in limited:
        get = core.get
        counts = [show_number(get(name)) for name in ("budget", "used", "periods", "excess")]
        rows.append(
            (str(core.number), *counts, _time(get("held_ns")), show_number(get("exempt")))
        )
    click.echo(f"\ncores, in {status.event}:")
    for line in table(rows):
        click.echo(line)


@bandwidth.command("show")
@json_option
def show(as_json: bool) -> None:
    """Show what pools, clients and cores have moved, and their budgets."""
    status, found = library.read(), library.clients()
    if as_json:
        emit(_document(status, found))
        return
    period = status.get("period_us")
    rule = "above it they wait" if status.get("throttle") else "above it they are told"
    click.echo(
        f"budgets are for {_time(None if period is None else period * 1000)}; {rule};"
        f" a new client's is {_budget(status.get('client_budget'))}"
    )
    total = sum(status.moved.values())
    rows: list[Sequence[str]] = [("pool", "moved")]
    rows += [(pool, format_size(moved)) for pool, moved in status.moved.items()]
    _echo([*rows, ("all", format_size(total))])
    _clients(found)
    _cores(status)


def _event_count(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Turn a count such as ``200000`` or ``3M``, three millions, into a number; none is 0."""
    if value is None or value == "none":
        return None if value is None else 0
    match = re.fullmatch(r"(\d+)([KMG]?)", value, re.ASCII)
    if not match or not int(match[1]):
        raise click.BadParameter(f"{value!r} is not a count of events", ctx, param)
    scale: int = 1000 ** " KMG".index(match[2] or " ")
    return int(match[1]) * scale


def _client_budget(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    if value is None or value == "any":
        return None if value is None else library.ANY
    try:
        return parse_size(value)
    except errors.InvalidArgument as error:
        raise click.BadParameter(str(error), ctx, param) from None


@bandwidth.command("set")
@click.option("--cpu", type=click.IntRange(0), metavar="N", help="The core that --budget is for.")
@click.option(
    "--budget",
    metavar="EVENTS",
    callback=_event_count,
    help="Events of the core's counter in a period, for example 200K; none: no budget.",
)
@click.option(
    "--period", "period_us", type=click.IntRange(1), metavar="US", help="Length of all periods."
)
@click.option(
    "--event", metavar="NAME", help=f"What cores count: {', '.join(library.EVENTS)}, rNNNN."
)
@click.option("--throttle/--no-throttle", default=None, help="Hold who is above the budget.")
@click.option("--reclaim/--no-reclaim", default=None, help="Cores may use what others do not.")
@click.option(
    "--client-budget",
    metavar="SIZE",
    callback=_client_budget,
    help="Bytes in a period that a new client begins with; any: no budget.",
)
@json_option
def set_(
    cpu: int | None,
    budget: int | None,
    period_us: int | None,
    event: str | None,
    throttle: bool | None,
    reclaim: bool | None,
    client_budget: int | None,
    as_json: bool,
) -> None:
    """Set budgets and what holds for them; takes root.

    Real-time tasks are exempt from a core's budget, and RT clients from a client's.
    """
    rules = (event, period_us, throttle, reclaim, client_budget)
    if (cpu is None) != (budget is None):
        raise click.UsageError("--cpu and --budget belong together")
    if budget is None and all(value is None for value in rules):
        raise click.UsageError("nothing to set: see --help")
    status = library.set_rules(
        event=event,
        period_us=period_us,
        throttle=throttle,
        reclaim=reclaim,
        client_budget=client_budget,
    )
    if cpu is not None and budget is not None:
        status = library.set_core(cpu, budget)
    if as_json:
        emit(_document(status, ()))
        return
    if cpu is not None:
        core = next(core for core in status.cores if core.number == cpu)
        left = show_number(core.get("budget")) if core.get("budget") else "any number of"
        click.echo(f"core {cpu} may have {left} {status.event} in a period")
    names = {
        "period": f"{status.get('period_us')} us" if period_us is not None else None,
        "event": status.event if event is not None else None,
        "throttle": _on(status.get("throttle")) if throttle is not None else None,
        "reclaim": _on(status.get("reclaim")) if reclaim is not None else None,
        "new clients": _budget(status.get("client_budget")) if client_budget is not None else None,
    }
    for name, now in names.items():
        if now is not None:
            click.echo(f"{name}: {now}")


def _on(value: int | None) -> str:
    return "on" if value else "off"
