# SPDX-License-Identifier: MIT
"""The device without the library in between: what the ABI tests speak through.

Every call returns 0 or the errno, so that a test can say exactly which one it
expects. Nothing here keeps anything alive or cleans up behind the test.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import mmap
import os
import random
import re
import select
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Self

from process import FAILED, libc
from tensormem import abi

DEVICE = "/dev/tensormem"
SYSFS = Path("/sys/class/misc/tensormem")
TRACING = Path("/sys/kernel/tracing")
PAGE = mmap.PAGESIZE
CHUNK = 2 << 20
#: Seconds to wait for what comes about by itself: an emulated board beside others is slow.
PATIENCE = 300
#: Whether every access is checked (KASAN), which makes all of it some ten times slower.
KASAN = any(line.split()[2] == "kasan_report" for line in Path("/proc/kallsyms").open())

KINDS = tuple(abi.Kind)


class Descriptor:
    """What ioctls and mappings go through."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def ioctl(self, request: int, argument: object) -> int:
        try:
            fcntl.ioctl(self.fd, request, argument)  # type: ignore[arg-type]
        except OSError as error:
            return error.errno or -1
        return 0

    def batch(self, request: int, items: ctypes.Array, **fields: int) -> tuple[int, abi.Batch]:
        values = {
            "items": ctypes.addressof(items),
            "count": len(items),
            "item_size": ctypes.sizeof(items._type_),
            **fields,
        }
        batch = abi.Batch(**values)
        return self.ioctl(request, batch), batch

    def map(
        self,
        length: int,
        offset: int,
        prot: int = mmap.PROT_READ | mmap.PROT_WRITE,
        flags: int = mmap.MAP_SHARED,
    ) -> mmap.mmap:
        return mmap.mmap(self.fd, length, flags, prot, offset=offset)

    def map_errno(self, length: int, offset: int, **how: int) -> int:
        try:
            self.map(length, offset, **how).close()
        except OSError as error:
            return error.errno or -1
        return 0


