"""A loss of pairs as weights of tokens.

The loss depends on the model through the log-probability of each answer, a sum over its tokens. So its gradient is that
of the tokens' losses, each weighed by the derivative of the pair's loss by the log-probability of its answer: two
numbers a pair, known after a forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mm_finetune.config import PreferenceConfig
from mm_finetune.data import Batch
from mm_finetune.engine.micro_batches import sequence_numbers, sequence_sums
from mm_finetune.engine.objective import LOSS, LogProbabilities, Weighed, summed
from mm_finetune.preference.losses import Pairs, gradient


@dataclass(frozen=True)
class PreferenceObjective:
    """The mean over the pairs of the global batch.

    Args:
        config: which loss.
        reference_R2: ``[records, 2]`` float64: log-probabilities of the reference model, NaN where a record could not
            be read; None: there is no reference model.
    """

    config: PreferenceConfig
    reference_R2: Tensor | None

    def weigh(self, batches: Sequence[Batch], log_probabilities: LogProbabilities) -> Weighed:
        """Run the model forward, and weigh the answers' tokens; a pair without loss counts for nothing."""
        carries = [(batch.loss_mask != 0).double() for batch in batches]
        tokens_P2 = paired([sequence_sums(batch, each) for batch, each in zip(batches, carries, strict=True)])
        reference_P2 = self._reference(batches, tokens_P2)
        counts_P = (tokens_P2 > 0).all(dim=1) & reference_P2.isfinite().all(dim=1)
        share_P = counts_P / summed(counts_P.sum().double()).clamp(min=1)
        pairs = Pairs(
            policy_P2=paired(log_probabilities(batches)),
            reference_P2=reference_P2.where(counts_P[:, None], 0.0),
            tokens_P2=tokens_P2.clamp(min=1),
        )
        loss_P, slopes_P2 = gradient(pairs, self.config)
        # More loss of a token is less log-probability.
        weights = (-slopes_P2 * share_P[:, None]).flatten()
        return Weighed(batches=_weighed(batches, carries, weights), values=self._values(pairs, loss_P, share_P))

    def _reference(self, batches: Sequence[Batch], like_P2: Tensor) -> Tensor:
        if self.reference_R2 is None:
            return torch.zeros_like(like_P2)
        return self.reference_R2[list(pair_numbers(batches))].to(like_P2.device)

    def _values(self, pairs: Pairs, loss_P: Tensor, share_P: Tensor) -> dict[str, float]:
        rewards_P2 = self.config.beta * pairs.rewards_P2
        margin_P = rewards_P2[:, 0] - rewards_P2[:, 1]
        values = {
            LOSS: loss_P,
            "reward_margin": margin_P,
            "reward_accuracy": (margin_P > 0).double(),
            "reward_chosen": rewards_P2[:, 0],
            "reward_rejected": rewards_P2[:, 1],
            "logp_chosen": pairs.policy_P2[:, 0],
            "logp_rejected": pairs.policy_P2[:, 1],
        }
        return {name: float(value_P @ share_P) for name, value_P in values.items()}


def pair_numbers(batches: Sequence[Batch]) -> tuple[int, ...]:
    """The record of each pair, in order."""
    return tuple(number for batch in batches for number in batch.numbers[::2])


def paired(sequences: Sequence[Tensor]) -> Tensor:
    """``[P, 2]`` from the sequences of each micro-batch, in which a pair's stand beside each other."""
    return torch.cat(list(sequences)).view(-1, 2)


def _weighed(batches: Sequence[Batch], carries: Sequence[Tensor], weights: Tensor) -> list[Batch]:
    parts = weights.split([len(batch.numbers) for batch in batches])
    return [
        replace(batch, loss_mask=(each * part[sequence_numbers(batch)]).to(batch.loss_mask.dtype))
        for batch, each, part in zip(batches, carries, parts, strict=True)
    ]
