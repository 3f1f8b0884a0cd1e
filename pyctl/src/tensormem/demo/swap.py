# SPDX-License-Identifier: MIT
"""The demo's second half: texts are written while another process swaps the model.

One process writes text after text, each with whichever generation of a model slot is
active when it begins. Another swaps the slot's model between the two checkpoints,
whenever it is asked to, which is in the middle of a text. Every text has to be the one that
the same checkpoint writes in plain numpy memory, to the last bit of the logits behind it: both
know the same story, and each can finish a sentence that the other has begun.
"""

from __future__ import annotations

import hashlib
import json
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .. import errors
from ..model import Generation, Slot, slot
from ..safetensors import load
from . import CHECKPOINTS
from .model import Config, Decoder, HeapMemory, Memory, Tokens, encode
from .run import opened

__all__ = ["Gaps", "OtherProcess", "Report", "Swapper", "Text", "run"]

#: What the texts begin with, in turn. The checkpoints go on differently.
PROMPTS = ("The ", "It was ", "She ")

#: Tokens of a text. Each generation writes one until the next is asked for, which happens so many
#: tokens further on each time: the swaps fall on all places of a text.
LENGTH = 24
STRIDE = 7

#: Texts by (checkpoint, prompt): tokens, and a digest of the logits that they came from.
Texts = Mapping[tuple[str, str], tuple[list[int], str]]


class Swapper(Protocol):
    """Somebody who swaps the model when asked."""

    def ask(self, checkpoint: str) -> None:
        """Ask for a swap to a checkpoint; return at once."""
        ...

    def done(self) -> list[int]:
        """Return the generations that are active or were, in order, since the beginning."""
        ...


class OtherProcess:
    """A process that swaps; used as a context manager it is ended."""

    def __init__(self, name: str) -> None:
        """Start it; ``name`` is the slot's."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tensormem.demo.swap", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        self._done: list[int] = []
        self._rest = b""

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def ask(self, checkpoint: str) -> None:
        """See :meth:`Swapper.ask`."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{checkpoint}\n".encode())

    def done(self) -> list[int]:
        """See :meth:`Swapper.done`.

        Raises:
            TensormemError: the process has failed.
        """
        out = self._process.stdout
        assert out is not None
        while select.select([out], [], [], 0)[0]:
            data = out.read(4096)
            if not data:
                raise errors.TensormemError(
                    "the process that swaps the model has ended", "look at what it said above"
                )
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                answer = json.loads(line)
                if "error" in answer:
                    raise errors.TensormemError(
                        f"the process that swaps the model failed: {answer['error']}"
                    )
                self._done.append(answer["active"])
        return self._done

    def __enter__(self) -> OtherProcess:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End it, and wait until it has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@dataclass(frozen=True)
class Text:
    """One text.

    Attributes:
        generation: the number of the generation that wrote it.
        checkpoint: which one that is, by its own metadata.
        prompt: what it began with.
        tokens: what came of that.
        equal: that is what the checkpoint makes of it in numpy memory, logits and all.
        overtaken: another generation was active when it was finished.
    """

    generation: int
    checkpoint: str
    prompt: str
    tokens: list[int]
    equal: bool
    overtaken: bool


@dataclass(frozen=True)
class Gaps:
    """The times between tokens that follow each other, in seconds.

    Attributes:
        tokens: how many were written.
        median: the time for one.
        longest: the longest, between texts too.
        inside: the longest in the middle of a text.
    """

    tokens: int
    median: float
    longest: float
    inside: float


@dataclass(frozen=True)
class Report:
    """What came out.

    Attributes:
        swaps: done by the other process.
        generations: their numbers, after that of the first one.
        checkpoints: what each of them was asked to be.
        texts: written meanwhile.
        different: those that are not what their checkpoint writes, or that were written by
            another checkpoint than the one the generation was made of.
        during: times between tokens while swaps went on.
        quiet: likewise afterwards, for as many texts.
    """

    swaps: int
    generations: list[int]
    checkpoints: list[str]
    texts: list[Text]
    different: list[Text]
    during: Gaps
    quiet: Gaps


@dataclass
class _Clock:
    """Notes when tokens come."""

    now: Callable[[], float]
    last: float | None = None
    gaps: list[float] = field(default_factory=list)
    inside: list[float] = field(default_factory=list)

    def token(self, first: bool) -> None:
        now = self.now()
        if self.last is not None:
            self.gaps.append(now - self.last)
            if not first:
                self.inside.append(now - self.last)
        self.last = now

    def report(self) -> Gaps:
        return Gaps(
            len(self.gaps) + 1,
            statistics.median(self.inside),
            max(self.gaps),
            max(self.inside),
        )


