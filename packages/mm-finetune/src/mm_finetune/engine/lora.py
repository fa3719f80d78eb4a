"""Adapters on a model: put on, begun as PEFT begins them, read from its folders and saved in them."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mm_convert import ConvertError, Ref
from mm_convert.lora.config import CONFIG, WEIGHTS, target_modules
from mm_convert.lora.conversion import AdapterConverter, AdapterOptions
from mm_finetune.config import LoraConfig, TrainConfig
from mm_finetune.engine.adapters import AdaptableColumn, AdaptableRow, Adapter, AdapterSpec, Fused, by_kind
from mm_finetune.engine.model import QwenVL
from mm_finetune.engine.parallel import Ranks
from mm_finetune.engine.saved_modules import SavedModules, saved_rates
from mm_finetune.errors import CheckpointError, ConfigError
from mm_finetune.output import new_folder
from mm_finetune.peft_folder import IN_FULL, TIED, PeftFolder
from mm_finetune.selection import adapted_layers, rates_of, saved_layers

if TYPE_CHECKING:
    from mm_convert import Family
    from mm_finetune.engine.weights import Checkpoint, Weight

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """What a model with adapters remembers of them, for saving.

    Attributes:
        lora: the section of the configuration.
        base: the Hugging Face folder of the base model.
        family: of mm-convert; spells names.
        saved: the layers that are trained in full.
        tied: embedding and output layer are one weight.
    """

    lora: LoraConfig
    base: Path
    family: Family
    saved: SavedModules
    tied: bool


def adapt(model: QwenVL, checkpoint: Checkpoint, config: TrainConfig, ranks: Ranks) -> None:
    """Freeze a model with its weights, and put adapters on it; see :func:`adapters_of`."""
    lora, adapters = config.lora, adapters_of(checkpoint, config)
    assert lora is not None, "called for a run with adapters"
    model.requires_grad_(False)
    weights, family = list(checkpoint.weights_of(model, ranks)), checkpoint.converter.family
    saved = SavedModules.of(checkpoint, weights, saved_rates(checkpoint, config), ranks)
    if lora.load:
        fill_saved(saved, lora.load, family)
    for weight in weights:
        held = {name.removesuffix(".weight") for name in weight.published if name.endswith(".weight")}
        if specs := [begin() for layer, begin in adapters.items() if layer in held]:
            _put_on(weight, specs, checkpoint.shapes)
    model.adaptation = Adaptation(
        lora=lora, base=config.model.hf_dir, family=family, saved=saved, tied=checkpoint.sizes.tied
    )
    if lora.dropout:
        # What dropout draws its seeds from: the same on the ranks that share a layer, another one elsewhere.
        torch.default_generator.manual_seed(_number(f"{config.train.seed} {ranks.pp_rank} {ranks.dp_rank}"))


def adapters_of(checkpoint: Checkpoint, config: TrainConfig) -> dict[str, Callable[[], AdapterSpec]]:
    """What the adapter of each layer begins as, made when it is called.

    The learning rate of an adapter is that of its layer's weight; what ``train.freeze`` covers gets an adapter that
    stays as it begins.

    Raises:
        ConfigError: a pattern matches nothing, nothing is left to train, or ``lora.load`` has another rank or scale.
        CheckpointError: ``lora.load`` can't be read, or is for other layers.
    """
    assert config.lora is not None, "called for a run with adapters"
    lora, seed, shapes = config.lora, config.train.seed, checkpoint.shapes
    saved = saved_rates(checkpoint, config)
    layers = adapted_layers(shapes, lora.target_modules, saved_layers(shapes, lora.modules_to_save))
    rates = rates_of(list(shapes), freeze=config.train.freeze, lr_scale=config.train.lr_scale)
    if not any((*saved.values(), *(rates[f"{layer}.weight"] for layer in layers))):
        raise ConfigError("nothing is left to train: train.freeze and train.lr_scale cover every adapted layer")
    held = {name: shapes[name] for name in saved}
    family, tied = checkpoint.converter.family, checkpoint.sizes.tied
    loaded = read_adapter(lora, layers, family, saved=held, tied=tied) if lora.load else {}

    def begin(layer: str) -> AdapterSpec:
        a, b = loaded.get(layer) or _beginning(layer, lora.r, shapes[f"{layer}.weight"], seed)
        rate = rates[f"{layer}.weight"]
        return AdapterSpec(name=layer, a_RI=a, b_OR=b, alpha=lora.alpha, dropout=lora.dropout, rate=rate)

    return {layer: partial(begin, layer) for layer in layers}


def save_adapter(model: QwenVL, ranks: Ranks, folder: Path) -> None:
    """Write the adapters as a folder that PEFT reads; every rank must call.

    The tensors are float32 or bfloat16, as they are trained.

    Args:
        model: this process's part of a model that :func:`adapt` was called on.
        ranks: where it stands.
        folder: appears when it is complete, in the place of one that is there.
    """
    adaptation = model.adaptation
    assert isinstance(adaptation, Adaptation), "a model with adapters"
    if ranks.dp_rank == 0:
        wholes = _gathered(model)
        saved = adaptation.saved.gathered(next(model.parameters()).device)
        if ranks.rank == 0:
            written = _spelling(adaptation.family)
            named = {written(f"{layer}.{half}.weight"): t for (layer, half), t in sorted(wholes.items())}
            if adaptation.tied and EMBEDDING in saved:
                saved[OUTPUT] = saved[EMBEDDING].clone()  # PEFT looks for both.
            named |= {written(name): tensor for name, tensor in sorted(saved.items())}
            with new_folder(folder) as new:
                save_file(named, new / WEIGHTS, metadata={"format": "pt"})
                layers = sorted({layer for layer, _ in wholes})
                settings = _peft_config(adaptation, layers)
                (new / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    dist.barrier()


def read_adapter(
    lora: LoraConfig,
    layers: Iterable[str],
    family: Family,
    *,
    saved: Mapping[str, tuple[int, ...]] | None = None,
    tied: bool = False,
) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of every layer, from the PEFT folder ``lora.load``.

    Args:
        lora: the section of the configuration.
        layers: published names of those that have an adapter.
        family: of mm-convert; knows how names are spelt.
        saved: shapes of the weights that are trained in full, which the folder must hold too.
        tied: embedding and output layer are one weight.

    Raises:
        ConfigError: its rank or scale is not that of the run.
        CheckpointError: it can't be read, or is for other layers.
    """
    assert lora.load is not None, "called where there is one"
    try:
        folder = PeftFolder.open(lora.load, family)
        numbers, adapters = folder.adapter.numbers, folder.converter
        tensors = adapters.chosen(folder.adapter.tensors)
        adapters.check_ranks(tensors, folder.adapter.config)
        pairs = adapters.pairs(tensors)
    except ConvertError as error:
        raise CheckpointError(f"lora.load: {error}") from error
    _check_saved(lora.load, folder, saved or {}, tied=tied)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    with safe_open(folder.weights, framework="pt") as file:
        for module, (a, b) in pairs.items():
            names = adapters.spellings(module)
            if (numbers.rank(*names), numbers.scale(*names)) != (lora.r, lora.alpha / lora.r):
                raise ConfigError(
                    f"{lora.load} has r {numbers.rank(*names)} and scale {numbers.scale(*names):g} at {module}, the run"
                    f" lora.r={lora.r} lora.alpha={lora.alpha:g}; set them as in its {CONFIG}"
                )
            layer = family.canonical(f"{module}.weight").removesuffix(".weight")
            found[layer] = (file.get_tensor(a.name), file.get_tensor(b.name))
    if odd := sorted(found.keys() ^ set(layers)):
        raise CheckpointError(
            f"{lora.load} and lora.target_modules differ in {len(odd)} layers: {', '.join(odd[:3])}; choose the modules"
            " that the adapter was trained on"
        )
    return found


