# SPDX-License-Identifier: MIT
"""TENSORMEM_NOZERO: a client's freed memory waits for its next tensor, for nobody else."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from conftest import USAGE, settled
from device import CHUNK, PAGE, Raw, address_of, events, read, round_up, wait_for, write
from process import dies, hold, killed_at_random, let_go, libc
from tensormem import abi

NOZERO, HUGE, PAGED = abi.AllocFlag.NOZERO, abi.AllocFlag.HUGE, abi.AllocFlag.PAGED
PINNED = abi.AllocFlag.PINNED
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
SECRET = b"\xde\xad\xbe\xef\x5e\xc2\xe7\x01"


def state(client: Raw) -> tuple[int, int, int]:
    """Tensors, bytes used and those of them that are kept."""
    info = client.info()
    return info.nr_tensors, info.used, info.kept


def fill(window: mmap.mmap, item: abi.Alloc) -> bytes:
    data = random.Random(item.handle).randbytes(item.size)
    window[item.offset : item.offset + item.size] = data
    return data


def contents(window: mmap.mmap, item: abi.Alloc) -> bytes:
    return window[item.offset : item.offset + item.size]


def park(client: Raw, window: mmap.mmap, size: int, **how: int) -> tuple[abi.Alloc, bytes]:
    """Allocate with NOZERO, fill and free."""
    flags = how.pop("flags", 0) | NOZERO
    item = client.alloc(size, flags=flags, **how)
    data = fill(window, item)
    assert client.free(item.handle) == 0
    return item, data


@pytest.mark.parametrize("size", [PAGE - 1, PAGE, 7 * PAGE + 3, 1 << 20, CHUNK, 3 * CHUNK + 5 * PAGE])
@pytest.mark.parametrize("flags", [0, HUGE, PAGED, PINNED])
def test_the_same_memory_comes_back(raw: Raw, trace: None, size: int, flags: int) -> None:
    """With its contents and its place, and without a new fault."""
    held = round_up(size, PAGE)
    window = raw.map_window()
    item = raw.alloc(size, flags=NOZERO | flags)
    assert contents(window, item) == bytes(size)  # nothing to reuse yet
    assert state(raw) == (1, held, 0)
    data = fill(window, item)
    assert raw.free(item.handle) == 0
    assert state(raw) == (0, held, held)
    assert read("clients/tensors") == 0
    assert read("clients/bytes") == read("clients/kept") == held
    before = len(events("fault"))
    again = raw.alloc(size, flags=NOZERO | flags)
    assert again.offset == item.offset
    assert again.handle != item.handle
    assert contents(window, again) == data
    window[again.offset] ^= 0xFF
    assert len(events("fault")) == before
    assert state(raw) == (1, held, 0)
    assert raw.query(again.handle)[1].alloc_flags == NOZERO | flags
    # the kernel tells of every life of it
    assert len(events("alloc")) == 2
    assert len(events("free")) == 1
    window.close()


def test_a_loop_costs_no_fault_and_no_memory(raw: Raw, trace: None) -> None:
    window = raw.map_window()
    grown, allocs = None, None
    for step in range(50):
        items = [raw.alloc(size, flags=NOZERO) for size in (PAGE, PAGE, 1 << 18, CHUNK)]
        assert len({item.offset for item in items}) == 4
        for item in items:
            window[item.offset : item.offset + 8] = b"contents"
            assert raw.free(item.handle) == 0
        if step == 0:
            grown, allocs, faults = read("chunk/grown"), read("buddy/allocs"), len(events("fault"))
    assert (read("chunk/grown"), read("buddy/allocs")) == (grown, allocs)
    assert len(events("fault")) == faults
    window.close()


def test_the_handle_is_gone(raw: Raw) -> None:
    window = raw.map_window()
    item, _ = park(raw, window, 4 * PAGE)
    assert raw.free(item.handle) == errno.ENOENT
    assert raw.query(item.handle)[0] == errno.ENOENT
    assert raw.free_batch([item.handle])[0] == errno.ENOENT
    # its mapping may stay; a touch ends in no third way
    assert dies(lambda: window[item.offset]) in (0, signal.SIGBUS)
    assert state(raw) == (0, 4 * PAGE, 4 * PAGE)
    window.close()


DIFFERENT = [
    {"kind": abi.Kind.KV},
    {"size": 3 * PAGE},
    {"size": 5 * PAGE},
    {"pool": abi.Pool.BUDDY},
    {"flags": NOZERO | PAGED},
    {"flags": NOZERO | HUGE},
    {"flags": NOZERO | PINNED},
    {"flags": 0},
    {"numa": abi.Numa.INTERLEAVE},
    {"numa": abi.Numa.BIND, "nodes": 1},
]


@pytest.mark.parametrize("other", DIFFERENT, ids=str)
def test_what_differs_does_not_match(raw: Raw, other: dict) -> None:
    window = raw.map_window()
    first, data = park(raw, window, 4 * PAGE)
    how = {"size": 4 * PAGE, "kind": abi.Kind.ACTIVATIONS, "flags": NOZERO, **other}
    item = raw.alloc(**how)
    assert item.offset != first.offset
    assert contents(window, item) == bytes(item.size)
    assert state(raw) == (1, item.size + 4 * PAGE, 4 * PAGE)
    assert raw.free(item.handle) == 0
    # and the one that was kept is still there for its like
    again = raw.alloc(4 * PAGE, flags=NOZERO)
    assert (again.offset, contents(window, again)) == (first.offset, data)
    window.close()


def test_sizes_of_as_many_pages_match(raw: Raw) -> None:
    window = raw.map_window()
    first, data = park(raw, window, 3 * PAGE + 1)
    again = raw.alloc(4 * PAGE, flags=NOZERO)
    assert again.offset == first.offset
    assert raw.query(again.handle)[1].size == 4 * PAGE
    assert contents(window, again)[: len(data)] == data
    assert contents(window, again)[len(data) :] == bytes(PAGE - 1)
    window.close()


def test_the_nodes_of_the_client_are_part_of_the_match(raw: Raw) -> None:
    window = raw.map_window()
    first, data = park(raw, window, PAGE)
    assert raw.set_numa(abi.Numa.BIND, 1) == 0
    assert contents(window, raw.alloc(PAGE, flags=NOZERO)) == bytes(PAGE)
    assert raw.set_numa(abi.Numa.DEFAULT) == 0
    again = raw.alloc(PAGE, flags=NOZERO)
    assert (again.offset, contents(window, again)) == (first.offset, data)
    window.close()


def search(client: Raw, settings_capacity: int) -> int:
    """Take all there is in every way, and count what is not zero."""
    window = client.map_window()
    bad = 0
    for size in (CHUNK, CHUNK // 2, PAGE):
        for flags in (0, NOZERO):
            items = []
            while True:
                result, item = client.try_alloc(size, flags=flags)
                if result:
                    assert result == errno.ENOSPC
                    break
                items.append(item)
                bad += contents(window, item) != bytes(size)
            assert len(items) * size == settings_capacity * CHUNK
            assert client.free_batch([item.handle for item in items])[0] == 0
    window.close()
    return bad


@pytest.mark.parametrize("end", ["parked", "closed", "killed"])
def test_no_other_client_sees_it(raw: Raw, settings: None, end: str) -> None:
    capacity = 4
    assert write("chunk/reserve", 0) == 0
    assert write("chunk/capacity", capacity) == 0
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        victim = Raw()
        window = victim.map_window()
        items = [victim.alloc(size, flags=NOZERO) for size in (CHUNK, 2 * CHUNK, PAGE, 1 << 19)]
        for item in items:
            window[item.offset : item.offset + item.size] = SECRET * (item.size // 8)
        for item in items:
            victim.free(item.handle)
        assert victim.info().kept == sum(item.size for item in items)
        if end == "closed":
            window.close()
            victim.close()
        os.write(tell, b"x")
        signal.pause()
    assert os.read(ready, 1) == b"x"
    if end == "killed":
        # all of it, before anything else is asked for: what is on its way back is nobody's
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        wait_for(lambda: read("clients/count") == 1)
    assert search(raw, capacity) == 0
    if end != "killed":
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    let_go((ready, tell))


def test_given_up_for_the_quota(raw: Raw) -> None:
    window = raw.map_window()
    assert raw.set_quota(CHUNK) == 0
    for size in (PAGE, 1 << 20, 1 << 19):
        park(raw, window, size)
    kept = PAGE + (1 << 20) + (1 << 19)
    assert state(raw) == (0, kept, kept)
    # as long as there is room nothing is given up
    small = raw.alloc(PAGE)
    assert state(raw) == (1, kept + PAGE, kept)
    item = raw.alloc(CHUNK - PAGE)
    assert contents(window, item) == bytes(CHUNK - PAGE)
    assert state(raw) == (2, CHUNK, 0)
    assert raw.try_alloc(1, flags=NOZERO)[0] == errno.EDQUOT
    assert raw.free_batch([small.handle, item.handle])[0] == 0
    item = raw.alloc(1 << 20, flags=NOZERO)
    assert contents(window, item) == bytes(1 << 20)
    window.close()


def test_a_lower_quota_is_refused_or_gives_up(raw: Raw) -> None:
    """What is kept counts as used: EBUSY below it, and a quota that holds what it says."""
    window = raw.map_window()
    park(raw, window, 4 * PAGE)
    assert raw.set_quota(4 * PAGE) == 0
    assert raw.set_quota(4 * PAGE - 1) in (0, errno.EBUSY)
    info = raw.info()
    assert info.used <= info.quota
    window.close()


@pytest.mark.parametrize("owner", ["own", "other"])
@pytest.mark.parametrize("flags", [HUGE, PAGED])
def test_given_up_for_the_capacity(raw: Raw, settings: None, owner: str, flags: int) -> None:
    assert write("chunk/reserve", 0) == 0
    assert write("chunk/capacity", 4) == 0
    with Raw() as other:
        keeper = raw if owner == "own" else other
        window = keeper.map_window()
        items = [keeper.alloc(CHUNK, flags=NOZERO | flags) for _ in range(3)]
        for item in items:
            fill(window, item)
        assert keeper.free_batch([item.handle for item in items])[0] == 0
        # one is left free, and is taken first
        first = raw.alloc(CHUNK, flags=flags)
        assert keeper.info().kept == 3 * CHUNK
        # of the kept ones as many as it takes
        second = raw.alloc(CHUNK, flags=flags)
        assert keeper.info().kept == 2 * CHUNK
        if owner == "other":  # the oldest; one's own place may have been taken again
            assert dies(lambda: window[items[0].offset]) == signal.SIGBUS
            assert dies(lambda: window[items[1].offset]) == 0
        third = raw.alloc(2 * CHUNK, flags=flags)
        assert keeper.info().kept == 0
        mine = raw.map_window()
        for item in (first, second, third):
            assert contents(mine, item) == bytes(item.size)
        assert raw.try_alloc(1)[0] == errno.ENOSPC
        assert raw.free(third.handle) == 0
        again = keeper.alloc(CHUNK, flags=NOZERO | flags)
        assert contents(window, again) == bytes(CHUNK)
        mine.close()
        window.close()


def test_scattered_pages_are_given_up_for_a_chunk(raw: Raw, settings: None) -> None:
    """The oldest of what is kept need not be neighbours: it goes on until a chunk is free."""
    assert write("chunk/reserve", 0) == 0
    assert write("chunk/capacity", 4) == 0
    pages = 4 * CHUNK // PAGE
    with Raw() as other:
        handles: list[int] = []
        while len(handles) < pages:
            count = min(1024, pages - len(handles))
            result, _, items = other.alloc_batch([PAGE] * count, flags=NOZERO)
            assert result == 0
            handles += [item.handle for item in items]
        random.Random(3).shuffle(handles)
        for at in range(0, pages, 1024):
            assert other.free_batch(handles[at : at + 1024])[0] == 0
        assert other.info().kept == 4 * CHUNK
        item = raw.alloc(CHUNK, pool=abi.Pool.CHUNK)
        assert other.info().used + raw.info().used <= 4 * CHUNK
        assert raw.free(item.handle) == 0


def test_not_given_up_for_nothing(raw: Raw, settings: None) -> None:
    """What can never be had costs nobody what is kept."""
    assert write("chunk/capacity", 8) == 0
    with Raw() as other:
        window = other.map_window()
        for size in (PAGE, CHUNK):
            park(other, window, size)
        for pool in (abi.Pool.AUTO, abi.Pool.BUDDY, abi.Pool.CHUNK):
            assert raw.try_alloc(9 * CHUNK, pool=pool)[0] == errno.ENOSPC
        kept = other.info().kept
        window.close()
    assert kept == CHUNK + PAGE


def test_given_up_while_its_client_is_busy(raw: Raw, settings: None) -> None:
    """Faults of the client that keeps it, at the same time, make nobody's allocation fail."""
    assert write("chunk/reserve", 0) == 0
    assert write("chunk/capacity", 4) == 0
    with Raw() as other:
        window = other.map_window()
        live = other.alloc(CHUNK // 2)
        address = address_of(window) + live.offset
        pids = []
        for _ in range(2):
            pid = os.fork()
            if pid == 0:
                while True:
                    ctypes.memset(address, 1, CHUNK // 2)
                    libc.madvise(address, CHUNK // 2, mmap.MADV_DONTNEED)
            pids.append(pid)
        codes = []
        for _ in range(150):
            items = [other.alloc(CHUNK, flags=NOZERO | PAGED) for _ in range(3)]
            assert other.free_batch([item.handle for item in items])[0] == 0
            code, item = raw.try_alloc(3 * CHUNK, flags=PAGED)
            codes.append(code)
            if code == 0:
                assert raw.free(item.handle) == 0
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        window.close()
    assert codes == [0] * 150, f"{codes.count(errno.ENOSPC)} of 150 found no space"


def test_given_up_for_the_system(raw: Raw, settings: None) -> None:
    """The shrinker takes what is kept, and nothing that is in use."""
    window = raw.map_window()
    live = raw.alloc(1 << 20, flags=NOZERO)
    data = fill(window, live)
    kept = sum(park(raw, window, size)[0].size for size in (PAGE, 1 << 18, CHUNK, 2 * CHUNK))
    assert raw.info().kept == kept
    for _ in range(20):
        DROP_CACHES.write_text("2")
        if raw.info().kept == 0:
            break
    assert state(raw) == (1, 1 << 20, 0)
    assert contents(window, live) == data
    item = raw.alloc(CHUNK, flags=NOZERO)
    assert contents(window, item) == bytes(CHUNK)
    window.close()


def test_shrunk_while_in_use(raw: Raw) -> None:
    """Memory that the shrinker races for is either the old one or zero, never a mixture."""
    window = raw.map_window()
    pid = os.fork()
    if pid == 0:
        while True:
            DROP_CACHES.write_text("2")
    seen = {0: 0, 7: 0}
    end = time.monotonic() + 60
    while min(seen.values()) < 20 and time.monotonic() < end:
        item = raw.alloc(16 * PAGE, flags=NOZERO)
        found = set(contents(window, item))
        assert found in ({0}, {7}), found
        seen[found.pop()] += 1
        window[item.offset : item.offset + item.size] = b"\7" * item.size
        assert raw.free(item.handle) == 0
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert seen[0], "nothing was ever taken"
    window.close()


def test_a_batch_takes_all_or_none(raw: Raw) -> None:
    window = raw.map_window()
    items = [raw.alloc(4 * PAGE, flags=NOZERO) for _ in range(3)]
    data = {item.offset: fill(window, item) for item in items}
    assert raw.free_batch([item.handle for item in items])[0] == 0
    kept = 3 * 4 * PAGE
    for bad, expected in (({"kind": 9}, errno.EINVAL), ({"size": 1 << 40}, errno.EINVAL),
                          ({"size": 1 << 29, "flags": 0}, errno.EDQUOT)):  # fmt: skip
        assert raw.set_quota(1 << 28) == 0
        good = {"size": 4 * PAGE, "kind": abi.Kind.ACTIVATIONS, "flags": NOZERO}
        requests = (abi.Alloc * 4)(*(abi.Alloc(**good) for _ in range(3)), abi.Alloc(**good | bad))
        result, batch = raw.batch(abi.IOC_ALLOC_BATCH, requests)
        assert (result, batch.failed) == (expected, 3)
        assert state(raw) == (0, kept, kept)
    result, batch, again = raw.alloc_batch([4 * PAGE] * 4, abi.Kind.ACTIVATIONS, flags=NOZERO)
    assert (result, batch.failed) == (0, 4)
    assert {i.offset for i in again} > data.keys()
    for item in again:
        assert contents(window, item) == data.get(item.offset, bytes(4 * PAGE))
    # a free that fails keeps nothing
    handles = [item.handle for item in again]
    assert raw.free_batch([*handles, 1 << 30])[0] == errno.ENOENT
    assert raw.free_batch([*handles, handles[0]])[0] == errno.ENOENT
    assert state(raw) == (4, 16 * PAGE, 0)
    assert raw.free_batch(handles)[0] == 0
    assert state(raw) == (0, 16 * PAGE, 16 * PAGE)
    window.close()


def test_a_batch_whose_results_cannot_be_told(raw: Raw) -> None:
    """EFAULT after all was allocated: what was reused is kept again or given up, none is left."""
    window = raw.map_window()
    park(raw, window, 4 * PAGE)
    page = mmap.mmap(-1, PAGE)
    size = ctypes.sizeof(abi.Alloc)
    page[:size] = bytes(abi.Alloc(size=4 * PAGE, kind=abi.Kind.ACTIVATIONS, flags=NOZERO))
    address = address_of(page)
    assert libc.mprotect(address, PAGE, mmap.PROT_READ) == 0
    batch = abi.Batch(items=address, count=1, item_size=size)
    assert raw.ioctl(abi.IOC_ALLOC_BATCH, batch) == errno.EFAULT
    info = raw.info()
    assert info.nr_tensors == 0
    assert info.used == info.kept <= 4 * PAGE
    window.close()


def test_close_while_kept() -> None:
    client = Raw()
    window = client.map_window()
    for size in (PAGE, CHUNK, 3 * CHUNK + PAGE):
        park(client, window, size)
    assert read("clients/kept") == 4 * CHUNK + 2 * PAGE
    window.close()
    client.close()
    assert settled(dict.fromkeys(USAGE, 0)) == dict.fromkeys(USAGE, 0)


def test_close_while_it_is_given_up() -> None:
    """The shrinker takes from clients that close at the same moment."""
    pid = os.fork()
    if pid == 0:
        while True:
            DROP_CACHES.write_text("2")
    dice = random.Random(23)
    end = time.monotonic() + 5
    while time.monotonic() < end:
        with Raw() as client:
            sizes = [dice.choice((PAGE, 3 * PAGE, PAGE // 4)) for _ in range(60)]
            items = client.alloc_batch(sizes, abi.Kind.WEIGHTS, flags=NOZERO)[2]
            assert client.free_batch([item.handle for item in items[::2]])[0] == 0
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert settled(dict.fromkeys(USAGE, 0)) == dict.fromkeys(USAGE, 0)


@pytest.mark.parametrize("size", [2 * PAGE, CHUNK])
def test_kept_while_somebody_holds_pages_of_it(raw: Raw, size: int) -> None:
    """It may be reused by its client; given up it goes into quarantine."""
    window = raw.map_window()
    item, data = park(raw, window, size)
    address = address_of(window) + item.offset
    pipe = hold(address, PAGE)
    again = raw.alloc(size, flags=NOZERO)
    assert (again.offset, contents(window, again)) == (item.offset, data)
    assert raw.free(again.handle) == 0
    assert raw.set_quota(size) == 0
    # the quota is used up by what is held now
    assert raw.try_alloc(PAGE)[0] == errno.EDQUOT
    assert read("chunk/quarantined") == size // PAGE
    assert state(raw) == (0, size, size)
    assert raw.try_alloc(size, flags=NOZERO)[0] == errno.EDQUOT
    assert os.read(pipe[0], PAGE) == data[:PAGE]
    let_go(pipe)
    wait_for(lambda: read("chunk/quarantined") == 0)
    item = raw.alloc(size, flags=NOZERO)
    assert contents(window, item) == bytes(size)
    window.close()


def test_threads_share_what_is_kept(raw: Raw) -> None:
    """Nobody's live tensor is handed to another: every thread finds its own stamp until it frees."""
    window = raw.map_window()
    failures: list[object] = []
    reused = [0] * 3

    def work(number: int) -> None:
        dice = random.Random(number)
        for step in range(250):
            size = dice.choice((PAGE, 4 * PAGE, 1 << 17))
            items = [raw.alloc(size, flags=NOZERO) for _ in range(dice.randrange(1, 4))]
            stamp = (number << 16 | step).to_bytes(8, "little")
            for item in items:
                reused[number] += window[item.offset : item.offset + 8] != bytes(8)
                for at in (0, size - 8):
                    window[item.offset + at : item.offset + at + 8] = stamp
            for item in items:
                for at in (0, size - 8):
                    found = window[item.offset + at : item.offset + at + 8]
                    if found != stamp:
                        failures.append((stamp, found))
                if raw.free(item.handle):
                    failures.append("free")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert all(reused)
    nr_tensors, used, kept = state(raw)
    assert (nr_tensors, used) == (0, kept)
    assert kept <= 3 * 3 * ((1 << 17) + 5 * PAGE)
    window.close()


def churn(seed: int) -> None:
    dice = random.Random(seed)
    client = Raw()
    window = client.map_window()
    while True:
        sizes = [dice.choice((1, PAGE * 3, 1 << 17, CHUNK)) for _ in range(dice.randrange(1, 9))]
        result, _, items = client.alloc_batch(sizes, flags=dice.choice((NOZERO, NOZERO | HUGE)))
        assert result == 0
        for item in items:
            window[item.offset] = 1
        assert client.free_batch([item.handle for item in items])[0] == 0
        if dice.random() < 0.1:
            DROP_CACHES.write_text("2")


def test_sigkill_at_random_moments() -> None:
    dice = random.Random(13)
    for _ in range(12):
        killed_at_random(churn, dice, 0.05, 0.5)
        assert settled(dict.fromkeys(USAGE, 0)) == dict.fromkeys(USAGE, 0)


def test_a_lower_quota_costs_what_is_kept(raw: Raw) -> None:
    result, item = raw.try_alloc(CHUNK, flags=abi.AllocFlag.NOZERO)
    assert result == 0
    assert raw.free(item.handle) == 0
    assert raw.info().used == raw.info().kept == CHUNK
    assert raw.set_quota(PAGE) == 0
    assert raw.info().used == raw.info().kept == 0
