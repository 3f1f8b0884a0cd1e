# SPDX-License-Identifier: MIT
"""'tensormem model', on the fake of fakemodel.py and sysfs files as the module has them."""

from __future__ import annotations

import errno
import grp
import hashlib
import json
import os
import pwd
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import Result

import tensormem
from fake import FakeDevice
from fakemodel import Models
from tensormem import abi, errors, model, safetensors, system
from tensormem.cli import cli
from test_cli import narrow, runner
from test_system import make_sysfs

Run = Callable[..., Result]


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> Models:
    models = Models()
    monkeypatch.setattr(model, "KernelDevice", lambda _: FakeDevice(models=models))
    return models


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, models: Models) -> Run:
    monkeypatch.setenv("TENSORMEM_SYSFS", str(make_sysfs(tmp_path)))

    def call(*arguments: Any) -> Result:
        return runner().invoke(cli, ["model", *map(str, arguments)], prog_name="tensormem")

    return call


def document(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def failure(result: Result) -> Any:
    assert result.exit_code == 1, result.output
    return json.loads(result.stdout)["error"]


@pytest.fixture
def one(tmp_path: Path) -> Path:
    path = tmp_path / "one.safetensors"
    safetensors.save(path, {"a": np.arange(1 << 20, dtype=np.float32)})
    return path


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    path = tmp_path / "bad"
    path.write_bytes(b"nothing that anybody knows")
    return path


# -- slots ---------------------------------------------------------------------------------


def test_create(run: Run, models: Models) -> None:
    old = os.umask(0o077)
    try:
        result = run("create", "chat")
        found = document(run("create", "other", "--mode", "644", "--json"))
    finally:
        os.umask(old)
    me = f"{pwd.getpwuid(os.getuid()).pw_name}:{grp.getgrgid(os.getgid()).gr_name}"
    assert result.stdout == f"chat: made, for {me}, mode 0660\n"
    assert os.fstat(models.slots["chat"].fd).st_mode & 0o7777 == 0o660, "whatever the umask"
    assert found == {"slot": "other", "uid": os.getuid(), "gid": os.getgid(), "mode": "0644"}
    assert not models.descriptors


def test_create_for_somebody(run: Run, models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "fchown", lambda fd, uid, gid: given.append((uid, gid)))
    root = grp.getgrgid(0).gr_name
    assert run("create", "a", "--owner", "root", "--group", root).exit_code == 0
    assert run("create", "b", "--owner", "123", "--group", "456").exit_code == 0
    assert run("create", "c").exit_code == 0
    assert given == [(0, 0), (123, 456), (-1, -1)]

    def refused(*_: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "fchown", refused)
    result = run("create", "d", "--owner", "root")
    assert result.exit_code == 1
    assert "cannot give 'd' this owner or group" in result.stderr
    assert "sudo" in result.stderr
    assert "d" not in models.slots, "it was taken back"


@pytest.mark.parametrize(
    "options",
    [
        ("--mode", "9"), ("--mode", "777"), ("--mode", "0o660"), ("--mode", "-1"), ("--mode", ""),
        ("--owner", "nobody-of-this-name"), ("--group", "no-group"), ("--owner", "-5"),
        ("--owner", str((1 << 32) - 1)),
    ],
)  # fmt: skip
def test_create_wrongly(run: Run, models: Models, options: tuple[str, str]) -> None:
    assert run("create", "chat", *options).exit_code == 2
    assert not models.slots


def test_names(run: Run, models: Models) -> None:
    run("create", "chat")
    assert failure(run("create", "chat", "--json"))["type"] == "SlotExists"
    for command in ("commit", "abort", "rollback", "remove", "watch"):
        found = failure(run(command, "none", "--json"))
        assert (found["type"], found["errno"]) == ("NoSuchSlot", errno.ENOENT), command
    assert failure(run("create", "a/b", "--json"))["type"] == "InvalidArgument"
    assert failure(run("show", "chat", "--json"))["type"] == "NoSuchSlot", "not in this sysfs"


def test_remove(run: Run, models: Models) -> None:
    run("create", "chat")
    assert run("remove", "chat").stdout == "chat: removed\n"
    assert not models.slots
    run("create", "chat")
    assert document(run("remove", "chat", "--json")) == {"slot": "chat", "removed": True}


# -- generations ---------------------------------------------------------------------------


def test_a_whole_life(run: Run, models: Models, one: Path) -> None:
    run("create", "chat")
    first = run("swap", "chat", one)
    assert first.stdout == "chat: generation 1 is active: 4 MiB, 0 B of it shared\n"
    assert "swapping" in first.stderr
    second = document(run("swap", "chat", one, "--json"))
    assert (second["slot"], second["number"], second["previous"]) == ("chat", 2, 1)
    assert (second["state"], second["size"]) == ("active", one.stat().st_size)
    assert second["shared_bytes"] == second["size"]
    assert second["seconds"] >= 0
    assert "keep" in second
    rolled = run("rollback", "chat")
    assert rolled.stdout == "chat: generation 1 is active again\n"
    assert document(run("rollback", "chat", "2", "--json")) == {
        "slot": "chat", "active": 2, "previous": 1,
    }  # fmt: skip
    assert failure(run("rollback", "chat", "2", "--json"))["type"] == "NoSuchGeneration"
    staged = run("stage", "chat", one)
    assert "chat: generation 3 is staged" in staged.stdout
    assert "tensormem model commit chat 3" in staged.stdout
    assert failure(run("swap", "chat", one, "--json"))["type"] == "SlotBusy"
    assert run("commit", "chat").stdout == "chat: generation 3 is active\n"
    assert failure(run("commit", "chat", "--json"))["cause"] == "nothing is staged in 'chat'"
    assert failure(run("abort", "chat", "--json"))["type"] == "NoSuchGeneration"
    found = document(run("stage", "chat", one, "--json"))
    assert (found["number"], found["state"], found["keep"]) == (4, "staged", True)
    assert document(run("commit", "chat", "4", "--json")) == {
        "slot": "chat", "active": 4, "previous": 3,
    }  # fmt: skip
    run("stage", "chat", one)
    assert run("abort", "chat", "5").stdout == "chat: generation 5 was aborted\n"
    run("stage", "chat", one)
    assert document(run("abort", "chat", "--json")) == {"slot": "chat", "aborted": 6, "active": 4}
    again = run("swap", "chat", one)
    assert "generation 4 is kept for a rollback" in again.stdout
    assert not models.descriptors


def test_cached(run: Run, models: Models, one: Path) -> None:
    run("create", "chat")
    result = run("swap", "chat", one, "--cached")
    assert "4 MiB, in its file" in result.stdout
    assert document(run("swap", "chat", one, "--cached", "--json"))["cached"] is True
    state = models.slots["chat"].active
    assert state is not None
    assert state.flags == abi.StageFlag.CACHED


def test_evictable(run: Run, models: Models, one: Path) -> None:
    run("create", "chat")
    result = run("swap", "chat", one, "--evictable")
    assert "4 MiB, evictable" in result.stdout
    size = one.stat().st_size
    again = document(run("swap", "chat", one, "--evictable", "--json"))
    assert (again["evictable"], again["shared_bytes"], again["evicted_bytes"]) == (True, 0, 0)
    state = models.slots["chat"].active
    assert state is not None
    assert state.flags == abi.StageFlag.EVICTABLE
    assert run("evict", "chat", "--size", "2M").stdout == "chat: generation 2 gave 2 MiB back\n"
    assert document(run("evict", "chat", "--json")) == {
        "slot": "chat", "generation": 2, "given_back": size - (2 << 20),
    }  # fmt: skip
    assert document(run("evict", "chat", "1", "--json"))["given_back"] == size
    assert run("evict", "chat", "--size", "two").exit_code == 2
    assert failure(run("evict", "chat", "3", "--json"))["type"] == "NoSuchGeneration"
    found = failure(run("swap", "chat", one, "--cached", "--evictable", "--json"))
    assert found["type"] == "InvalidArgument"
    run("swap", "chat", one)
    found = failure(run("evict", "chat", "--json"))
    assert (found["type"], found["cause"]) == (
        "InvalidArgument", "generation 3 of 'chat' is not evictable",
    )  # fmt: skip


@pytest.mark.parametrize("command", ["stage", "swap"])
def test_sha256(run: Run, models: Models, one: Path, command: str) -> None:
    run("create", "chat")
    digest = hashlib.sha256(one.read_bytes()).hexdigest()
    assert run(command, "chat", one, "--sha256", "0" * 63).exit_code == 2
    found = failure(run(command, "chat", one, "--sha256", "0" * 64, "--json"))
    assert (found["type"], found["errno"]) == ("WrongContents", errno.EBADMSG)
    slot = models.slots["chat"]
    assert (slot.active, slot.staged) == (None, None)
    assert run(command, "chat", one, "--sha256", digest).exit_code == 0


@pytest.mark.parametrize("command", ["stage", "swap"])
def test_check(run: Run, models: Models, bad: Path, command: str) -> None:
    run("create", "chat")
    found = failure(run(command, "chat", bad, "--json"))
    assert found["type"] == "ModelFileError"
    assert "neither GGUF nor safetensors" in found["cause"]
    slot = models.slots["chat"]
    assert (slot.active, slot.staged) == (None, None)
    assert run(command, "chat", bad, "--no-check").exit_code == 0
    assert run(command, "chat", bad.with_name("missing")).exit_code == 1
    assert "missing" in run(command, "chat", bad.with_name("missing")).stderr


@pytest.mark.parametrize("command", ["stage", "swap"])
def test_a_load_that_fails(run: Run, models: Models, one: Path, command: str) -> None:
    run("create", "chat")
    run("swap", "chat", one)
    models.fail_load = (1 << 20, errno.ENOSPC)
    result = run(command, "chat", one)
    assert result.exit_code == 1
    assert "tensormem: cannot load" in result.stderr
    assert "chunk pool is at its capacity" in result.stderr
    slot = models.slots["chat"]
    assert slot.active is not None
    assert (slot.active.number, slot.staged) == (1, None)


@pytest.mark.parametrize("command", ["stage", "swap"])
@pytest.mark.parametrize("as_json", [False, True])
def test_interrupt(
    run: Run,
    models: Models,
    one: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    as_json: bool,
) -> None:
    run("create", "chat")
    options = ["--json"] if as_json else []

    def interrupt() -> None:
        raise KeyboardInterrupt

    def attempt() -> str:
        models.step = 0
        models.others.append(interrupt)
        result = run(command, "chat", one, *options)
        assert result.exit_code == 1
        assert models.slots["chat"].staged is None
        assert not models.descriptors
        if as_json:
            assert failure(result)["type"] == "Interrupted"
            return str(failure(result)["cause"])
        return str(result.stderr)

    said = attempt()
    assert "the staged generation was aborted, nothing is active" in said
    models.step = 1 << 40
    run("swap", "chat", one)
    said = attempt()
    assert "the staged generation was aborted, generation 2 stays active" in said
    assert models.freed == [1, 3]


def test_an_interrupt_that_comes_too_late(
    run: Run, models: Models, one: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("create", "chat")
    commit = model.Staging.commit

    def late(self: model.Staging) -> int:
        commit(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(model.Staging, "commit", late)
    result = run("swap", "chat", one)
    assert result.exit_code == 1
    assert "generation 1 was active already" in result.stderr
    assert "rollback" in result.stderr


def test_a_real_interrupt(one: Path, tmp_path: Path) -> None:
    """A SIGINT to the process, as a terminal sends it, in the middle of a load."""
    script = f"""
import os, signal, sys
sys.path[:0] = {sys.path!r}
from fake import FakeDevice
from fakemodel import Models
from tensormem import model
from tensormem.cli import cli
models = Models()
models.step = 100
model.KernelDevice = lambda _: FakeDevice(models=models)
cli(["model", "create", "chat"], standalone_mode=False)
# once: it may be another thread that gets it, and the main thread hears of it a little later
models.others = [lambda: os.kill(os.getpid(), signal.SIGINT)]
try:
    cli(["model", "swap", "chat", {str(one)!r}])
finally:
    assert models.slots["chat"].staged is None and models.slots["chat"].active is None
    assert models.freed == [1]
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "the staged generation was aborted, nothing is active" in done.stderr
    assert "Traceback" not in done.stderr
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_progress_on_a_terminal(
    run: Run, models: Models, one: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import click._termui_impl

    now = [100.0]

    def clock() -> float:
        now[0] += 0.5
        return now[0]

    monkeypatch.setattr(click._termui_impl, "isatty", lambda _: True)
    monkeypatch.setattr("tensormem.cli.time.monotonic", clock)
    monkeypatch.setattr(click._termui_impl, "time", SimpleNamespace(time=clock))
    run("create", "chat")
    models.step = 1 << 20
    said = run("swap", "chat", one).stderr
    assert "swapping" in said
    assert " 49%" in said
    assert re.search(r"\d+ [KM]iB/s", said)
    assert "100%" in said
    # how long it still takes
    assert re.search(r"\d\d% +00:00:0[1-9]", said)


# -- list and show -------------------------------------------------------------------------------


def folder(top: Path, values: dict[str, Any]) -> None:
    top.mkdir(parents=True)
    for name, value in values.items():
        (top / name).write_text(f"{value}\n")


def make_models(root: Path) -> None:
    folder(root / "model", {"slots": 2, "generations": 4, "held": 300 << 20})
    folder(
        root / "model" / "chat",
        {"active": 12, "previous": 9, "staged": 13, "uid": 0, "gid": 0, "mode": "0640"},
    )
    common = {
        "error": 0, "cached": 0, "size": 256 << 20, "loaded": 256 << 20,
        "evictable": 0, "evicted": 0, "reloads": 0,
    }  # fmt: skip
    for number, more in (
        (9, {"state": "previous", "readers": 2, "private_bytes": 13 << 20, "shared_bytes": 1}),
        (12, {"state": "active", "readers": 3, "private_bytes": 13 << 20,
              "shared_bytes": 243 << 20, "evicted": 8 << 20}),
        (13, {"state": "loading", "readers": 1, "private_bytes": 2 << 20, "shared_bytes": 62 << 20,
              "loaded": 64 << 20}),
        (3, {"state": "failed", "readers": 1, "private_bytes": 0, "shared_bytes": 0, "error": 26,
             "cached": 1}),
    ):  # fmt: skip
        folder(root / "model" / "chat" / str(number), common | more)
    folder(
        root / "model" / "empty",
        {"active": 0, "previous": 0, "staged": 0, "uid": 54321, "gid": 54322, "mode": "0000"},
    )


def test_list(run: Run) -> None:
    assert run("list").stdout == "there are no model slots\n"
    assert document(run("list", "--json")) == {"slots": []}
    make_models(Path(os.environ["TENSORMEM_SYSFS"]))
    result = run("list")
    assert narrow(result.stdout)
    lines = [line.split() for line in result.stdout.splitlines()]
    root = f"{pwd.getpwuid(0).pw_name}:{grp.getgrgid(0).gr_name}"
    assert lines[1] == ["chat", root, "0640", "12", "256", "MiB", "9", "13", "7"]
    assert lines[2] == ["empty", "54321:54322", "0000", "-", "-", "-", "-", "0"]
    found = document(run("list", "--json"))["slots"]
    assert [slot["name"] for slot in found] == ["chat", "empty"]
    assert found[0]["mode"] == "0640"
    assert [g["number"] for g in found[0]["generations"]] == [3, 9, 12, 13]
    assert found[0]["generations"][2]["private_bytes"] == 13 << 20


def test_show(run: Run) -> None:
    make_models(Path(os.environ["TENSORMEM_SYSFS"]))
    result = run("show", "chat")
    assert result.exit_code == 0
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "mode 0640" in lines[0]
    assert lines[2] == "3 failed 256 MiB 100.0% in its file 1"
    assert lines[4] == "12 active 256 MiB 100.0% 13 MiB 243 MiB 8 MiB 3"
    assert lines[5] == "13 loading 256 MiB 25.0% 2 MiB 62 MiB 0 B 1"
    assert "generation 3 has failed: the file is, or was, open for writing" in lines[-1]
    found = document(run("show", "chat", "--json"))
    assert found["generations"][3] == {
        "number": 13, "state": "loading", "size": 256 << 20, "loaded": 64 << 20, "readers": 1,
        "private_bytes": 2 << 20, "shared_bytes": 62 << 20, "error": 0, "cached": 0,
        "evictable": 0, "evicted": 0, "reloads": 0,
    }  # fmt: skip
    empty = run("show", "empty")
    assert "no generations" in empty.stdout
    assert narrow(empty.stdout)
    missing = run("show", "none")
    assert missing.exit_code == 1
    assert "there is no model slot 'none'" in missing.stderr


def test_without_the_module(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TENSORMEM_SYSFS", str(tmp_path / "nothing"))
    for command in (("list",), ("show", "chat")):
        assert failure(run(*command, "--json"))["type"] == "NotAvailable"


def test_what_goes_while_it_is_read(run: Run) -> None:
    root = Path(os.environ["TENSORMEM_SYSFS"])
    make_models(root)
    for file in (root / "model" / "empty").iterdir():
        file.unlink()
    (root / "model" / "chat" / "9" / "state").unlink()
    (slot,) = system.model_slots(root)
    assert [g.number for g in slot.generations] == [3, 12, 13]
    assert slot.mode == 0o640
    assert slot.generations[1].get("readers") == 3
    assert slot.generations[1].get("novelty") is None


def test_slots_in_status(run: Run) -> None:
    root = Path(os.environ["TENSORMEM_SYSFS"])
    before = runner().invoke(cli, ["status"]).stdout
    assert "model slots" not in before
    make_models(root)
    result = runner().invoke(cli, ["status"])
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "model slots 2 300 MiB" in lines
    assert "their generations 4" in lines
    shown = runner().invoke(cli, ["pool", "show"]).stdout
    assert "model" not in shown


# -- watch -----------------------------------------------------------------------------------------


def test_watch(run: Run, models: Models, one: Path) -> None:
    run("create", "chat")
    run("swap", "chat", one)
    with tensormem.slot("chat", write=True) as other:
        models.others += [lambda: other.swap(one), other.rollback, other.remove]
        result = run("watch", "chat")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        f"chat: generation {number} is active" for number in (1, 2, 1)
    ]


def test_watch_json_and_timeout(run: Run, models: Models, one: Path) -> None:
    run("create", "chat")
    run("swap", "chat", one)
    result = run("watch", "chat", "--timeout", "0.01", "--json")
    assert result.exit_code == 0
    assert [json.loads(line) for line in result.stdout.splitlines()] == [
        {"slot": "chat", "active": 1}
    ]
    assert run("watch", "chat", "--timeout", "-1").exit_code == 2


def test_watch_ends_with_an_interrupt(run: Run, models: Models) -> None:
    run("create", "chat")

    def interrupt() -> None:
        raise KeyboardInterrupt

    models.others.append(interrupt)
    result = run("watch", "chat")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")


def test_watch_needs_no_right_to_write(run: Run, models: Models, one: Path) -> None:
    run("create", "chat", "--mode", "644")
    run("swap", "chat", one)
    models.uid = 4242
    assert run("watch", "chat", "--timeout", "0").exit_code == 0
    found = failure(run("swap", "chat", one, "--json"))
    assert (found["type"], found["errno"]) == ("SlotDenied", errno.EACCES)
    assert issubclass(errors.SlotDenied, PermissionError)
