# SPDX-License-Identifier: MIT
"""The eBPF tools without a kernel: a tracefs of files, and a bcc that counts what it is told."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bpf"))

import tmbpf  # noqa: E402

#: Fields of events as tracefs writes them: declaration, size, signed.
FIELD = "\tfield:{};\toffset:8;\tsize:{};\tsigned:{};\n"
LAYOUTS = {
    "alloc": [("u64 size", 8, 0), ("u64 held", 8, 0), ("u64 offset", 8, 0), ("u64 latency_ns", 8, 0),
              ("u32 client", 4, 0), ("u32 handle", 4, 0), ("u8 kind", 1, 0), ("u8 pool", 1, 0)],
    "free": [("u64 size", 8, 0), ("u64 held", 8, 0), ("u32 client", 4, 0), ("u32 handle", 4, 0)],
    "fault": [("u64 page", 8, 0), ("u64 latency_ns", 8, 0), ("u32 client", 4, 0), ("u32 mapped", 4, 0)],
    "ioctl": [("u64 latency_ns", 8, 0), ("s64 ret", 8, 1), ("u32 client", 4, 0), ("u32 cmd", 4, 0)],
    "chunk_grow": [("u64 latency_ns", 8, 0), ("u32 node", 4, 0), ("u32 chunk", 4, 0), ("bool ok", 1, 0)],
    "kv_extend": [("u64 latency_ns", 8, 0), ("u32 client", 4, 0), ("u32 cache", 4, 0), ("u32 tokens", 4, 0)],
    "kv_lookup": [("u32 client", 4, 0), ("u32 cache", 4, 0), ("u32 asked", 4, 0), ("u32 matched", 4, 0)],
    "model_stage": [("char slot[64]", 64, 0), ("u64 generation", 8, 0), ("u64 size", 8, 0)],
    "model_load": [("char slot[64]", 64, 0), ("u64 generation", 8, 0), ("u64 size", 8, 0), ("int error", 4, 1)],
    "rt_alloc": [("u64 size", 8, 0), ("u64 latency_ns", 8, 0), ("u32 client", 4, 0), ("u32 handle", 4, 0)],
    "rt_free": [("u32 client", 4, 0), ("u32 handle", 4, 0)],
    "rt_wait": [("u64 size", 8, 0), ("u64 had_ns", 8, 0), ("u32 client", 4, 0)],
    "rt_miss": [("u64 size", 8, 0), ("u64 had_ns", 8, 0), ("u32 client", 4, 0)],
    "rt_interrupted": [("u64 size", 8, 0), ("u64 had_ns", 8, 0), ("u32 client", 4, 0)],
}  # fmt: skip
#: Fields that are words to those who read.
WORDS = {"kind": '{ 1, "weights" }, { 2, "kv" }', "pool": '{ 1, "chunk" }, { 2, "buddy" }'}
COMMON = FIELD.format("unsigned short common_type", 2, 0) + FIELD.format("int common_pid", 4, 1) + "\n"


@pytest.fixture
def tracing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tracefs with the events of a module that lacks some."""
    for event, layout in LAYOUTS.items():
        folder = tmp_path / f"events/tensormem/tensormem_{event}"
        folder.mkdir(parents=True)
        text = COMMON + "".join(FIELD.format(*field) for field in layout)
        names = [declaration.partition("[")[0].split()[-1] for declaration, _, _ in layout]
        values = [f"__print_symbolic(REC->{name}, {words})" for name, words in WORDS.items() if name in names]
        printed = " ".join(f"{name}=%u" for name in names)
        (folder / "format").write_text(f'{text}\nprint fmt: "{printed}", {", ".join(values)}\n')
    monkeypatch.setattr(tmbpf, "TRACING", tmp_path)
    return tmp_path


class Cell:
    """A number in a map, an attribute of it where it has some."""

    def __init__(self, value: int = 0, **fields: Any) -> None:
        self.value = value
        self.__dict__.update(fields)


class Table(dict[Any, Any]):
    """A map; of the ring, what is handed over at each look."""

    handler: Callable[[object, int, int], int]

    def open_ring_buffer(self, handler: Callable[[object, int, int], int]) -> None:
        self.handler = handler

    def walk(self, stack: int) -> list[int]:
        return [0x1000 + stack, 0x2000]


class FakeBPF:
    """What tools use of bcc."""

    def __init__(self, text: str, cflags: list[str]) -> None:
        self.text, self.cflags = text, cflags
        self.tables: dict[str, Table] = {"tm_lost": Table()}
        self.lost = 0
        self.rounds: list[list[tmbpf.CRecord]] = []
        self.looks = 0
        self.each: Callable[[FakeBPF], None] = lambda bpf: None

    def __getitem__(self, name: str) -> Any:
        if name == "tm_lost":
            return LostTable(self.lost)
        if name == "tm_sums":
            self.looks += 1
            self.each(self)
        return self.tables.setdefault(name, Table())

    def ring_buffer_consume(self) -> None:
        for record in self.rounds.pop(0) if self.rounds else []:
            self.tables["tm_ring"].handler(None, ctypes.addressof(record), ctypes.sizeof(record))

    @staticmethod
    def ksym(address: int, show_offset: bool = False) -> bytes:
        return b"tm_kernel_function_with_a_long_name_that_goes_on+0x%x" % address

    @staticmethod
    def sym(address: int, pid: int, show_module: bool = False) -> bytes:
        return b"[unknown]" if address == 0x2000 else b"user_function [/usr/bin/program]"

    def sum(self, event: int, a: int, b: int, c: int, count: int, x: int, y: int) -> None:
        key = Key(event, a, b, c)
        self.tables.setdefault("tm_sums", Table())[key] = Cell(count=count, x=x, y=y)


class Key(tuple[int, int, int, int]):
    """A key of sums, whose parts have names."""

    event = property(lambda self: self[0])
    a = property(lambda self: self[1])
    b = property(lambda self: self[2])
    c = property(lambda self: self[3])

    def __new__(cls, *parts: int) -> Key:
        return super().__new__(cls, parts)


class LostTable:
    """The one counter of what was lost."""

    def __init__(self, lost: int) -> None:
        self.lost = lost

    def __getitem__(self, place: ctypes.c_int) -> Cell:
        return Cell(self.lost)


@pytest.fixture
def bcc(monkeypatch: pytest.MonkeyPatch) -> Made:
    """The programs that were attached; ``setup`` of the list prepares the next one."""
    made = Made()
    module = ModuleType("bcc")

    def make(text: str, cflags: list[str]) -> FakeBPF:
        bpf = FakeBPF(text, cflags)
        made.append(bpf)
        made.setup(bpf)
        return bpf

    module.BPF = make  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bcc", module)
    monkeypatch.setattr(tmbpf, "POLL", 0.001)
    return made


class Made(list[FakeBPF]):
    """Programs attached."""

    setup: Callable[[FakeBPF], None] = staticmethod(lambda bpf: None)
