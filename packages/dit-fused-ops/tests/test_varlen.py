"""attention_forward_varlen: each sequence is a call of its own, whatever computes them together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import ERROR, close, expected_sequences, make_sequences, refusal
from attention_cases import K_BOUNDS as K
from attention_cases import Q_BOUNDS as Q
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dit_fused_ops.attention import ATTENTION_VARLEN, attention_forward_varlen
from dit_fused_ops.attention.torch_backends import HELD_SCORES
from dit_fused_ops.dispatch import dispatcher
from dit_fused_ops.dispatch.store import read_decisions
from dit_fused_ops.errors import BackendRefused, ParametersInvalid

# Untyped: an argument decides what it returns, and some tests give it what its types forbid.
varlen: Any = attention_forward_varlen


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, lambda x: torch.tensor(x, dtype=torch.int32)])
@pytest.mark.parametrize("causal", [False, True])
def test_strict_call(kind: Callable[[list[int]], Any], causal: bool) -> None:
    q, k, v = make_sequences(9, 9)
    got = varlen(q, k, v, kind(Q), kind(K), causal=causal)
    close(got, expected_sequences(q, k, v, Q, K, causal=causal)[0])


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("backend", ["sdpa", "eager", "naive"])
@pytest.mark.parametrize("causal", [False, True])
def test_every_backend_in_every_dtype(backend: str, dtype: torch.dtype, causal: bool) -> None:
    q, k, v = make_sequences(9, 9, dtype=dtype, E=5)
    got = varlen(q, k, v, Q, K, softmax_scale=1, causal=causal, backend=backend)
    assert got.dtype == dtype
    close(got, expected_sequences(q, k, v, Q, K, causal=causal, scale=1.0)[0], dtype)


@pytest.mark.parametrize("backend", ["eager", "naive", None])
def test_arguments_of_flash_attn(backend: str | None) -> None:
    q, k, v = make_sequences(9, 9)
    out, lse, nothing = varlen(
        q, k, v, Q, K, 4, 5, 0.0, 0.5, True, (1, 3), 1.5, None, True, True, None, strict=False, backend=backend
    )
    wanted, wanted_lse = expected_sequences(q, k, v, Q, K, causal=True, window=(1, 3), softcap=1.5, scale=0.5)
    close(out, wanted)
    close(lse, wanted_lse)
    assert nothing is None
    assert lse.dtype == torch.float32


def test_hints_change_nothing() -> None:
    q, k, v = make_sequences(9, 9)
    plain = varlen(q, k, v, Q, K)
    hinted = varlen(
        q,
        k,
        v,
        Q,
        K,
        100,
        5,
        window_size=(-1, -1),
        softcap=0.0,
        deterministic=False,
        return_attn_probs=False,
        strict=False,
    )
    assert torch.equal(plain, hinted)


@pytest.mark.parametrize(
    ("q_bounds", "k_bounds"), [([0], [0]), ([0, 0], [0, 0]), ([0, 0, 0], [0, 2, 5]), ([0, 1, 4], [0, 0, 0])]
)
def test_nothing_but_empty_sequences(q_bounds: list[int], k_bounds: list[int]) -> None:
    q, k, v = (x.requires_grad_() for x in make_sequences(q_bounds[-1], k_bounds[-1]))
    out, lse, _ = varlen(q, k, v, q_bounds, k_bounds, strict=False, return_attn_probs=True)
    assert out.shape == (q_bounds[-1], 4, 8)
    assert lse.shape == (4, q_bounds[-1])
    assert not out.any()
    assert (lse == -torch.inf).all()
    out = varlen(q, k, v, q_bounds, k_bounds)
    assert not out.any()


def test_equal_lengths_are_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = torch.nn.functional.scaled_dot_product_attention

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[0].shape)
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    q, k, v = make_sequences(11, 8)
    got = varlen(q, k, v, [0, 3, 6, 9, 11], [0, 2, 4, 6, 8])
    assert calls == [(3, 4, 3, 8), (1, 4, 2, 8)]
    close(got, expected_sequences(q, k, v, [0, 3, 6, 9, 11], [0, 2, 4, 6, 8])[0])


@pytest.mark.parametrize("backend", ["sdpa", "eager", "naive"])
def test_gradients(backend: str) -> None:
    inputs = make_sequences(5, 5, N=2, K=1, D=2, E=2, dtype=torch.float64)
    for x in inputs:
        x.requires_grad_()

    def function(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return varlen(q, k, v, [0, 3, 4, 5], [0, 2, 2, 5], causal=True, backend=backend)

    assert torch.autograd.gradcheck(function, inputs)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(function(*inputs).sum(), inputs))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(data=st.data(), causal=st.booleans(), seed=st.integers(0, 99), lse=st.booleans())
def test_any_call_is_the_formula(data: st.DataObject, causal: bool, seed: int, lse: bool) -> None:
    lengths = data.draw(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=5))
    bounds = [[sum(pair[side] for pair in lengths[:n]) for n in range(len(lengths) + 1)] for side in (0, 1)]
    window = data.draw(st.none() | st.tuples(st.integers(-1, 3), st.integers(-1, 3)))
    softcap = data.draw(st.sampled_from([None, 0.0, 2.0]))
    q, k, v = make_sequences(
        bounds[0][-1], bounds[1][-1], N=2, K=data.draw(st.sampled_from([1, 2])), D=3, E=2, seed=seed
    )
    got = varlen(
        q, k, v, *bounds, causal=causal, window_size=window, softcap=softcap, return_attn_probs=lse, strict=False
    )
    wanted, wanted_lse = expected_sequences(
        q, k, v, *bounds, causal=causal, window=window or (-1, -1), softcap=softcap or 0.0
    )
    close(got[0] if lse else got, wanted)
    if lse:
        close(got[1], wanted_lse)


x = torch.randn
STRICT: dict[str, Any] = {
    "max_seqlen_q": 4,
    "max_seqlen_k": 4,
    "window_size": (1, 1),
    "softcap": 0.0,
    "alibi_slopes": torch.ones(4),
    "deterministic": False,
    "return_attn_probs": False,
    "block_table": torch.ones(1, 1),
}


@pytest.mark.parametrize("name", STRICT)
def test_strict_refuses_what_mindie_sd_refuses(name: str) -> None:
    q, k, v = make_sequences(9, 9)
    with pytest.raises(ParametersInvalid, match=f"Unsupported parameters in varlen attention: {name}=.*strict=False"):
        varlen(q, k, v, Q, K, **{name: STRICT[name]})


@pytest.mark.parametrize("name", ["alibi_slopes", "block_table"])
def test_refused_also_when_not_strict(name: str) -> None:
    q, k, v = make_sequences(9, 9)
    words = f"Unsupported parameters in varlen attention: {name}=a Tensor .*attention_forward"
    with pytest.raises(ParametersInvalid, match=words):
        varlen(q, k, v, Q, K, strict=False, **{name: STRICT[name]})


def test_refused_arguments_are_all_named() -> None:
    q, k, v = make_sequences(9, 9)
    with pytest.raises(ParametersInvalid, match=r"varlen attention: max_seqlen_q=4, window_size=\(1, 1\);"):
        varlen(q, k, v, Q, K, max_seqlen_q=4, window_size=(1, 1))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "dropout": ({"dropout_p": 0.1}, "dropout_p should be set to 0.0 during evaluation, but got 0.1"),
    "no tensor": ({"q": 1}, "q must be a Tensor, given int"),
    "rank": ({"q": x(1, 9, 4, 8)}, r"Expected q to be 3D \(T, N, D\), but got 4D tensor"),
    "rank of v": ({"v": x(9, 8)}, r"Expected v to be 3D \(T, N, D\), but got 2D tensor"),
    "head dim": ({"q": x(9, 4, 6)}, r"q and k the same head dim .*given q \[9, 4, 6\], k \[9, 2, 8\]"),
    "tokens of v": ({"v": x(8, 2, 8)}, r"k and v must have the same tokens and heads.*v \[8, 2, 8\]"),
    "heads": ({"q": x(9, 3, 8)}, "query has 3 heads and key 2; the heads of key must divide"),
    "dtype": ({"k": x(9, 2, 8).half()}, "cast them to one dtype"),
    "causal": ({"causal": 1}, "causal must be a bool, given 1 of int"),
    "scale": ({"softmax_scale": "1"}, "softmax_scale must be a number or None, given '1'"),
    "bounds begin": (
        {"cu_seqlens_q": [1, 9]},
        r"cu_seqlens_q must begin with 0, never fall, and end with the 9 tokens of q; given \[1, 9\]",
    ),
    "bounds fall": ({"cu_seqlens_k": [0, 5, 3, 9]}, r"cu_seqlens_k must .* tokens of k; given \[0, 5, 3, 9\]"),
    "bounds end": ({"cu_seqlens_q": torch.tensor([0, 8])}, r"given \[0, 8\]"),
    "no bounds": ({"cu_seqlens_q": []}, r"given \[\]"),
    "many bounds": ({"cu_seqlens_q": [0] * 9}, r"given \[0, 0, 0, 0, ..., 0\]"),
    "numbers of sequences": ({"cu_seqlens_q": [0, 9]}, "cu_seqlens_q is of 1 sequences, cu_seqlens_k of 5"),
    "bounds of floats": ({"cu_seqlens_q": [0.0, 9]}, r"cu_seqlens_q must hold whole numbers, given \[0.0, 9\]"),
    "float tensor": (
        {"cu_seqlens_k": torch.tensor([0.0, 9])},
        r"1-D Tensor of int32 or int64, given torch.float32 \[2\]",
    ),
    "matrix": ({"cu_seqlens_k": torch.zeros(1, 2).int()}, r"given torch.int32 \[1, 2\]"),
    "bounds a number": (
        {"cu_seqlens_k": 9},
        "cu_seqlens_k must be a list or a 1-D Tensor of int32 or int64, given int",
    ),
}
LOOSE: dict[str, tuple[dict[str, Any], str]] = {
    "hint too small": (
        {"max_seqlen_q": 3},
        "max_seqlen_q is 3, and the longest sequence has 4 tokens; say at least that",
    ),
    "hint a float": ({"max_seqlen_k": 9.0}, "max_seqlen_k must be a whole number, given 9.0"),
    "window": (
        {"window_size": (1,)},
        r"window_size must be a pair of whole numbers from -1 \(no bound\), given \(1,\)",
    ),
    "softcap": ({"softcap": -1.0}, r"softcap must be a number from 0 \(none\), given -1.0"),
    "softcap in a list": ({"softcap": [1.0]}, r"softcap must be a number from 0 \(none\), given \[1.0\]"),
    "deterministic": ({"deterministic": "yes"}, "deterministic must be a bool, given 'yes'"),
    "probabilities": ({"return_attn_probs": 1}, "return_attn_probs must be a bool, given 1"),
}


@pytest.mark.parametrize(("name", "strict"), [*((name, True) for name in WRONG), *((name, False) for name in LOOSE)])
def test_wrong_arguments(name: str, strict: bool) -> None:
    changes, words = (WRONG if strict else LOOSE)[name]
    arguments = dict(zip("qkv", make_sequences(9, 9), strict=True)) | {"cu_seqlens_q": Q, "cu_seqlens_k": K} | changes
    with pytest.raises(ParametersInvalid, match=rf"^\[MIE06E000001\] Parameters invalid\. .*{words}"):
        varlen(**arguments, strict=strict)


def test_named_backend_never_gives_way() -> None:
    q, k, v = make_sequences(9, 9)
    with pytest.raises(
        BackendRefused, match=r"flash_attn cannot carry out this call: it runs on cuda.*These can: sdpa"
    ):
        varlen(q, k, v, Q, K, backend="flash_attn")
    with pytest.raises(BackendRefused, match=r"sdpa cannot .*does not honour: lse, softcap. These can: eager, naive"):
        varlen(q, k, v, Q, K, softcap=1.0, return_attn_probs=True, strict=False, backend="sdpa")


def test_tensors_of_bounds_do_not_compile() -> None:
    q, k, v = make_sequences(9, 9)
    compiled = torch.compile(attention_forward_varlen, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"under torch\.compile and torch.export give a list"):
        compiled(q, k, v, torch.tensor(Q), torch.tensor(K))


def test_runtime_mode_measures_right_candidates(own_decisions: Path) -> None:
    q, k, v = make_sequences(90, 80)
    bounds = ([0, 40, 90], [0, 50, 80])
    with dispatcher.configured(mode="runtime"):
        for causal in (False, True):
            close(varlen(q, k, v, *bounds, causal=causal), expected_sequences(q, k, v, *bounds, causal=causal)[0])
    decisions = read_decisions(own_decisions).values()
    assert len(decisions) == 2
    assert all({name for name, _ in decision.ranking} == {"sdpa", "eager"} for decision in decisions)
    assert not any(decision.rejected for decision in decisions)


def test_scores_are_held_only_when_asked_for() -> None:
    big = torch.empty(HELD_SCORES // 2048, 2, 8, device="meta")
    bounds = (0, big.shape[0])

    def refused(name: str, *, lse: bool = False, named: bool = False) -> str | None:
        options = (bounds, bounds, None, None, None, False, None, 0.0, False, lse, named)
        call = ATTENTION_VARLEN.describe((big, big, big, None, None), options)
        return refusal(ATTENTION_VARLEN, name, call)

    assert "would hold the scores" in (refused("eager") or "")
    assert refused("eager", named=True) is None
    assert refused("eager", lse=True) is None
    assert refused("naive") is None
