"""Published Qwen2.5-VL models as headers alone: the right names and shapes, every byte a hole in a sparse file."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any, NamedTuple


class Published(NamedTuple):
    """What config.json says, by the letters of the papers."""

    hidden: int
    heads: int
    groups: int
    layers: int
    ffn: int
    vocabulary: int
    vision_ffn: int
    tied: bool


MODELS = {
    "3B": Published(2048, 16, 2, 36, 11008, 151936, 3420, True),
    "7B": Published(3584, 28, 4, 28, 18944, 152064, 3420, False),
    "72B": Published(8192, 64, 8, 80, 29568, 152064, 3456, False),
}
DEPTH, WIDTH, MERGED, HEAD = 32, 1280, 5120, 128


def shapes(model: Published) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model."""
    h, kv = model.hidden, model.groups * HEAD
    made: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (model.vocabulary, h), "model.norm.weight": (h,)}
    for i in range(model.layers):
        at = f"model.layers.{i}."
        made |= {f"{at}{norm}_layernorm.weight": (h,) for norm in ("input", "post_attention")}
        for name, rows in (("q", model.heads * HEAD), ("k", kv), ("v", kv)):
            made |= {f"{at}self_attn.{name}_proj.weight": (rows, h), f"{at}self_attn.{name}_proj.bias": (rows,)}
        made[f"{at}self_attn.o_proj.weight"] = (h, model.heads * HEAD)
        made |= {f"{at}mlp.{name}_proj.weight": (model.ffn, h) for name in ("gate", "up")}
        made[f"{at}mlp.down_proj.weight"] = (h, model.ffn)
    layers = {"attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH), "mlp.down_proj": (WIDTH, model.vision_ffn)}
    layers |= {f"mlp.{name}_proj": (model.vision_ffn, WIDTH) for name in ("gate", "up")}
    for i in range(DEPTH):
        at = f"visual.blocks.{i}."
        made |= {f"{at}norm{n}.weight": (WIDTH,) for n in (1, 2)}
        for name, shape in layers.items():
            made |= {f"{at}{name}.weight": shape, f"{at}{name}.bias": shape[:1]}
    made |= {"visual.patch_embed.proj.weight": (WIDTH, 3, 2, 14, 14), "visual.merger.ln_q.weight": (WIDTH,)}
    made |= {"visual.merger.mlp.0.weight": (MERGED, MERGED), "visual.merger.mlp.0.bias": (MERGED,)}
    made |= {"visual.merger.mlp.2.weight": (h, MERGED), "visual.merger.mlp.2.bias": (h,)}
    return made if model.tied else made | {"lm_head.weight": (model.vocabulary, h)}


def save(directory: Path, name: str, *, shards: int = 4) -> Path:
    """Write the folder; bf16, as published."""
    model = MODELS[name]
    directory.mkdir(parents=True)
    config = {
        "model_type": "qwen2_5_vl",
        "num_hidden_layers": model.layers,
        "num_key_value_heads": model.groups,
        "tie_word_embeddings": model.tied,
        "vision_config": {"depth": DEPTH, "num_heads": 16},
    }
    (directory / "config.json").write_text(json.dumps(config))
    everything = list(shapes(model).items())
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        held = everything[shard::shards]
        weight_map |= dict.fromkeys((tensor for tensor, _ in held), file)
        _save_holes(directory / file, held)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def _save_holes(path: Path, tensors: list[tuple[str, tuple[int, ...]]]) -> None:
    header: dict[str, Any] = {}
    end = 0
    for name, shape in tensors:
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + 2 * prod(shape)]}
        end += 2 * prod(shape)
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + end)
