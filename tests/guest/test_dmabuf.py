# SPDX-License-Identifier: MIT
"""Tensors as dma-bufs: the same memory, for as long as anybody has it, whoever has ended by then."""

from __future__ import annotations

import array
import ctypes
import errno
import mmap
import os
import random
import resource
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

import tensormem
from conftest import USAGE, settled
from device import CHUNK, KASAN, PAGE, DmaBuf, Raw, address_of, becomes, read, write
from process import FAILED, dies, hold, killed_at_random, let_go, libc, mremap_to, status_of, together
from tensormem import abi

READ, WRITE, EXEC = mmap.PROT_READ, mmap.PROT_WRITE, mmap.PROT_EXEC
READ_ONLY = abi.ExportFlag.READ_ONLY
BUDDY = abi.Pool.BUDDY
MAP_FIXED = 0x10
BOTH = DmaBuf.READ | DmaBuf.WRITE


def counts() -> tuple[int, int, int]:
    return read("dma/buffers"), read("dma/bytes"), read("dma/attachments")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def send(sock: socket.socket, fd: int) -> None:
    sock.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])


def receive(sock: socket.socket) -> int:
    _, ancillary, _, _ = sock.recvmsg(1, socket.CMSG_SPACE(4))
    return array.array("i", ancillary[0][2])[0]


# What it is


