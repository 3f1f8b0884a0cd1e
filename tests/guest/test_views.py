# SPDX-License-Identifier: MIT
"""What shows the module's state, on the real one: `tensormem record`, `top`, `export`, `tune`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families

import tensormem
from device import CHUNK, SYSFS
from tensormem import recording, tune
from tensormem.cli import cli

SIZE = 3 * CHUNK


def command(*words: object, code: int = 0) -> str:
    """What `tensormem` prints, in this process: to start one takes longer than all it does."""
    result = CliRunner().invoke(cli, [*map(str, words)], prog_name="tensormem")
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def world() -> Iterator[None]:
    """One of each kind: tensors, a KV cache with a sequence, an RT client with a miss."""
    layers = tensormem.KVGroup(layers=2, heads=1, dim=64)
    with (
        tensormem.open() as client,
        client.kv_cache([layers], max_tokens=256, max_sequences=2) as cache,
        cache.sequence() as sequence,
        tensormem.rt("2M") as rt,
    ):
        weights = client.empty(SIZE, np.uint8, kind="weights")
        sequence.extend(32)
        block = rt.alloc(4096, deadline_ns=10**9)
        with pytest.raises(tensormem.errors.DeadlineMissed):
            rt.alloc(2 << 20, deadline_ns=1000)
        yield
        del weights, block


def check(document: Any) -> None:
    groups = document["groups"]
    assert groups["chunk"]["used"] >= 4, "three chunks of weights, one of the arena"
    assert groups["clients"]["bytes"] >= SIZE + CHUNK
    (cache,) = document["kv"]["caches"]
    assert cache["users"][0]["command"].startswith("python3")
    assert cache["values"]["sequences"] == 1
    (client,) = document["rt"]["clients"]
    assert (client["values"]["allocs"], client["values"]["misses"]) == (1, 1)
    assert (sum(client["latency"]), sum(client["missed"])) == (1, 1)


def test_record_and_top(world: None, tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    command("record", "-o", file, "-n", 2, "-i", 0.05)
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(found) == 2
    for each in [*found, json.loads(command("top", "--once", "--json"))]:
        check(each)
        assert recording.parse(each).document() == each
    assert set(found[0]["groups"]) >= {p.name for p in SYSFS.iterdir() if p.name in ("chunk", "buddy", "rt", "kv")}
    picture = command("top", "--once", "-i", 0.2)
    for word in ("KV cache", "RT client", "RT latency", "requests, p50", "misses"):
        assert word in picture
    assert all(len(line) <= 80 for line in picture.splitlines())


def test_export(world: None, tmp_path: Path) -> None:
    file = tmp_path / "tensormem.prom"
    command("export", "--textfile", file)
    found = {f.name: f for f in text_string_to_metric_families(file.read_text())}
    assert found["tensormem_up"].samples[0].value == 1
    assert found["tensormem_client_held_bytes"].samples[0].value >= SIZE + CHUNK
    (misses,) = found["tensormem_rt_client_deadline_misses"].samples
    assert (misses.name, misses.value) == ("tensormem_rt_client_deadline_misses_total", 1)
    (sequences,) = found["tensormem_kv_cache_sequences"].samples
    assert sequences.value == 1
    unnamed = [name for name, family in found.items() if family.type == "unknown"]
    assert not unnamed, "files of sysfs that the exporter has no names for"


def test_tune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The running kernel's own values, changed and put back; files go to a root of their own."""
    swappiness = Path("/proc/sys/vm/swappiness")
    before = swappiness.read_text()
    root = tmp_path / "root"
    for name in ("var/lib", "etc", "proc/sys/vm"):
        (root / name).mkdir(parents=True)
    (root / "proc/sys/vm/swappiness").symlink_to(swappiness)
    (root / "proc/swaps").write_text("Filename\n/var/swap file 1 0 -2\n")
    monkeypatch.setenv("TENSORMEM_ROOT", str(root))
    try:
        found = json.loads(command("tune", "--apply", "--json"))
        assert found["changed"] == ["/proc/sys/vm/swappiness", "/etc/sysctl.d/60-tensormem.conf"]
        assert swappiness.read_text() == "10\n"
        command("tune", "--revert")
        assert swappiness.read_text() == before
        assert sorted(p.name for p in (root / "etc").iterdir()) == []
        # the kernel itself refuses: 200 is the most
        advice = [tune.Advice("x", "", "", "", (tune.Change("/proc/sys/vm/swappiness", "999", live=True),))]
        with pytest.raises(tensormem.TensormemError, match="Invalid argument"):
            tune.apply(advice)
        assert swappiness.read_text() == before
    finally:
        swappiness.write_text(before)
