# SPDX-License-Identifier: MIT
"""Load, allocate, map, verify, free: what must work on every kernel and board.

Needs nothing but Python, so that it also runs where there is little else.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from device import CHUNK, PAGE, SYSFS, Raw, read
from tensormem import abi


def main() -> None:
    passed = 0
    with Raw() as client:
        info = client.info()
        assert info.page_size == PAGE == os.sysconf("SC_PAGE_SIZE")
        window = client.map_window()
        for kind in abi.Kind:
            for size in (1, PAGE, 3 * PAGE + 1, CHUNK // 2, CHUNK, CHUNK + PAGE):
                item = client.alloc(size, kind)
                end = item.offset + size
                assert window[item.offset : end] == bytes(size)
                pattern = os.urandom(size)
                window[item.offset : end] = pattern
                own = client.map_tensor(item)
                assert own[:size] == pattern
                own.close()
                assert client.free(item.handle) == 0
                passed += 1
        items = client.alloc_batch([PAGE] * 100)[2]
        assert client.free_batch([item.handle for item in items])[0] == 0
        window.close()
        assert client.info().used == 0
    assert read("clients/count") == read("clients/tensors") == read("buddy/used_pages") == 0
    print(
        f"smoke: {passed} tensors on {platform.release()}, {PAGE // 1024}K pages,"
        f" {os.cpu_count()} CPUs, {read('chunk/capacity')} chunks of capacity"
        f" ({len(list(SYSFS.iterdir()))} entries in sysfs)"
    )


if __name__ == "__main__":
    main()
