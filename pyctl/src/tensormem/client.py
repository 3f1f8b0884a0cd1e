# SPDX-License-Identifier: MIT
"""Clients, tensors and numpy arrays on kernel memory.

Who keeps what alive
--------------------

An array from :meth:`Client.empty` (and every view, slice or memoryview of it)
holds on to an *export*, the export to its *block* (one tensor of the kernel) and
to the mapping. When the last view goes, the block is released to the kernel.
Nothing releases memory that something can still see, so no sequence of calls can
turn an array into a SIGBUS:

* ``client.free(array)`` says that you are done with the tensor. The array and its
  views stay valid; the memory goes back when the last of them is gone.
* ``client.close()`` refuses further calls. Descriptor and mapping close when the
  last array is gone.
* A child of ``fork()`` sees the arrays as shared memory for as long as the parent
  keeps them. It never frees what its parent allocated.

* A client that is dropped without close() ends when its last array and Tensor do.

The books behind that are in :mod:`tensormem.session`.
"""

from __future__ import annotations

import contextlib
import errno
import math
import operator
import os
import resource
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeVar, cast

import numpy as np
import numpy.typing as npt

from . import abi, errors, kv
from .abi import AllocFlag, Kind, Mapping, Numa, Pool
from .arena import Arena
from .bandwidth import ANY, Bandwidth
from .closing import Closing
from .device import DEFAULT_PATH, Device, KernelDevice
from .dmabuf import DmaBuf
from .form import Shape, array_form
from .kv import KVCache, KVGroup
from .model import Slot, open_slot
from .realtime import RTClient, Size, open_rt
from .session import BatchError, Event, Export, Held, Session, address
from .units import format_size, parse_size

if TYPE_CHECKING:
    from .layout import Layout

__all__ = ["Client", "Nodes", "Spec", "Stats", "Tensor", "TensorInfo", "open"]

#: Which memory nodes serve a tensor: None (what :meth:`Client.set_numa` said),
#: ``"local"``, ``"interleave"``, ``[0, 1]`` (these and no other) or
#: ``("interleave", [0, 1])``.
Nodes = str | Sequence[SupportsIndex] | tuple[str, Sequence[SupportsIndex]] | None

_E = TypeVar("_E", Kind, Pool, Mapping)
_U64 = (1 << 64) - 1


@dataclass(frozen=True)
class Spec:
    """One array of a batch; see :meth:`Client.empty` for the fields."""

    shape: Shape
    dtype: npt.DTypeLike = np.float32
    kind: str | Kind = "activations"
    pool: str | Pool = "auto"
    huge: bool | None = None
    reuse: bool = False
    pinned: bool = False
    numa: Nodes = None


@dataclass(frozen=True)
class Stats:
    """What a client holds and may hold.

    Attributes:
        abi_version: the ABI the module was built with.
        page_size: bytes in a page.
        chunk_size: bytes in a chunk.
        window_size: bytes in the client's window.
        quota: bytes the client may hold.
        used: bytes the client holds, in whole pages or chunks.
        kept: bytes of ``used`` that no tensor has: kept for ``reuse``, or freed and
            still held by somebody else (O_DIRECT in flight).
        tensors: tensors the client holds.
        max_batch: most items in one batch call to the kernel.
        cache_line: bytes that two CPUs should not share.
        nodes: the memory nodes that have a pool.
        lingering: tensors that were freed by :meth:`Client.free` and are held
            because arrays still show them.
        whole_window: True if one mapping shows the whole window, False if every
            tensor is mapped by itself.
    """

    abi_version: int
    page_size: int
    chunk_size: int
    window_size: int
    quota: int
    used: int
    kept: int
    tensors: int
    max_batch: int
    cache_line: int
    nodes: tuple[int, ...]
    lingering: int
    whole_window: bool


@dataclass(frozen=True)
class TensorInfo:
    """What the kernel says about one tensor.

    Attributes:
        handle: its name, never 0.
        kind: ``weights``, ``kv``, ``activations`` or ``protocol``.
        pool: the pool that serves it: ``chunk``, ``buddy``, ``slab`` or ``dma``.
        size: bytes asked for.
        length: bytes it takes in the window.
        offset: where it lies in the window, in bytes; a multiple of the page size
            unless the pool is ``slab``.
        held: bytes of memory it holds. A slab is charged as a whole, not by tensor.
        chunks: whole chunks it is made of.
        runs: runs of pages it is made of, beside the chunks.
        mapping: how its chunks are mapped: ``block`` (2 MiB at a time), ``cont``
            (by pages, which the CPU folds) or ``pages``. Runs always are ``pages``.
        huge: what it was allocated with; likewise the two that follow.
        reuse: see :meth:`Client.empty`.
        pinned: see :meth:`Client.empty`.
    """

    handle: int
    kind: str
    pool: str
    size: int
    length: int
    offset: int
    held: int
    chunks: int
    runs: int
    mapping: str
    huge: bool | None
    reuse: bool
    pinned: bool


