"""``check``: judge this machine, or a snapshot of another one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ascend_envcheck.commands.facts import add_probing, snapshot_for
from ascend_envcheck.commands.terminal import add_language, language, may_colour, show
from ascend_envcheck.findings import PROFILES

FORMATS = ("json", "sarif", "junit", "markdown")


def add(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser("check", help="judge this machine, or a snapshot of another one")
    parser.add_argument("--profile", choices=PROFILES, default="all", help="what it is wanted for (default: all)")
    forms = parser.add_mutually_exclusive_group()
    for name in FORMATS:
        forms.add_argument(
            f"--{name}", action="store_const", const=name, dest="format", help=f"print the report as {name}"
        )
    parser.add_argument("--only", type=ids, default=[], metavar="ID,...", help="run these rules only")
    parser.add_argument("--skip", type=ids, default=[], metavar="ID,...", help="run all rules but these")
    parser.add_argument("--strict", action="store_true", help="a WARN makes the exit status 1 too")
    parser.add_argument("--from", type=Path, metavar="FILE", dest="source", help="judge this snapshot")
    add_rule_files(parser)
    add_language(parser)
    add_probing(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Judge, and print."""
    from ascend_envcheck.judge import check, choose
    from ascend_envcheck.render import rendered
    from ascend_envcheck.rules.packs import all_rules

    rules = all_rules(options.rules)
    chosen = choose(options.only, options.skip, rules)
    snapshot = snapshot_for(options, import_torch=any(rule.needs_import for rule in chosen))
    report = check(snapshot, profile=options.profile, only=options.only, skip=options.skip, rules=rules)
    form = options.format or "text"
    show(rendered(report, snapshot, rules, kind=form, language=language(options), colours=may_colour()))
    return report.exit_code(strict=options.strict)


def add_rule_files(parser: argparse.ArgumentParser) -> None:
    """Declare rules of others."""
    parser.add_argument(
        "--rules", type=Path, action="append", default=[], metavar="FILE", help="and by the rules of this JSON pack"
    )


def ids(text: str) -> list[str]:
    """A list of ids with commas between."""
    return [part.strip() for part in text.split(",") if part.strip()]
