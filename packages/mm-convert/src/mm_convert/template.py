"""The Hugging Face folder after whose manner a new one is made: its names, shapes and shards."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from mm_convert.errors import ModelError
from mm_convert.families.family import Family, ModelSizes
from mm_convert.huggingface import HuggingFaceFolder
from mm_convert.layout import Layout
from mm_convert.megatron import MegatronFolder
from mm_convert.plans import Plan, Ref, Segment, Spec, Specs
from mm_convert.relate import by_canonical_name, check_same, relate
from mm_convert.vocabulary import settled, size


@dataclass(frozen=True, kw_only=True)
class Template:
    """What a Megatron-style checkpoint becomes.

    Attributes:
        hf: the folder.
        family: the model family.
        sizes: the model's numbers.
        naming: ``template`` for the folder's own names, or one of the family's spellings.
        kept: tensors that are taken from the folder as they are: the checkpoint does not hold them.

    Raises:
        ModelError: the family has no such spelling.
    """

    hf: HuggingFaceFolder
    family: Family
    sizes: ModelSizes
    naming: str
    kept: Specs

    def __post_init__(self) -> None:
        known = ["template", *self.family.spellings]
        if self.naming not in known:
            raise ModelError(f"hf_naming {self.naming!r}; this model has {', '.join(known)}")

    def plan(self, mm: MegatronFolder) -> Plan:
        """Plan the way from a checkpoint to a folder like this one.

        Raises:
            ConvertError: the checkpoint is not one of this model.
        """
        wanted = self._wanted()
        layout = self._layout(mm, wanted)
        made, segments = relate(self.family, self.sizes, layout, wanted)
        check_same(mm.tensors, made, str(mm.directory))
        backwards = [segment.reversed() for segment in segments]
        dtypes = {segment.target: mm.tensors[segment.source].dtype for segment in backwards}
        targets = {ref: replace(spec, dtype=dtypes[ref]) for ref, spec in wanted.items()}
        # A number without a dimension is copied as a list of one.
        kept = {ref: replace(spec, shape=spec.shape or (1,)) for ref, spec in self.kept.items()}
        copies = [Segment(ref, 0, ref, 0, spec.shape[0], 0) for ref, spec in kept.items()]
        return Plan.build({**mm.tensors, **kept}, {**targets, **kept}, [*backwards, *copies])

    def _layout(self, mm: MegatronFolder, wanted: Specs) -> Layout:
        """The layout of a checkpoint, with the padding of its vocabulary if it has any."""
        rules = self.family.rules(self.sizes, mm.layout.pp_size)
        held = {name: wanted[ref] for name, ref in by_canonical_name(self.family, wanted).items()}
        return settled(mm.layout, mm.tensors, size(rules, held), mm.directory)

    def written(self, plan: Plan) -> Specs:
        """The tensors of the new folder as their headers are to describe them."""
        return {**plan.targets, **self.kept}

    def config(self) -> dict[str, Any]:
        """``config.json`` as it goes with the names."""
        spelling = self.family.spellings.get(self.naming)
        if spelling is None or spelling.config is None:
            return self.hf.config
        shapes = {self.family.canonical(ref.name): spec.shape for ref, spec in self.hf.tensors.items()}
        config: dict[str, Any] = spelling.config(self.hf.config, shapes)
        return config

    def _wanted(self) -> dict[Ref, Spec]:
        """The tensors that the checkpoint must make, under the names that are asked for."""
        tensors = {ref: spec for ref, spec in self.hf.tensors.items() if ref not in self.kept}
        taken_apart = replace(self.hf, tensors=tensors).unstacked(self.family.stacked).tensors
        if self.naming == "template":
            return taken_apart
        spelling = self.family.spellings[self.naming]
        return {
            ref._replace(name=spelling.name(self.family.canonical(ref.name))): spec for ref, spec in taken_apart.items()
        }
