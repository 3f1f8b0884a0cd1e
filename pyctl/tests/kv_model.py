# SPDX-License-Identifier: MIT
"""A KV cache as it is specified: which blocks there are, who has them, what goes first.

One full group, as the demo has it. Blocks are objects with their own numbers in them; a
sequence's contiguous arrays are put together from them and taken apart again, so that
a block that is shared wrongly shows in what is read. Any page size will do.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tensormem import errors

CHUNK = 2 << 20


@dataclass(eq=False)
class Block:
    """One block: contents, users, and what it is found by."""

    data: npt.NDArray[np.float32]  # [planes, block_tokens, heads, dim]
    refs: int = 1
    key: tuple[int, tuple[int, ...]] | None = None


@dataclass
class ModelInfo:
    """The counters of KVInfo that mean something here, in bytes where they are there."""

    limit: int
    used: int = 0
    cached: int = 0
    copies: int = 0
    evictions: int = 0
    packs: int = 0
    packed: int = 0
    unpacked: int = 0


class ModelSequence:
    """One sequence."""

    def __init__(self, cache: ModelCache, tenant: int) -> None:
        self.cache, self.tenant = cache, tenant
        self.blocks: list[Block] = []
        self.length = 0
        self.closed = False
        # what callers see; blocks are filled from it before anybody else may see them
        shape = (cache.planes, cache.max_tokens, cache.heads, cache.dim)
        self.arrays = np.full(shape, np.nan, np.float32)

    def k(self, layer: int) -> npt.NDArray[np.float32]:
        return self.arrays[2 * layer, : self.length]

    def v(self, layer: int) -> npt.NDArray[np.float32]:
        return self.arrays[2 * layer + 1, : self.length]

    def extend(self, tokens: int) -> int:
        self.cache.extend([(self, tokens)])
        return self.length

    def truncate(self, length: int) -> None:
        assert 0 <= length <= self.length
        keep = -(-length // self.cache.block_tokens)
        while len(self.blocks) > keep:
            self.cache.put(self.blocks.pop())
        self.length = length

    def store(self) -> None:
        """Take apart what was written; what is shared may not have been written."""
        n = self.cache.block_tokens
        for i, block in enumerate(self.blocks):
            there = self.arrays[:, i * n : min((i + 1) * n, self.length)]
            if block.refs > 1 or block.key is not None:
                np.testing.assert_array_equal(block.data[:, : there.shape[1]], there)
            else:
                block.data[:, : there.shape[1]] = there

    def load(self) -> None:
        n = self.cache.block_tokens
        for i, block in enumerate(self.blocks):
            end = min((i + 1) * n, self.length)
            self.arrays[:, i * n : end] = block.data[:, : end - i * n]

    def fork(self, at: int | None = None) -> ModelSequence:
        at = self.length if at is None else at
        assert 0 <= at <= self.length
        self.store()
        child = self.cache.sequence(self.tenant)
        full, rest = divmod(at, self.cache.block_tokens)
        for block in self.blocks[:full]:
            block.refs += 1
            child.blocks.append(block)
        if rest:
            try:
                child.blocks.append(self.cache.copy(self.blocks[full]))
            except errors.PoolExhausted:
                child.close()
                raise
        child.length = at
        child.load()
        return child

    def match(self, tokens: Sequence[int], partial: bool = True) -> int:
        assert self.length == 0
        n, cache = self.cache.block_tokens, self.cache
        ids = tuple(tokens)
        while self.length + n < len(ids):
            block = cache.find((self.tenant, ids[: self.length + n]))
            if block is None:
                break
            cache.get(block)
            self.blocks.append(block)
            self.length += n
        best, most = None, 0
        for (tenant, key), block in cache.published():
            if tenant == self.tenant and key[:-n] == ids[: self.length]:
                same = 0
                for a, b in zip(ids[self.length : len(ids) - 1], key[-n:], strict=False):
                    if a != b:
                        break
                    same += 1
                if same > most:
                    best, most = block, same
        if partial and best is not None:
            cache.get(best)  # what is hit is not its own victim
            # where there is no room for the copy it is left out
            with contextlib.suppress(errors.PoolExhausted):
                self.blocks.append(cache.copy(best))
                self.length += most
            cache.put(best)
        self.load()
        return self.length

    def publish(self, tokens: Sequence[int]) -> None:
        assert len(tokens) == self.length
        self.store()
        n = self.cache.block_tokens
        for i in range(self.length // n):
            key = (self.tenant, tuple(tokens[: (i + 1) * n]))
            assert self.blocks[i].key in (None, key)
            self.cache.publish(self.blocks[i], key)

    def close(self) -> None:
        assert not self.closed
        self.store()
        self.truncate(0)
        self.closed = True
        self.cache.sequences.remove(self)


@dataclass
class ModelCache:
    """The cache."""

    layers: int
    heads: int
    dim: int
    max_tokens: int
    max_sequences: int
    limit: int
    page: int = 4096
    sequences: list[ModelSequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.planes, token = 2 * self.layers, self.heads * self.dim * 4
        assert self.page % token == 0
        self.block_tokens = max(8, self.page // token)
        self.block_bytes = self.block_tokens * token * self.planes
        self.room = -(-self.limit // CHUNK) * CHUNK // self.block_bytes
        self.count = self.copies = self.evictions = self.refused = 0
        self.index: dict[tuple[int, tuple[int, ...]], list[Block]] = {}
        self.cached: OrderedDict[int, Block] = OrderedDict()

    def sequence(self, tenant: int = 0) -> ModelSequence:
        assert len(self.sequences) < self.max_sequences
        self.sequences.append(ModelSequence(self, tenant))
        return self.sequences[-1]

    def info(self) -> Any:
        return ModelInfo(
            limit=-(-self.limit // CHUNK) * CHUNK,
            used=self.count * self.block_bytes,
            cached=len(self.cached) * self.block_bytes,
            copies=self.copies,
            evictions=self.evictions,
        )

    def extend(self, items: Sequence[tuple[Any, int]]) -> None:
        wanted = 0
        for seq, n in items:
            assert 0 < n <= self.max_tokens - seq.length
            wanted += -(-(seq.length + n) // self.block_tokens) - len(seq.blocks)
        if self.count - len(self.cached) + wanted > self.room:
            raise errors.PoolExhausted
        for seq, n in items:
            # as a partial match and a fork leave it: what is written next is nobody else's
            assert seq.length % self.block_tokens == 0 or seq.blocks[-1].refs == 1
            begin, seq.length = seq.length, seq.length + n
            while len(seq.blocks) * self.block_tokens < seq.length:
                seq.blocks.append(self.new())
            seq.arrays[:, begin : seq.length] = np.nan

    def new(self) -> Block:
        if self.count == self.room:
            if not self.cached:
                self.refused += 1
                raise errors.PoolExhausted
            self.evict()
        self.count += 1
        shape = (self.planes, self.block_tokens, self.heads, self.dim)
        return Block(np.full(shape, np.nan, np.float32))

    def copy(self, block: Block) -> Block:
        new = self.new()
        new.data[:] = block.data
        self.copies += 1
        return new

    def evict(self) -> None:
        _, block = self.cached.popitem(last=False)
        assert block.key is not None
        self.index[block.key].remove(block)
        if not self.index[block.key]:
            del self.index[block.key]
        self.count -= 1
        self.evictions += 1

    def get(self, block: Block) -> None:
        block.refs += 1
        self.cached.pop(id(block), None)

    def put(self, block: Block) -> None:
        block.refs -= 1
        if block.refs == 0 and block.key is not None:
            self.cached[id(block)] = block
        elif block.refs == 0:
            self.count -= 1

    def publish(self, block: Block, key: tuple[int, tuple[int, ...]]) -> None:
        if block.key is None:
            block.key = key
            self.index.setdefault(key, []).append(block)

    def find(self, key: tuple[int, tuple[int, ...]]) -> Block | None:
        blocks = self.index.get(key, [])
        return max(blocks, key=lambda block: block.refs, default=None)

    def published(self) -> list[tuple[tuple[int, tuple[int, ...]], Block]]:
        return [(key, blocks[0]) for key, blocks in self.index.items()]
