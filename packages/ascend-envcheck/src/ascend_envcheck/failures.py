"""What a line of a log means: the package's own table of failures, ``data/failures.ini``, with its sources."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Iterator, Mapping, Pattern, Sequence, Tuple

from ascend_envcheck.messages import Message

ROOT, WRAPPER, GENERIC, INFO = "root", "wrapper", "generic", "info"
TIERS = (ROOT, WRAPPER, GENERIC, INFO)
"""What a failure is to the others of a log, in the order in which they are told; the table explains each."""

CLUES = (
    *("error", "not ", "ascend_hal", "fail", "Fail", "No ", "xception", " execution ", "of memory", "nvalid", "denied"),
    *("Watchdog", "_load_cudnn", "Detected kernel", "navailable", "Killed", "Segmentation", "Critical", "etCode"),
    *("Compatibility", "undefined symbol", "Err", "ERR", "EADDRINUSE", "EZ1001"),
)
"""Pieces of text one of which is in every line that a pattern of the table matches; rare in a healthy log."""

# A bare number may be a process id, a size or a step: a code of digits counts only where it is announced.
_NUMBER = re.compile(
    r"\b(?:[Ee]rror[ _]?[Cc]ode(?: is)?|ErrCode|retCode|ret(?:urn)?(?: code)?(?: is|[:=]))\s*[:=]?\s*(\d{6})\b"
)
_WORD = re.compile(r"E(?<!\wE)[A-Z0-9]\d{4}\b")

_Sign = Tuple[int, str, Pattern[str]]  # place in the table, a text that the line must hold, the pattern


@dataclass(frozen=True)
class Failure:
    """A kind of failure that is recognised by one line.

    Args:
        id: stable name; unique in the table.
        tier: root, wrapper, generic or info.
        category: what it belongs to: loader, driver, hccl, …
        cause: what happened, in one line.
        fix: commands or steps.
        source: where the knowledge comes from.
        confidence: vendor text, public issue, general knowledge, or derived.
        example: a line that this explains.
        codes: error codes that name it.
        pattern: a regular expression that finds it in a line; "" where the codes are enough.
    """

    id: str
    tier: str
    category: str
    cause: Message
    fix: Message
    source: str
    confidence: str
    example: str
    codes: tuple[str, ...]
    pattern: str


@lru_cache(maxsize=None)
def failures() -> tuple[Failure, ...]:
    """All failures of the table, in the order that decides: the first that matches a line names it."""
    import configparser  # needed once a log is explained, not before
    import pkgutil

    raw = pkgutil.get_data("ascend_envcheck", "data/failures.ini")
    assert raw is not None, "the installed package lacks data/failures.ini"
    table = configparser.ConfigParser(interpolation=None, delimiters=("=",), comment_prefixes=("#",), strict=True)
    table.read_string(raw.decode("utf-8"))
    return tuple(_failure(name, table[name]) for name in table.sections())


def match(line: str) -> Failure | None:
    """The failure that explains a line, or None; the line is one line, without colours."""
    table, by_code, signs = failures(), _by_code(), _signs()
    first = min((by_code.get(code, len(table)) for code in _codes(line)), default=len(table))
    # Plain searches come first: they cost a tenth of that for a regular expression.
    likely = [sign for clue in CLUES if clue in line for sign in signs[clue] if sign[1] in line]
    for at, _, regex in sorted(likely, key=lambda sign: sign[0]):
        if at < first and regex.search(line):
            return table[at]
    return table[first] if first < len(table) else None


def _codes(line: str) -> list[str]:
    announced = "ode" in line or "ret" in line
    return (_NUMBER.findall(line) if announced else []) + _WORD.findall(line)


def plain_texts(pattern: str) -> Iterator[list[str]]:
    """For each branch of a pattern, the plain texts that every line which it matches must hold.

    Understands what the table uses, and errs towards less: text in groups counts for nothing.
    """
    texts, depth = [""], 0
    for token in re.findall(r"\\.|\[\^?\]?[^\]]*\]|\{[^}]*\}|\(\?[:=!]|.", pattern):
        if token == "|" and not depth:
            yield texts
            texts = [""]
        elif depth or token[0] in "([{)^$.?*+|" or re.match(r"\\\w", token):
            depth += (token[0] == "(") - (token == ")")
            if token[0] in "?*{":
                texts[-1] = texts[-1][:-1]  # what it follows may be absent
            texts.append("")
        else:
            texts[-1] += token[-1]
    yield texts


@lru_cache(maxsize=None)
def _by_code() -> Mapping[str, int]:
    return {code: at for at, failure in enumerate(failures()) for code in failure.codes}


@lru_cache(maxsize=None)
def _signs() -> Mapping[str, Sequence[_Sign]]:
    """Each branch of each pattern, under the first clue that it holds."""
    signs: dict[str, list[_Sign]] = {clue: [] for clue in CLUES}
    for at, failure in enumerate(failures()):
        for texts in plain_texts(failure.pattern) if failure.pattern else ():
            clue = next((clue for clue in CLUES if any(clue in text for text in texts)), None)
            assert clue is not None, f"{failure.id}: no clue is in {texts}"
            signs[clue].append((at, max(texts, key=len), re.compile(failure.pattern)))
    return signs


def _failure(name: str, row: Mapping[str, str]) -> Failure:
    return Failure(
        id=name,
        tier=row["tier"],
        category=row["category"],
        cause=Message(row["cause"], row.get("cause.zh", "")),
        fix=Message(row["fix"], row.get("fix.zh", "")),
        source=row["source"],
        confidence=row["confidence"],
        example=row["example"],
        codes=tuple(row.get("codes", "").split()),
        pattern=row.get("pattern", ""),
    )
