# SPDX-License-Identifier: MIT
"""What tensormem finds on this machine, and the exact fix for what it misses.

Nothing here changes anything; one chunk is allocated for a moment, to see how it is
mapped. Every check reads files below one root directory, so that tests can put another
machine in its place.
"""

from __future__ import annotations

import os
import platform
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from . import errors
from .bandwidth import EVENTS, NO_EVENT
from .system import DEFAULT_ROOT
from .units import format_quota, format_size

if TYPE_CHECKING:
    from .client import Client

__all__ = ["MAX_KERNEL", "MIN_KERNEL", "UDEV_RULE", "Check", "Machine", "examine"]

#: The kernels that are supported: from 6.1 up to any 7.x.
MIN_KERNEL = (6, 1)
MAX_KERNEL = (7, 999)

UDEV_RULE = 'KERNEL=="tensormem", GROUP="tensormem", MODE="0660"'

State = Literal["ok", "warn", "fail"]

_SECURE_BOOT = "SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
#: Bits in a set of capabilities: CAP_IPC_LOCK and CAP_SYS_NICE.
_IPC_LOCK = 14
_SYS_NICE = 23
#: Since then arm64 folds page table entries that are contiguous.
_CONTPTE = (6, 9)
#: Less than this to pin is worth a word.
_FEW_LOCKED = 64 << 20
_BUILD = ["make -C kmod", "sudo insmod kmod/tensormem.ko"]


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        value: what was found.
        state: ``ok``; ``warn``: works, with less; ``fail``: tensormem cannot work.
        note: what follows from it, or empty.
        fix: commands, lines to add to a file, or a sentence; empty if none is needed.
    """

    name: str
    value: str
    state: State = "ok"
    note: str = ""
    fix: list[str] = field(default_factory=list)


def _allowed(path: Path) -> bool:
    return os.access(path, os.R_OK | os.W_OK)


@dataclass(frozen=True)
class Machine:
    """Where to look; the defaults are this machine.

    Attributes:
        root: the directory that stands for ``/``.
        release: the kernel's release, as ``uname -r``.
        machine: the architecture, as ``uname -m``.
        page_size: bytes in a page.
        allowed: says whether the user may read and write a path.
    """

    root: Path = Path("/")
    release: str = field(default_factory=platform.release)
    machine: str = field(default_factory=platform.machine)
    page_size: int = field(default_factory=lambda: os.sysconf("SC_PAGE_SIZE"))
    allowed: Callable[[Path], bool] = _allowed

    def path(self, name: str) -> Path:
        """Return the path of an absolute name below the root."""
        return self.root / name.lstrip("/")

    def text(self, name: str) -> str | None:
        """Return a file's content, stripped; None if it cannot be read."""
        try:
            return self.path(name).read_text(errors="replace").strip()
        except OSError:
            return None

    def exists(self, name: str) -> bool:
        """Say whether a path exists (also as a link that leads nowhere here)."""
        return os.path.lexists(self.path(name))

    @property
    def version(self) -> tuple[int, int]:
        """The kernel's version; (0, 0) for what is none."""
        match = re.match(r"(\d+)\.(\d+)", self.release)
        return (int(match[1]), int(match[2])) if match else (0, 0)

    @property
    def is_pi(self) -> bool:
        """True on a Raspberry Pi."""
        return "raspberry pi" in (self.text("/proc/device-tree/model") or "").lower()

    @property
    def loaded(self) -> bool:
        """True if the module is loaded."""
        modules = self.text("/proc/modules") or ""
        return self.exists("/sys/module/tensormem") or bool(
            re.search(r"^tensormem ", modules, re.M)
        )

    def capable(self, bit: int) -> bool:
        """Say whether this process has a capability."""
        found = re.search(r"^CapEff:\s*([0-9a-f]+)$", self.text("/proc/self/status") or "", re.M)
        return bool(found and int(found[1], 16) >> bit & 1)

    def limit(self, name: str) -> str | None:
        """Return the soft limit of this name in /proc/self/limits; None if there is no such."""
        match = re.search(rf"^{name}\s+(\w+)", self.text("/proc/self/limits") or "", re.M)
        return match[1] if match else None

    def figure(self, name: str) -> int | None:
        """Return a number from the module's sysfs files; None if there is no such."""
        return _number(self.text(f"{DEFAULT_ROOT}/{name}"))

    def command_line(self, words: str) -> list[str]:
        """Say how to add words to the kernel's command line here."""
        if self.is_pi:
            return [f"add '{words}' to the one line of /boot/firmware/cmdline.txt, then reboot"]
        return [
            f"add '{words}' to GRUB_CMDLINE_LINUX in /etc/default/grub, then:",
            "sudo update-grub && sudo reboot",
        ]


