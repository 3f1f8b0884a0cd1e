# SPDX-License-Identifier: MIT
"""Events: bytes of messages, what a reader makes of lost ones, and the YNL description."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import struct
import sys
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result

import tensormem
from tensormem import abi, errors, netlink
from tensormem.abi import NLAttribute, NLCommand, NLGroup
from tensormem.netlink import ATTRIBUTES, GROUPS, KINDS, Event, Events, Malformed, Missed
from test_cli import runner

ROOT = Path(__file__).parents[2]
SPEC = ROOT / "docs" / "netlink" / "tensormem.yaml"
EVENT_SOURCE = ROOT / "kmod" / "event.c"
FAMILY = 37
_FORMATS = {"uint64": "=Q", "uint32": "=I", "int32": "=i"}


def attribute(number: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), number) + data + bytes(-len(data) % 4)


def packed(name: NLAttribute, value: int | str | bytes) -> bytes:
    if isinstance(value, str):
        value = value.encode() + b"\0"
    if isinstance(value, bytes):
        return attribute(name, value)
    return attribute(name, struct.pack(_FORMATS[ATTRIBUTES[name]], value))


def message(command: int, *attributes: bytes, kind: int = FAMILY, flags: int = 0) -> bytes:
    payload = struct.pack("=BBH", command, 1, 0) + b"".join(attributes)
    return struct.pack("=IHHII", 16 + len(payload), kind, flags, 0, 0) + payload


def event(command: NLCommand, seq: int, /, **values: int | str) -> bytes:
    """A message as the module makes it."""
    head = [packed(NLAttribute.SEQ, seq), packed(NLAttribute.TIME, values.pop("time", 1000 + seq))]
    return message(command, *head, *(packed(NLAttribute[n], v) for n, v in values.items()))


def numbered(seq: int) -> bytes:
    return event(NLCommand.EVENT_PRESSURE, seq, LEVEL=1, AVAILABLE=seq, GIVEN=0)


def given(seq: int) -> Event:
    fields: dict[str, int | str | bool] = {"level": "low", "available": seq, "given": 0}
    return Event("pressure", "pressure", seq, 1000 + seq, fields)


def sample(attribute: NLAttribute, dice: random.Random) -> int | str:
    if ATTRIBUTES[attribute] == "asciiz":
        return "".join(dice.choices("abc-_.09", k=dice.randrange(1, 63)))
    if attribute is NLAttribute.LEVEL:
        return dice.randrange(3)
    if attribute is NLAttribute.THROTTLED:
        return dice.randrange(2)
    if attribute is NLAttribute.CPU:
        return dice.randrange(-1, 4)
    return dice.randrange(1 << (64 if ATTRIBUTES[attribute] == "uint64" else 32))


class FakeSocket:
    """The module's side: what the family says of itself, its groups' numbers, what it sends."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.open = True

    def request(
        self, of: type[Any], family: int, command: int, version: int, attributes: Any = (),
        *, dump: bool = False,
    ) -> list[bytes]:  # fmt: skip
        if self.kernel.refusal:
            raise OSError(self.kernel.refusal, os.strerror(self.kernel.refusal))
        if family == 16:
            assert (command, list(attributes)) == (3, [("CTRL_ATTR_FAMILY_NAME", "tensormem")])
            groups = b"".join(
                attribute(i + 1, attribute(2, struct.pack("=I", 100 + i)) + attribute(1, name))
                for i, name in enumerate(self.kernel.groups)
            )
            self.kernel.found += 1
            answer = attribute(1, struct.pack("=H", self.kernel.family)), attribute(7, groups)
            return [message(1, *answer, kind=16)]
        assert (family, command, version, dump) == (FAMILY, NLCommand.CMD_GET, 1, True)
        while self.kernel.asked:
            self.kernel.asked.pop(0)()
        return [self.kernel.state(group) for group in NLGroup]

    def join(self, group: int) -> None:
        if group in self.kernel.denied:
            raise PermissionError(errno.EPERM, "no")
        self.kernel.joined.append(group)

    def hold(self, size: int) -> None:
        self.kernel.held = size

    def receive(self) -> bytes | None:
        if not self.kernel.queue:
            return None
        item = self.kernel.queue.popleft()
        if item is None:
            raise OSError(errno.ENOBUFS, "full")
        return item

    def wait(self, seconds: float) -> bool:
        assert seconds < 3600, "would wait for ever"
        self.kernel.now += max(seconds, 0)
        return False

    def fileno(self) -> int:
        return 9 if self.open else -1

    def close(self) -> None:
        self.open = False


