# SPDX-License-Identifier: MIT
"""The command line. Exit codes: 0 fine, 1 a problem or a refusal, 2 wrong usage."""

from __future__ import annotations

import codecs
import contextlib
import grp
import json
import os
import pwd
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import ShellComplete, get_completion_class

from . import __version__, errors, histogram, system
from .commands.bandwidth import bandwidth
from .commands.bench import bench
from .commands.events import events as events_command
from .commands.export import export
from .commands.man import man
from .commands.map import map_command
from .commands.monitor import monitor
from .commands.pressure import pressure
from .commands.record import record
from .commands.report import report
from .commands.top import top
from .commands.tune import tune
from .commands.walk import walk
from .console import (
    WIDTH,
    Group,
    emit,
    json_option,
    show_number,
    show_size,
    size_value,
    table,
)
from .demo import CHECKPOINTS, PERIOD_US, PROMPT, REQUESTS, SECONDS, SWAPS, TOKENS
from .units import format_ns, format_quota, format_size

if TYPE_CHECKING:
    from . import model as model_module
    from .demo import control as control_module
    from .demo import swap as swap_module
    from .demo.requests import Moment, Report, Trace
    from .demo.run import Holding, Result

__all__ = ["cli", "main"]

_F = TypeVar("_F", bound=Callable[..., Any])

_checkpoint_option = click.option(
    "--checkpoint",
    type=click.Choice(CHECKPOINTS),
    default="b",
    show_default=True,
    help="Early (a) or final (b) weights of one training run.",
)


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 fine, 1 a problem was found or the operation failed, 2 wrong usage.",
)
@click.version_option(__version__, prog_name="tensormem")
def cli() -> None:
    """See and steer the memory that the tensormem kernel module manages."""


# -- status and pool ---------------------------------------------------------------


def _dispatch(status: system.Status) -> dict[str, Any]:
    table = status.dispatch()
    return {kind: [asdict(rule) for rule in rules] for kind, rules in table.items()}


def _document(status: system.Status) -> dict[str, Any]:
    groups = {name: dict(group.values) for name, group in status.groups.items()}
    if "dispatch" in groups:
        groups["dispatch"] = _dispatch(status)
    return {"chunk_size": system.CHUNK_SIZE, **groups}


