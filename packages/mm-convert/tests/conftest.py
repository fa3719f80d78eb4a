"""Fixtures; the helpers beside this file are imported by name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from tiny_checkpoint import MakeModel, new_names, save_model, tensors


@pytest.fixture
def make_model(tmp_path: Path) -> MakeModel:
    """Writes a model folder under tmp_path and returns it."""

    def make(name: str = "hf", *, tied: bool = False, new: bool = False, shards: int = 2, **changes: Tensor) -> Path:
        made = tensors(tied=tied) | changes
        return save_model(tmp_path / name, new_names(made) if new else made, tied=tied, nested=new, shards=shards)

    return make
