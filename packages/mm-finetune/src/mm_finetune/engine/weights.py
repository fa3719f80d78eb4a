"""Checkpoints in the Megatron-style layout of mm-convert, in and out of a training stage.

The decoder's names are the layout's own. The vision tower is transformers', whole on the first stage,
while the layout cuts it over tensor-parallel ranks: mm-convert's rules join it on the way in and cut it
on the way out.
"""

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
    Segment,
    assemble,
    megatron_reader,
    relate,
)
from mm_convert.megatron import CHECKPOINT_VERSION, RANK_FILE, TRACKER, load_rank_file, spec_of
from mm_finetune.config import ParallelConfig
from mm_finetune.engine.model import QwenVL
from mm_finetune.engine.parallel import Ranks
from mm_finetune.errors import CheckpointError
from mm_finetune.families import family_of

DECODER = "text_decoder."
TOWER = "visual."
# Section of a rank's file, part of the model, name in it.
Held: TypeAlias = dict[str, dict[str, dict[str, Tensor]]]


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A weight of this process.

    Attributes:
        root: the part of the model that it is in.
        path: its name in there.
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

    def load(self, model: QwenVL, ranks: Ranks) -> None:
        """Fill this process's weights."""
        path = self.folder.directory / self.layout.rank_dir(ranks.tp_rank, ranks.pp_rank) / RANK_FILE
        sections = load_rank_file(path)
        for number, chunk in enumerate(model):
            held = sections.get(section_name(ranks, number), {})
            decoder = {name.removeprefix(DECODER): t for name, t in held.items() if name.startswith(DECODER)}
            _load(chunk.text_decoder, decoder)
            if chunk.visual is not None:
                read = megatron_reader(self.folder)
                _load(chunk.visual, {n: assemble(self.plan, ref, read) for n, ref in self._tower_names().items()})

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
            for path, _ in chunk.text_decoder.named_parameters():
                published = held[Ref(file, section, DECODER + path)]
                yield Weight(root=chunk.text_decoder, path=path, published=published)
            if chunk.visual is not None:
                for path, _ in chunk.visual.named_parameters():
                    yield Weight(root=chunk.visual, path=path, published=(TOWER + path,))

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
            modules = {DECODER: chunk.text_decoder, TOWER: chunk.visual}
            sections[section_name(ranks, number)] = {
                part: {name: copy(f"{number}.{part}{name}", t) for name, t in _tensors(module).items()}
                for part, module in modules.items()
                if module is not None
            }
        return sections

    def write(self, held: Held, ranks: Ranks, folder: Path, iteration: int) -> None:
        """Write what :meth:`held` gave into the folder of an iteration; it is made where it is missing.

        Raises:
            OSError: the disk is full, for example.
        """
        if not held:
            return
        sections: dict[str, Any] = {
            section: (self._cut_tower(parts[TOWER], ranks.tp_rank) if TOWER in parts else {})
            | {DECODER + name: tensor for name, tensor in parts[DECODER].items()}
            for section, parts in held.items()
        }
        target = folder / self.layout.rank_dir(ranks.tp_rank, ranks.pp_rank)
        target.mkdir(parents=True, exist_ok=True)
        try:
            with (target / RANK_FILE).open("wb") as file:
                torch.save({**sections, "iteration": iteration, "checkpoint_version": CHECKPOINT_VERSION}, file)
                file.flush()
                os.fsync(file.fileno())
        except RuntimeError as error:
            # What torch makes of an error in the middle of its writing.
            raise OSError(f"{target / RANK_FILE} can't be written: {error}") from error

    def _tower_names(self) -> dict[str, Ref]:
        """The tower's own parameter names, and the Hugging Face tensors that they are."""
        canonical = {self.converter.family.canonical(ref.name): ref for ref in self.hf.tensors}
        return {name.removeprefix(TOWER): ref for name, ref in canonical.items() if name.startswith(TOWER)}

    def _cut_tower(self, tower: dict[str, Tensor], tp_rank: int) -> dict[str, Tensor]:
        """The tower's slices of one tensor-parallel rank, under the layout's names."""
        sources = {Ref("", "", TOWER + name): spec_of(t) for name, t in tower.items()}
        targets, segments = relate(self.converter.family, self.sizes, self.layout, sources, parts=("vit",))
        plan = Plan.build(sources, targets, segments)

        def read(segment: Segment) -> Tensor:
            tensor = tower[segment.source.name.removeprefix(TOWER)]
            return tensor.narrow(segment.dim, segment.source_start, segment.length)

        file = f"{self.layout.rank_dir(tp_rank, 0)}/{RANK_FILE}"
        return {ref.name: assemble(plan, ref, read) for ref in targets if ref.file == file}


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
    elsewhere = sum(map(sum, layout.vit_pp_layers)) - layout.vit_pp_layers[0][0]
    if elsewhere or any(0 in row for row in layout.llm_pp_layers):
        raise CheckpointError(
            f"{mm_dir} has {layout}; training wants every vision layer on the first stage and a language layer on"
            " each: for example llm_pp_layers [[12,16]], vit_pp_layers [[32,0]]"
        )


def _sizes(tp_size: int, pp_size: int, vpp_size: int) -> str:
    virtual = f" with {vpp_size} virtual stages each" if vpp_size > 1 else ""
    return f"tp_size {tp_size} and pp_size {pp_size}{virtual}"


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
