"""Where a checkpoint keeps its parts, in the original layout and in the diffusers one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from wan_infer.checkpoints.names import UMT5_ALIAS, Layout
from wan_infer.checkpoints.tensors import Tensors, open_file, open_safetensors, read_json, safetensors_files
from wan_infer.errors import CheckpointError

Part = Literal["transformer", "vae", "text_encoder", "tokenizer", "clip"]

PLACES: Mapping[Layout, Mapping[Part, str]] = MappingProxyType(
    {
        "original": {
            "transformer": ".",
            "vae": "Wan2.1_VAE.pth",
            "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth",
            "tokenizer": "google/umt5-xxl",
            "clip": "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
        },
        "diffusers": {
            "transformer": "transformer",
            "vae": "vae",
            "text_encoder": "text_encoder",
            "tokenizer": "tokenizer",
            "clip": "image_encoder",
        },
    }
)
# Weights in a folder begin with this.
STEMS: Mapping[Part, str] = MappingProxyType(
    {
        "transformer": "diffusion_pytorch_model",
        "vae": "diffusion_pytorch_model",
        "text_encoder": "model",
        "clip": "model",
    }
)
# The original CLIP file holds a text tower as well. Nothing uses it, but nothing is lost either when a checkpoint is
# converted: in the diffusers layout, it lies beside the image tower.
CLIP_TEXT_TOWER = "clip_text_tower.safetensors"
# Folders that belong to it, by layout.
CLIP_TOKENIZER: Mapping[Layout, str] = MappingProxyType(
    {"original": "xlm-roberta-large", "diffusers": "image_encoder/xlm-roberta-large"}
)
_TOKENIZER_FILES = ("tokenizer.json", "spiece.model")
# A key of its config.json by which a part of the diffusers layout is known, and the value where the key is not enough.
_SIGNS: Mapping[Part, tuple[str, str | None]] = MappingProxyType(
    {
        "transformer": ("attention_head_dim", None),
        "vae": ("base_dim", None),
        "text_encoder": ("model_type", "umt5"),
        "clip": ("model_type", "clip_vision_model"),
    }
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """One part of a model on disk.

    Attributes:
        part: which.
        layout: by which names its tensors go.
        path: its folder or file.
    """

    part: Part
    layout: Layout
    path: Path

    def missing(self) -> list[Path]:
        """Return the files that should be there and are not.

        Raises:
            CheckpointError: the index of the weights can't be read.
        """
        if self.part == "tokenizer":
            found = any((self.path / name).is_file() for name in _TOKENIZER_FILES)
            return [] if found else [self.path / " or ".join(_TOKENIZER_FILES)]
        if not self._is_folder:
            return [] if self.path.is_file() else [self.path]
        files = [self.path / "config.json", *safetensors_files(self.path, STEMS[self.part])]
        return [file for file in files if not file.is_file()]

    def config(self) -> dict[str, Any]:
        """Return its ``config.json``, empty where the layout has none.

        Raises:
            CheckpointError: it is missing, or no JSON object.
        """
        return read_json(self.path / "config.json") if self._is_folder else {}

    def tensors(self) -> Tensors:
        """Open its weights; names are those that `wan_infer.checkpoints.names` knows.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        if not self._is_folder:
            tensors = open_file(self.path)
            return tensors.only(lambda name: name.startswith("visual.")) if self.part == "clip" else tensors
        tensors = open_safetensors(self.path, STEMS[self.part])
        if self.part == "transformer" and self.layout == "diffusers":
            # Some releases stored a norm that no model has; diffusers drops it as well.
            return tensors.only(lambda name: not name.endswith(".norm_added_q.weight"))
        if self.part == "text_encoder" and UMT5_ALIAS[0] in tensors.meta:
            stored_once = UMT5_ALIAS[1] not in tensors.meta
            return tensors.renamed(dict([UMT5_ALIAS])) if stored_once else tensors.only(lambda n: n != UMT5_ALIAS[0])
        if self.part == "clip" and not any(name.startswith("vision_model.") for name in tensors.meta):
            # transformers >= 5 leaves the first word out where there is no projection.
            return tensors.renamed({name: f"vision_model.{name}" for name in tensors.meta})
        return tensors

    @property
    def _is_folder(self) -> bool:
        return self.layout == "diffusers" or self.part == "transformer"


def detect(path: Path) -> Layout | None:
    """Tell the layout of a checkpoint folder, or None when it is no such folder."""
    if any((path / place / "config.json").is_file() for part, place in PLACES["diffusers"].items() if part in STEMS):
        return "diffusers"
    if (path / "model_index.json").is_file():
        return "diffusers"
    if part_of(path) is not None:
        return None
    places = [place for part, place in PLACES["original"].items() if part != "transformer"]
    weights = any(path.glob(f"{STEMS['transformer']}*.safetensors*"))
    config = (path / "config.json").is_file() and "dim" in read_json(path / "config.json")
    return "original" if weights or config or any((path / place).exists() for place in places) else None


def part_of(path: Path) -> Part | None:
    """Tell which part of the diffusers layout a folder is, by its ``config.json``."""
    if not (path / "config.json").is_file():
        return None
    config = read_json(path / "config.json")
    for part, (key, value) in _SIGNS.items():
        if key in config and value in (None, config[key]):
            return part
    return None


def find(path: str | Path, part: Part) -> Source:
    """Find one part: in a checkpoint folder of either layout, or `path` is the part's own file or folder.

    Raises:
        CheckpointError: it is not there, or not complete; names the missing files.
    """
    path = Path(path)
    source = _find(path, part)
    if missing := source.missing():
        names = ", ".join(str(file) for file in missing)
        raise CheckpointError(f"the {part} is incomplete ({source.layout} layout); missing: {names}")
    return source


def _find(path: Path, part: Part) -> Source:
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if path.is_file():
        if part in ("transformer", "tokenizer"):
            raise CheckpointError(f"{path} is a file; give the folder of the {part}")
        return Source(part=part, layout="original", path=path)
    if part_of(path) == part:
        return Source(part=part, layout="diffusers", path=path)
    if layout := detect(path):
        return Source(part=part, layout=layout, path=path / PLACES[layout][part])
    if part == "tokenizer":
        return Source(part=part, layout="diffusers", path=path)
    raise CheckpointError(f"{path} holds no {part}: {_EXPECTED}")


_EXPECTED = (
    "expected is a Wan2.1 checkpoint, either original (config.json, diffusion_pytorch_model*.safetensors, "
    "Wan2.1_VAE.pth, …) or diffusers (model_index.json, transformer/, vae/, …)"
)


def layout_of(path: Path) -> Layout:
    """Tell the layout of a checkpoint folder.

    Raises:
        CheckpointError: it is neither, or a Wan2.2 model.
    """
    layout = detect(path) if path.is_dir() else None
    if layout is None:
        there = "is no checkpoint folder" if path.is_dir() else "is no folder"
        raise CheckpointError(f"{path} {there}: {_EXPECTED}")
    if (path / "transformer_2").exists():
        raise CheckpointError(f"{path} has two transformers: it is a Wan2.2 model, and this package runs Wan2.1")
    return layout
