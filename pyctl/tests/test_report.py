# SPDX-License-Identifier: MIT
"""'tensormem report', read as text and looked at in a real browser."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from tensormem import recording, report
from tensormem.cli import cli
from terminal import SRC
from test_cli import runner
from test_top import make_world

COUNT = 30


def rewrite(path: Path, name: str, value: int) -> None:
    path.write_text(re.sub(rf"{name}:\t\d+", f"{name}:\t{value}", path.read_text()))


def make_run(top: Path, count: int = COUNT) -> Path:
    """Record a run in which everything moves."""
    root = make_world(top)
    file = top / "run.jsonl"
    with file.open("w") as out:
        for number in range(count):
            for name, value in (
                ("chunk/used", 12 + number), ("chunk/free", 40 - number),
                ("chunk/grown", 30 + number * (number % 3)), ("clients/count", 1 + number % 5),
                ("pressure/available", (200 - 3 * number) << 20), ("pressure/reliefs", number),
                ("pressure/level", "none" if number < 10 else "low" if number < 20 else "critical"),
                ("core0/used", number * 1000), ("core0/held_ns", 10**8 * number),
                ("bandwidth/kv_bytes", number << 20), ("pressure/chunks_given", number << 21),
                ("model/chat/4/state", "loading" if number < 15 else "staged"),
                ("rt/latency", " ".join(["0"] * 10 + [str(5 * number), "3"] + ["0"] * 52)),
                ("rt/allocs", 2000 + 10 * number),
            ):  # fmt: skip
                (root / name).write_text(f"{value}\n")
            fdinfo = top / "proc/20/fdinfo/4"
            rewrite(fdinfo, "lookups", 80 + 10 * number)
            rewrite(fdinfo, "hits", 60 + 9 * number)
            moment = recording.sample(root, top / "proc", now=lambda n=number: 1.7e9 + 2 * n)  # type: ignore[misc]
            recording.write(out, moment)
    return file


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    return make_run(tmp_path)


def run(*arguments: Any) -> Result:
    return runner().invoke(cli, ["report", *map(str, arguments)], prog_name="tensormem")


def page(path: Path) -> str:
    return report.page(recording.load(path), "a run")


class Shape(HTMLParser):
    """Tags that are open, and everything a page could fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and not (value or "").startswith("#"):
                self.fetched.append(value or "")
            if name == "id":
                self.ids.append(value or "")
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "link"):
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page(recorded: Path) -> None:
    text = page(recorded)
    shape = Shape()
    shape.feed(text)
    assert not shape.open, "each tag is closed"
    assert set(shape.fetched) == {"data:,"}
    assert "<script" not in text
    assert "url(http" not in text
    assert "@import" not in text
    for placeholder in ("#0101", "#0202", "#0300"):
        assert placeholder not in text, "every colour is the page's"
    lines = [name for name in shape.ids if re.fullmatch(r"(line|bar|span)[\d-]+", name)]
    assert len(lines) == len(set(lines))
    assert "Not recorded" not in text
    assert "2023-11-1" in text, "when it was"
    assert "58 s, 30 samples" in text
    for figure in ("82 MiB", "90 %", "200 MiB", "22 MiB", "core0 held (% of the time)"):
        assert figure in text


def test_the_same_run_gives_the_same_page(recorded: Path) -> None:
    assert page(recorded) == page(recorded)


def change(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    documents = [json.loads(line) for line in path.read_text().splitlines()]
    for document in documents:
        edit(document)
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))


def test_what_was_not_recorded(recorded: Path) -> None:
    def less(document: dict[str, Any]) -> None:
        document["groups"] = {"chunk": {"capacity": 1}}
        document["rt"] = None
        document["slots"] = []
        document["kv"] = {"caches": [], "hidden": 3}

    change(recorded, less)
    text = page(recorded)
    for reason in (
        "no clients", "no model slots", "no RT pool", "no pressure relief", "not measure bandwidth",
        "KV caches of 3 processes of other users",
    ):  # fmt: skip
        assert len(re.findall(f"Not recorded: [^<]*{reason}", text)) == 1, reason
    assert text.count("<svg") == 1


