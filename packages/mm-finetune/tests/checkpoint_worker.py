"""Started by torchrun: runs that are resumed, in many layouts, one JSON line each.

A case is a dictionary: ``name``, ``overrides`` of the configuration, and where it goes on from a copy of another case's
folder ``after``, that one's name.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from checkpoint_runs import go_back
from layouts import answer

from mm_finetune.config import load_config
from mm_finetune.errors import FinetuneError
from mm_finetune.training import prepare, train_on


def run(case: dict[str, Any], world: Path, device: torch.device) -> dict[str, Any]:
    folder = world / case["name"]
    overrides = [f"output.dir={folder}", *case["overrides"]]
    if "after" in case:
        if dist.get_rank() == 0:
            shutil.copytree(world / case["after"], folder)
            go_back(folder, 2)
        overrides.append("output.resume=true")
    # All look at the folder.
    dist.barrier()
    try:
        train_on(device, prepare(load_config(world / "train.yaml", overrides), world_size=dist.get_world_size()))
    except FinetuneError as error:
        return {"name": case["name"], "error": f"{type(error).__name__}: {error}"}
    return {"name": case["name"], "error": ""}


if __name__ == "__main__":
    answer(run)
