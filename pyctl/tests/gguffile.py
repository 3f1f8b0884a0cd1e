# SPDX-License-Identifier: MIT
"""GGUF files to read: a writer that does what it is told, right or wrong."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tensormem import gguf

KINDS = {
    "u8": 0, "i8": 1, "u16": 2, "i16": 3, "u32": 4, "i32": 5, "f32": 6, "bool": 7, "str": 8,
    "array": 9, "u64": 10, "i64": 11, "f64": 12,
}  # fmt: skip
_FORMATS = {
    "u8": "B", "i8": "b", "u16": "H", "i16": "h", "u32": "I", "i32": "i", "f32": "f", "u64": "Q",
    "i64": "q", "f64": "d",
}  # fmt: skip
_NUMBERS = {kind.code: number for number, kind in gguf.TYPES.items()}


@dataclass(frozen=True)
class Array:
    """A metadata array: of which kind, and what is in it."""

    kind: str
    items: Sequence[Any]


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def value(kind: str, item: Any) -> bytes:
    if kind == "str":
        return string(item)
    if kind == "bool":
        return bytes([item])
    if kind == "array":
        items = b"".join(value(item.kind, x) for x in item.items)
        return struct.pack("<IQ", KINDS[item.kind], len(item.items)) + items
    return struct.pack("<" + _FORMATS[kind], item)


def pair(key: str | bytes, kind: str, item: Any) -> bytes:
    return string(key) + struct.pack("<I", KINDS[kind]) + value(kind, item)


def info(
    name: str | bytes, code: str | int, shape: Sequence[int], offset: int, dims: int | None = None
) -> bytes:
    number = _NUMBERS[code] if isinstance(code, str) else code
    count = len(shape) if dims is None else dims
    ne = b"".join(struct.pack("<Q", n) for n in reversed(shape))
    return string(name) + struct.pack("<I", count) + ne + struct.pack("<IQ", number, offset)


def pack(
    pairs: Sequence[bytes] = (),
    infos: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    alignment: int = 32,
    tensors: int | None = None,
    count: int | None = None,
    magic: bytes = b"GGUF",
) -> bytes:
    tensors = len(infos) if tensors is None else tensors
    count = len(pairs) if count is None else count
    raw = magic + struct.pack("<IQQ", version, tensors, count) + b"".join([*pairs, *infos])
    return raw + bytes(-len(raw) % alignment) + data


def model(
    arrays: dict[str, tuple[str, tuple[int, ...], bytes]],
    pairs: Sequence[bytes] = (),
    *,
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    """Make a file of tensors: name -> code, shape and bytes."""
    infos, data = [], b""
    for name, (code, shape, raw) in arrays.items():
        data += bytes(-len(data) % alignment)
        infos.append(info(name, code, shape, len(data)))
        data += raw
    return pack(pairs, infos, data, version=version, alignment=alignment)


def of(array: np.ndarray[Any, Any], code: str | None = None) -> tuple[str, tuple[int, ...], bytes]:
    """Return what :func:`model` takes for a plain array."""
    codes = {t.dtype: t.code for t in gguf.TYPES.values() if t.block == 1 and t.code != "BF16"}
    return code or codes[array.dtype], array.shape, array.tobytes()
