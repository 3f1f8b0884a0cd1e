# SPDX-License-Identifier: MIT
"""``tensormem bench allocators``: the program against a model, and every way not to have it."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tensormem import allocators, errors
from tensormem.cli import cli

MASK = (1 << 64) - 1

FIGURES = {"allocations": 1500, "frees": 1500, "ns": 150_000} | {
    f"{when}_{name}": value
    for when, live in (("full", 64_000), ("half", 32_000))
    for name, value in (("live", live), ("anonymous", 48_000), ("held", 16_000), ("kernel", 0))
}

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no compiler")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["bench", "allocators", *arguments])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    return tmp_path / "cache/tensormem"


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A program of shell in place of the compiled one; it may use $1 to $3 and say the figures."""

    def make(text: str) -> None:
        says = "\n".join(f"echo {name} {value}" for name, value in FIGURES.items())
        path = script(tmp_path / "allocators", f"figures() {{\n{says}\n}}\n{text}")
        monkeypatch.setattr(allocators, "program", lambda: path)

    return make


# -- the program ----------------------------------------------------------------------


class Dice:
    """The generator of the program."""

    def __init__(self) -> None:
        self.state = 20260101

    def roll(self) -> int:
        s = self.state
        s ^= s >> 12
        s = (s ^ s << 25) & MASK
        s ^= s >> 27
        self.state = s
        return (s * 2685821657736338717 & MASK) >> 32


def mixed(count: int) -> list[int]:
    dice = Dice()
    return [16 + dice.roll() % 241 for _ in range(count)]


def churn(turns: int) -> list[int | None]:
    """The sizes in all places after so many turns."""
    dice = Dice()
    places: list[int | None] = [None] * 64
    for _ in range(turns):
        place = dice.roll() % 64
        least = (64 << 10) << dice.roll() % 6
        places[place] = least + (dice.roll() * least >> 32)
    return places


@needs_compiler
@pytest.mark.parametrize("objects", [1000, 1001, 50_000])
def test_the_program_does_what_its_model_does(objects: int) -> None:
    fixed, various, tensors = allocators.run(objects, ["glibc"])
    sizes = mixed(objects)
    for result, live in ((fixed, [64] * objects), (various, sizes)):
        assert result.missing is None
        assert result.allocations == result.frees == objects + objects // 2
        assert result.full is not None
        assert result.half is not None
        assert (result.full.live, result.half.live) == (sum(live), sum(live[::2]))
        assert result.full.anonymous > result.full.live
        assert (result.full.held, result.full.kernel) == (0, 0)
    places = churn(objects // 500)
    assert tensors.full is not None
    assert tensors.half is not None
    assert tensors.allocations == tensors.frees == objects // 500
    assert tensors.full.live == sum(size or 0 for size in places)
    assert tensors.half.live == sum(size or 0 for size in places[::2])


def test_tensors_reach_from_end_to_end() -> None:
    sizes = [size for size in churn(5000) if size]
    assert len(sizes) == 64
    assert min(sizes) < 128 << 10
    assert 3 << 20 < max(sizes) < 4 << 20


@needs_compiler
def test_it_is_compiled_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = script(tmp_path / "cc", f'echo >> {tmp_path}/calls\nexec cc "$@"')
    monkeypatch.setenv("CC", str(compiler))
    first = allocators.program()
    assert allocators.program() == first
    assert (tmp_path / "calls").read_text() == "\n"
    assert list(cache.iterdir()) == [first]
    assert os.access(first, os.X_OK)
    monkeypatch.setenv("CC", f"{compiler} -O1")  # another one
    assert allocators.program() != first


def test_without_a_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/nonexistent/cc -pipe")
    with pytest.raises(errors.NotAvailable, match="no C compiler") as caught:
        next(allocators.run(1000))
    assert "/nonexistent/cc" in caught.value.cause
    assert "apt install gcc" in caught.value.remedy
    assert not list(cache.iterdir())
    result = run("--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["type"] == "NotAvailable"
    text = run()
    assert text.exit_code == 1
    assert "no C compiler" in text.stderr


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        ("a.c:1:1: fatal error: no stdio.h\ncompilation terminated.", "fatal error: no stdio.h"),
        ("ld: nothing is right", "ld: nothing is right"),
        ("", "no message"),
    ],
)
def test_when_it_does_not_compile(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, says: str, reason: str
) -> None:
    compiler = script(tmp_path / "cc", f"cat >&2 <<'END'\n{says}\nEND\nexit 1")
    monkeypatch.setenv("CC", str(compiler))
    with pytest.raises(errors.NotAvailable, match=reason) as caught:
        allocators.program()
    assert "\n" not in str(caught.value)
    assert not list(cache.iterdir())


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    result = run()
    assert result.exit_code == 1
    assert "Not a directory" in result.stderr
    assert "Traceback" not in result.output


@needs_compiler
def test_without_the_device() -> None:
    if os.path.exists("/dev/tensormem"):
        pytest.skip("there is one")
    for result in allocators.run(1000, ["bump", "slab", "single", "buddy", "chunk", "reuse"]):
        assert result.missing == "/dev/tensormem: No such file or directory"


# -- the command ----------------------------------------------------------------------

