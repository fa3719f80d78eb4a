"""The README's table of a new model is taken from there and used."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_models import load_hf
from safetensors.torch import save_file

from mm_convert import CheckpointError, Converter, Layout

HIDDEN, LAYERS, GROUPS, HEAD, FFN, VOCAB = 8, 3, 2, 2, 6, 10
SHAPES = {
    "wte.weight": (VOCAB, HIDDEN),
    "ln_f.weight": (HIDDEN,),
    "ln_f.bias": (HIDDEN,),
    "head.weight": (VOCAB, HIDDEN),
    "head.bias": (VOCAB,),
}
LAYER_SHAPES = {
    **{f"ln_{n}.{kind}": (HIDDEN,) for n in (1, 2) for kind in ("weight", "bias")},
    "attn.q.weight": (2 * GROUPS * HEAD, HIDDEN),
    "attn.k.weight": (GROUPS * HEAD, HIDDEN),
    "attn.v.weight": (GROUPS * HEAD, HIDDEN),
    "attn.out.weight": (HIDDEN, 2 * GROUPS * HEAD),
    "attn.out.bias": (HIDDEN,),
    "mlp.gate.weight": (FFN, HIDDEN),
    "mlp.up.weight": (FFN, HIDDEN),
    "mlp.down.weight": (HIDDEN, FFN),
    "mlp.down.bias": (HIDDEN,),
}


@pytest.fixture(scope="module")
def toy() -> Converter:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    match = re.search(r"## A new model\n.*?```python\n(.*?)```", readme, flags=re.DOTALL)
    assert match is not None
    names: dict[str, Any] = {}
    exec(match[1], names)  # noqa: S102  # the README's own code
    converter = names["toy"]
    assert isinstance(converter, Converter)
    return converter


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    directory = tmp_path / "hf"
    directory.mkdir()
    config = {"model_type": "toy", "n_layer": LAYERS, "n_kv_head": GROUPS}
    (directory / "config.json").write_text(json.dumps(config))
    shapes = SHAPES | {f"h.{i}.{name}": shape for i in range(LAYERS) for name, shape in LAYER_SHAPES.items()}
    save_file({name: torch.randn(shape) for name, shape in shapes.items()}, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("llm", [((3,),), ((1, 2),), ((1, 0), (0, 2))])
def test_there_and_back(toy: Converter, hf: Path, llm: tuple[tuple[int, ...], ...], tp: int, tmp_path: Path) -> None:
    toy.hf_to_mm(hf, tmp_path / "mm", Layout(llm_pp_layers=llm, tp_size=tp))
    toy.mm_to_hf(tmp_path / "mm", hf, tmp_path / "back")
    before, after = load_hf(hf), load_hf(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_second_rank_of_the_second_layer(toy: Converter, hf: Path, tmp_path: Path) -> None:
    toy.hf_to_mm(hf, tmp_path / "mm", Layout(llm_pp_layers=((1, 2),), tp_size=2))
    held = load_hf(hf)
    made = torch.load(tmp_path / "mm/release/mp_rank_01_001/model_optim_rng.pt", weights_only=True)["model"]
    layer = "text_decoder.decoder.layers.0."
    q, k, v = (held[f"h.1.attn.{x}.weight"] for x in "qkv")
    assert torch.equal(made[layer + "self_attention.linear_qkv.weight"], torch.cat([q[4:], k[2:], v[2:]]))
    gate, up = (held[f"h.1.mlp.{x}.weight"] for x in ("gate", "up"))
    assert torch.equal(made[layer + "mlp.linear_fc1.weight"], torch.cat([gate[3:], up[3:]]))
    assert torch.equal(made["text_decoder.output_layer.bias"], held["head.bias"][5:])
    assert "text_decoder.embedding.word_embeddings.weight" not in made


def test_a_tensor_that_the_table_lacks_is_refused(toy: Converter, hf: Path, tmp_path: Path) -> None:
    save_file(load_hf(hf) | {"h.0.attn.q.bias": torch.ones(8)}, hf / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"unknown 1: h\.0\.attn\.q\.bias"):
        toy.hf_to_mm(hf, tmp_path / "mm", Layout(llm_pp_layers=((3,),)))
