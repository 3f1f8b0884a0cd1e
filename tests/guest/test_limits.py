# SPDX-License-Identifier: MIT
"""The system's limits hold for our memory as for any other: cgroups, RLIMIT_MEMLOCK, capabilities.

Each happens in a child that gives up what the limit is not for, and answers in JSON.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from device import CHUNK, PAGE, Raw, address_of, read, wait_for, weights, write
from process import hold, let_go, libc
from tensormem import abi

CGROUPS = Path("/sys/fs/cgroup")
NOZERO, PINNED = abi.AllocFlag.NOZERO, abi.AllocFlag.PINNED
HUGE, PAGED = abi.AllocFlag.HUGE, abi.AllocFlag.PAGED
CAP_IPC_LOCK, CAP_SYS_ADMIN, CAP_SYS_RESOURCE = 14, 21, 24
CAPGET, CAPSET, CAPABILITY_VERSION_3 = 90, 91, 0x20080522
NOBODY = 65534


class Child:
    """A process that runs @action and sends back what it returns, then waits to be told to go."""

    def __init__(self, action: Callable[[], Any]) -> None:
        self.reader, writer = os.pipe()
        stay, self.go = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.reader)
            os.close(self.go)
            try:
                answer = action()
            except BaseException:
                answer = traceback.format_exc()
            with os.fdopen(writer, "w") as out:
                json.dump(answer, out)
            os.read(stay, 1)
            os._exit(0)
        os.close(writer)
        os.close(stay)

    def answer(self) -> Any:
        with os.fdopen(self.reader) as file:
            return json.load(file)

    def end(self, number: int = 0) -> None:
        if number:
            os.kill(self.pid, number)
        os.close(self.go)
        status = os.waitpid(self.pid, 0)[1]
        assert (os.WTERMSIG(status) if number else status) == number


def in_child(action: Callable[[], Any]) -> Any:
    child = Child(action)
    answer = child.answer()
    child.end()
    return answer


def drop(*capabilities: int) -> None:
    """Be root without these."""
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    data = (ctypes.c_uint32 * 6)()
    assert libc.syscall(CAPGET, header, data) == 0
    for capability in capabilities:
        for word in (0, 1):  # effective and permitted
            data[word + 3 * (capability // 32)] &= ~(1 << capability % 32)
    assert libc.syscall(CAPSET, header, data) == 0


def take_all(client: Raw, size: int, flags: int = 0) -> tuple[int, int]:
    """Allocate until it fails; how many and the errno."""
    count = 0
    while True:
        result, item = client.try_alloc(size, flags=flags)
        if result:
            return count, result
        client.map_tensor(item)[size - 1] = 1
        count += 1


# Memory cgroups


@pytest.fixture
def cgroup(settings: None) -> Iterator[Path]:
    if not CGROUPS.joinpath("cgroup.controllers").exists():
        CGROUPS.mkdir(exist_ok=True)
        assert libc.mount(b"cgroup2", bytes(CGROUPS), b"cgroup2", 0, None) == 0
    assert "memory" in CGROUPS.joinpath("cgroup.controllers").read_text().split()
    CGROUPS.joinpath("cgroup.subtree_control").write_text("+memory")
    path = CGROUPS / "tensormem-test"
    path.mkdir()
    yield path
    wait_for(lambda: remove(path))
    CGROUPS.joinpath("cgroup.subtree_control").write_text("-memory")


def remove(path: Path) -> bool:
    try:
        path.rmdir()
    except OSError:  # a process is on its way out
        return False
    return True


def join(cgroup: Path) -> None:
    cgroup.joinpath("cgroup.procs").write_text("0")


def current(cgroup: Path) -> int:
    return int(cgroup.joinpath("memory.current").read_text())


def happened(cgroup: Path) -> dict[str, int]:
    lines = cgroup.joinpath("memory.events").read_text().split("\n")
    return {name: int(count) for name, count in (line.split() for line in lines if line)}


LIMIT = 48 << 20
#: What Python and page tables may take of it.
SLACK = 16 << 20


@pytest.mark.parametrize("size", [2 * PAGE, 1 << 20, CHUNK, 3 * CHUNK])
@pytest.mark.parametrize("flags", [0, HUGE])
def test_a_cgroup_is_not_exceeded(cgroup: Path, size: int, flags: int) -> None:
    """ENOMEM at the limit: nobody is killed, all of it is on the bill and off it again."""
    cgroup.joinpath("memory.max").write_text(str(LIMIT))

    def inside() -> list[int]:
        join(cgroup)
        client = Raw()
        before = current(cgroup)
        held, code = 0, 0
        while held <= LIMIT:
            code, _ = client.try_alloc(size, flags=flags)
            if code:
                break
            held += size
        charged, billed = read("chunk/charged"), current(cgroup) - before
        used = client.info().used
        client.close()
        wait_for(lambda: read("chunk/charged") == 0)
        return [code, held, used, charged, billed, current(cgroup) - before]

    code, held, used, charged, billed, after = in_child(inside)
    assert code == errno.ENOMEM
    assert used == held
    assert LIMIT - SLACK <= held <= LIMIT
    assert charged == -(-held // CHUNK)
    # at its limit the cgroup loses what Python has of the page cache
    assert held - SLACK // 4 <= billed <= LIMIT
    assert after < SLACK // 4
    events = happened(cgroup)
    assert events["max"] > 0
    assert events["oom_kill"] == 0


def test_others_are_not_affected(raw: Raw, cgroup: Path) -> None:
    """A cgroup at its limit: the rest of the machine allocates, and nothing of it is charged."""
    cgroup.joinpath("memory.max").write_text(str(LIMIT))

    def inside() -> list[int]:
        join(cgroup)
        return [*take_all(Raw(), CHUNK)]

    child = Child(inside)
    count, code = child.answer()
    assert code == errno.ENOMEM
    charged = read("chunk/charged")
    assert charged == count
    billed = current(cgroup)
    items = [raw.alloc(size) for size in (CHUNK, 4 * CHUNK, PAGE, 1 << 20) for _ in range(4)]
    assert read("chunk/charged") == charged
    assert abs(current(cgroup) - billed) < CHUNK
    assert raw.free_batch([item.handle for item in items])[0] == 0
    # killed, and all of it is back
    child.end(signal.SIGKILL)
    wait_for(lambda: read("chunk/charged") == 0)
    wait_for(lambda: current(cgroup) < CHUNK)
    assert happened(cgroup)["oom_kill"] == 0


def test_weights_come_back_on_their_stagers_bill(cgroup: Path) -> None:
    """Whoever touches them; and at its limit the cgroup's own make room, which costs nobody else anything."""
    path, data = Path("/var/tmp/billed.bin"), weights("billed", 4 * CHUNK)
    path.write_bytes(data)
    new = abi.OpenFlag.CREATE | abi.OpenFlag.EXCL | abi.OpenFlag.WRITE

    def inside() -> int:
        join(cgroup)
        with Raw() as client, client.slot("billed", new, mode=0o600) as slot:
            file = os.open(path, os.O_RDONLY)
            return slot.commit(slot.stage(file, abi.StageFlag.EVICTABLE).loaded().number)

    assert in_child(inside) == 0
    with Raw() as client, client.slot("billed") as slot, slot.acquire() as gen:
        assert read("chunk/charged") == 4
        item = abi.ModelEvict()
        assert slot.ioctl(abi.IOC_MODEL_EVICT, item) == 0
        assert (item.bytes, read("chunk/charged")) == (4 * CHUNK, 0)
        before = current(cgroup)
        assert os.pread(gen.fd, PAGE, CHUNK) == data[CHUNK : CHUNK + PAGE]
        assert read("chunk/charged") == 1
        assert abs(current(cgroup) - before - CHUNK) < CHUNK // 4
        # room for two and a half
        cgroup.joinpath("memory.max").write_text(str(before + 5 * CHUNK // 2))
        for _ in range(3):
            assert gen.contents() == data
            assert 1 <= read("chunk/charged") <= 2
        cgroup.joinpath("memory.max").write_text("max")
        assert client.info().used == 0
        assert slot.remove() == 0
    wait_for(lambda: read("chunk/charged") == 0)
    assert happened(cgroup)["oom_kill"] == 0
    path.unlink()


def test_others_keep_what_would_not_help(raw: Raw, cgroup: Path) -> None:
    """Giving up memory that is not on the cgroup's bill makes no room on it."""
    cgroup.joinpath("memory.max").write_text(str(LIMIT))
    for size in (CHUNK, 3 * PAGE):
        assert raw.free(raw.alloc(size, flags=NOZERO).handle) == 0
    kept = raw.info().kept

    def inside() -> list[int]:
        join(cgroup)
        with Raw() as client:
            return [*take_all(client, CHUNK)]

    assert in_child(inside)[1] == errno.ENOMEM
    assert raw.info().kept == kept


def test_the_ready_chunks_are_not_a_way_around(cgroup: Path) -> None:
    """Free chunks of the pool, and its reserve, were charged to nobody: a cgroup gets others."""
    cgroup.joinpath("memory.max").write_text(str(LIMIT))
    assert write("chunk/reserve", 8) == 0
    with Raw() as client:
        client.alloc(32 * CHUNK)
    wait_for(lambda: read("chunk/zeroed") >= 8)
    assert read("chunk/free") >= 32

    def inside() -> list[int]:
        join(cgroup)
        with Raw() as client:
            return [*take_all(client, CHUNK), read("chunk/charged")]

    count, code, charged = in_child(inside)
    assert code == errno.ENOMEM
    assert count == charged <= LIMIT // CHUNK
    assert read("chunk/free") >= 32  # not at their cost


def test_pages_of_others_are_not_a_way_around(raw: Raw, cgroup: Path) -> None:
    """Nor are the free pages of chunks that others have begun."""
    cgroup.joinpath("memory.max").write_text(str(LIMIT))
    # every other half of 32 chunks is free
    items = [raw.alloc(CHUNK // 2) for _ in range(64)]
    assert raw.free_batch([item.handle for item in items[1::2]])[0] == 0

    def inside() -> list[int]:
        join(cgroup)
        client = Raw()
        code = held = 0
        while held <= 2 * LIMIT:
            code, _, _ = client.alloc_batch([CHUNK // 4] * 4)
            if code:
                break
            held += CHUNK
        return [held, code]

    held, code = in_child(inside)
    assert code == errno.ENOMEM
    assert held <= LIMIT


def test_others_do_not_live_at_a_cgroups_cost(raw: Raw, cgroup: Path) -> None:
    """A cgroup pays for the pages it has, and not for what others put beside them."""

    def inside() -> int:
        join(cgroup)
        return Raw().alloc(PAGE).handle

    child = Child(inside)
    assert child.answer()
    assert read("chunk/charged") == 1
    raw.alloc(CHUNK // 2)
    child.end()
    wait_for(lambda: read("clients/count") == 1)
    assert read("chunk/charged") == 0


def test_reuse_stays_on_the_bill(cgroup: Path) -> None:
    cgroup.joinpath("memory.max").write_text(str(LIMIT))

    def inside() -> list[int]:
        join(cgroup)
        client = Raw()
        handles = [client.alloc(CHUNK, flags=NOZERO).handle for _ in range(8)]
        assert client.free_batch(handles)[0] == 0
        kept = [client.info().kept, read("chunk/charged"), current(cgroup)]
        # at the limit it is given up for what is new
        count, code = take_all(client, CHUNK)
        return [*kept, count, code, client.info().kept]

    kept, charged, billed, count, code, left = in_child(inside)
    assert kept == 8 * CHUNK <= billed
    assert charged == 8
    assert code == errno.ENOMEM
    assert count * CHUNK >= LIMIT - SLACK
    assert left == 0


def test_memory_stays_with_the_cgroup_it_was_charged_to(raw: Raw, cgroup: Path) -> None:
    """A descriptor that was passed on: who allocates pays, until it is freed by whomever."""
    cgroup.joinpath("memory.max").write_text(str(LIMIT))

    def inside() -> list[int]:
        join(cgroup)
        return [raw.alloc(CHUNK).handle, raw.alloc(4 * CHUNK, flags=PAGED).handle]

    handles = in_child(inside)
    assert read("chunk/charged") == 5
    assert current(cgroup) >= 5 * CHUNK
    assert raw.free_batch(handles)[0] == 0
    assert read("chunk/charged") == 0
    wait_for(lambda: current(cgroup) < CHUNK)


# RLIMIT_MEMLOCK


@pytest.fixture
def clients() -> Iterator[list[Raw]]:
    """Two clients, opened while that is allowed."""
    two = [Raw(), Raw()]
    yield two
    for client in two:
        client.close()


def become_nobody(limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


@pytest.mark.parametrize("size", [PAGE, 1 << 20, CHUNK + PAGE])
def test_memlock(clients: list[Raw], size: int) -> None:
    """Per user, over all of its clients; what is freed can be had again."""
    one, two = clients
    limit = 4 * size

    def unprivileged() -> list[object]:
        become_nobody(limit)
        items = [client.alloc(size, flags=PINNED) for client in (one, two, one, two)]
        full = [client.try_alloc(PAGE, flags=PINNED)[0] for client in clients]
        unpinned = one.try_alloc(size)[0]
        freed = one.free(items[0].handle)
        again = two.try_alloc(size, flags=PINNED)[0]
        full += [one.try_alloc(PAGE, flags=PINNED)[0]]
        batch = (one.free(items[2].handle), one.alloc_batch([size, PAGE], flags=PINNED)[0],
                 one.try_alloc(size, flags=PINNED)[0])  # fmt: skip
        return [full, unpinned, freed, again, batch]

    assert in_child(unprivileged) == [
        [errno.EPERM] * 3, 0, 0, 0, [0, errno.EPERM, 0]
    ]  # fmt: skip


@pytest.mark.parametrize("end", ["exit", "kill", "kept", "close"])
def test_memlock_is_given_back(end: str) -> None:
    def unprivileged(client: Raw) -> list[int]:
        become_nobody(CHUNK)
        results = [client.try_alloc(CHUNK, flags=PINNED | NOZERO) for _ in range(2)]
        if end == "kept":
            client.free(results[0][1].handle)
            results.append(client.try_alloc(CHUNK, flags=PINNED | NOZERO))
        if end == "close":
            client.close()
        return [code for code, _ in results]

    before = read("clients/count")
    for _ in range(3):
        client = Raw()
        child = Child(lambda client=client: unprivileged(client))
        client.close()
        assert child.answer() == [0, errno.EPERM, 0][: 3 if end == "kept" else 2]
        child.end(signal.SIGKILL if end == "kill" else 0)
        wait_for(lambda: read("clients/count") == before)


def test_memlock_counts_what_is_held(raw: Raw) -> None:
    """A byte in the chunk pool pins a chunk."""

    def unprivileged() -> list[int]:
        become_nobody(CHUNK)
        return [raw.try_alloc(1, pool=abi.Pool.CHUNK, flags=PINNED)[0] for _ in range(2)]

    assert in_child(unprivileged) == [0, errno.EPERM]


def test_memlock_makes_way_for_pinning_again(raw: Raw) -> None:
    """What is kept for reuse does not stand in the way of its own user."""

    def unprivileged() -> list[int]:
        become_nobody(4 * PAGE)
        item = raw.alloc(4 * PAGE, flags=PINNED | NOZERO)
        return [raw.free(item.handle), raw.try_alloc(3 * PAGE, flags=PINNED)[0]]

    assert in_child(unprivileged) == [0, 0]


@pytest.mark.parametrize("limit", [0, PAGE - 1, PAGE])
def test_memlock_of_little(raw: Raw, limit: int) -> None:
    def unprivileged() -> list[int]:
        become_nobody(limit)
        return [raw.try_alloc(1, flags=PINNED)[0], raw.try_alloc(PAGE + 1, flags=PINNED)[0],
                raw.try_alloc(1 << 29, flags=PINNED)[0], raw.try_alloc(1)[0]]  # fmt: skip

    assert in_child(unprivileged) == [
        0 if limit >= PAGE else errno.EPERM, errno.EPERM, errno.EPERM, 0
    ]  # fmt: skip


def test_ipc_lock_is_exempt(raw: Raw) -> None:
    def root(*without: int) -> list[int]:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (PAGE, PAGE))
        drop(*without)
        return [raw.try_alloc(CHUNK, flags=PINNED)[0], raw.try_alloc(PAGE, flags=PINNED)[0]]

    assert in_child(root) == [0, 0]
    assert in_child(lambda: root(CAP_IPC_LOCK)) == [errno.EPERM, 0]
    assert in_child(lambda: root(CAP_SYS_ADMIN, CAP_SYS_RESOURCE)) == [0, 0]


# Capabilities


@pytest.mark.parametrize("name", ["chunk/reserve", "chunk/capacity", "clients/default_quota"])
def test_settings_need_sys_admin(name: str) -> None:
    """Root's uid opens the file; it takes the capability to write."""
    before = read(name)

    def root(*without: int) -> int:
        drop(*without)
        return write(name, before)

    assert in_child(lambda: root(CAP_SYS_ADMIN)) == errno.EPERM
    assert in_child(lambda: root(CAP_IPC_LOCK, CAP_SYS_RESOURCE)) == 0
    assert read(name) == before


def test_a_quota_above_the_default_needs_sys_resource(settings: None) -> None:
    assert write("clients/default_quota", CHUNK) == 0
    with Raw() as client:

        def root(*without: int) -> list[int]:
            drop(*without)
            return [client.set_quota(CHUNK), client.set_quota(CHUNK + 1)]

        assert in_child(lambda: root(CAP_SYS_RESOURCE)) == [0, errno.EPERM]
        assert in_child(lambda: root(CAP_SYS_ADMIN)) == [0, 0]


# The quota


def test_the_quota_bounds_what_others_hold(raw: Raw) -> None:
    """Allocate, have it held, free, and again: that ends at the quota."""
    assert raw.set_quota(4 * CHUNK) == 0
    pipes = []
    code = 0
    while len(pipes) < 20:
        code, item = raw.try_alloc(CHUNK)
        if code:
            break
        mapping = raw.map_tensor(item)
        pipes.append(hold(address_of(mapping), PAGE))
        mapping.close()
        assert raw.free(item.handle) == 0
    assert (code, len(pipes)) == (errno.EDQUOT, 4)
    assert (raw.info().used, raw.info().kept) == (4 * CHUNK, 4 * CHUNK)
    let_go(pipes.pop())
    wait_for(lambda: raw.info().kept == 3 * CHUNK)
    assert raw.try_alloc(CHUNK)[0] == 0
    assert raw.try_alloc(PAGE)[0] == errno.EDQUOT
    for pipe in pipes:
        let_go(pipe)
    wait_for(lambda: read("chunk/quarantined") == 0)


def test_time_does_not_raise_what_is_held(raw: Raw) -> None:
    """The worker that looks at held pages takes nothing off the bill too early."""
    assert raw.set_quota(2 * PAGE) == 0
    item = raw.alloc(2 * PAGE)
    mapping = raw.map_tensor(item)
    pipe = hold(address_of(mapping), PAGE)
    mapping.close()
    assert raw.free(item.handle) == 0
    for _ in range(8):
        assert raw.try_alloc(1, abi.Kind.KV)[0] == errno.EDQUOT
        assert raw.info().used == 2 * PAGE
        time.sleep(0.05)
    let_go(pipe)
    wait_for(lambda: raw.info().used == 0)
