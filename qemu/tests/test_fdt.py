# SPDX-License-Identifier: MIT
"""Device trees: read, written, and given a region; damaged ones refused."""

from __future__ import annotations

import random
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from tmguest import fdt, machine, options
from tmguest.errors import GuestError
from tmguest.fdt import Node, Tree
from tmguest.kernels import KERNELS, Kernel

#: A tree of one node with one property, word by word as the specification has it.
WORDS = (
    *(fdt.MAGIC, 0x88, 0x48, 0x80, 0x28, 17, 16, 3, 0x06, 0x38),
    *(0, 0x1000, 0, 0x2000, 0, 0, 0, 0),
    *(4, 1, 0, 3, 6, 0, 0x61003131, 0x31000000, 4, 1, 0x62000000, 2, 2, 9),
)
BLOB = struct.pack(f">{len(WORDS)}I", *WORDS) + b"model\0\0\0"


def some_node(dice: random.Random, depth: int, phandles: list[int]) -> Node:
    node = Node("".join(dice.choices("abc,@-0", k=dice.randrange(12))) if depth else "")
    for number in range(dice.randrange(4)):
        node.properties[f"p{dice.randrange(9)}-{number}"] = dice.randbytes(dice.randrange(20))
    if dice.randrange(2):
        phandles.append(dice.randrange(1, 1 << 16))
        node.properties["phandle"] = fdt.cells(phandles[-1])
    if depth < 4:
        node.children = [some_node(dice, depth + 1, phandles) for _ in range(dice.randrange(4))]
    return node


def test_one_written_by_hand() -> None:
    tree = fdt.parse(BLOB)
    assert tree == Tree(Node("", {"model": b"a\00011" + b"1\0"}, [Node("b")]), [(0x1000, 0x2000)], boot_cpu=3)
    assert fdt.parse(fdt.build(tree)) == tree


def test_any_tree_comes_back() -> None:
    dice = random.Random(1)
    for _ in range(40):
        phandles: list[int] = []
        tree = Tree(some_node(dice, 0, phandles), boot_cpu=dice.randrange(4))
        tree.reservations = [(dice.randrange(1 << 64), dice.randrange(1, 1 << 64)) for _ in range(dice.randrange(3))]
        blob = fdt.build(tree)
        assert fdt.parse(blob) == fdt.parse(blob + bytes(64)) == tree
        assert tree.free_phandle() == 1 + max(phandles, default=0)


def test_a_part_of_a_tree_is_none() -> None:
    blob = fdt.build(fdt.parse(BLOB))
    for size in range(len(blob)):
        with pytest.raises(GuestError, match="device tree"):
            fdt.parse(blob[:size])


@pytest.mark.parametrize(
    ("word", "value", "message"),
    [
        (0, 0xD00DFEEE, "is no device tree"),
        (1, 0x89, "cut off"),
        (2, 0x80, "cut off"),
        (3, 0x84, "cut off"),
        (4, 0x84, "cut off"),
        (6, 18, "version 18"),
        (18, 9, "no root"),
        (21, 7, "token 7"),
        (23, 6, "does not have"),
        (22, 0x1000, "cut off"),
        (30, 4, "token 9"),
        (31, 1, "does not end"),
    ],
)
def test_what_is_damaged_is_refused(word: int, value: int, message: str) -> None:
    damaged = bytearray(BLOB)
    struct.pack_into(">I", damaged, word * 4, value)
    with pytest.raises(GuestError, match=message):
        fdt.parse(bytes(damaged))


def test_no_damage_does_anything_else() -> None:
    dice = random.Random(2)
    read = 0
    for _ in range(1000):
        damaged = bytearray(BLOB)
        for _ in range(dice.randrange(1, 4)):
            damaged[dice.randrange(len(damaged))] = dice.randrange(256)
        try:
            fdt.parse(bytes(damaged))
            read += 1
        except GuestError as error:
            assert "device tree" in str(error)  # noqa: PT017
    assert 0 < read < 1000


def board() -> Tree:
    cells = {"#address-cells": fdt.cells(2), "#size-cells": fdt.cells(2)}
    return Tree(Node("", cells, [Node("cpus", {"phandle": fdt.cells(0x8001)})]))


@pytest.mark.parametrize("reusable", [False, True])
def test_a_region(reusable: bool) -> None:
    tree = board()
    fdt.add_dma_pool(tree, 6 << 30, reusable)
    tree = fdt.parse(fdt.build(tree))
    reserved, driver = tree.root.child("reserved-memory"), tree.root.child("tensormem-dma")
    assert reserved
    assert driver
    (region,) = reserved.children
    assert reserved.properties == {"#address-cells": fdt.cells(2), "#size-cells": fdt.cells(2), "ranges": b""}
    assert region.properties["size"] == (6 << 30).to_bytes(8, "big")
    assert region.properties["compatible"] == b"shared-dma-pool\0"
    assert ("reusable" in region.properties) == reusable
    assert "no-map" not in region.properties
    assert driver.properties == {"compatible": b"tensormem,dma\0", "memory-region": fdt.cells(0x8002)}
    assert region.properties["phandle"] == fdt.cells(0x8002)


def test_a_board_that_has_regions_keeps_them() -> None:
    tree = board()
    other = Node("other", {"reg": fdt.long_cells(0, 4096)})
    tree.root.children.append(Node("reserved-memory", {"ranges": b""}, [other]))
    fdt.add_dma_pool(tree, 32 << 20, reusable=True)
    reserved = tree.root.child("reserved-memory")
    assert reserved
    assert [node.name for node in reserved.children] == ["other", "tensormem"]


def test_other_widths_are_refused() -> None:
    tree = board()
    tree.root.properties["#size-cells"] = fdt.cells(1)
    with pytest.raises(GuestError, match="two cells each"):
        fdt.add_dma_pool(tree, 32 << 20, reusable=True)


@pytest.mark.skipif(shutil.which(machine.QEMU) is None, reason="QEMU is not installed")
def test_the_tree_of_the_board(tmp_path: Path) -> None:
    """What QEMU writes is read whole, and what is written is the same to whoever reads it."""
    kernel = Kernel(KERNELS["6.12"], "6.12.1", Path("/store"))
    path = tmp_path / "tree"
    wanted = options.check(options.Options(dma=True))
    subprocess.run(machine.dump_tree(kernel, wanted, path), check=True, capture_output=True)
    tree = fdt.parse(path.read_bytes())
    assert tree.root.properties["compatible"] == b"linux,dummy-virt\0"
    assert any(node.name.startswith("smmuv3") for node in tree.root.children)
    fdt.add_dma_pool(tree, 32 << 20, reusable=True)
    assert fdt.parse(fdt.build(tree)) == tree
