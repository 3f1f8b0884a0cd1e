# SPDX-License-Identifier: MIT
"""Model slots without a kernel: the states of the header, each generation on a memfd.

Loading goes on when somebody polls, so that a test decides how far it is. The memory of a
generation that nobody holds is filled with POISON: an array that outlives it is seen at once.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import mmap
import os
import select
import stat
import threading
from collections.abc import Callable
from typing import Any, NoReturn

from tensormem import abi

CHUNK = 2 << 20
POISON = 0xDB

S = abi.ModelState


def refuse(number: int) -> NoReturn:
    raise OSError(number, "refused")


class Models:
    """All slots of a machine.

    Attributes:
        step: bytes that a poll of a loading generation loads; 0 for none.
        others: what others do while somebody waits in poll, one for each wait.
        uid: who calls; None for root.
        fail_load: bytes after which a load fails, and the errno.
    """

    def __init__(self) -> None:
        self.slots: dict[str, State] = {}
        self.descriptors: dict[int, FakeSlot | FakeGeneration] = {}
        self.step = 1 << 40
        self.others: list[Callable[[], object]] = []
        self.uid: int | None = None
        self.fail_load: tuple[int, int] | None = None
        self.freed: list[int] = []
        self.fail: dict[int, int] = {}  # request -> errno
        self.calls: list[int] = []
        self.lock = threading.RLock()
        self.pid = os.getpid()

    def open(self, a: abi.ModelOpen) -> None:
        flags, raw = abi.OpenFlag(a.flags), bytes(a.name)
        name, _, rest = raw.partition(b"\0")
        if not name or rest.strip(b"\0") or len(name) == len(raw) or a.pad or a.mode & ~0o666:
            refuse(errno.EINVAL)
        create = abi.OpenFlag.CREATE in flags
        if create and abi.OpenFlag.WRITE not in flags:
            refuse(errno.EINVAL)
        taken = (b"evictable", b"evicted", b"reloads", b"reload_failed")
        if name in (b"slots", b"generations", b"held", *taken):
            refuse(errno.EINVAL)  # files of sysfs
        slot = self.slots.get(name.decode())
        made = slot is None
        if slot is not None and abi.OpenFlag.EXCL in flags:
            refuse(errno.EEXIST)
        if slot is None and not create:
            refuse(errno.ENOENT)
        if slot is None:
            slot = self.slots[name.decode()] = State(self, a.mode)
        write = abi.OpenFlag.WRITE in flags
        if not made:
            slot.check(os.R_OK | os.W_OK if write else os.R_OK)
        a.fd = FakeSlot(slot, write).fd

    def wait(self, timeout: float | None) -> bool:
        """Let others do something; return whether there was anything to do."""
        if self.others:
            self.others.pop(0)()
            return True
        assert timeout is not None, "would wait for ever"
        return False


class Bytes:
    """One generation of the fake."""

    def __init__(self, slot: State, number: int, a: abi.ModelStage, size: int) -> None:
        self.slot, self.number, self.size = slot, number, size
        self.flags = abi.StageFlag(a.flags)
        self.state, self.error, self.loaded = S.LOADING, 0, 0
        self.source, self.offset, self.sha256 = os.dup(a.file), int(a.offset), bytes(a.sha256)
        self.fd = os.memfd_create("tensormem-fake-model", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)
        self.readers: list[FakeGeneration] = []
        self.mappings = 0
        self.shared = self.evicted = 0

    def load(self, count: int) -> None:
        fail = self.slot.models.fail_load
        while count > 0 and self.state == S.LOADING:
            part = min(count, CHUNK, self.size - self.loaded)
            if fail and self.loaded + part > fail[0]:
                self.end(S.FAILED, fail[1])
                return
            data = os.pread(self.source, part, self.offset + self.loaded)
            if len(data) < part:
                self.end(S.FAILED, errno.EBADMSG)
                return
            os.pwrite(self.fd, data, self.loaded)
            active = self.slot.active
            alone = abi.StageFlag.EVICTABLE in self.flags
            if active and not alone and os.pread(active.fd, part, self.loaded) == data:
                self.shared += part
            self.loaded += part
            count -= part
            if self.loaded == self.size:
                self.finish()

    def finish(self) -> None:
        if abi.StageFlag.VERIFY in self.flags:
            with os.fdopen(os.dup(self.fd), "rb") as file:
                file.seek(0)
                if hashlib.file_digest(file, "sha256").digest() != self.sha256:
                    self.end(S.FAILED, errno.EBADMSG)
                    return
        self.end(S.STAGED)

    def end(self, state: S, error: int = 0) -> None:
        if self.source >= 0:
            os.close(self.source)
            self.source = -1
        self.state, self.error = state, error
        self.settle()

    def settle(self) -> None:
        held = self in (self.slot.active, self.slot.previous, self.slot.staged)
        mine = os.getpid() == self.slot.models.pid  # a child closes copies
        if not held and not self.readers and not self.mappings and self.fd >= 0 and mine:
            for begin in range(0, self.size, CHUNK):
                os.pwrite(self.fd, bytes([POISON]) * min(CHUNK, self.size - begin), begin)
            os.close(self.fd)
            self.fd = -1
            self.slot.models.freed.append(self.number)


class State:
    """One slot of the fake."""

    def __init__(self, models: Models, mode: int) -> None:
        self.models = models
        self.fd = os.memfd_create("tensormem-fake-slot", os.MFD_CLOEXEC)
        mask = os.umask(0)
        os.umask(mask)
        os.fchmod(self.fd, mode & ~mask)
        self.active: Bytes | None = None
        self.previous: Bytes | None = None
        self.staged: Bytes | None = None
        self.last = 0
        self.all: list[Bytes] = []
        self.removed = False

    def check(self, wanted: int) -> None:
        if self.models.uid is None:
            return
        status = os.fstat(self.fd)
        shift = 6 if status.st_uid == self.models.uid else 0
        if wanted & ~(status.st_mode >> shift):
            refuse(errno.EACCES)

    def let_go(self, gen: Bytes | None) -> None:
        if gen is not None:
            gen.end(S.FAILED if gen.state == S.FAILED else S.RETIRED, gen.error)

    def commit(self, number: int) -> None:
        gen = self.staged
        if gen is None or gen.number != number:
            refuse(errno.ENOENT)
        if gen.state == S.LOADING:
            refuse(errno.EAGAIN)
        if gen.state == S.FAILED:
            refuse(errno.ESTALE)
        old, self.previous = self.previous, self.active
        self.active, self.staged = gen, None
        gen.state = S.ACTIVE
        if self.previous:
            self.previous.state = S.PREVIOUS
        self.let_go(old)

    def abort(self, number: int) -> None:
        gen = self.staged
        if gen is None or gen.number != number:
            refuse(errno.ENOENT)
        self.staged = None
        gen.end(S.RETIRED)

    def rollback(self, number: int) -> int:
        gen = self.previous
        if gen is None or number not in (0, gen.number):
            refuse(errno.ENOENT)
        if gen.state == S.FAILED:
            refuse(errno.ESTALE)
        self.active, self.previous = gen, self.active
        gen.state = S.ACTIVE
        assert self.previous is not None
        self.previous.state = S.PREVIOUS
        return gen.number

    def remove(self, name: str) -> None:
        places = [self.active, self.previous, self.staged]
        self.active = self.previous = self.staged = None
        self.removed = True
        for gen in places:
            self.let_go(gen)
        del self.models.slots[name]

    def fail(self, number: int, error: int) -> None:
        """Do what a change of a cached generation's file does."""
        next(gen for gen in self.all if gen.number == number).end(S.FAILED, error)


