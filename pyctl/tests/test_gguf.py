# SPDX-License-Identifier: MIT
"""GGUF headers: what is right is read, what is wrong is named, nothing is believed."""

from __future__ import annotations

import contextlib
import io
import pickle
import random
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gguffile import KINDS, Array, info, model, of, pack, pair, string, value
from tensormem import errors, gguf
from tensormem.gguf import GGUFError, parse_header, read_header


def parse(raw: bytes) -> gguf.Header:
    return parse_header("m.gguf", io.BytesIO(raw))


def arrays(raw: bytes) -> dict[str, npt.NDArray[Any]]:
    header = parse(raw)
    data = np.frombuffer(raw, np.uint8)[header.data_start :]
    return {e.name: e.view(data[e.start : e.stop]) for e in header.entries}


# -- what is right -----------------------------------------------------------------------


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [1, 8, 32, 64, 4096])
def test_plain_types(version: int, alignment: int) -> None:
    rng = np.random.default_rng(1)
    plain = {
        code: (rng.standard_normal((2, 3, 5)) * 50).astype(dtype)
        for code, dtype in (
            ("F32", "<f4"), ("F16", "<f2"), ("F64", "<f8"), ("I8", "i1"), ("I16", "<i2"),
            ("I32", "<i4"), ("I64", "<i8"),
        )
    }  # fmt: skip
    plain["bf16"] = np.array([0x3F80, 0xC040], np.uint16)
    plain["scalar"] = np.array(1.5, np.float32)
    plain["none"] = np.empty((4, 0), np.float32)
    tensors = {name: of(a, "BF16" if name == "bf16" else None) for name, a in plain.items()}
    pairs = [pair("general.alignment", "u32", alignment)] if alignment != 32 else []
    raw = model(tensors, pairs, version=version, alignment=alignment)
    header = parse(raw)
    assert (header.version, header.alignment) == (version, alignment)
    assert header.data_start % alignment == 0
    assert {e.name: e.code for e in header.entries} == {
        name: code for name, (code, _, _) in tensors.items()
    }
    found = arrays(raw)
    for name, expected in plain.items():
        assert found[name].dtype == expected.dtype, name
        assert found[name].shape == expected.shape, name
        assert found[name].tobytes() == expected.tobytes(), name
    assert gguf.dequantize(found["bf16"], "BF16").tolist() == [1.0, -3.0]
    assert np.array_equal(gguf.dequantize(found["F16"], "F16"), plain["F16"].astype(np.float32))
    assert np.array_equal(gguf.dequantize(found["F64"], "F64"), plain["F64"].astype(np.float32))
    assert gguf.dequantize(found["F32"], "F32") is found["F32"]
    for code in ("I8", "I16", "I32", "I64"):
        with pytest.raises(errors.InvalidArgument, match=code):
            gguf.dequantize(found[code], code)


def test_dequantize_q8_0() -> None:
    rng = np.random.default_rng(2)
    scales = rng.standard_normal((3, 2)).astype(np.float16)
    numbers = rng.integers(-128, 128, (3, 2, 32)).astype(np.int8)
    raw = b"".join(
        scales[i, j].tobytes() + numbers[i, j].tobytes() for i in range(3) for j in range(2)
    )
    found = arrays(model({"q": ("Q8_0", (3, 64), raw)}))["q"]
    assert found.shape == (3, 2)
    assert np.array_equal(found["qs"], numbers)
    expected = (scales.astype(np.float32)[..., None] * numbers).reshape(3, 64)
    wide = gguf.dequantize(found, "Q8_0")
    assert wide.dtype == np.float32
    assert np.array_equal(wide, expected)


def test_dequantize_q4_0() -> None:
    scale = np.float16(0.25)
    # byte i holds number i in its low half and number i + 16 in its high half
    raw = scale.tobytes() + bytes((15 - i) << 4 | i for i in range(16))
    found = arrays(model({"q": ("Q4_0", (1, 32), raw)}))["q"]
    assert found.shape == (1, 1)
    expected = [0.25 * (i - 8) for i in range(16)] + [0.25 * (7 - i) for i in range(16)]
    assert gguf.dequantize(found, "Q4_0").tolist() == [expected]


