"""What is known of the environment variables of the NPU stack: ``data/variables.ini``, as objects."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Mapping

from ascend_envcheck.findings import TASKS
from ascend_envcheck.messages import CHINESE, Message

NOTHING = Message("")

ERROR, IGNORED = "error", "ignored"
"""What an illegal value does: the program stops, or the default (or nothing) takes effect."""

LONGEST = 4096
"""Characters of a value that are looked at; no legal value of the table comes near."""

_CHINESE_ENDING = f".{CHINESE}"
_OTHER_NAMES = (
    # of the launcher
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "NNODES", "NPROC_PER_NODE",
    "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "RANK_ID", "RANK_SIZE",
    "CM_CHIEF_IP", "CM_CHIEF_PORT", "CM_CHIEF_DEVICE", "CM_WORKER_SIZE", "CM_WORKER_IP",
    # of the installation
    "ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME", "ASCEND_DRIVER_PATH", "ASCEND_OPP_PATH", "ASCEND_AICPU_PATH",
    "ASCEND_CUSTOM_OPP_PATH", "ASCEND_WORK_PATH", "ASCEND_CACHE_PATH", "ATB_HOME_PATH", "LD_LIBRARY_PATH",
    "OOM_SNAPSHOT_PATH",
)  # fmt: skip


@dataclass(frozen=True)
class Option:
    """One option of a variable that holds a list of them, ``NAME=option:value,…``, or what a variable has in common.

    Args:
        name: of the option, or of the variable.
        pattern: a regular expression for the whole value; "" when everything is legal.
        bounds: lowest and highest legal number, "" for none.
        since: component (torch, torch_npu, cann, driver) to the first version in which it has an effect.
        deprecated: component to the first version that advises against it.
        removed: component to the first version in which it has no effect any more.
        instead: the newer name.
    """

    name: str
    pattern: str = ""
    bounds: tuple[str, str] = ("", "")
    since: Mapping[str, str] = field(default_factory=dict)
    deprecated: Mapping[str, str] = field(default_factory=dict)
    removed: Mapping[str, str] = field(default_factory=dict)
    instead: str = ""

    def allows(self, value: str) -> bool:
        """Whether a value is legal."""
        if self.pattern and not (len(value) <= LONGEST and re.fullmatch(self.pattern, value, re.ASCII)):
            return False
        low, high = self.bounds
        if not (low or high):
            return True
        number = whole_number(value)
        return number is not None and (not low or number >= int(low)) and (not high or number <= int(high))


@dataclass(frozen=True)
class Variable(Option):
    """One environment variable.

    Args:
        legal: the legal values in the vendor's notation.
        illegal: what an illegal value does: `ERROR` or `IGNORED`.
        default: what holds when it is not set; "" when nothing does.
        train, infer: the recommended value; "" to leave it alone.
        advice: where the recommendation comes from.
        fill: what to fill in, where only the machine knows the value.
        why: what it does for you.
        pitfalls: what to beware of; "" for nothing known.
        tasks: what it matters for.
        source: where this is documented.
        confidence: official, code or field.
        options: those of a list, by name.
    """

    legal: str = ""
    illegal: str = IGNORED
    default: str = ""
    train: str = ""
    infer: str = ""
    advice: str = ""
    fill: Message = NOTHING
    why: Message = NOTHING
    pitfalls: Message = NOTHING
    tasks: tuple[str, ...] = TASKS
    source: str = ""
    confidence: str = ""
    options: Mapping[str, Option] = field(default_factory=dict)

    def recommended(self, task: str) -> str:
        """The value that a profile recommends."""
        return {"train": self.train, "infer": self.infer}[task]

    def allows_form(self, value: str) -> bool:
        """Whether a value is legal, whatever its options say."""
        return super().allows(value)

    def allows(self, value: str) -> bool:
        """Whether a value, with all its options, is legal."""
        known = not self.options or all(name in self.options for name in options_of(value))
        return known and self.allows_form(value) and not self.wrong_options(value)

    def wrong_options(self, value: str) -> list[str]:
        """The known options of a list that have a value that is not legal, as ``option:value``."""
        given = options_of(value) if self.options else {}
        return [f"{name}:{text}" for name, text in given.items()
                if name in self.options and not self.options[name].allows(text)]  # fmt: skip


def options_of(value: str) -> dict[str, str]:
    """The options of ``a:1,b:[x:1,y:2]``; a comma in brackets ends none."""
    parts = (part.partition(":") for part in re.findall(r"[^,\[]*(?:\[[^\]]*\]?[^,\[]*)*", value[:LONGEST]))
    return {name.strip(): text.strip() for name, _, text in parts if name.strip()}


def whole_number(text: str) -> int | None:
    """The number in a text of digits only, None for any other; what is longer than 18 digits is none that is meant."""
    return int(text) if re.fullmatch(r"\d{1,18}", text, re.ASCII) else None


def variables(soc: str | None = None) -> Mapping[str, Variable]:
    """All variables by name, in the table's order, on a SoC (``ascend910b``) or on one that is not known."""
    return _variables(soc or "")


def names() -> tuple[str, ...]:
    """The variables that are worth writing down: those of the table, of the launcher and of the installation."""
    return tuple(dict.fromkeys((*variables(), *_OTHER_NAMES)))


@lru_cache(maxsize=16)
def _variables(soc: str) -> Mapping[str, Variable]:
    rows = sections("variables")
    options: dict[str, dict[str, Option]] = {}
    for section, row in rows.items():
        name, _, option = section.partition(":")
        if option:
            options.setdefault(name, {})[option] = Option(option, **_limits(row, soc))
    return {name: _variable(name, row, soc, options.get(name, {})) for name, row in rows.items() if ":" not in name}


@lru_cache(maxsize=None)
def sections(name: str) -> Mapping[str, Mapping[str, str]]:
    """The sections of ``data/NAME.ini``; a table in this form has long texts, which a line of CSV would bury."""
    import configparser
    import pkgutil

    raw = pkgutil.get_data("ascend_envcheck", f"data/{name}.ini")
    assert raw is not None, f"the installed package lacks data/{name}.ini"
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",), comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(raw.decode("utf-8"))
    return {name: dict(parser.items(name)) for name in parser.sections()}


def _variable(name: str, row: Mapping[str, str], soc: str, options: Mapping[str, Option]) -> Variable:
    plain: dict[str, Any] = {
        key: _of(row, key, soc) for key in ("default", "train", "infer", "advice", "source", "confidence", "legal")
    }
    texts: dict[str, Any] = {
        key: Message(row.get(key, ""), row.get(key + _CHINESE_ENDING, "")) for key in ("fill", "why", "pitfalls")
    }
    return Variable(
        name,
        **_limits(row, soc),
        **plain,
        **texts,
        illegal=_of(row, "illegal", soc) or IGNORED,
        tasks=(row["tasks"],) if row.get("tasks") else TASKS,
        options=options,
    )


def _limits(row: Mapping[str, str], soc: str) -> dict[str, Any]:
    low, _, high = _of(row, "range", soc).partition("..")
    versions = {key: _versions(row.get(key, "")) for key in ("since", "deprecated", "removed")}
    return {"pattern": _of(row, "pattern", soc), "bounds": (low, high), "instead": row.get("instead", ""), **versions}


def _of(row: Mapping[str, str], key: str, soc: str) -> str:
    return row.get(f"{key}.{soc}", row.get(key, ""))


def _versions(text: str) -> dict[str, str]:
    """``torch_npu 7.3.0, cann 8.5.0`` as a mapping."""
    return {words[0]: words[1] for words in (part.split() for part in text.split(",")) if len(words) == 2}
