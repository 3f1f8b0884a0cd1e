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
    "IOC_BANDWIDTH",
    "IOC_EXPORT",
    "IOC_FREE",
    "IOC_FREE_BATCH",
    "IOC_INFO",
    "IOC_KV_ADOPT",
    "IOC_KV_CLOSE",
    "IOC_KV_CREATE",
    "IOC_KV_EXTEND",
    "IOC_KV_EXTEND_BATCH",
    "IOC_KV_FORK",
    "IOC_KV_INFO",
    "IOC_KV_LOOKUP",
    "IOC_KV_OPEN",
    "IOC_KV_PACK",
    "IOC_KV_PUBLISH",
    "IOC_KV_QUERY",
    "IOC_KV_RESET",
    "IOC_KV_TRUNCATE",
    "IOC_MAGIC",
    "IOC_MODEL_ABORT",
    "IOC_MODEL_ACQUIRE",
    "IOC_MODEL_COMMIT",
    "IOC_MODEL_EVICT",
    "IOC_MODEL_INFO",
    "IOC_MODEL_OPEN",
    "IOC_MODEL_REMOVE",
    "IOC_MODEL_ROLLBACK",
    "IOC_MODEL_SLOT",
    "IOC_MODEL_STAGE",
    "IOC_QUERY",
    "IOC_QUERY_BATCH",
    "IOC_RELIEVE",
    "IOC_RT_ALLOC",
    "IOC_RT_ALLOC_BATCH",
    "IOC_RT_FREE",
    "IOC_RT_FREE_BATCH",
    "IOC_RT_INFO",
    "IOC_RT_OPEN",
    "IOC_RT_PIN",
    "IOC_RT_PRIORITY",
    "IOC_RT_RESERVE",
    "IOC_RT_UNPIN",
    "IOC_SET_BUDGET",
    "IOC_SET_NUMA",
    "IOC_SET_QUOTA",
    "KV_EVENTS",
    "KV_MAX_GROUPS",
    "KV_PEEK",
    "KV_UNPACK",
    "MODEL_NAME",
    "NL_FAMILY",
    "NL_VERSION",
    "RELIEF_STEPS",
    "RT_MAX_BATCH",
    "RT_MAX_CLASSES",
    "RT_MAX_PRIORITY",
    "RT_STEP",
    "SHA256",
    "Alloc",
    "AllocFlag",
    "Bandwidth",
    "Batch",
    "Budget",
    "Export",
    "ExportFlag",
    "Free",
    "Info",
    "KVAdopt",
    "KVClose",
    "KVCreate",
    "KVEvent",
    "KVEventType",
    "KVExtend",
    "KVFork",
    "KVGroup",
    "KVHash",
    "KVHashes",
    "KVInfo",
    "KVOpen",
    "KVPack",
    "KVQuery",
    "KVReset",
    "KVRule",
    "KVTruncate",
    "Kind",
    "Mapping",
    "ModelAcquire",
    "ModelEvict",
    "ModelInfo",
    "ModelOpen",
    "ModelRemove",
    "ModelSlot",
    "ModelStage",
    "ModelState",
    "ModelWhich",
    "NLAttribute",
    "NLCommand",
    "NLGroup",
    "Numa",
    "OpenFlag",
    "Pool",
    "PressureLevel",
    "Query",
    "Quota",
    "RTAlloc",
    "RTBlock",
    "RTFlag",
    "RTInfo",
    "RTOpen",
    "RTPriority",
    "RTReserve",
    "Relief",
    "Relieve",
    "SetNuma",
    "StageFlag",
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
    DMA = 4


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


class KVRule(IntEnum):
    """``enum tensormem_kv_rule``: which tokens a group of layers keeps."""

    FULL = 1
    WINDOW = 2
    STATE = 3


class KVEventType(IntEnum):
    """``enum tensormem_kv_event_type``."""

    STORED = 1
    REMOVED = 2
    CLEARED = 3


class NLGroup(IntEnum):
    """``enum tensormem_nl_group``: a multicast group has the name in lower case."""

    SLOTS = 0
    RT = 1
    KV = 2
    PRESSURE = 3
    BANDWIDTH = 4


class NLCommand(IntEnum):
    """``enum tensormem_nl_command``: what a netlink message is."""

    CMD_GET = 1
    EVENT_MISSED = 2
    EVENT_SLOT_STAGED = 3
    EVENT_SLOT_READY = 4
    EVENT_SLOT_FAILED = 5
    EVENT_SLOT_COMMITTED = 6
    EVENT_SLOT_ROLLED_BACK = 7
    EVENT_SLOT_ABORTED = 8
    EVENT_SLOT_RETIRED = 9
    EVENT_SLOT_REMOVED = 10
    EVENT_RT_MISS = 11
    EVENT_KV_EVICTED = 12
    EVENT_KV_PACKED = 13
    EVENT_KV_UNPACKED = 14
    EVENT_KV_FULL = 15
    EVENT_PRESSURE = 16
    EVENT_BANDWIDTH = 17


class NLAttribute(IntEnum):
    """``enum tensormem_nl_attribute``."""

    GROUP = 1
    PAD = 2
    SEQ = 3
    MISSED = 4
    TIME = 5
    SLOT = 6
    GENERATION = 7
    SIZE = 8
    ERROR = 9
    CLIENT = 10
    PID = 11
    HAD = 12
    CACHE = 13
    SEQUENCE = 14
    BLOCKS = 15
    BEFORE = 16
    AFTER = 17
    LEVEL = 18
    AVAILABLE = 19
    GIVEN = 20
    CPU = 21
    USED = 22
    BUDGET = 23
    THROTTLED = 24


class PressureLevel(IntEnum):
    """``enum tensormem_pressure_level``."""

    NONE = 0
    LOW = 1
    CRITICAL = 2


class Relief(IntEnum):
    """``enum tensormem_relief``: what a relief does, in this order."""

    CHUNKS = 0
    PREFIXES = 1
    IDLE = 2
    WEIGHTS = 3


class ModelState(IntEnum):
    """``enum tensormem_model_state``: what has become of a generation."""

    LOADING = 1
    STAGED = 2
    ACTIVE = 3
    PREVIOUS = 4
    RETIRED = 5
    FAILED = 6


class ExportFlag(IntFlag):
    """Flags of ``struct tensormem_export``."""

    READ_ONLY = 1 << 0


class OpenFlag(IntFlag):
    """Flags of ``struct tensormem_model_open``."""

    CREATE = 1 << 0
    EXCL = 1 << 1
    WRITE = 1 << 2


class StageFlag(IntFlag):
    """Flags of ``struct tensormem_model_stage``."""

    CACHED = 1 << 0
    VERIFY = 1 << 1
    KEEP = 1 << 2
    EVICTABLE = 1 << 3


class RTFlag(IntFlag):
    """Flags of ``struct tensormem_rt_alloc``."""

    ABSOLUTE = 1 << 0
    RESERVED = 1 << 1
    MOVABLE = 1 << 2


#: Most groups of a KV cache.
KV_MAX_GROUPS = 16

#: Flag of ``struct tensormem_kv_create``: keep events for read(2).
KV_EVENTS = 1 << 0

#: Flag of ``struct tensormem_kv_hashes``: say what matches and change nothing.
KV_PEEK = 1 << 0

#: Flag of ``struct tensormem_kv_pack``: bring everything back instead.
KV_UNPACK = 1 << 0


#: Steps of a relief.
RELIEF_STEPS = 4

#: Bytes for a slot's name with its final 0.
MODEL_NAME = 64

#: The generic netlink family of events.
NL_FAMILY = "tensormem"
NL_VERSION = 1

#: Bytes of a SHA-256.
SHA256 = 32

#: Most granules of a movable block.
RT_STEP = 128

#: Most items of a batch of an RT client.
RT_MAX_BATCH = 64

#: Most sizes that an RT client may reserve.
RT_MAX_CLASSES = 16

#: Highest priority of an RT client.
RT_MAX_PRIORITY = 99


class Struct(ctypes.Structure):
    """Base of the ABI structs."""

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


