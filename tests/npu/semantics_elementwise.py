"""What the vendor's rotation, norms and activations compute, and how it merges partial attention; float32 inside.

Sources: op-plugin, `docs/zh/custom_APIs/torch_npu`: npu_rotary_mul, npu_rms_norm, npu_swiglu, npu_fast_gelu, npu_gelu,
npu_attention_update, npu_ring_attention_update. `mindiesd::adaln` and `mindiesd::layernorm` wrap aclnnAdaLayerNorm and
aclnnLayerNormWithImplMode.

Shape suffixes: B batch, S tokens, N heads, D channels of a head, H all channels, T tokens of all sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from npu.semantics_attention import FLOATS
from npu.semantics_refusal import NotModelled, require, require_one_of, require_unused


def _require_float(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        require_one_of(f"dtype of {name}", tensor.dtype, FLOATS)


def _require_dtype(dtype: torch.dtype, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        require(tensor is None or tensor.dtype == dtype, f"{name} must be {dtype}")


def npu_rotary_mul(
    input: Tensor,
    r1: Tensor,
    r2: Tensor,
    rotary_mode: str = "half",
    rotate: Tensor | None = None,
) -> Tensor:
    """`npu::npu_rotary_mul`: x · cos + rotate(x) · sin, where `rotate` turns a pair (a, b) into (-b, a)."""
    require_unused(rotate=rotate)
    require_one_of("rotary_mode", rotary_mode, ("half", "interleave"))
    _require_float(input=input)
    _require_dtype(input.dtype, r1=r1, r2=r2)
    d = input.shape[-1]
    require(input.dim() in (3, 4) and d % 2 == 0 and d < 896, f"input {list(input.shape)}")
    require(r1.shape == r2.shape and r1.dim() == input.dim() and r1.shape[-1] == d, f"tables {list(r1.shape)} of {d}")
    require(all(r in (1, x) for r, x in zip(r1.shape, input.shape, strict=True)), f"tables {list(r1.shape)}")
    x = input.float()
    if rotary_mode == "half":
        first, second = x[..., : d // 2], x[..., d // 2 :]
        turned = torch.cat((-second, first), dim=-1)
    else:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).reshape(x.shape)
    return (x * r1.float() + turned * r2.float()).to(input.dtype)


def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """`npu::npu_rms_norm`: x · rstd · gamma and rstd = 1 / sqrt(mean(x²) + epsilon), over the dimensions of gamma."""
    _require_float(input=input, gamma=gamma)
    require(gamma.dtype in (input.dtype, torch.float32), f"input is {input.dtype}, gamma is {gamma.dtype}")
    require(input.shape[-gamma.dim() :] == gamma.shape, f"input {list(input.shape)}, gamma {list(gamma.shape)}")
    x = input.float()
    rstd = (x.square().mean(list(range(-gamma.dim(), 0)), keepdim=True) + epsilon).rsqrt()
    return (x * rstd * gamma.float()).to(input.dtype), rstd.detach()


def npu_swiglu(input: Tensor, dim: int = -1) -> Tensor:
    """`npu::npu_swiglu`: silu(first half) · second half."""
    _require_float(input=input)
    require(input.shape[dim] % 2 == 0, f"input {list(input.shape)} along {dim}")
    gate, value = input.float().chunk(2, dim)
    return (gate * gate.sigmoid() * value).to(input.dtype)


def npu_fast_gelu(input: Tensor) -> Tensor:
    """`npu::npu_fast_gelu`: x / (1 + exp(-1.702 |x|)) · exp(0.851 (x - |x|))."""
    _require_float(input=input)
    x = input.float()
    return (x / (1 + (-1.702 * x.abs()).exp()) * (0.851 * (x - x.abs())).exp()).to(input.dtype)


def npu_gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    """`npu::npu_gelu`: x · (1 + erf(x / √2)) / 2, or with the tanh approximation."""
    _require_float(input=input)
    require_one_of("approximate", approximate, ("none", "tanh"))
    x = input.float()
    if approximate == "none":
        share = (x / 2**0.5).erf()
    else:
        share = ((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)).tanh()
    return (x * (1 + share) / 2).to(input.dtype)


def layernorm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    impl_mode: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`mindiesd::layernorm`: (x - mean) · rstd · weight + bias, mean, rstd = 1 / sqrt(variance + eps)."""
    _require_float(input=input)
    require_one_of("impl_mode", impl_mode, (0, 1, 2))
    for each in (input, weight, bias):
        require(impl_mode != 2 or each is None or each.dtype == torch.float16, "impl_mode 2 is for float16 alone")
    shape = list(normalized_shape)
    require(list(input.shape[-len(shape) :]) == shape, f"input {list(input.shape)}, normalized {shape}")
    _require_dtype(input.dtype, weight=weight, bias=bias)
    for name, each in (("weight", weight), ("bias", bias)):
        require(each is None or list(each.shape) == shape, f"{name} is not {shape}")
    dims = list(range(-len(shape), 0))
    x = input.float()
    mean = x.mean(dims, keepdim=True)
    rstd = ((x - mean).square().mean(dims, keepdim=True) + eps).rsqrt()
    y = (x - mean) * rstd
    y = y if weight is None else y * weight.float()
    y = y if bias is None else y + bias.float()
    return y.to(input.dtype), mean.to(input.dtype), rstd.to(input.dtype)


