"""The formats: one class each, two functions a class, one table.

A new format is a subclass of :class:`Format` with ``parse`` and ``emit``, and one line in :data:`FORMATS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

from .errors import FormatError, RecordError, shown
from .sample import ROLES, Message, Sample


class Format(ABC):
    """How one published record layout and :class:`Sample` map onto each other.

    ``name`` is what ``--from`` takes, ``key`` the field whose presence tells this format from the others.
    """

    name: ClassVar[str]
    key: ClassVar[str]

    @abstractmethod
    def parse(self, record: object) -> Sample:
        """Return the sample that ``record`` (decoded JSON) holds, or raise :class:`RecordError`."""

    @abstractmethod
    def emit(self, sample: Sample) -> dict[str, object]:
        """Return ``sample`` as a record of this format, or raise :class:`RecordError` if it cannot carry it."""


class Llava(Format):
    """LLaVA-Instruct: ``{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}, …]}``.

    ``image`` may be missing, null or empty (text only), a path, or a list of paths (interleaved sets). A leading turn
    ``"from": "system"`` is allowed. ``id`` is neither needed nor kept.
    """

    name = "llava"
    key = "conversations"
    roles: ClassVar[Mapping[str, str]] = MappingProxyType({"system": "system", "human": "user", "gpt": "assistant"})

    def parse(self, record: object) -> Sample:
        """Read ``conversations`` and ``image``; the text is taken over as it is."""
        fields = _object(record, "the record")
        turns = _turns(fields, self.key, ("from", "value"), self.roles)
        image = fields.get("image")
        images = (image,) if isinstance(image, str) and image else _paths(image or None, "image")
        return Sample(messages=turns, images=images)

    def emit(self, sample: Sample) -> dict[str, object]:
        """Write ``image`` as a path for one image and as a list for several; videos have no place here."""
        if sample.videos:
            raise RecordError("the llava format has no field for videos", code="not_carried")
        names = {role: name for name, role in self.roles.items()}
        record: dict[str, object] = {}
        if sample.images:
            record["image"] = sample.images[0] if len(sample.images) == 1 else list(sample.images)
        record[self.key] = [{"from": _renamed(turn.role, names), "value": turn.content} for turn in sample.messages]
        return record


class Messages(Format):
    """MindSpeed MM: ``{"messages": [{"role", "content"}, …], "images": […], "videos": […]}``.

    ``images`` and ``videos`` may be missing or null when read; ``images`` is always written, ``videos`` only if any.
    """

    name = "messages"
    key = "messages"
    roles: ClassVar[Mapping[str, str]] = MappingProxyType({role: role for role in ROLES})

    def parse(self, record: object) -> Sample:
        """Read ``messages``, ``images`` and ``videos``."""
        fields = _object(record, "the record")
        return Sample(
            messages=_turns(fields, self.key, ("role", "content"), self.roles),
            images=_paths(fields.get("images"), "images"),
            videos=_paths(fields.get("videos"), "videos"),
        )

    def emit(self, sample: Sample) -> dict[str, object]:
        """Write every turn and every path."""
        record: dict[str, object] = {
            self.key: [{"role": _renamed(turn.role, self.roles), "content": turn.content} for turn in sample.messages],
            "images": list(sample.images),
        }
        if sample.videos:
            record["videos"] = list(sample.videos)
        return record


FORMATS: Mapping[str, Format] = MappingProxyType({f.name: f for f in (Llava(), Messages())})


def find_format(name: str) -> Format:
    """Return the format called ``name``, or raise :class:`FormatError` with the names there are."""
    if name not in FORMATS:
        raise FormatError(f"unknown format {shown(name)}; known formats: {', '.join(FORMATS)}")
    return FORMATS[name]


def detect_format(record: object) -> Format:
    """Return the format whose key the first record of a file has, or raise :class:`FormatError`."""
    fields = record if isinstance(record, dict) else {}
    found = [fmt for fmt in FORMATS.values() if fmt.key in fields]
    if len(found) == 1:
        return found[0]
    legal = ", ".join(f"{fmt.name} has {fmt.key!r}" for fmt in FORMATS.values())
    given = f"has the fields {shown(list(fields)[:12])}" if fields else f"is {shown(record)}"
    raise FormatError(f"cannot tell the format: the first record {given}, but {legal}; name one with --from")


def _object(value: object, what: str) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise RecordError(f"{what} must be a JSON object, not {shown(value)}")
    return value


def _turns(
    fields: Mapping[str, object], key: str, names: tuple[str, str], roles: Mapping[str, str]
) -> tuple[Message, ...]:
    turns = fields.get(key)
    if not isinstance(turns, list) or not turns:
        raise RecordError(f"{key!r} must be a list of at least one turn, not {shown(turns)}")
    return tuple(_turn(turn, number, names, roles) for number, turn in enumerate(turns, 1))


def _turn(value: object, number: int, names: tuple[str, str], roles: Mapping[str, str]) -> Message:
    turn = _object(value, f"turn {number}")
    role, content = (turn.get(name) for name in names)
    if not isinstance(role, str) or role not in roles:
        raise RecordError(
            f"turn {number}: {names[0]!r} is {shown(role)}; legal are {', '.join(roles)}",
            code="unknown_role",
        )
    if not isinstance(content, str):
        raise RecordError(f"turn {number}: {names[1]!r} must be a string, not {shown(content)}")
    return Message(role=roles[role], content=content)


def _paths(value: object, key: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(path, str) and path for path in value):
        legal = "a path, a list of paths" if key == "image" else "a list of paths"
        raise RecordError(f"{key!r} must be {legal} or absent, not {shown(value)}")
    return tuple(value)


def _renamed(role: str, names: Mapping[str, str]) -> str:
    if role not in names:
        raise RecordError(
            f"role {shown(role)} has no name in this format; legal are {', '.join(names)}",
            code="unknown_role",
        )
    return names[role]