def test_every_quantized_type_comes_as_blocks() -> None:
    for kind in gguf.TYPES.values():
        if kind.block == 1:
            assert kind.size == kind.dtype.itemsize
            continue
        shape = (2, 3 * kind.block)
        raw = random.Random(3).randbytes(6 * kind.size)
        found = arrays(model({"q": (kind.code, shape, raw)}))["q"]
        assert found.tobytes() == raw
        assert found.shape[:2] == (2, 3)
        assert found.dtype == kind.dtype
        if kind.code not in ("Q8_0", "Q4_0"):
            assert found.shape == (2, 3, kind.size)
            with pytest.raises(errors.InvalidArgument, match=kind.code):
                gguf.dequantize(found, kind.code)
        with pytest.raises(GGUFError, match="blocks of"):
            parse(model({"q": (kind.code, (2, kind.block + 1), raw)}))
        with pytest.raises(GGUFError, match="blocks of"):
            parse(model({"q": (kind.code, (), raw)}))


#: Bits that a number takes, as the llama.cpp project lists them for its quantizations.
BITS = {
    "Q4_0": 4.5, "Q4_1": 5, "Q5_0": 5.5, "Q5_1": 6, "Q8_0": 8.5, "Q2_K": 2.625, "Q3_K": 3.4375,
    "Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.5625, "IQ2_XXS": 2.0625, "IQ2_XS": 2.3125,
    "IQ3_XXS": 3.0625, "IQ1_S": 1.5625, "IQ4_NL": 4.5, "IQ3_S": 3.4375, "IQ2_S": 2.5625,
    "IQ4_XS": 4.25, "IQ1_M": 1.75, "TQ1_0": 1.6875, "TQ2_0": 2.0625, "MXFP4": 4.25, "NVFP4": 4.5,
    "Q1_0": 1.125,
}  # fmt: skip


def test_sizes_of_blocks() -> None:
    bits = {k.code: 8 * k.size / k.block for k in gguf.TYPES.values() if k.block > 1}
    assert bits == BITS


#: Key -> kind, item and, of arrays, the kind of their items.
METADATA: dict[str, tuple[str, Any]] = {
    "general.architecture": ("str", "llama"),
    "a.u8": ("u8", 255),
    "a.i8": ("i8", -128),
    "a.u16": ("u16", 65535),
    "a.i16": ("i16", -32768),
    "a.u32": ("u32", 4294967295),
    "a.i32": ("i32", -1),
    "a.u64": ("u64", (1 << 64) - 1),
    "a.i64": ("i64", -(1 << 63)),
    "a.f32": ("f32", 1.5),
    "a.f64": ("f64", 1e300),
    "a.true": ("bool", True),
    "a.false": ("bool", False),
    "ä.empty": ("str", ""),
    "tokens": ("array", Array("str", ["a", "", "ß", "\U0001f600"])),
    "scores": ("array", Array("f32", [0.5, -1.0])),
    "types": ("array", Array("i32", [1, -2, 3])),
    "flags": ("array", Array("bool", [True, False])),
    "nothing": ("array", Array("u64", [])),
    "nested": ("array", Array("array", [Array("u8", [1, 2]), Array("str", ["x"])])),
}


def test_metadata() -> None:
    raw = pack([pair(key, kind, item) for key, (kind, item) in METADATA.items()])
    found = parse(raw).metadata
    assert list(found) == list(METADATA)
    for key, (kind, item) in METADATA.items():
        if kind != "array":
            assert found[key] == item
            assert type(found[key]) is type(item)
        elif item.kind not in ("str", "array"):
            assert found[key].tolist() == list(item.items)
    assert found["tokens"] == ["a", "", "ß", "\U0001f600"]
    assert found["flags"].dtype == np.bool_
    assert found["scores"].dtype == np.float32
    assert found["nested"][0].tolist() == [1, 2]
    assert found["nested"][1] == ["x"]
    found["scores"][0] = 7  # a copy, not a view of what the reader has thrown away


def test_a_file_without_anything() -> None:
    header = parse(pack()[:24])
    assert (header.entries, header.metadata, header.data_size) == ((), {}, 0)


def test_tensors_come_in_the_order_of_their_data() -> None:
    raw = pack(
        infos=[info("b", "I8", (4,), 64), info("a", "I8", (64,), 0)],
        data=bytes(range(68)),
    )
    found = arrays(raw)
    assert [e.name for e in parse(raw).entries] == ["a", "b"]
    assert found["b"].tolist() == [64, 65, 66, 67]


