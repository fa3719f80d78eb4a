"""Loaders of two processes that talk to each other: what each of them says of every case."""

from __future__ import annotations

import hashlib
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from data_worlds import dataset
from layouts import answer
from torch import Tensor

from mm_finetune.config import DataConfig
from mm_finetune.data import Layout, Loader, LoaderSettings, Processes
from mm_finetune.errors import DataError
from mm_finetune.images import ImageReader

# Pixels are needed by: both processes of a tensor-parallel pair, the first of two stages, both of two data ranks.
CASES: dict[str, Any] = {
    "tensor": {"group": [0, 1], "needs": (True, True), "ranks": 1},
    "pipeline": {"group": None, "needs": (True, False), "ranks": 1},
    "data": {"group": None, "needs": (True, True), "ranks": 2},
}


class Watched(ImageReader):
    """Notes what it decodes; one picture can't be found."""

    def __init__(self, decoded: list[Path], mini: Path, *, lost: str) -> None:
        super().__init__(mini / "hf")
        self.decoded, self.lost = decoded, lost

    def read(self, path: Path) -> tuple[Tensor, Tensor]:
        self.decoded.append(path)
        return super().read(path.with_name("gone.png") if path.name == self.lost else path)


def digest(tensor: Tensor | None) -> str | None:
    return None if tensor is None else hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def run(name: str, folder: Path, mini: Path) -> dict[str, Any]:
    case, rank, cpu = CASES[name], dist.get_rank(), torch.device("cpu")
    group = dist.new_group(case["group"]) if case["group"] else None
    exchange = Processes(cpu, needs_pixels=case["needs"][rank], group=group)
    config = DataConfig(
        path=folder / "train.json", seq_length=512, on_bad="skip", max_bad_ratio=0.5, cache_dir=folder / f"cache{rank}"
    )
    records = dataset(config, mini)
    decoded: list[Path] = []
    # Only this process loses a picture, after all agreed on the index.
    records.encoder.images = Watched(decoded, mini, lost="5-0.png" if name == "data" and rank == 1 else "")
    records.adopt(exchange.once(lambda: records.index))
    layout = Layout(ranks=case["ranks"], micro_batch_size=2)
    settings = LoaderSettings(global_batch_size=4, last_step=3, layout=layout, rank=rank if case["ranks"] == 2 else 0)
    steps = []
    with closing(Loader(records, settings, exchange=exchange)) as loader:
        for step in range(1, 4):
            data = loader.step(step, cpu)
            steps.append(
                {
                    "bad": data.bad,
                    "numbers": [batch.numbers for batch in data.batches],
                    "pixels": [digest(batch.pixel_values) for batch in data.batches],
                    "loss": [batch.loss_mask.sum(1).tolist() for batch in data.batches],
                }
            )
    return {"case": name, "rank": rank, "role": exchange.pixels, "decoded": len(decoded), "steps": steps}


def refused(folder: Path, mini: Path) -> dict[str, Any]:
    """What rank 0 can't do is an error on every process."""
    exchange = Processes(torch.device("cpu"), needs_pixels=True)
    records = dataset(replace(DataConfig(path=folder / "train.json"), seq_length=20, cache_dir=folder / "c"), mini)
    try:
        exchange.once(lambda: records.check())
    except DataError as error:
        return {"case": "refused", "rank": dist.get_rank(), "error": str(error)}
    return {"case": "refused", "rank": dist.get_rank(), "error": ""}


def main(given: dict[str, Any], folder: Path, _: torch.device) -> list[dict[str, Any]]:
    mini = Path(given["mini"])
    mine = [*(run(name, folder, mini) for name in CASES), refused(folder, mini)]
    told: list[list[dict[str, Any]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(told, mine)
    return [result for results in told for result in results]


if __name__ == "__main__":
    answer(main)
