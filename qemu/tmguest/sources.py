# SPDX-License-Identifier: MIT
"""Finding a Debian mirror in the machine's own apt sources. Pure functions over text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

DEBIAN_SUITES = frozenset(
    {
        "oldoldstable", "oldstable", "stable", "testing", "unstable", "sid",
        "buster", "bullseye", "bookworm", "trixie", "forky", "duke",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """One binary package source of an apt configuration."""

    uris: tuple[str, ...]
    suites: tuple[str, ...]
    components: tuple[str, ...]
    signed_by: str = ""


def parse_list(text: str) -> Iterator[Source]:
    """Read the one-line format (``deb [options] URI SUITE COMPONENT…``)."""
    for line in text.splitlines():
        fields = re.match(r"\s*deb\s+(?:\[(?P<options>[^\]]*)\]\s*)?(?P<rest>[^#]+)", line)
        if fields is None:
            continue
        words = fields["rest"].split()
        if len(words) < 2:
            continue
        options = dict(word.split("=", 1) for word in (fields["options"] or "").split() if "=" in word)
        yield Source((words[0],), (words[1],), tuple(words[2:]), options.get("signed-by", ""))


def parse_deb822(text: str) -> Iterator[Source]:
    """Read the deb822 format (``Types: …``), stanza by stanza."""
    kept = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for stanza in re.split(r"\n\s*\n", kept):
        fields: dict[str, str] = {}
        name = ""
        for line in stanza.splitlines():
            if line[:1].isspace():
                fields[name] = f"{fields.get(name, '')} {line.strip()}"
            elif ":" in line:
                name, value = line.split(":", 1)
                name = name.strip().lower()
                fields[name] = value.strip()
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() in (
            "no",
            "false",
        ):
            continue
        yield Source(
            tuple(fields.get("uris", "").split()),
            tuple(fields.get("suites", "").split()),
            tuple(fields.get("components", "").split()),
            fields.get("signed-by", ""),
        )


def debian_mirror(sources: Iterable[Source]) -> str | None:
    """The first URI that serves Debian's main archive, or None.

    Derivatives (Ubuntu, Raspberry Pi's own archive) use other suites or another path, third parties have no ``main``
    of a Debian suite, and the security archive holds no whole release. Raspberry Pi's own archives copy Debian's suite
    names, hence the look at the URI; a list of mirrors (``mirror+file:…/debian.list``) is as good as a mirror.
    """
    for source in sources:
        if "main" not in source.components:
            continue
        if not any(suite.removesuffix("-updates") in DEBIAN_SUITES for suite in source.suites):
            continue
        for uri in source.uris:
            segments = uri.rstrip("/").removesuffix(".list").split("/")
            if "debian" in segments and "raspberrypi" not in uri and "raspbian" not in uri:
                return uri.rstrip("/")
    return None
