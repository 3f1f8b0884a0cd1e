# SPDX-License-Identifier: MIT
"""A small decoder-only transformer in numpy.

The layers are those of the Llama family: RMSNorm, rotary position embedding on
half-split heads, grouped-query attention, SwiGLU, and an embedding that is also
the output matrix unless the file has one of its own. The tensor names are the
usual ones (``model.layers.0.self_attn.q_proj.weight``). A token is a byte.

A :class:`Model` has weights and scratch and no sequence. Keys and values are in a
:class:`KV`, one for each sequence, and are read where they lie: nothing is gathered
and nothing copied. One pass takes tokens of any number of sequences.

What comes out for a token does not depend, to the last bit, on which other tokens
were in its pass or in the passes before. BLAS rounds differently for different numbers of
rows, so every row goes through the weights by itself (one call for all of them), and
attends by itself to as many keys as there are before it. Hence a prefix that another
sequence has computed is the one that this sequence would have computed.

Every array that lives longer than one operation comes from a :class:`Memory`, those of one
pass out of an arena that the next pass resets. The operations write with ``out=``, so that the
hot arrays really are where the provider put them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

__all__ = [
    "KV",
    "ArrayKV",
    "Config",
    "Decoder",
    "HeapMemory",
    "HeapScratch",
    "Memory",
    "Model",
    "Scratch",
    "decode",
    "encode",
]

Floats = npt.NDArray[np.float32]
_PROJECTED = ("queries", "queries_rotated", "new_keys", "new_keys_rotated")
Tokens = Sequence[int] | npt.NDArray[Any]


class Scratch(Protocol):
    """Arrays that are given out for a step and taken back together; ``tensormem.Arena`` is one."""

    def empty(self, shape: int | Sequence[int]) -> npt.NDArray[Any]:
        """Return a float32 array of this shape, until the next reset."""
        ...

    def reset(self) -> None:
        """Take all arrays back."""
        ...


class Memory(Protocol):
    """Whatever can provide arrays; ``tensormem.Client`` is one."""

    def empty(
        self, shape: int | Sequence[int], dtype: npt.DTypeLike = ..., kind: str = ...
    ) -> npt.NDArray[Any]:
        """Return an array of this shape and dtype for this kind of use."""
        ...

    def arena(self, size: int) -> Scratch:
        """Return scratch of at most this many bytes at a time."""
        ...


class HeapScratch:
    """Ordinary numpy memory, allocated anew each time."""

    def empty(self, shape: int | Sequence[int]) -> npt.NDArray[Any]:
        """Return ``np.empty(shape, np.float32)``."""
        return np.empty(shape, np.float32)

    def reset(self) -> None:
        """Do nothing: an array lives as long as somebody has it."""


class HeapMemory:
    """Ordinary numpy memory; the kind makes no difference."""

    def empty(
        self,
        shape: int | Sequence[int],
        dtype: npt.DTypeLike = np.float32,
        kind: str = "activations",
    ) -> npt.NDArray[Any]:
        """Return ``np.empty(shape, dtype)``."""
        return np.empty(shape, dtype)

    def arena(self, size: int) -> HeapScratch:
        """Return scratch without a bound."""
        return HeapScratch()


@dataclass(frozen=True)
class Config:
    """The shape of a model.

    Attributes:
        dim: width of the residual stream.
        layers: number of blocks.
        heads: query heads; ``dim`` is a multiple of it.
        kv_heads: key/value heads; ``heads`` is a multiple of it.
        ffn: width of the SwiGLU layer.
        vocab: tokens; 256 for bytes.
        context: most tokens a sequence may have.
        rope_theta: base of the rotary frequencies.
        eps: added to the mean square in RMSNorm.
    """

    dim: int = 128
    layers: int = 4
    heads: int = 8
    kv_heads: int = 2
    ffn: int = 352
    vocab: int = 256
    context: int = 512
    rope_theta: float = 10000.0
    eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.dim // self.heads

    def to_json(self) -> str:
        """Return the config as one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Config:
        """Parse what :meth:`to_json` wrote.

        Raises:
            ValueError: the text is not JSON, or not of these fields.
        """
        try:
            return cls(**json.loads(text))
        except TypeError as error:
            raise ValueError(f"not a model config: {error}") from None