class Kernel:
    """See FakeSocket."""

    def __init__(self) -> None:
        self.groups = [name.encode() + b"\0" for name in GROUPS]
        self.joined: list[int] = []
        self.denied: set[int] = set()
        self.held = 0
        self.refusal = 0
        self.family = FAMILY
        #: How often somebody asked for the family.
        self.found = 0
        self.now = 1000.0
        self.seq = dict.fromkeys(NLGroup, 0)
        self.queue: deque[bytes | None] = deque()
        #: What else happens when it is asked the next time.
        self.asked: list[Callable[[], object]] = []

    def state(self, group: NLGroup) -> bytes:
        values = [packed(NLAttribute.GROUP, group), packed(NLAttribute.SEQ, self.seq[group])]
        values.append(packed(NLAttribute.MISSED, 3))
        if group is NLGroup.PRESSURE:
            values.append(packed(NLAttribute.LEVEL, 2))
        return message(NLCommand.CMD_GET, *values, flags=2)

    def send(self, *seqs: int) -> None:
        """Events of the group pressure arrive; None: the socket was full."""
        for seq in seqs:
            self.seq[NLGroup.PRESSURE] = seq
            self.queue.append(numbered(seq))

    def lose(self, seq: int) -> None:
        """All up to this one are lost."""
        if self.queue and self.queue[0] is not None:
            self.queue.appendleft(None)
        elif not self.queue:
            self.queue.append(None)
        self.seq[NLGroup.PRESSURE] = seq


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel()
    monkeypatch.setattr(netlink, "_Socket", lambda: FakeSocket(kernel))
    monkeypatch.setattr("time.monotonic", lambda: kernel.now)
    return kernel


@pytest.fixture
def reader(kernel: Kernel) -> Iterator[Events]:
    kernel.seq[NLGroup.PRESSURE] = 10
    with tensormem.events(["pressure"]) as reader:
        yield reader


def all_of(reader: Events) -> list[Event | Missed]:
    found = []
    while (one := reader.read(0)) is not None:
        found.append(one)
    return found


# Messages


@pytest.mark.parametrize("command", KINDS, ids=netlink.kind_name)
def test_every_kind(kernel: Kernel, command: NLCommand) -> None:
    dice = random.Random(command)
    group, attributes = KINDS[command]
    name = group.name.lower()
    with tensormem.events([name]) as reader:
        for seq in range(1, 20):
            values = {a: sample(a, dice) for a in attributes}
            kernel.queue.append(event(command, seq, **{a.name: v for a, v in values.items()}))
            found = reader.read(0)
            assert isinstance(found, Event)
            assert (found.group, found.seq, found.time) == (name, seq, 1000 + seq)
            assert found.kind == command.name.removeprefix("EVENT_").lower().replace("_", "-")
            expected: dict[str, int | str | bool] = {a.name.lower(): v for a, v in values.items()}
            if NLAttribute.HAD in values:
                expected["had_ns"] = expected.pop("had")
            if NLAttribute.LEVEL in values:
                level = values[NLAttribute.LEVEL]
                assert isinstance(level, int)
                expected["level"] = ("none", "low", "critical")[level]
            if NLAttribute.THROTTLED in values:
                expected["throttled"] = bool(values[NLAttribute.THROTTLED])
            assert found.fields == expected
            with pytest.raises(AttributeError):
                found.seq = 5  # type: ignore[misc]


