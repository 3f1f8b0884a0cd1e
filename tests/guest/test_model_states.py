# SPDX-License-Identifier: MIT
"""What becomes of generations: every arrow of the drawing in core/slot.h, seen through poll, ioctl and sysfs."""

from __future__ import annotations

import errno
import os
import random
import select
from collections.abc import Iterator

import pytest

from device import CHUNK, KASAN, PAGE, SYSFS, Generation, Raw, Slot, becomes, file_of, read, round_up, wait_for, weights
from tensormem import abi

CREATE, EXCL, WRITE = abi.OpenFlag.CREATE, abi.OpenFlag.EXCL, abi.OpenFlag.WRITE
VERIFY, KEEP = abi.StageFlag.VERIFY, abi.StageFlag.KEEP
State = abi.ModelState
LOADING, STAGED, ACTIVE = State.LOADING, State.STAGED, State.ACTIVE
PREVIOUS, RETIRED, FAILED = State.PREVIOUS, State.RETIRED, State.FAILED
IN, PRI, ERR, HUP = select.POLLIN, select.POLLPRI, select.POLLERR, select.POLLHUP

#: One chunk and a tail: more than one piece.
SIZE = CHUNK + 3 * PAGE + 5
HELD = round_up(SIZE, PAGE)
#: What poll says of a generation in each state.
POLLED = {LOADING: PRI, STAGED: IN | PRI, ACTIVE: IN, PREVIOUS: IN | PRI, RETIRED: IN | PRI, FAILED: IN | PRI | ERR}


def model(number: int) -> bytes:
    return weights(number, SIZE)


@pytest.fixture
def slow() -> Iterator[int]:
    """A file that takes a second or more to load, with VERIFY: none of what a test does next is so slow."""
    fd = os.memfd_create("slow")
    os.truncate(fd, 128 * CHUNK)
    yield fd
    os.close(fd)


def check(slot: Slot, expected: dict[int, State], *held: Generation, last: int = 0) -> None:
    """The slot has these generations in these states and no other; its own word, sysfs and poll agree."""
    slot.buried()
    info = slot.info()
    place = {state: number for number, state in expected.items()}
    active, previous, staged = (place.get(s, 0) for s in (ACTIVE, PREVIOUS, STAGED))
    staged = staged or place.get(LOADING, 0) or place.get(FAILED, 0)
    assert (info.active, info.previous, info.staged) == (active, previous, staged)
    assert info.generations == len(expected) == read("model/generations")
    assert info.last == (last or max(expected, default=0))
    assert slot.told() == {number: state.name.lower() for number, state in expected.items()}
    for name in ("active", "previous", "staged"):
        assert slot.read(name) == getattr(info, name)
    for gen in held:
        state = expected[gen.number]
        told = gen.info()
        assert (told.state, told.generation) == (state, gen.number)
        assert gen.events() == POLLED[state], state
        for name in ("size", "loaded", "readers", "private_bytes", "shared_bytes", "error"):
            now = getattr(gen.info(), name)
            # one that is being loaded goes on between the two
            assert slot.read(f"{gen.number}/{name}") == now or state == LOADING, name
        assert slot.read(f"{gen.number}/cached") == 0


def gone(slot: Slot, number: int) -> bool:
    return not (SYSFS / "model" / slot.name / str(number)).exists()


# Arrow by arrow


def test_loading_to_staged(slot: Slot, slow: int) -> None:
    with slot.stage(slow, size=32 * CHUNK) as gen:
        assert gen.number == 1
        gen.loaded()
        check(slot, {1: STAGED}, gen)
        info = gen.info()
        assert (info.loaded, info.size, info.private_bytes) == (32 * CHUNK,) * 3
        assert slot.try_acquire()[0] == errno.ENOENT  # nothing is active
        with slot.acquire(1) as reader:
            check(slot, {1: STAGED}, gen, reader)
            assert reader.info().readers == 2


