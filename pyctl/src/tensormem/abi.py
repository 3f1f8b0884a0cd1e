# SPDX-License-Identifier: MIT
"""The ioctl interface of the module, mirrored from ``linux/tensormem.h``.

The header is the manual; this file only repeats names, numbers and layouts, and
a test holds it against the compiled header. Structs are extensible by size: the
size of each travels in its ioctl number (or in ``tensormem_batch.item_size``), so
a module of another age reads what it knows and takes the rest as zero.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum, IntFlag
from typing import ClassVar

__all__ = [
    "ABI_VERSION",
    "IOC_ALLOC",
    "IOC_ALLOC_BATCH",
    "IOC_FREE",
    "IOC_FREE_BATCH",
    "IOC_INFO",
    "IOC_MAGIC",
    "IOC_QUERY",
    "IOC_QUERY_BATCH",
    "IOC_SET_NUMA",
    "IOC_SET_QUOTA",
    "Alloc",
    "AllocFlag",
    "Batch",
    "Free",
    "Info",
    "Kind",
    "Mapping",
    "Numa",
    "Pool",
    "Query",
    "Quota",
    "SetNuma",
    "Struct",
    "iowr",
]

ABI_VERSION = 1
IOC_MAGIC = 0xB7


class Kind(IntEnum):
    """``enum tensormem_kind``: what a tensor is for."""

    WEIGHTS = 1
    KV = 2
    ACTIVATIONS = 3
    PROTOCOL = 4


class Pool(IntEnum):
    """``enum tensormem_pool``: which pool serves a tensor."""

    AUTO = 0
    CHUNK = 1
    BUDDY = 2
    SLAB = 3


class Mapping(IntEnum):
    """``enum tensormem_mapping``: how a tensor's whole chunks are mapped."""

    PAGES = 1
    CONT = 2
    BLOCK = 3


class Numa(IntEnum):
    """``enum tensormem_numa``: which memory node serves a tensor."""

    DEFAULT = 0
    LOCAL = 1
    BIND = 2
    INTERLEAVE = 3


class AllocFlag(IntFlag):
    """Flags of ``struct tensormem_alloc``."""

    NOZERO = 1 << 0
    HUGE = 1 << 1
    PAGED = 1 << 2
    PINNED = 1 << 3


class Struct(ctypes.Structure):
    """Base of the ABI structs; all fields are ``__u32`` or ``__u64``."""

    #: Its name in the header.
    c_name: ClassVar[str]


class Info(Struct):
    """``struct tensormem_info``."""

    c_name = "tensormem_info"
    _fields_ = (
        ("abi_version", ctypes.c_uint32),
        ("page_size", ctypes.c_uint32),
        ("chunk_size", ctypes.c_uint64),
        ("window_size", ctypes.c_uint64),
        ("quota", ctypes.c_uint64),
        ("used", ctypes.c_uint64),
        ("nr_tensors", ctypes.c_uint32),
        ("max_batch", ctypes.c_uint32),
        ("cache_line", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("kept", ctypes.c_uint64),
        ("nodes", ctypes.c_uint64),
    )


class Alloc(Struct):
    """``struct tensormem_alloc``."""

    c_name = "tensormem_alloc"
    _fields_ = (
        ("size", ctypes.c_uint64),
        ("kind", ctypes.c_uint32),
        ("pool", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("handle", ctypes.c_uint32),
        ("offset", ctypes.c_uint64),
        ("numa", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("nodes", ctypes.c_uint64),
    )


class Free(Struct):
    """``struct tensormem_free``."""

    c_name = "tensormem_free"
    _fields_ = (("handle", ctypes.c_uint32), ("flags", ctypes.c_uint32))


class Query(Struct):
    """``struct tensormem_query``."""

    c_name = "tensormem_query"
    _fields_ = (
        ("handle", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("kind", ctypes.c_uint32),
        ("pool", ctypes.c_uint32),
        ("size", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
        ("offset", ctypes.c_uint64),
        ("held", ctypes.c_uint64),
        ("nr_chunks", ctypes.c_uint32),
        ("nr_runs", ctypes.c_uint32),
        ("mapping", ctypes.c_uint32),
        ("alloc_flags", ctypes.c_uint32),
    )


class Batch(Struct):
    """``struct tensormem_batch``."""

    c_name = "tensormem_batch"
    _fields_ = (
        ("items", ctypes.c_uint64),
        ("count", ctypes.c_uint32),
        ("item_size", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("failed", ctypes.c_uint32),
    )


class Quota(Struct):
    """``struct tensormem_quota``."""

    c_name = "tensormem_quota"
    _fields_ = (("bytes", ctypes.c_uint64),)


class SetNuma(Struct):
    """``struct tensormem_set_numa``."""

    c_name = "tensormem_set_numa"
    _fields_ = (
        ("numa", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("nodes", ctypes.c_uint64),
    )


def iowr(number: int, size: int) -> int:
    """Return ``_IOWR(TENSORMEM_IOC_MAGIC, number, <size bytes>)``.

    Tests use it to call with the struct of an older or a newer age.
    """
    return (3 << 30) | (size << 16) | (IOC_MAGIC << 8) | number


IOC_INFO = iowr(0x00, ctypes.sizeof(Info))
IOC_SET_QUOTA = iowr(0x01, ctypes.sizeof(Quota))
IOC_SET_NUMA = iowr(0x02, ctypes.sizeof(SetNuma))
IOC_ALLOC = iowr(0x10, ctypes.sizeof(Alloc))
IOC_FREE = iowr(0x11, ctypes.sizeof(Free))
IOC_QUERY = iowr(0x12, ctypes.sizeof(Query))
IOC_ALLOC_BATCH = iowr(0x20, ctypes.sizeof(Batch))
IOC_FREE_BATCH = iowr(0x21, ctypes.sizeof(Batch))
IOC_QUERY_BATCH = iowr(0x22, ctypes.sizeof(Batch))
