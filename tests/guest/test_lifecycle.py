# SPDX-License-Identifier: MIT
"""Clients come and go: close, fork, descriptors on the move, SIGKILL at any moment, threads."""

from __future__ import annotations

import array
import errno
import mmap
import os
import random
import signal
import socket
import subprocess
import threading
import time
import zlib

import pytest

from conftest import USAGE, settled
from device import CHUNK, PAGE, Raw, read, write
from process import killed_at_random
from tensormem import abi


def test_close_frees_everything() -> None:
    clients = [Raw() for _ in range(8)]
    for i, client in enumerate(clients):
        for _ in range(i):
            client.alloc(CHUNK + PAGE)
    assert read("clients/count") == 8
    assert read("clients/tensors") == sum(range(8))
    assert read("clients/bytes") == sum(range(8)) * (CHUNK + PAGE)
    for client in clients:
        client.close()
    assert read("clients/count") == 0
    assert read("clients/bytes") == 0


def test_the_last_descriptor_counts() -> None:
    client = Raw()
    item = client.alloc(PAGE)
    copy = os.dup(client.fd)
    pid = os.fork()
    if pid == 0:
        signal.pause()
        os._exit(0)
    client.close()
    os.close(copy)
    assert read("clients/bytes") == PAGE, item.handle
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert settled(dict.fromkeys(USAGE, 0))["clients/bytes"] == 0


def test_a_descriptor_sent_over_a_socket_is_the_same_client(raw: Raw) -> None:
    item = raw.alloc(2 * PAGE)
    mapping = raw.map_tensor(item)
    mapping[PAGE] = 42
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    pid = os.fork()
    if pid == 0:
        _, ancillary, _, _ = theirs.recvmsg(1, socket.CMSG_SPACE(4))
        other = Raw.__new__(Raw)
        other.fd = array.array("i", ancillary[0][2])[0]
        view = other.map_tensor(item)
        good = view[PAGE] == 42 and other.query(item.handle)[1].size == 2 * PAGE
        view[0] = 43
        os._exit(0 if good and other.free(item.handle) == 0 else 1)
    ours.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [raw.fd]))])
    assert os.waitpid(pid, 0)[1] == 0
    assert raw.query(item.handle)[0] == errno.ENOENT
    mapping.close()


def churn(seed: int) -> None:
    """Allocate, touch, check and free in batches until killed."""
    dice = random.Random(seed)
    client = Raw()
    window = client.map_window()
    live: list[abi.Alloc] = []
    while True:
        sizes = [dice.choice((1, PAGE * 3, 1 << 17, CHUNK)) for _ in range(dice.randrange(1, 20))]
        result, _, items = client.alloc_batch(sizes)
        if result == 0:
            for item in items:
                window[item.offset] = 1
            live += items
        while len(live) > 60 or (live and result):
            victims = [live.pop(dice.randrange(len(live))) for _ in range(min(len(live), 25))]
            assert client.free_batch([v.handle for v in victims])[0] == 0
            result = 0


def test_sigkill_at_random_moments() -> None:
    """Children die in the middle of batches, faults and frees; nothing of them stays."""
    dice = random.Random(7)
    for _ in range(25):
        killed_at_random(churn, dice, 0.01, 0.4)
        assert settled(dict.fromkeys(USAGE, 0)) == dict.fromkeys(USAGE, 0)


