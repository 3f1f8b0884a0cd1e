# SPDX-License-Identifier: MIT
"""A small decoder-only transformer in numpy.

The layers are those of the Llama family: RMSNorm, rotary position embedding on
half-split heads, grouped-query attention, SwiGLU, and an embedding that is also
the output matrix unless the file has one of its own. The tensor names are the
usual ones (``model.layers.0.self_attn.q_proj.weight``). A token is a byte.

Every array that lives longer than one operation comes from a :class:`Memory`:
keys and values as ``kv``, scratch as ``activations``. The operations write with
``out=``, so that the hot arrays really are where the provider put them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["Config", "Decoder", "HeapMemory", "Memory", "decode", "encode"]

Floats = npt.NDArray[np.float32]


class Memory(Protocol):
    """Whatever can provide arrays; ``tensormem.Client`` is one."""

    def empty(
        self, shape: int | Sequence[int], dtype: npt.DTypeLike = ..., kind: str = ...
    ) -> npt.NDArray[Any]:
        """Return an array of this shape and dtype for this kind of use."""
        ...


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


class Decoder:
    """One model with one sequence.

    Attributes:
        config: the shape.
        length: tokens in the KV cache.
        arrays: every array taken from the memory provider, by name.
    """

    #: Tokens that one pass takes at most; a longer prompt goes in several.
    BLOCK = 32

    def __init__(
        self, weights: Mapping[str, npt.NDArray[Any]], config: Config, memory: Memory
    ) -> None:
        """Check the weights and take KV cache and scratch from the provider.

        Args:
            weights: name -> float32 array; they are used in place, not copied.
            config: the shape they must have.
            memory: where KV cache (``kv``) and scratch (``activations``) come from.

        Raises:
            ValueError: a weight is missing or has another shape or dtype.
        """
        self.config = c = config
        self.length = 0
        self.arrays: dict[str, npt.NDArray[Any]] = {}
        q_dim, kv_dim, half = c.dim, c.kv_heads * c.head_dim, c.head_dim // 2
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
                    "q": weight(p + "self_attn.q_proj.weight", q_dim, c.dim).T,
                    "k": weight(p + "self_attn.k_proj.weight", kv_dim, c.dim).T,
                    "v": weight(p + "self_attn.v_proj.weight", kv_dim, c.dim).T,
                    "o": weight(p + "self_attn.o_proj.weight", c.dim, q_dim).T,
                    "norm2": weight(p + "post_attention_layernorm.weight", c.dim),
                    "gate": weight(p + "mlp.gate_proj.weight", c.ffn, c.dim).T,
                    "up": weight(p + "mlp.up_proj.weight", c.ffn, c.dim).T,
                    "down": weight(p + "mlp.down_proj.weight", c.dim, c.ffn).T,
                }
            )

        def array(kind: str, name: str, *shape: int) -> Floats:
            self.arrays[name] = result = memory.empty(shape, np.float32, kind=kind)
            return result

        b = self.BLOCK
        self._keys, self._values = [], []
        for i in range(c.layers):
            shape = (c.kv_heads, c.context, c.head_dim)
            self._keys.append(array("kv", f"keys.{i}", *shape))
            self._values.append(array("kv", f"values.{i}", *shape))
        use = "activations"
        self._x = array(use, "residual", b, c.dim)
        self._h = array(use, "normed", b, c.dim)
        self._t = array(use, "scratch", b, c.dim)
        self._scale = array(use, "norm_scale", b, 1)
        self._q = array(use, "queries", b * q_dim)
        self._qr = array(use, "queries_rotated", b * q_dim)
        self._kn = array(use, "new_keys", b, kv_dim)
        self._vn = array(use, "new_values", b, kv_dim)
        self._rot = array(use, "rotary_scratch", b * q_dim // 2)
        self._att = array(use, "attention", c.heads * b * c.context)
        self._att_max = array(use, "attention_norm", c.heads * b)
        self._ctx = array(use, "context", b * q_dim)
        self._gate = array(use, "gate", b, c.ffn)
        self._up = array(use, "up", b, c.ffn)
        self._sig = array(use, "sigmoid", b, c.ffn)
        self._logits = array(use, "logits", b, c.vocab)
        self._cos = array(use, "cos", c.context, half)
        self._sin = array(use, "sin", c.context, half)
        self._mask = array(use, "mask", b, b)

        freq = c.rope_theta ** (-np.arange(half, dtype=np.float64) / half)
        angle = np.arange(c.context)[:, None] * freq
        self._cos[:], self._sin[:] = np.cos(angle), np.sin(angle)
        self._mask[:] = np.triu(np.full((b, b), -np.inf, np.float32), 1)

    def reset(self) -> None:
        """Forget the sequence."""
        self.length = 0

    def forward(self, tokens: Sequence[int] | npt.NDArray[Any]) -> Floats:
        """Append tokens to the sequence and return what follows each of them.

        Args:
            tokens: from 1 to :attr:`BLOCK` token ids.

        Returns:
            Logits, float32 of shape (tokens, vocab): a view of scratch that the
            next call overwrites.

        Raises:
            ValueError: no token, too many at once, one outside the vocabulary,
                or the sequence would outgrow the context.
        """
        c = self.config
        ids = np.asarray(tokens, np.int64)
        n, begin, end = len(ids), self.length, self.length + len(ids)
        if not 1 <= n <= self.BLOCK:
            raise ValueError(f"{n} tokens at once; a pass takes 1 to {self.BLOCK}")
        if end > c.context:
            raise ValueError(f"{end} tokens are more than the context of {c.context}")
        if ids.min() < 0 or ids.max() >= c.vocab:
            raise ValueError(f"a token is outside the vocabulary of {c.vocab}")

        x, h, t = self._x[:n], self._h[:n], self._t[:n]
        np.take(self._embed, ids, axis=0, out=x, mode="clip")
        for layer, keys, values in zip(self._layers, self._keys, self._values, strict=True):
            self._rms(x, layer["norm1"], h)
            self._attend(layer, h, keys, values, begin, end)
            np.matmul(self._ctx[: n * c.dim].reshape(n, c.dim), layer["o"], out=t)
            np.add(x, t, out=x)
            self._rms(x, layer["norm2"], h)
            gate, up, sig = self._gate[:n], self._up[:n], self._sig[:n]
            np.matmul(h, layer["gate"], out=gate)
            np.matmul(h, layer["up"], out=up)
            np.negative(gate, out=sig)
            np.exp(sig, out=sig)
            np.add(sig, 1.0, out=sig)
            np.divide(gate, sig, out=gate)
            np.multiply(gate, up, out=gate)
            np.matmul(gate, layer["down"], out=t)
            np.add(x, t, out=x)
        self._rms(x, self._norm, h)
        logits = self._logits[:n]
        np.matmul(h, self._head_t, out=logits)
        self.length = end
        return logits

    def _rms(self, x: Floats, weight: Floats, out: Floats) -> None:
        scale = self._scale[: len(x)]
        np.multiply(x, x, out=out)
        np.mean(out, axis=1, keepdims=True, out=scale)
        np.add(scale, self.config.eps, out=scale)
        np.sqrt(scale, out=scale)
        np.divide(x, scale, out=out)
        np.multiply(out, weight, out=out)

    def _rotate(self, x: Floats, begin: int, end: int, out: Floats) -> None:
        """Rotate the two halves of the last axis by position; x is (..., n, head_dim)."""
        half = x.shape[-1] // 2
        cos, sin = self._cos[begin:end], self._sin[begin:end]
        a, b = x[..., :half], x[..., half:]
        s = self._rot[: x.size // 2].reshape(a.shape)
        np.multiply(a, cos, out=out[..., :half])
        np.multiply(b, sin, out=s)
        np.subtract(out[..., :half], s, out=out[..., :half])
        np.multiply(b, cos, out=out[..., half:])
        np.multiply(a, sin, out=s)
        np.add(out[..., half:], s, out=out[..., half:])

    def _attend(
        self,
        layer: dict[str, Floats],
        h: Floats,
        keys: Floats,
        values: Floats,
        begin: int,
        end: int,
    ) -> None:
        c, n, group = self.config, end - begin, self._group
        q = self._q[: n * c.dim]
        kn, vn = self._kn[:n], self._vn[:n]
        np.matmul(h, layer["q"], out=q.reshape(n, c.dim))
        np.matmul(h, layer["k"], out=kn)
        np.matmul(h, layer["v"], out=vn)
        # (n, kv_heads, group, head_dim) -> (kv_heads, group, n, head_dim): all queries
        # that share a key/value head become the rows of one matrix
        rows = (c.kv_heads, group, n, c.head_dim)
        qr = self._qr[: q.size].reshape(rows)
        by_head = q.reshape(n, c.kv_heads, group, c.head_dim).transpose(1, 2, 0, 3)
        self._rotate(by_head, begin, end, qr)
        fresh = (n, c.kv_heads, c.head_dim)
        self._rotate(kn.reshape(fresh).transpose(1, 0, 2), begin, end, keys[:, begin:end])
        values[:, begin:end] = vn.reshape(fresh).transpose(1, 0, 2)

        count = c.heads * n
        att = self._att[: count * end].reshape(c.kv_heads, group * n, end)
        top = self._att_max[:count].reshape(c.kv_heads, group * n, 1)
        np.multiply(qr, c.head_dim**-0.5, out=qr)
        np.matmul(
            qr.reshape(c.kv_heads, group * n, c.head_dim),
            keys[:, :end].transpose(0, 2, 1),
            out=att,
        )
        if n > 1:
            new = att.reshape(c.kv_heads, group, n, end)[..., begin:]
            np.add(new, self._mask[:n, :n], out=new)
        np.amax(att, axis=2, keepdims=True, out=top)
        np.subtract(att, top, out=att)
        np.exp(att, out=att)
        np.sum(att, axis=2, keepdims=True, out=top)
        np.divide(att, top, out=att)
        mixed = qr.reshape(c.kv_heads, group * n, c.head_dim)
        np.matmul(att, values[:, :end], out=mixed)
        np.copyto(
            self._ctx[: n * c.dim].reshape(n, c.kv_heads, group, c.head_dim),
            mixed.reshape(rows).transpose(2, 0, 1, 3),
        )

    def prefill(self, tokens: Sequence[int] | npt.NDArray[Any]) -> int:
        """Append a prompt of any length and return the likeliest next token.

        Raises:
            ValueError: as :meth:`forward`; the sequence is then as it was.
        """
        begin = self.length
        if len(tokens) == 0:
            raise ValueError("the prompt is empty")
        try:
            for i in range(0, len(tokens), self.BLOCK):
                logits = self.forward(tokens[i : i + self.BLOCK])
        except ValueError:
            self.length = begin
            raise
        return int(np.argmax(logits[-1]))

    def generate(self, prompt: Sequence[int] | npt.NDArray[Any], count: int) -> Iterator[int]:
        """Continue a prompt greedily.

        Args:
            prompt: token ids; the sequence begins with them.
            count: tokens to yield.

        Yields:
            The tokens that follow, one after the other.

        Raises:
            ValueError: the prompt is empty, or prompt and continuation do not
                fit into the context.
        """
        if len(prompt) + count > self.config.context:
            raise ValueError(
                f"{len(prompt)} + {count} tokens are more than the context of {self.config.context}"
            )
        self.reset()
        token = self.prefill(prompt)
        for i in range(count):
            yield token
            if i + 1 < count:
                token = int(np.argmax(self.forward([token])[0]))
