"""The command that a training script ends in, with its variables put in. Nothing of the script is run."""

from __future__ import annotations

import ast
import operator
import re
import shlex
from collections.abc import Callable, Mapping, Sequence

from mm_finetune.errors import DataError

ASSIGNMENT = re.compile(
    r"""^[ \t]*(?:export[ \t]+)?([A-Za-z_]\w*)=("(?:[^"\\]|\\.)*"|'[^']*'|\$\(\([^\n]*\)\)|[^\s;#]*)""", re.M
)
ARITHMETIC = re.compile(r"\$\(\((.*?)\)\)")
VARIABLE = re.compile(r"\$\{(\w+)(?::?-([^}]*))?\}|\$(\w+)")
OPERATORS: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def training_arguments(text: str) -> dict[str, list[str]]:
    """The flags that a script gives to its training program, each with its values.

    Args:
        text: a shell script: assignments, then ``torchrun … some.py flags``.

    Raises:
        DataError: there is no such command, or a number of it can't be worked out.
    """
    text = text.replace("\r\n", "\n").replace("\\\n", " ")
    values = _variables(text)
    lines = [line.strip() for line in text.splitlines()]
    command = next((line for line in lines if re.match(r"(torchrun|python3?|msrun)\b.*\.py\b", line)), None)
    if command is None:
        raise DataError("the script has no line 'torchrun … program.py flags'; give the script that starts training")
    try:
        words = shlex.split(_expand(command, values), comments=True)
    except ValueError as error:
        raise DataError(f"the training command of the script can't be read: {error}: {command:.200}") from error
    start = next(place for place, word in enumerate(words) if word.endswith(".py")) + 1
    end = next((n for n, word in enumerate(words) if n > start and (word in ("|", "&") or ">" in word)), len(words))
    return _flags(words[start:end])


def _variables(text: str) -> dict[str, str]:
    values: dict[str, str] = {}
    for name, value in ASSIGNMENT.findall(text):
        values[name] = value[1:-1] if value[:1] == "'" else _expand(value.strip('"'), values)
    return values


def _expand(text: str, values: Mapping[str, str]) -> str:
    def variable(match: re.Match[str]) -> str:
        name, default = match[1] or match[3], match[2]
        return values.get(name, match[0] if default is None else default)

    def number(match: re.Match[str]) -> str:
        # Inside, a name needs no dollar.
        expression = re.sub(r"[A-Za-z_]\w*", lambda m: values.get(m[0], m[0]), VARIABLE.sub(variable, match[1]))
        try:
            return str(_calculate(ast.parse(expression.strip().replace("/", "//"), mode="eval").body))
        except (SyntaxError, ValueError, ZeroDivisionError):
            return match[0]

    return VARIABLE.sub(variable, ARITHMETIC.sub(number, text))


def _calculate(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_calculate(node.left), _calculate(node.right))
    raise ValueError("no arithmetic of whole numbers")


def _flags(words: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            current = found[name] = [value] if equals else []
        else:
            current.append(word)
    return found
