# SPDX-License-Identifier: MIT
"""'tensormem tune' on a root directory of its own: advice; changes that are all made or none."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from tensormem import errors, tune
from tensormem.cli import cli
from terminal import SRC
from test_cli import narrow, runner

THP = "/sys/kernel/mm/transparent_hugepage/enabled"
CMDLINE = "/boot/firmware/cmdline.txt"
LIBRARY = "/usr/lib/aarch64-linux-gnu/libjemalloc.so.2"
UNIT = "/etc/systemd/system/llm.service"
DROPIN = UNIT + ".d/60-tensormem-jemalloc.conf"
LIVE = (THP, "/proc/sys/vm/nr_hugepages", "/proc/sys/vm/swappiness")

PI = {
    THP: "[always] madvise never\n",
    "/proc/sys/vm/nr_hugepages": "16\n",
    "/proc/sys/vm/swappiness": "60\n",
    "/proc/meminfo": "HugePages_Total:   16\nHugePages_Free:    16\nHugePages_Rsvd:     0\n",
    "/proc/swaps": "Filename Type Size Used Priority\n/var/swap file 102396 0 -2\n",
    "/proc/cmdline": "coherent_pool=1M cgroup_disable=memory console=tty1 rootwait\n",
    "/sys/fs/cgroup/cgroup.controllers": "cpuset cpu io pids\n",
    CMDLINE: "console=tty1 root=PARTUUID=1-02 rootwait\n",
    LIBRARY: "",
    UNIT: "[Service]\nExecStart=/usr/bin/llm\n",
    "/etc/sysctl.d/.keep": "",
    "/var/lib/.keep": "",
}


def make(top: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = top / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return top


@pytest.fixture
def root(tmp_path: Path) -> Path:
    found = make(tmp_path / "root", PI)
    (found / CMDLINE.lstrip("/")).chmod(0o755)  # as FAT shows it
    return found


def state(root: Path) -> dict[str, tuple[str, int]]:
    """Return every file and folder: contents and mode; of kernel values what is chosen."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = "/" + str(path.relative_to(root))
        text = path.read_text() if path.is_file() else ""
        chosen = re.search(r"\[(\w+)\]", text)
        if name in LIVE:
            text = chosen[1] if chosen else text.strip()
        found[name] = (text, path.stat().st_mode)
    return found


def nothing(command: Sequence[str]) -> None:
    assert list(command) == ["systemctl", "daemon-reload"]


def by_name(root: Path, unit: str | None = None) -> dict[str, tune.Advice]:
    return {each.name: each for each in tune.advise(unit, root=root)}


# -- advice ----------------------------------------------------------------------------


def test_a_stock_pi(root: Path) -> None:
    before = state(root)
    found = by_name(root, "llm.service")
    assert {n: (a.found, a.advised) for n, a in found.items()} == {
        "thp": ("always", "madvise"),
        "hugepages": ("16", "0"),
        "swappiness": ("60", "10"),
        "cgroup": ("off", "on"),
        "psi": ("off", "on"),
        "jemalloc": ("not preloaded", "preloaded in llm.service"),
    }
    assert all(each.why and each.changes for each in found.values())
    assert [name for name, each in found.items() if each.reboot] == ["cgroup", "psi"]
    assert state(root) == before, "looking changes nothing"


@pytest.mark.parametrize(
    ("name", "files", "found", "advised"),
    [
        ("thp", {THP: None}, "absent", "absent"),
        ("thp", {THP: "always madvise [never]\n"}, "never", "madvise"),
        ("thp", {THP: "always [madvise] never\n"}, "madvise", "madvise"),
        ("hugepages", {"/proc/sys/vm/nr_hugepages": None}, "absent", "absent"),
        ("hugepages", {"/proc/sys/vm/nr_hugepages": "0\n"}, "0", "0"),
        ("hugepages", {"/proc/meminfo": "HugePages_Total: 16\nHugePages_Free: 15\n"}, "16", "16"),
        ("hugepages", {"/proc/meminfo": "HugePages_Total: 16\nHugePages_Free: 16\n"
                       "HugePages_Rsvd: 2\n"}, "16", "16"),
        ("swappiness", {"/proc/swaps": "Filename\n"}, "60", "60"),
        ("swappiness", {"/proc/swaps": "Filename\n/dev/zram0 partition 1 0 100\n"}, "60", "100"),
        ("swappiness", {"/proc/sys/vm/swappiness": "5\n"}, "5", "5"),
        ("swappiness", {"/proc/swaps": "Filename\n/dev/zram0 partition 1 0 100\n/var/swap x\n"},
         "60", "10"),
        ("cgroup", {"/sys/fs/cgroup/cgroup.controllers": "cpu memory pids\n"}, "on", "on"),
        ("cgroup", {"/proc/cmdline": "cgroup_enable=memory\n"}, "off", "off"),
        ("cgroup", {CMDLINE: "a cgroup_enable=memory b\n"}, "off until reboot", "on"),
        ("cgroup", {CMDLINE: None}, "off", "on"),
        ("psi", {"/proc/pressure/memory": "some avg10=0.00\n"}, "on", "on"),
    ],
)  # fmt: skip
def test_advice(
    tmp_path: Path, name: str, files: dict[str, str | None], found: str, advised: str
) -> None:
    all_files = {k: v for k, v in {**PI, **files}.items() if v is not None}
    each = by_name(make(tmp_path, all_files))[name]
    assert (each.found, each.advised) == (found, advised)
    if found == advised:
        assert not each.changes
    else:
        assert each.changes or each.by_hand


