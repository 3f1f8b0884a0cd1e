# SPDX-License-Identifier: MIT
"""Who may do what with a slot: owner, group and mode as of a file; and how long it lives."""

from __future__ import annotations

import array
import errno
import mmap
import os
import random
import signal
import socket
import stat
import subprocess
import threading
from collections.abc import Callable

import pytest
from test_limits import drop

from conftest import USAGE, settled
from device import CHUNK, PAGE, SYSFS, Generation, Raw, Slot, file_of, read, weights
from process import killed_at_random, libc, status_of
from tensormem import abi

CREATE, EXCL, WRITE = abi.OpenFlag.CREATE, abi.OpenFlag.EXCL, abi.OpenFlag.WRITE
KEEP = abi.StageFlag.KEEP
NEW = CREATE | EXCL | WRITE
CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER = 0, 1, 2, 3
OWNER, GROUP, MEMBER, STRANGER = 1000, 990, 1001, 65534
SIZE = 3 * PAGE + 1


def become(uid: int, gid: int, *groups: int) -> None:
    os.setgroups(list(groups))
    os.setgid(gid)
    os.setuid(uid)


def as_user(uid: int, gid: int, action: Callable[[], object], *groups: int) -> None:
    """In a child; what it asserts fails here."""

    def child() -> None:
        become(uid, gid, *groups)
        action()

    assert status_of(child) == 0


def owned(raw: Raw, mode: int, name: str = "owned") -> Slot:
    """By OWNER and GROUP, with generation 1 active."""
    slot = raw.slot(name, NEW, mode=mode)
    slot.swap(weights(1, SIZE))
    os.fchown(slot.fd, OWNER, GROUP)
    return slot


WHO = {"owner": (OWNER, OWNER), "group": (STRANGER, GROUP), "member": (MEMBER, MEMBER, GROUP),
       "others": (STRANGER, STRANGER)}  # fmt: skip


@pytest.mark.parametrize("mode", [0o000, 0o400, 0o200, 0o600, 0o640, 0o660, 0o664, 0o666, 0o004, 0o060, 0o002, 0o044])
@pytest.mark.parametrize("who", WHO)
def test_modes(raw: Raw, mode: int, who: str) -> None:
    """To acquire takes read; a descriptor for all else too, and write; the owner has the owner's and no other's."""
    slot = owned(raw, 0o600)
    os.fchmod(slot.fd, mode)
    bits = mode >> (6 if who == "owner" else 0 if who == "others" else 3) & 7
    uid, gid, *groups = WHO[who]
    file = file_of(weights(2, PAGE))

    def child() -> None:
        result, request = raw.try_slot("owned", 0)
        assert result == (0 if bits & 4 else errno.EACCES)
        if result == 0:
            with Slot(request.fd, "owned") as reader, reader.acquire() as gen:
                assert gen.contents() == weights(1, SIZE)
                assert reader.try_stage(file)[0] == errno.EACCES
                assert reader.remove() == errno.EACCES
        result, request = raw.try_slot("owned", WRITE)
        assert result == (0 if bits & 6 == 6 else errno.EACCES)
        if result == 0:
            with Slot(request.fd, "owned") as writer:
                with writer.stage(file) as gen:
                    assert writer.abort(gen.loaded().number) == 0
                with writer.acquire() as gen:
                    assert gen.contents() == weights(1, SIZE)
        assert raw.try_slot("owned", CREATE | WRITE, mode=0o666)[0] == (0 if bits & 6 == 6 else errno.EACCES)
        assert raw.try_slot("owned", NEW, mode=0o666)[0] == errno.EEXIST

    as_user(uid, gid, child, *groups)
    assert slot.remove() == 0
    slot.close()
    os.close(file)


def test_root_may(raw: Raw) -> None:
    """And without the capability for it root is a user like others."""
    with owned(raw, 0o000) as slot:
        with raw.slot("owned") as other, other.acquire() as gen:
            assert gen.contents() == weights(1, SIZE)

        def child() -> None:
            drop(CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH)
            for flags in (0, WRITE):
                assert raw.try_slot("owned", flags)[0] == errno.EACCES

        assert status_of(child) == 0
        assert slot.remove() == 0


