"""The two layouts, and the law that going there and back keeps every turn."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_datafmt import FORMATS, FormatError, Message, RecordError, Sample
from mm_datafmt.formats import detect_format, find_format

ROLES = ["system", "user", "assistant"]

LLAVA, MESSAGES = FORMATS["llava"], FORMATS["messages"]

turns = st.lists(
    st.builds(lambda role, content: Message(role, content), st.sampled_from(ROLES), st.text()), min_size=1
).map(tuple)
paths = st.lists(st.text(min_size=1), max_size=3).map(tuple)


@given(turns, paths)
def test_llava_to_messages_to_llava_keeps_every_turn_and_image(
    messages: tuple[Message, ...], images: tuple[str, ...]
) -> None:
    record = LLAVA.emit(Sample(messages=messages, images=images))
    there = MESSAGES.emit(LLAVA.parse(record))
    assert LLAVA.emit(MESSAGES.parse(there)) == record
    assert [turn["content"] for turn in there["messages"]] == [turn.content for turn in messages]  # type: ignore[attr-defined]


@given(turns, paths, paths)
def test_messages_there_and_back_is_the_same_sample(
    messages: tuple[Message, ...], images: tuple[str, ...], videos: tuple[str, ...]
) -> None:
    sample = Sample(messages=messages, images=images, videos=videos)
    assert MESSAGES.parse(MESSAGES.emit(sample)) == sample


def test_a_llava_record_becomes_the_published_messages_record() -> None:
    record = {
        "id": "7",
        "image": "digits/0001.png",
        "conversations": [
            {"from": "system", "value": "Be short."},
            {"from": "human", "value": "<image>\nWhich digit is this?"},
            {"from": "gpt", "value": "7"},
        ],
    }
    assert MESSAGES.emit(LLAVA.parse(record)) == {
        "messages": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "<image>\nWhich digit is this?"},
            {"role": "assistant", "content": "7"},
        ],
        "images": ["digits/0001.png"],
    }


@pytest.mark.parametrize(
    ("image", "expected"), [({}, ()), ({"image": None}, ()), ({"image": ""}, ()), ({"image": ["a", "b"]}, ("a", "b"))]
)
def test_llava_images_absent_or_several(image: dict[str, Any], expected: tuple[str, ...]) -> None:
    assert LLAVA.parse({"conversations": [{"from": "human", "value": "x"}], **image}).images == expected


def test_media_are_written_when_there_are_any_and_refused_where_they_have_no_place() -> None:
    turn = Message(role="user", content="<video>")
    assert "videos" not in MESSAGES.emit(Sample(messages=(turn,)))
    with_video = Sample(messages=(turn,), videos=("v.mp4",))
    assert MESSAGES.emit(with_video)["videos"] == ["v.mp4"]
    assert LLAVA.emit(with_video)["video"] == "v.mp4"
    with pytest.raises(RecordError, match="no field for audios"):
        LLAVA.emit(with_video._replace(audios=("a.wav",)))


def test_a_role_without_a_name_is_refused_when_written() -> None:
    with pytest.raises(RecordError, match="'tool' has no name in this format; legal are system, user, assistant"):
        LLAVA.emit(Sample(messages=(Message(role="tool", content=""),)))


GOOD_TURN = {"from": "human", "value": "hi"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (None, "the record must be a JSON object, not None"),
        ([1], r"the record must be a JSON object, not \[1\]"),
        ({}, "'conversations' must be a list of at least one turn, not None"),
        ({"conversations": []}, "at least one turn"),
        ({"conversations": "hi"}, "at least one turn, not 'hi'"),
        ({"conversations": ["hi"]}, "turn 1 must be a JSON object, not 'hi'"),
        ({"conversations": [GOOD_TURN, {"from": "bing", "value": ""}]}, "turn 2: 'from' is 'bing'; legal are sys"),
        ({"conversations": [{"value": ""}]}, "turn 1: 'from' is None"),
        ({"conversations": [{"from": ["gpt"], "value": ""}]}, r"turn 1: 'from' is \['gpt'\]"),
        ({"conversations": [{"from": "gpt"}]}, "turn 1: 'value' must be a string, not None"),
        ({"conversations": [{"from": "gpt", "value": 7}]}, "turn 1: 'value' must be a string, not 7"),
        ({"conversations": [GOOD_TURN], "image": 7}, "'image' must be a path, a list of paths or absent, not 7"),
        ({"conversations": [GOOD_TURN], "image": ["a", ""]}, "'image' must be"),
    ],
)  # fmt: skip
def test_broken_llava_records(record: object, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        LLAVA.parse(record)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": [{"role": "human", "content": ""}]}, "'role' is 'human'; legal are system, user, assistant"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "'content' must be a string"),
        ({"images": "a.png"}, "'images' must be a list of paths or absent, not 'a.png'"),
        ({"images": [None]}, "'images' must be"),
        ({"videos": {}}, "'videos' must be"),
    ],
)
def test_broken_messages_records(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        MESSAGES.parse({"messages": [{"role": "user", "content": "x"}], **fields})


def test_the_first_record_tells_the_format() -> None:
    assert detect_format([{"conversations": 1}]) is LLAVA
    assert detect_format([{"messages": 1}]) is MESSAGES


@pytest.mark.parametrize(
    ("record", "given"),
    [({"prompt": "x"}, r"has the fields \['prompt'\]"), (3, "is 3"), ({"messages": 1, "conversations": 1}, "has the")],
)
def test_a_record_that_tells_nothing(record: object, given: str) -> None:
    with pytest.raises(FormatError, match=rf"{given}.*llava has 'conversations'.*--from"):
        detect_format([record])


def test_an_unknown_format_name() -> None:
    with pytest.raises(FormatError, match=r"'lava'; known formats: .*llava, "):
        find_format("lava")


def test_samples_are_frozen() -> None:
    message = Message(role="user", content="x")
    with pytest.raises(AttributeError):
        message.role = "gpt"  # type: ignore[misc]
    assert len({Sample(messages=(message,)), Sample(messages=(message,))}) == 1


CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}}


def talk_with_a_call(content: Any) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": content, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c1", "content": "7"},
            {"role": "assistant", "content": "Seven."},
        ]
    }


def test_a_text_beside_a_call_is_carried() -> None:
    record = talk_with_a_call("Let me look.")
    sample = FORMATS["openai"].parse(record)
    assert [turn.role for turn in sample.messages] == ["user", "function", "observation", "assistant"]
    assert json.loads(sample.messages[1].content) == {"name": "f", "arguments": {"x": 1}}
    assert FORMATS["openai"].emit(sample) == record
    assert FORMATS["openai"].lost(sample) == []
    there = FORMATS["sharegpt"].emit(sample)
    assert FORMATS["openai"].emit(FORMATS["sharegpt"].parse(there)) == record
    typed = talk_with_a_call([{"type": "text", "text": "Let me "}, {"type": "text", "text": "look."}])
    assert FORMATS["openai"].emit(FORMATS["openai"].parse(typed)) == record


def test_a_text_beside_a_call_is_not_dropped() -> None:
    sample = FORMATS["openai"].parse(talk_with_a_call("Let me look."))
    with pytest.raises(RecordError, match="messages format has no place for a text beside a call") as caught:
        MESSAGES.emit(sample)
    assert caught.value.code == "not_carried"
    assert MESSAGES.emit(FORMATS["openai"].parse(talk_with_a_call(None)))
    picture = [{"type": "text", "text": "See"}, {"type": "image_url", "image_url": {"url": "a.png"}}]
    with pytest.raises(RecordError, match="both media and 'tool_calls'"):
        FORMATS["openai"].parse(talk_with_a_call(picture))


@pytest.mark.parametrize("content", [5, {"a": 1}, [5]])
def test_what_is_no_text_beside_a_call(content: Any) -> None:
    with pytest.raises(RecordError):
        FORMATS["openai"].parse(talk_with_a_call(content))
