"""The walk-through's line, as it is typed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commanding import BYTE, PROMPT, left

from wan_infer.cli import main
from wan_infer.video import read_frames

FLAGS = ["--task", "t2v-1.3B", "--prompt", PROMPT, "--base_seed", "3", "--sample_steps", "6", "--frame_num", "5"]
CACHE = ["--use_attentioncache", "--start_step", "2", "--attentioncache_interval", "2"]


def torchrun(processes: int, *argv: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "-m", "wan_infer"]
    return subprocess.run(
        [*command, *argv], capture_output=True, text=True, env=environment | {"OMP_NUM_THREADS": "1"}, timeout=120
    )


@pytest.mark.usefixtures("folder")
def test_four_processes_make_the_video_of_one(folder: Path) -> None:
    done = torchrun(4, *FLAGS, *CACHE, "--ulysses_size", "4", "--device", "cpu", "--save_file", "four.mp4")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("this is wan-mini, with its own settings and not those of t2v-1.3B") == 1
    assert done.stderr.count("four.mp4: seed 3") == 1
    assert main([*FLAGS, *CACHE, "--device", "cpu", "--save_file", "one.mp4"]) == 0
    assert left(folder) == ["four.mp4", "four.mp4.json", "one.mp4", "one.mp4.json"]
    records = [json.loads(Path(f"{name}.mp4.json").read_text()) for name in ("four", "one")]
    assert [record["parallel"]["ulysses"] for record in records] == [4, 1]
    assert records[0]["cache"] == records[1]["cache"]
    four, one = (read_frames(f"{name}.mp4") for name in ("four", "one"))
    torch.testing.assert_close(four, one, rtol=0, atol=BYTE)
