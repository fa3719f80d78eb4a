"""Options of the commands for LoRA adapters, as dataclasses: their fields are the ``--cfg.…`` keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mm_convert.commands.generative import PipelineConfig
from mm_convert.commands.options import GivenParallelConfig, OptionalHfConfig, ParallelConfig, Structure, UnusedHfConfig
from mm_convert.errors import ModelError

if TYPE_CHECKING:
    from mm_convert.convert import Converter
    from mm_convert.lora.conversion import AdapterConverter
    from mm_convert.targets import Conversion

HELP = {
    "lora_hf_to_mm": "PEFT's adapter folder to a new Megatron-style folder of adapters",
    "lora_mm_to_hf": "Megatron-style folder of adapters to a new folder that PEFT loads",
    "merge_lora_to_base": "a model and its adapter to a new folder of the model's kind: W + scale * B @ A",
}


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """PEFT's folder.

    Args:
        hf_dir: folder with adapter_config.json and adapter_model.safetensors.
    """

    hf_dir: str


@dataclass(frozen=True, kw_only=True)
class AdapterStructure(Structure):
    """The structure of the Megatron side, and how names are spelt on the other.

    Args:
        enable_canonical_hf_struct: true, the only structure that adapters have in the Megatron-style layout.
        new_transformers_weight_key: write the names of transformers >= 4.52; both are read.
        model_prefix: what stands before the model's own names, if not base_model.model.
        llm_hf_dir: of no effect, as published.
    """

    enable_canonical_hf_struct: bool = True


@dataclass(frozen=True, kw_only=True)
class LoraHfToMm:
    """Options of lora_hf_to_mm.

    Args:
        mm_dir: folder to write.
        hf_config: the adapter.
        parallel_config: the Megatron side; the layer lists count all layers of the model.
        common_model_config: names.
        base_dir: folder with the base model's config.json, if not hf_dir or its base_model_name_or_path.
        llm_hf_config: of no effect, as published.
        save_vit_only: of no effect, as published; --allow-unused leaves adapters out.
        trust_remote_code: accepted, and of no effect; no code of a model is ever run.
    """

    mm_dir: str
    hf_config: AdapterConfig
    parallel_config: ParallelConfig
    common_model_config: AdapterStructure = field(default_factory=AdapterStructure)
    base_dir: str | None = None
    llm_hf_config: UnusedHfConfig = field(default_factory=UnusedHfConfig)
    save_vit_only: bool = False
    trust_remote_code: bool = False

    def prepare(self, converter: Converter, options: Any) -> Conversion:
        """Plan it.

        Raises:
            ConvertError: it can't be done.
        """
        adapters = _adapters(converter, self.common_model_config, options, base_dir=self.base_dir)
        return adapters.prepare_hf_to_mm(self.hf_config.hf_dir, self.mm_dir, self.parallel_config.layout())


@dataclass(frozen=True, kw_only=True)
class LoraMmToHf:
    """Options of lora_mm_to_hf.

    Args:
        save_hf_dir: folder to write: adapter_model.safetensors and adapter_config.json.
        mm_dir: folder to read.
        hf_config: the template, PEFT's folder: its adapter_config.json is copied, its names are written.
        parallel_config: the Megatron side; needed only where not every layer of a part has an adapter.
        common_model_config: names, where there is no template.
        base_dir: folder with the base model's config.json, if not the template or its base_model_name_or_path.
        lora_alpha: for an adapter_config.json that is made, where none can be copied.
        use_rslora: likewise.
        llm_hf_config: of no effect, as published.
        trust_remote_code: accepted, and of no effect; no code of a model is ever run.
    """

    save_hf_dir: str
    mm_dir: str
    hf_config: OptionalHfConfig = field(default_factory=OptionalHfConfig)
    parallel_config: GivenParallelConfig = field(default_factory=GivenParallelConfig)
    common_model_config: AdapterStructure = field(default_factory=AdapterStructure)
    base_dir: str | None = None
    lora_alpha: float | None = None
    use_rslora: bool = False
    llm_hf_config: UnusedHfConfig = field(default_factory=UnusedHfConfig)
    trust_remote_code: bool = False

    def prepare(self, converter: Converter, options: Any) -> Conversion:
        """Plan it.

        Raises:
            ConvertError: it can't be done.
        """
        known = {"base_dir": self.base_dir, "alpha": self.lora_alpha, "rslora": self.use_rslora}
        adapters = _adapters(converter, self.common_model_config, options, **known)
        return adapters.prepare_mm_to_hf(
            self.mm_dir, self.save_hf_dir, template=self.hf_config.hf_dir, layout=self.parallel_config.given()
        )


@dataclass(frozen=True, kw_only=True)
class GenerativeLoraHfToMm:
    """Options of lora_hf_to_mm.

    Args:
        source_path: the adapter, PEFT's folder.
        target_path: folder to write.
        target_parallel_config: the Megatron side.
        base_dir: folder with the base model's config.json, if not source_path or its base_model_name_or_path.
        model_prefix: what stands before the model's own names, if not base_model.model., diffusion_model. or
            transformer.
    """

    source_path: str
    target_path: str
    target_parallel_config: PipelineConfig = field(default_factory=PipelineConfig)
    base_dir: str | None = None
    model_prefix: str | None = None

    def prepare(self, converter: Converter, options: Any) -> Conversion:
        """Plan it.

        Raises:
            ConvertError: it can't be done.
        """
        names = AdapterStructure(model_prefix=self.model_prefix)
        adapters = _adapters(converter, names, options, base_dir=self.base_dir)
        return adapters.prepare_hf_to_mm(self.source_path, self.target_path, self.target_parallel_config.layout())


@dataclass(frozen=True, kw_only=True)
class MergeLoraToBase:
    """Options of merge_lora_to_base.

    Args:
        source_path: the model, a Hugging Face or a Megatron-style folder.
        lora_path: its adapter, PEFT's folder or a Megatron-style one, of any layout.
        target_path: folder to write, of the model's kind and layout.
        lora_rank: the adapter's rank, as a check: it is found on disk.
        lora_alpha: needed where the adapter has no adapter_config.json.
        use_rslora: the adapter was trained with alpha over the root of the rank; likewise.
        base_dir: folder with the model's config.json, where source_path is a Megatron-style folder and the adapter
            does not name one.
        model_prefix: what stands before the model's own names in the adapter.
        use_npu: accepted, and of no effect; the processor does it.
    """

    source_path: str
    lora_path: str
    target_path: str
    lora_rank: int | None = None
    lora_alpha: float | None = None
    use_rslora: bool = False
    base_dir: str | None = None
    model_prefix: str | None = None
    use_npu: bool = False

    def prepare(self, converter: Converter, options: Any) -> Conversion:
        """Plan it.

        Raises:
            ConvertError: it can't be done.
        """
        from mm_convert.lora.merge import Merger

        names = AdapterStructure(model_prefix=self.model_prefix)
        known = {"base_dir": self.base_dir, "alpha": self.lora_alpha, "rslora": self.use_rslora}
        merger = Merger(adapters=_adapters(converter, names, options, **known), rank=self.lora_rank)
        return merger.prepare(self.source_path, self.lora_path, self.target_path)


UNDERSTANDING: dict[str, type] = {
    "lora_hf_to_mm": LoraHfToMm,
    "lora_mm_to_hf": LoraMmToHf,
    "merge_lora_to_base": MergeLoraToBase,
}
GENERATIVE: dict[str, type] = {"lora_hf_to_mm": GenerativeLoraHfToMm, "merge_lora_to_base": MergeLoraToBase}


def _adapters(converter: Converter, names: AdapterStructure, options: Any, **known: Any) -> AdapterConverter:
    from mm_convert.lora.conversion import AdapterConverter, AdapterOptions

    if not names.enable_canonical_hf_struct:
        raise ModelError(
            "enable_canonical_hf_struct false: adapters exist for the canonical structure only (query, key and value,"
            " and gate and up projection apart); leave the option out"
        )
    chosen = AdapterOptions(
        model_prefix=names.model_prefix,
        new_names=names.new_transformers_weight_key,
        allow_unused=options.allow_unused,
        **known,
    )
    return AdapterConverter(family=converter.family, options=chosen)
