#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Everything that has to pass, in order, and one summary at the end.

    tests/run.py                  all stages
    tests/run.py host guest-6.12  only these
    tests/run.py --list           their names

The output of a stage goes to build/test/STAGE.log. When it fails, what its failed tests
said is shown, and the log's end. A stage counts what its runner counted; one that ran
no test has failed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "build/test"
GUEST = str(ROOT / "qemu/guest")

SMOKE = ("6.12-16k", "6.12-rt", "6.1", "newest")
#: Seconds a guest may take: the debug kernel runs everything some ten times slower.
GUEST_TIMEOUT = {"debug": 7200}
#: A guest spends half its time on one CPU, so two of them share a machine well.
LANES = 2
#: Lines shown of a failed stage: of its failed tests, or of its log; and of the log's end after the tests'.
SHOWN, END = 80, 20


@dataclass(frozen=True)
class Stage:
    """One command and where its counts are found."""

    name: str
    command: tuple[str, ...]
    junit: bool = False  # build/test/STAGE/junit.xml, else a line "N passed, N failed"
    once: bool = False  # no counts: the exit code is one test


@dataclass
class Counts:
    """Tests by outcome."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    bad: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)  # what each of those tests said

    def __str__(self) -> str:
        skipped = f", {self.skipped} skipped" if self.skipped else ""
        return f"{self.passed} passed, {self.failed} failed{skipped}"


def pytest(name: str, *where: str) -> Stage:
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
               f"--junitxml={RESULTS}/{name}/junit.xml", *where)  # fmt: skip
    return Stage(name, command, junit=True)


#: What has descriptors of its own beside a client's, and takes as long as all else.
OBJECTS = ("kv_*", "model_*")
#: What is Python above calls that others make as well: the debug kernel has nothing to find there, and is slow.
ABOVE = ("*library", "allocators", "views")
#: What is of no other page size: who may, which state follows which, what reads the same pages.
ANY_PAGE = ("kv_library", "kv_lifecycle", "model_access", "model_library", "model_states", "model_stress")
#: What has stages of its own: a compiler in the guest takes as long as many other tests; another machine.
APART = ("dma_bounce", "dma_device", "dma_pool", "monitors", "pmu", "pressure_hog")
#: Parts of the guest suite: the files, or those not in OBJECTS when there are none; the guest's memory nodes and CPUs.
PARTS: dict[str, tuple[tuple[str, ...], int, int]] = {
    "guest": (("*",), 1, 2),
    "tensors": ((), 1, 2),
    "objects": (OBJECTS, 1, 2),
    "numa": (("numa",), 2, 2),
    "pressure": (("pressure_hog",), 1, 2),
    "pages": (("abi", "compact", "huge", "kernel_api", "kv_*", "map", "mapping", "model_*",
               "reuse", "rt_abi", "rt_mapping", "small", "sysfs", "walk"), 1, 2),
    "rt": (("rt_*", "kernel_api", "events", "bandwidth"), 1, 4),
    "pmu": (("pmu",), 1, 1),
    "monitors": (("monitors",), 1, 2),
    "dma": (("dma_device", "dma_pool"), 1, 2),
    "region": (("dma_pool",), 1, 2),
    "bounce": (("dma_bounce",), 1, 2),
}
#: Memory of the guests of a part; of the others 1G.
MEMORY = {"pressure": "512M"}
#: Those whose clock counts instructions.
ICOUNT = ("pmu",)
#: Those with a device that does DMA, and their options: the region of its pool, lent to programs or idle; no IOMMU, and
#: everything copied for the device (swiotlb).
DMA = {
    "dma": ("--dma-pool", "32M"),
    "region": ("--dma-pool", "32M:idle"),
    "bounce": ("--append", "iommu.passthrough=1 swiotlb=16384,force"),
}
#: Of the monitors, what runs on each kernel: every tool once, with bcc and without.
ONCE = "told"


def guest_files(patterns: tuple[str, ...]) -> list[str]:
    return sorted(
        str(path.relative_to(ROOT)) for each in patterns for path in (ROOT / "tests/guest").glob(f"test_{each}.py")
    )


def guest(kernel: str, select: str, part: str = "guest") -> Stage:
    """A part of the guest suite on one kernel. Its report comes back through a shared folder."""
    name = f"{part}-{kernel}"
    files, nodes, cpus = PARTS[part]
    found = set(guest_files(files)) or set(guest_files(("*",))) - set(guest_files(OBJECTS))
    if not set(files) & set(APART):
        found -= set(guest_files(APART))
    if kernel == "debug":
        found -= set(guest_files(ABOVE))
    if part == "pages":
        found -= set(guest_files(ANY_PAGE))
    where = sorted(found)
    inside = ("python3", "-m", "pytest", "-q", "-p", "no:cacheprovider",
              f"--junitxml=/share/{name}/junit.xml", *where)  # fmt: skip
    options = ("--kernel", kernel, "--cpus", str(cpus), "--memory", MEMORY.get(part, "1G"),
               "--numa", str(nodes),
               "--timeout", str(GUEST_TIMEOUT.get(kernel, 3600)),
               "--share", str(RESULTS / name), *(("--icount",) if part in ICOUNT else ()),
               *(("--dma", *DMA[part]) if part in DMA else ()))  # fmt: skip
    chosen = ("-k", select) if select else ()
    return Stage(name, (GUEST, "run", *options, "--", *inside, *chosen), junit=True)


def smoke(kernel: str, machine: str = "virt") -> Stage:
    name = f"smoke-{kernel if machine == 'virt' else machine}"
    options = ["--kernel", kernel, "--machine", machine, "--timeout", "300"]
    if machine == "virt":
        options += ["--cpus", "2", "--memory", "1G"]
    return Stage(name, (GUEST, "run", *options, "--", "python3", "tests/guest/smoke.py"), once=True)


def stages(select: str) -> list[Stage]:
    return [
        Stage("core", ("make", "-s", "-C", "tests/host", "check")),
        pytest("python", "-c", "pyctl/pyproject.toml", "--rootdir=pyctl", "pyctl/tests"),
        pytest("qemu", "qemu/tests"),
        pytest("runner", "tests/runner"),
        pytest("bpf", "tests/bpf"),
        guest("6.12", select),
        guest("6.12", select, "numa"),
        guest("6.12", select, "pressure"),
        guest("6.12", select, "pmu"),
        guest("6.12", select, "dma"),
        guest("6.12", select, "bounce"),
        guest("debug", select, "dma"),
        guest("debug", select, "region"),
        guest("debug", select, "objects"),
        guest("debug", select, "tensors"),
        guest("6.12-16k", select, "pages"),
        guest("6.12-16k", select, "region"),
        guest("6.12-rt", select, "rt"),
        guest("6.12", select, "monitors"),
        *(guest(kernel, select or ONCE, "monitors") for kernel in ("6.1", "newest")),
        *(smoke(kernel) for kernel in SMOKE),
        smoke("6.12", "raspi3b"),
    ]


def count_junit(path: Path) -> Counts:
    counts = Counts()
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        trouble = case.find("failure")
        trouble = case.find("error") if trouble is None else trouble
        if trouble is not None:
            counts.failed += 1
            why = trouble.get("message", "").split("\n")[0]
            counts.bad.append(f"{case.get('classname')}::{case.get('name')}: {why}")
            counts.said.append(f"{trouble.text or ''}\nFAILED {counts.bad[-1]}")
        elif case.find("skipped") is not None:
            counts.skipped += 1
        else:
            counts.passed += 1
    return counts


def count(stage: Stage, code: int, log: Path) -> Counts:
    """What the stage counted; its exit code has to agree."""
    counts = Counts()
    junit = RESULTS / stage.name / "junit.xml"
    if stage.once:
        counts = Counts(passed=int(code == 0), failed=int(code != 0))
    elif stage.junit and junit.exists():
        counts = count_junit(junit)
    elif not stage.junit:
        lines = re.findall(r"^(\d+) passed, (\d+) failed$", log.read_text(), re.M)
        if lines:
            passed, failed = map(int, lines[-1])
            counts = Counts(passed, failed)
    if code and not counts.failed:
        counts.failed = 1
        counts.bad.append(f"exit code {code}")
    if not counts.passed and not counts.failed:
        counts.failed = 1
        counts.bad.append("no test ran")
    return counts


def explain(counts: Counts, log: Path) -> list[str]:
    """What a stage's failed tests said, each its share of the lines, and the end of its log: a guest reports there."""
    each = SHOWN // max(len(counts.said), 1)
    said = [line for text in counts.said for line in text.splitlines()[-max(each, 1) :]]
    return said + log.read_text().splitlines()[-(END if said else SHOWN) :]


