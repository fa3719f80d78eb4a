"""Pairs as the field writes them, to records of two sequences that stay together."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from data_worlds import picture

from mm_datafmt import Message, RecordError, Sample
from mm_finetune.config import DataConfig
from mm_finetune.data import Alone, Batch, Dataset, Encoder, Fault, Layout, Loader, LoaderSettings, collate
from mm_finetune.errors import DataError
from mm_finetune.preference import PairEncoder, parse_pair, read_pairs
from mm_finetune.template import LabelRules, encode

ASK, RIGHT, WRONG = "<image>\nWhich digit?", "A seven.", "It is a one, I think."
PAIR = (Message("user", ASK), Message("assistant", RIGHT), Message("assistant", WRONG))


def human(text: str) -> dict[str, Any]:
    return {"from": "human", "value": text}


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


# Each layout as its trainer documents it, all of one and the same pair.
LLAMA_FACTORY = {
    "conversations": [human(ASK)], "chosen": {"from": "gpt", "value": RIGHT},
    "rejected": {"from": "gpt", "value": WRONG}, "images": ["7.png"],
}  # fmt: skip
CONVERSATIONAL = {
    "prompt": [said("user", ASK)], "chosen": [said("assistant", RIGHT)], "rejected": [said("assistant", WRONG)],
    "images": ["7.png"],
}  # fmt: skip
LAYOUTS: dict[str, dict[str, Any]] = {
    "llama_factory": LLAMA_FACTORY,
    "one picture": {**{k: v for k, v in LLAMA_FACTORY.items() if k != "images"}, "image": "7.png"},
    "llama_factory openai": {
        "messages": [said("user", ASK)], "chosen": said("assistant", RIGHT), "rejected": said("assistant", WRONG),
        "images": ["7.png"],
    },
    "alpaca": {
        "instruction": "<image>", "input": "Which digit?", "chosen": RIGHT, "rejected": WRONG, "images": ["7.png"],
    },
    "trl": CONVERSATIONAL,
    "trl, plain": {"prompt": ASK, "chosen": RIGHT, "rejected": WRONG, "images": ["7.png"]},
    "trl, no prompt": {
        "chosen": [said("user", ASK), said("assistant", RIGHT)],
        "rejected": [said("user", ASK), said("assistant", WRONG)], "images": ["7.png"],
    },
    "parts": {
        "prompt": [said("user", [{"type": "image"}, {"type": "text", "text": "\nWhich digit?"}])],
        "chosen": [said("assistant", [{"type": "text", "text": RIGHT}])],
        "rejected": [said("assistant", [{"type": "text", "text": WRONG}])], "images": ["7.png"],
    },
    "parts with paths": {
        "prompt": [said("user", [{"type": "image", "image": "7.png"}, {"type": "text", "text": "\nWhich digit?"}])],
        "chosen": [said("assistant", RIGHT)], "rejected": [said("assistant", WRONG)],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_read(name: str) -> None:
    sample = parse_pair(LAYOUTS[name])
    assert sample.messages == PAIR
    assert (sample.images, sample.videos) == (("7.png",), ())


def test_a_picture_that_no_turn_speaks_of_stands_before_the_first_question() -> None:
    """As TRL puts it; not so for LLaMA-Factory's layout, whose text has the marks."""
    turns = [said("system", "Be brief."), said("user", "Which?"), said("assistant", "?"), said("user", "This.")]
    sample = parse_pair({**CONVERSATIONAL, "prompt": turns})
    assert [m.content for m in sample.messages[:4]] == ["Be brief.", "<image>Which?", "?", "This."]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"messages": [said("user", "?"), said("assistant", "!")]}, "no 'chosen'; a pair has"),
        ({"prompt": "?", "chosen": "!"}, "no 'rejected'"),
        ({"chosen": "Blue.", "rejected": "Green."}, "list of at least one"),
        (
            {"chosen": [said("user", "a"), said("assistant", "!")],
             "rejected": [said("user", "b"), said("assistant", "?")]},
            "the same turns but for the last",
        ),
        ({**CONVERSATIONAL, "chosen": [said("assistant", "a"), said("user", "b")]}, "'chosen' must be one turn"),
        ({**LAYOUTS["parts with paths"], "images": ["8.png"]}, "which ones count"),
        (["no", "object"], "JSON object"),
    ],
)  # fmt: skip
def test_what_is_no_pair_says_why(record: Any, words: str) -> None:
    with pytest.raises(RecordError, match=words):
        parse_pair(record)


