"""Makes `house` importable for the cross-package tests, and for them only: a setting would reach every package."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

pytest_plugins = ["house.planting"]
