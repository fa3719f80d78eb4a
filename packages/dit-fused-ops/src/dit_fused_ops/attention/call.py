"""What a call of attention_forward is, and which calls are legal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_fused_ops.arguments import require_rank, require_same_device, require_tensor, require_type, wants_grad
from dit_fused_ops.attention.reference import UNBOUNDED, Window, causal_window
from dit_fused_ops.dispatch import Call, bucket
from dit_fused_ops.errors import ParametersInvalid

KERNEL_LAYOUTS = ("BNSD", "BSND", "BSH")


@dataclass(frozen=True, kw_only=True)
class AttentionCall(Call):
    """One attention.

    Attributes:
        layout: "BSND" or "BNSD", of the tensors.
        batch: batch entries.
        heads: of the queries.
        kv_heads: of keys and values.
        queries: tokens of the query.
        keys: tokens of the keys.
        head_dim: channels of a head of queries and keys.
        value_dim: channels of a head of the values.
        scale: of the scores.
        window: keys seen before and after a query's position, -1 for no bound; (-1, 0) is causal.
        mask_kind: "mask" (True or non-zero keeps), "bias" (added), or None.
        mask_shape: of the mask in four dimensions.
        mask_grad: whether a gradient of the bias may be asked for.
        has_lengths: whether only the first keys of each batch entry are seen.
        lse: whether the logarithm of the softmax's denominator is returned too.
        deterministic: whether two runs must give the same bits.
        named: whether the backend was asked for by name.
        kernel_layout: in which an NPU kernel is to be called; None leaves it open.
    """

    layout: str
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    value_dim: int
    scale: float
    window: Window
    mask_kind: str | None
    mask_shape: tuple[int, ...] | None
    mask_grad: bool
    has_lengths: bool
    lse: bool
    deterministic: bool
    named: bool
    kernel_layout: str | None

    @property
    def causal(self) -> bool:
        """Whether a query sees all keys up to its position, and none after it."""
        return self.window == (-1, 0)

    @property
    def groups(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.kv_heads

    @property
    def scores(self) -> int:
        """Numbers in the matrices of scores, which a fused kernel never holds."""
        return self.batch * self.heads * self.queries * self.keys

    @property
    def window_empties_rows(self) -> bool:
        """Whether the first queries stand so far before the first key that the window shows them none."""
        return self.window[1] >= 0 and self.queries > self.keys + self.window[1]

    @property
    def features(self) -> frozenset[str]:
        """The arguments out of the ordinary."""
        asked = {
            "mask": self.mask_kind == "mask",
            "bias": self.mask_kind == "bias",
            "gradient of the bias": self.mask_grad,
            "causal": self.causal,
            "window": self.window != UNBOUNDED and not self.causal,
            "key lengths": self.has_lengths,
            "lse": self.lse,
            "gradient of the lse": self.lse and self.needs_grad,
            "gqa": self.groups != 1,
            "value dim": self.value_dim != self.head_dim,
        }
        return frozenset(name for name, wanted in asked.items() if wanted)

    @property
    def shape_key(self) -> str:
        """Layout, sizes and the arguments out of the ordinary."""
        layout = self.layout if self.kernel_layout is None else f"{self.layout} as {self.kernel_layout}"
        heads = f"n{self.heads}" if self.groups == 1 else f"n{self.heads}/{self.kv_heads}"
        channels = f"d{self.head_dim}" if self.value_dim == self.head_dim else f"d{self.head_dim}/{self.value_dim}"
        sizes = f"b{bucket(self.batch)} q{bucket(self.queries)} k{bucket(self.keys)} {heads} {channels}"
        spread = ""
        if self.mask_shape is not None:
            spread = "".join(axis for axis, size in zip("BNST", self.mask_shape, strict=True) if size != 1)
        window = ",".join(str(bound if bound < 1 else bucket(bound)) for bound in self.window)
        parts = (layout, sizes, *sorted(self.features), spread, "" if self.window == UNBOUNDED else f"({window})")
        return " ".join(part for part in parts if part)


def describe(tensors: tuple[Tensor | None, ...], options: tuple[Any, ...]) -> AttentionCall:
    """Check the arguments of attention_forward and describe the call; raises `ParametersInvalid`."""
    names = ("query", "key", "value")
    query, key, value = (require_tensor(tensor, name) for tensor, name in zip(tensors[:3], names, strict=True))
    mask, lengths = tensors[3:]
    scale, fused, head_first, kernel_layout, is_causal, window, lse, deterministic, named = options
    for tensor, name in zip((query, key, value), names, strict=True):
        require_rank(tensor, name, 4)
    for flag, name in (
        (fused, "fused"),
        (head_first, "head_first"),
        (is_causal, "is_causal"),
        (lse, "return_lse"),
        (deterministic, "deterministic"),
    ):
        require_type(flag, name, bool)
    if kernel_layout is not None and kernel_layout not in KERNEL_LAYOUTS:
        raise ParametersInvalid(f"layout is {kernel_layout!r}, legal are {', '.join(KERNEL_LAYOUTS)}")
    batch, heads, queries, head_dim = _sizes(query, head_first)
    _, kv_heads, keys, _ = _sizes(key, head_first)
    _check_alike(query, key, value, head_first)
    require_same_device(query, "query", key=key, value=value)
    mask_kind, mask_shape = _mask(mask, query, (batch, heads, queries, keys))
    _check_lengths(lengths, query, batch)
    return AttentionCall(
        device=query.device,
        dtype=query.dtype,
        needs_grad=wants_grad(query, key, value, mask),
        layout="BNSD" if head_first else "BSND",
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        queries=queries,
        keys=keys,
        head_dim=head_dim,
        value_dim=value.shape[-1],
        scale=score_scale(scale, head_dim, "scale"),
        window=effective_window(window, is_causal, queries, keys, "window"),
        mask_kind=mask_kind,
        mask_shape=mask_shape,
        mask_grad=wants_grad(mask),
        has_lengths=lengths is not None,
        lse=lse,
        deterministic=deterministic,
        named=named,
        kernel_layout=kernel_layout,
    )


def score_scale(scale: Any, head_dim: int, name: str) -> float:
    """Return `scale` as a float; ``head_dim ** -0.5`` where it is None."""
    if scale is None:
        return float(head_dim**-0.5)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise ParametersInvalid(f"{name} must be a number or None, given {scale!r} of {type(scale).__name__}")
    return float(scale)


def effective_window(window: Any, is_causal: bool, queries: int, keys: int, name: str) -> Window:
    """Check a window, join it with causality, and open the bounds beyond which there is nothing."""
    if window is None:
        window = UNBOUNDED
    is_pair = isinstance(window, tuple) and len(window) == 2
    if not is_pair or any(isinstance(bound, bool) or not isinstance(bound, int) or bound < -1 for bound in window):
        raise ParametersInvalid(f"{name} must be a pair of whole numbers from -1 (no bound), given {window!r}")
    before, after = causal_window(window) if is_causal else window
    if before != -1 and before >= keys - 1:
        before = -1
    if after != -1 and after >= queries - 1:
        after = -1
    return (before, after)


def lengths_tensor(lengths: Tensor | Sequence[int] | None, query: Tensor, key: Tensor, head_first: bool) -> Any:
    """Return key lengths as a tensor beside the query; whole numbers are checked against the keys on the way."""
    if lengths is None or isinstance(lengths, Tensor):
        return lengths
    if not isinstance(lengths, (list, tuple)) or any(
        isinstance(length, bool) or not isinstance(length, int) for length in lengths
    ):
        raise ParametersInvalid(f"key_lengths must be a Tensor or a list of whole numbers, given {lengths!r}")
    if not isinstance(query, Tensor) or not isinstance(key, Tensor) or key.dim() != 4:
        return None  # what is wrong there is said by `describe`
    keys = key.shape[2 if head_first else 1]
    for length in lengths:
        if not 0 <= length <= keys:
            raise ParametersInvalid(f"key_lengths holds {length}, legal are 0 to the {keys} tokens of key")
    return torch.tensor(lengths, device=query.device)


def _sizes(x: Tensor, head_first: bool) -> tuple[int, int, int, int]:
    """Batch, heads, tokens, channels."""
    batch, first, second, channels = x.shape
    return (batch, first, second, channels) if head_first else (batch, second, first, channels)


def check_heads(heads: int, kv_heads: int, head_dim: int) -> None:
    """Raise unless the key heads divide the query heads and a head has channels."""
    if kv_heads == 0 or heads % kv_heads:
        raise ParametersInvalid(
            f"query has {heads} heads and key {kv_heads}; the heads of key must divide those of query"
        )
    if head_dim == 0:
        raise ParametersInvalid("a head of query has 0 channels, at least 1 is needed")


def check_dtypes(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise unless the three have one dtype."""
    if not query.dtype == key.dtype == value.dtype:
        raise ParametersInvalid(
            f"query is {query.dtype}, key {key.dtype} and value {value.dtype}; cast them to one dtype"
        )