def test_sigkill_ends_a_long_allocation(raw: Raw) -> None:
    """A batch of most of the pool stops between two chunks, not at its end."""
    capacity = read("chunk/capacity")
    pid = os.fork()
    if pid == 0:
        while True:
            items = raw.alloc_batch([CHUNK] * (capacity // 2))[2]
            raw.free_batch([i.handle for i in items])
    time.sleep(0.3)
    os.kill(pid, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    handles = [h for h in range(1, 20 * capacity) if raw.query(h)[0] == 0]
    assert len(handles) in (0, capacity // 2)  # all or none of a batch
    if handles:
        assert raw.free_batch(handles)[0] == 0


def test_threads_of_one_client(raw: Raw) -> None:
    """Four threads allocate, write, verify and free in one window."""
    window = raw.map_window()
    failures: list[str] = []

    def work(number: int) -> None:
        dice = random.Random(number)
        mine: list[tuple[abi.Alloc, bytes, int]] = []
        for _ in range(120):
            item = raw.alloc(dice.choice((1, PAGE, 9 * PAGE, 1 << 18)))
            data = dice.randbytes(min(item.size, 4096))
            if window[item.offset : item.offset + len(data)] != bytes(len(data)):
                failures.append("not zero")
            window[item.offset : item.offset + len(data)] = data
            mine.append((item, data, zlib.crc32(data)))
            if len(mine) > 10:
                item, data, crc = mine.pop(dice.randrange(len(mine)))
                if zlib.crc32(window[item.offset : item.offset + len(data)]) != crc:
                    failures.append("changed")
                if raw.free(item.handle):
                    failures.append("free failed")
        for item, _, _ in mine:
            raw.free(item.handle)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert raw.info().nr_tensors == 0
    window.close()


def test_processes_race_for_the_same_handles(raw: Raw) -> None:
    """Of several who free one handle exactly one succeeds."""
    results = mmap.mmap(-1, 4096)
    for _ in range(10):
        handles = [raw.alloc(PAGE).handle for _ in range(50)]
        children = []
        for slot in range(3):
            pid = os.fork()
            if pid == 0:
                won = sum(raw.free(h) == 0 for h in handles)
                results[slot] = won
                os._exit(0)
            children.append(pid)
        for pid in children:
            os.waitpid(pid, 0)
        assert sum(results[:3]) == 50
    assert raw.info().used == 0
    results.close()


def test_faults_race_with_frees(raw: Raw) -> None:
    """Readers touch what a writer frees: they see zeros, its data, or EFAULT."""
    window = raw.map_window()
    results = mmap.mmap(-1, 4096)
    span = 64 * PAGE
    base = raw.alloc(PAGE).offset + span  # where the next one of this size goes
    children = []
    for slot in (1, 2):
        pid = os.fork()
        if pid == 0:
            # the kernel does the touching: its faults end as errors, not as signals
            copy = os.memfd_create("copy")
            view = memoryview(window)[base : base + span]
            good = bad = 0
            while not results[0]:
                try:
                    count = os.pwrite(copy, view, 0)
                except OSError as error:
                    bad += error.errno != errno.EFAULT
                    continue
                seen = set(os.pread(copy, count, 0)[::PAGE])
                bad += not seen <= {0, 7}
                good += 1
            results[slot] = min(good, 250)
            os._exit(bad != 0)
        children.append(pid)
    for _ in range(300):
        item = raw.alloc(span)
        assert item.offset == base
        for at in range(0, span, PAGE):
            window[item.offset + at] = 7
        assert raw.free(item.handle) == 0
    results[0] = 1
    for pid in children:
        assert os.waitpid(pid, 0)[1] == 0
    assert results[1] and results[2], "the readers never got through"
    results.close()
    window.close()


def test_runs_race_for_the_last_chunk(settings: None) -> None:
    """Threads that grow the buddy pool at the same time leave no empty chunk in it."""
    assert write("chunk/reserve", 0) == 0
    children = []
    for seed in range(4):
        pid = os.fork()
        if pid == 0:
            dice = random.Random(seed)
            with Raw() as client:
                for _ in range(300):
                    items = [client.alloc(PAGE << dice.randrange(9)) for _ in range(4)]
                    for item in items:
                        client.free(item.handle)
            os._exit(0)
        children.append(pid)
    for pid in children:
        assert os.waitpid(pid, 0)[1] == 0
    assert settled(dict.fromkeys(USAGE, 0)) == dict.fromkeys(USAGE, 0)
    assert read("buddy/chunks") == 0


def test_the_module_stays_while_it_is_used(raw: Raw) -> None:
    result = subprocess.run(["rmmod", "tensormem"], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "in use" in result.stderr
    item = raw.alloc(PAGE)
    mapping = raw.map_tensor(item)
    raw.close()
    result = subprocess.run(["rmmod", "tensormem"], capture_output=True, text=True, check=False)
    assert result.returncode != 0, "a mapping holds the module"
    mapping.close()


@pytest.mark.parametrize("other", ["kv", "weights"])
def test_no_byte_of_another_client(raw: Raw, other: str) -> None:
    """Fill memory as one client, take all of it as another, and look."""
    secret = b"\xde\xad\xbe\xef" * 256
    sizes = [PAGE, 5 * PAGE, 1 << 18, CHUNK, CHUNK + 3 * PAGE] * 4
    with Raw() as victim:
        window = victim.map_window()
        for size in sizes:
            item = victim.alloc(size)
            for at in range(0, size, len(secret)):
                window[item.offset + at : item.offset + at + len(secret)] = secret
        window.close()
    window = raw.map_window()
    for size in sizes:
        item = raw.alloc(size, kind=abi.Kind[other.upper()])
        assert window[item.offset : item.offset + size] == bytes(size)
    window.close()