GOOD = event(NLCommand.EVENT_SLOT_COMMITTED, 11, SLOT="chat", GENERATION=7)


def test_what_a_newer_module_adds_is_left_out() -> None:
    more = GOOD + attribute(99, b"abc") + attribute(200, b"")
    more = struct.pack("=I", len(more)) + more[4:]
    assert netlink.parse(more) == netlink.parse(GOOD)


@pytest.mark.parametrize("end", range(len(GOOD)))
def test_a_message_cut_short(end: int) -> None:
    with pytest.raises(Malformed):
        netlink.parse(GOOD[:end])
    cut = GOOD[:end]
    # between two attributes, or in what fills one up
    if len(cut) >= 20 and end not in (20, 32, 44, 53, 54, 55, 56):
        with pytest.raises(Malformed):
            netlink.parse(struct.pack("=I", end) + cut[4:])


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (message(1, attribute(NLAttribute.SEQ, bytes(4))), "SEQ of a netlink message has 4 bytes"),
        (message(1, attribute(NLAttribute.CPU, bytes(8))), "CPU of a netlink message has 8 bytes"),
        (message(1, attribute(NLAttribute.LEVEL, b"")), "LEVEL of a netlink message has 0 bytes"),
        (message(1, struct.pack("=HH", 3, 3)), "reaches past"),
        (message(1, struct.pack("=HH", 0, 3)), "reaches past"),
        (message(1, struct.pack("=HH", 9, 3) + bytes(4)), "reaches past"),
        (message(1, b"ab"), "ends within"),
        (message(99), "unknown command 99"),
        (message(0), "unknown command 0"),
        (GOOD + b"\0", "another length"),
        (b"", "another length"),
    ],
)
def test_messages_that_are_none(data: bytes, what: str) -> None:
    with pytest.raises(Malformed, match=what) as info:
        netlink.parse(data)
    assert isinstance(info.value, errors.TensormemError)
    assert "matches this package" in info.value.remedy


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (message(NLCommand.EVENT_PRESSURE), "lacks the attribute SEQ"),
        (message(NLCommand.EVENT_PRESSURE, packed(NLAttribute.SEQ, 11)), "lacks .* (LEVEL|TIME)"),
        (event(NLCommand.EVENT_PRESSURE, 11, LEVEL=3, AVAILABLE=1, GIVEN=1), "unknown level 3"),
        (event(NLCommand.EVENT_PRESSURE, 11, LEVEL=1, AVAILABLE=1), "lacks the attribute GIVEN"),
        (event(NLCommand.EVENT_MISSED, 11), "lacks the attribute GROUP"),
        (event(NLCommand.EVENT_MISSED, 11, GROUP=5), "unknown group"),
        (event(NLCommand.CMD_GET, 11, GROUP=3), "no event but CMD_GET"),
    ],
)
def test_messages_that_are_no_event(
    kernel: Kernel, reader: Events, data: bytes, what: str
) -> None:
    kernel.queue.append(data)
    with pytest.raises(Malformed, match=what):
        reader.read(0)
    # the next one is read as ever
    kernel.send(11)
    assert reader.read(0) == given(11)


def test_a_name_that_is_no_text(kernel: Kernel) -> None:
    with tensormem.events(["slots"]) as reader:
        values = packed(NLAttribute.SEQ, 1), packed(NLAttribute.TIME, 1)
        name = attribute(NLAttribute.SLOT, b"\xff\xfe\0")
        kernel.queue.append(message(NLCommand.EVENT_SLOT_REMOVED, *values, name))
        with pytest.raises(Malformed, match="no text"):
            reader.read(0)


def test_any_bytes() -> None:
    """Read or refused, never anything else."""
    dice = random.Random(3)
    for _ in range(5000):
        data = bytearray(GOOD)
        for _ in range(dice.randrange(1, 4)):
            data[dice.randrange(len(data))] = dice.randrange(256)
        data = data[: dice.randrange(len(data) + 1)] if dice.random() < 0.3 else data
        if dice.random() < 0.5:
            data[:4] = struct.pack("=I", len(data))[: len(data[:4])]
        try:
            netlink.parse(bytes(data))
        except Malformed:
            continue


