"""LoRA adapters between PEFT's folders and the Megatron-style layout."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mm_convert.convert import Converter
from mm_convert.errors import CheckpointError, LayoutError, ModelError
from mm_convert.execution import Target
from mm_convert.families.family import Family, ModelSizes
from mm_convert.huggingface import read_config
from mm_convert.layout import PARTS, GivenLayout, Layout
from mm_convert.lora.config import CONFIG, WEIGHTS, AdapterFolder, made_config, numbers, read_adapter_config
from mm_convert.lora.table import MM_A, MM_B, PREFIXES, adapter_family, pairs
from mm_convert.megatron import MegatronFolder
from mm_convert.plans import Plan, Ref, Segment, Spec, Specs, listed
from mm_convert.relate import check_same, instances, relate
from mm_convert.resplit import check_dtypes, paper_tensors
from mm_convert.safetensors_file import SafetensorsLayout
from mm_convert.targets import Conversion, megatron_target


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """What an adapter folder of PEFT does not say itself, or says in vain.

    Args:
        base_dir: a folder with the base model's ``config.json``; by default the adapter's own folder, then its
            `base_model_name_or_path`.
        model_prefix: what stands before the model's own names; read: any of `PREFIXES`, written: the first.
        new_names: write the names of transformers >= 4.52 where no template says how.
        allow_unused: patterns (``*`` and ``?``) of tensors that are left out.
        alpha: `lora_alpha` of an ``adapter_config.json`` that is made.
        rslora: likewise `use_rslora`.
    """

    base_dir: str | Path | None = None
    model_prefix: str | None = None
    new_names: bool = False
    allow_unused: Sequence[str] = ()
    alpha: float | None = None
    rslora: bool = False


@dataclass(frozen=True, kw_only=True)
class AdapterConverter:
    """LoRA adapters of a model family.

    Args:
        family: the rules of the model itself.
        options: see :class:`AdapterOptions`.
    """

    family: Family
    options: AdapterOptions = field(default_factory=AdapterOptions)

    @property
    def table(self) -> Family:
        """The family of the adapters."""
        prefix = self.options.model_prefix
        return adapter_family(self.family, PREFIXES if prefix is None else (prefix,))

    def prepare_hf_to_mm(self, adapter_dir: str | Path, mm_dir: str | Path, layout: Layout | None) -> Conversion:
        """Plan PEFT → Megatron; only headers are read.

        Args:
            adapter_dir: PEFT's folder.
            mm_dir: the folder to write; ``adapter_config.json`` goes along, for the way back.
            layout: how the model is cut, all its layers counted; None for one rank that holds everything.

        Raises:
            ConvertError: the adapter is not whole or has tensors without a place, or the layout does not fit.
        """
        adapter = AdapterFolder.open(adapter_dir)
        tensors = self.chosen(adapter.tensors)
        self.check_ranks(tensors, adapter.config)
        sizes = self.sizes(adapter.directory, adapter.config)
        layout = layout or Layout.undivided(sizes.layers)
        targets, segments = self.relate(sizes, layout, tensors)
        plan = Plan.build(tensors, targets, segments)
        options = {
            "command": "lora_hf_to_mm",
            "layout": layout.text(generative=self.family.generative),
            **self.told(adapter.tensors, tensors),
        }
        target = megatron_target(plan, layout, mm_dir, options, generative=self.family.generative)
        target = replace(target, others={CONFIG: adapter.directory / CONFIG, **target.others})
        source = f"{adapter_dir} (PEFT)"
        return Conversion(plan=plan, source=source, files=adapter.files, target=target, folders=[adapter.directory])

    def prepare_mm_to_hf(
        self,
        mm_dir: str | Path,
        save_dir: str | Path,
        *,
        template: str | Path | None = None,
        layout: Layout | GivenLayout | None = None,
    ) -> Conversion:
        """Plan Megatron → PEFT; only headers are read.

        Args:
            mm_dir: the Megatron folder with the adapters.
            save_dir: the folder to write.
            template: PEFT's folder: its configuration is copied and its names are written; or one that only has the
                base model's ``config.json``.
            layout: how the model is cut; needed only where not every layer of a part has an adapter.

        Raises:
            ConvertError: the adapters are not whole or have no place in the model, or the template is another's.
        """
        known = [Path(folder) for folder in (template, mm_dir) if folder is not None]
        config = next((read_adapter_config(folder) for folder in known if (folder / CONFIG).is_file()), None)
        sizes = self.sizes(known[0], config or {})
        mm = self.opened(mm_dir, sizes, layout)
        plan = self.plan_mm_to_hf(mm, sizes, template)
        self.check_ranks(plan.targets, config)
        text = json.dumps(config or self._made_config(plan.targets), indent=2, sort_keys=True) + "\n"
        target = Target(
            directory=Path(save_dir),
            layouts={WEIGHTS: SafetensorsLayout.of(plan.targets)},
            others={CONFIG: text.encode()},
            options={"command": "lora_mm_to_hf", "layout": mm.layout.text(generative=self.family.generative)},
        )
        source = f"{mm.directory} ({mm.layout.text(generative=self.family.generative)})"
        return Conversion(plan=plan, source=source, files=mm.files, target=target, folders=known)

    def plan_mm_to_hf(self, mm: MegatronFolder, sizes: ModelSizes, template: str | Path | None = None) -> Plan:
        """Plan Megatron → PEFT's tensors.

        Raises:
            ConvertError: see :meth:`prepare_mm_to_hf`.
        """
        paper = paper_tensors(self.table, sizes, mm)
        names = {ref.name: self.written(ref.name) for ref in paper}
        if template is not None and (Path(template) / WEIGHTS).is_file():
            theirs = AdapterFolder.open(template).tensors
            names |= {self.table.canonical(ref.name): ref.name for ref in theirs}
        else:
            theirs = None
        hf = {Ref(WEIGHTS, "", names[ref.name]): spec for ref, spec in paper.items()}
        if theirs is not None:
            check_same(hf, self.chosen(theirs), f"{mm.directory}, beside the template,")
        made, segments = self.relate(sizes, mm.layout, hf)
        check_same(mm.tensors, made, str(mm.directory))
        check_dtypes(mm, made)
        return Plan.build(mm.tensors, hf, [segment.reversed() for segment in segments])

    def opened(
        self, mm_dir: str | Path, sizes: ModelSizes, given: Layout | GivenLayout | None = None
    ) -> MegatronFolder:
        """A Megatron folder with adapters; layers that have none show only in what is given.

        Raises:
            ConvertError: it is not readable, or what is given does not fit.
        """
        mm = MegatronFolder.open(mm_dir)
        mm = replace(mm, tensors=self.chosen(mm.tensors))
        layout = _layout(mm, sizes, given)
        if (layout.tp_size, layout.pp_size, layout.vpp_size) != (
            mm.layout.tp_size,
            mm.layout.pp_size,
            mm.layout.vpp_size,
        ):
            raise LayoutError(f"given: {layout}; but {mm.directory} holds: {mm.layout}")
        try:
            sizes.check(layout)
        except LayoutError as error:
            raise LayoutError(
                f"{error}; where not every layer has an adapter, {mm.directory} does not show the layout: give the"
                " layer lists of the model"
            ) from error
        return replace(mm, layout=layout)

    def chosen(self, tensors: Specs) -> dict[Ref, Spec]:
        """The tensors that are not left out on purpose."""
        patterns = self.options.allow_unused
        return {ref: spec for ref, spec in tensors.items() if not any(fnmatchcase(ref.name, p) for p in patterns)}

    def told(self, held: Specs, used: Specs) -> dict[str, Any]:
        """What the manifest says of tensors that were left out."""
        if not self.options.allow_unused:
            return {}
        unused = sorted(ref.name for ref in held.keys() - used.keys())
        return {"allow_unused": list(self.options.allow_unused), "unused": unused}

    def sizes(self, directory: Path, config: Mapping[str, Any]) -> ModelSizes:
        """The base model's numbers.

        Args:
            directory: a folder that may hold its ``config.json``.
            config: ``adapter_config.json``.

        Raises:
            ModelError: no configuration is found, or it is another model's.
        """
        base = config.get("base_model_name_or_path")
        places = [Path(place) for place in (self.options.base_dir, directory, base) if place]
        found = next((p for p in places if (p / "config.json").is_file()), places[0])
        if not (found / "config.json").is_file():
            raise ModelError(
                f"{directory} does not say how many layers and heads its model has: give base_dir, a folder with the"
                " config.json of the base model"
            )
        return Converter(family=self.family).sizes_of(read_config(found), found)

    def relate(self, sizes: ModelSizes, layout: Layout, tensors: Specs) -> tuple[dict[Ref, Spec], list[Segment]]:
        """Apply the table; see :func:`mm_convert.relate.relate`.

        Raises:
            CheckpointError: an adapter has no place in the Megatron layout.
            LayoutError: the layout does not fit.
        """
        table = self.table
        rules = table.rules(sizes, layout.pp_size)
        placed = {name for rule in rules for place in instances(rule, sizes, layout) for name in place.hf}
        strange = [ref.name for ref in tensors if table.canonical(ref.name) not in placed]
        if strange:
            raise CheckpointError(
                f"{len(strange)} tensors are no adapters of linear layers inside the model's blocks, the only ones for"
                f" which the Megatron layout has a place: {listed(strange)}; allow_unused leaves out what it names"
            )
        return relate(table, sizes, layout, tensors)

    def pairs(self, tensors: Specs) -> dict[str, tuple[Ref, Ref]]:
        """A and B of every module, by its name in the model; see :func:`mm_convert.lora.table.pairs`.

        Raises:
            CheckpointError: they don't belong together.
        """
        return pairs(tensors, self.table.renames[0][0])

    def check_ranks(self, tensors: Specs, config: Mapping[str, Any] | None) -> None:
        """Compare the tensors' ranks with the configuration's, if there is one.

        Raises:
            CheckpointError: they differ, or A and B don't belong together.
        """
        said = None if config is None else numbers(config)
        for module, (a, _) in self.pairs(tensors).items():
            rank = tensors[a].shape[0]
            if said is not None and rank != said.rank(*self.spellings(module)):
                raise CheckpointError(
                    f"{a.name} has rank {rank}, {CONFIG} says {said.rank(*self.spellings(module))}; is it another"
                    " adapter's?"
                )

    def spellings(self, module: str) -> list[str]:
        """A module's names: patterns of the configuration may be written for another one than its tensors."""
        canonical = self.family.canonical(f"{module}.weight").removesuffix(".weight")
        return list(dict.fromkeys([module, canonical, self._newest(canonical)]))

    def written(self, name: str) -> str:
        """A tensor's name in a folder that is made without a template."""
        prefix = self.options.model_prefix
        return (PREFIXES[0] if prefix is None else prefix) + (self._newest(name) if self.options.new_names else name)

    def _newest(self, name: str) -> str:
        for pattern, old in self.family.renames:
            new = re.sub(r"\\(.)", r"\1", pattern.pattern.removeprefix("^")) + name.removeprefix(old)
            if name.startswith(old) and self.family.canonical(new) == name:
                return new
        return name

    def _made_config(self, tensors: Specs) -> dict[str, Any]:
        options = self.options
        if options.alpha is None:
            raise CheckpointError(
                f"the checkpoint does not say lora_alpha, and there is no {CONFIG} to copy: give lora_alpha, or the"
                " adapter's folder as the template"
            )
        ranks = {module: tensors[a].shape[0] for module, (a, _) in self.pairs(tensors).items()}
        base = None if options.base_dir is None else str(options.base_dir)
        return made_config(ranks, alpha=options.alpha, rslora=options.rslora, base=base)


