"""Spoiled records of every format: no traceback, written + rejected == read, what is written is sound.

Three hundred run here; DATAFMT_FUZZ_RECORDS sets another number, `nox -s datafmt-fuzz` 20,000.
"""

from __future__ import annotations

import os

from fuzz_records import run

RECORDS = int(os.environ.get("DATAFMT_FUZZ_RECORDS", "300"))


def test_spoiled_records() -> None:
    read, written = run(RECORDS, seed=10)
    assert read >= RECORDS
    assert written > read / 10, "many survive"
