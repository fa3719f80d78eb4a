"""``diff``: what differs between snapshots; of three and more, which node is the odd one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator, Sequence

from ascend_envcheck.commands.facts import read_snapshot
from ascend_envcheck.commands.terminal import add_language, language, show
from ascend_envcheck.messages import Message, say, told

if TYPE_CHECKING:
    from ascend_envcheck.diff import Difference

_SAME = Message("no difference in {count} snapshots", "{count} 份快照没有差异")
_ODD = Message("{fact} {value}, the other {others} have {usual}", "{fact} 为 {value}，其余 {others} 个为 {usual}")
_RARE = Message(
    "{fact} {value}, {others} of {count} have {usual}", "{fact} 为 {value}，{count} 个中有 {others} 个为 {usual}"
)
_AS_MOST = Message("{names}: as the majority", "{names}：与多数一致")
_DIFFERS = Message("{name}: differs from the majority in {count}", "{name}：与多数有 {count} 处不同")
_TIE = say("no majority, so none of them is the odd one:", "没有多数，无法判断谁不同：")
_COLON = say(": ", "：")


def add(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser("diff", help="tell what differs between snapshots, and which of many is the odd one")
    parser.add_argument("first", type=Path, metavar="A", help="a snapshot")
    parser.add_argument("others", type=Path, nargs="+", metavar="B", help="another one, or several")
    parser.add_argument("--json", action="store_true", help="print the differences as JSON")
    add_language(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Compare, and print; 0 the same, 1 different."""
    from ascend_envcheck.diff import differences
    from ascend_envcheck.render.text import printable

    paths = [options.first, *options.others]
    names = [str(path) for path in paths]
    found = differences([read_snapshot(path) for path in paths])
    if options.json:
        show(_json(names, found))
    elif not found:
        show(told(say(_SAME, _SAME.in_chinese, count=len(names)), language(options)) + "\n")
    else:
        tell = _two if len(names) == 2 else _many
        show("".join(printable(line) + "\n" for line in tell(names, found, language(options))))
    return int(bool(found))


def _json(names: Sequence[str], found: Sequence[Difference]) -> str:
    import json

    differences = [
        {
            "topic": each.fact.topic,
            "name": each.fact.title,
            "values": list(each.values),
            "majority": each.usual,
            "odd": [names[place] for place in each.odd],
        }
        for each in found
    ]
    return json.dumps({"schema_version": 1, "files": list(names), "differences": differences}, indent=2) + "\n"


def _two(names: Sequence[str], found: Sequence[Difference], spoken: str) -> Iterator[str]:
    """A table by topic: the fact, then what each of the two has, on lines of its own where that is long."""
    from ascend_envcheck.diff import TOPICS

    columns, topic = max(len(name) for name in names), ""
    for each in found:
        if each.fact.topic != topic:
            topic = each.fact.topic
            yield told(TOPICS[topic], spoken)
        yield f"  {each.fact.title}"
        for name, value in zip(names, each.values):
            yield f"    {name:<{columns}}  {value}"


def _many(names: Sequence[str], found: Sequence[Difference], spoken: str) -> Iterator[str]:
    """Each node that differs from the majority, with how; then that about which there is none."""
    odd = {place for each in found for place in each.odd}
    if any(each.usual is not None for each in found):
        normal = ", ".join(name for place, name in enumerate(names) if place not in odd)
        if normal:
            yield told(say(_AS_MOST, _AS_MOST.in_chinese, names=normal), spoken)
        for place in sorted(odd):
            mine = [each for each in found if place in each.odd]
            yield told(say(_DIFFERS, _DIFFERS.in_chinese, name=names[place], count=len(mine)), spoken)
            yield from (f"  {names[place]}{told(_COLON, spoken)}{_against(each, place, spoken)}" for each in mine)
    ties = [each for each in found if each.usual is None]
    if ties:
        yield told(_TIE, spoken)
    for each in ties:
        yield f"  {each.fact.title}"
        for value in dict.fromkeys(value for value in each.values if value is not None):
            yield f"    {value}  ({', '.join(n for n, v in zip(names, each.values) if v == value)})"


def _against(each: Difference, place: int, spoken: str) -> str:
    known = [value for value in each.values if value is not None]
    template = _ODD if len(each.odd) == 1 else _RARE
    return told(
        say(
            template,
            template.in_chinese,
            fact=each.fact.title,
            value=each.values[place],
            others=known.count(str(each.usual)),
            count=len(known),
            usual=each.usual,
        ),
        spoken,
    )
