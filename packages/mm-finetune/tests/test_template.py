"""Encoding, against the chat template of the tokenizer and against the text that the ids stand for."""

from __future__ import annotations

import unicodedata
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mm_datafmt import Message
from mm_finetune.errors import ConfigError, DataError
from mm_finetune.template import LabelRules, encode, encode_prompt

START, PAD, END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
shared_fixture = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
# Marks that mean something are tested by name.
texts = st.text(st.characters(exclude_characters="<|>", exclude_categories=["Cs"]), max_size=30)


def turns(*contents: str, system: str | None = None) -> list[Message]:
    roles = ["user", "assistant"] * len(contents)
    first = [] if system is None else [Message(role="system", content=system)]
    return first + [Message(role=role, content=content) for role, content in zip(roles, contents, strict=False)]


def chat(tokenizer: Any, messages: list[Message], counts: list[int], *, prompt: bool = False) -> str:
    """What the tokenizer's own chat template makes of it, with each picture's tokens written out."""
    plain = [{"role": m.role, "content": m.content.replace("<image>", START + PAD + END)} for m in messages]
    text: str = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=prompt)
    parts = text.split(PAD)
    assert len(parts) == len(counts) + 1
    return parts[0] + "".join(PAD * count + part for count, part in zip(counts, parts[1:], strict=True))


@pytest.mark.parametrize(
    ("messages", "counts"),
    [
        (turns("<image>\nWhich digit is this?", "7"), [4]),
        (turns("Hello", "Good morning!", system="Be brief."), []),
        (turns("What about <image> and <image>?", "Both.", "<image>", "That too."), [4, 16, 1]),
        (turns("café 12345", "naïve — 你好 🙂\n\nnew paragraph\n"), []),
    ],
)
def test_ids_are_those_of_the_chat_template(tokenizer: Any, messages: list[Message], counts: list[int]) -> None:
    encoded = encode(messages, tokenizer=tokenizer, image_token_counts=counts)
    text = chat(tokenizer, messages, counts)
    assert encoded.input_ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    question = messages[:-1]
    counts_asked = counts[: sum(m.content.count("<image>") for m in question)]
    prompt = encode_prompt(question, tokenizer=tokenizer, image_token_counts=counts_asked)
    asked = chat(tokenizer, question, counts_asked, prompt=True)
    assert prompt == tokenizer(asked, add_special_tokens=False)["input_ids"]


@shared_fixture
@given(contents=st.lists(st.tuples(texts, texts), min_size=1, max_size=3), system=st.none() | texts.filter(len))
def test_any_text_survives(tokenizer: Any, contents: list[tuple[str, str]], system: str | None) -> None:
    messages = turns(*(text for pair in contents for text in pair), system=system)
    encoded = encode(messages, tokenizer=tokenizer, image_token_counts=[])
    # The tokenizer composes characters (NFC), and does it for each piece by itself.
    expected = unicodedata.normalize("NFC", chat(tokenizer, messages, []))
    assert unicodedata.normalize("NFC", tokenizer.decode(encoded.input_ids)) == expected
    answers = "".join(f"{answer}<|im_end|>\n" for _, answer in contents)
    learnt = tokenizer.decode([label for label in encoded.labels if label != -100])
    assert unicodedata.normalize("NFC", learnt) == unicodedata.normalize("NFC", answers)
    prompt = encode_prompt(messages[:-1], tokenizer=tokenizer, image_token_counts=[])
    assert encoded.input_ids[: len(prompt)] == prompt


def test_loss_stands_on_every_answer_with_its_end_and_nowhere_else(tokenizer: Any) -> None:
    encoded = encode(turns("<image>\nfirst", "one", "second", "two"), tokenizer=tokenizer, image_token_counts=[4])
    assert len(encoded.labels) == len(encoded.input_ids)
    pairs = list(zip(encoded.input_ids, encoded.labels, strict=True))
    assert all(label in (-100, token) for token, label in pairs)
    assert tokenizer.decode([label for _, label in pairs if label != -100]) == "one<|im_end|>\ntwo<|im_end|>\n"
    not_learnt = tokenizer.decode([token for token, label in pairs if label == -100])
    header = "<|im_end|>\n<|im_start|>assistant\n"
    assert not_learnt == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{START}{PAD * 4}{END}\nfirst{header}<|im_start|>user\nsecond{header}"
    )


def test_no_token_spans_question_and_answer(tokenizer: Any) -> None:
    # In one piece, the line break before the answer and those that it begins with would be one token.
    messages = turns("Write a blank line.", "\n\n\nDone")
    encoded = encode(messages, tokenizer=tokenizer, image_token_counts=[])
    prompt = encode_prompt(messages[:1], tokenizer=tokenizer, image_token_counts=[])
    alone = tokenizer("\n\n\nDone<|im_end|>\n", add_special_tokens=False)["input_ids"]
    assert encoded.input_ids == prompt + alone


