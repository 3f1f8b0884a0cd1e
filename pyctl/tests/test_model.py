# SPDX-License-Identifier: MIT
"""Model slots as the library has them, on the fake of fakemodel.py."""

from __future__ import annotations

import contextlib
import errno
import gc
import hashlib
import os
import random
import select
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import gguffile
import tensormem
from fake import FakeDevice
from fakemodel import POISON, FakeGeneration, Models
from tensormem import Client, abi, errors, gguf, safetensors
from tensormem import model as model_module
from tensormem.device import KernelDevice
from tensormem.model import Generation, Slot, parse_header, read_header


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> Iterator[Models]:
    models = Models()
    monkeypatch.setattr(model_module, "KernelDevice", lambda _: FakeDevice(models=models))
    yield models
    gc.collect()
    assert not models.descriptors, "a descriptor was left open"


@pytest.fixture
def slot(models: Models) -> Iterator[Slot]:
    with tensormem.slot("chat", create=True) as slot:
        yield slot


def weights(seed: int = 1) -> dict[str, npt.NDArray[Any]]:
    rng = np.random.default_rng(seed)
    return {
        "a": rng.standard_normal((5, 7)).astype(np.float32),
        "b": rng.integers(0, 99, (300, 1000), np.int64),
        "c": rng.standard_normal(11).astype(np.float16),
        "none": np.empty((0, 3), np.float32),
    }


@pytest.fixture
def one(tmp_path: Path) -> Path:
    path = tmp_path / "one.safetensors"
    safetensors.save(path, weights(1), {"is": "one"})
    return path


@pytest.fixture
def two(tmp_path: Path) -> Path:
    path = tmp_path / "two.safetensors"
    safetensors.save(path, weights(2), {"is": "two"})
    return path


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# -- opening -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["", ".", ".x", "a/b", "a b", "ä", "x" * 64, "a\0", "a\n", "a:b", "held", "slots", 3]
)
def test_bad_names(models: Models, name: Any) -> None:
    with pytest.raises(errors.InvalidArgument, match="name of a model slot"):
        tensormem.slot(name, create=True)
    assert not models.slots


@pytest.mark.parametrize("name", ["x", "A.b_c-9", "-", "x" * 63, "a..", "_"])
def test_good_names(models: Models, name: str) -> None:
    with tensormem.slot(name, create=True, mode=0o640) as slot:
        assert slot.name == name
        assert slot.info().mode == 0o640
    assert list(models.slots) == [name]


def test_open_and_create(models: Models) -> None:
    with pytest.raises(errors.NoSuchSlot, match="no model slot 'chat'"):
        tensormem.slot("chat")
    with pytest.raises(errors.NoSuchSlot):
        tensormem.slot("chat", write=True)
    tensormem.slot("chat", create=True).close()
    tensormem.slot("chat", create=True).close()
    with pytest.raises(errors.SlotExists) as info:
        tensormem.slot("chat", exclusive=True)
    assert isinstance(info.value, FileExistsError)
    tensormem.slot("new", exclusive=True).close()
    with pytest.raises(errors.InvalidArgument, match="0777"):
        tensormem.slot("more", create=True, mode=0o777)
    for mode in (-1, 1 << 64):
        with pytest.raises(errors.InvalidArgument, match="a mode"):
            tensormem.slot("more", create=True, mode=mode)


def test_the_umask_counts(models: Models) -> None:
    old = os.umask(0o027)
    try:
        with tensormem.slot("chat", create=True, mode=0o666) as slot:
            assert slot.info().mode == 0o640
    finally:
        os.umask(old)


def test_a_client_opens_slots(one: Path) -> None:
    device = FakeDevice()
    with Client(device) as client:
        with client.slot("chat", create=True, mode=0o600) as slot:
            slot.swap(one)
            assert slot.info().mode == 0o600
        with client.slot("chat") as slot, slot.acquire() as gen:
            assert gen.metadata == {"is": "one"}
        with pytest.raises(errors.NoSuchSlot):
            client.slot("other")
        with pytest.raises(errors.InvalidArgument):
            client.slot("../x")
    with pytest.raises(errors.Closed):
        client.slot("chat")


