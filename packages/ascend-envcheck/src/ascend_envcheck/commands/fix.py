"""``fix``: write a script of what to do, for a person to read; it is never run from here."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ascend_envcheck.commands.check import add_rule_files
from ascend_envcheck.commands.facts import add_probing, snapshot_for
from ascend_envcheck.commands.terminal import add_language, language
from ascend_envcheck.findings import PROFILES
from ascend_envcheck.messages import Message, say, told

_NOTHING = say("nothing to do: no FAIL and no WARN names a command", "无需处理：没有带命令的 FAIL 或 WARN")
_WRITTEN = Message(
    "{path}: steps: {count}, of these commented out: {held}. Read it, then call it without arguments; nothing was run.",
    "{path}：{count} 个步骤，其中 {held} 个已注释掉。请先阅读，再不带参数运行它；没有执行任何操作。",
)


def add(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser("fix", help="write a script with a step and its undo for each fault; runs nothing")
    parser.add_argument("--emit", type=Path, required=True, metavar="FILE", help="where to write the script")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing FILE")
    parser.add_argument("--profile", choices=PROFILES, default="all", help="what it is wanted for (default: all)")
    parser.add_argument("--from", type=Path, metavar="FILE", dest="source", help="for the machine of this snapshot")
    add_rule_files(parser)
    add_language(parser)
    add_probing(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Judge, and write the script where there is something to do."""
    from ascend_envcheck.fix import steps
    from ascend_envcheck.judge import check
    from ascend_envcheck.output import refuse_existing, write_new
    from ascend_envcheck.render.fix_script import script
    from ascend_envcheck.rules.packs import all_rules

    if not options.overwrite:
        refuse_existing(options.emit)
    rules = all_rules(options.rules)
    snapshot = snapshot_for(options)
    report = check(snapshot, profile=options.profile, rules=rules)
    planned, spoken = steps(report, snapshot), language(options)
    if not planned:
        sys.stderr.write(told(_NOTHING, spoken) + "\n")
        return 0
    write_new(options.emit, script(report, snapshot, spoken), overwrite=options.overwrite)
    mode = options.emit.stat().st_mode
    options.emit.chmod(mode | (mode & 0o444) >> 2)  # whoever may read it may run it
    counts = {"path": options.emit, "count": len(planned), "held": sum(bool(step.held) for step in planned)}
    sys.stderr.write(told(say(_WRITTEN, _WRITTEN.in_chinese, **counts), spoken) + "\n")
    return 0
