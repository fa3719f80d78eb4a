"""Started by torchrun: compares megatron-core with the reference over several layouts, prints one JSON line each.

A case is a dictionary, see ``DEFAULTS``. All cases run in one set of processes.
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from layouts import answer
from parity_reference import MICRO_BATCHES, OPTIMIZATION, hf_config, micro_batches
from torch import Tensor

from mm_finetune.config import ParallelConfig
from mm_finetune.data import Batch
from mm_finetune.engine.micro_batches import padded
from mm_finetune.engine.model import QwenVL
from mm_finetune.engine.parallel import Ranks, model_parallel
from mm_finetune.engine.step import Trainer
from mm_finetune.engine.weights import Checkpoint, section_name
from mm_finetune.families import family_of, model_class

DEFAULTS: dict[str, Any] = {
    "variant": "plain", "tp": 1, "pp": 1, "llm": [[4]], "vit": None, "vit_tp": 0, "sp": False, "dist_opt": True,
    "packed": False,
    "recompute": "none", "dtype": "fp32", "mean": "token", "steps": 2, "export": False,
    "frozen": "",
}  # fmt: skip
# How many micro-batches the data-parallel ranks get: not the same number, where there are two.
SHARES = {1: (4,), 2: (3, 1), 4: (1, 1, 1, 1)}


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest value of the tensor."""
    return float((ours.double() - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12))


def main_grad(parameter: Any) -> Tensor:
    gradient: Tensor = parameter.main_grad
    return gradient


def completed_gradients(trainer: Trainer) -> None:
    """With the distributed optimizer each data-parallel rank has the sum of its own slice alone: give it the others."""
    if not trainer.config.distributed_optimizer:
        return
    for chunk in trainer.wrapped:
        for bucket in (bucket for buffer in chunk.buffers for bucket in buffer.buckets):
            mine = bucket.grad_data.chunk(trainer.ranks.dp_size)[trainer.ranks.dp_rank].clone()
            dist.all_gather_into_tensor(bucket.grad_data, mine, group=chunk.dp_group)


