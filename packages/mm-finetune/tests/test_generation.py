"""Evaluation within a run: the engine's answers, in every layout, are those of transformers' own generation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_worlds import lively_model, samples, write_records
from layouts import ask

from mm_finetune.evaluation import Answerer, Evaluation, evaluate
from mm_finetune.evaluation.records import question_of
from mm_finetune.template import encode

pytestmark = pytest.mark.long

TWO: list[dict[str, Any]] = [
    {},  # data parallel
    {"tp": 2, "sp": True},
    {"pp": 2, "llm": [[1, 3]], "recompute": "full"},
    {"pp": 2, "llm": [[1, 1], [1, 1]], "packed": True},
    {"tp": 2, "packed": True, "metric": "anls"},
]


@pytest.fixture(scope="module")
def world(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``hf/``, ``held.json``, ``train.json``; the answers of half of the held-out records are what the model says."""
    folder = tmp_path_factory.mktemp("held")
    lively_model(mini, folder / "hf")
    (folder / "images").symlink_to(mini / "data/images")
    entries = samples(mini)
    write_records(folder / "train.json", entries)
    blind = evaluate(
        folder / "hf", folder / "train.json", folder / "blind.json", dataset_dir=folder / "images", max_new_tokens=4
    )
    said = [answer.prediction for answer in blind.answers]
    write_records(folder / "held.json", entries, [*said[:3], "x", "y", "z"])
    return folder


def mean_loss(world: Path) -> float:
    """Of the answers' tokens, by transformers, one record at a time."""
    answerer = Answerer(world / "hf", max_new_tokens=1)
    total, count = 0.0, 0
    for value in json.loads((world / "held.json").read_text()):
        from mm_datafmt import Message, Sample

        sample = Sample(tuple(Message(t["role"], t["content"]) for t in value["messages"]), tuple(value["images"]))
        prompt = answerer.prompts.read(answerer.prompts.outline(question_of(sample, 1, world / "images")))
        counts = prompt.images.token_counts if prompt.images else ()
        encoded = encode(sample.messages, tokenizer=answerer.tokenizer, image_token_counts=counts)
        ids, labels = torch.tensor([encoded.input_ids]), torch.tensor([encoded.labels])
        pictures: dict[str, Any] = {}
        if prompt.images:
            pictures = {
                "pixel_values": prompt.images.pixel_values, "image_grid_thw": prompt.images.image_grid_thw,
                "mm_token_type_ids": (ids == answerer.model.config.image_token_id).int(),
            }  # fmt: skip
        with torch.no_grad():
            logits = answerer.model(input_ids=ids, **pictures).logits
        losses = torch.nn.functional.cross_entropy(logits[0, :-1].double(), labels[0, 1:], reduction="sum")
        total, count = total + float(losses), count + int((labels[0, 1:] != -100).sum())
    return total / count


def test_answers_in_every_layout_are_those_of_transformers(world: Path) -> None:
    results = ask("generation_worker.py", 2, world, TWO)
    assert [result["dp"] for result in results] == [2, 1, 1, 1, 1]
    loss = mean_loss(world)
    for case, result in zip(TWO, results, strict=True):
        metric = case.get("metric", "exact")
        theirs = evaluate(
            world / "hf", world / "held.json", world / f"{metric}.json", dataset_dir=world / "images",
            max_new_tokens=4, metric=metric, overwrite=True,
        )  # fmt: skip
        assert len({answer.prediction for answer in theirs.answers}) == 6, "the comparison can fail"
        ours = Evaluation.load(Path(result["file"]))
        assert ours.answers == theirs.answers, case
        assert ours.metric == metric
        early, score, kept = zip(*result["told"], strict=True)
        assert set(early) == {None}, "it was not time"
        assert set(score) == {theirs.accuracy}, "the same float on every rank"
        assert theirs.accuracy >= 0.5
        assert all(kept), "weights, modes and random numbers are as they were"
        assert ours.loss is not None
        assert math.isclose(ours.loss, loss, rel_tol=2e-6)