def test_names_are_text(recorded: Path) -> None:
    def evil(document: dict[str, Any]) -> None:
        document["kv"]["caches"][0]["users"][0]["command"] = "<script>alert(1)</script>"
        document["slots"][0]["name"] = "a&b $x^2$ \"'<b>"

    change(recorded, evil)
    text = report.page(recording.load(recorded), "<img src=x onerror=alert(1)>")
    shape = Shape()
    shape.feed(text)
    assert "<script" not in text
    assert "<img" not in text
    assert "<b>" not in text


def test_a_single_sample(recorded: Path) -> None:
    recorded.write_text(recorded.read_text().splitlines()[0] + "\n")
    text = page(recorded)
    assert "1 sample;" in text
    assert "was asked for by its hash" in text


def test_a_module_loaded_anew(recorded: Path) -> None:
    documents = [json.loads(line) for line in recorded.read_text().splitlines()]
    for document in documents[15:]:
        document["groups"]["chunk"]["grown"] = 0
        document["rt"]["latency"] = [0] * 9 + [4] + [0] * 54
    recorded.write_text("".join(json.dumps(d) + "\n" for d in documents))
    text = page(recorded)
    assert "-" not in re.findall(r"<td>taken</td>(<td>.*?)</tr>", text)[0], "no negative rate"
    assert "<tr><td>&lt; 1.02 us</td><td>4</td></tr>" in text


def test_long_runs_keep_their_extremes() -> None:
    values = [0.0] * 50_000
    values[31_415], values[2_718] = 9.0, -9.0
    values[100:200] = [math.nan] * 100
    x, y = report._thin(list(range(50_000)), values)
    assert len(x) == len(y) <= 2 * report.POINTS
    assert x == sorted(x)
    assert (31_415, 9.0) in zip(x, y, strict=True)
    assert (2_718, -9.0) in zip(x, y, strict=True)
    assert report._thin([1, 2], [math.nan, 5.0])[1][1] == 5.0


def test_a_long_run_stays_small(recorded: Path) -> None:
    one = recording.load(recorded).samples[0]
    samples = [dataclasses.replace(one, time=1e9 + n) for n in range(2500)]
    text = report.page(recording.Recording(samples, True), "long")
    assert "Of the 2500 samples" in text
    assert "cut off" in text
    assert len(text) < 2 << 20


# -- the command -----------------------------------------------------------------------


