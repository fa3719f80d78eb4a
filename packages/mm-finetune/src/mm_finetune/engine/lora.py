"""Adapters on a model: put on, begun as PEFT begins them, read from its folders and saved in them."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mm_convert import ConvertError
from mm_convert.lora.config import CONFIG, WEIGHTS, AdapterFolder, target_modules
from mm_convert.lora.conversion import AdapterConverter, AdapterOptions
from mm_finetune.config import LoraConfig, TrainConfig
from mm_finetune.engine.adapters import AdaptableColumn, AdaptableRow, AdaptedLinear, Adapter, AdapterSpec, Fused
from mm_finetune.engine.model import QwenVL
from mm_finetune.engine.parallel import Ranks
from mm_finetune.errors import CheckpointError, ConfigError
from mm_finetune.output import new_folder
from mm_finetune.selection import adapted_layers, rates_of

if TYPE_CHECKING:
    from mm_convert import Family
    from mm_finetune.engine.weights import Checkpoint, Weight


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """What a model with adapters remembers of them, for saving.

    Attributes:
        lora: the section of the configuration.
        base: the Hugging Face folder of the base model.
        family: of mm-convert; spells names.
    """

    lora: LoraConfig
    base: Path
    family: Family


def adapt(model: QwenVL, checkpoint: Checkpoint, config: TrainConfig, ranks: Ranks) -> None:
    """Freeze a model with its weights, and put adapters on it; see :func:`adapters_of`."""
    lora, adapters = config.lora, adapters_of(checkpoint, config)
    assert lora is not None, "called for a run with adapters"
    model.requires_grad_(False)
    for weight in list(checkpoint.weights_of(model, ranks)):
        held = {name.removesuffix(".weight") for name in weight.published if name.endswith(".weight")}
        if specs := [begin() for layer, begin in adapters.items() if layer in held]:
            _put_on(weight, specs, model, checkpoint.shapes)
    model.adaptation = Adaptation(lora=lora, base=config.model.hf_dir, family=checkpoint.converter.family)
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
    layers = adapted_layers(shapes, lora.target_modules)
    rates = rates_of(list(shapes), freeze=config.train.freeze, lr_scale=config.train.lr_scale)
    if not any(rates[f"{layer}.weight"] for layer in layers):
        raise ConfigError("nothing is left to train: train.freeze and train.lr_scale cover every adapted layer")
    loaded = read_adapter(lora, layers, checkpoint.converter.family) if lora.load else {}

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
        if ranks.rank == 0:
            written = _spelling(adaptation.family)
            named = {written(f"{layer}.{half}.weight"): t for (layer, half), t in sorted(wholes.items())}
            with new_folder(folder) as new:
                save_file(named, new / WEIGHTS, metadata={"format": "pt"})
                layers = sorted({layer for layer, _ in wholes})
                settings = _peft_config(adaptation, layers)
                (new / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    dist.barrier()


def read_adapter(lora: LoraConfig, layers: Iterable[str], family: Family) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of every layer, from the PEFT folder ``lora.load``.

    Raises:
        ConfigError: its rank or scale is not that of the run.
        CheckpointError: it can't be read, or is for other layers.
    """
    assert lora.load is not None, "called where there is one"
    try:
        folder = AdapterFolder.open(lora.load)
        numbers, adapters = folder.numbers, AdapterConverter(family=family)
        adapters.check_ranks(folder.tensors, folder.config)
        pairs = adapters.pairs(folder.tensors)
    except ConvertError as error:
        raise CheckpointError(f"lora.load: {error}") from error
    tensors = load_file(lora.load / WEIGHTS)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for module, (a, b) in pairs.items():
        names = adapters.spellings(module)
        if (numbers.rank(*names), numbers.scale(*names)) != (lora.r, lora.alpha / lora.r):
            raise ConfigError(
                f"{lora.load} has r {numbers.rank(*names)} and scale {numbers.scale(*names):g} at {module}, the run"
                f" lora.r={lora.r} lora.alpha={lora.alpha:g}; set them as in its {CONFIG}"
            )
        found[family.canonical(f"{module}.weight").removesuffix(".weight")] = (tensors[a.name], tensors[b.name])
    if odd := sorted(found.keys() ^ set(layers)):
        raise CheckpointError(
            f"{lora.load} and lora.target_modules differ in {len(odd)} layers: {', '.join(odd[:3])}; choose the modules"
            " that the adapter was trained on"
        )
    return found


def _put_on(weight: Weight, specs: list[AdapterSpec], model: QwenVL, shapes: Mapping[str, tuple[int, ...]]) -> None:
    path = weight.path.rpartition(".")[0]
    layer = weight.root.get_submodule(path)
    if isinstance(layer, AdaptableColumn | AdaptableRow):
        layer.adapt(specs, _fused(weight, model, shapes))
    else:
        assert isinstance(layer, nn.Linear), f"{path} is a linear layer"
        weight.root.set_submodule(path, AdaptedLinear(layer, specs[0]))


# The order in which Megatron fuses layers.
_ORDER = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "o_proj", "down_proj")


def _fused(weight: Weight, model: QwenVL, shapes: Mapping[str, tuple[int, ...]]) -> Fused:
    outputs = {
        name.split(".")[-2]: shapes[name][0] for name in weight.published if name.endswith(".weight")
    }  # fmt: skip
    groups, ranks = 1, model.config.tensor_model_parallel_size
    if len(outputs) == 3:
        groups = model.config.num_query_groups // ranks
    if len(outputs) == 1:
        ranks = 1  # The outputs of a layer that is cut along its inputs are whole.
    widths = {name: outputs[name] // ranks // groups for name in _ORDER if name in outputs}
    return Fused(widths=widths, groups=groups)


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
    mine = [
        (module.name, half, module.axes.get(half), parallel_state.get_tensor_model_parallel_rank(), t.detach().cpu())
        for module in model.modules()
        if isinstance(module, Adapter)
        for half, t in module.named_parameters()
    ]
    group = parallel_state.get_model_parallel_group()
    gathered: list[list[tuple[str, str, int | None, int, Tensor]]] = [[] for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(gathered, mine, group=group)
    parts: dict[tuple[str, str], dict[int, Tensor]] = {}
    axes: dict[tuple[str, str], int | None] = {}
    for layer, half, axis, rank, tensor in (entry for held in gathered for entry in held):
        parts.setdefault((layer, half), {})[rank] = tensor
        axes[layer, half] = axis
    return {
        place: held[0].contiguous() if axis is None else torch.cat([held[rank] for rank in sorted(held)], axis)
        for place, held in parts.items()
        for axis in (axes[place],)
    }


def _spelling(family: Family) -> Callable[[str], str]:
    """How PEFT names a tensor of an adapter for transformers' model of today."""
    return AdapterConverter(family=family, options=AdapterOptions(new_names=True)).written


def _peft_config(adaptation: Adaptation, layers: list[str]) -> dict[str, object]:
    lora, written = adaptation.lora, _spelling(adaptation.family)
    modules = [written(layer).removeprefix("base_model.model.") for layer in layers]
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
        "peft_type": "LORA",
        "r": lora.r,
        # Exactly these layers: a list of last parts would match in the vision tower too.
        "target_modules": "|".join(pattern for pattern in patterns if pattern),
        "task_type": "CAUSAL_LM",
        "use_rslora": False,
    }
