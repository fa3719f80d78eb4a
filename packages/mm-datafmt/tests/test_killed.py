"""Conversions ended by SIGKILL, SIGTERM and SIGINT at random moments, then resumed: the same bytes.

A few run here; DATAFMT_KILLS sets another number, `nox -s datafmt-fuzz` 27: three of each kind of input.
"""

from __future__ import annotations

import os
from pathlib import Path

from killed_conversions import main

KILLS = int(os.environ.get("DATAFMT_KILLS", "2"))


def test_killed_and_resumed(tmp_path: Path) -> None:
    said = main(tmp_path, KILLS, seed=KILLS, records=6000 if KILLS > 9 else 1500)
    assert len(said) == min(KILLS, 9)
