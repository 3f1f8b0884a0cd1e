#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""tmkv: what KV caches do: tokens, hits, copies, evictions, compression."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import ClassVar

import tmbpf


def count(x: str, y: str) -> str:
    """A probe's body."""
    return f"tm_count(TM_EVENT, args->client, args->cache, 0, {x}, {y});"


class KV(tmbpf.Tool):
    """A table of KV caches."""

    name = "tmkv"
    about = (
        "KV caches of tensormem: tokens added, blocks found by their hash of those asked for, blocks copied and "
        "evicted, blocks compressed and brought back, faults."
    )
    examples = """  tmkv 1           once a second until Ctrl-C
  tmkv -j -d 60s   a minute of it as lines of JSON"""
    probes: ClassVar[Mapping[str, str]] = {
        "kv_extend": count("args->tokens", "args->latency_ns"),
        "kv_fork": count("0", "0"),
        "kv_lookup": count("args->asked", "args->matched"),
        "kv_copy": count("args->bytes", "0"),
        "kv_evict": count("args->blocks", "0"),
        "kv_pack": count("args->before", "args->after"),
        "kv_unpack": count("args->before", "args->after"),
        "kv_fault": count("args->write", "args->latency_ns"),
    }

    def report(self, sums: tmbpf.Sums, seconds: float) -> None:
        """The table."""
        caches: dict[tuple[int, int], dict[str, tmbpf.Sum]] = {}
        for key, sum_ in sums.items():
            caches.setdefault((key[1], key[2]), {})[self.event(key)] = sum_
        if not self.options.json:
            self.heading(f"{'CLIENT':>6} {'CACHE':>5} {'TOKENS':>7} {'FORKS':>5} {'HITS':>11} {'COPIES':>6} "
                         f"{'EVICT':>6} {'PACK':>5} {'SAVED':>6} {'UNPK':>5} {'FAULTS':>6}")  # fmt: skip
        for (client, cache), found in sorted(caches.items()):
            row = {event: found.get(event, (0, 0, 0)) for event in self.probes}
            if self.options.json:
                self.emit(
                    client=client, cache=cache, extends=row["kv_extend"][0], tokens=row["kv_extend"][1],
                    extend_ns=row["kv_extend"][2], forks=row["kv_fork"][0], lookups=row["kv_lookup"][0],
                    asked=row["kv_lookup"][1], matched=row["kv_lookup"][2], copies=row["kv_copy"][0],
                    copied=row["kv_copy"][1], evicted=row["kv_evict"][1], packs=row["kv_pack"][0],
                    before=row["kv_pack"][1], after=row["kv_pack"][2], unpacks=row["kv_unpack"][0],
                    faults=row["kv_fault"][0], writes=row["kv_fault"][1], fault_ns=row["kv_fault"][2],
                )  # fmt: skip
                continue
            asked, matched = row["kv_lookup"][1:]
            hits = f"{matched}/{asked}" if asked else "-"
            saved = tmbpf.show_size(row["kv_pack"][1] - row["kv_pack"][2])
            self.print(f"{client:>6} {cache:>5} {row['kv_extend'][1]:>7} {row['kv_fork'][0]:>5} {hits:>11} "
                       f"{row['kv_copy'][0]:>6} {row['kv_evict'][1]:>6} {row['kv_pack'][0]:>5} {saved:>6} "
                       f"{row['kv_unpack'][0]:>5} {row['kv_fault'][0]:>6}")  # fmt: skip


if __name__ == "__main__":
    sys.exit(KV().main())
