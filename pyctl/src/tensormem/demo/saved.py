# SPDX-License-Identifier: MIT
"""The demo model's KV of a text, kept in a file and taken up again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .. import errors
from ..client import Client
from ..kv import KVSequence
from ..kvfile import Progress
from ..safetensors import load_into
from .model import Config, Decoder, Model, encode
from .run import kv_cache, opened

__all__ = ["Restored", "Saved", "restore", "save"]


@dataclass(frozen=True)
class Saved:
    """What was saved.

    Attributes:
        tokens: tokens of the text.
        size: bytes of the file.
        fingerprint: of the model.
    """

    tokens: int
    size: int
    fingerprint: str


@dataclass(frozen=True)
class Restored:
    """What was taken up again.

    Attributes:
        prompt: the tokens of the file.
        tokens: how it goes on.
        reused: tokens of the prompt that were not computed again.
    """

    prompt: list[int]
    tokens: list[int]
    reused: int


def _fingerprint(path: os.PathLike[str]) -> str:
    """Return what the KV of a checkpoint depends on: every byte of it."""
    with open(path, "rb") as file:
        return f"tensormem-demo:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def save(
    client: Client,
    text: str,
    path: str | os.PathLike[str],
    *,
    checkpoint: str = "b",
    computing: Progress | None = None,
    saving: Progress | None = None,
) -> Saved:
    """Run the model over a text and save its KV.

    Args:
        client: where weights, scratch and KV live.
        text: the text.
        path: the file.
        checkpoint: ``a`` or ``b``.
        computing: called with the tokens done and to do.
        saving: called with the bytes done and to do.

    Raises:
        InvalidArgument: the text is empty, or longer than the context.
        TensormemError: the memory could not be had.
        OSError: the file cannot be written; an old one stays.
    """
    ids = encode(text)
    with opened(checkpoint) as (weights, config, _):
        _check(len(ids), 0, config)
        fingerprint = _fingerprint(weights)
        with kv_cache(client, config) as kv, kv.sequence() as seq:
            decoder = Decoder(load_into(client, weights), config, client, seq)
            for begin in range(0, len(ids), Model.ROWS):
                decoder.forward(ids[begin : begin + Model.ROWS])
                if computing is not None:
                    computing(seq.length, len(ids))
            seq.save(path, ids, fingerprint, saving)
    return Saved(len(ids), os.stat(path).st_size, fingerprint)


def restore(
    client: Client,
    path: str | os.PathLike[str],
    count: int,
    *,
    checkpoint: str = "b",
    checking: Progress | None = None,
    begin: Callable[[npt.NDArray[np.int64]], None] | None = None,
    each: Callable[[int], None] | None = None,
) -> Restored:
    """Take up a saved text and go on with it.

    Args:
        client: where weights, scratch and KV live.
        path: the file.
        count: tokens to generate.
        checkpoint: ``a`` or ``b``, as it was saved with.
        checking: called with the bytes checked and to check.
        begin: called with the tokens of the file, when it has been restored.
        each: called with every token as it comes.

    Raises:
        KVFileError: the file is damaged, or not of this model.
        InvalidArgument: it leaves no room in the context.
        TensormemError: the memory could not be had.
        OSError: the file cannot be read.
    """
    with opened(checkpoint) as (weights, config, _), kv_cache(client, config) as kv:
        seq, ids = kv.restore(path, _fingerprint(weights), progress=checking)
        with seq:
            _check(len(ids), count, config)
            if begin is not None:
                begin(ids)
            # what follows the last token is the model's output for it, which is not in the KV
            seq.truncate(len(ids) - 1)
            reused = seq.length
            tokens = _generate(client, weights, config, seq, ids, count, each)
    return Restored(ids.tolist(), tokens, reused)


def _generate(
    client: Client,
    weights: os.PathLike[str],
    config: Config,
    seq: KVSequence,
    ids: npt.NDArray[np.int64],
    count: int,
    each: Callable[[int], None] | None,
) -> list[int]:
    decoder = Decoder(load_into(client, weights), config, client, seq)
    tokens = []
    for token in decoder.generate(ids, count):
        tokens.append(token)
        if each is not None:
            each(token)
    return tokens


def _check(length: int, count: int, config: Config) -> None:
    if not 1 <= length <= config.context - count:
        raise errors.InvalidArgument(
            f"a text of {length} bytes and {count} tokens do not fit",
            f"they may have 1 to {config.context} bytes together",
        )
