"""LoRA adapters: every rank's B @ A is the change of its slice, nothing is lost, and only plain LoRA is merged."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from math import sqrt
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lora_folders import LANGUAGE, RANK, VISION, adapter, new_name, save_adapter, saved, whole_change
from test_canonical import LAYOUTS, hugging_face, rank_file, third_of_each
from tiny_checkpoint import MakeModel, Tensors, tensors
from torch import Tensor

from mm_convert import CheckpointError, Converter, Layout, LayoutError, ModelError
from mm_convert.cli import main
from mm_convert.commands.adapters import AdapterConfig, AdapterStructure, LoraHfToMm, LoraMmToHf, MergeLoraToBase
from mm_convert.commands.options import GivenParallelConfig, OptionalHfConfig, ParallelConfig
from mm_convert.families import family
from mm_convert.families.wan import WAN
from mm_convert.lora.config import numbers
from mm_convert.lora.conversion import AdapterConverter, AdapterOptions
from mm_convert.lora.merge import Merger

FAMILY = family("Qwen2_5_VLConverter")
ADAPTERS = AdapterConverter(family=FAMILY)
ONE = LAYOUTS["tp1"]
NO_OPTIONS = SimpleNamespace(allow_unused=[])
LINEAR_PROJ = "text_decoder.decoder.layers.0.self_attention.linear_proj"


def new_tensor_name(name: str) -> str:
    module, half = re.split(r"\.(?=lora_)", name)
    return f"{new_name(module)}.{half}"


def slice_of(change: Tensor, module: str, tp: int, t: int) -> Tensor:
    """What rank t adds to its weight: rows, columns, or rows of each third."""
    if module.endswith("qkv"):
        return third_of_each(change, tp, t)
    return change.chunk(tp, 1 if module.endswith(("o_proj", "down_proj", "attn.proj")) else 0)[t]


def megatron_name(module: str) -> str:
    new = module.replace("model.layers.", "text_decoder.decoder.layers.")
    new = new.replace("visual.blocks.", "image_encoder.encoder.blocks.layers.")
    new = new.replace(".self_attn.o_proj", ".self_attention.linear_proj").replace(".self_attn.", ".self_attention.")
    new = new.replace(".attn.qkv", ".self_attention.linear_qkv").replace(".attn.proj", ".self_attention.linear_proj")
    return new.replace(".mlp.down_proj", ".mlp.linear_fc2")


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_every_rank_changes_its_own_slice(tmp_path: Path, tp: int) -> None:
    made = adapter(LANGUAGE + VISION)
    layout = Layout(llm_pp_layers=((5,),), vit_pp_layers=((3,),), tp_size=tp)
    ADAPTERS.prepare_hf_to_mm(save_adapter(tmp_path / "hf", made), tmp_path / "mm", layout).run()
    for t in range(tp):
        held = rank_file(tmp_path / "mm", f"mp_rank_{t:02d}")["model"]
        assert len(held) == 2 * len(LANGUAGE + VISION)
        for module in LANGUAGE + VISION:
            a, b = (held[f"{megatron_name(module)}.lora_{half}.default.weight"] for half in "AB")
            assert torch.equal(b @ a, slice_of(whole_change(made, module), module, tp, t))
            assert RANK in (a.shape[0], b.shape[1])


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("rename", [str, new_tensor_name], ids=["old names", "new names"])
def test_there_and_back(tmp_path: Path, layout: Layout, rename: type) -> None:
    hf = save_adapter(tmp_path / "hf", adapter(LANGUAGE + VISION), rename=rename)
    ADAPTERS.prepare_hf_to_mm(hf, tmp_path / "mm", layout).run()
    ADAPTERS.prepare_mm_to_hf(tmp_path / "mm", tmp_path / "back", template=hf).run()
    before, after = saved(hf), saved(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    told = [json.loads((folder / "adapter_config.json").read_text()) for folder in (hf, tmp_path / "back")]
    assert told[0] == told[1]


@pytest.mark.parametrize("prefix", ["base_model.model.", "", "thinker."])
def test_prefix_and_new_names_without_a_template(make_model: MakeModel, tmp_path: Path, prefix: str) -> None:
    made = adapter(LANGUAGE)
    hf = save_adapter(tmp_path / "hf", made, prefix=prefix)
    options = AdapterOptions(base_dir=make_model("base"), model_prefix=prefix, new_names=True)
    converter = AdapterConverter(family=FAMILY, options=options)
    converter.prepare_hf_to_mm(hf, tmp_path / "mm", ONE).run()
    converter.prepare_mm_to_hf(tmp_path / "mm", tmp_path / "back").run()
    assert saved(tmp_path / "back").keys() == {prefix + new_tensor_name(name) for name in made}


def test_layers_without_an_adapter_need_the_layout(tmp_path: Path) -> None:
    modules = [module for module in LANGUAGE if ".layers.0." in module or ".layers.3." in module]
    hf = save_adapter(tmp_path / "hf", adapter(modules))
    layout = LAYOUTS["tp2 pp2"]
    ADAPTERS.prepare_hf_to_mm(hf, tmp_path / "mm", layout).run()
    with pytest.raises(LayoutError, match="not every layer has an adapter"):
        ADAPTERS.prepare_mm_to_hf(tmp_path / "mm", tmp_path / "back", template=hf)
    with pytest.raises(LayoutError, match="given"):
        ADAPTERS.prepare_mm_to_hf(tmp_path / "mm", tmp_path / "back", template=hf, layout=ONE)
    ADAPTERS.prepare_mm_to_hf(tmp_path / "mm", tmp_path / "back", template=hf, layout=layout).run()
    assert all(torch.equal(t, saved(tmp_path / "back")[name]) for name, t in saved(hf).items())


def test_a_vision_part_on_fewer_ranks_is_seen(tmp_path: Path) -> None:
    hf = save_adapter(tmp_path / "hf", adapter(LANGUAGE + VISION))
    layout = Layout(llm_pp_layers=((5,),), vit_pp_layers=((3,),), tp_size=4, vit_tp_size=2)
    ADAPTERS.prepare_hf_to_mm(hf, tmp_path / "mm", layout).run()
    ADAPTERS.prepare_mm_to_hf(tmp_path / "mm", tmp_path / "back", template=hf).run()
    assert all(torch.equal(t, saved(tmp_path / "back")[name]) for name, t in saved(hf).items())


@pytest.mark.parametrize("module", ["lm_head", "visual.merger.mlp.0", "model.embed_tokens"])
def test_adapters_without_a_place_are_named_and_left_out_only_on_request(tmp_path: Path, module: str) -> None:
    made = adapter(LANGUAGE)
    hf = save_adapter(tmp_path / "hf", made | adapter([module]))
    with pytest.raises(CheckpointError, match=rf"2 tensors.*{re.escape(module)}\.lora_A\.weight.*allow_unused"):
        ADAPTERS.prepare_hf_to_mm(hf, tmp_path / "mm", ONE)
    options = AdapterOptions(allow_unused=[f"*{module}.lora_*"])
    conversion = AdapterConverter(family=FAMILY, options=options).prepare_hf_to_mm(hf, tmp_path / "mm", ONE)
    assert len(conversion.run().sources) == len(made)
    assert len(conversion.target.options["unused"]) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"use_dora": True}, "use_dora"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"bias": "all"}, 'bias "all"'),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save.*merge_lora_to_base takes it"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"of_a_later_version": 1}, "of_a_later_version"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"r": RANK + 1}, f"rank {RANK}.*says {RANK + 1}"),
        ({"rank_pattern": {"q_proj": 7}}, f"q_proj.lora_A.weight has rank {RANK}.*says 7"),
        ({"rank_pattern": {"(": 7}}, "no regular expression"),
    ],
)
def test_what_is_no_plain_lora_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    hf = save_adapter(tmp_path / "hf", adapter(LANGUAGE), **change)
    with pytest.raises(CheckpointError, match=words):
        ADAPTERS.prepare_hf_to_mm(hf, tmp_path / "mm", ONE)


def test_half_an_adapter_is_refused(tmp_path: Path) -> None:
    made = adapter(LANGUAGE)
    del made["model.layers.3.self_attn.k_proj.lora_B.weight"]
    with pytest.raises(CheckpointError, match=r"only one of lora_A and lora_B.*layers\.3\.self_attn\.k_proj"):
        ADAPTERS.prepare_hf_to_mm(save_adapter(tmp_path / "hf", made), tmp_path / "mm", ONE)


@pytest.mark.parametrize("shape", [(), (4,), (RANK, 3, 2, 2, 2)])
def test_an_adapter_that_is_no_matrix_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    made = adapter(LANGUAGE)
    made["visual.patch_embed.proj.lora_A.weight"] = torch.zeros(shape)
    made["visual.patch_embed.proj.lora_B.weight"] = torch.zeros(8, RANK, 1, 1, 1)
    with pytest.raises(CheckpointError, match=r"no matrices.*patch_embed\.proj"):
        ADAPTERS.prepare_hf_to_mm(save_adapter(tmp_path / "hf", made), tmp_path / "mm", ONE)


def test_a_replica_of_lora_a_that_differs_is_found(tmp_path: Path) -> None:
    layout = Layout(llm_pp_layers=((5,),), tp_size=2, vit_pp_layers=((3,),))
    hf = save_adapter(tmp_path / "hf", adapter(LANGUAGE + VISION))
    ADAPTERS.prepare_hf_to_mm(hf, tmp_path / "mm", layout).run()
    path = tmp_path / "mm/release/mp_rank_01/model_optim_rng.pt"
    content = torch.load(path, weights_only=True)
    content["model"]["text_decoder.decoder.layers.2.mlp.gate_proj.lora_A.default.weight"][0, 0] += 1
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.gate_proj\.lora_A\.default\.weight.*must equal"):
        ADAPTERS.prepare_mm_to_hf(tmp_path / "mm", tmp_path / "back", template=hf).run()
    assert not (tmp_path / "back").exists()


def test_the_base_model_is_found_where_the_adapter_names_it(make_model: MakeModel, tmp_path: Path) -> None:
    made = adapter(LANGUAGE)
    nowhere = save_adapter(tmp_path / "a", made, with_base=False, base_model_name_or_path="Qwen/Qwen2.5-VL-7B-Instruct")
    with pytest.raises(ModelError, match="base_dir"):
        ADAPTERS.prepare_hf_to_mm(nowhere, tmp_path / "mm", ONE)
    named = save_adapter(tmp_path / "b", made, with_base=False, base_model_name_or_path=str(make_model("base")))
    ADAPTERS.prepare_hf_to_mm(named, tmp_path / "mm", ONE).run()


def test_a_made_configuration_matches_the_adapted_modules_and_no_others(make_model: MakeModel, tmp_path: Path) -> None:
    modules = [m for m in LANGUAGE if "q_proj" in m or ".layers.1.mlp." in m] + [m for m in VISION if "attn.proj" in m]
    hf = save_adapter(tmp_path / "hf", adapter(modules))
    base = make_model("base")
    converter = AdapterConverter(family=FAMILY, options=AdapterOptions(base_dir=base, alpha=5, rslora=True))
    converter.prepare_hf_to_mm(hf, tmp_path / "mm", ONE).run()
    (tmp_path / "mm/adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match="lora_alpha"):
        AdapterConverter(family=FAMILY, options=AdapterOptions(base_dir=base)).prepare_mm_to_hf(
            tmp_path / "mm", tmp_path / "back"
        )
    converter.prepare_mm_to_hf(tmp_path / "mm", tmp_path / "back").run()
    config = json.loads((tmp_path / "back/adapter_config.json").read_text())
    everything = {name.removesuffix(".weight") for name in tensors()}
    # PEFT takes a string for a regular expression that must match a module's whole name.
    assert {name for name in everything if re.fullmatch(config["target_modules"], name)} == set(modules)
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (RANK, 5, True)


@pytest.mark.parametrize(
    ("config", "module", "scale"),
    [
        ({"r": 8, "lora_alpha": 16}, "model.layers.0.mlp.up_proj", 2.0),
        ({"r": 8, "lora_alpha": 16, "use_rslora": True}, "model.layers.0.mlp.up_proj", 16 / sqrt(8)),
        ({"r": 8, "lora_alpha": 16, "rank_pattern": {"up_proj": 4}}, "model.layers.0.mlp.up_proj", 4.0),
        ({"r": 8, "lora_alpha": 16, "alpha_pattern": {r"layers\.0\.mlp\.\w+": 4}}, "model.layers.0.mlp.up_proj", 0.5),
        # Whole components only, and from the beginning where the pattern says so.
        (
            {"r": 8, "lora_alpha": 16, "alpha_pattern": {"proj": 4, "^layers.0.mlp.up_proj": 4}},
            "model.layers.0.mlp.up_proj",
            2,
        ),
    ],
)
def test_scale(config: dict[str, object], module: str, scale: float) -> None:
    assert numbers(config).scale(module) == scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merging_rounds_once_and_leaves_the_rest(make_model: MakeModel, tmp_path: Path, dtype: torch.dtype) -> None:
    base = make_model("base", **{name: tensor.to(dtype) for name, tensor in tensors().items()})
    modules = ["model.layers.2.self_attn.k_proj", "visual.blocks.0.mlp.down_proj", "lm_head"]
    made = adapter(modules)
    hf = save_adapter(tmp_path / "lora", made)
    Merger(adapters=ADAPTERS).prepare(base, hf, tmp_path / "merged").run()
    before, after = hugging_face(base), hugging_face(tmp_path / "merged")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        module = name.removesuffix(".weight")
        if module in modules:
            # Exact in float64; 3 over the rank is the scale.
            exact = tensor.double() + whole_change(made, module).double() * 3 / RANK
            expected = exact.float().to(dtype)
            assert not torch.equal(tensor, expected)
        else:
            expected = tensor
        assert torch.equal(after[name], expected)
    assert (tmp_path / "merged/tokenizer.json").is_file()


@pytest.mark.parametrize("canonical", [False, True])
@pytest.mark.parametrize(
    "modules", [LANGUAGE + VISION, ["model.layers.1.self_attn.v_proj", "visual.blocks.2.attn.qkv"]]
)
def test_merging_megatron_folders_is_merging_hugging_face_folders(
    make_model: MakeModel, tmp_path: Path, canonical: bool, modules: list[str]
) -> None:
    base, layout = make_model("base"), LAYOUTS["tp4 vpp2"]
    converter = Converter(family=FAMILY, canonical=canonical)
    hf = save_adapter(tmp_path / "lora", adapter(modules))
    merger = Merger(adapters=ADAPTERS)
    merger.prepare(base, hf, tmp_path / "merged").run()
    converter.hf_to_mm(tmp_path / "merged", tmp_path / "expected", layout)
    converter.hf_to_mm(base, tmp_path / "mm", layout)
    merger.prepare(tmp_path / "mm", hf, tmp_path / "merged_mm").run()
    for file in sorted((tmp_path / "expected").rglob("*.pt")):
        again = tmp_path / "merged_mm" / file.relative_to(tmp_path / "expected")
        assert again.read_bytes() == file.read_bytes()


IN_FULL = [
    "lm_head.weight", "model.norm.weight", "visual.merger.mlp.0.weight", "visual.merger.mlp.0.bias",
    "model.layers.3.self_attn.k_proj.weight", "model.layers.3.self_attn.k_proj.bias",
]  # fmt: skip
SAVED = ["lm_head", "norm", "visual.merger", "layers.3.self_attn.k_proj"]


def in_full(names: list[str], seed: int = 5) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tensors()[name].shape, generator=generator) for name in names}


@pytest.mark.parametrize("rename", [str, new_name], ids=["old names", "new names"])
def test_layers_that_were_trained_in_full_take_the_places_of_the_bases(
    make_model: MakeModel, tmp_path: Path, rename: Callable[[str], str]
) -> None:
    """In the base's own type, from a folder in float32; in every layout."""
    base = make_model("base", **{name: tensor.bfloat16() for name, tensor in tensors().items()})
    modules, trained = LANGUAGE[:5], in_full(IN_FULL)
    plain = save_adapter(tmp_path / "plain", adapter(modules))
    hf = save_adapter(tmp_path / "lora", adapter(modules) | trained, modules_to_save=SAVED)
    if rename is not str:
        hf = save_adapter(
            tmp_path / "new",
            {new_tensor_name(name): tensor for name, tensor in adapter(modules).items()}
            | {f"{new_name(name.rpartition('.')[0])}.{name.rpartition('.')[2]}": t for name, t in trained.items()},
            modules_to_save=SAVED,
        )
    merger = Merger(adapters=ADAPTERS)
    merger.prepare(base, plain, tmp_path / "without").run()
    merger.prepare(base, hf, tmp_path / "merged").run()
    before, after = hugging_face(tmp_path / "without"), hugging_face(tmp_path / "merged")
    for name, tensor in before.items():
        assert torch.equal(after[name], trained[name].bfloat16() if name in trained else tensor), name
    converter, layout = Converter(family=FAMILY), LAYOUTS["tp4 vpp2"]
    converter.hf_to_mm(tmp_path / "merged", tmp_path / "expected", layout)
    converter.hf_to_mm(base, tmp_path / "mm", layout)
    merger.prepare(tmp_path / "mm", hf, tmp_path / "merged_mm").run()
    for file in sorted((tmp_path / "expected").rglob("*.pt")):
        assert (tmp_path / "merged_mm" / file.relative_to(tmp_path / "expected")).read_bytes() == file.read_bytes()


