# SPDX-License-Identifier: MIT
"""What the package carries from the rest of the project; all else is in pyproject.toml."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

HERE = Path(__file__).resolve().parent
#: Where ``tensormem.shared`` finds it.
SHARE = "tensormem/share"
TREE = {"bpf": "bpf", "include": "kmod/include/uapi"}
WANTED = ("*.py", "*.h")


def carry(into: Path) -> None:
    """Copy it from the project's tree, or from where an sdist has it."""
    for name, place in TREE.items():
        source = HERE / "src" / SHARE / name
        if not source.exists():
            source = HERE.parent / place
        if not source.exists():
            raise SystemExit(f"{source} is missing: build from the tree, or from an sdist")
        for path in (found for kind in WANTED for found in source.rglob(kind)):
            target = into / name / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


class Build(build_py):
    """Also what is shared."""

    def run(self) -> None:
        """Build; an editable install runs from the tree and takes it from there."""
        super().run()
        if not self.editable_mode:
            carry(Path(self.build_lib) / SHARE)


class Source(sdist):
    """An sdist that can be built without the tree."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        """Copy the files."""
        super().make_release_tree(base_dir, files)
        carry(Path(base_dir) / "src" / SHARE)


setup(cmdclass={"build_py": Build, "sdist": Source})