class Raw(Descriptor):
    """One client."""

    def __init__(self) -> None:
        super().__init__(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))

    def info(self) -> abi.Info:
        info = abi.Info()
        assert self.ioctl(abi.IOC_INFO, info) == 0
        return info

    def try_alloc(
        self, size: int, kind: int = abi.Kind.ACTIVATIONS, pool: int = 0, **fields: int
    ) -> tuple[int, abi.Alloc]:
        item = abi.Alloc(size=size, kind=kind, pool=pool, **fields)
        return self.ioctl(abi.IOC_ALLOC, item), item

    def alloc(
        self, size: int, kind: int = abi.Kind.ACTIVATIONS, pool: int = 0, **fields: int
    ) -> abi.Alloc:
        result, item = self.try_alloc(size, kind, pool, **fields)
        assert result == 0, errno.errorcode.get(result, result)
        return item

    def free(self, handle: int, flags: int = 0) -> int:
        return self.ioctl(abi.IOC_FREE, abi.Free(handle=handle, flags=flags))

    def query(self, handle: int) -> tuple[int, abi.Query]:
        item = abi.Query(handle=handle)
        return self.ioctl(abi.IOC_QUERY, item), item

    def try_export(self, handle: int, flags: int = 0, **fields: int) -> tuple[int, abi.Export]:
        item = abi.Export(handle=handle, flags=flags, **{"fd": -1, **fields})
        return self.ioctl(abi.IOC_EXPORT, item), item

    def export(self, handle: int, flags: int = 0) -> DmaBuf:
        result, item = self.try_export(handle, flags)
        assert result == 0, errno.errorcode.get(result, result)
        return DmaBuf(item.fd, item.size)

    def alloc_batch(
        self, sizes: list[int], kind: int = abi.Kind.KV, **fields: int
    ) -> tuple[int, abi.Batch, list]:
        requests = (abi.Alloc(size=s, kind=kind, **fields) for s in sizes)
        items = (abi.Alloc * len(sizes))(*requests)
        result, batch = self.batch(abi.IOC_ALLOC_BATCH, items)
        return result, batch, list(items)

    def free_batch(self, handles: list[int]) -> tuple[int, abi.Batch]:
        items = (abi.Free * len(handles))(*(abi.Free(handle=h) for h in handles))
        return self.batch(abi.IOC_FREE_BATCH, items)

    def try_kv(
        self, groups: Sequence[abi.KVGroup], /, **fields: int
    ) -> tuple[int, abi.KVCreate]:
        array = (abi.KVGroup * len(groups))(*groups)
        values = {
            "groups": ctypes.addressof(array), "nr_groups": len(groups),
            "group_size": ctypes.sizeof(abi.KVGroup), "max_tokens": 1024, "max_sequences": 8,
            "fd": -1, **fields,
        }  # fmt: skip
        request = abi.KVCreate(**values)
        return self.ioctl(abi.IOC_KV_CREATE, request), request

    def kv(self, groups: Sequence[abi.KVGroup], /, **fields: int) -> KV:
        result, request = self.try_kv(groups, **fields)
        assert result == 0, errno.errorcode.get(result, result)
        return KV(request.fd)

    def try_slot(self, name: str | bytes, flags: int = 0, **fields: int) -> tuple[int, abi.ModelOpen]:
        request = abi.ModelOpen(flags=flags, fd=-1, **fields)
        data = name.encode() if isinstance(name, str) else name
        ctypes.memmove(ctypes.addressof(request), data, min(len(data), abi.MODEL_NAME))
        return self.ioctl(abi.IOC_MODEL_OPEN, request), request

    def slot(self, name: str, flags: int = abi.OpenFlag.WRITE, **fields: int) -> Slot:
        result, request = self.try_slot(name, flags, **fields)
        assert result == 0, errno.errorcode.get(result, result)
        return Slot(request.fd, name)

    def try_rt(self, size: int = CHUNK, arena: int = -1, **fields: int) -> tuple[int, abi.RTOpen]:
        request = abi.RTOpen(size=size, arena=arena, **{"fd": -1, **fields})
        return self.ioctl(abi.IOC_RT_OPEN, request), request

    def rt(self, size: int = CHUNK, **fields: int) -> RT:
        """A new arena."""
        result, request = self.try_rt(size, **fields)
        assert result == 0, errno.errorcode.get(result, result)
        return RT(request.fd)

    def join(self, other: RT, priority: int = 0) -> RT:
        """Another RT client of the same arena."""
        return self.rt(0, arena=other.fd, priority=priority)

    def try_relieve(self, size: int, steps: int = 0, **fields: int) -> tuple[int, abi.Relieve]:
        item = abi.Relieve(bytes=size, steps=steps, **fields)
        return self.ioctl(abi.IOC_RELIEVE, item), item

    def relieve(self, size: int, *steps: abi.Relief) -> list[int]:
        """Bytes given back by each step."""
        result, item = self.try_relieve(size, sum(1 << step for step in steps))
        assert result == 0, errno.errorcode.get(result, result)
        assert item.given == sum(item.step)
        return list(item.step)

    def set_quota(self, value: int) -> int:
        return self.ioctl(abi.IOC_SET_QUOTA, abi.Quota(bytes=value))

    def set_budget(self, value: int) -> int:
        return self.ioctl(abi.IOC_SET_BUDGET, abi.Budget(bytes=value))

    def bandwidth(self) -> abi.Bandwidth:
        bandwidth = abi.Bandwidth()
        assert self.ioctl(abi.IOC_BANDWIDTH, bandwidth) == 0
        return bandwidth

    def set_numa(self, numa: int, nodes: int = 0, flags: int = 0) -> int:
        return self.ioctl(abi.IOC_SET_NUMA, abi.SetNuma(numa=numa, nodes=nodes, flags=flags))

    def map_tensor(self, item: abi.Alloc) -> mmap.mmap:
        return self.map(round_up(item.size, PAGE), item.offset)

    def map_window(self) -> mmap.mmap:
        return self.map(self.info().window_size, 0)


def full(planes: int, token_bytes: int, **fields: int) -> abi.KVGroup:
    return abi.KVGroup(rule=abi.KVRule.FULL, planes=planes, token_bytes=token_bytes, **fields)


def window(tokens: int, planes: int, token_bytes: int, **fields: int) -> abi.KVGroup:
    return abi.KVGroup(
        rule=abi.KVRule.WINDOW, planes=planes, token_bytes=token_bytes, window=tokens, **fields
    )


