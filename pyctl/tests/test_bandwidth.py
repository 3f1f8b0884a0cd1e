# SPDX-License-Identifier: MIT
"""Budgets of a client on the fake device, and 'tensormem bandwidth' on the module's files."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from fake import FakeDevice
from tensormem import Client, abi, bandwidth, errors, system
from tensormem.cli import cli
from test_cli import runner
from test_system import make_sysfs

Run = Callable[..., Result]

RULES: dict[str, object] = {
    "chunk_bytes": 30 << 20, "buddy_bytes": 5 << 20, "slab_bytes": 4096, "kv_bytes": 1 << 20,
    "model_bytes": 0, "rt_bytes": 0, "client_excess": 3, "client_waits": 2, "client_held_ns": 5000,
    "period_us": 10000, "throttle": 1, "reclaim": 0, "client_budget": bandwidth.ANY,
    "event": "l2d_cache_refill",
}  # fmt: skip
CORE = {
    "budget": 0, "used": 0, "total": 0, "exempt": 0, "periods": 0, "excess": 0, "held_ns": 0,
}  # fmt: skip
BUSY = {
    "budget": 200_000, "used": 199_000, "total": 5_000_000, "exempt": 77, "periods": 26,
    "excess": 20, "held_ns": 90_000_000,
}  # fmt: skip
CLIENT = {
    "moved": 9 << 20, "budget": 4 << 20, "used": 1 << 20, "excess": 2, "waits": 1,
    "held_ns": 8_000_000,
}  # fmt: skip


def make_folder(root: Path, name: str, values: dict[str, Any]) -> None:
    (root / name).mkdir()
    for file, value in values.items():
        (root / name / file).write_text(f"{value}\n")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = make_sysfs(tmp_path)
    make_folder(root, "bandwidth", RULES)
    for number in (0, 2, 10):
        make_folder(root, f"core{number}", BUSY if number == 2 else CORE)
    return root


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """Two processes share client 7; a third has something else open."""
    top = tmp_path / "proc"
    for pid, command in ((41, "llama"), (42, "worker"), (43, "cat")):
        (top / str(pid) / "fd").mkdir(parents=True)
        (top / str(pid) / "fdinfo").mkdir()
        (top / str(pid) / "comm").write_text(command + "\n")
        lines = ["pos:\t0", "flags:\t02", "tensormem-client:\t7"]
        lines += [f"{name}:\t{value}" for name, value in CLIENT.items()]
        (top / str(pid) / "fd" / "3").symlink_to("/dev/null" if pid == 43 else "/dev/tensormem")
        (top / str(pid) / "fdinfo" / "3").write_text("\n".join(lines) + "\n")
    return top


@pytest.fixture
def run(root: Path, proc: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv(system.ROOT_VARIABLE, str(root))
    monkeypatch.setenv(system.PROC_VARIABLE, str(proc))
    return lambda *args: runner().invoke(cli, ["bandwidth", *args])


# The library


def test_a_client_and_its_budget(client: Client, device: FakeDevice) -> None:
    assert client.bandwidth() == bandwidth.Bandwidth(None, 0, 0, 0, 0, 0, 10_000_000, 7, False)
    client.set_bandwidth("4M")
    assert client.bandwidth().budget == device.budget == 4 << 20
    with client.budget(4096):
        assert client.bandwidth().budget == 4096
        with client.budget("2K"):
            assert device.budget == 2048
        with pytest.raises(ZeroDivisionError), client.budget("2K"):
            raise ZeroDivisionError
        assert device.budget == 4096
    assert device.budget == 4 << 20
    client.set_bandwidth(None)
    assert client.bandwidth().budget is None


@pytest.mark.parametrize("size", [0, -1, 1 << 64, "x", "", 1.5])
def test_no_such_budget(client: Client, device: FakeDevice, size: Any) -> None:
    with pytest.raises(errors.InvalidArgument):
        client.set_bandwidth(size)
    assert abi.IOC_SET_BUDGET not in device.calls


def test_a_budget_above_the_default(client: Client, device: FakeDevice) -> None:
    device.most = 4096
    client.set_bandwidth(2048)
    with pytest.raises(errors.NotPermitted, match="8 KiB"):
        client.set_bandwidth(8192)
    with pytest.raises(errors.NotPermitted, match="any"):
        client.set_bandwidth(None)
    assert device.budget == 2048


def test_read(root: Path, proc: Path) -> None:
    status = bandwidth.read(root)
    assert status.event == "l2d_cache_refill"
    assert list(status.moved.items())[:2] == [("chunk", 30 << 20), ("buddy", 5 << 20)]
    assert (status.get("period_us"), status.get("chunk_bytes")) == (10000, None)
    assert [core.number for core in status.cores] == [0, 2, 10]
    assert status.cores[1].get("used") == 199_000
    (found,) = bandwidth.clients(proc)
    assert (found.id, [u.pid for u in found.users]) == (7, [41, 42])
    assert dict(found.values) == CLIENT
    # they are no pools
    names = {group.name for group in system.read(root).pools()}
    assert names == {"chunk", "buddy", "slab"}


def test_a_module_without(tmp_path: Path) -> None:
    with pytest.raises(errors.IncompatibleModule):
        bandwidth.read(make_sysfs(tmp_path))


def test_set(root: Path) -> None:
    status = bandwidth.set_rules(event="cycles", period_us=2000, throttle=False, reclaim=True,
                                 client_budget=1 << 20, root=root)  # fmt: skip
    assert status.event == "cycles"
    names = ("period_us", "throttle", "reclaim", "client_budget")
    assert [status.get(n) for n in names] == [2000, 0, 1, 1 << 20]
    assert bandwidth.set_core(2, 500, root).cores[1].get("budget") == 500
    with pytest.raises(errors.InvalidArgument, match="no core 3"):
        bandwidth.set_core(3, 500, root)


@pytest.mark.parametrize(
    ("number", "expected", "remedy"),
    [
        (errno.EPERM, errors.NotPermitted, "sudo"),
        (errno.EINVAL, errors.InvalidArgument, "l2d_cache_refill"),
        (errno.EOPNOTSUPP, errors.TensormemError, "perf list"),
        (errno.ENODEV, errors.TensormemError, "no events"),
        (errno.EBUSY, errors.Busy, "budgets away"),
    ],
)
def test_refusals(
    root: Path, monkeypatch: pytest.MonkeyPatch, number: int, expected: type[Exception], remedy: str
) -> None:
    def refuse(self: Path, mode: str = "r", *_: object) -> None:
        raise OSError(number, "")

    status = bandwidth.read(root)
    monkeypatch.setattr(bandwidth, "read", lambda _=None: status)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(expected) as caught:
        bandwidth.set_rules(event="bus_access", root=root)
    assert type(caught.value) is expected
    assert remedy in str(caught.value)


# The commands


def test_show(run: Run) -> None:
    result = run("show")
    assert result.exit_code == 0
    lines = [" ".join(line.split()) for line in result.output.splitlines()]
    assert "budgets are for 10.0 ms; above it they wait; a new client's is any" in result.output
    assert "chunk 30 MiB" in lines
    assert "7 llama 41 +1 9 MiB 4 MiB 1 MiB 2 1 8.00 ms" in lines
    assert "2 200000 199000 26 20 90.0 ms 77" in lines
    assert max(map(len, result.output.splitlines())) <= 100


def test_show_json(run: Run) -> None:
    document = json.loads(run("show", "--json").output)
    assert document["event"] == "l2d_cache_refill"
    assert document["moved"]["slab"] == 4096
    users = [{"pid": 41, "command": "llama"}, {"pid": 42, "command": "worker"}]
    assert document["clients"] == [{"id": 7, **CLIENT, "users": users}]
    assert document["cores"][1] == {"core": 2, **BUSY}


def test_show_without_a_pmu(run: Run, root: Path, proc: Path) -> None:
    (root / "bandwidth/event").write_text("none\n")
    for pid in (41, 42):
        (proc / str(pid) / "fd" / "3").unlink()
    output = run("show").output
    assert "only the module's own bytes" in output
    assert "there are no clients" in output
    assert json.loads(run("show", "--json").output)["event"] is None


def test_cores_without_budgets(run: Run, root: Path) -> None:
    (root / "core2/budget").write_text("0\n")
    assert "none of 3 has a budget of l2d_cache_refill" in run("show").output


def test_set_command(run: Run, root: Path) -> None:
    rules = ["--event", "cycles", "--throttle", "--reclaim", "--period", "5000"]
    result = run("set", "--cpu", "10", "--budget", "3M", *rules, "--client-budget", "8M")
    assert result.exit_code == 0, result.output
    assert "core 10 may have 3000000 cycles in a period" in result.output
    assert result.output.splitlines()[1:] == [
        "period: 5000 us", "event: cycles", "throttle: on", "reclaim: on", "new clients: 8 MiB",
    ]  # fmt: skip
    assert (root / "core10/budget").read_text() == "3000000"
    assert (root / "bandwidth/client_budget").read_text() == str(8 << 20)
    result = run("set", "--client-budget", "any", "--no-throttle")
    assert result.output == "throttle: off\nnew clients: any\n"
    assert "any number of" in run("set", "--cpu", "10", "--budget", "none").output
    assert json.loads(run("set", "--period", "7000", "--json").output)["period_us"] == 7000


@pytest.mark.parametrize(
    "words",
    [
        "", "--cpu 1", "--budget 5", "--cpu x --budget 5", "--cpu 0 --budget x",
        "--cpu 0 --budget 0", "--period 0", "--client-budget many",
    ],
)  # fmt: skip
def test_wrong_usage(run: Run, words: str) -> None:
    assert run("set", *words.split()).exit_code == 2


def test_refused_command(run: Run) -> None:
    result = run("set", "--cpu", "5", "--budget", "1", "--json")
    assert result.exit_code == 1
    assert json.loads(result.output)["error"]["type"] == "InvalidArgument"