@pytest.mark.parametrize("umask", [0, 0o22, 0o27, 0o77, 0o777])
@pytest.mark.parametrize("mode", [0, 0o600, 0o640, 0o666])
def test_a_new_slot_is_its_makers(raw: Raw, umask: int, mode: int) -> None:
    def child() -> None:
        os.umask(umask)
        with raw.slot("new", NEW, mode=mode) as slot:
            status = os.fstat(slot.fd)
            assert (status.st_uid, status.st_gid) == (OWNER, GROUP)
            assert stat.S_IMODE(status.st_mode) == mode & ~umask
            # its maker has it open for writing, whatever the mode
            assert slot.swap(weights(1, PAGE)) == 1

    as_user(OWNER, GROUP, child)
    with raw.slot("new") as slot:
        assert (slot.read("uid"), slot.read("gid")) == (OWNER, GROUP)
        assert mode_of(slot) == mode & ~umask
        assert slot.remove() == 0


def mode_of(slot: Slot) -> int:
    return int((SYSFS / "model" / slot.name / "mode").read_text(), 8)


def test_chmod_and_chown(raw: Raw) -> None:
    """Through any descriptor of it, by its owner; all see it."""
    with owned(raw, 0o644) as slot:

        def owner() -> None:
            with raw.slot("owned", 0) as reader:
                os.fchmod(reader.fd, 0o604)
                os.fchown(reader.fd, -1, OWNER)  # a group of its own
                for uid, gid in ((STRANGER, -1), (-1, STRANGER), (0, 0)):
                    with pytest.raises(PermissionError):
                        os.fchown(reader.fd, uid, gid)

        def stranger() -> None:
            with raw.slot("owned", 0) as reader:
                with pytest.raises(PermissionError):
                    os.fchmod(reader.fd, 0o666)
                with pytest.raises(PermissionError):
                    os.fchown(reader.fd, STRANGER, STRANGER)

        as_user(OWNER, OWNER, owner)
        status = os.fstat(slot.fd)
        assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (OWNER, OWNER, 0o604)
        assert (slot.read("uid"), slot.read("gid"), mode_of(slot)) == (OWNER, OWNER, 0o604)
        as_user(STRANGER, STRANGER, stranger)
        os.fchmod(slot.fd, 0o600)
        os.fchown(slot.fd, STRANGER, STRANGER)
        as_user(OWNER, OWNER, lambda: denied(raw, "owned"))
        assert slot.remove() == 0


def denied(raw: Raw, name: str) -> None:
    for flags in (0, WRITE):
        assert raw.try_slot(name, flags)[0] == errno.EACCES


def test_a_mode_is_for_who_comes_later(raw: Raw) -> None:
    """As with a file: what a descriptor was opened for, it goes on to be good for."""
    with owned(raw, 0o666) as slot, raw.slot("owned", 0) as reader, raw.slot("owned") as writer:

        def child() -> None:
            assert os.read(told, 1) == b"x"
            denied(raw, "owned")
            with reader.acquire() as gen:
                assert gen.contents() == weights(1, SIZE)
            file = file_of(weights(2, PAGE))
            with writer.stage(file) as gen:
                assert writer.commit(gen.loaded().number) == 0

        told, tell = os.pipe()
        os.fchmod(slot.fd, 0)
        os.write(tell, b"x")
        as_user(STRANGER, STRANGER, child)
        assert slot.places() == (2, 1, 0)
        assert slot.remove() == 0
        os.close(told)
        os.close(tell)


def test_a_generation_belongs_to_nobody_else(raw: Raw) -> None:
    """Its descriptor cannot be made writable by anybody who has it."""
    with owned(raw, 0o644) as slot, slot.acquire() as gen:

        def child() -> None:
            for call in (
                lambda: os.fchmod(gen.fd, 0o666), lambda: os.fchown(gen.fd, STRANGER, -1),
                lambda: os.open(f"/proc/self/fd/{gen.fd}", os.O_RDWR), lambda: os.ftruncate(gen.fd, 0),
            ):  # fmt: skip
                with pytest.raises(OSError, match=r"."):
                    call()
            assert gen.contents() == weights(1, SIZE)

        as_user(STRANGER, STRANGER, child)
        # nor by root: nothing but what was granted
        for flags in (os.O_RDWR, os.O_WRONLY, os.O_RDWR | os.O_TRUNC):
            with pytest.raises(OSError, match=r"."):
                os.close(os.open(f"/proc/self/fd/{gen.fd}", flags))
        assert gen.contents() == weights(1, SIZE)
        assert slot.remove() == 0


