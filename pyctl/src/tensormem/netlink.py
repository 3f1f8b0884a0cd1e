# SPDX-License-Identifier: MIT
"""What happens in the module, as it happens: events by generic netlink.

::

    for event in tensormem.events(["slots", "pressure"]):
        print(event.group, event.kind, event.fields)

    with tensormem.events(timeout=1) as events:  # ends after a second without any
        for event in events:
            if isinstance(event, tensormem.netlink.Missed):
                ...  # this many were lost here: look at the state again

Nobody waits for a reader. One that is too slow loses events, and is told so where they are
missing and how many they were: the module numbers the events of each group. From when it began to
listen until it stops, a reader gets each event of its groups or a :class:`Missed` that
counts it.

Messages are packed and unpacked by pyroute2's classes, which are alike in its versions since 0.7;
its sockets are not, so the socket is our own.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

from . import errors
from .abi import NL_FAMILY, NL_VERSION, NLAttribute, NLCommand, NLGroup, PressureLevel
from .closing import Closing

__all__ = [
    "ATTRIBUTES", "BUFFER", "GROUPS", "KINDS", "Event", "Events", "Malformed", "Missed", "State",
    "events", "kind_name",
]  # fmt: skip

#: The groups by name.
GROUPS: Mapping[str, NLGroup] = {group.name.lower(): group for group in NLGroup}

_A = NLAttribute
_PACKING = (_A.CLIENT, _A.CACHE, _A.SEQUENCE, _A.BLOCKS, _A.BEFORE, _A.AFTER)

#: Of each kind of event its group and what it has beside a number and a time.
KINDS: Mapping[NLCommand, tuple[NLGroup, tuple[NLAttribute, ...]]] = {
    NLCommand.EVENT_SLOT_STAGED: (NLGroup.SLOTS, (_A.SLOT, _A.GENERATION, _A.SIZE)),
    NLCommand.EVENT_SLOT_READY: (NLGroup.SLOTS, (_A.SLOT, _A.GENERATION, _A.SIZE)),
    NLCommand.EVENT_SLOT_FAILED: (NLGroup.SLOTS, (_A.SLOT, _A.GENERATION, _A.SIZE, _A.ERROR)),
    NLCommand.EVENT_SLOT_COMMITTED: (NLGroup.SLOTS, (_A.SLOT, _A.GENERATION)),
    NLCommand.EVENT_SLOT_ROLLED_BACK: (NLGroup.SLOTS, (_A.SLOT, _A.GENERATION)),
    NLCommand.EVENT_SLOT_ABORTED: (NLGroup.SLOTS, (_A.SLOT, _A.GENERATION)),
    NLCommand.EVENT_SLOT_RETIRED: (NLGroup.SLOTS, (_A.SLOT, _A.GENERATION)),
    NLCommand.EVENT_SLOT_REMOVED: (NLGroup.SLOTS, (_A.SLOT,)),
    NLCommand.EVENT_RT_MISS: (NLGroup.RT, (_A.CLIENT, _A.PID, _A.SIZE, _A.HAD)),
    NLCommand.EVENT_KV_EVICTED: (NLGroup.KV, (_A.CLIENT, _A.CACHE, _A.BLOCKS)),
    NLCommand.EVENT_KV_PACKED: (NLGroup.KV, _PACKING),
    NLCommand.EVENT_KV_UNPACKED: (NLGroup.KV, _PACKING),
    NLCommand.EVENT_KV_FULL: (NLGroup.KV, (_A.CLIENT, _A.CACHE, _A.ERROR)),
    NLCommand.EVENT_PRESSURE: (NLGroup.PRESSURE, (_A.LEVEL, _A.AVAILABLE, _A.GIVEN)),
    NLCommand.EVENT_BANDWIDTH: (
        NLGroup.BANDWIDTH, (_A.CLIENT, _A.CPU, _A.USED, _A.BUDGET, _A.THROTTLED),
    ),
}  # fmt: skip

#: The form of each attribute, as pyroute2 calls it.
ATTRIBUTES: Mapping[NLAttribute, str] = {
    **dict.fromkeys(NLAttribute, "uint64"),
    _A.PAD: "none",
    _A.SLOT: "asciiz",
    _A.CPU: "int32",
    **dict.fromkeys(
        (
            _A.GROUP, _A.ERROR, _A.CLIENT, _A.PID, _A.CACHE, _A.SEQUENCE, _A.LEVEL,
            _A.THROTTLED,
        ),
        "uint32",
    ),
}  # fmt: skip

_SIZES = {"uint64": 8, "uint32": 4, "int32": 4}

# of linux/netlink.h and linux/genetlink.h
_SOL_NETLINK, _ADD_MEMBERSHIP = 270, 1
_SO_RCVBUFFORCE = 33
_ERROR, _DONE = 2, 3
_REQUEST, _DUMP = 0x1, 0x300
_CONTROL, _GETFAMILY = 16, 3
_NLMSG = struct.Struct("=IHHII")
_GENL_HEADER = 4
_ATTRIBUTE = struct.Struct("=HH")

#: Room for messages that wait, where nobody says otherwise: more than the module itself keeps.
BUFFER = 1 << 20

#: More than any message of the family.
_MOST = 1 << 16

#: Numbers of requests begin anew after this one.
_MOST_SEQ = (1 << 32) - 1

#: Seconds without a message after which a reader looks whether the module is still there.
SILENCE = 5.0


def kind_name(command: NLCommand) -> str:
    """Return the name of a kind of event, as in docs/netlink/tensormem.yaml."""
    return command.name.removeprefix("EVENT_").lower().replace("_", "-")


@dataclass(frozen=True)
class Event:
    """Something that happened.

    Attributes:
        group: the name of its group.
        kind: what it was, for example ``slot-committed``.
        seq: its number in the group.
        time: when, in nanoseconds of ``time.monotonic_ns()``.
        fields: what else there is to say, by name.
    """

    group: str
    kind: str
    seq: int
    time: int
    fields: Mapping[str, int | str | bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Missed:
    """Events that did not arrive.

    Attributes:
        group: the name of their group.
        count: how many there were.
        seq: the number of the last of them.
    """

    group: str
    count: int
    seq: int

    @property
    def kind(self) -> str:
        """What it is called among the kinds of events."""
        return "missed"


class State(NamedTuple):
    """A group: the number given last, what the module lost of it ever, the level of pressure."""

    seq: int
    missed: int
    level: str | None = None


class Message(NamedTuple):
    """A netlink message of the family: what it is, and its attributes."""

    command: NLCommand
    values: Mapping[NLAttribute, Any]


class Malformed(errors.TensormemError, ValueError):
    """A message that the module does not send."""

    default_cause = "a netlink message of the module is malformed"
    default_remedy = "load a tensormem module that matches this package ('tensormem doctor')"


@cache
def _classes() -> tuple[type[Any], type[Any]]:
    """pyroute2's class for messages of the family, and that of the kernel's controller."""
    try:
        from pyroute2.netlink import ctrlmsg, genlmsg
    except ImportError as error:
        raise errors.TensormemError(
            f"events come through pyroute2, which cannot be imported ({error})",
            "run 'sudo apt install python3-pyroute2' or 'pip install pyroute2'",
        ) from None
    names = [("UNSPEC", "none"), *((a.name, ATTRIBUTES[a]) for a in NLAttribute)]
    return type("tensormemmsg", (genlmsg,), {"nla_map": tuple(names)}), ctrlmsg


def _walk(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield number and length of each attribute; pyroute2 believes the lengths it reads.

    Raises:
        Malformed: they do not fill the message.
    """
    at = _NLMSG.size + _GENL_HEADER
    if len(data) < at or _NLMSG.unpack_from(data)[0] != len(data):
        raise Malformed("a netlink message has another length than it says")
    while at < len(data):
        if len(data) - at < _ATTRIBUTE.size:
            raise Malformed("a netlink message ends within an attribute")
        length, number = _ATTRIBUTE.unpack_from(data, at)
        if not _ATTRIBUTE.size <= length <= len(data) - at:
            raise Malformed("an attribute of a netlink message reaches past its end")
        yield number, length - _ATTRIBUTE.size
        at += length + -length % 4


