"""What a call of attention_forward_varlen is, and which calls are legal."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dit_fused_ops.arguments import require_same_device, require_tensor, require_type, wants_grad
from dit_fused_ops.attention.call import check_dtypes, check_heads, effective_window, score_scale
from dit_fused_ops.attention.reference import UNBOUNDED, Window
from dit_fused_ops.dispatch import Call, bucket, readable
from dit_fused_ops.errors import ParametersInvalid

Bounds = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class VarlenCall(Call):
    """One attention of sequences one after the other.

    Attributes:
        sequences: how many.
        heads: of the queries.
        kv_heads: of keys and values.
        queries: tokens of the query, of all sequences.
        keys: tokens of the keys, of all sequences.
        head_dim: channels of a head of queries and keys.
        value_dim: channels of a head of the values.
        scale: of the scores.
        window: as in `AttentionCall`.
        softcap: of the scores; 0 is none.
        q_bounds: where the sequences of the query begin and end; None where only the device knows.
        k_bounds: the same of the keys.
        longest_q: a bound for the tokens of a sequence; None where only the device knows.
        longest_k: the same of the keys.
        lse: whether the logarithm of the softmax's denominator is returned too.
        deterministic: whether two runs must give the same bits.
        named: whether the backend was asked for by name.
    """

    sequences: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    value_dim: int
    scale: float
    window: Window
    softcap: float
    q_bounds: Bounds | None
    k_bounds: Bounds | None
    longest_q: int | None
    longest_k: int | None
    lse: bool
    deterministic: bool
    named: bool

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
        """At least the numbers in the matrices of scores, which a fused kernel never holds."""
        return self.heads * self.queries * (self.keys if self.longest_k is None else self.longest_k)

    @property
    def features(self) -> frozenset[str]:
        """The arguments out of the ordinary."""
        asked = {
            "causal": self.causal,
            "window": self.window != UNBOUNDED and not self.causal,
            "softcap": self.softcap > 0,
            "lse": self.lse,
            "gradient of the lse": self.lse and self.needs_grad,
            "gqa": self.heads != self.kv_heads,
            "value dim": self.head_dim != self.value_dim,
        }
        return frozenset(name for name, wanted in asked.items() if wanted)

    @property
    def shape_key(self) -> str:
        """Sizes and the arguments out of the ordinary."""
        longest = "" if self.longest_q is None else f"up to {bucket(self.longest_q)}"
        heads = f"n{self.heads}/{self.kv_heads} d{self.head_dim}/{self.value_dim}"
        sizes = f"{bucket(self.sequences)} of q{bucket(self.queries)} k{bucket(self.keys)} {longest} {heads}"
        window = "" if self.window == UNBOUNDED else str(self.window)
        return " ".join(part for part in ("TND", sizes, *sorted(self.features), window) if part)


def describe_varlen(tensors: tuple[Tensor | None, ...], options: tuple[Any, ...]) -> VarlenCall:
    """Check the arguments of attention_forward_varlen and describe the call; raises `ParametersInvalid`."""
    q, k, v = (require_tensor(tensor, name) for tensor, name in zip(tensors[:3], "qkv", strict=True))
    q_bounds, k_bounds, longest_q, longest_k, scale, causal, window, softcap, deterministic, lse, named = options
    for tensor, name in ((q, "q"), (k, "k"), (v, "v")):
        if tensor.dim() != 3:
            raise ParametersInvalid(f"Expected {name} to be 3D (T, N, D), but got {tensor.dim()}D tensor.")
    for flag, name in ((causal, "causal"), (deterministic, "deterministic"), (lse, "return_attn_probs")):
        require_type(flag, name, bool)
    if isinstance(softcap, bool) or not isinstance(softcap, (int, float)) or not softcap >= 0:
        raise ParametersInvalid(f"softcap must be a number from 0 (none), given {softcap!r}")
    if k.shape[:2] != v.shape[:2] or q.shape[2] != k.shape[2]:
        raise ParametersInvalid(
            "k and v must have the same tokens and heads, q and k the same head dim (T, N, D), given "
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        )
    check_heads(q.shape[1], k.shape[1], q.shape[2])
    check_dtypes(q, k, v)
    require_same_device(q, "q", k=k, v=v)
    q_count = _sequences(q_bounds, tensors[3], q, "cu_seqlens_q")
    k_count = _sequences(k_bounds, tensors[4], k, "cu_seqlens_k")
    if q_count != k_count:
        raise ParametersInvalid(
            f"cu_seqlens_q is of {q_count} sequences, cu_seqlens_k of {k_count}; give both of the same sequences"
        )
    longest_q = _longest(longest_q, q_bounds, "max_seqlen_q")
    longest_k = _longest(longest_k, k_bounds, "max_seqlen_k")
    return VarlenCall(
        device=q.device,
        dtype=q.dtype,
        needs_grad=wants_grad(q, k, v),
        sequences=q_count,
        heads=q.shape[1],
        kv_heads=k.shape[1],
        queries=q.shape[0],
        keys=k.shape[0],
        head_dim=q.shape[2],
        value_dim=v.shape[2],
        scale=score_scale(scale, q.shape[2], "softmax_scale"),
        window=effective_window(window, causal, q.shape[0] + k.shape[0], q.shape[0] + k.shape[0], "window_size"),
        softcap=float(softcap),
        q_bounds=q_bounds,
        k_bounds=k_bounds,
        longest_q=longest_q,
        longest_k=longest_k,
        lse=lse,
        deterministic=deterministic,
        named=named,
    )


def _sequences(bounds: Bounds | None, on_device: Tensor | None, x: Tensor, name: str) -> int:
    """How many sequences there are; on a device the bounds are checked at the first call of a kind only."""
    if on_device is None:
        assert bounds is not None, "bounds are on the host or on the device"
        _check_bounds(bounds, x.shape[0], name)
        return len(bounds) - 1
    if readable(x, on_device):
        _check_bounds(on_device.tolist(), x.shape[0], name)
    return on_device.shape[0] - 1


def _check_bounds(bounds: Sequence[int], tokens: int, name: str) -> None:
    """Raise unless the bounds go from 0 to the number of tokens and never back."""
    rises = all(first <= second for first, second in itertools.pairwise(bounds))
    if len(bounds) < 1 or bounds[0] != 0 or bounds[-1] != tokens or not rises:
        given = list(bounds) if len(bounds) <= 8 else f"[{', '.join(map(str, bounds[:4]))}, ..., {bounds[-1]}]"
        raise ParametersInvalid(
            f"{name} must begin with 0, never fall, and end with the {tokens} tokens of {name[-1]}; given {given}"
        )


def _longest(hint: Any, bounds: Bounds | None, name: str) -> int | None:
    """The hint, checked where the lengths are known; the longest length where there is no hint."""
    if hint is not None and (isinstance(hint, bool) or not isinstance(hint, int)):
        raise ParametersInvalid(f"{name} must be a whole number, given {hint!r}")
    if bounds is None:
        return None if hint is None else int(hint)
    longest = max([0, *(stop - start for start, stop in itertools.pairwise(bounds))])
    if hint is not None and hint < longest:
        raise ParametersInvalid(f"{name} is {hint}, and the longest sequence has {longest} tokens; say at least that")
    return longest
