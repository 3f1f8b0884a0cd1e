# SPDX-License-Identifier: MIT
"""The gate lets a clean log pass, finds every kind of trouble, and never trusts what it cannot read."""

import pytest

from tmguest import splat

NONCE = "0123456789abcdef"
BEGIN = f"[    4.243258] tensormem-gate {NONCE} begin"
END = f"[    5.418187] tensormem-gate {NONCE} end"
BOOT = """[    0.000000] Booting Linux on physical CPU 0x0000000000 [0x410fd083]
[    0.000000] Kernel command line: console=ttyAMA0 ignore_loglevel oops=panic panic=-1
[    2.406311] Run /init as init process"""
AFTER = "[    5.450241] reboot: Power down"

WARN = """[    5.897071] WARNING: CPU: 1 PID: 185 at kmod/tests/tm_warn.c:5 warn_init+0x2c/0xff8 [tm_warn]
[    5.897814] Modules linked in: tm_warn(OE+) tensormem(OE) ext4
[    5.899194] Tainted: [O]=OOT_MODULE, [E]=UNSIGNED_MODULE
[    5.901508] Call trace:
[    5.901822]  warn_init+0x2c/0xff8 [tm_warn]
[    5.902888] ---[ end trace 0000000000000000 ]---"""


def log(*body: str) -> str:
    return "\n".join([BOOT, BEGIN, *body, END, AFTER]) + "\n"


def test_clean_log_passes() -> None:
    noise = (
        "[    5.1] tensormem: loading out-of-tree module taints kernel.",
        "[    5.2] tensormem: module verification failed: signature and/or required key missing",
        "[    5.3] kmemleak: 0 new suspected memory leaks (see /sys/kernel/debug/kmemleak)",
        "[    5.4] EXT4-fs (vda): mounted filesystem r/w without journal. Quota mode: none.",
    )
    assert splat.scan(log(*noise), NONCE) == splat.Verdict((), "")


def test_deliberate_warning_is_found_whole() -> None:
    verdict = splat.scan(log("[    5.0] before", WARN, "[    6.0] behind"), NONCE)
    assert verdict.splats == (WARN,)


def test_a_warnings_own_message_is_shown() -> None:
    cut = "[    5.896] ------------[ cut here ]------------"
    message = "[    5.897] tensormem: a deliberate warning"
    verdict = splat.scan(log("[    5.0] before", cut, message, WARN), NONCE)
    assert verdict.splats == (f"{message}\n{WARN}",)


@pytest.mark.parametrize(
    "line",
    [
        "BUG: KASAN: slab-use-after-free in buddy_free+0x24/0x98 [tensormem]",
        "BUG: sleeping function called from invalid context at include/linux/sched/mm.h:337",
        "BUG: scheduling while atomic: python3/190/0x00000002",
        "BUG kmalloc-64 (Tainted: G           OE     ): Redzone overwritten",
        "BUG: Bad page state in process python3  pfn:4a000",
        "watchdog: BUG: soft lockup - CPU#1 stuck for 22s! [python3:190]",
        "WARNING: possible circular locking dependency detected",
        "WARNING: suspicious RCU usage",
        "WARNING: inconsistent lock state",
        "WARNING: bad unlock balance detected!",
        "INFO: trying to register non-static key.",
        "INFO: task python3:190 blocked for more than 120 seconds.",
        "rcu: INFO: rcu_sched self-detected stall on CPU",
        "rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
        "UBSAN: array-index-out-of-bounds in kmod/core/buddy.c:99:12",
        "refcount_t: underflow; use-after-free.",
        "list_del corruption. prev->next should be ffff, but was dead",
        "Unable to handle kernel NULL pointer dereference at virtual address 0000000000000008",
        "Internal error: Oops: 0000000096000004 [#1] SMP",
        "kernel BUG at kmod/core/chunk.c:10!",
        "Kernel panic - not syncing: Oops: Fatal exception",
        "kmemleak: 3 new suspected memory leaks (see /sys/kernel/debug/kmemleak)",
        "unreferenced object 0xffff000004a1b300 (size 64):",
        "ODEBUG: free active (active state 0) object: 0000 object type: timer_list",
        "sysfs: cannot create duplicate filename '/kernel/tensormem'",
        "INFO: lockdep is turned off.",
    ],
)
def test_every_kind_of_trouble_is_found(line: str) -> None:
    for stamp in ("[    5.000000] ", "[    5.000000][  T190] ", ""):
        assert splat.scan(log(stamp + line), NONCE).splats


def test_trouble_counts_before_the_begin_and_after_the_end() -> None:
    text = log()
    panic = "[    6.0] Kernel panic - not syncing: Attempted to kill init!\n"
    assert splat.scan(panic + text, NONCE).splats
    assert splat.scan(text + panic, NONCE).splats


def test_only_the_first_reports_are_quoted() -> None:
    verdict = splat.scan(log(*[WARN] * 5), NONCE)
    assert len(verdict.splats) == splat.MOST


def test_truncated_log_is_not_trusted() -> None:
    assert "end marker" in splat.scan("\n".join([BOOT, BEGIN]), NONCE).problem
    assert "end marker" in splat.scan(log()[: log().index(END) + len(END) - 2], NONCE).problem


def test_unreadable_log_is_not_trusted() -> None:
    for text in ("", "\0\0\0", "\ufffd" * 100):
        assert "begin marker" in splat.scan(text, NONCE).problem


def test_marker_of_another_run_or_in_other_words_does_not_count() -> None:
    assert splat.scan(log().replace(NONCE, "f" * 16), NONCE).problem
    assert splat.scan(log().replace(END, f"[ 5.0] echo tensormem-gate {NONCE} end"), NONCE).problem


def test_markers_in_the_wrong_order_are_a_problem() -> None:
    assert "order" in splat.scan("\n".join([END, BEGIN]), NONCE).problem


def test_lost_lines_are_a_problem() -> None:
    verdict = splat.scan(log("[    5.0] ** 213 printk messages dropped **"), NONCE)
    assert "lost lines" in verdict.problem