def test_a_file_may_be_lines_and_packed(tmp_path: Path) -> None:
    import gzip

    path = tmp_path / "pairs.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(record) + "\n" for record in LAYOUTS.values()).encode()))
    assert [sample.messages for sample in read_pairs(path)] == [PAIR] * len(LAYOUTS)


# Encoding.


def record(folder: Path, number: int) -> dict[str, Any]:
    """No picture, one or two; answers of different lengths; every third after an earlier answer."""
    names = [picture(folder / f"{number}-{n}.png", (56 + 28 * n, 56), seed=number + n) for n in range(number % 3)]
    turns = [said("user", "<image>" * len(names) + f"What is number {number}?")]
    if number % 3 == 0:
        turns += [said("assistant", "A number."), said("user", "Which?")]
    return {
        "prompt": turns, "chosen": [said("assistant", f"It is {number}." + " Yes." * (number % 4))],
        "rejected": [said("assistant", "No idea." * (1 + number % 2))], "images": names,
    }  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Twelve pairs; read only."""
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "pairs.json").write_text(json.dumps([record(folder, number) for number in range(12)]))
    return DataConfig(path=folder / "pairs.json", seq_length=128, cache_dir=folder / "cache")


def pairs(config: DataConfig, mini: Path) -> Dataset:
    return Dataset(config, mini / "hf", kind=PairEncoder)


def single(sample: Sample, answer: int, dataset: Dataset, number: int) -> tuple[list[int], list[int]]:
    """The question with one of its answers, as any conversation is encoded."""
    tokens = dataset.encoder._tokens(dataset.index.media(number).images)
    found = encode(
        (*sample.messages[:-2], sample.messages[answer]), tokenizer=dataset.encoder.tokenizer,
        image_token_counts=tokens, rules=LabelRules(mask_history=True),
    )  # fmt: skip
    return found.input_ids, found.labels


def test_a_pair_is_both_conversations_with_all_pictures(config: DataConfig, mini: Path) -> None:
    records = pairs(config, mini)
    for number, sample in enumerate(records.samples):
        both = records[number]
        sequences = both.sequences()
        for sequence, answer in zip(sequences, (-2, -1), strict=True):
            ids, labels = single(sample, answer, records, number)
            assert sequence.input_ids.tolist() == ids
            assert sequence.labels.tolist() == labels
            alone = records.encoder.positions(ids, records.index.media(number).images, (), ())
            assert torch.equal(sequence.positions, alone)
            assert sequence.images is both.images, "decoded once, used twice"
        assert int(records.index.tokens[number]) == sum(both.lengths) == len(both.input_ids)


@pytest.mark.parametrize("packed", [False, True])
def test_sequences_of_a_pair_stand_beside_each_other(config: DataConfig, mini: Path, packed: bool) -> None:
    records = pairs(config, mini)
    batch = collate([records[2], records[5]], packed=packed)
    singles = collate([s for n in (2, 5) for s in records[n].sequences()], packed=packed)
    assert batch.numbers == (2, 2, 5, 5)
    assert torch.equal(batch.input_ids, singles.input_ids)
    assert torch.equal(batch.loss_mask, singles.loss_mask)
    assert batch.image_grid_thw is not None
    # Two pictures each, which go through the tower once and are shown before both answers.
    assert len(batch.image_grid_thw) == 2 + 2
    assert batch.image_order == (0, 1, 0, 1, 2, 3, 2, 3)
    assert batch.pixel_values is not None
    assert len(batch.pixel_values) == int(batch.image_grid_thw.prod(-1).sum())
    if packed:
        assert batch.cu_seqlens is not None
        assert batch.cu_seqlens.diff().tolist() == [*records[2].lengths, *records[5].lengths]
    else:
        assert batch.input_ids.shape[0] == 4


def lengths_of(config: DataConfig, mini: Path) -> list[tuple[int, ...]]:
    return [pairs(config, mini)[number].lengths for number in range(12)]


def test_both_answers_fit_or_the_pair_is_out(config: DataConfig, mini: Path) -> None:
    longest = [max(both) for both in lengths_of(config, mini)]
    limit = sorted(longest)[6]
    short = replace(config, seq_length=limit, truncate="drop")
    assert pairs(short, mini).index.usable.tolist() == [n for n, length in enumerate(longest) if length <= limit]
    strict = pairs(replace(short, truncate="error", on_bad="skip", max_bad_ratio=1), mini)
    first = next(n for n, length in enumerate(longest) if length > limit)
    assert strict.index.faults[0].record == first
    assert f"it has {longest[first]} tokens, data.seq_length is {limit}" in strict.index.faults[0].message


def test_lengths_are_remembered_apart_from_those_of_single_answers(config: DataConfig, mini: Path) -> None:
    assert PairEncoder(config, mini / "hf").fingerprint() != Encoder(config, mini / "hf").fingerprint()


def test_pairs_that_are_none_are_bad_records(tmp_path: Path, mini: Path) -> None:
    names = [picture(tmp_path / "0.png", (56, 56))]
    records = [
        record(tmp_path, 0),
        {"prompt": "?", "chosen": "!"},
        {**record(tmp_path, 0), "chosen": "<image> here", "images": names},
        {**record(tmp_path, 0), "images": names},
        {**record(tmp_path, 1), "images": ["gone.png"]},
    ]
    (tmp_path / "pairs.json").write_text(json.dumps(records))
    config = DataConfig(path=tmp_path / "pairs.json", on_bad="skip", max_bad_ratio=1, cache_dir=tmp_path / "cache")
    made = pairs(config, mini)
    assert made.check().records == {1, 2, 4}
    assert made.index.usable.tolist() == [0, 3], "a picture that no turn speaks of is put before the question"
    said_of = {fault.record: fault.message for fault in made.index.faults}
    assert "no 'rejected'" in said_of[1]
    assert "pictures belong to the question" in said_of[2]
    assert "gone.png" in said_of[4]
    with pytest.raises(DataError, match="record 1: the record has no 'rejected'"):
        pairs(replace(config, on_bad="error"), mini).check()


# Loading.

LAYOUTS_OF_STEPS = [
    Layout(micro_batch_size=2), Layout(ranks=2, micro_batch_size=2), Layout(room=256), Layout(ranks=3, room=256),
]  # fmt: skip


def settings(layout: Layout, rank: int = 0) -> LoaderSettings:
    return LoaderSettings(global_batch_size=4, seed=3, last_step=3, layout=layout, rank=rank)


@pytest.mark.parametrize("layout", LAYOUTS_OF_STEPS)
def test_a_pair_stays_in_one_micro_batch_whatever_the_layout(config: DataConfig, mini: Path, layout: Layout) -> None:
    records = pairs(config, mini)
    seen: list[int] = []
    for rank in range(layout.ranks):
        with closing(Loader(records, settings(layout, rank))) as loader:
            for step in range(1, 4):
                for batch in loader.step(step).batches:
                    assert batch.numbers[::2] == batch.numbers[1::2]
                    seen += batch.numbers[::2]
    assert sorted(seen) == list(range(12)), "an epoch of twelve pairs"


def loss_by_pair(batches: list[Batch]) -> dict[int, set[bool]]:
    carries: dict[int, set[bool]] = {}
    for batch in batches:
        for row, number in enumerate(batch.numbers):
            carries.setdefault(number, set()).add(bool(batch.loss_mask[row].any()))
    return carries


def test_a_pair_that_cannot_be_read_is_silent_as_a_whole(config: DataConfig, mini: Path) -> None:
    class Told(Alone):
        def union(self, faults: Any) -> list[Fault]:
            return [*faults, Fault(lost, "unreadable", "another process could not read it")]

    records = pairs(replace(config, on_bad="skip", max_bad_ratio=1), mini)
    with closing(Loader(records, settings(Layout(micro_batch_size=2)))) as loader:
        lost = loader.step(1).numbers[0]
    with closing(Loader(records, settings(Layout(micro_batch_size=2)), exchange=Told())) as loader:
        carries = loss_by_pair(loader.step(1).batches)
    assert carries.pop(lost) == {False}
    assert all(both == {True} for both in carries.values())


def test_records_in_order_each_once(config: DataConfig, mini: Path) -> None:
    import numpy as np

    records = pairs(config, mini)
    with closing(Loader(records, settings(Layout(micro_batch_size=4)))) as loader:
        other = loader.in_order(np.array([1, 4, 5, 7, 9, 11]))
        taken = [other.step(step).numbers for step in range(1, other.settings.last_step + 1)]
    assert taken == [(1, 4, 5, 7), (9, 11, 1, 4)]