def _module(m: Machine) -> Check:
    if m.loaded:
        version = m.text("/sys/module/tensormem/version")
        return Check("module", f"loaded, version {version}" if version else "loaded")
    folder = m.path(f"/lib/modules/{m.release}")
    places = [folder / "extra", folder / "updates", folder / "updates/dkms", folder]
    built = any(list(place.glob("tensormem.ko*")) for place in places)
    if built:
        return Check("module", "installed, not loaded", "fail", "", ["sudo modprobe tensormem"])
    return Check(
        "module",
        "not loaded and not installed",
        "fail",
        "build it in the source tree of tensormem:",
        list(_BUILD),
    )


def _device(m: Machine) -> Check:
    path = m.path("/dev/tensormem")
    try:
        mode = path.stat().st_mode
    except OSError:
        note = "it appears when the module is loaded" if not m.loaded else ""
        fix = [] if not m.loaded else ["sudo udevadm trigger && ls -l /dev/tensormem"]
        return Check("device", "/dev/tensormem is missing", "fail", note, fix)
    value = f"/dev/tensormem, mode {stat.S_IMODE(mode):04o}"
    rule = [
        "sudo groupadd --system --force tensormem",
        f"echo '{UDEV_RULE}' |",
        "  sudo tee /etc/udev/rules.d/60-tensormem.rules",
        "sudo udevadm control --reload",
        "sudo udevadm trigger --name-match=tensormem",
        "sudo usermod -aG tensormem $USER   # then log in again",
    ]
    if not m.allowed(path):
        return Check("device", value, "fail", "this user may not open it", rule)
    if mode & 0o007:
        return Check("device", value, "warn", "anybody on this machine may open it", rule[:5])
    return Check("device", value)


def _architecture(m: Machine) -> Check:
    if m.machine in ("aarch64", "arm64"):
        return Check("architecture", m.machine)
    if m.machine.startswith("arm"):
        return Check(
            "architecture",
            m.machine,
            "fail",
            "the module needs a 64-bit kernel",
            ["add 'arm_64bit=1' to /boot/firmware/config.txt, or install the 64-bit system"],
        )
    return Check(
        "architecture",
        m.machine,
        "warn",
        "made for arm64; here, boot the emulated board:",
        ["make demo"],
    )


def _kernel(m: Machine) -> Check:
    span = f"supported are {MIN_KERNEL[0]}.{MIN_KERNEL[1]} to {MAX_KERNEL[0]}.x"
    if m.version < MIN_KERNEL:
        fix = ["sudo apt full-upgrade && sudo reboot   # Debian 12 and later have 6.1 or newer"]
        return Check("kernel", m.release, "fail", span, fix)
    if m.version > MAX_KERNEL:
        fix = ["look for a newer tensormem; this one was never tried on such a kernel"]
        return Check("kernel", m.release, "warn", span, fix)
    return Check("kernel", m.release)


