# SPDX-License-Identifier: MIT
"""The demo run: one model twice, on tensor memory and on ordinary numpy memory."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .. import errors, system
from ..client import Client, TensorInfo
from ..kv import KVCache, KVGroup
from ..safetensors import SafetensorsError, load, load_into, read_header
from . import CHECKPOINTS, PROMPT, TOKENS
from .model import Config, Decoder, HeapMemory, decode, encode

__all__ = ["CHECKPOINTS", "PROMPT", "TOKENS", "Holding", "Result", "run", "text"]


@dataclass(frozen=True)
class Holding:
    """What one kind of memory held in one pool.

    Attributes:
        kind: ``weights``, ``kv`` or ``activations``.
        pool: ``chunk``, ``buddy``, ``slab`` or ``kv``.
        tensors: number of tensors; of sequences in the kv pool.
        size: bytes asked for.
        held: bytes of memory they took.
        chunks: whole chunks.
        runs: runs of pages; blocks in the kv pool.
    """

    kind: str
    pool: str
    tensors: int
    size: int
    held: int
    chunks: int
    runs: int


@dataclass(frozen=True)
class Result:
    """What came out.

    Attributes:
        checkpoint: ``a`` or ``b``.
        config: the shape of the model.
        metadata: what the file says about its training.
        prompt: the text it began with.
        tokens: what the model on tensor memory made of it.
        expected: what the model on numpy memory made of it.
        speed: tokens per second on tensor memory, of the median token.
        numpy_speed: the same on numpy memory.
        holdings: what each kind held, while both runs were alive.
        pools: the pools of the whole machine at that moment; None without sysfs.
    """

    checkpoint: str
    config: Config
    metadata: dict[str, str]
    prompt: str
    tokens: list[int]
    expected: list[int]
    speed: float
    numpy_speed: float
    holdings: list[Holding]
    pools: system.Status | None = None

    @property
    def text(self) -> str:
        """The continuation."""
        return decode(self.tokens)

    @property
    def first_difference(self) -> int | None:
        """The first position where the two runs differ, or None."""
        for i, (ours, theirs) in enumerate(zip(self.tokens, self.expected, strict=True)):
            if ours != theirs:
                return i
        return None


def text() -> str:
    """Return the text that the model was fitted to."""
    return (files(__package__) / "text.txt").read_text("utf-8")


@contextlib.contextmanager
def opened(checkpoint: str) -> Iterator[tuple[Path, Config, dict[str, str]]]:
    """Give the path, the config and the metadata of a checkpoint.

    Raises:
        SafetensorsError: it is damaged.
    """
    with as_file(files(__package__) / f"demo-{checkpoint}.safetensors") as path:
        metadata = read_header(path).metadata
        try:
            config = Config.from_json(metadata.get("config", ""))
        except ValueError as error:
            raise SafetensorsError(str(path), None, "__metadata__", f"config: {error}") from None
        yield path, config, metadata


def token_bytes(config: Config) -> int:
    """Return the bytes of a token's keys and values in all layers."""
    return 2 * config.layers * config.kv_heads * config.head_dim * 4


def kv_cache(
    client: Client, config: Config, *, max_sequences: int = 1, limit: int | None = None
) -> KVCache:
    """Make a KV cache of the model's shape; ``limit`` as for ``client.kv_cache``."""
    group = KVGroup(config.layers, config.kv_heads, config.head_dim, np.float32)
    return client.kv_cache(
        [group], max_tokens=config.context, max_sequences=max_sequences, limit=limit
    )


def _holdings(tensors: Iterable[TensorInfo]) -> list[Holding]:
    order = ["weights", "kv", "activations", "protocol"]
    groups: dict[tuple[str, str], list[TensorInfo]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.kind, tensor.pool), []).append(tensor)
    return [
        Holding(
            kind,
            pool,
            len(members),
            sum(t.size for t in members),
            sum(t.held for t in members),
            sum(t.chunks for t in members),
            sum(t.runs for t in members),
        )
        for (kind, pool), members in sorted(
            groups.items(), key=lambda item: (order.index(item[0][0]), item[0][1])
        )
    ]


def _kv_holding(cache: KVCache, config: Config, tokens: int) -> Holding:
    info, each = cache.info(), token_bytes(config)
    blocks = info.used // (info.block_tokens * each)
    return Holding("kv", "kv", info.sequences, tokens * each, info.used, 0, blocks)


def _timed(
    decoder: Decoder, prompt: npt.NDArray[np.int64], count: int, each: Callable[[int], None] | None
) -> tuple[list[int], float]:
    """Generate, and return the tokens and the tokens per second.

    The speed is that of the median token: what an emulator or a cold cache costs
    at the start does not count, nor does the prompt.
    """
    tokens: list[int] = []
    times: list[float] = []
    begin = time.perf_counter()
    for token in decoder.generate(prompt, count):
        times.append(time.perf_counter() - begin)
        tokens.append(token)
        if each is not None:
            each(token)
        begin = time.perf_counter()
    return tokens, 1 / max(statistics.median(times[1:] or times), 1e-9)


def run(
    client: Client,
    *,
    checkpoint: str = "b",
    prompt: str = PROMPT,
    count: int = TOKENS,
    each: Callable[[int], None] | None = None,
) -> Result:
    """Generate with the model on the client's memory, then again on numpy's.

    Args:
        client: where weights, KV cache and activations live.
        checkpoint: ``a`` or ``b``.
        prompt: the text to continue.
        count: tokens (bytes) to generate.
        each: called with every token of the first run as it comes.

    Raises:
        InvalidArgument: an empty prompt, or one that leaves no room in the context.
        SafetensorsError: the checkpoint is damaged.
        TensormemError: the memory could not be had.
    """
    ids = encode(prompt)
    with opened(checkpoint) as (path, config, metadata):
        if not len(ids) >= 1 or len(ids) + count > config.context:
            raise errors.InvalidArgument(
                f"a prompt of {len(ids)} bytes and {count} tokens do not fit",
                f"they may have 1 to {config.context} bytes together",
            )
        weights, theirs = load_into(client, path), Decoder(load(path), config, HeapMemory())
    with kv_cache(client, config) as cache, cache.sequence() as seq:
        ours = Decoder(weights, config, client, kv=seq)
        tokens, speed = _timed(ours, ids, count, each)
        expected, numpy_speed = _timed(theirs, ids, count, None)
        pools = None
        with contextlib.suppress(errors.NotAvailable):
            pools = system.read()
        holdings = _holdings(client.tensors())
        holdings.insert(1, _kv_holding(cache, config, seq.length))
    return Result(
        checkpoint=checkpoint,
        config=config,
        metadata=metadata,
        prompt=prompt,
        tokens=tokens,
        expected=expected,
        speed=speed,
        numpy_speed=numpy_speed,
        holdings=holdings,
        pools=pools,
    )