def test_jemalloc(root: Path) -> None:
    for bad in ("llm", "../x.service", "a b.service", "", "x/y.service", "llm.service\n"):
        with pytest.raises(errors.InvalidArgument, match="names no service"):
            tune.advise(bad, root=root)
    with pytest.raises(errors.InvalidArgument, match="no unit other"):
        tune.advise("other.service", root=root)
    make(root, {"/lib/systemd/system/many@.service": "[Service]\n"})
    assert by_name(root, "many@7.service")["jemalloc"].changes
    make(root, {UNIT + ".d/mine.conf": "[Service]\nEnvironment=LD_PRELOAD=/x.so\n"})
    each = by_name(root, "llm.service")["jemalloc"]
    assert not each.changes
    assert f"LD_PRELOAD in {UNIT}.d/mine.conf" in each.by_hand
    (root / LIBRARY.lstrip("/")).unlink()
    assert "apt install libjemalloc2" in by_name(root, "llm.service")["jemalloc"].by_hand


# -- changes ---------------------------------------------------------------------------


def apply(root: Path, unit: str | None = "llm.service") -> list[str]:
    changed = tune.apply(tune.advise(unit, root=root), root=root, run=nothing)
    return [change.path for change in changed]


def test_apply_and_revert(root: Path) -> None:
    before = state(root)
    ran: list[Sequence[str]] = []
    advice = tune.advise("llm.service", root=root)
    tune.apply(advice, root=root, run=ran.append)
    after = state(root)
    assert after[THP][0] == "madvise"
    assert after["/proc/sys/vm/nr_hugepages"][0] == "0"
    assert after["/proc/sys/vm/swappiness"][0] == "10"
    line = "console=tty1 root=PARTUUID=1-02 rootwait cgroup_enable=memory psi=1\n"
    assert after[CMDLINE] == (line, before[CMDLINE][1])
    assert f"w {THP} - - - - madvise\n" in after["/etc/tmpfiles.d/tensormem.conf"][0]
    sysctl = after["/etc/sysctl.d/60-tensormem.conf"][0]
    assert sysctl.splitlines()[1:] == ["vm.nr_hugepages = 0", "vm.swappiness = 10"]
    assert after[DROPIN][0].endswith(f"[Service]\nEnvironment=LD_PRELOAD={LIBRARY}\n")
    assert ran == [["systemctl", "daemon-reload"]]
    # what is running is as before until the reboot, and the flags are not added twice
    assert {n: a.found for n, a in by_name(root, "llm.service").items()} == {
        "thp": "madvise", "hugepages": "0", "swappiness": "10", "cgroup": "off until reboot",
        "psi": "off until reboot", "jemalloc": "preloaded in llm.service",
    }  # fmt: skip
    assert apply(root) == [], "the second time there is nothing to do"
    assert state(root) == after
    back = tune.revert(root=root, run=nothing)
    assert len(back) == 7
    assert state(root) == before
    assert tune.revert(root=root, run=nothing) == []


def test_what_is_added_later_is_taken_back_too(root: Path) -> None:
    before = state(root)
    apply(root, None)
    (root / "proc/sys/vm/swappiness").write_text("80\n")
    assert set(apply(root)) == {
        "/proc/sys/vm/swappiness", "/etc/sysctl.d/60-tensormem.conf", DROPIN,
    }  # fmt: skip
    assert state(root)["/proc/sys/vm/swappiness"][0] == "10"
    assert "vm.nr_hugepages = 0" in state(root)["/etc/sysctl.d/60-tensormem.conf"][0]
    tune.revert(root=root, run=nothing)
    assert state(root) == before, "as before the first time"


def test_a_file_that_somebody_else_changed(root: Path) -> None:
    apply(root)
    path = root / CMDLINE.lstrip("/")
    path.write_text(path.read_text().replace("rootwait", "rootwait quiet"))
    now = state(root)
    with pytest.raises(errors.Busy, match=r"cmdline\.txt was changed"):
        tune.revert(root=root, run=nothing)
    assert state(root) == now, "nothing was put back"


def count_steps(monkeypatch: pytest.MonkeyPatch, fail_at: int) -> list[str]:
    """Make one of the steps fail as on a full disk; return what was done."""
    done: list[str] = []

    def wrap(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def step(*arguments: Any, **options: Any) -> Any:
            writes = name != "open" or arguments[1] & os.O_WRONLY
            if writes:
                done.append(name)
                if len(done) == fail_at:
                    raise OSError(errno.ENOSPC, "No space left on device", str(arguments[0]))
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, step)

    wrap(os, "open")
    wrap(os, "replace")
    wrap(Path, "mkdir")
    wrap(Path, "write_bytes")
    return done


