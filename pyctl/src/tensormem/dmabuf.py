# SPDX-License-Identifier: MIT
"""Tensors as dma-bufs: what devices, their drivers and other processes take.

::

    tensor = client.alloc(64 << 20, kind="weights")
    with tensor.export() as shared:
        driver.import_dmabuf(shared.fileno())  # no copy
        frame = shared.array((1080, 1920), np.uint8)
        with shared.sync(write=False):
            brightest = frame.max()

A :class:`DmaBuf` outlives its tensor, its client and its process. Its arrays outlive it. One that
came over a Unix socket, of whatever driver, is opened with :meth:`DmaBuf.of`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from . import abi, errors
from .closing import Closing
from .device import Device, KernelDevice
from .form import Shape, array_form
from .units import format_size

__all__ = ["DmaBuf"]

#: What the kernel knows of every dma-buf, whoever made it (``linux/dma-buf.h``).
_READ, _WRITE, _END = 1 << 0, 1 << 1, 1 << 2


class _Sync(abi.Struct):
    """``struct dma_buf_sync``."""

    c_name = "dma_buf_sync"
    _fields_ = (("flags", ctypes.c_uint64),)


_PASS = "pass a descriptor that Tensor.export() or a device's driver has made"
_IOC_SYNC = (1 << 30) | (ctypes.sizeof(_Sync) << 16) | (ord("b") << 8)


class DmaBuf(Closing):
    """Memory that devices share; from :meth:`Tensor.export` or :meth:`DmaBuf.of`.

    Used as a context manager it is closed at the end of the block, as it is when it is dropped.
    """

    def __init__(self, device: Device, size: int, *, read_only: bool) -> None:
        """Not for users; see :meth:`Tensor.export` and :meth:`of`."""
        self._device = device
        self._size = size
        self._read_only = read_only
        self._closed = False

    @classmethod
    def of(cls, fd: int) -> DmaBuf:
        """Take over a descriptor, such as one that came over a Unix socket.

        Raises:
            InvalidArgument: it is the descriptor of something else. It stays open.
        """
        try:
            kind = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            raise errors.InvalidArgument(f"{fd} is not an open descriptor", _PASS) from None
        if not kind.startswith("/dmabuf:"):
            raise errors.InvalidArgument(f"descriptor {fd} is {kind}, not a dma-buf", _PASS)
        size = os.lseek(fd, 0, os.SEEK_END)
        mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        return cls(KernelDevice.of(fd), size, read_only=mode == os.O_RDONLY)

    @property
    def size(self) -> int:
        """Bytes: the tensor's, in whole pages."""
        return self._size

    @property
    def read_only(self) -> bool:
        """True if neither arrays of it nor devices can write."""
        return self._read_only

    @property
    def closed(self) -> bool:
        """True once :meth:`close` was called."""
        return self._closed

    def fileno(self) -> int:
        """Return the descriptor; -1 once it is closed."""
        return self._device.fileno()

    def array(self, shape: Shape, dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
        """Return the memory as an array, from its first byte on; it keeps the memory.

        Raises:
            InvalidArgument: the dma-buf has fewer bytes than shape and dtype take.
            OutOfMemory: there is no address space left to map it.
            NotAvailable: another driver's, which does not let the CPU map it.
            Closed: it was closed.
        """
        dims, kind = array_form(shape, dtype)
        count = math.prod(dims)
        if count * kind.itemsize > self._size:
            raise errors.InvalidArgument(
                f"an array of {count * kind.itemsize} bytes does not fit into a dma-buf of"
                f" {self._size}",
                "export a larger tensor",
            )
        self._check()
        try:
            mapping = self._device.map(0, self._size, write=not self._read_only)
        except OSError as error:
            raise self._not_mapped(error.errno or 0) from None
        return np.frombuffer(mapping, kind, count).reshape(dims)

    @contextlib.contextmanager
    def sync(self, *, read: bool = True, write: bool = True) -> Iterator[None]:
        """Look at what devices wrote, or write what they read, within this block.

        Where devices see the CPU's caches it costs a system call; elsewhere caches are flushed.

        Args:
            read: the CPU reads what devices may have written.
            write: the CPU writes what devices are to read.

        Raises:
            InvalidArgument: neither.
            Closed: it was closed.
        """
        flags = read * _READ | write * _WRITE
        if not flags:
            raise errors.InvalidArgument("neither read nor write", "pass one of them, or both")
        self._sync(flags)
        try:
            yield
        finally:
            self._sync(flags | _END)

    def close(self) -> None:
        """Close the descriptor; arrays and devices keep the memory. A second time does nothing."""
        self._closed = True
        self._device.close()

    def _not_mapped(self, number: int) -> errors.TensormemError:
        why = os.strerror(number)
        if number == errno.ENOMEM:
            return errors.OutOfMemory(
                f"cannot map {format_size(self._size)} ({why})",
                "drop arrays, or raise the limit on address space (ulimit -v)",
            )
        return errors.NotAvailable(
            f"the driver of this dma-buf does not map it for the CPU ({why})",
            "have its device copy it into a dma-buf of a tensor (Tensor.export)",
        )

    def _check(self) -> None:
        if self._closed:
            raise errors.Closed("this dma-buf is closed", "export the tensor again")

    def _sync(self, flags: int) -> None:
        self._check()
        while True:
            try:
                self._device.ioctl(_IOC_SYNC, _Sync(flags=flags))
            except OSError as error:
                # the kernel says so when it was interrupted: to be called again
                if error.errno in (errno.EAGAIN, errno.EINTR):
                    continue
                cause = "cannot synchronize the dma-buf"
                raise errors.from_errno(error.errno or 0, cause) from None
            return

    def __del__(self) -> None:
        if not self._closed:
            self.close()

    def __repr__(self) -> str:
        """Name size and state."""
        state = ", closed" if self._closed else ", read-only" if self._read_only else ""
        return f"<DmaBuf: {format_size(self._size)}{state}>"
