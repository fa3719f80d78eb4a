"""Where a layer lives: pipeline stages, virtual stages and tensor-parallel ranks.

A *stage* is numbered in the order in which data runs through it: stage ``s = v * pp_size + p`` is
virtual stage ``v`` of pipeline rank ``p``. Layers are dealt out stage by stage.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Literal, NamedTuple

from mm_convert.errors import LayoutError

if TYPE_CHECKING:
    from mm_convert.plans import Ref

Part = Literal["llm", "vit", "audio"]
PARTS: tuple[Part, ...] = ("llm", "vit", "audio")
LayerLists = tuple[tuple[int, ...], ...]
RANK_FILE = "model_optim_rng.pt"
RANK_DIR = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?(?:_(\d{3}))?")


class Ranks(NamedTuple):
    """The numbers of a rank."""

    tp: int
    pp: int
    ep: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a model is cut.

    Args:
        llm_pp_layers: language layers, ``[virtual stage][pipeline rank]``; a flat list is one
            virtual stage (``[12, 16]`` equals ``[[12, 16]]``: 12 layers on the first rank, 16 on
            the second).
        vit_pp_layers: vision layers, of the same shape; empty for a text model, which has none. A shorter row, of a
            layout without virtual stages, is repeated along the pipeline: with ``[[32]]`` every rank holds the whole
            vision part.
        audio_pp_layers: audio layers, likewise; empty for a model that hears nothing.
        tp_size: tensor-parallel size.
        ep_size: expert-parallel size: every expert-parallel rank holds its share of each layer's experts, and all the
            rest.
        vit_tp_size: tensor-parallel size of the vision part, where it is smaller: rank t holds slice
            ``t % vit_tp_size``. 0 is `tp_size`.
        audio_tp_size: the same for the audio part.
        make_vocab_size_divisible_by: rows of embedding and output layer are rounded up to a multiple of this times
            `tp_size`, with zeros, as Megatron does; 0 for none of these rows.
        ldt: the language model's ends stand on pipeline rank 0: the embedding in the first virtual stage that holds
            language layers, final norm and output layer in the last virtual stage, layers there or not.

    Raises:
        LayoutError: the lists are ragged, negative, of different shapes, or hold no language layer; a size is no
            number of ranks.
    """

    llm_pp_layers: LayerLists
    vit_pp_layers: LayerLists = ()
    audio_pp_layers: LayerLists = ()
    tp_size: int = 1
    ep_size: int = 1
    vit_tp_size: int = 0
    audio_tp_size: int = 0
    make_vocab_size_divisible_by: int = 0
    ldt: bool = False

    def __post_init__(self) -> None:
        # A part of a model, such as an adapter of the vision model alone, may hold no language layer.
        others = [*self.vit_pp_layers, *self.audio_pp_layers]
        least = 0 if any(any(row) if isinstance(row, (list, tuple)) else row for row in others) else 1
        object.__setattr__(self, "llm_pp_layers", _nested("llm_pp_layers", self.llm_pp_layers, least=least))
        for name in ("vit_pp_layers", "audio_pp_layers"):
            lists = getattr(self, name) or [[0] * len(row) for row in self.llm_pp_layers]
            object.__setattr__(self, name, _nested(name, lists, least=0))
            self._check_shape(name)
        for name in ("tp_size", "ep_size"):
            if getattr(self, name) < 1:
                raise LayoutError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.make_vocab_size_divisible_by < 0:
            raise LayoutError(
                f"make_vocab_size_divisible_by is {self.make_vocab_size_divisible_by}; it must be 0 for no padding,"
                " or a number of rows above 0"
            )
        for name in ("vit_tp_size", "audio_tp_size"):
            size = getattr(self, name)
            if size < 0 or (size and self.tp_size % size):
                legal = [n for n in range(1, self.tp_size + 1) if self.tp_size % n == 0]
                raise LayoutError(
                    f"{name} is {size}; it must divide tp_size {self.tp_size}: one of {legal}, or 0 for tp_size itself"
                )
            object.__setattr__(self, name, 0 if size == self.tp_size else size)

    @classmethod
    def undivided(cls, layers: Sequence[int], *, tp_size: int = 1, make_vocab_size_divisible_by: int = 0) -> Layout:
        """One pipeline rank that holds all layers.

        Args:
            layers: how many there are of each part, in the order of `PARTS`.
            tp_size: tensor-parallel size.
            make_vocab_size_divisible_by: padding of the vocabulary.
        """
        llm, vit, audio = (((count,),) for count in layers)
        return cls(
            llm_pp_layers=llm,
            vit_pp_layers=vit,
            audio_pp_layers=audio,
            tp_size=tp_size,
            make_vocab_size_divisible_by=make_vocab_size_divisible_by,
        )

    @property
    def layers(self) -> tuple[int, int, int]:
        """Layers of each part, all stages together, in the order of `PARTS`."""
        llm, vit, audio = (sum(map(sum, self.lists(part))) for part in PARTS)
        return llm, vit, audio

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
        return {"llm": self.llm_pp_layers, "vit": self.vit_pp_layers, "audio": self.audio_pp_layers}[part]

    def tp(self, part: Part) -> int:
        """The tensor-parallel size of a part of the model."""
        return {"llm": 0, "vit": self.vit_tp_size, "audio": self.audio_tp_size}[part] or self.tp_size

    def stages(self, part: Part) -> tuple[range, ...]:
        """The global layer numbers of each stage, in the order in which data runs."""
        counts = [count for row in self.lists(part) for count in row]
        ends = list(accumulate(counts))
        once = [range(end - count, end) for count, end in zip(counts, ends, strict=True)]
        return tuple(once[s % len(once)] for s in range(self.pp_size * self.vpp_size))

    def first_stages(self, part: Part) -> list[int]:
        """Where a part begins: the first stage that holds a layer of it, or each where it is repeated."""
        return self._repeated(part, next(s for s, layers in enumerate(self.stages(part)) if layers), first=True)

    def last_stages(self, part: Part) -> list[int]:
        """Where a part ends: the last stage that holds a layer of it, or each where it is repeated."""
        once = self.stages(part)[: sum(map(len, self.lists(part)))]
        return self._repeated(part, max(s for s, layers in enumerate(once) if layers), first=False)

    def place(self, stage: int) -> tuple[int, int]:
        """The pipeline rank and the virtual stage of a stage."""
        virtual, rank = divmod(stage, self.pp_size)
        return rank, virtual

    def section(self, stage: int) -> str:
        """The key in the checkpoint file under which a stage's tensors stand."""
        return f"model{self.place(stage)[1]}" if self.vpp_size > 1 else "model"

    def rank_dir(self, tp_rank: int, pp_rank: int, ep_rank: int = 0) -> str:
        """The folder of one rank: ``mp_rank_00``, and its pipeline and expert-parallel rank where there are several."""
        pp = f"_{pp_rank:03d}" if self.pp_size > 1 else ""
        ep = f"_{ep_rank:03d}" if self.ep_size > 1 else ""
        return f"mp_rank_{tp_rank:02d}{pp}{ep}"

    def ranks(self, ref: Ref) -> Ranks:
        """The rank in whose folder a tensor stands."""
        match = RANK_DIR.fullmatch(ref.file.partition("/")[0])
        tp, *others = [int(number) for number in match.groups() if number] if match else [0]
        pp = others.pop(0) if self.pp_size > 1 and others else 0
        return Ranks(tp, pp, others.pop(0) if others else 0)

    def stage(self, ref: Ref) -> int:
        """The stage whose tensor this is, from the names of its file and section."""
        return int(ref.section.removeprefix("model") or 0) * self.pp_size + self.ranks(ref).pp

    def check_sums(self, *, llm_layers: int, vit_layers: int, audio_layers: int = 0) -> None:
        """Raise LayoutError unless the lists sum to the model's layers."""
        for part, expected in zip(PARTS, (llm_layers, vit_layers, audio_layers), strict=True):
            lists = self.lists(part)
            total = sum(map(sum, lists))
            if total != expected:
                fits = _text(_even(expected, len(lists), len(lists[0])))
                raise LayoutError(
                    f"{part}_pp_layers {_text(lists)} sum to {total}, but the model has {expected} {part} layers;"
                    f" for {self.pp_size} pipeline ranks {fits} would fit"
                )

    def __str__(self) -> str:
        return self.text()

    def text(self, *, generative: bool = False) -> str:
        """The options as they are typed; of a text model, its own alone.

        Args:
            generative: those of a model that has blocks of one kind, dealt out by ``pp_layers``.
        """
        lists = {
            "pp_layers" if generative else f"{part}_pp_layers": _text(self.lists(part))
            for part in PARTS
            if any(map(any, self.lists(part)))
        }
        names = ("ep_size", "vit_tp_size", "audio_tp_size", "make_vocab_size_divisible_by")
        more = {name: n for name in names if (n := getattr(self, name)) > (name == "ep_size")}
        words = [f"{name} {value}" for name, value in (lists | {"tp_size": self.tp_size} | more).items()]
        return ", ".join([*words, *(["embedding and output layer on pipeline rank 0 (LDT)"] if self.ldt else [])])

    def _check_shape(self, name: str) -> None:
        lists = getattr(self, name)
        shapes = [[len(row) for row in given] for given in (self.llm_pp_layers, lists)]
        repeated = self.vpp_size == len(lists) == 1 and len(lists[0]) < self.pp_size
        if shapes[0] != shapes[1] and not repeated:
            raise LayoutError(
                f"llm_pp_layers {_text(self.llm_pp_layers)} and {name} {_text(lists)} have different shapes; both need"
                " one number for each virtual stage and pipeline rank (0 where a rank holds no layer of that part), or,"
                " without virtual stages, fewer, which are repeated"
            )

    def _repeated(self, part: Part, stage: int, *, first: bool) -> list[int]:
        if self.ldt and part == "llm":
            return [stage // self.pp_size * self.pp_size if first else (self.vpp_size - 1) * self.pp_size]
        once = sum(map(len, self.lists(part)))
        return list(range(stage % once, self.pp_size * self.vpp_size, once))


@dataclass(frozen=True, kw_only=True)
class GivenLayout:
    """What a user says of a checkpoint that is there: a check, so each part may be left out.

    Args:
        llm_pp_layers: as in :class:`Layout`, flat or nested.
        vit_pp_layers: likewise.
        audio_pp_layers: likewise.
        tp_size: tensor-parallel size.
        ep_size: expert-parallel size.
        vit_tp_size: tensor-parallel size of the vision part; 0 is the model's.
        audio_tp_size: the same for the audio part.
        make_vocab_size_divisible_by: what the vocabulary's rows on a rank were rounded up to a multiple of.
    """

    llm_pp_layers: Sequence[object] | None = None
    vit_pp_layers: Sequence[object] | None = None
    audio_pp_layers: Sequence[object] | None = None
    tp_size: int | None = None
    ep_size: int | None = None
    vit_tp_size: int | None = None
    audio_tp_size: int | None = None
    make_vocab_size_divisible_by: int | None = None

    def check(self, found: Layout, where: object) -> None:
        """Compare with what is on disk.

        Raises:
            LayoutError: they differ, or a list is none.
        """
        given: dict[str, object] = {
            name: _nested(name, lists, least=0)
            for name in ("llm_pp_layers", "vit_pp_layers", "audio_pp_layers")
            if (lists := getattr(self, name)) is not None
        }
        given |= {name: n for name in ("tp_size", "ep_size") if (n := getattr(self, name)) is not None}
        for name in ("vit_tp_size", "audio_tp_size"):
            if (n := getattr(self, name)) is not None:
                given[name] = 0 if n == found.tp_size else n
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