class _Descriptor:
    """What the descriptors of slots and generations have in common."""

    def __init__(self, models: Models, fd: int) -> None:
        self.models, self.fd = models, fd

    def ioctl(self, request: int, argument: abi.Struct) -> None:
        assert self.fd >= 0, "closed"
        assert (request >> 16) & 0x3FFF == ctypes.sizeof(argument)
        with self.models.lock:
            self.models.calls.append(request)
            if request in self.models.fail:
                refuse(self.models.fail[request])
            self.dispatch(argument)

    def dispatch(self, a: Any) -> None:
        raise NotImplementedError

    def events(self) -> int:
        raise NotImplementedError

    def poll(self, events: int, timeout: float | None) -> int:
        assert self.fd >= 0, "closed"
        always = select.POLLERR | select.POLLHUP
        while not (found := self.events() & (events | always)):
            if timeout == 0 or not self.models.wait(timeout):
                break
        return found

    def map(self, offset: int, length: int, *, write: bool = True) -> mmap.mmap:
        raise AssertionError("a slot cannot be mapped")

    def pread(self, size: int, offset: int) -> bytes:
        raise AssertionError("a slot has no contents")

    def read(self, size: int, timeout: float | None) -> bytes:
        raise AssertionError("nobody reads on")

    def fileno(self) -> int:
        return self.fd

    def close(self) -> None:
        assert self.fd >= 0, "closed twice"
        del self.models.descriptors[self.fd]
        os.close(self.fd)
        self.fd = -1