def test_permissions(models: Models, slot: Slot, one: Path) -> None:
    slot.swap(one)
    models.uid = 12345
    with pytest.raises(errors.SlotDenied) as info:
        tensormem.slot("chat", write=True)
    assert isinstance(info.value, PermissionError)
    with pytest.raises(errors.SlotDenied):
        tensormem.slot("chat")
    # what is open may be changed by whoever owns it, through the descriptor
    os.fchmod(slot.fileno(), 0o664)
    assert slot.info().mode == 0o664
    other = tensormem.slot("chat")
    with other.acquire() as gen:
        assert gen.number == 1
    with pytest.raises(errors.SlotDenied):
        tensormem.slot("chat", write=True)
    for call in (
        lambda: other.stage(one),
        lambda: other.swap(one),
        lambda: other.commit(1),
        lambda: other.abort(1),
        other.rollback,
        other.remove,
    ):
        with pytest.raises(errors.SlotDenied, match="write=True"):
            call()
    other.close()


def test_owner(slot: Slot) -> None:
    info = slot.info()
    assert (info.uid, info.gid) == (os.getuid(), os.getgid())
    if os.getuid() == 0:
        os.fchown(slot.fileno(), 5, 6)
        assert (slot.info().uid, slot.info().gid) == (5, 6)


