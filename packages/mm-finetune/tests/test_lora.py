"""Learning rates by pattern against AdamW with parameter groups; adapters: how they begin, dropout, and PEFT's folders.

What adapters compute is compared with PEFT in the tests of the whole repository.
"""

from __future__ import annotations

import json
import math
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from layouts import ask
from parity_reference import OPTIMIZATION, hf_model, loss
from safetensors.torch import load_file, save_file
from torch import Tensor

from mm_convert import Converter, HuggingFaceFolder, Ref
from mm_finetune.config import LoraConfig
from mm_finetune.engine.adapters import Dropout, Fused
from mm_finetune.engine.lora import read_adapter
from mm_finetune.engine.saved_modules import saved_rates
from mm_finetune.errors import CheckpointError, ConfigError
from mm_finetune.selection import adapted_layers, saved_layers

pytestmark = pytest.mark.long

VARIANT = {"tied": False, "wide": False}
BOUND = 128 * 6e-8  # see test_parity
STEPS = 3

# A weight is frozen whose bias is trained: Megatron alone would give that bias no gradient.
FREEZE = ["lm_head.*", "model.layers.2.*_proj.weight"]
LR_SCALE = {"visual.*": 0.1, "model.layers.1.*": 3.0, "model.norm.weight": 3.0}
RATES = {"reference": "rates", "freeze": FREEZE, "lr_scale": LR_SCALE}
QUERIES = ["model.layers.0.self_attn.q_proj"]
LAST = ["model.layers.3.mlp.*"]
SPREAD = ["k_proj", "down_proj", "visual.*qkv"]
DROPOUT = {"reference": "lora", "only_gradients": True}
CASES: dict[str, dict[str, Any]] = {
    "rates dp4": RATES,
    "rates tp2 pp2": RATES | {"tp": 2, "pp": 2, "llm": [[3, 1]], "recompute": "full"},
    "rates tp2 sp": RATES | {"tp": 2, "sp": True, "packed": True, "dist_opt": False},
    "rates vpp2": RATES | {"pp": 2, "llm": [[1, 1], [1, 1]]},
    "new dp4": DROPOUT | {"load": False, "targets": SPREAD},
    "new tp2 pp2 sp": DROPOUT | {"load": False, "tp": 2, "pp": 2, "llm": [[1, 3]], "sp": True, "targets": SPREAD},
    "dropped tp2": DROPOUT | {"tp": 2, "dropout": 0.5, "targets": QUERIES},
    "dropped pp2": DROPOUT | {"pp": 2, "llm": [[2, 2]], "dropout": 0.5, "targets": QUERIES},
    "whole tp2": DROPOUT | {"tp": 2, "targets": QUERIES},
    "dropped tp2 sp": DROPOUT | {"tp": 2, "sp": True, "dropout": 0.5, "targets": SPREAD},
    "dropped tp2 sp again": DROPOUT | {"tp": 2, "sp": True, "dropout": 0.5, "targets": SPREAD, "recompute": "full"},
    "last layer pp2": DROPOUT | {"load": False, "pp": 2, "llm": [[2, 2]], "recompute": "full", "targets": LAST},
    "last layer tp2": DROPOUT | {"load": False, "tp": 2, "dist_opt": False, "targets": LAST},
    "half bf16": DROPOUT | {"tp": 2, "dtype": "bf16", "targets": SPREAD},
}
QWEN = Converter.named("Qwen2_5_VLConverter").family


def shapes_of(hf_dir: Path) -> dict[str, tuple[int, ...]]:
    return {QWEN.canonical(ref.name): tuple(spec.shape) for ref, spec in HuggingFaceFolder.open(hf_dir).tensors.items()}


