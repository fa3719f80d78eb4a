"""Fine-tune Qwen2.5-VL on megatron-core, on NPU, CUDA and CPU.

    >>> from mm_finetune import load_config, prepare, train
    >>> run = prepare(load_config("train.yaml"), world_size=1)
    >>> train(run)  # the folder of the checkpoint

Weights come from ``mm-convert``, data from ``mm-datafmt``; ``torchrun`` starts several processes:
``torchrun --nproc_per_node=2 -m mm_finetune train train.yaml``.
"""

from typing import TYPE_CHECKING, Any

from mm_finetune.config import TrainConfig, load_config
from mm_finetune.errors import CheckpointError, ConfigError, DataError, FinetuneError, OutputExistsError

if TYPE_CHECKING:
    from mm_finetune.training import PreparedRun, prepare, train

__all__ = [
    "load_config",
    "TrainConfig",
    "prepare",
    "PreparedRun",
    "train",
    "FinetuneError",
    "ConfigError",
    "DataError",
    "CheckpointError",
    "OutputExistsError",
]


def __getattr__(name: str) -> Any:
    # These import torch; the configuration and the command line's help don't need it.
    if name in {"prepare", "PreparedRun", "train"}:
        from mm_finetune import training as module

        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
