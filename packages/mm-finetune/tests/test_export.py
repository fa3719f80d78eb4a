"""From a run to folders that others read: transformers says what the engine says, and nothing is half written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity_reference import logits
from safetensors.torch import load_file
from torch import Tensor

from mm_convert import Converter, Layout
from mm_datafmt import convert
from mm_finetune.cli import main
from mm_finetune.config import load_config
from mm_finetune.data import Batch
from mm_finetune.evaluation.adapters import merge_adapter
from mm_finetune.evaluation.answerer import load_model
from mm_finetune.mini import make

QWEN = Converter.named("Qwen2_5_VLConverter")
TARGETS = "lora.target_modules=[q_proj, gate_proj, up_proj, down_proj, visual.*qkv, visual.merger.*]"


def train(world: Path, name: str, *overrides: str) -> None:
    small = [
        "train.global_batch_size=4",
        "train.micro_batch_size=2",
        "data.max_samples=8",
        "train.warmup_fraction=0",
        "train.lr=1e-2",
    ]
    parallel = ["parallel.pp_size=1", f"model.load={world}/mm"]
    run = [str(world / "train.yaml"), *small, *parallel, f"output.dir={world / name}"]
    assert main(["train", *run, *overrides]) == 0


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and a run of weights (with an older checkpoint) and one of adapters; read only."""
    folder = make(tmp_path_factory.mktemp("mini") / "demo", digits=40, heldout_digits=10)
    convert(folder / "data/train.llava.json", folder / "data/train.json", image_dir=folder / "data/images")
    QWEN.hf_to_mm(folder / "hf", folder / "mm", Layout(llm_pp_layers=((4,),), vit_pp_layers=((4,),)))
    train(folder, "run", "train.steps=2", "output.save_every=1", "data.max_pixels=3136")
    train(folder, "lora", "train.steps=3", "lora.r=4", "lora.alpha=6", TARGETS)
    return folder


def batch() -> Batch:
    """Text and a picture of 4 x 4 patches."""
    from mm_finetune.mini.tokenizer import SPECIAL_TOKENS, VOCAB_SIZE

    image = VOCAB_SIZE - len(SPECIAL_TOKENS) + SPECIAL_TOKENS.index("<|image_pad|>")
    ids = torch.tensor([[5, 6, *[image] * 4, 7, 8, 9]])
    place = torch.arange(ids.shape[1])
    pixels = torch.randn(16, 1176, generator=torch.Generator().manual_seed(0))
    return Batch(
        input_ids=ids, labels=ids, loss_mask=torch.ones(ids.shape), position_ids=place.expand(3, 1, -1), tokens=9,
        pixel_values=pixels, image_grid_thw=torch.tensor([[1, 4, 4]]), pixel_values_videos=None, video_grid_thw=None,
        cu_seqlens=None,
    )  # fmt: skip