def write_adapter(folder: Path, layers: list[str], shapes: dict[str, tuple[int, ...]], **changed: Any) -> None:
    """A folder as PEFT's documentation describes it, with the published names."""
    folder.mkdir(parents=True)
    generator, tensors = torch.Generator().manual_seed(1), {}
    for layer in layers:
        outputs, inputs = shapes[f"{layer}.weight"]
        for half, shape in (("lora_A", (4, inputs)), ("lora_B", (outputs, 4))):
            tensors[f"base_model.model.{layer}.{half}.weight"] = torch.randn(shape, generator=generator) * 0.1
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": layers}
    (folder / "adapter_config.json").write_text(json.dumps(config | changed))


def write_rates(folder: Path) -> None:
    """What transformers and torch's AdamW make of it, a group for each factor and decay."""
    model = hf_model(VARIANT)
    parameters = dict(model.named_parameters())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    groups = []
    for name, parameter in parameters.items():
        published = QWEN.canonical(name)
        frozen = any(fnmatchcase(published, pattern) for pattern in FREEZE)
        parameter.requires_grad_(not frozen)
        factor = next((f for pattern, f in LR_SCALE.items() if fnmatchcase(published, pattern)), 1.0)
        decay = OPTIMIZATION.weight_decay if parameter.dim() > 1 else 0.0
        if not frozen:
            groups.append({"params": [parameter], "lr": OPTIMIZATION.lr * factor, "weight_decay": decay})
    betas = (OPTIMIZATION.adam_beta1, OPTIMIZATION.adam_beta2)
    optimizer = torch.optim.AdamW(groups, betas=betas, eps=OPTIMIZATION.adam_eps)
    trained = [p for p in parameters.values() if p.requires_grad]
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        value = loss(model, step)
        value.backward()  # type: ignore[no-untyped-call]
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, OPTIMIZATION.clip_grad)))
        losses.append(float(value.detach()))
        optimizer.step()
    after = {name: p.detach().clone() for name, p in parameters.items()}
    torch.save({"before": before, "trained": after, "losses": losses, "norms": norms}, folder / "truth.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """The folder, and what the processes say of each case."""
    root = tmp_path_factory.mktemp("lora")
    for name in ("rates", "lora"):
        hf_model(VARIANT).save_pretrained(root / name / "hf")
        (root / name / "variant.json").write_text(json.dumps(VARIANT))
    write_rates(root / "rates")
    shapes = shapes_of(root / "lora/hf")
    for name, targets in (("queries", QUERIES), ("spread", SPREAD)):
        write_adapter(root / "lora" / name, adapted_layers(shapes, targets), shapes)
    cases = []
    for given in CASES.values():
        case = {"steps": STEPS} | given
        if "targets" in case:
            lora = {"r": 4, "alpha": 8.0, "dropout": case.pop("dropout", 0.0)}
            case["lora"] = lora | {"target_modules": case["targets"]}
            case["adapter"] = "queries" if case.pop("targets") == QUERIES else "spread"
        cases.append(case)
    found = dict(zip(CASES, ask("lora_worker.py", 4, root, cases), strict=True))
    return root, {name: result | {"folder": str(number)} for number, (name, result) in enumerate(found.items())}


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("rates")])
def test_each_weight_trains_at_its_own_rate(results: tuple[Path, dict[str, dict[str, Any]]], name: str) -> None:
    result = results[1][name]
    assert result["curve_loss"] < BOUND, result
    assert result["norm"] < BOUND, result
    # Adam's first steps go by a gradient's sign: those of rounding go either way. A wrong factor costs 0.5 and more.
    assert result["change"] < 0.02, result
    # lm_head, and seven matrices of a language layer.
    assert result["still"] == 1 + 7


def gradients(results: tuple[Path, dict[str, dict[str, Any]]], name: str) -> dict[str, Tensor]:
    root, found = results
    loaded: dict[str, Tensor] = torch.load(root / found[name]["folder"] / "gradients.pt", weights_only=True)
    return loaded


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[n] - theirs[n]).abs().max() / theirs[n].abs().max().clamp(min=1e-12)) for n in theirs)


def test_adapters_begin_as_pefts_do_and_the_same_in_every_layout(
    results: tuple[Path, dict[str, dict[str, Any]]],
) -> None:
    root, found = results
    one, other = (
        load_file(root / found[name]["folder"] / "begun/adapter_model.safetensors")
        for name in ("new dp4", "new tp2 pp2 sp")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert len({round(float(t.sum()), 6) for n, t in one.items() if "lora_A" in n}) == 4 + 4 + 4, "no two are the same"
    for name, tensor in one.items():
        if "lora_B" in name:
            assert not tensor.any(), "an adapter begins as none"
        else:
            # Uniform in ±1/sqrt(inputs): kaiming_uniform_(a=sqrt(5)), PEFT's and nn.Linear's.
            bound = 1 / math.sqrt(tensor.shape[1])
            assert 0.9 * bound < float(tensor.abs().max()) <= bound
            assert float(tensor.std()) == pytest.approx(bound / math.sqrt(3), rel=0.15)
    assert difference(gradients(results, "new tp2 pp2 sp"), gradients(results, "new dp4")) < BOUND


def test_dropout_drops_the_same_on_ranks_that_share_a_layer(results: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    """Stage 0 of two and tensor-parallel ranks draw the same; that all ranks have one gradient the worker asserts."""
    dropped = gradients(results, "dropped tp2")
    assert difference(dropped, gradients(results, "dropped pp2")) < BOUND
    assert difference(dropped, gradients(results, "whole tp2")) > 0.1


def test_what_is_computed_again_drops_the_same(results: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    assert difference(gradients(results, "dropped tp2 sp again"), gradients(results, "dropped tp2 sp")) < BOUND


def test_a_stage_that_trains_nothing(results: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    """All adapters are in the last layer: the first of two stages holds none."""
    one, other = (results[1][f"last layer {layout}"] for layout in ("pp2", "tp2"))
    assert difference(gradients(results, "last layer pp2"), gradients(results, "last layer tp2")) < BOUND
    for name in ("value", "after", "norm"):
        assert one[name] == pytest.approx(other[name], abs=BOUND * max(1.0, one["norm"]))
    assert abs(one["after"] - one["value"]) > 100 * BOUND, "it was trained"


def test_bf16_adapters_have_float32_gradients(results: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    assert {t.dtype for t in gradients(results, "half bf16").values()} == {torch.float32}
    root, found = results
    saved = load_file(root / found["half bf16"]["folder"] / "begun/adapter_model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.bfloat16}


def test_dropout_alone() -> None:
    layer, ones = Dropout(0.25, 0), torch.ones(200, 100)
    state = torch.random.get_rng_state()
    dropped = layer(ones)
    assert {round(value, 6) for value in dropped.unique().tolist()} == {0.0, round(4 / 3, 6)}
    assert float((dropped == 0).float().mean()) == pytest.approx(0.25, abs=0.02)
    assert not torch.equal(layer(ones), dropped), "each call drops others"
    torch.random.set_rng_state(state)
    assert torch.equal(layer(ones), dropped)
    torch.random.set_rng_state(state)
    assert not torch.equal(Dropout(0.25, 1)(ones), dropped)
    assert layer.eval()(ones) is ones


def test_fused_layers_lie_group_by_group() -> None:
    """Megatron's order of two key-value groups: the queries of the first, its key, its value, then the second."""
    fused = Fused(widths={"q_proj": 2, "k_proj": 1, "v_proj": 1}, groups=2)
    query, value = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[7, 8]])
    assert fused.joined({"v_proj": value, "q_proj": query}).tolist() == [[1, 2, 0, 7, 3, 4, 0, 8]]


