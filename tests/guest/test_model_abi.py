# SPDX-License-Identifier: MIT
"""Model slots as such: every field of every call, bad ones above all; what fails has changed nothing."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import re
import resource
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from device import CHUNK, PAGE, SYSFS, Generation, Raw, Slot, file_of, full, read, weights
from process import FAILED, libc
from tensormem import abi

CREATE, EXCL, WRITE = abi.OpenFlag.CREATE, abi.OpenFlag.EXCL, abi.OpenFlag.WRITE
CACHED, VERIFY, KEEP = abi.StageFlag.CACHED, abi.StageFlag.VERIFY, abi.StageFlag.KEEP
NEW = CREATE | EXCL | WRITE
U32, U64 = (1 << 32) - 1, (1 << 64) - 1
COUNTERS = ("model/slots", "model/generations", "model/held", "clients/bytes", "chunk/used", "buddy/used_pages")


def state_of(slot: Slot) -> tuple[object, ...]:
    """What a call that fails leaves as it was."""
    info = slot.buried().info()
    places = tuple(getattr(info, name) for name, _ in abi.ModelSlot._fields_)
    descriptors = tuple(sorted(os.listdir("/proc/self/fd")))
    return places, descriptors, tuple(read(name) for name in COUNTERS), tuple(sorted(slot.told().items()))


@pytest.fixture
def file() -> Iterator[int]:
    fd = file_of(weights("file", 3 * PAGE))
    yield fd
    os.close(fd)


@pytest.fixture
def filled(slot: Slot) -> Slot:
    """Generations 1 and 2 are previous and active, 3 is staged (without a descriptor)."""
    assert slot.swap(weights(1, PAGE)) == 1
    assert slot.swap(weights(2, PAGE)) == 2
    slot.load(weights(3, PAGE), KEEP).close()
    assert slot.places() == (2, 1, 3)
    return slot


# Names


GOOD_NAMES = ["a", "0", "-", "_", "chat", "a.b", "a..", "Llama-3.1_8B.gguf", "x" * 63, "-rf", "active", "slot", "1"]
BAD_NAMES = [
    b"", b".", b"..", b".hidden", b"a/b", b"/", b"/a", b"a/", b"a b", b" ", b"a\n", b"\x01", b"a\x7f", b"\x80",
    b"slots", b"generations", b"held",  # files beside the slots' folders
    b"evictable", b"evicted", b"reloads", b"reload_failed",
    "é".encode(), b"\xff\xfe", b"a:b", b"a,b", b"a%s", b"a*", b"a~", b"a@b", b"a\\b", b"x" * 64,
]  # fmt: skip


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_names(raw: Raw, name: str) -> None:
    with raw.slot(name, NEW, mode=0o600) as slot:
        assert slot.read("active") == 0
        assert slot.swap(weights(name, PAGE)) == 1
        assert slot.read("active") == 1
        assert slot.remove() == 0
    assert not (SYSFS / "model" / name).exists()


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
@pytest.mark.parametrize("flags", [NEW, CREATE | WRITE, 0])
def test_bad_names(raw: Raw, name: bytes, flags: int) -> None:
    result, request = raw.try_slot(name, flags)
    assert result == errno.EINVAL
    assert request.fd == -1
    assert read("model/slots") == 0


def test_what_follows_a_name_is_zero(raw: Raw) -> None:
    for at in (2, 3, 40, 63):
        name = bytearray(64)
        name[0] = ord("a")
        name[at] = ord("b")
        assert raw.try_slot(bytes(name), NEW)[0] == errno.EINVAL
        assert raw.try_slot(bytes(name), 0)[0] == errno.EINVAL
    assert read("model/slots") == 0


def test_names_differ_by_every_byte(raw: Raw) -> None:
    names = ["a", "A", "aa", "a" * 62, "a" * 63, "a" * 62 + "b"]
    slots = [raw.slot(name, NEW, mode=0o600) for name in names]
    assert read("model/slots") == len(names)
    for size, slot in enumerate(slots, 1):
        slot.swap(weights(slot.name, size))
    for size, name in enumerate(names, 1):
        with raw.slot(name, 0) as reader, reader.acquire() as gen:
            assert gen.contents() == weights(name, size)
    for slot in slots:
        assert slot.remove() == 0
        slot.close()


# Opening


def test_opening(raw: Raw) -> None:
    assert raw.try_slot("s", WRITE)[0] == errno.ENOENT
    assert raw.try_slot("s", 0)[0] == errno.ENOENT
    assert raw.try_slot("s", CREATE)[0] == errno.EINVAL  # needs WRITE
    assert raw.try_slot("s", CREATE | EXCL)[0] == errno.EINVAL
    assert read("model/slots") == 0
    with raw.slot("s", CREATE | WRITE, mode=0o640) as slot:
        assert read("model/slots") == 1
        assert raw.try_slot("s", NEW, mode=0o600)[0] == errno.EEXIST
        with raw.slot("s", CREATE | WRITE, mode=0o666) as again, raw.slot("s", 0) as reader:
            assert read("model/slots") == 1
            assert stat.S_IMODE(os.fstat(again.fd).st_mode) == 0o640
            slot.swap(weights("s", PAGE))
            for other in (again, reader):
                assert other.places() == (1, 0, 0)
                assert os.fstat(other.fd).st_ino == os.fstat(slot.fd).st_ino
        assert slot.remove() == 0


@pytest.mark.parametrize("bit", range(3, 32))
def test_unknown_flags_of_open(raw: Raw, bit: int) -> None:
    assert raw.try_slot("s", NEW | 1 << bit)[0] == errno.EINVAL
    assert raw.try_slot("s", 1 << bit)[0] == errno.EINVAL


def test_fields_of_open(raw: Raw) -> None:
    for bit in range(32):
        assert raw.try_slot("s", NEW, pad=1 << bit)[0] == errno.EINVAL
        mode = 1 << bit
        if mode & ~0o666:
            assert raw.try_slot("s", NEW, mode=mode)[0] == errno.EINVAL, oct(mode)
    assert raw.try_slot("s", EXCL | WRITE)[0] == errno.EINVAL  # of what is not created
    assert raw.try_slot("s", EXCL)[0] == errno.EINVAL
    assert raw.try_slot("s", WRITE, mode=0o600)[0] == errno.EINVAL
    assert read("model/slots") == 0


def test_the_descriptor_of_a_slot(slot: Slot) -> None:
    assert fcntl.fcntl(slot.fd, fcntl.F_GETFD) == fcntl.FD_CLOEXEC
    for call in (
        lambda: os.read(slot.fd, 1), lambda: os.write(slot.fd, b"x"), lambda: os.pread(slot.fd, 1, 0),
        lambda: os.ftruncate(slot.fd, 0),
    ):  # fmt: skip
        with pytest.raises(OSError, match=r"."):
            call()
    assert libc.mmap(None, PAGE, mmap.PROT_READ, mmap.MAP_SHARED, slot.fd, 0) == FAILED
    assert ctypes.get_errno() == errno.ENODEV
    assert slot.info().generations == 0


# Staging


@pytest.mark.parametrize("bit", range(4, 32))
def test_unknown_flags_of_stage(slot: Slot, file: int, bit: int) -> None:
    before = state_of(slot)
    assert slot.try_stage(file, 1 << bit)[0] == errno.EINVAL
    assert state_of(slot) == before


def test_fields_of_stage(slot: Slot, file: int) -> None:
    before = state_of(slot)
    for bit in range(32):
        assert slot.try_stage(file, pad=1 << bit)[0] == errno.EINVAL
    for at in range(32):  # a checksum that nobody asks for
        request = abi.ModelStage(file=file)
        request.sha256[at] = 1
        assert slot.ioctl(abi.IOC_MODEL_STAGE, request) == errno.EINVAL
    assert state_of(slot) == before
    # what is only told is not looked at
    request = abi.ModelStage(file=file, generation=U64, fd=77)
    assert slot.ioctl(abi.IOC_MODEL_STAGE, request) == 0
    assert request.generation == 1
    with Generation(request.fd, 1) as gen:
        assert gen.loaded().contents() == weights("file", 3 * PAGE)
        assert fcntl.fcntl(gen.fd, fcntl.F_GETFD) == fcntl.FD_CLOEXEC


@pytest.mark.parametrize(
    "fields",
    [
        {"offset": 3 * PAGE},
        {"offset": 3 * PAGE + 1},
        {"offset": 1 << 62},
        {"offset": (1 << 63) - 1},
        {"offset": 1 << 63},
        {"offset": U64},
        {"offset": U64, "size": 1},
        {"offset": U64, "size": U64},
        {"offset": (1 << 63) - 1, "size": 1},
        {"offset": 1 << 62, "size": 1 << 62},
        {"offset": 1, "size": (1 << 63) - 1},
        {"offset": PAGE, "size": U64 - PAGE + 1},
        {"offset": PAGE, "size": U64},
        {"size": 1 << 63},
        {"size": U64},
    ],
    ids=str,
)
def test_ranges_that_overflow_or_hold_nothing(slot: Slot, file: int, fields: dict[str, int]) -> None:
    before = state_of(slot)
    assert slot.try_stage(file, **fields)[0] == errno.EINVAL
    assert state_of(slot) == before


@pytest.mark.parametrize("size", [1 << 40, 1 << 50, 1 << 62, (1 << 63) - 1])
def test_sizes_that_no_machine_has(slot: Slot, file: int, size: int) -> None:
    """Told at once or by a load that fails; the kernel allocates no table for it first."""
    before = state_of(slot)
    result, request = slot.try_stage(file, size=size)
    if result == 0:
        with Generation(request.fd, request.generation) as gen:
            assert gen.failed() in (errno.EBADMSG, errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)
        assert slot.places() == (0, 0, 0)
    else:
        assert result in (errno.EINVAL, errno.EFBIG, errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)
        assert state_of(slot) == before


def a_directory() -> int:
    return os.open("/tmp", os.O_RDONLY | os.O_DIRECTORY)


def a_pipe() -> int:
    reader, writer = os.pipe()
    os.close(writer)
    return reader


def a_socket() -> int:
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).detach()


def a_path() -> int:
    Path("/tmp/path").write_bytes(bytes(PAGE))
    return os.open("/tmp/path", os.O_PATH)


def write_only() -> int:
    Path("/tmp/write-only").write_bytes(bytes(PAGE))
    return os.open("/tmp/write-only", os.O_WRONLY)


def an_empty_file() -> int:
    return os.memfd_create("empty")


BAD_FILES: list[tuple[Callable[[], int], int]] = [
    (lambda: -1, errno.EBADF),
    (lambda: -(1 << 31), errno.EBADF),
    (lambda: (1 << 31) - 1, errno.EBADF),
    (lambda: 9999, errno.EBADF),
    (a_path, errno.EBADF),
    (write_only, errno.EACCES),
    (a_directory, errno.EINVAL),
    (a_pipe, errno.EINVAL),
    (a_socket, errno.EINVAL),
    (lambda: os.open("/dev/zero", os.O_RDONLY), errno.EINVAL),
    (lambda: os.open("/dev/tensormem", os.O_RDONLY), errno.EINVAL),
    (lambda: os.open("/proc/version", os.O_RDONLY), errno.EINVAL),
    (lambda: os.open(SYSFS / "chunk", os.O_RDONLY), errno.EINVAL),
    (lambda: os.eventfd(1), errno.EINVAL),
    (an_empty_file, errno.EINVAL),
]


@pytest.mark.parametrize(("make", "expected"), BAD_FILES)
@pytest.mark.parametrize("flags", [0, VERIFY, CACHED])
def test_files_that_cannot_be_staged(slot: Slot, make: Callable[[], int], expected: int, flags: int) -> None:
    fd = make()
    before = state_of(slot)
    result, request = slot.try_stage(fd, flags)
    assert result == expected
    assert request.fd == -1
    assert state_of(slot) == before
    if 0 <= fd < 9999:
        os.close(fd)


def test_descriptors_of_our_own_that_cannot_be_staged(raw: Raw, slot: Slot) -> None:
    with raw.kv([full(2, PAGE)]) as kv:
        for fd in (raw.fd, slot.fd, kv.fd):
            before = state_of(slot)
            assert slot.try_stage(fd)[0] == errno.EINVAL
            assert state_of(slot) == before


def test_a_closed_descriptor(slot: Slot, file: int) -> None:
    copy = os.dup(file)
    os.close(copy)
    assert slot.try_stage(copy)[0] == errno.EBADF


def test_a_file_of_proc(slot: Slot) -> None:
    """It is regular and says that it has no bytes: a size that is promised is found or missed."""
    for name in ("/proc/kmsg", "/sys/kernel/tracing/trace_pipe"):  # these would wait
        fd = os.open(name, os.O_RDONLY | os.O_NONBLOCK)
        assert slot.try_stage(fd, size=1)[0] == errno.EINVAL
        os.close(fd)
    with open("/proc/version", "rb", buffering=0) as proc:
        text = proc.read()
        for size, good in ((len(text), True), (len(text) + 1, False)):
            result, request = slot.try_stage(proc.fileno(), size=size)
            if result:
                assert result == errno.EINVAL
                continue
            with Generation(request.fd, request.generation) as gen:
                if gen.settled().state() == abi.ModelState.STAGED:
                    assert good
                    assert gen.contents() == text
                else:
                    assert gen.failed() in (errno.EBADMSG, errno.EINVAL)


def test_a_generation_is_a_file(slot: Slot) -> None:
    """What can be read can be staged: the active one again is shared as a whole."""
    data = weights("own", CHUNK + 3 * PAGE)
    slot.swap(data)
    with slot.acquire() as gen, slot.stage(gen.fd) as copy:
        assert copy.loaded().contents() == data
        assert copy.memory() == (0, CHUNK + 3 * PAGE)
    with slot.acquire() as gen, slot.stage(gen.fd, offset=PAGE, size=PAGE + 1) as part:
        assert part.loaded().contents() == data[PAGE : 2 * PAGE + 1]


def test_only_one_is_staged(slot: Slot, file: int) -> None:
    with slot.stage(file) as gen:
        before = state_of(slot)
        assert slot.try_stage(file)[0] == errno.EBUSY
        gen.loaded()
        assert slot.try_stage(file)[0] == errno.EBUSY
        assert slot.abort(gen.number) == 0
        assert before[0][2] == gen.number
        slot.stage(file).close()
    assert slot.info().last == 2  # numbers are given out when it is staged, and never again


def test_a_call_that_fails_gives_out_no_number(slot: Slot, file: int) -> None:
    for fields in ({"size": U64}, {"flags": 1 << 30}, {"pad": 1}):
        assert slot.try_stage(file, **fields)[0] == errno.EINVAL
    assert slot.try_stage(-1)[0] == errno.EBADF
    assert slot.info().last == 0


# Committing, aborting, rolling back, acquiring, removing


def test_flags_and_pads(filled: Slot) -> None:
    before = state_of(filled)
    for bit in range(32):
        flag = 1 << bit
        for request in (abi.IOC_MODEL_COMMIT, abi.IOC_MODEL_ABORT, abi.IOC_MODEL_ROLLBACK):
            number = 1 if request == abi.IOC_MODEL_ROLLBACK else 3
            for fields in ({"flags": flag}, {"pad": flag}):
                item = abi.ModelWhich(generation=number, **fields)
                assert filled.ioctl(request, item) == errno.EINVAL
        result, item = filled.try_acquire(0, flags=flag)
        assert (result, item.fd) == (errno.EINVAL, -1)
        assert filled.ioctl(abi.IOC_MODEL_REMOVE, abi.ModelRemove(flags=flag)) == errno.EINVAL
        assert filled.ioctl(abi.IOC_MODEL_REMOVE, abi.ModelRemove(pad=flag)) == errno.EINVAL
    assert state_of(filled) == before


def test_numbers_that_are_not_there(filled: Slot) -> None:
    before = state_of(filled)
    for number in (0, 1, 2, 4, 1 << 32 | 3, 1 << 63, U64):
        assert filled.commit(number) == errno.ENOENT
        assert filled.abort(number) == errno.ENOENT
    for number in (2, 3, 4, 1 << 32 | 1, U64):
        assert filled.rollback(number)[0] == errno.ENOENT
    for number in (4, 1 << 32 | 1, 1 << 63, U64):
        assert filled.try_acquire(number)[0] == errno.ENOENT
    assert state_of(filled) == before


def test_an_empty_slot(slot: Slot) -> None:
    before = state_of(slot)
    for number in (0, 1):
        assert slot.commit(number) == slot.abort(number) == errno.ENOENT
        assert slot.rollback(number)[0] == slot.try_acquire(number)[0] == errno.ENOENT
    assert state_of(slot) == before
    assert before[0] == (0, 0, 0, 0, 0, 0)


def test_a_removed_slot(raw: Raw, filled: Slot, file: int) -> None:
    with raw.slot(filled.name, 0) as reader, filled.acquire(2) as gen:
        assert filled.remove() == 0
        for slot in (filled, reader):
            assert slot.ioctl(abi.IOC_MODEL_SLOT, abi.ModelSlot()) == errno.ENOENT
            assert slot.try_acquire()[0] == errno.ENOENT
            assert slot.try_acquire(2)[0] == errno.ENOENT
        assert filled.try_stage(file)[0] == errno.ENOENT
        assert filled.commit(3) == filled.abort(3) == filled.rollback()[0] == errno.ENOENT
        assert filled.remove() == errno.ENOENT
        # its name is free
        with raw.slot(filled.name, NEW, mode=0o600) as other:
            assert other.info().last == 0
            assert other.swap(weights("other", PAGE)) == 1
            assert gen.contents() == weights(2, PAGE)
            assert other.remove() == 0


def test_a_descriptor_for_reading(raw: Raw, filled: Slot, file: int) -> None:
    """Without WRITE: acquire what is active or previous, and see; nothing else."""
    before = state_of(filled)
    with raw.slot(filled.name, 0) as slot:
        assert slot.places() == (2, 1, 3)
        assert slot.try_stage(file)[0] == errno.EACCES
        assert slot.commit(3) == slot.abort(3) == errno.EACCES
        assert slot.rollback()[0] == errno.EACCES
        assert slot.remove() == errno.EACCES
        assert slot.try_acquire(3)[0] == errno.EACCES
        assert slot.try_acquire(4)[0] == errno.ENOENT
        for number in (0, 1, 2):
            with slot.acquire(number) as gen:
                assert gen.number == (number or 2)
                assert gen.contents() == weights(gen.number, PAGE)
    assert state_of(filled) == before
    with filled.acquire(3) as gen:
        assert gen.contents() == weights(3, PAGE)


# Structs of another size, addresses that lead nowhere


def good(slot: Slot, struct: type[abi.Struct], request: int, file: int) -> abi.Struct:
    """A call that succeeds on a slot with all three places taken."""
    if struct is abi.ModelStage:
        staged = slot.info().staged
        assert not staged or slot.abort(staged) == 0
        return abi.ModelStage(file=file, fd=-1)
    if struct is abi.ModelWhich:
        if request == 0x54:
            return abi.ModelWhich()
        if not slot.info().staged:
            slot.load(weights("more", PAGE), KEEP).close()
        return abi.ModelWhich(generation=slot.info().staged)
    return struct()


#: Number, struct, what every version has had, and where a new descriptor is told.
CALLS = [
    (0x50, abi.ModelSlot, 0, None),
    (0x51, abi.ModelStage, 68, 64),
    (0x52, abi.ModelWhich, 12, None),
    (0x53, abi.ModelWhich, 12, None),
    (0x54, abi.ModelWhich, 12, None),
    (0x55, abi.ModelAcquire, 16, 12),
]


@pytest.mark.parametrize(("number", "struct", "least", "told"), CALLS)
def test_callers_of_another_age(
    filled: Slot, file: int, number: int, struct: type[abi.Struct], least: int, told: int | None
) -> None:
    """Shorter structs down to what every version has had, longer ones while the tail is zero."""
    size = ctypes.sizeof(struct)

    def done(result: int, buffer: bytearray) -> None:
        if result == 0 and told is not None:
            fd = int.from_bytes(buffer[told : told + 4], "little", signed=True)
            Generation(fd, 0).settled().close()

    for short in range(0, size, 4):
        value = bytes(good(filled, struct, number, file))
        buffer = bytearray(value[:short] + b"\xa5" * (size - short))
        before = state_of(filled)
        result = filled.ioctl(abi.iowr(number, short), buffer)
        assert result == (0 if short >= least else errno.EINVAL), short
        assert buffer[short:] == b"\xa5" * (size - short)
        done(result, buffer)
        assert result == 0 or state_of(filled) == before
    for extra in (1, 8, 64, min(PAGE, (1 << 14) - 1) - size):
        value = bytes(good(filled, struct, number, file))
        before = state_of(filled)
        for at in {0, extra - 1}:
            tail = bytearray(extra)
            tail[at] = 1
            result = filled.ioctl(abi.iowr(number, size + extra), bytearray(value) + tail)
            assert result == errno.EINVAL
            assert state_of(filled) == before
        buffer = bytearray(value) + bytearray(extra)
        assert filled.ioctl(abi.iowr(number, size + extra), buffer) == 0
        assert buffer[size:] == bytes(extra)
        done(0, buffer)


def test_openers_and_removers_of_another_age(raw: Raw) -> None:
    size = ctypes.sizeof(abi.ModelOpen)
    value = bytes(abi.ModelOpen(flags=NEW, mode=0o600, fd=-1))
    value = b"aged" + value[4:] + bytes(64)
    for short in range(0, size + 64, 4):
        buffer = bytearray(value[:short])
        result = raw.ioctl(abi.iowr(0x31, short), buffer)
        assert result == (0 if short >= 76 else errno.EINVAL), short
        if result:
            assert buffer == value[:short]
            continue
        with Slot(int.from_bytes(buffer[72:76], "little"), "aged") as slot:
            assert slot.ioctl(abi.iowr(0x56, 0), bytearray()) == errno.EINVAL
            length = (4, 8, 40)[short // 4 % 3]
            assert slot.ioctl(abi.iowr(0x56, length), bytearray(length)) == 0
    for at in (size, size + 63):
        buffer = bytearray(value)
        buffer[at] = 1
        assert raw.ioctl(abi.iowr(0x31, size + 64), buffer) == errno.EINVAL
    assert read("model/slots") == 0


def test_describers_of_another_age(slot: Slot) -> None:
    size = ctypes.sizeof(abi.ModelInfo)
    slot.swap(weights("i", PAGE))
    with slot.acquire() as gen:
        whole = bytes(gen.info())
        for length in range(0, size + 64, 4):
            buffer = bytearray(length)
            assert gen.ioctl(abi.iowr(0x60, length), buffer) == 0
            assert bytes(buffer) == whole[:length] + bytes(max(0, length - size))
        for at in (size, size + 63):
            buffer = bytearray(size + 64)
            buffer[at] = 1
            assert gen.ioctl(abi.iowr(0x60, size + 64), buffer) == errno.EINVAL


def test_results_that_cannot_be_written_are_undone(raw: Raw, filled: Slot, file: int) -> None:
    """The struct is readable and not writable: EFAULT, and all is as before."""
    memory = mmap.mmap(-1, PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))

    def call(fd: int, request: int, item: abi.Struct, at: int = address) -> int:
        assert libc.mprotect(address, PAGE, mmap.PROT_READ | mmap.PROT_WRITE) == 0
        memory[: len(bytes(item))] = bytes(item)
        assert libc.mprotect(address, PAGE, mmap.PROT_READ) == 0
        if libc.ioctl(fd, ctypes.c_ulong(request), ctypes.c_void_p(at)) == 0:
            return 0
        return ctypes.get_errno()

    name = abi.ModelOpen(flags=NEW, mode=0o600)
    name.name[0] = ord("n")
    again = abi.ModelOpen(flags=WRITE)
    ctypes.memmove(ctypes.addressof(again), filled.name.encode(), len(filled.name))
    with filled.acquire() as gen:
        before = state_of(filled)
        for fd, request, item in (
            (raw.fd, abi.IOC_MODEL_OPEN, name),
            (raw.fd, abi.IOC_MODEL_OPEN, again),
            (filled.fd, abi.IOC_MODEL_SLOT, abi.ModelSlot()),
            (filled.fd, abi.IOC_MODEL_ROLLBACK, abi.ModelWhich()),
            (filled.fd, abi.IOC_MODEL_ACQUIRE, abi.ModelAcquire()),
            (gen.fd, abi.IOC_MODEL_INFO, abi.ModelInfo()),
        ):
            for at in (address, 0, 1 << 47, U64 - 64):
                assert call(fd, request, item, at) == errno.EFAULT, hex(request)
                assert state_of(filled) == before, hex(request)
        # these tell nothing new: they may succeed, or have done nothing
        for request in (abi.IOC_MODEL_COMMIT, abi.IOC_MODEL_ABORT):
            if call(filled.fd, request, abi.ModelWhich(generation=3)):
                assert state_of(filled) == before
                continue
            assert filled.places() == ((3, 2, 0) if request == abi.IOC_MODEL_COMMIT else (2, 1, 0))
            break
        staged = filled.info().staged
        assert not staged or filled.abort(staged) == 0
        before = state_of(filled)
        for at in (address, 0, 1 << 47, U64 - 64):
            assert call(filled.fd, abi.IOC_MODEL_STAGE, abi.ModelStage(file=file), at) == errno.EFAULT
            after = state_of(filled)
            assert after[1:] == before[1:]
            assert after[0][:3] == before[0][:3]


def test_a_slot_is_not_seen_before_it_can_be_opened(raw: Raw) -> None:
    """No descriptor is left for it: there is no slot either."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = os.open("/dev/null", os.O_RDONLY)
    os.close(spare)
    resource.setrlimit(resource.RLIMIT_NOFILE, (spare, hard))
    try:
        assert raw.try_slot("s", NEW, mode=0o600)[0] == errno.EMFILE
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert read("model/slots") == 0