def _page_size(m: Machine) -> Check:
    value = format_size(m.page_size)
    if m.page_size == 4096:
        return Check("page size", value, note="a chunk can be mapped as one 2 MiB block")
    if m.page_size in (16384, 65536):
        fix = []
        if m.is_pi:
            fix = ["for 4 KiB: add 'kernel=kernel8.img' to /boot/firmware/config.txt, reboot"]
        note = (
            f"a chunk is {(2 << 20) // m.page_size} pages and cannot be mapped as one block;"
            f" a client with any tensor takes {value} at least"
        )
        return Check("page size", value, "ok", note, fix)
    return Check("page size", value, "warn", "never tried with this page size")


def _mapping(m: Machine, seen: str | None) -> Check:
    """Say how weights are mapped: what the module did, or what the kernel suggests."""
    huge = m.exists("/sys/kernel/mm/transparent_hugepage/enabled")
    if seen is None:
        blocks = huge and m.page_size == 4096
        folded = huge and m.version >= _CONTPTE
        found = "block" if blocks else "cont" if folded else "pages"
    else:
        found = seen
    unseen = "; not tried, the device could not be used" if seen is None else ""
    if found == "block":
        note = "one fault and one TLB entry for 2 MiB; huge=False gives pages, which count as RSS"
        return Check("mapping", "weights in blocks of 2 MiB", note=note + unseen)
    if found == "cont":
        span = format_size(64 << 10 if m.page_size == 4096 else 2 << 20)
        note = f"the CPU may fold {span} of contiguous pages into one TLB entry"
        return Check("mapping", "weights in contiguous pages", note=note + unseen)
    note = "every page takes a TLB entry, which costs speed and nothing else"
    if huge and m.page_size != 4096:
        fix = ["a kernel from 6.9 on folds contiguous pages; with 4 KiB pages: blocks"]
    else:
        fix = ["a kernel with CONFIG_TRANSPARENT_HUGEPAGE=y, such as Debian's, has blocks"]
    if m.is_pi and m.page_size != 4096:
        fix.append("for 4 KiB: add 'kernel=kernel8.img' to /boot/firmware/config.txt, reboot")
    return Check("mapping", "weights page by page", "warn", note + unseen, fix)


def _psi(m: Machine) -> Check:
    if m.text("/proc/pressure/memory") is not None:
        return Check("PSI", "on")
    note = "pressure is judged by watermarks alone"
    return Check("PSI", "off", "warn", note, m.command_line("psi=1"))


@dataclass(frozen=True)
class _Limit:
    """The bound of a memory cgroup: the file it is in, and bytes."""

    file: str
    bound: int
    used: int


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None


def _tightest(m: Machine, top: str, group: str, bound: str, used: str) -> _Limit | None:
    """Return the smallest limit on the way from a cgroup up to the top."""
    found: list[_Limit] = []
    names = [name for name in group.split("/") if name]
    for depth in range(len(names) + 1):
        folder = "/".join([top, *names[:depth]])
        limit = _number(m.text(f"{folder}/{bound}"))
        # version 1 has a huge number for none
        if limit is not None and limit < 1 << 62:
            holds = _number(m.text(f"{folder}/{used}")) or 0
            found.append(_Limit(f"{folder}/{bound}", limit, holds))
    return min(found, key=lambda limit: limit.bound - limit.used, default=None)


def _cgroup(m: Machine) -> Check:
    mine = m.text("/proc/self/cgroup") or ""
    if "memory" in (m.text("/sys/fs/cgroup/cgroup.controllers") or "").split():
        value, top = "on (v2)", "/sys/fs/cgroup"
        match = re.search(r"^0::(/.*)$", mine, re.M)
        names, none = ("memory.max", "memory.current"), "max"
    elif re.search(r"^memory\s+\d+\s+\d+\s+1$", m.text("/proc/cgroups") or "", re.M):
        value, top = "on (v1)", "/sys/fs/cgroup/memory"
        match = re.search(r"^\d+:(?:[\w=,]+,)?memory(?:,[\w=,]+)?:(/.*)$", mine, re.M)
        names, none = ("memory.limit_in_bytes", "memory.usage_in_bytes"), "-1"
    else:
        note = "memory of tensors is not charged to containers"
        fix = m.command_line("cgroup_enable=memory cgroup_memory=1")
        return Check("memory cgroup", "off", "warn", note, fix)
    group = match[1] if match else "/"
    limit = _tightest(m, top, group, *names)
    if limit is not None:
        note = (
            f"tensors of this process get ENOMEM beyond it; nothing is killed for them."
            f" {format_size(limit.used)} are used"
        )
        fix = [f"echo {none} | sudo tee \\", f"  {limit.file}"]
        return Check("memory cgroup", f"{value}, {format_size(limit.bound)}", "warn", note, fix)
    note = ""
    if group != "/":
        note = f"tensors of this process are charged to {group}, new from the system each time"
    return Check("memory cgroup", value, note=note)


