"""``hf_to_dcp``, ``dcp_to_hf`` and the commands of ``torch_dist``: their options, and what they plan.

The published DCP commands have flat options, under names that differ from converter to converter: see
:mod:`mm_convert.commands.spelling`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mm_convert.commands.options import GivenParallelConfig, HfConfig, OptionalHfConfig, ParallelConfig

if TYPE_CHECKING:
    from mm_convert.convert import Converter
    from mm_convert.targets import Conversion

HELP = {
    "hf_to_dcp": "Hugging Face folder to a new checkpoint of FSDP2 trainers (torch.distributed.checkpoint)",
    "dcp_to_hf": "checkpoint of an FSDP2 trainer to a new Hugging Face folder",
    "hf_to_torch_dist": "Hugging Face folder to a new distributed checkpoint of megatron-core",
    "torch_dist_to_hf": "distributed checkpoint of megatron-core to a new Hugging Face folder",
    "mm_to_torch_dist": "Megatron-style folder to a new distributed checkpoint of megatron-core",
    "torch_dist_to_mm": "distributed checkpoint of megatron-core to a new Megatron-style folder",
}
# Converters that the published tool has for FSDP2 alone, and their ``dcp_prefix``.
PREFIXES = {"GenericDCPConverter": "", "Qwen3VLConverter": "model.", "Qwen35Converter": ""}
# Their commands.
FSDP2 = ("hf_to_dcp", "dcp_to_hf")


@dataclass(frozen=True, kw_only=True)
class HfToDcp:
    """Options of hf_to_dcp.

    Args:
        hf_dir: folder with config.json and safetensors.
        dcp_dir: folder to write.
        dcp_prefix: what stands between "model." and a tensor's name; Qwen3VLConverter's training code wants "model.".
        tie_weight_mapping: second names of tensors, as JSON; by default lm_head.weight of a model that ties it.
        new_transformers_weight_key: write the names of transformers >= 4.52 (model.language_model.…).
    """

    hf_dir: str
    dcp_dir: str
    dcp_prefix: str = ""
    tie_weight_mapping: str | dict[str, str] | None = None
    new_transformers_weight_key: bool = False


@dataclass(frozen=True, kw_only=True)
class DcpToHf:
    """Options of dcp_to_hf.

    Args:
        dcp_dir: folder with .metadata (iter_0001000, release), or the one above it.
        hf_dir: the template: configuration, tokenizer, names and shards of the result.
        save_hf_dir: folder to write.
        dcp_prefix: what stands between "model." and a tensor's name; by default it is found.
        tie_weight_mapping: second names of tensors, as JSON; by default lm_head.weight of a model that ties it.
    """

    dcp_dir: str
    hf_dir: str
    save_hf_dir: str
    dcp_prefix: str | None = None
    tie_weight_mapping: str | dict[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class HfToTorchDist:
    """Options of hf_to_torch_dist.

    Args:
        dist_dir: folder to write.
        hf_config: the Hugging Face side.
        make_vocab_size_divisible_by: put rows of zeros behind embedding and output layer, up to a multiple of this: of
            Megatron's option of this name times the run's tp_size; 0: none, megatron-core then pads as it loads.
    """

    dist_dir: str
    hf_config: HfConfig
    make_vocab_size_divisible_by: int = 0


@dataclass(frozen=True, kw_only=True)
class TorchDistToHf:
    """Options of torch_dist_to_hf.

    Args:
        save_hf_dir: folder to write.
        dist_dir: folder with .metadata (iter_0001000, release), or the one above it.
        hf_config: the Hugging Face side.
        padded_to_multiple_of: what the run rounded the vocabulary up to a multiple of (Megatron's
            make_vocab_size_divisible_by times its tp_size); 0 finds it, if it is a power of two or there is a manifest.
    """

    save_hf_dir: str
    dist_dir: str
    hf_config: HfConfig
    padded_to_multiple_of: int = 0


@dataclass(frozen=True, kw_only=True)
class MmToTorchDist:
    """Options of mm_to_torch_dist.

    Args:
        dist_dir: folder to write.
        mm_dir: folder to read; its layout is found on disk.
        parallel_config: the Megatron side, as a check against what is on disk.
        hf_config: the model's configuration.
        make_vocab_size_divisible_by: put rows of zeros behind embedding and output layer, up to a multiple of this: of
            Megatron's option of this name times the run's tp_size; 0: none, megatron-core then pads as it loads.
    """

    dist_dir: str
    mm_dir: str
    parallel_config: GivenParallelConfig = field(default_factory=GivenParallelConfig)
    hf_config: OptionalHfConfig = field(default_factory=OptionalHfConfig)
    make_vocab_size_divisible_by: int = 0


@dataclass(frozen=True, kw_only=True)
class TorchDistToMm:
    """Options of torch_dist_to_mm.

    Args:
        mm_dir: folder to write.
        dist_dir: folder with .metadata (iter_0001000, release), or the one above it.
        hf_config: the Hugging Face side, of which config.json alone is read.
        parallel_config: the Megatron side.
        padded_to_multiple_of: what the run rounded the vocabulary up to a multiple of (Megatron's
            make_vocab_size_divisible_by times its tp_size); 0 finds it, if it is a power of two or there is a manifest.
    """

    mm_dir: str
    dist_dir: str
    hf_config: HfConfig
    parallel_config: ParallelConfig
    padded_to_multiple_of: int = 0


def hf_to_dcp(converter: Converter | None, cfg: HfToDcp, options: Any) -> Conversion:
    """Plan hf_to_dcp; without a converter, for any model whose tensors stand under their names."""
    from mm_convert.distributed.dcp import prepare_hf_to_dcp

    return prepare_hf_to_dcp(
        cfg.hf_dir,
        cfg.dcp_dir,
        dcp_prefix=cfg.dcp_prefix,
        tied=_mapping(cfg.tie_weight_mapping),
        in_memory_names=cfg.new_transformers_weight_key,
        family=converter.family if converter else None,
    )


def dcp_to_hf(converter: Converter | None, cfg: DcpToHf, options: Any) -> Conversion:
    """Plan dcp_to_hf; without a converter, for any model whose tensors stand under their names."""
    from mm_convert.distributed.dcp import prepare_dcp_to_hf

    return prepare_dcp_to_hf(
        cfg.dcp_dir,
        cfg.hf_dir,
        cfg.save_hf_dir,
        dcp_prefix=cfg.dcp_prefix,
        tied=_mapping(cfg.tie_weight_mapping),
        family=converter.family if converter else None,
    )


def hf_to_torch_dist(converter: Converter, cfg: HfToTorchDist, options: Any) -> Conversion:
    """Plan hf_to_torch_dist."""
    from mm_convert.distributed.torch_dist import prepare_hf_to_torch_dist

    return prepare_hf_to_torch_dist(
        converter,
        cfg.hf_config.hf_dir,
        cfg.dist_dir,
        make_vocab_size_divisible_by=cfg.make_vocab_size_divisible_by,
    )


def torch_dist_to_hf(converter: Converter, cfg: TorchDistToHf, options: Any) -> Conversion:
    """Plan torch_dist_to_hf."""
    from mm_convert.distributed.torch_dist import prepare_torch_dist_to_hf

    return prepare_torch_dist_to_hf(
        converter,
        cfg.dist_dir,
        cfg.hf_config.hf_dir,
        cfg.save_hf_dir,
        padded_to_multiple_of=cfg.padded_to_multiple_of,
    )


def mm_to_torch_dist(converter: Converter, cfg: MmToTorchDist, options: Any) -> Conversion:
    """Plan mm_to_torch_dist."""
    from mm_convert.distributed.torch_dist import prepare_mm_to_torch_dist

    return prepare_mm_to_torch_dist(
        converter,
        cfg.mm_dir,
        cfg.dist_dir,
        layout=cfg.parallel_config.given(),
        hf_dir=cfg.hf_config.hf_dir,
        make_vocab_size_divisible_by=cfg.make_vocab_size_divisible_by,
    )


def torch_dist_to_mm(converter: Converter, cfg: TorchDistToMm, options: Any) -> Conversion:
    """Plan torch_dist_to_mm."""
    from mm_convert.distributed.torch_dist import prepare_torch_dist_to_mm

    return prepare_torch_dist_to_mm(
        converter,
        cfg.dist_dir,
        cfg.mm_dir,
        cfg.parallel_config.layout(),
        hf_dir=cfg.hf_config.hf_dir,
        padded_to_multiple_of=cfg.padded_to_multiple_of,
    )


COMMANDS: dict[str, tuple[type, Callable[..., Conversion]]] = {
    "hf_to_dcp": (HfToDcp, hf_to_dcp),
    "dcp_to_hf": (DcpToHf, dcp_to_hf),
    "hf_to_torch_dist": (HfToTorchDist, hf_to_torch_dist),
    "torch_dist_to_hf": (TorchDistToHf, torch_dist_to_hf),
    "mm_to_torch_dist": (MmToTorchDist, mm_to_torch_dist),
    "torch_dist_to_mm": (TorchDistToMm, torch_dist_to_mm),
}


def _mapping(given: str | dict[str, str] | None) -> dict[str, str] | None:
    """Second names, as a mapping or its JSON.

    Raises:
        CheckpointError: neither.
    """
    from mm_convert.errors import CheckpointError

    try:
        mapping = json.loads(given) if isinstance(given, str) else given
    except ValueError as error:
        raise CheckpointError(f"tie_weight_mapping {given!r} is no JSON: {error}") from error
    if mapping is None or (isinstance(mapping, dict) and all(isinstance(v, str) for v in mapping.values())):
        return mapping
    raise CheckpointError(
        f"tie_weight_mapping {given!r}; it must map names to the tensors that they share:"
        ' {"lm_head.weight": "model.embed_tokens.weight"}'
    )