def fill_saved(saved: SavedModules, directory: Path, family: Family) -> None:
    """Begin layers that are trained in full as a PEFT folder has them; :func:`read_adapter` has checked it."""
    folder = PeftFolder.open(directory, family)
    with safe_open(folder.weights, framework="pt") as file:
        saved.fill(lambda name: file.get_tensor(folder.saved[name]))


def _check_saved(load: Path, folder: PeftFolder, saved: Mapping[str, tuple[int, ...]], *, tied: bool) -> None:
    theirs = {name: folder.adapter.tensors[Ref(WEIGHTS, "", held)].shape for name, held in folder.saved.items()}
    if tied and EMBEDDING in theirs:
        if not folder.tied:
            raise CheckpointError(
                f"{load} trained the embedding apart from the output layer; in this model they are one weight: train it"
                " with ensure_weight_tying"
            )
        theirs.pop(OUTPUT, None)
    if odd := sorted(name for name in theirs.keys() | saved.keys() if theirs.get(name) != saved.get(name)):
        raise CheckpointError(
            f"{load} and lora.modules_to_save differ in {len(odd)} weights: {', '.join(odd[:3])}; choose the modules"
            " that were trained in full there"
        )


def _put_on(weight: Weight, specs: list[AdapterSpec], shapes: Mapping[str, tuple[int, ...]]) -> None:
    layer = weight.root.get_submodule(weight.path.rpartition(".")[0])
    assert isinstance(layer, AdaptableColumn | AdaptableRow), f"{weight.path} is a linear layer"
    config = layer.config
    groups = ranks = 1
    outputs = {
        name.split(".")[-2]: shapes[name][0] for name in weight.published if name.endswith(".weight")
    }  # fmt: skip
    if isinstance(layer, AdaptableColumn):
        ranks = layer.tp_group.size()
    if outputs.keys() == set(_QKV):
        groups = config.num_query_groups // ranks
    if outputs.keys() == {"qkv"}:
        specs = [replace(spec, heads=config.num_attention_heads) for spec in specs]
    # Queries before keys; else as the alphabet has it: the gate before what it lets pass.
    names = sorted(outputs, key=lambda name: (_QKV.index(name) if name in _QKV else 0, name))
    layer.adapt(specs, Fused(widths={name: outputs[name] // ranks // groups for name in names}, groups=groups))


_QKV = ("q_proj", "k_proj", "v_proj")


def _beginning(layer: str, r: int, shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    """PEFT's: A is uniform in ``± 1 / sqrt(inputs)``, B is zero. The numbers depend on the seed and the name alone."""
    outputs, inputs = shape
    generator = torch.Generator().manual_seed(_number(f"{seed} {layer}"))
    a = torch.empty(r, inputs)
    nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
    return a, torch.zeros(outputs, r)


def _number(words: str) -> int:
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:4], "big")


def _gathered(model: QwenVL) -> dict[tuple[str, str], Tensor]:
    """All of A and B by layer and half, on every rank that holds a part of this copy of the model."""
    mine = {
        (module.name, half): _Share(
            axis=module.axes.get(half),
            rank=module.group.rank(),
            heads=module.heads if half == "lora_B" else 0,
            tensor=tensor.detach().cpu(),
        )
        for module in model.modules()
        if isinstance(module, Adapter)
        for half, tensor in module.named_parameters()
    }
    group = parallel_state.get_model_parallel_group()
    gathered: list[dict[tuple[str, str], _Share]] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(gathered, mine, group=group)
    shares: dict[tuple[str, str], dict[int, _Share]] = {}
    for held in gathered:
        for place, share in held.items():
            shares.setdefault(place, {})[share.rank] = share
    return {place: _whole([held[rank] for rank in sorted(held)]) for place, held in shares.items()}


@dataclass(frozen=True, kw_only=True)
class _Share:
    """What a rank has of A or B: the axis along which it is cut, and how its outputs lie."""

    axis: int | None
    rank: int
    heads: int
    tensor: Tensor


def _whole(shares: list[_Share]) -> Tensor:
    some = shares[0]
    tensor = some.tensor if some.axis is None else torch.cat([share.tensor for share in shares], some.axis)
    return by_kind(tensor, some.heads).contiguous()


def _spelling(family: Family) -> Callable[[str], str]:
    """How PEFT names a tensor of an adapter for transformers' model of today."""
    return AdapterConverter(family=family, options=AdapterOptions(new_names=True)).written


def _peft_config(adaptation: Adaptation, layers: list[str]) -> dict[str, object]:
    lora, written = adaptation.lora, _spelling(adaptation.family)
    modules, saved = (
        [written(layer).removeprefix("base_model.model.") for layer in some]
        for some in (layers, sorted({name.rpartition(".")[0] for name in adaptation.saved.targets}))
    )
    numbered = [module for module in modules if re.search(r"\.\d+\.", module)]
    patterns = [target_modules(numbered), *(re.escape(module) for module in modules if module not in numbered)]
    return {
        "base_model_name_or_path": str(adaptation.base),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        IN_FULL: saved or None,
        "peft_type": "LORA",
        "r": lora.r,
        # Exactly these layers: a list of last parts would match in the vision tower too.
        "target_modules": "|".join(pattern for pattern in patterns if pattern),
        "task_type": "CAUSAL_LM",
        "use_rslora": False,
    } | ({TIED: True} if adaptation.tied and EMBEDDING in adaptation.saved.targets else {})
