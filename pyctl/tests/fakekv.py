# SPDX-License-Identifier: MIT
"""A KV cache without a kernel: the ABI of its descriptor on a memfd.

Which blocks a sequence has, shares and finds follows the header. Contents do not
follow the blocks: each sequence has bytes of its own in the memfd, and a published block
is a copy of what it was then. So it cannot show that sharing is sound, only that
the library asks for the right thing. What a sequence loses is filled with POISON.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from tensormem import abi

PAGE = mmap.PAGESIZE
CHUNK = 2 << 20
POISON = 0xDB

Key = tuple[int, bytes, int]  # tenant, hash, group


def up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


@dataclass(eq=False)
class Block:
    """A block of one group; ``data`` is what was published."""

    group: int
    refs: int = 1
    key: Key | None = None
    data: list[bytes] = field(default_factory=list)
    packed: bool = False


@dataclass(eq=False)
class Sequence:
    """An open sequence: by group, its blocks by index."""

    place: int
    tenant: int
    length: int
    tables: list[dict[int, Block]]


class Refused(OSError):
    pass


def refuse(number: int) -> Refused:
    return Refused(number, os.strerror(number))


class State:
    """What all descriptors of one cache share."""

    def __init__(self, create: abi.KVCreate, max_batch: int) -> None:
        groups = (abi.KVGroup * create.nr_groups).from_address(create.groups)
        self.groups = [abi.KVGroup.from_buffer_copy(g) for g in groups]
        if not self.groups or not create.max_tokens or not create.max_sequences:
            raise refuse(errno.EINVAL)
        self.max_tokens, self.max_sequences = create.max_tokens, create.max_sequences
        self.max_batch = max_batch
        self.block_tokens = create.block_tokens or next(
            (t for t in range(8, 4096) if all(self._whole(g, t) for g in self.groups)), 0
        )
        if not self.block_tokens or not all(self._whole(g, self.block_tokens) for g in self.groups):
            raise refuse(errno.EINVAL)
        self.max_blocks = up(self.max_tokens, self.block_tokens) // self.block_tokens
        offset = 0
        for g in self.groups:
            if not g.planes or not g.token_bytes or bool(g.window) != (g.rule == 2):
                raise refuse(errno.EINVAL)
            blocks = 1 if g.rule == abi.KVRule.STATE else self.max_blocks
            g.offset, g.stride = offset, self.plane(g) * blocks
            offset += g.stride * g.planes
        self.sequence_size = offset
        self.window = offset * self.max_sequences
        self.limit = up(create.limit or self.window, CHUNK)
        if sum(map(self.size, range(len(self.groups)))) > self.limit:
            raise refuse(errno.EINVAL)
        self.events: deque[abi.KVEvent] | None = deque() if create.flags & abi.KV_EVENTS else None
        self.fd = os.memfd_create("tensormem-fake-kv", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, self.window)
        self.users = 0
        self.sequences: dict[int, Sequence] = {}
        self.generation = 0
        self.blocks: set[Block] = set()
        self.found: dict[Key, list[Block]] = {}
        self.cached: OrderedDict[Block, None] = OrderedDict()
        self.counts = dict.fromkeys(
            ("lookups", "hits", "copies", "evictions", "packs", "unpacks", "events_lost", "moved"),
            0,
        )
        self.codec = True
        self.lock = threading.RLock()

    def _whole(self, g: abi.KVGroup, tokens: int) -> bool:
        return bool(g.rule == abi.KVRule.STATE or g.token_bytes * tokens % PAGE == 0)

    def plane(self, g: abi.KVGroup) -> int:
        """Bytes of a block in one plane."""
        tokens = 1 if g.rule == abi.KVRule.STATE else self.block_tokens
        return up(int(g.token_bytes) * tokens, PAGE)

    def size(self, group: int) -> int:
        g = self.groups[group]
        return self.plane(g) * int(g.planes)

    def total(self, blocks: Iterable[Block]) -> int:
        # packed blocks take half
        return sum(self.size(b.group) // (1 + b.packed) for b in blocks)

    def span(self, group: int, tokens: int) -> range:
        g = self.groups[group]
        if not tokens:
            return range(0)
        if g.rule == abi.KVRule.STATE:
            return range(1)
        first = 0
        if g.rule == abi.KVRule.WINDOW and tokens > g.window:
            first = (tokens - g.window) // self.block_tokens
        return range(first, up(tokens, self.block_tokens) // self.block_tokens)

    # -- contents ------------------------------------------------------------------

    def _where(self, seq: Sequence, group: int, index: int) -> list[tuple[int, int]]:
        g = self.groups[group]
        size, begin = self.plane(g), seq.place * self.sequence_size + g.offset
        return [(begin + p * g.stride + index * size, size) for p in range(g.planes)]

    def contents(self, seq: Sequence, group: int, index: int) -> list[bytes]:
        return [os.pread(self.fd, n, at) for at, n in self._where(seq, group, index)]

    def fill(self, seq: Sequence, group: int, index: int, data: list[bytes] | int) -> None:
        for i, (at, n) in enumerate(self._where(seq, group, index)):
            os.pwrite(self.fd, bytes([data]) * n if isinstance(data, int) else data[i], at)

    # -- blocks --------------------------------------------------------------------

    def room(self, need: int) -> None:
        """Make sure of so many bytes, at the cost of cached blocks, or change nothing."""
        free = self.limit - self.total(self.blocks)
        if free + self.total(self.cached) < need:
            raise refuse(errno.ENOSPC)
        while free < need:
            free += self.evict()

    def evict(self) -> int:
        block = next(iter(self.cached))
        size = self.total([block])
        self.counts["evictions"] += 1
        self.forget(block)
        return size

    def forget(self, block: Block) -> None:
        assert block.key is not None
        tenant, name, group = block.key
        self.found[block.key].remove(block)
        if not self.found[block.key]:
            del self.found[block.key]
        self.tell(abi.KVEventType.REMOVED, tenant, group, name)
        block.key = None
        if block in self.cached:
            del self.cached[block]
            self.blocks.discard(block)

    def tell(
        self, kind: abi.KVEventType, tenant: int = 0, group: int = 0, name: bytes = bytes(16),
        block: int = 0, parent: bytes = bytes(16),
    ) -> None:  # fmt: skip
        if self.events is not None:
            event = abi.KVEvent(type=kind, tenant=tenant, group=group, block=block)
            event.hash.bytes[:], event.parent.bytes[:] = name, parent
            self.events.append(event)

    def get(self, block: Block) -> Block:
        block.refs += 1
        self.cached.pop(block, None)
        return block

    def put(self, seq: Sequence, group: int, index: int) -> None:
        block = seq.tables[group].pop(index)
        self.fill(seq, group, index, POISON)
        block.refs -= 1
        if not block.refs and block.key is None:
            self.blocks.discard(block)
        elif not block.refs:
            self.cached[block] = None

    def new(self, seq: Sequence, group: int, index: int) -> Block:
        block = seq.tables[group][index] = Block(group)
        self.blocks.add(block)
        return block

    def find(self, tenant: int, name: bytes, group: int) -> Block | None:
        return next(iter(self.found.get((tenant, name, group), ())), None)

    def publish(self, block: Block, key: Key, data: list[bytes], at: int, parent: bytes) -> None:
        block.key, block.data = key, data
        self.found.setdefault(key, []).append(block)
        self.tell(abi.KVEventType.STORED, key[0], key[2], key[1], at, parent)

    # -- calls ---------------------------------------------------------------------

    def seq(self, name: int) -> Sequence:
        if name not in self.sequences:
            raise refuse(errno.ENOENT)
        return self.sequences[name]

    def open(self, tenant: int) -> int:
        taken = {s.place for s in self.sequences.values()}
        free = [p for p in range(self.max_sequences) if p not in taken]
        if not free:
            raise refuse(errno.ENOBUFS)
        self.generation += 1
        name = free[0] | self.generation << 16
        self.sequences[name] = Sequence(free[0], tenant, 0, [{} for _ in self.groups])
        return name

    def close(self, name: int) -> None:
        seq = self.seq(name)
        for group, table in enumerate(seq.tables):
            for index in sorted(table, reverse=True):
                self.put(seq, group, index)
        del self.sequences[name]

    def grow(self, items: list[tuple[Sequence, int]]) -> None:
        """Extend all or none; raises with the index of the item as second argument."""
        need = 0
        for i, (seq, count) in enumerate(items):
            if not count or seq in [s for s, _ in items[:i]]:
                raise Failed(errno.EINVAL, i)
            if seq.length + count > self.max_tokens:
                raise Failed(errno.ERANGE, i)
            for group in range(len(self.groups)):
                table = seq.tables[group]
                span = self.span(group, seq.length + count)
                need += self.size(group) * (
                    len([x for x in span if x not in table]) + self._stale(seq, group)
                )
                try:
                    self.room(need)
                except Refused:
                    raise Failed(errno.ENOSPC, i) from None
        for seq, count in items:
            for group in range(len(self.groups)):
                if self._stale(seq, group):
                    self.own(seq, group, seq.length // self.block_tokens)
                span = self.span(group, seq.length + count)
                for index in [x for x in seq.tables[group] if x not in span]:
                    self.put(seq, group, index)
                for index in [x for x in span if x not in seq.tables[group]]:
                    self.new(seq, group, index)
                    self.fill(seq, group, index, 0)
            seq.length += count

    def _stale(self, seq: Sequence, group: int) -> bool:
        """Whether the last block is partial and somebody else may see it."""
        last = seq.tables[group].get(seq.length // self.block_tokens)
        partial = seq.length % self.block_tokens and self.groups[group].rule != abi.KVRule.STATE
        return bool(partial and last and (last.refs > 1 or last.key))

    def own(self, seq: Sequence, group: int, index: int) -> None:
        data = self.contents(seq, group, index)
        self.put(seq, group, index)
        self.new(seq, group, index)
        self.fill(seq, group, index, data)
        self.counts["copies"] += 1

    def reaches(self, seq: Sequence, length: int) -> None:
        if length > seq.length:
            raise refuse(errno.EINVAL)
        for group, g in enumerate(self.groups):
            if g.rule == abi.KVRule.STATE and length not in (0, seq.length):
                raise refuse(errno.ENODATA)
            if any(x not in seq.tables[group] for x in self.span(group, length)):
                raise refuse(errno.ENODATA)

    def truncate(self, seq: Sequence, length: int) -> None:
        self.reaches(seq, length)
        for group, table in enumerate(seq.tables):
            for index in sorted(set(table) - set(self.span(group, length)), reverse=True):
                self.put(seq, group, index)
        seq.length = length

    def fork(self, seq: Sequence, at: int) -> int:
        self.reaches(seq, at)
        partial = at // self.block_tokens if at % self.block_tokens else -1
        copied = {
            group: 0 if g.rule == abi.KVRule.STATE else partial
            for group, g in enumerate(self.groups)
            if at and (g.rule == abi.KVRule.STATE or partial >= 0)
        }
        if len(self.sequences) == self.max_sequences:
            raise refuse(errno.ENOBUFS)
        self.room(sum(map(self.size, copied)))
        name = self.open(seq.tenant)
        child = self.sequences[name]
        for group in range(len(self.groups)):
            for index in self.span(group, at):
                data = self.contents(seq, group, index)
                if copied.get(group) == index:
                    self.new(child, group, index)
                    self.counts["copies"] += 1
                else:
                    child.tables[group][index] = self.get(seq.tables[group][index])
                self.fill(child, group, index, data)
        child.length = at
        return name

    def store(self, seq: Sequence, first: int, names: list[bytes]) -> None:
        full = seq.length // self.block_tokens
        if first + len(names) > full:
            raise refuse(errno.EINVAL)
        ends = seq.length == (first + len(names)) * self.block_tokens
        for group, g in enumerate(self.groups):
            for i, name in enumerate(names):
                block = seq.tables[group].get(first + i)
                named = block.key if block and g.rule != abi.KVRule.STATE else None
                if named and named[1] != name:
                    raise refuse(errno.EINVAL)
        states = [i for i, g in enumerate(self.groups) if g.rule == abi.KVRule.STATE]
        states = [i for i in states if ends and not self.find(seq.tenant, names[-1], i)]
        self.room(sum(map(self.size, states)))
        before = next(
            (b.key[1] for t in seq.tables if (b := t.get(first - 1)) and b.key), bytes(16)
        )
        for group, g in enumerate(self.groups):
            for i, name in enumerate(names):
                block = seq.tables[group].get(first + i)
                if g.rule == abi.KVRule.STATE or block is None or block.key is not None:
                    continue
                parent = names[i - 1] if i else before
                data = self.contents(seq, group, first + i)
                self.publish(block, (seq.tenant, name, group), data, first + i, parent)
        for group in states:
            block = Block(group, refs=0)
            self.blocks.add(block)
            self.cached[block] = None
            parent = names[-2] if len(names) > 1 else before
            key = (seq.tenant, names[-1], group)
            self.publish(block, key, self.contents(seq, group, 0), first + len(names) - 1, parent)

    def longest(self, tenant: int, names: list[bytes]) -> int:
        for count in range(min(len(names), self.max_tokens // self.block_tokens), 0, -1):
            for group, g in enumerate(self.groups):
                span = self.span(group, count * self.block_tokens)
                if g.rule == abi.KVRule.STATE:
                    span = range(count - 1, count)
                if not all(self.find(tenant, names[x], group) for x in span):
                    break
            else:
                return count
        return 0

    def lookup(self, seq: Sequence, names: list[bytes], peek: bool) -> int:
        if seq.length:
            raise refuse(errno.EINVAL)
        count = self.longest(seq.tenant, names)
        if peek:
            return count
        self.counts["lookups"] += len(names)
        self.counts["hits"] += count
        if not count:
            return 0
        keep = [
            block
            for group in range(len(self.groups))
            for x in range(count)
            if (block := self.find(seq.tenant, names[x], group))
        ]
        # what is being hit is not its own victim
        for block in keep:
            self.get(block)
        try:
            states = [i for i, g in enumerate(self.groups) if g.rule == abi.KVRule.STATE]
            self.room(sum(map(self.size, states)))
            for group, g in enumerate(self.groups):
                for index in self.span(group, count * self.block_tokens):
                    state = g.rule == abi.KVRule.STATE
                    found = self.find(seq.tenant, names[count - 1 if state else index], group)
                    assert found is not None
                    if state:
                        self.new(seq, group, index)
                        self.counts["copies"] += 1
                    else:
                        seq.tables[group][index] = self.get(found)
                    self.fill(seq, group, index, found.data)
        finally:
            for block in keep:
                block.refs -= 1
                if not block.refs:
                    self.cached[block] = None
        seq.length = count * self.block_tokens
        return count

    def adopt(self, seq: Sequence, index: int, name: bytes, tokens: int) -> None:
        size = self.block_tokens
        full, tokens = seq.length // size, tokens or size
        end = index == full and seq.length == full * size
        if tokens > size or not (end or (index < full and tokens == size)):
            raise refuse(errno.EINVAL)
        if index * size + tokens > self.max_tokens:
            raise refuse(errno.ERANGE)
        length = max(seq.length, index * size + tokens)
        found: dict[int, Block] = {}
        for group, g in enumerate(self.groups):
            state = g.rule == abi.KVRule.STATE
            if (state and not end) or (not state and index not in self.span(group, length)):
                continue
            block = self.find(seq.tenant, name, group)
            if block is None:
                raise refuse(errno.ENODATA)
            if state and tokens < size:
                raise refuse(errno.EINVAL)
            found[group] = self.get(block)
        try:
            copied = [x for x in found if tokens < size or self.groups[x].rule == abi.KVRule.STATE]
            self.room(sum(map(self.size, copied)))
            for group, block in found.items():
                at = 0 if self.groups[group].rule == abi.KVRule.STATE else index
                if at in seq.tables[group]:
                    self.put(seq, group, at)
                if group in copied:
                    self.new(seq, group, at)
                    self.counts["copies"] += 1
                else:
                    seq.tables[group][at] = self.get(block)
                self.fill(seq, group, at, block.data)
            for group in range(len(self.groups)):
                for x in [x for x in seq.tables[group] if x not in self.span(group, length)]:
                    self.put(seq, group, x)
        finally:
            for block in found.values():
                block.refs -= 1
                if not block.refs:
                    self.cached[block] = None
        seq.length = length

    def pack(self, seq: Sequence, unpack: bool) -> tuple[int, int, int]:
        if not unpack and not self.codec:
            raise refuse(errno.EOPNOTSUPP)
        full = seq.length // self.block_tokens
        blocks = [
            b
            for group, table in enumerate(seq.tables)
            for x, b in table.items()
            if b.packed == unpack
            and (unpack or (b.refs == 1 and x < full))
            and self.groups[group].rule != abi.KVRule.STATE
        ]
        before = self.total(blocks)
        if unpack:
            self.room(before)
        for block in blocks:
            block.packed = not unpack
        self.counts["unpacks" if unpack else "packs"] += len(blocks)
        return len(blocks), before, self.total(blocks)


class Failed(Exception):
    """A batch failed at an item."""

    def __init__(self, number: int, index: int) -> None:
        super().__init__(number, index)
        self.errno, self.index = number, index


class FakeKV:
    """One descriptor of a cache; stands in for tensormem.device.KernelDevice."""

    def __init__(self, state: State, window_mapping: bool = True) -> None:
        self.state = state
        self.window_mapping = window_mapping
        self.fd = os.dup(state.fd)
        state.users += 1
        self.calls: list[int] = []
        self.maps: list[tuple[int, int]] = []
        self.fail: dict[int, int] = {}  # request -> errno
        self.fail_map = False

    # -- the Device protocol -----------------------------------------------------------

    def ioctl(self, request: int, argument: abi.Struct) -> None:
        if self.fd < 0:
            raise refuse(errno.EBADF)
        assert (request >> 16) & 0x3FFF == ctypes.sizeof(argument)
        with self.state.lock:
            self.calls.append(request)
            if request in self.fail:
                raise refuse(self.fail[request])
            self._dispatch(request, argument)

    def map(self, offset: int, length: int, *, write: bool = True) -> mmap.mmap:
        assert write
        state = self.state
        if (offset, length) == (0, state.window):
            if not self.window_mapping:
                raise refuse(errno.ENOMEM)
        elif self.fail_map:
            raise refuse(errno.ENOMEM)
        else:
            places = {s.place for s in state.sequences.values()}
            if offset // state.sequence_size not in places:
                raise refuse(errno.ENOENT)
            if offset % PAGE or offset % state.sequence_size + length > state.sequence_size:
                raise refuse(errno.EINVAL)
        self.maps.append((offset, length))
        return mmap.mmap(self.fd, length, offset=offset)

    def read(self, size: int, timeout: float | None) -> bytes:
        events = self.state.events
        if events is None or size < ctypes.sizeof(abi.KVEvent):
            raise refuse(errno.EINVAL)
        assert events or timeout is not None, "would wait for ever"
        data = b""
        while events and len(data) + ctypes.sizeof(abi.KVEvent) <= size:
            data += bytes(events.popleft())
        return data

    def pread(self, size: int, offset: int) -> bytes:
        raise AssertionError("a KV cache has no contents")

    def poll(self, events: int, timeout: float | None) -> int:
        raise AssertionError("nobody polls it")

    def other(self, fd: int) -> FakeKV:
        raise AssertionError("a KV cache makes no descriptors")

    def fileno(self) -> int:
        return self.fd

    def close(self) -> None:
        assert self.fd >= 0, "closed twice"
        os.close(self.fd)
        self.fd = -1
        self.state.users -= 1
        if not self.state.users:
            os.close(self.state.fd)

    # -- the kernel's part ---------------------------------------------------------------

    def _dispatch(self, request: int, a: abi.Struct) -> None:
        state = self.state
        if isinstance(a, abi.KVInfo):
            self._info(a)
        elif isinstance(a, abi.KVOpen):
            a.sequence = state.open(a.tenant)
            a.offset = state.seq(a.sequence).place * state.sequence_size
        elif isinstance(a, abi.KVClose):
            state.close(a.sequence)
        elif isinstance(a, abi.KVExtend):
            seq = state.seq(a.sequence)
            try:
                state.grow([(seq, a.tokens)])
            except Failed as error:
                raise refuse(error.errno) from None
            a.length = seq.length
        elif isinstance(a, abi.Batch):
            self._batch(a)
        elif isinstance(a, abi.KVTruncate):
            state.truncate(state.seq(a.sequence), a.length)
        elif isinstance(a, abi.KVFork):
            a.child = state.fork(state.seq(a.sequence), a.at)
            a.offset = state.seq(a.child).place * state.sequence_size
        elif isinstance(a, abi.KVHashes):
            self._hashes(request, a)
        elif isinstance(a, abi.KVAdopt):
            seq = state.seq(a.sequence)
            state.adopt(seq, a.block, bytes(a.hash.bytes), a.tokens)
            a.length = seq.length
        elif isinstance(a, abi.KVQuery):
            self._query(a)
        elif isinstance(a, abi.KVPack):
            done = state.pack(state.seq(a.sequence), bool(a.flags & abi.KV_UNPACK))
            a.blocks, a.before, a.after = done
        elif isinstance(a, abi.KVReset):
            if any(any(s.tables) for s in state.sequences.values()):
                raise refuse(errno.EBUSY)
            for block in list(state.cached):
                assert block.key is not None
                del state.found[block.key], state.cached[block]
                state.blocks.discard(block)
            state.tell(abi.KVEventType.CLEARED)
        else:
            raise refuse(errno.ENOTTY)

    def _info(self, a: abi.KVInfo) -> None:
        state = self.state
        if a.groups:
            if a.nr_groups < len(state.groups) or a.group_size != ctypes.sizeof(abi.KVGroup):
                raise refuse(errno.EINVAL)
            room = (abi.KVGroup * a.nr_groups).from_address(a.groups)
            room[: len(state.groups)] = state.groups
        a.nr_groups = len(state.groups)
        a.max_tokens, a.max_sequences = state.max_tokens, state.max_sequences
        a.block_tokens, a.sequences = state.block_tokens, len(state.sequences)
        a.window_size, a.sequence_size = state.window, state.sequence_size
        a.limit, a.used = state.limit, state.total(state.blocks)
        a.held = up(a.used, CHUNK)
        a.cached = state.total(state.cached)
        packed = [b for b in state.blocks if b.packed]
        a.packed, a.unpacked = state.total(packed), 2 * state.total(packed)
        for name, value in state.counts.items():
            setattr(a, name, value)

    def _batch(self, a: abi.Batch) -> None:
        if not 0 < a.count <= self.state.max_batch or a.flags:
            raise refuse(errno.EINVAL)
        assert a.item_size == ctypes.sizeof(abi.KVExtend)
        items = (abi.KVExtend * a.count).from_address(a.items)
        done = []
        for i, item in enumerate(items):
            if item.sequence not in self.state.sequences:
                a.failed = i
                raise refuse(errno.ENOENT)
            done.append((self.state.seq(item.sequence), int(item.tokens)))
        try:
            self.state.grow(done)
        except Failed as error:
            a.failed = error.index
            raise refuse(error.errno) from None
        for item, (seq, _) in zip(items, done, strict=True):
            item.length = seq.length
        a.failed = a.count

    def _hashes(self, request: int, a: abi.KVHashes) -> None:
        seq = self.state.seq(a.sequence)
        if not 0 < a.count <= self.state.max_batch:
            raise refuse(errno.EINVAL)
        names = [bytes(h.bytes) for h in (abi.KVHash * a.count).from_address(a.hashes)]
        if request == abi.IOC_KV_PUBLISH:
            self.state.store(seq, a.first, names)
        else:
            a.matched = self.state.lookup(seq, names, bool(a.flags & abi.KV_PEEK))

    def _query(self, a: abi.KVQuery) -> None:
        state, seq = self.state, self.state.seq(a.sequence)
        blocks = [b for table in seq.tables for b in table.values()]
        packed = [b for b in blocks if b.packed]
        a.length, a.offset = seq.length, seq.place * state.sequence_size
        a.held, a.shared = state.total(blocks), state.total(b for b in blocks if b.refs > 1)
        a.packed, a.unpacked = state.total(packed), 2 * state.total(packed)
