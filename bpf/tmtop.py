#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""tmtop: clients by what they allocate."""

from __future__ import annotations

import argparse
import ctypes
import sys
from collections.abc import Mapping
from typing import ClassVar

import tmbpf

CODE = r"""
struct tm_name { u32 pid; char comm[16]; };
BPF_HASH(tm_names, u32, struct tm_name, 4096);

/* Who uses a client first has it, as far as we know. */
static __always_inline void tm_meet(u32 client)
{
	struct tm_name name = {};

	if (tm_names.lookup(&client))
		return;
	name.pid = bpf_get_current_pid_tgid() >> 32;
	bpf_get_current_comm(name.comm, sizeof(name.comm));
	tm_names.insert(&client, &name);
}
"""
MEET = "tm_meet(args->client); tm_count(TM_EVENT, args->client, 0, 0, "


class Top(tmbpf.Tool):
    """A table of clients."""

    name = "tmtop"
    about = (
        "Clients of tensormem by bytes: what each allocates and frees in a second, and by how much what it holds "
        "has grown since tmtop began."
    )
    examples = """  tmtop 1          once a second until Ctrl-C
  tmtop -s held 5 2    twice, those first that have grown most"""
    code = tmbpf.SUMS + CODE
    probes: ClassVar[Mapping[str, str]] = {
        "alloc": MEET + "args->size, args->held);",
        "free": MEET + "args->size, args->held);",
        "rt_alloc": "tm_count(TM_EVENT, args->client, 1, 0, args->size, 0);",
        "fault": MEET + "args->mapped, 0);",
        "kv_fault": MEET + "1, 0);",
        "kv_extend": MEET + "args->tokens, 0);",
        "ioctl": MEET + "0, 0);",
    }
    SORTS = ("bytes", "held", "allocs", "calls")

    def __init__(self) -> None:
        """No client is known."""
        super().__init__()
        self.held: dict[tuple[int, int], int] = {}

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        """The order, and how many."""
        parser.add_argument("-s", "--sort", choices=self.SORTS, default="bytes", help="who comes first (bytes)")
        parser.add_argument("-n", "--rows", type=tmbpf.positive, default=20, help="clients at most (20)")

    def names(self) -> dict[int, tuple[int, str]]:
        """Process and program of each client."""
        assert self.bpf
        table = self.bpf.bpf["tm_names"]
        return {ctypes.c_uint32(int(k.value)).value: (v.pid, v.comm.decode(errors="replace")) for k, v in table.items()}

    def report(self, sums: tmbpf.Sums, seconds: float) -> None:
        """The table. RT clients have numbers of their own."""
        rows: dict[tuple[int, int], dict[str, int]] = {}
        for key, (count, x, y) in sums.items():
            event, client = self.event(key), (key[2], key[1])
            row = rows.setdefault(client, dict.fromkeys(("allocs", "frees", "bytes", "faults", "tokens", "calls"), 0))
            if event in ("alloc", "rt_alloc"):
                row["allocs"] += count
                row["bytes"] += x
                self.held[client] = self.held.get(client, 0) + y
            elif event == "free":
                row["frees"] += count
                self.held[client] = self.held.get(client, 0) - y
            elif event == "kv_extend":
                row["tokens"] += x
            elif event == "ioctl":
                row["calls"] += count
            else:
                row["faults"] += count
        names = self.names()
        order = sorted(rows, key=lambda one: (-self.place(one, rows[one]), one))
        if not self.options.json:
            self.heading(f"{'CLIENT':>8} {'PID':>7} {'COMM':<15} {'ALLOC/s':>8} {'FREE/s':>8} {'BYTES/s':>8} "
                         f"{'HELD':>8} {'FAULTS':>7}")  # fmt: skip
        for one in order[: self.options.rows]:
            # the event of an RT block that is freed has no size
            row, held = rows[one], None if one[0] else self.held.get(one, 0)
            pid, comm = names.get(one[1], (0, "?")) if not one[0] else (0, "RT")
            if self.options.json:
                self.emit(client=one[1], rt=bool(one[0]), pid=pid, comm=comm, seconds=round(seconds, 3),
                          held=held, **row)  # fmt: skip
                continue
            name = f"rt:{one[1]}" if one[0] else str(one[1])
            self.print(f"{name:>8} {pid or '-':>7} {comm:<15} {row['allocs'] / seconds:>8.1f} "
                       f"{row['frees'] / seconds:>8.1f} {tmbpf.show_size(row['bytes'] / seconds):>8} "
                       f"{'-' if held is None else tmbpf.show_size(held):>8} {row['faults']:>7}")  # fmt: skip

    def place(self, client: tuple[int, int], row: dict[str, int]) -> int:
        """What a row is sorted by."""
        return self.held.get(client, 0) if self.options.sort == "held" else row[self.options.sort]


if __name__ == "__main__":
    sys.exit(Top().main())
