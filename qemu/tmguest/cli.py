# SPDX-License-Identifier: MIT
"""The command line of ``qemu/guest``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from . import buildroot, guestroot, kernels, module, options, runner
from .errors import EXIT_GUEST, GuestError
from .log import say

EPILOG = """exit codes of run: CMD's own; 123 the kernel reported trouble (the report is on stderr);
124 time-out; 125 the guest itself failed (the boot log's path is on stderr)"""


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(prog="qemu/guest", description="Boot tensormem in an emulated ARM64 board.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="run a command in a guest", epilog=EPILOG)
    _guest_options(run)
    run.add_argument("--timeout", type=float, default=options.Options.timeout, metavar="S", help="hard limit")
    run.add_argument("cmd", nargs="+", metavar="CMD", help="what to run there as root, in the project's tree")
    shell = commands.add_parser("shell", help="an interactive guest (Ctrl-A X ends it)")
    _guest_options(shell)
    fetch = commands.add_parser("fetch", help="prepare kernels ahead")
    fetch.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(kernels.KERNELS)}")
    fetch.add_argument("--all", action="store_true", help="every kernel, also the debug kernel (8 minutes)")
    fetch.add_argument("--update", action="store_true", help="look for newer packages")
    listing = commands.add_parser("list", help="the kernels there are")
    listing.add_argument("--json", action="store_true", help="for programs")
    build = commands.add_parser("build", help="only build the module")
    build.add_argument("--kernel", default=kernels.DEFAULT, metavar="NAME", help="which kernel for, or 'all'")
    build.add_argument("--sparse", action="store_true", help="check with sparse")
    build.add_argument("--w1", action="store_true", help="the kernel's W=1 warnings")
    compile_ = commands.add_parser("cc", help="compile a static program for the guest")
    compile_.add_argument("source", type=Path)
    compile_.add_argument("-o", "--output", type=Path, required=True)
    return top


def _guest_options(into: argparse.ArgumentParser) -> None:
    default = options.Options
    into.add_argument(
        "--kernel",
        default=default.kernel,
        metavar="NAME",
        help="see qemu/guest list (default 6.12)",
    )
    into.add_argument("--machine", choices=options.MACHINES, default=default.machine)
    into.add_argument("--cpu", default=default.cpu, metavar="MODEL", help="QEMU's CPU model, such as max")
    into.add_argument("--cpus", type=int, default=default.cpus, metavar="N")
    into.add_argument(
        "--memory",
        default=f"{default.memory}M",
        metavar="SIZE",
        help="such as 512M or 2G (default)",
    )
    into.add_argument(
        "--numa",
        type=int,
        default=default.numa,
        metavar="N",
        help="split memory and CPUs into N nodes",
    )
    into.add_argument("--icount", action="store_true", help="one CPU whose clock counts instructions")
    into.add_argument("--dma", action="store_true", help="a device that does DMA (edu), behind an IOMMU (SMMUv3)")
    into.add_argument(
        "--dma-pool",
        metavar="SIZE[:idle]",
        help="a region in the device tree for the DMA pool: CMA, or one that is idle meanwhile",
    )
    into.add_argument("--share", action="append", default=[], metavar="DIR[:ro]", help="seen as /share/NAME")
    into.add_argument("--append", default="", metavar="ARGS", help="more kernel arguments")
    into.add_argument("--module-params", default="", metavar="ARGS", help="for the module")
    into.add_argument("--no-module", dest="module", action="store_false", help="neither build nor load it")
    into.add_argument("--untraced", action="store_true", help="the module without its tracepoints")
    into.add_argument("--unload", action=argparse.BooleanOptionalAction, default=True, help="at the end")


def guest_options(arguments: argparse.Namespace) -> options.Options:
    """The options of a guest from the parsed command line; raises GuestError."""
    return options.Options(
        kernel=arguments.kernel,
        machine=arguments.machine,
        cpu=arguments.cpu,
        cpus=arguments.cpus,
        memory=options.size(arguments.memory),
        numa=arguments.numa,
        icount=arguments.icount,
        dma=arguments.dma,
        dma_pool=None if arguments.dma_pool is None else options.dma_pool(arguments.dma_pool),
        shares=tuple(options.share(text) for text in arguments.share),
        timeout=getattr(arguments, "timeout", 0),
        append=arguments.append,
        module=arguments.module,
        module_params=arguments.module_params,
        unload=arguments.unload,
        untraced=arguments.untraced,
        command=tuple(getattr(arguments, "cmd", ())),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parsed = parser().parse_args(arguments)
    try:
        return _dispatch(parsed)
    except GuestError as error:
        say(str(error))
        return EXIT_GUEST
    except KeyboardInterrupt:
        return 130


def _dispatch(parsed: argparse.Namespace) -> int:
    if parsed.command == "run":
        return runner.run(guest_options(parsed))
    if parsed.command == "shell":
        return runner.run(guest_options(parsed), interactive=True)
    if parsed.command == "fetch":
        return _fetch(parsed)
    if parsed.command == "list":
        return _list(parsed.json)
    if parsed.command == "cc":
        module.compile_programs([parsed.source.resolve()], [parsed.output.resolve()])
        return 0
    names = list(kernels.KERNELS) if parsed.kernel == "all" else [parsed.kernel]
    for name in names:
        built = module.build(kernels.prepare(kernels.spec(name)), module.Extras(parsed.sparse, parsed.w1))
        print(*sorted(built.rglob("*.ko")), sep="\n")
    return 0


def _fetch(parsed: argparse.Namespace) -> int:
    names = list(kernels.KERNELS) if parsed.all else parsed.names or [kernels.DEFAULT]
    wanted = [kernels.spec(name) for name in names]
    buildroot.prepare(parsed.update)
    guestroot.prepare(parsed.update)
    for one in wanted:
        ready = kernels.prepare(one, parsed.update)
        say(f"{one.name} is ready: Linux {ready.version}")
    return 0


def _list(as_json: bool) -> int:
    rows = []
    for one in kernels.KERNELS.values():
        ready = kernels.cached(one)
        rows.append(
            {
                "name": one.name,
                "version": ready.version if ready else None,
                "page_size": one.page_size,
                "cached": ready is not None,
                "what": one.what,
            }
        )
    if as_json:
        json.dump(rows, sys.stdout, indent=1)
        print()
        return 0
    for row in rows:
        version = row["version"] or "not fetched yet"
        print(f"{row['name']:10} {version:24} {int(str(row['page_size'])) >> 10:3}K pages  {row['what']}")
    return 0
