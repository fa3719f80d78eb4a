"""A model of an original release that is one file, without ``config.json``: its shapes say what that would say."""

from __future__ import annotations

from pathlib import Path

from mm_convert.errors import ModelError
from mm_convert.families import Family
from mm_convert.huggingface import HuggingFaceFolder
from mm_convert.plans import Ref
from mm_convert.safetensors_file import read_safetensors
from mm_convert.torch_file import read_weights_file


def open_model(path: Path, family: Family) -> HuggingFaceFolder:
    """A model's folder, or its single file; headers alone are read.

    Raises:
        ModelError: a file, where the family has folders alone.
        CheckpointError: damaged, or of another model.
    """
    if not path.is_file():
        return HuggingFaceFolder.open(path)
    if family.original_config is None:
        raise ModelError(f"{path} is a file; give the folder of the model, which holds config.json and its weights")
    stored = read_safetensors(path) if path.suffix == ".safetensors" else read_weights_file(path)
    unused = family.original_unused
    tensors = {
        Ref(path.name, *name): spec
        for name, spec in stored.specs.items()
        if unused is None or not unused.search(name[1])
    }
    config = family.original_config({ref.name: spec.shape for ref, spec in tensors.items()})
    return HuggingFaceFolder(directory=path.parent, config=config, tensors=tensors, files={path.name: stored})
