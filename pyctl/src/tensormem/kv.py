# SPDX-License-Identifier: MIT
"""KV caches: sequences whose keys and values are plain arrays on shared blocks.

::

    groups = [KVGroup(layers=22, heads=4, dim=64)]
    with client.kv_cache(groups, max_tokens=4096) as kv, kv.sequence() as seq:
        seq.extend(16)
        seq.k(0)[:] = keys  # [16, 4, 64], contiguous; seq.v(0) likewise
        with seq.fork() as other:  # shares the blocks, copies on write
            ...

An array keeps what it shows, as everywhere in this package (see :mod:`tensormem.client`):
a sequence that is closed while arrays of it are alive ends with the last of them,
and so do the KV cache's descriptor and mapping. A truncation takes effect at once; what
an array still shows of the tokens cut off goes back later, when a call on the
sequence finds the array gone. Two things an array cannot keep, because the cache
is made to take them: tokens that have left the window of a group
(:meth:`KVSequence.first`), and memory for a copy when there is none left. Touching
either raises SIGBUS.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import math
import operator
import os
import threading
import weakref
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from types import TracebackType
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
import numpy.typing as npt

from . import abi, errors
from .closing import Closing
from .device import Device, KernelDevice
from .session import BatchError, Event, Export, Held, Session, address
from .units import format_size

__all__ = [
    "KVCache",
    "KVEvent",
    "KVGroup",
    "KVInfo",
    "KVPacked",
    "KVSequence",
    "KVSequenceInfo",
    "Tokens",
    "as_ids",
    "create",
    "first_held",
]

#: Token ids: integers that fit 64 bits with a sign.
Tokens = Sequence[int] | npt.NDArray[np.integer[Any]]

_U32 = (1 << 32) - 1
_U64 = (1 << 64) - 1

#: Items that every module takes in one call; a client knows what its own takes.
_BATCH = 4096

#: Tells our hashes from others that somebody makes of the same bytes.
_PERSON = b"tensormem-kv"

_K, _V, _STATE = range(3)


@dataclass(frozen=True)
class KVGroup:
    """Layers that share one KV shape and one rule.

    Attributes:
        layers: how many (they are numbered on from the group before), or which.
        heads: KV heads of a layer.
        dim: numbers of a head.
        dtype: of K and V, or of the state.
        window: tokens that attention looks back on; older ones are given up, by
            the block. None: all tokens are kept.
        state: the shape of a state of fixed size that each layer has in place
            of K and V; then heads, dim and window are not used.
    """

    layers: int | Sequence[int]
    heads: int = 1
    dim: int = 0
    dtype: npt.DTypeLike = np.float16
    window: int | None = None
    state: Sequence[int] | None = None


@dataclass(frozen=True)
class KVInfo:
    """Layout and counters of a KV cache.

    Attributes:
        max_tokens: of one sequence.
        max_sequences: open at a time.
        block_tokens: tokens of a block.
        sequences: open now, those of other processes and those that only arrays
            keep among them.
        window_size: bytes of the window.
        sequence_size: bytes of a sequence's place in it.
        limit: most bytes it may hold.
        held: bytes it holds, in whole chunks.
        used: bytes in blocks: of sequences and cached.
        cached: bytes in blocks that no sequence holds, kept for their hash.
        packed: bytes that packed blocks take; they are in ``used``.
        unpacked: bytes they take unpacked.
        lookups: blocks asked for by hash.
        hits: those found.
        copies: blocks copied: at a fork, before a write, of a partial match.
        evictions: cached blocks given up.
        packs: blocks packed.
        unpacks: blocks unpacked.
        events_lost: events that nobody read in time.
        moved: pages moved so that chunks fell empty.
    """

    max_tokens: int
    max_sequences: int
    block_tokens: int
    sequences: int
    window_size: int
    sequence_size: int
    limit: int
    held: int
    used: int
    cached: int
    packed: int
    unpacked: int
    lookups: int
    hits: int
    copies: int
    evictions: int
    packs: int
    unpacks: int
    events_lost: int
    moved: int

    @property
    def hit_rate(self) -> float | None:
        """Part of the blocks asked for that were found; None before the first."""
        return self.hits / self.lookups if self.lookups else None

    @property
    def packing(self) -> float | None:
        """What packed blocks take, as a part of what they take unpacked; None for none."""
        return self.packed / self.unpacked if self.unpacked else None


@dataclass(frozen=True)
class KVSequenceInfo:
    """What the kernel says about one sequence.

    Attributes:
        handle: its name, never 0.
        length: tokens.
        offset: its place in the window.
        held: bytes in its blocks, shared ones too.
        shared: bytes of ``held`` that another sequence holds as well.
        packed: bytes that its packed blocks take; they are in ``held``.
        unpacked: bytes they take unpacked.
    """

    handle: int
    length: int
    offset: int
    held: int
    shared: int
    packed: int
    unpacked: int


class KVPacked(NamedTuple):
    """What packing or unpacking did: blocks, and the bytes they took and take now."""

    blocks: int
    before: int
    after: int


@dataclass(frozen=True)
class KVEvent:
    """A change of what can be found by hash.

    Attributes:
        type: ``stored``, ``removed`` or ``cleared`` (all at once, by a reset).
        tenant: whose block it is.
        group: which group's; each has its own.
        hash: its name, 16 bytes.
        block: for ``stored``: which of its sequence, counted from the start.
        parent: for ``stored``: the name of the block before; None for none.
    """

    type: str
    tenant: int
    group: int
    hash: bytes
    block: int
    parent: bytes | None


# -- arguments -------------------------------------------------------------------------


def _number(value: SupportsIndex, what: str, least: int, most: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise errors.InvalidArgument(
            f"{what} of {value!r} is not an integer", f"pass one from {least} to {most}"
        ) from None
    if not least <= number <= most:
        raise errors.InvalidArgument(
            f"{what} of {number} is not possible", f"pass {least} to {most}"
        )
    return number


def as_ids(tokens: Tokens) -> npt.NDArray[np.int64]:
    """Return token ids as they are hashed and saved.

    Raises:
        InvalidArgument: they are something else.
    """
    array = np.asarray(tokens)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise errors.InvalidArgument(
            f"tokens are {array.dtype}{list(array.shape)}, not a list of token ids",
            "pass a list or a one-dimensional array of integers",
        )
    return array.astype("<i8")


def first_held(window: int | None, tokens: int, block_tokens: int) -> int:
    """Return the first token that a group with this window still has of so many."""
    if window is None or tokens <= window:
        return 0
    return (tokens - window) // block_tokens * block_tokens


@dataclass(frozen=True)
class _Spot:
    """Where the arrays of a layer lie in a sequence's place; bytes but for ``shape``."""

    group: int
    offsets: tuple[int, ...]
    token_bytes: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def _resolve(groups: Sequence[KVGroup]) -> tuple[KVGroup, ...]:
    """Return groups with layers, shapes and dtypes spelled out.

    Raises:
        InvalidArgument: a group makes no sense; the message says which and why.
    """
    if not 1 <= len(groups) <= abi.KV_MAX_GROUPS:
        raise errors.InvalidArgument(
            f"{len(groups)} groups are not possible", f"pass 1 to {abi.KV_MAX_GROUPS}"
        )
    resolved: list[KVGroup] = []
    seen: set[tuple[bool, int]] = set()
    following = 0
    for number, group in enumerate(groups):
        where = f"group {number}"
        if isinstance(group.layers, Sequence):
            layers = tuple(_number(n, f"{where}: a layer number", 0, _U32) for n in group.layers)
            if not layers:
                raise errors.InvalidArgument(f"{where}: it has no layers", "name at least one")
        else:
            count = _number(group.layers, f"{where}: a number of layers", 1, 1 << 20)
            layers = tuple(range(following, following + count))
        following = max(layers) + 1
        for layer in layers:
            key = (group.state is not None, layer)
            if key in seen:
                raise errors.InvalidArgument(
                    f"{where}: layer {layer} has its KV in two places", "name it once"
                )
            seen.add(key)
        try:
            dtype = np.dtype(group.dtype).newbyteorder("<")
        except TypeError:
            raise errors.InvalidArgument(f"{where}: {group.dtype!r} is not a dtype") from None
        if dtype.hasobject or not dtype.itemsize or dtype.subdtype:
            raise errors.InvalidArgument(
                f"{where}: dtype {dtype} has no fixed bytes to keep", "use a plain numeric dtype"
            )
        if group.state is not None:
            shape = tuple(_number(n, f"{where}: a state's size", 1, _U32) for n in group.state)
            resolved.append(KVGroup(layers, dtype=dtype, state=shape))
        else:
            heads = _number(group.heads, f"{where}: heads", 1, _U32)
            dim = _number(group.dim, f"{where}: dim", 1, _U32)
            window = group.window
            if window is not None:
                window = _number(window, f"{where}: a window", 1, _U32)
            resolved.append(KVGroup(layers, heads, dim, dtype, window))
    return tuple(resolved)


