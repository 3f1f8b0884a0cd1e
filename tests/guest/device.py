# SPDX-License-Identifier: MIT
"""The device without the library in between: what the ABI tests speak through.

Every call returns 0 or the errno, so that a test can say exactly which one it
expects. Nothing here keeps anything alive or cleans up behind the test.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from tensormem import abi

DEVICE = "/dev/tensormem"
SYSFS = Path("/sys/class/misc/tensormem")
TRACING = Path("/sys/kernel/tracing")
PAGE = mmap.PAGESIZE
CHUNK = 2 << 20

KINDS = tuple(abi.Kind)


class Raw:
    """One client."""

    def __init__(self) -> None:
        self.fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def ioctl(self, request: int, argument: object) -> int:
        try:
            fcntl.ioctl(self.fd, request, argument)  # type: ignore[arg-type]
        except OSError as error:
            return error.errno or -1
        return 0

    def info(self) -> abi.Info:
        info = abi.Info()
        assert self.ioctl(abi.IOC_INFO, info) == 0
        return info

    def try_alloc(
        self, size: int, kind: int = abi.Kind.ACTIVATIONS, pool: int = 0, **fields: int
    ) -> tuple[int, abi.Alloc]:
        item = abi.Alloc(size=size, kind=kind, pool=pool, **fields)
        return self.ioctl(abi.IOC_ALLOC, item), item

    def alloc(
        self, size: int, kind: int = abi.Kind.ACTIVATIONS, pool: int = 0, **fields: int
    ) -> abi.Alloc:
        result, item = self.try_alloc(size, kind, pool, **fields)
        assert result == 0, errno.errorcode.get(result, result)
        return item

    def free(self, handle: int, flags: int = 0) -> int:
        return self.ioctl(abi.IOC_FREE, abi.Free(handle=handle, flags=flags))

    def query(self, handle: int) -> tuple[int, abi.Query]:
        item = abi.Query(handle=handle)
        return self.ioctl(abi.IOC_QUERY, item), item

    def batch(self, request: int, items: ctypes.Array, **fields: int) -> tuple[int, abi.Batch]:
        values = {
            "items": ctypes.addressof(items),
            "count": len(items),
            "item_size": ctypes.sizeof(items._type_),
            **fields,
        }
        batch = abi.Batch(**values)
        return self.ioctl(request, batch), batch

    def alloc_batch(
        self, sizes: list[int], kind: int = abi.Kind.KV, **fields: int
    ) -> tuple[int, abi.Batch, list]:
        requests = (abi.Alloc(size=s, kind=kind, **fields) for s in sizes)
        items = (abi.Alloc * len(sizes))(*requests)
        result, batch = self.batch(abi.IOC_ALLOC_BATCH, items)
        return result, batch, list(items)

    def free_batch(self, handles: list[int]) -> tuple[int, abi.Batch]:
        items = (abi.Free * len(handles))(*(abi.Free(handle=h) for h in handles))
        return self.batch(abi.IOC_FREE_BATCH, items)

    def set_quota(self, value: int) -> int:
        return self.ioctl(abi.IOC_SET_QUOTA, abi.Quota(bytes=value))

    def set_numa(self, numa: int, nodes: int = 0, flags: int = 0) -> int:
        return self.ioctl(abi.IOC_SET_NUMA, abi.SetNuma(numa=numa, nodes=nodes, flags=flags))

    def map(
        self,
        length: int,
        offset: int,
        prot: int = mmap.PROT_READ | mmap.PROT_WRITE,
        flags: int = mmap.MAP_SHARED,
    ) -> mmap.mmap:
        return mmap.mmap(self.fd, length, flags, prot, offset=offset)

    def map_errno(self, length: int, offset: int, **how: int) -> int:
        try:
            self.map(length, offset, **how).close()
        except OSError as error:
            return error.errno or -1
        return 0

    def map_tensor(self, item: abi.Alloc) -> mmap.mmap:
        return self.map(round_up(item.size, PAGE), item.offset)

    def map_window(self) -> mmap.mmap:
        return self.map(self.info().window_size, 0)


def round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def read(name: str) -> int:
    """One value of sysfs, such as ``chunk/total``."""
    return int((SYSFS / name).read_text())


def write(name: str, value: object) -> int:
    try:
        (SYSFS / name).write_text(str(value))
    except OSError as error:
        return error.errno or -1
    return 0


def nodes_with_memory() -> list[int]:
    """The kernel's own list, such as 0-1; without NUMA there is one node, 0."""
    file = Path("/sys/devices/system/node/has_memory")
    ranges = file.read_text().strip().split(",") if file.exists() else ["0"]
    bounds = [(r.split("-")[0], r.split("-")[-1]) for r in ranges]
    return [node for first, last in bounds for node in range(int(first), int(last) + 1)]


def events(name: str) -> list[dict[str, str]]:
    """What the trace has of one of the module's events; see the fixture of that name."""
    lines = re.findall(rf": tensormem_{name}: (.*)$", (TRACING / "trace").read_text(), re.M)
    return [dict(field.split("=", 1) for field in line.split()) for line in lines]


def wait_for(condition: Callable[[], object], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not come about"
        time.sleep(0.02)


def address_of(mapping: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))
