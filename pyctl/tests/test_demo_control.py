# SPDX-License-Identifier: MIT
"""The control loop: what is counted, that changes are seen, and that no process is left."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import io
import json
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tensormem
from fake import FakeDevice
from fakert import GRANULE, RTPool
from tensormem import client as client_module
from tensormem import errors, histogram, realtime
from tensormem.cli import cli
from tensormem.demo import control, load
from test_cli import narrow, runner

SRC = Path(control.__file__).parents[2]
MS = 1_000_000


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[RTPool]:
    pool = RTPool()
    device = lambda _: FakeDevice(rt=pool, max_batch=64)  # noqa: E731
    monkeypatch.setattr(realtime, "KernelDevice", device)
    monkeypatch.setattr(client_module, "KernelDevice", device)
    yield pool
    gc.collect()
    assert not pool.arenas


class FakeClock(control.Clock):
    """Each look takes a microsecond; what a tick takes is given."""

    def __init__(self, *takes: int) -> None:
        self.time, self.takes, self.woken = 5 * MS, list(takes), list[int]()
        self.ahead = 0

    def now(self) -> int:
        self.time += 1000
        return self.time

    def sleep_until(self, due: int) -> None:
        self.time = max(self.time, due)
        self.woken.append(due)
        if self.takes:
            self.ahead = self.takes.pop(0)


class Memory:
    """Messages in arrays, which it can break; it takes the time that the clock says."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.held: dict[tuple[int, int], ctypes.Array[ctypes.c_char]] = {}
        self.sizes: list[int] = []
        self.most = 0
        self.refuse: set[int] = set()
        self.spoil: int | None = None

    def take(self, kind: int, slot: int, size: int) -> int:
        assert (kind, slot) not in self.held, "it was given back before"
        if len(self.sizes) == self.spoil:
            next(iter(self.held.values()))[0] = b"?"
        self.sizes.append(size)
        if kind == 0:
            self.clock.time += self.clock.ahead
            self.clock.ahead = 0
        if len(self.sizes) in self.refuse:
            raise errors.DeadlineMissed if kind else errors.ArenaFull
        self.held[kind, slot] = (ctypes.c_char * size)()
        self.most = max(self.most, len(self.held))
        return ctypes.addressof(self.held[kind, slot])

    def give(self, kind: int, slot: int) -> None:
        del self.held[kind, slot]


# -- the loop --------------------------------------------------------------------------------


def test_turns() -> None:
    clock = FakeClock()
    memory = Memory(clock)
    run = control.turns(memory, 20, MS, clock)
    assert (run.ticks, run.missed, run.refused, run.wrong) == (20, 0, 0, 0)
    assert sum(run.work) == sum(run.late) == 20
    assert [b - a for a, b in zip(clock.woken, clock.woken[1:], strict=False)] == [MS] * 19
    assert (run.median, run.longest, run.latest) == (1000, 1000, 1000)
    assert run.work == run.late == histogram.count([1000] * 20)
    assert memory.held == {}
    assert memory.most == 3 * control.KEPT
    assert len(memory.sizes) == 60
    for kind, most in enumerate(control.CLASSES):
        sizes = memory.sizes[kind::3]
        assert most // 2 <= min(sizes) < max(sizes) <= most
    assert (run.fifo, run.locked) == (False, False)


def test_the_sizes_are_the_same_each_time() -> None:
    found = []
    for _ in range(2):
        memory = Memory(FakeClock())
        control.turns(memory, 30, MS, memory.clock)
        found.append(memory.sizes)
    assert found[0] == found[1]


