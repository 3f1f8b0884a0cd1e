# SPDX-License-Identifier: MIT
"""A small, strict reader and writer of safetensors files.

A file is: 8 bytes with the length of the header (little endian), the header (a
JSON object: name -> dtype, shape, data_offsets; plus an optional
``__metadata__`` object of strings), and the data. The reader believes nothing:
whatever the header says is checked before a byte of data is touched, and every
complaint names the file, the tensor and the field.

``BF16`` has no numpy type. Such tensors come as ``uint16`` bit patterns;
:func:`bf16_to_float32` widens them.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import io
import json
import math
import os
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .errors import ModelFileError

if TYPE_CHECKING:
    from .client import Client, Nodes

__all__ = [
    "CODES",
    "DTYPES",
    "MAX_HEADER",
    "Entry",
    "Header",
    "SafetensorsError",
    "bf16_to_float32",
    "encode_header",
    "load",
    "load_into",
    "parse_header",
    "read_header",
    "replacing",
    "save",
]

#: Most bytes a header may have, the limit of the reference implementation.
MAX_HEADER = 100_000_000

#: Most bytes the data of one file may have; keeps every sum inside 64 bits.
MAX_DATA = (1 << 63) - 1

#: What numpy makes of each dtype of the format.
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}

#: The dtype of the format for each numpy dtype that it has.
CODES = {dtype: name for name, dtype in DTYPES.items() if name != "BF16"}

#: What a file is called until it is complete; nobody else's files end so.
_UNFINISHED = ".tensormem-part"

_FIELDS = {"dtype", "shape", "data_offsets"}


class SafetensorsError(ModelFileError):
    """A file is not valid safetensors.

    Attributes:
        path: the file.
        tensor: the tensor whose entry is wrong, or None.
        field: the part that is wrong: ``length``, ``header``, ``name``,
            ``__metadata__``, ``dtype``, ``shape``, ``data_offsets`` or ``data``.
    """

    default_remedy = "fetch or write the file again; it is damaged or not safetensors"


@dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Attributes:
        name: its name.
        code: the dtype as the file spells it, a key of :data:`DTYPES`.
        shape: its dimensions; empty for a scalar.
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
        """The numpy dtype (``uint16`` for BF16)."""
        return DTYPES[self.code]

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return self.stop - self.start

    def view(self, data: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        """Return the array that these bytes of the tensor are, without a copy."""
        return data.view(self.dtype).reshape(self.shape)


@dataclass(frozen=True)
class Header:
    """What a file holds.

    Attributes:
        entries: the tensors, in the order of their data.
        metadata: the ``__metadata__`` object; empty when there is none.
        data_start: where the data begins in the file, in bytes.
        data_size: bytes of data.
    """

    entries: tuple[Entry, ...]
    metadata: dict[str, str]
    data_start: int
    data_size: int


class _Duplicate(Exception):
    pass


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _Duplicate(key)
        result[key] = value
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _is_size(value: object) -> bool:
    # bool is an int to isinstance, and true is not a size
    return type(value) is int and value >= 0


def _is_text(text: str) -> bool:
    # JSON can spell half of a surrogate pair, which no text has and nobody can print
    return text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)


def _entry(path: str, name: str, value: Any) -> Entry:
    def bad(field: str, what: str) -> SafetensorsError:
        return SafetensorsError(path, name, field, what)

    if not _is_text(name):
        raise bad("name", "is not Unicode text")
    if not isinstance(value, dict):
        raise bad("header", f"is {type(value).__name__}, not an object")
    for field in ("dtype", "shape", "data_offsets"):
        if field not in value:
            raise bad(field, "is missing")
    extra = sorted(value.keys() - _FIELDS)
    if extra:
        raise bad("header", f"has an unknown field {extra[0]!r}")

    code, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise bad("dtype", f"{code!r} is unknown; known are {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(_is_size(n) for n in shape):
        raise bad("shape", f"{_short(shape)} is not a list of sizes (integers from 0)")
    if len(shape) > 32:
        raise bad("shape", f"has {len(shape)} dimensions; numpy takes at most 32")
    # numpy refuses a shape whose non-zero dimensions overflow even where another one is 0
    if math.prod(n for n in shape if n) * DTYPES[code].itemsize > MAX_DATA:
        raise bad("shape", f"{_short(shape)} of {code} overflows 63 bits")
    size = math.prod(shape) * DTYPES[code].itemsize
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(n) for n in offsets):
        raise bad("data_offsets", f"{_short(offsets)} is not [start, stop] in bytes from 0")
    start, stop = offsets
    if stop > MAX_DATA:
        raise bad("data_offsets", f"{_short(offsets)} overflows 63 bits")
    if start > stop:
        raise bad("data_offsets", f"{_short(offsets)} ends before it starts")
    if stop - start != size:
        raise bad(
            "data_offsets",
            f"{_short(offsets)} has {stop - start} bytes; shape {_short(shape)} of {code}"
            f" takes {size}",
        )
    return Entry(name, code, tuple(shape), start, stop)


def _short(value: object) -> str:
    try:
        text = json.dumps(value)
    except ValueError:  # an integer with more digits than Python prints
        text = "a number beyond all bounds"
    return text if len(text) <= 60 else text[:57] + "..."


def _metadata(path: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise SafetensorsError(path, None, "__metadata__", "is not an object of strings")
    for key, text in value.items():
        if not isinstance(text, str):
            raise SafetensorsError(
                path, None, "__metadata__", f"{key!r} is {type(text).__name__}, not a string"
            )
        if not (_is_text(key) and _is_text(text)):
            raise SafetensorsError(path, None, "__metadata__", f"{key!r} is not Unicode text")
    return value


def _parse(path: str, raw: bytes, data_size: int) -> tuple[tuple[Entry, ...], dict[str, str]]:
    def bad(field: str, what: str) -> SafetensorsError:
        return SafetensorsError(path, None, field, what)

    if raw[:1] != b"{":
        raise bad("header", "does not begin with '{'")
    try:
        top = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant
        )
    except _Duplicate as dup:
        raise bad("header", f"has the key {dup.args[0]!r} twice") from None
    except UnicodeDecodeError as error:
        raise bad("header", f"is not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise bad("header", "is nested too deeply") from None
    except ValueError as error:
        raise bad("header", f"is not JSON: {error}") from None

    metadata = _metadata(path, top.pop("__metadata__")) if "__metadata__" in top else {}
    entries = sorted(
        (_entry(path, name, value) for name, value in top.items()),
        key=lambda e: (e.start, e.stop),
    )
    position = 0
    for entry in entries:
        if entry.start != position:
            what = "overlaps the tensor before it" if entry.start < position else "leaves a hole"
            raise SafetensorsError(
                path,
                entry.name,
                "data_offsets",
                f"[{entry.start}, {entry.stop}] {what}: expected a start of {position}",
            )
        position = entry.stop
        if position > data_size:
            raise SafetensorsError(
                path,
                entry.name,
                "data_offsets",
                f"[{entry.start}, {entry.stop}] is past the end: the file has {data_size} bytes"
                " of data",
            )
    if position != data_size:
        raise bad("data", f"the file has {data_size} bytes of data; the header names {position}")
    return tuple(entries), metadata


def parse_header(path: str, file: io.BufferedIOBase | io.RawIOBase) -> Header:
    """Read and check the header of an open file; see :func:`read_header`."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    prefix = _read_exactly(path, file, 8, "length") if size >= 8 else b""
    if len(prefix) != 8:
        raise SafetensorsError(path, None, "length", f"the file has {size} bytes, less than 8")
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER:
        raise SafetensorsError(
            path, None, "length", f"a header of {length} bytes; at most {MAX_HEADER} are allowed"
        )
    if length > size - 8:
        raise SafetensorsError(
            path, None, "length", f"a header of {length} bytes; the file has {size - 8} left"
        )
    raw = _read_exactly(path, file, length, "header")
    entries, metadata = _parse(path, raw, size - 8 - length)
    return Header(entries, metadata, 8 + length, size - 8 - length)