def test_no_descriptor_left(filled: Slot, file: int) -> None:
    assert filled.abort(3) == 0
    before = state_of(filled)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = os.open("/dev/null", os.O_RDONLY)
    os.close(spare)
    resource.setrlimit(resource.RLIMIT_NOFILE, (spare, hard))
    try:
        assert filled.try_acquire()[0] == errno.EMFILE
        assert filled.try_stage(file)[0] == errno.EMFILE
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    after = state_of(filled)
    assert (after[0][:3], after[1:]) == (before[0][:3], before[1:])


# Calls on the wrong descriptor


def test_each_descriptor_knows_its_calls(raw: Raw, filled: Slot) -> None:
    slot_calls, others = range(0x50, 0x58), (0x4F, 0x58, 0x5F, 0x61, 0xFF)
    with filled.acquire() as gen, raw.kv([full(2, PAGE)]) as kv:
        before = state_of(filled)
        sizes = (4, 8, 16, 40, 72)
        for size in sizes:
            for number in (*slot_calls, 0x60, *others):
                assert raw.ioctl(abi.iowr(number, size), bytearray(size)) == errno.ENOTTY
                assert kv.ioctl(abi.iowr(number, size), bytearray(size)) == errno.ENOTTY
            for number in (0x00, 0x10, 0x30, 0x31, 0x40, 0x60, *others):
                assert filled.ioctl(abi.iowr(number, size), bytearray(size)) == errno.ENOTTY
            for number in (0x00, 0x10, 0x30, 0x31, 0x40, *slot_calls, *others):
                assert gen.ioctl(abi.iowr(number, size), bytearray(size)) == errno.ENOTTY
        for direction in (0, 1, 2):
            for descriptor, request in ((filled, abi.IOC_MODEL_SLOT), (gen, abi.IOC_MODEL_INFO),
                                        (raw, abi.IOC_MODEL_OPEN)):  # fmt: skip
                wrong = request & ~(3 << 30) | direction << 30
                assert descriptor.ioctl(wrong, bytearray(256)) == errno.ENOTTY
        assert state_of(filled) == before


