"""What ``mm-datafmt preview`` shows is what mm-finetune trains on: the same ids, the same labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mm_datafmt import Message, Sample
from mm_datafmt.preview import PreviewOptions, PreviewTokenizer, Viewer
from mm_finetune.mini.tokenizer import train_tokenizer
from mm_finetune.template import IGNORE, encode

PICTURES = {"a.png": (640, 480), "b.png": (20, 20), "c.png": (100, 30)}
# Under MindSpeed MM's 262144 pixels: the first two are published, the third is 112 x 28 by the least of 3136 pixels.
COUNTS = {"a.png": 336, "b.png": 4, "c.png": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("preview")
    train_tokenizer(
        ["What colour is the bus? The bus is white and red.", "你好 naïve café 12345 \n\n"]
    ).save_pretrained(path)
    for name, size in PICTURES.items():
        Image.new("RGB", size).save(path / name)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def compare(sample: Sample, folder: Path, tokenizer: Any) -> None:
    view = Viewer(folder, PreviewTokenizer(folder), PreviewOptions()).view(sample, 1)
    trained = encode(sample.messages, tokenizer=tokenizer, image_token_counts=[COUNTS[path] for path in sample.images])
    assert [token for piece in view.pieces for token in piece.ids or ()] == trained.input_ids
    labels = [token if piece.loss else IGNORE for piece in view.pieces for token in piece.ids or ()]
    assert labels == trained.labels
    assert view.notes == ()
    assert view.learnt == len(labels) - labels.count(IGNORE)


@pytest.mark.parametrize(
    ("contents", "pictures", "system"),
    [
        (("<image>\nWhat colour is the bus?", "White and red."), ("a.png",), None),
        (
            ("<image><image> and\n<image>", "Both.\n\n", "And now?", "\n\n你好 🙂"),
            ("a.png", "b.png", "c.png"),
            "Be brief.",
        ),
        (("No picture.", "naïve  café\t12345", "b", "c"), (), ""),
    ],
)
def test_the_same_ids_and_labels(
    folder: Path, tokenizer: Any, contents: tuple[str, ...], pictures: tuple[str, ...], system: str | None
) -> None:
    turns = [Message(("user", "assistant")[index % 2], text) for index, text in enumerate(contents)]
    first = [] if system is None else [Message("system", system)]
    compare(Sample((*first, *turns), pictures), folder, tokenizer)


texts = st.text(st.characters(exclude_characters="<|>\0", exclude_categories=["Cs"]), max_size=30)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(
    pairs=st.lists(st.tuples(texts, texts.filter(str.strip)), min_size=1, max_size=3),
    system=st.none() | texts,
    picture=st.none() | st.sampled_from(sorted(PICTURES)),
)
def test_the_same_for_any_text(
    folder: Path, tokenizer: Any, pairs: list[tuple[str, str]], system: str | None, picture: str | None
) -> None:
    turns = [Message(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]
    if picture is not None:
        turns[0] = Message("user", f"<image>{pairs[0][0]}")
    first = [] if system is None else [Message("system", system)]
    compare(Sample((*first, *turns), () if picture is None else (picture,)), folder, tokenizer)
