"""Everything but the weights that people read: copied out of training for the writer, and put back.

``state/rank_00000.safetensors``, one a process, hold pieces (:mod:`mm_finetune.checkpointing.pieces`) and the random
state; they are read in any layout.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mm_finetune.checkpointing.files import Tensors, write_tensors
from mm_finetune.checkpointing.pieces import PARAM, STEP, Box, Piece, pieces_of, set_weights
from mm_finetune.checkpointing.random_state import random_notes, random_tensors, set_random
from mm_finetune.errors import CheckpointError

if TYPE_CHECKING:
    from mm_finetune.engine.step import Trainer

RANDOM = "random."


class HostMemory:
    """Copies on the CPU, in memory that is kept: taking it anew for each checkpoint costs more than copying.

    What was copied before under the same name is overwritten.
    """

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def copy(self, name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor's values, of another type where one is given."""
        held, wanted = self._held.get(name), dtype or tensor.dtype
        if held is None or held.shape != tensor.shape or held.dtype != wanted:
            held = torch.empty(tensor.shape, dtype=wanted, pin_memory=tensor.device.type == "cuda")
            self._held[name] = held
        return held.copy_(tensor.detach(), non_blocking=True)

    def wait(self) -> None:
        """Until every copy is there."""
        if torch.accelerator.current_accelerator(check_available=True) is not None:
            torch.accelerator.synchronize()


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a process writes, out of reach of training."""

    tensors: dict[str, Tensor]
    notes: dict[str, Any]

    def write(self, folder: Path, rank: int) -> None:
        """Write it.

        Raises:
            OSError: the disk is full, for example.
        """
        write_tensors(folder / rank_file(rank), self.tensors, self.notes)


def rank_file(rank: int) -> str:
    """Name of a process's file."""
    return f"rank_{rank:05d}.safetensors"


def snapshot(trainer: Trainer, memory: HostMemory, *, optimizer: bool, random: bool) -> Snapshot:
    """Copy what this process has to write.

    Args:
        trainer: model and optimizer.
        memory: where copies go.
        optimizer: with its state; else the weights alone, as the model has them.
        random: with the state of generators.
    """
    tensors: dict[str, Tensor] = {}
    noted: list[dict[str, Any]] = []
    for piece in pieces_of(trainer):
        if piece.replica:
            continue
        found = piece.tensors() if optimizer else {PARAM: piece.part(piece.main)}
        for kind, tensor in found.items():
            name = f"{len(noted)}.{kind}"
            tensors[name] = memory.copy(name, tensor, None if optimizer else piece.dtype)
        noted.append(
            {**vars(piece.box), "start": piece.start, "stop": piece.stop, "kinds": list(found)}
            | ({"steps": _steps(piece)} if optimizer else {})
        )
    notes: dict[str, Any] = {"pieces": noted}
    if random:
        tensors |= {RANDOM + name: state for name, state in random_tensors().items()}
        notes["random"] = random_notes()
    return Snapshot(tensors=tensors, notes=notes)


def _steps(piece: Piece) -> dict[str, float]:
    """How many steps the optimizer took; torch keeps that by weight, others by group."""
    places = {"state": piece.state, "group": piece.group}
    return {place: float(values[STEP]) for place, values in places.items() if STEP in values}


@dataclass(frozen=True, kw_only=True)
class _Source:
    """A piece in a file."""

    box: Box
    start: int
    stop: int
    kinds: tuple[str, ...]
    steps: dict[str, float]
    file: Tensors
    number: int

    def read(self, kind: str) -> Tensor:
        tensor = self.file[f"{self.number}.{kind}"]
        assert tensor.numel() == self.stop - self.start, f"{self.box.key} is as long as its note says"
        return tensor


