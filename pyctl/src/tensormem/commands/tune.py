# SPDX-License-Identifier: MIT
"""``tensormem tune``: the system's settings."""

from __future__ import annotations

import textwrap

import click

from .. import tune as library
from ..console import WIDTH, Command, emit, json_option

__all__ = ["tune"]


@click.command(cls=Command)
@click.option("--apply", "do_apply", is_flag=True, help="Make all changes, or none; takes root.")
@click.option("--revert", "do_revert", is_flag=True, help="Take all changes back; takes root.")
@click.option(
    "--unit", metavar="NAME.service", help="A systemd service that is to use jemalloc."
)
@json_option
def tune(do_apply: bool, do_revert: bool, unit: str | None, as_json: bool) -> None:
    """Show which settings of the system stand in tensormem's way, and change them.

    For each: what was found, what is advised, why, and the exact change. --apply notes what was
    there before in /var/lib/tensormem/tune.json, --revert puts it back. Kernel values are set at
    once and at every boot.
    """
    if do_apply and do_revert:
        raise click.UsageError("give either --apply or --revert")
    if do_revert:
        if unit is not None:
            raise click.UsageError("--revert takes everything back, and no --unit")
        back = library.revert()
        if as_json:
            emit({"reverted": back})
        else:
            for path in back:
                click.echo(f"put back: {path}")
            if not back:
                click.echo("nothing to put back")
        return
    advice = library.advise(unit)
    changed = library.apply(advice) if do_apply else []
    if as_json:
        emit({
            "applied": do_apply,
            "changed": [change.path for change in changed],
            "settings": [
                {"name": a.name, "found": a.found, "advised": a.advised, "why": a.why,
                 "changes": [{"path": c.path, "content": c.content} for c in a.changes],
                 "by_hand": a.by_hand, "reboot": a.reboot}
                for a in advice
            ],
        })  # fmt: skip
        return
    _show(advice)
    if do_apply:
        click.echo("")
        for change in changed:
            click.echo(f"changed: {change.path}")
        if any(each.reboot and each.changes for each in advice):
            click.echo("reboot for the boot flags to work")
        if not changed:
            click.echo("nothing to change")
    elif any(each.changes for each in advice):
        click.echo("\n'sudo tensormem tune --apply' makes the changes, --revert takes them back")


def _show(advice: list[library.Advice]) -> None:
    for each in advice:
        fine = not each.changes and not each.by_hand
        mark = click.style("ok  ", fg="green") if fine else click.style("tune", fg="yellow")
        value = each.found if fine else f"{each.found} -> {each.advised}"
        click.echo(f"{mark}  {each.name:<10}  {value}")
        for line in textwrap.wrap(each.why, WIDTH - 6):
            click.echo(f"      {line}")
        # commands and paths are not broken: they are there to be copied
        for change in each.changes:
            click.echo(f"      - {change.show()}")
        if each.by_hand:
            click.echo(f"      - by hand: {each.by_hand}")
