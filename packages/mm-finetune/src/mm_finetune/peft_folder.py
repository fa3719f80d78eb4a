"""A folder of PEFT whose adapter comes with layers that were trained in full (``modules_to_save``), taken apart."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mm_convert import CheckpointError, Family
from mm_convert.lora.config import CONFIG, WEIGHTS, AdapterFolder
from mm_convert.lora.conversion import AdapterConverter, AdapterOptions
from mm_convert.lora.table import A, B

MODULES, TIED = "modules_to_save", "ensure_weight_tying"


@dataclass(frozen=True, kw_only=True)
class PeftFolder:
    """What it holds.

    Attributes:
        adapter: a folder that mm-convert takes for one of adapters alone, with `converter`.
        converter: leaves out everything else.
        weights: the file with all tensors.
        saved: weights of the layers that were trained in full: names in the file by published names.
        tied: they keep embedding and output layer one weight, where they are.
    """

    adapter: AdapterFolder
    converter: AdapterConverter
    weights: Path
    saved: Mapping[str, str]
    tied: bool


@contextmanager
def peft_folder(directory: Path, family: Family) -> Iterator[PeftFolder]:
    """Read a folder's headers.

    Args:
        directory: the folder.
        family: of mm-convert; knows how names are spelt.

    Raises:
        ConvertError: there is no adapter of low rank in it.
    """
    config, weights = _config(directory), directory / WEIGHTS
    if not config.get(MODULES) or not weights.is_file():
        adapter, converter = AdapterFolder.open(directory), AdapterConverter(family=family)
        yield PeftFolder(adapter=adapter, converter=converter, weights=weights, saved={}, tied=False)
        return
    with TemporaryDirectory(prefix="adapter-") as work:
        (Path(work) / CONFIG).write_text(json.dumps(config | {MODULES: None}), encoding="utf-8")
        (Path(work) / WEIGHTS).symlink_to(weights.absolute())
        try:
            adapter = AdapterFolder.open(work)
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(work, str(directory))) from error
        others = [ref.name for ref in adapter.tensors if not ref.name.endswith((A, B))]
        yield PeftFolder(
            adapter=adapter,
            converter=AdapterConverter(family=family, options=AdapterOptions(allow_unused=others)),
            weights=weights,
            saved={AdapterConverter(family=family).table.canonical(name): name for name in others},
            tied=bool(config.get(TIED)),
        )


def _config(directory: Path) -> dict[str, Any]:
    """What is readable of it: whoever opens the folder says what is wrong."""
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
