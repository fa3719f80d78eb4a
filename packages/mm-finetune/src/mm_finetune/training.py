"""A training run, from a checked configuration to a checkpoint."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_finetune.config import TrainConfig
from mm_finetune.data import Batch, Dataset, Encoder, Layout, Loader, LoaderSettings, Processes
from mm_finetune.errors import FinetuneError
from mm_finetune.launch import process_rank
from mm_finetune.planning.architecture import Architecture
from mm_finetune.planning.weights import Training
from mm_finetune.run_folder import ANOMALIES, BAD, CHECKPOINT, METRICS, check_folder, make_ready
from mm_finetune.schedule import learning_rate
from mm_finetune.watching import (
    Backward,
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

    from mm_finetune.checkpointing import Checkpoints, Resume, StopSignals
    from mm_finetune.data.faults import BadRecords
    from mm_finetune.engine.parallel import Ranks
    from mm_finetune.engine.step import Trainer
    from mm_finetune.engine.weights import Checkpoint


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """Inputs that were all checked, with the same outcome on every process; `resume` is where the run goes on."""

    config: TrainConfig
    dataset: Dataset
    held_out: Dataset | None = None
    checkpoint: Checkpoint
    resume: Resume | None = None

    @property
    def first_step(self) -> int:
        """The step that the run begins with."""
        return self.resume.step + 1 if self.resume else 1

    def marks(self) -> dict[str, Any]:
        """What a checkpoint says of its run, for the next one to compare."""
        from mm_finetune.checkpointing import data_marks, model_marks

        return {
            "config": self.config.as_dict(),
            "data": data_marks(self.dataset),
            "model": model_marks(self.checkpoint.sizes),
        }


def prepare(config: TrainConfig, *, world_size: int) -> PreparedRun:
    """Check everything that can be checked before the first step.

    Raises:
        FinetuneError: see :mod:`mm_finetune.errors`.
    """
    config.data_parallel_size(world_size)
    require_trackers(config.output.trackers)
    check_folder(config)
    dataset = Dataset(config.data, config.model.hf_dir, kind=_encoder(config))
    dataset.check(progress=process_rank()[0] == 0)
    config = config.resolved(len(dataset.index.usable))
    from mm_finetune.engine.build import check_patterns
    from mm_finetune.engine.weights import Checkpoint
    from mm_finetune.evaluation.during import held_out

    checkpoint = Checkpoint(config.model.load, config.model.hf_dir, config.parallel)
    check_patterns(checkpoint, config)
    held = held_out(config, progress=process_rank()[0] == 0)
    return _resumed(PreparedRun(config=config, dataset=dataset, held_out=held, checkpoint=checkpoint))


def _resumed(run: PreparedRun) -> PreparedRun:
    """The same run from its newest checkpoint on, where it is asked for and there is one."""
    from mm_finetune.checkpointing import compare, newest

    output = run.config.output
    found = newest(output.dir / CHECKPOINT) if output.resume else None
    if found is None:
        return run
    changes = compare(found, run.config, run.marks())
    if process_rank()[0] == 0:
        said = f"; from now on {', '.join(changes)}" if changes else ""
        sys.stdout.write(f"resumes after step {found.step} of {found.folder}{said}\n")
    return replace(run, resume=found)


def _encoder(config: TrainConfig) -> type[Encoder]:
    from mm_finetune.preference import PairEncoder

    return PairEncoder if config.preference else Encoder


def train(run: PreparedRun) -> Path:
    """Train and save.

    Returns:
        The folder of the checkpoint, to be read by ``mm-convert … mm_to_hf``.

    Raises:
        FinetuneError: see :mod:`mm_finetune.errors`; on every process alike, :class:`LostProcessError` excepted.
    """
    from mm_finetune.engine.parallel import processes

    with processes() as device:
        return train_on(device, run)


def train_on(device: torch.device, run: PreparedRun) -> Path:
    """The same, in processes that have joined already."""
    from transformers import AutoConfig

    from mm_finetune.checkpointing import StopSignals
    from mm_finetune.engine.build import build_model
    from mm_finetune.engine.device import mcore_on
    from mm_finetune.engine.parallel import model_parallel
    from mm_finetune.engine.step import Trainer
    from mm_finetune.evaluation.during import Evaluator
    from mm_finetune.preference.reference import preference_objective

    config, hf_config = run.config, AutoConfig.from_pretrained(run.config.model.hf_dir)
    with mcore_on(device), model_parallel(config.parallel, run.checkpoint.stages) as ranks:
        model = build_model(run.checkpoint, config, hf_config, ranks, device)
        trainer = Trainer(model, config.train, ranks)
        work = _Arithmetic.of(config, hf_config)
        anomalies = config.output.dir / ANOMALIES if ranks.rank == 0 else None
        guard = Guard(anomalies, policy=config.train.on_nan, spike_factor=config.train.spike_factor)
        with (
            StopSignals() as signals,
            closing(_start(run, ranks, device)) as log,
            closing(open_loader(run, ranks, device)) as loader,
        ):
            if config.preference:
                trainer.objective = preference_objective(config, run.checkpoint, loader, trainer, device)
            evaluator = Evaluator(run.held_out, config, trainer, device, log)
            checkpoints = _checkpoints(run, trainer, guard, loader.bad, signals)
            log.begin()
            with _ended_well(checkpoints):
                for step in range(run.first_step, config.train.steps + 1):
                    lr = _learning_rate(config, step)
                    with log.waiting():
                        data = loader.step(step, device)
                    result = trainer.step(data.batches, lr, guard.decide)
                    log.step(
                        step,
                        loss=result.loss,
                        lr=lr,
                        grad_norm=result.grad_norm,
                        tokens=result.tokens,
                        flops=work.a_token(data.batches) * result.tokens,
                        skipped=not result.taken,
                        more=result.values,
                    )
                    guard.settle(step, data.numbers)
                    checkpoints.after(step, evaluator.after(step, trainer))
    return config.output.dir / CHECKPOINT


def _checkpoints(
    run: PreparedRun, trainer: Trainer, guard: Guard, bad: BadRecords, signals: StopSignals
) -> Checkpoints:
    """The checkpoints of the run, and the run where its newest one left off."""
    from mm_finetune.checkpointing import Checkpoints, Run
    from mm_finetune.engine.lora import save_adapter

    config = run.config
    checkpoints = Checkpoints(
        Run(
            trainer=trainer,
            weights=run.checkpoint,
            guard=guard,
            bad=bad,
            steps=config.train.steps,
            marks=run.marks(),
            save_adapter=partial(save_adapter, trainer.model, trainer.ranks) if config.lora else None,
        ),
        config.output,
        signals,
    )
    if run.resume:
        checkpoints.resume(run.resume)
    return checkpoints


@contextmanager
def _ended_well(checkpoints: Checkpoints) -> Iterator[None]:
    """What ends the run on every process alike lets a checkpoint on its way arrive."""
    try:
        yield
    except FinetuneError:
        checkpoints.finish()
        raise


@dataclass(frozen=True, kw_only=True)
class _Arithmetic:
    """What the run's steps cost."""

    shape: ModelShape
    backward: Backward

    @classmethod
    def of(cls, config: TrainConfig, hf_config: Any) -> _Arithmetic:
        architecture = Architecture.read(config.model.hf_dir)
        backward = Backward.of(Training.of(config, architecture), architecture)
        return cls(shape=ModelShape.of(hf_config), backward=backward)

    def a_token(self, batches: Sequence[Batch]) -> float:
        """Floating point operations a token; those of this rank's tokens stand for all."""
        return step_flops(self.shape, Work.of(batches), self.backward) / max(1, sum(batch.tokens for batch in batches))


