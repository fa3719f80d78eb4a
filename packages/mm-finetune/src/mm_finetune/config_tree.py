"""Nested mappings to nested frozen dataclasses and back, with every fault named. Knows no key by itself."""

from __future__ import annotations

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from mm_finetune.errors import ConfigError

WORDS = {int: "a whole number", float: "a number", bool: "true or false", Path: "a path", str: "a text"}


def override(tree: dict[str, Any], text: str, cls: type, parse: Callable[[str], Any]) -> None:
    """Put ``section.key=value`` into a tree, at any depth.

    Args:
        tree: changed in place.
        text: the override. Below a key that is a mapping of patterns, the rest is one pattern, dots included.
        cls: the dataclass that `tree` is for.
        parse: reads the value.

    Raises:
        ConfigError: it is no override.
    """
    key, equals, word = text.partition("=")
    value = parse(word)
    sections = {item.name for item in fields(cls)}
    whole = key in sections and (value is None or isinstance(value, dict))
    if not equals or not (whole or "." in key):
        raise ConfigError(f"{text!r} is no override; write section.key=value, for example train.lr=1e-4")
    *parents, last = _split(key, cls)
    for parent in parents:
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise ConfigError(f"{text!r} can't be set: {parent} is {tree!r}, not a section; write section.key=value")
    tree[last] = value


def _split(key: str, cls: type) -> list[str]:
    """The steps of a dotted key; the key of a free mapping keeps its dots."""
    name, dot, rest = key.partition(".")
    if not dot:
        return [name]
    kind = _plain_kind(typing.get_type_hints(cls).get(name)) if dataclasses.is_dataclass(cls) else None
    if typing.get_origin(kind) is Mapping:
        return [name, rest]
    return [name, *_split(rest, typing.cast(type, kind))]


def build(cls: type, tree: Mapping[str, Any], *, base: Path, faults: list[str], prefix: str = "") -> Any:
    """Fill a dataclass from a mapping.

    Args:
        cls: the dataclass.
        tree: its keys.
        base: what relative paths are relative to.
        faults: whatever is wrong is added here, in words.
        prefix: what stands before the keys in those words.

    Returns:
        The object, or None when there were faults.
    """
    known = {item.name: item for item in fields(cls)}
    hints = typing.get_type_hints(cls)
    faults += [_unknown(str(key), list(known), prefix) for key in tree if key not in known]
    values, before = {}, len(faults)
    for name, item in known.items():
        if name in tree:
            values[name] = _value(hints[name], tree[name], prefix + name, base, faults)
        elif item.default is MISSING and item.default_factory is MISSING:
            faults.append(f"missing key {prefix}{name}")
    return cls(**values) if len(faults) == before else None


def _unknown(key: str, known: list[str], prefix: str) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(known)}"
    return f"unknown key {prefix}{key}; {hint}"


def _value(kind: Any, value: Any, name: str, base: Path, faults: list[str]) -> Any:
    plain = _plain_kind(kind)
    if value is None and plain is not kind:
        return None
    if dataclasses.is_dataclass(plain):
        if not isinstance(value, Mapping):
            faults.append(f"{name} is {value!r}; it must be a section with keys")
            return None
        return build(typing.cast(type, plain), value, base=base, faults=faults, prefix=name + ".")
    try:
        return _convert(plain, value, base)
    except (TypeError, ValueError):
        near = difflib.get_close_matches(str(value), [str(word) for word in typing.get_args(plain)], n=1)
        meant = f"; did you mean {near[0]}?" if near and typing.get_origin(plain) is typing.Literal else ""
        faults.append(f"{name} is {value!r}; it must be {_words(plain)}{meant}")
        return None


def _plain_kind(kind: Any) -> Any:
    """``X`` for ``X | None``."""
    if isinstance(kind, types.UnionType):
        return next(part for part in typing.get_args(kind) if part is not type(None))
    return kind


def _words(kind: Any) -> str:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return " or ".join(map(str, parts))
    if origin is tuple:
        return f"a list, each {_words(parts[0])}"
    if origin is Mapping:
        return f"a mapping, each value {_words(parts[1])}"
    return WORDS[kind]


def _convert(kind: Any, value: Any, base: Path) -> Any:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal and isinstance(value, str) and value in parts:
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(parts[0], item, base) for item in value)
    if origin is Mapping and isinstance(value, dict):
        return {_convert(parts[0], key, base): _convert(parts[1], item, base) for key, item in value.items()}
    if kind is Path and isinstance(value, str):
        return base / value
    if kind in (bool, str) and isinstance(value, kind):
        return value
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is float and not isinstance(value, bool):
        return float(value)  # YAML 1.1 reads 1e-5 as text: it wants 1.0e-5
    raise TypeError


def plain(value: Any, base: Path | None = None) -> Any:
    """Values as YAML has them; paths relative to `base`, where one is given."""
    if isinstance(value, Mapping):
        return {key: plain(item, base) for key, item in value.items()}
    if isinstance(value, tuple):
        return [plain(item, base) for item in value]
    if isinstance(value, Path):
        return str(value) if base is None else Path(os.path.relpath(value, base)).as_posix()
    return value


def section_of(cls: type, name: str) -> type:
    """The dataclass of a section."""
    return typing.cast(type, _plain_kind(typing.get_type_hints(cls)[name]))
