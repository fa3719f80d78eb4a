"""Checkpoints in the Megatron-style layout of mm-convert, in and out of a training stage.

The decoder's names are the layout's own. The vision tower is transformers', whole on the first stage,
while the layout cuts it over tensor-parallel ranks: mm-convert's rules join it on the way in and cut it
on the way out.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
from mm_finetune.selection import common_rate, rates_of

CONVERTER = "Qwen2_5_VLConverter"
DECODER = "text_decoder."
TOWER = "visual."


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
            self.converter = Converter.named(CONVERTER)
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

    def freeze(self, model: QwenVL, ranks: Ranks, patterns: Sequence[str]) -> None:
        """Take weights out of training, before the model is wrapped.

        Args:
            model: this process's part.
            ranks: where it stands.
            patterns: see :func:`mm_finetune.selection.rates_of`.

        Raises:
            ConfigError: a pattern matches nothing, nothing is left, or a fused weight would be frozen in part.
        """
        canonical = {ref: self.converter.family.canonical(ref.name) for ref in self.hf.tensors}
        rates = rates_of(sorted(canonical.values()), freeze=patterns, lr_scale={})
        file = f"{self.layout.rank_dir(ranks.tp_rank, ranks.pp_rank)}/{RANK_FILE}"
        made: dict[tuple[str, str], set[str]] = {}
        for part in (self.plan.writes, self.plan.checks):
            for target, segments in part.items():
                for segment in segments:
                    if segment.source.file == file:
                        place = (segment.source.section, segment.source.name)
                        made.setdefault(place, set()).add(canonical[target])
        for number, chunk in enumerate(model):
            section = section_name(ranks, number)
            for name, parameter in chunk.text_decoder.named_parameters():
                parts = sorted(made[section, DECODER + name])
                parameter.requires_grad_(common_rate(DECODER + name, parts, rates) > 0)
            if chunk.visual is not None:
                for name, parameter in chunk.visual.named_parameters():
                    parameter.requires_grad_(rates[TOWER + name] > 0)

    def save(self, model: QwenVL, ranks: Ranks, directory: Path, iteration: int) -> None:
        """Write this rank's file; when all have, give the folder its name and move the tracker.

        Every rank of data-parallel rank 0 writes; all ranks must call.
        """
        name = f"iter_{iteration:07d}"
        partial = directory / f".{name}.partial"
        if ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        if ranks.dp_rank == 0:
            folder = partial / self.layout.rank_dir(ranks.tp_rank, ranks.pp_rank)
            folder.mkdir()
            content = {**self._rank_tensors(model, ranks), "iteration": iteration}
            torch.save({**content, "checkpoint_version": CHECKPOINT_VERSION}, folder / RANK_FILE)
        dist.barrier()
        if ranks.rank == 0:
            shutil.rmtree(directory / name, ignore_errors=True)
            partial.rename(directory / name)
            tracker = directory / f".{TRACKER}.partial"
            tracker.write_text(str(iteration))
            tracker.rename(directory / TRACKER)
        dist.barrier()

    def _tower_names(self) -> dict[str, Ref]:
        """The tower's own parameter names, and the Hugging Face tensors that they are."""
        canonical = {self.converter.family.canonical(ref.name): ref for ref in self.hf.tensors}
        return {name.removeprefix(TOWER): ref for name, ref in canonical.items() if name.startswith(TOWER)}

    def _rank_tensors(self, model: QwenVL, ranks: Ranks) -> dict[str, dict[str, Tensor]]:
        """The sections of this rank's file."""
        sections = {}
        for number, chunk in enumerate(model):
            tensors = {DECODER + name: t for name, t in _tensors(chunk.text_decoder).items()}
            if chunk.visual is not None:
                tensors = self._cut_tower(_tensors(chunk.visual), ranks.tp_rank) | tensors
            sections[section_name(ranks, number)] = tensors
        return sections

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
    """A module's weights on the CPU; megatron's state also holds entries that are no tensors."""
    return {name: t.detach().cpu() for name, t in module.state_dict().items() if isinstance(t, Tensor)}


def _load(module: torch.nn.Module, tensors: dict[str, Tensor]) -> None:
    expected = _tensors(module)
    if tensors.keys() != expected.keys():
        odd = sorted(tensors.keys() ^ expected.keys())
        raise CheckpointError(f"the checkpoint and the model differ in {len(odd)} tensors: {', '.join(odd[:5])}")
    with torch.no_grad():
        state: dict[str, Any] = module.state_dict()
        for name, tensor in tensors.items():
            state[name].copy_(tensor)