class _Writer:
    """Writes one text."""

    def __init__(
        self, weights: Mapping[str, npt.NDArray[Any]], config: Config, memory: Memory, prompt: str
    ) -> None:
        self._decoder = Decoder(weights, config, memory)
        self._prompt = encode(prompt)
        self._hash = hashlib.sha256()
        self.tokens: list[int] = []

    def __iter__(self) -> Iterator[int]:
        following: Tokens = self._prompt
        while len(self.tokens) < LENGTH:
            logits = self._decoder.forward(following)[-1]
            self._hash.update(logits.tobytes())
            self.tokens.append(int(np.argmax(logits)))
            following = self.tokens[-1:]
            yield self.tokens[-1]

    def result(self) -> tuple[list[int], str]:
        """Return the tokens, and a digest of the logits that they came from."""
        return self.tokens, self._hash.hexdigest()


def _expected() -> tuple[Texts, dict[str, str]]:
    """Return the texts of plain numpy, and the checkpoint of each training step."""
    texts: dict[tuple[str, str], tuple[list[int], str]] = {}
    steps: dict[str, str] = {}
    for checkpoint in CHECKPOINTS:
        with opened(checkpoint) as (path, config, metadata):
            weights = load(path)
        steps[metadata["step"]] = checkpoint
        for prompt in PROMPTS:
            writer = _Writer(weights, config, HeapMemory(), prompt)
            for _ in writer:
                pass
            texts[checkpoint, prompt] = writer.result()
    return texts, steps


def _writer(generation: Generation, prompt: str, memory: Memory) -> _Writer:
    config = Config.from_json(generation.metadata["config"])
    weights = {name: generation.tensor(name) for name in generation.tensors}
    return _Writer(weights, config, memory, prompt)


def run(
    slot: Slot,
    swapper: Swapper,
    memory: Memory,
    swaps: int,
    *,
    now: Callable[[], float] = time.perf_counter,
    each: Callable[[int], None] | None = None,
) -> Report:
    """Write texts while a slot's model is swapped so many times; then as many without.

    Args:
        slot: an empty slot.
        swapper: who swaps it.
        memory: where keys, values and activations live; the weights are the slot's.
        swaps: how many.
        now: a clock in seconds.
        each: called with the number of swaps that were done since it was called last.

    Raises:
        TensormemError: the memory could not be had, or the swapper failed.
    """
    expected, steps = _expected()
    with opened(CHECKPOINTS[0]) as (path, _, _):
        generations = [slot.swap(path)]
    checkpoints = [CHECKPOINTS[i % 2] for i in range(swaps + 1)]
    texts: list[Text] = []
    clock = _Clock(now)
    asked = seen = 0
    while seen < swaps or texts[-1].generation != swapper.done()[-1]:
        prompt = PROMPTS[len(texts) % len(PROMPTS)]
        with slot.acquire() as generation:
            writer = _writer(generation, prompt, memory)
            for _ in writer:
                clock.token(len(writer.tokens) == 1)
                done = len(swapper.done())
                if each is not None and done > seen:
                    each(done - seen)
                seen = done
                newest = (generations + swapper.done())[-1] == generation.number
                late = len(writer.tokens) > asked * STRIDE % (LENGTH - 1)
                if asked == seen and asked < swaps and newest and late:
                    asked += 1
                    swapper.ask(checkpoints[asked])
            texts.append(_judge(generation, prompt, writer, expected, steps))
    generations += swapper.done()
    made_of = dict(zip(generations, checkpoints, strict=True))
    different = [t for t in texts if not t.equal or made_of.get(t.generation) != t.checkpoint]
    quiet = _Clock(now)
    for number in range(len(texts)):
        with slot.acquire() as generation:
            writer = _writer(generation, PROMPTS[number % len(PROMPTS)], memory)
            for _ in writer:
                quiet.token(len(writer.tokens) == 1)
                swapper.done()
    return Report(swaps, generations, checkpoints, texts, different, clock.report(), quiet.report())


def _judge(
    generation: Generation, prompt: str, writer: _Writer, expected: Texts, steps: dict[str, str]
) -> Text:
    return Text(
        generation=generation.number,
        checkpoint=(checkpoint := steps.get(generation.metadata["step"], "?")),
        prompt=prompt,
        tokens=writer.tokens,
        equal=writer.result() == expected.get((checkpoint, prompt)),
        overtaken=generation.superseded(),
    )


def _serve(name: str) -> None:
    """Swap a slot's model to each checkpoint that is asked for on stdin; tell the number."""
    try:
        with slot(name, write=True) as opened_slot:
            for line in sys.stdin:
                with opened(line.strip()) as (path, _, _):
                    number = opened_slot.swap(path)
                print(json.dumps({"active": number}), flush=True)
    except (errors.TensormemError, OSError) as error:
        print(json.dumps({"error": str(error)}), flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1])
