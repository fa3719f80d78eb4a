"""What each published command plans, from its options.

Apart from the options themselves: whoever builds a parser from a dataclass imports all that its file speaks of.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mm_convert.commands.generative import GenerativeHfToMm, GenerativeMmToHf, GenerativeResplit
from mm_convert.commands.options import HfToMm, MmToHf, Resplit
from mm_convert.errors import LayoutError

if TYPE_CHECKING:
    from mm_convert.convert import Conversion, Converter


def hf_to_mm(converter: Converter, cfg: HfToMm, options: Any) -> Conversion:
    """Plan hf_to_mm; `options` are those outside of ``--cfg``."""
    return _hf_to_mm(converter, cfg, options, ldt=False)


def hf_to_mm_ldt(converter: Converter, cfg: HfToMm, options: Any) -> Conversion:
    """Plan hf_to_mm_ldt."""
    return _hf_to_mm(converter, cfg, options, ldt=True)


def mm_to_hf(converter: Converter, cfg: MmToHf, options: Any) -> Conversion:
    """Plan mm_to_hf."""
    return replace(converter, canonical=cfg.common_model_config.enable_canonical_hf_struct).prepare_mm_to_hf(
        cfg.mm_dir,
        cfg.hf_config.hf_dir,
        cfg.save_hf_dir,
        layout=cfg.parallel_config.given(),
        hf_naming=options.hf_naming,
        allow_unused=options.allow_unused,
    )


def resplit(converter: Converter, cfg: Resplit, options: Any) -> Conversion:
    """Plan resplit."""
    return converter.prepare_resplit(
        cfg.source_dir,
        cfg.target_dir,
        cfg.target_parallel_config.layout(),
        source=cfg.source_parallel_config.given(),
        hf_dir=cfg.hf_config.hf_dir,
    )


def generative_hf_to_mm(converter: Converter, cfg: GenerativeHfToMm, options: Any) -> Conversion:
    """Plan a generative model's hf_to_mm."""
    parallel = cfg.target_parallel_config
    with _pp_layers():
        return converter.prepare_hf_to_mm(
            cfg.source_path,
            cfg.target_path,
            parallel.layout(),
            allow_unused=options.allow_unused,
            tp_size=parallel.tp_size,
        )


def generative_mm_to_hf(converter: Converter, cfg: GenerativeMmToHf, options: Any) -> Conversion:
    """Plan a generative model's mm_to_hf."""
    with _pp_layers():
        return converter.prepare_mm_to_hf(
            cfg.source_path,
            cfg.hf_dir,
            cfg.target_path,
            hf_naming=options.hf_naming,
            allow_unused=options.allow_unused,
        )


def generative_resplit(converter: Converter, cfg: GenerativeResplit, options: Any) -> Conversion:
    """Plan a generative model's resplit."""
    parallel = cfg.target_parallel_config
    with _pp_layers():
        return converter.prepare_resplit(cfg.source_path, cfg.target_path, parallel.layout(), tp_size=parallel.tp_size)


def of_its_own(converter: Converter, cfg: Any, options: Any) -> Conversion:
    """Plan what options do that plan themselves: those of adapters."""
    planned: Conversion = cfg.prepare(converter, options)
    return planned


@contextmanager
def _pp_layers() -> Iterator[None]:
    """A generative model's blocks stand in the place of the language layers; its option has another name."""
    try:
        yield
    except LayoutError as error:
        words = str(error).replace("llm_pp_layers", "pp_layers").replace("llm layers", "blocks")
        raise LayoutError(words) from error


def _hf_to_mm(converter: Converter, cfg: HfToMm, options: Any, *, ldt: bool) -> Conversion:
    return replace(converter, canonical=cfg.common_model_config.enable_canonical_hf_struct).prepare_hf_to_mm(
        cfg.hf_config.hf_dir,
        cfg.mm_dir,
        cfg.parallel_config.layout(ldt=ldt),
        allow_unused=options.allow_unused,
        vit_only=cfg.save_vit_only,
        llm_hf_dir=cfg.common_model_config.llm_hf_dir,
    )
