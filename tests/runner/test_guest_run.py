# SPDX-License-Identifier: MIT
"""`qemu/guest run` itself, with real guests: what it prints, and the gates that must close."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SPLAT, TIMEOUT, BROKEN = 123, 124, 125


def guest(*options: str, command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "qemu/guest", "run", "--timeout", "120", *options, "--", "sh", "-c", command],
        capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def boot_log(stderr: str) -> Path:
    match = re.search(r"(\S+/build/guest/\S+\.log)", stderr)
    assert match, stderr
    return Path(match.group(1))


def test_output_and_exit_code_are_the_commands() -> None:
    result = guest(command="echo out; echo err >&2; tensormem --version >/dev/null && exit 7")
    assert result.returncode == 7
    assert result.stdout == "out\n"
    assert "err\n" in result.stderr


@pytest.mark.parametrize("kernel", ["6.12", "debug"])
def test_a_deliberate_warning_closes_the_gate(kernel: str) -> None:
    result = guest("--kernel", kernel, command="insmod kmod/tests/tm_warn.ko && echo fine")
    assert result.returncode == SPLAT
    assert result.stdout == "fine\n"
    assert "tensormem: a deliberate warning" in result.stderr
    assert "tm_warn_init" in result.stderr
    assert "deliberate" in boot_log(result.stderr).read_text()


def test_a_panic_closes_the_gate() -> None:
    result = guest(command="echo before; sleep 1; echo c > /proc/sysrq-trigger; sleep 100")
    assert result.returncode == SPLAT
    assert result.stdout == "before\n"
    assert "sysrq triggered crash" in result.stderr.lower()


def test_a_leak_closes_the_gate() -> None:
    """On the debug kernel memory that a module loses is found after its unload."""
    result = guest("--kernel", "debug", command="insmod kmod/tests/tm_leak.ko && rmmod tm_leak")
    assert result.returncode == SPLAT
    assert "unreferenced object" in result.stderr


def test_a_module_that_cannot_be_unloaded_fails() -> None:
    result = guest(command="insmod kmod/tests/tm_stay.ko; echo left")
    assert result.returncode == BROKEN
    assert result.stdout == "left\n"
    assert "rmmod" in result.stderr


def test_time_out() -> None:
    result = guest("--timeout", "20", command="echo begun; sleep 1000")
    assert result.returncode == TIMEOUT
    assert result.stdout == "begun\n"
    assert boot_log(result.stderr).exists()


def test_a_shared_folder(tmp_path: Path) -> None:
    (tmp_path / "in").write_text("from the host")
    share = f"/share/{tmp_path.name}"
    result = guest("--share", str(tmp_path), command=f"cat {share}/in; echo back > {share}/out")
    assert (result.returncode, result.stdout) == (0, "from the host")
    assert (tmp_path / "out").read_text() == "back\n"
    result = guest("--share", f"{tmp_path}:ro", command=f"echo no > {share}/out || exit 3")
    assert result.returncode == 3
    assert (tmp_path / "out").read_text() == "back\n"


def test_instructions_are_the_clock() -> None:
    """Under --icount two boots measure the same work to the nanosecond."""
    # work that allocates nothing, and the least of some runs: ticks are work as well
    work = (
        "python3 -S -c 'from collections import deque; from itertools import repeat;"
        " from time import monotonic_ns as ns;"
        " print(min(-ns() + (deque(repeat(None, 1000000), 0), ns())[1] for _ in range(9)))'"
    )
    first, second = (int(guest("--icount", command=work).stdout) for _ in range(2))
    assert first > 1_000_000
    assert abs(first - second) <= first // 1000


def test_numa_nodes() -> None:
    result = guest("--numa", "2", "--cpus", "2", command="ls -d /sys/devices/system/node/node*")
    assert result.stdout.split() == [f"/sys/devices/system/node/node{n}" for n in (0, 1)]
