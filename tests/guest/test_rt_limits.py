# SPDX-License-Identifier: MIT
"""How much the RT pool gives out, to whom: its size, quotas, locked memory, capabilities, what is set aside."""

from __future__ import annotations

import errno
import mmap
import os
import random
import re
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_limits import (
    CAP_IPC_LOCK,
    CAP_SYS_ADMIN,
    CAP_SYS_RESOURCE,
    Child,
    become_nobody,
    cgroup,
    current,
    drop,
    happened,
    in_child,
    join,
)

from device import CHUNK, PAGE, RT, SYSFS, Raw, address_of, becomes, read, wait_for, write
from process import hold, let_go
from tensormem import abi

__all__ = ["cgroup"]  # a fixture

MODULE = Path(__file__).parents[2] / "kmod/tensormem.ko"
CAP_SYS_NICE = 23
PINNED = abi.AllocFlag.PINNED
MIB = 1 << 20
#: MiB of RAM, for models, for protocols; by board.
BOARDS = {
    "Raspberry Pi Zero 2": (512, 350, 64),
    "Raspberry Pi 3": (1024, 600, 128),
    "Raspberry Pi 4": (4096, 2560, 256),
    "Raspberry Pi 5": (8192, 6144, 512),
}

pytestmark = pytest.mark.usefixtures("settings")


def size_is(chunks: int) -> None:
    assert write("rt/size", chunks * CHUNK) == 0


def pool() -> tuple[int, int, int]:
    """Chunks held and used, and arenas."""
    return read("rt/held") // CHUNK, read("rt/used") // CHUNK, read("rt/arenas")


# Boards and parameters


@contextmanager
def reloaded(*parameters: str) -> Iterator[None]:
    """The module with other parameters, and then again as it was."""
    subprocess.run(["rmmod", "tensormem"], check=True)
    subprocess.run(["insmod", MODULE, *parameters], check=True)
    try:
        yield
    finally:
        subprocess.run(["rmmod", "tensormem"], check=True)
        subprocess.run(["insmod", MODULE], check=True)


def test_this_board() -> None:
    """No Raspberry Pi: the row that is nearest in RAM, scaled to what there is."""
    total = os.sysconf("SC_PHYS_PAGES") * PAGE
    ram = read("board/ram")
    assert abs(ram - total) < total // 50
    nearest = min(BOARDS, key=lambda name: abs(BOARDS[name][0] * MIB - total))
    row, models, protocols = BOARDS[nearest]
    assert nearest in (SYSFS / "board/name").read_text()
    assert read("board/model_bytes") == ram * models // row
    assert read("board/protocol_bytes") == ram * protocols // row


def test_nothing_is_taken_before_it_is_asked_for() -> None:
    with reloaded():
        assert read("rt/size") == read("board/protocol_bytes") // CHUNK * CHUNK
        assert (read("rt/ready"), pool(), read("chunk/used")) == (0, (0, 0, 0), 0)


def test_parameters() -> None:
    with reloaded(f"rt_size={7 * CHUNK + 5}", f"rt_ready={3 * CHUNK - 7}", "capacity=50"):
        assert (read("rt/size"), read("rt/ready")) == (7 * CHUNK, 3 * CHUNK)
        assert (pool(), read("chunk/used"), read("chunk/capacity")) == ((3, 0, 0), 3, 50)
        with Raw() as raw, raw.rt(7 * CHUNK):
            assert pool() == (7, 7, 1)
            assert raw.try_rt(1)[0] == errno.ENOSPC
        assert pool() == (3, 0, 0)


def test_parameters_that_cannot_be() -> None:
    """The module is there; what cannot be set aside is not."""
    with reloaded(f"rt_size={4 * CHUNK}", f"rt_ready={5 * CHUNK}"):
        assert (read("rt/size"), read("rt/ready"), pool()) == (4 * CHUNK, 0, (0, 0, 0))


# The pool's size


