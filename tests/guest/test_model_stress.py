# SPDX-License-Identifier: MIT
"""Readers that verify what they hold while the slot is swapped under them: see model_stress.c."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from conftest import USAGE, settled

PROGRAM = Path(__file__).parent / "model_stress"
DEEDS = 1000


@pytest.mark.parametrize("seed", [1])
def test_readers_under_swaps(seed: int) -> None:
    """No page is of another generation than it says, no read fails, and all memory comes back."""
    command = [PROGRAM, "--deeds", str(DEEDS), "--readers", "8", "--seed", str(seed)]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert result.returncode == 0, f"ended with {result.returncode}\n{result.stdout}"
    counts: dict[str, int] = json.loads(result.stdout)
    print(counts)
    deeds = {name: counts[name] for name in ("swaps", "rollbacks", "aborts", "closed")}
    assert sum(deeds.values()) == DEEDS + 2  # the first two are what there is to read
    assert min(deeds.values()) > DEEDS // 20
    assert counts["least"] > DEEDS, "a reader never got through"
    assert counts["acquired"] > DEEDS // 4
    assert counts["old"] and counts["reads"]
    assert settled(dict.fromkeys(USAGE, 0)) == dict.fromkeys(USAGE, 0)
