# SPDX-License-Identifier: MIT
"""Mappings of a KV cache: which ranges, by whom, how long, and what they refuse."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from device import CHUNK, KV, PAGE, Raw, View, address_of, full, pattern, read, state, tokens, window
from process import FAILED, Faults, dies, hold, libc, mremap_to, readable, status_of, writable

TOKEN = PAGE // 8
READ, WRITE, EXEC = mmap.PROT_READ, mmap.PROT_WRITE, mmap.PROT_EXEC
SHARED = mmap.MAP_SHARED


@pytest.fixture
def kv(raw: Raw) -> Iterator[KV]:
    with raw.kv([full(2, TOKEN), state(1, PAGE)], block_tokens=8, max_tokens=512) as cache:
        yield cache


def test_ranges(kv: KV) -> None:
    """The whole window, or within the place of a sequence that is open."""
    info = kv.info()
    place, whole = info.sequence_size, info.window_size
    seq = kv.open(tokens=8)
    assert seq.offset == 0
    for length, offset in ((whole, 0), (place, 0), (PAGE, 0), (PAGE, place - PAGE), (place - PAGE, PAGE)):
        assert kv.map_errno(length, offset) == 0
    for length, offset in ((place + PAGE, 0), (PAGE, place), (2 * PAGE, place - PAGE), (place, PAGE),
                           (whole - PAGE, 0), (whole, place), (PAGE, whole - PAGE), (PAGE, whole),
                           (whole + PAGE, 0), (whole, PAGE), (PAGE, 1 << 46)):  # fmt: skip
        within = offset < whole and length <= place - offset % place
        assert kv.map_errno(length, offset) == (errno.ENOENT if within else errno.EINVAL)
    second = kv.open()
    assert second.offset == place
    assert kv.map_errno(place, place) == 0
    assert kv.end(second) == 0
    assert kv.map_errno(place, place) == errno.ENOENT
    assert libc.mmap(None, PAGE, READ, SHARED, kv.fd, 1) == FAILED
    assert ctypes.get_errno() == errno.EINVAL
    assert libc.mmap(None, PAGE, READ, SHARED, kv.fd, -PAGE) == FAILED
    assert ctypes.get_errno() in (errno.EINVAL, errno.EOVERFLOW)


def test_private_and_executable_are_refused(kv: KV) -> None:
    seq = kv.open(tokens=8)
    whole = kv.info().window_size
    for length in (PAGE, whole):
        assert kv.map_errno(length, 0, flags=mmap.MAP_PRIVATE) == errno.EINVAL
        for prot in (READ | EXEC, READ | WRITE | EXEC, EXEC):
            assert kv.map_errno(length, 0, prot=prot) == errno.EPERM
    view = kv.view()
    assert libc.mprotect(address_of(view.memory), PAGE, READ | EXEC) == -1
    assert ctypes.get_errno() == errno.EACCES
    view.check(seq, dict.fromkeys(range(8)))


def test_parts_show_the_same(kv: KV) -> None:
    """The window, a sequence, a plane, a page: one memory, also when a write takes a copy."""
    seq = kv.open(tokens=30)
    view = kv.view()
    place = kv.map(kv.info().sequence_size, seq.offset)
    stride = kv.groups[0].stride
    plane = kv.map(stride, seq.offset + stride)
    page = kv.map(PAGE, seq.offset + stride + PAGE, prot=READ)

    def agree(t: int, value: object) -> None:
        at, data = t * TOKEN, pattern(value, 1, TOKEN)
        assert view.memory[view.span(seq, t, 1)] == data
        assert place[stride + at : stride + at + TOKEN] == data
        assert plane[at : at + TOKEN] == data
        assert page[at - PAGE : at - PAGE + TOKEN] == data

    view.write(seq, tokens("a", 0, 30))
    agree(9, ("a", 9))
    child = kv.fork(seq, 30)
    agree(9, ("a", 9))
    plane[9 * TOKEN : 10 * TOKEN] = pattern("b", 1, TOKEN)
    agree(9, "b")
    place[stride + 10 * TOKEN : stride + 11 * TOKEN] = pattern("c", 1, TOKEN)
    agree(10, "c")
    agree(11, ("a", 11))
    assert kv.pack(seq)[0] == 0
    agree(10, "c")
    view.check(child, tokens("a", 0, 30))
    assert kv.extend(seq, 8) == 0
    assert plane[32 * TOKEN : 38 * TOKEN] == bytes(6 * TOKEN)
    assert dies(lambda: plane[40 * TOKEN]) == signal.SIGBUS
    for mapping in (place, plane, page):
        mapping.close()
    view.close()


def test_a_mapping_of_a_place_outlives_its_sequence(kv: KV) -> None:
    """It shows nothing, and then whatever sequence comes to be there."""
    seq = kv.open(tokens=8)
    mapping = kv.map(kv.info().sequence_size, seq.offset)
    mapping[0] = 7
    assert kv.end(seq) == 0
    assert dies(lambda: mapping[0]) == signal.SIGBUS
    while (again := kv.open()).offset != seq.offset:
        assert kv.end(again) == 0
    assert dies(lambda: mapping[0]) == signal.SIGBUS
    assert kv.extend(again, 1) == 0
    assert mapping[0] == 0
    mapping.close()


def test_extend_maps_ahead(raw: Raw) -> None:
    """Where the window is mapped, new blocks take no fault; copies and the first read do."""
    with raw.kv([full(4, TOKEN)], block_tokens=8, max_tokens=1024) as kv:
        view, seq = kv.view(), kv.open(tokens=8)
        view.write(seq, tokens("a", 0, 8))
        data = {(t, plane): pattern(("b", t), plane, TOKEN) for t in range(8, 1024) for plane in range(4)}
        assert kv.extend(seq, 1016) == 0
        with Faults(address_of(view.memory), len(view.memory)) as faults:
            for (t, plane), value in data.items():
                view.memory[view.span(seq, t, plane)] = value
        assert not faults.addresses
        # without it there is one for what lies around: 508 pages
        with raw.kv([full(4, TOKEN)], block_tokens=8, max_tokens=1024) as other:
            late = other.open(tokens=1024)
            look = other.view()
            with Faults(address_of(look.memory), len(look.memory)) as faults:
                for plane in range(4):
                    assert sum(look.memory[look.place(late, t, plane)] for t in range(0, 1024, 8)) == 0
            assert 4 <= len(faults) <= 4 * 3
            look.close()
        view.close()


def test_mremap_shrinks_and_does_nothing_else(kv: KV) -> None:
    seq = kv.open(tokens=64)
    at = libc.mmap(None, 8 * PAGE, READ | WRITE, SHARED, kv.fd, seq.offset)
    assert at != FAILED
    ctypes.memset(at, 7, 8 * PAGE)
    MAYMOVE, FIXED = 1, 2
    assert libc.mremap(at, 8 * PAGE, 9 * PAGE, MAYMOVE) == FAILED
    assert ctypes.get_errno() == errno.EFAULT
    spare = libc.mmap(None, 8 * PAGE, READ, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    assert mremap_to(at, 8 * PAGE, 8 * PAGE, MAYMOVE | FIXED, spare) == FAILED
    assert ctypes.get_errno() == errno.EINVAL
    assert ctypes.string_at(at, 8 * PAGE) == b"\7" * (8 * PAGE)
    assert libc.mremap(at, 8 * PAGE, 3 * PAGE, 0) == at
    assert ctypes.string_at(at, 3 * PAGE) == b"\7" * (3 * PAGE)
    assert kv.extend(seq, 64) == 0
    child = kv.fork(seq, 128)
    ctypes.memset(at, 8, 3 * PAGE)
    view = kv.view()
    assert view.memory[view.span(child, 0, 0, 0, 24)] == b"\7" * (3 * PAGE)
    assert view.memory[view.span(seq, 0, 0, 0, 24)] == b"\x08" * (3 * PAGE)
    libc.munmap(at, 3 * PAGE)
    view.close()


def test_parts_of_the_window_unmapped(kv: KV) -> None:
    """Extensions go on; what is still mapped is right, the rest can be mapped again."""
    whole, place = kv.info().window_size, kv.info().sequence_size
    seqs = [kv.open(tokens=12) for _ in range(4)]
    at = libc.mmap(None, whole, READ | WRITE, SHARED, kv.fd, 0)
    stride = kv.groups[0].stride
    view = kv.view()  # the hint for mapping ahead is this one now
    base = address_of(view.memory)
    for i, seq in enumerate(seqs):
        view.write(seq, tokens(i, 0, 12))
    # all of the first, the second plane of the second, a page of the third
    holes = [(0, place), (place + stride, stride), (2 * place + PAGE, PAGE)]
    for start, length in holes:
        assert libc.munmap(base + start, length) == 0
    for turn in range(5):
        for i, seq in enumerate(seqs):
            assert kv.extend(seq, 9) == 0
            length = kv.query(seq).length
            for t in range(length - 9, length):
                for plane in (0, 1):
                    target = at + seq.offset + plane * stride + t * TOKEN
                    ctypes.memmove(target, pattern((i, t), plane, TOKEN), TOKEN)
                    start = seq.offset + plane * stride + t * TOKEN
                    if not any(h <= start < h + size for h, size in holes):
                        data = ctypes.string_at(base + start, TOKEN)
                        assert data == pattern((i, t), plane, TOKEN), (turn, i, t)
    MAP_FIXED = 0x10
    for i, seq in enumerate(seqs):
        data = b"".join(pattern((i, t), 1, TOKEN) for t in range(57))
        assert ctypes.string_at(at + seq.offset + stride, len(data)) == data
    fixed = SHARED | MAP_FIXED
    for start, length in holes:
        assert libc.mmap(base + start, length, READ | WRITE, fixed, kv.fd, start) == base + start
    for i, seq in enumerate(seqs):
        view.check(seq, tokens(i, 0, 57))
    assert libc.munmap(at, whole) == 0


def test_a_mapping_outlives_the_descriptor(raw: Raw) -> None:
    """And the client's; the bill stays, and the last to go frees all."""
    kv = raw.kv([full(2, TOKEN)], block_tokens=8, max_tokens=512)
    seq = kv.open(tokens=40)
    whole = kv.info().window_size
    at = libc.mmap(None, whole, READ | WRITE, SHARED, kv.fd, 0)
    ctypes.memset(at + seq.offset, 5, 5 * PAGE)
    held = kv.info().held
    raw.close()
    # the cache works on without its client's descriptor
    assert kv.extend(seq, 400) == 0
    child = kv.fork(seq, 440)
    assert read("clients/bytes") == kv.info().held >= held
    kv.close()
    assert read("kv/caches") == 1
    assert ctypes.string_at(at + child.offset, 5 * PAGE) == b"\5" * (5 * PAGE)
    ctypes.memset(at + child.offset, 6, 5 * PAGE)  # takes copies, still
    assert ctypes.string_at(at + seq.offset, 5 * PAGE) == b"\5" * (5 * PAGE)
    assert libc.munmap(at + PAGE, whole - PAGE) == 0
    assert read("kv/caches") == 1
    assert ctypes.string_at(at, PAGE) == b"\5" * PAGE
    assert libc.munmap(at, PAGE) == 0
    assert read("kv/caches") == read("kv/held") == read("clients/bytes") == 0