def test_command(recorded: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.html"
    result = run(recorded, "--html", out, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document == {
        "file": str(out), "bytes": out.stat().st_size, "samples": COUNT, "cut_off": False,
    }  # fmt: skip
    assert "<title>tensormem: run.jsonl</title>" in out.read_text()
    with recorded.open("a") as file:
        file.write(recorded.read_text()[:100])
    result = run(recorded, "--html", out, "--title", "x")
    assert f"{COUNT} samples" in result.stdout
    assert "cut off" in out.read_text()


def test_bad_recordings(recorded: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.html"
    good = recorded.read_text().splitlines()
    newer = good[0].replace('"version":1', '"version":2')
    for text, words in (
        ("", "holds no sample"),
        ("\n\n", "holds no sample"),
        ("nonsense\n", "line 1: it is no JSON"),
        ("{}\n", "line 1: it is not what"),
        ("[]\n", "line 1: it is not what"),
        ("[" * 100_000 + "\n", "line 1"),
        (good[0] + "\n" + "5\n", "line 2: it is not what"),
        (good[0] + "\n" + newer + "\n", "line 2: it is of version 2"),
        (good[1] + "\n" + good[0] + "\n", "line 2: it is of an earlier time"),
        (good[0].replace('"used":12', '"used":1.5') + "\n", "neither a number"),
        (good[0].replace('"used":12', '"used":true') + "\n", "neither a number"),
        (good[0].replace('"active":3', '"active":"x"') + "\n", "line 1: it is not what"),
    ):  # fmt: skip
        recorded.write_text(text)
        result = run(recorded, "--html", out)
        assert result.exit_code == 1, words
        assert words in result.stderr
        assert result.stderr.count("\n") == 1
        assert not out.exists()
    assert run(tmp_path / "missing", "--html", out).exit_code == 1
    recorded.write_text(good[0] + "\n")
    result = run(recorded, "--html", tmp_path / "missing" / "out.html")
    assert result.exit_code == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["proc", "run.jsonl", "tensormem"]


def test_without_matplotlib(recorded: Path) -> None:
    code = "import sys; sys.modules['matplotlib'] = None; from tensormem.cli import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code, "report", str(recorded), "--html", "/dev/null"],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(SRC)},
    )  # fmt: skip
    assert result.returncode == 1
    assert "python3-matplotlib" in result.stderr
    assert "Traceback" not in result.stderr


# -- in a browser ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from selenium import webdriver

    driver = shutil.which("chromedriver")
    assert driver, "chromium-driver is missing: qemu/install-deps test installs it"
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                     "--window-size=1200,900"):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield found
    found.quit()


#: Of each drawn line, bar and span: where it lies on the screen, and how many points it has.
LOOK = """
return [...document.querySelectorAll('[id^=line],[id^=bar],[id^=span]')].map(g => {
  const path = g.querySelector('path'), box = g.getBoundingClientRect();
  return {id: g.id, title: g.closest('svg').getAttribute('aria-label'),
          points: (path.getAttribute('d').match(/[ML]/g) || []).length,
          width: box.width, height: box.height,
          stroke: getComputedStyle(path).stroke, fill: getComputedStyle(path).fill};
});
"""


def colours(browser: Any) -> tuple[str, str]:
    return tuple(
        browser.execute_script(
            "const s = getComputedStyle(document.body);"
            "return [s.backgroundColor, getComputedStyle(document.querySelector('svg text')).fill]"
        )
    )


def distinct(png: bytes) -> int:
    """Return how many colours a picture has."""
    import io

    import matplotlib.image as image
    import numpy as np

    pixels = image.imread(io.BytesIO(png), format="png")
    return len(np.unique(np.round(pixels.reshape(-1, pixels.shape[-1]) * 15), axis=0))


def test_in_a_browser(browser: Any, recorded: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.html"
    assert run(recorded, "--html", out).exit_code == 0
    browser.get(f"file://{out}")
    assert browser.title == "tensormem: run.jsonl"
    assert browser.get_log("browser") == [], "no error, no warning on the console"
    log = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {each["params"]["request"]["url"] for each in log
             if each["method"] == "Network.requestWillBeSent"}  # fmt: skip
    assert {url for url in asked if not url.startswith("data:")} == {f"file://{out}"}

    drawn = browser.execute_script(LOOK)
    lines = [each for each in drawn if each["id"].startswith("line")]
    assert len(lines) > 20
    by_title = {each["title"]: each for each in lines}
    assert by_title["Memory held"]["points"] == COUNT, "a point for each sample"
    rates = by_title["Chunks from and to the system"]
    assert rates["points"] == COUNT - 1, "none before the second sample"
    first = [each["points"] for each in lines if each["title"] == "Chunk pool"]
    assert first == [COUNT] * 5
    assert all(each["width"] > 0 for each in drawn)
    assert all(each["stroke"] != "none" for each in lines)
    # 29 * 5 in one bucket, none in the other, which did not change
    bars = [each for each in drawn if each["id"].startswith("bar")]
    assert [each["height"] > 10 for each in bars if "time until" in each["title"]] == [True]
    spans = [each["title"] for each in drawn if each["id"].startswith("span")]
    assert spans.count("Generations and their states") == 3, "active; loading, then staged"
    assert spans.count("Level") == 3

    text = browser.execute_script("return document.body.innerText")
    for words in ("Pools over time", "Clients", "KV caches", "Model slots", "RT pool", "Pressure",
                  "Bandwidth", "chat 4", "7 server", "< 2.05 us", "MiB"):  # fmt: skip
        assert words in text, words
    assert distinct(browser.get_screenshot_as_png()) > 10

    light = colours(browser)
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": "dark"}]},
    )
    dark = colours(browser)
    assert light == ("rgb(255, 255, 255)", "rgb(28, 32, 36)")
    assert dark == ("rgb(21, 24, 28)", "rgb(230, 233, 236)")
    assert distinct(browser.get_screenshot_as_png()) > 10

    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True},
    )
    wide, small = browser.execute_script(
        "return [document.documentElement.scrollWidth,"
        " Math.min(...[...document.querySelectorAll('svg text')]"
        ".map(t => t.getBoundingClientRect().height).filter(h => h > 0))]"
    )
    assert wide <= 360, "no sideways scrolling"
    assert small >= 8, "text that can be read"