def test_ticks_that_are_late() -> None:
    """The second tick takes three and a half periods: it is late, and two are left out."""
    clock = FakeClock(0, 3_500_000)
    run = control.turns(Memory(clock), 8, MS, clock)
    assert [due // MS for due in clock.woken] == [6, 7, 10, 11, 12, 13]
    assert (run.ticks, run.missed) == (8, 3)
    assert sum(run.work) == 6
    assert run.longest == 3_501_000
    assert run.latest > 500_000, "the one after it woke late"
    assert run.median == 1000


def test_a_last_tick_that_is_late() -> None:
    clock = FakeClock(0, 0, 9 * MS)
    run = control.turns(Memory(clock), 4, MS, clock)
    assert (run.missed, sum(run.work)) == (2, 3)


def test_refused_and_changed_messages_are_seen() -> None:
    memory = Memory(FakeClock())
    memory.refuse = {4, 8, 60}
    run = control.turns(memory, 20, MS, memory.clock)
    assert (run.refused, run.wrong) == (3, 0)
    assert memory.held == {}
    memory = Memory(FakeClock())
    memory.spoil = 7
    run = control.turns(memory, 20, MS, memory.clock)
    assert (run.refused, run.wrong) == (0, 1)


def test_in_the_rt_pool(pool: RTPool) -> None:
    with tensormem.rt(control._ARENA) as rt:
        messages = control.Pool(rt, MS)
        run = control.turns(messages, 50, MS, FakeClock())
        assert (run.refused, run.wrong) == (0, 0)
        info = rt.info()
        assert (info.allocs, info.blocks, info.refused, info.misses) == (150, 0, 0, 0)
        assert info.reserved == control.KEPT * sum(control.CLASSES) + 3 * 2 * GRANULE

        # somebody else's write into the arena is a change
        class Writer(FakeClock):
            def sleep_until(self, due: int) -> None:
                super().sleep_until(due)
                if len(self.woken) == 8:
                    rt.memory[:] = bytes(rt.size)

        assert control.turns(messages, 20, MS, Writer()).wrong == 3 * control.KEPT


def test_with_malloc() -> None:
    run = control.turns(control.Heap(), 50, MS, FakeClock())
    assert (run.ticks, run.refused, run.wrong) == (50, 0, 0)


def test_malloc_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    class Empty:
        def malloc(self, size: int) -> None:
            return None

        memcmp = control._libc.memcmp

    monkeypatch.setattr(control, "_libc", Empty())
    assert control.turns(control.Heap(), 2, MS, FakeClock()).refused == 6


def test_the_clock() -> None:
    clock = control.Clock()
    begin = clock.now()
    clock.sleep_until(begin + 2 * MS)
    assert clock.now() >= begin + 2 * MS
    clock.sleep_until(begin)

    # a signal does not shorten it
    def ring(*_: object) -> None:
        pass

    old = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        begin = clock.now()
        clock.sleep_until(begin + 50 * MS)
        assert clock.now() >= begin + 50 * MS
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


# -- processes ------------------------------------------------------------------------------------


def test_hog() -> None:
    size = 64 * mmap.PAGESIZE
    found = [next(hog) for hog in [load.hog(size)] for _ in range(200)]
    assert max(found) > 3
    assert 0 < control._hog_size() < 1 << 50


def test_generate(pool: RTPool) -> None:
    with contextlib.closing(control._generate()) as generate:
        assert len([next(generate) for _ in range(20)]) == 20


def said(capsys: pytest.CaptureFixture[str]) -> list[Any]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def twenty(*_: int) -> Iterator[int]:
    yield from range(20)


def test_work(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(control, "_generate", twenty)
    control._work("generate")
    assert said(capsys) == [{}] * 3, "one for eight tokens"

    def fail() -> Iterator[int]:
        raise errors.DeviceMissing
        yield 0

    monkeypatch.setattr(control, "_generate", fail)
    control._work("generate")
    assert "modprobe" in said(capsys)[-1]["remedy"]


def test_work_of_a_load(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[tuple[int, ...]] = []

    def work(*arguments: int) -> Iterator[int]:
        given.append(arguments)
        return twenty()

    monkeypatch.setattr(load, "hog", work)
    monkeypatch.setattr(load, "spin", work)
    load.work("hog", "123")
    load.work("spin")
    assert given == [(123,), ()]
    assert said(capsys) == [{}] * 2, "once each"

    def fail(size: int) -> Iterator[int]:
        raise OSError(errno.ENOMEM, "no more")
        yield 0

    monkeypatch.setattr(load, "hog", fail)
    load.work("hog", "1")
    assert "no more" in said(capsys)[0]["error"]


def test_loads_are_light() -> None:
    code = "import sys, tensormem.demo.load; sys.exit('numpy' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(SRC)}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)


def test_measure(
    pool: RTPool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(control, "Clock", FakeClock)
    monkeypatch.setattr(control, "_become_realtime", lambda: {"fifo": True, "locked": False})
    for memory in ("pool", "malloc"):
        monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
        control._work("loop", memory, "10", str(MS))
        ready, found = said(capsys)
        assert ready == {}
        run = control.Run(**found)
        assert (run.ticks, run.refused, run.fifo, run.locked) == (10, 0, True, False)
    assert pool.arenas == []
    pool.nice = False
    control._work("loop", "pool", "10", str(MS))
    assert "CAP_SYS_NICE" in said(capsys)[0]["remedy"]


def test_becoming_realtime() -> None:
    """In a child: what it does stays there."""
    code = (
        "import gc, json, os; from tensormem.demo import control\n"
        "found = control._become_realtime()\n"
        "print(json.dumps([found, os.sched_getscheduler(0) == os.SCHED_FIFO, gc.isenabled(),"
        " [int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmLck')]]))"
    )
    env = {**os.environ, "PYTHONPATH": str(SRC)}
    out = subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True)
    found, fifo, collects, (locked,) = json.loads(out.stdout)
    assert found == {"fifo": fifo, "locked": locked > 0}
    assert not collects


#: What stands for a process, and what it says.
SCRIPTS = {
    "good": "import time\nprint('{}\\n{}\\n{}', flush=True)\ntime.sleep(1000)",
    "error": 'print(\'{"error": "no more", "remedy": "get some"}\', flush=True)',
    "death": "",
    "waits": "import sys\nprint('{}', flush=True)\nassert sys.stdin.readline() == '\\n'\n"
    "print('{\"a\": 1}', flush=True)",
    "late": 'print(\'{}\\n{"error": "no more"}\', flush=True)',
}


def process(monkeypatch: pytest.MonkeyPatch, script: str) -> control.Process:
    popen = subprocess.Popen

    def other(command: list[str], **options: Any) -> Any:
        assert command[1:] == ["-m", "tensormem.demo.load", "hog", str(os.getpid()), "12"]
        return popen([command[0], "-c", SCRIPTS[script]], **options)

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", other)
        return control.Process("hog", 12)


def test_process(monkeypatch: pytest.MonkeyPatch) -> None:
    with process(monkeypatch, "good") as other:
        assert other.answer() == {}
        assert not other.wait(0)
        assert other.end() == 2
    assert other._process.returncode == -signal.SIGKILL
    with process(monkeypatch, "good") as other:
        other.answer()
    assert other._process.returncode == -signal.SIGKILL


def test_process_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    with process(monkeypatch, "waits") as other:
        assert other.answer() == {}
        assert not other.wait(0)
        other.go()
        assert other.answer() == {"a": 1}
        assert other.wait(60)
        other.go()


@pytest.mark.parametrize(
    ("script", "words"), [("error", "no more: get some"), ("death", "'hog' has ended")]
)
def test_process_that_fails(monkeypatch: pytest.MonkeyPatch, script: str, words: str) -> None:
    with process(monkeypatch, script) as other:
        with pytest.raises(errors.TensormemError, match=words):
            other.answer()
        assert other.wait(60)
        with pytest.raises(errors.TensormemError, match="'hog' has ended"):
            other.end()


def test_process_that_fails_later(monkeypatch: pytest.MonkeyPatch) -> None:
    with process(monkeypatch, "late") as other:
        assert other.answer() == {}
        assert other.wait(60)
        with pytest.raises(errors.TensormemError, match="no more"):
            other.end()


def state(pid: int) -> str:
    """Return the state of a process; Z (dead, nobody has looked) for one that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


def until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.01)


def test_processes_end_with_the_one_that_started_them() -> None:
    code = (
        "from tensormem.demo.control import Process\nimport time\n"
        "with Process('spin') as p:\n p.answer()\n print(p._process.pid, flush=True)\n"
        " time.sleep(1000)"
    )
    env = {**os.environ, "PYTHONPATH": str(SRC)}
    parent = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert state(child) in "RS"
    parent.kill()
    parent.wait()
    until(lambda: state(child) == "Z")
    parent.stdout.close()


def test_a_process_whose_parent_is_gone_already(monkeypatch: pytest.MonkeyPatch) -> None:
    class Quiet:
        asked: tuple[int, ...] = ()

        def prctl(self, *arguments: int) -> None:
            self.asked = arguments

    quiet = Quiet()
    monkeypatch.setattr(load, "_libc", quiet)
    load.die_with(os.getppid())
    assert quiet.asked == (1, signal.SIGKILL)
    with pytest.raises(SystemExit):
        load.die_with(os.getppid() + 1)


# -- all of it -------------------------------------------------------------------------------------


class Stage:
    """Stands for all processes."""

    def __init__(self) -> None:
        self.started: list[tuple[object, ...]] = []
        self.ended: list[str] = []
        self.ran: list[object] = []
        self.left = 0
        self.refused = self.wrong = 0
        self.fail: str | None = None

    def __call__(self, role: str, *arguments: object) -> Any:
        self.started.append((role, *arguments))
        stage = self

        class Actor:
            looked, going = 0, False

            def __enter__(self) -> Actor:
                stage.left += 1
                return self

            def __exit__(self, *_: object) -> None:
                stage.left -= 1

            def answer(self) -> dict[str, Any]:
                if stage.fail == role:
                    raise errors.TensormemError(f"{role} failed")
                if not self.going:
                    return {}
                stage.ran.append(arguments[0])
                pool = arguments[0] == "pool"
                clock = FakeClock() if pool else FakeClock(0, 7 * MS)
                run = control.turns(Memory(clock), int(str(arguments[1])), MS, clock)
                changes = {"refused": stage.refused if pool else 0, "wrong": stage.wrong}
                fields = {n: getattr(run, n) for n in control.Run.__dataclass_fields__}
                return {**fields, **changes, "fifo": True, "locked": True, "minor": 3}

            def go(self) -> None:
                assert role == "loop"
                assert stage.left == 6, "all are there"
                self.going = True

            def wait(self, seconds: float) -> bool:
                self.looked += 1
                return self.looked > 2

            def end(self) -> int:
                stage.ended.append(role)
                if stage.fail == "end":
                    raise errors.TensormemError("it has ended")
                return 40

        return Actor()


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    stage = Stage()
    monkeypatch.setattr(control.run, "__kwdefaults__", {"start": stage, "each": None})
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    return stage


def test_run(stage: Stage) -> None:
    passed: list[float] = []
    report = control.run(0.1, 1000, each=passed.append)
    hog = report.hog
    assert stage.started == [
        ("loop", "pool", 100, MS), ("loop", "malloc", 100, MS),
        ("generate",), ("hog", hog), ("spin",), ("spin",),
    ]  # fmt: skip
    assert stage.ran == ["pool", "malloc"]
    assert stage.ended == ["generate", "hog", "spin", "spin"]
    assert stage.left == 0
    assert len(passed) == 4
    assert (report.kept, report.tokens, report.busy) == (True, 320, 2)
    assert report.pool.missed == 0
    assert report.malloc.missed == 7


@pytest.mark.parametrize("fail", ["generate", "hog", "spin", "loop", "end"])
def test_run_that_fails_leaves_nobody(stage: Stage, fail: str) -> None:
    stage.fail = fail
    with pytest.raises(errors.TensormemError):
        control.run(0.1, 1000)
    assert stage.left == 0


def test_command(stage: Stage) -> None:
    result = runner().invoke(cli, ["demo", "--rt", "--seconds", "0.1"])
    assert result.exit_code == 0, result.output
    assert narrow(result.stdout)
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines[0] == "a loop with a tick each 1.00 ms, SCHED_FIFO, locked in memory"
    for line in (
        "RT pool malloc", "ticks 100 100", "not done when the next was due 0 7",
        "messages refused 0 0", "page faults 3 3", "time of a tick, longest 1.00 us 7.00 ms",
        "time a tick in the RT pool with malloc", "model 320 tokens meanwhile",
    ):  # fmt: skip
        assert line in lines
    assert lines[-1] == "promise kept: each message had its memory, and none changed"
    drawn = [line for line in lines if line.startswith("< 1.02 us 100 ####")]
    assert len(drawn) == 1
    assert " 93 ####" in drawn[0]


def test_command_json(stage: Stage) -> None:
    result = runner().invoke(cli, ["demo", "--rt", "--json", "--period-us", "500"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["period_ns"] == 500_000
    assert stage.started[0] == ("loop", "pool", 10_000, 500_000)
    assert found["pool"]["ticks"] == 10_000
    assert sum(found["malloc"]["work"]) == 10_000 - 6
    assert found["kept"] is True


@pytest.mark.parametrize(("name", "words"), [
    ("refused", "3 messages refused in the RT pool, 0 changed"),
    ("wrong", "0 messages refused in the RT pool, 6 changed"),
])  # fmt: skip
def test_command_that_sees_a_broken_promise(stage: Stage, name: str, words: str) -> None:
    setattr(stage, name, 3)
    result = runner().invoke(cli, ["demo", "--rt", "--seconds", "0.05"])
    assert result.exit_code == 1
    assert f"BROKEN: {words}" in result.stdout


@pytest.mark.parametrize("options", [
    ("--rt", "--tokens", "3"), ("--rt", "--prompt", "x"), ("--rt", "--requests", "2"),
    ("--rt", "--swap"), ("--seconds", "3"), ("--period-us", "2000"), ("--swap", "--seconds", "1"),
    ("--rt", "--period-us", "99"), ("--rt", "--seconds", "0"),
], ids=str)  # fmt: skip
def test_what_goes_without(stage: Stage, options: tuple[str, ...]) -> None:
    assert runner().invoke(cli, ["demo", *options]).exit_code == 2
    assert stage.started == []