def test_all_or_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = state(root)
    at = 0
    while True:
        at += 1
        with monkeypatch.context() as patch:
            done = count_steps(patch, at)
            try:
                apply(root)
                break
            except errors.TensormemError as error:
                failure = error
        assert failure.errno == errno.ENOSPC
        assert "nothing was changed" in failure.remedy
        assert state(root) == before, f"step {at}: {done[-1]}"
    assert at == len(done) + 1 > 15, "each step failed once"


def test_systemd_refuses(root: Path) -> None:
    before = state(root)

    def refuse(command: Sequence[str]) -> None:
        raise subprocess.CalledProcessError(1, command)

    with pytest.raises(errors.TensormemError, match="daemon-reload failed with 1"):
        tune.apply(tune.advise("llm.service", root=root), root=root, run=refuse)
    assert state(root) == before


KILLED = """
import os, sys
from pathlib import Path
from tensormem import tune
left = int(sys.argv[2])
def wrap(owner, name):
    real = getattr(owner, name)
    def step(*arguments, **options):
        global left
        left -= 1
        if not left:
            os.kill(os.getpid(), 9)
        return real(*arguments, **options)
    setattr(owner, name, step)
for owner, name in ((os, "replace"), (Path, "mkdir"), (Path, "write_bytes"), (os, "fsync")):
    wrap(owner, name)
tune.apply(tune.advise("llm.service", root=sys.argv[1]), root=sys.argv[1], run=print)
"""


def test_killed_anywhere(root: Path) -> None:
    before = state(root)
    for at in range(1, 100, 3):
        result = subprocess.run(
            [sys.executable, "-c", KILLED, str(root), str(at)], check=False, capture_output=True,
            text=True, env={**os.environ, "PYTHONPATH": str(SRC)},
        )  # fmt: skip
        tune.revert(root=root, run=nothing)
        assert state(root) == before, at
        if result.returncode == 0:
            assert at > 15
            return
        assert result.returncode == -9, result.stderr
    pytest.fail("it never came to its end")


def test_damaged_journals(root: Path) -> None:
    apply(root)
    now = state(root)
    journal = root / tune.JOURNAL.lstrip("/")
    good = json.loads(journal.read_text())
    entry = good["entries"][0]
    for text in (
        "", "{}", "[]", "nonsense", '{"version": 2, "entries": []}',
        json.dumps({"version": 1, "entries": [{}]}),
        json.dumps({"version": 1, "entries": [{**entry, "after": "!"}]}),
    ):  # fmt: skip
        journal.write_text(text)
        with pytest.raises(errors.TensormemError, match="is damaged"):
            tune.revert(root=root, run=nothing)
    journal.write_text(json.dumps(good))
    assert state(root).keys() == now.keys()


# -- the command -----------------------------------------------------------------------


@pytest.fixture
def run(root: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.setenv("TENSORMEM_ROOT", str(root))
    return lambda *words: runner().invoke(cli, ["tune", *words], prog_name="tensormem")


def test_command(run: Callable[..., Result], root: Path) -> None:
    before = state(root)
    result = run()
    assert result.exit_code == 0
    assert "tune  thp         always -> madvise" in result.stdout
    assert "      - echo 10 > /proc/sys/vm/swappiness" in result.stdout
    assert "tensormem tune --apply" in result.stdout
    assert narrow("\n".join(x for x in result.stdout.splitlines() if not x.startswith("      - ")))
    document = json.loads(run("--json").stdout)
    assert [each["name"] for each in document["settings"]] == [
        "thp", "hugepages", "swappiness", "cgroup", "psi",
    ]  # fmt: skip
    assert document["changed"] == []
    assert state(root) == before
    result = run("--apply")
    assert result.exit_code == 0, result.output
    assert f"changed: {CMDLINE}" in result.stdout
    assert "reboot for the boot flags" in result.stdout
    assert "nothing to change" in run("--apply").stdout
    assert len(json.loads(run("--revert", "--json").stdout)["reverted"]) == 6
    assert state(root) == before
    assert "nothing to put back" in run("--revert").stdout


def test_wrong_usage(run: Callable[..., Result]) -> None:
    assert run("--apply", "--revert").exit_code == 2
    assert run("--revert", "--unit", "llm.service").exit_code == 2
    assert run("--unit", "nope").exit_code == 1


def test_it_takes_root(
    run: Callable[..., Result], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state(root)

    def refuse(*arguments: Any, **_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(arguments[0]))

    monkeypatch.setattr(Path, "mkdir", refuse)
    result = run("--apply")
    assert result.exit_code == 1
    assert "this takes root: run it with sudo" in result.stderr
    assert state(root) == before