def state(planes: int, size: int, **fields: int) -> abi.KVGroup:
    return abi.KVGroup(rule=abi.KVRule.STATE, planes=planes, token_bytes=size, **fields)


@dataclass(frozen=True)
class Seq:
    """A sequence: its name, and its place in the window."""

    name: int
    offset: int


class KV(Descriptor):
    """One KV cache."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        info = self.info()
        self.block_tokens = info.block_tokens
        array = (abi.KVGroup * info.nr_groups)()
        info.groups, info.group_size = ctypes.addressof(array), ctypes.sizeof(abi.KVGroup)
        assert self.ioctl(abi.IOC_KV_INFO, info) == 0
        self.groups = list(array)

    def info(self) -> abi.KVInfo:
        info = abi.KVInfo()
        assert self.ioctl(abi.IOC_KV_INFO, info) == 0
        return info

    def block_bytes(self, group: int = 0) -> int:
        """Bytes of a block: planes of whole pages."""
        g = self.groups[group]
        tokens = 1 if g.rule == abi.KVRule.STATE else self.block_tokens
        return g.planes * round_up(g.token_bytes * tokens, PAGE)

    def try_open(self, tenant: int = 0, **fields: int) -> tuple[int, Seq]:
        item = abi.KVOpen(tenant=tenant, **fields)
        return self.ioctl(abi.IOC_KV_OPEN, item), Seq(item.sequence, item.offset)

    def open(self, tenant: int = 0, tokens: int = 0) -> Seq:
        result, seq = self.try_open(tenant)
        assert result == 0, errno.errorcode.get(result, result)
        assert tokens == 0 or self.extend(seq, tokens) == 0
        return seq

    def end(self, seq: Seq) -> int:
        return self.ioctl(abi.IOC_KV_CLOSE, abi.KVClose(sequence=seq.name))

    def extend(self, seq: Seq, tokens: int) -> int:
        return self.ioctl(abi.IOC_KV_EXTEND, abi.KVExtend(sequence=seq.name, tokens=tokens))

    def extend_batch(self, wanted: list[tuple[Seq, int]]) -> tuple[int, abi.Batch, list]:
        requests = (abi.KVExtend(sequence=seq.name, tokens=n) for seq, n in wanted)
        items = (abi.KVExtend * len(wanted))(*requests)
        result, batch = self.batch(abi.IOC_KV_EXTEND_BATCH, items)
        return result, batch, list(items)

    def truncate(self, seq: Seq, length: int) -> int:
        return self.ioctl(abi.IOC_KV_TRUNCATE, abi.KVTruncate(sequence=seq.name, length=length))

    def try_fork(self, seq: Seq, at: int) -> tuple[int, Seq]:
        item = abi.KVFork(sequence=seq.name, at=at)
        return self.ioctl(abi.IOC_KV_FORK, item), Seq(item.child, item.offset)

    def fork(self, seq: Seq, at: int) -> Seq:
        result, child = self.try_fork(seq, at)
        assert result == 0, errno.errorcode.get(result, result)
        return child

    def hashes(self, request: int, seq: Seq, names: list[bytes], **fields: int) -> tuple[int, int]:
        array = (abi.KVHash * max(len(names), 1)).from_buffer_copy(b"".join(names) or bytes(16))
        values = {"hashes": ctypes.addressof(array), "count": len(names), **fields}
        item = abi.KVHashes(sequence=seq.name, **values)
        return self.ioctl(request, item), item.matched

    def publish(self, seq: Seq, names: list[bytes], first: int = 0) -> int:
        return self.hashes(abi.IOC_KV_PUBLISH, seq, names, first=first)[0]

    def lookup(self, seq: Seq, names: list[bytes]) -> tuple[int, int]:
        return self.hashes(abi.IOC_KV_LOOKUP, seq, names)

    def peek(self, seq: Seq, names: list[bytes]) -> tuple[int, int]:
        return self.hashes(abi.IOC_KV_LOOKUP, seq, names, flags=abi.KV_PEEK)

    def adopt(self, seq: Seq, block: int, name: bytes, tokens: int = 0) -> tuple[int, int]:
        named = abi.KVHash.from_buffer_copy(name)
        item = abi.KVAdopt(sequence=seq.name, block=block, tokens=tokens, hash=named)
        return self.ioctl(abi.IOC_KV_ADOPT, item), item.length

    def try_query(self, seq: Seq) -> tuple[int, abi.KVQuery]:
        item = abi.KVQuery(sequence=seq.name)
        return self.ioctl(abi.IOC_KV_QUERY, item), item

    def query(self, seq: Seq) -> abi.KVQuery:
        result, item = self.try_query(seq)
        assert result == 0, errno.errorcode.get(result, result)
        return item

    def pack(self, seq: Seq, flags: int = 0) -> tuple[int, abi.KVPack]:
        item = abi.KVPack(sequence=seq.name, flags=flags)
        return self.ioctl(abi.IOC_KV_PACK, item), item

    def reset(self) -> int:
        return self.ioctl(abi.IOC_KV_RESET, abi.KVReset())

    def events(self) -> list[abi.KVEvent]:
        """All there are now."""
        size = ctypes.sizeof(abi.KVEvent)
        os.set_blocking(self.fd, False)
        data = b""
        try:
            while True:
                data += os.read(self.fd, 64 * size)
        except BlockingIOError:
            assert len(data) % size == 0
        return [abi.KVEvent.from_buffer_copy(data, at) for at in range(0, len(data), size)]

    def counts(self) -> dict[str, int]:
        """What a call that fails leaves as it was."""
        info = self.info()
        names = ("sequences", "held", "used", "cached", "packed", "unpacked", "lookups", "hits",
                 "copies", "evictions", "packs", "unpacks")  # fmt: skip
        return {name: getattr(info, name) for name in names}

    def view(self) -> View:
        return View(self)


class View:
    """The whole window of a KV cache, mapped: the bytes of each token."""

    def __init__(self, kv: KV) -> None:
        self.kv = kv
        self.memory = kv.map(kv.info().window_size, 0)

    def close(self) -> None:
        self.memory.close()

    def place(self, seq: Seq, token: int = 0, plane: int = 0, group: int = 0) -> int:
        """Where a token begins, as the header has it."""
        g = self.kv.groups[group]
        return seq.offset + g.offset + plane * g.stride + token * g.token_bytes

    def span(self, seq: Seq, token: int = 0, plane: int = 0, group: int = 0, tokens: int = 1
             ) -> slice:  # fmt: skip
        at = self.place(seq, token, plane, group)
        return slice(at, at + tokens * self.kv.groups[group].token_bytes)

    def write(self, seq: Seq, values: dict[int, object], group: int = 0) -> None:
        """Fill tokens with what stands for a value, in all planes."""
        g = self.kv.groups[group]
        for plane in range(g.planes):
            for token, value in values.items():
                data = pattern(value, plane, g.token_bytes)
                self.memory[self.span(seq, token, plane, group)] = data

    def check(self, seq: Seq, values: dict[int, object], group: int = 0) -> None:
        """Find them as written; None stands for zeros."""
        g = self.kv.groups[group]
        for plane in range(g.planes):
            for token, value in values.items():
                data = self.memory[self.span(seq, token, plane, group)]
                expected = pattern(value, plane, g.token_bytes)
                assert data == expected, (seq, group, plane, token, value)


class DmaBuf(Descriptor):
    """One dma-buf."""

    SYNC = 1 << 30 | 8 << 16 | ord("b") << 8
    READ, WRITE, END = 1, 2, 4

    def __init__(self, fd: int, size: int) -> None:
        super().__init__(fd)
        self.size = size

    def sync(self, flags: int) -> int:
        return self.ioctl(self.SYNC, flags.to_bytes(8, "little"))

    def view(self, prot: int = mmap.PROT_READ | mmap.PROT_WRITE) -> mmap.mmap:
        return self.map(self.size, 0, prot)


class RT(Descriptor):
    """One RT client of an arena."""

    def info(self) -> abi.RTInfo:
        info = abi.RTInfo()
        assert self.ioctl(abi.IOC_RT_INFO, info) == 0
        return info

    def counts(self) -> dict[str, int]:
        """What a call that fails leaves as it was."""
        info = self.info()
        return {name: getattr(info, name) for name, *_ in info._fields_}

    def reserve(self, size: int, count: int, flags: int = 0) -> int:
        return self.ioctl(abi.IOC_RT_RESERVE, abi.RTReserve(size=size, count=count, flags=flags))

    def try_alloc(self, size: int, deadline_ns: int = 0, flags: int = 0) -> tuple[int, abi.RTAlloc]:
        item = abi.RTAlloc(size=size, deadline_ns=deadline_ns, flags=flags)
        return self.ioctl(abi.IOC_RT_ALLOC, item), item

    def alloc(self, size: int, deadline_ns: int = 0, flags: int = 0) -> abi.RTAlloc:
        result, item = self.try_alloc(size, deadline_ns, flags)
        assert result == 0, errno.errorcode.get(result, result)
        return item

    def alloc_errno(self, size: int, deadline_ns: int = 0, flags: int = 0) -> int:
        """Why there is none; one that there is after all stays."""
        return self.try_alloc(size, deadline_ns, flags)[0]

    def free(self, handle: int, flags: int = 0) -> int:
        return self.ioctl(abi.IOC_RT_FREE, abi.RTBlock(handle=handle, flags=flags))

    def pin(self, handle: int, flags: int = 0) -> tuple[int, int]:
        item = abi.RTBlock(handle=handle, flags=flags)
        return self.ioctl(abi.IOC_RT_PIN, item), item.offset

    def unpin(self, handle: int, flags: int = 0) -> int:
        return self.ioctl(abi.IOC_RT_UNPIN, abi.RTBlock(handle=handle, flags=flags))

    def set_priority(self, priority: int, flags: int = 0) -> int:
        return self.ioctl(abi.IOC_RT_PRIORITY, abi.RTPriority(priority=priority, flags=flags))

    def alloc_batch(
        self, sizes: Sequence[int], deadline_ns: int = 0, flags: int = 0
    ) -> tuple[int, abi.Batch, list[abi.RTAlloc]]:
        requests = (abi.RTAlloc(size=s, deadline_ns=deadline_ns, flags=flags) for s in sizes)
        items = (abi.RTAlloc * len(sizes))(*requests)
        result, batch = self.batch(abi.IOC_RT_ALLOC_BATCH, items)
        return result, batch, list(items)

    def free_batch(self, handles: Sequence[int]) -> tuple[int, abi.Batch]:
        items = (abi.RTBlock * len(handles))(*(abi.RTBlock(handle=h) for h in handles))
        return self.batch(abi.IOC_RT_FREE_BATCH, items)

    def fill(self, size: int, flags: int = 0) -> list[abi.RTAlloc]:
        """Blocks of one size, as many as there is room for."""
        blocks = []
        while True:
            result, item = self.try_alloc(size, flags=flags)
            if result:
                assert result in (errno.ENOSPC, errno.ENFILE)
                return blocks
            blocks.append(item)

    def fill_up(self) -> list[abi.RTAlloc]:
        """All of the arena that is not reserved, in blocks of any size."""
        blocks = []
        while (largest := self.info().largest):
            blocks.append(self.alloc(largest))
        return blocks

    def view(self, prot: int = mmap.PROT_READ | mmap.PROT_WRITE) -> mmap.mmap:
        """The whole arena."""
        return self.map(self.info().size, 0, prot=prot)

    def folder(self) -> Path:
        """Its own in sysfs."""
        text = Path(f"/proc/self/fdinfo/{self.fd}").read_text()
        found = re.search(r"^tensormem-rt:\t(\d+)$", text, re.M)
        assert found, text
        return SYSFS / "rt" / found[1]

    def read(self, name: str) -> int:
        return int((self.folder() / name).read_text())

    def histogram(self, name: str) -> list[int]:
        """Counts by the binary logarithm of nanoseconds."""
        return [int(word) for word in (self.folder() / name).read_text().split()]


#: What poll(2) may say of a slot or a generation.
POLLED = select.POLLIN | select.POLLPRI | select.POLLERR | select.POLLHUP


class Slot(Descriptor):
    """One descriptor of a model slot."""

    def __init__(self, fd: int, name: str) -> None:
        super().__init__(fd)
        self.name = name

    def info(self) -> abi.ModelSlot:
        info = abi.ModelSlot()
        assert self.ioctl(abi.IOC_MODEL_SLOT, info) == 0
        return info

    def places(self) -> tuple[int, int, int]:
        """Numbers of the active, the previous and the staged generation."""
        info = self.info()
        return info.active, info.previous, info.staged

    def try_stage(self, file: int, flags: int = 0, **fields: int) -> tuple[int, abi.ModelStage]:
        request = abi.ModelStage(file=file, flags=flags, fd=-1, **fields)
        return self.ioctl(abi.IOC_MODEL_STAGE, request), request

    def stage(self, file: int, flags: int = 0, sha256: bytes = b"", **fields: int) -> Generation:
        request = abi.ModelStage(file=file, flags=flags, fd=-1, **fields)
        request.sha256[: len(sha256)] = sha256
        result = self.ioctl(abi.IOC_MODEL_STAGE, request)
        assert result == 0, errno.errorcode.get(result, result)
        return Generation(request.fd, request.generation)

    def load(self, data: bytes, flags: int = 0, **fields: int) -> Generation:
        """Stage a file of these bytes, and wait for it."""
        file = file_of(data)
        try:
            return self.stage(file, flags, **fields).loaded()
        finally:
            os.close(file)

    def swap(self, data: bytes, flags: int = 0) -> int:
        """Load and commit; the number of what is active now."""
        with self.load(data, flags) as gen:
            assert self.commit(gen.number) == 0
            return gen.number

    def commit(self, number: int) -> int:
        return self.ioctl(abi.IOC_MODEL_COMMIT, abi.ModelWhich(generation=number))

    def abort(self, number: int) -> int:
        return self.ioctl(abi.IOC_MODEL_ABORT, abi.ModelWhich(generation=number))

    def rollback(self, number: int = 0) -> tuple[int, int]:
        item = abi.ModelWhich(generation=number)
        return self.ioctl(abi.IOC_MODEL_ROLLBACK, item), item.generation

    def try_acquire(self, number: int = 0, **fields: int) -> tuple[int, abi.ModelAcquire]:
        item = abi.ModelAcquire(generation=number, fd=-1, **fields)
        return self.ioctl(abi.IOC_MODEL_ACQUIRE, item), item

    def acquire(self, number: int = 0) -> Generation:
        result, item = self.try_acquire(number)
        assert result == 0, errno.errorcode.get(result, result)
        return Generation(item.fd, item.generation)

    def remove(self) -> int:
        return self.ioctl(abi.IOC_MODEL_REMOVE, abi.ModelRemove())

    def events(self, seconds: float = 0) -> int:
        return polled(self.fd, seconds)

    def buried(self) -> Self:
        """Wait until what nobody has any more is freed; there is no other slot."""
        wait_for(lambda: read("model/generations") == self.info().generations)
        return self

    def read(self, name: str) -> int:
        """One value of its folder in sysfs."""
        return read(f"model/{self.name}/{name}")

    def told(self) -> dict[int, str]:
        """Its generations' states by number, as sysfs has them."""
        folder = SYSFS / "model" / self.name
        return {int(path.parent.name): path.read_text().strip() for path in folder.glob("*/state")}


