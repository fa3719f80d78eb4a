"""Rows that Megatron puts behind a vocabulary, so that tensor-parallel ranks hold equal parts of it.

Megatron rounds the rows of the embedding and of the output layer up to a multiple of ``make_vocab_size_divisible_by``
times tp_size. The published layout has none of them. Asked for, they are zeros; on the way back they are left out,
whatever training has made of them: no token stands for them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from mm_convert.errors import CheckpointError, LayoutError
from mm_convert.layout import Layout
from mm_convert.plans import PADDED, Plan, Ref, Spec, Specs
from mm_convert.rules import Rule, Split, Vocabulary

TENSORS = re.compile(r"(?:^|\.)(?:embedding\.word_embeddings|output_layer)\.(?:weight|bias)$")
"""The Megatron names of what has a row for each token."""
USUAL = 128  # Megatron's default
OPTION = "make_vocab_size_divisible_by"
SIZE = "vocab_size"
DROPPED = "vocab_padding_dropped"


def laid_out(rules: Iterable[Rule], layout: Layout) -> tuple[Rule, ...]:
    """A family's rules with the vocabulary padded as the layout says."""
    return tuple(_padded(rule, layout.make_vocab_size_divisible_by) for rule in rules)


def _padded(rule: Rule, multiple: int) -> Rule:
    # Without padding a family may have a cut of its own that need not come out even.
    of_vocabulary = TENSORS.search(rule.mm) and (multiple or rule.operation == Split(0))
    return replace(rule, operation=Vocabulary(multiple)) if of_vocabulary else rule


def rows(tensors: Specs, layout: Layout) -> tuple[int, ...]:
    """Rows of the vocabulary on each tensor-parallel rank of a checkpoint; none if it has no vocabulary."""
    names = sorted(ref.name for ref in tensors if TENSORS.search(ref.name))
    held = {layout.ranks(ref).tp: spec.shape[0] for ref, spec in tensors.items() if names and ref.name == names[0]}
    return tuple(held[rank] for rank in sorted(held))


def size(rules: Iterable[Rule], held: Mapping[str, Spec]) -> int:
    """Tokens of a model, 0 if it has no vocabulary.

    Args:
        rules: its rules.
        held: its Hugging Face tensors, by the names that the rules use.
    """
    names = (name for rule in rules if TENSORS.search(rule.mm) for name in rule.hf)
    return next((held[name].shape[0] for name in names if name in held), 0)


def without_padding(rules: Iterable[Rule], paper: Specs, vocabulary: int) -> dict[Ref, Spec]:
    """Hugging Face tensors on paper, with as many rows as there are tokens."""
    names = {name for rule in rules if TENSORS.search(rule.mm) for name in rule.hf}
    return {
        ref: replace(spec, shape=(vocabulary, *spec.shape[1:])) if ref.name in names else spec
        for ref, spec in paper.items()
    }


def explained(layout: Layout, found: tuple[int, ...], vocabulary: int) -> Layout | None:
    """The layout with the padding that makes `found` rows out of a vocabulary; None if none does.

    The layout's own multiple counts, if it has one. Otherwise that of Megatron's default, or the largest power of two
    that divides a rank's rows: more rows than these explain may be tokens that were added.
    """
    if not found or not vocabulary or sum(found) == vocabulary:
        return layout
    own = layout.make_vocab_size_divisible_by
    for multiple in (own,) if own else (USUAL, found[0] & -found[0]):
        if set(found) == {Vocabulary(multiple).share(vocabulary, layout.tp_size)}:
            return replace(layout, make_vocab_size_divisible_by=multiple)
    return None


def settled(layout: Layout, tensors: Specs, vocabulary: int, where: object) -> Layout:
    """The layout of a checkpoint on disk, its padding included.

    Args:
        layout: what its names and shapes tell.
        tensors: its tensors.
        vocabulary: tokens of the model; 0 if that is not known.
        where: the folder, for the words of an error.

    Raises:
        CheckpointError: it has fewer rows than tokens, or more than padding explains.
    """
    found = rows(tensors, layout)
    known = explained(layout, found, vocabulary)
    if known is None:
        raise CheckpointError(
            f"{where} holds {sum(found)} rows of embedding or output layer ({list(found)} on the tensor-parallel"
            f" ranks), the model has {vocabulary} tokens: if the rest is what Megatron padded, say to which multiple"
            f" ({OPTION}, or padded_to_multiple_of for a distributed checkpoint); if tokens were added, give the"
            " configuration and template of the model that has them"
        )
    return known


def recorded(manifest: Mapping[str, Any] | None, found: tuple[int, ...]) -> tuple[int, int]:
    """Tokens and multiple that a folder's manifest tells; zeros where it does not, or no longer fits the tensors."""
    options = (manifest or {}).get("options") or {}
    vocabulary, multiple = options.get(SIZE, 0), options.get(OPTION, 0)
    if not all(type(n) is int and n > 0 for n in (vocabulary, multiple)):
        return (sum(found) if options.get("command") == "hf_to_mm" else 0), 0
    fits = set(found) == {Vocabulary(multiple).share(vocabulary, len(found))} if found else False
    return (vocabulary, multiple) if fits else (0, 0)


def checked(multiple: int, found: tuple[int, ...], where: object) -> int:
    """A multiple that a user gave for a checkpoint on disk.

    Raises:
        LayoutError: its rows are none.
    """
    if any(n % multiple for n in found):
        raise LayoutError(f"given: {OPTION} {multiple}; but {where} holds {list(found)} rows on its ranks")
    return multiple


def told(layout: Layout, vocabulary: int) -> dict[str, Any]:
    """What the manifest of a padded folder says of it."""
    multiple = layout.make_vocab_size_divisible_by
    return {OPTION: multiple, SIZE: vocabulary} if multiple and vocabulary else {}


def dropped(plan: Plan) -> dict[str, Any]:
    """What the manifest says of rows of padding that a plan leaves out, those of the output layer counted too."""
    count = sum(s.length for s in plan.dropped if s.target.name.startswith(PADDED))
    return {DROPPED: count} if count else {}
