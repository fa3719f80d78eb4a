"""The canonical structure: nothing fused, and a vision attention whose ranks hold ``[q_t; k_t; v_t]``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from recorded_models import Recorded
from safetensors.torch import load_file
from tiny_checkpoint import MakeModel, Tensors, tensors
from torch import Tensor

from mm_convert import Converter, Layout, LayoutError, ModelError, verify
from mm_convert.distributed.torch_dist import prepare_mm_to_torch_dist
from mm_convert.families.canonical import is_canonical

CANONICAL = Converter.named("Qwen2_5_VLConverter", canonical=True)
FUSED = Converter.named("Qwen2_5_VLConverter")
LAYOUTS = {
    "tp1": Layout(llm_pp_layers=((5,),), vit_pp_layers=((3,),)),
    "tp2 pp2": Layout(llm_pp_layers=((2, 3),), vit_pp_layers=((3, 0),), tp_size=2),
    "tp4 vpp2": Layout(llm_pp_layers=((0, 2), (2, 1)), vit_pp_layers=((2, 1), (0, 0)), tp_size=4),
}
APART = [
    *(f"self_attention.{p}_proj.{kind}" for p in "qkv" for kind in ("weight", "bias")),
    *(f"mlp.{p}_proj.weight" for p in ("gate", "up")),
]


def rank_file(folder: Path, rank: str) -> dict[str, Tensors]:
    found: dict[str, Tensors] = torch.load(folder / "release" / rank / "model_optim_rng.pt", weights_only=True)
    return found


def hugging_face(folder: Path) -> Tensors:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def third_of_each(stacked: Tensor, tp: int, t: int) -> Tensor:
    """Rank t's heads of the queries, then of the keys, then of the values."""
    return torch.cat([part.chunk(tp)[t] for part in stacked.chunk(3)])


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_rank_holds_its_slice_of_each_projection(make_model: MakeModel, tmp_path: Path, tp: int) -> None:
    layout = Layout(llm_pp_layers=((5,),), vit_pp_layers=((3,),), tp_size=tp)
    CANONICAL.hf_to_mm(make_model(), tmp_path / "mm", layout)
    hf = tensors()
    for t in range(tp):
        held = rank_file(tmp_path / "mm", f"mp_rank_{t:02d}")["model"]
        for i in range(5):
            ours = f"text_decoder.decoder.layers.{i}."
            for name in APART:
                theirs = name.replace("self_attention", "self_attn")
                expected = hf[f"model.layers.{i}.{theirs}"].chunk(tp)[t]
                assert torch.equal(held[ours + name], expected)
            assert ours + "self_attention.linear_qkv.weight" not in held
            assert ours + "mlp.linear_fc1.weight" not in held
        for i in range(3):
            ours, theirs = f"image_encoder.encoder.blocks.layers.{i}.", f"visual.blocks.{i}."
            for kind in ("weight", "bias"):
                expected = third_of_each(hf[f"{theirs}attn.qkv.{kind}"], tp, t)
                assert torch.equal(held[f"{ours}self_attention.linear_qkv.{kind}"], expected)
                for p in ("gate_proj", "up_proj"):
                    expected = hf[f"{theirs}mlp.{p}.{kind}"].chunk(tp)[t]
                    assert torch.equal(held[f"{ours}mlp.{p}.{kind}"], expected)


def test_what_is_not_fused_is_the_same_in_both_structures(make_model: MakeModel, tmp_path: Path) -> None:
    hf = make_model()
    held = {}
    for name, converter in (("canonical", CANONICAL), ("fused", FUSED)):
        converter.hf_to_mm(hf, tmp_path / name, LAYOUTS["tp2 pp2"])
        held[name] = rank_file(tmp_path / name, "mp_rank_01_000")["model"]
    both = held["canonical"].keys() & held["fused"].keys()
    assert all(torch.equal(held["canonical"][n], held["fused"][n]) for n in both if "linear_qkv" not in n)
    assert {n.split(".")[-2] for n in held["fused"].keys() - both} == {"linear_qkv", "linear_fc1"}
    assert {n.split(".")[-2] for n in held["canonical"].keys() - both} == {
        *("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    }


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("tied", [False, True])
def test_the_way_back_needs_no_word_about_the_structure(
    make_model: MakeModel, tmp_path: Path, layout: Layout, tied: bool
) -> None:
    hf = make_model(tied=tied)
    CANONICAL.hf_to_mm(hf, tmp_path / "mm", layout)
    FUSED.mm_to_hf(tmp_path / "mm", hf, tmp_path / "back")
    before, after = hugging_face(hf), hugging_face(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_resplit_keeps_the_structure(make_model: MakeModel, tmp_path: Path) -> None:
    hf, first, second = make_model(), LAYOUTS["tp2 pp2"], LAYOUTS["tp4 vpp2"]
    CANONICAL.hf_to_mm(hf, tmp_path / "mm", first)
    CANONICAL.resplit(tmp_path / "mm", tmp_path / "again", second, hf_dir=hf)
    CANONICAL.hf_to_mm(hf, tmp_path / "direct", second)
    files = sorted(path.relative_to(tmp_path / "direct") for path in (tmp_path / "direct").rglob("*.pt"))
    assert len(files) == 8
    for file in files:
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "direct" / file).read_bytes()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("text_decoder.decoder.layers.0.self_attention.q_proj.weight", True),
        ("image_encoder.encoder.blocks.layers.3.mlp.up_proj.bias", True),
        ("text_decoder.decoder.layers.0.self_attention.linear_qkv.weight", False),
        # GLM's merger has a gate of its own in either structure.
        ("image_encoder.projector.gate_proj.weight", False),
    ],
)
def test_structure_is_told_by_names(name: str, expected: bool) -> None:
    assert is_canonical(["text_decoder.decoder.final_layernorm.weight", name]) is expected


def test_the_same_model_fused_and_apart_is_compared_only_where_heads_are_known(
    make_model: MakeModel, tmp_path: Path
) -> None:
    """A fused matrix is dealt out by heads, and one that stands apart by rows: without the heads, bytes say nothing."""
    layout = LAYOUTS["tp2 pp2"]
    hf = make_model()
    for name, converter in (("apart", CANONICAL), ("fused", FUSED)):
        converter.hf_to_mm(hf, tmp_path / name, layout)
        assert verify(hf, tmp_path / name).same
    for pair in (("apart", "fused"), ("fused", "apart")):
        with pytest.raises(ModelError, match="compare both with its Hugging Face folder"):
            verify(*(tmp_path / name for name in pair))
    # Qwen3 has norms over one head, which tell.
    hf = Recorded.named("qwen3").write(tmp_path / "qwen3")
    qwen3 = Converter.named("Qwen3Converter")
    qwen3.hf_to_mm(hf, tmp_path / "fused3", Layout(llm_pp_layers=((2, 3),)))
    replace(qwen3, canonical=True).hf_to_mm(hf, tmp_path / "apart3", Layout(llm_pp_layers=((5,),), tp_size=2))
    assert verify(tmp_path / "fused3", tmp_path / "apart3").same


def test_megatron_core_has_no_model_of_this_structure(make_model: MakeModel, tmp_path: Path) -> None:
    hf = make_model()
    CANONICAL.hf_to_mm(hf, tmp_path / "mm", LAYOUTS["tp2 pp2"])
    with pytest.raises(LayoutError, match="mm_to_hf and hf_to_torch_dist"):
        prepare_mm_to_torch_dist(CANONICAL, tmp_path / "mm", tmp_path / "dist", hf_dir=hf)
