"""Torch files: what is written is what torch reads; what torch writes is read, and nothing in it is executed."""

from __future__ import annotations

import argparse
import enum
import os
import pickle
import random
import sys
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mm_convert import CheckpointError
from mm_convert.plans import Ref, Spec
from mm_convert.restricted_pickle import DTYPES
from mm_convert.torch_file import read_torch_file
from mm_convert.torch_layout import TorchLayout

SHAPES = [(3, 5), (7,), (), (0, 4), (4, 0), (2, 1, 3), (1, 70, 1), (8, 3, 2, 2, 2)]


def random_tensor(dtype: str, shape: tuple[int, ...]) -> Tensor:
    """Any bytes, NaNs among them."""
    kind: torch.dtype = getattr(torch, DTYPES[dtype])
    if dtype == "BOOL":
        return torch.randint(0, 2, shape).bool()
    empty = torch.empty(shape, dtype=kind)
    return torch.randint(0, 256, (empty.nbytes,), dtype=torch.uint8).view(kind).reshape(shape)


def raw(tensor: Tensor) -> bytes:
    return bytes(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


def write(path: Path, tensors: dict[Ref, Tensor], specs: dict[Ref, Spec], sections: list[str]) -> TorchLayout:
    layout = TorchLayout.of(path.stem, sections, specs, {"checkpoint_version": 3.0})
    crcs = {ref: zlib.crc32(raw(tensor)) for ref, tensor in tensors.items()}
    with path.open("wb") as file:
        for offset, data in [*layout.frame(crcs), *((layout.offsets[r], raw(t)) for r, t in tensors.items())]:
            file.seek(offset)
            file.write(data)
    return layout


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, dict[Ref, Tensor], TorchLayout]:
    specs = {Ref("", "model1", f"{d} {s} é"): Spec(d, s) for d in DTYPES for s in SHAPES}
    tensors = {ref: random_tensor(spec.dtype, spec.shape) for ref, spec in specs.items()}
    return tmp_path / "x.pt", tensors, write(tmp_path / "x.pt", tensors, specs, ["model0", "model1", "model2"])


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_what_is_written(written: tuple[Path, dict[Ref, Tensor], TorchLayout], mmap: bool) -> None:
    path, tensors, layout = written
    assert path.stat().st_size == layout.size
    content = torch.load(path, weights_only=True, mmap=mmap)
    assert list(content) == ["model0", "model1", "model2", "checkpoint_version"]
    assert content["checkpoint_version"] == 3.0
    assert content["model0"] == content["model2"] == {}
    assert list(content["model1"]) == [ref.name for ref in tensors]
    for ref, tensor in tensors.items():
        held = content["model1"][ref.name]
        assert (held.dtype, held.shape, held.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
        assert raw(held) == raw(tensor)


def test_the_zip_is_sound_and_every_tensor_aligned(written: tuple[Path, dict[Ref, Tensor], TorchLayout]) -> None:
    path, _, layout = written
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
    assert {offset % 64 for offset in layout.offsets.values()} == {0}


def test_records_equal_those_of_torch_save(
    written: tuple[Path, dict[Ref, Tensor], TorchLayout], tmp_path: Path
) -> None:
    path, tensors, _ = written
    held = {ref.name: tensor for ref, tensor in tensors.items()}
    theirs = tmp_path / "theirs" / "x.pt"
    theirs.parent.mkdir()
    torch.save({"model0": {}, "model1": held, "model2": {}, "checkpoint_version": 3.0}, theirs)
    with zipfile.ZipFile(path) as a, zipfile.ZipFile(theirs) as b:
        names = [name for name in a.namelist() if not name.endswith("data.pkl")]
        assert {name: a.read(name) for name in names} == {name: b.read(name) for name in names}
        assert {n for n in b.namelist() if "/data/" in n} <= set(names)


class Backend(enum.Enum):
    """Stands for one of the trainer's own classes."""

    FLASH = 1


def test_what_torch_save_writes_is_found_where_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("megatron", "megatron.core", "megatron.core.enums"):  # whether or not there is a real one here
        trainer = ModuleType(name)
        monkeypatch.setitem(sys.modules, name, trainer)
    monkeypatch.setattr(Backend, "__module__", trainer.__name__)
    monkeypatch.setattr(trainer, "Backend", Backend, raising=False)
    whole = random_tensor("BF16", (6, 4))
    tensors = {f"{d} {s}": random_tensor(d, s) for d in DTYPES for s in SHAPES} | {"cut": whole[2:4], "whole": whole}
    options = argparse.Namespace(dtype=torch.bfloat16, name="run", sizes=torch.Size([1]), backend=Backend.FLASH)
    held = OrderedDict(
        tensors | {"parameter": torch.nn.Parameter(whole.clone()), "x._extra_state": whole, "none": None}
    )
    content = {
        "model": held,
        "args": options,
        "iteration": 7,
        "rng_state": [torch.get_rng_state(), np.random.get_state(), random.getstate()],
    }
    torch.save(content, tmp_path / "x.pt")
    stored, sections = read_torch_file(tmp_path / "x.pt")
    assert sections == ["model"]
    assert stored.specs.keys() == {("model", name) for name in [*tensors, "parameter"]}
    data = (tmp_path / "x.pt").read_bytes()
    for (_, name), spec in stored.specs.items():
        tensor = tensors.get(name, whole)
        assert (spec.shape, DTYPES[spec.dtype]) == (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        offset = stored.offsets["model", name]
        assert data[offset : offset + spec.nbytes] == raw(tensor)


def test_files_beyond_four_gibibytes(tmp_path: Path) -> None:
    """Holes instead of data: the records behind them need 64-bit offsets, the first one 64-bit sizes."""
    specs = {Ref("", "model", name): Spec("U8", (size,)) for name, size in (("huge", (4 << 30) + 5), ("small", 3))}
    layout = TorchLayout.of("x", ["model"], specs, {})
    huge, small = specs
    path = tmp_path / "x.pt"
    with path.open("wb") as file:
        for offset, data in [*layout.frame({huge: 0, small: zlib.crc32(b"abc")}), (layout.offsets[small], b"abc")]:
            file.seek(offset)
            file.write(data)
    assert layout.offsets[small] > 4 << 30
    content = torch.load(path, weights_only=True, mmap=True)["model"]
    assert bytes(content["small"].tolist()) == b"abc"
    assert content["huge"].shape == ((4 << 30) + 5,)
    with zipfile.ZipFile(path) as archive:
        assert archive.read("x/data/1") == b"abc"
    assert read_torch_file(path)[0].offsets == {(r.section, r.name): o for r, o in layout.offsets.items()}
    path.unlink()


class Calls:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    ("hostile", "named"),
    [
        (Calls(os.system, "touch must-not-appear"), "system"),
        (Calls(eval, "open('must-not-appear', 'w')"), "eval"),
        (Calls(getattr, "", "join"), "getattr"),
        (Calls(torch.load, "x"), "torch.serialization.load"),
        (Calls(Path, "x"), None),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_calls_is_refused(
    hostile: Calls, named: str | None, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"a": torch.ones(1)}, "args": hostile}, tmp_path / "x.pt", pickle_protocol=protocol)
    match = "wants .*" + (named or "pathlib") + ".*nothing was executed"
    with pytest.raises(CheckpointError, match=match):
        read_torch_file(tmp_path / "x.pt")
    assert not (tmp_path / "must-not-appear").exists()


def archive_of(
    path: Path,
    pickled: bytes,
    records: Mapping[str, bytes] = MappingProxyType({}),
    compression: int = zipfile.ZIP_STORED,
) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("x/data.pkl", pickled)
        for name, data in records.items():
            archive.writestr(f"x/{name}", data)


REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
MODEL = b"\x80\x02}X\5\0\0\0model}X\1\0\0\0w"
STORAGE = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0aX\3\0\0\0cpuK\1tQ"


@pytest.mark.parametrize(
    ("pickled", "words"),
    [
        (b"\x80\x02}.", "no entry 'model'"),
        (b"\x80\x02]", "damaged"),
        (b"(ios\nsystem\nX\4\0\0\0truei.", "wants os.system"),
        (b"\x80\x02cargparse\nNamespace\nK\1b.", "damaged"),  # a state for the class itself
        (REBUILD + b"}X\4\0\0\0nameX\1\0\0\0xsb.", "damaged|no entry"),
        (MODEL + REBUILD + b"(" + STORAGE + b"K\0(J\xff\xff\xff\xfft(K\1t\x89NtRss.", "shape"),
        (MODEL + REBUILD + b"(" + STORAGE + b"K\0(K\1t(K\1t\x89NtRss.", "no record"),
        (MODEL + b"(K\1K\2tQss.", "damaged"),
    ],
)  # fmt: skip
def test_damaged_pickles(pickled: bytes, words: str, tmp_path: Path) -> None:
    archive_of(tmp_path / "x.pt", pickled)
    with pytest.raises(CheckpointError, match=words):
        read_torch_file(tmp_path / "x.pt")


def test_a_pickle_cannot_change_how_the_next_one_is_read(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.ones(2, 3)}}, tmp_path / "good.pt")
    before = read_torch_file(tmp_path / "good.pt")[0].specs
    archive_of(tmp_path / "x.pt", b"\x80\x02" + REBUILD + b"}X\4\0\0\0nameX\x12\0\0\0_rebuild_parametersb.")
    with pytest.raises(CheckpointError):
        read_torch_file(tmp_path / "x.pt")
    assert read_torch_file(tmp_path / "good.pt")[0].specs == before