def test_one_weight_at_both_ends_is_kept_one(make_model: MakeModel, tmp_path: Path) -> None:
    """PEFT saves embedding and output layer of a tied model both; without ``ensure_weight_tying`` they differ."""
    base = make_model("base", tied=True)
    ends = in_full(["model.embed_tokens.weight"])
    ends["lm_head.weight"] = ends["model.embed_tokens.weight"].clone()
    merger = Merger(adapters=ADAPTERS)
    saved_layers: dict[str, Any] = {"modules_to_save": ["embed_tokens", "lm_head"]}
    apart = save_adapter(tmp_path / "apart", adapter(LANGUAGE) | ends, **saved_layers)
    with pytest.raises(CheckpointError, match=r"no weights for 1 .*lm_head\.weight"):
        merger.prepare(base, apart, tmp_path / "merged")
    for number, layers in enumerate((["embed_tokens", "lm_head"], ["embed_tokens"])):
        options: dict[str, Any] = {"modules_to_save": layers, "ensure_weight_tying": True}
        tied = save_adapter(tmp_path / f"tied{number}", adapter(LANGUAGE) | ends, **options)
        merger.prepare(base, tied, tmp_path / f"merged{number}").run()
        merged = hugging_face(tmp_path / f"merged{number}")
        assert torch.equal(merged["model.embed_tokens.weight"], ends["model.embed_tokens.weight"])


