"""The tables of LoRA adapters: a family's own, without fused tensors (:mod:`mm_convert.families.canonical`).

W of a layer that is cut along its outputs has a B that is cut like it and an A that every rank holds; along its inputs,
the other way round. So every rank's ``B_t @ A_t`` is the change of its own slice of W.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

from mm_convert.errors import CheckpointError
from mm_convert.families.canonical import canonical
from mm_convert.families.family import Family
from mm_convert.plans import Ref, Specs, listed
from mm_convert.rules import Copy, Rule

PREFIXES = ("base_model.model.", "diffusion_model.", "transformer.")
"""What PEFT, ComfyUI and diffusers put before a model's own names."""
A, B = ".lora_A.weight", ".lora_B.weight"
MM_A, MM_B = ".lora_A.default.weight", ".lora_B.default.weight"


def adapter_family(family: Family, prefixes: Iterable[str] = PREFIXES) -> Family:
    """The family of a family's adapters: other rules, and names that may have a prefix.

    Args:
        family: the model's.
        prefixes: what may stand before the model's own names.
    """
    prefix = re.compile(f"^(?:{'|'.join(map(re.escape, prefixes))})")
    return replace(
        family,
        rules=lambda sizes, pp_size: adapter_rules(family.rules(sizes, pp_size)),
        renames=((prefix, ""), *family.renames),
        stacked=(),
    )


def adapter_rules(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """The table of a family's adapters: a rule for A and one for B of every linear layer inside a block.

    Args:
        rules: the family's own rules.
    """
    return tuple(half for rule in canonical(rules) if _takes_adapter(rule) for half in _halves(rule))


def _takes_adapter(rule: Rule) -> bool:
    [first, *others] = rule.hf
    return rule.where == "layer" and not others and first.endswith(".weight") and "{x}" not in first


def _halves(rule: Rule) -> Iterator[Rule]:
    cut_along_inputs = rule.operation.dim == 1
    for half, mm_half, is_cut in ((A, MM_A, cut_along_inputs), (B, MM_B, not cut_along_inputs)):
        yield replace(
            rule,
            hf=(rule.hf[0].removesuffix(".weight") + half,),
            mm=rule.mm.removesuffix(".weight") + mm_half,
            operation=rule.operation if is_cut else Copy(),
            optional=True,
        )


def pairs(tensors: Specs, prefix: re.Pattern[str]) -> dict[str, tuple[Ref, Ref]]:
    """A and B of every module, by its name in the model.

    Args:
        tensors: PEFT's.
        prefix: what stands before the model's own names.

    Raises:
        CheckpointError: one has no other, is no matrix, or their ranks differ.
    """
    halves = {half: {r.name.removesuffix(half): r for r in tensors if r.name.endswith(half)} for half in (A, B)}
    alone = sorted(halves[A].keys() ^ halves[B].keys())
    if alone:
        raise CheckpointError(f"{len(alone)} modules have only one of lora_A and lora_B: {listed(alone)}")
    found = {prefix.sub("", name): (ref, halves[B][name]) for name, ref in halves[A].items()}
    strange = [r.name for pair in found.values() for r in pair if len(tensors[r].shape) != 2]
    if strange:
        raise CheckpointError(
            f"{len(strange)} tensors are no matrices: {listed(strange)}; adapters of convolutions are not converted,"
            " allow_unused leaves out what it names"
        )
    wrong = [name for name, (a, b) in found.items() if tensors[a].shape[0] != tensors[b].shape[-1]]
    if wrong:
        raise CheckpointError(f"lora_A and lora_B have different ranks in {listed(wrong)}")
    return found
