# SPDX-License-Identifier: MIT
"""A terminal that a test types on and reads: a pty, and an emulator of its screen."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pyte

SRC = Path(__file__).resolve().parents[1] / "src"


class Terminal:
    """A program in a terminal of its own."""

    def __init__(
        self, *arguments: str, environment: Mapping[str, str], width: int = 80, height: int = 24
    ) -> None:
        self.master, slave = os.openpty()
        self.slave = slave
        self.screen = pyte.Screen(width, height)
        self.stream = pyte.ByteStream(self.screen)
        self.received = b""
        termios.tcsetwinsize(self.master, (height, width))

        self.process = subprocess.Popen(
            ["setsid", "--ctty", sys.executable, "-m", "tensormem", *arguments],
            stdin=slave, stdout=slave, stderr=slave,
            env={**os.environ, "PYTHONPATH": str(SRC), "TERM": "xterm-256color",
                 "PYTHONIOENCODING": "utf-8", **environment},
        )  # fmt: skip

    def read(self, seconds: float) -> bytes:
        """Take what comes until nothing has for so long."""
        taken = b""
        while select.select([self.master], [], [], seconds)[0]:
            try:
                data = os.read(self.master, 65536)
            except OSError:
                break  # the other side is gone
            if not data:
                break
            taken += data
            self.stream.feed(data)
        self.received += taken
        return taken

    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.screen.display)

    def until(self, *words: str, gone: str = "", seconds: float = 60) -> str:
        """Wait until the screen shows all of these, and not that."""
        return self.wait(
            lambda text: all(w in text for w in words) and not (gone and gone in text),
            f"{words} without {gone!r}" if gone else str(words), seconds,
        )  # fmt: skip

    def wait(self, true: Callable[[str], bool], what: str, seconds: float = 60) -> str:
        end = time.monotonic() + seconds
        while not true(self.text()):
            assert time.monotonic() < end, f"no {what} on the screen:\n{self.text()}"
            self.read(0.05)
        return self.text()

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def resize(self, width: int, height: int) -> None:
        self.screen.resize(height, width)
        termios.tcsetwinsize(self.master, (height, width))

    def end(self, seconds: float = 60) -> int:
        """Wait for the program's end, reading on; return its exit code."""
        end = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < end, f"it does not end:\n{self.text()}"
            self.read(0.02)
        self.read(0.05)
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)
        os.close(self.slave)
