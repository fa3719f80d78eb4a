"""What each rank does in `test_parallel`: whole generations of tiny models and of wan-mini, in several layouts."""

from __future__ import annotations

import contextlib
import io
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import tiny_pipeline as tiny
import tiny_wan
import torch
import torch.distributed as dist
from torch import Tensor

import dit_ulysses.lost
from dit_cache import CacheConfig
from dit_ulysses import ParallelPlan
from wan_infer import WanPipeline, denoise, wan_mini
from wan_infer.cli import main
from wan_infer.errors import RequestError
from wan_infer.parallel import Alone, Parallel, Whole

Layout = tuple[int, int, int]  # cfg, ulysses, ring
ALONE: Layout = (1, 1, 1)

# 5 heads, and a number of tokens that is odd: 3 x 3 x 5.
FIVE = replace(tiny_wan.TRANSFORMERS["t2v"], dim=60, num_heads=5)
TINY: dict[str, Any] = {"size": (80, 48), "frames": 9, "steps": 2, "seed": 5, "guidance": 4.0}
MINI: dict[str, Any] = {"prompt": "the digit 3 moves left", "seed": 1, "frames": 17}
STEPS = {"attention": 50, "attention, shorter": 20}  # the walk-through's numbers, and in proportion; 8 for others
CACHES: dict[str, CacheConfig] = {
    "attention": CacheConfig("attention_cache", 6, 50, step_start=20, step_interval=2, step_end=37),
    "attention, shorter": CacheConfig("attention_cache", 6, 20, step_start=8, step_interval=2, step_end=15),
    "range": CacheConfig("dit_block_cache", 6, 8, step_start=2, step_interval=2, block_start=1, block_end=5),
}


def parallel(layout: Layout) -> Alone:
    cfg, ulysses, ring = layout
    return Alone() if layout == ALONE else Parallel(ParallelPlan(cfg=cfg, ulysses=ulysses, ring=ring))


class Turned(Whole):
    """All tokens, that come back a place further."""

    def gather(self, x: Tensor, dim: int) -> Tensor:
        return x.roll(1, dim)


def image(seed: int) -> Tensor:
    return torch.rand(3, 48, 80, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def tiny_latents(kind: str, together: Alone) -> Tensor:
    """One video of a model with random weights; only the first rank has the images and what reads them."""
    reads = together.processes.first
    config = FIVE if kind == "five" else tiny.CONFIGS["t2v" if kind == "one token" else kind]
    given: dict[str, Any] = {"prompt_embeds": tiny.embeds(), "negative_prompt_embeds": tiny.embeds(seed=4)}
    if kind == "one token":
        given |= {"size": (16, 16), "frames": 1}
    if kind in ("i2v", "flf2v"):
        given |= {"image": image(1) if reads else None}
    if kind == "flf2v":
        given |= {"last_image": image(2) if reads else None}
    if kind == "vace":
        video = torch.stack([image(n).mT for n in range(9)], dim=1)
        given |= {"src_video": video, "src_mask": (video[:1] > 0).float(), "src_ref_images": [image(20)]}
    parts: dict[str, Any] = {"transformer": tiny.transformer(config), "vae": tiny.vae() if reads else None}
    parts["clip"] = tiny.clip() if reads and config.image_dim else None
    return WanPipeline(config=config, **parts, parallel=together)(**TINY | given).latents


def mini_latents(cache: str | None, together: Alone) -> Tensor:
    pipe = WanPipeline.from_pretrained(wan_mini(), device="cpu", parallel=together)
    return pipe(**MINI, steps=STEPS.get(cache or "", 8), cache=CACHES.get(cache or "", cache)).latents


def latents(cases: Sequence[tuple[str, str | None, Layout]]) -> list[Tensor]:
    """Return the latents of each case: what is made, with which cache, in which layout."""
    with torch.no_grad():
        return [
            mini_latents(cache, parallel(layout)) if kind == "mini" else tiny_latents(kind, parallel(layout))
            for kind, cache, layout in cases
        ]


def refusals(layout: Layout) -> list[str]:
    """What ranks say, each for itself, to guidance 1 and to a schedule that nobody has searched."""
    pipe = WanPipeline.from_pretrained(wan_mini(), device="cpu", parallel=parallel(layout))
    said = []
    for wrong in ({"guidance": 1.0}, {"cache": "auto:0.5"}, {"cache": "absent.json"}, {"image": "absent.png"}):
        try:
            pipe(**MINI | {"steps": 8} | wrong)
        except RequestError as error:
            said.append(str(error))
    try:
        Parallel(ParallelPlan(ulysses=3))
    except RequestError as error:
        said.append(str(error))
    return said


def schedules(folder: Path) -> Path:
    """Where the command keeps what it has searched."""
    return folder.parent / "cache"


def commands(folder: Path, runs: Sequence[Sequence[str]]) -> list[tuple[int, str, str]]:
    """Return code, stdout and stderr of each run of the command on this rank."""
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    os.environ["XDG_CACHE_HOME"] = str(schedules(folder))
    results = []
    for argv in runs:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main(list(argv))
            except SystemExit as ended:
                code = int(str(ended.code))
        results.append((code, out.getvalue(), err.getvalue()))
    return results


def loses(folder: Path, lost: int, argv: Sequence[str]) -> tuple[int, str, str]:
    """As `commands`, and one rank is killed in its second step."""
    steps = count(1)

    def guide(*arguments: Any) -> Any:
        if next(steps) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return denoise_guide(*arguments)

    denoise_guide = vars(denoise)["guide"]
    if dist.get_rank() == lost:
        vars(denoise)["guide"] = guide
    vars(dit_ulysses.lost)["_GRACE"] = 1.0  # seconds; of two ranks nobody else can be late
    (result,) = commands(folder, [argv])
    return result