def adaln(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    epsilon: float | None = 1e-5,
) -> Tensor:
    """`mindiesd::adaln`: LayerNorm(x) · (1 + scale) + shift of x [B, S, H] with scale and shift [B, H] or [B, 1, H]."""
    require(x.dim() == 3 and epsilon is not None, f"x {list(x.shape)}, epsilon {epsilon}")
    _require_dtype(x.dtype, scale=scale, shift=shift, weight=weight, bias=bias)
    b, _, h = x.shape
    for name, each in (("scale", scale), ("shift", shift)):
        require_one_of(f"shape of {name}", tuple(each.shape), ((b, h), (b, 1, h)))
    scale, shift = (each.float().view(b, 1, h) for each in (scale, shift))
    weight, bias = (each if each is None else each.float() for each in (weight, bias))
    y, _, _ = layernorm(x.float(), [h], weight, bias, 1e-5 if epsilon is None else epsilon)
    return (y * (1 + scale) + shift).to(x.dtype)


def adaln_v2(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    epsilon: float | None = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """`mindiesd::adaln_v2`: `adaln`, and the mean and rstd of each row."""
    out = adaln(x, scale, shift, weight, bias, epsilon)
    _, mean, rstd = layernorm(x, [x.shape[-1]], eps=1e-5 if epsilon is None else epsilon)
    return out, mean, rstd


def npu_attention_update(lse: Sequence[Tensor], local_out: Sequence[Tensor], update_type: int) -> tuple[Tensor, Tensor]:
    """`npu::npu_attention_update`: the whole of 1 to 16 partial results [rows, D] by their log Σ exp [rows]."""
    require(len(lse) == len(local_out) and 1 <= len(lse) <= 16, f"{len(lse)} lse, {len(local_out)} results")
    require_one_of("update_type", update_type, (0, 1))
    for row_lse, out in zip(lse, local_out, strict=True):
        _require_float(local_out=out)
        _require_dtype(torch.float32, lse=row_lse)
        _require_dtype(local_out[0].dtype, local_out=out)
        rows, d = local_out[0].shape
        require(out.shape == (rows, d) and row_lse.shape == (rows,), f"{list(out.shape)}, lse {list(row_lse.shape)}")
        require(d % 8 == 0 and 8 <= d <= 512, f"{d} channels of a head")
    whole = torch.stack(list(lse)).logsumexp(0)
    parts = [out.float() * (each - whole).exp()[:, None] for each, out in zip(lse, local_out, strict=True)]
    merged = torch.stack(parts).sum(0).to(local_out[0].dtype)
    return merged, whole if update_type == 1 else torch.full_like(whole, torch.nan)


def npu_ring_attention_update(
    prev_attn_out: Tensor,
    prev_softmax_max: Tensor,
    prev_softmax_sum: Tensor,
    cur_attn_out: Tensor,
    cur_softmax_max: Tensor,
    cur_softmax_sum: Tensor,
    *,
    actual_seq_qlen: Tensor | None = None,
    input_layout: str = "SBH",
    input_softmax_layout: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """`npu::npu_ring_attention_update`: two partial results [S, B, H] and their statistics [B, N, S, 8] made one."""
    require_unused(actual_seq_qlen=actual_seq_qlen)
    if input_layout != "SBH" or input_softmax_layout:
        raise NotModelled(f"layouts {input_layout!r} and {input_softmax_layout!r}")
    _require_float(prev_attn_out=prev_attn_out)
    _require_dtype(prev_attn_out.dtype, cur_attn_out=cur_attn_out)
    statistics = (prev_softmax_max, prev_softmax_sum, cur_softmax_max, cur_softmax_sum)
    b, n, s, eight = prev_softmax_max.shape
    for each in statistics:
        _require_dtype(torch.float32, statistics=each)
        require(each.shape == (b, n, s, eight) and eight == 8, f"statistics {list(each.shape)}")
    for out in (prev_attn_out, cur_attn_out):
        require(out.shape[:2] == (s, b) and out.shape[2] % n == 0, f"result {list(out.shape)}")
    greatest = torch.maximum(prev_softmax_max, cur_softmax_max)
    parts = [total * (most - greatest).exp() for most, total in (statistics[:2], statistics[2:])]
    whole = parts[0] + parts[1]
    outs = (out.float().reshape(s, b, n, -1) for out in (prev_attn_out, cur_attn_out))
    shares = ((part / whole)[..., :1].permute(2, 0, 1, 3) for part in parts)
    merged = sum(out * share for out, share in zip(outs, shares, strict=True))
    return torch.as_tensor(merged).flatten(2).to(prev_attn_out.dtype), greatest, whole
