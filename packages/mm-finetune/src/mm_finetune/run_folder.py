"""What a run writes into its folder, and what a new or resumed run takes away from it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

from mm_convert.megatron import TRACKER
from mm_finetune.config import TrainConfig
from mm_finetune.errors import OutputExistsError

CONFIG, METRICS, ANOMALIES, BAD, CHECKPOINT, EVALUATIONS = (
    "config.yaml", "metrics.jsonl", "anomalies.jsonl", "bad.jsonl", "checkpoint", "evals",
)  # fmt: skip


def check_folder(config: TrainConfig) -> None:
    """A finished run is kept unless told otherwise, a folder of somebody else always; an interrupted run may go.

    Raises:
        OutputExistsError: it has to be kept.
    """
    folder, output = config.output.dir, config.output
    if not folder.exists():
        return
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / CONFIG).is_file()):
        raise OutputExistsError(f"{folder} is there and is no folder of a run; choose another output.dir")
    if (folder / CHECKPOINT / TRACKER).exists() and not (output.overwrite or output.resume):
        raise OutputExistsError(
            f"{folder} holds a run with a checkpoint; go on with output.resume=true, choose another output.dir or add"
            " output.overwrite=true"
        )


def make_ready(config: TrainConfig, done: int) -> None:
    """Make the folder, without what an earlier run left of steps after `done`; called by one process."""
    folder = config.output.dir
    folder.mkdir(parents=True, exist_ok=True)
    if done:
        for partial in (folder / CHECKPOINT).glob(".iter_*.partial"):
            shutil.rmtree(partial)
    else:
        shutil.rmtree(folder / CHECKPOINT, ignore_errors=True)
    for name in (ANOMALIES, BAD):
        _keep_rows(folder / name, done)
    for path in (folder / EVALUATIONS).glob("step_*.json"):
        number = path.stem.removeprefix("step_")
        if number.isdecimal() and int(number) > done:
            path.unlink()
    (folder / CONFIG).write_text(config.as_yaml(folder), encoding="utf-8")


def left_by(config: TrainConfig) -> str:
    """What to say of a run that was ended on the spot: what is saved, what is lost, and how to go on."""
    folder = config.output.dir
    saved, done = _saved_step(folder), _last_step(folder / METRICS)
    again = f", {_steps(saved + 1, done)} to be done again" if done > saved else ""
    if saved:
        return f"{folder} holds the checkpoint of step {saved}; output.resume=true goes on from there{again}"
    more = "" if config.output.save_every else "; output.save_every=100 saves on the way"
    return f"no checkpoint is in {folder}: the same line starts anew{again}{more}"


def _steps(first: int, last: int) -> str:
    return f"step {first} has" if first == last else f"steps {first} to {last} have"


def _saved_step(folder: Path) -> int:
    """The step of the newest whole checkpoint; 0: none."""
    try:
        text = (folder / CHECKPOINT / TRACKER).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return 0
    return int(text) if text.isdecimal() else 0


def _last_step(path: Path, tail: int = 1 << 16) -> int:
    """The last step that was logged; 0: none. Only the end of the file is read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - tail))
            return int(json.loads(file.read().splitlines()[-1])["step"])
    except (OSError, ValueError, LookupError, TypeError):
        return 0


def _keep_rows(path: Path, done: int) -> None:
    """Leave the lines of steps up to `done`; the file goes where none is left. Lines without a step are made anew."""
    kept = []
    for line in path.read_bytes().splitlines(keepends=True) if done and path.is_file() else []:
        try:
            step = json.loads(line).get("step")
        except (ValueError, AttributeError):
            continue
        if (math.inf if step is None else step) <= done:
            kept.append(line)
    path.unlink(missing_ok=True)
    if kept:
        path.write_bytes(b"".join(kept))
