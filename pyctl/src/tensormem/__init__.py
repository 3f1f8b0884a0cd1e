# SPDX-License-Identifier: MIT
"""Memory for tensors from the tensormem kernel module, as numpy arrays.

::

    import numpy as np
    import tensormem

    with tensormem.open() as client:
        weights = client.empty((4096, 4096), np.float16, kind="weights")
        print(client.query(weights))
"""

from . import errors, safetensors, system, units
from .abi import Kind, Pool
from .client import Client, Spec, Stats, Tensor, TensorInfo, open
from .errors import (
    AccessDenied,
    BadAddress,
    Busy,
    Closed,
    DeviceMissing,
    IncompatibleModule,
    Interrupted,
    InvalidArgument,
    NoSuchTensor,
    NotAvailable,
    NotPermitted,
    OutOfMemory,
    PoolExhausted,
    QuotaExceeded,
    TensormemError,
    WindowFull,
)

__version__ = "0.1.0"

__all__ = [
    "AccessDenied",
    "BadAddress",
    "Busy",
    "Client",
    "Closed",
    "DeviceMissing",
    "IncompatibleModule",
    "Interrupted",
    "InvalidArgument",
    "Kind",
    "NoSuchTensor",
    "NotAvailable",
    "NotPermitted",
    "OutOfMemory",
    "Pool",
    "PoolExhausted",
    "QuotaExceeded",
    "Spec",
    "Stats",
    "Tensor",
    "TensorInfo",
    "TensormemError",
    "WindowFull",
    "errors",
    "open",
    "safetensors",
    "system",
    "units",
]