def run(stage: Stage) -> Counts:
    folder = RESULTS / stage.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "junit.xml").unlink(missing_ok=True)
    log = RESULTS / f"{stage.name}.log"
    begin = time.monotonic()
    with log.open("w") as output:
        code = subprocess.run(
            stage.command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, check=False,
        ).returncode  # fmt: skip
    counts = count(stage, code, log)
    seconds = time.monotonic() - begin
    report = [f"{stage.name:<16} {counts!s:<34} {seconds:6.0f} s"]
    if counts.failed:
        report += ["    " + line for line in explain(counts, log)]
        report.append(f"    whole output: {log}")
    print("\n".join(report), flush=True)
    return counts


def run_all(chosen: list[Stage]) -> Counts:
    """Run stages in two lanes; the debug kernel's, which take longest, begin first."""
    total = Counts()
    chosen = sorted(chosen, key=lambda stage: not stage.name.endswith("-debug"))
    with ThreadPoolExecutor(LANES) as lanes:
        for stage, counts in zip(chosen, lanes.map(run, chosen), strict=True):
            total.passed += counts.passed
            total.failed += counts.failed
            total.skipped += counts.skipped
            total.bad += [f"{stage.name}: {name}" for name in counts.bad or [""] * bool(counts.failed)]
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", nargs="*", help="only these stages")
    parser.add_argument("-k", dest="select", default="", help="pytest selection in the guests")
    parser.add_argument("--list", action="store_true", help="print the stages' names")
    options = parser.parse_args()

    known = stages(options.select)
    if options.list:
        print("\n".join(stage.name for stage in known))
        return
    names = {stage.name for stage in known}
    # guest-KERNEL for any kernel: make test-guest
    extra = [s for s in options.stage if s not in names and s.startswith("guest-")]
    known += [guest(name.removeprefix("guest-"), options.select) for name in extra]
    unknown = set(options.stage) - names - set(extra) - {"host"}
    if unknown:
        parser.error(f"no such stage: {', '.join(sorted(unknown))}")
    wanted = set(options.stage)
    if "host" in wanted:
        wanted |= {"core", "python", "qemu", "runner", "bpf"}

    total = run_all([stage for stage in known if not wanted or stage.name in wanted])
    for name in total.bad:
        print(f"FAILED {name}")
    print(total)
    sys.exit(1 if total.failed else 0)


if __name__ == "__main__":
    main()
