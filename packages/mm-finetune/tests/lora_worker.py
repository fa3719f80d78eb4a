"""Started by torchrun: adapters and learning rates over several layouts, one JSON line for each case.

A case is a dictionary, see ``DEFAULTS``. Its reference is a folder with ``hf/``, ``variant.json``, ``truth.pt`` and for
adapters ``adapter/``. All cases run in one set of processes.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from layouts import answer
from parity_reference import OPTIMIZATION, hf_config, micro_batches
from parity_worker import completed_gradients, grads_by_hf_name, made_checkpoint, main_grad, our_logits, relative, share
from torch import Tensor

from mm_finetune.config import DataConfig, LoraConfig, ModelConfig, OutputConfig, ParallelConfig, TrainConfig
from mm_finetune.engine.adapters import Adapter, by_kind
from mm_finetune.engine.build import build_model
from mm_finetune.engine.lora import save_adapter
from mm_finetune.engine.parallel import model_parallel
from mm_finetune.engine.step import Trainer
from mm_finetune.engine.weights import Checkpoint

DEFAULTS: dict[str, Any] = {
    "reference": "", "tp": 1, "pp": 1, "llm": [[4]], "vit": None, "vit_tp": 0, "sp": False, "dist_opt": True,
    "packed": False,
    "recompute": "none", "dtype": "fp32", "steps": 3, "freeze": [], "lr_scale": {}, "lora": None,
    "load": True, "adapter": "adapter", "only_gradients": False,
}  # fmt: skip


def run_config(case: dict[str, Any], reference: Path, folder: Path) -> TrainConfig:
    train = dataclasses.replace(
        OPTIMIZATION, distributed_optimizer=case["dist_opt"], recompute=case["recompute"], dtype=case["dtype"],
        freeze=tuple(case["freeze"]), lr_scale=case["lr_scale"],
    )  # fmt: skip
    lora = None
    if case["lora"] is not None:
        load = reference / case["adapter"] if case["load"] else None
        patterns = {key: tuple(case["lora"].get(key, ())) for key in ("target_modules", "modules_to_save")}
        lora = LoraConfig(**case["lora"] | patterns | {"load": load})
    parallel = ParallelConfig(
        tp_size=case["tp"], pp_size=case["pp"], vpp_size=len(case["llm"]), sequence_parallel=case["sp"]
    )
    return TrainConfig(
        model=ModelConfig(hf_dir=reference / "hf", load=folder / "mm"), data=DataConfig(path=folder / "none"),
        train=train, lora=lora, parallel=parallel, output=OutputConfig(dir=folder / "run"),
    )  # fmt: skip


def all_gradients(trainer: Trainer, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Of adapters by published layer and half, of layers that are trained in full by the weights' published names."""
    canonical = checkpoint.converter.family.canonical
    in_full = {canonical(name): gradient for name, gradient in grads_by_hf_name(trainer, checkpoint).items()}
    return adapter_gradients(trainer) | in_full


def adapter_gradients(trainer: Trainer) -> dict[str, Tensor]:
    """By published layer and half, joined over tensor-parallel ranks; those that every rank has must be the same."""
    completed_gradients(trainer)
    mine = [
        (
            f"{module.name}.{half}",
            module.axes.get(half),
            module.group.rank(),
            module.heads,
            main_grad(parameter).clone(),
        )
        for module in trainer.model.modules()
        if isinstance(module, Adapter)
        for half, parameter in module.named_parameters()
        if parameter.requires_grad
    ]
    gathered: list[Any] = [None] * trainer.ranks.world_size
    dist.all_gather_object(gathered, mine)
    parts: dict[str, dict[int, Tensor]] = {}
    axes: dict[str, int | None] = {}
    kinds: dict[str, int] = {}
    for name, axis, rank, heads, gradient in (entry for held in gathered for entry in held):
        axes[name], kinds[name] = axis, heads if name.endswith("lora_B") else 0
        parts.setdefault(name, {}).setdefault(rank, gradient)
    for name, held in parts.items():
        assert axes[name] is not None or all(torch.equal(held[0], other) for other in held.values()), name
    joined = {
        name: held[0] if axes[name] is None else torch.cat([held[rank] for rank in sorted(held)], axes[name] or 0)
        for name, held in parts.items()
    }
    return {name: by_kind(gradient, kinds[name]) for name, gradient in joined.items()}


