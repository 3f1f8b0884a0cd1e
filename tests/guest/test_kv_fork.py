# SPDX-License-Identifier: MIT
"""Parents and children share blocks and never see each other's writes."""

from __future__ import annotations

import array
import errno
import itertools
import mmap
import os
import random
import signal
import socket
import threading
from collections.abc import Callable

import pytest

from device import (
    CHUNK,
    KV,
    PAGE,
    Raw,
    Seq,
    View,
    address_of,
    chain,
    full,
    pattern,
    state,
    tokens,
    window,
)
from process import dies, libc, readable
from tensormem import abi

TOKEN = PAGE // 8
FAT = full(2, CHUNK // 256)
READ, WRITE = mmap.PROT_READ, mmap.PROT_WRITE
Model = dict[int, object]


def filled(kv: KV, view: View, tag: object, length: int, tenant: int = 0) -> Seq:
    seq = kv.open(tenant, tokens=length)
    view.write(seq, tokens(tag, 0, length))
    return seq


def test_full_blocks_are_shared_and_the_rest_is_copied(raw: Raw) -> None:
    with raw.kv([FAT, window(20, 2, TOKEN)], block_tokens=8) as kv:
        view, parent = kv.view(), kv.open(tokens=56)
        view.write(parent, tokens("p", 0, 56))
        view.write(parent, tokens("w", 32, 56), 1)
        big, small = kv.block_bytes(0), kv.block_bytes(1)
        assert kv.info().used == 7 * big + 3 * small
        for at, blocks, held, copies in ((56, 7, 3, 0), (55, 6, 2, 2), (52, 6, 2, 2), (0, 0, 0, 0)):
            before = kv.info()
            child = kv.fork(parent, at)
            after = kv.info()
            assert after.copies - before.copies == copies
            assert after.used - before.used == (big + small) * (copies // 2)
            query = kv.query(child)
            assert (query.length, query.offset) == (at, child.offset)
            assert query.shared == blocks * big + held * small
            view.check(child, tokens("p", 0, at))
            view.check(child, tokens("w", 32, at), 1)
            assert kv.end(child) == 0
        # a window that has moved past what the child would need
        for at in (51, 48, 20, 1):
            assert kv.try_fork(parent, at)[0] == errno.ENODATA
        assert kv.query(parent).shared == 0
        view.close()


def test_a_child_of_less(raw: Raw) -> None:
    """It has the first tokens and nothing past their last block."""
    with raw.kv([full(3, TOKEN)], block_tokens=8) as kv:
        view = kv.view()
        parent = filled(kv, view, "p", 50)
        for at in (0, 1, 8, 13, 16, 49, 50):
            child = kv.fork(parent, at)
            assert kv.query(child).length == at
            view.check(child, tokens("p", 0, at))
            memory = memoryview(view.memory)
            assert not readable(memory[view.span(child, -(-at // 8) * 8)])
            memory.release()
            assert kv.extend(child, 20) == 0
            view.write(child, tokens("c", at, at + 20))
            view.check(child, tokens("p", 0, at) | tokens("c", at, at + 20))
            view.check(parent, tokens("p", 0, 50))
            assert kv.end(child) == 0
        view.close()


def test_a_state_is_copied(raw: Raw) -> None:
    with raw.kv([full(2, TOKEN), state(2, PAGE + 5)], block_tokens=8) as kv:
        view, parent = kv.view(), kv.open(tokens=12)
        span = lambda seq: view.span(seq, 0, 1, 1)
        view.memory[span(parent)] = pattern("p", 1, PAGE + 5)
        for at in (1, 8, 11):
            assert kv.try_fork(parent, at)[0] == errno.ENODATA
        child, empty = kv.fork(parent, 12), kv.fork(parent, 0)
        assert kv.query(child).shared == kv.block_bytes(0)
        assert kv.query(empty).held == 0
        view.memory[span(child)] = pattern("c", 1, PAGE + 5)
        assert view.memory[span(parent)] == pattern("p", 1, PAGE + 5)
        view.memory[span(parent)] = pattern("q", 1, PAGE + 5)
        assert view.memory[span(child)] == pattern("c", 1, PAGE + 5)
        view.close()


def test_each_token_written_by_both(raw: Raw) -> None:
    """Parent first, child first; each block is copied once, by who is not alone with it."""
    with raw.kv([full(2, TOKEN)], block_tokens=8) as kv:
        view = kv.view()
        for first in ("parent", "child"):
            parent = filled(kv, view, "p", 28)
            child = kv.fork(parent, 28)
            copies = kv.info().copies
            order = [parent, child] if first == "parent" else [child, parent]
            models = {parent: tokens("p", 0, 28), child: tokens("p", 0, 28)}
            for seq, t in itertools.product(order, range(28)):
                models[seq][t] = (seq.name, t)
                view.write(seq, {t: models[seq][t]})
                if t % 7 == 3:
                    for other, model in models.items():
                        view.check(other, model)
            assert kv.info().copies == copies + 3
            assert kv.query(parent).shared == 0
            for seq, model in models.items():
                view.check(seq, model)
                assert kv.end(seq) == 0
        assert kv.info().used == 0
        view.close()


def churn(kv: KV, view: View, dice: random.Random, steps: int, tag: object) -> None:
    """Random operations on sequences of one's own against dicts."""
    models: dict[Seq, Model] = {}

    def adopt(seq: Seq, model: Model) -> None:
        models[seq] = model

    for step in range(steps):
        if not models:
            adopt(kv.open(), {})
        seq = dice.choice(list(models))
        model = models[seq]
        kind = dice.random()
        if kind < 0.25:
            more = dice.choice((1, 3, 8, 17))
            if kv.extend(seq, more):
                continue
            fresh = tokens((tag, step), len(model), len(model) + more)
            view.write(seq, fresh)
            model |= fresh
        elif kind < 0.55 and model:
            for _ in range(3):
                t = dice.randrange(len(model))
                model[t] = (tag, step, t)
                view.write(seq, {t: model[t]})
        elif kind < 0.72 and len(models) < 6:
            at = dice.randrange(len(model) + 1)
            result, child = kv.try_fork(seq, at)
            if result == 0:
                adopt(child, {t: v for t, v in model.items() if t < at})
        elif kind < 0.8:
            keep = dice.randrange(len(model) + 1)
            assert kv.truncate(seq, keep) == 0
            models[seq] = {t: v for t, v in model.items() if t < keep}
        elif kind < 0.88 and len(models) > 2:
            assert kv.end(seq) == 0
            del models[seq]
        elif kind < 0.93 and len(model) >= 8:
            # whether it is published already or not, its contents stay
            kv.publish(seq, [os.urandom(16)], dice.randrange(len(model) // 8))
        elif kind < 0.96:
            assert kv.pack(seq)[0] == 0
        else:
            for other, values in models.items():
                view.check(other, values)
        view.check(seq, models.get(seq, {}))
    for other, values in models.items():
        view.check(other, values)
        assert kv.end(other) == 0


@pytest.mark.parametrize("seed", range(4))
def test_random_interleavings(raw: Raw, seed: int) -> None:
    with raw.kv([full(2, TOKEN)], block_tokens=8, limit=CHUNK, max_tokens=200) as kv:
        view = kv.view()
        churn(kv, view, random.Random(seed), 250, seed)
        info = kv.info()
        assert (info.sequences, info.used) == (0, info.cached)
        assert info.copies > 5
        assert kv.reset() == 0
        assert kv.info().used == 0
        view.close()


def test_threads(raw: Raw) -> None:
    """Each with sequences of its own in one window."""
    with raw.kv([full(2, TOKEN)], block_tokens=8, max_sequences=64, max_tokens=200) as kv:
        view, failures = kv.view(), []

        def work(number: int) -> None:
            try:
                churn(kv, view, random.Random(number), 150, ("thread", number))
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures[0]
        view.close()


def in_children(count: int, work: Callable[[int], None]) -> None:
    children = []
    for number in range(count):
        pid = os.fork()
        if pid == 0:
            try:
                work(number)
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * count


def test_processes_with_one_mapping(raw: Raw) -> None:
    """Children of os.fork() write through the mapping they were born with."""
    with raw.kv([full(2, TOKEN)], block_tokens=8, max_sequences=64, max_tokens=200) as kv:
        view = kv.view()
        mine = filled(kv, view, "mine", 40)
        shared = kv.fork(mine, 40)

        def work(number: int) -> None:
            child = kv.fork(shared, 40)
            view.check(child, tokens("mine", 0, 40))
            view.write(child, tokens(number, 0, 40))
            churn(kv, view, random.Random(number), 100, ("process", number))
            view.check(child, tokens(number, 0, 40))
            view.check(mine, tokens("mine", 0, 40))
            assert kv.end(child) == 0

        in_children(3, work)
        view.check(mine, tokens("mine", 0, 40))
        view.check(shared, tokens("mine", 0, 40))
        assert kv.info().sequences == 2
        view.close()


def test_processes_with_mappings_of_their_own(raw: Raw) -> None:
    """A descriptor sent over a socket: another process writes to what both have mapped."""
    with raw.kv([full(2, TOKEN)], block_tokens=8) as kv:
        view = kv.view()
        parent = filled(kv, view, "p", 40)
        child = kv.fork(parent, 40)
        ours, theirs = socket.socketpair(socket.AF_UNIX)
        pid = os.fork()
        if pid == 0:
            try:
                view.close()
                os.close(kv.fd)
                raw.close()
                _, ancillary, _, _ = theirs.recvmsg(1, socket.CMSG_SPACE(4))
                other = KV(array.array("i", ancillary[0][2])[0])
                look = other.view()
                look.check(parent, tokens("p", 0, 40))
                look.write(child, tokens("c", 0, 40))
                third = other.fork(child, 37)
                look.check(parent, tokens("p", 0, 40))
                theirs.send(third.name.to_bytes(4, "little") + third.offset.to_bytes(8, "little"))
                assert theirs.recv(1) == b"w"
                look.check(parent, tokens("q", 0, 40))
                look.check(child, tokens("c", 0, 40))
                look.check(third, tokens("r", 0, 37))
            except BaseException:
                os._exit(1)
            os._exit(0)
        ours.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [kv.fd]))])
        data = ours.recv(12)
        third = Seq(int.from_bytes(data[:4], "little"), int.from_bytes(data[4:], "little"))
        view.check(third, tokens("c", 0, 37))
        view.write(parent, tokens("q", 0, 40))
        view.write(third, tokens("r", 0, 37))
        ours.send(b"w")
        assert os.waitpid(pid, 0)[1] == 0
        view.check(child, tokens("c", 0, 40))
        view.close()


@pytest.mark.parametrize("how", ["shared", "published", "sealed", "adopted", "cached"])
@pytest.mark.parametrize("before", ["read", "written", "untouched"])
def test_a_write_to_what_others_see_takes_a_copy(raw: Raw, how: str, before: str) -> None:
    """Whatever was mapped there before, and for each page of the block alone."""
    with raw.kv([full(3, TOKEN)], block_tokens=8, max_tokens=400, max_sequences=64) as kv:
        view = kv.view()
        names = chain(how, 2)
        for plane, t in itertools.product(range(3), (0, 15)):
            seq = kv.open(tokens=20)
            view.write(seq, tokens("a", 0, 20))
            other = None
            if how == "shared":
                other = kv.fork(seq, 20)
            elif how == "sealed":
                assert kv.end(kv.fork(seq, 16)) == 0
            else:
                assert kv.publish(seq, names) == 0
            if how == "adopted":
                other = kv.open()
                assert kv.lookup(other, names) == (0, 2)
            if how == "cached":
                assert kv.end(seq) == 0
                seq = kv.open()
                assert kv.lookup(seq, names) == (0, 2)
            if before == "read":
                view.check(seq, tokens("a", 0, 16))
            elif before == "written":
                view.write(seq, {8 - t // 2: ("a", 8 - t // 2)})
            copies = kv.info().copies
            view.memory[view.span(seq, t, plane)] = b"\x77" * TOKEN
            assert kv.info().copies == copies + (how != "sealed")
            for p, token in itertools.product(range(3), range(16)):
                data = view.memory[view.span(seq, token, p)]
                changed = (p, token) == (plane, t)
                assert data == (b"\x77" * TOKEN if changed else pattern(("a", token), p, TOKEN))
            if other:
                view.check(other, tokens("a", 0, 16))
            if how in ("published", "cached", "adopted"):
                late = kv.open()
                assert kv.lookup(late, names) == (0, 2)
                view.check(late, tokens("a", 0, 16))
            # a second write costs nothing more
            copies = kv.info().copies
            view.memory[view.place(seq, t, plane) + 9] = 1
            assert kv.info().copies == copies
            while kv.info().sequences:
                for s in (seq, other, late if how in ("published", "cached", "adopted") else None):
                    assert s is None or kv.end(s) == 0
            assert kv.reset() == 0
        view.close()


def test_sealing_while_it_decodes(raw: Raw) -> None:
    """Full blocks go read-only by and by; writing to old tokens works all the same."""
    with raw.kv([full(2, TOKEN)], block_tokens=8, max_tokens=1024) as kv:
        view, seq, model, dice = kv.view(), kv.open(), {}, random.Random(5)
        for length in range(0, 1024, 4):
            assert kv.extend(seq, 4) == 0
            fresh = tokens("n", length, length + 4)
            view.write(seq, fresh)
            model |= fresh
            t = dice.randrange(length + 4)
            model[t] = ("again", t, length)
            view.write(seq, {t: model[t]})
        view.check(seq, model)
        assert kv.info().copies == 0
        view.close()


def test_mprotect_does_not_make_shared_pages_writable(raw: Raw) -> None:
    """Whatever the area may do, the entries of shared and sealed blocks may not."""
    with raw.kv([full(2, TOKEN)], block_tokens=8) as kv:
        view = kv.view()
        parent = filled(kv, view, "p", 40)
        size = kv.info().window_size
        at = address_of(view.memory)
        for when in ("before", "after", "both"):
            child = kv.fork(parent, 40)
            if when != "after":
                view.check(child, tokens("p", 0, 40))
                view.check(parent, tokens("p", 0, 40))
            assert libc.mprotect(at, size, READ) == 0
            view.check(child, tokens("p", 0, 40))
            view.check(parent, tokens("p", 0, 40))
            poke = lambda s=child: view.memory.__setitem__(view.place(s, 3), 1)
            assert dies(poke) == signal.SIGSEGV
            if when == "both":
                late = kv.fork(parent, 24)
                view.check(late, tokens("p", 0, 24))
            assert libc.mprotect(at, size, READ | WRITE) == 0
            view.write(child, tokens("c", 0, 40))
            view.check(parent, tokens("p", 0, 40))
            view.write(parent, tokens(when, 0, 40))
            view.check(child, tokens("c", 0, 40))
            if when == "both":
                view.check(late, tokens("p", 0, 24))
                assert kv.end(late) == 0
            assert kv.end(child) == 0
            view.write(parent, tokens("p", 0, 40))
        # PROT_NONE and back; a part only
        child = kv.fork(parent, 40)
        page = at + parent.offset
        assert libc.mprotect(page, PAGE, 0) == 0
        assert dies(lambda: view.memory[parent.offset]) == signal.SIGSEGV
        assert libc.mprotect(page, PAGE, READ | WRITE) == 0
        view.write(parent, tokens("z", 0, 40))
        view.check(child, tokens("p", 0, 40))
        view.close()


def test_dirty_entries_that_mprotect_hides(raw: Raw) -> None:
    """Written, protected, forked, unprotected: the write after that is not the child's."""
    with raw.kv([full(2, TOKEN)], block_tokens=8) as kv:
        view, at = kv.view(), 0
        at, size = address_of(view.memory), kv.info().window_size
        parent = filled(kv, view, "p", 20)
        assert libc.mprotect(at, size, READ) == 0
        child = kv.fork(parent, 20)
        view.check(parent, tokens("p", 0, 20))
        assert libc.mprotect(at, size, READ | WRITE) == 0
        view.write(parent, tokens("q", 0, 20))
        view.check(child, tokens("p", 0, 20))
        view.close()


def test_a_fork_while_another_thread_writes(raw: Raw) -> None:
    """The child's full blocks stand still; the writer never loses what it wrote."""
    with raw.kv([full(2, TOKEN)], block_tokens=8) as kv:
        view, stop, failures = kv.view(), threading.Event(), []
        parent = filled(kv, view, 0, 28)

        def write() -> None:
            try:
                for turn in itertools.count():
                    for t in (0, 9, 23, 27):
                        view.write(parent, {t: (turn, t)})
                    view.check(parent, {t: (turn, t) for t in (0, 9, 23, 27)})
                    if stop.is_set():
                        return
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=write)
        thread.start()
        for _ in range(150):
            child = kv.fork(parent, 28)
            first = [view.memory[view.span(child, 0, plane, 0, 28)] for plane in (0, 1)]
            again = [view.memory[view.span(child, 0, plane, 0, 28)] for plane in (0, 1)]
            assert first == again
            view.check(child, {t: (0, t) for t in range(1, 9)})
            assert kv.end(child) == 0
        stop.set()
        thread.join()
        assert not failures, failures[0]
        view.close()


def test_another_process_writes_during_forks(raw: Raw) -> None:
    """With entries of its own for the same pages: a fork takes them from it, too."""
    with raw.kv([full(2, TOKEN)], block_tokens=8) as kv:
        view = kv.view()
        parent = filled(kv, view, 0, 16)
        pid = os.fork()
        if pid == 0:
            while True:
                for value in (b"\x55", b"\xaa"):
                    view.memory[view.span(parent, 0, 0, 0, 16)] = value * (16 * TOKEN)
        for _ in range(150):
            child = kv.fork(parent, 16)
            first = view.memory[view.span(child, 0, 0, 0, 16)]
            for _ in range(3):
                assert view.memory[view.span(child, 0, 0, 0, 16)] == first
            assert kv.end(child) == 0
        os.kill(pid, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
        view.close()


@pytest.mark.parametrize("seed", range(3))
def test_chains_of_forks(raw: Raw, seed: int) -> None:
    """Each from the one before, each with a token of its own; closed in any order."""
    dice = random.Random(seed)
    with raw.kv([full(2, TOKEN)], block_tokens=8, max_sequences=24) as kv:
        view = kv.view()
        models = {filled(kv, view, "root", 30): tokens("root", 0, 30)}
        for _ in range(20):
            seq = list(models)[-1]
            child = kv.fork(seq, 30)
            models[child] = dict(models[seq])
            t = dice.randrange(30)
            models[child][t] = (child.name, t)
            view.write(child, {t: models[child][t]})
        # each has a last block of its own, and one of the others at most
        blocks = kv.info().used // kv.block_bytes()
        assert blocks <= 4 + 20 * 2
        order = list(models)
        dice.shuffle(order)
        while order:
            for seq in order:
                view.check(seq, models[seq])
            assert kv.end(order.pop()) == 0
        assert kv.info().used == 0
        view.close()


def test_a_fork_that_fails(raw: Raw) -> None:
    with raw.kv([FAT], limit=CHUNK, block_tokens=8, max_sequences=3) as kv:
        view = kv.view()
        parent = filled(kv, view, "p", 124)
        child = kv.fork(parent, 120)
        before = kv.counts()
        for at in (124, 1, 119):
            assert kv.try_fork(parent, at)[0] == errno.ENOSPC
            assert kv.counts() == before
        third = kv.fork(parent, 8)
        for at in (0, 8, 124):
            assert kv.try_fork(parent, at)[0] == errno.ENOBUFS
        # no room for a copy: a signal, and nothing has changed for anybody
        before = kv.counts()
        assert dies(lambda: view.write(child, {0: "c"})) == signal.SIGBUS
        assert kv.counts() == before
        view.check(child, tokens("p", 0, 120))
        view.check(parent, tokens("p", 0, 124))
        view.check(third, tokens("p", 0, 8))
        assert kv.truncate(parent, 120) == 0
        view.write(child, {0: "c"})
        view.check(child, {0: "c"} | tokens("p", 1, 120))
        view.check(parent, tokens("p", 0, 120))
        view.close()


def test_a_full_cache_is_written_in_place(raw: Raw) -> None:
    """Who is alone with a block needs no room to write to it, whoever it came from."""
    with raw.kv([FAT], limit=CHUNK, block_tokens=8) as kv:
        view = kv.view()
        parent = filled(kv, view, "p", 128)
        child = kv.fork(parent, 128)
        assert kv.end(parent) == 0
        view.write(child, tokens("c", 0, 128))
        view.check(child, tokens("c", 0, 128))
        assert kv.info().copies == 0
        view.close()


def test_the_child_of_a_tenant_is_the_tenants(raw: Raw) -> None:
    with raw.kv([full(2, TOKEN)], block_tokens=8) as kv:
        names = chain("t", 1)
        parent = kv.open(tenant=7, tokens=8)
        child = kv.fork(parent, 8)
        assert kv.publish(child, names) == 0
        assert kv.peek(kv.open(tenant=7), names) == (0, 1)
        assert kv.peek(kv.open(tenant=8), names) == (0, 0)
        assert abi.KVFork(sequence=child.name).child == 0