def test_the_descriptor_of_a_generation(slot: Slot) -> None:
    data = weights("d", CHUNK + 5 * PAGE + 3)
    slot.swap(data)
    with slot.acquire() as gen:
        assert fcntl.fcntl(gen.fd, fcntl.F_GETFD) == fcntl.FD_CLOEXEC
        status = os.fstat(gen.fd)
        assert (status.st_size, stat.S_ISREG(status.st_mode)) == (len(data), True)
        assert status.st_mode & 0o222 == 0
        info = gen.info()
        assert (info.generation, info.flags, info.size, info.loaded) == (1, 0, len(data), len(data))
        assert (info.readers, info.error, info.pad, info.state) == (1, 0, 0, abi.ModelState.ACTIVE)
        assert info.mapping in tuple(abi.Mapping)
        for call in (
            lambda: os.write(gen.fd, b"x"), lambda: os.pwrite(gen.fd, b"x", 0), lambda: os.ftruncate(gen.fd, 0),
            lambda: os.posix_fallocate(gen.fd, 0, PAGE),
        ):  # fmt: skip
            with pytest.raises(OSError, match=r".") as refusal:
                call()
            assert refusal.value.errno in (errno.EBADF, errno.EINVAL, errno.ESPIPE)
        with open(f"/proc/self/fdinfo/{gen.fd}") as file:
            lines = dict(re.findall(r"^(\S+):\t(.*)$", file.read(), re.M))
        for name, _ in abi.ModelInfo._fields_:
            if name in lines and lines[name].isdigit():
                assert int(lines[name]) == getattr(info, name), name
        assert {"generation", "size", "loaded", "readers"} <= set(lines)
        assert gen.contents() == data
