"""TensorBoard, Weights & Biases and SwanLab behind one small interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from mm_finetune.errors import ConfigError


class Tracker(Protocol):
    """Takes the numbers of a step."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Note a step."""

    def close(self) -> None:
        """Write what is left."""


class TensorBoard:
    """Event files in ``RUN/tensorboard``."""

    def __init__(self, folder: Path, project: str, settings: Mapping[str, Any]) -> None:
        del project
        self.writer: Any = import_module("torch.utils.tensorboard").SummaryWriter(str(folder / "tensorboard"))
        rows = [f"    {section}: {values}" for section, values in settings.items()]
        self.writer.add_text("settings", "\n".join(rows), 0)

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
        self, module: str, where: str, name: str, folder: Path, project: str, settings: Mapping[str, Any]
    ) -> None:
        self.module: Any = import_module(module)
        options = {where: str(folder), name: folder.absolute().name}
        self.module.init(project=project, config=dict(settings), **options)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Note a step."""
        self.module.log({f"train/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        """Write what is left."""
        self.module.finish()


def _wandb(folder: Path, project: str, settings: Mapping[str, Any]) -> Tracker:
    return Hosted("wandb", "dir", "name", folder, project, settings)


def _swanlab(folder: Path, project: str, settings: Mapping[str, Any]) -> Tracker:
    return Hosted("swanlab", "logdir", "experiment_name", folder, project, settings)


TRACKERS: Mapping[str, Callable[[Path, str, Mapping[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": _wandb,
    "swanlab": _swanlab,
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
    names: Sequence[str], folder: Path, *, project: str, settings: Mapping[str, Any]
) -> tuple[Tracker, ...]:
    """Open them.

    Args:
        names: ``tensorboard``, ``wandb``, ``swanlab``.
        folder: the folder of the run; its name is the name of the run there.
        project: the project there.
        settings: the configuration, shown beside the curves.
    """
    return tuple(TRACKERS[name](folder, project, settings) for name in names)
