"""Which tensors of a Hugging Face folder a conversion takes, which it leaves, and which it takes from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

from mm_convert.errors import CheckpointError
from mm_convert.families.family import Family, ModelSizes
from mm_convert.huggingface import HuggingFaceFolder
from mm_convert.layout import Layout, Part
from mm_convert.plans import Ref, Spec, Specs, listed
from mm_convert.relate import instances
from mm_convert.rules import ZERO
from mm_convert.stacked import whole

LANGUAGE_FOLDER = "language model"
"""What the files of another folder's language model stand under in a plan: both folders name their shards alike."""

Known = Mapping[str, Part]
"""The Hugging Face names that rules ask for, each with its part of the model."""


def known_names(family: Family, sizes: ModelSizes, layout: Layout) -> Known:
    """The names that a family's rules ask for, as the rules spell them.

    Raises:
        LayoutError: the layout does not fit the model.
    """
    sizes.check(layout)
    return {
        whole(Ref("", "", name)).name: rule.part
        for rule in family.rules(sizes, layout.pp_size)
        for instance in instances(rule, sizes, layout)
        for name in instance.hf
        if name != ZERO
    }


def left_over(family: Family, known: Known, tensors: Specs, patterns: Iterable[str]) -> dict[Ref, Spec]:
    """The tensors that no rule asks for, of those that may be left over.

    Args:
        family: the model family.
        known: from :func:`known_names`.
        tensors: the folder's.
        patterns: names as the folder spells them, with ``*``, ``?`` and ``[…]`` as in file names; beside the family's.

    Raises:
        CheckpointError: a pattern is the name of no tensor at all.
    """
    allowed = {ref for ref in tensors for pattern in family.kept if fnmatchcase(ref.name, pattern)}
    for pattern in patterns:
        matching = {ref for ref in tensors if fnmatchcase(ref.name, pattern)}
        if not matching:
            raise CheckpointError(
                f"--allow-unused {pattern}: no tensor has such a name; there are, for example,"
                f" {listed(sorted(ref.name for ref in tensors)[:3])}"
            )
        allowed |= matching
    return {ref: spec for ref, spec in tensors.items() if ref in allowed and family.canonical(ref.name) not in known}


def only_part(family: Family, known: Known, tensors: Specs, part: Part) -> dict[Ref, Spec]:
    """The tensors but for those of the model's other parts; unknown ones stay, for the proof to find."""
    return {ref: spec for ref, spec in tensors.items() if known.get(family.canonical(ref.name), part) == part}


def with_language_model(
    hf: HuggingFaceFolder, other: HuggingFaceFolder, family: Family, known: Known, sizes: ModelSizes
) -> HuggingFaceFolder:
    """A folder's model with the language model of another, whose other parts are passed over.

    Args:
        hf: the model.
        other: a folder of the same model, or of the text model inside it.
        family: the model family.
        known: from :func:`known_names`.
        sizes: the model's numbers.

    Raises:
        CheckpointError: the other language model has other tensors, shapes or numbers of heads.
    """
    held = {family.canonical(ref.name): spec for ref, spec in hf.tensors.items()}
    unknown = [ref.name for ref in other.tensors if family.canonical(ref.name) not in known]
    if unknown:
        raise CheckpointError(f"{other.directory} holds tensors of no such language model: {listed(sorted(unknown))}")
    theirs = {ref: spec for ref, spec in other.tensors.items() if known[family.canonical(ref.name)] == "llm"}
    wrong = [
        f"{ref.name} is {list(spec.shape)} there, {list(here.shape)} here"
        for ref, spec in theirs.items()
        if (here := held.get(family.canonical(ref.name), spec)).shape != spec.shape
    ]
    heads = {**other.config, **(other.config.get("text_config") or {})}.get("num_key_value_heads")
    if heads != sizes.key_value_heads:
        wrong.append(f"num_key_value_heads is {heads} there, {sizes.key_value_heads} here")
    if wrong:
        raise CheckpointError(
            f"the language model of {other.directory} does not fit {hf.directory}: {listed(sorted(wrong))}"
        )
    mine = {ref: spec for ref, spec in hf.tensors.items() if known.get(family.canonical(ref.name)) != "llm"}
    moved = {ref._replace(file=f"{LANGUAGE_FOLDER}/{ref.file}"): spec for ref, spec in theirs.items()}
    files = {f"{LANGUAGE_FOLDER}/{file}": stored for file, stored in other.files.items()}
    return replace(hf, tensors={**mine, **moved}, files={**hf.files, **files})
