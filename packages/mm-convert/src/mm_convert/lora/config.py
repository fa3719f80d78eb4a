"""PEFT's folders: what is read from ``adapter_config.json``, what is refused, and one made from the adapter's names.

Keys and their meaning are those of https://huggingface.co/docs/peft/package_reference/lora.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any, TypeVar

from mm_convert.errors import CheckpointError
from mm_convert.lora.table import A, B
from mm_convert.plans import Ref, Specs
from mm_convert.safetensors_file import read_safetensors
from mm_convert.stored import StoredFile

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
TIED = "ensure_weight_tying"  # embedding and output layer, trained in full, stay one weight
# Where an adapter is, how it was trained and begun, and by what: W + scale * B @ A is the same with any value.
NEUTRAL = (
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    TIED,
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
)
UNDERSTOOD = ("alpha_pattern", "lora_alpha", "r", "rank_pattern", "use_rslora")
ENDS = ("embed_tokens", "lm_head")
IN_FULL = "modules_to_save"
"""Layers that were trained in full beside the adapter: the folder holds their weights."""
# These change the base model's own weights when an adapter begins; others only choose the first A and B.
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


Number = TypeVar("Number", int, float)


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The numbers of a LoRA adapter.

    Args:
        r: rank.
        alpha: what the product B @ A is scaled with, over the rank.
        rslora: over the root of the rank instead.
        rank_pattern: ranks of single modules, by regular expressions of the end of their names.
        alpha_pattern: alphas likewise.
    """

    r: int
    alpha: float
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def rank(self, *names: str) -> int:
        """The rank of a module that has these names, in one spelling or another."""
        return _chosen(self.rank_pattern, names, self.r)

    def scale(self, *names: str) -> float:
        """The factor of B @ A in a module that has these names, in one spelling or another."""
        rank = self.rank(*names)
        return _chosen(self.alpha_pattern, names, self.alpha) / (sqrt(rank) if self.rslora else rank)


@dataclass(frozen=True, kw_only=True)
class AdapterFolder:
    """A PEFT folder as its headers describe it.

    Attributes:
        directory: the folder.
        config: ``adapter_config.json``.
        tensors: every tensor.
        file: where the tensors' bytes stand.
    """

    directory: Path
    config: Mapping[str, Any]
    tensors: Specs
    file: StoredFile

    @classmethod
    def open(cls, directory: str | Path, *, in_full: bool = False) -> AdapterFolder:
        """Read the headers.

        Args:
            directory: the folder.
            in_full: it may also hold layers that were trained in full.

        Raises:
            CheckpointError: no LoRA adapter, an adapter of another kind, or a damaged one.
        """
        directory = Path(directory)
        config = read_adapter_config(directory, in_full=in_full)
        if not (directory / WEIGHTS).is_file():
            raise CheckpointError(f"{directory} has no {WEIGHTS}; save the adapter as safetensors")
        file = read_safetensors(directory / WEIGHTS)
        tensors = {Ref(WEIGHTS, *name): spec for name, spec in file.specs.items()}
        return cls(directory=directory, config=config, tensors=tensors, file=file)

    @property
    def files(self) -> dict[str, StoredFile]:
        """Its one file, by its name in plans."""
        return {WEIGHTS: self.file}

    @property
    def in_full(self) -> list[Ref]:
        """The weights of the layers that were trained in full; PEFT saves a tied one under both its names."""
        named = [*(self.config.get(IN_FULL) or ()), *(ENDS if self.config.get(TIED) else ())]
        layers = [re.compile(rf"(^|\.){re.escape(layer)}\.") for layer in named]
        others = [ref for ref in self.tensors if not ref.name.endswith((A, B))]
        return [ref for ref in others if any(layer.search(ref.name) for layer in layers)]

    @property
    def numbers(self) -> AdapterConfig:
        """Rank and scale.

        Raises:
            CheckpointError: the configuration has none.
        """
        return numbers(self.config)


def read_adapter_config(directory: Path, *, in_full: bool = False) -> dict[str, Any]:
    """``adapter_config.json``, if it is that of a plain LoRA adapter.

    Args:
        directory: the folder.
        in_full: it may also name layers that were trained in full.

    Raises:
        CheckpointError: there is none, it is not readable, or describes something else.
    """
    path = directory / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{directory} is no PEFT adapter: it has no {CONFIG}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else config
        raise CheckpointError(f"{path} says peft_type {found!r}; only 'LORA' is converted")
    known = {*NEUTRAL, *UNDERSTOOD} | ({IN_FULL} if in_full else set())
    strange = {key: value for key, value in config.items() if value and key not in known}
    if strange.get("bias") == "none":
        del strange["bias"]
    start = str(config.get("init_lora_weights", True))
    if start.startswith(CHANGE_THE_BASE):
        strange["init_lora_weights"] = start
    if strange:
        said = ", ".join(f"{key} {json.dumps(value)}" for key, value in strange.items())
        way_out = "; merge_lora_to_base takes it" if strange.keys() == {IN_FULL} else ""
        raise CheckpointError(
            f"{path} says {said}: that is no plain LoRA adapter (W + scale * B @ A), so it is refused{way_out}"
        )
    return config


def numbers(config: Mapping[str, Any]) -> AdapterConfig:
    """The numbers of an ``adapter_config.json``.

    Raises:
        CheckpointError: missing, or no numbers.
    """
    try:
        return AdapterConfig(
            r=int(config["r"]),
            alpha=float(config["lora_alpha"]),
            rslora=bool(config.get("use_rslora")),
            rank_pattern={str(key): int(rank) for key, rank in (config.get("rank_pattern") or {}).items()},
            alpha_pattern={str(key): float(alpha) for key, alpha in (config.get("alpha_pattern") or {}).items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{CONFIG} has no usable numbers r and lora_alpha: {error!r}") from error


def made_config(ranks: Mapping[str, int], *, alpha: float, rslora: bool, base: str | None) -> dict[str, Any]:
    """An ``adapter_config.json`` with which PEFT puts adapters exactly where these are.

    Args:
        ranks: the rank of every adapted module, by its name in the model.
        alpha: `lora_alpha`.
        rslora: `use_rslora`.
        base: `base_model_name_or_path`.
    """
    common = max(sorted(set(ranks.values())), key=list(ranks.values()).count)
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": common,
        "rank_pattern": {"^" + re.escape(module): rank for module, rank in ranks.items() if rank != common},
        "target_modules": target_modules(ranks),
        "task_type": None,
        "use_rslora": rslora,
    }


def target_modules(modules: Iterable[str]) -> str:
    """A regular expression for exactly these modules: a list of name endings would also match in other parts."""
    layers: dict[tuple[str, str], list[int]] = defaultdict(list)
    for module in modules:
        before, number, after = re.split(r"\.(\d+)\.", module, maxsplit=1)
        layers[before, after].append(int(number))
    groups: dict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)
    for (before, after), held in layers.items():
        groups[before, tuple(sorted(held))].append(after)
    return "|".join(
        rf"{re.escape(before)}\.(?:{'|'.join(map(str, held))})\.(?:{'|'.join(map(re.escape, sorted(ends)))})"
        for (before, held), ends in sorted(groups.items())
    )


def _chosen(pattern: Mapping[str, Number], names: Sequence[str], default: Number) -> Number:
    """What the first matching expression says; PEFT matches whole components at the end of a name."""
    for expression, value in pattern.items():
        try:
            if any(re.match(rf"(.*\.)?({expression})$", name) for name in names):
                return value
        except re.error as error:
            raise CheckpointError(f"{CONFIG} has a pattern {expression!r} that is no regular expression") from error
    return default
