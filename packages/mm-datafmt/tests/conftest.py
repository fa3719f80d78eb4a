"""A tiny world: a folder of real images, and functions that write data sets beside it."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

WriteFile = Callable[..., Path]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "images"
    (folder / "sub").mkdir(parents=True)
    Image.new("RGB", (8, 6), "red").save(folder / "a.png")
    Image.new("L", (5, 5)).save(folder / "b.jpg")
    Image.new("RGB", (3, 3)).save(folder / "sub" / "ç 图.png")
    return folder


@pytest.fixture
def write_array(tmp_path: Path) -> WriteFile:
    def write(records: Sequence[Any], name: str = "source.json") -> Path:
        path = tmp_path / name
        path.write_text(json.dumps(records), encoding="utf-8")
        return path

    return write


@pytest.fixture
def write_lines(tmp_path: Path) -> WriteFile:
    def write(records: Sequence[Any], name: str = "source.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return path

    return write
