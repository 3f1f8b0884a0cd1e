# SPDX-License-Identifier: MIT
"""Chunks and page tables: what files say, what bits mean, and how a range adds up."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from click import unstyle
from click.testing import Result
from matplotlib.image import imread

from tensormem import errors, layout, picture
from tensormem.cli import cli
from test_cli import runner

CHUNKS = """\
0 0 49a00 zeroed - 0
0 1 49400 dirty - 0
0 2 49600 chunk weights 0
0 3 49000 buddy - 1 0+256 256+16u 272+2a 511+1ua
1 7 88000 split - 0
1 9 88200 chunk module 1
"""
WALK = """\
ff8000000000 pgd 39 9 511 8000000437c9003 table 437c9
ffff80000000 pud 30 9 510 800000043727003 table 43727
ffffa1c00000 pmd 21 9 270 1e8000049000f41 leaf 49000 1
ffffa1e00000 pmd 21 9 271 8000000436ad003 table 436ad
ffffa1e00000 pte 12 9 0 e8000044e00f43 leaf 44e00 0
ffffa1e01000 pte 12 9 1 0 none
ffffa1e02000 pte 12 9 2 1234 other
ffffa1e03000 pte 12 9 3 e8000099999f43 leaf 99999 -1
"""


def test_chunks_are_read() -> None:
    found = layout.parse_chunks(CHUNKS)
    assert [c.state for c in found] == ["zeroed", "dirty", "chunk", "buddy", "split", "chunk"]
    assert [c.purpose for c in found] == [None, None, "weights", None, None, "module"]
    assert [c.used(4096) for c in found] == [0, 0, 512, 275, 0, 512]
    assert (found[3].frame, found[3].charged) == (0x49000, True)
    assert found[3].runs == (
        layout.Run(0, 256), layout.Run(256, 16, movable=False),
        layout.Run(272, 2, arriving=True), layout.Run(511, 1, movable=False, arriving=True),
    )  # fmt: skip
    total = picture.summary(found, 4096)
    assert (total.whole, total.buddy, total.ready) == (2, 1, 3)
    assert (total.used_pages, total.free_pages, total.holes, total.largest) == (275, 237, 1, 237)


@pytest.mark.parametrize(
    "line",
    ["0 0 49a00 zeroed -", "0 0 49a00 chunk - 0", "0 0 49a00 zeroed kv 0", "0 0 xyz zeroed - 0",
     "0 0 49a00 huge - 0", "0 0 49a00 buddy - 0 1", "0 0 49a00 buddy - 0 1+1x", "", "0"],
)  # fmt: skip
def test_chunks_of_another_module(line: str) -> None:
    with pytest.raises(errors.IncompatibleModule):
        layout.parse_chunks(f"0 1 1 zeroed - 0\n{line}\n")


@pytest.mark.parametrize(
    "line",
    ["1 pte 12 9 0 0 table", "1 pte 12 9 0 0 leaf 1", "1 pte 12 9 0 0 none 1",
     "1 pte 12 9 0 0 what", "x pte 12 9 0 0 none", "1 pte 12 9 0", "", "1 pte 12 9 0 0 other 1 1"],
)  # fmt: skip
def test_walks_of_another_module(line: str) -> None:
    with pytest.raises(errors.IncompatibleModule):
        layout.parse_walk(f"{line}\n")


def test_walks_are_read_and_laid_out() -> None:
    entries = layout.parse_walk(WALK)
    assert [e.level(12) for e in entries] == [0, 1, 2, 2, 3, 3, 3, 3]
    assert entries[-1].node is None
    start, end = 0xFFFFA1DFE000, 0xFFFFA1E06000
    found = layout.lay_out(entries, start, end - start, 4096)
    rows = [(s.address - start, s.length, s.frame, s.node, s.tlb_entries) for s in found.stretches]
    assert rows == [
        (0, 0x2000, 0x49000 + 0x1FE, 1, 1), (0x2000, 0x1000, 0x44E00, 0, 1),
        (0x3000, 0x2000, None, None, 0), (0x5000, 0x1000, 0x99999, None, 1),
        (0x6000, 0x2000, None, None, 0),
    ]  # fmt: skip
    assert (found.mapped, found.tlb_entries, found.tables) == (0x4000, 3, 4)
    assert found.by_reach() == {4096: 0x2000, 2 << 20: 0x2000}


# Every bit, and every combination of those that matter

BITS = {
    "VALID": 0, "USER": 6, "RDONLY": 7, "AF": 10, "nG": 11, "DBM": 51, "CONT": 52, "PXN": 53,
    "UXN": 54, "dirty": 55, "special": 56,
}  # fmt: skip


def encode(names: set[str], frame: int, index: int, shareable: int) -> int:
    value = frame << 12 | index << 2 | shareable << 8
    for name in names:
        value |= 1 << BITS[name]
    return value


def test_what_is_encoded_is_decoded() -> None:
    rng = random.Random(5)
    for _ in range(3000):
        names = {name for name in BITS if rng.random() < 0.5}
        index, shareable = rng.randrange(8), rng.randrange(4)
        bits = layout.decode(encode(names, rng.randrange(1 << 36), index, shareable))
        dirty = {"dirty"} if "DBM" in names and "RDONLY" not in names else set()
        assert set(bits.names()) == names | dirty
        assert bits.writable == ("DBM" in names or "RDONLY" not in names)
        assert bits.memory.startswith(
            ("normal", "normal, t", "normal, not", "device nGnRnE", "device nGnRE", "AttrIndx 5",
             "AttrIndx 6", "AttrIndx 7")[index]
        )  # fmt: skip
        assert bits.shareable.startswith(("not", "reserved", "outer", "inner")[shareable])


def table_of(
    pages: dict[int, int], contiguous: set[int], blocks: dict[int, int], shift: int
) -> list[layout.Entry]:
    """Make the walk of a mapping: page -> frame, the pages with the bit, block -> frame."""
    lines = []
    for page, frame in pages.items():
        names = {"VALID"} | ({"CONT"} if page in contiguous else set())
        lines.append((page << shift, "pte", shift, encode(names, 0, 0, 3), frame))
    wide = 2 * shift - 3
    for block, frame in blocks.items():
        lines.append((block << wide, "pmd", wide, encode({"VALID"}, 0, 0, 3), frame))
    return [
        layout.Entry(address, name, bits, 9, 0, descriptor, "leaf", frame, 0)
        for address, name, bits, descriptor, frame in sorted(lines)
    ]


@pytest.mark.parametrize(("shift", "folded"), [(12, 16), (14, 128), (16, 32)])
def test_tables_add_up(shift: int, folded: int) -> None:
    """Random mappings, against each page by itself."""
    rng, page = random.Random(shift), 1 << shift
    per_table = page // 8
    for _ in range(40):
        total = 3 * per_table
        blocks = {n: 0x100000 + n * 0x10000 for n in range(3) if rng.random() < 0.4}
        pages, contiguous = {}, set()
        for group in range(total // folded):
            first = group * folded
            if first // per_table in blocks:
                continue
            whole = rng.random() < 0.5
            for number in range(first, first + folded):
                if whole or rng.random() < 0.7:
                    pages[number] = number + 7 if whole else rng.randrange(1 << 20)
            if whole:
                contiguous |= set(range(first, first + folded))
        entries = table_of(pages, contiguous, blocks, shift)
        first, last = sorted(rng.sample(range(total + 1), 2))
        found = layout.lay_out(entries, first << shift, (last - first) << shift, page)
        expected: list[int | None] = []
        tlb: set[tuple[str, int]] = set()
        for number in range(first, last):
            block, rest = divmod(number, per_table)
            if block in blocks:
                expected.append(blocks[block] + rest)
                tlb.add(("block", block))
            else:
                expected.append(pages.get(number))
                if number in contiguous:
                    tlb.add(("folded", number // folded))
                elif number in pages:
                    tlb.add(("page", number))
        seen: list[int | None] = []
        for s in found.stretches:
            count = s.length >> shift
            seen += [None] * count if s.frame is None else range(s.frame, s.frame + count)
        assert seen == expected
        assert found.tlb_entries == len(tlb)
        assert found.mapped == sum(frame is not None for frame in expected) << shift
        assert sum(found.by_reach().values()) == found.mapped


# Files that are not there, or refuse

REFUSALS = [
    (errno.EFAULT, errors.InvalidArgument, "nothing is mapped at 0x1000 of process 7"),
    (errno.ERANGE, errors.InvalidArgument, "not an address of user space"),
    (errno.ESRCH, errors.InvalidArgument, "no process 7"),
    (errno.EPERM, errors.NotPermitted, "may not look into process 7"),
    (errno.EOPNOTSUPP, errors.InvalidArgument, "hugetlb"),
]


@pytest.mark.parametrize(("number", "kind", "words"), REFUSALS)
def test_refusals_are_explained(
    number: int, kind: type[Exception], words: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "walk").touch()

    def refuse(fd: int, data: bytes) -> int:
        assert data == b"7 0x1000 5"
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "write", refuse)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(kind, match=words) as caught:
        layout.walk(0x1000, 5, 7, tmp_path)
    assert getattr(caught.value, "errno", None) == number
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize(
    ("address", "length", "pid"),
    [(-1, 1, 0), (1 << 64, 1, 0), (0, 0, 0), (0, 1, -1), (0, 1, 1 << 31)],
)
def test_ranges_that_are_none(address: int, length: int, pid: int, tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidArgument, match="no range to walk"):
        layout.walk(address, length, pid, tmp_path)


def test_without_debugfs(tmp_path: Path) -> None:
    for call in (lambda: layout.chunks(tmp_path), lambda: layout.walk(0, 1, 0, tmp_path)):
        with pytest.raises(errors.NotAvailable, match="mount debugfs"):
            call()


# The commands


@pytest.fixture
def tensormem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    (tmp_path / "chunks").write_text(CHUNKS)
    monkeypatch.setenv(layout.ROOT_VARIABLE, str(tmp_path))
    monkeypatch.setattr(os, "sysconf", lambda name: 4096)
    return lambda *arguments: runner().invoke(cli, arguments)


def test_map_draws_every_chunk(tensormem: Callable[..., Result]) -> None:
    lines = tensormem("map").output.splitlines()
    assert lines[0] == "chunks of 2 MiB: 2 whole, 1 in the buddy pool, 3 ready"
    assert [line.strip() for line in lines[1:3]] == ["zdWb", "sO"]
    row = next(line for line in lines if line.startswith("     0:3 "))
    # 275 of 512 pages: 34 cells are full, one has a quarter of its pages, the last one page
    assert row[9:73] in ("█" * 34 + "▂" + " " * 28 + "▂", "#" * 34 + "-" + "." * 28 + "-")
    assert row.endswith(" 53 %")
    assert "other modules" in "".join(lines[-3:])
    assert "used and not to be moved" in lines[-1]
    assert all(len(line) <= 80 for line in lines)


@pytest.mark.parametrize("shift", [12, 14, 16])
def test_cells_follow_the_page_size(shift: int) -> None:
    page = 1 << shift
    half = layout.Chunk(0, 3, 0x100, "buddy", None, False, (layout.Run(0, (1 << 20) // page),))
    *_, title, row = map(unstyle, picture.draw([half], page, plain=True))
    cells = min(64, (2 << 20) // page)
    assert row == f"     0:3 {'#' * (cells // 2)}{'.' * (cells // 2)}  50 %"
    assert f"{(2 << 10) // cells} KiB a cell: 1 MiB used, 1 MiB free in holes up to 1 MiB" in title


def test_a_tensor_marks_its_chunk_from_anywhere_in_it() -> None:
    chunk = layout.Chunk(0, 3, 0x49A00, "chunk", "weights", False)

    def row(shown: set[int]) -> str:
        return list(picture.draw([chunk], 4096, shown=shown))[1]

    plain = row(set())
    assert row({0x49A00 - 1, 0x49A00 + 512}) == plain
    assert row({0x49A00}) == row({0x49A00 + 5}) == row({0x49A00 + 511}) != plain


def test_map_as_a_document(tensormem: Callable[..., Result]) -> None:
    document = json.loads(tensormem("map", "--json").output)
    assert document["chunks"][0]["frame"] == 0x49A00
    assert document["chunks"][3]["runs"][1] == {
        "index": 256, "pages": 16, "movable": False, "arriving": False,
    }  # fmt: skip
    assert document["summary"]["holes"] == 1
    assert document["tensors"] == []


def test_map_as_a_picture(tensormem: Callable[..., Result], tmp_path: Path) -> None:
    path = tmp_path / "map.png"
    assert tensormem("map", "--png", str(path)).exit_code == 0
    image = imread(path)
    assert min(image.shape[:2]) > 200
    colours = {tuple(round(255 * v) for v in rgb) for rgb in image[:, :, :3].reshape(-1, 3)}
    # weights, other modules, used, not to be moved, arriving, free, ready
    for colour in ("1769aa", "e3a008", "2e7d32", "c62828", "8e24aa", "eef0f2", "b4bec8"):
        assert tuple(bytes.fromhex(colour)) in colours, colour
    assert list(tmp_path.glob(".map*")) == []


def test_two_maps_in_a_picture_are_side_by_side() -> None:
    """Before and after compaction, and what is marked in one of them."""
    chunks = layout.parse_chunks(CHUNKS)
    files = io.BytesIO(), io.BytesIO()
    picture.png(files[0], [("now", chunks, set())], 4096)
    maps = [("before", chunks, {chunks[0].frame}), ("after", chunks[:2], set[int]())]
    picture.png(files[1], maps, 4096)
    one, two = (imread(io.BytesIO(file.getvalue())) for file in files)
    assert two.shape[0] == one.shape[0]
    assert 1.7 < two.shape[1] / one.shape[1] < 2.1


def test_map_says_what_is_wrong(tensormem: Callable[..., Result], tmp_path: Path) -> None:
    result = tensormem("map", "--png", str(tmp_path / "none/map.png"))
    assert result.exit_code == 1
    assert "cannot be written" in result.output
    os.mkfifo(tmp_path / "pipe")
    result = tensormem("map", "--png", str(tmp_path / "pipe"))
    assert result.exit_code == 1
    assert "is not a file" in result.output
    assert (tmp_path / "pipe").is_fifo()
    assert tensormem("map", "12").exit_code == 2
    assert tensormem("walk", "zero", "--pid", "1").exit_code == 2
    assert tensormem("walk", "0x1000").exit_code == 2
    (tmp_path / "chunks").unlink()
    result = tensormem("map", "--json")
    assert result.exit_code == 1
    assert json.loads(result.output)["error"]["type"] == "NotAvailable"
    assert len(tensormem("map").output.splitlines()) == 1


def make_process(proc: Path, pid: int, clients: dict[int, int], maps: str) -> None:
    folder = proc / str(pid)
    (folder / "fd").mkdir(parents=True)
    (folder / "fdinfo").mkdir()
    for fd, client in clients.items():
        (folder / "fd" / str(fd)).symlink_to("/dev/tensormem")
        (folder / "fdinfo" / str(fd)).write_text(f"pos:\t0\ntensormem-client:\t{client}\n")
    (folder / "fd/0").symlink_to("/dev/null")
    (folder / "maps").write_text(maps)


MAPS = (
    "10000-14000 rw-s 00000000 00:06 99 /dev/zero\n"
    "20000-30000 rw-s 00100000 00:06 99 /dev/tensormem\n"
    "7f0000-7f4000 rw-p 00000000 00:00 0\n"
)


@pytest.mark.parametrize(
    ("pid", "words"), [(8, "2 clients"), (9, "no client"), (10, "no process 10"), (7, "nowhere")]
)
def test_names_of_tensors(
    pid: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_process(tmp_path, 7, {3: 1, 4: 1}, MAPS)
    make_process(tmp_path, 8, {3: 1, 4: 2}, MAPS)
    make_process(tmp_path, 9, {}, MAPS)
    where = {"offset": 0x104000, "size": 0x3000}

    def query(fd: int, request: int, item: object) -> int:
        for name, value in where.items():
            setattr(item, name, value)
        return 0

    monkeypatch.setattr(layout, "_take_descriptor", lambda pid, fd: os.open("/dev/null", 0))
    monkeypatch.setattr(fcntl, "ioctl", query)
    assert layout.find(7, 1, tmp_path) == layout.Place(7, 0x24000, 0x3000)
    # in pieces that lie beside each other, as mprotect() leaves them; then with a hole between them
    pieces = MAPS.replace("20000-30000 rw-s", "{}-30000 rw-s").replace("00100000", "{}")
    first = "20000-25000 r--s 00100000 00:06 99 /dev/tensormem\n"
    maps = tmp_path / "7/maps"
    maps.write_text(first + pieces.format("25000", "00105000"))
    assert layout.find(7, 1, tmp_path) == layout.Place(7, 0x24000, 0x3000)
    maps.write_text(first + pieces.format("26000", "00106000"))
    with pytest.raises(errors.InvalidArgument, match="nowhere"):
        layout.find(7, 1, tmp_path)
    maps.write_text(MAPS)
    with pytest.raises(errors.InvalidArgument, match="no handle"):
        layout.find(7, (1 << 32) + 1, tmp_path)
    where["offset"] = 0x10E000  # its end is not mapped
    with pytest.raises(errors.InvalidArgument, match=words):
        layout.find(pid, 1, tmp_path)
