# SPDX-License-Identifier: MIT
"""The RT pool's calls one by one: every field, every size of every struct, every wrong handle."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import resource
import time
from collections.abc import Callable

import pytest

from device import CHUNK, PAGE, RT, Raw, full, read, round_up
from process import libc
from tensormem import abi

ABSOLUTE, RESERVED, MOVABLE = abi.RTFlag.ABSOLUTE, abi.RTFlag.RESERVED, abi.RTFlag.MOVABLE
U32, U64 = (1 << 32) - 1, (1 << 64) - 1
SECOND = 10**9
#: What says that a handle is of a movable block.
MOVABLE_BIT = 1 << 31


def granule(rt: RT) -> int:
    return rt.info().granule


def refused(raw: Raw, size: int = CHUNK, arena: int = -1, **fields: int) -> int:
    """Why there is no such arena; nothing may be left of it."""
    before = os.listdir("/proc/self/fd"), read("rt/arenas"), read("rt/used"), raw.info().used
    result, request = raw.try_rt(size, arena, **fields)
    assert result != 0
    assert request.fd == fields.get("fd", -1)
    assert before == (os.listdir("/proc/self/fd"), read("rt/arenas"), read("rt/used"), raw.info().used)
    return result


# Opening


@pytest.mark.parametrize("size", [1, PAGE, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK, 24 * CHUNK])
def test_an_arena_is_whole_chunks(raw: Raw, size: int) -> None:
    with raw.rt(size) as rt:
        held = round_up(size, CHUNK)
        unit = granule(rt)
        assert unit & (unit - 1) == 0
        assert raw.info().cache_line <= unit <= PAGE
        expected = {name: 0 for name, *_ in abi.RTInfo._fields_}
        expected |= {"size": held, "granule": unit, "clients": 1, "free": held, "largest": held}
        assert rt.counts() == expected
        assert (read("rt/used"), read("rt/arenas"), read("rt/held")) == (held, 1, held)
        assert raw.info().used == held
        # all of it can be had as one block
        item = rt.alloc(held)
        assert (item.offset, rt.info().free, rt.info().largest) == (0, 0, 0)
    assert (read("rt/used"), read("rt/arenas")) == (0, 0)


@pytest.mark.parametrize(
    "fields",
    [
        {"size": 0},
        {"priority": 100},
        {"priority": U32},
        {"movable": 65537},
        {"movable": U32},
        {"pad": 1},
        {"pad": 1 << 31},
        *({"flags": 1 << bit} for bit in range(32)),
    ],
    ids=str,
)
def test_impossible_arenas(raw: Raw, fields: dict[str, int]) -> None:
    assert refused(raw, **fields) == errno.EINVAL


@pytest.mark.parametrize("size", [1 << 34, 1 << 40, 1 << 62, 1 << 63, U64 - CHUNK, U64 - CHUNK + 2, U64])
def test_sizes_beyond_the_pool(raw: Raw, size: int) -> None:
    assert refused(raw, size) == errno.ENOSPC
    assert raw.set_quota(CHUNK - 1) == 0
    assert refused(raw, CHUNK) == errno.EDQUOT


def test_joining(raw: Raw) -> None:
    """Clients of one arena share its heap and have blocks of their own."""
    with Raw() as other, raw.rt(movable=4) as first, other.join(first, 7) as second:
        assert (raw.info().used, other.info().used) == (CHUNK, 0)
        mine, its = first.alloc(5000), second.alloc(7000)
        infos = first.info(), second.info()
        assert [i.clients for i in infos] == [2, 2]
        assert [i.priority for i in infos] == [0, 7]
        assert [i.blocks for i in infos] == [1, 1]
        unit = granule(first)
        used = round_up(5000, unit), round_up(7000, unit)
        assert [i.used for i in infos] == [*used]
        assert [i.free for i in infos] == [CHUNK - sum(used)] * 2
        assert read("rt/arenas") == 1
        assert second.free(mine.handle) == first.free(its.handle) == errno.ENOENT
        view, its_view = first.view(), second.view()
        view[its.offset : its.offset + 5] = b"hello"
        assert its_view[its.offset : its.offset + 5] == b"hello"
        view.close()
        its_view.close()
        # who made it goes; the arena stays, and on whose bill it is
        first.close()
        assert (second.info().clients, second.info().free) == (1, CHUNK - used[1])
        assert raw.info().used == read("rt/used") == CHUNK
        third = raw.join(second)
        second.close()
        assert third.info().free == third.info().largest == CHUNK
        third.close()
    assert read("rt/used") == 0


def test_what_cannot_be_joined(raw: Raw) -> None:
    null = os.open("/dev/null", os.O_RDWR)
    with raw.rt(movable=1) as rt, raw.kv([full(2, PAGE // 8)]) as kv:
        for fd in (null, raw.fd, kv.fd):
            assert refused(raw, 0, fd) == errno.EINVAL
        for fd in (987, (1 << 31) - 1, -2, -(1 << 31)):
            assert refused(raw, 0, fd) == errno.EBADF
        for fields in ({"size": 1}, {"size": CHUNK}, {"movable": 1}, {"priority": 100}, {"flags": 1}, {"pad": 1}):
            assert refused(raw, **{"size": 0, "arena": rt.fd, **fields}) == errno.EINVAL
        assert rt.info().clients == 1
    os.close(null)


def test_an_arena_has_255_clients(raw: Raw) -> None:
    with raw.rt() as first:
        others = [raw.join(first, i % 100) for i in range(254)]
        assert first.info().clients == 255
        assert refused(raw, 0, first.fd) == errno.ENOSPC
        blocks = [rt.alloc(1) for rt in others]
        assert len({b.offset for b in blocks}) == len({b.handle for b in blocks}) == 254
        others[100].close()
        assert first.info().clients == 254
        again = raw.join(first)
        assert again.free(blocks[100].handle) == errno.ENOENT
        assert refused(raw, 0, first.fd) == errno.ENOSPC
        for rt in (again, *others):
            rt.close()
        assert (first.info().clients, first.info().largest) == (1, CHUNK)


def test_the_descriptor(raw: Raw) -> None:
    with raw.rt(priority=3) as rt:
        assert fcntl.fcntl(rt.fd, fcntl.F_GETFD) == fcntl.FD_CLOEXEC
        assert os.readlink(f"/proc/self/fd/{rt.fd}") == "anon_inode:[tensormem-rt]"
        assert rt.reserve(1000, 3) == 0
        rt.alloc(1000)
        with open(f"/proc/self/fdinfo/{rt.fd}") as file:
            lines = dict(line.split(":\t", 1) for line in file.read().splitlines() if ":\t" in line)
        for name, value in rt.counts().items():
            assert name in ("granule", "clients", "pad") or int(lines[name]) == value, name
        assert rt.folder().name == lines["tensormem-rt"]
        assert rt.read("arena") == int(lines["arena"])
        for move in (lambda: os.read(rt.fd, 8), lambda: os.write(rt.fd, bytes(8))):
            with pytest.raises(OSError, match="Invalid argument"):
                move()


def test_no_descriptor_left(raw: Raw) -> None:
    with raw.rt() as rt:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        spare = os.open("/dev/null", os.O_RDONLY)
        os.close(spare)
        resource.setrlimit(resource.RLIMIT_NOFILE, (spare, hard))
        try:
            assert raw.try_rt()[0] == raw.try_rt(0, rt.fd)[0] == errno.EMFILE
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert (read("rt/arenas"), rt.info().clients) == (1, 1)


# Structs


def block(rt: RT, flags: int = 0) -> int:
    return rt.alloc(256, flags=flags).handle


#: Number, struct, the least of it that every version has had, and how to fill it so that it succeeds.
CALLS: list[tuple[int, type[abi.Struct], int, Callable[[RT], abi.Struct]]] = [
    (0x70, abi.RTInfo, 0, lambda rt: abi.RTInfo()),
    (0x71, abi.RTReserve, 16, lambda rt: abi.RTReserve(size=(rt.info().reserved + 1) * 2, count=1)),
    (0x72, abi.RTAlloc, 32, lambda rt: abi.RTAlloc(size=300)),
    (0x73, abi.RTBlock, 8, lambda rt: abi.RTBlock(handle=block(rt))),
    (0x74, abi.RTBlock, 16, lambda rt: abi.RTBlock(handle=block(rt))),
    (0x75, abi.RTBlock, 8, lambda rt: abi.RTBlock(handle=block(rt, MOVABLE))),
    (0x76, abi.RTPriority, 8, lambda rt: abi.RTPriority(priority=(rt.info().priority + 1) % 100)),
]
IDS = ["info", "reserve", "alloc", "free", "pin", "unpin", "priority"]


@pytest.mark.parametrize(("number", "struct", "least", "good"), CALLS, ids=IDS)
def test_callers_of_another_age(
    raw: Raw, number: int, struct: type[abi.Struct], least: int, good: Callable[[RT], abi.Struct]
) -> None:
    """Shorter structs down to what every version has had, longer ones while the tail is zero."""
    size = ctypes.sizeof(struct)
    with raw.rt(4 * CHUNK, movable=1000) as rt:
        for short in range(0, size, 4):
            value = bytes(good(rt))
            buffer = bytearray(value[:short] + b"\xa5" * (size - short))
            before = rt.counts()
            result = rt.ioctl(abi.iowr(number, short), buffer)
            assert result == (0 if short >= least else errno.EINVAL), short
            assert buffer[short:] == b"\xa5" * (size - short)
            assert result == 0 or rt.counts() == before
        for extra in (1, 8, 64, PAGE - size):
            if size + extra >= 1 << 14:  # the number has no room for more
                continue
            value = bytes(good(rt))
            for at in {0, extra - 1}:
                tail = bytearray(extra)
                tail[at] = 1
                before = rt.counts()
                assert rt.ioctl(abi.iowr(number, size + extra), bytearray(value) + tail) == errno.EINVAL
                assert rt.counts() == before
            buffer = bytearray(value) + bytearray(extra)
            assert rt.ioctl(abi.iowr(number, size + extra), buffer) == 0
            assert buffer[size:] == bytes(extra)


def test_openers_of_another_age(raw: Raw) -> None:
    size = ctypes.sizeof(abi.RTOpen)
    for short in range(0, size + 64, 4):
        value = (bytes(abi.RTOpen(size=CHUNK, arena=-1, fd=-1)) + bytes(64))[:short]
        buffer = bytearray(value)
        result = raw.ioctl(abi.iowr(0x32, short), buffer)
        assert result == (0 if short >= 28 else errno.EINVAL), short
        if result == 0:
            os.close(int.from_bytes(buffer[24:28], "little"))
        else:
            assert buffer == value
        assert read("rt/arenas") == 0


@pytest.mark.parametrize(("number", "struct", "least", "good"), CALLS, ids=IDS)
def test_flags_and_pads(
    raw: Raw, number: int, struct: type[abi.Struct], least: int, good: Callable[[RT], abi.Struct]
) -> None:
    with raw.rt(movable=8) as rt:
        value, request = good(rt), abi.iowr(number, ctypes.sizeof(struct))
        before = rt.counts()
        for bit in range(32):
            if struct is abi.RTInfo or (struct is abi.RTAlloc and bit < 3):
                continue
            value.flags = 1 << bit
            assert rt.ioctl(request, value) == errno.EINVAL, bit
            assert rt.counts() == before
        if struct is not abi.RTInfo:
            value.flags = 0
        assert rt.ioctl(request, value) == 0


def test_numbers_that_are_nobodys(raw: Raw) -> None:
    with raw.rt() as rt, raw.kv([full(2, PAGE // 8)]) as kv:
        for number in (0x00, 0x10, 0x32, 0x40, 0x60, 0x6F, 0x79, 0x7F, 0xFF):
            assert rt.ioctl(abi.iowr(number, 32), bytearray(32)) == errno.ENOTTY
        for direction in (0, 1, 2):
            for request in (abi.IOC_RT_INFO, abi.IOC_RT_ALLOC):
                assert rt.ioctl(request & ~(3 << 30) | direction << 30, bytearray(256)) == errno.ENOTTY
        for number in range(0x70, 0x79):
            for descriptor in (raw, kv):
                assert descriptor.ioctl(abi.iowr(number, 32), bytearray(32)) == errno.ENOTTY
        assert kv.ioctl(abi.IOC_RT_OPEN, abi.RTOpen(size=CHUNK, arena=-1)) == errno.ENOTTY
        assert rt.info().free == CHUNK


@pytest.mark.parametrize(("number", "struct", "least", "good"), CALLS, ids=IDS)
def test_addresses_that_lead_nowhere(
    raw: Raw, number: int, struct: type[abi.Struct], least: int, good: Callable[[RT], abi.Struct]
) -> None:
    """EFAULT on the way in and on the way out: nothing was done."""
    request = ctypes.c_ulong(abi.iowr(number, ctypes.sizeof(struct)))
    with raw.rt(movable=8) as rt:
        value = good(rt)
        before = rt.counts()
        for address in (0, 8, 1 << 47, U64 - 63):
            assert libc.ioctl(rt.fd, request, ctypes.c_void_p(address)) == -1
            assert ctypes.get_errno() == errno.EFAULT
        memory = mmap.mmap(-1, PAGE)
        place = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        memory[: ctypes.sizeof(struct)] = bytes(value)
        assert libc.mprotect(place, PAGE, mmap.PROT_READ) == 0
        result = libc.ioctl(rt.fd, request, ctypes.c_void_p(place))
        told = struct in (abi.RTInfo, abi.RTAlloc) or number == 0x74
        assert result == -1 or not told
        if result:
            assert ctypes.get_errno() == errno.EFAULT
            assert rt.counts() == before
            assert rt.ioctl(abi.iowr(number, ctypes.sizeof(struct)), value) == 0
        assert read("rt/used") == CHUNK


def test_a_descriptor_that_cannot_be_told(raw: Raw) -> None:
    memory = mmap.mmap(-1, PAGE)
    place = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    with raw.rt() as rt:
        for request in (abi.RTOpen(size=CHUNK, arena=-1), abi.RTOpen(arena=rt.fd)):
            before = os.listdir("/proc/self/fd")
            assert libc.mprotect(place, PAGE, mmap.PROT_READ | mmap.PROT_WRITE) == 0
            memory[: len(bytes(request))] = bytes(request)
            assert libc.mprotect(place, PAGE, mmap.PROT_READ) == 0
            assert libc.ioctl(raw.fd, ctypes.c_ulong(abi.IOC_RT_OPEN), ctypes.c_void_p(place)) == -1
            assert ctypes.get_errno() == errno.EFAULT
            assert os.listdir("/proc/self/fd") == before
            assert (read("rt/arenas"), read("rt/used"), rt.info().clients) == (1, CHUNK, 1)


# Sizes and deadlines


def test_sizes(raw: Raw) -> None:
    """From a byte to the arena; a block is at least two granules, at multiples of one, and apart from the others."""
    with raw.rt(2 * CHUNK) as rt:
        unit = granule(rt)
        for size in (1, unit - 1, unit, unit + 1, 2 * unit, 2 * unit + 1, 1000, PAGE, CHUNK - 1, CHUNK, CHUNK + 1):
            before = rt.info()
            item = rt.alloc(size)
            after = rt.info()
            assert item.handle
            assert item.offset % unit == 0
            assert item.offset + size <= after.size
            assert after.used - before.used == before.free - after.free == max(2 * unit, round_up(size, unit))
            assert rt.free(item.handle) == 0
            assert rt.info().largest == 2 * CHUNK
        before = rt.counts()
        for size in (0, 2 * CHUNK + 1, 4 * CHUNK, 1 << 32, 1 << 33, 1 << 39, 1 << 63, U64 - unit + 1, U64):
            for deadline in (0, SECOND):
                for flags in (0, RESERVED, MOVABLE):
                    assert rt.alloc_errno(size, deadline, flags) == errno.EINVAL
        assert rt.counts() == before


def test_blocks_do_not_overlap(raw: Raw) -> None:
    with raw.rt(movable=64) as rt:
        unit, taken = granule(rt), set()
        for i in range(120):
            size = 1 + i * i * 7 % 9000
            flags = MOVABLE if i % 4 == 0 else 0
            item = rt.alloc(size, flags=flags)
            mine = set(range(item.offset // unit, -(-(item.offset + size) // unit)))
            assert not mine & taken
            taken |= mine
        assert rt.info().used >= len(taken) * unit


def test_deadlines_that_cannot_be(raw: Raw) -> None:
    with raw.rt() as rt:
        before = rt.counts()
        for deadline in (1 << 63, (1 << 63) + SECOND, U64):
            for flags in (0, ABSOLUTE, RESERVED, ABSOLUTE | MOVABLE):
                assert rt.alloc_errno(256, deadline, flags) == errno.EINVAL
        assert rt.counts() == before


@pytest.mark.parametrize("flags", [0, ABSOLUTE])
def test_what_is_there_needs_no_time(raw: Raw, flags: int) -> None:
    """Whatever the deadline: none, long ago, now, or as late as can be."""
    with raw.rt() as rt:
        for deadline in (0, 1, SECOND, time.monotonic_ns(), (1 << 63) - 1):
            assert rt.free(rt.alloc(CHUNK, deadline, flags).handle) == 0
        info = rt.info()
        assert (info.allocs, info.refused, info.misses, info.waits) == (5, 0, 0, 0)


def test_what_is_not_there_in_no_time(raw: Raw) -> None:
    """No deadline is no memory; one that has passed is too late."""
    with raw.rt() as rt:
        rt.alloc(CHUNK)
        assert rt.alloc_errno(1) == errno.ENOSPC
        assert (rt.info().refused, rt.info().misses) == (1, 0)
        past = (1, time.monotonic_ns() - SECOND, time.monotonic_ns())
        for deadline in past:
            assert rt.alloc_errno(1, deadline, ABSOLUTE) == errno.ETIMEDOUT
        assert (rt.info().refused, rt.info().misses) == (1, len(past))
        assert rt.alloc_errno(1, 1) == errno.ETIMEDOUT
        # absolute, too, 0 is none
        assert rt.alloc_errno(1, 0, ABSOLUTE) == errno.ENOSPC
        # nor does anybody wait for what is not reserved
        assert rt.alloc_errno(1, (1 << 63) - 1, RESERVED) == errno.ENOSPC
        info = rt.info()
        assert (info.allocs, info.refused, info.misses, info.waiting) == (1, 3, 4, 0)


# Blocks


def everything_else(rt: RT, mine: set[int]) -> list[int]:
    """Handles that name nothing of ours: of each granule, with and without the bit of movable ones, and far out."""
    granules = rt.info().size // granule(rt)
    near = [*range(granules // 2), *range(granules // 2, granules, 5), *range(granules - 3, granules + 3)]
    far = [1 << bit for bit in range(14, 32)] + [U32, U32 - 1, MOVABLE_BIT | 0xFFFF, MOVABLE_BIT - 1]
    handles = [*near, *(MOVABLE_BIT | n for n in (*range(20), *near[::20])), *far]
    return [handle for handle in handles if handle not in mine]


def test_handles_of_nothing(raw: Raw) -> None:
    """Starts of runs, insides of blocks and items, what another client has, what was never there: ENOENT."""
    with raw.rt(movable=16) as rt, raw.join(rt) as other:
        mine, its = set(), set()
        for client, handles in ((rt, mine), (other, its)):
            assert client.reserve(20_000, 3) == 0
            assert client.reserve(600, 4) == 0
            sizes = [(600, 0), (600, 0), (20_000, 0), (36_000, 0), (260_000, 0), (256, MOVABLE), (2000, MOVABLE)]
            handles |= {client.alloc(size, flags=flags).handle for size, flags in sizes}
        assert not mine & its
        before, its_before = rt.counts(), other.counts()
        for i, handle in enumerate(everything_else(rt, mine)):
            assert rt.free(handle) == errno.ENOENT, hex(handle)
            if i % 3 == 0:
                assert rt.pin(handle)[0] == rt.unpin(handle) == errno.ENOENT, hex(handle)
        assert (rt.counts(), other.counts()) == (before, its_before)
        for handle in mine:
            assert rt.free(handle) == 0
            assert rt.free(handle) == errno.ENOENT
        assert (rt.info().blocks, rt.info().used, other.info().blocks) == (0, 0, 7)
        for handle in its:
            assert rt.free(handle) == errno.ENOENT
            assert other.free(handle) == 0


def test_blocks_freed_twice(raw: Raw) -> None:
    """Also after somebody else has got the place."""
    with raw.rt(movable=3) as rt, raw.join(rt) as other:
        for flags in (0, MOVABLE):
            item = rt.alloc(1000, flags=flags)
            assert rt.free(item.handle) == 0
            assert rt.free(item.handle) == errno.ENOENT
            its = other.alloc(1000)
            assert its.offset == item.offset
            for call in (rt.free, rt.unpin, lambda h: rt.pin(h)[0]):
                assert call(item.handle) == errno.ENOENT
            assert other.free(its.handle) == 0
        # a movable one's name is not given to the next
        handles = [rt.alloc(256, flags=MOVABLE).handle]
        assert rt.free(handles[0]) == 0
        handles.append(rt.alloc(256, flags=MOVABLE).handle)
        assert handles[0] != handles[1]
        assert rt.free(handles[0]) == errno.ENOENT
        assert rt.free(handles[1]) == 0


def test_pins(raw: Raw) -> None:
    with raw.rt(movable=2) as rt, raw.join(rt) as other:
        moves, fixed = rt.alloc(300, flags=MOVABLE), rt.alloc(300)
        assert rt.reserve(100, 1) == 0
        item = rt.alloc(100)
        for handle, offset in ((fixed.handle, fixed.offset), (item.handle, item.offset)):
            assert [rt.pin(handle) for _ in range(3)] == [(0, offset)] * 3
            assert rt.unpin(handle) == errno.ENOENT
        assert [rt.pin(moves.handle) for _ in range(3)] == [(0, moves.offset)] * 3
        assert other.pin(moves.handle)[0] == other.unpin(moves.handle) == errno.ENOENT
        assert [rt.unpin(moves.handle) for _ in range(5)] == [0] * 4 + [errno.EINVAL]
        assert rt.pin(moves.handle) == (0, moves.offset)  # nobody asked for its place
        assert rt.unpin(moves.handle) == 0
        # one that nobody has pinned can be freed, and one that somebody has
        second = rt.alloc(256, flags=MOVABLE)
        for handle in (moves.handle, second.handle, fixed.handle, item.handle):
            assert rt.free(handle) == 0
        assert rt.info().blocks == 0


def test_movable_blocks(raw: Raw) -> None:
    """So many and so large, from the heap only."""
    with raw.rt(movable=3) as rt:
        unit = granule(rt)
        assert rt.reserve(256, 2) == 0
        most = abi.RT_STEP * unit
        assert rt.alloc_errno(most + 1, flags=MOVABLE) == errno.EINVAL
        assert rt.alloc_errno(most + 1, SECOND, MOVABLE) == errno.EINVAL
        blocks = [rt.alloc(size, flags=MOVABLE) for size in (1, 256, most)]
        assert rt.info().used == most + 4 * unit
        assert all(b.handle for b in blocks)
        assert rt.alloc_errno(1, flags=MOVABLE) == errno.ENFILE
        assert rt.info().refused == 1
        rt.alloc(1)
        assert rt.free(blocks[1].handle) == 0
        assert rt.alloc_errno(1, flags=MOVABLE) == 0
    with raw.rt() as rt:
        assert rt.alloc_errno(1, flags=MOVABLE) == errno.ENFILE


def test_movable_is_never_reserved(raw: Raw) -> None:
    with raw.rt(movable=2) as rt:
        assert rt.reserve(256, 2) == 0
        before = rt.counts()
        assert rt.alloc_errno(256, flags=MOVABLE | RESERVED) == errno.EINVAL
        assert rt.counts() == before


def test_priorities(raw: Raw) -> None:
    with raw.rt(priority=50) as rt:
        for priority in (0, 99, 50, 1):
            assert rt.set_priority(priority) == 0
            assert rt.info().priority == priority
        for priority in (100, U32):
            assert rt.set_priority(priority) == errno.EINVAL
        assert rt.info().priority == 1


# Batches


def test_batches(raw: Raw) -> None:
    with raw.rt(movable=64) as rt:
        for count in (1, 2, abi.RT_MAX_BATCH):
            result, batch, items = rt.alloc_batch([100 + 300 * i for i in range(count)])
            assert (result, batch.failed) == (0, count)
            assert len({i.handle for i in items}) == len({i.offset for i in items}) == rt.info().blocks == count
            result, batch = rt.free_batch([i.handle for i in items])
            assert (result, batch.failed) == (0, count)
            assert (rt.info().blocks, rt.info().largest) == (0, CHUNK)
        items = (abi.RTAlloc * 66)(*(abi.RTAlloc(size=256) for _ in range(66)))
        blocks = (abi.RTBlock * 66)(*(abi.RTBlock(handle=1) for _ in range(66)))
        before = rt.counts()
        for fields in ({"count": 0}, {"count": 65}, {"count": 66}, {"count": U32}, {"flags": 1}, {"flags": 1 << 31},
                       {"item_size": 0}, {"item_size": 3}, {"item_size": U32}, {"item_size": 2 * PAGE}):  # fmt: skip
            values = {"count": 2, **fields}
            assert rt.batch(abi.IOC_RT_ALLOC_BATCH, items, **values)[0] == errno.EINVAL, fields
            assert rt.batch(abi.IOC_RT_FREE_BATCH, blocks, **values)[0] == errno.EINVAL, fields
        assert rt.counts() == before


@pytest.mark.parametrize("at", [0, 1, 7])
@pytest.mark.parametrize("bad", [{"size": 0}, {"size": U64}, {"size": CHUNK}, {"flags": 8}, {"deadline_ns": U64},
                                 {"size": CHUNK, "deadline_ns": 1000}, {"flags": RESERVED}], ids=str)  # fmt: skip
def test_a_batch_that_fails_in_the_middle(raw: Raw, bad: dict[str, int], at: int) -> None:
    """What came before it is undone; the caller learns which it was."""
    with raw.rt(movable=8) as rt, raw.join(rt) as other:
        rt.alloc(256)
        assert rt.reserve(3000, 2) == 0
        requests = [abi.RTAlloc(size=100 * (i + 1), flags=MOVABLE * (i % 2)) for i in range(7)]
        requests.insert(at, abi.RTAlloc(**{"size": 5000, **bad}))
        items = (abi.RTAlloc * 8)(*requests)
        before = rt.counts()
        result, batch = rt.batch(abi.IOC_RT_ALLOC_BATCH, items)
        full_up = errno.ETIMEDOUT if bad.get("deadline_ns") == 1000 else errno.ENOSPC
        there = bad.get("size", 5000) == CHUNK or bad.get("flags") == RESERVED
        assert (result, batch.failed) == (full_up if there else errno.EINVAL, at)
        after = rt.counts()
        same = ("free", "largest", "reserved", "used", "blocks")
        assert {n: after[n] for n in same} == {n: before[n] for n in same}
        # its reservation and its places for movable blocks are there, too
        assert all(rt.alloc_errno(3000, flags=RESERVED) == 0 for _ in range(2))
        assert all(rt.alloc_errno(256, flags=MOVABLE) == 0 for _ in range(8))
        assert other.info().blocks == 0


#: "twice" is at its second place.
BAD_FREES = [(bad, at) for bad in ("nothing", "other's", "twice", "flags") for at in (0, 1, 4) if at or bad != "twice"]


@pytest.mark.parametrize(("bad", "at"), BAD_FREES)
def test_a_batch_of_frees_that_fails_in_the_middle(raw: Raw, bad: str, at: int) -> None:
    """None of them is freed: all handles are what they were."""
    with raw.rt(movable=8) as rt, raw.join(rt) as other:
        assert rt.reserve(1000, 2) == 0
        blocks = [rt.alloc(1000 + 100 * i, flags=MOVABLE * (i % 2)) for i in range(4)] + [rt.alloc(1000)]
        handles = [b.handle for b in blocks]
        wrong = {"nothing": 5, "other's": other.alloc(256).handle, "twice": handles[0], "flags": handles[-1]}[bad]
        listed = [*handles[:at], wrong, *(h for h in handles[at:] if h != wrong)]
        items = (abi.RTBlock * len(listed))(*(abi.RTBlock(handle=h) for h in listed))
        items[at].flags = bad == "flags"
        before = rt.counts()
        result, batch = rt.batch(abi.IOC_RT_FREE_BATCH, items)
        assert (result, batch.failed) == (errno.EINVAL if bad == "flags" else errno.ENOENT, at)
        assert rt.counts() == before
        for b in blocks:
            assert rt.pin(b.handle) == (0, b.offset)
        assert rt.free_batch(handles)[0] == 0
        assert (rt.info().blocks, rt.info().used) == (0, 0)


def test_batches_that_lead_nowhere(raw: Raw) -> None:
    """Items that cannot be read, or not be written: all is undone."""
    memory = mmap.mmap(-1, 2 * PAGE)
    place = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    size = ctypes.sizeof(abi.RTAlloc)
    with raw.rt() as rt:
        before = rt.counts()
        for address in (0, 1 << 47, U64 - 64):
            for request in (abi.IOC_RT_ALLOC_BATCH, abi.IOC_RT_FREE_BATCH):
                batch = abi.Batch(items=address, count=2, item_size=size)
                assert rt.ioctl(request, batch) == errno.EFAULT
        assert rt.counts() == before
        # the last two of eight are in the second page
        start = PAGE - 6 * size
        data = bytes(abi.RTAlloc(size=700)) * 8
        for protection in (mmap.PROT_READ, 0):
            assert libc.mprotect(place, 2 * PAGE, mmap.PROT_READ | mmap.PROT_WRITE) == 0
            memory[start : start + len(data)] = data
            assert libc.mprotect(place + PAGE, PAGE, protection) == 0
            batch = abi.Batch(items=place + start, count=8, item_size=size)
            assert rt.ioctl(abi.IOC_RT_ALLOC_BATCH, batch) == errno.EFAULT
            assert rt.counts() == before


def test_items_of_another_age(raw: Raw) -> None:
    """By item_size: what is shorter lacks nothing that matters, a longer tail has to be zero."""
    least, size = 32, ctypes.sizeof(abi.RTAlloc)
    with raw.rt() as rt:
        for length in (*range(0, size, 4), size + 8, 100, PAGE):
            memory = (ctypes.c_ubyte * (3 * length + size))()
            for i in range(3):
                item = bytes(abi.RTAlloc(size=500))[:length]
                ctypes.memmove(ctypes.byref(memory, i * length), item, len(item))
            batch = abi.Batch(items=ctypes.addressof(memory), count=3, item_size=length)
            result = rt.ioctl(abi.IOC_RT_ALLOC_BATCH, batch)
            assert result == (0 if length >= least else errno.EINVAL), length
            if result:
                continue
            items = [abi.RTAlloc.from_buffer_copy(bytes(memory), i * length) for i in range(3)]
            assert rt.free_batch([i.handle for i in items])[0] == 0
            if length > size:
                memory[3 * length - 1] = 1
                assert rt.ioctl(abi.IOC_RT_ALLOC_BATCH, batch) == errno.EINVAL
                assert batch.failed == 2
            assert rt.info().blocks == 0
