#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""tmlat: how long allocations, faults and calls take, as histograms."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Mapping
from typing import ClassVar

import tmbpf

KINDS = {0: "", 1: "weights", 2: "kv", 3: "activations", 4: "protocol"}
POOLS = {0: "", 1: "chunk", 2: "buddy", 3: "slab", 4: "dma", 5: "kv", 6: "model", 7: "rt"}
#: By what a histogram may be split.
PARTS = ("pool", "kind", "size")
CODE = r"""
BPF_ARRAY(tm_signals, u64, 2);

static __always_inline void tm_late(u64 latency)
{
	int sent;
	u64 *count;

	if (!TM_OVER || latency < TM_OVER)
		return;
	sent = bpf_send_signal(TM_SIGNAL) == 0;
	count = tm_signals.lookup(&sent);
	if (count)
		__sync_fetch_and_add(count, 1);
}

/* a: kind and pool; b: a class of sizes, or a command; c: a class of latencies. */
static __always_inline void tm_took(u32 event, u32 kind, u32 pool, u32 b, u64 latency)
{
	tm_count(event, kind | pool << 8, b, tm_log2(latency), latency, 0);
}
"""


def took(kind: object, pool: object, b: object, late: bool = False) -> str:
    """A probe's body."""
    signals = "tm_late(args->latency_ns);" if late else ""
    return f"tm_took(TM_EVENT, {kind}, {pool}, {b}, args->latency_ns); {signals}"


class Lat(tmbpf.Tool):
    """Histograms of latency."""

    name = "tmlat"
    about = "Histograms of how long allocations, faults, calls and what they wait for take in tensormem."
    examples = """  tmlat                        all until Ctrl-C
  tmlat -e alloc --by kind,size 5 3  three times what came in 5 s
  tmlat --signal USR1 --over 5ms     tell who is slow to allocate"""
    code = tmbpf.SUMS + CODE
    probes: ClassVar[Mapping[str, str]] = {
        "alloc": took("args->kind", "args->pool", "tm_log2(args->size)", late=True),
        "rt_alloc": took(4, 7, "tm_log2(args->size)", late=True),
        "kv_extend": took(2, 5, 0, late=True),
        "fault": took(0, 0, 0),
        "kv_fault": took(2, 5, 0),
        "model_fault": took(1, 6, 0),
        "ioctl": took(0, 0, "args->cmd"),
        "chunk_grow": took(0, 1, 0),
        "kv_pack": took(2, 5, 0),
        "kv_unpack": took(2, 5, 0),
        "pressure_step": took(0, 0, "args->step"),
    }

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        """What to look at, how to split it, and whom to tell."""
        parser.add_argument("-e", "--events", metavar="NAMES", help=f"only these: {', '.join(self.probes)}")
        parser.add_argument("--by", default="pool", metavar="PARTS", help="by pool (default), kind, size, or none")
        parser.add_argument("--signal", metavar="NAME", help="send this to who was slow to allocate; with --over")
        parser.add_argument("--over", type=tmbpf.span, metavar="TIME", help="what is slow, such as 5ms")

    def check(self, parser: argparse.ArgumentParser) -> None:
        """Refuse what does not go together."""
        given = self.options
        for name in given.events.split(",") if given.events else []:
            if name not in self.probes:
                parser.error(f"-e: {name!r} has no latency; there are {', '.join(self.probes)}")
        self.by = [] if given.by == "none" else given.by.split(",")
        for part in self.by:
            if part not in PARTS:
                parser.error(f"--by: {part!r} is none of {', '.join(PARTS)}")
        if bool(given.signal) != bool(given.over):
            parser.error("--signal and --over go together")
        self.number = 0
        if given.signal:
            name = given.signal.upper().removeprefix("SIG")
            try:
                self.number = int(signal.Signals[f"SIG{name}"])
            except KeyError:
                parser.error(f"--signal: {given.signal!r} is not a signal")

    def flags(self) -> list[str]:
        """The signal and its bound."""
        return [f"-DTM_SIGNAL={self.number}", f"-DTM_OVER={round((self.options.over or 0) * 1e9)}ULL"]

    def chosen(self) -> Mapping[str, str]:
        """The events asked for."""
        names = self.options.events.split(",") if self.options.events else list(self.probes)
        return {name: self.probes[name] for name in names}

    def title(self, key: tmbpf.Key) -> dict[str, str]:
        """The histogram that a count belongs to."""
        event = self.event(key)
        title = {"event": event}
        if event == "ioctl":
            return {**title, "cmd": f"{key[2]:#x}"}
        if event == "pressure_step":
            return {**title, "step": str(key[2])}
        kind, pool = KINDS.get(key[1] & 255, "?"), POOLS.get(key[1] >> 8, "?")
        if "pool" in self.by and pool:
            title["pool"] = pool
        if "kind" in self.by and kind:
            title["kind"] = kind
        if "size" in self.by and event in ("alloc", "rt_alloc"):
            title["size"] = tmbpf.show_size(1 << key[2])
        return title

    def report(self, sums: tmbpf.Sums, seconds: float) -> None:
        """Each histogram with what it is of."""
        found: dict[tuple[tuple[str, str], ...], tuple[dict[int, int], list[int]]] = {}
        for key, (count, total, _) in sums.items():
            counts, totals = found.setdefault(tuple(self.title(key).items()), ({}, [0]))
            counts[key[3]] = counts.get(key[3], 0) + count
            totals[0] += total
        for title, (counts, totals) in sorted(found.items()):
            number = sum(counts.values())
            if self.options.json:
                buckets = {str(1 << bucket if bucket else 0): counts[bucket] for bucket in sorted(counts)}
                self.emit(**dict(title), count=number, total_ns=totals[0], buckets=buckets)
                continue
            words = " ".join(f"{name}={value}" if name != "event" else value for name, value in title)
            self.print(f"\n{self.stamp()}{words}: {number}, {tmbpf.show_ns(totals[0] / number)} on average")
            for line in tmbpf.draw(counts):
                self.print(line)
        if self.number and self.bpf:
            failed, sent = (int(count.value) for count in self.bpf.bpf["tm_signals"].values())
            if self.options.json:
                self.emit(signals=sent, failed=failed)
            else:
                self.print(f"{sent} signals sent, {failed} not")


if __name__ == "__main__":
    sys.exit(Lat().main())
