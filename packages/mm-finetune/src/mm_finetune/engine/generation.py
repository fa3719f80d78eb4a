"""Answers of the model that is being trained, in whatever layout it is trained.

Always the likeliest token. The whole sequence runs anew for each token, through the pipeline that training uses:
nothing is cached, so there is no second implementation of the model, and a few dozen short answers cost a few training
steps.

Shape suffixes: N questions, V tokens of the vocabulary on this rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from mm_finetune.data import Batch, EncodedSample, collate
from mm_finetune.engine.step import Trainer
from mm_finetune.template import IGNORE


class Generator:
    """Answers questions with a trainer's model, which stays as it is.

    Args:
        trainer: whose model.
        device: of the model.
        end: the token that ends an answer.
        max_new_tokens: longest answer.
        rows: questions of a micro-batch.
        room: most tokens of a packed row; None: one row each, padded.
    """

    def __init__(
        self, trainer: Trainer, device: torch.device, *, end: int, max_new_tokens: int, rows: int, room: int | None
    ) -> None:
        self.trainer, self.device = trainer, device
        self.end, self.max_new_tokens = end, max_new_tokens
        self.rows, self.room = rows, room

    def answer(self, questions: Sequence[EncodedSample]) -> list[list[int]]:
        """The tokens of each answer, without the one that ends it.

        All processes that share a copy of the model call it with the same questions; other copies may have others, or
        none. Pixels are needed on the first pipeline stage alone.
        """
        said: list[list[int]] = [[] for _ in questions]
        samples = list(questions)
        # Like lengths beside each other.
        open_ones = sorted(range(len(samples)), key=lambda number: len(samples[number].input_ids))
        for _ in range(self.max_new_tokens):
            if not open_ones:
                break
            tokens = self._next([samples[number] for number in open_ones])
            for number, token in zip(open_ones, tokens, strict=True):
                if token != self.end:
                    said[number].append(token)
                    samples[number] = longer(samples[number], token)
            open_ones = [number for number, token in zip(open_ones, tokens, strict=True) if token != self.end]
        return said

    @torch.no_grad()
    def _next(self, samples: Sequence[EncodedSample]) -> list[int]:
        """The likeliest next token of each, on every rank."""
        batches = [_marked(part, packed=self.room is not None).to(self.device) for part in self.parts(samples)]
        with resting(self.trainer.model):
            found = self.trainer.run(
                _logits_step, self.trainer.laid(batches), forward_only=True, collect_non_loss_data=True
            )
        tokens_N = torch.zeros(len(samples), dtype=torch.long, device=self.device)
        if self.trainer.ranks.last_stage:
            tokens_N = likeliest(torch.cat(found[: len(batches)]))
        source = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(tokens_N, src=source, group=parallel_state.get_pipeline_model_parallel_group())
        return [int(token) for token in tokens_N]

    def parts(self, samples: Sequence[EncodedSample]) -> list[list[EncodedSample]]:
        """Samples laid into micro-batches, in their order."""
        parts: list[list[EncodedSample]] = []
        for sample in samples:
            if parts and self._fits(parts[-1], sample):
                parts[-1].append(sample)
            else:
                parts.append([sample])
        return parts

    def _fits(self, part: Sequence[EncodedSample], sample: EncodedSample) -> bool:
        if self.room is None:
            return len(part) < self.rows
        return sum(len(one.input_ids) for one in (*part, sample)) <= self.room


def longer(sample: EncodedSample, token: int) -> EncodedSample:
    """A sample with one more token of text."""
    ids, labels, positions = sample.input_ids, sample.labels, sample.positions
    return replace(
        sample,
        input_ids=torch.cat([ids, ids.new_tensor([token])]),
        labels=torch.cat([labels, labels.new_tensor([IGNORE])]),
        # Text goes on after the largest position, on all three axes.
        positions=torch.cat([positions, (positions.max() + 1).expand(3, 1)], dim=1),
    )


def likeliest(logits_NV: Tensor) -> Tensor:
    """``[N]``: the token with the largest logit over all tensor-parallel ranks; of equal ones the first."""
    group = parallel_state.get_tensor_model_parallel_group()
    value_N, place_N = logits_NV.float().max(dim=-1)
    token_N = place_N + parallel_state.get_tensor_model_parallel_rank() * logits_NV.shape[-1]
    size = parallel_state.get_tensor_model_parallel_world_size()
    values = [torch.empty_like(value_N) for _ in range(size)]
    tokens = [torch.empty_like(token_N) for _ in range(size)]
    dist.all_gather(values, value_N.contiguous(), group=group)
    dist.all_gather(tokens, token_N.contiguous(), group=group)
    # max() gives the first of equal ones here: ranks hold the vocabulary in order.
    best_N = torch.stack(values).max(dim=0).indices
    return torch.stack(tokens).gather(0, best_N[None])[0]


@contextlib.contextmanager
def resting(model: nn.Module) -> Iterator[None]:
    """The model without dropout and recomputation; afterwards every part of it is as it was."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _marked(samples: Sequence[EncodedSample], *, packed: bool) -> Batch:
    """A micro-batch whose ``loss_mask`` marks the last token of each sample."""
    batch = collate(samples, packed=packed)
    mask = torch.zeros_like(batch.loss_mask)
    lengths = torch.tensor([len(sample.input_ids) for sample in samples])
    if packed:
        mask[0, lengths.cumsum(0) - 1] = 1
    else:
        mask[torch.arange(len(samples)), lengths - 1] = 1
    return replace(batch, loss_mask=mask)


def _logits_step(batches: Any, model: nn.Module) -> Any:
    return model(next(batches), marked=True), lambda logits, non_loss_data: logits
