"""JSON Schemas (2020-12) of what this tool writes and reads, made from the dataclasses themselves."""

from __future__ import annotations

import importlib
import re
from dataclasses import fields
from enum import Enum
from typing import Any, Callable, Mapping

from ascend_envcheck.errors import SchemaError

DIALECT = "https://json-schema.org/draft/2020-12/schema"

_PLAIN: Mapping[str, str] = {"str": "string", "int": "integer", "bool": "boolean", "float": "number", "None": "null"}
_WRAPPED = re.compile(r"(tuple|list|Sequence|Mapping|dict)\[(.*)\]\Z")


def schema(kind: str) -> dict[str, Any]:
    """The schema of a kind of document: a key of `KINDS`.

    Raises:
        SchemaError: there is no such kind.
    """
    if kind not in KINDS:
        raise SchemaError(f"no schema {kind!r}; there are {', '.join(KINDS)}")
    return {"$schema": DIALECT, "title": f"ascend-envcheck {kind}", **KINDS[kind]()}


class _Types:
    """The types of one module, by the names that its annotations use."""

    def __init__(self, module: str) -> None:
        self._names = vars(importlib.import_module(module))
        self.definitions: dict[str, Any] = {}

    def of(self, annotation: str) -> dict[str, Any]:
        """The schema of an annotation: plain types, unions, tuples, mappings, enumerations and dataclasses."""
        parts = _outside_brackets(annotation, "|")
        if len(parts) > 1:
            return _union([self.of(part) for part in parts])
        text = annotation.strip().strip("\"'")
        if text in _PLAIN:
            return {"type": _PLAIN[text]}
        if text in ("Any", "object"):
            return {}
        wrapped = _WRAPPED.match(text)
        if wrapped:
            inner = _outside_brackets(wrapped[2], ",")
            if wrapped[1] in ("Mapping", "dict"):
                return {"type": "object", "additionalProperties": self.of(inner[1])}
            if wrapped[1] == "tuple" and inner[-1].strip() != "...":
                raise TypeError(f"no schema for {text}: only tuples of any length have one")
            return {"type": "array", "items": self.of(inner[0])}
        return self._named(text)

    def _named(self, name: str) -> dict[str, Any]:
        found = self._names[name]
        if isinstance(found, type) and issubclass(found, Enum):
            return {"enum": [member.value for member in found]}
        if isinstance(found, type) and issubclass(found, str):
            return {"type": "string"}
        if name not in self.definitions:
            self.definitions[name] = {}  # so that a type that holds itself comes to an end
            self.definitions[name] = self.object(found)
        return {"$ref": f"#/$defs/{name}"}

    def object(self, kind: type, **more: dict[str, Any]) -> dict[str, Any]:
        """The schema of a dataclass; every field is written, so every field is required."""
        properties = {item.name: self.of(str(item.type)) for item in fields(kind)}
        properties.update(more)
        return _all_required(properties)

    def document(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """A schema with the definitions that it refers to."""
        return {**body, **({"$defs": self.definitions} if self.definitions else {})}


def _union(schemas: list[dict[str, Any]]) -> dict[str, Any]:
    if all(set(each) == {"type"} for each in schemas):
        return {"type": [each["type"] for each in schemas]}
    return {"anyOf": schemas}


def _outside_brackets(text: str, separator: str) -> list[str]:
    parts, depth = [""], 0
    for character in text:
        depth += (character == "[") - (character == "]")
        if character == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _snapshot() -> dict[str, Any]:
    from ascend_envcheck.snapshot import SCHEMA_VERSION, Snapshot

    types = _Types("ascend_envcheck.snapshot")
    return types.document(types.object(Snapshot, schema_version={"const": SCHEMA_VERSION}))


def _report() -> dict[str, Any]:
    from ascend_envcheck.findings import Report, Verdict

    types = _Types("ascend_envcheck.findings")
    version = Report((), ()).to_dict()["schema_version"]
    body = types.object(Report, schema_version={"const": version})
    types.definitions["Verdict"] = types.object(Verdict, sentence={"type": "string"})
    return types.document(body)


def _explain() -> dict[str, Any]:
    from ascend_envcheck.explanation.result import EXPLAINED, NO_ERROR, UNKNOWN, Explanation, Found, Place
    from ascend_envcheck.failures import TIERS, Failure

    types, failure_types = _Types("ascend_envcheck.explanation.result"), _Types("ascend_envcheck.failures")
    of_failure = failure_types.object(Failure)["properties"]
    of_found = {item.name: types.of(str(item.type)) for item in fields(Found) if item.name not in ("failure", "first")}
    told = {name: of_failure[name] for name in ("id", "category", "cause", "fix", "source", "confidence")}
    place = types.object(Place)
    flat = {**told, **place["properties"], **of_found, "tier": {"enum": list(TIERS)}}
    version = Explanation((), (), 0).to_dict()["schema_version"]
    properties = {
        "schema_version": {"const": version},
        "status": {"enum": [EXPLAINED, UNKNOWN, NO_ERROR]},
        "lines": {"type": "integer"},
        "found": {"type": "array", "items": {"$ref": "#/$defs/Found"}},
        "unknown": {"type": "array", "items": {"$ref": "#/$defs/Place"}},
    }
    types.definitions = {"Found": _all_required(flat), "Place": place}
    return types.document(_all_required(properties))


def _rules() -> dict[str, Any]:
    """The form of a pack, from the tables by which packs are read."""
    from ascend_envcheck.rules.conditions import MANY, ONE, TESTS
    from ascend_envcheck.rules.packs import FIELDS, ID_PATTERN, PACK_VERSION

    line = {"type": "string", "pattern": r"\S"}
    here = {"$ref": "#/$defs/condition"}
    forms: Mapping[str, Callable[[Any], dict[str, Any]]] = {
        "id": lambda field: {"type": "string", "pattern": f"^{ID_PATTERN}$"},
        "text": lambda field: line,
        "choice": lambda field: {"enum": list(field.legal)},
        "choices": lambda field: {"type": "array", "minItems": 1, "items": {"enum": list(field.legal)}},
        "condition": lambda field: here,
    }
    leaves = [
        _closed(
            {subject: {"type": "string", "minLength": 1}, test: {"type": "boolean" if kind == "bool" else "string"}}
        )
        for subject, tests in TESTS.items()
        for test, kind in tests.items()
    ]
    many = [_closed({word: {"type": "array", "minItems": 1, "items": here}}) for word in MANY]
    rule = _closed({name: forms[field.kind](field) for name, field in FIELDS.items()})
    rule["required"] = [name for name, field in FIELDS.items() if field.required]
    rule["if"] = {"properties": {"severity": {"const": "FAIL"}}}
    rule["then"] = {"required": ["command", "source"]}
    pack = _closed(
        {"schema_version": {"const": PACK_VERSION}, "rules": {"type": "array", "items": {"$ref": "#/$defs/rule"}}}
    )
    condition = {"anyOf": [*leaves, *many, _closed({ONE: here})]}
    return {**pack, "$defs": {"rule": rule, "condition": condition}}


def _all_required(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _closed(properties: dict[str, Any]) -> dict[str, Any]:
    return {**_all_required(properties), "additionalProperties": False}


KINDS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "snapshot": _snapshot,
    "report": _report,
    "explain": _explain,
    "rules": _rules,
}
"""Each kind of document, and what makes its schema."""
