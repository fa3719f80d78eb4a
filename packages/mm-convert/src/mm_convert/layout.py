"""Where a layer lives: pipeline stages, virtual stages and tensor-parallel ranks.

A *stage* is numbered in the order in which data runs through it: stage ``s = v * pp_size + p`` is
virtual stage ``v`` of pipeline rank ``p``. Layers are dealt out stage by stage.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, get_args

from mm_convert.errors import LayoutError

Part = Literal["llm", "vit"]
LayerLists = tuple[tuple[int, ...], ...]
RANK_FILE = "model_optim_rng.pt"
RANK_DIR = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a model is cut.

    Args:
        llm_pp_layers: language layers, ``[virtual stage][pipeline rank]``; a flat list is one
            virtual stage (``[12, 16]`` equals ``[[12, 16]]``: 12 layers on the first rank, 16 on
            the second).
        vit_pp_layers: vision layers, of the same shape.
        tp_size: tensor-parallel size.

    Raises:
        LayoutError: the lists are ragged, negative, of different shapes, or hold no layer.
    """

    llm_pp_layers: LayerLists
    vit_pp_layers: LayerLists
    tp_size: int = 1

    def __post_init__(self) -> None:
        for part in get_args(Part):
            object.__setattr__(self, _field(part), _nested(_field(part), self.lists(part)))
        llm, vit = ([len(row) for row in lists] for lists in (self.llm_pp_layers, self.vit_pp_layers))
        if llm != vit:
            raise LayoutError(
                f"llm_pp_layers {_text(self.llm_pp_layers)} and vit_pp_layers {_text(self.vit_pp_layers)} have"
                " different shapes; both need one number for each virtual stage and pipeline rank"
                " (0 where a rank holds no layer of that part)"
            )
        if self.tp_size < 1:
            raise LayoutError(f"tp_size is {self.tp_size}; it must be 1 or more")

    @property
    def pp_size(self) -> int:
        """Number of pipeline ranks."""
        return len(self.llm_pp_layers[0])

    @property
    def vpp_size(self) -> int:
        """Number of virtual stages of each pipeline rank."""
        return len(self.llm_pp_layers)

    def lists(self, part: Part) -> LayerLists:
        """The layer lists of a part of the model."""
        return self.llm_pp_layers if part == "llm" else self.vit_pp_layers

    def stages(self, part: Part) -> tuple[range, ...]:
        """The global layer numbers of each stage, in the order in which data runs."""
        counts = [count for row in self.lists(part) for count in row]
        ends = list(accumulate(counts))
        return tuple(range(end - count, end) for count, end in zip(counts, ends, strict=True))

    def first_stage(self, part: Part) -> int:
        """The first stage that holds a layer of the part."""
        return next(s for s, layers in enumerate(self.stages(part)) if layers)

    def last_stage(self, part: Part) -> int:
        """The last stage that holds a layer of the part."""
        return max(s for s, layers in enumerate(self.stages(part)) if layers)

    def place(self, stage: int) -> tuple[int, int]:
        """The pipeline rank and the virtual stage of a stage."""
        virtual, rank = divmod(stage, self.pp_size)
        return rank, virtual

    def section(self, stage: int) -> str:
        """The key in the checkpoint file under which a stage's tensors stand."""
        return f"model{self.place(stage)[1]}" if self.vpp_size > 1 else "model"

    def rank_dir(self, tp_rank: int, pp_rank: int) -> str:
        """The folder of one rank: ``mp_rank_00`` or, with a pipeline, ``mp_rank_00_000``."""
        return f"mp_rank_{tp_rank:02d}" + (f"_{pp_rank:03d}" if self.pp_size > 1 else "")

    def check_sums(self, *, llm_layers: int, vit_layers: int) -> None:
        """Raise LayoutError unless the lists sum to the model's layers."""
        for part, expected in (("llm", llm_layers), ("vit", vit_layers)):
            lists = self.llm_pp_layers if part == "llm" else self.vit_pp_layers
            total = sum(map(sum, lists))
            if total != expected:
                fits = _text(_even(expected, self.vpp_size, self.pp_size))
                raise LayoutError(
                    f"{part}_pp_layers {_text(lists)} sum to {total}, but the model has {expected} {part} layers;"
                    f" for {self.pp_size} pipeline ranks {fits} would fit"
                )

    def __str__(self) -> str:
        """The options as they are typed."""
        return (
            f"llm_pp_layers {_text(self.llm_pp_layers)}, vit_pp_layers {_text(self.vit_pp_layers)},"
            f" tp_size {self.tp_size}"
        )


def _field(part: Part) -> str:
    return f"{part}_pp_layers"


def _text(lists: LayerLists) -> str:
    return str([list(row) for row in lists]).replace(" ", "")


def _nested(name: str, lists: Sequence[object]) -> LayerLists:
    """Accept ``[12, 16]`` and ``[[12, 16]]`` alike; refuse what is neither."""
    rows = [lists] if all(isinstance(item, int) for item in lists) else lists
    nested = tuple(tuple(row) if isinstance(row, (list, tuple)) else (None,) for row in rows)
    legal = all(isinstance(n, int) and n >= 0 for row in nested for n in row)
    if not legal or not nested or len({len(row) for row in nested}) != 1 or not any(map(sum, nested)):
        raise LayoutError(
            f"{name} is {lists!r}; it must hold one row for each virtual stage, all rows with one number >= 0 for"
            " each pipeline rank, at least one of them above 0: [[12,16]] is 12 layers on the first of two ranks,"
            " 16 on the second"
        )
    return nested


def _even(layers: int, vpp_size: int, pp_size: int) -> LayerLists:
    share, rest = divmod(layers, vpp_size * pp_size)
    counts = [share + (s >= vpp_size * pp_size - rest) for s in range(vpp_size * pp_size)]
    return tuple(tuple(counts[v * pp_size : (v + 1) * pp_size]) for v in range(vpp_size))
