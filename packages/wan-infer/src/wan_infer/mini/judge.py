"""Does wan-mini show what it was asked for? ``python -m wan_infer.mini.judge`` counts, on clips of unseen seeds.

The judge has never seen a generated clip, and shares no code with the model: a support vector machine that learned
digits from clean clips, and the way that the centre of brightness goes. Needs the extra ``train``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, product

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from wan_infer.mini import wan_mini
from wan_infer.mini.clips import DIGIT_SIZE, DIRECTIONS, Clip, draw_clips

FIRST_SEED = 1_000_000  # training drew from the seeds 0, 1 and 2
_BATCH = 20
_FEATURES = 12  # pixels, both ways, at which a digit is looked at


@dataclass(frozen=True)
class Verdict:
    """What was asked for, and what the judge saw."""

    seed: int
    asked: tuple[int, str]
    seen: tuple[int, str]


class Judge:
    """Reads digit and direction from a clip.

    Args:
        clips: clean ones to learn from.
    """

    def __init__(self, clips: Sequence[Clip]) -> None:
        from sklearn.svm import SVC

        self._digits = SVC(C=10.0).fit(np.stack([_features(clip.video) for clip in clips]), [c.digit for c in clips])

    def read(self, video: Tensor) -> tuple[int, str]:
        """Return what a video [3, F, H, W] in [-1, 1] shows."""
        return int(self._digits.predict(_features(video)[None])[0]), _direction(video)


def clean_judge(count: int = 2000) -> Judge:
    """Return a judge that learned from clean clips, of a seed of their own."""
    return Judge(list(islice(draw_clips(torch.Generator().manual_seed(3)), count)))


def verdicts(judge: Judge, count: int, *, device: str | None = None) -> Iterator[Verdict]:
    """Generate clips with the default settings, all digits and directions in turn, and judge each."""
    from wan_infer.pipeline import WanPipeline

    pipe = WanPipeline.from_pretrained(wan_mini(), device=device)
    everything = list(product(range(10), DIRECTIONS))
    for start in range(0, count, _BATCH):
        asked = [everything[number % len(everything)] for number in range(start, min(start + _BATCH, count))]
        prompts = [f"the digit {digit} moves {direction}" for digit, direction in asked]
        videos = pipe(prompts, seed=FIRST_SEED + start).video().cpu()
        for number, (wanted, video) in enumerate(zip(asked, videos, strict=True), start=start):
            yield Verdict(FIRST_SEED + number, wanted, judge.read(video))


def main() -> int:
    """Count, and say what was misread; the exit code is 0 from nine in ten on."""
    parser = argparse.ArgumentParser(description="Count how often wan-mini shows what it was asked for.")
    parser.add_argument("--clips", type=int, default=200, help="how many (default: %(default)s)")
    parser.add_argument("--device", help="where (default: the accelerator of this machine, or else cpu)")
    options = parser.parse_args()
    judge, right = clean_judge(), 0
    for verdict in verdicts(judge, options.clips, device=options.device):
        right += verdict.asked == verdict.seen
        if verdict.asked != verdict.seen:
            sys.stdout.write(f"seed {verdict.seed}: asked for {verdict.asked}, saw {verdict.seen}\n")
    sys.stdout.write(f"{right} of {options.clips} right ({right / options.clips:.1%})\n")
    return 0 if right >= 0.9 * options.clips else 1


def _features(video: Tensor) -> NDArray[np.float32]:
    """The digit of a clip as one small picture: cut out around its centre in every frame, and averaged."""
    bright = _brightness(video)
    pad = DIGIT_SIZE // 2 + 2
    padded = F.pad(bright, (pad, pad, pad, pad))
    cuts = []
    for frame, (row, column) in zip(padded, _centres(bright).round().long().tolist(), strict=True):
        cuts.append(frame[row : row + 2 * pad, column : column + 2 * pad])
    small = F.adaptive_avg_pool2d(torch.stack(cuts).mean(0)[None, None], _FEATURES)
    return np.asarray((small / small.amax().clamp(min=1e-6)).flatten().numpy())


def _direction(video: Tensor) -> str:
    """Where the centre of brightness goes, from the first third of the clip to the last."""
    centres = _centres(_brightness(video))
    third = len(centres) // 3
    way = centres[-third:].mean(0) - centres[:third].mean(0)
    return max(DIRECTIONS, key=lambda name: float(way @ torch.tensor(DIRECTIONS[name], dtype=way.dtype)))


def _brightness(video: Tensor) -> Tensor:
    """Grey values from 0 to 1, [F, H, W]; what is nearly black is black."""
    return F.relu((video.float().mean(0) + 1) / 2 - 0.1)


def _centres(bright: Tensor) -> Tensor:
    """The centre of brightness of every frame as (row, column), [F, 2]."""
    weight = bright.sum((1, 2)).clamp(min=1e-6)
    rows, columns = (torch.arange(size, dtype=bright.dtype) for size in bright.shape[1:])
    return torch.stack((bright.sum(2) @ rows / weight, bright.sum(1) @ columns / weight), dim=1)


if __name__ == "__main__":
    sys.exit(main())
