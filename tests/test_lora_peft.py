"""Adapters of mm-finetune against PEFT on transformers' model with torch's AdamW, layout by layout.

Both begin with the same adapter, whose A and B are random; some train whole layers beside it (``modules_to_save``).
Compared are logits, the loss, the gradients of every A, B and whole weight, the loss and the norm over 20 steps; then
PEFT loads what was saved, and its logits are compared. The bounds are those of the package's own comparison with
transformers, for the reasons given there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from house.tree import ROOT

HELPERS = ROOT / "packages" / "mm-finetune/tests"
sys.path.append(str(HELPERS))

from layouts import ask  # noqa: E402
from parity_reference import OPTIMIZATION, hf_model, logits, loss, micro_batches  # noqa: E402

from mm_finetune.evaluation.adapters import merge_adapter  # noqa: E402

# PEFT 0.21 asks transformers 5 by a name that transformers will drop.
pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

BOUND, CURVE = 128 * 6e-8, 1e-4
STEPS = 20

LANGUAGE = r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
# Parts of what is fused, some layers alone, and the vision tower with its merger.
SOME = (
    r"model\.language_model\.layers\.\d+\.(self_attn\.k_proj|mlp\.up_proj)|model\.language_model\.layers\.3\.mlp\.(gate|up|down)_proj"
    r"|model\.visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.down_proj)|model\.visual\.merger\.mlp\.[02]"
)
ALL_SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {"peft": LANGUAGE, "ours": ALL_SEVEN},
    "some": {
        "peft": SOME,
        "ours": ["k_proj", "up_proj", "model.layers.3.mlp.*", "visual.*attn.*", "visual.*down_proj", "visual.merger.*"],
    },
    # Both ends, norms, a layer whose parts Megatron fuses, a biased one; the targets match some of them too.
    "saved": {
        "peft": LANGUAGE,
        "ours": ALL_SEVEN,
        "saved": [
            "lm_head", "embed_tokens", "model.norm", "model.layers.1.self_attn.*_proj", "visual.merger",
            "visual.patch_embed",
        ],
        "theirs": [
            "lm_head", "embed_tokens", "model.language_model.norm", "merger", "patch_embed",
            *(f"language_model.layers.1.self_attn.{name}_proj" for name in "qkvo"),
        ],
    },
    "tied": {"peft": LANGUAGE, "ours": ALL_SEVEN, "saved": ["embed_tokens"], "theirs": ["embed_tokens"], "tied": True},
}  # fmt: skip
# 4 layers of 7; or of 2, with gate and down of the last, 4 blocks of 3 in the tower, 2 in its merger; or of 7 without
# the attention of layer 1: its 4 weights and 3 biases are whole, as both ends, a norm, the patches' weight, 5 in the
# merger.
GRADIENTS = {"all": 2 * 4 * 7, "some": 2 * (4 * 2 + 2 + 4 * 3 + 2), "saved": 2 * (4 * 7 - 4) + 7 + 4 + 5, "tied": 57}
LAYOUTS: list[dict[str, Any]] = [
    {"reference": "all", "steps": STEPS},
    {"reference": "some", "tp": 2, "pp": 2, "llm": [[1, 3]], "sp": True, "recompute": "full", "steps": STEPS},
    {"reference": "all", "tp": 2, "sp": True, "packed": True, "recompute": "selective"},
    {"reference": "some", "packed": True, "dist_opt": False, "recompute": "full"},
    {"reference": "all", "tp": 2, "steps": STEPS},
    {"reference": "all", "pp": 2, "llm": [[2, 2]], "packed": True, "recompute": "full"},
    {"reference": "some", "pp": 2, "llm": [[1, 1], [1, 1]]},
    {"reference": "saved", "tp": 2, "pp": 2, "llm": [[1, 3]], "vit": [[4, 0]], "sp": True, "steps": STEPS},
    {"reference": "saved", "pp": 2, "llm": [[1, 3]], "vit": [[4, 0]], "dist_opt": False, "recompute": "full"},
    {"reference": "saved", "tp": 2, "packed": True},
    {"reference": "saved", "pp": 2, "llm": [[1, 1], [1, 1]]},
    {"reference": "tied", "tp": 2, "pp": 2, "llm": [[2, 2]], "steps": STEPS},
    {"reference": "tied", "tp": 2, "sp": True, "dist_opt": False},
]


def variant(name: str) -> dict[str, bool]:
    """Of the model that a reference begins with."""
    return {"tied": ADAPTERS[name].get("tied", False), "wide": False}


def adapted(model: Any, name: str) -> Any:
    """PEFT's model, with random adapters."""
    given = ADAPTERS[name]
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=given["peft"], lora_dropout=0.0, modules_to_save=given.get("theirs"),
        ensure_weight_tying=given.get("tied", False),
    )  # fmt: skip
    made = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            elif "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return made


