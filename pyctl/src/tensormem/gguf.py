# SPDX-License-Identifier: MIT
"""A small, strict reader of GGUF headers, versions 2 and 3, little endian.

A file is: ``GGUF``, the version, how many tensors and how many metadata there are; the
metadata (key, type, value); for each tensor its name, dimensions, type and offset;
and from the next multiple of ``general.alignment`` on the data. This follows the GGUF
specification and the block layouts of the ggml project. The reader believes nothing:
every count and length is held against the bytes that are left, what it may
allocate is bounded, and every complaint names the file, the tensor or key, and the field.

Shapes are numpy's: the dimension that lies contiguous in memory comes last, and first in
the file. Quantized types come as blocks, see :data:`TYPES`; :func:`dequantize` knows two.
"""

from __future__ import annotations

import io
import math
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import InvalidArgument, ModelFileError
from .safetensors import bf16_to_float32

__all__ = [
    "ALIGNMENT",
    "MAGIC",
    "MAX_COUNT",
    "MAX_DEPTH",
    "MAX_HEADER",
    "MAX_STRINGS",
    "TYPES",
    "Entry",
    "GGUFError",
    "Header",
    "Type",
    "dequantize",
    "parse_header",
    "read_header",
]

MAGIC = b"GGUF"

#: Where data begins, and each tensor of it, unless ``general.alignment`` says otherwise.
ALIGNMENT = 32

#: Most bytes before the data. Large vocabularies take about ten million.
MAX_HEADER = 100_000_000

#: Most tensors, most metadata, and most arrays inside of arrays.
MAX_COUNT = 1 << 16

#: Most strings in arrays. Large vocabularies have less than a million, with their merges.
MAX_STRINGS = 1 << 22

#: How deep arrays may be nested.
MAX_DEPTH = 4

_MAX_DATA = (1 << 63) - 1
_MAX_KEY = 65535
_MAX_DIMS = 4
_STEP = 1 << 20


class GGUFError(ModelFileError):
    """A file is not valid GGUF.

    Attributes:
        path: the file.
        tensor: the tensor whose entry is wrong, or None.
        field: the part that is wrong, as the specification calls it: ``magic``, ``version``,
            ``tensor_count``, ``metadata_kv_count``, ``metadata_kv[2].key``,
            ``metadata 'general.name'``, ``tensor_infos[0].name``, ``n_dimensions``,
            ``dimensions``, ``type``, ``offset``.
    """

    default_remedy = "fetch or write the file again; it is damaged or not GGUF"


@dataclass(frozen=True)
class Type:
    """What a tensor is made of.

    Attributes:
        code: its name.
        block: numbers in a block, side by side; 1 for plain types.
        size: bytes of a block.
        dtype: what numpy makes of a block; ``uint8`` where it has no better idea, and the
            array then has one more dimension, of ``size``.
    """

    code: str
    block: int
    size: int
    dtype: np.dtype[Any]


def _plain(code: str, dtype: str) -> Type:
    return Type(code, 1, np.dtype(dtype).itemsize, np.dtype(dtype))


def _raw(code: str, block: int, size: int) -> Type:
    return Type(code, block, size, np.dtype(np.uint8))


_Q8_0 = Type("Q8_0", 32, 34, np.dtype([("d", "<f2"), ("qs", "i1", (32,))]))
_Q4_0 = Type("Q4_0", 32, 18, np.dtype([("d", "<f2"), ("qs", "u1", (16,))]))

