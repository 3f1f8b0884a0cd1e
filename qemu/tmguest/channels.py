# SPDX-License-Identifier: MIT
"""The host's end of a guest's channels: stdout, stderr and the lines of the result."""

from __future__ import annotations

import base64
import binascii
import os
import sys
import threading
from collections.abc import Callable
from typing import BinaryIO

Sink = Callable[[bytes], None]


class Result:
    """What the guest told about its run, line by line."""

    def __init__(self) -> None:
        """Nothing told yet."""
        self.exit_code: int | None = None
        self.failure = ""
        self.unload = ""
        self.ended = threading.Event()
        self._rest = b""

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the result channel; unknown lines count as failures."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            word, _, rest = line.decode(errors="replace").partition(" ")
            if word == "exit" and rest.isdigit():
                self.exit_code = int(rest)
            elif word == "fail":
                self.failure = rest
            elif word == "unload":
                self.unload = rest
            elif word == "end":
                self.ended.set()
            else:
                self.failure = self.failure or f"the guest said {line!r}"


def passing_on(stream: BinaryIO) -> Sink:
    """A sink that writes to ``stream`` at once, and swallows the rest when nobody reads it any more."""
    closed = False

    def write(data: bytes) -> None:
        nonlocal closed
        if not closed:
            try:
                stream.write(data)
                stream.flush()
            except BrokenPipeError:
                closed = True

    return write


def sinks(result: Result) -> dict[str, Sink]:
    """Where each channel goes."""
    return {
        "stdout": passing_on(sys.stdout.buffer),
        "stderr": passing_on(sys.stderr.buffer),
        "result": result.feed,
    }


FRAMES_BEGIN = b"tensormem frames"


def unframe(channels: dict[str, Sink]) -> Sink:
    """A sink for the serial line of a board without virtio, where the channels share one line in frames.

    What comes before the relay's greeting is the serial driver trying the line.
    """
    rest = b""
    greeted = False

    def feed(data: bytes) -> None:
        nonlocal rest, greeted
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if not greeted:
                greeted = line.strip() == FRAMES_BEGIN
                continue
            name, _, payload = line.strip().partition(b" ")
            sink = channels.get(name.decode(errors="replace"))
            try:
                decoded = base64.b64decode(payload, validate=True)
            except binascii.Error:
                sink = None
            if sink is None:
                channels["result"](b"fail a frame on the serial line is damaged\n")
            else:
                sink(decoded)

    return feed


def pump(fd: int, sink: Sink) -> threading.Thread:
    """Start a thread that reads ``fd`` to its end into ``sink``."""

    def work() -> None:
        with os.fdopen(fd, "rb", buffering=0) as source:
            while data := source.read(65536):
                sink(data)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread
