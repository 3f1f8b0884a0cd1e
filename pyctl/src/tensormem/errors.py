# SPDX-License-Identifier: MIT
"""Exceptions: each carries what went wrong and what to do about it.

Every errno of the tensormem ABI means one thing and has one class here. Where
Python has a built-in exception of the same meaning the class derives from it as
well, so ``except MemoryError`` catches a full pool.
"""

from __future__ import annotations

import errno as _errno

__all__ = [
    "RAISE_MEMLOCK",
    "RAISE_PRIORITY",
    "AccessDenied",
    "ArenaFull",
    "BadAddress",
    "Busy",
    "CacheFull",
    "CacheInUse",
    "Closed",
    "DamagedKV",
    "DeadlineMissed",
    "DeviceMissing",
    "FileBusy",
    "GenerationFailed",
    "IncompatibleModule",
    "Interrupted",
    "InvalidArgument",
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
    "PoolExhausted",
    "QuotaExceeded",
    "RTPoolFull",
    "ReadFailed",
    "ReservationInUse",
    "SizeReserved",
    "SlotBusy",
    "SlotDenied",
    "SlotExists",
    "StillLoading",
    "TensormemError",
    "TooManyMovable",
    "TooManySequences",
    "TooManyTokens",
    "WindowFull",
    "WrongContents",
    "from_errno",
]

#: What to do, beside asking for less, when pinned memory or an arena meets its limit.
RAISE_MEMLOCK = (
    "as root raise the limit: '* - memlock unlimited' in /etc/security/limits.conf,"
    " LimitMEMLOCK=infinity for a service"
)

#: What to do when a reservation or a priority is refused.
RAISE_PRIORITY = (
    "reservations and priorities above 0 take CAP_SYS_NICE: run as root, or give a service"
    " AmbientCapabilities=CAP_SYS_NICE"
)


class TensormemError(Exception):
    """Base of every error this package raises.

    Attributes:
        cause: what went wrong, one clause without a final full stop.
        remedy: what to do about it, one clause without a final full stop.
        errno: the errno behind it, or None where no system call was involved.
    """

    default_cause = "the operation failed"
    default_remedy = "run 'tensormem doctor'"
    default_errno: int | None = None

    def __init__(
        self, cause: str | None = None, remedy: str | None = None, errno: int | None = None
    ) -> None:
        """Make an error; what is left out is taken from the class."""
        self.cause = cause or self.default_cause
        self.remedy = remedy or self.default_remedy
        super().__init__(self.cause, self.remedy)
        self.errno = errno if errno is not None else self.default_errno

    def __str__(self) -> str:
        """One line: the cause, then the remedy."""
        return " ".join(f"{self.cause}: {self.remedy}".split())

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle with all three attributes, so errors cross process borders."""
        return type(self), (self.cause, self.remedy, self.errno)


class InvalidArgument(TensormemError, ValueError):
    """The call is malformed (EINVAL): size, kind, pool, shape or dtype."""

    default_cause = "the call is malformed"
    default_remedy = "check size, kind and pool; a tensor has 1 byte to window_size bytes"
    default_errno = _errno.EINVAL


class BadAddress(TensormemError):
    """The kernel could not read or write the arguments (EFAULT)."""

    default_cause = "the kernel could not read or write the call's arguments"
    default_remedy = "this is a bug in the caller or in the Python package; please report it"
    default_errno = _errno.EFAULT


class NoSuchTensor(TensormemError, LookupError):
    """No such tensor: never allocated, freed, or of another client (ENOENT)."""

    default_cause = "no such tensor in this client"
    default_remedy = "it was freed already, or belongs to another client; use the one it came from"
    default_errno = _errno.ENOENT


class OutOfMemory(TensormemError, MemoryError):
    """The system has no memory left, or the caller's memory cgroup (ENOMEM)."""

    default_cause = "the system or the caller's memory cgroup has no memory left for this"
    default_remedy = (
        "free tensors or stop something else that runs here; 'tensormem doctor' says whether"
        " a memory cgroup is the limit and how to raise it"
    )
    default_errno = _errno.ENOMEM


class QuotaExceeded(TensormemError, MemoryError):
    """The client's own quota is used up (EDQUOT)."""

    default_cause = "the quota of this client is used up"
    default_remedy = "free tensors, or raise the quota with client.set_quota()"
    default_errno = _errno.EDQUOT


class PoolExhausted(TensormemError, MemoryError):
    """The chunk pool is at its capacity (ENOSPC)."""

    default_cause = "the chunk pool is at its capacity"
    default_remedy = "free tensors, or as root run 'tensormem pool set chunk --capacity SIZE'"
    default_errno = _errno.ENOSPC


class NoDmaPool(TensormemError, NotImplementedError):
    """The device tree sets no region aside for the DMA pool, or its driver is unbound (ENODEV)."""

    default_cause = (
        "the device tree sets no region aside for the DMA pool, or its driver is unbound"
    )
    default_remedy = "use pool='chunk', or add the nodes that docs/dma.md shows"
    default_errno = _errno.ENODEV


class WindowFull(TensormemError, MemoryError):
    """The client's window has no gap of this size left (ENOBUFS)."""

    default_cause = "the client's window has no gap of this size left"
    default_remedy = "free tensors, or open a second client"
    default_errno = _errno.ENOBUFS


class Busy(TensormemError):
    """A new quota is below what the client already holds (EBUSY)."""

    default_cause = "the new quota is below what the client already holds"
    default_remedy = "free tensors first; client.stats().used says how much is held"
    default_errno = _errno.EBUSY


class NotPermitted(TensormemError, PermissionError):
    """The caller may not do this (EPERM)."""

    default_cause = "not permitted"
    default_remedy = (
        "a quota above clients/default_quota takes CAP_SYS_RESOURCE: run as root, or raise the"
        " default with root's 'echo BYTES > /sys/class/misc/tensormem/clients/default_quota'"
    )
    default_errno = _errno.EPERM


class Interrupted(TensormemError, InterruptedError):
    """A fatal signal ended the call (EINTR)."""

    default_cause = "a fatal signal ended the call"
    default_remedy = "nothing was changed; call again if the process goes on"
    default_errno = _errno.EINTR


class IncompatibleModule(TensormemError):
    """The device does not know this call or speaks another ABI (ENOTTY)."""

    default_cause = "the device does not know this call"
    default_remedy = "load a tensormem module that matches this package ('tensormem doctor')"
    default_errno = _errno.ENOTTY


class TooManyTokens(TensormemError, ValueError):
    """The sequence would have more tokens than max_tokens (ERANGE)."""

    default_cause = "the sequence would have more tokens than the KV cache allows for one"
    default_remedy = "truncate it, or create a KV cache with a larger max_tokens"
    default_errno = _errno.ERANGE


class NotHeld(TensormemError, LookupError):
    """The KV asked for is not there, or not any more (ENODATA)."""

    default_cause = "this KV is not there, or not any more"
    default_remedy = "compute it: run the model over these tokens"
    default_errno = _errno.ENODATA


class NoCodec(TensormemError, NotImplementedError):
    """The kernel has no codec to pack KV with (EOPNOTSUPP)."""

    default_cause = "the kernel has no codec to pack KV with"
    default_remedy = "load one: 'sudo modprobe zstd' or 'sudo modprobe lz4'"
    default_errno = _errno.EOPNOTSUPP


class NotExportable(TensormemError, NotImplementedError):
    """The tensor shares its pages with others (EOPNOTSUPP)."""

    default_cause = "the tensor is one of the slab, whose pages have others in them"
    default_remedy = "allocate it with pool='buddy', in pages of its own"
    default_errno = _errno.EOPNOTSUPP


