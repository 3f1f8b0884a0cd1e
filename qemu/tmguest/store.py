# SPDX-License-Identifier: MIT
"""The artefact store: directories made once, keyed by what they are made from.

An artefact is built in ``<name>-<key>.partial`` and renamed when it is whole, under a lock, so that neither an
interrupted build nor two builders at once can leave a half-made one behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from . import paths
from .log import say


def key_of(material: object) -> str:
    """A short hash over any JSON-able description of what an artefact is made from."""
    text = json.dumps(material, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextlib.contextmanager
def locked(lock: Path, what: str) -> Iterator[None]:
    """Hold ``lock`` exclusively; says on stderr that it waits when someone else has it."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that makes {what}")
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def location(name: str, material: object) -> Path:
    """Where the artefact is, or would be."""
    return paths.cache_dir() / "store" / f"{name}-{key_of(material)}"


def get(name: str, material: object, build: Callable[[Path], None]) -> Path:
    """Return the artefact's directory; ``build`` fills an empty directory if there is none yet.

    Whatever ``build`` raises passes through, and nothing is left in the store.
    """
    final = location(name, material)
    if final.is_dir():
        return final
    with locked(paths.cache_dir() / "locks" / f"{final.name}.lock", name):
        if final.is_dir():
            return final
        partial = final.with_name(final.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            build(partial)
            (partial / "made-from.json").write_text(json.dumps(material, indent=1, sort_keys=True) + "\n")
            partial.rename(final)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return final
