"""OpenAI's chat records: contents in typed parts, calls of tools."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from ..decoding import decode, encode
from ..errors import RecordError, shown
from ..sample import CALL_TEXT, Message, Sample
from .base import Format, object_of, rest_of, tools_of, with_extra

_KNOWN = frozenset(("messages", "tools"))
_MARK = re.compile("<(image|video|audio)>")
_MEDIA = ("image", "video", "audio")
# The type of a part, and the field that holds its path: OpenAI's own spelling and that of Qwen's processors.
_PARTS: Mapping[str, tuple[str, str]] = {
    "image_url": ("image", "image_url"),
    "input_image": ("image", "image_url"),
    "image": ("image", "image"),
    "video_url": ("video", "video_url"),
    "video": ("video", "video"),
    "audio_url": ("audio", "audio_url"),
    "audio": ("audio", "audio"),
}


class OpenAi(Format):
    """``{"messages": [{"role", "content": text or [{"type": "text" | "image_url" | …}, …]}], "tools"}``.

    A picture's place among the parts becomes its placeholder in the text, and the other way round. ``tool_calls``
    become a ``function`` turn, of which a text beside them is a field, a ``tool`` turn an ``observation``. Pictures
    must be paths (``file://`` is taken off); one that is embedded as ``data:`` is refused with the code
    ``embedded_media``.
    """

    name = "openai"
    signs = "'messages' with typed parts, 'tool_calls' or 'tool_call_id'"
    columns = _KNOWN
    turn_columns = frozenset(("role", "content"))
    carries = frozenset(("videos", "audios", "tools", "extra", "turn_extra", "loss"))
    roles: ClassVar[Mapping[str, str]] = {
        "system": "system",
        "user": "user",
        "assistant": "assistant",
        "observation": "tool",
        "function": "assistant",
    }
    speakers: ClassVar[Mapping[str, str]] = {
        "system": "system",
        "developer": "system",
        "user": "user",
        "assistant": "assistant",
        "tool": "observation",
    }

    def detects(self, record: Mapping[str, object]) -> int:
        """``messages`` of which one has what only OpenAI's have."""
        turns = record.get("messages")
        return 2 * (isinstance(turns, list) and any(isinstance(turn, dict) and _is_typed(turn) for turn in turns))

    def parse(self, record: object) -> Sample:
        """Read the parts into one text a turn."""
        fields = object_of(record)
        turns = fields.get("messages")
        if not isinstance(turns, list) or not turns:
            raise RecordError(f"'messages' must be a list of at least one turn, not {shown(turns)}")
        media: dict[str, list[str]] = {kind: [] for kind in _MEDIA}
        messages = tuple(self._turn(turn, number, media) for number, turn in enumerate(turns, 1))
        paths = [tuple(media[kind]) for kind in _MEDIA]
        return Sample(messages, paths[0], paths[1], paths[2], tools_of(fields), rest_of(fields, _KNOWN))

    def _turn(self, value: object, number: int, media: dict[str, list[str]]) -> Message:
        turn = object_of(value, f"turn {number}")
        speaker, content, calls = turn.get("role"), turn.get("content"), turn.get("tool_calls")
        if not isinstance(speaker, str) or speaker not in self.speakers:
            raise RecordError(
                f"turn {number}: 'role' is {shown(speaker)}; legal are {', '.join(self.speakers)}", code="unknown_role"
            )
        extra: dict[str, object] = {k: v for k, v in turn.items() if k not in ("role", "content", "loss")}
        loss = turn.get("loss")
        weight = float(loss) if isinstance(loss, (bool, int, float)) else None
        if calls:
            if content:
                extra[CALL_TEXT] = _call_text(content, number)
            return Message("function", _calls_text(calls, number), weight, extra)
        extra.pop("tool_calls", None)
        text = content if isinstance(content, str) else "".join(_part_texts(content, number, media))
        return Message(self.speakers[speaker], text, weight, extra or None)

    def lost(self, sample: Sample) -> list[str]:
        """Return the names of the fields that are left out; the text beside calls is not."""
        turns = (
            turn._replace(extra={name: value for name, value in turn.extra.items() if name != CALL_TEXT})
            if turn.role == "function" and turn.extra
            else turn
            for turn in sample.messages
        )
        return super().lost(sample._replace(messages=tuple(turns)))

    def emit(self, sample: Sample) -> dict[str, object]:
        """Write a text with placeholders as parts, a text without as a string."""
        paths = {kind: iter(values) for kind, values in zip(_MEDIA, sample[1:4], strict=True)}
        turns = []
        for role, content, loss, extra in sample.messages:
            turn: dict[str, object] = {"role": self.name_of(role), "content": _parts(content, paths)}
            if role == "function":
                turn |= {"content": (extra or {}).get(CALL_TEXT), "tool_calls": _calls(content)}
            if loss is not None:
                turn["loss"] = loss
            turns.append({**_kept(extra, turn), **turn} if extra else turn)
        record: dict[str, object] = {"messages": turns}
        if sample.tools is not None:
            tools = _json_or_fault(sample.tools, "tools")
            if not isinstance(tools, list):
                raise RecordError(f"tools: not a list but {shown(tools)}", code="not_carried")
            record["tools"] = tools
        return with_extra(record, sample, _KNOWN)


def _call_text(content: object, number: int) -> str:
    """Return the text that a turn has beside its calls."""
    media: dict[str, list[str]] = {kind: [] for kind in _MEDIA}
    text = content if isinstance(content, str) else "".join(_part_texts(content, number, media))
    if any(media.values()):
        raise RecordError(f"turn {number} has both media and 'tool_calls'", code="not_carried")
    return text


def _is_typed(turn: Mapping[str, object]) -> bool:
    return isinstance(turn.get("content"), list) or "tool_calls" in turn or "tool_call_id" in turn


def _part_texts(parts: object, number: int, media: dict[str, list[str]]) -> Iterator[str]:
    if parts is None:
        return
    if not isinstance(parts, list):
        raise RecordError(f"turn {number}: 'content' must be a string or a list of parts, not {shown(parts)}")
    for part in parts:
        fields = object_of(part, f"turn {number}: a part")
        kind = fields.get("type")
        text = fields.get("text")
        if kind in ("text", "input_text", "output_text") and isinstance(text, str):
            yield text
        elif isinstance(kind, str) and kind in _PARTS:
            name, key = _PARTS[kind]
            media[name].append(_path(fields.get(key), number))
            yield f"<{name}>"
        else:
            raise RecordError(f"turn {number}: a part is {shown(part)}; legal types are text, {', '.join(_PARTS)}")


def _path(value: object, number: int) -> str:
    path = value.get("url") if isinstance(value, dict) else value
    if not isinstance(path, str) or not path:
        raise RecordError(f"turn {number}: a part must name a file, not {shown(value)}")
    if path.startswith("data:"):
        raise RecordError(
            f"turn {number}: a picture is embedded in the record; write it to a file and name that",
            code="embedded_media",
        )
    return path.removeprefix("file://")


def _parts(text: str, paths: Mapping[str, Iterator[str]]) -> object:
    pieces = _MARK.split(text)
    if len(pieces) == 1:
        return text
    parts: list[object] = []
    for index, piece in enumerate(pieces):
        if index % 2:
            path = next(paths[piece], None)
            if path is None:
                raise RecordError(f"there are more <{piece}> than paths", code=f"{piece}_count")
            parts.append({"type": f"{piece}_url", f"{piece}_url": {"url": path}})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _calls_text(calls: object, number: int) -> str:
    if not isinstance(calls, list):
        raise RecordError(f"turn {number}: 'tool_calls' must be a list, not {shown(calls)}")
    named = []
    for call in calls:
        function: Any = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RecordError(f"turn {number}: a call must have a function with a name, not {shown(call)}")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = _json_or_fault(arguments, f"turn {number}: the arguments of a call")
        named.append({"name": function["name"], "arguments": arguments})
    return encode(named[0] if len(named) == 1 else named).decode()


def _calls(text: str) -> list[object]:
    value = _json_or_fault(text, "a function turn")
    calls = value if isinstance(value, list) else [value]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise RecordError(f"a function turn must be {{'name', 'arguments'}}, not {shown(text)}", code="not_carried")
    return [
        {
            "type": "function",
            "function": {"name": call["name"], "arguments": encode(call.get("arguments")).decode()},
        }
        for call in calls
    ]


def _kept(extra: Mapping[str, object], turn: dict[str, object]) -> dict[str, object]:
    """Return the other fields of a turn; calls only if they are those of ``turn``, which then takes their ids."""
    kept = {name: value for name, value in extra.items() if name != "tool_calls"}
    calls = extra.get("tool_calls")
    if calls and "tool_calls" in turn and _calls_text(calls, 0) == _calls_text(turn["tool_calls"], 0):
        turn["tool_calls"] = calls
    return kept


def _json_or_fault(text: str, what: str) -> Any:
    value = decode(text.encode("utf-8", "surrogatepass"))
    if isinstance(value, RecordError):
        raise RecordError(f"{what}: not JSON: {value}", code="not_carried")
    return value
