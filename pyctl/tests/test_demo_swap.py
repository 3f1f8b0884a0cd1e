# SPDX-License-Identifier: MIT
"""Texts while the model is swapped under them: what is counted, and that mixtures are seen."""

from __future__ import annotations

import io
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import tensormem
from fake import FakeDevice
from fakemodel import Models
from tensormem import Client, errors, model
from tensormem import client as client_module
from tensormem.cli import cli
from tensormem.demo import CHECKPOINTS, swap
from tensormem.demo.model import HeapMemory
from tensormem.demo.run import opened
from tensormem.model import Slot
from test_cli import narrow, runner


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> Models:
    models = Models()
    device = lambda _: FakeDevice(models=models)  # noqa: E731
    monkeypatch.setattr(model, "KernelDevice", device)
    monkeypatch.setattr(client_module, "KernelDevice", device)
    return models


@pytest.fixture
def slot(models: Models) -> Iterator[Slot]:
    with tensormem.slot("demo", create=True) as slot:
        yield slot


@pytest.fixture(scope="module")
def expected() -> tuple[Any, Any]:
    return swap._expected()


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch, expected: tuple[Any, Any]) -> None:
    monkeypatch.setattr(swap, "_expected", lambda: expected)


class Later:
    """Swaps when it was looked at so many times: in the middle of something else."""

    pid = 1234

    def __init__(self, name: str, delay: int = 3) -> None:
        self.slot = tensormem.slot(name, write=True)
        self.delay, self.asked, self.numbers = delay, "", list[int]()
        self.left = 0

    def ask(self, checkpoint: str) -> None:
        assert not self.asked, "one at a time"
        self.asked, self.left = checkpoint, self.delay

    def done(self) -> list[int]:
        self.left -= 1
        if self.asked and self.left <= 0:
            self.swap(self.asked)
            self.asked = ""
        return self.numbers

    def swap(self, checkpoint: str) -> None:
        with opened(checkpoint) as (path, _, _):
            self.numbers.append(self.slot.swap(path))

    def __enter__(self) -> Later:
        return self

    def __exit__(self, *_: object) -> None:
        self.slot.close()


def ticks() -> Callable[[], float]:
    """Return a clock on which each look takes a second more than the one before."""
    times = iter(np.cumsum(np.arange(100_000)))
    return lambda: float(next(times))


def test_the_checkpoints_differ_in_every_text(expected: tuple[Any, Any]) -> None:
    texts, steps = expected
    assert sorted(steps.values()) == sorted(CHECKPOINTS)
    for prompt in swap.PROMPTS:
        one, other = (texts[checkpoint, prompt] for checkpoint in CHECKPOINTS)
        assert one[0][:4] != other[0][:4]
        assert one[1] != other[1]
        assert len(one[0]) == len(other[0]) == swap.LENGTH


@pytest.mark.parametrize("delay", [0, 1, 5, 40])
def test_run(models: Models, slot: Slot, delay: int) -> None:
    swaps = 6
    each: list[int] = []
    with Later("demo", delay) as later:
        report = swap.run(slot, later, HeapMemory(), swaps, now=ticks(), each=each.append)
    assert (report.swaps, report.generations) == (swaps, list(range(1, swaps + 2)))
    assert report.checkpoints == list("abababa")
    assert sum(each) == swaps
    assert report.different == []
    assert all(text.equal for text in report.texts)
    # each generation has written a text
    assert {text.generation for text in report.texts} == set(report.generations)
    assert all(text.checkpoint == "ba"[text.generation % 2] for text in report.texts)
    assert report.texts[-1].generation == swaps + 1
    assert any(text.overtaken for text in report.texts)
    assert not report.texts[-1].overtaken
    tokens = len(report.texts) * swap.LENGTH
    assert (report.during.tokens, report.quiet.tokens) == (tokens, tokens)
    # the clock of the first goes on in the second
    assert report.during.longest == tokens - 1
    assert report.during.inside == tokens - 1
    assert report.quiet.longest == 2 * tokens - 1
    assert report.during.median < report.quiet.median
    assert models.slots["demo"].active is not None
    assert sorted(models.freed) == list(range(1, swaps))


def test_on_tensor_memory(models: Models, slot: Slot) -> None:
    device = FakeDevice(max_batch=64, models=models)
    with Client(device) as client, Later("demo") as later:
        report = swap.run(slot, later, client, 2)
    assert not report.different
    assert device.tensors == {}


def test_a_mixture_is_seen(models: Models, slot: Slot) -> None:
    class Careless(Later):
        def swap(self, checkpoint: str) -> None:
            # as if the kernel put the new bytes where a reader still has the old ones
            with opened(checkpoint) as (path, _, _):
                active = models.slots["demo"].active
                assert active is not None
                os.pwrite(active.fd, path.read_bytes(), 0)
            super().swap(checkpoint)

    with Careless("demo") as careless:
        report = swap.run(slot, careless, HeapMemory(), 2)
    assert {text.generation for text in report.different} == {1, 2}
    assert not any(text.equal for text in report.different)


