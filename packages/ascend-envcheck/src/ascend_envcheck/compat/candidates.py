"""All pairs of a torch_npu and a CANN, and what is left of them when some things are fixed.

`ascend_envcheck.compat.solver` tells the order in which they stand.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Iterable, Mapping, Sequence

from ascend_envcheck.compat.asked import SOCS, Asked, covers, known
from ascend_envcheck.compat.stacks import NAMED, STACKS, admits, fit, fitting, line, record_of
from ascend_envcheck.tables import Pairing, TorchNpuRow, cross_pairing, records, torch_npu_rows
from ascend_envcheck.versions import cann_order, driver_version

STATUS = ("general", "patch", "pre-release", "unlisted")
CONFIDENCE = ("official", "official-history", "secondary", "tested-list", "derived", "inferred")
"""From the surest to the least sure; see `ascend_envcheck.tables`."""


@dataclass(frozen=True)
class Candidate:
    """A torch_npu on a CANN, with all that may still go with them.

    Args:
        row: the torch_npu.
        cann: the CANN; "" when no source names it.
        pairing: the vendor's statement on the two series; None for an exact pair.
        left: the values that are left for each thing that may be fixed, the best first.
    """

    row: TorchNpuRow
    cann: str
    pairing: Pairing | None
    left: Mapping[str, tuple[str, ...]]


def candidates(fixed: Sequence[Asked]) -> list[Candidate]:
    """The pairs that are left when some things are fixed, in the order of preference."""
    return [candidate for candidate in matching(fixed) if candidate.cann]


def matching(fixed: Sequence[Asked]) -> list[Candidate]:
    """As `candidates`, with the torch_npu of which no source names a CANN; theirs is ""."""
    left = (_narrowed(candidate, fixed) for candidate in all_candidates())
    return sorted((candidate for candidate in left if candidate is not None), key=lambda one: _rank(one, fixed))


@lru_cache(maxsize=None)
def all_candidates() -> tuple[Candidate, ...]:
    """Every pair of torch_npu and CANN that the tables allow, and each torch_npu whose CANN they don't tell."""
    return tuple(
        _candidate(row, cann, pairing)
        for row in torch_npu_rows()
        for cann in ((*known("cann"), "") if not row.cann else known("cann"))
        for pairing in [None if cann == row.cann else cross_pairing(row, cann)]
        if (cann == row.cann or pairing is not None) and row.python_documented
    )


def _candidate(row: TorchNpuRow, cann: str, pairing: Pairing | None) -> Candidate:
    hdk = hdk_versions(cann)
    left = {
        "torch": (row.torch,),
        "torch_npu": (row.torch_npu,),
        "cann": (cann,),
        "hdk": hdk,
        "python": tuple(version for version in known("python") if row.supports(version)),
        "soc": tuple(soc for soc in SOCS if not hdk or any(_is_for(version, soc) for version in hdk)),
    }
    return Candidate(row, cann, pairing, {**left, **{name: fitting(name, row, cann) for name in STACKS}})


@lru_cache(maxsize=None)
def hdk_record(cann: str) -> Mapping[str, str] | None:
    """The row of a CANN in the table of HDKs; else, inferred, of the nearest one of its line, the older one first."""
    rows = records("hdk")
    own = next((row for row in rows if row["cann"] == cann), None) or next(
        (row for row in rows if covers(row["cann"], cann)), None
    )
    alike = [row for row in rows if line(row["cann"]) == line(cann)]
    if own is not None or not alike:
        return own
    older = [row for row in alike if cann_order(row["cann"]) < cann_order(cann)]
    nearest = max(older, key=_order) if older else min(alike, key=_order)
    return {**nearest, "confidence": "inferred"}


def _order(record: Mapping[str, str]) -> tuple[int, ...]:
    return cann_order(record["cann"])


def hdk_versions(cann: str) -> tuple[str, ...]:
    """The HDKs of a CANN, newest first, those of the 950 last."""
    record = hdk_record(cann)
    found = sorted(record["hdk"].split(), key=cann_order, reverse=True) if record else []
    return tuple(sorted(found, key=lambda version: _is_for(version, "ascend950")))


@lru_cache(maxsize=None)
def _is_for(hdk: str, soc: str) -> bool:
    version = driver_version(hdk.replace(".x", ".0"))
    return (version is not None and version.line == "950") == (soc == "ascend950")


def _narrowed(candidate: Candidate, fixed: Sequence[Asked]) -> Candidate | None:
    """The candidate with only what is still allowed, None when something has nothing left."""
    left = dict(candidate.left)
    names = {one.name for one in fixed if one.name in left}
    for one in fixed:
        if one.name in names:
            left[one.name] = tuple(value for value in left[one.name] if value in one.values)
    hdk = left["hdk"]
    if hdk:
        left["hdk"] = tuple(version for version in hdk if any(_is_for(version, soc) for soc in left["soc"]))
        left["soc"] = tuple(soc for soc in left["soc"] if any(_is_for(version, soc) for version in hdk))
    for name in STACKS:
        python = left["python"]
        left[name] = tuple(own for own in left[name] if any(admits(name, own, version) for version in python))
        if name in names:
            left["python"] = tuple(own for own in python if left[name] and admits(name, left[name][0], own))
    if not left["python"] or not all(left[name] for name in names):
        return None
    left["python"] = tuple(sorted(left["python"], key=lambda version: _python_rank(candidate.row, left, version)))
    return replace(candidate, left=left)


def _python_rank(row: TorchNpuRow, left: Mapping[str, tuple[str, ...]], version: str) -> tuple[int, ...]:
    """A Python that the stacks admit first, then one with a wheel, then the newest."""
    strange = [not admits(name, left[name][0], version) for name in STACKS if left[name]]
    return (sum(strange), version not in row.python_wheels, known("python").index(version))


def _rank(candidate: Candidate, fixed: Iterable[Asked]) -> tuple[int, ...]:
    """The order that `ascend_envcheck.compat.solver` documents."""
    row, names = candidate.row, {one.name for one in fixed}
    return (
        STATUS.index(row.status),
        CONFIDENCE.index(row.confidence),
        max([grade(candidate, name) for name in STACKS if name in names], default=NAMED),
        candidate.pairing is not None,
        not set(candidate.left["python"]) & set(row.python_wheels),
        known("torch_npu").index(row.torch_npu),  # newest first
        known("cann").index(candidate.cann) if candidate.cann else 0,
    )


def grade(candidate: Candidate, name: str) -> int:
    """How well the first version of a stack that is left fits."""
    return fit(record_of(name, candidate.left[name][0]), candidate.row, candidate.cann)
