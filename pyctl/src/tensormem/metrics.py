# SPDX-License-Identifier: MIT
"""The module's state as Prometheus metrics, read when somebody asks.

Names follow its conventions: base units (bytes, seconds), ``_total`` for what only grows, the pool,
cache, slot or client as a label. A file that this table does not know is exported as it is, under
its folder's and its own name, so that nothing a newer module has is lost.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry, start_http_server, write_to_textfile
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    UnknownMetricFamily,
)
from prometheus_client.registry import Collector

from . import errors, recording, system

__all__ = ["StateCollector", "address", "registry", "serve", "write_textfile"]


@dataclass(frozen=True)
class _Rule:
    """How one file is exported.

    Attributes:
        name: of the metric, without ``tensormem_``; a counter's without ``_total``.
        help: what it says.
        unit: ``chunk``, ``page``, ``us``, ``ns`` or nothing: what to multiply with to get bytes or
            seconds.
        counter: it only grows.
    """

    name: str
    help: str
    unit: str = ""
    counter: bool = False


_CAPACITY = _Rule("pool_capacity_bytes", "Most memory the pool may hold.")
_HELD = _Rule("pool_held_bytes", "Memory the pool holds.")
_USED = _Rule("pool_used_bytes", "Memory of the pool that is in use.")
_FREE = _Rule("pool_free_bytes", "Memory of the pool that is ready to hand out.")
_ALLOCS = _Rule("pool_allocations", "What the pool handed out.", counter=True)


def _of(rule: _Rule, unit: str) -> _Rule:
    return _Rule(rule.name, rule.help, unit, rule.counter)


#: (group, file) -> rule. Groups that are pools have the label ``pool``.
_RULES: Mapping[tuple[str, str], _Rule] = {
    ("chunk", "capacity"): _of(_CAPACITY, "chunk"),
    ("chunk", "total"): _of(_HELD, "chunk"),
    ("chunk", "used"): _of(_USED, "chunk"),
    ("chunk", "free"): _of(_FREE, "chunk"),
    ("chunk", "reserve"): _Rule("pool_reserve_bytes", "Memory the pool keeps ready.", "chunk"),
    ("chunk", "zeroed"): _Rule("pool_zeroed_bytes", "Ready memory that is zeroed.", "chunk"),
    ("chunk", "charged"): _Rule("pool_charged_bytes", "Memory on memory cgroups' bill.", "chunk"),
    ("chunk", "quarantined"): _Rule(
        "pool_quarantined_bytes", "Memory freed and still held by others.", "page"
    ),
    ("chunk", "grown"): _Rule("pool_chunks_grown", "Chunks taken from the system.", "", True),
    ("chunk", "shrunk"): _Rule("pool_chunks_shrunk", "Chunks given to the system.", "", True),
    ("chunk", "recast"): _Rule("pool_chunks_recast", "Free chunks given another form.", "", True),
    ("chunk", "grow_failed"): _Rule(
        "pool_growth_failures", "Times the system had no chunk.", "", True
    ),
    ("buddy", "chunks"): _of(_HELD, "chunk"),
    ("buddy", "used_pages"): _of(_USED, "page"),
    ("buddy", "free_pages"): _of(_FREE, "page"),
    ("buddy", "cached_pages"): _Rule("pool_cached_bytes", "Memory that CPUs keep ready.", "page"),
    ("buddy", "allocs"): _ALLOCS,
    ("buddy", "frees"): _Rule("pool_frees", "What came back to the pool.", "", True),
    ("buddy", "splits"): _Rule("pool_splits", "Runs halved.", "", True),
    ("buddy", "merges"): _Rule("pool_merges", "Runs joined with their buddy.", "", True),
    ("buddy", "fallbacks"): _Rule("pool_fallbacks", "Tensors of smaller runs.", "", True),
    ("buddy", "moved_pages"): _Rule(
        "pool_moved_bytes", "Memory moved by compaction.", "page", True
    ),
    ("buddy", "emptied"): _Rule("pool_chunks_emptied", "Chunks emptied by compaction.", "", True),
    ("buddy", "given_up"): _Rule(
        "pool_compactions_given_up", "Chunks that compaction could not empty.", "", True
    ),
    ("slab", "pages"): _of(_HELD, "page"),
    ("slab", "bytes"): _USED,
    ("dma", "total"): _of(_CAPACITY, "chunk"),
    ("dma", "used"): _of(_USED, "chunk"),
    ("dma", "free"): _of(_FREE, "chunk"),
    ("dma", "buffers"): _Rule("dma_buffers", "Tensors exported as dma-bufs."),
    ("dma", "bytes"): _Rule("dma_exported_bytes", "Memory that they keep."),
    ("dma", "attachments"): _Rule("dma_attachments", "Devices attached to them."),
    ("kv", "held"): _HELD,
    ("kv", "caches"): _Rule("kv_caches", "KV caches."),
    ("rt", "size"): _CAPACITY,
    ("rt", "held"): _HELD,
    ("rt", "used"): _USED,
    ("rt", "ready"): _Rule("pool_reserve_bytes", "Memory the pool keeps ready."),
    ("rt", "arenas"): _Rule("rt_arenas", "Arenas."),
    ("rt", "allocs"): _ALLOCS,
    ("rt", "refused"): _Rule("rt_refused", "Requests refused.", "", True),
    ("rt", "misses"): _Rule("rt_deadline_misses", "Deadlines missed.", "", True),
    ("rt", "waits"): _Rule("rt_waits", "Requests that had to wait.", "", True),
    ("model", "slots"): _Rule("model_slots", "Model slots."),
    ("model", "generations"): _Rule("model_generations", "Generations of all slots."),
    ("model", "held"): _Rule("model_held_bytes", "Memory of resident generations."),
    ("model", "evictable"): _Rule("model_evictable_bytes", "Of it, what could go."),
    ("model", "evicted"): _Rule("model_evicted_bytes", "What is in its file only."),
    ("model", "reloads"): _Rule("model_chunks_reloaded", "Chunks come back.", "", True),
    ("model", "reload_failed"): _Rule("model_reload_failures", "Chunks not to be had.", "", True),
    ("pressure", "low"): _Rule("pressure_low_bytes", "Below it memory is given back."),
    ("pressure", "high"): _Rule("pressure_high_bytes", "Until there is so much."),
    ("pressure", "available"): _Rule("pressure_available_bytes", "Available to the system."),
    ("pressure", "reliefs"): _Rule("pressure_reliefs", "Times memory was given.", "", True),
    ("pressure", "fruitless"): _Rule("pressure_fruitless", "Of them, in vain.", "", True),
    ("bandwidth", "period_us"): _Rule("bandwidth_period_seconds", "Length of a period.", "us"),
    ("bandwidth", "throttle"): _Rule("bandwidth_throttle", "1: who is above it waits."),
    ("bandwidth", "reclaim"): _Rule("bandwidth_reclaim", "1: cores share what is unused."),
    ("bandwidth", "client_budget"): _Rule("bandwidth_client_budget_bytes", "Of a new client."),
    ("bandwidth", "client_excess"): _Rule("bandwidth_client_excess", "Periods.", "", True),
    ("bandwidth", "client_waits"): _Rule("bandwidth_client_waits", "Calls held.", "", True),
    ("bandwidth", "client_held_ns"): _Rule(
        "bandwidth_client_held_seconds", "How long they were.", "ns", True
    ),
    ("clients", "count"): _Rule("clients", "Clients."),
    ("clients", "tensors"): _Rule("client_tensors", "Tensors of all clients."),
    ("clients", "bytes"): _Rule("client_held_bytes", "Memory that clients hold."),
    ("clients", "kept"): _Rule("client_kept_bytes", "Of it, what no tensor has."),
    ("clients", "default_quota"): _Rule("client_default_quota_bytes", "Quota of a new client."),
    ("board", "ram"): _Rule("board_memory_bytes", "RAM of the board."),
    ("board", "matched"): _Rule("board_matched", "1: the board is in the module's table."),
    ("board", "model_bytes"): _Rule("board_model_bytes", "Of it, for models."),
    ("board", "protocol_bytes"): _Rule("board_protocol_bytes", "Of it, for the RT pool."),
}

#: Groups and files with a part of the name that becomes a label.
_PATTERNS: Sequence[tuple[str, str, _Rule]] = (
    ("pressure", r"(?P<step>\w+)_given",
     _Rule("pressure_given_bytes", "Memory that the system got from a step.", "", True)),
    ("pressure", r"(?P<step>\w+)_calls",
     _Rule("pressure_steps", "Times that a step was taken.", "", True)),
    ("bandwidth", r"(?P<pool>[a-z]+)_bytes",
     _Rule("bandwidth_moved_bytes", "Bytes that the module moved.", "", True)),
    (r"core(?P<core>\d+)", "budget", _Rule("core_budget", "Events of a period; 0: any.")),
    (r"core(?P<core>\d+)", "used", _Rule("core_used", "Events of the last period.")),
    (r"core(?P<core>\d+)", "total", _Rule("core_events", "Events charged.", "", True)),
    (r"core(?P<core>\d+)", "exempt", _Rule("core_exempt_events", "Not charged.", "", True)),
    (r"core(?P<core>\d+)", "periods", _Rule("core_periods", "With a budget.", "", True)),
    (r"core(?P<core>\d+)", "excess", _Rule("core_excess", "Periods used up.", "", True)),
    (r"core(?P<core>\d+)", "held_ns",
     _Rule("core_held_seconds", "How long it was held.", "ns", True)),
    (r"node(?P<node>\d+)", "capacity",
     _Rule("node_capacity_bytes", "The node's share of the capacity.", "chunk")),
    (r"node(?P<node>\d+)", "total", _Rule("node_held_bytes", "Held on the node.", "chunk")),
    (r"node(?P<node>\d+)", "free", _Rule("node_free_bytes", "Of it, ready chunks.", "chunk")),
    (r"node(?P<node>\d+)", "used", _Rule("node_used_bytes", "Of it, chunks used.", "chunk")),
    (r"node(?P<node>\d+)", "used_pages",
     _Rule("node_used_run_bytes", "Of it, used in runs.", "page")),
    (r"node(?P<node>\d+)", "hits",
     _Rule("node_hits", "Served by the node tried first.", "", True)),
    (r"node(?P<node>\d+)", "fallbacks",
     _Rule("node_fallbacks", "Served because others could not.", "", True)),
)  # fmt: skip

#: Words that become numbers.
_LEVELS = {"none": 0, "low": 1, "critical": 2}

_KV_RULES: Mapping[str, _Rule] = {
    "held": _Rule("kv_cache_held_bytes", "Memory of the cache, in whole chunks."),
    "used": _Rule("kv_cache_used_bytes", "Memory in its blocks."),
    "cached": _Rule("kv_cache_cached_bytes", "Of it, kept for a prefix."),
    "packed": _Rule("kv_cache_packed_bytes", "Memory of packed blocks."),
    "unpacked": _Rule("kv_cache_unpacked_bytes", "What they take unpacked."),
    "limit": _Rule("kv_cache_limit_bytes", "Most memory it may hold."),
    "sequences": _Rule("kv_cache_sequences", "Sequences open."),
    "lookups": _Rule("kv_cache_lookups", "Blocks asked for by hash.", "", True),
    "hits": _Rule("kv_cache_hits", "Blocks found of them.", "", True),
    "copies": _Rule("kv_cache_copies", "Blocks copied.", "", True),
    "evictions": _Rule("kv_cache_evictions", "Cached blocks given up.", "", True),
    "packs": _Rule("kv_cache_packs", "Blocks packed.", "", True),
    "unpacks": _Rule("kv_cache_unpacks", "Blocks unpacked.", "", True),
    "events_lost": _Rule("kv_cache_events_lost", "Events that nobody read.", "", True),
}

_GENERATION_RULES: Mapping[str, _Rule] = {
    "size": _Rule("model_generation_size_bytes", "Size of the model."),
    "loaded": _Rule("model_generation_loaded_bytes", "Of it, loaded."),
    "private_bytes": _Rule("model_generation_private_bytes", "Memory that no other has."),
    "shared_bytes": _Rule("model_generation_shared_bytes", "Memory shared with others."),
    "readers": _Rule("model_generation_readers", "Descriptors of it."),
}

_CLIENT_RULES: Mapping[str, _Rule] = {
    "size": _Rule("rt_client_arena_bytes", "Its arena."),
    "used": _Rule("rt_client_used_bytes", "Memory that it has allocated."),
    "reserved": _Rule("rt_client_reserved_bytes", "Memory laid aside for it."),
    "blocks": _Rule("rt_client_blocks", "Blocks that it has."),
    "waiting": _Rule("rt_client_waiting", "Calls that wait now."),
    "priority": _Rule("rt_client_priority", "Its priority."),
    "allocs": _Rule("rt_client_allocations", "Blocks that it got.", "", True),
    "refused": _Rule("rt_client_refused", "Its requests refused.", "", True),
    "misses": _Rule("rt_client_deadline_misses", "Deadlines it missed.", "", True),
    "waits": _Rule("rt_client_waits", "Its requests that had to wait.", "", True),
}

_POOLS = ("chunk", "buddy", "slab", "dma", "kv", "rt")

#: Buckets of times that are exported, by their power of two in ns: 512 ns to 8.6 s.
_BUCKETS = range(8, 33)


class _Families:
    """Metrics of one scrape: samples of one name belong together, whoever adds them."""

    def __init__(self, page_size: int) -> None:
        self._units = {
            "": 1, "chunk": system.CHUNK_SIZE, "page": page_size, "us": 1e-6, "ns": 1e-9,
        }  # fmt: skip
        self._families: dict[str, Metric] = {}

    def add(self, rule: _Rule, labels: Mapping[str, str], value: int) -> None:
        name = f"tensormem_{rule.name}"
        family = self._families.get(name)
        if family is None:
            kind = CounterMetricFamily if rule.counter else GaugeMetricFamily
            family = self._families[name] = kind(name, rule.help, labels=list(labels))
        assert isinstance(family, (CounterMetricFamily, GaugeMetricFamily))
        family.add_metric(list(labels.values()), value * self._units[rule.unit])

    def add_unknown(self, group: str, file: str, value: int) -> None:
        outer, _, inner = group.partition("/")
        name = re.sub(r"[^a-z0-9_]", "_", f"tensormem_{outer}_{file}".lower())
        # an ending that means something else than what it is would mislead
        name = re.sub(r"_(total|count|sum|bucket|info|created)\Z", r"_\1s", name)
        labels = {"part": inner} if inner else {}
        key = f"{name}/{','.join(labels)}"
        family = self._families.get(key)
        if family is None:
            if any(known.name == name for known in self._families.values()):
                name += "_each"
            help_text = f"File {file} of {outer}/ in sysfs."
            family = UnknownMetricFamily(name, help_text, labels=list(labels))
            self._families[key] = family
        assert isinstance(family, UnknownMetricFamily)
        family.add_metric(list(labels.values()), value)

    def add_times(self, name: str, text: str, labels: Mapping[str, str],
                  counts: Sequence[int]) -> None:  # fmt: skip
        if not counts:
            return
        name = f"tensormem_{name}_seconds"
        family = self._families.get(name)
        if family is None:
            family = self._families[name] = HistogramMetricFamily(name, text, labels=list(labels))
        assert isinstance(family, HistogramMetricFamily)
        buckets: list[tuple[str, float]] = [
            (repr(float(2 << bucket) / 1e9), float(sum(counts[: bucket + 1])))
            for bucket in _BUCKETS
        ]
        buckets.append(("+Inf", float(sum(counts))))
        # the module keeps no sum of the times
        family.add_metric(list(labels.values()), buckets, sum_value=None)

    def __iter__(self) -> Iterator[Metric]:
        return iter(self._families.values())


def _fill(families: _Families, now: recording.Sample) -> None:
    for name, group in now.groups.items():
        for file, value in group.values.items():
            # fragmentation is a ratio, and added elsewhere
            if not isinstance(value, int) or (name, file) == ("buddy", "fragmentation"):
                continue
            rule = _RULES.get((name, file))
            if rule is not None:
                pool = rule.name.startswith("pool_") and name in _POOLS
                families.add(rule, {"pool": name} if pool else {}, value)
            elif not _add_pattern(families, name, file, value):
                families.add_unknown(name, file, value)
    level = _LEVELS.get(now.text("pressure", "level"))
    if level is not None:
        rule = _Rule("pressure_level", "0: none, 1: low, 2: critical.")
        families.add(rule, {}, level)
    for cache in now.kv.caches:
        _add_each(families, _KV_RULES, {"cache": str(cache.id)}, cache.values)
    for slot in now.slots:
        families.add(
            _Rule("model_active_generation", "Number of the active generation; 0: none."),
            {"slot": slot.name}, slot.active,
        )  # fmt: skip
        for generation in slot.generations:
            labels = {"slot": slot.name, "generation": str(generation.number)}
            _add_each(families, _GENERATION_RULES, labels, generation.values)
    if now.rt is not None:
        families.add_times("rt_request_duration", "Requests with a deadline that got a block.",
                           {}, now.rt.latency)  # fmt: skip
        families.add_times("rt_missed_duration", "What time missed deadlines had.",
                           {}, now.rt.missed)  # fmt: skip
        for client in now.rt.clients:
            _add_each(families, _CLIENT_RULES, {"client": str(client.id)}, client.values)


def _add_pattern(families: _Families, name: str, file: str, value: int) -> bool:
    for groups, files, rule in _PATTERNS:
        group, match = re.fullmatch(groups, name), re.fullmatch(files, file)
        if group and match:
            families.add(rule, {**group.groupdict(), **match.groupdict()}, value)
            return True
    return False


def _add_each(
    families: _Families, rules: Mapping[str, _Rule], labels: Mapping[str, str],
    values: Mapping[str, int],
) -> None:  # fmt: skip
    for file, value in values.items():
        if file in rules:
            families.add(rules[file], labels, value)


class StateCollector(Collector):
    """Reads the module when it is scraped."""

    def __init__(
        self, root: str | os.PathLike[str] | None = None, proc: str | os.PathLike[str] | None = None
    ) -> None:
        """Remember where to read.

        Args:
            root: another directory than the module's in sysfs, for tests.
            proc: another directory than /proc, for tests.
        """
        self._root, self._proc = root, proc
        # a scrape that takes long is not helped by another beside it
        self._lock = threading.Lock()

    def describe(self) -> Iterable[Metric]:
        """Return nothing: what there is depends on the module."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Return what there is now; without the module only that it is not there."""
        up = GaugeMetricFamily("tensormem_up", "1: the module is loaded.")
        with self._lock:
            try:
                now = recording.sample(self._root, self._proc)
            except errors.NotAvailable:
                up.add_metric([], 0)
                yield up
                return
            up.add_metric([], 1)
            yield up
            families = _Families(now.page_size)
            fragmentation = now.get("buddy", "fragmentation")
            if fragmentation is not None:
                ratio = GaugeMetricFamily(
                    "tensormem_pool_fragmentation_ratio",
                    "Part of all free memory that is in no free chunk.", labels=["pool"],
                )  # fmt: skip
                ratio.add_metric(["buddy"], fragmentation / 1e6)
                yield ratio
            _fill(families, now)
            yield from families


