# SPDX-License-Identifier: MIT
"""What a test does to its own and to other processes, and which modules it loads: system calls, children, smaps."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import random
import re
import signal
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

MODULES = Path(__file__).parents[2] / "kmod/tests"

libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
libc.mremap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int)
libc.mremap.restype = ctypes.c_void_p
#: The same with a place to go to: a function of its own, because argtypes are for all who call it.
mremap_to = ctypes.CDLL(None, use_errno=True).mremap
mremap_to.argtypes = (*libc.mremap.argtypes, ctypes.c_void_p)
mremap_to.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int,
                      ctypes.c_long)  # fmt: skip
libc.mmap.restype = ctypes.c_void_p
libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
FAILED = ctypes.c_void_p(-1).value


class Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def status_of(action: Callable[[], object]) -> int:
    """The wait status of a child which does it: 99 << 8 if it raises."""
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        try:
            action()
        except BaseException:
            os._exit(99)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def dies(action: Callable[[], object]) -> int:
    """The signal that ends a child which does it; 0 if it lives."""
    status = status_of(action)
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def readable(view: memoryview) -> bool:
    """Whether the kernel can read it: its faults end as errors, not as signals."""
    copy = os.memfd_create("copy")
    try:
        return os.pwrite(copy, view, 0) == len(view)
    except OSError as error:
        return fault(error)
    finally:
        os.close(copy)


def writable(view: memoryview) -> bool:
    """Whether the kernel can write it; zeros, if so."""
    try:
        with open("/dev/zero", "rb", buffering=0) as zero:
            return zero.readinto(view) == len(view)
    except OSError as error:
        return fault(error)


def fault(error: OSError) -> bool:
    if error.errno != errno.EFAULT:
        raise error
    return False


def together(work: Callable[[int], object], count: int) -> list[BaseException]:
    """Work with a seed of its own in each of so many threads; what they have raised."""
    raised: list[BaseException] = []

    def one(seed: int) -> None:
        try:
            work(seed)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=one, args=(seed,)) for seed in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def killed_at_random(work: Callable[[int], object], dice: random.Random, least: float, most: float) -> None:
    """Two children do endless work, with seeds of their own, until they are killed so many seconds later."""
    children = []
    for _ in range(2):
        pid = os.fork()
        if pid == 0:
            try:
                work(dice.randrange(1 << 30) + os.getpid())
            finally:
                os._exit(98)
        children.append(pid)
    time.sleep(dice.uniform(least, most))
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    for pid in children:
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL


def smaps(address: int) -> dict[str, int]:
    """The kB figures of the area that starts at @address."""
    text = Path("/proc/self/smaps").read_text()
    area = re.search(rf"^0*{address:x}-.*?(?=^[0-9a-f]+-|\Z)", text, re.M | re.S)
    assert area
    return {k: int(v) for k, v in re.findall(r"^(\w+):\s+(\d+) kB", area.group(0), re.M)}


class _PerfAttributes(ctypes.Structure):
    """struct perf_event_attr in its first version."""

    _fields_ = (("type", ctypes.c_uint32), ("size", ctypes.c_uint32), ("config", ctypes.c_uint64),
                ("sample_period", ctypes.c_uint64), ("sample_type", ctypes.c_uint64),
                ("read_format", ctypes.c_uint64), ("flags", ctypes.c_uint64),
                ("wakeup_events", ctypes.c_uint32), ("bp_type", ctypes.c_uint32),
                ("bp_addr", ctypes.c_uint64))  # fmt: skip


class Faults:
    """The page faults this thread takes in an area while it is entered; what Python does elsewhere is not counted.

    A sample of the kernel's own page-fault event for each, with its address (perf_event_open(2)).
    """

    RING = 64  # pages, a power of two
    TYPE_SOFTWARE, PAGE_FAULTS, SAMPLE_ADDR, DISABLED = 1, 2, 1 << 3, 1 << 0
    HEAD, SAMPLE, ENABLE, DISABLE = 1024, 9, 0x2400, 0x2401

    def __init__(self, address: int, length: int) -> None:
        self.area = range(address, address + length)
        self.addresses: list[int] = []

    def __enter__(self) -> Self:
        attributes = _PerfAttributes(type=self.TYPE_SOFTWARE, size=ctypes.sizeof(_PerfAttributes),
                                     config=self.PAGE_FAULTS, sample_period=1, sample_type=self.SAMPLE_ADDR,
                                     flags=self.DISABLED)  # fmt: skip
        perf_event_open = 241
        self.fd = libc.syscall(perf_event_open, ctypes.byref(attributes), 0, -1, -1, 0)
        assert self.fd >= 0, os.strerror(ctypes.get_errno())
        self.ring = mmap.mmap(self.fd, (1 + self.RING) * mmap.PAGESIZE)
        fcntl.ioctl(self.fd, self.ENABLE, 0)
        return self

    def __exit__(self, *_: object) -> None:
        fcntl.ioctl(self.fd, self.DISABLE, 0)
        (head,) = struct.unpack_from("Q", self.ring, self.HEAD)
        assert head < self.RING * mmap.PAGESIZE, "more faults than the ring holds"
        at = mmap.PAGESIZE
        while at < mmap.PAGESIZE + head:
            kind, _, size, address = struct.unpack_from("=IHHQ", self.ring, at)
            assert kind == self.SAMPLE, kind
            if address in self.area:
                self.addresses.append(address)
            at += size
        self.ring.close()
        os.close(self.fd)

    def __len__(self) -> int:
        return len(self.addresses)


def hold(address: int, length: int) -> tuple[int, int]:
    """A pipe that refers to the pages themselves (vmsplice); read end, write end."""
    reader, writer = os.pipe()
    vector = Iovec(address, length)
    if libc.vmsplice(writer, ctypes.byref(vector), 1, 0) != length:
        number = ctypes.get_errno()
        let_go((reader, writer))
        raise OSError(number, os.strerror(number))
    return reader, writer


def let_go(pipe: tuple[int, int]) -> None:
    for fd in pipe:
        os.close(fd)


@contextmanager
def loaded(name: str, *parameters: str) -> Iterator[None]:
    """One of the test modules, for so long."""
    subprocess.run(["insmod", MODULES / f"{name}.ko", *parameters], check=True)
    try:
        yield
    finally:
        subprocess.run(["rmmod", name], check=True)


IO_URING_SETUP, IO_URING_REGISTER = 425, 427
IORING_REGISTER_BUFFERS = 0


def registered(address: int, length: int) -> int:
    """The errno of registering a buffer with io_uring, which pins it for good; a child does it, and has 20 s."""

    def child() -> None:
        signal.alarm(20)
        # Of an entry without a page that is not dirty, as it is after fork(), arm64's DEBUG_VM warns
        first = ctypes.c_char.from_address(address)
        first.value = first.value
        ring = libc.syscall(IO_URING_SETUP, 1, ctypes.create_string_buffer(120))
        assert ring >= 0, ctypes.get_errno()
        vector = Iovec(address, length)
        result = libc.syscall(IO_URING_REGISTER, ring, IORING_REGISTER_BUFFERS, ctypes.byref(vector), 1)
        os._exit(ctypes.get_errno() if result else 0)

    return os.waitstatus_to_exitcode(status_of(child))
