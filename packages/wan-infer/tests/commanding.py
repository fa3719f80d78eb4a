"""What the tests of the command share: the smallest things to ask for, and what to look at afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest

from wan_infer.cli import main

PROMPT = "the digit 7 moves up"
# The smallest thing that wan-mini makes: one or five frames in two steps.
QUICK = ["--prompt", PROMPT, "--sample_steps", "2", "--device", "cpu", "--base_seed", "3"]
VIDEO = [*QUICK, "--frame_num", "5", "--save_file", "out.mp4"]
# What two videos of other roundings are apart: a byte is rounded to the other side now and then.
BYTE = 1.01 / 127.5


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fails(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 2) -> str:
    """Run the command, which has to fail with one line on stderr; return what it says."""
    assert main([*argv]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    *before, last = captured.err.strip().splitlines()
    assert all("wan-mini" in line for line in before)
    assert last.startswith("wan-infer: error: ")
    return last.removeprefix("wan-infer: error: ")
