"""Hugging Face folders: ``config.json`` and safetensors, read from their headers, without torch.

Two libraries, two names for the same files: transformers writes ``model.safetensors``, diffusers
``diffusion_pytorch_model.safetensors``, in shards ``model-00001-of-00002.safetensors`` and so on beside an index.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mm_convert.errors import CheckpointError, ModelError
from mm_convert.journal import MANIFEST
from mm_convert.plans import Ref, Spec
from mm_convert.safetensors_file import read_safetensors
from mm_convert.stacked import unstacked, unstacked_file
from mm_convert.stored import StoredFile

STEMS = ("model", "diffusion_pytorch_model")
INDEX = ".safetensors.index.json"
# Weights in other formats are never copied along: they would contradict the new ones.
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"}


@dataclass(frozen=True, kw_only=True)
class HuggingFaceFolder:
    """A checkpoint folder as its headers describe it.

    Attributes:
        directory: the folder.
        config: ``config.json``.
        tensors: every tensor, by address; the section is always empty.
        files: where the tensors' bytes stand.
        stem: what the names of its weights begin with.
    """

    directory: Path
    config: dict[str, Any]
    tensors: dict[Ref, Spec]
    files: dict[str, StoredFile]
    stem: str = "model"

    @classmethod
    def open(cls, directory: str | Path) -> HuggingFaceFolder:
        """Read the headers.

        Args:
            directory: the folder, or one of a diffusers pipeline, whose ``transformer`` is read then.

        Raises:
            ModelError: no readable ``config.json``.
            CheckpointError: weights missing, damaged, or different from the index.
        """
        directory = model_folder(Path(directory))
        config = read_config(directory)
        stem = _stem(directory)
        index = directory / f"{stem}{INDEX}"
        weight_map = _weight_map(index)
        files = sorted(set(weight_map.values())) if weight_map else [f"{stem}.safetensors"]
        for file in files:
            if Path(file).name != file or not (directory / file).is_file():
                if (directory / "adapter_config.json").is_file():
                    raise CheckpointError(
                        f"{directory} is a PEFT adapter, without the weights of its model; lora_hf_to_mm and"
                        " merge_lora_to_base read it"
                    )
                reason = f"{index.name} names it" if weight_map else f"and there is no {index.name}"
                raise CheckpointError(f"{directory / file} is missing ({reason}); copy the whole checkpoint")
        stored = {file: read_safetensors(directory / file) for file in files}
        tensors = {Ref(file, *name): spec for file, held in stored.items() for name, spec in held.specs.items()}
        if weight_map is not None:
            _check_index(index, weight_map, tensors)
        return cls(directory=directory, config=config, tensors=tensors, files=stored, stem=stem)

    def unstacked(self, patterns: Sequence[re.Pattern[str]]) -> HuggingFaceFolder:
        """The same with the tensors that match taken apart (see :mod:`mm_convert.stacked`)."""
        if not patterns:
            return self
        files = {file: unstacked_file(stored, patterns) for file, stored in self.files.items()}
        return replace(self, tensors=unstacked(self.tensors, patterns), files=files)

    def other_files(self) -> list[Path]:
        """What belongs to the model beside the weights: configuration, tokenizer, templates."""
        return [
            path
            for path in sorted(self.directory.iterdir())
            if path.is_file()
            and path.name != MANIFEST
            and path.suffix not in WEIGHTS
            and not path.name.endswith(".index.json")
            and not path.name.startswith(".")
        ]


def model_folder(directory: Path) -> Path:
    """The folder itself, or ``transformer`` in that of a diffusers pipeline.

    Raises:
        ModelError: the pipeline has several.
    """
    if (directory / "config.json").is_file() or not (directory / "model_index.json").is_file():
        return directory
    models = sorted(path.parent for path in directory.glob("transformer*/config.json"))
    if len(models) > 1:
        raise ModelError(f"{directory} holds several models: give one of them, {' or '.join(map(str, models))}")
    return models[0] if models else directory


def read_config(directory: Path) -> dict[str, Any]:
    """``config.json``.

    Raises:
        ModelError: there is none, or it is not readable.
    """
    if not directory.exists():
        raise ModelError(f"{directory} does not exist")
    if not (directory / "config.json").is_file():
        raise ModelError(f"{directory} is no Hugging Face folder: it has no config.json")
    return _json(directory / "config.json", ModelError)


def _stem(directory: Path) -> str:
    found = [s for s in STEMS if (directory / f"{s}{INDEX}").is_file() or (directory / f"{s}.safetensors").is_file()]
    if len(found) > 1:
        raise CheckpointError(f"{directory} holds weights twice, as {' and as '.join(found)}; take one set away")
    # Of neither, the more usual one is said to be missing.
    shards = [s for s in STEMS if any(directory.glob(f"{s}-*.safetensors"))]
    return [*found, *shards, *STEMS][0]


def _weight_map(index: Path) -> dict[str, str] | None:
    """The file of each tensor, where there is an index that names any."""
    found = _json(index, CheckpointError).get("weight_map") if index.is_file() else None
    if found is None or (isinstance(found, dict) and all(isinstance(file, str) for file in found.values())):
        return found or None
    raise CheckpointError(f"{index}: weight_map must hold the name of a file for each tensor")


def _check_index(index: Path, weight_map: dict[str, str], tensors: dict[Ref, Spec]) -> None:
    listed = {(file, name) for name, file in weight_map.items()}
    found = {(ref.file, ref.name) for ref in tensors}
    if listed != found:
        file, name = min(listed ^ found)
        verb = "is listed but not there" if (file, name) in listed else "is there but not listed"
        raise CheckpointError(
            f"{index} and the shards disagree about {len(listed ^ found)} tensors: {name} of {file} {verb}"
        )


def _json(path: Path, error_class: type[ModelError] | type[CheckpointError]) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise error_class(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise error_class(f"{path} holds {type(value).__name__}, not an object")
    return value
