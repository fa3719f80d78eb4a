"""Started by torchrun: what training really allocates, case by case, beside what the plan says; one JSON line a rank.

A case is a dictionary, see ``DEFAULTS``. All cases run in one set of processes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from layouts import answer
from parity_reference import Vocabulary
from torch import Tensor

from mm_convert import Converter
from mm_convert import Layout as MegatronLayout
from mm_finetune.config import (
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimizationConfig,
    OutputConfig,
    ParallelConfig,
    TrainConfig,
)
from mm_finetune.data import Batch
from mm_finetune.engine.build import build_model
from mm_finetune.engine.parallel import model_parallel
from mm_finetune.engine.step import Trainer
from mm_finetune.engine.weights import Checkpoint
from mm_finetune.families import family_of
from mm_finetune.mini.model import model_config
from mm_finetune.planning.activations import KERNELS
from mm_finetune.planning.architecture import Architecture
from mm_finetune.planning.load import Load
from mm_finetune.planning.memory import LayerLists, Layout, predict
from mm_finetune.planning.weights import Training
from mm_finetune.trial import storage_bytes, while_measured

DEFAULTS: dict[str, Any] = {
    "family": "qwen2_5_vl", "middle": True, "tied": False, "tp": 1, "pp": 1, "llm": [[4]], "vit": None, "vit_tp": 0,
    "sp": False, "dist_opt": True, "dtype": "bf16", "recompute": "none", "packed": True, "freeze": [], "lora": None,
    "saved": [], "dropout": 0.0, "micro_batches": 2, "rows": 1, "length": 512, "grids": [[1, 16, 16], [1, 16, 24]],
}  # fmt: skip


def model_configuration(case: dict[str, Any]) -> Any:
    config = model_config(Vocabulary(), family=case["family"])
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = case["tied"]
    if case["middle"]:
        text, vision = config.text_config, config.vision_config
        text.hidden_size, text.intermediate_size, text.vocab_size = 256, 704, 2048
        text.rope_parameters["mrope_section"] = [8, 12, 12]
        if case["family"] == "qwen2_5_vl":
            vision.hidden_size, vision.intermediate_size, vision.out_hidden_size = 128, 352, 256
        else:
            vision.embed_dim, vision.hidden_size = 128, 256
    return config


def configuration(case: dict[str, Any], folder: Path) -> TrainConfig:
    lora = None
    if case["lora"]:
        targets, saved = tuple(case["lora"]), tuple(case["saved"])
        lora = LoraConfig(r=4, dropout=case["dropout"], target_modules=targets, modules_to_save=saved)
    return TrainConfig(
        model=ModelConfig(hf_dir=folder / "hf", load=folder / "mm"),
        data=DataConfig(path=folder / "none.json"),
        train=OptimizationConfig(
            steps=1, global_batch_size=8, dtype=case["dtype"], recompute=case["recompute"],
            freeze=tuple(case["freeze"]), distributed_optimizer=case["dist_opt"],
        ),
        lora=lora,
        parallel=ParallelConfig(
            tp_size=case["tp"], pp_size=case["pp"], vpp_size=len(case["llm"]), sequence_parallel=case["sp"]
        ),
        output=OutputConfig(dir=folder / "run"),
    )  # fmt: skip


def vision_layers(case: dict[str, Any]) -> LayerLists:
    """Of each stage; where the case says nothing, all are on the first."""
    whole = [[0] * case["pp"] for _ in case["llm"]]
    whole[0][0] = 4
    return tuple(map(tuple, case["vit"] or whole))


def make_checkpoint(case: dict[str, Any], folder: Path) -> None:
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(model_configuration(case)).float().save_pretrained(folder / "hf")
    layout = MegatronLayout(
        llm_pp_layers=case["llm"], vit_pp_layers=vision_layers(case), tp_size=case["tp"], vit_tp_size=case["vit_tp"]
    )
    Converter.named(family_of(case["family"]).converter).hf_to_mm(folder / "hf", folder / "mm", layout)


def batch(case: dict[str, Any], config: Any) -> Batch:
    """All tokens carry loss; the pictures stand at the beginning of the first row."""
    rows, length, grids = case["rows"], case["length"], torch.tensor(case["grids"]).view(-1, 3)
    patches = int(grids.prod(1).sum())
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 1000, (rows, length), generator=generator)
    ids[0, : patches // 4] = config.image_token_id
    place = torch.arange(length).expand(3, rows, length).contiguous()
    third = length // 3
    return Batch(
        input_ids=ids, labels=ids.clamp(max=999), loss_mask=torch.ones(rows, length), position_ids=place,
        pixel_values=torch.randn(patches, 1176, generator=generator) if patches else None,
        image_grid_thw=grids if patches else None, tokens=rows * length,
        cu_seqlens=torch.tensor([0, third, length]).int() if case["packed"] else None,
    )  # fmt: skip


def load_of(case: dict[str, Any]) -> Load:
    patches = sum(t * h * w for t, h, w in case["grids"])
    return Load(
        rows=case["rows"], length=case["length"], loss_tokens=case["rows"] * case["length"], patches=patches,
        micro_batches=case["micro_batches"], pieces=case["packed"],
    )  # fmt: skip


def optimizer_bytes(trainer: Trainer) -> tuple[int, int]:
    """Of what the optimizer keeps after a step beside the model: its own weights, and both moments."""
    owned = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
    buffers = [buffer.param_data for chunk in trainer.wrapped for buffer in chunk.buffers]
    owned |= {data.untyped_storage().data_ptr() for data in buffers if data is not None}
    mains = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    mains = [p for p in mains if p.untyped_storage().data_ptr() not in owned]
    moments = [
        value
        for one in getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])
        if one.optimizer is not None
        for state in one.optimizer.state.values()
        for name, value in state.items()
        if name != "step"
    ]
    return storage_bytes(mains), storage_bytes(moments)


def saved_by(run: Any, known: set[int]) -> int:
    """Bytes of the storages that autograd keeps, each counted once, weights not."""
    seen: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in known:
            seen.setdefault(place, tensor)  # held, so that no other storage takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


def measure(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    if dist.get_rank() == 0:
        make_checkpoint(case, folder)
    dist.barrier()
    run = configuration(case, folder)
    hf_config = model_configuration(case)
    checkpoint = Checkpoint(folder / "mm", folder / "hf", run.parallel)
    with model_parallel(run.parallel, checkpoint.stages) as ranks:
        model = build_model(checkpoint, run, hf_config, ranks, torch.device("cpu"))
        trainer = Trainer(model, run.train, ranks)
        batches = [batch(case, hf_config) for _ in range(case["micro_batches"])]
        trainer.accumulate(batches)  # what torch keeps for ever from a first call
        result: dict[str, Any] = {"stage": ranks.pp_rank, "dp_rank": ranks.dp_rank, "tp_rank": ranks.tp_rank}
        result["weights"] = storage_bytes(list(model.parameters()))
        result["gradients"] = sum(b.grad_data.nbytes for c in trainer.wrapped for b in c.buffers)
        # Threads of gloo and autograd let go of what they hold a little later, now more, now less: the least of some.
        peaks = [while_measured(lambda: trainer.accumulate(batches), torch.device("cpu"))[1] for _ in range(5)]
        result["peak"] = min(peaks)
        if case["pp"] == 1 and case["micro_batches"] == 1:
            known = {p.untyped_storage().data_ptr() for p in model.parameters()}
            known |= {t.untyped_storage().data_ptr() for t in vars(batches[0]).values() if isinstance(t, Tensor)}
            result["saved"] = saved_by(lambda: trainer.accumulate(batches), known)
        trainer.step(batches, 1e-4)
        result["main"], result["moments"] = optimizer_bytes(trainer)
        result["trained"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        architecture = Architecture.read(folder / "hf")
        layout = Layout(
            tp_size=case["tp"], sequence_parallel=case["sp"], llm_pp_layers=tuple(map(tuple, case["llm"])),
            vit_pp_layers=vision_layers(case), vit_tp_size=case["vit_tp"], dp_size=ranks.dp_size,
        )  # fmt: skip
        training, load = Training.of(run, architecture), load_of(case)
        result["planned"] = vars(predict(architecture, training, layout, load, KERNELS["cpu"])[ranks.pp_rank])
        return result


def main(given: dict[str, Any], folder: Path, _: torch.device) -> list[Any]:
    """What each process found."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, measure(DEFAULTS | given, folder / str(given["number"])))
    return gathered


if __name__ == "__main__":
    answer(main)
