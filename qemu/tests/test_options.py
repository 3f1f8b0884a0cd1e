# SPDX-License-Identifier: MIT
"""Options of a guest: what they mean, what follows from them, and what is refused."""

from pathlib import Path

import pytest

from tmguest import cli, machine, options
from tmguest.errors import GuestError
from tmguest.kernels import KERNELS, Kernel
from tmguest.options import Options


def parse(*words: str) -> Options:
    return cli.guest_options(cli.parser().parse_args(["run", *words]))


@pytest.mark.parametrize(("text", "mib"), [("512M", 512), ("2G", 2048), ("2g", 2048), ("1GiB", 1024), ("700", 700)])
def test_sizes(text: str, mib: int) -> None:
    assert options.size(text) == mib


@pytest.mark.parametrize("text", ["", "G", "-1G", "2T", "1.5G", "2 G B", "0x10"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(GuestError, match="not a memory size"):
        options.size(text)


def test_command_keeps_its_own_options() -> None:
    wanted = parse("--kernel", "6.1", "--", "pytest", "-x", "--timeout", "3", "--", "a b")
    assert wanted.command == ("pytest", "-x", "--timeout", "3", "--", "a b")
    assert wanted.kernel == "6.1"


def test_untraced_is_asked_for() -> None:
    assert parse("--untraced", "--", "true").untraced
    assert not parse("--", "true").untraced


def test_share(tmp_path: Path) -> None:
    wanted = parse("--share", f"{tmp_path}:ro", "--share", "/", "--", "true")
    assert wanted.shares[0] == options.Share(tmp_path, read_only=True)
    assert not wanted.shares[1].read_only
    with pytest.raises(GuestError, match="is not a folder"):
        parse("--share", "/nowhere/at/all", "--", "true")


def test_icount_has_one_cpu() -> None:
    assert options.check(Options(icount=True, cpus=4)).cpus == 1
    with pytest.raises(GuestError, match="--icount"):
        options.check(Options(icount=True, numa=2))


def test_each_node_has_a_cpu() -> None:
    assert options.check(Options(numa=4, cpus=2)).cpus == 4


@pytest.mark.parametrize("wanted", [Options(cpus=0), Options(memory=100), Options(numa=0)])
def test_too_little_is_refused(wanted: Options) -> None:
    with pytest.raises(GuestError, match="at least"):
        options.check(wanted)


@pytest.mark.parametrize(
    "wanted",
    [
        Options(machine="raspi3b", shares=(options.Share(Path("/tmp"), True),)),
        Options(machine="raspi3b", numa=2),
        Options(machine="raspi3b", kernel="6.12-16k"),
        Options(machine="raspi3b", icount=True),
        Options(machine="raspi3b", dma=True),
        Options(machine="raspi3b", dma_pool=options.DmaPool(32, True)),
    ],
)
def test_what_a_pi_cannot_do_is_refused(wanted: Options) -> None:
    with pytest.raises(GuestError, match="raspi3b"):
        options.check(wanted)


def test_two_shares_of_one_name_are_refused() -> None:
    shares = (options.Share(Path("/a/x"), True), options.Share(Path("/b/x"), True))
    with pytest.raises(GuestError, match="two folders"):
        options.check(Options(shares=shares))


def command(wanted: Options, name: str = "6.12") -> list[str]:
    kernel = Kernel(KERNELS[name], "6.12.1", Path("/store"))
    files = machine.Files(Path("/root.img"), Path("/initrd"), Path("/log"))
    ports = dict.fromkeys(("frames",) if wanted.machine == "raspi3b" else machine.PORTS, 7)
    return machine.command(kernel, options.check(wanted), files, ports, interactive=False)


def test_memory_and_cpus_are_split_whole() -> None:
    line = " ".join(command(Options(numa=3, cpus=4, memory=1000)))
    for part in ("size=334M", "memdev=memory0,cpus=0,cpus=1", "memdev=memory2,cpus=3"):
        assert part in line


def test_every_port_has_its_name() -> None:
    line = command(Options())
    for name in machine.PORTS:
        assert f"virtserialport,chardev={name},name=tensormem.{name}" in line


def test_a_device_that_does_dma_is_behind_an_iommu() -> None:
    line = command(Options(dma=True))
    assert "edu,dma_mask=0xffffffff" in line
    assert any(word.endswith(",iommu=smmuv3") for word in line)
    assert not any("edu" in word or "smmu" in word for word in command(Options()))


def test_a_region_for_the_dma_pool() -> None:
    assert parse("--", "true").dma_pool is None
    assert parse("--dma-pool", "32M", "--", "true").dma_pool == options.DmaPool(32, reusable=True)
    assert parse("--dma-pool", "1G:idle", "--", "true").dma_pool == options.DmaPool(1024, reusable=False)
    for text in ("0", "3M", "idle", "32M:ro", ":idle", ""):
        with pytest.raises(GuestError, match=r"--dma-pool|not a memory size"):
            options.dma_pool(text)
    with pytest.raises(GuestError, match="three quarters"):
        options.check(Options(memory=1024, dma_pool=options.DmaPool(258, reusable=True)))


def test_the_tree_is_made_from_the_board_that_boots() -> None:
    wanted = options.check(Options(dma=True, icount=True, numa=1, memory=512))
    kernel = Kernel(KERNELS["6.12"], "6.12.1", Path("/store"))
    dump = machine.dump_tree(kernel, wanted, Path("/a,b/tree"))
    (board,) = (word for word in command(wanted) if word.startswith("virt,"))
    assert f"{board},dumpdtb=/a,,b/tree" in dump
    for option in ("-cpu", "-smp", "-m"):
        assert dump[dump.index(option) + 1] == command(wanted)[command(wanted).index(option) + 1]
    assert "-dtb" not in command(wanted)
    files = machine.Files(Path("/root.img"), Path("/initrd"), Path("/log"), Path("/tree"))
    line = machine.command(kernel, wanted, files, dict.fromkeys(machine.PORTS, 7), interactive=False)
    assert line[line.index("-dtb") + 1] == "/tree"


def test_16k_pages_get_a_cpu_that_has_them() -> None:
    assert "cortex-a76" in command(Options(), "6.12-16k")
    assert "cortex-a72" in command(Options())
    assert "max" in command(Options(cpu="max"), "6.12-16k")


def test_images_are_never_written() -> None:
    for wanted in (Options(), Options(machine="raspi3b")):
        drives = [word for word in command(wanted) if word.startswith("file=")]
        assert drives
        assert all("snapshot=on" in drive for drive in drives)