# What was missed


def test_numbers_without_a_gap(kernel: Kernel, reader: Events) -> None:
    kernel.send(11, 12, 13)
    assert all_of(reader) == [given(11), given(12), given(13)]


def test_from_before_it_listened(kernel: Kernel, reader: Events) -> None:
    kernel.send(9, 10, 11)
    assert all_of(reader) == [given(11)]


def test_a_gap(kernel: Kernel, reader: Events) -> None:
    kernel.send(11, 15, 16, 18)
    assert all_of(reader) == [
        given(11), Missed("pressure", 3, 14), given(15), given(16), Missed("pressure", 1, 17),
        given(18),
    ]  # fmt: skip


def test_what_the_module_lost(kernel: Kernel, reader: Events) -> None:
    """Told by itself, and once: the same may be told again."""
    kernel.send(11)
    missed = event(NLCommand.EVENT_MISSED, 15, GROUP=NLGroup.PRESSURE, MISSED=4)
    kernel.queue.extend([missed, missed])
    kernel.send(16)
    assert all_of(reader) == [given(11), Missed("pressure", 4, 15), given(16)]


def test_a_full_socket(kernel: Kernel, reader: Events) -> None:
    """What is missing at the end is found out when it is empty, by asking."""
    kernel.send(11, 12)
    kernel.lose(20)
    assert all_of(reader) == [given(11), given(12), Missed("pressure", 8, 20)]
    kernel.send(21)
    assert all_of(reader) == [given(21)]


def test_what_comes_while_it_asks(kernel: Kernel, reader: Events) -> None:
    """What was on its way to the socket by then is not lost."""
    kernel.send(11)
    kernel.lose(20)
    kernel.asked = [lambda: kernel.send(21, 22)]
    assert all_of(reader) == [given(11), Missed("pressure", 9, 20), given(21), given(22)]


def test_full_again_while_it_asks(kernel: Kernel, reader: Events) -> None:
    kernel.send(11)
    kernel.lose(20)
    kernel.asked = [partial(kernel.send, 21), partial(kernel.lose, 30)]
    assert all_of(reader) == [
        given(11), Missed("pressure", 9, 20), given(21), Missed("pressure", 9, 30),
    ]  # fmt: skip


def test_full_for_nothing(kernel: Kernel, reader: Events) -> None:
    kernel.lose(10)
    assert all_of(reader) == []
    kernel.send(11)
    assert all_of(reader) == [given(11)]


def test_any_losses(kernel: Kernel) -> None:
    """However they fall: what is told and what is missed are all there was, in order."""
    dice = random.Random(8)
    for _ in range(200):
        kernel.seq[NLGroup.PRESSURE] = seq = dice.randrange(100)
        kernel.queue.clear()
        with tensormem.events(["pressure"]) as reader:
            sent, got, due = set(), set(), seq + 1
            for _ in range(dice.randrange(1, 40)):
                seq += 1
                if dice.random() < 0.6:
                    kernel.send(seq)
                    sent.add(seq)
                else:
                    kernel.lose(seq)
                for one in all_of(reader) if dice.random() < 0.3 else ():
                    first = one.seq + 1 - (one.count if isinstance(one, Missed) else 1)
                    assert first == due
                    due = one.seq + 1
                    got |= {one.seq} if isinstance(one, Event) else set()
            for one in all_of(reader):
                first = one.seq + 1 - (one.count if isinstance(one, Missed) else 1)
                assert first == due
                due = one.seq + 1
                got |= {one.seq} if isinstance(one, Event) else set()
            assert (due, got) == (seq + 1, sent)


# The reader


def test_all_groups(kernel: Kernel) -> None:
    with tensormem.events(buffer=12345) as reader:
        assert kernel.joined == [100, 101, 102, 103, 104]
        assert kernel.held == 12345
        assert reader.fileno() == 9
        assert reader.state() == {
            name: (0, 3, "critical" if name == "pressure" else None) for name in GROUPS
        }


