"""Either layout from the other: bit for bit there and back, and read by diffusers and transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny_wan
import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPVisionModelWithProjection, UMT5EncoderModel

from wan_infer.checkpoints.convert import convert
from wan_infer.checkpoints.loading import load_clip, load_text_encoder, load_transformer, load_vae, open_checkpoint
from wan_infer.checkpoints.names import CLIP, TRANSFORMER, UMT5, vae_names
from wan_infer.config import LATENTS_MEAN, LATENTS_STD
from wan_infer.errors import CheckpointError, OutputError, RequestError


def contents(folder: Path) -> dict[str, Any]:
    """Every tensor of every file, the shards of a folder put together; tensors by folder (or file) and name."""
    found: dict[str, Any] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        found.setdefault(str(file.parent.relative_to(folder)), {}).update(load_file(file))
    for file in sorted(folder.rglob("*.pth")):
        found[file.name] = torch.load(file, weights_only=True)
    return found


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


def jsons(folder: Path) -> dict[str, Any]:
    return {str(p.relative_to(folder)): json.loads(p.read_text()) for p in folder.rglob("*.json")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", tiny_wan.MODEL_TYPES)
def test_original_there_and_back(tmp_path: Path, model_type: str, dtype: torch.dtype) -> None:
    source = tiny_wan.original(tmp_path / "source", model_type, dtype=dtype, shards=2)
    there = convert(source, tmp_path / "there", to="diffusers", shard_size=30_000)
    back = convert(there.target, tmp_path / "back", to="original")
    assert (there.layout, back.layout) == ("diffusers", "original")
    assert there.notes == back.notes == ()
    before, after = contents(source), contents(back.target)
    assert before.keys() == after.keys()
    for place in before:
        assert_same(before[place], after[place])
    config = json.loads((source / "config.json").read_text())
    assert config.items() <= (json.loads((back.target / "config.json").read_text()) | config).items()
    assert open_checkpoint(back.target).config == open_checkpoint(source).config
    assert (back.target / "google" / "umt5-xxl" / "tokenizer.json").is_file()
    assert (back.target / "xlm-roberta-large" / "tokenizer.json").is_file() == (
        "xlm-roberta-large" in before or model_type in ("i2v", "flf2v")
    )
    assert back.tensors == sum(len(tensors) for tensors in after.values())
    assert back.size == sum(t.nbytes for tensors in after.values() for t in tensors.values())


@pytest.mark.parametrize("model_type", tiny_wan.MODEL_TYPES)
def test_diffusers_there_and_back(tmp_path: Path, model_type: str) -> None:
    source = tiny_wan.diffusers(tmp_path / "source", model_type, dtype=torch.bfloat16, shard="20KB")
    there = convert(source, tmp_path / "there", to="original", shard_size=20_000)
    back = convert(there.target, tmp_path / "back", to="diffusers")
    assert len(there.notes) == (model_type in ("i2v", "flf2v"))  # no text tower of CLIP
    before, after = contents(source), contents(back.target)
    assert before.keys() == after.keys()
    for place in before:
        assert_same(before[place], after[place])


def peer_transformer(path: Path) -> Any:
    """What diffusers makes of a folder; its ``from_pretrained`` does the same, and asks for accelerate in addition."""
    config = WanTransformer3DModel.load_config(path / "transformer")
    kind = {"WanTransformer3DModel": WanTransformer3DModel, "WanVACETransformer3DModel": WanVACETransformer3DModel}
    peer = kind[config["_class_name"]].from_config(config)
    peer.load_state_dict(contents(path)["transformer"])
    return peer


@pytest.mark.parametrize("model_type", tiny_wan.MODEL_TYPES)
def test_the_libraries_read_what_was_written(tmp_path: Path, model_type: str) -> None:
    source = tiny_wan.original(tmp_path / "source", model_type)
    path = convert(source, tmp_path / "made", to="diffusers", shard_size=30_000).target
    before = contents(source)
    peer = peer_transformer(path).state_dict()
    assert_same({TRANSFORMER.to_diffusers(name)[0]: tensor for name, tensor in before["."].items()}, peer)
    peer = AutoencoderKLWan.from_pretrained(path, subfolder="vae").state_dict()
    names = vae_names(4, 1)
    assert_same({names.to_diffusers(name)[0]: tensor for name, tensor in before[tiny_wan.VAE].items()}, peer)
    peer = dict(UMT5EncoderModel.from_pretrained(path, subfolder="text_encoder").named_parameters())
    assert_same({UMT5.to_diffusers(name)[0]: tensor for name, tensor in before[tiny_wan.T5].items()}, peer)
    if tiny_wan.CLIP in before:
        peer = dict(CLIPVisionModelWithProjection.from_pretrained(path, subfolder="image_encoder").named_parameters())
        visual = {name: t for name, t in before[tiny_wan.CLIP].items() if name.startswith("visual.")}
        steps, _ = CLIP.steps(visual, "diffusers")
        assert_same({step.target: step.apply([visual[name] for name in step.sources]) for step in steps}, peer)


@pytest.mark.parametrize(
    ("model_type", "kind"), [("t2v", WanPipeline), ("flf2v", WanImageToVideoPipeline), ("vace", WanVACEPipeline)]
)
def test_diffusers_makes_a_pipeline_of_it(tmp_path: Path, model_type: str, kind: Any) -> None:
    source = tiny_wan.original(tmp_path / "source", model_type)
    path = convert(source, tmp_path / "made", to="diffusers").target
    vae = AutoencoderKLWan.from_pretrained(path, subfolder="vae")
    parts = {"transformer": peer_transformer(path), "vae": vae}
    pipeline = kind.from_pretrained(path, **parts, local_files_only=True)
    assert json.loads((path / "model_index.json").read_text())["_class_name"] == kind.__name__
    assert isinstance(pipeline.scheduler, UniPCMultistepScheduler)
    assert pipeline.scheduler.config.use_flow_sigmas
    assert pipeline.vae.config.latents_mean == list(LATENTS_MEAN)
    assert pipeline.vae.config.latents_std == list(LATENTS_STD)
    assert pipeline.tokenizer("the")["input_ids"] == [3, 1]


def test_loaders_see_no_difference(tmp_path: Path) -> None:
    source = tiny_wan.original(tmp_path / "source", "i2v")
    path = convert(source, tmp_path / "made", to="diffusers", shard_size=30_000).target
    for load in (load_transformer, load_vae, load_text_encoder, load_clip):
        assert_same(load(source).state_dict(), load(path).state_dict())


def test_a_size_of_shards(tmp_path: Path) -> None:
    source = tiny_wan.original(tmp_path / "source")
    path = convert(source, tmp_path / "made", to="diffusers", shard_size=30_000).target
    shards = sorted((path / "transformer").glob("*.safetensors"))
    assert len(shards) > 1
    assert all(sum(t.nbytes for t in load_file(shard).values()) <= 30_000 for shard in shards)
    index = json.loads((path / "transformer" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: shard.name for shard in shards for name in load_file(shard)}
    assert index["metadata"]["total_size"] == sum(t.nbytes for shard in shards for t in load_file(shard).values())


def test_text_length_is_kept(tmp_path: Path) -> None:
    source = tiny_wan.original(tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | {"text_len": 32}
    (source / "config.json").write_text(json.dumps(config))
    there = convert(source, tmp_path / "there", to="diffusers").target
    assert open_checkpoint(there).config.text_len == 32
    assert open_checkpoint(convert(there, tmp_path / "back", to="original").target).config.text_len == 32


def test_refused_requests(tmp_path: Path) -> None:
    source = tiny_wan.original(tmp_path / "source")
    with pytest.raises(RequestError, match="the layout 'onnx' is unknown; choose from original, diffusers"):
        convert(source, tmp_path / "made", to="onnx")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="has the original layout already"):
        convert(source, tmp_path / "made", to="original")
    with pytest.raises(RequestError, match="a shard of 0 bytes"):
        convert(source, tmp_path / "made", to="diffusers", shard_size=0)
    assert sorted(tmp_path.iterdir()) == [source]


def test_incomplete_sources(tmp_path: Path) -> None:
    source = tiny_wan.original(tmp_path / "source")
    weights = source / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {"blocks.0.lora": torch.ones(2)}, weights)
    with pytest.raises(CheckpointError, match=r"unexpected blocks\.0\.lora \[2\]"):
        convert(source, tmp_path / "made", to="diffusers")
    (source / tiny_wan.VAE).unlink()
    with pytest.raises(CheckpointError, match=rf"Missing: {tiny_wan.VAE} \(vae\)"):
        convert(source, tmp_path / "made", to="diffusers")
    assert sorted(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("vae", {"latents_mean": [0.0] * 16}, "latents_mean would become"),
        ("text_encoder", {"relative_attention_max_distance": 64}, "max_distance would become 128, is 64"),
        ("image_encoder", {"num_attention_heads": 4}, "num_heads would become 2, is 4"),
        ("image_encoder", {"hidden_act": "quick_gelu"}, "activation would become 'gelu', is 'quick_gelu'"),
    ],
)
def test_what_the_original_layout_cannot_say(tmp_path: Path, part: str, change: dict[str, Any], message: str) -> None:
    source = tiny_wan.diffusers(tmp_path / "source", "i2v")
    file = source / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=f"the original layout can't express.*{message}"):
        convert(source, tmp_path / "made", to="original")


def test_targets(tmp_path: Path) -> None:
    source = tiny_wan.original(tmp_path / "source")
    target = tmp_path / "made"
    target.mkdir()
    convert(source, target, to="diffusers")  # empty is free
    before = jsons(target)
    with pytest.raises(OutputError, match="exists and is not empty; choose another folder or add --overwrite"):
        convert(source, target, to="diffusers")
    (target / "old").touch()
    convert(source, target, to="diffusers", overwrite=True)
    assert not (target / "old").exists()
    assert jsons(target) == before
    private = tmp_path / "private"
    private.mkdir()
    (private / "letter").touch()
    with pytest.raises(OutputError, match="is no checkpoint, so it is not replaced"):
        convert(source, private, to="diffusers", overwrite=True)
    for inside in (source / "made", source, tmp_path):
        with pytest.raises(OutputError, match="lie in each other"):
            convert(source, inside, to="diffusers", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "private", "source"]


def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int = 1_000_000

    source = tiny_wan.original(tmp_path / "source")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage())
    with pytest.raises(OutputError, match=r"needs 0\.\d\d GB, the disk has 0\.00 GB left; make room"):
        convert(source, tmp_path / "made", to="diffusers")
    assert sorted(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("to", ["diffusers", "original"])
def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: Any) -> None:
    make = tiny_wan.original if to == "diffusers" else tiny_wan.diffusers
    source = make(tmp_path / "source")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wan_infer.checkpoints.tensor_writer.as_bytes", full)
    monkeypatch.setattr("wan_infer.checkpoints.tensor_writer.torch.save", full)
    with pytest.raises(OutputError, match=r"could not be written to its end: .*No space left"):
        convert(source, tmp_path / "made", to=to)
    assert sorted(tmp_path.iterdir()) == [source]


def test_an_interrupt_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_wan.original(tmp_path / "source")
    target = convert(source, tmp_path / "made", to="diffusers").target
    before = contents(target)

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("wan_infer.checkpoints.manifest.model_index", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(source, target, to="diffusers", overwrite=True)
    assert contents(target).keys() == before.keys()
    assert sorted(tmp_path.iterdir()) == [target, source]
