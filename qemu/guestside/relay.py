# SPDX-License-Identifier: MIT
"""Carry the guest's channels over one serial line, for a board without virtio.

A frame is a line: the channel's name, a space, and what was read in base64.
A file NAME.done tells that a channel ended.
"""

import base64
import pathlib
import sys
import threading
from typing import BinaryIO

CHUNK = 4096
GREETING = b"\ntensormem frames\n"


def carry(folder: pathlib.Path, name: str, line: BinaryIO, lock: threading.Lock) -> None:
    """Send what comes through the FIFO ``name`` until its writers are gone."""
    with (folder / name).open("rb", buffering=0) as source:
        while data := source.read(CHUNK):
            with lock:
                line.write(name.encode() + b" " + base64.b64encode(data) + b"\n")
                line.flush()
    (folder / f"{name}.done").touch()


def main() -> None:
    """Run one thread for each channel."""
    folder = pathlib.Path(sys.argv[1])
    lock = threading.Lock()
    with open(sys.argv[2], "wb") as line:
        line.write(GREETING)
        line.flush()
        threads = [
            threading.Thread(target=carry, args=(folder, name, line, lock)) for name in ("stdout", "stderr", "result")
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


main()
