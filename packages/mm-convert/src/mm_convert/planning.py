"""Plan and execute without naming a converter: what is read tells which one, what is asked for tells the direction."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_convert.convert import Converter
from mm_convert.errors import LayoutError
from mm_convert.inspection import is_megatron
from mm_convert.layout import Layout
from mm_convert.plans import Plan
from mm_convert.targets import Conversion, RunOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


def plan(
    source: str | Path, target: str | Path, layout: Layout | None = None, *, hf_dir: str | Path | None = None
) -> Conversion:
    """Plan a conversion; only headers are read, torch is not imported.

    ============================  =========================================  ==============
    source                        what is given                              direction
    ============================  =========================================  ==============
    Hugging Face folder           `layout`                                   ``hf_to_mm``
    Megatron-style folder         `layout`, `hf_dir` where it is needed      ``resplit``
    Megatron-style folder         `hf_dir`, the template                     ``mm_to_hf``
    ============================  =========================================  ==============

    Args:
        source: the folder to read.
        target: the folder to make.
        layout: how to cut the model.
        hf_dir: a Hugging Face folder of the same model.

    Raises:
        LayoutError: neither a layout nor a template.
        ConvertError: see :mod:`mm_convert.errors`.
    """
    converter = Converter.of(source)
    if is_megatron(Path(source)):
        if layout is not None:
            return converter.prepare_resplit(source, target, layout, hf_dir=hf_dir)
        if hf_dir is not None:
            return converter.prepare_mm_to_hf(source, hf_dir, target)
        raise LayoutError(f"{source} is a Megatron-style folder: give a layout to cut it anew, or hf_dir to go back")
    if layout is None:
        raise LayoutError(f"{source} is a Hugging Face folder: give the layout to cut it into")
    return converter.prepare_hf_to_mm(source, target, layout)


def execute(conversion: Conversion, **how: Unpack[RunOptions]) -> Plan:
    """Carry a planned conversion out.

    Args:
        conversion: from :func:`plan`.
        how: see :class:`mm_convert.RunOptions`.

    Raises:
        ConvertError: see :mod:`mm_convert.errors`; nothing is left behind.
    """
    options: Any = how
    return conversion.run(**options)
