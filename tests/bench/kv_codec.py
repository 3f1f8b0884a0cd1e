# SPDX-License-Identifier: MIT
"""How well KV packs, and what it costs: arrangements of its bytes, codecs, unit sizes.

Runs in the guest. The keys and values are those of the demo's model after 512 tokens
of its text, as they are (fp32) and rounded to fp16 and bf16. kmod/tests/tm_bench_codec.c
has the kernel's codecs. Prints tables; nothing here has a bound.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tensormem.demo.model import ArrayKV, Config, Decoder, HeapMemory, encode
from tensormem.demo.run import text
from tensormem.safetensors import load, read_header

MODULE = Path(__file__).parents[2] / "kmod/tests/tm_bench_codec.ko"
DEBUGFS = Path("/sys/kernel/debug/tm_bench_codec")
TOKENS = 512
UNITS = (16 << 10, 64 << 10, 128 << 10)
#: All planes but the first layer's V, and units of 64 tokens of them in fp32.
PLANES_WITHOUT = np.array([0, 2, 3, 4, 5, 6, 7])
REST = (64 << 10) // 8 * len(PLANES_WITHOUT)
CODECS = ("lz4", "zstd-1", "zstd-3")

#: Numbers as bits: [..., tokens, channels].
Bits = npt.NDArray[np.unsignedinteger]


def model(checkpoint: str) -> tuple[dict[str, npt.NDArray[np.float32]], Config]:
    """The demo's weights and their shape."""
    path = Path(str(files("tensormem.demo") / f"demo-{checkpoint}.safetensors"))
    return load(path), Config.from_json(read_header(path).metadata["config"])


@cache
def keys_and_values(checkpoint: str) -> npt.NDArray[np.float32]:
    """K and V of each layer: [planes, tokens, channels]."""
    weights, config = model(checkpoint)
    kv = ArrayKV(config, HeapMemory())
    Decoder(weights, config, HeapMemory(), kv).prefill(encode(text())[:TOKENS])
    planes = [plane(i) for i in range(config.layers) for plane in (kv.k, kv.v)]
    return np.stack(planes).reshape(len(planes), TOKENS, -1)


def bf16(x: npt.NDArray[np.float32]) -> Bits:
    """Rounded to nearest even; there are no NaNs."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


TYPES: dict[str, Callable[[npt.NDArray[np.float32]], Bits]] = {
    "fp32": lambda x: x.view(np.uint32),
    "fp16": lambda x: x.astype(np.float16).view(np.uint16),
    "bf16": bf16,
}


def rotated(x: Bits) -> Bits:
    """Left by one bit: the sign goes last."""
    one, last = x.dtype.type(1), x.dtype.type(8 * x.itemsize - 1)
    return x << one | x >> last


def by_channel(x: Bits) -> Bits:
    """A channel's numbers of all tokens side by side."""
    return np.ascontiguousarray(x.swapaxes(-1, -2))


def xored(x: Bits) -> Bits:
    return np.concatenate([x[..., :1], x[..., 1:] ^ x[..., :-1]], axis=-1)


def differences(x: Bits) -> Bits:
    return np.concatenate([x[..., :1], x[..., 1:] - x[..., :-1]], axis=-1)


@dataclass(frozen=True)
class Arrangement:
    """How the bytes of a unit are put before the codec.

    Attributes:
        numbers: what is done to the numbers.
        planes: bytes of one significance together, the highest first.
        apart: and the codec called for each of them.
    """

    numbers: Callable[[Bits], Bits] = lambda x: x
    planes: bool = True
    apart: bool = True


ARRANGEMENTS = {
    "as it is": Arrangement(planes=False, apart=False),
    "planes": Arrangement(apart=False),
    "planes apart": Arrangement(),
    "rotated, planes apart": Arrangement(rotated),
    "channel, rotated, planes apart": Arrangement(lambda x: by_channel(rotated(x))),
    "channel, rotated, XOR, planes apart": Arrangement(lambda x: xored(by_channel(rotated(x)))),
    "channel, rotated, difference, planes apart": Arrangement(lambda x: differences(by_channel(rotated(x)))),
}
#: What kmod/core/planes.c does.
CHOSEN = "rotated, planes apart"