def test_an_empty_system_turn_is_the_default_one(tokenizer: Any) -> None:
    empty, none = turns("a", "b", system=""), turns("a", "b")
    ids = [encode(messages, tokenizer=tokenizer, image_token_counts=[]).input_ids for messages in (empty, none)]
    assert ids[0] == ids[1]


@pytest.mark.parametrize(
    ("messages", "counts", "words"),
    [
        (turns("<image> and <image>", "two"), [4], "2 <image> but the record has 1 picture"),
        (turns("no picture", "none"), [4], "0 <image> but the record has 1 picture"),
        (turns("<image>", "x"), [0], "1 or more"),
        (turns("<video>", "x"), [], "1 <video> but the record has 0 video"),
        (turns(f"{PAD} <image>", "x"), [4], "holds 1 <|image_pad|>; write <image>"),
        (turns("only a question"), [], "must be by 'assistant'"),
        ([], [], "last turn is missing"),
        (turns("a", "b")[::-1], [], "turn 1 is by 'assistant', expected 'user'"),
        ([*turns("a", "b"), Message(role="system", content="late")], [], "turn 3 is by 'system'"),
        ([Message(role="tool", content="?")], [], "'tool'"),
    ],
)
def test_faults_of_a_record_are_named(tokenizer: Any, messages: list[Message], counts: list[int], words: str) -> None:
    with pytest.raises(DataError) as caught:
        encode(messages, tokenizer=tokenizer, image_token_counts=counts)
    assert words in str(caught.value)


def test_a_prompt_ends_with_a_question(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="must be by 'user'"):
        encode_prompt(turns("a", "b"), tokenizer=tokenizer, image_token_counts=[])


def test_another_tokenizer_is_refused() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"?": 0}, unk_token="?")))
    with pytest.raises(ConfigError, match=r"lacks <\|im_start\|>.*Qwen2.5-VL folder"):
        encode(turns("a", "b"), tokenizer=other, image_token_counts=[])


def learnt(tokenizer: Any, messages: list[Message], rules: LabelRules, counts: list[int] | None = None) -> list[bool]:
    encoded = encode(messages, tokenizer=tokenizer, image_token_counts=counts or [], rules=rules)
    for token, label, weight in zip(encoded.input_ids, encoded.labels, encoded.weights, strict=True):
        assert label == (token if weight else -100)
    return [label != -100 for label in encoded.labels]


def lines(tokenizer: Any, *texts: str) -> list[int]:
    """Lengths of lines, each tokenised by itself."""
    return [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]


def test_what_carries_loss_is_what_the_rules_say_token_for_token(tokenizer: Any) -> None:
    messages = turns("<image>\nfirst?", "one", "second?", "two", system="Be brief.")
    system, first, one, second, two = lines(
        tokenizer,
        "<|im_start|>system\nBe brief.<|im_end|>\n",
        f"<|im_start|>user\n{START}{PAD * 4}{END}\nfirst?<|im_end|>\n<|im_start|>assistant\n",
        "one<|im_end|>\n",
        "<|im_start|>user\nsecond?<|im_end|>\n<|im_start|>assistant\n",
        "two<|im_end|>\n",
    )
    expected = {
        LabelRules(): [False] * (system + first) + [True] * one + [False] * second + [True] * two,
        LabelRules(mask_history=True): [False] * (system + first + one + second) + [True] * two,
        LabelRules(train_on_prompt=True): [True] * (system + first + one + second + two),
    }
    for rules, mask in expected.items():
        assert learnt(tokenizer, messages, rules, [4]) == mask


def test_an_answer_weighs_what_its_record_says(tokenizer: Any) -> None:
    heavy = Message(role="assistant", content="one", loss=2.5)
    silent = Message(role="assistant", content="two", loss=0)
    question = Message(role="user", content="?")
    messages = [question, heavy, question, silent, question, Message(role="assistant", content="three")]
    encoded = encode(messages, tokenizer=tokenizer, image_token_counts=[])
    one, two, three = lines(tokenizer, "one<|im_end|>\n", "two<|im_end|>\n", "three<|im_end|>\n")
    weights = [weight for weight in encoded.weights if weight]
    assert weights == [2.5] * one + [1.0] * three
    assert encoded.labels.count(-100) == len(encoded.labels) - one - three
    assert two > 0
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(DataError, match=r"weight .* must be 0 or more"):
            encode([question, heavy._replace(loss=wrong)], tokenizer=tokenizer, image_token_counts=[])


def test_rules_that_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="exclude each other"):
        LabelRules(mask_history=True, train_on_prompt=True)


def test_videos_stand_where_they_are_named_beside_pictures(tokenizer: Any) -> None:
    messages = turns("<video> then <image> then <video>?", "All.")
    encoded = encode(messages, tokenizer=tokenizer, image_token_counts=[3], video_token_counts=[2, 5])
    movie = "<|video_pad|>"
    asked = f"{START}{movie * 2}{END} then {START}{PAD * 3}{END} then {START}{movie * 5}{END}?"
    text = f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(encoded.input_ids).endswith(text + "All.<|im_end|>\n")
