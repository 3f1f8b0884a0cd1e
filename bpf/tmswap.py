#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""tmswap: the life of model generations: staged, loaded, active, gone."""

from __future__ import annotations

import errno
import sys
from collections.abc import Mapping
from typing import ClassVar

import tmbpf

#: Where a generation's time counts from.
BEGINS = "model_stage"


class Swap(tmbpf.Tool):
    """A line for each step of a generation's life."""

    name = "tmswap"
    about = (
        "Model slots of tensormem: a line for each step in the life of a generation, and how long after it was "
        "staged. Faults on generations are told with each report."
    )
    examples = """  tmswap           until Ctrl-C
  tmswap -T -d 1h  an hour of it, with the time of day"""
    code = tmbpf.SUMS + tmbpf.RING
    streams = True
    probes: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            ("model_stage", "model_load", "model_commit", "model_rollback", "model_abort", "model_retire",
             "model_evict", "model_reload"),
            tmbpf.WHOLE,
        ),
        "model_fault": "tm_count(TM_EVENT, args->generation, 0, 0, args->mapped, args->latency_ns);",
    }  # fmt: skip

    def __init__(self) -> None:
        """No generation is known."""
        super().__init__()
        self.staged: dict[tuple[str, int], float] = {}

    def header(self) -> None:
        """The columns."""
        self.heading(f"{'SECONDS':>12} {'PID':>7} {'SLOT':<14} {'GEN':>5} {'STEP':<9} {'AFTER':>7} DETAIL")

    def record(self, record: tmbpf.Record) -> None:
        """One line."""
        slot, number = str(record.values.get("slot", "")), int(record.values.get("generation", 0))
        step = record.event.removeprefix("model_")
        if record.event == BEGINS:
            self.staged[slot, number] = record.seconds
        begun = self.staged.get((slot, number))
        after = None if begun is None else round((record.seconds - begun) * 1e9)
        if step in ("retire", "abort"):
            self.staged.pop((slot, number), None)
        if self.options.json:
            values = {name: value for name, value in record.values.items() if not name.startswith("extra")}
            self.emit(seconds=record.seconds, pid=record.pid, step=step, after_ns=after, **values)
            return
        shown = "-" if after is None else tmbpf.show_ns(after)
        self.print(f"{self.stamp()}{record.seconds:12.6f} {record.pid:>7} {slot:<14.14} {number:>5} {step:<9} "
                   f"{shown:>7} {detail(record)}")  # fmt: skip

    def report(self, sums: tmbpf.Sums, seconds: float) -> None:
        """Faults by generation."""
        for key, (count, mapped, total) in sorted(sums.items()):
            if self.options.json:
                self.emit(step="faults", generation=key[1], faults=count, mapped=mapped, total_ns=total)
            else:
                self.print(f"generation {key[1]}: {count} faults, {mapped} pages, {tmbpf.show_ns(total / count)} each")


def detail(record: tmbpf.Record) -> str:
    """What a step has beside its generation."""
    error = -int(record.values.get("error", 0))
    if error > 0:
        return errno.errorcode.get(error, str(error))
    size = record.values.get("size")
    return tmbpf.show_size(int(size)) if size is not None else ""


if __name__ == "__main__":
    sys.exit(Swap().main())
