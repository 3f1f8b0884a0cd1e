# SPDX-License-Identifier: MIT
"""A monitor beside a test: started, ready, ended, and what it told."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

BPF = Path(__file__).resolve().parents[2] / "bpf"
#: Seconds for a compiler in an emulated machine.
PATIENCE = 300


class Monitor:
    """One tool, or any command that runs one; ready when the constructor's second half, :meth:`ready`, is over."""

    def __init__(
        self, name: str, *arguments: str, command: Sequence[str] = (), env: dict[str, str] | None = None
    ) -> None:
        self.name = name
        command = [*(command or (sys.executable, str(BPF / f"{name}.py"))), *arguments]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL, env=env
        )
        self.said: list[str] = []

    def ready(self) -> Self:
        """Wait until it watches."""
        assert self.process.stderr
        while line := self.process.stderr.readline():
            self.said.append(line)
            if "events watched" in line:
                return self
        raise AssertionError(f"{self.name} has not come to watch:\n{''.join(self.said)}")

    def end(self, number: int = signal.SIGINT) -> list[str]:
        """End it; the lines it printed."""
        self.process.send_signal(number)
        return self.lines()

    def lines(self) -> list[str]:
        """Wait for its end, which must be a good one; the lines it printed."""
        out, err = self.process.communicate(timeout=PATIENCE)
        assert self.process.returncode == 0, err
        assert "Traceback" not in err, err
        return out.splitlines()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


def documents(lines: Sequence[str]) -> list[dict[str, Any]]:
    """Lines of JSON."""
    return [json.loads(line) for line in lines]