def _memlock(m: Machine) -> Check:
    if m.capable(_IPC_LOCK):
        return Check("memlock", "no limit (CAP_IPC_LOCK)")
    found = m.limit("Max locked memory")
    if found is None:
        return Check("memlock", "unknown")
    if not found.isdigit():
        return Check("memlock", "no limit")
    limit = int(found)
    note = "all that this user's arenas of the RT pool, and tensors with pinned=True, may hold"
    if limit >= _FEW_LOCKED:
        return Check("memlock", format_size(limit), note=note)
    fix = [
        "echo '@tensormem - memlock unlimited' |",
        "  sudo tee /etc/security/limits.d/tensormem.conf   # then log in again",
        "# in a systemd unit: LimitMEMLOCK=infinity",
    ]
    return Check("memlock", format_size(limit), "warn", note, fix)


def _board(m: Machine) -> Check | None:
    """Say what the module takes this machine for, and what follows."""
    name = m.text(f"{DEFAULT_ROOT}/board/name")
    ram, model, protocol = (
        m.figure(f"board/{what}") for what in ("ram", "model_bytes", "protocol_bytes")
    )
    if name is None or ram is None or model is None or protocol is None:
        return None
    if m.figure("board/matched"):
        note = f"by default {format_size(model)} for models and all else"
        return Check(
            "board",
            f"{name}, {format_size(ram)}",
            note=f"{note}, {format_size(protocol)} for arenas",
        )
    note = (
        f"by default 60 % of the RAM for all pools, of that {format_size(protocol)} for arenas,"
        f" as the share is on a {name}"
    )
    return Check("board", f"none of the table, {format_size(ram)}", note=note)


