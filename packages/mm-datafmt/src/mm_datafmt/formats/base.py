"""What a format is: one class of two functions, and how it says that it recognises a record."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

from ..errors import RecordError, shown
from ..sample import CALL_TEXT, Message, Sample

_new = tuple.__new__


class Plain(NamedTuple):
    """The fields of a layout whose turns are ``{speaker: a name, text: a string}``: those of turns and pictures.

    ``single`` says that one picture may stand without a list; ``known`` are all fields that have a meaning.
    """

    turns: str
    speaker: str
    text: str
    images: str
    single: bool
    known: frozenset[str]


class Format(ABC):
    """How one published record layout and :class:`Sample` map onto each other.

    ``name`` is what ``--from`` and ``--to`` take; ``signs`` says in words how a record of it looks. ``carries`` names
    what of a sample beyond turns and pictures has a place in it: ``videos``, ``audios``, ``tools``, ``loss``, ``extra``
    (fields of the record) and ``turn_extra`` (fields of a turn). ``columns`` and ``turn_columns`` are the fields that
    it gives a meaning to: another's extra field of that name has no place. ``roles`` gives each role's name when it is
    written; ``speakers`` the role of each name that is read. ``plain`` describes it to :mod:`mm_datafmt.plain`, which
    takes a short way where there is one.
    """

    name: ClassVar[str]
    signs: ClassVar[str]
    carries: ClassVar[frozenset[str]] = frozenset()
    columns: ClassVar[frozenset[str]] = frozenset()
    turn_columns: ClassVar[frozenset[str]] = frozenset()
    roles: ClassVar[Mapping[str, str]] = {}
    speakers: ClassVar[Mapping[str, str]] = {}
    plain: ClassVar[Plain | None] = None

    @abstractmethod
    def detects(self, record: Mapping[str, object]) -> int:
        """Return how much ``record`` (decoded JSON) looks like this format: 2 surely, 1 it could be, 0 not."""

    @abstractmethod
    def parse(self, record: object) -> Sample:
        """Return the sample that ``record`` (decoded JSON) holds, or raise :class:`RecordError`."""

    @abstractmethod
    def emit(self, sample: Sample) -> dict[str, object]:
        """Return ``sample`` as a record of this format.

        Raises :class:`RecordError` (code ``not_carried``) if the format has no place for its media or for one of its
        turns; other fields without a place are left out, and :meth:`lost` names them.
        """

    def lost(self, sample: Sample) -> list[str]:
        """Return the names of the fields of ``sample`` that :meth:`emit` leaves out."""
        carries = self.carries
        names: list[str] = []
        if sample.extra:
            names += sorted(self.columns & sample.extra.keys()) if "extra" in carries else sample.extra
        if sample.tools is not None and "tools" not in carries:
            names.append("tools")
        for _, _, loss, extra in sample.messages:
            if loss is not None and "loss" not in carries:
                names.append("loss of a turn")
            if extra:
                without_place = sorted(self.turn_columns & extra.keys()) if "turn_extra" in carries else list(extra)
                names.extend(f"{name} of a turn" for name in without_place)
        return list(dict.fromkeys(names)) if len(names) > 1 else names

    def require_media(self, sample: Sample) -> None:
        """Raise :class:`RecordError` if ``sample`` has media that this format has no field for."""
        for kind, paths in (("videos", sample.videos), ("audios", sample.audios)):
            if paths and kind not in self.carries:
                raise RecordError(f"the {self.name} format has no field for {kind}", code="not_carried")

    def name_of(self, role: str) -> str:
        """Return what this format calls ``role``, or raise :class:`RecordError`."""
        if role not in self.roles:
            raise RecordError(
                f"role {shown(role)} has no name in this format; legal are {', '.join(self.roles)}",
                code="unknown_role",
            )
        return self.roles[role]


def object_of(value: object, what: str = "the record") -> Mapping[str, object]:
    """Return ``value`` if it is a JSON object, or raise :class:`RecordError`."""
    if not isinstance(value, dict):
        raise RecordError(f"{what} must be a JSON object, not {shown(value)}")
    return value


def turns_of(
    fields: Mapping[str, object], key: str, names: tuple[str, str], speakers: Mapping[str, str]
) -> tuple[Message, ...]:
    """Return the turns under ``key``; ``names`` are those of a turn's speaker and text."""
    turns = fields.get(key)
    if not isinstance(turns, list) or not turns:
        raise RecordError(f"{key!r} must be a list of at least one turn, not {shown(turns)}")
    speaker_name, text_name = names
    messages = []
    try:
        for turn in turns:
            role, content = speakers[turn[speaker_name]], turn[text_name]
            if content.__class__ is not str:
                raise TypeError
            # Not Message(…): its keyword machinery takes as long as all the rest of the loop.
            made = _new(Message, (role, content, None, None))
            messages.append(made if len(turn) == 2 else _with_fields(turn, role, content, names))
    except (KeyError, TypeError):
        raise _turn_fault(turns[len(messages)], len(messages) + 1, names, speakers) from None
    return tuple(messages)


