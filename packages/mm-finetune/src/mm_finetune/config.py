"""The configuration of a run: one YAML file, ``section.key=value`` on the command line, every fault reported at once.

::

    model:    {hf_dir: Qwen2.5-VL-7B-Instruct, load: mm}
    data:     {path: data/train.json, seq_length: 1024}
    train:    {epochs: 1, global_batch_size: 32, lr: 1.0e-5, freeze: ["visual.*"]}
    parallel: {tp_size: 1, pp_size: 2}
    output:   {dir: run, save_every: 500}

Relative paths are relative to the folder of the YAML file. Every key stands in :mod:`mm_finetune.config_sections`.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mm_finetune.config_checks import faults_of
from mm_finetune.config_sections import (
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimizationConfig,
    OutputConfig,
    ParallelConfig,
    PreferenceConfig,
)
from mm_finetune.config_tree import build, override, plain
from mm_finetune.config_yaml import read_yaml
from mm_finetune.errors import ConfigError

__all__ = [
    "load_config",
    "TrainConfig",
    "ModelConfig",
    "DataConfig",
    "OptimizationConfig",
    "LoraConfig",
    "PreferenceConfig",
    "ParallelConfig",
    "OutputConfig",
]

# Megatron's names, and sections that people look in for them: other words for one key.
ALIASES = {
    "train.save_interval": "output.save_every",
    "output.save_interval": "output.save_every",
    "train.max_samples": "data.max_samples",
    "output.max_samples": "data.max_samples",
    "train.log_interval": "output.log_every",
    "output.log_interval": "output.log_every",
} | {f"train.{key}": f"output.{key}" for key in
     ("no_load_optim", "no_load_rng", "no_save_optim", "no_save_rng", "log_tps", "log_format")}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run. See :func:`load_config`."""

    model: ModelConfig
    data: DataConfig
    train: OptimizationConfig
    lora: LoraConfig | None = None
    preference: PreferenceConfig | None = None
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    output: OutputConfig

    def __post_init__(self) -> None:
        """Refuse values that can't be.

        Raises:
            ConfigError: lists every one of them.
        """
        _raise(faults_of(self))

    def resolved(self, records: int) -> TrainConfig:
        """The same run with `steps` in the place of `epochs`, for a number of records."""
        train = self.train
        if train.epochs is None:
            return self
        steps = max(1, math.ceil(train.epochs * records / train.global_batch_size))
        return dataclasses.replace(self, train=dataclasses.replace(train, steps=steps, epochs=None))

    @property
    def room(self) -> int | None:
        """Tokens of a packed row; None: nothing is packed."""
        if not self.data.packing:
            return None
        return self.data.pack_length or self.data.seq_length * (2 if self.preference else 1)

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
        if self.data.packing:
            if train.global_batch_size < dp_size:
                raise ConfigError(
                    f"train.global_batch_size {train.global_batch_size} is below the data-parallel size {dp_size};"
                    " each rank needs a record"
                )
        elif train.global_batch_size % (train.micro_batch_size * dp_size):
            raise ConfigError(
                f"train.global_batch_size {train.global_batch_size} is not a multiple of micro_batch_size"
                f" {train.micro_batch_size} x data-parallel size {dp_size}; choose one that is"
            )
        return dp_size

    def as_dict(self, relative_to: Path | None = None) -> dict[str, Any]:
        """Plain values, as in a YAML file.

        Args:
            relative_to: the folder that the file will stand in; its paths are then relative, and the file can be
                read again there, even when both have moved together. Default: paths as they are.
        """
        tree = plain(dataclasses.asdict(self), relative_to and relative_to.absolute())
        return typing.cast(dict[str, Any], tree)

    def as_yaml(self, relative_to: Path | None = None) -> str:
        """The text of a YAML file; see :meth:`as_dict`."""
        import yaml

        return str(yaml.safe_dump(self.as_dict(relative_to), sort_keys=False, allow_unicode=True))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file.

    Args:
        path: the file.
        overrides: ``section.key=value`` at any depth, applied after the file, the last one counts.

    Raises:
        ConfigError: lists every unknown key, missing key and wrong value.
    """
    path = Path(path)
    try:
        tree = read_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no text; give a YAML file: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold sections (model, data, train, parallel, output)")
    faults = _rename(tree)
    if isinstance(tree.get("preference"), str):
        tree["preference"] = {"loss": tree["preference"]}
    for text in overrides:
        key, equals, value = text.partition("=")
        if key == "preference" and value.isalpha() and value != "null":
            key = "preference.loss"  # as in the file, where a word is short for it
        try:
            override(tree, ALIASES.get(key, key) + equals + value, TrainConfig, partial(read_yaml, where=repr(text)))
        except ConfigError as error:
            faults.append(str(error))
    config = build(TrainConfig, tree, base=path.absolute().parent, faults=faults)
    _raise(faults)
    return typing.cast(TrainConfig, config)


def _rename(tree: dict[str, Any]) -> list[str]:
    """Put keys with other names in their place; returns those that are there twice."""
    faults = []
    for alias, key in ALIASES.items():
        (old_section, old), (section, name) = alias.split("."), key.split(".")
        found = tree.get(old_section)
        if not isinstance(found, dict) or old not in found:
            continue
        target = tree.setdefault(section, {})
        if not isinstance(target, dict) or name in target:
            faults.append(f"{alias} and {key} are one setting, given twice; keep {key}")
            continue
        target[name] = found.pop(old)
    return faults


def _raise(faults: list[str]) -> None:
    if faults:
        raise ConfigError("; ".join(faults))