class FakeSlot(_Descriptor):
    """A descriptor of a slot; stands in for tensormem.device.KernelDevice."""

    def __init__(self, slot: State, write: bool) -> None:
        super().__init__(slot.models, os.dup(slot.fd))
        self.slot, self.write, self.seen = slot, write, 0
        self.models.descriptors[self.fd] = self

    def other(self, fd: int) -> FakeSlot | FakeGeneration:
        return self.models.descriptors[fd]

    def events(self) -> int:
        slot = self.slot
        number = slot.active.number if slot.active else 0
        if slot.removed:
            return select.POLLHUP
        return select.POLLIN if number and number != self.seen else 0

    def dispatch(self, a: Any) -> None:
        slot = self.slot
        if slot.removed:
            refuse(errno.ENOENT)
        if isinstance(a, abi.ModelAcquire):
            self._acquire(a)
            return
        if isinstance(a, abi.ModelSlot):
            for name in ("active", "previous", "staged"):
                gen = getattr(slot, name)
                setattr(a, name, gen.number if gen else 0)
            a.last, self.seen = slot.last, a.active
            a.generations = sum(gen.fd >= 0 for gen in slot.all)
            return
        if not self.write:
            refuse(errno.EACCES)
        if isinstance(a, abi.ModelStage):
            self._stage(a)
        elif isinstance(a, abi.ModelEvict):
            self._evict(a)
        elif isinstance(a, abi.ModelRemove):
            slot.remove(next(n for n, s in self.models.slots.items() if s is slot))
        else:
            assert isinstance(a, abi.ModelWhich)
            request = self.models.calls[-1]
            if request == abi.IOC_MODEL_COMMIT:
                slot.commit(a.generation)
            elif request == abi.IOC_MODEL_ABORT:
                slot.abort(a.generation)
            else:
                a.generation = slot.rollback(a.generation)

    def _acquire(self, a: abi.ModelAcquire) -> None:
        slot = self.slot
        places = [slot.active, slot.previous, slot.staged]
        gen = slot.active
        if a.generation:
            gen = next((g for g in places if g and g.number == a.generation), None)
        if gen is None:
            refuse(errno.ENOENT)
        if gen is slot.staged and not self.write:
            refuse(errno.EACCES)
        if gen is slot.active:
            self.seen = gen.number
        a.generation = gen.number
        a.fd = FakeGeneration(gen).fd

    def _evict(self, a: abi.ModelEvict) -> None:
        slot = self.slot
        places = [slot.active, slot.previous, slot.staged]
        gen = slot.active
        if a.generation:
            gen = next((g for g in places if g and g.number == a.generation), None)
        if gen is None:
            refuse(errno.ENOENT)
        if abi.StageFlag.EVICTABLE not in gen.flags:
            refuse(errno.EINVAL)
        here = gen.loaded - gen.evicted
        a.generation, a.bytes = gen.number, min(here, a.bytes or here)
        gen.evicted += a.bytes

    def _stage(self, a: abi.ModelStage) -> None:
        slot = self.slot
        if slot.staged is not None:
            refuse(errno.EBUSY)
        status = os.fstat(a.file)
        if fcntl.fcntl(a.file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY:
            refuse(errno.EACCES)
        flags = abi.StageFlag(a.flags)
        cached = abi.StageFlag.CACHED in flags
        watched = cached or abi.StageFlag.EVICTABLE in flags
        if watched and self.models.uid not in (None, status.st_uid):
            refuse(errno.EACCES)
        if not stat.S_ISREG(status.st_mode):
            refuse(errno.EINVAL)
        size = a.size or max(0, status.st_size - a.offset)
        if not size or (cached and a.offset % mmap.PAGESIZE):
            refuse(errno.EINVAL)
        slot.last += 1
        gen = slot.staged = Bytes(slot, slot.last, a, size)
        slot.all.append(gen)
        a.generation = gen.number
        a.fd = FakeGeneration(gen, stager=True).fd


class Mapping(mmap.mmap):
    """A mapping that says when it ends."""

    gen: Bytes

    def __del__(self) -> None:
        self.gen.mappings -= 1
        self.gen.settle()


class FakeGeneration(_Descriptor):
    """A descriptor of a generation."""

    def __init__(self, gen: Bytes, stager: bool = False) -> None:
        super().__init__(gen.slot.models, os.dup(gen.fd))
        self.gen, self.stager = gen, stager
        gen.readers.append(self)
        self.models.descriptors[self.fd] = self

    def other(self, fd: int) -> FakeGeneration:
        raise AssertionError("a generation makes no descriptors")

    def poll(self, events: int, timeout: float | None) -> int:
        # the kernel's thread works meanwhile
        if self.gen.state == S.LOADING and timeout != 0:
            self.gen.load(self.models.step)
        return super().poll(events, timeout)

    def events(self) -> int:
        gen = self.gen
        found = 0 if gen.state == S.LOADING else select.POLLIN
        found |= select.POLLERR if gen.state == S.FAILED else 0
        return found | (select.POLLPRI if gen.state != S.ACTIVE else 0)

    def dispatch(self, a: Any) -> None:
        assert isinstance(a, abi.ModelInfo)
        gen = self.gen
        a.generation, a.state, a.flags, a.error = gen.number, gen.state, gen.flags, gen.error
        a.size, a.loaded, a.readers = gen.size, gen.loaded, len(gen.readers)
        a.private_bytes, a.shared_bytes = gen.loaded - gen.shared - gen.evicted, gen.shared
        a.evicted_bytes = gen.evicted
        a.mapping = abi.Mapping.BLOCK

    def map(self, offset: int, length: int, *, write: bool = True) -> mmap.mmap:
        if write:
            refuse(errno.EACCES)
        if offset + length > self.gen.size:
            refuse(errno.EINVAL)
        mapping = Mapping(self.fd, length, prot=mmap.PROT_READ, offset=offset)
        mapping.gen = self.gen
        self.gen.mappings += 1
        return mapping

    def pread(self, size: int, offset: int) -> bytes:
        if self.gen.state in (S.LOADING, S.FAILED):
            refuse(errno.EAGAIN if self.gen.state == S.LOADING else errno.ESTALE)
        return os.pread(self.fd, size, offset)

    def close(self) -> None:
        super().close()
        gen = self.gen
        gen.readers.remove(self)
        keep = abi.StageFlag.KEEP in gen.flags and gen.state != S.LOADING
        mine = os.getpid() == self.models.pid
        if self.stager and gen is gen.slot.staged and not keep and mine:
            gen.slot.abort(gen.number)
        gen.settle()
