"""Options of the published converters of generative models, as dataclasses: their fields are the ``--cfg.…`` keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mm_convert.commands.options import LayerLists
from mm_convert.errors import LayoutError
from mm_convert.layout import Layout


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """A Megatron layout to write.

    Args:
        pp_layers: blocks on each pipeline rank, [[15,15]] or [15,15]; one row for each virtual stage, no list for no
            pipeline.
        tp_size: tensor-parallel size; 1 unless the model's layout divides tensors.
        ep_size: expert-parallel size; 1, there are no experts.
    """

    pp_layers: LayerLists = field(default_factory=list)
    tp_size: int = 1
    ep_size: int = 1

    def layout(self) -> Layout | None:
        """The layout that these options describe; None for one pipeline rank that holds all blocks.

        Raises:
            LayoutError: they describe none.
        """
        if self.ep_size != 1:
            raise LayoutError(f"ep_size {self.ep_size}: these models have no experts; legal: 1")
        lists: Any = self.pp_layers
        return Layout(llm_pp_layers=lists, tp_size=self.tp_size) if self.pp_layers else None


@dataclass(frozen=True, kw_only=True)
class GenerativeHfToMm:
    """Options of hf_to_mm.

    Args:
        source_path: Hugging Face folder with config.json and safetensors, a whole pipeline's with its transformer, or
            the single file of an original release.
        target_path: folder to write; not the source, which is left as it is.
        target_parallel_config: the Megatron side.
    """

    source_path: str
    target_path: str
    target_parallel_config: PipelineConfig = field(default_factory=PipelineConfig)


@dataclass(frozen=True, kw_only=True)
class GenerativeMmToHf:
    """Options of mm_to_hf.

    Args:
        source_path: Megatron folder to read; its layout is found on disk.
        target_path: folder to write.
        hf_dir: Hugging Face folder that is the template of the result: configuration, names and shards.
    """

    source_path: str
    target_path: str
    hf_dir: str


@dataclass(frozen=True, kw_only=True)
class GenerativeResplit:
    """Options of resplit.

    Args:
        source_path: Megatron folder to read; its layout is found on disk.
        target_path: folder to write.
        target_parallel_config: the layout to write.
    """

    source_path: str
    target_path: str
    target_parallel_config: PipelineConfig = field(default_factory=PipelineConfig)
