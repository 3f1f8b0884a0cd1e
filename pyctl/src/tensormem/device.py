# SPDX-License-Identifier: MIT
"""The one place that makes system calls on descriptors of the module.

:class:`Device` is what the rest of the package needs from the kernel: ioctl, mmap,
read and close. Tests put something else in its place.
"""

from __future__ import annotations

import errno
import fcntl
import math
import mmap
import os
import select
from typing import Protocol

from . import errors
from .abi import Struct

__all__ = ["DEFAULT_PATH", "Device", "KernelDevice"]

DEFAULT_PATH = "/dev/tensormem"


class Device(Protocol):
    """One open of the device, a KV cache, a model slot or a generation."""

    def ioctl(self, request: int, argument: Struct) -> None:
        """Make the call; the argument is updated in place.

        Raises:
            OSError: with the errno of the ABI.
        """
        ...

    def map(self, offset: int, length: int, *, write: bool = True) -> mmap.mmap:
        """Map part of the window, shared and readable, and writable unless told otherwise.

        Raises:
            OSError: with the errno of the ABI, or ENOMEM without address space.
        """
        ...

    def read(self, size: int, timeout: float | None) -> bytes:
        """Read up to this many bytes, or none where nothing comes in this many seconds.

        Raises:
            OSError: with the errno of the ABI.
        """
        ...

    def pread(self, size: int, offset: int) -> bytes:
        """Read up to this many bytes from a place; fewer only at the end.

        Raises:
            OSError: with the errno of the ABI.
        """
        ...

    def poll(self, events: int, timeout: float | None) -> int:
        """Wait at most so many seconds for events, as in ``select``; return those there are."""
        ...

    def other(self, fd: int) -> Device:
        """Return a device for another descriptor of the module, which it then owns."""
        ...

    def fileno(self) -> int:
        """Return the descriptor."""
        ...

    def close(self) -> None:
        """Close the descriptor; mappings keep what they need."""
        ...


class KernelDevice:
    """The real thing."""

    def __init__(self, path: str | os.PathLike[str] = DEFAULT_PATH) -> None:
        """Open the device.

        Raises:
            DeviceMissing: there is no such node, or no module behind it.
            AccessDenied: this user may not open it.
            NotAvailable: it cannot be opened for another reason.
        """
        name = os.fspath(path)
        try:
            self._fd = os.open(name, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise _open_error(name, error) from None

    @classmethod
    def of(cls, fd: int) -> KernelDevice:
        """Return the device of a descriptor, which it then owns."""
        device = cls.__new__(cls)
        device._fd = fd
        return device

    def ioctl(self, request: int, argument: Struct) -> None:
        """See :meth:`Device.ioctl`."""
        fcntl.ioctl(self._fd, request, argument)

    def map(self, offset: int, length: int, *, write: bool = True) -> mmap.mmap:
        """See :meth:`Device.map`."""
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if write else 0)
        return mmap.mmap(self._fd, length, mmap.MAP_SHARED, protection, offset=offset)

    def read(self, size: int, timeout: float | None) -> bytes:
        """See :meth:`Device.read`."""
        if not self.poll(select.POLLIN, timeout):
            return b""
        try:
            return os.read(self._fd, size)
        except BlockingIOError:
            return b""  # another reader was first

    def pread(self, size: int, offset: int) -> bytes:
        """See :meth:`Device.pread`."""
        return os.pread(self._fd, size, offset)

    def poll(self, events: int, timeout: float | None) -> int:
        """See :meth:`Device.poll`."""
        poll = select.poll()
        poll.register(self._fd, events)
        found = poll.poll(None if timeout is None else max(0, math.ceil(timeout * 1000)))
        return found[0][1] if found else 0

    def other(self, fd: int) -> KernelDevice:
        """See :meth:`Device.other`."""
        return self.of(fd)

    def fileno(self) -> int:
        """Return the descriptor; -1 once closed."""
        return self._fd

    def close(self) -> None:
        """Close the descriptor; a second time does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _open_error(name: str, error: OSError) -> errors.NotAvailable:
    number = error.errno or 0
    if number in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
        if number == errno.ENOENT:
            return errors.DeviceMissing(f"{name} does not exist, so the module is not loaded")
        return errors.DeviceMissing(f"no module stands behind {name}", errno=number)
    if number in (errno.EACCES, errno.EPERM):
        return errors.AccessDenied(f"this user may not open {name}", errno=number)
    return errors.NotAvailable(f"cannot open {name} ({os.strerror(number)})", errno=number)
