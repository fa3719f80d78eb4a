"""CPU kernels for the vendor's operators: while `installed()` is open, code for NPUs computes numbers on CPU tensors.

    with installed():
        out = torch.ops.npu.npu_rotary_mul(x, cos, sin)          # CPU tensors, the vendor's published formula

Gradients are those of the formula. An operator without a gradient on the device has none here either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from npu import semantics_attention as attention
from npu import semantics_elementwise as elementwise
from npu import semantics_inference as inference
from npu import semantics_sparse as sparse


@dataclass(frozen=True)
class Semantic:
    """One operator: `namespace::name`, what it computes, whether the vendor gives it a gradient.

    `schema` defines the operator where the vendor's library does not: `mindiesd::` comes with MindIE SD.
    """

    namespace: str
    compute: Callable[..., Any]
    gradient: bool = False
    schema: str = ""

    @property
    def name(self) -> str:
        return self.compute.__name__

    @property
    def missing(self) -> bool:
        return not hasattr(getattr(torch.ops, self.namespace), self.name)

    def overload(self) -> torch._ops.OpOverload:
        found: torch._ops.OpOverload = getattr(getattr(torch.ops, self.namespace), self.name).default
        return found


_LA = (
    "la(Tensor query, Tensor key, Tensor value, Tensor? atten_mask=None, Tensor? alibi_mask=None, "
    "Tensor? drop_mask=None, float scale_value=1.0, int head_num=2, str input_layout='BNSD', float keep_prob=1.0, "
    "int pre_tokens=2147483647, int next_tokens=1, bool is_highPrecision=True) -> (Tensor, Tensor)"
)
_MODULATION = "Tensor x, Tensor scale, Tensor shift, Tensor? weight=None, Tensor? bias=None, float? epsilon=1e-5"
_ADALN = f"adaln({_MODULATION}) -> Tensor"
_ADALN_V2 = f"adaln_v2({_MODULATION}) -> (Tensor, Tensor, Tensor)"
_LAYERNORM = (
    "layernorm(Tensor input, int[] normalized_shape, Tensor? weight=None, Tensor? bias=None, float eps=1e-05, "
    "int impl_mode=0) -> (Tensor, Tensor, Tensor)"
)
_RAINFUSION = (
    "rainfusionattention(Tensor query, Tensor key, Tensor value, Tensor select_idx, Tensor select_num_idx, "
    "int[] blockshape, Tensor? attn_mask=None, int[]? actual_seq_qlen=None, int[]? actual_seq_kvlen=None, "
    "Tensor? block_table=None, str q_input_layout='TND', str kv_input_layout='TND', int head_num=1, int mask_type=0, "
    "float scale=1.0, int inner_precise=1, int block_size=0) -> (Tensor, Tensor)"
)
_BLOCK_SPARSE = (
    "block_sparse_attention(Tensor query, Tensor key, Tensor value, Tensor? block_sparse_mask=None, "
    "int[] block_shape=[128,128], str q_input_layout='BNSD', str kv_input_layout='BNSD', int num_key_value_heads=1, "
    "float scale_value=1.0, int inner_precise=0, int[]? actual_seq_lengths=None, int[]? actual_seq_lengths_kv=None, "
    "int softmax_lse_flag=0, Tensor? q_dequant_scale=None, Tensor? k_dequant_scale=None, "
    "Tensor? v_dequant_scale=None) -> (Tensor, Tensor)"
)

SEMANTICS: tuple[Semantic, ...] = (
    Semantic("npu", elementwise.npu_rotary_mul, gradient=True),
    Semantic("npu", elementwise.npu_rms_norm, gradient=True),
    Semantic("npu", elementwise.npu_swiglu, gradient=True),
    Semantic("npu", elementwise.npu_fast_gelu, gradient=True),
    Semantic("npu", elementwise.npu_gelu, gradient=True),
    Semantic("npu", elementwise.npu_attention_update),
    Semantic("npu", elementwise.npu_ring_attention_update),
    Semantic("npu", attention.npu_fusion_attention, gradient=True),
    Semantic("npu", inference.npu_prompt_flash_attention),
    Semantic("npu", inference.npu_fused_infer_attention_score),
    Semantic("npu", sparse.npu_block_sparse_attention, gradient=True),
    Semantic("mindiesd", inference.la, schema=_LA),
    Semantic("mindiesd", elementwise.adaln, schema=_ADALN),
    Semantic("mindiesd", elementwise.adaln_v2, schema=_ADALN_V2),
    Semantic("mindiesd", elementwise.layernorm, schema=_LAYERNORM),
    Semantic("mindiesd", sparse.rainfusionattention, schema=_RAINFUSION),
    Semantic("mindiesd", sparse.block_sparse_attention, schema=_BLOCK_SPARSE),
)


@contextmanager
def installed(semantics: tuple[Semantic, ...] = SEMANTICS) -> Iterator[None]:
    """Register the CPU kernels for a while; an operator that nothing has defined is defined for as long."""
    scoped = torch.library._scoped_library
    with scoped("npu", "FRAGMENT") as npu, scoped("mindiesd", "FRAGMENT") as mindiesd:
        libraries = {"npu": npu, "mindiesd": mindiesd}
        for semantic in semantics:
            _register(libraries[semantic.namespace], semantic)
        yield


def _register(library: torch.library.Library, semantic: Semantic) -> None:
    if semantic.missing and semantic.schema:
        library.define(semantic.schema)  # type: ignore[no-untyped-call]
    if not semantic.gradient:
        library.impl(semantic.name, torch.no_grad()(semantic.compute), "CPU")  # type: ignore[no-untyped-call]
        return
    # Below autograd the formula is a plain kernel; at the level of autograd torch differentiates it.
    for key in ("CPU", "AutogradCPU"):
        library.impl(semantic.name, semantic.compute, key)  # type: ignore[no-untyped-call]
