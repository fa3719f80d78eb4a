"""Checkpoints in the Megatron-style layout of mm-convert, in and out of a training stage, whose names they have."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from mm_convert import (
    Converter,
    ConvertError,
    HuggingFaceFolder,
    Layout,
    MegatronFolder,
    Plan,
    Ref,
)
from mm_convert.megatron import CHECKPOINT_VERSION, RANK_FILE, TRACKER, load_rank_file
from mm_finetune.config import ParallelConfig
from mm_finetune.engine.model import Chunk, QwenVL
from mm_finetune.engine.parallel import Ranks
from mm_finetune.engine.stages import Stages
from mm_finetune.errors import CheckpointError
from mm_finetune.families import family_of

EMBEDDING, OUTPUT = "text_decoder.embedding.word_embeddings.weight", "text_decoder.output_layer.weight"
# Section of a rank's file, name in it.
Held: TypeAlias = dict[str, dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A weight of this process.

    Attributes:
        root: the part of the model that it is in.
        path: its name in there, and in the layout.
        published: the names of the Hugging Face tensors that it holds, whole or in part.
    """

    root: torch.nn.Module
    path: str
    published: tuple[str, ...]

    @property
    def parameter(self) -> torch.nn.Parameter:
        """The weight itself."""
        return self.root.get_parameter(self.path)


class Checkpoint:
    """A converted model, opened and checked against the run before anything is built.

    Args:
        mm_dir: Megatron-style folder.
        hf_dir: Hugging Face folder of the same model.
        parallel: the run's parallel sizes.

    Raises:
        CheckpointError: incomplete, of another model, or of another layout than the run's.
    """

    def __init__(self, mm_dir: Path, hf_dir: Path, parallel: ParallelConfig) -> None:
        try:
            self.folder = MegatronFolder.open(mm_dir)
            self.hf = HuggingFaceFolder.open(hf_dir)
            self.converter = Converter.named(family_of(self.hf.config.get("model_type")).converter)
            self.sizes = self.converter.sizes(self.hf)
            self.plan: Plan = self.converter.plan_mm_to_hf(self.folder, self.hf)
        except ConvertError as error:
            raise CheckpointError(str(error)) from error
        self.layout: Layout = self.folder.layout
        _check_layout(mm_dir, self.layout, parallel)
        self.stages = Stages.of(self.layout)

    def load(self, model: QwenVL, ranks: Ranks) -> None:
        """Fill this process's weights."""
        path = self.folder.directory / self.layout.rank_dir(ranks.tp_rank, ranks.pp_rank) / RANK_FILE
        sections = load_rank_file(path)
        for number, chunk in enumerate(model):
            held = sections.get(section_name(ranks, number), {})
            if _one_for_both(chunk):
                held = {name: tensor for name, tensor in held.items() if name != OUTPUT}
            _load(chunk, held)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight of the whole model by its published name."""
        canonical = self.converter.family.canonical
        return {canonical(ref.name): tuple(spec.shape) for ref, spec in sorted(self.hf.tensors.items())}

    def published(self) -> dict[Ref, tuple[str, ...]]:
        """The published weights that each of the layout's holds, by its file, section and name."""
        canonical = self.converter.family.canonical
        held: dict[Ref, set[str]] = {}
        for part in (self.plan.writes, self.plan.checks):
            for target, segments in part.items():
                for segment in segments:
                    held.setdefault(segment.source, set()).add(canonical(target.name))
        return {place: tuple(sorted(names)) for place, names in held.items()}

    def weights_of(self, model: QwenVL, ranks: Ranks) -> Iterator[Weight]:
        """Every weight of this process's part, with the published ones that it holds; call it before any is added."""
        held = self.published()
        file = f"{self.layout.rank_dir(ranks.tp_rank, ranks.pp_rank)}/{RANK_FILE}"
        for number, chunk in enumerate(model):
            section = section_name(ranks, number)
            for path, _ in chunk.named_parameters():
                yield Weight(root=chunk, path=path, published=held[Ref(file, section, path)])

    def save(self, model: QwenVL, ranks: Ranks, directory: Path, iteration: int) -> None:
        """Write this rank's file; when all have, give the folder its name and move the tracker; all ranks must call."""
        partial = partial_folder(directory, iteration)
        if ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        dist.barrier()
        self.write(self.held(model, ranks), ranks, partial, iteration)
        dist.barrier()
        if ranks.rank == 0:
            publish(directory, iteration)
        dist.barrier()

    def held(
        self, model: QwenVL, ranks: Ranks, copy: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor.cpu()
    ) -> Held:
        """This rank's weights on the CPU; nothing on data-parallel ranks that need not write.

        Args:
            model: this process's part.
            ranks: where it stands.
            copy: brings a tensor to the CPU; told a name for it.
        """
        if ranks.dp_rank:
            return {}
        sections: Held = {}
        for number, chunk in enumerate(model):
            tensors = _tensors(chunk)
            if _one_for_both(chunk) and ranks.pp_size > 1:
                # In a pipeline the layout has it twice, wherever the ends are.
                tensors[OUTPUT] = tensors[EMBEDDING]
            sections[section_name(ranks, number)] = {name: copy(f"{number}.{name}", t) for name, t in tensors.items()}
        return sections

    def write(self, held: Held, ranks: Ranks, folder: Path, iteration: int) -> None:
        """Write what :meth:`held` gave into the folder of an iteration; it is made where it is missing.

        Raises:
            OSError: the disk is full, for example.
        """
        if not held:
            return
        target = folder / self.layout.rank_dir(ranks.tp_rank, ranks.pp_rank)
        target.mkdir(parents=True, exist_ok=True)
        try:
            with (target / RANK_FILE).open("wb") as file:
                torch.save({**held, "iteration": iteration, "checkpoint_version": CHECKPOINT_VERSION}, file)
                file.flush()
                os.fsync(file.fileno())
        except RuntimeError as error:
            # What torch makes of an error in the middle of its writing.
            raise OSError(f"{target / RANK_FILE} can't be written: {error}") from error