#: The types, by their numbers. ``Q8_0`` and ``Q4_0`` are structs of the scale ``d`` and the
#: numbers ``qs``; of ``Q4_0`` the low halves of 16 bytes come before the high ones. Those that
#: ggml has for intermediate results only (Q8_1, Q8_K) are in no file.
TYPES: dict[int, Type] = {
    0: _plain("F32", "<f4"),
    1: _plain("F16", "<f2"),
    2: _Q4_0,
    3: _raw("Q4_1", 32, 20),
    6: _raw("Q5_0", 32, 22),
    7: _raw("Q5_1", 32, 24),
    8: _Q8_0,
    10: _raw("Q2_K", 256, 84),
    11: _raw("Q3_K", 256, 110),
    12: _raw("Q4_K", 256, 144),
    13: _raw("Q5_K", 256, 176),
    14: _raw("Q6_K", 256, 210),
    16: _raw("IQ2_XXS", 256, 66),
    17: _raw("IQ2_XS", 256, 74),
    18: _raw("IQ3_XXS", 256, 98),
    19: _raw("IQ1_S", 256, 50),
    20: _raw("IQ4_NL", 32, 18),
    21: _raw("IQ3_S", 256, 110),
    22: _raw("IQ2_S", 256, 82),
    23: _raw("IQ4_XS", 256, 136),
    24: _plain("I8", "i1"),
    25: _plain("I16", "<i2"),
    26: _plain("I32", "<i4"),
    27: _plain("I64", "<i8"),
    28: _plain("F64", "<f8"),
    29: _raw("IQ1_M", 256, 56),
    30: _plain("BF16", "<u2"),
    34: _raw("TQ1_0", 256, 54),
    35: _raw("TQ2_0", 256, 66),
    39: _raw("MXFP4", 32, 17),
    40: _raw("NVFP4", 64, 36),
    41: _raw("Q1_0", 128, 18),
}

_BY_CODE = {kind.code: kind for kind in TYPES.values()}

#: Scalars of metadata by number; 7 is a bool, 8 a string, 9 an array.
_SCALARS: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_BOOL, _STRING, _ARRAY, _U32 = 7, 8, 9, 4


@dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Attributes:
        name: its name.
        code: its type, one of :data:`TYPES`.
        shape: its dimensions in numbers, the contiguous one last; empty for a scalar.
        start: first byte, counted from the start of the data.
        stop: one past the last byte.
    """

    name: str
    code: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy dtype of a number or a block (``uint16`` for BF16)."""
        return _BY_CODE[self.code].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return self.stop - self.start

    def view(self, data: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        """Return the array that these bytes of the tensor are, without a copy.

        A quantized one has a block where :attr:`shape` has ``block`` numbers.
        """
        kind = _BY_CODE[self.code]
        if kind.block == 1:
            return data.view(kind.dtype).reshape(self.shape)
        blocks = (*self.shape[:-1], self.shape[-1] // kind.block)
        if kind.dtype.itemsize == 1:
            return data.reshape(*blocks, kind.size)
        return data.view(kind.dtype).reshape(blocks)


@dataclass(frozen=True)
class Header:
    """What a file holds.

    Attributes:
        entries: the tensors, in the order of their data.
        metadata: key -> int, float, bool or str; for arrays a numpy array of numbers or bools,
            or a list of strings or arrays.
        data_start: where the data begins in the file, in bytes.
        data_size: bytes from there to the end.
        version: 2 or 3.
        alignment: what places are multiples of.
    """

    entries: tuple[Entry, ...]
    metadata: dict[str, Any] = field(compare=False)
    data_start: int
    data_size: int
    version: int
    alignment: int


def _short(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= 60 else shown[:57] + "..."


class _Cursor:
    """Reads a file from its beginning; holds what the header may allocate to its bounds."""

    def __init__(self, path: str, file: io.BufferedIOBase | io.RawIOBase) -> None:
        self.path, self.file = path, file
        self.size = file.seek(0, os.SEEK_END)
        file.seek(0)
        self.buffer = bytearray()
        self.position = 0
        self.strings = self.arrays = 0
        self.tensor: str | None = None

    def bad(self, field: str, what: str) -> GGUFError:
        return GGUFError(self.path, self.tensor, field, what)

    def left(self) -> int:
        return self.size - self.position

    def take(self, count: int, field: str) -> int:
        """Make so many bytes readable in the buffer and return where they begin."""
        begin, end = self.position, self.position + count
        if count > self.left():
            raise self.bad(field, f"takes {count} bytes; the file has {self.left()} left")
        if end > MAX_HEADER:
            raise self.bad(field, f"the header is longer than {MAX_HEADER} bytes")
        while len(self.buffer) < end:
            step = bytearray(min(_STEP, self.size - len(self.buffer)))
            got = self.file.readinto(step)
            if not got:
                raise self.bad(field, f"the file ended after {len(self.buffer)} bytes")
            self.buffer += step[:got]
        self.position = end
        return begin

    def u32(self, field: str) -> int:
        return int(struct.unpack_from("<I", self.buffer, self.take(4, field))[0])

    def u64(self, field: str) -> int:
        return int(struct.unpack_from("<Q", self.buffer, self.take(8, field))[0])

    def count(self, field: str, most: int, least_size: int) -> int:
        """Read how many of something there are: it has to be possible and allowed."""
        count = self.u64(field)
        if count > self.left() // least_size:
            raise self.bad(field, f"is {count}; the file has {self.left()} bytes left")
        if count > most:
            raise self.bad(field, f"is {count}; at most {most} are allowed")
        return count

    def string(self, field: str) -> str:
        length = self.u64(field)
        if length > self.left():
            raise self.bad(field, f"a string of {length} bytes; the file has {self.left()} left")
        begin = self.take(length, field)
        try:
            return str(memoryview(self.buffer)[begin : begin + length], "utf-8")
        except UnicodeDecodeError as error:
            raise self.bad(field, f"is not UTF-8 at its byte {error.start}") from None

    def value(self, kind: int, field: str, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.string(field)
        if kind == _BOOL:
            byte = self.buffer[self.take(1, field)]
            if byte > 1:
                raise self.bad(field, f"a bool of {byte} is neither 0 nor 1")
            return bool(byte)
        if kind == _ARRAY:
            return self.array(field, depth)
        if kind not in _SCALARS:
            raise self.bad(field, f"has the unknown type {kind}")
        dtype = _SCALARS[kind]
        begin = self.take(dtype.itemsize, field)
        return np.frombuffer(self.buffer, dtype, 1, begin)[0].item()

    def array(self, field: str, depth: int) -> Any:
        if depth == MAX_DEPTH:
            raise self.bad(field, f"arrays are nested deeper than {MAX_DEPTH}")
        kind = self.u32(field)
        if kind in _SCALARS or kind == _BOOL:
            return self.numbers(kind, field)
        if kind == _STRING:
            count = self.count(field, MAX_STRINGS - self.strings, 8)
            self.strings += count
            return [self.string(field) for _ in range(count)]
        if kind != _ARRAY:
            raise self.bad(field, f"an array of the unknown type {kind}")
        count = self.count(field, MAX_COUNT - self.arrays, 12)
        self.arrays += count
        return [self.array(field, depth + 1) for _ in range(count)]

    def numbers(self, kind: int, field: str) -> npt.NDArray[Any]:
        dtype = _SCALARS.get(kind, np.dtype(np.uint8))
        count = self.count(field, MAX_HEADER, dtype.itemsize)
        begin = self.take(count * dtype.itemsize, field)
        array = np.frombuffer(self.buffer, dtype, count, begin).copy()
        if kind != _BOOL:
            return array
        if bool((array > 1).any()):
            raise self.bad(field, "a bool is neither 0 nor 1")
        return array.view(np.bool_)


def _metadata(cursor: _Cursor, count: int) -> tuple[dict[str, Any], int]:
    """Return the metadata and the alignment."""
    metadata: dict[str, Any] = {}
    alignment = ALIGNMENT
    for number in range(count):
        field = f"metadata_kv[{number}].key"
        key = cursor.string(field)
        if len(key.encode()) > _MAX_KEY:
            raise cursor.bad(field, f"has more than {_MAX_KEY} bytes")
        if key in metadata:
            raise cursor.bad(field, f"{_short(key)} is there twice")
        field = f"metadata {_short(key)}"
        kind = cursor.u32(field)
        metadata[key] = cursor.value(kind, field)
        if key == "general.alignment":
            alignment = metadata[key]
            if kind != _U32:
                raise cursor.bad(field, "is not a uint32")
            if not alignment or alignment & (alignment - 1):
                raise cursor.bad(field, f"is {alignment}, not a power of two")
    return metadata, alignment


def _entry(cursor: _Cursor, number: int, alignment: int) -> Entry:
    cursor.tensor = None
    field = f"tensor_infos[{number}].name"
    name = cursor.string(field)
    if len(name.encode()) > _MAX_KEY:
        raise cursor.bad(field, f"has more than {_MAX_KEY} bytes")
    cursor.tensor = name
    count = cursor.u32("n_dimensions")
    if count > _MAX_DIMS:
        raise cursor.bad("n_dimensions", f"is {count}; at most {_MAX_DIMS} are possible")
    shape = tuple(cursor.u64("dimensions") for _ in range(count))[::-1]
    number = cursor.u32("type")
    if number not in TYPES:
        raise cursor.bad("type", f"{number} is unknown")
    kind = TYPES[number]
    if kind.block > 1 and (not shape or shape[-1] % kind.block):
        raise cursor.bad(
            "dimensions", f"rows of {shape[-1] if shape else 1} are not blocks of {kind.block}"
        )
    # numpy refuses a shape whose non-zero dimensions overflow even where another one is 0
    if math.prod(n for n in shape if n) // kind.block * kind.size > _MAX_DATA:
        raise cursor.bad("dimensions", f"{list(shape)} of {kind.code} overflow 63 bits")
    size = math.prod(shape) // kind.block * kind.size
    start = cursor.u64("offset")
    if start % alignment:
        raise cursor.bad("offset", f"{start} is not a multiple of {alignment}")
    return Entry(name, kind.code, shape, start, start + size)


def _place(bad: Callable[[str, str, str], GGUFError], entries: list[Entry], size: int) -> None:
    """Check that the tensors have places of their own in the data."""
    seen: set[str] = set()
    end = 0
    for entry in entries:
        if entry.name in seen:
            raise bad(entry.name, "name", "is there twice")
        seen.add(entry.name)
        if entry.stop > size:
            what = f"[{entry.start}, {entry.stop}] is past the end: {size} bytes of data"
            raise bad(entry.name, "offset", what)
        if entry.start < end and entry.nbytes:
            what = f"[{entry.start}, {entry.stop}] overlaps the tensor before it, up to {end}"
            raise bad(entry.name, "offset", what)
        end = max(end, entry.stop)


def parse_header(path: str, file: io.BufferedIOBase | io.RawIOBase) -> Header:
    """Read and check the header of an open file; see :func:`read_header`."""
    cursor = _Cursor(path, file)
    begin = cursor.take(4, "magic")
    if cursor.buffer[begin : begin + 4] != MAGIC:
        raise cursor.bad("magic", f"is {bytes(cursor.buffer[:4])!r}, not {MAGIC!r}")
    version = cursor.u32("version")
    if version and not version & 0xFFFF:
        raise cursor.bad("version", "the file is big endian")
    if version not in (2, 3):
        raise cursor.bad("version", f"is {version}; 2 and 3 are known")
    # the least that an entry takes: a name, no dimensions, a type and an offset
    tensors = cursor.count("tensor_count", MAX_COUNT, 24)
    pairs = cursor.count("metadata_kv_count", MAX_COUNT, 13)
    metadata, alignment = _metadata(cursor, pairs)
    entries = [_entry(cursor, number, alignment) for number in range(tensors)]
    entries.sort(key=lambda e: (e.start, e.stop))
    start = -(-cursor.position // alignment) * alignment
    size = max(0, cursor.size - start)
    _place(lambda name, field, what: GGUFError(path, name, field, what), entries, size)
    return Header(tuple(entries), metadata, start, size, version, alignment)


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of a file; the data is not read.

    Raises:
        GGUFError: the file is damaged or not GGUF.
        OSError: the file cannot be opened or read.
    """
    with open(path, "rb", buffering=0) as file:
        return parse_header(os.fspath(path), file)


def dequantize(array: npt.NDArray[Any], code: str) -> npt.NDArray[np.float32]:
    """Return a tensor's numbers as float32.

    Args:
        array: as :meth:`Entry.view` gives it.
        code: its type: ``Q8_0``, ``Q4_0``, ``F16``, ``BF16``, ``F64`` or ``F32``, which is
            returned as it is.

    Raises:
        InvalidArgument: another type.
    """
    if code == "F32":
        return array
    if code == "BF16":
        return bf16_to_float32(array)
    if code in ("F16", "F64"):
        return array.astype(np.float32)
    if code == "Q8_0":
        numbers = array["qs"].astype(np.float32)
    elif code == "Q4_0":
        halves = array["qs"]
        both = np.concatenate([halves & 15, halves >> 4], axis=-1)
        numbers = both.astype(np.float32) - np.float32(8)
    else:
        raise InvalidArgument(
            f"{code} is a type that this package cannot widen", "take its blocks as they are"
        )
    numbers *= array["d"].astype(np.float32)[..., None]
    return numbers.reshape(*array.shape[:-1], array.shape[-1] * 32)
