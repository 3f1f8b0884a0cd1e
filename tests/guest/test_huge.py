# SPDX-License-Identifier: MIT
"""Whole chunks mapped as blocks where the kernel can: few faults, and memory like any other.

What holds for pages has to hold for blocks: most tests run on both.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import random
import re
import signal
import threading
import time
from pathlib import Path

import pytest

from conftest import USAGE, settled
from device import CHUNK, KASAN, KINDS, PAGE, Raw, address_of, events, read, write
from process import FAILED, Iovec, dies, hold, killed_at_random, let_go, libc, smaps
from tensormem import abi

READ, WRITE = mmap.PROT_READ, mmap.PROT_WRITE
HUGE, PAGED = abi.AllocFlag.HUGE, abi.AllocFlag.PAGED
PAGES, CONT, BLOCK = abi.Mapping.PAGES, abi.Mapping.CONT, abi.Mapping.BLOCK
MAP_FIXED, MADV_COLD, MADV_PAGEOUT = 0x10, 20, 21

VERSION = tuple(map(int, re.findall(r"\d+", os.uname().release)[:2]))
THP = Path("/sys/kernel/mm/transparent_hugepage").exists()
#: A block is a PMD entry, which is a chunk's size with 4K pages only.
BLOCKS = THP and PAGE == 4096
#: Since 6.9 arm64 folds contiguous page entries where it has large folios.
FOLDS = THP and VERSION >= (6, 9)
UNHUGE = CONT if FOLDS else PAGES

needs_blocks = pytest.mark.skipif(not BLOCKS, reason="no blocks: needs 4K pages and THP")
both = pytest.mark.parametrize("flags", [HUGE, PAGED])


def fill(mapping: mmap.mmap, seed: int = 1) -> bytes:
    """Give every page contents of its own, and return them."""
    data = random.Random(seed).randbytes(len(mapping))
    mapping[:] = data
    return data


def faults() -> list[int]:
    """Pages that each fault so far mapped."""
    return [int(event["mapped"]) for event in events("fault")]


def touch(mapping: mmap.mmap) -> None:
    ctypes.memset(address_of(mapping), 1, len(mapping))


# Which mapping is in force, and what it costs


@pytest.mark.parametrize("kind", KINDS)
def test_query_says_how_chunks_are_mapped(raw: Raw, kind: abi.Kind) -> None:
    block = BLOCK if BLOCKS else UNHUGE
    for flags, expected in ((0, block if kind == abi.Kind.WEIGHTS else UNHUGE),
                            (HUGE, block), (PAGED, UNHUGE)):  # fmt: skip
        query = raw.query(raw.alloc(2 * CHUNK + PAGE, kind, flags=flags).handle)[1]
        assert (query.mapping, query.alloc_flags) == (expected, flags)
        # runs are pages whatever was asked for
        query = raw.query(raw.alloc(CHUNK // 2, kind, flags=flags).handle)[1]
        assert (query.nr_chunks, query.mapping) == (0, PAGES)
    assert raw.try_alloc(CHUNK, kind, flags=HUGE | PAGED)[0] == errno.EINVAL


def test_weights_take_few_faults(raw: Raw, trace: None) -> None:
    size = 64 << 20
    mapping = raw.map_tensor(raw.alloc(size, abi.Kind.WEIGHTS))
    touch(mapping)
    assert sum(faults()) == size // PAGE
    assert len(faults()) <= size // CHUNK == 32
    if BLOCKS:
        assert faults() == [CHUNK // PAGE] * 32
    # nothing is left to fault: neither to read nor to write
    touch(mapping)
    assert sum(faults()) == size // PAGE
    mapping.close()


@both
@pytest.mark.parametrize("tail", [0, 1, 5, CHUNK // PAGE - 1])
def test_the_tail_is_mapped_by_pages(raw: Raw, trace: None, flags: int, tail: int) -> None:
    item = raw.alloc(2 * CHUNK + tail * PAGE, flags=flags)
    mapping = raw.map_tensor(item)
    data = fill(mapping)
    if PAGE == 4096:
        assert faults() == [512, 512, tail][: 3 if tail else 2]
    assert sum(faults()) == len(mapping) // PAGE
    window = raw.map_window()
    assert window[item.offset : item.offset + len(data)] == data
    mapping.close()
    window.close()


@both
def test_what_counts_as_rss(raw: Raw, flags: int) -> None:
    """Pages do on every kernel. Of blocks the kernel makes special entries since 6.12: these do not."""
    size = 2 * CHUNK
    mapping = raw.map_tensor(raw.alloc(size, flags=flags))
    touch(mapping)
    block = flags == HUGE and BLOCKS
    assert smaps(address_of(mapping))["Rss"] == (0 if block and VERSION >= (6, 12) else size // 1024)
    mapping.close()


def test_populate(raw: Raw, trace: None) -> None:
    size = 4 * CHUNK
    item = raw.alloc(size, abi.Kind.WEIGHTS)
    mapping = raw.map(size, item.offset, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    assert sum(faults()) == size // PAGE
    assert len(faults()) <= 4
    touch(mapping)
    assert sum(faults()) == size // PAGE
    mapping.close()


# Every part of a block is memory


@both
def test_access_across_an_edge(raw: Raw, flags: int) -> None:
    mapping = raw.map_tensor(raw.alloc(2 * CHUNK, flags=flags))
    address = address_of(mapping)
    for at in (1, PAGE - 3, CHUNK - 7, CHUNK - 4, CHUNK - 1):
        ctypes.c_uint64.from_address(address + at).value = 0x0123456789ABCDEF
        assert mapping[at : at + 8] == bytes.fromhex("efcdab8967452301")
    mapping[CHUNK - 64 : CHUNK + 64] = data = os.urandom(128)
    assert mapping[CHUNK - 64 : CHUNK + 64] == data
    mapping.close()


@both
def test_fork_shares(raw: Raw, flags: int) -> None:
    size = 2 * CHUNK
    mapping = raw.map_tensor(raw.alloc(size, flags=flags))
    data = fill(mapping)
    mapping[CHUNK:] = bytes(CHUNK)  # the parent's, made before the fork
    told, tell = os.pipe()

    def child() -> None:
        assert mapping[:PAGE] == data[:PAGE]
        assert mapping[2 * PAGE : CHUNK] == data[2 * PAGE : CHUNK]
        assert os.read(told, 1) == b"x"
        assert mapping[PAGE] == 17  # the parent's, made after it
        mapping[CHUNK + PAGE] = 18
        mapping[size - 1] = 19

    pid = os.fork()
    if pid == 0:
        try:
            child()
        except BaseException:
            os._exit(1)
        os._exit(0)
    mapping[PAGE] = 17
    os.write(tell, b"x")
    assert os.waitpid(pid, 0)[1] == 0
    assert (mapping[CHUNK + PAGE], mapping[size - 1]) == (18, 19)
    let_go((told, tell))
    mapping.close()


@both
@pytest.mark.parametrize("at", [0, PAGE, CHUNK - PAGE, CHUNK])
def test_mprotect_of_a_part(raw: Raw, flags: int, at: int) -> None:
    mapping = raw.map_tensor(raw.alloc(2 * CHUNK, flags=flags))
    data = fill(mapping)
    address = address_of(mapping)
    assert libc.mprotect(address + at, PAGE, READ) == 0

    def poke() -> None:
        mapping[at + 1] = 0

    assert dies(poke) == signal.SIGSEGV
    assert dies(lambda: mapping[at]) == 0
    assert mapping[:] == data
    assert libc.mprotect(address + at, PAGE, 0) == 0
    assert dies(lambda: mapping[at]) == signal.SIGSEGV
    beside = at + PAGE if at != CHUNK - PAGE else at - 1
    mapping[beside] = data[beside]
    assert libc.mprotect(address, 2 * CHUNK, READ | WRITE) == 0
    assert mapping[:] == data
    poke()
    assert mapping[at + 1] == 0
    mapping.close()


@both
def test_read_only_becomes_writable(raw: Raw, flags: int) -> None:
    item = raw.alloc(2 * CHUNK, flags=flags)
    writable = raw.map_tensor(item)
    data = fill(writable)
    at = libc.mmap(None, 2 * CHUNK, READ, mmap.MAP_SHARED, raw.fd, item.offset)
    assert at != FAILED
    assert ctypes.string_at(at, 2 * CHUNK) == data
    assert dies(lambda: ctypes.memset(at, 0, 1)) == signal.SIGSEGV
    assert libc.mprotect(at, 2 * CHUNK, READ | WRITE) == 0
    for where in (0, CHUNK - 1, CHUNK + PAGE):
        ctypes.memset(at + where, data[where] ^ 0xFF, 1)
        assert writable[where] == data[where] ^ 0xFF
        ctypes.memset(at + where, data[where], 1)
    assert ctypes.string_at(at, 2 * CHUNK) == writable[:] == data
    assert libc.munmap(at, 2 * CHUNK) == 0
    writable.close()


@both
def test_mremap_shrinks_within_a_block(raw: Raw, flags: int) -> None:
    item = raw.alloc(2 * CHUNK, flags=flags)
    own = raw.map_tensor(item)
    data = fill(own)
    at = libc.mmap(None, 2 * CHUNK, READ | WRITE, mmap.MAP_SHARED, raw.fd, item.offset)
    assert ctypes.string_at(at, 2 * CHUNK) == data
    length = 2 * CHUNK
    for size in (CHUNK + 3 * PAGE, CHUNK, PAGE):
        assert libc.mremap(at, length, 4 * CHUNK, 1) == FAILED
        assert libc.mremap(at, length, size, 0) == at
        length = size
        assert ctypes.string_at(at, size) == data[:size]
        assert dies(lambda size=size: ctypes.string_at(at + size, 1)) == signal.SIGSEGV
    assert own[:] == data
    assert libc.munmap(at, PAGE) == 0
    own.close()


@both
def test_a_part_is_mapped_over(raw: Raw, flags: int) -> None:
    """MAP_FIXED puts something else into the middle of a block; what was there is still the tensor's."""
    window = raw.map_window()
    item = raw.alloc(2 * CHUNK, flags=flags)
    own = raw.map_tensor(item)
    data = fill(own)
    assert window[item.offset : item.offset + 2 * CHUNK] == data
    at, length = address_of(window) + item.offset + 3 * PAGE, 2 * PAGE
    anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED
    assert libc.mmap(at, length, READ | WRITE, anonymous, -1, 0) == at
    hole = slice(item.offset + 3 * PAGE, item.offset + 5 * PAGE)
    assert window[hole] == bytes(length)
    window[hole] = b"\xee" * length
    assert own[:] == data
    assert window[item.offset : hole.start] == data[: 3 * PAGE]
    assert window[hole.stop : item.offset + 2 * CHUNK] == data[5 * PAGE :]
    window[hole.stop] = own[hole.stop - item.offset] ^ 0xFF
    assert own[5 * PAGE] == data[5 * PAGE] ^ 0xFF
    # and back
    flags = mmap.MAP_SHARED | MAP_FIXED
    assert libc.mmap(at, length, READ | WRITE, flags, raw.fd, hole.start) == at
    assert window[hole] == data[3 * PAGE : 5 * PAGE]
    own.close()
    window.close()


