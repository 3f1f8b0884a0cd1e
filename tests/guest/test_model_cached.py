# SPDX-License-Identifier: MIT
"""A cached generation: as good as its file while nobody changes that, and never silently wrong."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import mmap
import os
import random
import re
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from device import CHUNK, KASAN, PAGE, Generation, Raw, Slot, becomes, file_of, read, round_up, wait_for, weights
from process import FAILED, Faults, Iovec, dies, let_go, libc, status_of
from tensormem import abi

CACHED, VERIFY, KEEP = abi.StageFlag.CACHED, abi.StageFlag.VERIFY, abi.StageFlag.KEEP
State = abi.ModelState
READ, WRITE, EXEC = mmap.PROT_READ, mmap.PROT_WRITE, mmap.PROT_EXEC
SHARED, PRIVATE = mmap.MAP_SHARED, mmap.MAP_PRIVATE
IN, PRI, ERR = select.POLLIN, select.POLLPRI, select.POLLERR

SIZE = 2 * CHUNK + 5 * PAGE + 7
DATA = weights("cached", SIZE)
PLACES = {"tmpfs": Path("/tmp/cached.bin"), "ext4": Path("/var/tmp/cached.bin")}


# what a file system does differently shows on stock kernels, at a tenth of the time
@pytest.fixture(params=["tmpfs"] if KASAN else PLACES)
def path(request: pytest.FixtureRequest) -> Iterator[Path]:
    where = PLACES[request.param]
    where.write_bytes(DATA)
    yield where
    where.unlink(missing_ok=True)


def stage(slot: Slot, path: Path, flags: int = 0, **fields: int | bytes) -> Generation:
    fd = os.open(path, os.O_RDONLY)
    try:
        return slot.stage(fd, CACHED | flags, **fields)
    finally:
        os.close(fd)


@pytest.fixture
def gen(slot: Slot, path: Path) -> Iterator[Generation]:
    """The active generation, in @path."""
    with stage(slot, path) as staged:
        assert slot.commit(staged.loaded().number) == 0
    with slot.acquire() as reader:
        yield reader


def at_of(gen: Generation, length: int = SIZE, offset: int = 0) -> int:
    at = libc.mmap(None, length, READ, SHARED, gen.fd, offset)
    assert at != FAILED, ctypes.get_errno()
    return at


def string(at: int, length: int) -> bytes:
    return ctypes.string_at(at, length)


def evict(path: Path) -> None:
    """All of the file's pages that can be, out of the page cache."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    Path("/proc/sys/vm/drop_caches").write_text("1")


