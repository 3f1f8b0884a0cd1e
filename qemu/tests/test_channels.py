# SPDX-License-Identifier: MIT
"""The channels' host side."""

import base64

from tmguest.channels import FRAMES_BEGIN, Result, Sink, unframe


def frame(name: str, data: bytes) -> bytes:
    return name.encode() + b" " + base64.b64encode(data) + b"\r\n"


def test_result_in_pieces() -> None:
    result = Result()
    for byte in b"unload rmmod: in use\nexit 42\nend\n":
        result.feed(bytes([byte]))
    assert (result.exit_code, result.unload, result.failure) == (42, "rmmod: in use", "")
    assert result.ended.is_set()


def test_unknown_result_is_a_failure() -> None:
    result = Result()
    result.feed(b"exit nonsense\n")
    assert result.failure
    assert result.exit_code is None


def test_frames_are_sorted_out() -> None:
    got: dict[str, bytes] = {"stdout": b"", "stderr": b""}
    result = Result()

    def taking(name: str) -> None:
        def take(data: bytes) -> None:
            got[name] += data

        sinks[name] = take

    sinks: dict[str, Sink] = {"result": result.feed}
    taking("stdout")
    taking("stderr")
    line = unframe(sinks)
    stream = b"XX\x00garbage\n" + FRAMES_BEGIN + b"\r\n"
    stream += frame("stdout", b"one\n\xff") + frame("stderr", b"two") + frame("stdout", b"three")
    stream += frame("result", b"exit 3\nend\n")
    for at in range(0, len(stream), 5):
        line(stream[at : at + 5])
    assert got == {"stdout": b"one\n\xffthree", "stderr": b"two"}
    assert (result.exit_code, result.failure) == (3, "")


def test_damaged_frame_is_a_failure() -> None:
    for bad in (b"stdout !!!!\n", b"nonsense\n"):
        result = Result()
        unframe({"result": result.feed})(FRAMES_BEGIN + b"\n" + bad)
        assert "damaged" in result.failure
