# SPDX-License-Identifier: MIT
"""Give memory back to the system: by hand, and when the system is short of it.

::

    from tensormem import pressure

    print(pressure.relieve("64M").total)
    with pressure.open_source() as source:
        for action in pressure.watch(source):
            print(action.reason, action.relief.total)

The module does so by itself between its watermarks. :func:`watch` is a policy beside it: it acts
on stalls that the kernel measures (PSI) before memory is that short, and where the kernel does not
measure them, when the module's level rises.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, SupportsIndex

from . import abi, errors, system
from .abi import PressureLevel, Relief
from .closing import Closing
from .device import DEFAULT_PATH, Device, KernelDevice
from .units import parse_size

__all__ = [
    "Action", "Given", "LevelSource", "PressureStatus", "PsiSource", "Source", "open_source",
    "relieve", "set_watermarks", "status", "watch",
]  # fmt: skip

#: Bytes, or a text such as ``"64M"``.
Size = SupportsIndex | str

#: What an action of :func:`watch` gives back at least, if it can.
LEAST = 16 << 20

#: Stalls are looked for in windows of so many microseconds.
_WINDOW = 1_000_000

_U64 = (1 << 64) - 1


@dataclass(frozen=True)
class Given:
    """What a relief has given back.

    Attributes:
        wanted: bytes asked for.
        total: bytes that the system got.
        steps: of these, by step: ``chunks``, ``prefixes``, ``idle``.
    """

    wanted: int
    total: int
    steps: Mapping[str, int]


@dataclass(frozen=True)
class StepStatus:
    """How often a step was taken, and the bytes it has given."""

    calls: int
    given: int


@dataclass(frozen=True)
class PressureStatus:
    """What the module knows of memory pressure.

    Attributes:
        level: ``none``, ``low`` or ``critical``.
        available: bytes that the system has for others.
        low: the watermark below which the module gives memory back.
        high: until there is so much.
        reliefs: how often it did, also when told to.
        fruitless: of these, those that had nothing to give.
        steps: by step, in their order.
        oom: what was given before the kernel would have killed somebody.
    """

    level: str
    available: int
    low: int
    high: int
    reliefs: int
    fruitless: int
    steps: Mapping[str, StepStatus]
    oom: StepStatus


def _bytes(size: Size) -> int:
    return parse_size(size) if isinstance(size, str) else size.__index__()


def relieve(
    size: Size,
    steps: Iterable[str] = (),
    *,
    device: Device | str | os.PathLike[str] = DEFAULT_PATH,
) -> Given:
    """Give memory back to the system; needs root.

    Args:
        size: how much; whole chunks are given, and less where there is no more.
        steps: which of ``chunks``, ``prefixes``, ``idle``; all of them unless told.
        device: the device, open or its path.

    Raises:
        InvalidArgument: no size, or no such step.
        NotPermitted: the caller is not root.
        NotAvailable: the module is not loaded.
    """
    wanted = _bytes(size)
    if not 0 < wanted <= _U64:
        raise errors.InvalidArgument(
            f"{wanted} bytes cannot be given back", "ask for at least 1 byte, such as '64M'"
        )
    chosen = 0
    for step in steps:
        if step.upper() not in Relief.__members__:
            raise errors.InvalidArgument(
                f"there is no step '{step}'", f"there are {', '.join(_names())}"
            )
        chosen |= 1 << Relief[step.upper()]
    request = abi.Relieve(bytes=wanted, steps=chosen)
    with contextlib.ExitStack() as stack:
        if isinstance(device, str | os.PathLike):
            device = stack.enter_context(contextlib.closing(KernelDevice(device)))
        try:
            device.ioctl(abi.IOC_RELIEVE, request)
        except OSError as error:
            raise _refusal(error) from None
    given = dict(zip(_names(), request.step, strict=True))
    return Given(wanted, request.given, given)


def _names() -> list[str]:
    return [step.name.lower() for step in Relief]


def _refusal(error: OSError) -> errors.TensormemError:
    number = error.errno or 0
    if number == errno.EPERM:
        return errors.NotPermitted("relieving memory pressure takes root", "run it with sudo")
    if number == errno.ENOTTY:
        return errors.IncompatibleModule(
            "the loaded module cannot relieve memory pressure",
            "load a tensormem module that matches this package",
            number,
        )
    return errors.from_errno(number, "cannot relieve memory pressure")


def status(root: str | os.PathLike[str] | None = None) -> PressureStatus:
    """Read what the module knows of memory pressure.

    Args:
        root: another directory than the default, for tests.

    Raises:
        NotAvailable: the module is not loaded.
        IncompatibleModule: it knows nothing of that.
    """
    group = system.read(root).group("pressure")

    def number(name: str) -> int:
        return group.get(name) or 0

    def step(name: str) -> StepStatus:
        return StepStatus(number(f"{name}_calls"), number(f"{name}_given"))

    return PressureStatus(
        level=str(group.values.get("level", "none")),
        available=number("available"),
        low=number("low"),
        high=number("high"),
        reliefs=number("reliefs"),
        fruitless=number("fruitless"),
        steps={name: step(name) for name in _names()},
        oom=step("oom"),
    )


def set_watermarks(
    *,
    low: Size | None = None,
    high: Size | None = None,
    root: str | os.PathLike[str] | None = None,
) -> PressureStatus:
    """Set the watermarks; needs root.

    Args:
        low: below which the module gives memory back, or None to leave it; 0 for never.
        high: until there is so much, or None to leave it.
        root: another directory than the default, for tests.

    Raises:
        InvalidArgument: low above high, or high above the machine's memory.
        NotPermitted: the caller is not root.
        NotAvailable: the module is not loaded.
    """
    old = status(root)
    new_low = old.low if low is None else _bytes(low)
    new_high = old.high if high is None else _bytes(high)
    if not 0 <= new_low <= new_high:
        raise errors.InvalidArgument(
            f"a low watermark of {new_low} bytes is not below a high one of {new_high}",
            "give both, the high one above the low one",
        )
    # in an order in which they are so at every moment
    settings = [("high", new_high), ("low", new_low)]
    if new_high < old.low:
        settings.reverse()
    for name, value in settings:
        if value != getattr(old, name):
            system.write_value(f"pressure/{name}", value, root)
    return status(root)


class Source(Protocol):
    """What tells that memory is short."""

    #: How it says so: ``psi`` or ``level``.
    name: str

    def fileno(self) -> int:
        """Return what to poll for POLLPRI."""
        ...

    def fired(self) -> str | None:
        """Say why to act, after it was polled; None when it is nothing."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


