"""Lengths of samples: the template by hand, with a tokenizer whose every byte is a token; estimates; figures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from mm_datafmt import FolderError, ParseError, check, image_token_count
from mm_datafmt.checking.histogram import bins_of, histogram_lines
from mm_datafmt.checking.lengths import Lengths, PixelRule
from mm_datafmt.checking.text_tokens import SPECIAL_TOKENS, Estimate, TokenizerFile

WriteFile = Callable[..., Path]

SYSTEM = "You are a helpful assistant."
# A turn is <|im_start|> role \n content <|im_end|> \n; with a byte for a token the words of the template are bytes.
HEAD = 1 + len("system\n") + 1 + len("\n")
USER = 1 + len("user\n") + 1 + len("\n") + 1 + len("assistant\n")
TOOL = USER - len("user") + len("tool")
ANSWER = 1 + len("\n")


@pytest.fixture
def bytewise(tmp_path: Path) -> Path:
    """A model folder whose tokenizer makes each byte a token and knows Qwen's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    folder = tmp_path / "model"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def length_of(path: Path, **arguments: Any) -> int:
    lengths = check(path, **arguments).lengths
    assert lengths.measured == 1
    return lengths.total


def turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in pairs]


def test_text_by_hand(bytewise: Path, write_array: WriteFile) -> None:
    record = {"messages": turns(("user", "hé?"), ("assistant", "yes"), ("user", "\nand"), ("assistant", "\nno"))}
    expected = HEAD + len(SYSTEM) + USER + 4 + ANSWER + 3 + USER + 4 + ANSWER + 3
    assert length_of(write_array([record]), tokenizer=bytewise) == expected


def test_a_system_turn_replaces_the_default(bytewise: Path, write_array: WriteFile) -> None:
    record = {"messages": turns(("system", "Be brief."), ("user", "q"), ("assistant", "a"))}
    assert length_of(write_array([record]), tokenizer=bytewise) == HEAD + 9 + USER + 1 + ANSWER + 1


def test_the_reply_of_a_tool_is_a_turn(bytewise: Path, write_array: WriteFile) -> None:
    record = {"messages": turns(("user", "q"), ("assistant", "a"), ("observation", "42"), ("assistant", "b"))}
    expected = HEAD + len(SYSTEM) + USER + 1 + ANSWER + 1 + TOOL + 2 + ANSWER + 1
    assert length_of(write_array([record]), tokenizer=bytewise) == expected


def test_images_take_their_tokens_and_two_marks(bytewise: Path, images: Path, write_array: WriteFile) -> None:
    record = {
        "messages": turns(("user", "<image>\n<image>?"), ("assistant", "a")),
        "images": ["a.png", "b.jpg"],
    }
    # 8 x 6 and 5 x 5 pixels: both are widened to 28 x 28 and, below 3136 pixels, enlarged to 56 x 56: four squares.
    expected = HEAD + len(SYSTEM) + USER + len("\n?") + 2 * (4 + 2) + ANSWER + 1
    report = check(write_array([record]), dataset_dir=images, tokenizer=bytewise)
    assert (report.lengths.total, report.lengths.image_tokens, report.lengths.exact) == (expected, 8, True)


def test_the_trainers_pixel_settings_count(bytewise: Path, images: Path, write_array: WriteFile) -> None:
    record = {"messages": turns(("user", "<image>"), ("assistant", "a")), "images": ["a.png"]}
    source = write_array([record])
    base = HEAD + len(SYSTEM) + USER + 2 + ANSWER + 1
    for rule, tokens in (
        (PixelRule(image_max_pixels=None), image_token_count(8, 6)),
        (PixelRule(image_min_pixels=65536), image_token_count(8, 6, pixel_cap=262144, pixel_floor=65536)),
        (PixelRule(max_pixels=3136), 4),
    ):
        assert length_of(source, dataset_dir=images, tokenizer=bytewise, pixels=rule) == base + tokens


def test_what_cannot_be_measured_is_counted(images: Path, write_array: WriteFile) -> None:
    (images / "v.mp4").write_bytes(b"x")
    question = turns(("user", "q"), ("assistant", "a"))
    records = [
        {"messages": turns(("user", "<video>"), ("assistant", "a")), "videos": ["v.mp4"]},
        {"messages": question, "tools": "[]"},
        {"messages": turns(("user", "q"), ("function", '{"name": "f", "arguments": {}}'))},
        {"messages": question},
    ]
    lengths = check(write_array(records), dataset_dir=images).lengths
    assert (lengths.measured, lengths.unmeasured) == (1, 3)
    picture = {"messages": turns(("user", "<image>"), ("assistant", "a")), "images": ["a.png"]}
    assert check(write_array([picture]), dataset_dir=images, media="exists").lengths.unmeasured == 1


