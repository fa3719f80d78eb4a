"""Losses of pairs on megatron-core against transformers and the published formulas, layout by layout.

Compared are the reference model's log-probabilities, the loss, every gradient (at margins that are not 0), and AdamW
steps with all that they report. Bounds as in ``test_parity``, but for gradients twice that: those of two answers to one
question partly cancel, their rounding does not. Log-probabilities are sums of about 20.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from layouts import ask
from preference_reference import STEPS, write_reference

pytestmark = pytest.mark.long

BOUND = 128 * 6e-8
CURVE = 1e-4

TWO: list[dict[str, Any]] = [
    {},  # data parallel, one rank with more micro-batches than the other
    {"tp": 2, "sp": True, "packed": True},
    {"pp": 2, "llm": [[1, 3]], "packed": True, "loss": "smooth"},
    {"pp": 2, "llm": [[1, 1], [1, 1]], "loss": "ipo"},
    {"tp": 2, "loss": "hinge", "recompute": "full"},
    {"packed": True, "loss": "free"},
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preference")
    write_reference(folder, {"tied": False, "wide": False})
    return folder


def test_pairs_equal_the_formulas(reference: Path) -> None:
    results = ask("preference_worker.py", 2, reference, TWO)
    for result in results:
        assert result["dp"] == 2 // (result["tp"] * result["pp"])
        assert result["grads"] >= 103, "every parameter is compared"
        assert result["logp"] < 20 * BOUND, result
        assert result["loss_error"] < BOUND, result
        assert result["grad"] < 2 * BOUND, result
        for name in ("curve_loss", "norm", "values"):
            assert result[name] < CURVE, (name, result)
    assert max(STEPS[result["loss"]] for result in results) == 20
