from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from wan_infer.commands import generate
from wan_infer.tasks import TASKS

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return work


@pytest.fixture
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offers 64*64 for all tasks, so that tiny checkpoints are done in a moment."""
    offered = {name: replace(task, sizes=((64, 64),), size=(64, 64)) for name, task in TASKS.items()}
    monkeypatch.setattr(generate, "TASKS", offered)
