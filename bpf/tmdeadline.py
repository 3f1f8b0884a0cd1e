#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""tmdeadline: RT allocations that missed their deadline, their stacks, and what ran instead."""

from __future__ import annotations

import argparse
import ctypes
import sys
from collections.abc import Iterator, Mapping
from typing import ClassVar

import tmbpf

CODE = r"""
struct tm_wait { u64 ns; int kernel, user; u32 cpu, pad; };
/* What ran for how long during one wait, which its thread and its beginning name. */
struct tm_ran { u64 since; u32 waiter, pid; char comm[16]; };
struct tm_seat { u64 ns, since; u32 waiter, pad; };

BPF_HASH(tm_waits, u32, struct tm_wait, 1024);
/* Whose CPU it was: who waits there, and since when what runs there runs. */
BPF_PERCPU_ARRAY(tm_seats, struct tm_seat, 1);
/* Of waits that were served nobody asks: the oldest make room. */
BPF_TABLE("lru_hash", struct tm_ran, u64, tm_ran, 8192);
BPF_STACK_TRACE(tm_stacks, 2048);
"""
WAIT = """
	u32 tid = bpf_get_current_pid_tgid();
	struct tm_wait wait = { bpf_ktime_get_ns(), -1, -1, bpf_get_smp_processor_id() };

	wait.kernel = TM_KERNEL ? tm_stacks.get_stackid(ctx, 0) : -1;
	wait.user = tm_stacks.get_stackid(ctx, BPF_F_USER_STACK);
	tm_waits.update(&tid, &wait);
	tm_count(TM_EVENT, 0, 0, 0, 0, 0);
"""
MISS = """
	u32 tid = bpf_get_current_pid_tgid();
	struct tm_wait *wait = tm_waits.lookup(&tid);
	struct tm_record *record = tm_begin(TM_EVENT);

	if (record) {
		TM_FIELDS
		record->number[TM_EXTRA] = wait ? bpf_ktime_get_ns() - wait->ns : 0;
		record->number[TM_EXTRA + 1] = wait ? (u32)wait->kernel : -1;
		record->number[TM_EXTRA + 2] = wait ? (u32)wait->user : -1;
		record->number[TM_EXTRA + 3] = wait ? wait->ns : 0;
		tm_end(record);
	}
	tm_waits.delete(&tid);
"""
OVER = """
	u32 tid = bpf_get_current_pid_tgid();

	tm_waits.delete(&tid);
"""
SWITCH = """
	u32 prev = args->prev_pid, next = args->next_pid;
	u64 now = bpf_ktime_get_ns(), zero = 0, *time;
	struct tm_ran ran = {};
	struct tm_seat *seat;
	struct tm_wait *wait;
	int first = 0;

	seat = tm_seats.lookup(&first);
	if (!seat)
		return 0;
	wait = tm_waits.lookup(&prev);
	if (wait) {
		wait->cpu = bpf_get_smp_processor_id();
		seat->waiter = prev;
		seat->since = wait->ns;
	} else if (seat->waiter) {
		/* who was served, or gave up, waits no more; who moved on waits for another CPU */
		wait = tm_waits.lookup(&seat->waiter);
		if (!wait || wait->ns != seat->since || wait->cpu != bpf_get_smp_processor_id()) {
			seat->waiter = 0;
			return 0;
		}
		ran.since = seat->since;
		ran.waiter = seat->waiter;
		ran.pid = prev;
		bpf_probe_read_kernel(ran.comm, sizeof(ran.comm), (void *)args->prev_comm);
		time = tm_ran.lookup_or_try_init(&ran, &zero);
		if (time)
			__sync_fetch_and_add(time, now - seat->ns);
	}
	seat->ns = now;
	if (next == seat->waiter)
		seat->waiter = 0;
"""


