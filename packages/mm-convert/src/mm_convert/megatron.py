"""Megatron-style folders: a tracker file, an iteration, one file a rank.

::

    DIR/latest_checkpointed_iteration.txt          "release", or a decimal iteration
    DIR/release/mp_rank_00[_000]/model_optim_rng.pt    {"model": {name: tensor}, "checkpoint_version": 3.0}
"""

from __future__ import annotations

import argparse
import pickle
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_convert.errors import CheckpointError
from mm_convert.layout import RANK_DIR, Layout, Part
from mm_convert.layout import RANK_FILE as RANK_FILE
from mm_convert.plan import Ref, Spec
from mm_convert.restricted_pickle import DTYPES
from mm_convert.stored import StoredFile
from mm_convert.torch_file import read_torch_file

TRACKER = "latest_checkpointed_iteration.txt"
CHECKPOINT_VERSION = 3.0  # without it Megatron takes the file for version 0 and reorders QKV
LAYER: dict[Part, re.Pattern[str]] = {
    "llm": re.compile(r"text_decoder\.decoder\.layers\.(\d+)\."),
    "vit": re.compile(r"image_encoder\.encoder\.blocks\.layers\.(\d+)\."),
}


@dataclass(frozen=True, kw_only=True)
class MegatronFolder:
    """A checkpoint folder as found on disk.

    Attributes:
        directory: the iteration's folder (``DIR/release`` or ``DIR/iter_0001000``).
        layout: the layout that its folders and tensor names show.
        tensors: every tensor; files are named from `directory` on.
        files: where the tensors' bytes stand.
    """

    directory: Path
    layout: Layout
    tensors: dict[Ref, Spec]
    files: dict[str, StoredFile]

    @classmethod
    def open(cls, directory: str | Path) -> MegatronFolder:
        """Read the tracker, the rank folders and the tensors' names and shapes (no data).

        Raises:
            CheckpointError: incomplete or unreadable.
        """
        iteration = iteration_dir(Path(directory))
        tp_size, pp_size = _sizes(iteration)
        read = {
            f"{path.parent.name}/{path.name}": read_torch_file(path)
            for path in sorted(iteration.glob(f"mp_rank_*/{RANK_FILE}"))
        }
        files = {file: stored for file, (stored, _) in read.items()}
        tensors = {Ref(file, *name): spec for file, stored in files.items() for name, spec in stored.specs.items()}
        # Counted from the sections: the last virtual stage may hold no tensor.
        vpp_size = max(len(sections) for _, sections in read.values())
        layout = _layout(tensors, tp_size, pp_size, vpp_size)
        return cls(directory=iteration, layout=layout, tensors=tensors, files=files)


def iteration_dir(directory: Path) -> Path:
    """The folder that the tracker file names.

    Raises:
        CheckpointError: no tracker, or it names nothing.
    """
    tracker = directory / TRACKER
    if not tracker.is_file():
        raise CheckpointError(
            f"{directory} is no Megatron checkpoint: it has no {TRACKER} (an interrupted run has none)"
        )
    text = tracker.read_text().strip()
    name = "release" if text == "release" else f"iter_{int(text):07d}" if text.isdigit() else None
    if name is None or not (directory / name).is_dir():
        raise CheckpointError(
            f"{tracker} says {text!r}; it must say 'release' or the number of an iteration that is there"
        )
    return directory / name


def load_rank_file(path: Path) -> dict[str, dict[str, Any]]:
    """The sections (``model``, or ``model0``, ``model1``, …) of a rank's file; tensors are memory mapped.

    Raises:
        CheckpointError: unreadable, or it asks to run code.
    """
    import torch

    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} can't be read as a checkpoint: {str(error).splitlines()[0]}") from error
    sections = (
        {k: v for k, v in content.items() if re.fullmatch(r"model\d*", str(k))} if isinstance(content, dict) else {}
    )
    if not sections:
        raise CheckpointError(f"{path} has no entry 'model'; is it a Megatron checkpoint?")
    return {
        section: {
            name: t for name, t in names.items() if isinstance(t, torch.Tensor) and not name.endswith("_extra_state")
        }
        for section, names in sections.items()
    }


def spec_of(tensor: Any) -> Spec:
    """The header of a torch tensor."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    known = {name: key for key, name in DTYPES.items()}
    if dtype not in known:
        raise CheckpointError(f"a tensor has dtype {dtype}; known: {', '.join(known)}")
    return Spec(known[dtype], tuple(tensor.shape))


def _sizes(iteration: Path) -> tuple[int, int]:
    """Tensor- and pipeline-parallel size, from the folders' names."""
    matches = [RANK_DIR.fullmatch(path.name) for path in iteration.glob("mp_rank_*")]
    ranks = {(int(m[1]), int(m[2] or 0)) for m in matches if m}
    if not ranks or len(ranks) != len(matches):
        raise CheckpointError(f"{iteration} holds no folders mp_rank_TT or mp_rank_TT_PPP, or others beside them")
    tp_size, pp_size = (max(numbers) + 1 for numbers in zip(*ranks, strict=True))
    held = {(int(m[1]), int(m[2] or 0)) for m in matches if m and (iteration / m[0] / RANK_FILE).is_file()}
    absent = [(t, p) for t in range(tp_size) for p in range(pp_size) if (t, p) not in held]
    if absent:
        raise CheckpointError(
            f"{iteration} is incomplete: no {RANK_FILE} for (tp, pp) ranks {absent[:8]}; copy it again"
        )
    return tp_size, pp_size


def _layout(tensors: dict[Ref, Spec], tp_size: int, pp_size: int, vpp_size: int) -> Layout:
    """The layer lists, counted from the tensors' names of tensor-parallel rank 0."""
    layers: dict[tuple[Part, int, int], set[str]] = defaultdict(set)
    for ref in tensors:
        rank = RANK_DIR.fullmatch(ref.file.split("/", 1)[0])
        stage = int(ref.section.removeprefix("model") or 0)
        for part, pattern in LAYER.items():
            match = pattern.match(ref.name)
            if match and rank and rank[1] == "00":
                layers[part, stage, int(rank[2] or 0)].add(match[1])
    llm, vit = (
        tuple(tuple(len(layers[part, v, p]) for p in range(pp_size)) for v in range(vpp_size)) for part in LAYER
    )
    return Layout(llm_pp_layers=llm, vit_pp_layers=vit, tp_size=tp_size)
