# SPDX-License-Identifier: MIT
"""One decode step's attention: over contiguous keys and values, and over gathered ones.

TinyLlama's shape (32 query heads, 4 key/value heads of 64) in fp32: numpy has no BLAS
for fp16, whose loops would hide everything else.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
HEADS, KV_HEADS, DIM = 32, 4, 64
TOKENS = 4096
LAYERS = 2
STEPS = 3


def attend(query: Floats, keys: Floats, values: Floats) -> Floats:
    """query: [heads, dim]; keys, values: [tokens, kv_heads, dim] → [heads, dim]."""
    grouped = query.reshape(KV_HEADS, HEADS // KV_HEADS, DIM)
    scores = np.matmul(grouped, keys.transpose(1, 2, 0))
    np.subtract(scores, scores.max(axis=2, keepdims=True), out=scores)
    np.exp(scores, out=scores)
    np.divide(scores, scores.sum(axis=2, keepdims=True), out=scores)
    return np.matmul(scores, values.transpose(1, 0, 2)).reshape(HEADS, DIM)


def fastest(step: Callable[[], list[Floats]]) -> tuple[float, list[Floats]]:
    """Nanoseconds of the fastest of some steps, and what it gives."""
    times = []
    for _ in range(STEPS):
        begin = time.perf_counter_ns()
        result = step()
        times.append(time.perf_counter_ns() - begin)
    return min(times), result


def measure(keys: list[Floats], values: list[Floats], block_tokens: int) -> tuple[float, float]:
    """Nanoseconds of a step on arrays as they are, and through a block table.

    Args:
        keys: one array of [tokens, kv_heads, dim] for each layer; values: likewise.
        block_tokens: tokens of a block of the peer.
    """
    rng = np.random.default_rng(1)
    queries = rng.standard_normal((len(keys), HEADS, DIM), np.float32) / np.float32(DIM**0.5)
    blocks = TOKENS // block_tokens
    # a pool that others share: a sequence's blocks lie anywhere in it
    table = rng.permutation(2 * blocks)[:blocks]
    pools = []
    for arrays in (keys, values):
        for array in arrays:
            pool = np.zeros((2 * blocks, block_tokens, KV_HEADS, DIM), np.float32)
            pool[table] = array.reshape(blocks, block_tokens, KV_HEADS, DIM)
            pools.append(pool)
    key_pools, value_pools = pools[: len(keys)], pools[len(keys) :]
    gathered = (TOKENS, KV_HEADS, DIM)

    def ours() -> list[Floats]:
        return [attend(q, k, v) for q, k, v in zip(queries, keys, values, strict=True)]

    def peer() -> list[Floats]:
        return [
            attend(q, k[table].reshape(gathered), v[table].reshape(gathered))
            for q, k, v in zip(queries, key_pools, value_pools, strict=True)
        ]

    mine, result = fastest(ours)
    theirs, expected = fastest(peer)
    if not all(map(np.array_equal, result, expected)):
        raise SystemExit("attention: the two do not agree")
    return mine, theirs
