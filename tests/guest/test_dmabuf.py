# SPDX-License-Identifier: MIT
"""Tensors as dma-bufs: the same memory, for as long as anybody has it, whoever has ended by then."""

from __future__ import annotations

import errno

import pytest

from device import CHUNK, PAGE, Raw, read
from tensormem import abi


@pytest.mark.parametrize("size", [1, PAGE, 3 * PAGE + 1, CHUNK, 3 * CHUNK + 5 * PAGE])
def test_it_is_the_same_memory(raw: Raw, size: int) -> None:
    item = raw.alloc(size, pool=0 if size >= PAGE else abi.Pool.BUDDY)
    with raw.export(item.handle) as shared:
        assert shared.size == -(-size // PAGE) * PAGE
        assert (read("dma/buffers"), read("dma/attachments")) == (1, 0)
        assert read("dma/bytes") == shared.size
        window, view = raw.map_tensor(item), shared.view()
        for at in {0, size // 2, size - 1}:
            window[at] = 0x5A
            assert view[at] == 0x5A
            view[at] = 0xA5
            assert window[at] == 0xA5
        window.close()
        view.close()
    assert read("dma/buffers") == 0
    assert raw.free(item.handle) == 0
    assert raw.free(item.handle) == errno.ENOENT
