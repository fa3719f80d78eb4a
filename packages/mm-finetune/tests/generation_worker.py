"""Started by torchrun: evaluates with the engine's model in several layouts, prints one JSON line for each.

Arguments: a folder with ``hf/``, ``held.json`` and ``train.json``, and cases as JSON, see ``DEFAULTS``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from layouts import answer

from mm_convert import Converter, Layout
from mm_finetune.config import DataConfig, ModelConfig, OptimizationConfig, OutputConfig, ParallelConfig, TrainConfig
from mm_finetune.engine.build import build_model
from mm_finetune.engine.parallel import model_parallel
from mm_finetune.engine.step import Trainer
from mm_finetune.engine.weights import Checkpoint
from mm_finetune.evaluation.during import Evaluator, held_out
from mm_finetune.report import eval_path
from mm_finetune.watching import RunLog

DEFAULTS: dict[str, Any] = {
    "tp": 1, "pp": 1, "llm": [[4]], "sp": False, "packed": False, "recompute": "none", "metric": "exact",
}  # fmt: skip
STEP = 7


def config_of(case: dict[str, Any], folder: Path, number: int) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(hf_dir=folder / "hf", load=folder / f"mm-{number}"),
        data=DataConfig(
            path=folder / "train.json", eval_path=folder / "held.json", eval_samples=0, dataset_dir=folder / "images",
            packing=case["packed"], cache_dir=folder / f"cache-{number}", seq_length=256,
        ),
        train=OptimizationConfig(
            steps=STEP, global_batch_size=4, micro_batch_size=2, eval_every=STEP, eval_max_new_tokens=4,
            recompute=case["recompute"], eval_metric=case["metric"],
        ),
        parallel=ParallelConfig(
            tp_size=case["tp"], pp_size=case["pp"], vpp_size=len(case["llm"]), sequence_parallel=case["sp"]
        ),
        output=OutputConfig(dir=folder / f"run-{number}"),
    )  # fmt: skip


def evaluated(case: dict[str, Any], folder: Path, number: int, device: torch.device) -> dict[str, Any]:
    from transformers import AutoConfig

    config = config_of(case, folder, number)
    if dist.get_rank() == 0:
        vit = [[0] * case["pp"] for _ in case["llm"]]
        vit[0][0] = 4
        layout = Layout(llm_pp_layers=case["llm"], vit_pp_layers=vit, tp_size=case["tp"])  # type: ignore[arg-type]
        Converter.named("Qwen2_5_VLConverter").hf_to_mm(folder / "hf", config.model.load, layout)
    dist.barrier()
    checkpoint = Checkpoint(config.model.load, config.model.hf_dir, config.parallel)
    hf_config = AutoConfig.from_pretrained(config.model.hf_dir)
    with model_parallel(config.parallel) as ranks:
        model = build_model(checkpoint, config, hf_config, ranks, device)
        trainer = Trainer(model, config.train, ranks)
        state = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
        before = {name: tensor.clone() for name, tensor in state.items()}
        modes, random = [module.training for module in model.modules()], torch.get_rng_state()
        log = RunLog(None, steps=STEP, samples=4)
        evaluator = Evaluator(held_out(config), config, trainer, device, log)
        early, score = evaluator.after(STEP - 1, trainer), evaluator.after(STEP, trainer)
        kept = all(torch.equal(before[name], state[name]) for name in before)
        kept = kept and modes == [m.training for m in model.modules()] and torch.equal(random, torch.get_rng_state())
        told: list[Any] = [None] * ranks.world_size
        dist.all_gather_object(told, (early, score, kept))
    return {"dp": ranks.dp_size, "file": str(eval_path(config.output.dir, STEP)), "told": told}


def main(given: dict[str, Any], folder: Path, device: torch.device) -> dict[str, Any]:
    return evaluated(DEFAULTS | given, folder, given["number"], device)


if __name__ == "__main__":
    answer(main)
