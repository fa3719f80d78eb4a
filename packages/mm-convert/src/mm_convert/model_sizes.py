"""The numbers of a model, read from the tensors of a Megatron folder that has no ``config.json``."""

from __future__ import annotations

import re
from math import lcm
from typing import NamedTuple

from mm_convert.comparing import same_bytes
from mm_convert.errors import LayoutError
from mm_convert.families.family import Family, ModelSizes
from mm_convert.layout import RANK_FILE, Layout, Part
from mm_convert.megatron import EMBEDDING as EMBEDDING
from mm_convert.megatron import MegatronFolder
from mm_convert.plans import Ref, Spec

OUTPUT = "text_decoder.output_layer.weight"
LLM_LAYER = "text_decoder.decoder.layers.0."
QKV, PROJECTION, QUERY_NORM = (f"self_attention.{name}.weight" for name in ("linear_qkv", "linear_proj", "q_layernorm"))
DEEPSTACK = re.compile(r"image_encoder\.encoder\.blocks\.layers\.(\d+)\.deepstack_layer\.")
EXPERT_NUMBER = re.compile(r"\.local_experts\.(\d+)\.")
# Shape of the fused query, key and value matrix, and the number of heads that a rank holds whole: from the config.json
# files of the published checkpoints (num_attention_heads 12, 16, 28, 40, 64 with 2, 2, 4, 8, 8 key/value heads of 128).
KEY_VALUE_HEADS = {(2048, 1536): 2, (2560, 2048): 2, (4608, 3584): 4, (7168, 5120): 8, (10240, 8192): 8}
VISION_HEADS = {(3840, 1280): 16, (3072, 1024): 16, (9600, 3200): 25}


class Heads(NamedTuple):
    """The number of heads of a part: 0 where there is no such part, None where tensors don't tell."""

    key_value: int | None
    vision: int | None


def heads(family: Family, mm: MegatronFolder) -> Heads:
    """Key/value heads and vision heads, where the shapes tell."""
    rows, hidden = _fused(mm)
    norm = _find(mm, LLM_LAYER + QUERY_NORM)
    key_value = KEY_VALUE_HEADS.get((rows, hidden))
    if norm:
        # q_layernorm has one number for each element of a head; the projection takes all query heads' elements.
        head_dim = norm[1].shape[0]
        queries = _find(mm, LLM_LAYER + PROJECTION)
        width = queries[1].shape[1] * mm.layout.tp_size if queries else rows
        key_value = (rows - width) // 2 // head_dim
    seen = any(map(sum, mm.layout.vit_pp_layers)) and "vit" in family.layer_names
    vision = _vision_heads(mm, family.layer_names["vit"] + "0." + QKV) if seen else 0
    return Heads(key_value=key_value, vision=vision)


def sizes_on_disk(family: Family, mm: MegatronFolder, target: Layout, *, legal: bool = False) -> ModelSizes:
    """What the tensors tell of the model, enough to bring it into the layout `target`.

    How many heads there are decides which tp_size is legal, and nothing else here: a rank's rows are whole heads, in
    order, at any tp_size. So it need not be known where `target` cuts no finer than the checkpoint does.

    Args:
        family: the model's family.
        mm: the checkpoint.
        target: the layout.
        legal: the model is known to exist in that layout.

    Raises:
        LayoutError: the number of heads is needed and can't be known.
    """
    known, tp = heads(family, mm), mm.layout.tp_size
    if not legal and tp % target.tp_size and None in known:
        rows = _fused(mm)
        raise LayoutError(
            f"tp_size {target.tp_size}: whether it divides the key/value heads can't be told from {mm.directory}, whose"
            f" fused query/key/value matrix is {list(rows)}, of no published model; legal without knowing more:"
            f" {[t for t in range(1, tp + 1) if tp % t == 0]}; or name a folder with the model's config.json:"
            " --cfg.hf_config.hf_dir"
        )
    llm, vit, audio = mm.layout.layers
    # Any number that both sizes divide gives the same bytes.
    instead = lcm(tp, target.tp_size)
    return ModelSizes(
        llm_layers=llm,
        vit_layers=vit,
        key_value_heads=known.key_value or instead,
        vision_heads=instead if known.vision is None else known.vision,
        tied=is_tied(mm, target),
        deepstack=_deepstack(mm),
        features=frozenset(
            f for f, begin in family.features.items() if any(r.name.startswith(begin) for r in mm.tensors)
        ),
        audio_layers=audio,
        audio_heads=lcm(mm.layout.tp("audio"), target.tp("audio")) if audio else 0,
        experts=_experts(mm),
        uneven=family.uneven,
    )


