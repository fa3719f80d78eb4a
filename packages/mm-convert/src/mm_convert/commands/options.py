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
class UnusedHfConfig:
    """Of no effect, as published; the option that replaces the language model is common_model_config.llm_hf_dir.

    Args:
        hf_dir: accepted, and not read.
    """

    hf_dir: str | None = None


@dataclass(frozen=True, kw_only=True)
class Structure:
    """The structure of the Megatron side, and where its language model comes from.

    Args:
        enable_canonical_hf_struct: query, key and value, and gate and up projection, stand apart (for adapters).
        llm_hf_dir: folder whose language model takes the place of the model's own; of no effect in mm_to_hf.
        new_transformers_weight_key: accepted, and of no effect here; names are found, and --hf_naming chooses them.
        model_prefix: accepted, and of no effect here, as published.
        num_experts: accepted, and of no effect, as published; config.json says it.
        num_key_value_heads: likewise.
        llm_num_layers: likewise.
        vit_num_layers: likewise.
        audio_num_layers: likewise.
        tie_word_embeddings: likewise.
    """

    enable_canonical_hf_struct: bool = False
    llm_hf_dir: str | None = None
    new_transformers_weight_key: bool = False
    model_prefix: str | None = None
    num_experts: int | None = None
    num_key_value_heads: int | None = None
    llm_num_layers: int | None = None
    vit_num_layers: int | None = None
    audio_num_layers: int | None = None
    tie_word_embeddings: bool | None = None


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """A Megatron layout to write.

    Args:
        llm_pp_layers: language layers on each pipeline rank, [[12,16]] or [12,16]; one row for each virtual stage.
        vit_pp_layers: vision layers, in the same shape, 0 where a rank has none: [[32,0]]; none for a text model.
        audio_pp_layers: audio layers, likewise; only for a model that hears.
        tp_size: tensor-parallel size; must divide num_key_value_heads.
        ep_size: expert-parallel size; must divide the number of experts.
        vit_tp_size: tensor-parallel size of the vision part, if it is smaller; 0 for tp_size.
        audio_tp_size: the same for the audio part.
        make_vocab_size_divisible_by: put rows of zeros behind embedding and output layer, as Megatron's option of this
            name does, up to a multiple of it times tp_size; 0, as published: none.
    """

    llm_pp_layers: LayerLists
    vit_pp_layers: LayerLists | None = None
    audio_pp_layers: LayerLists | None = None
    tp_size: int = 1
    ep_size: int = 1
    vit_tp_size: int = 0
    audio_tp_size: int = 0
    make_vocab_size_divisible_by: int = 0

    def layout(self, *, ldt: bool = False) -> Layout:
        """The layout that these options describe.

        Raises:
            LayoutError: they describe none.
        """
        return Layout(
            llm_pp_layers=self.llm_pp_layers,  # type: ignore[arg-type]  # Layout makes it nested
            vit_pp_layers=self.vit_pp_layers or (),  # type: ignore[arg-type]
            audio_pp_layers=self.audio_pp_layers or (),  # type: ignore[arg-type]
            tp_size=self.tp_size,
            ep_size=self.ep_size,
            vit_tp_size=self.vit_tp_size,
            audio_tp_size=self.audio_tp_size,
            make_vocab_size_divisible_by=self.make_vocab_size_divisible_by,
            ldt=ldt,
        )


@dataclass(frozen=True, kw_only=True)
class GivenParallelConfig:
    """The Megatron layout to read, as a check: it is found on disk.

    Args:
        llm_pp_layers: language layers on each pipeline rank, [[12,16]] or [12,16]; one row for each virtual stage.
        vit_pp_layers: vision layers, in the same shape.
        audio_pp_layers: audio layers, in the same shape.
        tp_size: tensor-parallel size.
        ep_size: expert-parallel size.
        vit_tp_size: tensor-parallel size of the vision part; 0 for tp_size.
        audio_tp_size: the same for the audio part.
        make_vocab_size_divisible_by: what the vocabulary's rows on a rank were rounded up to a multiple of; needed only
            where it is no power of two and the folder has no manifest.
    """

    llm_pp_layers: LayerLists | None = None
    vit_pp_layers: LayerLists | None = None
    audio_pp_layers: LayerLists | None = None
    tp_size: int | None = None
    ep_size: int | None = None
    vit_tp_size: int | None = None
    audio_tp_size: int | None = None
    make_vocab_size_divisible_by: int | None = None

    def given(self) -> GivenLayout:
        """What is to be checked."""
        return GivenLayout(
            llm_pp_layers=self.llm_pp_layers,
            vit_pp_layers=self.vit_pp_layers,
            audio_pp_layers=self.audio_pp_layers,
            tp_size=self.tp_size,
            ep_size=self.ep_size,
            vit_tp_size=self.vit_tp_size,
            audio_tp_size=self.audio_tp_size,
            make_vocab_size_divisible_by=self.make_vocab_size_divisible_by,
        )


@dataclass(frozen=True, kw_only=True)
class HfToMm:
    """Options of hf_to_mm and hf_to_mm_ldt.

    Args:
        mm_dir: folder to write.
        hf_config: the Hugging Face side.
        parallel_config: the Megatron side.
        common_model_config: the structure of the Megatron side, and its language model.
        llm_hf_config: of no effect, as published.
        save_vit_only: take the vision part alone.
        trust_remote_code: accepted, and of no effect; no code of a model is ever run.
    """

    mm_dir: str
    hf_config: HfConfig
    parallel_config: ParallelConfig
    common_model_config: Structure = field(default_factory=Structure)
    llm_hf_config: UnusedHfConfig = field(default_factory=UnusedHfConfig)
    save_vit_only: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class MmToHf:
    """Options of mm_to_hf.

    Args:
        save_hf_dir: folder to write.
        mm_dir: folder to read; its layout is found on disk.
        hf_config: the Hugging Face side.
        parallel_config: the Megatron side, as a check against what is on disk.
        common_model_config: the structure of the Megatron side, as a check.
        llm_hf_config: of no effect, as published.
        trust_remote_code: accepted, and of no effect; no code of a model is ever run.
    """

    save_hf_dir: str
    mm_dir: str
    hf_config: HfConfig
    parallel_config: GivenParallelConfig = field(default_factory=GivenParallelConfig)
    common_model_config: Structure = field(default_factory=Structure)
    llm_hf_config: UnusedHfConfig = field(default_factory=UnusedHfConfig)
    trust_remote_code: bool = False


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
