"""What is supported, as a table: computed from the families and the commands; only names and proofs are said here."""

from __future__ import annotations

from mm_convert.commands.published import commands
from mm_convert.families import CONVERTERS
from mm_convert.families.family import Family

FORMULAS = "formulas"
NAMES = "names of transformers"
DIFFUSERS = "names of diffusers"
TOLD = "names as published"
OURS = "the layout is ours"
MODELS: dict[str, tuple[str, tuple[str, ...]]] = {
    "Qwen2_5_VLConverter": ("Qwen2.5-VL 3B, 7B, 32B, 72B", (FORMULAS, NAMES)),
    "Qwen2VLConverter": ("Qwen2-VL 2B, 7B, 72B", (FORMULAS, NAMES)),
    "Qwen3VLMegatronConverter": ("Qwen3-VL, dense and with experts", (FORMULAS, NAMES)),
    "InternVLConverter": ("InternVL 2, 2.5, 3 on InternLM2, Llama, Qwen2; transformers' port", (FORMULAS, NAMES)),
    "Qwen2_5_OmniConverter": ("Qwen2.5-Omni 3B, 7B: the thinker", (FORMULAS, NAMES)),
    "WanConverter": ("Wan2.1 t2v, i2v, flf2v, 1.3B and 14B", (FORMULAS, DIFFUSERS)),
    "HunyuanVideoConverter": ("HunyuanVideo t2v, i2v", (FORMULAS, DIFFUSERS)),
    "CogVideoConverter": ("CogVideoX 2B, 5B, 1.0 and 1.5, t2v, i2v", (FORMULAS, DIFFUSERS)),
    "Qwen2_5Converter": ("text models Qwen2.5, Qwen2", (OURS, NAMES)),
    "Qwen3Converter": ("text models Qwen3, dense and with experts", (OURS, NAMES)),
}


def support_table() -> str:
    """The table in Markdown: converters, models, layouts, spellings, further commands, proof."""
    lines = ["| converter | models | layouts | names written | beside hf_to_mm, mm_to_hf, resplit | proof |"]
    lines.append("|---|---|---|---|---|---|")
    for name, family in CONVERTERS.items():
        models, proof = MODELS[name]
        cells = [f"`{name}`", models, _layouts(family), _spellings(family), _further(name), ", ".join(proof)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _layouts(family: Family) -> str:
    pipeline = {"none": [], "plain": ["PP"], "virtual": ["PP", "VPP"]}[family.pipeline]
    experts = ["EP"] if any(t.endswith("_moe") for t in family.model_types) else []
    return " ".join((["TP"] if family.divided else []) + pipeline + experts)


def _spellings(family: Family) -> str:
    return ", ".join(["as read", *family.spellings]) if family.spellings else "as read"


def _further(converter: str) -> str:
    found = set(commands(converter)) - {"hf_to_mm", "mm_to_hf", "resplit"}
    kinds = {
        "LDT": {"hf_to_mm_ldt"},
        "source_to_mm": {"source_to_mm"},
        "LoRA": {"lora_hf_to_mm"},
        "merge": {"merge_lora_to_base"},
        "DCP": {"hf_to_dcp", "dcp_to_hf"},
        "torch_dist": {"hf_to_torch_dist", "torch_dist_to_hf"},
    }
    return ", ".join(kind for kind, names in kinds.items() if names <= found)