def _vision_heads(mm: MegatronFolder, name: str) -> int | None:
    """Heads of a vision layer: seen in how unevenly they are dealt out, or known of published shapes."""
    found = _find(mm, name)
    if found is None:
        return None
    ref, spec = found
    pp_rank = mm.layout.ranks(ref).pp
    files = (f"{mm.layout.rank_dir(t, pp_rank)}/{RANK_FILE}" for t in range(mm.layout.tp("vit")))
    held = [mm.tensors[r].shape[0] for r in (ref._replace(file=file) for file in files) if r in mm.tensors]
    more = max(held) - min(held)
    return sum(held) // more if more else VISION_HEADS.get((sum(held), spec.shape[1]))


def is_tied(mm: MegatronFolder, target: Layout | None = None) -> bool:
    """Whether the output layer is the embedding: absent, or a copy of it on the last stage of a pipeline.

    Args:
        mm: the checkpoint; its bytes are read only where they decide.
        target: a layout to write, if only what it needs to know is asked: in a pipeline there is an output layer
            either way.
    """
    outputs = [ref for ref in mm.tensors if ref.name == OUTPUT]
    if not outputs or mm.layout.pp_size == 1 or (target is not None and target.pp_size > 1):
        return not outputs
    embeddings = [ref for ref in mm.tensors if ref.name == EMBEDDING]
    pairs = list(zip(sorted(embeddings), sorted(outputs), strict=False))
    return len(embeddings) == len(outputs) and all(
        mm.tensors[a] == mm.tensors[b] and same_bytes(mm.files, a, mm.files, b) for a, b in pairs
    )


def _deepstack(mm: MegatronFolder) -> tuple[int, ...]:
    """Global numbers of the vision layers that have a merger of their own."""
    stages = mm.layout.stages("vit")
    found: set[int] = set()
    for ref in mm.tensors:
        match = DEEPSTACK.match(ref.name)
        if match:
            found.add(stages[mm.layout.stage(ref)][int(match[1])])
    return tuple(sorted(found))


def _experts(mm: MegatronFolder) -> int:
    """Experts of a layer, all ranks together."""
    numbers = [int(match[1]) for ref in mm.tensors if (match := EXPERT_NUMBER.search(ref.name))]
    return (max(numbers) + 1) * mm.layout.ep_size if numbers else 0


def _find(mm: MegatronFolder, name: str) -> tuple[Ref, Spec] | None:
    return next(((ref, spec) for ref, spec in mm.tensors.items() if ref.name == name), None)


def _fused(mm: MegatronFolder) -> tuple[int, int]:
    """Shape of a language layer's query, key and value as one matrix, whether or not they stand apart."""
    apart = [_whole(mm, f"{LLM_LAYER}self_attention.{part}_proj.weight", "llm") for part in "qkv"]
    return (sum(rows for rows, _ in apart), apart[0][1]) if apart[0][0] else _whole(mm, LLM_LAYER + QKV, "llm")


def _whole(mm: MegatronFolder, name: str, part: Part) -> tuple[int, int]:
    """Shape of a column-parallel matrix, all ranks together; zeros if it is not there."""
    found = _find(mm, name)
    return (found[1].shape[0] * mm.layout.tp(part), found[1].shape[1]) if found else (0, 0)
