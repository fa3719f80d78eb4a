"""The name tables against diffusers' own converters and modules, and their totality and invertibility."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny_wan
import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from torch import Tensor

from wan_infer.checkpoints.names import CLIP, TRANSFORMER, UMT5, NameMap, vae_names
from wan_infer.config import VaeConfig
from wan_infer.transformer import WanTransformer
from wan_infer.vae import WanVae


def marked(names: list[str]) -> dict[str, Tensor]:
    """Every tensor holds its own number, so that a name that went elsewhere is seen."""
    return {name: torch.tensor([float(number)]) for number, name in enumerate(names)}


def assert_bijective(names: NameMap, originals: list[str]) -> None:
    there = [target for name in originals for target in names.to_diffusers(name)]
    assert len(set(there)) == len(there)
    back = [names.to_original(name) for name in there]
    assert set(back) == set(originals)
    for name in originals:
        assert {names.to_original(target) for target in names.to_diffusers(name)} == {name}
    for rule in names.rules:  # no other rule meets a name
        others = [other for other in names.rules if other is not rule]
        mine = [name for name in originals if rule.original_pattern.fullmatch(name)]
        assert not any(other.original_pattern.fullmatch(name) for other in others for name in mine)
        targets = [target for name in mine for target in names.to_diffusers(name)]
        assert not any(p.fullmatch(target) for other in others for p in other.diffusers_patterns for target in targets)


def assert_agrees(names: NameMap, originals: list[str], converter: Callable[[dict[str, Tensor]], Any]) -> None:
    peer = converter(dict(marked(originals)))
    ours = {names.to_diffusers(name)[0]: tensor for name, tensor in marked(originals).items()}
    assert {name: tensor.item() for name, tensor in ours.items()} == {name: float(t) for name, t in peer.items()}


@pytest.mark.parametrize("model_type", tiny_wan.MODEL_TYPES)
def test_transformer_names_are_those_of_diffusers(model_type: str) -> None:
    with torch.device("meta"):
        originals = list(WanTransformer(tiny_wan.TRANSFORMERS[model_type]).state_dict())
    assert_bijective(TRANSFORMER, originals)
    renamed_by_hand = ["img_emb.emb_pos"]  # diffusers' converter leaves it as it is; its module has another name
    assert_agrees(TRANSFORMER, [n for n in originals if n not in renamed_by_hand], convert_wan_transformer_to_diffusers)
    assert TRANSFORMER.to_diffusers("img_emb.emb_pos") == ("condition_embedder.image_embedder.pos_embed",)


def test_vae_names_are_those_of_diffusers() -> None:
    config = VaeConfig()
    with torch.device("meta"):
        originals = list(WanVae(config).state_dict())
    assert len(originals) == 194  # of the published file
    assert_bijective(vae_names(4, 2), originals)
    assert_agrees(vae_names(4, 2), originals, convert_wan_vae_to_diffusers)


@pytest.mark.parametrize(
    ("dim_mult", "num_res_blocks", "temporal"),
    [((1, 2), 1, (True,)), ((1, 2, 2), 3, (False, True)), ((1,), 2, ())],
)
def test_vae_names_follow_the_shape(dim_mult: tuple[int, ...], num_res_blocks: int, temporal: tuple[bool, ...]) -> None:
    config = VaeConfig(base_dim=4, dim_mult=dim_mult, num_res_blocks=num_res_blocks, temporal_downsample=temporal)
    with torch.device("meta"):
        ours = WanVae(config).state_dict()
        peer = AutoencoderKLWan(
            base_dim=4, dim_mult=list(dim_mult), num_res_blocks=num_res_blocks, temperal_downsample=list(temporal)
        ).state_dict()
    names = vae_names(len(dim_mult), num_res_blocks)
    assert_bijective(names, list(ours))
    assert {names.to_diffusers(name)[0]: t.shape for name, t in ours.items()} == {n: t.shape for n, t in peer.items()}


def test_umt5_names_are_those_of_transformers() -> None:
    originals = list(tiny_wan.t5_tensors())
    assert_bijective(UMT5, originals)
    expected = {name for name, _ in tiny_wan.umt5().named_parameters()}
    assert {UMT5.to_diffusers(name)[0] for name in originals} == expected


def test_clip_names_and_shapes_are_those_of_transformers() -> None:
    originals = {name: t for name, t in tiny_wan.clip_tensors().items() if name.startswith("visual.")}
    assert_bijective(CLIP, list(originals))
    steps, unknown = CLIP.steps(originals, "diffusers")
    assert not unknown
    made = {step.target: step.apply([originals[name] for name in step.sources]).shape for step in steps}
    assert made == {name: parameter.shape for name, parameter in tiny_wan.clip().named_parameters()}


def test_clip_values_come_back() -> None:
    originals = {name: t for name, t in tiny_wan.clip_tensors().items() if name.startswith("visual.")}
    steps, _ = CLIP.steps(originals, "diffusers")
    there = {step.target: step.apply([originals[name] for name in step.sources]) for step in steps}
    steps, unknown = CLIP.steps(there, "original")
    assert not unknown
    back = {step.target: step.apply([there[name] for name in step.sources]) for step in steps}
    assert back.keys() == originals.keys()
    assert all(torch.equal(back[name], originals[name]) for name in back)


@pytest.mark.parametrize(
    "name", ["blocks.00.modulation", "blocks.x.modulation", "blocks.0.self_attn.q.scale", "block.0.modulation", ""]
)
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(KeyError):
        TRANSFORMER.to_diffusers(name)
    with pytest.raises(KeyError):
        TRANSFORMER.to_original(name)
    assert TRANSFORMER.steps([name], "diffusers") == ([], [name])
