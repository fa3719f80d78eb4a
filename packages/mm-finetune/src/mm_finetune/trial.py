"""One global batch through everything without training: what ``mm-finetune check`` does before it tells of it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_finetune.config import TrainConfig
from mm_finetune.planning.activations import KERNELS
from mm_finetune.planning.architecture import Architecture
from mm_finetune.planning.load import Load
from mm_finetune.planning.memory import Layout, StageMemory, predict
from mm_finetune.planning.weights import Training
from mm_finetune.training import PreparedRun, open_loader, prepare

if TYPE_CHECKING:
    import torch

    from mm_finetune.data import Batch
    from mm_finetune.engine.parallel import Ranks
    from mm_finetune.engine.step import Trainer


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Bytes of one process.

    Attributes:
        stage: of the pipeline.
        passes: most that the forward and backward passes took on top of what was there.
        planned: what the plan says for the same micro-batches.
    """

    stage: int
    weights: int
    gradients: int
    passes: int
    planned: StageMemory


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What came of it, the same on every process.

    Attributes:
        loss: of the first global batch.
        tokens: of it.
        values: what else the objective says of it, by name.
        seconds: that its forward and backward passes took, the first ones of the process.
        memory: of the fullest process of each stage.
        layout: of the run.
    """

    loss: float
    tokens: int
    seconds: float
    memory: tuple[Measured, ...]
    layout: Layout
    values: Mapping[str, float] = field(default_factory=dict)


def prepared(config: TrainConfig, *, world_size: int) -> PreparedRun:
    """The run with every check of its inputs, but for its folder, which nothing is written into.

    Raises:
        FinetuneError: see :mod:`mm_finetune.errors`.
    """
    nowhere = Path(os.devnull) / "check"
    output = replace(config.output, dir=nowhere, resume=False, trackers=())
    return prepare(replace(config, output=output), world_size=world_size)


def try_out(run: PreparedRun) -> Trial:
    """Build the model, run the first global batch forwards and backwards, and leave the weights as they are.

    The reference of a run with ``preference`` is worked out for this batch alone, and not kept.
    """
    from transformers import AutoConfig

    from mm_finetune.engine.build import build_model
    from mm_finetune.engine.device import mcore_on
    from mm_finetune.engine.parallel import model_parallel, processes
    from mm_finetune.engine.step import Trainer
    from mm_finetune.preference.reference import objective_at_start

    config, hf_config = run.config, AutoConfig.from_pretrained(run.config.model.hf_dir)
    with processes() as device, mcore_on(device), model_parallel(config.parallel, run.checkpoint.stages) as ranks:
        model = build_model(run.checkpoint, config, hf_config, ranks, device)
        trainer = Trainer(model, config.train, ranks)
        with closing(open_loader(run, ranks, device, report=False)) as loader:
            batches = loader.step(1, device).batches
        if config.preference:
            trainer.objective = objective_at_start(config.preference, batches, trainer, len(run.dataset))
        began = time.perf_counter()
        (loss, tokens), passes = while_measured(lambda: trainer.accumulate(batches), device)
        seconds = time.perf_counter() - began
        layout = Layout(
            tp_size=config.parallel.tp_size,
            sequence_parallel=config.parallel.sequence_parallel and config.parallel.tp_size > 1,
            llm_pp_layers=run.checkpoint.layout.llm_pp_layers,
            vit_pp_layers=run.checkpoint.layout.vit_pp_layers,
            vit_tp_size=run.checkpoint.layout.tp("vit"),
            dp_size=ranks.dp_size,
        )
        mine = _measured(run, trainer, batches, layout, passes, device)
        memory = _fullest(mine, ranks)
    return Trial(loss=loss, tokens=tokens, seconds=seconds, memory=memory, layout=layout, values=trainer.values)


def while_measured(run: Callable[[], Any], device: torch.device) -> tuple[Any, int]:
    """What `run` gives, and the most bytes that were allocated meanwhile on top of what was there before.

    On an accelerator torch's allocator counts; on a CPU torch's profiler does.
    """
    import torch

    memory = torch.get_device_module(device)
    if hasattr(memory, "reset_peak_memory_stats"):
        before = int(memory.memory_allocated(device))
        memory.reset_peak_memory_stats(device)
        result = run()
        return result, int(memory.max_memory_allocated(device)) - before
    # The profiler's library talks on standard error.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = run()
    recorded: Any = profiled.profiler
    changes = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for change in sorted(changes, key=lambda event: int(event.start_ns())):
        held += change.nbytes()
        most = max(most, held)
    return result, most


def load_of(batches: Sequence[Batch]) -> Load:
    """The load of a step of one process: of each kind its largest micro-batch."""
    rows, length = max((tuple(batch.input_ids.shape) for batch in batches), key=lambda shape: shape[0] * shape[1])
    patches = [_patches(batch) for batch in batches]
    return Load(
        rows=rows,
        length=length,
        loss_tokens=max(int(batch.loss_mask.count_nonzero()) for batch in batches),
        patches=max(patches),
        micro_batches=len(batches),
        step_tokens=sum(batch.input_ids.numel() for batch in batches),
        step_patches=sum(patches),
        pieces=any(batch.cu_seqlens is not None for batch in batches),
    )


def _patches(batch: Batch) -> int:
    grids = (batch.image_grid_thw, batch.video_grid_thw)
    return sum(int(grid.prod(dim=1).sum()) for grid in grids if grid is not None)


def _measured(
    run: PreparedRun, trainer: Trainer, batches: Sequence[Batch], layout: Layout, passes: int, device: torch.device
) -> Measured:
    architecture = Architecture.read(run.config.model.hf_dir)
    training = Training.of(run.config, architecture)
    kernels = KERNELS.get(device.type, KERNELS["cuda"])
    stage = trainer.ranks.pp_rank
    return Measured(
        stage=stage,
        weights=storage_bytes(trainer.model.parameters()),
        gradients=sum(buffer.grad_data.nbytes for chunk in trainer.wrapped for buffer in chunk.buffers),
        passes=passes,
        planned=predict(architecture, training, layout, load_of(batches), kernels)[stage],
    )


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Of what tensors lie in, each counted once."""
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    return sum(held.values())


def _fullest(mine: Measured, ranks: Ranks) -> tuple[Measured, ...]:
    """Of each stage the process that took most."""
    import torch.distributed as dist

    gathered: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(gathered, mine)
    found: list[Measured] = gathered
    return tuple(
        max((one for one in found if one.stage == stage), key=lambda one: one.passes) for stage in range(ranks.pp_size)
    )
