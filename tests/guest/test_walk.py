# SPDX-License-Identifier: MIT
"""Walks of page tables: each frame is that of /proc/PID/pagemap, each size the one the kernel maps with."""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import random
import signal
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_huge import BLOCKS, FOLDS
from test_map import tensormem as command

import tensormem
from device import CHUNK, KASAN, PAGE, Raw, address_of, full, wait_for
from process import libc, status_of
from tensormem import abi, layout

#: Of user space: what the architecture and the page sizes allow.
VA_BITS = (36, 39, 42, 47, 48, 52)
WALK = Path(layout.DEFAULT_ROOT) / "walk"
SHIFT = PAGE.bit_length() - 1
PAGES = CHUNK // PAGE
#: Pages that the contiguous bit makes one: 64 KiB of them with 4K pages, 2 MiB with 16K.
FOLDED = {12: 16, 14: 128, 16: 32}[SHIFT]
HUGE, PAGED = abi.AllocFlag.HUGE, abi.AllocFlag.PAGED
#: Addresses that the kernel has for itself, and none of anybody.
KERNEL = (1 << 64) - (1 << 40)
MADV_DONTNEED = 4


def touch(mapping: mmap.mmap, begin: int = 0, end: int | None = None) -> None:
    for at in range(begin, len(mapping) if end is None else end, PAGE):
        mapping[at] = 1


