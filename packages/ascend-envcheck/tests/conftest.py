"""Fixtures; the helpers beside this file are imported by name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fake_machine import FakeMachine


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    """A machine with a Python 3.11 and nothing else, in files under tmp_path."""
    return FakeMachine(tmp_path)
