# SPDX-License-Identifier: MIT
"""Finding the Debian mirror among what apt configurations hold."""

from tmguest.sources import debian_mirror, parse_deb822, parse_list

DEB822 = """# a comment
Types: deb
URIs: http://security.example/debian-security
Suites: bookworm-security
Components: main

Types: deb deb-src
# in between
URIs: http://mirror.example/debian/
Suites: bookworm
 bookworm-updates
Components: main non-free-firmware
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
"""


def test_deb822_with_comments_and_continued_lines() -> None:
    security, main = parse_deb822(DEB822)
    assert security.suites == ("bookworm-security",)
    assert main.suites == ("bookworm", "bookworm-updates")
    assert debian_mirror([security, main]) == "http://mirror.example/debian"


def test_deb822_leaves_out_what_is_off_or_source_only() -> None:
    assert not list(parse_deb822(DEB822.replace("Types: deb deb-src", "Types: deb-src")))[1:]
    off = DEB822.replace("Components: main non", "Enabled: no\nComponents: main non")
    assert debian_mirror(parse_deb822(off)) is None


def test_one_line_format() -> None:
    text = """
# deb http://old.example/debian trixie main
deb-src http://mirror.example/debian trixie main
deb [arch=arm64 signed-by=/k.gpg] https://mirror.example/debian trixie main contrib # mine
"""
    (only,) = parse_list(text)
    assert only.components == ("main", "contrib")
    assert only.signed_by == "/k.gpg"
    assert debian_mirror([only]) == "https://mirror.example/debian"


def test_others_archives_are_no_debian_mirror() -> None:
    text = """
deb http://ports.example/ubuntu noble main universe
deb http://archive.raspberrypi.example/debian trixie main
deb http://packages.example/cloud cloud-sdk-bookworm main
deb http://tools.example/linux/debian bookworm stable
deb http://security.example/debian-security trixie-security main
deb http://raspbian.example/debian bookworm main
"""
    assert debian_mirror(parse_list(text)) is None


def test_list_of_mirrors_of_a_cloud_image() -> None:
    text = "deb mirror+file:///etc/apt/mirrors/debian.list trixie main"
    assert debian_mirror(parse_list(text)) == "mirror+file:///etc/apt/mirrors/debian.list"


def test_garbage_is_survived() -> None:
    assert not list(parse_list("deb\ndeb [x\n\n[]"))
    assert not list(parse_deb822(" starts with a blank\nno colon"))