def compare(case: dict[str, Any], reference: Path, folder: Path) -> dict[str, Any]:
    config = run_config(case, reference, folder)
    checkpoint = made_checkpoint(case, reference, folder, config.parallel)
    hf = hf_config(json.loads((reference / "variant.json").read_text()))
    with model_parallel(config.parallel, checkpoint.stages) as ranks:
        model = build_model(checkpoint, config, hf, ranks, torch.device("cpu"))
        if config.lora is not None:
            save_adapter(model, ranks, folder / "begun")
        trainer = Trainer(model, config.train, ranks)
        result: dict[str, Any] = case | {"dp": ranks.dp_size}
        if case["lora"] is None:
            return result | rates(trainer, checkpoint, case, reference)
        return result | adapters(trainer, checkpoint, case, reference, folder)


def rates(trainer: Trainer, checkpoint: Checkpoint, case: dict[str, Any], reference: Path) -> dict[str, Any]:
    """Train; then the weights are put where the gradients are, to be joined like them."""
    truth = torch.load(reference / "truth.pt", weights_only=True)
    result = curve(trainer, truth, case)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            main_grad(parameter).copy_(parameter.detach())
    ours = grads_by_hf_name(trainer, checkpoint)
    canonical = checkpoint.converter.family.canonical
    before = {canonical(name): t for name, t in truth["before"].items()}
    theirs = {canonical(name): t for name, t in truth["trained"].items()}
    # Queries see no change of what is added to all keys: Adam makes steps of that gradient's rounding.
    kept = {name for name in ours if not name.endswith("k_proj.bias")}
    changes = {n: float((ours[n] - theirs[n]).norm() / (theirs[n] - before[n]).norm()) for n in kept}
    worst = max(changes, key=lambda name: changes[name])
    still = sorted(name for name in before if torch.equal(before[name], theirs[name]))
    return result | {"change": changes[worst], "name": worst, "trained": len(ours), "still": len(still)}


def adapters(
    trainer: Trainer, checkpoint: Checkpoint, case: dict[str, Any], reference: Path, folder: Path
) -> dict[str, Any]:
    batches = share(micro_batches(0, packed=case["packed"]), trainer.ranks)
    if case["only_gradients"]:
        loss, _ = trainer.accumulate(batches)
        gradients = adapter_gradients(trainer)
        if trainer.ranks.rank == 0:
            torch.save(gradients, folder / "gradients.pt")
        norm = trainer.step(batches, OPTIMIZATION.lr).grad_norm
        return {"value": loss, "after": trainer.accumulate(batches)[0], "norm": norm}
    truth = torch.load(reference / "truth.pt", weights_only=True)
    result: dict[str, Any] = {"logits": relative(our_logits(trainer, micro_batches(0)[1]), truth["logits"])}
    loss, _ = trainer.accumulate(batches)
    result["loss"] = abs(loss - truth["loss"])
    ours, theirs = all_gradients(trainer, checkpoint), truth["gradients"]
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())
    worst = max(ours, key=lambda name: relative(ours[name], theirs[name]))
    result |= {"grad": relative(ours[worst], theirs[worst]), "name": worst, "grads": len(ours)}
    result |= curve(trainer, truth, case)
    save_adapter(trainer.model, trainer.ranks, folder / "adapter")
    trained = our_logits(trainer, micro_batches(0)[1])
    if trainer.ranks.rank == 0:
        torch.save(trained, folder / "logits.pt")
    return result


def curve(trainer: Trainer, truth: dict[str, Any], case: dict[str, Any]) -> dict[str, float]:
    kept = {"curve_loss": 0.0, "norm": 0.0}
    for step in range(case["steps"]):
        batches = share(micro_batches(step, packed=case["packed"]), trainer.ranks)
        ours, norm = trainer.step(batches, OPTIMIZATION.lr), truth["norms"][step]
        kept["curve_loss"] = max(kept["curve_loss"], abs(ours.loss - truth["losses"][step]))
        kept["norm"] = max(kept["norm"], abs(ours.grad_norm - norm) / norm)
    return kept


def main(given: dict[str, Any], folder: Path, _: torch.device) -> dict[str, Any]:
    case = DEFAULTS | given
    return compare(case, folder / case["reference"], folder / str(case["number"]))


if __name__ == "__main__":
    answer(main)