def says(folder: Path) -> Tensor:
    """Of transformers, which must find every weight."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    model: Any
    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys")), info
    with torch.no_grad():
        return logits(model, batch())


def engine_says(world: Path, run: str, *overrides: str) -> Tensor:
    from transformers import AutoConfig

    from mm_finetune.engine.build import build_model
    from mm_finetune.engine.device import mcore_on
    from mm_finetune.engine.parallel import model_parallel, processes
    from mm_finetune.engine.weights import Checkpoint

    config = load_config(world / run / "config.yaml", overrides)
    checkpoint = Checkpoint(config.model.load, config.model.hf_dir, config.parallel)
    hf_config = AutoConfig.from_pretrained(world / "hf")
    with processes() as device, mcore_on(device), model_parallel(config.parallel) as ranks, torch.no_grad():
        model = build_model(checkpoint, config, hf_config, ranks, device)
        (chunk,) = list(model)
        said: Tensor = chunk(batch(), logits=True)
        return said


def close(one: Tensor, other: Tensor) -> bool:
    return float((one - other).abs().max() / other.abs().max()) < 1e-5


def export(*arguments: str | Path) -> int:
    return main(["export", *map(str, arguments)])


def test_weights_as_a_folder_of_transformers(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(world / "run", "--output", tmp_path / "tuned") == 0
    assert f"exported model: {tmp_path}/tuned" in capsys.readouterr().out
    ours = engine_says(world, "run", f"model.load={world}/run/checkpoint")
    assert close(says(tmp_path / "tuned"), ours)
    assert not close(says(world / "hf"), ours), "it was trained"
    pictures = json.loads((tmp_path / "tuned/preprocessor_config.json").read_text())
    before = json.loads((world / "hf/preprocessor_config.json").read_text())
    assert pictures == before | {"max_pixels": 3136}, "as in training"
    for name in ("tokenizer.json", "config.json"):
        assert (tmp_path / "tuned" / name).read_bytes() == (world / "hf" / name).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["tuned"]


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_folder_says_the_type_of_its_weights(key: str, world: Path, tmp_path: Path) -> None:
    """Whatever the folder that the run began with says; transformers then keeps every bit."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    hf = Path(shutil.copytree(world / "hf", tmp_path / "hf"))
    config = json.loads((hf / "config.json").read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part.pop("dtype", None)
    config[key] = config["text_config"][key] = "bfloat16"
    (hf / "config.json").write_text(json.dumps(config))
    assert export(world / "run", "--output", tmp_path / "tuned", "--hf_dir", hf) == 0
    said = json.loads((tmp_path / "tuned/config.json").read_text())
    assert said == config | {key: "float32", "text_config": {**config["text_config"], key: "float32"}}
    model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "tuned", dtype="auto")
    stored = load_file(tmp_path / "tuned/model.safetensors")
    assert torch.equal(model.lm_head.weight, stored["lm_head.weight"])


def test_any_checkpoint_of_a_run(world: Path, tmp_path: Path) -> None:
    for number, path in enumerate(("run/checkpoint", "run/checkpoint/iter_0000002", "run/checkpoint/iter_0000001")):
        assert export(world / path, "--output", tmp_path / str(number)) == 0
    newest, same, older = (load_file(tmp_path / str(number) / "model.safetensors") for number in range(3))
    assert all(torch.equal(newest[name], same[name]) for name in newest)
    assert not all(torch.equal(newest[name], older[name]) for name in newest)


