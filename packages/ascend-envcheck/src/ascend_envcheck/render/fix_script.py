"""The steps of a fix as a bash script, for a person to read, to change and to run step by step.

No text of a snapshot stands in it other than in a comment, all in one line, or as a quoted word.
"""

from __future__ import annotations

import shlex
from typing import Iterator, Sequence

from ascend_envcheck.findings import Report
from ascend_envcheck.fix import Step, steps
from ascend_envcheck.messages import ENGLISH, say, told
from ascend_envcheck.render.text import printable
from ascend_envcheck.snapshot import Snapshot


def script(report: Report, snapshot: Snapshot, language: str = ENGLISH) -> str:
    """The script; without arguments it lists its steps, and runs none."""
    all_steps = steps(report, snapshot)
    parts = [_header(snapshot, language), *(_functions(n, step, language) for n, step in enumerate(all_steps, 1))]
    return "\n".join([*parts, _listing(all_steps, language), _dispatch(all_steps)])


def _header(snapshot: Snapshot, language: str) -> str:
    return _HEADERS[language].format(version=printable(snapshot.tool_version))


def _functions(number: int, step: Step, language: str) -> str:
    """Two functions, do and undo; a held step has its commands as comments."""
    lines = [f"# {printable(step.id)}: {printable(told(step.cause, language))}"]
    if step.source:
        lines.append(f"# {told(_SOURCE, language)}{printable(told(step.source, language))}")
    lines += _body(f"do_{number}", [step.do], step, language)
    if step.note and step.undo:
        lines.append(f"# {told(_UNDO, language)}{told(step.note, language)}")
    return "\n".join([*lines, *_body(f"undo_{number}", list(step.undo), step, language), ""])


def _body(name: str, commands: Sequence[str], step: Step, language: str) -> Iterator[str]:
    yield f"{name}() {{"
    if not commands:
        yield f"    refuse {shlex.quote(told(_NO_UNDO, language))}"
    elif step.held:
        yield f"    # {told(step.held, language)}{told(_ARM, language)}"
        yield from (f"    # {printable(command)}" for command in commands)
        yield f"    refuse {shlex.quote(told(_HELD, language) + told(step.held, language))}"
    else:
        yield from (f"    echo {shlex.quote(command)}" if step.shell else f"    {command}" for command in commands)
    yield "}"


def _listing(all_steps: Sequence[Step], language: str) -> str:
    columns = max([4, *(len(step.id) for step in all_steps)])
    usage = '"$0"'.join(shlex.quote(part) for part in told(_USAGE, language).split("./SCRIPT"))
    lines = ["list() {", f"    say {usage}"]
    for step in all_steps:
        state = told(_HELD, language) + told(step.held, language) if step.held else told(step.do, language)
        lines.append(f"    say {shlex.quote(printable(f'{step.id:<{columns}}  {told(step.cause, language)}'))}")
        lines.append(f"    say {shlex.quote(printable(' ' * columns + '  -> ' + state))}")
    return "\n".join([*lines, "}", ""])


def _dispatch(all_steps: Sequence[Step]) -> str:
    cases = [
        f"    {verb}:{shlex.quote(printable(step.id))}) {function}_{number} ;;"
        for number, step in enumerate(all_steps, 1)
        for verb, function in (("run", "do"), ("undo", "undo"))
    ]
    ends = ["    :) list ;;", "    *) list >&2; exit 2 ;;"]
    return "\n".join(['case "${1-}:${2-}" in', *cases, *ends, "esac", ""])


_SOURCE, _UNDO = say("source: ", "来源："), say("undo: ", "撤销：")
_HELD = say("commented out: ", "已注释掉：")
_ARM = say("; to run it, remove the # and the refusal:", "；如需执行，请去掉 # 和 refuse 一行：")
_NO_UNDO = say("no undo is known", "没有已知的撤销方法")
_USAGE = say(
    'usage: ./SCRIPT run ID | undo ID; steps that set variables print them: eval "$(./SCRIPT run ID)"',
    '用法：./SCRIPT run ID | undo ID；设置变量的步骤只打印命令：eval "$(./SCRIPT run ID)"',
)

_START = """\
set -euo pipefail

say() {{ printf '%s\\n' "$1"; }}
refuse() {{
    printf '%s\\n' "$1" >&2
    return 1
}}
"""
_HEADERS = {
    "en": """\
#!/usr/bin/env bash
# Written by ascend-envcheck {version} from what it found on a machine. It was never run, on any machine.
# READ IT BEFORE YOU RUN ANYTHING, and change what does not suit you.
#
# Without arguments it lists the steps and runs none. Each step is run, and where that is known undone, by itself:
#     run ID      undo ID
# A script can't change the shell that calls it: a step that sets a variable prints the line for that shell, which
# takes it by eval "$(... run ID)". What needs root, a download or a decision of yours is a comment, with the reason.
"""
    + _START,
    "zh": """\
#!/usr/bin/env bash
# 由 ascend-envcheck {version} 根据检查结果生成，从未在任何机器上运行过。
# 运行之前请务必通读，并按需要修改。
#
# 不带参数时只列出步骤，不执行任何操作。每个步骤单独执行；已知撤销方法的可以单独撤销：
#     run ID      undo ID
# 脚本无法修改调用它的 shell：设置变量的步骤只打印命令，由调用方通过 eval "$(... run ID)" 生效。
# 需要 root 权限、需要下载或需要人工决定的步骤均已注释掉，并注明原因。
"""
    + _START,
}
