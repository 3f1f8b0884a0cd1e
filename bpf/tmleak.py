#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""tmleak: what was allocated and not freed, by the stacks it came from."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import tmbpf

CODE = r"""
struct tm_handle { u32 client, handle, rt, pad; };
struct tm_block { u64 size, ns; int kernel, user; u32 pid, pad; };

BPF_HASH(tm_blocks, struct tm_handle, struct tm_block, 65536);
BPF_STACK_TRACE(tm_stacks, 8192);
/* Events by their number. They come at the price of a lookup in an array, which is a tenth of one in a hash. */
BPF_ARRAY(tm_made, u64, 4);

/* Return: how many there were before, or nearly: the instruction that would tell is not in every kernel. */
static __always_inline u64 tm_make(int event)
{
	u64 before, *made = tm_made.lookup(&event);

	if (!made)
		return 0;
	before = *made;
	__sync_fetch_and_add(made, 1);
	return before;
}
"""


def born(rt: int) -> str:
    """What an allocation does."""
    return f"""
	struct tm_handle handle = {{ args->client, args->handle, {rt}, 0 }};
	struct tm_block block = {{ args->size, bpf_ktime_get_ns(), -1, -1 }};

	if (tm_make(TM_EVENT) % TM_SAMPLE == 0) {{
		if (TM_KERNEL)
			block.kernel = tm_stacks.get_stackid(ctx, 0);
		block.user = tm_stacks.get_stackid(ctx, BPF_F_USER_STACK);
	}}
	block.pid = bpf_get_current_pid_tgid() >> 32;
	if (tm_blocks.update(&handle, &block))
		tm_lose();
"""


def died(rt: int) -> str:
    """What a free does."""
    return f"""
	struct tm_handle handle = {{ args->client, args->handle, {rt}, 0 }};

	tm_blocks.delete(&handle);
	tm_make(TM_EVENT);
"""


@dataclass
class Origin:
    """What came from the same place."""

    count: int = 0
    size: int = 0
    oldest: int = 0
    pids: set[int] = field(default_factory=set)


class Leak(tmbpf.Tool):
    """Outstanding allocations by their origin."""

    name = "tmleak"
    about = "Allocations from tensormem that were not freed since tmleak began, by the stacks that made them."
    examples = """  tmleak -p 181 -o 10s 10   what process 181 has had for over 10 s
  tmleak -K 5           without the kernel's stacks, which cost seconds to name
  tmleak -s 16          stacks of every 16th allocation, for less"""
    code = CODE
    probes: ClassVar[Mapping[str, str]] = {
        "alloc": born(0),
        "free": died(0),
        "rt_alloc": born(1),
        "rt_free": died(1),
    }

    def __init__(self) -> None:
        """Nothing was made yet."""
        super().__init__()
        self.made: dict[str, int] = {}

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        """What counts, and how much to show."""
        parser.add_argument("-o", "--older", type=tmbpf.parse_seconds, default=0, metavar="TIME", help="what is so old")
        parser.add_argument("-n", "--rows", type=tmbpf.positive, default=10, help="origins at most (10)")
        parser.add_argument("-s", "--sample", type=tmbpf.positive, default=1, metavar="N",
                            help="stacks of every Nth allocation only; all are counted")  # fmt: skip
        parser.add_argument("-K", "--no-kernel", action="store_true", help="no stacks of the kernel")

    def flags(self) -> list[str]:
        """Whether the kernel's stacks are wanted."""
        return [f"-DTM_KERNEL={int(not self.options.no_kernel)}", f"-DTM_SAMPLE={self.options.sample}"]

    def report(self, sums: tmbpf.Sums, seconds: float) -> None:
        """Origins, the largest first."""
        assert self.bpf
        origins: dict[tuple[int, int, int], Origin] = {}
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        for block in self.bpf.bpf["tm_blocks"].values():
            age = now - block.ns
            if age < self.options.older * 1e9:
                continue
            origin = origins.setdefault((block.pid, block.kernel, block.user), Origin())
            origin.count += 1
            origin.size += block.size
            origin.oldest = max(origin.oldest, age)
            origin.pids.add(block.pid)
        total = sum(origin.count for origin in origins.values())
        size = sum(origin.size for origin in origins.values())
        counts = [int(count.value) for count in self.bpf.bpf["tm_made"].values()]
        now_made = dict(zip(self.events, counts, strict=False))
        made = {event: count - self.made.get(event, 0) for event, count in now_made.items()}
        self.made = now_made
        if self.options.json:
            self.emit(outstanding=total, bytes=size, **made)
        else:
            self.print(f"{self.stamp()}{total} outstanding, {tmbpf.show_size(size)}")
        order = sorted(origins, key=lambda one: (-origins[one].size, one))
        for one in order[: self.options.rows]:
            origin, (pid, kernel, user) = origins[one], one
            inside, outside = list(self.kernel_stack(kernel)), list(self.user_stack(user, pid))
            if self.options.json:
                self.emit(count=origin.count, bytes=origin.size, oldest_ns=origin.oldest, pid=pid,
                          kernel=inside, user=outside)  # fmt: skip
                continue
            self.print(f"\n{origin.count} of process {pid}, {tmbpf.show_size(origin.size)}, "
                       f"the oldest {tmbpf.show_ns(origin.oldest)} old:")  # fmt: skip
            for name in [*inside, "--", *outside]:
                self.print(f"    {name}"[: tmbpf.WIDTH])

    def walk(self, stack: int) -> Iterator[int]:
        """The addresses of a stack."""
        assert self.bpf
        if stack >= 0:
            yield from self.bpf.bpf["tm_stacks"].walk(stack)

    def kernel_stack(self, stack: int) -> Iterator[str]:
        """Names of the kernel's functions."""
        assert self.bpf
        for address in self.walk(stack):
            yield self.bpf.bpf.ksym(address, show_offset=True).decode(errors="replace")

    def user_stack(self, stack: int, pid: int) -> Iterator[str]:
        """Names of the program's functions, while it lives."""
        assert self.bpf
        for address in self.walk(stack):
            name = self.bpf.bpf.sym(address, pid, show_module=True).decode(errors="replace")
            yield name if name != "[unknown]" else f"{address:#x}"


if __name__ == "__main__":
    sys.exit(Leak().main())
