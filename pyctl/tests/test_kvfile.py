# SPDX-License-Identifier: MIT
"""Saved sequences: what comes back, what is refused, and what a kill leaves."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import pickle
import signal
import stat
import subprocess
import sys
import textwrap
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fake import FakeDevice
from fakekv import PAGE, FakeKV
from tensormem import Client, KVCache, KVFileError, KVGroup, KVSequence, abi, errors, kvfile
from tensormem import safetensors as st

HERE = Path(__file__).parent

FULL = KVGroup(2, 2, PAGE // 64, np.float16)
WINDOW = KVGroup([5], 1, PAGE // 64, np.float32, window=24)
STATE = KVGroup([6, 7], dtype=np.float64, state=(3, 5))
GROUPS = [FULL, WINDOW, STATE]
LENGTH = 70


def state_of(kv: KVCache) -> Any:
    device = kv._session.device
    assert isinstance(device, FakeKV)
    return device.state


def fill(seq: KVSequence, length: int, seed: int = 1) -> list[int]:
    """Give a sequence random KV and return its tokens; a call for each, as a decoder has."""
    rng = np.random.default_rng(seed)
    tokens = [int(x) for x in rng.integers(-(1 << 62), 1 << 62, length)]
    for begin in range(0, length, 7):
        seq.extend(min(7, length - begin))
        for group in seq._cache.groups:
            assert isinstance(group.layers, tuple)
            for layer in group.layers:
                arrays = [seq.state(layer)]  if group.state is not None else [
                    seq.k(layer)[begin:], seq.v(layer)[begin:]
                ]  # fmt: skip
                for array in arrays:
                    bits = rng.integers(0, 256, array.nbytes, np.uint8)
                    array[...] = bits.view(array.dtype).reshape(array.shape)
    return tokens


def contents(seq: KVSequence) -> list[bytes]:
    """Return all that a sequence holds."""
    found = []
    for group in seq._cache.groups:
        assert isinstance(group.layers, tuple)
        for layer in group.layers:
            if group.state is not None:
                found.append(seq.state(layer).tobytes())
            else:
                first = seq.first(layer)
                found += [seq.k(layer)[first:].tobytes(), seq.v(layer)[first:].tobytes()]
    return found


@pytest.fixture
def kv(client: Client) -> KVCache:
    return client.kv_cache(GROUPS, max_tokens=128, block_tokens=32)


@pytest.fixture
def saved(kv: KVCache, tmp_path: Path) -> tuple[Path, list[int], list[bytes]]:
    """Return a file, its tokens and what the sequence held."""
    path = tmp_path / "seq.safetensors"
    with kv.sequence() as seq:
        tokens = fill(seq, LENGTH)
        seq.save(path, tokens, "a model")
        return path, tokens, contents(seq)


Saved = tuple[Path, list[int], list[bytes]]


def test_what_is_saved_comes_back(kv: KVCache, saved: Saved, client: Client) -> None:
    path, tokens, before = saved
    for cache in (kv, client.kv_cache(GROUPS, max_tokens=80, block_tokens=32)):
        seq, ids = cache.restore(path, "a model", tenant=4)
        assert seq.tenant == 4
        assert seq.length == LENGTH
        assert ids.tolist() == tokens
        assert contents(seq) == before
        assert seq.first(5) == 32
        # and goes on
        seq.extend(5)
        assert seq.length == LENGTH + 5
        seq.close()


def test_prefixes_are_published_again(client: Client, tmp_path: Path) -> None:
    with client.kv_cache([FULL], 128) as kv, kv.sequence() as seq:
        tokens = fill(seq, LENGTH)
        before = seq.k(1)[:64].tobytes()
        seq.save(tmp_path / "a", tokens, "m")
    # without a window, blocks may have another size
    with client.kv_cache([FULL], 128, block_tokens=32, events=True) as kv:
        kv.restore(tmp_path / "a", "m", tenant=3)[0].close()
        assert [e.type for e in kv.events(0)] == ["stored"] * 2
        with kv.sequence(tenant=3) as seq:
            assert seq.match(tokens) == 64
            assert seq.k(1).tobytes() == before
        with kv.sequence(tenant=3) as seq:
            assert seq.match(tokens[:50]) == 49


def test_the_file_is_safetensors(saved: Saved) -> None:
    path, tokens, before = saved
    arrays = st.load(path)
    names = ["tokens", "state.6", "state.7", "k.5", "v.5", "k.0", "v.0", "k.1", "v.1"]
    assert list(arrays) == names
    assert arrays["tokens"].tolist() == tokens
    assert arrays["k.5"].shape == (LENGTH - 32, 1, PAGE // 64)
    assert arrays["k.5"].dtype == np.float32
    assert arrays["v.1"].shape == (LENGTH, 2, PAGE // 64)
    assert arrays["state.6"].shape == (3, 5)
    assert sorted(a.tobytes() for n, a in arrays.items() if n != "tokens") == sorted(before)
    metadata = st.read_header(path).metadata
    assert (metadata["format"], metadata["version"]) == ("tensormem-kv", "1")
    assert (metadata["length"], metadata["block_tokens"]) == (str(LENGTH), "32")
    assert metadata["fingerprint"] == "a model"
    assert json.loads(metadata["groups"])[1] == {
        "layers": [5], "dtype": "float32", "heads": 1, "dim": PAGE // 64, "window": 24,
        "first": 32,
    }  # fmt: skip
    sums = json.loads(metadata["sha256"])
    assert sums == {n: hashlib.sha256(a.tobytes()).hexdigest() for n, a in arrays.items()}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_read_describes(saved: Saved) -> None:
    path, tokens, _ = saved
    seen: list[tuple[int, int]] = []
    file = kvfile.read(path, lambda done, total: seen.append((done, total)))
    assert (file.fingerprint, file.length, file.block_tokens) == ("a model", LENGTH, 32)
    assert file.tokens.tolist() == tokens
    assert [g["layers"] for g in file.groups] == [[0, 1], [5], [6, 7]]
    assert file.size == path.stat().st_size
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] == st.read_header(path).data_size


def test_save_reports_progress_and_wants_all_tokens(kv: KVCache, tmp_path: Path) -> None:
    path = tmp_path / "x"
    with kv.sequence() as seq:
        with pytest.raises(errors.InvalidArgument, match="empty cannot be saved"):
            seq.save(path, [], "m")
        tokens = fill(seq, 40)
        for wrong in (tokens[:-1], [*tokens, 1], [0.5] * 40):
            with pytest.raises(errors.InvalidArgument):
                seq.save(path, wrong, "m")  # type: ignore[arg-type]
        assert os.listdir(tmp_path) == []
        seen: list[tuple[int, int]] = []
        seq.save(path, tokens, "m", lambda done, total: seen.append((done, total)))
        assert seen == sorted(seen)
        assert seen[-1] == (st.read_header(path).data_size,) * 2
    with pytest.raises(errors.NoSuchSequence):
        seq.save(path, tokens, "m")


def test_packed_kv_is_unpacked_first(client: Client, tmp_path: Path) -> None:
    with client.kv_cache([FULL], 128) as kv, kv.sequence() as seq:
        tokens = fill(seq, LENGTH)
        assert seq.pack().blocks
        seq.save(tmp_path / "a", tokens, "m")
        assert seq.info().packed == 0
        seq.pack()
        state_of(kv).limit = state_of(kv).total(state_of(kv).blocks)
        with pytest.raises(errors.CacheFull, match="cannot unpack"):
            seq.save(tmp_path / "b", tokens, "m")
    assert os.listdir(tmp_path) == ["a"]


def test_tokens_that_were_cut_off_are_not_saved(client: Client, tmp_path: Path) -> None:
    with client.kv_cache([FULL], 128) as kv, kv.sequence() as seq:
        tokens = fill(seq, 100)
        view = seq.k(0)
        seq.truncate(20)
        seq.save(tmp_path / "a", tokens[:20], "m")
        assert view.shape[0] == 100
        assert kvfile.read(tmp_path / "a").length == 20


# -- what is refused -------------------------------------------------------------------


def refused(kv: KVCache, path: Path, words: str, fingerprint: str = "a model") -> None:
    """Check that a file is refused, and that nothing came of it."""
    state = state_of(kv)
    before = (dict(state.sequences), set(state.blocks), dict(state.found), dict(state.cached))
    calls = len(kv._session.device.calls)  # type: ignore[attr-defined]
    with pytest.raises(KVFileError, match=words) as info:
        kv.restore(path, fingerprint)
    assert before == (state.sequences, state.blocks, state.found, dict(state.cached))
    assert len(kv._session.device.calls) == calls  # type: ignore[attr-defined]
    assert info.value.path == str(path)
    assert info.value.reason in str(info.value)
    assert isinstance(info.value, ValueError)
    copy = pickle.loads(pickle.dumps(info.value))
    assert (copy.path, copy.reason, str(copy)) == (str(path), info.value.reason, str(info.value))


def test_every_flipped_bit_is_noticed(kv: KVCache, saved: Saved, tmp_path: Path) -> None:
    path = tmp_path / "flipped"
    good = bytearray(saved[0].read_bytes())
    start = st.read_header(saved[0]).data_start
    rng = np.random.default_rng(5)
    # every bit of the length, one of each byte of the header, and some of the data
    places = [*range(64), *(byte * 8 + int(rng.integers(8)) for byte in range(8, start))]
    places += [int(x) for x in rng.integers(start * 8, len(good) * 8, 300)]
    places += [start * 8, len(good) * 8 - 1]
    for place in places:
        good[place // 8] ^= 1 << place % 8
        path.write_bytes(good)
        with pytest.raises(KVFileError):
            kvfile.read(path)
        good[place // 8] ^= 1 << place % 8
    good[start + 100] ^= 4
    path.write_bytes(good)
    refused(kv, path, "tensor 'tokens' is damaged: its sum is another")
    good[start + 100] ^= 4
    good[-1] ^= 128
    path.write_bytes(good)
    refused(kv, path, "tensor 'v.1' is damaged")


def test_every_length_is_noticed(kv: KVCache, saved: Saved, tmp_path: Path) -> None:
    path = tmp_path / "cut"
    good = saved[0].read_bytes()
    start = st.read_header(saved[0]).data_start
    for length in [*range(start + 9), *range(start, len(good), 997), len(good) - 1]:
        path.write_bytes(good[:length])
        with pytest.raises(KVFileError):
            kvfile.read(path)
    path.write_bytes(good[:-1])
    refused(kv, path, "past the end")
    for tail in (b"\0", b" " * 8, good):
        path.write_bytes(good + tail)
        refused(kv, path, "data: the file has")
    path.write_bytes(b"")
    refused(kv, path, "length: the file has 0 bytes")


def test_foreign_files(kv: KVCache, saved: Saved, tmp_path: Path, client: Client) -> None:
    refused(kv, saved[0], "another model: its fingerprint is 'a model', not 'b'", "b")
    path = tmp_path / "other"
    st.save(path, {"k.0": np.zeros(3)})
    refused(kv, path, "not a saved sequence")
    path.write_bytes(os.urandom(500))
    refused(kv, path, "length")
    with pytest.raises(FileNotFoundError):
        kv.restore(tmp_path / "nothing", "a model")
    dim = PAGE // 64
    for groups, words in (
        ([FULL], "3 groups, the KV cache has 1"),
        ([FULL, STATE, WINDOW], "of group 1 is"),
        ([KVGroup(2, 2, dim, np.int16), WINDOW, STATE], "dtype of group 0 is float16, .* int16"),
        ([KVGroup(2, 4, dim // 2), WINDOW, STATE], "dim of group 0"),
        ([KVGroup(2, 1, dim * 2), WINDOW, STATE], "dim of group 0"),
        ([KVGroup([0, 2], 2, dim), WINDOW, STATE], r"layers of group 0 is \[0, 1\]"),
        ([KVGroup(2, 2, dim, window=9), WINDOW, STATE], "window of group 0 is None"),
        ([FULL, KVGroup([5], 1, dim, "f4", window=25), STATE], "window of group 1 is 24"),
        ([FULL, WINDOW, KVGroup([6, 7], dtype="f8", state=(5, 3))], "state of group 2"),
    ):
        with client.kv_cache(groups, 128, block_tokens=64 * 4) as other:
            refused(other, saved[0], f"another geometry: .*{words}")
    with client.kv_cache(GROUPS, 128, block_tokens=64) as other:
        refused(other, saved[0], "has blocks of 32 tokens, the KV cache of 64")
    with client.kv_cache(GROUPS, LENGTH - 1, block_tokens=32) as other:
        refused(other, saved[0], f"has {LENGTH} tokens; the KV cache takes {LENGTH - 1}")


def forge(path: Path, **changes: Any) -> None:
    """Change the metadata of a file and make its sums right again."""
    header = st.read_header(path)
    data = path.read_bytes()[header.data_start :]
    metadata = header.metadata | {k: v for k, v in changes.items() if k != "entries"}
    metadata = {k: v for k, v in metadata.items() if v is not None}
    entries = changes.get("entries", header.entries)
    metadata["sha256.header"] = "0" * 64
    raw = st.encode_header("x", entries, metadata)
    path.write_bytes(kvfile._sealed(raw, "0" * 64, hashlib.sha256(raw).hexdigest()) + data)


def test_a_header_that_lies(kv: KVCache, saved: Saved) -> None:
    path = saved[0]
    good = path.read_bytes()
    forge(path)
    kv.restore(path, "a model")[0].close()
    header = st.read_header(path)
    groups = json.loads(header.metadata["groups"])
    sums = json.loads(header.metadata["sha256"])

    def group(number: int, **changes: Any) -> str:
        changed = [dict(g) for g in groups]
        changed[number] |= changes
        return json.dumps(changed)

    entries = list(header.entries)
    renamed = [dataclasses.replace(entries[3], name="k.9")]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"version": "2"}, "version 2; this package reads 1"),
        ({"format": "x"}, "not a saved sequence"),
        ({"fingerprint": None}, "the header has no fingerprint"),
        ({"length": None}, "the header has no length"),
        ({"length": "0"}, "length is not a number"),
        ({"length": "-70"}, "length is not a number"),
        ({"length": "7\u0660"}, "length is not a number"),
        ({"length": "71"}, "tensor 'tokens' is not what the groups say"),
        ({"length": str(10**9)}, "a window begins at token 32"),
        ({"block_tokens": "10"}, "a window begins at token 32, not 40"),
        ({"block_tokens": "x"}, "block_tokens is not a number"),
        ({"groups": "["}, "groups is not JSON"),
        ({"groups": "[" * 100_000}, "groups is not JSON"),
        ({"groups": "{}"}, "not those of a KV cache"),
        ({"groups": "[]"}, "has 9 tensors, not 1"),
        ({"groups": group(0, heads=0)}, "not those of a KV cache"),
        ({"groups": group(0, heads=True)}, "not those of a KV cache"),
        ({"groups": group(0, extra=1)}, "not those of a KV cache"),
        ({"groups": group(0, dtype=1)}, "not those of a KV cache"),
        ({"groups": group(0, layers=[])}, "not those of a KV cache"),
        ({"groups": group(0, layers=[-1])}, "not those of a KV cache"),
        ({"groups": group(0, layers=[0])}, "is not what the groups say|has 9 tensors"),
        ({"groups": group(0, layers=[8, 9])}, "layer 8 has no tensor"),
        ({"groups": group(0, layers=[0, 9])}, "tensor 'k.1' is not what the groups say"),
        ({"groups": group(1, first=0)}, "a window begins at token 0, not 32"),
        ({"groups": group(1, window=None, first=0)}, "tensor 'k.5' is not what"),
        ({"groups": group(2, state=[1 << 31, 1 << 31])}, "tensor 'state.6' is not what"),
        ({"groups": group(2, state=[])}, "tensor 'state.6' is not what"),
        ({"sha256": "{}"}, "one sum for each"),
        ({"sha256": "[]"}, "one sum for each"),
        ({"sha256": json.dumps(sums | {"more": "0"})}, "one sum for each"),
        ({"sha256": json.dumps(sums | {"k.0": None})}, "'k.0' is damaged"),
        ({"entries": entries[:3] + renamed + entries[4:]}, "layer 5 has no tensor"),
    ]
    for changes, words in cases:
        path.write_bytes(good)
        forge(path, **changes)
        refused(kv, path, words)
    path.write_bytes(good)
    forge(path, groups=group(0, dtype="int16"))
    refused(kv, path, "dtype of group 0 is int16")
    # a dtype of the format that is not the one for the group's
    path.write_bytes(good)
    wrong = [dataclasses.replace(e, code=e.code.replace("F16", "I16")) for e in entries]
    forge(path, entries=wrong)
    refused(kv, path, "tensor 'k.0' is I16, not float16")


def test_two_sums_in_the_header(kv: KVCache, saved: Saved) -> None:
    path = saved[0]
    # a fingerprint may contain anything
    tricky = f'","sha256.header":"{"0" * 64}","x":"'
    with kv.sequence() as seq:
        seq.save(path, fill(seq, 10), tricky)
    assert kvfile.read(path).fingerprint == tricky
    kv.restore(path, tricky)[0].close()


def test_dtypes_that_numpy_or_the_format_lacks(client: Client, tmp_path: Path) -> None:
    for dtype, code in (("f2", "F16"), ("u1", "U8"), ("c8", "U64"), ("V4", "U32"), (">f4", "F32")):
        itemsize = np.dtype(dtype).itemsize
        groups = [KVGroup(1, 1, PAGE // 16 // itemsize, dtype)]
        with client.kv_cache(groups, 64) as kv, kv.sequence() as seq:
            seq.extend(20)
            seq.k(0).view(np.uint8)[:] = np.random.default_rng(1).integers(
                0, 256, seq.k(0).view(np.uint8).shape
            )
            seq.save(tmp_path / "a", range(20), "m")
            assert st.read_header(tmp_path / "a").entries[1].code == code
            other, _ = kv.restore(tmp_path / "a", "m")
            assert contents(other) == contents(seq)
            other.close()
    with client.kv_cache([KVGroup(1, 1, PAGE // 256, "c16")], 64) as kv, kv.sequence() as seq:
        seq.extend(20)
        with pytest.raises(errors.InvalidArgument, match="16 bytes"):
            seq.save(tmp_path / "b", range(20), "m")


def test_no_room_or_trouble_while_restoring(kv: KVCache, saved: Saved, client: Client,
                                            monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    path = saved[0]
    device = kv._session.device
    assert isinstance(device, FakeKV)
    for request, number, cls in (
        (abi.IOC_KV_OPEN, errno.ENOBUFS, errors.TooManySequences),
        (abi.IOC_KV_EXTEND, errno.ENOSPC, errors.CacheFull),
        (abi.IOC_KV_PUBLISH, errno.EINVAL, errors.InvalidArgument),
    ):
        device.fail = {request: number}
        with pytest.raises(cls):
            kv.restore(path, "a model")
        assert not device.state.sequences
    # without room to publish (a copy of the state) it is restored all the same
    device.fail = {abi.IOC_KV_PUBLISH: errno.ENOSPC}
    kv.restore(path, "a model")[0].close()
    device.fail = {}

    extend = KVSequence.extend

    def meddle(seq: KVSequence, n: int) -> int:
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\0")
        os.utime(path, ns=(0, 0))
        return extend(seq, n)

    monkeypatch.setattr(KVSequence, "extend", meddle)
    with pytest.raises(KVFileError, match="was changed while it was read"):
        kv.restore(path, "a model")
    assert not device.state.sequences
    assert not device.state.found


def test_memory_is_bounded(client: Client, tmp_path: Path) -> None:
    """16 MiB of KV pass through a buffer: there is no second copy."""
    groups = [KVGroup(4, 8, PAGE // 64, np.float32)]
    with client.kv_cache(groups, 1024, limit=64 << 20) as kv, kv.sequence() as seq:
        seq.extend(1024)
        for layer in range(4):
            seq.k(layer)[:] = layer
        size = kv.info().used
        assert size >= 16 << 20
        device = kv._session.device
        assert isinstance(device, FakeKV)
        device.fail = {abi.IOC_KV_PUBLISH: errno.ENOSPC}  # the fake would copy
        tracemalloc.start()
        seq.save(tmp_path / "a", range(1024), "m")
        other, _ = kv.restore(tmp_path / "a", "m")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 << 20
        assert (other.k(3) == 3).all()


# -- kills -----------------------------------------------------------------------------

KILLED = textwrap.dedent("""
    import os, signal, sys
    from pathlib import Path
    from fake import FakeDevice
    from tensormem import Client
    from test_kvfile import GROUPS, fill

    path, at, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    kv = Client(FakeDevice()).kv_cache(GROUPS, 128, block_tokens=32)
    seq = kv.sequence()
    tokens = fill(seq, 70, seed)
    count = 0

    def before(event, args):
        # every step that the file system sees
        global count
        if event in ("open", "os.rename", "os.remove", "fcntl.flock", "os.chmod"):
            step()

    def step():
        global count
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    fsync = os.fsync

    def synced(fd):
        step()
        fsync(fd)
        step()

    os.fsync = synced
    sys.addaudithook(before)
    seq.save(path, tokens, "a model", lambda done, total: step())
    print("done")
    sys.stdout.flush()
    os._exit(0)