def registry(
    root: str | os.PathLike[str] | None = None, proc: str | os.PathLike[str] | None = None
) -> CollectorRegistry:
    """Return a registry with the module's state and nothing else."""
    found = CollectorRegistry()
    found.register(StateCollector(root, proc))
    return found


def address(text: str) -> tuple[str, int]:
    """Return host and port of ``9843``, ``:9843``, ``0.0.0.0:9843`` or ``[::1]:9843``.

    Without a host it is 127.0.0.1: what a machine does with its memory is nobody else's business
    unless somebody decides so.

    Raises:
        InvalidArgument: it is none of these.
    """
    match = re.fullmatch(r"(?:(\[[0-9a-fA-F:.%\w]+\]|[^\[\]:]*):)?(\d{1,5})", text.strip(), re.A)
    if match is None or not 0 < int(match[2]) < 65536:
        raise errors.InvalidArgument(
            f"{text!r} is no address to listen on",
            "write it like 9843, 127.0.0.1:9843, 0.0.0.0:9843 or [::1]:9843",
        )
    return (match[1] or "127.0.0.1").strip("[]"), int(match[2])


def serve(host: str, port: int, found: CollectorRegistry) -> None:
    """Answer scrapes, in threads of their own, from now on.

    Raises:
        InvalidArgument: this machine has no such address, or its port is in use.
        NotPermitted: the port takes root.
    """
    try:
        start_http_server(port, addr=host, registry=found)
    except OSError as error:
        shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        what = f"cannot listen on {shown}: {error.strerror or error}"
        if isinstance(error, PermissionError):
            raise errors.NotPermitted(what, "take a port of 1024 or above") from None
        raise errors.InvalidArgument(
            what, "take another address or port; 'ss -ltnp' says who has it", error.errno
        ) from None


def write_textfile(path: str | os.PathLike[str], found: CollectorRegistry) -> None:
    """Write a file for node_exporter's textfile collector; who reads it never sees half of it.

    Raises:
        InvalidArgument: node_exporter would not read a file of this name.
        OSError: it cannot be written.
    """
    if Path(path).suffix != ".prom":
        raise errors.InvalidArgument(
            f"node_exporter does not read {path}", "give it a name that ends in .prom"
        )
    # beside the file and then over it
    write_to_textfile(os.fspath(path), found)
