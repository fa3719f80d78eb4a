"""The verbs: plan and carry out a conversion between folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_convert import vocabulary as padding
from mm_convert.errors import LayoutError, ModelError
from mm_convert.families import Family, family
from mm_convert.families.canonical import as_it_stands, unfused
from mm_convert.families.family import ModelSizes
from mm_convert.huggingface import HuggingFaceFolder, read_config
from mm_convert.layout import PARTS, GivenLayout, Layout
from mm_convert.megatron import MegatronFolder
from mm_convert.model_sizes import sizes_on_disk
from mm_convert.original_file import open_model
from mm_convert.plans import Plan, Specs
from mm_convert.relate import relate
from mm_convert.resplit import plan_resplit
from mm_convert.selection import known_names, left_over, only_part, with_language_model
from mm_convert.targets import Conversion, RunOptions, huggingface_target, megatron_target, rank_sections
from mm_convert.template import Template

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Conversion", "Converter", "RunOptions", "rank_sections"]


@dataclass(frozen=True, kw_only=True)
class Converter:
    """A published converter: ``Converter.named("Qwen2_5_VLConverter").hf_to_mm(…)``.

    Attributes:
        family: the rules of the model family.
        canonical: write Megatron-style folders in which query, key and value, and gate and up projection stand apart,
            as adapters want them. What is read tells by itself which structure it has; this is a check then.
    """

    family: Family
    canonical: bool = False

    @classmethod
    def named(cls, name: str, *, canonical: bool = False) -> Converter:
        """The converter of a published name.

        Raises:
            ModelError: no such converter.
        """
        return cls(family=family(name), canonical=canonical)

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
        return self.sizes_of(hf.config, hf.directory)

    def plan_hf_to_mm(
        self, hf: HuggingFaceFolder, layout: Layout, *, unused: Specs | None = None, vit_only: bool = False
    ) -> Plan:
        """Plan Hugging Face → Megatron.

        Args:
            hf: the model.
            layout: how to cut it.
            unused: tensors of `hf` that are left over (default: what the family does not convert).
            vit_only: take the vision part alone.

        Raises:
            ConvertError: the layout or the checkpoint does not fit.
        """
        family, sizes = self._writing(), self.sizes(hf)
        if unused is None and family.kept:
            unused = left_over(family, known_names(family, sizes, layout), hf.tensors, ())
        tensors: Specs = {ref: spec for ref, spec in hf.tensors.items() if ref not in (unused or {})}
        if vit_only:
            tensors = only_part(family, known_names(family, sizes, layout), tensors, "vit")
        sources = replace(hf, tensors=dict(tensors)).unstacked(family.stacked).tensors
        targets, segments = relate(family, sizes, layout, sources, parts=("vit",) if vit_only else PARTS)
        return Plan.build(sources, targets, segments)

    def plan_mm_to_hf(self, mm: MegatronFolder, hf: HuggingFaceFolder) -> Plan:
        """Plan Megatron → Hugging Face, with the names, shapes and shards of `hf`.

        Raises:
            ConvertError: the checkpoint does not fit the model.
        """
        return self._template(mm, hf).plan(mm)

    def plan_resplit(self, mm: MegatronFolder, target: Layout, *, hf_dir: str | Path | None = None) -> Plan:
        """Plan Megatron → Megatron of another layout.

        Args:
            mm: the checkpoint to read.
            target: the layout to write.
            hf_dir: a folder with the model's ``config.json``, where tensors alone don't tell enough.

        Raises:
            ConvertError: the checkpoint is not whole, the layout does not fit, or the number of heads is not known.
        """
        family = self._reading(mm)
        sizes = sizes_on_disk(family, mm, target) if hf_dir is None else self._configured(hf_dir)
        return plan_resplit(family, sizes, mm, target)

    def prepare_hf_to_mm(
        self,
        hf_dir: str | Path,
        mm_dir: str | Path,
        layout: Layout | None,
        *,
        allow_unused: Sequence[str] = (),
        vit_only: bool = False,
        llm_hf_dir: str | Path | None = None,
        tp_size: int = 1,
    ) -> Conversion:
        """Plan what :meth:`hf_to_mm` does; only headers are read.

        Raises:
            ConvertError: the layout or the checkpoint does not fit.
        """
        hf = open_model(Path(hf_dir), self.family)
        sizes = self.sizes(hf)
        layout = layout or Layout.undivided(sizes.layers, tp_size=tp_size)
        options: dict[str, Any] = {"command": "hf_to_mm", "layout": self._words(layout)}
        options |= padding.told(layout, self.tokens(hf))
        options |= {"save_vit_only": True} if vit_only else {}
        options |= {"enable_canonical_hf_struct": True} if self.canonical else {}
        folders = [Path(hf_dir)]
        chosen = allow_unused or self.family.kept or llm_hf_dir is not None
        known = known_names(self.family, sizes, layout) if chosen else {}
        if llm_hf_dir is not None:
            other = HuggingFaceFolder.open(llm_hf_dir)
            hf = with_language_model(hf, other, self.family, known, sizes)
            options |= {"llm_hf_dir": {file: stored.digest for file, stored in other.files.items()}}
            folders.append(Path(llm_hf_dir))
        unused = left_over(self.family, known, hf.tensors, allow_unused)
        options |= _told(allow_unused, unused)
        plan = self.plan_hf_to_mm(hf, layout, unused=unused, vit_only=vit_only)
        read = {ref.file for ref in plan.sources}
        files = {file: s for file, s in hf.unstacked(self.family.stacked).files.items() if file in read}
        target = megatron_target(plan, layout, mm_dir, options, generative=self.family.generative)
        original = Path(hf_dir).is_file()
        source = f"{hf_dir} (original release)" if original else f"{hf.directory} (Hugging Face)"
        source += f", language model of {llm_hf_dir}" if llm_hf_dir else ""
        return Conversion(plan=plan, source=source, files=files, target=target, folders=folders)

    def prepare_mm_to_hf(
        self,
        mm_dir: str | Path,
        hf_dir: str | Path,
        save_hf_dir: str | Path,
        *,
        layout: Layout | GivenLayout | None = None,
        hf_naming: str = "template",
        allow_unused: Sequence[str] = (),
    ) -> Conversion:
        """Plan what :meth:`mm_to_hf` does; only headers are read.

        Raises:
            ConvertError: the checkpoint does not fit the model, or its layout is not the given one.
        """
        hf = HuggingFaceFolder.open(hf_dir)
        mm = MegatronFolder.open(mm_dir, layout)
        template = self._template(mm, hf, hf_naming=hf_naming, allow_unused=allow_unused)
        plan = template.plan(mm)
        options: dict[str, Any] = {"command": "mm_to_hf", "layout": self._words(mm.layout)}
        options |= padding.dropped(plan)
        options |= {} if hf_naming == "template" else {"hf_naming": hf_naming}
        options |= _told(allow_unused, template.kept)
        taken = {ref.file for ref in template.kept}
        return Conversion(
            plan=plan,
            source=f"{mm.directory} ({self._words(mm.layout)})",
            files={**mm.files, **{file: stored for file, stored in hf.files.items() if file in taken}},
            target=huggingface_target(template.written(plan), hf, save_hf_dir, options, template.config()),
            folders=[Path(mm_dir), Path(hf_dir)],
        )

    def prepare_resplit(
        self,
        source_dir: str | Path,
        target_dir: str | Path,
        target: Layout | None,
        *,
        source: Layout | GivenLayout | None = None,
        hf_dir: str | Path | None = None,
        tp_size: int = 1,
    ) -> Conversion:
        """Plan what :meth:`resplit` does; only headers are read.

        Raises:
            ConvertError: the checkpoint is not whole or not of the given layout, or the new layout does not fit.
        """
        mm = MegatronFolder.open(source_dir, source)
        target = target or Layout.undivided(mm.layout.layers, tp_size=tp_size)
        plan = self.plan_resplit(mm, target, hf_dir=hf_dir)
        options = {
            "command": "resplit",
            "source_layout": self._words(mm.layout),
            "layout": self._words(target),
        }
        options |= padding.told(target, self.tokens_of(mm, hf_dir))
        made = megatron_target(plan, target, target_dir, options, generative=self.family.generative)
        source_text = f"{mm.directory} ({self._words(mm.layout)})"
        return Conversion(plan=plan, source=source_text, files=mm.files, target=made, folders=[Path(source_dir)])

    def hf_to_mm(
        self,
        hf_dir: str | Path,
        mm_dir: str | Path,
        layout: Layout | None,
        *,
        allow_unused: Sequence[str] = (),
        vit_only: bool = False,
        llm_hf_dir: str | Path | None = None,
        tp_size: int = 1,
        **how: Unpack[RunOptions],
    ) -> Plan:
        """Convert a Hugging Face folder to a new Megatron folder.

        Args:
            hf_dir: the Hugging Face folder, or the single file of an original release.
            mm_dir: the new folder.
            layout: how to cut the model; None for one pipeline rank that holds all layers.
            allow_unused: names of tensors that may be left over, with ``*`` and ``?`` as in file names.
            vit_only: take the vision part alone; the rest of the model is left out.
            llm_hf_dir: a folder whose language model takes the place of the model's own.
            tp_size: tensor-parallel size, where no `layout` says it.
            how: see :class:`RunOptions`.

        Raises:
            ConvertError: see :mod:`mm_convert.errors`; nothing is left behind.
        """
        planned = self.prepare_hf_to_mm(
            hf_dir,
            mm_dir,
            layout,
            allow_unused=allow_unused,
            vit_only=vit_only,
            llm_hf_dir=llm_hf_dir,
            tp_size=tp_size,
        )
        return planned.run(**how)

    def mm_to_hf(
        self,
        mm_dir: str | Path,
        hf_dir: str | Path,
        save_hf_dir: str | Path,
        *,
        layout: Layout | GivenLayout | None = None,
        hf_naming: str = "template",
        allow_unused: Sequence[str] = (),
        **how: Unpack[RunOptions],
    ) -> Plan:
        """Convert a Megatron folder to a new Hugging Face folder.

        Args:
            mm_dir: the Megatron folder.
            hf_dir: the template: configuration, tokenizer, names and shards.
            save_hf_dir: the new folder.
            layout: what the caller believes; the layout itself is read from disk.
            hf_naming: how names are spelt: as the template does, or one of the family's `spellings`.
            allow_unused: names of the template's tensors that the Megatron folder does not hold, with ``*`` and ``?``;
                they are taken from the template as they are.
            how: see :class:`RunOptions`.

        Raises:
            ConvertError: see :mod:`mm_convert.errors`; nothing is left behind.
        """
        planned = self.prepare_mm_to_hf(
            mm_dir, hf_dir, save_hf_dir, layout=layout, hf_naming=hf_naming, allow_unused=allow_unused
        )
        return planned.run(**how)

    def resplit(
        self,
        source_dir: str | Path,
        target_dir: str | Path,
        target: Layout | None,
        *,
        source: Layout | GivenLayout | None = None,
        hf_dir: str | Path | None = None,
        tp_size: int = 1,
        **how: Unpack[RunOptions],
    ) -> Plan:
        """Convert a Megatron folder to a new one of another layout: the bytes that hf_to_mm would give.

        Args:
            source_dir: the Megatron folder.
            target_dir: the new folder.
            target: how to cut the model; None for one pipeline rank that holds all layers.
            source: what the caller believes of the source; its layout itself is read from disk.
            hf_dir: a folder with the model's ``config.json``, where tensors alone don't tell the number of heads.
            tp_size: tensor-parallel size, where no `target` says it.
            how: see :class:`RunOptions`.

        Raises:
            ConvertError: see :mod:`mm_convert.errors`; nothing is left behind.
        """
        planned = self.prepare_resplit(source_dir, target_dir, target, source=source, hf_dir=hf_dir, tp_size=tp_size)
        return planned.run(**how)

    def sizes_of(self, config: Mapping[str, object], directory: Path) -> ModelSizes:
        """The model's numbers, by its ``config.json``.

        Args:
            config: its content.
            directory: where it stands, for the words of an error.

        Raises:
            ModelError: another model, or numbers missing.
        """
        if not self.family.accepts(config):
            key = "_class_name" if config.get("model_type") is None and "_class_name" in config else "model_type"
            raise ModelError(
                f"{directory / 'config.json'} says {key} {config.get(key)!r}; this converter is for"
                f" {', '.join((*self.family.model_types, *self.family.class_names))}"
            )
        return self.family.sizes(config)

    def tokens(self, hf: HuggingFaceFolder) -> int:
        """Tokens of a model, by its tensors; 0 if it has no vocabulary.

        Raises:
            ModelError: another model, or numbers missing.
        """
        held = {self.family.canonical(ref.name): spec for ref, spec in hf.tensors.items()}
        return padding.size(self.family.rules(self.sizes(hf), 1), held)

    def tokens_of(self, mm: MegatronFolder, hf_dir: str | Path | None = None) -> int:
        """Tokens of the model of a Megatron folder, by ``config.json`` or the folder's manifest; 0 if neither tells.

        Raises:
            ModelError: `hf_dir` is another model's, or numbers are missing.
        """
        return (self._configured(hf_dir).vocabulary if hf_dir is not None else 0) or mm.vocabulary

    def _words(self, layout: Layout) -> str:
        return layout.text(generative=self.family.generative)

    def _configured(self, hf_dir: str | Path) -> ModelSizes:
        return self.sizes_of(read_config(Path(hf_dir)), Path(hf_dir))

    def _template(
        self,
        mm: MegatronFolder,
        hf: HuggingFaceFolder,
        *,
        hf_naming: str = "template",
        allow_unused: Sequence[str] = (),
    ) -> Template:
        family, sizes = self._reading(mm), self.sizes(hf)
        sizes.check_whole(mm.layout, mm.directory)
        known = known_names(family, sizes, mm.layout) if allow_unused or family.kept else {}
        kept = left_over(family, known, hf.tensors, allow_unused)
        return Template(hf=hf, family=family, sizes=sizes, naming=hf_naming, kept=kept)

    def _writing(self) -> Family:
        if self.canonical and not self.family.unfusable:
            raise LayoutError("enable_canonical_hf_struct: this model's layout always fuses query, key and value")
        return unfused(self.family) if self.canonical else self.family

    def _reading(self, mm: MegatronFolder) -> Family:
        family = as_it_stands(self.family, (ref.name for ref in mm.tensors))
        if self.canonical and family is self.family:
            raise LayoutError(
                f"given: enable_canonical_hf_struct; but {mm.directory} holds query, key and value as one tensor"
            )
        return family


def _told(patterns: Sequence[str], unused: Specs) -> dict[str, Any]:
    """What the manifest says of tensors that were left over."""
    return {"allow_unused": list(patterns), "unused": sorted(ref.name for ref in unused)} if patterns else {}
