# SPDX-License-Identifier: MIT
"""Bytes moved, exact for known work; budgets of clients and cores, counted in periods and not in wall time."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from device import (
    CHUNK,
    PAGE,
    SYSFS,
    TRACING,
    Raw,
    Slot,
    core,
    events,
    full,
    hog,
    over,
    read,
    round_up,
    wait_for,
    weights,
    word,
    write,
)
from tensormem import abi

ANY = (1 << 64) - 1
NOZERO = abi.AllocFlag.NOZERO
POOLS = ("chunk", "buddy", "slab", "kv", "model", "rt")
MODULE = Path(__file__).parents[2] / "kmod/tensormem.ko"
#: What the emulated PMU always has: a tick a nanosecond, also while nobody runs.
CYCLES = 1_000_000_000
needs_two = pytest.mark.skipif(os.cpu_count() == 1, reason="needs two CPUs")


def moved() -> dict[str, int]:
    return {pool: read(f"bandwidth/{pool}_bytes") for pool in POOLS}


@contextlib.contextmanager
def moves(**expected: int) -> Iterator[None]:
    """So many bytes are moved for each pool, and none for the others."""
    before = moved()
    yield
    after = moved()
    assert {p: after[p] - before[p] for p in POOLS if after[p] != before[p]} == expected


@contextlib.contextmanager
def billed(client: Raw, expected: int) -> Iterator[None]:
    before = client.bandwidth().moved
    yield
    assert client.bandwidth().moved - before == expected


@pytest.fixture
def quiet(settings: None) -> None:
    """No reserve is filled, and no free chunk is left."""
    capacity = read("chunk/capacity")
    assert write("chunk/reserve", 0) == 0
    assert write("chunk/capacity", 0) == 0
    wait_for(lambda: read("chunk/total") == 0)
    assert write("chunk/capacity", capacity) == 0


# Bytes


@pytest.mark.parametrize("size", [1, PAGE, PAGE + 1, 37 * PAGE, CHUNK, 3 * CHUNK + 5 * PAGE])
def test_a_tensor_is_billed_for_what_it_holds(raw: Raw, size: int) -> None:
    with billed(raw, round_up(size, PAGE)):
        item = raw.alloc(size, pool=abi.Pool.BUDDY if size < CHUNK else 0)
    with billed(raw, 0):
        assert raw.free(item.handle) == 0


@pytest.mark.usefixtures("quiet")
def test_reuse_is_free(raw: Raw) -> None:
    """The memory comes back as it was, so nothing was moved."""
    with billed(raw, 5 * PAGE):
        item = raw.alloc(5 * PAGE, flags=NOZERO)
    assert raw.free(item.handle) == 0
    with billed(raw, 0), moves():
        item = raw.alloc(5 * PAGE, flags=NOZERO)
    assert raw.free(item.handle) == 0


@pytest.mark.usefixtures("quiet")
def test_small_tensors(raw: Raw) -> None:
    first = raw.alloc(100)
    length = raw.query(first.handle)[1].length
    with billed(raw, 10 * length), moves(slab=10 * length):
        items = [raw.alloc(100) for _ in range(10)]
    assert raw.free_batch([item.handle for item in [first, *items]])[0] == 0


@pytest.mark.usefixtures("quiet")
def test_pools(raw: Raw) -> None:
    """Chunks from the system are zeroed by it for us; a run is, when it was somebody's."""
    with moves(chunk=3 * CHUNK), billed(raw, 3 * CHUNK):
        large = raw.alloc(3 * CHUNK, pool=abi.Pool.CHUNK)
    assert raw.free(large.handle) == 0
    # two chunks of three, dirty now
    with moves(chunk=2 * CHUNK), billed(raw, 2 * CHUNK):
        large = raw.alloc(2 * CHUNK, pool=abi.Pool.CHUNK)
    keep = raw.alloc(PAGE)
    for pages in (1, 2, 16, 64):
        with moves(buddy=pages * PAGE), billed(raw, pages * PAGE):
            item = raw.alloc(pages * PAGE)
        assert raw.free(item.handle) == 0
    for item in (large, keep):
        assert raw.free(item.handle) == 0


