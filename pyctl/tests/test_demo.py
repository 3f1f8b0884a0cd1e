# SPDX-License-Identifier: MIT
"""The demo model: what it computes, where its arrays live, what it says."""

from __future__ import annotations

import errno
import hashlib
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fake import FakeDevice
from fakekv import FakeKV
from tensormem import Arena, Client, abi, errors, safetensors
from tensormem.demo import run
from tensormem.demo.model import (
    ArrayKV,
    Config,
    Decoder,
    HeapMemory,
    HeapScratch,
    Memory,
    Model,
    decode,
    encode,
)

FOLDER = Path(str(files("tensormem.demo")))
TEXT = run.text()

Weights = dict[str, npt.NDArray[Any]]


def checkpoint(name: str) -> tuple[Weights, Config, dict[str, str]]:
    path = FOLDER / f"demo-{name}.safetensors"
    metadata = safetensors.read_header(path).metadata
    return safetensors.load(path), Config.from_json(metadata["config"]), metadata


@pytest.fixture(scope="module")
def b() -> tuple[Weights, Config, dict[str, str]]:
    return checkpoint("b")


def random_weights(c: Config, tied: bool = True) -> Weights:
    rng = np.random.default_rng(5)

    def matrix(*shape: int) -> npt.NDArray[np.float32]:
        return (rng.standard_normal(shape) * 0.3).astype(np.float32)

    kv = c.kv_heads * c.head_dim
    w: Weights = {
        "model.embed_tokens.weight": matrix(c.vocab, c.dim),
        "model.norm.weight": 1 + matrix(c.dim),
    }
    if not tied:
        w["lm_head.weight"] = matrix(c.vocab, c.dim)
    for i in range(c.layers):
        p = f"model.layers.{i}."
        w[p + "input_layernorm.weight"] = 1 + matrix(c.dim)
        w[p + "post_attention_layernorm.weight"] = 1 + matrix(c.dim)
        w[p + "self_attn.q_proj.weight"] = matrix(c.dim, c.dim)
        w[p + "self_attn.k_proj.weight"] = matrix(kv, c.dim)
        w[p + "self_attn.v_proj.weight"] = matrix(kv, c.dim)
        w[p + "self_attn.o_proj.weight"] = matrix(c.dim, c.dim)
        w[p + "mlp.gate_proj.weight"] = matrix(c.ffn, c.dim)
        w[p + "mlp.up_proj.weight"] = matrix(c.ffn, c.dim)
        w[p + "mlp.down_proj.weight"] = matrix(c.dim, c.ffn)
    return w


