"""What attention_forward refuses, in which words; modes, types, the environment variable, legacy masks."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attention_cases import Case, heads_first, loops, refusal
from torch import Tensor

from dit_fused_ops import attention
from dit_fused_ops.attention import ATTENTION, attention_forward, attention_naive
from dit_fused_ops.attention.call import AttentionCall
from dit_fused_ops.errors import BackendRefused, ParametersInvalid

B, S, T, N, D = 2, 5, 7, 4, 8
unchecked: Any = attention_forward  # for arguments that its types forbid


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(B, S, N, D), torch.randn(B, T, N, D), torch.randn(B, T, N, D)


x = torch.randn
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "query no tensor": ({"query": [1.0]}, "query must be a Tensor, given list"),
    "key no tensor": ({"key": None}, "key must be a Tensor, given NoneType"),
    "whole numbers": (
        {"value": torch.ones(B, T, N, D).long()},
        "value must hold floating point numbers, given torch.int64",
    ),
    "rank": ({"query": x(S, N, D)}, r"query must be 4-D, given the shape \[5, 4, 8\]"),
    "rank of value": ({"value": x(B, T, N, D, 1)}, "value must be 4-D"),
    "fused": ({"fused": 1}, "fused must be a bool, given 1 of int"),
    "head_first": ({"head_first": "no"}, "head_first must be a bool, given 'no'"),
    "is_causal": ({"is_causal": None}, "is_causal must be a bool, given None"),
    "return_lse": ({"return_lse": 1}, "return_lse must be a bool"),
    "deterministic": ({"deterministic": "yes"}, "deterministic must be a bool"),
    "flag in a list": ({"is_causal": [True]}, r"is_causal must be a bool, given \[True\] of list"),
    "scale": ({"scale": "big"}, "scale must be a number or None, given 'big' of str"),
    "scale a bool": ({"scale": True}, "scale must be a number or None, given True of bool"),
    "scale in a list": ({"scale": [1.0]}, r"scale must be a number or None, given \[1.0\] of list"),
    "mask no tensor": (
        {"attn_mask": [[True]]},
        "attn_mask must be a Tensor of truth values or numbers, or None, given list",
    ),
    "complex mask": ({"attn_mask": torch.ones(S, T) * 1j}, "given torch.complex64"),
    "mask too small": (
        {"attn_mask": x(S, T - 1)},
        r"The attn_mask must be a 2D tensor \[5, 7\].*given \[5, 6\].*key_lengths",
    ),
    "mask of keys alone": ({"attn_mask": x(T)}, r"given \[7\]. To leave out the padding of keys, .*\[2, 1, 1, 7\]"),
    "padding mask": ({"attn_mask": x(B, T)}, r"given \[2, 7\]. To leave out the padding"),
    "mask of heads": ({"attn_mask": x(B, 3, S, T)}, r"4D tensor \[2, 4, 5, 7\].*given \[2, 3, 5, 7\]"),
    "mask of another batch": ({"attn_mask": x(3, S, T)}, r"3D tensor \[2, 5, 7\].*given \[3, 5, 7\]"),
    "mask of one key": ({"attn_mask": x(B, 1, S, 1)}, r"1 may stand for all but the keys; given \[2, 1, 5, 1\]"),
    "batch": ({"query": x(3, S, N, D)}, r"same batch and head dim \(\[B, S, N, D\]\), given query \[3, 5, 4, 8\]"),
    "head dim": ({"query": x(B, S, N, 6)}, "same batch and head dim"),
    "tokens of value": ({"value": x(B, S, N, D)}, "key and value must be alike but for their channels"),
    "heads of value": ({"value": x(B, T, 2, D)}, "key and value must be alike"),
    "shared heads": (
        {"query": x(B, S, 6, D)},
        "query has 6 heads and key 4; the heads of key must divide those of query",
    ),
    "no channels": ({"query": x(B, S, N, 0), "key": x(B, T, N, 0)}, "a head of query has 0 channels"),
    "dtypes": ({"key": x(B, T, N, D).half()}, "query is torch.float32, key torch.float16.*cast them to one dtype"),
    "device": ({"key": x(B, T, N, D, device="meta")}, "key is on meta and query on cpu; move them"),
    "device of the mask": ({"attn_mask": x(S, T, device="meta")}, "attn_mask is on meta"),
    "window": (
        {"window": (1, 2, 3)},
        r"window must be a pair of whole numbers from -1 \(no bound\), given \(1, 2, 3\)",
    ),
    "window of floats": ({"window": (1.0, 2)}, r"given \(1.0, 2\)"),
    "window below": ({"window": (-2, 0)}, r"given \(-2, 0\)"),
    "window a number": ({"window": 3}, "given 3"),
    "lengths too long": ({"key_lengths": [3, 8]}, "key_lengths holds 8, legal are 0 to the 7 tokens of key"),
    "negative lengths": ({"key_lengths": [3, -1]}, "key_lengths holds -1"),
    "too few lengths": (
        {"key_lengths": [3]},
        r"key_lengths must hold 2 whole numbers, one a batch entry, given torch.int64 \[1\]",
    ),
    "lengths of floats": ({"key_lengths": [3.0, 1]}, "key_lengths must be a Tensor or a list of whole numbers"),
    "tensor of floats": ({"key_lengths": torch.ones(2)}, "given torch.float32"),
    "lengths a number": ({"key_lengths": 3}, "key_lengths must be a Tensor or a list of whole numbers, given 3"),
    "mode": ({"opt_mode": "fast"}, "The input 'opt_mode':fast is invalid, legal are runtime, static, manual"),
    "type": (
        {"opt_mode": "manual", "op_type": "best"},
        "Unsupported FA type: 'best', legal are fused_attn_score, .*naive",
    ),
    "kernel layout": ({"layout": "SBH"}, "layout is 'SBH', legal are BNSD, BSND, BSH"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    changes, words = WRONG[name]
    given = dict(zip(("query", "key", "value"), tensors(), strict=True))
    with pytest.raises(ParametersInvalid, match=rf"^\[MIE06E000001\] Parameters invalid\. .*{words}"):
        unchecked(**{**given, **changes})
    assert issubclass(ParametersInvalid, ValueError)


def test_unknown_keywords_are_named() -> None:
    with pytest.raises(TypeError, match="casual"):
        unchecked(*tensors(), casual=True)


def test_modes_agree() -> None:
    q, k, v = tensors()
    wanted = attention_forward(q, k, v, fused=False)
    for mode in ("runtime", "static", "manual"):
        torch.testing.assert_close(attention_forward(q, k, v, opt_mode=mode), wanted, atol=1e-6, rtol=1e-5)


def chosen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str | None, str | None]]:
    """The (mode, named) with which the dispatcher is called."""
    seen = []

    def spy(op: Any, given: Any, options: Any, *, mode: str | None = None, named: str | None = None) -> Any:
        seen.append((mode, named))
        return given[0]

    monkeypatch.setattr("dit_fused_ops.attention.dispatcher", spy)
    return seen


def test_what_modes_ask_of_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = chosen(monkeypatch)
    q, k, v = tensors()
    attention_forward(q, k, v)
    attention_forward(q, k, v, opt_mode="static")
    attention_forward(q, k, v, deterministic=True)
    attention_forward(q, k, v, opt_mode="manual")
    attention_forward(q, k, v, opt_mode="manual", op_type="eager")
    attention_forward(q, k, v, op_type="eager")
    attention_forward(q, k, v, fused=False, op_type="eager")
    assert seen == [
        (None, None),
        ("static", None),
        ("static", None),
        ("static", None),
        ("static", "eager"),
        ("static", "eager"),
        ("static", "naive"),
    ]


def test_environment_variable_overrides_the_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINDIE_SD_FA_TYPE", "naive")
    seen = chosen(monkeypatch)
    q, k, v = tensors()
    attention_forward(q, k, v, opt_mode="manual", op_type="eager")
    attention_forward(q, k, v, opt_mode="runtime")
    attention_forward(q, k, v, opt_mode="static")
    assert seen == [("static", "naive"), (None, None), ("static", None)]
    monkeypatch.setenv("MINDIE_SD_FA_TYPE", "flash9")
    with pytest.raises(ParametersInvalid, match="Unsupported FA type: 'flash9', legal are fused_attn_score"):
        attention_forward(q, k, v, opt_mode="manual")
    attention_forward(q, k, v)


def test_short_laser_attention_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = chosen(monkeypatch)
    short, long = torch.empty(1, 1, 8, 16, device="meta"), torch.empty(1, 1, 2048, 16, device="meta")
    for query, key in ((short, short), (long, short), (long, long)):
        attention_forward(query, key, key, head_first=True, op_type="ascend_laser_attention")
    assert [named for _, named in seen] == ["fused_attn_score", "fused_attn_score", "ascend_laser_attention"]


class OnNpu(torch.Tensor):
    """A tensor that says it is on an NPU."""

    device: Any = SimpleNamespace(type="npu")


def test_choice_on_an_npu(monkeypatch: pytest.MonkeyPatch) -> None:
    query = torch.randn(1, 2048, 1, 8).as_subclass(OnNpu)
    monkeypatch.setattr(attention, "soc_version", lambda: 220)
    assert attention._choice("manual", None, query, query, False) == ("static", "fused_attn_score")
    assert attention._choice("manual", "prompt_flash_attn", query, query, False) == ("static", "prompt_flash_attn")
    monkeypatch.setattr(attention, "soc_version", lambda: 260)
    for name in ("prompt_flash_attn", "ascend_laser_attention"):
        with pytest.warns(RuntimeWarning, match=f"{name} is not made for the A5; fused_attn_score does it"):
            assert attention._choice("manual", name, query, query, False) == ("static", "fused_attn_score")


@pytest.mark.parametrize(
    ("op_type", "arguments", "words"),
    [
        ("fused_attn_score", {}, "fused_attn_score cannot carry out this call: it runs on npu, the tensors are on cpu"),
        ("sdpa_flash", {}, "it runs on cuda, the tensors are on cpu. These can: sdpa, eager, naive"),
        ("sdpa", {"return_lse": True}, "sdpa cannot carry out this call: it does not honour: lse. These can: sdpa_lse"),
        ("sdpa_lse", {"return_lse": True, "window": (1, 1)}, "it does not honour: window. These can: eager, naive"),
        ("sdpa_lse", {}, "it is for return_lse=True"),
    ],
)
def test_named_backends_never_give_way(op_type: str, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(BackendRefused, match=words):
        attention_forward(*tensors(), opt_mode="manual", op_type=op_type, **arguments)


def test_scale_may_be_whole() -> None:
    q, k, v = tensors()
    assert torch.equal(attention_forward(q, k, v, scale=1), attention_forward(q, k, v, scale=1.0))


def test_legacy_reads_floating_masks_as_truth_values() -> None:
    q, k, v, _ = Case(B=1, N=1, K=1, S=3, T=3).make()
    mask = torch.tensor([[0.0, 1.0, -torch.inf], [1.0, 1.0, 1.0], [0.5, 0.0, 0.0]])
    old = attention_forward(q, k, v, mask, head_first=True, legacy=True)
    wanted, _ = loops(q, k, v, mask=mask != 0)
    torch.testing.assert_close(old.double(), wanted, atol=1e-6, rtol=1e-5)
    new = attention_forward(q, k, v, mask, head_first=True)
    wanted, _ = loops(q, k, v, mask=mask)
    torch.testing.assert_close(new.double(), wanted, atol=1e-6, rtol=1e-5)


def test_a_list_serves_as_window_and_lengths_in_any_integer_dtype_serve() -> None:
    q, k, v = tensors()
    assert torch.equal(unchecked(q, k, v, window=[1, 1]), attention_forward(q, k, v, window=(1, 1)))
    for dtype in (torch.int32, torch.int64, torch.uint8):
        lengths = torch.tensor([3, 0], dtype=dtype)
        assert torch.equal(
            attention_forward(q, k, v, key_lengths=lengths), attention_forward(q, k, v, key_lengths=(3, 0))
        )


def test_every_argument_has_its_decision() -> None:
    q, k, v = tensors()
    variants: list[dict[str, Any]] = [
        {},
        {"attn_mask": torch.ones(S, T).bool()},
        {"attn_mask": torch.ones(B, 1, S, T).bool()},
        {"attn_mask": torch.ones(S, T)},
        {"is_causal": True},
        {"window": (1, 2)},
        {"key_lengths": torch.tensor([1, 2])},
        {"return_lse": True},
    ]
    keys = set()
    for given in variants:
        tensors_ = (q, k, v, given.get("attn_mask"), given.get("key_lengths"))
        causal, window, lse = given.get("is_causal", False), given.get("window"), given.get("return_lse", False)
        options = (None, True, False, None, causal, window, lse, False, False)
        keys.add(ATTENTION.describe(tensors_, options).key)
    assert len(keys) == len(variants)


def test_deterministic_gradients_refuse_kernels_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (each.requires_grad_() for each in tensors())
    call = ATTENTION.describe((q, k, v, None, None), (None, True, False, None, False, None, False, True, False))
    assert refusal(ATTENTION, "sdpa", call) is None
    on_cuda = replace(call, device=torch.device("cuda"))
    assert "use_deterministic_algorithms" in (refusal(ATTENTION, "sdpa", on_cuda) or "")
    assert "use_deterministic_algorithms" in (
        refusal(ATTENTION, "sdpa_efficient", replace(on_cuda, dtype=torch.float32)) or ""
    )
    assert refusal(ATTENTION, "eager", on_cuda) is None
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert refusal(ATTENTION, "sdpa", on_cuda) is None


def test_scores_are_held_only_when_asked_for() -> None:
    big = torch.empty(1, 5000, 1, 8, device="meta")

    def call(*, lse: bool = False, window: tuple[int, int] | None = None, named: bool = False) -> AttentionCall:
        options = (None, True, False, None, False, window, lse, False, named)
        return ATTENTION.describe((big, big, big, None, None), options)

    assert "would hold the scores" in (refusal(ATTENTION, "eager", call()) or "")
    assert refusal(ATTENTION, "eager", call(named=True)) is None
    assert refusal(ATTENTION, "eager", call(lse=True, window=(5, 5))) is None
    assert refusal(ATTENTION, "naive", call()) is None


def test_backends_have_names_of_their_own_and_the_reference_is_last() -> None:
    assert ATTENTION.backends[-1].name == "naive"
    assert len({backend.name for backend in ATTENTION.backends}) == len(ATTENTION.backends)


def test_naive_is_public_and_takes_a_plain_call() -> None:
    q, k, v = heads_first(*tensors())
    out, lse = attention_naive(q, k, v)
    wanted, wanted_lse = loops(q, k, v)
    torch.testing.assert_close(out.double(), wanted, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse.double(), wanted_lse, atol=1e-6, rtol=1e-5)
