"""qwen2_5_vl-mini on megatron-core against transformers, layout by layout.

Compared are logits, the loss, every gradient, AdamW steps, and the weights after export; the layouts run one after the
other in one set of processes. A bound of 128 eps (eps = 6e-8) leaves room for sums taken in another order. It is a
fiftieth of what a mistake costs, or less: weight decay on norms and biases moved the curve by 8e-3 and the norm by
2e-2, weights that are not marked as sharded the curve by 4e-4 and the norm by 0.3 (both were planted once, to see).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from layouts import ask, first
from parity_reference import write_reference

# Of logits, gradients and norm: relative to the largest; of the loss: absolute, at a loss of about 8.
BOUND = 128 * 6e-8
# Rounding grows from step to step. Absolute and over all steps.
CURVE = 1e-4
# Adam divides a gradient by its own size: where it is zero but for rounding (key biases), each step of 1e-3 differs.
EXPORTED = 5e-3
FEW, MANY = 2, 50

VARIANTS = {
    "plain": {"tied": False, "wide": False},
    "tied": {"tied": True, "wide": False},
    "wide": {"tied": False, "wide": True},  # more heads, for four ranks
}
ALL: list[dict[str, Any]] = [
    {"steps": MANY, "export": True},  # data parallel: one rank has no pictures
    {"packed": True, "dist_opt": False, "recompute": "full"},
    {"tp": 2, "pp": 2, "llm": [[0, 4]], "vit": [[2, 2]], "sp": True, "packed": True, "export": True},
    {"pp": 4, "llm": [[0, 1, 1, 2]], "vit": [[2, 2, 0, 0]], "variant": "tied", "export": True},
    {"pp": 2, "llm": [[0, 1], [2, 1]], "vit": [[1, 3], [0, 0]], "packed": True, "export": True},
    {"tp": 2, "dtype": "bf16", "sp": True, "packed": True},
    {"tp": 4, "variant": "wide", "sp": True},
    {"tp": 2, "frozen": "tower", "sp": True, "recompute": "full"},
    {"pp": 2, "llm": [[0, 4]], "vit": [[2, 2]], "frozen": "tower", "recompute": "full"},
    {"pp": 2, "llm": [[0, 4]], "vit": [[2, 2]], "frozen": "behind", "recompute": "full"},
    {"tp": 2, "vit_tp": 1, "pp": 2, "llm": [[1, 3]], "sp": True},
    {"pp": 4, "llm": [[1, 1, 1, 1]], "recompute": "full"},
    {"pp": 2, "llm": [[1, 1], [1, 1]], "packed": True, "export": True},
    {"pp": 2, "llm": [[0, 4]], "vit": [[4, 0]], "variant": "tied", "export": True},
    {"tp": 2, "packed": True, "recompute": "selective", "mean": "sample"},
    {"tp": 2, "variant": "tied", "sp": True, "recompute": "full"},
    {"pp": 2, "llm": [[2, 2]], "variant": "tied", "packed": True, "mean": "sample"},
    {"pp": 2, "dtype": "bf16", "llm": [[1, 3]]},
]
FOUR = first(ALL, 6)


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each variant of the model, see :func:`parity_reference.write_reference`."""
    folder = tmp_path_factory.mktemp("references")
    for name in {case.get("variant", "plain") for case in FOUR}:
        variant = VARIANTS[name]
        (folder / name).mkdir()
        write_reference(folder / name, variant, kept=(FEW, MANY) if name == "plain" else (FEW,))
    return folder


# 12 a language layer, final norm, output layer; 12 a vision layer, 6 of merger and patches, the embedding. Behind the
# first stage: two vision layers and the patches are left.
GRADIENTS = {"": 103, "tower": 4 * 12 + 2, "behind": 2 * 12 + 1}


def sharded(result: dict[str, Any]) -> int:
    """Weights that rank 0 must mark as cut: 5 of a language layer, 6 of a vision layer, 3 of the merger, both ends."""
    vit = result["vit"]
    last = max((row, place) for row, counts in enumerate(vit) for place, count in enumerate(counts) if count)
    tower = 0 if result["vit_tp"] == 1 else 6 * sum(row[0] for row in vit) + 3 * (last[1] == 0)
    own_output = result["pp"] == 1 and result["variant"] != "tied"
    ends = (result["llm"][0][0] > 0) + own_output
    decoder: int = 5 * sum(row[0] for row in result["llm"])
    return decoder + int(ends) + int(tower)


def check(result: dict[str, Any], processes: int) -> None:
    assert result["dp"] == processes // (result["tp"] * result["pp"])
    assert result["grads"] >= GRADIENTS[result["frozen"]], "every parameter that trains is compared"
    assert result["tokens"], "tokens are counted over the whole global batch"
    assert result["sharded"] == sharded(result)
    if result["dtype"] == "bf16":
        check_bf16(result)
        return
    for name in ("logits", "loss", "grad"):
        assert result[name] < BOUND, (name, result)
    if result["mean"] == "token" and not result["frozen"]:
        long = result["steps"] == MANY
        assert result["curve_loss"] < (CURVE if long else BOUND), result
        assert result["norm"] < (CURVE if long else BOUND), result
    if result["export"]:
        assert result["exported"] < EXPORTED, result


def check_bf16(result: dict[str, Any]) -> None:
    """Against float32: no worse than what bfloat16 makes of transformers itself, by more than a factor of 2."""
    for name in ("loss", "curve_loss"):
        assert result[name] < max(1e-3, 2 * result["bf16_loss"]), (name, result)
    assert result["grad"] < 2 * result["bf16_grad"], result
    assert result["norm"] < 5e-3, result


def test_equals_transformers(references: Path) -> None:
    results = ask("parity_worker.py", 4, references, FOUR)
    for result in results:
        check(result, 4)
