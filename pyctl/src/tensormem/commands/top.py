# SPDX-License-Identifier: MIT
"""``tensormem top``: the module's state, live."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import shutil
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from .. import errors, pressure, recording
from ..console import Command
from ..units import format_size, parse_size

if TYPE_CHECKING:
    from .. import screen as screen_module

__all__ = ["top"]

#: Seconds between two samples, at least.
FASTEST = 0.2


def _screen() -> Any:
    """Return the module that draws: the rest of the package does without its library."""
    try:
        return importlib.import_module("tensormem.screen")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "rich":
            raise
        raise errors.TensormemError(
            "'tensormem top' draws with the Python package rich, which is missing",
            "install it: 'sudo apt install python3-rich', or 'pip install tensormem[top]';"
            " 'tensormem top --json' does without",
        ) from None


def _relieve(wanted: int) -> str:
    """Ask the module to give memory back; return what to tell the user."""
    try:
        given = pressure.relieve(wanted)
    except errors.TensormemError as error:
        return str(error)
    except OSError as error:
        return f"cannot relieve: {error.strerror}"
    return f"given back: {format_size(given.total)} of {format_size(wanted)}"


class _Stopped(Exception):
    """SIGTERM or SIGHUP came."""


class _Terminal:
    """The keyboard, key by key, and the signals that matter to a full screen."""

    def __init__(self, painter: screen_module.Painter) -> None:
        self._painter = painter
        self._fd = sys.stdin.fileno()

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        before = termios.tcgetattr(self._fd)
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        self._wake = reader
        handlers: dict[signal.Signals, Any] = {}

        def stop(*_: Any) -> None:
            raise _Stopped

        def suspend(*_: Any) -> None:
            self._painter.leave()
            termios.tcsetattr(self._fd, termios.TCSADRAIN, before)
            signal.raise_signal(signal.SIGSTOP)
            tty.setcbreak(self._fd)
            self._painter.enter()

        try:
            for number, handler in (
                (signal.SIGTERM, stop),
                (signal.SIGHUP, stop),
                (signal.SIGTSTP, suspend),
                (signal.SIGWINCH, lambda *_: None),
            ):
                handlers[number] = signal.signal(number, handler)
            old_wake = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
            tty.setcbreak(self._fd)
            self._painter.enter()
            try:
                with contextlib.suppress(KeyboardInterrupt, _Stopped):
                    yield
            finally:
                signal.set_wakeup_fd(old_wake)
                # the line may be gone: then there is nothing to give back
                with contextlib.suppress(OSError, termios.error):
                    termios.tcsetattr(self._fd, termios.TCSADRAIN, before)
                    self._painter.leave()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            os.close(reader)
            os.close(writer)

    def key(self, timeout: float) -> str | None:
        """Return a key; an empty string when there is none in time; None at the end of input."""
        ready, _, _ = select.select([self._fd, self._wake], [], [], max(0.0, timeout))
        if self._wake in ready:
            os.read(self._wake, 64)
        if self._fd not in ready:
            return ""
        found = os.read(self._fd, 64)
        if not found:
            return None
        # arrows and the like begin with an escape: none of them means anything here
        return "\x1b" if found[:1] == b"\x1b" else found.decode(errors="ignore")


class _Live:
    """The loop: samples, pictures, keys."""

    def __init__(self, screen: Any, interval: float) -> None:
        self._screen = screen
        self._view = screen.View(interval=interval)
        self._painter = screen.Painter(sys.stdout, shutil.get_terminal_size)
        self._terminal = _Terminal(self._painter)
        self._now = recording.sample()
        self._before: recording.Sample | None = None
        self._typed: str | None = None  # of an answer; None when nothing is asked

    def run(self) -> None:
        due = time.monotonic() + self._view.interval
        with self._terminal.taken():
            while True:
                self._paint()
                key = self._terminal.key(due - time.monotonic())
                if key is None or not all(self._handle(each) for each in key):
                    return
                if time.monotonic() >= due:
                    if not self._view.paused:
                        self._before, self._now = self._now, recording.sample()
                    due = time.monotonic() + self._view.interval

    def _paint(self) -> None:
        view = self._view
        if self._typed is not None:
            view.message = f"relieve: memory to give back (64M), Enter, Esc: {self._typed}_"
        self._painter.paint(
            lambda width, height: self._screen.frame(
                self._now, self._before, view, width, height, plain=self._painter.plain
            )
        )

    def _handle(self, key: str) -> bool:
        """Do what a key says; return whether to go on."""
        view = self._view
        if self._typed is not None:
            self._answer(key)
            return True
        view.message = ""
        if key == "q":
            return False
        if key == "s":
            orders = self._screen.ORDERS
            view.order = orders[(orders.index(view.order) + 1) % len(orders)]
        elif key == " ":
            view.paused = not view.paused
        elif key in "h?":
            view.help = not view.help
        elif key == "r":
            self._typed = ""
        return True

    def _answer(self, key: str) -> None:
        typed = self._typed or ""
        if key == "\x1b":
            self._typed, self._view.message = None, ""
        elif key in "\r\n":
            self._typed = None
            try:
                self._view.message = _relieve(parse_size(typed))
            except errors.InvalidArgument as error:
                self._view.message = str(error)
        elif key in "\x7f\b":
            self._typed = typed[:-1]
        elif key.isprintable() and len(typed) < 20:
            self._typed = typed + key


def _documents(interval: float, once: bool, count: int | None) -> Iterator[dict[str, Any]]:
    taken = 0
    while True:
        yield recording.sample().document()
        taken += 1
        if once or (count is not None and taken >= count):
            return
        time.sleep(interval)


def _once(screen: Any, interval: float) -> None:
    before = recording.sample()
    time.sleep(interval)
    now = recording.sample()
    from rich.console import Console

    width = shutil.get_terminal_size().columns  # 80 where there is no terminal
    console = Console(width=width, legacy_windows=False)
    view = screen.View(interval=interval, message=" ")
    plain = not console.encoding.lower().startswith("utf")
    parts = screen.frame(now, before, view, width, 10_000, plain=plain)
    for line in screen.lines(console, parts[:-1], 10_000):
        click.echo(line.rstrip())


@click.command(cls=Command)
@click.option(
    "-i", "--interval", type=click.FloatRange(FASTEST), default=2.0, show_default=True,
    metavar="SECONDS", help="Time between two samples.",
)  # fmt: skip
@click.option(
    "-n", "--count", type=click.IntRange(1), metavar="NUMBER",
    help="Documents to print; only with --json.",
)  # fmt: skip
@click.option("--once", is_flag=True, help="Print one picture, or one document, and end.")
@click.option(
    "--json", "as_json", is_flag=True,
    help="Print one JSON document a line and sample, as 'tensormem record' writes them.",
)  # fmt: skip
def top(interval: float, count: int | None, once: bool, as_json: bool) -> None:
    """Show pools, KV caches, model slots, RT clients and pressure, live.

    Keys: s sorts the tables, r gives memory back, space pauses, h helps, q quits. Only what changes
    is sent to the terminal. Only root sees the KV caches of everybody.
    """
    if count is not None and not as_json:
        raise click.UsageError("--count goes with --json")
    if as_json:
        show: Callable[[str], None] = click.echo
        with contextlib.suppress(KeyboardInterrupt):
            for document in _documents(interval, once, count):
                show(json.dumps(document, separators=(",", ":")))
        return
    screen = _screen()
    if once:
        _once(screen, interval)
        return
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise errors.InvalidArgument(
            "'tensormem top' needs a terminal", "use --once for text, --json for documents"
        )
    _Live(screen, interval).run()