def test_holes_and_tails_are_allowed() -> None:
    raw = pack(infos=[info("a", "I8", (1,), 0), info("b", "I8", (1,), 96)], data=bytes(500))
    assert [e.start for e in parse(raw).entries] == [0, 96]


def test_read_header_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(small())
    assert read_header(path) == parse(small())
    path.write_bytes(b"GGUF")
    with pytest.raises(GGUFError) as found:
        read_header(path)
    assert str(path) in str(found.value)
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "nothing")


def test_a_header_longer_than_one_read() -> None:
    rng = random.Random(5)
    words = ["".join(rng.choices("abcdefgh", k=rng.randrange(12))) for _ in range(250_000)]
    raw = model(
        {"t": of(np.arange(5, dtype=np.float32))},
        [
            pair("scores", "array", Array("f32", [1.0, 2.0])),
            pair("tokens", "array", Array("str", words)),
        ],
    )
    assert len(raw) > 3 << 20
    header = parse(raw)
    assert header.metadata["scores"].tolist() == [1, 2]
    assert header.metadata["tokens"] == words
    assert arrays(raw)["t"].tolist() == [0, 1, 2, 3, 4]


# -- what is wrong -----------------------------------------------------------------------

HUGE = 1 << 63
ONE = bytes(64)


def nested(depth: int) -> Array:
    inner = Array("u8", [1])
    for _ in range(depth):
        inner = Array("array", [inner])
    return inner


def u64(number: int) -> bytes:
    return struct.pack("<Q", number)


def kv(kind: int, rest: bytes) -> bytes:
    return string("k") + struct.pack("<I", kind) + rest


