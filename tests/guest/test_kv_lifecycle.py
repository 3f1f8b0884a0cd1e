# SPDX-License-Identifier: MIT
"""KV caches come and go: SIGKILL at any moment, races, descriptors, unloading."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import random
import signal
import subprocess
import threading
import time

import pytest

from conftest import USAGE, settled
from device import CHUNK, KV, PAGE, Raw, Seq, View, chain, full, read, state, tokens, wait_for, window
from process import killed_at_random, libc
from tensormem import abi

TOKEN = PAGE // 8
MIXED = [full(2, TOKEN), window(24, 1, CHUNK // 256), state(1, PAGE + 1)]


def churn(kv: KV, view: View, dice: random.Random) -> None:
    """Everything that can be done to a cache, in any order, until killed."""
    seqs: list[Seq] = []
    names = chain("x", 64)
    while True:
        kind = dice.randrange(12)
        seq = dice.choice(seqs) if seqs else None
        if seq is None or kind == 0:
            result, seq = kv.try_open(dice.randrange(2))
            if result == 0:
                seqs.append(seq)
                kv.lookup(seq, names[: dice.randrange(1, 20)])
        elif kind <= 3:
            kv.extend(seq, dice.choice((1, 8, 30)))
        elif kind == 4:
            wanted = dice.sample(seqs, dice.randrange(1, len(seqs) + 1))
            kv.extend_batch([(s, dice.randrange(1, 20)) for s in wanted])
        elif kind == 5:
            result, query = kv.try_query(seq)
            if result == 0 and query.length:
                result, child = kv.try_fork(seq, query.length)
                if result == 0:
                    seqs.append(child)
        elif kind == 6:
            kv.truncate(seq, dice.choice((0, kv.query(seq).length)))
        elif kind == 7:
            blocks = kv.query(seq).length // 8
            if blocks:
                kv.publish(seq, names[:blocks])
        elif kind == 8:
            kv.adopt(seq, dice.randrange(4), dice.choice(names))
        elif kind == 9:
            kv.pack(seq, dice.randrange(2))
        elif kind == 10:
            length = kv.query(seq).length
            for _ in range(10 if length else 0):
                at = view.place(seq, length - 1 - dice.randrange(min(length, 9)), dice.randrange(2))
                # the kernel touches it: no room for a copy is an error here
                copy = memoryview(view.memory)[at : at + 8]
                try:
                    with open("/dev/urandom", "rb", buffering=0) as file:
                        file.readinto(copy)
                except OSError:
                    pass
                copy.release()
        else:
            seqs.remove(seq)
            kv.end(seq)


def churn_alone(seed: int) -> None:
    dice = random.Random(seed)
    while True:
        with Raw() as raw, raw.kv(MIXED, block_tokens=8, limit=2 * CHUNK, flags=abi.KV_EVENTS) as kv:
            churn(kv, kv.view(), dice)


def test_sigkill_at_random_moments() -> None:
    """Children die in the middle of forks, faults, packing; nothing of them stays."""
    dice = random.Random(11)
    for _ in range(12):
        killed_at_random(churn_alone, dice, 0.2, 1.2)
        assert settled(dict.fromkeys(USAGE, 0)) == dict.fromkeys(USAGE, 0)


def test_sigkill_of_those_who_share_it(raw: Raw) -> None:
    """The cache goes on for the others: what they hold is right, and all can be used again."""
    dice = random.Random(12)
    with raw.kv(MIXED, block_tokens=8, limit=2 * CHUNK, max_sequences=40) as kv:
        view = kv.view()
        mine = kv.open(tokens=24)
        view.write(mine, tokens("mine", 0, 24))
        view.write(mine, tokens("window", 0, 24), 1)
        for _ in range(6):
            killed_at_random(lambda seed: churn(kv, view, random.Random(seed)), dice, 0.1, 0.6)
            # what they had open: the name of a place goes up by 65536 when it is used again
            names = (Seq(turn << 16 | place, 0) for turn in range(1, 1 << 16) for place in range(40))
            while kv.info().sequences > 1:
                for seq in itertools.islice(names, 40):
                    assert seq.name == mine.name or kv.end(seq) in (0, errno.ENOENT)
            assert kv.info().sequences == 1
            # not before: it may be packed, and what the others had open left no room to unpack
            view.check(mine, tokens("mine", 0, 24))
            view.check(mine, tokens("window", 0, 24), 1)
        assert kv.end(mine) == 0
        assert kv.info().used == kv.info().cached
        assert kv.reset() == 0
        info = kv.info()
        assert (info.used, info.held, info.packed, info.unpacked) == (0, 0, 0, 0)
        view.close()


def test_sigkill_ends_a_long_extension(raw: Raw) -> None:
    """It stops between two chunks, and all it has taken goes back."""
    with raw.kv([full(2, CHUNK // 256)], block_tokens=8, max_tokens=1 << 16) as kv:
        for turn in range(4):
            seq = kv.open()
            pid = os.fork()
            if pid == 0:
                while True:
                    kv.extend(seq, 40 * 16 * 8)
                    kv.truncate(seq, 0)
            time.sleep(0.15 + turn / 10)
            os.kill(pid, signal.SIGKILL)
            assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
            length = kv.query(seq).length
            assert length in (0, 40 * 16 * 8)  # all or none
            assert kv.info().used == length // 8 * kv.block_bytes()
            assert kv.end(seq) == 0
            wait_for(lambda: kv.info().held == 0)


def test_processes_race_for_the_same_names(raw: Raw) -> None:
    """Of several who close one sequence exactly one succeeds."""
    results = mmap.mmap(-1, PAGE)
    with raw.kv([full(2, TOKEN)], max_sequences=64) as kv:
        for _ in range(8):
            seqs = [kv.open(tokens=9) for _ in range(40)]
            children = []
            for slot in range(3):
                pid = os.fork()
                if pid == 0:
                    results[slot] = sum(kv.end(seq) == 0 for seq in seqs)
                    os._exit(0)
                children.append(pid)
            for pid in children:
                os.waitpid(pid, 0)
            assert sum(results[:3]) == 40
            assert kv.info().used == kv.info().sequences == 0
    results.close()


def test_threads_race_for_the_last_blocks(raw: Raw) -> None:
    """What they got together is what there is; nobody is refused while there is room."""
    with raw.kv([full(2, CHUNK // 256)], block_tokens=8, limit=2 * CHUNK, max_sequences=8) as kv:
        for _ in range(5):
            seqs = [kv.open() for _ in range(6)]
            barrier, refusals = threading.Barrier(6), []

            def work(seq: Seq, gate: threading.Barrier = barrier, told: list = refusals) -> None:
                gate.wait()
                while (result := kv.extend(seq, 8)) == 0:
                    pass
                told.append(result)

            threads = [threading.Thread(target=work, args=(seq,)) for seq in seqs]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert refusals == [errno.ENOSPC] * 6
            assert sum(kv.query(seq).length for seq in seqs) == 32 * 8
            assert kv.info().used == kv.info().held == 2 * CHUNK
            for seq in seqs:
                assert kv.end(seq) == 0
            assert kv.info().held == 0


def test_opens_race_for_the_last_place(raw: Raw) -> None:
    with raw.kv([full(2, TOKEN)], max_sequences=16) as kv:
        got: list[Seq] = []

        def work() -> None:
            while True:
                result, seq = kv.try_open()
                if result:
                    assert result == errno.ENOBUFS
                    return
                got.append(seq)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({seq.name for seq in got}) == len({seq.offset for seq in got}) == 16


@pytest.mark.parametrize("what", ["descriptor", "mapping"])
def test_the_module_stays_while_there_is_a_cache(raw: Raw, what: str) -> None:
    kv = raw.kv([full(2, TOKEN)])
    seq = kv.open(tokens=8)
    raw.close()
    at = None
    if what == "mapping":
        at = libc.mmap(None, PAGE, mmap.PROT_READ, mmap.MAP_SHARED, kv.fd, seq.offset)
        kv.close()
    result = subprocess.run(["rmmod", "tensormem"], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "in use" in result.stderr
    if at is not None:
        assert libc.munmap(at, PAGE) == 0
    kv.close()


def test_memory_of_a_cache_is_never_another_clients(raw: Raw) -> None:
    """Fill blocks as one client, take all of them as tensors and blocks of another, and look."""
    secret = b"\xde\xad\xbe\xef" * (PAGE // 4)
    for _ in range(2):
        with Raw() as victim, victim.kv([full(2, CHUNK // 256)], block_tokens=8) as kv:
            view = kv.view()
            seqs = [kv.open(tokens=16 * 8) for _ in range(4)]
            for seq in seqs:
                for plane in (0, 1):
                    at = view.place(seq, 0, plane)
                    for page in range(at, at + CHUNK // 2, PAGE):
                        view.memory[page : page + PAGE] = secret
            assert kv.pack(seqs[0])[0] == 0
            view.close()
        items = [raw.alloc(CHUNK, abi.Kind.WEIGHTS) for _ in range(4)]
        for item in items:
            mapping = raw.map_tensor(item)
            assert mapping[:] == bytes(CHUNK)
            mapping.close()
            assert raw.free(item.handle) == 0
    assert read("kv/held") == 0
