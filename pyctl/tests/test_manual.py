# SPDX-License-Identifier: MIT
"""Each command has a man page that says all its options, and appears in shell completion."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest
from click.shell_completion import ShellComplete

from tensormem import manual
from tensormem.cli import cli
from test_cli import runner

COMMANDS = list(manual.commands(cli))
NAMES = [" ".join(words) for words, _ in COMMANDS]


def test_all_commands_are_walked() -> None:
    assert len(NAMES) == len(set(NAMES)) > 30
    for name in ("tensormem", "tensormem pool set", "tensormem top", "tensormem man"):
        assert name in NAMES

    def count(command: click.Command) -> int:
        inner = command.commands.values() if isinstance(command, click.Group) else ()
        return 1 + sum(map(count, inner))

    assert len(NAMES) == count(cli), "none is hidden"


def shown(path: Path) -> str:
    """Return a page as man shows it; nothing in it may make the formatter complain."""
    assert shutil.which("groff"), "groff is missing: qemu/install-deps test installs it"
    result = subprocess.run(
        ["groff", "-man", "-ww", "-Kutf8", "-Tascii", "-P-cbou", "-rLL=200n", str(path)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert result.stderr == "", path.name
    return " ".join(result.stdout.split())


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("man") / "man1"
    result = runner().invoke(cli, ["man", str(folder), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["pages"] == [manual.page_name(w) for w, _ in COMMANDS]
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        manual.page_name(words) for words, _ in COMMANDS
    )
    return folder


@pytest.mark.parametrize(("words", "command"), COMMANDS, ids=NAMES)
def test_page(pages: Path, words: tuple[str, ...], command: click.Command) -> None:
    text = shown(pages / manual.page_name(words))
    name = "-".join(words)
    assert f"NAME {name} - " in text
    assert f"SYNOPSIS {' '.join(words)} " in text
    context = manual._context(words, command, cli)
    for parameter in command.get_params(context):
        for option in parameter.opts if isinstance(parameter, click.Option) else ():
            assert option in text, f"{option} is missing"
        record = parameter.get_help_record(context)
        if record is not None:
            assert record[1].split("  ")[0].split(" [")[0] in text
    assert "-h, --help" in text
    if isinstance(command, click.Group):
        for inner in command.commands:
            assert f"{name}-{inner}(1)" in text
    if len(words) > 1:
        assert f"SEE ALSO {'-'.join(words[:-1])}(1)" in text


def test_text_that_roff_would_take_as_its_own(tmp_path: Path) -> None:
    @click.command()
    @click.option("--odd", help="'quoted' \\fBnot bold .nor this")
    def odd(odd: Any) -> None:
        """Say .so and 'so.

        .TH evil

        \b
        'kept
        as it is \\n
        """

    group = click.Group("tensormem", {"odd": odd})
    path = tmp_path / "odd.1"
    path.write_text(manual.page(("tensormem", "odd"), odd, group))
    text = shown(path)
    for words in (".TH evil", "'kept as it is \\n", "'quoted' \\fBnot bold .nor this"):
        assert words in text


@pytest.mark.parametrize(("words", "command"), COMMANDS, ids=NAMES)
def test_completion(words: tuple[str, ...], command: click.Command) -> None:
    complete = ShellComplete(cli, {}, "tensormem", "_TENSORMEM_COMPLETE")
    *before, last = words[1:] or [""]
    if last:
        found = [item.value for item in complete.get_completions(list(before), last[:-1])]
        assert last in found
    options = [item.value for item in complete.get_completions(list(words[1:]), "--")]
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert set(parameter.opts) & set(options), parameter.name
    assert "--help" in options
    if not isinstance(command, click.Group):
        assert "--json" in options, "every command has --json"


def test_a_directory_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = runner().invoke(cli, ["man", str(tmp_path / "file" / "x")])
    assert result.exit_code == 1
    assert "Not a directory" in result.stderr
