#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Benchmarks: rows of ours beside a peer, each with a bound.

Those of the module are one boot with --icount each, where time counts instructions, and
ours and the peer are measured in it side by side. Those of the core are traces through
the allocators on this machine. Writes build/bench/NAME.json, prints tables, and exits
with 1 when a row is over its bound.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import core_alloc
import fragmentation
import rt_core
import waste
from rows import OUT, ROOT, Row, table, write

GUEST = str(ROOT / "qemu/guest")


@dataclass(frozen=True)
class Spec:
    """What a row is measured against, and how far it may go."""

    peer: str
    #: None: none is to be had.
    bound: float | None
    unit: str = "instructions"
    #: What the bound is for, as in ``Row``.
    bounded: str = "ratio"


@dataclass(frozen=True)
class Bench:
    """A boot: C programs that it needs, its guest, its rows."""

    programs: tuple[str, ...]
    guest: tuple[str, ...]
    rows: dict[str, Spec]


PAGES = "alloc_pages + __free_pages"
MMAP = "mmap + touch + munmap"
MEMFD = "blocks of a memfd, mapped"
MAPPED = "mmap of the cached file"
ATOMIC = "kmalloc(GFP_ATOMIC)"
SINGLE = "single pages, mapped"

#: Where allocators of ours are ahead of every malloc(): in the other rows a peer is better, and there is no bound.
AHEAD = {
    **dict.fromkeys(("fixed-bump", "mixed-bump"), 0.5),
    "tensors-buddy-half": 0.5,
    "tensors-chunk-half": 1.0,
}


def allocators() -> dict[str, Spec]:
    """Each of ours beside each malloc: an object's instructions, and memory over what is live when half is freed."""
    ours = {"fixed": ("bump", "slab", "single"), "mixed": ("bump", "slab", "single"),
            "tensors": ("buddy", "chunk", "reuse")}  # fmt: skip
    return {
        f"{shape}-{name}{of}-{peer}": Spec(peer, AHEAD.get(f"{shape}-{name}{of}"), unit)
        for shape, names in ours.items()
        for name in names
        for of, unit in (("", "instructions"), ("-half", "fraction"))
        for peer in ("glibc", "jemalloc", "mimalloc")
    }


BENCHES = {
    "alloc": Bench(
        programs=("user_churn", "map_faults"),
        # init_on_alloc zeroes what the peer was not asked to zero
        guest=("--memory", "1G", "--append", "init_on_alloc=0"),
        rows={
            **{f"buddy-o{order}": Spec(PAGES, 0.7) for order in range(4)},
            **{f"buddy-o{order}": Spec(PAGES, 0.4) for order in range(4, 9)},
            "chunk-2m": Spec(f"{PAGES}, zeroed", 0.05),
            "slab-256": Spec("kmem_cache", 1.0),
            "slab-256-bulk16": Spec("kmem_cache, bulk", 1.0),
            "user-1m-churn": Spec(MMAP, 0.5),
            "user-1m-reuse": Spec(MMAP, 0.1),
            "map-64m-faults": Spec("4 KiB pages", 1 / 512, "faults"),
        },
    ),
    "kv": Bench(
        programs=("kv_blocks",),
        # a trace of requests goes through a model: minutes, on a busy machine many
        guest=("--memory", "1G", "--append", "init_on_alloc=0", "--timeout", "1800"),
        rows={
            "extend": Spec(MEMFD, 0.25),
            "fork-remap": Spec(MEMFD, 0.1),
            "fork-copy": Spec("memcpy into fresh memory", 0.1),
            "attention": Spec("blocks gathered first", 0.83),
            "fit": Spec("contiguous preallocation", 0.5, "bytes"),
            "compress": Spec("LZ4 of the same blocks", 0.9, "bytes"),
            "restore": Spec("computing it again", 0.05),
        },
    ),
    "model": Bench(
        programs=("model_swap", "model_torn"),
        # a model of 1 GiB, and the next one beside it
        guest=("--memory", "3G", "--append", "init_on_alloc=0", "--timeout", "1800"),
        rows={
            "commit-scaling": Spec("commit of 16 MiB", 1.1),
            "commit-cost": Spec("rename over a file", 20_000, bounded="ours"),
            "stage": Spec("read into anonymous memory", 1.15),
            "delta-memory": Spec("all of the model", 0.07, "bytes"),
            "first-pass-faults": Spec(MAPPED, 1 / 16, "faults"),
            "first-pass-insns": Spec(MAPPED, 0.3),
            "torn-reads": Spec("a file written over", 0, "checks", "ours"),
        },
    ),
    "rt": Bench(
        programs=("rt_late",),
        # hogs run beside it: minutes, on a busy machine many
        guest=("--kernel", "6.12-rt", "--memory", "1G", "--append", "init_on_alloc=0", "--timeout", "1800"),
        rows={
            "worst-over-median": Spec(ATOMIC, 3.0, "fraction", "ours"),
            "worst-insns": Spec(ATOMIC, 1000, bounded="ours"),
            "reserved-misses": Spec("without a reservation", 0, "allocations", "ours"),
            "late-returns": Spec("try, sleep 100 us, try again", 0, "returns", "ours"),
        },
    ),
    "dma": Bench(
        programs=(),
        guest=("--dma", "--memory", "1G", "--append", "init_on_alloc=0"),
        rows={
            "iommu-maps-64m": Spec(SINGLE, 1 / 256, "map calls"),
            "iommu-insns-64m": Spec(SINGLE, 0.05),
        },
    ),
    "monitor": Bench(
        programs=("monitor_rate",),
        # a compiler runs for each tool
        guest=("--memory", "1G", "--append", "init_on_alloc=0", "--timeout", "1800"),
        rows={
            "netlink-idle": Spec("asking netlink who listens", 50, bounded="ours"),
            "monitor-event": Spec("the trace of tracefs", 600, bounded="ours"),
            "monitor-demo": Spec("the demo alone", 1.05),
        },
    ),
    "allocators": Bench(
        programs=(),
        # a million objects have as many tensors in the kernel
        guest=("--memory", "2G", "--append", "init_on_alloc=0", "--timeout", "1800"),
        rows={"arena": Spec("numpy.empty", 0.5), **allocators()},
    ),
}


