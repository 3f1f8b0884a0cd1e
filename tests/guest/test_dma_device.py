# SPDX-License-Identifier: MIT
"""A device reads and writes tensors, behind an IOMMU: QEMU's edu, by way of tm_edu.ko. Runs with --dma."""

from __future__ import annotations

import errno
import itertools
import os
import random
import signal
import socket
from collections.abc import Iterator

import pytest

from conftest import USAGE, settled
from device import CHUNK, KASAN, PAGE, DmaBuf, Raw, becomes, read, weights
from edu import BOTH, DRIVER, FROM_DEVICE, MEMORY, TO_DEVICE, Edu, iommu_maps
from failnth import can_fail, let_fail, sweep
from process import killed_at_random, loaded, together
from tensormem import abi

READ_ONLY = abi.ExportFlag.READ_ONLY
CPU = DmaBuf.READ | DmaBuf.WRITE


@pytest.fixture(scope="module", autouse=True)
def driver() -> Iterator[None]:
    with loaded("tm_edu"):
        yield


@pytest.fixture
def edu() -> Iterator[Edu]:
    with Edu() as importer:
        yield importer


def test_the_device_is_behind_an_iommu() -> None:
    (device,) = DRIVER.glob("0000:*")
    assert (device / "iommu_group").is_dir()
    assert (device / "iommu_group/type").read_text() in ("DMA\n", "DMA-FQ\n")


