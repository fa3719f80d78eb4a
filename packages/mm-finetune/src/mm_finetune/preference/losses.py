"""Losses of pairs, as functions of the log-probabilities of their answers.

Shape suffixes: P pairs, 2 the chosen and the rejected answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mm_finetune.config import PreferenceConfig


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Pairs of answers.

    Attributes:
        policy_P2: log-probability of each answer, of the model that is trained; float64.
        reference_P2: the same of the reference model.
        tokens_P2: tokens of each answer that carry loss.
    """

    policy_P2: Tensor
    reference_P2: Tensor
    tokens_P2: Tensor

    @property
    def rewards_P2(self) -> Tensor:
        """What the model thinks better of an answer than the reference model does (without beta)."""
        return self.policy_P2 - self.reference_P2


def preference_loss(pairs: Pairs, config: PreferenceConfig) -> Tensor:
    """``[P]``: the loss of each pair; the formulas are those of :class:`mm_finetune.config.PreferenceConfig`."""
    rewards_P2 = pairs.rewards_P2 / pairs.tokens_P2 if config.loss == "ipo" else pairs.rewards_P2
    margin_P = rewards_P2[:, 0] - rewards_P2[:, 1]
    if config.loss == "dpo":
        kept = 1 - config.label_smoothing
        loss_P = -kept * logsigmoid(config.beta * margin_P) - (1 - kept) * logsigmoid(-config.beta * margin_P)
    elif config.loss == "hinge":
        loss_P = torch.relu(1 - config.beta * margin_P)
    else:
        loss_P = (margin_P - 1 / (2 * config.beta)) ** 2
    return loss_P - config.sft_weight * pairs.policy_P2[:, 0] / pairs.tokens_P2[:, 0]


def gradient(pairs: Pairs, config: PreferenceConfig) -> tuple[Tensor, Tensor]:
    """The loss of each pair ``[P]``, and its derivative by the log-probability of each answer ``[P, 2]``."""
    policy_P2 = pairs.policy_P2.detach().requires_grad_()
    with torch.enable_grad():
        given = Pairs(policy_P2=policy_P2, reference_P2=pairs.reference_P2, tokens_P2=pairs.tokens_P2)
        loss_P = preference_loss(given, config)
        (slopes_P2,) = torch.autograd.grad(loss_P.sum(), policy_P2)
    return loss_P.detach(), slopes_P2