@both
def test_a_part_is_unmapped(raw: Raw, flags: int) -> None:
    item = raw.alloc(3 * CHUNK, flags=flags)
    own = raw.map_tensor(item)
    data = fill(own)
    at = libc.mmap(None, 3 * CHUNK, READ | WRITE, mmap.MAP_SHARED, raw.fd, item.offset)
    assert at != FAILED
    assert ctypes.string_at(at, 3 * CHUNK) == data
    half = CHUNK // 2
    assert libc.munmap(at + half, CHUNK) == 0
    for hole in (half, CHUNK + half - 1):
        assert dies(lambda hole=hole: ctypes.string_at(at + hole, 1)) == signal.SIGSEGV
    assert ctypes.string_at(at, half) == data[:half]
    assert ctypes.string_at(at + CHUNK + half, CHUNK + half) == data[CHUNK + half :]
    assert own[:] == data
    assert libc.munmap(at, 3 * CHUNK) == 0
    own.close()


@both
def test_advice_never_costs_data(raw: Raw, flags: int) -> None:
    size = 2 * CHUNK
    mapping = raw.map_tensor(raw.alloc(size, flags=flags))
    data = fill(mapping)
    address = address_of(mapping)
    for advice in (mmap.MADV_DONTNEED, MADV_COLD, MADV_PAGEOUT, mmap.MADV_HUGEPAGE,
                   mmap.MADV_NOHUGEPAGE, mmap.MADV_MERGEABLE, mmap.MADV_FREE):  # fmt: skip
        for at, length in ((PAGE, 3 * PAGE), (CHUNK - PAGE, 2 * PAGE), (0, CHUNK), (0, size)):
            result = libc.madvise(address + at, length, advice)
            assert result == 0 or ctypes.get_errno() == errno.EINVAL, advice
            assert result == 0 or advice not in (mmap.MADV_DONTNEED, MADV_COLD, MADV_PAGEOUT)
            assert mapping[:] == data, (advice, at)
    mapping.close()