class SavedState:
    """The state in a folder, checked to be whole.

    Args:
        folder: ``iter_…/state``.
        processes: how many wrote it.

    Raises:
        CheckpointError: a file is missing or damaged.
    """

    def __init__(self, folder: Path, processes: int) -> None:
        self.folder = folder
        self.files = [Tensors(folder / rank_file(rank)) for rank in range(processes)]
        self.sources: dict[str, list[_Source]] = defaultdict(list)
        for file in self.files:
            for number, note in enumerate(file.notes["pieces"]):
                box = Box(key=note["key"], **{k: tuple(note[k]) for k in ("whole", "offset", "shape")})
                source = _Source(
                    box=box, start=note["start"], stop=note["stop"], kinds=tuple(note["kinds"]),
                    steps=note.get("steps", {}), file=file, number=number,
                )  # fmt: skip
                self.sources[box.key].append(source)

    @property
    def keys(self) -> frozenset[str]:
        """Names of all weights in it."""
        return frozenset(self.sources)

    @property
    def has_optimizer(self) -> bool:
        """Whether it holds more than weights."""
        return any("steps" in note for file in self.files for note in file.notes["pieces"])

    def load(self, trainer: Trainer, *, optimizer: bool) -> frozenset[str]:
        """Fill this process's part; :func:`set_weights` must follow, on all of them.

        Returns:
            Names of the weights that were asked for.

        Raises:
            CheckpointError: it is of another model, or damaged.
        """
        pieces = pieces_of(trainer)
        for piece in pieces:
            sources = self._sources_of(piece.box)
            kinds = sources[0].kinds if optimizer else (PARAM,)
            for kind in kinds:
                values = assembled(piece, kind, sources)
                if kind != PARAM and kind not in piece.state:
                    piece.state[kind] = torch.zeros_like(piece.main.detach(), dtype=values.dtype)
                target = piece.main if kind == PARAM else piece.state[kind]
                piece.part(target).copy_(values)
            if optimizer:
                _set_steps(piece, sources[0].steps)
        return frozenset(piece.box.key for piece in pieces)

    def set_random(self, rank: int) -> None:
        """Go on with the random state of a process, where there is one."""
        file = self.files[rank]
        if "random" in file.notes:
            names = [name for name in file.names if name.startswith(RANDOM)]
            set_random({name.removeprefix(RANDOM): file[name] for name in names}, file.notes["random"])

    def _sources_of(self, box: Box) -> list[_Source]:
        sources = self.sources.get(box.key, [])
        if not sources or sources[0].box.whole != box.whole:
            found = f"in the shape {list(sources[0].box.whole)}, not" if sources else "not;"
            raise CheckpointError(
                f"{self.folder} is of another model: it holds {box.key} {found} {list(box.whole)}; use the model and"
                " the settings of the run that it is from, or another output.dir"
            )
        return sources


def _set_steps(piece: Piece, steps: dict[str, float]) -> None:
    if "state" in steps:
        on_device = piece.group.get("fused") or piece.group.get("capturable")
        # One for each weight: a shared one would be counted up once a weight.
        piece.state[STEP] = torch.tensor(
            steps["state"], dtype=torch.float32, device=piece.main.device if on_device else "cpu"
        )
    if "group" in steps:
        piece.group[STEP] = int(steps["group"])


def assembled(piece: Piece, kind: str, sources: list[_Source]) -> Tensor:
    """The piece's values, flat, from whatever pieces there are."""
    same = [source for source in sources if source.box == piece.box]
    if same:
        return _range(kind, same, piece.start, piece.stop)
    parts = defaultdict(list)
    for source in sources:
        if all(low < high for low, high in _common(source.box, piece.box)):
            parts[source.box].append(source)
    filled, out = 0, None
    for box, held in parts.items():
        values = _range(kind, held, 0, box.size).view(box.shape)
        out = values.new_empty(piece.box.shape) if out is None else out
        common = _common(box, piece.box)
        there = tuple(slice(low - at, high - at) for (low, high), at in zip(common, box.offset, strict=True))
        here = tuple(slice(low - at, high - at) for (low, high), at in zip(common, piece.box.offset, strict=True))
        out[here] = values[there]
        filled += values[there].numel()
    if out is None or filled != piece.box.size:
        raise _incomplete(sources)
    return out.reshape(-1)[piece.start : piece.stop]


def _range(kind: str, sources: Iterable[_Source], start: int, stop: int) -> Tensor:
    """A flat range of one box."""
    out, filled, held = None, 0, list(sources)
    for source in held:
        low, high = max(start, source.start), min(stop, source.stop)
        if low < high:
            values = source.read(kind)
            out = values.new_empty(stop - start) if out is None else out
            out[low - start : high - start] = values[low - source.start : high - source.start]
            filled += high - low
    if out is None or filled != stop - start:
        raise _incomplete(held)
    return out


def _common(one: Box, other: Box) -> list[tuple[int, int]]:
    """In each dimension, where the two overlap."""
    return [
        (max(a, b), min(a + m, b + n))
        for a, m, b, n in zip(one.offset, one.shape, other.offset, other.shape, strict=True)
    ]


def _incomplete(sources: list[_Source]) -> CheckpointError:
    return CheckpointError(f"{sources[0].file.path.parent} does not hold all of {sources[0].box.key}")


__all__ = ["HostMemory", "SavedState", "Snapshot", "rank_file", "set_weights", "snapshot"]
