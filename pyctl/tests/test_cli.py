# SPDX-License-Identifier: MIT
from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from fake import FakeDevice
from tensormem import __version__, system
from tensormem import client as client_module
from tensormem import doctor as doctor_module
from tensormem.cli import cli
from tensormem.demo import PROMPT
from tensormem.demo import run as run_module
from tensormem.device import KernelDevice
from tensormem.safetensors import load_into
from tensormem.units import format_size
from test_system import make_process, make_sysfs

Run = Callable[..., Result]


def runner() -> CliRunner:
    """Return a runner that keeps stdout and stderr apart, which click 8.1 must be told."""
    if "mix_stderr" in inspect.signature(CliRunner.__init__).parameters:
        options: dict[str, Any] = {"mix_stderr": False}
        return CliRunner(**options)
    return CliRunner()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run the command line where sysfs has the files of test_system."""
    monkeypatch.setenv("TENSORMEM_SYSFS", str(make_sysfs(tmp_path)))

    def call(*arguments: str) -> Result:
        return runner().invoke(cli, list(arguments), prog_name="tensormem")

    return call


@pytest.fixture
def bare(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run it on a machine without the module."""
    monkeypatch.setenv("TENSORMEM_SYSFS", str(tmp_path / "nothing"))
    missing = tmp_path / "nothing"
    monkeypatch.setattr(client_module, "KernelDevice", lambda _: KernelDevice(missing))
    return run