def parse(data: bytes) -> Message:
    """Read one message of the family.

    Attributes that this package does not know are left out: a newer module may have them.

    Raises:
        Malformed: it is none.
    """
    for number, length in _walk(data):
        kind = ATTRIBUTES[NLAttribute(number)] if number in tuple(NLAttribute) else "none"
        if length != _SIZES.get(kind, length):
            name = NLAttribute(number).name
            raise Malformed(f"the attribute {name} of a netlink message has {length} bytes")
    message = _classes()[0](data)
    message.decode()
    try:
        command = NLCommand(message["cmd"])
    except ValueError:
        raise Malformed(f"a netlink message has the unknown command {message['cmd']}") from None
    names = {attribute.name: attribute for attribute in NLAttribute}
    values = {names[name]: value for name, value in message["attrs"] if name in names}
    return Message(command, values)


def _value(message: Message, attribute: NLAttribute) -> Any:
    try:
        value = message.values[attribute]
    except KeyError:
        raise Malformed(f"a netlink message lacks the attribute {attribute.name}") from None
    if isinstance(value, bytes):
        raise Malformed("a name in a netlink message is no text")
    return value


def _level(value: int) -> str:
    try:
        return PressureLevel(value).name.lower()
    except ValueError:
        raise Malformed(f"a netlink message has the unknown level {value}") from None


