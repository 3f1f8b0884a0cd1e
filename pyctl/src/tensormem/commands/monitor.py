# SPDX-License-Identifier: MIT
"""``tensormem monitor``: the eBPF tools, and without bcc the kernel's own histograms."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

import click

from .. import tracehist
from ..console import Command, show_number
from ..shared import shared
from ..units import format_ns

__all__ = ["monitor"]

#: The environment variable that names the folder of the tools.
ROOT_VARIABLE = "TENSORMEM_BPF"

#: What a tool ends with where BPF programs cannot run.
_EXIT_NO_BPF = 3

#: What a tool says when it watches.
_READY = "events watched"

#: Seconds between two looks at whether it is time.
_TICK = 0.1


def _tool(name: str) -> Path | None:
    """Return where a tool is; None where the eBPF tools are not installed."""
    root = os.environ.get(ROOT_VARIABLE)
    path = (Path(root) if root else shared("bpf")) / f"{name}.py"
    return path if path.exists() else None


def _python() -> str:
    """Return an interpreter that has bcc, if one has: virtual environments do not."""
    debian = "/usr/bin/python3"
    if importlib.util.find_spec("bcc") is None and os.path.exists(debian):
        return debian
    return sys.executable


def _run(tool: Path, arguments: Sequence[str]) -> tuple[int, str]:
    """Run a tool; return its exit code and, when it cannot run here, why.

    What a compiler says of a program it refuses is many lines: only the last is the reason.
    """
    child = subprocess.Popen([_python(), tool, *arguments], stderr=subprocess.PIPE, text=True)

    def forward(number: int, frame: FrameType | None) -> None:
        child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    said: list[str] = []
    ready = False
    try:
        assert child.stderr is not None
        with child.stderr:
            for line in child.stderr:
                ready = ready or _READY in line
                if ready:
                    click.echo(line, err=True, nl=False)
                else:
                    said.append(line)
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    reason = said[-1].strip() if said else ""
    if code != _EXIT_NO_BPF:
        click.echo("".join([] if ready else said), err=True, nl=False)
    return code, reason


class _Parser(argparse.ArgumentParser):
    """The options that tools have in common; a bad one is wrong usage."""

    def error(self, message: str) -> NoReturn:
        raise click.UsageError(message)


class _Note(argparse.Action):
    """Note an option that only the tool itself has."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        noted = getattr(namespace, "noted", [])
        namespace.noted = [*noted, str(option_string)]


#: Options that tools have beside the common ones, and which of them have a value.
_ONLY_BPF = (
    ("-e", "--events"),
    ("-w", "--wide"),
    ("--by",),
    ("--signal",),
    ("--over",),
    ("-s", "--sort"),
    ("-n", "--rows"),
    ("-o", "--older"),
    ("-K", "--no-kernel"),
)
_VALUED = ("--events", "--by", "--signal", "--over", "--sort", "--rows", "--older")


