# SPDX-License-Identifier: MIT
"""doctor on machines that are directories."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fake import FakeDevice
from tensormem import abi
from tensormem import client as client_module
from tensormem.doctor import UDEV_RULE, Check, Machine, examine

RELEASE = "6.12.48+deb13-arm64"
EFI = "/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"


def put(m: Machine, name: str, content: str | bytes = "") -> None:
    path = m.path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def limits(value: object) -> str:
    return (
        "Limit                     Soft Limit           Hard Limit           Units\n"
        f"Max processes             1                    2                    processes\n"
        f"Max locked memory         {value!s:<20} {value!s:<20} bytes\n"
    )


@pytest.fixture
def good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Return a machine where every check is fine."""
    m = Machine(tmp_path, RELEASE, "aarch64", 4096)
    put(m, "/proc/modules", "ext4 1 0 - Live 0x0\ntensormem 81920 0 - Live 0x0\n")
    put(m, "/sys/module/tensormem/version", "0.1.0\n")
    put(m, "/dev/tensormem")
    m.path("/dev/tensormem").chmod(0o660)
    put(m, "/sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n")
    put(m, "/proc/pressure/memory", "some avg10=0.00\n")
    put(m, "/sys/fs/cgroup/cgroup.controllers", "cpuset cpu io memory pids\n")
    put(m, "/proc/self/cgroup", "0::/\n")
    put(m, "/proc/self/status", "Name:\tx\nCapEff:\t0000000000800000\n")
    put(m, "/sys/kernel/realtime", "1\n")
    put(m, "/proc/self/limits", limits("unlimited"))
    put(m, "/sys/kernel/btf/vmlinux", b"\0")
    put(m, "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "0\n")
    put(m, "/proc/meminfo", "MemTotal: 4000000 kB\nCmaTotal:         65536 kB\n")
    put(m, f"/lib/modules/{RELEASE}/build/Makefile")
    put(m, "/sys/module/module/parameters/sig_enforce", "N\n")
    put(m, "/sys/kernel/security/lockdown", "[none] integrity confidentiality\n")
    monkeypatch.setattr(client_module, "KernelDevice", lambda _: FakeDevice())
    return m


def find(m: Machine, name: str) -> Check:
    checks = examine(m)
    assert len({c.name for c in checks}) == len(checks)
    return next(c for c in checks if c.name == name)


def others_are_fine(m: Machine, *names: str) -> bool:
    return all(c.state == "ok" for c in examine(m) if c.name not in names)


def fix(check: Check) -> str:
    return "\n".join(check.fix)


def remove(m: Machine, name: str) -> None:
    m.path(name).unlink()


def test_good_machine(good: Machine) -> None:
    checks = examine(good)
    assert [c.name for c in checks] == [
        "architecture", "kernel", "headers", "signatures", "module", "device", "client",
        "page size", "mapping", "PSI", "memory cgroup", "memlock", "priority", "preemption", "BTF",
        "hugetlb", "CMA",
    ]  # fmt: skip
    assert all(c.state == "ok" for c in checks), checks
    assert not any(c.fix for c in checks)
    assert all(c.value for c in checks)
    assert find(good, "module").value == "loaded, version 0.1.0"
    assert find(good, "client").value == "ABI 1, quota 256 MiB, window 256 MiB"


def unload(m: Machine) -> None:
    put(m, "/proc/modules", "ext4 1 0 - Live 0x0\nnot_tensormem 1 0\n")
    remove(m, "/sys/module/tensormem/version")
    m.path("/sys/module/tensormem").rmdir()
    remove(m, "/dev/tensormem")


def test_module_not_built(good: Machine) -> None:
    unload(good)
    check = find(good, "module")
    assert check.state == "fail"
    assert "make -C kmod" in fix(check)
    assert "sudo insmod kmod/tensormem.ko" in fix(check)
    device = find(good, "device")
    assert device.state == "fail"
    assert "module is loaded" in device.note
    assert others_are_fine(good, "module", "device")
    assert not any(c.name == "client" for c in examine(good))


@pytest.mark.parametrize("place", ["extra/tensormem.ko", "updates/dkms/tensormem.ko.xz"])
def test_module_built_and_not_loaded(good: Machine, place: str) -> None:
    unload(good)
    put(good, f"/lib/modules/{RELEASE}/{place}")
    check = find(good, "module")
    assert check.state == "fail"
    assert check.fix == ["sudo modprobe tensormem"]


def test_device_missing_under_a_loaded_module(good: Machine) -> None:
    remove(good, "/dev/tensormem")
    check = find(good, "device")
    assert check.state == "fail"
    assert "udevadm trigger" in fix(check)


def test_device_denied(good: Machine) -> None:
    m = replace(good, allowed=lambda _: False)
    check = find(m, "device")
    assert check.state == "fail"
    assert check.value == "/dev/tensormem, mode 0660"
    for words in (
        "groupadd --system --force tensormem",
        UDEV_RULE,
        "/etc/udev/rules.d/60-tensormem.rules",
        "udevadm control --reload",
        "usermod -aG tensormem $USER",
    ):
        assert words in fix(check)
    assert not any(c.name == "client" for c in examine(m))


def test_device_open_to_the_world(good: Machine) -> None:
    good.path("/dev/tensormem").chmod(0o666)
    check = find(good, "device")
    assert check.state == "warn"
    assert "anybody" in check.note
    assert UDEV_RULE in fix(check)


def test_client_of_another_abi(good: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "KernelDevice", lambda _: FakeDevice(abi_version=9))
    check = find(good, "client")
    assert check.state == "fail"
    assert "ABI 9" in check.value
    assert check.fix


def test_client_without_the_whole_window(good: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "KernelDevice", lambda _: FakeDevice(window_mapping=False))
    assert "each tensor" in find(good, "client").note


@pytest.mark.parametrize(
    ("machine", "state", "words"),
    [
        ("aarch64", "ok", ""),
        ("armv7l", "fail", "arm_64bit=1"),
        ("x86_64", "warn", "make demo"),
    ],
)
def test_architecture(good: Machine, machine: str, state: str, words: str) -> None:
    check = find(replace(good, machine=machine), "architecture")
    assert (check.state, check.value) == (state, machine)
    assert words in fix(check)


@pytest.mark.parametrize(
    ("release", "state"),
    [
        ("6.0.12-arm64", "fail"),
        ("5.15.0-rpi", "fail"),
        ("6.1.0-40-arm64", "ok"),
        ("6.12.48+deb13-rt-arm64", "ok"),
        ("7.2.1-arm64-16k", "ok"),
        ("8.0.0", "warn"),
        ("weird", "fail"),
    ],
)
def test_kernel(good: Machine, release: str, state: str) -> None:
    check = find(replace(good, release=release), "kernel")
    assert (check.state, check.value) == (state, release)
    assert bool(check.fix) == (state != "ok")
    if state != "ok":
        assert "6.1 to 7.x" in check.note


@pytest.mark.parametrize(
    ("size", "value", "words", "state"),
    [
        (4096, "4 KiB", "2 MiB block", "ok"),
        (16384, "16 KiB", "128 pages", "ok"),
        (65536, "64 KiB", "32 pages", "ok"),
        (8192, "8 KiB", "never tried", "warn"),
    ],
)
def test_page_size(good: Machine, size: int, value: str, words: str, state: str) -> None:
    check = find(replace(good, page_size=size), "page size")
    assert (check.value, check.state) == (value, state)
    assert words in check.note


def test_page_size_of_a_pi_5(good: Machine) -> None:
    put(good, "/proc/device-tree/model", "Raspberry Pi 5 Model B Rev 1.0\0")
    assert "kernel=kernel8.img" in fix(find(replace(good, page_size=16384), "page size"))


VALUES = {
    "block": "weights in blocks of 2 MiB",
    "cont": "weights in contiguous pages",
    "pages": "weights page by page",
}


@pytest.mark.parametrize("mapping", abi.Mapping)
def test_mapping_is_what_the_module_does(
    good: Machine, monkeypatch: pytest.MonkeyPatch, mapping: abi.Mapping
) -> None:
    device = FakeDevice(mapping=mapping)
    monkeypatch.setattr(client_module, "KernelDevice", lambda _: device)
    check = find(good, "mapping")
    assert check.value == VALUES[mapping.name.lower()]
    assert check.state == ("warn" if mapping == abi.Mapping.PAGES else "ok")
    assert "not tried" not in check.note
    assert not device.tensors
    assert device.fd == -1


@pytest.mark.parametrize(
    ("thp", "page_size", "release", "mapping", "words"),
    [
        (True, 4096, "6.1.0-40-arm64", "block", ""),
        (True, 16384, "6.12.1-16k", "cont", ""),
        (True, 65536, "6.9.0", "cont", ""),
        (True, 16384, "6.6.51-rpi", "pages", "from 6.9 on"),
        (False, 4096, "6.12.1", "pages", "CONFIG_TRANSPARENT_HUGEPAGE=y"),
        (False, 16384, "6.12.1", "pages", "CONFIG_TRANSPARENT_HUGEPAGE=y"),
    ],
)
def test_mapping_is_what_the_kernel_suggests(
    good: Machine, thp: bool, page_size: int, release: str, mapping: str, words: str
) -> None:
    name = "/sys/kernel/mm/transparent_hugepage/enabled"
    # what it is set to is for anonymous memory
    put(good, name, "always madvise [never]\n")
    if not thp:
        remove(good, name)
    m = replace(good, page_size=page_size, release=release, allowed=lambda _: False)
    check = find(m, "mapping")
    assert check.value == VALUES[mapping]
    assert check.state == ("warn" if mapping == "pages" else "ok")
    assert "not tried" in check.note
    assert words in fix(check)
    put(m, "/proc/device-tree/model", "Raspberry Pi 5 Model B Rev 1.0\0")
    assert ("kernel8.img" in fix(find(m, "mapping"))) == (mapping == "pages" and page_size > 4096)


def test_mapping_where_there_is_no_room(good: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "KernelDevice", lambda _: FakeDevice(capacity=1 << 20))
    assert find(good, "client").state == "ok"
    assert "not tried" in find(good, "mapping").note


@pytest.mark.parametrize(
    ("name", "file", "words"),
    [
        ("PSI", "/proc/pressure/memory", "psi=1"),
        ("memory cgroup", "/sys/fs/cgroup/cgroup.controllers", "cgroup_enable=memory"),
        ("CMA", "/proc/meminfo", "cma=64M"),
    ],
)
def test_command_line(good: Machine, name: str, file: str, words: str) -> None:
    remove(good, file)
    check = find(good, name)
    assert check.state == "warn"
    assert words in fix(check)
    assert "update-grub" in fix(check)
    put(good, "/proc/device-tree/model", "Raspberry Pi 4 Model B Rev 1.4\0")
    check = find(good, name)
    assert words in fix(check)
    assert "/boot/firmware/cmdline.txt" in fix(check)
    assert "grub" not in fix(check)
    assert others_are_fine(good, name)


def test_cgroup_v1(good: Machine) -> None:
    remove(good, "/sys/fs/cgroup/cgroup.controllers")
    put(good, "/proc/cgroups", "#name h n e\ncpu\t1\t1\t1\nmemory\t2\t5\t1\n")
    assert find(good, "memory cgroup").value == "on (v1)"
    put(good, "/proc/self/cgroup", "4:cpu,cpuacct:/no\n3:memory:/jobs/a\n0::/x\n")
    folder = "/sys/fs/cgroup/memory"
    put(good, f"{folder}/memory.limit_in_bytes", "9223372036854771712\n")
    put(good, f"{folder}/jobs/a/memory.limit_in_bytes", "9223372036854771712\n")
    assert "charged to /jobs/a" in find(good, "memory cgroup").note
    put(good, f"{folder}/jobs/memory.limit_in_bytes", "67108864\n")
    check = find(good, "memory cgroup")
    assert (check.value, check.state) == ("on (v1), 64 MiB", "warn")
    assert fix(check) == f"echo -1 | sudo tee \\\n  {folder}/jobs/memory.limit_in_bytes"
    put(good, "/proc/cgroups", "#name h n e\ncpu\t1\t1\t1\nmemory\t2\t5\t0\n")
    assert find(good, "memory cgroup").state == "warn"


def test_cgroup_limits(good: Machine) -> None:
    group = "/user.slice/app.scope"
    put(good, "/proc/self/cgroup", f"0::{group}\n")
    folder = f"/sys/fs/cgroup{group}"
    put(good, f"{folder}/memory.max", "max\n")
    check = find(good, "memory cgroup")
    assert (check.value, check.state) == ("on (v2)", "ok")
    assert f"charged to {group}" in check.note
    put(good, f"{folder}/memory.max", f"{512 << 20}\n")
    put(good, f"{folder}/memory.current", f"{100 << 20}\n")
    check = find(good, "memory cgroup")
    assert (check.value, check.state) == ("on (v2), 512 MiB", "warn")
    assert "100 MiB are used" in check.note
    assert "ENOMEM" in check.note
    assert fix(check) == f"echo max | sudo tee \\\n  {folder}/memory.max"
    # the one that has least left counts, though it is not the smallest
    put(good, "/sys/fs/cgroup/user.slice/memory.max", f"{900 << 20}\n")
    put(good, "/sys/fs/cgroup/user.slice/memory.current", f"{800 << 20}\n")
    check = find(good, "memory cgroup")
    assert check.value == "on (v2), 900 MiB"
    assert fix(check).endswith("/user.slice/memory.max")
    # in a container the limit is at what it sees as the root
    put(good, "/proc/self/cgroup", "0::/\n")
    put(good, "/sys/fs/cgroup/memory.max", f"{64 << 20}\n")
    assert find(good, "memory cgroup").value == "on (v2), 64 MiB"
    assert others_are_fine(good, "memory cgroup")


SYSFS = "/sys/class/misc/tensormem"


def module(m: Machine, **files: object) -> None:
    for name, value in files.items():
        put(m, f"{SYSFS}/{name.replace('__', '/')}", f"{value}\n")


def test_board(good: Machine) -> None:
    module(
        good, board__name="Raspberry Pi 4", board__matched=1, board__ram=2 << 30,
        board__model_bytes=1280 << 20, board__protocol_bytes=128 << 20,
    )  # fmt: skip
    check = find(good, "board")
    assert (check.state, check.value) == ("ok", "Raspberry Pi 4, 2 GiB")
    assert check.note == "by default 1.2 GiB for models and all else, 128 MiB for arenas"
    module(good, board__matched=0)
    check = find(good, "board")
    assert (check.state, check.value) == ("ok", "none of the table, 2 GiB")
    assert "128 MiB for arenas, as the share is on a Raspberry Pi 4" in check.note
    module(good, board__ram="?")
    assert "board" not in [c.name for c in examine(good)]


def test_rt_pool(good: Machine) -> None:
    module(good, rt__size=64 << 20, rt__used=4 << 20, rt__ready=8 << 20)
    check = find(good, "RT pool")
    assert (check.state, check.value, check.fix) == ("ok", "64 MiB, 4 MiB in arenas", [])
    assert check.note == "8 MiB of it are set aside"
    module(good, rt__ready=0)
    check = find(good, "RT pool")
    assert check.state == "ok"
    assert "'tensormem rt ready 32M'" in check.note
    assert f"options tensormem rt_ready={32 << 20}" in fix(check)
    assert "/etc/modprobe.d/tensormem.conf" in fix(check)
    module(good, rt__size=0)
    check = find(good, "RT pool")
    assert check.state == "warn"
    assert check.fix == ["sudo tensormem rt size 64M"]
    remove(good, f"{SYSFS}/rt/used")
    assert "RT pool" not in [c.name for c in examine(good)]


def test_pmu(good: Machine) -> None:
    module(good, bandwidth__event="l2d_cache_refill")
    check = find(good, "PMU")
    assert (check.state, check.value) == ("ok", "cores count l2d_cache_refill")
    module(good, bandwidth__event="cycles")
    check = find(good, "PMU")
    assert (check.state, check.value) == ("warn", "cores count cycles")
    assert check.fix == ["sudo tensormem bandwidth set --event l2d_cache_refill"]
    module(good, bandwidth__event="none")
    check = find(good, "PMU")
    assert (check.state, check.value) == ("warn", "none")
    assert "CONFIG_ARM_PMUV3" in fix(check)
    assert "only the bytes that the module moves itself" in check.note
    put(good, "/sys/bus/event_source/devices/armv8_cortex_a72/type", "8\n")
    check = find(good, "PMU")
    assert (check.state, check.value) == ("warn", "no event of memory traffic was found")
    assert "--event NAME" in fix(check)
    assert others_are_fine(good, "PMU")
    remove(good, f"{SYSFS}/bandwidth/event")
    assert "PMU" not in [c.name for c in examine(good)]


@pytest.mark.parametrize(("release", "package"), [
    (RELEASE, "linux-image-rt-arm64"),
    ("6.12.34+rpt-rpi-2712", "linux-image-rpi-v8-rt"),
])  # fmt: skip
def test_no_preempt_rt(good: Machine, release: str, package: str) -> None:
    assert find(good, "preemption").value == "PREEMPT_RT"
    remove(good, "/sys/kernel/realtime")
    check = find(replace(good, release=release), "preemption")
    assert (check.state, check.value) == ("warn", "no PREEMPT_RT")
    assert package in fix(check)
    put(good, "/sys/kernel/realtime", "0\n")
    assert find(good, "preemption").state == "warn"


def test_priority(good: Machine) -> None:
    assert find(good, "priority").value == "any (CAP_SYS_NICE)"
    put(good, "/proc/self/status", "CapEff:\tffffffffff7fffff\n")
    check = find(good, "priority")
    assert (check.state, check.value) == ("warn", "no CAP_SYS_NICE, SCHED_FIFO up to 0")
    assert "no reservations in the RT pool, no SCHED_FIFO" in check.note
    assert "AmbientCapabilities=CAP_SYS_NICE" in fix(check)
    assert "LimitRTPRIO" in fix(check)
    put(good, "/proc/self/limits", limits("unlimited") + "Max realtime priority  95  95\n")
    check = find(good, "priority")
    assert check.value == "no CAP_SYS_NICE, SCHED_FIFO up to 95"
    assert "SCHED_FIFO" not in check.note
    assert "LimitRTPRIO" not in fix(check)
    assert others_are_fine(good, "priority")


@pytest.mark.parametrize(
    ("value", "capabilities", "shown", "state"),
    [
        ("unlimited", "0", "no limit", "ok"),
        (8 << 20, "0", "8 MiB", "warn"),
        (8 << 20, "ffffbfff", "8 MiB", "warn"),
        (8 << 20, "4000", "no limit (CAP_IPC_LOCK)", "ok"),
        (64 << 20, "0", "64 MiB", "ok"),
    ],
)
def test_memlock(good: Machine, value: object, capabilities: str, shown: str, state: str) -> None:
    put(good, "/proc/self/limits", limits(value))
    put(good, "/proc/self/status", f"CapPrm:\t0\nCapEff:\t{capabilities}\n")
    check = find(good, "memlock")
    assert (check.value, check.state) == (shown, state)
    assert ("limits.d/tensormem.conf" in fix(check)) == (state == "warn")
    assert ("LimitMEMLOCK=infinity" in fix(check)) == (state == "warn")
    remove(good, "/proc/self/limits")
    if capabilities != "4000":
        assert find(good, "memlock").value == "unknown"


def test_small_cma(good: Machine) -> None:
    put(good, "/proc/meminfo", "CmaTotal:           5120 kB\n")
    check = find(good, "CMA")
    assert (check.value, check.state) == ("5 MiB", "warn")


def test_btf(good: Machine) -> None:
    remove(good, "/sys/kernel/btf/vmlinux")
    check = find(good, "BTF")
    assert check.state == "warn"
    assert "CONFIG_DEBUG_INFO_BTF" in fix(check)


def test_hugetlb(good: Machine) -> None:
    put(good, "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "16\n")
    put(good, "/sys/kernel/mm/hugepages/hugepages-64kB/nr_hugepages", "16\n")
    check = find(good, "hugetlb")
    assert (check.value, check.state) == ("33 MiB", "warn")
    assert "nr_hugepages" in fix(check)


@pytest.mark.parametrize(
    ("release", "package"),
    [
        (RELEASE, f"linux-headers-{RELEASE}"),
        ("6.12.47+rpt-rpi-v8", "linux-headers-rpi-v8"),
        ("6.12.47+rpt-rpi-2712", "linux-headers-rpi-2712"),
        ("6.8.0-1013-raspi", "linux-headers-raspi"),
        ("6.14.0-29-generic", "linux-headers-6.14.0-29-generic"),
    ],
)
def test_headers(good: Machine, release: str, package: str) -> None:
    remove(good, f"/lib/modules/{RELEASE}/build/Makefile")
    check = find(replace(good, release=release), "headers")
    assert check.state == "warn", "the module is loaded already"
    assert check.fix[0] == f"sudo apt install {package}"
    unload(good)
    assert find(replace(good, release=release), "headers").state == "fail"


@pytest.mark.parametrize(
    ("files", "value"),
    [
        ({"/sys/module/module/parameters/sig_enforce": "Y\n"}, "no Secure Boot, enforced"),
        (
            {"/sys/kernel/security/lockdown": "none [integrity] confidentiality\n"},
            "no Secure Boot, lockdown integrity",
        ),
        (
            {EFI: b"\6\0\0\0\1", "/sys/module/module/parameters/sig_enforce": "Y\n"},
            "Secure Boot, enforced",
        ),
    ],
)
def test_signatures(good: Machine, files: dict[str, Any], value: str) -> None:
    for name, content in files.items():
        put(good, name, content)
    check = find(good, "signatures")
    assert (check.value, check.state) == (value, "ok"), "the loaded module has passed"
    unload(good)
    check = find(good, "signatures")
    assert (check.value, check.state) == (value, "fail")
    assert "mokutil --import" in fix(check)
    assert "sign-file sha256" in fix(check)
    assert f"/lib/modules/{RELEASE}" in fix(check)


def test_secure_boot_that_is_off(good: Machine) -> None:
    put(good, EFI, b"\6\0\0\0\0")
    assert find(good, "signatures").value == "no Secure Boot, not enforced"


def test_this_machine_can_be_examined() -> None:
    for check in examine():
        assert check.state in ("ok", "warn", "fail")
        assert check.value
        assert bool(check.fix or check.note) or check.state == "ok"


def test_a_machine_without_any_file(tmp_path: Path) -> None:
    checks = examine(Machine(tmp_path, RELEASE, "aarch64", os.sysconf("SC_PAGE_SIZE")))
    assert {c.name for c in checks if c.state == "fail"} == {"headers", "module", "device"}


def test_everything_fits_into_80_columns(good: Machine) -> None:
    unload(good)
    put(good, "/sys/module/module/parameters/sig_enforce", "Y\n")
    put(good, "/proc/self/limits", limits(8 << 20))
    put(good, "/proc/self/cgroup", "0::/user.slice/user-1000.slice/session-3.scope\n")
    put(good, "/sys/fs/cgroup/user.slice/user-1000.slice/session-3.scope/memory.max", "67108864\n")
    put(good, "/proc/device-tree/model", "Raspberry Pi 5 Model B Rev 1.0\0")
    m = replace(good, allowed=lambda _: False, page_size=16384, release="6.6.51")
    lines = [line for check in examine(m) for line in check.fix]
    put(good, "/dev/tensormem")
    lines += [line for check in examine(m) for line in check.fix]
    assert len(lines) > 10
    assert not [line for line in lines if len(line) > 80 - 6]
    assert not any(re.search(r"\s$", line) for line in lines)
