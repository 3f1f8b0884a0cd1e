# SPDX-License-Identifier: MIT
"""What an installed package carries of the rest of the project, and that it works from there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tensormem import tracehist
from tensormem.shared import shared

PYCTL = Path(__file__).parents[1]


def setup(source: Path, *arguments: str) -> None:
    """Run a command of setup.py, without a trace in the tree."""
    subprocess.run([sys.executable, "setup.py", "-q", *arguments], cwd=source, check=True)


def build(source: Path, into: Path) -> Path:
    into.mkdir()
    setup(source, "egg_info", "-e", str(into), "build_py", "-d", str(into / "lib"))
    return into / "lib"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a wheel is made of."""
    return build(PYCTL, tmp_path_factory.mktemp("build") / "tree")


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix in (".py", ".h")
    }


def run(installed: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python that has nothing but the installed package."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TENSORMEM", "PYTHON"))}
    environment = {**kept, "PYTHONPATH": str(installed), "XDG_CACHE_HOME": str(installed / "cache")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=installed, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_from_the_tree() -> None:
    assert {path.stem for path in shared("bpf").glob("tm*.py")} == {*tracehist.MONITORS, "tmbpf"}
    assert (shared("include") / "linux/tensormem.h").exists()


def test_an_installed_package_carries_the_same(installed: Path) -> None:
    share = installed / "tensormem/share"
    for name in ("bpf", "include"):
        assert files(share / name) == files(shared(name))
    assert (installed / "tensormem/allocators.c").exists()
    told = run(installed, "-c", "from tensormem.shared import shared as s; print(s('bpf'))")
    assert told.stdout == f"{share / 'bpf'}\n"


@pytest.mark.parametrize("name", tracehist.MONITORS)
def test_an_installed_package_runs_the_tools(installed: Path, name: str) -> None:
    told = run(installed, "-m", "tensormem", "monitor", name, "-h")
    assert (told.returncode, told.stderr) == (0, "")
    assert told.stdout.startswith(f"usage: {name} ")


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no compiler")
def test_an_installed_package_builds_its_benchmark(installed: Path) -> None:
    told = run(installed, "-c", "from tensormem import allocators as a; print(a.program())")
    assert told.returncode == 0, told.stderr
    assert Path(told.stdout.strip()).parent == installed / "cache/tensormem"


def test_an_sdist_has_all_to_build_from(tmp_path: Path, installed: Path) -> None:
    (tmp_path / "egg").mkdir()
    setup(PYCTL, "egg_info", "-e", str(tmp_path / "egg"), "sdist", "-d", str(tmp_path / "dist"))
    (archive,) = (tmp_path / "dist").iterdir()
    (tmp_path / "unpacked").mkdir()
    subprocess.run(["tar", "-xf", archive, "-C", tmp_path / "unpacked"], check=True)
    (source,) = (tmp_path / "unpacked").iterdir()
    again = build(source, tmp_path / "again") / "tensormem"
    expected = files(installed / "tensormem")
    assert files(again) == {k: v for k, v in expected.items() if not k.startswith("cache")}
