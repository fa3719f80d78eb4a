"""How far a video is from the one that no cache touched.

All is computed on the CPU in float64, frame by frame, so that the numbers are those of any other machine.

Legend: B videos, F frames, H height, W width; r reference, c candidate, Δ the difference of neighbouring frames.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_cache.errors import ComparisonError
from dit_cache.meter.jsonable import jsonable

CHANNELS = 3
WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03  # of Wang et al. 2004
GREATEST_PSNR = 100.0  # dB; what an identical video counts in a mean


@dataclass(frozen=True, kw_only=True)
class Scores:
    """How near a candidate is to its reference.

    Attributes:
        psnr: 10·log10(data_range² / mean (c − r)²) over the whole video, in dB; inf where nothing differs.
        ssim: structural similarity, the mean over frames and channels; 1 where nothing differs.
        relative_l2: ‖c − r‖ / ‖r‖.
        temporal: ‖Δc − Δr‖ / ‖Δr‖, how much of the motion is wrong; 0 for a single frame, inf where the reference
            stands still and the candidate does not.
    """

    psnr: float
    ssim: float
    relative_l2: float
    temporal: float

    def __str__(self) -> str:
        return (
            f"PSNR {self.psnr:.2f} dB, SSIM {self.ssim:.4f}, "
            f"relative L2 {self.relative_l2:.4g}, temporal {self.temporal:.4g}"
        )

    def as_dict(self) -> dict[str, float | str | None]:
        """The scores for JSON; an infinite one is "inf"."""
        return {name: jsonable(value) for name, value in asdict(self).items()}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The scores of one or more videos.

    Attributes:
        videos: of each video, in the order given.
    """

    videos: tuple[Scores, ...]

    @property
    def mean(self) -> Scores:
        """The mean of each score over the videos.

        That of PSNR is the mean of dB, as papers report it, in which no video counts more than 100 dB: an identical one
        would make it infinite.
        """
        return Scores(
            psnr=_mean(min(video.psnr, GREATEST_PSNR) for video in self.videos),
            ssim=_mean(video.ssim for video in self.videos),
            relative_l2=_mean(video.relative_l2 for video in self.videos),
            temporal=_mean(video.temporal for video in self.videos),
        )

    @property
    def worst(self) -> Scores:
        """The worst value of each score, whichever video has it."""
        return Scores(
            psnr=min(video.psnr for video in self.videos),
            ssim=min(video.ssim for video in self.videos),
            relative_l2=max(video.relative_l2 for video in self.videos),
            temporal=max(video.temporal for video in self.videos),
        )

    def as_dict(self) -> dict[str, Any]:
        """Mean, worst and each video for JSON; an infinite score is "inf"."""
        return {
            "mean": self.mean.as_dict(),
            "worst": self.worst.as_dict(),
            "videos": [video.as_dict() for video in self.videos],
        }

    def __str__(self) -> str:
        if len(self.videos) == 1:
            return str(self.videos[0])
        return f"{len(self.videos)} videos: {self.mean} (worst: {self.worst})"


def compare(reference: Tensor, candidate: Tensor, *, data_range: float = 2.0) -> Comparison:
    """Compare videos with those that should have come out.

    SSIM is that of Wang, Bovik, Sheikh, Simoncelli, "Image Quality Assessment: From Error Visibility to Structural
    Similarity" (2004): an 11×11 Gaussian window of σ 1.5, K1 = 0.01, K2 = 0.03. Windows that reach over the border are
    left out, as in their code and in scikit-image.

    Args:
        reference: [3, F, H, W] or [B, 3, F, H, W], floating point, of any device.
        candidate: the same shape.
        data_range: greatest possible value less the least one; 2 for videos in [-1, 1].

    Raises:
        ComparisonError: the shapes differ or are no videos, frames are smaller than SSIM's window, numbers are no
            floats or not finite, or `data_range` is not positive.
    """
    _check(reference, candidate, data_range)
    if reference.ndim == 4:
        reference, candidate = reference[None], candidate[None]
    pairs = zip(reference.detach(), candidate.detach(), strict=True)
    return Comparison(videos=tuple(_scores(r, c, data_range) for r, c in pairs))


def ssim(reference: Tensor, candidate: Tensor, data_range: float) -> float:
    """The mean structural similarity of two frames [3, H, W] in float64; formula and window as in `compare`."""
    window = torch.exp(-0.5 * ((torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2) / SIGMA) ** 2)
    window /= window.sum()
    planes = torch.stack((reference, candidate, reference**2, candidate**2, reference * candidate)).flatten(0, 1)
    smooth = F.conv2d(F.conv2d(planes[:, None], window[None, None, :, None]), window[None, None, None])
    r, c, rr, cc, rc = smooth.chunk(5)
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    likeness = (2 * r * c + c1) * (2 * (rc - r * c) + c2)
    return float((likeness / ((r**2 + c**2 + c1) * (rr - r**2 + cc - c**2 + c2))).mean())


def _scores(reference_CFHW: Tensor, candidate_CFHW: Tensor, data_range: float) -> Scores:
    squares = dict.fromkeys(("error", "reference", "change_error", "change"), 0.0)
    likeness = []
    before: tuple[Tensor, Tensor] | None = None
    for reference, candidate in zip(reference_CFHW.unbind(1), candidate_CFHW.unbind(1), strict=True):
        r, c = reference.double().cpu(), candidate.double().cpu()
        squares["error"] += _square(c - r)
        squares["reference"] += _square(r)
        if before is not None:
            squares["change_error"] += _square((c - before[1]) - (r - before[0]))
            squares["change"] += _square(r - before[0])
        likeness.append(ssim(r, c, data_range))
        before = r, c
    mean_square = squares["error"] / reference_CFHW.numel()
    return Scores(
        psnr=10 * math.log10(data_range**2 / mean_square) if mean_square else math.inf,
        ssim=_mean(likeness),
        relative_l2=_relative(squares["error"], squares["reference"]),
        temporal=_relative(squares["change_error"], squares["change"]),
    )


def _square(x: Tensor) -> float:
    return float(x.square().sum())


def _relative(error: float, reference: float) -> float:
    if error == 0:
        return 0.0
    return math.sqrt(error / reference) if reference else math.inf


def _mean(values: Iterable[float]) -> float:
    held = list(values)
    return math.fsum(held) / len(held)


def _check(reference: Tensor, candidate: Tensor, data_range: float) -> None:
    shape = tuple(reference.shape)
    if tuple(candidate.shape) != shape:
        raise ComparisonError(
            f"the reference is {list(shape)}, the candidate {list(candidate.shape)}: give equal shapes"
        )
    if len(shape) not in (4, 5) or shape[-4] != CHANNELS or 0 in shape:
        raise ComparisonError(f"videos are [3, F, H, W] or [B, 3, F, H, W] and not empty, given is {list(shape)}")
    if min(shape[-2:]) < WINDOW:
        raise ComparisonError(
            f"frames are {shape[-2]}x{shape[-1]}, SSIM needs {WINDOW}x{WINDOW}: enlarge both videos the same way"
        )
    if not 0 < data_range < math.inf:
        raise ComparisonError(f"data_range is {data_range}, it must be positive: 2 for [-1, 1], 1 for [0, 1]")
    for name, video in (("reference", reference), ("candidate", candidate)):
        if not video.is_floating_point():
            raise ComparisonError(f"the {name} is {video.dtype}: give floating point numbers, in [-1, 1] by default")
        wrong = int((~torch.isfinite(video)).sum())
        if wrong:
            raise ComparisonError(f"{wrong} of the {video.numel()} numbers of the {name} are NaN or infinite")
