# SPDX-License-Identifier: MIT
"""One decode step's attention: over contiguous keys and values, and over gathered ones.

As many key/value heads as query heads (16 of 64, as in Qwen1.5 0.5B). Where queries
share them the same arithmetic is done on fewer bytes, and its instructions hide what
gathering takes: that is printed too and has no bound. fp32, because numpy has no fast
loops for fp16; and einsum() for both sides, which has the fewest instructions where
BLAS is the reference implementation, as in the guest.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
KV_HEADS = 16
DIM = 64
TOKENS = 4096
STEPS = 3


def attend(query: Floats, keys: Floats, values: Floats) -> Floats:
    """query: [group, kv_heads, dim]; keys, values: [tokens, kv_heads, dim] → as query."""
    result = np.empty_like(query)
    for q, out in zip(query, result, strict=True):
        scores = np.einsum("thd,hd->ht", keys, q)
        np.subtract(scores, scores.max(axis=1, keepdims=True), out=scores)
        np.exp(scores, out=scores)
        np.divide(scores, scores.sum(axis=1, keepdims=True), out=scores)
        np.einsum("ht,thd->hd", scores, values, out=out)
    return result


def fastest(step: Callable[[], Floats]) -> tuple[int, Floats]:
    """Nanoseconds of the fastest of some steps, and what it gives."""
    times = []
    for _ in range(STEPS):
        begin = time.perf_counter_ns()
        result = step()
        times.append(time.perf_counter_ns() - begin)
    return min(times), result


def pool(array: Floats, table: npt.NDArray[np.intp], block_tokens: int) -> Floats:
    """A pool of blocks twice as large as a sequence, which lies in it as its table says."""
    blocks = np.zeros((2 * len(table), block_tokens, *array.shape[1:]), np.float32)
    blocks[table] = array.reshape(len(table), block_tokens, *array.shape[1:])
    return blocks


def measure(keys: Floats, values: Floats, group: int, block_tokens: int) -> tuple[int, int]:
    """Nanoseconds of a layer's attention: on arrays as they are, and through a block table.

    Args:
        keys: [tokens, kv_heads, dim]; values: likewise.
        group: query heads for each of those.
        block_tokens: tokens of a block of the peer.

    Raises:
        SystemExit: the two do not agree.
    """
    rng = np.random.default_rng(1)
    query = rng.standard_normal((group, *keys.shape[1:]), np.float32) / np.float32(DIM**0.5)
    blocks = len(keys) // block_tokens
    # others use the pool too: a sequence's blocks lie anywhere in it
    table = rng.permutation(2 * blocks)[:blocks]
    key_pool, value_pool = (pool(array, table, block_tokens) for array in (keys, values))
    gathered = np.empty((2, blocks, block_tokens, *keys.shape[1:]), np.float32)

    def peer() -> Floats:
        # into memory that is there: fancy indexing does the same copy into fresh memory
        for out, blocks in zip(gathered, (key_pool, value_pool), strict=True):
            np.take(blocks, table, axis=0, out=out, mode="clip")
        return attend(query, gathered[0].reshape(keys.shape), gathered[1].reshape(values.shape))

    mine, result = fastest(lambda: attend(query, keys, values))
    theirs, expected = fastest(peer)
    if not np.array_equal(result, expected):
        raise SystemExit("attention: the two do not agree")
    return mine, theirs
