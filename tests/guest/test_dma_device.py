# SPDX-License-Identifier: MIT
"""A device reads and writes tensors, behind an IOMMU: QEMU's edu, by way of tm_edu.ko. Runs with --dma."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest

from device import CHUNK, PAGE, Raw, read
from edu import DRIVER, MEMORY, MODULE, Edu, iommu_maps
from tensormem import abi


@pytest.fixture(scope="module", autouse=True)
def driver() -> Iterator[None]:
    subprocess.run(["insmod", MODULE], check=True)
    yield
    subprocess.run(["rmmod", "tm_edu"], check=True)


@pytest.fixture
def edu() -> Iterator[Edu]:
    with Edu() as importer:
        yield importer


def test_the_device_is_behind_an_iommu() -> None:
    (device,) = DRIVER.glob("0000:*")
    assert (device / "iommu_group").is_dir()
    assert (device / "iommu_group/type").read_text() in ("DMA\n", "DMA-FQ\n")


@pytest.mark.parametrize("size", [PAGE, 3 * CHUNK + 5 * PAGE])
def test_data_goes_to_the_device_and_back(raw: Raw, edu: Edu, size: int) -> None:
    item = raw.alloc(size)
    window = raw.map_tensor(item)
    data = os.urandom(min(size, MEMORY) // 2)
    first, last = size - len(data), 0
    window[first:] = data
    with raw.export(item.handle) as shared:
        assert edu.attach(shared.fd) == 0
        assert edu.map_for() == 0
        assert edu.fetch(first, len(data)) == 0
        assert edu.store(last, len(data)) == 0
        assert window[: len(data)] == data
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
    assert raw.free(item.handle) == 0
