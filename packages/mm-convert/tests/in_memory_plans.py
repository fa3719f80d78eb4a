"""Plans between Hugging Face tensors and the ranks of a layout, carried out on tensors in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_checkpoint import Tensors

from mm_convert import Layout, Plan, Ref, Segment, Spec, assemble, relate
from mm_convert.families.family import Family

Ranks = dict[str, Tensors]
"""By folder of the rank (``mp_rank_01_000``), and name."""


def recorded(model: str) -> dict[str, Any]:
    text = (Path(__file__).parent / "recorded" / f"{model}.json").read_text(encoding="utf-8")
    return json.loads(text)  # type: ignore[no-any-return]


def specs(tensors: Mapping[str, torch.Tensor]) -> dict[Ref, Spec]:
    return {Ref("", "", name): Spec("BF16", tuple(t.shape)) for name, t in tensors.items()}


@dataclass(frozen=True)
class Done:
    """A conversion to ranks that was carried out."""

    sources: dict[Ref, Spec]
    segments: Sequence[Segment]
    plan: Plan
    made: dict[Ref, torch.Tensor]

    @property
    def ranks(self) -> Ranks:
        ranks: Ranks = {}
        for ref, tensor in self.made.items():
            ranks.setdefault(ref.file.partition("/")[0], {})[ref.name] = tensor
        return ranks

    def back(self) -> Tensors:
        """The Hugging Face tensors, from the ranks."""
        plan = Plan.build(self.plan.targets, self.sources, [segment.reversed() for segment in self.segments])
        return {ref.name: assemble(plan, ref, lambda s: slices(self.made, s)) for ref in self.sources}


def convert(family: Family, config: Mapping[str, Any], held: Tensors, layout: Layout) -> Done:
    assert family.accepts(config)
    sources = specs(held)
    targets, segments = relate(family, family.sizes(config), layout, sources)
    plan = Plan.build(sources, targets, segments)
    tensors = {ref: held[ref.name] for ref in sources}
    return Done(
        sources, segments, plan, {ref: assemble(plan, ref, lambda s: slices(tensors, s)) for ref in plan.targets}
    )


def slices(held: Mapping[Ref, torch.Tensor], segment: Segment) -> torch.Tensor:
    return held[segment.source].narrow(segment.dim, segment.source_start, segment.length)


def same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    """The same names and the same bits."""
    return found.keys() == expected.keys() and all(torch.equal(found[name], t) for name, t in expected.items())
