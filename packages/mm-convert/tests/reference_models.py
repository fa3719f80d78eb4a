"""The published layouts of more models, with reshapes of whole tensors: slow, obvious, none of the product's code.

A model's tensors are cut four ways: "same" on every rank, "rows", "columns", or "gated" (gate and up cut one by one
and put together). Layers are dealt out over stages; what stands outside the layers goes to the first or the last
stage that holds a layer of its part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from tiny_checkpoint import Tensors
from torch import Tensor

Made = tuple[str, str, tuple[Tensor, ...]]
Lists = list[list[int]]
LAYER = "text_decoder.decoder.layers.{}."
BLOCK = "image_encoder.encoder.blocks.layers.{}."
KINDS = ("weight", "bias")
DEEPSTACK = (1, 3)  # of the recorded model: the second merger stands beside the fourth of four layers


@dataclass(frozen=True)
class Published:
    """A model's layout: what a layer gives, and what the first and last stage of a part hold beside their layers."""

    language_layer: Callable[[Tensors, int, int], Iterator[Made]]
    vision_layer: Callable[[Tensors, int, int], Iterator[Made]] | None
    outside: Callable[[Tensors], dict[str, list[Made]]]


def by_group(groups: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rest = q.shape[1:]
    return torch.cat([x.view(groups, -1, *rest) for x in (q, k, v)], dim=1).reshape(-1, *rest)


def by_head(heads: int, qkv: Tensor) -> Tensor:
    rest = qkv.shape[1:]
    return qkv.view(3, heads, -1, *rest).transpose(0, 1).reshape(-1, *rest)


def cut(how: str, tensors: tuple[Tensor, ...], tp: int, t: int) -> Tensor:
    if how == "same":
        return tensors[0]
    if how == "gated":
        return torch.cat([x.chunk(tp)[t] for x in tensors])
    return tensors[0].chunk(tp, dim=("rows", "columns").index(how))[t]


def megatron(model: Published, hf: Tensors, llm: Lists, vit: Lists, tp: int) -> dict[tuple[int, int, int], Tensors]:
    """Everything: {(tp rank, pp rank, virtual stage): tensors}."""
    pp = len(llm[0])
    counts = {"llm": [n for row in llm for n in row], "vit": [n for row in vit for n in row]}
    outside = model.outside(hf)
    if "lm_head.weight" not in hf and pp > 1:
        outside["last llm"].append(("text_decoder.output_layer.weight", "rows", (embedding(hf),)))
    stages = len(counts["llm"])
    made: list[list[Made]] = [[] for _ in range(stages)]
    for part, layer in (("llm", model.language_layer), ("vit", model.vision_layer)):
        if layer is None:
            continue
        held = [s for s in range(stages) if counts[part][s]]
        made[held[0]] += outside[f"first {part}"]
        made[held[-1]] += outside[f"last {part}"]
        for s in range(stages):
            for j in range(counts[part][s]):
                made[s] += layer(hf, sum(counts[part][:s]) + j, j)
    return {
        (t, s % pp, s // pp): {name: cut(how, tensors, tp, t) for name, how, tensors in made[s]}
        for s in range(stages)
        for t in range(tp)
    }


def embedding(hf: Tensors) -> Tensor:
    [name] = [n for n in hf if n.endswith("embed_tokens.weight")]
    return hf[name]


def qwen_language(old: str, *, bias: bool, norms: bool) -> Callable[[Tensors, int, int], Iterator[Made]]:
    """A language layer with four key/value heads."""

    def layer(hf: Tensors, i: int, j: int) -> Iterator[Made]:
        source, new = old.format(i), LAYER.format(j)
        yield new + "input_layernorm.weight", "same", (hf[source + "input_layernorm.weight"],)
        yield new + "pre_mlp_layernorm.weight", "same", (hf[source + "post_attention_layernorm.weight"],)
        for kind in KINDS if bias else KINDS[:1]:
            q, k, v = (hf[f"{source}self_attn.{x}_proj.{kind}"] for x in "qkv")
            yield new + f"self_attention.linear_qkv.{kind}", "rows", (by_group(4, q, k, v),)
        for x in "qk" if norms else "":
            yield new + f"self_attention.{x}_layernorm.weight", "same", (hf[source + f"self_attn.{x}_norm.weight"],)
        yield new + "self_attention.linear_proj.weight", "columns", (hf[source + "self_attn.o_proj.weight"],)
        gate, up = (hf[source + f"mlp.{x}_proj.weight"] for x in ("gate", "up"))
        yield new + "mlp.linear_fc1.weight", "gated", (gate, up)
        yield new + "mlp.linear_fc2.weight", "columns", (hf[source + "mlp.down_proj.weight"],)

    return layer


def vision(old: str, fc1: str, fc2: str) -> Callable[[Tensors, int, int], Iterator[Made]]:
    """A vision layer of four heads with layer norms and a plain MLP."""

    def layer(hf: Tensors, i: int, j: int) -> Iterator[Made]:
        source, new = old.format(i), BLOCK.format(j)
        for kind in KINDS:
            yield new + f"input_layernorm.{kind}", "same", (hf[source + f"norm1.{kind}"],)
            yield new + f"pre_mlp_layernorm.{kind}", "same", (hf[source + f"norm2.{kind}"],)
            yield new + f"self_attention.linear_qkv.{kind}", "rows", (by_head(4, hf[source + f"attn.qkv.{kind}"]),)
            how = "columns" if kind == "weight" else "same"
            yield new + f"self_attention.linear_proj.{kind}", how, (hf[source + f"attn.proj.{kind}"],)
            yield new + f"mlp.linear_fc1.{kind}", "rows", (hf[source + f"mlp.{fc1}.{kind}"],)
            yield new + f"mlp.linear_fc2.{kind}", how, (hf[source + f"mlp.{fc2}.{kind}"],)

    return layer


def language_ends(hf: Tensors, old: str) -> dict[str, list[Made]]:
    last: list[Made] = [("text_decoder.decoder.final_layernorm.weight", "same", (hf[old + "norm.weight"],))]
    if "lm_head.weight" in hf:
        last.append(("text_decoder.output_layer.weight", "rows", (hf["lm_head.weight"],)))
    first: list[Made] = [("text_decoder.embedding.word_embeddings.weight", "rows", (embedding(hf),))]
    return {"first llm": first, "last llm": last}


def merger(hf: Tensors, old: str, new: str, norm: str, fc1: str, fc2: str) -> Iterator[Made]:
    for kind in KINDS:
        yield new + f"layernorm.{kind}", "same", (hf[f"{old}{norm}.{kind}"],)
        yield new + f"encoder.linear_fc1.{kind}", "rows", (hf[f"{old}{fc1}.{kind}"],)
        how = "columns" if kind == "weight" else "same"
        yield new + f"encoder.linear_fc2.{kind}", how, (hf[f"{old}{fc2}.{kind}"],)


def _qwen2_vl_outside(hf: Tensors) -> dict[str, list[Made]]:
    patches = "patch_embed.proj.weight"
    return {
        "first vit": [("image_encoder.encoder." + patches, "same", (hf["visual." + patches],))],
        "last vit": list(merger(hf, "visual.merger.", "image_encoder.projector.", "ln_q", "mlp.0", "mlp.2")),
        **language_ends(hf, "model."),
    }


QWEN2_VL = Published(
    qwen_language("model.layers.{}.", bias=True, norms=False),
    vision("visual.blocks.{}.", "fc1", "fc2"),
    _qwen2_vl_outside,
)


def _qwen3_block(hf: Tensors, i: int, j: int) -> Iterator[Made]:
    yield from vision("model.visual.blocks.{}.", "linear_fc1", "linear_fc2")(hf, i, j)
    if i in DEEPSTACK:
        old = f"model.visual.deepstack_merger_list.{DEEPSTACK.index(i)}."
        yield from merger(hf, old, BLOCK.format(j) + "deepstack_layer.", "norm", "linear_fc1", "linear_fc2")


def _qwen3_vl_outside(hf: Tensors) -> dict[str, list[Made]]:
    names = ("patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed.weight")
    new = "image_encoder.projector."
    return {
        "first vit": [("image_encoder.encoder." + name, "same", (hf["model.visual." + name],)) for name in names],
        "last vit": list(merger(hf, "model.visual.merger.", new, "norm", "linear_fc1", "linear_fc2")),
        **language_ends(hf, "model.language_model."),
    }


QWEN3_VL = Published(
    qwen_language("model.language_model.layers.{}.", bias=False, norms=True), _qwen3_block, _qwen3_vl_outside
)


def _text_outside(hf: Tensors) -> dict[str, list[Made]]:
    return language_ends(hf, "model.")


# No layout of a text model alone is published: it is that of the language model inside a vision-language one.
QWEN2_5 = Published(qwen_language("model.layers.{}.", bias=True, norms=False), None, _text_outside)
QWEN3 = Published(qwen_language("model.layers.{}.", bias=False, norms=True), None, _text_outside)