def test_what_no_module_to_save_names_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    made = adapter(LANGUAGE) | in_full(["lm_head.weight", "model.norm.weight"])
    hf = save_adapter(tmp_path / "hf", made, modules_to_save=["lm_head"])
    with pytest.raises(CheckpointError, match=r"more than lora_A and lora_B: .*norm\.weight"):
        Merger(adapters=ADAPTERS).prepare(make_model("base"), hf, tmp_path / "merged")
    made["lm_head.weight"] = made["lm_head.weight"][:, :-1].contiguous()
    del made["model.norm.weight"]
    wrong = save_adapter(tmp_path / "wrong", made, modules_to_save=["lm_head"])
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is F32.*another model's"):
        Merger(adapters=ADAPTERS).prepare(make_model("base2"), wrong, tmp_path / "merged")


def test_merging_goes_on_only_with_the_same_adapter(make_model: MakeModel, tmp_path: Path) -> None:
    base, merger = make_model("base"), Merger(adapters=ADAPTERS)
    first, second = (save_adapter(tmp_path / str(n), adapter(LANGUAGE, seed=n)) for n in (1, 2))
    merger.prepare(base, first, tmp_path / "merged").run()
    made = (tmp_path / "merged/manifest.json").stat().st_mtime_ns
    merger.prepare(base, first, tmp_path / "merged").run(resume=True)
    assert (tmp_path / "merged/manifest.json").stat().st_mtime_ns == made
    merger.prepare(base, second, tmp_path / "merged").run(resume=True, overwrite=True)
    merger.prepare(base, second, tmp_path / "fresh").run()
    for file in sorted((tmp_path / "fresh").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "merged" / file.name).read_bytes()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"lora_rank": 5}, r"lora_rank 5.*has \[2\]"),
        ({"lora_alpha": 16.0}, "lora_alpha 16.*says 3"),
    ],
)
def test_merging_checks_what_is_given(make_model: MakeModel, tmp_path: Path, given: dict[str, Any], words: str) -> None:
    hf = save_adapter(tmp_path / "lora", adapter(LANGUAGE))
    options = MergeLoraToBase(
        source_path=str(make_model("base")), lora_path=str(hf), target_path=str(tmp_path / "merged"), **given
    )
    with pytest.raises(CheckpointError, match=words):
        options.prepare(Converter(family=FAMILY), NO_OPTIONS)


