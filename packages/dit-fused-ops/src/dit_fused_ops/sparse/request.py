"""What sparse_attention is asked for, and which requests are legal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dit_fused_ops.arguments import require_rank, require_same_device, require_tensor
from dit_fused_ops.errors import ParametersInvalid
from dit_fused_ops.sparse.selection import Blocks, kept_count, least_density, video_blocks
from dit_fused_ops.sparse.tiles import Latent

LAYOUTS = ("BSND", "BNSD")
SPARSE_TYPES = ("rf_v2", "rf_v3")
KERNEL_BLOCK = 128  # tokens that the kernels handle at once: block sizes are multiples of it


@dataclass(frozen=True, kw_only=True)
class RainFusion:
    """One request of `rf_v2` or `rf_v3`.

    Attributes:
        txt_len: tokens of text, before the video in the sequence.
        latent_q: frames, height and width of the queries' video in tokens.
        latent_k: the same of the keys.
        q_blocks: the queries in tile order, cut into blocks.
        k_blocks: the keys in tile order, cut into blocks.
        kept: key blocks that a block of queries keeps by its scores.
        scale: of attention.
        legacy: whether MindIE SD's selection is wanted.
    """

    txt_len: int
    latent_q: Latent
    latent_k: Latent
    q_blocks: Blocks
    k_blocks: Blocks
    kept: int
    scale: float
    legacy: bool

    @property
    def least_density(self) -> float:
        """The share of pairs of blocks that is kept at least, whatever the numbers are."""
        return least_density(self.q_blocks, self.k_blocks, self.kept)


def require_qkv(q: Any, k: Any, v: Any, input_layout: Any, head_num: Any) -> None:
    """Raise unless the three tensors are those of one attention, `input_layout` is legal and `head_num` fits them."""
    if input_layout not in LAYOUTS:
        raise ParametersInvalid(f"The input_layout must in {list(LAYOUTS)}, but got {input_layout}.")
    for tensor, name in ((q, "q"), (k, "k"), (v, "v")):
        require_rank(require_tensor(tensor, name), name, 4)
    require_same_device(q, "q", k=k, v=v)
    heads, kv_heads = (x.shape[input_layout.index("N")] for x in (q, k))
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or not kv_heads or heads % kv_heads:
        raise ParametersInvalid(
            f"q, k and v do not fit each other, given {list(q.shape)}, {list(k.shape)} and {list(v.shape)} in "
            f"{input_layout}: k and v must be alike, B and D those of q, and the heads of q a multiple of theirs"
        )
    if head_num not in (1, heads):
        raise ParametersInvalid(f"head_num is {head_num!r}, and q has {heads} heads in {input_layout}; leave it out")


def refuse_what_is_missing(attn_mask: Tensor | None, is_causal: bool, video_spans: Any, precision: Any) -> None:
    """Raise when an argument is given that a sparse type cannot honour."""
    if attn_mask is not None or is_causal:
        given = "attn_mask" if attn_mask is not None else "is_causal"
        raise ParametersInvalid(f"{given} is given, and a sparse type takes none; pass it with sparse_type=None")
    if video_spans is not None:
        raise ParametersInvalid(
            f"video_spans is {video_spans!r}, and is not implemented; one text and one video are described by txt_len, "
            "latent_shape_q and latent_shape_k"
        )
    if precision != "bf16":
        raise ParametersInvalid(
            f"precision is {precision!r}, only 'bf16' (nothing is quantised) is implemented; leave it out"
        )


def require_sparse_type(sparse_type: Any, keep_sink: bool, keep_recent: bool, cdf_threshold: float) -> None:
    """Raise unless the sparse type is one of ours, and the arguments of another are left out."""
    if sparse_type == "ada_bsa":
        raise ParametersInvalid("sparse_type 'ada_bsa' is not implemented; legal are None, 'rf_v2' and 'rf_v3'")
    if sparse_type not in SPARSE_TYPES:
        raise ParametersInvalid(f"sparse_type must be None, 'rf_v2' or 'rf_v3', but got {sparse_type}")
    if (keep_sink, keep_recent, cdf_threshold) != (True, True, 1.0):
        raise ParametersInvalid(
            f"keep_sink={keep_sink}, keep_recent={keep_recent} and cdf_threshold={cdf_threshold} are given, and "
            f"{sparse_type} has no use for them; leave them out"
        )


def rain_fusion(
    *,
    q_tokens: int,
    k_tokens: int,
    head_dim: int,
    scale: Any,
    txt_len: Any,
    block_size: Any,
    latent_shape_q: Any,
    latent_shape_k: Any,
    sparsity: Any,
    legacy: bool,
) -> RainFusion:
    """Check the arguments of `rf_v2` and `rf_v3` against the lengths of the sequences.

    Raises:
        ParametersInvalid: one is wrong, or the shape of the video is missing or does not give the length.
    """
    if not _is_int(txt_len) or txt_len < 0:
        raise ParametersInvalid(f"txt_len is {txt_len!r}, legal is the number of text tokens, 0 or more")
    if not _is_int(block_size) or block_size <= 0 or block_size % KERNEL_BLOCK:
        raise ParametersInvalid(f"block_size is {block_size!r}, legal are multiples of {KERNEL_BLOCK}")
    if not _is_number(sparsity) or not 0 <= sparsity <= 1:
        raise ParametersInvalid(f"sparsity is {sparsity!r}, legal is the share of blocks to leave out, 0 to 1")
    if scale is not None and not (_is_number(scale) and math.isfinite(scale)):
        raise ParametersInvalid(f"scale is {scale!r}, legal are None and numbers")
    latent_q = _latent(latent_shape_q, "q", q_tokens, txt_len)
    latent_k = _latent(latent_shape_k, "k", k_tokens, txt_len)
    q_blocks = video_blocks(latent_q, txt_len, block_size, legacy=legacy)
    k_blocks = video_blocks(latent_k, txt_len, block_size, legacy=legacy)
    return RainFusion(
        txt_len=txt_len,
        latent_q=latent_q,
        latent_k=latent_k,
        q_blocks=q_blocks,
        k_blocks=k_blocks,
        kept=kept_count(k_blocks.count, sparsity, legacy=legacy),
        scale=head_dim**-0.5 if scale is None else float(scale),
        legacy=legacy,
    )


def _latent(given: Any, side: str, tokens: int, txt_len: int) -> Latent:
    name = f"latent_shape_{side}"
    if given is None:
        raise ParametersInvalid(
            f"{name} is None: rf_v2 and rf_v3 need the (frames, height, width) of the video in tokens, whose product "
            f"and txt_len={txt_len} are the {tokens} tokens of {side}"
        )
    if not isinstance(given, Sequence) or len(given) != 3 or not all(_is_int(size) and size > 0 for size in given):
        raise ParametersInvalid(f"{name} is {given!r}, legal are three positive integers (frames, height, width)")
    frames, height, width = given
    if txt_len + frames * height * width != tokens:
        raise ParametersInvalid(
            f"{name} {tuple(given)} and txt_len={txt_len} are {txt_len} + {frames * height * width} tokens, {side} has "
            f"{tokens}; pass the shape of the video in tokens, after patching"
        )
    return frames, height, width


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
