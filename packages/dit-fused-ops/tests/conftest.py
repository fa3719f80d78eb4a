"""Every test chooses for itself: nothing is read from, or left in, the user's tuning file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def own_decisions(tmp_path: Path) -> Iterator[Path]:
    """The dispatcher with a tuning file of the test's own, whose path is given."""
    from dit_fused_ops.dispatch import dispatcher

    file = tmp_path / "tuning.json"
    with dispatcher.configured(mode="static", deterministic=False, thorough=False, file=file):
        yield file
