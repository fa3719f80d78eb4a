"""Carry a plan out: read slices, put them together, write each file once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_convert.errors import CheckpointError
from mm_convert.huggingface import INDEX, SINGLE, HuggingFaceFolder
from mm_convert.megatron import CHECKPOINT_VERSION, TRACKER, MegatronFolder, load_rank_file
from mm_convert.output import new_folder
from mm_convert.plan import Plan, Ref, Segment

if TYPE_CHECKING:
    from torch import Tensor

Read = Callable[[Segment], "Tensor"]
"""Gives a segment's slice of its source."""


def assemble(plan: Plan, target: Ref, read: Read) -> Tensor:
    """Make one target tensor.

    Raises:
        CheckpointError: a second source of the same bytes differs (see :mod:`mm_convert.plan`).
    """
    import torch

    segments = plan.writes[target]
    slices = [read(segment) for segment in segments]
    tensor = torch.cat(slices, dim=segments[0].dim) if len(slices) > 1 else slices[0].clone()
    for segment in plan.checks.get(target, ()):
        written = tensor.narrow(segment.dim, segment.target_start, segment.length)
        if not torch.equal(written, read(segment)):
            first = segments[0].source
            raise CheckpointError(
                f"{segment.source.name} in {segment.source.file} must equal {first.name} in {first.file}"
                f" (both make {target.name}), but it does not"
            )
    return tensor


def write_megatron(
    plan: Plan, source: HuggingFaceFolder, target: Path, *, sections: dict[str, list[str]], overwrite: bool
) -> None:
    """Write the rank files of a new ``release`` checkpoint; the tracker comes last.

    Args:
        plan: from ``plan_hf_to_mm``.
        source: the Hugging Face folder that the plan reads.
        target: the new folder.
        sections: the sections of every rank's file, empty ones included.
        overwrite: replace an existing folder.
    """
    import torch

    files = plan.files()
    with (
        new_folder(target, overwrite=overwrite) as folder,
        _progress(plan) as done,
        huggingface_reader(source) as read,
    ):
        for file, names in sections.items():
            content: dict[str, Any] = {name: {} for name in names}
            for ref in files.get(file, []):
                content[ref.section][ref.name] = assemble(plan, ref, read)
                done(plan.targets[ref].nbytes)
            path = folder / "release" / file
            path.parent.mkdir(parents=True)
            torch.save({**content, "checkpoint_version": CHECKPOINT_VERSION}, path)
        (folder / TRACKER).write_text("release")


def write_huggingface(
    plan: Plan, source: MegatronFolder, template: HuggingFaceFolder, target: Path, *, overwrite: bool
) -> None:
    """Write a Hugging Face folder with the template's shards, names, configuration and tokenizer."""
    from safetensors.torch import save_file

    read = megatron_reader(source)
    files = plan.files()
    with new_folder(target, overwrite=overwrite) as folder, _progress(plan) as done:
        for file, refs in files.items():
            tensors = {}
            for ref in refs:
                tensors[ref.name] = assemble(plan, ref, read).contiguous()
                done(plan.targets[ref].nbytes)
            save_file(tensors, folder / file, metadata={"format": "pt"})
        if set(files) != {SINGLE}:
            index = {
                "metadata": {"total_size": plan.nbytes},
                "weight_map": {ref.name: ref.file for ref in sorted(plan.targets, key=lambda r: r.name)},
            }
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        for path in template.other_files():
            shutil.copyfile(path, folder / path.name)


@contextmanager
def huggingface_reader(source: HuggingFaceFolder) -> Iterator[Read]:
    """Slices of a Hugging Face folder's tensors, straight from the files."""
    from safetensors import safe_open

    with ExitStack() as stack:
        files = {
            file: stack.enter_context(safe_open(source.directory / file, framework="pt"))
            for file in {ref.file for ref in source.tensors}
        }

        def read(segment: Segment) -> Tensor:
            stored = files[segment.source.file].get_slice(segment.source.name)
            rows = slice(segment.source_start, segment.source_start + segment.length)
            return stored[(slice(None),) * segment.dim + (rows,)]  # type: ignore[no-any-return]

        yield read


def megatron_reader(source: MegatronFolder) -> Read:
    """Slices of a Megatron folder's tensors, memory mapped."""
    loaded: dict[str, dict[str, dict[str, Tensor]]] = {}

    def read(segment: Segment) -> Tensor:
        ref = segment.source
        if ref.file not in loaded:
            loaded[ref.file] = load_rank_file(source.directory / ref.file)
        tensor = loaded[ref.file][ref.section][ref.name]
        return tensor.narrow(segment.dim, segment.source_start, segment.length)

    return read


@contextmanager
def _progress(plan: Plan) -> Iterator[Callable[[int], object]]:
    from tqdm import tqdm

    # disable=None: silent when stderr is not a terminal
    with tqdm(total=plan.nbytes, unit="B", unit_scale=True, unit_divisor=1024, disable=None) as bar:
        yield bar.update
