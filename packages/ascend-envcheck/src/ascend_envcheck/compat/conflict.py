"""Why no set of versions fits: which of the fixed values exclude each other, and what would be legal."""

from __future__ import annotations

from itertools import combinations
from typing import Iterator, Sequence

from ascend_envcheck.compat.asked import LABELS, Asked, known
from ascend_envcheck.compat.candidates import candidates
from ascend_envcheck.messages import joined, say
from ascend_envcheck.tables import DATA_DATE

_SHOWN = 8  # how many legal values are listed


def explained(fixed: Sequence[Asked]) -> str:
    """The reason, for values of which no set is left."""
    unknown = [_unknown(one) for one in fixed if not one.values]
    if unknown:
        return joined(unknown)
    for size in range(1, len(fixed) + 1):
        for few in combinations(fixed, size):
            if not candidates(few):
                return _excluded(few)
    raise AssertionError("asked why nothing fits of values that do fit")


def _unknown(one: Asked) -> str:
    return say(
        "{value} is unknown to this tool, whose tables end on {date}; the closest that it knows: {near}",
        "本工具不认识 {value}（数据截至 {date}）；已知的最接近版本：{near}",
        value=one.told,
        date=DATA_DATE,
        near=", ".join(one.nearest()),
    )


def _excluded(few: Sequence[Asked]) -> str:
    if len(few) == 1:
        return say(
            "no source says with what {value} goes; {label} with a known set: {legal}",
            "没有资料说明 {value} 的配套版本；有配套信息的 {label}：{legal}",
            value=few[0].told,
            label=LABELS[few[0].name],
            legal=_list(legal(few[0].name, ())),
        )
    values = say(
        "{first} and {last}", "{first} 与 {last}", first=", ".join(o.told for o in few[:-1]), last=few[-1].told
    )
    head = say("{values} do not fit together", "{values} 不配套", values=values)
    return joined([head, *_ways_out(few)])


def _ways_out(few: Sequence[Asked]) -> Iterator[str]:
    for one in reversed(few):
        others = [other for other in few if other is not one]
        found, given = legal(one.name, others), ", ".join(other.told for other in others)
        if found:
            yield say(
                "with {given}, {label} may be {legal}",
                "在 {given} 的前提下，{label} 可为 {legal}",
                given=given,
                label=LABELS[one.name],
                legal=_list(found),
            )
        else:
            yield say(
                "no {label} goes with {given}", "没有与 {given} 配套的 {label}", label=LABELS[one.name], given=given
            )


def legal(name: str, others: Sequence[Asked]) -> list[str]:
    """The values of one thing that go with the others, newest first; those of released builds where there are any."""
    found = candidates(others)
    released = [candidate for candidate in found if candidate.row.status in ("general", "patch")]
    values = {value for candidate in released or found for value in candidate.left[name]}
    return [version for version in known(name) if version in values]


def _list(values: Sequence[str]) -> str:
    shown = ", ".join(values[:_SHOWN])
    return f"{shown}, …" if len(values) > _SHOWN else shown