def test_a_device_without_slots(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    missing = tmp_path / "nothing"
    monkeypatch.setattr(model_module, "KernelDevice", lambda _: KernelDevice(missing))
    with pytest.raises(errors.DeviceMissing):
        tensormem.slot("chat")
    old = FakeDevice()
    old.fail[abi.IOC_MODEL_OPEN] = errno.ENOTTY
    monkeypatch.setattr(model_module, "KernelDevice", lambda _: old)
    with pytest.raises(errors.IncompatibleModule):
        tensormem.slot("chat")
    assert old.fd < 0, "the client was left open"


# -- from a file to arrays ----------------------------------------------------------------


def test_swap_and_acquire(slot: Slot, one: Path) -> None:
    assert slot.swap(one) == 1
    info = slot.info()
    assert (info.active, info.previous, info.staged, info.last) == (1, 0, 0, 1)
    with slot.acquire() as gen:
        assert (gen.number, gen.size, gen.state) == (1, one.stat().st_size, "active")
        assert list(gen.tensors) == [e.name for e in safetensors.read_header(one).entries]
        assert gen.metadata == {"is": "one"}
        for name, expected in weights(1).items():
            array = gen.tensor(name)
            assert array.dtype == expected.dtype
            assert np.array_equal(array, expected)
            assert not array.flags.writeable
            assert (gen.tensors[name].dtype, gen.tensors[name].shape) == (array.dtype, array.shape)
        with pytest.raises(ValueError, match="read-only"):
            gen.tensor("a")[0, 0] = 1
        with pytest.raises(ValueError, match="WRITEABLE"):
            gen.tensor("a").flags.writeable = True
        assert bytes(gen.buffer()) == one.read_bytes()
        assert os.pread(gen.fileno(), 8, 0) == one.read_bytes()[:8]
        with pytest.raises(errors.InvalidArgument, match="generation 1 of 'chat' has no tensor"):
            gen.tensor("d")
        its = gen.info()
        assert (its.size, its.loaded, its.readers) == (gen.size, gen.size, 1)
        assert (its.error, its.mapping, its.cached, its.keep) == (0, "block", False, False)
        assert (its.evictable, its.evicted_bytes, its.reloads) == (False, 0, 0)


def test_arrays_are_no_copies(models: Models, slot: Slot, one: Path) -> None:
    slot.swap(one)
    with slot.acquire() as gen:
        arrays = [gen.tensor("b"), gen.tensor("b"), gen.tensor("a")]
    assert arrays[0].__array_interface__["data"] == arrays[1].__array_interface__["data"]
    state = models.slots["chat"].active
    assert state is not None
    assert state.mappings == 1, "one mapping for all"
    where = one.read_bytes().index(arrays[2].tobytes())
    os.pwrite(state.fd, b"\x01\x02\x03\x04", where)
    assert arrays[2].tobytes()[:4] == b"\x01\x02\x03\x04"


def test_a_gguf_generation(slot: Slot, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    array = np.arange(64, dtype=np.float32).reshape(2, 32)
    blocks = np.zeros(2, gguf.TYPES[8].dtype)
    blocks["d"], blocks["qs"] = [0.5, 2], np.arange(-16, 16)
    path.write_bytes(
        gguffile.model(
            {
                "blk.0.attn_q.weight": gguffile.of(array),
                "q": ("Q8_0", (2, 32), blocks.tobytes()),
            },
            [gguffile.pair("general.name", "str", "tiny")],
        )
    )
    slot.swap(path, sha256=sha(path))
    with slot.acquire() as gen:
        assert gen.metadata == {"general.name": "tiny"}
        assert np.array_equal(gen.tensor("blk.0.attn_q.weight"), array)
        assert gen.dequantize("blk.0.attn_q.weight").base is not None
        assert gen.tensor("q").shape == (2, 1)
        expected = np.arange(-16, 16, dtype=np.float32) * np.array([[0.5], [2]], np.float32)
        assert np.array_equal(gen.dequantize("q"), expected)


def test_a_bool_that_is_none(slot: Slot, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    safetensors.save(path, {"flags": np.ones(4, np.bool_)})
    path.write_bytes(path.read_bytes()[:-1] + b"\x02")
    slot.swap(path)
    with slot.acquire() as gen, pytest.raises(errors.ModelFileError, match="BOOL"):
        gen.tensor("flags")


def test_any_bytes_are_a_model(slot: Slot, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"onnx bytes")
    with pytest.raises(errors.ModelFileError, match="neither GGUF nor safetensors"):
        slot.swap(path)
    assert slot.info().last == 0, "it was refused before it was loaded"
    assert slot.swap(path, check=False) == 1
    with slot.acquire() as gen:
        assert bytes(gen.buffer()) == b"onnx bytes"
        with pytest.raises(errors.ModelFileError, match=r"generation 1 of 'chat'.*neither"):
            _ = gen.tensors


@pytest.mark.parametrize("raw", [b"", b"G", b"GGUF", b"x" * 8, b"12345678{"])
def test_short_files(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "m"
    path.write_bytes(raw)
    with pytest.raises(errors.ModelFileError) as info:
        read_header(path)
    assert str(path) in str(info.value)


def test_a_slow_pipe_of_a_file(one: Path) -> None:
    class Slow(model_module._Window):
        def readinto(self, buffer: Any) -> int:
            return super().readinto(memoryview(buffer)[:3])

    raw = one.read_bytes()
    slow = Slow(lambda n, at: raw[at : at + n], len(raw))
    assert parse_header("x", slow) == safetensors.read_header(one)


def test_part_of_a_file(slot: Slot, one: Path, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"x" * 100 + one.read_bytes() + b"y" * 50)
    slot.swap(image, offset=100, size=one.stat().st_size, sha256=sha(one))
    with slot.acquire() as gen:
        assert bytes(gen.buffer()) == one.read_bytes()
    for offset, size in ((-1, 0), (0, -1), (1 << 64, 0), ("x", 0)):
        with pytest.raises(errors.InvalidArgument):
            slot.stage(image, offset=offset, size=size)  # type: ignore[arg-type]


def test_sources(slot: Slot, one: Path) -> None:
    with one.open("rb") as file:
        file.seek(5)
        slot.swap(file)
        slot.swap(file.fileno())
        assert file.tell() == 5
    slot.swap(str(one))
    assert slot.info().active == 3
    with pytest.raises(FileNotFoundError):
        slot.swap(one.with_name("nothing"))
    with pytest.raises(errors.InvalidArgument, match="cannot stage"):
        slot.stage(one.parent)
    assert slot.info().staged == 0


def test_files_that_are_not_ours_to_stage(
    models: Models, slot: Slot, one: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fd = os.open(one, os.O_WRONLY)
    with pytest.raises(errors.SlotDenied, match="not open for reading"):
        slot.stage(fd)
    os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        slot.stage(fd)
    owner = one.stat().st_uid
    models.uid = owner + 1
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(errors.SlotDenied, match=r"another user's.*without cached=True"):
        slot.stage(one, cached=True)
    slot.stage(one).abort()


def test_no_descriptor_is_left(slot: Slot, one: Path) -> None:
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        slot.swap(one)
        with slot.acquire() as gen:
            gen.tensor("a")
        with pytest.raises(errors.SlotBusy), slot.stage(one):
            slot.stage(one)
        with pytest.raises(errors.WrongContents):
            slot.swap(one, sha256="0" * 64)
    slot.rollback()
    gc.collect()
    # the two generations that the slot keeps, each a file of the fake
    assert len(os.listdir("/proc/self/fd")) <= len(before) + 2


def test_a_header_is_read_once(models: Models, slot: Slot, one: Path, two: Path) -> None:
    reads = []
    original = model_module.parse_header

    def counting(path: str, file: Any) -> Any:
        reads.append(path)
        return original(path, file)

    slot.swap(one)
    slot.swap(two)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_module, "parse_header", counting)
        for _ in range(5):
            with slot.acquire() as gen:
                gen.tensor("a")
                assert gen.metadata == {"is": "two"}
        slot.rollback()
        with slot.acquire() as gen:
            assert gen.metadata == {"is": "one"}
        for _ in range(9):
            slot.commit(slot_stage(slot, two))
            with slot.acquire() as gen:
                assert gen.metadata == {"is": "two"}
    assert len(reads) == 2 + 9
    assert len(slot._headers) <= 4


def slot_stage(slot: Slot, path: Path) -> int:
    with slot.stage(path, keep=True) as staging:
        assert staging.wait()
        return staging.number


# -- staging ------------------------------------------------------------------------------


def test_progress(models: Models, slot: Slot, one: Path) -> None:
    size = one.stat().st_size
    models.step = 1 << 20
    told: list[tuple[int, int]] = []
    with slot.stage(one) as staging:
        assert staging.progress() == (0, size)
        assert staging.info().state == "loading"
        with pytest.raises(errors.StillLoading) as info:
            staging.commit()
        assert isinstance(info.value, BlockingIOError)
        with pytest.raises(errors.StillLoading):
            staging.check()
        assert not staging.wait(timeout=0)
        assert staging.wait(lambda done, all: told.append((done, all)))
        assert staging.info().state == "staged"
        assert [done for done, _ in told] == [0, 1 << 20, 2 << 20, size]
        assert {all for _, all in told} == {size}
        assert staging.commit() == 1
        assert staging.closed
        with pytest.raises(errors.Closed, match="generation 1"):
            staging.commit()
    assert slot.info().active == 1


def test_a_staging_is_aborted_unless_committed(models: Models, slot: Slot, one: Path) -> None:
    for step in (0, 1 << 40):
        models.step = step
        with slot.stage(one) as staging:
            staging.wait(timeout=0) if not step else staging.wait()
        assert staging.closed
        assert slot.info().staged == 0
    staging = slot.stage(one)
    del staging
    gc.collect()
    assert slot.info().staged == 0
    with pytest.raises(KeyboardInterrupt), slot.stage(one):
        raise KeyboardInterrupt
    assert slot.info().staged == 0
    assert models.freed == [1, 2, 3, 4]


def test_keep(models: Models, slot: Slot, one: Path) -> None:
    with slot.stage(one, keep=True) as staging:
        assert staging.info().keep
        staging.wait()
    assert slot.info().staged == 1
    with tensormem.slot("chat", write=True) as other:
        other.commit(1)
    assert slot.info().active == 1
    models.step = 0
    with slot.stage(one, keep=True):
        pass
    assert slot.info().staged == 0, "what is not loaded is not kept"
    models.step, models.fail_load = 1 << 40, (0, errno.EIO)
    with pytest.raises(errors.ReadFailed), slot.stage(one, keep=True) as staging:
        staging.wait()
    assert slot.info().staged == 0, "nor what has failed"


def test_abort(slot: Slot, one: Path) -> None:
    with slot.stage(one) as staging:
        staging.abort()
        assert staging.closed
        with pytest.raises(errors.Closed):
            staging.abort()
    with slot.stage(one) as staging:
        slot.abort(staging.number)
        with pytest.raises(errors.LoadCancelled):
            staging.wait()
        with pytest.raises(errors.NoSuchGeneration):
            staging.abort()
    with slot.stage(one) as staging:
        staging.wait()
        slot.commit(staging.number)
        assert staging.wait()
        assert staging.info().state == "active"
    assert slot.info().active == 3


@pytest.mark.parametrize(
    ("number", "cls"),
    [
        (errno.EIO, errors.ReadFailed),
        (errno.ENOSPC, errors.PoolExhausted),
        (errno.ENOMEM, errors.OutOfMemory),
        (errno.EDQUOT, errors.QuotaExceeded),
        (errno.EBADMSG, errors.WrongContents),
        (errno.ECANCELED, errors.LoadCancelled),
        (errno.ENODEV, errors.TensormemError),
    ],
)
def test_loads_that_fail(
    models: Models, slot: Slot, one: Path, two: Path, number: int, cls: type[Exception]
) -> None:
    slot.swap(one)
    models.fail_load = (1 << 20, number)
    with pytest.raises(cls) as info, slot.stage(two) as staging:
        staging.wait()
    assert type(info.value) is cls
    assert f"cannot load {two}" in str(info.value)
    with pytest.raises(cls):
        slot.swap(two)
    with slot.stage(two) as staging:
        with pytest.raises(cls):
            staging.wait()
        with pytest.raises(errors.GenerationFailed):
            staging.commit()
        assert staging.info().error == number
        with pytest.raises(errors.GenerationFailed, match="it has failed"):
            staging.check()
    assert (slot.info().active, slot.info().staged) == (1, 0)
    with slot.acquire() as gen:
        assert gen.metadata == {"is": "one"}


def test_sha256(slot: Slot, one: Path) -> None:
    digest = sha(one)
    slot.swap(one, sha256=digest)
    slot.swap(one, sha256=digest.upper())
    slot.swap(one, sha256=bytes.fromhex(digest))
    with pytest.raises(errors.WrongContents):
        slot.swap(one, sha256=digest[:-1] + ("0" if digest[-1] != "0" else "1"))
    assert slot.info().active == 3
    for bad in ("", digest[:-1], digest + "0", "g" * 64, b"x" * 31, 5):
        with pytest.raises(errors.InvalidArgument, match="SHA-256"):
            slot.stage(one, sha256=bad)  # type: ignore[arg-type]


def test_a_file_that_gets_bad_while_it_is_loaded(
    models: Models, slot: Slot, one: Path, two: Path
) -> None:
    slot.swap(one)

    def damage(done: int, size: int) -> None:
        if not done:
            with two.open("r+b") as file:
                file.write(b"\xff" * 16)

    with pytest.raises(errors.ModelFileError):
        slot.swap(two, report=damage)
    assert (slot.info().active, slot.info().staged) == (1, 0)
    with pytest.raises(errors.WrongContents):
        slot.swap(one, report=lambda done, size: os.truncate(one, 100))


def test_an_interrupted_swap(models: Models, slot: Slot, one: Path) -> None:
    def stop(done: int, size: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        slot.swap(one, report=stop)
    assert (slot.info().active, slot.info().staged) == (0, 0)
    assert models.freed == [1]


def test_load(slot: Slot, one: Path, tmp_path: Path) -> None:
    with slot.load(one) as staging, slot.acquire(staging.number) as gen:
        assert gen.state == "staged"
        assert np.array_equal(gen.tensor("a"), weights(1)["a"])
    assert slot.info().staged == 0, "nobody committed it"
    with slot.load(one, keep=True) as staging:
        kept = staging.number
    assert slot.info().staged == kept
    slot.abort(kept)
    with pytest.raises(errors.WrongContents), slot.load(one, keep=True, sha256="0" * 64):
        raise AssertionError
    assert slot.info().staged == 0, "what is not right is not kept"

    with slot.stage(one), pytest.raises(errors.SlotBusy, match=f"cannot stage {one}"):
        slot.swap(one)

    def remove(done: int, size: int) -> None:
        with contextlib.suppress(errors.NoSuchSlot):
            slot.remove()

    with pytest.raises(errors.LoadCancelled), slot.load(one, report=remove):
        raise AssertionError


def test_delta(slot: Slot, tmp_path: Path) -> None:
    path = tmp_path / "m"
    data = random.Random(1).randbytes(6 << 20)
    path.write_bytes(data)
    slot.swap(path, check=False)
    path.write_bytes(data[: 2 << 20] + b"x" + data[(2 << 20) + 1 :])
    slot.swap(path, check=False)
    with slot.acquire() as gen:
        assert gen.info().shared_bytes == 4 << 20
        assert gen.info().private_bytes == 2 << 20


# -- generations -----------------------------------------------------------------------------


def test_numbers(slot: Slot, one: Path, two: Path) -> None:
    with pytest.raises(errors.NoSuchGeneration, match="the active generation"):
        slot.acquire()
    with pytest.raises(errors.NoSuchGeneration):
        slot.rollback()
    slot.swap(one)
    with pytest.raises(errors.NoSuchGeneration, match="previous"):
        slot.rollback()
    slot.swap(two)
    staged = slot_stage(slot, one)
    for number, state, which in (
        (1, "previous", "one"),
        (2, "active", "two"),
        (3, "staged", "one"),
    ):
        with slot.acquire(number) as gen:
            assert (gen.number, gen.state, gen.metadata["is"]) == (number, state, which)
    with tensormem.slot("chat") as reader, pytest.raises(errors.SlotDenied):
        reader.acquire(staged)
    with pytest.raises(errors.NoSuchGeneration, match="generation 9"):
        slot.acquire(9)
    for bad in (-1, "x", 1 << 64):
        with pytest.raises(errors.InvalidArgument):
            slot.acquire(bad)  # type: ignore[arg-type]
    for wrong in (0, 1, 2, 4):
        with pytest.raises(errors.NoSuchGeneration):
            slot.commit(wrong)
        with pytest.raises(errors.NoSuchGeneration):
            slot.abort(wrong)
    with pytest.raises(errors.NoSuchGeneration):
        slot.rollback(2)
    assert slot.rollback(1) == 1
    assert slot.rollback() == 2
    info = slot.info()
    assert (info.active, info.previous, info.staged, info.generations) == (2, 1, 3, 3)
    slot.commit(3)
    assert slot.info().generations == 2


def test_a_staged_generation_can_be_tried(models: Models, slot: Slot, one: Path) -> None:
    with slot.stage(one) as staging:
        with slot.acquire(staging.number) as gen:
            assert gen.state == "loading"
            for call in (gen.buffer, lambda: gen.tensors, lambda: gen.tensor("a")):
                with pytest.raises(errors.StillLoading):
                    call()
            staging.wait()
            assert np.array_equal(gen.tensor("a"), weights(1)["a"])
        staging.commit()


def test_superseded(models: Models, slot: Slot, one: Path, two: Path) -> None:
    slot.swap(one)
    with slot.acquire() as gen:
        assert not gen.superseded()
        assert not gen.wait(timeout=0)
        assert not gen.wait(timeout=0.01)
        models.others.append(lambda: slot.swap(two))
        assert gen.wait()
        assert gen.superseded()
        slot.rollback()
        assert not gen.superseded()
        slot.remove()
        assert gen.superseded()
        assert gen.wait(5)
        assert gen.state == "retired"
        assert np.array_equal(gen.tensor("a"), weights(1)["a"])


def test_a_generation_that_fails(models: Models, slot: Slot, one: Path) -> None:
    slot.swap(one, cached=True)
    with slot.acquire() as gen, slot.acquire() as late:
        assert gen.info().cached
        gen.tensor("a")
        models.others.append(lambda: models.slots["chat"].fail(1, errno.ETXTBSY))
        with pytest.raises(errors.GenerationFailed, match="open for writing"):
            gen.wait()
        assert gen.superseded()
        assert (gen.state, gen.info().error) == ("failed", errno.ETXTBSY)
        with pytest.raises(errors.GenerationFailed, match="open for writing"):
            late.buffer()


def test_an_evictable_generation(models: Models, slot: Slot, one: Path) -> None:
    slot.swap(one)
    slot.swap(one, evictable=True)
    size = one.stat().st_size
    with slot.acquire() as gen:
        its = gen.info()
        assert (its.evictable, its.private_bytes, its.shared_bytes) == (True, size, 0)
        assert slot.evict(size=1 << 20) == 1 << 20
        assert slot.evict(2) == size - (1 << 20)
        assert slot.evict() == 0
        assert (gen.info().evicted_bytes, gen.info().private_bytes) == (size, 0)
        assert np.array_equal(gen.tensor("a"), weights(1)["a"])
    with pytest.raises(errors.InvalidArgument, match="generation 1 of 'chat' is not evictable"):
        slot.evict(1)
    with pytest.raises(errors.NoSuchGeneration, match="cannot evict generation 7 of 'chat'"):
        slot.evict(7)
    with pytest.raises(errors.InvalidArgument, match="a cached generation is not evictable"):
        slot.stage(one, cached=True, evictable=True)
    with tensormem.slot("chat") as reader, pytest.raises(errors.SlotDenied):
        reader.evict()
    assert slot.info().staged == 0


def test_watch(models: Models, slot: Slot, one: Path, two: Path) -> None:
    with tensormem.slot("chat") as watcher:
        assert list(watcher.watch(timeout=0)) == []
        slot.swap(one)
        slot.swap(two)
        assert list(watcher.watch(timeout=0)) == [2]
        assert list(watcher.watch(timeout=0)) == []
        slot.rollback()
        with watcher.acquire() as gen:
            assert gen.number == 1
        assert list(watcher.watch(timeout=0)) == [], "it was acquired"
        models.others += [slot.rollback, lambda: slot.swap(one), slot.remove]
        assert list(watcher.watch()) == [2, 3]
        assert list(watcher.watch()) == []


def test_remove(slot: Slot, one: Path) -> None:
    slot.swap(one)
    gen = slot.acquire()
    array = gen.tensor("b")
    slot.remove()
    for call in (slot.info, slot.acquire, slot.remove, lambda: slot.stage(one), slot.rollback):
        with pytest.raises(errors.NoSuchSlot, match="was removed"):
            call()
    with pytest.raises(errors.NoSuchSlot):
        tensormem.slot("chat")
    assert np.array_equal(array, weights(1)["b"])
    gen.close()
    with tensormem.slot("chat", exclusive=True) as again:
        assert again.info().last == 0


def test_refusals_close_what_came_with_them(models: Models, slot: Slot, one: Path) -> None:
    slot.swap(one)
    models.fail[abi.IOC_MODEL_INFO] = errno.ENOMEM
    with pytest.raises(errors.OutOfMemory):
        slot.acquire()
    del models.fail[abi.IOC_MODEL_INFO]
    gc.collect()
    assert len(models.descriptors) == 1


@pytest.mark.parametrize(
    ("error", "cls", "words"),
    [
        (OSError(errno.ENOMEM, "no"), errors.OutOfMemory, r"ulimit -v"),
        (OverflowError("too large"), errors.OutOfMemory, r"ulimit -v"),
        (OSError(errno.ESTALE, "no"), errors.GenerationFailed, "cannot map 2.3 MiB"),
        (OSError(errno.EOPNOTSUPP, "no"), errors.NotCacheable, "cannot map 2.3 MiB"),
    ],
)
def test_mappings_that_fail(
    monkeypatch: pytest.MonkeyPatch,
    slot: Slot,
    one: Path,
    error: Exception,
    cls: type[Exception],
    words: str,
) -> None:
    slot.swap(one)
    with slot.acquire() as gen:

        def refused(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr("fakemodel.FakeGeneration.map", refused)
        with pytest.raises(cls, match=words):
            gen.tensor("a")
        monkeypatch.undo()


def test_reprs(slot: Slot, one: Path) -> None:
    assert repr(slot) == "<tensormem.Slot 'chat'>"
    with slot.stage(one) as staging:
        assert repr(staging) == f"<tensormem.Staging 1 of 'chat': {one}>"
        staging.wait()
        staging.commit()
    gen = slot.acquire()
    assert "generation 1 of 'chat': 2.3 MiB" in repr(gen)
    gen.close()
    slot.close()
    assert "closed" in repr(gen)
    assert "closed" in repr(slot)


# -- who keeps what alive ---------------------------------------------------------------------


def test_arrays_outlive_everything(models: Models, one: Path, two: Path) -> None:
    slot = tensormem.slot("chat", create=True)
    slot.swap(one)
    gen = slot.acquire()
    array, view = gen.tensor("b"), gen.tensor("b").data[3:5]
    part = gen.tensor("b")[::2, ::3]
    gen.close()
    gen.close()
    slot.swap(two)
    slot.swap(two)
    slot.remove()
    slot.close()
    del gen, slot
    gc.collect()
    assert sorted(models.freed) == [2, 3]
    assert np.array_equal(array, weights(1)["b"])
    del array
    gc.collect()
    assert np.array_equal(np.asarray(view), weights(1)["b"][3:5])
    view.release()
    del view
    gc.collect()
    assert 1 not in models.freed
    assert np.array_equal(part, weights(1)["b"][::2, ::3])
    del part
    gc.collect()
    assert models.freed[2:] == [1]


def test_calls_after_close(slot: Slot, one: Path) -> None:
    slot.swap(one)
    gen = slot.acquire()
    gen.tensor("a")
    gen.close()
    assert gen.closed
    assert gen.fileno() == -1
    for call in (gen.info, gen.superseded, gen.wait, gen.buffer, lambda: gen.tensor("a")):
        with pytest.raises(errors.Closed, match="generation 1 of 'chat' is closed"):
            call()
    slot.close()
    slot.close()
    for request in (slot.info, slot.acquire, slot.remove, lambda: next(slot.watch())):
        with pytest.raises(errors.Closed, match="'chat' is closed"):
            request()


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_ends(models: Models, one: Path, seed: int) -> None:
    rng = random.Random(seed)
    slot = tensormem.slot("chat", create=True)
    things: list[Any] = [slot]
    expected: list[tuple[Any, Any]] = []
    for number in (1, 2, 3):
        safetensors.save(one, weights(number), {})
        slot.swap(one)
        gen = slot.acquire()
        array = gen.tensor("b")
        expected.append((array, weights(number)["b"]))
        things += [gen, gen.tensor("b").T, gen.tensor("b").data]
    cycle: list[Any] = [things[2]]
    cycle.append(cycle)
    del slot, gen, array, cycle
    rng.shuffle(things)
    while things:
        thing = things.pop()
        if rng.random() < 0.5 and hasattr(thing, "close"):
            thing.close()
        del thing
        if rng.random() < 0.3:
            gc.collect()
        for array, contents in expected:
            assert np.array_equal(array, contents)
    assert 1 not in models.freed
    del array, contents
    expected.clear()
    gc.collect()
    assert models.freed == [1], "the others are in the slot"


def test_the_fake_poisons(models: Models, slot: Slot, one: Path) -> None:
    slot.swap(one)
    state = models.slots["chat"].active
    assert state is not None
    copy = os.dup(state.fd)
    slot.remove()
    assert os.pread(copy, 4, 0) == bytes([POISON]) * 4
    os.close(copy)


def in_child(work: Any) -> None:
    """Run something in a child of fork() and check that it went well."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            signal.alarm(30)
            work()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_fork(models: Models, slot: Slot, one: Path) -> None:
    slot.swap(one)
    gen = slot.acquire()
    array = gen.tensor("b")

    def child() -> None:
        nonlocal array
        assert np.array_equal(array, weights(1)["b"])
        assert np.array_equal(gen.tensor("c"), weights(1)["c"])
        gen.close()
        slot.close()
        assert np.array_equal(array, weights(1)["b"])
        del array
        gc.collect()

    in_child(child)
    assert np.array_equal(array, weights(1)["b"])
    assert np.array_equal(gen.tensor("c"), weights(1)["c"])
    gen.close()


def test_fork_while_another_thread_works(slot: Slot, one: Path) -> None:
    slot.swap(one)
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            with slot.acquire() as gen:
                gen.tensor("a")

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(5):
            pid = os.fork()
            if not pid:
                signal.alarm(30)
                # the session's lock may have been held by the thread that is not here
                slot.close()
                os._exit(0 if slot.fileno() == -1 else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        over.set()
        thread.join()


def test_a_child_does_not_abort_its_parents_load(models: Models, slot: Slot, one: Path) -> None:
    with slot.stage(one) as staging:

        def child() -> None:
            with pytest.raises(SystemExit), staging:
                raise SystemExit
            assert abi.IOC_MODEL_ABORT not in models.calls

        in_child(child)
        assert staging.wait()
        staging.commit()
    assert slot.info().active == 1


def test_threads(slot: Slot, one: Path, two: Path) -> None:
    slot.swap(one)
    expected = {"one": weights(1)["b"], "two": weights(2)["b"]}
    over = threading.Event()
    wrong: list[str] = []

    def read() -> None:
        while not over.is_set():
            with slot.acquire() as gen:
                array = gen.tensor("b")
                if not np.array_equal(array, expected[gen.metadata["is"]]):
                    wrong.append(repr(gen))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        slot.swap(two)
        slot.rollback()
        with slot.stage(one) as staging:
            staging.abort()
    over.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert slot.info().last == 41


# -- descriptors ---------------------------------------------------------------------------------


def test_from_fd(monkeypatch: pytest.MonkeyPatch, models: Models, slot: Slot, one: Path) -> None:
    slot.swap(one)
    state = models.slots["chat"].active
    assert state is not None
    sent = FakeGeneration(state)
    monkeypatch.setattr(KernelDevice, "of", lambda fd: models.descriptors[fd])
    monkeypatch.setattr(model_module, "KernelDevice", KernelDevice)
    with Generation.from_fd(sent.fileno()) as gen:
        assert gen.number == 1
        assert np.array_equal(gen.tensor("a"), weights(1)["a"])
        assert "generation 1:" in repr(gen)
    assert sent.fd < 0


def test_the_kernels_own_device(tmp_path: Path) -> None:
    """What the real device makes of an ordinary file, which is what a generation is to it."""
    path = tmp_path / "file"
    path.write_bytes(b"x" * 5000)
    device = KernelDevice.of(os.open(path, os.O_RDONLY))
    mapping = device.map(0, 5000, write=False)
    assert np.frombuffer(mapping, np.uint8).sum() == 5000 * ord("x")
    assert not np.frombuffer(mapping, np.uint8).flags.writeable
    with pytest.raises(PermissionError):
        device.map(0, 4096)
    assert device.pread(10, 4995) == b"x" * 5
    assert device.pread(10, 5000) == b""
    assert device.poll(select.POLLIN, None) == select.POLLIN
    device.close()
    read, write = os.pipe()
    device = KernelDevice.of(read)
    assert device.poll(select.POLLIN, 0) == 0
    assert device.poll(select.POLLIN, 0.001) == 0
    os.close(write)
    assert device.poll(select.POLLIN, 0) & select.POLLHUP
    device.close()
    # not the module's: the call is not known there
    with pytest.raises(errors.IncompatibleModule):
        Generation.from_fd(os.open(path, os.O_RDONLY))
