"""The published layout, written with reshapes on whole tensors: slow, obvious, and none of the product's code.

Formulas: query/key/value interleaved by group as `(groups, rows of a group)`; vision QKV as a transpose of
`(3, heads)`; gate and up cut one by one; layers dealt out over stages.
"""

from __future__ import annotations

import torch
from tiny_checkpoint import GROUPS, VIT_HEADS, Tensors
from torch import Tensor

LLM, VIT = "text_decoder.decoder.layers.{}.", "image_encoder.encoder.blocks.layers.{}."
ROW = ("linear_proj.weight", "linear_fc2.weight")
COLUMN = ("linear_qkv.", "word_embeddings", "output_layer", "projector.encoder.linear_fc1")


def group_qkv(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rest = q.shape[1:]
    return torch.cat([x.view(GROUPS, x.shape[0] // GROUPS, *rest) for x in (q, k, v)], dim=1).reshape(-1, *rest)


def head_qkv(x: Tensor) -> Tensor:
    rest = x.shape[1:]
    return x.view(3, VIT_HEADS, -1, *rest).transpose(0, 1).reshape(-1, *rest)


def whole(
    hf: Tensors,
    llm: range,
    vit: range,
    *,
    first_llm: bool,
    last_llm: bool,
    first_vit: bool,
    last_vit: bool,
    output: Tensor | None,
) -> Tensors:
    """One stage's tensors before they are cut; fc1 is left out: see `rank`."""
    out: Tensors = {}
    for j, i in enumerate(llm):
        old, new = f"model.layers.{i}.", LLM.format(j)
        out[new + "input_layernorm.weight"] = hf[old + "input_layernorm.weight"]
        out[new + "pre_mlp_layernorm.weight"] = hf[old + "post_attention_layernorm.weight"]
        for kind in ("weight", "bias"):
            q, k, v = (hf[f"{old}self_attn.{p}_proj.{kind}"] for p in "qkv")
            out[new + f"self_attention.linear_qkv.{kind}"] = group_qkv(q, k, v)
        out[new + "self_attention.linear_proj.weight"] = hf[old + "self_attn.o_proj.weight"]
        out[new + "mlp.linear_fc2.weight"] = hf[old + "mlp.down_proj.weight"]
    for j, i in enumerate(vit):
        old, new = f"visual.blocks.{i}.", VIT.format(j)
        out[new + "input_layernorm.weight"] = hf[old + "norm1.weight"]
        out[new + "pre_mlp_layernorm.weight"] = hf[old + "norm2.weight"]
        for kind in ("weight", "bias"):
            out[new + f"self_attention.linear_qkv.{kind}"] = head_qkv(hf[old + f"attn.qkv.{kind}"])
            out[new + f"self_attention.linear_proj.{kind}"] = hf[old + f"attn.proj.{kind}"]
            out[new + f"mlp.linear_fc2.{kind}"] = hf[old + f"mlp.down_proj.{kind}"]
    if first_vit:
        out["image_encoder.encoder.patch_embed.proj.weight"] = hf["visual.patch_embed.proj.weight"]
    if last_vit:
        projector = "image_encoder.projector."
        out[projector + "layernorm.weight"] = hf["visual.merger.ln_q.weight"]
        for kind in ("weight", "bias"):
            out[projector + f"encoder.linear_fc1.{kind}"] = hf[f"visual.merger.mlp.0.{kind}"]
            out[projector + f"encoder.linear_fc2.{kind}"] = hf[f"visual.merger.mlp.2.{kind}"]
    if first_llm:
        out["text_decoder.embedding.word_embeddings.weight"] = hf["model.embed_tokens.weight"]
    if last_llm:
        out["text_decoder.decoder.final_layernorm.weight"] = hf["model.norm.weight"]
        if output is not None:
            out["text_decoder.output_layer.weight"] = output
    return out


def rank(hf: Tensors, stage: Tensors, llm: range, vit: range, tp: int, t: int) -> Tensors:
    """What tensor-parallel rank t holds of a stage."""
    out: Tensors = {}
    for name, tensor in stage.items():
        dim = 1 if name.endswith(ROW) else 0 if any(part in name for part in COLUMN) else None
        out[name] = tensor if dim is None else tensor.chunk(tp, dim)[t]
    for layers, old, new, kinds in (
        (llm, "model.layers.{}.mlp.", LLM, ["weight"]),
        (vit, "visual.blocks.{}.mlp.", VIT, ["weight", "bias"]),
    ):
        for j, i in enumerate(layers):
            for kind in kinds:
                gate, up = (hf[old.format(i) + f"{p}_proj.{kind}"] for p in ("gate", "up"))
                out[new.format(j) + f"mlp.linear_fc1.{kind}"] = torch.cat([gate.chunk(tp)[t], up.chunk(tp)[t]])
    return out


def megatron(
    hf: Tensors, llm_lists: list[list[int]], vit_lists: list[list[int]], tp: int, *, tied: bool
) -> dict[tuple[int, int, int], Tensors]:
    """Everything: {(tp rank, pp rank, virtual stage): tensors}."""
    pp = len(llm_lists[0])
    llm_counts, vit_counts = ([n for row in lists for n in row] for lists in (llm_lists, vit_lists))
    llm_stages, vit_stages = ([s for s, n in enumerate(counts) if n] for counts in (llm_counts, vit_counts))
    output = hf["lm_head.weight"] if not tied else hf["model.embed_tokens.weight"] if pp > 1 else None
    result = {}
    for s, (n, m) in enumerate(zip(llm_counts, vit_counts, strict=True)):
        llm = range(sum(llm_counts[:s]), sum(llm_counts[:s]) + n)
        vit = range(sum(vit_counts[:s]), sum(vit_counts[:s]) + m)
        stage = whole(
            hf,
            llm,
            vit,
            output=output,
            first_llm=s == llm_stages[0],
            last_llm=s == llm_stages[-1],
            first_vit=s == vit_stages[0],
            last_vit=s == vit_stages[-1],
        )
        for t in range(tp):
            result[t, s % pp, s // pp] = rank(hf, stage, llm, vit, tp, t)
    return result