def encode(text: str) -> npt.NDArray[np.int64]:
    """Return the tokens of a text, int64 of shape (bytes,)."""
    return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int64)


def decode(tokens: Sequence[int] | npt.NDArray[Any]) -> str:
    """Return the text of tokens; bytes that are not UTF-8 become U+FFFD."""
    return bytes(int(t) for t in tokens).decode("utf-8", errors="replace")


class KV(Protocol):
    """The keys and values of one sequence; ``tensormem.KVSequence`` is one."""

    @property
    def length(self) -> int:
        """Tokens it has."""
        ...

    def extend(self, tokens: int) -> int:
        """Make room for more tokens and return how many it has then."""
        ...

    def truncate(self, length: int) -> None:
        """Drop all tokens but the first ``length``."""
        ...

    def k(self, layer: int) -> npt.NDArray[Any]:
        """Return the keys of a layer, of shape (length, kv_heads, head_dim)."""
        ...

    def v(self, layer: int) -> npt.NDArray[Any]:
        """Return the values, likewise."""
        ...


class ArrayKV:
    """Keys and values in arrays as long as the context, from the start.

    Attributes:
        arrays: all of them, by name.
    """

    def __init__(self, config: Config, memory: Memory) -> None:
        """Take the arrays (``kv``) from the provider."""
        self.length = 0
        self.arrays: dict[str, Floats] = {}
        self._context = config.context
        shape = (config.context, config.kv_heads, config.head_dim)
        for name in ("keys", "values"):
            for i in range(config.layers):
                self.arrays[f"{name}.{i}"] = memory.empty(shape, np.float32, kind="kv")

    def extend(self, tokens: int) -> int:
        """Make room for more tokens and return how many there are then.

        Raises:
            ValueError: none, or more than the context has room for.
        """
        if not 0 < tokens <= self._context - self.length:
            raise ValueError(f"{self.length} + {tokens} tokens in a context of {self._context}")
        self.length += tokens
        return self.length

    def truncate(self, length: int) -> None:
        """Drop all tokens but the first ``length``.

        Raises:
            ValueError: there are fewer.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"there are {self.length} tokens, not {length}")
        self.length = length

    def k(self, layer: int) -> Floats:
        """Return the keys of a layer."""
        return self.arrays[f"keys.{layer}"][: self.length]

    def v(self, layer: int) -> Floats:
        """Return the values of a layer."""
        return self.arrays[f"values.{layer}"][: self.length]


class Model:
    """Weights and scratch, for any number of sequences.

    Attributes:
        config: the shape.
        arrays: every array it has from the memory provider, by name; those of a pass
            until the next one.
    """

    #: Tokens that one pass takes at most, of all its sequences together.
    ROWS = 32

    #: Bytes that alignment takes of each array at most: no CPU has longer cache lines.
    LINE = 256

    def __init__(
        self, weights: Mapping[str, npt.NDArray[Any]], config: Config, memory: Memory
    ) -> None:
        """Check the weights and take scratch from the provider.

        Args:
            weights: name -> float32 array; they are used in place, not copied.
            config: the shape they must have.
            memory: where scratch (``activations``) comes from.

        Raises:
            ValueError: a weight is missing or has another shape or dtype.
        """
        self.config = c = config
        self.arrays: dict[str, npt.NDArray[Any]] = {}
        kv_dim, half = c.kv_heads * c.head_dim, c.head_dim // 2
        self._group = c.heads // c.kv_heads

        def weight(name: str, *shape: int) -> Floats:
            if name not in weights:
                raise ValueError(f"the checkpoint has no tensor {name!r}")
            array = weights[name]
            if array.shape != shape or array.dtype != np.float32:
                raise ValueError(
                    f"tensor {name!r} is {array.dtype}{list(array.shape)},"
                    f" the config wants float32{list(shape)}"
                )
            return array

        self._embed = weight("model.embed_tokens.weight", c.vocab, c.dim)
        self._norm = weight("model.norm.weight", c.dim)
        head = self._embed
        if "lm_head.weight" in weights:
            head = weight("lm_head.weight", c.vocab, c.dim)
        self._head_t = head.T
        self._layers: list[dict[str, Floats]] = []
        for i in range(c.layers):
            p = f"model.layers.{i}."
            self._layers.append(
                {
                    "norm1": weight(p + "input_layernorm.weight", c.dim),
                    "q": weight(p + "self_attn.q_proj.weight", c.dim, c.dim).T,
                    "k": weight(p + "self_attn.k_proj.weight", kv_dim, c.dim).T,
                    "v": weight(p + "self_attn.v_proj.weight", kv_dim, c.dim).T,
                    "o": weight(p + "self_attn.o_proj.weight", c.dim, c.dim).T,
                    "norm2": weight(p + "post_attention_layernorm.weight", c.dim),
                    "gate": weight(p + "mlp.gate_proj.weight", c.ffn, c.dim).T,
                    "up": weight(p + "mlp.up_proj.weight", c.ffn, c.dim).T,
                    "down": weight(p + "mlp.down_proj.weight", c.dim, c.ffn).T,
                }
            )

        for name in ("cos", "sin"):
            self.arrays[name] = memory.empty((c.context, half), np.float32, kind="activations")
        self._cos, self._sin = self.arrays["cos"], self.arrays["sin"]
        self._passes: dict[int, dict[str, tuple[int, ...]]] = {}
        sizes = [4 * math.prod(shape) for shape in self._shapes(self.ROWS).values()]
        self._scratch = memory.arena(sum(sizes) + len(sizes) * self.LINE)

        freq = c.rope_theta ** (-np.arange(half, dtype=np.float64) / half)
        angle = np.arange(c.context)[:, None] * freq
        self._cos[:], self._sin[:] = np.cos(angle), np.sin(angle)

    def _shapes(self, n: int) -> dict[str, tuple[int, ...]]:
        """The arrays of a pass of n tokens."""
        c = self.config
        half = c.head_dim // 2
        return {
            "residual": (n, c.dim),
            "normed": (n, c.dim),
            "scratch": (n, c.dim),
            "norm_scale": (n, 1),
            "queries": (n, c.heads, c.head_dim),
            "queries_rotated": (n, c.heads, c.head_dim),
            "new_keys": (n, c.kv_heads, c.head_dim),
            "new_keys_rotated": (n, c.kv_heads, c.head_dim),
            "new_values": (n, c.kv_heads, c.head_dim),
            "rotary_scratch": (n, c.heads, half),
            "attention": (c.heads * c.context,),
            "attention_norm": (c.kv_heads, self._group, 1),
            "context": (n, c.dim),
            "gate": (n, c.ffn),
            "up": (n, c.ffn),
            "sigmoid": (n, c.ffn),
            "logits": (n, c.vocab),
            "cos_of_rows": (n, 1, half),
            "sin_of_rows": (n, 1, half),
        }

    def _begin(self, n: int) -> None:
        """Take the arrays of a pass of n tokens; those of the last pass end."""
        self._scratch.reset()
        shapes = self._passes.get(n)
        if shapes is None:
            shapes = self._passes[n] = self._shapes(n)
        for name, shape in shapes.items():
            self.arrays[name] = self._scratch.empty(shape)

    def check(self, tokens: Tokens) -> npt.NDArray[np.int64]:
        """Return tokens as an array.

        Raises:
            ValueError: one is outside the vocabulary.
        """
        ids = np.asarray(tokens, np.int64)
        if len(ids) and (ids.min() < 0 or ids.max() >= self.config.vocab):
            raise ValueError(f"a token is outside the vocabulary of {self.config.vocab}")
        return ids

    def step(self, batch: Sequence[tuple[KV, Tokens]]) -> Floats:
        """Compute the last tokens of some sequences, and return what follows each of them.

        Args:
            batch: sequences, each once, and the tokens that they end with. The
                sequences have room for these already (``extend``), and the
                keys and values of all tokens before.

        Returns:
            Logits, float32 of shape (tokens, vocab), those of the first sequence first:
            a view of scratch that the next call overwrites.

        Raises:
            ValueError: no token of some sequence, too many at once, one outside the
                vocabulary, or a sequence longer than the context or shorter
                than its tokens.
        """
        c = self.config
        parts = [(kv, self.check(tokens)) for kv, tokens in batch]
        n = sum(len(ids) for _, ids in parts)
        if not parts or n > self.ROWS or not all(len(ids) for _, ids in parts):
            raise ValueError(f"{n} tokens at once; a pass takes 1 to {self.ROWS}")
        spans = [(kv.length - len(ids), kv.length) for kv, ids in parts]
        for begin, end in spans:
            if begin < 0 or end > c.context:
                raise ValueError(f"tokens {begin} to {end} in a context of {c.context}")
        places = np.concatenate([np.arange(begin, end) for begin, end in spans])
        self._begin(n)
        now = self.arrays
        np.take(self._cos, places, axis=0, out=now["cos_of_rows"][:, 0], mode="clip")
        np.take(self._sin, places, axis=0, out=now["sin_of_rows"][:, 0], mode="clip")

        x, h, t = now["residual"], now["normed"], now["scratch"]
        ids = np.concatenate([ids for _, ids in parts])
        np.take(self._embed, ids, axis=0, out=x, mode="clip")
        for i, layer in enumerate(self._layers):
            self._rms(x, layer["norm1"], h)
            self._project(layer, h)
            row = 0
            for (kv, _), (begin, end) in zip(parts, spans, strict=True):
                self._attend(kv.k(i), kv.v(i), row, begin, end)
                row += end - begin
            self._rows(now["context"], layer["o"], t)
            np.add(x, t, out=x)
            self._rms(x, layer["norm2"], h)
            gate, up, sig = now["gate"], now["up"], now["sigmoid"]
            self._rows(h, layer["gate"], gate)
            self._rows(h, layer["up"], up)
            np.negative(gate, out=sig)
            np.exp(sig, out=sig)
            np.add(sig, 1.0, out=sig)
            np.divide(gate, sig, out=gate)
            np.multiply(gate, up, out=gate)
            self._rows(gate, layer["down"], t)
            np.add(x, t, out=x)
        self._rms(x, self._norm, h)
        logits = now["logits"]
        self._rows(h, self._head_t, logits)
        return logits

    @staticmethod
    def _rows(x: Floats, weight: Floats, out: Floats) -> None:
        # a stack of one-row matrices: the rounding of a row is then its own
        np.matmul(x[:, None], weight, out=out[:, None])

    def _rms(self, x: Floats, weight: Floats, out: Floats) -> None:
        scale = self.arrays["norm_scale"]
        np.multiply(x, x, out=out)
        np.mean(out, axis=1, keepdims=True, out=scale)
        np.add(scale, self.config.eps, out=scale)
        np.sqrt(scale, out=scale)
        np.divide(x, scale, out=out)
        np.multiply(out, weight, out=out)

    def _project(self, layer: dict[str, Floats], h: Floats) -> None:
        """Compute queries, keys and values of all rows; the first two rotated."""
        n, now = len(h), self.arrays
        q, qr, k, kr = (now[name] for name in _PROJECTED)
        v = now["new_values"]
        for name, out in (("q", q), ("k", k), ("v", v)):
            self._rows(h, layer[name], out.reshape(n, -1))
        self._rotate(q, qr)
        np.multiply(qr, self.config.head_dim**-0.5, out=qr)
        self._rotate(k, kr)

    def _rotate(self, x: Floats, out: Floats) -> None:
        """Rotate the two halves of the last axis by position; x is (n, any heads, head_dim)."""
        half = x.shape[-1] // 2
        cos, sin = self.arrays["cos_of_rows"], self.arrays["sin_of_rows"]
        a, b = x[..., :half], x[..., half:]
        s = self.arrays["rotary_scratch"][:, : x.shape[1]]
        np.multiply(a, cos, out=out[..., :half])
        np.multiply(b, sin, out=s)
        np.subtract(out[..., :half], s, out=out[..., :half])
        np.multiply(b, cos, out=out[..., half:])
        np.multiply(a, sin, out=s)
        np.add(out[..., half:], s, out=out[..., half:])

    def _attend(self, keys: Floats, values: Floats, row: int, begin: int, end: int) -> None:
        """Store a sequence's new keys and values; attend for each of its rows."""
        c, now = self.config, self.arrays
        keys[begin:end] = now["new_keys_rotated"][row : row + end - begin]
        values[begin:end] = now["new_values"][row : row + end - begin]
        # (length, kv_heads, head_dim) as BLAS takes it: strides, no copies
        keys_t, values_h = keys.transpose(1, 2, 0), values.transpose(1, 0, 2)
        heads = (c.kv_heads, self._group, c.head_dim)
        top = now["attention_norm"]
        for seen in range(begin + 1, end + 1):
            att = now["attention"][: c.heads * seen].reshape(c.kv_heads, self._group, seen)
            np.matmul(now["queries_rotated"][row].reshape(heads), keys_t[..., :seen], out=att)
            np.amax(att, axis=2, keepdims=True, out=top)
            np.subtract(att, top, out=att)
            np.exp(att, out=att)
            np.sum(att, axis=2, keepdims=True, out=top)
            np.divide(att, top, out=att)
            np.matmul(att, values_h[:, :seen], out=now["context"][row].reshape(heads))
            row += 1