def test_groups_twice(kernel: Kernel) -> None:
    with tensormem.events(["kv", "slots", "kv"]):
        assert kernel.joined == [102, 100]


@pytest.mark.parametrize(("groups", "what"), [(["kv", "x"], "no group of events 'x'"), ([], "no")])
def test_groups_that_are_none(kernel: Kernel, groups: list[str], what: str) -> None:
    with pytest.raises(errors.InvalidArgument, match=rf"{what}.*slots, rt, kv, pressure"):
        tensormem.events(groups)


def test_a_module_without_a_group(kernel: Kernel) -> None:
    kernel.groups.pop()
    with pytest.raises(errors.IncompatibleModule, match="bandwidth"):
        tensormem.events()


def test_a_group_for_root(kernel: Kernel) -> None:
    kernel.denied = {102}
    with pytest.raises(errors.NotPermitted, match=r"kv takes CAP_NET_ADMIN.*AmbientCapabilities"):
        tensormem.events()


def test_without_the_module(kernel: Kernel) -> None:
    kernel.refusal = errno.ENOENT
    with pytest.raises(errors.DeviceMissing, match=r"modprobe tensormem.*network namespace"):
        tensormem.events()


def test_the_module_goes(kernel: Kernel, reader: Events) -> None:
    kernel.refusal = errno.ENOENT
    with pytest.raises(errors.DeviceMissing):
        reader.state()


def test_a_reader_finds_out_that_the_module_went(kernel: Kernel, reader: Events) -> None:
    kernel.refusal = errno.ENOENT
    for _ in range(4):
        assert reader.read(1) is None
    with pytest.raises(errors.DeviceMissing, match="modprobe tensormem"):
        reader.read(1.5)
    assert 1005 <= kernel.now < 1006
    with pytest.raises(errors.DeviceMissing):
        reader.read()  # also who would wait for ever
    with pytest.raises(errors.DeviceMissing):
        reader.read(0)


def test_a_reader_finds_out_that_the_module_came_again(kernel: Kernel, reader: Events) -> None:
    kernel.family += 1
    with pytest.raises(errors.DeviceMissing, match=r"loaded anew.*open another reader"):
        reader.read()
    assert 1005 <= kernel.now < 1006


def test_a_reader_asks_after_silence_only(kernel: Kernel, reader: Events) -> None:
    assert kernel.found == 1
    for seq in range(11, 31):
        assert reader.read(4.5) is None
        kernel.send(seq)
        assert reader.read(4.5) == given(seq)
    assert kernel.found == 1
    assert reader.read(18) is None
    assert kernel.found == 4  # after 5, 10 and 15 seconds
    assert kernel.now == pytest.approx(1000 + 20 * 4.5 + 18)


def test_another_error(kernel: Kernel, reader: Events) -> None:
    kernel.refusal = errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        reader.state()


def test_closed(reader: Events) -> None:
    reader.close()
    reader.close()
    assert reader.fileno() == -1
    with pytest.raises(errors.Closed):
        reader.read(0)


def test_iteration_ends(kernel: Kernel) -> None:
    with tensormem.events(["pressure"], timeout=0) as reader:
        kernel.send(1, 2)
        assert list(reader) == [given(1), given(2)]
        kernel.send(3)
        assert list(reader) == [given(3)]