class _File(Closing):
    """A file of the kernel's that can be polled."""

    def __init__(self, path: Path, flags: int) -> None:
        self._fd = os.open(path, flags | os.O_CLOEXEC)

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._fd

    def close(self) -> None:
        """Close it."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class PsiSource(_File):
    """The kernel says when tasks have waited for memory for so long within a second."""

    name = "psi"

    def __init__(self, threshold_us: int, proc: str | os.PathLike[str] | None = None) -> None:
        """Set the trigger.

        Args:
            threshold_us: microseconds of each second.
            proc: another directory than ``/proc``, for tests.

        Raises:
            OSError: the kernel has no PSI, or this user may not.
        """
        super().__init__(system.proc_path(proc) / "pressure/memory", os.O_RDWR | os.O_NONBLOCK)
        self._threshold = threshold_us
        try:
            os.write(self._fd, f"some {threshold_us} {_WINDOW}\0".encode())
        except OSError:
            self.close()
            raise

    def fired(self) -> str | None:
        """See :meth:`Source.fired`."""
        return f"tasks waited for memory for {self._threshold / 1000:g} ms within a second"


class LevelSource(_File):
    """The module's level, where the kernel has no PSI."""

    name = "level"

    def __init__(self, root: str | os.PathLike[str] | None = None) -> None:
        """Open it.

        Args:
            root: another directory than the default, for tests.
        """
        try:
            super().__init__(system.root_path(root) / "pressure/level", os.O_RDONLY)
        except FileNotFoundError:
            system.read(root).group("pressure")  # says what is missing
            raise
        self._last = self._read()

    def _read(self) -> PressureLevel:
        text = os.pread(self._fd, 64, 0).decode().strip()
        return PressureLevel[text.upper()]

    def fired(self) -> str | None:
        """See :meth:`Source.fired`."""
        before, self._last = self._last, self._read()
        if self._last <= before:
            return None
        return f"the level rose from {before.name.lower()} to {self._last.name.lower()}"


def open_source(
    threshold_us: int = 150_000,
    *,
    root: str | os.PathLike[str] | None = None,
    proc: str | os.PathLike[str] | None = None,
) -> PsiSource | LevelSource:
    """Open what tells that memory is short: PSI where it is on, else the module's level.

    Args:
        threshold_us: microseconds of a second that tasks may wait for memory.
        root: another directory than the default, for tests.
        proc: likewise for ``/proc``.

    Raises:
        InvalidArgument: the kernel takes no such threshold.
        NotAvailable: the module is not loaded.
        NotPermitted: this user may not set a trigger.
    """
    if not 0 < threshold_us <= _WINDOW:
        raise errors.InvalidArgument(
            f"tasks cannot wait for {threshold_us} microseconds of a second",
            "give a threshold of 1 to 1000 milliseconds",
        )
    system.read(root).group("pressure")
    try:
        return PsiSource(threshold_us, proc)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            cause = "watching the pressure takes root"
            raise errors.NotPermitted(cause, "run it with sudo") from None
        # ENOENT: built without; EOPNOTSUPP: off at boot
        return LevelSource(root)


@dataclass(frozen=True)
class Action:
    """What :func:`watch` did.

    Attributes:
        time: when, in seconds since the epoch.
        source: ``psi`` or ``level``.
        reason: what for.
        level: the module's level then.
        available: bytes available then.
        relief: what was given.
    """

    time: float
    source: str
    reason: str
    level: str
    available: int
    relief: Given


def watch(
    source: Source,
    *,
    least: int = LEAST,
    act: Callable[[int], Given] = relieve,
    look: Callable[[], PressureStatus] = status,
    stop: int = -1,
    clock: Callable[[], float] = time.time,
) -> Iterator[Action]:
    """Relieve whenever memory is short, and say so.

    Gives back what is missing to the high watermark, and at least ``least`` bytes.

    Args:
        source: what tells that it is.
        least: bytes.
        act: what to do with the bytes wanted.
        look: how to see what is missing.
        stop: a descriptor that can be read when it is time to end; -1 for none.
        clock: the time of an action.
    """
    poll = select.poll()
    poll.register(source.fileno(), select.POLLPRI)
    if stop >= 0:
        poll.register(stop, select.POLLIN)
    while True:
        ready = dict(poll.poll())
        if stop in ready:
            return
        if ready.get(source.fileno(), 0) & select.POLLNVAL:
            raise errors.TensormemError("what is watched is closed", "open it again")
        reason = source.fired()
        if reason is None:
            continue
        before = look()
        wanted = max(before.high - before.available, least)
        yield Action(clock(), source.name, reason, before.level, before.available, act(wanted))
