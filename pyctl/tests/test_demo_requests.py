# SPDX-License-Identifier: MIT
"""Requests served from one KV cache: the same answers, and counts that are right."""

from __future__ import annotations

import errno
import json
import mmap
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fake import FakeDevice
from fakekv import State
from kv_model import ModelCache
from tensormem import Client, abi, errors, safetensors
from tensormem import client as client_module
from tensormem.cli import cli
from tensormem.demo import REQUESTS, requests, run
from tensormem.demo.model import Config, Decoder, HeapMemory, Model
from tensormem.demo.requests import Moment, Report, Request, Trace, alone, serve, trace
from test_cli import narrow, runner
from test_demo import SMALL, Refusing, Weights, random_weights


@pytest.fixture(scope="module")
def demo() -> tuple[Weights, Config]:
    with run.opened("b") as (path, config, _):
        return safetensors.load(path), config


@pytest.fixture(scope="module")
def expected(demo: tuple[Weights, Config]) -> dict[str, list[int]]:
    return alone(Decoder(*demo, HeapMemory()), trace())


def cache_of(c: Config, *, running: int, limit: int = 2 << 20, page: int = 4096) -> ModelCache:
    return ModelCache(c.layers, c.kv_heads, c.head_dim, c.context, running, limit, page)


def run_on(cache: ModelCache, weights: Weights, c: Config, t: Trace, running: int) -> Report:
    report = serve(Model(weights, c, HeapMemory()), cache, t, running=running)  # type: ignore[arg-type]
    assert not cache.sequences, "all are closed"
    assert cache.count == len(cache.cached)
    assert report.info.copies == cache.copies
    return report


# -- the trace --------------------------------------------------------------------------


def test_the_trace(demo: tuple[Weights, Config], expected: dict[str, list[int]]) -> None:
    t, context = trace(), demo[1].context
    assert len(t.requests) == REQUESTS == 32
    names = [request.name for request in t.requests]
    assert len(set(names)) == len(names)
    seen: dict[str, tuple[Request, int]] = {}
    for request in t.requests:
        assert request.say.isascii()
        turn = 1
        if request.after is not None:
            before, turns = seen[request.after]
            assert before.tenant == request.tenant
            turn = turns + 1
        seen[request.name] = request, turn
    assert len({request.tenant for request in t.requests}) >= 3
    assert max(turn for _, turn in seen.values()) >= 4
    after = [request.after for request in t.requests if request.after]
    assert len(after) - len(set(after)) >= 3, "none go on from the same point"
    lengths = [len(ids) for ids in expected.values()]
    assert max(lengths) <= context
    assert max(lengths) > 2 * min(lengths)
    assert len({request.tokens for request in t.requests}) > 4


def test_a_part_of_the_trace_stands_alone() -> None:
    for count in range(1, REQUESTS):
        t = trace(count)
        assert len(t.requests) == count
        names = {request.name for request in t.requests}
        assert all(r.after is None or r.after in names for r in t.requests)


# -- what it comes to --------------------------------------------------------------------


