# SPDX-License-Identifier: MIT
"""Mappings of an arena: all of it there from the start, and nobody else's bytes ever in it."""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from device import CHUNK, PAGE, RT, Raw, address_of, read, wait_for
from process import FAILED, dies, hold, let_go, libc, mremap_to, smaps, status_of
from tensormem import abi

READ, WRITE, EXEC = mmap.PROT_READ, mmap.PROT_WRITE, mmap.PROT_EXEC
SHARED = mmap.MAP_SHARED
SIZE = 2 * CHUNK


@pytest.fixture
def rt(raw: Raw) -> Iterator[RT]:
    with raw.rt(SIZE, movable=16) as arena:
        yield arena


def mapped(rt: RT, length: int = SIZE, offset: int = 0, prot: int = READ | WRITE) -> int:
    at = libc.mmap(None, length, prot, SHARED, rt.fd, offset)
    assert at != FAILED
    return at


# Faults


def test_nothing_faults() -> None:
    """Every page is in the page table when mmap() returns, writable, young and dirty."""
    program = Path(__file__).parent / "rt_faults"
    result = subprocess.run([program, "3"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert result.returncode == 0, result.stdout
    counts: dict[str, int] = json.loads(result.stdout)
    pages = counts.pop("pages")
    assert pages == 3 * CHUNK // PAGE
    given_up, back = counts.pop("missing when given up"), counts.pop("brought back")
    assert given_up == pages
    assert 0 < back <= pages
    # fork makes a child's entries old and clean, and there are CPUs that fault for that
    assert counts.pop("inherited") <= 2 * pages
    assert counts == dict.fromkeys(counts, 0)
    assert len(counts) == 15


def test_it_counts_as_resident(rt: RT) -> None:
    at = mapped(rt)
    assert smaps(at)["Rss"] == SIZE >> 10
    assert libc.madvise(at, SIZE, mmap.MADV_DONTNEED) == 0
    assert smaps(at)["Rss"] == 0
    ctypes.memset(at, 1, SIZE)
    assert smaps(at)["Rss"] == SIZE >> 10
    assert smaps(at)["Private_Dirty"] + smaps(at)["Shared_Dirty"] == SIZE >> 10
    assert libc.munmap(at, SIZE) == 0


# Ranges and rights


def test_ranges(rt: RT) -> None:
    """The whole arena, or whole pages of it."""
    for length, offset in ((SIZE, 0), (PAGE, 0), (PAGE, SIZE - PAGE), (CHUNK, CHUNK), (SIZE - PAGE, PAGE)):
        assert rt.map_errno(length, offset) == 0
    for length, offset in ((SIZE + PAGE, 0), (SIZE, PAGE), (PAGE, SIZE), (2 * PAGE, SIZE - PAGE), (PAGE, 1 << 40),
                           (1 << 40, 0)):  # fmt: skip
        assert rt.map_errno(length, offset) == errno.EINVAL
    assert libc.mmap(None, PAGE, READ, SHARED, rt.fd, 1) == FAILED
    assert ctypes.get_errno() == errno.EINVAL
    assert libc.mmap(None, PAGE, READ, SHARED, rt.fd, -PAGE) == FAILED
    assert ctypes.get_errno() in (errno.EINVAL, errno.EOVERFLOW)


def test_private_and_executable_are_refused(rt: RT) -> None:
    for length in (PAGE, SIZE):
        assert rt.map_errno(length, 0, flags=mmap.MAP_PRIVATE) == errno.EINVAL
        for prot in (READ | EXEC, READ | WRITE | EXEC, EXEC):
            assert rt.map_errno(length, 0, prot=prot) == errno.EPERM
    at = mapped(rt)
    for prot in (READ | EXEC, READ | WRITE | EXEC, EXEC):
        assert libc.mprotect(at, PAGE, prot) == -1
        assert ctypes.get_errno() == errno.EACCES
    assert ctypes.string_at(at, SIZE) == bytes(SIZE)
    assert libc.munmap(at, SIZE) == 0


def test_parts_show_the_same(rt: RT) -> None:
    view = rt.view()
    data = random.Random(1).randbytes(SIZE)
    view[:] = data
    for length, offset in ((SIZE, 0), (PAGE, CHUNK - PAGE), (2 * PAGE, CHUNK - PAGE), (PAGE, SIZE - PAGE)):
        part = rt.map(length, offset)
        assert part[:] == data[offset : offset + length]
        part[-1] ^= 0xFF
        assert view[offset + length - 1] == part[-1]
        part[-1] ^= 0xFF
        part.close()
    view.close()


def test_rights_that_change(rt: RT) -> None:
    """What is read-only is so, until it is made writable; no contents are lost on the way."""
    at = mapped(rt, prot=READ)
    view = rt.view()
    view[:] = b"\x11" * SIZE
    assert ctypes.string_at(at, SIZE) == b"\x11" * SIZE
    assert dies(lambda: ctypes.memset(at, 1, 1)) == signal.SIGSEGV
    assert libc.mprotect(at, SIZE, READ | WRITE) == 0
    ctypes.memset(at + PAGE, 0x22, PAGE)
    assert libc.mprotect(at + PAGE, PAGE, READ) == 0
    assert dies(lambda: ctypes.memset(at + PAGE, 1, 1)) == signal.SIGSEGV
    assert libc.mprotect(at, PAGE, 0) == 0
    assert dies(lambda: ctypes.string_at(at, 1)) == signal.SIGSEGV
    assert libc.mprotect(at, SIZE, READ | WRITE) == 0
    assert view[:] == b"\x11" * PAGE + b"\x22" * PAGE + b"\x11" * (SIZE - 2 * PAGE)
    assert ctypes.string_at(at, SIZE) == view[:]
    assert libc.munmap(at, SIZE) == 0
    view.close()


def test_madvise(rt: RT) -> None:
    """Nothing that it does costs data."""
    view = rt.view()
    data = random.Random(2).randbytes(SIZE)
    view[:] = data
    at = address_of(view)
    for advice in range(26):
        if advice not in (mmap.MADV_DONTFORK, mmap.MADV_DOFORK, 18, 19):  # about fork
            libc.madvise(at + PAGE, CHUNK, advice)
    assert view[:] == data
    for start, length in ((0, SIZE), (PAGE, PAGE), (CHUNK - PAGE, 2 * PAGE), (0, SIZE)):
        assert libc.madvise(at + start, length, mmap.MADV_DONTNEED) == 0
        view[start] ^= 1
        data = data[:start] + bytes([data[start] ^ 1]) + data[start + 1 :]
        assert view[:] == data
    view.close()


def test_mremap_shrinks_and_does_nothing_else(rt: RT) -> None:
    at = mapped(rt)
    ctypes.memset(at, 7, SIZE)
    MAYMOVE, FIXED = 1, 2
    assert libc.mremap(at, SIZE, SIZE + PAGE, MAYMOVE) == FAILED
    assert ctypes.get_errno() in (errno.EFAULT, errno.EINVAL)
    spare = libc.mmap(None, SIZE, READ, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    assert mremap_to(at, SIZE, SIZE, MAYMOVE | FIXED, spare) == FAILED
    assert ctypes.get_errno() == errno.EINVAL
    assert ctypes.string_at(at, SIZE) == b"\7" * SIZE
    assert libc.mremap(at, SIZE, 3 * PAGE, 0) == at
    assert ctypes.string_at(at, 3 * PAGE) == b"\7" * (3 * PAGE)
    assert libc.munmap(at, 3 * PAGE) == 0


def test_holes_in_a_mapping(rt: RT) -> None:
    """What is still mapped is right; the rest can be mapped again, in its place."""
    view = rt.view()
    data = random.Random(3).randbytes(SIZE)
    view[:] = data
    at = mapped(rt)
    for start, length in ((PAGE, PAGE), (CHUNK - PAGE, 3 * PAGE), (SIZE - PAGE, PAGE)):
        assert libc.munmap(at + start, length) == 0
        assert dies(lambda place=at + start: ctypes.string_at(place, 1)) == signal.SIGSEGV
        assert ctypes.string_at(at + start - PAGE, PAGE) == data[start - PAGE : start]
        MAP_FIXED = 0x10
        assert libc.mmap(at + start, length, READ | WRITE, SHARED | MAP_FIXED, rt.fd, start) == at + start
        assert ctypes.string_at(at, SIZE) == data
    assert libc.munmap(at, SIZE) == 0
    view.close()


# Lifetimes


def test_fork_shares_it(rt: RT) -> None:
    """The memory, and the client with its blocks."""
    view = rt.view()
    block = rt.alloc(PAGE)
    view[: 2 * PAGE] = b"\1" * 2 * PAGE

    def child() -> None:
        assert view[: 2 * PAGE] == b"\1" * 2 * PAGE
        view[PAGE : 3 * PAGE] = b"\2" * 2 * PAGE
        assert rt.free(block.handle) == 0
        assert rt.alloc(3 * PAGE).offset == block.offset

    assert status_of(child) == 0
    assert view[: 4 * PAGE] == b"\1" * PAGE + b"\2" * 2 * PAGE + bytes(PAGE)
    info = rt.info()
    assert (info.clients, info.blocks, info.used) == (1, 1, 3 * PAGE)
    view.close()


def test_a_mapping_outlives_the_descriptor(raw: Raw) -> None:
    """And the client that made it; the bill stays. The last to go frees all."""
    client = Raw()
    rt = client.rt(SIZE)
    rt.alloc(1000)
    at = mapped(rt)
    other = raw.join(rt)
    ctypes.memset(at, 5, SIZE)
    client.close()
    rt.close()
    assert other.info().clients == 2  # a mapping is a client's
    assert (read("rt/used"), read("rt/arenas"), read("clients/bytes")) == (SIZE, 1, SIZE)
    other.close()
    assert read("rt/arenas") == 1
    assert ctypes.string_at(at, SIZE) == b"\5" * SIZE
    assert libc.munmap(at + PAGE, SIZE - PAGE) == 0
    assert (read("rt/used"), read("rt/arenas"), read("clients/bytes")) == (SIZE, 1, SIZE)
    assert ctypes.string_at(at, PAGE) == b"\5" * PAGE
    assert libc.munmap(at, PAGE) == 0
    assert (read("rt/used"), read("rt/arenas"), read("clients/bytes")) == (0, 0, 0)


@pytest.mark.parametrize("what", ["descriptor", "mapping"])
def test_the_module_stays(raw: Raw, what: str) -> None:
    rt = raw.rt()
    raw.close()
    at = mapped(rt, CHUNK)
    if what == "mapping":
        rt.close()
    else:
        assert libc.munmap(at, CHUNK) == 0
    result = subprocess.run(["rmmod", "tensormem"], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "in use" in result.stderr
    if what == "mapping":
        assert libc.munmap(at, CHUNK) == 0
    rt.close()


# Whose bytes


def test_arenas_are_apart(raw: Raw) -> None:
    with raw.rt(SIZE) as one, raw.rt(SIZE) as two:
        first, second = one.view(), two.view()
        first[:] = b"\xaa" * SIZE
        assert second[:] == bytes(SIZE)
        second[:] = b"\xbb" * SIZE
        assert first[:] == b"\xaa" * SIZE
        a, b = one.alloc(CHUNK), two.alloc(CHUNK)
        assert a.offset == b.offset == 0
        assert (one.info().free, two.info().free, read("rt/arenas")) == (CHUNK, CHUNK, 2)
        first.close()
        second.close()


def dirtied(raw: Raw, size: int) -> None:
    """An arena full of a secret, and closed."""
    with raw.rt(size) as rt:
        view = rt.view()
        view[:] = b"\xde\xad\xbe\xef" * (size // 4)
        view.close()


def test_old_contents_are_never_seen(raw: Raw) -> None:
    """By the next arena, by tensors; nor what was a tensor's by an arena."""
    for turn in range(4):
        size = (3 + turn) * CHUNK
        dirtied(raw, size)
        if turn % 2:
            item = raw.alloc(size, abi.Kind.WEIGHTS)
            mapping = raw.map_tensor(item)
            assert mapping[:] == bytes(size)
            mapping[:] = b"\x99" * size
            mapping.close()
            assert raw.free(item.handle) == 0
        with Raw() as other, other.rt(size) as rt:
            view = rt.view()
            assert view[:] == bytes(size)
            view.close()


def test_blocks_show_what_was_there(raw: Raw, rt: RT) -> None:
    """Within an arena nothing is zeroed: that takes time."""
    view = rt.view()
    block = rt.alloc(PAGE)
    view[block.offset : block.offset + PAGE] = b"\x5a" * PAGE
    assert rt.free(block.handle) == 0
    with raw.join(rt) as other:
        its = other.alloc(PAGE)
        assert its.offset == block.offset
        assert view[its.offset : its.offset + PAGE] == b"\x5a" * PAGE
    view.close()


# Pinned by others


def test_direct_io(rt: RT) -> None:
    """O_DIRECT reads into blocks and writes from them."""
    path = Path("/var/tmp/rt-direct.bin")
    data = random.Random(4).randbytes(16 * PAGE)
    path.write_bytes(data)
    os.sync()
    view = rt.view()
    memory = memoryview(view)
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    block = rt.alloc(17 * PAGE)
    at = -(-block.offset // PAGE) * PAGE
    assert os.preadv(fd, [memory[at : at + 16 * PAGE]], 0) == 16 * PAGE
    assert view[at : at + 16 * PAGE] == data
    view[at : at + PAGE] = b"\x21" * PAGE
    assert os.pwritev(fd, [memory[at : at + 4 * PAGE]], 8 * PAGE) == 4 * PAGE
    # after it was given up, too
    assert libc.madvise(address_of(view) + at, 16 * PAGE, mmap.MADV_DONTNEED) == 0
    assert os.pwritev(fd, [memory[at + PAGE : at + 2 * PAGE]], 0) == PAGE
    os.close(fd)
    os.sync()
    # its second page first, and four from where it was changed in the middle
    middle = b"\x21" * PAGE + data[PAGE : 4 * PAGE]
    assert path.read_bytes() == data[PAGE : 2 * PAGE] + data[PAGE : 8 * PAGE] + middle + data[12 * PAGE :]
    path.unlink()
    memory.release()
    view.close()


def test_pages_that_are_held(raw: Raw) -> None:
    """Who holds pages of an arena that is closed keeps them as they are; nobody gets their chunk before."""
    rt = raw.rt(3 * CHUNK)
    view = rt.view()
    view[:] = b"\x66" * (3 * CHUNK)
    pipe = hold(address_of(view) + CHUNK + PAGE, PAGE)
    view.close()
    rt.close()
    assert read("chunk/quarantined") == CHUNK // PAGE
    assert read("rt/arenas") == 0
    with raw.rt(6 * CHUNK) as other:
        view = other.view()
        assert view[:] == bytes(6 * CHUNK)
        view[:] = b"\xff" * (6 * CHUNK)
        time.sleep(0.3)
        assert read("chunk/quarantined") == CHUNK // PAGE
        assert os.read(pipe[0], PAGE) == b"\x66" * PAGE
        wait_for(lambda: read("chunk/quarantined") == 0)
        view.close()
    let_go(pipe)
    wait_for(lambda: read("clients/bytes") == 0)


def test_what_is_held_while_it_is_open(rt: RT) -> None:
    """A block that is freed while its pages are held: an arena's memory stays where it is, so there is no harm."""
    view = rt.view()
    block = rt.alloc(CHUNK)
    view[: 2 * PAGE] = b"\x31" * 2 * PAGE
    pipe = hold(address_of(view), 2 * PAGE)
    assert rt.free(block.handle) == 0
    view[:PAGE] = b"\x32" * PAGE
    assert os.read(pipe[0], 2 * PAGE) == b"\x32" * PAGE + b"\x31" * PAGE
    let_go(pipe)
    view.close()