def _field(message: Message, attribute: NLAttribute) -> tuple[str, int | str | bool]:
    """Name and value for people: levels by name, what is yes or no as that."""
    value = _value(message, attribute)
    if attribute is NLAttribute.LEVEL:
        return "level", _level(value)
    if attribute is NLAttribute.THROTTLED:
        return "throttled", bool(value)
    return ("had_ns" if attribute is NLAttribute.HAD else attribute.name.lower()), value


def _group_of(message: Message) -> NLGroup:
    """The group of an event."""
    if message.command in KINDS:
        return KINDS[message.command][0]
    group = _value(message, NLAttribute.GROUP)
    try:
        return NLGroup(group)
    except ValueError:
        raise Malformed(f"a netlink message is of the unknown group {group}") from None


def _event(message: Message, group: NLGroup, seq: int) -> Event:
    kind = message.command
    if kind not in KINDS:
        raise Malformed(f"a netlink message of a group is no event but {kind.name}")
    fields = dict(_field(message, attribute) for attribute in KINDS[kind][1])
    return Event(group.name.lower(), kind_name(kind), seq, _value(message, _A.TIME), fields)


class _Socket:
    """A generic netlink socket."""

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _CONTROL
        )
        self._socket.bind((0, 0))
        self._seq = 0

    def request(
        self, of: type[Any], family: int, command: int, version: int,
        attributes: Iterable[tuple[str, Any]] = (), *, dump: bool = False,
    ) -> list[bytes]:  # fmt: skip
        """Ask, and return the messages of the answer.

        Raises:
            OSError: the kernel refuses.
        """
        message = of()
        message["cmd"] = command
        message["version"] = version
        message["attrs"] = list(attributes)
        message["header"]["type"] = family
        message["header"]["flags"] = _REQUEST | (_DUMP if dump else 0)
        self._seq = self._seq % _MOST_SEQ + 1
        message["header"]["sequence_number"] = self._seq
        message.encode()
        # what a signal kept an earlier request from reading: a dump goes on until it is read
        while self.receive() is not None:
            pass
        self._socket.send(bytes(message.data))
        answer: list[bytes] = []
        while True:
            datagram, (sender, _) = self._socket.recvfrom(_MOST)
            if sender:  # another process
                continue
            for kind, seq, data in _split(datagram):
                if seq != self._seq:
                    continue
                if kind not in (_ERROR, _DONE):
                    answer.append(data)
                    continue
                number = -struct.unpack_from("=i", data, _NLMSG.size)[0]
                if number:
                    raise OSError(number, os.strerror(number))
                return answer
            if answer and not dump:
                return answer

    def receive(self) -> bytes | None:
        """Return what one more message of the kernel has, or None when there is none now.

        Raises:
            OSError: ENOBUFS: messages did not fit into the socket.
        """
        while True:
            try:
                data, (sender, _) = self._socket.recvfrom(_MOST, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return None
            if sender == 0:  # other processes may write to this socket, too
                return data

    def join(self, group: int) -> None:
        self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)

    def hold(self, size: int) -> None:
        """Have room for so many bytes of messages, with the kernel's own of each."""
        # the kernel doubles it; beyond net.core.rmem_max it takes CAP_NET_ADMIN
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, size // 2)
        except PermissionError:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size // 2)

    def wait(self, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(max(0, math.ceil(seconds * 1000))))

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()