def test_the_sum_of_all_arenas(raw: Raw) -> None:
    """To the chunk."""
    size_is(6)
    assert read("rt/size") == 6 * CHUNK
    assert raw.try_rt(6 * CHUNK + 1)[0] == errno.ENOSPC
    arenas = [raw.rt(chunks * CHUNK) for chunks in (1, 2, 3)]
    assert pool() == (6, 6, 3)
    assert raw.try_rt(1)[0] == errno.ENOSPC
    joined = raw.join(arenas[2])  # takes none
    for arena in arenas:
        arena.close()
    assert pool() == (3, 3, 1)
    assert raw.try_rt(3 * CHUNK + 1)[0] == errno.ENOSPC
    with raw.rt(3 * CHUNK):
        assert pool() == (6, 6, 2)
    joined.close()
    assert pool() == (0, 0, 0)
    size_is(0)
    assert raw.try_rt(1)[0] == errno.ENOSPC


def test_sizes_that_can_be_set(raw: Raw) -> None:
    ram = os.sysconf("SC_PHYS_PAGES") * PAGE
    size_is(8)
    for value in ("", "x", "-1", "1.5", "1M", str(1 << 64), str(ram + CHUNK), str(1 << 63), str((1 << 64) - 1)):
        assert write("rt/size", value + "\n") in (errno.EINVAL, errno.ERANGE)
        assert read("rt/size") == 8 * CHUNK
    with raw.rt(5 * CHUNK):
        for less in (0, 1, 4 * CHUNK, 5 * CHUNK - 1):
            assert write("rt/size", less) == errno.EBUSY
        assert write("rt/ready", 7 * CHUNK) == 0
        assert write("rt/size", 7 * CHUNK - 1) == errno.EBUSY
        assert write("rt/ready", 0) == 0
        assert write("rt/size", 5 * CHUNK) == 0
    assert write("rt/size", 3 * CHUNK + CHUNK // 2) == 0
    assert read("rt/size") == 3 * CHUNK


def test_races_of_admission() -> None:
    """Four processes open and close arenas: never more than there may be, and in the end all of it."""
    size_is(9)
    results = mmap.mmap(-1, PAGE)
    go, told = os.pipe(), os.pipe()
    children = []
    for number in range(4):
        pid = os.fork()
        if pid == 0:
            dice = random.Random(number)
            raw, mine = Raw(), []
            for _ in range(150):
                chunks = dice.randrange(1, 5)
                result, request = raw.try_rt(chunks * CHUNK)
                if result == 0:
                    mine.append((RT(request.fd), chunks))
                elif result != errno.ENOSPC:
                    os._exit(1)
                elif mine:
                    mine.pop(dice.randrange(len(mine)))[0].close()
                if read("rt/used") > 9 * CHUNK:
                    os._exit(2)
            # whatever is left, a chunk at a time
            while (answer := raw.try_rt(CHUNK))[0] == 0:
                mine.append((RT(answer[1].fd), 1))
            results[number] = sum(chunks for _, chunks in mine)
            os.write(told[1], b"x")
            os.read(go[0], 1)
            os._exit(0)
        children.append(pid)
    for _ in children:
        os.read(told[0], 1)
    assert sum(results[:4]) == 9
    assert pool()[1] == 9
    os.write(go[1], bytes(4))
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 4
    wait_for(lambda: pool() == (0, 0, 0))
    for fd in (*go, *told):
        os.close(fd)
    results.close()


def test_the_capacity_of_the_chunk_pool(raw: Raw) -> None:
    """An arena's chunks are among those; when they are not to be had, nothing is left of it."""
    assert write("chunk/reserve", 0) == 0
    assert write("chunk/capacity", 6) == 0
    size_is(20)
    assert raw.try_rt(7 * CHUNK)[0] == errno.ENOSPC
    assert (pool(), raw.info().used) == ((0, 0, 0), 0)
    with raw.rt(4 * CHUNK):
        item = raw.alloc(CHUNK)
        assert raw.try_rt(2 * CHUNK)[0] == errno.ENOSPC
        assert (pool(), raw.info().used, read("chunk/used")) == ((4, 4, 1), 5 * CHUNK, 5)
        assert raw.free(item.handle) == 0
        raw.rt(2 * CHUNK).close()
    assert pool() == (0, 0, 0)


def test_more_than_the_machine_has(raw: Raw) -> None:
    """ENOMEM, nobody is killed for it, and all of it is back."""
    ram = os.sysconf("SC_PHYS_PAGES") * PAGE // CHUNK
    assert write("chunk/capacity", ram) == 0
    size_is(ram)
    for _ in range(2):
        assert raw.try_rt(ram * CHUNK)[0] == errno.ENOMEM
        assert (pool(), raw.info().used) == ((0, 0, 0), 0)
    assert write("chunk/capacity", 4) == 0


def test_sigkill_of_who_opens() -> None:
    """It stops between two chunks, and what it has taken goes back."""
    size_is(read("chunk/capacity"))
    large = min(64, read("chunk/capacity") - 1)
    for turn in range(6):
        pid = os.fork()
        if pid == 0:
            raw = Raw()
            while True:
                raw.rt(large * CHUNK).close()
        time.sleep(0.1 + turn / 15)
        os.kill(pid, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
        wait_for(lambda: pool() == (0, 0, 0))
    assert write("chunk/capacity", 4) == 0  # or the next test has less memory


# Set aside beforehand


def test_what_is_ready(raw: Raw) -> None:
    """Kept whether arenas use it or not; what is above that comes and goes with them."""
    size_is(10)
    assert write("rt/ready", 4 * CHUNK - 1) == 0
    assert (read("rt/ready"), pool(), read("chunk/used")) == (4 * CHUNK, (4, 0, 0), 4)
    one = raw.rt(3 * CHUNK)
    assert (pool(), read("chunk/used")) == ((4, 3, 1), 4)
    two = raw.rt(4 * CHUNK)
    assert (pool(), read("chunk/used")) == ((7, 7, 2), 7)
    one.close()
    assert pool() == (4, 4, 1)
    assert write("rt/ready", 6 * CHUNK) == 0
    assert pool() == (6, 4, 1)
    assert write("rt/ready", 0) == 0
    assert (read("rt/ready"), pool()) == (0, (4, 4, 1))
    assert write("rt/ready", 5 * CHUNK) == 0
    two.close()
    assert (pool(), read("chunk/used")) == ((5, 0, 0), 5)
    assert write("rt/ready", 0) == 0
    assert (pool(), read("chunk/used")) == ((0, 0, 0), 0)


def test_what_cannot_be_ready() -> None:
    size_is(10)
    for value in ("", "x", "-1", str(1 << 64), str(10 * CHUNK + 1), str((1 << 64) - 1), str((1 << 64) - CHUNK)):
        assert write("rt/ready", value + "\n") in (errno.EINVAL, errno.ERANGE)
    assert write("rt/ready", 3 * CHUNK) == 0
    assert write("chunk/reserve", 0) == 0
    assert write("chunk/capacity", 5) == 0
    assert write("rt/ready", 8 * CHUNK) == errno.ENOSPC
    assert (read("rt/ready"), pool(), read("chunk/used")) == (3 * CHUNK, (3, 0, 0), 3)
    assert write("rt/ready", 0) == 0


def test_what_is_ready_is_there_when_memory_is_not(raw: Raw) -> None:
    """The capacity may be used up by others; an arena of what is ready opens still."""
    size_is(4)
    assert write("rt/ready", 4 * CHUNK) == 0
    assert write("chunk/reserve", 0) == 0
    assert write("chunk/capacity", 5) == 0
    with Raw() as other:
        other.alloc(CHUNK)
        assert other.try_alloc(CHUNK)[0] == errno.ENOSPC
        with raw.rt(4 * CHUNK) as rt:
            assert rt.view()[:] == bytes(4 * CHUNK)
    assert write("rt/ready", 0) == 0


def test_ready_memory_forgets(raw: Raw) -> None:
    """The next arena has it zeroed."""
    size_is(4)
    assert write("rt/ready", 2 * CHUNK) == 0
    for chunks in (2, 1, 3, 2):
        with Raw() as other, other.rt(chunks * CHUNK) as rt:
            view = rt.view()
            assert view[:] == bytes(chunks * CHUNK)
            view[:] = b"\xd6" * (chunks * CHUNK)
            view.close()
    assert pool() == (2, 0, 0)
    assert write("rt/ready", 0) == 0
    item = raw.alloc(4 * CHUNK)
    mapping = raw.map_tensor(item)
    assert mapping[:] == bytes(4 * CHUNK)
    mapping.close()


def test_ready_memory_that_is_held(raw: Raw) -> None:
    """It goes into quarantine, and other memory takes its place."""
    size_is(4)
    assert write("rt/ready", 2 * CHUNK) == 0
    rt = raw.rt(2 * CHUNK)
    view = rt.view()
    view[:] = b"\x41" * (2 * CHUNK)
    pipe = hold(address_of(view), PAGE)
    view.close()
    rt.close()
    becomes("rt/held", 2 * CHUNK)
    assert read("chunk/quarantined") == CHUNK // PAGE
    with raw.rt(4 * CHUNK) as again:
        view = again.view()
        assert view[:] == bytes(4 * CHUNK)
        view[:] = b"\x42" * (4 * CHUNK)
        view.close()
    assert os.read(pipe[0], PAGE) == b"\x41" * PAGE
    let_go(pipe)
    becomes("chunk/quarantined", 0)
    assert write("rt/ready", 0) == 0
    assert pool() == (0, 0, 0)


def test_what_was_held_is_replaced_at_last(raw: Raw) -> None:
    """At the capacity there is no other chunk until it is let go; then what is ready is whole again."""
    size_is(4)
    assert write("rt/ready", 2 * CHUNK) == 0
    assert write("chunk/reserve", 0) == 0
    assert write("chunk/capacity", 2) == 0
    rt = raw.rt(2 * CHUNK)
    view = rt.view()
    pipe = hold(address_of(view), PAGE)
    view.close()
    rt.close()
    assert read("rt/held") == CHUNK
    assert raw.try_rt(2 * CHUNK)[0] == errno.ENOSPC
    time.sleep(0.3)
    let_go(pipe)
    becomes("rt/held", 2 * CHUNK)
    raw.rt(2 * CHUNK).close()
    assert write("rt/ready", 0) == 0


# On whose bill


def test_the_quota(raw: Raw) -> None:
    """Of who makes the arena, for as long as it is there."""
    assert raw.set_quota(5 * CHUNK) == 0
    with raw.rt(3 * CHUNK) as rt, Raw() as other:
        assert raw.try_rt(3 * CHUNK)[0] == errno.EDQUOT
        assert raw.try_alloc(3 * CHUNK)[0] == errno.EDQUOT
        assert raw.set_quota(3 * CHUNK - 1) == errno.EBUSY
        assert pool() == (3, 3, 1)
        assert other.set_quota(0) == 0
        mine = other.join(rt)
        rt.close()
        raw.close()
        assert read("clients/bytes") == 3 * CHUNK
        assert other.info().used == 0
        mine.close()
        assert read("clients/bytes") == 0


def test_locked_memory() -> None:
    """RLIMIT_MEMLOCK, together with pinned tensors; given back by the last close."""
    clients = [Raw(), Raw()]

    def unprivileged() -> list[object]:
        become_nobody(4 * CHUNK)
        one, two = clients
        rt = one.rt(2 * CHUNK)
        answers: list[object] = [two.try_rt(3 * CHUNK)[0], two.try_alloc(3 * CHUNK, flags=PINNED)[0],
                                 two.try_alloc(3 * CHUNK)[0]]  # fmt: skip
        joined = two.join(rt)
        item = two.alloc(2 * CHUNK, flags=PINNED)
        answers += [one.try_rt(1)[0], two.free(item.handle)]
        rt.close()
        answers += [one.try_rt(3 * CHUNK)[0]]
        joined.close()
        answers += [one.try_rt(4 * CHUNK)[0]]
        return answers

    assert in_child(unprivileged) == [errno.EPERM, errno.EPERM, 0, errno.EPERM, 0, errno.EPERM, 0]
    for client in clients:
        client.close()


def test_ipc_lock_is_exempt(raw: Raw) -> None:
    def root(*without: int) -> int:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (PAGE, PAGE))
        drop(*without)
        return raw.try_rt(CHUNK)[0]

    assert in_child(root) == 0
    assert in_child(lambda: root(CAP_SYS_ADMIN, CAP_SYS_RESOURCE, CAP_SYS_NICE)) == 0
    assert in_child(lambda: root(CAP_IPC_LOCK)) == errno.EPERM
    wait_for(lambda: pool() == (0, 0, 0))


@pytest.mark.parametrize("end", ["exit", "kill", "close"])
def test_locked_memory_is_given_back(end: str) -> None:
    def unprivileged(client: Raw) -> list[int]:
        become_nobody(CHUNK)
        result, request = client.try_rt(CHUNK)
        answers = [result, client.try_rt(CHUNK)[0]]
        if end == "close":
            os.close(request.fd)
            answers.append(client.try_rt(CHUNK)[0])
        return answers

    for _ in range(3):
        client = Raw()
        child = Child(lambda client=client: unprivileged(client))
        client.close()
        assert child.answer() == [0, errno.EPERM, 0][: 3 if end == "close" else 2]
        child.end(signal.SIGKILL if end == "kill" else 0)
        wait_for(lambda: pool() == (0, 0, 0))


def test_no_cgroup_pays(raw: Raw, cgroup: Path) -> None:
    """It is the machine's: rt/size bounds it, and not the limit of who happens to open it first."""
    limit = 24 * MIB
    cgroup.joinpath("memory.max").write_text(str(limit))
    size_is(24)

    def inside() -> list[int]:
        join(cgroup)
        before = current(cgroup)
        client = Raw()
        rt = client.rt(20 * CHUNK)
        view = rt.view()
        view[:: PAGE] = b"\1" * len(view[:: PAGE])
        return [current(cgroup) - before, read("chunk/charged"), pool()[0]]

    grown, charged, held = in_child(inside)
    assert grown < 10 * MIB  # for its books, and Python
    assert (charged, held) == (0, 20)
    assert happened(cgroup)["oom_kill"] == 0
    wait_for(lambda: pool() == (0, 0, 0))


# Capabilities


def without_nice(raw: Raw, rt: RT) -> list[object]:
    """What takes CAP_SYS_NICE, and then what does not."""
    before = rt.counts()
    refused = [rt.reserve(256, 1), rt.reserve(512, 0), rt.set_priority(51), rt.set_priority(99),
               raw.try_rt(CHUNK, priority=1)[0], raw.try_rt(0, rt.fd, priority=1)[0]]  # fmt: skip
    same = rt.counts() == before
    block = rt.alloc(256)
    given = [rt.set_priority(50), rt.set_priority(7), rt.free(block.handle), rt.alloc_errno(512, 10**6)]
    refused += [rt.set_priority(8)]
    given += [rt.info().priority, raw.join(rt).info().clients, raw.try_rt(CHUNK)[0]]
    return [refused, same, given]


@pytest.mark.parametrize("who", ["root", "nobody"])
def test_what_takes_sys_nice(raw: Raw, who: str) -> None:
    def unprivileged() -> list[object]:
        if who == "root":
            drop(CAP_SYS_NICE)
        else:
            become_nobody(8 * CHUNK)
        return without_nice(raw, rt)

    with raw.rt(priority=50) as rt:
        assert rt.reserve(512, 2) == 0
        refused, same, given = in_child(unprivileged)
        assert refused == [errno.EPERM] * 7
        assert same
        assert given == [0, 0, 0, 0, 7, 2, 0]
        wait_for(lambda: rt.info().clients == 1)
        assert in_child(lambda: [drop(CAP_SYS_ADMIN, CAP_IPC_LOCK, CAP_SYS_RESOURCE), rt.reserve(256, 1),
                                 rt.set_priority(99)]) == [None, 0, 0]  # fmt: skip


@pytest.mark.parametrize("name", ["rt/size", "rt/ready"])
def test_settings_need_sys_admin(name: str) -> None:
    before = read(name)

    def root(*without: int) -> int:
        drop(*without)
        return write(name, before)

    assert in_child(lambda: root(CAP_SYS_ADMIN)) == errno.EPERM
    assert in_child(lambda: root(CAP_IPC_LOCK, CAP_SYS_RESOURCE, CAP_SYS_NICE)) == 0
    assert read(name) == before


# In sysfs


FILES = ("arena", "size", "priority", "reserved", "used", "blocks", "waiting", "allocs", "refused", "misses", "waits",
         "moves")  # fmt: skip


def folders() -> set[str]:
    return {path.name for path in (SYSFS / "rt").iterdir() if path.is_dir()}


def test_each_client_has_a_folder(raw: Raw) -> None:
    """With what RT_INFO says, and the number of its arena."""
    assert folders() == set()
    with raw.rt(2 * CHUNK, priority=4, movable=8) as one, raw.join(one, 9) as two, raw.rt() as three:
        names = [rt.folder().name for rt in (one, two, three)]
        assert folders() == set(names)
        assert len(set(names)) == 3
        assert one.reserve(3000, 2) == 0
        for rt in (one, two, three):
            rt.fill(30_000)
            rt.alloc_errno(CHUNK // 2, 10**6)
        for rt in (one, two, three):
            counts = rt.counts()
            assert {path.name for path in rt.folder().iterdir()} == {*FILES, "latency", "missed"}
            for name in FILES[1:]:
                assert rt.read(name) == counts[name], name
            for name in ("latency", "missed"):
                assert re.fullmatch(r"\d+( \d+){63}\n", (rt.folder() / name).read_text())
        arenas = [rt.read("arena") for rt in (one, two, three)]
        assert arenas[0] == arenas[1] != arenas[2]
    assert folders() == set()
    with raw.rt() as again:
        assert again.folder().name not in names


def test_priorities_by_sysfs(raw: Raw) -> None:
    with raw.rt() as rt:
        name = str((rt.folder() / "priority").relative_to(SYSFS))
        assert write(name, 42) == 0
        assert rt.info().priority == 42
        for value in ("100", "-1", "x", "", str(1 << 32), str(1 << 64)):
            assert write(name, value + "\n") in (errno.EINVAL, errno.ERANGE)
        assert rt.info().priority == read(name) == 42


def test_folders_come_and_go_under_readers(raw: Raw) -> None:
    """Whoever reads them gets a number or finds nothing; nobody waits for the other."""
    pid = os.fork()
    if pid == 0:
        while True:
            for path in (SYSFS / "rt").glob("*/*"):
                try:
                    words = path.read_text().split()
                except OSError:
                    continue
                if not all(word.isdigit() for word in words):
                    os._exit(1)
    for turn in range(60):
        with raw.rt(priority=turn) as rt, raw.join(rt) as other:
            other.alloc(256)
            rt.alloc(256)
    os.kill(pid, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL


def test_totals_outlive_clients(raw: Raw) -> None:
    names = ("allocs", "refused", "misses", "waits")

    def totals() -> dict[str, int]:
        return {name: read(f"rt/{name}") for name in names}

    def times(name: str) -> int:
        return sum(map(int, (SYSFS / "rt" / name).read_text().split()))

    before, latency, missed = totals(), times("latency"), times("missed")
    with raw.rt() as rt:
        blocks = rt.fill(CHUNK // 4)
        assert rt.free(blocks[0].handle) == 0
        rt.alloc(CHUNK // 4, 10**9)
        for _ in range(3):
            assert rt.alloc_errno(1, 10**6) == errno.ETIMEDOUT
        expected = {name: before[name] + rt.read(name) for name in names}
        assert totals() == expected
    assert totals() == expected
    assert expected == {name: before[name] + n for name, n in zip(names, (5, 1, 3, 3), strict=True)}
    assert (times("latency"), times("missed")) == (latency + 1, missed + 3)
