"""One optimizer step: every micro-batch forward and backward through the pipeline, then AdamW."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from mm_finetune.config import OptimizationConfig
from mm_finetune.data import Batch
from mm_finetune.engine.model import QwenVL
from mm_finetune.engine.parallel import Ranks


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step says of itself, the same on every rank.

    Attributes:
        loss: mean over the loss-carrying tokens of the whole global batch.
        grad_norm: norm of the gradient before clipping.
        tokens: tokens of the global batch, padding not counted.
    """

    loss: float
    grad_norm: float
    tokens: int


class Trainer:
    """A stage of the model with its optimizer.

    The loss is the mean over all tokens that carry loss in the global batch, whatever the number of
    micro-batches and ranks they are dealt to.

    Args:
        model: this process's stage, with its weights.
        config: optimizer settings.
        ranks: where this process stands.
    """

    def __init__(self, model: QwenVL, config: OptimizationConfig, ranks: Ranks) -> None:
        self.model = model
        self.ranks = ranks
        self.wrapped = DistributedDataParallel(
            config=model.config, ddp_config=DistributedDataParallelConfig(grad_reduce_in_fp32=True), module=model
        )
        self.optimizer = _optimizer(config, self.wrapped)
        model.config.finalize_model_grads_func = finalize_model_grads
        model.config.grad_scale_func = self.optimizer.scale_loss

    def step(self, batches: Sequence[Batch], lr: float) -> StepResult:
        """Train on the micro-batches of this data-parallel rank."""
        loss, tokens = self.accumulate(batches)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        _, grad_norm, _ = self.optimizer.step()
        return StepResult(loss=loss, grad_norm=float(grad_norm), tokens=tokens)

    def accumulate(self, batches: Sequence[Batch]) -> tuple[float, int]:
        """Forward and backward only: gradients stand in ``param.main_grad``; returns the loss and the tokens."""
        self.wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        results = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iter(batches),
            model=self.wrapped,
            num_microbatches=len(batches),
            seq_length=batches[0].input_ids.shape[1],
            micro_batch_size=batches[0].input_ids.shape[0],
            forward_only=False,
        )
        return self._totals(results, batches)

    def _totals(self, results: list[dict[str, Tensor]], batches: Sequence[Batch]) -> tuple[float, int]:
        """Loss per token and number of tokens, over data-parallel ranks; told to the stages that have no loss."""
        totals = torch.zeros(3, device=batches[0].input_ids.device)
        totals[2] = sum(batch.tokens for batch in batches)
        for result in results:
            totals[:2] += result["loss and tokens"]
        dist.all_reduce(totals, group=parallel_state.get_data_parallel_group())
        source = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(totals, src=source, group=parallel_state.get_pipeline_model_parallel_group())
        return float(totals[0] / totals[1]), int(totals[2])


def _optimizer(config: OptimizationConfig, wrapped: DistributedDataParallel) -> Any:
    settings = OptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_eps=config.adam_eps,
        clip_grad=config.clip_grad,
    )
    optimizer = get_megatron_optimizer(settings, [wrapped])
    for group in optimizer.param_groups:
        # Megatron only notes that norms and biases don't decay; its scheduler, not used here, would apply it.
        group["weight_decay"] = config.weight_decay * group["wd_mult"]
    return optimizer


def _forward_step(batches: Any, model: torch.nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
    batch: Batch = next(batches)
    return model(batch), partial(_loss, batch.loss_mask)


def _loss(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Summed loss and number of tokens; Megatron divides by the sum of the latter over the global batch."""
    total = (losses.float() * loss_mask).sum()
    tokens = loss_mask.sum()
    # Copied: the schedule scales what it is given in place.
    return total, tokens.int(), {"loss and tokens": torch.stack([total.detach(), tokens]).clone()}
