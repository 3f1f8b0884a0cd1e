#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Draw the pictures of README and docs: `make pictures`, or some: `draw.py look`.

run: a guest runs the demos, all at once, and records itself; `tensormem report` makes a page of that, which
a browser takes a picture of, and the moment in which most happened is shown as `tensormem top` shows it.

look: a guest fills its pools and frees most of it again, and says what `tensormem map` and `tensormem walk`
see; they are drawn here, where matplotlib is.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import fields
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "pyctl/src"))

from rich.console import Console  # noqa: E402
from rich.text import Text  # noqa: E402

from tensormem import layout, picture, recording, report, screen  # noqa: E402
from tensormem.commands import walk  # noqa: E402

RUN = """
tensormem record -i 1 -o /share/pictures/run.jsonl & recorder=$!
tensormem demo --requests 12 > /dev/null & one=$!
tensormem demo --swap 6 > /dev/null & two=$!
tensormem demo --rt --seconds 8 > /dev/null & three=$!
wait $one && wait $two && wait $three; code=$?
kill -TERM $recorder; wait $recorder
exit $code
"""


#: Sizes in pages, as activations of a model have them, most of which are gone when it is looked at.
LOOK = """
import json, os, random, subprocess
import tensormem

def command(name, *arguments):
    done = subprocess.run(["tensormem", *arguments, "--json"], capture_output=True, check=True)
    with open(f"/share/pictures/{name}.json", "wb") as file:
        file.write(done.stdout)

rng = random.Random(4)
with tensormem.open() as client:
    weights = client.alloc(9 << 20, kind="weights")
    weights.array((9 << 20,), "u1")[:] = 1
    tensors = [client.alloc(4096 * rng.choice((1, 2, 3, 8, 21, 64, 100)), pool="buddy") for _ in range(190)]
    rng.shuffle(tensors)
    small = tensors.pop()
    small.array((small.size,), "u1")[:] = 1
    for tensor in tensors[:140]:
        tensor.free()
    pinned = client.alloc(300000, pinned=True)
    for name, tensor in (("block", weights), ("page", small)):
        command(name, "walk", f"{os.getpid()}:{tensor.handle}")
    command("map", "map", "--compact")
"""


def guest(share: Path, *command: str) -> None:
    share.mkdir()
    start = [ROOT / "qemu/guest", "run", "--kernel", "6.12", "--cpus", "2", "--memory", "1G",
             "--timeout", "460", "--share", share, "--", *command]  # fmt: skip
    subprocess.run([*map(str, start)], check=True)


def record(folder: Path) -> recording.Recording:
    """Run the demos in a guest; return what was recorded."""
    share = folder / "pictures"
    guest(share, "sh", "-c", RUN)
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
    save(console, "tensormem top", path)


def save(console: Console, title: str, path: Path) -> None:
    svg = console.export_svg(title=title, unique_id=path.stem)
    # rich names fonts and itself at places on the network; a picture fetches nothing
    svg = re.sub(r"@font-face \{.*?\}\s*|<!--.*?-->\s*", "", svg, flags=re.S)
    path.write_text(svg, encoding="utf-8")


def draw_lines(lines: list[str], title: str, path: Path) -> None:
    console = Console(record=True, width=80, file=io.StringIO(), force_terminal=True)
    for line in lines:
        console.print(Text.from_ansi(line), highlight=False, soft_wrap=True)
    save(console, title, path)


def chunks_of(document: list[dict]) -> list[layout.Chunk]:
    return [
        layout.Chunk(**{**chunk, "runs": tuple(layout.Run(**run) for run in chunk["runs"])}) for chunk in document
    ]


def draw_map(document: dict) -> None:
    before, after = chunks_of(document["before"]), chunks_of(document["chunks"])
    page = document["page_size"]
    lines = []
    for title, chunks in (("before compaction", before), ("after compaction", after)):
        lines += [title, *picture.draw(chunks, page), ""]
    lines += picture.legend(before + after)
    draw_lines(lines, "tensormem map --compact", HERE / "map.svg")
    with (HERE / "map.png").open("wb") as file:
        picture.png(file, [("before", before, set()), ("after", after, set())], page)


def draw_walks(documents: list[dict]) -> None:
    names = {f.name for f in fields(layout.Entry)}
    lines: list[str] = []
    for document in documents:
        entries = [layout.Entry(**{k: v for k, v in e.items() if k in names}) for e in document["entries"]]
        lines += [f"address {document['address']:#x}, pages of {document['page_size'] >> 10} KiB", ""]
        lines += [*walk.picture(entries, document["address"], document["page_size"]), "", ""]
    draw_lines(lines[:-2], "tensormem walk", HERE / "walk.svg")


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


def draw_look() -> None:
    with tempfile.TemporaryDirectory() as folder:
        share = Path(folder) / "pictures"
        guest(share, "python3", "-c", LOOK)
        read = {path.stem: json.loads(path.read_text()) for path in share.glob("*.json")}
    draw_map(read["map"])
    draw_walks([read["page"], read["block"]])
    print(f"{HERE}: map.svg, map.png, walk.svg")


def draw_run() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = record(Path(folder))
        draw_top(run, HERE / "top.svg")
        draw_report(run, Path(folder), HERE / "report.png")
    print(f"{HERE}: top.svg, report.png, of {len(run.samples)} samples")


def main() -> None:
    known = {"run": draw_run, "look": draw_look}
    for name in sys.argv[1:] or known:
        if name not in known:
            sys.exit(f"draw.py: no picture {name!r}: {', '.join(known)}")
        known[name]()


if __name__ == "__main__":
    main()
