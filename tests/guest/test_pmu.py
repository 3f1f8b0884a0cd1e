# SPDX-License-Identifier: MIT
"""Cores held to budgets of instructions, which stand for traffic: exact, for a guest whose clock counts them.

Only with qemu/guest run --icount does the emulated PMU count instructions; one is a nanosecond then, and
none is counted while a CPU waits.
"""

from __future__ import annotations

import os
import time
from itertools import repeat

import pytest

from device import core, hog, over, read, write

#: Instructions in a period of 10 ms.
PERIOD = 10_000_000
PERIODS = 200


@pytest.fixture(autouse=True)
def instructions(settings: None) -> None:
    if write("bandwidth/event", "instructions"):
        pytest.skip("the PMU does not count instructions: needs --icount")
    assert read("bandwidth/period_us") == 10_000
    assert write("bandwidth/throttle", 1) == 0


@pytest.mark.parametrize("percent", [10, 30, 60, 90])
def test_a_core_over_budget_is_held_to_it(percent: int) -> None:
    """Within a tenth, on average over many periods, as the PMU itself counts."""
    budget = PERIOD * percent // 100
    assert write("core0/budget", budget) == 0
    with hog(0):
        over(0, 10)
        seen = over(0, PERIODS)
    per_period = seen["total"] / seen["periods"]
    print(f"{percent} %: {per_period / budget:.4f} of the budget, {seen}")
    assert 0.9 * budget <= per_period <= 1.1 * budget
    assert seen["excess"] >= 0.9 * seen["periods"]
    # what it was not held for it ran, but for the interrupts and the holder
    ran = seen["periods"] * PERIOD - seen["held_ns"]
    assert 0.9 * seen["total"] <= ran <= 1.1 * seen["total"] + 0.05 * seen["periods"] * PERIOD


def work() -> int:
    """The nanoseconds that some work takes, which are its instructions: it allocates nothing, whose cost varies."""
    begin = time.monotonic_ns()
    for _ in repeat(None, 10_000_000):
        pass
    return time.monotonic_ns() - begin


def test_a_core_under_budget_is_not_slowed() -> None:
    work()
    free = min(work() for _ in range(8))
    assert write("core0/budget", 2 * PERIOD) == 0
    before = {name: core(0, name) for name in ("total", "excess", "held_ns", "periods")}
    runs = [work() for _ in range(8)]
    counted = min(runs)
    after = {name: core(0, name) for name in before}
    print(f"{free} ns without a budget, {counted} with one: {counted / free - 1:+.4%}")
    assert after["periods"] - before["periods"] >= sum(runs) // PERIOD
    # all of it is charged, but for what runs while the counter is looked at
    assert after["total"] - before["total"] >= 0.99 * sum(runs)
    assert (after["excess"], after["held_ns"]) == (before["excess"], before["held_ns"])
    assert counted <= 1.01 * free


@pytest.mark.parametrize("priority", [1, 50])
def test_a_real_time_task_is_neither_held_nor_charged(priority: int) -> None:
    """Its work takes as long as without a budget, while the core is over it; also at the holder's priority."""
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))
    try:
        work()
        free = min(work() for _ in range(8))
        assert write("core0/budget", PERIOD // 10) == 0
        with hog(0):
            before = {name: core(0, name) for name in ("total", "exempt")}
            counted = min(work() for _ in range(8))
            after = {name: core(0, name) for name in before}
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    print(f"{free} ns without a budget, {counted} with one: {counted / free - 1:+.4%}")
    assert counted <= 1.01 * free
    assert after["exempt"] - before["exempt"] >= 0.99 * 8 * counted
    assert after["total"] - before["total"] <= 0.1 * 8 * counted
