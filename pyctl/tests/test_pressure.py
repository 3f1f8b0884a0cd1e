# SPDX-License-Identifier: MIT
"""Pressure: relief, watermarks, and the policy beside the module, on files without a kernel."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from tensormem import abi, errors, pressure, system
from tensormem.cli import cli
from test_cli import narrow, runner
from test_system import make_sysfs

MIB = 1 << 20
FILES: dict[str, object] = {
    "level": "low", "available": 20 * MIB, "low": 32 * MIB, "high": 64 * MIB, "reliefs": 9,
    "fruitless": 2, "chunks_calls": 9, "chunks_given": 40 * MIB, "prefixes_calls": 5,
    "prefixes_given": 12 * MIB, "idle_calls": 3, "idle_given": 2 * MIB, "weights_calls": 2,
    "weights_given": 8 * MIB, "oom_calls": 1, "oom_given": 4 * MIB,
}  # fmt: skip


def make_pressure(root: Path) -> Path:
    """Add what make_sysfs lacks."""
    (root / "pressure").mkdir()
    for name, value in FILES.items():
        (root / "pressure" / name).write_text(f"{value}\n")
    return root


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = make_pressure(make_sysfs(tmp_path))
    monkeypatch.setenv("TENSORMEM_SYSFS", str(root))
    return root


class Module:
    """The one call, as the module makes it."""

    def __init__(self, *steps: int, error: int = 0) -> None:
        self.steps, self.error = steps, error
        self.asked: list[tuple[int, int]] = []

    def ioctl(self, request: int, argument: Any) -> None:
        assert request == abi.IOC_RELIEVE
        assert argument.flags == 0
        self.asked.append((argument.bytes, argument.steps))
        if self.error:
            raise OSError(self.error, "refused")
        for i, given in enumerate(self.steps):
            argument.step[i] = given
        argument.given = sum(self.steps)

    def close(self) -> None:
        pass


def relieve(module: Module, *arguments: Any) -> pressure.Given:
    device: Any = module
    return pressure.relieve(*arguments, device=device)


@pytest.mark.parametrize(
    ("size", "wanted"), [(1, 1), ("64M", 64 * MIB), ("1G", 1 << 30), ((1 << 64) - 1, (1 << 64) - 1)]
)
def test_relieve(size: pressure.Size, wanted: int) -> None:
    module = Module(4 * MIB, 2 * MIB, 0, 0)
    given = relieve(module, size)
    assert module.asked == [(wanted, 0)]
    steps = {"chunks": 4 * MIB, "prefixes": 2 * MIB, "idle": 0, "weights": 0}
    assert given == pressure.Given(wanted, 6 * MIB, steps)


def test_some_steps() -> None:
    module = Module(0, 0, 0, 0)
    relieve(module, 1, ["idle", "chunks"])
    relieve(module, 1, ["prefixes"])
    relieve(module, 1, ["weights"])
    assert module.asked == [(1, 5), (1, 2), (1, 8)]


@pytest.mark.parametrize(
    "arguments", [(0,), (-1,), (1 << 64,), (1, ["rt"]), (1, ["chunks", ""]), ("x",)]
)
def test_what_cannot_be_asked_for(arguments: tuple[Any, ...]) -> None:
    module = Module()
    with pytest.raises(errors.InvalidArgument):
        relieve(module, *arguments)
    assert not module.asked


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.EPERM, errors.NotPermitted), (errno.ENOTTY, errors.IncompatibleModule),
     (errno.EINTR, errors.Interrupted), (errno.EINVAL, errors.InvalidArgument)],
)  # fmt: skip
def test_refusals(number: int, kind: type[errors.TensormemError]) -> None:
    with pytest.raises(kind) as caught:
        relieve(Module(error=number), 1)
    assert caught.value.remedy


def test_without_the_module(tmp_path: Path) -> None:
    with pytest.raises(errors.DeviceMissing):
        pressure.relieve(1, device=tmp_path / "none")
    with pytest.raises(errors.NotAvailable):
        pressure.status(tmp_path / "none")


def test_status(root: Path) -> None:
    now = pressure.status()
    assert (now.level, now.available, now.low, now.high) == ("low", 20 * MIB, 32 * MIB, 64 * MIB)
    assert (now.reliefs, now.fruitless) == (9, 2)
    assert now.steps == {
        "chunks": pressure.StepStatus(9, 40 * MIB),
        "prefixes": pressure.StepStatus(5, 12 * MIB),
        "idle": pressure.StepStatus(3, 2 * MIB),
        "weights": pressure.StepStatus(2, 8 * MIB),
    }
    assert list(now.steps) == ["chunks", "prefixes", "idle", "weights"]
    assert now.oom == pressure.StepStatus(1, 4 * MIB)


def test_a_module_without_pressure(tmp_path: Path) -> None:
    root = make_sysfs(tmp_path)
    with pytest.raises(errors.IncompatibleModule):
        pressure.status(root)
    with pytest.raises(errors.IncompatibleModule):
        pressure.open_source(root=root)


# Watermarks


@pytest.mark.parametrize(
    ("settings", "order"),
    [
        ({"low": 1}, ["low"]),
        ({"high": 99 * MIB}, ["high"]),
        ({"low": 80 * MIB, "high": 96 * MIB}, ["high", "low"]),
        ({"low": 8 * MIB, "high": 16 * MIB}, ["low", "high"]),
        ({"low": 0, "high": 0}, ["low", "high"]),
        ({"low": 40 * MIB, "high": 40 * MIB}, ["high", "low"]),
        ({"low": 32 * MIB, "high": 64 * MIB}, []),
    ],
    ids=str,
)
def test_watermarks(
    root: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], order: list[str]
) -> None:
    """At no moment is the low one above the high one."""
    written: list[str] = []
    write = system.write_value

    def spy(name: str, value: int, where: Any = None) -> None:
        written.append(name.split("/")[1])
        write(name, value, where)
        now = pressure.status()
        assert now.low <= now.high

    monkeypatch.setattr(system, "write_value", spy)
    now = pressure.set_watermarks(**settings)
    assert written == order
    assert {"low": now.low, "high": now.high} == {"low": 32 * MIB, "high": 64 * MIB} | settings


@pytest.mark.parametrize(
    "settings", [{"low": 65 * MIB}, {"high": 31 * MIB}, {"low": -1}, {"low": 2, "high": 1}]
)
def test_watermarks_out_of_order(root: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(errors.InvalidArgument):
        pressure.set_watermarks(**settings)
    assert (pressure.status().low, pressure.status().high) == (32 * MIB, 64 * MIB)


def test_watermarks_take_root(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def refuse(path: Path, mode: str = "r", **how: Any) -> Any:
        if "w" in mode:
            raise PermissionError(errno.EACCES, "refused")
        return real(path, mode, **how)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(errors.NotPermitted):
        pressure.set_watermarks(low=1)


# What tells


def test_psi_where_it_is_on(root: Path, tmp_path: Path) -> None:
    (tmp_path / "pressure").mkdir()
    file = tmp_path / "pressure/memory"
    file.write_text("")
    with pressure.open_source(150_000, proc=tmp_path) as source:
        assert source.name == "psi"
        assert file.read_bytes() == b"some 150000 1000000\0"
        assert "150 ms" in str(source.fired())
        assert source.fileno() >= 0


def test_the_level_where_it_is_not(root: Path, tmp_path: Path) -> None:
    with pressure.open_source(proc=tmp_path) as source:
        assert source.name == "level"
        told = []
        for level in ("low", "critical", "critical", "low", "none", "critical"):
            (root / "pressure/level").write_text(f"{level}\n")
            told.append(source.fired())
    rose = ["the level rose from low to critical", "the level rose from none to critical"]
    assert told == [None, rose[0], None, None, None, rose[1]]


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EOPNOTSUPP, errno.EINVAL])
def test_psi_that_cannot_be_had(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    (tmp_path / "pressure").mkdir()
    (tmp_path / "pressure/memory").write_text("")
    fds = len(os.listdir("/proc/self/fd"))

    def refuse(fd: int, data: bytes) -> int:
        raise OSError(number, "refused")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", refuse)
        source = pressure.open_source(proc=tmp_path)
    assert source.name == "level"
    source.close()
    source.close()
    assert len(os.listdir("/proc/self/fd")) == fds


def test_psi_that_is_not_ours(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "refused")

    monkeypatch.setattr(pressure.PsiSource, "__init__", refuse)
    with pytest.raises(errors.NotPermitted):
        pressure.open_source()


@pytest.mark.parametrize("threshold", [0, -1, 1_000_001])
def test_thresholds_out_of_range(root: Path, threshold: int) -> None:
    with pytest.raises(errors.InvalidArgument):
        pressure.open_source(threshold)


# The policy


class Pair:
    """Urgent data on a socket is what POLLPRI is for elsewhere."""

    name = "level"

    def __init__(self, reasons: list[str | None]) -> None:
        server = socket.create_server(("127.0.0.1", 0))
        self.there = socket.create_connection(server.getsockname())
        self.here, _ = server.accept()
        server.close()
        self.reasons = reasons

    def tell(self) -> None:
        self.there.send(b"!", socket.MSG_OOB)

    def fileno(self) -> int:
        return self.here.fileno()

    def fired(self) -> str | None:
        self.here.recv(1, socket.MSG_OOB)
        reason = self.reasons.pop(0)
        if self.reasons:
            self.tell()
        return reason

    def close(self) -> None:
        self.here.close()
        self.there.close()


@pytest.fixture
def stop() -> Iterator[tuple[int, int]]:
    pipe = os.pipe()
    yield pipe
    for fd in pipe:
        os.close(fd)


def state(available: int) -> pressure.PressureStatus:
    nothing = pressure.StepStatus(0, 0)
    return pressure.PressureStatus("low", available, 32 * MIB, 64 * MIB, 0, 0, {}, nothing)


def test_what_is_missing_is_given(stop: tuple[int, int]) -> None:
    source = Pair(["one", None, "two", "three"])
    available = iter((10 * MIB, 63 * MIB, 500 * MIB))
    asked: list[int] = []

    def act(wanted: int) -> pressure.Given:
        asked.append(wanted)
        if len(asked) == 3:
            os.write(stop[1], b"x")
        return pressure.Given(wanted, MIB, {})

    source.tell()
    actions = list(
        pressure.watch(
            source, least=8 * MIB, act=act, look=lambda: state(next(available)), stop=stop[0],
            clock=lambda: 7.0,
        )
    )  # fmt: skip
    # up to the high watermark, and no less than what is worth the while
    assert asked == [54 * MIB, 8 * MIB, 8 * MIB]
    assert [a.reason for a in actions] == ["one", "two", "three"]
    assert actions[0] == pressure.Action(
        7.0, "level", "one", "low", 10 * MIB, pressure.Given(54 * MIB, MIB, {})
    )
    source.close()


def test_it_ends_when_told(stop: tuple[int, int]) -> None:
    source = Pair([])
    ended: list[Any] = []
    thread = threading.Thread(target=lambda: ended.extend(pressure.watch(source, stop=stop[0])))
    thread.start()
    os.write(stop[1], b"x")
    thread.join(30)
    assert not thread.is_alive()
    assert ended == []
    source.close()


def test_a_refusal_ends_it(stop: tuple[int, int]) -> None:
    source = Pair(["one"])
    source.tell()

    def act(wanted: int) -> pressure.Given:
        raise errors.NotPermitted("no", "root")

    with pytest.raises(errors.NotPermitted):
        next(pressure.watch(source, act=act, look=lambda: state(0), stop=stop[0]))
    source.close()


def test_a_source_that_was_closed(stop: tuple[int, int]) -> None:
    class Gone(Pair):
        def fileno(self) -> int:
            return 1_000_000

    source = Gone([])
    with pytest.raises(errors.TensormemError, match="closed"):
        next(pressure.watch(source, stop=stop[0]))
    source.close()


# The command line

Run = Callable[..., Result]


@pytest.fixture
def run(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("TENSORMEM_PROC", str(tmp_path))

    def call(*arguments: Any) -> Result:
        return runner().invoke(cli, ["pressure", *map(str, arguments)], prog_name="tensormem")

    return call


def test_show(run: Run) -> None:
    result = run("show")
    assert result.exit_code == 0
    assert narrow(result.stdout)
    text = " ".join(result.stdout.split())
    for part in ("level low", "available 20 MiB", "low 32 MiB", "high 64 MiB", "chunks 9 40 MiB",
                 "prefixes 5 12 MiB", "idle 3 2 MiB", "weights 2 8 MiB", "OOM 1 4 MiB",
                 "9 reliefs, 2 of them"):  # fmt: skip
        assert part in text, text
    document = json.loads(run("show", "--json").stdout)
    assert document["level"] == "low"
    assert document["steps"]["idle"] == {"calls": 3, "given": 2 * MIB}


def test_set(run: Run, root: Path) -> None:
    result = run("set", "--low", "100M", "--high", "200M")
    assert result.stdout == "watermarks: low 100 MiB, high 200 MiB\n"
    assert (root / "pressure/low").read_text() == str(100 * MIB)
    document = json.loads(run("set", "--low", 0, "--json").stdout)
    assert document == {"low": 0, "high": 200 * MIB, "level": "low"}


@pytest.mark.parametrize(
    "arguments",
    [["set"], ["set", "--low", "x"], ["relieve"], ["relieve", "--bytes", "-1"],
     ["relieve", "--bytes", "1", "--step", "rt"], ["watch", "--threshold", "0"],
     ["watch", "--threshold", "1001"]],
)  # fmt: skip
def test_wrong_usage(run: Run, arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


def test_set_refused(run: Run) -> None:
    result = run("set", "--low", "100M", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["type"] == "InvalidArgument"


def test_relieve_by_hand(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def fake(size: int, steps: tuple[str, ...]) -> pressure.Given:
        asked.append((size, steps))
        return pressure.Given(size, 6 * MIB, {"chunks": 4 * MIB, "prefixes": 2 * MIB, "idle": 0})

    monkeypatch.setattr(pressure, "relieve", fake)
    result = run("relieve", "--bytes", "64M")
    assert narrow(result.stdout)
    assert "given back: 6 MiB of 64 MiB" in result.stdout
    assert "idle" not in result.stdout
    document = json.loads(
        run("relieve", "--bytes", "8M", "--step", "idle", "--step", "chunks", "--json").stdout
    )
    assert document["total"] == 6 * MIB
    assert asked == [(64 * MIB, ()), (8 * MIB, ("idle", "chunks"))]


@pytest.mark.parametrize("as_json", [False, True])
def test_watch_prints_a_line_for_each_action(
    run: Run, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    given = pressure.Given(54 * MIB, 6 * MIB, {"chunks": 6 * MIB, "prefixes": 0, "idle": 0})
    action = pressure.Action(0.0, "level", "the level rose", "low", 10 * MIB, given)

    def watch(source: Any, *, least: int, stop: int) -> Iterator[pressure.Action]:
        assert least == 2 * MIB
        yield action
        yield replace(action, time=1.0)

    monkeypatch.setattr(pressure, "watch", watch)
    before = signal.getsignal(signal.SIGTERM)
    result = run("watch", "--bytes", "2M", *(["--json"] if as_json else []))
    assert result.exit_code == 0
    assert signal.getsignal(signal.SIGTERM) is before
    lines = result.stdout.splitlines()
    assert len(lines) == 3
    if as_json:
        assert json.loads(lines[0]) == {"source": "level"}
        assert json.loads(lines[1])["relief"]["total"] == 6 * MIB
        assert json.loads(lines[2])["time"] == 1.0
    else:
        assert lines[0] == "watching the module's level (no PSI)"
        assert lines[1].endswith("the level rose: gave back 6 MiB of 54 MiB")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_watch_ends_on_a_signal(root: Path, tmp_path: Path, number: signal.Signals) -> None:
    # sysfs says POLLPRI when a value has changed; a regular file never does
    source = str(Path(pressure.__file__).parents[1])
    environment = os.environ | {"TENSORMEM_PROC": str(tmp_path), "PYTHONPATH": source}
    command = [sys.executable, "-m", "tensormem", "pressure", "watch"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "watching the module's level (no PSI)\n"
        process.send_signal(number)
        assert process.wait(60) == 0
        assert process.stdout.read() == ""
