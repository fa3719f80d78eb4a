"""Adapters of PEFT through the Megatron-style layout and back: PEFT and transformers are the judges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from house.tiny_models import MROPE, QWEN2_5_VISION, TEXT, TOKENS
from mm_convert.convert import Converter
from mm_convert.families import family
from mm_convert.layout import Layout
from mm_convert.lora.conversion import AdapterConverter, AdapterOptions
from mm_convert.lora.merge import Merger

# PEFT 0.21 asks transformers 5 by a name that transformers will drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TARGETS = r".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|attn\.qkv|attn\.proj)"
LAYOUTS = {
    "tp1": Layout(llm_pp_layers=((5,),), vit_pp_layers=((3,),)),
    "tp2 pp2 vpp2": Layout(llm_pp_layers=((0, 2), (2, 1)), vit_pp_layers=((2, 1), (0, 0)), tp_size=2),
    "tp4 pp2": Layout(llm_pp_layers=((2, 3),), vit_pp_layers=((3, 0),), tp_size=4),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base model, and an adapter with random A and B, other ranks and alphas in places."""
    root = tmp_path_factory.mktemp("lora")
    torch.manual_seed(0)
    # Heads of 4, which a rotary embedding in two dimensions needs.
    text = {**TEXT, **MROPE, "hidden_size": 32}
    vision = {**QWEN2_5_VISION, "hidden_size": 16, "out_hidden_size": 32, "fullatt_block_indexes": [1]}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **TOKENS)
    transformers.Qwen2_5_VLForConditionalGeneration(config).save_pretrained(root / "base")
    lora = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=TARGETS,
        use_rslora=True,
        rank_pattern={"down_proj": 2},
        alpha_pattern={r"^model\.visual\.blocks\.1\.attn\.qkv": 3},
    )
    adapted = peft.get_peft_model(base_model(root / "base"), lora)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    adapted.save_pretrained(str(root / "adapter"))
    return root / "base", root / "adapter"


def base_model(folder: Path) -> Any:
    return transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)


def loaded(base: Path, adapter: Path) -> Any:
    return peft.PeftModel.from_pretrained(base_model(base), str(adapter)).eval()


def logits(model: Any) -> Tensor:
    """Of some text and a picture of four merged patches' size, so that both parts take part."""
    tokens = torch.tensor([[5, 3, 3, 3, 3, 7, 8, 9]])
    config = model.config.vision_config
    width = config.in_channels * config.temporal_patch_size * config.patch_size**2
    pixels = torch.randn(16, width, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        result: Tensor = model(
            input_ids=tokens,
            pixel_values=pixels,
            image_grid_thw=torch.tensor([[1, 4, 4]]),
            mm_token_type_ids=(tokens == 3).int(),
        ).logits
    return result


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_peft_loads_what_comes_back_and_computes_the_same(
    folders: tuple[Path, Path], layout: Layout, tmp_path: Path
) -> None:
    base, adapter = folders
    converter = AdapterConverter(family=family("Qwen2_5_VLConverter"))
    converter.prepare_hf_to_mm(adapter, tmp_path / "mm", layout).run()
    converter.prepare_mm_to_hf(tmp_path / "mm", tmp_path / "back", template=adapter).run()
    assert torch.equal(logits(loaded(base, tmp_path / "back")), logits(loaded(base, adapter)))


def test_a_configuration_made_from_the_names_adapts_the_same_modules(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = folders
    options = AdapterOptions(base_dir=base, new_names=True, alpha=6, rslora=True)
    converter = AdapterConverter(family=family("Qwen2_5_VLConverter"), options=options)
    converter.prepare_hf_to_mm(adapter, tmp_path / "mm", LAYOUTS["tp2 pp2 vpp2"]).run()
    (tmp_path / "mm/adapter_config.json").unlink()
    converter.prepare_mm_to_hf(tmp_path / "mm", tmp_path / "back").run()
    made = json.loads((tmp_path / "back/adapter_config.json").read_text())
    assert made["r"] == 4
    # What names can't tell: one module's own alpha.
    made["alpha_pattern"] = {"visual.blocks.1.attn.qkv": 3}
    (tmp_path / "back/adapter_config.json").write_text(json.dumps(made))
    assert torch.equal(logits(loaded(base, tmp_path / "back")), logits(loaded(base, adapter)))


def merged_by_peft(base: Path, adapter: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = loaded(base, adapter).merge_and_unload().state_dict()
    return state


def same_numbers(ours: Path, theirs: dict[str, Tensor]) -> bool:
    """Equal but for float32's rounding: a sum of r products in another order, and one addition.

    Numbers here are below 100, and a float32 has 24 bits: 100 * 2**-24 is 6e-6.
    """
    model = base_model(ours).state_dict()
    assert model.keys() == theirs.keys()
    return all(torch.allclose(model[name], theirs[name], rtol=0, atol=2e-5) for name in model)


def test_merged_folder_is_what_peft_merges(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = folders
    merger = Merger(adapters=AdapterConverter(family=family("Qwen2_5_VLConverter")))
    merger.prepare(base, adapter, tmp_path / "merged").run()
    assert same_numbers(tmp_path / "merged", merged_by_peft(base, adapter))
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    same = {name for name in before if torch.equal(before[name], after[name])}
    untouched = {name for name in before if "norm" in name or "bias" in name or "embed" in name or "merger" in name}
    assert same == untouched | {"lm_head.weight"}


@pytest.mark.parametrize("canonical", [False, True])
@pytest.mark.parametrize("as_peft", [False, True])
def test_merged_megatron_folder_is_what_peft_merges(
    folders: tuple[Path, Path], canonical: bool, as_peft: bool, tmp_path: Path
) -> None:
    base, adapter = folders
    layout = LAYOUTS["tp2 pp2 vpp2"]
    converter = Converter.named("Qwen2_5_VLConverter", canonical=canonical)
    converter.hf_to_mm(base, tmp_path / "mm", layout)
    adapters = AdapterConverter(family=converter.family, options=AdapterOptions(base_dir=base))
    adapters.prepare_hf_to_mm(adapter, tmp_path / "lora", layout).run()
    merger = Merger(adapters=adapters)
    merger.prepare(tmp_path / "mm", adapter if as_peft else tmp_path / "lora", tmp_path / "merged").run()
    converter.mm_to_hf(tmp_path / "merged", base, tmp_path / "back")
    assert same_numbers(tmp_path / "back", merged_by_peft(base, adapter))
