#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""tmsnoop: one line for each event of the module."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping

import tmbpf

#: Told only where there is room.
LAST = ("offset", "held", "handle")


class Snoop(tmbpf.Tool):
    """The stream of events."""

    name = "tmsnoop"
    about = "Tell each event of tensormem in a line: allocations, faults, KV caches, models, the RT pool."
    examples = """  tmsnoop                     everything
  tmsnoop -p 181 -e alloc,free    what one process allocates and frees
  tmsnoop -j -d 10s           ten seconds of it as lines of JSON"""
    code = tmbpf.RING
    streams = True

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        """Which events, and how wide."""
        parser.add_argument("-e", "--events", metavar="NAMES", help="only these, with commas between: alloc,free")
        parser.add_argument("-w", "--wide", action="store_true", help="all fields, however long the line")

    def check(self, parser: argparse.ArgumentParser) -> None:
        """Refuse names of no event."""
        known = tmbpf.ours()
        for name in self.options.events.split(",") if self.options.events else []:
            if known and name not in known:
                parser.error(f"no event is called {name!r}; there are {', '.join(known)}")

    def chosen(self) -> Mapping[str, str]:
        """All events of the module, or those asked for."""
        names = self.options.events.split(",") if self.options.events else tmbpf.ours()
        return dict.fromkeys(names, tmbpf.WHOLE)

    def header(self) -> None:
        """The columns."""
        self.heading(f"{'SECONDS':>12} {'PID':>6} {'COMM':<10} {'EVENT':<12} FIELDS")

    def record(self, record: tmbpf.Record) -> None:
        """One line."""
        if self.options.json:
            values = {name: value for name, value in record.values.items() if not name.startswith("extra")}
            self.emit(seconds=record.seconds, event=record.event, pid=record.pid, tid=record.tid,
                      cpu=record.cpu, comm=record.comm, **values)  # fmt: skip
            return
        line = f"{self.stamp()}{record.seconds:12.6f} {record.pid:>6} {record.comm:<10.10} {record.event:<12}"
        self.print(line + show(record.values, 0 if self.options.wide else tmbpf.WIDTH - len(line)))


def show(values: Mapping[str, int | str], room: int) -> str:
    """Fields with their names, as many as there is room for; all of them where ``room`` is 0."""
    names = [name for name in values if not name.startswith("extra")]
    words = ""
    for name in sorted(names, key=lambda name: name in LAST):
        value = values[name]
        if isinstance(value, int) and name.endswith("_ns"):
            word = f" {name.removesuffix('_ns')}={tmbpf.show_ns(value)}"
        elif isinstance(value, int) and name in ("size", "held", "bytes", "before", "after", "wanted", "given"):
            word = f" {name}={tmbpf.show_size(value)}"
        else:
            word = f" {name}={value}"
        if not room or len(words) + len(word) <= room:
            words += word
    return words


if __name__ == "__main__":
    sys.exit(Snoop().main())
