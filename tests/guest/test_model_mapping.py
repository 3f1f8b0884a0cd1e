# SPDX-License-Identifier: MIT
"""A generation is a read-only file: read, seek, map, pin; whole chunks are mapped as blocks."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_huge import BLOCK, BLOCKS, UNHUGE

from device import (
    CHUNK,
    KASAN,
    PAGE,
    Generation,
    Raw,
    Slot,
    address_of,
    becomes,
    events,
    read,
    round_up,
    wait_for,
    weights,
)
from process import FAILED, Faults, Iovec, dies, hold, let_go, libc, readable, status_of, writable
from tensormem import abi

READ, WRITE, EXEC = mmap.PROT_READ, mmap.PROT_WRITE, mmap.PROT_EXEC
SHARED, PRIVATE = mmap.MAP_SHARED, mmap.MAP_PRIVATE
MAP_FIXED, MREMAP_MAYMOVE, MREMAP_FIXED = 0x10, 1, 2
MADV_COLD, MADV_PAGEOUT, MADV_POPULATE_READ, MADV_POPULATE_WRITE = 20, 21, 22, 23
SEEK_DATA, SEEK_HOLE = 3, 4

SIZE = 3 * CHUNK + 5 * PAGE + 7
LENGTH = round_up(SIZE, PAGE)
DATA = weights("mapped", SIZE)
both = pytest.mark.parametrize("kind", [SHARED, PRIVATE], ids=["shared", "private"])


@pytest.fixture
def gen(slot: Slot) -> Iterator[Generation]:
    slot.swap(DATA)
    with slot.acquire() as reader:
        yield reader


def at_of(gen: Generation, length: int = LENGTH, offset: int = 0, prot: int = READ, flags: int = SHARED) -> int:
    """A mapping by its address, for what mmap objects cannot do."""
    at = libc.mmap(None, length, prot, flags, gen.fd, offset)
    assert at != FAILED, ctypes.get_errno()
    return at


def string(at: int, length: int) -> bytes:
    return ctypes.string_at(at, length)


def bytes_at(at: int, length: int) -> memoryview:
    """Memory for the kernel to read, or to try and write."""
    return memoryview((ctypes.c_char * length).from_address(at)).cast("B")


def map_errno(gen: Generation, length: int, offset: int, prot: int = READ, flags: int = SHARED) -> int:
    """Why it cannot be mapped so; the mmap module has an opinion of its own on files' ends."""
    at = libc.mmap(None, length, prot, flags, gen.fd, offset)
    if at == FAILED:
        return ctypes.get_errno()
    assert libc.munmap(at, length) == 0
    return 0


# Reading


def test_read_and_seek(gen: Generation) -> None:
    fd = gen.fd
    assert os.lseek(fd, 0, os.SEEK_CUR) == 0
    assert os.read(fd, 10) == DATA[:10]
    assert os.lseek(fd, 0, os.SEEK_CUR) == 10
    assert os.lseek(fd, CHUNK - 3, os.SEEK_SET) == CHUNK - 3
    assert os.read(fd, 6) == DATA[CHUNK - 3 : CHUNK + 3]
    assert os.lseek(fd, -4, os.SEEK_END) == SIZE - 4
    assert os.read(fd, 100) == DATA[-4:]
    assert os.read(fd, 100) == b""
    assert os.lseek(fd, 1000, os.SEEK_END) == SIZE + 1000
    assert os.read(fd, 1) == b""
    for offset, whence in ((-1, os.SEEK_SET), (-SIZE - 1, os.SEEK_END), (0, 9)):
        with pytest.raises(OSError, match="Invalid argument"):
            os.lseek(fd, offset, whence)
    assert os.pread(fd, SIZE, 0)[:100] == DATA[:100]
    assert os.pread(fd, 1, SIZE) == os.pread(fd, 1, SIZE + CHUNK) == os.pread(fd, 1, 1 << 62) == b""
    assert os.pread(fd, 0, 0) == b""
    with pytest.raises(OSError, match="Invalid argument"):
        os.pread(fd, 1, -1)


