# SPDX-License-Identifier: MIT
from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fake import PAGE, FakeDevice
from tensormem import Client, abi, errors
from tensormem.safetensors import (
    DTYPES,
    MAX_HEADER,
    SafetensorsError,
    bf16_to_float32,
    load,
    load_into,
    read_header,
    save,
)

Arrays = dict[str, npt.NDArray[Any]]


def pack(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(dtype: str = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def every_dtype() -> Arrays:
    rng = np.random.default_rng(3)
    arrays: Arrays = {}
    for code, dtype in DTYPES.items():
        if code == "BF16":
            continue
        values = rng.integers(0, 2, (3, 5)) if code == "BOOL" else rng.integers(0, 100, (3, 5))
        arrays[code] = values.astype(dtype)
    arrays["scalar"] = np.array(1.5, np.float32)
    arrays["none"] = np.empty((0, 7), np.float16)
    arrays["odd"] = np.arange(3, dtype=np.uint8)
    return arrays


# -- there and back ----------------------------------------------------------------


def test_round_trip(path: Path) -> None:
    arrays = every_dtype()
    save(path, arrays, {"who": "me", "ü": "→"})
    back = load(path)
    assert set(back) == set(arrays)
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype, name
        assert back[name].shape == array.shape, name
        assert (back[name] == array).all(), name
        assert back[name].flags.aligned
        assert back[name].flags.writeable
    assert read_header(path).metadata == {"who": "me", "ü": "→"}
    assert os.listdir(path.parent) == [path.name], "no temporary file stays"


def test_load_into_uses_the_mapping(path: Path) -> None:
    arrays = every_dtype()
    save(path, arrays)
    device = FakeDevice()
    with Client(device) as client:
        back = load_into(client, path, kind="kv", pool="chunk")
        assert {n: a.tolist() for n, a in back.items()} == {
            n: a.tolist() for n, a in arrays.items()
        }
        infos = {client.query(a) for a in back.values()}
        assert len(infos) == 1, "a file is one tensor"
        info = infos.pop()
        assert (info.kind, info.pool) == ("kv", "chunk")
        address = client.query(back["F32"]).offset
        memory = os.pread(device.fd, info.length, address)
        assert arrays["F32"].tobytes() in memory
        for array in back.values():
            assert array.__array_interface__["data"][0] % 64 == 0
        back["F32"][0, 0] = 123
        assert os.pread(device.fd, info.length, address) != memory
        last = back.pop("odd")
        back.clear()
        del array
        assert last.tolist() == [0, 1, 2]
        assert len(device.tensors) == 1
        del last
        assert not device.tensors


def test_load_into_a_damaged_file_leaves_nothing(path: Path) -> None:
    save(path, {"x": np.ones(PAGE, np.bool_)})
    raw = bytearray(path.read_bytes())
    raw[-1] = 2
    path.write_bytes(raw)
    device = FakeDevice()
    with Client(device) as client:
        with pytest.raises(SafetensorsError, match="'x': data: a BOOL is neither") as info:
            load_into(client, path)
        del info
        assert not device.tensors
        path.write_bytes(raw[:-1])
        device.calls.clear()
        with pytest.raises(SafetensorsError):
            load_into(client, path)
        assert not device.calls, "the header is checked before anything is allocated"


def test_load_into_beyond_the_quota(path: Path) -> None:
    save(path, {"x": np.ones(5 * PAGE, np.uint8)})
    with Client(FakeDevice(quota=4 * PAGE)) as client, pytest.raises(errors.QuotaExceeded):
        load_into(client, path)


def test_load_into_takes_choices(path: Path) -> None:
    save(path, {"x": np.ones((3 << 20), np.uint8)})
    device = FakeDevice()
    with Client(device) as client:
        array = load_into(client, path, huge=False, pinned=True, numa=[1])["x"]
        assert array.all()
        info = client.query(array)
        assert (info.mapping, info.huge, info.pinned, info.reuse) == ("pages", False, True, False)
        assert (device.allocs[-1].numa, device.allocs[-1].nodes) == (abi.Numa.BIND, 0b10)


def test_bf16(path: Path) -> None:
    bits = np.array([0x3F80, 0xC000, 0x7F80, 0x0001], np.uint16)
    path.write_bytes(pack({"x": entry("BF16", [4], [0, 8])}, bits.tobytes()))
    back = load(path)["x"]
    assert back.dtype == np.uint16
    assert bf16_to_float32(back).tolist() == [1.0, -2.0, float("inf"), 2.0**-133]


def test_header_padding_and_order_of_keys(path: Path) -> None:
    header = {"b": entry(offsets=[4, 8]), "__metadata__": {}, "a": entry(offsets=[0, 4])}
    path.write_bytes(pack(json.dumps(header).encode() + b"   ", b"aaaabbbb"))
    back = load(path)
    assert list(back) == ["a", "b"]
    assert bytes(back["a"]) == b"aaaa"
    assert bytes(back["b"]) == b"bbbb"


def test_a_file_without_tensors(path: Path) -> None:
    save(path, {})
    assert load(path) == {}
    path.write_bytes(pack({}))
    assert load(path) == {}


# -- saving --------------------------------------------------------------------------


def test_save_is_all_or_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(path, {"x": np.arange(4)})
    before = path.read_bytes()
    with pytest.raises(SafetensorsError, match="'c': dtype: complex64"):
        save(path, {"c": np.zeros(2, np.complex64)})
    with pytest.raises(SafetensorsError, match="name: is reserved"):
        save(path, {"__metadata__": np.zeros(2)})
    with pytest.raises(SafetensorsError, match="'n' is not a string pair"):
        save(path, {}, {"n": 3})  # type: ignore[dict-item]

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        save(path, {"x": np.arange(9)})
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_save_takes_any_layout(path: Path) -> None:
    array = np.arange(12, dtype=">i4").reshape(3, 4).T[::2]
    save(path, {"x": array})
    assert load(path)["x"].tolist() == array.tolist()
    assert load(path)["x"].dtype == np.dtype("<i4")


# -- damaged files ---------------------------------------------------------------------

BIG = (1 << 63) - 1
DAMAGED: dict[str, tuple[bytes, str | None, str, str]] = {
    "empty file": (b"", None, "length", "0 bytes"),
    "seven bytes": (b"1234567", None, "length", "less than 8"),
    "length past the end": (pack({}, length=3), None, "length", "header of 3 bytes"),
    "huge length": (pack({}, length=(1 << 64) - 1), None, "length", "at most"),
    "just too long": (pack({}, length=MAX_HEADER + 1), None, "length", "at most"),
    "length zero": (pack(b""), None, "header", "does not begin"),
    "not an object": (pack([]), None, "header", "does not begin"),
    "leading space": (pack(b" {}"), None, "header", "does not begin"),
    "not JSON": (pack(b"{nope}"), None, "header", "not JSON"),
    "cut JSON": (pack(b'{"a": {"dtype"'), None, "header", "not JSON"),
    "not UTF-8": (pack(b'{"\xff": 1}'), None, "header", "not UTF-8"),
    "NaN": (pack(b'{"a": NaN}'), None, "header", "NaN"),
    "deep": (pack(b'{"a":' + b"[" * 100000), None, "header", "deep"),
    "key twice": (
        pack(b'{"a": %b, "a": %b}' % ((json.dumps(entry()).encode(),) * 2), b"1234"),
        None,
        "header",
        "'a' twice",
    ),
    "field twice": (
        pack(b'{"a": {"dtype": "U8", "dtype": "U8", "shape": [4]}}'),
        None,
        "header",
        "'dtype' twice",
    ),
    "metadata not an object": (pack({"__metadata__": []}), None, "__metadata__", "object"),
    "metadata not strings": (pack({"__metadata__": {"a": 1}}), None, "__metadata__", "'a'"),
    "entry not an object": (pack({"a": 5}), "a", "header", "int"),
    "no dtype": (pack({"a": {"shape": [], "data_offsets": [0, 0]}}), "a", "dtype", "missing"),
    "no shape": (pack({"a": {"dtype": "U8", "data_offsets": [0, 0]}}), "a", "shape", "missing"),
    "no offsets": (pack({"a": {"dtype": "U8", "shape": []}}), "a", "data_offsets", "missing"),
    "unknown field": (pack({"a": entry() | {"x": 1}}, b"1234"), "a", "header", "'x'"),
    "unknown dtype": (pack({"a": entry("F8")}, b"1234"), "a", "dtype", "'F8' is unknown"),
    "dtype not text": (pack({"a": entry(dtype=[])}, b"1234"), "a", "dtype", "unknown"),  # type: ignore[arg-type]
    "shape not a list": (pack({"a": entry(shape=4)}, b"1234"), "a", "shape", "4 is not"),
    "negative size": (pack({"a": entry(shape=[-4])}, b"1234"), "a", "shape", "[-4]"),
    "size is true": (pack({"a": entry(shape=[4, True])}, b"1234"), "a", "shape", "true"),
    "size is a float": (pack({"a": entry(shape=[4.0])}, b"1234"), "a", "shape", "4.0"),
    "size 2^63": (pack({"a": entry(shape=[1 << 63])}, b"1234"), "a", "shape", "overflows"),
    "product 2^64": (pack({"a": entry(shape=[1 << 32] * 2)}, b"1234"), "a", "shape", "overflows"),
    "overflow beside a zero": (
        pack({"a": entry(shape=[1 << 40, 1 << 40, 0], offsets=[0, 0])}),
        "a",
        "shape",
        "overflows",
    ),
    "33 dimensions": (pack({"a": entry(shape=[1] * 33)}, b"1"), "a", "shape", "33"),
    "size too many digits": (
        pack(b'{"a": {"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}'),
        None,
        "header",
        "not JSON",
    ),
    "offsets not a pair": (pack({"a": entry(offsets=[0])}, b"1234"), "a", "data_offsets", "[0]"),
    "offsets negative": (
        pack({"a": entry(offsets=[-4, 0])}, b"1234"), "a", "data_offsets", "[-4, 0]",
    ),
    "offsets reversed": (
        pack({"a": entry(offsets=[4, 0])}, b"1234"), "a", "data_offsets", "before it starts",
    ),
    "offsets 2^63": (
        pack({"a": entry(offsets=[1 << 63, (1 << 63) + 4])}), "a", "data_offsets", "overflows",
    ),
    "size and shape differ": (
        pack({"a": entry("F32")}, b"1234"), "a", "data_offsets", "takes 16",
    ),
    "past the end": (pack({"a": entry()}, b"123"), "a", "data_offsets", "has 3 bytes"),
    "far past the end": (
        pack({"a": entry(shape=[BIG], offsets=[0, BIG])}), "a", "data_offsets", "past the end",
    ),
    "overlap": (
        pack({"a": entry(), "b": entry(offsets=[2, 6])}, b"123456"), "b", "data_offsets", "overlap",
    ),
    "same place": (
        pack({"a": entry(), "b": entry()}, b"1234"), "b", "data_offsets", "overlap",
    ),
    "hole": (
        pack({"a": entry(), "b": entry(offsets=[5, 9])}, b"123456789"), "b", "data_offsets", "hole",
    ),
    "hole at the start": (
        pack({"a": entry(offsets=[1, 5])}, b"12345"), "a", "data_offsets", "hole",
    ),
    "data nobody names": (pack({"a": entry()}, b"12345"), None, "data", "5 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged(path: Path, case: str) -> None:
    raw, tensor, field, words = DAMAGED[case]
    path.write_bytes(raw)
    with pytest.raises(SafetensorsError) as info:
        load(path)
    error = info.value
    assert (error.tensor, error.field) == (tensor, field), str(error)
    assert words in str(error)
    assert str(path) in str(error)
    assert "\n" not in str(error)
    assert isinstance(error, ValueError)
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.tensor, copy.field) == (str(error), tensor, field)


def test_every_truncation(path: Path) -> None:
    save(path, every_dtype(), {"a": "b"})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(SafetensorsError):
            load(path)


def test_missing_file_is_an_oserror(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(path)


# -- random mutation -------------------------------------------------------------------


def _model_accepts(raw: bytes) -> Arrays | None:
    """Read a file the naive way: the model that the reader is held against."""
    if len(raw) < 8:
        return None
    (length,) = struct.unpack_from("<Q", raw)
    if length > len(raw) - 8 or raw[8:9] != b"{":
        return None
    repeated: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in items]
        repeated.extend(keys[i] for i in range(len(keys)) if keys[i] in keys[:i])
        return dict(items)

    try:
        top = json.loads(raw[8 : 8 + length].decode(), object_pairs_hook=pairs)
        data = raw[8 + length :]
        metadata = top.pop("__metadata__", {})
        assert not repeated
        assert all(type(v) is str for v in metadata.values())
        "".join([*top, *metadata, *metadata.values()]).encode()
        covered = bytearray(len(data))
        arrays: Arrays = {}
        for name, e in top.items():
            assert set(e) == {"dtype", "shape", "data_offsets"}
            start, stop = e["data_offsets"]
            assert type(e["shape"]) is list
            assert type(e["data_offsets"]) is list
            sizes = [*e["shape"], start, stop]
            assert all(type(n) is int and 0 <= n < 1 << 63 for n in sizes)
            assert start <= stop <= len(data)
            array = np.frombuffer(data[start:stop], DTYPES[e["dtype"]]).reshape(e["shape"])
            assert e["dtype"] != "BOOL" or not (array.view(np.uint8) > 1).any()
            assert not any(covered[start:stop])
            covered[start:stop] = b"\1" * (stop - start)
            arrays[name] = array
        assert all(covered)
    except (AssertionError, ValueError, KeyError, TypeError, AttributeError):
        return None
    # a tensor of no bytes has to begin where another ends
    starts = {e["data_offsets"][1] for e in top.values()} | {0}
    if any(e["data_offsets"][0] not in starts for e in top.values()):
        return None
    return arrays


def _mutate(raw: bytes, rng: random.Random) -> bytes:
    data = bytearray(raw)
    header = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        place = rng.randrange(min(len(data), header + 4))
        action = rng.randrange(6)
        if action == 0:
            data[place] = rng.randrange(256)
        elif action == 1:
            data[place] ^= 1 << rng.randrange(8)
        elif action == 2:
            del data[place : place + rng.randrange(1, 9)]
        elif action == 3:
            data[place:place] = bytes(rng.choices(b'0123456789-.,:"[]{}eE tfn\\', k=2))
        elif action == 4:
            digits = [i for i in range(8, min(header, len(data))) if data[i] in b"0123456789"]
            if digits:
                data[rng.choice(digits)] = rng.choice(b"0123456789")
        else:
            del data[rng.randrange(len(data)) :]
        if not data:
            break
    if rng.random() < 0.5 and len(data) > 8:
        # mend the length, so that the change reaches the parser
        end = data.find(b"}}") + 2
        if end > 9:
            data[:8] = struct.pack("<Q", end - 8)
    return bytes(data)


def _small(path: Path) -> bytes:
    small = {
        "a": np.arange(6, dtype=np.int16).reshape(2, 3),
        "b": np.array([True, False]),
        "c": np.empty((0, 3), np.float32),
        "d": np.arange(3, dtype=np.float32),
    }
    save(path, small)
    whole = path.read_bytes()
    whole = pack(whole[8 : 8 + int.from_bytes(whole[:8], "little")].rstrip(), whole[-26:])
    path.write_bytes(whole)
    assert set(load(path)) == set(small)
    return whole


def _accepted(path: Path, raw: bytes) -> bool:
    """Load a file and hold what comes of it against the naive way; say whether it was accepted."""
    path.write_bytes(raw)
    expected = _model_accepts(raw)
    if expected is None:
        with pytest.raises(SafetensorsError) as info:
            load(path)
        assert info.value.field
        return False
    found = load(path)
    assert set(found) == set(expected)
    for name, array in found.items():
        assert array.tobytes() == expected[name].tobytes()
        assert array.shape == expected[name].shape
    return True


@pytest.mark.parametrize("seed", range(8))
def test_mutated_headers(path: Path, seed: int) -> None:
    rng = random.Random(seed)
    whole = _small(path)
    results = [_accepted(path, _mutate(whole, rng)) for _ in range(400)]
    assert results.count(False) > 200
    assert results.count(True) > 3


def test_every_flipped_bit(path: Path) -> None:
    whole = _small(path)
    results = []
    for place in range(8 + int.from_bytes(whole[:8], "little")):
        for bit in range(8):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << bit
            results.append(_accepted(path, bytes(flipped)))
    assert results.count(False) > len(results) * 3 // 4
    assert results.count(True) > 20


def test_nothing_huge_is_allocated(path: Path) -> None:
    whole = _small(path)
    cases = [raw for raw, *_ in DAMAGED.values() if len(raw) < 100_000]
    cases += [struct.pack("<Q", n) + whole[8:] for n in (1 << 40, 1 << 63, (1 << 64) - 1)]
    rng = random.Random(3)
    cases += [_mutate(whole, rng) for _ in range(200)]
    tracemalloc.start()
    try:
        for case in cases:
            path.write_bytes(case)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            with contextlib.suppress(SafetensorsError):
                load(path)
            assert tracemalloc.get_traced_memory()[1] - before < (1 << 20) + 20 * len(case)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("header", "field"),
    [
        (rb'{"\ud800":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', "name"),
        (rb'{"__metadata__":{"\udfff":"x"}}', "__metadata__"),
        (rb'{"__metadata__":{"x":"a\ud800"}}', "__metadata__"),
    ],
)
def test_half_of_a_surrogate_pair(path: Path, header: bytes, field: str) -> None:
    path.write_bytes(pack(header, bytes(4) if field == "name" else b""))
    with pytest.raises(SafetensorsError, match="not Unicode") as info:
        read_header(path)
    assert info.value.field == field
    str(info.value).encode()