def test_merging_refuses_another_models_adapter(make_model: MakeModel, tmp_path: Path) -> None:
    made = adapter(LANGUAGE)
    made["model.layers.9.self_attn.q_proj.lora_A.weight"] = made[
        "model.layers.0.self_attn.q_proj.lora_A.weight"
    ].clone()
    made["model.layers.9.self_attn.q_proj.lora_B.weight"] = made[
        "model.layers.0.self_attn.q_proj.lora_B.weight"
    ].clone()
    with pytest.raises(CheckpointError, match=r"no weights for 1 adapters.*layers\.9"):
        Merger(adapters=ADAPTERS).prepare(make_model("base"), save_adapter(tmp_path / "a", made), tmp_path / "merged")
    made = adapter(["model.layers.0.self_attn.q_proj"])
    made = {name: t[:, :-1] if "lora_A" in name else t for name, t in made.items()}
    wrong = save_adapter(tmp_path / "b", {name: t.contiguous() for name, t in made.items()})
    with pytest.raises(CheckpointError, match="another model"):
        Merger(adapters=ADAPTERS).prepare(make_model("base2"), wrong, tmp_path / "merged")


def test_options_of_the_commands(make_model: MakeModel, tmp_path: Path) -> None:
    hf = save_adapter(tmp_path / "hf", adapter(LANGUAGE + VISION))
    converter = Converter(family=FAMILY)
    layout: dict[str, Any] = {"llm_pp_layers": [[2, 3]], "vit_pp_layers": [[3, 0]], "tp_size": 2}
    LoraHfToMm(
        mm_dir=str(tmp_path / "mm"), hf_config=AdapterConfig(hf_dir=str(hf)), parallel_config=ParallelConfig(**layout)
    ).prepare(converter, NO_OPTIONS).run()
    LoraMmToHf(
        save_hf_dir=str(tmp_path / "back"),
        mm_dir=str(tmp_path / "mm"),
        hf_config=OptionalHfConfig(hf_dir=str(hf)),
        parallel_config=GivenParallelConfig(**layout),
    ).prepare(converter, NO_OPTIONS).run()
    assert all(torch.equal(t, saved(tmp_path / "back")[name]) for name, t in saved(hf).items())
    fused = LoraHfToMm(
        mm_dir=str(tmp_path / "mm2"),
        hf_config=AdapterConfig(hf_dir=str(hf)),
        parallel_config=ParallelConfig(**layout),
        common_model_config=AdapterStructure(enable_canonical_hf_struct=False),
    )
    with pytest.raises(ModelError, match="canonical structure only"):
        fused.prepare(converter, NO_OPTIONS)