def test_loading(slot: Slot, slow: int) -> None:
    """It can be neither committed nor read; what is active is not affected."""
    slot.swap(model(1))
    with slot.acquire() as active, slot.stage(slow, VERIFY) as gen:
        check(slot, {1: ACTIVE, 2: LOADING}, active, gen)
        assert slot.commit(2) == errno.EAGAIN
        with pytest.raises(BlockingIOError):
            os.read(gen.fd, 1)
        with pytest.raises(BlockingIOError):
            os.pread(gen.fd, PAGE, PAGE)
        assert os.fstat(gen.fd).st_size == 128 * CHUNK
        assert active.contents() == model(1)
        assert gen.info().loaded < 128 * CHUNK
        check(slot, {1: ACTIVE, 2: LOADING}, active, gen)


def test_loading_to_retired(slot: Slot, slow: int) -> None:
    """Abort stops the load; its memory comes back though its descriptor is open."""
    slot.swap(model(1))
    with slot.acquire() as active, slot.stage(slow, VERIFY) as gen:
        wait_for(lambda: gen.info().loaded)
        assert slot.abort(2) == 0
        check(slot, {1: ACTIVE, 2: RETIRED}, active)
        assert gen.events() == IN | PRI | ERR
        assert (gen.state(), gen.info().error) == (RETIRED, errno.ECANCELED)
        becomes("model/held", HELD)
        for call in (lambda: os.read(gen.fd, 1), lambda: os.pread(gen.fd, 1, CHUNK)):
            with pytest.raises(OSError, match="Stale"):
                call()
        assert slot.commit(2) == slot.abort(2) == slot.try_acquire(2)[0] == errno.ENOENT
        assert active.contents() == model(1)
    wait_for(lambda: gone(slot, 2))


def test_loading_to_failed(slot: Slot, slow: int) -> None:
    slot.swap(model(1))
    with slot.acquire() as active, slot.stage(slow, VERIFY, size=CHUNK) as gen:
        assert gen.failed() == errno.EBADMSG
        check(slot, {1: ACTIVE, 2: FAILED}, active, gen)
        becomes("model/held", HELD)  # what is not whole is no use
        assert slot.commit(2) == errno.ESTALE
        for call in (lambda: os.read(gen.fd, 1), lambda: os.pread(gen.fd, 1, PAGE)):
            with pytest.raises(OSError, match="Stale"):
                call()
        assert slot.try_stage(slow)[0] == errno.EBUSY  # until it is aborted
        assert slot.abort(2) == 0
        assert slot.places() == (1, 0, 0)
        assert (gen.state(), gen.info().error) == (RETIRED, errno.EBADMSG)
    check(slot, {1: ACTIVE}, last=2)


def test_staged_to_active(slot: Slot) -> None:
    with slot.load(model(1)) as gen:
        check(slot, {1: STAGED}, gen)
        assert slot.commit(1) == 0
        check(slot, {1: ACTIVE}, gen)
        assert slot.commit(1) == errno.ENOENT
        assert slot.abort(1) == errno.ENOENT
        assert slot.rollback()[0] == errno.ENOENT
        assert gen.contents() == model(1)
    check(slot, {1: ACTIVE})


def test_staged_to_retired(slot: Slot) -> None:
    """Who has it keeps it."""
    with slot.load(model(1)) as gen:
        assert slot.abort(1) == 0
        check(slot, {1: RETIRED}, gen)
        assert gen.contents() == model(1)
        becomes("model/held", HELD)
    check(slot, {}, last=1)
    becomes("model/held", 0)
    assert gone(slot, 1)


