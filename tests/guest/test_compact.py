# SPDX-License-Identifier: MIT
"""Compaction of the buddy pool: runs move under whoever uses them."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import struct
import time

import pytest

from device import CHUNK, PAGE, Raw, address_of, read, write
from process import hold
from tensormem import abi

PAGES = CHUNK // PAGE


def sparse(client: Raw, chunks: int, seed: int, keep: float = 0.25) -> list[abi.Alloc]:
    """Tensors all over so many chunks of the buddy pool, most of whose neighbours are gone."""
    rng = random.Random(seed)
    items: list[abi.Alloc] = []
    taken = 0
    while taken < chunks * PAGES * 9 // 10:
        pages = 1 << rng.randrange(0, 5)
        items.append(client.alloc(pages * PAGE, pool=abi.Pool.BUDDY))
        taken += pages
    rng.shuffle(items)
    kept = items[: int(len(items) * keep)]
    result, _ = client.free_batch([item.handle for item in items[len(kept) :]])
    assert result == 0
    return kept


def pattern(item: abi.Alloc, page: int) -> bytes:
    return struct.pack("<QQ", item.handle, page) * 4


def fill(window, items: list[abi.Alloc]) -> None:
    for item in items:
        for page in range(item.size // PAGE):
            at = item.offset + page * PAGE
            window[at : at + 64] = pattern(item, page)


def check(window, items: list[abi.Alloc]) -> None:
    for item in items:
        for page in range(item.size // PAGE):
            at = item.offset + page * PAGE
            assert window[at : at + 64] == pattern(item, page), (item.handle, page)


def compact() -> int:
    """Chunks that fell empty."""
    before = read("buddy/emptied")
    assert write("buddy/compact", 1) == 0
    return read("buddy/emptied") - before


def test_chunks_come_free_and_contents_stay(raw: Raw) -> None:
    kept = sparse(raw, 24, seed=1)
    window = raw.map_window()
    fill(window, kept)
    before, loose = read("buddy/chunks"), read("buddy/fragmentation")
    moved, used = read("buddy/moved_pages"), read("buddy/used_pages")
    emptied = compact()
    assert emptied >= before // 2
    assert read("buddy/chunks") == before - emptied
    assert read("buddy/chunks") <= -(-used // PAGES) + 2
    assert read("buddy/used_pages") == used
    assert read("buddy/moved_pages") > moved
    assert read("buddy/fragmentation") < loose
    check(window, kept)
    # the runs are the tensors' in every respect: writable, and freed as ever
    fill(window, kept)
    check(window, kept)
    for item in kept:
        assert raw.free(item.handle) == 0
    assert read("buddy/chunks") == 0
    window.close()


def test_nothing_to_do(raw: Raw) -> None:
    assert compact() == 0
    raw.alloc(CHUNK // 2, pool=abi.Pool.BUDDY)
    assert compact() == 0


def test_small_tensors_move_with_their_slab(raw: Raw) -> None:
    rng = random.Random(3)
    window = raw.map_window()
    small = [raw.alloc(96) for _ in range(40)]
    kept = sparse(raw, 6, seed=4, keep=0.1)
    for i, item in enumerate(small):
        window[item.offset : item.offset + 96] = bytes([i]) * 96
    fill(window, kept)
    assert compact() > 0
    check(window, kept)
    for i, item in enumerate(small):
        assert window[item.offset : item.offset + 96] == bytes([i]) * 96
    rng.shuffle(small)
    for item in small:
        assert raw.free(item.handle) == 0
    window.close()


def test_pinned_tensors_stay(raw: Raw) -> None:
    """Pinned ones are kept together, so they spoil one chunk and not many."""
    pinned = []
    for _ in range(16):
        result, item = raw.try_alloc(
            PAGE, pool=abi.Pool.BUDDY, flags=abi.AllocFlag.PINNED
        )
        assert result == 0
        pinned.append(item)
    window = raw.map_window()
    frames = [frame(window, item.offset) for item in pinned]
    kept = sparse(raw, 12, seed=5)
    fill(window, kept)
    assert compact() >= 4
    assert [frame(window, item.offset) for item in pinned] == frames
    check(window, kept)
    window.close()


def frame(window, offset: int) -> int:
    window[offset] = window[offset]
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        (entry,) = struct.unpack(
            "<Q", os.pread(pagemap.fileno(), 8, (address_of(window) + offset) // PAGE * 8)
        )
    assert entry >> 63, "not present"
    return entry & ((1 << 55) - 1)


def test_held_pages_stay_where_they_are(raw: Raw) -> None:
    kept = sparse(raw, 12, seed=6)
    window = raw.map_window()
    fill(window, kept)
    held = kept[0]
    reader, writer = hold(address_of(window) + held.offset, PAGE)
    before, given_up = frame(window, held.offset), read("buddy/given_up")
    assert compact() > 0
    assert frame(window, held.offset) == before
    assert read("buddy/given_up") > given_up
    check(window, kept)
    # and the holder sees what is written now
    window[held.offset : held.offset + 5] = b"after"
    assert os.read(reader, 5) == b"after"
    os.close(reader)
    os.close(writer)
    window.close()


def hammer(client: Raw, items: list[abi.Alloc], ready: int) -> None:
    """Count up in the last words of every page; each count has to be the one left there."""
    window = client.map_window()
    count = 0
    os.write(ready, b"r")
    while True:
        for item in items:
            for page in range(item.size // PAGE):
                at = item.offset + page * PAGE + PAGE - 8
                (now,) = struct.unpack_from("<Q", window, at)
                if now != count:
                    os._exit(1)
                struct.pack_into("<Q", window, at, count + 1)
        count += 1


@pytest.mark.parametrize("writers", [1, 4])
def test_concurrent_writers_lose_nothing(raw: Raw, writers: int) -> None:
    kept = sparse(raw, 16, seed=7)
    ready, tell = os.pipe()
    children = []
    for nr in range(writers):
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                hammer(raw, kept[nr::writers], tell)
            os._exit(2)
        children.append(pid)
    for _ in children:
        assert os.read(ready, 1) == b"r"
    rng = random.Random(8)
    emptied = 0
    for _ in range(6):
        # what comes and goes meanwhile leaves new holes
        loose = [raw.alloc(PAGE << rng.randrange(4), pool=abi.Pool.BUDDY) for _ in range(200)]
        rng.shuffle(loose)
        emptied += compact()
        result, _ = raw.free_batch([item.handle for item in loose])
        assert result == 0
        emptied += compact()
    assert emptied > 0
    for pid in children:
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "a writer lost what it wrote"
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    os.close(ready)
    os.close(tell)


def test_clients_come_and_go_meanwhile() -> None:
    """Two compact, others allocate, free, close and are killed."""
    rng = random.Random(9)
    end = time.monotonic() + 4
    children = []
    for seed in range(4):
        pid = os.fork()
        if pid == 0:
            child = random.Random(seed)
            with contextlib.suppress(BaseException):
                while True:
                    if seed < 2:
                        compact()
                        continue
                    with Raw() as client:
                        kept = sparse(client, 2, seed=child.randrange(1 << 30))
                        window = client.map_window()
                        fill(window, kept)
                        check(window, kept)
                        window.close()
            os._exit(3)
        children.append(pid)
    while time.monotonic() < end:
        time.sleep(rng.random() / 4)
        assert os.waitpid(-1, os.WNOHANG) == (0, 0), "a child failed"
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_chunk_that_is_not_to_be_had_is_made(raw: Raw, settings: None) -> None:
    """At capacity, an allocation of whole chunks compacts before it fails."""
    assert write("chunk/reserve", 0) == 0
    assert write("chunk/capacity", 12) == 0
    kept = sparse(raw, 12, seed=10)
    assert read("chunk/total") > 10
    window = raw.map_window()
    fill(window, kept)
    item = raw.alloc(4 * CHUNK, pool=abi.Pool.CHUNK)
    window[item.offset] = 1
    check(window, kept)
    assert raw.try_alloc(12 * CHUNK, pool=abi.Pool.CHUNK)[0] == errno.ENOSPC
    window.close()


def test_bad_values() -> None:
    for value in ("0", "2", "x", "-1"):
        assert write("buddy/compact", value) in (errno.EINVAL, errno.ERANGE), value
    pid = os.fork()
    if pid == 0:
        os.setuid(65534)
        os._exit(write("buddy/compact", 1) != errno.EACCES)
    assert os.waitpid(pid, 0)[1] == 0
