# SPDX-License-Identifier: MIT
"""The Python library's RT pool and `tensormem rt` on the real device; their own tests drive them on a fake."""

from __future__ import annotations

import gc
import json
import os
import socket
import struct
import threading
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import tensormem
from device import CHUNK, SYSFS, read, wait_for
from process import status_of
from tensormem import errors
from tensormem.cli import cli

KIB = 1 << 10


def command(*words: object, code: int = 0) -> str:
    """What `tensormem rt` prints, in this process: to start one takes longer than all it does."""
    result = CliRunner().invoke(cli, ["rt", *map(str, words)], prog_name="tensormem")
    assert result.exit_code == code, result.output
    return result.output


def document(*words: object) -> Any:
    return json.loads(command(*words, "--json"))


# The library


def test_blocks_are_the_arenas_memory() -> None:
    with tensormem.rt("2M", priority=10) as rt:
        assert (rt.size, rt.priority, read("rt/arenas"), read("rt/used")) == (CHUNK, 10, 1, CHUNK)
        block = rt.alloc(6000)
        at = block.offset
        numbers = block.array((10, 20), np.float32)
        numbers[:] = np.arange(200).reshape(10, 20)
        assert struct.unpack_from("<f", rt.memory, at + 4 * 57) == (57.0,)
        rt.memory[at] = 255
        assert block.buffer()[0] == 255
        # another process that has got the descriptor is the same client
        ours, theirs = socket.socketpair()

        def child() -> None:
            _, (fd,), _, _ = socket.recv_fds(theirs, 1, 1)
            with tensormem.RTClient.from_fd(fd) as same:
                assert same.memory[at] == 255
                same.memory[at + 1] = 254

        socket.send_fds(ours, [b"x"], [rt.fileno()])
        assert status_of(child) == 0
        assert block.buffer()[1] == 254
        ours.close()
        theirs.close()
        block.free()
        assert rt.info().used == 0
        del numbers, block
        gc.collect()
    assert (read("rt/arenas"), read("rt/used")) == (0, 0)


def filled(client: tensormem.RTClient) -> list[tensormem.RTBlock]:
    """Blocks of 4 KiB until there is no room."""
    blocks = []
    try:
        while True:
            blocks.append(client.alloc(4 * KIB))
    except errors.ArenaFull:
        return blocks


def test_a_reservation_is_kept_while_the_arena_is_full() -> None:
    with tensormem.rt("2M") as rt:
        rt.reserve(2 * KIB, 16)
        other = rt.join()
        taken = filled(other)
        mine = rt.alloc_many([2 * KIB] * 16, reserved=True)
        assert len({block.offset for block in mine}) == 16
        with pytest.raises(errors.ArenaFull):
            rt.alloc(2 * KIB, reserved=True)
        with pytest.raises(errors.ReservationInUse):
            rt.unreserve(2 * KIB)
        rt.free_many(mine)
        rt.unreserve(2 * KIB)
        with pytest.raises(errors.NotReserved):
            rt.unreserve(2 * KIB)
        other.free_many(taken[:64])
        for block in taken[64:]:
            block.free()
        other.close()
        assert (rt.info().used, rt.info().free) == (0, CHUNK)


def test_a_deadline_is_met_by_who_frees_and_missed_otherwise() -> None:
    missed = read("rt/misses")
    with tensormem.rt("2M") as rt:
        whole = rt.alloc(CHUNK - 4 * KIB)
        with pytest.raises(errors.DeadlineMissed):
            rt.alloc(64 * KIB, 1_000_000)
        assert rt.info().misses == read("rt/misses") - missed == 1
        got: list[tensormem.RTBlock] = []
        waiter = threading.Thread(target=lambda: got.append(rt.alloc(64 * KIB, 300_000_000_000)))
        waiter.start()
        wait_for(lambda: rt.info().waiting == 1)
        whole.free()
        waiter.join()
        assert got[0].size == 64 * KIB
        got.pop().free()