def test_active_to_previous_to_retired(slot: Slot) -> None:
    readers = []
    for number in (1, 2, 3, 4):
        assert slot.swap(model(number)) == number
        readers.append(slot.acquire())
        states = {n: ACTIVE if n == number else PREVIOUS if n == number - 1 else RETIRED
                  for n in range(1, number + 1)}  # fmt: skip
        check(slot, states, *readers)
    becomes("model/held", 4 * HELD)
    for reader in readers:
        assert reader.contents() == model(reader.number)
    # in the slot anyway; then out of it
    readers[3].close()
    readers[2].close()
    check(slot, {1: RETIRED, 2: RETIRED, 3: PREVIOUS, 4: ACTIVE}, *readers[:2])
    readers[0].close()
    check(slot, {2: RETIRED, 3: PREVIOUS, 4: ACTIVE}, readers[1])
    becomes("model/held", 3 * HELD)
    readers[1].close()
    check(slot, {3: PREVIOUS, 4: ACTIVE})
    becomes("model/held", 2 * HELD)


def test_rollback(slot: Slot) -> None:
    """The two change places, again and again."""
    slot.swap(model(1))
    slot.swap(model(2))
    with slot.acquire(1) as one, slot.acquire(2) as two:
        check(slot, {1: PREVIOUS, 2: ACTIVE}, one, two)
        assert slot.rollback() == (0, 1)
        check(slot, {1: ACTIVE, 2: PREVIOUS}, one, two)
        assert slot.rollback(1)[0] == errno.ENOENT  # it is the active one
        assert slot.rollback(2) == (0, 2)
        check(slot, {1: PREVIOUS, 2: ACTIVE}, one, two)
        assert slot.rollback(1) == (0, 1)
        assert (one.contents(), two.contents()) == (model(1), model(2))
    # the one that is let go of by the next commit is the one that is previous
    slot.swap(model(3))
    check(slot, {1: PREVIOUS, 3: ACTIVE})
    assert slot.rollback() == (0, 1)
    check(slot, {1: ACTIVE, 3: PREVIOUS})
    with slot.acquire() as gen:
        assert gen.contents() == model(1)


def test_rollback_beside_a_staged_one(slot: Slot) -> None:
    slot.swap(model(1))
    slot.swap(model(2))
    with slot.load(model(3)) as gen:
        assert slot.rollback() == (0, 1)
        check(slot, {1: ACTIVE, 2: PREVIOUS, 3: STAGED}, gen)
        assert slot.commit(3) == 0
        check(slot, {1: PREVIOUS, 3: ACTIVE}, gen)
        assert slot.rollback() == (0, 1)
        check(slot, {1: ACTIVE, 3: PREVIOUS}, gen)


def test_remove_retires_all(raw: Raw, slot: Slot, slow: int) -> None:
    slot.swap(model(1))
    slot.swap(model(2))
    with slot.acquire(1) as one, slot.acquire(2) as two, slot.load(model(3)) as three:
        before = slot.info().generations
        assert before == 3
        assert slot.remove() == 0
        for gen in (one, two, three):
            assert gen.state() == RETIRED
            assert gen.contents() == model(gen.number)
            assert gen.events() & ~HUP == IN | PRI
        assert slot.events() & HUP
        assert read("model/slots") == 0
        becomes("model/generations", 3)
        becomes("model/held", 3 * HELD)
    becomes("model/generations", 0)
    becomes("model/held", 0)
    with raw.slot("loading", CREATE | EXCL | WRITE, mode=0o600) as other, other.stage(slow, VERIFY) as gen:
        assert other.remove() == 0
        assert gen.settled().state() == RETIRED
        becomes("model/held", 0)


def test_numbers_are_never_used_twice(raw: Raw, slot: Slot) -> None:
    for number in range(1, 30):
        gen = slot.load(weights(number, PAGE))
        assert gen.number == slot.info().last == number
        if number % 3 == 0:
            assert slot.abort(number) == 0
        elif number % 3 == 1:
            assert slot.commit(number) == 0
        gen.close()  # else that aborts it
    assert (slot.places(), slot.info().last) == ((28, 25, 0), 29)
    with raw.slot("other", CREATE | EXCL | WRITE, mode=0o600) as other:  # of its own
        assert other.swap(weights(1, PAGE)) == 1
        assert other.remove() == 0


