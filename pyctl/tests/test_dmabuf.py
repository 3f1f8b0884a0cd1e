# SPDX-License-Identifier: MIT
"""Exports without a kernel: what the library makes of them, and of errors."""

from __future__ import annotations

import errno
import gc
import os

import numpy as np
import pytest

import tensormem
from fake import PAGE, FakeDevice, FakeDmaBuf
from tensormem import abi
from tensormem.client import Client
from tensormem.dmabuf import DmaBuf

READ, WRITE, END = 1, 2, 4


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


@pytest.fixture
def client(device: FakeDevice) -> Client:
    return Client(device)


def behind(shared: DmaBuf) -> FakeDmaBuf:
    assert isinstance(shared._device, FakeDmaBuf)
    return shared._device


def test_an_array_of_it_is_the_tensors_memory(client: Client) -> None:
    tensor = client.alloc(3 * PAGE + 5)
    shared = tensor.export()
    assert (shared.size, shared.read_only, shared.closed) == (4 * PAGE, False, False)
    assert shared.fileno() >= 0
    assert repr(shared) == "<DmaBuf: 16 KiB>"
    array = shared.array((2, 100), np.int16)
    array[1, 99] = 7
    assert tensor.array((200,), np.int16)[199] == 7
    shared.close()
    shared.close()
    assert (shared.closed, shared.fileno()) == (True, -1)
    assert repr(shared) == "<DmaBuf: 16 KiB, closed>"
    assert array[1, 99] == 7  # the array keeps the mapping


def test_who_may_only_read(client: Client) -> None:
    with client.alloc(PAGE).export(read_only=True) as shared:
        array = shared.array(4)
        assert shared.read_only
        assert not array.flags.writeable
        assert "read-only" in repr(shared)


def test_sync_begins_and_ends(client: Client) -> None:
    shared = client.alloc(PAGE).export()
    with shared.sync():
        assert behind(shared).syncs == [READ | WRITE]
    with pytest.raises(KeyError), shared.sync(write=False):
        raise KeyError
    with shared.sync(read=False):
        pass
    assert behind(shared).syncs == [
        READ | WRITE, READ | WRITE | END, READ, READ | END, WRITE, WRITE | END,
    ]  # fmt: skip


def test_sync_is_called_again_when_it_was_interrupted(client: Client) -> None:
    shared = client.alloc(PAGE).export()
    behind(shared).fail = [errno.EINTR, errno.EAGAIN]
    with shared.sync():
        pass
    assert behind(shared).syncs == [READ | WRITE, READ | WRITE | END]
    behind(shared).fail = [errno.ENOTTY]
    with pytest.raises(tensormem.TensormemError, match="cannot synchronize"), shared.sync():
        pass


def test_bad_arguments(client: Client) -> None:
    shared = client.alloc(PAGE).export()
    with pytest.raises(tensormem.InvalidArgument, match="neither read nor write"):
        shared.sync(read=False, write=False).__enter__()
    with pytest.raises(tensormem.InvalidArgument, match="does not fit"):
        shared.array(PAGE // 4 + 1)
    assert shared.array(PAGE // 4).nbytes == PAGE
    shared.close()
    for call in (lambda: shared.array(1), lambda: shared.sync().__enter__()):
        with pytest.raises(tensormem.Closed, match="export the tensor again"):
            call()


def test_no_address_space(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = client.alloc(PAGE).export()

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "none")

    monkeypatch.setattr(behind(shared), "map", fail)
    with pytest.raises(tensormem.OutOfMemory, match="cannot map 4 KiB"):
        shared.array(1)


def test_one_of_a_driver_that_maps_nothing(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = client.alloc(PAGE).export()

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENODEV, "none")

    monkeypatch.setattr(behind(shared), "map", fail)
    with pytest.raises(tensormem.NotAvailable, match="does not map it"):
        shared.array(1)


def test_what_cannot_be_exported(client: Client, device: FakeDevice) -> None:
    small, tensor = client.alloc(64), client.alloc(PAGE)
    with pytest.raises(tensormem.NotExportable, match="slab") as caught:
        small.export()
    assert caught.value.remedy is not None
    assert "pool='buddy'" in caught.value.remedy
    device.fail[abi.IOC_EXPORT] = errno.EPERM
    with pytest.raises(tensormem.NotPermitted, match="RLIMIT_MEMLOCK"):
        tensor.export()
    device.fail[abi.IOC_EXPORT] = errno.EMFILE
    with pytest.raises(tensormem.NotAvailable, match="no descriptor left"):
        tensor.export()
    device.fail[abi.IOC_EXPORT] = errno.ENOMEM
    with pytest.raises(tensormem.OutOfMemory, match=f"cannot export tensor {tensor.handle}"):
        tensor.export()
    del device.fail[abi.IOC_EXPORT]
    tensor.free()
    with pytest.raises(tensormem.NoSuchTensor):
        tensor.export()
    other = client.alloc(PAGE)
    client.close()
    with pytest.raises((tensormem.Closed, tensormem.NoSuchTensor)):
        other.export()


def test_one_that_is_dropped_is_closed(client: Client) -> None:
    shared = client.alloc(PAGE).export()
    fd = shared.fileno()
    del shared
    gc.collect()
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


def test_other_descriptors_are_not_taken() -> None:
    reader, writer = os.pipe()
    with pytest.raises(tensormem.InvalidArgument, match="not a dma-buf"):
        DmaBuf.of(reader)
    os.close(reader)
    os.close(writer)
    with pytest.raises(tensormem.InvalidArgument, match="not an open descriptor"):
        DmaBuf.of(reader)
    with open(__file__) as file:
        with pytest.raises(tensormem.InvalidArgument, match="not a dma-buf"):
            DmaBuf.of(file.fileno())
        assert file.tell() == 0