def _split(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yield type, sequence number and bytes of each message of a datagram."""
    at = 0
    while at + _NLMSG.size <= len(data):
        length, kind, _, seq, _ = _NLMSG.unpack_from(data, at)
        if not _NLMSG.size <= length <= len(data) - at:
            raise Malformed("a netlink message reaches past its end")
        yield kind, seq, data[at : at + length]
        at += length + -length % 4


class Events(Closing):
    """A reader of events. Iterate over it, or call :meth:`read`; poll it by its ``fileno()``."""

    def __init__(
        self,
        groups: Collection[str] | None = None,
        *,
        timeout: float | None = None,
        buffer: int = BUFFER,
    ) -> None:
        """Begin to listen: what happens from now on will be read.

        Args:
            groups: names of groups, of :data:`GROUPS`; None: all.
            timeout: seconds without an event after which an iteration ends; None: never.
            buffer: bytes of messages that may wait to be read, about 1.3 KiB for each; root may
                have any number, others up to twice net.core.rmem_max.

        Raises:
            InvalidArgument: there is no such group.
            DeviceMissing: the module is not loaded, or this is another network namespace.
            NotPermitted: a group takes CAP_NET_ADMIN.
        """
        names = list(dict.fromkeys(GROUPS if groups is None else groups))
        unknown = [name for name in names if name not in GROUPS]
        if unknown or not names:
            raise errors.InvalidArgument(
                f"there is no group of events {unknown[0]!r}" if unknown else "no group is named",
                f"groups are {', '.join(GROUPS)}",
            )
        self.timeout = timeout
        #: The number of each group's next event.
        self._next: dict[NLGroup, int] = {}
        self._ready: deque[Event | Missed] = deque()
        #: The socket was full: what is missing at the end is to be found out.
        self._behind = False
        #: What had been numbered when it was empty again.
        self._given: dict[NLGroup, State] | None = None
        #: When something came, or the module was found there.
        self._heard = time.monotonic()
        with contextlib.ExitStack() as stack:
            self._socket = stack.enter_context(contextlib.closing(_Socket()))
            self._asking = stack.enter_context(contextlib.closing(_Socket()))
            self._found = _find(self._asking)
            self._family, numbers = self._found
            self._socket.hold(buffer)
            for name in names:
                self._join(name, numbers)
            # after it has joined: the module has heard of it at the latest by this
            states = self._states()
            self._next = {GROUPS[name]: states[GROUPS[name]].seq + 1 for name in names}
            stack.pop_all()

    def _join(self, name: str, numbers: Mapping[str, int]) -> None:
        try:
            self._socket.join(numbers[name])
        except KeyError:
            raise errors.IncompatibleModule(f"the module has no group of events {name}") from None
        except PermissionError:
            raise errors.NotPermitted(
                f"listening to the group {name} takes CAP_NET_ADMIN, because it tells what other"
                " users do",
                "run as root, give a service AmbientCapabilities=CAP_NET_ADMIN, or listen to"
                " pressure and bandwidth only",
            ) from None

    def _states(self) -> dict[NLGroup, State]:
        try:
            answer = self._asking.request(
                _classes()[0], self._family, NLCommand.CMD_GET, NL_VERSION, dump=True
            )
        except OSError as error:
            raise _gone() if error.errno in (errno.ENOENT, errno.EOPNOTSUPP) else error from None
        states = {}
        for message in map(parse, answer):
            level = message.values.get(NLAttribute.LEVEL)
            states[_group_of(message)] = State(
                _value(message, NLAttribute.SEQ),
                _value(message, NLAttribute.MISSED),
                None if level is None else _level(level),
            )
        return states

    def state(self) -> dict[str, State]:
        """Return what the module says of each group now, also of those not listened to.

        Raises:
            DeviceMissing: the module was unloaded.
        """
        return {group.name.lower(): state for group, state in self._states().items()}

    def _take(self, message: Message) -> None:
        """Note what has arrived, and what has not."""
        group = _group_of(message)
        seq = _value(message, NLAttribute.SEQ)
        due = self._next.get(group)
        if due is None or seq < due:
            return  # from before it began to listen
        if message.command is NLCommand.EVENT_MISSED:
            self._lose(group, seq)
            return
        event = _event(message, group, seq)
        self._lose(group, seq - 1)
        self._ready.append(event)
        self._next[group] = seq + 1

    def _lose(self, group: NLGroup, last: int) -> None:
        """Whatever has a number up to this one and is not here is lost."""
        due = self._next[group]
        if last >= due:
            self._ready.append(Missed(group.name.lower(), last + 1 - due, last))
            self._next[group] = last + 1

    def _pull(self) -> bool:
        """Get what has come. Return: whether to wait for more."""
        try:
            data = self._socket.receive()
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            self._behind = True
            return False
        if data is not None:
            self._take(parse(data))
            return False
        # Empty. While it was full nothing more got in, and nobody says so: only now it is certain
        # that what is numbered by now has been delivered or lost.
        if self._behind:
            self._given, self._behind = self._states(), False
            return False
        if self._given is not None:
            given, self._given = self._given, None
            for group in self._next:
                self._lose(group, given[group].seq)
            return False
        return True

    def read(self, timeout: float | None = None) -> Event | Missed | None:
        """Return the next event, or what was missed before it.

        Args:
            timeout: seconds to wait; None: for ever.

        Returns:
            None when none came in time.

        Raises:
            Closed: this reader was closed.
            DeviceMissing: the module was unloaded, also if it was loaded again since. The kernel
                tells nobody: it is found out within some five seconds without an event.
            Malformed: what came is no event.
        """
        end = math.inf if timeout is None else time.monotonic() + timeout
        while not self._ready:
            if self._socket.fileno() < 0:
                raise errors.Closed("this reader of events is closed", "open another one")
            if not self._pull():
                self._heard = time.monotonic()
                continue
            look = self._heard + SILENCE
            if time.monotonic() >= look:
                self._still_there()
                continue
            if not self._socket.wait(min(end, look) - time.monotonic()) and end <= look:
                return None
        return self._ready.popleft()

    def _still_there(self) -> None:
        """See whether it is the module that this reader listens to."""
        if _find(self._asking) != self._found:
            raise errors.DeviceMissing(
                "the module was loaded anew, and this reader listens to the one before",
                "open another reader",
            )
        self._heard = time.monotonic()

    def __iter__(self) -> Iterator[Event | Missed]:
        """Return itself."""
        return self

    def __next__(self) -> Event | Missed:
        """Return the next event; end after ``timeout`` seconds without one."""
        event = self.read(self.timeout)
        if event is None:
            raise StopIteration
        return event

    def fileno(self) -> int:
        """Return the descriptor, for poll(); -1 once closed.

        One datagram may be several events: after it was readable, call ``read(0)`` until it
        returns None.
        """
        return self._socket.fileno()

    def close(self) -> None:
        """Stop listening; a second time does nothing."""
        self._socket.close()
        self._asking.close()


def _gone() -> errors.DeviceMissing:
    return errors.DeviceMissing(
        f"there is no generic netlink family {NL_FAMILY!r}",
        "load the module with 'sudo modprobe tensormem'; events are in the initial network"
        " namespace only, so in a container use the host's (--network host)",
    )


def _find(asking: _Socket) -> tuple[int, dict[str, int]]:
    """Return the numbers of the family and of its groups, which the kernel gave at load."""
    control = _classes()[1]
    name = ("CTRL_ATTR_FAMILY_NAME", NL_FAMILY)
    try:
        (answer,) = asking.request(control, _CONTROL, _GETFAMILY, 1, [name])
    except OSError as error:
        raise _gone() if error.errno == errno.ENOENT else error from None
    message = control(answer)
    message.decode()
    groups = message.get_attr("CTRL_ATTR_MCAST_GROUPS") or ()
    prefix = "CTRL_ATTR_MCAST_GRP_"
    numbers = {g.get_attr(f"{prefix}NAME"): g.get_attr(f"{prefix}ID") for g in groups}
    return message.get_attr("CTRL_ATTR_FAMILY_ID"), numbers


def events(
    groups: Collection[str] | None = None,
    *,
    timeout: float | None = None,
    buffer: int = BUFFER,
) -> Events:
    """Listen to what happens in the module; see :class:`Events`."""
    return Events(groups, timeout=timeout, buffer=buffer)