@pytest.mark.usefixtures("quiet")
def test_compaction(raw: Raw) -> None:
    """What it moves is the pool's, and on nobody's bill."""
    items = [raw.alloc(4 * PAGE) for _ in range(6 * CHUNK // (4 * PAGE))]
    random.Random(5).shuffle(items)
    assert raw.free_batch([item.handle for item in items[len(items) // 4 :]])[0] == 0
    pages, bytes_ = read("buddy/moved_pages"), moved()
    with billed(raw, 0):
        assert write("buddy/compact", 1) == 0
    pages = read("buddy/moved_pages") - pages
    assert pages > 0
    assert moved() == {**bytes_, "buddy": bytes_["buddy"] + pages * PAGE}
    assert raw.free_batch([item.handle for item in items[: len(items) // 4]])[0] == 0


@pytest.mark.usefixtures("quiet")
def test_kv(raw: Raw) -> None:
    """A copied block, a packed one and an unpacked one."""
    with raw.kv([full(2, 512)], block_tokens=64) as kv:
        block = kv.block_bytes()
        seq = kv.open(tokens=96)
        with moves(kv=block), billed(raw, block):
            child = kv.fork(seq, 80)
        assert kv.end(child) == 0
        before = moved()["kv"]
        result, pack = kv.pack(seq)
        assert result == 0
        packed = moved()["kv"] - before
        # what lies in pages fills them but for the last
        assert pack.before < packed <= pack.before + pack.after
        with moves(kv=pack.before + pack.after), billed(raw, pack.before + pack.after):
            assert kv.pack(seq, abi.KV_UNPACK)[0] == 0


def test_models(raw: Raw, slot: Slot) -> None:
    """What is read, and what is compared with the active generation."""
    size = CHUNK + 3 * PAGE
    data = weights("bandwidth", size)
    before = moved()["model"]
    slot.swap(data)
    assert moved()["model"] - before == size
    slot.swap(data)
    assert moved()["model"] - before == 3 * size
    with billed(raw, 0):
        slot.buried()


def test_rt_clients_are_on_nobodys_bill(raw: Raw) -> None:
    with billed(raw, 0), raw.rt() as rt:
        for _ in range(10):
            assert rt.free(rt.alloc(4096).handle) == 0


# Budgets of clients


def test_a_budget_is_lowered_by_anybody_and_raised_by_who_may(settings: None, raw: Raw) -> None:
    assert raw.bandwidth().budget == ANY
    assert raw.set_budget(0) == errno.EINVAL
    assert raw.set_budget(CHUNK) == 0
    assert raw.bandwidth().budget == CHUNK
    assert write("bandwidth/client_budget", 5 * CHUNK) == 0
    assert raw.bandwidth().budget == CHUNK
    with Raw() as other:
        assert other.bandwidth().budget == 5 * CHUNK
        assert other.set_budget(9 * CHUNK) == 0
        pid = os.fork()
        if pid == 0:
            os.setuid(65534)
            # another may be lowered, and raised to the default, and no further
            good = [other.set_budget(b) for b in (ANY, 10 * CHUNK, 8 * CHUNK, 5 * CHUNK, 6 * CHUNK, 1, 0)]
            os._exit(good != [errno.EPERM, errno.EPERM, 0, 0, errno.EPERM, 0, errno.EINVAL])
        assert os.waitpid(pid, 0)[1] == 0
        assert other.bandwidth().budget == 1


def test_structs_of_other_sizes(raw: Raw) -> None:
    def sized(request: int, size: int) -> int:
        return request & ~(0x3FFF << 16) | size << 16

    longer = bytearray(16)
    longer[0] = 5
    assert raw.ioctl(sized(abi.IOC_SET_BUDGET, 16), longer) == 0
    assert raw.bandwidth().budget == 5
    longer[15] = 1
    assert raw.ioctl(sized(abi.IOC_SET_BUDGET, 16), longer) == errno.EINVAL
    assert raw.ioctl(sized(abi.IOC_SET_BUDGET, 4), bytearray(4)) == errno.EINVAL
    short = bytearray(8)
    assert raw.ioctl(sized(abi.IOC_BANDWIDTH, 8), short) == 0
    assert int.from_bytes(short, "little") == 5


def test_excess_is_told_once_a_period(raw: Raw, trace: None, settings: None) -> None:
    """Without throttling nobody waits, however much is moved."""
    assert write("bandwidth/period_us", 1_000_000) == 0
    assert raw.set_budget(3 * PAGE) == 0
    period = raw.bandwidth().period_ns
    assert period == 10**9
    begin = time.monotonic_ns()
    for _ in range(200):
        assert raw.free(raw.alloc(2 * PAGE).handle) == 0
    periods = (time.monotonic_ns() - begin) // period + 2
    seen = raw.bandwidth()
    told = [e for e in events("bandwidth") if int(e["client"]) == seen.client]
    assert 1 <= seen.excess == len(told) <= periods
    assert {(e["cpu"], e["budget"], e["throttled"]) for e in told} == {("-1", str(3 * PAGE), "0")}
    assert all(int(e["used"]) > 3 * PAGE for e in told)
    assert (seen.waits, seen.held_ns) == (0, 0)


def test_within_the_budget_nothing_happens(raw: Raw, trace: None, settings: None) -> None:
    assert write("bandwidth/throttle", 1) == 0
    assert write("bandwidth/period_us", 1_000_000) == 0
    assert raw.set_budget(64 * PAGE) == 0
    for _ in range(32):
        assert raw.free(raw.alloc(2 * PAGE).handle) == 0
    seen = raw.bandwidth()
    assert (seen.excess, seen.waits, seen.held_ns) == (0, 0, 0)
    assert not events("bandwidth")


def test_who_took_too_much_waits_for_as_many_periods(raw: Raw, settings: None) -> None:
    assert write("bandwidth/throttle", 1) == 0
    totals = {name: read(f"bandwidth/client_{name}") for name in ("excess", "waits", "held_ns")}
    assert raw.set_budget(16 * PAGE) == 0
    period = raw.bandwidth().period_ns
    begin = time.monotonic_ns()
    large = raw.alloc(160 * PAGE)
    assert raw.bandwidth().waits == 0
    small = raw.alloc(PAGE)
    spent = time.monotonic_ns() - begin
    seen = raw.bandwidth()
    # its own period and eight more are paid for in full
    assert spent > 8 * period
    assert seen.waits == 1
    assert seen.held_ns <= spent
    after = {name: read(f"bandwidth/client_{name}") for name in totals}
    assert {n: after[n] - totals[n] for n in totals} == {
        "excess": seen.excess, "waits": 1, "held_ns": seen.held_ns,
    }  # fmt: skip
    assert raw.free_batch([large.handle, small.handle])[0] == 0


def test_in_the_long_run_a_client_is_held_to_its_budget(raw: Raw, settings: None) -> None:
    assert write("bandwidth/throttle", 1) == 0
    assert write("bandwidth/period_us", 5000) == 0
    assert raw.set_budget(10 * PAGE) == 0
    begin, start = time.monotonic_ns(), raw.bandwidth().moved
    for _ in range(100):
        assert raw.free(raw.alloc(7 * PAGE).handle) == 0
    seen = raw.bandwidth()
    periods = (time.monotonic_ns() - begin) // seen.period_ns + 1
    assert seen.moved - start == 700 * PAGE
    # all but the last call, whose excess is still to be paid for
    assert seen.moved - start <= (periods + 1) * 10 * PAGE + 7 * PAGE
    assert seen.waits >= 1


@contextlib.contextmanager
def waiting(client: Raw) -> Iterator[int]:
    """A child that waits for a period that will hardly come, and then allocates."""
    assert write("bandwidth/period_us", 1_000_000) == 0
    assert write("bandwidth/throttle", 1) == 0
    assert client.set_budget(1) == 0
    assert client.free(client.alloc(CHUNK).handle) == 0
    pid = os.fork()
    if pid == 0:
        os._exit(client.try_alloc(PAGE)[0])
    wait_for(lambda: "tm_bandwidth_wait" in Path(f"/proc/{pid}/stack").read_text())
    yield pid


def test_a_fatal_signal_ends_the_wait(raw: Raw, settings: None) -> None:
    with waiting(raw) as pid:
        os.kill(pid, signal.SIGKILL)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert raw.info().nr_tensors == 0


@pytest.mark.parametrize(
    "release",
    [lambda _: write("bandwidth/throttle", 0), lambda client: client.set_budget(ANY)],
    ids=["no throttling", "no budget"],
)
def test_new_rules_end_the_wait(raw: Raw, settings: None, release: Callable[[Raw], int]) -> None:
    with waiting(raw) as pid:
        assert release(raw) == 0
        assert os.waitpid(pid, 0)[1] == 0
    assert raw.info().nr_tensors == 1


def test_rt_clients_do_not_wait(raw: Raw, settings: None) -> None:
    with waiting(raw) as pid:
        with raw.rt() as rt:
            assert rt.free(rt.alloc(4096).handle) == 0
        os.kill(pid, signal.SIGKILL)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    # only the child did
    assert raw.bandwidth().waits == 1


def test_models_load_the_slower(raw: Raw, slot: Slot, settings: None) -> None:
    """In steps, each of which waits; and a load that waits can be given up."""
    data = weights("slow", CHUNK)
    assert write("bandwidth/period_us", 5000) == 0
    assert write("bandwidth/throttle", 1) == 0
    assert raw.set_budget(CHUNK // 4) == 0
    begin = time.monotonic_ns()
    slot.swap(data)
    # the chunk is zeroed and read
    assert time.monotonic_ns() - begin > 3 * 5_000_000
    assert raw.set_budget(1) == 0
    memfd = os.memfd_create("model")
    os.pwrite(memfd, data, 0)
    with slot.stage(memfd) as staged:
        assert slot.abort(staged.number) == 0
    os.close(memfd)


# Bad input


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("bandwidth/period_us", (0, 999, 1_000_001)),
        ("bandwidth/throttle", (2,)),
        ("bandwidth/reclaim", (2,)),
        ("bandwidth/client_budget", (0,)),
        ("core0/budget", ((1 << 48) + 1,)),
    ],
)
def test_values_out_of_range(name: str, values: tuple[int, ...]) -> None:
    before = read(name)
    for value in values:
        assert write(name, value) == errno.EINVAL
    assert read(name) == before


@pytest.mark.parametrize("name", ["", "none", "cycle", "cyclesx", "r", "r10000", "r-1", "rzz", "x" * 300])
def test_no_such_event(name: str) -> None:
    before = word("bandwidth/event")
    assert write("bandwidth/event", name + "\n") == errno.EINVAL
    assert word("bandwidth/event") == before


# Budgets of cores


@pytest.fixture
def cycles(settings: None) -> None:
    if write("bandwidth/event", "cycles"):
        pytest.skip("there is no PMU")


def holders() -> set[str]:
    found = set()
    for path in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            found.add(path.read_text().strip())
    return {name for name in found if name.startswith("tm-hold/")}


def test_events_that_the_pmu_lacks(cycles: None) -> None:
    for name in ("l2d_cache_refill", "bus_access", "r0019", "instructions"):
        assert write("bandwidth/event", name) == errno.EOPNOTSUPP, name
    assert word("bandwidth/event") == "cycles"
    assert write("bandwidth/event", "r0011\n") == 0
    assert word("bandwidth/event") == "r0011"
    assert write("bandwidth/event", "cycles") == 0


def test_nothing_exists_before_a_budget_and_after_it(cycles: None) -> None:
    assert holders() == set()
    before = core(0, "periods")
    assert write("core0/budget", CYCLES) == 0
    wait_for(lambda: holders() == {"tm-hold/0"})
    assert write("bandwidth/event", "cycles") == errno.EBUSY
    wait_for(lambda: core(0, "periods") > before)
    assert write("core0/budget", 2 * CYCLES) == 0
    assert core(0, "budget") == 2 * CYCLES
    assert write("core0/budget", 0) == 0
    assert holders() == set()
    before = core(0, "periods")
    time.sleep(0.1)
    assert core(0, "periods") == before


def test_a_budget_without_an_event(settings: None) -> None:
    if word("bandwidth/event") != "none":
        pytest.skip("an event was chosen, and none cannot be")
    assert write("core0/budget", 1000) == errno.ENODEV
    assert core(0, "budget") == 0


@needs_two
def test_a_core_is_told_and_not_held(cycles: None, trace: None) -> None:
    assert write("core1/budget", CYCLES // 1000) == 0
    with hog(1):
        seen = over(1, 50)
    assert write("core1/budget", 0) == 0
    assert seen["excess"] >= 40
    assert seen["held_ns"] == 0
    told = [e for e in events("bandwidth") if e["cpu"] == "1"]
    assert len(told) >= seen["excess"]
    assert {(e["client"], e["budget"], e["throttled"]) for e in told} == {("0", str(CYCLES // 1000), "0")}


@needs_two
def test_a_core_is_held_until_nobody_wants_it_held(cycles: None) -> None:
    """How exactly is for test_pmu.py: these cycles go on while the host has taken the CPU away."""
    assert write("core1/budget", CYCLES // 100 * 2 // 5) == 0
    with hog(1):
        assert over(1, 50)["held_ns"] == 0
        assert write("bandwidth/throttle", 1) == 0
        seen = over(1, 100)
        assert seen["held_ns"] > 0
        assert seen["excess"] > 0
        assert write("bandwidth/throttle", 0) == 0
        over(1, 2)
        assert over(1, 50)["held_ns"] == 0


@needs_two
def test_what_others_do_not_use_may_be_drawn_on(cycles: None, trace: None) -> None:
    """This CPU sleeps, so that most of its budget is to be had."""
    assert write("bandwidth/throttle", 1) == 0
    budget = CYCLES // 100 // 4
    for cpu in (0, 1):
        assert write(f"core{cpu}/budget", budget) == 0
    os.sched_setaffinity(0, {0})
    try:
        with hog(1):
            over(1, 50)
            alone = [int(e["budget"]) for e in events("bandwidth") if e["cpu"] == "1"]
            assert write("bandwidth/reclaim", 1) == 0
            over(1, 5)
            (TRACING / "trace").write_text("")
            over(1, 50)
            shared = [int(e["budget"]) for e in events("bandwidth") if e["cpu"] == "1"]
    finally:
        os.sched_setaffinity(0, set(range(os.cpu_count() or 1)))
    assert set(alone) == {budget}
    # what it had used up when it was over: no more than both together have
    assert budget < max(shared) <= 2 * budget


@needs_two
# 6.12-rt itself warns in affine_move_task() when a task that may run nowhere else dies meanwhile
@pytest.mark.skipif("PREEMPT_RT" in os.uname().version, reason="CPU hotplug under load is not sound there")
def test_cpu_hotplug(cycles: None) -> None:
    """A budget outlives its core, and holds when that is back."""
    online = Path("/sys/devices/system/cpu/cpu1/online")
    if not online.exists():
        pytest.skip("CPUs do not go")
    assert write("bandwidth/throttle", 1) == 0
    budget = CYCLES // 100 // 3
    assert write("core1/budget", budget) == 0
    with hog(1):
        over(1, 5)
        online.write_text("0")
        try:
            assert holders() == set()
            assert core(1, "budget") == budget
            # what is set meanwhile is for later
            assert write("core1/budget", 2 * budget) == 0
            assert holders() == set()
        finally:
            online.write_text("1")
    assert holders() == {"tm-hold/1"}
    with hog(1):
        seen = over(1, 100)
    assert core(1, "budget") == 2 * budget
    assert seen["held_ns"] > 0
    assert seen["excess"] > 0


def test_unload_with_budgets(cycles: None) -> None:
    assert write("bandwidth/throttle", 1) == 0
    for path in SYSFS.glob("core*"):
        assert write(f"{path.name}/budget", CYCLES // 200) == 0
    try:
        subprocess.run(["rmmod", "tensormem"], check=True)
        assert holders() == set()
    finally:
        subprocess.run(["insmod", MODULE], check=True)
    assert word("bandwidth/event") in ("none", "l2d_cache_refill", "bus_access")
    assert core(0, "budget") == 0


def test_setting_budgets_while_cores_are_held(cycles: None) -> None:
    """Many changes, from two processes, while the CPUs are busy."""
    assert write("bandwidth/throttle", 1) == 0
    assert write("bandwidth/period_us", 1000) == 0
    cpus = sorted(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        for cpu in cpus:
            stack.enter_context(hog(cpu))
        pid = os.fork()
        for turn in range(15):
            for cpu in cpus:
                assert write(f"core{cpu}/budget", turn % 3 * CYCLES // 2000) == 0
            assert write("bandwidth/period_us", 1000 + turn % 4 * 3000) == 0
            assert write("bandwidth/reclaim", turn % 2) == 0
        if pid == 0:
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
    for cpu in cpus:
        assert write(f"core{cpu}/budget", 0) == 0
    assert holders() == set()
