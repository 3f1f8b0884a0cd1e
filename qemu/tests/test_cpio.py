# SPDX-License-Identifier: MIT
"""The cpio writer, judged by cpio itself."""

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from tmguest import cpio

needs_cpio = pytest.mark.skipif(shutil.which("cpio") is None, reason="cpio is not installed")


def listing(archive: bytes) -> list[str]:
    result = subprocess.run(["cpio", "-t", "--quiet"], input=archive, capture_output=True, check=True)
    return result.stdout.decode().splitlines()


@needs_cpio
def test_parents_come_first_and_once() -> None:
    archive = cpio.archive([cpio.file("a/b/c", b"1"), cpio.file("a/d", b""), cpio.directory("a")])
    assert listing(archive) == ["a", "a/b", "a/b/c", "a/d"]


@needs_cpio
def test_unpacked_tree_is_the_packed_one(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep/er").mkdir(parents=True)
    (source / "__pycache__").mkdir()
    (source / "__pycache__/x.pyc").write_bytes(b"no")
    (source / "deep/er/data").write_bytes(os.urandom(5001))
    (source / "run").write_text("#!/bin/sh\n")
    (source / "run").chmod(0o755)
    (source / "link").symlink_to("deep/er/data")
    archive = cpio.archive(cpio.tree(source, "top", lambda path: path.name == "__pycache__"))
    target = tmp_path / "target"
    target.mkdir()
    subprocess.run(["cpio", "-i", "--quiet", "-d"], input=archive, cwd=target, check=True)
    assert (target / "top/deep/er/data").read_bytes() == (source / "deep/er/data").read_bytes()
    assert stat.S_IMODE((target / "top/run").stat().st_mode) == 0o755
    assert (target / "top/link").readlink() == Path("deep/er/data")
    assert not (target / "top/__pycache__").exists()


@needs_cpio
def test_later_entry_wins_and_archives_can_be_chained() -> None:
    archive = cpio.archive([cpio.file("x", b"old"), cpio.file("x", b"newer")])
    result = subprocess.run(
        ["cpio", "-i", "--quiet", "--to-stdout", "x"],
        input=archive,
        capture_output=True,
        check=True,
    )
    assert result.stdout == b"newer"
    assert len(archive) % 512 == 0
