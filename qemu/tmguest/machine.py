# SPDX-License-Identifier: MIT
"""QEMU's command line for a guest. Pure but for the paths it is given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .kernels import Kernel
from .options import PI, Options

QEMU = "qemu-system-aarch64"
PORTS = ("stdout", "stderr", "result")
# ignore_loglevel and printk.devkmsg: the splat gate needs the whole log. No panic_on_warn: a test session goes on
# after a warning, and the gate tells at its end.
# What a kernel would draw by lot at boot: where things are, and in which order they are handed out.
# And what watches time: with sleep=off the guest's clock leaps ahead whenever the host is slow to deliver a disk block.
ICOUNT_ARGUMENTS = (
    "nokaslr norandmaps randomize_kstack_offset=off "
    "sysctl.kernel.hung_task_timeout_secs=0 rcupdate.rcu_cpu_stall_suppress=1 nosoftlockup"
)
KERNEL_ARGUMENTS = "ignore_loglevel printk.devkmsg=on oops=panic panic=-1 kunit.enable=1"


@dataclass(frozen=True)
class Files:
    """What a guest boots from and writes to."""

    root: Path
    initrd: Path
    console: Path
    tree: Path | None = None  # the device tree, where it is not QEMU's own


def cpu_model(kernel: Kernel, options: Options) -> str:
    """The CPU of a Pi 4, or of a Pi 5 for 16K pages, which a Pi 4's cannot do."""
    return options.cpu or ("cortex-a76" if kernel.spec.page_size == 16384 else "cortex-a72")


def command(kernel: Kernel, options: Options, files: Files, ports: dict[str, int], interactive: bool) -> list[str]:
    """The whole command line; ``ports`` gives the inherited file descriptor of each of ``PORTS``."""
    line = [QEMU, "-nodefaults", "-display", "none", "-no-reboot"]
    line += ["-kernel", str(kernel.path / "Image"), "-initrd", str(files.initrd)]
    if options.machine == PI:
        return line + _raspi3b(kernel, options, files, ports, interactive)
    return line + _virt(kernel, options, files, ports, interactive)


def _arguments(options: Options, *consoles: str) -> list[str]:
    words = [f"console={console}" for console in consoles]
    return [
        "-append",
        " ".join(
            [
                *words,
                KERNEL_ARGUMENTS,
                *([ICOUNT_ARGUMENTS] if options.icount else []),
                options.append,
            ]
        ),
    ]


def _board(kernel: Kernel, options: Options, more: str = "") -> list[str]:
    """What QEMU's own device tree is made from."""
    # Seeds from the host would make two runs differ.
    seeds = ",dtb-randomness=off" if options.icount else ""
    iommu = ",iommu=smmuv3" if options.dma else ""
    line = ["-M", f"virt,gic-version=3{seeds}{iommu}{more}", "-cpu", cpu_model(kernel, options)]
    return [*line, "-smp", str(options.cpus), "-m", f"{options.memory}M", *_nodes(options)]


def dump_tree(kernel: Kernel, options: Options, tree: Path) -> list[str]:
    """The command line that has QEMU write its own device tree, and end."""
    into = str(tree).replace(",", ",,")
    return [QEMU, "-nodefaults", "-display", "none", *_board(kernel, options, f",dumpdtb={into}")]


def _virt(kernel: Kernel, options: Options, files: Files, ports: dict[str, int], interactive: bool) -> list[str]:
    line = _board(kernel, options)
    if files.tree:
        line += ["-dtb", str(files.tree)]
    if options.icount:
        line += ["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off"]
    else:
        line += ["-accel", "tcg,thread=multi"]
    line += _arguments(options, "ttyAMA0")
    line += ["-chardev", f"file,id=console,path={files.console}", "-serial", "chardev:console"]
    line += _disk("root", files.root)
    if (kernel.path / "modules.img").exists():
        line += _disk("modules", kernel.path / "modules.img")
    if options.dma:
        # As many bits of address as most devices have; 28, its own default, would be less than the board's first byte.
        line += ["-device", f"edu,dma_mask={(1 << 32) - 1:#x}"]
    line += ["-device", "virtio-serial-pci"]
    if interactive:
        line += ["-chardev", "stdio,id=terminal,mux=on,signal=off", "-mon", "chardev=terminal"]
        line += ["-device", "virtconsole,chardev=terminal"]
    for name, fd in ports.items():
        line += ["-chardev", f"file,id={name},path=/dev/fd/{fd}"]
        line += ["-device", f"virtserialport,chardev={name},name=tensormem.{name}"]
    for number, one in enumerate(options.shares):
        access = ",readonly=on" if one.read_only else ""
        line += ["-fsdev", f"local,id=share{number},path={one.path},security_model=none{access}"]
        line += ["-device", f"virtio-9p-pci,fsdev=share{number},mount_tag=share{number}"]
    return line


def _disk(name: str, image: Path) -> list[str]:
    drive = f"file={image},if=none,id={name},format=raw,snapshot=on"
    return ["-drive", drive, "-device", f"virtio-blk-pci,drive={name},serial={name}"]


def _nodes(options: Options) -> list[str]:
    if options.numa == 1:
        return []
    line = []
    for node in range(options.numa):
        memory = options.memory // options.numa + (options.memory % options.numa if node == 0 else 0)
        cpus = ",".join(f"cpus={cpu}" for cpu in range(options.cpus) if cpu * options.numa // options.cpus == node)
        line += ["-object", f"memory-backend-ram,id=memory{node},size={memory}M"]
        line += ["-numa", f"node,nodeid={node},memdev=memory{node},{cpus}"]
    return line


def _raspi3b(kernel: Kernel, options: Options, files: Files, ports: dict[str, int], interactive: bool) -> list[str]:
    line = [
        "-M",
        "raspi3b",
        "-dtb",
        str(kernel.path / "pi3.dtb"),
        *_arguments(options, "ttyAMA0,115200"),
    ]
    line += ["-drive", f"file={files.root},if=sd,format=raw,snapshot=on"]
    line += ["-chardev", f"file,id=console,path={files.console}", "-serial", "chardev:console"]
    if interactive:
        return [*line, "-serial", "mon:stdio"]
    return [
        *line,
        "-chardev",
        f"file,id=frames,path=/dev/fd/{ports['frames']}",
        "-serial",
        "chardev:frames",
    ]