def plain_forward(w: Weights, c: Config, tokens: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Compute logits the textbook way: float64, one head and one position at a time."""
    w = {name: array.astype(np.float64) for name, array in w.items()}
    n, d = len(tokens), c.head_dim

    def rms(x: npt.NDArray[Any], weight: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.stack([row / np.sqrt((row**2).mean() + c.eps) * weight for row in x])

    def rope(v: npt.NDArray[Any], position: int) -> npt.NDArray[Any]:
        out = np.empty_like(v)
        for j in range(d // 2):
            angle = position * c.rope_theta ** (-2 * j / d)
            a, b = v[j], v[j + d // 2]
            out[j] = a * np.cos(angle) - b * np.sin(angle)
            out[j + d // 2] = b * np.cos(angle) + a * np.sin(angle)
        return out

    x = w["model.embed_tokens.weight"][tokens]
    for i in range(c.layers):
        p = f"model.layers.{i}."
        h = rms(x, w[p + "input_layernorm.weight"])
        q, k, v = (h @ w[p + f"self_attn.{s}_proj.weight"].T for s in "qkv")
        mixed = np.zeros_like(q)
        for head in range(c.heads):
            own = slice(head * d, head * d + d)
            shared = head // (c.heads // c.kv_heads)
            theirs = slice(shared * d, shared * d + d)
            for t in range(n):
                score = np.array(
                    [rope(q[t, own], t) @ rope(k[s, theirs], s) / d**0.5 for s in range(t + 1)]
                )
                weight = np.exp(score - score.max())
                mixed[t, own] = (weight / weight.sum()) @ v[: t + 1, theirs]
        x = x + mixed @ w[p + "self_attn.o_proj.weight"].T
        h = rms(x, w[p + "post_attention_layernorm.weight"])
        gate = h @ w[p + "mlp.gate_proj.weight"].T
        up = h @ w[p + "mlp.up_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[p + "mlp.down_proj.weight"].T
    head_matrix = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    out: npt.NDArray[np.float64] = rms(x, w["model.norm.weight"]) @ head_matrix.T
    return out


SMALL = Config(dim=24, layers=2, heads=6, kv_heads=2, ffn=20, vocab=50, context=40)


# -- arithmetic ------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_forward_against_the_textbook(kv_heads: int, tied: bool) -> None:
    c = Config(**{**SMALL.__dict__, "kv_heads": kv_heads})
    weights = random_weights(c, tied)
    tokens = np.random.default_rng(1).integers(0, c.vocab, 13)
    expected = plain_forward(weights, c, tokens)
    found = Decoder(weights, c, HeapMemory()).forward(tokens)
    assert found.shape == (13, c.vocab)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-4)
    assert np.abs(expected).max() > 1, "the comparison would say nothing"


def full_width() -> tuple[Weights, Config]:
    """The widths of the demo model: those for which BLAS rounds by the number of rows."""
    c = Config(context=160)
    return random_weights(c), c


def logits_of(decoder: Decoder, tokens: npt.NDArray[Any], parts: list[int]) -> npt.NDArray[Any]:
    rows, begin = [], decoder.length
    for part in parts:
        rows.append(decoder.forward(tokens[begin : begin + part]).copy())
        begin += part
        assert decoder.length == begin
    return np.concatenate(rows)


@pytest.mark.parametrize("shape", ["small", "full"])
@pytest.mark.parametrize("parts", [[1] * 29, [5, 8, 16], [28, 1], [1, 27, 1]])
def test_passes_make_no_difference(parts: list[int], shape: str) -> None:
    weights, c = (random_weights(SMALL), SMALL) if shape == "small" else full_width()
    tokens = np.random.default_rng(2).integers(0, c.vocab, 29)
    whole = Decoder(weights, c, HeapMemory())
    expected = logits_of(whole, tokens, [29])
    decoder = Decoder(weights, c, HeapMemory())
    np.testing.assert_array_equal(logits_of(decoder, tokens, parts), expected)
    for layer in range(c.layers):
        np.testing.assert_array_equal(decoder.kv.k(layer), whole.kv.k(layer))
        np.testing.assert_array_equal(decoder.kv.v(layer), whole.kv.v(layer))


@pytest.mark.parametrize("seed", range(4))
def test_company_makes_no_difference(seed: int) -> None:
    """Random batches of five sequences, each against itself alone: bit for bit."""
    weights, c = full_width()
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(0, c.vocab, n) for n in (3, 40, 65, 90, 160)]
    alone = [logits_of(Decoder(weights, c, HeapMemory()), t, [1] * len(t)) for t in tokens]
    model = Model(weights, c, HeapMemory())
    caches = [ArrayKV(c, HeapMemory()) for _ in tokens]
    found: list[list[npt.NDArray[Any]]] = [[] for _ in tokens]
    sizes: set[int] = set()
    while any(kv.length < len(t) for kv, t in zip(caches, tokens, strict=True)):
        room, batch = Model.ROWS, []
        for i in rng.permutation(len(tokens)):
            left = len(tokens[i]) - caches[i].length
            n = int(min(left, room, rng.choice([0, 1, 1, 2, 7, 32])))
            if n:
                begin = caches[i].length
                caches[i].extend(n)
                batch.append((i, tokens[i][begin : begin + n]))
                room -= n
        if not batch:
            continue
        logits, row = model.step([(caches[i], part) for i, part in batch]), 0
        assert len(logits) == Model.ROWS - room
        sizes.add(len(batch))
        for i, part in batch:
            found[i].append(logits[row : row + len(part)].copy())
            row += len(part)
    for rows, expected in zip(found, alone, strict=True):
        np.testing.assert_array_equal(np.concatenate(rows), expected)
    assert {1, 2, 3} <= sizes


class Counted(ArrayKV):
    """Remembers what it was extended by."""

    def __init__(self, config: Config, memory: Memory) -> None:
        super().__init__(config, memory)
        self.extended: list[int] = []

    def extend(self, tokens: int) -> int:
        self.extended.append(tokens)
        return super().extend(tokens)


def test_resume_behind_a_prefix() -> None:
    weights, c = full_width()
    prompt = np.random.default_rng(3).integers(0, c.vocab, 50)
    first = Decoder(weights, c, HeapMemory())
    expected = list(first.generate(prompt, 9))
    for matched in (1, 32, 49):
        kv = Counted(c, HeapMemory())
        kv.extend(matched)
        for layer in range(c.layers):
            kv.k(layer)[:] = first.kv.k(layer)[:matched]
            kv.v(layer)[:] = first.kv.v(layer)[:matched]
        decoder = Decoder(weights, c, HeapMemory(), kv=kv)
        assert list(decoder.generate(prompt, 9)) == expected
        whole, rest = divmod(50 - matched, Model.ROWS)
        assert kv.extended == [matched, *([Model.ROWS] * whole), rest, *([1] * 8)]
    with pytest.raises(ValueError, match="the sequence has 58 tokens, the prompt 50"):
        next(decoder.generate(prompt, 9))


def test_the_arrays_are_read_where_they_lie() -> None:
    """Attention is over the arrays of the KV: what is written there shows, and not later."""
    c = SMALL
    decoder = Decoder(random_weights(c), c, HeapMemory())
    tokens = [3, 1, 4, 1, 5]
    expected = decoder.forward(tokens).copy()
    decoder.kv.truncate(4)
    decoder.kv.v(1)[2] += 1.0
    changed = decoder.forward(tokens[4:])[0].copy()
    assert (changed != expected[4]).any()
    decoder.kv.truncate(4)
    decoder.kv.v(1)[2] -= 1.0
    decoder.kv.k(0)[1] *= 0.0
    assert (decoder.forward(tokens[4:])[0] != expected[4]).any()


def test_generated_text_equals_full_recompute(b: tuple[Weights, Config, dict[str, str]]) -> None:
    weights, config, _ = b
    prompt = encode(run.PROMPT)
    tokens = list(Decoder(weights, config, HeapMemory()).generate(prompt, 12))
    again = Decoder(weights, config, HeapMemory())
    for i, token in enumerate(tokens):
        again.reset()
        assert again.prefill([*prompt, *tokens[:i]]) == token


def test_reset_forgets() -> None:
    decoder = Decoder(random_weights(SMALL), SMALL, HeapMemory())
    first = list(decoder.generate([1, 2, 3], 10))
    decoder.reset()
    list(decoder.generate([9, 8], 10))
    decoder.reset()
    assert list(decoder.generate([1, 2, 3], 10)) == first


def test_a_long_prompt_goes_in_several_passes() -> None:
    weights = random_weights(SMALL)
    prompt = np.random.default_rng(4).integers(0, SMALL.vocab, 35)
    assert len(prompt) > Model.ROWS
    expected = int(np.argmax(plain_forward(weights, SMALL, prompt)[-1]))
    assert Decoder(weights, SMALL, HeapMemory()).prefill(prompt) == expected


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([], "0 tokens"),
        ([1] * 33, "33 tokens at once"),
        ([50], "vocabulary"),
        ([-1], "vocabulary"),
    ],
)
def test_bad_tokens(tokens: list[int], words: str) -> None:
    decoder = Decoder(random_weights(SMALL), SMALL, HeapMemory())
    with pytest.raises(ValueError, match=words):
        decoder.forward(tokens)
    assert decoder.length == 0


def test_the_context_is_a_bound() -> None:
    decoder = Decoder(random_weights(SMALL), SMALL, HeapMemory())
    with pytest.raises(ValueError, match="context of 40"):
        decoder.prefill([1] * 41)
    assert decoder.length == 0
    decoder.prefill([1] * 40)
    assert decoder.length == 40
    with pytest.raises(ValueError, match="context"):
        decoder.forward([1])
    with pytest.raises(ValueError, match="context"):
        list(decoder.generate([1] * 30, 11))
    decoder.reset()
    assert len(list(decoder.generate([1] * 30, 10))) == 10
    with pytest.raises(ValueError, match="empty"):
        decoder.prefill([])


def test_wrong_weights() -> None:
    weights = random_weights(SMALL)
    name = "model.layers.1.mlp.up_proj.weight"
    for bad in (weights[name].T.copy(), weights[name].astype(np.float64)):
        with pytest.raises(ValueError, match=re.escape(name)):
            Decoder(weights | {name: bad}, SMALL, HeapMemory())
    del weights[name]
    with pytest.raises(ValueError, match=f"no tensor '{re.escape(name)}'"):
        Decoder(weights, SMALL, HeapMemory())


# -- memory ----------------------------------------------------------------------------


class Counting:
    """Heap memory that remembers what was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def empty(
        self, shape: Any, dtype: npt.DTypeLike = np.float32, kind: str = "activations"
    ) -> npt.NDArray[Any]:
        array = np.empty(shape, dtype)
        self.asked.append((kind, array.nbytes))
        return array

    def arena(self, size: int) -> HeapScratch:
        self.asked.append(("arena", size))
        return HeapScratch()


class PoisonedMemory(HeapMemory):
    """Its scratch is NaN, and what an earlier pass has left is never seen."""

    def arena(self, size: int) -> HeapScratch:
        return PoisonedScratch()


class PoisonedScratch(HeapScratch):
    """Scratch that shows who reads what he has not written."""

    def empty(self, shape: Any) -> npt.NDArray[Any]:
        return np.full(shape, np.nan, np.float32)


def test_kv_and_scratch_come_from_the_provider_once() -> None:
    memory = Counting()
    decoder = Decoder(random_weights(SMALL), SMALL, memory)
    kv = [size for kind, size in memory.asked if kind == "kv"]
    c = SMALL
    assert kv == [c.kv_heads * c.context * c.head_dim * 4] * 2 * c.layers
    assert [kind for kind, _ in memory.asked if kind != "kv"] == ["activations"] * 2 + ["arena"]
    before = len(memory.asked)
    list(decoder.generate([1, 2], 5))
    assert len(memory.asked) == before, "nothing is allocated while generating"
    memory.asked.clear()
    Decoder(random_weights(SMALL), SMALL, memory, kv=decoder.kv)
    assert [kind for kind, _ in memory.asked] == ["activations"] * 2 + ["arena"]


class OneArena(HeapMemory):
    """Heap memory whose arenas are a client's."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.arenas: list[Arena] = []

    def arena(self, size: int) -> Any:
        self.arenas.append(self.client.arena(size, poison=True))
        return self.arenas[-1]


def test_a_pass_in_a_real_arena_fits_and_reads_nothing_of_the_last_one() -> None:
    weights, prompt = random_weights(SMALL), [i % SMALL.vocab for i in range(1, 36)]
    expected = list(Decoder(weights, SMALL, HeapMemory()).generate(prompt, 4))
    with Client(FakeDevice()) as client:
        memory = OneArena(client)
        decoder = Decoder(weights, SMALL, memory)
        assert list(decoder.generate(prompt, 4)) == expected
        (arena,) = memory.arenas
        assert arena.size - 64 * Model.LINE < arena.peak <= arena.size


def test_hot_arrays_are_written_in_place() -> None:
    kv = ArrayKV(SMALL, HeapMemory())
    decoder = Decoder(random_weights(SMALL), SMALL, PoisonedMemory(), kv=kv)
    scratch = decoder.model.arrays
    for array in kv.arrays.values():
        array.fill(np.nan)
    logits = decoder.forward([1, 2, 3])
    assert np.shares_memory(logits, scratch["logits"])
    for name, array in scratch.items():
        assert not np.isnan(array).all(), f"{name} is never used"
    assert len(kv.arrays) == 2 * SMALL.layers
    for cache in kv.arrays.values():
        assert not np.isnan(cache[:3]).any()
        assert np.isnan(cache[3:]).all(), "wrote past the sequence"
    assert not np.isnan(logits).any()


class Grudging(ArrayKV):
    """Has no room beyond some length."""

    def extend(self, tokens: int) -> int:
        if self.length + tokens > 34:
            raise errors.PoolExhausted
        return super().extend(tokens)


def test_no_room_leaves_the_sequence() -> None:
    decoder = Decoder(random_weights(SMALL), SMALL, HeapMemory(), kv=Grudging(SMALL, HeapMemory()))
    decoder.forward([1])
    with pytest.raises(errors.PoolExhausted):
        decoder.prefill([2] * 36)
    assert decoder.length == 1
    expected = decoder.prefill([2] * 33)
    assert decoder.length == 34
    with pytest.raises(errors.PoolExhausted):
        decoder.forward([expected])
    assert decoder.length == 34


def test_array_kv_refuses() -> None:
    kv = ArrayKV(SMALL, HeapMemory())
    for bad in (0, -1, 41):
        with pytest.raises(ValueError, match="in a context of 40"):
            kv.extend(bad)
    assert kv.extend(40) == 40
    for bad in (-1, 41):
        with pytest.raises(ValueError, match="40 tokens, not"):
            kv.truncate(bad)
    assert kv.length == 40


def test_step_refuses() -> None:
    model = Model(random_weights(SMALL), SMALL, HeapMemory())
    kv, other = ArrayKV(SMALL, HeapMemory()), ArrayKV(SMALL, HeapMemory())
    kv.extend(20)
    other.extend(20)
    for batch, words in (
        ([], "0 tokens"),
        ([(kv, [1]), (other, [])], "1 tokens"),
        ([(kv, [1] * 20), (other, [1] * 13)], "33 tokens"),
        ([(kv, [1] * 21)], "tokens -1 to 20"),
        ([(kv, [1]), (other, [50])], "vocabulary"),
    ):
        with pytest.raises(ValueError, match=words):
            model.step(batch)


def test_run_puts_everything_on_the_client() -> None:
    device = FakeDevice()
    with Client(device) as client:
        seen: list[int] = []
        result = run.run(client, count=6, each=seen.append)
        assert seen == result.tokens == result.expected
        assert result.first_difference is None
        assert result.text == decode(seen)
        assert [(h.kind, h.pool) for h in result.holdings] == [
            ("weights", "chunk"),
            ("kv", "kv"),
            ("activations", "buddy"),
        ]
        held = {h.kind: h for h in result.holdings}
        size = (FOLDER / "demo-b.safetensors").stat().st_size
        assert size - 8192 < held["weights"].size <= size + 64 * 50
        assert held["weights"].tensors == 1
        assert (held["weights"].chunks, held["weights"].runs) == (1, 4)
        # the last token is not computed any more
        length, each = len(encode(run.PROMPT)) + 5, run.token_bytes(result.config)
        (kv,) = device.caches.values()
        blocks = -(-length // kv.state.block_tokens)
        assert (held["kv"].tensors, held["kv"].size) == (1, length * each)
        assert (held["kv"].chunks, held["kv"].runs) == (0, blocks)
        assert held["kv"].held == blocks * kv.state.block_tokens * each
        assert result.holdings[2].tensors == 3  # the tables of rotations, and the arena
        assert sum(h.held for h in result.holdings) >= sum(h.size for h in result.holdings)
        assert result.speed > 0
        assert result.numpy_speed > 0
        assert not device.tensors, "all of it is released afterwards"
        assert kv.fd == -1


def test_run_sees_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(client: Client, path: Any) -> Weights:
        weights = safetensors.load_into(client, path)
        weights["model.layers.3.mlp.down_proj.weight"][:] *= -3
        return weights

    monkeypatch.setattr(run, "load_into", damaged)
    with Client(FakeDevice()) as client:
        result = run.run(client, count=20)
    where = result.first_difference
    assert where is not None
    assert result.tokens[:where] == result.expected[:where]
    assert result.tokens[where] != result.expected[where]


@pytest.mark.parametrize(("prompt", "count"), [("", 5), ("x" * 500, 13), ("a", 512)])
def test_run_refuses_what_does_not_fit(prompt: str, count: int) -> None:
    device = FakeDevice()
    with (
        Client(device) as client,
        pytest.raises(errors.InvalidArgument, match="1 to 512 bytes"),
    ):
        run.run(client, prompt=prompt, count=count)
    assert not device.tensors


@pytest.mark.parametrize("quota", [1 << 20, 3 << 20])
def test_run_out_of_memory_leaves_nothing(quota: int) -> None:
    # beyond it are the weights, and then the activations
    device = FakeDevice(quota=quota)
    with Client(device) as client:
        with pytest.raises(errors.QuotaExceeded) as info:
            run.run(client, count=3)
        del info
        assert not device.tensors
        assert all(kv.fd == -1 for kv in device.caches.values())


class Refusing(FakeDevice):
    """Its KV caches refuse one call."""

    def __init__(self, call: int, number: int) -> None:
        super().__init__()
        self.refused = {call: number}

    def other(self, fd: int) -> FakeKV:
        kv = self.caches[fd]
        kv.fail = self.refused
        return kv


@pytest.mark.parametrize(
    ("call", "number", "expected"),
    [
        (abi.IOC_KV_OPEN, errno.ENOMEM, errors.OutOfMemory),
        (abi.IOC_KV_EXTEND, errno.ENOSPC, errors.CacheFull),
    ],
)
def test_run_without_kv_leaves_nothing(
    call: int, number: int, expected: type[errors.TensormemError]
) -> None:
    device = Refusing(call, number)
    with Client(device) as client:
        with pytest.raises(expected) as info:
            run.run(client, count=3)
        del info
        assert not device.tensors
        assert [kv.fd for kv in device.caches.values()] == [-1]


# -- what it says ------------------------------------------------------------------------


@pytest.mark.parametrize("name", run.CHECKPOINTS)
def test_metadata(name: str) -> None:
    path = FOLDER / f"demo-{name}.safetensors"
    assert path.stat().st_size <= 4 << 20
    weights, config, metadata = checkpoint(name)
    digest = hashlib.sha256(TEXT.encode()).hexdigest()
    assert metadata["text_sha256"] == digest, "fitted to another text: run train.py again"
    assert config.layers >= 4
    assert 1 < config.kv_heads < config.heads
    assert float(metadata["loss"]) < 0.2
    assert all(np.isfinite(array).all() for array in weights.values())


def test_checkpoints_are_two_of_one_run() -> None:
    (wa, ca, ma), (wb, cb, mb) = checkpoint("a"), checkpoint("b")
    assert ca == cb
    assert list(wa) == list(wb)
    assert int(ma["step"]) < int(mb["step"])
    assert any((wa[name] != wb[name]).any() for name in wa)


def test_b_continues_the_text_verbatim(b: tuple[Weights, Config, dict[str, str]]) -> None:
    weights, config, _ = b
    decoder = Decoder(weights, config, HeapMemory())
    assert TEXT.startswith(run.PROMPT)
    found = decode(list(decoder.generate(encode(run.PROMPT), 200)))
    assert found == TEXT[len(run.PROMPT) :][:200]
    decoder.reset()
    assert found == decode(list(decoder.generate(encode(run.PROMPT), 200)))
    decoder.reset()
    middle = "The next heavy rain came in April."
    found = decode(list(decoder.generate(encode(middle), 100)))
    assert found == TEXT[TEXT.index(middle) + len(middle) :][:100]


def test_a_is_readable_and_says_something_else(b: tuple[Weights, Config, dict[str, str]]) -> None:
    weights, config, _ = checkpoint("a")
    tokens = list(Decoder(weights, config, HeapMemory()).generate(encode(run.PROMPT), run.TOKENS))
    theirs = list(Decoder(b[0], b[1], HeapMemory()).generate(encode(run.PROMPT), run.TOKENS))
    assert tokens != theirs
    words = (run.PROMPT + decode(tokens)).split()[:-1]
    known = set(TEXT.split())
    assert len(words) > 15
    assert len(set(words)) > 12, "it repeats itself"
    assert [w for w in words if w not in known] == []


def test_text_is_plain() -> None:
    assert TEXT.isascii()
    assert 4000 < len(TEXT) < 8192
    assert TEXT.endswith("\n")
    assert "\t" not in TEXT
