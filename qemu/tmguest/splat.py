# SPDX-License-Identifier: MIT
"""The splat gate: does a kernel log show that something went wrong? A pure function over the log's text.

It fails closed: a log without both of the run's own markers, or one that lost lines, proves nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MARK = "tensormem-gate"
MOST = 3
EXCERPT = 70
CUT = "[ cut here ]"
MESSAGE = 5

# The kernel's own words for trouble, as the big kernel test beds look for them.
TROUBLE = re.compile(
    r"BUG:|BUG [\w.-]+ \(|kernel BUG at|WARNING: |Oops|Internal error: |Kernel panic - not syncing"
    r"|Unable to handle kernel|UBSAN: |KCSAN: |KASAN: |KFENCE: |KMSAN: |ODEBUG: "
    r"|INFO: task \S+ blocked|INFO: \S+ (?:self-)?detected (?:expedited )?stall|detected stalls? on CPU"
    r"|INFO: possible |INFO: suspicious|INFO: trying to register non-static key|INFO: lockdep is turned off"
    r"|INFO: Slab |INFO: Object |possible (?:circular|recursive|irq lock inversion)|inconsistent lock state"
    r"|suspicious RCU usage|bad unlock balance|DEBUG_LOCKS_WARN_ON|soft lockup|hard LOCKUP|blocked for more than"
    r"|unreferenced object 0x|kmemleak: [1-9]\d* new suspected|kmemleak: Kernel memory leak detector disabled"
    r"|refcount_t: |list_(?:add|del) corruption|Bad (?:page|rss|pagetable|mode|swap)|bad: scheduling"
    r"|scheduling while atomic|Synchronous External Abort|SError Interrupt|Unhandled fault|stack-protector:"
    r"|cannot create duplicate filename|Fixing recursive fault|general protection fault|unregister_netdevice: waiting"
)
LOST = re.compile(r"\*\* \d+ printk messages dropped \*\*")
END_OF_SPLAT = re.compile(r"---\[ end (?:trace|Kernel panic)")
TIME = re.compile(r"^(?:\[\s*\d+\.\d+\](?:\[\s*\w+\])?\s?)")


@dataclass(frozen=True)
class Verdict:
    """What the gate found: at most ``MOST`` excerpts, and why the log cannot be trusted (empty if it can)."""

    splats: tuple[str, ...]
    problem: str


def marker(nonce: str, which: str) -> str:
    """The line that the guest writes to its log at the ``begin`` and at the ``end`` of a run."""
    return f"{MARK} {nonce} {which}"


def scan(text: str, nonce: str) -> Verdict:
    """Judge a whole kernel log. Splats count wherever they are, also during boot and after the end marker."""
    lines = text.splitlines()
    splats: list[str] = []
    at = 0
    while at < len(lines):
        if TROUBLE.search(lines[at]):
            last = _end(lines, at)
            if len(splats) < MOST:
                splats.append("\n".join(lines[_start(lines, at) : last]))
            at = last
        else:
            at += 1
    return Verdict(tuple(splats), _problem(lines, nonce))


def _start(lines: list[str], trouble: int) -> int:
    """Where the excerpt begins: newer kernels print a warning's own message above its header."""
    for at in range(max(trouble - MESSAGE, 0), trouble):
        if CUT in lines[at]:
            return at + 1
    return trouble


def _end(lines: list[str], start: int) -> int:
    limit = min(start + EXCERPT, len(lines))
    for at in range(start, limit):
        if END_OF_SPLAT.search(lines[at]):
            return at + 1
        if MARK in lines[at]:
            return at
    return limit


def _problem(lines: list[str], nonce: str) -> str:
    messages = [TIME.sub("", line) for line in lines]
    for which in ("begin", "end"):
        if marker(nonce, which) not in messages:
            return f"the kernel log has no {which} marker"
    if messages.index(marker(nonce, "begin")) > messages.index(marker(nonce, "end")):
        return "the kernel log's markers are in the wrong order"
    for line in messages:
        if LOST.search(line):
            return f"the kernel log lost lines: {line}"
    return ""
