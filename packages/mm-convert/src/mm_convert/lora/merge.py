"""Adapters merged into their base model: ``W + scale * B @ A``, for Hugging Face and Megatron-style folders.

Weights without an adapter keep their bytes. A weight with one is computed in float32 and rounded once, to the dtype in
which it is stored; one that was trained in full beside the adapter (``modules_to_save``) takes the place of the base's.
To the rest of the package a merged weight is a file like others, which exists while it is read: the
proof, the manifest and going on after an interruption are those of every conversion. A worker holds one weight at a
time in memory; the last few lie in the folder for temporary files (``TMPDIR``) while they are copied.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mm_convert.errors import CheckpointError
from mm_convert.families.canonical import as_it_stands
from mm_convert.families.family import Family, ModelSizes
from mm_convert.huggingface import HuggingFaceFolder
from mm_convert.lora.config import CONFIG, TIED, AdapterConfig, AdapterFolder, numbers, read_adapter_config
from mm_convert.lora.conversion import AdapterConverter
from mm_convert.lora.weights import MadeFile, Shelf, Stored
from mm_convert.megatron import TRACKER, MegatronFolder
from mm_convert.model_sizes import sizes_on_disk
from mm_convert.plans import Plan, Ref, Segment, Spec, Specs, listed
from mm_convert.relate import check_same, instances, relate
from mm_convert.resplit import check_dtypes, paper_tensors
from mm_convert.rules import GroupedQKV
from mm_convert.stored import StoredFile
from mm_convert.targets import Conversion, huggingface_target, megatron_target

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 4 << 20  # elements that are computed at a time: 16 MiB of float32
FLOATS = ("F64", "F32", "BF16", "F16")


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What changes a model.

    Attributes:
        tensors: A and B of every module.
        pairs: their addresses by the module's name.
        scales: the factor of B @ A in each module.
        in_full: weights that were trained in full, by their canonical names.
        tied: one that the base has not is a copy: embedding and output layer were kept one weight.
    """

    tensors: Stored
    pairs: Mapping[str, tuple[Ref, Ref]]
    scales: Mapping[str, float]
    in_full: Mapping[str, Ref]
    tied: bool

    def change(self, part: str, weight: Tensor) -> Tensor:
        """The weight of a module with its adapter, or one that was trained in full: the same storage, new numbers."""
        import torch

        if part in self.in_full:
            return weight.copy_(self.tensors.read(self.in_full[part]))
        a, b = (self.tensors.read(ref) for ref in self.pairs[part])
        exact = torch.promote_types(weight.dtype, torch.float32)
        a, b, scale = a.to(exact), b.to(exact), self.scales[part]
        rows = max(1, BLOCK // weight.shape[1])
        for start in range(0, weight.shape[0], rows):
            block = weight[start : start + rows]
            block.copy_(block.to(exact) + (b[start : start + rows] @ a) * scale)
        return weight

    def shape(self, part: str) -> tuple[int, ...]:
        """Of the weight that a module's adapter, or a weight that was trained in full, is for."""
        targets = self.tensors.plan.targets
        if part in self.in_full:
            return targets[self.in_full[part]].shape
        a, b = (targets[ref].shape for ref in self.pairs[part])
        return b[0], a[1]


@dataclass(frozen=True, kw_only=True)
class Merger:
    """Merges adapters into models of a family.

    Args:
        adapters: reads the adapter; its options say what it does not.
        rank: what the adapter's rank should be, as a check.
    """

    adapters: AdapterConverter
    rank: int | None = None

    @property
    def family(self) -> Family:
        """The rules of the model."""
        return self.adapters.family

    def prepare(self, base_dir: str | Path, adapter_dir: str | Path, target: str | Path) -> Conversion:
        """Plan the merging; only headers are read.

        Args:
            base_dir: the model, a Hugging Face or a Megatron-style folder.
            adapter_dir: PEFT's folder, or a Megatron-style one with adapters, of any layout.
            target: the folder to write: of the model's kind and layout.

        Raises:
            ConvertError: the adapter is none that can be merged, or is for another model.
        """
        if (Path(base_dir) / TRACKER).is_file():
            return self._megatron(MegatronFolder.open(base_dir), Path(base_dir), Path(adapter_dir), target)
        return self._hugging_face(HuggingFaceFolder.open(base_dir), Path(adapter_dir), target)

    def adapter(self, directory: Path, sizes: Callable[[], ModelSizes]) -> Adapter:
        """Read an adapter's headers.

        Args:
            directory: PEFT's folder, or a Megatron-style one.
            sizes: gives the base model's numbers, where they are needed.

        Raises:
            ConvertError: it is not whole, or its scale is not known.
        """
        options = self.adapters.options
        whole: list[Ref] = []
        if (directory / TRACKER).is_file():
            mm = self.adapters.opened(directory, sizes())
            stored = Stored(plan=self.adapters.plan_mm_to_hf(mm, sizes()), files=mm.files)
        else:
            folder = AdapterFolder.open(directory, in_full=True)
            stored = Stored(plan=_whole(self.adapters.chosen(folder.tensors)), files=folder.files)
            whole = [ref for ref in folder.in_full if ref in stored.plan.targets]
        config = read_adapter_config(directory, in_full=True) if (directory / CONFIG).is_file() else None
        targets = stored.plan.targets
        self.adapters.check_ranks(targets, config)
        pairs = self.adapters.pairs(targets)
        ranks = {module: targets[a].shape[0] for module, (a, _) in pairs.items()}
        if self.rank is not None and set(ranks.values()) != {self.rank}:
            raise CheckpointError(f"given: lora_rank {self.rank}; {directory} has {sorted(set(ranks.values()))}")
        if config is not None:
            told = numbers(config)
            if options.alpha not in (None, told.alpha):
                raise CheckpointError(f"given: lora_alpha {options.alpha:g}; {directory / CONFIG} says {told.alpha:g}")
        elif options.alpha is None:
            raise CheckpointError(f"{directory} does not say lora_alpha, and has no {CONFIG}: give lora_alpha")
        else:
            told = AdapterConfig(r=1, alpha=options.alpha, rslora=options.rslora)
            told = replace(told, rank_pattern={f"^{re.escape(module)}": rank for module, rank in ranks.items()})
        known = {*whole, *(half for pair in pairs.values() for half in pair)}
        if strange := [ref.name for ref in targets if ref not in known]:
            raise CheckpointError(f"{directory} holds more than lora_A and lora_B: {listed(strange)}")
        scales = {module: told.scale(*self.adapters.spellings(module)) for module in pairs}
        in_full = {self.adapters.table.canonical(ref.name): ref for ref in whole}
        tied = bool(config and config.get(TIED))
        return Adapter(tensors=stored, pairs=pairs, scales=scales, in_full=in_full, tied=tied)

    def _hugging_face(self, hf: HuggingFaceFolder, adapter_dir: Path, target: str | Path) -> Conversion:
        adapter = self.adapter(adapter_dir, lambda: self.adapters.sizes(hf.directory, {}))
        known = {self.family.canonical(ref.name): ref for ref in hf.tensors}
        modules = self._modules(adapter, known, hf.tensors)
        tensors = {ref: replace(spec, shape=spec.shape or (1,)) for ref, spec in hf.tensors.items()}
        base = Stored(plan=_whole(tensors), files=hf.files)
        shelf = Shelf()
        made = {ref: _made(base, ref, adapter, module, shelf) for ref, module in modules.items()}
        sources = {_address(ref) if ref in modules else ref: spec for ref, spec in tensors.items()}
        segments = [
            Segment(_address(ref) if ref in modules else ref, 0, ref, 0, spec.shape[0], 0)
            for ref, spec in tensors.items()
        ]
        options = _options(adapter, layout="Hugging Face")
        return Conversion(
            plan=Plan.build(sources, tensors, segments),
            source=f"{hf.directory} (Hugging Face) and {adapter_dir}",
            files=_files(hf.files, adapter, made),
            target=huggingface_target(hf.tensors, hf, target, options),
            folders=[hf.directory, adapter_dir],
        )

    def _megatron(self, mm: MegatronFolder, base_dir: Path, adapter_dir: Path, target: str | Path) -> Conversion:
        family = as_it_stands(self.family, (ref.name for ref in mm.tensors))
        sizes = self._sizes(family, mm, adapter_dir)
        sizes.check_whole(mm.layout, mm.directory)
        adapter = self.adapter(adapter_dir, lambda: sizes)
        paper = _with_lengths(family, sizes, mm, paper_tensors(family, sizes, mm), self._lengths(adapter))
        modules = self._modules(adapter, {ref.name: ref for ref in paper}, paper)
        expected, segments = relate(family, sizes, mm.layout, paper)
        check_same(mm.tensors, expected, str(mm.directory))
        check_dtypes(mm, expected)
        changed = {segment.target for segment in segments if segment.source in modules}
        onwards = [s._replace(source=_address(s.source)) for s in segments if s.target in changed]
        kept = {ref: spec for ref, spec in expected.items() if ref not in changed}
        needed = {segment.source for segment in segments if segment.target in changed}
        base = Stored(plan=Plan.build(mm.tensors, paper, [s.reversed() for s in segments]), files=mm.files)
        shelf = Shelf()
        made = {ref: _made(base, ref, adapter, modules.get(ref), shelf) for ref in needed}
        copies = [Segment(ref, 0, ref, 0, spec.shape[0], 0) for ref, spec in kept.items()]
        plan = Plan.build({**kept, **{_address(ref): paper[ref] for ref in needed}}, expected, [*onwards, *copies])
        options = _options(adapter, layout=mm.layout.text(generative=self.family.generative))
        return Conversion(
            plan=plan,
            source=f"{mm.directory} ({mm.layout.text(generative=self.family.generative)}) and {adapter_dir}",
            files=_files(mm.files, adapter, made),
            target=megatron_target(plan, mm.layout, target, options, generative=self.family.generative),
            folders=[base_dir, adapter_dir],
        )

    def _sizes(self, family: Family, mm: MegatronFolder, adapter_dir: Path) -> ModelSizes:
        """The model's numbers; where query, key and value are one tensor, only its configuration knows the heads."""
        if self.adapters.options.base_dir is None and (family is not self.family or not family.divided):
            return sizes_on_disk(family, mm, mm.layout)
        config = read_adapter_config(adapter_dir, in_full=True) if (adapter_dir / CONFIG).is_file() else {}
        return self.adapters.sizes(adapter_dir, config)

    def _modules(self, adapter: Adapter, known: Mapping[str, Ref], base: Specs) -> dict[Ref, str]:
        """The modules, and the weights that were trained in full, by the weights that they change.

        Raises:
            CheckpointError: a weight is not there, or of another shape or kind.
        """
        copies = adapter.in_full.keys() - known.keys() if adapter.tied else set()
        weights = {part: name for part, name in self._weights(adapter).items() if part not in copies}
        if absent := [name for name in weights.values() if name not in known]:
            raise CheckpointError(
                f"the base model has no weights for {len(absent)} adapters or layers trained in full: {listed(absent)}"
            )
        for part, name in weights.items():
            spec = base[known[name]]
            if spec.shape != adapter.shape(part) or spec.dtype not in FLOATS:
                raise CheckpointError(
                    f"{name} is {spec.dtype} {list(spec.shape)}, its adapter is for a float weight of"
                    f" {list(adapter.shape(part))}; is it another model's?"
                )
        return {known[name]: part for part, name in weights.items()}

    def _weights(self, adapter: Adapter) -> dict[str, str]:
        """Canonical names of the weights that an adapter changes, by module, or by their own name."""
        modules = {module: self.family.canonical(f"{module}.weight") for module in adapter.pairs}
        return modules | {name: name for name in adapter.in_full}

    def _lengths(self, adapter: Adapter) -> dict[str, int]:
        return {name: adapter.shape(part)[0] for part, name in self._weights(adapter).items()}


def _with_lengths(
    family: Family, sizes: ModelSizes, mm: MegatronFolder, paper: Specs, lengths: Mapping[str, int]
) -> dict[Ref, Spec]:
    """Paper tensors whose lengths are right one by one wherever an adapter tells one of a fused tensor's."""
    made = dict(paper)
    for rule in family.rules(sizes, mm.layout.pp_size):
        if not isinstance(rule.operation, GroupedQKV):
            continue
        for place in instances(rule, sizes, mm.layout):
            query, key, value = (Ref("", "", name) for name in place.hf)
            total = sum(paper[ref].shape[0] for ref in (query, key, value))
            short = next((lengths[ref.name] for ref in (key, value) if ref.name in lengths), None)
            if short is None and query.name in lengths:
                short = (total - lengths[query.name]) // 2
            if short is not None:
                for ref, length in ((query, total - 2 * short), (key, short), (value, short)):
                    made[ref] = replace(paper[ref], shape=(length, *paper[ref].shape[1:]))
    return made


def _whole(tensors: Specs) -> Plan:
    """Every tensor as it is."""
    return Plan.build(tensors, tensors, [Segment(ref, 0, ref, 0, spec.shape[0], 0) for ref, spec in tensors.items()])


def _address(ref: Ref) -> Ref:
    """Where a merged weight is read in a plan."""
    return Ref(f"merged {ref.name}", "", ref.name)


def _made(base: Stored, ref: Ref, adapter: Adapter, module: str | None, shelf: Shelf) -> MadeFile:
    file = base.files[base.plan.writes[ref][0].source.file]
    return MadeFile(
        path=file.path,
        size=file.size,
        mtime_ns=file.mtime_ns,
        header=file.header,
        digest=file.digest,
        specs={("", ref.name): base.plan.targets[ref]},
        offsets={("", ref.name): 0},
        ref=ref,
        shelf=shelf,
        make=lambda: base.read(ref) if module is None else adapter.change(module, base.read(ref)),
    )


def _files(base: Mapping[str, StoredFile], adapter: Adapter, made: Mapping[Ref, MadeFile]) -> dict[str, StoredFile]:
    lora = {f"adapter {name}": file for name, file in adapter.tensors.files.items()}
    return {**base, **lora, **{_address(ref).file: file for ref, file in made.items()}}


def _options(adapter: Adapter, *, layout: str) -> dict[str, object]:
    """For the manifest; the adapter's files may bear the names of the base model's, so they are told apart here."""
    digests = {name: file.digest for name, file in adapter.tensors.files.items()}
    return {"command": "merge_lora_to_base", "layout": layout, "adapter": digests, "scales": dict(adapter.scales)}
