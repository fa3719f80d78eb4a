"""The verbs: plan and carry out a conversion between folders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mm_convert.errors import LayoutError, ModelError
from mm_convert.execute import Target, execute
from mm_convert.families import Family, family
from mm_convert.families.family import ModelSizes
from mm_convert.huggingface import INDEX, SINGLE, HuggingFaceFolder, read_config
from mm_convert.journal import MANIFEST
from mm_convert.layout import GivenLayout, Layout
from mm_convert.megatron import CHECKPOINT_VERSION, RANK_FILE, TRACKER, MegatronFolder
from mm_convert.model_sizes import sizes_on_disk
from mm_convert.output import check_free
from mm_convert.plan import Plan
from mm_convert.relate import check_same, relate
from mm_convert.resplit import plan_resplit
from mm_convert.safetensors_file import SafetensorsLayout
from mm_convert.stored import StoredFile
from mm_convert.torch_layout import TorchLayout

__all__ = ["Conversion", "Converter", "rank_sections"]


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """A conversion that was planned: nothing is written before :meth:`run`.

    Attributes:
        plan: what goes where, proved total.
        source: what is read, in words.
        files: the files that are read, by their names in the plan.
        target: the folder to write.
    """

    plan: Plan
    source: str
    files: Mapping[str, StoredFile]
    target: Target

    def run(self, *, overwrite: bool = False, resume: bool = False, workers: int | None = None) -> Plan:
        """Carry it out.

        Args:
            overwrite: replace an existing checkpoint.
            resume: go on where an earlier run was broken off; a finished result is left as it is.
            workers: threads that copy (default: the processors, at most 4).

        Raises:
            ConvertError: see :mod:`mm_convert.errors`; nothing is left behind.
        """
        execute(self.plan, self.files, self.target, overwrite=overwrite, resume=resume, workers=workers)
        return self.plan


@dataclass(frozen=True, kw_only=True)
class Converter:
    """A published converter: ``Converter.named("Qwen2_5_VLConverter").hf_to_mm(…)``.

    Attributes:
        family: the rules of the model family.
    """

    family: Family

    @classmethod
    def named(cls, name: str) -> Converter:
        """The converter of a published name.

        Raises:
            ModelError: no such converter.
        """
        return cls(family=family(name))

    @classmethod
    def of(cls, directory: str | Path) -> Converter:
        """The converter for a folder, Hugging Face or Megatron, from names and headers.

        Raises:
            CheckpointError: no checkpoint, or a damaged one.
            ModelError: a model that no converter knows.
        """
        from mm_convert.inspection import inspect

        found = inspect(directory)
        if not found.converters:
            raise ModelError(f"{directory} holds no model that a converter knows (model_type {found.model_type!r})")
        return cls.named(found.converters[0])

    def sizes(self, hf: HuggingFaceFolder) -> ModelSizes:
        """The model's numbers.

        Raises:
            ModelError: another model, or numbers missing.
        """
        return self._sizes(hf.config, hf.directory)

    def plan_hf_to_mm(self, hf: HuggingFaceFolder, layout: Layout) -> Plan:
        """Plan Hugging Face → Megatron.

        Raises:
            ConvertError: the layout or the checkpoint does not fit.
        """
        targets, segments = relate(self.family, self.sizes(hf), layout, hf.tensors)
        return Plan.build(hf.tensors, targets, segments)

    def plan_mm_to_hf(self, mm: MegatronFolder, hf: HuggingFaceFolder) -> Plan:
        """Plan Megatron → Hugging Face, with the names, shapes and shards of `hf`.

        Raises:
            ConvertError: the checkpoint does not fit the model.
        """
        made, segments = relate(self.family, self.sizes(hf), mm.layout, hf.tensors)
        check_same(mm.tensors, made, str(mm.directory))
        backwards = [segment.reversed() for segment in segments]
        dtypes = {segment.target: mm.tensors[segment.source].dtype for segment in backwards}
        targets = {ref: replace(spec, dtype=dtypes[ref]) for ref, spec in hf.tensors.items()}
        return Plan.build(mm.tensors, targets, backwards)

    def plan_resplit(self, mm: MegatronFolder, target: Layout, *, hf_dir: str | Path | None = None) -> Plan:
        """Plan Megatron → Megatron of another layout.

        Args:
            mm: the checkpoint to read.
            target: the layout to write.
            hf_dir: a folder with the model's ``config.json``, where tensors alone don't tell enough.

        Raises:
            ConvertError: the checkpoint is not whole, the layout does not fit, or the number of heads is not known.
        """
        if hf_dir is None:
            sizes = sizes_on_disk(mm, target)
        else:
            sizes = self._sizes(read_config(Path(hf_dir)), Path(hf_dir))
        return plan_resplit(self.family, sizes, mm, target)

    def prepare_hf_to_mm(self, hf_dir: str | Path, mm_dir: str | Path, layout: Layout) -> Conversion:
        """Plan what :meth:`hf_to_mm` does; only headers are read.

        Raises:
            ConvertError: the layout or the checkpoint does not fit.
        """
        hf = HuggingFaceFolder.open(hf_dir)
        plan = self.plan_hf_to_mm(hf, layout)
        target = _megatron_target(plan, layout, Path(mm_dir), {"command": "hf_to_mm", "layout": str(layout)})
        return Conversion(plan=plan, source=f"{hf_dir} (Hugging Face)", files=hf.files, target=target)

    def prepare_mm_to_hf(
        self, mm_dir: str | Path, hf_dir: str | Path, save_hf_dir: str | Path, *, layout: Layout | GivenLayout | None
    ) -> Conversion:
        """Plan what :meth:`mm_to_hf` does; only headers are read.

        Raises:
            ConvertError: the checkpoint does not fit the model, or its layout is not the given one.
        """
        hf = HuggingFaceFolder.open(hf_dir)
        mm = _opened(mm_dir, layout)
        plan = self.plan_mm_to_hf(mm, hf)
        target = Target(
            directory=Path(save_hf_dir),
            layouts={
                file: SafetensorsLayout.of({ref: plan.targets[ref] for ref in refs})
                for file, refs in plan.files().items()
            },
            others={**_index(plan), **{path.name: path for path in hf.other_files()}},
            options={"command": "mm_to_hf", "layout": str(mm.layout)},
        )
        return Conversion(plan=plan, source=f"{mm.directory} ({mm.layout})", files=mm.files, target=target)

    def prepare_resplit(
        self,
        source_dir: str | Path,
        target_dir: str | Path,
        target: Layout,
        *,
        source: Layout | GivenLayout | None = None,
        hf_dir: str | Path | None = None,
    ) -> Conversion:
        """Plan what :meth:`resplit` does; only headers are read.

        Raises:
            ConvertError: the checkpoint is not whole or not of the given layout, or the new layout does not fit.
        """
        mm = _opened(source_dir, source)
        plan = self.plan_resplit(mm, target, hf_dir=hf_dir)
        options = {"command": "resplit", "source_layout": str(mm.layout), "layout": str(target)}
        made = _megatron_target(plan, target, Path(target_dir), options)
        return Conversion(plan=plan, source=f"{mm.directory} ({mm.layout})", files=mm.files, target=made)

    def hf_to_mm(
        self,
        hf_dir: str | Path,
        mm_dir: str | Path,
        layout: Layout,
        *,
        overwrite: bool = False,
        resume: bool = False,
        workers: int | None = None,
    ) -> Plan:
        """Convert a Hugging Face folder to a new Megatron folder.

        Args:
            hf_dir: the Hugging Face folder.
            mm_dir: the new folder.
            layout: how to cut the model.
            overwrite: replace an existing checkpoint.
            resume: go on where an earlier run was broken off; a finished result is left as it is.
            workers: threads that copy (default: the processors, at most 4).

        Raises:
            ConvertError: see :mod:`mm_convert.errors`; nothing is left behind.
        """
        _check_target(Path(mm_dir), [Path(hf_dir)], overwrite=overwrite, resume=resume)
        conversion = self.prepare_hf_to_mm(hf_dir, mm_dir, layout)
        return conversion.run(overwrite=overwrite, resume=resume, workers=workers)

    def mm_to_hf(
        self,
        mm_dir: str | Path,
        hf_dir: str | Path,
        save_hf_dir: str | Path,
        *,
        layout: Layout | GivenLayout | None = None,
        overwrite: bool = False,
        resume: bool = False,
        workers: int | None = None,
    ) -> Plan:
        """Convert a Megatron folder to a new Hugging Face folder.

        Args:
            mm_dir: the Megatron folder.
            hf_dir: the template: configuration, tokenizer, names and shards.
            save_hf_dir: the new folder.
            layout: what the caller believes; the layout itself is read from disk.
            overwrite: replace an existing checkpoint.
            resume: go on where an earlier run was broken off; a finished result is left as it is.
            workers: threads that copy (default: the processors, at most 4).

        Raises:
            ConvertError: see :mod:`mm_convert.errors`; nothing is left behind.
        """
        _check_target(Path(save_hf_dir), [Path(hf_dir), Path(mm_dir)], overwrite=overwrite, resume=resume)
        conversion = self.prepare_mm_to_hf(mm_dir, hf_dir, save_hf_dir, layout=layout)
        return conversion.run(overwrite=overwrite, resume=resume, workers=workers)

    def resplit(
        self,
        source_dir: str | Path,
        target_dir: str | Path,
        target: Layout,
        *,
        source: Layout | GivenLayout | None = None,
        hf_dir: str | Path | None = None,
        overwrite: bool = False,
        resume: bool = False,
        workers: int | None = None,
    ) -> Plan:
        """Convert a Megatron folder to a new one of another layout: the bytes that hf_to_mm would give.

        Args:
            source_dir: the Megatron folder.
            target_dir: the new folder.
            target: how to cut the model.
            source: what the caller believes of the source; its layout itself is read from disk.
            hf_dir: a folder with the model's ``config.json``, where tensors alone don't tell the number of heads.
            overwrite: replace an existing checkpoint.
            resume: go on where an earlier run was broken off; a finished result is left as it is.
            workers: threads that copy (default: the processors, at most 4).

        Raises:
            ConvertError: see :mod:`mm_convert.errors`; nothing is left behind.
        """
        _check_target(Path(target_dir), [Path(source_dir)], overwrite=overwrite, resume=resume)
        conversion = self.prepare_resplit(source_dir, target_dir, target, source=source, hf_dir=hf_dir)
        return conversion.run(overwrite=overwrite, resume=resume, workers=workers)

    def _sizes(self, config: Mapping[str, object], directory: Path) -> ModelSizes:
        if not self.family.accepts(config):
            raise ModelError(
                f"{directory / 'config.json'} says model_type {config.get('model_type')!r}; this converter is for"
                f" {', '.join(self.family.model_types)}"
            )
        return self.family.sizes(config)


def _opened(directory: str | Path, given: Layout | GivenLayout | None) -> MegatronFolder:
    mm = MegatronFolder.open(directory)
    if isinstance(given, GivenLayout):
        given.check(mm.layout, mm.directory)
    elif given is not None and given != mm.layout:
        raise LayoutError(f"given: {given}; but {mm.directory} holds: {mm.layout}")
    return mm


def _check_target(target: Path, sources: list[Path], *, overwrite: bool, resume: bool) -> None:
    """Fail early if the target may not be written; whether a finished one is what is wanted shows later."""
    may_be_finished = resume and (target / MANIFEST).is_file()
    check_free(target, overwrite=overwrite or may_be_finished, sources=sources)


def _megatron_target(plan: Plan, layout: Layout, directory: Path, options: Mapping[str, str]) -> Target:
    files = plan.files()
    numbers = {"checkpoint_version": CHECKPOINT_VERSION}
    stem = RANK_FILE.removesuffix(".pt")
    layouts = {
        file: TorchLayout.of(stem, sections, {ref: plan.targets[ref] for ref in files.get(file, [])}, numbers)
        for file, sections in rank_sections(layout).items()
    }
    others = {TRACKER: b"release"}
    return Target(directory=directory, layouts=layouts, inside="release", others=others, options=options)


def _index(plan: Plan) -> dict[str, bytes]:
    """``model.safetensors.index.json``, unless one file holds everything."""
    if set(plan.files()) == {SINGLE}:
        return {}
    weight_map = {ref.name: ref.file for ref in sorted(plan.targets, key=lambda ref: ref.name)}
    text = json.dumps({"metadata": {"total_size": plan.nbytes}, "weight_map": weight_map}, indent=2)
    return {INDEX: (text + "\n").encode()}


def rank_sections(layout: Layout) -> dict[str, list[str]]:
    """Every rank's file and the sections in it, those without a tensor included."""
    return {
        f"{layout.rank_dir(t, p)}/{RANK_FILE}": [layout.section(v * layout.pp_size + p) for v in range(layout.vpp_size)]
        for t in range(layout.tp_size)
        for p in range(layout.pp_size)
    }
