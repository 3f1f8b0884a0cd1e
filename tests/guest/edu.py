# SPDX-License-Identifier: MIT
"""QEMU's edu device as an importer of dma-bufs (``kmod/tests/tm_edu.c``), and what its IOMMU is told."""

from __future__ import annotations

import ctypes
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from device import TRACING, Descriptor

NODE = "/dev/tm_edu"
DRIVER = Path("/sys/bus/pci/drivers/tm_edu")
#: enum dma_data_direction
BOTH, TO_DEVICE, FROM_DEVICE = 0, 1, 2
#: Bytes of the device's own memory that a transfer may have.
MEMORY = 4095


def io(number: int, size: int = 0, direction: int = 0) -> int:
    return direction << 30 | size << 16 | ord("e") << 8 | number


class Map(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint32) for name in ("direction", "entries", "segments", "largest"))


class Copy(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("size", ctypes.c_uint32), ("to_ram", ctypes.c_uint32))


class Cost(ctypes.Structure):
    _fields_ = (("pages", ctypes.c_uint32), ("entries", ctypes.c_uint32), ("ns", ctypes.c_uint64))


@dataclass(frozen=True)
class Mapped:
    """A dma-buf as the device has it: entries of the table, segments of its addresses, the largest entry."""

    entries: int
    segments: int
    largest: int


class Edu(Descriptor):
    """One importer. Every call returns 0 or the errno."""

    def __init__(self) -> None:
        super().__init__(os.open(NODE, os.O_RDWR | os.O_CLOEXEC))
        self.mapped = Mapped(0, 0, 0)

    def call(self, request: int, value: int = 0) -> int:
        try:
            fcntl.ioctl(self.fd, request, value)
        except OSError as error:
            return error.errno or -1
        return 0

    def attach(self, fd: int) -> int:
        return self.call(io(0), fd)

    def detach(self) -> int:
        return self.call(io(1))

    def map_for(self, direction: int = BOTH) -> int:
        item = Map(direction=direction)
        result = self.ioctl(io(2, ctypes.sizeof(Map), 3), item)
        if result == 0:
            self.mapped = Mapped(item.entries, item.segments, item.largest)
        return result

    def unmap(self) -> int:
        return self.call(io(3))

    def fetch(self, offset: int, size: int = MEMORY) -> int:
        """The device reads so many bytes into its own memory."""
        return self.ioctl(io(4, ctypes.sizeof(Copy), 1), Copy(offset=offset, size=size))

    def store(self, offset: int, size: int = MEMORY) -> int:
        """The device writes so many bytes out of its own memory."""
        return self.ioctl(io(4, ctypes.sizeof(Copy), 1), Copy(offset=offset, size=size, to_ram=1))

    def cost(self, pages: int = 0) -> Cost:
        """Map and unmap what is attached, or single pages of no dma-buf."""
        cost = Cost(pages=pages)
        assert self.ioctl(io(5, ctypes.sizeof(Cost), 3), cost) == 0
        return cost

    def total(self) -> tuple[int, int]:
        """The sum of all bytes, as the kernel sees them side by side."""
        value = ctypes.c_uint64()
        return self.ioctl(io(6, 8, 2), value), value.value


@contextmanager
def iommu_maps() -> Iterator[list[int]]:
    """Count the IOMMU's map calls, of all devices, while it is entered; the count is in the list afterwards."""
    event = TRACING / "events/iommu/map"
    found: list[int] = []
    (event / "trigger").write_text("hist:keys=size")
    try:
        yield found
        lines = (event / "hist").read_text().splitlines()
        found.append(next(int(line.split()[1]) for line in lines if line.strip().startswith("Hits:")))
    finally:
        (event / "trigger").write_text("!hist:keys=size")