def _seconds(text: str) -> float:
    fit = re.fullmatch(r"(\d+(?:\.\d+)?)(us|ms|s|)", text)
    if fit is None or float(fit[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time; write it like 5ms or 2s")
    return float(fit[1]) * {"us": 1e-6, "ms": 1e-3, "s": 1.0, "": 1.0}[fit[2]]


def _positive(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def _parser(name: str) -> _Parser:
    parser = _Parser(prog=f"tensormem monitor {name}", add_help=False, allow_abbrev=False)
    parser.add_argument("-T", "--timestamp", action="store_true")
    parser.add_argument("-p", "--pid", type=_positive, default=0)
    parser.add_argument("-j", "--json", action="store_true")
    parser.add_argument("-d", "--duration", type=_seconds)
    for names in _ONLY_BPF:
        parser.add_argument(*names, action=_Note, nargs=None if names[-1] in _VALUED else 0)
    parser.add_argument("interval", nargs="?", type=_seconds)
    parser.add_argument("count", nargs="?", type=_positive)
    return parser


class _Fallback:
    """A monitor without BPF."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name = name
        self.options = options
        self.total = 0
        self.ended = False

    def emit(self, **values: object) -> None:
        now = round(time.time(), 6)
        click.echo(json.dumps({"tool": self.name, "source": "tracefs", "time": now, **values}))

    def stamp(self) -> str:
        return time.strftime("%H:%M:%S ") if self.options.timestamp else ""

    def end(self, number: int, frame: FrameType | None) -> None:
        self.ended = True

    def run(self) -> None:
        """Watch until a signal, the duration or the last report."""
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.end) for number in signals}
        try:
            with tracehist.Instance(self.name, self.options.pid) as instance:
                click.echo(
                    f"{self.name}: {instance.watched} {_READY} by the kernel; Ctrl-C ends", err=True
                )
                self.loop(instance)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def loop(self, instance: tracehist.Instance) -> None:
        options = self.options
        last = time.monotonic()
        stop = last + options.duration if options.duration else float("inf")
        tick = options.interval or float("inf")
        seen: dict[tuple[str, tuple[tuple[str, str], ...]], tracehist.Count] = {}
        reports = 0
        while not self.ended:
            left = max(0.0, min(stop, last + tick) - time.monotonic())
            self.wait(instance, min(left, _TICK))
            now = time.monotonic()
            if now >= last + tick:
                last, reports = now, reports + 1
                seen = self.report(instance, seen)
                self.ended |= reports == options.count
            self.ended |= now >= stop
        self.wait(instance, 0)
        if reports != options.count:
            self.report(instance, seen)
        if options.json:
            self.emit(total=self.total, lost=instance.lost)
        else:
            click.echo(f"{self.total} events, {instance.lost} lost")

    def wait(self, instance: tracehist.Instance, seconds: float) -> None:
        if instance.histograms:
            time.sleep(seconds)
            return
        for event in instance.events(seconds):
            self.total += 1
            if self.options.json:
                self.emit(
                    seconds=event.seconds,
                    event=event.event,
                    tid=event.tid,
                    comm=event.comm,
                    **event.values,
                )
            else:
                words = " ".join(f"{name}={value}" for name, value in event.values.items())
                line = f"{self.stamp()}{event.seconds:.6f} {event.tid:>7} {event.comm:<15} "
                click.echo(f"{line}{event.event:<14} {words}"[:79])

    def report(
        self,
        instance: tracehist.Instance,
        before: dict[tuple[str, tuple[tuple[str, str], ...]], tracehist.Count],
    ) -> dict[tuple[str, tuple[tuple[str, str], ...]], tracehist.Count]:
        """Show what came since the last report."""
        now = instance.counts()
        shown = ""
        for (event, keys), whole in now.items():
            news = whole.since(before.get((event, keys)))
            if not news.count:
                continue
            self.total += news.count
            if self.options.json:
                self.emit(event=event, keys=dict(keys), count=news.count, sums=news.sums)
                continue
            if shown != event:
                shown = event
                click.echo(f"{self.stamp()}{event}")
            words = " ".join(_show(name, value) for name, value in keys)
            sums = " ".join(f"{name}={value}" for name, value in news.sums.items())
            click.echo(f"  {words:<36} {show_number(news.count):>9}  {sums}"[:79].rstrip())
        return now


def _show(name: str, value: str) -> str:
    if name.endswith("_ns"):
        return f"{name.removesuffix('_ns')}<={format_ns(int(value)).replace(' ', '')}"
    return f"{name}={value}"


@click.command(
    cls=Command,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.option("--json", "as_json", is_flag=True, help="Lines of JSON; as -j among ARGUMENTS.")
@click.option("--tracefs", is_flag=True, help="Do not try BPF: the kernel's own histograms.")
@click.argument("name", type=click.Choice(list(tracehist.MONITORS)))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def monitor(as_json: bool, tracefs: bool, name: str, arguments: tuple[str, ...]) -> None:
    """Watch the module's events: latencies, clients, leaks, KV caches, models, deadlines.

    ARGUMENTS go to the tool, such as '-j' for lines of JSON, '-p PID', '-d 10s' or '1 5' for
    five reports a second apart; '-h' tells what it has beside. Where bcc is not there, or cannot
    compile, histograms of tracefs take its place, with fewer details.
    """
    reason = "as asked for"
    if as_json:
        arguments = ("-j", *arguments)
    if not tracefs:
        tool = _tool(name)
        if tool is None:
            reason = "the eBPF tools are not installed"
        else:
            code, reason = _run(tool, arguments)
            if code != _EXIT_NO_BPF:
                sys.exit(code)
            reason = reason.removeprefix(f"{name}: ")
    options = _parser(name).parse_args(list(arguments))
    noted = getattr(options, "noted", [])
    without = f"; without {', '.join(noted)}: that takes BPF" if noted else ""
    click.echo(f"{name}: histograms of tracefs ({reason}){without}", err=True)
    _Fallback(name, options).run()
