# SPDX-License-Identifier: MIT
"""'tensormem export': names, values and types as the library's own parser reads them."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.openmetrics import exposition as openmetrics_exposition
from prometheus_client.openmetrics import parser as openmetrics_parser
from prometheus_client.parser import text_string_to_metric_families as parse

from tensormem import errors, metrics, system
from tensormem.cli import cli
from terminal import SRC
from test_cli import runner
from test_cli_rt import LATENCY
from test_top import make_world

CHUNK = system.CHUNK_SIZE

# of some versions the library's own hints lack these two
write_openmetrics: Callable[..., bytes] = openmetrics_exposition.generate_latest
read_openmetrics: Callable[[str], Iterator[Metric]] = (
    openmetrics_parser.text_string_to_metric_families
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_world(tmp_path)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, root: Path) -> Callable[..., Result]:
    monkeypatch.setenv("TENSORMEM_SYSFS", str(root))
    monkeypatch.setenv("TENSORMEM_PROC", str(root.parent / "proc"))

    def call(*arguments: Any) -> Result:
        return runner().invoke(cli, ["export", *map(str, arguments)], prog_name="tensormem")

    return call


def text(root: Path) -> str:
    return generate_latest(metrics.registry(root, root.parent / "proc")).decode()


def families(exposition: str) -> dict[str, Metric]:
    found = list(parse(exposition))
    names = [family.name for family in found]
    assert len(names) == len(set(names)), "each name has one family"
    return dict(zip(names, found, strict=True))


def value(found: dict[str, Metric], name: str, **labels: str) -> float:
    family = found.get(name) or found[name.removesuffix("_total").removesuffix("_bucket")]
    (only,) = [s for s in family.samples if s.name == name and s.labels == labels]
    return float(only.value)


def test_values(root: Path) -> None:
    found = families(text(root))
    page = os.sysconf("SC_PAGE_SIZE")
    for name, labels, expected in (
        ("tensormem_up", {}, 1),
        ("tensormem_pool_capacity_bytes", {"pool": "chunk"}, 256 * CHUNK),
        ("tensormem_pool_used_bytes", {"pool": "chunk"}, 12 * CHUNK),
        ("tensormem_pool_used_bytes", {"pool": "buddy"}, 1036 * page),
        ("tensormem_pool_used_bytes", {"pool": "slab"}, 20480),
        ("tensormem_pool_used_bytes", {"pool": "rt"}, 4 << 20),
        ("tensormem_pool_chunks_grown_total", {"pool": "chunk"}, 30),
        ("tensormem_pool_allocations_total", {"pool": "buddy"}, 70),
        ("tensormem_pool_fragmentation_ratio", {"pool": "buddy"}, 0.163424),
        ("tensormem_clients", {}, 2),
        ("tensormem_client_default_quota_bytes", {}, 1 << 40),
        ("tensormem_node_hits_total", {"node": "0"}, 123456789),
        ("tensormem_kv_cache_hits_total", {"cache": "7"}, 60),
        ("tensormem_kv_cache_held_bytes", {"cache": "9"}, 8 << 20),
        ("tensormem_model_active_generation", {"slot": "chat"}, 3),
        ("tensormem_model_generation_loaded_bytes", {"slot": "chat", "generation": "4"}, 10 << 20),
        ("tensormem_rt_client_deadline_misses_total", {"client": "3"}, 3),
        ("tensormem_rt_deadline_misses_total", {}, 8),
        ("tensormem_pressure_reliefs_total", {}, 5),
        ("tensormem_pressure_level", {}, 1),
        ("tensormem_pressure_given_bytes_total", {"step": "chunks"}, 10 << 20),
        ("tensormem_pressure_steps_total", {"step": "oom"}, 0),
        ("tensormem_bandwidth_moved_bytes_total", {"pool": "kv"}, 3 << 20),
        ("tensormem_bandwidth_period_seconds", {}, 0.001),
        ("tensormem_core_excess_total", {"core": "0"}, 3),
        ("tensormem_core_held_seconds_total", {"core": "0"}, 0.0025),
        # what this package knows no names for
        ("tensormem_novelty_depth", {}, 7),
        ("tensormem_novelty_depth_each", {"part": "part"}, 8),
    ):  # fmt: skip
        assert value(found, name, **labels) == pytest.approx(expected), name


def test_names_follow_the_conventions(root: Path) -> None:
    for name in ("total", "Odd-name", "count"):
        (root / "novelty" / name).write_text("1\n")
    for found in (families(text(root)), openmetrics(root)):
        assert len(found) > 60
        for family in found.values():
            assert re.fullmatch(r"tensormem_[a-z0-9_]+", family.name)
            assert family.documentation.endswith(".")
            assert family.type in ("gauge", "counter", "histogram", "unknown")
            for each in family.samples:
                assert each.name.endswith("_total") == (family.type == "counter"), each.name
                assert each.value >= 0
            units = re.findall(r"(chunks|pages|kib|mib|_ns|_us|_ms)\Z", family.name)
            assert not units or family.type == "unknown", "bytes and seconds"
            keys = [(each.name, tuple(sorted(each.labels.items()))) for each in family.samples]
            assert len(keys) == len(set(keys)), "each series once"


def openmetrics(root: Path) -> dict[str, Metric]:
    exposition: bytes = write_openmetrics(metrics.registry(root, root.parent / "proc"))
    return {family.name: family for family in read_openmetrics(exposition.decode())}


def test_histogram(root: Path) -> None:
    found = families(text(root))["tensormem_rt_request_duration_seconds"]
    buckets = {float(each.labels["le"]): each.value for each in found.samples}
    assert found.type == "histogram"
    assert buckets[float("inf")] == sum(LATENCY) == 100
    ordered = [buckets[bound] for bound in sorted(buckets)]
    assert ordered == sorted(ordered)
    # 90 of 700 ns, 8 of 3000, 2 of 40000
    assert buckets[1.024e-06] == 90
    assert buckets[4.096e-06] == 98
    assert buckets[6.5536e-05] == 100
    assert buckets[5.12e-07] == 0
    assert min(buckets) == 5.12e-07


def test_without_the_module(tmp_path: Path) -> None:
    assert families(text(tmp_path / "nothing")).keys() == {"tensormem_up"}
    assert "tensormem_up 0.0" in text(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("9843", ("127.0.0.1", 9843)),
        (":9843", ("127.0.0.1", 9843)),
        ("0.0.0.0:1", ("0.0.0.0", 1)),
        ("[::1]:65535", ("::1", 65535)),
        ("board.example:80", ("board.example", 80)),
    ],
)
def test_addresses(given: str, expected: tuple[str, int]) -> None:
    assert metrics.address(given) == expected


@pytest.mark.parametrize(
    "given", ["", "x", "0", "65536", "999999", "1.2.3.4", "::1:80", "[::1]", "a:b:80", "80:", "-1",
              "[1]2:80", "\uff11\uff12"],
)  # fmt: skip
def test_bad_addresses(run: Callable[..., Result], given: str) -> None:
    with pytest.raises(errors.InvalidArgument, match="no address to listen on"):
        metrics.address(given)
    result = run(f"--listen={given}")
    assert result.exit_code == 1
    assert "127.0.0.1:9843" in result.stderr


def test_wrong_usage(run: Callable[..., Result], tmp_path: Path) -> None:
    assert run().exit_code == 2
    assert run("--listen", "9843", "--textfile", tmp_path / "a.prom").exit_code == 2
    assert not (tmp_path / "a.prom").exists()


def test_address_in_use(run: Callable[..., Result]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("--listen", port)
    assert result.exit_code == 1
    assert f"cannot listen on 127.0.0.1:{port}" in result.stderr
    assert "in use" in result.stderr
    assert result.stderr.count("\n") == 1
    # of a block for documentation: nobody's
    result = run("--listen", "192.0.2.1:9843")
    assert result.exit_code == 1
    assert "cannot listen on 192.0.2.1:9843" in result.stderr


def test_textfile(run: Callable[..., Result], root: Path, tmp_path: Path) -> None:
    path = tmp_path / "tensormem.prom"
    path.write_text("old\n")
    old = path.stat().st_ino
    assert run("--textfile", path).exit_code == 0
    assert families(path.read_text()).keys() == families(text(root)).keys()
    assert path.stat().st_ino != old, "another file took its name: no reader saw half of one"
    assert [p.name for p in tmp_path.iterdir() if "prom" in p.name] == ["tensormem.prom"]
    assert run("--textfile", tmp_path / "tensormem.txt").exit_code == 1
    result = run("--textfile", tmp_path / "missing" / "a.prom", "--json")
    assert result.exit_code == 1
    assert "No such file" in result.stdout


@pytest.fixture
def server(root: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "tensormem", "export", "--listen", str(port)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHONPATH": str(SRC), "PYTHONUNBUFFERED": "1",
             "TENSORMEM_SYSFS": str(root), "TENSORMEM_PROC": str(root.parent / "proc")},
    )  # fmt: skip
    assert process.stdout is not None
    url = process.stdout.readline().removeprefix("listening: ").strip()
    assert url.split("/")[2:] == [f"127.0.0.1:{port}", "metrics"]
    yield process, url
    process.kill()
    process.wait()
    process.stdout.close()


def get(url: str) -> dict[str, Metric]:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return families(answer.read().decode())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_scrapes(server: tuple[subprocess.Popen[str], str], root: Path, number: int) -> None:
    process, url = server
    assert value(get(url), "tensormem_clients") == 2
    (root / "clients" / "count").write_text("5\n")
    assert value(get(url), "tensormem_clients") == 5, "read when it is asked for"
    found: list[dict[str, Metric]] = []
    threads = [threading.Thread(target=lambda: found.append(get(url))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    root.rename(root.with_name("gone"))
    assert value(get(url), "tensormem_up") == 0
    root.with_name("gone").rename(root)
    assert value(get(url), "tensormem_up") == 1
    process.send_signal(number)
    assert process.wait(60) == 0


def test_without_the_library() -> None:
    code = ("import sys; sys.modules['prometheus_client'] = None;"
            " from tensormem.cli import main; main()")  # fmt: skip
    result = subprocess.run(
        [sys.executable, "-c", code, "export", "--listen", "1"], capture_output=True, text=True,
        check=False, env={**os.environ, "PYTHONPATH": str(SRC)},
    )  # fmt: skip
    assert result.returncode == 1
    assert "python3-prometheus-client" in result.stderr
    assert "Traceback" not in result.stderr