class Generation(Descriptor):
    """One descriptor of a generation of a model slot."""

    def __init__(self, fd: int, number: int) -> None:
        super().__init__(fd)
        self.number = number

    def info(self) -> abi.ModelInfo:
        info = abi.ModelInfo()
        assert self.ioctl(abi.IOC_MODEL_INFO, info) == 0
        return info

    def state(self) -> abi.ModelState:
        return abi.ModelState(self.info().state)

    def events(self, seconds: float = 0) -> int:
        return polled(self.fd, seconds)

    def settled(self) -> Self:
        """Wait until it is not being loaded any more."""
        ready = select.poll()
        ready.register(self.fd, select.POLLIN)
        assert ready.poll(120_000), "still being loaded"
        return self

    def loaded(self) -> Self:
        info = self.settled().info()
        assert info.state != abi.ModelState.FAILED, errno.errorcode.get(info.error, info.error)
        return self

    def failed(self) -> int:
        """Wait for it to fail; why it did."""
        info = self.settled().info()
        assert info.state == abi.ModelState.FAILED
        return info.error

    def memory(self) -> tuple[int, int]:
        """Bytes that it has alone, and that it shares."""
        info = self.info()
        return info.private_bytes, info.shared_bytes

    def contents(self) -> bytes:
        """All of it, by pread()."""
        data = bytearray()
        while part := os.pread(self.fd, 1 << 20, len(data)):
            data += part
        return bytes(data)

    def view(self, length: int = 0, offset: int = 0, **how: int) -> mmap.mmap:
        length = length or os.fstat(self.fd).st_size - offset
        return self.map(length, offset, **{"prot": mmap.PROT_READ, **how})

    def behind(self) -> bytes:
        """What is behind its end in the last page, which a view does not show."""
        size = os.fstat(self.fd).st_size
        start = (size - 1) // PAGE * PAGE
        at = libc.mmap(None, PAGE, mmap.PROT_READ, mmap.MAP_SHARED, self.fd, start)
        assert at != FAILED
        data = ctypes.string_at(at + size - start, start + PAGE - size)
        assert libc.munmap(at, PAGE) == 0
        return data


