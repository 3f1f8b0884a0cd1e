# SPDX-License-Identifier: MIT
"""RT clients, blocks, buffers: on the fake of fakert.py."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import tensormem
from fake import FakeDevice
from fakert import CHUNK, GRANULE, POISON, FakeRT, RTPool
from tensormem import Client, RTClient, abi, errors, realtime

Open = Callable[..., RTClient]


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[RTPool]:
    pool = RTPool()
    monkeypatch.setattr(realtime, "KernelDevice", lambda _: FakeDevice(rt=pool))
    yield pool
    gc.collect()
    assert not pool.arenas, "each test leaves nothing"
    assert not pool.descriptors


@pytest.fixture
def rt(pool: RTPool) -> Iterator[RTClient]:
    with tensormem.rt("2M", movable=8) as rt:
        yield rt


def fake(rt: RTClient) -> FakeRT:
    device = rt._session.device
    assert isinstance(device, FakeRT)
    return device


def fill(rt: RTClient) -> realtime.RTBlock:
    """Take all that is free in one piece."""
    return rt.alloc(rt.info().largest)


# -- arenas -------------------------------------------------------------------------------


def test_open(pool: RTPool) -> None:
    with tensormem.rt("3M", priority=7) as rt:
        assert (rt.size, rt.granule, rt.priority) == (2 * CHUNK, GRANULE, 7)
        info = rt.info()
        assert (info.size, info.clients, info.free, info.largest) == (rt.size, 1, rt.size, rt.size)
        assert (info.blocks, info.used, info.reserved, info.allocs) == (0, 0, 0, 0)
        assert rt.fileno() in pool.descriptors
        assert "4 MiB" in repr(rt)
        assert len(rt.memory) == rt.size
        assert bytes(rt.memory[:64]) == bytes(64)
    assert rt.closed
    assert "closed" in repr(rt)
    assert pool.arenas == []


def test_sizes_are_bytes_or_texts(pool: RTPool) -> None:
    with tensormem.rt(1) as rt, rt.alloc("1.5K") as block, rt.alloc(np.int64(5)) as other:
        assert (rt.size, block.size, other.size) == (CHUNK, 1536, 5)


@pytest.mark.parametrize("size", [0, -1, 1.5, "x", "0", 1 << 63, [1]])
def test_bad_sizes(pool: RTPool, rt: RTClient, size: Any) -> None:
    for call in (tensormem.rt, rt.alloc, rt.unreserve, rt.buffer, lambda s: rt.reserve(s, 1)):
        with pytest.raises(errors.InvalidArgument):
            call(size)
    assert len(pool.arenas) == 1


def test_a_size_or_an_arena(rt: RTClient) -> None:
    both: list[dict[str, Any]] = [{}, {"size": 1, "arena": rt}]
    for options in both:
        with pytest.raises(errors.InvalidArgument, match="either size or arena"):
            tensormem.rt(**options)


@pytest.mark.parametrize("options", [
    {"priority": 100}, {"priority": -1}, {"priority": 0.5}, {"movable": -1}, {"movable": 65537},
])  # fmt: skip
def test_bad_options(pool: RTPool, options: dict[str, Any]) -> None:
    with pytest.raises(errors.InvalidArgument):
        tensormem.rt(1, **options)
    assert pool.calls == []


def test_the_bill_of_a_client(pool: RTPool) -> None:
    with Client(FakeDevice(rt=pool)) as client:
        rt = client.rt("2M")
    with rt, rt.alloc(100) as block:
        assert bytes(block.buffer()) == bytes(100)
        with pytest.raises(errors.Closed, match="client is closed"):
            rt.join()
    with pytest.raises(errors.Closed):
        client.rt("2M")


def test_join_by_a_client_that_was_dropped(pool: RTPool) -> None:
    client = Client(FakeDevice(rt=pool))
    with client.rt("2M") as rt:
        rt.join().close()
        del client
        gc.collect()
        with pytest.raises(errors.Closed):
            rt.join()


def test_no_room_in_the_pool(pool: RTPool) -> None:
    with pytest.raises(errors.RTPoolFull, match=r"65 MiB.*'tensormem rt size SIZE'") as info:
        tensormem.rt("65M")
    assert isinstance(info.value, MemoryError)
    assert info.value.errno == errno.ENOSPC
    with tensormem.rt("64M"), pytest.raises(errors.RTPoolFull):
        tensormem.rt(1)


@pytest.mark.parametrize(("number", "cls", "words"), [
    (errno.EDQUOT, errors.QuotaExceeded, "arena of 2 MiB, the quota"),
    (errno.ENOMEM, errors.OutOfMemory, "arena of 2 MiB, the system"),
    (errno.EINVAL, errors.InvalidArgument, "arena of 2 MiB"),
    (errno.ENOTTY, errors.IncompatibleModule, "arena of 2 MiB"),
    (errno.EXDEV, errors.TensormemError, "EXDEV"),
])  # fmt: skip
def test_open_refused(
    monkeypatch: pytest.MonkeyPatch, number: int, cls: type[Exception], words: str
) -> None:
    device = FakeDevice()
    device.fail[abi.IOC_RT_OPEN] = number
    monkeypatch.setattr(realtime, "KernelDevice", lambda _: device)
    with pytest.raises(cls, match=words):
        tensormem.rt(CHUNK)
    assert device.fd < 0, "closed"


def test_memlock(pool: RTPool) -> None:
    pool.locked = CHUNK
    with pytest.raises(
        errors.NotPermitted, match=r"RLIMIT_MEMLOCK.*ask for less.*LimitMEMLOCK=infinity"
    ):
        tensormem.rt("4M")


def test_priorities_need_a_right(pool: RTPool) -> None:
    pool.nice = False
    with pytest.raises(errors.NotPermitted, match=r"priority 1.*CAP_SYS_NICE"):
        tensormem.rt(1, priority=1)
    with tensormem.rt(1) as rt:
        with pytest.raises(errors.NotPermitted, match=r"priority to 3.*CAP_SYS_NICE"):
            rt.priority = 3
        assert rt.priority == 0
        pool.nice = True
        rt.priority = 9
        pool.nice = False
        rt.priority = 4
        assert rt.priority == 4
        with pytest.raises(errors.InvalidArgument):
            rt.priority = 100


@pytest.mark.parametrize("request_", [abi.IOC_RT_INFO, abi.IOC_RT_OPEN])
def test_a_descriptor_of_something_else(pool: RTPool, request_: int) -> None:
    with tensormem.rt(1):
        pool.fail[abi.IOC_RT_INFO] = errno.ENOTTY
        with pytest.raises(errors.IncompatibleModule):
            tensormem.rt(1)
        assert len(pool.descriptors) == 1, "what cannot be used was closed"
        pool.fail.clear()


def test_no_address_space(pool: RTPool) -> None:
    pool.map_error = errno.ENOMEM
    with pytest.raises(errors.OutOfMemory, match="address space"):
        tensormem.rt(1)
    assert pool.descriptors == {}


# -- several clients of one arena ---------------------------------------------------------


def test_join(pool: RTPool, rt: RTClient) -> None:
    with rt.join(priority=5) as other, rt.alloc(64) as block:
        assert (other.size, other.priority, rt.priority) == (rt.size, 5, 0)
        assert rt.info().clients == other.info().clients == 2
        block.buffer()[:3] = b"abc"
        assert bytes(other.memory[block.offset : block.offset + 3]) == b"abc"
        assert other.info().blocks == 0
    assert rt.info().clients == 1
    assert len(pool.arenas) == 1


def test_join_by_descriptor(rt: RTClient) -> None:
    with tensormem.rt(arena=rt.fileno()) as other, tensormem.rt(arena=other) as third:
        assert third.info().clients == 3
    with pytest.raises(errors.InvalidArgument, match="no descriptor of an RT client"):
        tensormem.rt(arena=1 << 20)
    with pytest.raises(errors.InvalidArgument, match="no descriptor of an RT client"):
        tensormem.rt(arena=0)
    with pytest.raises(errors.InvalidArgument):
        tensormem.rt(arena=-1)


def test_join_a_full_arena(rt: RTClient) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(254):
            stack.enter_context(rt.join())
        with pytest.raises(errors.RTPoolFull, match="255 clients"):
            rt.join()


def test_join_a_closed_one(rt: RTClient) -> None:
    rt.close()
    with pytest.raises(errors.Closed, match="RT client is closed"):
        rt.join()


def test_the_arena_lives_as_long_as_a_client(pool: RTPool) -> None:
    rt = tensormem.rt(1)
    other = rt.join()
    with rt.alloc(8) as block:
        offset = block.offset
        block.buffer()[:] = b"contents"
        block.array(8, np.uint8)
        rt.close()
    assert len(pool.arenas) == 1
    assert bytes(other.memory[offset : offset + 8]) == bytes([POISON]) * 8, "his block went"
    other.close()
    assert pool.arenas == []


def test_from_fd_is_the_same_client(
    pool: RTPool, rt: RTClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Taken:
        of = pool.descriptors.__getitem__

    block = rt.alloc(100)
    monkeypatch.setattr(realtime, "KernelDevice", Taken)
    same = RTClient.from_fd(rt.fileno())
    assert same.info().blocks == 1
    same._session.device = rt._session.device  # closes nothing twice
    same._session.finished = True
    block.free()


# -- blocks -------------------------------------------------------------------------------


def test_alloc(rt: RTClient) -> None:
    with rt.alloc(1000) as block:
        assert block.handle
        assert block.size == len(block.buffer()) == 1000
        assert block.offset % rt.granule == 0
        assert (block.movable, block.pins, block.freed) == (False, 1, False)
        assert not block.buffer().readonly
        assert block.buffer().format == "B"
        array = block.array((10, 5), np.float32)
        array[...] = 1.5
        assert array.flags.c_contiguous
        assert np.frombuffer(block.buffer()[:200], np.float32).tolist() == [1.5] * 50
        assert struct.unpack_from("<f", rt.memory, block.offset) == (1.5,)
        info = rt.info()
        assert (info.blocks, info.used, info.allocs) == (1, 1024, 1)
        assert "1000 B" in repr(block)
        del array
    assert block.freed
    assert "freed" in repr(block)
    assert rt.info().used == 0


@pytest.mark.parametrize(("shape", "dtype"), [
    (101, np.uint8), (26, np.float32), ((5, 21), np.uint8), (-1, np.uint8), (1, object),
])  # fmt: skip
def test_arrays_that_do_not_fit(rt: RTClient, shape: object, dtype: type) -> None:
    with rt.alloc(100) as block, pytest.raises(errors.InvalidArgument, match="does not fit"):
        block.array(shape, dtype)


def test_array_shapes(rt: RTClient) -> None:
    with rt.alloc(96) as block:
        assert block.array(24).dtype == np.float32
        assert block.array((), np.int64).shape == ()
        assert block.array([2, 3], np.int16).shape == (2, 3)
        assert block.array(0).shape == (0,)


def test_refusals(rt: RTClient) -> None:
    with pytest.raises(errors.InvalidArgument, match="the arena has 2 MiB"):
        rt.alloc(CHUNK + 1)
    with pytest.raises(errors.InvalidArgument, match="16 KiB at most"):
        rt.alloc(128 * GRANULE + 1, movable=True)
    with pytest.raises(errors.InvalidArgument, match="never comes from a reservation"):
        rt.alloc(100, movable=True, reserved=True)
    with fill(rt):
        with pytest.raises(
            errors.ArenaFull, match=r"100 B, the arena has no room.*rt.reserve"
        ) as e:
            rt.alloc(100)
        assert isinstance(e.value, errors.PoolExhausted)
    assert rt.info().refused == 1


def test_too_many_movable(rt: RTClient) -> None:
    blocks = rt.alloc_many([100] * 8, movable=True)
    with pytest.raises(errors.TooManyMovable, match="larger movable"):
        rt.alloc(100, movable=True)
    rt.free_many(blocks)
    with tensormem.rt(1) as none, pytest.raises(errors.TooManyMovable):
        none.alloc(1, movable=True)


def test_double_free(rt: RTClient) -> None:
    block = rt.alloc(100)
    block.free()
    other = rt.alloc(100)
    assert other.handle == block.handle, "the name is used again"
    with pytest.raises(errors.NoSuchBlock, match="was freed"):
        block.free()
    with pytest.raises(errors.NoSuchBlock):
        block.buffer()
    with pytest.raises(errors.NoSuchBlock):
        block.array(1)
    with pytest.raises(errors.NoSuchBlock):
        block.pin()
    assert rt.info().blocks == 1, "the one who has it now keeps it"
    del block
    assert rt.info().blocks == 1
    other.free()


def test_context_of_a_freed_block(rt: RTClient) -> None:
    with rt.alloc(100) as block:
        block.free()
    assert rt.info().blocks == 0


# -- who keeps what -----------------------------------------------------------------------


def test_free_is_at_once_and_arrays_stay_mapped(rt: RTClient) -> None:
    block = rt.alloc(128)
    array, view = block.array(128, np.uint8), block.buffer()
    array[...] = 7
    block.free()
    assert rt.info().blocks == 0
    assert array.tolist() == [POISON] * 128, "it is the arena's now"
    with rt.alloc(128) as other:
        other.buffer()[:] = b"x" * 128
        assert bytes(view) == b"x" * 128
    array[0] = 1  # and no SIGBUS


def test_a_dropped_block_goes_with_its_last_array(rt: RTClient) -> None:
    array = rt.alloc(64).array(16)
    part = array[3:5]
    array[...] = 2
    del array
    assert rt.info().blocks == 1
    assert part.tolist() == [2, 2]
    del part
    assert rt.info().blocks == 0
    rt.alloc(64)
    assert rt.info().blocks == 0


def test_arrays_outlive_close(pool: RTPool) -> None:
    rt = tensormem.rt(1)
    kept, other = rt.alloc(64), rt.alloc(64)
    array = kept.array(16)
    array[...] = 3
    rt.close()
    rt.close()
    assert array.tolist() == [3] * 16
    assert len(pool.arenas[0].blocks) == 1, "the other one went"
    for call in (
        rt.info, lambda: rt.alloc(1), lambda: rt.reserve(1, 1), kept.free, other.pin,
        lambda: rt.memory, lambda: rt.buffer(1), lambda: setattr(rt, "priority", 0),
    ):  # fmt: skip
        with pytest.raises((errors.Closed, errors.NoSuchBlock)):
            call()
    del array
    assert pool.arenas == []


def test_a_dropped_client(pool: RTPool) -> None:
    rt = tensormem.rt(1)
    memory = rt.memory
    array = rt.alloc(64).array(16)
    del rt
    gc.collect()
    array[...] = 1
    assert len(pool.arenas) == 1
    del array
    gc.collect()
    assert pool.descriptors == {}
    assert len(pool.arenas) == 1, "the mapping has it still"
    memory[0] = 1
    del memory
    assert pool.arenas == []


def test_a_child_frees_nothing(rt: RTClient) -> None:
    block, buffer = rt.alloc(64), rt.buffer(64)
    buffer.take()
    array = block.array(16)
    pid = os.fork()
    if not pid:
        status = 1
        with contextlib.suppress(BaseException):
            array[0] = 42
            try:
                block.free()
            except errors.NotPermitted:
                count = len(fake(rt).arena.blocks)
                del array, block
                buffer.close()
                gc.collect()
                if len(fake(rt).arena.blocks) == count == 2:
                    status = 0
        os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert array[0] == 42
    block.free()
    buffer.close()
    assert rt.info().blocks == 0


# -- batches ------------------------------------------------------------------------------


def test_batches(pool: RTPool, rt: RTClient) -> None:
    begin = len(pool.calls)
    blocks = rt.alloc_many([100, "1K", 5000])
    assert [block.size for block in blocks] == [100, 1024, 5000]
    for number, block in enumerate(blocks):
        block.buffer()[:] = bytes([number]) * block.size
    assert [bytes(b.buffer()) for b in blocks] == [
        bytes([n]) * b.size for n, b in enumerate(blocks)
    ]
    rt.free_many(blocks)
    assert pool.calls[begin:] == [abi.IOC_RT_ALLOC_BATCH, abi.IOC_RT_FREE_BATCH]
    assert all(block.freed for block in blocks)
    assert rt.info().blocks == 0
    assert rt.alloc_many([]) == []
    rt.free_many([])


def test_a_batch_is_all_or_none(rt: RTClient) -> None:
    with pytest.raises(errors.ArenaFull, match=r"item 2: cannot allocate 2 MiB"):
        rt.alloc_many([100, 100, CHUNK])
    assert rt.info().blocks == 0
    with pytest.raises(errors.InvalidArgument, match="64 are possible"):
        rt.alloc_many([1] * 65)
    blocks = rt.alloc_many([1] * 64)
    with pytest.raises(errors.NoSuchBlock):
        rt.free_many([*blocks, blocks[3]])
    with (
        rt.join() as other,
        other.alloc(1) as foreign,
        pytest.raises(errors.NoSuchBlock, match="not of this RT client"),
    ):
        rt.free_many([blocks[0], foreign])
    assert rt.info().blocks == 64
    more = rt.alloc_many([1] * 3)
    rt.free_many(blocks + more)
    assert rt.info().blocks == 0


def test_a_batch_of_which_somebody_else_freed_one(rt: RTClient) -> None:
    blocks = rt.alloc_many([1] * 5)
    fake(rt).free(fake(rt).find(blocks[2].handle))
    with pytest.raises(errors.NoSuchBlock):
        rt.free_many(blocks)
    assert rt.info().blocks == 0
    assert all(block.freed for block in blocks)


# -- reservations -------------------------------------------------------------------------


def test_reserve(rt: RTClient) -> None:
    rt.reserve("1K", 4)
    rt.reserve(200, 2)
    info = rt.info()
    assert (info.reserved, info.used) == (4 * 1024 + 2 * 256 + 2 * 2 * GRANULE, 0)
    with rt.join() as hog:
        rest = []
        while hog.info().largest:
            rest.append(hog.alloc(hog.info().largest))
        with pytest.raises(errors.ArenaFull):
            hog.alloc(1)
        blocks = [rt.alloc(1000, reserved=True) for _ in range(4)]
        with pytest.raises(errors.ArenaFull, match=r"1000 B, the reservation has no block left"):
            rt.alloc(1000, reserved=True)
        # the smallest class that is large enough, and no other
        small = rt.alloc_many([256, 100], reserved=True)
        blocks.pop().free()
        with pytest.raises(errors.ArenaFull):
            rt.alloc(150, reserved=True)
        with rt.alloc(300, reserved=True) as block:
            assert block.size == 300
        with pytest.raises(errors.ReservationInUse, match=r"reservation of 1 KiB"):
            rt.unreserve("1K")
        rt.free_many(blocks + small)
        rt.unreserve("1K")
        rt.unreserve(200)
        hog.free_many(rest)
    assert rt.info().reserved == 0


def test_reserve_refused(pool: RTPool, rt: RTClient) -> None:
    with pytest.raises(errors.ArenaFull, match=r"1 MiB, 3 of them.*before anything is allocated"):
        rt.reserve("1M", 3)
    rt.reserve(100, 1)
    with pytest.raises(errors.SizeReserved, match="of 128 B, 1 of them, blocks of this"):
        rt.reserve(128, 1)
    with pytest.raises(errors.NotReserved, match="1000 B, there is none"):
        rt.unreserve(1000)
    for count in (0, -1, 1 << 32, 1.5):
        with pytest.raises(errors.InvalidArgument):
            rt.reserve(10, count)  # type: ignore[arg-type]
    with pytest.raises(errors.InvalidArgument):
        rt.reserve(rt.size + 1, 1)
    pool.nice = False
    with pytest.raises(errors.NotPermitted, match=r"CAP_SYS_NICE.*AmbientCapabilities"):
        rt.reserve(1000, 1)
    pool.nice = True
    for size in range(2, 17):
        rt.reserve(size * GRANULE, 1)
    with pytest.raises(errors.ArenaFull, match="16 sizes"):
        rt.reserve(17 * GRANULE, 1)


# -- deadlines ----------------------------------------------------------------------------


def test_a_miss(pool: RTPool, rt: RTClient) -> None:
    with fill(rt):
        begin = pool.now
        with pytest.raises(errors.DeadlineMissed, match=r"100 B.*by the deadline") as info:
            rt.alloc(100, 5_000)
        assert isinstance(info.value, TimeoutError)
        assert pool.now == begin + 5_000
    found = rt.info()
    assert (found.misses, found.waits, found.refused, found.waiting) == (1, 1, 0, 0)


def test_somebody_frees_in_time(pool: RTPool, rt: RTClient) -> None:
    block = fill(rt)
    begin = pool.now
    pool.others = [lambda: None, block.free]
    with rt.alloc(100, 1_000_000) as late:
        assert late.size == 100
    assert pool.now == begin
    assert (rt.info().waits, rt.info().misses) == (1, 0)


def test_absolute_deadlines(pool: RTPool, rt: RTClient) -> None:
    with rt.alloc(100, 1, absolute=True):
        pass  # it is over, but there is room
    with rt.alloc(100, 0, absolute=True):
        pass
    with fill(rt):
        for time_ns in (0, 1, pool.now, pool.now + 10):
            with pytest.raises(errors.DeadlineMissed):
                rt.alloc(100, time_ns, absolute=True)
        with pytest.raises(errors.ArenaFull):
            rt.alloc(100, 0)
    assert rt.info().misses == 4


@pytest.mark.parametrize("deadline", [-1, 1 << 63, 0.5, "1ms", None])
def test_bad_deadlines(pool: RTPool, rt: RTClient, deadline: Any) -> None:
    begin = list(pool.calls)
    for call in (rt.alloc, rt.buffer):
        with pytest.raises(errors.InvalidArgument, match="deadline"):
            call(1, deadline)
    assert pool.calls == begin
    with pytest.raises(errors.InvalidArgument, match="absolute=True"):
        rt.alloc(1, -5)


def test_served_by_priority_then_in_order(pool: RTPool, rt: RTClient) -> None:
    block = fill(rt)
    half = rt.size // 2
    order: list[str] = []
    kept: list[realtime.RTBlock] = []
    with contextlib.ExitStack() as stack:
        low, high = (stack.enter_context(rt.join(priority=p)) for p in (1, 50))

        def wait(who: RTClient, name: str) -> None:
            kept.append(who.alloc(half, 10**9))
            order.append(name)

        # each begins to wait while those before it do; the last one frees
        def free() -> None:
            block.free()
            served = [id(b.client) for b in fake(rt).arena.blocks.values()]
            assert served == [id(fake(high)), id(fake(low))]

        pool.others = [
            lambda: wait(low, "low"),
            lambda: wait(high, "high"),
            free,
            lambda: kept.pop(0).free(),
        ]
        wait(rt, "first and last")
        assert order == ["high", "low", "first and last"]
        kept.clear()


def test_nobody_takes_what_others_wait_for(pool: RTPool, rt: RTClient) -> None:
    blocks = rt.alloc_many([rt.size // 2] * 2)
    tried: list[type[Exception]] = []

    def barge() -> None:
        blocks[0].free()
        try:
            rt.alloc(100)
        except errors.ArenaFull as error:
            tried.append(type(error))
        blocks[1].free()

    pool.others = [barge]
    with rt.alloc(rt.size, 1000):
        assert tried == [errors.ArenaFull]


def test_an_item_that_is_freed_goes_to_its_own_client(pool: RTPool, rt: RTClient) -> None:
    rt.reserve(1000, 1)
    item = rt.alloc(1000, reserved=True)
    with rt.join(priority=9) as other:
        rest = []
        while other.info().largest:
            rest.append(other.alloc(other.info().largest))
        missed: list[int] = []

        def wait() -> None:
            with contextlib.suppress(errors.DeadlineMissed):
                other.alloc(1000, 500)
            missed.append(other.info().misses)

        # the other one waits when the item is freed, and has the higher priority
        pool.others = [wait, item.free]
        with rt.alloc(900, 10_000):
            assert rt.info().misses == 0
        assert missed == [1]
        other.free_many(rest)


def test_signals_do_not_prolong_a_wait(
    pool: RTPool, rt: RTClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    real = FakeRT._alloc

    def alloc(self: FakeRT, a: abi.RTAlloc) -> None:
        asked.append(a.deadline_ns)
        real(self, a)

    def signal() -> None:
        pool.now += 300
        raise InterruptedError(errno.EINTR, "a signal")

    monkeypatch.setattr(FakeRT, "_alloc", alloc)
    monkeypatch.setattr(time, "monotonic_ns", lambda: pool.now)
    with fill(rt):
        begin = pool.now
        pool.others = [signal, signal]
        with pytest.raises(errors.DeadlineMissed):
            rt.alloc(100, 1000)
        assert asked[1:] == [1000, 700, 400]
        assert pool.now == begin + 1000
        # one that comes at the end
        pool.others = [signal]
        with pytest.raises(errors.DeadlineMissed):
            rt.alloc_many([100, 100], 200)
        assert asked[4:] == [200, 1]
        # an absolute one stays what it is
        del asked[:]
        pool.others = [signal]
        end = pool.now + 1000
        with pytest.raises(errors.DeadlineMissed):
            rt.alloc(100, end, absolute=True)
        assert asked == [end, end]
        # and a prepared one is as it was
        buffer = rt.buffer(100, 500)
        del asked[:]
        for _ in range(2):
            pool.others = [signal]
            with pytest.raises(errors.DeadlineMissed):
                buffer.take()
        assert asked == [500, 200, 500, 200]


def test_a_handler_that_raises_ends_the_wait(pool: RTPool, rt: RTClient) -> None:
    def handler() -> None:
        raise KeyboardInterrupt

    with fill(rt):
        pool.others = [handler]
        with pytest.raises(KeyboardInterrupt):
            rt.alloc(100, 1000)
        fake(rt).arena.waiters.clear()


# -- movable blocks -----------------------------------------------------------------------


def test_compaction(rt: RTClient) -> None:
    fixed, moved = rt.alloc(CHUNK // 2 - 1024), rt.alloc(1024, movable=True)
    assert (moved.movable, moved.pins) == (True, 1)
    moved.array(256)[...] = np.arange(256)
    where = moved.offset
    fixed.free()
    with pytest.raises(errors.ArenaFull):
        rt.alloc(CHUNK - 1024)
    with pytest.raises(errors.DeadlineMissed):
        rt.alloc(CHUNK - 1024, 1000)  # it is pinned
    moved.unpin()
    with pytest.raises(errors.InvalidArgument, match="not pinned and may lie anywhere"):
        moved.buffer()
    with rt.alloc(CHUNK - 1024, 1000):
        assert rt.info().moves == 1
        with moved.pinned() as view:
            assert moved.offset != where
            assert moved.pins == 1
            assert np.frombuffer(bytes(view), np.float32).tolist() == list(range(256))
    assert moved.pins == 0
    moved.free()


def test_pins(rt: RTClient) -> None:
    with rt.alloc(100, movable=True) as block:
        assert block.pin() == block.offset
        assert block.pins == 2
        with block.pinned() as view:
            assert block.pins == 3
            view[0] = 5
        with pytest.raises(ValueError, match="released"):
            view[0]
        block.unpin()
        block.unpin()
        assert block.pins == 0
        with pytest.raises(errors.InvalidArgument, match="not pinned"):
            block.unpin()
        with block.pinned() as view:
            assert view[0] == 5


@pytest.mark.parametrize("use", [lambda v: v[2:5], lambda v: np.frombuffer(v, np.uint8)])
def test_a_view_that_is_still_in_use(rt: RTClient, use: Callable[[memoryview], Any]) -> None:
    with rt.alloc(100, movable=True) as block:
        block.unpin()
        with pytest.raises(errors.Busy, match="stays pinned"), block.pinned() as view:
            part = use(view)
        assert block.pins == 1
        part[0] = 1
        kept: list[Any] = []
        with pytest.raises(ZeroDivisionError), block.pinned() as view:
            kept.append((use(view), 1 // 0))
        assert kept == []
        assert block.pins == 1, "an error leaves nothing behind"
        with (
            contextlib.suppress(ZeroDivisionError),
            block.pinned() as view,
        ):
            kept.append(use(view))
            kept.append(1 // 0)
        assert block.pins == 2, "no error on top of an error"
        kept.clear()
        del part
        with block.pinned() as view:
            assert view[0] + view[2] == 1
        assert block.pins == 2


def test_freed_while_pinned(rt: RTClient) -> None:
    block = rt.alloc(100, movable=True)
    with block.pinned():
        block.free()
    assert rt.info().blocks == 0


def test_pins_of_a_fixed_block(pool: RTPool, rt: RTClient) -> None:
    with rt.alloc(100) as block:
        calls = len(pool.calls)
        assert block.pin() == block.offset
        with block.pinned() as view:
            assert len(view) == 100
        assert len(pool.calls) == calls
        assert block.pins == 1
        with pytest.raises(errors.InvalidArgument, match="not movable"):
            block.unpin()


# -- buffers ------------------------------------------------------------------------------


def test_buffer(pool: RTPool, rt: RTClient) -> None:
    rt.reserve(256, 1)
    calls = len(pool.calls)
    with rt.buffer(200, reserved=True) as buffer:
        for number in range(10):
            assert buffer.offset is None
            offset = buffer.take()
            assert buffer.offset == offset
            struct.pack_into("<I", rt.memory, offset, number)
            assert rt.memory[offset] == number
            buffer.give()
        assert pool.calls[calls:] == [abi.IOC_RT_ALLOC, abi.IOC_RT_FREE] * 10
        buffer.take()
        with pytest.raises(errors.InvalidArgument, match="taken already"):
            buffer.take()
        with rt.buffer("1M", reserved=True) as large, pytest.raises(errors.ArenaFull):
            large.take()
    assert rt.info().blocks == 0, "given back at the end"
    with pytest.raises(errors.Closed):
        buffer.take()
    with pytest.raises(errors.NoSuchBlock):
        buffer.give()
    buffer.close()


def test_buffer_with_a_deadline(pool: RTPool, rt: RTClient) -> None:
    block = fill(rt)
    buffer = rt.buffer(100, 700)
    begin = pool.now
    with pytest.raises(errors.DeadlineMissed):
        buffer.take()
    assert pool.now == begin + 700
    assert buffer.offset is None
    pool.others = [block.free]
    buffer.take()
    buffer.give()


def test_buffer_that_somebody_else_freed(rt: RTClient) -> None:
    buffer = rt.buffer(100)
    buffer.take()
    fake(rt).free(fake(rt).find(buffer._block.handle))
    with pytest.raises(errors.NoSuchBlock):
        buffer.give()
    buffer.take()
    buffer.give()


def test_buffer_keeps_the_descriptor(pool: RTPool) -> None:
    rt = tensormem.rt(1)
    buffer, other = rt.buffer(100), rt.buffer(100)
    buffer.take()
    rt.close()
    with pytest.raises(errors.Closed):
        other.take()
    buffer.give()
    other.close()
    assert len(pool.descriptors) == 1
    del buffer
    assert pool.descriptors == {}
    with pytest.raises(errors.Closed):
        rt.buffer(1)


def test_buffer_that_is_dropped_gives_back(rt: RTClient) -> None:
    buffer = rt.buffer(100)
    buffer.take()
    assert rt.info().blocks == 1
    del buffer
    assert rt.info().blocks == 0


def test_threads(rt: RTClient) -> None:
    """Each thread's blocks are its own, in any order of allocating and freeing."""
    failed: list[str] = []

    def work(number: int) -> None:
        mine = bytes([number]) * 300
        for turn in range(50):
            block = rt.alloc(300)
            block.buffer()[:] = mine
            batch = rt.alloc_many([100] * (turn % 3))
            if bytes(block.buffer()) != mine:
                failed.append(f"thread {number}, turn {turn}")
            rt.free_many([block, *batch])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert rt.info().blocks == 0
    assert fake(rt).arena.blocks == {}
