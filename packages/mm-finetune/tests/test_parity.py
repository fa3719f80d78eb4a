"""qwen2_5_vl-mini on megatron-core against transformers, in float32.

Compared are logits, every gradient, ten AdamW steps, and the weights after export. A bound of 128 eps (eps = 6e-8)
leaves room for sums that are taken in another order; where nothing is cut, logits are bit-equal. It is a fiftieth of
what a mistake costs, or less: weight decay on norms and biases moved the curve by 8e-3 and the norm by 2e-2, weights
that are not marked as sharded the curve by 4e-4 and the norm by 0.3 (both were planted once, to see).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BOUND = (
    128 * 6e-8
)  # of logits, gradients and norm: relative to the largest; of the loss: absolute, at a loss of about 8
# Adam divides a gradient by its own size: where it is zero but for rounding (key biases), ten steps of 1e-3 differ.
EXPORTED = 5e-3

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
        assert result["grads"] >= 104, "every parameter is compared"
        # Rank 0 marks five weights of each of its layers as sharded, the embedding, and an output layer of its own.
        own_output = result["pp"] == 1 and not result["tied"]
        assert result["sharded"] == 5 * result["llm"][0] + 1 + own_output
        assert result["tokens"], "tokens are counted over the whole global batch"
        assert result["logits"] < BOUND, result
        assert result["loss"] < BOUND, result
        assert result["grad"] < BOUND, result
        assert result["curve"] < BOUND, result
        assert result["norm"] < BOUND, result
        assert result["exported"] < EXPORTED, result
        assert abs(result["first"] - result["last"]) > 100 * BOUND, "the curve moves, or comparing it proves nothing"