def _bar(used: int, ready: int, capacity: int, width: int = 40) -> str:
    """Draw a capacity: used, ready, not taken from the system."""
    if capacity <= 0:
        return "." * width
    full = min(width, -(-used * width // capacity))
    both = min(width, -(-(used + ready) * width // capacity))
    return (
        click.style("#" * full, fg="green")
        + click.style("=" * (both - full), fg="cyan")
        + "." * (width - both)
    )


@cli.command()
@json_option
def status(as_json: bool) -> None:
    """Show what the pools hold and who holds it."""
    now = system.read()
    if as_json:
        emit(_document(now))
        return
    chunk, buddy, clients = now.group("chunk"), now.group("buddy"), now.group("clients")
    page = os.sysconf("SC_PAGE_SIZE")
    total, free, capacity = chunk.get("total"), chunk.get("free"), chunk.get("capacity")
    if total is not None and free is not None and capacity is not None:
        bar = _bar(total - free, free, capacity)
        click.echo(f"chunk pool  [{bar}]  {format_size(capacity * system.CHUNK_SIZE)}")
        click.echo("             # used   = ready   . left with the system\n")
    rows = [("", "count", "memory")]
    for name, what in (
        ("capacity", "chunks at most"),
        ("reserve", "chunks to keep ready"),
        ("free", "chunks ready"),
        ("used", "chunks in large tensors"),
    ):
        value = chunk.get(name)
        rows.append((what, show_number(value), show_size(value, system.CHUNK_SIZE)))
    charged, held = chunk.get("charged"), chunk.get("quarantined")
    if charged:
        what = "chunks charged to cgroups"
        rows.append((what, show_number(charged), show_size(charged, system.CHUNK_SIZE)))
    if held:
        rows.append(("pages freed but held", show_number(held), show_size(held, page)))
    rows.append(
        (
            "chunks in the buddy pool",
            show_number(buddy.get("chunks")),
            show_size(buddy.get("chunks"), system.CHUNK_SIZE),
        )
    )
    for name, what in (("used_pages", "  its pages used"), ("free_pages", "  its pages free")):
        value = buddy.get(name)
        rows.append((what, show_number(value), show_size(value, page)))
    slab = now.groups.get("slab")
    if slab is not None:
        value = slab.get("pages")
        rows.append(("  its pages in slabs", show_number(value), show_size(value, page)))
        rows.append(("    small tensors in them", "", show_size(slab.get("bytes"))))
    region = now.groups.get("dma")
    if region is not None and region.get("total"):
        value = region.get("used")
        what = "chunks of the DMA pool used"
        rows.append((what, show_number(value), show_size(value, system.CHUNK_SIZE)))
    models = now.groups.get("model")
    if models is not None:
        slots, held = models.get("slots"), models.get("held")
        rows.append(("model slots", show_number(slots), show_size(held)))
        rows.append(("  their generations", show_number(models.get("generations")), ""))
    arenas = now.groups.get("rt")
    if arenas is not None:
        used = show_size(arenas.get("used"))
        rows.append(("arenas of the RT pool", show_number(arenas.get("arenas")), used))
        rows.append(("  set aside for them", "", show_size(arenas.get("ready"))))
    rows.append(("clients", show_number(clients.get("count")), show_size(clients.get("bytes"))))
    rows.append(("  their tensors", show_number(clients.get("tensors")), ""))
    rows.append(("  kept for reuse, or held", "", show_size(clients.get("kept"))))
    quota = clients.get("default_quota")
    rows.append(("  quota of a new client", "", "-" if quota is None else format_quota(quota)))
    for line in table(rows):
        click.echo(line)


@cli.group(cls=Group)
def pool() -> None:
    """Show pools, set the chunk pool's limits, or compact the buddy pool."""


_MEANING = {
    "chunk": {
        "capacity": "most chunks the pool may hold",
        "reserve": "chunks it keeps ready",
        "total": "chunks it holds now",
        "free": "of these, ready to hand out",
        "zeroed": "of the ready ones, zeroed already",
        "used": "whole in large tensors",
        "charged": "of all in use, charged to cgroups",
        "quarantined": "pages freed and still held by others",
        "grown": "taken from the system since load",
        "shrunk": "given back to the system since load",
        "grow_failed": "times the system had none",
        "recast": "times a free one was exchanged",
    },
    "buddy": {
        "chunks": "chunks it carves into runs of pages",
        "free_pages": "pages free",
        "used_pages": "pages used",
        "fragmentation": "free memory that is in no free chunk",
        "allocs": "runs allocated since load",
        "frees": "runs freed since load",
        "splits": "runs split in two",
        "merges": "runs joined with their buddy",
        "fallbacks": "tensors made of smaller runs than asked",
        "moved_pages": "pages moved by compaction",
        "emptied": "chunks emptied by compaction",
        "given_up": "chunks it could not empty",
    },
    "slab": {
        "pages": "pages that small tensors share",
        "bytes": "small tensors in them",
    },
    "dma": {
        "node": "the device tree's node",
        "total": "chunks of its region",
        "used": "of these, in tensors",
        "free": "of these, in none",
        "buffers": "tensors exported as dma-bufs",
        "bytes": "memory that these hold",
        "attachments": "devices that are attached to them",
    },
    "rt": {
        "size": "most that arenas may have together",
        "ready": "set aside, in use or not",
        "held": "taken from the chunk pool",
        "used": "of that, in arenas",
        "arenas": "arenas",
        "allocs": "blocks that clients ever got",
        "refused": "requests refused",
        "misses": "deadlines missed",
        "waits": "requests that had to wait",
    },
}

#: Files of a pool that hold more than one number.
_HISTOGRAMS = ("latency", "missed")


_IN_CHUNKS = {"capacity", "reserve", "total", "free", "zeroed", "used", "charged", "chunks"}


def _unit(name: str, pool: str = "") -> int:
    """Return the bytes that one of a value stands for; 0 for events."""
    if pool == "rt":
        return int(name in ("size", "ready", "held", "used"))
    if name in _IN_CHUNKS:
        return system.CHUNK_SIZE
    if name in ("pages", "quarantined", "free_pages", "used_pages", "moved_pages"):
        return os.sysconf("SC_PAGE_SIZE")
    return int(name == "bytes")


def _value(name: str, value: int | str) -> str:
    # in sysfs it is in millionths
    return (
        f"{value / 10000:.1f} %"
        if name == "fragmentation" and isinstance(value, int)
        else str(value)
    )


def _dispatch_table(status: system.Status) -> Iterable[str]:
    """Yield which pool serves what."""
    rows = [("dispatch", "from", "to", "pool", "mapped")]
    for kind, rules in status.dispatch().items():
        for number, rule in enumerate(rules):
            largest = "any" if rule.largest is None else f"{rule.largest} B"
            mapped = "blocks" if rule.huge else "pages"
            rows.append(("" if number else kind, f"{rule.smallest} B", largest, rule.pool, mapped))
    yield from table(rows)


@pool.command("show")
@click.argument("name", required=False, metavar="[POOL]")
@json_option
def pool_show(name: str | None, as_json: bool) -> None:
    """Show every figure of the pools (chunk, buddy, slab, dma, rt), or of one POOL.

    Without POOL also the dispatch table: which pool serves which kind and size.
    """
    now = system.read()
    groups = [now.group(name)] if name else now.pools()
    dispatch = not name and "dispatch" in now.groups
    if as_json:
        document: dict[str, Any] = {g.name: dict(g.values) for g in groups}
        if dispatch:
            document["dispatch"] = _dispatch(now)
        emit({"chunk_size": system.CHUNK_SIZE, **document})
        return
    for number, group in enumerate(groups):
        meaning = _MEANING.get(group.name, {})
        ordered = [n for n in meaning if n in group.values]
        ordered += [n for n in group.values if n not in meaning and n not in _HISTOGRAMS]
        rows = [(f"{group.name} pool", "value", "memory", "")]
        for key in ordered:
            value, unit = group.values[key], _unit(key, group.name)
            memory = format_size(value * unit) if unit and isinstance(value, int) else ""
            rows.append((key, _value(key, value), memory, meaning.get(key, "")))
        if number:
            click.echo()
        plain = [row[:3] for row in rows]
        for line, row in zip(table(plain), rows, strict=True):
            # the styled head has no fourth column
            pad = sum(max(len(r[i]) for r in plain) for i in range(3)) + 6
            click.echo(f"{line.ljust(pad)}  {row[3]}".rstrip() if row[3] else line)
    if dispatch:
        click.echo()
        for line in _dispatch_table(now):
            click.echo(line)


@pool.command("set")
@click.argument("name", type=click.Choice(["chunk"]), metavar="[POOL]", default="chunk")
@click.option(
    "--capacity",
    metavar="SIZE",
    callback=size_value,
    help="Most memory the pool may hold, for example 1G.",
)
@click.option(
    "--reserve", metavar="SIZE", callback=size_value, help="Memory it keeps ready, for example 64M."
)
@json_option
def pool_set(name: str, capacity: int | None, reserve: int | None, as_json: bool) -> None:
    """Set the limits of a POOL (chunk, the only one that has any); takes root.

    Sizes are bytes or have a unit (K, M, G, T); they are rounded up to chunks of
    2 MiB.
    """
    if capacity is None and reserve is None:
        raise click.UsageError("nothing to set: give --capacity, --reserve or both")
    limits = system.set_chunk_pool(
        capacity=None if capacity is None else system.chunks(capacity),
        reserve=None if reserve is None else system.chunks(reserve),
    )
    if as_json:
        emit({"pool": name, "chunk_size": system.CHUNK_SIZE, **asdict(limits)})
        return
    for what, count in (("capacity", limits.capacity), ("reserve", limits.reserve)):
        plural = "chunk" if count == 1 else "chunks"
        click.echo(
            f"{name} pool: {what} {count} {plural} ({format_size(count * system.CHUNK_SIZE)})"
        )


@pool.command("compact")
@json_option
def pool_compact(as_json: bool) -> None:
    """Move pages together so that chunks fall empty; takes root.

    Tensors stay where they are in their windows. What is pinned is not moved.
    """
    emptied = system.compact()
    if as_json:
        emit({"emptied": emptied, "chunk_size": system.CHUNK_SIZE})
        return
    plural = "chunk" if emptied == 1 else "chunks"
    click.echo(f"buddy pool: {emptied} {plural} emptied ({show_size(emptied, system.CHUNK_SIZE)})")


@cli.command()
@json_option
def numa(as_json: bool) -> None:
    """Show what each memory node holds and serves."""
    nodes = system.read().nodes()
    if not nodes:
        raise errors.IncompatibleModule(
            "the loaded module has no node0 in sysfs",
            "load a tensormem module that matches this package",
        )
    if as_json:
        listing = [{"node": number, **group.values} for number, group in nodes.items()]
        emit({"chunk_size": system.CHUNK_SIZE, "nodes": listing})
        return
    sizes = ("capacity", "total", "free", "used", "used_pages")
    counts = ("hits", "fallbacks")
    rows: list[Sequence[str]] = [
        ("node", "capacity", "held", "ready", "chunks used", "runs used", *counts)
    ]
    for number, group in nodes.items():
        memory = [show_size(group.get(name), _unit(name)) for name in sizes]
        rows.append((str(number), *memory, *(show_number(group.get(name)) for name in counts)))
    for line in table(rows):
        click.echo(line)
    click.echo("\n  hits: chunks and runs from the node that was tried first")
    click.echo("  fallbacks: those it gave because the first had none")


# -- KV caches -----------------------------------------------------------------------


@cli.group(cls=Group)
def kv() -> None:
    """Show KV caches; save, restore and check sequences."""


@kv.command("show")
@json_option
def kv_show(as_json: bool) -> None:
    """Show the KV caches of running processes.

    Only root sees those of everybody.
    """
    found = system.kv_caches()
    if as_json:
        caches = [
            {"id": c.id, "users": [asdict(u) for u in c.users], **c.values, **_kv_ratios(c)}
            for c in found.caches
        ]
        emit({"caches": caches, "hidden_processes": found.hidden})
        return
    for number, cache in enumerate(found.caches):
        if number:
            click.echo()
        _kv_report(cache)
    if not found.caches:
        click.echo("no process has a KV cache open")
    if found.hidden:
        hint = f"{found.hidden} processes of other users were not looked at: run it with sudo"
        click.echo(click.style(f"\n{hint}", dim=True))


def _ratio(part: int | None, whole: int | None) -> float | None:
    return part / whole if part is not None and whole else None


def _kv_ratios(cache: system.KVStatus) -> dict[str, float | None]:
    return {
        "hit_rate": _ratio(cache.get("hits"), cache.get("lookups")),
        "packing": _ratio(cache.get("packed"), cache.get("unpacked")),
    }


def _kv_report(cache: system.KVStatus) -> None:
    get = cache.get
    users = ", ".join(f"{user.command} ({user.pid})" for user in cache.users)
    head = textwrap.wrap(f"KV cache {cache.id} of {users}", WIDTH - 2, subsequent_indent="  ")
    for line in head:
        click.echo(click.style(line, bold=True))
    used, cached, limit = get("used"), get("cached"), get("limit")
    held = None
    if used is not None and cached is not None and limit is not None:
        held = used - cached
        bar = _bar(held, cached, limit)
        click.echo(f"  [{bar}]  {format_size(limit)}")
        click.echo("   # in sequences   = cached   . free\n")
    ratios = _kv_ratios(cache)
    count = f"{show_number(get('sequences'))} of {show_number(get('max_sequences'))}"
    rows = [
        ("", "count", "memory"),
        ("sequences", count, show_size(held)),
        ("  tokens in one, at most", show_number(get("max_tokens")), ""),
        ("  tokens in a block", show_number(get("block_tokens")), ""),
        ("cached for their prefix", "", show_size(cached)),
        ("packed", _percent(ratios["packing"]), show_size(get("packed"))),
        ("  unpacked it would be", "", show_size(get("unpacked"))),
        ("taken in chunks", "", show_size(get("held"))),
        ("blocks asked for by hash", show_number(get("lookups")), ""),
        ("  of these found", _percent(ratios["hit_rate"]), ""),
    ]
    rows += [
        (what, show_number(get(name)), "")
        for name, what in (
            ("copies", "blocks copied"),
            ("evictions", "cached blocks given up"),
            ("packs", "blocks packed"),
            ("unpacks", "blocks unpacked"),
            ("moved", "pages moved"),
            ("events_lost", "events that nobody read"),
        )
    ]
    for line in table(rows):
        click.echo(line)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


class _Progress:
    """A progress bar on stderr for a callback with what is done and what is to do."""

    def __init__(self, label: str, quiet: bool, *, rate: bool = False) -> None:
        self.label, self.quiet, self.rate = label, quiet, rate
        self.bar: Any = None
        self.done = 0
        self.begin = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if self.quiet:
            return
        if self.bar is None:
            show = self._speed if self.rate else None
            self.bar = click.progressbar(
                length=total, label=self.label, file=sys.stderr, item_show_func=show
            )
            self.bar.__enter__()
        self.bar.update(done - self.done, done)
        self.done = done
        if done == total:
            self.close()

    def _speed(self, done: int | None) -> str:
        seconds = time.monotonic() - self.begin
        return f"{format_size(round(done / seconds))}/s" if done and seconds > 0 else ""

    def close(self) -> None:
        """Leave the bar as it is and go to the next line."""
        if self.bar is not None:
            self.bar.__exit__(None, None, None)
            self.bar = None


@kv.command("save")
@click.argument("prompt")
@click.option(
    "-o", "--output", required=True, metavar="FILE", type=click.Path(dir_okay=False),
    help="The file to write.",
)  # fmt: skip
@_checkpoint_option
@json_option
def kv_save(prompt: str, output: str, checkpoint: str, as_json: bool) -> None:
    """Run the demo model over PROMPT (a text, or @FILE) and keep its KV."""
    from . import client as client_module
    from .demo import saved

    if prompt.startswith("@"):
        try:
            with open(prompt[1:], encoding="utf-8") as file:
                prompt = file.read()
        except UnicodeDecodeError:
            raise click.UsageError(f"{prompt[1:]} is not UTF-8 text") from None
    with client_module.open() as client:
        result = saved.save(
            client,
            prompt,
            output,
            checkpoint=checkpoint,
            computing=_Progress("computing", as_json),
            saving=_Progress("saving   ", as_json),
        )
    if as_json:
        emit({"file": output, **asdict(result)})
    else:
        click.echo(f"{output}: {result.tokens} tokens, {format_size(result.size)}")


@kv.command("restore")
@click.argument("file", type=click.Path(dir_okay=False))
@click.option(
    "-n", "--tokens", type=click.IntRange(1), default=64, show_default=True,
    help="Tokens to generate.",
)  # fmt: skip
@_checkpoint_option
@json_option
def kv_restore(file: str, tokens: int, checkpoint: str, as_json: bool) -> None:
    """Take up what 'kv save' has kept in FILE, and go on with it.

    The file is checked first; one that is damaged, or of another model, is refused.
    """
    from . import client as client_module
    from .demo import saved
    from .demo.model import decode

    printer = _Printer()

    def begin(ids: Any) -> None:
        text = bytes(ids.tolist())
        printer.feed(text, bold=True)
        if not text[-1:].isspace():
            # the word that the text ends in goes on in the continuation
            printer._flush(bold=True)

    with client_module.open() as client:
        result = saved.restore(
            client,
            file,
            tokens,
            checkpoint=checkpoint,
            checking=_Progress("checking", as_json),
            begin=None if as_json else begin,
            each=None if as_json else lambda token: printer.feed(bytes([token])),
        )
    if as_json:
        text = {"prompt_text": decode(result.prompt), "text": decode(result.tokens)}
        emit({"file": file, **asdict(result), **text})
        return
    printer.feed(b"", final=True)
    click.echo(
        f"\n\n{result.reused} of {len(result.prompt)} tokens were not computed again"
        " (the last one always is)"
    )


@kv.command("file")
@click.argument("file", type=click.Path(dir_okay=False))
@json_option
def kv_file(file: str, as_json: bool) -> None:
    """Say what a saved FILE holds and check every byte of it.

    Exit code 1 if it is damaged.
    """
    from . import kvfile

    found = kvfile.read(file, _Progress("checking", as_json))
    if as_json:
        fields = {f: getattr(found, f) for f in ("fingerprint", "length", "block_tokens", "size")}
        emit({"file": file, **fields, "groups": found.groups, "tokens": found.tokens.tolist()})
        return
    click.echo(f"{file}: {click.style('intact', fg='green', bold=True)}")
    for what, value in (
        ("size", format_size(found.size)),
        ("tokens", f"{found.length}, in blocks of {found.block_tokens}"),
        ("fingerprint", found.fingerprint),
    ):
        lines = textwrap.wrap(value, WIDTH - 17) or [""]
        click.echo(f"  {what:<12}  " + f"\n{'':16}".join(lines))
    rows: list[Sequence[str]] = [("layers", "dtype", "each has", "kept")]
    for group in found.groups:
        if "state" in group:
            shape, kept = f"a state {group['state']}", "all"
        else:
            shape = f"{group['heads']} heads of {group['dim']}"
            kept = "all" if group["window"] is None else f"from token {group['first']}"
        rows.append((_ranges(group["layers"]), group["dtype"], shape, kept))
    for line in table(rows):
        click.echo(line)


def _ranges(numbers: Sequence[int]) -> str:
    """Write numbers as ranges: 0-3, 7."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][-1] == number - 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    words = ["-".join(map(str, part)) for part in parts]
    return ", ".join(words) if len(words) <= 4 else f"{len(numbers)} layers"


# -- model slots ---------------------------------------------------------------------


@cli.group(cls=Group)
def model() -> None:
    """Model slots: replace a model while programs use it.

    A slot is a name. It has an active generation, which programs acquire, the previous
    one, which a rollback goes back to, and at most one that is staged.
    """


_slot_argument = click.argument("slot", metavar="SLOT")
_number_argument = click.argument(
    "number", type=click.IntRange(1), required=False, metavar="[GENERATION]"
)


def _stage_options(function: _F) -> _F:
    for option in (
        click.option(
            "--no-check", is_flag=True, help="Take any file, not only GGUF and safetensors."
        ),
        click.option(
            "--sha256", metavar="HEX", callback=_parse_sha256, help="What the file's SHA-256 is."
        ),
        click.option(
            "--evictable", is_flag=True,
            help="Let chunks of it go when memory is wanted, and come back from the file.",
        ),
        click.option(
            "--cached", is_flag=True, help="Leave it in its file, mapped from the page cache."
        ),
        click.argument("file", type=click.Path(dir_okay=False)),
        _slot_argument,
    ):
        function = option(function)
    return function


def _parse_sha256(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", value):
        raise click.BadParameter("it has 64 hexadecimal digits", ctx, param)
    return value


def _parse_mode(ctx: click.Context, param: click.Parameter, value: str) -> int:
    if not re.fullmatch(r"0?[0-7]{3}", value) or int(value, 8) & ~0o666:
        raise click.BadParameter("write it like 660: three digits, each 0, 2, 4 or 6", ctx, param)
    return int(value, 8)


def _parse_user(ctx: click.Context, param: click.Parameter, value: str | None) -> int:
    """Turn a user's or a group's name or number into a number; -1 for none given."""
    if value is None:
        return -1
    try:
        if param.name == "owner":
            return pwd.getpwnam(value).pw_uid
        return grp.getgrnam(value).gr_gid
    except KeyError:
        if value.isascii() and value.isdigit() and int(value) < (1 << 32) - 1:
            return int(value)
        raise click.BadParameter(f"there is no {value!r}", ctx, param) from None


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _open_slot(name: str, *, write: bool = True) -> model_module.Slot:
    from . import model as model_module

    return model_module.slot(name, write=write)


@model.command("create")
@_slot_argument
@click.option(
    "--mode", default="660", show_default=True, callback=_parse_mode,
    help="Who may acquire (4) and who may change it (2): owner, group, others.",
)  # fmt: skip
@click.option("--owner", metavar="USER", callback=_parse_user, help="Takes root.")
@click.option("--group", metavar="GROUP", callback=_parse_user, help="One of yours, or as root.")
@json_option
def model_create(slot: str, mode: int, owner: int, group: int, as_json: bool) -> None:
    """Make a SLOT. It stays until it is removed; the module cannot be unloaded before."""
    from . import model as model_module

    # nobody else gets in before it is as it shall be
    with model_module.slot(slot, exclusive=True, mode=0o600) as made:
        try:
            os.fchown(made.fileno(), owner, group)
            os.fchmod(made.fileno(), mode)
        except OSError as error:
            made.remove()
            raise errors.NotPermitted(
                f"cannot give {slot!r} this owner or group ({error.strerror})", "run it with sudo"
            ) from None
        info = made.info()
    if as_json:
        emit({"slot": slot, "uid": info.uid, "gid": info.gid, "mode": f"{info.mode:04o}"})
    else:
        whose = f"{_user(info.uid)}:{_group(info.gid)}"
        click.echo(f"{slot}: made, for {whose}, mode {info.mode:04o}")


@contextlib.contextmanager
def _interruptible(slot: model_module.Slot, progress: _Progress) -> Iterator[None]:
    """Say what an interrupt has left: with the staging aborted, what was there before."""
    before = slot.info()
    try:
        yield
    except KeyboardInterrupt:
        progress.close()
        now = slot.info()
        if now.active != before.active:
            what = f"interrupted when generation {now.active} was active already"
            raise errors.Interrupted(what, "'tensormem model rollback' goes back") from None
        stays = f"generation {now.active} stays active" if now.active else "nothing is active"
        raise errors.Interrupted(
            f"interrupted, the staged generation was aborted, {stays}", "start again when you like"
        ) from None
    except BaseException:
        progress.close()
        raise


def _staged_document(slot: str, info: model_module.GenerationInfo, begin: float) -> dict[str, Any]:
    return {"slot": slot, **asdict(info), "seconds": time.monotonic() - begin}


def _memory(info: model_module.GenerationInfo) -> str:
    if info.cached:
        return f"{format_size(info.size)}, in its file"
    if info.evictable:
        return f"{format_size(info.size)}, evictable"
    return f"{format_size(info.size)}, {format_size(info.shared_bytes)} of it shared"


@model.command("stage")
@_stage_options
@json_option
def model_stage(
    slot: str, file: str, sha256: str | None, no_check: bool, as_json: bool, **how: bool
) -> None:
    """Load FILE as a new generation of SLOT, beside the active one.

    It is kept for 'commit' or 'abort'. What is equal to the active generation is
    shared with it.
    """
    begin = time.monotonic()
    progress = _Progress("staging", as_json, rate=True)
    with _open_slot(slot) as opened:
        loaded = opened.load(
            file, sha256=sha256, keep=True, check=not no_check, report=progress, **how
        )
        with _interruptible(opened, progress), loaded as staging:
            info = staging.info()
    if as_json:
        emit(_staged_document(slot, info, begin))
        return
    click.echo(f"{slot}: generation {info.number} is staged: {_memory(info)}")
    click.echo(f"  tensormem model commit {slot} {info.number}")


@model.command("swap")
@_stage_options
@json_option
def model_swap(
    slot: str, file: str, sha256: str | None, no_check: bool, as_json: bool, **how: bool
) -> None:
    """Load FILE, check it and make it the active generation of SLOT.

    Whatever goes wrong, the active one stays, and nothing is left of the new one.
    """
    begin = time.monotonic()
    progress = _Progress("swapping", as_json, rate=True)
    with _open_slot(slot) as opened:
        loaded = opened.load(file, sha256=sha256, check=not no_check, report=progress, **how)
        with _interruptible(opened, progress), loaded as staging:
            info = replace(staging.info(), state="active")
            staging.commit()
        previous = opened.info().previous
    if as_json:
        emit({**_staged_document(slot, info, begin), "previous": previous})
        return
    back = f"; generation {previous} is kept for a rollback" if previous else ""
    click.echo(f"{slot}: generation {info.number} is active: {_memory(info)}{back}")


def _staged(slot: model_module.Slot) -> int:
    number = slot.info().staged
    if not number:
        raise errors.NoSuchGeneration(
            f"nothing is staged in {slot.name!r}", "stage a file with 'tensormem model stage'"
        )
    return number


@model.command("commit")
@_slot_argument
@_number_argument
@json_option
def model_commit(slot: str, number: int | None, as_json: bool) -> None:
    """Make the staged generation of SLOT the active one."""
    with _open_slot(slot) as opened:
        number = number or _staged(opened)
        opened.commit(number)
        previous = opened.info().previous
    if as_json:
        emit({"slot": slot, "active": number, "previous": previous})
    else:
        click.echo(f"{slot}: generation {number} is active")


@model.command("abort")
@_slot_argument
@_number_argument
@json_option
def model_abort(slot: str, number: int | None, as_json: bool) -> None:
    """Give up the staged generation of SLOT, loaded or not."""
    with _open_slot(slot) as opened:
        number = number or _staged(opened)
        opened.abort(number)
        active = opened.info().active
    if as_json:
        emit({"slot": slot, "aborted": number, "active": active})
    else:
        click.echo(f"{slot}: generation {number} was aborted")


@model.command("rollback")
@_slot_argument
@_number_argument
@json_option
def model_rollback(slot: str, number: int | None, as_json: bool) -> None:
    """Make the previous generation of SLOT the active one again."""
    with _open_slot(slot) as opened:
        number = opened.rollback(number or 0)
        previous = opened.info().previous
    if as_json:
        emit({"slot": slot, "active": number, "previous": previous})
    else:
        click.echo(f"{slot}: generation {number} is active again")


@model.command("remove")
@_slot_argument
@json_option
def model_remove(slot: str, as_json: bool) -> None:
    """Take SLOT away. Programs keep what they have acquired."""
    with _open_slot(slot) as opened:
        opened.remove()
    if as_json:
        emit({"slot": slot, "removed": True})
    else:
        click.echo(f"{slot}: removed")


def _slot_document(slot: system.SlotStatus) -> dict[str, Any]:
    fields = asdict(slot)
    fields["generations"] = [
        {"number": g.number, "state": g.state, **g.values} for g in slot.generations
    ]
    return {**fields, "mode": f"{slot.mode:04o}"}


def _place(number: int) -> str:
    return str(number) if number else "-"


@model.command("list")
@json_option
def model_list(as_json: bool) -> None:
    """List the model slots."""
    slots = system.model_slots()
    if as_json:
        emit({"slots": [_slot_document(slot) for slot in slots]})
        return
    if not slots:
        click.echo("there are no model slots")
        return
    rows: list[Sequence[str]] = [
        ("slot", "owner", "mode", "active", "size", "previous", "staged", "readers")
    ]
    for slot in slots:
        active = next((g for g in slot.generations if g.number == slot.active), None)
        places = [_place(n) for n in (slot.active, slot.previous, slot.staged)]
        rows.append(
            (
                slot.name,
                f"{_user(slot.uid)}:{_group(slot.gid)}",
                f"{slot.mode:04o}",
                places[0],
                show_size(active.get("size") if active else None),
                *places[1:],
                str(sum(g.get("readers") or 0 for g in slot.generations)),
            )
        )
    for line in table(rows, left=2):
        click.echo(line)


@model.command("show")
@_slot_argument
@json_option
def model_show(slot: str, as_json: bool) -> None:
    """Show the generations of SLOT, those that only readers hold among them."""
    found = next((s for s in system.model_slots() if s.name == slot), None)
    if found is None:
        raise errors.NoSuchSlot(f"there is no model slot {slot!r}")
    if as_json:
        emit(_slot_document(found))
        return
    whose = f"{_user(found.uid)}:{_group(found.gid)}, mode {found.mode:04o}"
    click.echo(click.style(f"model slot {found.name} of {whose}", bold=True))
    rows: list[Sequence[str]] = [
        ("generation", "state", "size", "loaded", "private", "shared", "evicted", "readers")
    ]
    for g in found.generations:
        size, loaded = g.get("size"), g.get("loaded")
        memory = ["in its file", "", ""] if g.get("cached") else []
        memory = memory or [
            show_size(g.get(name)) for name in ("private_bytes", "shared_bytes", "evicted")
        ]
        part = _percent(_ratio(loaded, size))
        readers = show_number(g.get("readers"))
        rows.append((str(g.number), g.state, show_size(size), part, *memory, readers))
    for line in table(rows, left=2):
        click.echo(line)
    for g in found.generations:
        number = g.get("error")
        if number:
            why = errors.from_errno(number, model=True)
            click.echo(f"\n  generation {g.number} has failed: {why}")
    if not found.generations:
        click.echo("  it has no generations: stage a file with 'tensormem model swap'")


@model.command("evict")
@_slot_argument
@_number_argument
@click.option(
    "--size", metavar="SIZE", callback=size_value,
    help="How much at least, least recently used first; all of it unless given.",
)  # fmt: skip
@json_option
def model_evict(slot: str, number: int | None, size: int | None, as_json: bool) -> None:
    """Let the active generation of SLOT, or another, give its memory back now.

    It was staged with --evictable, and comes back from its file when it is used.
    """
    with _open_slot(slot) as opened:
        number = number or opened.info().active
        given = opened.evict(number, size or 0)
    if as_json:
        emit({"slot": slot, "generation": number, "given_back": given})
    else:
        click.echo(f"{slot}: generation {number} gave {format_size(given)} back")


@model.command("watch")
@_slot_argument
@click.option(
    "--timeout", type=click.FloatRange(0), metavar="SECONDS", help="Stop after so long without."
)
@json_option
def model_watch(slot: str, timeout: float | None, as_json: bool) -> None:
    """Say which generation of SLOT is active, now and whenever it is another.

    It ends when the slot is removed. With --json a document for each, on a line.
    """
    with _open_slot(slot, write=False) as opened, contextlib.suppress(KeyboardInterrupt):
        for number in opened.watch(timeout):
            if as_json:
                click.echo(json.dumps({"slot": slot, "active": number}))
            else:
                click.echo(f"{slot}: generation {number} is active")
            sys.stdout.flush()


# -- the RT pool -----------------------------------------------------------------------


@cli.group(cls=Group)
def rt() -> None:
    """The RT pool: memory that is there in time.

    Arenas are made by programs (tensormem.rt in Python). Their clients reserve blocks, and
    wait for others with a deadline, by priority.
    """


def _rt_document(status: system.RTStatus) -> dict[str, Any]:
    histograms = {"latency": list(status.latency), "missed": list(status.missed)}
    return {"id": status.id, **status.values, **histograms}


def _rt_pool_document(status: system.RTPoolStatus) -> dict[str, Any]:
    return {
        **status.values,
        "latency": list(status.latency),
        "missed": list(status.missed),
        "clients": [_rt_document(client) for client in status.clients],
    }


@rt.command("list")
@json_option
def rt_list(as_json: bool) -> None:
    """List the RT clients."""
    pool = system.rt_pool()
    if as_json:
        emit({"clients": [_rt_document(client) for client in pool.clients]})
        return
    if not pool.clients:
        click.echo("there are no RT clients")
        return
    names = ("blocks", "refused", "misses")
    rows: list[Sequence[str]] = [
        ("client", "arena", "size", "priority", "reserved", "used", *names)
    ]
    for client in pool.clients:
        get = client.get
        places = [show_number(get("arena")), show_size(get("size")), show_number(get("priority"))]
        memory = [show_size(get("reserved")), show_size(get("used"))]
        counts = [show_number(get(name)) for name in names]
        rows.append((str(client.id), *places, *memory, *counts))
    for line in table(rows):
        click.echo(line)


def _histograms(latency: Sequence[int], missed: Sequence[int]) -> None:
    """Draw how long requests with a deadline took, and how long a time was not enough."""
    for title, counts in (("requests with a deadline", latency), ("deadlines missed", missed)):
        if any(counts):
            click.echo()
            _draw([(title, counts)])


def _draw(columns: Sequence[tuple[str, Sequence[int]]]) -> None:
    for number, line in enumerate(histogram.draw(columns, WIDTH - 3)):
        click.echo("  " + (click.style(line, bold=True) if number == 0 else line))


@rt.command("show")
@click.argument("client", type=click.IntRange(0), required=False, metavar="[CLIENT]")
@json_option
def rt_show(client: int | None, as_json: bool) -> None:
    """Show the RT pool, or one CLIENT, and draw how long requests took."""
    if client is None:
        pool = system.rt_pool()
        if as_json:
            emit(_rt_pool_document(pool))
        else:
            _rt_pool_report(pool)
        return
    found = system.rt_client(client)
    if as_json:
        emit(_rt_document(found))
        return
    get = found.get
    head = f"RT client {found.id} in arena {show_number(get('arena'))} of {show_size(get('size'))}"
    click.echo(click.style(f"{head}, priority {show_number(get('priority'))}", bold=True))
    rows = [("", "count", "memory"), ("reserved for it", "", show_size(get("reserved")))]
    rows.append(("blocks", show_number(get("blocks")), show_size(get("used"))))
    rows += [
        (what, show_number(get(name)), "")
        for name, what in (
            ("allocs", "blocks that it ever got"),
            ("refused", "requests refused"),
            ("waits", "requests that had to wait"),
            ("waiting", "  that wait now"),
            ("misses", "deadlines missed"),
            ("moves", "blocks of the arena moved"),
        )
    ]
    for line in table(rows):
        click.echo(line)
    _histograms(found.latency, found.missed)


def _rt_pool_report(pool: system.RTPoolStatus) -> None:
    size, used, held = (pool.get(name) for name in ("size", "used", "held"))
    if size is not None and used is not None and held is not None:
        bar = _bar(used, max(0, held - used), size)
        click.echo(f"RT pool  [{bar}]  {format_size(size)}")
        click.echo("          # in arenas   = set aside   . left with the system\n")
    rows = [("", "count", "memory"), ("arenas", show_number(pool.get("arenas")), show_size(used))]
    rows.append(("set aside, in use or not", "", show_size(pool.get("ready"))))
    rows.append(("clients", str(len(pool.clients)), ""))
    for name, what in (("reserved", "  reserved for them"), ("used", "  allocated")):
        rows.append((what, "", show_size(sum(c.get(name) or 0 for c in pool.clients))))
    rows += [
        (what, show_number(pool.get(name)), "")
        for name, what in (
            ("allocs", "blocks allocated so far"),
            ("refused", "requests refused"),
            ("waits", "requests that had to wait"),
            ("misses", "deadlines missed"),
        )
    ]
    for line in table(rows):
        click.echo(line)
    _histograms(pool.latency, pool.missed)


def _rt_setting(name: str, pool: system.RTPoolStatus, as_json: bool) -> None:
    if as_json:
        emit({name: pool.get(name)})
    else:
        click.echo(f"RT pool: {name} {show_size(pool.get(name))}")


_rt_size_argument = click.argument("size", required=False, metavar="[SIZE]", callback=size_value)


@rt.command("size")
@_rt_size_argument
@json_option
def rt_size(size: int | None, as_json: bool) -> None:
    """Show or set what all arenas together may have; to set it takes root.

    At first it is what the board's table says ('tensormem doctor' shows it).
    """
    _rt_setting("size", system.set_rt_pool(size=size), as_json)


@rt.command("ready")
@_rt_size_argument
@json_option
def rt_ready(size: int | None, as_json: bool) -> None:
    """Show or set what is set aside before anybody asks; to set it takes root.

    An arena that finds it there does not depend on what the system has left.
    """
    _rt_setting("ready", system.set_rt_pool(ready=size), as_json)


@rt.command("priority")
@click.argument("client", type=click.IntRange(0))
@click.argument("priority", type=click.IntRange(0, 99), required=False, metavar="[PRIORITY]")
@json_option
def rt_priority(client: int, priority: int | None, as_json: bool) -> None:
    """Show or set the PRIORITY of an RT CLIENT, 0 to 99; to set it takes root.

    Of those who wait for memory of an arena, the highest is served first.
    """
    if priority is None:
        found = system.rt_client(client)
    else:
        found = system.set_rt_priority(client, priority)
    if as_json:
        emit({"id": found.id, "priority": found.get("priority")})
    else:
        click.echo(f"RT client {found.id}: priority {show_number(found.get('priority'))}")


@rt.command("test")
@click.option(
    "-n", "--count", type=click.IntRange(1, 10_000_000), default=10_000, show_default=True,
    help="Blocks to allocate and free, one after the other.",
)  # fmt: skip
@click.option(
    "--size", metavar="SIZE", callback=size_value, default="1K", show_default=True,
    help="Bytes of each.",
)  # fmt: skip
@click.option(
    "--deadline-us", type=click.IntRange(1), default=1000, show_default=True,
    help="Microseconds until a block has to be there.",
)  # fmt: skip
@json_option
def rt_test(count: int, size: int, deadline_us: int, as_json: bool) -> None:
    """Allocate and free in a reservation of an arena, and draw how long it took.

    Exit code 1 if a block was refused or came after its deadline. The times are those of a
    Python program: most of each is not the allocation.
    """
    from . import realtime

    result = realtime.self_test(count, size, 1000 * deadline_us)
    if as_json:
        emit(asdict(result))
    else:
        rows = [("", "count"), ("allocated", str(result.count)), ("refused", str(result.refused))]
        rows.append(("missed its deadline", str(result.misses)))
        for line in table(rows):
            click.echo(line)
        click.echo()
        _draw([("time to allocate", result.taking), ("time to free", result.giving)])
        good = click.style("kept", fg="green", bold=True)
        bad = click.style("BROKEN", fg="red", bold=True)
        click.echo(f"\n  promise      {good if result.kept else bad}")
    if not result.kept:
        click.get_current_context().exit(1)


# -- doctor --------------------------------------------------------------------------

_STATES = {"ok": ("ok", "green"), "warn": ("warn", "yellow"), "fail": ("FAIL", "red")}


@cli.command()
@json_option
def doctor(as_json: bool) -> None:
    """Check this machine and say exactly how to fix what is missing.

    Exit code 1 if a check fails; warnings do not count.
    """
    from .doctor import examine

    checks = examine()
    failed = [check for check in checks if check.state == "fail"]
    if as_json:
        emit({"ok": not failed, "checks": [asdict(check) for check in checks]})
    else:
        for check in checks:
            word, colour = _STATES[check.state]
            mark = click.style(f"{word:<4}", fg=colour, bold=check.state == "fail")
            click.echo(f"  {mark}  {check.name:<14} {check.value}")
            indent = " " * 23
            if check.note:
                for line in textwrap.wrap(check.note, WIDTH - len(indent) - 1):
                    click.echo(click.style(indent + line, dim=True))
            for line in check.fix:
                click.echo(click.style(f"          {line}", fg="cyan"))
        warned = sum(check.state == "warn" for check in checks)
        click.echo(
            f"\n{len(checks)} checks: {len(checks) - warned - len(failed)} ok,"
            f" {warned} warnings, {len(failed)} failed"
        )
    if failed:
        click.get_current_context().exit(1)


# -- demo ----------------------------------------------------------------------------


class _Printer:
    """Prints bytes of text as they come, wrapped between words."""

    def __init__(self, width: int = WIDTH - 2) -> None:
        self.width, self.column, self.word, self.spaces = width, 0, "", 0
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, data: bytes, final: bool = False, **style: Any) -> None:
        for character in self.decoder.decode(data, final):
            if character in " \n":
                self._flush(**style)
                if character == "\n":
                    click.echo()
                    self.column = self.spaces = 0
                else:
                    self.spaces += 1
            else:
                self.word += character if character.isprintable() else "\N{REPLACEMENT CHARACTER}"
        if final:
            self._flush(**style)

    def _flush(self, **style: Any) -> None:
        if self.word:
            if self.column and self.column + self.spaces + len(self.word) > self.width:
                click.echo()
                self.column = self.spaces = 0
            click.echo(" " * self.spaces + click.style(self.word, **style), nl=False)
            sys.stdout.flush()
            self.column += self.spaces + len(self.word)
            self.word, self.spaces = "", 0


@cli.command()
@click.option("--tokens", type=click.IntRange(1), help=f"Tokens to generate.  [default: {TOKENS}]")
@click.option("--prompt", help="Text to continue.  [default: the beginning of the story]")
@_checkpoint_option
@click.option(
    "--requests",
    type=click.IntRange(1, REQUESTS),
    metavar="N",
    help=f"Serve N requests of a trace instead, at most {REQUESTS}, from one KV cache.",
)
@click.option(
    "--swap",
    type=click.IntRange(1, 1000),
    is_flag=False,
    flag_value=SWAPS,
    metavar="[N]",
    help=f"Write texts while another process swaps the model N times.  [{SWAPS} if not said]",
)
@click.option(
    "--rt",
    "control",
    is_flag=True,
    help="Run a control loop in the RT pool, and one with malloc, while all else drowns.",
)
@click.option(
    "--period-us",
    type=click.IntRange(100, 1_000_000),
    metavar="N",
    help=f"Of the control loop: from tick to tick.  [default: {PERIOD_US}]",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0.01, 3600),
    metavar="S",
    help=f"Likewise: how long each goes on.  [default: {SECONDS}]",
)
@json_option
def demo(
    tokens: int | None,
    prompt: str | None,
    checkpoint: str,
    requests: int | None,
    swap: int | None,
    control: bool,
    period_us: int | None,
    seconds: float | None,
    as_json: bool,
) -> None:
    """Run a small language model on memory from the module.

    Weights and activations are tensors, keys and values a sequence of a KV cache. The
    model continues a text, then does so again on ordinary numpy memory, and both must
    agree token for token: exit code 1 if they do not.

    With --requests it serves many conversations from a pool that holds four
    sequences of full length, and says what sharing, eviction and forks make of that. Numpy
    answers each request alone, and must answer the same.

    With --swap it writes text after text from a model slot that another process swaps
    between two checkpoints. Each text must be that of one of them, as numpy alone writes it.

    With --rt a loop allocates and frees its messages each millisecond, in a reservation of
    the RT pool and then with malloc, while a model generates, memory is taken and given back and
    every CPU is busy. In the RT pool no message may be refused. It takes CAP_SYS_NICE.
    """
    if control:
        if not all(option is None for option in (tokens, prompt, requests, swap)):
            raise click.UsageError("there is no text: --rt goes without")
        _demo_control(
            SECONDS if seconds is None else seconds,
            PERIOD_US if period_us is None else period_us,
            as_json,
        )
        return
    if period_us is not None or seconds is not None:
        raise click.UsageError("--period-us and --seconds go with --rt")
    if swap is not None:
        if tokens is not None or prompt is not None or requests is not None:
            raise click.UsageError("the texts are given: --swap goes without")
        _demo_swap(swap, as_json)
        return
    if requests is not None:
        if tokens is not None or prompt is not None:
            raise click.UsageError("the trace has its own prompts: --requests goes without")
        _demo_requests(requests, checkpoint, as_json)
        return
    from . import client as client_module
    from .demo import run

    prompt = PROMPT if prompt is None else prompt
    with client_module.open() as client:
        printer = _Printer()

        def each(token: int) -> None:
            printer.feed(bytes([token]))

        if not as_json and prompt:
            printer.feed(prompt.encode(), bold=True)
            if not prompt[-1:].isspace():
                # the word that the prompt ends in goes on in the continuation
                printer._flush(bold=True)
        result = run.run(
            client,
            checkpoint=checkpoint,
            prompt=prompt,
            count=TOKENS if tokens is None else tokens,
            each=None if as_json else each,
        )
        if as_json:
            emit(_demo_document(result))
        else:
            printer.feed(b"", final=True)
            click.echo("\n")
            _demo_report(result, client.page_size)
    if result.first_difference is not None:
        click.get_current_context().exit(1)


def _demo_document(result: Result) -> dict[str, Any]:
    return {
        "checkpoint": result.checkpoint,
        "model": asdict(result.config),
        "metadata": result.metadata,
        "prompt": result.prompt,
        "text": result.text,
        "tokens": result.tokens,
        "equal": result.first_difference is None,
        "first_difference": result.first_difference,
        "tokens_per_second": {"tensormem": result.speed, "numpy": result.numpy_speed},
        "holdings": [asdict(holding) for holding in result.holdings],
        "pools": None if result.pools is None else _document(result.pools),
    }


def _demo_report(result: Result, page: int) -> None:
    c = result.config
    step, loss = result.metadata.get("step", "?"), result.metadata.get("loss", "?")
    click.echo(
        f"checkpoint {result.checkpoint} (step {step}, loss {loss}): {c.layers} layers,"
        f" {c.heads} heads on {c.kv_heads} KV heads, width {c.dim}\n"
    )

    def row(kind: str, pool: str, h: Sequence[Holding]) -> Sequence[str]:
        return (
            kind,
            pool,
            str(sum(x.tensors for x in h)),
            format_size(sum(x.size for x in h)),
            format_size(sum(x.held for x in h)),
            str(sum(x.chunks for x in h)),
            str(sum(x.runs for x in h)),
        )

    rows: list[Sequence[str]] = [("kind", "pool", "tensors", "asked for", "held", "chunks", "runs")]
    rows += [row(h.kind, h.pool, [h]) for h in result.holdings]
    rows.append(row("together", "", result.holdings))
    for line in table(rows, left=2, rule_before_last=True):
        click.echo(line)
    if result.pools is not None:
        chunk, buddy = result.pools.groups.get("chunk"), result.pools.groups.get("buddy")
        click.echo()
        if chunk is not None:
            click.echo(
                f"  chunk pool   chunks: {show_number(chunk.get('used'))} used,"
                f" {show_number(chunk.get('free'))} ready, of {show_number(chunk.get('capacity'))}"
                f" ({show_size(chunk.get('capacity'), system.CHUNK_SIZE)})"
            )
        if buddy is not None:
            click.echo(
                f"  buddy pool   {show_size(buddy.get('used_pages'), page)} used in"
                f" {show_number(buddy.get('chunks'))} more"
            )
    click.echo()
    click.echo(
        f"  speed        {result.speed:.1f} tokens/s on tensormem,"
        f" {result.numpy_speed:.1f} on numpy memory"
    )
    where, count = result.first_difference, len(result.tokens)
    if where is None:
        verdict = click.style("equal", fg="green", bold=True)
        click.echo(f"  verdict      {verdict}: all {count} tokens are those of numpy memory")
    else:
        verdict = click.style("DIFFERENT", fg="red", bold=True)
        click.echo(
            f"  verdict      {verdict} at token {where} of {count}: {result.tokens[where]} here,"
            f" {result.expected[where]} on numpy memory"
        )


def _demo_requests(count: int, checkpoint: str, as_json: bool) -> None:
    from . import client as client_module
    from .demo import requests

    trace = requests.trace(count)
    with client_module.open() as client:
        if as_json:
            report = requests.replay(client, trace, checkpoint=checkpoint)
            emit(_requests_document(report, trace))
        else:
            # on the device and on numpy memory
            work = 2 * sum(request.tokens for request in trace.requests)
            with click.progressbar(length=work, label="serving", file=sys.stderr) as bar:
                report = requests.replay(client, trace, checkpoint=checkpoint, each=bar.update)
            _requests_report(report)
    if report.different:
        click.get_current_context().exit(1)


def _requests_document(report: Report, trace: Trace) -> dict[str, Any]:
    from .demo.model import decode

    def moment(m: Moment) -> dict[str, Any]:
        return {**asdict(m), "per_sequence": asdict(m.per_sequence())}

    fields = asdict(report)
    sequences = fields.pop("sequences")
    return {
        **fields,
        "hit_rate": report.hit_rate,
        "peak": moment(report.peak),
        "mean": moment(report.mean),
        "against_contiguous": report.against_contiguous,
        "against_private": report.against_private,
        "ms_per_token": {
            "tensormem": 1000 * report.seconds / report.generated,
            "numpy": 1000 * report.alone / report.generated,
        },
        "equal": not report.different,
        "answers": {r.name: decode(sequences[r.name][-r.tokens :]) for r in trace.requests},
    }


def _requests_report(report: Report) -> None:
    info, n = report.info, report.requests
    whole = report.max_tokens // report.block_tokens * report.block_bytes
    click.echo(
        f"{n} requests from one KV cache: a pool of {format_size(info.limit)},"
        f" blocks of {report.block_tokens} tokens ({format_size(report.block_bytes)})\n"
    )
    rows: list[Sequence[str]] = [("KV memory", "at peak", "a sequence", "mean", "a sequence")]
    for what, name in (
        ("contiguous", "contiguous"),
        ("private blocks", "private"),
        ("tensormem", "held"),
        ("  and cached", "cached"),
    ):
        cells = []
        for m in (report.peak, report.mean):
            cells += [getattr(m, name), getattr(m.per_sequence(), name)]
        rows.append((what, *(format_size(round(cell)) for cell in cells)))
    for line in table(rows):
        click.echo(line)
    click.echo()
    ours, theirs = (1000 * seconds / report.generated for seconds in (report.seconds, report.alone))
    facts = {
        "memory": f"{report.against_contiguous:.2f} of contiguous,"
        f" {report.against_private:.2f} of private blocks, on average",
        "at once": f"{report.most} requests at most; {info.limit // whole} would fit contiguous",
        "prefixes": f"{report.matched} of {report.asked} tokens found ({report.hit_rate:.1%}),"
        f" {report.forked} more by {report.forks} forks",
        "computed": f"{report.computed} tokens, {report.recomputed} of them again",
        "blocks": f"{info.evictions} evicted, {info.copies} copied, {info.packs} packed",
        "put back": f"{report.preempted} requests, because the pool was full",
        "time": f"{ours:.1f} ms for each of {report.generated} tokens;"
        f" {theirs:.1f} ms on numpy, each alone",
    }
    for what, words in facts.items():
        click.echo(f"  {what:<11}  {words}")
    if not report.different:
        verdict = click.style("equal", fg="green", bold=True)
        click.echo(f"  verdict      {verdict}: all {n} answers are those of numpy, each alone")
    else:
        verdict = click.style("DIFFERENT", fg="red", bold=True)
        click.echo(f"  verdict      {verdict}: {', '.join(report.different)}")


def _demo_swap(swaps: int, as_json: bool) -> None:
    from . import client as client_module
    from .demo import swap

    name = f"demo-{os.getpid()}"
    with (
        client_module.open() as client,
        client.slot(name, exclusive=True, mode=0o600) as slot,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(slot.remove)
        other = stack.enter_context(swap.OtherProcess(name))
        if as_json:
            report = swap.run(slot, other, client, swaps)
            emit(_swap_document(report))
        else:
            bar = click.progressbar(length=swaps, label="swapping", file=sys.stderr)
            with bar:
                report = swap.run(slot, other, client, swaps, each=bar.update)
            _swap_report(report, other.pid)
    if report.different:
        click.get_current_context().exit(1)


def _swap_document(report: swap_module.Report) -> dict[str, Any]:
    from .demo.model import decode

    return {**asdict(report), "answers": [t.prompt + decode(t.tokens) for t in report.texts]}


def _swap_report(report: swap_module.Report, pid: int) -> None:
    texts = report.texts
    each = ", ".join(f"{sum(t.checkpoint == c for t in texts)} by {c}" for c in CHECKPOINTS)
    during, quiet = report.during, report.quiet
    facts = {
        "swaps": f"{report.swaps}, by process {pid}",
        "texts": f"{len(texts)}, {each}",
        "overtaken": f"{sum(t.overtaken for t in texts)} of them: another generation was active"
        " at the end",
        "longest gap": f"{1000 * during.longest:.1f} ms between tokens with swaps,"
        f" {1000 * quiet.longest:.1f} without",
        "in a text": f"{1000 * during.inside:.1f} and {1000 * quiet.inside:.1f} ms",
        "median": f"{1000 * during.median:.1f} and {1000 * quiet.median:.1f} ms",
    }
    for what, words in facts.items():
        click.echo(f"  {what:<11}  {words}")
    if not report.different:
        verdict = click.style("equal", fg="green", bold=True)
        click.echo(
            f"  verdict      {verdict}: each text is that of one checkpoint, none mixes them"
        )
    else:
        verdict = click.style("DIFFERENT", fg="red", bold=True)
        count = len(report.different)
        click.echo(f"  verdict      {verdict}: {count} texts are of neither checkpoint")


def _demo_control(seconds: float, period_us: int, as_json: bool) -> None:
    from .demo import control

    if as_json:
        report = control.run(seconds, period_us)
        emit(asdict(report))
    else:
        with click.progressbar(
            length=round(20 * seconds), label="running", file=sys.stderr, show_pos=False
        ) as bar:
            report = control.run(
                seconds, period_us, each=lambda passed: bar.update(round(10 * passed))
            )
            bar.update(bar.length or 0)
        _control_report(report)
    if not report.kept:
        click.get_current_context().exit(1)


def _control_report(report: control_module.Report) -> None:
    pool, malloc = report.pool, report.malloc
    kind = "SCHED_FIFO" if pool.fifo else "an ordinary task"
    locked = "locked in memory" if pool.locked else "not locked in memory"
    click.echo(f"a loop with a tick each {format_ns(report.period_ns)}, {kind}, {locked}")
    click.echo(
        f"beside it: a model that generates, up to {format_size(report.hog)} taken and given"
        f" back,\nand {report.busy} busy processes\n"
    )
    rows: list[Sequence[str]] = [("", "RT pool", "malloc")]
    for what, name in (
        ("ticks", "ticks"),
        ("not done when the next was due", "missed"),
        ("messages refused", "refused"),
        ("messages that had changed", "wrong"),
        ("page faults", "minor"),
        ("page faults that read something", "major"),
    ):
        rows.append((what, str(getattr(pool, name)), str(getattr(malloc, name))))
    for what, name in (
        ("time of a tick, median", "median"),
        ("time of a tick, longest", "longest"),
        ("woken late, at most", "latest"),
    ):
        rows.append((what, format_ns(getattr(pool, name)), format_ns(getattr(malloc, name))))
    for line in table(rows):
        click.echo(line)
    click.echo()
    _draw([("a tick in the RT pool", pool.work), ("with malloc", malloc.work)])
    click.echo(f"\n  model        {report.tokens} tokens meanwhile")
    if report.kept:
        verdict = click.style("kept", fg="green", bold=True)
        click.echo(f"  promise      {verdict}: each message had its memory, and none changed")
    else:
        verdict = click.style("BROKEN", fg="red", bold=True)
        wrong = pool.wrong + malloc.wrong
        click.echo(
            f"  promise      {verdict}: {pool.refused} messages refused in the RT pool,"
            f" {wrong} changed"
        )


for each in (
    bandwidth, bench, events_command, export, man, map_command, monitor, pressure, record, report,
    top, tune, walk,
):  # fmt: skip
    cli.add_command(each)


# -- completion ------------------------------------------------------------------------


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@json_option
def completion(shell: str, as_json: bool) -> None:
    """Print the completion script for a shell.

    For bash: tensormem completion bash > ~/.local/share/bash-completion/completions/tensormem
    """
    kind = get_completion_class(shell)
    if kind is None:
        raise errors.TensormemError(f"click knows no completion for {shell}", "update click")
    # not kind.source(): for bash that one runs bash to look at its version
    script = ShellComplete.source(kind(cli, {}, "tensormem", "_TENSORMEM_COMPLETE"))
    if as_json:
        emit({"shell": shell, "script": script})
    else:
        click.echo(script)


def main() -> None:
    """Run the command line and exit."""
    cli(prog_name="tensormem")
