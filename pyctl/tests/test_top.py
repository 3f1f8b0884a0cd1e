# SPDX-License-Identifier: MIT
"""'tensormem top': its picture, what of it is sent, and the program in a real terminal."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from rich.console import Console

from tensormem import recording, screen
from tensormem.cli import cli
from terminal import SRC, Terminal
from test_cli import runner
from test_cli_rt import CLIENTS, make_rt
from test_system import make_process, make_sysfs

LINK = "anon_inode:[tensormem-kv]"
CACHES = {
    7: {"held": 4 << 20, "used": 3 << 20, "cached": 1 << 20, "limit": 64 << 20, "sequences": 3,
        "lookups": 80, "hits": 60},
    9: {"held": 8 << 20, "used": 6 << 20, "cached": 0, "limit": 32 << 20, "sequences": 1,
        "lookups": 0, "hits": 0},
}  # fmt: skip


def make_slot(root: Path, name: str, generations: dict[int, dict[str, object]]) -> None:
    folder = root / "model" / name
    folder.mkdir(parents=True)
    places = {"active": 3, "previous": 0, "staged": 4, "uid": 0, "gid": 0, "mode": "0644"}
    for file, value in places.items():
        (folder / file).write_text(f"{value}\n")
    for number, values in generations.items():
        (folder / str(number)).mkdir()
        for file, value in values.items():
            (folder / str(number) / file).write_text(f"{value}\n")


def make_world(top: Path) -> Path:
    """Make sysfs with something in every part of it, and a /proc beside it."""
    root = make_rt(make_sysfs(top), CLIENTS)
    make_slot(root, "chat", {
        3: {"state": "active", "size": 40 << 20, "loaded": 40 << 20, "readers": 2,
            "private_bytes": 8 << 20, "shared_bytes": 32 << 20, "error": 0, "cached": 0},
        4: {"state": "loading", "size": 40 << 20, "loaded": 10 << 20, "readers": 0,
            "private_bytes": 2 << 20, "shared_bytes": 8 << 20, "error": 0, "cached": 0},
    })  # fmt: skip
    for name, value in (("slots", 1), ("generations", 2), ("held", 50 << 20)):
        (root / "model" / name).write_text(f"{value}\n")
    others: dict[str, dict[str, object]] = {
        "kv": {"caches": 2, "held": 12 << 20, "codec": "zstd"},
        "pressure": {"level": "low", "low": 64 << 20, "high": 96 << 20, "available": 50 << 20,
                     "reliefs": 5, "chunks_calls": 5, "chunks_given": 10 << 20, "oom_calls": 0},
        "bandwidth": {"event": "cycles", "period_us": 1000, "kv_bytes": 3 << 20,
                      "client_budget": (1 << 64) - 1, "client_held_ns": 0},
        "core0": {"budget": 1 << 20, "excess": 3, "held_ns": 2_500_000},
        "core1": {"budget": 0, "excess": 0, "held_ns": 0},
        # as a newer module may have it
        "novelty": {"depth": 7},
        "novelty/part": {"depth": 8},
    }  # fmt: skip
    for group, files in others.items():
        (root / group).mkdir()
        for name, text in files.items():
            (root / group / name).write_text(f"{text}\n")
    proc = top / "proc"
    proc.mkdir()
    lines = {number: {"tensormem-kv": number, **values} for number, values in CACHES.items()}
    make_process(proc, 20, "server", {"4": (LINK, lines[7])})
    make_process(proc, 31, "batch", {"5": (LINK, lines[9])})
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_world(tmp_path)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, root: Path) -> Callable[..., Result]:
    monkeypatch.setenv("TENSORMEM_SYSFS", str(root))
    monkeypatch.setenv("TENSORMEM_PROC", str(root.parent / "proc"))

    def call(*arguments: Any) -> Result:
        return runner().invoke(cli, [*map(str, arguments)], prog_name="tensormem")

    return call


def picture(
    now: recording.Sample, before: recording.Sample | None = None, width: int = 80,
    height: int = 24, **chosen: Any,
) -> list[str]:  # fmt: skip
    console = Console(file=io.StringIO(), width=width, height=height)
    parts = screen.frame(now, before, screen.View(**chosen), width, height)
    return screen.lines(console, parts, height)


# -- the picture -----------------------------------------------------------------------


def later(sample: recording.Sample, seconds: float) -> Callable[[], float]:
    return lambda: sample.time + seconds


def test_picture(root: Path) -> None:
    first = recording.sample(root, root.parent / "proc")
    (root / "buddy" / "allocs").write_text("370\n")
    fdinfo = root.parent / "proc" / "20" / "fdinfo" / "4"
    fdinfo.write_text(fdinfo.read_text().replace("80", "90").replace("hits:\t60", "hits:\t69"))
    now = recording.sample(root, root.parent / "proc", now=later(first, 2))
    shown = picture(now, first)
    assert len(shown) <= 24
    text = [" ".join(line.split()) for line in shown]
    assert "pressure low" in text[0]
    # 15 chunks of 256 are used and 5 ready
    assert text[1].endswith("] 30 MiB used, 10 MiB ready of 512 MiB")
    # 300 runs in two seconds
    assert any(line.startswith("buddy") and "allocs 150/s" in line for line in text)
    assert "7 server (20) 4 MiB 1 MiB 64 MiB 3 90.0 % 76.7 %" in text
    assert "9 batch (31) 8 MiB 0 B 32 MiB 1 - -" in text
    assert "chat 3 active resident 40 MiB 8 MiB 32 MiB 2" in text
    assert "chat 4 loading 25.0 % resident 40 MiB 2 MiB 8 MiB 0" in text
    assert "3 in arena 1 2 KiB 4 MiB 10 2 0 3 < 65.5 us" in text
    assert any(
        line.startswith("RT latency 512 ns █ ▁ ▁ 65.5 us 100 requests, p50 < 1.02 us, p99 < 65")
        for line in text
    )
    tall = " ".join(" ".join(line.split()) for line in picture(now, first, height=40))
    assert (
        "pressure available 50 MiB chunks_calls 5 chunks_given 10 MiB high 96 MiB level low"
        " low 64 MiB reliefs 5 bandwidth client_budget none event cycles kv_bytes 3 MiB"
        " period_us 1000 core0 budget 1048576 excess 3 held_ns 2.50 ms"
    ) in tall
    assert "core1" not in tall, "it has no budget"
    assert "2 clients with 28 tensors hold 30 MiB, 512 KiB of it kept for reuse" in text


def test_sorting(root: Path) -> None:
    now = recording.sample(root, root.parent / "proc")

    def order(by: str) -> list[str]:
        lines = [line.split()[1] for line in picture(now, order=by) if "(" in line]
        return [word for word in lines if word in ("server", "batch")]

    assert order("memory") == ["batch", "server"]
    assert order("name") == ["server", "batch"]
    # what asked more since the sample before
    fdinfo = root.parent / "proc" / "20" / "fdinfo" / "4"
    fdinfo.write_text(fdinfo.read_text().replace("80", "81"))
    after = recording.sample(root, root.parent / "proc", now=later(now, 1))
    lines = [line for line in picture(after, now, order="activity") if "(" in line]
    assert lines[0].split()[1] == "server"


@pytest.mark.parametrize("height", [5, 10, 12, 16, 20, 24, 60])
@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_it_never_overflows(root: Path, width: int, height: int) -> None:
    proc = root.parent / "proc"
    for number in range(100, 130):
        make_process(proc, number, f"worker-with-a-long-name-{number}",
                     {"4": (LINK, {"tensormem-kv": number, "held": number << 20})})  # fmt: skip
    now = recording.sample(root, proc)
    shown = picture(now, now, width, height)
    assert len(shown) <= height
    assert max(map(len, shown)) <= width
    assert "q quit" in shown[-1]
    if height == 24 and width == 80:
        assert any(re.search(r"KV cache \+\d+ more", line) for line in shown)
    assert len(picture(now, now, width, height, help=True)) <= height


def test_a_module_that_has_less(tmp_path: Path) -> None:
    root = make_sysfs(tmp_path)
    (tmp_path / "proc").mkdir()
    text = "\n".join(picture(recording.sample(root, tmp_path / "proc")))
    assert "chunk" in text
    for word in ("KV cache", "model slot", "RT", "pressure", "bandwidth"):
        assert word not in text
    for file in (root / "chunk").iterdir():
        file.unlink()
    assert "does not say" in "\n".join(picture(recording.sample(root, tmp_path / "proc")))


def test_only_what_changed_is_sent(root: Path) -> None:
    out = io.StringIO()
    painter = screen.Painter(out, lambda: (80, 24))
    view = screen.View()
    now = recording.sample(root, root.parent / "proc", now=lambda: 1000.0)

    def paint(sample: recording.Sample) -> str:
        before = len(out.getvalue())
        sent = painter.paint(lambda width, height: screen.frame(sample, None, view, width, height))
        text = out.getvalue()[before:]
        assert len(text) == sent
        return text

    whole = paint(now)
    assert whole.startswith("\x1b[2J")
    assert paint(now) == "", "the same picture again"
    (root / "slab" / "bytes").write_text("10240\n")
    changed = paint(recording.sample(root, root.parent / "proc", now=lambda: 1000.0))
    assert re.findall(r"\x1b\[(\d+);1H", changed) == [str(changed_line(now, root))]
    assert len(changed) < 120 < len(whole) / 10


def changed_line(before: recording.Sample, root: Path) -> int:
    after = recording.sample(root, root.parent / "proc", now=lambda: 1000.0)
    pairs = zip(picture(before), picture(after), strict=True)
    (number,) = [n for n, (old, new) in enumerate(pairs, 1) if old != new]
    return number


# -- without a terminal ----------------------------------------------------------------


def test_once(run: Callable[..., Result]) -> None:
    result = run("top", "--once", "-i", "0.2")
    assert result.exit_code == 0, result.output
    assert "server (20)" in result.stdout
    assert "q quit" not in result.stdout
    assert "\x1b" not in result.stdout
    assert all(len(line) <= 80 for line in result.stdout.splitlines())


def test_json(run: Callable[..., Result]) -> None:
    result = run("top", "--json", "-n", "3", "-i", "0.2")
    documents = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(documents) == 3
    assert documents[0]["groups"]["chunk"]["used"] == 12
    assert recording.parse(documents[0]).document() == documents[0]
    assert len(run("top", "--json", "--once").stdout.splitlines()) == 1


def test_refusals(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("top")
    assert result.exit_code == 1
    assert "needs a terminal" in result.stderr
    assert run("top", "-n", "3").exit_code == 2
    assert run("top", "-i", "0").exit_code == 2
    monkeypatch.setenv("TENSORMEM_SYSFS", "/nonexistent")
    assert "module is not loaded" in run("top", "--once").stderr
    document = json.loads(run("top", "--json").stdout)
    assert document["error"]["type"] == "NotAvailable"


def test_without_rich() -> None:
    code = "import sys; sys.modules['rich'] = None; from tensormem.cli import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code, "top", "--once"], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(SRC)},
    )  # fmt: skip
    assert result.returncode == 1
    assert "python3-rich" in result.stderr
    assert "Traceback" not in result.stderr


# -- in a terminal ---------------------------------------------------------------------

Start = Callable[..., Terminal]


@pytest.fixture
def start(root: Path, tmp_path: Path) -> Iterator[Start]:
    started = []

    def call(*arguments: str, path: str = "", **options: int) -> Terminal:
        environment = {
            "TENSORMEM_SYSFS": str(root),
            "TENSORMEM_PROC": str(root.parent / "proc"),
            "PYTHONPATH": f"{path}:{SRC}" if path else str(SRC),
        }
        started.append(Terminal("top", "-i", "0.2", *arguments, environment=environment, **options))
        return started[-1]

    yield call
    for each in started:
        each.close()


def test_keys(start: Start, root: Path) -> None:
    terminal = start()
    before = termios.tcgetattr(terminal.slave)
    text = terminal.until("server (20)", "model slot", "RT latency", "sorted by memory")
    assert text.index("batch (31)") < text.index("server (20)")
    terminal.type("s")
    terminal.until("sorted by activity")
    terminal.type("s")
    text = terminal.until("sorted by name")
    assert text.index("server (20)") < text.index("batch (31)")
    terminal.type("h")
    terminal.until("sort the tables", gone="server (20)")
    terminal.type("h")
    terminal.until("server (20)", gone="sort the tables")
    (root / "chunk" / "free").write_text("10\n")
    terminal.until("20 MiB ready of 512 MiB")
    terminal.type(" ")
    terminal.until("paused")
    (root / "chunk" / "free").write_text("12\n")
    terminal.read(1.0)
    assert "20 MiB ready" in terminal.text()
    terminal.type(" ")
    terminal.until("24 MiB ready of 512 MiB", gone="paused")
    terminal.type("q")
    assert terminal.end() == 0
    assert terminal.received.rstrip().endswith(b"\x1b[?25h\x1b[?1049l")
    assert termios.tcgetattr(terminal.slave) == before


def test_an_idle_screen_costs_a_line(start: Start) -> None:
    terminal = start()
    terminal.until("server (20)", "sorted by memory")
    terminal.read(0.5)
    rows = set()
    for _ in range(10):
        rows |= set(re.findall(rb"\x1b\[(\d+);1H", terminal.read(0.1)))
    assert rows <= {b"1"}, "only the clock"


def test_resize(start: Start) -> None:
    terminal = start()
    terminal.until("server (20)", "sorted by memory")
    terminal.resize(60, 12)
    terminal.wait(lambda _: "q quit" in terminal.screen.display[11], "last line", 30)
    terminal.resize(100, 40)
    terminal.wait(lambda _: "q quit" in terminal.screen.display[-1], "last line", 30)
    assert "server (20)" in terminal.text()


STAND_IN = """
import sys, types
pressure = types.ModuleType("tensormem.pressure")
def relieve(wanted):
    open({log!r}, "a").write(f"{{wanted}}\\n")
    return types.SimpleNamespace(total=wanted // 2)
pressure.relieve = relieve
sys.modules["tensormem.pressure"] = pressure
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> tuple[str, Path]:
    """Put another module in the place of the one that relieves."""
    folder, log = tmp_path / "site", tmp_path / "log"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(STAND_IN.format(log=str(log)))
    return str(folder), log


def test_relieve(start: Start, stand_in: tuple[str, Path]) -> None:
    path, log = stand_in
    terminal = start(path=path)
    terminal.until("sorted by memory")
    terminal.type("r")
    terminal.until("memory to give back")
    terminal.type("64X\x7fM")
    terminal.until("64M_")
    terminal.type("\r")
    terminal.until("given back: 32 MiB of 64 MiB")
    terminal.type("r")
    terminal.until("memory to give back")
    terminal.type("lots\r")
    terminal.until("is not a size")
    terminal.type("r")
    terminal.until("memory to give back")
    terminal.type("1G\x1b")
    terminal.until("q quit")
    terminal.type("q")
    assert terminal.end() == 0
    assert log.read_text() == f"{64 << 20}\n", "once: the others were refused or cancelled"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals(start: Start, number: signal.Signals) -> None:
    terminal = start()
    before = termios.tcgetattr(terminal.slave)
    terminal.until("sorted by memory")
    terminal.process.send_signal(number)
    assert terminal.end() == 0
    assert terminal.received.rstrip().endswith(b"\x1b[?1049l")
    assert termios.tcgetattr(terminal.slave)[3] == before[3]


def test_suspend(start: Start) -> None:
    terminal = start()
    before = termios.tcgetattr(terminal.slave)[3]
    terminal.until("sorted by memory")
    assert termios.tcgetattr(terminal.slave)[3] != before
    terminal.type("\x1a")
    _, status = os.waitpid(terminal.process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    assert termios.tcgetattr(terminal.slave)[3] == before
    assert terminal.read(0.2).endswith(b"\x1b[?1049l")
    terminal.process.send_signal(signal.SIGCONT)
    again = re.compile(rb"\[\?1049l.*\[\?1049h.*\[2J", re.S)
    terminal.wait(lambda _: again.search(terminal.received) is not None, "repaint")
    terminal.type("q")
    assert terminal.end() == 0


def test_the_module_goes(start: Start, root: Path) -> None:
    terminal = start()
    terminal.until("sorted by memory")
    root.rename(root.with_name("gone"))
    assert terminal.end() == 1
    after = terminal.received.rpartition(b"\x1b[?1049l")[2]
    assert b"the module is not loaded" in after, "said on the ordinary screen"


