# SPDX-License-Identifier: MIT
"""Distributions of times: counts by powers of two, and how to draw them as text.

Bucket ``b`` counts times from ``2**b`` up to, and without, ``2**(b + 1)`` ns; the first one 0 as
well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from .units import format_ns

__all__ = ["BUCKETS", "bounds", "count", "draw", "percentile"]

BUCKETS = 64


def count(times: Iterable[int]) -> list[int]:
    """Return how many times, in ns, fall into each bucket."""
    counts = [0] * BUCKETS
    for time in times:
        counts[min(BUCKETS, max(1, time.bit_length())) - 1] += 1
    return counts


def bounds(counts: Sequence[int]) -> tuple[int, int] | None:
    """Return the first and the last bucket that has something; None for none."""
    used = [bucket for bucket, number in enumerate(counts) if number]
    return (used[0], used[-1]) if used else None


def percentile(counts: Sequence[int], part: float) -> int | None:
    """Return a bound in ns that at least this part of all times is below; None for none."""
    total = sum(counts)
    seen = 0
    for bucket, number in enumerate(counts):
        seen += number
        if number and seen >= part * total:
            return int(2 << bucket)
    return None


def draw(columns: Sequence[tuple[str, Sequence[int]]], width: int) -> Iterator[str]:
    """Yield the lines of histograms side by side: a head, then one for each bucket.

    Each has its own scale: its fullest bucket is as long as there is room. What is not empty has a
    mark at least.

    Args:
        columns: titles and counts.
        width: characters of a line, at most.
    """
    found = [b for _, counts in columns if (b := bounds(counts))]
    if not found:
        return
    buckets = range(min(b[0] for b in found), max(b[1] for b in found) + 1)
    labels = [f"< {format_ns(2 << bucket)}" for bucket in buckets]
    left = max(len(label) for label in labels)
    numbers = [max(len(str(n)) for n in counts) for _, counts in columns]
    room = (width - left - sum(numbers) - 4 * len(columns)) // len(columns)
    line = "time".rjust(left)
    for (title, _), number in zip(columns, numbers, strict=True):
        cell = number + 2 + room
        line += "  " + title[:cell].ljust(cell)
    yield line.rstrip()
    for bucket, label in zip(buckets, labels, strict=True):
        line = label.rjust(left)
        for (_, counts), number in zip(columns, numbers, strict=True):
            bar = "#" * -(-counts[bucket] * room // max(1, *counts))
            line += f"  {counts[bucket]:>{number}}  {bar.ljust(room)}"
        yield line.rstrip()
