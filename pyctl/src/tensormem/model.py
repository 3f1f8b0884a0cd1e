# SPDX-License-Identifier: MIT
"""Model slots: a model that is replaced while programs use it.

::

    slot = tensormem.slot("chat")
    with slot.acquire() as gen:  # whichever generation is active
        weights = gen.tensor("blk.0.attn_q.weight")  # no copy, read-only

    with tensormem.slot("chat", write=True) as slot:
        slot.swap("better.gguf")  # stage, check, commit

Who keeps what alive: a generation is mapped once. Every array of it holds on to that
mapping, the mapping to the generation, and the kernel keeps the generation's bytes as they
are until the last of them is gone. So ``gen`` may be closed, committed over, rolled back or
removed, and the slot closed, in any order, and in a child of ``fork()`` too: arrays stay
valid and unchanged. There is one exception: a *cached* generation is as good as its file. Who
opens that for writing ends the generation, and touching an array of it raises SIGBUS from then
on.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import operator
import os
import re
import select
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, Protocol, SupportsIndex, TypeVar

import numpy as np
import numpy.typing as npt

from . import abi, errors, gguf, safetensors
from .abi import OpenFlag, StageFlag
from .closing import Closing
from .device import DEFAULT_PATH, Device, KernelDevice
from .session import Event, Held, Session
from .units import format_size

__all__ = [
    "Entry",
    "Generation",
    "GenerationInfo",
    "Header",
    "Progress",
    "Slot",
    "SlotInfo",
    "Source",
    "Staging",
    "open_slot",
    "parse_header",
    "read_header",
    "slot",
]

#: A file to stage: its path, a descriptor, or an open file.
Source = str | os.PathLike[str] | int | io.IOBase

#: Called with the bytes that are done and those there are.
Report = Callable[[int, int], None]

_NAME = re.compile(rf"[A-Za-z0-9_-][A-Za-z0-9._-]{{0,{abi.MODEL_NAME - 2}}}", re.ASCII)

#: Files of sysfs beside the folders of slots.
_TAKEN = (
    "slots", "generations", "held", "evictable", "evicted", "reloads", "reload_failed",
)  # fmt: skip

_HEX = re.compile(rf"[0-9a-fA-F]{{{2 * abi.SHA256}}}", re.ASCII)
_U64 = (1 << 64) - 1

#: Headers that a slot remembers: of its places in the kernel, and one that is on its way out.
_REMEMBERED = 4

_S = TypeVar("_S", bound=abi.Struct)


class Entry(Protocol):
    """One tensor of a model: of :class:`gguf.Entry` or :class:`safetensors.Entry`."""

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def code(self) -> str:
        """Its dtype, as the file spells it."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its dimensions, in numbers."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of its array."""
        ...

    @property
    def start(self) -> int:
        """First byte, counted from the start of the data."""
        ...

    @property
    def stop(self) -> int:
        """One past the last byte."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        ...

    def view(self, data: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        """Return the array that these bytes of the tensor are, without a copy."""
        ...


#: What a model's file says about itself.
Header = gguf.Header | safetensors.Header


class Progress(NamedTuple):
    """How far a load is: bytes loaded, and bytes of the model."""

    loaded: int
    size: int


@dataclass(frozen=True)
class SlotInfo:
    """What a slot has.

    Attributes:
        active: number of the generation that is acquired; 0 for none.
        previous: of the one that a rollback would make active; 0 for none.
        staged: of the one being loaded, or waiting for a commit; 0 for none.
        last: the number that was given out last.
        generations: in the slot, or still held by a reader.
        uid: who owns the slot.
        gid: its group.
        mode: its permissions, as those of a file.
    """

    active: int
    previous: int
    staged: int
    last: int
    generations: int
    uid: int
    gid: int
    mode: int


@dataclass(frozen=True)
class GenerationInfo:
    """What the kernel says about a generation.

    Attributes:
        number: its number in the slot.
        state: ``loading``, ``staged``, ``active``, ``previous``, ``retired`` (out of the
            slot, held by readers) or ``failed``.
        size: bytes of the model.
        loaded: bytes of it that are loaded.
        private_bytes: memory that only this generation holds.
        shared_bytes: memory that it shares with others of the slot.
        readers: descriptors of it, this one too.
        error: of a failed one the errno that says why, else 0.
        mapping: how its whole chunks are mapped: ``block``, ``cont`` or ``pages``.
        cached: it stays in its file.
        keep: it stays in the slot when whoever staged it goes away.
        evictable: chunks of it may go when memory is wanted, and come back from its file.
        evicted_bytes: those that are in its file only, at the moment.
        reloads: chunks that have come back.
    """

    number: int
    state: str
    size: int
    loaded: int
    private_bytes: int
    shared_bytes: int
    readers: int
    error: int
    mapping: str
    cached: bool
    keep: bool
    evictable: bool
    evicted_bytes: int
    reloads: int


# -- files -----------------------------------------------------------------------------


class _Window(io.RawIOBase):
    """A file's part, read by position: nobody's file offset moves."""

    def __init__(self, pread: Callable[[int, int], bytes], size: int, base: int = 0) -> None:
        super().__init__()
        self._pread, self._size, self._base = pread, size, base
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + (self._size if whence == os.SEEK_END else 0)
        return self._position

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")
        count = max(0, min(len(target), self._size - self._position))
        data = self._pread(count, self._base + self._position) if count else b""
        target[: len(data)] = data
        self._position += len(data)
        return len(data)


def parse_header(path: str, file: io.BufferedIOBase | io.RawIOBase) -> Header:
    """Read and check the header of an open file; see :func:`read_header`."""
    file.seek(0)
    start = b""
    while len(start) < 9 and (more := file.read(9 - len(start))):
        start += more
    if start.startswith(gguf.MAGIC):
        return gguf.parse_header(path, file)
    if start[8:] != b"{":
        raise errors.ModelFileError(path, None, "magic", "this is neither GGUF nor safetensors")
    return safetensors.parse_header(path, file)


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of a GGUF or safetensors file; the data is not read.

    Raises:
        ModelFileError: the file is damaged or neither.
        OSError: the file cannot be opened or read.
    """
    with open(path, "rb", buffering=0) as file:
        return parse_header(os.fspath(path), file)


@contextlib.contextmanager
def _opened(source: Source) -> Iterator[tuple[int, str]]:
    """Give a descriptor and a name of a file."""
    if isinstance(source, int):
        os.fstat(source)  # what is not one is the caller's mistake and no affair of the slot's
        yield source, f"descriptor {source}"
    elif isinstance(source, io.IOBase):
        yield source.fileno(), str(getattr(source, "name", "file"))
    else:
        fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield fd, os.fspath(source)
        finally:
            os.close(fd)


def _denied(fd: int, watched: bool) -> tuple[str, str] | None:
    """Return cause and remedy where it is for the file's sake that EACCES was given."""
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY:
        return "the file is not open for reading", "open it for that"
    if watched and os.geteuid() not in (0, os.fstat(fd).st_uid):
        return (
            "the file is another user's, and only its owner can have it watched",
            "load it whole, without cached=True or evictable=True, or do it as its owner or root",
        )
    return None


def _file_size(fd: int) -> int:
    size = os.fstat(fd).st_size
    if not size:  # a block device
        with contextlib.suppress(OSError):
            here = os.lseek(fd, 0, os.SEEK_CUR)
            size = os.lseek(fd, 0, os.SEEK_END)
            os.lseek(fd, here, os.SEEK_SET)
    return size


# -- arguments -------------------------------------------------------------------------


def _number(value: SupportsIndex, what: str) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise errors.InvalidArgument(f"{what} of {value!r} is not an integer") from None
    if not 0 <= number <= _U64:
        raise errors.InvalidArgument(f"{what} of {number} is not possible", "pass one from 0")
    return number


def _check_name(name: str) -> bytes:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise errors.InvalidArgument(
            f"{name!r} cannot be the name of a model slot",
            f"use up to {abi.MODEL_NAME - 1} letters, digits, '.', '_' and '-', and no '.' first",
        )
    if name in _TAKEN:
        raise errors.InvalidArgument(
            f"{name!r} cannot be the name of a model slot, sysfs has a file of that name there",
            "choose another",
        )
    return name.encode()


def _stage_flags(cached: bool, evictable: bool, keep: bool) -> StageFlag:
    if cached and evictable:
        raise errors.InvalidArgument(
            "a cached generation is not evictable", "pass cached=True or evictable=True"
        )
    flags = StageFlag.CACHED if cached else StageFlag(0)
    flags |= StageFlag.EVICTABLE if evictable else StageFlag(0)
    return flags | (StageFlag.KEEP if keep else StageFlag(0))


def _digest(value: str | bytes) -> bytes:
    if isinstance(value, bytes) and len(value) == abi.SHA256:
        return value
    if isinstance(value, str) and _HEX.fullmatch(value):
        return bytes.fromhex(value)
    raise errors.InvalidArgument(
        f"{value!r} is not a SHA-256", f"pass {2 * abi.SHA256} hexadecimal digits, or the bytes"
    )


def _copy(target: Any, data: bytes) -> None:
    target[: len(data)] = data


# -- the kernel's part -----------------------------------------------------------------


class _Session(Session):
    """A descriptor of a slot or a generation, kept open while calls are under way.

    It has no books: what arrays show is kept by the mapping that is their base.
    """

    def __init__(self, device: Device, what: str) -> None:
        super().__init__(device)
        self.what = what

    def give_back(self, gone: Sequence[Held]) -> None:
        """Return nothing: no names are held."""

    def error(
        self, number: int, cause: str | None = None, remedy: str | None = None
    ) -> errors.TensormemError:
        """Return the exception for an errno; the cause says what could not be done."""
        plain = errors.from_errno(number, None, remedy, model=True)
        if cause is None or type(plain) is errors.TensormemError:
            return errors.from_errno(number, cause, remedy, model=True)
        return errors.from_errno(number, f"{cause}, {plain.default_cause}", remedy, model=True)

    def no_longer(self) -> errors.Closed:
        """Return the exception for a call after close()."""
        return errors.Closed(f"{self.what} is closed", "open or acquire it again")

    def gone(self) -> None:
        """Say that the object for the descriptor died."""
        if not self.closed:
            self.post(Event.CLIENT_GONE)

    def describe(self) -> GenerationInfo:
        """Ask the kernel about a generation."""
        with self.calling():
            info = self.call(abi.IOC_MODEL_INFO, abi.ModelInfo(), f"cannot describe {self.what}")
        flags = StageFlag(info.flags)
        return GenerationInfo(
            number=info.generation,
            state=_word(abi.ModelState, info.state),
            size=info.size,
            loaded=info.loaded,
            private_bytes=info.private_bytes,
            shared_bytes=info.shared_bytes,
            readers=info.readers,
            error=info.error,
            mapping=_word(abi.Mapping, info.mapping),
            cached=StageFlag.CACHED in flags,
            keep=StageFlag.KEEP in flags,
            evictable=StageFlag.EVICTABLE in flags,
            evicted_bytes=info.evicted_bytes,
            reloads=info.reloads,
        )

    def pread(self, size: int, offset: int) -> bytes:
        """Read a generation's bytes."""
        try:
            return self.device.pread(size, offset)
        except OSError as error:
            raise self.failure(error.errno or 0, f"cannot read {self.what}") from None

    def failure(self, number: int, cause: str) -> errors.TensormemError:
        """Return the exception for an errno; that of a failed generation says why it failed."""
        if number == errno.ESTALE:
            with contextlib.suppress(errors.TensormemError):
                reason = self.describe().error
                if reason:
                    why = errors.from_errno(reason, model=True)
                    return errors.GenerationFailed(f"{cause}, it has failed: {why.cause}")
        return self.error(number, cause)

    def header(self) -> Header:
        """Read and check the header of a generation."""
        size = self.describe().size
        with self.calling():
            return parse_header(self.what, _Window(self.pread, size))


def _word(enum: type[abi.ModelState] | type[abi.Mapping], value: int) -> str:
    try:
        return enum(value).name.lower()
    except ValueError:
        return str(value)


class Generation(Closing):
    """One version of the model, for a reader. Get one from :meth:`Slot.acquire`.

    Its bytes never change. Used as a context manager it is closed at the end of the block; one
    that is dropped closes itself; arrays keep what they show.
    """

    def __init__(
        self, device: Device, name: str = "", headers: dict[int, Header] | None = None
    ) -> None:
        """Not for users; see :meth:`Slot.acquire` and :meth:`from_fd`."""
        self._session = _Session(device, "the generation")
        try:
            info = self._session.describe()
        except BaseException:
            self._session.close()
            raise
        self._number, self._size, self._slot = info.number, info.size, name
        self._session.what = f"generation {info.number}" + (f" of {name!r}" if name else "")
        self._headers = {} if headers is None else headers
        self._data: npt.NDArray[np.uint8] | None = None
        self._entries: Mapping[str, Entry] | None = None

    @classmethod
    def from_fd(cls, fd: int) -> Generation:
        """Use a generation that another process acquired, whose descriptor came over a socket.

        Args:
            fd: the descriptor; it belongs to the object from now on, also when this fails.

        Raises:
            IncompatibleModule: not a generation.
        """
        return cls(KernelDevice.of(fd))

    @property
    def number(self) -> int:
        """Its number in the slot, from 1."""
        return self._number

    @property
    def size(self) -> int:
        """Bytes of the model."""
        return self._size

    @property
    def state(self) -> str:
        """What has become of it; see :class:`GenerationInfo`."""
        return self.info().state

    @property
    def closed(self) -> bool:
        """True once :meth:`close` was called."""
        return self._session.closed

    def fileno(self) -> int:
        """Return the descriptor, a read-only file of the model's bytes; -1 once it is closed."""
        return self._session.device.fileno()

    def info(self) -> GenerationInfo:
        """Ask the kernel about it.

        Raises:
            Closed: it was closed.
        """
        return self._session.describe()

    # -- contents ------------------------------------------------------------

    @property
    def header(self) -> Header:
        """What the model's file says about itself.

        Raises:
            ModelFileError: it is damaged, or neither GGUF nor safetensors.
            StillLoading, GenerationFailed: the generation is not there.
            Closed: it was closed before anybody asked.
        """
        found = self._headers.get(self._number)
        if found is None:
            found = self._session.header()
            while len(self._headers) >= _REMEMBERED:
                self._headers.pop(min(self._headers), None)
            self._headers[self._number] = found
        return found

    @property
    def tensors(self) -> Mapping[str, Entry]:
        """Name -> what is known of each tensor: ``code``, ``dtype``, ``shape``, ``nbytes``.

        Raises:
            As :attr:`header`.
        """
        if self._entries is None:
            self._entries = {entry.name: entry for entry in self.header.entries}
        return self._entries

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the file says beside the tensors.

        Raises:
            As :attr:`header`.
        """
        return self.header.metadata

    def buffer(self) -> memoryview:
        """Return the bytes of the model, read-only; they keep the generation.

        Raises:
            StillLoading, GenerationFailed: the generation is not there.
            OutOfMemory: there is no room in the address space.
            Closed: it was closed before anybody asked.
        """
        return self._bytes().data

    def tensor(self, name: str) -> npt.NDArray[Any]:
        """Return a tensor: an array on the generation's memory, read-only, without a copy.

        ``BF16`` comes as ``uint16``; quantized types come as blocks, see :data:`gguf.TYPES`.

        Raises:
            InvalidArgument: the model has no such tensor.
            ModelFileError: the header is damaged, or a BOOL is neither 0 nor 1.
            As :meth:`buffer`.
        """
        entry = self._entry(name)
        begin = self.header.data_start
        part = self._bytes()[begin + entry.start : begin + entry.stop]
        if entry.code == "BOOL" and bool((part > 1).any()):
            what = "a BOOL is neither 0 nor 1"
            raise errors.ModelFileError(self._session.what, name, "data", what)
        return entry.view(part)

    def dequantize(self, name: str) -> npt.NDArray[np.float32]:
        """Return a tensor's numbers as float32, a copy unless they are.

        Raises:
            InvalidArgument: it is neither floats nor ``Q8_0`` nor ``Q4_0``, or there is none.
            As :meth:`tensor`.
        """
        return gguf.dequantize(self.tensor(name), self._entry(name).code)

    def _entry(self, name: str) -> Entry:
        entry = self.tensors.get(name)
        if entry is None:
            raise errors.InvalidArgument(
                f"{self._session.what} has no tensor {name!r}", "generation.tensors has the names"
            )
        return entry

    def _bytes(self) -> npt.NDArray[np.uint8]:
        if self._data is None:
            state = self.info().state
            if state in ("loading", "failed"):
                number = errno.EAGAIN if state == "loading" else errno.ESTALE
                raise self._session.failure(number, f"cannot map {self._session.what}")
            with self._session.calling():
                try:
                    mapping = self._session.device.map(0, self._size, write=False)
                except (OSError, OverflowError) as error:
                    number = getattr(error, "errno", errno.ENOMEM)
                    cause = f"cannot map {format_size(self._size)} of {self._session.what}"
                    if number != errno.ENOMEM:
                        raise self._session.failure(number, cause) from None
                    raise errors.OutOfMemory(
                        f"{cause} ({error})", "raise the limit on address space (ulimit -v)"
                    ) from None
            # a mapping ends with the last array that has it as its base
            self._data = np.frombuffer(mapping, np.uint8)
        return self._data

    # -- news ----------------------------------------------------------------

    def superseded(self) -> bool:
        """Say whether it is not the active one any more, or has failed.

        Raises:
            Closed: it was closed.
        """
        return bool(self._poll(select.POLLPRI, 0) & select.POLLPRI)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is not the active one any more.

        Args:
            timeout: seconds, or None to wait for ever.

        Returns:
            Whether that is so.

        Raises:
            GenerationFailed: it is cached and its file was opened for writing.
            Closed: it was closed.
        """
        events = self._poll(select.POLLPRI, timeout)
        if events & select.POLLERR:
            raise self._session.failure(errno.ESTALE, f"cannot go on with {self._session.what}")
        return bool(events)

    def _poll(self, events: int, timeout: float | None) -> int:
        with self._session.calling():
            return self._session.device.poll(events, timeout)

    # -- the end -------------------------------------------------------------

    def close(self) -> None:
        """Refuse further calls. Arrays stay valid; a second close does nothing."""
        self._session.close()
        self._data = None

    def __del__(self) -> None:
        session = getattr(self, "_session", None)
        if session is not None:
            session.gone()

    def __repr__(self) -> str:
        """Name slot, number and size."""
        what = f"{self._session.what}: {format_size(self._size)}"
        return f"<tensormem.Generation: {what}{', closed' if self.closed else ''}>"


class Staging:
    """A generation that is being loaded, for who will commit it; :meth:`Slot.stage` makes one.

    Used as a context manager it is aborted at the end of the block unless it was committed, or
    staged with ``keep``. So is one that is dropped.
    """

    def __init__(self, slot: Slot, device: Device, number: int, keep: bool, what: str) -> None:
        """Not for users; see :meth:`Slot.stage`."""
        self._slot, self._number, self._keep, self._what = slot, number, keep, what
        self._session = _Session(device, f"generation {number} of {slot.name!r}")
        self._pid = os.getpid()
        self._done = False

    @property
    def number(self) -> int:
        """The generation's number in the slot."""
        return self._number

    @property
    def closed(self) -> bool:
        """True once it was committed, aborted or closed."""
        return self._session.closed

    def fileno(self) -> int:
        """Return the generation's descriptor; -1 once it is closed."""
        return self._session.device.fileno()

    def info(self) -> GenerationInfo:
        """Ask the kernel about the generation.

        Raises:
            Closed: it was committed, aborted or closed.
        """
        return self._session.describe()

    def progress(self) -> Progress:
        """Say how far the load is.

        Raises:
            As :meth:`info`.
        """
        info = self.info()
        return Progress(info.loaded, info.size)

    def wait(
        self, report: Report | None = None, timeout: float | None = None, interval: float = 0.1
    ) -> bool:
        """Wait until it is loaded.

        Args:
            report: called every interval, and at the end, with the bytes that are loaded and the
                bytes there are.
            timeout: seconds, or None to wait as long as it takes.
            interval: seconds between reports.

        Returns:
            True; False when the time was over.

        Raises:
            WrongContents: the file is shorter than was promised, or has another SHA-256.
            ReadFailed, QuotaExceeded, PoolExhausted, OutOfMemory: as they say. The active
                generation is untouched.
            LoadCancelled: somebody aborted it.
            TensormemError: another errno of the file system.
            Closed: it was committed, aborted or closed.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            info = self.info()
            if report is not None:
                report(info.loaded, info.size)
            if info.state == "failed":
                raise self._session.error(info.error, f"cannot load {self._what}")
            if info.state == "retired":
                raise self._session.error(errno.ECANCELED, f"cannot load {self._what}")
            if info.state != "loading":
                return True
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                return False
            step = interval if left is None else min(interval, left)
            with self._session.calling():
                self._session.device.poll(select.POLLIN, step if report is not None else left)

    def check(self) -> Header:
        """Read and check the header of what was loaded.

        Raises:
            ModelFileError: it is damaged, or neither GGUF nor safetensors.
            StillLoading, GenerationFailed: there is nothing to read.
            Closed: it was committed, aborted or closed.
        """
        return self._session.header()

    def commit(self) -> int:
        """Make it the active generation and return its number.

        Raises:
            StillLoading: call :meth:`wait` first.
            GenerationFailed: loading failed.
            NoSuchGeneration: it was committed or aborted by somebody else.
            Closed: it was committed, aborted or closed.
        """
        with self._session.calling():
            self._slot.commit(self._number)
        self._done = True
        self.close()
        return self._number

    def abort(self) -> None:
        """Give it up; the active generation is untouched.

        Raises:
            NoSuchGeneration: it was committed or aborted by somebody else.
            Closed: it was committed, aborted or closed.
        """
        with self._session.calling():
            self._slot.abort(self._number)
        self._done = True
        self.close()

    def close(self) -> None:
        """Let go of it: unless it was committed, or is loaded and to be kept, it is aborted."""
        self._session.close()

    def __del__(self) -> None:
        session = getattr(self, "_session", None)
        if session is not None:
            session.gone()

    def __enter__(self) -> Staging:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Abort it unless it was committed or is to be kept; close."""
        # a child of fork() ends by leaving the block, too: the load is its parent's
        if not self._done and not self.closed and self._pid == os.getpid():
            # somebody else was first, or the slot is closed or not there any more
            with contextlib.suppress(errors.NoSuchGeneration, errors.NoSuchSlot, errors.Closed):
                if not self._keep or self.info().state != "staged":
                    self.abort()
        self.close()

    def __repr__(self) -> str:
        """Name slot, number and file."""
        return f"<tensormem.Staging {self._number} of {self._slot.name!r}: {self._what}>"


class Slot(Closing):
    """A model slot. Get one from :func:`slot` or :meth:`Client.slot`.

    All methods may be called from any thread. What was acquired, described or seen by
    :meth:`watch` is known to the object, not to the thread: who watches has an object of its own.
    """

    def __init__(self, device: Device, name: str) -> None:
        """Not for users; see :func:`slot`."""
        self._session = _Session(device, f"model slot {name!r}")
        self._name = name
        self._headers: dict[int, Header] = {}

    @property
    def name(self) -> str:
        """Its name."""
        return self._name

    @property
    def closed(self) -> bool:
        """True once :meth:`close` was called."""
        return self._session.closed

    def fileno(self) -> int:
        """Return the descriptor, for os.fstat, os.fchmod, os.fchown; -1 once it is closed."""
        return self._session.device.fileno()

    def _call(self, request: int, argument: _S, cause: str) -> _S:
        with self._session.calling():
            try:
                return self._session.call(request, argument, cause)
            except errors.NoSuchGeneration:
                if self._session.device.poll(0, 0) & select.POLLHUP:
                    raise errors.NoSuchSlot(
                        f"model slot {self._name!r} was removed",
                        "open it again, with create=True if it is to be made again",
                    ) from None
                raise

    def info(self) -> SlotInfo:
        """Ask the kernel what it has.

        Raises:
            NoSuchSlot: it was removed.
            Closed: it was closed.
        """
        found = self._call(
            abi.IOC_MODEL_SLOT, abi.ModelSlot(), f"cannot describe {self._session.what}"
        )
        with self._session.calling():
            status = os.fstat(self.fileno())
        return SlotInfo(
            active=found.active,
            previous=found.previous,
            staged=found.staged,
            last=found.last,
            generations=found.generations,
            uid=status.st_uid,
            gid=status.st_gid,
            mode=status.st_mode & 0o7777,
        )

    # -- readers -------------------------------------------------------------

    def acquire(self, number: SupportsIndex = 0) -> Generation:
        """Become a reader of a generation.

        Args:
            number: which: active, previous or (with ``write``) staged; 0 for whichever is active.

        Raises:
            NoSuchGeneration: the slot does not have it, or has nothing active yet.
            SlotDenied: it is staged, and the slot was opened without ``write``.
            NoSuchSlot: it was removed.
            Closed: it was closed.
        """
        which = _number(number, "a generation")
        what = f"generation {which}" if which else "the active generation"
        argument = abi.ModelAcquire(generation=which)
        cause = f"cannot acquire {what} of {self._name!r}"
        self._call(abi.IOC_MODEL_ACQUIRE, argument, cause)
        return Generation(self._session.device.other(argument.fd), self._name, self._headers)

    def watch(self, timeout: float | None = None) -> Iterator[int]:
        """Yield the number of the active generation whenever it is one that is new here.

        New is what this object has not acquired, described or yielded yet. It ends when
        the slot is removed.

        Args:
            timeout: seconds without news that end the iteration; None: wait for ever.

        Raises:
            Closed: the slot was closed.
        """
        while True:
            with self._session.calling():
                events = self._session.device.poll(select.POLLIN, timeout)
            if not events:
                return
            try:
                number = self.info().active
            except errors.NoSuchSlot:
                return
            if number:
                yield number

    # -- who changes it --------------------------------------------------------

    def stage(
        self,
        source: Source,
        *,
        offset: SupportsIndex = 0,
        size: SupportsIndex = 0,
        cached: bool = False,
        evictable: bool = False,
        sha256: str | bytes | None = None,
        keep: bool = False,
    ) -> Staging:
        """Begin to load a file as a new generation, beside the active one.

        Args:
            source: a path, a descriptor or an open file. It may be closed at once.
            offset: where the model begins in the file.
            size: its bytes; 0 for all that follows.
            cached: leave it in its file, to be mapped from the page cache. For when two copies
                do not fit into memory; nobody may write to the file as long as the generation
                exists.
            evictable: let chunks of it go when memory is wanted, least recently used first, and
                come back from the file when they are touched or read. It shares nothing with
                other generations. Not with ``cached``.
            sha256: of these bytes; the load fails when it is another.
            keep: when the staging is closed or this process ends after the load, leave
                the generation in the slot, for somebody else to commit or abort.

        Raises:
            SlotBusy: another generation is staged.
            SlotDenied: the slot was opened without ``write``; or, ``cached`` or ``evictable``,
                the file is another user's.
            FileBusy: the same, and the file is open for writing.
            NotCacheable: the same, and the file system cannot say when a file changes.
            InvalidArgument: neither a regular file nor a block device, or nothing in it; both
                ``cached`` and ``evictable``.
            QuotaExceeded, PoolExhausted, OutOfMemory: there is no memory.
            NoSuchSlot: it was removed.
            Closed: it was closed.
            OSError: the file cannot be opened.
        """
        with _opened(source) as (fd, what):
            flags = _stage_flags(cached, evictable, keep)
            return self._stage(fd, what, offset, size, flags, sha256)

    def _stage(
        self,
        fd: int,
        what: str,
        offset: SupportsIndex,
        size: SupportsIndex,
        flags: StageFlag,
        sha256: str | bytes | None,
    ) -> Staging:
        argument = abi.ModelStage(
            file=fd, offset=_number(offset, "an offset"), size=_number(size, "a size")
        )
        if sha256 is not None:
            flags |= StageFlag.VERIFY
            _copy(argument.sha256, _digest(sha256))
        argument.flags = flags
        cause = f"cannot stage {what}"
        try:
            self._call(abi.IOC_MODEL_STAGE, argument, cause)
        except errors.SlotDenied:
            watched = flags & (StageFlag.CACHED | StageFlag.EVICTABLE)
            reason = _denied(fd, bool(watched))
            if reason is None:
                raise
            raise errors.SlotDenied(f"{cause}, {reason[0]}", reason[1]) from None
        device = self._session.device.other(argument.fd)
        return Staging(self, device, argument.generation, StageFlag.KEEP in flags, what)

    @contextlib.contextmanager
    def load(
        self,
        source: Source,
        *,
        offset: SupportsIndex = 0,
        size: SupportsIndex = 0,
        cached: bool = False,
        evictable: bool = False,
        sha256: str | bytes | None = None,
        keep: bool = False,
        check: bool = True,
        report: Report | None = None,
    ) -> Iterator[Staging]:
        """Load and check a file, and give the staging for the block to commit or abort.

        What goes wrong or interrupts it aborts; ``keep`` is for what is loaded and right.

        Args:
            source: as for :meth:`stage`, and so are the next six.
            offset: see there.
            size: see there.
            cached: see there.
            evictable: see there.
            sha256: see there.
            keep: see there.
            check: refuse what is neither GGUF nor safetensors, or has a header that is wrong.
            report: called with the bytes that are loaded and the bytes there are.

        Raises:
            ModelFileError: it was refused.
            As :meth:`stage` and :meth:`Staging.wait`.
        """
        with _opened(source) as (fd, what):
            if check:
                # before a long load; after it once more, because the file may change meanwhile
                begin = _number(offset, "an offset")
                length = _number(size, "a size") or max(0, _file_size(fd) - begin)
                parse_header(what, _Window(lambda n, at: os.pread(fd, n, at), length, begin))
            flags = _stage_flags(cached, evictable, keep)
            staging = self._stage(fd, what, offset, size, flags, sha256)
        with staging:
            try:
                staging.wait(report)
                if check:
                    staging.check()
            except BaseException:
                with contextlib.suppress(errors.NoSuchGeneration, errors.NoSuchSlot):
                    staging.abort()
                raise
            yield staging

    def swap(
        self,
        source: Source,
        *,
        offset: SupportsIndex = 0,
        size: SupportsIndex = 0,
        cached: bool = False,
        evictable: bool = False,
        sha256: str | bytes | None = None,
        check: bool = True,
        report: Report | None = None,
    ) -> int:
        """Load a file, check it and make it the active generation; return its number.

        Whatever goes wrong or interrupts it, the active generation stays.

        Args:
            source: as for :meth:`load`, and so are the others.
            offset: see there.
            size: see there.
            cached: see there.
            evictable: see there.
            sha256: see there.
            check: see there.
            report: see there.

        Raises:
            As :meth:`load`.
        """
        with self.load(
            source,
            offset=offset,
            size=size,
            cached=cached,
            evictable=evictable,
            sha256=sha256,
            check=check,
            report=report,
        ) as staging:
            return staging.commit()

    def commit(self, number: SupportsIndex) -> None:
        """Make the staged generation the active one; what was active is kept as the previous one.

        Raises:
            NoSuchGeneration: it is not the staged one.
            StillLoading, GenerationFailed: it is not there, or never will be.
            SlotDenied, NoSuchSlot, Closed: as they say.
        """
        self._which(abi.IOC_MODEL_COMMIT, number, "commit")

    def abort(self, number: SupportsIndex) -> None:
        """Give up the staged generation.

        Raises:
            NoSuchGeneration: it is not the staged one.
            SlotDenied, NoSuchSlot, Closed: as they say.
        """
        self._which(abi.IOC_MODEL_ABORT, number, "abort")

    def rollback(self, number: SupportsIndex = 0) -> int:
        """Let the active and the previous generation change places.

        Args:
            number: that of the previous one, or 0 for whichever it is.

        Returns:
            The one that is active now.

        Raises:
            NoSuchGeneration: there is no previous one, or not that one.
            GenerationFailed: it is cached and its file was changed.
            SlotDenied, NoSuchSlot, Closed: as they say.
        """
        return self._which(abi.IOC_MODEL_ROLLBACK, number, "roll back to")

    def _which(self, request: int, number: SupportsIndex, verb: str) -> int:
        which = _number(number, "a generation")
        what = f"generation {which}" if which else "the previous generation"
        argument = abi.ModelWhich(generation=which)
        self._call(request, argument, f"cannot {verb} {what} of {self._name!r}")
        return int(argument.generation)

    def evict(self, number: SupportsIndex = 0, size: SupportsIndex = 0) -> int:
        """Let chunks of an evictable generation go now, least recently used first.

        They come back from the file when somebody touches or reads them.

        Args:
            number: that of the generation, or 0 for whichever is active.
            size: bytes, how many at least; 0 for all that can.

        Returns:
            The bytes given back: fewer when there are no more, or when others hold them.

        Raises:
            NoSuchGeneration: the slot does not have it.
            InvalidArgument: it is not evictable.
            SlotDenied, NoSuchSlot, Closed: as they say.
        """
        which = _number(number, "a generation")
        what = f"generation {which}" if which else "the active generation"
        argument = abi.ModelEvict(generation=which, bytes=_number(size, "a size"))
        try:
            self._call(abi.IOC_MODEL_EVICT, argument, f"cannot evict {what} of {self._name!r}")
        except errors.InvalidArgument:
            raise errors.InvalidArgument(
                f"{what} of {self._name!r} is not evictable", "stage it with evictable=True"
            ) from None
        return int(argument.bytes)

    def remove(self) -> None:
        """Take the slot away. Readers keep what they have; what is staged is aborted.

        Raises:
            SlotDenied, NoSuchSlot, Closed: as they say.
        """
        self._call(abi.IOC_MODEL_REMOVE, abi.ModelRemove(), f"cannot remove {self._session.what}")

    # -- the end -------------------------------------------------------------

    def close(self) -> None:
        """Refuse further calls. The slot stays, and so does what was acquired."""
        self._session.close()

    def __del__(self) -> None:
        session = getattr(self, "_session", None)
        if session is not None:
            session.gone()

    def __repr__(self) -> str:
        """Name it."""
        return f"<tensormem.Slot {self._name!r}{', closed' if self.closed else ''}>"


def open_slot(
    device: Device, name: str, create: bool, exclusive: bool, mode: int, write: bool
) -> Slot:
    """Open or make a slot by a client's device; see :func:`slot`."""
    argument = abi.ModelOpen()
    _copy(argument.name, _check_name(name))
    flags = OpenFlag(0)
    if create or exclusive:
        flags |= OpenFlag.CREATE | OpenFlag.WRITE
        argument.mode = _number(mode, "a mode")
    if exclusive:
        flags |= OpenFlag.EXCL
    if write:
        flags |= OpenFlag.WRITE
    argument.flags = flags
    try:
        device.ioctl(abi.IOC_MODEL_OPEN, argument)
    except OSError as error:
        number = error.errno or 0
        what = f"model slot {name!r}"
        if number == errno.ENOENT:
            raise errors.NoSuchSlot(f"there is no {what}") from None
        if number == errno.EACCES:
            raise errors.SlotDenied(
                f"this user may not open {what}{' for writing' if flags else ''}",
                "'tensormem model list' says who may; its owner can change the mode",
            ) from None
        if number == errno.EINVAL:
            raise errors.InvalidArgument(
                f"cannot open {what} with mode {mode:04o}", "a mode is one from 0 to 0666"
            ) from None
        cls = type(errors.from_errno(number, model=True))
        cause = None if cls is errors.TensormemError else f"cannot open {what}, {cls.default_cause}"
        raise errors.from_errno(number, cause or f"cannot open {what}", model=True) from None
    return Slot(device.other(argument.fd), name)


def slot(
    name: str,
    *,
    create: bool = False,
    exclusive: bool = False,
    mode: int = 0o660,
    write: bool = False,
    path: str | os.PathLike[str] = DEFAULT_PATH,
) -> Slot:
    """Open a model slot, as a client of its own that what is staged is on the bill of.

    Args:
        name: letters, digits, ``.``, ``_`` and ``-``, with no ``.`` first; at most 63. Not
            one of ``slots``, ``generations``, ``held``, ``evictable``, ``evicted``, ``reloads`` and
            ``reload_failed``.
        create: make it unless it exists; implies ``write``.
        exclusive: make it, and fail if it exists; implies ``create``.
        mode: the permissions of one that is made, less the umask: to read is to acquire,
            to write is all else.
        write: to stage, commit and so on, not only to acquire.
        path: the device node.

    Raises:
        NoSuchSlot: there is none, and it is not to be made.
        SlotExists: there is one, and ``exclusive`` was given.
        SlotDenied: its mode does not let this user.
        InvalidArgument: a bad name or mode.
        DeviceMissing: the module is not loaded.
        AccessDenied: this user may not open the device.
    """
    _check_name(name)
    device = KernelDevice(path)
    try:
        return open_slot(device, name, create, exclusive, mode, write)
    finally:
        device.close()