@pytest.mark.parametrize(("size", "pool"), [(PAGE, 0), (3 * CHUNK + 5 * PAGE, 0), (CHUNK, abi.Pool.BUDDY)])
def test_data_goes_to_the_device_and_back(raw: Raw, edu: Edu, size: int, pool: int) -> None:
    """From the tensor's end to the device, and from there to its beginning; the rest stays as it was."""
    item = raw.alloc(size, pool=pool)
    window = raw.map_tensor(item)
    data = weights("edu", min(size // 2, MEMORY))
    window[-len(data) :] = data
    with raw.export(item.handle) as shared:
        view = shared.view()
        assert edu.attach(shared.fd) == 0
        assert edu.map_for() == 0
        assert shared.sync(CPU) == shared.sync(CPU | DmaBuf.END) == 0
        assert edu.fetch(size - len(data), len(data)) == 0
        assert edu.store(0, len(data)) == 0
        assert shared.sync(DmaBuf.READ) == 0
        assert view[: len(data)] == window[: len(data)] == data
        assert view[len(data) : -len(data)] == bytes(size - 2 * len(data))
        assert shared.sync(DmaBuf.READ | DmaBuf.END) == 0
        view.close()
        assert edu.unmap() == edu.detach() == 0
    window.close()
    assert raw.free(item.handle) == 0


def test_across_the_border_of_two_entries(raw: Raw, edu: Edu) -> None:
    item = raw.alloc(2 * CHUNK, pool=abi.Pool.CHUNK)
    window = raw.map_tensor(item)
    data = weights("border", 2000)
    window[CHUNK - 1000 : CHUNK + 1000] = data
    with raw.export(item.handle) as shared:
        assert edu.attach(shared.fd) == edu.map_for() == 0
        assert edu.fetch(CHUNK - 1000, 2000) == edu.store(17, 2000) == 0
        assert window[17:2017] == data
        # past its end nothing is to be had
        assert edu.fetch(2 * CHUNK - 1, 2) == errno.EINVAL
        assert edu.unmap() == edu.detach() == 0
    window.close()
    assert raw.free(item.handle) == 0


def test_a_chunk_is_one_entry(raw: Raw, edu: Edu) -> None:
    chunks = 8
    item = raw.alloc(chunks * CHUNK, pool=abi.Pool.CHUNK)
    with raw.export(item.handle) as shared:
        assert edu.attach(shared.fd) == 0
        assert read("dma/attachments") == 1
        with iommu_maps() as calls:
            assert edu.map_for() == 0
        assert (edu.mapped.entries, edu.mapped.largest) == (chunks, CHUNK)
        assert 1 <= calls[0] <= chunks
        assert edu.unmap() == edu.detach() == 0
        assert read("dma/attachments") == 0
    assert raw.free(item.handle) == 0
    # single pages, no two of them neighbours
    with iommu_maps() as calls:
        assert edu.cost(chunks * 64).entries == chunks * 64
    assert calls[0] > chunks * 64 * 0.9


@pytest.mark.parametrize("size", [PAGE, 5 * PAGE, 2 * CHUNK + 3 * PAGE])
def test_the_kernel_sees_it_side_by_side(raw: Raw, edu: Edu, size: int) -> None:
    item = raw.alloc(size)
    window = raw.map_tensor(item)
    for at in (0, size // 2, size - 1):
        window[at] = at % 251 + 1
    with raw.export(item.handle) as shared:
        assert edu.attach(shared.fd) == 0
        assert edu.total() == (0, sum(at % 251 + 1 for at in (0, size // 2, size - 1)))
        assert edu.detach() == 0
    window.close()
    assert raw.free(item.handle) == 0


# Orders


STEPS = ("close", "free", "client", "unmap")


@pytest.mark.parametrize("order", itertools.permutations(STEPS), ids="-".join)
def test_the_end_in_every_order(order: tuple[str, ...]) -> None:
    """Descriptor, tensor, client and device's mapping go; as long as one is there it can be used."""
    raw = Raw()
    item = raw.alloc(CHUNK + PAGE)
    shared = raw.export(item.handle)
    edu = Edu()
    assert edu.attach(shared.fd) == edu.map_for() == 0
    for step in order:
        if step == "close":
            shared.close()
        elif step == "free":
            assert raw.fd < 0 or raw.free(item.handle) == 0
        elif step == "client":
            raw.close()
        else:
            assert edu.total()[0] == 0
            assert edu.unmap() == edu.detach() == 0
    edu.close()
    for name in ("dma/buffers", "dma/attachments", "clients/bytes", "chunk/quarantined"):
        becomes(name, 0)


def test_an_import_after_the_client_has_died(edu: Edu) -> None:
    """Its descriptor is all that is left of it, and does for a device."""
    data = weights("late", MEMORY)
    with Raw() as client:
        item = client.alloc(CHUNK)
        window = client.map_tensor(item)
        window[:MEMORY] = data
        shared = client.export(item.handle)
        window.close()
    becomes("clients/count", 0)
    assert edu.attach(shared.fd) == edu.map_for() == 0
    shared.close()
    assert edu.fetch(0) == edu.store(CHUNK - MEMORY) == 0
    assert edu.total() == (0, 2 * sum(data))
    assert edu.unmap() == edu.detach() == 0
    for name in ("dma/buffers", "clients/bytes", "chunk/quarantined"):
        becomes(name, 0)


def test_a_device_outlives_exporter_and_importer(edu: Edu) -> None:
    """Both processes are killed; the device goes on reading and writing until its driver lets go."""
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    data = weights("last", MEMORY)
    pid = os.fork()
    if pid == 0:
        try:
            with Raw() as client:
                item = client.alloc(CHUNK)
                window = client.map_tensor(item)
                window[:MEMORY] = data
                shared = client.export(item.handle)
                assert edu.attach(shared.fd) == edu.map_for() == 0
                theirs.send(b"x")
                signal.pause()
        finally:
            os._exit(1)
    theirs.close()
    assert ours.recv(1) == b"x"
    os.kill(pid, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    becomes("clients/count", 0)
    assert read("clients/bytes") == read("clients/kept") == CHUNK
    # nobody but the device has it: from its beginning to its end, and as the kernel sees it
    assert edu.total() == (0, sum(data))
    assert edu.fetch(0) == edu.store(CHUNK - MEMORY) == 0
    assert edu.total() == (0, 2 * sum(data))
    assert edu.unmap() == edu.detach() == 0
    becomes("clients/bytes", 0)
    ours.close()


def test_several_importers_and_mappings(raw: Raw) -> None:
    item = raw.alloc(CHUNK)
    importers = [Edu() for _ in range(4)]
    with raw.export(item.handle) as shared:
        for number, one in enumerate(importers):
            assert one.attach(shared.fd) == 0
            assert one.map_for((BOTH, TO_DEVICE, FROM_DEVICE)[number % 3]) == 0
        assert (read("dma/buffers"), read("dma/attachments")) == (1, 4)
        assert shared.sync(CPU) == shared.sync(CPU | DmaBuf.END) == 0
        assert importers[1].unmap() == importers[1].detach() == 0
        assert shared.sync(CPU) == shared.sync(CPU | DmaBuf.END) == 0
    assert raw.free(item.handle) == 0
    for one in importers:
        one.close()  # with all that it has
    becomes("dma/attachments", 0)
    becomes("chunk/quarantined", 0)


# Bad input


def test_a_read_only_export_is_not_written(raw: Raw, edu: Edu) -> None:
    item = raw.alloc(PAGE)
    with raw.export(item.handle, READ_ONLY) as shared:
        assert edu.attach(shared.fd) == 0
        assert edu.map_for(BOTH) == edu.map_for(FROM_DEVICE) == errno.EACCES
        assert edu.map_for(TO_DEVICE) == 0
        assert edu.fetch(0, 100) == 0
        # nor by a driver's CPU
        assert edu.total()[0] == errno.EINVAL
        assert edu.unmap() == edu.detach() == 0
    assert raw.free(item.handle) == 0


def test_what_cannot_be_imported(raw: Raw, edu: Edu) -> None:
    item = raw.alloc(PAGE)
    with raw.export(item.handle) as shared:
        assert edu.map_for() == edu.unmap() == edu.detach() == errno.EINVAL
        assert edu.attach(raw.fd) == errno.EINVAL
        fd = shared.fd
        assert edu.attach(fd) == 0
        assert edu.attach(fd) == errno.EBUSY
        assert edu.map_for(3) == errno.EINVAL
        assert edu.fetch(0) == errno.EINVAL
        assert edu.detach() == 0
    # nobody has it any more
    assert edu.attach(fd) == errno.EBADF
    assert raw.free(item.handle) == 0


# Memory that is not to be had; many at once


@can_fail
@pytest.mark.parametrize("size", [PAGE, 2 * CHUNK + 5 * PAGE])
def test_failures_while_it_is_attached_and_mapped(raw: Raw, edu: Edu, size: int) -> None:
    let_fail()
    item = raw.alloc(size)
    with raw.export(item.handle) as shared:

        def attached(result: int) -> None:
            assert read("dma/attachments") == (result == 0)
            if result == 0:
                assert edu.detach() == 0

        assert errno.ENOMEM in sweep(lambda: edu.attach(shared.fd), attached)
        assert edu.attach(shared.fd) == 0

        def mapped(result: int) -> None:
            assert edu.unmap() == (0 if result == 0 else errno.EINVAL)

        assert errno.ENOMEM in sweep(edu.map_for, mapped)
        assert edu.detach() == 0
    assert raw.free(item.handle) == 0


def churn(seed: int, rounds: int) -> None:
    """Export, import, map, sync, free and let go in random order; what the kernel sees is what was written."""
    dice = random.Random(seed)
    with Raw() as client:
        for _ in range(rounds):
            item = client.alloc(dice.choice((PAGE, 3 * PAGE, CHUNK)))
            window = client.map_tensor(item)
            window[-1] = value = dice.randrange(1, 256)
            window.close()
            shared = client.export(item.handle)
            with Edu() as edu:
                assert edu.attach(shared.fd) == 0
                ends = [shared.close, lambda handle=item.handle: client.free(handle)]
                if dice.randrange(2):
                    assert edu.map_for(dice.choice((BOTH, TO_DEVICE, FROM_DEVICE))) == 0
                    assert shared.sync(CPU) == shared.sync(CPU | DmaBuf.END) == 0
                dice.shuffle(ends)
                for end in ends:
                    end()
                assert edu.total() == (0, value)
                if dice.randrange(2):
                    edu.unmap()


def test_threads(raw: Raw) -> None:
    assert together(lambda seed: churn(seed, 10 if KASAN else 40), 3) == []
    becomes("chunk/quarantined", 0)


def test_killed_at_random() -> None:
    dice = random.Random(3)
    for _ in range(3 if KASAN else 8):
        killed_at_random(lambda seed: churn(seed, 1 << 30), dice, 0.05, 0.5)
        assert settled(dict.fromkeys(USAGE, 0)) == dict.fromkeys(USAGE, 0)
