"""``env``: the environment variables that a task wants, with why; they are printed, never set."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping

from ascend_envcheck.commands.terminal import add_language, language, show
from ascend_envcheck.findings import TASKS, TRAIN

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ascend_envcheck.profiles import Entry

BASH, FISH, DOTENV, DOCKER = "bash", "fish", "dotenv", "docker"

_HOW = """\
how to use what is printed:
  bash    eval "$(ascend-envcheck env)"
  fish    ascend-envcheck env --shell fish | source
  dotenv  ascend-envcheck env --shell dotenv > npu.env; docker run --env-file npu.env IMAGE
  docker  docker run $(ascend-envcheck env --shell docker) IMAGE
Variables whose value only the machine knows are printed as comments, with what to fill in."""


def add(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "env",
        help="print the environment variables that a task wants, with why",
        epilog=_HOW,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--profile", choices=TASKS, default=TRAIN, help="what the machine is for (default: %(default)s)"
    )
    parser.add_argument("--shell", choices=tuple(_FORMS), default=BASH, help="the form (default: %(default)s)")
    parser.add_argument("--from", type=Path, metavar="FILE", dest="source", help="for the machine of this snapshot")
    add_language(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the variables."""
    from ascend_envcheck.commands.facts import read_snapshot
    from ascend_envcheck.profiles import env_profile

    snapshot = read_snapshot(options.source) if options.source is not None else None
    entries = env_profile(options.profile, snapshot=snapshot)
    lines = (line for entry in entries for line in _FORMS[options.shell](entry, language(options)))
    show("".join(f"{line}\n" for line in lines))
    return 0


def _comments(entry: Entry, spoken: str) -> Iterator[str]:
    """Why, and what to fill in where there is no value; then what to beware of; each on one line."""
    from ascend_envcheck.messages import joined, say, told

    fill = [] if entry.value else [say("fill in {what}", "请填写：{what}", what=entry.fill)]
    beware = [say("beware: {what}", "注意：{what}", what=entry.pitfalls)] if entry.pitfalls else []
    for text in (joined([*fill, entry.why]), *beware):
        yield "# " + " ".join(told(text, spoken).split())


def _bash(entry: Entry, spoken: str) -> Iterator[str]:
    import shlex

    yield from _comments(entry, spoken)
    yield f"export {entry.name}={shlex.quote(entry.value)}" if entry.value else f"# export {entry.name}="


def _fish(entry: Entry, spoken: str) -> Iterator[str]:
    yield from _comments(entry, spoken)
    yield f"set -gx {entry.name} {fish_quoted(entry.value)}" if entry.value else f"# set -gx {entry.name} "


def _dotenv(entry: Entry, spoken: str) -> Iterator[str]:
    # docker takes a value as it stands, quotes included; no value of the table needs any.
    yield from _comments(entry, spoken)
    yield f"{entry.name}={entry.value}" if entry.value else f"# {entry.name}="


def _docker(entry: Entry, spoken: str) -> Iterator[str]:
    if entry.value:  # words for a command line, where no comment can stand
        yield f"-e {entry.name}={entry.value}"


def fish_quoted(value: str) -> str:
    """A word of fish: between single quotes only backslash and quote are escaped (fish documentation, quotes)."""
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


_FORMS: Mapping[str, Callable[[Entry, str], Iterator[str]]] = {
    BASH: _bash,
    FISH: _fish,
    DOTENV: _dotenv,
    DOCKER: _docker,
}
