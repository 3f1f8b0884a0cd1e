# SPDX-License-Identifier: MIT
from __future__ import annotations

import pytest

from tensormem import histogram
from tensormem.units import format_ns


@pytest.mark.parametrize(("time", "bucket"), [
    (0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (1023, 9), (1024, 10), ((1 << 63) - 1, 62),
    (1 << 63, 63), (1 << 80, 63),
])  # fmt: skip
def test_count(time: int, bucket: int) -> None:
    counts = histogram.count([time, time])
    assert counts[bucket] == sum(counts) == 2
    assert len(counts) == histogram.BUCKETS
    if 1 < time < 1 << 63:
        assert 1 << bucket <= time < 2 << bucket


def test_bounds() -> None:
    assert histogram.bounds([0] * 64) is None
    assert histogram.bounds([]) is None
    assert histogram.bounds(histogram.count([5, 1000])) == (2, 9)


def test_percentile() -> None:
    counts = histogram.count([100] * 98 + [1000, 100_000])
    assert histogram.percentile(counts, 0.5) == 128
    assert histogram.percentile(counts, 0.98) == 128
    assert histogram.percentile(counts, 0.99) == 1024
    assert histogram.percentile(counts, 1) == 131072
    assert histogram.percentile(counts, 0) == 128
    assert histogram.percentile([0] * 64, 0.5) is None


def test_draw() -> None:
    counts = histogram.count([600] * 10 + [1100] + [5000] * 5)
    assert list(histogram.draw([("requests", counts)], 30)) == [
        "     time  requests",
        "< 1.02 us  10  ###############",
        "< 2.05 us   1  ##",
        "< 4.10 us   0",
        "< 8.19 us   5  ########",
    ]


def test_draw_side_by_side() -> None:
    """Each has its own scale."""
    left, right = histogram.count([70] * 4), histogram.count([200] * 1000 + [500])
    assert list(histogram.draw([("a", left), ("something long", right)], 40)) == [
        "    time  a             something long",
        "< 128 ns  4  #########     0",
        "< 256 ns  0             1000  #########",
        "< 512 ns  0                1  #",
    ]


@pytest.mark.parametrize("width", [40, 60, 77])
def test_drawings_fit(width: int) -> None:
    counts = histogram.count([3] * 123456 + [10**12] * 3)
    for columns in ([("x" * 90, counts)], [("rt", counts), ("malloc", histogram.count([7]))]):
        lines = list(histogram.draw(columns, width))
        assert len(lines) == 1 + 39
        assert max(map(len, lines)) <= width
        assert lines[-1].split()[:3] == ["<", "1100", "s"]
        assert "#" in lines[-1], "what is there is seen"


def test_nothing_to_draw() -> None:
    assert list(histogram.draw([("a", [0] * 64), ("b", ())], 80)) == []


@pytest.mark.parametrize(("time", "text"), [
    (0, "0 ns"), (999, "999 ns"), (1000, "1.00 us"), (1024, "1.02 us"), (9994, "9.99 us"),
    (9996, "10.0 us"), (99_940, "99.9 us"), (99_960, "100 us"), (999_400, "999 us"),
    (999_600, "1.00 ms"), (33_554_432, "33.6 ms"), (2 * 10**9, "2.00 s"), (10**12, "1000 s"),
])  # fmt: skip
def test_format_ns(time: int, text: str) -> None:
    assert format_ns(time) == text