def test_an_adapter_for_peft_or_in_the_weights(world: Path, tmp_path: Path) -> None:
    assert export(world / "lora", "--output", tmp_path / "adapter", "--adapter") == 0
    assert export(world / "lora", "--output", tmp_path / "merged", "--merge") == 0
    names = sorted(path.name for path in (tmp_path / "adapter").iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors"]
    ours = engine_says(world, "lora", f"lora.load={tmp_path}/adapter")
    assert close(says(tmp_path / "merged"), ours)
    assert not close(says(world / "hf"), ours), "it was trained"
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    # Four modules in each of 4 language layers, one in each of 4 vision blocks, two in the merger; A and B of each.
    assert len(tensors) == 2 * (4 * 4 + 4 + 2)
    assert "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight" in tensors
    assert "base_model.model.model.visual.blocks.3.attn.qkv.lora_B.weight" in tensors
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 6.0, "LORA")
    before, after = (load_file(path / "model.safetensors") for path in (world / "hf", tmp_path / "merged"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == len(tensors) / 2


def test_it_is_merged_into_what_the_run_began_with(world: Path, tmp_path: Path) -> None:
    """Adapters after a run that trained all weights; hf_dir still holds those of before."""
    base = f"model.load={world}/run/checkpoint"
    train(world, str(tmp_path / "second"), "train.steps=1", "lora.r=4", base)
    assert export(tmp_path / "second", "--output", tmp_path / "merged", "--merge") == 0
    adapter = next((tmp_path / "second/checkpoint").glob("iter_*/adapter"))
    ours = engine_says(world, str(tmp_path / "second"), f"lora.load={adapter}")
    assert close(says(tmp_path / "merged"), ours)


@pytest.mark.long
def test_layers_that_are_trained_in_full_go_along(world: Path, tmp_path: Path) -> None:
    """Resumed as if never stopped; merged by export and by eval, as the engine that goes on from the adapter."""
    whole = "lora.modules_to_save=[lm_head, embed_tokens, norm, visual.merger]"
    settings = ["train.steps=3", "output.save_every=2", "lora.r=4", "lora.alpha=6", TARGETS, whole]
    train(world, str(tmp_path / "run"), *settings)
    shutil.copytree(tmp_path / "run", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed/checkpoint/iter_0000003")
    (tmp_path / "resumed/checkpoint/latest_checkpointed_iteration.txt").write_text("2")
    train(world, str(tmp_path / "resumed"), *settings, "output.resume=true")
    adapter, resumed = (tmp_path / run / "checkpoint/iter_0000003/adapter" for run in ("run", "resumed"))
    tensors, again = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, resumed))
    assert tensors.keys() == again.keys()
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    assert sorted(json.loads((adapter / "adapter_config.json").read_text())["modules_to_save"]) == [
        "lm_head", "model.language_model.embed_tokens", "model.language_model.norm",
        "model.visual.merger.ln_q", "model.visual.merger.mlp.0", "model.visual.merger.mlp.2",
    ]  # fmt: skip

    assert export(tmp_path / "run", "--output", tmp_path / "merged", "--merge") == 0
    ours = engine_says(world, str(tmp_path / "run"), f"lora.load={adapter}")
    assert close(says(tmp_path / "merged"), ours)
    merged, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", world / "hf"))
    assert torch.equal(merged["lm_head.weight"], tensors["base_model.model.lm_head.weight"])
    assert not torch.equal(merged["lm_head.weight"], before["lm_head.weight"])
    model = load_model(world / "hf")
    merge_adapter(model, adapter)
    with torch.no_grad():
        assert close(logits(model, batch()), ours)


def no_run(world: Path) -> Path:
    return world / "hf"


def nothing_saved(world: Path) -> Path:
    shutil.rmtree(world / "run/checkpoint")
    return world / "run"


def cut_short(world: Path) -> Path:
    (file,) = (world / "run/checkpoint/iter_0000002").glob("mp_rank_*/model_optim_rng.pt")
    file.write_bytes(file.read_bytes()[:10000])
    return world / "run"


def moved(world: Path) -> Path:
    (world / "hf").rename(world / "elsewhere")
    return world / "run"


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        (no_run, [], ["hf is no folder of a run"]),
        (nothing_saved, [], ["no Megatron checkpoint", "saved nothing yet"]),
        (cut_short, [], ["model_optim_rng.pt"]),
        (moved, [], ["is no Hugging Face folder", "has it moved?", "--hf_dir"]),
        (lambda world: world / "lora", [], ["holds an adapter: add --merge", "or --adapter"]),
        (lambda world: world / "run", ["--merge"], ["holds whole weights", "without --merge"]),
    ],
)
def test_faults_are_told_and_leave_nothing(
    source: Callable[[Path], Path],
    options: list[str],
    words: list[str],
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = Path(shutil.copytree(world, tmp_path / "world"))
    assert export(source(copy), "--output", tmp_path / "out", *options) == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message
    assert "Traceback" not in message
    assert [path.name for path in tmp_path.iterdir()] == ["world"]


def test_a_run_that_has_moved_is_told_where_the_model_is(world: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(world / "run", tmp_path / "run"))
    assert export(copy, "--output", tmp_path / "out", "--hf_dir", world / "hf") == 0
    assert (tmp_path / "out/model.safetensors").is_file()


def test_nothing_of_somebody_else_is_replaced(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/note.txt").write_text("kept")
    for options in ([], ["--overwrite"]):
        assert export(world / "run", "--output", tmp_path / "mine", *options) == 2
        assert "name another folder" in capsys.readouterr().err
    assert (tmp_path / "mine/note.txt").read_text() == "kept"
    adapter = (world / "lora", "--output", tmp_path / "out", "--adapter")
    assert export(*adapter) == 0
    assert export(*adapter) == 2
    assert "add --overwrite" in capsys.readouterr().err
    assert export(*adapter, "--overwrite") == 0
