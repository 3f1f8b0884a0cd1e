# SPDX-License-Identifier: MIT
"""Sizes and times as people write and read them. Units of sizes are powers of 1024."""

from __future__ import annotations

import re

from .errors import InvalidArgument

__all__ = ["format_ns", "format_quota", "format_size", "parse_size"]

_UNITS = {"": 0, "b": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_PATTERN = re.compile(r"\s*(\d{1,20}(?:\.\d{1,9})?)\s*([kmgt]?)(i?b)?\s*", re.ASCII | re.IGNORECASE)


def parse_size(text: str) -> int:
    """Return the bytes that a size names: ``64M``, ``1.5 GiB``, ``4096``.

    ``K``, ``KB`` and ``KiB`` all mean 1024 bytes, and so on up to ``T``.

    Raises:
        InvalidArgument: not a size, not a whole number of bytes, or 2^63 and more.
    """
    match = _PATTERN.fullmatch(text)
    if match is None or ((match[3] or "").lower() == "ib" and not match[2]):
        raise InvalidArgument(f"{text!r} is not a size", "write it like 64M, 1.5G or 4096")
    whole, _, fraction = match[1].partition(".")
    scale: int = 1024 ** _UNITS[match[2].lower()]
    size, rest = divmod(int(whole + fraction) * scale, int(10 ** len(fraction)))
    if rest:
        raise InvalidArgument(
            f"{text!r} is not a whole number of bytes", "write it like 64M, 1.5G or 4096"
        )
    if size >= 1 << 63:
        raise InvalidArgument(f"{text!r} is beyond 2^63 bytes", "ask for less")
    return size


def format_size(size: int) -> str:
    """Return a size for people: ``0 B``, ``512 B``, ``1.5 KiB``, ``64 MiB``."""
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    text = f"{value:.1f}".removesuffix(".0") if value < 100 else f"{value:.0f}"
    return f"{text} {unit}"


def format_quota(size: int) -> str:
    """Return a quota for people: a size, or ``none`` where there is no bound."""
    return "none" if size >= (1 << 64) - 1 else format_size(size)


def format_ns(time: int) -> str:
    """Return a time in ns for people: ``512 ns``, ``1.05 us``, ``33.6 ms``, ``120 s``."""
    value, unit = float(time), "ns"
    for larger in ("us", "ms", "s"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    if unit == "ns" or value >= 99.95:
        return f"{value:.0f} {unit}"
    return f"{value:.1f} {unit}" if value >= 9.995 else f"{value:.2f} {unit}"
