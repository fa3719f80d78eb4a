"""Rope, attention, norms and modulation of diffusion transformers: one call, the best kernel, chosen and remembered.

Names, arguments and meaning are those of ``mindiesd``; NPU, CUDA and CPU give the same numbers::

    from dit_fused_ops import attention_forward, layernorm_scale_shift, rotary_position_embedding

    query = rotary_position_embedding(query, cos, sin, rotated_mode="rotated_interleaved")  # [B, S, N, D]
    x = attention_forward(query, key, value, attn_mask=mask, opt_mode="runtime")  # True in the mask keeps
    x = layernorm_scale_shift(norm, x, scale, shift)  # norm(x) · (1 + scale) + shift

Each op has a slow, obvious reference beside it, ``<op>_naive``, and a list of backends that must agree with it before
they may win. What there is on this machine, and why not the rest; and the knobs of the choice::

    print(capabilities())
    dispatcher.configure(mode="static")  # never measure: take what a tuning file says, or the order of the table
    dispatcher.clear()
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dit_fused_ops.activations import GELU, get_activation_layer
    from dit_fused_ops.attention import attention_forward, attention_forward_varlen, attention_naive
    from dit_fused_ops.dispatch import Dispatcher, Settings, dispatcher
    from dit_fused_ops.errors import BackendRefused, FusedOpsError, ParametersInvalid, TuningFileError
    from dit_fused_ops.inventory import Capabilities, Capability, capabilities
    from dit_fused_ops.norms import (
        RMSNorm,
        fast_layernorm,
        layernorm_scale_shift,
        residual_gate_norm_scale_shift,
        rms_norm,
        rmsnorm_scale_shift,
    )
    from dit_fused_ops.pointwise import (
        gather_residual_gate,
        gather_scale_shift,
        muls_add,
        residual_gate_add,
        scale_shift,
        swiglu,
    )
    from dit_fused_ops.rope import rope_tables_from_complex, rotary_naive, rotary_position_embedding
    from dit_fused_ops.sparse import block_sparse_attention_naive, sparse_attention

# Where each public name lives; torch is imported when the first of them is used.
_HOMES = {
    "rotary_position_embedding": "rope",
    "rope_tables_from_complex": "rope",
    "rotary_naive": "rope",
    "attention_forward": "attention",
    "attention_forward_varlen": "attention",
    "attention_naive": "attention",
    "sparse_attention": "sparse",
    "block_sparse_attention_naive": "sparse",
    "RMSNorm": "norms",
    "rms_norm": "norms",
    "fast_layernorm": "norms",
    "layernorm_scale_shift": "norms",
    "rmsnorm_scale_shift": "norms",
    "residual_gate_norm_scale_shift": "norms",
    "residual_gate_add": "pointwise",
    "scale_shift": "pointwise",
    "gather_scale_shift": "pointwise",
    "gather_residual_gate": "pointwise",
    "muls_add": "pointwise",
    "swiglu": "pointwise",
    "get_activation_layer": "activations",
    "GELU": "activations",
    "capabilities": "inventory",
    "Capabilities": "inventory",
    "Capability": "inventory",
    "dispatcher": "dispatch",
    "Dispatcher": "dispatch",
    "Settings": "dispatch",
    "FusedOpsError": "errors",
    "ParametersInvalid": "errors",
    "BackendRefused": "errors",
    "TuningFileError": "errors",
}

__all__ = [
    "rotary_position_embedding",
    "rope_tables_from_complex",
    "rotary_naive",
    "attention_forward",
    "attention_forward_varlen",
    "attention_naive",
    "sparse_attention",
    "block_sparse_attention_naive",
    "RMSNorm",
    "rms_norm",
    "fast_layernorm",
    "layernorm_scale_shift",
    "rmsnorm_scale_shift",
    "residual_gate_norm_scale_shift",
    "residual_gate_add",
    "scale_shift",
    "gather_scale_shift",
    "gather_residual_gate",
    "muls_add",
    "swiglu",
    "get_activation_layer",
    "GELU",
    "capabilities",
    "Capabilities",
    "Capability",
    "dispatcher",
    "Dispatcher",
    "Settings",
    "FusedOpsError",
    "ParametersInvalid",
    "BackendRefused",
    "TuningFileError",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
