# SPDX-License-Identifier: MIT
"""The small pure parts: apt's answers, Kconfig's losses, copies of the module's source."""

import os
from pathlib import Path

from tmguest import apt, debugkernel, module

URIS = """Reading package lists...
'http://m.example/pool/main/a/attr/libattr1_2.5.2-3_arm64.deb' libattr1_1%3a2.5.2-3_arm64.deb 22876 MD5Sum:2c31
'http://m.example/pool/main/l/linux/linux-image-6.12.107+deb13-arm64_6.12.107-1_arm64.deb' linux-image-6.12.107+deb13-arm64_6.12.107-1_arm64.deb 92902468 MD5Sum:2c31
"""  # noqa: E501


def test_packages_of_print_uris() -> None:
    kernel = apt.Package("linux-image-6.12.107+deb13-arm64", "6.12.107-1", "arm64")
    assert apt.parse_uris(URIS) == [apt.Package("libattr1", "1:2.5.2-3", "arm64"), kernel]
    assert apt.parse_uris(URIS, r"linux-image-\d") == [kernel]


def test_options_that_kconfig_dropped_are_named() -> None:
    fragment = '# words\nCONFIG_A=y\nCONFIG_B="x"\nCONFIG_C=5\n# CONFIG_D is not set\n# CONFIG_E is not set\n'
    config = '# CONFIG_A is not set\nCONFIG_B="x"\nCONFIG_C=6\nCONFIG_D=y\n'
    assert debugkernel.lost_options(fragment, config) == [
        "CONFIG_A=y",
        "CONFIG_C=5",
        "# CONFIG_D is not set",
    ]


def test_source_copy_follows_and_keeps_what_was_built(tmp_path: Path) -> None:
    source, copy = tmp_path / "kmod", tmp_path / "copy"
    (source / "core").mkdir(parents=True)
    (source / "core/a.c").write_text("a")
    (source / "b.c").write_text("b")
    (source / "host.o").write_text("not ours")
    assert module.mirror_sources(source, copy)
    (copy / "b.o").write_text("built")
    assert not module.mirror_sources(source, copy)
    (source / "b.c").unlink()
    os.utime(source / "core/a.c", (1, 1))
    assert module.mirror_sources(source, copy)
    assert sorted(path.name for path in copy.rglob("*.[co]")) == ["a.c", "b.o"]
    assert (copy / "core/a.c").stat().st_mtime == 1
