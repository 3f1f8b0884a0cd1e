# SPDX-License-Identifier: MIT
"""Events by netlink: each reader gets each event of its groups, or is told exactly what it missed."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tensormem
from device import CHUNK, PAGE, RT, Raw, Slot, chain, full, wait_for, weights
from device import events as traced
from process import killed_at_random, libc, status_of
from tensormem import abi, errors, netlink
from tensormem.netlink import GROUPS, Event, Events, Missed

MODULES = Path(__file__).parents[2] / "kmod"
DEBUGFS = Path("/sys/kernel/debug/tm_bench_event")
#: Events that wait for the worker.
RING = 256
CLONE_NEWNET = 0x40000000
#: A test of many does it with fewer where everything takes long.
SLOW = Path("/sys/kernel/debug/kmemleak").exists()


@pytest.fixture(scope="module", autouse=True)
def bench() -> Iterator[None]:
    """What makes events in hard interrupts."""
    subprocess.run(["insmod", MODULES / "tests/tm_bench_event.ko"], check=True)
    yield
    subprocess.run(["rmmod", "tm_bench_event"], check=True)


def burst(count: int) -> None:
    """So many events of the group bandwidth, in one hard interrupt under a raw lock."""
    (DEBUGFS / "burst").write_text(str(count))


def numbered(i: int) -> dict[str, int | bool]:
    """What number i of a burst is."""
    return {"client": i, "cpu": -1, "used": 2 * i, "budget": i, "throttled": bool(i % 2)}


def take(reader: Events, count: int) -> list[Event | Missed]:
    """The next ones, and no more are there."""
    found = [reader.read(60) for _ in range(count)]
    assert None not in found, f"only {found.index(None)} came"
    assert reader.read(0.1) is None
    return [event for event in found if event]


def happened(reader: Events, count: int) -> list[tuple[str, dict[str, object]]]:
    """Kind and fields of the next ones; numbers have no gap and times go up."""
    found = take(reader, count)
    assert all(isinstance(event, Event) for event in found), found
    per_group: dict[str, list[Event]] = {}
    for event in found:
        per_group.setdefault(event.group, []).append(event)
    for group, its in per_group.items():
        seqs = [event.seq for event in its]
        assert seqs == list(range(seqs[0], seqs[0] + len(its)))
        assert reader.state()[group].seq == seqs[-1]
        # two CPUs that have events at once take their numbers and look at the clock in any order
        assert group == "rt" or all(a.time <= b.time for a, b in itertools.pairwise(its))
        assert its[-1].time <= time.monotonic_ns()
    return [(event.kind, dict(event.fields)) for event in found]


# What is told


def test_slots(raw: Raw, slot: Slot) -> None:
    """Everything that becomes of generations, in order; that one is freed comes when it is."""
    size, other = CHUNK + 5, 2 * CHUNK

    def one(kind: str, number: int, **more: int) -> tuple[str, dict[str, object]]:
        return f"slot-{kind}", {"slot": "test", "generation": number, **more}

    def loaded(number: int, size: int) -> list[tuple[str, dict[str, object]]]:
        return [one("staged", number, size=size), one("ready", number, size=size)]

    with tensormem.events(["slots"]) as reader:
        assert slot.swap(weights("a", size)) == 1
        assert happened(reader, 3) == [*loaded(1, size), one("committed", 1)]
        assert slot.swap(weights("b", other)) == 2
        assert happened(reader, 3) == [*loaded(2, other), one("committed", 2)]
        assert slot.rollback() == (0, 1)
        assert happened(reader, 1) == [one("rolled-back", 1)]
        # calls that fail are no events
        assert slot.rollback(9)[0] == slot.abort(2) == slot.commit(1) == errno.ENOENT
        with slot.load(weights("c", size)) as gen:
            assert slot.abort(3) == 0
            assert happened(reader, 3) == [*loaded(3, size), one("aborted", 3)]
            gen.close()
        assert happened(reader, 1) == [one("retired", 3)]
        # who lets go of what he stages aborts it
        slot.load(weights("c", size)).close()
        assert happened(reader, 4) == [*loaded(4, size), one("aborted", 4), one("retired", 4)]
        # a commit lets go of the previous one
        assert slot.swap(weights("d", size)) == 5
        assert happened(reader, 4) == [*loaded(5, size), one("committed", 5), one("retired", 2)]
        assert slot.remove() == 0
        kinds = happened(reader, 3)
        assert kinds[0] == ("slot-removed", {"slot": "test"})
        assert sorted(event["generation"] for _, event in kinds[1:]) == [1, 5]
        assert {kind for kind, _ in kinds[1:]} == {"slot-retired"}


def test_a_load_that_fails(raw: Raw, slot: Slot) -> None:
    """Once, with its reason; also when it fails after it was loaded."""
    fields = {"slot": "test", "generation": 1, "size": CHUNK}
    file = os.memfd_create("model")
    os.write(file, weights("a", CHUNK))
    with tensormem.events(["slots"]) as reader:
        with slot.stage(file, abi.StageFlag.VERIFY, bytes(32)) as gen:
            assert gen.failed() == errno.EBADMSG
            assert happened(reader, 2) == [
                ("slot-staged", fields),
                ("slot-failed", {**fields, "error": errno.EBADMSG}),
            ]
        assert [kind for kind, _ in happened(reader, 2)] == ["slot-aborted", "slot-retired"]
        with (Path("/tmp") / "cached-model").open("w+b") as cached:
            cached.write(weights("a", CHUNK))
            cached.flush()
            path = Path(cached.name)
            os.close(file)
            file = os.open(path, os.O_RDONLY)
        with slot.stage(file, abi.StageFlag.CACHED) as gen:
            gen.loaded()
            assert [kind for kind, _ in happened(reader, 2)] == ["slot-staged", "slot-ready"]
            os.truncate(path, 1)
            assert gen.failed() == errno.ETXTBSY
            error = {**fields, "generation": 2, "error": errno.ETXTBSY}
            assert happened(reader, 1) == [("slot-failed", error)]
        assert [kind for kind, _ in happened(reader, 2)] == ["slot-aborted", "slot-retired"]
    path.unlink()
    os.close(file)


def test_missed_deadlines(raw: Raw, trace: None) -> None:
    """Each thread's misses, with what the tracepoint has of them and who waited."""
    threads, each = 4, 3 if SLOW else 10
    pids: list[int] = []

    def miss(rt: RT, size: int) -> None:
        pids.append(threading.get_native_id())
        for _ in range(each):
            assert rt.alloc_errno(size, 1_000_000) == errno.ETIMEDOUT

    with tensormem.events(["rt"]) as reader, raw.rt(CHUNK) as rt:
        rt.fill_up()
        workers = [threading.Thread(target=miss, args=(rt, 5000 * (i + 1))) for i in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        found = happened(reader, threads * each)
        assert {kind for kind, _ in found} == {"rt-miss"}
        its = [fields for _, fields in found]
        assert {fields["client"] for fields in its} == {int(rt.folder().name)}
        assert sorted(fields["pid"] for fields in its) == sorted(pids * each)
        assert len({(fields["pid"], fields["size"]) for fields in its}) == threads
        names = ("client", "size", "had_ns")
        expected = sorted(tuple(int(event[name]) for name in names) for event in traced("rt_miss"))
        assert sorted(tuple(fields[name] for name in names) for fields in its) == expected
        assert rt.info().misses == len(its)


def test_kv(raw: Raw, trace: None) -> None:
    """Evicted blocks and a full cache, as the tracepoint and the call say."""
    blocks = CHUNK // PAGE
    # of a page, so that nothing is packed
    thin = full(1, PAGE // 8)
    fields = {"block_tokens": 8, "max_tokens": 8 * blocks, "limit": CHUNK}
    with tensormem.events(["kv"]) as reader, raw.kv([thin], **fields) as kv:
        names = chain("a", 6)
        first = kv.open(tokens=6 * 8)
        assert kv.publish(first, names) == kv.end(first) == 0
        second = kv.open(tokens=(blocks - 6) * 8)
        assert reader.read(0.1) is None
        for more in (1, 3):
            assert kv.extend(second, more * 8) == 0
        third = kv.open()
        assert kv.extend(third, 3 * 8) == errno.ENOSPC  # there are two
        trails = traced("kv_evict")
        evicted = [{name: int(value) for name, value in event.items()} for event in trails]
        assert [event["blocks"] for event in evicted] == [1, 3]
        numbers = {"client": evicted[0]["client"], "cache": evicted[0]["cache"]}
        assert happened(reader, 3) == [
            *(("kv-evicted", event) for event in evicted),
            ("kv-full", {**numbers, "error": errno.ENOSPC}),
        ]


def test_kv_packing(raw: Raw, trace: None) -> None:
    """Sums of a call, as it returns them."""
    with tensormem.events(["kv"]) as reader, raw.kv([full(2, CHUNK // 256)], block_tokens=8) as kv:
        seq = kv.open(tokens=14 * 8)
        for kind, flags in (("kv-packed", 0), ("kv-unpacked", abi.KV_UNPACK)):
            result, pack = kv.pack(seq, flags)
            assert (result, pack.blocks) == (0, 14)
            ((told, its),) = happened(reader, 1)
            assert (told, its["sequence"], its["blocks"]) == (kind, seq.name, 14)
            assert (its["before"], its["after"]) == (pack.before, pack.after)
            trail = traced(kind.replace("-", "_").removesuffix("ed"))[0]
            assert (its["client"], its["cache"]) == (int(trail["client"]), int(trail["cache"]))
            # nothing is left to do
            assert kv.pack(seq, flags)[1].blocks == 0
        assert reader.read(0.1) is None


def test_pressure() -> None:
    with tensormem.events(["pressure"]) as reader:
        for level, name in ((2, "critical"), (1, "low"), (0, "none")):
            (DEBUGFS / "pressure").write_text(f"{level} {1 << 40} {level * 4096}")
            fields = {"level": name, "available": 1 << 40, "given": level * 4096}
            assert happened(reader, 1) == [("pressure", fields)]
            assert reader.state()["pressure"].level == name
        assert {name for name, state in reader.state().items() if state.level} == {"pressure"}


# Numbers


def test_from_a_hard_interrupt() -> None:
    with tensormem.events() as reader:
        for count in (1, 5, RING):
            burst(count)
            assert happened(reader, count) == [("bandwidth", numbered(i)) for i in range(count)]


@pytest.mark.parametrize("extra", [1, 744])
def test_more_than_the_module_keeps(extra: int) -> None:
    """The worker cannot run meanwhile: what is too much is lost, and told at once."""
    with tensormem.events(["bandwidth"]) as reader:
        before = reader.state()["bandwidth"]
        burst(RING + extra)
        found = take(reader, RING + 1)
        assert [event.fields for event in found[:-1]] == [numbered(i) for i in range(RING)]
        last = before.seq + RING + extra
        assert found[-1] == Missed("bandwidth", extra, last)
        assert reader.state()["bandwidth"][:2] == (last, before.missed + extra)
        burst(2)
        assert happened(reader, 2) == [("bandwidth", numbered(i)) for i in range(2)]


@pytest.mark.parametrize("bursts", [[200], [200, 200], [100, RING + 50, 3]], ids=str)
def test_a_slow_reader(bursts: list[int]) -> None:
    """Its socket is full: what it did not get is counted, and another reader gets all of it."""
    with (
        tensormem.events(["bandwidth"], buffer=16384) as slow,
        tensormem.events(["bandwidth"]) as quick,
    ):
        start = slow.state()["bandwidth"].seq
        for count in bursts:
            burst(count)
            kept = min(count, RING)
            got = [quick.read(60) for _ in range(kept + (count > kept))]
            assert [event.fields for event in got[:kept]] == [numbered(i) for i in range(kept)]
            assert [event.count for event in got[kept:]] == ([count - kept] if count > kept else [])
        due = start + 1
        missed = 0
        while event := slow.read(0.5):
            if isinstance(event, Missed):
                assert event.seq + 1 - event.count == due
                missed += event.count
            else:
                assert event.seq == due
            due = event.seq + 1
        assert due == start + sum(bursts) + 1
        assert 0 < missed < sum(bursts)
        # and it is as good as another again
        burst(3)
        assert happened(slow, 3) == happened(quick, 3) == [("bandwidth", numbered(i)) for i in range(3)]


def test_what_was_before_is_nobodys() -> None:
    """Also what happens between joining and the first read."""
    with tensormem.events(["pressure"]):
        burst(10)
        with tensormem.events(["bandwidth"]) as reader:
            assert reader.read(0.1) is None
            burst(2)
            assert happened(reader, 2) == [("bandwidth", numbered(i)) for i in range(2)]


# Readers


def test_many_readers() -> None:
    """Each in a process of its own gets all of it."""
    count, expected = 3 if SLOW else 5, 300
    ready = os.pipe()
    children = []
    for _ in range(count):
        pid = os.fork()
        if pid == 0:
            try:
                with tensormem.events(["bandwidth"]) as reader:
                    os.write(ready[1], b"!")
                    found = [reader.read(60) for _ in range(expected)]
                assert [event.fields for event in found] == [numbered(i % 100) for i in range(expected)]
            except BaseException:
                os._exit(99)
            os._exit(0)
        children.append(pid)
    for _ in children:
        assert os.read(ready[0], 1) == b"!"
    with tensormem.events(["pressure"]) as other:
        start = other.state()["bandwidth"].seq
        for i in range(3):
            burst(100)
            # three of them at once are too many for the module
            wait_for(lambda given=start + 100 * (i + 1): other.state()["bandwidth"].seq == given)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * count
    for fd in ready:
        os.close(fd)


def test_readers_that_are_killed() -> None:
    """Whenever that is: nobody else notices."""
    dice = random.Random(5)

    def work(seed: int) -> None:
        chance = random.Random(seed)
        while True:
            with tensormem.events(chance.sample(list(GROUPS), 2), buffer=8192) as reader:
                for _ in range(chance.randrange(4)):
                    burst(10)
                    while reader.read(0.001):
                        pass

    for _ in range(1 if SLOW else 2):
        with tensormem.events(["bandwidth"]) as reader:
            last = reader.state()["bandwidth"].seq  # they may be killed before they begin
            killed_at_random(work, dice, 0.2, 1.0)
            while event := reader.read(0.5):
                last = event.seq
            assert last == reader.state()["bandwidth"].seq
            burst(5)
            assert happened(reader, 5) == [("bandwidth", numbered(i)) for i in range(5)]


def test_groups_apart() -> None:
    """Who listens to one group hears of no other."""
    with tensormem.events(["pressure"]) as one, tensormem.events(["bandwidth"]) as other:
        burst(2)
        (DEBUGFS / "pressure").write_text("0 7 0")
        assert happened(one, 1) == [("pressure", {"level": "none", "available": 7, "given": 0})]
        assert len(happened(other, 2)) == 2


def test_the_module_goes_while_somebody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    """He is told so when he has heard nothing for a while, also if it came again: he has to begin anew."""
    monkeypatch.setattr(netlink, "SILENCE", 0.2)
    with tensormem.events() as reader:
        assert reader.read(1) is None  # it is there
        subprocess.run(["rmmod", "tm_bench_event"], check=True)
        subprocess.run(["rmmod", "tensormem"], check=True)
        try:
            for deaf in (reader.read, reader.state):
                with pytest.raises(errors.DeviceMissing, match="modprobe tensormem"):
                    deaf()
            with pytest.raises(errors.DeviceMissing, match="network namespace"):
                tensormem.events()
        finally:
            subprocess.run(["insmod", MODULES / "tensormem.ko"], check=True)
            subprocess.run(["insmod", MODULES / "tests/tm_bench_event.ko"], check=True)
        # of a new module, without listeners: nothing is numbered
        burst(100)
        with tensormem.events() as other:
            assert {state[:2] for state in other.state().values()} == {(0, 0)}
            burst(3)
            assert happened(other, 3) == [("bandwidth", numbered(i)) for i in range(3)]
        for _ in range(2):
            with pytest.raises(errors.DeviceMissing, match=r"loaded anew.*open another reader"):
                reader.read()


def test_a_plain_user() -> None:
    """May listen to what concerns everybody, and is told what the rest takes."""

    def listen() -> None:
        os.setgroups([])
        os.setuid(1000)
        for group in ("slots", "rt", "kv"):
            with pytest.raises(errors.NotPermitted, match=f"{group} takes CAP_NET_ADMIN.*run as root"):
                tensormem.events(["pressure", group])
        with tensormem.events(["pressure", "bandwidth"]) as reader:
            assert set(reader.state()) == set(GROUPS)
            os.write(burst_file, b"3")
            assert happened(reader, 3) == [("bandwidth", numbered(i)) for i in range(3)]

    burst_file = os.open(DEBUGFS / "burst", os.O_WRONLY)
    assert status_of(listen) == 0
    os.close(burst_file)


def test_another_network_namespace() -> None:
    """There the family does not exist, and who joins the group by its number hears nothing."""
    with tensormem.events(["bandwidth"]) as reader:
        asking = control("tensormem")
        number = asking.mcast_groups["bandwidth"]
        asking.close()

        def elsewhere() -> None:
            assert libc.unshare(CLONE_NEWNET) == 0
            with pytest.raises(errors.DeviceMissing, match="--network host"):
                tensormem.events(["bandwidth"])
            with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 16) as other:
                other.bind((0, 0))
                other.setsockopt(270, 1, number)
                burst(3)
                time.sleep(0.2)
                with pytest.raises(BlockingIOError):
                    other.recv(4096, socket.MSG_DONTWAIT)

        assert status_of(elsewhere) == 0
        assert happened(reader, 3) == [("bandwidth", numbered(i)) for i in range(3)]


# The command get


def control(name: str) -> Any:
    """pyroute2's own socket, whatever its version."""
    from pyroute2.netlink import genlmsg
    from pyroute2.netlink.generic import GenericNetlinkSocket

    asking = GenericNetlinkSocket()
    asking.bind(name, genlmsg)
    return asking


def attribute(number: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), number) + data + bytes(-len(data) % 4)


def ask(family: int, payload: bytes, flags: int = 1) -> int:
    """The error of a request; 0 for an answer."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 16) as asking:
        asking.bind((0, 0))
        asking.send(struct.pack("=IHHII", 16 + len(payload), family, flags, 1, 0) + payload)
        asking.settimeout(30)
        data = asking.recv(65536)
        kind = struct.unpack_from("=H", data, 4)[0]
        return -struct.unpack_from("=i", data, 16)[0] if kind == 2 else 0


GET, GROUP = abi.NLCommand.CMD_GET, abi.NLAttribute.GROUP
HEAD = struct.pack("=BBH", GET, 1, 0)
DUMP = 0x301


@pytest.mark.parametrize(
    ("payload", "flags", "error"),
    [
        (HEAD + attribute(GROUP, struct.pack("=I", 4)), 1, 0),
        (HEAD, DUMP, 0),
        (HEAD, 1, errno.EINVAL),
        (b"", 1, errno.EINVAL),
        (HEAD + attribute(GROUP, struct.pack("=I", 5)), 1, errno.ERANGE),
        (HEAD + attribute(GROUP, struct.pack("=I", 0xFFFFFFFF)), 1, errno.ERANGE),
        (HEAD + attribute(GROUP, b""), 1, errno.EINVAL),
        (HEAD + attribute(GROUP, b"\0" * 8), 1, errno.EINVAL),
        (HEAD + attribute(GROUP | 0x8000, bytes(4)), 1, errno.EINVAL),
        (HEAD + attribute(GROUP, bytes(4)) + attribute(abi.NLAttribute.SEQ, bytes(8)), 1, errno.EINVAL),
        (HEAD + attribute(99, bytes(4)), 1, errno.EINVAL),
        (HEAD + attribute(GROUP, bytes(4)) + b"\1\0", 1, errno.EINVAL),
        (HEAD + struct.pack("=HH", 200, GROUP) + bytes(4), 1, errno.EINVAL),
        (HEAD + attribute(GROUP, bytes(4)), DUMP, errno.EINVAL),
        (HEAD + attribute(99, bytes(4)), DUMP, errno.EINVAL),
        (struct.pack("=BBH", GET, 1, 7) + attribute(GROUP, bytes(4)), 1, errno.EINVAL),
        *((struct.pack("=BBH", command, 1, 0), 1, errno.EOPNOTSUPP) for command in (0, 2, 17, 18, 255)),
    ],
    ids=repr,
)
def test_get(payload: bytes, flags: int, error: int) -> None:
    with tensormem.events(["bandwidth"]) as reader:
        before = reader.state()
        assert ask(reader._family, payload, flags) == error
        assert reader.state() == before


def test_any_bytes_to_get() -> None:
    dice = random.Random(11)
    with tensormem.events(["bandwidth"]) as reader:
        for _ in range(50 if SLOW else 400):
            payload = HEAD[: dice.randrange(5)] + dice.randbytes(dice.randrange(40))
            ask(reader._family, payload, dice.choice((1, DUMP)))
        burst(1)
        assert happened(reader, 1) == [("bandwidth", numbered(0))]


def test_pyroute2_sees_the_family() -> None:
    asking = control("tensormem")
    assert set(asking.mcast_groups) == set(GROUPS)
    asking.close()


# The command line


def test_the_command() -> None:
    command = ["tensormem", "events", "--count", "4", "--timeout", "120", "--group", "bandwidth"]
    with subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        while program.poll() is None:
            burst(2)
            time.sleep(0.1)
        found = [json.loads(line) for line in program.stdout]
    assert program.returncode == 0
    assert [event["kind"] for event in found] == ["bandwidth"] * 4
    assert [{name: event[name] for name in numbered(0)} for event in found] == [numbered(i % 2) for i in range(4)]
    seqs = [event["seq"] for event in found]
    assert seqs == list(range(seqs[0], seqs[0] + 4))