def test_an_image_that_the_model_refuses(images: Path, write_array: WriteFile) -> None:
    from PIL import Image

    Image.new("L", (601, 3)).save(images / "thin.png")
    source = write_array([{"messages": turns(("user", "<image>"), ("assistant", "a")), "images": ["thin.png"]}])
    assert check(source, dataset_dir=images).ok  # MindSpeed MM widens it
    (problem,) = check(source, dataset_dir=images, pixels=PixelRule(image_max_pixels=None)).problems
    assert problem.code == "image_aspect"
    assert "601x3" in problem.message


def test_bad_records_have_no_length(write_array: WriteFile) -> None:
    lengths = check(write_array([{"messages": turns(("user", "q"), ("assistant", " "))}])).lengths
    assert (lengths.measured, lengths.unmeasured, lengths.total) == (0, 0, 0)


def test_tokenizers_that_are_none(tmp_path: Path, write_array: WriteFile) -> None:
    source = write_array([{"messages": turns(("user", "q"), ("assistant", "a"))}])
    with pytest.raises(FolderError, match="is not a folder"):
        check(source, tokenizer=tmp_path / "no")
    with pytest.raises(FolderError, match="holds no tokenizer"):
        check(source, tokenizer=tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ParseError, match="cannot be read"):
        check(source, tokenizer=tmp_path)
    Tokenizer(models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ParseError, match=r"has no <\|im_start\|>.*not the tokenizer of Qwen2.5-VL"):
        TokenizerFile(tmp_path)


# Token counts of Qwen's published vocabulary (that of Qwen2.5 is the same for text).
@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        (["You are a helpful assistant."], 6),
        (["<|im_start|>system\n", "You are a helpful assistant.", "<|im_end|>\n"], 11),
        (["2026"], 4),
        (["The bus in the image is white and red."], 10),
    ],
)
def test_estimates_of_plain_sentences(text: list[str], tokens: int) -> None:
    (estimate,) = Estimate().counts([text])
    assert abs(estimate - tokens) <= 1


@given(st.text())
def test_an_estimate_exists_for_every_text(text: str) -> None:
    (estimate,) = Estimate().counts([[text]])
    assert 0 <= estimate <= 4 * len(text) + 1


def lengths_of(*values: int, limit: int | None = None) -> Lengths:
    counts = {value: values.count(value) for value in sorted(set(values))}
    return Lengths(counts=counts, unmeasured=0, exact=False, image_tokens=0, seq_length=limit)


def test_the_figures() -> None:
    lengths = lengths_of(*range(1, 101), limit=90)
    assert [lengths.quantile(share) for share in (0.5, 0.9, 0.99, 1)] == [50, 90, 99, 100]
    assert (lengths.total, lengths.truncated) == (5050, 10)  # a sample of just 90 is not cut
    text = "\n".join(lengths.describe())
    assert "text ESTIMATED from characters" in text
    assert "seq_length 90 would truncate 10 of 100 samples (10.00 %)" in text
    assert list(lengths_of().describe()) == []


def test_seq_length_of_a_file(bytewise: Path, write_array: WriteFile) -> None:
    source = write_array([{"messages": turns(("user", "q"), ("assistant", "a" * n))} for n in (1, 2, 3)])
    base = HEAD + len(SYSTEM) + USER + 1 + ANSWER
    lengths = check(source, tokenizer=bytewise, seq_length=base + 2).lengths
    assert (lengths.truncated, lengths.summary()["truncated_share"]) == (1, 0.333333)
    with pytest.raises(ValueError, match="seq_length is 0"):
        check(source, seq_length=0)


@given(st.dictionaries(st.integers(0, 100_000), st.integers(1, 50), min_size=1), st.integers(1, 100_000))
def test_every_sample_is_in_a_bin(counts: dict[int, int], limit: int) -> None:
    bins = bins_of(counts)
    assert sum(one.samples for one in bins) == sum(counts.values())
    assert 1 <= len(bins) <= 20
    assert bins[0].start <= min(counts)
    assert bins[-1].beyond == (max(counts) >= bins[-1].end)
    for one in bins[:-1]:
        assert one.samples == sum(n for length, n in counts.items() if one.start <= length < one.end)
    lines = histogram_lines(bins, limit=limit, columns=60, plain=True)
    assert all(len(line) <= 60 for line in lines)
    assert len(lines) - len(bins) in (0, 1)


def test_the_histogram_by_hand() -> None:
    bins = bins_of({10: 4, 11: 2, 29: 1}, most=2)
    assert bins == [(10, 20, 6, False), (20, 30, 1, False)]
    lines = histogram_lines(bins, limit=20, columns=30, plain=True)
    assert lines == [f"10-19  6  {'#' * 20}", "20-29  1  ###", " seq_length 20 ".center(30, "-")]
    assert histogram_lines(bins, columns=30)[1] == "20-29  1  ███▍"  # 20 / 6 = 3.3, in eighths 27
    assert histogram_lines([]) == []