def test_published_lines(make_model: MakeModel, tmp_path: Path) -> None:
    """Rank and alpha stand beside --cfg; options of no effect are understood."""
    peft = save_adapter(tmp_path / "peft", adapter(LANGUAGE))
    line = ["lora_hf_to_mm", "--cfg.mm_dir", str(tmp_path / "mm"), "--cfg.hf_config.hf_dir", str(peft)]
    line += ["--cfg.parallel_config.llm_pp_layers", "[[2,3]]", "--cfg.parallel_config.vit_pp_layers", "[[3,0]]"]
    line += ["--cfg.common_model_config.enable_canonical_hf_struct", "true", "--cfg.save_vit_only", "false"]
    line += ["--cfg.common_model_config.model_prefix", "base_model.model.", "--cfg.llm_hf_config.hf_dir", "null"]
    assert main(["Qwen2_5_VLConverter", *line]) == 0
    line = ["merge_lora_to_base", "--cfg.source_path", str(make_model()), "--cfg.lora_path", str(peft)]
    line += ["--lora_alpha", "3", "--use_npu=true"]
    assert main(["Qwen2_5_VLConverter", *line, "--cfg.target_path", str(tmp_path / "a"), "--lora_rank", "2"]) == 0
    assert main(["Qwen2_5_VLConverter", *line, "--cfg.target_path", str(tmp_path / "b"), "--lora_rank=8"]) == 2


