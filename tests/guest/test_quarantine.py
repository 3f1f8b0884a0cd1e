# SPDX-License-Identifier: MIT
"""Pages that somebody else holds when their tensor is freed are not handed out before."""

from __future__ import annotations

import ctypes
import os
import subprocess
import time
from pathlib import Path

from device import CHUNK, PAGE, Raw, address_of, read

MODULE = Path(__file__).parents[2] / "kmod/tensormem.ko"

libc = ctypes.CDLL(None, use_errno=True)


class Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def hold(address: int, length: int) -> tuple[int, int]:
    """A pipe that refers to the pages themselves (vmsplice); read end, write end."""
    reader, writer = os.pipe()
    vector = Iovec(address, length)
    assert libc.vmsplice(writer, ctypes.byref(vector), 1, 0) == length, ctypes.get_errno()
    return reader, writer


def wait_until_released(seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while read("chunk/quarantined"):
        assert time.monotonic() < end, "still in quarantine"
        time.sleep(0.02)


def test_held_pages_are_set_aside(raw: Raw) -> None:
    item = raw.alloc(8 * PAGE)
    mapping = raw.map_tensor(item)
    mapping[:] = b"\x5a" * (8 * PAGE)
    reader, writer = hold(address_of(mapping) + PAGE, 2 * PAGE)
    mapping.close()
    assert raw.free(item.handle) == 0
    assert raw.info().used == 0
    assert read("chunk/quarantined") == 8  # the whole run they are part of
    assert read("buddy/used_pages") == 8
    # nobody gets them, however much is asked for
    window = raw.map_window()
    for _ in range(64):
        other = raw.alloc(8 * PAGE)
        window[other.offset : other.offset + 8 * PAGE] = b"\xff" * (8 * PAGE)
    time.sleep(0.3)
    assert read("chunk/quarantined") == 8
    assert os.read(reader, 2 * PAGE) == b"\x5a" * (2 * PAGE)
    os.close(reader)
    os.close(writer)
    wait_until_released()
    window.close()


def test_only_the_held_extents_are_set_aside(raw: Raw) -> None:
    """Of two chunks and a run, the chunk that is held waits; the rest is free at once."""
    item = raw.alloc(2 * CHUNK + PAGE)
    mapping = raw.map_tensor(item)
    mapping[CHUNK] = 9
    reader, writer = hold(address_of(mapping) + CHUNK, PAGE)
    mapping.close()
    assert raw.free(item.handle) == 0
    assert read("chunk/quarantined") == CHUNK // PAGE
    assert read("chunk/used") == 1
    assert read("buddy/used_pages") == 0
    assert os.read(reader, 1) == b"\x09"
    os.close(reader)
    os.close(writer)
    wait_until_released()
    assert read("chunk/used") == 0


def test_the_holder_outlives_the_client() -> None:
    client = Raw()
    item = client.alloc(PAGE)
    mapping = client.map_tensor(item)
    mapping[:5] = b"still"
    reader, writer = hold(address_of(mapping), PAGE)
    mapping.close()
    client.close()
    assert read("clients/count") == 0
    assert read("chunk/quarantined") == 1
    assert os.read(reader, 5) == b"still"
    os.close(reader)
    os.close(writer)
    wait_until_released()


def test_the_holder_outlives_the_module() -> None:
    """What is still held at unload is the holder's: neither zeroed nor reused before it is done."""
    with Raw() as client:
        item = client.alloc(CHUNK + PAGE)
        mapping = client.map_tensor(item)
        mapping[:PAGE] = b"\x77" * PAGE
        mapping[CHUNK:] = b"\x78" * PAGE
        pipes = [hold(address_of(mapping) + at, PAGE) for at in (0, CHUNK)]
        mapping.close()
    assert read("chunk/quarantined") == CHUNK // PAGE + 1
    subprocess.run(["rmmod", "tensormem"], check=True)
    try:
        hog = bytearray(b"\xff" * (64 << 20))  # whoever gets the memory now writes to it
        for (reader, writer), expected in zip(pipes, (b"\x77", b"\x78"), strict=True):
            assert os.read(reader, PAGE) == expected * PAGE
            os.close(reader)
            os.close(writer)
        del hog
    finally:
        subprocess.run(["insmod", MODULE], check=True)
