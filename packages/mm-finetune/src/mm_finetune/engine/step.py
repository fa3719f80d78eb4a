"""One optimizer step: every micro-batch forward and backward through the pipeline, then AdamW."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import (
    OptimizerConfig,
    ParamKey,
    ParamPredicate,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from mm_finetune.config import OptimizationConfig
from mm_finetune.data import Batch
from mm_finetune.engine.micro_batches import padded, sequence_sums, topped_up
from mm_finetune.engine.model import QwenVL
from mm_finetune.engine.objective import LOSS, CrossEntropy, Objective
from mm_finetune.engine.parallel import Ranks

FUSED_ADAMW = frozenset({"cpu", "cuda"})
"""Devices on which torch's own AdamW has a kernel of one pass."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step says of itself, the same on every rank.

    Attributes:
        loss: of the whole global batch, as the objective has it.
        grad_norm: norm of the gradient before clipping.
        tokens: tokens of the global batch, padding not counted.
        taken: whether the weights were changed.
        values: what else the objective says of the step.
    """

    loss: float
    grad_norm: float
    tokens: int
    taken: bool
    values: Mapping[str, float] = field(default_factory=dict)


class Trainer:
    """What this process holds of the model, with its optimizer.

    The loss is a mean over the whole global batch, whatever the number of micro-batches and ranks that
    its samples are dealt to.

    Args:
        model: this process's part, with its weights.
        config: optimizer settings.
        ranks: where this process stands.

    Attributes:
        objective: what a step minimises; at first the mean cross entropy that ``train.loss`` asks for.
        values: what else it said of the last step.
        wrapped: Megatron's wrapper of each chunk of the model, which sums gradients over data-parallel ranks.
    """

    def __init__(self, model: QwenVL, config: OptimizationConfig, ranks: Ranks) -> None:
        self.model = model
        self.config = config
        self.ranks = ranks
        self.objective: Objective = CrossEntropy(config.loss)
        self.values: dict[str, float] = {}
        # Gradients are summed after the last micro-batch, not meanwhile: a batch without pictures leaves the
        # vision tower's gradients unready on one rank, and the others would wait.
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=config.distributed_optimizer
        )
        self.wrapped = [
            DistributedDataParallel(
                config=model.config, ddp_config=settings, module=chunk, disable_bucketing=number > 0
            )
            for number, chunk in enumerate(model)
        ]  # fmt: skip
        self.optimizer = _optimizer(config, self.wrapped, model.config.params_dtype)
        _tell_what_learns_below(model)
        model.config.finalize_model_grads_func = _finalize
        model.config.grad_scale_func = self.optimizer.scale_loss

    def step(
        self, batches: Sequence[Batch], lr: float, decide: Callable[[float, float], bool] = lambda loss, norm: True
    ) -> StepResult:
        """Train on the micro-batches of this data-parallel rank; another rank may have more or fewer.

        Args:
            batches: the micro-batches.
            lr: learning rate; each weight's is that times its ``lr_mult``.
            decide: told the loss and the gradient norm, the same numbers on every rank; where it says no, weights and
                optimizer stay as they are.
        """
        loss, tokens = self.accumulate(batches)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_mult"]
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        taken = decide(loss, grad_norm)
        if taken:
            self.optimizer.step()
        return StepResult(loss=loss, grad_norm=grad_norm, tokens=tokens, taken=taken, values=self.values)

    def accumulate(self, batches: Sequence[Batch]) -> tuple[float, int]:
        """Forward and backward only: gradients stand in ``param.main_grad``; returns the loss and the tokens."""
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        weighed = self.objective.weigh(batches, self.log_probabilities)
        results = self.run(_forward_step, self.laid(weighed.batches))
        return self._totals(results, batches, weighed.values)

    def log_probabilities(self, batches: Sequence[Batch]) -> list[Tensor]:
        """For each micro-batch ``[sequences]`` float64: the sum over the tokens that carry loss, without gradients.

        Every process of a pipeline calls it; on stages that compute no loss all are 0.
        """
        with torch.no_grad():
            found = self.run(_losses_step, self.laid(batches), forward_only=True, collect_non_loss_data=True)
        losses = found[: len(batches)] if self.ranks.last_stage else [torch.zeros_like(b.loss_mask) for b in batches]
        return [
            -sequence_sums(batch, each[:, : batch.input_ids.shape[1]].double())
            for batch, each in zip(batches, losses, strict=True)
        ]

    def run(self, forward_step: Callable[..., Any], batches: Sequence[Batch], **settings: Any) -> list[Any]:
        """Megatron's schedule over micro-batches; `settings` are those of ``forward_backward_func``."""
        iterators = [iter(batches) for _ in self.wrapped]
        several = len(self.wrapped) > 1
        usual: dict[str, Any] = {"forward_only": False}
        results: list[Any] = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if several else iterators[0],
            model=self.wrapped if several else self.wrapped[0],
            num_microbatches=len(batches),
            # What the stages send one another says its size itself.
            seq_length=batches[0].input_ids.shape[1],
            micro_batch_size=batches[0].input_ids.shape[0],
            **usual | settings,
        )
        return results

    def laid(self, batches: Sequence[Batch]) -> list[Batch]:
        """In the sizes and the number that the layout asks for."""
        multiple = self.model.config.tensor_model_parallel_size if self.model.config.sequence_parallel else 1
        group = self.ranks.pp_size if self.ranks.vpp_size > 1 else 1
        return [padded(batch, multiple) for batch in topped_up(batches, group)]

    def _totals(
        self, results: list[Tensor], batches: Sequence[Batch], values: Mapping[str, float]
    ) -> tuple[float, int]:
        """Loss and number of tokens, over data-parallel ranks; told to the stages that have no loss."""
        totals = torch.zeros(2 + len(values), dtype=torch.float64, device=batches[0].input_ids.device)
        totals[0] = sum(results)
        totals[1] = sum(batch.tokens for batch in batches)
        totals[2:] = torch.tensor(list(values.values()))
        dist.all_reduce(totals, group=parallel_state.get_data_parallel_group())
        source = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(totals, src=source, group=parallel_state.get_pipeline_model_parallel_group())
        loss, tokens, *others = totals.tolist()
        self.values = dict(zip(values, others, strict=True))
        return self.values.pop(LOSS, loss), int(tokens)


