# SPDX-License-Identifier: MIT
"""KV caches as such: what can be created, what the structs say, where things lie."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import resource

import pytest

from device import CHUNK, KV, PAGE, Raw, full, pattern, read, round_up, state, tokens, window
from process import libc
from tensormem import abi

#: A token of which 8 fill a page.
TOKEN = PAGE // 8
MIXED = [full(4, TOKEN), window(20, 2, 2 * TOKEN), state(3, PAGE + 5), full(1, 3 * TOKEN)]
U32 = (1 << 32) - 1


def refused(raw: Raw, groups: list[abi.KVGroup], /, **fields: int) -> int:
    """Why it is; nothing may be left of it."""
    descriptors = os.listdir("/proc/self/fd")
    result, request = raw.try_kv(groups, **fields)
    assert result != 0
    assert request.fd == fields.get("fd", -1)
    assert os.listdir("/proc/self/fd") == descriptors
    assert read("kv/caches") == read("kv/held") == 0
    return result


def planes_of(kv: KV) -> list[int]:
    """Bytes of a plane of a block, by group."""
    return [kv.block_bytes(i) // g.planes for i, g in enumerate(kv.groups)]


@pytest.mark.parametrize(
    ("groups", "fields"),
    [
        ([full(2, TOKEN)], {}),
        ([full(44, TOKEN)], {"max_tokens": 4096, "max_sequences": 16}),
        ([full(2, TOKEN)], {"max_tokens": 1, "max_sequences": 1}),
        ([full(2, TOKEN)], {"max_tokens": 17, "block_tokens": 16}),
        ([full(1, 5 * PAGE)], {"max_tokens": 7, "block_tokens": 1}),
        (MIXED, {"max_tokens": 100, "block_tokens": 8}),
        (MIXED, {"max_tokens": 100, "block_tokens": 24}),
        ([full(1, TOKEN)] * 16, {"max_sequences": 3}),
        ([state(1, 1)], {"block_tokens": 8}),
    ],
)
def test_the_layout(raw: Raw, groups: list[abi.KVGroup], fields: dict[str, int]) -> None:
    """Planes lie end to end, a stride apart, and do not overlap; sequences have places of their own."""
    with raw.kv(groups, **fields) as kv:
        info = kv.info()
        asked = {"max_tokens": 1024, "max_sequences": 8, **fields}
        for name, value in asked.items():
            assert getattr(info, name) == value
        assert (info.nr_groups, info.sequences) == (len(groups), 0)
        blocks = -(-info.max_tokens // info.block_tokens)
        at = everything = 0
        for asked_for, got, plane in zip(groups, kv.groups, planes_of(kv), strict=True):
            for name in ("rule", "planes", "token_bytes", "window", "pad"):
                assert getattr(got, name) == getattr(asked_for, name)
            count = 1 if got.rule == abi.KVRule.STATE else blocks
            if got.rule != abi.KVRule.STATE:
                assert plane == info.block_tokens * got.token_bytes
            assert got.element == 1
            assert got.offset == at
            assert got.stride == count * plane
            at += got.planes * got.stride
            everything += got.planes * got.stride * info.max_sequences
        assert info.sequence_size == round_up(at, CHUNK)
        assert info.window_size == info.sequence_size * info.max_sequences
        ram = os.sysconf("SC_PHYS_PAGES") * PAGE
        assert info.limit == min(round_up(everything, CHUNK), ram // CHUNK * CHUNK)
        offsets = [kv.open().offset for _ in range(info.max_sequences)]
        assert sorted(offsets) == [i * info.sequence_size for i in range(info.max_sequences)]
        assert kv.try_open()[0] == errno.ENOBUFS
        assert kv.info().sequences == info.max_sequences


def test_tokens_are_one_array(raw: Raw) -> None:
    """From the first to the last, across blocks, in each plane of each group."""
    with raw.kv(MIXED, max_tokens=100, block_tokens=8) as kv:
        view = kv.view()
        seqs = [kv.open(tokens=40) for _ in range(3)]
        for group in (0, 1, 3):
            first = 16 if group == 1 else 0
            for seq in seqs:
                view.write(seq, tokens(seq.name, first, 40), group)
        for seq in seqs:
            for plane in range(3):
                view.memory[view.span(seq, 0, plane, 2)] = pattern(seq.name, plane, PAGE + 5)
        for group in (0, 1, 3):
            first, size = 16 if group == 1 else 0, kv.groups[group].token_bytes
            for seq in seqs:
                for plane in range(kv.groups[group].planes):
                    array = view.memory[view.span(seq, first, plane, group, 40 - first)]
                    assert array == b"".join(
                        pattern((seq.name, t), plane, size) for t in range(first, 40)
                    )
        for seq in seqs:
            for plane in range(3):
                data = view.memory[view.span(seq, 0, plane, 2)]
                assert data == pattern(seq.name, plane, PAGE + 5)
        view.close()


@pytest.mark.parametrize("token_bytes", [512, 1024, 640, 96, PAGE, 3 * PAGE, 1, PAGE - 1])
def test_the_block_chosen_fills_pages(raw: Raw, token_bytes: int) -> None:
    per_page = PAGE // (token_bytes & -token_bytes) or 1
    if per_page > 512:
        assert refused(raw, [full(2, token_bytes)]) == errno.EINVAL
        return
    with raw.kv([full(2, token_bytes)]) as kv:
        assert kv.block_tokens * token_bytes % PAGE == 0
        assert kv.block_tokens == round_up(8, per_page)


def test_elements(raw: Raw) -> None:
    for element in range(12):
        groups = [full(1, TOKEN), full(1, TOKEN, element=element)]
        if element in (0, 1, 2, 4, 8):
            with raw.kv(groups) as kv:
                assert [g.element for g in kv.groups] == [1, element or 1]
        else:
            assert refused(raw, groups) == errno.EINVAL
    for bit in range(4, 32):
        assert refused(raw, [full(1, TOKEN, element=1 << bit)]) == errno.EINVAL


BAD_GROUPS = [
    full(0, TOKEN),
    full(1, 0),
    full(U32, TOKEN),
    full(1, U32),
    full(U32, U32),
    full(1, TOKEN, window=1),
    full(1, TOKEN, pad=1),
    full(1, TOKEN, pad=1 << 31),
    window(0, 1, TOKEN),
    window(8, 0, TOKEN),
    window(8, 1, 0),
    state(0, PAGE),
    state(1, 0),
    state(1, PAGE, window=1),
    state(U32, U32),
    abi.KVGroup(rule=0, planes=1, token_bytes=TOKEN),
    abi.KVGroup(rule=4, planes=1, token_bytes=TOKEN),
    abi.KVGroup(rule=U32, planes=1, token_bytes=TOKEN),
]


@pytest.mark.parametrize("group", BAD_GROUPS, ids=lambda g: bytes(g)[:24].hex())
def test_impossible_groups(raw: Raw, group: abi.KVGroup) -> None:
    good = full(1, TOKEN)
    for groups in ([group], [good, group], [group, good]):
        assert refused(raw, groups) == errno.EINVAL


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 0},
        {"max_sequences": 0},
        {"max_sequences": 65536},
        {"max_sequences": U32},
        {"max_tokens": U32, "max_sequences": 65535},
        {"block_tokens": 7},
        {"block_tokens": 9},
        {"block_tokens": U32},
        {"block_tokens": 1 << 31},
        {"flags": 2},
        {"flags": 1 << 31},
        {"pad": 1},
        {"nr_groups": 0},
        {"nr_groups": 17},
        {"nr_groups": U32},
        {"group_size": 0},
        {"group_size": 15},
        {"group_size": 2 * PAGE},
        {"group_size": U32},
    ],
    ids=str,
)
def test_impossible_caches(raw: Raw, fields: dict[str, int]) -> None:
    assert refused(raw, [full(2, TOKEN)] * 17, **{"nr_groups": 1, **fields}) == errno.EINVAL


def test_a_limit_takes_a_block_of_each_group(raw: Raw) -> None:
    pages = CHUNK // PAGE
    for limit in (1, PAGE, CHUNK):
        with raw.kv([full(pages, TOKEN)], limit=limit, block_tokens=8) as kv:
            assert kv.info().limit == CHUNK
            assert kv.extend(kv.open(), 8) == 0
            assert kv.extend(kv.open(), 1) == errno.ENOSPC
        groups = [full(pages - 1, TOKEN), window(8, 2, TOKEN)]
        assert refused(raw, groups, limit=limit, block_tokens=8) == errno.EINVAL
        with raw.kv(groups, limit=CHUNK + 1, block_tokens=8) as kv:
            assert kv.info().limit == 2 * CHUNK
    for limit in (1 << 63, (1 << 64) - 1):
        with raw.kv([full(1, TOKEN)], limit=limit) as kv:
            assert kv.info().limit <= os.sysconf("SC_PHYS_PAGES") * PAGE


def test_addresses_that_lead_nowhere(raw: Raw) -> None:
    groups = [full(2, TOKEN)]
    for address in (0, 8, 1 << 47, (1 << 64) - 64):
        assert refused(raw, groups, groups=address) == errno.EFAULT
    with raw.kv(groups) as kv:
        seq = kv.open(tokens=8)
        before = kv.counts()
        for address in (0, 1 << 47, (1 << 64) - 64):
            for request in (abi.IOC_KV_PUBLISH, abi.IOC_KV_LOOKUP):
                item = abi.KVHashes(sequence=seq.name, count=1, hashes=address)
                assert kv.ioctl(request, item) == errno.EFAULT
            batch = abi.Batch(items=address, count=1, item_size=ctypes.sizeof(abi.KVExtend))
            assert kv.ioctl(abi.IOC_KV_EXTEND_BATCH, batch) == errno.EFAULT
            assert batch.failed == 0
            if address:
                info = abi.KVInfo(groups=address, nr_groups=1, group_size=40)
                assert kv.ioctl(abi.IOC_KV_INFO, info) == errno.EFAULT
        assert kv.counts() == before
    memory = mmap.mmap(-1, PAGE)
    array = (abi.KVGroup * 1).from_buffer(memory, 512)
    array[0] = groups[0]
    memory[: ctypes.sizeof(abi.KVCreate)] = bytes(
        abi.KVCreate(groups=ctypes.addressof(array), nr_groups=1, group_size=40, max_tokens=8,
                     max_sequences=1)
    )  # fmt: skip
    address = ctypes.addressof(array) - 512
    assert libc.mprotect(address, PAGE, mmap.PROT_READ) == 0
    descriptors = os.listdir("/proc/self/fd")
    assert libc.ioctl(raw.fd, ctypes.c_ulong(abi.IOC_KV_CREATE), ctypes.c_void_p(address)) == -1
    assert ctypes.get_errno() == errno.EFAULT
    assert os.listdir("/proc/self/fd") == descriptors
    assert read("kv/caches") == 0


def test_results_that_cannot_be_written_are_undone(raw: Raw) -> None:
    """The struct is readable and not writable: EFAULT, and all is as before."""
    with raw.kv([full(2, TOKEN)]) as kv:
        seq = kv.open(tokens=12)
        memory = mmap.mmap(-1, PAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        name = (abi.KVHash * 1)()
        calls = [
            (abi.IOC_KV_OPEN, abi.KVOpen()),
            (abi.IOC_KV_EXTEND, abi.KVExtend(sequence=seq.name, tokens=30)),
            (abi.IOC_KV_FORK, abi.KVFork(sequence=seq.name, at=12)),
            (abi.IOC_KV_QUERY, abi.KVQuery(sequence=seq.name)),
            (abi.IOC_KV_INFO, abi.KVInfo()),
            (abi.IOC_KV_PUBLISH, abi.KVHashes(sequence=seq.name, count=1,
                                              hashes=ctypes.addressof(name))),
            (abi.IOC_KV_ADOPT, abi.KVAdopt(sequence=seq.name)),
        ]  # fmt: skip
        before = kv.counts()
        del before["copies"]
        for request, item in calls:
            assert libc.mprotect(address, PAGE, mmap.PROT_READ | mmap.PROT_WRITE) == 0
            memory[: len(bytes(item))] = bytes(item)
            assert libc.mprotect(address, PAGE, mmap.PROT_READ) == 0
            assert libc.ioctl(kv.fd, ctypes.c_ulong(request), ctypes.c_void_p(address)) == -1
            assert ctypes.get_errno() == errno.EFAULT
            after = kv.counts()
            assert {name: after[name] for name in before} == before, hex(request)
            assert kv.query(seq).length == 12
        # nothing was published
        assert kv.peek(kv.open(), [bytes(16)]) == (0, 0)


CALLS = [
    (0x40, abi.KVInfo, 0),
    (0x41, abi.KVOpen, 24),
    (0x42, abi.KVClose, 8),
    (0x43, abi.KVExtend, 16),
    (0x45, abi.KVTruncate, 12),
    (0x46, abi.KVFork, 24),
    (0x48, abi.KVHashes, 28),
    (0x4A, abi.KVQuery, 8),
    (0x4B, abi.KVPack, 12),
    (0x4C, abi.KVReset, 4),
]
NAME = (abi.KVHash * 1)()


def good(kv: KV, struct: type[abi.Struct]) -> abi.Struct:
    """A call that succeeds."""
    if struct in (abi.KVInfo, abi.KVOpen, abi.KVReset):
        return struct()
    seq = kv.open().name
    if struct is abi.KVExtend:
        return abi.KVExtend(sequence=seq, tokens=1)
    if struct is abi.KVHashes:
        return abi.KVHashes(sequence=seq, count=1, hashes=ctypes.addressof(NAME))
    return struct(sequence=seq)


@pytest.mark.parametrize(("number", "struct", "least"), CALLS)
def test_callers_of_another_age(
    raw: Raw, number: int, struct: type[abi.Struct], least: int
) -> None:
    """Shorter structs down to what every version has had, longer ones while the tail is zero."""
    size = ctypes.sizeof(struct)
    with raw.kv([full(2, TOKEN)], max_sequences=64) as kv:
        for short in range(0, size, 4):
            value = bytes(good(kv, struct))
            buffer = bytearray(value[:short] + b"\xa5" * (size - short))
            result = kv.ioctl(abi.iowr(number, short), buffer)
            assert result == (0 if short >= least else errno.EINVAL), short
            assert buffer[short:] == b"\xa5" * (size - short)
            if struct is abi.KVExtend and result == 0:  # or a reset is EBUSY
                assert kv.truncate(kv_seq(buffer), 0) == 0
        for extra in (1, 8, 64, min(PAGE, (1 << 14) - 1) - size):
            value = bytes(good(kv, struct))
            for at in {0, extra - 1}:
                tail = bytearray(extra)
                tail[at] = 1
                before = kv.counts()
                result = kv.ioctl(abi.iowr(number, size + extra), bytearray(value) + tail)
                assert result == errno.EINVAL
                assert kv.counts() == before
            buffer = bytearray(value) + bytearray(extra)
            assert kv.ioctl(abi.iowr(number, size + extra), buffer) == 0
            assert buffer[size:] == bytes(extra)


def kv_seq(buffer: bytearray) -> abi.KVOpen:
    item = abi.KVOpen()
    item.name = int.from_bytes(buffer[:4], "little")
    return item


def test_creators_of_another_age(raw: Raw) -> None:
    size = ctypes.sizeof(abi.KVCreate)
    group = full(2, TOKEN)
    fields = {"nr_groups": 1, "max_tokens": 64, "max_sequences": 1}
    for short in range(0, size + 64, 4):
        memory = (ctypes.c_ubyte * 64).from_buffer_copy(bytes(group) + bytes(24))
        value = abi.KVCreate(
            groups=ctypes.addressof(memory), group_size=ctypes.sizeof(group), fd=-1, **fields
        )
        buffer = bytearray((bytes(value) + bytes(64))[:short])
        result = raw.ioctl(abi.iowr(0x30, short), buffer)
        assert result == (0 if short >= 44 else errno.EINVAL), short
        if result == 0:
            os.close(int.from_bytes(buffer[40:44], "little"))
        else:
            assert buffer == (bytes(value) + bytes(64))[:short]
    for length in range(12, 64, 4):
        memory = (ctypes.c_ubyte * 128)()
        for i in (0, 1):
            ctypes.memmove(ctypes.byref(memory, i * length), bytes(group), min(length, 24))
        value = abi.KVCreate(groups=ctypes.addressof(memory), group_size=length, **fields)
        value.nr_groups = 2
        assert raw.ioctl(abi.IOC_KV_CREATE, value) == (0 if length >= 16 else errno.EINVAL)
        if length >= 16:
            os.close(value.fd)
        if length > 40:
            memory[2 * length - 1] = 1  # a tail that asks for something
            assert raw.ioctl(abi.IOC_KV_CREATE, value) == errno.EINVAL


def test_info_fills_groups_of_any_age(raw: Raw) -> None:
    with raw.kv(MIXED, block_tokens=8) as kv:
        expected = [bytes(g) for g in kv.groups]
        for size in (0, 8, 15, 16, 20, 32, 40, 48, 100, PAGE):
            memory = (ctypes.c_ubyte * (4 * size + 64))(*([0xA5] * (4 * size + 64)))
            for room in (0, 3, 4, 5, U32):
                info = abi.KVInfo(groups=ctypes.addressof(memory), nr_groups=room, group_size=size)
                result = kv.ioctl(abi.IOC_KV_INFO, info)
                assert result == (0 if size >= 16 and room >= 4 else errno.EINVAL)
                if result:
                    assert info.nr_groups == room
                    continue
                assert info.nr_groups == 4
                for i in range(4):
                    got = bytes(memory[i * size : (i + 1) * size])
                    assert got[:40] == expected[i][:size]
                    assert not got[40:].strip(b"\xa5")
                assert bytes(memory[4 * size :]) == b"\xa5" * 64


def test_unknown_flags_and_numbers(raw: Raw) -> None:
    with raw.kv([full(2, TOKEN)], flags=abi.KV_EVENTS) as kv:
        seq = kv.open(tokens=8)
        before = kv.counts()
        for bit in range(32):
            flag = 1 << bit
            name = seq.name
            for request, item in (
                (abi.IOC_KV_OPEN, abi.KVOpen(flags=flag)),
                (abi.IOC_KV_CLOSE, abi.KVClose(sequence=name, flags=flag)),
                (abi.IOC_KV_EXTEND, abi.KVExtend(sequence=name, tokens=1, flags=flag)),
                (abi.IOC_KV_TRUNCATE, abi.KVTruncate(sequence=name, length=1, flags=flag)),
                (abi.IOC_KV_TRUNCATE, abi.KVTruncate(sequence=name, length=1, pad=flag)),
                (abi.IOC_KV_FORK, abi.KVFork(sequence=name, at=1, flags=flag)),
                (abi.IOC_KV_ADOPT, abi.KVAdopt(sequence=name, flags=flag)),
                (abi.IOC_KV_ADOPT, abi.KVAdopt(sequence=name, pad=flag)),
                (abi.IOC_KV_QUERY, abi.KVQuery(sequence=name, flags=flag)),
                (abi.IOC_KV_QUERY, abi.KVQuery(sequence=name, pad=flag)),
                (abi.IOC_KV_PACK, abi.KVPack(sequence=name, flags=flag << 1 & U32 or 2)),
                (abi.IOC_KV_PACK, abi.KVPack(sequence=name, pad=flag)),
                (abi.IOC_KV_RESET, abi.KVReset(flags=flag)),
                (abi.IOC_KV_RESET, abi.KVReset(pad=flag)),
                (abi.IOC_KV_EXTEND_BATCH, abi.Batch(count=1, item_size=16, flags=flag)),
            ):
                assert kv.ioctl(request, item) == errno.EINVAL, (hex(request), bit)
            for fields in ({"flags": flag}, {"pad": flag}):
                assert kv.hashes(abi.IOC_KV_PUBLISH, seq, [bytes(16)], **fields)[0] == errno.EINVAL
                if fields != {"flags": abi.KV_PEEK}:
                    result, _ = kv.hashes(abi.IOC_KV_LOOKUP, seq, [bytes(16)], **fields)
                    assert result == errno.EINVAL
        assert kv.hashes(abi.IOC_KV_LOOKUP, seq, [bytes(16)], first=1)[0] == errno.EINVAL
        assert kv.counts() == before
        for number in (0x00, 0x30, 0x3F, 0x4D, 0xFF):
            assert kv.ioctl(abi.iowr(number, 8), bytearray(8)) == errno.ENOTTY
        for direction in (0, 1, 2):
            request = abi.IOC_KV_INFO & ~(3 << 30) | direction << 30
            assert kv.ioctl(request, bytearray(256)) == errno.ENOTTY
        for number in range(0x40, 0x4D):
            assert raw.ioctl(abi.iowr(number, 8), bytearray(8)) == errno.ENOTTY


def test_counts_of_hashes_and_batches(raw: Raw) -> None:
    most = raw.info().max_batch
    with raw.kv([full(2, TOKEN)]) as kv:
        seq, other = kv.open(tokens=8), kv.open()
        for count in (0, most + 1, U32):
            for request in (abi.IOC_KV_PUBLISH, abi.IOC_KV_LOOKUP):
                result, _ = kv.hashes(request, seq, [bytes(16)], count=count)
                assert result == errno.EINVAL
        names = [i.to_bytes(16, "little") for i in range(most)]
        assert kv.lookup(other, names) == (0, 0)
        assert kv.info().lookups == most
        for fields in ({"count": 0}, {"count": most + 1}, {"item_size": 0}, {"item_size": 15},
                       {"item_size": U32}):  # fmt: skip
            items = (abi.KVExtend * 1)(abi.KVExtend(sequence=seq.name, tokens=1))
            assert kv.batch(abi.IOC_KV_EXTEND_BATCH, items, **fields)[0] == errno.EINVAL
        assert kv.query(seq).length == 8


def test_the_descriptor(raw: Raw) -> None:
    kv = raw.kv([full(2, TOKEN)], max_tokens=64)
    assert fcntl.fcntl(kv.fd, fcntl.F_GETFD) == fcntl.FD_CLOEXEC
    assert os.readlink(f"/proc/self/fd/{kv.fd}") == "anon_inode:[tensormem-kv]"
    assert read("kv/caches") == 1
    seq = kv.open(tokens=9)
    kv.publish(seq, [bytes(16)])
    with open(f"/proc/self/fdinfo/{kv.fd}") as file:
        lines = dict(line.split(":\t", 1) for line in file.read().splitlines() if ":\t" in line)
    info = kv.info()
    names = [n for n, _ in abi.KVInfo._fields_ if n not in ("groups", "nr_groups", "group_size",
                                                            "window_size", "sequence_size")]  # fmt: skip
    for name in names:
        assert int(lines[name]) == getattr(info, name), name
    assert int(lines["tensormem-kv"]) > 0
    assert int(lines["used"]) == 2 * kv.block_bytes()
    kv.close()
    assert read("kv/caches") == read("kv/held") == 0


def test_no_descriptor_left(raw: Raw) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = os.open("/dev/null", os.O_RDONLY)
    os.close(spare)
    resource.setrlimit(resource.RLIMIT_NOFILE, (spare, hard))
    try:
        assert raw.try_kv([full(2, TOKEN)])[0] == errno.EMFILE
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert read("kv/caches") == 0
