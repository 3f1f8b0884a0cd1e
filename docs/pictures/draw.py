#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Draw the README's pictures: `make pictures`.

A guest runs the demos, all at once, and records itself; `tensormem report` makes a page of that, which
a browser takes a picture of, and the moment in which most happened is shown as `tensormem top` shows it.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "pyctl/src"))

from rich.console import Console  # noqa: E402

from tensormem import recording, report, screen  # noqa: E402

RUN = """
tensormem record -i 1 -o /share/pictures/run.jsonl & recorder=$!
tensormem demo --requests 12 > /dev/null & one=$!
tensormem demo --swap 6 > /dev/null & two=$!
tensormem demo --rt --seconds 8 > /dev/null & three=$!
wait $one && wait $two && wait $three; code=$?
kill -TERM $recorder; wait $recorder
exit $code
"""


def record(folder: Path) -> recording.Recording:
    """Run the demos in a guest; return what was recorded."""
    share = folder / "pictures"
    share.mkdir()
    command = [ROOT / "qemu/guest", "run", "--kernel", "6.12", "--cpus", "2", "--memory", "1G",
               "--timeout", "460", "--share", share, "--", "sh", "-c", RUN]  # fmt: skip
    subprocess.run([*map(str, command)], check=True)
    return recording.load(share / "run.jsonl")


def busiest(run: recording.Recording) -> int:
    """The sample with most to see, of those with one before."""

    def much(number: int) -> tuple[int, int]:
        sample = run.samples[number]
        rt = len(sample.rt.clients) if sample.rt else 0
        parts = min(1, len(sample.kv.caches)) + min(1, len(sample.slots)) + min(1, rt)
        return parts, sum(len(slot.generations) for slot in sample.slots)

    return max(range(1, len(run.samples)), key=much)


def draw_top(run: recording.Recording, path: Path) -> None:
    at = busiest(run)
    console = Console(record=True, width=80, file=io.StringIO(), force_terminal=True)
    view = screen.View(interval=1)
    for part in screen.frame(run.samples[at], run.samples[at - 1], view, 80, 24):
        console.print(part, crop=True, overflow="ellipsis", no_wrap=True, highlight=False)
    picture = console.export_svg(title="tensormem top", unique_id="top")
    # rich names fonts and itself at places on the network; a picture fetches nothing
    picture = re.sub(r"@font-face \{.*?\}\s*|<!--.*?-->\s*", "", picture, flags=re.S)
    path.write_text(picture, encoding="utf-8")


def draw_report(run: recording.Recording, folder: Path, path: Path) -> None:
    page = folder / "report.html"
    page.write_text(report.page(run, "the demos, all at once"), encoding="utf-8")
    browser = shutil.which("chromium")
    if browser is None:
        sys.exit("draw.py: chromium is missing: qemu/install-deps test installs it")
    subprocess.run(
        [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
         "--window-size=1000,1700", f"--screenshot={path}", f"file://{page}"],
        check=True, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = record(Path(folder))
        draw_top(run, HERE / "top.svg")
        draw_report(run, Path(folder), HERE / "report.png")
    print(f"{HERE}: top.svg, report.png, of {len(run.samples)} samples")


if __name__ == "__main__":
    main()
