# SPDX-License-Identifier: MIT
"""The store survives interruption, and artefacts are made once."""

import threading
from pathlib import Path

import pytest

from tmguest import store


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_made_once_for_each_key() -> None:
    made: list[str] = []

    def build(path: Path) -> None:
        made.append(path.name)
        (path / "x").write_text("x")

    first = store.get("thing", {"v": 1}, build)
    assert store.get("thing", {"v": 1}, build) == first
    assert store.get("thing", {"v": 2}, build) != first
    assert len(made) == 2


def test_interrupted_build_leaves_nothing() -> None:
    def interrupted(path: Path) -> None:
        (path / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.get("thing", 1, interrupted)
    assert not store.location("thing", 1).exists()


def test_killed_build_is_started_over() -> None:
    partial = store.location("thing", 1).with_name(store.location("thing", 1).name + ".partial")
    partial.mkdir(parents=True)
    (partial / "half").write_text("x")
    path = store.get("thing", 1, lambda empty: (empty / "whole").touch())
    assert sorted(one.name for one in path.iterdir()) == ["made-from.json", "whole"]


def test_two_builders_make_one() -> None:
    made: list[Path] = []
    inside = threading.Event()

    def build(path: Path) -> None:
        made.append(path)
        inside.wait(0.2)

    threads = [threading.Thread(target=store.get, args=("thing", 1, build)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