""")


def test_a_kill_at_any_point_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "seq"
    results = []
    with Client(FakeDevice()) as client:
        kv = client.kv_cache(GROUPS, 128, block_tokens=32)
        wanted = {}
        for seed in (1, 2):
            with kv.sequence() as seq:
                tokens = fill(seq, 70, seed)
                wanted[seed] = (tokens, contents(seq))
                if seed == 1:
                    seq.save(path, tokens, "a model")
        for at in range(100):
            result = subprocess.run(
                [sys.executable, "-c", KILLED, str(path), str(at), "2"],
                env={**os.environ, "PYTHONPATH": f"{HERE.parent / 'src'}:{HERE}"},
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            restored, ids = kv.restore(path, "a model")
            found = (ids.tolist(), contents(restored))
            results.append(next(seed for seed, want in wanted.items() if want == found))
            restored.close()
            if result.stdout == "done\n":
                break
            assert result.returncode == -signal.SIGKILL, result.stderr
    # the old one for most of the time, then the new one for good
    assert results == sorted(results)
    assert results.count(1) >= 15
    assert results.count(2) >= 2
    # the last one removed what the others had left
    assert os.listdir(tmp_path) == ["seq"]


def test_left_overs_go_and_work_under_way_stays(tmp_path: Path) -> None:
    path = tmp_path / "a"
    dead = tmp_path / ".a.dead.tensormem-part"
    alive = tmp_path / ".a.alive.tensormem-part"
    others = tmp_path / ".b.dead.tensormem-part"
    for file in (dead, alive, others):
        file.write_bytes(b"x")
    with alive.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        st.save(path, {"x": np.zeros(1)})
    assert sorted(os.listdir(tmp_path)) == sorted([alive.name, others.name, "a"])


def test_a_failed_save_leaves_the_old_file(kv: KVCache, saved: Saved,
                                           monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    path, tokens, _ = saved
    old = path.read_bytes()

    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == total:
            raise Stop

    with kv.sequence() as seq:
        tokens = fill(seq, LENGTH, 2)
        with pytest.raises(Stop):
            seq.save(path, tokens, "m", stop)

        def full(fd: int) -> None:
            raise OSError(errno.ENOSPC, "no space")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no space"):
            seq.save(path, tokens, "m")
    assert path.read_bytes() == old
    assert os.listdir(path.parent) == [path.name]