# Who closes it


@pytest.mark.parametrize("when", [LOADING, STAGED, FAILED])
@pytest.mark.parametrize("flags", [0, KEEP])
def test_closing_the_stagers_descriptor(slot: Slot, slow: int, when: State, flags: int) -> None:
    """Aborts what is not committed; with KEEP the slot keeps what is loaded."""
    verify = VERIFY if when in (LOADING, FAILED) else 0
    gen = slot.stage(slow, verify | flags, size=128 * CHUNK if when == LOADING else CHUNK)
    if when != LOADING:
        gen.settled()
    assert gen.state() == when
    gen.close()
    if flags == KEEP and when == STAGED:
        assert slot.places() == (0, 0, 1)
        with slot.acquire(1) as again:
            check(slot, {1: STAGED}, again)
        # a reader's descriptor is not the stager's
        check(slot, {1: STAGED})
        assert slot.commit(1) == 0
    else:
        assert slot.places() == (0, 0, 0)
        assert slot.commit(1) == errno.ENOENT
        wait_for(lambda: slot.info().generations == 0)
        becomes("model/held", 0)


def test_a_copy_of_the_stagers_descriptor_keeps_it(slot: Slot) -> None:
    with slot.load(model(1)) as gen:
        copy = os.dup(gen.fd)
    check(slot, {1: STAGED})
    os.close(copy)
    check(slot, {}, last=1)


def test_a_mapping_of_the_stager_keeps_it(slot: Slot) -> None:
    """It is of the same open file."""
    gen = slot.load(model(1))
    view = gen.view()
    gen.close()
    check(slot, {1: STAGED})
    assert view[:SIZE] == model(1)
    view.close()
    check(slot, {}, last=1)


def test_a_reader_of_a_staged_one_does_not_abort_it(slot: Slot) -> None:
    with slot.load(model(1)) as gen:
        slot.acquire(1).close()
        check(slot, {1: STAGED}, gen)
        reader = slot.acquire(1)
    # the stager has gone, the reader keeps what it had
    with reader:
        check(slot, {1: RETIRED}, reader)
        assert reader.contents() == model(1)


def test_closing_after_the_commit_is_nothing(slot: Slot) -> None:
    gen = slot.load(model(1))
    assert slot.commit(1) == 0
    gen.close()
    check(slot, {1: ACTIVE})
    gen = slot.load(model(2))
    assert slot.commit(2) == 0
    assert slot.rollback() == (0, 1)
    gen.close()
    check(slot, {1: ACTIVE, 2: PREVIOUS})


# Readers


def test_readers_are_counted(slot: Slot) -> None:
    slot.swap(model(1))
    readers: list[Generation] = []
    for count in range(1, 9):
        readers.append(slot.acquire())
        assert [r.info().readers for r in readers] == [count] * count
        assert slot.read("1/readers") == count
    copy = os.dup(readers[0].fd)  # the same open file
    assert readers[1].info().readers == 8
    view = readers[0].view()
    readers[0].close()
    os.close(copy)
    assert readers[1].info().readers == 8  # the mapping is one too
    view.close()
    assert readers[1].info().readers == 7
    for reader in readers:
        reader.close()
    assert slot.read("1/readers") == 0


@pytest.mark.parametrize("keeps", ["descriptor", "mapping", "both"])
def test_memory_comes_back_with_the_last_reader(slot: Slot, keeps: str) -> None:
    slot.swap(model(1))
    readers = [slot.acquire() for _ in range(3)]
    views = [reader.view() for reader in readers] if keeps != "descriptor" else []
    if keeps == "mapping":
        for reader in readers:
            reader.close()
    slot.swap(weights(2, PAGE))
    slot.swap(weights(3, PAGE))
    becomes("chunk/used", 1)
    becomes("model/held", HELD + 2 * PAGE)
    for thing in [*views, *readers]:
        becomes("chunk/used", 1)
        assert slot.told()[1] == "retired"
        if views:
            assert views[-1].closed or views[-1][:SIZE] == model(1)
        thing.close()
        if keeps == "mapping" and thing is views[-1]:
            break
    becomes("chunk/used", 0)
    becomes("model/held", 2 * PAGE)
    wait_for(lambda: gone(slot, 1))


