# SPDX-License-Identifier: MIT
"""Mappings behave like those of a shared file, and refuse what the header says."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import signal
import struct
import threading
from pathlib import Path

import pytest

from device import CHUNK, PAGE, Raw, address_of, round_up
from process import FAILED, Faults, dies, libc, mremap_to, smaps
from tensormem import abi

READ, WRITE, EXEC = mmap.PROT_READ, mmap.PROT_WRITE, mmap.PROT_EXEC


def test_the_window_shows_later_tensors(raw: Raw) -> None:
    window = raw.map_window()
    for size in (1, PAGE * 9, CHUNK + 1):
        item = raw.alloc(size)
        assert window[item.offset : item.offset + size] == bytes(size)
        window[item.offset + size - 1] = 77
        own = raw.map_tensor(item)
        assert own[size - 1] == 77
        own[0] = 78
        assert window[item.offset] == 78
        own.close()
        assert raw.free(item.handle) == 0
    window.close()


def test_two_clients_two_windows(raw: Raw) -> None:
    with Raw() as other:
        mine, theirs = raw.alloc(PAGE), other.alloc(PAGE)
        assert mine.offset == theirs.offset
        a, b = raw.map_tensor(mine), other.map_tensor(theirs)
        a[:4], b[:4] = b"mine", b"them"
        assert (a[:4], b[:4]) == (b"mine", b"them")
        a.close()
        b.close()


def test_ranges(raw: Raw) -> None:
    window = raw.info().window_size
    first, second = raw.alloc(3 * PAGE), raw.alloc(4 * PAGE)
    assert raw.map_errno(PAGE, first.offset + PAGE) == 0
    assert raw.map_errno(2 * PAGE, first.offset + PAGE) == 0
    assert raw.map_errno(3 * PAGE, first.offset + PAGE) == errno.EINVAL  # past its end
    assert raw.map_errno(window // 2, first.offset) == errno.EINVAL
    span = second.offset + 4 * PAGE - first.offset
    assert raw.map_errno(span, first.offset) == errno.EINVAL  # across tensors
    assert raw.map_errno(PAGE, window - PAGE) == errno.ENOENT
    assert raw.map_errno(PAGE, window) == errno.EINVAL
    assert raw.map_errno(window, PAGE) == errno.ENOENT if first.offset else errno.EINVAL
    assert raw.map_errno(window + PAGE, 0) == errno.EINVAL
    assert raw.free(second.handle) == 0
    assert raw.map_errno(PAGE, second.offset) == errno.ENOENT
    assert libc.mmap(None, PAGE, READ, mmap.MAP_SHARED, raw.fd, 1) == FAILED
    assert ctypes.get_errno() == errno.EINVAL  # not a multiple of a page
    assert libc.mmap(None, PAGE, READ, mmap.MAP_SHARED, raw.fd, -PAGE) == FAILED
    assert ctypes.get_errno() in (errno.EINVAL, errno.EOVERFLOW)


def test_private_and_executable_are_refused(raw: Raw) -> None:
    item = raw.alloc(PAGE)
    assert raw.map_errno(PAGE, item.offset, flags=mmap.MAP_PRIVATE) == errno.EINVAL
    assert raw.map_errno(PAGE, item.offset, prot=READ | EXEC) == errno.EPERM
    assert raw.map_errno(raw.info().window_size, 0, prot=READ | WRITE | EXEC) == errno.EPERM
    mapping = raw.map_tensor(item)
    address = address_of(mapping)
    assert libc.mprotect(address, PAGE, READ | EXEC) == -1
    assert ctypes.get_errno() == errno.EACCES
    assert mapping[0] == 0


def test_touching_no_tensor_is_sigbus(raw: Raw) -> None:
    window = raw.map_window()
    item = raw.alloc(2 * PAGE)
    own = raw.map_tensor(item)
    own[0] = window[item.offset + PAGE] = 1
    assert dies(lambda: window[item.offset + 2 * PAGE]) == signal.SIGBUS
    assert dies(lambda: window[raw.info().window_size - 1]) == signal.SIGBUS
    assert dies(lambda: own[0]) == 0
    assert raw.free(item.handle) == 0
    assert dies(lambda: own[0]) == signal.SIGBUS
    assert dies(lambda: window[item.offset + PAGE]) == signal.SIGBUS
    own.close()
    window.close()


def test_a_system_call_on_a_freed_tensor_is_efault(raw: Raw) -> None:
    item = raw.alloc(PAGE)
    mapping = raw.map_tensor(item)
    assert raw.free(item.handle) == 0
    with open("/dev/zero", "rb", buffering=0) as zero, pytest.raises(OSError, match="Bad address"):
        zero.readinto(mapping)
    mapping.close()


@pytest.mark.parametrize("size", [PAGE, 1 << 20, 4 * CHUNK])
def test_one_fault_maps_a_page_table(raw: Raw, size: int) -> None:
    item = raw.alloc(size)
    mapping = raw.map_tensor(item)
    address = address_of(mapping)
    with Faults(address, size) as faults:
        for at in range(0, size, PAGE):
            mapping[at] = 1
    # a page table spans 2 MiB at 4K pages and more above
    assert 1 <= len(faults) <= (address + size - 1) // CHUNK - address // CHUNK + 1
    assert smaps(address)["Rss"] == size // 1024
    del address
    mapping.close()


def test_reading_then_writing_does_not_fault_twice(raw: Raw) -> None:
    size = 1 << 20
    item = raw.alloc(size)
    mapping = raw.map_tensor(item)
    assert sum(mapping[at] for at in range(0, size, PAGE)) == 0
    with Faults(address_of(mapping), size) as faults:
        for at in range(0, size, PAGE):
            mapping[at] = 1
    assert not faults.addresses
    mapping.close()


def test_fork_shares(raw: Raw) -> None:
    item = raw.alloc(4 * PAGE)
    mapping = raw.map_tensor(item)
    mapping[0] = 1

    def child() -> None:
        assert mapping[0] == 1
        mapping[0] = 2
        mapping[3 * PAGE] = 3

    assert dies(child) == 0
    assert (mapping[0], mapping[3 * PAGE]) == (2, 3)
    mapping.close()


def test_a_mapping_outlives_the_descriptor() -> None:
    raw = Raw()
    item = raw.alloc(PAGE)
    mapping = raw.map_tensor(item)
    raw.close()
    mapping[:3] = b"yes"
    assert mapping[:3] == b"yes"
    mapping.close()


def test_mprotect(raw: Raw) -> None:
    item = raw.alloc(4 * PAGE)
    mapping = raw.map_tensor(item)
    mapping[PAGE] = 5
    address = address_of(mapping)
    assert libc.mprotect(address + PAGE, PAGE, READ) == 0
    assert mapping[PAGE] == 5

    def poke() -> None:
        mapping[PAGE] = 6

    assert dies(poke) == signal.SIGSEGV
    assert libc.mprotect(address + 2 * PAGE, PAGE, 0) == 0
    assert dies(lambda: mapping[2 * PAGE]) == signal.SIGSEGV
    assert libc.mprotect(address, 4 * PAGE, READ | WRITE) == 0
    poke()
    mapping[2 * PAGE] = 7
    assert (mapping[PAGE], mapping[2 * PAGE], mapping[3 * PAGE]) == (6, 7, 0)


def test_a_read_only_descriptor_maps_read_only(raw: Raw) -> None:
    fd = os.open("/dev/tensormem", os.O_RDONLY)
    window = raw.info().window_size
    assert libc.mmap(None, window, READ | WRITE, mmap.MAP_SHARED, fd, 0) == FAILED
    assert ctypes.get_errno() == errno.EACCES
    at = libc.mmap(None, window, READ, mmap.MAP_SHARED, fd, 0)
    assert at != FAILED
    os.close(fd)
    assert libc.munmap(at, window) == 0


def test_madvise_dontneed_keeps_the_data(raw: Raw) -> None:
    size = 1 << 20
    item = raw.alloc(size)
    mapping = raw.map_tensor(item)
    pattern = os.urandom(size)
    mapping[:] = pattern
    address = address_of(mapping)
    assert smaps(address)["Rss"] == size // 1024
    assert libc.madvise(address, size, mmap.MADV_DONTNEED) == 0
    assert smaps(address)["Rss"] == 0
    # part of the page table stays filled: the fault maps around what is there
    assert mapping[:] == pattern
    assert libc.madvise(address + 3 * PAGE, 5 * PAGE, mmap.MADV_DONTNEED) == 0
    assert smaps(address)["Rss"] == (size - 5 * PAGE) // 1024
    assert mapping[:] == pattern
    assert smaps(address)["Rss"] == size // 1024


def test_populate_and_fixed(raw: Raw) -> None:
    size = 8 * PAGE
    item = raw.alloc(size)
    populated = raw.map(size, item.offset, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    address = address_of(populated)
    assert smaps(address)["Rss"] == size // 1024
    populated[:] = b"x" * size
    MAP_FIXED = 0x10
    place = mmap.mmap(-1, 16 * PAGE)
    at = address_of(place) + 4 * PAGE
    flags = mmap.MAP_SHARED | MAP_FIXED
    assert libc.mmap(at, 4 * PAGE, READ | WRITE, flags, raw.fd, item.offset + 4 * PAGE) == at
    assert place[4 * PAGE : 8 * PAGE] == b"x" * (4 * PAGE)
    assert place[8 * PAGE : 9 * PAGE] == bytes(PAGE)
    place[4 * PAGE] = ord("y")
    assert populated[4 * PAGE] == ord("y")
    del at


def test_mremap_shrinks_and_does_nothing_else(raw: Raw) -> None:
    item = raw.alloc(8 * PAGE)
    flags = mmap.MAP_SHARED
    at = libc.mmap(None, 8 * PAGE, READ | WRITE, flags, raw.fd, item.offset)
    ctypes.memset(at, 7, 8 * PAGE)
    MAYMOVE, FIXED = 1, 2
    assert libc.mremap(at, 8 * PAGE, 9 * PAGE, MAYMOVE) == FAILED
    assert ctypes.get_errno() == errno.EFAULT
    spare = libc.mmap(None, 8 * PAGE, READ, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    assert mremap_to(at, 8 * PAGE, 8 * PAGE, MAYMOVE | FIXED, spare) == FAILED
    assert ctypes.get_errno() == errno.EINVAL
    assert ctypes.string_at(at, 8 * PAGE) == b"\7" * (8 * PAGE)
    assert libc.mremap(at, 8 * PAGE, 3 * PAGE, 0) == at
    assert ctypes.string_at(at, 3 * PAGE) == b"\7" * (3 * PAGE)
    libc.munmap(at, 3 * PAGE)


def test_direct_io_into_a_tensor(raw: Raw, tmp_path_factory: pytest.TempPathFactory) -> None:
    """O_DIRECT pins the pages; the root file system is a real block device."""
    path = Path("/var/tmp/direct-io.bin")
    data = os.urandom(1 << 20)
    path.write_bytes(data)
    os.sync()
    item = raw.alloc(len(data))
    mapping = raw.map_tensor(item)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    assert os.preadv(fd, [mapping], 0) == len(data)
    os.close(fd)
    assert mapping[:] == data
    mapping[:PAGE] = bytes(PAGE)
    fd = os.open(path, os.O_WRONLY | os.O_DIRECT)
    assert os.pwritev(fd, [mapping], 0) == len(data)
    os.close(fd)
    path.unlink()
    mapping.close()


def test_a_userfaultfd_marker_is_sigbus(raw: Raw) -> None:
    """A kernel that lets userfaultfd mark our pages gets SIGBUS; most refuse to register them."""
    item = raw.alloc(4 * PAGE)
    mapping = raw.map_tensor(item)
    address = address_of(mapping)
    userfaultfd, user_mode_only, wp_async = 282, 1, 1 << 15
    fd = libc.syscall(userfaultfd, os.O_CLOEXEC | user_mode_only)
    if fd < 0:
        pytest.skip("no userfaultfd")
    api = bytearray(struct.pack("<QQQ", 0xAA, wp_async, 0))
    register = bytearray(struct.pack("<QQQQ", address, 4 * PAGE, 2, 0))
    protect = bytearray(struct.pack("<QQQ", address + PAGE, PAGE, 1))
    refused = True
    with contextlib.suppress(OSError):
        fcntl.ioctl(fd, 0xC018AA3F, api)
        fcntl.ioctl(fd, 0xC020AA00, register)
        fcntl.ioctl(fd, 0xC018AA06, protect)
        refused = False
    if refused:
        os.close(fd)
        assert mapping[PAGE] == 0
        return
    copy = os.memfd_create("copy")
    with pytest.raises(OSError, match="Bad address"):
        os.pwrite(copy, memoryview(mapping)[PAGE : 2 * PAGE], 0)
    os.close(copy)
    os.close(fd)
    assert mapping[PAGE] == 0
    mapping[PAGE] = 1


def test_dontneed_races_with_faults(raw: Raw) -> None:
    """Dropping entries while others touch them never costs data or a signal."""
    size = 2 * CHUNK
    item = raw.alloc(size)
    mapping = raw.map_tensor(item)
    mapping[:] = b"\x3c" * size
    address = address_of(mapping)
    pid = os.fork()
    if pid == 0:
        while True:
            if mapping[PAGE::PAGE].strip(b"\x3c"):
                os._exit(1)
    done = threading.Event()

    def drop() -> None:
        for _ in range(300):
            libc.madvise(address, size, mmap.MADV_DONTNEED)
        done.set()

    thread = threading.Thread(target=drop)
    thread.start()
    while not done.is_set():
        assert not mapping[::PAGE].strip(b"\x3c")
    thread.join()
    os.kill(pid, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL


def test_unaligned_access(raw: Raw) -> None:
    item = raw.alloc(2 * PAGE)
    mapping = raw.map_tensor(item)
    address = address_of(mapping)
    for at in (1, 3, 7, PAGE - 3):
        ctypes.c_uint64.from_address(address + at).value = 0x0123456789ABCDEF
        assert struct.unpack_from("<Q", mapping, at)[0] == 0x0123456789ABCDEF
        assert ctypes.c_double.from_address(address + at).value != 0


def test_another_process_reads_it(raw: Raw) -> None:
    item = raw.alloc(2 * PAGE)
    mapping = raw.map_tensor(item)
    mapping[PAGE : PAGE + 5] = b"hello"
    address = address_of(mapping)
    ours, child = os.getpid(), os.fork()
    if child == 0:
        with open(f"/proc/{ours}/mem", "rb", buffering=0) as memory:
            memory.seek(address + PAGE)
            os._exit(0 if memory.read(5) == b"hello" else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_alignment_of_offsets_follows_the_size(raw: Raw) -> None:
    for order in range((CHUNK // PAGE).bit_length()):
        raw.alloc(PAGE)
        item = raw.alloc(PAGE << order)
        assert item.offset % (PAGE << order) == 0
        assert round_up(item.offset, PAGE) == item.offset


def test_the_window_refills_its_gaps(raw: Raw) -> None:
    items = [raw.alloc(PAGE * 4) for _ in range(50)]
    assert raw.free_batch([i.handle for i in items[10:20]])[0] == 0
    again = [raw.alloc(PAGE * 4) for _ in range(10)]
    assert {i.offset for i in again} <= {i.offset for i in items}


def test_old_contents_do_not_come_back(raw: Raw) -> None:
    """The same client, the same place: zero all the same."""
    window = raw.map_window()
    for _ in range(20):
        item = raw.alloc(1 << 18, kind=abi.Kind.ACTIVATIONS)
        assert window[item.offset : item.offset + item.size] == bytes(item.size)
        window[item.offset : item.offset + item.size] = b"\xff" * item.size
        assert raw.free(item.handle) == 0
    window.close()
