"""The verbs: plan and carry out a conversion between folders."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from mm_convert.errors import LayoutError, ModelError
from mm_convert.families import Family, family
from mm_convert.families.family import ModelSizes
from mm_convert.huggingface import INDEX, SINGLE, HuggingFaceFolder
from mm_convert.journal import MANIFEST
from mm_convert.layout import Layout
from mm_convert.megatron import CHECKPOINT_VERSION, RANK_FILE, TRACKER, MegatronFolder
from mm_convert.output import check_free
from mm_convert.plan import Plan
from mm_convert.relate import check_same, relate
from mm_convert.safetensors_file import SafetensorsLayout
from mm_convert.torch_layout import TorchLayout


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

    def sizes(self, hf: HuggingFaceFolder) -> ModelSizes:
        """The model's numbers.

        Raises:
            ModelError: another model, or numbers missing.
        """
        model_type = hf.config.get("model_type")
        if model_type not in self.family.model_types:
            raise ModelError(
                f"{hf.directory / 'config.json'} says model_type {model_type!r}; this converter is for"
                f" {', '.join(self.family.model_types)}"
            )
        return self.family.sizes(hf.config)

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
        from mm_convert.execute import Target, execute

        _check_target(Path(mm_dir), [Path(hf_dir)], overwrite=overwrite, resume=resume)
        hf = HuggingFaceFolder.open(hf_dir)
        plan = self.plan_hf_to_mm(hf, layout)
        target = Target(
            directory=Path(mm_dir),
            layouts=_rank_layouts(plan, layout),
            inside="release",
            others={TRACKER: b"release"},
            options={"command": "hf_to_mm", "layout": str(layout)},
        )
        execute(plan, hf.files, target, overwrite=overwrite, resume=resume, workers=workers)
        return plan

    def mm_to_hf(
        self,
        mm_dir: str | Path,
        hf_dir: str | Path,
        save_hf_dir: str | Path,
        *,
        layout: Layout | None = None,
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
        from mm_convert.execute import Target, execute

        _check_target(Path(save_hf_dir), [Path(hf_dir), Path(mm_dir)], overwrite=overwrite, resume=resume)
        hf = HuggingFaceFolder.open(hf_dir)
        mm = MegatronFolder.open(mm_dir)
        if layout is not None and layout != mm.layout:
            raise LayoutError(f"given: {layout}; but {mm.directory} holds: {mm.layout}")
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
        execute(plan, mm.files, target, overwrite=overwrite, resume=resume, workers=workers)
        return plan


def _check_target(target: Path, sources: list[Path], *, overwrite: bool, resume: bool) -> None:
    """Fail early if the target may not be written; whether a finished one is what is wanted shows later."""
    may_be_finished = resume and (target / MANIFEST).is_file()
    check_free(target, overwrite=overwrite or may_be_finished, sources=sources)


def _rank_layouts(plan: Plan, layout: Layout) -> dict[str, TorchLayout]:
    files = plan.files()
    numbers = {"checkpoint_version": CHECKPOINT_VERSION}
    stem = RANK_FILE.removesuffix(".pt")
    return {
        file: TorchLayout.of(stem, sections, {ref: plan.targets[ref] for ref in files.get(file, [])}, numbers)
        for file, sections in rank_sections(layout).items()
    }


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
