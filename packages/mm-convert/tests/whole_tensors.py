"""Layouts in memory: what the published description makes of whole tensors, and what a family's table makes of them.

A model is described part by part: what a layer gives, and what stands on the first and on the last stage that holds a
layer of the part. How a tensor is cut is said by a function of the number of ranks and the rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from tiny_checkpoint import Tensors
from torch import Tensor

from mm_convert import Family, Layout, ModelSizes, Plan, Ref, Segment, Spec, assemble, relate

Lists = list[list[int]]
Cut = Callable[[int, int], Tensor]
Made = tuple[str, Cut]
Places = dict[tuple[int, int, int], Tensors]
Place = TypeVar("Place")


@dataclass(frozen=True)
class Part:
    """A part of a model: its layers by global number and number inside the stage, and what stands at its ends."""

    layer: Callable[[int, int], Iterator[Made]]
    first: list[Made]
    last: list[Made]


def same(tensor: Tensor) -> Cut:
    return lambda tp, t: tensor


def rows(tensor: Tensor) -> Cut:
    return lambda tp, t: tensor.chunk(tp)[t]


def columns(tensor: Tensor) -> Cut:
    return lambda tp, t: tensor.chunk(tp, dim=1)[t]


def gated(gate: Tensor, up: Tensor) -> Cut:
    return lambda tp, t: torch.cat([gate.chunk(tp)[t], up.chunk(tp)[t]])


def published(parts: Mapping[str, Part], lists: Mapping[str, Lists], tp: int) -> Places:
    """Everything, by (tp rank, pp rank, virtual stage)."""
    counts = {part: [n for row in lists[part] for n in row] for part in parts}
    pp, stages = len(lists["llm"][0]), len(counts["llm"])
    made: list[list[Made]] = [[] for _ in range(stages)]
    for name, part in parts.items():
        held = [s for s in range(stages) if counts[name][s]]
        made[held[0]] += part.first
        made[held[-1]] += part.last
        for s in range(stages):
            for j in range(counts[name][s]):
                made[s] += part.layer(sum(counts[name][:s]) + j, j)
    return {(t, s % pp, s // pp): {n: cut(tp, t) for n, cut in made[s]} for s in range(stages) for t in range(tp)}


@dataclass(frozen=True)
class Converted:
    """A model in the Megatron layout."""

    layout: Layout
    sources: dict[Ref, Spec]
    segments: list[Segment]
    tensors: dict[Ref, Tensor]

    @classmethod
    def of(cls, family: Family, sizes: ModelSizes, hf: Tensors, layout: Layout) -> Converted:
        sources = {Ref("", "", name): Spec("BF16", tuple(t.shape)) for name, t in hf.items()}
        targets, segments = relate(family, sizes, layout, sources)
        plan = Plan.build(sources, targets, segments)
        read = reader({ref: hf[ref.name] for ref in sources})
        made = {ref: assemble(plan, ref, read) for ref in targets}
        assert all(t.shape == targets[ref].shape and t.dtype == torch.bfloat16 for ref, t in made.items())
        return cls(layout, sources, segments, made)

    def places(self) -> Places:
        layout = self.layout
        found: Places = {
            (t, p, v): {} for t in range(layout.tp_size) for p in range(layout.pp_size) for v in range(layout.vpp_size)
        }
        for ref, tensor in self.tensors.items():
            pp_rank, virtual = layout.place(layout.stage(ref))
            found[layout.ranks(ref).tp, pp_rank, virtual][ref.name] = tensor
        return found

    def back(self) -> Tensors:
        """The Hugging Face tensors again."""
        specs = {ref: Spec("BF16", tuple(t.shape)) for ref, t in self.tensors.items()}
        plan = Plan.build(specs, self.sources, [segment.reversed() for segment in self.segments])
        return {ref.name: assemble(plan, ref, reader(self.tensors)) for ref in self.sources}


def reader(held: Mapping[Ref, Tensor]) -> Callable[[Segment], Tensor]:
    return lambda segment: held[segment.source].narrow(segment.source_dim, segment.source_start, segment.length)


def assert_same(found: Mapping[Place, Tensors], expected: Mapping[Place, Tensors]) -> None:
    assert {place: sorted(held) for place, held in found.items()} == {p: sorted(held) for p, held in expected.items()}
    wrong = [(p, n) for p, held in expected.items() for n, t in held.items() if not torch.equal(found[p][n], t)]
    assert not wrong
