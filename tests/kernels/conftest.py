"""Our CUDA kernels in Triton's interpreter, on CPU tensors. These tests never skip: they say what is missing."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def pytest_configure(config: pytest.Config) -> None:
    """Fail at once, with the remedy, where the kernels cannot be interpreted."""
    if importlib.util.find_spec("triton") is None:
        raise pytest.UsageError("triton is not installed: run `nox -s triton-contract`, or install it beside torch")
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError(
            "TRITON_INTERPRET=1 must be set before triton is imported: run `nox -s triton-contract`"
        )


@pytest.fixture(autouse=True)
def own_decisions(tmp_path: Path) -> Iterator[None]:
    """Nothing is read from, or left in, the user's tuning file."""
    from dit_fused_ops.dispatch import dispatcher

    with dispatcher.configured(mode="static", file=tmp_path / "tuning.json"):
        yield