SHAPES = {
    "model.embed_tokens.weight": (64, 8), "lm_head.weight": (64, 8), "model.norm.weight": (8,),
    "model.layers.0.self_attn.q_proj.weight": (8, 8), "model.layers.0.self_attn.q_proj.bias": (8,),
    "model.layers.0.mlp.up_proj.weight": (16, 8), "model.layers.1.mlp.up_proj.weight": (16, 8),
    "visual.patch_embed.proj.weight": (8, 3, 2, 14, 14), "visual.blocks.0.mlp.up_proj.weight": (16, 8),
    "visual.merger.mlp.0.weight": (16, 8),
}  # fmt: skip


@pytest.mark.parametrize(
    ("patterns", "layers"),
    [
        (["up_proj"], ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]),
        (["*up_proj"], ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "visual.blocks.0.mlp.up_proj"]),
        (["model.layers.1.*", "q_proj"], ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]),
        (["visual.*"], ["visual.blocks.0.mlp.up_proj", "visual.merger.mlp.0"]),
    ],
)
def test_which_layers_are_adapted(patterns: list[str], layers: list[str]) -> None:
    assert adapted_layers(SHAPES, patterns) == layers


def test_a_pattern_that_matches_nothing_says_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"'up_porj' matches no linear layer; there are model.layers.\*.mlp.up_proj"):
        adapted_layers(SHAPES, ["q_proj", "up_porj"])
    for never in ("lm_head", "model.embed_tokens", "visual.patch_embed.proj"):
        with pytest.raises(ConfigError, match="matches no linear layer"):
            adapted_layers(SHAPES, [never])


