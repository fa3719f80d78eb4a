"""An explanation as text for people."""

from __future__ import annotations

from typing import Iterable, Iterator

from ascend_envcheck.explanation.result import Explanation, Found, Place
from ascend_envcheck.failures import GENERIC, INFO, ROOT, WRAPPER
from ascend_envcheck.messages import ENGLISH, Message, joined, say, told

_NAMES = {
    ROOT: say("CAUSE", "原因"),
    WRAPPER: say("FOLLOWS", "后果"),
    GENERIC: say("PERHAPS", "可能"),
    INFO: say("NOTE", "提示"),
}
_UNKNOWN = say("UNKNOWN", "未知")
_INDENT = " " * 9
_BESIDE_A_CAUSE = 3  # unexplained lines that are shown where the cause is known


def render(explanation: Explanation, language: str = ENGLISH) -> str:
    """The cause first, with what follows from it, then the rest, and a verdict in plain words last."""
    lines: list[str] = []
    for found in explanation.found:
        if not found.follows:
            lines += [*_found(found, _followers(found, explanation.found), language), ""]
    lines += _unknown(explanation, language)
    return "\n".join([*lines, told(_verdict(explanation), language)]) + "\n"


def _found(found: Found, followers: list[Found], language: str) -> Iterator[str]:
    failure = found.failure
    yield f"{told(_NAMES[found.tier], language):<8} {failure.id}  {told(_where(found.first, found.count), language)}"
    yield f"{_INDENT}{told(failure.cause, language)}"
    yield f"{_INDENT}{told(say('fix:    ', '处理：'), language)}{told(failure.fix, language)}"
    yield f"{_INDENT}{told(say('source: ', '来源：'), language)}{failure.source} ({failure.confidence})"
    yield f"{_INDENT}> {found.first.text}"
    if followers:
        names = ", ".join(
            f"{follower.failure.id} ({told(_at(follower.first, found.first.file), language)})" for follower in followers
        )
        yield f"{_INDENT}{told(say('what followed: ', '由此引发：'), language)}{names}"


def _followers(root: Found, found: Iterable[Found]) -> list[Found]:
    return [other for other in found if other.follows == root.failure.id]


def _unknown(explanation: Explanation, language: str) -> Iterator[str]:
    places = explanation.unknown[: _BESIDE_A_CAUSE if explanation.cause else None]
    for place in places:
        yield f"{told(_UNKNOWN, language):<8} {told(_at(place), language)}"
        yield f"{_INDENT}> {place.text}"
    if places:
        yield ""


def _at(place: Place, here: str = "") -> Message:
    if place.file != here:
        return say("line {line} of {file}", "{file} 第 {line} 行", line=place.line, file=place.file)
    return say("line {line}", "第 {line} 行", line=place.line)


def _where(place: Place, count: int) -> Message:
    parts = [_at(place)]
    if place.rank:
        parts.append(say("rank {rank} said it first", "rank {rank} 最先报出", rank=place.rank))
    if count > 1:
        parts.append(say("{count} times", "共 {count} 次", count=count))
    return joined(parts, ", ", "，")


def _verdict(explanation: Explanation) -> Message:
    cause = explanation.cause
    if cause is not None:
        return say(
            "the most likely cause is {id}: {cause}",
            "最可能的原因是 {id}：{cause}",
            id=cause.failure.id,
            cause=cause.failure.cause,
        )
    if any(found.tier == WRAPPER for found in explanation.found):
        return say(
            "no root cause is in this log, only what follows from one: look at the other ranks, and at plog",
            "日志中没有根因，只有后果：请查看其他 rank 的日志与 plog",
        )
    if any(found.tier == GENERIC for found in explanation.found):
        return say("no root cause is known for this log; what is above may be it", "未能确定根因；以上条目可能是原因")
    if explanation.unknown:
        return say(
            "unknown: no failure of the table explains this log; the lines above are most likely to matter",
            "未知：知识库中没有能解释该日志的条目；以上各行最值得查看",
        )
    return say("no error; lines read: {lines}", "没有发现错误；共读取 {lines} 行", lines=explanation.lines)
