"""``preview``: the published template, label and truncation rules on a tokenizer of single characters."""

import argparse
import base64
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mm_datafmt import FolderError, Message, ParseError, Sample
from mm_datafmt.commands import preview as command
from mm_datafmt.preview import PreviewOptions, PreviewTokenizer, View, Viewer, preview
from mm_datafmt.preview.terminal import terminal_lines, wants_colour
from mm_datafmt.preview.truncation import kept_lengths

WriteFile = Callable[..., Path]
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
HEADER = "<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of bytes: a letter is a token, ``é`` two, a special token one. It would cut after 3 tokens."""
    path = tmp_path_factory.mktemp("model")
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.enable_truncation(3)
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> PreviewTokenizer:
    return PreviewTokenizer(folder)


def chat(*contents: str, **fields: Any) -> Sample:
    roles = ["user", "assistant"] * len(contents)
    return Sample(tuple(Message(role, text) for role, text in zip(roles, contents, strict=False)), **fields)


def view_of(sample: Sample, folder: Path, tokenizer: PreviewTokenizer | None = None, **options: Any) -> View:
    return Viewer(folder, tokenizer, PreviewOptions(**options)).view(sample, 1)


def text_of(view: View, *, loss: bool | None = None) -> str:
    return "".join(piece.text for piece in view.pieces if loss in (None, piece.loss))


def test_the_template_and_its_loss(tmp_path: Path) -> None:
    view = view_of(chat("Hi", "Ho", "More?", "No."), tmp_path)
    assert text_of(view) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\nHi{HEADER}Ho<|im_end|>\n<|im_start|>user\nMore?{HEADER}No.<|im_end|>\n"
    )
    assert text_of(view, loss=True) == "Ho<|im_end|>\nNo.<|im_end|>\n"
    assert view.tokens is None


def test_system_tool_and_call(tmp_path: Path) -> None:
    roles = ("system", "Be brief."), ("user", "Hi"), ("function", "{}"), ("observation", "3"), ("assistant", "Three.")
    view = view_of(Sample(tuple(Message(*turn) for turn in roles)), tmp_path)
    assert text_of(view).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert f"<|im_start|>tool\n3{HEADER}" in text_of(view)
    assert text_of(view, loss=True) == "{}<|im_end|>\nThree.<|im_end|>\n"
    assert [piece.role for piece in view.pieces] == [role for role, _ in roles]


def test_what_carries_loss_can_be_chosen(tmp_path: Path) -> None:
    sample = chat("Hi", "Ho", "More?", "No.")
    assert text_of(view_of(sample, tmp_path, mask_history=True), loss=True) == "No.<|im_end|>\n"
    everything = view_of(sample, tmp_path, train_on_prompt=True)
    assert text_of(everything, loss=True) == text_of(everything)
    silent = sample._replace(messages=(sample.messages[0], Message("assistant", "Ho", 0.0), *sample.messages[2:]))
    assert text_of(view_of(silent, tmp_path), loss=True) == "No.<|im_end|>\n"


@pytest.mark.parametrize(
    ("size", "seen", "tokens"),
    [((640, 480), (588, 448), 336), ((500, 375), None, 234), ((1024, 1024), None, 324), ((20, 20), (56, 56), 4)],
)
def test_pictures(
    tmp_path: Path, tokenizer: PreviewTokenizer, size: tuple[int, int], seen: tuple[int, int] | None, tokens: int
) -> None:
    Image.new("RGB", size).save(tmp_path / "a.png")
    view = view_of(chat("<image>\nWhat?", "It.", images=("a.png",)), tmp_path, tokenizer)
    [picture] = view.pictures
    assert (picture.size, picture.tokens) == (size, tokens)
    assert seen in (None, picture.resized)
    block = f"<|vision_start|>{'<|image_pad|>' * tokens}<|vision_end|>"
    assert view.pieces[1].text == f"<|im_start|>user\n{block}\nWhat?{HEADER}"
    pad = SPECIAL.index("<|image_pad|>") + 256
    assert (view.pieces[1].ids or ()).count(pad) == tokens
    assert view.tokens == len("system\nYou are a helpful assistant.\n") + 2 + tokens + len(
        "user\n\nWhat?\nassistant\nIt.\n"
    ) + len(("im_start", "vision_start", "vision_end", "im_end", "im_start", "im_end"))


def test_the_processors_own_limits(tmp_path: Path) -> None:
    Image.new("RGB", (640, 480)).save(tmp_path / "a.png")
    [picture] = view_of(chat("<image>", "x", images=("a.png",)), tmp_path, pixel_cap=None).pictures
    assert (picture.resized, picture.tokens) == ((644, 476), 391)


def test_text_is_tokenised_as_the_files_tokenizer_does(tmp_path: Path, tokenizer: PreviewTokenizer) -> None:
    view = view_of(chat("é", "abc"), tmp_path, tokenizer)
    assert len(view.pieces[2].ids or ()) == len("abc") + 2
    assert view.learnt == 5
    assert len(view.pieces[1].ids or ()) == 2 + len("user\n" + "\nassistant\n") + 3