def resident(path: Path) -> int:
    """Pages of the file in the page cache."""
    fd = os.open(path, os.O_RDONLY)
    size = os.fstat(fd).st_size
    at = libc.mmap(None, size, READ, SHARED, fd, 0)
    os.close(fd)
    vector = (ctypes.c_ubyte * (round_up(size, PAGE) // PAGE))()
    assert libc.mincore(ctypes.c_void_p(at), ctypes.c_size_t(size), vector) == 0
    assert libc.munmap(at, size) == 0
    return sum(entry & 1 for entry in vector)


def broken(gen: Generation) -> None:
    """It has failed for good: SIGBUS, ESTALE, POLLERR, and the slot says so."""
    wait_for(lambda: gen.events() & ERR)
    info = gen.info()
    assert (info.state, info.error) == (State.FAILED, errno.ETXTBSY)
    assert gen.events() & IN
    for call in (lambda: os.read(gen.fd, 1), lambda: os.pread(gen.fd, PAGE, CHUNK), lambda: os.pread(gen.fd, 1, 0)):
        with pytest.raises(OSError, match=r".") as refusal:
            call()
        assert refusal.value.errno == errno.ESTALE
    at = libc.mmap(None, PAGE, READ, SHARED, gen.fd, 0)
    if at == FAILED:
        assert ctypes.get_errno() == errno.ESTALE
    else:
        assert dies(lambda: string(at, 1)) == signal.SIGBUS
        assert libc.munmap(at, PAGE) == 0


# As good as its file


@pytest.mark.parametrize("size", [1, PAGE - 1, PAGE, CHUNK, CHUNK + 1, 2 * CHUNK - 1])
@pytest.mark.parametrize("flags", [0, VERIFY])
def test_contents(slot: Slot, path: Path, size: int, flags: int) -> None:
    data = weights(size, size)
    path.write_bytes(data)
    with stage(slot, path, flags, sha256=hashlib.sha256(data).digest() if flags else b"") as gen:
        info = gen.loaded().info()
        assert (info.size, info.loaded, info.flags) == (size, size, CACHED | flags)
        assert gen.memory() == (0, 0)
        assert read("model/held") == read("clients/bytes") == 0
        assert slot.read("1/cached") == 1
        assert gen.contents() == data
        view = gen.view()
        assert view[:] == data
        view.close()
        assert gen.behind() == bytes(-size % PAGE)
        assert slot.commit(gen.number) == 0
    with slot.acquire() as reader:
        assert reader.contents() == data


@pytest.mark.parametrize("offset", [0, PAGE, CHUNK, 2 * CHUNK])
@pytest.mark.parametrize("size", [0, 1, PAGE + 3])
def test_a_part_of_a_file(slot: Slot, path: Path, offset: int, size: int) -> None:
    expected = DATA[offset : offset + size] if size else DATA[offset:]
    with stage(slot, path, offset=offset, size=size) as gen:
        assert gen.loaded().contents() == expected
        view = gen.view()
        assert view[:] == expected
        view.close()
        assert os.pread(gen.fd, 10, len(expected)) == b""
        assert libc.mmap(None, PAGE, READ, SHARED, gen.fd, round_up(len(expected), PAGE)) == FAILED
        assert ctypes.get_errno() == errno.EINVAL


def test_an_offset_is_a_multiple_of_the_page(slot: Slot, path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    for offset in (1, 512, PAGE - 1, PAGE + 1):
        assert slot.try_stage(fd, CACHED, offset=offset)[0] == errno.EINVAL
    os.close(fd)


def test_reading_and_seeking(gen: Generation) -> None:
    dice = random.Random(1)
    for _ in range(200):
        at = max(0, min(SIZE, dice.choice((0, PAGE, CHUNK, SIZE)) + dice.randrange(-5, 6)))
        length = dice.choice((1, 7, PAGE, CHUNK + 1))
        data = os.pread(gen.fd, length, at)
        assert data == DATA[at : at + length]
    assert os.lseek(gen.fd, -4, os.SEEK_END) == SIZE - 4
    assert os.read(gen.fd, 100) == DATA[-4:]
    assert os.fstat(gen.fd).st_size == SIZE


def test_nobody_writes_or_executes(gen: Generation) -> None:
    for kind in (SHARED, PRIVATE):
        for prot, expected in ((READ | WRITE, errno.EACCES), (WRITE, errno.EACCES), (READ | EXEC, errno.EPERM)):
            assert libc.mmap(None, PAGE, prot, kind, gen.fd, 0) == FAILED
            assert ctypes.get_errno() == expected
        at = libc.mmap(None, SIZE, READ, kind, gen.fd, 0)
        assert at != FAILED
        for prot in (READ | WRITE, READ | EXEC):
            assert libc.mprotect(at, PAGE, prot) == -1
            assert ctypes.get_errno() == errno.EACCES
        mem = os.open("/proc/self/mem", os.O_RDWR)
        with pytest.raises(OSError, match="Input/output error"):
            os.pwrite(mem, b"X", at)
        os.close(mem)
        local = ctypes.create_string_buffer(b"X" * PAGE)
        vectors = Iovec(ctypes.addressof(local), PAGE), Iovec(at, PAGE)
        assert libc.process_vm_writev(os.getpid(), ctypes.byref(vectors[0]), 1, ctypes.byref(vectors[1]), 1, 0) == -1
        assert string(at, SIZE) == DATA
        libc.munmap(at, SIZE)
    with pytest.raises(OSError, match=r"."):
        os.write(gen.fd, b"x")


def test_a_wrong_checksum(slot: Slot, path: Path) -> None:
    with stage(slot, path, VERIFY, sha256=hashlib.sha256(b"").digest()) as gen:
        assert gen.failed() == errno.EBADMSG
        assert slot.commit(gen.number) == errno.ESTALE
    path.open("r+b").close()  # it is of no interest any more


def test_a_size_beyond_the_end(slot: Slot, path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    for flags in (CACHED, CACHED | VERIFY):
        result, request = slot.try_stage(fd, flags, size=SIZE + 1)
        if result == 0:
            with Generation(request.fd, request.generation) as gen:
                assert gen.failed() == errno.EBADMSG
        else:
            assert result == errno.EINVAL
    os.close(fd)


def test_it_is_evicted_and_read_again(slot: Slot) -> None:
    path = PLACES["ext4"]
    path.write_bytes(DATA)
    with stage(slot, path) as gen:
        assert slot.commit(gen.loaded().number) == 0
        evict(path)
        assert resident(path) == 0
        assert os.pread(gen.fd, 10, CHUNK) == DATA[CHUNK : CHUNK + 10]
        at = at_of(gen)
        for _ in range(3):
            assert string(at, SIZE) == DATA
            assert resident(path) == round_up(SIZE, PAGE) // PAGE
            assert libc.madvise(at, SIZE, mmap.MADV_DONTNEED) == 0
            evict(path)
            assert resident(path) == 0
        assert string(at, SIZE) == DATA
        assert gen.contents() == DATA
        libc.munmap(at, SIZE)
    path.unlink()


def test_memory_pressure_takes_what_is_mapped(slot: Slot) -> None:
    """Clean pages of a file under a mapping: gone when memory is short (MADV_PAGEOUT), and back unharmed."""
    path = PLACES["ext4"]
    path.write_bytes(DATA)
    os.sync()
    with stage(slot, path) as gen:
        at = at_of(gen.loaded())
        assert string(at, SIZE) == DATA
        libc.madvise(at, SIZE, 21)
        with Faults(at, SIZE) as faults:
            assert string(at, SIZE) == DATA
        assert faults.addresses
        libc.munmap(at, SIZE)
    path.unlink()


def test_fork_and_mremap(gen: Generation) -> None:
    at = at_of(gen)
    assert status_of(lambda: None if string(at, SIZE) == DATA else os.abort()) == 0
    assert libc.munmap(at + PAGE, CHUNK) == 0
    assert string(at, PAGE) == DATA[:PAGE]
    assert string(at + PAGE + CHUNK, SIZE - PAGE - CHUNK) == DATA[PAGE + CHUNK :]
    libc.munmap(at, SIZE)
    at = at_of(gen, PAGE)
    moved = libc.mremap(at, PAGE, 2 * PAGE, 1)
    if moved != FAILED:
        assert string(moved, PAGE) == DATA[:PAGE]
        libc.munmap(moved, 2 * PAGE)
    else:
        libc.munmap(at, PAGE)


def test_a_mapping_keeps_it(slot: Slot, path: Path) -> None:
    gen = stage(slot, path).loaded()
    at = at_of(gen)
    gen.close()
    assert slot.info().staged == 1
    assert string(at, SIZE) == DATA
    libc.munmap(at, SIZE)
    wait_for(lambda: slot.info().staged == 0)


def test_resident_and_cached_take_turns(slot: Slot, path: Path) -> None:
    assert slot.swap(DATA) == 1
    with stage(slot, path, KEEP) as gen:
        gen.loaded()
    assert slot.commit(2) == 0
    assert slot.swap(DATA) == 3  # nothing to share: the active one has no chunks
    with slot.acquire(3) as gen:
        assert gen.memory() == (round_up(SIZE, PAGE), 0)
    for number in (2, 3, 2):
        assert slot.rollback() == (0, number)
        with slot.acquire() as gen:
            assert gen.contents() == DATA
            assert bool(gen.info().flags & CACHED) == (number == 2)


# A file that cannot be


def test_a_file_that_is_open_for_writing(slot: Slot, path: Path) -> None:
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_APPEND):
        writer = os.open(path, flags)
        reader = os.open(path, os.O_RDONLY)
        assert slot.try_stage(reader, CACHED)[0] == errno.ETXTBSY
        if flags != os.O_WRONLY:
            assert slot.try_stage(writer, CACHED)[0] == errno.ETXTBSY
        os.close(writer)
        with slot.stage(reader, CACHED) as gen:
            assert gen.loaded().contents() == DATA
        os.close(reader)
    assert slot.info().staged == 0


def test_a_file_that_is_mapped_for_writing(slot: Slot, path: Path) -> None:
    """Its descriptor is closed, and it can be written all the same."""
    writer = os.open(path, os.O_RDWR)
    mapping = mmap.mmap(writer, SIZE)
    os.close(writer)
    reader = os.open(path, os.O_RDONLY)
    assert slot.try_stage(reader, CACHED)[0] == errno.ETXTBSY
    mapping.close()
    slot.stage(reader, CACHED).close()
    os.close(reader)


@pytest.mark.parametrize("name", ["/proc/version", "/sys/kernel/notes"])
def test_a_file_system_that_cannot_tell(slot: Slot, name: str) -> None:
    """Nobody opens these for writing, and they are not the same for ever."""
    fd = os.open(name, os.O_RDONLY)
    result, request = slot.try_stage(fd, CACHED, size=1)
    os.close(fd)
    if result == 0:
        with Generation(request.fd, request.generation) as gen:
            assert gen.failed() in (errno.EBADMSG, errno.EOPNOTSUPP)
    else:
        assert result in (errno.EINVAL, errno.EOPNOTSUPP)


# Its file changes


def rewrite(path: Path) -> None:
    fd = os.open(path, os.O_WRONLY)
    os.pwrite(fd, b"\xee" * SIZE, 0)
    os.close(fd)


def map_and_write(path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    mapping = mmap.mmap(fd, SIZE)
    mapping[:] = b"\xee" * SIZE
    mapping.close()
    os.close(fd)


def punch(path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    assert libc.fallocate(fd, 3, ctypes.c_long(0), ctypes.c_long(CHUNK)) == 0
    os.close(fd)


CHANGES: dict[str, Callable[[Path], None]] = {
    "write": rewrite,
    "truncate": lambda path: os.truncate(path, PAGE),
    "truncate to nothing": lambda path: os.truncate(path, 0),
    "extend": lambda path: os.truncate(path, 4 * CHUNK),
    "O_TRUNC": lambda path: os.close(os.open(path, os.O_WRONLY | os.O_TRUNC)),
    "open for writing": lambda path: os.close(os.open(path, os.O_RDWR)),
    "map": map_and_write,
    "punch": punch,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("when", ["touched", "untouched"])
def test_a_change_ends_it(slot: Slot, gen: Generation, path: Path, change: str, when: str) -> None:
    """Whoever changes it waits until nobody sees it any more; who has it learns so."""
    at = at_of(gen)
    if when == "touched":
        assert string(at, SIZE) == DATA
    CHANGES[change](path)
    broken(gen)
    for where in (0, PAGE, CHUNK, SIZE - 1):
        assert dies(lambda where=where: string(at + where, 1)) == signal.SIGBUS
    libc.munmap(at, SIZE)
    assert slot.told()[gen.number] == "failed"
    # it keeps its place: somebody has to put something else there
    assert slot.info().active == gen.number
    result, item = slot.try_acquire()
    if result == 0:
        with Generation(item.fd, item.generation) as again:
            broken(again)
    else:
        assert result == errno.ESTALE
    slot.swap(DATA)
    assert slot.places() == (2, 0, 0)  # it is nothing to go back to
    with slot.acquire() as good:
        assert good.contents() == DATA


@pytest.mark.parametrize("change", ["write", "O_TRUNC", "map"])
def test_no_changed_byte_is_ever_seen(slot: Slot, path: Path, change: str) -> None:
    """Readers compare all the time, in a mapping and by pread(): the old bytes, or none."""
    for turn in range(3 if KASAN else 8):
        path.write_bytes(DATA)
        number = slot.info().last + 1
        with stage(slot, path, KEEP) as staged:
            assert slot.commit(staged.loaded().number) == 0
        flag = mmap.mmap(-1, PAGE)
        children = []
        for how in ("map", "read", "map"):
            pid = os.fork()
            if pid == 0:
                signal.signal(signal.SIGBUS, signal.SIG_DFL)
                os._exit(compare(slot, number, how, flag, len(children) + 1))
            children.append(pid)
        wait_for(lambda flag=flag: all(flag[1:4]))
        time.sleep(0.002 * turn)
        CHANGES[change](path)
        flag[0] = 1
        endings = [os.waitpid(pid, 0)[1] for pid in children]
        assert set(endings) <= {0, int(signal.SIGBUS)}, endings
        assert slot.told()[number] == "failed"
        flag.close()


def compare(slot: Slot, number: int, how: str, flag: mmap.mmap, mine: int) -> int:
    """Until it ends as it has to: 0 for ESTALE, SIGBUS, or 3 for a byte that is wrong."""
    dice = random.Random(mine)
    gen = slot.acquire(number)
    at = at_of(gen)
    while True:
        where = dice.randrange(SIZE // PAGE) * PAGE
        ended = flag[0]
        try:
            data = string(at + where, PAGE) if how == "map" else os.pread(gen.fd, PAGE, where)
        except OSError as error:
            return 0 if error.errno == errno.ESTALE else 4
        if data != DATA[where : where + PAGE]:
            return 3
        if ended:  # the writer was let through: nothing can be seen after that
            return 5
        flag[mine] = 1


def test_a_rename_over_it_is_harmless(gen: Generation, path: Path) -> None:
    """The file has lost its name, and nothing else."""
    other = path.with_name("other.bin")
    other.write_bytes(bytes(SIZE))
    other.rename(path)
    at = at_of(gen)
    assert string(at, SIZE) == gen.contents() == DATA
    path.unlink()
    assert string(at, SIZE) == DATA
    assert gen.state() == State.ACTIVE
    libc.munmap(at, SIZE)


def test_what_is_no_change(gen: Generation, path: Path) -> None:
    """Reading it, its mode, another name: none of that is a reason to fail."""
    path.read_bytes()
    path.chmod(0o600)
    link = path.with_name("link.bin")
    os.link(path, link)
    link.unlink()
    with stage_again(gen, path):
        assert gen.state() == State.ACTIVE
        assert gen.contents() == DATA


def test_a_new_time_is_a_change(gen: Generation, path: Path) -> None:
    """It is noticed by who looks next."""
    at = at_of(gen)
    os.utime(path, ns=(1, 1))
    with pytest.raises(OSError, match="Stale"):
        os.pread(gen.fd, 1, 0)
    broken(gen)
    assert dies(lambda: string(at, 1)) == signal.SIGBUS
    libc.munmap(at, SIZE)


def stage_again(gen: Generation, path: Path) -> Generation:
    """Another slot of the same file."""
    with Raw() as raw, raw.slot("again", abi.OpenFlag.CREATE | abi.OpenFlag.WRITE, mode=0o600) as slot:
        other = stage(slot, path).loaded()
        assert slot.remove() == 0
        return other


def test_two_slots_of_one_file(raw: Raw, slot: Slot, gen: Generation, path: Path) -> None:
    with raw.slot("two", abi.OpenFlag.CREATE | abi.OpenFlag.WRITE, mode=0o600) as two:
        with stage(two, path) as other:
            assert two.commit(other.loaded().number) == 0
            assert other.contents() == gen.contents() == DATA
            rewrite(path)
            broken(gen)
            broken(other)
        assert two.remove() == 0


def test_a_change_while_it_is_verified(slot: Slot, path: Path) -> None:
    slot.swap(DATA)
    with path.open("r+b") as file:
        os.truncate(file.fileno(), 128 * CHUNK)
    with stage(slot, path, VERIFY) as gen:
        if gen.state() == State.LOADING:
            rewrite(path)
        assert gen.failed() in (errno.ETXTBSY, errno.EBADMSG)
        assert slot.commit(gen.number) == errno.ESTALE
        assert slot.abort(gen.number) == 0
    with slot.acquire() as active:
        assert active.contents() == DATA


def test_a_change_of_a_staged_and_of_a_previous_one(slot: Slot, path: Path) -> None:
    with stage(slot, path) as gen:
        gen.loaded()
        rewrite(path)
        broken(gen)
        assert slot.commit(gen.number) == errno.ESTALE
    path.write_bytes(DATA)
    with stage(slot, path, KEEP) as gen:
        assert slot.commit(gen.loaded().number) == 0
    slot.swap(DATA)
    rewrite(path)
    wait_for(lambda: slot.told()[2] == "failed")
    assert slot.rollback()[0] == errno.ESTALE
    assert slot.info().active == 3


def test_an_active_one_that_failed_is_rolled_back_from(slot: Slot, path: Path) -> None:
    slot.swap(weights("good", PAGE))
    with stage(slot, path, KEEP) as gen:
        assert slot.commit(gen.loaded().number) == 0
    rewrite(path)
    wait_for(lambda: slot.told()[2] == "failed")
    assert slot.rollback() == (0, 1)
    assert slot.places() == (1, 0, 0)
    with slot.acquire() as reader:
        assert reader.contents() == weights("good", PAGE)


def test_after_it_is_gone_its_file_is_like_any_other(slot: Slot, path: Path) -> None:
    """No lease is left: whoever writes does not wait."""
    for end in ("close", "abort", "remove"):
        gen = stage(slot, path).loaded()
        at = at_of(gen)
        assert string(at, SIZE) == DATA
        libc.munmap(at, SIZE)
        if end == "abort":
            assert slot.abort(gen.number) == 0
        elif end == "remove":
            assert slot.remove() == 0
        gen.close()
        with path.open("r+b") as file:
            file.write(DATA[:PAGE])
            os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))


def test_the_writer_does_not_wait_for_readers(gen: Generation, path: Path) -> None:
    """They may sleep or hold it for ever: it is taken from them."""
    at = at_of(gen)
    assert string(at, SIZE) == DATA
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        string(at, SIZE)
        os.write(tell, b"x")
        signal.pause()
    assert os.read(told, 1) == b"x"
    let_go((told, tell))
    begin = time.monotonic()
    rewrite(path)
    assert time.monotonic() - begin < 40  # lease-break-time is 45 s
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    broken(gen)
    libc.munmap(at, SIZE)


def test_a_writer_that_does_not_wait(gen: Generation, path: Path) -> None:
    """O_NONBLOCK: EWOULDBLOCK at first, and not for ever."""
    def opened() -> bool:
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
        except BlockingIOError:
            return False
        return True

    wait_for(opened)
    broken(gen)


def test_faults_race_with_the_end(slot: Slot, path: Path) -> None:
    """Pages that are being faulted in when the file changes are not left behind."""
    for _ in range(6):
        path.write_bytes(DATA)
        number = slot.info().last + 1
        with stage(slot, path, KEEP) as staged:
            assert slot.commit(staged.loaded().number) == 0
        gen = slot.acquire(number)
        at = at_of(gen)
        stop, seen = threading.Event(), [0]
        copy = os.memfd_create("copy")
        memory = memoryview((ctypes.c_char * SIZE).from_address(at)).cast("B")
        wrong: list[int] = []

        def reach(where: int = at, target: int = copy, part: memoryview = memory, bad: list[int] = wrong,
                  end: threading.Event = stop, count: list[int] = seen) -> None:  # fmt: skip
            dice = random.Random(1)
            while not end.is_set():
                page = dice.randrange(SIZE // PAGE) * PAGE
                libc.madvise(where + page, PAGE, mmap.MADV_DONTNEED)
                try:
                    os.pwrite(target, part[page : page + PAGE], 0)
                except OSError as error:
                    bad += [] if error.errno == errno.EFAULT else [page]
                    continue
                count[0] += 1
                if os.pread(target, PAGE, 0) != DATA[page : page + PAGE]:
                    bad.append(page)

        thread = threading.Thread(target=reach)
        thread.start()
        wait_for(lambda count=seen: count[0] > 20)
        rewrite(path)
        after = seen[0]
        time.sleep(0.05)
        stop.set()
        thread.join()
        assert not wrong
        assert seen[0] <= after + 1
        broken(gen)
        memory.release()
        libc.munmap(at, SIZE)
        gen.close()
        os.close(copy)


def test_many_in_one_slot(slot: Slot) -> None:
    """Fifty swaps between files; the files of those that nobody reads can be written."""
    paths = [Path(f"/tmp/many{i}.bin") for i in range(4)]
    data = [weights(i, CHUNK + i * PAGE) for i in range(4)]
    for turn in range(50):
        which = turn % 4
        # two swaps ago it was the previous one: nobody has it any more
        paths[which].write_bytes(data[which])
        with stage(slot, paths[which], KEEP) as gen:
            assert slot.commit(gen.loaded().number) == 0
        with slot.acquire() as reader:
            assert reader.contents() == data[which]
    assert slot.buried().told().keys() == {49, 50}
    for path in paths:
        path.unlink()


def test_files_whose_writers_nobody_counts(slot: Slot) -> None:
    """A memfd is writable without having been opened for writing, and so by whoever has it."""
    fd = file_of(DATA)
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    for file in (fd, again):
        assert slot.try_stage(file, CACHED)[0] in (errno.ETXTBSY, errno.EOPNOTSUPP)
    os.close(fd)
    assert slot.try_stage(again, CACHED)[0] in (errno.ETXTBSY, errno.EOPNOTSUPP)
    os.close(again)
    assert slot.info().last == 0


def test_a_generation_is_no_file_for_it(slot: Slot, gen: Generation) -> None:
    assert slot.try_stage(gen.fd, CACHED)[0] in (errno.EINVAL, errno.EOPNOTSUPP)
    with slot.stage(gen.fd) as copy:  # of what it shows; whole
        assert copy.loaded().contents() == DATA


def test_a_file_without_a_name(slot: Slot) -> None:
    fd = os.open("/tmp", os.O_TMPFILE | os.O_RDWR, 0o600)
    os.pwrite(fd, DATA, 0)
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    assert slot.try_stage(again, CACHED)[0] == errno.ETXTBSY
    os.close(fd)
    with slot.stage(again, CACHED) as gen:
        os.close(again)
        assert gen.loaded().contents() == DATA


def shmem() -> int:
    """Bytes in all tmpfs."""
    text = Path("/proc/meminfo").read_text()
    return int(re.search(r"^Shmem:\s+(\d+) kB", text, re.M)[1]) * 1024


@pytest.fixture
def large() -> Iterator[Path]:
    """A file in folios of a chunk, where the kernel has such."""
    folder = Path("/tmp/large")
    folder.mkdir()
    if libc.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, b"huge=always"):
        folder.rmdir()
        pytest.skip("no large folios in tmpfs")
    yield folder / "model.bin"
    assert libc.umount(bytes(folder)) == 0
    folder.rmdir()


def test_large_folios(slot: Slot, large: Path) -> None:
    """Mapping and unmapping keeps none of them, and its end empties all mappings."""
    data = weights("large", 4 * CHUNK)
    before = shmem()
    large.write_bytes(data)
    with stage(slot, large) as gen:
        gen.loaded()
        for turn in range(30):
            at = at_of(gen, len(data))
            if turn % 2:
                pid = os.fork()
                if pid == 0:
                    os._exit(string(at, len(data)) != data)
                assert string(at, len(data)) == data
                assert os.waitpid(pid, 0)[1] == 0
            else:
                assert string(at + turn * PAGE, PAGE) == data[turn * PAGE : (turn + 1) * PAGE]
            assert libc.munmap(at, len(data)) == 0
        at = at_of(gen, len(data))
        assert string(at, len(data)) == data
        os.close(os.open(large, os.O_WRONLY | os.O_TRUNC))
        broken(gen)
        assert dies(lambda: string(at, 1)) == signal.SIGBUS
        assert libc.munmap(at, len(data)) == 0
        assert slot.abort(gen.number) == 0
    large.unlink()
    wait_for(lambda: shmem() <= before + CHUNK // 2)


def test_threads_fault_the_same_large_folio(slot: Slot, large: Path) -> None:
    data = weights("large", 2 * CHUNK)
    large.write_bytes(data)
    with stage(slot, large) as gen:
        gen.loaded()
        for turn in range(20):
            at = at_of(gen, len(data))
            wrong: list[int] = []
            gate = threading.Barrier(4)

            def work(number: int, base: int = at, bad: list[int] = wrong, start: threading.Barrier = gate) -> None:
                dice = random.Random(number)
                start.wait()
                for _ in range(30):
                    page = dice.randrange(len(data) // PAGE) * PAGE
                    if string(base + page, PAGE) != data[page : page + PAGE]:
                        bad.append(page)

            threads = [threading.Thread(target=work, args=(turn * 4 + i,)) for i in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not wrong
            assert libc.munmap(at, len(data)) == 0
    assert large.read_bytes() == data
    large.unlink()


def test_many_end_at_once(raw: Raw) -> None:
    """More than there are workers to end them."""
    path = PLACES["ext4"]
    path.write_bytes(weights("many", PAGE))
    new = abi.OpenFlag.CREATE | abi.OpenFlag.EXCL | abi.OpenFlag.WRITE
    slots = [raw.slot(f"many{i}", new, mode=0o600) for i in range(300)]
    for number in (1, 2, 3):
        for slot in slots:
            stage(slot, path, KEEP).close()
            assert number == 3 or slot.commit(number) == 0
    for slot in slots:
        assert slot.commit(3) == 0
    becomes("model/generations", 2 * len(slots))
    for slot in slots:
        assert slot.remove() == 0
        slot.close()
    becomes("model/generations", 0)
    path.open("r+b").close()
    path.unlink()
