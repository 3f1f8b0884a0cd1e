# SPDX-License-Identifier: MIT
"""Every allocation inside every call fails once: an errno each time, nothing left.

Needs the debug kernel's fail-nth: the n-th allocation this thread makes in the
kernel fails. Sweeping n until the call gets through visits every rollback.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import mmap
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from device import (
    CHUNK,
    DEVICE,
    KV,
    PAGE,
    RT,
    SYSFS,
    Generation,
    Raw,
    Seq,
    Slot,
    View,
    becomes,
    chain,
    file_of,
    full,
    pattern,
    read,
    state,
    tokens,
    wait_for,
    weights,
    window,
    write,
)
from failnth import can_fail, disarm, let_fail, sweep
from tensormem import abi

NOZERO, HUGE, PAGED = abi.AllocFlag.NOZERO, abi.AllocFlag.HUGE, abi.AllocFlag.PAGED
PINNED = abi.AllocFlag.PINNED

pytestmark = can_fail


@pytest.fixture(autouse=True)
def injection() -> None:
    let_fail()


def empty_pool(chunks: int = 64) -> None:
    """No reserve and no free chunk: each has to come from the system."""
    for name, value in (("chunk/reserve", 0), ("chunk/capacity", 0), ("chunk/capacity", chunks)):
        assert write(name, value) == 0
    assert read("chunk/total") == 0


def drop_kept(client: Raw) -> None:
    """Have the shrinker take what is kept for reuse."""
    for _ in range(20):
        if client.info().kept == 0:
            return
        Path("/proc/sys/vm/drop_caches").write_text("2")
    pytest.fail("still kept")


def test_open(settings: None) -> None:
    fds: list[int] = []

    def call() -> int:
        try:
            fds.append(os.open(DEVICE, os.O_RDWR))
        except OSError as error:
            return error.errno or -1
        return 0

    def check(result: int) -> None:
        assert read("clients/count") == (result == 0)
        while fds:
            os.close(fds.pop())

    assert errno.ENOMEM in sweep(call, check)


ALLOCS = [
    *({"size": size, "kind": abi.Kind.KV}
      for size in (1, 3 * PAGE, 1 << 20, CHUNK, 2 * CHUNK + 5 * PAGE)),
    {"size": 64, "kind": abi.Kind.ACTIVATIONS},
    {"size": CHUNK, "kind": abi.Kind.WEIGHTS, "flags": PAGED},
    *({"size": CHUNK + PAGE, "kind": abi.Kind.KV, "flags": flags}
      for flags in (NOZERO, HUGE, PINNED)),
    {"size": 2 * CHUNK, "kind": abi.Kind.KV, "numa": abi.Numa.INTERLEAVE},
]  # fmt: skip


@pytest.mark.parametrize("request_", ALLOCS, ids=str)
def test_alloc_from_an_empty_pool(raw: Raw, request_: dict, settings: None) -> None:
    item = abi.Alloc(**request_)

    def check(result: int) -> None:
        info = raw.info()
        assert info.nr_tensors == (result == 0)
        # a tensor whose handle could not be told is freed: with NOZERO it is kept
        assert info.kept == 0 or item.flags == NOZERO
        assert (info.used > info.kept) == (result == 0)
        if result == 0:
            assert raw.free(item.handle) == 0
        drop_kept(raw)
        assert read("buddy/used_pages") == read("chunk/used") == 0
        empty_pool()
        item.handle = 0

    empty_pool()
    results = sweep(lambda: raw.ioctl(abi.IOC_ALLOC, item), check)
    assert {errno.ENOMEM, errno.EFAULT} <= results


def test_alloc_batch(raw: Raw, settings: None) -> None:
    sizes = [1, PAGE * 2, CHUNK, 1 << 18] * 3
    items = (abi.Alloc * len(sizes))(*(abi.Alloc(size=s, kind=abi.Kind.KV) for s in sizes))
    batch = abi.Batch(items=ctypes.addressof(items), count=len(items), item_size=ctypes.sizeof(items[0]))

    def check(result: int) -> None:
        assert raw.info().nr_tensors == (len(sizes) if result == 0 else 0)
        if result == 0:
            assert batch.failed == len(sizes)
            assert raw.free_batch([item.handle for item in items])[0] == 0
        assert read("buddy/used_pages") == read("chunk/used") == 0
        empty_pool()

    empty_pool()
    results = sweep(lambda: raw.ioctl(abi.IOC_ALLOC_BATCH, batch), check)
    assert {errno.ENOMEM, errno.EFAULT} <= results


@pytest.mark.parametrize("count", [1, 8])
def test_free(raw: Raw, count: int) -> None:
    """A free either frees all it was asked to, or says why and frees nothing."""
    handles = [raw.alloc(PAGE).handle for _ in range(count)]
    mapping = raw.map_window()
    mapping[0] = 1
    items = (abi.Free * count)(*(abi.Free(handle=h) for h in handles))
    batch = abi.Batch(items=ctypes.addressof(items), count=count, item_size=8)

    def check(result: int) -> None:
        assert raw.info().nr_tensors == (0 if result == 0 else count)
        if result == 0:
            for i in range(count):
                items[i].handle = raw.alloc(PAGE).handle

    if count == 1:
        results = sweep(lambda: raw.ioctl(abi.IOC_FREE, items[0]), check)
    else:
        results = sweep(lambda: raw.ioctl(abi.IOC_FREE_BATCH, batch), check)
    assert {errno.ENOMEM, errno.EFAULT} <= results
    mapping.close()


def test_query_info_and_quota_need_no_memory(raw: Raw) -> None:
    item = raw.alloc(PAGE)
    query, info, quota = abi.Query(handle=item.handle), abi.Info(), abi.Quota(bytes=1 << 30)
    numa = abi.SetNuma(numa=abi.Numa.BIND, nodes=1)
    for request, value in (
        (abi.IOC_QUERY, query), (abi.IOC_INFO, info), (abi.IOC_SET_QUOTA, quota),
        (abi.IOC_SET_NUMA, numa),
    ):  # fmt: skip
        assert sweep(lambda r=request, v=value: raw.ioctl(r, v)) == {errno.EFAULT}
    assert raw.info().quota == 1 << 30


@pytest.mark.parametrize("flags", [HUGE, PAGED])
def test_mmap_and_faults(raw: Raw, flags: int) -> None:
    """A mapping that fails leaves nothing, a fault that fails can be had again."""
    item = raw.alloc(2 * CHUNK + PAGE, flags=flags)
    size = 2 * CHUNK
    data = b"\x33" * size
    whole = raw.map_tensor(item)
    whole[:size] = data
    whole.close()
    maps: list[mmap.mmap] = []

    def call() -> int:
        try:
            maps.append(raw.map(size, item.offset))
        except OSError as error:
            return error.errno or -1
        return 0

    assert errno.ENOMEM in sweep(call)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    view = maps.pop()
    for other in maps:
        other.close()
    address = ctypes.addressof(ctypes.c_char.from_buffer(view))
    populate_read = 22

    def populate() -> int:
        return ctypes.get_errno() if libc.madvise(address, size, populate_read) else 0

    def check(_: int) -> None:
        assert view[:] == data
        assert libc.madvise(address, size, mmap.MADV_DONTNEED) == 0

    check(0)
    sweep(populate, check)


def test_a_block_falls_apart(raw: Raw) -> None:
    """mprotect of a part: it is done, or ENOMEM and all is as before."""
    item = raw.alloc(CHUNK, flags=HUGE)
    mapping = raw.map_tensor(item)
    data = b"\x44" * CHUNK
    mapping[:] = data
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    everything = mmap.PROT_READ | mmap.PROT_WRITE

    def call() -> int:
        failed = libc.mprotect(address + 5 * PAGE, 3 * PAGE, mmap.PROT_READ)
        return ctypes.get_errno() if failed else 0

    def check(_: int) -> None:
        assert libc.mprotect(address, CHUNK, everything) == 0
        assert mapping[:] == data
        mapping[:] = data

    assert errno.ENOMEM in sweep(call, check)
    mapping.close()


@pytest.mark.parametrize("size", [3 * PAGE, CHUNK])
def test_reuse(raw: Raw, size: int) -> None:
    """An allocation that fails leaves what is kept where it is, or gives it up: never lost."""
    window = raw.map_window()
    item = abi.Alloc(size=size, kind=abi.Kind.KV, flags=NOZERO)

    def park() -> None:
        if raw.info().kept == 0:
            assert raw.ioctl(abi.IOC_ALLOC, item) == 0
            window[item.offset : item.offset + 8] = b"contents"
            assert raw.free(item.handle) == 0

    def check(result: int) -> None:
        info = raw.info()
        assert info.nr_tensors == (result == 0)
        assert info.used == size
        assert info.kept == (0 if result == 0 else size)
        if result == 0:
            assert window[item.offset : item.offset + 8] == b"contents"
            assert raw.free(item.handle) == 0

    park()
    assert {errno.ENOMEM, errno.EFAULT} <= sweep(lambda: raw.ioctl(abi.IOC_ALLOC, item), check)
    window.close()


def test_reuse_in_a_batch(raw: Raw) -> None:
    """Some of it reused and some of it new: all or none, and what was reused is kept again."""
    size = 3 * PAGE
    first = [raw.alloc(size, abi.Kind.KV, flags=NOZERO).handle for _ in range(2)]
    assert raw.free_batch(first)[0] == 0
    items = (abi.Alloc * 4)(*(abi.Alloc(size=size, kind=abi.Kind.KV, flags=NOZERO)
                              for _ in range(4)))  # fmt: skip
    batch = abi.Batch(items=ctypes.addressof(items), count=4, item_size=ctypes.sizeof(abi.Alloc))

    def check(result: int) -> None:
        info = raw.info()
        assert info.nr_tensors == (4 if result == 0 else 0)
        if result == 0:
            assert info.kept == 0
            assert raw.free_batch([item.handle for item in items])[0] == 0
        else:
            assert 2 * size <= info.kept == info.used <= 4 * size
        if raw.info().kept != 2 * size:
            drop_kept(raw)
            again = [raw.alloc(size, abi.Kind.KV, flags=NOZERO).handle for _ in range(2)]
            assert raw.free_batch(again)[0] == 0

    results = sweep(lambda: raw.ioctl(abi.IOC_ALLOC_BATCH, batch), check)
    assert {errno.ENOMEM, errno.EFAULT} <= results


def test_free_for_reuse(raw: Raw) -> None:
    """Keeping it takes no memory: what fails is told before anything is freed."""
    item = abi.Free(handle=raw.alloc(CHUNK, flags=NOZERO).handle)

    def check(result: int) -> None:
        info = raw.info()
        assert (info.nr_tensors, info.used) == (0 if result == 0 else 1, CHUNK)
        assert info.kept == (CHUNK if result == 0 else 0)
        if result == 0:
            item.handle = raw.alloc(CHUNK, flags=NOZERO).handle

    assert {errno.ENOMEM, errno.EFAULT} <= sweep(lambda: raw.ioctl(abi.IOC_FREE, item), check)


def test_pinned_gives_back_what_it_counted(raw: Raw) -> None:
    """After every failure the whole RLIMIT_MEMLOCK is there again."""
    pid = os.fork()
    if pid == 0:
        item = abi.Alloc(size=4 * PAGE, kind=abi.Kind.KV, flags=PINNED)
        fd = os.open("/proc/thread-self/fail-nth", os.O_RDWR)
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (4 * PAGE, 4 * PAGE))
        os.setuid(65534)
        failed = 0
        for n in range(1, 200):
            os.pwrite(fd, b"%d" % n, 0)
            result = raw.ioctl(abi.IOC_ALLOC, item)
            unused = disarm(fd)
            failed += result != 0
            if result == 0:
                raw.free(item.handle)
            result, again = raw.try_alloc(4 * PAGE, abi.Kind.KV, flags=PINNED)
            if result or raw.free(again.handle):
                os._exit(2)
            if unused:
                os._exit(0 if failed > 3 else 3)
        os._exit(4)
    assert os.waitpid(pid, 0)[1] == 0


def test_sysfs_writes(settings: None) -> None:
    file = os.open(SYSFS / "chunk/capacity", os.O_WRONLY)

    def call() -> int:
        try:
            os.pwrite(file, b"8", 0)
        except OSError as error:
            return error.errno or -1
        return 0

    def check(result: int) -> None:
        assert read("chunk/capacity") == (8 if result == 0 else 9)
        assert write("chunk/capacity", 9) == 0

    assert write("chunk/capacity", 9) == 0
    sweep(call, check)
    os.close(file)


SHAPE = [full(2, CHUNK // 512), window(24, 1, CHUNK // 256), state(2, PAGE + 1)]


@pytest.fixture
def kv(raw: Raw) -> Iterator[KV]:
    with raw.kv(SHAPE, block_tokens=8, max_tokens=400, flags=abi.KV_EVENTS) as cache:
        yield cache


@pytest.fixture
def view(kv: KV) -> Iterator[View]:
    mapped = kv.view()
    yield mapped
    mapped.close()


def test_kv_create(raw: Raw, settings: None) -> None:
    groups = (abi.KVGroup * len(SHAPE))(*SHAPE)
    request = abi.KVCreate(
        groups=ctypes.addressof(groups), nr_groups=len(SHAPE), group_size=ctypes.sizeof(abi.KVGroup),
        max_tokens=400, max_sequences=8, flags=abi.KV_EVENTS, fd=-1,
    )  # fmt: skip
    descriptors = len(os.listdir("/proc/self/fd"))

    def check(result: int) -> None:
        if result == 0:
            assert read("kv/caches") == 1
            os.close(request.fd)
        assert read("kv/caches") == 0
        assert len(os.listdir("/proc/self/fd")) == descriptors + 1  # fail-nth's own
        request.fd = -1

    results = sweep(lambda: raw.ioctl(abi.IOC_KV_CREATE, request), check)
    assert {errno.ENOMEM, errno.EFAULT} <= results


def test_kv_open_and_fork(kv: KV, view: View) -> None:
    parent = kv.open(tokens=20)
    view.write(parent, tokens("p", 0, 20))
    before = kv.counts()
    for request, item, name, copies in (
        (abi.IOC_KV_OPEN, abi.KVOpen(), "sequence", 0),
        (abi.IOC_KV_FORK, abi.KVFork(sequence=parent.name, at=20), "child", 3),
    ):

        def check(result: int, item: object = item, name: str = name, copies: int = copies) -> None:
            after = kv.counts()
            if result == 0:
                assert after["sequences"] == before["sequences"] + 1
                assert kv.ioctl(abi.IOC_KV_CLOSE, abi.KVClose(sequence=getattr(item, name))) == 0
                after = kv.counts()
            assert (after["copies"] - before["copies"]) in (0, copies)
            before["copies"] = after["copies"]
            assert after == before
            view.check(parent, tokens("p", 0, 20))

        results = sweep(lambda r=request, i=item: kv.ioctl(r, i), check)
        assert errno.EFAULT in results


def test_kv_extend(raw: Raw, kv: KV, view: View, settings: None) -> None:
    """Out of an empty pool, by several chunks: all or nothing, and nothing kept."""
    seq = kv.open()
    item = abi.KVExtend(sequence=seq.name, tokens=200)

    def check(result: int) -> None:
        query, info = kv.query(seq), kv.info()
        # the very last copy tells the new length: nothing is taken back for that
        if result == 0 or (result == errno.EFAULT and query.length):
            assert query.length == 200
            assert item.length == 200 or result
            view.check(seq, dict.fromkeys(range(0, 200, 9)))
            view.write(seq, tokens("dirty", 0, 200))
            assert kv.truncate(seq, 0) == 0
        else:
            assert (query.length, query.held) == (0, 0)
            assert (info.used, info.held, raw.info().used) == (0, 0, 0)
        empty_pool()

    empty_pool()
    results = sweep(lambda: kv.ioctl(abi.IOC_KV_EXTEND, item), check)
    assert {errno.ENOMEM, errno.EFAULT} <= results


def test_kv_extend_batch(kv: KV, view: View, settings: None) -> None:
    seqs = [kv.open(tokens=n) for n in (3, 8, 30)]
    shared = kv.fork(seqs[0], 3)
    lengths = [3, 8, 30, 3]
    everybody = [*seqs, shared]
    for seq, length in zip(everybody, lengths, strict=True):
        view.write(seq, tokens(seq.name, 0, length))
    items = (abi.KVExtend * 4)(*(abi.KVExtend(sequence=s.name, tokens=9) for s in everybody))
    batch = abi.Batch(items=ctypes.addressof(items), count=4, item_size=ctypes.sizeof(abi.KVExtend))

    def check(result: int) -> None:
        more = kv.query(seqs[0]).length - lengths[0]
        # the very last copy tells the new lengths: nothing is taken back for that
        assert more == 9 if result == 0 else more in ((0,) if result == errno.ENOMEM else (0, 9))
        assert [kv.query(seq).length for seq in everybody] == [n + more for n in lengths]
        for i, (seq, length) in enumerate(zip(everybody, lengths, strict=True)):
            view.check(seq, tokens(seq.name, 0, length))
            if more:
                lengths[i] += more
                view.write(seq, tokens(seq.name, length, length + more))
        assert more or kv.info().used == used[0]
        used[0] = kv.info().used

    used = [kv.info().used]
    results = sweep(lambda: kv.ioctl(abi.IOC_KV_EXTEND_BATCH, batch), check)
    assert {errno.ENOMEM, errno.EFAULT} <= results


def test_kv_publish_and_lookup(kv: KV, view: View) -> None:
    names = chain("n", 5)
    seq = kv.open(tokens=40)
    view.write(seq, tokens("p", 0, 40))
    kv.events()
    array = (abi.KVHash * 5).from_buffer_copy(b"".join(names))
    item = abi.KVHashes(sequence=seq.name, count=5, hashes=ctypes.addressof(array))
    probe = kv.open()

    def published(result: int) -> None:
        there = kv.peek(probe, names)[1]
        # the last that can fail tells what was done before
        assert there == 5 if result == 0 else there in (0, 5)
        assert len(kv.events()) in (0, 5 + 3 + 1)
        view.check(seq, tokens("p", 0, 40))

    results = sweep(lambda: kv.ioctl(abi.IOC_KV_PUBLISH, item), published)
    assert {errno.ENOMEM, errno.EFAULT} <= results
    late = kv.open()
    item = abi.KVHashes(sequence=late.name, count=5, hashes=ctypes.addressof(array))
    used = kv.info().used

    def found(result: int) -> None:
        length = kv.query(late).length
        assert length == 40 if result == 0 else length in (0, 40)
        if length:
            view.check(late, tokens("p", 0, 40))
            assert kv.truncate(late, 0) == 0
        assert kv.info().used == used
        item.matched = 0

    results = sweep(lambda: kv.ioctl(abi.IOC_KV_LOOKUP, item), found)
    assert {errno.ENOMEM, errno.EFAULT} <= results


def test_kv_adopt(raw: Raw, settings: None) -> None:
    """A partial hit takes a copy, for which a chunk has to come."""
    with raw.kv([full(1, CHUNK // 8)], block_tokens=8, max_tokens=64) as kv:
        view, names = kv.view(), chain("n", 1)
        seq = kv.open(tokens=8)
        view.write(seq, tokens("p", 0, 8))
        assert kv.publish(seq, names) == 0
        late = kv.open()
        item = abi.KVAdopt(sequence=late.name, tokens=5, hash=abi.KVHash.from_buffer_copy(names[0]))

        def check(result: int) -> None:
            length = kv.query(late).length
            assert length == 5 if result == 0 else length in (0, 5)
            if length:
                view.check(late, tokens("p", 0, 5))
                assert kv.truncate(late, 0) == 0
            info = kv.info()
            assert info.used == CHUNK
            assert info.held == CHUNK or length  # one more may stay for the next block
            empty_pool_but(info.held // CHUNK)

        empty_pool_but(1)
        results = sweep(lambda: kv.ioctl(abi.IOC_KV_ADOPT, item), check)
        assert {errno.ENOMEM, errno.EFAULT} <= results
        view.close()


def empty_pool_but(used: int) -> None:
    """As empty_pool(), with so many chunks in use."""
    for name, value in (("chunk/reserve", 0), ("chunk/capacity", used), ("chunk/capacity", 64)):
        assert write(name, value) == 0
    assert read("chunk/total") == used


def test_kv_calls_that_need_no_memory(kv: KV, view: View) -> None:
    seq = kv.open(tokens=20)
    view.write(seq, tokens("p", 0, 20))
    for request, item in (
        (abi.IOC_KV_INFO, abi.KVInfo()),
        (abi.IOC_KV_QUERY, abi.KVQuery(sequence=seq.name)),
    ):
        assert sweep(lambda r=request, i=item: kv.ioctl(r, i)) == {errno.EFAULT}
    assert errno.EFAULT in sweep(
        lambda: kv.ioctl(abi.IOC_KV_TRUNCATE, abi.KVTruncate(sequence=seq.name, length=20))
    )
    view.check(seq, tokens("p", 0, 20))

    def closed(result: int) -> None:
        there = kv.try_query(Seq(close.sequence, 0))[0]
        assert there == (errno.ENOENT if result == 0 else 0)
        if result == 0:
            close.sequence = kv.open(tokens=20).name

    close = abi.KVClose(sequence=seq.name)
    assert errno.EFAULT in sweep(lambda: kv.ioctl(abi.IOC_KV_CLOSE, close), closed)
    assert kv.end(Seq(close.sequence, 0)) == 0
    assert errno.EFAULT in sweep(lambda: kv.ioctl(abi.IOC_KV_RESET, abi.KVReset()))


def test_kv_pack_and_unpack(kv: KV, view: View) -> None:
    """A block is packed or is not, and has its contents either way."""
    seq = kv.open(tokens=32)
    view.write(seq, tokens("p", 0, 32))
    view.write(seq, tokens("w", 8, 32), 1)
    item = abi.KVPack(sequence=seq.name)

    def check(_: int) -> None:
        view.check(seq, tokens("p", 0, 32))
        view.check(seq, tokens("w", 8, 32), 1)

    def unpacked(_: int) -> None:
        check(0)
        assert kv.pack(seq)[0] == 0

    assert errno.EFAULT in sweep(lambda: kv.ioctl(abi.IOC_KV_PACK, item), check)
    item = abi.KVPack(sequence=seq.name, flags=abi.KV_UNPACK)
    assert kv.pack(seq)[0] == 0
    assert errno.EFAULT in sweep(lambda: kv.ioctl(abi.IOC_KV_PACK, item), unpacked)
    # the codec is looked for by the first of these calls: no memory is no reason for another one
    assert (SYSFS / "kv/codec").read_text() == "zstd\n"


def test_kv_events(kv: KV) -> None:
    """A read that fails loses no event."""
    seq, names = kv.open(tokens=16), chain("e", 2)
    assert kv.publish(seq, names) == 0
    os.set_blocking(kv.fd, False)
    got: list[bytes] = []

    def call() -> int:
        try:
            got.append(os.read(kv.fd, 2 * ctypes.sizeof(abi.KVEvent)))
        except OSError as error:
            return error.errno or -1
        return 0

    assert errno.EFAULT in sweep(call)
    events = b"".join(got)
    told = [abi.KVEvent.from_buffer_copy(events, at)
            for at in range(0, len(events), ctypes.sizeof(abi.KVEvent))] + kv.events()  # fmt: skip
    assert [bytes(e.hash.bytes) for e in told if e.group == 0] == names


def test_kv_mmap(kv: KV, view: View) -> None:
    seq = kv.open(tokens=20)
    view.write(seq, tokens("p", 0, 20))
    maps: list[mmap.mmap] = []
    size = kv.info().sequence_size

    def call() -> int:
        try:
            maps.append(kv.map(size, seq.offset))
        except OSError as error:
            return error.errno or -1
        return 0

    assert errno.ENOMEM in sweep(call)
    for mapping in maps:
        assert mapping[:8] == view.memory[seq.offset : seq.offset + 8]
        mapping.close()


@pytest.mark.parametrize("how", ["first", "copy", "unpack"])
def test_kv_faults(raw: Raw, how: str, settings: None) -> None:
    """A touch that fails has changed nothing and works the next time."""
    # a block is a chunk
    with raw.kv([full(1, CHUNK // 8)], block_tokens=8, max_tokens=64) as kv:
        view, seq = kv.view(), kv.open(tokens=8)
        view.write(seq, tokens("p", 0, 8))
        zero = os.open("/dev/zero", os.O_RDONLY)

        def arrange() -> tuple[Seq, View, memoryview]:
            target = kv.fork(seq, 8) if how == "copy" else seq
            if how == "unpack":
                assert kv.pack(seq)[0] == 0
                assert kv.query(seq).packed
            look = kv.view()
            at = view.place(target, 8) - 16
            empty_pool_but(kv.info().held // CHUNK)
            return target, look, memoryview(look.memory)[at : at + 16]

        def call() -> int:
            try:
                # the kernel writes the end of the last token: its fault is our error
                return 0 if os.readv(zero, [touched[2]]) == 16 else errno.EFAULT
            except OSError as error:
                return error.errno or -1

        def check(result: int) -> None:
            nonlocal touched
            target, look, part = touched
            last = pattern(("p", 7), 0, CHUNK // 8)
            zeroed = last[:-16] + bytes(16)
            now = view.memory[view.span(target, 7)]
            assert now == zeroed if result == 0 else now in (last, zeroed)
            view.check(target, tokens("p", 0, 7))
            if target != seq:
                view.check(seq, tokens("p", 0, 8))
                assert kv.end(target) == 0
            view.write(seq, {7: ("p", 7)})
            part.release()
            look.close()
            touched = arrange()

        touched = arrange()
        assert errno.EFAULT in sweep(call, check)
        touched[2].release()
        touched[1].close()
        os.close(zero)
        view.close()


NEW = abi.OpenFlag.CREATE | abi.OpenFlag.EXCL | abi.OpenFlag.WRITE
MODEL = CHUNK + 3 * PAGE + 5


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def summary(slot: Slot) -> tuple[object, ...]:
    """What a call that fails leaves as it was; the number given out last is no promise."""
    names = ("model/slots", "model/generations", "model/held", "clients/bytes", "chunk/used")
    info = slot.buried().info()
    values = tuple(map(read, names))
    return slot.places(), info.generations, values, tuple(slot.told().items()), descriptors()


@pytest.fixture
def filled(slot: Slot) -> Slot:
    """Generations 1 and 2 are previous and active, 3 is staged."""
    for number in (1, 2):
        assert slot.swap(weights(number, MODEL)) == number
    slot.load(weights(3, MODEL), abi.StageFlag.KEEP).close()
    assert slot.places() == (2, 1, 3)
    return slot


def test_model_open(raw: Raw) -> None:
    """Made and opened, or neither."""
    request = abi.ModelOpen(flags=NEW, mode=0o600, fd=-1)
    ctypes.memmove(ctypes.addressof(request), b"made", 4)
    before = descriptors()

    def check(result: int) -> None:
        assert read("model/slots") == (result == 0)
        assert (SYSFS / "model/made").exists() == (result == 0)
        if result == 0:
            with Slot(request.fd, "made") as slot:
                assert slot.remove() == 0
        request.fd = -1
        assert descriptors() == before + 1  # fail-nth's own

    assert {errno.ENOMEM, errno.EFAULT} <= sweep(lambda: raw.ioctl(abi.IOC_MODEL_OPEN, request), check)


def test_model_open_again(raw: Raw, filled: Slot) -> None:
    request = abi.ModelOpen(flags=abi.OpenFlag.WRITE, fd=-1)
    ctypes.memmove(ctypes.addressof(request), filled.name.encode(), len(filled.name))
    before = descriptors()

    def check(result: int) -> None:
        if result == 0:
            with Slot(request.fd, filled.name) as slot:
                assert slot.places() == (2, 1, 3)
        assert descriptors() == before + 1
        assert read("model/slots") == 1

    assert {errno.ENOMEM, errno.EFAULT} <= sweep(lambda: raw.ioctl(abi.IOC_MODEL_OPEN, request), check)


@pytest.mark.parametrize("flags", [0, abi.StageFlag.VERIFY, abi.StageFlag.CACHED, abi.StageFlag.KEEP])
def test_model_stage(filled: Slot, flags: int, settings: None) -> None:
    """The slot has it and it is loaded, or nothing is left of it and another can be staged."""
    assert filled.abort(3) == 0
    data = weights("staged", MODEL)
    path = Path("/var/tmp/staged.bin")
    path.write_bytes(data)
    file = os.open(path, os.O_RDONLY)
    request = abi.ModelStage(file=file, flags=flags, fd=-1)
    if flags & abi.StageFlag.VERIFY:
        request.sha256[:] = hashlib.sha256(data).digest()
    before = summary(filled)

    def check(result: int) -> None:
        if result == 0:
            with Generation(request.fd, request.generation) as gen:
                assert gen.loaded().contents() == data
                assert filled.abort(gen.number) == 0
        request.fd = -1
        wait_for(lambda: filled.info().generations == 2)
        after = summary(filled)
        assert after == (*before[:-1], before[-1] + 1)

    results = sweep(lambda: filled.ioctl(abi.IOC_MODEL_STAGE, request), check)
    assert {errno.ENOMEM, errno.EFAULT} <= results
    # nobody holds the file
    path.write_bytes(b"changed")
    os.close(file)
    path.unlink()


LOOK = """
import pathlib, sys
while True:
    for path in pathlib.Path(sys.argv[1]).glob("*/*_bytes"):
        try:
            path.read_text()
        except OSError:
            continue  # it is gone
