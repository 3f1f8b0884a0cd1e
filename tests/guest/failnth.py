# SPDX-License-Identifier: MIT
"""The debug kernel's fail-nth: the n-th allocation that this thread makes in the kernel fails."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

DEBUGFS = Path("/sys/kernel/debug")

can_fail = pytest.mark.skipif(
    not Path("/proc/self/fail-nth").exists(), reason="needs the debug kernel (fault injection)"
)


def let_fail() -> None:
    """Let every allocation that may sleep fail, silently."""
    for kind in ("failslab", "fail_page_alloc"):
        for name, value in (("ignore-gfp-wait", "N"), ("ignore-gfp-highmem", "N"),
                            ("min-order", "0"), ("verbose", "0")):  # fmt: skip
            file = DEBUGFS / kind / name
            if file.exists():
                file.write_text(value)


def disarm(fd: int) -> bool:
    """End the injection; True if the failure was still to come."""
    try:
        unused = int(os.pread(fd, 16, 0)) > 0
    except OSError:  # it came just now, to the read itself
        unused = True
    while True:
        try:
            os.pwrite(fd, b"0", 0)
        except OSError:
            continue
        return unused


def sweep(
    call: Callable[[], int], check: Callable[[int], object] = lambda _: None, most: int = 400
) -> set[int]:
    """Call with the 1st, 2nd, … failure injected, until one call meets none.

    Injected are allocations (ENOMEM) and copies from and to user space (EFAULT).
    Only the call itself runs under injection; ``check`` looks at what it left.
    """
    fd = os.open("/proc/thread-self/fail-nth", os.O_RDWR)
    results = set()
    try:
        for n in range(1, most):
            os.pwrite(fd, b"%d" % n, 0)
            result = call()
            unused = disarm(fd)
            check(result)
            if unused:  # the n-th opportunity never came
                assert result == 0
                return results
            assert result in (0, errno.ENOMEM, errno.EFAULT), f"n={n}: {result}"
            results.add(result)
    finally:
        disarm(fd)
        os.close(fd)
    pytest.fail(f"still failing after {most} injections")