def _layout(mm: MegatronFolder, sizes: ModelSizes, given: Layout | GivenLayout | None) -> Layout:
    """What is given, completed from the folder."""
    stated: dict[str, Any] = {}
    if given is not None:
        stated = {f.name: value for f in fields(given) if (value := getattr(given, f.name)) is not None}
    for part in PARTS:
        layers = getattr(sizes, f"{part}_layers")
        if layers and not any(map(any, mm.layout.lists(part))):
            # Without an adapter it does not matter where the layers stand.
            empty = [[0] * mm.layout.pp_size for _ in range(mm.layout.vpp_size)]
            empty[0][0] = layers
            stated.setdefault(f"{part}_pp_layers", empty)
    return (
        replace(mm.layout, vit_tp_size=_vision_tp(mm), **stated)
        if "vit_tp_size" not in stated
        else replace(mm.layout, **stated)
    )


def _vision_tp(mm: MegatronFolder) -> int:
    """Over how many ranks the vision part is cut: the output projection of attention is square before it is."""
    for ref, spec in mm.tensors.items():
        if ref.name.startswith("image_encoder.") and ref.name.endswith("self_attention.linear_proj" + MM_A):
            other = mm.tensors.get(ref._replace(name=ref.name.removesuffix(MM_A) + MM_B))
            cut, rest = divmod(other.shape[0], spec.shape[-1]) if other else (0, 0)
            return 0 if rest or cut < 1 or mm.layout.tp_size % cut else cut
    return 0