@both
def test_mlock(raw: Raw, flags: int) -> None:
    mapping = raw.map_tensor(raw.alloc(2 * CHUNK, flags=flags))
    data = fill(mapping)
    address = ctypes.c_void_p(address_of(mapping) + PAGE)
    for call in (libc.mlock, libc.munlock):
        assert call(address, ctypes.c_size_t(CHUNK)) == 0
        assert mapping[:] == data
    mapping.close()


@both
def test_a_mapping_of_a_part(raw: Raw, trace: None, flags: int) -> None:
    item = raw.alloc(3 * CHUNK, flags=flags)
    whole = raw.map_tensor(item)
    data = fill(whole)
    for at, length in ((7 * PAGE, CHUNK), (CHUNK, 2 * CHUNK), (CHUNK - PAGE, CHUNK + 2 * PAGE),
                       (2 * CHUNK, PAGE), (PAGE, 3 * CHUNK - 2 * PAGE)):  # fmt: skip
        part = raw.map(length, item.offset + at)
        before = sum(faults())
        assert part[:] == data[at : at + length]
        assert sum(faults()) - before == length // PAGE
        part[length - 1] ^= 0xFF
        assert whole[at + length - 1] == data[at + length - 1] ^ 0xFF
        part[length - 1] ^= 0xFF
        part.close()
    whole.close()


