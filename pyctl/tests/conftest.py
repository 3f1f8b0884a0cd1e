# SPDX-License-Identifier: MIT
from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from fake import FakeDevice
from tensormem import Client


@pytest.fixture
def device() -> Iterator[FakeDevice]:
    yield FakeDevice()
    gc.collect()


@pytest.fixture
def client(device: FakeDevice) -> Iterator[Client]:
    with Client(device) as client:
        yield client
