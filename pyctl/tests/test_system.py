# SPDX-License-Identifier: MIT
from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tensormem import errors, system


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_sysfs(tmp_path)


def make_sysfs(top: Path) -> Path:
    values: dict[str, dict[str, Any]] = {
        "chunk": {
            "capacity": 256, "reserve": 4, "total": 20, "free": 5, "zeroed": 4, "used": 12,
            "quarantined": 0, "grown": 30, "shrunk": 10, "grow_failed": 1, "charged": 0,
            "recast": 2,
        },
        "buddy": {
            "chunks": 3, "free_pages": 500, "used_pages": 1036, "allocs": 70, "frees": 40,
            "splits": 33, "merges": 22, "fallbacks": 0, "moved_pages": 64, "emptied": 5,
            "given_up": 1, "fragmentation": 163424,
        },
        "slab": {"pages": 9, "bytes": 20480},
        "clients": {
            "count": 2, "tensors": 28, "bytes": 31457280, "kept": 524288,
            "default_quota": 1 << 40,
        },
        "dispatch": {
            "weights": "1 2048 slab\n2049 2093056 buddy\n2093057 - chunk huge",
            "kv": "1 2093056 buddy\n2093057 - chunk",
        },
        "node0": {
            "capacity": 192, "total": 12, "free": 3, "used": 8, "used_pages": 1000,
            "hits": 123456789, "fallbacks": 12,
        },
        "node10": {
            "capacity": 64, "total": 8, "free": 2, "used": 4, "used_pages": 36, "hits": 7,
            "fallbacks": 0,
        },
        "node2": {"capacity": 0, "total": 0, "free": 0, "used": 0, "hits": 0, "fallbacks": 0},
    }  # fmt: skip
    root = top / "tensormem"
    for group, files in values.items():
        (root / group).mkdir(parents=True)
        for name, value in files.items():
            (root / group / name).write_text(f"{value}\n")
    (root / "dev").write_text("10:120\n")
    (root / "power").mkdir()
    (root / "power" / "control").write_text("auto\n")
    (root / "subsystem").symlink_to(top)
    return root


def test_read(root: Path) -> None:
    status = system.read(root)
    assert set(status.groups) == {
        "chunk", "buddy", "slab", "clients", "dispatch", "node0", "node2", "node10",
    }  # fmt: skip
    assert [g.name for g in status.pools()] == ["chunk", "buddy", "slab"]
    assert list(status.nodes()) == [0, 2, 10]
    assert status.nodes()[10].get("hits") == 7
    assert status.group("chunk").get("capacity") == 256
    assert status.group("buddy").get("fallbacks") == 0
    assert status.group("clients").get("default_quota") == 1 << 40


def test_names_come_and_go(root: Path) -> None:
    (root / "chunk" / "zeroed").unlink()
    (root / "chunk" / "novelty").write_text("12\n")
    (root / "chunk" / "policy").write_text("local bind\n")
    (root / "kv").mkdir()
    (root / "kv" / "blocks").write_text("7\n")
    chunk = system.read(root).group("chunk")
    assert chunk.get("zeroed") is None
    assert chunk.get("novelty") == 12
    assert chunk.get("policy") is None
    assert chunk.values["policy"] == "local bind"
    (root / "nodes").mkdir()
    (root / "nodes" / "x").write_text("1\n")
    status = system.read(root)
    assert status.group("kv").get("blocks") == 7
    assert [g.name for g in status.pools()] == ["chunk", "buddy", "slab", "kv", "nodes"]
    with pytest.raises(errors.IncompatibleModule, match="'rt'"):
        status.group("rt")


def test_dispatch(root: Path) -> None:
    table = system.read(root).dispatch()
    assert list(table) == ["kv", "weights"]
    assert table["weights"] == [
        system.Rule(1, 2048, "slab", False),
        system.Rule(2049, 2093056, "buddy", False),
        system.Rule(2093057, None, "chunk", True),
    ]
    assert table["kv"][-1] == system.Rule(2093057, None, "chunk", False)
    for file in (root / "dispatch").iterdir():
        file.unlink()
    assert system.read(root).dispatch() == {}