def grads_by_hf_name(trainer: Trainer, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Every gradient of every rank, joined under the Hugging Face names."""
    completed_gradients(trainer)
    ranks = trainer.ranks
    file = f"{checkpoint.layout.rank_dir(ranks.tp_rank, ranks.pp_rank)}/model_optim_rng.pt"
    mine = {
        (file, section_name(ranks, number)): {
            name: main_grad(p).clone() for name, p in chunk.named_parameters() if p.requires_grad
        }
        for number, chunk in enumerate(trainer.model)
    }
    gathered: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(gathered, mine)
    held: dict[Any, Any] = {}
    for part in gathered:
        held |= part
    joined = {}
    for ref in checkpoint.hf.tensors:
        name = checkpoint.converter.family.canonical(ref.name)
        segments = checkpoint.plan.writes[ref]
        if segments[0].source.name in held[segments[0].source.file, segments[0].source.section]:
            pieces = [
                held[s.source.file, s.source.section][s.source.name].narrow(s.dim, s.source_start, s.length)
                for s in segments
            ]
            joined[name] = torch.cat(pieces, segments[0].dim)
    return joined


def our_logits(trainer: Trainer, batch: Batch) -> Tensor:
    """Logits of one micro-batch through the pipeline, joined over tensor-parallel ranks, told to everyone."""

    def forward_step(iterator: Any, model: Any) -> Any:
        return model(next(iterator), logits=True), lambda out, non_loss_data=False: out

    ranks, tokens = trainer.ranks, batch.input_ids.shape[1]
    several = [padded(batch, trainer.model.config.tensor_model_parallel_size)] * (ranks.pp_size * ranks.vpp_size)
    data = trainer.run(forward_step, several, forward_only=True, collect_non_loss_data=True)
    gathered: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(
        gathered, (ranks.tp_rank, data[0].detach()) if ranks.last_stage and ranks.dp_rank == 0 else None
    )
    parts = [part for _, part in sorted((g for g in gathered if g), key=lambda g: g[0])]
    return torch.cat(parts, dim=-1)[:, :tokens]


def converter_of(reference: Path) -> Any:
    from mm_convert import Converter

    model_type = json.loads((reference / "hf/config.json").read_text())["model_type"]
    return Converter.named(family_of(model_type).converter)


def tower_layers(case: dict[str, Any]) -> Any:
    """Where a case does not say, the tower stands whole on the first stage."""
    rows = range(len(case["llm"]))
    return case.get("vit") or [[4 * (row == place == 0) for place in range(case["pp"])] for row in rows]


def made_checkpoint(case: dict[str, Any], reference: Path, folder: Path, parallel: ParallelConfig) -> Checkpoint:
    from mm_convert import Layout

    if dist.get_rank() == 0:
        layout = Layout(
            llm_pp_layers=case["llm"],
            vit_pp_layers=tower_layers(case),
            tp_size=case["tp"],
            vit_tp_size=case.get("vit_tp", 0),
        )
        converter_of(reference).hf_to_mm(reference / "hf", folder / "mm", layout)
    dist.barrier()
    return Checkpoint(folder / "mm", reference / "hf", parallel)


def share(batches: list[Batch], ranks: Ranks) -> list[Batch]:
    ends = list(accumulate(SHARES[ranks.dp_size], initial=0))
    assert ends[-1] == len(MICRO_BATCHES)
    return batches[ends[ranks.dp_rank] : ends[ranks.dp_rank + 1]]


def compare(case: dict[str, Any], reference: Path, folder: Path) -> dict[str, Any]:
    truth = torch.load(reference / "truth.pt", weights_only=True)
    parallel = ParallelConfig(
        tp_size=case["tp"], pp_size=case["pp"], vpp_size=len(case["llm"]), sequence_parallel=case["sp"]
    )
    checkpoint = made_checkpoint(case, reference, folder, parallel)
    train = replace(
        OPTIMIZATION, distributed_optimizer=case["dist_opt"], recompute=case["recompute"], dtype=case["dtype"],
        loss=case["mean"],
    )  # fmt: skip
    with model_parallel(parallel, checkpoint.stages) as ranks:
        config = hf_config(json.loads((reference / "variant.json").read_text()))
        model = QwenVL(config, parallel, train, checkpoint.stages, ranks)
        checkpoint.load(model, ranks)
        freeze(model, case["frozen"])
        trainer = Trainer(model, train, ranks)
        marked = [p for p in model.parameters() if getattr(p, "tensor_model_parallel", False)]
        result: dict[str, Any] = case | {"dp": ranks.dp_size, "sharded": len(marked)}
        result["logits"] = relative(our_logits(trainer, micro_batches(0)[1]), truth["logits"])
        result |= first_step(trainer, checkpoint, truth, case)
        result |= curve(trainer, truth, case)
        if case["export"]:
            checkpoint.save(model, ranks, folder / "out", case["steps"])
            if ranks.rank == 0:
                result["exported"] = export_difference(folder, reference, truth, case["steps"])
    return result


def freeze(model: QwenVL, frozen: str) -> None:
    """``tower``: with the embedding: what comes into the first language layer then needs no gradient of its own.
    ``behind``: all but the first stage, for which the others must still run backwards.
    """
    for chunk in model:
        for name, parameter in chunk.named_parameters():
            tower = name.startswith("image_encoder.") or ".embedding." in name
            if (frozen == "tower" and tower) or (frozen == "behind" and chunk.stage):
                parameter.requires_grad_(False)


def first_step(trainer: Trainer, checkpoint: Checkpoint, truth: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    batches = micro_batches(0, packed=case["packed"])
    loss, tokens = trainer.accumulate(share(batches, trainer.ranks))
    expected, gradients = truth[case["mean"]]
    canonical = checkpoint.converter.family.canonical
    ours = grads_by_hf_name(trainer, checkpoint)
    theirs = {canonical(name): gradient for name, gradient in gradients.items() if canonical(name) in ours}
    worst = max(theirs, key=lambda n: relative(ours[n], theirs[n]))
    rounded = {canonical(name): gradient for name, gradient in truth["bf16"][1].items()}
    return {
        "bf16_grad": max(relative(rounded[n], theirs[n]) for n in theirs),
        "bf16_loss": abs(truth["bf16"][0] - expected),
        "loss": abs(loss - expected), "tokens": tokens == sum(batch.tokens for batch in batches),
        "grad": relative(ours[worst], theirs[worst]), "grad_name": worst, "grads": len(theirs),
    }  # fmt: skip


def curve(trainer: Trainer, truth: dict[str, Any], case: dict[str, Any]) -> dict[str, float]:
    kept = {"curve_loss": 0.0, "norm": 0.0}
    for step in range(case["steps"]):
        batches = micro_batches(step, packed=case["packed"])
        ours = trainer.step(share(batches, trainer.ranks), OPTIMIZATION.lr)
        norm = truth["norms"][step]
        kept["curve_loss"] = max(kept["curve_loss"], abs(ours.loss - truth["losses"][step]))
        kept["norm"] = max(kept["norm"], abs(ours.grad_norm - norm) / norm)
    return kept


def export_difference(folder: Path, reference: Path, truth: dict[str, Any], steps: int) -> float:
    """Save → mm_to_hf → transformers: largest relative difference to the reference's trained weights."""
    converter_of(reference).mm_to_hf(folder / "out", reference / "hf", folder / "tuned")
    model, info = model_class(reference / "hf").from_pretrained(folder / "tuned", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys")), info
    return max(relative(p.detach(), truth["trained"][steps][n]) for n, p in model.named_parameters())


def main(given: dict[str, Any], folder: Path, _: torch.device) -> dict[str, Any]:
    case = DEFAULTS | given
    return compare(case | {"vit": tower_layers(case)}, folder / case["variant"], folder / str(case["number"]))


if __name__ == "__main__":
    answer(main)
