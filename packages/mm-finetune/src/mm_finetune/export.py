"""A checkpoint of a run as a folder that others read: a Hugging Face model, or PEFT's adapter."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mm_convert import Converter, ConvertError, HuggingFaceFolder
from mm_convert.lora.conversion import AdapterConverter
from mm_convert.lora.merge import Merger
from mm_convert.megatron import TRACKER, iteration_dir
from mm_finetune.config import TrainConfig, load_config
from mm_finetune.errors import CheckpointError, ConfigError
from mm_finetune.families import family_of
from mm_finetune.output import new_folder, require_free_folder

# A run's files, a checkpoint's folder of adapters, and the model folder's limits of pictures.
CONFIG, CHECKPOINT, ADAPTER, PICTURES = "config.yaml", "checkpoint", "adapter", "preprocessor_config.json"

What = Literal["model", "merged", "adapter"]


@dataclass(frozen=True, kw_only=True)
class RunCheckpoint:
    """A checkpoint of a run.

    Attributes:
        folder: ``checkpoint/iter_…``.
        config: the run.
    """

    folder: Path
    config: TrainConfig

    @classmethod
    def find(cls, path: Path) -> RunCheckpoint:
        """The checkpoint that is meant by a path.

        Args:
            path: the folder of a run, its ``checkpoint``, or one of the ``iter_…`` in there. Of several the newest.

        Raises:
            CheckpointError: there is none.
            ConfigError: the run's ``config.yaml`` can't be read.
        """
        path = path.absolute()
        if (path / CONFIG).is_file():
            run, directory = path, path / CHECKPOINT
        elif (path / TRACKER).is_file():
            run, directory = path.parent, path
        elif re.fullmatch(r"iter_\d{7}", path.name) and path.is_dir():
            run, directory = path.parent.parent, path
        else:
            raise CheckpointError(
                f"{path} is no folder of a run, of its checkpoints, or one of them: it needs a {CONFIG}, a {TRACKER} or"
                " the name iter_…"
            )
        if not (run / CONFIG).is_file():
            raise CheckpointError(f"{run} has no {CONFIG}, so it is no folder of a run; give one that has")
        try:
            folder = path if directory.name.startswith("iter_") else iteration_dir(directory)
        except ConvertError as error:
            raise CheckpointError(f"{error}; the run has saved nothing yet") from error
        return cls(folder=folder, config=load_config(run / CONFIG))

    @property
    def adapter(self) -> Path | None:
        """PEFT's folder, of a run that trained adapters."""
        folder = self.folder / ADAPTER
        return folder if folder.is_dir() else None


def export(
    checkpoint: str | Path, output: str | Path, *, what: What = "model", hf_dir: Path | None = None,
    overwrite: bool = False,
) -> Path:  # fmt: skip
    """Write a checkpoint as a folder that others read; it appears when it is complete.

    Args:
        checkpoint: see :meth:`RunCheckpoint.find`.
        output: the folder to write.
        what: ``model``: a Hugging Face folder, of a run that trained weights; ``merged``: the same, of adapters added
            to the weights that the run began with, in the place of which ``lora.modules_to_save`` has its own;
            ``adapter``: PEFT's folder.
        hf_dir: the model folder, for configuration and tokenizer; default: the run's.
        overwrite: replace a folder that this made.

    Raises:
        CheckpointError: no checkpoint, not of that kind, or not whole.
        ConfigError: the run's ``config.yaml`` can't be read, or names a folder that is gone.
        OutputExistsError: `output` exists.
    """
    found, output = RunCheckpoint.find(Path(checkpoint)), Path(output)
    require_free_folder(output, overwrite=overwrite, ours=_is_ours)
    _check_kind(found, what)
    with new_folder(output) as partial:
        if what == "adapter":
            assert found.adapter is not None, "checked"
            shutil.copytree(found.adapter, partial, dirs_exist_ok=True)
        else:
            _write_model(found, partial, _model_folder(found, hf_dir))
    return output


def _is_ours(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def _check_kind(found: RunCheckpoint, what: What) -> None:
    if found.adapter is None and what != "model":
        raise CheckpointError(
            f"{found.folder} holds whole weights, no adapter: export it without --merge and --adapter"
        )
    if found.adapter is not None and what == "model":
        raise CheckpointError(
            f"{found.folder} holds an adapter: add --merge for a model with the adapter in its weights, or --adapter"
            " for PEFT's folder"
        )


def _model_folder(found: RunCheckpoint, given: Path | None) -> Path:
    folder = given or found.config.model.hf_dir
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{folder} is no Hugging Face folder (the run's model.hf_dir; has it moved?): give it with --hf_dir"
        )
    return folder


def _write_model(found: RunCheckpoint, target: Path, hf_dir: Path) -> None:
    """A Hugging Face folder; `target` is there and empty."""
    try:
        converter = Converter.named(family_of(HuggingFaceFolder.open(hf_dir).config.get("model_type")).converter)
        if found.adapter is None:
            with _alone(found.folder) as mm_dir:
                converter.mm_to_hf(mm_dir, hf_dir, target)
        else:
            # What the run began with need not be what hf_dir holds.
            with tempfile.TemporaryDirectory(prefix=".export-", dir=target.parent) as work:
                base = Path(work) / "base"
                converter.mm_to_hf(found.config.model.load, hf_dir, base)
                adapters = AdapterConverter(family=converter.family)
                Merger(adapters=adapters).prepare(base, found.adapter, target).run()
    except ConvertError as error:
        raise CheckpointError(str(error)) from error
    _note_picture_limits(target, found.config)


@contextmanager
def _alone(folder: Path) -> Iterator[Path]:
    """A Megatron-style folder whose newest checkpoint is the given one; links, nothing is copied."""
    if iteration_dir(folder.parent) == folder:
        yield folder.parent
        return
    with tempfile.TemporaryDirectory(prefix="export-") as work:
        (Path(work) / folder.name).symlink_to(folder)
        (Path(work) / TRACKER).write_text(str(int(folder.name.removeprefix("iter_"))), encoding="utf-8")
        yield Path(work)


def _note_picture_limits(folder: Path, config: TrainConfig) -> None:
    """Whoever asks the model is to see pictures as it saw them in training."""
    limits = {"min_pixels": config.data.min_pixels, "max_pixels": config.data.max_pixels}
    given = {name: value for name, value in limits.items() if value is not None}
    path = folder / PICTURES
    if not given or not path.is_file():
        return
    settings = json.loads(path.read_text(encoding="utf-8"))
    # Newer files say it as a size; published ones, and every reader, know these two.
    size = settings.pop("size", None) or {}
    said = {"min_pixels": size.get("shortest_edge"), "max_pixels": size.get("longest_edge")}
    settings = {name: value for name, value in said.items() if value is not None} | settings | given
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
