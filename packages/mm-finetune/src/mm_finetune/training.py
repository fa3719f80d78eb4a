"""A training run, from a checked configuration to a checkpoint."""

from __future__ import annotations

import math
import shutil
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mm_convert.megatron import TRACKER
from mm_finetune.config import TrainConfig
from mm_finetune.data import Batch, Dataset, collate, step_numbers
from mm_finetune.errors import OutputExistsError
from mm_finetune.progress import RunLog
from mm_finetune.schedule import learning_rate

if TYPE_CHECKING:
    import torch

    from mm_finetune.engine.parallel import Ranks
    from mm_finetune.engine.weights import Checkpoint

# What a run writes into its folder, and all that a new run takes away from it.
CONFIG, METRICS, CHECKPOINT = "config.yaml", "metrics.jsonl", "checkpoint"


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """Inputs that were all checked, with the same outcome on every process."""

    config: TrainConfig
    dataset: Dataset
    checkpoint: Checkpoint


def prepare(config: TrainConfig, *, world_size: int) -> PreparedRun:
    """Check everything that can be checked before the first step.

    Raises:
        FinetuneError: see :mod:`mm_finetune.errors`.
    """
    config.data_parallel_size(world_size)
    _check_output(config)
    dataset = Dataset(config.data, config.model.hf_dir)
    dataset.check()
    from mm_finetune.engine.weights import Checkpoint

    checkpoint = Checkpoint(config.model.load, config.model.hf_dir, config.parallel)
    return PreparedRun(config=config, dataset=dataset, checkpoint=checkpoint)


def train(run: PreparedRun) -> Path:
    """Train and save.

    Returns:
        The folder of the checkpoint, to be read by ``mm-convert … mm_to_hf``.
    """
    from transformers import AutoConfig

    from mm_finetune.engine.device import mcore_on
    from mm_finetune.engine.model import QwenVL
    from mm_finetune.engine.parallel import model_parallel, processes, transformer_config
    from mm_finetune.engine.step import Trainer

    config, hf_config = run.config, AutoConfig.from_pretrained(run.config.model.hf_dir)
    with processes() as device, mcore_on(device), model_parallel(config.parallel) as ranks:
        settings = transformer_config(hf_config.text_config, config.parallel, run.checkpoint.layout.llm_pp_layers[0])
        model = QwenVL(settings, hf_config, ranks)
        run.checkpoint.load(model, ranks)
        model.to(device)
        trainer = Trainer(model, config.train, ranks)
        with closing(_start(config, ranks)) as log:
            for step in range(1, config.train.steps + 1):
                lr = _learning_rate(config, step)
                result = trainer.step(_batches(run, step, ranks, device), lr)
                log.step(step, loss=result.loss, lr=lr, grad_norm=result.grad_norm, tokens=result.tokens)
        target = config.output.dir / CHECKPOINT
        run.checkpoint.save(model, ranks, target, config.train.steps)
    return target


def _learning_rate(config: TrainConfig, step: int) -> float:
    train = config.train
    warmup = math.ceil(train.warmup_fraction * train.steps)
    return learning_rate(step, steps=train.steps, lr=train.lr, min_lr=train.min_lr, warmup_steps=warmup)


def _batches(run: PreparedRun, step: int, ranks: Ranks, device: torch.device) -> list[Batch]:
    """This data-parallel rank's micro-batches of a step."""
    train = run.config.train
    numbers = step_numbers(len(run.dataset), step, global_batch_size=train.global_batch_size, seed=train.seed)
    size = train.micro_batch_size
    micro = [numbers[i : i + size] for i in range(0, len(numbers), size)]
    share = len(micro) // ranks.dp_size
    mine = micro[ranks.dp_rank * share : (ranks.dp_rank + 1) * share]
    return [collate([run.dataset[n] for n in group]).to(device) for group in mine]


def _check_output(config: TrainConfig) -> None:
    """A finished run is kept unless told otherwise, a folder of somebody else always; an interrupted run may go."""
    folder = config.output.dir
    if not folder.exists():
        return
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / CONFIG).is_file()):
        raise OutputExistsError(f"{folder} is there and is no folder of a run; choose another output.dir")
    if (folder / CHECKPOINT / TRACKER).exists() and not config.output.overwrite:
        raise OutputExistsError(
            f"{folder} holds a finished run; choose another output.dir or add output.overwrite=true"
        )


def _start(config: TrainConfig, ranks: Ranks) -> RunLog:
    import yaml

    log_path = None
    if ranks.rank == 0:
        folder = config.output.dir
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder / CHECKPOINT, ignore_errors=True)
        text = yaml.safe_dump(config.as_dict(), sort_keys=False, allow_unicode=True)
        (folder / CONFIG).write_text(text, encoding="utf-8")
        log_path = folder / METRICS
    return RunLog(log_path, steps=config.train.steps, samples=config.train.global_batch_size)
