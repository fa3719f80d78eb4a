"""Options of the published converters, as dataclasses: their fields are the ``--cfg.…`` keys."""

from __future__ import annotations

from dataclasses import dataclass, field

from mm_convert.layout import GivenLayout, Layout

LayerLists = list[list[int]] | list[int]


@dataclass(frozen=True, kw_only=True)
class HfConfig:
    """The Hugging Face side.

    Args:
        hf_dir: folder with config.json and safetensors; in mm_to_hf the template of the result.
    """

    hf_dir: str


@dataclass(frozen=True, kw_only=True)
class OptionalHfConfig:
    """The model's configuration.

    Args:
        hf_dir: folder with config.json, the only file that is read; needed where the tensors don't tell how many
            heads there are and tp_size grows.
    """

    hf_dir: str | None = None


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """A Megatron layout to write.

    Args:
        llm_pp_layers: language layers on each pipeline rank, [[12,16]] or [12,16]; one row for each virtual stage.
        vit_pp_layers: vision layers, in the same shape, 0 where a rank has none: [[32,0]]; none for a text model.
        tp_size: tensor-parallel size; must divide num_key_value_heads.
    """

    llm_pp_layers: LayerLists
    vit_pp_layers: LayerLists | None = None
    tp_size: int = 1

    def layout(self) -> Layout:
        """The layout that these options describe."""
        return Layout(
            llm_pp_layers=self.llm_pp_layers,  # type: ignore[arg-type]  # Layout makes it nested
            vit_pp_layers=self.vit_pp_layers or (),  # type: ignore[arg-type]
            tp_size=self.tp_size,
        )


@dataclass(frozen=True, kw_only=True)
class GivenParallelConfig:
    """The Megatron layout to read, as a check: it is found on disk.

    Args:
        llm_pp_layers: language layers on each pipeline rank, [[12,16]] or [12,16]; one row for each virtual stage.
        vit_pp_layers: vision layers, in the same shape.
        tp_size: tensor-parallel size.
    """

    llm_pp_layers: LayerLists | None = None
    vit_pp_layers: LayerLists | None = None
    tp_size: int | None = None

    def given(self) -> GivenLayout:
        """What is to be checked."""
        return GivenLayout(llm_pp_layers=self.llm_pp_layers, vit_pp_layers=self.vit_pp_layers, tp_size=self.tp_size)


@dataclass(frozen=True, kw_only=True)
class HfToMm:
    """Options of hf_to_mm.

    Args:
        mm_dir: folder to write.
        hf_config: the Hugging Face side.
        parallel_config: the Megatron side.
    """

    mm_dir: str
    hf_config: HfConfig
    parallel_config: ParallelConfig


@dataclass(frozen=True, kw_only=True)
class MmToHf:
    """Options of mm_to_hf.

    Args:
        save_hf_dir: folder to write.
        mm_dir: folder to read; its layout is found on disk.
        hf_config: the Hugging Face side.
        parallel_config: the Megatron side, as a check against what is on disk.
    """

    save_hf_dir: str
    mm_dir: str
    hf_config: HfConfig
    parallel_config: GivenParallelConfig = field(default_factory=GivenParallelConfig)


@dataclass(frozen=True, kw_only=True)
class Resplit:
    """Options of resplit.

    Args:
        source_dir: Megatron folder to read; its layout is found on disk.
        target_dir: folder to write.
        target_parallel_config: the layout to write.
        source_parallel_config: the layout to read, as a check against what is on disk.
        hf_config: the model's configuration.
    """

    source_dir: str
    target_dir: str
    target_parallel_config: ParallelConfig
    source_parallel_config: GivenParallelConfig = field(default_factory=GivenParallelConfig)
    hf_config: OptionalHfConfig = field(default_factory=OptionalHfConfig)
