"""attention_forward computes what the formula says, in every backend that takes the call, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_cases import CASES, ERROR, Case, backend_of, close, heads_first
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dit_fused_ops.attention import ATTENTION, attention_forward, attention_naive
from dit_fused_ops.attention.torch_backends import HELD_SCORES, math_in_blocks
from dit_fused_ops.dispatch import dispatcher
from dit_fused_ops.dispatch.store import read_decisions

PLAIN_BACKENDS = ("sdpa", "sdpa_lse", "eager", "naive")


def in_layout(x: Tensor, head_first: bool) -> Tensor:
    return x if head_first else x.transpose(1, 2).contiguous()


@pytest.mark.parametrize("head_first", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_default_is_the_formula(name: str, head_first: bool) -> None:
    case = CASES[name]
    q, k, v, mask = case.make()
    wanted, wanted_lse = case.expected(q, k, v, mask)
    q, k, v = (in_layout(x, head_first) for x in (q, k, v))
    out = attention_forward(q, k, v, mask, head_first=head_first, **case.arguments)
    assert out.dtype == q.dtype
    close(out if head_first else out.transpose(1, 2), wanted, q.dtype)
    out, lse = attention_forward(q, k, v, mask, head_first=head_first, return_lse=True, **case.arguments)
    close(out if head_first else out.transpose(1, 2), wanted, q.dtype)
    assert lse.dtype == torch.float32
    close(lse, wanted_lse, q.dtype)


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("backend", PLAIN_BACKENDS)
@pytest.mark.parametrize("lse", [False, True])
def test_every_backend_in_every_dtype(backend: str, dtype: torch.dtype, lse: bool) -> None:
    taken = 0
    for case in CASES.values():
        q, k, v, mask = case.make(dtype)
        mask = mask.to(dtype) if mask is not None and mask.is_floating_point() else mask
        options = (case.scale, True, True, None, case.causal, case.window, lse, False, True)
        lengths = None if case.lengths is None else torch.tensor(case.lengths)
        call = ATTENTION.describe((q, k, v, mask, lengths), options)
        chosen = backend_of(ATTENTION, backend)
        if chosen.refuses(call) is not None:
            continue
        taken += 1
        wanted, wanted_lse = case.expected(q, k, v, mask)
        returned = chosen.run(call, q, k, v, mask, lengths)
        out = returned[0] if lse else returned
        assert out.dtype == dtype
        close(out, wanted, dtype)
        if lse:
            close(returned[1], wanted_lse, torch.float32 if dtype == torch.float64 else dtype)
    assert (taken == 0) == ((backend == "sdpa" and lse) or (backend == "sdpa_lse" and not lse))


def test_naive_is_the_formula_and_keeps_float64() -> None:
    case = CASES["bias, causal, lengths"]
    q, k, v, mask = case.make(torch.float64)
    out, lse = attention_naive(q, k, v, mask, is_causal=True, key_lengths=torch.tensor(case.lengths))
    assert out.dtype == lse.dtype == torch.float64
    wanted, wanted_lse = case.expected(q, k, v, mask)
    close(out, wanted, torch.float64)
    close(lse, wanted_lse, torch.float64)
    assert attention_naive(q.bfloat16(), k.bfloat16(), v.bfloat16())[0].dtype == torch.float32


def test_naive_computes_chosen_queries() -> None:
    case = Case(S=6, T=9, causal=True)
    q, k, v, _ = case.make()
    rows = torch.tensor([5, 0, 3])
    part, _ = attention_naive(q[:, :, rows], k, v, is_causal=True, positions=rows + 3)
    whole, _ = attention_naive(q, k, v, is_causal=True)
    torch.testing.assert_close(part, whole[:, :, rows])


def test_equals_torch_where_torch_says_the_same() -> None:
    q, k, v, _ = Case(S=6, T=6).make()
    ours = attention_forward(q, k, v, is_causal=True, head_first=True)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v, is_causal=True))
    bias = torch.randn(1, 1, 1, 6)
    ours = attention_forward(q, k, v, bias, scale=0.3, head_first=True)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=0.3))


def test_unmasked_call_is_torchs_own_on_views() -> None:
    q, k, v, _ = Case(S=6, T=9).make()
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    ours = attention_forward(q, k, v)
    theirs = F.scaled_dot_product_attention(*heads_first(q, k, v)).transpose(1, 2)
    assert torch.equal(ours, theirs)
    assert ours.is_contiguous()


def test_a_mask_spread_over_queries_is_not_written_out() -> None:
    q, k, v, _ = Case(N=1, K=1, S=64, T=7).make()
    bias = torch.randn(7).expand(1, 1, 64, 7)

    class Sizes(TorchDispatchMode):  # type: ignore[no-untyped-call]
        largest = 0

        def __torch_dispatch__(
            self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            for each in tree_leaves(out):
                if isinstance(each, torch.Tensor) and each.shape[-2:] == (64, 7):
                    Sizes.largest = max(Sizes.largest, each.untyped_storage().nbytes())
            return out

    with Sizes(), torch.no_grad():  # type: ignore[no-untyped-call]
        attention_forward(q, k, v, bias, head_first=True)
    assert Sizes.largest <= 7 * 4


SMALL = Case(B=1, N=2, K=2, S=3, T=4, D=2, E=2)
GRADIENT_CASES = {
    "causal, more queries": replace(SMALL, S=4, T=3, causal=True),
    "window, more queries": replace(SMALL, S=5, T=2, window=(1, 1)),
    "lengths": replace(SMALL, B=2, lengths=(0, 3)),
    "mask a batch entry": replace(SMALL, mask=(1, 3, 4)),
    "bias with -inf": replace(SMALL, mask=(1, 1, 3, 4), kind="bias with -inf"),
    "one key head": replace(SMALL, K=1, mask=(1, 1, 3, 4), causal=True),
    "narrow values, masked": replace(SMALL, E=1, mask=(3, 4)),
    "no key": replace(SMALL, T=0),
}


@pytest.mark.parametrize("backend", ["sdpa", "eager", "naive"])
@pytest.mark.parametrize("name", GRADIENT_CASES)
def test_gradients(name: str, backend: str) -> None:
    case = GRADIENT_CASES[name]
    q, k, v, mask = case.make(torch.float64)
    inputs = (q.requires_grad_(), k.requires_grad_(), v.requires_grad_())

    def function(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return attention_forward(q, k, v, mask, head_first=True, op_type=backend, **case.arguments)

    assert torch.autograd.gradcheck(function, inputs)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(function(*inputs).sum(), inputs))


@pytest.mark.parametrize("backend", ["eager", "naive"])
def test_gradient_of_the_logarithm(backend: str) -> None:
    q, k, v, _ = replace(SMALL, S=4, T=3, causal=True).make(torch.float64)
    exact = (q.requires_grad_(), k.requires_grad_(), v.requires_grad_())
    # The first query sees nothing: its logarithm is -inf, and is no part of a sum.
    assert torch.autograd.gradcheck(lambda *given: attention_naive(*given, is_causal=True)[1][:, :, 1:], exact)
    q, k, v = single = [x.detach().float().requires_grad_() for x in exact]
    out, lse = attention_forward(q, k, v, head_first=True, is_causal=True, return_lse=True, op_type=backend)
    got = torch.autograd.grad(lse[:, :, 1:].sum() + out.sum(), single)
    out, lse = attention_naive(*exact, is_causal=True)
    for narrow, wide in zip(got, torch.autograd.grad(lse[:, :, 1:].sum() + out.sum(), exact), strict=True):
        close(narrow, wide)


@pytest.mark.parametrize("backend", ["sdpa", "eager", "naive"])
def test_gradient_of_the_bias(backend: str) -> None:
    q, k, v, bias = GRADIENT_CASES["bias with -inf"].make(torch.float64)
    assert bias is not None
    finite = bias.isfinite()
    weight = bias.double().masked_fill(~finite, 0).requires_grad_()

    def function(weight: Tensor) -> Tensor:
        return attention_forward(q, k, v, weight.masked_fill(~finite, -torch.inf), head_first=True, op_type=backend)

    assert torch.autograd.gradcheck(function, (weight,))


@pytest.mark.parametrize("backend", ["sdpa", "eager", "naive"])
def test_gradients_in_half_precision(backend: str) -> None:
    case = CASES["mask a batch entry"]
    q, k, v, mask = case.make(torch.bfloat16)
    assert mask is not None
    halves = [x.requires_grad_() for x in (q, k, v)]
    out = attention_forward(q, k, v, mask, head_first=True, op_type=backend)
    got = torch.autograd.grad(out.sum(), halves)
    q, k, v = exact = [x.detach().double().requires_grad_() for x in halves]
    wanted = torch.autograd.grad(attention_naive(q, k, v, mask[:, None])[0].sum(), exact)
    for half, wide in zip(got, wanted, strict=True):
        assert ((half.double() - wide).abs().max() / wide.abs().max()) < ERROR[torch.bfloat16]


@st.composite
def calls(draw: st.DrawFn) -> Case:
    B, K, D = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 4))
    N, S, T = K * draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(1, 6))
    kind = draw(st.sampled_from(["bool", "int", "bias", "bias with -inf"]))
    shape = (draw(st.sampled_from([1, B])), draw(st.sampled_from([1, N])), draw(st.sampled_from([1, S])), T)
    bound = st.integers(-1, 4)
    return Case(
        B=B,
        N=N,
        K=K,
        S=S,
        T=T,
        D=D,
        E=draw(st.integers(1, 4)),
        mask=draw(st.sampled_from([None, shape, shape[2:]])),
        kind=kind,
        causal=draw(st.booleans()),
        window=draw(st.none() | st.tuples(bound, bound)),
        lengths=draw(st.none() | st.lists(st.integers(0, T), min_size=B, max_size=B).map(tuple)),
        scale=draw(st.none() | st.floats(0.1, 2)),
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=calls(), seed=st.integers(0, 100), head_first=st.booleans(), lse=st.booleans())
def test_any_call_is_the_formula(case: Case, seed: int, head_first: bool, lse: bool) -> None:
    q, k, v, mask = case.make(seed=seed)
    wanted, wanted_lse = case.expected(q, k, v, mask)
    q, k, v = (in_layout(x, head_first) for x in (q, k, v))
    arguments = {**case.arguments, "return_lse": lse}
    got = attention_forward(q, k, v, mask, head_first=head_first, **arguments)
    out = got[0] if lse else got
    close(out if head_first else out.transpose(1, 2), wanted)
    if lse:
        close(got[1], wanted_lse)


def test_blocks_of_queries_are_the_whole() -> None:
    q, k, v, mask = Case(B=1, N=1, K=1, S=4100, T=4097, D=2, E=2, mask=(1, 1, 4100, 4097), kind="bias").make()
    assert mask is not None
    assert q.shape[2] * k.shape[2] > HELD_SCORES
    arguments: dict[str, Any] = {"scale": 0.5, "window": (3000, 20), "key_lengths": torch.tensor([4000])}
    out, lse = math_in_blocks(q, k, v, mask, **arguments)
    rows = torch.tensor([0, 4094, 4095, 4099])
    wanted, wanted_lse = attention_naive(q[:, :, rows], k, v, mask[:, :, rows], positions=rows - 3, **arguments)
    close(out[:, :, rows], wanted.double())
    close(lse[:, :, rows], wanted_lse.double())


def test_runtime_mode_measures_right_candidates_and_remembers(own_decisions: Path) -> None:
    case = CASES["mask, window, lengths"]
    q, k, v, mask = case.make()
    with dispatcher.configured(mode="runtime"):
        for lse in (False, True):
            arguments = {**case.arguments, "return_lse": lse}
            got = attention_forward(q, k, v, mask, head_first=True, **arguments)
            close(got[0] if lse else got, case.expected(q, k, v, mask)[0])
        q, k, v, _ = Case(S=70, T=70).make()
        for causal in (False, True):
            attention_forward(q, k, v, head_first=True, is_causal=causal)
            attention_forward(q, k, v, head_first=True, is_causal=causal, return_lse=True)
    decisions = read_decisions(own_decisions).values()
    assert len(decisions) >= 5
    assert not any(decision.rejected for decision in decisions), decisions
