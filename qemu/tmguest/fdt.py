# SPDX-License-Identifier: MIT
"""Flattened device trees: read one, add nodes, write it. Pure.

The format is the Devicetree Specification's chapter 5, version 17: all numbers are big-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from .errors import GuestError

MAGIC = 0xD00DFEED
VERSION, COMPATIBLE = 17, 16
BEGIN_NODE, END_NODE, PROPERTY, NOP, END = 1, 2, 3, 4, 9
HEADER = struct.Struct(">10I")
WORD = struct.Struct(">I")
RESERVATION = struct.Struct(">QQ")


@dataclass
class Node:
    """One node: what it says, and what is in it."""

    name: str
    properties: dict[str, bytes] = field(default_factory=dict)
    children: list[Node] = field(default_factory=list)

    def child(self, name: str) -> Node | None:
        """The child of that name, if there is one."""
        return next((node for node in self.children if node.name == name), None)

    def walk(self) -> Iterator[Node]:
        """This node and all below, parents first."""
        yield self
        for node in self.children:
            yield from node.walk()


@dataclass
class Tree:
    """A whole tree."""

    root: Node
    reservations: list[tuple[int, int]] = field(default_factory=list)
    boot_cpu: int = 0

    def free_phandle(self) -> int:
        """A number that no node has yet."""
        used = [node.properties["phandle"] for node in self.root.walk() if "phandle" in node.properties]
        return 1 + max((WORD.unpack(value)[0] for value in used), default=0)


def cells(*values: int) -> bytes:
    """Numbers of 32 bits, as a property has them."""
    return b"".join(WORD.pack(value) for value in values)


def long_cells(*values: int) -> bytes:
    """Numbers of 64 bits, in two cells each."""
    return b"".join(struct.pack(">Q", value) for value in values)


def text(*words: str) -> bytes:
    """A string, or a list of them."""
    return b"".join(word.encode() + b"\0" for word in words)


class _Reader:
    """Where the reading is in the structure block; raises GuestError at its end."""

    def __init__(self, block: bytes, strings: bytes) -> None:
        self.block = block
        self.strings = strings
        self.at = 0

    def take(self, size: int) -> bytes:
        """So many bytes; what follows begins at the next word."""
        found = self.block[self.at : self.at + size]
        if len(found) != size:
            raise GuestError("the device tree is cut off")
        self.at += -(-size // WORD.size) * WORD.size
        return found

    def word(self) -> int:
        return int(WORD.unpack(self.take(WORD.size))[0])

    def token(self) -> int:
        """The next token that means something."""
        while (token := self.word()) == NOP:
            pass
        return token

    def name(self) -> str:
        end = self.block.find(b"\0", self.at)
        if end < 0:
            raise GuestError("the device tree is cut off")
        return self.take(end + 1 - self.at)[:-1].decode("ascii", "replace")

    def string(self, offset: int) -> str:
        end = self.strings.find(b"\0", offset)
        if offset >= len(self.strings) or end < 0:
            raise GuestError("the device tree names a property that it does not have")
        return self.strings[offset:end].decode("ascii", "replace")

    def node(self) -> Node:
        """The node whose BEGIN_NODE has been read."""
        node = Node(self.name())
        while (token := self.token()) != END_NODE:
            if token == PROPERTY:
                size, name = self.word(), self.word()
                node.properties[self.string(name)] = self.take(size)
            elif token == BEGIN_NODE:
                node.children.append(self.node())
            else:
                raise GuestError(f"the device tree has a token {token}, which means nothing")
        return node


def parse(blob: bytes) -> Tree:
    """Read a tree; raises GuestError if it is none, or damaged."""
    if len(blob) < HEADER.size:
        raise GuestError("this is no device tree: it is too short")
    magic, total, at, strings, reserved, _, compatible, boot_cpu, strings_size, size = HEADER.unpack_from(blob)
    if magic != MAGIC:
        raise GuestError("this is no device tree")
    if compatible > VERSION:
        raise GuestError(f"the device tree is of version {compatible}; {VERSION} is the last one known")
    if max(HEADER.size, at + size, strings + strings_size) > total or total > len(blob):
        raise GuestError("the device tree is cut off")
    reader = _Reader(blob[at : at + size], blob[strings : strings + strings_size])
    if reader.token() != BEGIN_NODE:
        raise GuestError("the device tree has no root")
    tree = Tree(reader.node(), boot_cpu=boot_cpu)
    if reader.token() != END:
        raise GuestError("the device tree does not end with its root")
    while True:
        if reserved + RESERVATION.size > total:
            raise GuestError("the device tree is cut off")
        address, length = RESERVATION.unpack_from(blob, reserved)
        if not length:
            return tree
        tree.reservations.append((address, length))
        reserved += RESERVATION.size


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % WORD.size)


def _structure(node: Node, strings: dict[str, int]) -> bytes:
    parts = [cells(BEGIN_NODE), _padded(text(node.name))]
    for name, value in node.properties.items():
        offset = strings.setdefault(name, sum(len(each) + 1 for each in strings))
        parts += [cells(PROPERTY, len(value), offset), _padded(value)]
    parts += [_structure(child, strings) for child in node.children]
    return b"".join([*parts, cells(END_NODE)])


def build(tree: Tree) -> bytes:
    """Write a tree."""
    offsets: dict[str, int] = {}
    structure = _structure(tree.root, offsets) + cells(END)
    strings = text(*offsets)
    reservations = b"".join(RESERVATION.pack(*one) for one in [*tree.reservations, (0, 0)])
    # reservations begin at a multiple of eight, the structure at one of four
    at_reservations = -(-HEADER.size // 8) * 8
    at_structure = at_reservations + len(reservations)
    at_strings = at_structure + len(structure)
    total = at_strings + len(strings)
    header = HEADER.pack(MAGIC, total, at_structure, at_strings, at_reservations, VERSION, COMPATIBLE, tree.boot_cpu,
                         len(strings), len(structure))  # fmt: skip
    return header.ljust(at_reservations, b"\0") + reservations + structure + strings


def add_dma_pool(tree: Tree, size: int, reusable: bool) -> None:
    """Have so many bytes set aside for the module's DMA pool: lent to programs meanwhile (CMA), or idle.

    Where is up to the kernel, which also aligns it as CMA has to be.
    """
    phandle = tree.free_phandle()
    reserved = tree.root.child("reserved-memory")
    if reserved is None:
        # the kernel wants the root's numbers of cells here; a board with 64-bit addresses has two of each
        widths = {name: tree.root.properties[name] for name in ("#address-cells", "#size-cells")}
        if set(widths.values()) != {cells(2)}:
            raise GuestError("the device tree's addresses and sizes are not of two cells each")
        reserved = Node("reserved-memory", {**widths, "ranges": b""})
        tree.root.children.append(reserved)
    region = Node("tensormem", {
        "compatible": text("shared-dma-pool"),
        "size": long_cells(size),
        "alignment": long_cells(2 << 20),
        "phandle": cells(phandle),
    })  # fmt: skip
    if reusable:
        region.properties["reusable"] = b""
    reserved.children.append(region)
    tree.root.children.append(Node("tensormem-dma", {
        "compatible": text("tensormem,dma"),
        "memory-region": cells(phandle),
    }))  # fmt: skip
