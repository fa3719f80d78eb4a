"""Where a run goes on: the newest whole checkpoint of its folder, if the run is still the same one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_convert.megatron import TRACKER
from mm_finetune.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from mm_finetune.config import TrainConfig
    from mm_finetune.data import Dataset

STATE, SUMMARY = "state", "state.json"
FORMAT = 1

# Keys that may be others after a resume. What isn't named must stay: a new key is safe until somebody thinks about it.
# Where files are: what is in them is compared instead.
_PLACES = ("model.hf_dir", "model.load", "data.path", "data.dataset_dir", "data.max_samples", "lora.load")
# What changes no number of the run, or only its rounding.
_FREE = (
    "parallel.*", "output.*", "eval*", "*.eval*", "train.micro_batch_size", "train.recompute",
    "train.distributed_optimizer", "train.on_nan", "train.spike_factor", "data.packing", "data.pack_length",
    "data.on_bad", "data.max_bad_ratio", "data.workers", "data.prefetch_mib", "data.cache_mib",
    "data.decode_timeout_s", "data.cache_dir",
)  # fmt: skip
# What people change on purpose in the middle of a run: it holds from the next step on, and is told.
_TOLD = (
    "train.steps", "train.epochs", "train.lr", "train.min_lr", "train.warmup_fraction", "train.weight_decay",
    "train.adam_*", "train.clip_grad",
)  # fmt: skip
# What may be another one when the optimizer starts anew.
_OPTIMIZER = ("train.loss", "train.dtype", "train.lr_scale")


@dataclass(frozen=True, kw_only=True)
class Resume:
    """A checkpoint to go on from.

    Attributes:
        folder: ``checkpoint/iter_…``.
        summary: what its ``state/state.json`` says.
    """

    folder: Path
    summary: Mapping[str, Any]

    @property
    def step(self) -> int:
        """The last step that is in it."""
        return int(self.summary["step"])


def newest(directory: Path) -> Resume | None:
    """The checkpoint that the tracker names; without a tracker the newest folder; None where there is none.

    Raises:
        CheckpointError: it is missing or damaged, or holds weights alone.
    """
    tracker = directory / TRACKER
    if tracker.is_file():
        text = tracker.read_text(encoding="utf-8", errors="replace").strip()
        folder = directory / (f"iter_{int(text):07d}" if text.isdecimal() else text)
    else:
        # The run ended between the two last things that are done for a checkpoint.
        folder = max(directory.glob("iter_*"), default=directory)
    if folder == directory:
        return None
    path = folder / STATE / SUMMARY
    older = f"an older one of {_names(directory, folder)} is taken when its number stands in {tracker}"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {STATE}/{SUMMARY}, so there is nothing to go on from; {older}; or convert its weights and"
            " start a new run from them"
        )
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        if summary["format"] != FORMAT:
            raise CheckpointError(f"{path} has format {summary['format']}, this version reads {FORMAT}")
        return Resume(folder=folder, summary=summary)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}; {older}") from error


def _names(directory: Path, but: Path) -> str:
    others = sorted(path.name for path in directory.glob("iter_*") if path != but)
    return ", ".join(others) or "none"


def data_marks(dataset: Dataset) -> dict[str, Any]:
    """What the order of a data set and its lengths depend on, as far as the index and some of its records tell."""
    index, count = dataset.index, len(dataset)
    digest = hashlib.blake2b(digest_size=16)
    digest.update(index.tokens.tobytes())
    for number in range(0, count, max(1, count // 1000)):
        digest.update(repr(dataset.samples[number]).encode())
    return {"records": count, "usable": len(index.usable), "order": index.order_key, "content": digest.hexdigest()}


def model_marks(sizes: Any) -> dict[str, Any]:
    """The sizes of a model."""
    marks: dict[str, Any] = json.loads(json.dumps(asdict(sizes), default=str))
    return marks


def compare(resume: Resume, config: TrainConfig, marks: Mapping[str, Any]) -> list[str]:
    """Refuse another run.

    Args:
        resume: the checkpoint.
        config: the run's, with its steps.
        marks: what it would save of itself: ``config``, ``data``, ``model``.

    Returns:
        What is different and may be, in words: keys with the value that they had and the one that they get.

    Raises:
        ConfigError: names all keys that must be what they were.
    """
    data, model = marks["data"], marks["model"]
    before, now = flat(resume.summary["config"]), flat(json.loads(json.dumps(marks["config"])))
    changed = [key for key in sorted(before.keys() & now.keys()) if before[key] != now[key]]
    changed += [key for key in sorted(now.keys() ^ before.keys()) if "lora." in key or "preference." in key]
    free = (*_PLACES, *_FREE, *(_OPTIMIZER if config.output.no_load_optim else ()))
    told = {key for key in changed if _matches(key, _TOLD)}
    faults = [_fault(key, before, now) for key in changed if key not in told and not _matches(key, free)]
    if data != resume.summary["data"]:
        faults.append(
            f"data.path (or data.max_samples) is another data set: {_data(resume.summary['data'])} before,"
            f" {_data(data)} now"
        )
    old = resume.summary["model"]
    if model != old:
        odd = [
            f"{name} {old.get(name)} before, {model.get(name)} now" for name in model if model[name] != old.get(name)
        ]
        faults.append(f"model.hf_dir is another model: {', '.join(odd)}")
    if config.train.steps < resume.step:
        faults.append(f"train.steps is {config.train.steps}, the checkpoint has done {resume.step}")
    if faults:
        raise ConfigError(
            f"{resume.folder} is of another run: {'; '.join(faults)}. Put these back, or choose another output.dir"
        )
    return [_fault(key, before, now) for key in changed if key in told]


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and not prefix.startswith("train."):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def _fault(key: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    return f"{key} was {before.get(key)!r} and is {now.get(key)!r}"


def _data(marks: Mapping[str, Any]) -> str:
    return f"{marks['usable']} usable of {marks['records']} records ({marks['order'][:6]}-{marks['content'][:6]})"


def _matches(key: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)
