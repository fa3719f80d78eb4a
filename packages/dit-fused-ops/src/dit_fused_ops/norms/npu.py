"""Norms of Ascend NPUs: torch_npu's own, and MindIE SD's where they are registered.

Their tensors go by position (the name of the first differs between versions), and weight and bias in the dtype of x.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_fused_ops.norms.call import NormCall
from dit_fused_ops.norms.parts import Parts, cast, modulation, normed_input, with_surroundings
from dit_fused_ops.platform import A5, soc_version


@with_surroundings
def npu_rms_norm(call: NormCall, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """RMS norm; gamma is obligatory, in the dtype of x, or in float32 beside x of 16 bits."""
    if weight is None:
        weight = x.new_ones(x.shape[-1])
    gamma = weight if weight.dtype == x.dtype else weight.float()
    normed: Tensor = torch.ops.npu.npu_rms_norm(x, gamma, call.eps)[0]
    return normed if bias is None else normed + bias.to(normed.dtype)


@with_surroundings
def npu_layer_norm(call: NormCall, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Layer norm of torch, which torch_npu carries out with one kernel."""
    weight, bias = cast(x.dtype, weight, bias)
    return F.layer_norm(x, x.shape[-1:], weight, bias, call.eps)


@with_surroundings
def mindiesd_layernorm(call: NormCall, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Layer norm with a choice between accuracy and speed."""
    affine = cast(x.dtype, weight, bias)
    normed: Tensor = torch.ops.mindiesd.layernorm(x, list(x.shape[-1:]), *affine, call.eps, call.impl_mode)[0]
    return normed


def mindiesd_adaln(call: NormCall, *tensors: Any) -> Any:
    """Layer norm with scale and shift; on A5 a kernel of another name, which also returns mean and deviation."""
    parts = Parts(*tensors)
    x = normed_input(call, parts)
    batch, tokens, hidden = x.shape
    given, along = x, 1
    if call.modulation == "token":  # the kernel takes one vector a sample: each token is a sample then
        given, along = x.reshape(batch * tokens, 1, hidden), tokens
    scale, shift = (t.expand(batch, along, hidden).reshape(-1, 1, hidden) for t in modulation(parts, x.dtype))
    affine = cast(x.dtype, parts.weight, parts.bias)
    if soc_version() in A5:
        normed = torch.ops.mindiesd.adaln_v2(given, scale, shift, *affine, call.eps)[0]
    else:
        normed = torch.ops.mindiesd.adaln(given, scale, shift, *affine, call.eps)
    normed = normed.reshape(x.shape)
    return normed if parts.y is None else (x, normed)