def test_two_caches_two_windows(raw: Raw) -> None:
    with raw.kv([full(2, TOKEN)]) as one, raw.kv([full(2, TOKEN)]) as two:
        a, b = one.open(tokens=8), two.open(tokens=8)
        assert (a.name, a.offset) == (b.name, b.offset)
        first, second = one.view(), two.view()
        first.write(a, tokens("a", 0, 8))
        second.write(b, tokens("b", 0, 8))
        first.check(a, tokens("a", 0, 8))
        second.check(b, tokens("b", 0, 8))
        first.close()
        second.close()


def test_pinning_is_refused(kv: KV) -> None:
    """O_DIRECT and vmsplice: EFAULT; copies by the kernel work."""
    path = Path("/var/tmp/kv-direct.bin")
    path.write_bytes(os.urandom(8 * PAGE))
    data = path.read_bytes()
    os.sync()
    view, seq = kv.view(), kv.open(tokens=64)
    view.memory[0] = 1
    part = memoryview(view.memory)[: 8 * PAGE]
    for flags in (os.O_RDONLY, os.O_WRONLY):
        fd = os.open(path, flags | os.O_DIRECT)
        move = os.preadv if flags == os.O_RDONLY else os.pwritev
        with pytest.raises(OSError, match="Bad address"):
            move(fd, [part], 0)
        os.close(fd)
    assert path.read_bytes() == data
    with pytest.raises(OSError, match="Bad address"):
        hold(address_of(view.memory), PAGE)
    fd = os.open(path, os.O_RDWR)
    assert os.preadv(fd, [part], 0) == 8 * PAGE
    assert view.memory[: 8 * PAGE] == data
    child = kv.fork(seq, 64)
    view.memory[: 8 * PAGE] = bytes(8 * PAGE)
    assert os.pwritev(fd, [memoryview(view.memory)[child.offset : child.offset + 8 * PAGE]], 0) == 8 * PAGE
    # read(2) into what is shared takes copies, as any write
    third = kv.fork(child, 64)
    assert os.preadv(fd, [memoryview(view.memory)[third.offset : third.offset + PAGE]], PAGE) == PAGE
    assert view.memory[third.offset : third.offset + PAGE] == data[PAGE : 2 * PAGE]
    assert view.memory[child.offset : child.offset + 8 * PAGE] == data
    os.close(fd)
    path.unlink()


