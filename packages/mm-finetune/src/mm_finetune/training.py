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
from mm_finetune.config_checks import not_there_yet
from mm_finetune.data import Dataset, Layout, Loader, LoaderSettings, Processes
from mm_finetune.errors import ConfigError, OutputExistsError
from mm_finetune.launch import process_rank
from mm_finetune.schedule import learning_rate
from mm_finetune.watching import (
    Guard,
    ModelShape,
    RunLog,
    Tracker,
    Work,
    device_peak_tflops,
    memory_bytes,
    open_trackers,
    require_trackers,
    step_flops,
)

if TYPE_CHECKING:
    import torch

    from mm_finetune.engine.model import QwenVL
    from mm_finetune.engine.parallel import Ranks
    from mm_finetune.engine.weights import Checkpoint

# What a run writes into its folder, and all that a new run takes away from it.
CONFIG, METRICS, ANOMALIES, BAD, CHECKPOINT = (
    "config.yaml",
    "metrics.jsonl",
    "anomalies.jsonl",
    "bad.jsonl",
    "checkpoint",
)


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
    if faults := not_there_yet(config):
        raise ConfigError("; ".join(faults))
    require_trackers(config.output.trackers)
    _check_output(config)
    dataset = Dataset(config.data, config.model.hf_dir)
    dataset.check(progress=process_rank()[0] == 0)
    config = config.resolved(len(dataset.index.usable))
    from mm_finetune.engine.weights import Checkpoint

    checkpoint = Checkpoint(config.model.load, config.model.hf_dir, config.parallel)
    return PreparedRun(config=config, dataset=dataset, checkpoint=checkpoint)


def train(run: PreparedRun) -> Path:
    """Train and save.

    Returns:
        The folder of the checkpoint, to be read by ``mm-convert … mm_to_hf``.
    """
    from transformers import AutoConfig

    from mm_finetune.engine.build import build_model
    from mm_finetune.engine.device import mcore_on
    from mm_finetune.engine.parallel import model_parallel, processes
    from mm_finetune.engine.step import Trainer

    config, hf_config = run.config, AutoConfig.from_pretrained(run.config.model.hf_dir)
    with processes() as device, mcore_on(device), model_parallel(config.parallel) as ranks:
        model = build_model(run.checkpoint, config, hf_config, ranks, device)
        trainer = Trainer(model, config.train, ranks)
        shape = ModelShape.of(hf_config)
        anomalies = config.output.dir / ANOMALIES if ranks.rank == 0 else None
        guard = Guard(anomalies, policy=config.train.on_nan, spike_factor=config.train.spike_factor)
        with closing(_start(config, ranks, device)) as log, closing(_loader(run, ranks, device)) as loader:
            for step in range(1, config.train.steps + 1):
                lr = _learning_rate(config, step)
                with log.waiting():
                    data = loader.step(step, device)
                flops = step_flops(shape, Work.of(data.batches)) / max(1, sum(batch.tokens for batch in data.batches))
                result = trainer.step(data.batches, lr, guard.decide)
                log.step(
                    step,
                    loss=result.loss,
                    lr=lr,
                    grad_norm=result.grad_norm,
                    tokens=result.tokens,
                    # Those of this rank's tokens stand for all.
                    flops=flops * result.tokens,
                    skipped=not result.taken,
                )
                guard.settle(step, data.numbers)
                if step == config.train.steps or (config.output.save_every and step % config.output.save_every == 0):
                    _save(run, model, ranks, step)
    return config.output.dir / CHECKPOINT


def _save(run: PreparedRun, model: QwenVL, ranks: Ranks, step: int) -> None:
    """Save the weights; older ones go when the new ones are whole."""
    target, keep = run.config.output.dir / CHECKPOINT, run.config.output.keep_last
    run.checkpoint.save(model, ranks, target, step)
    if keep and ranks.rank == 0:
        for old in sorted(target.glob("iter_*"))[:-keep]:
            shutil.rmtree(old)


def _learning_rate(config: TrainConfig, step: int) -> float:
    train = config.train
    warmup = math.ceil(train.warmup_fraction * train.steps)
    return learning_rate(step, steps=train.steps, lr=train.lr, min_lr=train.min_lr, warmup_steps=warmup)


def _loader(run: PreparedRun, ranks: Ranks, device: torch.device) -> Loader:
    """This process's micro-batches; every process then holds rank 0's index, and knows of the same bad records."""
    from megatron.core import parallel_state

    train, data = run.config.train, run.config.data
    group = parallel_state.get_tensor_model_parallel_group()
    exchange = Processes(device, needs_pixels=ranks.first_stage, group=group)
    run.dataset.adopt(exchange.once(lambda: run.dataset.index))
    room = (data.pack_length or data.seq_length) if data.packing else None
    settings = LoaderSettings(
        global_batch_size=train.global_batch_size,
        seed=train.seed,
        last_step=train.steps,
        layout=Layout(ranks=ranks.dp_size, micro_batch_size=train.micro_batch_size, room=room),
        rank=ranks.dp_rank,
    )
    bad = run.dataset.check(report=run.config.output.dir / BAD if ranks.rank == 0 else None)
    return Loader(run.dataset, settings, exchange=exchange, bad=bad)


def _check_output(config: TrainConfig) -> None:
    """A finished run is kept unless told otherwise, a folder of somebody else always; an interrupted run may go."""
    folder = config.output.dir
    if not folder.exists():
        return
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / CONFIG).is_file()):
        raise OutputExistsError(f"{folder} is there and is no folder of a run; choose another output.dir")
    if (folder / CHECKPOINT / TRACKER).exists() and not config.output.overwrite:
        raise OutputExistsError(
            f"{folder} holds a run with a checkpoint; choose another output.dir or add output.overwrite=true"
        )


def _start(config: TrainConfig, ranks: Ranks, device: torch.device) -> RunLog:
    folder, output = config.output.dir, config.output
    trackers: tuple[Tracker, ...] = ()
    if ranks.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder / CHECKPOINT, ignore_errors=True)
        (folder / ANOMALIES).unlink(missing_ok=True)
        (folder / BAD).unlink(missing_ok=True)
        (folder / CONFIG).write_text(config.as_yaml(folder), encoding="utf-8")
        trackers = open_trackers(output.trackers, folder, project=output.project, settings=config.as_dict(folder))
    peak = output.peak_tflops or device_peak_tflops(device)
    return RunLog(
        folder / METRICS if ranks.rank == 0 else None,
        steps=config.train.steps,
        samples=config.train.global_batch_size,
        log_format=output.log_format,
        log_every=output.log_every,
        log_tps=output.log_tps,
        peak_flops=peak and peak * 1e12 * ranks.world_size,
        memory=lambda: memory_bytes(device),
        trackers=trackers,
    )
