# SPDX-License-Identifier: MIT
"""Pages that somebody else holds when their tensor is freed are not handed out before.

Until they are let go they stay on the bill of the client that had them.
"""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import process
from device import CHUNK, PAGE, Raw, address_of, read, wait_for, write
from tensormem import abi

MODULE = Path(__file__).parents[2] / "kmod/tensormem.ko"
FLAGS = (abi.AllocFlag.PAGED, abi.AllocFlag.HUGE)

Hold = type(process.hold)


@pytest.fixture
def hold() -> Iterator[Hold]:
    """process.hold(), let go of when the test is over, however it ends."""
    pipes: list[tuple[int, int]] = []

    def one(address: int, length: int) -> tuple[int, int]:
        pipes.append(process.hold(address, length))
        return pipes[-1]

    yield one
    for pipe in pipes:
        process.let_go(pipe)
    wait_for(lambda: read("chunk/quarantined") == 0)


def usage(client: Raw) -> tuple[int, int]:
    info = client.info()
    return info.used, info.kept


def drain(pipe: tuple[int, int], length: int) -> bytes:
    """Read what a pipe holds, which lets go of its pages."""
    data = os.read(pipe[0], length)
    wait_for(lambda: read("chunk/quarantined") == 0)
    return data


def test_held_pages_are_set_aside(raw: Raw, hold: Hold) -> None:
    item = raw.alloc(8 * PAGE)
    mapping = raw.map_tensor(item)
    mapping[:] = b"\x5a" * (8 * PAGE)
    pipe = hold(address_of(mapping) + PAGE, 2 * PAGE)
    mapping.close()
    assert raw.free(item.handle) == 0
    # the whole run they are part of
    assert read("chunk/quarantined") == 8
    assert read("buddy/used_pages") == 8
    assert usage(raw) == (8 * PAGE, 8 * PAGE)
    assert (raw.info().nr_tensors, read("clients/tensors")) == (0, 0)
    assert read("clients/bytes") == read("clients/kept") == 8 * PAGE
    # nobody gets them, however much is asked for
    window = raw.map_window()
    for _ in range(64):
        other = raw.alloc(8 * PAGE)
        window[other.offset : other.offset + 8 * PAGE] = b"\xff" * (8 * PAGE)
    time.sleep(0.3)
    assert read("chunk/quarantined") == 8
    assert usage(raw) == (65 * 8 * PAGE, 8 * PAGE)
    assert drain(pipe, 2 * PAGE) == b"\x5a" * (2 * PAGE)
    assert usage(raw) == (64 * 8 * PAGE, 0)
    window.close()


@pytest.mark.parametrize("flags", FLAGS)
def test_only_the_held_extents_are_set_aside(raw: Raw, hold: Hold, flags: int) -> None:
    """Of two chunks and a run, the chunk that is held waits; the rest is free at once."""
    item = raw.alloc(2 * CHUNK + PAGE, flags=flags)
    mapping = raw.map_tensor(item)
    mapping[CHUNK + 3 * PAGE] = 9
    pipe = hold(address_of(mapping) + CHUNK + 3 * PAGE, PAGE)
    mapping.close()
    assert raw.free(item.handle) == 0
    assert read("chunk/quarantined") == CHUNK // PAGE
    assert read("chunk/used") == 1
    assert read("buddy/used_pages") == 0
    assert usage(raw) == (CHUNK, CHUNK)
    assert drain(pipe, PAGE)[0] == 9
    assert read("chunk/used") == 0
    assert usage(raw) == (0, 0)


@pytest.mark.parametrize("flags", FLAGS)
def test_a_held_chunk_is_nobodys(
    raw: Raw, hold: Hold, settings: None, flags: int
) -> None:
    """All of the capacity but the held chunk can be had, and the held one only afterwards."""
    assert write("chunk/reserve", 0) == 0
    assert write("chunk/capacity", 4) == 0
    item = raw.alloc(CHUNK, flags=flags)
    mapping = raw.map_tensor(item)
    mapping[:] = b"\x11" * CHUNK
    first, last = hold(address_of(mapping), PAGE), hold(address_of(mapping) + CHUNK - PAGE, PAGE)
    assert raw.free(item.handle) == 0
    with Raw() as other:
        window = other.map_window()
        others = [other.alloc(CHUNK, flags=flags) for _ in range(3)]
        for one in others:
            window[one.offset : one.offset + CHUNK] = b"\x22" * CHUNK
        assert other.try_alloc(CHUNK)[0] == errno.ENOSPC
        assert other.try_alloc(PAGE)[0] == errno.ENOSPC
        # one of two is not enough
        assert os.read(first[0], PAGE) == b"\x11" * PAGE
        time.sleep(0.3)
        assert other.try_alloc(PAGE)[0] == errno.ENOSPC
        assert usage(raw) == (CHUNK, CHUNK)
        assert drain(last, PAGE) == b"\x11" * PAGE
        assert usage(raw) == (0, 0)
        fourth = other.alloc(CHUNK, flags=flags)
        assert window[fourth.offset : fourth.offset + CHUNK] == bytes(CHUNK)
        window.close()
    mapping.close()


def test_the_quota_counts_what_is_held(raw: Raw, hold: Hold) -> None:
    """Freeing what is held does not make room: else a loop of that would have no bound."""
    assert raw.set_quota(4 * PAGE) == 0
    item = raw.alloc(4 * PAGE)
    mapping = raw.map_tensor(item)
    pipe = hold(address_of(mapping), PAGE)
    mapping.close()
    assert raw.free(item.handle) == 0
    assert raw.try_alloc(1)[0] == errno.EDQUOT
    assert raw.set_quota(4 * PAGE - 1) == errno.EBUSY
    assert usage(raw) == (4 * PAGE, 4 * PAGE)
    drain(pipe, PAGE)
    assert raw.free(raw.alloc(4 * PAGE).handle) == 0


def test_the_holder_outlives_the_client(hold: Hold) -> None:
    client = Raw()
    item = client.alloc(PAGE)
    mapping = client.map_tensor(item)
    mapping[:5] = b"still"
    pipe = hold(address_of(mapping), PAGE)
    mapping.close()
    client.close()
    assert (read("clients/count"), read("clients/tensors")) == (0, 0)
    assert read("chunk/quarantined") == 1
    assert read("clients/bytes") == read("clients/kept") == PAGE
    assert drain(pipe, PAGE)[:5] == b"still"
    assert read("clients/bytes") == read("clients/kept") == 0


@pytest.mark.parametrize("flags", FLAGS)
def test_the_holder_outlives_the_module(flags: int) -> None:
    """What is still held at unload is the holder's: neither zeroed nor reused before it is done."""
    with Raw() as client:
        item = client.alloc(CHUNK + PAGE, flags=flags)
        mapping = client.map_tensor(item)
        mapping[:PAGE] = b"\x77" * PAGE
        mapping[CHUNK:] = b"\x78" * PAGE
        pipes = [process.hold(address_of(mapping) + at, PAGE) for at in (0, CHUNK)]
        mapping.close()
    assert read("chunk/quarantined") == CHUNK // PAGE + 1
    subprocess.run(["rmmod", "tensormem"], check=True)
    try:
        hog = bytearray(b"\xff" * (64 << 20))  # whoever gets the memory now writes to it
        for pipe, expected in zip(pipes, (b"\x77", b"\x78"), strict=True):
            assert os.read(pipe[0], PAGE) == expected * PAGE
            process.let_go(pipe)
        del hog
    finally:
        subprocess.run(["insmod", MODULE], check=True)
