# SPDX-License-Identifier: MIT
"""Arenas: what they give, take back and refuse."""

from __future__ import annotations

import gc
import itertools
import os
import random
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fake import LINE, FakeDevice
from tensormem import Client, errors


def span(array: npt.NDArray[Any]) -> tuple[int, int]:
    begin = int(array.__array_interface__["data"][0])
    return begin, begin + array.nbytes


@pytest.mark.parametrize("dtype", [np.float16, np.float32, "i1", np.dtype("u8"), "<c8"])
@pytest.mark.parametrize("shape", [7, (3, 5), (2, 1, 4), (), [6, 2], 0, (0, 3)])
def test_an_array_is_what_was_asked_for(client: Client, shape: Any, dtype: Any) -> None:
    with client.arena(1 << 16) as arena:
        arena.empty(3, np.uint8)
        for _ in range(2):
            array = arena.empty(shape, dtype)
            assert array.shape == np.empty(shape).shape
            assert array.dtype == np.dtype(dtype)
            assert array.flags.c_contiguous
            assert array.flags.writeable
            assert span(array)[0] % LINE == 0
            assert not array.any()
            array[...] = 1


def test_it_lies_in_one_activations_tensor(client: Client, device: FakeDevice) -> None:
    with client.arena(1 << 16) as arena:
        first, second = arena.empty(100, np.uint8), arena.empty(100, np.uint8)
        (tensor,) = client.tensors()
        assert (tensor.kind, tensor.size) == ("activations", 1 << 16)
        first[:], second[:] = 1, 2
        data = os.pread(device.fd, 228, tensor.offset)
        assert data[:100] == b"\1" * 100
        assert data[128:228] == b"\2" * 100
        assert (arena.used, arena.peak, arena.size) == (228, 228, 1 << 16)


def test_a_round_like_the_last_gets_the_same_arrays(client: Client) -> None:
    with client.arena(1 << 16) as arena:

        def round_() -> list[npt.NDArray[Any]]:
            return [arena.empty((3, 4)), arena.empty(5, np.float16), arena.empty((), np.int64)]

        first = round_()
        arena.reset()
        assert arena.used == 0
        assert all(a is b for a, b in zip(first, round_(), strict=True))
        arena.reset()
        assert arena.empty((3, 4)) is first[0]
        other = arena.empty(5, np.float32)
        assert other.dtype == np.float32
        assert span(other)[0] == span(first[1])[0]
        assert arena.empty((), np.int64) is not first[2]


@pytest.mark.parametrize("shape", [3.0, True, (3.0,), np.array([3]), "3", None, -3, (3, -1), b"3"])
def test_a_shape_that_only_looks_equal(client: Client, shape: Any) -> None:
    """The remembered ones are compared first; what is refused without them is refused with them."""
    with client.arena(4096) as arena:
        arena.empty(1)
        arena.reset()
        if shape is True:
            assert arena.empty(shape).shape == (1,)
            return
        for remembered in (3, (3,)):
            arena.empty(remembered)
            arena.reset()
            if shape == (3.0,) and remembered == (3,):
                continue  # equal in all that an array has
            with pytest.raises(errors.InvalidArgument):
                arena.empty(shape)
            assert arena.used == 0


def test_a_list_that_was_changed(client: Client) -> None:
    with client.arena(4096) as arena:
        shape = [2, 3]
        arena.empty(shape)
        arena.reset()
        shape[0] = 4
        assert arena.empty(shape).shape == (4, 3)


@pytest.mark.parametrize("dtype", [object, "nonsense", "V0", [("a", "O")]])
def test_a_dtype_without_bytes(client: Client, dtype: Any) -> None:
    with client.arena(4096) as arena, pytest.raises(errors.InvalidArgument):
        arena.empty(1, dtype)


@pytest.mark.parametrize("kind", ["weights", "kv", "protocol", "", None])
def test_a_kind_that_it_has_not(client: Client, kind: Any) -> None:
    with client.arena(4096) as arena:
        for _ in range(2):
            with pytest.raises(errors.InvalidArgument, match="from the client"):
                arena.empty(1, kind=kind)
            arena.empty(1)
            arena.reset()


def test_when_it_is_full(client: Client) -> None:
    with client.arena(200) as arena:
        kept = arena.empty(100, np.uint8)
        kept[:] = 5
        with pytest.raises(errors.ArenaFull, match="73 B") as caught:
            arena.empty(73, np.uint8)
        assert isinstance(caught.value, MemoryError)
        assert "larger arena" in caught.value.remedy
        assert arena.used == 100
        assert (kept == 5).all()
        assert arena.empty(72, np.uint8).nbytes == 72
        assert arena.peak == 200
        with pytest.raises(errors.ArenaFull):
            arena.empty(1 << 62)


def test_scopes_nest(client: Client) -> None:
    with client.arena(1 << 12) as arena:
        outer = arena.empty(16, np.uint8)
        with arena.scope() as same:
            assert same is arena
            a = arena.empty(16, np.uint8)
            with arena.scope():
                b = arena.empty(16, np.uint8)
                assert arena.used == 2 * LINE + 16
            assert arena.used == LINE + 16
            c = arena.empty(16, np.uint8)
            assert c is b  # the same was asked for at the same place
            with pytest.raises(errors.Busy):
                arena.reset()
        assert arena.used == 16
        d = arena.empty(32, np.uint8)
        assert span(d)[0] == span(a)[0]
        assert arena.peak == 2 * LINE + 16
        outer[:] = 1
        arena.reset()