def test_without_pyroute2(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    netlink._classes.cache_clear()
    monkeypatch.setitem(sys.modules, "pyroute2.netlink", None)
    with pytest.raises(errors.TensormemError, match="apt install python3-pyroute2"):
        tensormem.events()


# The real socket, on the controller that every kernel has


def decoded(data: bytes) -> Any:
    message = netlink._classes()[1](data)
    message.decode()
    return message


def test_requests() -> None:
    asking = netlink._Socket()
    control = netlink._classes()[1]
    try:
        answer = asking.request(control, 16, 3, 1, [("CTRL_ATTR_FAMILY_NAME", "nlctrl")])
        (found,) = map(decoded, answer)
        assert found.get_attr("CTRL_ATTR_FAMILY_ID") == 16
        assert len(asking.request(control, 16, 3, 1, dump=True)) > 1
        with pytest.raises(OSError, match="No such file") as info:
            asking.request(control, 16, 3, 1, [("CTRL_ATTR_FAMILY_NAME", "no-such-family")])
        assert info.value.errno == errno.ENOENT
        assert asking.receive() is None
        assert not asking.wait(0)
        # twice a signal came between a request and its answer; a dump is not over by that
        seq = asking._seq
        for flags in (1, 0x301):
            form = control()
            form["cmd"], form["version"], form["attrs"] = 3, 1, []
            form["header"]["type"], form["header"]["flags"] = 16, flags
            form["header"]["sequence_number"] = seq
            form.encode()
            asking._socket.send(bytes(form.data))
        for _ in range(2):
            assert len(asking.request(control, 16, 3, 1, dump=True)) > 1
            answer = asking.request(control, 16, 3, 1, [("CTRL_ATTR_FAMILY_NAME", "nlctrl")])
            assert [found.get_attr("CTRL_ATTR_FAMILY_ID") for found in map(decoded, answer)] == [16]
        assert asking._seq == seq + 4
        asking._seq = (1 << 32) - 1  # and then it begins anew
        assert len(asking.request(control, 16, 3, 1, dump=True)) > 1
        assert asking._seq == 1
        asking.hold(100_000)
    finally:
        asking.close()
    assert asking.fileno() == -1


# The command


@pytest.fixture
def run(kernel: Kernel) -> Callable[..., Result]:
    def run(*arguments: str) -> Result:
        return runner().invoke(tensormem.cli.cli, ["events", *arguments])

    import tensormem.cli

    return run


def test_the_command(kernel: Kernel, run: Callable[..., Result]) -> None:
    kernel.queue.append(event(NLCommand.EVENT_KV_FULL, 1, CLIENT=3, CACHE=4, ERROR=errno.ENOSPC))
    kernel.queue.extend([numbered(1), numbered(3)])
    kernel.queue.append(
        event(NLCommand.EVENT_BANDWIDTH, 1, CLIENT=3, CPU=-1, USED=9, BUDGET=5, THROTTLED=0)
    )
    kernel.queue.append(event(NLCommand.EVENT_SLOT_REMOVED, 1, time=12_345_678_901, SLOT="chat"))
    result = run("--timeout", "0")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "      0.000001  kv         kv-full           client=3 cache=4 error=ENOSPC",
        "      0.000001  pressure   pressure          level=low available=1 given=0",
        "                pressure   missed 1 event",
        "      0.000001  pressure   pressure          level=low available=3 given=0",
        "      0.000001  bandwidth  bandwidth         client=3 cpu=-1 used=9 budget=5 throttled=no",
        "     12.345679  slots      slot-removed      slot=chat",
    ]


def test_the_command_with_json(kernel: Kernel, run: Callable[..., Result]) -> None:
    kernel.queue.extend(map(numbered, (1, 4, 5)))
    result = run("--group", "pressure", "--count", "3", "--json")
    assert result.exit_code == 0
    head = {"group": "pressure", "kind": "pressure"}
    fields = {"level": "low", "given": 0}
    assert [json.loads(line) for line in result.stdout.splitlines()] == [
        {**head, "seq": 1, "time": 1001, "available": 1, **fields},
        {"group": "pressure", "kind": "missed", "seq": 3, "count": 2},
        {**head, "seq": 4, "time": 1004, "available": 4, **fields},
    ]
    assert kernel.joined == [103]
    assert len(kernel.queue) == 1


