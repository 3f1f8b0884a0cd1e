# SPDX-License-Identifier: MIT
"""'tensormem rt', on the fake of fakert.py and sysfs files as the module has them."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from fake import FakeDevice
from fakert import FakeRT, RTPool
from tensormem import errors, histogram, realtime, system
from tensormem.cli import cli
from test_cli import narrow, runner
from test_system import make_sysfs

Run = Callable[..., Result]

LATENCY = histogram.count([700] * 90 + [3000] * 8 + [40_000] * 2)
MISSED = histogram.count([1_000_000] * 3)

CLIENTS: dict[int, dict[str, object]] = {
    3: {
        "arena": 1, "size": 4 << 20, "priority": 10, "reserved": 65536, "used": 2048, "blocks": 2,
        "waiting": 0, "allocs": 1000, "refused": 4, "misses": 3, "waits": 7, "moves": 11,
        "latency": " ".join(map(str, LATENCY)), "missed": " ".join(map(str, MISSED)),
    },
    12: {
        "arena": 1, "size": 4 << 20, "priority": 0, "reserved": 0, "used": 4096, "blocks": 1,
        "waiting": 1, "allocs": 5, "refused": 0, "misses": 0, "waits": 1, "moves": 11,
        "latency": " ".join(["0"] * 64), "missed": " ".join(["0"] * 64),
    },
}  # fmt: skip


def make_rt(root: Path, clients: dict[int, dict[str, object]]) -> Path:
    """Add the RT pool to what make_sysfs makes."""
    files = {
        "size": 64 << 20, "ready": 8 << 20, "held": 12 << 20, "used": 4 << 20, "arenas": 1,
        "allocs": 2000, "refused": 9, "misses": 8, "waits": 70,
        "latency": " ".join(map(str, LATENCY)), "missed": " ".join(map(str, MISSED)),
    }  # fmt: skip
    folders: dict[str, dict[str, Any]] = {"rt": files}
    folders |= {f"rt/{number}": values for number, values in clients.items()}
    for folder, values in folders.items():
        (root / folder).mkdir()
        for name, value in values.items():
            (root / folder / name).write_text(f"{value}\n")
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_rt(make_sysfs(tmp_path), CLIENTS)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, root: Path) -> Run:
    monkeypatch.setenv("TENSORMEM_SYSFS", str(root))

    def call(*arguments: Any) -> Result:
        return runner().invoke(cli, ["rt", *map(str, arguments)], prog_name="tensormem")

    return call


def document(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def words(result: Result) -> list[str]:
    assert result.exit_code == 0, result.output
    assert narrow(result.stdout)
    return [" ".join(line.split()) for line in result.stdout.splitlines()]


# -- what there is -------------------------------------------------------------------------


def test_list(run: Run) -> None:
    lines = words(run("list"))
    assert lines == [
        "client arena size priority reserved used blocks refused misses",
        "3 1 4 MiB 10 64 KiB 2 KiB 2 4 3",
        "12 1 4 MiB 0 0 B 4 KiB 1 0 0",
    ]
    found = document(run("list", "--json"))
    assert [client["id"] for client in found["clients"]] == [3, 12]
    assert found["clients"][0]["latency"] == LATENCY
    assert found["clients"][0]["missed"] == MISSED
    assert found["clients"][1]["waiting"] == 1


def test_list_without_clients(run: Run, root: Path, tmp_path: Path) -> None:
    for number in CLIENTS:
        for file in (root / "rt" / str(number)).iterdir():
            file.unlink()
    assert words(run("list")) == ["there are no RT clients"]
    assert document(run("list", "--json")) == {"clients": []}


def test_show(run: Run) -> None:
    lines = words(run("show"))
    # 4 of 64 MiB on 40 columns, 12 of which are held
    assert "[###=====" + "." * 32 + "] 64 MiB" in lines[0]
    for line in (
        "arenas 1 4 MiB", "set aside, in use or not 8 MiB", "clients 2", "reserved for them 64 KiB",
        "allocated 6 KiB", "requests refused 9", "deadlines missed 8",
        "blocks allocated so far 2000", "requests that had to wait 70",
    ):  # fmt: skip
        assert line in lines
    where = lines.index("time requests with a deadline")
    assert lines[where + 1].startswith("< 1.02 us 90 ####")
    assert lines[where + 3].startswith("< 4.10 us 8 ####")
    assert [line for line in lines[where:] if line.startswith("< 65.5 us 2 #")]
    assert lines[lines.index("time deadlines missed") + 1].startswith("< 1.05 ms 3 ####")
    found = document(run("show", "--json"))
    assert found["size"] == 64 << 20
    assert len(found["clients"]) == 2
    assert found["latency"] == LATENCY


def test_show_one(run: Run) -> None:
    lines = words(run("show", 3))
    assert lines[0] == "RT client 3 in arena 1 of 4 MiB, priority 10"
    for line in (
        "reserved for it 64 KiB", "blocks 2 2 KiB", "blocks that it ever got 1000",
        "requests refused 4", "requests that had to wait 7", "that wait now 0",
        "deadlines missed 3", "blocks of the arena moved 11", "time deadlines missed",
    ):  # fmt: skip
        assert line in lines
    assert "time requests with a deadline" in lines
    assert not [line for line in words(run("show", 12)) if line.startswith("time")]
    assert document(run("show", 12, "--json"))["priority"] == 0
    result = run("show", 4)
    assert result.exit_code == 1
    assert "no RT client 4" in result.stderr


def test_files_that_the_module_lacks(run: Run, root: Path) -> None:
    for name in ("latency", "missed", "held", "3/latency", "3/size", "12/reserved"):
        (root / "rt" / name).unlink()
    (root / "rt" / "12" / "missed").write_text("one two\n")
    assert "requests refused 9" in words(run("show"))
    assert words(run("show", 3))[0] == "RT client 3 in arena 1 of -, priority 10"
    assert words(run("list"))[2].split()[5] == "-"
    assert document(run("show", 12, "--json"))["missed"] == []


@pytest.mark.parametrize("arguments", [("list",), ("show",), ("size",), ("priority", "1")])
def test_a_module_without_it(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    (tmp_path / "old").mkdir()
    monkeypatch.setenv("TENSORMEM_SYSFS", str(make_sysfs(tmp_path / "old")))
    result = run(*arguments)
    assert result.exit_code == 1
    assert "no 'rt' in sysfs" in result.stderr
    monkeypatch.setenv("TENSORMEM_SYSFS", str(tmp_path / "nothing"))
    assert "not loaded" in run(*arguments).stderr


def test_pool_show(run: Run) -> None:
    result = runner().invoke(cli, ["pool", "show", "rt"])
    lines = words(result)
    assert "size 67108864 64 MiB most that arenas may have together" in lines
    assert "arenas 1 arenas" in lines
    assert "misses 8 deadlines missed" in lines
    assert not [line for line in lines if "latency" in line]
    assert "rt pool value memory" in words(runner().invoke(cli, ["pool", "show"]))


def test_status(run: Run) -> None:
    lines = words(runner().invoke(cli, ["status"]))
    assert "arenas of the RT pool 1 4 MiB" in lines
    assert "set aside for them 8 MiB" in lines


# -- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["size", "ready"])
def test_settings(run: Run, root: Path, name: str) -> None:
    before = {"size": "64 MiB", "ready": "8 MiB"}[name]
    assert words(run(name)) == [f"RT pool: {name} {before}"]
    assert words(run(name, "16M")) == [f"RT pool: {name} 16 MiB"]
    assert (root / "rt" / name).read_text() == str(16 << 20)
    assert document(run(name, "--json")) == {name: 16 << 20}
    assert run(name, "lots").exit_code == 2


def test_priority(run: Run, root: Path) -> None:
    assert words(run("priority", 3)) == ["RT client 3: priority 10"]
    assert words(run("priority", 3, 42)) == ["RT client 3: priority 42"]
    assert (root / "rt" / "3" / "priority").read_text() == "42"
    assert document(run("priority", 12, "--json")) == {"id": 12, "priority": 0}
    assert run("priority", 3, 100).exit_code == 2
    assert "no RT client 5" in run("priority", 5, 1).stderr
    assert not (root / "rt" / "5").exists()


@pytest.mark.parametrize(("number", "cls", "remedy"), [
    (errno.EACCES, errors.NotPermitted, "sudo"),
    (errno.EBUSY, errors.Busy, "tensormem rt list"),
    (errno.EINVAL, errors.InvalidArgument, "tensormem rt size"),
    (errno.ENOSPC, errors.PoolExhausted, "--capacity"),
    (errno.ENOMEM, errors.OutOfMemory, "free"),
])  # fmt: skip
def test_settings_refused(
    run: Run, monkeypatch: pytest.MonkeyPatch, number: int, cls: type[Exception], remedy: str
) -> None:
    real = Path.open

    def refuse(self: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if mode == "w":
            raise OSError(number, os.strerror(number))
        return real(self, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", refuse)
    for name in ("size", "ready"):
        error = json.loads(run(name, "2M", "--json").stdout)["error"]
        assert error["type"] == cls.__name__
        assert f"rt/{name} to 2097152" in error["cause"]
        assert remedy in error["remedy"]
    if number == errno.EINVAL:
        assert "0 to 99" in run("priority", 3, 4).stderr


def test_a_client_that_goes_while_it_is_read(root: Path) -> None:
    for file in (root / "rt" / "3").iterdir():
        file.unlink()
    assert [client.id for client in system.rt_pool(root).clients] == [12]
    with pytest.raises(errors.InvalidArgument):
        system.rt_client(3, root)


# -- the test -------------------------------------------------------------------------------------


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> RTPool:
    pool = RTPool()
    monkeypatch.setattr(realtime, "KernelDevice", lambda _: FakeDevice(rt=pool))
    return pool


def test_test(run: Run, pool: RTPool) -> None:
    lines = words(run("test", "-n", 50))
    assert lines[1:4] == ["allocated 50", "refused 0", "missed its deadline 0"]
    assert lines[-1] == "promise kept"
    assert any("time to allocate" in line and "time to free" in line for line in lines)
    assert pool.arenas == []
    found = document(run("test", "-n", 20, "--size", "2M", "--deadline-us", 5, "--json"))
    assert (found["count"], found["refused"], found["misses"], found["kept"]) == (20, 0, 0, True)
    assert sum(found["taking"]) == sum(found["giving"]) == 20


def test_test_that_fails(run: Run, pool: RTPool, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [errno.ENOSPC, errno.ETIMEDOUT, 0, errno.ETIMEDOUT]
    real = FakeRT._alloc

    def alloc(self: FakeRT, a: Any) -> None:
        assert (a.size, a.deadline_ns) == (1024, 1_000_000)
        number = answers.pop(0)
        if number:
            raise OSError(number, "")
        real(self, a)

    monkeypatch.setattr(FakeRT, "_alloc", alloc)
    result = run("test", "-n", 4)
    assert result.exit_code == 1
    assert "promise BROKEN" in " ".join(result.stdout.split())
    assert "refused 1" in [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "missed its deadline 2" in [" ".join(x.split()) for x in result.stdout.splitlines()]
    assert pool.arenas == []


def test_the_times_of_a_test(pool: RTPool) -> None:
    times = iter([0, 100, 300, 1000, 1100, 1500])
    result = realtime.self_test(2, 100, 1, now=lambda: next(times))
    assert result.taking == histogram.count([100, 100])
    assert result.giving == histogram.count([200, 400])


def test_test_without_the_right(run: Run, pool: RTPool) -> None:
    pool.nice = False
    error = json.loads(run("test", "--json").stdout)["error"]
    assert error["type"] == "NotPermitted"
    assert "CAP_SYS_NICE" in error["remedy"]
    assert pool.arenas == []