def old_format(path: Path) -> None:
    torch.save({"model": {"a": torch.ones(2)}}, path, _use_new_zipfile_serialization=False)


def compressed(path: Path) -> None:
    archive_of(path, pickle.dumps({"model": {}}), compression=zipfile.ZIP_DEFLATED)


def big_endian(path: Path) -> None:
    archive_of(path, pickle.dumps({"model": {}}), {"byteorder": b"big"})


def view(path: Path) -> None:
    torch.save({"model": {"a": torch.ones(2, 3).T}}, path)


def short_record(path: Path) -> None:
    archive_of(path, MODEL + REBUILD + b"(" + STORAGE + b"K\0(K\1t(K\1t\x89NtRss.",
               {"data/a": b"123"})  # fmt: skip


def truncated(path: Path) -> None:
    torch.save({"model": {"a": torch.ones(200)}}, path)
    path.write_bytes(path.read_bytes()[:700])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (old_format, "old format .*load it and save it again"),
        (compressed, "data.pkl is compressed"),
        (big_endian, "big endian"),
        (view, r"a is not contiguous .*save it with \.contiguous"),
        (short_record, "bytes of w are not all there"),
        (truncated, "can't be read"),
        (lambda path: path.write_bytes(b""), "can't be read"),
    ],
)
def test_files_that_cannot_be_read(make: Callable[[Path], object], words: str, tmp_path: Path) -> None:
    make(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=words):
        read_torch_file(tmp_path / "x.pt")