def partial_folder(directory: Path, iteration: int) -> Path:
    """Where the checkpoint of an iteration is written, until it is whole."""
    return directory / f".iter_{iteration:07d}.partial"


def publish(directory: Path, iteration: int) -> Path:
    """Give a whole checkpoint its name, then move the tracker to it."""
    folder = directory / f"iter_{iteration:07d}"
    shutil.rmtree(folder, ignore_errors=True)
    partial_folder(directory, iteration).rename(folder)
    tracker = directory / f".{TRACKER}.partial"
    write_synced(tracker, str(iteration))
    tracker.replace(directory / TRACKER)
    return folder


def write_synced(path: Path, text: str) -> None:
    """Write a file that is on the disk when this returns."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def section_name(ranks: Ranks, number: int) -> str:
    """The entry of a rank's file that holds one of the process's chunks."""
    return f"model{number}" if ranks.vpp_size > 1 else "model"


def _check_layout(mm_dir: Path, layout: Layout, parallel: ParallelConfig) -> None:
    found, asked = (_sizes(sizes.tp_size, sizes.pp_size, sizes.vpp_size) for sizes in (layout, parallel))
    if found != asked:
        vpp = f" parallel.vpp_size={layout.vpp_size}" if layout.vpp_size != parallel.vpp_size else ""
        raise CheckpointError(
            f"{mm_dir} is cut for {found}, the run asks for {asked}; convert it for the run's layout, or set"
            f" parallel.tp_size={layout.tp_size} parallel.pp_size={layout.pp_size}{vpp}"
        )


def _sizes(tp_size: int, pp_size: int, vpp_size: int) -> str:
    virtual = f" with {vpp_size} virtual stages each" if vpp_size > 1 else ""
    return f"tp_size {tp_size} and pp_size {pp_size}{virtual}"


def _one_for_both(chunk: Chunk) -> bool:
    """One weight is embedding and output layer."""
    return chunk.share_embeddings_and_output_weights and chunk.pre_process and chunk.post_process


def _tensors(module: torch.nn.Module) -> dict[str, Tensor]:
    """A module's weights; megatron's state also holds entries that are no tensors."""
    return {name: t.detach() for name, t in module.state_dict().items() if isinstance(t, Tensor)}


def _load(module: torch.nn.Module, tensors: dict[str, Tensor]) -> None:
    expected = _tensors(module)
    if tensors.keys() != expected.keys():
        odd = sorted(tensors.keys() ^ expected.keys())
        raise CheckpointError(f"the checkpoint and the model differ in {len(odd)} tensors: {', '.join(odd[:5])}")
    with torch.no_grad():
        state: dict[str, Any] = module.state_dict()
        for name, tensor in tensors.items():
            state[name].copy_(tensor)
