# SPDX-License-Identifier: MIT
"""Rows of kv.json: runs in the guest, prints ``NAME OURS PEER`` lines."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import kv_attention
import kv_codec
import numpy as np
from alloc import SYSFS, fill_reserve

import tensormem
from tensormem.demo import requests
from tensormem.demo.model import Config, Decoder, HeapMemory, Model, encode
from tensormem.demo.run import kv_cache, opened, text
from tensormem.safetensors import load

#: Zeroed chunks that are ready: a sequence of kv_blocks.c has 44.
CHUNKS = 60
#: Tokens of the sequence that is saved and restored.
LONG = 4096
#: 128 KiB of the demo's KV; a block of TinyLlama has 176 KiB.
BLOCK_TOKENS = 128


def groups(config: Config) -> list[tensormem.KVGroup]:
    return [tensormem.KVGroup(config.layers, config.kv_heads, config.head_dim, np.float32)]


def attention(client: tensormem.Client) -> None:
    """The row, and what it would be where query heads share keys and values."""
    shape = (kv_attention.TOKENS, kv_attention.KV_HEADS, kv_attention.DIM)
    group = tensormem.KVGroup(1, *shape[1:], np.float32)
    rng = np.random.default_rng(2)
    with client.kv_cache([group], max_tokens=shape[0], max_sequences=1) as kv, kv.sequence() as seq:
        # a block at a time, as a sequence grows
        while seq.length < shape[0]:
            seq.extend(kv.block_tokens)
        keys, values = seq.k(0), seq.v(0)
        keys[:] = rng.standard_normal(shape, np.float32)
        values[:] = rng.standard_normal(shape, np.float32)
        for block_tokens in (8, 16, 32):
            ours, peer = kv_attention.measure(keys, values, 1, block_tokens)
            print(f"# attention, blocks of {block_tokens}: {ours / peer:.4f}", flush=True)
            if block_tokens == 16:
                print(f"attention {ours} {peer}", flush=True)
        ours, peer = kv_attention.measure(keys, values, 4, 16)
        print(f"# attention, 4 query heads for each key/value head: {ours / peer:.4f}", flush=True)
        del keys, values


def pack(client: tensormem.Client, checkpoint: str, block_tokens: int) -> tuple[int, int]:
    """Bytes of the demo's packed KV in whole pages, and what LZ4 makes of the same blocks, in bytes."""
    _, config = kv_codec.model(checkpoint)
    planes = kv_codec.keys_and_values(checkpoint)
    tokens = planes.shape[1]
    with (
        client.kv_cache(groups(config), max_tokens=tokens, max_sequences=1, block_tokens=block_tokens) as kv,
        kv.sequence() as seq,
    ):
        seq.extend(tokens)
        arrays = [array(layer) for layer in range(config.layers) for array in (seq.k, seq.v)]
        for array, plane in zip(arrays, planes, strict=True):
            array[:] = plane.reshape(array.shape)
        packed = seq.pack()
        if packed.blocks != tokens // kv.block_tokens:
            sys.exit(f"compress: {packed.blocks} blocks were packed")
        # a touch brings each back
        for array, plane in zip(arrays, planes, strict=True):
            if not np.array_equal(array.view(np.uint32), plane.reshape(array.shape).view(np.uint32)):
                sys.exit("compress: not what was packed")
        del array, arrays
    bits = planes.view(np.uint32)
    size = block_tokens * bits.shape[0] * bits.shape[2] * bits.itemsize
    data = b"".join(unit.tobytes() for unit in kv_codec.units(bits, size))
    lz4, *_ = kv_codec.codecs(data, size)["lz4"]
    return packed.after, round(lz4 * len(data))


def compress(client: tensormem.Client) -> None:
    """The row: both checkpoints together."""
    with kv_codec.codec_module():
        for block_tokens in (32, 64, BLOCK_TOKENS):
            found = [pack(client, checkpoint, block_tokens) for checkpoint in "ab"]
            ours, peer = (sum(column) for column in zip(*found, strict=True))
            print(f"# compress, blocks of {block_tokens} tokens: {ours / peer:.4f}", flush=True)
        print(f"compress {ours} {peer}", flush=True)


def restore(client: tensormem.Client) -> None:
    """The row: the demo's KV over and over; computing it takes at least as often as long.

    At least, because attention over more tokens takes longer: computing all 4,096 of
    them takes about three times what is counted here, and minutes of the emulator.
    """
    weights, config = kv_codec.model("b")
    tokens = encode(text())[:LONG]
    begin = time.perf_counter_ns()
    Decoder(weights, config, HeapMemory()).prefill(tokens[: kv_codec.TOKENS])
    peer = (time.perf_counter_ns() - begin) * (LONG // kv_codec.TOKENS)
    planes = np.tile(kv_codec.keys_and_values("b"), (1, LONG // kv_codec.TOKENS, 1))
    planes = planes.reshape(len(planes), LONG, config.kv_heads, config.head_dim)
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as folder,
        client.kv_cache(groups(config), max_tokens=LONG, max_sequences=2) as kv,
    ):
        path = Path(folder) / "sequence"
        with kv.sequence() as seq:
            seq.extend(LONG)
            for layer in range(config.layers):
                seq.k(layer)[:], seq.v(layer)[:] = planes[2 * layer], planes[2 * layer + 1]
            seq.save(path, tokens, "bench")
        begin = time.perf_counter_ns()
        seq, restored = kv.restore(path, "bench")
        ours = time.perf_counter_ns() - begin
        with seq:
            if not np.array_equal(restored, tokens) or not all(
                np.array_equal(seq.k(i), planes[2 * i]) and np.array_equal(seq.v(i), planes[2 * i + 1])
                for i in range(config.layers)
            ):
                sys.exit("restore: not what was saved")
    print(f"restore {ours} {peer}", flush=True)


def fit(client: tensormem.Client) -> None:
    """The row: bytes for each running request of the demo's trace, on average of all passes.

    Equal output is for the tests to prove; the peak is the pass in which sequences hold most.
    """
    with opened("b") as (path, config, _):
        model = Model(load(path), config, HeapMemory())
    running, limit = requests.RUNNING, requests.LIMIT
    with kv_cache(client, config, max_sequences=running, limit=limit) as kv:
        report = requests.serve(model, kv, requests.trace(), running=running)
    for name, moment in (("peak", report.peak), ("mean", report.mean)):
        print(f"# fit, {name}: {moment.held:.0f} held and {moment.cached:.0f} cached of {limit} bytes by"
              f" {moment.running:.1f} requests; contiguous {moment.contiguous:.0f},"
              f" private {moment.private:.0f}", flush=True)  # fmt: skip
    each = report.mean.per_sequence()
    print(f"fit {each.held:.0f} {each.contiguous:.0f}", flush=True)


def blocks(program: Path) -> None:
    """The rows of kv_blocks.c, with its chunks ready and none zeroed in the background."""
    fill_reserve(CHUNKS)
    capacity = SYSFS / "chunk/capacity"
    before = capacity.read_text()
    capacity.write_text(str(CHUNKS))
    subprocess.run([program], check=True)
    capacity.write_text(before)


def main() -> None:
    blocks(Path(sys.argv[1]) / "kv_blocks")
    with tensormem.open() as client:
        attention(client)
        fit(client)
        compress(client)
        restore(client)
    kv_codec.main()


if __name__ == "__main__":
    main()
