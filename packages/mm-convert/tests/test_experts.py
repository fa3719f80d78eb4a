"""Models with experts: which expert is on which rank, and which way round its matrices are stored.

The layout is written anew with whole tensors: expert-parallel rank e holds experts e*E/ep and on, renumbered from 0;
a matrix of the published files is [in, out], of the Megatron layout [out, in].
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from recorded_models import Recorded, load_hf
from safetensors.torch import save_file
from test_resplit import weights
from tiny_checkpoint import Tensors

from mm_convert import Converter, Layout, LayoutError, MegatronFolder, ModelError, inspect, propose, verify

EXPERTS = 4
TEXT, VISION = "Qwen3Converter", "Qwen3VLMegatronConverter"
# Layers, tensor-, expert-parallel size: one and several ranks of everything, and of two with one number in the folder.
LAYOUTS = [
    ([[5]], 1, 1),
    ([[5]], 2, 1),
    ([[5]], 1, 2),
    ([[5]], 1, 4),
    ([[2, 3]], 2, 2),
    ([[0, 5]], 1, 1),
    ([[1, 2, 0, 2]], 1, 4),
    ([[0, 1], [2, 2]], 2, 4),
]


def published(recorded: Recorded, directory: Path) -> Path:
    """A folder whose experts are stored as in the published files: [experts, in, out]."""
    hf = recorded.write(directory)
    for file in hf.glob("*.safetensors"):
        turned = {
            name: t.transpose(1, 2).contiguous() if ".experts." in name else t for name, t in load_one(file).items()
        }
        save_file(turned, file, {"format": "pt"})
    return hf


def load_one(file: Path) -> Tensors:
    return {name: t for name, t in load_hf(file.parent).items() if name in names_of(file)}


def names_of(file: Path) -> set[str]:
    index = json.loads((file.parent / "model.safetensors.index.json").read_text())["weight_map"]
    return {name for name, held in index.items() if held == file.name}


def expert(hf: Tensors, model: str, i: int, x: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gate, up and down projection, [out, in]."""
    if model == TEXT:
        names = (f"model.layers.{i}.mlp.experts.{x}.{part}_proj.weight" for part in ("gate", "up", "down"))
        gate, up, down = (hf[name] for name in names)
        return gate, up, down
    prefix = f"model.language_model.layers.{i}.mlp.experts."
    gate, up = hf[prefix + "gate_up_proj"][x].T.chunk(2)
    return gate, up, hf[prefix + "down_proj"][x].T


