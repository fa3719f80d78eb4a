"""Published options that stand beside ``--cfg`` rather than in it; they are read as well as ``--cfg.…``."""

from __future__ import annotations

from collections.abc import Sequence

from mm_convert.commands.distributed import PREFIXES

# By command; each published converter has its own spelling.
FLAT = {
    "hf_to_dcp": {
        "hf_dir": "cfg.hf_dir",
        "dcp_dir": "cfg.dcp_dir",
        "save_dir": "cfg.dcp_dir",
        "dcp_prefix": "cfg.dcp_prefix",
        "tie_weight_mapping": "cfg.tie_weight_mapping",
        "new_transformers_weight_key": "cfg.new_transformers_weight_key",
        "num_workers": "workers",
    },
    "dcp_to_hf": {
        "dcp_dir": "cfg.dcp_dir",
        "load_dir": "cfg.dcp_dir",
        "hf_dir": "cfg.hf_dir",
        "origin_hf_dir": "cfg.hf_dir",
        "model_assets_dir": "cfg.hf_dir",
        "save_hf_dir": "cfg.save_hf_dir",
        "save_dir": "cfg.save_hf_dir",
        "dcp_prefix": "cfg.dcp_prefix",
        "tie_weight_mapping": "cfg.tie_weight_mapping",
        "num_workers": "workers",
    },
    "merge_lora_to_base": {"lora_rank": "cfg.lora_rank", "lora_alpha": "cfg.lora_alpha", "use_npu": "cfg.use_npu"},
}


def with_cfg(converter: str, command: str, arguments: Sequence[str]) -> list[str]:
    """The command line with the published flat options spelled ``--cfg.…``; the rest as it is.

    The converter's own prefix stands in front, where a given one overrides it. ``--num_workers 0``, which says "one
    after the other", becomes ``--workers 1``.
    """
    names = FLAT.get(command, {})
    prefix = PREFIXES.get(converter) if command == "hf_to_dcp" else None
    spelled = [f"--cfg.dcp_prefix={prefix}"] if prefix else []
    after = ""
    for argument in arguments:
        name, equals, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and name in names:
            spelled.append(f"--{names[name]}{equals}{'1' if (name, value) == ('num_workers', '0') else value}")
        else:
            spelled.append("1" if (after, argument) == ("--num_workers", "0") else argument)
        after = argument
    return spelled
