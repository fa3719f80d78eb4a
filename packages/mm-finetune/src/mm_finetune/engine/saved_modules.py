"""Layers that are trained in full beside adapters (PEFT's ``modules_to_save``): chosen, filled, gathered.

A weight may be cut over tensor-parallel ranks and fused with others; mm-convert's plan of the checkpoint says which
part of it is which part of a published one.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from mm_convert import Plan, Ref, Segment
from mm_convert.megatron import RANK_FILE
from mm_finetune.config import TrainConfig
from mm_finetune.errors import ConfigError
from mm_finetune.selection import common_rate, rates_of, saved_layers

if TYPE_CHECKING:
    from mm_finetune.engine.parallel import Ranks
    from mm_finetune.engine.weights import Checkpoint, Weight


def saved_rates(checkpoint: Checkpoint, config: TrainConfig) -> dict[str, float]:
    """The published weights that ``lora.modules_to_save`` means, with the factors of their learning rates.

    Raises:
        ConfigError: a pattern matches nothing, or a part of a fused weight.
    """
    assert config.lora is not None, "called for a run with adapters"
    shapes, train = checkpoint.shapes, config.train
    layers = saved_layers(shapes, config.lora.modules_to_save)
    rates = rates_of(list(shapes), freeze=train.freeze, lr_scale=train.lr_scale)
    saved = {name: rates[name] for name in shapes if name.rpartition(".")[0] in layers}
    for place, published in checkpoint.published().items() if saved else ():
        inside = saved.keys() & set(published)
        if inside and inside != set(published):
            raise ConfigError(
                f"{place.name} is one weight here: lora.modules_to_save must name the layers of all its parts, or none"
                f" ({', '.join(published)})"
            )
        if inside:
            common_rate(place.name, published, rates)
    return saved


@dataclass(frozen=True, kw_only=True)
class SavedModules:
    """This process's part of them.

    Attributes:
        plan: the checkpoint's, from the layout to the published weights.
        targets: where the plan has the published weights, of the whole model.
        held: this process's weights, by their places in the layout.
    """

    plan: Plan
    targets: Mapping[str, Ref]
    held: Mapping[Ref, Weight]

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, weights: list[Weight], rates: Mapping[str, float], ranks: Ranks
    ) -> SavedModules:
        """Have them trained.

        Args:
            checkpoint: of the model.
            weights: all of this process.
            rates: see :func:`saved_rates`.
            ranks: where this process stands.
        """
        canonical = checkpoint.converter.family.canonical
        targets = {canonical(ref.name): ref for ref in checkpoint.plan.targets}
        made = cls(plan=checkpoint.plan, targets={name: targets[name] for name in rates}, held={})
        file = f"{checkpoint.layout.rank_dir(ranks.tp_rank, ranks.pp_rank)}/{RANK_FILE}"
        held: dict[Ref, Weight] = {}
        for weight in weights:
            if weight.published[0] not in rates:
                continue
            sources = {segment.source for segment in made.segments(weight.published[0])}
            (place,) = (ref for ref in sources if (ref.file, ref.name) == (file, weight.path))
            held[place] = weight
            rate = rates[weight.published[0]]
            weight.parameter.requires_grad_(rate > 0)
            weight.parameter.lr_mult = rate  # type: ignore[attr-defined]  # where the optimizer looks for it
        return cls(plan=made.plan, targets=made.targets, held=held)

    def segments(self, name: str) -> Iterator[Segment]:
        """The parts of a published weight, copies among them."""
        target = self.targets[name]
        yield from self.plan.writes[target]
        yield from self.plan.checks.get(target, ())

    @torch.no_grad()
    def fill(self, read: Callable[[str], Tensor]) -> None:
        """Put numbers in.

        Args:
            read: gives a published weight, whole.
        """
        for place, weight in self.held.items():
            for name in weight.published:
                whole = read(name)
                for segment in self.segments(name):
                    if segment.source == place:
                        ours, theirs = _both(segment, weight.parameter, whole)
                        ours.copy_(theirs)

    @torch.no_grad()
    def gathered(self, device: torch.device) -> dict[str, Tensor]:
        """The published weights, whole, on the first process of this copy of the model; all of its processes call it.

        Parts are sent one by one, so that a device holds one of another's at most.

        Args:
            device: where parts arrive.
        """
        if not self.targets:
            return {}
        group = parallel_state.get_model_parallel_group()
        rank, mine = dist.get_rank(group), {place: weight.parameter.detach() for place, weight in self.held.items()}
        told: list[dict[Ref, tuple[torch.Size, torch.dtype]]] = [{}] * dist.get_world_size(group)
        dist.all_gather_object(told, {place: (part.shape, part.dtype) for place, part in mine.items()}, group=group)
        owners = {place: owner for owner, held in reversed([*enumerate(told)]) for place in held}
        wholes: dict[str, Tensor] = {}
        for place, segments in self._read_from(owners).items():
            owner, (shape, dtype) = owners[place], told[owners[place]][place]
            if rank == owner and owner:
                dist.send(mine[place].contiguous(), group=group, group_dst=0)
            if rank:
                continue
            part = torch.empty(shape, dtype=dtype, device=device) if owner else mine[place]
            if owner:
                dist.recv(part, group=group, group_src=owner)
            for name, segment in segments:
                if name not in wholes:
                    wholes[name] = torch.empty(self.plan.targets[self.targets[name]].shape, dtype=dtype)
                ours, theirs = _both(segment, part, wholes[name])
                theirs.copy_(ours)
        return wholes

    def _read_from(self, places: Container[Ref]) -> dict[Ref, list[tuple[str, Segment]]]:
        """What the published weights are made of, each part once, by some of the places that have it."""
        found: dict[Ref, list[tuple[str, Segment]]] = {}
        for name in sorted(self.targets):
            parts = {segment.target_start: segment for segment in self.segments(name) if segment.source in places}
            for segment in parts.values():
                found.setdefault(segment.source, []).append((name, segment))
        return dict(sorted(found.items()))


def _both(segment: Segment, ours: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """The same numbers in a weight of this layout and in a published one."""
    mine = ours.narrow(segment.source_dim, segment.source_start, segment.length)
    return mine.T if segment.transposed else mine, whole.narrow(segment.dim, segment.target_start, segment.length)