def tracepoint_off() -> list[Row]:
    """Allocations with tracepoints that are off, beside a module built without any."""
    took = []
    for build in ((), ("--untraced",)):
        command = [GUEST, "run", "--icount", "--timeout", "600", "--share", f"{OUT}:ro", *build,
                   "--memory", "1G", "--append", "init_on_alloc=0", "--",
                   f"/share/{OUT.name}/monitor_rate", "20000"]  # fmt: skip
        took.append(int(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout))
    return [Row("tracepoint-off", took[0], took[1], "built without tracepoints", 1.02)]


#: What a boot's benchmark has beside it: calls of the core, on this machine, or boots of another kind.
BESIDE: dict[str, Callable[[], list[Row]]] = {"rt": rt_core.measure, "monitor": tracepoint_off}

#: Traces through the core, on this machine.
TRACES: dict[str, Callable[[], list[Row]]] = {
    "waste": waste.measure,
    "fragmentation": fragmentation.measure,
    "core": core_alloc.measure,
}


def boot(name: str, bench: Bench) -> list[Row]:
    """Boot and measure; lines of the guest that start with # are passed on.

    Raises:
        SystemExit: the guest failed, or its rows are not the ones expected.
    """
    for program in bench.programs:
        source = f"tests/bench/{program}.c"
        subprocess.run([GUEST, "cc", "-o", OUT / program, source], cwd=ROOT, check=True)
    command = [GUEST, "run", "--icount", "--timeout", "600", "--share", f"{OUT}:ro", *bench.guest,
               "--", "python3", f"tests/bench/{name}.py", f"/share/{OUT.name}"]  # fmt: skip
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        sys.exit(f"bench {name}: the guest ended with {result.returncode}")
    lines = result.stdout.splitlines()
    print("\n".join(line for line in lines if line.startswith("#")))
    measured = {line.split()[0]: line.split()[1:] for line in lines if not line.startswith("#")}
    if measured.keys() != bench.rows.keys():
        odd = sorted(measured.keys() ^ bench.rows.keys())
        sys.exit(f"bench {name}: missing or unknown rows: {', '.join(odd)}")
    rows = []
    for row, spec in bench.rows.items():
        ours, peer = map(float, measured[row])
        rows.append(Row(row, ours, peer, spec.peer, spec.bound, spec.bounded, spec.unit))
    return rows


def scaling() -> list[Row]:
    """Boot with 1, 2 and 4 CPUs and count contended locks; there is no row with a bound."""
    names = ("tensormem_alloc", "alloc_pages", "tensormem_slab", "kmem_cache")
    print("# contended locks per 1000 operations, all CPUs at once")
    print(f"# CPUs{''.join(f'{name:>17}' for name in names)}")
    for cpus in (1, 2, 4):
        command = [GUEST, "run", "--cpus", str(cpus), "--memory", "1G", "--timeout", "600",
                   "--", "python3", "tests/bench/scaling.py"]  # fmt: skip
        subprocess.run(command, cwd=ROOT, check=True)
    return []


def measure(name: str) -> list[Row]:
    others = {**TRACES, "scaling": scaling}
    if name in others:
        return others[name]()
    return boot(name, BENCHES[name]) + (BESIDE[name]() if name in BESIDE else [])


def main() -> None:
    known = [*BENCHES, *TRACES, "scaling"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="*", help=f"of {', '.join(known)}; default: all")
    parser.add_argument("--twice", action="store_true", help="demand that two runs agree to 1 %%")
    options = parser.parse_args()
    unknown = set(options.name) - set(known)
    if unknown:
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")

    OUT.mkdir(parents=True, exist_ok=True)
    good = True
    for name in options.name or known:
        rows = measure(name)
        if rows:
            write(name, rows)
            table(rows)
        good &= all(row.good for row in rows)
        if options.twice:
            for row, again in zip(rows, measure(name), strict=True):
                if abs(again.ratio - row.ratio) > 0.01 * row.ratio:
                    print(f"{row.name}: {row.ratio} and {again.ratio} are over 1 % apart")
                    good = False
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