def units(x: Bits, size: int) -> list[Bits]:
    """Cut into units of ``size`` bytes, each of some tokens of all planes."""
    tokens = size // (x.shape[0] * x.shape[2] * x.itemsize)
    return [np.ascontiguousarray(x[:, at : at + tokens]) for at in range(0, x.shape[1], tokens)]


def arranged(arrangement: Arrangement, unit: Bits) -> bytes:
    numbers = np.ascontiguousarray(arrangement.numbers(unit))
    if not arrangement.planes:
        return numbers.tobytes()
    octets = numbers.view(np.uint8).reshape(-1, unit.itemsize)
    return octets[:, ::-1].T.tobytes()


def give(data: bytes) -> None:
    # one write: the file's size is where the last one ended
    with (DEBUGFS / "data").open("wb", buffering=0) as file:
        view = memoryview(data)
        while view:
            view = view[file.write(view) :]


def put(name: str, value: int) -> None:
    (DEBUGFS / name).write_text(str(value))


def codecs(data: bytes, segment: int) -> dict[str, tuple[float, ...]]:
    """By codec: packed part of the size, instructions per byte there and back."""
    give(data)
    put("segment", segment)
    lines = (line.split() for line in (DEBUGFS / "codecs").read_text().splitlines())
    return {name: tuple(int(value) / len(data) for value in values) for name, *values in lines}


def planes(data: bytes, unit: int, element: int) -> tuple[float, ...]:
    """Instructions per byte of kmod/core/planes.c, there and back."""
    give(data)
    put("unit", unit)
    put("element", element)
    _, *values = (DEBUGFS / "planes").read_text().split()
    return tuple(int(value) / len(data) for value in values)


def table(name: str, x: Bits, size: int) -> None:
    print(f"# {name}, units of {size >> 10} KiB: packed part; instructions per byte to pack and unpack")
    print(f"# {'':<44}" + "".join(f"{codec:>21}" for codec in CODECS))
    for arrangement_name, arrangement in ARRANGEMENTS.items():
        data = b"".join(arranged(arrangement, unit) for unit in units(x, size))
        found = codecs(data, size // x.itemsize if arrangement.apart else size)
        cells = "".join(f"{p:>9.4f}{there:>6.1f}{back:>6.1f}" for p, there, back in (found[c] for c in CODECS))
        print(f"# {arrangement_name:<44}{cells}")
    # C order: what the kernel has in a block
    data = b"".join(unit.tobytes() for unit in units(x, size))
    there, back = planes(data, size, x.itemsize)
    print(f"# {CHOSEN} takes {there:.1f} and {back:.1f} instructions per byte, which come on top", flush=True)


@contextmanager
def codec_module() -> Iterator[None]:
    """What :func:`codecs` and :func:`planes` ask is there."""
    subprocess.run(["modprobe", "-a", "lz4", "zstd"], check=True)
    subprocess.run(["insmod", MODULE], check=True)
    try:
        yield
    finally:
        subprocess.run(["rmmod", "tm_bench_codec"], check=True)


def main() -> None:
    with codec_module():
        for checkpoint in "ab":
            x = keys_and_values(checkpoint)
            for name, cast in TYPES.items():
                for size in UNITS:
                    table(f"checkpoint {checkpoint}, {name}", cast(x), size)
                # V of the first layer depends on the token alone and comes again with it: in a
                # model of more layers, and more tokens than there are bytes, it is a small part
                table(f"checkpoint {checkpoint}, {name} without the first layer's V", cast(x)[PLANES_WITHOUT], REST)


if __name__ == "__main__":
    main()