@pytest.mark.parametrize(
    ("patterns", "layers"),
    [
        (["lm_head", "embed_tokens"], ["model.embed_tokens", "lm_head"]),
        (["norm"], ["model.norm"]),
        (["visual.merger"], ["visual.merger.mlp.0"]),
        (["visual.merger.*", "*.q_proj"], ["model.layers.0.self_attn.q_proj", "visual.merger.mlp.0"]),
        (["mlp"], ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]),
    ],
)
def test_which_layers_are_trained_in_full(patterns: list[str], layers: list[str]) -> None:
    assert saved_layers(SHAPES, patterns) == layers


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("lm_heat", r"'lm_heat' matches no layer; there are model.embed_tokens, .*visual.blocks.\*.mlp.up_proj"),
        ("lm_head.weight", "trained and saved whole, as PEFT does it: name them without .weight"),
        ("merger", "matches no layer"),
    ],
)
def test_what_is_no_layer_is_not_trained_in_full(pattern: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        saved_layers(SHAPES, ["lm_head", pattern])


def test_a_tied_output_layer_is_named_by_its_embedding() -> None:
    tied = [name for name in SHAPES if name != "lm_head.weight"]
    with pytest.raises(ConfigError, match="name embed_tokens, which trains both"):
        saved_layers(tied, ["lm_head"])


def test_what_is_trained_in_full_gets_no_adapter() -> None:
    merger = saved_layers(SHAPES, ["visual.merger"])
    assert adapted_layers(SHAPES, ["visual.*"], merger) == ["visual.blocks.0.mlp.up_proj"]
    with pytest.raises(ConfigError, match="no adapter is left; for full training leave the section lora out"):
        adapted_layers(SHAPES, ["visual.merger.*"], merger)


def test_a_part_of_a_fused_weight_is_not_trained_in_full() -> None:
    """Megatron has queries, keys and values in one weight."""
    published = tuple(f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv")
    checkpoint: Any = SimpleNamespace(
        shapes=SHAPES | dict.fromkeys(published, (8, 8)), published=lambda: {Ref("file", "model", "qkv"): published}
    )
    config: Any = SimpleNamespace(
        lora=LoraConfig(modules_to_save=("q_proj", "k_proj")), train=SimpleNamespace(freeze=(), lr_scale={})
    )
    with pytest.raises(ConfigError, match=r"qkv is one weight here: lora.modules_to_save must name the layers of all"):
        saved_rates(checkpoint, config)
    config.lora = LoraConfig(modules_to_save=("q_proj", "k_proj", "v_proj"))
    config.train.lr_scale = {"*_proj.weight": 0.5}
    rates = saved_rates(checkpoint, config)
    assert [rates[name] for name in published] == [0.5, 0.5, 0.5]


LAYERS = ["model.layers.0.mlp.up_proj", "visual.merger.mlp.0"]


@pytest.mark.parametrize(
    ("changed", "kind", "words"),
    [
        ({"r": 8}, CheckpointError, "has rank 4"),
        ({"lora_alpha": 4}, ConfigError, "scale 1 at model.layers.0.mlp.up_proj, the run lora.r=4 lora.alpha=8"),
        ({"use_rslora": True}, ConfigError, "scale 4 at"),
        ({"use_dora": True}, CheckpointError, "use_dora"),
    ],
)
def test_an_adapter_that_is_another_one_is_refused(
    changed: dict[str, Any], kind: type[Exception], words: str, tmp_path: Path
) -> None:
    write_adapter(tmp_path / "adapter", LAYERS, SHAPES, **changed)
    lora = LoraConfig(r=4, alpha=8.0, load=tmp_path / "adapter")
    with pytest.raises(kind, match=words):
        read_adapter(lora, LAYERS, QWEN)


def test_an_adapter_for_other_layers_is_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", LAYERS, SHAPES)
    lora = LoraConfig(r=4, alpha=8.0, load=tmp_path / "adapter")
    assert sorted(read_adapter(lora, LAYERS, QWEN)) == sorted(LAYERS)
    with pytest.raises(CheckpointError, match=r"differ in 1 layers: visual.merger.mlp.0; choose the modules"):
        read_adapter(lora, LAYERS[:1], QWEN)
    with pytest.raises(CheckpointError, match=r"lora.load: .* is no PEFT adapter"):
        read_adapter(LoraConfig(load=tmp_path), LAYERS, QWEN)


WHOLE = {"model.embed_tokens.weight": (64, 8), "lm_head.weight": (64, 8)}


def write_saved(folder: Path, **changed: Any) -> LoraConfig:
    """A folder as PEFT writes it of an adapter with ``modules_to_save``: those have their plain names."""
    write_adapter(folder, LAYERS, SHAPES, modules_to_save=["lm_head", "embed_tokens"], **changed)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.model.language_model.embed_tokens.weight"] = torch.ones(64, 8)
    tensors["base_model.model.lm_head.weight"] = torch.ones(64, 8)
    save_file(tensors, folder / "adapter_model.safetensors")
    return LoraConfig(r=4, alpha=8.0, load=folder)


def test_an_adapter_with_layers_trained_in_full_is_read_for_the_same_ones(tmp_path: Path) -> None:
    lora = write_saved(tmp_path / "adapter")
    assert sorted(read_adapter(lora, LAYERS, QWEN, saved=WHOLE)) == sorted(LAYERS)
    for other in ({}, {**WHOLE, "model.norm.weight": (8,)}, {**WHOLE, "lm_head.weight": (65, 8)}):
        with pytest.raises(CheckpointError, match=r"lora.modules_to_save differ in"):
            read_adapter(lora, LAYERS, QWEN, saved=other)
    write_adapter(tmp_path / "none", LAYERS, SHAPES)
    with pytest.raises(CheckpointError, match=r"differ in 2 weights: lm_head.weight, model.embed_tokens.weight; "):
        read_adapter(LoraConfig(r=4, alpha=8.0, load=tmp_path / "none"), LAYERS, QWEN, saved=WHOLE)


def test_ends_that_were_trained_apart_are_no_tied_models(tmp_path: Path) -> None:
    tied = {"model.embed_tokens.weight": (64, 8)}
    with pytest.raises(CheckpointError, match="one weight: train it with ensure_weight_tying"):
        read_adapter(write_saved(tmp_path / "apart"), LAYERS, QWEN, saved=tied, tied=True)
    together = write_saved(tmp_path / "together", ensure_weight_tying=True)
    assert read_adapter(together, LAYERS, QWEN, saved=tied, tied=True)


def test_another_kind_of_adapter_is_refused_under_its_own_name(tmp_path: Path) -> None:
    lora = write_saved(tmp_path / "adapter", use_dora=True)
    with pytest.raises(CheckpointError, match=f"{tmp_path}/adapter.*use_dora"):
        read_adapter(lora, LAYERS, QWEN, saved=WHOLE)
