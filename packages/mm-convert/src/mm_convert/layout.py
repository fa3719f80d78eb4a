"""Where a layer lives: pipeline stages, virtual stages and tensor-parallel ranks.

A *stage* is numbered in the order in which data runs through it: stage ``s = v * pp_size + p`` is
virtual stage ``v`` of pipeline rank ``p``. Layers are dealt out stage by stage.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

from mm_convert.errors import LayoutError

if TYPE_CHECKING:
    from mm_convert.plan import Ref

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
        vit_pp_layers: vision layers, of the same shape; empty for a text model, which has none.
        tp_size: tensor-parallel size.

    Raises:
        LayoutError: the lists are ragged, negative, of different shapes, or hold no language layer.
    """

    llm_pp_layers: LayerLists
    vit_pp_layers: LayerLists = ()
    tp_size: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "llm_pp_layers", _nested("llm_pp_layers", self.llm_pp_layers))
        vit = self.vit_pp_layers or [[0] * len(row) for row in self.llm_pp_layers]
        object.__setattr__(self, "vit_pp_layers", _nested("vit_pp_layers", vit, least=0))
        shapes = [[len(row) for row in lists] for lists in (self.llm_pp_layers, self.vit_pp_layers)]
        if shapes[0] != shapes[1]:
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

    def stage(self, ref: Ref) -> int:
        """The stage whose tensor this is, from the names of its file and section."""
        rank = RANK_DIR.fullmatch(ref.file.partition("/")[0])
        pp_rank = int(rank[2] or 0) if rank else 0
        return int(ref.section.removeprefix("model") or 0) * self.pp_size + pp_rank

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


@dataclass(frozen=True, kw_only=True)
class GivenLayout:
    """What a user says of a checkpoint that is there: a check, so each part may be left out.

    Args:
        llm_pp_layers: as in :class:`Layout`, flat or nested.
        vit_pp_layers: likewise.
        tp_size: tensor-parallel size.
    """

    llm_pp_layers: Sequence[object] | None = None
    vit_pp_layers: Sequence[object] | None = None
    tp_size: int | None = None

    def check(self, found: Layout, where: object) -> None:
        """Compare with what is on disk.

        Raises:
            LayoutError: they differ, or a list is none.
        """
        given: dict[str, object] = {
            name: _nested(name, lists, least=0)
            for name in ("llm_pp_layers", "vit_pp_layers")
            if (lists := getattr(self, name)) is not None
        }
        given |= {} if self.tp_size is None else {"tp_size": self.tp_size}
        if any(getattr(found, name) != value for name, value in given.items()):
            words = ", ".join(f"{name} {_text(v) if isinstance(v, tuple) else v}" for name, v in given.items())
            raise LayoutError(f"given: {words}; but {where} holds: {found}")


def _text(lists: LayerLists) -> str:
    return str([list(row) for row in lists]).replace(" ", "")


def _nested(name: str, lists: Sequence[object], *, least: int = 1) -> LayerLists:
    """Accept ``[12, 16]`` and ``[[12, 16]]`` alike; refuse what is neither, or holds too few layers."""
    rows = [lists] if all(isinstance(item, int) for item in lists) else lists
    nested = tuple(tuple(row) if isinstance(row, (list, tuple)) else (None,) for row in rows)
    legal = all(isinstance(n, int) and n >= 0 for row in nested for n in row)
    if not legal or not all(nested) or len({len(row) for row in nested}) != 1 or sum(map(sum, nested)) < least:
        above = ", at least one of them above 0" if least else ""
        raise LayoutError(
            f"{name} is {lists!r}; it must hold one row for each virtual stage, all rows with one number >= 0 for"
            f" each pipeline rank{above}: [[12,16]] is 12 layers on the first of two ranks, 16 on the second"
        )
    return nested


def _even(layers: int, vpp_size: int, pp_size: int) -> LayerLists:
    share, rest = divmod(layers, vpp_size * pp_size)
    counts = [share + (s >= vpp_size * pp_size - rest) for s in range(vpp_size * pp_size)]
    return tuple(tuple(counts[v * pp_size : (v + 1) * pp_size]) for v in range(vpp_size))
