"""The scores against scikit-image and against formulas written out."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from dit_cache import Comparison, ComparisonError, Scores, compare
from dit_cache.errors import CacheError

# Both compute in float64; scikit-image convolves and averages in another order, and C2 keeps the quotient tame.
ROUNDING = 1e-10
SHAPES = pytest.mark.parametrize("shape", [(3, 1, 11, 11), (3, 4, 17, 23), (3, 2, 64, 12)], ids=str)
FLOATS = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)


def pair(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, noise: float = 0.1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    reference = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
    change = noise * torch.randn(shape, generator=generator, dtype=torch.float64)
    return reference.to(dtype), (reference + change).to(dtype)


def only(comparison: Comparison) -> Scores:
    (scores,) = comparison.videos
    return scores


@SHAPES
@FLOATS
@pytest.mark.parametrize("data_range", [1.0, 2.0, 255.0])
def test_ssim_and_psnr_are_those_of_scikit_image(shape: tuple[int, ...], dtype: torch.dtype, data_range: float) -> None:
    reference, candidate = pair(shape, dtype)
    scores = only(compare(reference, candidate, data_range=data_range))
    r, c = reference.double().numpy(), candidate.double().numpy()
    how: dict[str, Any] = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    frames = [
        structural_similarity(r[:, f], c[:, f], data_range=data_range, channel_axis=0, **how) for f in range(shape[1])
    ]
    assert scores.ssim == pytest.approx(np.mean(frames), abs=ROUNDING)
    assert scores.psnr == pytest.approx(peak_signal_noise_ratio(r, c, data_range=data_range), rel=ROUNDING)


@SHAPES
def test_norms(shape: tuple[int, ...]) -> None:
    reference, candidate = (video.double() for video in pair(shape))
    scores = only(compare(reference, candidate))
    assert scores.relative_l2 == pytest.approx(float((candidate - reference).norm() / reference.norm()), rel=ROUNDING)
    moves_r, moves_c = reference.diff(dim=1), candidate.diff(dim=1)
    expected = float((moves_c - moves_r).norm() / moves_r.norm()) if shape[1] > 1 else 0.0
    assert scores.temporal == pytest.approx(expected, rel=ROUNDING)


def test_a_constant_shift_moves_nothing() -> None:
    reference, _ = pair((3, 5, 16, 16), torch.float64)
    scores = only(compare(reference, reference + 0.25))
    assert scores.temporal < ROUNDING
    assert scores.psnr == pytest.approx(20 * math.log10(2 / 0.25))


def test_identical_videos() -> None:
    reference, _ = pair((2, 3, 3, 16, 16))
    comparison = compare(reference, reference.clone())
    for scores in (*comparison.videos, comparison.worst):
        assert (scores.psnr, scores.relative_l2, scores.temporal) == (math.inf, 0, 0)
        assert scores.ssim == pytest.approx(1, abs=ROUNDING)
    assert comparison.mean.psnr == 100


def test_a_reference_without_motion() -> None:
    still, _ = pair((3, 1, 16, 16))
    still = still.expand(3, 4, 16, 16)
    _, moving = pair((3, 4, 16, 16))
    assert only(compare(still, still * 0.5)).temporal == 0
    assert only(compare(still, moving)).temporal == math.inf


def test_a_black_reference() -> None:
    black = torch.zeros(3, 2, 16, 16)
    assert only(compare(black, black)).relative_l2 == 0
    assert only(compare(black, black + 1)).relative_l2 == math.inf


def test_videos_of_a_batch_are_compared_one_by_one() -> None:
    near, far = pair((3, 3, 16, 16), noise=0.01), pair((3, 3, 16, 16), noise=0.3)
    same = near[0], near[0]
    batches = (torch.stack(videos) for videos in zip(near, far, same, strict=True))
    comparison = compare(*batches)
    alone = [only(compare(*each)) for each in (near, far, same)]
    assert list(comparison.videos) == alone
    mean, worst = comparison.mean, comparison.worst
    assert worst == alone[1]
    assert mean.psnr == pytest.approx((alone[0].psnr + alone[1].psnr + 100) / 3)
    for name in ("ssim", "relative_l2", "temporal"):
        assert getattr(mean, name) == pytest.approx(sum(getattr(scores, name) for scores in alone) / 3)


def test_the_worst_of_each_score_may_be_of_different_videos() -> None:
    first = Scores(psnr=20, ssim=0.9, relative_l2=0.5, temporal=0.1)
    second = Scores(psnr=30, ssim=0.8, relative_l2=0.4, temporal=0.2)
    assert Comparison(videos=(first, second)).worst == Scores(psnr=20, ssim=0.8, relative_l2=0.5, temporal=0.2)


def test_tensors_that_need_gradients_or_lie_anyhow() -> None:
    reference, candidate = pair((3, 4, 16, 16))
    folded = candidate.transpose(2, 3).contiguous().transpose(2, 3).requires_grad_()
    assert compare(reference, folded) == compare(reference, candidate)


def test_json_holds_what_is_infinite() -> None:
    still, _ = pair((3, 1, 16, 16))
    still = still.expand(3, 2, 16, 16)
    comparison = compare(torch.stack((still, still)), torch.stack((still, pair((3, 2, 16, 16))[1])))
    read = json.loads(json.dumps(comparison.as_dict(), allow_nan=False))
    assert list(read) == ["mean", "worst", "videos"]
    for scores, held in zip((comparison.mean, comparison.worst, *comparison.videos), flat(read), strict=True):
        assert Scores(**{name: float(value) for name, value in held.items()}) == scores
    assert read["videos"][0]["psnr"] == "inf"


def flat(read: dict[str, Any]) -> list[dict[str, Any]]:
    return [read["mean"], read["worst"], *read["videos"]]


def test_in_words() -> None:
    one = Scores(psnr=31.5, ssim=0.91, relative_l2=0.05, temporal=0.1)
    assert str(Comparison(videos=(one,))) == "PSNR 31.50 dB, SSIM 0.9100, relative L2 0.05, temporal 0.1"
    two = Scores(psnr=math.inf, ssim=1, relative_l2=0, temporal=0)
    text = str(Comparison(videos=(one, two)))
    assert text.startswith("2 videos: PSNR 65.75 dB, SSIM 0.9550")
    assert text.endswith("(worst: PSNR 31.50 dB, SSIM 0.9100, relative L2 0.05, temporal 0.1)")
    assert "\n" not in text


def test_scores_are_frozen() -> None:
    comparison = compare(*pair((3, 1, 16, 16)))
    with pytest.raises(FrozenInstanceError):
        comparison.videos = ()  # type: ignore[misc]


REFUSED: dict[str, tuple[Tensor, Tensor, str]] = {
    "shapes differ": (torch.zeros(3, 2, 16, 16), torch.zeros(3, 3, 16, 16), r"\[3, 2, 16, 16\].*\[3, 3, 16, 16\]"),
    "an image": (torch.zeros(3, 16, 16), torch.zeros(3, 16, 16), r"\[3, F, H, W\].*given is \[3, 16, 16\]"),
    "frames first": (torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 16, 16), r"given is \[2, 3, 16, 16\]"),
    "no frame": (torch.zeros(3, 0, 16, 16), torch.zeros(3, 0, 16, 16), "not empty"),
    "no video": (torch.zeros(0, 3, 1, 16, 16), torch.zeros(0, 3, 1, 16, 16), "not empty"),
    "too small": (torch.zeros(3, 1, 16, 10), torch.zeros(3, 1, 16, 10), "16x10.*11x11.*enlarge"),
    "bytes": (torch.zeros(3, 1, 16, 16, dtype=torch.uint8), torch.zeros(3, 1, 16, 16), "reference is torch.uint8"),
    "NaN": (torch.zeros(3, 1, 16, 16), torch.full((3, 1, 16, 16), math.nan), "768 of the 768.*candidate"),
    "inf": (torch.full((3, 1, 16, 16), math.inf), torch.zeros(3, 1, 16, 16), "768 of the 768.*reference"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_pair_of_videos(name: str) -> None:
    reference, candidate, message = REFUSED[name]
    with pytest.raises(ComparisonError, match=message):
        compare(reference, candidate)


@pytest.mark.parametrize("data_range", [0.0, -1.0, math.inf, math.nan])
def test_impossible_ranges(data_range: float) -> None:
    with pytest.raises(CacheError, match=f"data_range is {data_range}"):
        compare(*pair((3, 1, 16, 16)), data_range=data_range)
