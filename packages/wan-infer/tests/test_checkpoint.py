"""Loading parts from both layouts, and everything that can be wrong with a checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_wan
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from wan_infer.checkpoints.loading import load_clip, load_text_encoder, load_transformer, load_vae, open_checkpoint
from wan_infer.checkpoints.names import TRANSFORMER, vae_names
from wan_infer.errors import CheckpointError, RequestError
from wan_infer.transformer import WanTransformer

WEIGHTS = "diffusion_pytorch_model.safetensors"


def stored(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("model_type", tiny_wan.MODEL_TYPES)
def test_original_transformer(tmp_path: Path, model_type: str, shards: int) -> None:
    path = tiny_wan.original(tmp_path / "ckpt", model_type, shards=shards)
    checkpoint = open_checkpoint(path)
    assert (checkpoint.layout, checkpoint.model_type) == ("original", model_type)
    assert checkpoint.config == tiny_wan.TRANSFORMERS[model_type]
    loaded = load_transformer(path, dtype=torch.float32).state_dict()
    expected = stored(path)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


@pytest.mark.parametrize("shard", ["20KB", "5GB"])
@pytest.mark.parametrize("model_type", tiny_wan.MODEL_TYPES)
def test_diffusers_transformer(tmp_path: Path, model_type: str, shard: str) -> None:
    path = tiny_wan.diffusers(tmp_path / "ckpt", model_type, dtype=torch.bfloat16, shard=shard)
    checkpoint = open_checkpoint(path)
    assert (checkpoint.layout, checkpoint.model_type) == ("diffusers", model_type)
    assert checkpoint.config == tiny_wan.TRANSFORMERS[model_type]
    expected = stored(path / "transformer")
    for place in (path, path / "transformer"):
        loaded = load_transformer(place, dtype=torch.float32).state_dict()
        assert {TRANSFORMER.to_diffusers(name)[0] for name in loaded} == expected.keys()
        assert all(torch.equal(t, expected[TRANSFORMER.to_diffusers(name)[0]].float()) for name, t in loaded.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_any_stored_dtype_and_the_float32_islands(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tiny_wan.original(tmp_path / "ckpt", "i2v", dtype=dtype)
    expected = stored(path)
    model = load_transformer(path)
    assert not model.training
    for name, value in model.named_parameters():
        wanted = torch.float32 if WanTransformer.keeps_float32(name) else torch.bfloat16
        assert value.dtype == wanted, name
        assert not value.requires_grad
        assert torch.equal(value, expected[name].to(wanted))


def test_loaded_models_run(tmp_path: Path) -> None:
    path = tiny_wan.original(tmp_path / "ckpt")
    velocity = load_transformer(path)(torch.randn(1, 16, 2, 4, 6), torch.tensor([500]), torch.randn(1, 5, 16))
    video = load_vae(path).decode(torch.randn(1, 16, 2, 2, 2))
    assert velocity.shape == (1, 16, 2, 4, 6)
    assert velocity.isfinite().all()
    assert video.shape == (1, 3, 5, 16, 16)
    assert video.isfinite().all()


def test_values_of_the_right_dtype_are_not_copied(tmp_path: Path) -> None:
    path = tiny_wan.original(tmp_path / "ckpt")
    models = {tiny_wan.VAE: load_vae(path), WEIGHTS: load_transformer(path, dtype=torch.float32)}
    maps = Path("/proc/self/maps").read_text().splitlines() if Path("/proc/self/maps").exists() else []
    for file, model in models.items():
        spans = [line.split()[0].split("-") for line in maps if line.endswith(file)]
        for value in model.parameters():
            assert not maps or any(int(start, 16) <= value.data_ptr() < int(end, 16) for start, end in spans)


def test_vae_from_either_layout(tmp_path: Path) -> None:
    path = tiny_wan.original(tmp_path / "original")
    expected = torch.load(path / tiny_wan.VAE, weights_only=True)
    for place in (path, path / tiny_wan.VAE):
        vae = load_vae(place)
        assert vae.config == tiny_wan.VAE_CONFIG
        assert all(torch.equal(value, expected[name]) for name, value in vae.state_dict().items())
    path = tiny_wan.diffusers(tmp_path / "diffusers")
    expected, names = stored(path / "vae"), vae_names(4, 1)
    for place in (path, path / "vae"):
        vae = load_vae(place)
        assert vae.config == tiny_wan.VAE_CONFIG
        values = {names.to_diffusers(name)[0]: value for name, value in vae.state_dict().items()}
        assert values.keys() == expected.keys()
        assert all(torch.equal(values[name], expected[name]) for name in expected)


def test_torchs_older_format_is_read(tmp_path: Path) -> None:
    tensors = tiny_wan.t5_tensors()
    torch.save(tensors, tmp_path / "t5.pth", _use_new_zipfile_serialization=False)
    shared = load_text_encoder(tmp_path / "t5.pth", dtype=torch.float32).model.shared.weight
    assert torch.equal(shared, tensors["token_embedding.weight"])


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is no folder: expected is a Wan2\.1 checkpoint, either original"):
        open_checkpoint(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="is no checkpoint folder"):
        open_checkpoint(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="holds no vae"):
        load_vae(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="does not exist"):
        load_vae(tmp_path / "nothing")


def test_a_norm_that_no_model_has_is_passed_over(tmp_path: Path) -> None:
    path = tiny_wan.diffusers(tmp_path / "ckpt", "i2v")
    file = path / "transformer" / WEIGHTS
    save_file(load_file(file) | {"blocks.0.attn2.norm_added_q.weight": torch.ones(24)}, file)
    assert load_transformer(path).config.model_type == "i2v"


def test_wan22_is_told_apart(tmp_path: Path) -> None:
    path = tiny_wan.diffusers(tmp_path / "ckpt")
    (path / "transformer_2").mkdir()
    with pytest.raises(CheckpointError, match=r"two transformers: it is a Wan2\.2 model"):
        open_checkpoint(path)


def test_every_missing_part_is_named(tmp_path: Path) -> None:
    path = tiny_wan.original(tmp_path / "ckpt", "i2v")
    shutil.rmtree(path / "google")
    for name in (tiny_wan.VAE, tiny_wan.CLIP):
        (path / name).unlink()
    with pytest.raises(CheckpointError, match="incomplete checkpoint") as raised:
        open_checkpoint(path)
    for name in (f"{tiny_wan.VAE} (vae)", f"{tiny_wan.CLIP} (clip)", "google/umt5-xxl/tokenizer.json"):
        assert name in str(raised.value)
    assert tiny_wan.T5 not in str(raised.value)
    assert open_checkpoint(path, parts=["transformer", "text_encoder"]).model_type == "i2v"
    with pytest.raises(CheckpointError, match=f"missing: .*{tiny_wan.VAE}"):
        load_vae(path)


def test_missing_files_of_a_diffusers_checkpoint_are_named(tmp_path: Path) -> None:
    path = tiny_wan.diffusers(tmp_path / "ckpt", shard="20KB")
    shard = sorted((path / "transformer").glob("*.safetensors"))[1]
    shard.unlink()
    shutil.rmtree(path / "vae")
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(path)
    for name in (f"transformer/{shard.name} (transformer)", "vae/config.json (vae)", f"vae/{WEIGHTS} (vae)"):
        assert name in str(raised.value)


Change = Callable[[dict[str, Tensor]], Any]
FAULTS: list[tuple[Change, str]] = [
    (lambda t: t.pop("blocks.1.self_attn.q.bias"), r"missing blocks\.1\.self_attn\.q\.bias \[24\]"),
    (lambda t: t.update({"extra": torch.ones(3)}), r"unexpected extra \[3\]"),
    (lambda t: t.update({"head.head.bias": torch.ones(3)}), r"head\.head\.bias is \[3\], should be \[64\]"),
    (lambda t: t.update({"head.head.bias": torch.ones(64, dtype=torch.int8)}), r"head\.head\.bias is torch\.int8"),
    (lambda t: t.pop("text_embedding.0.weight"), r"no tensor text_embedding\.0\.weight; is it the right file"),
]


@pytest.mark.parametrize(("change", "message"), FAULTS)
def test_wrong_tensors_are_named(tmp_path: Path, change: Change, message: str) -> None:
    path = tiny_wan.original(tmp_path / "ckpt")
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS)
    with pytest.raises(CheckpointError, match=message):
        load_transformer(path)


def test_all_faults_are_named_at_once_by_the_names_of_the_file(tmp_path: Path) -> None:
    path = tiny_wan.diffusers(tmp_path / "ckpt")
    file = path / "transformer" / WEIGHTS
    tensors = load_file(file)
    del tensors["blocks.0.attn1.to_q.weight"], tensors["proj_out.bias"]
    tensors["scale_shift_table"] = torch.ones(1, 3, 24)
    tensors |= {f"lora.{n}": torch.ones(1) for n in range(30)}
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="33 faults") as raised:
        load_transformer(path)
    for fault in (
        "missing blocks.0.attn1.to_q.weight [24, 24]",
        "missing proj_out.bias",
        "scale_shift_table is [1, 3, 24], should be [1, 2, 24]",
        "… and 13 more",
    ):
        assert fault in str(raised.value)


@pytest.mark.parametrize("kept", [0.5, 0.001, 0.0])
def test_truncated_files(tmp_path: Path, kept: float) -> None:
    path = tiny_wan.original(tmp_path / "ckpt")
    for file in (path / WEIGHTS, path / tiny_wan.VAE):
        content = file.read_bytes()
        file.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS} is not a safetensors file, or truncated .*copy it again"):
        load_transformer(path)
    with pytest.raises(CheckpointError, match=rf"{tiny_wan.VAE} is (damaged|not a torch file)"):
        load_vae(path)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"conv1.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="could run code, so it is not loaded"):
        load_vae(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [[torch.ones(1)], {"a": 1}, {1: torch.ones(1)}, {}])
def test_files_that_hold_something_else(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "vae.pth")
    with pytest.raises(CheckpointError, match=r"not tensors by name|no dense tensor"):
        load_vae(tmp_path / "vae.pth")


def test_indexes_that_lie(tmp_path: Path) -> None:
    path = tiny_wan.original(tmp_path / "ckpt", shards=2)
    file = path / f"{WEIGHTS}.index.json"
    index = json.loads(file.read_text())
    first = index["weight_map"]["patch_embedding.bias"]
    file.write_text(json.dumps({"weight_map": index["weight_map"] | {"nowhere": first}}))
    with pytest.raises(CheckpointError, match="missing nowhere, which the index says is in"):
        load_transformer(path)
    file.write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"names files outside its folder: \.\./outside\.safetensors"):
        load_transformer(path)
    for content in ("{}", "[]", "{", '{"weight_map": []}'):
        file.write_text(content)
        with pytest.raises(CheckpointError, match=r"no weight_map|not an object|not valid JSON"):
            load_transformer(path)


def test_shards_without_an_index(tmp_path: Path) -> None:
    path = tiny_wan.original(tmp_path / "ckpt", shards=3)
    (path / f"{WEIGHTS}.index.json").unlink()
    assert len(load_transformer(path).state_dict()) == len(stored(path))
    (path / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"missing: .*00002-of-00003"):
        load_transformer(path)


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"dim": "24"}, "dim is '24'; expected is a whole number"),
    ({"dim": True}, "dim is True"),
    ({"dim": 1 << 40}, "dim is 1099511627776"),
    ({"num_layers": 10**9}, "num_layers is 1000000000; expected is a whole number from 1 to 1000"),
    ({"num_heads": 5}, "24 channels do not divide into 5 heads"),
    ({"model_type": "ti2v"}, "model_type is 'ti2v'; expected is one of t2v, i2v, flf2v, vace"),
    ({"model_type": "vace", "vace_layers": [2, 0]}, "vace_layers is .* rising numbers"),
    ({"model_type": "vace", "vace_layers": "all"}, "vace_layers is 'all'; expected is a list of int"),
    ({"qk_norm": False}, "qk_norm is False; expected is True"),
    ({"eps": -1}, "eps is -1; expected is a positive number"),
    ({"num_layers": 4}, "missing blocks.3.modulation"),
    ({"num_layers": 2}, "unexpected blocks.2.modulation"),
]


@pytest.mark.parametrize(("change", "message"), CONFIGS)
def test_bad_configurations(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tiny_wan.original(tmp_path / "ckpt")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=message):
        load_transformer(path)


def test_a_key_of_the_configuration_is_missing(tmp_path: Path) -> None:
    path = tiny_wan.original(tmp_path / "ckpt")
    config = json.loads((path / "config.json").read_text())
    del config["num_heads"]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="num_heads is missing; expected is"):
        load_transformer(path)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("transformer", {"qk_norm": "layer_norm"}, "qk_norm is 'layer_norm'"),
        ("transformer", {"patch_size": [2, 2]}, "patch_size is .* three positive"),
        ("vae", {"is_residual": True}, "is_residual is True; expected is False"),
        ("vae", {"decoder_base_dim": 8}, "decoder_base_dim is 8; expected is null or 4"),
        ("vae", {"dim_mult": []}, "dim_mult is"),
        ("text_encoder", {"feed_forward_proj": "relu"}, "feed_forward_proj is 'relu'"),
        ("clip", {"num_channels": 4}, "num_channels is 4"),
    ],
)
def test_bad_diffusers_configurations(tmp_path: Path, part: str, change: dict[str, Any], message: str) -> None:
    path = tiny_wan.diffusers(tmp_path / "ckpt", "i2v")
    file = path / ("image_encoder" if part == "clip" else part) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    load = {"transformer": load_transformer, "vae": load_vae, "text_encoder": load_text_encoder, "clip": load_clip}[
        part
    ]
    with pytest.raises(CheckpointError, match=message):
        load(path)


def test_files_of_another_part(tmp_path: Path) -> None:
    path = tiny_wan.original(tmp_path / "ckpt", "i2v")
    with pytest.raises(CheckpointError, match=r"has no tensor encoder\.conv1\.weight; is it the right file"):
        load_vae(path / tiny_wan.T5)
    with pytest.raises(CheckpointError, match=r"has no tensor token_embedding\.weight"):
        load_text_encoder(path / tiny_wan.VAE)
    with pytest.raises(CheckpointError, match=r"has no tensor visual\.patch_embedding\.weight"):
        load_clip(path / tiny_wan.VAE)
    with pytest.raises(CheckpointError, match="is a file; give the folder of the transformer"):
        load_transformer(path / WEIGHTS)


def test_what_an_original_file_does_not_tell_is_refused(tmp_path: Path) -> None:
    tensors = torch.load(tiny_wan.original(tmp_path / "ckpt") / tiny_wan.VAE, weights_only=True)
    torch.save(tensors | {"conv2.weight": torch.ones(4, 4, 1, 1, 1)}, tmp_path / "vae.pth")
    with pytest.raises(CheckpointError, match=r"has 4 latent channels.*Use the diffusers layout"):
        load_vae(tmp_path / "vae.pth")
    tower = tiny_wan.clip_tensors() | {"visual.patch_embedding.weight": torch.ones(100, 3, 14, 14)}
    torch.save(tower, tmp_path / "clip.pth")
    with pytest.raises(CheckpointError, match="has 100 channels, no multiple of the 80"):
        load_clip(tmp_path / "clip.pth")


def test_float16_text_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="overflows in float16; use bfloat16 or float32"):
        load_text_encoder(tmp_path, dtype=torch.float16)
