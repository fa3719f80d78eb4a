"""The matrix of versions, and a solution with its steps, for people and for machines."""

from __future__ import annotations

import json
import shutil
import unicodedata
from dataclasses import asdict
from typing import Iterator, Mapping, Sequence

from ascend_envcheck.compat.asked import LABELS, Asked
from ascend_envcheck.compat.candidates import Candidate, matching
from ascend_envcheck.compat.install import Step
from ascend_envcheck.compat.solver import Answer, Solution, answer
from ascend_envcheck.messages import say, told
from ascend_envcheck.render.text import printable
from ascend_envcheck.tables import DATA_DATE, torch_npu_rows
from ascend_envcheck.versions import release

_ALTERNATIVES = 5  # how many further sets --solve names
_SHOWN = 3  # HDKs in a row
_WIDE = 160  # columns for a table that goes to no terminal
_COLUMNS = {
    "torch": "torch",
    "torch_npu": "torch_npu",
    "cann": "CANN",
    "status": say("status", "状态"),
    "confidence": say("confidence", "置信度"),
    "python": "Python",
    "release": "TorchNPU",
    "wheels": say("wheels", "wheel"),
    "hdk": "HDK",
}
"""The columns, the most important first: a narrow terminal loses the last ones."""

Unknown = Sequence["tuple[str, str]"]


def listed(fixed: Sequence[Asked], unknown: Unknown, *, as_json: bool, language: str) -> tuple[str, bool]:
    """The rows that match, newest first, and whether there are any."""
    rows = chosen(fixed)
    why = "" if rows else answer(fixed).why
    if as_json:
        return _json(fixed, unknown, rows=[_plain_row(row) for row in rows], why=why), bool(rows)
    body = _table([_row(row) for row in rows], language) if rows else [why]
    return _text([*_preface(fixed, unknown), *body], language), bool(rows)


def solved(fixed: Sequence[Asked], unknown: Unknown, *, as_json: bool, language: str) -> tuple[str, bool]:
    """The best set with its steps, and whether there is one."""
    found = answer(fixed)
    if as_json:
        solutions = [_plain(solution) for solution in found.solutions[: 1 + _ALTERNATIVES]]
        return _json(fixed, unknown, solutions=solutions, why=found.why), bool(found.solutions)
    body = _best(found, language) if found.best else [found.why]
    return _text([*_preface(fixed, unknown), *body], language), bool(found.solutions)


def chosen(fixed: Sequence[Asked]) -> list[Candidate]:
    """One row a torch_npu, newest first: with the CANN that it was made for, else the newest of those that are left.

    With a single torch_npu left: one row a CANN.
    """
    left: dict[str, list[Candidate]] = {}
    for candidate in matching(fixed):
        left.setdefault(candidate.row.torch_npu, []).append(candidate)
    newest = [left[row.torch_npu] for row in torch_npu_rows() if row.torch_npu in left]
    return newest[0] if len(newest) == 1 else [group[0] for group in newest]


def _row(candidate: Candidate) -> Mapping[str, str]:
    row = candidate.row
    return {
        "torch": row.torch,
        "torch_npu": row.torch_npu,
        "cann": f"{candidate.cann or '?'}{' (cross)' if candidate.pairing else ''}",
        "status": row.status,
        "confidence": row.confidence,
        "python": row.python_documented,
        "release": row.release,
        "wheels": _span(row.python_wheels),
        "hdk": _few(candidate.left["hdk"]),
    }


def _plain_row(candidate: Candidate) -> Mapping[str, object]:
    plain: dict[str, object] = asdict(candidate.row)
    return {**plain, "cann": candidate.cann, "exact": candidate.pairing is None, "hdk": candidate.left["hdk"]}


def _few(versions: Sequence[str]) -> str:
    return " ".join(versions[:_SHOWN]) + (" …" if len(versions) > _SHOWN else "")


def _span(versions: Sequence[str]) -> str:
    """3.9-3.11 for 3.9, 3.10, 3.11; a list where there are gaps."""
    minors = [(release(version) or (0, 0, 0))[1] for version in versions]
    if len(minors) > 1 and minors == list(range(minors[0], minors[-1] + 1)):
        return f"{versions[0]}-{versions[-1]}"
    return " ".join(versions)


