# SPDX-License-Identifier: MIT
"""Model slots of the Python library and its command on the real device."""

from __future__ import annotations

import array
import gc
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import tensormem
from device import CHUNK, PAGE, SYSFS, read
from process import dies
from tensormem import errors, safetensors
from tensormem.cli import cli
from tensormem.model import Generation, Slot

#: Float32 numbers in a chunk.
NUMBERS = CHUNK // 4


@pytest.fixture
def slot() -> Iterator[Slot]:
    with tensormem.slot("test", exclusive=True, mode=0o600) as opened:
        try:
            yield opened
        finally:
            opened.remove()


def weights(seed: int, chunks: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).random(chunks * NUMBERS + 77, np.float32)


def saved(path: Path, seed: int, chunks: int = 3) -> Path:
    safetensors.save(path, {"w": weights(seed, chunks), "h": np.arange(9, dtype=np.float16)})
    return path


def test_swap_and_read(slot: Slot, tmp_path: Path) -> None:
    path = saved(tmp_path / "one", 1)
    assert slot.swap(path, sha256=hashlib.sha256(path.read_bytes()).hexdigest()) == 1
    with slot.acquire() as gen:
        assert (gen.number, gen.state, gen.size) == (1, "active", path.stat().st_size)
        assert np.array_equal(gen.tensor("w"), weights(1))
        assert gen.tensor("h").tolist() == list(range(9))
        assert bytes(gen.buffer()) == path.read_bytes()
        assert os.pread(gen.fileno(), 16, 3) == path.read_bytes()[3:19]
        assert not gen.tensor("w").flags.writeable
        info = gen.info()
        assert (info.readers, info.error, info.cached) == (1, 0, False)
        assert info.private_bytes == -(-gen.size // PAGE) * PAGE
    assert (slot.info().active, slot.info().mode) == (1, 0o600)


def test_a_gguf_model(slot: Slot, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    blocks = np.zeros(2, [("d", "<f2"), ("qs", "i1", (32,))])
    blocks["d"], blocks["qs"] = [0.5, 2], np.arange(-16, 16)
    header = b"GGUF" + b"".join(n.to_bytes(size, "little") for n, size in ((3, 4), (1, 8), (0, 8)))
    header += (19).to_bytes(8, "little") + b"blk.0.attn_q.weight"
    header += b"".join(n.to_bytes(size, "little") for n, size in ((2, 4), (32, 8), (2, 8), (8, 4), (0, 8)))
    path.write_bytes(header + bytes(-len(header) % 32) + blocks.tobytes())
    slot.swap(path)
    with slot.acquire() as gen:
        assert gen.tensors["blk.0.attn_q.weight"].code == "Q8_0"
        wide = gen.dequantize("blk.0.attn_q.weight")
    assert np.array_equal(wide, np.arange(-16, 16) * np.array([[0.5], [2]]))


def test_arrays_outlive_everything(tmp_path: Path) -> None:
    slot = tensormem.slot("test", exclusive=True)
    slot.swap(saved(tmp_path / "one", 1))
    gen = slot.acquire()
    part = gen.tensor("w")[5:-5:3]
    gen.close()
    for seed in (2, 3):
        slot.swap(saved(tmp_path / "other", seed))
    slot.remove()
    slot.close()
    del gen, slot
    gc.collect()
    assert np.array_equal(part, weights(1)[5:-5:3])
    assert read("model/generations") == 1
    del part
    gc.collect()


def test_in_a_child(slot: Slot, tmp_path: Path) -> None:
    slot.swap(saved(tmp_path / "one", 1))
    gen = slot.acquire()
    held = gen.tensor("w")
    expected = weights(1)

    def child() -> None:
        assert np.array_equal(held, expected)
        assert np.array_equal(gen.tensor("w"), expected)
        gen.close()
        slot.close()
        gc.collect()
        assert np.array_equal(held, expected)

    assert dies(child) == 0
    assert np.array_equal(gen.tensor("w"), expected)
    gen.close()


def test_a_child_does_not_abort_its_parents_load(slot: Slot, tmp_path: Path) -> None:
    with slot.stage(saved(tmp_path / "one", 1)) as staging:

        def child() -> None:
            staging.__exit__(None, None, None)

        assert dies(child) == 0
        assert staging.wait()
        assert staging.commit() == 1


def test_delta(slot: Slot, tmp_path: Path) -> None:
    path = tmp_path / "m"
    data = np.random.default_rng(5).bytes(4 * CHUNK)
    path.write_bytes(data)
    slot.swap(path, check=False)
    path.write_bytes(data[:CHUNK] + b"x" * PAGE + data[CHUNK + PAGE :])
    slot.swap(path, check=False)
    with slot.acquire() as gen:
        assert (gen.info().private_bytes, gen.info().shared_bytes) == (CHUNK, 3 * CHUNK)
        assert bytes(gen.buffer()) == path.read_bytes()


def test_loads_that_fail(slot: Slot, tmp_path: Path) -> None:
    path = saved(tmp_path / "one", 1)
    slot.swap(path)
    with pytest.raises(errors.WrongContents):
        slot.swap(path, sha256="0" * 64)
    with pytest.raises(errors.WrongContents):
        slot.swap(path, size=path.stat().st_size + 1, check=False)
    with pytest.raises(errors.SlotBusy), slot.stage(path):
        slot.stage(path)
    with pytest.raises(errors.InvalidArgument), slot.stage(tmp_path):
        pass
    (tmp_path / "bad").write_bytes(b"nobody knows it")
    with pytest.raises(errors.ModelFileError):
        slot.swap(tmp_path / "bad")
    with pytest.raises(errors.NoSuchGeneration):
        slot.rollback()
    info = slot.info()
    assert (info.active, info.previous, info.staged) == (1, 0, 0)
    with slot.acquire() as gen:
        assert np.array_equal(gen.tensor("w"), weights(1))


def test_beyond_the_quota(tmp_path: Path) -> None:
    with tensormem.open() as client:
        client.set_quota(2 * CHUNK)
        with client.slot("test", exclusive=True) as slot:
            with pytest.raises(errors.QuotaExceeded):
                slot.swap(saved(tmp_path / "one", 1))
            assert slot.info().staged == 0
            slot.swap(saved(tmp_path / "small", 1, chunks=1))
            slot.remove()


def test_a_cached_generation(slot: Slot, tmp_path: Path) -> None:
    path = saved(tmp_path / "one", 1)
    before = read("model/held")
    slot.swap(path, cached=True)
    assert read("model/held") == before
    with slot.acquire() as gen:
        held = gen.tensor("w")
        assert gen.info().cached
        assert np.array_equal(held, weights(1))
        # another file in its place is none of its business
        saved(path, 2)
        assert np.array_equal(held, weights(1))
        assert not gen.wait(timeout=0)
    slot.swap(path, cached=True)
    with slot.acquire() as gen:
        held = gen.tensor("w")
        with path.open("r+b") as file:
            file.write(b"x" * PAGE)
        with pytest.raises(errors.GenerationFailed):
            gen.wait(timeout=60)
        assert gen.state == "failed"
        with pytest.raises(OSError, match="Stale"):
            os.pread(gen.fileno(), 1, 0)
        assert dies(lambda: held.sum()) == signal.SIGBUS
        assert slot.rollback() == 1
    with slot.acquire() as gen:
        assert np.array_equal(gen.tensor("w"), weights(1))
    with path.open("ab"), pytest.raises(errors.FileBusy):
        slot.swap(path, cached=True, check=False)


def test_news_from_another_process(slot: Slot, tmp_path: Path) -> None:
    path = saved(tmp_path / "one", 1)
    slot.swap(path)
    with tensormem.slot("test") as watcher, slot.acquire() as gen:
        news = watcher.watch(timeout=60)
        assert next(news) == 1
        assert not gen.superseded()
        assert not gen.wait(timeout=0)
        command = [sys.executable, "-m", "tensormem", "model", "swap", "test", str(path)]
        other = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        assert gen.wait(timeout=60)
        assert next(news) == 2
        assert other.wait() == 0
        assert gen.state == "previous"


def test_a_descriptor_of_a_generation(slot: Slot, tmp_path: Path) -> None:
    slot.swap(saved(tmp_path / "one", 1))
    ours, theirs = socket.socketpair()
    with slot.acquire() as gen:
        rights = array.array("i", [gen.fileno()])
        ours.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    slot.swap(saved(tmp_path / "two", 2))
    _, ancillary, _, _ = theirs.recvmsg(1, socket.CMSG_SPACE(4))
    fd = array.array("i", ancillary[0][2])[0]
    with Generation.from_fd(fd) as gen:
        assert (gen.number, gen.state) == (1, "previous")
        assert np.array_equal(gen.tensor("w"), weights(1))
    ours.close()
    theirs.close()


def test_who_may_what(slot: Slot, tmp_path: Path) -> None:
    path = saved(tmp_path / "one", 1)
    slot.swap(path)
    with tensormem.open() as client:

        def stranger() -> None:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            for write in (False, True):
                with pytest.raises(errors.SlotDenied):
                    client.slot("test", write=write)

        def guest() -> None:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            with client.slot("test") as reader, reader.acquire() as gen:
                assert gen.number == 1
                with pytest.raises(errors.SlotDenied):
                    reader.commit(1)

        assert dies(stranger) == 0
        os.fchmod(slot.fileno(), 0o604)
        assert slot.info().mode == 0o604
        assert dies(guest) == 0
        os.fchown(slot.fileno(), 65534, 65534)
        assert (slot.info().uid, slot.info().gid) == (65534, 65534)


# -- the command ---------------------------------------------------------------------------


def command(*arguments: object, code: int = 0) -> str:
    # in this process: to begin another takes an emulated board seconds
    result = CliRunner().invoke(cli, list(map(str, arguments)), prog_name="tensormem")
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.output


def test_the_whole_life_of_a_slot(tmp_path: Path) -> None:
    one, two = saved(tmp_path / "one", 1), saved(tmp_path / "two", 2)
    assert "mode 0660" in command("model", "create", "cli")
    try:
        command("model", "swap", "cli", one)
        command("model", "stage", "cli", two)
        shown = json.loads(command("model", "show", "cli", "--json"))
        assert [g["state"] for g in shown["generations"]] == ["active", "staged"]
        assert (shown["active"], shown["staged"], shown["mode"]) == (1, 2, "0660")
        command("model", "commit", "cli")
        assert json.loads(command("model", "rollback", "cli", "--json"))["active"] == 1
        command("model", "stage", "cli", two)
        command("model", "abort", "cli")
        assert "SHA-256" in command("model", "swap", "cli", one, "--sha256", "0" * 64, code=1)
        listed = json.loads(command("model", "list", "--json"))["slots"]
        assert [(s["name"], s["active"], s["previous"]) for s in listed] == [("cli", 1, 2)]
        assert command("model", "watch", "cli", "--timeout", "0.1").count("generation 1") == 1
    finally:
        command("model", "remove", "cli")


def test_an_interrupt_in_the_middle_of_a_load(slot: Slot, tmp_path: Path) -> None:
    slot.swap(saved(tmp_path / "one", 1))
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(128 << 20)
    line = [sys.executable, "-m", "tensormem", "model", "swap", "test", str(large), "--no-check"]
    other = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while not int((SYSFS / "model/test/staged").read_text()):
        assert time.monotonic() < end and other.poll() is None
    other.send_signal(signal.SIGINT)
    said = "".join(other.communicate(timeout=60))
    assert other.returncode == 1, said
    assert "the staged generation was aborted, generation 1 stays active" in said
    assert "Traceback" not in said
    assert (slot.info().active, slot.info().staged) == (1, 0)


def test_the_demo_mixes_no_models() -> None:
    found = json.loads(command("demo", "--swap", "3", "--json"))
    assert found["different"] == []
    assert {text["generation"] for text in found["texts"]} == set(range(1, 5))
    assert all(text["equal"] for text in found["texts"])
    assert any(text["overtaken"] for text in found["texts"])