def _layers(group: KVGroup) -> tuple[int, ...]:
    assert isinstance(group.layers, tuple)
    return group.layers


def _shape(group: KVGroup) -> tuple[int, ...]:
    """Return the shape of a token in one plane, or of a state."""
    return (group.heads, group.dim) if group.state is None else tuple(group.state)


def _abi_group(number: int, group: KVGroup) -> abi.KVGroup:
    itemsize = np.dtype(group.dtype).itemsize
    size = math.prod(_shape(group)) * itemsize
    if size > _U32:
        raise errors.InvalidArgument(
            f"group {number}: {size} bytes in one place are beyond 4 GiB", "use smaller shapes"
        )
    state = group.state is not None
    window = group.window or 0
    return abi.KVGroup(
        rule=abi.KVRule.STATE if state else abi.KVRule.WINDOW if window else abi.KVRule.FULL,
        planes=len(_layers(group)) * (1 if state else 2),
        token_bytes=size,
        window=window,
        element=itemsize if itemsize in (1, 2, 4, 8) else 0,
    )


def create(
    client: Session,
    groups: Sequence[KVGroup],
    max_tokens: int,
    max_sequences: int,
    limit: int | None,
    block_tokens: int | None,
    events: bool,
    hash_seed: bytes,
) -> KVCache:
    """Make a KV cache on a client's bill; see :meth:`Client.kv_cache`."""
    resolved = _resolve(groups)
    array = (abi.KVGroup * len(resolved))(*(_abi_group(i, g) for i, g in enumerate(resolved)))
    argument = abi.KVCreate(
        groups=ctypes.addressof(array),
        nr_groups=len(array),
        group_size=ctypes.sizeof(abi.KVGroup),
        max_tokens=_number(max_tokens, "max_tokens", 1, _U32),
        max_sequences=_number(max_sequences, "max_sequences", 1, 65535),
        block_tokens=0 if block_tokens is None else _number(block_tokens, "block_tokens", 1, _U32),
        limit=0 if limit is None else _number(limit, "a limit", 1, _U64),
        flags=abi.KV_EVENTS if events else 0,
    )
    with client.calling():
        info = client.call(abi.IOC_INFO, abi.Info())
        try:
            client.device.ioctl(abi.IOC_KV_CREATE, argument)
        except OSError as error:
            cause, remedy = _malformed(error.errno or 0, argument, list(array), info)
            raise errors.from_errno(error.errno or 0, cause, remedy) from None
        device = client.device.other(argument.fd)
    return KVCache(device, resolved, hash_seed=hash_seed, max_batch=info.max_batch)


def _malformed(
    number: int, argument: abi.KVCreate, groups: Sequence[abi.KVGroup], info: abi.Info
) -> tuple[str, str | None]:
    """Return cause and remedy for a refused geometry."""
    cause = "cannot make a KV cache"
    if number != errno.EINVAL:
        return f"{cause}, {errors.from_errno(number).cause}", None
    page = info.page_size
    for i, group in enumerate(groups):
        size = argument.block_tokens * group.token_bytes
        if group.rule != abi.KVRule.STATE and size % page:
            needed = page // math.gcd(page, group.token_bytes)
            cause += (
                f", {argument.block_tokens} tokens of {group.token_bytes} bytes in group {i} are"
                f" not whole pages of {page}"
            )
            return cause, f"use a multiple of {needed} for block_tokens, or leave it out"
    remedy = (
        "the limit takes at least one block of each group, and block_tokens has to make whole"
        " pages of every group's tokens"
    )
    return f"{cause}, the kernel refuses its geometry or limit", remedy