class DamagedKV(TensormemError, OSError):
    """A packed block does not match its checksum: memory has gone bad (EIO)."""

    default_cause = "packed KV does not match its checksum: memory has gone bad"
    default_remedy = "close the sequence and compute its tokens again; test the board's memory"
    default_errno = _errno.EIO


class NoSuchSequence(TensormemError, LookupError):
    """No such sequence: closed, or of another KV cache (ENOENT)."""

    default_cause = "no such sequence in this KV cache"
    default_remedy = "it was closed already; begin another with kv.sequence()"
    default_errno = _errno.ENOENT


class CacheFull(PoolExhausted):
    """The KV cache is at its limit, or the chunk pool at its capacity (ENOSPC)."""

    default_cause = "the KV cache is at its limit and has nothing left to evict"
    default_remedy = (
        "close or truncate sequences, or create the KV cache with a larger limit; if"
        " 'tensormem status' shows the chunk pool full, raise its capacity"
    )


class TooManySequences(TensormemError, MemoryError):
    """As many sequences as the KV cache allows are open (ENOBUFS)."""

    default_cause = "as many sequences as the KV cache allows are open"
    default_remedy = (
        "close one and drop its arrays, or create the KV cache with a larger max_sequences"
    )
    default_errno = _errno.ENOBUFS


class CacheInUse(Busy):
    """Sequences hold blocks that the call would take away (EBUSY)."""

    default_cause = "sequences of this KV cache hold blocks"
    default_remedy = "close them and drop their arrays first; kv.info().sequences counts them"


class SlotDenied(TensormemError, PermissionError):
    """The model slot's mode does not let this user, or it was not opened for it (EACCES)."""

    default_cause = "this user may not do that to the model slot, or it was not opened for it"
    default_remedy = (
        "open it with write=True to change it; its owner lets others with"
        " os.fchmod(slot.fileno(), MODE)"
    )
    default_errno = _errno.EACCES


class SlotExists(TensormemError, FileExistsError):
    """There is a model slot of this name (EEXIST)."""

    default_cause = "there is a model slot of this name already"
    default_remedy = "use it, choose another name, or take it away with 'tensormem model remove'"
    default_errno = _errno.EEXIST


class StillLoading(TensormemError, BlockingIOError):
    """The generation is being loaded still (EAGAIN)."""

    default_cause = "the generation is being loaded still"
    default_remedy = "wait for it with staging.wait()"
    default_errno = _errno.EAGAIN


class GenerationFailed(TensormemError, OSError):
    """The generation cannot be used (ESTALE)."""

    default_cause = "the generation cannot be used: loading failed, or its file was changed"
    default_remedy = (
        "acquire the active one again; generation.info().error says why this one failed"
    )
    default_errno = _errno.ESTALE


class WrongContents(TensormemError, ValueError):
    """The file is shorter than was promised, or has another SHA-256 (EBADMSG)."""

    default_cause = "the file is shorter than was promised, or its SHA-256 is another"
    default_remedy = "get a whole copy of it, and check the SHA-256 you gave"
    default_errno = _errno.EBADMSG


class FileBusy(TensormemError, OSError):
    """The file is open for writing: no cached or evictable generation can have that (ETXTBSY)."""

    default_cause = (
        "the file is, or was, open for writing; a cached or evictable generation cannot have that"
    )
    default_remedy = "close it there; put a new model beside the old one and rename it"
    default_errno = _errno.ETXTBSY


class LoadCancelled(TensormemError):
    """The load was given up (ECANCELED)."""

    default_cause = "the load was given up, because whoever staged it aborted or went away"
    default_remedy = "stage it again and keep the staging open until it is loaded"
    default_errno = _errno.ECANCELED


class NoSuchSlot(TensormemError, LookupError):
    """There is no model slot of this name, or it was removed (ENOENT)."""

    default_cause = "there is no such model slot"
    default_remedy = (
        "'tensormem model list' has those there are; 'tensormem model create' makes one"
    )
    default_errno = _errno.ENOENT


