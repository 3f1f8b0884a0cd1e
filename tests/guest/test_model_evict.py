# SPDX-License-Identifier: MIT
"""Evictable generations: chunks go and come back, and nobody ever reads anything but what was loaded."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import mmap
import os
import random
import re
import signal
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from device import CHUNK, KASAN, PAGE, TRACING, Generation, Raw, Slot, becomes, file_of, read, wait_for, weights, write
from process import FAILED, dies, hold, killed_at_random, let_go, libc, status_of
from tensormem import abi

CACHED, VERIFY, KEEP = abi.StageFlag.CACHED, abi.StageFlag.VERIFY, abi.StageFlag.KEEP
EVICTABLE = abi.StageFlag.EVICTABLE
State = abi.ModelState
READ, SHARED = mmap.PROT_READ, mmap.MAP_SHARED

TAIL = 3 * PAGE
SIZE = 4 * CHUNK + TAIL - PAGE + 5
DATA = weights("evictable", SIZE)
ALL = 4 * CHUNK + TAIL
PLACES = {"tmpfs": Path("/tmp/evict.bin"), "ext4": Path("/var/tmp/evict.bin")}


@pytest.fixture(params=["tmpfs"] if KASAN else PLACES)
def path(request: pytest.FixtureRequest) -> Iterator[Path]:
    where = PLACES[request.param]
    where.write_bytes(DATA)
    yield where
    where.unlink(missing_ok=True)


@pytest.fixture
def ext4() -> Iterator[Path]:
    where = PLACES["ext4"]
    where.write_bytes(DATA)
    yield where
    where.unlink(missing_ok=True)


def stage(slot: Slot, path: Path, flags: int = 0, **fields: int) -> Generation:
    fd = os.open(path, os.O_RDONLY)
    try:
        return slot.stage(fd, EVICTABLE | flags, **fields)
    finally:
        os.close(fd)


def activate(slot: Slot, path: Path) -> int:
    with stage(slot, path) as gen:
        assert slot.commit(gen.loaded().number) == 0
        return gen.number


@pytest.fixture
def gen(slot: Slot, ext4: Path) -> Iterator[Generation]:
    activate(slot, ext4)
    with slot.acquire() as reader:
        yield reader


def evict(slot: Slot, size: int = 0, number: int = 0) -> int:
    item = abi.ModelEvict(generation=number, bytes=size)
    assert slot.ioctl(abi.IOC_MODEL_EVICT, item) == 0
    assert item.generation == (number or slot.info().active)
    return item.bytes


def out(gen: Generation) -> int:
    return gen.info().evicted_bytes


def at_of(gen: Generation) -> int:
    at = libc.mmap(None, SIZE, READ, SHARED, gen.fd, 0)
    assert at != FAILED, ctypes.get_errno()
    return at


def string(at: int, length: int = SIZE) -> bytes:
    return ctypes.string_at(at, length)


def piece(index: int) -> slice:
    return slice(index * CHUNK, min(SIZE, (index + 1) * CHUNK))


def touched(at: int, index: int) -> bool:
    """Touch a piece and compare a page of it."""
    begin = index * CHUNK
    return string(at + begin, PAGE) == DATA[begin : begin + PAGE]


# Going and coming back


@pytest.mark.parametrize("flags", [0, VERIFY])
@pytest.mark.parametrize("how", ["map", "read"])
def test_it_goes_and_comes_back(slot: Slot, path: Path, how: str, flags: int) -> None:
    digest = hashlib.sha256(DATA).digest() if flags else b""
    with stage(slot, path, flags, sha256=digest) as staged:
        assert slot.commit(staged.loaded().number) == 0
    failed = read("model/reload_failed")
    with slot.acquire() as gen:
        at = at_of(gen)
        for turn in range(1, 3):
            assert string(at) == DATA
            assert gen.memory() == (ALL, 0)
            assert (read("model/evictable"), slot.read("1/evictable")) == (ALL, ALL)
            assert evict(slot) == ALL
            assert gen.memory() == (0, 0)
            assert (read("model/held"), read("clients/bytes"), read("chunk/used")) == (0, 0, 0)
            assert (read("model/evictable"), slot.read("1/evictable")) == (0, 0)
            assert read("model/evicted") == slot.read("1/evicted") == out(gen) == ALL
            assert evict(slot) == 0
            if how == "map":
                assert string(at) == DATA
                assert libc.madvise(at, SIZE, mmap.MADV_DONTNEED) == 0
            assert gen.contents() == DATA
            assert gen.behind() == bytes(-SIZE % PAGE)
            assert gen.info().reloads == slot.read("1/reloads") == 5 * turn
            assert (read("model/evicted"), read("model/held")) == (0, ALL)
        assert gen.info().flags == EVICTABLE | flags
        assert libc.munmap(at, SIZE) == 0
    assert read("model/reload_failed") == failed


def test_an_offset_within_a_page(slot: Slot, ext4: Path) -> None:
    with stage(slot, ext4, offset=7, size=CHUNK + 9) as gen:
        gen.loaded()
        assert evict(slot, number=1) == CHUNK + PAGE
        assert gen.contents() == DATA[7 : CHUNK + 16]
        view = gen.view()
        assert view[:] == DATA[7 : CHUNK + 16]
        view.close()


def test_single_reads_bring_in_what_they_need(slot: Slot, gen: Generation) -> None:
    evict(slot)
    assert os.pread(gen.fd, 10, 2 * CHUNK - 5) == DATA[2 * CHUNK - 5 : 2 * CHUNK + 5]
    assert (gen.info().reloads, out(gen)) == (2, ALL - 2 * CHUNK)
    assert os.pread(gen.fd, 10, SIZE - 3) == DATA[-3:]
    assert (gen.info().reloads, out(gen)) == (3, ALL - 2 * CHUNK - TAIL)
    assert os.pread(gen.fd, 10, SIZE) == b""
    assert gen.info().reloads == 3


def gone(since: int) -> tuple[list[int], int]:
    """Pieces that went, in order, from a line of the trace on; and how many lines there are."""
    text = (TRACING / "trace").read_text()
    places = re.findall(r"tensormem_model_evict: slot=test .* offset=(0x\w+) bytes=", text)
    return [int(place, 16) // CHUNK for place in places[since:]], len(places)


@pytest.mark.usefixtures("trace")
def test_least_recently_used_first(slot: Slot, gen: Generation) -> None:
    """The order of faults and reads, exactly; pieces go whole, and no more than were asked for."""
    at = at_of(gen)
    seen = 0
    for turn in range(6):
        order = random.Random(turn).sample(range(5), 5)
        for index in order:
            if index % 2:
                assert libc.madvise(at + index * CHUNK, min(CHUNK, ALL - index * CHUNK), mmap.MADV_DONTNEED) == 0
                assert touched(at, index)
            else:
                assert os.pread(gen.fd, 1, index * CHUNK)
        expected = [TAIL if index == 4 else CHUNK for index in order]
        for wanted in (1, expected[1], expected[2] + expected[3] - PAGE):
            evict(slot, wanted)
        which, seen = gone(seen)
        assert which == order[:4]
        assert out(gen) == sum(expected[:4])
        assert evict(slot) == expected[4]
        assert string(at) == DATA
        which, seen = gone(seen)
        assert which == order[4:]
    assert libc.munmap(at, SIZE) == 0
    text = (TRACING / "trace").read_text()
    assert len(re.findall(r"tensormem_model_reload: slot=test .* error=0 latency_ns=[1-9]", text)) == gen.info().reloads


def fill_up(room: int = 0) -> None:
    """The pool has what the generation takes (five chunks with that of its tail), and so many more."""
    assert write("chunk/reserve", 0) == 0
    becomes("chunk/total", 5)
    assert write("chunk/capacity", 5 + room) == 0


def test_the_pool_takes_what_it_needs(slot: Slot, gen: Generation, settings: None) -> None:
    """Whoever finds the pool full: the least recently used go, whosever they are, and no more than it takes."""
    fill_up(1)
    assert os.pread(gen.fd, 1, 0)
    with Raw() as other:
        other.alloc(CHUNK, pool=abi.Pool.CHUNK)
        assert out(gen) == 0
        for count in (1, 2, 3):
            other.alloc(CHUNK, pool=abi.Pool.CHUNK)
            assert out(gen) == count * CHUNK
        assert os.pread(gen.fd, 1, 0) == DATA[:1]
        assert gen.info().reloads == 0, "what was used last has stayed"
        assert other.try_alloc(7 * CHUNK, pool=abi.Pool.CHUNK)[0] == errno.ENOSPC
        assert out(gen) == 3 * CHUNK, "what cannot be had costs nobody anything"
    becomes("chunk/used", 1)
    assert gen.contents() == DATA


def test_what_is_mapped_gets_a_second_chance(slot: Slot, gen: Generation, settings: None) -> None:
    """What would be next is unmapped, so that its use shows: it faults, and is last then."""
    at = at_of(gen)
    for index in range(5):
        assert touched(at, index)
    fill_up()
    with Raw() as other:
        other.alloc(CHUNK, pool=abi.Pool.CHUNK)
        assert out(gen) == CHUNK  # piece 0
        assert touched(at, 1)  # it was next
        other.alloc(CHUNK, pool=abi.Pool.CHUNK)
        assert out(gen) == 2 * CHUNK  # and 2
        assert touched(at, 1)
        assert gen.info().reloads == 0
    assert touched(at, 2)
    assert gen.info().reloads == 1
    assert string(at) == DATA
    assert libc.munmap(at, SIZE) == 0


# Who holds it, who shares it


def test_what_is_pinned_stays(slot: Slot, gen: Generation) -> None:
    at = at_of(gen)
    assert string(at) == DATA
    pipe = hold(at + 4 * CHUNK, PAGE)
    assert evict(slot) == 4 * CHUNK
    assert out(gen) == 4 * CHUNK
    assert evict(slot) == 0
    assert os.read(pipe[0], PAGE) == DATA[4 * CHUNK : 4 * CHUNK + PAGE]
    let_go(pipe)
    assert evict(slot) == TAIL
    assert string(at) == DATA
    assert read("chunk/quarantined") == 0
    assert libc.munmap(at, SIZE) == 0


def test_fork(slot: Slot, gen: Generation) -> None:
    """A child sees what its parent sees, whatever went before it was born, meanwhile, or after."""
    at = at_of(gen)
    assert string(at) == DATA

    def child() -> None:
        assert touched(at, 0)
        evict(slot)
        assert string(at) == DATA
        assert status_of(lambda: os._exit(string(at) != DATA)) == 0

    assert status_of(child) == 0
    evict(slot)
    assert status_of(child) == 0
    assert string(at) == DATA
    # a part of it: the area was split before the fork
    assert libc.munmap(at + CHUNK, CHUNK) == 0
    assert status_of(lambda: os._exit(string(at + 2 * CHUNK, PAGE) != DATA[2 * CHUNK : 2 * CHUNK + PAGE])) == 0
    assert touched(at, 0)
    assert touched(at, 2)
    assert libc.munmap(at, SIZE) == 0


def test_it_shares_nothing(slot: Slot, ext4: Path) -> None:
    for number, flags in enumerate((EVICTABLE, EVICTABLE, 0, EVICTABLE, 0, 0), 1):
        fd = os.open(ext4, os.O_RDONLY)
        with slot.stage(fd, flags) as gen:
            os.close(fd)
            gen.loaded()
            assert gen.memory() == ((0, ALL) if number == 6 else (ALL, 0))
            assert slot.commit(number) == 0


def test_threads_and_processes_meet_one_piece(slot: Slot, gen: Generation) -> None:
    """All want it at once: one brings it in."""
    at = at_of(gen)
    for turn in range(1, 9):
        evict(slot)
        wrong: list[int] = []
        gate = threading.Barrier(4)

        def reach(number: int, start: threading.Barrier = gate, bad: list[int] = wrong) -> None:
            start.wait()
            if not (touched(at, 1) if number % 2 else os.pread(gen.fd, PAGE, CHUNK) == DATA[CHUNK : CHUNK + PAGE]):
                bad.append(number)

        threads = [threading.Thread(target=reach, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert gen.info().reloads == turn
    assert libc.munmap(at, SIZE) == 0


def test_readers_killed_while_it_goes(slot: Slot, path: Path) -> None:
    """Processes read and map all over, and are killed anywhere; what goes at random is always right again."""
    activate(slot, path)
    stop = threading.Event()
    rounds = [0]

    def churn() -> None:
        dice = random.Random(1)
        while not stop.is_set():
            evict(slot, dice.randrange(1, ALL))
            rounds[0] += 1

    def work(seed: int) -> None:
        dice = random.Random(seed)
        gen = slot.acquire()
        at = at_of(gen)
        while True:
            begin = dice.randrange(SIZE)
            length = min(dice.choice((1, PAGE, 3 * PAGE)), SIZE - begin)
            got = string(at + begin, length) if dice.random() < 0.6 else os.pread(gen.fd, length, begin)
            if got != DATA[begin : begin + length]:
                os.kill(os.getpid(), signal.SIGABRT)
            if dice.random() < 0.02 and status_of(lambda base=at: os._exit(not touched(base, 2))):
                os.kill(os.getpid(), signal.SIGABRT)

    thread = threading.Thread(target=churn)
    thread.start()
    dice = random.Random(7)
    try:
        for _ in range(4):
            killed_at_random(work, dice, 0.5, 2)
    finally:
        stop.set()
        thread.join()
    assert rounds[0] > 4
    with slot.acquire() as gen:
        assert gen.info().reloads > 4
        assert gen.contents() == DATA


# What becomes of its generation


def test_every_end(raw: Raw, slot: Slot, ext4: Path) -> None:
    """Committed, rolled back, aborted, removed while pieces are out: nothing is left over."""
    first = activate(slot, ext4)
    assert evict(slot) == ALL
    with stage(slot, ext4) as second:
        second.loaded()
        assert evict(slot, number=second.number) == ALL
        assert slot.commit(second.number) == 0
        assert slot.rollback() == (0, first)
        with slot.acquire() as reader:
            assert reader.contents() == DATA
        assert evict(slot, CHUNK, first) == CHUNK
        assert second.contents() == DATA
        assert evict(slot, 1, second.number) == CHUNK
    with stage(slot, ext4) as third:
        third.loaded()
        assert evict(slot, number=third.number) == ALL
        assert slot.abort(third.number) == 0
        assert third.contents() == DATA  # its readers have it still
        item = abi.ModelEvict(generation=third.number)
        assert slot.ioctl(abi.IOC_MODEL_EVICT, item) == errno.ENOENT
        assert read("model/evicted") == 2 * CHUNK
    becomes("model/generations", 2)
    assert slot.remove() == 0
    becomes("model/generations", 0)
    assert (read("model/evicted"), read("model/evictable"), read("model/held")) == (0, 0, 0)
    ext4.open("r+b").close()  # and the file is like any other


def test_aborted_while_it_is_loaded(slot: Slot, ext4: Path) -> None:
    for _ in range(10):
        gen = stage(slot, ext4)
        gen.close()
    becomes("model/generations", 0)
    assert (read("model/evictable"), read("model/held")) == (0, 0)


# Its file


def test_a_writer_waits_until_all_has_come_back(slot: Slot, path: Path) -> None:
    """From then on it is like a resident one, whatever becomes of the file."""
    activate(slot, path)
    with slot.acquire() as gen:
        at = at_of(gen)
        assert touched(at, 3)
        assert evict(slot, 2 * CHUNK) == 2 * CHUNK
        with path.open("r+b") as file:
            assert (out(gen), gen.info().reloads) == (0, 2)
            file.write(bytes(SIZE))
        path.unlink()
        assert (read("model/evictable"), evict(slot)) == (0, 0)
        assert gen.state() == State.ACTIVE
        assert gen.memory() == (ALL, 0)
        assert string(at) == gen.contents() == DATA
        assert libc.munmap(at, SIZE) == 0


def test_a_writer_that_does_not_wait(slot: Slot, gen: Generation, ext4: Path) -> None:
    evict(slot)

    def opened() -> bool:
        try:
            os.close(os.open(ext4, os.O_WRONLY | os.O_NONBLOCK | os.O_TRUNC))
        except BlockingIOError:
            return False
        return True

    assert not opened()
    wait_for(opened)
    assert ext4.stat().st_size == 0
    assert gen.contents() == DATA


def test_unlinked_and_replaced(slot: Slot, gen: Generation, ext4: Path) -> None:
    """By rename(2) as one should: it comes back from the file that was."""
    other = ext4.with_suffix(".new")
    other.write_bytes(bytes(SIZE))
    other.rename(ext4)
    for _ in range(2):
        assert evict(slot) == ALL
        assert gen.contents() == DATA


def broken(slot: Slot, gen: Generation, why: int) -> None:
    """It has failed for good, and its memory has gone."""
    wait_for(lambda: gen.info().state == State.FAILED)
    assert gen.info().error == why
    with pytest.raises(OSError, match=r".") as refusal:
        os.pread(gen.fd, 1, CHUNK)
    assert refusal.value.errno == errno.ESTALE
    at = at_of(gen)
    assert dies(lambda: string(at, 1)) == signal.SIGBUS
    assert libc.munmap(at, SIZE) == 0
    wait_for(lambda: gen.memory() == (0, 0))
    assert evict(slot, number=gen.number) == 0


def test_a_file_that_changed_unnoticed(slot: Slot, gen: Generation, ext4: Path) -> None:
    """Another time of modification: what is missing does not come back, and all of it fails."""
    at = at_of(gen)
    assert string(at) == DATA
    assert evict(slot, CHUNK) == CHUNK
    failed = read("model/reload_failed")
    os.utime(ext4, ns=(1, 1))
    assert touched(at, 3)  # what is there is there
    with pytest.raises(OSError, match=r".") as refusal:
        os.pread(gen.fd, 1, 0)
    assert refusal.value.errno == errno.ESTALE
    broken(slot, gen, errno.ETXTBSY)
    assert dies(lambda: string(at + 3 * CHUNK, 1)) == signal.SIGBUS
    assert read("model/reload_failed") > failed
    assert libc.munmap(at, SIZE) == 0
    assert slot.rollback()[0] == errno.ENOENT


def test_bytes_that_went_bad_on_the_disk(slot: Slot, gen: Generation, ext4: Path) -> None:
    """One bit, below the file system: nobody sees it."""
    os.sync()
    number = os.stat(ext4).st_dev
    name = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve().name
    unit = os.statvfs(ext4).f_bsize
    fd = os.open(ext4, os.O_RDONLY)
    fibmap = 1
    where = struct.unpack("i", fcntl.ioctl(fd, fibmap, struct.pack("i", (CHUNK + 5 * unit) // unit)))[0] * unit
    evict(slot)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    try:
        disk = os.open(f"/dev/{name}", os.O_RDWR)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        pytest.skip("this kernel lets nobody write below a file system (CONFIG_BLK_DEV_WRITE_MOUNTED)")
    byte = os.pread(disk, 1, where)
    assert byte == DATA[CHUNK + 5 * unit : CHUNK + 5 * unit + 1]
    os.pwrite(disk, bytes((byte[0] ^ 4,)), where)
    os.fsync(disk)
    os.close(disk)
    assert os.pread(gen.fd, PAGE, 0) == DATA[:PAGE]
    at = at_of(gen)
    assert dies(lambda: touched(at, 1)) == signal.SIGBUS
    assert libc.munmap(at, SIZE) == 0
    broken(slot, gen, errno.EBADMSG)


def test_a_file_in_use(slot: Slot, path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    with path.open("r+b"):
        assert slot.try_stage(fd, EVICTABLE)[0] == errno.ETXTBSY
    os.close(fd)
    memfd = file_of(DATA)
    assert slot.try_stage(memfd, EVICTABLE)[0] in (errno.ETXTBSY, errno.EOPNOTSUPP)
    os.close(memfd)
    assert slot.info().last == 0


def test_changed_while_it_is_loaded(slot: Slot, ext4: Path) -> None:
    os.truncate(ext4, 64 * CHUNK)
    with stage(slot, ext4) as gen:
        loading = gen.state() == State.LOADING
        ext4.open("r+b").close()
        if loading:
            assert gen.failed() == errno.ETXTBSY
            assert slot.commit(gen.number) == errno.ESTALE
        assert slot.abort(gen.number) == 0


def test_longer_than_its_file(slot: Slot, ext4: Path) -> None:
    fd = os.open(ext4, os.O_RDONLY)
    with slot.stage(fd, EVICTABLE, size=SIZE + 1) as gen:
        assert gen.failed() == errno.EBADMSG
        assert read("model/evictable") == 0
        assert slot.abort(gen.number) == 0
    os.close(fd)


# Memory


def test_a_quota(raw: Raw, ext4: Path) -> None:
    """It comes back on the stager's bill; his own tensors are had at its price; without room a touch is SIGBUS."""
    new = abi.OpenFlag.CREATE | abi.OpenFlag.EXCL | abi.OpenFlag.WRITE
    assert raw.set_quota(ALL) == 0
    with raw.slot("quota", new, mode=0o600) as slot:
        activate(slot, ext4)
        gen = slot.acquire()
        tensors = []
        for count in range(1, 5):
            tensors.append(raw.alloc(CHUNK, pool=abi.Pool.CHUNK))
            assert out(gen) == count * CHUNK
        assert evict(slot) == TAIL
        tensors.append(raw.alloc(PAGE, pool=abi.Pool.BUDDY))
        failed = read("model/reload_failed")
        with pytest.raises(OSError, match=r".") as refusal:
            os.pread(gen.fd, 1, 0)
        assert refusal.value.errno == errno.EDQUOT
        at = at_of(gen)
        assert dies(lambda: touched(at, 0)) == signal.SIGBUS
        assert read("model/reload_failed") > failed
        assert gen.state() == State.ACTIVE
        for tensor in tensors:
            assert raw.free(tensor.handle) == 0
        assert string(at) == gen.contents() == DATA
        assert libc.munmap(at, SIZE) == 0
        gen.close()
        assert slot.remove() == 0