"""


def test_model_stage_while_somebody_looks(filled: Slot) -> None:
    """Its folder comes and goes under readers of its files, and nobody waits for the other for ever."""
    assert filled.abort(3) == 0
    file = file_of(weights("staged", PAGE))
    request = abi.ModelStage(file=file, fd=-1)
    # no fork of this process: it would take a page for each of its own that it writes to, and fail at that instead
    looker = subprocess.Popen([sys.executable, "-c", LOOK, SYSFS / "model" / filled.name])

    def check(result: int) -> None:
        if result == 0:
            Generation(request.fd, request.generation).settled().close()
        wait_for(lambda: filled.info().generations == 2)

    try:
        assert {errno.ENOMEM, errno.EFAULT} <= sweep(lambda: filled.ioctl(abi.IOC_MODEL_STAGE, request), check)
    finally:
        looker.kill()
        ended = looker.wait()
    assert ended == -signal.SIGKILL
    os.close(file)


def test_model_load(slot: Slot) -> None:
    """The thread that loads meets a failure here and there: it fails as a whole, or has got over it."""
    slot.swap(weights("active", MODEL))
    fd = os.memfd_create("long")
    os.truncate(fd, 24 * CHUNK)
    held, results = read("model/held"), set()
    for n in (*range(1, 24), 30, 50, 80):
        gen = slot.stage(fd, abi.StageFlag.VERIFY)
        for thread in Path("/proc").glob("[0-9]*"):
            try:
                if (thread / "comm").read_text().startswith("tm-load"):
                    (thread / "fail-nth").write_text(str(n))
            except OSError:
                continue  # it has ended
        error = gen.failed()  # the checksum is wrong in any case
        results.add(error)
        assert error in (errno.ENOMEM, errno.EBADMSG, errno.EFAULT)
        becomes("model/held", held)
        gen.close()
    assert errno.ENOMEM in results
    with slot.acquire() as active:
        assert active.contents() == weights("active", MODEL)
    os.close(fd)


@pytest.fixture
def evictable(slot: Slot) -> Iterator[Generation]:
    path = Path("/var/tmp/evictable.bin")
    path.write_bytes(weights("evictable", MODEL))
    file = os.open(path, os.O_RDONLY)
    with slot.stage(file, abi.StageFlag.EVICTABLE) as gen:
        os.close(file)
        assert slot.commit(gen.loaded().number) == 0
        yield gen
    path.unlink()


def test_model_evict(slot: Slot, evictable: Generation) -> None:
    """Gone or there, and right in any case; what cannot be told is not done."""
    item = abi.ModelEvict()

    def check(result: int) -> None:
        assert evictable.contents() == weights("evictable", MODEL)
        item.generation, item.bytes = 0, 0

    assert sweep(lambda: slot.ioctl(abi.IOC_MODEL_EVICT, item), check) == {errno.EFAULT}


def test_model_reload(slot: Slot, evictable: Generation) -> None:
    """A read that brings a chunk in succeeds, or fails and the next one does; the generation is as good as before."""
    data, place, got = weights("evictable", MODEL), bytearray(PAGE), [0]

    def away() -> None:
        assert slot.ioctl(abi.IOC_MODEL_EVICT, abi.ModelEvict()) == 0
        assert evictable.memory() == (0, 0)

    def call() -> int:
        got[0] = 0
        try:
            got[0] = os.preadv(evictable.fd, [place], 0)
        except OSError as error:
            return error.errno or -1
        return 0

    def check(_: int) -> None:
        assert place[: got[0]] == data[: got[0]]
        assert evictable.contents() == data
        assert evictable.state() == abi.ModelState.ACTIVE
        away()

    away()
    assert errno.EFAULT in sweep(call, check)


def test_model_acquire(filled: Slot) -> None:
    for number in (0, 1, 2, 3):
        item = abi.ModelAcquire(generation=number, fd=-1)
        before = summary(filled)

        def check(result: int, item: abi.ModelAcquire = item, wanted: int = number or 2, old: tuple = before) -> None:
            if result == 0:
                with Generation(item.fd, item.generation) as gen:
                    assert gen.contents() == weights(wanted, MODEL)
            else:
                assert item.fd == -1
            assert summary(filled) == (*old[:-1], old[-1] + 1)
            item.fd, item.generation = -1, wanted

        assert {errno.ENOMEM, errno.EFAULT} <= sweep(lambda i=item: filled.ioctl(abi.IOC_MODEL_ACQUIRE, i), check)


def test_model_commit_and_rollback(filled: Slot) -> None:
    """Done or not done, and in constant time: nothing is allocated."""
    item = abi.ModelWhich(generation=3)

    def committed(result: int) -> None:
        done = filled.places() == (item.generation, item.generation - 1, 0)
        # the last copy tells nothing new: it may fail when all is done
        assert done or result
        if done:
            filled.load(weights("next", PAGE), abi.StageFlag.KEEP).close()
            item.generation = filled.info().staged
        assert filled.info().generations == 3

    results = sweep(lambda: filled.ioctl(abi.IOC_MODEL_COMMIT, item), committed)
    assert errno.EFAULT in results
    assert errno.ENOMEM not in results
    turn = abi.ModelWhich()
    places = [filled.places()]

    def rolled(result: int) -> None:
        now = filled.places()
        active, previous, staged = places[0]
        assert now == ((previous, active, staged) if result == 0 else places[0])
        assert result or turn.generation == now[0]
        turn.generation = 0
        places[0] = now

    results = sweep(lambda: filled.ioctl(abi.IOC_MODEL_ROLLBACK, turn), rolled)
    assert results == {errno.EFAULT}


def test_model_abort_and_remove(raw: Raw, filled: Slot) -> None:
    item = abi.ModelWhich(generation=3)

    def aborted(result: int) -> None:
        staged = filled.info().staged
        assert staged == 0 or result
        if not staged:
            filled.load(weights("next", PAGE), abi.StageFlag.KEEP).close()
            item.generation = filled.info().staged
        assert filled.info().generations == 3

    assert errno.EFAULT in sweep(lambda: filled.ioctl(abi.IOC_MODEL_ABORT, item), aborted)
    slots = [raw.slot("gone", NEW, mode=0o600)]
    slots[0].swap(weights("gone", MODEL))

    def removed(result: int) -> None:
        there = read("model/slots") == 2
        assert not there or result
        if not there:
            slots.pop().close()
            slots.append(raw.slot("gone", NEW, mode=0o600))
            slots[0].swap(weights("gone", MODEL))

    results = sweep(lambda: slots[0].ioctl(abi.IOC_MODEL_REMOVE, abi.ModelRemove()), removed)
    assert errno.EFAULT in results
    assert slots[0].remove() == 0
    slots[0].close()


def test_model_calls_that_need_no_memory(filled: Slot) -> None:
    assert sweep(lambda: filled.ioctl(abi.IOC_MODEL_SLOT, abi.ModelSlot())) == {errno.EFAULT}
    with filled.acquire() as gen:
        assert sweep(lambda: gen.ioctl(abi.IOC_MODEL_INFO, abi.ModelInfo())) == {errno.EFAULT}


def test_model_read(filled: Slot) -> None:
    """What is read is right; an error has moved nothing."""
    data, place = weights(2, MODEL), bytearray(3 * PAGE)
    with filled.acquire() as gen:
        done = [0]

        def call() -> int:
            try:
                done[0] = os.preadv(gen.fd, [place], CHUNK - PAGE)
            except OSError as error:
                done[0] = 0
                return error.errno or -1
            return 0

        def check(_: int) -> None:
            assert place[: done[0]] == data[CHUNK - PAGE : CHUNK - PAGE + done[0]]
            place[:] = bytes(len(place))

        assert errno.EFAULT in sweep(call, check)
        assert gen.contents() == data


@pytest.mark.parametrize("part", ["block", "tail"])
def test_model_faults(filled: Slot, part: str) -> None:
    """A touch that fails works the next time."""
    data = weights(2, MODEL)
    at = 5 * PAGE if part == "block" else CHUNK + PAGE
    with filled.acquire() as gen:
        copy = file_of(bytes(PAGE))
        views: list[mmap.mmap] = [gen.view()]

        def call() -> int:
            try:
                return 0 if os.pwrite(copy, memoryview(views[0])[at : at + PAGE], 0) == PAGE else errno.EFAULT
            except OSError as error:
                return error.errno or -1

        def check(result: int) -> None:
            assert result or os.pread(copy, PAGE, 0) == data[at : at + PAGE]
            assert views[0][at : at + PAGE] == data[at : at + PAGE]
            views.pop().close()
            views.append(gen.view())  # with no page table yet

        # pages are mapped again if they could not be at first; a block's table is missed
        results = sweep(call, check)
        assert results
        assert part == "tail" or errno.EFAULT in results
        views.pop().close()
        os.close(copy)


def test_model_mmap(filled: Slot) -> None:
    with filled.acquire() as gen:
        views: list[mmap.mmap] = []

        def call() -> int:
            try:
                views.append(gen.view())
            except OSError as error:
                return error.errno or -1
            return 0

        assert errno.ENOMEM in sweep(call)
        assert gen.info().readers == 1  # they are of the same open file
        for view in views:
            assert view[:] == weights(2, MODEL)
            view.close()
        assert gen.info().readers == 1


@pytest.mark.parametrize("size", [PAGE, 3 * CHUNK + 11 * PAGE])
def test_export(raw: Raw, size: int) -> None:
    """A dma-buf, or nothing of it: the tensor is not held. What was nearly exported is not reused."""
    before = descriptors() + 1  # what the sweep opens
    item = raw.alloc(size, flags=NOZERO)
    request = abi.Export(handle=item.handle, fd=-1)
    kept: list[int] = []

    def check(result: int) -> None:
        nonlocal item
        assert descriptors() == before + (result == 0)
        if result == 0:
            assert read("dma/bytes") == size
            os.close(request.fd)
        becomes("dma/buffers", 0)
        assert raw.free(item.handle) == 0
        becomes("chunk/quarantined", 0)
        if result == 0:
            assert raw.info().kept == 0
        else:
            kept.append(raw.info().kept)
        item = raw.alloc(size, flags=NOZERO)
        request.handle = item.handle

    assert sweep(lambda: raw.ioctl(abi.IOC_EXPORT, request), check) >= {errno.ENOMEM, errno.EFAULT}
    # Until its memory is held it is left as it was, from then on as if it had been exported
    assert set(kept) == {size, 0}
    assert kept == sorted(kept, reverse=True)


# The RT pool

MOVABLE = abi.RTFlag.MOVABLE
SECOND = 10**9


def pool() -> tuple[int, ...]:
    """What a call that fails leaves as it was."""
    names = ("rt/used", "rt/held", "rt/arenas", "clients/bytes", "chunk/used", "buddy/used_pages")
    return (*map(read, names), descriptors(), len(list((SYSFS / "rt").iterdir())))


@pytest.fixture
def rt(raw: Raw) -> Iterator[RT]:
    with raw.rt(CHUNK, movable=64) as arena:
        yield arena


@pytest.mark.parametrize("ready", [0, 2, 3])
def test_rt_open(raw: Raw, settings: None, ready: int) -> None:
    """An arena, or nothing of it; also when some of its chunks were set aside."""
    request = abi.RTOpen(size=3 * CHUNK, arena=-1, movable=64, fd=-1)
    empty_pool()
    assert write("rt/ready", ready * CHUNK) == 0
    before = pool()

    def check(result: int) -> None:
        if result == 0:
            with RT(request.fd) as rt:
                view = rt.view()
                assert view[:] == bytes(3 * CHUNK)
                view[:] = b"\x5e" * (3 * CHUNK)
                view.close()
        else:
            assert request.fd == -1
        request.fd = -1
        # what was ready may have been used, and others taken in its place, soon
        wait_for(lambda: read("rt/held") == ready * CHUNK)
        after = pool()
        assert after == (*before[:-2], before[-2] + 1, before[-1])
        if ready == 0:
            empty_pool()

    assert {errno.ENOMEM, errno.EFAULT} <= sweep(lambda: raw.ioctl(abi.IOC_RT_OPEN, request), check)


def test_rt_join(raw: Raw, rt: RT) -> None:
    request = abi.RTOpen(arena=rt.fd, fd=-1)
    before, counts = pool(), rt.counts()

    def check(result: int) -> None:
        if result == 0:
            with RT(request.fd) as other:
                assert other.info().clients == 2
        request.fd = -1
        assert pool() == (*before[:-2], before[-2] + 1, before[-1])
        assert rt.counts() == counts

    assert {errno.ENOMEM, errno.EFAULT} <= sweep(lambda: raw.ioctl(abi.IOC_RT_OPEN, request), check)


def test_rt_mmap(rt: RT) -> None:
    """All of it is mapped or nothing is; what was given up comes back, if not now then later."""
    before = pool()
    view = rt.view()
    data = weights("arena", CHUNK)
    view[:] = data
    maps: list[mmap.mmap] = []

    def call() -> int:
        try:
            maps.append(rt.map(CHUNK, 0))
        except OSError as error:
            return error.errno or -1
        return 0

    def check(result: int) -> None:
        assert len(maps) == (result == 0)
        for mapping in maps:
            assert mapping[:] == data
            mapping.close()
        maps.clear()

    assert sweep(call, check) - {0} == {errno.ENOMEM}
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    address = ctypes.addressof(ctypes.c_char.from_buffer(view))
    populate_write = 23

    def populate() -> int:
        return ctypes.get_errno() if libc.madvise(address, CHUNK, populate_write) else 0

    def given_up(_: int) -> None:
        assert view[:] == data
        assert libc.madvise(address, CHUNK, mmap.MADV_DONTNEED) == 0

    given_up(0)
    sweep(populate, given_up)
    view.close()
    assert pool() == before


def same(rt: RT, before: dict[str, int]) -> None:
    assert rt.counts() == before


def test_rt_calls_need_no_memory(rt: RT) -> None:
    """Copies may fail, and then nothing was done. Nothing else can: no call asks for memory."""
    block, moves = rt.alloc(256), rt.alloc(256, flags=MOVABLE)
    before = [rt.counts()]

    def unchanged(result: int, undo: Callable[[], int]) -> None:
        if result == 0:
            assert undo() == 0
        now = rt.counts()
        assert {**now, "allocs": 0} == {**before[0], "allocs": 0}
        assert result == 0 or now["allocs"] == before[0]["allocs"]
        before[0] = now

    reserve = abi.RTReserve(size=300, count=3)
    alloc = abi.RTAlloc(size=5000)
    pin = abi.RTBlock(handle=moves.handle)
    priority = abi.RTPriority(priority=5)
    calls: list[tuple[int, abi.Struct, Callable[[], int]]] = [
        (abi.IOC_RT_INFO, abi.RTInfo(), lambda: 0),
        (abi.IOC_RT_RESERVE, reserve, lambda: rt.reserve(300, 0)),
        (abi.IOC_RT_ALLOC, alloc, lambda: rt.free(alloc.handle)),
        (abi.IOC_RT_PIN, pin, lambda: rt.unpin(pin.handle)),
        (abi.IOC_RT_UNPIN, pin, lambda: rt.pin(pin.handle)[0]),
        (abi.IOC_RT_PRIORITY, priority, lambda: rt.set_priority(0)),
    ]
    for request, item, undo in calls:
        results = sweep(lambda r=request, i=item: rt.ioctl(r, i), lambda result, u=undo: unchanged(result, u))
        assert results == {errno.EFAULT}, hex(request)
    for handle in (block.handle, moves.handle):
        item = abi.RTBlock(handle=handle)

        def freed(result: int, item: abi.RTBlock = item) -> None:
            assert rt.info().blocks == 2 - (result == 0)
            if result == 0:
                item.handle = rt.alloc(256).handle

        assert sweep(lambda i=item: rt.ioctl(abi.IOC_RT_FREE, i), freed) == {errno.EFAULT}


def test_rt_batches(rt: RT) -> None:
    """All or none, wherever it fails."""
    items = (abi.RTAlloc * 8)(*(abi.RTAlloc(size=900 * (i + 1), flags=MOVABLE * (i % 2)) for i in range(8)))
    batch = abi.Batch(items=ctypes.addressof(items), count=8, item_size=ctypes.sizeof(abi.RTAlloc))
    before = rt.counts()

    def check(result: int) -> None:
        if result == 0:
            assert rt.info().blocks == 8
            assert rt.free_batch([i.handle for i in items])[0] == 0
            before["allocs"] = rt.info().allocs
        same(rt, before)

    assert sweep(lambda: rt.ioctl(abi.IOC_RT_ALLOC_BATCH, batch), check) == {errno.EFAULT}
    blocks = (abi.RTBlock * 8)()
    frees = abi.Batch(items=ctypes.addressof(blocks), count=8, item_size=ctypes.sizeof(abi.RTBlock))

    def again(result: int) -> None:
        assert rt.info().blocks == (0 if result == 0 else 8)
        if result == 0:
            assert rt.ioctl(abi.IOC_RT_ALLOC_BATCH, batch) == 0
            for i in range(8):
                blocks[i].handle = items[i].handle

    again(0)
    assert sweep(lambda: rt.ioctl(abi.IOC_RT_FREE_BATCH, frees), again) == {errno.EFAULT}


def test_rt_compaction_needs_no_memory(raw: Raw) -> None:
    """Nor does waiting: with a deadline a block is had that was refused without."""
    with raw.rt(CHUNK, movable=256) as rt:
        blocks = rt.fill(CHUNK // 128, MOVABLE)
        for i, block in enumerate(blocks):
            assert (rt.unpin if i % 2 else rt.free)(block.handle) == 0
        item = abi.RTAlloc(size=CHUNK // 3, deadline_ns=300 * SECOND)
        assert rt.alloc_errno(item.size) == errno.ENOSPC
        got: list[int] = []

        def check(result: int) -> None:
            assert rt.info().blocks == len(blocks) // 2 + (result == 0)
            if result == 0:
                assert rt.free(item.handle) == 0
                got.append(item.handle)

        assert sweep(lambda: rt.ioctl(abi.IOC_RT_ALLOC, item), check) == {errno.EFAULT}
        assert got
        assert rt.info().moves


def test_rt_ready(settings: None) -> None:
    """Set aside, all of it or as much as before."""
    empty_pool()
    path = os.open(SYSFS / "rt/ready", os.O_WRONLY)

    def call() -> int:
        try:
            os.pwrite(path, b"%d" % (3 * CHUNK), 0)
        except OSError as error:
            return error.errno or -1
        return 0

    def check(result: int) -> None:
        expected = 3 * CHUNK if result == 0 else 0
        assert (read("rt/ready"), read("rt/held"), read("rt/used")) == (expected, expected, 0)
        assert write("rt/ready", 0) == 0
        empty_pool()

    assert errno.ENOMEM in sweep(call, check)
    os.close(path)


def test_relieve(raw: Raw, settings: None) -> None:
    """What cannot be told is not begun; what was begun gives what it can, and nothing that is in use."""
    empty_pool()
    with raw.kv([full(2, CHUNK // 256)], block_tokens=8) as kv:
        view, live = kv.view(), kv.open(tokens=8)
        values = tokens("live", 0, 8)
        view.write(live, values)

        def prepare() -> None:
            seq = kv.open(tokens=16 * 8)
            assert kv.publish(seq, chain(os.urandom(8), 16)) == 0
            assert kv.end(seq) == 0
            items = [raw.alloc(CHUNK, pool=abi.Pool.CHUNK, flags=flags) for flags in (0, NOZERO)]
            for item in items:
                assert raw.free(item.handle) == 0

        def check(result: int) -> None:
            if result == 0:
                assert request.given == sum(request.step)
                assert request.step[0] == 2 * CHUNK
                assert request.step[1] >= CHUNK
            view.check(live, values)
            request.given = 0
            raw.relieve(1 << 40)
            prepare()

        request = abi.Relieve(bytes=1 << 40)
        prepare()
        assert sweep(lambda: raw.ioctl(abi.IOC_RELIEVE, request), check) >= {errno.EFAULT}
        view.close()


# Bandwidth


def writer(name: str, value: object) -> tuple[Callable[[], int], int]:
    """A call that writes a file of sysfs, opened beforehand; and its descriptor."""
    fd = os.open(SYSFS / name, os.O_WRONLY)

    def call() -> int:
        try:
            os.pwrite(fd, f"{value}".encode(), 0)
        except OSError as error:
            return error.errno or -1
        return 0

    return call, fd


def test_budget_of_a_core(settings: None) -> None:
    """A counter, a thread and a probe, or nothing of them."""
    if write("bandwidth/event", "cycles"):
        pytest.skip("there is no PMU")
    call, fd = writer("core0/budget", 1_000_000_000)

    def check(result: int) -> None:
        assert read("core0/budget") == (1_000_000_000 if result == 0 else 0)
        threads = [p for p in Path("/proc").glob("[0-9]*/comm") if comm(p) == "tm-hold/0"]
        assert len(threads) == (result == 0)
        assert write("core0/budget", 0) == 0

    assert errno.ENOMEM in sweep(call, check)
    os.close(fd)


def comm(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""  # it has ended


def test_event(settings: None) -> None:
    """It is chosen, or what was chosen stays."""
    if write("bandwidth/event", "cycles"):
        pytest.skip("there is no PMU")
    call, fd = writer("bandwidth/event", "r0011")

    def check(result: int) -> None:
        assert (SYSFS / "bandwidth/event").read_text() == ("r0011\n" if result == 0 else "cycles\n")
        assert write("bandwidth/event", "cycles") == 0

    assert errno.ENOMEM in sweep(call, check)
    os.close(fd)


def test_budget_of_a_client(raw: Raw, settings: None) -> None:
    """Nothing of it needs memory, only copies may fail."""
    budget = abi.Budget(bytes=CHUNK)
    before = raw.bandwidth().budget

    def check(result: int) -> None:
        assert raw.bandwidth().budget == (CHUNK if result == 0 else before)
        assert raw.set_budget(before) == 0

    assert sweep(lambda: raw.ioctl(abi.IOC_SET_BUDGET, budget), check) == {errno.EFAULT}
    seen = abi.Bandwidth()
    assert sweep(lambda: raw.ioctl(abi.IOC_BANDWIDTH, seen), lambda _: None) == {errno.EFAULT}
