"""What a step minimises, told as the weight of each token's loss.

The engine knows one thing: the sum over tokens of weight times cross entropy. Any loss that depends on the model only
through log-probabilities of tokens has the gradient of such a sum, with weights that are known after a forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from mm_finetune.data import Batch
from mm_finetune.engine.micro_batches import loss_weights

LogProbabilities = Callable[[Sequence[Batch]], list[Tensor]]
"""For each micro-batch ``[sequences]``: see :meth:`mm_finetune.engine.step.Trainer.log_probabilities`."""

LOSS = "loss"


@dataclass(frozen=True, kw_only=True)
class Weighed:
    """Micro-batches ready to run.

    Attributes:
        batches: with final weights in their ``loss_mask``; a weight may be negative.
        values: what the step reports, by name; summed over data-parallel ranks, and taken from the stage that computes
            the loss. :data:`LOSS` takes the place of the weighted sum of the tokens' losses.
    """

    batches: list[Batch]
    values: Mapping[str, float] = field(default_factory=dict)


class Objective(Protocol):
    """What a step minimises."""

    def weigh(self, batches: Sequence[Batch], log_probabilities: LogProbabilities) -> Weighed:
        """Give the tokens of this data-parallel rank their weights; every process calls it at the same place.

        Args:
            batches: their ``loss_mask`` weighs tokens as the data has it.
            log_probabilities: the model as it is, run forward; a collective call.
        """


@dataclass(frozen=True)
class CrossEntropy:
    """The mean over the global batch: of its tokens (``token``), or of its samples' own means (``sample``)."""

    mean: Literal["token", "sample"] = "token"

    def weigh(self, batches: Sequence[Batch], log_probabilities: LogProbabilities) -> Weighed:
        """Weights that sum to 1 over the global batch."""
        pairs = [loss_weights(batch, self.mean) for batch in batches]
        divisor = summed(torch.stack([count for _, count in pairs]).sum()).clamp(min=1e-12)
        weighed = [
            replace(batch, loss_mask=weights / divisor) for batch, (weights, _) in zip(batches, pairs, strict=True)
        ]
        return Weighed(batches=weighed)


def summed(value: Tensor) -> Tensor:
    """Over data-parallel ranks, in place."""
    dist.all_reduce(value, group=parallel_state.get_data_parallel_group())
    return value