def test_wan_adapters_under_the_original_names(tmp_path: Path) -> None:
    folder = tmp_path / "lora"
    made: Tensors = {}
    for i in range(3):
        for part in "qkvo":
            made[f"blocks.{i}.self_attn.{part}.lora_A.weight"] = torch.randn(RANK, 8)
            made[f"blocks.{i}.self_attn.{part}.lora_B.weight"] = torch.randn(8, RANK)
    save_adapter(folder, made, prefix="diffusion_model.", with_base=False)
    (folder / "config.json").write_text(json.dumps({"model_type": "t2v", "num_layers": 3}))
    layout = Layout(llm_pp_layers=((1, 2),))
    AdapterConverter(family=WAN).prepare_hf_to_mm(folder, tmp_path / "mm", layout).run()
    held = rank_file(tmp_path / "mm", "mp_rank_00_001")["model"]
    for j, i in enumerate((1, 2)):
        for part, name in (("q", "proj_q"), ("k", "proj_k"), ("v", "proj_v"), ("o", "proj_out")):
            for half in "AB":
                ours = held[f"blocks.{j}.self_attn.{name}.lora_{half}.default.weight"]
                assert torch.equal(ours, made[f"blocks.{i}.self_attn.{part}.lora_{half}.weight"])
    assert len(held) == 16