def test_a_scope_ends_with_an_error_too(client: Client) -> None:
    with client.arena(4096) as arena:
        with pytest.raises(errors.ArenaFull), arena.scope():
            arena.empty(4096 + arena.empty(9).ndim)
        assert arena.used == 0
        arena.reset()


def test_scopes_out_of_order(client: Client) -> None:
    with client.arena(4096) as arena:
        outer, inner = arena.scope(), arena.scope()
        outer.__enter__()
        inner.__enter__()
        arena.empty(4)
        with pytest.raises(errors.InvalidArgument, match="innermost"):
            outer.__exit__(None, None, None)
        assert arena.used == 16
        inner.__exit__(None, None, None)
        with pytest.raises(errors.InvalidArgument, match="before"):
            inner.__enter__()
        outer.__exit__(None, None, None)
        arena.reset()


def test_poison_shows_who_reads_too_late(client: Client) -> None:
    with client.arena(4096, poison=True) as arena:
        kept = arena.empty(8)
        kept[:] = 1
        with arena.scope():
            late = arena.empty(8)
            late[:] = 2
        assert np.isnan(late).all()
        assert (kept == 1).all()
        arena.reset()
        assert np.isnan(kept).all()


def test_arrays_outlive_the_arena(client: Client) -> None:
    arena = client.arena(4096)
    array = arena.empty(8)
    array[:] = 3
    arena.close()
    arena.close()
    assert (array == 3).all()
    for call in (arena.reset, lambda: arena.empty(8), lambda: arena.scope().__enter__()):
        with pytest.raises(errors.Closed):
            call()
    assert "closed" in repr(arena)
    assert client.stats().lingering == 1
    del array
    gc.collect()
    assert client.stats().tensors == 0


def test_an_arena_that_is_dropped(client: Client) -> None:
    client.arena(4096).empty(8)
    gc.collect()
    assert client.stats().tensors == 0


@pytest.mark.parametrize("size", [0, -1, "4096", 1.5])
def test_a_size_that_is_none(client: Client, size: Any) -> None:
    with pytest.raises(errors.InvalidArgument):
        client.arena(size)


def test_a_child_has_none(client: Client) -> None:
    with client.arena(4096, poison=True) as arena:
        scope = arena.scope()
        scope.__enter__()
        kept = arena.empty(4, "u1")
        kept[:] = 7
        with arena.scope():
            arena.empty(4)  # which the next one would find again
        pid = os.fork()
        if pid == 0:
            refused = 0
            scope.__exit__(None, None, None)  # takes nothing back
            for call in (arena.reset, arena.scope().__enter__, lambda: arena.empty(4), arena.close):
                try:
                    call()
                except errors.NotPermitted:
                    refused += 1
            os._exit(refused)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 4
        assert (kept == 7).all()
        scope.__exit__(None, None, None)


@pytest.mark.parametrize("seed", range(20))
def test_random_programs(client: Client, seed: int) -> None:
    """Against a stack of lists: living arrays keep their contents and share no byte."""
    rng = random.Random(seed)
    size = rng.choice([1 << 10, 1 << 14])
    dtypes: list[Any] = [np.uint8, np.float16, np.float32, "f8"]
    with client.arena(size) as arena:
        scopes: list[tuple[Any, int]] = []
        living: list[tuple[npt.NDArray[Any], int]] = []
        peak = full = replayed = 0
        seen: set[int] = set()
        for step in range(400):
            what = rng.random()
            if what < 0.7:
                shape: Any = rng.choice([rng.randrange(40), (rng.randrange(1, 4), 5)])
                dtype = rng.choice(dtypes)
                begin = -(-arena.used // LINE) * LINE
                need = int(np.prod(shape)) * np.dtype(dtype).itemsize
                if begin + need > size:
                    full += 1
                    with pytest.raises(errors.ArenaFull):
                        arena.empty(shape, dtype)
                    continue
                array = arena.empty(shape, dtype)
                assert array.shape == np.empty(shape).shape
                assert array.dtype == np.dtype(dtype)
                assert arena.used == begin + need
                replayed += id(array) in seen
                seen.add(id(array))
                array.view(np.uint8)[...] = step & 0xFF
                living.append((array, step & 0xFF))
                peak = max(peak, arena.used)
            elif what < 0.82:
                scope = arena.scope()
                scope.__enter__()
                scopes.append((scope, len(living)))
            elif scopes:
                scope, count = scopes.pop()
                scope.__exit__(None, None, None)
                del living[count:]
            else:
                arena.reset()
                living.clear()
            assert arena.peak == peak
            for array, value in living:
                assert (array.view(np.uint8) == value).all()
            spans = sorted(span(a) for a, _ in living if a.nbytes)
            assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
        assert full or size > 1 << 10
        assert replayed
        while scopes:
            scopes.pop()[0].__exit__(None, None, None)
