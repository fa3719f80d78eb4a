"""Commands that know no model by name work on every model of the table."""

from __future__ import annotations

from pathlib import Path

import pytest
from recorded_models import Recorded
from test_resplit import weights

from mm_convert import CONVERTERS, Converter, Layout, LayoutError, ModelError, inspect, propose, verify

# The recorded tiny models, and their converters.
MODELS = {
    "qwen2_5_vl": "Qwen2_5_VLConverter",
    "qwen2_vl": "Qwen2VLConverter",
    "qwen3_vl": "Qwen3VLMegatronConverter",
    "qwen3_vl_moe": "Qwen3VLMegatronConverter",
    "qwen2": "Qwen2_5Converter",
    "qwen3": "Qwen3Converter",
    "qwen3_moe": "Qwen3Converter",
}
# Tables of models whose folders are of another kind have tests of their own.
ELSEWHERE = {
    *("WanConverter", "HunyuanVideoConverter", "CogVideoConverter"),
    *("InternVLConverter", "Qwen2_5_OmniConverter"),
}


def layouts(hf: Recorded) -> tuple[Layout, Layout]:
    """Two of its layouts: tensor-parallel and virtual stages, and a longer pipeline."""
    depth = hf.config.get("vision_config", {}).get("depth", 0)
    ep_size = 2 if "num_local_experts" in hf.config.get("text_config", hf.config) else 1
    virtual = Layout(llm_pp_layers=((0, 1), (2, 2)), vit_pp_layers=((depth, 0), (0, 0)), tp_size=2, ep_size=ep_size)
    return virtual, Layout(llm_pp_layers=((1, 1, 3),), vit_pp_layers=((depth - depth // 2, depth // 2, 0),))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_resplit_inspect_verify_and_auto(model: str, tied: bool, tmp_path: Path) -> None:
    recorded, converter = Recorded.named(model), MODELS[model]
    hf = (recorded.tied() if tied else recorded).write(tmp_path / "hf")
    chosen, (a, b) = Converter.named(converter), layouts(recorded)
    chosen.hf_to_mm(hf, tmp_path / "a", a)
    chosen.hf_to_mm(hf, tmp_path / "b", b)
    chosen.resplit(tmp_path / "a", tmp_path / "ab", b)
    chosen.resplit(tmp_path / "b", tmp_path / "ba", a, hf_dir=hf)
    assert weights(tmp_path / "ab") == weights(tmp_path / "b")
    assert weights(tmp_path / "ba") == weights(tmp_path / "a")
    for folder in ("hf", "a", "b", "ab", "ba"):
        found = inspect(tmp_path / folder)
        assert found.converters == (converter,)
        assert found.model_type == model
        assert found.tied is tied
        assert Converter.of(tmp_path / folder) == chosen
    assert verify(tmp_path / "a", tmp_path / "b", full=True).same
    assert verify(tmp_path / "ba", hf, full=True).same
    proposed = propose(hf, pp_size=2).layout
    chosen.hf_to_mm(hf, tmp_path / "proposed", proposed)


def test_every_converter_is_tried_here() -> None:
    assert {*MODELS.values(), *ELSEWHERE} == CONVERTERS.keys()


def test_norms_of_query_and_key_tell_the_number_of_heads(tmp_path: Path) -> None:
    """They are over one head (Qwen3), so that a text model needs no config.json to be cut finer."""
    recorded = Recorded.named("qwen3")
    hf, chosen = recorded.write(tmp_path / "hf"), Converter.named("Qwen3Converter")
    heads = recorded.config["num_key_value_heads"]
    fine = Layout(llm_pp_layers=((5,),), tp_size=heads)
    chosen.hf_to_mm(hf, tmp_path / "a", Layout(llm_pp_layers=((5,),)))
    chosen.hf_to_mm(hf, tmp_path / "expected", fine)
    chosen.resplit(tmp_path / "a", tmp_path / "b", fine)
    assert weights(tmp_path / "b") == weights(tmp_path / "expected")
    with pytest.raises(LayoutError, match=f"does not divide num_key_value_heads, {heads}"):
        chosen.resplit(tmp_path / "a", tmp_path / "c", Layout(llm_pp_layers=((5,),), tp_size=2 * heads))


def test_a_folder_of_an_unknown_model_has_no_converter(tmp_path: Path) -> None:
    hf = Recorded.named("qwen3").write(tmp_path / "hf")
    text = (hf / "config.json").read_text().replace('"qwen3"', '"something"')
    (hf / "config.json").write_text(text)
    with pytest.raises(ModelError, match="'something'"):
        Converter.of(hf)