def test_movable_blocks_make_room() -> None:
    with tensormem.rt("2M", movable=256) as rt:
        blocks = [rt.alloc(16 * KIB, movable=True) for _ in range(CHUNK // (16 * KIB) - 2)]
        for number, block in enumerate(blocks):
            block.buffer()[:2] = struct.pack("<H", number)
            block.unpin()
        for block in blocks[::2]:
            block.free()
        large = rt.alloc(512 * KIB, 300_000_000_000)
        assert rt.info().moves > 0
        for number, block in list(enumerate(blocks))[1::2]:
            with block.pinned() as view:
                assert bytes(view[:2]) == struct.pack("<H", number)
        large.free()
        for block in blocks[1::2]:
            block.free()
        with pytest.raises(errors.NoSuchBlock):
            large.free()


def test_a_prepared_buffer() -> None:
    with tensormem.rt("2M") as rt:
        rt.reserve(2 * KIB, 1)
        with rt.buffer(1500, reserved=True) as frame:
            places = set()
            for number in range(100):
                offset = frame.take()
                struct.pack_into("<I", rt.memory, offset, number)
                places.add(offset)
                frame.give()
            assert len(places) == 1
        assert (rt.info().used, rt.info().allocs) == (0, 100)


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ({"size": 1 << 50}, errors.RTPoolFull),
        ({"size": 0}, errors.InvalidArgument),
        ({"size": "2M", "priority": 100}, errors.InvalidArgument),
        ({"size": "2M", "movable": 1 << 20}, errors.InvalidArgument),
        ({"arena": 0}, errors.TensormemError),
    ],
)
def test_arenas_that_cannot_be(how: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        tensormem.rt(**how)
    assert read("rt/arenas") == 0


# The command line


def test_list_and_show() -> None:
    assert document("list") == {"clients": []}
    with tensormem.rt("4M", priority=7) as rt:
        rt.reserve(KIB, 10)
        block = rt.alloc(KIB)
        (listed,) = document("list")["clients"]
        number = listed["id"]
        shown = document("show", number)
        expected = {"size": 2 * CHUNK, "priority": 7, "reserved": rt.info().reserved, "used": rt.info().used,
                    "blocks": 1, "allocs": 1, "refused": 0, "misses": 0}  # fmt: skip
        for found in (listed, shown):
            assert {name: found[name] for name in expected} == expected
        assert "priority 7" in command("show", number)
        assert document("show")["used"] == 2 * CHUNK
        block.free()
    command("show", number, code=1)


@pytest.mark.usefixtures("settings")
def test_size_and_ready() -> None:
    assert document("size") == {"size": read("rt/size")}
    assert document("size", "8M") == {"size": 8 << 20}
    assert read("rt/size") == 8 << 20
    assert document("ready", "4M") == {"ready": 4 << 20}
    assert (read("rt/ready"), read("rt/held")) == (4 << 20, 4 << 20)
    command("size", "2M", code=1)  # less than is set aside
    command("ready", "16M", code=1)
    command("size", "lots", code=2)
    assert (read("rt/size"), read("rt/ready")) == (8 << 20, 4 << 20)
    assert document("ready", "0") == {"ready": 0}
    assert read("rt/held") == 0


def test_priority() -> None:
    with tensormem.rt("2M") as rt:
        (folder,) = (path for path in (SYSFS / "rt").iterdir() if path.is_dir())
        assert document("priority", folder.name)["priority"] == 0
        assert document("priority", folder.name, 42)["priority"] == 42
        assert (rt.priority, int((folder / "priority").read_text())) == (42, 42)
        command("priority", folder.name, 100, code=2)
        assert rt.priority == 42
    command("priority", folder.name, 1, code=1)


def test_the_test_keeps_its_promise() -> None:
    found = document("test", "--count", 300, "--deadline-us", 60_000_000)
    assert (found["count"], found["refused"], found["misses"]) == (300, 0, 0)
    assert sum(found["taking"]) == sum(found["giving"]) == 300
    assert read("rt/arenas") == 0


def test_root_only() -> None:
    """What changes settings of all is for root; to look is for everybody."""
    size = read("rt/size")

    def child() -> None:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        assert json.loads(command("size", "--json")) == {"size": size}
        assert "root" in command("size", "2M", code=1)

    assert status_of(child) == 0
    assert read("rt/size") == size
