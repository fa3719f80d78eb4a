"""What transformers and plain AdamW make of a small Qwen2.5-VL: the truth that every layout is compared with.

One process, micro-batches padded and run one after the other; in float64, so that what is compared is the rounding of
one side alone: transformers' own, in float32, moves the gradients of key biases by 6e-6 of the largest.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from mm_finetune.config import OptimizationConfig
from mm_finetune.data import Batch
from mm_finetune.families import family_of
from mm_finetune.mini.model import model_config
from mm_finetune.mini.tokenizer import SPECIAL_TOKENS, VOCAB_SIZE

FIRST_SPECIAL = VOCAB_SIZE - len(SPECIAL_TOKENS)
IDS = {token: FIRST_SPECIAL + number for number, token in enumerate(SPECIAL_TOKENS)}
IMAGE, VIDEO, VISION_START, VISION_END = (
    IDS[f"<|{name}|>"] for name in ("image_pad", "video_pad", "vision_start", "vision_end")
)
# The global batch of a step: which samples make a micro-batch. The first has no pictures at all.
MICRO_BATCHES = ((0, 1), (2, 3), (4,), (5, 6, 7))
GLOBAL_BATCH = 8
# Grids (time, height, width) of each sample's images and videos.
PICTURES: tuple[dict[int, list[list[int]]], ...] = (
    {}, {}, {IMAGE: [[1, 4, 8], [1, 4, 4]]}, {VIDEO: [[2, 4, 4]]}, {IMAGE: [[1, 4, 4]], VIDEO: [[3, 4, 4]]},
    {IMAGE: [[1, 8, 4]]}, {}, {IMAGE: [[1, 4, 4], [1, 4, 8]]},
)  # fmt: skip
# Decay and rate are large, so that a wrong parameter group or a wrong norm shows in the curve.
OPTIMIZATION = OptimizationConfig(
    steps=1, global_batch_size=GLOBAL_BATCH, micro_batch_size=2, lr=1e-3, weight_decay=1.0, clip_grad=1.0
)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Shapes: ``[tokens]``, positions ``[3, tokens]``; pictures by the token that stands for them."""

    input_ids: Tensor
    labels: Tensor
    loss_mask: Tensor
    positions: Tensor
    pixels: dict[int, Tensor]
    grids: dict[int, Tensor]


class Vocabulary:
    """All that the configuration of qwen2_5_vl-mini asks of its tokenizer."""

    def get_vocab(self) -> dict[str, int]:
        return IDS


def hf_config(variant: dict[str, Any]) -> Any:
    """qwen2_5_vl-mini, tied or not; ``wide``: more heads, so that four ranks can share them."""
    config = model_config(Vocabulary(), family=variant.get("family", "qwen2_5_vl"))
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = variant["tied"]
    if variant["wide"]:
        config.text_config.num_attention_heads, config.text_config.num_key_value_heads = 8, 4
        config.text_config.rope_parameters["mrope_section"] = [2, 3, 3]
    return config