def test_the_wrong_model_is_seen(slot: Slot) -> None:
    class Wrong(Later):
        def swap(self, checkpoint: str) -> None:
            super().swap("a")

    with Wrong("demo") as wrong:
        report = swap.run(slot, wrong, HeapMemory(), 2)
    assert {text.generation for text in report.different} == {2}
    assert all(text.equal for text in report.different)


# -- the other process --------------------------------------------------------------------


def test_serve(
    slot: Slot, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("b\na\n"))
    swap._serve("demo")
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        {"active": 1}, {"active": 2},
    ]  # fmt: skip
    with slot.acquire() as generation, opened("a") as (path, _, _):
        assert bytes(generation.buffer()) == path.read_bytes()
    monkeypatch.setattr("sys.stdin", io.StringIO("b\n"))
    swap._serve("nothing")
    assert "no model slot 'nothing'" in json.loads(capsys.readouterr().out)["error"]


#: What stands for the other process, and what it says.
SCRIPTS = {
    "good": "import sys\nfor n, line in enumerate(sys.stdin, 2):\n"
    " print('{\"active\": ', end='', flush=True)\n print('%d}' % n, flush=True)",
    "error": 'print(\'{"error": "no more"}\')',
    "death": "",
    "stuck": "import time\nprint('{\"active\": 1}', flush=True)\ntime.sleep(100)",
}


def process(monkeypatch: pytest.MonkeyPatch, script: str) -> swap.OtherProcess:
    popen = subprocess.Popen

    def other(command: list[str], **options: Any) -> Any:
        assert command[1:] == ["-m", "tensormem.demo.swap", "demo"]
        return popen([command[0], "-c", SCRIPTS[script]], **options)

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", other)
        return swap.OtherProcess("demo")


def until(condition: Callable[[], Any]) -> Any:
    while not (found := condition()):
        pass
    return found


def test_other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    with process(monkeypatch, "good") as other:
        assert other.done() == []
        other.ask("b")
        assert until(other.done) == [2]
        other.ask("a")
        until(lambda: len(other.done()) == 2)
        assert other.done() == [2, 3]
        assert other.pid == other._process.pid
    assert other._process.returncode == 0


@pytest.mark.parametrize(("script", "words"), [("error", "no more"), ("death", "has ended")])
def test_other_process_that_fails(monkeypatch: pytest.MonkeyPatch, script: str, words: str) -> None:
    with process(monkeypatch, script) as other, pytest.raises(errors.TensormemError, match=words):
        until(other.done)


def test_other_process_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with process(monkeypatch, "stuck") as other:
        assert until(other.done) == [1]
        wait = other._process.wait
        monkeypatch.setattr(other._process, "wait", lambda *a: wait(0.01) if a else wait())
    assert other._process.returncode == -9


# -- the command ----------------------------------------------------------------------------


def test_command(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swap, "OtherProcess", Later)
    result = runner().invoke(cli, ["demo", "--swap", "3"])
    assert result.exit_code == 0, result.output
    assert narrow(result.stdout)
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "swaps 3, by process 1234" in lines
    assert any(line.startswith("longest gap ") and "without" in line for line in lines)
    assert lines[-1] == "verdict equal: each text is that of one checkpoint, none mixes them"
    assert not models.slots, "the slot was removed"
    assert not models.descriptors


def test_command_json(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swap, "OtherProcess", Later)
    monkeypatch.setattr("tensormem.cli.SWAPS", 20)
    result = runner().invoke(cli, ["demo", "--swap", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["swaps"] == 20
    assert found["generations"] == list(range(1, 22))
    assert found["different"] == []
    assert len(found["answers"]) == len(found["texts"])
    assert found["answers"][0].startswith(swap.PROMPTS[0])


def test_command_that_sees_a_difference(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(Later):
        def swap(self, checkpoint: str) -> None:
            super().swap("a")

    monkeypatch.setattr(swap, "OtherProcess", Wrong)
    result = runner().invoke(cli, ["demo", "--swap", "1"])
    assert result.exit_code == 1
    assert "DIFFERENT" in result.stdout
    assert not models.slots


def test_command_that_fails_leaves_no_slot(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Later):
        def done(self) -> list[int]:
            raise errors.TensormemError("it failed")

    monkeypatch.setattr(swap, "OtherProcess", Failing)
    result = runner().invoke(cli, ["demo", "--swap", "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["cause"] == "it failed"
    assert not models.slots
    assert not models.descriptors


@pytest.mark.parametrize(
    "options", [("--tokens", "3"), ("--prompt", "x"), ("--requests", "2")], ids=str
)
def test_what_goes_without(models: Models, options: tuple[str, str]) -> None:
    assert runner().invoke(cli, ["demo", "--swap", "2", *options]).exit_code == 2
    assert runner().invoke(cli, ["demo", "--swap", "0"]).exit_code == 2
