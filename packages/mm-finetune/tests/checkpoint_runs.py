"""Folders of runs: cut back to an earlier checkpoint, and compared bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

# Everything in a line of metrics that is no time and no speed.
NUMBERS = ("step", "loss", "lr", "grad_norm", "tokens", "samples", "skipped")
TRACKER = "latest_checkpointed_iteration.txt"


def go_back(run: Path, step: int) -> None:
    """Leave a run as if it had been killed one step after that of a whole checkpoint."""
    for path in (run / "checkpoint").glob("iter_*"):
        if int(path.name.removeprefix("iter_")) > step:
            shutil.rmtree(path)
    (run / "checkpoint" / TRACKER).write_text(str(step))
    rows = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join(rows[: step + 1]))


def rows(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def numbers(run: Path) -> list[list[Any]]:
    """What the steps computed."""
    return [[row[key] for key in NUMBERS] for row in rows(run)]


def steps(run: Path) -> list[int]:
    """The checkpoints that are there."""
    return sorted(int(path.name.removeprefix("iter_")) for path in (run / "checkpoint").glob("iter_*"))


def tensors(run: Path, step: int) -> dict[str, Tensor]:
    """Every tensor of a checkpoint: optimizer, random states, weights for people, adapters."""
    folder = run / "checkpoint" / f"iter_{step:07d}"
    found = {
        f"{path.relative_to(folder)} {name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    for path in sorted(folder.glob("mp_rank_*/*.pt")):
        content = torch.load(path, weights_only=True)
        sections = {key: value for key, value in content.items() if isinstance(value, dict)}
        found |= {f"{path.parent.name} {s} {n}": t for s, held in sections.items() for n, t in held.items()}
    return found


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not the same bits, or not in both."""
    return sorted(one.keys() ^ other.keys()) + [
        name for name in one.keys() & other.keys() if not torch.equal(_bits(one[name]), _bits(other[name]))
    ]


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
