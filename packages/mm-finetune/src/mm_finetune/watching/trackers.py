"""TensorBoard, Weights & Biases and SwanLab behind one small interface.

A run that goes on from an earlier step draws one curve: TensorBoard hides what was logged beyond that step; the others
go on in the same run of theirs. They take no step twice: what they hold of the steps that are done again stays.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from mm_finetune.errors import ConfigError

IDS = "trackers.json"
"""In the folder of a run: how services call it."""


class Tracker(Protocol):
    """Takes the numbers of a step."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Note a step."""

    def close(self) -> None:
        """Write what is left."""


class TensorBoard:
    """Event files in ``RUN/tensorboard``."""

    def __init__(self, folder: Path, project: str, settings: Mapping[str, Any], done: int) -> None:
        del project
        module: Any = import_module("torch.utils.tensorboard")
        # The settings stand at the step that is done: of a run that starts anew all earlier events go.
        self.writer = module.SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1 if done else 0)
        rows = [f"    {section}: {values}" for section, values in settings.items()]
        self.writer.add_text("settings", "\n".join(rows), done)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Note a step."""
        for name, value in values.items():
            self.writer.add_scalar(f"train/{name}", value, step)

    def close(self) -> None:
        """Write what is left."""
        self.writer.close()


class Hosted:
    """Weights & Biases or SwanLab: both are ``init``, ``log(values, step=…)``, ``finish``.

    Args:
        module: ``wandb`` or ``swanlab``.
        where: the argument of its ``init`` that names a folder.
        name: the argument that names a run.
    """

    def __init__(
        self, module: str, where: str, name: str, folder: Path, project: str, settings: Mapping[str, Any], done: int
    ) -> None:
        self.module: Any = import_module(module)
        options = {where: str(folder), name: folder.absolute().name}
        ids = _ids(folder)
        if done and module in ids:
            options |= {"id": ids[module], "resume": "allow"}
        run = self.module.init(project=project, config=dict(settings), **options)
        # W&B says which step it takes next, and warns of each one before; SwanLab passes over them by itself.
        self.first = int(getattr(run, "starting_step", 0))
        if isinstance(named := getattr(run, "id", None), str):
            (folder / IDS).write_text(json.dumps(ids | {module: named}) + "\n", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Note a step."""
        if step < self.first:
            return
        self.module.log({f"train/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        """Write what is left."""
        self.module.finish()


def _ids(folder: Path) -> dict[str, str]:
    """The runs of an earlier start, by module; none where the file is not there or not whole."""
    try:
        ids = json.loads((folder / IDS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(name): str(value) for name, value in ids.items()} if isinstance(ids, dict) else {}


TRACKERS: Mapping[str, Callable[[Path, str, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": partial(Hosted, "wandb", "dir", "name"),
    "swanlab": partial(Hosted, "swanlab", "logdir", "experiment_name"),
}


def require_trackers(names: Sequence[str]) -> None:
    """Look whether they are installed, before anything is computed.

    Raises:
        ConfigError: one is not.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"output.trackers names {', '.join(missing)}, which is not installed: pip install {' '.join(missing)}"
        )


def open_trackers(
    names: Sequence[str], folder: Path, *, project: str, settings: Mapping[str, Any], done: int = 0
) -> tuple[Tracker, ...]:
    """Open them.

    Args:
        names: ``tensorboard``, ``wandb``, ``swanlab``.
        folder: the folder of the run; its name is the name of the run there.
        project: the project there.
        settings: the configuration, shown beside the curves.
        done: steps that are done already, of a run that is resumed.
    """
    return tuple(TRACKERS[name](folder, project, settings, done) for name in names)