@pytest.mark.parametrize("page", [4096, 16384])
def test_the_trace_in_a_fixed_pool(
    demo: tuple[Weights, Config], expected: dict[str, list[int]], page: int
) -> None:
    cache = cache_of(demo[1], running=requests.RUNNING, limit=requests.LIMIT, page=page)
    report = run_on(cache, *demo, trace(), requests.RUNNING)
    assert report.sequences == expected
    assert (report.block_tokens, report.block_bytes) == (page // 128, page * 8)
    assert report.requests == REQUESTS
    assert report.generated == sum(request.tokens for request in trace().requests)
    # the figures that the README states
    assert report.against_contiguous <= 0.5
    assert report.peak.held / report.peak.contiguous <= 0.5
    assert report.against_private <= 0.8
    assert report.most >= 2.5 * (requests.LIMIT // report.peak.per_sequence().contiguous)
    assert report.hit_rate >= (0.7 if page == 4096 else 0.5)
    for what in (report.preempted, report.forks, report.recomputed, cache.evictions, cache.copies):
        assert what > 0, "the trace does not show it"
    assert report.peak.held <= requests.LIMIT
    assert report.mean.held + report.mean.cached <= requests.LIMIT
    whole = sum(len(ids) - 1 for ids in expected.values())
    assert report.computed < 0.5 * whole


def test_without_pressure(demo: tuple[Weights, Config], expected: dict[str, list[int]]) -> None:
    """In a pool with room for all of it every token is found, forked or computed once."""
    cache = cache_of(demo[1], running=8, limit=64 << 20)
    report = run_on(cache, *demo, trace(), 8)
    assert report.sequences == expected
    assert (report.preempted, cache.evictions) == (0, 0)
    whole = sum(len(ids) - 1 for ids in expected.values())
    assert report.matched + report.forked + report.computed == whole
    prompts = [trace().prompt(request, expected) for request in trace().requests]
    assert report.asked <= sum(map(len, prompts))
    # a tail shorter than a block is not found again, and may be computed by every branch
    assert report.recomputed < REQUESTS * cache.block_tokens


def test_one_at_a_time(demo: tuple[Weights, Config], expected: dict[str, list[int]]) -> None:
    report = run_on(cache_of(demo[1], running=1), *demo, trace(10), 1)
    assert report.sequences == {r.name: expected[r.name] for r in trace(10).requests}
    assert (report.most, report.forks, report.preempted) == (1, 0, 0)
    assert report.mean.running == 1
    assert report.mean.contiguous == 512 << 10


TINY = replace(SMALL, context=96)


def chain(*requests: Request) -> Trace:
    return Trace("0123456789", requests)


def test_counts_by_hand() -> None:
    """Two requests with one prompt of 22 tokens, in blocks of 8, one after the other."""
    c = replace(TINY, vocab=256)
    weights = random_weights(c)
    say = "abcdefghijkl"
    t = chain(Request("a", 1, say, 4), Request("b", 1, say, 4), Request("c", 2, say, 4))
    cache = cache_of(c, running=1, page=256)
    report = run_on(cache, weights, c, t, 1)
    assert report.sequences == alone(Decoder(weights, c, HeapMemory()), t)
    # a: 22 + 3 computed, three full blocks published; b: two of them found, and of the third
    # what leaves one token of the prompt, by copy; c is another tenant: nothing
    assert report.asked == 66
    assert report.matched == 21
    assert cache.copies == 1
    assert report.computed == 25 + 4 + 25
    assert report.recomputed == 4
    assert report.generated == 12
    # one pass for a prompt and one for each token after the first, each with 3 or 4 blocks
    block = 8 * 32 * 2 * c.layers
    assert cache.block_bytes == block
    assert report.peak == Moment(1, 4 * block, report.peak.cached, 4 * block, 96 * 64 * c.layers)
    assert report.mean.running == 1
    assert report.mean.held == (3 * 3 + 4) / 4 * block


def test_a_fork_takes_what_the_cache_has_not() -> None:
    c = replace(TINY, vocab=256)
    weights = random_weights(c)
    t = chain(
        Request("a", 1, "abc", 4),
        Request("b", 1, "xyz-one", 20, after="a"),
        Request("c", 1, "xyz-two", 20, after="a"),
        Request("d", 1, "xyz-one", 20, after="a"),
    )
    cache = cache_of(c, running=3, page=256)
    report = run_on(cache, weights, c, t, 3)
    assert report.sequences == alone(Decoder(weights, c, HeapMemory()), t)
    # c has 17 of a's tokens and "xyz-" from b; d has all of b's prompt but one token
    assert report.forks == 2
    assert report.forked == 21 + 23
    assert report.sequences["d"] == report.sequences["b"]


def test_a_fork_without_room_waits() -> None:
    c = replace(TINY, vocab=256)
    weights = random_weights(c)
    t = chain(
        Request("a", 1, "abc", 4),
        Request("b", 1, "xyz-one and sixteen more", 7, after="a"),
        Request("c", 1, "xyz-two", 9, after="a"),
    )
    cache = cache_of(c, running=2, page=256)
    # b has all six blocks when c would have a copy of the third
    cache.room = 6
    report = run_on(cache, weights, c, t, 2)
    assert report.sequences == alone(Decoder(weights, c, HeapMemory()), t)
    assert (report.forks, report.preempted, report.most) == (0, 0, 1)
    assert cache.refused == 1, "it did not wait for b to end"


def random_trace(rng: random.Random, c: Config) -> Trace:
    made: list[Request] = []
    lengths: dict[str, int] = {}
    while len(made) < 14:
        after = rng.choice([None, *made]) if made else None
        say = "".join(rng.choice("ab") for _ in range(rng.randrange(1, 24)))
        tokens = rng.randrange(1, 20)
        begin = lengths[after.name] if after else 10
        if begin + len(say) + tokens > c.context:
            continue
        tenant = after.tenant if after else rng.randrange(2)
        request = Request(f"r{len(made)}", tenant, say, tokens, after.name if after else None)
        lengths[request.name] = begin + len(say) + tokens
        made.append(request)
    return chain(*made)


@pytest.fixture
def in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """See to it that requests that were put back begin again in the order they came."""
    began: list[Any] = []
    begin = requests._Server._begin

    def checked(self: Any, job: Any) -> Any:
        if job not in began:
            began.append(job)
        places = [began.index(other) for other in [job, *self.put_back]]
        assert places == sorted(places)
        return begin(self, job)

    monkeypatch.setattr(requests._Server, "_begin", checked)


@pytest.mark.usefixtures("in_order")
@pytest.mark.parametrize("seed", range(12))
def test_random_traces_in_narrow_pools(seed: int) -> None:
    """The model of the cache checks each block that is shared; answers are those of numpy."""
    rng = random.Random(seed)
    c = replace(TINY, vocab=256)
    weights = random_weights(c)
    t = random_trace(rng, c)
    reference = alone(Decoder(weights, c, HeapMemory()), t)
    running = rng.randrange(2, 8)
    cache = cache_of(c, running=running, page=256)
    # from what the longest sequence and the copy of a block take, to what three take
    cache.room = rng.randrange(14, 30)
    report = run_on(cache, weights, c, t, running)
    assert report.sequences == reference
    assert report.requests == len(t.requests)
    assert report.most <= running
    assert report.peak.held <= cache.room * cache.block_bytes
    assert report.peak.held <= report.peak.private


def test_random_traces_are_not_all_easy() -> None:
    put_back = evicted = forks = times = 0
    for seed in range(12):
        rng = random.Random(seed)
        c = replace(TINY, vocab=256)
        t = random_trace(rng, c)
        running = rng.randrange(2, 8)
        cache = cache_of(c, running=running, page=256)
        cache.room = rng.randrange(14, 30)
        report = run_on(cache, random_weights(c), c, t, running)
        put_back += report.preempted > 0
        times += report.preempted
        evicted += cache.evictions > 0
        forks += report.forks > 0
    assert min(put_back, evicted, forks) >= 3
    # 123 if the next one began at once where one was put back
    assert times < 50


def test_a_pool_for_none() -> None:
    c = replace(TINY, vocab=256)
    cache = cache_of(c, running=2, page=256)
    cache.room = 3
    with pytest.raises(errors.PoolExhausted):
        run_on(cache, random_weights(c), c, chain(Request("a", 1, "abc", 30)), 2)


@pytest.mark.parametrize("running", [0, 33])
def test_more_than_a_pass_takes(running: int) -> None:
    model = Model(random_weights(TINY), TINY, HeapMemory())
    cache: Any = cache_of(TINY, running=33)
    with pytest.raises(errors.InvalidArgument, match="1 to 32 fit"):
        serve(model, cache, trace(1), running=running)


def test_progress(demo: tuple[Weights, Config]) -> None:
    seen: list[int] = []
    cache: Any = cache_of(demo[1], running=3)
    model = Model(*demo, HeapMemory())
    report = serve(model, cache, trace(3), running=3, each=seen.append)
    assert sum(seen) == report.generated
    alone(Decoder(*demo, HeapMemory()), trace(3), seen.append)
    assert sum(seen) == 2 * report.generated


def test_moments() -> None:
    a, b = Moment(2, 20, 4, 30, 100), Moment(4, 40, 0, 50, 200)
    assert Moment.mean([a, b]) == Moment(3, 30, 2, 40, 150)
    assert a.per_sequence() == Moment(1, 10, 2, 15, 50)
    assert np.isclose(Moment.mean([a]).held, 20)


# -- on a client -------------------------------------------------------------------------


def test_replay_counts_as_the_model_does(demo: tuple[Weights, Config]) -> None:
    """What the library makes of the device's counters is what the blocks come to."""
    device = FakeDevice(max_batch=64)
    seen: list[int] = []
    with Client(device) as client:
        found = requests.replay(client, trace(), each=seen.append)
        assert not device.tensors
    assert [kv.fd for kv in device.caches.values()] == [-1]
    assert found.different == []
    assert sum(seen) == 2 * found.generated
    assert min(found.seconds, found.alone) > 0
    cache = cache_of(demo[1], running=requests.RUNNING, limit=requests.LIMIT, page=mmap.PAGESIZE)
    model = run_on(cache, *demo, trace(), requests.RUNNING)
    for name in (
        "block_tokens", "block_bytes", "max_tokens", "requests", "generated", "asked",
        "matched", "forks", "forked", "computed", "recomputed", "preempted", "most", "peak",
        "mean", "sequences",
    ):  # fmt: skip
        assert getattr(found, name) == getattr(model, name), name
    for name in ("limit", "used", "cached", "copies", "evictions"):
        assert getattr(found.info, name) == getattr(model.info, name), name


@pytest.mark.parametrize("call", [abi.IOC_KV_LOOKUP, abi.IOC_KV_EXTEND])
def test_a_cache_that_has_nothing(call: int) -> None:
    device = Refusing(call, errno.ENOSPC)
    with Client(device) as client:
        with pytest.raises(errors.CacheFull) as info:
            requests.replay(client, trace(1), running=1)
        del info
        assert not device.tensors
        assert [kv.fd for kv in device.caches.values()] == [-1]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    device = FakeDevice(max_batch=64)
    monkeypatch.setattr(client_module, "KernelDevice", lambda _: device)
    return device


def test_command(served: FakeDevice) -> None:
    result = runner().invoke(cli, ["demo", "--requests", "12"])
    assert result.exit_code == 0, result.output
    assert narrow(result.stdout)
    assert result.stderr.startswith("serving")
    assert "12 requests from one KV cache: a pool of 2 MiB" in result.stdout
    lines = {line.split("  ")[1]: line for line in result.stdout.splitlines() if line[:2] == "  "}
    assert "verdict" in lines
    assert "equal: all 12 answers are those of numpy" in lines["verdict"]
    for what in ("memory", "at once", "prefixes", "computed", "blocks", "put back", "time"):
        assert what in lines
    assert "4 would fit contiguous" in lines["at once"]
    assert "512 KiB" in lines["contiguous"]
    assert served.fd == -1
    assert not served.tensors


def test_command_json(served: FakeDevice) -> None:
    result = runner().invoke(cli, ["demo", "--requests", "6", "--checkpoint", "a", "--json"])
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    document = json.loads(result.stdout)
    assert document["equal"] is True
    assert document["different"] == []
    assert document["requests"] == 6
    assert document["generated"] == sum(request.tokens for request in trace(6).requests)
    assert document["info"]["limit"] == requests.LIMIT
    assert document["hit_rate"] == document["matched"] / document["asked"]
    mean = document["mean"]
    assert document["against_contiguous"] == mean["held"] / mean["contiguous"]
    assert document["against_private"] == mean["held"] / mean["private"]
    assert mean["per_sequence"]["contiguous"] == 512 << 10
    assert document["ms_per_token"]["tensormem"] > 0
    lengths = {request.name: request.tokens for request in trace(6).requests}
    assert {name: len(text) for name, text in document["answers"].items()} == lengths


def test_command_that_differs(served: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(client: Client, path: Any) -> Weights:
        weights = safetensors.load_into(client, path)
        weights["model.norm.weight"][:] *= -1
        return weights

    monkeypatch.setattr(requests, "load_into", damaged)
    result = runner().invoke(cli, ["demo", "--requests", "2"])
    assert result.exit_code == 1
    assert "verdict      DIFFERENT: flood, bread" in result.stdout
    monkeypatch.setattr(client_module, "KernelDevice", lambda _: FakeDevice(max_batch=64))
    result = runner().invoke(cli, ["demo", "--requests", "1", "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["equal"] is False


def test_command_sees_a_block_that_is_wrong(
    served: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zeros in place of a cached block: whoever finds it says something else."""
    publish = State.publish

    def wrong(self: State, block: Any, key: Any, data: list[bytes], at: int, parent: bytes) -> None:
        if at == 2:
            data = [bytes(len(plane)) for plane in data]
        publish(self, block, key, data, at, parent)

    monkeypatch.setattr(State, "publish", wrong)
    result = runner().invoke(cli, ["demo", "--requests", "12", "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["different"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--requests", "0"],
        ["--requests", "33"],
        ["--requests", "2", "--tokens", "4"],
        ["--requests", "2", "--prompt", "a"],
    ],
)
def test_wrong_usage(served: FakeDevice, arguments: list[str]) -> None:
    result = runner().invoke(cli, ["demo", *arguments])
    assert result.exit_code == 2
    assert "Usage:" in result.stderr
    assert served.calls == []


def test_refusals(served: FakeDevice) -> None:
    served.fail[abi.IOC_KV_CREATE] = errno.ENOTTY
    result = runner().invoke(cli, ["demo", "--requests", "1", "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["type"] == "IncompatibleModule"
