# SPDX-License-Identifier: MIT
"""Saved sequences: a safetensors file with the KV of one sequence.

The tensors are ``tokens`` (the ids), ``k.<layer>`` and ``v.<layer>`` (each
[tokens, heads, dim]) and ``state.<layer>``. A layer with a window has what the
sequence still held of it; its group says which token is the first. ``__metadata__``:

============== =====================================================================
format         ``tensormem-kv``
version        ``1``
fingerprint    names the model and whatever else the KV depends on; the caller's
length         tokens
block_tokens   tokens of a block
groups         JSON: for each group layers, dtype, and heads, dim, window, first or state
sha256         JSON: tensor -> SHA-256 of its bytes
sha256.header  SHA-256 of all bytes before the data, with zeros in place of itself
============== =====================================================================

Nothing of a file is believed before all of it has been checked.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from . import errors
from .kv import as_ids, first_held
from .safetensors import (
    CODES,
    DTYPES,
    Entry,
    Header,
    SafetensorsError,
    encode_header,
    parse_header,
    replacing,
)

if TYPE_CHECKING:
    from .kv import KVCache, KVGroup, KVSequence, Tokens

__all__ = ["KVFile", "KVFileError", "Progress", "read", "restore", "save"]

FORMAT = "tensormem-kv"
VERSION = "1"

#: Called with the bytes done and the bytes to do.
Progress = Callable[[int, int], None]

#: Bytes hashed, written or read at a time.
_STEP = 1 << 20

_BLANK = "0" * 64

#: For dtypes that the format lacks: numbers of the same size.
_RAW = {1: "U8", 2: "U16", 4: "U32", 8: "U64"}


class KVFileError(errors.TensormemError, ValueError):
    """A file is not a saved sequence, is damaged, or is not for this KV cache.

    Attributes:
        path: the file.
        reason: what is wrong with it.
    """

    default_remedy = "nothing was restored; compute the tokens again and save them anew"

    def __init__(self, path: str, reason: str) -> None:
        """Say which file and why."""
        self.path, self.reason = path, reason
        super().__init__(f"{path}: {reason}")

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle by what it was made from."""
        return type(self), (self.path, self.reason)


@dataclass(frozen=True)
class KVFile:
    """What a file holds; every byte of it has been checked.

    Attributes:
        path: the file.
        fingerprint: what the KV depends on, the model above all.
        length: tokens.
        block_tokens: tokens of a block of the KV cache it was saved from.
        groups: its groups, as in the file: dicts of ``layers``, ``dtype`` (a name), and
            ``heads``, ``dim``, ``window`` (or None) and ``first``, or ``state``.
        tokens: the token ids.
        size: bytes of the file.
    """

    path: str
    fingerprint: str
    length: int
    block_tokens: int
    groups: tuple[dict[str, Any], ...]
    tokens: npt.NDArray[np.int64]
    size: int


# -- what is in a file -----------------------------------------------------------------


def _code(dtype: np.dtype[Any]) -> str:
    if dtype.name == "bfloat16":
        return "BF16"
    code = CODES.get(dtype) or _RAW.get(dtype.itemsize)
    if code is None:
        raise errors.InvalidArgument(
            f"numbers of {dtype.itemsize} bytes ({dtype}) cannot be saved",
            "use a dtype of 1, 2, 4 or 8 bytes",
        )
    return code


def _describe(group: KVGroup) -> dict[str, Any]:
    """Return a resolved group as the file has it, but for ``first``."""
    assert isinstance(group.layers, tuple)
    dtype = np.dtype(group.dtype)
    words: dict[str, Any] = {"layers": list(group.layers), "dtype": dtype.name}
    if group.state is not None:
        return words | {"state": list(group.state)}
    return words | {"heads": group.heads, "dim": group.dim, "window": group.window}