@pytest.mark.parametrize(
    ("pairs", "seq_length", "kept"),
    [
        ([(10, 4)], 100, [(10, 4)]),
        ([(90, 20)], 100, [(80, 20)]),  # 2t < C: the answer is spared
        ([(20, 90)], 100, [(20, 80)]),  # 2s < C: the question is spared
        ([(60, 60)], 100, [(50, 50)]),  # else in proportion
        ([(100, 50)], 100, [(67, 33)]),  # int(100 * 50/150) = 33
        ([(50, 50), (10, 10)], 100, [(50, 50), (0, 0)]),  # nothing is left for the second
        ([(30, 30), (90, 10)], 100, [(30, 30), (30, 10)]),
    ],
)
def test_the_published_truncation_rule(
    pairs: list[tuple[int, int]], seq_length: int, kept: list[tuple[int, int]]
) -> None:
    assert kept_lengths(pairs, seq_length) == kept


@given(st.lists(st.tuples(st.integers(1, 400), st.integers(1, 400)), min_size=1), st.integers(1, 900), st.booleans())
def test_truncation_never_exceeds_and_never_adds(pairs: list[tuple[int, int]], limit: int, last_first: bool) -> None:
    kept = kept_lengths(pairs, limit, last_first=last_first)
    assert sum(map(sum, kept)) <= limit
    assert all(s <= source and t <= target for (s, t), (source, target) in zip(kept, pairs, strict=True))
    if sum(map(sum, pairs)) < limit:
        assert kept == pairs


def test_the_cut_is_shown_where_it_is(tmp_path: Path, tokenizer: PreviewTokenizer) -> None:
    long, short = "q" * 200, "a" * 10
    view = view_of(chat(long, short), tmp_path, tokenizer, seq_length=100)
    assert (view.kept, view.learnt) == (100, 12)
    system, question, answer = view.pieces
    assert (system.kept, answer.kept) == (len(system.ids or ()), 12)
    assert question.kept == 100 - 12 - system.kept
    assert question.text[: question.kept_text] == "<|im_start|>user\n" + "q" * (question.kept - 6)
    lines = "\n".join(terminal_lines(view, colour=False))
    assert "cut to 100, 12 carry loss" in lines
    assert re.search("q\n    ✂ cut here.*\n    qqq", lines)


def test_mask_history_keeps_the_last_turn(tmp_path: Path, tokenizer: PreviewTokenizer) -> None:
    sample = chat("q" * 60, "a" * 60, "r" * 30, "last")
    assert view_of(sample, tmp_path, tokenizer, seq_length=90).pieces[-1].kept == 0
    assert view_of(sample, tmp_path, tokenizer, seq_length=90, mask_history=True).pieces[-1].kept == len("last") + 2


def test_a_cut_through_a_picture_is_said(tmp_path: Path, tokenizer: PreviewTokenizer) -> None:
    Image.new("RGB", (640, 480)).save(tmp_path / "a.png")
    sample = chat("<image>", "x", images=("a.png",))
    [note] = view_of(sample, tmp_path, tokenizer, seq_length=300).notes
    assert re.match(r"the cut takes \d+ of 336 picture tokens", note)
    assert view_of(sample, tmp_path, tokenizer, seq_length=1024).notes == ()


@pytest.mark.parametrize(
    ("sample", "note"),
    [
        (chat("<image>", "x", images=("no.png",)), "picture 1 is counted as one token: 'no.png' is missing"),
        (chat("<image>", "x", images=("../../etc/passwd",)), "leads out of the folder"),
        (chat("<image>", "x", images=("thin.png",)), "a side of none"),
        (chat("<video>", "x", videos=("v.mp4",)), "1 video path(s): their tokens are not counted"),
        (chat("a", "x", tools="[]"), "tools are not part of this template"),
        (chat("a<|im_end|>b", "x"), "turn 1 itself holds '<|im_end|>'"),
        (chat("<image>", "x"), "1 <image> but the record has 0"),
        (chat("no answer"), "no turn is by the assistant"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, sample: Sample, note: str) -> None:
    Image.new("L", (1_000_000, 1)).save(tmp_path / "thin.png")
    [found] = view_of(sample, tmp_path).notes
    assert note in found


def test_records_of_a_file(images: Path, write_array: WriteFile) -> None:
    good = {"image": "a.png", "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "7"}]}
    source = write_array([good, {"conversations": 3}, good, good])
    views = list(preview(source, n=2, start=2, dataset_dir=images))
    assert [view.record for view in views] == [2, 3]
    assert "'conversations' must be a list" in views[0].notes[0]
    assert views[1].pictures[0].size == (8, 6)


def test_tokenizers_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match=r"tokenizer\.json"):
        PreviewTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ParseError, match="cannot be read"):
        PreviewTokenizer(tmp_path)


HOSTILE = "<script>alert(1)</script>\x1b[2J\x07\u202e\"'&<img src=x onerror=y>\r\x9b"


def hostile(images: Path, write: WriteFile) -> Path:
    turns = [{"from": "human", "value": f"<image>{HOSTILE}"}, {"from": "gpt", "value": HOSTILE}]
    return write([{"image": "a.png", "conversations": turns}, {"image": f"{HOSTILE}.png", "conversations": turns}])


@pytest.mark.parametrize("colour", [False, True])
def test_text_cannot_steer_the_terminal(images: Path, write_array: WriteFile, colour: bool) -> None:
    source = hostile(images, write_array)
    lines = [line for view in preview(source, dataset_dir=images) for line in terminal_lines(view, colour=colour)]
    text = re.sub(r"\x1b\[(0|1|2|32|33|31;9)m", "", "\n".join(lines))
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)
    assert r"\x1b[2J\x07\u202e" in text
    assert ("\x1b[32m" in "".join(lines)) == colour


