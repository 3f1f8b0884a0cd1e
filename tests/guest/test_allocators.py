# SPDX-License-Identifier: MIT
"""``tensormem bench allocators`` on the real device: what it counts is exact, and its peers are in the guest."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from device import CHUNK, PAGE, write

OBJECTS = 10_000
TURNS = OBJECTS // 500
#: At most so many tensors are there at a time.
SLOTS = 64

PEERS = ("glibc", "jemalloc", "mimalloc")
SMALL = ("bump", "slab", "single", *PEERS)
LARGE = ("buddy", "chunk", "reuse", *PEERS)


def command(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["tensormem", "bench", "allocators", "--objects", str(OBJECTS), *options],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, str], dict[str, Any]]:
    result = command("--json")
    assert (result.returncode, result.stderr) == (0, "")
    document = json.loads(result.stdout)
    assert document["objects"] == OBJECTS
    return {(row["shape"], row["allocator"]): row for row in document["rows"]}


Rows = dict[tuple[str, str], dict[str, Any]]


def test_every_allocator_was_measured(rows: Rows) -> None:
    small = [(shape, name) for shape in ("fixed", "mixed") for name in SMALL]
    assert list(rows) == small + [("tensors", name) for name in LARGE]
    assert not [row["missing"] for row in rows.values() if row["missing"]]
    assert all(row["ours"] == (row["allocator"] not in PEERS) for row in rows.values())


def test_operations_and_live_bytes_are_exact(rows: Rows) -> None:
    for (shape, name), row in rows.items():
        count = OBJECTS // 10 if name == "single" else OBJECTS
        assert row["allocations"] == (TURNS if shape == "tensors" else count * 3 // 2)
        assert row["frees"] == row["allocations"]
        assert row["ns"] > 0
        if shape == "fixed":
            assert (row["full"]["live"], row["half"]["live"]) == (count * 64, count * 32)
        elif name != "single":
            # the same sizes for everybody
            same = rows[shape, "glibc"]
            assert row["full"]["live"] == same["full"]["live"] > same["half"]["live"] == row["half"]["live"]
    mixed = rows["mixed", "glibc"]["full"]["live"]
    assert abs(mixed - OBJECTS * 136) < OBJECTS * 2


def test_memory_adds_up(rows: Rows) -> None:
    for (_, name), row in rows.items():
        for when in (row["full"], row["half"]):
            assert when["taken"] == when["anonymous"] + when["held"] + when["kernel"] >= when["live"]
            assert when["ratio"] == round(when["taken"] / when["live"], 4)
            if name in PEERS:
                assert (when["held"], when["kernel"]) == (0, 0)
                assert when["anonymous"] >= when["live"]
            else:
                assert when["held"] >= when["live"]
                assert when["anonymous"] < 1 << 20  # its objects are not in it


def test_what_the_module_holds(rows: Rows) -> None:
    """The figures of the table are those of the pools: a page, a chunk, an object of a slab."""
    bump = rows["fixed", "bump"]
    size = OBJECTS * 64 * 3 // 2
    assert bump["full"]["held"] == bump["half"]["held"] == -(-size // PAGE) * PAGE
    for name in ("slab", "single"):
        row = rows["fixed", name]
        # 64 divides a page: nothing but the last slab has room, and half of all slabs stays
        assert row["full"]["live"] <= row["full"]["held"] < row["full"]["live"] + 16 * PAGE
        assert row["half"]["held"] == row["full"]["held"]
    buddy, chunk, reuse = (rows["tensors", name] for name in ("buddy", "chunk", "reuse"))
    for when in ("full", "half"):
        assert buddy[when]["held"] % PAGE == 0
        assert 0 <= buddy[when]["held"] - buddy[when]["live"] < SLOTS * PAGE
        assert chunk[when]["held"] % CHUNK == 0
    assert chunk["half"]["held"] < chunk["full"]["held"]
    # kept for the client's next tensors
    assert reuse["half"]["held"] == reuse["full"]["held"] >= buddy["full"]["held"]


def test_who_is_better_is_said(rows: Rows) -> None:
    for (shape, name), row in rows.items():
        peers = [rows[shape, peer] for peer in PEERS]
        said = " ".join(row["better"])
        if name in PEERS:
            assert not said
            continue
        least = min(peers, key=lambda peer: peer["half"]["ratio"])
        behind = row["half"]["ratio"] / least["half"]["ratio"] >= 1.05
        assert (f"{least['allocator']} " in said and "less" in said) if behind else "less" not in said
    # a tensor for 64 bytes is a system call and an object of the kernel's: nobody may read otherwise here
    assert "less" in " ".join(rows["fixed", "slab"]["better"])


def test_only_some() -> None:
    result = command("--only", "slab", "--only", "mimalloc")
    assert result.returncode == 0
    assert result.stdout.count("\n  slab ") == 2
    assert result.stdout.count("\n  mimalloc ") == 3
    assert "glibc " not in result.stdout.split("ns: to allocate")[0]


def test_a_client_without_room_says_so_in_its_row(settings: None) -> None:
    assert write("clients/default_quota", CHUNK) == 0
    result = command("--json", "--only", "bump", "--only", "buddy")
    assert result.returncode == 0
    fixed, mixed, tensors = json.loads(result.stdout)["rows"]
    assert fixed["missing"] is None  # fits
    for row in (mixed, tensors):
        assert row["missing"] == "failed: allocate: Disk quota exceeded"
        assert (row["allocations"], row["full"], row["half"], row["better"]) == (0, None, None, [])