class _Block(Held):
    """One tensor of the kernel."""

    __slots__ = ("address", "kind", "offset", "size")
    session: _Session

    def __init__(self, session: _Session, item: abi.Alloc) -> None:
        super().__init__(session, int(item.handle))
        self.offset = int(item.offset)
        self.size = int(item.size)
        self.kind = int(item.kind)
        self.address = 0


class _Session(Session):
    """Descriptor, mapping and books of one client."""

    def __init__(self, device: Device, whole_window: bool) -> None:
        super().__init__(device)
        self.info = abi.Info()
        self.call(abi.IOC_INFO, self.info)
        if self.info.abi_version != abi.ABI_VERSION:
            raise errors.IncompatibleModule(
                f"the module speaks ABI {self.info.abi_version},"
                f" this package speaks {abi.ABI_VERSION}",
                "install the package and the module of one release",
            )
        if whole_window:
            self.map_window(self.info.window_size)

    @contextlib.contextmanager
    def opener(self) -> Iterator[Device]:
        """Give the device to open something else with."""
        if self.orphaned:
            raise self.no_longer()
        with self.calling():
            yield self.device

    # -- allocate ------------------------------------------------------------

    def allocate(self, items: Sequence[abi.Alloc]) -> list[_Block]:
        """Allocate all items or none; each block has a name until it is released."""
        with self.calling():
            blocks: list[_Block] = []
            try:
                step = self.info.max_batch
                for begin in range(0, len(items), step):
                    blocks += self._allocate(items[begin : begin + step], begin)
                for block in blocks:
                    self._map(block)
            except BaseException:
                self.give_back(blocks)
                raise
            with self.locked():
                for block in blocks:
                    self.live[block.handle] = block
            return blocks

    def _allocate(self, items: Sequence[abi.Alloc], first: int) -> list[_Block]:
        array = (abi.Alloc * len(items))(*items)
        try:
            if len(items) == 1:
                self.device.ioctl(abi.IOC_ALLOC, array[0])
            else:
                self.batch(abi.IOC_ALLOC_BATCH, array)
        except BatchError as error:
            item = array[min(error.index, len(items) - 1)]
            raise self._refusal(error.errno, item, first + error.index) from None
        except OSError as error:
            raise self._refusal(error.errno or 0, array[0], None) from None
        return [_Block(self, item) for item in array]

    def _refusal(self, number: int, item: abi.Alloc, index: int | None) -> errors.TensormemError:
        """Say which request failed and, for a quota, by how much."""
        what = f"{format_size(item.size)} of {_name(Kind, item.kind)}"
        if index is not None:
            what = f"item {index}, {what}"
        remedy = None
        short = {
            errno.ENOMEM: "the system has no memory left, or the memory cgroup is at its limit",
            errno.ENOSPC: "the chunk pool is at its capacity",
            errno.ENOBUFS: "the client's window has no gap of this size left",
            errno.EINVAL: "the kernel refuses it as malformed",
            errno.EINTR: "a fatal signal ended the call",
        }.get(number)
        if number == errno.EPERM:
            limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
            short = f"this user's pinned memory would exceed RLIMIT_MEMLOCK, {format_size(limit)}"
            remedy = f"free pinned tensors or do without pinned=True, or {errors.RAISE_MEMLOCK}"
        if number == errno.ENOSPC and item.numa == Numa.BIND:
            short = f"the chunk pool is at its capacity on {_node_list(item.nodes)}"
            remedy = "allow more nodes, free tensors, or see 'tensormem numa'"
        if number == errno.ENOSPC and item.pool == Pool.DMA:
            short = "the DMA pool's region has no such gap"
            remedy = "free tensors of it, or set aside more in the device tree"
        if number == errno.EINVAL:
            short, remedy = self.malformed(item) or (short, None)
        if number == errno.EDQUOT:
            short = "the client's quota is used up"
            with contextlib.suppress(errors.TensormemError):
                info = self.call(abi.IOC_INFO, abi.Info())
                short = (
                    f"the client holds {format_size(info.used)} of its quota of"
                    f" {format_size(info.quota)}"
                )
        if number == errno.ENODEV and item.pool == Pool.DMA:
            return errors.NoDmaPool(
                f"cannot allocate {what}, {errors.NoDmaPool.default_cause}", remedy, number
            )
        return errors.from_errno(
            number, f"cannot allocate {what}" + (f", {short}" if short else ""), remedy
        )

    def malformed(self, item: abi.Alloc | abi.SetNuma) -> tuple[str, str] | None:
        """Return cause and remedy where the kernel's EINVAL has a reason we can name."""
        absent = item.nodes & ~self.info.nodes
        if absent:
            return f"there is no pool on {_node_list(absent)}", f"use {_node_list(self.info.nodes)}"
        if isinstance(item, abi.Alloc) and item.pool == Pool.SLAB:
            return (
                "the slab takes tensors below a page, not pinned, without numa of their own",
                "leave the pool to 'auto'",
            )
        if isinstance(item, abi.Alloc) and item.pool == Pool.DMA and item.numa:
            return "the DMA pool's region is where it is", "leave numa out"
        return None

    def _map(self, block: _Block) -> None:
        if self.window is not None:
            block.mapping = self.window
            block.address = self.base + block.offset
            return
        page = self.info.page_size
        # a tensor of the slab begins anywhere in a page, and may end in the next
        before = block.offset % page
        length = -(-(before + block.size) // page) * page
        try:
            block.mapping = self.device.map(block.offset - before, length)
        except (OSError, OverflowError) as error:
            raise errors.OutOfMemory(
                f"cannot map {format_size(length)} ({error})",
                "free arrays, or raise the limit on address space (ulimit -v)",
            ) from None
        block.address = address(block.mapping) + before

    def export(self, block: _Block) -> npt.NDArray[np.uint8]:
        """Return the bytes of a block as an array whose base keeps it."""
        with self.locked():
            if not block.alive:
                raise errors.NoSuchTensor(f"tensor {block.handle} was freed")
            block.exports += 1
        return np.asarray(Export(block, block.address, block.size))

    # -- release -------------------------------------------------------------

    def give_back(self, blocks: Sequence[Held]) -> None:
        """Free tensors, with one call for many."""
        pid = os.getpid()
        mine = [block for block in blocks if block.pid == pid]
        for block in blocks:
            block.mapping = None
        step = self.info.max_batch
        for begin in range(0, len(mine), step):
            part = mine[begin : begin + step]
            if len(part) == 1:
                self.call(abi.IOC_FREE, abi.Free(handle=part[0].handle))
                continue
            try:
                self.batch(
                    abi.IOC_FREE_BATCH,
                    (abi.Free * len(part))(*(abi.Free(handle=b.handle) for b in part)),
                )
            except BatchError as error:
                raise errors.from_errno(error.errno, f"cannot free item {error.index}") from None


def _name(enum: type[_E], value: int) -> str:
    try:
        return enum(value).name.lower()
    except ValueError:
        return str(value)


def _value(enum: type[_E], value: str | _E, what: str) -> _E:
    if isinstance(value, enum):
        return value
    try:
        return enum[cast(str, value).upper()]
    except (KeyError, AttributeError):
        known = ", ".join(member.name.lower() for member in enum)
        raise errors.InvalidArgument(f"{value!r} is not a {what}", f"use one of {known}") from None


def _node_numbers(mask: int) -> tuple[int, ...]:
    return tuple(n for n in range(64) if mask >> n & 1)


def _node_list(mask: int) -> str:
    numbers = _node_numbers(mask)
    return f"node{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def _node_mask(nodes: Sequence[SupportsIndex]) -> int:
    mask = 0
    try:
        for node in nodes:
            mask |= 1 << operator.index(node)
    except (TypeError, ValueError):
        mask = 0
    if not 0 < mask <= _U64:
        raise errors.InvalidArgument(
            f"{nodes!r} is not a list of memory nodes", "pass numbers from 0 to 63"
        )
    return mask


def _numa(value: Nodes) -> tuple[Numa, int]:
    """Return policy and mask."""
    if value is None:
        return Numa.DEFAULT, 0
    if isinstance(value, str):
        if value in ("local", "interleave"):
            return Numa[value.upper()], 0
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        if len(value) == 2 and value[0] == "interleave" and isinstance(value[1], Sequence):
            return Numa.INTERLEAVE, _node_mask(cast(Sequence[SupportsIndex], value[1]))
        return Numa.BIND, _node_mask(cast(Sequence[SupportsIndex], value))
    raise errors.InvalidArgument(
        f"numa {value!r} is not a policy",
        "use 'local', 'interleave', a list of nodes or ('interleave', [nodes])",
    )


def _flags(huge: bool | None, reuse: bool, pinned: bool) -> AllocFlag:
    flags = AllocFlag(0)
    if huge is not None:
        flags |= AllocFlag.HUGE if huge else AllocFlag.PAGED
    if reuse:
        flags |= AllocFlag.NOZERO
    if pinned:
        flags |= AllocFlag.PINNED
    return flags


def _item(
    size: int,
    kind: str | Kind,
    pool: str | Pool,
    huge: bool | None,
    reuse: bool,
    pinned: bool,
    numa: Nodes,
) -> abi.Alloc:
    policy, nodes = _numa(numa)
    return abi.Alloc(
        size=size,
        kind=_value(Kind, kind, "kind"),
        pool=_value(Pool, pool, "pool"),
        flags=_flags(huge, reuse, pinned),
        numa=policy,
        nodes=nodes,
    )


def _size(value: SupportsIndex) -> int:
    try:
        size = operator.index(value)
    except TypeError:
        raise errors.InvalidArgument(f"a size of {value!r} is not an integer") from None
    if not 0 < size <= _U64:
        raise errors.InvalidArgument(
            f"a tensor of {size} bytes is not possible", "ask for 1 byte to window_size bytes"
        )
    return size


def _request(spec: Spec) -> tuple[abi.Alloc, tuple[int, ...], np.dtype[Any]]:
    shape, dtype = array_form(spec.shape, spec.dtype)
    # an array without elements still is an array: it gets the smallest tensor
    size = _size(max(1, math.prod(shape) * dtype.itemsize))
    item = _item(size, spec.kind, spec.pool, spec.huge, spec.reuse, spec.pinned, spec.numa)
    return item, shape, dtype


def _form(
    data: npt.NDArray[np.uint8], shape: tuple[int, ...], dtype: np.dtype[Any]
) -> npt.NDArray[Any]:
    count = math.prod(shape) * dtype.itemsize
    return data[:count].view(dtype).reshape(shape)


def _info(item: abi.Query) -> TensorInfo:
    flags = AllocFlag(item.alloc_flags)
    huge = True if AllocFlag.HUGE in flags else False if AllocFlag.PAGED in flags else None
    return TensorInfo(
        handle=item.handle,
        kind=_name(Kind, item.kind),
        pool=_name(Pool, item.pool),
        size=item.size,
        length=item.length,
        offset=item.offset,
        held=item.held,
        chunks=item.nr_chunks,
        runs=item.nr_runs,
        mapping=_name(Mapping, item.mapping),
        huge=huge,
        reuse=AllocFlag.NOZERO in flags,
        pinned=AllocFlag.PINNED in flags,
    )


class Tensor:
    """One allocation, by handle: the low-level counterpart of an array.

    Get one from :meth:`Client.alloc`. Used as a context manager it is freed at
    the end of the block. A tensor that is dropped frees itself, as arrays do.
    """

    def __init__(self, block: _Block) -> None:
        """Not for users; see :meth:`Client.alloc`."""
        self._block = block

    @property
    def handle(self) -> int:
        """The tensor's name in its client, never 0."""
        return self._block.handle

    @property
    def offset(self) -> int:
        """Where it lies in the client's window, in bytes."""
        return self._block.offset

    @property
    def size(self) -> int:
        """Bytes asked for."""
        return self._block.size

    @property
    def kind(self) -> str:
        """What it is for, as given to :meth:`Client.alloc`."""
        return _name(Kind, self._block.kind)

    @property
    def freed(self) -> bool:
        """True once :meth:`free` was called or the client was closed."""
        return not self._block.named

    def buffer(self) -> memoryview:
        """Return the memory, writable, format ``B``, ``size`` bytes long.

        Good for ``file.readinto(...)``. O_DIRECT wants it aligned: a tensor of a
        page or more begins on a page, a smaller one does with ``pool="buddy"``. It
        keeps the memory alive.

        Raises:
            NoSuchTensor: the tensor was freed.
        """
        return self._bytes().data

    def array(self, shape: Shape, dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
        """Return the memory as an array; its bytes begin at the tensor's first.

        Raises:
            NoSuchTensor: the tensor was freed.
            InvalidArgument: it has fewer bytes than shape and dtype take.
        """
        request, dims, kind = _request(Spec(shape, dtype))
        if request.size > self.size:
            raise errors.InvalidArgument(
                f"an array of {request.size} bytes does not fit into a tensor of {self.size}",
                "allocate a larger tensor",
            )
        return _form(self._bytes(), dims, kind)

    def _bytes(self) -> npt.NDArray[np.uint8]:
        if not self._block.named:
            raise errors.NoSuchTensor(f"tensor {self.handle} was freed")
        return self._block.session.export(self._block)

    def info(self) -> TensorInfo:
        """Ask the kernel about it.

        Raises:
            NoSuchTensor: the tensor was freed.
            Closed: the client was closed.
        """
        return _query(self._block.session, self._block)

    def layout(self) -> Layout:
        """Look at how it is mapped: frames, sizes and flags, from the page tables; needs root.

        What was never touched is not mapped.

        Raises:
            NoSuchTensor: the tensor was freed.
            NotAvailable: debugfs is not mounted.
            NotPermitted: the caller is not root.
        """
        from . import layout

        memory = self._bytes()
        page, where = self._block.session.info.page_size, memory.ctypes.data
        found = layout.walk(where, self.size)
        return layout.lay_out(found, where, self.size, page)

    def export(self, *, read_only: bool = False) -> DmaBuf:
        """Share the memory as a dma-buf, for devices and for other processes.

        The tensor can be freed and the client closed: the memory stays until the last
        descriptor, mapping and device that has the dma-buf is gone, on the client's bill.
        It does not move meanwhile, and counts against RLIMIT_MEMLOCK.

        Args:
            read_only: who gets the descriptor can only read, and so can its devices.

        Raises:
            NoSuchTensor: the tensor was freed.
            NotExportable: it is one of the slab.
            NotPermitted: beyond RLIMIT_MEMLOCK.
            NotAvailable: the process has no descriptor left.
            Closed: the client was closed.
        """
        session, block = self._block.session, self._block
        if not block.named:
            raise errors.NoSuchTensor(f"tensor {block.handle} was freed")
        flags = abi.ExportFlag.READ_ONLY if read_only else 0
        with session.calling():
            item = abi.Export(handle=block.handle, flags=flags, fd=-1)
            try:
                session.device.ioctl(abi.IOC_EXPORT, item)
            except OSError as error:
                raise _not_exported(error.errno or 0, block) from None
            return DmaBuf(session.device.other(item.fd), item.size, read_only=read_only)

    def free(self) -> None:
        """Free it: at once, or when the last buffer or array of it is gone.

        Raises:
            NoSuchTensor: it was freed before.
            NotPermitted: it was allocated before a fork, by the parent.
        """
        _claim([self._block])
        self._block.session.release([self._block])

    def __enter__(self) -> Tensor:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Free it unless that was done before."""
        if not self._block.freed and not self.freed:
            self.free()

    def __del__(self) -> None:
        if self._block.named:
            self._block.session.post(Event.NAME_GONE, self._block)

    def __repr__(self) -> str:
        """Name handle, size and kind."""
        state = ", freed" if self.freed else ""
        return f"<Tensor {self.handle}: {format_size(self.size)} of {self.kind}{state}>"


def _not_exported(number: int, block: _Block) -> errors.TensormemError:
    """Say why a tensor is not to be shared."""
    if number == errno.EOPNOTSUPP:
        return errors.NotExportable()
    if number == errno.EPERM:
        limit = format_size(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0])
        return errors.NotPermitted(
            f"exporting {format_size(block.size)} would exceed RLIMIT_MEMLOCK, {limit}",
            f"close other dma-bufs, or {errors.RAISE_MEMLOCK}",
        )
    if number in (errno.EMFILE, errno.ENFILE):
        return errors.NotAvailable(
            f"there is no descriptor left for tensor {block.handle} ({os.strerror(number)})",
            "close some, or raise the limit on open files (ulimit -n)",
        )
    return errors.from_errno(number, f"cannot export tensor {block.handle}")


def _claim(blocks: Sequence[_Block]) -> None:
    """Mark blocks as freed by the user: all of them or, with an error, none."""
    seen: set[int] = set()
    for block in blocks:
        if block.freed or block.handle in seen or not block.alive:
            raise errors.NoSuchTensor(
                f"tensor {block.handle} was freed before", "free each tensor once"
            )
        if block.pid != os.getpid():
            raise errors.NotPermitted(
                f"tensor {block.handle} belongs to the parent process",
                "free it there; a child's views of it simply end",
            )
        seen.add(block.handle)
    for block in blocks:
        block.freed = True


def _query(session: _Session, block: _Block) -> TensorInfo:
    if block.freed:
        raise errors.NoSuchTensor(f"tensor {block.handle} was freed")
    with session.calling():
        return _info(session.call(abi.IOC_QUERY, abi.Query(handle=block.handle)))


class Client(Closing):
    """One open of the device: a tenant with tensors, a window and a quota.

    Use it as a context manager. All methods may be called from any thread.
    """

    def __init__(self, device: Device, *, whole_window: bool = True) -> None:
        """Make a client on an open device; :func:`open` is the usual way.

        Args:
            device: what makes the system calls. The client closes it.
            whole_window: map the window once if the address space has room for
                it. Without that every tensor is mapped by itself.

        Raises:
            IncompatibleModule: the module speaks another ABI.
            TensormemError: the module refused.
        """
        try:
            self._session = _Session(device, whole_window)
        except BaseException:
            device.close()
            raise

    @property
    def device(self) -> Device:
        """What makes the system calls, for calls that this class does not have."""
        return self._session.device

    @property
    def page_size(self) -> int:
        """Bytes in a page."""
        return int(self._session.info.page_size)

    @property
    def chunk_size(self) -> int:
        """Bytes in a chunk."""
        return int(self._session.info.chunk_size)

    @property
    def window_size(self) -> int:
        """Bytes in the client's window, the limit of one tensor."""
        return int(self._session.info.window_size)

    @property
    def cache_line(self) -> int:
        """Bytes that two CPUs should not share."""
        return int(self._session.info.cache_line)

    @property
    def closed(self) -> bool:
        """True once :meth:`close` was called."""
        return self._session.closed

    def fileno(self) -> int:
        """Return the descriptor; -1 once it is closed."""
        return self._session.device.fileno()

    # -- arrays --------------------------------------------------------------

    def empty(
        self,
        shape: Shape,
        dtype: npt.DTypeLike = np.float32,
        kind: str | Kind = "activations",
        pool: str | Pool = "auto",
        *,
        huge: bool | None = None,
        reuse: bool = False,
        pinned: bool = False,
        numa: Nodes = None,
    ) -> npt.NDArray[Any]:
        """Return a new array on tensor memory, in C order, zero unless ``reuse`` is set.

        The array and its views keep the memory; when the last is gone it is released.
        docs/pools.md says when which choice pays.

        Args:
            shape: a size or a sequence of sizes.
            dtype: any numpy dtype without objects.
            kind: ``weights``, ``kv``, ``activations`` or ``protocol``.
            pool: ``auto`` (by kind and size), ``chunk``, ``buddy``, ``slab`` for
                what is smaller than a page, or ``dma`` for one piece out of the region
                that the device tree sets aside.
            huge: map whole chunks as blocks of 2 MiB (True), page by page (False), or
                as the kind has it (None: weights as blocks). ``query(array).mapping``
                says what came of it.
            reuse: the array may have the contents of an earlier ``reuse`` array of
                this client in place of zeros: undefined, but never anybody else's.
                When it is released its memory is kept for the next one of the same
                kind and size and the same choices, which then costs no zeroing, no
                unmapping and no page fault; ``stats().kept`` counts it.
            pinned: the memory never moves. It counts against RLIMIT_MEMLOCK.
            numa: which memory nodes serve it: ``"local"`` (this CPU's, else the
                nearest), ``"interleave"`` (all in turn), ``[0, 1]`` (these and no
                other), ``("interleave", [0, 1])``; None is what :meth:`set_numa` said.

        Raises:
            InvalidArgument: an argument is not one of those above, or the array
                is larger than the window.
            QuotaExceeded, PoolExhausted, OutOfMemory, WindowFull: there is no
                room; all are MemoryErrors. Nothing has changed.
            NotPermitted: ``pinned`` beyond RLIMIT_MEMLOCK.
            NoDmaPool: the device tree sets no region aside, or its driver is unbound.
            Closed: the client was closed.
        """
        return self.empty_many([Spec(shape, dtype, kind, pool, huge, reuse, pinned, numa)])[0]

    def zeros(
        self,
        shape: Shape,
        dtype: npt.DTypeLike = np.float32,
        kind: str | Kind = "activations",
        pool: str | Pool = "auto",
        *,
        huge: bool | None = None,
        reuse: bool = False,
        pinned: bool = False,
        numa: Nodes = None,
    ) -> npt.NDArray[Any]:
        """Return a new array of zeros.

        The same as :meth:`empty`, except that with ``reuse`` it is cleared here.
        """
        array = self.empty(
            shape, dtype, kind, pool, huge=huge, reuse=reuse, pinned=pinned, numa=numa
        )
        if reuse:
            array.reshape(-1).view(np.uint8)[...] = 0
        return array

    def empty_many(self, specs: Sequence[Spec]) -> list[npt.NDArray[Any]]:
        """Return new arrays, all or none, with one call to the kernel.

        Args:
            specs: what :meth:`empty` takes, one :class:`Spec` for each array. More
                than ``stats().max_batch`` of them take several calls.

        Raises:
            The errors of :meth:`empty`; the message names the item.
        """
        requests = [_request(spec) for spec in specs]
        blocks = self._session.allocate([item for item, _, _ in requests])
        try:
            return [
                _form(self._session.export(block), shape, dtype)
                for block, (_, shape, dtype) in zip(blocks, requests, strict=True)
            ]
        finally:
            # from here on the exports alone keep them
            self._session.release(blocks)

    def free(self, item: npt.NDArray[Any] | memoryview | Tensor) -> None:
        """Say that you are done with a tensor.

        As everywhere in numpy, an array that exists can be used: its memory is
        released when the last view is gone, often right when the caller drops
        the variable, and never earlier. A :class:`Tensor` that nothing shows is
        released at once. ``stats().lingering`` counts what is freed and shown.

        Args:
            item: an array of this client or any view of it, or a Tensor.

        Raises:
            NoSuchTensor: not of this client, or freed before.
            NotPermitted: it was allocated before a fork, by the parent.
        """
        self.free_many([item])

    def free_many(self, items: Sequence[npt.NDArray[Any] | memoryview | Tensor]) -> None:
        """Free several tensors; with an error none of them.

        Those that nothing shows go back with one call to the kernel.

        Raises:
            NoSuchTensor: one is not of this client, was freed before, or is in
                the list twice.
            NotPermitted: one was allocated before a fork, by the parent.
        """
        blocks = [self._find(item) for item in items]
        _claim(blocks)
        self._session.release(blocks)

    # -- tensors -------------------------------------------------------------

    def alloc(
        self,
        size: SupportsIndex,
        kind: str | Kind = "activations",
        pool: str | Pool = "auto",
        *,
        huge: bool | None = None,
        reuse: bool = False,
        pinned: bool = False,
        numa: Nodes = None,
    ) -> Tensor:
        """Allocate ``size`` bytes, zeroed unless ``reuse`` is set.

        Args:
            size: bytes, from 1 to the window size.
            kind: as for :meth:`empty`, and so are the others.
            pool: see there.
            huge: see there.
            reuse: see there.
            pinned: see there.
            numa: see there.

        Raises:
            The errors of :meth:`empty`.
        """
        return self.alloc_many(
            [size], kind, pool, huge=huge, reuse=reuse, pinned=pinned, numa=numa
        )[0]

    def alloc_many(
        self,
        sizes: Sequence[SupportsIndex],
        kind: str | Kind = "activations",
        pool: str | Pool = "auto",
        *,
        huge: bool | None = None,
        reuse: bool = False,
        pinned: bool = False,
        numa: Nodes = None,
    ) -> list[Tensor]:
        """Allocate tensors of these sizes in bytes, all or none; see :meth:`alloc`."""
        items = [_item(_size(size), kind, pool, huge, reuse, pinned, numa) for size in sizes]
        return [Tensor(block) for block in self._session.allocate(items)]

    def arena(
        self, size: SupportsIndex, *, huge: bool | None = None, poison: bool = False
    ) -> Arena:
        """Return an arena: arrays out of one activations tensor, taken back together.

        Args:
            size: bytes of the tensor; ``Arena.peak`` of a run says how many it takes.
            huge: as for :meth:`empty`.
            poison: fill what is taken back with ``0xff``, to find who uses it for too long.

        Raises:
            The errors of :meth:`empty`.
        """
        return Arena(self.alloc(size, huge=huge), self.cache_line, poison=poison)

    # -- KV caches -----------------------------------------------------------

    def kv_cache(
        self,
        groups: Sequence[KVGroup],
        max_tokens: int,
        max_sequences: int = 16,
        limit: int | None = None,
        block_tokens: int | None = None,
        *,
        events: bool = False,
        hash_seed: bytes = b"",
    ) -> KVCache:
        """Make a KV cache on this client's bill. It outlives the client.

        Args:
            groups: the model's layers: see :class:`KVGroup`.
            max_tokens: of one sequence.
            max_sequences: open at a time, 1 to 65535.
            limit: bytes of memory it may hold, rounded up to chunks; None for what
                ``max_sequences`` of ``max_tokens`` take. Memory is taken as it is needed.
            block_tokens: tokens of a block; None for few that waste little. They have
                to make whole pages in every group's planes.
            events: keep events for :meth:`KVCache.events`.
            hash_seed: goes into all hashes of token ids, so that who does not know it
                cannot tell what a prefix is from its hash.

        Raises:
            InvalidArgument: a geometry or limit that is not possible.
            QuotaExceeded, OutOfMemory: there is no room for its tables.
            IncompatibleModule: the module has no KV caches.
            Closed: the client was closed.
        """
        return kv.create(
            self._session,
            groups,
            max_tokens,
            max_sequences,
            limit,
            block_tokens,
            events,
            hash_seed,
        )

    # -- model slots ---------------------------------------------------------

    def slot(
        self,
        name: str,
        *,
        create: bool = False,
        exclusive: bool = False,
        mode: int = 0o660,
        write: bool = False,
    ) -> Slot:
        """Open a model slot; what is staged by it is on this client's bill.

        Args:
            name: as for :func:`tensormem.slot`, and so are the others.
            create: see there.
            exclusive: see there.
            mode: see there.
            write: see there.

        Raises:
            The errors of :func:`tensormem.slot`.
            Closed: the client was closed.
        """
        with self._session.calling():
            return open_slot(self._session.device, name, create, exclusive, mode, write)

    # -- the RT pool -----------------------------------------------------------

    def rt(
        self,
        size: Size | None = None,
        *,
        arena: RTClient | int | None = None,
        priority: SupportsIndex = 0,
        movable: SupportsIndex = 0,
    ) -> RTClient:
        """Make an arena of the RT pool, on this client's bill, or join one. It outlives the client.

        Args:
            size: as for :func:`tensormem.rt`, and so are the others.
            arena: see there.
            priority: see there.
            movable: see there.

        Raises:
            The errors of :func:`tensormem.rt`.
            Closed: the client was closed.
        """
        return open_rt(self._session.opener, size, arena, priority, movable)

    # -- questions -----------------------------------------------------------

    def query(self, item: npt.NDArray[Any] | memoryview | Tensor) -> TensorInfo:
        """Ask the kernel about the tensor behind an array, a view or a Tensor.

        Raises:
            NoSuchTensor: not of this client, or freed.
            Closed: the client was closed.
        """
        return _query(self._session, self._find(item))

    def tensors(self) -> list[TensorInfo]:
        """Ask the kernel about all tensors that this object allocated."""
        session = self._session
        found: list[TensorInfo] = []
        with session.calling():
            with session.locked():
                handles = sorted(session.live)
            step = session.info.max_batch
            for begin in range(0, len(handles), step):
                part = handles[begin : begin + step]
                for handle in part:
                    # one by one: a tensor may go while we ask
                    with contextlib.suppress(errors.NoSuchTensor):
                        found.append(_info(session.call(abi.IOC_QUERY, abi.Query(handle=handle))))
        return found

    def stats(self) -> Stats:
        """Ask the kernel what the client holds and may hold.

        Raises:
            Closed: the client was closed.
        """
        session = self._session
        with session.calling():
            info = session.call(abi.IOC_INFO, abi.Info())
            with session.locked():
                lingering = sum(block.freed for block in session.live.values())
        return Stats(
            abi_version=info.abi_version,
            page_size=info.page_size,
            chunk_size=info.chunk_size,
            window_size=info.window_size,
            quota=info.quota,
            used=info.used,
            kept=info.kept,
            tensors=info.nr_tensors,
            max_batch=info.max_batch,
            cache_line=info.cache_line,
            nodes=_node_numbers(info.nodes),
            lingering=lingering,
            whole_window=session.window is not None,
        )

    def set_quota(self, size: SupportsIndex) -> None:
        """Bound what this client may hold, in bytes.

        Raises:
            InvalidArgument: not a size.
            Busy: the client already holds more.
            NotPermitted: above the default quota without CAP_SYS_RESOURCE.
            Closed: the client was closed.
        """
        number = _size(size)
        with self._session.calling():
            self._session.call(abi.IOC_SET_QUOTA, abi.Quota(bytes=number))

    def bandwidth(self) -> Bandwidth:
        """Ask what the module has moved for this client, and what its budget is.

        Raises:
            IncompatibleModule: the module counts no bandwidth.
            Closed: the client was closed.
        """
        with self._session.calling():
            found = self._session.call(abi.IOC_BANDWIDTH, abi.Bandwidth())
        return Bandwidth(
            budget=None if found.budget == ANY else found.budget,
            used=found.used,
            moved=found.moved,
            excess=found.excess,
            waits=found.waits,
            held_ns=found.held_ns,
            period_ns=found.period_ns,
            client=found.client,
            throttled=bool(found.throttle),
        )

    def set_bandwidth(self, size: Size | None) -> None:
        """Bound the bytes that the module moves for this client in a period.

        Above it the client is told, and where root wants it so (bandwidth/throttle), its next
        call that moves bytes waits.

        Args:
            size: bytes, or a text such as ``"4M"``; None for no bound.

        Raises:
            InvalidArgument: not a size.
            NotPermitted: above bandwidth/client_budget without CAP_SYS_RESOURCE.
            IncompatibleModule: the module counts no bandwidth.
            Closed: the client was closed.
        """
        number = ANY if size is None else _size(parse_size(size) if isinstance(size, str) else size)
        with self._session.calling():
            try:
                self._session.device.ioctl(abi.IOC_SET_BUDGET, abi.Budget(bytes=number))
            except OSError as error:
                if error.errno == errno.EPERM:
                    what = "any" if size is None else format_size(number)
                    raise errors.NotPermitted(
                        f"cannot set the budget to {what}, the default is less",
                        "ask for less, or have root run"
                        " 'tensormem bandwidth set --client-budget SIZE' and open it again",
                    ) from None
                raise errors.from_errno(error.errno or 0, "cannot set the budget") from None

    @contextlib.contextmanager
    def budget(self, size: Size) -> Iterator[None]:
        """Bound what is moved for the time of a ``with`` block; see :meth:`set_bandwidth`."""
        before = self.bandwidth().budget
        self.set_bandwidth(size)
        try:
            yield
        finally:
            self.set_bandwidth(before)

    def set_numa(self, numa: Nodes) -> None:
        """Choose the memory nodes for later allocations that do not choose themselves.

        Args:
            numa: as for :meth:`empty`; None is ``"local"``, with which a client begins.

        Raises:
            InvalidArgument: not a policy, or a node without a pool.
            Closed: the client was closed.
        """
        policy, nodes = _numa(numa)
        argument = abi.SetNuma(numa=policy, nodes=nodes)
        session = self._session
        with session.calling():
            try:
                session.call(abi.IOC_SET_NUMA, argument)
            except errors.InvalidArgument as error:
                raise errors.InvalidArgument(*session.malformed(argument) or error.args) from None

    # -- the end -------------------------------------------------------------

    def close(self) -> None:
        """Refuse further calls and free what nothing shows.

        Arrays stay valid; descriptor and mapping close with the last of them. A
        second close does nothing.
        """
        self._session.close()

    def __del__(self) -> None:
        session = getattr(self, "_session", None)
        if session is not None and not session.closed:
            session.post(Event.CLIENT_GONE)

    def __repr__(self) -> str:
        """Name the descriptor and the number of tensors."""
        state = "closed" if self.closed else f"fd {self.fileno()}"
        return f"<tensormem.Client {state}, {len(self._session.live)} tensors>"

    def _find(self, item: object) -> _Block:
        """Return the block behind an array, a view, a memoryview or a Tensor."""
        base: object = item
        while base is not None and not isinstance(base, Export | Tensor):
            if isinstance(base, np.ndarray):
                base = base.base
            elif isinstance(base, memoryview):
                base = cast(object, base.obj)
            else:
                base = None
        block = base._block if isinstance(base, Tensor) else getattr(base, "held", None)
        if not isinstance(block, _Block) or block.session is not self._session:
            raise errors.NoSuchTensor(
                "this array is not on memory of this client",
                "pass an array that came from it, or a view of one",
            )
        return block


def open(path: str | os.PathLike[str] = DEFAULT_PATH, *, whole_window: bool = True) -> Client:
    """Open the device as a new client.

    Args:
        path: the device node.
        whole_window: map the client's window once, so that allocating needs no
            further mapping; falls back to one mapping for each tensor where the
            address space is too small.

    Raises:
        DeviceMissing: the module is not loaded.
        AccessDenied: this user may not open the device.
        IncompatibleModule: the module speaks another ABI.
    """
    return Client(KernelDevice(path), whole_window=whole_window)