@pytest.fixture
def fake(run: Run, monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    device = FakeDevice(max_batch=64)
    monkeypatch.setattr(client_module, "KernelDevice", lambda _: device)
    return device


def narrow(text: str) -> bool:
    return all(len(line) <= 80 for line in text.splitlines())


# -- status and pool -------------------------------------------------------------------


def test_status(run: Run) -> None:
    result = run("status")
    assert result.exit_code == 0
    assert narrow(result.stdout)
    lines = {" ".join(line.split()) for line in result.stdout.splitlines()}
    assert "chunks in large tensors 12 24 MiB" in lines
    assert "chunks ready 5 10 MiB" in lines
    assert "chunks to keep ready 4 8 MiB" in lines
    assert "chunks at most 256 512 MiB" in lines
    assert "chunks in the buddy pool 3 6 MiB" in lines
    page = os.sysconf("SC_PAGE_SIZE")
    assert f"its pages used 1036 {format_size(1036 * page)}" in lines
    assert f"its pages in slabs 9 {format_size(9 * page)}" in lines
    assert "small tensors in them 20 KiB" in lines
    assert "clients 2 30 MiB" in lines
    assert "kept for reuse, or held 512 KiB" in lines
    assert "their tensors 28" in lines
    assert "quota of a new client 1 TiB" in lines
    # 20 - 5 of 256 on 40 columns are 2.3, 20 are 3.1: both rounded up
    assert "[###=" + "." * 36 + "]  512 MiB" in result.stdout


def test_status_json(run: Run) -> None:
    result = run("status", "--json")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert set(document) == {
        "chunk_size", "chunk", "buddy", "slab", "clients", "dispatch", "node0", "node2", "node10",
    }  # fmt: skip
    assert document["dispatch"]["kv"][0] == {
        "smallest": 1, "largest": 2093056, "pool": "buddy", "huge": False,
    }  # fmt: skip
    assert document["chunk_size"] == 2 << 20
    assert document["chunk"]["grow_failed"] == 1
    assert document["clients"]["default_quota"] == 1 << 40


def test_status_with_files_missing(run: Run) -> None:
    root = Path(os.environ["TENSORMEM_SYSFS"])
    for name in ("used", "quarantined"):
        (root / "chunk" / name).unlink()
    result = run("status")
    assert result.exit_code == 0
    assert "chunks in large tensors" in result.stdout
    assert " -" in result.stdout
    for file in (root / "clients").iterdir():
        file.unlink()
    result = run("status")
    assert result.exit_code == 1
    assert "'clients'" in result.stderr


def test_what_is_rare_shows_when_there_is_any(run: Run) -> None:
    folder = Path(os.environ["TENSORMEM_SYSFS"]) / "chunk"
    for name, what, unit in (
        ("quarantined", "pages freed but held", os.sysconf("SC_PAGE_SIZE")),
        ("charged", "chunks charged to cgroups", 2 << 20),
    ):
        assert what not in run("status").stdout
        (folder / name).write_text("3\n")
        lines = [" ".join(line.split()) for line in run("status").stdout.splitlines()]
        assert f"{what} 3 {format_size(3 * unit)}" in lines
    assert narrow(run("status").stdout)


def test_the_dma_pool_shows_where_there_is_one(run: Run) -> None:
    folder = Path(os.environ["TENSORMEM_SYSFS"]) / "dma"
    folder.mkdir()
    values = {"buffers": 1, "total": 0, "used": 0, "free": 0, "node": "none"}

    def shown(*command: str) -> list[str]:
        for name, value in values.items():
            (folder / name).write_text(f"{value}\n")
        result = run(*command)
        assert result.exit_code == 0
        assert narrow(result.stdout)
        return [" ".join(line.split()) for line in result.stdout.splitlines()]

    assert not any("DMA pool" in line for line in shown("status"))
    values |= {"total": 16, "used": 3, "free": 13, "node": "/tensormem-dma"}
    assert "chunks of the DMA pool used 3 6 MiB" in shown("status")
    lines = shown("pool", "show", "dma")
    assert "total 16 32 MiB chunks of its region" in lines
    assert "node /tensormem-dma the device tree's node" in lines
    assert json.loads(run("status", "--json").stdout)["dma"] == values


def test_status_of_a_module_without_slabs(run: Run) -> None:
    root = Path(os.environ["TENSORMEM_SYSFS"])
    for file in (*(root / "slab").iterdir(), root / "clients" / "kept"):
        file.unlink()
    result = run("status")
    assert result.exit_code == 0
    assert "slabs" not in result.stdout


def test_pool_show(run: Run) -> None:
    root = Path(os.environ["TENSORMEM_SYSFS"])
    (root / "chunk" / "novelty").write_text("9\n")
    result = run("pool", "show")
    assert result.exit_code == 0
    assert narrow(result.stdout)
    for word in ("novelty", "fallbacks", "grow_failed", "512 MiB"):
        assert word in result.stdout
    rows = [line.split() for line in result.stdout.splitlines()]
    assert [row[0] for row in rows if row[1:2] == ["pool"]] == ["chunk", "buddy", "slab"]
    assert "default_quota" not in result.stdout
    assert "node0" not in result.stdout
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    page = os.sysconf("SC_PAGE_SIZE")
    assert f"pages 9 {format_size(9 * page)} pages that small tensors share" in lines
    assert "fragmentation 16.3 % free memory that is in no free chunk" in lines
    assert "quarantined 0 0 B pages freed and still held by others" in lines
    table = lines[lines.index("dispatch from to pool mapped") + 1 :]
    assert table == [
        "kv 1 B 2093056 B buddy pages",
        "2093057 B any chunk pages",
        "weights 1 B 2048 B slab pages",
        "2049 B 2093056 B buddy pages",
        "2093057 B any chunk blocks",
    ]
    document = json.loads(run("pool", "show", "--json").stdout)
    assert set(document) == {"chunk_size", "chunk", "buddy", "slab", "dispatch"}
    assert document["dispatch"]["weights"][2]["huge"] is True
    assert document["dispatch"]["weights"][2]["largest"] is None
    one = run("pool", "show", "buddy")
    assert "buddy pool" in one.stdout
    assert "chunk pool" not in one.stdout
    assert "dispatch" not in one.stdout
    document = json.loads(run("pool", "show", "buddy", "--json").stdout)
    assert document["buddy"]["merges"] == 22
    assert document["buddy"]["fragmentation"] == 163424
    assert set(document) == {"chunk_size", "buddy"}
    wrong = run("pool", "show", "rt")
    assert wrong.exit_code == 1
    assert "'rt'" in wrong.stderr


def test_pool_compact(run: Run) -> None:
    result = run("pool", "compact")
    assert (result.exit_code, result.stdout) == (0, "buddy pool: 0 chunks emptied (0 B)\n")
    assert json.loads(run("pool", "compact", "--json").stdout)["emptied"] == 0
    folder = Path(os.environ["TENSORMEM_SYSFS"]) / "buddy"
    assert (folder / "compact").read_text() == "1"


def test_numa(run: Run) -> None:
    result = run("numa")
    assert result.exit_code == 0
    assert narrow(result.stdout)
    rows = [line.split() for line in result.stdout.splitlines()]
    page = os.sysconf("SC_PAGE_SIZE")
    assert [row[0] for row in rows[:4]] == ["node", "0", "2", "10"]
    assert " ".join(rows[1]) == (
        f"0 384 MiB 24 MiB 6 MiB 16 MiB {format_size(1000 * page)} 123456789 12"
    )
    assert " ".join(rows[2]) == "2 0 B 0 B 0 B 0 B - 0 0"
    document = json.loads(run("numa", "--json").stdout)
    assert [node["node"] for node in document["nodes"]] == [0, 2, 10]
    assert document["nodes"][0]["hits"] == 123456789
    assert document["nodes"][2]["used_pages"] == 36
    root = Path(os.environ["TENSORMEM_SYSFS"])
    for file in root.glob("node*/*"):
        file.unlink()
    result = run("numa")
    assert result.exit_code == 1
    assert "node0" in result.stderr


def test_pool_set(run: Run) -> None:
    result = run("pool", "set", "chunk", "--capacity", "1G", "--reserve", "63M")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "chunk pool: capacity 512 chunks (1 GiB)",
        "chunk pool: reserve 32 chunks (64 MiB)",
    ]
    folder = Path(os.environ["TENSORMEM_SYSFS"]) / "chunk"
    assert (folder / "capacity").read_text() == "512"
    assert (folder / "reserve").read_text() == "32"
    result = run("pool", "set", "--reserve", "1", "--json")
    assert json.loads(result.stdout) == {
        "pool": "chunk", "chunk_size": 2 << 20, "capacity": 512, "reserve": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    "arguments",
    [
        ["pool", "set", "chunk"],
        ["pool", "set", "buddy", "--capacity", "1G"],
        ["pool", "set", "chunk", "--capacity", "lots"],
        ["pool", "set", "chunk", "--capacity", "-1"],
        ["pool", "set", "chunk", "--reserve", "99999999T"],
        ["demo", "--tokens", "0"],
        ["demo", "--checkpoint", "c"],
        ["completion", "tcsh"],
        ["nonsense"],
        ["status", "--nonsense"],
    ],
)
def test_wrong_usage(run: Run, arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Usage: tensormem" in result.stderr
    assert "Traceback" not in result.output


def test_pool_set_refused(run: Run) -> None:
    result = run("pool", "set", "chunk", "--reserve", "1G")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "512 chunks does not fit into a capacity of 256" in result.stderr


# -- without the module -----------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["status"],
        ["pool", "show"],
        ["pool", "set", "chunk", "--reserve", "1"],
        ["pool", "compact"],
        ["numa"],
        ["demo"],
    ],
)
def test_without_the_module(bare: Run, arguments: list[str]) -> None:
    result = bare(*arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("tensormem: ")
    assert result.stderr.count("\n") == 1
    assert "not loaded" in result.stderr
    assert "tensormem doctor" in result.stderr
    assert "Traceback" not in result.output
    result = bare(*arguments, "--json")
    assert result.exit_code == 1
    error = json.loads(result.stdout)["error"]
    assert error["type"] in ("NotAvailable", "DeviceMissing")
    assert "not loaded" in error["cause"]
    assert error["remedy"]
    assert result.stderr == ""


def test_an_unforeseen_oserror_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise OSError(5, "Input/output error", "/some/file")

    monkeypatch.setattr("tensormem.system.read", broken)
    result = run("status")
    assert result.exit_code == 1
    assert result.stderr.startswith("tensormem: /some/file: Input/output error")
    assert result.stderr.count("\n") == 1


# -- KV caches -----------------------------------------------------------------------------


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "proc"
    folder.mkdir()
    monkeypatch.setenv("TENSORMEM_PROC", str(folder))
    return folder


KV_LINES = {
    "tensormem-kv": 4, "client": 9, "max_tokens": 512, "max_sequences": 12, "block_tokens": 32,
    "sequences": 3, "limit": 8 << 20, "held": 4 << 20, "used": 3 << 20, "cached": 1 << 20,
    "packed": 1 << 18, "unpacked": 1 << 20, "lookups": 200, "hits": 150, "copies": 5,
    "evictions": 6, "packs": 7, "unpacks": 8, "events_lost": 0, "moved": 10,
}  # fmt: skip


def test_kv_show(bare: Run, proc: Path) -> None:
    result = bare("kv", "show")
    assert (result.exit_code, result.stdout) == (0, "no process has a KV cache open\n")
    link = "anon_inode:[tensormem-kv]"
    make_process(proc, 55, "python3", {"7": (link, KV_LINES)})
    for pid in range(60, 72):
        make_process(proc, pid, "worker with a name", {"3": (link, KV_LINES)})
    make_process(proc, 90, "old", {"3": (link, {"tensormem-kv": 5})})
    result = bare("kv", "show")
    assert result.exit_code == 0
    assert narrow(result.stdout)
    assert "KV cache 4 of python3 (55), worker with a name (60)," in result.stdout
    # 2 and 1 of 8 MiB on 40 columns
    assert "[##########=====" + "." * 25 + "]  8 MiB" in result.stdout
    lines = {" ".join(line.split()) for line in result.stdout.splitlines()}
    for line in (
        "sequences 3 of 12 2 MiB", "tokens in one, at most 512", "tokens in a block 32",
        "cached for their prefix 1 MiB", "packed 25.0% 256 KiB", "unpacked it would be 1 MiB",
        "taken in chunks 4 MiB", "blocks asked for by hash 200", "of these found 75.0%",
        "blocks copied 5", "cached blocks given up 6", "blocks packed 7", "blocks unpacked 8",
        "pages moved 10", "events that nobody read 0", "KV cache 5 of old (90)",
        "sequences - of - -", "packed - -",
    ):  # fmt: skip
        assert line in lines
    document = json.loads(bare("kv", "show", "--json").stdout)
    assert document["hidden_processes"] == 0
    first, second = document["caches"]
    assert first["users"][0] == {"pid": 55, "command": "python3"}
    assert len(first["users"]) == 13
    assert {k: first[k] for k in KV_LINES if k != "tensormem-kv"} == {
        k: v for k, v in KV_LINES.items() if k != "tensormem-kv"
    }
    assert (first["id"], first["hit_rate"], first["packing"]) == (4, 0.75, 0.25)
    assert (second["id"], second["hit_rate"], second["packing"]) == (5, None, None)


def test_kv_show_says_what_it_may_not_see(
    bare: Run, proc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_process(proc, 55, "python3", {})

    def denied(process: Path, link: str, key: str) -> Any:
        raise PermissionError

    monkeypatch.setattr(system, "_descriptors", denied)
    result = bare("kv", "show")
    assert "1 processes of other users were not looked at: run it with sudo" in result.stdout


def saved_text(run: Run, fake: FakeDevice, path: Path, *arguments: str) -> str:
    result = run("kv", "save", *arguments, "-o", str(path))
    assert result.exit_code == 0, result.output
    assert narrow(result.stdout)
    assert not fake.tensors
    assert all(cache.fd == -1 for cache in fake.caches.values())
    return result.stdout


def test_kv_save_and_restore(
    run: Run, fake: FakeDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("story.kv")
    # what the model makes of it in one go
    want = json.loads(run("demo", "--tokens", "60", "--json").stdout)
    monkeypatch.setattr(client_module, "KernelDevice", lambda _: FakeDevice(max_batch=64))
    out = saved_text(run, fake, path, PROMPT)
    assert out.startswith(f"story.kv: {len(PROMPT)} tokens, ")
    (tmp_path / "text").write_text(PROMPT)
    assert saved_text(run, fake, path, "@text") == out
    result = run("kv", "restore", "story.kv", "-n", "60")
    assert result.exit_code == 0, result.output
    assert narrow(result.stdout)
    text = " ".join(result.stdout.split())
    assert text.startswith(" ".join((PROMPT + want["text"]).split()))
    assert f"{len(PROMPT) - 1} of {len(PROMPT)} tokens were not computed again" in text
    result = run("kv", "restore", "story.kv", "-n", "60", "--json")
    document = json.loads(result.stdout)
    assert document["tokens"] == want["tokens"]
    assert document["text"] == want["text"]
    assert document["prompt_text"] == PROMPT
    assert document["reused"] == len(PROMPT) - 1
    document = json.loads(run("kv", "save", PROMPT, "-o", "story.kv", "--json").stdout)
    assert document["file"] == "story.kv"
    assert document["tokens"] == len(PROMPT)
    assert document["size"] == path.stat().st_size


def test_kv_file(
    run: Run, fake: FakeDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "story.kv"
    saved_text(run, fake, path, "The gate was closed at dusk")
    result = run("kv", "file", str(path))
    assert result.exit_code == 0
    lines = {" ".join(line.split()) for line in result.stdout.splitlines()}
    assert f"{path}: intact" in lines
    assert f"tokens 27, in blocks of {os.sysconf('SC_PAGE_SIZE') // 128}" in lines
    assert "0-3 float32 2 heads of 16 all" in lines
    document = json.loads(run("kv", "file", str(path), "--json").stdout)
    assert document["length"] == 27
    assert bytes(document["tokens"]) == b"The gate was closed at dusk"
    assert document["groups"][0]["layers"] == [0, 1, 2, 3]
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    monkeypatch.setattr(client_module, "KernelDevice", lambda _: FakeDevice(max_batch=64))
    for command in (["file"], ["restore", "-n", "3"]):
        result = run("kv", *command, str(path))
        assert result.exit_code == 1
        assert "tensor 'v.3' is damaged" in result.stderr
        assert result.stdout == ""
        result = run("kv", *command, str(path), "--json")
        assert json.loads(result.stdout)["error"]["type"] == "KVFileError"


def test_kv_refusals(run: Run, fake: FakeDevice, tmp_path: Path,
                     monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_bytes(b"\xff")
    fresh = lambda _: FakeDevice(max_batch=64)  # noqa: E731
    monkeypatch.setattr(client_module, "KernelDevice", fresh)
    for arguments, code, words in (
        (["save", "", "-o", "x"], 1, "a text of 0 bytes"),
        (["save", "a" * 513, "-o", "x"], 1, "a text of 513 bytes"),
        (["save", "@nothing", "-o", "x"], 1, "nothing: No such file"),
        (["save", "@text", "-o", "x"], 2, "text is not UTF-8"),
        (["save", "abc"], 2, "--output"),
        (["save", "abc", "-o", "no/x"], 1, "No such file"),
        (["save", "abc", "-o", "good"], 0, ""),
        (["restore", "good", "-n", "510"], 1, "a text of 3 bytes and 510 tokens"),
        (["restore", "good", "--checkpoint", "a"], 1, "of another model"),
        (["restore", "x"], 1, "x: No such file"),
        (["file", "text"], 1, "the file has 1 bytes"),
    ):
        result = run("kv", *arguments)
        assert (result.exit_code, words in result.stderr) == (code, True), result.output
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["good", "text"]


# -- doctor -------------------------------------------------------------------------------


def test_doctor(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [
        doctor_module.Check("module", "loaded"),
        doctor_module.Check("PSI", "off", "warn", "a note " * 20, ["add 'psi=1'"]),
    ]
    monkeypatch.setattr(doctor_module, "examine", lambda: checks)
    result = run("doctor")
    assert result.exit_code == 0, "a warning is not a failure"
    assert narrow(result.stdout)
    assert "ok    module" in result.stdout
    assert "add 'psi=1'" in result.stdout
    assert result.stdout.endswith("2 checks: 1 ok, 1 warnings, 0 failed\n")
    checks.append(doctor_module.Check("device", "missing", "fail", "", ["sudo modprobe tensormem"]))
    result = run("doctor")
    assert result.exit_code == 1
    assert "FAIL  device" in result.stdout
    result = run("doctor", "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert document["ok"] is False
    assert document["checks"][2] == {
        "name": "device", "value": "missing", "state": "fail", "note": "",
        "fix": ["sudo modprobe tensormem"],
    }  # fmt: skip
    assert narrow(run("doctor").stdout)


# -- demo ---------------------------------------------------------------------------------


def test_demo(run: Run, fake: FakeDevice) -> None:
    result = run("demo", "--tokens", "100")
    assert result.exit_code == 0, result.output
    assert narrow(result.stdout)
    story, report = result.stdout.split("\n\n", 1)
    text = " ".join(run_module.text().split())
    assert text.startswith(" ".join(story.split()))
    assert len(story) >= 120
    rows = [line.split() for line in report.splitlines()]
    weights = next(row for row in rows if row[:1] == ["weights"])
    assert weights[1:3] == ["chunk", "1"]
    assert weights[-2:] == ["1", "4"]
    assert [row[1] for row in rows if row[:1] == ["activations"]] == ["buddy"]
    assert next(row for row in rows if row[:1] == ["kv"])[1:3] == ["kv", "1"]
    assert "verdict      equal: all 100 tokens" in report
    assert "tokens/s on tensormem" in report
    assert "chunk pool   chunks: 12 used, 5 ready, of 256 (512 MiB)" in report
    assert fake.fd == -1
    assert not fake.tensors


def test_demo_json(run: Run, fake: FakeDevice) -> None:
    result = run("demo", "--tokens", "20", "--checkpoint", "a", "--prompt", "The gate", "--json")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["prompt"] == "The gate"
    assert document["checkpoint"] == "a"
    assert len(document["tokens"]) == 20
    assert bytes(document["tokens"]).decode() == document["text"]
    assert document["equal"] is True
    assert document["first_difference"] is None
    assert document["tokens_per_second"]["tensormem"] > 0
    assert [h["kind"] for h in document["holdings"]] == ["weights", "kv", "activations"]
    assert document["model"]["layers"] == 4
    assert document["pools"]["chunk"]["capacity"] == 256


def test_demo_that_differs(run: Run, fake: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:

    def damaged(client: Any, path: Any) -> Any:
        weights = load_into(client, path)
        weights["model.norm.weight"][:] *= -1
        return weights

    monkeypatch.setattr(run_module, "load_into", damaged)
    result = run("demo", "--tokens", "5")
    assert result.exit_code == 1
    assert "verdict      DIFFERENT at token 0 of 5" in result.stdout
    monkeypatch.setattr(client_module, "KernelDevice", lambda _: FakeDevice())
    result = run("demo", "--tokens", "5", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["first_difference"] == 0


def test_demo_refusals(run: Run, fake: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("demo", "--prompt", "")
    assert result.exit_code == 1
    assert "a prompt of 0 bytes" in result.stderr
    monkeypatch.setattr(client_module, "KernelDevice", lambda _: FakeDevice(capacity=1 << 20))
    result = run("demo", "--tokens", "5", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["type"] == "PoolExhausted"
    result = run("demo", "--tokens", "5")
    assert result.exit_code == 1
    assert "--capacity" in result.stderr


# -- the rest -----------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(run: Run, shell: str) -> None:
    result = run("completion", shell)
    assert result.exit_code == 0
    assert f"_TENSORMEM_COMPLETE={shell}_complete" in result.stdout
    assert json.loads(run("completion", shell, "--json").stdout)["script"] in result.stdout


def test_completion_completes() -> None:
    result = python("-m", "tensormem", COMP_WORDS="tensormem po", COMP_CWORD="1",
                    _TENSORMEM_COMPLETE="bash_complete")  # fmt: skip
    assert result.stdout == "plain,pool\n"


def test_help_and_version(run: Run) -> None:
    result = run("--help")
    assert result.exit_code == 0
    for word in (
        "status",
        "pool",
        "numa",
        "kv",
        "demo",
        "doctor",
        "completion",
        "Exit codes: 0 fine, 1",
    ):
        assert word in result.stdout
    assert run("--version").stdout == f"tensormem, version {__version__}\n"
    for command in (["status"], ["pool", "show"], ["pool", "set"], ["pool", "compact"], ["numa"],
                    ["kv", "show"], ["kv", "save"], ["kv", "restore"], ["kv", "file"],
                    ["demo"], ["doctor"], ["completion"]):  # fmt: skip
        text = run(*command, "-h")
        assert text.exit_code == 0
        assert "--json" in text.stdout
        assert narrow(text.stdout)


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    source = str(Path(__file__).parents[1] / "src")
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": source, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_as_a_module_and_without_numpy(tmp_path: Path) -> None:
    root = make_sysfs(tmp_path)
    code = (
        "import sys; sys.modules['numpy'] = None; sys.argv = ['tensormem', 'status', '--json'];"
        "import runpy; runpy.run_module('tensormem', run_name='__main__')"
    )
    for arguments in (["-m", "tensormem", "status", "--json"], ["-c", code]):
        result = python(*arguments, TENSORMEM_SYSFS=str(root))
        assert (result.returncode, result.stderr) == (0, "")
        assert json.loads(result.stdout)["clients"]["count"] == 2
    result = python("-m", "tensormem", "nonsense")
    assert result.returncode == 2


def test_public_names() -> None:
    import tensormem

    for name in tensormem.__all__:
        assert getattr(tensormem, name) is not None
    assert tensormem.open is client_module.open
    with pytest.raises(AttributeError, match="nonsense"):
        _ = tensormem.nonsense


@pytest.mark.parametrize("name", ["system.read", "safetensors.load", "Client", "open"])
def test_names_of_the_package_need_no_further_import(name: str) -> None:
    result = python("-c", f"import tensormem; print(callable(tensormem.{name}))")
    assert (result.stdout, result.stderr) == ("True\n", "")