def _tensors(
    groups: Mapping[int, tuple[Mapping[str, Any], str]], length: int
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield name, dtype and shape of each tensor, in the order of their data.

    Args:
        groups: by number, a group and the dtype of the format for it.
        length: tokens.
    """
    yield "tokens", "I64", (length,)
    # falling item size, so that each is aligned in the file
    for group, code in sorted(groups.values(), key=lambda g: -DTYPES[g[1]].itemsize):
        for layer in group["layers"]:
            if "state" in group:
                yield f"state.{layer}", code, tuple(group["state"])
            else:
                shape = (length - group["first"], group["heads"], group["dim"])
                yield f"k.{layer}", code, shape
                yield f"v.{layer}", code, shape


def _entries(groups: Mapping[int, tuple[Mapping[str, Any], str]], length: int) -> tuple[Entry, ...]:
    entries = []
    position = 0
    for name, code, shape in _tensors(groups, length):
        size = math.prod(shape) * DTYPES[code].itemsize
        entries.append(Entry(name, code, shape, position, position + size))
        position += size
    return tuple(entries)


def _array(seq: KVSequence, name: str, groups: tuple[dict[str, Any], ...]) -> npt.NDArray[np.uint8]:
    """Return the bytes of a tensor where they lie in the sequence."""
    kind, _, number = name.partition(".")
    layer = int(number)
    if kind == "state":
        array = seq.state(layer)
    else:
        array = seq.k(layer) if kind == "k" else seq.v(layer)
        group = next(g for g in groups if layer in g["layers"] and "state" not in g)
        array = array[group["first"] :]
    return array.reshape(-1).view(np.uint8)


def _steps(data: memoryview) -> Iterator[memoryview]:
    for begin in range(0, len(data), _STEP):
        yield data[begin : begin + _STEP]


# -- save ------------------------------------------------------------------------------


def save(
    seq: KVSequence,
    path: str | os.PathLike[str],
    tokens: Tokens,
    fingerprint: str,
    progress: Progress | None = None,
) -> None:
    """Write a sequence to a file; see :meth:`KVSequence.save`."""
    name = os.fspath(path)
    cache = seq._cache
    with seq._calling():
        ids = as_ids(tokens)
        if len(ids) != seq.length or not len(ids):
            raise errors.InvalidArgument(
                f"cannot save sequence {seq.handle} of {seq.length} tokens with {len(ids)} ids",
                "pass the ids of all its tokens; one that is empty cannot be saved",
            )
        if seq.info().packed:
            # here a lack of memory is an error; below it would be a SIGBUS
            seq.unpack()
        groups = tuple(_describe(group) for group in cache.groups)
        for group in groups:
            if "state" not in group:
                group["first"] = first_held(group["window"], seq.length, cache.block_tokens)
        codes = (_code(np.dtype(group.dtype)) for group in cache.groups)
        layout = dict(enumerate(zip(groups, codes, strict=True)))
        entries = _entries(layout, seq.length)
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": fingerprint,
            "length": str(seq.length),
            "block_tokens": str(cache.block_tokens),
            "groups": json.dumps(groups),
            "sha256": json.dumps({entry.name: _BLANK for entry in entries}),
            "sha256.header": _BLANK,
        }
        # the sums are not known yet, their size is
        blank = encode_header(name, entries, metadata)
        sums = {}
        done, total = 0, entries[-1].stop
        with replacing(path, 0o600) as file:
            file.write(blank)
            for entry in entries:
                data = (
                    ids.view(np.uint8)
                    if entry.name == "tokens"
                    else _array(seq, entry.name, groups)
                )
                digest = hashlib.sha256()
                for part in _steps(data.data):
                    digest.update(part)
                    file.write(part)
                    done += len(part)
                    if progress is not None:
                        progress(done, total)
                sums[entry.name] = digest.hexdigest()
            metadata["sha256"] = json.dumps(sums)
            header = encode_header(name, entries, metadata)
            file.seek(0)
            file.write(_sealed(header, _BLANK, hashlib.sha256(header).hexdigest()))


def _sealed(header: bytes, old: str, new: str) -> bytes:
    """Return a header with one sum of itself in place of another."""
    # inside a string the quotes would be escaped, so this is found once
    field = '"sha256.header":"{}"'
    before = field.format(old).encode()
    if header.count(before) != 1:
        raise ValueError("no place for the sum")
    return header.replace(before, field.format(new).encode())


# -- read ------------------------------------------------------------------------------


class _Open:
    """A file whose header has been checked."""

    def __init__(self, path: str, file: io.FileIO) -> None:
        self.path, self.file = path, file
        self.stat = os.fstat(file.fileno())
        try:
            self.header: Header = parse_header(path, file)
        except SafetensorsError as error:
            raise KVFileError(path, f"{error.field}: {error.what}") from None
        self.metadata = self.header.metadata
        self._check_format()
        self.fingerprint = self.metadata["fingerprint"]
        self.length = self._integer("length")
        self.block_tokens = self._integer("block_tokens")
        self.groups = self._groups()
        self._check_entries()
        sums = self._json("sha256")
        names = {entry.name for entry in self.header.entries}
        if not isinstance(sums, dict) or sums.keys() != names:
            raise self.bad("sha256 does not have one sum for each tensor")
        self.sums: dict[str, Any] = sums

    def bad(self, reason: str) -> KVFileError:
        return KVFileError(self.path, reason)

    def _check_format(self) -> None:
        kind, version = self.metadata.get("format"), self.metadata.get("version")
        if kind != FORMAT:
            raise self.bad("is a safetensors file, but not a saved sequence")
        if version != VERSION:
            raise self.bad(f"is of version {version}; this package reads {VERSION}")
        recorded = self.metadata.get("sha256.header", "")
        self.file.seek(0)
        raw = self.file.read(self.header.data_start)
        try:
            blank = _sealed(raw, recorded, _BLANK)
        except ValueError:
            raise self.bad("the header has no sum of itself") from None
        if hashlib.sha256(blank).hexdigest() != recorded:
            raise self.bad("the header is damaged: its sum is another")
        missing = {"fingerprint", "length", "block_tokens", "groups", "sha256"} - set(self.metadata)
        if missing:
            raise self.bad(f"the header has no {sorted(missing)[0]}")

    def _integer(self, field: str) -> int:
        text = self.metadata[field]
        if not re.fullmatch("[1-9][0-9]{0,9}", text):
            raise self.bad(f"{field} is not a number from 1")
        return int(text)

    def _json(self, field: str) -> Any:
        try:
            return json.loads(self.metadata[field])
        except (ValueError, RecursionError):
            raise self.bad(f"{field} is not JSON") from None

    def _groups(self) -> tuple[dict[str, Any], ...]:
        groups = self._json("groups")
        if not isinstance(groups, list) or not all(map(_is_group, groups)):
            raise self.bad("groups are not those of a KV cache")
        for group in groups:
            first = first_held(group.get("window"), self.length, self.block_tokens)
            if group.get("first", 0) != first:
                raise self.bad(f"a window begins at token {group['first']}, not {first}")
        return tuple(groups)

    def _check_entries(self) -> None:
        """Hold the tensors of the file against what groups and length say."""
        codes = {entry.name: entry.code for entry in self.header.entries}
        layout = {}
        for number, group in enumerate(self.groups):
            kind = "state" if "state" in group else "k"
            code = codes.get(f"{kind}.{group['layers'][0]}")
            if code is None:
                raise self.bad(f"layer {group['layers'][0]} has no tensor")
            layout[number] = (group, code)
        expected = _entries(layout, self.length)
        for ours, theirs in zip(expected, self.header.entries, strict=False):
            if ours != theirs:
                raise self.bad(
                    f"tensor {theirs.name!r} is not what the groups say of {ours.name!r}"
                )
        if len(expected) != len(self.header.entries):
            raise self.bad(f"has {len(self.header.entries)} tensors, not {len(expected)}")

    def check(self, progress: Progress | None) -> KVFile:
        """Read all of it and compare the sums."""
        buffer = memoryview(bytearray(_STEP))
        tokens = np.empty(self.length, "<i8")
        done, total = 0, self.header.data_size
        for entry in self.header.entries:
            digest = hashlib.sha256()
            if entry.name == "tokens":
                self._fill(entry, tokens.view(np.uint8).data)
                digest.update(tokens.data)
                done += entry.nbytes
            else:
                self.file.seek(self.header.data_start + entry.start)
                left = entry.nbytes
                while left:
                    part = buffer[: min(left, _STEP)]
                    self._read(entry, part)
                    digest.update(part)
                    left -= len(part)
                    done += len(part)
                    if progress is not None:
                        progress(done, total)
            if digest.hexdigest() != self.sums[entry.name]:
                raise self.bad(f"tensor {entry.name!r} is damaged: its sum is another")
        return KVFile(
            path=self.path,
            fingerprint=self.fingerprint,
            length=self.length,
            block_tokens=self.block_tokens,
            groups=self.groups,
            tokens=tokens,
            size=self.stat.st_size,
        )

    def fill(self, seq: KVSequence) -> None:
        """Read the KV into a sequence that is as long."""
        for entry in self.header.entries:
            if entry.name != "tokens":
                self._fill(entry, _array(seq, entry.name, self.groups).data)

    def unchanged(self) -> None:
        """Make sure that what was filled in is what was checked."""
        was, now = self.stat, os.fstat(self.file.fileno())
        if (was.st_size, was.st_mtime_ns) != (now.st_size, now.st_mtime_ns):
            raise self.bad("was changed while it was read")

    def _fill(self, entry: Entry, target: memoryview) -> None:
        self.file.seek(self.header.data_start + entry.start)
        for part in _steps(target):
            self._read(entry, part)

    def _read(self, entry: Entry, target: memoryview) -> None:
        done = 0
        while done < len(target):
            count = self.file.readinto(target[done:])
            if not count:
                raise self.bad(f"tensor {entry.name!r}: the file ended early")
            done += count


def _is_group(group: object) -> bool:
    """Say whether a JSON value describes a group."""

    def size(value: object) -> bool:
        return type(value) is int and 0 < value < 1 << 32

    def number(value: object) -> bool:
        return type(value) is int and 0 <= value < 1 << 32

    if not isinstance(group, dict) or not isinstance(group.get("dtype"), str):
        return False
    layers = group.get("layers")
    if not isinstance(layers, list) or not layers or not all(map(number, layers)):
        return False
    if "state" in group:
        state = group["state"]
        known = {"layers", "dtype", "state"}
        return group.keys() == known and isinstance(state, list) and all(map(size, state))
    known = {"layers", "dtype", "heads", "dim", "window", "first"}
    return (
        group.keys() == known
        and size(group["heads"])
        and size(group["dim"])
        and (group["window"] is None or size(group["window"]))
        and number(group["first"])
    )


def read(path: str | os.PathLike[str], progress: Progress | None = None) -> KVFile:
    """Check a file from end to end and say what it holds.

    Args:
        path: the file.
        progress: called with the bytes read and the bytes to read.

    Raises:
        KVFileError: it is not a saved sequence, or is damaged; the reason says how.
        OSError: it cannot be opened or read.
    """
    with open(path, "rb", buffering=0) as file:
        return _Open(os.fspath(path), file).check(progress)


# -- restore ---------------------------------------------------------------------------


def restore(
    cache: KVCache,
    path: str | os.PathLike[str],
    fingerprint: str,
    tenant: int = 0,
    progress: Progress | None = None,
) -> tuple[KVSequence, npt.NDArray[np.int64]]:
    """Make a sequence of a file; see :meth:`KVCache.restore`."""
    with open(path, "rb", buffering=0) as file:
        source = _Open(os.fspath(path), file)
        if source.fingerprint != fingerprint:
            raise source.bad(
                f"is of another model: its fingerprint is {source.fingerprint!r},"
                f" not {fingerprint!r}"
            )
        _fits(source, cache)
        tokens = source.check(progress).tokens
        seq = cache.sequence(tenant)
        try:
            seq.extend(source.length)
            source.fill(seq)
            source.unchanged()
            # published or not, the sequence is whole
            with contextlib.suppress(MemoryError):
                seq.publish(tokens)
        except BaseException:
            seq.close()
            raise
    return seq, tokens


def _fits(source: _Open, cache: KVCache) -> None:
    if source.length > cache.max_tokens:
        raise source.bad(
            f"has {source.length} tokens; the KV cache takes {cache.max_tokens} in a sequence"
        )
    theirs = [{k: v for k, v in g.items() if k != "first"} for g in source.groups]
    ours = [_describe(group) for group in cache.groups]
    if len(ours) != len(theirs):
        raise source.bad(
            f"is of another geometry: {len(theirs)} groups, the KV cache has {len(ours)}"
        )
    for number, (its, our) in enumerate(zip(theirs, ours, strict=True)):
        for field in sorted(its.keys() | our.keys()):
            if its.get(field) != our.get(field):
                raise source.bad(
                    f"is of another geometry: {field} of group {number} is {its.get(field)},"
                    f" in the KV cache {our.get(field)}"
                )
    codes = {entry.name: entry.code for entry in source.header.entries}
    for group in cache.groups:
        assert isinstance(group.layers, tuple)
        name = f"{'k' if group.state is None else 'state'}.{group.layers[0]}"
        if codes[name] != _code(np.dtype(group.dtype)):
            raise source.bad(f"tensor {name!r} is {codes[name]}, not {group.dtype}")
    windows = any(group.window for group in cache.groups)
    if windows and source.block_tokens != cache.block_tokens:
        # the first block of a window would be published with a part missing
        raise source.bad(
            f"has blocks of {source.block_tokens} tokens, the KV cache of {cache.block_tokens};"
            " with a window they have to be the same"
        )
