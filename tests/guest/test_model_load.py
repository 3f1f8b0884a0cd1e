# SPDX-License-Identifier: MIT
"""Loading: what comes in is what the file had, or an errno; what is active never notices."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_limits import LIMIT, SLACK, cgroup, current, happened, in_child, join

from device import (
    CHUNK,
    KASAN,
    PAGE,
    Generation,
    Raw,
    Slot,
    becomes,
    events,
    file_of,
    read,
    round_up,
    wait_for,
    weights,
    write,
    write_all,
)
from process import status_of
from tensormem import abi

__all__ = ["cgroup"]

CREATE, EXCL, WRITE = abi.OpenFlag.CREATE, abi.OpenFlag.EXCL, abi.OpenFlag.WRITE
CACHED, VERIFY, KEEP = abi.StageFlag.CACHED, abi.StageFlag.VERIFY, abi.StageFlag.KEEP
State = abi.ModelState

SIZES = [1, PAGE - 1, PAGE, PAGE + 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK - PAGE, 5 * CHUNK, 7 * CHUNK + 123]


def sha(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


@pytest.fixture
def ext4() -> Iterator[Path]:
    """A file that is on a disk."""
    path = Path("/var/tmp/model.bin")
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def active(slot: Slot) -> Iterator[Generation]:
    """What must not be disturbed: it is looked at when the test is over."""
    data = weights("active", CHUNK + PAGE)
    number = slot.swap(data)
    with slot.acquire() as gen:
        view = gen.view()
        yield gen
        assert view[:] == gen.contents() == data
        assert gen.state() == State.ACTIVE
        assert slot.info().active == number
        view.close()


def billed(gen: Generation) -> int:
    return sum(gen.memory())


# Contents


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("flags", [0, VERIFY])
def test_contents(slot: Slot, size: int, flags: int) -> None:
    data = weights(size, size)
    file = file_of(data)
    gen = slot.stage(file, flags, sha256=sha(data) if flags else b"")
    os.close(file)  # at once
    with gen.loaded():
        info = gen.info()
        assert (info.size, info.loaded, info.error, info.flags) == (size, size, 0, flags)
        assert gen.memory() == (round_up(size, PAGE), 0)
        becomes("model/held", round_up(size, PAGE))
        becomes("chunk/used", round_up(size, PAGE) // CHUNK)
        assert gen.contents() == data
        view = gen.view()
        assert view[:] == data
        view.close()
        assert gen.behind() == bytes(-size % PAGE)
        assert slot.commit(gen.number) == 0
    with slot.acquire() as reader:
        assert reader.contents() == data


@pytest.mark.parametrize(
    ("offset", "size"),
    [(0, PAGE), (1, 0), (PAGE, 0), (PAGE - 1, CHUNK), (CHUNK, CHUNK + 1), (CHUNK + 777, 0), (3 * CHUNK - 1, 1),
     (512, 2 * CHUNK), (3 * CHUNK - 1, 0)],
)  # fmt: skip
def test_a_part_of_a_file(slot: Slot, offset: int, size: int) -> None:
    whole = weights("whole", 3 * CHUNK)
    expected = whole[offset : offset + size] if size else whole[offset:]
    file = file_of(whole)
    os.lseek(file, 12345, os.SEEK_SET)  # which is not for us to use or to move
    with slot.stage(file, VERIFY, sha256=sha(expected), offset=offset, size=size) as gen:
        assert gen.loaded().contents() == expected
        assert os.fstat(gen.fd).st_size == len(expected)
    assert os.lseek(file, 0, os.SEEK_CUR) == 12345
    os.close(file)


@pytest.mark.parametrize("at", [0, 17, 31])
@pytest.mark.parametrize("size", [1, PAGE, CHUNK, 2 * CHUNK + 5])
def test_a_wrong_checksum(slot: Slot, active: Generation, size: int, at: int) -> None:
    data = weights(size, size)
    wrong = bytearray(sha(data))
    wrong[at] ^= 0x80
    file = file_of(data)
    with slot.stage(file, VERIFY, sha256=bytes(wrong)) as gen:
        assert gen.failed() == errno.EBADMSG
        assert slot.commit(gen.number) == errno.ESTALE
        assert gen.memory() == (0, 0)
    # the very same file with the right one
    with slot.stage(file, VERIFY, sha256=sha(data)) as gen:
        assert gen.loaded().contents() == data
    os.close(file)


def test_a_checksum_of_what_is_shared(slot: Slot) -> None:
    """Chunks that need not be copied are in it too."""
    data = weights("shared", 3 * CHUNK + 9)
    slot.swap(data)
    file = file_of(data)
    with slot.stage(file, VERIFY, sha256=sha(data)) as gen:
        assert gen.loaded().memory() == (0, round_up(len(data), PAGE))
    with slot.stage(file, VERIFY, sha256=sha(data[:-1])) as gen:
        assert gen.failed() == errno.EBADMSG
    os.close(file)


def test_a_file_on_a_disk(slot: Slot, ext4: Path) -> None:
    data = weights("disk", 3 * CHUNK + PAGE + 1)
    ext4.write_bytes(data)
    for cold in (False, True):
        if cold:
            os.sync()
            Path("/proc/sys/vm/drop_caches").write_text("1")
        with open(ext4, "rb", buffering=0) as file, slot.stage(file.fileno(), VERIFY, sha256=sha(data)) as gen:
            assert gen.loaded().contents() == data
    # what it was loaded from has no say any more
    with open(ext4, "rb", buffering=0) as file:
        gen = slot.stage(file.fileno()).loaded()
    ext4.write_bytes(bytes(len(data)))
    ext4.unlink()
    assert gen.contents() == data
    gen.close()


def test_a_file_that_was_opened_oddly(slot: Slot, ext4: Path) -> None:
    data = weights("odd", CHUNK + 3 * PAGE)
    ext4.write_bytes(data)
    for flags in (os.O_RDWR, os.O_RDONLY | os.O_NONBLOCK, os.O_RDWR | os.O_APPEND | os.O_SYNC):
        file = os.open(ext4, flags)
        with slot.stage(file) as gen:
            os.close(file)
            assert gen.loaded().contents() == data
    # of which the kernel's memory is no part
    file = os.open(ext4, os.O_RDONLY | os.O_DIRECT)
    assert slot.try_stage(file)[0] == errno.EINVAL
    os.close(file)


@pytest.mark.parametrize("where", ["/tmp/sparse.bin", "/var/tmp/sparse.bin"])
def test_a_sparse_file(slot: Slot, where: str) -> None:
    """Holes are zeros, and take memory as any other byte."""
    path = Path(where)
    size = 9 * CHUNK + 77
    with path.open("w+b", buffering=0) as file:
        os.truncate(file.fileno(), size)
        expected = bytearray(size)
        for at in (5, CHUNK - 1, 3 * CHUNK, 6 * CHUNK + PAGE, size - 1):
            os.pwrite(file.fileno(), b"\xc3", at)
            expected[at] = 0xC3
        with slot.stage(file.fileno(), VERIFY, sha256=sha(expected)) as gen:
            assert gen.loaded().contents() == expected
            assert gen.memory()[0] == round_up(size, PAGE)
    path.unlink()


# Progress


def test_progress_only_grows(slot: Slot) -> None:
    size = 100 * CHUNK
    file = os.memfd_create("long")
    os.truncate(file, size)
    digest = hashlib.sha256()
    for _ in range(100):
        digest.update(bytes(CHUNK))
    seen = [0]
    with slot.stage(file, VERIFY, sha256=digest.digest()) as gen:
        while gen.state() == State.LOADING:
            seen.append(gen.info().loaded)
            seen.append(slot.read("1/loaded"))
        gen.loaded()
        seen.append(gen.info().loaded)
    assert seen == sorted(seen)
    assert seen[-1] == size
    assert len(set(seen)) > 3, "there was nothing to see"
    os.close(file)


def test_memory_comes_as_it_is_needed(slot: Slot) -> None:
    """Never more than what is loaded and a chunk: a long load does not hold all of it from the start."""
    file = os.memfd_create("long")
    os.truncate(file, 100 * CHUNK)
    with slot.stage(file, VERIFY) as gen:
        while gen.state() == State.LOADING:
            used = read("chunk/used") * CHUNK
            assert used <= gen.info().loaded + 2 * CHUNK
        gen.settled()
    os.close(file)


# Files that do not keep what they promise


@pytest.mark.parametrize(("real", "promised"), [(PAGE, PAGE + 1), (CHUNK, 3 * CHUNK), (3 * CHUNK + 1, 3 * CHUNK + 2)])
def test_a_size_beyond_the_end(slot: Slot, active: Generation, real: int, promised: int) -> None:
    file = file_of(weights("short", real))
    held = read("model/held")
    result, request = slot.try_stage(file, size=promised)
    if result == 0:
        with Generation(request.fd, request.generation) as gen:
            assert gen.failed() == errno.EBADMSG
            assert gen.memory() == (0, 0)
            becomes("model/held", held)
    else:
        assert result == errno.EINVAL
        assert slot.info().staged == 0
    with slot.stage(file, size=real) as gen:
        assert gen.loaded().info().size == real
    os.close(file)


def test_truncated_while_it_is_loaded(slot: Slot, active: Generation) -> None:
    held = read("model/held")
    file = os.memfd_create("shrinks")
    for keep in (0, CHUNK + 1, 99 * CHUNK):
        os.truncate(file, 120 * CHUNK)
        with slot.stage(file, VERIFY) as gen:
            wait_for(lambda gen=gen: gen.info().loaded)
            assert gen.state() == State.LOADING
            os.truncate(file, keep)
            assert gen.failed() == errno.EBADMSG
            assert gen.info().loaded < 120 * CHUNK
            becomes("model/held", held)
    os.close(file)


def test_growing_while_it_is_loaded(slot: Slot) -> None:
    """All that follows is what followed when it was staged."""
    file = os.memfd_create("grows")
    os.truncate(file, 50 * CHUNK)
    with slot.stage(file) as gen:
        os.truncate(file, 60 * CHUNK)
        assert gen.loaded().info().size == 50 * CHUNK
    os.close(file)


# Devices

LOOP_SET_FD, LOOP_CLR_FD, LOOP_SET_DIRECT_IO, LOOP_CTL_GET_FREE = 0x4C00, 0x4C01, 0x4C08, 0x4C82
BLKFLSBUF = 0x1261


class Loop:
    """A block device made from a file; cut the file short and the rest of the device is bad."""

    def __init__(self, path: Path) -> None:
        if not Path("/dev/loop-control").exists():
            subprocess.run(["modprobe", "loop"], check=True)
        wait_for(Path("/dev/loop-control").exists)
        with open("/dev/loop-control", "rb") as control:
            number = fcntl.ioctl(control, LOOP_CTL_GET_FREE)
        self.path = Path(f"/dev/loop{number}")
        wait_for(self.path.exists)
        self.fd = os.open(self.path, os.O_RDWR)
        with path.open("r+b", buffering=0) as file:
            fcntl.ioctl(self.fd, LOOP_SET_FD, file.fileno())
        # else what is missing reads as zeros
        fcntl.ioctl(self.fd, LOOP_SET_DIRECT_IO, 1)

    def forget(self) -> None:
        """Nothing of it stays in the page cache."""
        fcntl.ioctl(self.fd, BLKFLSBUF)

    def close(self) -> None:
        fcntl.ioctl(self.fd, LOOP_CLR_FD)
        os.close(self.fd)


@pytest.fixture
def loop(ext4: Path) -> Iterator[Loop]:
    ext4.write_bytes(weights("loop", 6 * CHUNK))
    os.sync()
    device = Loop(ext4)
    yield device
    device.close()


@pytest.mark.parametrize(("offset", "size"), [(0, 0), (CHUNK, 2 * CHUNK + 1), (512, 0), (6 * CHUNK - 1, 0)])
def test_a_block_device(slot: Slot, loop: Loop, offset: int, size: int) -> None:
    whole = weights("loop", 6 * CHUNK)
    expected = whole[offset : offset + size] if size else whole[offset:]
    file = os.open(loop.path, os.O_RDONLY)
    with slot.stage(file, VERIFY, sha256=sha(expected), offset=offset, size=size) as gen:
        os.close(file)
        assert gen.loaded().contents() == expected
        assert gen.info().size == len(expected)
    file = os.open(loop.path, os.O_RDONLY)
    assert slot.try_stage(file, CACHED, offset=0)[0] == errno.EOPNOTSUPP
    assert slot.try_stage(file, offset=6 * CHUNK)[0] == errno.EINVAL
    os.close(file)


@pytest.mark.parametrize("good", [0, PAGE, 2 * CHUNK, 5 * CHUNK + CHUNK // 2])
@pytest.mark.parametrize("flags", [0, VERIFY])
def test_a_device_that_fails(slot: Slot, active: Generation, loop: Loop, ext4: Path, good: int, flags: int) -> None:
    """EIO from some byte on: the load fails with it, and all it had taken comes back."""
    data = weights("loop", 6 * CHUNK)
    checksum = sha(data) if flags else b""
    held, used = read("model/held"), read("chunk/used")
    os.truncate(ext4, good)
    loop.forget()
    file = os.open(loop.path, os.O_RDONLY)
    with slot.stage(file, flags, sha256=checksum) as gen:
        assert gen.failed() == errno.EIO
        assert gen.info().loaded <= good
        becomes("model/held", held)
        becomes("chunk/used", used)
        assert slot.commit(gen.number) == errno.ESTALE
    # a part that is good loads
    if good >= CHUNK:
        with slot.stage(file, size=CHUNK) as gen:
            assert gen.loaded().contents() == data[:CHUNK]
    # and all of it when it is whole again
    with ext4.open("r+b", buffering=0) as image:
        write_all(image.fileno(), data)
        os.fsync(image.fileno())
    loop.forget()
    with slot.stage(file, flags, sha256=checksum) as gen:
        assert gen.loaded().contents() == data
    os.close(file)


# No memory


def test_the_quota(raw: Raw, slot: Slot, active: Generation, settings: None) -> None:
    """EDQUOT half-way, and to the byte: what is held already counts."""
    held = raw.info().used
    data = weights("quota", 4 * CHUNK + PAGE)
    for more in (0, PAGE, CHUNK, 4 * CHUNK):
        assert raw.set_quota(held + more) == 0
        file = file_of(data)
        with slot.stage(file) as gen:
            assert gen.failed() == errno.EDQUOT
            assert gen.info().loaded <= more
            wait_for(lambda: raw.info().used == held)
        os.close(file)
    assert raw.set_quota(held + len(data)) == 0
    with slot.load(data) as gen:
        assert gen.contents() == data
        assert raw.info().used == held + len(data)


@pytest.mark.parametrize("what", ["quota", "capacity"])
def test_the_previous_one_is_given_up_first(
    raw: Raw, slot: Slot, active: Generation, settings: None, what: str
) -> None:
    """Memory is short: a rollback is worth less than the new one, if nobody reads what it would go back to."""
    assert write("chunk/reserve", 0) == 0
    previous, data = weights("previous", 2 * CHUNK), weights("new", 2 * CHUNK)
    slot.swap(previous)
    assert slot.rollback() == (0, active.number)
    assert slot.places() == (active.number, 2, 0)
    short(raw, what, 0)
    with slot.load(data) as gen:
        assert gen.contents() == data
        assert slot.places() == (active.number, 0, gen.number)
    # somebody reads it: it is given up too, and that does not help
    short(raw, what, 2)
    slot.swap(previous)
    assert slot.rollback() == (0, active.number)
    number = slot.info().previous
    with slot.acquire(number) as reader:
        short(raw, what, 0)
        file = file_of(data)
        with slot.stage(file) as gen:
            assert gen.failed() == (errno.EDQUOT if what == "quota" else errno.ENOSPC)
            assert slot.info().active == active.number
            assert slot.info().previous in (0, number)
        os.close(file)
        assert reader.contents() == previous
    assert slot.info().active == active.number


def short(raw: Raw, what: str, chunks: int) -> None:
    """Leave room for so many chunks."""
    if what == "quota":
        assert raw.set_quota(raw.info().used + chunks * CHUNK) == 0
    else:
        assert write("chunk/capacity", read("chunk/used") + read("buddy/chunks") + chunks) == 0


def test_the_capacity(raw: Raw, slot: Slot, active: Generation, settings: None) -> None:
    assert write("chunk/reserve", 0) == 0
    held, used = read("model/held"), read("chunk/used")
    short(raw, "capacity", 3)
    file = file_of(weights("capacity", 4 * CHUNK))
    with slot.stage(file) as gen:
        assert gen.failed() == errno.ENOSPC
        assert gen.info().loaded <= 3 * CHUNK
        becomes("model/held", held)
        becomes("chunk/used", used)
    with slot.stage(file, size=3 * CHUNK) as gen:
        assert gen.loaded().info().private_bytes == 3 * CHUNK
    os.close(file)


def test_no_room_is_no_trouble_for_equal_chunks(raw: Raw, slot: Slot, settings: None) -> None:
    """A chunk to load into is all that it takes."""
    data = weights("equal", 6 * CHUNK)
    slot.swap(data)
    assert raw.set_quota(7 * CHUNK) == 0
    with slot.load(data) as gen:
        assert gen.memory() == (0, 6 * CHUNK)
    changed = data[: 4 * CHUNK] + weights("changed", CHUNK) + data[5 * CHUNK :]
    assert raw.set_quota(8 * CHUNK) == 0
    with slot.load(changed) as gen:
        assert gen.memory() == (CHUNK, 5 * CHUNK)
        assert gen.contents() == changed
    two = weights("two", 2 * CHUNK) + data[2 * CHUNK :]
    file = file_of(two)
    with slot.stage(file) as gen:
        assert gen.failed() == errno.EDQUOT
    os.close(file)


def test_the_cgroup_of_who_stages_pays(raw: Raw, cgroup: Path) -> None:
    """ENOMEM at its limit, nobody is killed, and the thread that loads is not a way around."""
    cgroup.joinpath("memory.max").write_text(str(LIMIT))
    file = os.memfd_create("large")
    os.truncate(file, 2 * LIMIT)  # a hole: nothing but the model is charged

    def inside() -> list[int]:
        join(cgroup)
        with Raw() as client, client.slot("cgroup", CREATE | EXCL | WRITE, mode=0o600) as slot:
            before = current(cgroup)
            with slot.stage(file, size=LIMIT // 2) as gen:
                billed = [gen.loaded().info().private_bytes, current(cgroup) - before, read("chunk/charged")]
            with slot.stage(file) as gen:
                failure = gen.failed()
            with slot.stage(file, size=LIMIT // 2) as gen:
                gen.loaded()
            slot.buried()
            becomes("chunk/charged", 0)
            assert slot.remove() == 0
        return [*billed, failure]

    held, billed, charged, failure = in_child(inside)
    assert failure == errno.ENOMEM
    assert held == LIMIT // 2
    assert held <= billed <= held + SLACK
    assert charged == held // CHUNK
    told = happened(cgroup)
    assert told["max"] > 0
    assert told["oom_kill"] == 0
    os.close(file)


# Who stages it dies or sleeps


def stage_and_wait(slot: Slot, file: int, flags: int, told: int) -> None:
    gen = slot.stage(file, VERIFY | flags)
    os.write(told, b"x")
    gen.settled()
    signal.pause()


def test_sigkill_half_way(slot: Slot, active: Generation) -> None:
    """At random points of the load: it ends, its memory comes back, and the slot can be staged again."""
    dice = random.Random(5)
    file = os.memfd_create("long")
    os.truncate(file, 96 * CHUNK)
    held, used = read("model/held"), read("chunk/used")
    for turn in range(8 if KASAN else 20):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            stage_and_wait(slot, file, KEEP if turn % 2 else 0, writer)
        os.close(writer)
        assert os.read(reader, 1) == b"x"
        wanted = dice.randrange(48) * CHUNK
        number = slot.info().staged
        assert number == active.number + turn + 1
        wait_for(lambda number=number, wanted=wanted: slot.read(f"{number}/loaded") >= wanted)
        assert slot.told()[number] == "loading"
        os.kill(pid, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
        os.close(reader)
        wait_for(lambda: read("model/held") == held and slot.info().generations == 1)
        assert slot.info().staged == 0
        becomes("chunk/used", used)
    os.close(file)
    slot.load(weights("after", PAGE)).close()


def test_sigstop(slot: Slot, active: Generation) -> None:
    """The load goes on without its process."""
    file = os.memfd_create("long")
    os.truncate(file, 32 * CHUNK)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        gen = slot.stage(file)
        os.write(writer, b"x")
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(gen.state() != State.STAGED)
    assert os.read(reader, 1) == b"x"
    assert os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1])
    number = slot.info().staged
    with slot.acquire(number) as gen:
        assert gen.loaded().info().loaded == 32 * CHUNK
    os.kill(pid, signal.SIGCONT)
    assert os.waitpid(pid, 0)[1] == 0
    for fd in (reader, writer, file):
        os.close(fd)


def test_a_load_leaves_no_thread(slot: Slot) -> None:
    def threads() -> list[str]:
        names = []
        for path in Path("/proc").glob("[0-9]*/comm"):
            try:
                names.append(path.read_text().strip())
            except OSError:  # it has ended
                continue
        return [name for name in names if name.startswith("tm-load")]

    file = os.memfd_create("long")
    os.truncate(file, 128 * CHUNK)
    for end in ("abort", "close", "whole"):
        gen = slot.stage(file, VERIFY if end != "whole" else 0)
        if end != "whole":
            assert len(threads()) == 1
        if end == "abort":
            assert slot.abort(gen.number) == 0
        elif end == "whole":
            gen.loaded()
        gen.close()
        wait_for(lambda: not threads())
    os.close(file)


# Delta


@pytest.mark.parametrize("nr_changed", [0, 1, 7, 20])
@pytest.mark.parametrize("tail", [0, 1, 3 * PAGE])
def test_only_what_changed_takes_memory(slot: Slot, nr_changed: int, tail: int) -> None:
    total = 8 if KASAN else 20
    nr_changed = min(nr_changed, total)
    base = bytearray(weights("base", 4 * PAGE) * (total * CHUNK // (4 * PAGE)) + weights("tail", tail))
    for chunk in range(total):  # no two of them are alike
        base[chunk * CHUNK : chunk * CHUNK + 8] = chunk.to_bytes(8, "little")
    slot.swap(bytes(base))
    changed = random.Random(nr_changed).sample(range(total), nr_changed)
    for chunk in changed:
        base[chunk * CHUNK + random.Random(chunk).randrange(8, CHUNK)] ^= 1
    data = bytes(base)
    held = read("model/held")
    with slot.load(data) as gen:
        assert gen.memory() == (nr_changed * CHUNK, round_up(len(data), PAGE) - nr_changed * CHUNK)
        assert read("model/held") - held == nr_changed * CHUNK
        becomes("chunk/used", total + nr_changed)
        assert gen.contents() == data
        with slot.acquire() as old:
            assert old.memory() == (nr_changed * CHUNK, gen.memory()[1])
        assert slot.commit(gen.number) == 0
        # the old one goes: what was shared is the new one's alone
        for number in (3, 4):
            slot.swap(weights(number, PAGE))
        slot.buried()
        assert gen.memory() == (round_up(len(data), PAGE), 0)
        assert gen.contents() == data
    becomes("model/held", 2 * PAGE)


def test_the_same_at_another_place_is_not_the_same(slot: Slot) -> None:
    """Chunks are compared with the one of the same index."""
    a, b = weights("a", CHUNK), weights("b", CHUNK)
    slot.swap(a + b)
    with slot.load(b + a) as gen:
        assert gen.memory() == (2 * CHUNK, 0)
        assert gen.contents() == b + a
    with slot.load(a + a) as gen:
        assert gen.memory() == (CHUNK, CHUNK)
        assert gen.contents() == a + a


@pytest.mark.parametrize("size", [CHUNK, CHUNK + 1, CHUNK + PAGE, 2 * CHUNK - 1, 2 * CHUNK, 3 * CHUNK + 5])
def test_another_length_shares_whole_chunks(slot: Slot, size: int) -> None:
    longest = weights("longest", 4 * CHUNK)
    slot.swap(longest[: 2 * CHUNK + PAGE])
    with slot.load(longest[:size]) as gen:
        shared = min(size // CHUNK, 2) * CHUNK
        assert gen.memory() == (round_up(size, PAGE) - shared, shared)
        assert gen.contents() == longest[:size]


@pytest.mark.parametrize("at", [0, 1, CHUNK - 1, CHUNK, CHUNK + PAGE - 1, CHUNK + 2 * PAGE + 2])
def test_one_changed_byte_is_found(slot: Slot, at: int) -> None:
    data = bytearray(weights("byte", CHUNK + 2 * PAGE + 3))
    slot.swap(bytes(data))
    data[at] ^= 1
    with slot.load(bytes(data)) as gen:
        private = CHUNK if at < CHUNK else 3 * PAGE
        assert gen.memory() == (private, CHUNK + 3 * PAGE - private)
        assert gen.contents() == data
        with slot.acquire() as old:
            data[at] ^= 1
            assert old.contents() == data


def test_shared_with_many(slot: Slot) -> None:
    """A chunk that five generations have is freed with the last of them, in whatever order they go."""
    common = weights("common", 2 * CHUNK)
    for order in ((0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (2, 0, 4, 1, 3)):
        readers = []
        for number in range(5):
            slot.swap(common + weights((order, number), PAGE))
            readers.append(slot.acquire())
        becomes("model/held", 2 * CHUNK + 5 * PAGE)
        slot.buried()
        assert [r.memory() for r in readers] == [(PAGE, 2 * CHUNK)] * 5
        for _ in range(2):  # out of the slot
            slot.swap(weights("other", PAGE))
        for left, number in zip((4, 3, 2, 1, 0), order, strict=True):
            assert readers[number].contents()[: 2 * CHUNK] == common
            readers[number].close()
            expected = left * PAGE + (2 * CHUNK if left else 0)
            slot.buried()
            assert read("model/held") - slot_memory(slot) == expected
        becomes("chunk/used", 0)


def slot_memory(slot: Slot) -> int:
    """Of the active and the previous generation, that nobody else has a part of."""
    with slot.acquire() as active:
        info = slot.info()
        total = active.memory()[0]
        if info.previous:
            with slot.acquire(info.previous) as previous:
                total += sum(previous.memory())
        return total


def test_the_base_goes_while_it_is_compared(slot: Slot) -> None:
    """The active one is replaced under the load: what it shares stays good."""
    data = weights("d", 16 * PAGE) * (CHUNK // (16 * PAGE)) * (8 if KASAN else 24)
    for _ in range(2 if KASAN else 4):
        slot.swap(data)
        file = file_of(data)
        with slot.stage(file, VERIFY, sha256=sha(data)) as gen:
            rolled = slot.rollback()[0]
            assert rolled in (0, errno.ENOENT)
            assert gen.loaded().contents() == data
            private, shared = gen.memory()
            assert private + shared == len(data)
            assert slot.commit(gen.number) == 0
        os.close(file)


# Many at once


def test_slots_load_beside_each_other(raw: Raw) -> None:
    slots = [raw.slot(f"s{i}", CREATE | EXCL | WRITE, mode=0o600) for i in range(6)]
    data = [weights(i, 3 * CHUNK + i) for i in range(6)]
    files = [file_of(d) for d in data]
    gens = [slot.stage(file) for slot, file in zip(slots, files, strict=True)]
    for gen, expected in zip(gens, data, strict=True):
        assert gen.loaded().contents() == expected
        gen.close()
    for slot, file in zip(slots, files, strict=True):
        assert slot.info().staged == 0
        assert slot.remove() == 0
        slot.close()
        os.close(file)


def test_threads_stage_commit_and_abort_in_one_slot(raw: Raw, slot: Slot) -> None:
    """Whoever loses is told so: at any time one is staged, and whole generations are read."""
    models = {i: weights(i, CHUNK + i * PAGE) for i in range(4)}
    files = {i: file_of(data) for i, data in models.items()}
    failures: list[object] = []
    committed = [0] * 4

    def work(number: int) -> None:
        dice = random.Random(number)
        with raw.slot(slot.name) as mine:
            for _ in range(40):
                result, request = mine.try_stage(files[number])
                if result == errno.EBUSY:
                    time.sleep(0.005)
                    continue
                if result:
                    failures.append(result)
                    continue
                with Generation(request.fd, request.generation) as gen:
                    if dice.random() < 0.3:
                        if mine.abort(gen.number) not in (0, errno.ENOENT):
                            failures.append("abort")
                        continue
                    gen.settled()
                    result = mine.commit(gen.number)
                    if result == 0:
                        committed[number] += 1
                    elif result != errno.ENOENT:
                        failures.append(errno.errorcode[result])
                    if gen.contents() != models[number]:
                        failures.append("contents")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert sum(committed)
    for fd in files.values():
        os.close(fd)
    with slot.acquire() as gen:
        assert gen.contents() in models.values()


def test_what_was_in_memory_before_is_not_seen(raw: Raw, slot: Slot) -> None:
    """Behind the end of the file there are zeros, up to the end of the page."""
    secret = b"\xde\xad\xbe\xef" * (CHUNK // 4)
    with Raw() as victim:
        for item in [victim.alloc(CHUNK, abi.Kind.KV) for _ in range(4)] + [victim.alloc(8 * PAGE) for _ in range(8)]:
            mapping = victim.map_tensor(item)
            mapping[:] = secret[: len(mapping)]
            mapping.close()
    for size in (1, PAGE + 1, 3 * PAGE + 1, CHUNK - PAGE + 1, CHUNK + 1, 2 * CHUNK - 1):
        with slot.load(weights(size, size)) as gen:
            assert gen.behind() == bytes(-size % PAGE)


def test_events(slot: Slot, trace: None) -> None:
    """What a load does is in the trace, by slot and number."""
    slot.swap(weights(1, CHUNK))
    slot.load(weights(2, PAGE)).close()
    for name, numbers in (("stage", ["1", "2"]), ("commit", ["1"]), ("load", ["1", "2"]), ("abort", ["2"])):
        assert [e["generation"] for e in events(f"model_{name}")] == numbers, name
        assert {e["slot"] for e in events(f"model_{name}")} == {"test"}


def test_exec_and_exit_of_who_stages(slot: Slot, active: Generation) -> None:
    """The descriptor is close-on-exec: another program aborts what it cannot know of."""
    file = os.memfd_create("long")
    os.truncate(file, 64 * CHUNK)

    def run(how: Callable[[], object]) -> int:
        def child() -> None:
            slot.stage(file, VERIFY)
            how()

        return status_of(child)

    assert run(lambda: os.execv("/bin/true", ["true"])) == 0
    assert run(lambda: os._exit(3)) == 3 << 8
    wait_for(lambda: slot.info().staged == 0 and slot.info().generations == 1)
    os.close(file)
