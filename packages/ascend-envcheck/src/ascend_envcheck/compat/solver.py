"""Which versions fit together: given what is fixed, the sets for the rest, the best first.

A set is a torch_npu, which brings its torch, and a CANN: the one that torch_npu was made for (an exact pair), or one of
a series that the vendor lets it run on (a cross pair). CANN brings its HDK, torch_npu its Pythons; a MindSpeed-MM or a
MindIE-SD that was fixed admits only the sets that its makers name. The order, of which the first difference counts:

1. general releases, then patches, pre-releases, builds that no list of the vendor has;
2. rows that the vendor prints, then those it once printed, that follow from a tag, that were inferred;
3. the sets that the maker of a fixed MindSpeed-MM or MindIE-SD names itself, then those of the same series;
4. exact pairs, then cross pairs;
5. builds that PyPI has a wheel of, for a Python that is left, then the others;
6. the newer torch, then the newer torch_npu, then the newer CANN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterator, Mapping, Sequence

from ascend_envcheck.compat.asked import Asked, asked, covers
from ascend_envcheck.compat.candidates import CONFIDENCE, Candidate, candidates, grade, hdk_record
from ascend_envcheck.compat.install import Step, steps
from ascend_envcheck.compat.stacks import SAME_SERIES, STACKS, admits, record_of
from ascend_envcheck.errors import VersionError
from ascend_envcheck.messages import say
from ascend_envcheck.tables import Pairing, pairings, records
from ascend_envcheck.versions import series

__all__ = ["Answer", "Solution", "VersionError", "solve"]


@dataclass(frozen=True)
class Solution:
    """Versions that fit together.

    Args:
        torch, torch_npu, cann: the versions.
        release: the TorchNPU train, 26.0.0.
        status: that of the torch_npu: general, patch, pre-release or unlisted.
        exact: whether torch_npu was made for this very CANN.
        hdk: the HDKs (driver and firmware) that go with CANN, the newest first; 25.5.x is any 25.5; () when unknown.
        python: the Pythons that all parts admit, the best first.
        torchvision: its series, 0.22; "" when unknown.
        mindspeed_mm: the one that was fixed, else the best that fits the first Python; "" when none does.
        mindspeed: the branch of MindSpeed that it needs.
        megatron_core: the release of Megatron-LM that it needs.
        mindie_sd: as ``mindspeed_mm``.
        confidence: that of the weakest row that was used.
        notes: what is worth knowing, in words.
        sources: where the rows come from.
        fixed: the names of what was fixed.
        soc: the SoC, when it was fixed or only one is left, or "".
        machine: the machine that was fixed, or "".
    """

    torch: str
    torch_npu: str
    cann: str
    release: str
    status: str
    exact: bool
    hdk: tuple[str, ...]
    python: tuple[str, ...]
    torchvision: str
    mindspeed_mm: str
    mindspeed: str
    megatron_core: str
    mindie_sd: str
    confidence: str
    notes: tuple[str, ...]
    sources: tuple[str, ...]
    fixed: tuple[str, ...] = ()
    soc: str = ""
    machine: str = ""

    @property
    def install(self) -> tuple[Step, ...]:
        """The steps that install it, in the order that matters."""
        return steps(self)


@dataclass(frozen=True)
class Answer:
    """The sets that fit what is fixed, the best first; when there are none, ``why``."""

    solutions: tuple[Solution, ...]
    why: str = ""

    @property
    def best(self) -> Solution | None:
        """The first set."""
        return self.solutions[0] if self.solutions else None


def solve(
    *,
    torch: str = "",
    torch_npu: str = "",
    cann: str = "",
    python: str = "",
    hdk: str = "",
    mindspeed_mm: str = "",
    mindie_sd: str = "",
    soc: str = "",
    machine: str = "",
) -> Answer:
    """The consistent sets of versions; "" leaves a thing open.

    Versions may be typed loosely: ``v2.7.1``, ``2.7``, ``8.2rc1``; torch_npu also by its train, ``7.1.0``.

    Args:
        torch: of PyTorch.
        torch_npu: of the plugin, or of the TorchNPU train.
        cann: of the CANN toolkit.
        python: 3.10.
        hdk: of the driver and firmware package.
        mindspeed_mm: of MindSpeed-MM.
        mindie_sd: of MindIE-SD.
        soc: the NPU: 910B2, A3, 310P3; decides on the names of packages.
        machine: x86_64 or aarch64; decides on the build of torch.

    Raises:
        VersionError: a value is no version, machine or SoC.
    """
    given = {
        "torch": torch,
        "torch_npu": torch_npu,
        "cann": cann,
        "python": python,
        "hdk": hdk,
        "mindspeed_mm": mindspeed_mm,
        "mindie_sd": mindie_sd,
        "soc": soc,
        "machine": machine,
    }
    return answer([asked(name, text) for name, text in given.items() if text])


def answer(fixed: Sequence[Asked]) -> Answer:
    """As `solve`, for values that were read already."""
    found = candidates(fixed)
    if not found:
        from ascend_envcheck.compat.conflict import explained

        return Answer((), explained([one for one in fixed if one.name != "machine"]))
    return Answer(tuple(_solution(candidate, fixed) for candidate in found))


def _solution(candidate: Candidate, fixed: Sequence[Asked]) -> Solution:
    row, left = candidate.row, candidate.left
    stacks = {name: _stack(candidate, name) for name in STACKS}
    mindspeed = record_of("mindspeed_mm", stacks["mindspeed_mm"]) if stacks["mindspeed_mm"] else {}
    evidence = list(_evidence(candidate, fixed))
    vision = next((pair for pair in pairings("torchvision") if pair.of == series(row.torch)), None)
    return Solution(
        torch=row.torch,
        torch_npu=row.torch_npu,
        cann=candidate.cann,
        release=row.release,
        status=row.status,
        exact=candidate.pairing is None,
        hdk=left["hdk"],
        python=left["python"],
        torchvision=vision.fits if vision else "",
        mindspeed_mm=stacks["mindspeed_mm"],
        mindspeed=mindspeed.get("mindspeed", ""),
        megatron_core=mindspeed.get("megatron_core", ""),
        mindie_sd=stacks["mindie_sd"],
        confidence=max((confidence for confidence, _ in evidence), key=CONFIDENCE.index),
        notes=tuple(_notes(candidate, fixed, vision)),
        sources=tuple(dict.fromkeys(source for _, source in evidence)),
        fixed=tuple(one.name for one in fixed),
        soc=left["soc"][0] if len(left["soc"]) == 1 else "",
        machine=next((one.values[0] for one in fixed if one.name == "machine"), ""),
    )


def _stack(candidate: Candidate, name: str) -> str:
    """The version of a stack that fits the first Python, the best one."""
    return next((v for v in candidate.left[name] if admits(name, v, candidate.left["python"][0])), "")


def _evidence(candidate: Candidate, fixed: Sequence[Asked]) -> Iterator[tuple[str, str]]:
    """Confidence and source of each row that the set stands on."""
    row, hdk = candidate.row, hdk_record(candidate.cann)
    yield row.confidence, row.source
    if candidate.pairing is not None:
        yield candidate.pairing.confidence, candidate.pairing.source
    if hdk is not None:
        guessed = any(candidate.left["hdk"][0] in one.guessed for one in fixed)
        yield ("inferred" if guessed else hdk["confidence"]), hdk["source"]
    for one in fixed:
        if one.name in STACKS:
            record = record_of(one.name, _stack(candidate, one.name))
            named = grade(candidate, one.name) != SAME_SERIES
            yield (record["confidence"] if named else "derived"), record["source"]


def _notes(candidate: Candidate, fixed: Sequence[Asked], vision: Pairing | None) -> Iterator[str]:
    row = candidate.row
    if candidate.pairing is not None:
        yield say(
            "torch_npu {build} was made for CANN {own}; the vendor lets TorchNPU {train} run on CANN {toolkits}, too",
            "torch_npu {build} 对应 CANN {own}；官方声明 TorchNPU {train} 也可运行在 CANN {toolkits} 上",
            build=row.torch_npu,
            own=row.cann,
            train=candidate.pairing.of,
            toolkits=candidate.pairing.fits,
        )
    if row.status != "general":
        yield _STATUS_NOTES[row.status]
    if candidate.left["python"][0] not in row.python_wheels:
        yield say(
            "PyPI has no wheel of torch_npu {build} for Python {python}: take it from the release page of TorchNPU",
            "PyPI 上没有 Python {python} 的 torch_npu {build} wheel：请从 TorchNPU 发布页获取",
            build=row.torch_npu,
            python=candidate.left["python"][0],
        )
    hdk = hdk_record(candidate.cann)
    if hdk is None:
        yield say("no source names the HDK of CANN {cann}", "没有资料说明 CANN {cann} 的 HDK", cann=candidate.cann)
    elif hdk["cann"] != candidate.cann and not covers(hdk["cann"], candidate.cann):
        yield say(
            "no source names the HDK of CANN {cann}; this is that of {near}",
            "没有资料说明 CANN {cann} 的 HDK；此处为 CANN {near} 的 HDK",
            cann=candidate.cann,
            near=hdk["cann"],
        )
    phase = next((record for record in records("lifecycle") if record["torch"] == row.torch), {})
    if phase.get("phase") == "eol":
        yield say(
            "torch_npu for torch {torch} is out of maintenance since {end}",
            "torch {torch} 的 torch_npu 已于 {end} 停止维护",
            torch=row.torch,
            end=phase["end"],
        )
    for one in fixed:
        if candidate.left["hdk"] and candidate.left["hdk"][0] in one.guessed:
            yield say(
                "HDK {text} is in no list; it is taken for one of its series, {found}",
                "HDK {text} 不在任何列表中，按同系列的 {found} 处理",
                text=one.text,
                found=candidate.left["hdk"][0],
            )
        elif one.name in STACKS and grade(candidate, one.name) == SAME_SERIES:
            yield say(
                "{stack} names other patches of these series",
                "{stack} 列出的是同系列的其他补丁版本",
                stack=one.told,
            )


_STATUS_NOTES: Mapping[str, str] = {
    "patch": say(
        "a patch: which CANN it is for follows from its release tag",
        "补丁版本：对应的 CANN 由发布标签推得",
    ),
    "pre-release": say("a pre-release", "预发布版本"),
    "unlisted": say(
        "seen on PyPI, in no list of the vendor: which CANN it is for is inferred",
        "仅见于 PyPI，未列入官方表：对应的 CANN 为推断",
    ),
}