def hf_model(variant: dict[str, Any], *, seed: int = 0) -> Any:
    config = hf_config(variant)
    family = family_of(config.model_type)

    torch.manual_seed(seed)
    model = getattr(transformers, family.model)(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms of 1 and biases of 0 would hide a mistake
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def sample(step: int, number: int) -> Sample:
    """Another length for each sample, loss on a random part, positions that differ by axis."""
    generator = torch.Generator().manual_seed(step * GLOBAL_BATCH + number)
    # No special tokens: transformers gives the padding token no gradient, and text does not contain it.
    ids = torch.randint(0, FIRST_SPECIAL, (9 + number % 5 + step % 3,), generator=generator).tolist()
    pixels, grids = {}, {}
    for token, shapes in PICTURES[number].items():
        grids[token] = torch.tensor(shapes)
        pixels[token] = torch.randn(int(grids[token].prod(-1).sum()), 1176, generator=generator)
        for count in (grids[token].prod(-1) // 4).tolist():
            ids = [*ids[:3], VISION_START, *[token] * count, VISION_END, *ids[3:]]
    labels = torch.tensor([*ids[1:], 0])
    carries = (torch.rand(len(ids), generator=generator) < 0.6) & (labels < FIRST_SPECIAL)
    carries[-1] = False
    place = torch.arange(len(ids))
    return Sample(
        input_ids=torch.tensor(ids), labels=labels * carries, loss_mask=carries.float(),
        positions=torch.stack([place, place // 2, place % 7]), pixels=pixels, grids=grids,
    )  # fmt: skip


def _pictures(samples: list[Sample]) -> dict[str, Any]:
    def joined(kind: str, token: int) -> Tensor | None:
        parts = [getattr(s, kind)[token] for s in samples if token in getattr(s, kind)]
        return torch.cat(parts) if parts else None

    return {
        "pixel_values": joined("pixels", IMAGE), "image_grid_thw": joined("grids", IMAGE),
        "pixel_values_videos": joined("pixels", VIDEO), "video_grid_thw": joined("grids", VIDEO),
        "tokens": sum(len(s.input_ids) for s in samples),
    }  # fmt: skip


def padded_batch(samples: list[Sample]) -> Batch:
    """One row for each sample, zeros on the right."""
    longest = max(len(s.input_ids) for s in samples)

    def stacked(name: str) -> Tensor:
        rows = [getattr(s, name) for s in samples]
        return torch.stack([torch.nn.functional.pad(row, (0, longest - row.shape[-1])) for row in rows], dim=-2)

    return Batch(
        input_ids=stacked("input_ids"), labels=stacked("labels"), loss_mask=stacked("loss_mask"),
        position_ids=stacked("positions"), cu_seqlens=None, **_pictures(samples),
    )  # fmt: skip


def packed_batch(samples: list[Sample]) -> Batch:
    """All samples one behind the other in one row."""

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(s, name) for s in samples], dim=-1).unsqueeze(-2)

    ends = torch.tensor([0, *[len(s.input_ids) for s in samples]]).cumsum(0)
    return Batch(
        input_ids=joined("input_ids"), labels=joined("labels"), loss_mask=joined("loss_mask"),
        position_ids=joined("positions"), cu_seqlens=ends.int(), **_pictures(samples),
    )  # fmt: skip


def micro_batches(step: int, *, packed: bool = False) -> list[Batch]:
    """The global batch of a step, the same samples for every layout."""
    make = packed_batch if packed else padded_batch
    return [make([sample(step, number) for number in numbers]) for numbers in MICRO_BATCHES]


def logits(model: Any, batch: Batch) -> Tensor:
    images, videos = (
        None if pixels is None else pixels.to(model.dtype)
        for pixels in (batch.pixel_values, batch.pixel_values_videos)
    )  # fmt: skip
    result: Tensor = model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, pixel_values=images,
        image_grid_thw=batch.image_grid_thw, pixel_values_videos=videos, video_grid_thw=batch.video_grid_thw,
    ).logits  # fmt: skip
    return result


def loss(model: Any, step: int, kind: str = "token") -> Tensor:
    """``token``: the mean over all tokens that carry loss; ``sample``: the mean over samples of each one's mean."""
    total, count = torch.zeros(()), 0.0
    for batch in micro_batches(step):
        losses = torch.nn.functional.cross_entropy(
            logits(model, batch).double().flatten(0, 1), batch.labels.flatten(), reduction="none"
        ).view_as(batch.labels)
        sums, counts = (losses * batch.loss_mask).sum(-1), batch.loss_mask.sum(-1)
        total = total + (sums.sum() if kind == "token" else (sums / counts).sum())
        count += float(counts.sum()) if kind == "token" else len(counts)
    return total / count


def gradients(model: Any, kind: str) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    value = loss(model, 0, kind)
    value.backward()  # type: ignore[no-untyped-call]
    return float(value.detach()), {name: p.grad.double() for name, p in model.named_parameters()}


def curve(model: Any, kept: tuple[int, ...]) -> dict[str, Any]:
    """AdamW, decay on matrices only, one global batch a step; the weights after `kept` steps."""
    parameters = list(model.parameters())
    decayed, others = ([p for p in parameters if (p.dim() > 1) is wide] for wide in (True, False))
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": OPTIMIZATION.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=OPTIMIZATION.lr, betas=(OPTIMIZATION.adam_beta1, OPTIMIZATION.adam_beta2), eps=OPTIMIZATION.adam_eps,
    )  # fmt: skip
    losses, norms, trained = [], [], {}
    for step in range(max(kept)):
        optimizer.zero_grad()
        value = loss(model, step)
        value.backward()  # type: ignore[no-untyped-call]
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, OPTIMIZATION.clip_grad)))
        losses.append(float(value.detach()))
        optimizer.step()
        if step + 1 in kept:
            trained[step + 1] = {name: p.detach().clone() for name, p in model.named_parameters()}
    return {"losses": losses, "norms": norms, "trained": trained}


def write_reference(folder: Path, variant: dict[str, Any], *, kept: tuple[int, ...]) -> None:
    """``hf/``, ``variant.json`` and ``truth.pt``."""
    model = hf_model(variant)
    model.save_pretrained(folder / "hf")
    model.double()
    (folder / "variant.json").write_text(json.dumps(variant))
    truth: dict[str, Any] = {"logits": logits(model, micro_batches(0)[1]).detach()}
    truth["token"], truth["sample"] = gradients(model, "token"), gradients(model, "sample")
    truth["bf16"] = gradients(hf_model(variant).bfloat16(), "token")
    torch.save(truth | curve(model, kept), folder / "truth.pt")