class Deadline(tmbpf.Tool):
    """A block of lines for each miss."""

    name = "tmdeadline"
    about = (
        "Deadlines that allocations from tensormem's RT pool missed: who, how much, how long, the stacks, and what "
        "ran meanwhile on the CPU it waited on."
    )
    examples = """  tmdeadline            until Ctrl-C
  tmdeadline -K -d 60s  a minute, without the kernel's stacks"""
    code = tmbpf.SUMS + tmbpf.RING + CODE
    streams = True
    probes: ClassVar[Mapping[str, str]] = {
        "rt_wait": WAIT,
        "rt_miss": MISS,
        "rt_alloc": OVER,
        "rt_interrupted": OVER,
        "sched:sched_switch": SWITCH,
    }

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        """How much to show."""
        parser.add_argument("-K", "--no-kernel", action="store_true", help="no stacks of the kernel")
        parser.add_argument("-n", "--rows", type=tmbpf.positive, default=3, help="programs told that ran instead (3)")

    def flags(self) -> list[str]:
        """Where a miss has its own numbers: behind the event's."""
        known = (tmbpf.folder("rt_miss") / "format").exists()
        extra = sum(not field.is_text for field in tmbpf.fields("rt_miss")) if known else 0
        return [f"-DTM_KERNEL={int(not self.options.no_kernel)}", f"-DTM_EXTRA={extra}"]

    def record(self, record: tmbpf.Record) -> None:
        """One miss."""
        values = record.values
        waited = int(values["extra0"])
        kernel, user = (ctypes.c_int32(int(values[name])).value for name in ("extra1", "extra2"))
        inside, outside = list(self.stack(kernel, -1)), list(self.stack(user, record.pid))
        instead = self.instead(record.tid, int(values["extra3"]))
        if self.options.json:
            ran = [{"pid": pid, "comm": comm, "ns": ns} for ns, pid, comm in instead]
            self.emit(seconds=record.seconds, pid=record.pid, tid=record.tid, comm=record.comm,
                      client=values["client"], size=values["size"], had_ns=values["had_ns"], waited_ns=waited,
                      kernel=inside, user=outside, ran=ran)  # fmt: skip
            return
        self.print(f"{self.stamp()}{record.seconds:.6f} {record.comm} {record.pid} missed: "
                   f"{tmbpf.show_size(int(values['size']))} in {tmbpf.show_ns(int(values['had_ns']))}")  # fmt: skip
        for ns, pid, comm in instead[: self.options.rows]:
            self.print(f"    {tmbpf.show_ns(ns):>7} ran {comm} {pid}")
        for name in [*inside, "--", *outside]:
            self.print(f"    {name}"[: tmbpf.WIDTH])

    def report(self, sums: tmbpf.Sums, seconds: float) -> None:
        """How many had to wait."""
        waits = sum(count for count, _, _ in sums.values())
        missed = self.totals.get("rt_miss", 0)
        if self.options.json:
            self.emit(waits=waits, missed=missed)
        else:
            self.print(f"{self.stamp()}{waits} waited, {missed} missed since the beginning")

    def instead(self, tid: int, since: int) -> list[tuple[int, int, str]]:
        """What ran while a thread waited, the longest first; that and what ran in its earlier waits is forgotten."""
        assert self.bpf
        table = self.bpf.bpf["tm_ran"]
        found = [(key, time.value) for key, time in table.items() if key.waiter == tid and key.since <= since]
        for key, _ in found:
            del table[key]
        meanwhile = [(time, key.pid, key.comm.decode(errors="replace")) for key, time in found if key.since == since]
        return sorted(meanwhile, reverse=True)

    def stack(self, stack: int, pid: int) -> Iterator[str]:
        """Names of functions; the kernel's where ``pid`` is -1."""
        assert self.bpf
        if stack < 0:
            return
        for address in self.bpf.bpf["tm_stacks"].walk(stack):
            if pid < 0:
                yield self.bpf.bpf.ksym(address, show_offset=True).decode(errors="replace")
            else:
                yield self.bpf.bpf.sym(address, pid, show_module=True).decode(errors="replace")


if __name__ == "__main__":
    sys.exit(Deadline().main())
