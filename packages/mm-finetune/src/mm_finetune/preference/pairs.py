"""Pairs of answers as the field writes them.

::

    {"conversations": [{"from": "human", "value": "<image>Which digit?"}], "images": ["7.png"],      LLaMA-Factory
     "chosen": {"from": "gpt", "value": "7"}, "rejected": {"from": "gpt", "value": "1"}}
    {"messages": [{"role": "user", "content": …}], "chosen": {"role": …, "content": …}, "rejected": …}    the same
    {"instruction": …, "input": …, "chosen": "7", "rejected": "1"}                                    the same, Alpaca
    {"prompt": [{"role": "user", "content": …}], "chosen": [{"role": "assistant", …}], "rejected": […]}       TRL
    {"prompt": "Which digit?", "chosen": "7", "rejected": "1"}                                                TRL
    {"chosen": [user, assistant], "rejected": [the same user, another assistant]}                             TRL

A content is a text, or a list of parts as OpenAI and Qwen's processors have them. A pair becomes one
:class:`mm_datafmt.Sample` whose last two messages are both answers to what stands before: the chosen one, then the
rejected one. Its pictures belong to the question.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

from mm_datafmt import FORMATS, Message, RecordError, Sample
from mm_finetune.data.faults import records_of
from mm_finetune.template import IMAGE, VIDEO

Record = Mapping[str, object]

# How a turn is written under each field that holds the turns before the answers: who speaks, what, and the answering.
_TURNS = {"conversations": ("from", "value", "gpt"), "messages": ("role", "content", "assistant")}
_MARKS = {"image": IMAGE, "video": VIDEO}
_ANSWERS = ("chosen", "rejected")


def read_pairs(path: Path) -> Iterator[Sample]:
    """Yield the pairs of a file: a JSON array or lines, also packed, or parquet; one that is no pair says so itself.

    Raises:
        DataFormatError: the file as a whole can't be read.
        OSError: likewise.
    """
    return records_of(path, parse_pair)


def parse_pair(record: object) -> Sample:
    """Read a record.

    Raises:
        RecordError: it is no pair in any of the layouts.
    """
    if not isinstance(record, Mapping):
        raise RecordError("the record must be a JSON object")
    fields: Record = record
    for name in _ANSWERS:
        if not fields.get(name):
            raise RecordError(f"the record has no {name!r}; a pair has 'chosen' and 'rejected'")
    rest = {name: value for name, value in fields.items() if name not in _ANSWERS}
    answers = [fields[name] for name in _ANSWERS]
    if "instruction" in rest:
        sample = _alpaca(rest, answers)
    elif "conversations" in rest:
        turns = [*_listed(rest["conversations"]), *_answers(answers, "conversations")]
        sample = FORMATS["llava" if "image" in rest else "sharegpt"].parse({**rest, "conversations": turns})
    elif "messages" in rest:
        sample = _chat(rest, [*_listed(rest["messages"]), *_answers(answers, "messages")])
    else:
        sample = _trl(rest, answers)
    # The two answers are weighed by the loss of pairs, whatever else they weigh.
    return sample._replace(messages=tuple(message._replace(loss=None) for message in sample.messages))


def _alpaca(rest: Record, answers: Sequence[object]) -> Sample:
    sample = FORMATS["alpaca"].parse({**rest, "output": answers[0]})
    if not isinstance(answers[1], str):
        raise RecordError("'rejected' must be a text beside 'instruction'")
    return sample._replace(messages=(*sample.messages, Message("assistant", answers[1])))


def _trl(rest: Record, answers: Sequence[object]) -> Sample:
    if "prompt" in rest:
        prompt = rest["prompt"]
        before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _listed(prompt)
    else:
        chosen, rejected = map(_listed, answers)
        before, answers = chosen[:-1], [chosen[-1:], rejected[-1:]]
        if not before or before != rejected[:-1]:
            raise RecordError("without a 'prompt', 'chosen' and 'rejected' must be the same turns but for the last one")
    sample = _chat(rest, [*before, *_answers(answers, "messages")])
    text = "".join(message.content for message in sample.messages)
    if IMAGE in text or VIDEO in text or not (sample.images or sample.videos):
        return sample
    # TRL puts pictures that no turn speaks of before the first question.
    marks = IMAGE * len(sample.images) + VIDEO * len(sample.videos)
    at = next((n for n, message in enumerate(sample.messages) if message.role == "user"), 0)
    first = sample.messages[at]
    changed = first._replace(content=marks + first.content)
    return sample._replace(messages=(*sample.messages[:at], changed, *sample.messages[at + 1 :]))


def _chat(rest: Record, turns: Sequence[object]) -> Sample:
    """Turns with ``role`` and ``content``; files stand in the parts of a content, or in columns."""
    columns = {f"{kind}s": _column(rest, kind) for kind in _MARKS}
    if not any(isinstance(turn, Mapping) and isinstance(turn.get("content"), list) for turn in turns):
        kept = {name: value for name, value in rest.items() if name in ("system", "tools", "audios")}
        return FORMATS["messages"].parse({**kept, **columns, "messages": list(turns)})
    named = FORMATS["messages"].parse({**columns, "messages": [{"role": "user", "content": ""}]})
    sample = FORMATS["openai"].parse({"messages": [_marked(turn) for turn in turns], "tools": rest.get("tools")})
    if (sample.images and named.images) or (sample.videos and named.videos):
        raise RecordError("pictures stand in the turns and in a column: which ones count?")
    return sample._replace(images=sample.images or named.images, videos=sample.videos or named.videos)


def _column(rest: Record, kind: str) -> object:
    """The files of a kind; one may stand without a list."""
    value = rest.get(f"{kind}s") or rest.get(kind) or []
    return [value] if isinstance(value, str) else value


def _marked(turn: object) -> object:
    """A part such as ``{"type": "image"}`` names no file: it is the place of one of a column."""
    if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), list):
        return turn
    return {**turn, "content": [_mark(part) for part in turn["content"]]}


def _mark(part: object) -> object:
    if isinstance(part, Mapping) and part.get("type") in _MARKS and not part.get(str(part["type"])):
        return {"type": "text", "text": _MARKS[str(part["type"])]}
    return part


def _answers(answers: Sequence[object], field: str) -> list[object]:
    """Each one turn: as it is, in a list of its own, or its text alone."""
    speaker, content, name = _TURNS[field]
    turns = []
    for answer, which in zip(answers, _ANSWERS, strict=True):
        turn = answer[0] if isinstance(answer, list) and len(answer) == 1 else answer
        if isinstance(turn, list):
            raise RecordError(f"{which!r} must be one turn; it has {len(turn)}")
        turns.append({speaker: name, content: turn} if isinstance(turn, str) else turn)
    return turns


def _listed(value: object) -> list[object]:
    if not isinstance(value, list) or not value:
        raise RecordError("the turns before the answers must be a list of at least one")
    return cast(list[object], value)