def test_a_model_larger_than_the_pool(slot: Slot, ext4: Path, settings: None) -> None:
    """Its least recently used pieces make room for the others, over and over."""
    activate(slot, ext4)
    assert write("chunk/reserve", 0) == 0
    evict(slot)
    assert write("chunk/capacity", 2) == 0
    with slot.acquire() as gen:
        at = at_of(gen)
        for _ in range(2):
            assert string(at) == DATA
            assert gen.contents() == DATA
        assert gen.info().reloads >= 12
        assert read("chunk/total") <= 2
        assert libc.munmap(at, SIZE) == 0


# Bad input


def test_bad_calls(raw: Raw, slot: Slot, ext4: Path) -> None:
    fd = os.open(ext4, os.O_RDONLY)
    assert slot.try_stage(fd, EVICTABLE | CACHED)[0] == errno.EINVAL
    os.close(fd)
    ioctl = abi.IOC_MODEL_EVICT
    assert slot.ioctl(ioctl, abi.ModelEvict()) == errno.ENOENT
    slot.swap(DATA)
    for number in (0, 1):
        item = abi.ModelEvict(generation=number)
        assert slot.ioctl(ioctl, item) == errno.EINVAL
        assert (item.generation, item.bytes) == (number, 0)
    activate(slot, ext4)
    for fields in ({"pad": 1}, *({"flags": 1 << bit} for bit in range(32))):
        assert slot.ioctl(ioctl, abi.ModelEvict(**fields)) == errno.EINVAL
    for number in (3, 1 << 32 | 2, (1 << 64) - 1):
        assert slot.ioctl(ioctl, abi.ModelEvict(generation=number)) == errno.ENOENT
    with raw.slot("test", 0) as reader:
        assert reader.ioctl(ioctl, abi.ModelEvict()) == errno.EACCES
    with slot.acquire() as gen:
        assert gen.ioctl(ioctl, abi.ModelEvict()) == errno.ENOTTY
        assert out(gen) == 0
    assert evict(slot, (1 << 64) - 1) == ALL