def test_a_read_only_mapping(kv: KV) -> None:
    """It sees what is written elsewhere and cannot write; it may be made writable."""
    seq = kv.open(tokens=16)
    view = kv.view()
    size = kv.info().window_size
    at = libc.mmap(None, size, READ, SHARED, kv.fd, 0)
    assert ctypes.string_at(at, 2 * PAGE) == bytes(2 * PAGE)
    view.write(seq, tokens("a", 0, 16))
    assert ctypes.string_at(at, TOKEN) == pattern(("a", 0), 0, TOKEN)
    assert dies(lambda: ctypes.memset(at, 1, 1)) == signal.SIGSEGV
    child = kv.fork(seq, 16)
    assert ctypes.string_at(at + child.offset, TOKEN) == pattern(("a", 0), 0, TOKEN)
    assert libc.mprotect(at, size, READ | WRITE) == 0
    ctypes.memset(at + child.offset, 1, PAGE)
    view.check(seq, tokens("a", 0, 16))
    assert view.memory[child.offset : child.offset + PAGE] == b"\1" * PAGE
    libc.munmap(at, size)
    view.close()


def test_fork_shares_the_mapping(kv: KV) -> None:
    view = kv.view()
    seq = kv.open(tokens=20)
    view.write(seq, tokens("a", 0, 20))

    def child() -> None:
        view.check(seq, tokens("a", 0, 20))
        view.write(seq, tokens("b", 0, 20))
        assert kv.extend(seq, 20) == 0
        view.write(seq, tokens("c", 20, 40))

    assert status_of(child) == 0
    view.check(seq, tokens("b", 0, 20) | tokens("c", 20, 40))
    view.close()


