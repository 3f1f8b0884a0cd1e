# SPDX-License-Identifier: MIT
"""Lifetime, sharing and errors of clients, on a device that is a memfd."""

from __future__ import annotations

import errno
import gc
import os
import random
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fake import CHUNK, PAGE, POISON, WINDOW, FakeDevice
from tensormem import Client, Kind, Pool, Spec, Tensor, abi, errors

HERE = Path(__file__).parent


def address(array: npt.NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


# -- arrays --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int8, np.uint64, np.bool_, "<c8"])
@pytest.mark.parametrize("shape", [7, (3, 5), (2, 1, 4), (), [6]])
def test_array_has_shape_dtype_zeros_and_is_writable(
    client: Client, shape: Any, dtype: npt.DTypeLike
) -> None:
    array = client.empty(shape, dtype)
    assert array.shape == np.empty(shape).shape
    assert array.dtype == np.dtype(dtype)
    assert array.flags.c_contiguous
    assert array.flags.writeable
    assert array.flags.aligned
    assert not array.any()
    array[...] = 1
    assert (array == 1).all()


def test_array_is_the_mapping_and_not_a_copy(client: Client, device: FakeDevice) -> None:
    array = client.empty(1000, np.uint8, kind="kv")
    array[:] = np.arange(1000) % 251
    info = client.query(array)
    assert os.pread(device.fd, 1000, info.offset) == array.tobytes()
    os.pwrite(device.fd, b"seen", info.offset + 10)
    assert array[10:14].tobytes() == b"seen"


def test_kind_and_pool_reach_the_kernel(client: Client) -> None:
    a = client.empty(10, kind="weights", pool="chunk")
    b = client.zeros(10, kind=Kind.PROTOCOL, pool=Pool.BUDDY)
    c = client.empty(CHUNK + 1, np.int8, "kv")
    d = client.empty(1)
    e = client.empty(3, kind="kv", pool="slab")
    infos = [client.query(x) for x in (a, b, c, d, e)]
    assert [(i.kind, i.pool) for i in infos] == [
        ("weights", "chunk"),
        ("protocol", "buddy"),
        ("kv", "chunk"),
        ("activations", "slab"),
        ("kv", "slab"),
    ]
    assert [i.size for i in infos] == [40, 40, CHUNK + 1, 4, 12]
    assert [i.length for i in infos] == [CHUNK, PAGE, CHUNK + PAGE, 8, 16]
    assert [(i.chunks, i.runs) for i in infos] == [(1, 0), (0, 1), (1, 1), (0, 0), (0, 0)]
    assert [i.mapping for i in infos] == ["block", "pages", "pages", "pages", "pages"]
    assert len({i.handle for i in infos}) == 5
    assert client.tensors() == infos


@pytest.mark.parametrize(
    ("kwargs", "flags", "numa", "nodes"),
    [
        ({}, 0, 0, 0),
        ({"huge": True}, abi.AllocFlag.HUGE, 0, 0),
        ({"huge": False}, abi.AllocFlag.PAGED, 0, 0),
        ({"reuse": True}, abi.AllocFlag.NOZERO, 0, 0),
        ({"pinned": True}, abi.AllocFlag.PINNED, 0, 0),
        ({"numa": "local"}, 0, abi.Numa.LOCAL, 0),
        ({"numa": "interleave"}, 0, abi.Numa.INTERLEAVE, 0),
        ({"numa": [1]}, 0, abi.Numa.BIND, 0b10),
        ({"numa": (0, np.int64(1))}, 0, abi.Numa.BIND, 0b11),
        ({"numa": range(2)}, 0, abi.Numa.BIND, 0b11),
        ({"numa": ("interleave", [0])}, 0, abi.Numa.INTERLEAVE, 0b01),
        (
            {"huge": True, "reuse": True, "pinned": True, "numa": [0]},
            abi.AllocFlag.HUGE | abi.AllocFlag.NOZERO | abi.AllocFlag.PINNED,
            abi.Numa.BIND,
            0b01,
        ),
    ],
)
def test_choices_reach_the_kernel_by_every_way(
    client: Client, device: FakeDevice, kwargs: dict[str, Any], flags: int, numa: int, nodes: int
) -> None:
    keep: list[Any] = [
        client.empty(9, **kwargs),
        client.zeros(9, **kwargs),
        client.alloc(9, **kwargs),
        *client.alloc_many([9, 9], **kwargs),
        *client.empty_many([Spec(9, **kwargs), Spec(9)]),
    ]
    seen = [(a.flags, a.numa, a.nodes) for a in device.allocs]
    assert seen == [(flags, numa, nodes)] * 6 + [(0, 0, 0)]
    info = client.query(keep[0])
    expected = (kwargs.get("huge"), "reuse" in kwargs, "pinned" in kwargs)
    assert (info.huge, info.reuse, info.pinned) == expected


@pytest.mark.parametrize("mapping", abi.Mapping)
def test_mapping_is_what_the_kernel_says(mapping: abi.Mapping) -> None:
    with Client(FakeDevice(mapping=mapping)) as client:
        arrays = [
            client.empty(CHUNK, np.uint8, "weights"),
            client.empty(CHUNK, np.uint8, "weights", huge=False),
            client.empty(CHUNK, np.uint8, "kv", huge=True),
            client.empty(CHUNK, np.uint8, "kv"),
        ]
        name = mapping.name.lower()
        assert [client.query(a).mapping for a in arrays] == [name, "pages", name, "pages"]


def test_reuse(client: Client, device: FakeDevice) -> None:
    a = client.empty(PAGE, np.uint8, reuse=True)
    assert not a.any()
    a[:] = 7
    offset = client.query(a).offset
    del a
    stats = client.stats()
    assert (stats.used, stats.kept, stats.tensors) == (PAGE, PAGE, 0)
    other = [
        client.empty(PAGE, np.uint8),
        client.empty(2 * PAGE, np.uint8, reuse=True),
        client.empty(PAGE, np.uint8, "kv", reuse=True),
        client.empty(PAGE, np.uint8, pool="buddy", reuse=True),
        client.empty(PAGE, np.uint8, reuse=True, numa="local"),
    ]
    assert not any(x.any() for x in other)
    b = client.empty(PAGE, np.uint8, reuse=True)
    assert client.query(b).offset == offset
    assert (b == 7).all()
    assert client.stats().kept == 0
    del b
    c = client.zeros((2, PAGE // 4), np.int16, reuse=True)
    assert client.query(c).offset == offset
    assert not c.any()
    c[:] = 1
    scalar = client.zeros((), np.float64, reuse=True)
    assert scalar == 0
    assert client.zeros((3, 0), reuse=True).shape == (3, 0)
    del c
    client.set_quota(client.stats().used)
    assert client.stats().kept == PAGE
    d = client.empty(PAGE, np.uint8)
    assert client.stats().kept == 0, "what is kept gives way to the quota"
    assert not d.any()


def test_pinned_beyond_the_limit() -> None:
    with Client(FakeDevice(memlock=2 * PAGE)) as client:
        keep = client.empty(PAGE, np.uint8, pinned=True)
        with pytest.raises(errors.NotPermitted, match="RLIMIT_MEMLOCK") as info:
            client.empty(PAGE + 1, np.uint8, "kv", pinned=True)
        assert "of kv" in info.value.cause
        for words in ("limits.conf", "LimitMEMLOCK=infinity", "pinned=True"):
            assert words in info.value.remedy
        with pytest.raises(errors.NotPermitted, match=r"item 1, .*RLIMIT_MEMLOCK"):
            client.empty_many([Spec(1), Spec(PAGE + 1, np.uint8, pinned=True)])
        assert client.stats().tensors == 1
        assert client.empty(PAGE + 1, np.uint8).size
        assert keep.size


def test_numa(client: Client, device: FakeDevice) -> None:
    assert client.stats().nodes == (0, 1)
    for value, expected in (
        ("interleave", (abi.Numa.INTERLEAVE, 0)),
        ([1], (abi.Numa.BIND, 2)),
        (("interleave", [0, 1]), (abi.Numa.INTERLEAVE, 3)),
        (None, (abi.Numa.LOCAL, 0)),
        ("local", (abi.Numa.LOCAL, 0)),
    ):
        client.set_numa(value)
        assert device.numa == expected

    def on_one(numa: Any) -> None:
        client.empty(1, numa=numa)

    calls: tuple[Callable[[Any], None], ...] = (client.set_numa, on_one)
    malformed: tuple[Any, ...] = ([], [64], [-1], ["a"], ("local", [0]), ("interleave", []), [1.0])
    for call in calls:
        with pytest.raises(errors.InvalidArgument, match="no pool on nodes 3, 5: use nodes 0, 1"):
            call([1, 3, 5])
        with pytest.raises(errors.InvalidArgument, match="no pool on node 2"):
            call(("interleave", [2]))
        for wrong in ("near", "bind", 1, 1.5, b"1", {0}):
            with pytest.raises(errors.InvalidArgument, match="is not a policy"):
                call(wrong)
        for value in malformed:
            with pytest.raises(errors.InvalidArgument, match="not a list of memory nodes"):
                call(value)
    assert device.numa == (abi.Numa.LOCAL, 0)
    assert not device.tensors
    device.fail[abi.IOC_SET_NUMA] = errno.EINVAL
    with pytest.raises(errors.InvalidArgument, match="malformed"):
        client.set_numa("local")
    device.fail[abi.IOC_SET_NUMA] = errno.ENOTTY
    with pytest.raises(errors.IncompatibleModule):
        client.set_numa("local")
    device.fail[abi.IOC_ALLOC] = errno.ENOSPC
    with pytest.raises(errors.PoolExhausted, match="capacity on node 1: allow more nodes"):
        client.empty(1, numa=[1])
    client.close()
    with pytest.raises(errors.Closed):
        client.set_numa("local")


@pytest.mark.parametrize("whole_window", [True, False])
def test_small_tensors_share_pages(whole_window: bool) -> None:
    device = FakeDevice()
    with Client(device, whole_window=whole_window) as client:
        sizes = [1, 5, 8, 60, 64, 65, 300, 320, 700, PAGE // 2] * 9
        arrays = [client.empty(n, np.uint8) for n in sizes]
        for mark, array in enumerate(arrays, 1):
            assert not array.any()
            array[:] = mark
        infos = [client.query(a) for a in arrays]
        assert {i.pool for i in infos} == {"slab"}
        assert any(i.offset % PAGE for i in infos)
        assert any(i.offset % PAGE + i.size > PAGE for i in infos), "none crosses a page's end"
        assert len({i.offset // PAGE for i in infos}) < len(infos) // 2
        assert client.stats().used < PAGE * len(infos) // 2
        for mark, (array, info) in enumerate(zip(arrays, infos, strict=True), 1):
            assert (array == mark).all(), "another tensor of the slab wrote here"
            assert os.pread(device.fd, info.size, info.offset) == array.tobytes()
        victim = arrays.pop(13)
        client.free(victim)
        assert (victim == 14).all(), "released under an array"
        del victim
        again = client.alloc(60)
        assert again.offset == infos[13].offset
        assert again.offset % PAGE
        again.buffer()[:] = b"x" * 60
        assert (arrays[3] == 4).all()
        assert (arrays[23] == 25).all()
        again.free()
        arrays.clear()
        del array
        assert not device.tensors
        assert client.stats().used == 0


@pytest.mark.parametrize(
    "kwargs", [{"shape": PAGE}, {"shape": 1, "pinned": True}, {"shape": 1, "numa": "local"}]
)
def test_the_slab_says_what_it_does_not_take(client: Client, kwargs: dict[str, Any]) -> None:
    with pytest.raises(errors.InvalidArgument, match="slab takes tensors below a page"):
        client.empty(dtype=np.uint8, pool="slab", **kwargs)
    assert client.query(client.empty(dtype=np.uint8, **kwargs)).pool == "buddy"


def test_the_dma_pool() -> None:
    with Client(FakeDevice(region=2 * CHUNK)) as client:
        array = client.empty(CHUNK + 1, np.uint8, pool="dma", reuse=True)
        assert client.query(array).pool == "dma"
        assert client.stats().used == 2 * CHUNK
        with pytest.raises(errors.PoolExhausted, match="DMA pool's region has no such gap") as full:
            client.empty(1, pool="dma")
        assert "device tree" in full.value.remedy
        with pytest.raises(errors.InvalidArgument, match="region is where it is: leave numa out"):
            client.empty(1, pool=abi.Pool.DMA, numa=[0])
        del array
        assert client.stats().kept == 0
        client.alloc(2 * CHUNK, pool="dma").free()
    with Client(FakeDevice()) as client:
        with pytest.raises(errors.NoDmaPool, match=r"item 1, .*sets no region aside.*docs/dma.md"):
            client.empty_many([Spec(1), Spec(1, pool="dma")])
        assert client.stats().tensors == 0


def test_an_array_without_elements(client: Client) -> None:
    array = client.empty((3, 0), np.float32)
    assert array.shape == (3, 0)
    assert client.query(array).size == 1


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        ({"shape": -1}, "negative"),
        ({"shape": (2, -3)}, "negative"),
        ({"shape": 1.5}, "shape"),
        ({"shape": "12"}, "shape"),
        ({"shape": (2, "x")}, "shape"),
        ({"shape": (1 << 40, 1 << 40)}, "not possible"),
        ({"shape": 1 << 63}, "not possible"),
        ({"shape": WINDOW + 1, "dtype": np.int8}, "malformed"),
        ({"shape": 1, "dtype": object}, "no fixed bytes"),
        ({"shape": 1, "dtype": "nonsense"}, "dtype"),
        ({"shape": 1, "kind": "weight"}, "weights, kv, activations, protocol"),
        ({"shape": 1, "pool": "kv"}, "auto, chunk, buddy, slab"),
        ({"shape": 1, "kind": 2}, "kind"),
    ],
)
def test_bad_arguments(
    client: Client, device: FakeDevice, kwargs: dict[str, Any], word: str
) -> None:
    with pytest.raises(errors.InvalidArgument, match=word) as info:
        client.empty(**kwargs)
    assert isinstance(info.value, ValueError)
    assert info.value.errno == errno.EINVAL
    assert not device.tensors


@pytest.mark.parametrize("size", [0, -1, 1 << 64, "7", 1.0])
def test_bad_sizes(client: Client, size: Any) -> None:
    with pytest.raises(errors.InvalidArgument):
        client.alloc(size)


# -- lifetime --------------------------------------------------------------------


@pytest.mark.parametrize("whole_window", [True, False])
def test_memory_goes_with_the_last_view(whole_window: bool) -> None:
    device = FakeDevice()
    with Client(device, whole_window=whole_window) as client:
        assert client.stats().whole_window is whole_window
        array = client.empty((4, 100), np.int32)
        array[:] = 7
        row = array[2]
        flat = array.reshape(-1)[::3]
        other = row.view(np.uint8)
        raw = memoryview(other)
        assert len(device.tensors) == 1
        del array, row, flat
        assert len(device.tensors) == 1
        del other
        assert len(device.tensors) == 1
        assert bytes(raw[:4]) == b"\7\0\0\0"
        raw.release()
        del raw
        assert not device.tensors


def test_free_while_viewed(client: Client, device: FakeDevice) -> None:
    array = client.empty(100, np.uint8)
    array[:] = 9
    view = array[50:]
    client.free(array)
    assert client.stats().lingering == 1
    del array
    assert len(device.tensors) == 1
    assert (view == 9).all(), "the memory was released under a view"
    with pytest.raises(errors.NoSuchTensor, match="freed"):
        client.free(view)
    with pytest.raises(errors.NoSuchTensor, match="freed"):
        client.query(view)
    del view
    assert not device.tensors
    assert client.stats().lingering == 0


def test_freed_memory_really_is_released(client: Client, device: FakeDevice) -> None:
    # proves that the fake would show a use after free
    offset = client.query(client.empty(PAGE, np.uint8)).offset
    assert os.pread(device.fd, 1, offset) == bytes([POISON])


def test_free_of_what_is_not_ours(client: Client) -> None:
    with Client(FakeDevice()) as stranger:
        foreign = stranger.empty(3)
        for thing in (np.empty(3), foreign, memoryview(b"x"), 7, None):
            with pytest.raises(errors.NoSuchTensor, match="not on memory of this client"):
                client.free(thing)  # type: ignore[arg-type]
        with pytest.raises(errors.NoSuchTensor):
            client.query(foreign)
        assert stranger.stats().lingering == 0


def test_free_finds_the_tensor_behind_any_view(client: Client, device: FakeDevice) -> None:
    for make in (
        lambda a: a[3:],
        lambda a: a.view(np.uint8)[::2],
        lambda a: a.reshape(2, -1).T,
        lambda a: a.data,
        lambda a: np.frombuffer(a.data, np.int16),
        lambda a: np.asarray(memoryview(a)[4:]),
    ):
        array = client.empty(64, np.int32)
        view = make(array)
        assert client.query(view) == client.query(array)
        client.free(view)
        del array, view
        assert not device.tensors


def test_close_with_live_arrays() -> None:
    device = FakeDevice()
    client = Client(device)
    array = client.empty(10, np.int16)
    tensor = client.alloc(5)
    shown = client.alloc(5)
    buffer = shown.buffer()
    client.close()
    client.close()
    assert client.closed
    assert tensor.freed
    assert len(device.tensors) == 2, "the tensor that nothing shows goes at once"
    array[:] = 3
    buffer[0] = 4
    assert array.sum() == 30
    assert device.fd >= 0
    for call in (
        lambda: client.empty(1),
        lambda: client.alloc(1),
        client.stats,
        client.tensors,
        lambda: client.set_quota(1),
    ):
        with pytest.raises(errors.Closed):
            call()
    with pytest.raises(errors.NoSuchTensor):
        shown.buffer()
    with pytest.raises(errors.Closed):
        client.query(array)
    del array
    assert device.fd >= 0
    del buffer
    assert not device.tensors
    assert device.fd == -1, "descriptor closes with the last array"


def test_close_without_arrays_closes_at_once(device: FakeDevice) -> None:
    with Client(device) as client:
        client.empty(3)
    assert device.fd == -1


def test_dropped_client_lives_as_long_as_its_arrays(device: FakeDevice) -> None:
    array = Client(device).empty(10)
    gc.collect()
    assert device.fd >= 0
    array[:] = 1
    assert array.sum() == 10
    del array
    gc.collect()
    assert device.fd == -1
    assert not device.tensors


def test_array_in_a_cycle_is_collected(client: Client, device: FakeDevice) -> None:
    gc.disable()
    try:
        knot: list[Any] = [client.empty(3)]
        knot.append(knot)
        del knot
        assert len(device.tensors) == 1
        gc.collect()
        assert not device.tensors
    finally:
        gc.enable()


def test_finalizer_inside_the_lock_does_not_deadlock(client: Client, device: FakeDevice) -> None:
    array = client.empty(3)
    session = client._session
    with session.locked():
        del array  # what the collector does in the middle of an allocation
        assert len(device.tensors) == 1
    assert not device.tensors


def test_window_is_mapped_once(client: Client, device: FakeDevice) -> None:
    arrays = [client.empty(1000) for _ in range(5)]
    assert device.maps == [(0, WINDOW)]
    base = {address(a) - client.query(a).offset for a in arrays}
    assert len(base) == 1


def test_each_tensor_is_mapped_where_the_window_does_not_fit() -> None:
    device = FakeDevice(window_mapping=False)
    with Client(device) as client:
        assert not client.stats().whole_window
        a, b = client.empty(1000, np.uint8), client.empty(PAGE + 1, np.uint8)
        a[:], b[:] = 1, 2
        assert [length for _, length in device.maps] == [PAGE, 2 * PAGE]
        assert os.pread(device.fd, 1, client.query(b).offset) == b"\2"
        device.fail_map_after = 2
        with pytest.raises(errors.OutOfMemory, match=r"ulimit") as info:
            client.empty_many([Spec(1), Spec(1)])
        assert isinstance(info.value, MemoryError)
        assert len(device.tensors) == 2, "the tensors without a mapping were freed"


def test_open_failures_close_the_device() -> None:
    device = FakeDevice(abi_version=abi.ABI_VERSION + 1)
    with pytest.raises(errors.IncompatibleModule, match="ABI 2"):
        Client(device)
    assert device.fd == -1
    device = FakeDevice()
    device.fail[abi.IOC_INFO] = errno.ENOTTY
    with pytest.raises(errors.IncompatibleModule):
        Client(device)
    assert device.fd == -1


# -- tensors ---------------------------------------------------------------------


def test_tensor(client: Client, device: FakeDevice) -> None:
    with client.alloc(5000, "kv") as tensor:
        assert (tensor.size, tensor.kind, tensor.freed) == (5000, "kv", False)
        info = tensor.info()
        assert (info.handle, info.offset, info.size) == (tensor.handle, tensor.offset, 5000)
        assert client.query(tensor) == info
        buffer = tensor.buffer()
        assert (buffer.nbytes, buffer.format, buffer.readonly) == (5000, "B", False)
        array = tensor.array((2, 3), np.int64)
        array[:] = 1
        assert buffer[8] == 1
        with pytest.raises(errors.InvalidArgument, match="does not fit"):
            tensor.array(5001, np.int8)
        del buffer, array
    assert tensor.freed
    assert not device.tensors
    for call in (tensor.free, tensor.buffer, tensor.info, lambda: client.free(tensor)):
        with pytest.raises(errors.NoSuchTensor, match="freed"):
            call()
    assert "freed" in repr(tensor)


def test_tensor_freed_while_shown(client: Client, device: FakeDevice) -> None:
    tensor = client.alloc(10)
    buffer = tensor.buffer()
    tensor.free()
    buffer[:] = b"0123456789"
    assert bytes(buffer) == b"0123456789"
    with pytest.raises(errors.NoSuchTensor):
        tensor.buffer()
    del buffer
    assert not device.tensors


def test_tensor_dropped_while_shown(client: Client, device: FakeDevice) -> None:
    buffer = client.alloc(10).buffer()
    buffer[0] = 1
    assert len(device.tensors) == 1
    del buffer
    assert not device.tensors
    tensor = client.alloc(10)
    del tensor
    assert not device.tensors


def test_explicit_free_reports_what_the_kernel_says(client: Client, device: FakeDevice) -> None:
    tensor = client.alloc(10)
    device.fail[abi.IOC_FREE] = errno.EINTR
    with pytest.raises(errors.Interrupted):
        tensor.free()


def test_readinto(client: Client, tmp_path: Path) -> None:
    data = random.Random(1).randbytes(3 * PAGE)
    path = tmp_path / "data"
    path.write_bytes(data)
    tensor = client.alloc(len(data))
    with open(path, "rb", buffering=0) as file:
        assert file.readinto(tensor.buffer()) == len(data)
    assert bytes(tensor.buffer()) == data


def test_direct_io(client: Client) -> None:
    data = random.Random(2).randbytes(2 * PAGE)
    with tempfile.NamedTemporaryFile(dir=HERE) as file:
        file.write(data)
        file.flush()
        try:
            fd = os.open(file.name, os.O_RDONLY | os.O_DIRECT)
        except OSError:
            pytest.skip("this file system has no O_DIRECT")
        tensor = client.alloc(len(data))
        assert os.readv(fd, [tensor.buffer()]) == len(data)
        os.close(fd)
    assert bytes(tensor.buffer()) == data


# -- batches ----------------------------------------------------------------------


def test_batch_is_one_call(client: Client, device: FakeDevice) -> None:
    device.calls.clear()
    arrays = client.empty_many(
        [Spec(5), Spec((2, 2), np.int8, "kv"), Spec(CHUNK, np.uint8, "weights", "chunk")]
    )
    assert device.calls == [abi.IOC_ALLOC_BATCH]
    assert [a.shape for a in arrays] == [(5,), (2, 2), (CHUNK,)]
    assert [client.query(a).kind for a in arrays] == ["activations", "kv", "weights"]
    tensors = client.alloc_many([1, 2, 3], "kv")
    device.calls.clear()
    client.free_many(tensors)
    assert device.calls == [abi.IOC_FREE_BATCH]
    assert len(device.tensors) == 3
    assert client.empty_many([]) == []
    client.free_many([])


def test_batch_larger_than_the_kernel_takes(client: Client, device: FakeDevice) -> None:
    device.calls.clear()
    tensors = client.alloc_many(list(range(1, 11)))
    assert device.calls.count(abi.IOC_ALLOC_BATCH) == 3  # max_batch is 4
    assert [t.size for t in tensors] == list(range(1, 11))
    client.free_many(tensors)
    assert not device.tensors


@pytest.mark.parametrize("bad", [0, 2, 3, 4, 6, 9])
def test_batch_rolls_back(device: FakeDevice, client: Client, bad: int) -> None:
    keep = client.empty(10, np.uint8)
    keep[:] = 5
    specs = [Spec(100, np.uint8, "kv") for _ in range(10)]
    specs[bad] = Spec(WINDOW + 1, np.uint8, "kv")
    with pytest.raises(errors.InvalidArgument, match=f"item {bad}, "):
        client.empty_many(specs)
    assert len(device.tensors) == 1
    assert (keep == 5).all()
    assert len(client.tensors()) == 1


def test_free_many_is_all_or_nothing(client: Client, device: FakeDevice) -> None:
    a, b, c = client.alloc_many([1, 2, 3])
    c.free()
    for items in ([a, b, c], [a, b, a], [a, np.empty(3), b]):
        with pytest.raises(errors.NoSuchTensor):
            client.free_many(items)  # type: ignore[arg-type]
        assert len(device.tensors) == 2
        assert not a.freed
        assert not b.freed
    client.free_many([a, b])
    assert not device.tensors


# -- refusals -----------------------------------------------------------------------


def test_quota(client: Client, device: FakeDevice) -> None:
    keep = client.empty(PAGE, np.uint8)
    client.set_quota(2 * PAGE)
    assert client.stats().quota == 2 * PAGE
    with pytest.raises(errors.QuotaExceeded, match=r"holds .* of its quota of .*set_quota") as e:
        client.empty(PAGE + 1, np.uint8, kind="kv")
    assert "of kv" in str(e.value)
    with pytest.raises(errors.Busy):
        client.set_quota(PAGE - 1)
    with pytest.raises(errors.NotPermitted):
        client.set_quota(WINDOW + 1)
    with pytest.raises(errors.InvalidArgument):
        client.set_quota(0)
    assert client.stats().used == PAGE
    assert client.stats().tensors == 1
    assert keep.size


def test_pool_and_window_full() -> None:
    with Client(FakeDevice(capacity=4 * CHUNK)) as client:
        keep = client.empty(3 * CHUNK, np.uint8)
        with pytest.raises(errors.PoolExhausted, match="pool set chunk --capacity"):
            client.empty(2 * CHUNK, np.uint8)
        assert keep.size
    with Client(FakeDevice(window=4 * CHUNK, quota=WINDOW)) as client:
        keep = client.empty(3 * CHUNK, np.uint8)
        with pytest.raises(errors.WindowFull):
            client.empty(2 * CHUNK, np.uint8)
    assert keep.size


@pytest.mark.parametrize(
    "number", [errno.ENOMEM, errno.EINTR, errno.EFAULT, errno.ENOTTY, errno.EIO]
)
def test_any_errno_leaves_nothing(client: Client, device: FakeDevice, number: int) -> None:
    for request in (abi.IOC_ALLOC, abi.IOC_ALLOC_BATCH):
        device.fail[request] = number
    with pytest.raises(errors.TensormemError) as info:
        client.empty(5)
    assert info.value.errno == number
    with pytest.raises(errors.TensormemError):
        client.empty_many([Spec(5), Spec(6)])
    device.fail.clear()
    assert not device.tensors
    assert client.stats().tensors == 0
    client.empty(5)


def test_stats(client: Client) -> None:
    keep = [client.empty(1), client.empty(CHUNK, np.uint8)]
    stats = client.stats()
    assert (stats.kept, stats.nodes) == (0, (0, 1))
    assert (stats.page_size, stats.chunk_size, stats.window_size) == (PAGE, CHUNK, WINDOW)
    assert (client.page_size, client.chunk_size, client.window_size) == (PAGE, CHUNK, WINDOW)
    assert (stats.used, stats.tensors, stats.cache_line) == (PAGE + CHUNK, len(keep), 64)
    with pytest.raises(AttributeError):
        stats.used = 0  # type: ignore[misc]
    assert "2 tensors" in repr(client)


# -- threads and processes -------------------------------------------------------------


def test_threads(client: Client, device: FakeDevice) -> None:
    faults: list[str] = []
    shared: list[npt.NDArray[Any]] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        mine: list[tuple[npt.NDArray[Any], int]] = []
        try:
            for step in range(300):
                if rng.random() < 0.55 or not mine:
                    mark = seed * 1000 + step
                    array = client.empty(rng.randrange(1, 3000), np.int32)
                    if array.any():
                        faults.append("not zero")
                    array[:] = mark
                    mine.append((array, mark))
                    shared.append(array[::2])
                else:
                    array, mark = mine.pop(rng.randrange(len(mine)))
                    if not (array == mark).all():
                        faults.append(f"{mark}: somebody else wrote here")
                    if rng.random() < 0.5:
                        client.free(array)
                    del array
                if len(shared) > 20:
                    shared.pop(rng.randrange(10))
                if step % 50 == 0:
                    gc.collect()
        except Exception as error:
            faults.append(repr(error))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "deadlock"
    assert not faults
    shared.clear()
    gc.collect()
    assert not device.tensors
    assert client.stats().tensors == 0


def test_close_while_threads_allocate() -> None:
    for _ in range(20):
        device = FakeDevice()
        client = Client(device)
        faults: list[BaseException] = []
        begun = threading.Barrier(5)

        def work(
            client: Client = client,
            faults: list[BaseException] = faults,
            begun: threading.Barrier = begun,
        ) -> None:
            begun.wait()
            try:
                while True:
                    client.empty(100)[:] = 1
            except (errors.Closed, errors.NoSuchTensor):
                pass
            except BaseException as error:
                faults.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        begun.wait()
        client.close()
        for thread in threads:
            thread.join(30)
        assert not faults
        assert not device.tensors
        assert device.fd == -1


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own: fork and exit are what is tested."""
    path = os.pathsep.join([str(HERE.parent / "src"), str(HERE)])
    return subprocess.run(
        [sys.executable, "-X", "dev", "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_child_never_frees_what_its_parent_allocated() -> None:
    # the fake's books are copied by fork, so the poison in the shared file tells
    result = run_python("""
        import os, gc
        from fake import FakeDevice
        from tensormem import Client, errors
        device = FakeDevice()
        client = Client(device)
        array, dying = client.empty(1000, "u1"), client.empty(1000, "u1")
        array[:] = 1
        dying[:] = 2
        tensor = client.alloc(10)
        tensor.buffer()[:] = b"x" * 10
        offset = tensor.offset
        pid = os.fork()
        if pid == 0:
            try:
                assert (array == 1).all()
                array[0] = 77
                for item in (array, tensor):
                    try:
                        client.free(item)
                        os._exit(10)
                    except errors.NotPermitted:
                        pass
                del dying
                device.calls.clear()
                own = client.empty(5)
                own[:] = 4
                del own
                assert len(device.calls) == 2, device.calls  # its own it may free
                client.close()
                del array, tensor, client
                gc.collect()
                os._exit(7 if len(device.calls) == 2 else 11)
            except BaseException as error:
                print(repr(error), flush=True)
                os._exit(12)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status == 7, status
        assert array[0] == 77 and (array[1:] == 1).all()
        assert (dying == 2).all()
        assert os.pread(device.fd, 10, offset) == b"x" * 10
        print("fine")
    """)
    assert (result.returncode, result.stdout, result.stderr) == (0, "fine\n", "")


def test_a_child_of_a_busy_parent_does_not_inherit_a_held_lock() -> None:
    result = run_python("""
        import os, threading
        from fake import FakeDevice
        from tensormem import Client
        client = Client(FakeDevice())
        entered, leave = threading.Event(), threading.Event()
        def hold():
            with client._session.lock:
                entered.set()
                leave.wait()
        thread = threading.Thread(target=hold)
        thread.start()
        entered.wait()
        import warnings
        warnings.simplefilter("ignore")
        pid = os.fork()
        if pid == 0:
            client.empty(3)[:] = 1
            os._exit(5)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        leave.set()
        thread.join()
        print(status)
    """)
    assert result.stdout == "5\n", result.stderr


def test_exit_with_live_arrays_is_quiet() -> None:
    result = run_python("""
        import sys
        from fake import FakeDevice
        import tensormem
        client = tensormem.Client(FakeDevice())
        array = client.empty(100)
        tensor = client.alloc(5)
        buffer = tensor.buffer()
        knot = [array]; knot.append(knot); sys.keep = knot
        print(array.sum())
    """)
    assert (result.returncode, result.stdout, result.stderr) == (0, "0.0\n", "")


def test_random_operations_against_a_model(client: Client, device: FakeDevice) -> None:
    rng = random.Random(2024)
    live: list[tuple[npt.NDArray[Any], int]] = []
    tensors: list[Tensor] = []
    for step in range(2000):
        action = rng.random()
        if action < 0.35:
            reuse = rng.random() < 0.3
            array = client.empty(rng.randrange(1, 2 * PAGE), np.uint8, reuse=reuse)
            assert reuse or not array.any()
            mark = step % 255 + 1
            array[:] = mark
            live.append((array, mark))
        elif action < 0.45 and live:
            array, mark = rng.choice(live)
            live.append((array[rng.randrange(len(array)) :], mark))
        elif action < 0.55:
            tensors.append(client.alloc(rng.randrange(1, PAGE)))
        elif action < 0.65 and tensors:
            tensors.pop(rng.randrange(len(tensors))).free()
        elif live:
            live.pop(rng.randrange(len(live)))
        array = None  # type: ignore[assignment]
        expected = {client.query(a).handle for a, _ in live} | {t.handle for t in tensors}
        assert set(device.tensors) == expected
        if step % 20 == 0:
            assert all((a == mark).all() for a, mark in live)
    assert len(live) + len(tensors) > 5


def test_close_in_the_middle_of_a_call(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client(device)
    real = device._alloc

    def close_then_allocate(item: abi.Alloc) -> None:
        client.close()
        assert device.fd >= 0, "closed under a call"
        real(item)

    monkeypatch.setattr(device, "_alloc", close_then_allocate)
    tensor = client.alloc(5)
    assert client.closed
    assert device.fd >= 0
    tensor.buffer()[:] = b"12345"
    tensor.free()
    assert not device.tensors
    assert device.fd == -1
