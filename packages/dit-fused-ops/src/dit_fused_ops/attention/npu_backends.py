"""Attention kernels of Ascend NPUs; the call is as in `torch_backends`.

Conditions and meanings from the vendor's op-plugin documents (npu_fusion_attention, npu_prompt_flash_attention,
npu_fused_infer_attention_score). `mindiesd::la` has no public document; it is called as MindIE SD calls it.

Shape suffixes: as in `reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_fused_ops.attention.call import AttentionCall
from dit_fused_ops.attention.masks import close_lse, close_rows, open_rows, whole_mask
from dit_fused_ops.attention.reference import UNBOUNDED, Window
from dit_fused_ops.attention.torch_backends import NOT_EMPTY, SAME_BITS, heads_first
from dit_fused_ops.dispatch import HALVES, Backend, Rule
from dit_fused_ops.platform import A5, DUO, op_missing, soc_version

NPU = frozenset({"npu"})
INT_MAX = 2**31 - 1
TRIANGLE = 2048  # the compressed mask is always that wide
EXPLICIT, CAUSAL_BOTTOM_RIGHT, BAND = 0, 3, 4  # of sparse_mode
LASER_TOKENS, LASER_CHANNELS = 256, 128  # the laser kernel works on whole tiles
LASER_SHORTEST = 2048


@dataclass(frozen=True, kw_only=True)
class VendorMask:
    """How the vendor's kernels are told what is not seen: True is hidden.

    Attributes:
        hidden: atten_mask; without it mode and bounds have no effect.
        mode: sparse_mode.
        before: pre_tokens.
        after: next_tokens; always said, as its default is causal in one of the kernels.
        seeing: which queries see a key, [..., S, 1]; None where all do.
    """

    hidden: Tensor | None = None
    mode: int = EXPLICIT
    before: int = INT_MAX
    after: int = INT_MAX
    seeing: Tensor | None = None


def vendor_mask(call: AttentionCall, q: Tensor, mask: Tensor | None, lengths: Tensor | None) -> VendorMask:
    """The cheapest way to say what the call hides: nothing, a compressed triangle with bounds, or all of it."""
    # A single query has kernels of its own, which know no triangle; its explicit mask is small.
    compressible = call.window == UNBOUNDED or (call.queries > 1 and not call.window_empties_rows)
    if mask is None and lengths is None and compressible:
        return window_mask(call.window, q.device)
    whole = whole_mask(call, q, mask, lengths)
    assert whole is not None, "mask, lengths or window were given"
    opened, seeing = open_rows(whole)
    batch, heads = opened.shape[:2] if opened.shape[1] == 1 else (call.batch, call.heads)
    hidden = (~opened).expand(batch, heads, call.queries, call.keys).contiguous()
    return VendorMask(hidden=hidden, seeing=seeing)


def window_mask(window: Window, device: torch.device) -> VendorMask:
    """The compressed triangle with the mode and bounds of a window."""
    if window == UNBOUNDED:
        return VendorMask()
    triangle = torch.ones(TRIANGLE, TRIANGLE, dtype=torch.bool, device=device).triu(1)
    if window == (-1, 0):
        return VendorMask(hidden=triangle, mode=CAUSAL_BOTTOM_RIGHT)
    before, after = (INT_MAX if bound < 0 else bound for bound in window)
    return VendorMask(hidden=triangle, mode=BAND, before=before, after=after)


def to_kernel(x_BNSD: Tensor, layout: str) -> Tensor:
    """Bring heads-first tensors to the layout of a kernel."""
    if layout == "BNSD":
        return x_BNSD
    x = x_BNSD.transpose(1, 2)
    return x if layout == "BSND" else x.flatten(2)


def from_kernel(x: Tensor, layout: str, heads: int) -> Tensor:
    """Bring the output of a kernel back to heads first, [B, N, S, E]."""
    if layout == "BNSD":
        return x
    return (x if layout == "BSND" else x.unflatten(2, (heads, -1))).transpose(1, 2)


def _kernel(call_kernel: Callable[..., tuple[Tensor, Tensor | None]], layout: str | None) -> Callable[..., Any]:
    """The run of a kernel in `layout`; None: in that of the call."""

    @heads_first
    def run(
        call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        how = vendor_mask(call, q, mask, lengths)
        chosen = layout or call.kernel_layout or "BNSD"
        out, lse = call_kernel(call, *(to_kernel(each, chosen) for each in (q, k, v)), how, chosen)
        out = from_kernel(out, chosen, call.heads)
        if how.seeing is None:
            return out, lse
        return close_rows(out, how.seeing), None if lse is None else close_lse(lse, how.seeing)

    return run


def _fusion_attention(
    call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, how: VendorMask, layout: str
) -> tuple[Tensor, Tensor | None]:
    out, greatest, total, *_ = torch.ops.npu.npu_fusion_attention(
        q,
        k,
        v,
        call.heads,
        layout,
        atten_mask=how.hidden,
        scale=call.scale,
        pre_tockens=how.before,
        next_tockens=how.after,
        sparse_mode=how.mode,
    )
    # Both statistics are [B, N, S, 8], one number eight times.
    return out, (greatest[..., 0] + total[..., 0].log()) if call.lse else None


def _prompt_flash_attention(
    call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, how: VendorMask, layout: str
) -> tuple[Tensor, None]:
    out = torch.ops.npu.npu_prompt_flash_attention(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        atten_mask=how.hidden,
        num_heads=call.heads,
        scale_value=call.scale,
        pre_tokens=how.before,
        next_tokens=how.after,
        input_layout=layout,
        num_key_value_heads=call.kv_heads,
        sparse_mode=how.mode,
    )
    return out, None


def _fused_infer_attention(
    call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, how: VendorMask, layout: str
) -> tuple[Tensor, Tensor | None]:
    out, lse = torch.ops.npu.npu_fused_infer_attention_score(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        atten_mask=how.hidden,
        num_heads=call.heads,
        scale=call.scale,
        pre_tokens=how.before,
        next_tokens=how.after,
        input_layout=layout,
        num_key_value_heads=call.kv_heads,
        sparse_mode=how.mode,
        softmax_lse_flag=call.lse,
    )
    return out, lse.squeeze(-1) if call.lse else None


@heads_first
def _laser(call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, mask: None, lengths: None) -> tuple[Tensor, None]:
    grow: Tensor | float = 1.0
    if call.dtype == torch.bfloat16:  # float16 has a smaller range: powers of two bring the numbers into it, unrounded
        q_size, k_size, v_size = (_power_of_two(each) for each in (q, k, v))
        balance = torch.exp2(torch.floor((torch.log2(q_size) - torch.log2(k_size)) / 2))
        q, k, v, grow = q / balance, k * balance, v / v_size, v_size
    padding = -call.keys % LASER_TOKENS
    _, out = torch.ops.mindiesd.la(
        *(_whole_tiles(each.half()) for each in (q, k, v)),
        None,
        None,
        None,
        call.scale,
        call.heads,
        "BNSD",
        1.0,
        padding or INT_MAX,  # by this name the kernel is told how many keys at the end are padding
        1,
        True,
    )
    out = out[:, :, : call.queries, : call.head_dim]
    return (out.float() * grow).to(call.dtype), None


def _power_of_two(x: Tensor) -> Tensor:
    """The power of two not under the largest number of x, which the device keeps to itself."""
    return torch.exp2(torch.ceil(torch.log2(x.abs().amax().float().clamp_min(2.0**-100))))


def _whole_tiles(x_BNSD: Tensor) -> Tensor:
    tokens, channels = x_BNSD.shape[2:]
    return F.pad(x_BNSD, (0, LASER_CHANNELS - channels, 0, -tokens % LASER_TOKENS))


def kernel_missing(namespace: str, name: str, absent: Collection[int]) -> Callable[[], str | None]:
    """Return a `missing` of a kernel that the makes of NPU in `absent` lack."""
    there = op_missing(namespace, name)

    def missing() -> str | None:
        return there() or (f"{name} is not made for this NPU" if soc_version() in absent else None)

    return missing


FEW_HEADS = Rule[AttentionCall](lambda call: call.heads <= 256, "at most 256 heads")
INFERENCE = (
    NOT_EMPTY,
    FEW_HEADS,
    Rule[AttentionCall](
        lambda call: call.head_dim <= 512 and call.head_dim % 8 == 0, "the head dim must be a multiple of 8, up to 512"
    ),
    Rule[AttentionCall](
        lambda call: call.mask_shape is None or call.mask_shape[1] == 1, "the mask must be the same for all heads"
    ),
)
IN_KERNELS = frozenset({"mask", "causal", "window", "key lengths", "gqa"})


def _in_layouts(
    name: str, kernel: Callable[..., tuple[Tensor, Tensor | None]], **conditions: Any
) -> list[Backend[AttentionCall]]:
    """One backend that takes the layout of the call, and one a layout that compete where the call has none."""
    rules = conditions.pop("rules")
    open_layout = Rule[AttentionCall](lambda call: call.kernel_layout is None, "another kernel layout was asked for")
    found = [Backend[AttentionCall](name=name, run=_kernel(kernel, None), devices=NPU, rules=rules, **conditions)]
    for layout in ("BSND", "BSH"):
        found.append(
            Backend[AttentionCall](
                name=f"{name}_{layout.lower()}",
                run=_kernel(kernel, layout),
                devices=NPU,
                rules=(*rules, open_layout),
                **conditions,
            )
        )
    return found


NPU_BACKENDS: tuple[Backend[AttentionCall], ...] = (
    *_in_layouts(
        "fused_attn_score",
        _fusion_attention,
        dtypes=HALVES | {torch.float32},
        honours=IN_KERNELS | {"lse"},
        rules=(
            SAME_BITS,
            NOT_EMPTY,
            FEW_HEADS,
            Rule[AttentionCall](lambda call: call.head_dim <= 768, "the head dim must be up to 768"),
            Rule[AttentionCall](lambda call: max(call.queries, call.keys) <= 1 << 20, "at most 1048576 tokens"),
        ),
        missing=kernel_missing("npu", "npu_fusion_attention", DUO),
    ),
    *_in_layouts(
        "prompt_flash_attn",
        _prompt_flash_attention,
        dtypes=HALVES,
        honours=IN_KERNELS,
        rules=(
            *INFERENCE,
            Rule[AttentionCall](
                lambda call: call.heads * call.head_dim < 65535,
                "the heads must have fewer than 65535 channels together",
            ),
        ),
        missing=kernel_missing("npu", "npu_prompt_flash_attention", A5),
        differentiable=False,
    ),
    Backend(
        name="fused_infer_attn",
        run=_kernel(_fused_infer_attention, None),
        devices=NPU,
        dtypes=HALVES,
        honours=IN_KERNELS | {"lse"},
        rules=INFERENCE,
        missing=op_missing("npu", "npu_fused_infer_attention_score"),
        differentiable=False,
    ),
    Backend(
        name="ascend_laser_attention",
        run=_laser,
        devices=NPU,
        dtypes=HALVES,
        rules=(
            Rule(lambda call: call.head_dim <= LASER_CHANNELS, f"the head dim must be up to {LASER_CHANNELS}"),
            Rule(
                lambda call: call.queries == call.keys >= LASER_SHORTEST,
                f"it is for self-attention of {LASER_SHORTEST} tokens and more",
            ),
            Rule(lambda call: call.kernel_layout in (None, "BNSD"), "its kernel layout is BNSD"),
        ),
        missing=kernel_missing("mindiesd", "la", (*DUO, *A5)),
        differentiable=False,
        note="computes in float16; bfloat16 is brought into its range",
    ),
)
