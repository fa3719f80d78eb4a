"""What transformers, the published formulas and plain AdamW make of pairs: the truth that layouts are compared with.

One process, float32; each pair runs by itself. Written from the papers (see ``PreferenceConfig``).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from parity_reference import FIRST_SPECIAL, IMAGE, OPTIMIZATION, VIDEO, VISION_END, VISION_START, hf_model
from torch import Tensor
from torch.nn.functional import pad

from mm_finetune.config import PreferenceConfig
from mm_finetune.data import EncodedSample
from mm_finetune.images import ImageInputs
from mm_finetune.template import IGNORE
from mm_finetune.videos import VideoInputs

PAIRS, A_STEP = 12, 4
# Grids (time, height, width) of each question's pictures and videos; most have none.
PICTURES: dict[int, dict[int, list[list[int]]]] = {
    1: {IMAGE: [[1, 4, 8], [1, 4, 4]]}, 2: {VIDEO: [[2, 4, 4]]}, 5: {IMAGE: [[1, 4, 4]], VIDEO: [[3, 4, 4]]},
    8: {IMAGE: [[1, 8, 4]]}, 10: {IMAGE: [[1, 4, 4]]},
}  # fmt: skip
LOSSES = {
    "dpo": PreferenceConfig(beta=0.5),
    "smooth": PreferenceConfig(beta=0.3, label_smoothing=0.2, sft_weight=0.7),
    "ipo": PreferenceConfig(loss="ipo", beta=0.4),
    "hinge": PreferenceConfig(loss="hinge", beta=0.25, sft_weight=0.1),
    "free": PreferenceConfig(beta=0.2, reference_free=True),
}
STEPS = {"dpo": 20, "smooth": 2, "ipo": 2, "hinge": 2, "free": 2}
Answer = tuple[Tensor, Tensor, Tensor]  # tokens, positions, which tokens are the answer's


def step_pairs(step: int) -> list[int]:
    return [(step * A_STEP + place * 5) % PAIRS for place in range(A_STEP)]


def offsets() -> Tensor:
    """What the first gradient's reference model thinks differently: without it every margin would be 0."""
    return torch.randn(PAIRS, 2, generator=torch.Generator().manual_seed(7), dtype=torch.float64) * 3


