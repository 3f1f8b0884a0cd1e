# SPDX-License-Identifier: MIT
"""Rows of monitor.json: runs in the guest, prints ``NAME OURS PEER`` lines."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tensormem
from tensormem.demo import run

TREE = Path(__file__).parents[2]
MODULE = TREE / "kmod/tests/tm_bench_event.ko"
TRACING = Path("/sys/kernel/tracing/events/tensormem/enable")
TOOLS = ("tmlat", "tmtop", "tmsnoop", "tmleak", "tmpressure", "tmdeadline", "tmswap", "tmkv")
ROUNDS = 2000
#: Tools of calls and RT blocks with the events of a round that they take; of those that the others have there are few.
RATED: tuple[tuple[str, tuple[str, ...], int], ...] = (
    ("tmlat", (), 3), ("tmtop", (), 3), ("tmsnoop", (), 4), ("tmleak", ("-s", "16"), 2), ("tmleak", (), 2),
)  # fmt: skip
#: Not in the row: an entry for each block, and stacks, take what they take; bpf/README.md says how much.
ABOVE = "tmleak"
TOKENS = 24


def of_idle_netlink() -> None:
    """The row of tm_bench_event.c: nobody has listened since the module was loaded."""
    subprocess.run(["insmod", MODULE], check=True)
    row = Path("/sys/kernel/debug/tm_bench_event/idle").read_text()
    subprocess.run(["rmmod", "tm_bench_event"], check=True)
    with tensormem.events(["bandwidth"]) as reader:
        assert reader.state()["bandwidth"].seq == 0, "somebody listened"
    print(row, end="", flush=True)


@contextmanager
def watching(name: str, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A tool at work: its start is over, its end is not yet. It must not lose an event."""
    with tempfile.TemporaryFile("w+") as told:
        process = subprocess.Popen(
            [sys.executable, TREE / f"bpf/{name}.py", "-j", *options], stdout=told, stderr=subprocess.PIPE, text=True
        )
        try:
            assert process.stderr
            for line in process.stderr:
                if "events watched" in line:
                    break
            else:
                sys.exit(f"{name} has not come to watch")
            yield process
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate()
        told.seek(0)
        lost = json.loads(told.readlines()[-1])["lost"]
        if lost:
            sys.exit(f"{name} lost {lost} events")


def rate(program: Path, rounds: int = ROUNDS) -> int:
    """Instructions of so many rounds of four events."""
    return int(subprocess.run([program, str(rounds)], check=True, capture_output=True, text=True).stdout)


def of_events(program: Path) -> None:
    """Instructions more for whoever makes an event: the dearest tool, and tracefs' own ring.

    The tool stands still meanwhile: what its reading takes is in the row of the demo.
    """
    alone = rate(program)
    dearest = 0.0
    for name, options, events in RATED:
        with watching(name, *options) as process:
            process.send_signal(signal.SIGSTOP)
            try:
                each = (rate(program) - alone) / ROUNDS / events
            finally:
                process.send_signal(signal.SIGCONT)
        print(f"# {' '.join([name, *options])}: {each:.0f} instructions an event", flush=True)
        if name != ABOVE:
            dearest = max(dearest, each)
    TRACING.write_text("1")
    traced = (rate(program) - alone) / ROUNDS / 4
    TRACING.write_text("0")
    print(f"monitor-event {dearest:.0f} {traced:.0f}", flush=True)


def generate() -> float:
    """Instructions of a token, from the first one on; what a tool does meanwhile included."""
    times: list[float] = []
    with tensormem.open() as client:
        run.run(client, count=TOKENS, each=lambda token: times.append(time.perf_counter()))
    return (times[-1] - times[0]) / (len(times) - 1) * 1e9


def of_demo() -> None:
    """The demo, which generates text, alone and with each tool beside it: the dearest counts."""
    generate()
    alone = generate()
    dearest = 0.0
    for name in TOOLS:
        with watching(name):
            each = generate()
        print(f"# {name}: {each / alone:.4f} of the demo alone", flush=True)
        dearest = max(dearest, each)
    print(f"monitor-demo {dearest:.0f} {alone:.0f}", flush=True)


def main() -> None:
    of_idle_netlink()
    of_events(Path(sys.argv[1]) / "monitor_rate")
    of_demo()


if __name__ == "__main__":
    main()