def _check_alike(query: Tensor, key: Tensor, value: Tensor, head_first: bool) -> None:
    given = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
    layout = "[B, N, S, D]" if head_first else "[B, S, N, D]"
    if key.shape[:3] != value.shape[:3]:
        raise ParametersInvalid(f"key and value must be alike but for their channels ({layout}), given {given}")
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ParametersInvalid(f"query and key must have the same batch and head dim ({layout}), given {given}")
    check_heads(_sizes(query, head_first)[1], _sizes(key, head_first)[1], query.shape[3])
    check_dtypes(query, key, value)


def _mask(mask: Any, query: Tensor, sizes: tuple[int, int, int, int]) -> tuple[str | None, tuple[int, ...] | None]:
    """What kind of mask it is, and its four sizes."""
    if mask is None:
        return None, None
    if not isinstance(mask, Tensor) or mask.is_complex():
        given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ParametersInvalid(f"attn_mask must be a Tensor of truth values or numbers, or None, given {given}")
    require_same_device(query, "query", attn_mask=mask)
    shape = tuple(mask.shape)
    if len(shape) in (2, 3):
        shape = (shape[0] if len(shape) == 3 else 1, 1, *shape[-2:])
    fits = len(shape) == 4 and shape[3] == sizes[3]
    if not fits or any(size not in (1, wanted) for size, wanted in zip(shape[:3], sizes[:3], strict=True)):
        b, n, s, t = sizes
        raise ParametersInvalid(
            f"The attn_mask must be a 2D tensor [{s}, {t}] (queries, keys), a 3D tensor [{b}, {s}, {t}] or a 4D tensor "
            f"[{b}, {n}, {s}, {t}], where 1 may stand for all but the keys; given {list(mask.shape)}. To leave out the "
            f"padding of keys, pass key_lengths or a mask [{b}, 1, 1, {t}]"
        )
    return "bias" if mask.is_floating_point() else "mask", shape


def _check_lengths(lengths: Tensor | None, query: Tensor, batch: int) -> None:
    if lengths is None:
        return
    whole = not (lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool)
    if lengths.dim() != 1 or lengths.shape[0] != batch or not whole:
        raise ParametersInvalid(
            f"key_lengths must hold {batch} whole numbers, one a batch entry, given {lengths.dtype} "
            f"{list(lengths.shape)}"
        )
    require_same_device(query, "query", key_lengths=lengths)