def test_the_command_without_the_module(kernel: Kernel, run: Callable[..., Result]) -> None:
    kernel.refusal = errno.ENOENT
    result = run("--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["type"] == "DeviceMissing"
    assert run("--group", "x").exit_code == 2
    assert run("--count", "0").exit_code == 2


def test_the_command_is_stopped(
    kernel: Kernel, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeSocket, "wait", stop)
    kernel.queue.append(numbered(1))
    result = run()
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 1


# The description for YNL, the header and the kernel's side


@pytest.fixture(scope="module")
def spec() -> Any:
    return yaml.safe_load(SPEC.read_text())


def c_name(prefix: str, name: str) -> str:
    """The C name of something that YNL names so."""
    return (prefix + name).upper().replace("-", "_").removeprefix("TENSORMEM_")


def test_the_spec_names_what_the_header_does(spec: Any) -> None:
    assert (spec["name"], spec["version"]) == (abi.NL_FAMILY, abi.NL_VERSION)
    found: dict[str, int] = {}
    for enum in spec["definitions"]:
        prefix = enum["name-prefix"]
        found |= {c_name(prefix, name): i for i, name in enumerate(enum["entries"])}
    (attributes,) = spec["attribute-sets"]
    number = 0
    for each in attributes["attributes"]:
        number = each.get("value", number + 1)
        found[c_name(attributes["name-prefix"], each["name"])] = number
    operations = spec["operations"]
    number = 0
    for each in operations["list"]:
        number = each.get("value", number + 1)
        prefix = operations["async-prefix" if "event" in each else "name-prefix"]
        found[c_name(prefix, each["name"])] = number
    ours = {f"NL_GROUP_{group.name}": int(group) for group in NLGroup}
    ours |= {f"NL_{command.name}": int(command) for command in NLCommand}
    ours |= {f"NL_A_{a.name}": int(a) for a in NLAttribute}
    ours |= {f"PRESSURE_{level.name}": int(level) for level in abi.PressureLevel}
    assert found == ours


def test_the_spec_has_the_types_of_the_attributes(spec: Any) -> None:
    forms = {"u32": "uint32", "u64": "uint64", "s32": "int32", "string": "asciiz", "pad": "none"}
    attributes = spec["attribute-sets"][0]["attributes"]
    found = {NLAttribute[a["name"].upper()]: forms[a["type"]] for a in attributes}
    assert found == ATTRIBUTES


def test_the_spec_has_the_attributes_of_the_events(spec: Any) -> None:
    found: dict[NLCommand, Any] = {}
    for each in spec["operations"]["list"]:
        if "mcgrp" not in each:
            continue
        assert each["event"]["attributes"][:3] == ["seq", "time", "missed"]
        its = tuple(NLAttribute[name.upper()] for name in each["event"]["attributes"][3:])
        name = c_name(spec["operations"]["async-prefix"], each["name"])
        found[NLCommand[name.removeprefix("NL_")]] = (NLGroup[each["mcgrp"].upper()], its)
    assert found == KINDS


def test_the_spec_has_the_groups_and_who_may_join(spec: Any) -> None:
    groups = {
        group["name"]: group.get("flags") == ["cap-net-admin"]
        for group in spec["mcast-groups"]["list"]
    }
    pattern = r'\[TENSORMEM_NL_GROUP_\w+\] = \{ "(\w+)"(, TM_GENL_ADMIN)? \}'
    source = {name: bool(flag) for name, flag in re.findall(pattern, EVENT_SOURCE.read_text())}
    assert list(groups) == list(GROUPS)
    assert groups == source


def test_the_kernel_fills_in_the_same() -> None:
    """Its table of kinds against ours."""
    text = EVENT_SOURCE.read_text()
    pattern = r"\[TENSORMEM_NL_(EVENT_\w+)\] =\s+TM_(SLOT|KIND)\((.*?)\),\n(?=\t\[|\};)"
    found = {}
    for name, form, inner in re.findall(pattern, text, re.S):
        its = tuple(NLAttribute[a] for a in re.findall(r"TM_A\((\w+)\)", inner))
        group = NLGroup.SLOTS if form == "SLOT" else NLGroup[inner.split(",")[0]]
        found[NLCommand[name]] = (group, (NLAttribute.SLOT, *its) if form == "SLOT" else its)
    assert found == KINDS