def test_a_long_text_is_shown_by_its_ends_and_a_picture_by_its_count(tmp_path: Path) -> None:
    Image.new("RGB", (2000, 2000)).save(tmp_path / "a.png")
    view = view_of(chat("<image>" + "q" * 9000, "x", images=("a.png",)), tmp_path, pixel_cap=None)
    text = "\n".join(terminal_lines(view, colour=False))
    assert "    <|vision_start|><|image_pad|>×5041<|vision_end|>qqq" in text  # 2000 becomes 1988: 71 squares of 28
    assert re.search(r"q \[…\d+ characters…\] q", text)
    assert len(text) < 5000


def test_colour_only_where_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert wants_colour(Terminal())
    assert not wants_colour(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_colour(Terminal())
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not wants_colour(Terminal())


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    command.add(parser.add_subparsers())
    options = parser.parse_args(["preview", *map(str, arguments)])
    code: int = options.run(options)
    return code


def test_the_page(images: Path, write_array: WriteFile, folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (640, 480), "red").save(images / "a.png")
    out = tmp_path / "out.html"
    source = hostile(images, write_array)
    assert run(source, "--dataset_dir", images, "--tokenizer", folder, "--seq_length", 480, "--html", out) == 0
    page = out.read_text(encoding="utf-8")
    parser = Tags()
    parser.feed(page)
    names = {tag for tag, _ in parser.tags}
    assert "script" not in names
    assert not {name for _, attrs in parser.tags for name in attrs if name.startswith("on")}
    [image] = [attrs for tag, attrs in parser.tags if tag == "img"]
    kind, _, data = str(image["src"]).partition(",")
    assert kind == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as thumbnail:
        assert thumbnail.size == (280, 213)  # the shape of 588 x 448
    assert not {attrs["src"] for tag, attrs in parser.tags if "src" in attrs and tag != "img"}
    assert "<|image_pad|>×336" in page.replace("&lt;", "<").replace("&gt;", ">")
    assert {"loss", "seen", "cut"} <= {str(attrs.get("class")) for tag, attrs in parser.tags if tag == "span"}
    assert "is missing" in page


def test_a_page_is_not_overwritten(images: Path, write_array: WriteFile, tmp_path: Path) -> None:
    out = tmp_path / "out.html"
    out.write_text("mine")
    with pytest.raises(FileExistsError):
        run(hostile(images, write_array), "--html", out, "--dataset_dir", images)
    assert out.read_text() == "mine"
    assert run(hostile(images, write_array), "--html", out, "--dataset_dir", images, "--overwrite") == 0


def test_the_command(images: Path, write_array: WriteFile, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "7"}]
    source = write_array([{"image": "a.png", "conversations": turns}] * 7)
    assert run(source, "--dataset_dir", images) == 0
    out, err = capsys.readouterr()
    assert out.count("record ") == 5
    assert "no --tokenizer: texts are shown, token ids and cuts are not" in err
    assert "picture 1 a.png: 8×6, the model sees 56×56: 4 tokens" in out
    assert "  assistant, loss\n    7<|im_end|>↵\n" in out
    assert run(source, "--dataset_dir", images, "--tokenizer", folder, "--n", 1) == 0
    out, err = capsys.readouterr()
    seven, end, newline = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"], 257, "Ċ"
    assert f"  assistant, loss, 3 tokens: {seven['7']} {end} {seven[newline]}\n" in out
    assert "tokens, 3 carry loss\n" in out
    assert "no --tokenizer" not in err


def test_limits_are_checked() -> None:
    with pytest.raises(ValueError, match="seq_length is 0"):
        PreviewOptions(seq_length=0)
    with pytest.raises(ValueError, match="pixel_cap is -1"):
        PreviewOptions(pixel_cap=-1)
