# SPDX-License-Identifier: MIT
"""Bytes moved, traffic of cores, and budgets of both: from sysfs and /proc, and set by root.

What a client does about its own budget is :meth:`tensormem.Client.set_bandwidth`.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from . import errors, system

__all__ = [
    "ANY", "EVENTS", "NO_EVENT", "Bandwidth", "BandwidthStatus", "ClientStatus", "CoreStatus",
    "clients", "read", "set_core", "set_rules",
]  # fmt: skip

#: What the kernel says for no budget.
ANY = (1 << 64) - 1

#: The event of a module that has found none to count.
NO_EVENT = "none"

#: Names of events that the module knows; rNNNN is any other, by its number in hexadecimal.
EVENTS = (
    "l2d_cache_refill", "bus_access", "l3d_cache_refill", "ll_cache_miss_rd", "mem_access",
    "l1d_cache_refill", "cycles", "instructions",
)  # fmt: skip

#: What a descriptor of a client is a link to.
_CLIENT_LINK = "/dev/tensormem"

_CORE = re.compile(r"core(\d+)\Z")


@dataclass(frozen=True)
class Bandwidth:
    """What the module has moved for a client.

    Attributes:
        budget: bytes that it may in a period; None: any.
        used: bytes in this period, and what earlier ones had above the budget.
        moved: bytes since the client was made.
        excess: periods in which it moved and was above the budget.
        waits: calls, and steps of loading a model, that had to wait.
        held_ns: how long they waited.
        period_ns: how long a period is.
        client: what names the client in traces and events.
        throttled: above the budget it has to wait; else it is only told.
    """

    budget: int | None
    used: int
    moved: int
    excess: int
    waits: int
    held_ns: int
    period_ns: int
    client: int
    throttled: bool


@dataclass(frozen=True)
class CoreStatus(system.Numbers):
    """One core.

    Attributes:
        number: as the kernel counts CPUs.
        values: name -> number: ``budget`` (0: none), ``used`` (in the last whole period),
            ``total``, ``exempt``, ``periods``, ``excess``, ``held_ns``.
    """

    number: int
    values: Mapping[str, int]


@dataclass(frozen=True)
class BandwidthStatus(system.Numbers):
    """What is moved, and the rules.

    Attributes:
        event: what cores count, or :data:`NO_EVENT`.
        values: name -> number: ``period_us``, ``throttle``, ``reclaim``, ``client_budget`` and what
            else the module has.
        moved: pool -> bytes that it has moved since load; model slots likewise.
        cores: those there can be, by number.
    """

    event: str
    values: Mapping[str, int]
    moved: Mapping[str, int]
    cores: tuple[CoreStatus, ...]


def read(root: str | os.PathLike[str] | None = None) -> BandwidthStatus:
    """Read what the module counts.

    Args:
        root: another directory than the default, for tests.

    Raises:
        NotAvailable: the module is not loaded.
        IncompatibleModule: it counts no bandwidth.
    """
    status = system.read(root)
    group = status.group("bandwidth")
    numbers = {name: v for name, v in group.values.items() if isinstance(v, int)}
    cores = []
    for name, folder in status.groups.items():
        match = _CORE.match(name)
        if match:
            values = {n: v for n, v in folder.values.items() if isinstance(v, int)}
            cores.append(CoreStatus(int(match[1]), values))
    order = ("chunk", "buddy", "slab", "kv", "model", "rt")
    moved = {p: numbers[f"{p}_bytes"] for p in order if f"{p}_bytes" in numbers}
    return BandwidthStatus(
        event=str(group.values.get("event", NO_EVENT)),
        values={n: v for n, v in numbers.items() if n.removesuffix("_bytes") not in moved},
        moved=moved,
        cores=tuple(sorted(cores, key=lambda core: core.number)),
    )


_NO_PMU = "this machine's PMU counts no events: budgets for clients work without"
_REMEDIES: dict[str, dict[int, str]] = {
    "event": {
        errno.EINVAL: f"use one of {', '.join(EVENTS)}, or r and a number in hexadecimal",
        errno.EOPNOTSUPP: "this PMU has no such event: try another, see 'perf list'",
        errno.ENODEV: _NO_PMU,
        errno.EBUSY: "take the cores' budgets away first: an event belongs to them; or somebody"
        " else ('perf') has all counters",
    },
    "budget": {
        errno.EINVAL: "it is a number of events up to 2^48",
        errno.ENODEV: "choose what to count first, with --event; without a PMU there is nothing",
        errno.EBUSY: "somebody else ('perf', a watchdog) has all counters of the PMU",
        errno.EOPNOTSUPP: "the kernel has no tracepoint of the scheduler (CONFIG_TRACEPOINTS)",
        errno.ENOENT: "there is no such core",
    },
    "period_us": {errno.EINVAL: "it is one from 1000 to 1000000 microseconds"},
    "client_budget": {errno.EINVAL: "it is one from 1 byte"},
}


def _write(path: Path, value: int | str) -> None:
    try:
        with path.open("w") as file:
            file.write(str(value))
    except OSError as error:
        what = f"cannot set {path.parent.name}/{path.name} to {value}"
        number = error.errno or 0
        if number in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise errors.NotPermitted(f"{what}, this takes root", "run it with sudo") from None
        remedy = _REMEDIES.get(path.name, {}).get(number)
        if remedy and number in (errno.ENODEV, errno.EOPNOTSUPP, errno.ENOENT):
            # of a PMU, not of a codec or a tensor
            raise errors.TensormemError(what, remedy, number) from None
        raise errors.from_errno(number, what, remedy) from None


def set_rules(
    *,
    event: str | None = None,
    period_us: int | None = None,
    throttle: bool | None = None,
    reclaim: bool | None = None,
    client_budget: int | None = None,
    root: str | os.PathLike[str] | None = None,
) -> BandwidthStatus:
    """Set what holds for all; needs root. What is None is left as it is.

    Args:
        event: what cores count: one of :data:`EVENTS`, or ``rNNNN``.
        period_us: how long a period is, for clients and cores.
        throttle: who is above the budget is held until the period ends.
        reclaim: cores may use what others do not.
        client_budget: bytes in a period for clients made from now on; :data:`ANY`: any.
        root: another directory than the default, for tests.

    Returns:
        What it is afterwards.

    Raises:
        NotPermitted: the caller is not root.
        InvalidArgument: the module refuses the value.
        Busy: cores have budgets of another event.
        TensormemError: the PMU has no such event, or there is none.
        As :func:`read`.
    """
    read(root)
    folder = system.root_path(root) / "bandwidth"
    for name, value in (
        ("event", event), ("period_us", period_us), ("client_budget", client_budget),
        ("throttle", throttle), ("reclaim", reclaim),
    ):  # fmt: skip
        if value is not None:
            _write(folder / name, value if isinstance(value, str) else int(value))
    return read(root)


def set_core(
    number: int, budget: int, root: str | os.PathLike[str] | None = None
) -> BandwidthStatus:
    """Set the budget of a core; needs root.

    Args:
        number: as the kernel counts CPUs.
        budget: events in a period; 0: none, and nothing is counted.
        root: another directory than the default, for tests.

    Raises:
        InvalidArgument: there is no such core, or no such budget.
        NotPermitted: the caller is not root.
        TensormemError: no event is chosen, or the PMU cannot count it.
        As :func:`read`.
    """
    if number not in {core.number for core in read(root).cores}:
        raise errors.InvalidArgument(
            f"there is no core {number}", "'tensormem bandwidth show' has those there are"
        )
    _write(system.root_path(root) / f"core{number}" / "budget", budget)
    return read(root)


@dataclass(frozen=True)
class ClientStatus(system.Numbers):
    """One client, seen from outside.

    Attributes:
        id: its number, as the kernel counts them.
        users: who has it open.
        values: name -> number: those of :class:`Bandwidth`; ``budget`` is :data:`ANY` for none.
    """

    id: int
    users: tuple[system.KVUser, ...]
    values: Mapping[str, int]


def clients(proc: str | os.PathLike[str] | None = None) -> tuple[ClientStatus, ...]:
    """Find the clients of running processes by their descriptors: those that this user may look at.

    Args:
        proc: another directory than /proc, for tests.
    """
    users, values, _ = system.descriptors(_CLIENT_LINK, "tensormem-client", proc)
    return tuple(ClientStatus(n, tuple(users[n]), values[n]) for n in sorted(users))