def test_the_bill_is_that_of_the_client(raw: Raw, slot: Slot) -> None:
    """Which opened the slot's descriptor that staged it, for as long as the memory is held."""
    with Raw() as other, other.slot(slot.name) as theirs:
        theirs.swap(model(1))
        assert other.info().used == HELD
        assert raw.info().used == 0
        slot.swap(model(2))
        assert (other.info().used, raw.info().used) == (HELD, HELD)
    becomes("clients/bytes", 2 * HELD)  # its descriptors are closed and the memory is there
    slot.swap(weights(3, PAGE))
    becomes("clients/bytes", HELD + PAGE)
    wait_for(lambda: raw.info().used == HELD + PAGE)


def test_a_slot_outlives_its_client() -> None:
    with Raw() as client, client.slot("outlives", CREATE | EXCL | WRITE, mode=0o600) as slot:
        slot.swap(model(1))
    assert read("model/slots") == 1
    becomes("model/held", HELD)
    with Raw() as client, client.slot("outlives") as slot:
        with slot.acquire() as gen:
            assert gen.contents() == model(1)
        assert slot.remove() == 0
    assert read("model/slots") == 0
    becomes("model/held", 0)


# Poll of a slot


def test_a_new_generation_is_told_once(raw: Raw, slot: Slot) -> None:
    """Until this descriptor has acquired or described what is active."""
    with raw.slot(slot.name, 0) as other:
        for descriptor in (slot, other):
            assert descriptor.events() == 0
        slot.swap(model(1))
        for look in (lambda: slot.info(), lambda: slot.acquire().close()):
            assert slot.events(1) == slot.events() == IN
            look()
            assert slot.events() == 0
            assert other.events() == IN
            with slot.load(weights(2, PAGE)) as gen:
                assert slot.events() == 0  # not yet active
                assert slot.commit(gen.number) == 0
        # it knows of 3 others, all it has to say is that there is one
        with other.acquire() as gen:
            assert gen.number == 3
        assert other.events() == 0


def test_a_rollback_is_told(slot: Slot) -> None:
    slot.swap(model(1))
    slot.swap(model(2))
    slot.info()
    assert slot.events() == 0
    assert slot.rollback() == (0, 1)
    assert slot.events() == IN
    # there and back again: what is active is what was seen
    assert slot.rollback() == (0, 2)
    assert slot.events() == 0


def test_an_older_one_acquired_is_not_the_active_one(slot: Slot) -> None:
    slot.swap(model(1))
    slot.swap(model(2))
    slot.info()
    with slot.acquire(1):
        assert slot.events() == IN
    slot.info()
    assert slot.events() == 0


def test_a_removal_is_told(raw: Raw, slot: Slot) -> None:
    with raw.slot(slot.name, 0) as other:
        assert slot.remove() == 0
        assert other.events(1) & HUP
        assert slot.events() & HUP


@pytest.mark.parametrize("event", ["commit", "rollback", "remove"])
def test_poll_of_a_slot_wakes_up(raw: Raw, slot: Slot, event: str) -> None:
    slot.swap(model(1))
    slot.swap(model(2))
    pid = os.fork()
    if pid == 0:
        with raw.slot(slot.name, 0) as other:
            other.info()
            told = other.events(60)
            os._exit(told)
    asleep(pid)
    if event == "commit":
        slot.swap(model(3))
    elif event == "rollback":
        assert slot.rollback() == (0, 1)
    else:
        assert slot.remove() == 0
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status & (HUP if event == "remove" else IN)