def _with_fields(turn: Mapping[str, object], role: str, content: str, names: tuple[str, str]) -> Message:
    extra = {name: value for name, value in turn.items() if name not in names}
    loss = extra.get("loss")
    if isinstance(loss, (bool, int, float)):
        del extra["loss"]
        return Message(role, content, float(loss), extra or None)
    return Message(role, content, None, extra)


def _turn_fault(turn: object, number: int, names: tuple[str, str], speakers: Mapping[str, str]) -> RecordError:
    if not isinstance(turn, dict):
        return RecordError(f"turn {number} must be a JSON object, not {shown(turn)}")
    speaker = turn.get(names[0])
    if not isinstance(speaker, str) or speaker not in speakers:
        return RecordError(
            f"turn {number}: {names[0]!r} is {shown(speaker)}; legal are {', '.join(speakers)}", code="unknown_role"
        )
    return RecordError(f"turn {number}: {names[1]!r} must be a string, not {shown(turn.get(names[1]))}")


def written_turns(sample: Sample, fmt: Format, names: tuple[str, str]) -> list[dict[str, object]]:
    """Return the turns of ``sample`` as ``fmt`` writes them, with its ``names`` of speaker and text."""
    speaker_name, text_name = names
    roles, turns = fmt.roles, []
    for role, content, loss, extra in sample.messages:
        turn: dict[str, object] = {
            speaker_name: roles[role] if role in roles else fmt.name_of(role),
            text_name: content,
        }
        if loss is not None and "loss" in fmt.carries:
            turn["loss"] = loss
        if extra and "turn_extra" in fmt.carries:
            turn = {**extra, **turn}
        elif extra and role == "function" and CALL_TEXT in extra:  # training would go without what was said
            raise RecordError(f"the {fmt.name} format has no place for a text beside a call", code="not_carried")
        turns.append(turn)
    return turns


def paths_of(fields: Mapping[str, object], key: str, *, single: bool = False) -> tuple[str, ...]:
    """Return the media paths under ``key``: a list, null or nothing, and with ``single`` also one path."""
    value = fields.get(key)
    if value is None or (single and value == ""):
        return ()
    if single and isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(path, str) and path for path in value):
        legal = "a path, a list of paths" if single else "a list of paths"
        raise RecordError(f"{key!r} must be {legal} or absent, not {shown(value)}")
    if any(path.startswith("data:") for path in value):
        raise RecordError(
            f"{key!r}: a picture is embedded in the record; write it to a file and name that", code="embedded_media"
        )
    return tuple(value)


def text_of(fields: Mapping[str, object], key: str) -> str | None:
    """Return the string under ``key``, None for null, nothing or an empty string."""
    value = fields.get(key)
    if value is not None and not isinstance(value, str):
        raise RecordError(f"{key!r} must be a string or absent, not {shown(value)}")
    return value or None


def tools_of(fields: Mapping[str, object]) -> str | None:
    """Return ``tools`` as JSON text; sets give it as text or as a list."""
    value = fields.get("tools")
    if isinstance(value, list):
        from ..decoding import encode

        try:
            return encode(value).decode() if value else None
        except TypeError as error:  # a table may hold what JSON cannot
            raise RecordError(f"'tools' cannot be written as JSON: {error}") from None
    return text_of(fields, "tools")


def rest_of(fields: Mapping[str, object], known: frozenset[str]) -> Mapping[str, object] | None:
    """Return the fields of a record that its format gives no meaning to, None if there are none."""
    return {name: value for name, value in fields.items() if name not in known} or None


def with_system(system: str | None, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return ``messages`` led by the system prompt of a column."""
    if system is None:
        return messages
    if messages and messages[0].role == "system":
        raise RecordError("a 'system' field and a system turn: which one counts?", code="role_order")
    return (Message("system", system), *messages)


def split_system(sample: Sample) -> tuple[str | None, Sample]:
    """Return the system prompt and the sample without it."""
    first = sample.messages[0] if sample.messages else None
    if first is None or first.role != "system":
        return None, sample
    return first.content, sample._replace(messages=sample.messages[1:])


def with_media(record: dict[str, object], sample: Sample, *, images: bool = False) -> dict[str, object]:
    """Add ``images``, ``videos`` and ``audios`` to ``record`` where there are any (``images`` always, if asked)."""
    if sample.images or images:
        record["images"] = list(sample.images)
    if sample.videos:
        record["videos"] = list(sample.videos)
    if sample.audios:
        record["audios"] = list(sample.audios)
    return record


def with_extra(record: dict[str, object], sample: Sample, columns: frozenset[str]) -> dict[str, object]:
    """Return ``record`` behind the sample's other fields, those apart that would be taken for ``columns``."""
    if not sample.extra:
        return record
    return {**{name: value for name, value in sample.extra.items() if name not in columns}, **record}
