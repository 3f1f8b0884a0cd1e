# SPDX-License-Identifier: MIT
from __future__ import annotations

import errno
import pickle
import re
from pathlib import Path

import pytest

from tensormem import errors
from tensormem.device import KernelDevice

HEADER = Path(__file__).parents[2] / "kmod" / "include" / "uapi" / "linux" / "tensormem.h"

MEANING: dict[int, tuple[type[errors.TensormemError], type[Exception]]] = {
    errno.EINVAL: (errors.InvalidArgument, ValueError),
    errno.EFAULT: (errors.BadAddress, Exception),
    errno.ENOENT: (errors.NoSuchTensor, LookupError),
    errno.ENOMEM: (errors.OutOfMemory, MemoryError),
    errno.EDQUOT: (errors.QuotaExceeded, MemoryError),
    errno.ENOSPC: (errors.PoolExhausted, MemoryError),
    errno.ENOBUFS: (errors.WindowFull, MemoryError),
    errno.EBUSY: (errors.Busy, Exception),
    errno.EPERM: (errors.NotPermitted, PermissionError),
    errno.EINTR: (errors.Interrupted, InterruptedError),
    errno.ENOTTY: (errors.IncompatibleModule, Exception),
    errno.ERANGE: (errors.TooManyTokens, ValueError),
    errno.ENODATA: (errors.NotHeld, LookupError),
    errno.EOPNOTSUPP: (errors.NoCodec, NotImplementedError),
    errno.EIO: (errors.DamagedKV, OSError),
    errno.EACCES: (errors.SlotDenied, PermissionError),
    errno.EEXIST: (errors.SlotExists, FileExistsError),
    errno.EAGAIN: (errors.StillLoading, BlockingIOError),
    errno.ESTALE: (errors.GenerationFailed, OSError),
    errno.EBADMSG: (errors.WrongContents, ValueError),
    errno.ETXTBSY: (errors.FileBusy, OSError),
    errno.ECANCELED: (errors.LoadCancelled, Exception),
    errno.ETIMEDOUT: (errors.DeadlineMissed, TimeoutError),
}

#: What a KV cache means by an errno, where it is not the same.
KV_MEANING: dict[int, tuple[type[errors.TensormemError], type[Exception]]] = {
    errno.ENOENT: (errors.NoSuchSequence, LookupError),
    errno.ENOSPC: (errors.CacheFull, errors.PoolExhausted),
    errno.ENOBUFS: (errors.TooManySequences, MemoryError),
    errno.EBUSY: (errors.CacheInUse, errors.Busy),
}

#: Likewise a model slot.
MODEL_MEANING: dict[int, tuple[type[errors.TensormemError], type[Exception]]] = {
    errno.ENOENT: (errors.NoSuchGeneration, LookupError),
    errno.EBUSY: (errors.SlotBusy, errors.Busy),
    errno.EOPNOTSUPP: (errors.NotCacheable, NotImplementedError),
    errno.EIO: (errors.ReadFailed, OSError),
}

#: Likewise an RT client.
RT_MEANING: dict[int, tuple[type[errors.TensormemError], type[Exception]]] = {
    errno.ENOENT: (errors.NoSuchBlock, LookupError),
    errno.ENOSPC: (errors.ArenaFull, errors.PoolExhausted),
    errno.EEXIST: (errors.SizeReserved, ValueError),
    errno.EBUSY: (errors.ReservationInUse, errors.Busy),
}

#: What an allocation alone means by an errno that files and sysfs have as well.
ALLOC_ONLY = {errno.ENODEV}

TABLES = {
    "": MEANING,
    "kv": MEANING | KV_MEANING,
    "model": MEANING | MODEL_MEANING,
    "rt": MEANING | RT_MEANING,
}


def test_every_errno_of_the_header_has_a_class() -> None:
    table = HEADER.read_text().split(" * Errors\n")[1].split("*/")[0]
    named = set(re.findall(r"^ \*     (E[A-Z]+)", table, flags=re.M))
    # by number: some have two names
    assert {getattr(errno, name) for name in named} == {*MEANING, *ALLOC_ONLY}


@pytest.mark.parametrize("of", TABLES)
@pytest.mark.parametrize("number", MEANING, ids=lambda n: errno.errorcode[n])
def test_meaning(number: int, of: str) -> None:
    cls, builtin = TABLES[of][number]
    error = errors.from_errno(number, kv=of == "kv", model=of == "model", rt=of == "rt")
    assert type(error) is cls
    assert isinstance(error, builtin)
    assert error.errno == number
    assert error.cause
    assert error.remedy
    assert str(error) == f"{error.cause}: {error.remedy}"
    assert "\n" not in str(error)


def test_enfile_is_the_arenas_alone() -> None:
    assert type(errors.from_errno(errno.ENFILE)) is errors.TensormemError
    error = errors.from_errno(errno.ENFILE, rt=True)
    assert type(error) is errors.TooManyMovable
    assert isinstance(error, MemoryError)
    assert "movable" in error.remedy


def test_own_words_replace_those_of_the_class() -> None:
    error = errors.from_errno(errno.EDQUOT, "8 MiB of kv do not fit", "free\n some")
    assert str(error) == "8 MiB of kv do not fit: free some"
    assert error.errno == errno.EDQUOT


def test_an_errno_without_meaning_is_named() -> None:
    error = errors.from_errno(errno.EXDEV, "cannot x")
    assert type(error) is errors.TensormemError
    assert "cannot x" in str(error)
    assert "EXDEV" in str(error)
    assert error.errno == errno.EXDEV


@pytest.mark.parametrize("number", MEANING, ids=lambda n: errno.errorcode[n])
def test_pickle(number: int) -> None:
    error = errors.from_errno(number, "a cause", "a remedy")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert (copy.cause, copy.remedy, copy.errno) == ("a cause", "a remedy", number)


def test_device_missing(tmp_path: Path) -> None:
    with pytest.raises(errors.DeviceMissing, match=r"module is not loaded.*modprobe") as info:
        KernelDevice(tmp_path / "tensormem")
    assert isinstance(info.value, FileNotFoundError)
    assert isinstance(info.value, errors.NotAvailable)
    assert str(tmp_path) in str(info.value)
    assert info.value.errno == errno.ENOENT


def test_device_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> int:
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr("os.open", denied)
    with pytest.raises(errors.AccessDenied, match="usermod -aG tensormem") as info:
        KernelDevice(tmp_path)
    assert isinstance(info.value, PermissionError)
    assert info.value.errno == errno.EACCES


def test_device_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(errors.NotAvailable, match="doctor"):
        KernelDevice(tmp_path)  # a directory