# -- the kernel's part -----------------------------------------------------------------


class _View(Export):
    """What arrays of one plane have as their base: so many tokens of it."""

    __slots__ = ("tokens",)

    def __init__(self, held: Held, address: int, size: int, tokens: int) -> None:
        super().__init__(held, address, size)
        self.tokens = tokens


class _Place(Held):
    """One sequence of the kernel."""

    __slots__ = ("address", "lock", "offset", "user")
    session: _Session

    def __init__(self, session: _Session, handle: int, offset: int) -> None:
        super().__init__(session, handle)
        self.offset = offset
        self.address = 0
        # taken before the session's lock and never by a finalizer
        self.lock = threading.RLock()
        self.user: weakref.ref[KVSequence] | None = None

    def after_fork(self) -> None:
        """See :meth:`Held.after_fork`."""
        self.lock = threading.RLock()


class _Session(Session):
    """Descriptor, mapping and books of one KV cache."""

    def __init__(self, device: Device, max_batch: int) -> None:
        super().__init__(device)
        self.max_batch = max_batch

    def error(
        self, number: int, cause: str | None = None, remedy: str | None = None
    ) -> errors.TensormemError:
        """Return the exception for an errno; the cause says what could not be done."""
        plain = errors.from_errno(number, None, remedy, kv=True)
        if cause is None or type(plain) is errors.TensormemError:
            return errors.from_errno(number, cause, remedy, kv=True)
        if number == errno.EINVAL and remedy is None:
            remedy = "compare it with kv.info() and seq.info()"
        return errors.from_errno(number, f"{cause}, {plain.default_cause}", remedy, kv=True)

    def no_longer(self) -> errors.Closed:
        """Return the exception for a call after close()."""
        return errors.Closed("this KV cache is closed", "make another with client.kv_cache()")

    def begin(self, handle: int, offset: int, size: int) -> _Place:
        """Take a sequence that the kernel just began into the books, mapped."""
        place = _Place(self, handle, offset)
        if self.window is not None:
            place.mapping = self.window
            place.address = self.base + offset
        else:
            try:
                place.mapping = self.device.map(offset, size)
            except (OSError, OverflowError) as error:
                self.give_back([place])
                raise errors.OutOfMemory(
                    f"cannot map {format_size(size)} of a sequence ({error})",
                    "use a smaller max_tokens, or raise the limit on address space (ulimit -v)",
                ) from None
            place.address = address(place.mapping)
        with self.locked():
            self.live[handle] = place
        return place

    def give_back(self, gone: Sequence[Held]) -> None:
        """Close sequences."""
        pid = os.getpid()
        for place in gone:
            place.mapping = None
            if place.pid == pid:
                self.call(
                    abi.IOC_KV_CLOSE, abi.KVClose(sequence=place.handle), "cannot close a sequence"
                )

    def export(self, place: _Place, offset: int, size: int, tokens: int) -> _View:
        """Return a view of part of a sequence, which keeps it."""
        with self.locked():
            if not place.alive or not place.named:
                raise _gone(place.handle)
            place.exports += 1
        return _View(place, place.address + offset, size, tokens)


def _gone(handle: int) -> errors.NoSuchSequence:
    return errors.NoSuchSequence(f"sequence {handle} was closed")


def _common(one: bytes, other: bytes) -> int:
    """Return how many token ids two lists of them begin with in common."""
    count = 0
    for a, b in zip(memoryview(one).cast("q"), memoryview(other).cast("q"), strict=False):
        if a != b:
            break
        count += 1
    return count


