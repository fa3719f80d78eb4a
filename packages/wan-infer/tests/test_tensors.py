"""Reading and writing tensor files: alignment, dtypes, lazy names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from wan_infer.checkpoints.tensor_writer import write_pth, write_safetensors
from wan_infer.checkpoints.tensors import Tensors, fingerprint, open_file, open_safetensors
from wan_infer.errors import CheckpointError

ODD = {
    "a": torch.arange(3, dtype=torch.int8),
    "b": torch.randn(5),
    "c": torch.randn(()).double(),
    "d": torch.randn(3, 0, 2),
    "e": torch.randn(7, 3).bfloat16(),
    "f": torch.tensor([True, False]),
}


def in_memory(tensors: dict[str, Tensor]) -> Tensors:
    return Tensors(place=Path(), meta={n: t.to("meta") for n, t in tensors.items()}, read=tensors.__getitem__)


def test_safetensors_reads_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    seen: list[int] = []
    write_safetensors(path, in_memory(ODD), ODD, seen.append)
    found = load_file(path)
    assert found.keys() == ODD.keys()
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in ODD.items())
    assert sum(seen) == sum(tensor.nbytes for tensor in ODD.values())


def test_every_value_is_aligned(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, in_memory(ODD), ODD, lambda done: None)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    for name, entry in header.items():
        assert (8 + length + entry["data_offsets"][0]) % ODD[name].element_size() == 0, name


def test_a_view_does_not_take_its_storage_along(tmp_path: Path) -> None:
    whole = torch.randn(1000, 1000)
    write_pth(tmp_path / "x.pth", in_memory({"view": whole[3], "column": whole[:, 5]}), lambda done: None)
    assert (tmp_path / "x.pth").stat().st_size < 20_000
    found = open_file(tmp_path / "x.pth")
    assert torch.equal(found.read("view"), whole[3])
    assert torch.equal(found.read("column"), whole[:, 5])


def test_unknown_dtypes_and_tensors_stored_twice(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="a has the dtype F8_E4M3"):
        open_safetensors(tmp_path, "x")
    for number in (1, 2):
        save_file({"a": torch.ones(2)}, tmp_path / f"y-0000{number}-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"a is stored twice, the second time in y-00002-of-00002\.safetensors"):
        open_safetensors(tmp_path, "y")
    with pytest.raises(CheckpointError, match=r"none\.pth is missing"):
        open_file(tmp_path / "none.pth")


def test_fingerprint_covers_names_shapes_dtypes_and_both_ends() -> None:
    tensor = torch.arange(5000.0)
    digest = fingerprint(in_memory({"a": tensor}))
    assert digest == fingerprint(in_memory({"a": tensor.clone()}))
    first, last, middle = (tensor.clone().index_fill_(0, torch.tensor(at), -1.0) for at in (0, 4999, 2500))
    for other in ({"b": tensor}, {"a": tensor.view(50, 100)}, {"a": tensor.double()}, {"a": first}, {"a": last}):
        assert fingerprint(in_memory(other)) != digest
    assert fingerprint(in_memory({"a": middle})) == digest  # as documented
