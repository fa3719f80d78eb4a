"""The mini model and data set, made once for all tests that look at it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from mm_finetune.mini import make

# Helpers of the tests are modules beside them.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only: ``hf/``, ``data/``, ``train.yaml``."""
    return make(tmp_path_factory.mktemp("mini") / "mini", digits=40, heldout_digits=20)


@pytest.fixture(scope="session")
def tokenizer(mini: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(mini / "hf")