#: jemalloc is not there, of mimalloc an older one; the slab is slow, a pool fails, one dies.
SOME = """
case "$1 $LD_PRELOAD" in
"has libmimalloc.so.2"|"malloc "|"malloc libmimalloc.so.2") ;;
has*) exit 3 ;;
chunk*) echo "allocators: allocate: Cannot allocate memory" >&2; exit 1 ;;
slab*) figures | sed 's/^ns .*/ns 1500000/; s/kernel 0/kernel 64000/'; exit ;;
buddy*) kill -9 $$ ;;
bump*|single*|reuse*) echo "allocators: /dev/tensormem: Permission denied" >&2; exit 3 ;;
*) echo "unexpected $* $LD_PRELOAD" >&2; exit 9 ;;
esac
[ "$1" = has ] || figures
"""


def test_a_row_says_what_is_missing(fake: Callable[[str], None]) -> None:
    fake(SOME)
    found = {(r.shape, r.allocator): r for r in allocators.run(1000)}
    assert len(found) == 18
    assert found["fixed", "jemalloc"].missing == "jemalloc is not installed"
    assert found["fixed", "bump"].missing == "/dev/tensormem: Permission denied"
    assert found["tensors", "chunk"].missing == "failed: allocate: Cannot allocate memory"
    assert found["tensors", "buddy"].missing == "failed: status -9"
    there = {key for key, result in found.items() if not result.missing}
    assert there == {
        *((shape, name) for shape in allocators.SHAPES for name in ("glibc", "mimalloc")),
        *((shape, "slab") for shape in ("fixed", "mixed")),
    }
    glibc = found["fixed", "glibc"]
    assert glibc.full == allocators.Memory(64_000, 48_000, 16_000, 0)
    assert glibc.full.ratio == 1
    assert glibc.ns_each == 100


def test_where_a_peer_is_better_the_row_says_so(fake: Callable[[str], None]) -> None:
    fake(SOME)
    document = json.loads(run("--json").stdout)
    assert document["objects"] == 1_000_000
    rows = {(row["shape"], row["allocator"]): row for row in document["rows"]}
    slab = rows["fixed", "slab"]
    assert slab["better"] == ["glibc 10x faster", "glibc 2.0x less"]
    assert (slab["ns_each"], slab["half"]["taken"], slab["half"]["ratio"]) == (1000, 128_000, 4)
    assert rows["fixed", "glibc"]["better"] == []
    chunk = rows["tensors", "chunk"]
    assert (chunk["better"], chunk["ns_each"], chunk["full"]) == ([], None, None)


def test_nobody_is_better_without_a_peer(fake: Callable[[str], None]) -> None:
    fake("figures")
    document = json.loads(run("--json", "--only", "bump").stdout)
    assert [row["better"] for row in document["rows"]] == [[], []]
    # a twentieth is noise
    memory = allocators.Memory(1, 1, 0, 0)
    peer = allocators.Result("fixed", "glibc", None, 10, 10, 960, memory, memory)
    ours = allocators.Result("fixed", "bump", None, 10, 10, 1000, memory, memory)
    assert allocators.better(ours, [ours, peer]) == []


def test_the_table(fake: Callable[[str], None]) -> None:
    fake(SOME)
    result = run()
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == "objects of 64 B"
    assert lines[2].split() == ["ns", "per", "s", "full", "half", "better"]
    (slab, _) = (" ".join(line.split()) for line in lines if line.startswith("  slab "))
    assert slab == "slab 1000 1.0M 2.00 4.00 glibc 10x faster, glibc 2.0x less"
    (jemalloc, *_) = (line for line in lines if line.startswith("  jemalloc "))
    assert jemalloc.endswith("-  jemalloc is not installed")
    assert max(map(len, lines)) <= 80


def test_how_many(fake: Callable[[str], None], tmp_path: Path) -> None:
    fake(f'[ "$1" = has ] || echo "$@" >> {tmp_path}/calls; figures')
    only = [word for name in ("single", "slab", "mimalloc") for word in ("--only", name)]
    assert run("-n", "12345", *only).exit_code == 0
    assert (tmp_path / "calls").read_text().splitlines() == [
        "slab fixed 12345", "single fixed 1234", "malloc fixed 12345",
        "slab mixed 12345", "single mixed 1234", "malloc mixed 12345",
        "malloc tensors 24",
    ]  # fmt: skip


def test_what_is_preloaded_is_the_peer_alone(
    fake: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_PRELOAD", "/nonexistent.so")
    fake('[ -z "$LD_PRELOAD" ] || exit 9; figures')
    assert [result.missing for result in allocators.run(1000, ["glibc"])] == [None] * 3


@pytest.mark.parametrize("count", ["0", "999", "-1", "100000001", "1e6", "many", ""])
def test_a_bad_count_is_wrong_usage(count: str) -> None:
    result = run("--objects", count)
    assert result.exit_code == 2
    assert "--objects" in result.stderr


@pytest.mark.parametrize("name", ["malloc", "tcmalloc", "", "Slab"])
def test_a_bad_name_is_wrong_usage(name: str) -> None:
    result = run("--only", name)
    assert result.exit_code == 2
    assert "'jemalloc'" in result.stderr
