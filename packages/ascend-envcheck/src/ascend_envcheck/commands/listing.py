"""``list``: the rules, with a line each."""

from __future__ import annotations

import argparse
from typing import Any

from ascend_envcheck.commands.check import add_rule_files
from ascend_envcheck.commands.terminal import add_language, language, show


def add(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser("list", help="print the ids of the rules, with a line each")
    add_rule_files(parser)
    add_language(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the table of rules, by group."""
    from ascend_envcheck.messages import told
    from ascend_envcheck.render.text import printable
    from ascend_envcheck.rules.packs import all_rules
    from ascend_envcheck.rules.rule import GROUPS

    rules, spoken = all_rules(options.rules), language(options)
    columns = max(len(rule.id) for rule in rules)
    for group, title in GROUPS.items():
        members = [rule for rule in rules if (rule.group if rule.group in GROUPS else "other") == group]
        if members:
            show(f"{told(title, spoken)}\n")
        for rule in members:
            tasks = "" if len(rule.tasks) > 1 else f"  [{', '.join(rule.tasks)}]"
            show(printable(f"  {rule.id:<{columns}}  {told(rule.title, spoken)}{tasks}") + "\n")
    return 0
