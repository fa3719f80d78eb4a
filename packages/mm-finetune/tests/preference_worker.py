"""Started by torchrun: compares preference losses with the reference over several layouts, one JSON line each."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from layouts import answer
from parity_reference import OPTIMIZATION, hf_config
from parity_worker import grads_by_hf_name, made_checkpoint, relative
from preference_reference import LOSSES, PAIRS, STEPS, encoded, offsets, step_pairs

from mm_finetune.config import ParallelConfig
from mm_finetune.data import Batch, collate
from mm_finetune.engine.model import QwenVL
from mm_finetune.engine.parallel import model_parallel
from mm_finetune.engine.step import Trainer
from mm_finetune.engine.weights import Checkpoint
from mm_finetune.preference.objective import PreferenceObjective, pair_numbers, paired

DEFAULTS: dict[str, Any] = {
    "loss": "dpo", "tp": 1, "pp": 1, "llm": [[4]], "sp": False, "packed": False, "recompute": "none",
}  # fmt: skip
# Which of a step's pairs make a micro-batch, by data-parallel rank: not the same number of them.
SHARES: dict[int, list[list[tuple[int, ...]]]] = {
    1: [[(0, 1), (2,), (3,)]],
    2: [[(0,), (1,)], [(2, 3)]],
}
VALUES = ("reward_chosen", "reward_rejected", "reward_accuracy", "logp_chosen", "logp_rejected")


def batches(numbers: list[int], trainer: Trainer, packed: bool) -> list[Batch]:
    """This rank's micro-batches."""
    rows = SHARES[trainer.ranks.dp_size][trainer.ranks.dp_rank]
    return [collate([encoded(numbers[place]) for place in row], packed=packed) for row in rows]


def reference_difference(trainer: Trainer, truth: dict[str, Any], packed: bool) -> float:
    """Of the log-probabilities of all pairs: the largest, on the last stage."""
    if not trainer.ranks.last_stage:
        trainer.log_probabilities([collate([encoded(n) for n in range(PAIRS)], packed=packed)])
        return 0.0
    everything = [collate([encoded(n) for n in range(PAIRS)], packed=packed)]
    ours = paired(trainer.log_probabilities(everything))
    return float((ours - truth["reference"][list(pair_numbers(everything))]).abs().max())


def first_step(trainer: Trainer, checkpoint: Checkpoint, truth: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    config, expected = LOSSES[case["loss"]], truth[case["loss"]]
    trainer.objective = PreferenceObjective(config, None if config.reference_free else truth["reference"] + offsets())
    loss, _ = trainer.accumulate(batches(step_pairs(0), trainer, case["packed"]))
    ours = grads_by_hf_name(trainer, checkpoint)
    canonical = checkpoint.converter.family.canonical
    theirs = {canonical(name): gradient for name, gradient in expected["gradients"].items()}
    worst = max(theirs, key=lambda n: relative(ours[n], theirs[n]))
    return {
        "loss_error": abs(loss - expected["loss"]) / max(1.0, expected["loss"]),
        "grad": relative(ours[worst], theirs[worst]), "grad_name": worst,
        "grads": len(theirs),
    }  # fmt: skip


def curve(trainer: Trainer, truth: dict[str, Any], case: dict[str, Any]) -> dict[str, float]:
    config, expected = LOSSES[case["loss"]], truth[case["loss"]]
    trainer.objective = PreferenceObjective(config, None if config.reference_free else truth["reference"])
    kept = {"curve_loss": 0.0, "norm": 0.0, "values": 0.0}
    for step in range(STEPS[case["loss"]]):
        result = trainer.step(batches(step_pairs(step), trainer, case["packed"]), OPTIMIZATION.lr)
        rewards = expected["rewards"][step]
        # In the first step model and reference are one: which of two equal rewards is larger, rounding says.
        equal = step == 0 and not config.reference_free
        values = [(n, v) for n, v in zip(VALUES, rewards, strict=True) if not (equal and n == "reward_accuracy")]
        norm = expected["norms"][step]
        kept["curve_loss"] = max(kept["curve_loss"], abs(result.loss - expected["losses"][step]))
        kept["norm"] = max(kept["norm"], abs(result.grad_norm - norm) / norm)
        kept["values"] = max(kept["values"], *(abs(result.values[name] - value) for name, value in values))
        margin = result.values["reward_chosen"] - result.values["reward_rejected"]
        kept["values"] = max(kept["values"], abs(result.values["reward_margin"] - margin))
    return kept


def compare(case: dict[str, Any], reference: Path, folder: Path) -> dict[str, Any]:
    truth = torch.load(reference / "truth.pt", weights_only=True)
    parallel = ParallelConfig(
        tp_size=case["tp"], pp_size=case["pp"], vpp_size=len(case["llm"]), sequence_parallel=case["sp"]
    )
    checkpoint = made_checkpoint(case, reference, folder, parallel)
    train = replace(OPTIMIZATION, recompute=case["recompute"])
    with model_parallel(parallel, checkpoint.stages) as ranks:
        config = hf_config(json.loads((reference / "variant.json").read_text()))
        model = QwenVL(config, parallel, train, checkpoint.stages, ranks)
        checkpoint.load(model, ranks)
        trainer = Trainer(model, train, ranks)
        result: dict[str, Any] = case | {"dp": ranks.dp_size}
        far = torch.tensor(reference_difference(trainer, truth, case["packed"]))
        dist.all_reduce(far, dist.ReduceOp.MAX)
        return (
            result | {"logp": float(far)} | first_step(trainer, checkpoint, truth, case) | curve(trainer, truth, case)
        )


def main(given: dict[str, Any], folder: Path, _: torch.device) -> dict[str, Any]:
    return compare(DEFAULTS | given, folder, folder / str(given["number"]))


if __name__ == "__main__":
    answer(main)
