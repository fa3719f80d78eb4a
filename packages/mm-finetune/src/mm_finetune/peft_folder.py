"""A folder of PEFT: an adapter, and layers that were trained in full beside it (``modules_to_save``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mm_convert import Family
from mm_convert.lora.config import IN_FULL, TIED, WEIGHTS, AdapterFolder
from mm_convert.lora.conversion import AdapterConverter, AdapterOptions

__all__ = ["IN_FULL", "TIED", "PeftFolder"]


@dataclass(frozen=True, kw_only=True)
class PeftFolder:
    """What it holds.

    Attributes:
        adapter: the whole folder.
        converter: takes the adapter alone.
        weights: the file with all tensors.
        saved: weights of the layers that were trained in full: names in the file by published names.
        tied: they keep embedding and output layer one weight, where they are.
    """

    adapter: AdapterFolder
    converter: AdapterConverter
    weights: Path
    saved: Mapping[str, str]
    tied: bool

    @classmethod
    def open(cls, directory: Path, family: Family) -> PeftFolder:
        """Read a folder's headers.

        Args:
            directory: the folder.
            family: of mm-convert; knows how names are spelt.

        Raises:
            ConvertError: there is no adapter of low rank in it.
        """
        adapter = AdapterFolder.open(directory, in_full=True)
        names = [ref.name for ref in adapter.in_full]
        table = AdapterConverter(family=family).table
        return cls(
            adapter=adapter,
            converter=AdapterConverter(family=family, options=AdapterOptions(allow_unused=names)),
            weights=directory / WEIGHTS,
            saved={table.canonical(name): name for name in names},
            tied=bool(adapter.config.get(TIED)),
        )
