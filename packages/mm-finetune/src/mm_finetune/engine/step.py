"""One optimizer step: every micro-batch forward and backward through the pipeline, then AdamW."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
from mm_finetune.engine.micro_batches import loss_weights, padded, topped_up
from mm_finetune.engine.model import QwenVL
from mm_finetune.engine.parallel import Ranks


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step says of itself, the same on every rank.

    Attributes:
        loss: mean over the whole global batch; of what, ``train.loss`` says.
        grad_norm: norm of the gradient before clipping.
        tokens: tokens of the global batch, padding not counted.
        taken: whether the weights were changed.
    """

    loss: float
    grad_norm: float
    tokens: int
    taken: bool


class Trainer:
    """What this process holds of the model, with its optimizer.

    The loss is a mean over the whole global batch, whatever the number of micro-batches and ranks that
    its samples are dealt to.

    Args:
        model: this process's part, with its weights.
        config: optimizer settings.
        ranks: where this process stands.

    Attributes:
        wrapped: Megatron's wrapper of each chunk of the model, which sums gradients over data-parallel ranks.
    """

    def __init__(self, model: QwenVL, config: OptimizationConfig, ranks: Ranks) -> None:
        self.model = model
        self.config = config
        self.ranks = ranks
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
        model.config.finalize_model_grads_func = _finalize
        model.config.grad_scale_func = self.optimizer.scale_loss

    def step(
        self, batches: Sequence[Batch], lr: float, decide: Callable[[float, float], bool] = lambda loss, norm: True
    ) -> StepResult:
        """Train on the micro-batches of this data-parallel rank; another rank may have more or fewer.

        Args:
            batches: the micro-batches.
            lr: learning rate.
            decide: told the loss and the gradient norm, the same numbers on every rank; where it says no, weights and
                optimizer stay as they are.
        """
        loss, tokens = self.accumulate(batches)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        taken = decide(loss, grad_norm)
        if taken:
            self.optimizer.step()
        return StepResult(loss=loss, grad_norm=grad_norm, tokens=tokens, taken=taken)

    def accumulate(self, batches: Sequence[Batch]) -> tuple[float, int]:
        """Forward and backward only: gradients stand in ``param.main_grad``; returns the loss and the tokens."""
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        results = self.run(_forward_step, self._prepared(batches))
        return self._totals(results, batches)

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

    def _prepared(self, batches: Sequence[Batch]) -> list[Batch]:
        """Each with final weights in its ``loss_mask``: they sum to 1 over the global batch."""
        pairs = [loss_weights(batch, self.config.loss) for batch in batches]
        divisor = torch.stack([count for _, count in pairs]).sum()
        dist.all_reduce(divisor, group=parallel_state.get_data_parallel_group())
        weighed = [
            replace(batch, loss_mask=weights / divisor.clamp(min=1e-12))
            for batch, (weights, _) in zip(batches, pairs, strict=True)
        ]
        multiple = self.model.config.tensor_model_parallel_size if self.model.config.sequence_parallel else 1
        group = self.ranks.pp_size if self.ranks.vpp_size > 1 else 1
        return [padded(batch, multiple) for batch in topped_up(weighed, group)]

    def _totals(self, results: list[Tensor], batches: Sequence[Batch]) -> tuple[float, int]:
        """Loss and number of tokens, over data-parallel ranks; told to the stages that have no loss."""
        totals = torch.zeros(2, dtype=torch.float64, device=batches[0].input_ids.device)
        totals[0] = sum(results)
        totals[1] = sum(batch.tokens for batch in batches)
        dist.all_reduce(totals, group=parallel_state.get_data_parallel_group())
        source = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(totals, src=source, group=parallel_state.get_pipeline_model_parallel_group())
        return float(totals[0]), int(totals[1])


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
    optimizer = get_megatron_optimizer(settings, wrapped)
    for group in optimizer.param_groups:
        # Megatron only notes that norms and biases don't decay; its scheduler, not used here, would apply it.
        group["weight_decay"] = config.weight_decay * group["wd_mult"]
        for parameter in group["params"]:
            if not parameter.is_leaf:
                # A slice of a float32 weight, which the distributed optimizer gives a gradient by hand; torch warns of
                # that unless it is told that the gradient is meant.
                parameter.retain_grad()
    return optimizer


def _finalize(chunks: list[torch.nn.Module], _tokens: Tensor | None = None, **settings: Any) -> None:
    """Sum gradients over ranks. The division by tokens is in the loss already."""
    finalize_model_grads(chunks, None, **settings)


def _forward_step(batches: Any, model: torch.nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
    return model(next(batches)), _loss


def _loss(total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, a number of tokens for Megatron (not used), and what the step reports."""
    # Copied: the schedule scales what it is given in place.
    return total, torch.ones((), dtype=torch.int, device=total.device), total.detach().clone()