def _read_exactly(
    path: str, file: io.BufferedIOBase | io.RawIOBase, count: int, field: str
) -> bytes:
    data = bytearray(count)
    _read_into(path, file, None, field, memoryview(data))
    return bytes(data)


def _read_into(
    path: str,
    file: io.BufferedIOBase | io.RawIOBase,
    tensor: str | None,
    field: str,
    target: memoryview,
) -> None:
    done = 0
    while done < len(target):
        count = file.readinto(target[done:])
        if not count:
            raise SafetensorsError(
                path, tensor, field, f"the file ended after {done} of {len(target)} bytes"
            )
        done += count


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of a file; the data is not read.

    Raises:
        SafetensorsError: the file is damaged or not safetensors.
        OSError: the file cannot be opened or read.
    """
    with open(path, "rb", buffering=0) as file:
        return parse_header(os.fspath(path), file)


def _layout(header: Header, align: int) -> tuple[list[int], int]:
    """Place every tensor at a multiple of align bytes; return places and the total."""
    places, position = [], 0
    for entry in header.entries:
        position = -(-position // align) * align
        places.append(position)
        position += entry.nbytes
    return places, position


def _fill(
    path: str, file: io.RawIOBase, header: Header, memory: npt.NDArray[np.uint8], align: int
) -> dict[str, npt.NDArray[Any]]:
    arrays: dict[str, npt.NDArray[Any]] = {}
    file.seek(header.data_start)
    for entry, place in zip(header.entries, _layout(header, align)[0], strict=True):
        part = memory[place : place + entry.nbytes]
        if entry.nbytes:
            _read_into(path, file, entry.name, "data", part.data)
        if entry.code == "BOOL" and bool((part > 1).any()):
            raise SafetensorsError(path, entry.name, "data", "a BOOL is neither 0 nor 1")
        arrays[entry.name] = entry.view(part)
    return arrays


def load(path: str | os.PathLike[str]) -> dict[str, npt.NDArray[Any]]:
    """Read a file into ordinary numpy memory.

    Args:
        path: the file.

    Returns:
        Name -> array of the file's shape and dtype (``uint16`` for BF16), in
        the order of the data. The arrays are views of one allocation.

    Raises:
        SafetensorsError: the file is damaged or not safetensors.
        OSError: the file cannot be opened or read.
    """
    with open(path, "rb", buffering=0) as file:
        header = parse_header(os.fspath(path), file)
        memory = np.empty(_layout(header, 64)[1], np.uint8)
        return _fill(os.fspath(path), file, header, memory, 64)


def load_into(
    client: Client,
    path: str | os.PathLike[str],
    kind: str = "weights",
    pool: str = "auto",
    *,
    huge: bool | None = None,
    pinned: bool = False,
    numa: Nodes = None,
) -> dict[str, npt.NDArray[Any]]:
    """Read a file straight into tensor memory, without a copy in between.

    The whole file becomes one tensor, so that a model takes few chunks and few
    TLB entries however many small tensors it has. Every array starts on a cache
    line. The memory is released when the last of the arrays is gone.

    Args:
        client: the client that will own the memory.
        path: the file.
        kind: ``weights``, ``kv``, ``activations`` or ``protocol``.
        pool: as for :meth:`Client.empty`, and so are the others.
        huge: see there.
        pinned: see there.
        numa: see there.

    Returns:
        Name -> array of the file's shape and dtype (``uint16`` for BF16), in
        the order of the data.

    Raises:
        SafetensorsError: the file is damaged or not safetensors. Nothing stays
            allocated.
        TensormemError: the memory could not be allocated.
        OSError: the file cannot be opened or read.
    """
    with open(path, "rb", buffering=0) as file:
        header = parse_header(os.fspath(path), file)
        align = max(64, client.cache_line)
        size = _layout(header, align)[1]
        memory = client.empty((size,), np.uint8, kind, pool, huge=huge, pinned=pinned, numa=numa)
        return _fill(os.fspath(path), file, header, memory, align)


def save(
    path: str | os.PathLike[str],
    tensors: Mapping[str, npt.NDArray[Any]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a file: to a temporary name first, then renamed over the old one.

    Args:
        path: the file; an existing one is replaced in one step or not at all.
        tensors: name -> array. The bytes follow in order of falling item size,
            so that each array is aligned in the file.
        metadata: strings for ``__metadata__``.

    Raises:
        TensormemError: a dtype that the format lacks, or metadata that is not
            strings; nothing is written.
        OSError: the file cannot be written; the old one stays.
    """
    name = os.fspath(path)
    entries: list[Entry] = []
    arrays: list[npt.NDArray[Any]] = []
    position = 0
    for key, array in sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize):
        code = CODES.get(array.dtype.newbyteorder("<"))
        if code is None:
            raise SafetensorsError(
                name, key, "dtype", f"{array.dtype} is not a dtype of the format"
            )
        little = np.ascontiguousarray(array, DTYPES[code])
        entries.append(Entry(key, code, array.shape, position, position + little.nbytes))
        arrays.append(little)
        position += little.nbytes
    raw = encode_header(name, entries, metadata or {})
    with replacing(path) as file:
        file.write(raw)
        for little in arrays:
            file.write(little.reshape(-1).view(np.uint8).data)