def experts_of_rank(hf: Tensors, model: str, layers: range, tp: int, t: int, ep: int, e: int) -> Tensors:
    made: Tensors = {}
    for j, i in enumerate(layers):
        for y in range(EXPERTS // ep):
            gate, up, down = expert(hf, model, i, e * EXPERTS // ep + y)
            name = f"text_decoder.decoder.layers.{j}.mlp.experts.local_experts.{y}."
            made[name + "linear_fc1.weight"] = torch.cat([gate.chunk(tp)[t], up.chunk(tp)[t]])
            made[name + "linear_fc2.weight"] = down.chunk(tp, dim=1)[t]
    return made


def layout_of(model: str, llm: list[list[int]], tp: int, ep: int) -> Layout:
    vit = [[4] + [0] * (len(llm[0]) - 1)] + [[0] * len(llm[0])] * (len(llm) - 1)
    return Layout(
        llm_pp_layers=llm,  # type: ignore[arg-type]
        vit_pp_layers=vit if model == VISION else (),  # type: ignore[arg-type]
        tp_size=tp,
        ep_size=ep,
    )


def recorded(model: str) -> Recorded:
    return Recorded.named({TEXT: "qwen3_moe", VISION: "qwen3_vl_moe"}[model])


def make(model: str, directory: Path) -> Path:
    return recorded(model).write(directory) if model == TEXT else published(recorded(model), directory)


@pytest.mark.parametrize(("llm", "tp", "ep"), LAYOUTS)
@pytest.mark.parametrize("model", [TEXT, VISION])
def test_every_rank_holds_its_experts_and_all_comes_back(
    model: str, llm: list[list[int]], tp: int, ep: int, tmp_path: Path
) -> None:
    hf = make(model, tmp_path / "hf")
    layout = layout_of(model, llm, tp, ep)
    chosen = Converter.named(model)
    chosen.hf_to_mm(hf, tmp_path / "mm", layout)
    whole = load_hf(hf)
    counts = [n for row in llm for n in row]
    for s, count in enumerate(counts):
        layers = range(sum(counts[:s]), sum(counts[:s]) + count)
        pp_rank, virtual = s % len(llm[0]), s // len(llm[0])
        routers = {
            f"text_decoder.decoder.layers.{j}.mlp.router.weight": router
            for j, router in enumerate(gates(whole, layers))
        }
        for t in range(tp):
            stages = []
            for e in range(ep):
                folder = f"mp_rank_{t:02d}"
                folder += f"_{pp_rank:03d}" if len(llm[0]) > 1 else ""
                folder += f"_{e:03d}" if ep > 1 else ""
                file = torch.load(tmp_path / "mm/release" / folder / "model_optim_rng.pt", weights_only=True)
                stage = file["model" if len(llm) == 1 else f"model{virtual}"]
                held = {name: tensor for name, tensor in stage.items() if ".experts." in name}
                expected = experts_of_rank(whole, model, layers, tp, t, ep, e)
                assert held.keys() == expected.keys()
                assert all(torch.equal(held[name], expected[name]) for name in held)
                assert all(torch.equal(stage[name], router) for name, router in routers.items())
                stages.append({name: tensor for name, tensor in stage.items() if ".experts." not in name})
            assert all(same(other, stages[0]) for other in stages)
    assert MegatronFolder.open(tmp_path / "mm").layout == layout
    assert inspect(tmp_path / "mm").converters == (model,)
    chosen.mm_to_hf(tmp_path / "mm", hf, tmp_path / "back")
    for path in hf.glob("*.safetensors"):
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()
    assert verify(tmp_path / "back", tmp_path / "mm", full=True).same


def gates(hf: Tensors, layers: range) -> list[torch.Tensor]:
    return [t for i in layers for name, t in hf.items() if name.endswith(f"layers.{i}.mlp.gate.weight")]


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("model", [TEXT, VISION])
def test_resplit_gives_what_a_conversion_would(model: str, tmp_path: Path) -> None:
    hf, chosen = make(model, tmp_path / "hf"), Converter.named(model)
    layouts = [layout_of(model, *LAYOUTS[number]) for number in (4, 6, 2)]
    for number, layout in enumerate(layouts):
        chosen.hf_to_mm(hf, tmp_path / f"{number}", layout)
    for a, b in ((0, 1), (1, 2), (2, 0)):
        chosen.resplit(tmp_path / f"{a}", tmp_path / f"{a}{b}", layouts[b], hf_dir=hf)
        assert weights(tmp_path / f"{a}{b}") == weights(tmp_path / f"{b}")
        assert verify(tmp_path / f"{a}", tmp_path / f"{b}", full=True).same


def test_both_ways_of_storing_an_expert_give_the_same_ranks(tmp_path: Path) -> None:
    """transformers holds [experts, out, in] in memory, and writes that for a model that it did not load."""
    layout, chosen = layout_of(VISION, [[2, 3]], 2, 2), Converter.named(VISION)
    chosen.hf_to_mm(published(recorded(VISION), tmp_path / "published"), tmp_path / "a", layout)
    chosen.hf_to_mm(recorded(VISION).write(tmp_path / "memory"), tmp_path / "b", layout)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_an_expert_that_differs_is_found(tmp_path: Path) -> None:
    hf = make(VISION, tmp_path / "hf")
    Converter.named(VISION).hf_to_mm(hf, tmp_path / "mm", layout_of(VISION, [[5]], 1, 2))
    [file] = [
        f for f in hf.glob("*.safetensors") if "model.language_model.layers.3.mlp.experts.down_proj" in names_of(f)
    ]
    tensors = load_one(file)
    tensors["model.language_model.layers.3.mlp.experts.down_proj"][2, 1, 5] += 1
    save_file(tensors, file, {"format": "pt"})
    [found] = verify(hf, tmp_path / "mm").differences
    assert "layers.3.mlp.experts.local_experts.0.linear_fc2" in found.name
    assert "mp_rank_00_001" in found.name
    assert found.elements == 1


@pytest.mark.parametrize(("ep", "model"), [(3, TEXT), (8, VISION)])
def test_an_ep_size_that_does_not_divide_the_experts(ep: int, model: str, tmp_path: Path) -> None:
    hf = make(model, tmp_path / "hf")
    with pytest.raises(
        LayoutError, match=rf"ep_size {ep} does not divide the number of experts, 4; legal .*: \[1, 2, 4\]"
    ):
        Converter.named(model).hf_to_mm(hf, tmp_path / "mm", layout_of(model, [[5]], 1, ep))


def test_a_dense_model_has_one_expert_parallel_rank(tmp_path: Path) -> None:
    hf = Recorded.named("qwen3").write(tmp_path / "hf")
    with pytest.raises(LayoutError, match=r"ep_size 2 .*experts, 0; legal for this model: \[1\]"):
        Converter.named(TEXT).hf_to_mm(hf, tmp_path / "mm", layout_of(TEXT, [[5]], 1, 2))


def test_a_model_with_dense_layers_in_between_is_refused(tmp_path: Path) -> None:
    model = recorded(TEXT)
    hf = Recorded(model.config | {"mlp_only_layers": [1]}, model.saved, model.in_memory).write(tmp_path / "hf")
    with pytest.raises(ModelError, match=r"mlp_only_layers \[1\]"):
        Converter.named(TEXT).hf_to_mm(hf, tmp_path / "mm", layout_of(TEXT, [[5]], 1, 1))


def test_auto_counts_the_experts_that_a_token_passes(tmp_path: Path) -> None:
    hf = make(VISION, tmp_path / "hf")
    proposed = propose(hf, pp_size=2)
    Converter.named(VISION).hf_to_mm(hf, tmp_path / "mm", proposed.layout)
