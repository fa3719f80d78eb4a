"""The models that are trained here, by the ``model_type`` of their config.json. Another one is an entry here."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from mm_finetune.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """One of them.

    Attributes:
        converter: its name in mm-convert.
        model: transformers' class of the whole model.
        module: transformers' module of its parts.
        tower: the vision tower's class in there.
    """

    converter: str
    model: str
    module: str
    tower: str


FAMILIES = {
    "qwen2_5_vl": ModelFamily(
        converter="Qwen2_5_VLConverter",
        model="Qwen2_5_VLForConditionalGeneration",
        module="transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
        tower="Qwen2_5_VisionTransformerPretrainedModel",
    ),
    "qwen2_vl": ModelFamily(
        converter="Qwen2VLConverter",
        model="Qwen2VLForConditionalGeneration",
        module="transformers.models.qwen2_vl.modeling_qwen2_vl",
        tower="Qwen2VisionTransformerPretrainedModel",
    ),
}


def family_of(model_type: str | None) -> ModelFamily:
    """The family of a ``model_type``.

    Raises:
        ConfigError: it is not trained here.
    """
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise ConfigError(f"config.json says model_type {model_type!r}; trained here are {', '.join(FAMILIES)}")
    return family


def model_class(hf_dir: Path) -> Any:
    """transformers' class of the model in a Hugging Face folder.

    Raises:
        ConfigError: it is not trained here.
    """
    from transformers import AutoConfig

    family = family_of(AutoConfig.from_pretrained(hf_dir, local_files_only=True).model_type)
    return getattr(import_module(family.module), family.model)
