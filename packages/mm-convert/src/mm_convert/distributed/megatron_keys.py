"""The keys of megatron-core's distributed checkpoints.

* The layers of a stack are one tensor with the layer as first dimension, ``decoder.layers.mlp.linear_fc2.weight`` of
  shape [layers, …]; a layer's experts likewise, as second dimension.
* The norms in front of the language model's linear layers have the names under which its fused layers hold them.
* A language model alone is megatron-core's GPTModel: its keys have no ``text_decoder.`` in front.

megatron-core also writes layers and experts one by one, and the projections of a gated layer apart; both are read, not
written. (``TransformerBlock.sharded_state_dict`` and ``get_gpt_layer_local_spec`` of megatron-core 0.16.)
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mm_convert.rules import Shape

LANGUAGE = "text_decoder."
LAYER = re.compile(r"^(.*\blayers)\.(\d+)\.(.*)$")
EXPERT = re.compile(r"^(.*\bmlp\.experts)\.local_experts\.(\d+)\.(.*)$")
# megatron-core's layer specifications map these, so that fused and plain layers read each other's checkpoints.
NORMS = (
    (re.compile(r"^((?:text_)?decoder\.layers\.\d+\.)input_layernorm\."), r"\1self_attention.linear_qkv.layer_norm_"),
    (re.compile(r"^((?:text_)?decoder\.layers\.\d+\.)pre_mlp_layernorm\."), r"\1mlp.linear_fc1.layer_norm_"),
)
ROUTER = ".mlp.router."
LINEAR = re.compile(r"^(.*\blayers\..*\blinear_\w+)\.weight$")


@dataclass(frozen=True)
class Place:
    """Where a tensor of one rank's layout stands: a key, and the numbers of layer and expert inside it."""

    key: str
    leading: Shape = ()


def variants(name: str) -> list[Place]:
    """Every place at which megatron-core may have a tensor of a layer, the stacked and fused ones first."""
    fused = name
    for pattern, replacement in NORMS:
        fused = pattern.sub(replacement, fused)
    found: list[Place] = []
    for spelled in dict.fromkeys((fused, name)):
        layer, expert = LAYER.match(spelled), EXPERT.match(spelled)
        experts = [(spelled, ())] if not expert else [
            (f"{expert[1]}.experts.{expert[3]}", (int(expert[2]),)),
            (f"{expert[1]}.experts.{expert[2]}.{expert[3]}", ()),
        ]  # fmt: skip
        for key, at in experts:
            match = LAYER.match(key)
            if layer and match:
                found.append(Place(f"{match[1]}.{match[3]}", (int(match[2]), *at)))
            found.append(Place(key, at))
    return found


def places(names: Iterable[str]) -> dict[str, Place]:
    """Where the tensors of a model are written.

    Args:
        names: all of them, by their names in the layout of one rank.
    """
    names = list(dict.fromkeys(names))
    routed = any(ROUTER in name for name in names)
    found = {name: _written(name, routed=routed) for name in shortened(names)}
    stacks: dict[str, set[int]] = defaultdict(set)
    held: dict[str, set[int]] = defaultdict(set)
    for place in found.values():
        if place.leading:
            stacks[place.key.partition(".layers.")[0]].add(place.leading[0])
            held[place.key].add(place.leading[0])
    # What only some layers have, such as Qwen3-VL's deepstack, can't be stacked.
    uneven = {key for key, layers in held.items() if layers != stacks[key.partition(".layers.")[0]]}
    written = {name: Place(name) if place.key in uneven else place for name, place in found.items()}
    return dict(zip(names, written.values(), strict=True))


def extra_states(held: Iterable[Place], counts: Mapping[str, Shape]) -> list[str]:
    """Keys of the states beside the weights that megatron-core's and Transformer Engine's layers ask for.

    Outside FP8 there is nothing in them, but a checkpoint without them is refused.

    Args:
        held: where the weights are.
        counts: how many layers and experts each key stacks.
    """
    keys: dict[str, None] = {}
    for place in held:
        match = LINEAR.match(place.key)
        if not match:
            continue
        at = ".".join(map(str, place.leading or (0,))) + "_" + ".".join(map(str, counts[place.key] or (1,)))
        keys[f"{match[1]}._extra_state/shard_{at}"] = None
        if match[1].endswith(".self_attention.linear_qkv"):
            keys[f"{match[1].removesuffix('linear_qkv')}core_attention._extra_state/shard_{at}"] = None
    return list(keys)


def shortened(names: Iterable[str]) -> list[str]:
    """Names without ``text_decoder.``, where all have it."""
    names = list(names)
    alone = all(name.startswith(LANGUAGE) for name in names)
    return [name.removeprefix(LANGUAGE) for name in names] if alone else names


def _written(name: str, *, routed: bool) -> Place:
    found = variants(name)
    # In front of a router no linear layer is fused with the norm.
    if routed and ".pre_mlp_layernorm." in name:
        return next(place for place in found if ".pre_mlp_layernorm." in place.key)
    return found[0]