def published(name: str) -> str:
    """``model.layers.0.mlp.up_proj.lora_A`` or ``lm_head.weight``, of a name of PEFT's."""
    for before, after in (
        ("base_model.model.", ""), ("model.language_model.", "model."), ("model.visual.", "visual."),
        (".modules_to_save", ""), (".default", ""),
    ):  # fmt: skip
        name = name.replace(before, after)
    return name.removesuffix(".weight") if "lora_" in name else name


def trained_by_peft(model: Any) -> dict[str, Any]:
    parameters = {published(name): p for name, p in model.named_parameters() if p.requires_grad}
    truth: dict[str, Any] = {"logits": logits(model, micro_batches(0)[1]).detach(), "losses": [], "norms": []}
    decayed, others = ([p for p in parameters.values() if (p.dim() > 1) is wide] for wide in (True, False))
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": OPTIMIZATION.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=OPTIMIZATION.lr, betas=(OPTIMIZATION.adam_beta1, OPTIMIZATION.adam_beta2), eps=OPTIMIZATION.adam_eps,
    )  # fmt: skip
    for step in range(STEPS):
        optimizer.zero_grad()
        value = loss(model, step)
        value.backward()  # type: ignore[no-untyped-call]
        if step == 0:
            truth["loss"] = float(value.detach())
            truth["gradients"] = {name: p.grad.clone() for name, p in parameters.items()}
        truth["norms"].append(float(torch.nn.utils.clip_grad_norm_(parameters.values(), OPTIMIZATION.clip_grad)))
        truth["losses"].append(float(value.detach()))
        optimizer.step()
    return truth


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder, and what the processes say of each layout."""
    root = tmp_path_factory.mktemp("lora")
    for name in ADAPTERS:
        folder = root / name
        hf_model(variant(name)).save_pretrained(folder / "hf")
        (folder / "variant.json").write_text(json.dumps(variant(name)))
        model = adapted(hf_model(variant(name)), name)
        model.save_pretrained(str(folder / "adapter"))
        torch.save(trained_by_peft(model), folder / "truth.pt")
    cases = []
    for case in LAYOUTS:
        given = ADAPTERS[case["reference"]]
        lora = {"r": 4, "alpha": 6.0, "target_modules": given["ours"], "modules_to_save": given.get("saved", [])}
        cases.append(case | {"lora": lora})
    return root, ask("lora_worker.py", 4, root, cases)


@pytest.mark.parametrize("number", range(len(LAYOUTS)))
def test_trains_as_peft_does(compared: tuple[Path, list[dict[str, Any]]], number: int) -> None:
    result = compared[1][number]
    assert result["grads"] == GRADIENTS[result["reference"]]
    for name in ("logits", "loss", "grad"):
        assert result[name] < BOUND, result
    long = result["steps"] == STEPS
    assert result["curve_loss"] < (CURVE if long else BOUND), result
    assert result["norm"] < (CURVE if long else BOUND), result


@pytest.mark.parametrize("number", [number for number, case in enumerate(LAYOUTS) if "steps" in case and number != 4])
def test_peft_loads_what_was_saved_and_gets_the_same_logits(
    compared: tuple[Path, list[dict[str, Any]]], number: int
) -> None:
    """After 20 steps: what the engine says of a batch, and what transformers says with the saved adapter."""
    root, results = compared
    name = results[number]["reference"]
    loaded = peft.PeftModel.from_pretrained(hf_model(variant(name)), str(root / str(number) / "adapter")).eval()
    saved = load_file(root / str(number) / "adapter/adapter_model.safetensors")
    theirs = load_file(root / name / "adapter/adapter_model.safetensors")
    assert saved.keys() == theirs.keys()
    assert {key: t.shape for key, t in saved.items()} == {key: t.shape for key, t in theirs.items()}
    state = peft.get_peft_model_state_dict(loaded)
    assert all(torch.equal(state[key], tensor) for key, tensor in saved.items())
    ours = torch.load(root / str(number) / "logits.pt", weights_only=True)
    again: Tensor = logits(loaded, micro_batches(0)[1])
    assert float((again - ours).abs().max() / ours.abs().max()) < BOUND
    merged = hf_model(variant(name)).eval()
    merge_adapter(merged, root / str(number) / "adapter")
    asked = logits(merged, micro_batches(0)[1]).detach()
    assert float((asked - ours).abs().max() / ours.abs().max()) < BOUND, "what eval --adapter asks"
    truth = torch.load(root / name / "truth.pt", weights_only=True)
    assert not torch.allclose(ours, truth["logits"], atol=1e-2), "20 steps changed it"