def _learning_rate(config: TrainConfig, step: int) -> float:
    train = config.train
    warmup = math.ceil(train.warmup_fraction * train.steps)
    return learning_rate(step, steps=train.steps, lr=train.lr, min_lr=train.min_lr, warmup_steps=warmup)


def open_loader(run: PreparedRun, ranks: Ranks, device: torch.device, *, report: bool = True) -> Loader:
    """This process's micro-batches; every process then holds rank 0's index, and knows of the same bad records.

    Args:
        run: the run.
        ranks: where this process stands.
        device: of the micro-batches.
        report: list bad records in the run's folder.
    """
    from megatron.core import parallel_state

    train = run.config.train
    group = parallel_state.get_tensor_model_parallel_group()
    exchange = Processes(device, needs_pixels=ranks.first_stage, group=group)
    run.dataset.adopt(exchange.once(lambda: run.dataset.index))
    settings = LoaderSettings(
        global_batch_size=train.global_batch_size,
        seed=train.seed,
        last_step=train.steps,
        layout=Layout(ranks=ranks.dp_size, micro_batch_size=train.micro_batch_size, room=run.config.room),
        rank=ranks.dp_rank,
    )
    bad = run.dataset.check(report=run.config.output.dir / BAD if report and ranks.rank == 0 else None)
    return Loader(run.dataset, settings, exchange=exchange, bad=bad)


def _start(run: PreparedRun, ranks: Ranks, device: torch.device) -> RunLog:
    config, folder, output = run.config, run.config.output.dir, run.config.output
    trackers: tuple[Tracker, ...] = ()
    if ranks.rank == 0:
        done = run.first_step - 1
        make_ready(config, done)
        settings = config.as_dict(folder)
        trackers = open_trackers(output.trackers, folder, project=output.project, settings=settings, done=done)
    peak = output.peak_tflops or device_peak_tflops(device)
    return RunLog(
        folder / METRICS if ranks.rank == 0 else None,
        steps=config.train.steps,
        samples=config.train.global_batch_size,
        done=run.first_step - 1,
        log_format=output.log_format,
        log_every=output.log_every,
        log_tps=output.log_tps,
        peak_flops=peak and peak * 1e12 * ranks.world_size,
        memory=lambda: memory_bytes(device),
        trackers=trackers,
    )