def test_compact(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = system._write

    def write(path: Path, value: int) -> None:
        real(path, value)
        if path.name == "compact":
            real(path.parent / "emptied", 8)

    monkeypatch.setattr(system, "_write", write)
    assert system.compact(root) == 3
    assert (root / "buddy" / "compact").read_text() == "1"
    (root / "buddy" / "emptied").unlink()
    with pytest.raises(errors.IncompatibleModule, match="buddy/compact"):
        system.compact(root)


def test_no_module(tmp_path: Path) -> None:
    with pytest.raises(errors.NotAvailable, match=r"not loaded.*modprobe"):
        system.read(tmp_path / "nothing")


def test_root_from_the_environment(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORMEM_SYSFS", str(root))
    assert system.read().group("clients").get("count") == 2
    assert system.root_path() == root
    monkeypatch.delenv("TENSORMEM_SYSFS")
    assert system.root_path() == Path(system.DEFAULT_ROOT)


@pytest.mark.parametrize(("size", "count"), [(0, 0), (1, 1), (2 << 20, 1), ((2 << 20) + 1, 2)])
def test_chunks(size: int, count: int) -> None:
    assert system.chunks(size) == count


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    log: list[tuple[str, int]] = []
    real = system._write

    def write(path: Path, value: int) -> None:
        log.append((path.name, value))
        real(path, value)

    monkeypatch.setattr(system, "_write", write)
    return log


def test_set(root: Path, written: list[tuple[str, int]]) -> None:
    assert system.set_chunk_pool(capacity=512, reserve=300, root=root) == system.PoolLimits(
        512, 300
    )
    assert written == [("capacity", 512), ("reserve", 300)], "growing: capacity first"
    written.clear()
    assert system.set_chunk_pool(capacity=8, reserve=2, root=root).capacity == 8
    assert written == [("reserve", 2), ("capacity", 8)], "shrinking: reserve first"
    written.clear()
    assert system.set_chunk_pool(reserve=0, root=root) == system.PoolLimits(8, 0)
    assert written == [("reserve", 0)]
    assert (root / "chunk" / "capacity").read_text() == "8"


def test_set_refuses_a_reserve_beyond_the_capacity(
    root: Path, written: list[tuple[str, int]]
) -> None:
    for capacity, reserve in ((2, None), (None, 257), (3, 4)):
        with pytest.raises(errors.InvalidArgument, match="does not fit"):
            system.set_chunk_pool(capacity=capacity, reserve=reserve, root=root)
    assert not written


def test_set_takes_back_the_first_when_the_second_is_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = []

    def write(path: Path, value: int) -> None:
        log.append((path.name, value))
        if path.name == "reserve":
            raise errors.OutOfMemory()

    monkeypatch.setattr(system, "_write", write)
    with pytest.raises(errors.OutOfMemory):
        system.set_chunk_pool(capacity=512, reserve=300, root=root)
    assert log == [("capacity", 512), ("reserve", 300), ("capacity", 256)]


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.EACCES, errors.NotPermitted, "sudo"),
        (errno.EPERM, errors.NotPermitted, "sudo"),
        (errno.EINVAL, errors.InvalidArgument, "ask for less"),
        (errno.EBUSY, errors.Busy, "free tensors first"),
        (errno.ENOMEM, errors.OutOfMemory, "stop something"),
    ],
)
def test_refusals_of_the_module(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    kind: type[errors.TensormemError],
    words: str,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, "refused")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(kind, match=words) as info:
        system._write(root / "chunk" / "capacity", 5)
    assert "chunk/capacity to 5" in str(info.value)


def test_set_without_the_files(root: Path) -> None:
    (root / "chunk" / "reserve").unlink()
    with pytest.raises(errors.IncompatibleModule, match="chunk/reserve"):
        system.set_chunk_pool(capacity=1, root=root)


# -- KV caches ---------------------------------------------------------------------------


def make_process(
    proc: Path, pid: int, command: str, links: dict[str, tuple[str, dict[str, int]]]
) -> Path:
    """Make a process of a /proc, with descriptors: number -> (link, lines of its fdinfo)."""
    folder = proc / str(pid)
    (folder / "fd").mkdir(parents=True)
    (folder / "fdinfo").mkdir()
    (folder / "comm").write_text(f"{command}\n")
    for name, (link, lines) in links.items():
        (folder / "fd" / name).symlink_to(link)
        text = "pos:\t0\nflags:\t02000002\nmnt_id:\t15\nino:\t1055\n"
        text += "".join(f"{key}:\t{value}\n" for key, value in lines.items())
        (folder / "fdinfo" / name).write_text(text)
    return folder


def test_kv_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = "anon_inode:[tensormem-kv]"
    one = {"tensormem-kv": 7, "client": 2, "used": 1 << 40, "hits": 3}
    two = {"tensormem-kv": 3, "client": 2, "used": 5}
    make_process(tmp_path, 100, "sh", {"0": ("/dev/null", {}), "5": ("anon_inode:[x]", one)})
    make_process(tmp_path, 20, "a b", {"4": (link, one), "5": (link, one), "6": (link, two)})
    make_process(tmp_path, 9, "other", {"4": (link, one)})
    make_process(tmp_path, 300, "odd", {"4": (link, {"nothing": 1})})
    (tmp_path / "self").symlink_to("20")
    (tmp_path / "77").mkdir()  # has ended
    found = system.kv_caches(tmp_path)
    assert [c.id for c in found.caches] == [3, 7]
    assert found.caches[0].users == (system.KVUser(20, "a b"),)
    assert found.caches[1].users == (system.KVUser(9, "other"), system.KVUser(20, "a b"))
    assert found.caches[1].values == {"client": 2, "used": 1 << 40, "hits": 3}
    assert found.caches[0].get("hits") is None
    assert found.hidden == 0

    iterdir = Path.iterdir

    def denied(path: Path) -> Iterator[Path]:
        if path == tmp_path / "9" / "fd":
            raise PermissionError
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", denied)
    found = system.kv_caches(tmp_path)
    assert found.hidden == 1
    assert found.caches[1].users == (system.KVUser(20, "a b"),)