def question(number: int) -> tuple[list[int], dict[int, Tensor], dict[int, Tensor]]:
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(0, FIRST_SPECIAL, (5 + number % 4,), generator=generator).tolist()
    pixels, grids = {}, {}
    for token, shapes in PICTURES.get(number, {}).items():
        grids[token] = torch.tensor(shapes)
        pixels[token] = torch.randn(int(grids[token].prod(-1).sum()), 1176, generator=generator)
        for count in (grids[token].prod(-1) // 4).tolist():
            ids = [*ids[:3], VISION_START, *[token] * count, VISION_END, *ids[3:]]
    return ids, pixels, grids


def answers(number: int) -> list[Answer]:
    """The chosen and the rejected one, of different lengths, each behind the question."""
    ids, _, _ = question(number)
    made = []
    for which, length in enumerate((2 + number % 3, 1 + number % 5)):
        generator = torch.Generator().manual_seed(100 + 2 * number + which)
        tokens = torch.tensor([*ids, *torch.randint(0, FIRST_SPECIAL, (length,), generator=generator).tolist()])
        place = torch.arange(len(tokens))
        made.append((tokens, torch.stack([place, place // 2, place % 7]), place >= len(ids)))
    return made


def encoded(number: int) -> EncodedSample:
    """The pair as the data pipeline gives it."""
    _, pixels, grids = question(number)
    both = answers(number)
    images = ImageInputs(pixels[IMAGE], grids[IMAGE], ()) if IMAGE in pixels else None
    videos = VideoInputs(pixels[VIDEO], grids[VIDEO], ()) if VIDEO in pixels else None
    return EncodedSample(
        input_ids=torch.cat([tokens for tokens, _, _ in both]),
        labels=torch.cat([tokens.where(carries, IGNORE) for tokens, _, carries in both]),
        positions=torch.cat([positions for _, positions, _ in both], dim=1),
        images=images, videos=videos, number=number, lengths=tuple(len(tokens) for tokens, _, _ in both),
    )  # fmt: skip


def log_probabilities(model: Any, numbers: list[int]) -> tuple[Tensor, Tensor]:
    """``[pairs, 2]``: of each answer, and its number of tokens."""
    sums, counts = [], []
    for number in numbers:
        both = answers(number)
        longest = max(len(tokens) for tokens, _, _ in both)
        ids = torch.stack([pad(tokens, (0, longest - len(tokens))) for tokens, _, _ in both])
        places = torch.stack([pad(places, (0, longest - places.shape[1])) for _, places, _ in both], dim=1)
        logits = model(input_ids=ids, position_ids=places, **_files(number)).logits
        for row, (tokens, _, carries) in zip(logits, both, strict=True):
            each = row[: len(tokens) - 1].log_softmax(-1).gather(-1, tokens[1:, None])[:, 0]
            sums.append(each[carries[1:]].double().sum())
            counts.append(int(carries.sum()))
    return torch.stack(sums).view(-1, 2), torch.tensor(counts).view(-1, 2)


def _files(number: int) -> dict[str, Any]:
    """The question's pictures and videos, once for each answer."""
    _, pixels, grids = question(number)
    names = {"pixel_values": pixels, "pixel_values_videos": pixels, "image_grid_thw": grids, "video_grid_thw": grids}
    tokens = {name: VIDEO if "video" in name else IMAGE for name in names}
    return {name: torch.cat([held[tokens[name]]] * 2) for name, held in names.items() if tokens[name] in held}


def pair_loss(policy: Tensor, reference: Tensor, counts: Tensor, config: PreferenceConfig) -> Tensor:
    """The mean over pairs."""
    beta, smoothing = config.beta, config.label_smoothing
    ratios = policy - reference
    h = ratios[:, 0] - ratios[:, 1]
    if config.loss == "dpo":
        right = torch.sigmoid(beta * h)
        losses = -(1 - smoothing) * right.log() - smoothing * (1 - right).log()
    elif config.loss == "hinge":
        losses = (1 - beta * h).clamp(min=0)
    else:
        ratios = ratios / counts
        losses = (ratios[:, 0] - ratios[:, 1] - 0.5 / beta) ** 2
    return (losses + config.sft_weight * -policy[:, 0] / counts[:, 0]).mean()


def first_gradient(model: Any, reference: Tensor, config: PreferenceConfig) -> dict[str, Any]:
    numbers = step_pairs(0)
    policy, counts = log_probabilities(model, numbers)
    shifted = reference[numbers] + offsets()[numbers]
    model.zero_grad()
    loss = pair_loss(policy, torch.zeros_like(shifted) if config.reference_free else shifted, counts, config)
    loss.backward()  # type: ignore[no-untyped-call]
    return {"loss": float(loss.detach()), "gradients": {n: p.grad.clone() for n, p in model.named_parameters()}}


def curve(model: Any, reference: Tensor, config: PreferenceConfig, steps: int) -> dict[str, list[Any]]:
    """AdamW, decay on matrices only."""
    parameters = list(model.parameters())
    decayed, others = ([p for p in parameters if (p.dim() > 1) is wide] for wide in (True, False))
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": OPTIMIZATION.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=OPTIMIZATION.lr, betas=(OPTIMIZATION.adam_beta1, OPTIMIZATION.adam_beta2), eps=OPTIMIZATION.adam_eps,
    )  # fmt: skip
    rows: dict[str, list[Any]] = {"losses": [], "norms": [], "rewards": []}
    for step in range(steps):
        numbers = step_pairs(step)
        optimizer.zero_grad()
        policy, counts = log_probabilities(model, numbers)
        held = torch.zeros_like(policy) if config.reference_free else reference[numbers]
        loss = pair_loss(policy, held, counts, config)
        loss.backward()  # type: ignore[no-untyped-call]
        rows["norms"].append(float(torch.nn.utils.clip_grad_norm_(parameters, OPTIMIZATION.clip_grad)))
        rows["losses"].append(float(loss.detach()))
        rewards = config.beta * (policy.detach() - held)
        right = (rewards[:, 0] > rewards[:, 1]).double().mean()
        rows["rewards"].append([*rewards.mean(0).tolist(), float(right), *policy.detach().mean(0).tolist()])
        optimizer.step()
    return rows


def write_reference(folder: Path, variant: dict[str, Any]) -> None:
    """``hf/``, ``variant.json`` and ``truth.pt``."""
    model = hf_model(variant)
    model.save_pretrained(folder / "hf")
    (folder / "variant.json").write_text(json.dumps(variant))
    with torch.no_grad():
        reference = log_probabilities(model, list(range(PAIRS)))[0]
    truth: dict[str, Any] = {"reference": reference}
    for name, config in LOSSES.items():
        model = hf_model(variant)
        truth[name] = first_gradient(model, reference, config) | curve(model, reference, config, STEPS[name])
    torch.save(truth, folder / "truth.pt")
