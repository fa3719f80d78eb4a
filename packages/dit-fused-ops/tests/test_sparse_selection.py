"""The order of tokens and the choice of blocks, against loops that say the same one token or one block at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dit_fused_ops.sparse.selection import (
    Blocks,
    density,
    kept_count,
    least_density,
    pool_blocks,
    select_blocks,
    video_blocks,
)
from dit_fused_ops.sparse.tiles import Latent, tile_order, token_order

LATENTS = st.tuples(st.integers(1, 4), st.integers(1, 27), st.integers(1, 27))
SCALE = 0.25


def one_by_one(latent: Latent) -> list[int]:
    """The published order, token by token."""
    frames, height, width = latent
    rows, columns = height // 8 * 8, width // 8 * 8
    order = []
    for frame in range(frames):
        cells = [(y, x) for y in range(height) for x in range(width)]
        if frame > 0 or (rows, columns) == (height, width):
            cells = [
                (top + y, left + x)
                for top in range(0, rows, 8)
                for left in range(0, columns, 8)
                for y in range(8)
                for x in range(8)
            ]
            cells += [(y, x) for y in range(rows, height) for x in range(width)]
            cells += [(y, x) for y in range(rows) for x in range(columns, width)]
        order += [(frame * height + y) * width + x for y, x in cells]
    return order


def blocks(tokens: int, size: int, first: int = 0, text: int | None = None) -> Blocks:
    """Blocks of which `first` leading ones, and those from `text` on, are always kept."""
    count = -(-tokens // size)
    return Blocks(tokens=tokens, size=size, first=first, text=count if text is None else text)


@given(LATENTS)
@settings(deadline=None, max_examples=60)
def test_the_tile_order_is_the_published_one(latent: Latent) -> None:
    assert tile_order(latent).tolist() == one_by_one(latent)


@given(LATENTS, st.integers(0, 40))
@settings(deadline=None, max_examples=60)
def test_the_token_order_is_a_permutation_with_the_text_at_the_end(latent: Latent, txt_len: int) -> None:
    order = token_order(latent, txt_len)
    tokens = math.prod(latent) + txt_len
    assert sorted(order.tolist()) == list(range(tokens))
    assert order[tokens - txt_len :].tolist() == list(range(txt_len))
    assert torch.equal(order[order.argsort()], torch.arange(tokens))


def test_a_tile_is_a_square_of_neighbours() -> None:
    order = tile_order((1, 16, 16))
    assert order[:10].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 16, 17]
    assert order[64:66].tolist() == [8, 9]
    assert order[128:130].tolist() == [128, 129]


def test_the_first_frame_stays_as_it_is_when_tiles_do_not_fill_it() -> None:
    order = tile_order((2, 9, 10))
    assert order[:90].tolist() == list(range(90))
    second = order[90:] - 90
    assert second[:9].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 10]
    assert second[64:74].tolist() == list(range(80, 90)), "the row below the tiles"
    assert second[74:].tolist() == [8, 9, 18, 19, 28, 29, 38, 39, 48, 49, 58, 59, 68, 69, 78, 79], "the columns"


@pytest.mark.parametrize(
    ("count", "sparsity", "kept"),
    [(10, 0.0, 10), (10, 0.7, 3), (10, 0.75, 3), (10, 1.0, 1), (1, 0.5, 1), (98, 0.9, 10)],
)
def test_a_share_of_the_blocks_is_kept(count: int, sparsity: float, kept: int) -> None:
    assert kept_count(count, sparsity) == kept


def test_legacy_keeps_the_block_that_rounding_adds() -> None:
    assert kept_count(10, 0.7, legacy=True) == 4
    assert kept_count(10, 1.0, legacy=True) == 1, "not a crash"


@given(LATENTS, st.integers(0, 300), st.sampled_from([16, 128]))
@settings(deadline=None, max_examples=80)
def test_blocks_with_text_or_first_frame_are_always_kept(latent: Latent, txt_len: int, size: int) -> None:
    frames, height, width = latent
    kept = video_blocks(latent, txt_len, size)
    forced = kept.forced(torch.device("cpu")).tolist()
    video = frames * height * width
    for number, is_forced in enumerate(forced):
        held = range(number * size, min((number + 1) * size, video + txt_len))
        assert is_forced == any(token < height * width or token >= video for token in held)
    assert len(forced) == kept.count
    assert sum(forced) == kept.forced_count
    assert kept.lengths(torch.device("cpu")).sum() == kept.tokens == video + txt_len


def test_legacy_leaves_text_in_the_boundary_block_unprotected() -> None:
    """864 tokens of video and 128 of text: block 6 holds 32 tokens of text."""
    assert video_blocks((2, 27, 16), 128, 128).text == 6
    assert video_blocks((2, 27, 16), 128, 128, legacy=True).text == 7


def test_a_block_is_represented_by_the_mean_of_its_own_tokens() -> None:
    x = torch.tensor([1.0, 3.0, 10.0, 20.0, 7.0]).view(1, 1, 5, 1)
    assert pool_blocks(x, blocks(5, 2)).flatten().tolist() == [2.0, 15.0, 7.0]
    assert pool_blocks(x.bfloat16(), blocks(5, 2)).dtype == torch.float32
    assert pool_blocks(x.double(), blocks(5, 2)).dtype == torch.float64


def test_a_selection_by_hand() -> None:
    """Blocks of 2 tokens whose means are 1, 2, 3, 4: with positive queries the last two score highest."""
    k = torch.tensor([0.0, 2.0, 1.0, 3.0, 3.0, 3.0, 4.0]).view(1, 1, 7, 1)
    q = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0, 0.0, 5.0]).view(1, 1, 7, 1)
    mask = select_blocks(q, k, blocks(7, 2), blocks(7, 2), scale=1.0, kept=2)
    assert mask[0, 0].int().tolist() == [[0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1]]
    # Tokens per block 2, 2, 2, 1: rows keep 3, 4, 7, 3 of 7 keys, and stand for 2, 2, 2, 1 queries.
    shared = density(mask, blocks(7, 2), blocks(7, 2))
    assert shared.shape == ()
    assert shared.item() == pytest.approx((2 * 3 + 2 * 4 + 2 * 7 + 1 * 3) / 49, rel=1e-6)


def in_loops(q: Tensor, k: Tensor, q_blocks: Blocks, k_blocks: Blocks, kept: int) -> Tensor:
    """The published formula, softmax included, in float64 and one row at a time."""
    batch, heads = q.shape[:2]
    size = q_blocks.size
    group = heads // k.shape[1]
    q_means, k_means = ([part.double().mean(2) for part in torch.split(x, size, dim=2)] for x in (q, k))
    mask = torch.zeros(batch, heads, len(q_means), len(k_means), dtype=torch.bool)
    for b in range(batch):
        for n in range(heads):
            for row, q_mean in enumerate(q_means):
                scores = torch.stack([(q_mean[b, n] * k_mean[b, n // group]).sum() * SCALE for k_mean in k_means])
                weights = scores.softmax(0)
                limit = weights.sort(descending=True).values[kept - 1]
                for column, weight in enumerate(weights):
                    always = any(
                        number < side.first or number >= side.text
                        for number, side in ((row, q_blocks), (column, k_blocks))
                    )
                    mask[b, n, row, column] = always or bool(weight >= limit)
    return mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("q_tokens", "k_tokens", "heads", "kv_heads"), [(50, 50, 2, 2), (33, 61, 4, 2), (20, 64, 3, 1)]
)
def test_the_selection_is_the_published_formula(
    q_tokens: int, k_tokens: int, heads: int, kv_heads: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(q_tokens)
    q = torch.randn(2, heads, q_tokens, 16).to(dtype)
    k = torch.randn(2, kv_heads, k_tokens, 16).to(dtype)
    sides = blocks(q_tokens, 8, first=1), blocks(k_tokens, 8, first=1, text=k_tokens // 8 - 1)
    mask = select_blocks(q, k, *sides, scale=SCALE, kept=2)
    assert torch.equal(mask, in_loops(q, k, *sides, kept=2))
    assert not torch.equal(mask[0], mask[1]), "each batch entry selects for itself"
    first = select_blocks(q, k, *sides, scale=SCALE, kept=2, legacy=True)
    assert torch.equal(first, mask[:1].expand_as(mask)), "in MindIE SD the first one selects for all"


def test_ties_are_all_kept() -> None:
    same = torch.ones(1, 1, 32, 4)
    assert select_blocks(same, same, blocks(32, 8), blocks(32, 8), scale=1.0, kept=1).all()


def test_a_score_that_is_no_number_is_not_hidden() -> None:
    q = torch.ones(1, 1, 32, 4)
    k = torch.arange(32.0).view(1, 1, 32, 1).repeat(1, 1, 1, 4)
    k[0, 0, 3, 0] = torch.nan
    assert select_blocks(q, k, blocks(32, 8), blocks(32, 8), scale=1.0, kept=1)[..., 0].all()


def test_autocast_does_not_change_the_selection() -> None:
    torch.manual_seed(3)
    q, k = torch.randn(2, 1, 2, 512, 32)
    sides = blocks(512, 8), blocks(512, 8)
    plain = select_blocks(q, k, *sides, scale=SCALE, kept=8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(select_blocks(q, k, *sides, scale=SCALE, kept=8), plain)


@given(LATENTS, st.integers(0, 60), st.floats(0, 1), st.integers(0, 2**16))
@settings(deadline=None, max_examples=60)
def test_the_density_is_counted_and_never_under_what_is_expected(
    latent: Latent, txt_len: int, sparsity: float, seed: int
) -> None:
    side = video_blocks(latent, txt_len, 16)
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, 2, side.tokens, 4, generator=generator)
    kept = kept_count(side.count, sparsity)
    mask = select_blocks(q, k, side, side, scale=SCALE, kept=kept)
    by_token = mask.repeat_interleave(16, 2)[:, :, : side.tokens].repeat_interleave(16, 3)[..., : side.tokens]
    assert density(mask, side, side).item() == pytest.approx(by_token.double().mean().item(), rel=1e-5)
    assert mask.double().mean().item() >= least_density(side, side, kept) - 1e-9
    assert mask.any(-1).all(), "no block of queries is left without keys"
