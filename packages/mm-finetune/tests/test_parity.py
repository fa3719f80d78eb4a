"""megatron-core against transformers: logits, every gradient, ten AdamW steps, and the weights after export.

Tolerances, all in float32 with eps = 6e-8: sums over 64 to 256 terms are taken in another order, which costs a few eps
of the largest value of a tensor in the forward pass, and some tens through four layers of backward.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

LOGITS = 2e-6
GRADIENTS = 4e-6
CURVE = 2e-6  # absolute, at a loss of ln(256) = 5.5
NORM = 2e-6  # relative
# Adam divides a gradient by its own size: where it is zero but for rounding (key biases), ten steps of 1e-3 differ.
EXPORTED = 2e-3

ONE = [{"tp": 1, "pp": 1, "llm": [4], "tied": False}]
TWO = [
    {"tp": 2, "pp": 1, "llm": [4], "tied": False},
    {"tp": 1, "pp": 2, "llm": [1, 3], "tied": False},
    {"tp": 1, "pp": 1, "llm": [4], "tied": False},  # data parallel
    {"tp": 1, "pp": 2, "llm": [2, 2], "tied": True},
    {"tp": 2, "pp": 1, "llm": [4], "tied": True},
]


def run_worker(processes: int, cases: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    worker = Path(__file__).with_name("parity_worker.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [*launch, worker, folder, json.dumps(cases)], capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(("processes", "cases"), [(1, ONE), (2, TWO)], ids=["one process", "two processes"])
def test_equals_transformers(processes: int, cases: list[dict[str, Any]], tmp_path: Path) -> None:
    results = run_worker(processes, cases, tmp_path)
    assert len(results) == len(cases)
    for result in results:
        assert result["dp"] == processes // (result["tp"] * result["pp"])
        assert result["grads"] >= 80, "every parameter is compared"
        assert result["sharded"] > 0, "sharded weights are marked, or the gradient norm is wrong under tensor parallel"
        assert result["logits"] < LOGITS, result
        assert result["loss"] < CURVE, result
        assert result["grad"] < GRADIENTS, result
        assert result["curve"] < CURVE, result
        assert result["norm"] < NORM, result
        assert result["exported"] < EXPORTED, result
        assert abs(result["first"] - result["last"]) > 100 * CURVE, "the curve moves, or comparing it proves nothing"
