"""Every further model against its published layout, written anew with whole tensors, and there and back."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import reference_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_models import Recorded, load_hf
from reference_models import Lists, Published
from tiny_checkpoint import Tensors, new_names

from mm_convert import CONVERTERS, Converter, Layout, LayoutError, MegatronFolder, Plan, Ref, Spec, relate
from mm_convert.stacked import unstacked
from mm_convert.support import support_table

QWEN2_VL = ("Qwen2VLConverter", "qwen2_vl", reference_models.QWEN2_VL)
QWEN3_VL = ("Qwen3VLMegatronConverter", "qwen3_vl", reference_models.QWEN3_VL)
QWEN2_5 = ("Qwen2_5Converter", "qwen2", reference_models.QWEN2_5)
QWEN3 = ("Qwen3Converter", "qwen3", reference_models.QWEN3)

ALL = {model[1]: model[0] for model in (QWEN2_VL, QWEN3_VL, QWEN2_5, QWEN3)} | {
    "qwen2_5_vl": "Qwen2_5_VLConverter",
    "qwen3_moe": "Qwen3Converter",
    "qwen3_vl_moe": "Qwen3VLMegatronConverter",
}

CUTS = [(1, False), (2, True)]  # tensor-parallel size; output layer tied
# Uneven and empty stages, and virtual ones, at one, two and four pipeline ranks.
LLM = [  # of 5 layers
    [[5]],
    [[2], [3]],
    [[2, 3]],
    [[0, 5]],
    [[0, 1], [2, 2]],
    [[1, 2, 0, 2]],
    [[0, 0, 0, 1], [2, 0, 1, 1]],
]
VIT = {  # by the number of layers
    3: [[[3]], [[3], [0]], [[3, 0]], [[2, 1]], [[3, 0], [0, 0]], [[1, 0, 2, 0]], [[1, 1, 0, 1], [0, 0, 0, 0]]],
    4: [[[4]], [[3], [1]], [[4, 0]], [[2, 2]], [[2, 0], [2, 0]], [[1, 0, 2, 1]], [[1, 1, 0, 2], [0, 0, 0, 0]]],
}


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def check_there_and_back(
    converter: str, published: Published, hf: Path, canonical: Tensors, llm: Lists, vit: Lists, tp: int, tmp_path: Path
) -> None:
    """Compare every tensor of every rank with the reference, then come back."""
    layout = Layout(llm_pp_layers=llm, vit_pp_layers=vit, tp_size=tp)  # type: ignore[arg-type]
    Converter.named(converter).hf_to_mm(hf, tmp_path / "mm", layout)
    for (t, p, v), stage in reference_models.megatron(published, canonical, llm, vit, tp).items():
        file = torch.load(tmp_path / "mm/release" / layout.rank_dir(t, p) / "model_optim_rng.pt", weights_only=True)
        assert same(file["model" if len(llm) == 1 else f"model{v}"], stage)
    assert MegatronFolder.open(tmp_path / "mm").layout == layout
    Converter.named(converter).mm_to_hf(tmp_path / "mm", hf, tmp_path / "back")
    for path in hf.glob("*.safetensors"):
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(("tp", "tied"), CUTS)
@pytest.mark.parametrize("number", range(len(LLM)))
@pytest.mark.parametrize("model", [QWEN2_VL, QWEN3_VL], ids=lambda model: model[1])
def test_vision_language(model: tuple[str, str, Published], tied: bool, number: int, tp: int, tmp_path: Path) -> None:
    converter, name, published = model
    recorded = Recorded.named(name)
    hf = (recorded.tied() if tied else recorded).write(tmp_path / "hf")
    vit = VIT[recorded.config["vision_config"]["depth"]][number]
    check_there_and_back(converter, published, hf, load_hf(hf), LLM[number], vit, tp, tmp_path)


@pytest.mark.parametrize(("tp", "tied"), CUTS)
@pytest.mark.parametrize("llm", LLM)
@pytest.mark.parametrize("model", [QWEN2_5, QWEN3], ids=lambda model: model[1])
def test_text(model: tuple[str, str, Published], tied: bool, llm: Lists, tp: int, tmp_path: Path) -> None:
    converter, name, published = model
    recorded = Recorded.named(name)
    hf = (recorded.tied() if tied else recorded).write(tmp_path / "hf")
    no_vision = [[0] * len(row) for row in llm]
    check_there_and_back(converter, published, hf, load_hf(hf), llm, no_vision, tp, tmp_path)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_every_layout_of_every_model_is_total_both_ways(data: st.DataObject) -> None:
    name, converter = data.draw(st.sampled_from(sorted(ALL.items())))
    recorded = Recorded.named(name)
    recorded = recorded.tied() if data.draw(st.booleans()) else recorded
    pp, vpp, tp = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2, 4]))

    def lists(total: int) -> tuple[tuple[int, ...], ...]:
        cuts = sorted(data.draw(st.lists(st.integers(0, total), min_size=pp * vpp - 1, max_size=pp * vpp - 1)))
        counts = [b - a for a, b in pairwise([0, *cuts, total])]
        return tuple(tuple(counts[v * pp : (v + 1) * pp]) for v in range(vpp))

    family = CONVERTERS[converter]
    sizes = family.sizes(recorded.config)
    layout = Layout(
        llm_pp_layers=lists(sizes.llm_layers),
        vit_pp_layers=lists(sizes.vit_layers),
        tp_size=tp,
        ep_size=data.draw(st.sampled_from([1, 2, 4])) if sizes.experts else 1,
        vit_tp_size=data.draw(st.sampled_from([0, 1])),
        ldt=data.draw(st.booleans()),
    )
    saved = {Ref("", "", name): Spec("BF16", tuple(shape)) for name, shape in recorded.saved.items()}
    sources = unstacked(saved, family.stacked)
    targets, segments = relate(family, sizes, layout, sources)
    plan = Plan.build(sources, targets, segments)
    back = Plan.build(targets, sources, [segment.reversed() for segment in segments])
    assert plan.targets.keys() == back.sources.keys()
    assert back.nbytes == sum(spec.nbytes for spec in sources.values())


def test_qwen2_vl_under_the_names_of_memory_and_with_a_flat_config(tmp_path: Path) -> None:
    hf = Recorded.named("qwen2_vl").flat().write(tmp_path / "hf", in_memory=True)
    held = load_hf(hf)
    assert new_names(dict.fromkeys(Recorded.named("qwen2_vl").saved, torch.empty(0))).keys() == held.keys()
    published = {old: held[new] for old in Recorded.named("qwen2_vl").saved for new in new_names({old: torch.empty(0)})}
    check_there_and_back(QWEN2_VL[0], QWEN2_VL[2], hf, published, [[2, 3]], [[3, 0]], 2, tmp_path)


def test_a_vision_model_without_vision_layers_is_refused(tmp_path: Path) -> None:
    recorded = Recorded.named("qwen2_vl")
    config = recorded.config | {"vision_config": {"depth": 0, "num_heads": 4}}
    hf = Recorded(config, recorded.saved, recorded.in_memory).write(tmp_path / "hf")
    with pytest.raises(LayoutError, match=r"image_encoder.* needs a stage with vit layers"):
        Converter.named("Qwen2VLConverter").hf_to_mm(hf, tmp_path / "mm", Layout(llm_pp_layers=((5,),)))


@pytest.mark.parametrize("in_memory", [False, True])
def test_qwen2_5_vl_has_the_names_of_transformers(in_memory: bool, tmp_path: Path) -> None:
    hf = Recorded.named("qwen2_5_vl").write(tmp_path / "hf", in_memory=in_memory)
    converter = Converter.named("Qwen2_5_VLConverter")
    converter.hf_to_mm(hf, tmp_path / "mm", Layout(llm_pp_layers=((2, 3),), vit_pp_layers=((3, 0),), tp_size=2))
    converter.mm_to_hf(tmp_path / "mm", hf, tmp_path / "back")
    assert same(load_hf(tmp_path / "back"), load_hf(hf))


def test_vision_layers_of_a_text_model_are_refused(tmp_path: Path) -> None:
    hf = Recorded.named("qwen3").write(tmp_path / "hf")
    layout = Layout(llm_pp_layers=((5,),), vit_pp_layers=((1,),))
    with pytest.raises(LayoutError, match=r"sum to 1, but the model has 0 vit layers.* \[\[0\]\] would fit"):
        Converter.named("Qwen3Converter").hf_to_mm(hf, tmp_path / "mm", layout)


def test_the_readme_has_the_table_of_what_is_supported() -> None:
    """After a change: ``python -c "from mm_convert.support import support_table; print(support_table())"``."""
    assert support_table() in (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("converter", ["InternVLConverter", "Qwen2_5_OmniConverter"])
def test_a_structure_that_a_model_does_not_have_is_refused(converter: str, tmp_path: Path) -> None:
    name = {"InternVLConverter": "internvl", "Qwen2_5_OmniConverter": "qwen2_5_omni"}[converter]
    hf = Recorded.named(name).write(tmp_path / "hf")
    with pytest.raises(LayoutError, match="enable_canonical_hf_struct"):
        Converter.named(converter, canonical=True).hf_to_mm(hf, tmp_path / "mm", None)