class NoSuchGeneration(TensormemError, LookupError):
    """The model slot does not have this generation, or has it no more (ENOENT)."""

    default_cause = "the model slot does not have this generation"
    default_remedy = "slot.info() has those it has; it may have been committed, aborted or let go"
    default_errno = _errno.ENOENT


class SlotBusy(Busy):
    """Another generation is staged (EBUSY)."""

    default_cause = "another generation is staged in this model slot"
    default_remedy = "commit or abort that one first"


class NotCacheable(TensormemError, NotImplementedError):
    """The file system cannot say when a file changes (EOPNOTSUPP)."""

    default_cause = "this file's file system cannot say when it changes, so it cannot stay there"
    default_remedy = "load it whole, without cached=True or evictable=True"
    default_errno = _errno.EOPNOTSUPP


class ReadFailed(TensormemError, OSError):
    """The file cannot be read (EIO)."""

    default_cause = "the file cannot be read"
    default_remedy = "look at 'dmesg': the disk or card may be failing; get another copy"
    default_errno = _errno.EIO


class ModelFileError(TensormemError, ValueError):
    """A model's file is damaged, or of no known format.

    Attributes:
        path: the file.
        tensor: the tensor whose entry is wrong, or None.
        field: the part that is wrong.
    """

    default_remedy = "fetch or write the file again; GGUF and safetensors are known"

    def __init__(self, path: str, tensor: str | None, field: str, what: str) -> None:
        """Describe the fault: where it is and what was found."""
        self.path, self.tensor, self.field, self.what = path, tensor, field, what
        name = None if tensor is None else repr(tensor)
        if name is not None and len(name) > 80:
            name = name[:77] + "..."
        where = f"{path}: " + (f"tensor {name}: " if name is not None else "")
        super().__init__(f"{where}{field}: {what}")

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle by what it was made from."""
        return type(self), (self.path, self.tensor, self.field, self.what)


class DeadlineMissed(TensormemError, TimeoutError):
    """No memory was to be had by the deadline (ETIMEDOUT)."""

    default_cause = "the arena had no room for this by the deadline"
    default_remedy = "reserve it with rt.reserve(), free blocks, or allow for more time"
    default_errno = _errno.ETIMEDOUT


class NoSuchBlock(TensormemError, LookupError):
    """No such block: never allocated, freed, or of another RT client (ENOENT)."""

    default_cause = "this RT client has no such block"
    default_remedy = "it was freed already, or belongs to another RT client; free it there"
    default_errno = _errno.ENOENT


class ArenaFull(PoolExhausted):
    """The arena has no room for this now (ENOSPC)."""

    default_cause = "the arena has no room for this now"
    default_remedy = (
        "reserve it with rt.reserve(), free blocks, give a deadline to wait for somebody who"
        " does, or make a larger arena"
    )


class RTPoolFull(PoolExhausted):
    """The RT pool has no room for an arena of this size (ENOSPC)."""

    default_cause = "the RT pool has no room for an arena of this size"
    default_remedy = (
        "ask for less, close other arenas ('tensormem rt list'), or as root run"
        " 'tensormem rt size SIZE'"
    )


class TooManyMovable(TensormemError, MemoryError):
    """The arena has as many movable blocks as it was made for (ENFILE)."""

    default_cause = "the arena has as many movable blocks as it was made for"
    default_remedy = "free some, or make the arena with a larger movable"
    default_errno = _errno.ENFILE


class SizeReserved(TensormemError, ValueError):
    """Blocks of this size are reserved already (EEXIST)."""

    default_cause = "blocks of this size are reserved already"
    default_remedy = "give them up with rt.unreserve(), then reserve as many as it takes"
    default_errno = _errno.EEXIST


class NotReserved(TensormemError, LookupError):
    """No blocks of this size are reserved (ENOENT)."""

    default_cause = "no blocks of this size are reserved"
    default_remedy = "pass a size that was given to rt.reserve()"
    default_errno = _errno.ENOENT


class ReservationInUse(Busy):
    """Blocks of the reservation are allocated (EBUSY)."""

    default_cause = "blocks of this reservation are allocated"
    default_remedy = "free them first"


class Closed(TensormemError, ValueError):
    """The client was closed before."""

    default_cause = "this client is closed"
    default_remedy = "call tensormem.open() again"


class NotAvailable(TensormemError):
    """There is no usable tensormem device on this machine."""

    default_cause = "tensormem is not available"
    default_remedy = "run 'tensormem doctor' for the exact fix"


class DeviceMissing(NotAvailable, FileNotFoundError):
    """The device node is missing: the module is not loaded."""

    default_cause = "/dev/tensormem does not exist, so the module is not loaded"
    default_remedy = "load it with 'sudo modprobe tensormem'; 'tensormem doctor' says more"
    default_errno = _errno.ENOENT


class AccessDenied(NotAvailable, PermissionError):
    """The device node exists and this user may not open it."""

    default_cause = "this user may not open the device"
    default_remedy = "run 'sudo usermod -aG tensormem $USER' and log in again"
    default_errno = _errno.EACCES


_BY_ERRNO: dict[int, type[TensormemError]] = {
    cls.default_errno: cls
    for cls in (
        InvalidArgument,
        BadAddress,
        NoSuchTensor,
        OutOfMemory,
        QuotaExceeded,
        PoolExhausted,
        WindowFull,
        Busy,
        NotPermitted,
        Interrupted,
        IncompatibleModule,
        TooManyTokens,
        NotHeld,
        NoCodec,
        DamagedKV,
        SlotDenied,
        SlotExists,
        StillLoading,
        GenerationFailed,
        WrongContents,
        FileBusy,
        LoadCancelled,
        DeadlineMissed,
    )
    if cls.default_errno is not None
}

#: What the calls of a KV cache mean by an errno, where it is not the same.
_KV_BY_ERRNO: dict[int, type[TensormemError]] = _BY_ERRNO | {
    cls.default_errno: cls
    for cls in (NoSuchSequence, CacheFull, TooManySequences, CacheInUse)
    if cls.default_errno is not None
}

#: Likewise the calls of a model slot and its generations.
_MODEL_BY_ERRNO: dict[int, type[TensormemError]] = _BY_ERRNO | {
    cls.default_errno: cls
    for cls in (NoSuchGeneration, SlotBusy, NotCacheable, ReadFailed)
    if cls.default_errno is not None
}

#: Likewise those of an RT client.
_RT_BY_ERRNO: dict[int, type[TensormemError]] = _BY_ERRNO | {
    cls.default_errno: cls
    for cls in (NoSuchBlock, ArenaFull, TooManyMovable, SizeReserved, ReservationInUse)
    if cls.default_errno is not None
}


def from_errno(
    number: int,
    cause: str | None = None,
    remedy: str | None = None,
    *,
    kv: bool = False,
    model: bool = False,
    rt: bool = False,
) -> TensormemError:
    """Return (not raise) the exception that stands for an errno of the ABI.

    Args:
        number: the errno, for example ``errno.EDQUOT``.
        cause: more exact words than the class has, or None.
        remedy: likewise.
        kv: a call on a KV cache's descriptor gave it.
        model: likewise that of a model slot or a generation.
        rt: likewise that of an RT client.

    Returns:
        An instance of the class for that errno; a plain TensormemError that
        names the errno where the ABI does not define it.
    """
    table = _BY_ERRNO
    for of, meaning in ((kv, _KV_BY_ERRNO), (model, _MODEL_BY_ERRNO), (rt, _RT_BY_ERRNO)):
        table = meaning if of else table
    cls = table.get(number)
    if cls is not None:
        return cls(cause, remedy, number)
    name = _errno.errorcode.get(number, str(number))
    return TensormemError(
        f"{cause + ': ' if cause else ''}unexpected error {name}",
        remedy or "look at 'dmesg' and report it",
        number,
    )