def test_madvise(kv: KV) -> None:
    """Nothing that it does costs data."""
    view, seq = kv.view(), kv.open(tokens=64)
    view.write(seq, tokens("a", 0, 64))
    at = address_of(view.memory)
    for advice in range(26):
        if advice not in (10, 11, 18, 19):  # about fork, which the next test is about
            libc.madvise(at, 8 * PAGE, advice)
    view.check(seq, tokens("a", 0, 64))
    assert libc.madvise(at, 8 * PAGE, mmap.MADV_DONTNEED) == -1
    assert ctypes.get_errno() == errno.EINVAL


def test_faults_race_with_everything(raw: Raw) -> None:
    """Readers of what is forked, cut, packed and closed see its data, or nothing: EFAULT."""
    with raw.kv([full(2, TOKEN), window(16, 1, TOKEN)], block_tokens=8, max_sequences=4) as kv:
        view, stop = kv.view(), mmap.mmap(-1, PAGE)
        place = kv.info().sequence_size
        children = []
        for seed in range(2):
            pid = os.fork()
            if pid == 0:
                dice, memory, bad, good = random.Random(seed), memoryview(view.memory), 0, 0
                copy = os.memfd_create("copy")
                while not stop[0]:
                    at = dice.randrange(4) * place + dice.randrange(8) * PAGE
                    try:
                        os.pwrite(copy, memory[at : at + PAGE], 0)
                    except OSError as error:
                        bad += error.errno != errno.EFAULT
                        continue
                    good += 1
                    # a page is of one sequence, and all of its tokens are written alike
                    bad += not set(os.pread(copy, PAGE, 0)) <= {0, 3}
                stop[1 + seed] = min(good, 250)
                os._exit(bad != 0)
            children.append(pid)
        dice, seqs = random.Random(9), {}

        def grow(seq: object, more: int) -> None:
            if kv.extend(seq, more) == 0:
                for t in range(seqs[seq], seqs[seq] + more):
                    for plane in (0, 1):
                        view.memory[view.span(seq, t, plane)] = b"\3" * TOKEN
                seqs[seq] += more

        for _ in range(400):
            kind = dice.random()
            seq = dice.choice(list(seqs)) if seqs else None
            if seq is None or (kind < 0.2 and len(seqs) < 4):
                result, fresh = kv.try_open()
                assert result == 0
                seqs[fresh] = 0
                grow(fresh, 20)
            elif kind < 0.4 and len(seqs) < 4:
                result, child = kv.try_fork(seq, seqs[seq])
                assert result == 0
                seqs[child] = seqs[seq]
            elif kind < 0.6:
                grow(seq, dice.choice((1, 8, 15)))
            elif kind < 0.7:
                keep = dice.randrange(seqs[seq] + 1)
                if kv.truncate(seq, keep) == 0:
                    seqs[seq] = keep
            elif kind < 0.8:
                assert kv.pack(seq)[0] == 0
            elif kind < 0.9 and seqs[seq]:
                view.memory[view.span(seq, dice.randrange(seqs[seq]))] = b"\3" * TOKEN
            else:
                assert kv.end(seq) == 0
                del seqs[seq]
        stop[0] = 1
        for pid in children:
            assert os.waitpid(pid, 0)[1] == 0
        assert stop[1] and stop[2], "the readers never got through"
        stop.close()
        view.close()


