# SPDX-License-Identifier: MIT
"""Serving a trace of requests from one KV cache in a fixed pool.

The trace has conversations of several turns, in the style of the text the model was
fitted to, that begin with the same words; some go on from the same point in
different ways. A request is greedy, so its answer is known: that of the same model on
ordinary numpy memory which computes every request alone and shares nothing.

The schedule is the usual one. Tokens of all running requests go through the model
together, one of each, and what room is left in the pass goes to the one prompt that is
being computed (chunked prefill as in Sarathi-Serve, arXiv:2403.02310). When the pool has
nothing left to evict, the newest request is put back and goes on later, computing again
what is no longer cached (preemption as in vLLM, arXiv:2309.06180).
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import errors
from ..safetensors import load, load_into
from . import REQUESTS
from .model import Decoder, HeapMemory, Model, encode
from .run import kv_cache, opened, token_bytes

if TYPE_CHECKING:
    from ..client import Client
    from ..kv import KVCache, KVInfo, KVSequence

__all__ = [
    "LIMIT",
    "RUNNING",
    "Moment",
    "Report",
    "Request",
    "Trace",
    "alone",
    "replay",
    "serve",
    "trace",
]

# tokens, each with those that followed it
_Tree = dict[int, Any]

#: Bytes that the pool of the demo may hold: as many as four sequences of 512 tokens.
LIMIT = 2 << 20

#: Requests that it runs at a time.
RUNNING = 12


@dataclass(frozen=True)
class Request:
    """One request.

    Attributes:
        name: what it is called, for others to go on from.
        tenant: whose it is; tenants share nothing.
        after: the request whose text and answer come before it, if any.
        say: what is added to that, or to the system prompt.
        tokens: how many to generate.
    """

    name: str
    tenant: int
    say: str
    tokens: int
    after: str | None = None


@dataclass(frozen=True)
class Trace:
    """Requests in the order they arrive, those that go on from another after it.

    Attributes:
        system: what every conversation begins with.
        requests: the requests.
    """

    system: str
    requests: tuple[Request, ...]

    def prompt(self, request: Request, sequences: Mapping[str, Sequence[int]]) -> list[int]:
        """Return what a request begins with, given the finished sequences by name."""
        begin = encode(self.system) if request.after is None else sequences[request.after]
        return [*map(int, begin), *map(int, encode(request.say))]


def trace(count: int = REQUESTS) -> Trace:
    """Return the first requests of the trace that ships with the package."""
    document = json.loads((files(__package__) / "requests.json").read_text("utf-8"))
    requests = tuple(Request(**fields) for fields in document["requests"][:count])
    return Trace(document["system"], requests)


@dataclass(frozen=True)
class Moment:
    """Memory at one pass, in bytes; or the mean of all passes.

    Attributes:
        running: requests that have a sequence.
        held: in blocks that sequences have; a shared block counts once.
        cached: in blocks that no sequence has, kept until their memory is needed.
        private: in blocks, if every sequence had its own.
        contiguous: if every sequence had room for the longest from the start.
    """

    running: float
    held: float
    cached: float
    private: float
    contiguous: float

    def per_sequence(self) -> Moment:
        """Return the same for one sequence."""
        n = self.running
        return Moment(1, self.held / n, self.cached / n, self.private / n, self.contiguous / n)

    @classmethod
    def mean(cls, moments: Sequence[Moment]) -> Moment:
        """Return the mean."""
        n = len(moments)
        return cls(
            sum(m.running for m in moments) / n,
            sum(m.held for m in moments) / n,
            sum(m.cached for m in moments) / n,
            sum(m.private for m in moments) / n,
            sum(m.contiguous for m in moments) / n,
        )


@dataclass
class Report:
    """What came of it.

    Attributes:
        block_tokens: tokens of a block.
        block_bytes: its bytes.
        max_tokens: the longest sequence there may be.
        requests: requests served.
        generated: tokens they generated.
        asked: tokens looked up in the cache, those of a request that came back again.
        matched: of these, tokens found.
        forks: requests that began as a fork of a running one.
        forked: tokens they got by that.
        computed: tokens that went through the model.
        recomputed: of these, tokens that the same tenant had computed before.
        preempted: times a request was put back.
        most: requests that ran at once, at most.
        peak: the pass in which sequences held most.
        mean: of all passes.
        info: the cache's counters at the end.
        seconds: it took.
        alone: seconds that numpy took, one request after the other.
        sequences: all tokens of each request, by name.
        different: requests that numpy answered otherwise.
    """

    block_tokens: int
    block_bytes: int
    max_tokens: int
    requests: int = 0
    generated: int = 0
    asked: int = 0
    matched: int = 0
    forks: int = 0
    forked: int = 0
    computed: int = 0
    recomputed: int = 0
    preempted: int = 0
    most: int = 0
    peak: Moment = field(init=False)
    mean: Moment = field(init=False)
    info: KVInfo = field(init=False)
    seconds: float = 0.0
    alone: float = 0.0
    sequences: dict[str, list[int]] = field(default_factory=dict)
    different: list[str] = field(default_factory=list)

    @property
    def hit_rate(self) -> float:
        """Of the tokens looked up, the part found."""
        return self.matched / self.asked if self.asked else 0.0

    @property
    def against_contiguous(self) -> float:
        """Memory of a running sequence on average, as part of what contiguous ones take."""
        return self.mean.held / self.mean.contiguous

    @property
    def against_private(self) -> float:
        """The same, as part of what sequences with blocks of their own take."""
        return self.mean.held / self.mean.private


class _Job:
    """A request that runs or has been put back.

    Attributes:
        request: the request.
        ids: all of its tokens so far.
        end: how many they are to become.
        at: where its computed tokens end in the tenant's tree of them.
    """

    def __init__(self, request: Request, ids: list[int]) -> None:
        self.request, self.ids, self.end = request, ids, len(ids) + request.tokens
        self.at: _Tree = {}


class _Server:
    """Runs a trace on a cache; see the top of this file for the schedule."""

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        trace: Trace,
        running: int,
        each: Callable[[int], None],
    ) -> None:
        if not 1 <= running <= Model.ROWS:
            raise errors.InvalidArgument(
                f"{running} requests at a time", f"1 to {Model.ROWS} fit into one pass"
            )
        self.model, self.cache, self.trace, self.each = model, cache, trace, each
        self.most = running
        self.waiting = list(trace.requests)
        self.put_back: deque[_Job] = deque()
        # in the order they began
        self.running: dict[_Job, KVSequence] = {}
        self.full = False
        self.computed: dict[int, _Tree] = {}
        self.moments: list[Moment] = []
        config = model.config
        self.report = Report(
            block_tokens=cache.block_tokens,
            block_bytes=cache.block_tokens * token_bytes(config),
            max_tokens=config.context,
        )

    def run(self) -> Report:
        """Serve all requests."""
        report = self.report
        begin = time.perf_counter()
        while self.waiting or self.put_back or self.running:
            self._admit()
            self._pass()
        report.seconds = time.perf_counter() - begin
        report.info = self.cache.info()
        report.peak = max(self.moments, key=lambda moment: moment.held)
        report.mean = Moment.mean(self.moments)
        report.most = max(int(moment.running) for moment in self.moments)
        return report

    def _admit(self) -> None:
        """Begin the next request, if there is one and room for it."""
        computing = any(len(job.ids) - seq.length > 1 for job, seq in self.running.items())
        # one prompt at a time, so that the next can share what this one computes
        if computing or self.full or len(self.running) == self.most:
            return
        job = self._next()
        if job is None:
            return
        try:
            self.running[job] = self._begin(job)
        except errors.PoolExhausted:
            if not self.running:
                raise
            self.put_back.appendleft(job)
            self.full = True

    def _next(self) -> _Job | None:
        """Take the first request that may begin: one put back, or one whose turn it is."""
        if self.put_back:
            return self.put_back.popleft()
        for i, request in enumerate(self.waiting):
            if request.after is None or request.after in self.report.sequences:
                del self.waiting[i]
                return _Job(request, self.trace.prompt(request, self.report.sequences))
        return None

    def _begin(self, job: _Job) -> KVSequence:
        """Make the sequence of a request, with all tokens that need no computing."""
        report, request = self.report, job.request
        # a running request that began where this one does has more than the cache finds
        shared, parent = 0, None
        for other, theirs in self.running.items():
            if request.after is not None and other.request.after == request.after:
                alike = min(_common(job.ids, other.ids), theirs.length, len(job.ids) - 1)
                if alike > shared:
                    shared, parent = alike, theirs
        if parent is not None:
            seq = parent.fork(shared)
            report.forks += 1
            report.forked += shared
        else:
            seq = self.cache.sequence(request.tenant)
            report.matched += seq.match(job.ids)
            report.asked += len(job.ids)
        job.at = self.computed.setdefault(request.tenant, {})
        for token in job.ids[: seq.length]:
            job.at = job.at[token]
        return seq

    def _pass(self) -> None:
        """Compute a token of each running request, and more of a prompt; free what is done."""
        parts = self._extend()
        self._remember()
        logits = self.model.step(
            [(seq, job.ids[seq.length - n : seq.length]) for job, seq, n in parts]
        )
        row = -1
        for job, seq, n in parts:
            row += n
            self._count(job, seq.length - n, seq.length)
            if seq.length == len(job.ids):
                job.ids.append(int(np.argmax(logits[row])))
                self.report.generated += 1
                self.each(1)
            if seq.length // self.cache.block_tokens > (seq.length - n) // self.cache.block_tokens:
                seq.publish(job.ids[: seq.length])
            if len(job.ids) == job.end:
                self.report.sequences[job.request.name] = job.ids
                self.report.requests += 1
                self._end(job)
                self.full = False

    def _extend(self) -> list[tuple[_Job, KVSequence, int]]:
        """Make room for the tokens of a pass, if need be at the cost of the newest request."""
        while True:
            room, parts = Model.ROWS - len(self.running), []
            for job, seq in self.running.items():
                more = min(len(job.ids) - seq.length - 1, room)
                room -= more
                parts.append((job, seq, 1 + more))
            try:
                self.cache.extend([(seq, n) for _, seq, n in parts])
            except errors.PoolExhausted:
                if len(parts) == 1:
                    raise
            else:
                return parts
            newest = parts[-1][0]
            self._end(newest)
            self.put_back.appendleft(newest)
            self.report.preempted += 1
            # whoever came next would be put back in turn
            self.full = True

    def _end(self, job: _Job) -> None:
        self.running.pop(job).close()

    def _remember(self) -> None:
        report, info = self.report, self.cache.info()
        lengths = [seq.length for seq in self.running.values()]
        blocks = sum(-(-length // report.block_tokens) for length in lengths)
        self.moments.append(
            Moment(
                running=len(lengths),
                held=info.used - info.cached,
                cached=info.cached,
                private=blocks * report.block_bytes,
                contiguous=len(lengths) * report.max_tokens * token_bytes(self.model.config),
            )
        )

    def _count(self, job: _Job, begin: int, end: int) -> None:
        """Count the tokens of a pass, and those that were computed before."""
        self.report.computed += end - begin
        for token in job.ids[begin:end]:
            self.report.recomputed += token in job.at
            job.at = job.at.setdefault(token, {})


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens two sequences begin with alike."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def serve(
    model: Model,
    cache: KVCache,
    trace: Trace,
    *,
    running: int = RUNNING,
    each: Callable[[int], None] = lambda _: None,
) -> Report:
    """Serve a trace from a cache made for the model's shape; compare with nothing.

    Args:
        model: what computes.
        cache: where keys and values are.
        trace: the requests.
        running: how many of them run at a time.
        each: called with the number of tokens generated since the last call.

    Raises:
        PoolExhausted: the pool has no room for one request by itself.
    """
    return _Server(model, cache, trace, running, each).run()


def alone(
    decoder: Decoder, trace: Trace, each: Callable[[int], None] = lambda _: None
) -> dict[str, list[int]]:
    """Serve a trace one request after the other, each from its first token on."""
    sequences: dict[str, list[int]] = {}
    for request in trace.requests:
        ids = trace.prompt(request, sequences)
        decoder.reset()
        for token in decoder.generate(list(ids), request.tokens):
            ids.append(token)
            each(1)
        sequences[request.name] = ids
    return sequences


def replay(
    client: Client,
    trace: Trace,
    *,
    checkpoint: str = "b",
    running: int = RUNNING,
    limit: int = LIMIT,
    each: Callable[[int], None] = lambda _: None,
) -> Report:
    """Serve a trace on a client's memory, and compare with numpy's.

    Args:
        client: where weights, KV cache and activations live.
        trace: the requests.
        checkpoint: ``a`` or ``b``.
        running: how many run at a time.
        limit: bytes that the cache may hold.
        each: called with the number of tokens generated since the last call; each is
            generated twice.

    Raises:
        InvalidArgument: more at a time than fit into one pass.
        SafetensorsError: the checkpoint is damaged.
        TensormemError: the memory could not be had.
    """
    with opened(checkpoint) as (path, config, _):
        ours, theirs = load_into(client, path), load(path)
    with kv_cache(client, config, max_sequences=running, limit=limit) as cache:
        model = Model(ours, config, client)
        report = serve(model, cache, trace, running=running, each=each)
    decoder = Decoder(theirs, config, HeapMemory())
    begin = time.perf_counter()
    expected = alone(decoder, trace, each)
    report.alone = time.perf_counter() - begin
    report.different = [n for n, ids in expected.items() if report.sequences[n] != ids]
    return report