@pytest.mark.parametrize("event", ["abort", "remove", "loaded", "failed"])
def test_poll_of_a_staged_one_wakes_up(slot: Slot, slow: int, event: str) -> None:
    flags = 0 if event == "loaded" else VERIFY
    gen = slot.stage(slow, flags)
    pid = os.fork()
    if pid == 0:
        poll = select.poll()
        poll.register(gen.fd, IN)
        os._exit(poll.poll(120_000)[0][1])
    if event == "abort":
        assert slot.abort(1) == 0
    elif event == "remove":
        assert slot.remove() == 0
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status & IN
    assert bool(status & ERR) == (event == "failed") or event in ("abort", "remove")
    gen.close()


@pytest.mark.parametrize("event", ["commit", "rollback", "remove"])
def test_poll_of_the_active_one_wakes_up(slot: Slot, event: str) -> None:
    """A reader learns that it is out of date from what it holds."""
    slot.swap(model(1))
    slot.swap(model(2))
    gen = slot.acquire()
    pid = os.fork()
    if pid == 0:
        poll = select.poll()
        poll.register(gen.fd, PRI)
        os._exit(poll.poll(120_000)[0][1])
    asleep(pid)
    if event == "commit":
        slot.swap(model(3))
    elif event == "rollback":
        assert slot.rollback() == (0, 1)
    else:
        assert slot.remove() == 0
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & PRI
    gen.close()


def asleep(pid: int) -> None:
    def state() -> bool:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] == "S"

    wait_for(state)


# At random


@pytest.mark.parametrize("seed", range(4))
def test_any_order(slot: Slot, seed: int) -> None:
    """Calls with good and bad numbers in any order, against a plain model of the drawing."""
    dice = random.Random(seed)
    state: dict[int, State] = {}
    held: list[Generation] = []
    last = 0

    def at(wanted: State) -> int:
        return next((number for number, s in state.items() if s == wanted), 0)

    def retire(number: int) -> None:
        if number:
            state[number] = RETIRED

    def drop_unheld() -> None:
        kept = {gen.number for gen in held}
        for number in [n for n, s in state.items() if s == RETIRED and n not in kept]:
            del state[number]

    for _ in range(60 if KASAN or PAGE > 4096 else 200):
        kind = dice.randrange(8)
        number = dice.choice([0, *state, last + 1])
        active, previous, staged = at(ACTIVE), at(PREVIOUS), at(STAGED)
        if kind <= 1:
            size = dice.choice((1, PAGE, 3 * PAGE))
            file = file_of(weights(last + 1, size))
            if staged:
                assert slot.try_stage(file)[0] == errno.EBUSY
            else:
                last += 1
                with slot.stage(file, KEEP) as gen:
                    assert gen.loaded().number == last
                state[last] = STAGED
            os.close(file)
        elif kind == 2:
            assert slot.commit(number) == (0 if number and number == staged else errno.ENOENT)
            if number and number == staged:
                retire(previous)
                state[number] = ACTIVE
                if active:
                    state[active] = PREVIOUS
        elif kind == 3:
            assert slot.abort(number) == (0 if number and number == staged else errno.ENOENT)
            if number and number == staged:
                retire(number)
        elif kind == 4:
            good = bool(previous) and number in (0, previous)
            result, now = slot.rollback(number)
            assert result == (0 if good else errno.ENOENT)
            if good:
                assert now == previous
                state[previous], state[active] = ACTIVE, PREVIOUS
        elif kind <= 6 and len(held) < 6:
            wanted = number or active
            result, item = slot.try_acquire(number)
            assert result == (0 if wanted and state.get(wanted, RETIRED) != RETIRED else errno.ENOENT)
            if result == 0:
                assert item.generation == wanted
                held.append(Generation(item.fd, wanted))
        elif held:
            held.pop(dice.randrange(len(held))).close()
        drop_unheld()
        check(slot, state, *held, last=last)
        for gen in held:
            assert gen.contents() == weights(gen.number, gen.info().size)
    for gen in held:
        gen.close()