def test_threads_fault_the_same_page(raw: Raw) -> None:
    """Of many who write to a shared block at once one takes the copy, and no write is lost."""
    with raw.kv([full(2, CHUNK // 256)], block_tokens=8) as kv:
        view = kv.view()
        parent = kv.open(tokens=8)
        view.write(parent, tokens("p", 0, 8))
        for turn in range(20):
            child = kv.fork(parent, 8)
            if turn % 2:
                view.check(child, tokens("p", 0, 8))
            copies = kv.info().copies
            barrier = threading.Barrier(4)

            def work(number: int, seq: object = child, gate: threading.Barrier = barrier) -> None:
                gate.wait()
                for t in (number, number + 4):
                    view.memory[view.span(seq, t, t % 2)] = pattern("c", 0, CHUNK // 256)

            threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert kv.info().copies == copies + 1
            for t in range(8):
                written = view.memory[view.span(child, t, t % 2)]
                other = view.memory[view.span(child, t, 1 - t % 2)]
                assert written == pattern("c", 0, CHUNK // 256)
                assert other == pattern(("p", t), 1 - t % 2, CHUNK // 256)
            view.check(parent, tokens("p", 0, 8))
            assert kv.end(child) == 0
        view.close()


def test_what_the_kernel_touches(kv: KV) -> None:
    """Halves of it there or not: EFAULT, or what could be had; nothing else changes."""
    view: View = kv.view()
    seq = kv.open(tokens=8)
    memory = memoryview(view.memory)
    assert readable(memory[:PAGE])
    assert not readable(memory[: 2 * PAGE])
    assert writable(memory[:PAGE])
    assert not writable(memory[: 2 * PAGE])
    assert not readable(memory[PAGE : 2 * PAGE])
    view.check(seq, dict.fromkeys(range(8)))
    memory.release()
    view.close()