class _Known:
    """The token ids of published blocks, to match a part of a block.

    The kernel knows hashes only. What it has given up is dropped here when that is
    noticed; until then the number of blocks is bounded by what the cache can hold.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.lock = threading.Lock()
        # least recently used first: (tenant, hash) -> (its parent's hash, token ids)
        self.blocks: OrderedDict[tuple[int, bytes], tuple[bytes, bytes]] = OrderedDict()
        # (tenant, parent) -> (token ids in order, the hash of each)
        self.children: dict[tuple[int, bytes], tuple[list[bytes], list[bytes]]] = {}

    def add(self, tenant: int, parent: bytes, name: bytes, tokens: bytes) -> None:
        with self.lock:
            if (tenant, name) in self.blocks:
                self.blocks.move_to_end((tenant, name))
                return
            ids, names = self.children.setdefault((tenant, parent), ([], []))
            where = bisect_left(ids, tokens)
            ids.insert(where, tokens)
            names.insert(where, name)
            self.blocks[tenant, name] = (parent, tokens)
            if len(self.blocks) > self.most:
                self._drop(*next(iter(self.blocks)))

    def drop(self, tenant: int, name: bytes) -> None:
        with self.lock:
            if (tenant, name) in self.blocks:
                self._drop(tenant, name)

    def _drop(self, tenant: int, name: bytes) -> None:
        parent, tokens = self.blocks.pop((tenant, name))
        ids, names = self.children[tenant, parent]
        where = bisect_left(ids, tokens)
        del ids[where], names[where]
        if not ids:
            del self.children[tenant, parent]

    def clear(self) -> None:
        with self.lock:
            self.blocks.clear()
            self.children.clear()

    def find(self, tenant: int, parent: bytes, tokens: bytes) -> tuple[int, bytes]:
        """Return how many token ids the best block after a parent begins with, and it.

        In the order of their bytes, the block with the longest common start is
        beside the place where the tokens would be.
        """
        best = (0, b"")
        with self.lock:
            ids, names = self.children.get((tenant, parent), ([], []))
            where = bisect_left(ids, tokens)
            for i in (where - 1, where):
                if 0 <= i < len(ids):
                    count = _common(ids[i], tokens)
                    best = max(best, (count, names[i]))
            if best[0]:
                self.blocks.move_to_end((tenant, best[1]))
        return best


# -- sequences -------------------------------------------------------------------------


class KVSequence:
    """The KV of one conversation. Get one from :meth:`KVCache.sequence`.

    Used as a context manager it is closed at the end of the block; one that is
    dropped closes itself. All methods may be called from any thread; what a thread
    reads or writes through arrays while another truncates is its own business.
    """

    def __init__(self, cache: KVCache, place: _Place, tenant: int, length: int) -> None:
        """Not for users; see :meth:`KVCache.sequence`."""
        self._cache = cache
        self._place = place
        self._tenant = tenant
        self._length = length
        # what the kernel has: more, while arrays show tokens that were cut off
        self._kernel = length
        # by (layer, which): an array of every token up to the end of a block
        self._roots: dict[tuple[int, int], npt.NDArray[Any]] = {}
        self._shown: weakref.WeakSet[_View] = weakref.WeakSet()
        # the hashes of the first full blocks, and how many of these are published
        self._chain: list[bytes] = []
        self._published = 0
        # by block, of those that were adopted: the hash, which says nothing of the chain
        self._adopted: dict[int, bytes] = {}
        place.user = weakref.ref(self)

    @property
    def handle(self) -> int:
        """The sequence's name in its KV cache, never 0."""
        return self._place.handle

    @property
    def tenant(self) -> int:
        """Whose it is."""
        return self._tenant

    @property
    def length(self) -> int:
        """Tokens it has."""
        return self._length

    @property
    def closed(self) -> bool:
        """True once :meth:`close` was called or the KV cache was closed."""
        return not self._place.named

    # -- arrays --------------------------------------------------------------

    def k(self, layer: int) -> npt.NDArray[Any]:
        """Return the keys of a layer: [length, heads, dim], writable.

        The memory is contiguous and its address the same at every call. The array
        has the tokens of now: call again after :meth:`extend`. In a group
        with a window only those from :meth:`first` on may be touched.

        Raises:
            InvalidArgument: the KV cache has no K and V for this layer.
            NoSuchSequence: the sequence was closed.
        """
        return self._array(layer, _K)

    def v(self, layer: int) -> npt.NDArray[Any]:
        """Return the values of a layer; see :meth:`k`."""
        return self._array(layer, _V)

    def state(self, layer: int) -> npt.NDArray[Any]:
        """Return the state of a layer, in its shape, writable.

        Raises:
            InvalidArgument: the KV cache has no state for this layer.
            NotHeld: the sequence is empty and has none yet.
            NoSuchSequence: the sequence was closed.
        """
        with self._place.lock:
            if not self._length and not self.closed:
                raise errors.NotHeld(
                    "a sequence without tokens has no state", "extend it before you look"
                )
            shape = self._cache._spot(layer, _STATE).shape
            return self._array(layer, _STATE).reshape(shape)

    def first(self, layer: int) -> int:
        """Return the first token whose K and V a layer still has; 0 without a window.

        Raises:
            InvalidArgument: the KV cache has no K and V for this layer.
        """
        group = self._cache._spot(layer, _K).group
        return self._cache._first(group, self._length)

    def _array(self, layer: int, which: int) -> npt.NDArray[Any]:
        # without the lock: a root that is at hand and long enough is right
        root = self._roots.get((layer, which))
        length = 1 if which == _STATE else self._length
        if root is None or len(root) < length:
            root, length = self._root(layer, which)
        return root[:length]

    def _root(self, layer: int, which: int) -> tuple[npt.NDArray[Any], int]:
        with self._place.lock:
            spot = self._cache._spot(layer, which)
            length = tokens = 1
            if which != _STATE:
                length = self._length
                tokens = self._cache._round_up(length)
            view = self._place.session.export(
                self._place,
                spot.offsets[which if which != _STATE else 0],
                tokens * spot.token_bytes,
                tokens,
            )
            self._shown.add(view)
            root = np.asarray(view).view(spot.dtype).reshape(tokens, *spot.shape)
            self._roots[layer, which] = root
            return root, length

    # -- length --------------------------------------------------------------

    def extend(self, n: int) -> int:
        """Make room for more tokens at the end.

        What their K and V hold is undefined until you write it. Write it to the
        arrays of :meth:`k` and :meth:`v` before the next call: blocks that are full
        when a sequence is extended count as written.

        Args:
            n: how many, at least 1.

        Returns:
            The new length.

        Raises:
            TooManyTokens: more than max_tokens.
            CacheFull, QuotaExceeded, OutOfMemory: there is no room, also after giving
                up cached blocks; all are MemoryErrors. Nothing has changed.
            InvalidArgument: not a number of tokens.
            NoSuchSequence: the sequence was closed.
        """
        return self._cache.extend([(self, n)])[0]

    def truncate(self, n: int) -> None:
        """Drop tokens from the end, so that ``n`` are left.

        Raises:
            InvalidArgument: it has fewer.
            NotHeld: a window has moved past what ``n`` tokens need, or there is a
                state, which cannot go back (but for 0 tokens).
            CacheInUse: arrays show the tokens, and there is a state, or a window that has
                moved.
            NoSuchSequence: the sequence was closed.
        """
        with self._calling():
            n = _number(n, "a length", 0, self._length)
            if n == self._length:
                return
            was, self._length = self._length, n
            try:
                settled = self._settle()
                for number, group in enumerate(() if settled else self._cache.groups):
                    lost = self._cache._first(number, n) < self._cache._first(number, was)
                    if lost and n:
                        raise self._place.session.error(
                            errno.ENODATA, f"cannot truncate sequence {self.handle} to {n} tokens"
                        )
                    # what comes anew then must not begin with what is there
                    if lost or group.state is not None:
                        raise errors.CacheInUse(
                            f"cannot begin sequence {self.handle} anew, arrays show its tokens",
                            "drop the arrays before you truncate",
                        )
            except BaseException:
                self._length = was
                raise
            self._forget(n)

    def _forget(self, length: int) -> None:
        """Forget the names of blocks that are not full any more."""
        full = length // self._cache.block_tokens
        del self._chain[full:]
        self._published = min(self._published, full)
        self._adopted = {i: name for i, name in self._adopted.items() if i < full}

    def _settle(self) -> bool:
        """Have the kernel truncate, unless arrays show what that would take. Lock held."""
        if self._kernel == self._length:
            return True
        keep = self._cache._round_up(self._length)
        for key in [key for key, root in self._roots.items() if len(root) > keep]:
            del self._roots[key]
        if any(view.tokens > keep for view in list(self._shown)):
            return False
        self._place.session.call(
            abi.IOC_KV_TRUNCATE,
            abi.KVTruncate(sequence=self.handle, length=self._length),
            f"cannot truncate sequence {self.handle} to {self._length} tokens",
        )
        self._kernel = self._length
        return True

    def _settled(self, what: str) -> None:
        if not self._settle():
            raise errors.CacheInUse(
                f"cannot {what}, arrays show tokens that were cut off sequence {self.handle}",
                "drop the arrays first",
            )

    @contextlib.contextmanager
    def _calling(self) -> Iterator[None]:
        """Hold the sequence still while a call is under way."""
        with self._place.lock, self._place.session.calling():
            if self.closed:
                raise _gone(self.handle)
            yield

    # -- sharing -------------------------------------------------------------

    def fork(self, at: int | None = None) -> KVSequence:
        """Begin a sequence with the tokens of this one.

        Full blocks are shared until either writes to them; neither ever sees what the
        other writes.

        Args:
            at: how many of its tokens; None for all.

        Raises:
            InvalidArgument: it has fewer.
            NotHeld: as for :meth:`truncate`.
            TooManySequences: max_sequences are open.
            CacheFull, QuotaExceeded, OutOfMemory: there is no room for a copy of the
                last block.
            NoSuchSequence: the sequence was closed.
        """
        with self._calling():
            at = self._length if at is None else _number(at, "a length", 0, self._length)
            session = self._place.session
            fork = session.call(
                abi.IOC_KV_FORK,
                abi.KVFork(sequence=self.handle, at=at),
                f"cannot fork sequence {self.handle} at {at} tokens",
            )
            place = session.begin(fork.child, fork.offset, self._cache._sequence_size)
            child = KVSequence(self._cache, place, self._tenant, at)
            child._chain, child._published = self._chain[:], self._published
            child._adopted = self._adopted
            child._forget(at)
            return child

    def match(self, tokens: Tokens, partial: bool = True) -> int:
        """Begin the sequence with the longest prefix of these tokens that is cached.

        At least one token is left to compute, because what follows is in the
        model's output for the last one and not in the KV.

        Args:
            tokens: the token ids it is going to have.
            partial: match a part of a block as well, by a copy, among those
                published by this process.

        Returns:
            How many tokens it has now; go on with ``tokens[result:]``.

        Raises:
            InvalidArgument: the sequence is not empty.
            CacheFull, QuotaExceeded, OutOfMemory: there is no room for a copy of the
                state. (For a part of a block: it is left out.)
            NoSuchSequence: the sequence was closed.
        """
        ids = as_ids(tokens)
        with self._calling():
            if self._length:
                raise errors.InvalidArgument(
                    f"sequence {self.handle} has {self._length} tokens already",
                    "match at the beginning of a sequence",
                )
            self._settled("match")
            cache, session = self._cache, self._place.session
            size = cache.block_tokens
            # what is matched leaves one token to compute and room for it
            most = max(min(len(ids), cache.max_tokens) - 1, 0)
            chain = cache._hashes([], ids[: most // size * size])
            if chain:
                part = chain[: session.max_batch]
                names = _names(part)
                lookup = session.call(
                    abi.IOC_KV_LOOKUP,
                    abi.KVHashes(
                        sequence=self.handle, count=len(part), hashes=ctypes.addressof(names)
                    ),
                    "cannot look up a prefix",
                )
                self._kernel = self._length = lookup.matched * size
                with contextlib.suppress(errors.NotHeld):
                    # more than one call takes: the rest one by one
                    while len(part) <= self._length // size < len(chain):
                        self._put(self._length // size, 0, chain[self._length // size])
            whole = self._length // size
            self._chain, self._published = chain[:whole], whole
            if partial and not cache._has_state:
                self._match_part(ids[self._length : min(most, self._length + size - 1)])
            return self._length

    def _match_part(self, ids: npt.NDArray[np.int64]) -> None:
        """Take the start of the block that begins most like these tokens."""
        whole = len(self._chain)
        parent, rest = self._cache._name(self._chain, whole), ids.tobytes()
        while rest:
            count, name = self._cache._known.find(self._tenant, parent, rest)
            if not count:
                break
            try:
                self._put(whole, count, name)
                break
            except errors.NotHeld:
                self._cache._known.drop(self._tenant, name)
            except MemoryError:
                break

    def _put(self, index: int, tokens: int, name: bytes) -> None:
        adopt = self._place.session.call(
            abi.IOC_KV_ADOPT,
            abi.KVAdopt(sequence=self.handle, block=index, tokens=tokens, hash=_names([name])[0]),
            f"cannot adopt block {index}",
        )
        self._kernel = self._length = adopt.length

    def adopt(self, index: int, hash: bytes, tokens: int | None = None) -> int:
        """Put a published block into the sequence.

        Args:
            index: where: a full block it has, which is replaced, or the one after
                its last when it ends there.
            hash: the block's name, 16 bytes.
            tokens: how many of its tokens; fewer than all only at the end, and they
                are copied.

        Returns:
            The length of the sequence.

        Raises:
            NotHeld: there is no such block.
            InvalidArgument: another place, or not a hash.
            TooManyTokens: more than max_tokens.
            CacheInUse: arrays show tokens that were cut off by :meth:`truncate`.
            CacheFull, QuotaExceeded, OutOfMemory: there is no room for a copy.
            NoSuchSequence: the sequence was closed.
        """
        if len(hash) != 16:
            raise errors.InvalidArgument(f"a hash of {len(hash)} bytes", "pass 16 bytes")
        size = self._cache.block_tokens
        with self._calling():
            index = _number(index, "a block", 0, _U32)
            count = size if tokens is None else _number(tokens, "a number of tokens", 1, size)
            self._settled("adopt")
            self._put(index, count, bytes(hash))
            if count == size:
                self._adopted[index] = bytes(hash)
            return self._length

    def publish(self, tokens: Tokens) -> int:
        """Let others of the same tenant find the full blocks.

        Call it when blocks have filled and are written. With a state: whenever the
        length is a multiple of block_tokens, because a prefix can only be taken up
        where its state was published.

        Args:
            tokens: all token ids of the sequence so far. Where there are more or fewer
                than its length, the blocks that both have are published.

        Returns:
            Blocks published now; those that were before are left out.

        Raises:
            InvalidArgument: the tokens are not those published or matched before.
            CacheFull, QuotaExceeded, OutOfMemory: there is no room for a copy of the
                state.
            NoSuchSequence: the sequence was closed.
        """
        cache, session = self._cache, self._place.session
        size = cache.block_tokens
        with self._calling():
            full = min(len(tokens), self._length) // size
            begin = self._published
            if full <= begin:
                return 0
            known = min(len(self._chain), full)
            if known:
                # the last of them says whether these are the tokens
                last = as_ids(tokens[(known - 1) * size : known * size])
                if cache._hashes(self._chain[: known - 1], last) != self._chain[known - 1 : known]:
                    raise errors.InvalidArgument(
                        f"the first {known * size} tokens are not those that sequence"
                        f" {self.handle} was published with",
                        "pass all its tokens, from the first on",
                    )
            fresh = as_ids(tokens[known * size : full * size])
            chain = self._chain[:known] + cache._hashes(self._chain[:known], fresh)
            count = 0
            for first, part in self._runs(chain, begin, full):
                names = _names(part)
                session.call(
                    abi.IOC_KV_PUBLISH,
                    abi.KVHashes(
                        sequence=self.handle,
                        first=first,
                        count=len(part),
                        hashes=ctypes.addressof(names),
                    ),
                    f"cannot publish blocks {first} to {first + len(part) - 1}",
                )
                count += len(part)
                for i in range(first, first + len(part)):
                    block = as_ids(tokens[i * size : (i + 1) * size]).tobytes()
                    cache._known.add(self._tenant, cache._name(chain, i), chain[i], block)
            if len(chain) > len(self._chain):
                self._chain = chain
            self._published = full
            return count

    def _runs(self, chain: list[bytes], begin: int, end: int) -> Iterator[tuple[int, list[bytes]]]:
        """Yield what to publish in one call each, leaving out what has another name."""
        most = self._place.session.max_batch
        run: list[bytes] = []
        for i in range(begin, end):
            foreign = self._adopted.get(i, chain[i]) != chain[i]
            if run and (foreign or len(run) == most):
                yield i - len(run), run
                run = []
            if not foreign:
                run.append(chain[i])
        if run:
            yield end - len(run), run

    # -- packing and questions -----------------------------------------------

    def pack(self) -> KVPacked:
        """Compress the blocks that only this sequence holds, without loss.

        A touch brings them back. The cache does so by itself with sequences that are
        idle, when it is nearly full.

        Raises:
            NoCodec: the kernel cannot.
            NoSuchSequence: the sequence was closed.
        """
        return self._pack(0, "pack")

    def unpack(self) -> KVPacked:
        """Bring all packed blocks back.

        Raises:
            CacheFull, QuotaExceeded, OutOfMemory: there is no room.
            NoSuchSequence: the sequence was closed.
        """
        return self._pack(abi.KV_UNPACK, "unpack")

    def _pack(self, flags: int, what: str) -> KVPacked:
        with self._calling():
            done = self._place.session.call(
                abi.IOC_KV_PACK,
                abi.KVPack(sequence=self.handle, flags=flags),
                f"cannot {what} sequence {self.handle}",
            )
            return KVPacked(done.blocks, done.before, done.after)

    def info(self) -> KVSequenceInfo:
        """Ask the kernel about it.

        Raises:
            NoSuchSequence: the sequence was closed.
        """
        with self._calling():
            self._settle()
            query = self._place.session.call(
                abi.IOC_KV_QUERY,
                abi.KVQuery(sequence=self.handle),
                f"cannot describe sequence {self.handle}",
            )
            return KVSequenceInfo(
                handle=self.handle,
                length=self._length,
                offset=query.offset,
                held=query.held,
                shared=query.shared,
                packed=query.packed,
                unpacked=query.unpacked,
            )

    def save(
        self,
        path: str | os.PathLike[str],
        tokens: Tokens,
        fingerprint: str,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Write the sequence to a file, from which :meth:`KVCache.restore` makes one again.

        The file is safetensors; it replaces an old one in one step, when it is complete
        and on disk. Whatever happens, the old one or the new one is there. Other calls
        on the sequence wait meanwhile; do not write to its arrays.

        Args:
            path: the file. Only this user may read it: it is a conversation.
            tokens: the ids of all tokens of the sequence.
            fingerprint: names the model and all else that the KV depends on.
            progress: called with the bytes written and the bytes to write.

        Raises:
            InvalidArgument: as many ids as it has tokens have to be given.
            CacheFull, QuotaExceeded, OutOfMemory: it is packed and there is no room.
            OSError: the file cannot be written; the old one stays.
            NoSuchSequence: the sequence was closed.
        """
        from .kvfile import save

        save(self, path, tokens, fingerprint, progress)

    # -- the end -------------------------------------------------------------

    def close(self) -> None:
        """End it: at once, or when the last array of it is gone.

        Raises:
            NoSuchSequence: it was closed before.
            NotPermitted: it was begun before a fork() of the process, by the parent.
        """
        place = self._place
        with place.lock:
            if place.freed or self.closed:
                raise _gone(self.handle)
            if place.pid != os.getpid():
                raise errors.NotPermitted(
                    f"sequence {self.handle} belongs to the parent process",
                    "close it there; a child's arrays of it simply end",
                )
            place.freed = True
            self._roots.clear()
        place.session.release([place])

    def __enter__(self) -> KVSequence:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it unless that was done before."""
        if not self.closed:
            self.close()

    def __del__(self) -> None:
        place = getattr(self, "_place", None)
        if place is not None and place.named:
            place.session.post(Event.NAME_GONE, place)

    def __repr__(self) -> str:
        """Name handle and length."""
        state = ", closed" if self.closed else ""
        return f"<KVSequence {self.handle}: {self._length} tokens{state}>"


def _names(hashes: Sequence[bytes]) -> ctypes.Array[abi.KVHash]:
    return (abi.KVHash * len(hashes)).from_buffer_copy(b"".join(hashes))


# -- the cache -------------------------------------------------------------------------


class KVCache(Closing):
    """Sequences for one model's geometry, on a descriptor of their own.

    Get one from :meth:`Client.kv_cache`, or with :meth:`from_fd` from another process.
    Use it as a context manager. All methods may be called from any thread.
    """

    def __init__(
        self,
        device: Device,
        groups: Sequence[KVGroup],
        *,
        hash_seed: bytes = b"",
        max_batch: int = _BATCH,
    ) -> None:
        """Not for users; see :meth:`Client.kv_cache` and :meth:`from_fd`."""
        try:
            self.groups = _resolve(groups)
            session = _Session(device, max_batch)
            array = (abi.KVGroup * abi.KV_MAX_GROUPS)()
            info = session.call(
                abi.IOC_KV_INFO,
                abi.KVInfo(
                    groups=ctypes.addressof(array),
                    nr_groups=len(array),
                    group_size=ctypes.sizeof(abi.KVGroup),
                ),
                "cannot describe this KV cache",
            )
            layout = array[: info.nr_groups]
            self._check(layout)
            #: Tokens of a block, of one sequence at most; sequences open at most.
            self.block_tokens = int(info.block_tokens)
            self.max_tokens = int(info.max_tokens)
            self.max_sequences = int(info.max_sequences)
            self._sequence_size = int(info.sequence_size)
            self._has_state = any(group.state is not None for group in self.groups)
            self._spots = _spots(self.groups, layout)
            self._seed = blake2b(hash_seed, digest_size=16, person=_PERSON).digest()
            self._known = _Known(self._blocks(info.limit))
            session.map_window(info.window_size)
        except BaseException:
            device.close()
            raise
        self._session = session

    @classmethod
    def from_fd(cls, fd: int, groups: Sequence[KVGroup], *, hash_seed: bytes = b"") -> KVCache:
        """Use a KV cache of another process, whose descriptor came over a socket.

        Args:
            fd: the descriptor; it belongs to the object from now on, also when
                this fails.
            groups: as it was made with.
            hash_seed: as it was made with, so that both find each other's prefixes.

        Raises:
            InvalidArgument: it has other groups.
            IncompatibleModule: not a KV cache.
        """
        return cls(KernelDevice.of(fd), groups, hash_seed=hash_seed)

    def _check(self, layout: Sequence[abi.KVGroup]) -> None:
        def key(group: abi.KVGroup) -> tuple[int, ...]:
            return group.rule, group.planes, group.token_bytes, group.window

        ours = [_abi_group(i, group) for i, group in enumerate(self.groups)]
        if [key(group) for group in ours] != [key(group) for group in layout]:
            raise errors.InvalidArgument(
                "the KV cache has other groups than these", "pass those it was made with"
            )

    def _blocks(self, limit: int) -> int:
        """Return how many blocks there can be at most."""
        sizes = [
            len(_layers(g)) * 2 * math.prod(_shape(g)) * np.dtype(g.dtype).itemsize
            for g in self.groups
            if g.state is None
        ]
        return limit // (min(sizes) * self.block_tokens) if sizes else 0

    # -- layout and hashes, for sequences ------------------------------------

    def _spot(self, layer: int, which: int) -> _Spot:
        spot = self._spots.get((which == _STATE, layer))
        if spot is None:
            what = "state" if which == _STATE else "K and V"
            raise errors.InvalidArgument(
                f"the KV cache has no {what} for layer {layer}", "see kv.groups"
            )
        return spot

    def _round_up(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens) * self.block_tokens

    def _first(self, group: int, tokens: int) -> int:
        return first_held(self.groups[group].window, tokens, self.block_tokens)

    def _name(self, chain: Sequence[bytes], full: int) -> bytes:
        """Return what the blocks after the first ``full`` ones have as their parent."""
        return chain[full - 1] if full else self._seed

    def _hashes(self, chain: Sequence[bytes], ids: npt.NDArray[np.int64]) -> list[bytes]:
        """Return the hashes of whole blocks that follow those of a chain."""
        step = self.block_tokens * 8
        data = memoryview(ids.tobytes())
        name, names = self._name(chain, len(chain)), []
        for begin in range(0, len(data) - step + 1, step):
            state = blake2b(name, digest_size=16, person=_PERSON)
            state.update(data[begin : begin + step])
            name = state.digest()
            names.append(name)
        return names

    # -- sequences -----------------------------------------------------------

    def sequence(self, tenant: int = 0) -> KVSequence:
        """Begin an empty sequence.

        Args:
            tenant: whose it is: what one tenant publishes no other finds. Where
                tenants must not probe each other's prefixes, a number of 64 bits that
                others cannot guess.

        Raises:
            TooManySequences: max_sequences are open; those that arrays keep count.
            Closed: the KV cache was closed.
        """
        tenant = _number(tenant, "a tenant", 0, _U64)
        session = self._session
        with session.calling():
            begun = session.call(
                abi.IOC_KV_OPEN, abi.KVOpen(tenant=tenant), "cannot begin a sequence"
            )
            place = session.begin(begun.sequence, begun.offset, self._sequence_size)
        return KVSequence(self, place, tenant, 0)

    def extend(self, items: Sequence[tuple[KVSequence, int]]) -> list[int]:
        """Make room in several sequences with one call, in all or none.

        Args:
            items: sequences, each once, and how many tokens more, at least 1.

        Returns:
            The new lengths.

        Raises:
            The errors of :meth:`KVSequence.extend`; the message names the sequence.
        """
        session = self._session
        counts = [_number(n, "a number of tokens", 1, _U32) for _, n in items]
        if len({seq._place for seq, _ in items}) != len(items) or any(
            seq._cache is not self for seq, _ in items
        ):
            raise errors.InvalidArgument(
                "a sequence is named twice, or is of another KV cache", "name each once"
            )
        if len(items) > session.max_batch:
            raise errors.InvalidArgument(
                f"{len(items)} sequences in one call", f"pass at most {session.max_batch}"
            )
        with contextlib.ExitStack() as stack:
            # in one order everywhere, so that two calls cannot wait for each other
            for seq in sorted((seq for seq, _ in items), key=lambda s: s.handle):
                stack.enter_context(seq._calling())
            calls: list[tuple[KVSequence, int]] = []
            lengths: list[int] = []
            for (seq, _), count in zip(items, counts, strict=True):
                seq._settle()
                lengths.append(seq._length + count)
                if lengths[-1] > seq._kernel:
                    calls.append((seq, lengths[-1] - seq._kernel))
            self._extend(calls)
            for seq, count in calls:
                seq._kernel += count
            for (seq, _), length in zip(items, lengths, strict=True):
                seq._length = length
            return lengths

    def _extend(self, calls: Sequence[tuple[KVSequence, int]]) -> None:
        session = self._session
        # beyond 32 bits it is too many as well
        array = (abi.KVExtend * len(calls))(
            *(abi.KVExtend(sequence=seq.handle, tokens=count) for seq, count in calls)
        )
        index = 0
        try:
            if len(calls) == 1:
                session.device.ioctl(abi.IOC_KV_EXTEND, array[0])
            elif calls:
                session.batch(abi.IOC_KV_EXTEND_BATCH, array)
            return
        except BatchError as error:
            index, number = min(error.index, len(calls) - 1), error.errno
        except OSError as error:
            number = error.errno or 0
        seq, count = calls[index]
        raise session.error(
            number, f"cannot extend sequence {seq.handle} to {seq._kernel + count} tokens"
        )

    def restore(
        self,
        path: str | os.PathLike[str],
        fingerprint: str,
        tenant: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> tuple[KVSequence, npt.NDArray[np.int64]]:
        """Make a sequence of a file that :meth:`KVSequence.save` wrote.

        All of the file is read and checked before anything is allocated. The full
        blocks are published again.

        Args:
            path: the file.
            fingerprint: as it was saved with.
            tenant: whose the sequence is to be.
            progress: called with the bytes checked and the bytes to check.

        Returns:
            The sequence and the ids of its tokens.

        Raises:
            KVFileError: the file is damaged, not a saved sequence, of another model or
                for another geometry; the reason says which.
            TooManySequences, CacheFull, QuotaExceeded, OutOfMemory: there is no room.
            OSError: the file cannot be read.
        """
        from .kvfile import restore

        return restore(self, path, fingerprint, tenant, progress)

    # -- questions -----------------------------------------------------------

    def info(self) -> KVInfo:
        """Ask the kernel for layout and counters.

        Raises:
            Closed: the KV cache was closed.
        """
        with self._session.calling():
            info = self._session.call(abi.IOC_KV_INFO, abi.KVInfo())
        return KVInfo(**{name: getattr(info, name) for name in KVInfo.__dataclass_fields__})

    def reset(self) -> None:
        """Forget all published blocks.

        Raises:
            CacheInUse: a sequence holds blocks.
            Closed: the KV cache was closed.
        """
        with self._session.calling():
            self._session.call(
                abi.IOC_KV_RESET, abi.KVReset(), "cannot forget the published blocks"
            )
        self._known.clear()

    def events(self, timeout: float | None = None) -> Iterator[KVEvent]:
        """Yield what was published, removed and cleared, as it happens.

        Whoever reads an event takes it: of several readers each gets a part. One that
        waits keeps the descriptor open, also after :meth:`close`.

        Args:
            timeout: seconds without an event that end the iteration; 0: only those
                that are there; None: wait for ever.

        Raises:
            InvalidArgument: the KV cache was made without events.
            Closed: the KV cache was closed.
        """
        size = ctypes.sizeof(abi.KVEvent)
        while True:
            with self._session.calling():
                try:
                    data = self._session.device.read(64 * size, timeout)
                except OSError as error:
                    remedy = "make the KV cache with events=True"
                    raise self._session.error(
                        error.errno or 0,
                        "cannot read events",
                        remedy if error.errno == errno.EINVAL else None,
                    ) from None
            if not data:
                return
            for begin in range(0, len(data), size):
                event = _event(abi.KVEvent.from_buffer_copy(data, begin))
                if event.type == "removed":
                    self._known.drop(event.tenant, event.hash)
                elif event.type == "cleared":
                    self._known.clear()
                yield event

    @property
    def closed(self) -> bool:
        """True once :meth:`close` was called."""
        return self._session.closed

    def fileno(self) -> int:
        """Return the descriptor, to poll or to send over a socket; -1 once it is closed."""
        return self._session.device.fileno()

    # -- the end -------------------------------------------------------------

    def close(self) -> None:
        """Refuse further calls and end the sequences that nothing shows.

        Arrays stay valid; descriptor and mapping close with the last of them. A
        second close does nothing.
        """
        with self._session.locked():
            places = [p for p in self._session.live.values() if isinstance(p, _Place)]
        self._session.close()
        for place in places:
            seq = place.user() if place.user is not None else None
            if seq is not None:
                seq._roots.clear()

    def __del__(self) -> None:
        session = getattr(self, "_session", None)
        if session is not None and not session.closed:
            session.post(Event.CLIENT_GONE)

    def __repr__(self) -> str:
        """Name the descriptor and the number of sequences."""
        state = "closed" if self.closed else f"fd {self.fileno()}"
        return f"<KVCache {state}, {len(self._session.live)} sequences>"


def _spots(
    groups: Sequence[KVGroup], layout: Sequence[abi.KVGroup]
) -> dict[tuple[bool, int], _Spot]:
    spots = {}
    for number, (group, place) in enumerate(zip(groups, layout, strict=True)):
        state = group.state is not None
        planes = 1 if state else 2
        for i, layer in enumerate(_layers(group)):
            spots[state, layer] = _Spot(
                group=number,
                offsets=tuple(
                    place.offset + plane * place.stride
                    for plane in range(i * planes, (i + 1) * planes)
                ),
                token_bytes=place.token_bytes,
                shape=_shape(group),
                dtype=np.dtype(group.dtype),
            )
    return spots


def _event(event: abi.KVEvent) -> KVEvent:
    stored = event.type == abi.KVEventType.STORED
    parent = bytes(event.parent.bytes)
    try:
        name = abi.KVEventType(event.type).name.lower()
    except ValueError:
        name = str(event.type)
    return KVEvent(
        type=name,
        tenant=event.tenant,
        group=event.group,
        hash=bytes(event.hash.bytes),
        block=event.block,
        parent=parent if stored and any(parent) else None,
    )
