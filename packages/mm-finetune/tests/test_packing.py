"""How a step is laid out: the same samples, each once, whatever the layout."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from math import ceil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mm_finetune.data import CostModel, EncodedSample, Layout, collate
from mm_finetune.data.packing import deal, micro_batches, pack
from mm_finetune.errors import ConfigError

lengths_of_a_step = st.lists(st.integers(1, 100), min_size=1, max_size=40)


@given(lengths=lengths_of_a_step, ranks=st.integers(1, 5), size=st.integers(1, 6), room=st.none() | st.just(128))
def test_every_sample_is_laid_out_once(lengths: list[int], ranks: int, size: int, room: int | None) -> None:
    layout = Layout(ranks=ranks, micro_batch_size=size, room=room)
    enough = len(lengths) >= ranks if room else ceil(len(lengths) / size) >= ranks
    if not enough:
        with pytest.raises(ConfigError, match="too few"):
            layout.plan(lengths, lengths)
        return
    planned = layout.plan(lengths, lengths)
    assert planned == layout.plan(lengths, lengths), "every process makes the same plan"
    assert sorted(place for rank in planned for row in rank for place in row) == list(range(len(lengths)))
    rows = [row for rank in planned for row in rank]
    if room:
        assert all(sum(lengths[place] for place in row) <= room for row in rows)
    else:
        assert all(len(row) <= size for row in rows)
        if len(lengths) % (size * ranks) == 0:
            assert len({len(rank) for rank in planned}) == 1


@given(costs=st.lists(st.floats(0.1, 100), min_size=1, max_size=40), ranks=st.integers(1, 6))
def test_ranks_are_balanced(costs: list[float], ranks: int) -> None:
    sums = [sum(costs[place] for place in share) for share in deal(costs, ranks)]
    # Graham 1966: whoever gets the next one has least, so nobody ends above the mean by more than one sample.
    assert max(sums) <= sum(costs) / ranks + max(costs) + 1e-9
    assert len(costs) < ranks or all(sums)


def test_a_perfect_packing_is_found() -> None:
    assert len(pack([60, 50, 50, 40, 30, 30, 20, 20], 100)) == 3
    assert pack([10, 90, 100, 5, 5], 100) == [(2,), (1, 0), (3, 4)]


@given(lengths=lengths_of_a_step)
def test_no_two_rows_could_be_one(lengths: list[int]) -> None:
    rows = pack(lengths, 100)
    # No two rows could be one.
    sums = sorted(sum(lengths[place] for place in row) for row in rows)
    assert all(low + high > 100 for low, high in pairwise(sums))


def test_a_sample_that_no_row_holds() -> None:
    with pytest.raises(ConfigError, match="129 tokens, a row 128"):
        pack([5, 129], 128)


def test_micro_batches_hold_samples_of_one_length() -> None:
    lengths = [10, 100, 11, 99, 12, 98]
    assert micro_batches(lengths, 3) == [(1, 3, 5), (4, 2, 0)]
    padded = sum(len(row) * max(lengths[place] for place in row) for row in micro_batches(lengths, 3))
    assert padded == 336  # against 600 in the order given


def toy(number: int) -> EncodedSample:
    generator = torch.Generator().manual_seed(number)
    count = 3 + number * 7 % 23
    ids = torch.randint(1, 1000, (count,), generator=generator)
    labels = torch.where(torch.rand(count, generator=generator) < 0.5, ids, -100)
    weights = torch.rand(count, generator=generator)
    positions = torch.randint(0, 50, (3, count), generator=generator)
    return EncodedSample(input_ids=ids, labels=labels, positions=positions, weights=weights, number=number)


def test_the_loss_terms_of_a_step_are_the_same_in_every_layout() -> None:
    """Each term: a token with its positions, the label it is to predict, and what that weighs."""
    samples = [toy(number) for number in range(24)]
    lengths = [len(sample.input_ids) for sample in samples]
    reference: Counter[tuple[float, ...]] = Counter()
    for sample in samples:
        assert sample.weights is not None
        for at in range(len(sample.input_ids) - 1):
            if sample.labels[at + 1] != -100:
                place = sample.positions[:, at].tolist()
                token, label = int(sample.input_ids[at]), int(sample.labels[at + 1])
                key = (token, *place, label, float(sample.weights[at + 1]))
                reference[key] += 1
    layouts = [{}, {"micro_batch_size": 6}, {"ranks": 3, "micro_batch_size": 4}, {"room": 64}, {"ranks": 4, "room": 40}]
    for layout in (Layout(**settings) for settings in layouts):
        found: Counter[tuple[float, ...]] = Counter()
        for row in (row for rank in layout.plan(lengths, lengths) for row in rank):
            batch = collate([samples[place] for place in row], packed=layout.room is not None)
            for r, t in batch.loss_mask.nonzero().tolist():
                place = batch.position_ids[:, r, t].tolist()
                token, label = int(batch.input_ids[r, t]), int(batch.labels[r, t])
                key = (token, *place, label, float(batch.loss_mask[r, t]))
                found[key] += 1
        assert found == reference


def test_the_cost_is_the_arithmetic_of_qwen() -> None:
    from transformers import Qwen2_5_VLConfig

    config = Qwen2_5_VLConfig(
        text_config={"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "vocab_size": 151936,
                     "num_attention_heads": 16, "num_key_value_heads": 2},
        vision_config={"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 2048},
    )  # fmt: skip
    cost = CostModel.of(config)
    # Qwen2.5-VL-3B: 3.09e9 weights in its decoder, with the tied output layer (311e6).
    assert cost(1) == pytest.approx(2 * 3.09e9, rel=0.01)
    # Its vision tower: 669e6 weights with the merger; two operations each, the merger's once in four patches.
    assert cost.patch == pytest.approx(2 * 0.65e9, rel=0.12)
    assert cost(2000) > 2 * cost(1000), "attention grows faster than length"
    assert cost(100, patches=400, largest=100) < cost(100, patches=400), "a video's frames don't attend to each other"


def test_the_cost_of_the_older_tower() -> None:
    from transformers import Qwen2VLConfig

    config = Qwen2VLConfig(
        text_config={"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "vocab_size": 151936,
                     "num_attention_heads": 12, "num_key_value_heads": 2},
        vision_config={"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16},
    )  # fmt: skip
    cost = CostModel.of(config)
    assert cost(1) == pytest.approx(2 * 1.54e9, rel=0.01)  # Qwen2-VL-2B: 1.54e9 weights in its decoder
    assert cost.patch == pytest.approx(2 * 0.675e9, rel=0.12)  # and 675e6 in its tower, as published
    assert cost.patch_pair == 4 * 32 * 1280  # no windows: every layer sees the whole picture
