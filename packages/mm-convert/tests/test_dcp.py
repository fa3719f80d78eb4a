"""FSDP2 checkpoints: torch itself loads what is written, and what torch itself saves is read; nothing is lost."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import MakeModel, new_names, tensors
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_state_dict
from torch.distributed.checkpoint.state_dict_saver import save as save_state_dict

from mm_convert.commands.distributed import COMMANDS, HfToDcp, hf_to_dcp
from mm_convert.commands.options import HfConfig, ParallelConfig
from mm_convert.commands.spelling import with_cfg
from mm_convert.convert import Converter
from mm_convert.distributed.dcp import prepare_dcp_to_hf, prepare_hf_to_dcp
from mm_convert.distributed.folder import DistributedFolder
from mm_convert.distributed.torch_dist import prepare_hf_to_torch_dist
from mm_convert.errors import CheckpointError, OutputExistsError
from mm_convert.families import family
from mm_convert.layout import Layout

QWEN = family("Qwen2_5_VLConverter")


def held(directory: Path) -> dict[str, Tensor]:
    return {name: t for path in sorted(directory.glob("*.safetensors")) for name, t in load_file(path).items()}


def load(state: dict[str, Any], directory: Path) -> None:
    """torch's own reader; it warns that no process group is there, which is meant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_state_dict(state, checkpoint_id=directory)


