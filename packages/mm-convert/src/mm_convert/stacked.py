"""Experts that stand one over another in one tensor, taken apart: ``down_proj`` is ``down_proj[0]``, ….

An expert's matrix is a tensor of its own to rules and plans. Its bytes stand where the whole tensor's do, so taking
apart costs nothing: only what a file says of its tensors changes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mm_convert.plans import Ref, Spec, Specs

if TYPE_CHECKING:
    from mm_convert.stored import Name, StoredFile

NUMBERED = re.compile(r"(.+)\[(\d+)\]")


def unstacked(tensors: Specs, patterns: Sequence[re.Pattern[str]]) -> dict[Ref, Spec]:
    """The tensors, those whose names match a pattern by their experts."""
    return {
        ref._replace(name=name): part
        for ref, spec in tensors.items()
        for name, part, _ in _parts(ref.name, spec, patterns)
    }


def unstacked_file(stored: StoredFile, patterns: Sequence[re.Pattern[str]]) -> StoredFile:
    """A file to read, with its tensors taken apart."""
    specs: dict[Name, Spec] = {}
    offsets: dict[Name, int] = {}
    for (section, name), spec in stored.specs.items():
        for part_name, part, offset in _parts(name, spec, patterns):
            specs[section, part_name] = part
            offsets[section, part_name] = stored.offsets[section, name] + offset
    return replace(stored, specs=specs, offsets=offsets)


def stacked(tensors: Specs) -> dict[Ref, Spec]:
    """The opposite of :func:`unstacked`: whole tensors, each at the place of its first expert."""
    counts: dict[Ref, int] = {}
    for ref in tensors:
        counts[whole(ref)] = counts.get(whole(ref), 0) + 1
    first: dict[Ref, Spec] = {}
    for ref, spec in tensors.items():
        shape = spec.shape if whole(ref) == ref else (counts[whole(ref)], *spec.shape)
        first.setdefault(whole(ref), Spec(spec.dtype, shape))
    return first


def offsets_of_parts(offsets: Mapping[Ref, int], tensors: Specs) -> dict[Ref, int]:
    """Where each of the tensors' first byte goes, from where the whole ones' does."""
    return {ref: offsets[whole(ref)] + number(ref) * spec.nbytes for ref, spec in tensors.items()}


def whole(ref: Ref) -> Ref:
    """The tensor of which this is an expert's part; others are themselves."""
    match = NUMBERED.fullmatch(ref.name)
    return ref._replace(name=match[1]) if match else ref


def number(ref: Ref) -> int:
    """The expert's number; 0 for a tensor that is no part."""
    match = NUMBERED.fullmatch(ref.name)
    return int(match[2]) if match else 0


def _parts(name: str, spec: Spec, patterns: Iterable[re.Pattern[str]]) -> Iterator[tuple[str, Spec, int]]:
    """A tensor's parts: name, what it is, and how many bytes stand before it."""
    if not spec.shape or not any(pattern.search(name) for pattern in patterns):
        yield name, spec, 0
        return
    part = Spec(spec.dtype, spec.shape[1:])
    for number in range(spec.shape[0]):
        yield f"{name}[{number}]", part, number * part.nbytes
