# SPDX-License-Identifier: MIT
"""The map of chunks: every page it shows as used is, and no other; before, after and beside churn."""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import stat
import subprocess
import threading
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner

from device import CHUNK, KASAN, PAGE, Raw, Slot, address_of, full, read, weights, write
from process import killed_at_random, status_of
from tensormem import abi, layout, picture, system
from tensormem.cli import cli

PAGES = CHUNK // PAGE
DEBUGFS = Path(layout.DEFAULT_ROOT)


def totals() -> dict[str, int]:
    names = ("chunk/total", "chunk/free", "chunk/zeroed", "chunk/used", "chunk/charged", "buddy/chunks",
             "buddy/used_pages", "buddy/free_pages", "buddy/cached_pages")  # fmt: skip
    return {name: read(name) for name in names}


def check() -> list[layout.Chunk]:
    """The map, which is that of the counters; nothing else may be going on."""
    while True:
        before = totals()
        chunks = layout.chunks()
        if totals() == before:  # or the reserve is being filled
            break
    found = picture.summary(chunks, PAGE)
    states = Counter(chunk.state for chunk in chunks)
    assert len(chunks) == before["chunk/total"]
    assert found.whole == states["chunk"] == before["chunk/used"]
    assert states["zeroed"] == before["chunk/zeroed"]
    assert states["zeroed"] + states["dirty"] + states["split"] == before["chunk/free"]
    assert sum(chunk.charged for chunk in chunks) == before["chunk/charged"]
    assert found.buddy == before["buddy/chunks"]
    assert found.used_pages == before["buddy/used_pages"] + before["buddy/cached_pages"]
    assert found.free_pages == before["buddy/free_pages"]
    places = [(chunk.node, chunk.number) for chunk in chunks]
    assert sorted(set(places)) == places
    # nothing lies in two places
    assert len({chunk.frame for chunk in chunks}) == len(chunks)
    assert not any(chunk.frame % PAGES for chunk in chunks)
    for chunk in chunks:
        at = 0
        for run in chunk.runs:
            assert run.index >= at
            assert run.index % run.pages == 0
            assert not run.arriving
            at = run.index + run.pages
        assert at <= PAGES
    return chunks


def used_frames(chunks: list[layout.Chunk]) -> Counter[int]:
    """How often each frame is in use."""
    found: Counter[int] = Counter()
    for chunk in chunks:
        if chunk.state == "chunk":
            found.update(range(chunk.frame, chunk.frame + PAGES))
        for run in chunk.runs:
            found.update(range(chunk.frame + run.index, chunk.frame + run.index + run.pages))
    return found


