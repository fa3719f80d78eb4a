"""The configuration of a run: one YAML file, ``section.key=value`` on the command line, every fault reported at once.

::

    model:    {hf_dir: Qwen2.5-VL-7B-Instruct, load: mm}
    data:     {path: data/train.json, seq_length: 1024}
    train:    {steps: 1000, global_batch_size: 32, lr: 1.0e-5}
    parallel: {tp_size: 1, pp_size: 2}
    output:   {dir: run}

Relative paths are relative to the folder of the YAML file.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from mm_finetune.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model.

    Args:
        hf_dir: Hugging Face folder: configuration, tokenizer, image processor.
        load: Megatron-style folder with the weights, made by ``mm-convert … hf_to_mm``.
    """

    hf_dir: Path
    load: Path


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which data.

    Args:
        path: messages JSON, made by ``mm-datafmt convert``.
        dataset_dir: folder that image paths are relative to; default: the folder of `path`.
        seq_length: longest sample in tokens; a longer one is an error.
        min_pixels: smallest picture in pixels; default: what the model folder says.
        max_pixels: largest picture in pixels; default: what the model folder says.
        max_samples: use only the first N records.
    """

    path: Path
    dataset_dir: Path | None = None
    seq_length: int = 1024
    min_pixels: int | None = None
    max_pixels: int | None = None
    max_samples: int | None = None


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    """How to train.

    Args:
        steps: optimizer steps.
        global_batch_size: samples a step, over all ranks.
        micro_batch_size: samples a forward pass.
        lr: peak learning rate.
        min_lr: learning rate that the cosine ends at.
        warmup_fraction: share of the steps in which the learning rate rises linearly from 0.
        weight_decay: AdamW's, on matrices only.
        adam_beta1: AdamW's.
        adam_beta2: AdamW's.
        adam_eps: AdamW's.
        clip_grad: largest norm of the gradient; 0 is no clipping.
        seed: order of the data.
    """

    steps: int
    global_batch_size: int
    micro_batch_size: int = 1
    lr: float = 1e-5
    min_lr: float = 0.0
    warmup_fraction: float = 0.1
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is cut; the data-parallel size is what the number of processes leaves.

    Args:
        tp_size: tensor-parallel size.
        pp_size: pipeline stages.
    """

    tp_size: int = 1
    pp_size: int = 1


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Where it goes.

    Args:
        dir: folder of the run: config.yaml, metrics.jsonl, checkpoint/.
        overwrite: replace a finished run.
    """

    dir: Path
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run. See :func:`load_config`."""

    model: ModelConfig
    data: DataConfig
    train: OptimizationConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    output: OutputConfig

    def __post_init__(self) -> None:
        """Refuse values that can't be.

        Raises:
            ConfigError: lists every one of them.
        """
        train, faults = self.train, []
        for section, name in (
            ("train", "steps"),
            ("train", "global_batch_size"),
            ("train", "micro_batch_size"),
            ("parallel", "tp_size"),
            ("parallel", "pp_size"),
            ("data", "seq_length"),
        ):
            value = getattr(getattr(self, section), name)
            if value < 1:
                faults.append(f"{section}.{name} is {value}; it must be 1 or more")
        if not train.lr > 0:
            faults.append(f"train.lr is {train.lr}; it must be above 0")
        if not 0 <= train.min_lr <= train.lr:
            faults.append(f"train.min_lr is {train.min_lr}; it must lie between 0 and train.lr {train.lr}")
        if not 0 <= train.warmup_fraction <= 1:
            faults.append(f"train.warmup_fraction is {train.warmup_fraction}; it must lie between 0 and 1")
        if train.weight_decay < 0 or train.clip_grad < 0:
            faults.append("train.weight_decay and train.clip_grad must be 0 or more")
        _raise(faults)

    def data_parallel_size(self, world_size: int) -> int:
        """The data-parallel size for a number of processes.

        Raises:
            ConfigError: the processes don't fit the parallel sizes, or the batch sizes don't.
        """
        parallel, train = self.parallel, self.train
        model_size = parallel.tp_size * parallel.pp_size
        if world_size % model_size:
            raise ConfigError(
                f"started with {world_size} process(es), but tp_size {parallel.tp_size} x pp_size {parallel.pp_size}"
                f" needs a multiple of {model_size}: torchrun --nproc_per_node={model_size} -m mm_finetune train …"
            )
        dp_size = world_size // model_size
        if train.global_batch_size % (train.micro_batch_size * dp_size):
            raise ConfigError(
                f"train.global_batch_size {train.global_batch_size} is not a multiple of micro_batch_size"
                f" {train.micro_batch_size} x data-parallel size {dp_size}; choose one that is"
            )
        return dp_size

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as in the YAML file."""
        return typing.cast(dict[str, Any], _plain(dataclasses.asdict(self)))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file.

    Args:
        path: the file.
        overrides: ``section.key=value``, applied after the file.

    Raises:
        ConfigError: lists every unknown key, missing key and wrong value.
    """
    import yaml

    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold sections (model, data, train, parallel, output)")
    for override in overrides:
        _override(tree, override, yaml.safe_load)
    faults: list[str] = []
    config = _build(TrainConfig, tree, "", path.parent, faults)
    _raise(faults)
    return typing.cast(TrainConfig, config)


def _override(tree: dict[str, Any], override: str, parse: Any) -> None:
    key, equals, value = override.partition("=")
    section, dot, name = key.partition(".")
    if not equals or not dot or not isinstance(tree.setdefault(section, {}), dict):
        raise ConfigError(f"{override!r} is no override; write section.key=value, for example train.lr=1e-4")
    tree[section][name] = parse(value)


def _build(cls: type, tree: Mapping[str, Any], prefix: str, base: Path, faults: list[str]) -> object | None:
    """Fill a dataclass from a mapping; whatever is wrong is added to `faults`."""
    known = {f.name: f for f in fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in tree:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(known)}"
            faults.append(f"unknown key {prefix}{key}; {hint}")
    values, before = {}, len(faults)
    for name, item in known.items():
        if name in tree:
            values[name] = _value(hints[name], tree[name], prefix + name, base, faults)
        elif item.default is MISSING and item.default_factory is MISSING:
            faults.append(f"missing key {prefix}{name}")
    return cls(**values) if len(faults) == before else None


def _value(kind: Any, value: Any, name: str, base: Path, faults: list[str]) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            faults.append(f"{name} is {value!r}; it must be a section with keys")
            return None
        return _build(typing.cast(type, kind), value, name + ".", base, faults)
    optional = isinstance(kind, types.UnionType)
    if optional and value is None:
        return None
    plain = typing.get_args(kind)[0] if optional else kind
    try:
        return _convert(plain, value, base)
    except (TypeError, ValueError):
        words = {int: "a whole number", float: "a number", bool: "true or false", Path: "a path"}
        faults.append(f"{name} is {value!r}; it must be {words[plain]}")
        return None


def _convert(kind: type, value: Any, base: Path) -> Any:
    if kind is Path and isinstance(value, str):
        return base / value
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is float and not isinstance(value, bool):
        return float(value)  # YAML 1.1 reads 1e-5 as text: it wants 1.0e-5
    raise TypeError


def _raise(faults: list[str]) -> None:
    if faults:
        raise ConfigError("; ".join(faults))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value
