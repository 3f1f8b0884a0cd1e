#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Fit the demo model to text.txt: the run that made both checkpoints.

Needs PyTorch, which the package itself does not::

    pip install torch
    python -m tensormem.demo.train --out .

One run, one seed. First the model hears the sentences of the text in wrong orders,
one of them more often than the others, and ``demo-a.safetensors`` is saved. Then it
hears the text as it stands, and ``demo-b.safetensors`` is saved at the end. So both
continue a prompt in readable English, each in its own way. The run takes a few minutes
on one core. It repeats on the same machine and version of PyTorch; elsewhere sums
round differently and the figures drift.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensormem.demo.model import Config
from tensormem.safetensors import save

SEED = 20
BATCH = 12


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, c: Config) -> None:
        """Make the four projections."""
        super().__init__()
        self.c = c
        kv = c.kv_heads * c.head_dim
        self.q_proj = nn.Linear(c.dim, c.dim, bias=False)
        self.k_proj = nn.Linear(c.dim, kv, bias=False)
        self.v_proj = nn.Linear(c.dim, kv, bias=False)
        self.o_proj = nn.Linear(c.dim, c.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attend causally; x is (batch, tokens, dim)."""
        b, n, _ = x.shape
        c = self.c

        def split(y: Tensor, heads: int) -> Tensor:
            return y.view(b, n, heads, c.head_dim).transpose(1, 2)

        def rotate(y: Tensor) -> Tensor:
            lo, hi = y.chunk(2, dim=-1)
            return torch.cat((lo * cos - hi * sin, hi * cos + lo * sin), dim=-1)

        q = rotate(split(self.q_proj(x), c.heads))
        k = rotate(split(self.k_proj(x), c.kv_heads))
        v = split(self.v_proj(x), c.kv_heads)
        group = c.heads // c.kv_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(b, n, c.dim))


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, c: Config) -> None:
        """Make the three projections."""
        super().__init__()
        self.gate_proj = nn.Linear(c.dim, c.ffn, bias=False)
        self.up_proj = nn.Linear(c.dim, c.ffn, bias=False)
        self.down_proj = nn.Linear(c.ffn, c.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, tokens, dim) to the same shape."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and SwiGLU, each behind a norm and beside a residual."""

    def __init__(self, c: Config) -> None:
        """Make the parts under their usual names."""
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.dim, eps=c.eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c.dim, eps=c.eps)
        self.mlp = Mlp(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map (batch, tokens, dim) to the same shape."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(nn.Module):
    """The decoder of model.py, with gradients."""

    def __init__(self, c: Config) -> None:
        """Make all layers and draw their first weights."""
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab, c.dim)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.dim, eps=c.eps)
        half = c.head_dim // 2
        freq = c.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.arange(c.context)[:, None] * freq
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                last = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.04 / (math.sqrt(2 * c.layers) if last else 1))

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits (batch, tokens, vocab) for ids (batch, tokens)."""
        n = ids.shape[1]
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, self.cos[:n], self.sin[:n])
        return self.norm(x) @ self.embed_tokens.weight.T


class Rows:
    """Draws training rows of context + 1 bytes from a text."""

    def __init__(self, text: bytes, length: int, rng: np.random.Generator) -> None:
        """Cut the text into sentences, each with the space behind it."""
        self.text, self.length, self.rng = text, length, rng
        self.sentences = re.findall(rb'[^.?!]+[.?!:]+"?\s+', text)
        starts = np.cumsum([0] + [len(s) for s in self.sentences])
        self.starts = starts[starts <= len(text) - length]

    def shuffled(self) -> bytes:
        """Return the text with its sentences in a random order."""
        return b"".join(self.sentences[i] for i in self.rng.permutation(len(self.sentences)))

    def row(self) -> bytes:
        """Return a piece that begins with a sentence or, half of the time, anywhere."""
        if self.rng.random() < 0.5:
            start = int(self.rng.choice(self.starts))
        else:
            start = int(self.rng.integers(0, len(self.text) - self.length + 1))
        return self.text[start : start + self.length]


def batch(draw: Callable[[], bytes]) -> Tensor:
    """Return BATCH rows, int64 of shape (BATCH, bytes in a row)."""
    rows = [np.frombuffer(draw(), np.uint8).astype(np.int64) for _ in range(BATCH)]
    return torch.from_numpy(np.stack(rows))


def store(path: Path, model: Model, metadata: dict[str, str]) -> None:
    """Write the weights as float32 under their usual names."""
    weights = {f"model.{k}": v.detach().numpy() for k, v in model.state_dict().items()}
    save(path, weights, metadata)


def main() -> None:
    """Train and write both checkpoints."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description="Fit the demo model to its text.")
    parser.add_argument("--text", type=Path, default=here / "text.txt")
    parser.add_argument("--out", type=Path, default=here)
    parser.add_argument("--steps", type=int, default=440)
    parser.add_argument("--early", type=int, default=280, help="last step in wrong order: demo-a")
    parser.add_argument("--every", type=int, default=0, help="also save every N steps")
    args = parser.parse_args()

    torch.set_num_threads(1)  # the order of sums must not depend on the machine's cores
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    config = Config()
    raw = args.text.read_bytes()
    rng = np.random.default_rng(SEED)
    straight = Rows(raw, config.context + 1, rng)
    wrong = Rows(straight.shuffled(), straight.length, straight.rng)

    def draw() -> bytes:
        if step > args.early:
            return straight.row()
        # one wrong order, to have a way to go on; any order, to need few words for it
        return wrong.row() if rng.random() < 0.5 else straight.shuffled()[: straight.length]

    model = Model(config)
    decay = [p for p in model.parameters() if p.dim() == 2]
    plain = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.98))
    peak, warm = 3e-3, 30
    begin, smooth = time.monotonic(), 0.0
    for step in range(1, args.steps + 1):
        cosine = 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1.0, step / warm) * (0.05 + 0.95 * cosine)
        rows = batch(draw)
        logits = model(rows[:, :-1])
        loss = F.cross_entropy(logits.reshape(-1, config.vocab), rows[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        smooth = loss.item() if step == 1 else 0.9 * smooth + 0.1 * loss.item()
        metadata = {
            "config": config.to_json(),
            "step": str(step),
            "loss": f"{smooth:.4f}",
            "text_sha256": hashlib.sha256(raw).hexdigest(),
            "license": "MIT",
        }
        if step % 20 == 0:
            print(f"{step:5d}  loss {smooth:.4f}  {time.monotonic() - begin:6.1f} s", flush=True)
        if args.every and step % args.every == 0:
            store(args.out / f"step-{step}.safetensors", model, metadata)
        if step == args.early:
            store(args.out / "demo-a.safetensors", model, metadata)
        if step == args.steps:
            store(args.out / "demo-b.safetensors", model, metadata)


if __name__ == "__main__":
    main()
