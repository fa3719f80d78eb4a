"""Hugging Face folders: ``config.json`` and safetensors, read from their headers, without torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_convert.errors import CheckpointError, ModelError
from mm_convert.journal import MANIFEST
from mm_convert.plan import Ref, Spec
from mm_convert.safetensors_file import read_safetensors
from mm_convert.stored import StoredFile

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
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
    """

    directory: Path
    config: dict[str, Any]
    tensors: dict[Ref, Spec]
    files: dict[str, StoredFile]

    @classmethod
    def open(cls, directory: str | Path) -> HuggingFaceFolder:
        """Read the headers.

        Raises:
            ModelError: no readable ``config.json``.
            CheckpointError: weights missing, damaged, or different from the index.
        """
        directory = Path(directory)
        config = read_config(directory)
        index = directory / INDEX
        weight_map = _json(index, CheckpointError).get("weight_map") if index.is_file() else None
        files = sorted(set(weight_map.values())) if weight_map else [SINGLE]
        for file in files:
            if Path(file).name != file or not (directory / file).is_file():
                reason = f"{INDEX} names it" if weight_map else f"and there is no {INDEX}"
                raise CheckpointError(f"{directory / file} is missing ({reason}); copy the whole checkpoint")
        stored = {file: read_safetensors(directory / file) for file in files}
        tensors = {Ref(file, *name): spec for file, held in stored.items() for name, spec in held.specs.items()}
        if weight_map is not None:
            _check_index(index, weight_map, tensors)
        return cls(directory=directory, config=config, tensors=tensors, files=stored)

    def other_files(self) -> list[Path]:
        """What belongs to the model beside the weights: configuration, tokenizer, templates."""
        return [
            path
            for path in sorted(self.directory.iterdir())
            if path.is_file()
            and path.name not in {INDEX, MANIFEST}
            and path.suffix not in WEIGHTS
            and not path.name.startswith(".")
        ]


def read_config(directory: Path) -> dict[str, Any]:
    """``config.json``.

    Raises:
        ModelError: there is none, or it is not readable.
    """
    if not (directory / "config.json").is_file():
        raise ModelError(f"{directory} is no Hugging Face folder: it has no config.json")
    return _json(directory / "config.json", ModelError)


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
