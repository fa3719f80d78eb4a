"""A tiny Qwen2.5-VL checkpoint, made tensor by tensor from the published names and shapes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, HEADS, GROUPS, FFN, VOCAB = 16, 8, 4, 24, 32
VIT_HIDDEN, VIT_HEADS, VIT_FFN, MERGED = 8, 4, 12, 32
LLM_LAYERS, VIT_LAYERS = 5, 3
HEAD = HIDDEN // HEADS

Tensors = dict[str, Tensor]
MakeModel = Callable[..., Path]


def config(*, tied: bool, nested: bool) -> dict[str, Any]:
    """``config.json`` as published (flat), or as transformers >= 4.52 writes it (nested)."""
    text = {"num_hidden_layers": LLM_LAYERS, "num_key_value_heads": GROUPS, "hidden_size": HIDDEN}
    common = {
        "model_type": "qwen2_5_vl",
        "tie_word_embeddings": tied,
        "vision_config": {"depth": VIT_LAYERS, "num_heads": VIT_HEADS},
    }
    return {**common, "text_config": text} if nested else {**common, **text}


def tensors(*, tied: bool = False, seed: int = 0) -> Tensors:
    """Random tensors under the published names."""
    generator = torch.Generator().manual_seed(seed)
    made: Tensors = {}

    def add(name: str, *shape: int) -> None:
        made[name] = torch.randn(*shape, generator=generator)

    for i in range(LLM_LAYERS):
        layer = f"model.layers.{i}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            add(layer + norm + ".weight", HIDDEN)
        for p, rows in (("q", HEADS * HEAD), ("k", GROUPS * HEAD), ("v", GROUPS * HEAD)):
            add(layer + f"self_attn.{p}_proj.weight", rows, HIDDEN)
            add(layer + f"self_attn.{p}_proj.bias", rows)
        add(layer + "self_attn.o_proj.weight", HIDDEN, HEADS * HEAD)
        for p in ("gate", "up"):
            add(layer + f"mlp.{p}_proj.weight", FFN, HIDDEN)
        add(layer + "mlp.down_proj.weight", HIDDEN, FFN)
    for i in range(VIT_LAYERS):
        block = f"visual.blocks.{i}."
        for norm in ("norm1", "norm2"):
            add(block + norm + ".weight", VIT_HIDDEN)
        for name, rows, columns in (
            ("attn.qkv", 3 * VIT_HIDDEN, VIT_HIDDEN),
            ("attn.proj", VIT_HIDDEN, VIT_HIDDEN),
            ("mlp.gate_proj", VIT_FFN, VIT_HIDDEN),
            ("mlp.up_proj", VIT_FFN, VIT_HIDDEN),
            ("mlp.down_proj", VIT_HIDDEN, VIT_FFN),
        ):
            add(block + name + ".weight", rows, columns)
            add(block + name + ".bias", rows)
    add("visual.patch_embed.proj.weight", VIT_HIDDEN, 3, 2, 2, 2)
    add("visual.merger.ln_q.weight", VIT_HIDDEN)
    add("visual.merger.mlp.0.weight", MERGED, MERGED)
    add("visual.merger.mlp.0.bias", MERGED)
    add("visual.merger.mlp.2.weight", HIDDEN, MERGED)
    add("visual.merger.mlp.2.bias", HIDDEN)
    add("model.embed_tokens.weight", VOCAB, HIDDEN)
    add("model.norm.weight", HIDDEN)
    if not tied:
        add("lm_head.weight", VOCAB, HIDDEN)
    return made


def new_names(old: Tensors) -> Tensors:
    """The names that transformers >= 4.52 holds in memory."""
    return {
        "model." + n
        if n.startswith("visual.")
        else "model.language_model." + n.removeprefix("model.")
        if n.startswith("model.")
        else n: t
        for n, t in old.items()
    }


def save_model(directory: Path, made: Tensors, *, tied: bool = False, nested: bool = False, shards: int = 2) -> Path:
    """Write a Hugging Face folder."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config(tied=tied, nested=nested)))
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    (directory / "pytorch_model.bin").write_bytes(b"old weights that must not travel")
    if shards == 1:
        save_file(made, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    weight_map = {n: f"model-{k % shards + 1:05d}-of-{shards:05d}.safetensors" for k, n in enumerate(made)}
    for file in set(weight_map.values()):
        save_file({n: t for n, t in made.items() if weight_map[n] == file}, directory / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory
