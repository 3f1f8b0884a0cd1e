# SPDX-License-Identifier: MIT
"""Memory for tensors from the tensormem kernel module, as numpy arrays.

::

    import numpy as np
    import tensormem

    with tensormem.open() as client:
        weights = client.empty((4096, 4096), np.float16, kind="weights")
        print(client.query(weights))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import (
    AccessDenied,
    ArenaFull,
    BadAddress,
    Busy,
    CacheFull,
    CacheInUse,
    Closed,
    DamagedKV,
    DeadlineMissed,
    DeviceMissing,
    FileBusy,
    GenerationFailed,
    IncompatibleModule,
    Interrupted,
    InvalidArgument,
    LoadCancelled,
    ModelFileError,
    NoCodec,
    NoDmaPool,
    NoSuchBlock,
    NoSuchGeneration,
    NoSuchSequence,
    NoSuchSlot,
    NoSuchTensor,
    NotAvailable,
    NotCacheable,
    NotExportable,
    NotHeld,
    NotPermitted,
    NotReserved,
    OutOfMemory,
    PoolExhausted,
    QuotaExceeded,
    ReadFailed,
    ReservationInUse,
    RTPoolFull,
    SizeReserved,
    SlotBusy,
    SlotDenied,
    SlotExists,
    StillLoading,
    TensormemError,
    TooManyMovable,
    TooManySequences,
    TooManyTokens,
    WindowFull,
    WrongContents,
)

if TYPE_CHECKING:
    from . import gguf, kvfile, layout, netlink, safetensors, system
    from .abi import Kind, Pool
    from .arena import Arena
    from .client import Client, Spec, Stats, Tensor, TensorInfo, open
    from .dmabuf import DmaBuf
    from .kv import (
        KVCache,
        KVEvent,
        KVGroup,
        KVInfo,
        KVPacked,
        KVSequence,
        KVSequenceInfo,
    )
    from .kvfile import KVFileError
    from .model import Generation, GenerationInfo, Slot, SlotInfo, Staging, slot
    from .netlink import events
    from .realtime import RTBlock, RTBuffer, RTClient, RTInfo, rt

__version__ = "0.1.0"

__all__ = [
    "AccessDenied",
    "Arena",
    "ArenaFull",
    "BadAddress",
    "Busy",
    "CacheFull",
    "CacheInUse",
    "Client",
    "Closed",
    "DamagedKV",
    "DeadlineMissed",
    "DeviceMissing",
    "DmaBuf",
    "FileBusy",
    "Generation",
    "GenerationFailed",
    "GenerationInfo",
    "IncompatibleModule",
    "Interrupted",
    "InvalidArgument",
    "KVCache",
    "KVEvent",
    "KVFileError",
    "KVGroup",
    "KVInfo",
    "KVPacked",
    "KVSequence",
    "KVSequenceInfo",
    "Kind",
    "LoadCancelled",
    "ModelFileError",
    "NoCodec",
    "NoDmaPool",
    "NoSuchBlock",
    "NoSuchGeneration",
    "NoSuchSequence",
    "NoSuchSlot",
    "NoSuchTensor",
    "NotAvailable",
    "NotCacheable",
    "NotExportable",
    "NotHeld",
    "NotPermitted",
    "NotReserved",
    "OutOfMemory",
    "Pool",
    "PoolExhausted",
    "QuotaExceeded",
    "RTBlock",
    "RTBuffer",
    "RTClient",
    "RTInfo",
    "RTPoolFull",
    "ReadFailed",
    "ReservationInUse",
    "SizeReserved",
    "Slot",
    "SlotBusy",
    "SlotDenied",
    "SlotExists",
    "SlotInfo",
    "Spec",
    "Staging",
    "Stats",
    "StillLoading",
    "Tensor",
    "TensorInfo",
    "TensormemError",
    "TooManyMovable",
    "TooManySequences",
    "TooManyTokens",
    "WindowFull",
    "WrongContents",
    "events",
    "gguf",
    "kvfile",
    "layout",
    "netlink",
    "open",
    "rt",
    "safetensors",
    "slot",
    "system",
]


def __getattr__(name: str) -> Any:
    # numpy takes seconds to import on a slow board, and 'tensormem status' needs none
    # of it: what does is imported on first use
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in ("gguf", "kvfile", "layout", "netlink", "safetensors", "system"):
        return import_module(f".{name}", __name__)
    module = ".kv" if name.startswith("KV") else ".client"
    if name == "KVFileError":
        module = ".kvfile"
    elif name == "Arena":
        module = ".arena"
    elif name in ("Generation", "GenerationInfo", "Slot", "SlotInfo", "Staging", "slot"):
        module = ".model"
    elif name == "DmaBuf":
        module = ".dmabuf"
    elif name == "events":
        module = ".netlink"
    elif name in ("RTBlock", "RTBuffer", "RTClient", "RTInfo", "rt"):
        module = ".realtime"
    value = globals()[name] = getattr(import_module(module, __name__), name)
    return value
