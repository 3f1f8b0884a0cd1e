# SPDX-License-Identifier: MIT
"""What holds around every test in the guest.

Before and after each: no client and no tensor is left, no page is in use or in
quarantine, and the kernel has not complained. The runner's own gate looks at the
whole log once more after the module is gone.
"""

from __future__ import annotations

import errno
import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from device import SYSFS, TRACING, Raw, Slot, read, wait_for, word, write
from tensormem import abi

KMEMLEAK = Path("/sys/kernel/debug/kmemleak")
COMPLAINTS = (
    "WARNING:", "BUG:", "Oops", "Internal error", "Unable to handle", "KASAN", "UBSAN",
    "INFO: task", "rcu: INFO", "suspicious RCU", "possible circular locking",
    "possible recursive locking", "inconsistent lock state", "invalid wait context",
    "sleeping function called", "unreferenced object", "new suspected memory leaks",
)  # fmt: skip

USAGE = (
    "clients/count", "clients/tensors", "clients/bytes", "clients/kept",
    "buddy/used_pages", "chunk/used", "chunk/quarantined", "chunk/charged",
    "kv/caches", "kv/held", "model/slots", "model/generations", "model/held",
    "model/evictable", "model/evicted",
    "rt/arenas", "rt/held", "rt/used",
    "dma/buffers", "dma/bytes", "dma/attachments", "dma/used",
)  # fmt: skip


def pytest_collection_finish() -> None:
    # what is there by now stays: the collection after each test need not look at it
    gc.collect()
    gc.freeze()


class KernelLog:
    """The kernel's messages from now on."""

    def __init__(self) -> None:
        self.fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        os.lseek(self.fd, 0, os.SEEK_END)

    def news(self) -> list[str]:
        lines = []
        while True:
            try:
                lines.append(os.read(self.fd, 8192).decode(errors="replace"))
            except BlockingIOError:
                return lines
            except BrokenPipeError:
                lines.append("BUG: the test missed kernel messages")


@pytest.fixture(scope="session")
def kernel_log() -> KernelLog:
    # dropping caches says so each time, unless told (once) to be quiet
    Path("/proc/sys/vm/drop_caches").write_text("4")
    return KernelLog()


_open: dict[str, int] = {}


def _value(name: str) -> int:
    """As read(), of a file that stays open: all of these are read around every test, which took most of a short one."""
    while True:
        if name not in _open:
            _open[name] = os.open(SYSFS / name, os.O_RDONLY)
        try:
            return int(os.pread(_open[name], 32, 0))
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
            os.close(_open.pop(name))  # the module was loaded anew


def usage() -> dict[str, int]:
    return {name: _value(name) for name in USAGE}


def settled(expected: dict[str, int], seconds: float = 60) -> dict[str, int]:
    """The usage, once it is down to what is expected or time is up: the last close is asynchronous."""
    end = time.monotonic() + seconds
    now = usage()
    while any(now[name] > expected[name] for name in USAGE) and time.monotonic() < end:
        time.sleep(0.02)
        now = usage()
    return now


@pytest.fixture(autouse=True)
def nothing_left(kernel_log: KernelLog) -> Iterator[None]:
    # what a failed test left is its failure, not that of all that follow
    before = settled(dict.fromkeys(USAGE, 0), seconds=1)
    kernel_log.news()
    yield
    gc.collect()
    left = {name: value for name, value in settled(before).items() if value > before[name]}
    assert not left, "the test left something behind"
    complaints = [m for m in kernel_log.news() if any(c in m for c in COMPLAINTS)]
    assert not complaints, "".join(complaints)


@pytest.fixture(autouse=True, scope="module")
def no_leak() -> Iterator[None]:
    """kmemleak finds nothing new after each file (debug kernel)."""
    yield
    if KMEMLEAK.exists():
        KMEMLEAK.write_text("scan")
        assert not KMEMLEAK.read_text()


@pytest.fixture
def raw() -> Iterator[Raw]:
    with Raw() as client:
        yield client


@pytest.fixture
def slot(raw: Raw) -> Iterator[Slot]:
    """An empty model slot, which would outlive the test."""
    new = abi.OpenFlag.CREATE | abi.OpenFlag.EXCL | abi.OpenFlag.WRITE
    with raw.slot("test", new, mode=0o600) as opened:
        yield opened
        assert opened.remove() in (0, errno.ENOENT)


@pytest.fixture
def trace() -> Iterator[None]:
    """The kernel's trace, with the module's events from here on and nothing else."""
    if not (TRACING / "events/tensormem").exists():
        pytest.fail("the module's tracepoints are not in tracefs")
    (TRACING / "trace").write_text("")
    (TRACING / "events/tensormem/enable").write_text("1")
    yield
    (TRACING / "events/tensormem/enable").write_text("0")
    (TRACING / "trace").write_text("")


@pytest.fixture
def settings() -> Iterator[None]:
    """Put back what a test changes in sysfs."""
    names = ("chunk/capacity", "chunk/reserve", "clients/default_quota", "rt/size", "rt/ready",
             "bandwidth/period_us", "bandwidth/throttle", "bandwidth/reclaim", "bandwidth/client_budget")  # fmt: skip
    before = {name: read(name) for name in names}
    event = word("bandwidth/event")
    yield
    for core in SYSFS.glob("core*"):
        assert write(f"{core.name}/budget", 0) == 0
    if word("bandwidth/event") != event:
        # none is what there was before one was chosen, and nobody's to choose
        assert event == "none" or write("bandwidth/event", event) == 0
    assert write("rt/ready", 0) == 0  # or the size could not be what it was
    for name, value in before.items():
        assert write(name, value) == 0


@pytest.fixture
def watermarks() -> Iterator[None]:
    """Put the watermarks back, and wait until there is no pressure."""
    low, high = read("pressure/low"), read("pressure/high")
    yield
    assert write("pressure/low", 0) == 0
    assert write("pressure/high", high) == 0
    assert write("pressure/low", low) == 0
    wait_for(lambda: (SYSFS / "pressure/level").read_text() == "none\n")