def frames(window, item: abi.Alloc) -> list[int]:
    """Where a tensor's pages are, as the kernel's own table says."""
    address = address_of(window) + item.offset
    count = -(-item.size // PAGE)
    for page in range(count):
        window[item.offset + page * PAGE]
    found = layout.frames(address, count)
    assert None not in found
    return found  # type: ignore[return-value]


def test_random_tensors_are_all_there_is(raw: Raw) -> None:
    """A model of every frame: what tensors have is used, and what is used they have."""
    rng = random.Random(20)
    window = raw.map_window()
    live: list[abi.Alloc] = []
    for step in range(120 if KASAN else 300):
        if live and rng.random() < 0.45:
            item = live.pop(rng.randrange(len(live)))
            assert raw.free(item.handle) == 0
        else:
            pages = rng.choice((1, 1, 2, 3, 5, 8, 17, PAGES // 3, PAGES - 1, PAGES, PAGES + 3))
            pinned = abi.AllocFlag.PINNED if rng.random() < 0.1 else 0
            # not in slabs, whose pages are nobody's alone
            pool = abi.Pool.BUDDY if pages < 20 else rng.choice((0, abi.Pool.CHUNK))
            live.append(raw.alloc(pages * PAGE - rng.randrange(PAGE), rng.choice(tuple(abi.Kind)), pool, flags=pinned))
        if step % 40 == 39:
            if rng.random() < 0.5:
                assert write("buddy/compact", 1) == 0
            expected: Counter[int] = Counter()
            for item in live:
                expected.update(frames(window, item))
            chunks = check()
            found = used_frames(chunks)
            assert max(found.values(), default=1) == 1
            # a chunk may be longer than what the tensor needs of it, but each is some tensor's
            assert set(expected) <= set(found)
            queries = [raw.query(item.handle)[1] for item in live]
            assert len(found) == sum(q.held for q in queries) // PAGE
            assert sum(c.state == "chunk" for c in chunks) == sum(q.nr_chunks for q in queries)
            assert sum(len(c.runs) for c in chunks) == sum(q.nr_runs for q in queries)
    window.close()


def test_compaction_before_and_after(raw: Raw) -> None:
    rng = random.Random(3)
    items = [raw.alloc(rng.randrange(1, 9) * PAGE, pool=abi.Pool.BUDDY) for _ in range(PAGES)]
    rng.shuffle(items)
    kept, gone = items[: len(items) // 4], items[len(items) // 4 :]
    for item in gone:
        assert raw.free(item.handle) == 0
    before = check()
    emptied = system.compact()
    after = check()
    assert emptied >= 2
    count = [sum(chunk.state == "buddy" for chunk in chunks) for chunks in (before, after)]
    assert count[0] - count[1] == emptied
    sizes = [Counter(run.pages for chunk in chunks for run in chunk.runs) for chunks in (before, after)]
    assert sizes[0] == sizes[1]
    assert sum(sizes[0].elements()) == sum(-(-item.size // PAGE) for item in kept)
    holes = [picture.summary(chunks, PAGE).holes for chunks in (before, after)]
    assert holes[1] < holes[0]


def test_who_has_a_whole_chunk(raw: Raw, slot: Slot) -> None:
    for kind in abi.Kind:
        raw.alloc((kind + 1) * CHUNK, kind)
    with raw.kv([full(4, PAGE)]) as cache, slot.load(weights("a", 2 * CHUNK)), raw.rt(CHUNK):
        cache.open(tokens=64)
        held = cache.info().held // CHUNK
        assert held
        found = Counter(chunk.purpose for chunk in check() if chunk.purpose)
    assert found == {
        **{kind.name.lower(): kind + 1 for kind in abi.Kind},
        "cache": held, "model": 2, "rt": 1,
    }  # fmt: skip


def test_runs_that_stay_are_told(raw: Raw) -> None:
    raw.alloc(4 * PAGE, pool=abi.Pool.BUDDY)
    raw.alloc(2 * PAGE, pool=abi.Pool.BUDDY, flags=abi.AllocFlag.PINNED)
    runs = [run for chunk in check() for run in chunk.runs]
    assert sorted((run.pages, run.movable) for run in runs) == [(2, False), (4, True)]


def churn(seed: int) -> None:
    rng = random.Random(seed)
    with Raw() as client:
        live: list[int] = []
        while True:
            if len(live) > 40:
                client.free(live.pop(rng.randrange(len(live))))
            live.append(client.alloc(rng.choice((PAGE, 9 * PAGE, CHUNK // 2, CHUNK + PAGE))).handle)
            if rng.random() < 0.02:
                write("buddy/compact", 1)


def test_readers_beside_churn_that_is_killed() -> None:
    """Each line is a chunk as it was at one moment, whatever goes on: no run overlaps, none is cut."""
    rng = random.Random(8)
    passes = mmap.mmap(-1, PAGE)
    reader = os.fork()
    if not reader:
        code = 1
        try:
            with (DEBUGFS / "chunks").open("rb", buffering=0) as file:
                while True:
                    file.seek(0)
                    text = b""
                    while part := file.read(rng.randrange(1, 9000)):
                        text += part
                    for chunk in layout.parse_chunks(text.decode()):
                        at = 0
                        for run in chunk.runs:
                            assert run.index >= at
                            at = run.index + run.pages
                        assert at <= PAGES
                    passes[0] = min(passes[0] + 1, 255)
        finally:
            os._exit(code)
    least, turns = 3 if KASAN else 8, 0
    while turns < least or passes[0] < least:
        killed_at_random(churn, rng, 0.05, 0.4)
        assert os.waitpid(reader, os.WNOHANG) == (0, 0)
        turns += 1
    os.kill(reader, signal.SIGKILL)
    _, status = os.waitpid(reader, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


def test_only_root_reads_them() -> None:
    def as_nobody() -> None:
        os.setgid(65534)
        os.setuid(65534)
        for name, flags in (("chunks", os.O_RDONLY), ("walk", os.O_RDWR)):
            with pytest.raises(PermissionError):
                os.open(DEBUGFS / name, flags)

    assert status_of(as_nobody) == 0
    assert stat.S_IMODE((DEBUGFS / "chunks").stat().st_mode) == 0o400
    assert stat.S_IMODE((DEBUGFS / "walk").stat().st_mode) == 0o600


# The command


def tensormem(*arguments: str, code: int = 0, **environment: str) -> str:
    """What it says: all of it, or the one line of an error."""
    result = CliRunner(env=environment).invoke(cli, arguments, prog_name="tensormem")
    assert result.exit_code == code, result.output
    assert not code or len(result.output.splitlines()) == 1, result.output
    return result.output


def test_command_shows_a_tensor_of_another_process(raw: Raw) -> None:
    item = raw.alloc(2 * CHUNK + 3 * PAGE, abi.Kind.WEIGHTS)
    mapping = raw.map_tensor(item)
    mapping[:] = bytes(len(mapping))
    document = json.loads(tensormem("map", "--json", "--compact", f"{os.getpid()}:{item.handle}"))
    (found,) = document["tensors"]
    assert (found["address"], found["size"]) == (address_of(mapping), len(mapping))
    expected = layout.frames(address_of(mapping), len(mapping) // PAGE)
    assert [s["frame"] + i for s in found["stretches"] for i in range(s["length"] // PAGE)] == expected
    assert document["summary"]["whole"] == 2
    assert len(document["before"]) >= 3
    text = tensormem("map", f"{os.getpid()}:{item.handle}")
    assert f"{address_of(mapping):#x}" in text
    assert "weights" in text
    seen = layout.lay_out(layout.walk(address_of(mapping), len(mapping)), address_of(mapping), len(mapping), PAGE)
    assert found["tlb_entries"] == seen.tlb_entries
    assert {s["node"] for s in found["stretches"]} == {0}
    assert all({"VALID", "USER", "nG"} <= set(s["flags"]) for s in found["stretches"])
    assert f"a TLB needs {seen.tlb_entries} entries for it; {seen.tables} tables lead there" in text
    assert " ".join(seen.stretches[0].flags) in text


def test_command_says_what_is_wrong(raw: Raw, tmp_path: Path) -> None:
    pid, item = os.getpid(), raw.alloc(PAGE, pool=abi.Pool.BUDDY)
    assert "cannot be written" in tensormem("map", "--png", "/nowhere/a.png", code=1)
    assert "cannot be written" in tensormem("map", "--png", "/proc/a.png", code=1)
    assert "debugfs" in tensormem("map", code=1, TENSORMEM_DEBUGFS="/nowhere")
    assert "nowhere" in tensormem("map", f"{pid}:{item.handle}", code=1)  # not mapped
    assert f"no tensor {item.handle + 9}" in tensormem("map", f"{pid}:{item.handle + 9}", code=1)
    assert raw.free(item.handle) == 0
    assert f"no tensor {item.handle}" in tensormem("map", f"{pid}:{item.handle}", code=1)
    with Raw():
        assert "2 clients" in tensormem("map", f"{pid}:1", code=1)
    assert "no client" in tensormem("map", "1:1", code=1)
    thread = threading.Thread(target=(over := threading.Event()).wait)
    thread.start()
    assert f"{thread.native_id} is a thread" in tensormem("map", f"{thread.native_id}:1", code=1)
    over.set()
    thread.join()
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert "no process" in tensormem("map", f"{gone.pid}:1", code=1)
