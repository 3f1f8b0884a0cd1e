# SPDX-License-Identifier: MIT
"""A device that gets a copy: what begin and end of an access are for. Runs with --dma, no IOMMU and swiotlb=force."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from device import CHUNK, PAGE, DmaBuf, Raw, becomes, weights
from edu import DRIVER, FROM_DEVICE, MEMORY, TO_DEVICE, Edu
from process import loaded

BOTH = DmaBuf.READ | DmaBuf.WRITE


@pytest.fixture
def edu() -> Iterator[Edu]:
    with loaded("tm_edu"), Edu() as importer:
        yield importer


@pytest.mark.parametrize("at", [0, CHUNK - 1000, 2 * CHUNK + PAGE])
def test_begin_and_end_bring_the_copy_up_to_date(raw: Raw, edu: Edu, at: int) -> None:
    (device,) = DRIVER.glob("0000:*")
    assert (device / "iommu_group/type").read_text() == "identity\n"
    item = raw.alloc(2 * CHUNK + 4 * PAGE)
    window = raw.map_tensor(item)
    first, second = weights("first", MEMORY), weights("second", MEMORY)
    place, target = slice(at, at + MEMORY), slice(CHUNK + 5 * PAGE, CHUNK + 5 * PAGE + MEMORY)
    window[place] = first
    shared = raw.export(item.handle)
    assert edu.attach(shared.fd) == edu.map_for() == 0
    # of a chunk no more at a time than can be copied
    assert edu.mapped.entries > 3
    assert edu.mapped.largest < CHUNK
    # what the CPU writes is not yet the device's
    window[place] = second
    assert edu.fetch(at) == edu.store(target.start) == 0
    assert window[target] == bytes(MEMORY)
    assert shared.sync(DmaBuf.READ) == 0
    assert window[target] == first
    assert shared.sync(DmaBuf.READ | DmaBuf.END) == 0
    # now it is: to begin brings the device's copy back, so it is written after that
    assert shared.sync(BOTH) == 0
    window[place] = second
    assert shared.sync(BOTH | DmaBuf.END) == 0
    assert edu.fetch(at) == edu.store(target.start) == 0
    assert shared.sync(DmaBuf.READ) == 0
    assert window[target] == window[place] == second
    assert shared.sync(DmaBuf.READ | DmaBuf.END) == 0
    assert edu.unmap() == edu.detach() == 0
    shared.close()
    window.close()
    assert raw.free(item.handle) == 0
    becomes("dma/buffers", 0)


def test_to_unmap_brings_back_what_the_device_wrote(raw: Raw, edu: Edu) -> None:
    """Of a mapping for the device to read alone nothing comes back."""
    item = raw.alloc(CHUNK)
    window = raw.map_tensor(item)
    data = weights("kept", MEMORY)
    window[:MEMORY] = data
    shared = raw.export(item.handle)
    assert edu.attach(shared.fd) == edu.map_for(TO_DEVICE) == 0
    assert edu.fetch(0) == 0
    assert edu.unmap() == 0
    assert window[:MEMORY] == data
    assert edu.map_for(FROM_DEVICE) == 0
    assert edu.store(PAGE) == 0
    assert window[PAGE : PAGE + MEMORY] == bytes(MEMORY)
    assert edu.unmap() == edu.detach() == 0
    assert window[PAGE : PAGE + MEMORY] == data
    shared.close()
    window.close()
    assert raw.free(item.handle) == 0
