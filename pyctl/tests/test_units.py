# SPDX-License-Identifier: MIT
from __future__ import annotations

import pytest

from tensormem.errors import InvalidArgument
from tensormem.units import format_quota, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("1b", 1),
        ("64M", 64 << 20),
        ("64m", 64 << 20),
        (" 64 MiB ", 64 << 20),
        ("64mb", 64 << 20),
        ("1.5G", 3 << 29),
        ("1.5 GiB", 3 << 29),
        ("2T", 2 << 40),
        ("0.5k", 512),
        (str((1 << 63) - 1), (1 << 63) - 1),
    ],
)
def test_parse(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", " ", "M", "-1", "1..5G", "1e9", "64 Q", "64MM", "1,5G", "0.3", "1.0000001k", "٣", "5ib",
     "nan", "9223372036854775808", "8388608T", "9" * 30],
)  # fmt: skip
def test_refuse(text: str) -> None:
    with pytest.raises(InvalidArgument) as info:
        parse_size(text)
    assert repr(text) in str(info.value)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (2 << 20, "2 MiB"),
        (150 << 20, "150 MiB"),
        (1 << 30, "1 GiB"),
        (3 << 61, "6 EiB"),
    ],
)
def test_format(size: int, text: str) -> None:
    assert format_size(size) == text


def test_quota() -> None:
    assert format_quota((1 << 64) - 1) == "none"
    assert format_quota(64 << 20) == "64 MiB"
    assert format_quota(0) == "0 B"