@pytest.mark.parametrize("size", [1, PAGE, 3 * PAGE + 1, CHUNK, 3 * CHUNK + 5 * PAGE])
def test_it_is_the_same_memory(raw: Raw, size: int) -> None:
    item = raw.alloc(size, pool=0 if size >= PAGE else BUDDY)
    with raw.export(item.handle) as shared:
        assert shared.size == -(-size // PAGE) * PAGE == os.lseek(shared.fd, 0, os.SEEK_END)
        assert counts() == (1, shared.size, 0)
        window, view = raw.map_tensor(item), shared.view()
        for at in {0, size // 2, size - 1}:
            window[at] = 0x5A
            assert view[at] == 0x5A
            view[at] = 0xA5
            assert window[at] == 0xA5
        assert shared.sync(BOTH) == shared.sync(BOTH | DmaBuf.END) == 0
        window.close()
        view.close()
    assert counts() == (0, 0, 0)
    assert raw.free(item.handle) == 0


def test_of_a_chunk_in_part_only_the_part_is_shown(raw: Raw) -> None:
    item = raw.alloc(CHUNK + 1, pool=abi.Pool.CHUNK)
    with raw.export(item.handle) as shared:
        assert shared.size == CHUNK + PAGE
        # all of both chunks is kept from others
        assert read("dma/bytes") == 2 * CHUNK
        assert shared.map_errno(PAGE, CHUNK + PAGE) == errno.EINVAL
    assert raw.free(item.handle) == 0


def test_a_program_in_c() -> None:
    """mmap and DMA_BUF_IOCTL_SYNC in two processes; the exporter dies before the other looks."""
    chunks = 3
    program = Path(__file__).parent / "dmabuf_sync"
    result = subprocess.run([program, f"{chunks}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            check=False)  # fmt: skip
    assert result.returncode == 0, result.stdout
    compared = dict(line.split() for line in result.stdout.splitlines())
    assert compared == dict.fromkeys(("window", "importer", "mapping"), f"{chunks * CHUNK}")


def test_the_library(raw: Raw) -> None:
    """An array from a descriptor that came from elsewhere, longer than all else."""
    client = tensormem.open()
    tensor = client.alloc(2 * CHUNK, kind="weights")
    tensor.array((CHUNK // 2,), np.float32)[:] = 3
    shared = tensor.export()
    reader = tensor.export(read_only=True)
    tensor.free()
    client.close()
    with tensormem.DmaBuf.of(os.dup(shared.fileno())) as other:
        assert (other.size, other.read_only) == (2 * CHUNK, False)
        values = other.array((CHUNK // 2,), np.float32)
    shared.close()
    looks = reader.array((2, CHUNK // 4))
    with reader.sync(write=False):
        assert (looks == 3).all()
    reader.close()
    values[-1] = 4
    assert looks[1, -1] == 4
    with pytest.raises(ValueError, match="read-only"):
        looks[0, 0] = 1
    with pytest.raises(tensormem.Closed):
        reader.array(1)
    del looks, values
    becomes("chunk/quarantined", 0)
    with pytest.raises(tensormem.InvalidArgument, match="not a dma-buf"):
        tensormem.DmaBuf.of(raw.fd)
    with tensormem.open() as client, pytest.raises(tensormem.NotExportable, match="pool='buddy'"):
        client.alloc(64).export()


# Mappings


def test_mappings_follow_the_rules(raw: Raw) -> None:
    item = raw.alloc(4 * PAGE)
    with raw.export(item.handle) as shared:
        for length, offset, how, expected in (
            (PAGE, 0, {"flags": mmap.MAP_PRIVATE}, errno.EINVAL),
            (PAGE, 0, {"prot": READ | EXEC}, errno.EPERM),
            (5 * PAGE, 0, {}, errno.EINVAL),
            (PAGE, 4 * PAGE, {}, errno.EINVAL),
            (2 * PAGE, 3 * PAGE, {}, errno.EINVAL),
            (PAGE, 3 * PAGE, {}, 0),
        ):
            assert shared.map_errno(length, offset, **how) == expected, (length, offset, how)
        at = libc.mmap(None, 4 * PAGE, READ | WRITE, mmap.MAP_SHARED, shared.fd, 0)
        assert at != FAILED
        assert libc.mprotect(at, PAGE, READ | EXEC) == -1
        assert ctypes.get_errno() == errno.EACCES
        assert libc.mremap(at, 4 * PAGE, 8 * PAGE, 1) == FAILED
        assert mremap_to(at, PAGE, PAGE, 3, at + (1 << 30)) == FAILED
        assert libc.munmap(at, 4 * PAGE) == 0
        part = shared.map(2 * PAGE, PAGE)
        window = raw.map_tensor(item)
        part[PAGE] = 7
        assert window[2 * PAGE] == 7
        assert libc.madvise(address_of(part), 2 * PAGE, mmap.MADV_DONTNEED) == 0
        assert part[PAGE] == 7
        window.close()
        part.close()
    assert raw.free(item.handle) == 0


def test_who_may_only_read(raw: Raw) -> None:
    item = raw.alloc(2 * CHUNK)
    with raw.export(item.handle, READ_ONLY) as shared:
        assert shared.map_errno(PAGE, 0) == errno.EACCES
        at = libc.mmap(None, PAGE, READ, mmap.MAP_SHARED, shared.fd, 0)
        assert libc.mprotect(at, PAGE, READ | WRITE) == -1
        assert ctypes.get_errno() == errno.EACCES
        assert dies(lambda: ctypes.memset(at, 1, 1)) == signal.SIGSEGV
        assert libc.munmap(at, PAGE) == 0
        # nor by another way to the same file
        with pytest.raises(OSError, match="No such device"):
            os.open(f"/proc/self/fd/{shared.fd}", os.O_RDWR)
        view, window = shared.view(READ), raw.map_tensor(item)
        window[CHUNK] = 9
        assert view[CHUNK] == 9
        window.close()
        view.close()
    assert raw.free(item.handle) == 0


@pytest.mark.parametrize("kind", [abi.Kind.WEIGHTS, abi.Kind.KV])
def test_at_an_address_for_blocks(raw: Raw, kind: int) -> None:
    """Chunks at a multiple of their size: what is mapped, forked, cut and dropped is the same memory."""
    size = 2 * CHUNK
    item = raw.alloc(size, kind=kind)
    with raw.export(item.handle) as shared:
        room = mmap.mmap(-1, size + CHUNK)
        at = -(-address_of(room) // CHUNK) * CHUNK
        assert libc.mmap(at, size, READ | WRITE, mmap.MAP_SHARED | MAP_FIXED, shared.fd, 0) == at
        window = raw.map_tensor(item)
        seen = (ctypes.c_ubyte * size).from_address(at)
        seen[CHUNK + 5] = 1
        assert window[CHUNK + 5] == 1

        def child() -> None:
            assert seen[CHUNK + 5] == 1
            seen[5] = 2
            assert libc.munmap(at + CHUNK // 2, CHUNK) == 0
            assert seen[5] == 2

        assert status_of(child) == 0
        assert window[5] == 2
        assert libc.madvise(at, size, mmap.MADV_DONTNEED) == 0
        assert (seen[5], seen[CHUNK + 5]) == (2, 1)
        assert raw.free(item.handle) == 0
        assert (seen[5], seen[CHUNK + 5]) == (2, 1)
        assert libc.munmap(at, size) == 0
        window.close()
        del room
    becomes("chunk/quarantined", 0)


# Who holds it


@pytest.mark.parametrize("flags", [0, abi.AllocFlag.NOZERO, abi.AllocFlag.PINNED])
def test_it_outlives_its_tensor(raw: Raw, flags: int) -> None:
    """Freed, the memory is nobody else's, is still on the bill, and is not kept for reuse."""
    size = CHUNK + 3 * PAGE
    item = raw.alloc(size, flags=flags)
    window = raw.map_tensor(item)
    window[:] = b"\x5a" * size
    window.close()
    with raw.export(item.handle) as shared:
        assert raw.free(item.handle) == 0
        assert raw.query(item.handle)[0] == errno.ENOENT
        assert raw.try_export(item.handle)[0] == errno.ENOENT
        assert read("chunk/quarantined") == size // PAGE
        assert (raw.info().used, raw.info().kept) == (size, size)
        assert raw.set_quota(size - 1) == errno.EBUSY
        again = raw.alloc(size, flags=flags)
        other = raw.map_tensor(again)
        assert other[:] == bytes(size)
        other[:] = b"\xff" * size
        other.close()
        assert raw.free(again.handle) == 0
        view = shared.view()
        assert view[:] == b"\x5a" * size
        # the last to let go is the mapping
        shared.close()
        time.sleep(0.3)
        assert counts()[0] == 1
        assert view[:] == b"\x5a" * size
        view.close()
    becomes("chunk/quarantined", 0)
    # what was not exported is kept as ever
    assert raw.info().used == raw.info().kept == (size if flags == abi.AllocFlag.NOZERO else 0)


def test_what_was_there_before_is_not_shared(raw: Raw) -> None:
    """Memory that came back to its client unzeroed: what the new tensor has not asked for is nobody else's to see."""
    size = PAGE + 1
    first = raw.alloc(2 * PAGE, flags=abi.AllocFlag.NOZERO)
    window = raw.map_tensor(first)
    window[:] = b"\x5a" * (2 * PAGE)
    window.close()
    assert raw.free(first.handle) == 0
    item = raw.alloc(size, flags=abi.AllocFlag.NOZERO)
    assert item.offset == first.offset
    with raw.export(item.handle) as shared:
        view = shared.view(READ)
        assert view[:size] == b"\x5a" * size
        assert view[size:] == bytes(PAGE - 1)
        view.close()
    assert raw.free(item.handle) == 0
    becomes("chunk/quarantined", 0)


def test_two_exports_of_one_tensor(raw: Raw) -> None:
    item = raw.alloc(3 * PAGE)
    with raw.export(item.handle) as first, raw.export(item.handle) as second:
        assert counts() == (2, 6 * PAGE, 0)
        one, other = first.view(), second.view()
        one[0] = 3
        assert other[0] == 3
        one.close()
        first.close()
        assert raw.free(item.handle) == 0
        time.sleep(0.3)
        assert read("chunk/quarantined") == 3
        assert other[0] == 3
        other.close()
    becomes("chunk/quarantined", 0)


@pytest.mark.parametrize("end", ["close", "kill"])
def test_it_outlives_its_client_and_process(end: str) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    pid = os.fork()
    if pid == 0:
        try:
            client = Raw()
            item = client.alloc(CHUNK + PAGE, kind=abi.Kind.WEIGHTS)
            shared = client.export(item.handle)
            view = shared.view()
            view[:5], view[-5:] = b"first", b"final"
            send(theirs, shared.fd)
            if end == "close":
                client.close()
                os._exit(0)
            signal.pause()
        finally:
            os._exit(1)
    theirs.close()
    fd = receive(ours)
    if end == "kill":
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    assert os.WTERMSIG(status) == signal.SIGKILL if end == "kill" else status == 0
    becomes("clients/count", 0)
    with DmaBuf(fd, CHUNK + PAGE) as shared:
        assert read("clients/bytes") == read("clients/kept") == CHUNK + PAGE
        view = shared.view()
        assert (view[:5], view[-5:]) == (b"first", b"final")
        assert shared.sync(BOTH) == shared.sync(BOTH | DmaBuf.END) == 0
        view.close()
    becomes("clients/bytes", 0)
    ours.close()


def test_one_that_nobody_received(raw: Raw) -> None:
    """A descriptor that is on its way goes with the socket."""
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    item = raw.alloc(PAGE)
    with raw.export(item.handle) as shared:
        send(ours, shared.fd)
    assert raw.free(item.handle) == 0
    assert counts()[0] == read("chunk/quarantined") == 1
    ours.close()
    theirs.close()
    becomes("chunk/quarantined", 0)


def test_who_pins_through_it_holds_on(raw: Raw) -> None:
    item = raw.alloc(2 * PAGE)
    with raw.export(item.handle) as shared:
        view = shared.view()
        view[:4] = b"pipe"
        pipe = hold(address_of(view), PAGE)
        view.close()
    assert raw.free(item.handle) == 0
    time.sleep(0.3)
    assert (counts()[0], read("chunk/quarantined")) == (0, 2)
    assert os.read(pipe[0], PAGE)[:4] == b"pipe"
    let_go(pipe)
    becomes("chunk/quarantined", 0)


def test_compaction_leaves_it_where_it_is(raw: Raw, settings: None) -> None:
    """Of sparse chunks those without anything exported are emptied; the rest shows the same memory still."""
    chunks, share = 8, CHUNK // 16
    items = raw.alloc_batch([share] * 16 * chunks)[2]
    kept = items[::8]
    shared = [raw.export(item.handle) for item in kept[:chunks]]
    assert raw.free_batch([item.handle for i, item in enumerate(items) if i % 8])[0] == 0
    before = read("buddy/moved_pages"), read("buddy/emptied")
    assert write("buddy/compact", 1) == 0
    assert read("buddy/moved_pages") > before[0]
    assert read("buddy/emptied") > before[1]
    for number, (item, buf) in enumerate(zip(kept[:chunks], shared, strict=True)):
        window, view = raw.map_tensor(item), buf.view()
        window[0], view[1] = number, number + 100
        assert (view[0], window[1]) == (number, number + 100)
        window.close()
        view.close()
        buf.close()
    assert raw.free_batch([item.handle for item in kept])[0] == 0


def test_the_module_stays(raw: Raw) -> None:
    item = raw.alloc(PAGE)
    with raw.export(item.handle):
        raw.close()
        result = subprocess.run(["rmmod", "tensormem"], stderr=subprocess.PIPE, text=True, check=False)
        assert result.returncode != 0
        assert "in use" in result.stderr
    becomes("chunk/quarantined", 0)


# Bad input


def test_what_cannot_be_exported(raw: Raw) -> None:
    small, page = raw.alloc(64), raw.alloc(PAGE)
    before = (counts(), descriptors(), raw.info().used)
    freed = raw.alloc(PAGE)
    assert raw.free(freed.handle) == 0
    for handle in (0, freed.handle, page.handle + 1000, (1 << 32) - 1):
        assert raw.try_export(handle)[0] == errno.ENOENT
    with Raw() as other:
        assert other.try_export(page.handle)[0] == errno.ENOENT
    assert raw.try_export(small.handle)[0] == errno.EOPNOTSUPP
    for flags in (2, 1 << 31, os.O_CLOEXEC, READ_ONLY | 2):
        assert raw.try_export(page.handle, flags)[0] == errno.EINVAL
    assert raw.try_export(page.handle, pad=1)[0] == errno.EINVAL
    assert (counts(), descriptors(), raw.info().used) == before
    assert raw.free_batch([small.handle, page.handle])[0] == 0


def test_no_descriptor_left(raw: Raw) -> None:
    """EMFILE has made nothing: the tensor is kept for reuse as one that was never exported."""
    item = raw.alloc(PAGE, flags=abi.AllocFlag.NOZERO)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    fds = [os.dup(raw.fd) for _ in range(3)]
    top = max(map(int, os.listdir("/proc/self/fd")))
    for fd in fds:
        os.close(fd)
    holes = []
    while (fd := os.dup(raw.fd)) < top:
        holes.append(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (fd + 1, hard))
    try:
        assert raw.try_export(item.handle)[0] == errno.EMFILE
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for each in (*holes, fd):
            os.close(each)
    becomes("dma/buffers", 0)
    assert raw.free(item.handle) == 0
    assert read("chunk/quarantined") == 0
    assert raw.info().kept == PAGE


def test_sync_of_something_else(raw: Raw) -> None:
    item = raw.alloc(PAGE)
    with raw.export(item.handle) as shared:
        for flags in (0, DmaBuf.END, 8 | BOTH, 1 << 63 | BOTH):
            assert shared.sync(flags) == errno.EINVAL
        assert shared.ioctl(abi.IOC_QUERY, abi.Query(handle=item.handle)) == errno.ENOTTY
        assert DmaBuf(raw.fd, PAGE).sync(BOTH) == errno.ENOTTY
        fd = shared.fd
    assert DmaBuf(fd, PAGE).sync(BOTH) == errno.EBADF
    assert raw.free(item.handle) == 0


def test_it_counts_as_locked(raw: Raw) -> None:
    """Per export, against the user who exports, until the dma-buf ends and not the tensor."""
    items = [raw.alloc(8 * PAGE) for _ in range(2)]

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (12 * PAGE, 12 * PAGE))
        os.setuid(12345)
        with raw.export(items[0].handle):
            assert raw.try_export(items[0].handle)[0] == errno.EPERM
            assert raw.try_export(items[1].handle)[0] == errno.EPERM
            assert raw.free(items[0].handle) == 0
            assert raw.try_export(items[1].handle)[0] == errno.EPERM
        raw.export(items[1].handle).close()
        with raw.export(items[1].handle):
            assert counts()[0] == 1

    assert status_of(work) == 0
    assert raw.free(items[1].handle) == 0


# Many at once


def churn(raw: Raw, dice: random.Random, rounds: int) -> None:
    """Random calls; what is seen through a dma-buf is always what was written into its tensor."""
    tensors: list[tuple[abi.Alloc, int]] = []
    buffers: list[tuple[DmaBuf, mmap.mmap, int]] = []
    for number in range(rounds):
        what = dice.randrange(4)
        if what == 0 or not tensors:
            size = dice.choice((PAGE, 5 * PAGE, CHUNK, CHUNK + PAGE))
            item = raw.alloc(size, flags=dice.choice((0, abi.AllocFlag.NOZERO)), pool=dice.choice((0, BUDDY)))
            mark = dice.randrange(1 << 32)
            window = raw.map_tensor(item)
            window[-4:] = mark.to_bytes(4, "little")
            window.close()
            tensors.append((item, mark))
        elif what == 1:
            item, mark = dice.choice(tensors)
            shared = raw.export(item.handle)
            buffers.append((shared, shared.view(), mark))
        elif what == 2:
            item, _ = tensors.pop(dice.randrange(len(tensors)))
            assert raw.free(item.handle) == 0
        elif buffers:
            shared, view, mark = buffers.pop(dice.randrange(len(buffers)))
            if number % 2:
                shared.close()
            assert view[-4:] == mark.to_bytes(4, "little")
            view.close()
            shared.close()
        if len(tensors) + len(buffers) > 24:
            for shared, view, mark in buffers:
                assert view[-4:] == mark.to_bytes(4, "little")
                view.close()
                shared.close()
            buffers.clear()
            while tensors:
                assert raw.free(tensors.pop()[0].handle) == 0
    for shared, view, mark in buffers:
        assert view[-4:] == mark.to_bytes(4, "little")
        view.close()
        shared.close()
    while tensors:
        assert raw.free(tensors.pop()[0].handle) == 0


def test_threads_of_one_client(raw: Raw) -> None:
    assert together(lambda seed: churn(raw, random.Random(seed), 60 if KASAN else 200), 3) == []
    raw.relieve(1 << 40, abi.Relief.CHUNKS)
    becomes("chunk/quarantined", 0)


def test_killed_at_random() -> None:
    """Nothing of processes stays that end in the middle of exports, mappings and frees."""

    def work(seed: int) -> None:
        with Raw() as client:
            churn(client, random.Random(seed), 1 << 30)

    dice = random.Random(8)
    for _ in range(4 if KASAN else 12):
        killed_at_random(work, dice, 0.05, 0.5)
        assert settled(dict.fromkeys(USAGE, 0)) == dict.fromkeys(USAGE, 0)
