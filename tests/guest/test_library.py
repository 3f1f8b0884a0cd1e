# SPDX-License-Identifier: MIT
"""The Python library on the real device; its own tests drive it on a memfd."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import tensormem
from device import CHUNK, PAGE, read


def test_arrays_are_the_kernels_memory() -> None:
    with tensormem.open() as client:
        a = client.zeros((512, 1024), np.float32, kind="weights")
        assert a.shape == (512, 1024)
        assert a.dtype == np.float32
        assert not a.any()
        assert read("chunk/used") == 1
        a[:] = np.arange(a.size, dtype=np.float32).reshape(a.shape)
        assert float(a[-1, -1]) == a.size - 1
        info = client.query(a)
        assert (info.kind, info.pool, info.size, info.chunks) == ("weights", "chunk", CHUNK, 1)
        assert client.stats().used == CHUNK
        del a
        gc.collect()
        assert client.stats().used == 0


def test_freeing_while_viewed_is_safe() -> None:
    with tensormem.open() as client:
        a = client.empty(3 * PAGE, np.uint8)
        view = a[PAGE:]
        view[:] = 9
        client.free(a)
        del a
        assert view.sum() == 9 * 2 * PAGE
        assert client.stats().lingering == 1
        del view
        gc.collect()
        assert (client.stats().used, client.stats().lingering) == (0, 0)


def test_arrays_outlive_their_client() -> None:
    client = tensormem.open()
    a = client.empty(1000, np.int64)
    a[:] = 5
    client.close()
    assert a.sum() == 5000
    assert read("clients/count") == 1
    del a
    gc.collect()
    assert read("clients/count") == 0


def test_a_child_leaves_the_parents_tensors_alone() -> None:
    with tensormem.open() as client:
        a = client.empty(PAGE, np.uint8)
        a[0] = 1
        pid = os.fork()
        if pid == 0:
            a[0] = 2
            del a
            gc.collect()
            os._exit(0)
        os.waitpid(pid, 0)
        assert a[0] == 2
        assert client.stats().tensors == 1
        code = "import tensormem, numpy, os; c = tensormem.open(); a = c.empty(9, numpy.int8); os.fork()"
        subprocess.run([sys.executable, "-c", code], check=True)
        del a
        gc.collect()


def test_errors_say_what_to_do() -> None:
    with tensormem.open() as client:
        client.set_quota(10 * PAGE)
        with pytest.raises(tensormem.QuotaExceeded, match="quota") as caught:
            client.empty(11 * PAGE, np.uint8)
        assert caught.value.remedy
        assert isinstance(caught.value, MemoryError)
        assert client.stats().tensors == 0


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["tensormem", *command], capture_output=True, text=True, check=False)


def test_command_line() -> None:
    import json

    status = run("status", "--json")
    assert status.returncode == 0
    assert json.loads(status.stdout)
    assert run("status").stdout.count("\n") > 3
    before = read("chunk/reserve")
    assert run("pool", "set", "chunk", "--reserve", "4M").returncode == 0
    assert read("chunk/reserve") == 2
    assert run("pool", "set", "chunk", "--reserve", f"{before * 2}M").returncode == 0
    assert read("chunk/reserve") == before
    shown = json.loads(run("pool", "show", "--json").stdout)
    assert str(read("chunk/capacity")) in json.dumps(shown)
    doctor = run("doctor", "--json")
    assert doctor.returncode == 0, doctor.stdout
    assert json.loads(doctor.stdout)
    bad = run("pool", "set", "chunk", "--capacity", "900T")
    assert bad.returncode in (1, 2)
    assert len(bad.stderr.splitlines()) <= 4
    assert "Traceback" not in bad.stderr


def test_the_demo_is_equal_token_for_token() -> None:
    import json

    for checkpoint in ("a", "b"):
        result = run("demo", "--tokens", "24", "--checkpoint", checkpoint, "--json")
        assert result.returncode == 0, result.stderr
        report = json.loads(result.stdout)
        assert "24" in json.dumps(report)
    assert read("clients/count") == 0


def test_an_interrupted_program_leaves_nothing() -> None:
    program = textwrap.dedent("""
        import os, signal, numpy, tensormem
        client = tensormem.open()
        arrays = client.empty_many([tensormem.Spec((1 << 16,), numpy.uint8)] * 50)
        arrays[7][:] = 1
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -9
