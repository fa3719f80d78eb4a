"""What the documents do not allow, a backend refuses with its reason, before anything is called.

The vendor's shape functions would take all of it. Sources: op-plugin, the documents of the operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dit_fused_ops import (
    attention_forward,
    attention_forward_varlen,
    fast_layernorm,
    rms_norm,
    rotary_position_embedding,
    sparse_attention,
)
from npu import peer
from npu.contract import case
from npu.fake_npu import on_npu

F16, F32, F64 = torch.float16, torch.float32, torch.float64


def empty(*shape: int, dtype: torch.dtype = F16, grad: bool = False) -> Tensor:
    """Of any size, as nothing reads it."""
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def rotation(*shape: int, mode: str = "rotated_half", batch: int = 1, dtype: torch.dtype = F16) -> object:
    table = empty(batch, shape[1], 1, shape[3], dtype=dtype)
    return rotary_position_embedding(empty(*shape, dtype=dtype), table, table, mode)


def attention(
    heads: int = 4,
    key_heads: int = 4,
    channels: int = 64,
    *,
    tokens: int = 4096,
    dtype: torch.dtype = F16,
    grad: bool = False,
    mask: tuple[int, ...] = (),
    **options: Any,
) -> object:
    q, k = (empty(1, n, tokens, channels, dtype=dtype, grad=grad) for n in (heads, key_heads))
    seen = empty(*mask, dtype=torch.bool) if mask else None
    return attention_forward(q, k, k, seen, head_first=True, **options)


def sequences(keys: int = 12, **options: Any) -> object:
    q, k = empty(8, 4, 64), empty(keys, 4, 64)
    return attention_forward_varlen(q, k, k, [0, 8], [0, keys], strict=False, **options)


def blocks(channels: int, dtype: torch.dtype = F16, key_heads: int = 2, grad: bool = False, precise: int = 0) -> object:
    q, k = (torch.zeros(1, n, 300, channels, dtype=dtype, requires_grad=grad) for n in (2, key_heads))
    shape = (3, 10, 10)
    return sparse_attention(
        q,
        k,
        k,
        inner_precise=precise,
        sparse_type="rf_v2",
        latent_shape_q=shape,
        latent_shape_k=shape,
        sparsity=0.5,
        backend="naive",
    )


A_HEADED_MASK = (1, 4, 4096, 4096)
LIMITS: list[tuple[str, str, Callable[[], object], str]] = [
    ("npu_rotary_mul", "channels", lambda: rotation(1, 2, 1, 896), "896"),
    ("npu_rotary_mul", "batch", lambda: rotation(1000, 1, 1, 8), "1000"),
    ("npu_rotary_mul", "heads", lambda: rotation(1, 1, 1000, 8), "1000"),
    ("npu_rotary_mul", "rows", lambda: rotation(50, 1, 20, 8, mode="rotated_interleaved"), "1000"),
    ("npu_rotary_mul", "tables", lambda: rotation(2, 3, 4, 8, mode="rotated_interleaved", batch=2), "tables"),
    ("npu_rotary_mul", "dtype", lambda: rotation(2, 3, 4, 8, dtype=F64), "float64"),
    ("npu_rms_norm", "dtype", lambda: rms_norm(empty(2, 8, dtype=F64)), "float64"),
    ("mindiesd_layernorm", "dtype", lambda: fast_layernorm(nn.LayerNorm(8), empty(2, 8, dtype=F64)), "float64"),
    ("fused_attn_score", "heads", lambda: attention(257, 257), "256"),
    ("fused_attn_score", "channels", lambda: attention(channels=776), "768"),
    ("fused_attn_score", "dtype", lambda: attention(dtype=F64), "float64"),
    ("prompt_flash_attn", "heads", lambda: attention(257, 257), "256"),
    ("prompt_flash_attn", "channels", lambda: attention(channels=520), "512"),
    ("prompt_flash_attn", "odd channels", lambda: attention(channels=60), "multiple of 8"),
    ("prompt_flash_attn", "all channels", lambda: attention(256, 256, 256), "65535"),
    ("prompt_flash_attn", "dtype", lambda: attention(dtype=F32), "float32"),
    ("prompt_flash_attn", "mask", lambda: attention(mask=A_HEADED_MASK), "mask"),
    ("prompt_flash_attn", "gradient", lambda: attention(grad=True), "gradient"),
    ("prompt_flash_attn", "lse", lambda: attention(return_lse=True), "lse"),
    ("fused_infer_attn", "channels", lambda: attention(channels=520), "512"),
    ("fused_infer_attn", "dtype", lambda: attention(dtype=F32), "float32"),
    ("fused_infer_attn", "mask", lambda: attention(mask=A_HEADED_MASK), "mask"),
    ("fused_infer_attn", "gradient", lambda: attention(grad=True), "gradient"),
    ("ascend_laser_attention", "channels", lambda: attention(channels=136), "128"),
    ("ascend_laser_attention", "dtype", lambda: attention(dtype=F32), "float32"),
    ("ascend_laser_attention", "mask", lambda: attention(mask=(4096, 4096)), "mask"),
    ("ascend_laser_attention", "causal", lambda: attention(is_causal=True), "causal"),
    ("ascend_laser_attention", "key heads", lambda: attention(4, 2), "gqa"),
    ("ascend_laser_attention", "lse", lambda: attention(return_lse=True), "lse"),
    ("fused_attn_score", "window", lambda: sequences(window_size=(2, 2)), "window"),
    ("fused_attn_score", "softcap", lambda: sequences(softcap=2.0), "softcap"),
    ("fused_attn_score", "empty rows", lambda: sequences(7, causal=True), "every query"),
    ("npu_block_sparse_attention", "channels", lambda: blocks(96), "64 or 128"),
    ("npu_block_sparse_attention", "dtype", lambda: blocks(64, F32), "float32"),
    ("npu_block_sparse_attention", "precision", lambda: blocks(64, torch.bfloat16, precise=1), "inner_precise"),
    ("npu_block_sparse_attention", "gradient", lambda: blocks(64, grad=True), "128"),
    ("rainfusionattention", "key heads", lambda: blocks(64, key_heads=1), "equally many heads"),
    ("rainfusionattention", "gradient", lambda: blocks(128, grad=True), "gradient"),
]


NAMES = [f"{backend}-{what}" for backend, what, *_ in LIMITS]


@pytest.mark.parametrize(("backend", "what", "call", "words"), LIMITS, ids=NAMES)
def test_limits(backend: str, what: str, call: Callable[[], object], words: str) -> None:
    peer.module()  # its operators are there once it is imported
    asked = case(what, call)
    found = asked.op.backend(backend)
    assert found is not None
    with FakeTensorMode():
        reason = found.refuses(asked.op.describe(on_npu(asked.tensors), asked.options))
    assert reason is not None
    assert words in reason