def check(address: int, length: int) -> list[layout.Entry]:
    """The entries of a range of ours, all of which hold with what else is known."""
    entries = layout.walk(address, length)
    assert reached(entries, address, length) == layout.frames(address, length // PAGE)
    return entries


def reached(entries: list[layout.Entry], address: int, length: int) -> list[int | None]:
    """The frame of each page of a range, by entries that make up a tree."""
    found: list[int | None] = [None] * (length // PAGE)
    path: dict[int, layout.Entry] = {}
    for entry in entries:
        level = entry.level(SHIFT)
        assert entry.address % entry.size == 0
        assert entry.index == entry.address >> entry.shift & (1 << entry.bits) - 1
        assert entry.name == ("pgd" if not path else {0: "p4d", 1: "pud", 2: "pmd", 3: "pte"}[level])
        top = entry.high_bit + 1
        if path and level != min(path):
            above = path[level - 1]
            assert above.what == "table"
            assert above.shift == top
            assert above.address <= entry.address < above.address + above.size
        else:
            assert top in VA_BITS
        path = {k: v for k, v in path.items() if k < level} | {level: entry}
        if level == min(path):
            path = {level: entry}
        if entry.frame is None:
            continue
        # where the descriptor says itself, in its bits 47 and below
        assert entry.descriptor >> SHIFT & (1 << 48 - SHIFT) - 1 == entry.frame
        assert entry.descriptor & 1
        assert entry.descriptor >> 1 & 1 == (entry.what == "table" or level == 3)
        if entry.what == "leaf":
            assert entry.node == 0
            for page in range(entry.size // PAGE):
                at = (entry.address - address) // PAGE + page
                if 0 <= at < len(found):
                    found[at] = entry.frame + page
    return found


def refused(call: Callable[..., object], *arguments: object) -> int:
    """The errno of a call; 0 if it succeeds."""
    try:
        call(*arguments)
    except OSError as error:
        return error.errno or -1
    except tensormem.TensormemError as error:
        return error.errno or -1
    return 0


def leaves(entries: list[layout.Entry]) -> list[layout.Entry]:
    return [entry for entry in entries if entry.what == "leaf"]


# Frames, sizes, flags


SIZES = (1, PAGE // 2, PAGE, 5 * PAGE + 1, CHUNK - PAGE, CHUNK, 3 * CHUNK + 7 * PAGE)


@pytest.mark.parametrize("kind", abi.Kind)
def test_every_page_is_where_pagemap_has_it(raw: Raw, kind: abi.Kind) -> None:
    for size in SIZES:
        item = raw.alloc(size, kind)
        small = raw.query(item.handle)[1].pool == abi.Pool.SLAB
        mapping = raw.map(PAGE, item.offset // PAGE * PAGE) if small else raw.map_tensor(item)
        address, length = address_of(mapping), len(mapping)
        assert not leaves(check(address, length)), size
        mapping[0] = 1
        assert leaves(check(address, length)), size
        touch(mapping)
        found = leaves(check(address, length))
        assert sum(entry.size for entry in found) == length
        for entry in found:
            bits = layout.decode(entry.descriptor)
            assert (bits.valid, bits.user, bits.accessed, bits.writable, bits.dirty) == (True,) * 5
            assert (bits.not_global, bits.user_no_execute, bits.kernel_no_execute) == (True,) * 3
            assert (bits.memory, bits.shareable) == ("normal", "inner shareable")


@pytest.mark.parametrize("flags", [HUGE, PAGED])
def test_mapping_sizes(raw: Raw, flags: int) -> None:
    """Blocks where asked for and possible, folded pages where the kernel folds, pages for the tail."""
    chunks, tail = 3, 5
    item = raw.alloc(chunks * CHUNK + tail * PAGE, flags=flags)
    mapping = raw.map_tensor(item)
    touch(mapping)
    address = address_of(mapping)
    found = layout.lay_out(layout.walk(address, len(mapping)), address, len(mapping), PAGE)
    blocks, folds = bool(BLOCKS and flags & HUGE), FOLDS
    reach = CHUNK if blocks else FOLDED * PAGE if folds else PAGE
    expected = {reach: chunks * CHUNK}
    expected[PAGE] = expected.get(PAGE, 0) + tail * PAGE
    assert found.by_reach() == expected
    assert found.tlb_entries == chunks * CHUNK // reach + tail
    assert found.mapped == len(mapping)
    query = raw.query(item.handle)[1]
    assert query.mapping == (abi.Mapping.BLOCK if blocks else abi.Mapping.CONT if folds else abi.Mapping.PAGES)


def test_what_mprotect_does_is_seen(raw: Raw) -> None:
    mapping = raw.map_tensor(raw.alloc(8 * PAGE, pool=abi.Pool.BUDDY))
    touch(mapping)
    address = address_of(mapping)
    for page, protection in ((1, mmap.PROT_READ), (3, 0)):
        assert libc.mprotect(ctypes.c_void_p(address + page * PAGE), ctypes.c_size_t(PAGE), protection) == 0
    bits = [layout.decode(entry.descriptor) for entry in leaves(layout.walk(address, 8 * PAGE))]
    assert [b.valid for b in bits] == [page != 3 for page in range(8)]
    assert [b.writable and b.valid for b in bits] == [page not in (1, 3) for page in range(8)]
    assert libc.madvise(ctypes.c_void_p(address + 5 * PAGE), ctypes.c_size_t(PAGE), MADV_DONTNEED) == 0
    entries = [entry for entry in layout.walk(address, 8 * PAGE) if entry.name == "pte"]
    assert [entry.what for entry in entries] == ["leaf"] * 5 + ["none"] + ["leaf"] * 2
    found = layout.lay_out(layout.walk(address, 8 * PAGE), address, 8 * PAGE, PAGE)
    assert (found.mapped, found.tlb_entries) == (7 * PAGE, 6)


def test_kv_and_rt_memory(raw: Raw) -> None:
    with raw.kv([full(2, PAGE)]) as cache, raw.rt(CHUNK) as arena:
        seq = cache.open(tokens=cache.block_tokens)
        view = cache.view()
        length = cache.block_tokens * PAGE
        touch(view.memory, view.place(seq), view.place(seq) + length)
        # pagemap says nothing of areas without struct pages; the map of chunks does
        address = address_of(view.memory) + view.place(seq)
        found = reached(layout.walk(address, length), address, length)
        cached = [c.frame for c in layout.chunks() if c.purpose == "cache"]
        assert all(any(first <= frame < first + PAGES for first in cached) for frame in found if frame)
        assert None not in found
        assert len(set(found)) == len(found)
        arena.alloc(PAGE)
        memory = arena.view()
        assert leaves(check(address_of(memory), PAGE))
        view.close()
        memory.close()


def test_memory_that_is_not_ours() -> None:
    with mmap.mmap(-1, 64 * PAGE) as mapping:
        touch(mapping, 0, 9 * PAGE)
        found = leaves(check(address_of(mapping), 64 * PAGE))
        assert len(found) >= 9
    code = ctypes.cast(libc.getpid, ctypes.c_void_p).value
    os.getpid()
    (entry,) = leaves(layout.walk(code))
    bits = layout.decode(entry.descriptor)
    assert not bits.user_no_execute
    assert bits.read_only


def test_holes_between_areas_are_passed(raw: Raw) -> None:
    """Areas with gaps between: each page once, nothing of what is between, tables once each."""
    item = raw.alloc(9 * PAGE, pool=abi.Pool.BUDDY)
    with mmap.mmap(-1, 4 * CHUNK) as room:
        base = address_of(room)
    for number in (0, 7, PAGES + 3):
        where = libc.mmap(ctypes.c_void_p(base + number * PAGE), ctypes.c_size_t(PAGE), 3,
                          mmap.MAP_SHARED | 0x10, raw.fd, ctypes.c_long(item.offset))  # fmt: skip
        assert where == base + number * PAGE
        ctypes.memset(where, 1, PAGE)
    entries = layout.walk(base, 4 * CHUNK)
    assert [(e.address - base) // PAGE for e in leaves(entries)][:3] == [0, 7, PAGES + 3]
    tables = [(entry.name, entry.address) for entry in entries if entry.what == "table"]
    assert len(set(tables)) == len(tables)
    for number in (0, 7, PAGES + 3):
        assert libc.munmap(ctypes.c_void_p(base + number * PAGE), ctypes.c_size_t(PAGE)) == 0


@pytest.mark.skipif(KASAN, reason="makes no call that the others do not")
def test_library_knows_the_layout() -> None:
    with tensormem.open() as client, client.alloc(2 * CHUNK + PAGE, kind="weights") as tensor:
        assert tensor.layout().mapped == 0
        array = tensor.array((2 * CHUNK + PAGE,), "u1")
        array[:] = 1
        found = tensor.layout()
        assert (found.address, found.size, found.mapped) == (array.ctypes.data, array.size, array.size)
        expected = layout.frames(array.ctypes.data, array.size // PAGE)
        assert [s.frame + i for s in found.stretches for i in range(s.length // PAGE)] == expected
        assert {s.node for s in found.stretches} == {0}
        flags = layout.page_flags(found.stretches[0].frame)
        assert {"compound_head", "lru", "anon"} & set(flags) == {"compound_head"}
        del array
    with pytest.raises(tensormem.NoSuchTensor):
        tensor.layout()


# The file


def test_each_write_is_a_new_walk(raw: Raw) -> None:
    mapping = raw.map_tensor(raw.alloc(64 * PAGE, pool=abi.Pool.BUDDY))
    touch(mapping)
    address = address_of(mapping)
    whole = "".join(f"{e.address:x} {e.name}\n" for e in layout.walk(address, 64 * PAGE))
    fd = os.open(WALK, os.O_RDWR)
    try:
        assert refused(os.read, fd, 100) == errno.ENODATA
        for size in (7, 100, 4096, 1 << 16):
            assert os.write(fd, f"{os.getpid()} {address} {64 * PAGE}\n".encode()) > 0
            text = b""
            while part := os.read(fd, size):
                text += part
            entries = layout.parse_walk(text.decode())
            assert "".join(f"{e.address:x} {e.name}\n" for e in entries) == whole
        # one that is refused changes nothing
        assert refused(os.write, fd, b"0 0") == errno.EFAULT
        os.lseek(fd, 0, os.SEEK_SET)
        assert os.read(fd, 1 << 16)
    finally:
        os.close(fd)


BAD = [
    ("", errno.EINVAL), ("\n", errno.EINVAL), ("0", errno.EINVAL), ("x 0x10000", errno.EINVAL),
    ("-1 0x10000", errno.EINVAL), ("4294967296 0x10000", errno.EINVAL), ("0x1 0x10000", errno.EINVAL),
    ("0 x", errno.EINVAL), ("0 -1", errno.EINVAL), ("0 0x10000000000000000", errno.EINVAL),
    ("0 0x10000 x", errno.EINVAL), ("0 0x10000 0", errno.EINVAL), ("0 0x10000 -1", errno.EINVAL),
    ("0 0x10000 1 1", errno.EINVAL), ("0  0x10000", errno.EINVAL), ("0 1 1" + " " * 64, errno.EINVAL),
    ("0 0", errno.EFAULT), ("0 0x10", errno.EFAULT),
    (f"0 {KERNEL:#x}", errno.ERANGE), ("0 0xffffffffffffffff", errno.ERANGE),
    (f"0 0x10 {(1 << 64) - 1}", errno.ERANGE), (f"0 0x10 {1 << 60}", errno.ERANGE),
    ("2 0x10000", errno.ESRCH), ("2147483647 0x10000", errno.ESRCH),
]  # fmt: skip


def test_malformed_writes() -> None:
    fd = os.open(WALK, os.O_RDWR)
    try:
        for text, expected in BAD:
            assert refused(os.write, fd, text.encode()) == expected, text
            assert refused(os.read, fd, 1) == errno.ENODATA, text
    finally:
        os.close(fd)


def test_random_writes_never_do_harm() -> None:
    rng = random.Random(12)
    known = (0, errno.EINVAL, errno.EFAULT, errno.ERANGE, errno.ESRCH)
    words = ["0", "1", "2", str(os.getpid()), "-1", "x", "0x", "", " ", "0xffffffffffffffff", "4096",
             "0xaaaa00000000", str(1 << 63), f"{KERNEL:#x}", "\0", "\n", "9" * 30, str(id(rng) & -4096)]  # fmt: skip
    fd = os.open(WALK, os.O_RDWR)
    for _ in range(300 if KASAN else 1500):
        text = " ".join(rng.choices(words, k=rng.randrange(5))).encode()
        result = refused(os.write, fd, text)
        assert result in known, text
        if not result:
            layout.parse_walk(os.read(fd, 4096).decode().rpartition("\n")[0])
    os.close(fd)


def test_a_process_that_ends_meanwhile() -> None:
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        with mmap.mmap(-1, PAGE) as mapping:
            mapping[0] = 1
            os.write(writer, struct.pack("Q", address_of(mapping)))
            signal.pause()
    os.close(writer)
    (address,) = struct.unpack("Q", os.read(reader, 8))
    assert leaves(layout.walk(address, 1, pid))
    fd = os.open(WALK, os.O_RDWR)
    os.write(fd, f"{pid} {address}".encode())
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert refused(layout.walk, address, 1, pid) == errno.ESRCH  # a zombie
    os.waitpid(pid, 0)
    assert refused(os.read, fd, 100) == errno.ESRCH
    for each in (fd, reader):
        os.close(each)


def test_without_the_capabilities(raw: Raw) -> None:
    """Root without them: no frames without CAP_SYS_ADMIN, no other process without CAP_SYS_PTRACE."""
    CAP_SYS_PTRACE, CAP_SYS_ADMIN = 19, 21

    def without(capability: int) -> None:
        header = struct.pack("Ii", 0x20080522, 0)
        data = ctypes.create_string_buffer(24)
        assert libc.syscall(90, header, data) == 0  # capget
        low, *rest = struct.unpack("6I", data.raw)
        low &= ~(1 << capability)
        assert libc.syscall(91, header, struct.pack("6I", low, *rest)) == 0  # capset

    def no_admin() -> None:
        without(CAP_SYS_ADMIN)
        with pytest.raises(PermissionError):
            os.open(WALK, os.O_RDWR)

    def no_ptrace() -> None:
        without(CAP_SYS_PTRACE)
        mapping = raw.map_tensor(item)
        mapping[0] = 1
        assert leaves(layout.walk(address_of(mapping)))
        with pytest.raises(tensormem.NotPermitted):
            layout.walk(address_of(mapping), 1, os.getppid())

    item = raw.alloc(PAGE, pool=abi.Pool.BUDDY)
    assert status_of(no_admin) == 0
    assert status_of(no_ptrace) == 0


def remap(seed: int) -> None:
    """Map, touch, discard and unmap, of every size, at the same addresses."""
    rng = random.Random(seed)
    with Raw() as client:
        while True:
            flags = rng.choice((HUGE, PAGED, 0))
            item = client.alloc(rng.choice((PAGE, CHUNK, 2 * CHUNK)), flags=flags)
            mapping = client.map_tensor(item)
            for _ in range(4):
                mapping[rng.randrange(len(mapping))] = 1
                if rng.random() < 0.5:
                    mapping.madvise(MADV_DONTNEED)
            mapping.close()
            assert client.free(item.handle) == 0


def watch(pid: int, rng: random.Random, passed: mmap.mmap, which: int) -> None:
    """Walk a process until it is gone; that and what is unmapped are the only errors."""
    known = (0, errno.EFAULT, errno.ESRCH)
    try:
        while True:
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
            if not lines:
                return
            for line in lines:
                if "/dev/tensormem" not in line and rng.random() < 0.9:
                    continue
                first, end = (int(word, 16) for word in line.split()[0].split("-"))
                result = refused(layout.walk, first, min(end - first, 4 * CHUNK), pid)
                assert result in known
                if result == 0 and "/dev/tensormem" in line:
                    passed[which] = 1
    except (FileNotFoundError, ProcessLookupError):
        return


def test_tables_that_come_and_go() -> None:
    """Two walk all of a process that maps and unmaps, until it is killed at some moment."""
    rng = random.Random(31)
    for turn in range(2 if KASAN else 5):
        worker = os.fork()
        if not worker:
            try:
                remap(turn)
            finally:
                os._exit(98)
        watchers = []
        passed = mmap.mmap(-1, PAGE)
        for which in range(2):
            pid = os.fork()
            if not pid:
                code = 97
                try:
                    watch(worker, rng, passed, which)
                    code = 0
                finally:
                    os._exit(code)
            watchers.append(pid)
        wait_for(lambda passed=passed: passed[:2] == b"\1\1")
        time.sleep(rng.uniform(0, 0.5))
        os.kill(worker, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(worker, 0)[1]) == signal.SIGKILL
        for pid in watchers:
            assert os.waitpid(pid, 0)[1] == 0


# The command


def test_command_draws_each_level(raw: Raw) -> None:
    item = raw.alloc(4 * PAGE, pool=abi.Pool.BUDDY)
    mapping = raw.map_tensor(item)
    touch(mapping)
    address = address_of(mapping) + PAGE + 0x123
    document = json.loads(command("walk", "--json", f"{address:#x}", "--pid", str(os.getpid())))
    entries = layout.walk(address)
    assert [e["descriptor"] for e in document["entries"]] == [e.descriptor for e in entries]
    assert [e["level"] for e in document["entries"]] == list(range(4 - len(entries), 4))
    assert document["pagemap_frame"] == document["entries"][-1]["frame"]
    text = command("walk", str(address), "--pid", str(os.getpid()))
    for entry in entries:
        assert f"L{entry.level(SHIFT)} {entry.name}[{entry.index}] = {entry.descriptor:#018x}" in text
    assert f"physical address {entries[-1].frame * PAGE + 0x123:#x}" in text
    assert f"reads {len(entries)} descriptors" in text
    of_tensor = json.loads(command("walk", "--json", f"{os.getpid()}:{item.handle}"))
    assert [e["address"] for e in of_tensor["entries"]] == [e.address for e in layout.walk(address_of(mapping))]
    assert of_tensor["address"] == address_of(mapping)


def test_command_says_what_is_wrong(raw: Raw) -> None:
    me = ("--pid", str(os.getpid()))
    assert "nothing is mapped at 0x10 " in command("walk", "0x10", *me, code=1)
    assert "not an address of user space" in command("walk", f"{KERNEL:#x}", *me, code=1)
    assert "64 bits" in command("walk", str(1 << 64), *me, code=1)
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert f"no process {gone.pid}" in command("walk", "0x10000", "--pid", str(gone.pid), code=1)
    assert "no process 2," in command("walk", "0x10000", "--pid", "2", code=1)  # kthreadd
    assert "debugfs" in command("walk", "0x10000", *me, code=1, TENSORMEM_DEBUGFS="/nowhere")

    def as_nobody() -> None:
        os.setuid(65534)
        assert "run it as root" in command("walk", "0x10000", *me, code=1)

    assert status_of(as_nobody) == 0