def test_what_can_be_opened_again_by_proc(raw: Raw) -> None:
    """If at all, then as the descriptor it was."""
    with owned(raw, 0o600) as slot, slot.acquire() as gen:
        for thing in (slot, gen):
            try:
                again = os.open(f"/proc/self/fd/{thing.fd}", os.O_RDONLY)
            except OSError:
                continue
            assert os.fstat(again).st_ino == os.fstat(thing.fd).st_ino
            assert thing is slot or os.pread(again, PAGE, 0) in (weights(1, SIZE)[:PAGE],)
            os.close(again)
        assert gen.contents() == weights(1, SIZE)
        assert slot.remove() == 0


# How long it lives


def test_it_outlives_its_maker() -> None:
    def child() -> None:
        with Raw() as client, client.slot("outlives", NEW, mode=0o600) as slot:
            slot.swap(weights(1, SIZE))
            slot.load(weights(2, SIZE), KEEP).close()

    for end in ("exit", "kill"):
        action = child if end == "exit" else lambda: (child(), os.kill(os.getpid(), signal.SIGKILL))
        assert status_of(action) == (0 if end == "exit" else signal.SIGKILL)
        assert read("model/slots") == 1
        with Raw() as client, client.slot("outlives") as slot:
            assert slot.places() == (1, 0, 2)
            with slot.acquire() as gen:
                assert gen.contents() == weights(1, SIZE)
            assert slot.commit(2) == 0
            with slot.acquire() as gen:
                assert gen.contents() == weights(2, SIZE)
            assert slot.remove() == 0


@pytest.mark.parametrize("what", ["slot", "generation", "both"])
def test_descriptors_over_a_socket(raw: Raw, slot: Slot, what: str) -> None:
    """Who gets one can use it as it is, and keeps what it refers to."""
    slot.swap(weights(1, SIZE))
    gen = slot.acquire()
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    sent = {"slot": [slot.fd], "generation": [gen.fd], "both": [slot.fd, gen.fd]}[what]
    name = slot.name
    go, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            ours.close()
            os.close(tell)
            raw.close()
            slot.close()
            gen.close()
            become(STRANGER, STRANGER)
            _, ancillary, _, _ = theirs.recvmsg(1, socket.CMSG_SPACE(8))
            got = list(array.array("i", ancillary[0][2]))
            os.read(go, 1)  # until the parent has let go
            if what != "generation":
                with Slot(got.pop(0), name) as mine, mine.acquire() as reader:
                    assert reader.contents() == weights(3, PAGE)
            if what != "slot":
                with Generation(got.pop(0), 1) as mine:
                    assert mine.contents() == mine.view()[:] == weights(1, SIZE)
            code = 0
        finally:
            os._exit(code)
    theirs.close()
    ours.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", sent))])
    gen.close()
    for number in (2, 3):
        slot.swap(weights(number, PAGE))
    os.close(tell)
    os.close(go)
    assert os.waitpid(pid, 0)[1] == 0
    ours.close()
    assert set(slot.buried().told()) == {2, 3}


def test_a_descriptor_that_nobody_receives(slot: Slot) -> None:
    """It is in a socket that is closed: a reader like any other, until then."""
    slot.swap(weights(1, SIZE))
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with slot.acquire() as gen:
        ours.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [gen.fd]))])
    for number in (2, 3):
        slot.swap(weights(number, PAGE))
    assert slot.told()[1] == "retired"
    ours.close()
    theirs.close()
    settled(dict.fromkeys(USAGE, 0), seconds=0.5)
    assert set(slot.buried().told()) == {2, 3}