def test_reads_of_any_length_anywhere(gen: Generation) -> None:
    dice = random.Random(1)
    edges = [0, PAGE, CHUNK, 2 * CHUNK, 3 * CHUNK, 3 * CHUNK + 4 * PAGE, SIZE]
    for _ in range(300):
        at = max(0, min(SIZE, dice.choice(edges) + dice.randrange(-5, 6)))
        length = dice.choice((1, 2, 7, PAGE, PAGE + 1, CHUNK, CHUNK + 1, SIZE))
        data = os.pread(gen.fd, length, at)
        assert data == DATA[at : at + len(data)]
        assert len(data) == min(length, SIZE - at)
    parts = [bytearray(n) for n in (1, PAGE, 0, CHUNK, 3)]
    assert os.preadv(gen.fd, parts, 5) == sum(map(len, parts))
    assert b"".join(parts) == DATA[5 : 5 + sum(map(len, parts))]


def test_a_read_into_what_is_not_there(gen: Generation) -> None:
    """EFAULT, or the bytes up to it."""
    place = mmap.mmap(-1, 2 * PAGE)
    address = address_of(place)
    assert libc.mprotect(address + PAGE, PAGE, 0) == 0
    libc.pread.restype = ctypes.c_ssize_t
    assert libc.pread(gen.fd, ctypes.c_void_p(address + PAGE), ctypes.c_size_t(10), ctypes.c_long(0)) == -1
    assert ctypes.get_errno() == errno.EFAULT
    count = libc.pread(gen.fd, ctypes.c_void_p(address + PAGE - 9), ctypes.c_size_t(100), ctypes.c_long(CHUNK - 4))
    # the kernel copies some bytes at a time
    assert 0 < count <= 9
    assert place[PAGE - 9 : PAGE - 9 + count] == DATA[CHUNK - 4 : CHUNK - 4 + count]


def test_copies_by_the_kernel(gen: Generation) -> None:
    """sendfile, splice, copy_file_range: where they work, they copy what is there."""
    for copy in (
        lambda out: os.sendfile(out, gen.fd, CHUNK - 10, PAGE),
        lambda out: os.copy_file_range(gen.fd, out, PAGE, CHUNK - 10),
    ):
        out = os.memfd_create("copy")
        code = count = 0
        try:
            count = copy(out)
        except OSError as error:
            code = error.errno or -1
        assert count > 0 or code in (errno.EINVAL, errno.EXDEV, errno.EOPNOTSUPP)
        assert os.pread(out, PAGE, 0) == DATA[CHUNK - 10 : CHUNK - 10 + count]
        os.close(out)


def test_the_place_in_the_file_is_the_descriptors(slot: Slot, gen: Generation) -> None:
    with slot.acquire() as other:
        assert os.read(gen.fd, 3) == os.read(other.fd, 3) == DATA[:3]
        copy = os.dup(gen.fd)
        assert os.read(copy, 3) == DATA[3:6]
        assert os.read(gen.fd, 3) == DATA[6:9]
        assert os.read(other.fd, 3) == DATA[3:6]
        os.close(copy)


# Mapping


@both
def test_all_of_it(gen: Generation, kind: int) -> None:
    view = gen.view(flags=kind)
    assert view[:] == DATA
    view.close()
    at = at_of(gen, flags=kind)
    assert string(at, LENGTH) == DATA + bytes(LENGTH - SIZE)
    assert libc.munmap(at, LENGTH) == 0


@both
def test_parts(gen: Generation, kind: int) -> None:
    padded = DATA + bytes(LENGTH - SIZE)
    for offset, length in ((0, PAGE), (PAGE, PAGE), (CHUNK, CHUNK), (CHUNK - PAGE, 2 * PAGE), (PAGE, CHUNK),
                           (CHUNK + PAGE, CHUNK), (2 * CHUNK, LENGTH - 2 * CHUNK), (3 * CHUNK, 5 * PAGE),
                           (LENGTH - PAGE, PAGE), (3 * CHUNK - PAGE, 3 * PAGE), (0, 3 * CHUNK)):  # fmt: skip
        at = at_of(gen, length, offset, flags=kind)
        assert string(at, length) == padded[offset : offset + length], (offset, length)
        assert libc.munmap(at, length) == 0