def _table(rows: Sequence[Mapping[str, str]], language: str) -> Iterator[str]:
    heads = {name: told(head, language) for name, head in _COLUMNS.items()}
    widths = {name: max(_width(head), *(_width(row[name]) for row in rows)) for name, head in heads.items()}
    terminal = shutil.get_terminal_size((_WIDE, 0)).columns
    shown: list[str] = []
    used = 0
    for name, width in widths.items():
        if shown and used + width > terminal:
            break
        shown.append(name)
        used += width + 2
    for row in (heads, *rows):
        yield "  ".join(row[name] + " " * (widths[name] - _width(row[name])) for name in shown).rstrip()
    if any("(cross)" in row["cann"] for row in rows):
        yield say(
            "(cross): torch_npu was made for another CANN; the vendor lets the two series run together",
            "(cross)：torch_npu 对应另一个 CANN 版本，官方声明这两个系列可以混用",
        )


def _width(text: str) -> int:
    """Columns on a terminal; Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def _preface(fixed: Sequence[Asked], unknown: Unknown) -> Iterator[str]:
    if fixed:
        yield say("fixed: {values}", "已固定：{values}", values=", ".join(one.told for one in fixed))
    for name, text in unknown:
        yield say(
            "left open: {label} {text} is here, but not in the tables of {date}",
            "未固定：本机的 {label} {text} 不在 {date} 的数据中",
            label=LABELS[name],
            text=text,
            date=DATA_DATE,
        )


def _best(found: Answer, language: str) -> Iterator[str]:
    best = found.solutions[0]
    yield from _versions(best)
    for note in best.notes:
        yield say("  note: {note}", "  注意：{note}", note=note)
    yield say("  confidence: {value}", "  置信度：{value}", value=best.confidence)
    for source in best.sources:
        yield say("  source: {source}", "  来源：{source}", source=source)
    yield ""
    for number, step in enumerate(best.install, 1):
        yield from _step(number, step)
    others = [f"torch_npu {one.torch_npu} + CANN {one.cann}" for one in found.solutions[1 : 1 + _ALTERNATIVES]]
    if others:
        more = ", …" if len(found.solutions) > 1 + _ALTERNATIVES else ""
        yield ""
        yield say("next best: {others}", "其次：{others}", others=", ".join(others) + more)


def _versions(best: Solution) -> Iterator[str]:
    exact = (
        say("made for this CANN", "与该 CANN 一一对应")
        if best.exact
        else say("made for another CANN", "对应另一个 CANN 版本")
    )
    build = say(
        "{build} ({status}, {exact})",
        "{build}（{status}，{exact}）",
        build=best.torch_npu,
        status=best.status,
        exact=exact,
    )
    fields = (
        ("torch", best.torch),
        ("torch_npu", build),
        ("TorchNPU", best.release),
        ("CANN", best.cann),
        ("HDK", " / ".join(best.hdk)),
        ("Python", " / ".join(best.python)),
        ("torchvision", best.torchvision and f"{best.torchvision}.*"),
        ("MindSpeed-MM", best.mindspeed_mm),
        ("MindSpeed", best.mindspeed),
        ("Megatron-LM", best.megatron_core and f"core_v{best.megatron_core}"),
        ("MindIE-SD", best.mindie_sd),
    )
    for label, value in fields:
        if value:
            yield say("  {label}  {value}", "  {label}  {value}", label=label.ljust(12), value=value)


def _step(number: int, step: Step) -> Iterator[str]:
    yield say("{number}. {title}", "{number}. {title}", number=number, title=step.title)
    if step.why:
        yield say("   ({why})", "   （{why}）", why=step.why)
    for command in step.commands:
        yield f"     {command}"


def _plain(solution: Solution) -> Mapping[str, object]:
    return {**asdict(solution), "install": [asdict(step) for step in solution.install]}


def _json(fixed: Sequence[Asked], unknown: Unknown, **rest: object) -> str:
    document = {
        "schema_version": 1,
        "data_date": DATA_DATE,
        "fixed": {one.name: one.text for one in fixed},
        "unknown": dict(unknown),
        **rest,
    }
    return json.dumps(document, indent=2, sort_keys=True) + "\n"


def _text(lines: Sequence[str], language: str) -> str:
    return "".join(printable(told(line, language)) + "\n" for line in lines)