class Export(Struct):
    """``struct tensormem_export``."""

    c_name = "tensormem_export"
    _fields_ = (
        ("handle", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("size", ctypes.c_uint64),
        ("fd", ctypes.c_int32),
        ("pad", ctypes.c_uint32),
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


class Budget(Struct):
    """``struct tensormem_budget``."""

    c_name = "tensormem_budget"
    _fields_ = (("bytes", ctypes.c_uint64),)


class Bandwidth(Struct):
    """``struct tensormem_bandwidth``."""

    c_name = "tensormem_bandwidth"
    _fields_ = (
        ("budget", ctypes.c_uint64),
        ("used", ctypes.c_uint64),
        ("moved", ctypes.c_uint64),
        ("excess", ctypes.c_uint64),
        ("waits", ctypes.c_uint64),
        ("held_ns", ctypes.c_uint64),
        ("period_ns", ctypes.c_uint64),
        ("client", ctypes.c_uint32),
        ("throttle", ctypes.c_uint32),
    )


class SetNuma(Struct):
    """``struct tensormem_set_numa``."""

    c_name = "tensormem_set_numa"
    _fields_ = (
        ("numa", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("nodes", ctypes.c_uint64),
    )


class Relieve(Struct):
    """``struct tensormem_relieve``."""

    c_name = "tensormem_relieve"
    _fields_ = (
        ("bytes", ctypes.c_uint64),
        ("steps", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("given", ctypes.c_uint64),
        ("step", ctypes.c_uint64 * RELIEF_STEPS),
    )


class KVGroup(Struct):
    """``struct tensormem_kv_group``."""

    c_name = "tensormem_kv_group"
    _fields_ = (
        ("rule", ctypes.c_uint32),
        ("planes", ctypes.c_uint32),
        ("token_bytes", ctypes.c_uint32),
        ("window", ctypes.c_uint32),
        ("element", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("offset", ctypes.c_uint64),
        ("stride", ctypes.c_uint64),
    )


class KVCreate(Struct):
    """``struct tensormem_kv_create``."""

    c_name = "tensormem_kv_create"
    _fields_ = (
        ("groups", ctypes.c_uint64),
        ("nr_groups", ctypes.c_uint32),
        ("group_size", ctypes.c_uint32),
        ("max_tokens", ctypes.c_uint32),
        ("max_sequences", ctypes.c_uint32),
        ("block_tokens", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("limit", ctypes.c_uint64),
        ("fd", ctypes.c_int32),
        ("pad", ctypes.c_uint32),
    )


class KVInfo(Struct):
    """``struct tensormem_kv_info``."""

    c_name = "tensormem_kv_info"
    _fields_ = (
        ("groups", ctypes.c_uint64),
        ("nr_groups", ctypes.c_uint32),
        ("group_size", ctypes.c_uint32),
        ("max_tokens", ctypes.c_uint32),
        ("max_sequences", ctypes.c_uint32),
        ("block_tokens", ctypes.c_uint32),
        ("sequences", ctypes.c_uint32),
        ("window_size", ctypes.c_uint64),
        ("sequence_size", ctypes.c_uint64),
        ("limit", ctypes.c_uint64),
        ("held", ctypes.c_uint64),
        ("used", ctypes.c_uint64),
        ("cached", ctypes.c_uint64),
        ("packed", ctypes.c_uint64),
        ("unpacked", ctypes.c_uint64),
        ("lookups", ctypes.c_uint64),
        ("hits", ctypes.c_uint64),
        ("copies", ctypes.c_uint64),
        ("evictions", ctypes.c_uint64),
        ("packs", ctypes.c_uint64),
        ("unpacks", ctypes.c_uint64),
        ("events_lost", ctypes.c_uint64),
        ("moved", ctypes.c_uint64),
    )


class KVOpen(Struct):
    """``struct tensormem_kv_open``."""

    c_name = "tensormem_kv_open"
    _fields_ = (
        ("sequence", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("tenant", ctypes.c_uint64),
        ("offset", ctypes.c_uint64),
    )


class KVClose(Struct):
    """``struct tensormem_kv_close``."""

    c_name = "tensormem_kv_close"
    _fields_ = (
        ("sequence", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
    )


class KVExtend(Struct):
    """``struct tensormem_kv_extend``."""

    c_name = "tensormem_kv_extend"
    _fields_ = (
        ("sequence", ctypes.c_uint32),
        ("tokens", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("length", ctypes.c_uint32),
    )


class KVTruncate(Struct):
    """``struct tensormem_kv_truncate``."""

    c_name = "tensormem_kv_truncate"
    _fields_ = (
        ("sequence", ctypes.c_uint32),
        ("length", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
    )


class KVFork(Struct):
    """``struct tensormem_kv_fork``."""

    c_name = "tensormem_kv_fork"
    _fields_ = (
        ("sequence", ctypes.c_uint32),
        ("at", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("child", ctypes.c_uint32),
        ("offset", ctypes.c_uint64),
    )


class KVHash(Struct):
    """``struct tensormem_kv_hash``."""

    c_name = "tensormem_kv_hash"
    _fields_ = (("bytes", ctypes.c_uint8 * 16),)


class KVHashes(Struct):
    """``struct tensormem_kv_hashes``."""

    c_name = "tensormem_kv_hashes"
    _fields_ = (
        ("sequence", ctypes.c_uint32),
        ("first", ctypes.c_uint32),
        ("count", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("hashes", ctypes.c_uint64),
        ("matched", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
    )


class KVAdopt(Struct):
    """``struct tensormem_kv_adopt``."""

    c_name = "tensormem_kv_adopt"
    _fields_ = (
        ("sequence", ctypes.c_uint32),
        ("block", ctypes.c_uint32),
        ("tokens", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("hash", KVHash),
        ("length", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
    )


class KVQuery(Struct):
    """``struct tensormem_kv_query``."""

    c_name = "tensormem_kv_query"
    _fields_ = (
        ("sequence", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("length", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("offset", ctypes.c_uint64),
        ("held", ctypes.c_uint64),
        ("shared", ctypes.c_uint64),
        ("packed", ctypes.c_uint64),
        ("unpacked", ctypes.c_uint64),
    )


class KVPack(Struct):
    """``struct tensormem_kv_pack``."""

    c_name = "tensormem_kv_pack"
    _fields_ = (
        ("sequence", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("blocks", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("before", ctypes.c_uint64),
        ("after", ctypes.c_uint64),
    )


class KVReset(Struct):
    """``struct tensormem_kv_reset``."""

    c_name = "tensormem_kv_reset"
    _fields_ = (
        ("flags", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
    )


class KVEvent(Struct):
    """``struct tensormem_kv_event``."""

    c_name = "tensormem_kv_event"
    _fields_ = (
        ("type", ctypes.c_uint32),
        ("block", ctypes.c_uint32),
        ("group", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("tenant", ctypes.c_uint64),
        ("hash", KVHash),
        ("parent", KVHash),
    )


class ModelOpen(Struct):
    """``struct tensormem_model_open``."""

    c_name = "tensormem_model_open"
    _fields_ = (
        ("name", ctypes.c_uint8 * MODEL_NAME),
        ("flags", ctypes.c_uint32),
        ("mode", ctypes.c_uint32),
        ("fd", ctypes.c_int32),
        ("pad", ctypes.c_uint32),
    )


class ModelSlot(Struct):
    """``struct tensormem_model_slot``."""

    c_name = "tensormem_model_slot"
    _fields_ = (
        ("active", ctypes.c_uint64),
        ("previous", ctypes.c_uint64),
        ("staged", ctypes.c_uint64),
        ("last", ctypes.c_uint64),
        ("generations", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
    )


class ModelStage(Struct):
    """``struct tensormem_model_stage``."""

    c_name = "tensormem_model_stage"
    _fields_ = (
        ("file", ctypes.c_int32),
        ("flags", ctypes.c_uint32),
        ("offset", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("sha256", ctypes.c_uint8 * SHA256),
        ("generation", ctypes.c_uint64),
        ("fd", ctypes.c_int32),
        ("pad", ctypes.c_uint32),
    )


class ModelWhich(Struct):
    """``struct tensormem_model_which``."""

    c_name = "tensormem_model_which"
    _fields_ = (
        ("generation", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
    )


class ModelAcquire(Struct):
    """``struct tensormem_model_acquire``."""

    c_name = "tensormem_model_acquire"
    _fields_ = (
        ("generation", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("fd", ctypes.c_int32),
    )


class ModelInfo(Struct):
    """``struct tensormem_model_info``."""

    c_name = "tensormem_model_info"
    _fields_ = (
        ("generation", ctypes.c_uint64),
        ("state", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("size", ctypes.c_uint64),
        ("loaded", ctypes.c_uint64),
        ("private_bytes", ctypes.c_uint64),
        ("shared_bytes", ctypes.c_uint64),
        ("readers", ctypes.c_uint32),
        ("error", ctypes.c_uint32),
        ("mapping", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("evicted_bytes", ctypes.c_uint64),
        ("reloads", ctypes.c_uint64),
    )


class ModelEvict(Struct):
    """``struct tensormem_model_evict``."""

    c_name = "tensormem_model_evict"
    _fields_ = (
        ("generation", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
    )


class ModelRemove(Struct):
    """``struct tensormem_model_remove``."""

    c_name = "tensormem_model_remove"
    _fields_ = (
        ("flags", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
    )


class RTOpen(Struct):
    """``struct tensormem_rt_open``."""

    c_name = "tensormem_rt_open"
    _fields_ = (
        ("size", ctypes.c_uint64),
        ("arena", ctypes.c_int32),
        ("priority", ctypes.c_uint32),
        ("movable", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("fd", ctypes.c_int32),
        ("pad", ctypes.c_uint32),
    )


class RTInfo(Struct):
    """``struct tensormem_rt_info``."""

    c_name = "tensormem_rt_info"
    _fields_ = (
        ("size", ctypes.c_uint64),
        ("granule", ctypes.c_uint32),
        ("clients", ctypes.c_uint32),
        ("free", ctypes.c_uint64),
        ("largest", ctypes.c_uint64),
        ("reserved", ctypes.c_uint64),
        ("used", ctypes.c_uint64),
        ("blocks", ctypes.c_uint32),
        ("priority", ctypes.c_uint32),
        ("waiting", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("allocs", ctypes.c_uint64),
        ("refused", ctypes.c_uint64),
        ("misses", ctypes.c_uint64),
        ("waits", ctypes.c_uint64),
        ("moves", ctypes.c_uint64),
    )


class RTReserve(Struct):
    """``struct tensormem_rt_reserve``."""

    c_name = "tensormem_rt_reserve"
    _fields_ = (
        ("size", ctypes.c_uint64),
        ("count", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
    )


class RTAlloc(Struct):
    """``struct tensormem_rt_alloc``."""

    c_name = "tensormem_rt_alloc"
    _fields_ = (
        ("size", ctypes.c_uint64),
        ("deadline_ns", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("handle", ctypes.c_uint32),
        ("offset", ctypes.c_uint64),
    )


class RTBlock(Struct):
    """``struct tensormem_rt_block``."""

    c_name = "tensormem_rt_block"
    _fields_ = (
        ("handle", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("offset", ctypes.c_uint64),
    )


class RTPriority(Struct):
    """``struct tensormem_rt_priority``."""

    c_name = "tensormem_rt_priority"
    _fields_ = (
        ("priority", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
    )


def iowr(number: int, size: int) -> int:
    """Return ``_IOWR(TENSORMEM_IOC_MAGIC, number, <size bytes>)``.

    Tests use it to call with the struct of an older or a newer age.
    """
    return (3 << 30) | (size << 16) | (IOC_MAGIC << 8) | number


IOC_INFO = iowr(0x00, ctypes.sizeof(Info))
IOC_SET_QUOTA = iowr(0x01, ctypes.sizeof(Quota))
IOC_SET_NUMA = iowr(0x02, ctypes.sizeof(SetNuma))
IOC_RELIEVE = iowr(0x03, ctypes.sizeof(Relieve))
IOC_SET_BUDGET = iowr(0x04, ctypes.sizeof(Budget))
IOC_BANDWIDTH = iowr(0x05, ctypes.sizeof(Bandwidth))
IOC_ALLOC = iowr(0x10, ctypes.sizeof(Alloc))
IOC_FREE = iowr(0x11, ctypes.sizeof(Free))
IOC_QUERY = iowr(0x12, ctypes.sizeof(Query))
IOC_EXPORT = iowr(0x13, ctypes.sizeof(Export))
IOC_ALLOC_BATCH = iowr(0x20, ctypes.sizeof(Batch))
IOC_FREE_BATCH = iowr(0x21, ctypes.sizeof(Batch))
IOC_QUERY_BATCH = iowr(0x22, ctypes.sizeof(Batch))
IOC_KV_CREATE = iowr(0x30, ctypes.sizeof(KVCreate))
IOC_KV_INFO = iowr(0x40, ctypes.sizeof(KVInfo))
IOC_KV_OPEN = iowr(0x41, ctypes.sizeof(KVOpen))
IOC_KV_CLOSE = iowr(0x42, ctypes.sizeof(KVClose))
IOC_KV_EXTEND = iowr(0x43, ctypes.sizeof(KVExtend))
IOC_KV_EXTEND_BATCH = iowr(0x44, ctypes.sizeof(Batch))
IOC_KV_TRUNCATE = iowr(0x45, ctypes.sizeof(KVTruncate))
IOC_KV_FORK = iowr(0x46, ctypes.sizeof(KVFork))
IOC_KV_PUBLISH = iowr(0x47, ctypes.sizeof(KVHashes))
IOC_KV_LOOKUP = iowr(0x48, ctypes.sizeof(KVHashes))
IOC_KV_ADOPT = iowr(0x49, ctypes.sizeof(KVAdopt))
IOC_KV_QUERY = iowr(0x4A, ctypes.sizeof(KVQuery))
IOC_KV_PACK = iowr(0x4B, ctypes.sizeof(KVPack))
IOC_KV_RESET = iowr(0x4C, ctypes.sizeof(KVReset))
IOC_MODEL_OPEN = iowr(0x31, ctypes.sizeof(ModelOpen))
IOC_MODEL_SLOT = iowr(0x50, ctypes.sizeof(ModelSlot))
IOC_MODEL_STAGE = iowr(0x51, ctypes.sizeof(ModelStage))
IOC_MODEL_COMMIT = iowr(0x52, ctypes.sizeof(ModelWhich))
IOC_MODEL_ABORT = iowr(0x53, ctypes.sizeof(ModelWhich))
IOC_MODEL_ROLLBACK = iowr(0x54, ctypes.sizeof(ModelWhich))
IOC_MODEL_ACQUIRE = iowr(0x55, ctypes.sizeof(ModelAcquire))
IOC_MODEL_REMOVE = iowr(0x56, ctypes.sizeof(ModelRemove))
IOC_MODEL_EVICT = iowr(0x57, ctypes.sizeof(ModelEvict))
IOC_MODEL_INFO = iowr(0x60, ctypes.sizeof(ModelInfo))
IOC_RT_OPEN = iowr(0x32, ctypes.sizeof(RTOpen))
IOC_RT_INFO = iowr(0x70, ctypes.sizeof(RTInfo))
IOC_RT_RESERVE = iowr(0x71, ctypes.sizeof(RTReserve))
IOC_RT_ALLOC = iowr(0x72, ctypes.sizeof(RTAlloc))
IOC_RT_FREE = iowr(0x73, ctypes.sizeof(RTBlock))
IOC_RT_PIN = iowr(0x74, ctypes.sizeof(RTBlock))
IOC_RT_UNPIN = iowr(0x75, ctypes.sizeof(RTBlock))
IOC_RT_PRIORITY = iowr(0x76, ctypes.sizeof(RTPriority))
IOC_RT_ALLOC_BATCH = iowr(0x77, ctypes.sizeof(Batch))
IOC_RT_FREE_BATCH = iowr(0x78, ctypes.sizeof(Batch))
