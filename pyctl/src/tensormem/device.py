# SPDX-License-Identifier: MIT
"""The one place that makes system calls on ``/dev/tensormem``.

:class:`Device` is what the rest of the package needs from the kernel: ioctl, mmap
and close. Tests put something else in its place.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from typing import Protocol

from . import errors
from .abi import Struct

__all__ = ["DEFAULT_PATH", "Device", "KernelDevice"]

DEFAULT_PATH = "/dev/tensormem"


class Device(Protocol):
    """One open of the device."""

    def ioctl(self, request: int, argument: Struct) -> None:
        """Make the call; the argument is updated in place.

        Raises:
            OSError: with the errno of the ABI.
        """
        ...

    def map(self, offset: int, length: int) -> mmap.mmap:
        """Map part of the window, shared, readable and writable.

        Raises:
            OSError: with the errno of the ABI, or ENOMEM without address space.
        """
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

    def ioctl(self, request: int, argument: Struct) -> None:
        """See :meth:`Device.ioctl`."""
        fcntl.ioctl(self._fd, request, argument)

    def map(self, offset: int, length: int) -> mmap.mmap:
        """See :meth:`Device.map`."""
        return mmap.mmap(
            self._fd, length, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=offset
        )

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