#: What is wrong -> the file, the field that is named, and the tensor.
WRONG: dict[str, tuple[bytes, str, str | None]] = {
    "nothing": (b"", "magic", None),
    "half a magic": (b"GG", "magic", None),
    "another magic": (pack(magic=b"GGML"), "magic", None),
    "version 0": (pack(version=0), "version", None),
    "version 1": (pack(version=1), "version", None),
    "version 4": (pack(version=4), "version", None),
    "big endian": (pack(version=3 << 24), "version", None),
    "2^63 tensors": (pack(tensors=HUGE), "tensor_count", None),
    "2^64 - 1 tensors": (pack(tensors=(1 << 64) - 1), "tensor_count", None),
    "too many tensors": (pack(tensors=65537, data=bytes(65537 * 24)), "tensor_count", None),
    "2^63 metadata": (pack(count=HUGE), "metadata_kv_count", None),
    "too many metadata": (pack(count=65537, data=bytes(65537 * 13)), "metadata_kv_count", None),
    "one tensor too few": (pack(tensors=1), "tensor_count", None),
    "key of 2^63": (pack([u64(HUGE) + bytes(20)]), "metadata_kv[0].key", None),
    "key too long": (
        pack([pair("k" * 65536, "u8", 1)]), "metadata_kv[0].key", None,
    ),
    "key is not UTF-8": (pack([pair(b"\xff\xfe", "u8", 1)]), "metadata_kv[0].key", None),
    "key twice": (pack([pair("k", "u8", 1), pair("k", "u8", 1)]), "metadata_kv[1].key", None),
    "unknown kind": (pack([kv(13, ONE)]), "metadata 'k'", None),
    "unknown item kind": (pack([kv(9, struct.pack("<IQ", 13, 1) + ONE)]), "metadata 'k'", None),
    "string of 2^63": (pack([kv(8, u64(HUGE) + ONE)]), "metadata 'k'", None),
    "string is not UTF-8": (pack([pair("k", "str", b"a\x80")]), "metadata 'k'", None),
    "surrogate": (pack([pair("k", "str", b"\xed\xa0\x80")]), "metadata 'k'", None),
    "bool of 2": (pack([kv(7, b"\x02")]), "metadata 'k'", None),
    "bools of 2": (pack([kv(9, struct.pack("<IQ", 7, 2) + b"\1\2")]), "metadata 'k'", None),
    "array of 2^63": (pack([kv(9, struct.pack("<IQ", 0, HUGE) + ONE)]), "metadata 'k'", None),
    "array of 2^61 * 8": (
        pack([kv(9, struct.pack("<IQ", 10, 1 << 61) + ONE)]), "metadata 'k'", None,
    ),
    "strings of 2^63": (pack([kv(9, struct.pack("<IQ", 8, HUGE) + ONE)]), "metadata 'k'", None),
    "arrays of 2^63": (pack([kv(9, struct.pack("<IQ", 9, HUGE) + ONE)]), "metadata 'k'", None),
    "item is not UTF-8": (
        pack([pair("k", "array", Array("str", ["a", b"\xff"]))]), "metadata 'k'", None,
    ),
    "nested too deep": (pack([pair("k", "array", nested(4))]), "metadata 'k'", None),
    "nested without end": (
        pack([kv(9, struct.pack("<IQ", 9, 1) * 100_000)]), "metadata 'k'", None,
    ),
    "too many arrays": (
        pack([kv(9, struct.pack("<IQ", 9, 65537) + struct.pack("<IQ", 0, 0) * 65537)]),
        "metadata 'k'", None,
    ),
    "alignment of 0": (
        pack([pair("general.alignment", "u32", 0)]), "metadata 'general.alignment'", None,
    ),
    "alignment of 24": (
        pack([pair("general.alignment", "u32", 24)]), "metadata 'general.alignment'", None,
    ),
    "alignment is a string": (
        pack([pair("general.alignment", "str", "32")]), "metadata 'general.alignment'", None,
    ),
    "alignment is negative": (
        pack([pair("general.alignment", "i32", -32)]), "metadata 'general.alignment'", None,
    ),
    "name of 2^63": (pack(infos=[u64(HUGE) + ONE]), "tensor_infos[0].name", None),
    "name too long": (
        pack(infos=[info("t" * 65536, "I8", (1,), 0)], data=ONE), "tensor_infos[0].name", None,
    ),
    "name is not UTF-8": (
        pack(infos=[info(b"\xc3", "I8", (1,), 0)], data=ONE), "tensor_infos[0].name", None,
    ),
    "name twice": (
        pack(infos=[info("t", "I8", (1,), 0), info("t", "I8", (1,), 32)], data=ONE), "name", "t",
    ),
    "5 dimensions": (
        pack(infos=[info("t", "I8", (1,) * 5, 0)], data=ONE), "n_dimensions", "t",
    ),
    "2^32 - 1 dimensions": (
        pack(infos=[info("t", "I8", (1,), 0, dims=(1 << 32) - 1)], data=ONE), "n_dimensions", "t",
    ),
    "unknown type": (pack(infos=[info("t", 99, (1,), 0)], data=ONE), "type", "t"),
    "removed type": (pack(infos=[info("t", 4, (1,), 0)], data=ONE), "type", "t"),
    "rows that are no blocks": (
        pack(infos=[info("t", "Q8_0", (32, 31), 0)], data=bytes(2000)), "dimensions", "t",
    ),
    "overflow": (pack(infos=[info("t", "F32", (1 << 62,), 0)], data=ONE), "dimensions", "t"),
    "overflow of 64 bits": (
        pack(infos=[info("t", "I8", (1 << 32, 1 << 32), 0)], data=ONE), "dimensions", "t",
    ),
    "overflow beside a 0": (
        pack(infos=[info("t", "I8", (0, HUGE, 2), 0)], data=ONE), "dimensions", "t",
    ),
    "a negative dimension": (
        pack(infos=[info("t", "I8", ((1 << 64) - 4,), 0)], data=ONE), "dimensions", "t",
    ),
    "offset not aligned": (pack(infos=[info("t", "I8", (1,), 1)], data=ONE), "offset", "t"),
    "offset of 2^63": (pack(infos=[info("t", "I8", (1,), HUGE)], data=ONE), "offset", "t"),
    "a negative offset": (
        pack(infos=[info("t", "I8", (1,), (1 << 64) - 32)], data=ONE), "offset", "t",
    ),
    "offset past the end": (pack(infos=[info("t", "I8", (1,), 64)], data=ONE), "offset", "t"),
    "size past the end": (pack(infos=[info("t", "I8", (65,), 0)], data=ONE), "offset", "t"),
    "no data": (pack(infos=[info("t", "I8", (1,), 0)]), "offset", "t"),
    "nothing past the end": (pack(infos=[info("t", "I8", (0,), 96)], data=ONE), "offset", "t"),
    "same place": (
        pack(infos=[info("t", "I8", (1,), 0), info("u", "I8", (1,), 0)], data=ONE), "offset", "u",
    ),
    "overlap": (
        pack(infos=[info("t", "I8", (33,), 0), info("u", "I8", (1,), 32)], data=ONE),
        "offset", "u",
    ),
    "overlap of one further on": (
        pack(
            infos=[info("t", "I8", (65,), 0), info("n", "I8", (0,), 32), info("u", "I8", (1,), 64)],
            data=bytes(128),
        ),
        "offset", "u",
    ),
    "a tensor that is missing": (
        pack(infos=[info("t", "I8", (1,), 0)], tensors=2), "tensor_infos[1].name", None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong(case: str) -> None:
    raw, field, tensor = WRONG[case]
    with pytest.raises(GGUFError) as found:
        parse(raw)
    error = found.value
    assert (error.field, error.tensor) == (field, tensor)
    assert str(error).startswith("m.gguf: ")
    assert field in str(error)
    assert len(str(error)) < 400
    assert isinstance(error, errors.ModelFileError)
    assert isinstance(error, ValueError)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is GGUFError
    assert str(copy) == str(error)


def test_big_endian_is_called_so() -> None:
    with pytest.raises(GGUFError, match="big endian"):
        parse(pack(version=3 << 24))
    with pytest.raises(GGUFError, match="is 0; 2 and 3 are known"):
        parse(pack(version=0))


def test_depth_and_size_that_are_allowed() -> None:
    assert parse(pack([pair("k", "array", nested(3))])).metadata["k"][0][0][0].tolist() == [1]
    raw = pack(infos=[info("t" * 65535, "I8", (1,), 0)], data=ONE)
    assert len(parse(raw).entries[0].name) == 65535


def test_a_header_beyond_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = pack([pair("k", "str", "x" * 100), pair("l", "str", "y" * 100)])
    monkeypatch.setattr(gguf, "MAX_HEADER", 200)
    with pytest.raises(GGUFError, match="longer than 200 bytes") as found:
        parse(raw)
    assert found.value.field == "metadata 'l'"
    monkeypatch.setattr(gguf, "MAX_STRINGS", 3)
    words = Array("str", ["a", "b"])
    with pytest.raises(GGUFError, match="at most 1 are allowed"):
        parse(pack([pair("k", "array", words), pair("l", "array", words)]))
    monkeypatch.setattr(gguf, "MAX_HEADER", 1000)
    monkeypatch.setattr(gguf, "MAX_COUNT", 3)
    lists = Array("array", [Array("u8", [1]), Array("u8", [2])])
    with pytest.raises(GGUFError, match="at most 1 are allowed"):
        parse(pack([pair("k", "array", lists), pair("l", "array", lists)]))


def test_a_file_that_ends_early() -> None:
    class Short(io.BytesIO):
        def seek(self, offset: int, whence: int = 0) -> int:
            return super().seek(offset, whence) + (1000 if whence == 2 else 0)

    with pytest.raises(GGUFError, match="the file ended after"):
        parse_header("m.gguf", Short(pack([pair("k", "u8", 1)])[:30]))


# -- anything ------------------------------------------------------------------------------

SMALL: dict[str, tuple[str, Any]] = {
    "general.alignment": ("u32", 8),
    "name": ("str", "tiny"),
    "tokens": ("array", Array("str", ["ab", "c"])),
    "f": ("array", Array("f32", [1.0, 2.0])),
    "deep": ("array", Array("array", [Array("u8", [1])])),
    "yes": ("bool", True),
}


def small() -> bytes:
    tensors = {
        "w": of(np.arange(6, dtype=np.float32).reshape(2, 3)),
        "q": ("Q4_0", (1, 32), bytes(range(18))),
        "s": of(np.array(7, np.int16)),
    }
    pairs = [pair(key, kind, item) for key, (kind, item) in SMALL.items()]
    return model(tensors, pairs, alignment=8)


def again(header: gguf.Header, raw: bytes) -> bool:
    """Say whether a header that was accepted says what the file says, byte for byte."""
    position = 24
    # keys, kinds and items in turn, taken from the file by what the reader made of them
    for key in header.metadata:
        begin = string(key)
        if raw[position : position + len(begin)] != begin:
            return False
        position += len(begin)
        (kind,) = struct.unpack_from("<I", raw, position)
        word = next(w for w, n in KINDS.items() if n == kind)
        found = header.metadata[key]
        if word == "array":
            (number,) = struct.unpack_from("<I", raw, position + 4)
            item = next(w for w, n in KINDS.items() if n == number)
            found = typed(item, found, raw, position + 16)
        item_bytes = struct.pack("<I", kind) + value(word, found)
        if raw[position : position + len(item_bytes)] != item_bytes:
            return False
        position += len(item_bytes)
    infos = sorted(
        (info(e.name, e.code, e.shape, e.start) for e in header.entries), key=raw[position:].find
    )
    tail = b"".join(infos)
    return raw[position : position + len(tail)] == tail


def typed(item: str, found: Any, raw: bytes, position: int) -> Array:
    """Say again of which kind an array is; of arrays of arrays it stands in the file."""
    if item != "array":
        return Array(item, list(found))
    inner = []
    for one in found:
        (number,) = struct.unpack_from("<I", raw, position)
        word = next(w for w, n in KINDS.items() if n == number)
        inner.append(typed(word, one, raw, position + 12))
        position += len(value("array", inner[-1]))
    return Array("array", inner)


def check(raw: bytes) -> str:
    """Parse anything: an error of the right class, or a header that is true and safe to use."""
    try:
        header = parse(raw)
    except GGUFError:
        return "refused"
    assert again(header, raw)
    data = np.frombuffer(raw, np.uint8)[header.data_start :]
    end = 0
    for entry in header.entries:
        assert 0 <= entry.start <= entry.stop <= len(data)
        assert entry.start >= end or not entry.nbytes
        end = max(end, entry.stop)
        array = entry.view(data[entry.start : entry.stop])
        assert array.nbytes == entry.nbytes
    return "accepted"


def test_every_prefix() -> None:
    raw = small()
    header = parse(raw)
    for length in range(len(raw)):
        assert check(raw[:length]) == "refused", length
    assert check(raw) == "accepted"
    assert check(raw + b"\0") == "accepted"
    assert header.entries[-1].stop == len(raw) - header.data_start


def test_every_flipped_bit() -> None:
    raw = small()
    header = parse(raw)
    results = []
    for place in range(header.data_start):
        for bit in range(8):
            flipped = bytearray(raw)
            flipped[place] ^= 1 << bit
            results.append(check(bytes(flipped)))
    assert results.count("refused") > len(results) // 3
    assert results.count("accepted") > len(results) // 10


def test_every_byte_made_extreme() -> None:
    raw = small()
    for place in range(parse(raw).data_start):
        for byte in (0, 1, 0x7F, 0x80, 0xFF):
            check(raw[:place] + bytes([byte]) + raw[place + 1 :])


@pytest.mark.parametrize("size", [4, 8])
def test_every_number_made_extreme(size: int) -> None:
    raw = small()
    numbers = [0, 1, 2, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 62, HUGE - 1, HUGE, (1 << 64) - 1]
    for place in range(4, parse(raw).data_start - size):
        for number in numbers:
            if number < 1 << 8 * size:
                bad = raw[:place] + number.to_bytes(size, "little") + raw[place + size :]
                check(bad)


@pytest.mark.parametrize("seed", range(30))
def test_mutations(seed: int) -> None:
    rng = random.Random(seed)
    raw = small()
    end = parse(raw).data_start
    for _ in range(200):
        mutated = bytearray(raw)
        for _ in range(rng.randrange(1, 5)):
            begin, length = rng.randrange(end), rng.choice((1, 4, 8, 30))
            part = slice(begin, begin + length)
            operation = rng.choice(("replace", "delete", "repeat"))
            if operation == "replace":
                mutated[part] = rng.randbytes(length)
            elif operation == "delete":
                del mutated[part]
            else:
                mutated[begin:begin] = mutated[part]
        check(bytes(mutated))


def test_nothing_huge_is_allocated() -> None:
    cases = [raw for raw, _, _ in WRONG.values() if len(raw) < 100_000]
    rng = random.Random(9)
    raw = small()
    for _ in range(300):
        place = rng.randrange(4, parse(raw).data_start - 8)
        cases.append(raw[:place] + rng.randbytes(8) + raw[place + 8 :])
    tracemalloc.start()
    try:
        for case in cases:
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            with contextlib.suppress(GGUFError):
                parse(case)
            assert tracemalloc.get_traced_memory()[1] - before < (1 << 20) + 20 * len(case)
    finally:
        tracemalloc.stop()
