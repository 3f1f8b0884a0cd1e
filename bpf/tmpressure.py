#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""tmpressure: how memory is given back, beside what the system's own reclaim costs."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import tmbpf

SYSFS = Path(os.environ.get("TENSORMEM_SYSFS", "/sys/class/misc/tensormem"))
ZONEINFO = Path("/proc/zoneinfo")
BEGIN, END = "vmscan:mm_vmscan_direct_reclaim_begin", "vmscan:mm_vmscan_direct_reclaim_end"
CODE = r"""
BPF_HASH(tm_stalls, u32, u64, 4096);
"""


class Pressure(tmbpf.Tool):
    """Steps, levels and stalls."""

    name = "tmpressure"
    about = (
        "Memory pressure: the watermarks, what tensormem gave back by step, chunks it took and gave, and how often "
        "and how long the system's own direct reclaim made a process wait."
    )
    examples = """  tmpressure 1         once a second until Ctrl-C
  tmpressure -j -d 60s one report over a minute, as lines of JSON"""
    code = tmbpf.SUMS + CODE
    probes: ClassVar[Mapping[str, str]] = {
        "pressure_level": "tm_count(TM_EVENT, args->level, 0, 0, args->available, args->given);",
        "pressure_step": "tm_count(TM_EVENT, args->step, 0, 0, args->given, args->latency_ns);",
        "chunk_grow": "tm_count(TM_EVENT, args->ok, 0, 0, 0, args->latency_ns);",
        "chunk_shrink": "tm_count(TM_EVENT, 0, 0, 0, 0, 0);",
        "kv_evict": "tm_count(TM_EVENT, 0, 0, 0, args->blocks, 0);",
        "kv_pack": "tm_count(TM_EVENT, 0, 0, 0, args->before - args->after, args->latency_ns);",
        "model_evict": "tm_count(TM_EVENT, 0, 0, 0, 0, 0);",
        BEGIN: "u32 tid = bpf_get_current_pid_tgid(); u64 now = bpf_ktime_get_ns(); tm_stalls.update(&tid, &now);",
        END: """u32 tid = bpf_get_current_pid_tgid();
	u64 *start = tm_stalls.lookup(&tid);

	if (start) {
		tm_count(TM_EVENT, 0, 0, 0, args->nr_reclaimed, bpf_ktime_get_ns() - *start);
		tm_stalls.delete(&tid);
	}""",
    }

    def report(self, sums: tmbpf.Sums, seconds: float) -> None:
        """The watermarks and the table."""
        marks = watermarks()
        rows: list[tuple[str, str, tmbpf.Sum]] = []
        for key, sum_ in sorted(sums.items()):
            event = self.event(key)
            if event == BEGIN:
                continue
            detail = ""
            if event in ("pressure_level", "pressure_step"):
                name = event.removeprefix("pressure_")
                detail = str(next(f for f in tmbpf.fields(event) if f.name == name).show(key[1]))
            elif event == "chunk_grow":
                detail = "" if key[1] else "refused"
            rows.append(("direct reclaim" if event == END else event, detail, sum_))
        if self.options.json:
            self.emit(watermarks=marks)
            for event, detail, (count, x, y) in rows:
                self.emit(event=event, detail=detail, count=count, **values(event, x, y))
            return
        stamp = self.stamp()
        self.print(f"{stamp}" + ", ".join(f"{name} {tmbpf.show_size(value)}" for name, value in marks.items()))
        self.heading(f"{'EVENT':<16} {'':<10} {'COUNT':>8} {'AMOUNT':>8} {'TIME':>8} {'EACH':>8}")
        for event, detail, (count, x, y) in rows:
            found = values(event, x, y)
            amount = found.get("bytes", found.get("pages", found.get("blocks")))
            shown = "-" if amount is None else tmbpf.show_size(amount) if "bytes" in found else str(amount)
            took = found.get("total_ns")
            whole = "-" if took is None else tmbpf.show_ns(took)
            each = "-" if took is None else tmbpf.show_ns(took / count)
            self.print(f"{event:<16} {detail:<10} {count:>8} {shown:>8} {whole:>8} {each:>8}")


def values(event: str, x: int, y: int) -> dict[str, int]:
    """What the two sums of an event are."""
    meanings: Mapping[str, tuple[str, str]] = {
        "pressure_step": ("bytes", "total_ns"),
        "chunk_grow": ("", "total_ns"),
        "kv_evict": ("blocks", ""),
        "kv_pack": ("bytes", "total_ns"),
        "direct reclaim": ("pages", "total_ns"),
    }
    names = meanings.get(event, ("", ""))
    return {name: value for name, value in zip(names, (x, y), strict=True) if name}


def watermarks() -> dict[str, int]:
    """Bytes: free in the system, its own marks, and the module's, where it has some."""
    page = os.sysconf("SC_PAGE_SIZE")
    found = dict.fromkeys(("free", "min", "low", "high"), 0)
    if ZONEINFO.exists():
        for line in ZONEINFO.read_text().splitlines():
            words = line.split()
            # as in "  pages free     1234" and "        min      567"
            name, value = (words[-2], words[-1]) if len(words) >= 2 else ("", "")
            if name in found and value.isdigit() and (len(words) == 2 or words[0] == "pages"):
                found[name] += int(value) * page
    for name in ("low", "high"):
        file = SYSFS / "pressure" / name
        if file.exists():
            found[f"our {name}"] = int(file.read_text())
    return found


if __name__ == "__main__":
    sys.exit(Pressure().main())