def _tell_what_learns_below(model: QwenVL) -> None:
    """Of the stages that pass pictures on: whether anything before them trains; all stages must call."""
    mine = {chunk.stage: any(p.requires_grad for p in chunk.parameters()) for chunk in model}
    group = parallel_state.get_pipeline_model_parallel_group()
    told: list[dict[int, bool]] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(told, mine, group=group)
    learns = {stage: any_trains for one in told for stage, any_trains in one.items()}
    for chunk in model:
        chunk.learns_below = any(learns[stage] for stage in range(chunk.stage))


def _optimizer(config: OptimizationConfig, wrapped: list[DistributedDataParallel], dtype: torch.dtype) -> Any:
    settings = OptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_eps=config.adam_eps,
        clip_grad=config.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=config.distributed_optimizer,
    )
    overrides = get_standard_config_overrides(settings) | _rates(wrapped)
    optimizer = get_megatron_optimizer(settings, wrapped, overrides)
    for group in optimizer.param_groups:
        # Megatron only notes that norms and biases don't decay; its scheduler, not used here, would apply it.
        group["weight_decay"] = config.weight_decay * group["wd_mult"]
        if "fused" in group:  # torch's AdamW, not that of Transformer Engine or Apex
            group["fused"] = all(parameter.device.type in FUSED_ADAMW for parameter in group["params"])
        for parameter in group["params"]:
            if not parameter.is_leaf:
                # A slice of a float32 weight, which the distributed optimizer gives a gradient by hand; torch warns of
                # that unless it is told that the gradient is meant.
                parameter.retain_grad()
    return optimizer


def _rates(wrapped: list[DistributedDataParallel]) -> dict[ParamKey, Any]:
    """A group for each factor of the learning rate; Megatron tells the groups of a checkpoint apart by it."""
    found = {getattr(parameter, "lr_mult", 1.0) for chunk in wrapped for parameter in chunk.parameters()}

    def key(rate: float) -> ParamKey:
        same = ParamPredicate(name=f"lr_mult {rate}", fn=lambda parameter: getattr(parameter, "lr_mult", 1.0) == rate)
        return ParamKey(predicate=same)

    return {key(rate): {"lr_mult": rate} for rate in found - {1.0}}


def _finalize(chunks: list[torch.nn.Module], _tokens: Tensor | None = None, **settings: Any) -> None:
    """Sum gradients over ranks. The division by tokens is in the loss already."""
    finalize_model_grads(chunks, None, **settings)


def _forward_step(batches: Any, model: torch.nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
    return model(next(batches)), _loss


def _losses_step(batches: Any, model: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
    return model(next(batches), each_token=True), lambda losses, non_loss_data: losses


def _loss(total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, a number of tokens for Megatron (not used), and what the step reports."""
    # Copied: the schedule scales what it is given in place.
    return total, torch.ones((), dtype=torch.int, device=total.device), total.detach().clone()
