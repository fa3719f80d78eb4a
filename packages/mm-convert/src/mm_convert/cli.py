"""The command ``mm-convert``: the published converters, and commands that only read.

Only the options of the command that was typed are built: its help, and every start, cost a fraction of a second.
"""

from __future__ import annotations

import sys
import traceback
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence

from mm_convert.commands import published, reports
from mm_convert.errors import ConvertError

ABOUT = "Checkpoints from Hugging Face to the Megatron-style layout of MindSpeed MM, from there to another, and back."
PLAN = "the dry run of a conversion: what is read, written, needed, and the proof; nothing is touched"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0 when done, 1 if two checkpoints differ, 2 for bad input, 3 for a defect of ours, 130 when interrupted.
    """
    try:
        code, text = _run(list(sys.argv[1:] if argv is None else argv))
    except (ConvertError, OSError) as error:
        print(f"mm-convert: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        # Whoever writes says what is left; before, and in commands that only read, nothing is.
        print(f"mm-convert: interrupted; {str(error) or 'nothing was written'}", file=sys.stderr)
        return 130
    except Exception:  # noqa: BLE001  # the edge of the command: a defect of ours, shown whole
        traceback.print_exc()
        return 3
    print(text)
    return code


def _run(argv: list[str]) -> tuple[int, str]:
    if argv[:1] == ["--version"]:
        from importlib.metadata import version

        return 0, f"mm-convert {version('mm-convert')}"
    converters = published.converters()
    first = _choice("mm-convert", ABOUT, {"plan": PLAN, **reports.HELP, **converters}, argv[:1])
    if first in reports.COMMANDS:
        return reports.run(first, argv[1:])
    planning = first == "plan"
    prog, words = ("mm-convert plan", argv[1:]) if planning else ("mm-convert", argv)
    converter = _choice(prog, PLAN, converters, words[:1])
    helps = {name: published.HELP[name] for name in published.commands(converter)}
    rest = published.without_version(converter, words[1:])
    command = _choice(f"{prog} {converter}", converters[converter], helps, rest[:1])
    return published.run(converter, command, rest[1:], plan=planning)


def _choice(prog: str, about: str, choices: Mapping[str, str], words: Sequence[str]) -> str:
    """One of several words; help and errors are argparse's."""
    parser = ArgumentParser(prog=prog, description=about)
    if prog == "mm-convert":
        parser.add_argument("--version", action="store_true", help="say the version")
    below = parser.add_subparsers(dest="chosen", required=True, metavar="COMMAND", title="commands")
    for name, help_text in choices.items():
        below.add_parser(name, help=help_text, add_help=False)
    if words and words[0] not in choices:
        from difflib import get_close_matches

        near = get_close_matches(words[0], choices, n=1)
        if near:
            parser.error(f"{words[0]!r} is no command; did you mean {near[0]}? There are: {', '.join(choices)}")
    return str(parser.parse_args(words).chosen)