def rmmod() -> str:
    result = subprocess.run(["rmmod", "tensormem"], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    return result.stderr


@pytest.mark.parametrize("what", ["slot", "descriptor", "generation", "mapping", "loading"])
def test_the_module_stays(what: str) -> None:
    """While there is a slot, or a descriptor or a mapping of a removed one."""
    client = Raw()
    slot = client.slot("stays", NEW, mode=0o600)
    client.close()
    gen, view = None, None
    if what in ("generation", "mapping"):
        slot.swap(weights(1, SIZE))
        gen = slot.acquire()
    if what == "mapping":
        at = libc.mmap(None, SIZE, mmap.PROT_READ, mmap.MAP_SHARED, gen.fd, 0)
        view = (at, SIZE)
        gen.close()
    if what == "loading":
        fd = os.memfd_create("slow")
        os.truncate(fd, 100 * CHUNK)
        gen = slot.stage(fd, abi.StageFlag.VERIFY)
        os.close(fd)
    if what == "slot":
        slot.close()
        assert "in use" in rmmod()
        with Raw() as other, other.slot("stays") as slot:
            assert slot.remove() == 0
        return
    assert slot.remove() == 0
    if what != "descriptor":
        slot.close()
    assert "in use" in rmmod()
    if view:
        assert libc.munmap(*view) == 0
    if gen:
        gen.close()
    slot.close()


def churn(seed: int) -> None:
    """Everything that can be done to a few slots, in any order, until killed."""
    dice = random.Random(seed)
    files = [file_of(weights(i, dice.choice((PAGE, 5 * PAGE + 1, CHUNK + PAGE)))) for i in range(3)]
    gens: list[Generation] = []
    with Raw() as raw:
        while True:
            name = f"churn{dice.randrange(2)}"
            result, request = raw.try_slot(name, CREATE | WRITE, mode=0o600)
            if result:
                continue
            with Slot(request.fd, name) as slot:
                kind = dice.randrange(10)
                if kind <= 3:
                    flags = dice.choice((0, KEEP, KEEP, abi.StageFlag.VERIFY))
                    result, item = slot.try_stage(dice.choice(files), flags)
                    if result == 0:
                        gen = Generation(item.fd, item.generation)
                        if dice.random() < 0.8:
                            gen.settled()
                        slot.commit(gen.number)
                        gens.append(gen)
                elif kind == 4:
                    slot.rollback()
                elif kind == 5:
                    info = abi.ModelSlot()
                    slot.ioctl(abi.IOC_MODEL_SLOT, info)  # it may have been removed
                    slot.abort(info.staged)
                elif kind == 6 and dice.random() < 0.2:
                    slot.remove()
                else:
                    result, item = slot.try_acquire()
                    if result == 0:
                        gen = Generation(item.fd, item.generation)
                        view = gen.view()
                        assert view[0] == gen.contents()[0]
                        view.close()
                        gens.append(gen)
            while len(gens) > 8:
                gens.pop(dice.randrange(8)).close()


def test_sigkill_at_random_moments() -> None:
    """Children die in the middle of stages, commits and faults; what stays is the slots, and they are good."""
    dice = random.Random(13)
    for _ in range(12):
        killed_at_random(churn, dice, 0.2, 1.2)
        with Raw() as raw:
            for number in range(2):
                result, request = raw.try_slot(f"churn{number}", WRITE)
                if result == errno.ENOENT:
                    continue
                assert result == 0
                with Slot(request.fd, f"churn{number}") as slot:
                    staged = slot.info().staged
                    assert not staged or slot.abort(staged) in (0, errno.ENOENT)  # its stager dies just now
                    slot.swap(weights("good", PAGE))
                    with slot.acquire() as gen:
                        assert gen.contents() == weights("good", PAGE)
                    assert slot.remove() == 0
        assert settled(dict.fromkeys(USAGE, 0)) == dict.fromkeys(USAGE, 0)


def test_creators_and_removers_race(raw: Raw) -> None:
    """One creates it exclusively, one removes it; the name is always either free or taken by a good slot."""
    made, removed = [0] * 4, [0] * 4
    failures: list[object] = []

    def work(number: int) -> None:
        dice = random.Random(number)
        for _ in range(150):
            make = dice.random() < 0.5
            result, request = raw.try_slot("race", NEW if make else WRITE, mode=0o600 if make else 0)
            if result not in (0, errno.EEXIST, errno.ENOENT):
                failures.append(result)
            if result:
                continue
            made[number] += make
            with Slot(request.fd, "race") as slot:
                result = slot.remove()
                removed[number] += result == 0
                if result not in (0, errno.ENOENT):
                    failures.append(result)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert sum(made) == sum(removed) > 0
    assert read("model/slots") == 0
