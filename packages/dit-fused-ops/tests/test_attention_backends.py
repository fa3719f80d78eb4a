"""What kernels of other devices are given, run on CPU where they can be; and that a wrong kernel cannot win."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attention_cases import (
    CASES,
    K_BOUNDS,
    Q_BOUNDS,
    Case,
    backend_of,
    close,
    expected_sequences,
    heads_first,
    loops,
    make_sequences,
    refusal,
)
from torch import Tensor

from dit_fused_ops.attention import ATTENTION, ATTENTION_VARLEN
from dit_fused_ops.attention.call import AttentionCall
from dit_fused_ops.attention.cuda_backends import flex_arguments
from dit_fused_ops.attention.npu_backends import vendor_mask
from dit_fused_ops.attention.varlen_backends import equal_runs
from dit_fused_ops.dispatch import dispatcher
from dit_fused_ops.dispatch.search import ERROR_BOUND, relative_error
from dit_fused_ops.dispatch.store import read_decisions

CUDA = torch.device("cuda")
# torch knows this device only where torch_npu is.
NPU: Any = SimpleNamespace(type="npu")
Tensors = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def described(
    case: Case, *, dtype: torch.dtype = torch.float32, lse: bool = False, **changes: Any
) -> tuple[AttentionCall, Tensors, tuple[Tensor, Tensor]]:
    """A call, its tensors heads first, and what comes out of them."""
    q, k, v, mask = case.make(dtype)
    lengths = None if case.lengths is None else torch.tensor(case.lengths)
    tensors = (q, k, v, mask, lengths)
    options = (case.scale, True, True, None, case.causal, case.window, lse, False, False)
    return replace(ATTENTION.describe(tensors, options), **changes), tensors, case.expected(q, k, v, mask)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("no key", "no query")])
def test_no_kernel_off_the_cpu_meets_a_query_without_keys(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, tensors, (wanted, _) = described(CASES[name], device=CUDA)
    original = torch.nn.functional.scaled_dot_product_attention

    def poisonous(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        out = original(q, k, v, attn_mask=attn_mask, **kwargs)
        if attn_mask is None:
            return out
        sees = attn_mask if attn_mask.dtype == torch.bool else attn_mask > -torch.inf
        assert sees.any(-1).all()
        assert attn_mask.dtype in (torch.bool, q.dtype)
        return out

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", poisonous)
    sdpa = backend_of(ATTENTION, "sdpa")
    assert sdpa.refuses(call) is None
    q, k, v, mask, lengths = tensors
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = sdpa.run(call, q, k, v, mask, lengths)
    close(out, wanted)
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v) if x.grad is not None)


@pytest.mark.parametrize("name", ["plain", "causal", "odd sizes", "shared heads"])
def test_a_kernel_by_name_is_that_kernel(name: str) -> None:
    call, tensors, (wanted, _) = described(CASES[name])
    out = backend_of(ATTENTION, "sdpa_flash").run(call, *tensors)
    close(out, wanted)
    with pytest.raises(RuntimeError, match="No viable backend"):  # there is none of this kind on CPU
        backend_of(ATTENTION, "sdpa_cudnn").run(call, *tensors)


def dense_flash_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    deterministic: bool,
    return_attn_probs: bool,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """flash_attn_func as its documents describe it: BSND, +inf for a query without keys."""
    assert isinstance(deterministic, bool)
    out, lse = loops(*heads_first(q, k, v), scale=softmax_scale, causal=causal, window=window_size)
    out = out.transpose(1, 2).to(q.dtype)
    lse = lse.float().masked_fill(lse == -torch.inf, torch.inf)
    return (out, lse, None) if return_attn_probs else out


@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize(
    "name", ["plain", "causal", "causal, more queries", "window", "window and causal", "shared heads", "scale"]
)
def test_flash_attn(name: str, lse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    call, tensors, (wanted, wanted_lse) = described(CASES[name], dtype=torch.float16, lse=lse)
    backend = backend_of(ATTENTION, "flash_attn")
    assert backend.refuses(replace(call, device=CUDA)) in (None, "the package flash_attn is not installed")
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=dense_flash_attn))
    returned = backend.run(call, *tensors)
    out = returned[0] if lse else returned
    close(out, wanted, torch.float16)
    if lse:
        close(returned[1], wanted_lse)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("hints", [(None, None), (4, 5)])
def test_flash_attn_varlen(
    on_device: bool, hints: tuple[int | None, int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def flash(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, longest_q: int, longest_k: int, **keywords: Any
    ) -> tuple[Tensor, Tensor, None]:
        seen.update(keywords, cu=(cu_q, cu_k), longest=(longest_q, longest_k))
        out, lse = expected_sequences(
            q,
            k,
            v,
            cu_q.tolist(),
            cu_k.tolist(),
            causal=keywords["causal"],
            window=keywords["window_size"],
            softcap=keywords["softcap"],
            scale=keywords["softmax_scale"],
        )
        return out.to(q.dtype), lse.float().masked_fill(lse == -torch.inf, torch.inf), None

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash))
    q, k, v = make_sequences(9, 9, dtype=torch.float16)
    bounds = (torch.tensor(Q_BOUNDS), torch.tensor(K_BOUNDS)) if on_device else (None, None)
    on_host = (None, None) if on_device else (tuple(Q_BOUNDS), tuple(K_BOUNDS))
    options = (*on_host, *hints, 0.5, True, None, 2.0, True, True, False)
    call = ATTENTION_VARLEN.describe((q, k, v, *bounds), options)
    out, lse = backend_of(ATTENTION_VARLEN, "flash_attn").run(call, q, k, v, *bounds)
    wanted, wanted_lse = expected_sequences(q, k, v, Q_BOUNDS, K_BOUNDS, causal=True, softcap=2.0, scale=0.5)
    close(out, wanted, torch.float16)
    close(lse, wanted_lse)
    assert all(each.dtype == torch.int32 for each in seen["cu"])
    assert seen["longest"] == ((4, 5))
    assert seen["deterministic"] is True


FLEX = [name for name in CASES if name not in ("no key", "no query")]


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")  # which this test is about
@pytest.mark.filterwarnings("ignore:.*return_lse")  # torch 2.6 has no other way
@pytest.mark.parametrize("name", FLEX)
def test_flex_is_told_the_call(name: str) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    call, (q, k, v, mask, lengths), (wanted, wanted_lse) = described(CASES[name], lse=True)
    assert not call.features - backend_of(ATTENTION, "flex").honours
    out, lse = flex_attention(q, k, v, **flex_arguments(call, q, mask, lengths))
    close(out, wanted)
    close(lse, wanted_lse)


@pytest.mark.parametrize("name", CASES)
def test_what_npu_kernels_are_told(name: str) -> None:
    """The vendor's meaning of mask, mode and bounds, pair by pair, gives the result of the call."""
    case = CASES[name]
    call, (q, k, v, mask, lengths), (wanted, _) = described(case)
    if call.mask_kind == "bias" or call.scores == 0:
        return
    how = vendor_mask(call, q, mask, lengths)
    if how.hidden is None:
        hidden = torch.zeros(case.S, case.T, dtype=torch.bool)
        assert case.window is None or call.window == (-1, -1)
    elif how.mode == 0:
        hidden = how.hidden
        assert hidden.is_contiguous()
        assert hidden.shape[:2] in {(1, 1), (case.B, 1), (case.B, case.N)}
        assert hidden.shape[2:] == (case.S, case.T)
    else:
        assert torch.equal(how.hidden, torch.ones(2048, 2048).triu(1).bool())
        distance = torch.arange(case.T) - (torch.arange(case.S)[:, None] + case.T - case.S)
        before, after = (2**31 - 1, 0) if how.mode == 3 else (how.before, how.after)
        hidden = (distance < -before) | (distance > after)
        assert case.S > 1
    assert not hidden.all(-1).any()
    out, _ = loops(q, k, v, mask=~hidden, scale=call.scale)
    out = out if how.seeing is None else out.masked_fill(~how.seeing, 0)
    close(out, wanted)