def save(state: dict[str, Any], directory: Path) -> None:
    """torch's own writer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_state_dict(state, checkpoint_id=directory)


def loaded(directory: Path, like: dict[str, Any]) -> dict[str, Any]:
    """What torch.distributed.checkpoint itself reads."""
    state = {"model": {name: torch.zeros_like(t) for name, t in like.items()}, "checkpoint_version": 0.0}
    load(state, directory)
    return state


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def saved_by_torch(directory: Path, model: dict[str, Tensor], **others: Any) -> Path:
    state = {"model": model, "checkpoint_version": 3.0, **others}
    save(state, directory / "iter_0000010")
    (directory / "latest_checkpointed_iteration.txt").write_text("10")
    return directory


def test_the_folder_is_laid_out_as_published(make_model: MakeModel, tmp_path: Path) -> None:
    prepare_hf_to_dcp(make_model(shards=2), tmp_path / "dcp", dcp_prefix="model.", family=QWEN).run()
    assert (tmp_path / "dcp/latest_checkpointed_iteration.txt").read_bytes() == b"release"
    assert {path.name for path in (tmp_path / "dcp/release").iterdir()} == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    folder = DistributedFolder.open(tmp_path / "dcp")
    assert folder.tensors.keys() == {f"model.model.{name}" for name in tensors()}
    assert folder.objects == ["checkpoint_version"]


def test_torch_loads_every_tensor_and_the_version(make_model: MakeModel, tmp_path: Path) -> None:
    prepare_hf_to_dcp(make_model(), tmp_path / "dcp").run()
    state = loaded(tmp_path / "dcp/release", tensors())
    assert equal(state["model"], tensors())
    assert state["checkpoint_version"] == 3.0


def test_every_dtype_and_numbers_without_a_dimension(tmp_path: Path) -> None:
    made = {
        str(dtype): torch.arange(6).reshape(2, 3).to(dtype)
        for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool,
                      torch.float8_e4m3fn)
    }  # fmt: skip
    made["number"] = torch.tensor(2.5)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text('{"model_type": "any"}')
    save_file(made, tmp_path / "hf/model.safetensors")
    prepare_hf_to_dcp(tmp_path / "hf", tmp_path / "dcp").run()
    state = loaded(tmp_path / "dcp/release", made)["model"]
    assert all(torch.equal(state[name].view(torch.uint8) if t.dim() else state[name],
                           t.view(torch.uint8) if t.dim() else t) for name, t in made.items())  # fmt: skip
    prepare_dcp_to_hf(tmp_path / "dcp", tmp_path / "hf", tmp_path / "back").run()
    assert {name: (t.dtype, t.shape) for name, t in held(tmp_path / "back").items()} == {
        name: (t.dtype, t.shape) for name, t in made.items()
    }


@pytest.mark.parametrize("prefix", ["", "model.", "base."])
@pytest.mark.parametrize("in_memory", [False, True])
def test_there_and_back_is_the_same_folder(make_model: MakeModel, tmp_path: Path, prefix: str, in_memory: bool) -> None:
    hf = make_model(shards=2)
    prepare_hf_to_dcp(hf, tmp_path / "dcp", dcp_prefix=prefix, in_memory_names=in_memory, family=QWEN).run()
    given = prefix if prefix == "base." else None
    prepare_dcp_to_hf(tmp_path / "dcp", hf, tmp_path / "back", dcp_prefix=given, family=QWEN).run()
    for shard in sorted(hf.glob("*.safetensors")):
        assert (tmp_path / "back" / shard.name).read_bytes() == shard.read_bytes()
    assert (tmp_path / "back/tokenizer.json").is_file()


def test_in_memory_names_are_those_of_transformers(make_model: MakeModel, tmp_path: Path) -> None:
    prepare_hf_to_dcp(make_model(), tmp_path / "dcp", in_memory_names=True, family=QWEN).run()
    assert DistributedFolder.open(tmp_path / "dcp").tensors.keys() == {f"model.{name}" for name in new_names(tensors())}


def test_a_tied_output_layer_is_written_and_must_stay_equal(make_model: MakeModel, tmp_path: Path) -> None:
    hf = make_model(tied=True)
    prepare_hf_to_dcp(hf, tmp_path / "dcp", family=QWEN).run()
    embedding = tensors(tied=True)["model.embed_tokens.weight"]
    like = tensors(tied=True) | {"lm_head.weight": embedding}
    assert equal(loaded(tmp_path / "dcp/release", like)["model"], like)
    prepare_dcp_to_hf(tmp_path / "dcp", hf, tmp_path / "back", family=QWEN).run()
    assert equal(held(tmp_path / "back"), tensors(tied=True))
    parted = saved_by_torch(tmp_path / "parted", like | {"lm_head.weight": embedding + 1})
    with pytest.raises(CheckpointError, match="must equal"):
        prepare_dcp_to_hf(parted, hf, tmp_path / "no", family=QWEN).run()


def test_what_torch_saved_is_read_with_the_trainers_state_beside_it(make_model: MakeModel, tmp_path: Path) -> None:
    trained = {name: t + 1 for name, t in tensors().items()}
    saved = saved_by_torch(tmp_path / "saved", trained, optimizer={"exp_avg": torch.ones(3)}, iteration=10)
    prepare_dcp_to_hf(saved, make_model(), tmp_path / "back", family=QWEN).run()
    assert equal(held(tmp_path / "back"), trained)
    prepare_dcp_to_hf(saved / "iter_0000010", make_model("again"), tmp_path / "back2", family=QWEN).run()


def test_tensors_in_pieces_are_put_together(tmp_path: Path) -> None:
    """As FSDP2 saves them: each rank's rows apart, uneven; here through torch's own description of shards."""
    whole = {"a.weight": torch.arange(35.0).reshape(7, 5), "b.weight": torch.arange(8.0).reshape(2, 4)}
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text('{"model_type": "any"}')
    save_file(whole, tmp_path / "hf/model.safetensors")
    pieces = {"model.a.weight": [(slice(0, 4), slice(None)), (slice(4, 7), slice(None))],
              "model.b.weight": [(slice(None), slice(0, 1)), (slice(None), slice(1, 4))]}  # fmt: skip
    save_pieces(tmp_path / "dcp", {f"model.{name}": t for name, t in whole.items()}, pieces)
    prepare_dcp_to_hf(tmp_path / "dcp", tmp_path / "hf", tmp_path / "back").run()
    assert equal(held(tmp_path / "back"), whole)
    pieces["model.a.weight"] = [
        (slice(r, r2), slice(c, c2)) for r, r2 in ((0, 4), (4, 7)) for c, c2 in ((0, 2), (2, 5))
    ]
    save_pieces(tmp_path / "grid", {f"model.{name}": t for name, t in whole.items()}, pieces)
    with pytest.raises(CheckpointError, match="several dimensions at once"):
        prepare_dcp_to_hf(tmp_path / "grid", tmp_path / "hf", tmp_path / "no")


def save_pieces(directory: Path, whole: dict[str, Tensor], pieces: Mapping[str, Sequence[tuple[slice, ...]]]) -> None:
    """A checkpoint in torch's format, written record by record with torch.save and torch's classes."""
    directory.mkdir()
    described: dict[str, Any] = {}
    storage = {}
    for rank in range(max(map(len, pieces.values()))):
        with (directory / f"__{rank}_0.distcp").open("wb") as file:
            for key, tensor in whole.items():
                if rank >= len(pieces[key]):
                    continue
                part = tensor[pieces[key][rank]].clone()
                offsets = torch.Size([s.start or 0 for s in pieces[key][rank]])
                start = file.tell()
                torch.save(part, file)
                storage[MetadataIndex(key, offsets)] = _StorageInfo(f"__{rank}_0.distcp", start, file.tell() - start)
                empty = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), tensor.shape, [])
                described.setdefault(key, empty).chunks.append(ChunkStorageMetadata(offsets, part.shape))
    (directory / ".metadata").write_bytes(pickle.dumps(Metadata(described, storage_data=storage)))


def test_stacked_experts_are_one_matrix(tmp_path: Path) -> None:
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    experts = torch.arange(24.0).reshape(2, 3, 4)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text('{"model_type": "any"}')
    save_file({name: experts}, tmp_path / "hf/model.safetensors")
    prepare_hf_to_dcp(tmp_path / "hf", tmp_path / "dcp", dcp_prefix="model.").run()
    state = loaded(tmp_path / "dcp/release", {f"model.{name}": torch.zeros(6, 4)})["model"]
    assert torch.equal(state[f"model.{name}"], experts.view(6, 4))
    prepare_dcp_to_hf(tmp_path / "dcp", tmp_path / "hf", tmp_path / "back").run()
    assert torch.equal(held(tmp_path / "back")[name], experts)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda model: model.pop("lm_head.weight"), "missing 1: lm_head.weight"),
        (lambda model: model.update(extra=torch.ones(2)), "unknown 1: model.extra"),
        (lambda model: model.update({"lm_head.weight": torch.ones(3, 3)}), r"lm_head.weight has shape \[3, 3\]"),
    ],
)
def test_missing_unknown_and_misshaped_tensors_are_named(
    make_model: MakeModel, tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], words: str
) -> None:
    model = tensors()
    change(model)
    saved = saved_by_torch(tmp_path / "saved", model)
    with pytest.raises(CheckpointError, match=words):
        prepare_dcp_to_hf(saved, make_model(), tmp_path / "back", family=QWEN)


def test_a_folder_without_a_tensor_of_its_configuration_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    hf = make_model(shards=1)
    made = load_file(hf / "model.safetensors")
    del made["model.norm.weight"]
    save_file(made, hf / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        prepare_hf_to_dcp(hf, tmp_path / "dcp", family=QWEN)
    with pytest.raises(CheckpointError, match="tied to nowhere"):
        prepare_hf_to_dcp(hf, tmp_path / "dcp", tied={"lm_head.weight": "nowhere"})


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("content", [b"", b"\x80\x04.", pickle.dumps([1, 2]), b"garbage"])
def test_a_damaged_description_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"can't be read"):
        DistributedFolder.open(tmp_path)


def test_a_description_that_runs_code_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": Evil()}))
    with pytest.raises(CheckpointError, match=r"wants posix\.mkdir"):
        DistributedFolder.open(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_files_outside_of_the_folder_missing_and_truncated_ones_are_refused(
    make_model: MakeModel, tmp_path: Path
) -> None:
    hf = make_model()
    prepare_hf_to_dcp(hf, tmp_path / "dcp").run()
    release = tmp_path / "dcp/release"
    described = (release / ".metadata").read_bytes()
    (release / ".metadata").write_bytes(described.replace(b"__0_0.distcp", b"../../../etc"))
    with pytest.raises(CheckpointError, match="no file of the folder"):
        DistributedFolder.open(release)
    (release / ".metadata").write_bytes(described)
    whole = (release / "__0_0.distcp").read_bytes()
    for cut in (1, 50, 2000, len(whole)):  # the last record is no tensor, and not read
        (release / "__0_0.distcp").write_bytes(whole[:-cut])
        with pytest.raises(CheckpointError, match=r"__0_0\.distcp has [\d,]+ bytes, \.metadata names .*truncated"):
            prepare_dcp_to_hf(release, hf, tmp_path / "back")
    (release / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"incomplete.*__0_0\.distcp"):
        DistributedFolder.open(release)


def test_nothing_is_overwritten_and_the_same_run_gives_the_same_bytes(make_model: MakeModel, tmp_path: Path) -> None:
    hf = make_model()
    for name in ("one", "two"):
        prepare_hf_to_dcp(hf, tmp_path / name).run()
    for path in sorted((tmp_path / "one").rglob("*")):
        if path.is_file():
            assert (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes() == path.read_bytes()
    with pytest.raises(OutputExistsError, match="--overwrite"):
        prepare_hf_to_dcp(hf, tmp_path / "one").run()
    prepare_hf_to_dcp(hf, tmp_path / "one").run(overwrite=True)
    assert json.loads((tmp_path / "one/manifest.json").read_text())["options"]["command"] == "hf_to_dcp"


def test_published_spellings() -> None:
    typed = ["--hf_dir", "A", "--dcp_dir=B", "--num_workers", "0", "--overwrite"]
    spelled = ["--cfg.hf_dir", "A", "--cfg.dcp_dir=B", "--workers", "1", "--overwrite"]
    assert with_cfg("GenericDCPConverter", "hf_to_dcp", typed) == spelled
    assert with_cfg("Qwen3VLConverter", "hf_to_dcp", typed) == ["--cfg.dcp_prefix=model.", *spelled]
    typed = ["--load_dir", "A", "--save_dir", "B", "--model_assets_dir", "C", "--num_workers=4"]
    spelled = ["--cfg.dcp_dir", "A", "--cfg.save_hf_dir", "B", "--cfg.hf_dir", "C", "--workers=4"]
    assert with_cfg("GenericDCPConverter", "dcp_to_hf", typed) == spelled
    assert with_cfg("Qwen2_5_VLConverter", "hf_to_mm", ["--cfg.mm_dir", "A"]) == ["--cfg.mm_dir", "A"]


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_plans_from_its_options(make_model: MakeModel, tmp_path: Path, command: str) -> None:
    hf, mm, dist, new = make_model(), tmp_path / "mm", tmp_path / "dist", tmp_path / "new"
    converter = Converter.named("Qwen2_5_VLConverter")
    layout: dict[str, Any] = {"llm_pp_layers": [[5]], "vit_pp_layers": [[3]]}
    converter.hf_to_mm(hf, mm, Layout(**layout))
    prepare_hf_to_dcp(hf, tmp_path / "dcp").run()
    prepare_hf_to_torch_dist(converter, hf, dist).run()
    side = HfConfig(hf_dir=str(hf))
    given: dict[str, dict[str, Any]] = {
        "hf_to_dcp": {"hf_dir": hf, "dcp_dir": new, "tie_weight_mapping": "{}"},
        "dcp_to_hf": {"hf_dir": hf, "dcp_dir": tmp_path / "dcp", "save_hf_dir": new},
        "hf_to_torch_dist": {"hf_config": side, "dist_dir": new},
        "torch_dist_to_hf": {"hf_config": side, "dist_dir": dist, "save_hf_dir": new},
        "mm_to_torch_dist": {"mm_dir": mm, "dist_dir": new},
        "torch_dist_to_mm": {"hf_config": side, "dist_dir": dist, "mm_dir": new,
                             "parallel_config": ParallelConfig(**layout)},
    }  # fmt: skip
    options, plan = COMMANDS[command]
    conversion = plan(converter, options(**given[command]), None)
    assert conversion.target.directory == new
    assert conversion.target.options["command"] == command
    conversion.run()
    with pytest.raises(OutputExistsError):
        conversion.run()


@pytest.mark.parametrize("mapping", ["{", "[1]", '{"a": 1}'])
def test_a_tie_that_is_no_mapping_is_refused(tmp_path: Path, mapping: str) -> None:
    given = HfToDcp(hf_dir=str(tmp_path), dcp_dir="B", tie_weight_mapping=mapping)
    with pytest.raises(CheckpointError, match="tie_weight_mapping"):
        hf_to_dcp(None, given, None)


def test_the_description_is_what_torchs_own_classes_say(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text('{"model_type": "any"}')
    save_file({"a.weight": torch.ones(2, 3, dtype=torch.bfloat16)}, tmp_path / "hf/model.safetensors")
    prepare_hf_to_dcp(tmp_path / "hf", tmp_path / "dcp").run()
    found = FileSystemReader(tmp_path / "dcp/release").read_metadata()
    chunk = ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2, 3]))
    tensor = TensorStorageMetadata(TensorProperties(dtype=torch.bfloat16), torch.Size([2, 3]), [chunk])
    assert found.state_dict_metadata == {"model.a.weight": tensor, "checkpoint_version": BytesStorageMetadata()}
    assert found.planner_data == {
        "model.a.weight": ("model", "a.weight"),
        "checkpoint_version": ("checkpoint_version",),
    }
    places = [(index.fqn, index.offset, info.relative_path) for index, info in found.storage_data.items()]
    assert places == [
        ("model.a.weight", torch.Size([0, 0]), "__0_0.distcp"),
        ("checkpoint_version", None, "__0_0.distcp"),
    ]
    first, second = found.storage_data.values()
    size = (tmp_path / "dcp/release/__0_0.distcp").stat().st_size
    assert (first.offset, first.length, second.offset + second.length) == (0, second.offset, size)


def test_nothing_needs_torch(make_model: MakeModel, tmp_path: Path) -> None:
    """Its import alone would take ten times the memory of a conversion."""
    code = (
        "import sys; from mm_convert.distributed.dcp import *;"
        f"prepare_hf_to_dcp({str(make_model())!r}, {str(tmp_path / 'dcp')!r}).run();"
        f"prepare_dcp_to_hf({str(tmp_path / 'dcp')!r}, {str(tmp_path / 'hf')!r}, {str(tmp_path / 'back')!r}).run();"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
