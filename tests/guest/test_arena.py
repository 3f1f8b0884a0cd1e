# SPDX-License-Identifier: MIT
"""The arena on the module's memory: one tensor, however many rounds."""

from __future__ import annotations

import numpy as np
import pytest

import tensormem
from device import CHUNK, PAGE, read


@pytest.mark.parametrize("size", [8 * PAGE, CHUNK + PAGE])
def test_rounds_and_scopes(size: int) -> None:
    with tensormem.open() as client:
        arena = client.arena(size, poison=True)
        held = read("clients/bytes")
        assert size <= held <= size + CHUNK
        for number in range(3):
            arena.reset()
            first = arena.empty(size // 8, np.uint8)
            # zero at first, then what the round before has left
            assert set(first.tolist()) == {0xFF if number else 0}
            first[:] = number
            with arena.scope():
                inner = arena.empty((size // 2,), np.uint8)
                inner[:] = 7
                with arena.scope(), pytest.raises(tensormem.ArenaFull):
                    arena.empty(size, np.uint8)
            again = arena.empty((size // 2,), np.uint8)
            assert again.ctypes.data == inner.ctypes.data
            assert set(again[:: PAGE // 2].tolist()) == {0xFF}
            assert set(first.tolist()) == {number}
            assert (read("clients/tensors"), read("clients/bytes")) == (1, held)
        assert arena.peak >= size // 8 + size // 2
        arena.close()
        del first, inner, again
        assert read("clients/tensors") == read("clients/bytes") == 0