def polled(fd: int, seconds: float = 0) -> int:
    poll = select.poll()
    poll.register(fd, POLLED)
    return sum(events for _, events in poll.poll(seconds * 1000))


@functools.lru_cache(maxsize=8)
def weights(tag: object, size: int) -> bytes:
    """Bytes of a model: no two pages of it are alike."""
    return random.Random(repr(tag)).randbytes(size)


def file_of(data: bytes) -> int:
    fd = os.memfd_create("model")
    write_all(fd, data)
    return fd


def write_all(fd: int, data: bytes, offset: int = 0) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, memoryview(data)[done:], offset + done)


def pattern(value: object, plane: int, size: int) -> bytes:
    if value is None:
        return bytes(size)
    unit = blake2b(repr((value, plane)).encode(), digest_size=16).digest()
    return (unit * (size // 16 + 1))[:size]


def tokens(tag: object, first: int, end: int) -> dict[int, object]:
    """Values for tokens, each other than the next."""
    return {t: (tag, t) for t in range(first, end)}


def chain(tag: object, count: int) -> list[bytes]:
    """Names of so many blocks, each of all before it."""
    return [blake2b(repr((tag, i)).encode(), digest_size=16).digest() for i in range(count)]


def round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def read(name: str) -> int:
    """One value of sysfs, such as ``chunk/total``: by calls alone, because tests read many."""
    fd = os.open(f"{SYSFS}/{name}", os.O_RDONLY)
    try:
        return int(os.read(fd, 32))
    finally:
        os.close(fd)


def word(name: str) -> str:
    """One value of sysfs that is no number."""
    return (SYSFS / name).read_text().strip()


def becomes(name: str, value: int) -> None:
    """Wait for a value of sysfs: memory is given back soon, but nobody waits for that."""
    wait_for(lambda: read(name) == value, told=lambda: f"{name} is {read(name)}, not {value}")


def write(name: str, value: object) -> int:
    try:
        (SYSFS / name).write_text(str(value))
    except OSError as error:
        return error.errno or -1
    return 0


def nodes_with_memory() -> list[int]:
    """The kernel's own list, such as 0-1; without NUMA there is one node, 0."""
    file = Path("/sys/devices/system/node/has_memory")
    ranges = file.read_text().strip().split(",") if file.exists() else ["0"]
    bounds = [(r.split("-")[0], r.split("-")[-1]) for r in ranges]
    return [node for first, last in bounds for node in range(int(first), int(last) + 1)]


def events(name: str) -> list[dict[str, str]]:
    """What the trace has of one of the module's events; see the fixture of that name."""
    lines = re.findall(rf": tensormem_{name}: (.*)$", (TRACING / "trace").read_text(), re.M)
    return [dict(field.split("=", 1) for field in line.split()) for line in lines]


def wait_for(condition: Callable[[], object], told: Callable[[], str] = lambda: "did not come about") -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, told()
        time.sleep(0.02)


def core(cpu: int, name: str) -> int:
    return read(f"core{cpu}/{name}")


@contextlib.contextmanager
def hog(cpu: int, priority: int = 0) -> Iterator[int]:
    """A process that takes all of a CPU."""
    pid = os.fork()
    if pid == 0:
        os.sched_setaffinity(0, {cpu})
        if priority:
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))
        while True:
            pass
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def over(cpu: int, periods: int) -> dict[str, int]:
    """What a core's files have more after so many periods."""
    names = ("total", "exempt", "periods", "excess", "held_ns")
    before = {name: core(cpu, name) for name in names}
    wait_for(lambda: core(cpu, "periods") >= before["periods"] + periods)
    return {name: core(cpu, name) - before[name] for name in names}


def address_of(mapping: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))