def encode_header(path: str, entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    """Return what a file begins with: the length and the header, padded to 8 bytes.

    Raises:
        SafetensorsError: a reserved name, or metadata that is not strings.
    """
    document: dict[str, Any] = {}
    for key, text in metadata.items():
        if not isinstance(key, str) or not isinstance(text, str):
            raise SafetensorsError(path, None, "__metadata__", f"{key!r} is not a string pair")
        document["__metadata__"] = dict(metadata)
    for entry in entries:
        if entry.name == "__metadata__":
            raise SafetensorsError(path, entry.name, "name", "is reserved")
        document[entry.name] = {
            "dtype": entry.code,
            "shape": list(entry.shape),
            "data_offsets": [entry.start, entry.stop],
        }
    raw = json.dumps(document, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], mode: int = 0o644) -> Iterator[io.BufferedWriter]:
    """Write a file under another name, and give it its own when it is complete and on disk.

    Whatever ends the process, the file is the old one or the new one. What one that
    was killed has left is removed by the next.

    Args:
        path: the file; an existing one is replaced in one step or not at all.
        mode: its permissions.

    Yields:
        The file to write. An exception leaves everything as it was.

    Raises:
        OSError: the file cannot be written; the old one stays.
    """
    target = Path(path)
    prefix = f".{target.name}."
    for other in target.parent.glob(f"{glob.escape(prefix)}*{_UNFINISHED}"):
        with contextlib.suppress(OSError), other.open("rb") as file:
            # who still writes it holds the lock
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            other.unlink()
    while True:
        handle, temporary = tempfile.mkstemp(_UNFINISHED, prefix, target.parent)
        fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            break
        os.close(handle)  # somebody took it for a left-over
    try:
        with os.fdopen(handle, "wb") as writer:
            yield writer
            writer.flush()
            os.fchmod(writer.fileno(), mode)
            os.fsync(writer.fileno())
            os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def bf16_to_float32(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Widen bfloat16 bit patterns to float32; same shape, exact."""
    wide: npt.NDArray[np.float32] = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return wide