@both
def test_beyond_the_end(gen: Generation, kind: int) -> None:
    for length, offset in ((LENGTH + PAGE, 0), (PAGE, LENGTH), (2 * PAGE, LENGTH - PAGE), (PAGE, 4 * CHUNK),
                           (PAGE, 1 << 40), (4 * CHUNK, 0), (PAGE, (1 << 62) // PAGE * PAGE)):  # fmt: skip
        assert map_errno(gen, length, offset, prot=READ, flags=kind) in (errno.EINVAL, errno.EOVERFLOW)
    assert map_errno(gen, LENGTH - PAGE + 1, PAGE, prot=READ, flags=kind) == errno.EINVAL
    assert libc.mmap(None, PAGE, READ, kind, gen.fd, 1) == FAILED
    assert ctypes.get_errno() == errno.EINVAL


@both
def test_nobody_writes(gen: Generation, kind: int) -> None:
    for prot in (READ | WRITE, WRITE):
        assert map_errno(gen, PAGE, 0, prot=prot, flags=kind) == errno.EACCES
    at = at_of(gen, flags=kind)
    for prot in (READ | WRITE, WRITE):
        for start, length in ((0, PAGE), (CHUNK, CHUNK), (0, LENGTH)):
            assert libc.mprotect(at + start, length, prot) == -1
            assert ctypes.get_errno() == errno.EACCES
    assert dies(lambda: ctypes.memset(at, 0, 1)) == signal.SIGSEGV
    assert dies(lambda: ctypes.memset(at + CHUNK + 5, 0, 1)) == signal.SIGSEGV
    # what goes around the page tables' protection
    mem = os.open("/proc/self/mem", os.O_RDWR)
    for where in (0, PAGE, CHUNK - 1, 3 * CHUNK, SIZE - 1):
        with pytest.raises(OSError, match="Input/output error"):
            os.pwrite(mem, b"X", at + where)
        assert os.pread(mem, 1, at + where) == DATA[where : where + 1]
    os.close(mem)
    local = ctypes.create_string_buffer(b"X" * PAGE)
    vectors = Iovec(ctypes.addressof(local), PAGE), Iovec(at, PAGE)
    arguments = (ctypes.byref(vectors[0]), 1, ctypes.byref(vectors[1]), 1, 0)
    assert libc.process_vm_writev(os.getpid(), *arguments) == -1
    assert ctypes.get_errno() == errno.EFAULT
    assert not writable(bytes_at(at, PAGE))
    assert not writable(bytes_at(at + CHUNK, CHUNK))
    assert libc.madvise(at, LENGTH, MADV_POPULATE_WRITE) == -1
    assert string(at, SIZE) == gen.contents() == DATA
    libc.munmap(at, LENGTH)


@both
def test_nobody_executes(gen: Generation, kind: int) -> None:
    for prot in (READ | EXEC, EXEC):
        assert map_errno(gen, PAGE, 0, prot=prot, flags=kind) == errno.EPERM
    assert map_errno(gen, PAGE, 0, prot=READ | WRITE | EXEC, flags=kind) in (errno.EPERM, errno.EACCES)
    at = at_of(gen, flags=kind)
    assert libc.mprotect(at, PAGE, READ | EXEC) == -1
    assert ctypes.get_errno() == errno.EACCES
    libc.munmap(at, LENGTH)


def test_ptrace_does_not_write_either(gen: Generation) -> None:
    """A debugger's breakpoint would be in every reader's memory."""
    at = at_of(gen, flags=PRIVATE)
    PTRACE_TRACEME, PTRACE_POKEDATA = 0, 5
    libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    libc.ptrace.restype = ctypes.c_long
    pid = os.fork()
    if pid == 0:
        libc.ptrace(PTRACE_TRACEME, 0, None, None)
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(0)
    assert os.WIFSTOPPED(os.waitpid(pid, 0)[1])
    assert libc.ptrace(PTRACE_POKEDATA, pid, at, 0) == -1
    assert ctypes.get_errno() in (errno.EIO, errno.EFAULT)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert string(at, SIZE) == DATA
    libc.munmap(at, LENGTH)


def test_protections_come_and_go(gen: Generation) -> None:
    at = at_of(gen)
    assert string(at, SIZE) == DATA
    for start, length in ((PAGE, PAGE), (CHUNK, CHUNK), (CHUNK // 2, CHUNK)):
        assert libc.mprotect(at + start, length, 0) == 0
        assert dies(lambda start=start: string(at + start, 1)) == signal.SIGSEGV
        assert string(at, start) == DATA[:start]
        assert string(at + start + length, SIZE - start - length) == DATA[start + length :]
        assert libc.mprotect(at + start, length, READ) == 0
        assert string(at, SIZE) == DATA
    libc.munmap(at, LENGTH)


@both
def test_advice_never_costs_data(gen: Generation, kind: int) -> None:
    at = at_of(gen, flags=kind)
    for advice in (*range(26), mmap.MADV_DONTNEED):
        if advice in (10, 11, 18, 19):  # about fork
            continue
        for start, length in ((PAGE, 3 * PAGE), (CHUNK - PAGE, 2 * PAGE), (0, CHUNK), (0, LENGTH)):
            libc.madvise(at + start, length, advice)
            assert string(at, SIZE) == DATA, (advice, start)
    assert libc.madvise(at, LENGTH, mmap.MADV_DONTNEED) == 0
    assert string(at, SIZE) == DATA
    libc.munmap(at, LENGTH)


def test_mremap(gen: Generation) -> None:
    """Shrinks; where it moves or grows it shows the right bytes and nothing behind the end."""
    at = at_of(gen, length=2 * CHUNK)
    assert string(at, 2 * CHUNK) == DATA[: 2 * CHUNK]
    assert libc.mremap(at, 2 * CHUNK, CHUNK + PAGE, 0) == at
    assert string(at, CHUNK + PAGE) == DATA[: CHUNK + PAGE]
    assert dies(lambda: string(at + CHUNK + PAGE, 1)) == signal.SIGSEGV
    length = CHUNK + PAGE
    for wanted in (2 * CHUNK, LENGTH + PAGE, 8 * CHUNK):
        now = libc.mremap(at, length, wanted, MREMAP_MAYMOVE)
        if now == FAILED:
            assert ctypes.get_errno() in (errno.EFAULT, errno.EINVAL)
        else:
            at, length = now, wanted
        assert string(at, min(length, SIZE)) == DATA[:length]
        if length > LENGTH:
            assert dies(lambda a=at: string(a + LENGTH, 1)) == signal.SIGBUS
    libc.munmap(at, length)


def test_fixed_addresses(gen: Generation) -> None:
    """One at which blocks do not line up works all the same; the kernel picks those at which they do."""
    place = mmap.mmap(-1, 6 * CHUNK)
    for skew in (0, PAGE, CHUNK // 2 + PAGE):
        address = round_up(address_of(place), CHUNK) + skew
        assert libc.mmap(address, LENGTH, READ, SHARED | MAP_FIXED, gen.fd, 0) == address
        assert string(address, SIZE) == DATA
        assert readable(bytes_at(address, LENGTH))
    for offset in (0, PAGE, CHUNK):
        at = at_of(gen, LENGTH - offset, offset)
        assert (at - offset) % CHUNK == 0
        libc.munmap(at, LENGTH - offset)
    place.close()


def test_fork(gen: Generation) -> None:
    at = at_of(gen)
    half = CHUNK + CHUNK // 2
    assert string(at, half) == DATA[:half]

    def child() -> None:
        assert string(at, SIZE) == DATA
        assert libc.munmap(at, CHUNK) == 0
        assert gen.contents() == DATA
        gen.close()
        assert string(at + CHUNK, SIZE - CHUNK) == DATA[CHUNK:]

    assert status_of(child) == 0
    assert string(at, SIZE) == DATA
    libc.munmap(at, LENGTH)


def test_a_childs_mapping_keeps_the_generation(slot: Slot) -> None:
    """Parents close, unmap and swap; who was forked reads on."""
    slot.swap(DATA)
    gen = slot.acquire()
    at = at_of(gen)
    go, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(tell)
        os.read(go, 1)
        gen.close()
        os._exit(string(at, SIZE) != DATA)
    gen.close()
    libc.munmap(at, LENGTH)
    for number in (2, 3):
        slot.swap(weights(number, PAGE))
    assert slot.told()[1] == "retired"
    os.close(tell)
    assert os.waitpid(pid, 0)[1] == 0
    wait_for(lambda: 1 not in slot.told())
    becomes("chunk/used", 0)
    os.close(go)


def test_mlock(gen: Generation) -> None:
    at = at_of(gen)
    for call in (libc.mlock, libc.munlock):
        assert call(ctypes.c_void_p(at + PAGE), ctypes.c_size_t(CHUNK)) == 0
        assert string(at, SIZE) == DATA
    libc.munmap(at, LENGTH)


def test_what_proc_tells(gen: Generation) -> None:
    at = at_of(gen)
    assert string(at, SIZE) == DATA
    for name in ("smaps", "smaps_rollup", "numa_maps", "maps"):
        path = Path("/proc/self", name)
        assert not path.exists() or path.read_text()
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        pagemap.seek(at // PAGE * 8)
        assert len(pagemap.read(LENGTH // PAGE * 8)) == LENGTH // PAGE * 8
    for what in "12345":
        try:
            Path("/proc/self/clear_refs").write_text(what)
        except OSError:
            continue
        assert string(at, SIZE) == DATA, what
    libc.munmap(at, LENGTH)


def test_while_it_is_loaded(slot: Slot) -> None:
    """It may be mapped; a touch is SIGBUS until all is there, then the bytes."""
    fd = os.memfd_create("slow")
    os.truncate(fd, 100 * CHUNK)
    with slot.stage(fd, abi.StageFlag.VERIFY) as gen:
        at = at_of(gen, 2 * CHUNK)
        wait_for(lambda: gen.info().loaded >= CHUNK)
        assert gen.state() == abi.ModelState.LOADING
        assert dies(lambda: string(at, 1)) == signal.SIGBUS
        assert not readable(bytes_at(at, PAGE))
        assert slot.abort(gen.number) == 0
        assert dies(lambda: string(at, 1)) == signal.SIGBUS
        assert libc.munmap(at, 2 * CHUNK) == 0
    with slot.stage(fd, size=2 * CHUNK + PAGE) as gen:
        view = gen.view()
        gen.loaded()
        assert view[:] == bytes(2 * CHUNK + PAGE)
        view.close()
    os.close(fd)


def test_one_that_failed_is_not_mapped(slot: Slot) -> None:
    fd = os.memfd_create("bad")
    os.truncate(fd, CHUNK)
    with slot.stage(fd, abi.StageFlag.VERIFY) as gen:
        assert gen.failed() == errno.EBADMSG
        result = map_errno(gen, CHUNK, 0)
        assert result in (0, errno.ESTALE)
        if result == 0:
            at = at_of(gen, CHUNK)
            assert dies(lambda: string(at, 1)) == signal.SIGBUS
            assert libc.munmap(at, CHUNK) == 0
    os.close(fd)


# How many faults


def faults() -> list[int]:
    return [int(event["mapped"]) for event in events("model_fault")]


def test_faults_of_a_first_pass(slot: Slot, trace: None) -> None:
    """A chunk at a time, whatever is touched first; nothing is left to fault after that."""
    total = 16
    slot.swap(weights("few", CHUNK) * total)
    with slot.acquire() as gen:
        assert gen.info().mapping == (BLOCK if BLOCKS else UNHUGE)
        at = at_of(gen, total * CHUNK)
        with Faults(at, total * CHUNK) as first:
            assert len(string(at, total * CHUNK)) == total * CHUNK
        assert len(first) == len(faults()) <= total
        assert sum(faults()) == total * CHUNK // PAGE
        if BLOCKS:
            assert faults() == [CHUNK // PAGE] * total
        with Faults(at, total * CHUNK) as second:
            assert len(string(at, total * CHUNK)) == total * CHUNK
        assert not second.addresses
        libc.munmap(at, total * CHUNK)


@pytest.mark.parametrize("tail", [1, PAGE, 5 * PAGE + 1, CHUNK - PAGE, CHUNK - 1])
def test_the_tail_is_mapped_by_pages(slot: Slot, trace: None, tail: int) -> None:
    slot.swap(weights(tail, CHUNK + tail))
    with slot.acquire() as gen:
        view = gen.view()
        assert view[:] == weights(tail, CHUNK + tail)
        assert sum(faults()) == -(-len(view) // PAGE)
        if PAGE == 4096 and BLOCKS:
            assert faults()[0] == CHUNK // PAGE
        view.close()


def test_populate(slot: Slot, gen: Generation, trace: None) -> None:
    view = gen.view(flags=SHARED | mmap.MAP_POPULATE)
    populated = faults()
    assert sum(populated) == LENGTH // PAGE
    assert view[:SIZE] == DATA
    assert faults() == populated
    view.close()


def test_shared_chunks_are_mapped_as_any_other(slot: Slot, trace: None) -> None:
    data = weights("a", 4 * CHUNK)
    slot.swap(data)
    changed = data[:CHUNK] + weights("b", CHUNK) + data[2 * CHUNK :]
    with slot.acquire() as old, slot.load(changed) as new:
        assert new.memory() == (CHUNK, 3 * CHUNK)
        views = old.view(), new.view()
        assert views[0][:] == data
        assert views[1][:] == changed
        assert sum(faults()) == 8 * CHUNK // PAGE
        assert len(faults()) <= 8
        for view in views:
            view.close()


# Pages that others hold


def test_direct_io_from_the_mapping(gen: Generation) -> None:
    path = Path("/var/tmp/model-direct.bin")
    path.write_bytes(bytes(3 * CHUNK))
    os.sync()
    at = at_of(gen)
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    part = bytes_at(at, LENGTH)
    for start, length in ((0, PAGE), (CHUNK - PAGE, 2 * PAGE), (CHUNK, CHUNK), (0, 3 * CHUNK)):
        assert os.pwrite(fd, part[start : start + length], start) == length
        assert os.pread(gen.fd, length, start) == DATA[start : start + length]
    with pytest.raises(OSError, match="Bad address"):
        os.preadv(fd, [part[CHUNK : 2 * CHUNK]], 0)
    os.close(fd)
    assert path.read_bytes() == DATA[: 3 * CHUNK]
    path.unlink()
    assert string(at, SIZE) == DATA
    libc.munmap(at, LENGTH)


@pytest.mark.parametrize("where", [0, CHUNK - PAGE, 3 * CHUNK, 3 * CHUNK + 4 * PAGE])
@pytest.mark.parametrize("length", [PAGE, 2 * PAGE])
def test_pages_that_are_held_outlive_the_generation(
    raw: Raw, slot: Slot, settings: None, where: int, length: int
) -> None:
    """They are set aside when it dies, and nobody is given them until they are let go."""
    if where + length > LENGTH:
        length = PAGE
    slot.swap(DATA)
    gen = slot.acquire()
    at = at_of(gen)
    pipe = hold(at + where, length)
    libc.munmap(at, LENGTH)
    gen.close()
    for number in (2, 3):
        slot.swap(weights(number, PAGE))
    assert 1 not in slot.buried().told()
    becomes("model/held", 2 * PAGE)
    held = read("chunk/quarantined")
    assert length // PAGE <= held <= 2 * CHUNK // PAGE
    becomes("clients/bytes", 2 * PAGE + held * PAGE)
    # everything that can be had is somebody else's now, and the pages in the pipe are what they were
    spoil = [raw.alloc(CHUNK, abi.Kind.WEIGHTS) for _ in range(8)] + [raw.alloc(8 * PAGE) for _ in range(40)]
    for item in spoil:
        mapping = raw.map_tensor(item)
        mapping[:] = b"\xff" * len(mapping)
        mapping.close()
    assert os.read(pipe[0], length) == (DATA + bytes(PAGE))[where : where + length]
    becomes("chunk/quarantined", 0)
    let_go(pipe)
    assert raw.free_batch([item.handle for item in spoil])[0] == 0
    becomes("clients/bytes", 2 * PAGE)


def test_pages_that_are_held_of_a_chunk_that_is_shared(slot: Slot) -> None:
    """One generation dies: the chunk lives on in the other, and is freed after both and the pipe."""
    slot.swap(DATA)
    gen = slot.acquire()
    at = at_of(gen)
    pipe = hold(at + CHUNK, PAGE)
    libc.munmap(at, LENGTH)
    gen.close()
    with slot.load(DATA) as same:
        assert same.memory() == (0, LENGTH)
        assert slot.commit(same.number) == 0
    slot.swap(weights(3, PAGE))
    assert 1 not in slot.buried().told()
    becomes("chunk/quarantined", 0)
    with slot.acquire(2) as reader:
        assert reader.contents() == DATA
    slot.swap(weights(4, PAGE))
    assert slot.buried().told().keys() == {3, 4}
    becomes("chunk/quarantined", CHUNK // PAGE)
    assert os.read(pipe[0], PAGE) == DATA[CHUNK : CHUNK + PAGE]
    becomes("chunk/quarantined", 0)
    let_go(pipe)


def test_removed_under_a_mapping_that_is_pinned(raw: Raw, slot: Slot) -> None:
    slot.swap(DATA)
    gen = slot.acquire()
    at = at_of(gen)
    pipe = hold(at, 4 * PAGE)
    assert slot.remove() == 0
    assert string(at, SIZE) == DATA
    libc.munmap(at, LENGTH)
    gen.close()
    becomes("model/held", 0)
    assert os.read(pipe[0], 4 * PAGE) == DATA[: 4 * PAGE]
    let_go(pipe)
    becomes("chunk/quarantined", 0)


# Many at once


def test_threads_fault_the_same_chunk(slot: Slot) -> None:
    slot.swap(DATA)
    for _ in range(10):
        with slot.acquire() as gen:
            view = gen.view()
            barrier = threading.Barrier(4)
            failures: list[int] = []

            def work(seed: int, gate: threading.Barrier = barrier, seen: mmap.mmap = view,
                     told: list[int] = failures) -> None:  # fmt: skip
                dice = random.Random(seed)
                gate.wait()
                for _ in range(50):
                    at = dice.randrange(SIZE - 64)
                    if seen[at : at + 64] != DATA[at : at + 64]:
                        told.append(at)

            threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not failures
            view.close()


def test_maps_and_faults_race_with_swaps(slot: Slot) -> None:
    """What is acquired is seen as a whole, whatever becomes of the slot meanwhile."""
    models = [weights(i, CHUNK + (i + 1) * PAGE) for i in range(3)]
    for model in models[:2]:
        slot.swap(model)
    stop = mmap.mmap(-1, PAGE)
    children = []
    for number in range(3):
        pid = os.fork()
        if pid == 0:
            bad = rounds = 0
            while not stop[0]:
                with slot.acquire() as gen:
                    size = gen.info().size
                    view = gen.view()
                    bad += view[:size] != models[(size - CHUNK) // PAGE - 1]
                    view.close()
                rounds += 1
            stop[number + 1] = min(rounds, 255)
            os._exit(bad != 0)
        children.append(pid)
    for turn in range(20 if KASAN else 60):
        slot.swap(models[turn % 3])
        if turn % 4 == 3:
            assert slot.rollback()[0] == 0
    stop[0] = 1
    for pid in children:
        assert os.waitpid(pid, 0)[1] == 0
    assert all(stop[1:4]), "a reader never got through"
    stop.close()