class Decoder:
    """A model with one sequence.

    Attributes:
        model: the model.
        kv: keys and values of the sequence.
    """

    def __init__(
        self,
        weights: Mapping[str, npt.NDArray[Any]],
        config: Config,
        memory: Memory,
        kv: KV | None = None,
    ) -> None:
        """Check the weights and take what is needed from the provider.

        Args:
            weights: as :class:`Model` wants them.
            config: the shape of the model.
            memory: where scratch comes from, and keys and values without ``kv``.
            kv: keys and values; tokens that it has already are the first of the
                sequence.

        Raises:
            ValueError: as :class:`Model`.
        """
        self.model = Model(weights, config, memory)
        self.kv: KV = ArrayKV(config, memory) if kv is None else kv

    @property
    def length(self) -> int:
        """Tokens of the sequence."""
        return self.kv.length

    def reset(self) -> None:
        """Forget the sequence."""
        self.kv.truncate(0)

    def forward(self, tokens: Tokens) -> Floats:
        """Append tokens to the sequence and return what follows each of them.

        Args:
            tokens: from 1 to :attr:`Model.ROWS` token ids.

        Returns:
            Logits, float32 of shape (tokens, vocab): a view of scratch that the
            next call overwrites.

        Raises:
            ValueError: no token, too many at once, one outside the vocabulary,
                or the sequence would outgrow the context. It is then as it was.
        """
        ids, context = self.model.check(tokens), self.model.config.context
        if not 1 <= len(ids) <= Model.ROWS:
            raise ValueError(f"{len(ids)} tokens at once; a pass takes 1 to {Model.ROWS}")
        if self.length + len(ids) > context:
            raise ValueError(
                f"{self.length + len(ids)} tokens are more than the context of {context}"
            )
        self.kv.extend(len(ids))
        return self.model.step([(self.kv, ids)])

    def prefill(self, tokens: Tokens) -> int:
        """Append tokens, any number of them, and return the likeliest next one.

        Raises:
            ValueError: as :meth:`forward`; the sequence is then as it was.
        """
        begin = self.length
        if len(tokens) == 0:
            raise ValueError("the prompt is empty")
        try:
            for i in range(0, len(tokens), Model.ROWS):
                logits = self.forward(tokens[i : i + Model.ROWS])
        except BaseException:
            self.kv.truncate(begin)
            raise
        return int(np.argmax(logits[-1]))

    def generate(self, prompt: Tokens, count: int) -> Iterator[int]:
        """Continue a prompt greedily.

        Args:
            prompt: all token ids of the sequence. Those that it has already are not
                computed again.
            count: tokens to yield.

        Yields:
            The tokens that follow, one after the other.

        Raises:
            ValueError: the sequence has all of the prompt or more already, or
                prompt and continuation do not fit into the context.
        """
        context = self.model.config.context
        if len(prompt) + count > context:
            raise ValueError(
                f"{len(prompt)} + {count} tokens are more than the context of {context}"
            )
        if self.length and self.length >= len(prompt):
            raise ValueError(f"the sequence has {self.length} tokens, the prompt {len(prompt)}")
        token = self.prefill(prompt[self.length :])
        for i in range(count):
            yield token
            if i + 1 < count:
                token = int(np.argmax(self.forward([token])[0]))