REFUSALS: dict[str, tuple[str, Case, dict[str, Any], str]] = {
    "heads": ("fused_attn_score", Case(N=257, K=257, S=1, T=1), {}, "at most 256 heads"),
    "float64": ("fused_attn_score", Case(), {"dtype": torch.float64}, "it takes bfloat16, float16, float32"),
    "head dim": ("fused_attn_score", Case(D=776, E=776), {}, "the head dim must be up to 768"),
    "tokens": ("fused_attn_score", Case(), {"queries": (1 << 20) + 1}, "at most 1048576 tokens"),
    "bias": ("fused_attn_score", CASES["bias"], {}, "it does not honour: bias"),
    "values": ("fused_attn_score", CASES["narrow values, masked"], {}, "it does not honour: value dim"),
    "empty": ("fused_attn_score", CASES["no key"], {}, "there is no query or no key"),
    "layout": ("fused_attn_score_bsh", Case(), {"kernel_layout": "BNSD"}, "another kernel layout was asked for"),
    "odd head dim": ("prompt_flash_attn", Case(D=12, E=12), {"dtype": torch.float16}, "a multiple of 8, up to 512"),
    "mask": ("prompt_flash_attn", CASES["mask a head"], {"dtype": torch.float16}, "the same for all heads"),
    "channels": ("prompt_flash_attn", Case(N=128, K=128, D=512, E=512), {"dtype": torch.float16}, "fewer than 65535"),
    "gradient": ("prompt_flash_attn", Case(), {"dtype": torch.float16, "needs_grad": True}, "it has no gradient"),
    "single": ("fused_infer_attn", Case(), {}, "it takes bfloat16, float16, given float32"),
    "laser": ("ascend_laser_attention", CASES["causal"], {"dtype": torch.float16}, "it does not honour: causal"),
    "short": ("ascend_laser_attention", Case(S=9, T=9), {"dtype": torch.float16}, "self-attention of 2048 tokens"),
    "cross": ("ascend_laser_attention", Case(S=2048, T=2304), {"dtype": torch.float16}, "it is for self-attention"),
    "wide": ("ascend_laser_attention", Case(D=136, E=136), {"dtype": torch.float16}, "the head dim must be up to 128"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_npu_kernels_refuse_beyond_their_documents(name: str) -> None:
    backend, case, changes, words = REFUSALS[name]
    shapes = (
        (case.B, n, s, d) for n, s, d in ((case.N, case.S, case.D), (case.K, case.T, case.D), (case.K, case.T, case.E))
    )
    mask = None if case.mask is None else torch.zeros(case.mask, dtype=torch.bool if case.kind == "bool" else None)
    tensors = (*(torch.empty(shape) for shape in shapes), mask, None)
    call = ATTENTION.describe(tensors, (None, True, True, None, case.causal, None, False, False, False))
    call = replace(call, device=NPU, **changes)
    assert words in (refusal(ATTENTION, backend, call) or "")


def test_sequences_on_an_npu_must_show_every_query_a_key() -> None:
    q = torch.empty(9, 2, 8)

    def refused(q_bounds: tuple[int, ...], k_bounds: tuple[int, ...], causal: bool) -> str:
        options = (q_bounds, k_bounds, None, None, None, causal, None, 0.0, False, False, False)
        call = ATTENTION_VARLEN.describe((q, q, q, None, None), options)
        return refusal(ATTENTION_VARLEN, "fused_attn_score", replace(call, device=NPU)) or ""

    not_there = refused((0, 4, 9), (0, 4, 9), True)
    assert "npu" in not_there
    assert refused((0, 4, 4, 9), (0, 4, 4, 9), False) == not_there
    for q_bounds, k_bounds, causal in (
        ((0, 4, 9), (0, 9, 9), False),
        ((0, 0, 9), (0, 2, 9), False),
        ((0, 5, 9), (0, 4, 9), True),
    ):
        assert refused(q_bounds, k_bounds, causal) == "every query must see a key"


def test_equal_runs() -> None:
    runs = list(equal_runs((0, 2, 4, 4, 9), (0, 3, 6, 7, 7)))
    assert [(run.q, run.k, run.count, run.queries, run.keys) for run in runs] == [
        (slice(0, 4), slice(0, 6), 2, 2, 3),
        (slice(4, 4), slice(6, 7), 1, 0, 1),
        (slice(4, 9), slice(7, 7), 1, 5, 0),
    ]


PROBED = Case(B=2, N=2, K=1, S=80, T=70, mask=(2, 1, 80, 70), causal=True)


@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("layout", ["BSND", "BNSD"])
def test_probe_accepts_the_reference_and_few_queries_suffice(layout: str, lse: bool) -> None:
    call, (q, k, v, mask, lengths), (wanted, wanted_lse) = described(PROBED, lse=lse)
    call = replace(call, layout=layout)
    if layout == "BSND":
        (q, k, v), wanted = heads_first(q, k, v), wanted.transpose(1, 2)
    probe = ATTENTION.probe(call, q, k, v, mask, lengths)
    right = (wanted, wanted_lse) if lse else wanted
    assert relative_error(probe.select(right), probe.wanted) < ERROR_BOUND[torch.float32]
    assert probe.wanted.numel() < wanted.numel()
    wrong = wanted * 1.001
    assert (
        relative_error(probe.select((wrong, wanted_lse) if lse else wrong), probe.wanted) > ERROR_BOUND[torch.float32]
    )
    if lse:
        error = relative_error(probe.select((wanted, wanted_lse + 0.01)), probe.wanted)
        assert error > ERROR_BOUND[torch.float32]


@pytest.mark.parametrize("fault", ["ignores the mask", "is not causal", "forgets the last token", "gives NaN"])
def test_a_wrong_kernel_cannot_win(fault: str, own_decisions: Path) -> None:
    tensors = (*PROBED.make(), None)
    sdpa = backend_of(ATTENTION, "sdpa")

    def run(call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, lengths: Tensor | None) -> Any:
        if fault == "ignores the mask":
            return sdpa.run(replace(call, mask_kind=None, mask_shape=None), q, k, v, None, lengths)
        if fault == "is not causal":
            return sdpa.run(replace(call, window=(-1, -1)), q, k, v, mask, lengths)
        out = sdpa.run(call, q, k, v, mask, lengths)
        if fault == "gives NaN":
            return out.masked_fill(out == 0, torch.nan)
        out[:, :, -1] = 0
        return out

    wrong = replace(sdpa, name="wrong", run=run)
    op = replace(ATTENTION, backends=(wrong, *ATTENTION.backends))
    options = (None, True, True, None, True, None, False, False, False)
    with dispatcher.configured(mode="runtime"):
        dispatcher(op, tensors, options)
    (decision,) = read_decisions(own_decisions).values()
    assert set(decision.rejected) == {"wrong"}
    assert "error is" in decision.rejected["wrong"]


def test_probe_of_sequences_catches_a_neighbours_keys() -> None:
    q, k, v = make_sequences(150, 150)
    options = ((0, 70, 150), (0, 60, 150), None, None, None, False, None, 0.0, False, False, False)
    call = ATTENTION_VARLEN.describe((q, k, v, None, None), options)
    probe = ATTENTION_VARLEN.probe(call, q, k, v, None, None)
    naive = backend_of(ATTENTION_VARLEN, "naive")
    assert relative_error(probe.select(naive.run(call, q, k, v, None, None)), probe.wanted) < 1e-6
    shifted = replace(call, k_bounds=(0, 61, 150))
    assert relative_error(probe.select(naive.run(shifted, q, k, v, None, None)), probe.wanted) > 1e-3
