"""Hugging Face folders: ``config.json`` and safetensors, read from their headers, without torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_convert.errors import CheckpointError, ModelError
from mm_convert.plan import BYTES, Ref, Spec

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Weights in other formats are never copied along: they would contradict the new ones.
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"}
LARGEST_HEADER = 100 << 20  # safetensors' own limit


@dataclass(frozen=True, kw_only=True)
class HuggingFaceFolder:
    """A checkpoint folder as its headers describe it.

    Attributes:
        directory: the folder.
        config: ``config.json``.
        tensors: every tensor, by address; the section is always empty.
    """

    directory: Path
    config: dict[str, Any]
    tensors: dict[Ref, Spec]

    @classmethod
    def open(cls, directory: str | Path) -> HuggingFaceFolder:
        """Read the headers.

        Raises:
            ModelError: no readable ``config.json``.
            CheckpointError: weights missing, damaged, or different from the index.
        """
        directory = Path(directory)
        if not (directory / "config.json").is_file():
            raise ModelError(f"{directory} is no Hugging Face folder: it has no config.json")
        config = _json(directory / "config.json", ModelError)
        index = directory / INDEX
        weight_map = _json(index, CheckpointError).get("weight_map") if index.is_file() else None
        files = sorted(set(weight_map.values())) if weight_map else [SINGLE]
        for file in files:
            if Path(file).name != file or not (directory / file).is_file():
                reason = f"{INDEX} names it" if weight_map else f"and there is no {INDEX}"
                raise CheckpointError(f"{directory / file} is missing ({reason}); copy the whole checkpoint")
        tensors = {Ref(f, "", n): spec for f in files for n, spec in read_header(directory / f).items()}
        if weight_map is not None:
            _check_index(index, weight_map, tensors)
        return cls(directory=directory, config=config, tensors=tensors)

    def other_files(self) -> list[Path]:
        """What belongs to the model beside the weights: configuration, tokenizer, templates."""
        return [
            path
            for path in sorted(self.directory.iterdir())
            if path.is_file() and path.name != INDEX and path.suffix not in WEIGHTS and not path.name.startswith(".")
        ]


def read_header(path: Path) -> dict[str, Spec]:
    """The tensors of a safetensors file: 8 bytes of length (little endian), then JSON.

    Raises:
        CheckpointError: the file is not safetensors, or truncated.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, LARGEST_HEADER):
            raise CheckpointError(f"{path} is not a safetensors file, or it is truncated")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            specs = {name: Spec(entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} has no valid safetensors header: {error}") from error
    if 8 + length + end != size:
        raise CheckpointError(
            f"{path} has {size} bytes, its header asks for {8 + length + end}: truncated? copy it again"
        )
    strange = {spec.dtype for spec in specs.values()} - BYTES.keys()
    if strange:
        raise CheckpointError(f"{path} holds tensors of dtype {sorted(strange)}; known: {', '.join(BYTES)}")
    return specs


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
