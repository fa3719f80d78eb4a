"""Safetensors files: byte for byte those of the safetensors library; headers that contradict themselves are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_torch_file import SHAPES, random_tensor, raw

from mm_convert import CheckpointError
from mm_convert.plans import Ref, Spec
from mm_convert.restricted_pickle import DTYPES
from mm_convert.safetensors_file import SafetensorsLayout, read_safetensors


def test_the_file_is_that_of_the_library(tmp_path: Path) -> None:
    specs = {Ref("", "", f'{d} {s} é"\\'): Spec(d, s) for d in reversed(DTYPES) for s in SHAPES}
    tensors = {ref: random_tensor(spec.dtype, spec.shape) for ref, spec in specs.items()}
    save_file({ref.name: tensor for ref, tensor in tensors.items()}, tmp_path / "theirs", metadata={"format": "pt"})
    layout = SafetensorsLayout.of(specs)
    made = bytearray(layout.size)
    for offset, data in [*layout.frame({}), *((layout.offsets[ref], raw(t)) for ref, t in tensors.items())]:
        made[offset : offset + len(data)] = data
    assert bytes(made) == (tmp_path / "theirs").read_bytes()


def test_what_the_library_writes_is_found_where_it_stands(tmp_path: Path) -> None:
    tensors = {f"{d} {s}": random_tensor(d, s) for d in DTYPES for s in SHAPES}
    save_file(tensors, tmp_path / "x")
    stored, data = read_safetensors(tmp_path / "x"), (tmp_path / "x").read_bytes()
    assert stored.specs.keys() == {("", name) for name in tensors}
    for (_, name), spec in stored.specs.items():
        assert (spec.shape, DTYPES[spec.dtype]) == (tuple(tensors[name].shape), str(tensors[name].dtype)[6:])
        assert data[stored.offsets["", name] :][: spec.nbytes] == raw(tensors[name])


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "a .*F32 .*8 bytes"),  # mis-shaped
        ({"a": {"dtype": "U8", "shape": [-1], "data_offsets": [0, 4]}}, "shape"),
        ({"a": {"dtype": "U8", "shape": "4", "data_offsets": [0, 4]}}, "shape"),
        ({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4.0]}}, "whole numbers"),
        ({"a": {"dtype": "U8", "shape": [3], "data_offsets": [1, 4]}}, "expected from 0 on"),  # a hole
        ({n: {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} for n in "ab"}, "expected from 4 on"),  # twice
        ({"a": {"dtype": "C64", "shape": [4], "data_offsets": [0, 4]}}, "C64"),
        ({"a": [1]}, "no valid safetensors header"),
    ],
)
def test_headers_that_cannot_be(entries: dict[str, object], words: str, tmp_path: Path) -> None:
    text = json.dumps(entries).encode()
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text + b"1234")
    with pytest.raises(CheckpointError, match=words):
        read_safetensors(tmp_path / "x")


def test_tensors_of_the_torch_dtypes_are_all_known() -> None:
    assert all(hasattr(torch, name) for name in DTYPES.values())
