# SPDX-License-Identifier: MIT
"""One guest from boot to verdict."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from . import channels, fdt, guestroot, kernels, machine, module, options, paths, payload, splat
from .errors import EXIT_GUEST, EXIT_SPLAT, EXIT_TIMEOUT, GuestError
from .log import say

LOGS_KEPT = 100
AFTER_PANIC = 3.0


def run(wanted: options.Options, interactive: bool = False) -> int:
    """Boot, run, judge; returns the exit code. Raises GuestError if it does not even come to booting."""
    wanted = options.check(wanted)
    if shutil.which(machine.QEMU) is None:
        raise GuestError(f"{machine.QEMU} is not installed: run qemu/install-deps")
    kernel = kernels.prepare(kernels.spec(wanted.kernel))
    root = guestroot.prepare()
    modules = module.build(kernel, untraced=wanted.untraced) if wanted.module else None
    programs = module.guest_programs()
    nonce = secrets.token_hex(8)
    console = _log_file(wanted.kernel)
    result = channels.Result()
    with tempfile.TemporaryDirectory(prefix="tensormem-guest-") as scratch:
        initrd = Path(scratch) / "initrd"
        busybox = root / "busybox.cpio"
        initrd.write_bytes(payload.initrd(kernel, wanted, nonce, modules, programs, busybox, interactive))
        tree = _tree(kernel, wanted, Path(scratch) / "tree.dtb") if wanted.dma_pool else None
        files = machine.Files(root / "root.img", initrd, console, tree)
        timed_out, qemu_said = _boot(kernel, wanted, files, result, nonce, interactive)
    code = _judge(wanted, result, console, nonce, timed_out, qemu_said)
    if code in (EXIT_SPLAT, EXIT_TIMEOUT, EXIT_GUEST):
        say(f"the boot log is {console}")
    return code


def _tree(kernel: kernels.Kernel, wanted: options.Options, path: Path) -> Path:
    """QEMU's own device tree for this guest, and in it the region that is wanted."""
    assert wanted.dma_pool
    made = subprocess.run(
        machine.dump_tree(kernel, wanted, path), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if made.returncode or not path.exists():
        raise GuestError(f"QEMU does not write its device tree: {made.stderr.strip()}")
    tree = fdt.parse(path.read_bytes())
    fdt.add_dma_pool(tree, wanted.dma_pool.size << 20, wanted.dma_pool.reusable)
    path.write_bytes(fdt.build(tree))
    return path


def _log_file(kernel: str) -> Path:
    folder = paths.BUILD / "guest"
    folder.mkdir(parents=True, exist_ok=True)
    for old in sorted(folder.glob("*.log"), key=lambda path: path.stat().st_mtime)[:-LOGS_KEPT]:
        old.unlink(missing_ok=True)
    return folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{kernel}-{os.getpid()}.log"


def _boot(
    kernel: kernels.Kernel,
    wanted: options.Options,
    files: machine.Files,
    result: channels.Result,
    nonce: str,
    interactive: bool,
) -> tuple[bool, str]:
    """Run QEMU to its end; returns whether it had to be ended for its time, and what QEMU itself complained of."""
    sinks = channels.sinks(result)
    if wanted.machine == options.PI:
        sinks = {"frames": channels.unframe(sinks)}
    ours: dict[str, int] = {}
    theirs: dict[str, int] = {}
    for name in sinks:
        ours[name], theirs[name] = os.pipe()
    command = machine.command(kernel, wanted, files, theirs, interactive)
    if shutil.which("setpriv"):
        command = ["setpriv", "--pdeathsig", "KILL", *command]
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            command,
            pass_fds=tuple(theirs.values()),
            stdin=None if interactive else subprocess.DEVNULL,
            stdout=None if interactive else complaints,
            stderr=complaints,
        )
        try:
            for fd in theirs.values():
                os.close(fd)
            pumps = [channels.pump(ours[name], sink) for name, sink in sinks.items()]
            timed_out = not _wait(process, wanted, result, files.console, nonce, interactive)
        finally:
            process.kill()
            process.wait()
        for pump in pumps:
            pump.join(10)
        complaints.seek(0)
        return timed_out, complaints.read().decode(errors="replace").strip()


def _wait(
    process: subprocess.Popen[bytes],
    wanted: options.Options,
    result: channels.Result,
    console: Path,
    nonce: str,
    interactive: bool,
) -> bool:
    """Wait for the guest's end; False if its time ran out. A Pi does not end QEMU, so its log is watched."""
    deadline = None if interactive else time.monotonic() + wanted.timeout
    watched = wanted.machine == options.PI
    while True:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            return False
        tick = 0.3 if watched else 5.0
        try:
            process.wait(tick if left is None else min(tick, left))
            return True
        except subprocess.TimeoutExpired:
            pass
        if not watched:
            continue
        log = _read(console)
        if result.ended.is_set() and splat.marker(nonce, "end") in log:
            return True
        if "Kernel panic - not syncing" in log:
            time.sleep(AFTER_PANIC)
            return True


def _read(console: Path) -> str:
    try:
        return console.read_bytes().decode(errors="replace")
    except OSError:
        return ""


def _judge(
    wanted: options.Options,
    result: channels.Result,
    console: Path,
    nonce: str,
    timed_out: bool,
    qemu_said: str,
) -> int:
    """The exit code, with the reason on stderr when it is not the command's own."""
    sys.stdout.flush()
    verdict = splat.scan(_read(console), nonce)
    if verdict.splats:
        say("the kernel reported trouble:\n" + "\n\n".join(verdict.splats))
        return EXIT_SPLAT
    if timed_out:
        say(f"time-out: the guest was ended after {wanted.timeout:g} s")
        return EXIT_TIMEOUT
    problem = result.failure or verdict.problem
    if not problem and result.unload:
        problem = f"the module does not unload: {result.unload}"
    if not problem and result.exit_code is None:
        problem = "the guest ended without a result"
    if problem:
        say(problem + (f"\nQEMU said: {qemu_said}" if qemu_said else ""))
        return EXIT_GUEST
    assert result.exit_code is not None
    return result.exit_code