def _rt_pool(m: Machine) -> Check | None:
    """Say what arenas may have."""
    size, used, ready = (m.figure(f"rt/{what}") for what in ("size", "used", "ready"))
    if size is None or used is None or ready is None:
        return None
    value = f"{format_size(size)}, {format_size(used)} in arenas"
    if not size:
        fix = ["sudo tensormem rt size 64M"]
        return Check("RT pool", value, "warn", "there can be no arenas", fix)
    if ready:
        return Check("RT pool", value, note=f"{format_size(ready)} of it are set aside")
    half = format_size(max(size // 2, 2 << 20)).replace(" ", "").replace("iB", "")
    note = (
        "nothing is set aside: an arena is made of what the system has left then."
        f" 'tensormem rt ready {half}', or at boot:"
    )
    fix = [
        f"echo 'options tensormem rt_ready={max(size // 2, 2 << 20)}' |",
        "  sudo tee /etc/modprobe.d/tensormem.conf",
    ]
    return Check("RT pool", value, note=note, fix=fix)


def _pmu(m: Machine) -> Check | None:
    """Say whether cores' memory traffic can be counted."""
    event = m.text(f"{DEFAULT_ROOT}/bandwidth/event")
    if event is None:
        return None
    if event not in (NO_EVENT, "cycles", "instructions"):
        return Check("PMU", f"cores count {event}", note="budgets for cores can be set")
    note = "only the bytes that the module moves itself are counted, and cores have no budgets"
    if event != NO_EVENT:
        fix = [f"sudo tensormem bandwidth set --event {EVENTS[0]}"]
        note = "it stands for traffic, and is none"
        return Check("PMU", f"cores count {event}", "warn", note, fix)
    if not any(m.exists(f"/sys/bus/event_source/devices/{name}") for name in _pmus(m)):
        fix = ["a kernel with CONFIG_ARM_PMUV3, and a machine or hypervisor that has a PMU"]
        return Check("PMU", "none", "warn", note, fix)
    fix = ["sudo tensormem bandwidth set --event NAME   # one that 'perf list' has"]
    return Check("PMU", "no event of memory traffic was found", "warn", note, fix)


def _pmus(m: Machine) -> list[str]:
    """Return the names of the CPUs' counters."""
    folder = m.path("/sys/bus/event_source/devices")
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return [name for name in names if name.startswith("armv")]


def _preemption(m: Machine) -> Check:
    """Say whether anything else in the kernel can hold up a real-time task for long."""
    if m.text("/sys/kernel/realtime") == "1":
        return Check("preemption", "PREEMPT_RT")
    note = "what the RT pool does is bounded here, too; the rest of the kernel is not"
    if "+rpt" in m.release or "-rpi" in m.release:
        fix = ["sudo apt install linux-image-rpi-v8-rt   # a kernel with PREEMPT_RT"]
    else:
        fix = ["sudo apt install linux-image-rt-arm64   # Debian's kernel with PREEMPT_RT"]
    return Check("preemption", "no PREEMPT_RT", "warn", note, fix)


def _priority(m: Machine) -> Check:
    """Say what this process may do about its own time."""
    if m.capable(_SYS_NICE):
        return Check("priority", "any (CAP_SYS_NICE)")
    limit = m.limit("Max realtime priority")
    fix = [
        "run it with sudo, or in a systemd unit:",
        "AmbientCapabilities=CAP_SYS_NICE CAP_IPC_LOCK",
    ]
    note = "no reservations in the RT pool"
    if limit in (None, "0"):
        note += ", no SCHED_FIFO"
        fix.append("# SCHED_FIFO alone: LimitRTPRIO=99")
    value = f"no CAP_SYS_NICE, SCHED_FIFO up to {limit or 0}"
    return Check("priority", value, "warn", note, fix)


def _btf(m: Machine) -> Check:
    if m.exists("/sys/kernel/btf/vmlinux"):
        return Check("BTF", "present")
    note = "eBPF monitors must compile against headers; the rest works"
    fix = ["a kernel with CONFIG_DEBUG_INFO_BTF=y, such as Debian's, has it"]
    return Check("BTF", "absent", "warn", note, fix)


def _hugetlb(m: Machine) -> Check:
    total = 0
    folders = list(m.path("/sys/kernel/mm/hugepages").glob("hugepages-*kB"))
    for folder in folders:
        size = int(folder.name.removeprefix("hugepages-").removesuffix("kB")) * 1024
        count = m.text(f"/sys/kernel/mm/hugepages/{folder.name}/nr_hugepages") or "0"
        total += size * int(count) if count.isdigit() else 0
    if total:
        note = f"{format_size(total)} are set aside that tensormem cannot use"
        fix = ["echo 0 | sudo tee /sys/kernel/mm/hugepages/*/nr_hugepages"]
        return Check("hugetlb", format_size(total), "warn", note, fix)
    return Check("hugetlb", "none reserved" if folders else "absent", note="not needed")


def _cma(m: Machine) -> Check:
    match = re.search(r"^CmaTotal:\s+(\d+) kB", m.text("/proc/meminfo") or "", re.M)
    size = int(match[1]) * 1024 if match else 0
    value = format_size(size) if size else "none"
    if size >= 64 << 20:
        return Check("CMA", value)
    note = "chunks come from the page allocator, which fragments as the machine runs"
    return Check("CMA", value, "warn", note, m.command_line("cma=64M"))


def _headers(m: Machine) -> Check:
    if m.path(f"/lib/modules/{m.release}/build/Makefile").exists():
        return Check("headers", "present")
    if "+rpt" in m.release or "-rpi" in m.release:
        flavour = re.search(r"rpi-([\w-]+)$", m.release)
        package = f"linux-headers-rpi-{flavour[1] if flavour else 'v8'}"
    elif m.release.endswith("-raspi"):
        package = "linux-headers-raspi"
    else:
        package = f"linux-headers-{m.release}"
    fix = [f"sudo apt install {package}"]
    if package.startswith("linux-headers-rpi"):
        fix.append("# if the versions differ: sudo apt full-upgrade && sudo reboot")
    note = "needed to build the module for this kernel"
    return Check("headers", "missing", "warn" if m.loaded else "fail", note, fix)


def _signatures(m: Machine) -> Check:
    try:
        variable = m.path(f"/sys/firmware/efi/efivars/{_SECURE_BOOT}").read_bytes()
    except OSError:
        variable = b""
    secure = len(variable) == 5 and variable[4] == 1
    locked = re.search(r"\[(\w+)\]", m.text("/sys/kernel/security/lockdown") or "")
    lockdown = locked[1] if locked else "none"
    enforced = m.text("/sys/module/module/parameters/sig_enforce") == "Y"
    value = "Secure Boot" if secure else "no Secure Boot"
    if not enforced and lockdown == "none":
        return Check("signatures", f"{value}, not enforced")
    value += ", enforced" if enforced else f", lockdown {lockdown}"
    if m.loaded:
        return Check("signatures", value, note="the loaded module passed")
    fix = [
        "openssl req -new -x509 -newkey rsa:2048 -nodes -days 3650 \\",
        "  -subj /CN=tensormem/ -keyout mok.key -outform DER -out mok.der",
        "sudo mokutil --import mok.der   # then reboot and enrol the key",
        f"/lib/modules/{m.release}/build/scripts/sign-file sha256 \\",
        "  mok.key mok.der kmod/tensormem.ko",
    ]
    return Check("signatures", value, "fail", "an unsigned module is refused: sign it", fix)


def _weights(client: Client) -> str | None:
    """Allocate a chunk and say how it is mapped; None where there is no room."""
    try:
        with client.alloc(client.chunk_size, "weights") as tensor:
            return tensor.info().mapping
    except errors.TensormemError:
        return None


def _client(m: Machine) -> tuple[Check | None, str | None]:
    """Open the device, the proof that everything above adds up; also see a mapping."""
    path = m.path("/dev/tensormem")
    if not path.exists() or not m.allowed(path):
        return None, None
    from .client import open as open_client

    try:
        with open_client(path) as client:
            stats, mapping = client.stats(), _weights(client)
    except errors.TensormemError as error:
        return Check("client", error.cause, "fail", "", [error.remedy]), None
    return Check(
        "client",
        f"ABI {stats.abi_version}, quota {format_quota(stats.quota)},"
        f" window {format_size(stats.window_size)}",
        note="" if stats.whole_window else "one mapping for each tensor",
    ), mapping


def examine(machine: Machine | None = None) -> list[Check]:
    """Run every check, in the order in which one would mend things.

    Args:
        machine: where to look; None for this machine.

    Returns:
        One finding for each check; ``client`` only where the device can be opened, ``board``,
        ``RT pool`` and ``PMU`` where the module says what they are.
    """
    m = machine or Machine()
    client, mapping = _client(m)
    checks = [
        _architecture(m),
        _kernel(m),
        _headers(m),
        _signatures(m),
        _module(m),
        _device(m),
        client,
        _board(m),
        _rt_pool(m),
        _pmu(m),
        _page_size(m),
        _mapping(m, mapping),
        _psi(m),
        _cgroup(m),
        _memlock(m),
        _priority(m),
        _preemption(m),
        _btf(m),
        _hugetlb(m),
        _cma(m),
    ]
    return [check for check in checks if check is not None]
