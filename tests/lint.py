#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Style, types and static checks; every one of them runs, then the verdict."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "qemu"))

#: What checkpatch says of macros that define sysfs files, of a platform layer, and of who holds a core: he does yield.
CHECKPATCH_IGNORE = "COMPLEX_MACRO,MACRO_WITH_FLOW_CONTROL,NEW_TYPEDEFS,MULTISTATEMENT_MACRO_USE_DO_WHILE,YIELD"
#: And of programs of user space: there is no __printf() and no READ_ONCE().
CHECKPATCH_IGNORE_USER = "EMBEDDED_FUNCTION_NAME,MACRO_ARG_UNUSED,PREFER_DEFINED_ATTRIBUTE_MACRO,VOLATILE"
#: Tracepoint headers have a layout of their own.
NOT_FOR_CHECKPATCH = {"trace.h"}

#: Hosts and paths that belong to one machine; the tree names none.
PRIVATE = re.compile(
    r"https?://(?![\w.-]+\.example\b|www\.gnu\.org|www\.w3\.org|docs\.kernel\.org|arxiv\.org|github\.com|json\.schemastore\.org)"
    r"[\w.-]+\.\w+|" + re.escape(f"{ROOT}/") + "|" + re.escape(f"{Path.home()}/.cache/")
)


def run(*command: str | Path) -> str:
    """The output of a failure; empty when all is well."""
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return "" if result.returncode == 0 else result.stdout + result.stderr


def tool(name: str, *arguments: str) -> str:
    return run(sys.executable, "-m", name, *arguments)


def tracked(*patterns: str) -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "--", *patterns],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [ROOT / line for line in listing.stdout.splitlines() if (ROOT / line).is_file()]


def checkpatch(folder: str, ignore: str) -> str:
    from tmguest import kernels

    script = kernels.prepare(kernels.spec("debug")).path / "src/linux-debug/scripts/checkpatch.pl"
    files = [f for f in tracked(f"{folder}/*.c", f"{folder}/*.h") if f.name not in NOT_FOR_CHECKPATCH]
    return run("perl", script, "--no-tree", "--terse", "--quiet", "--no-summary", "--show-types",
               f"--ignore={ignore}", "-f", *files)  # fmt: skip


def uapi_stands_alone() -> str:
    """The header compiles by itself, as C and as C++, without a warning."""
    header = ROOT / "kmod/include/uapi/linux/tensormem.h"
    flags = ("-fsyntax-only", "-Wall", "-Wextra", "-Wpedantic", "-Wno-pragma-once-outside-header",
             "-Werror", f"-I{header.parents[1]}")  # fmt: skip
    return run("cc", "-std=c11", *flags, "-x", "c", header)


def core_is_free_of_the_kernel() -> str:
    """A core file reaches the outside through core/platform.h only."""
    bad = []
    for path in tracked("kmod/core/*"):
        for line in path.read_text().splitlines():
            include = re.match(r'#\s*include\s+(["<])(.*?)[">]', line)
            allowed = include and (include[2].startswith("core/") or path.name == "platform.h")
            if include and not allowed:
                bad.append(f"{path.relative_to(ROOT)}: {line}")
    return "\n".join(bad)


def versions_only_in_compat() -> str:
    bad = []
    for path in tracked("kmod/*.c", "kmod/*.h"):
        text = path.read_text()
        if re.search(r"LINUX_VERSION_CODE|KERNEL_VERSION\(", text) or (
            path.name != "compat.h" and "TM_HAVE_" in text
        ):
            bad.append(f"{path.relative_to(ROOT)}: version differences belong in compat.h")
    return "\n".join(bad)


def licences() -> str:
    bad = []
    for path in tracked("*.c", "*.h", "*.py", "Makefile", "*/Makefile", "*/Kbuild", ".ci/run"):
        if "SPDX-License-Identifier:" not in "".join(path.open().readlines()[:3]):
            bad.append(f"{path.relative_to(ROOT)}: no SPDX line")
    return "\n".join(bad)


def nothing_private() -> str:
    bad = []
    for path in tracked("*"):
        if path.suffix in (".safetensors", ".png"):
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if found := PRIVATE.search(line):
                bad.append(f"{path.relative_to(ROOT)}:{number}: {found[0]}")
    return "\n".join(bad)


def guest_build(*flags: str) -> Callable[[], str]:
    return lambda: run(ROOT / "qemu/guest", "build", *flags)


CHECKS: dict[str, Callable[[], str]] = {
    "ruff pyctl": lambda: tool("ruff", "check", "-q", "--no-cache", "pyctl"),
    "ruff bpf, qemu, tests": lambda: tool(
        "ruff", "check", "-q", "--no-cache", "--config", "tests/ruff.toml", "bpf", "qemu", "tests", "docs"
    ),
    "mypy pyctl": lambda: run(
        "sh", "-c", f"cd pyctl && {sys.executable} -m mypy --no-incremental --strict src tests"
    ),
    "mypy bpf": lambda: run(
        "sh", "-c", f"cd bpf && {sys.executable} -m mypy --no-incremental --strict *.py"
    ),
    "mypy qemu": lambda: run(
        "sh", "-c", f"cd qemu && {sys.executable} -m mypy --no-incremental --strict tmguest"
    ),
    "mypy tests": lambda: run(
        "env", "MYPYPATH=pyctl/src", sys.executable, "-m", "mypy", "--no-incremental", "--strict",
        "--config-file=pyctl/pyproject.toml", "tests/run.py", *tracked("tests/bench/*.py"),
    ),
    "UAPI header alone": uapi_stands_alone,
    "core/ without kernel": core_is_free_of_the_kernel,
    "versions in compat.h": versions_only_in_compat,
    "licences": licences,
    "nothing private": nothing_private,
    "module: W=1, sparse": guest_build("--w1", "--sparse"),
    "checkpatch kmod": lambda: checkpatch("kmod", CHECKPATCH_IGNORE),
    "checkpatch tests": lambda: checkpatch("tests", f"{CHECKPATCH_IGNORE},{CHECKPATCH_IGNORE_USER}"),
}


def main() -> None:
    failed = 0
    for name, check in CHECKS.items():
        trouble = check().strip()
        failed += bool(trouble)
        print(f"{name:<24} {'FAILED' if trouble else 'ok'}", flush=True)
        if trouble:
            print("\n".join("    " + line for line in trouble.splitlines()[-60:]))
    print(f"lint: {len(CHECKS) - failed} passed, {failed} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