def test_where_a_mapping_begins_suits_blocks(raw: Raw) -> None:
    """The kernel picks addresses at which chunks line up; one that does not fit works all the same."""
    item = raw.alloc(2 * CHUNK, flags=HUGE)
    for at in (0, PAGE, CHUNK):
        mapping = raw.map(2 * CHUNK - at, item.offset + at)
        assert (address_of(mapping) - at) % CHUNK == 0 or len(mapping) < CHUNK
        mapping.close()
    place = mmap.mmap(-1, 4 * CHUNK)
    for skew in (PAGE, CHUNK // 2 + PAGE):
        address = -(-address_of(place) // CHUNK) * CHUNK + skew
        flags = mmap.MAP_SHARED | MAP_FIXED
        assert libc.mmap(address, 2 * CHUNK, READ | WRITE, flags, raw.fd, item.offset) == address
        ctypes.memset(address, skew & 0xFF | 1, 2 * CHUNK)
        own = raw.map_tensor(item)
        assert own[:] == bytes([skew & 0xFF | 1]) * (2 * CHUNK)
        own.close()
    place.close()


@both
def test_what_proc_tells(raw: Raw, flags: int) -> None:
    """Files that walk page tables meet blocks as well."""
    mapping = raw.map_tensor(raw.alloc(2 * CHUNK, flags=flags))
    data = fill(mapping)
    address = address_of(mapping)
    for name in ("smaps", "smaps_rollup", "numa_maps", "maps"):
        with contextlib.suppress(FileNotFoundError):
            assert Path("/proc/self", name).read_text()
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        pagemap.seek(address // PAGE * 8)
        entries = pagemap.read(2 * CHUNK // PAGE * 8)
    assert len(entries) == 2 * CHUNK // PAGE * 8
    for what in "12345":
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text(what)
        assert mapping[:] == data, what
        touch(mapping)
        mapping[:] = data
    mapping.close()


# Others reach it too


@both
@pytest.mark.parametrize("at", [0, PAGE, CHUNK - PAGE, CHUNK + 5 * PAGE])
def test_a_pipe_holds_pages_of_it(raw: Raw, flags: int, at: int) -> None:
    mapping = raw.map_tensor(raw.alloc(2 * CHUNK, flags=flags))
    data = fill(mapping)
    pipe = hold(address_of(mapping) + at, 4 * PAGE)
    mapping[at] ^= 0xFF  # the pages themselves: seen through the pipe
    seen = os.read(pipe[0], 4 * PAGE)
    assert (seen[0], seen[1:]) == (data[at] ^ 0xFF, data[at + 1 : at + 4 * PAGE])
    let_go(pipe)
    mapping.close()


@both
def test_splice_to_a_file(raw: Raw, flags: int) -> None:
    mapping = raw.map_tensor(raw.alloc(CHUNK, flags=flags))
    data = fill(mapping)
    fd = os.memfd_create("file")
    for at in range(0, CHUNK, 16 * PAGE):
        pipe = hold(address_of(mapping) + at, 16 * PAGE)
        left = 16 * PAGE
        while left:
            left -= os.splice(pipe[0], fd, left)
        let_go(pipe)
    assert os.pread(fd, CHUNK, 0) == data
    os.close(fd)
    mapping.close()


@both
@pytest.mark.parametrize("touched", [True, False])
def test_direct_io(raw: Raw, flags: int, touched: bool) -> None:
    path = Path("/var/tmp/direct-io.bin")
    data = os.urandom(2 * CHUNK)
    path.write_bytes(data)
    os.sync()
    mapping = raw.map_tensor(raw.alloc(2 * CHUNK, flags=flags))
    if touched:
        touch(mapping)
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    assert os.preadv(fd, [mapping], 0) == len(data)
    assert mapping[:] == data
    view = memoryview(mapping)
    mapping[CHUNK - PAGE : CHUNK + PAGE] = b"\xab" * (2 * PAGE)
    assert os.pwritev(fd, [view[CHUNK - PAGE : CHUNK + PAGE]], 0) == 2 * PAGE
    os.close(fd)
    assert path.read_bytes()[: 2 * PAGE + 1] == b"\xab" * (2 * PAGE) + data[2 * PAGE : 2 * PAGE + 1]
    path.unlink()
    view.release()
    mapping.close()


@both
def test_another_process_reads_and_writes_it(raw: Raw, flags: int) -> None:
    """process_vm_readv and _writev: get_user_pages on somebody else's mapping."""
    mapping = raw.map_tensor(raw.alloc(2 * CHUNK, flags=flags))
    data = fill(mapping)
    address, ours = address_of(mapping), os.getpid()

    def child() -> None:
        buffer = ctypes.create_string_buffer(2 * CHUNK)
        local = Iovec(ctypes.addressof(buffer), 2 * CHUNK)
        remote = Iovec(address, 2 * CHUNK)
        arguments = (ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
        assert libc.munmap(address, 2 * CHUNK) == 0  # the parent's is the only one
        assert libc.process_vm_readv(ours, *arguments) == 2 * CHUNK
        assert buffer.raw == data
        ctypes.memset(buffer, 0x5C, 2 * CHUNK)
        remote.base, remote.length = address + PAGE, CHUNK
        local.length = CHUNK
        assert libc.process_vm_writev(ours, *arguments) == CHUNK

    assert dies(child) == 0
    assert mapping[:] == data[:PAGE] + b"\x5c" * CHUNK + data[PAGE + CHUNK :]
    mapping.close()


# Free and reuse


@both
def test_freed_while_mapped(raw: Raw, flags: int) -> None:
    window = raw.map_window()
    item = raw.alloc(2 * CHUNK, flags=flags)
    own = raw.map_tensor(item)
    fill(own)
    window[item.offset + CHUNK] = 1
    assert raw.free(item.handle) == 0
    for at in (0, PAGE, CHUNK - 1, CHUNK, 2 * CHUNK - 1):
        assert dies(lambda at=at: own[at]) == signal.SIGBUS
        assert dies(lambda at=at: window[item.offset + at]) == signal.SIGBUS
    with open("/dev/zero", "rb", buffering=0) as zero, pytest.raises(OSError, match="Bad address"):
        zero.readinto(own)
    own.close()
    window.close()


def test_an_address_serves_pages_and_blocks_in_turn(raw: Raw, trace: None) -> None:
    """Where pages have been there is a page table, which a block cannot replace."""
    window = raw.map_window()
    offsets = set()
    for step in range(12):
        # the tail of one is where the next has a chunk, and the other way round
        size = (CHUNK + 5 * PAGE, 2 * CHUNK, 2 * CHUNK - PAGE)[step % 3]
        flags = HUGE if step % 4 else 0
        item = raw.alloc(size, flags=flags)
        offsets.add(item.offset // CHUNK)
        span = slice(item.offset, item.offset + size)
        assert window[span] == bytes(size)
        window[span] = data = random.Random(step).randbytes(size)
        own = raw.map_tensor(item)
        assert own[:size] == data
        own.close()
        assert window[span] == data
        assert raw.free(item.handle) == 0
    assert len(offsets) < 4
    window.close()


def test_a_fixed_address_serves_tensors_in_turn(raw: Raw) -> None:
    place = mmap.mmap(-1, 4 * CHUNK)
    at = -(-address_of(place) // CHUNK) * CHUNK
    fixed = mmap.MAP_SHARED | MAP_FIXED
    for step, size in enumerate((CHUNK, PAGE, 2 * CHUNK, 9 * PAGE, CHUNK, 2 * CHUNK)):
        item = raw.alloc(size, flags=HUGE)
        assert libc.mmap(at, size, READ | WRITE, fixed, raw.fd, item.offset) == at
        assert ctypes.string_at(at, size) == bytes(size)
        ctypes.memset(at, step + 1, size)
        own = raw.map_tensor(item)
        assert own[:] == bytes([step + 1]) * size
        own.close()
        assert raw.free(item.handle) == 0
        assert dies(lambda: ctypes.string_at(at, 1)) == signal.SIGBUS
    place.close()


def test_touched_while_freed_and_allocated(raw: Raw) -> None:
    """Four threads read and write blocks that come and go: zeros, data, or EFAULT, and no other end."""
    window = raw.map_window()
    base = raw.alloc(2 * CHUNK, flags=HUGE)
    offset, address = base.offset, address_of(window)
    assert raw.free(base.handle) == 0
    end = threading.Event()
    failures: list[object] = []
    through = [0] * 4

    def reach(slot: int) -> None:
        copy = os.memfd_create("copy")
        buffer = ctypes.create_string_buffer(PAGE)
        local, ours = Iovec(ctypes.addressof(buffer), PAGE), os.getpid()
        view = memoryview(window)
        dice = random.Random(slot)
        while not end.is_set():
            at = offset + dice.randrange(2 * CHUNK // PAGE) * PAGE
            remote = Iovec(address + at, PAGE)
            arguments = (ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
            try:
                if slot % 2:  # a fault of the kernel's
                    os.pwrite(copy, view[at : at + PAGE], 0)
                    seen = set(os.pread(copy, PAGE, 0))
                elif libc.process_vm_readv(ours, *arguments) == PAGE:  # get_user_pages
                    seen = set(buffer.raw)
                else:
                    raise OSError(ctypes.get_errno(), "process_vm_readv")
            except OSError as error:
                if error.errno != errno.EFAULT:
                    failures.append(error)
                continue
            if not seen <= {0, 7}:
                failures.append(seen)
            through[slot] += 1
        os.close(copy)
        view.release()

    threads = [threading.Thread(target=reach, args=(slot,)) for slot in range(4)]
    for thread in threads:
        thread.start()
    stop = time.monotonic() + 20
    for step in range(200):
        item = raw.alloc(2 * CHUNK, flags=HUGE if step % 5 else PAGED)
        if item.offset == offset:
            window[offset : offset + CHUNK + PAGE] = b"\7" * (CHUNK + PAGE)
        assert raw.free(item.handle) == 0
        if time.monotonic() > stop and step > 20 and all(through):
            break
    end.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert all(through), "a reader never got through"
    window.close()


def churn(seed: int) -> None:
    """Map, touch, split, pin and free blocks until killed."""
    dice = random.Random(seed)
    client = Raw()
    window = client.map_window()
    address = address_of(window)
    while True:
        items = [client.alloc(dice.choice((CHUNK, CHUNK + PAGE, 2 * CHUNK)), flags=HUGE)
                 for _ in range(dice.randrange(1, 4))]  # fmt: skip
        for item in items:
            window[item.offset + dice.randrange(item.size)] = 1
            if dice.random() < 0.5:
                libc.mprotect(address + item.offset, PAGE, READ)
                libc.mprotect(address + item.offset, PAGE, READ | WRITE)
            if dice.random() < 0.5:
                own = client.map_tensor(item)
                touch(own)
                let_go(hold(address_of(own), 2 * PAGE))
                own.close()
        for item in items:
            assert client.free(item.handle) == 0


def test_sigkill_at_random_moments() -> None:
    dice = random.Random(11)
    for _ in range(12):
        killed_at_random(churn, dice, 0.05, 0.5)
        assert settled(dict.fromkeys(USAGE, 0)) == dict.fromkeys(USAGE, 0)


@needs_blocks
def test_a_block_needs_a_whole_chunk_of_the_system(raw: Raw, settings: None) -> None:
    """Chunks that the buddy pool had are split; as blocks they are asked for again."""
    assert write("chunk/reserve", 0) == 0
    assert write("chunk/capacity", 0) == 0
    assert write("chunk/capacity", 4) == 0
    small = [raw.alloc(CHUNK // 2) for _ in range(8)]
    assert read("buddy/chunks") == 4
    assert raw.free_batch([item.handle for item in small])[0] == 0
    recast = read("chunk/recast")
    item = raw.alloc(4 * CHUNK, flags=HUGE)
    assert read("chunk/recast") == recast + 4
    assert raw.query(item.handle)[1].mapping == BLOCK
    mapping = raw.map_tensor(item)
    assert mapping[:] == bytes(4 * CHUNK)
    mapping.close()


@pytest.mark.parametrize("size", [PAGE, 75 * PAGE, CHUNK + 3 * PAGE])
def test_a_chunk_that_is_part_used_is_no_block(raw: Raw, size: int) -> None:
    """A tensor of the chunk pool holds whole chunks; the rest of its last one is not in the window."""
    window = raw.map_window()
    items = []
    for value in range(4):
        result, item = raw.try_alloc(size, abi.Kind.WEIGHTS, abi.Pool.CHUNK, flags=HUGE)
        assert result == 0
        window[item.offset : item.offset + size] = bytes([value + 1]) * size
        items.append(item)
    for value, item in enumerate(items):
        assert window[item.offset : item.offset + size] == bytes([value + 1]) * size
        own = raw.map_tensor(item)
        assert own[:size] == bytes([value + 1]) * size
        own.close()
    first, rest = items[0], items[1:]
    assert raw.free(first.handle) == 0
    for value, item in enumerate(rest, 1):
        assert window[item.offset : item.offset + size] == bytes([value + 1]) * size
    assert dies(lambda: window[first.offset]) == signal.SIGBUS
    assert dies(lambda: window[rest[-1].offset + size]) in (signal.SIGBUS, 0)
    window.close()


def test_a_fork_never_keeps_a_block_that_was_freed(raw: Raw) -> None:
    """Blocks are freed and given to others while processes fork: nobody sees another's bytes."""
    window = raw.map_window()
    stop = threading.Event()
    failures = []

    def forks() -> None:
        while not stop.is_set():
            pid = os.fork()
            if pid == 0:
                os._exit(0)
            if os.waitpid(pid, 0)[1]:
                failures.append("a child failed")

    forker = threading.Thread(target=forks)
    forker.start()
    try:
        with Raw() as other:
            theirs = other.map_window()
            for turn in range(30 if KASAN else 60):
                result, item = raw.try_alloc(4 * CHUNK, abi.Kind.WEIGHTS, flags=HUGE)
                assert result == 0
                for at in range(0, 4 * CHUNK, CHUNK):
                    window[item.offset + at] = 0xA5
                pid = os.fork()
                if pid == 0:
                    # what was freed is gone here too, or still what it was: never theirs
                    time.sleep(0.05)
                    signal.signal(signal.SIGBUS, signal.SIG_DFL)
                    os._exit(window[item.offset] not in (0, 0xA5))
                assert raw.free(item.handle) == 0
                mine = other.alloc(4 * CHUNK, abi.Kind.WEIGHTS)
                for at in range(0, 4 * CHUNK, CHUNK):
                    assert theirs[mine.offset + at] == 0, turn
                    theirs[mine.offset + at] = 0x5A
                status = os.waitpid(pid, 0)[1]
                assert status in (0, signal.SIGBUS), (turn, status)
                assert other.free(mine.handle) == 0
            theirs.close()
    finally:
        stop.set()
        forker.join()
    assert not failures
    window.close()
    end = time.monotonic() + 10
    while read("chunk/quarantined"):
        assert time.monotonic() < end, "what waited for a fork waits still"
        time.sleep(0.05)
