"""Packed rows against plain attention, sequence by sequence; each kernel's call against its published meaning."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from mm_finetune.engine.attention import DEVICES, KERNELS, Rows, Shape, _varlen_options, choose, packed_attention
from mm_finetune.errors import ConfigError

HEADS, KEY_VALUE_HEADS, HEAD_DIM = 4, 2, 8
# The operator's signature, from the vendor's schema (only what is used of it).
SCHEMA = (
    "npu_fusion_attention(Tensor query, Tensor key, Tensor value, int head_num, str input_layout, *, Tensor?"
    " atten_mask=None, float scale=1., int[]? actual_seq_qlen=None, int[]? actual_seq_kvlen=None, int sparse_mode=0)"
    " -> Tensor[]"
)


def heads(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def made(count: int) -> Tensor:
        return torch.randn(tokens, count, HEAD_DIM, generator=generator, requires_grad=True)

    return made(HEADS), made(KEY_VALUE_HEADS), made(KEY_VALUE_HEADS)


def by_hand(q: Tensor, k: Tensor, v: Tensor, bounds: tuple[int, ...], scale: float, causal: bool) -> Tensor:
    """softmax(scale q k^T) v over the keys of each query's own sequence; causal: those at or before it."""
    k, v = (x.repeat_interleave(HEADS // KEY_VALUE_HEADS, dim=1) for x in (k, v))
    number = torch.bucketize(torch.arange(len(q)), torch.tensor(bounds[1:]), right=True)
    place = torch.arange(len(q))
    sees = (number[:, None] == number) & ((place[:, None] >= place) | torch.tensor(not causal))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~sees, -torch.inf).softmax(-1), v)


@pytest.fixture
def npu_operator() -> Iterator[list[dict[str, Any]]]:
    """npu_fusion_attention for CPU tensors, layout TND, sparse mode 3, as documented; notes its calls."""
    calls: list[dict[str, Any]] = []

    def run(query: Tensor, key: Tensor, value: Tensor, head_num: int, layout: str, **given: Any) -> list[Tensor]:
        calls.append({"head_num": head_num, "layout": layout, **given})
        return [
            by_hand(query, key, value, (0, *given["actual_seq_qlen"]), given["scale"], given.get("sparse_mode") == 3)
        ]

    library = torch.library.Library("npu", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define(SCHEMA)  # type: ignore[no-untyped-call]
    library.impl("npu_fusion_attention", run, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
    yield calls
    library._destroy()  # type: ignore[no-untyped-call]


BOUNDS = [(0, 7), (0, 3, 6, 9), (0, 5, 6, 13), (0, 4, 4, 9), (0, 1)]


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize(("scale", "causal"), [(None, True), (0.5, True), (None, False)])
def test_packed_is_sequence_by_sequence(bounds: tuple[int, ...], scale: float | None, causal: bool) -> None:
    inputs = heads(bounds[-1])
    wanted = by_hand(*inputs, bounds, scale or HEAD_DIM**-0.5, causal)
    ours = packed_attention(*inputs, Rows.packed(torch.tensor(bounds)), scale, causal=causal)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)
    pull = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    for grad, theirs in zip(
        torch.autograd.grad(ours, inputs, pull), torch.autograd.grad(wanted, inputs, pull), strict=True
    ):
        torch.testing.assert_close(grad, theirs, rtol=1e-5, atol=1e-5)


def test_equal_rows() -> None:
    rows = Rows.equal(3, 4, torch.device("cpu"))
    assert rows.bounds == (0, 4, 8, 12)
    assert rows.cu_seqlens.tolist() == [0, 4, 8, 12]
    assert rows.cu_seqlens.dtype == torch.int32
    assert rows.longest == 4
    assert rows.runs() == [(4, 3)], "one call for all of them"


def test_nothing_is_as_large_as_all_tokens_squared() -> None:
    tokens = torch.tensor([0, 8, 16])
    seen: list[int] = []

    class Sizes(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                seen.append(result.numel())
            return result

    with Sizes():
        packed_attention(*heads(16), Rows.packed(tokens))
    assert max(seen) <= 16 * HEADS * HEAD_DIM


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
def test_npu_call(bounds: tuple[int, ...], npu_operator: list[dict[str, Any]]) -> None:
    inputs = heads(bounds[-1])
    ours = KERNELS["npu_fusion_attention"].run(*inputs, Rows.packed(torch.tensor(bounds)), 0.3, True)
    torch.testing.assert_close(ours, by_hand(*inputs, bounds, 0.3, True), rtol=1e-5, atol=1e-6)
    (call,) = npu_operator
    assert call["layout"] == "TND"
    assert call["head_num"] == HEADS
    assert call["actual_seq_qlen"] == call["actual_seq_kvlen"] == sorted({*bounds} - {0}), "ends, without a 0"
    # Sparse mode 3 takes one mask for every length: 2048 x 2048, upper triangle hidden.
    assert call["sparse_mode"] == 3
    assert call["atten_mask"].shape == (2048, 2048)
    assert call["atten_mask"].sum() == 2048 * 2047 // 2
    assert call["atten_mask"][0, 1]


def test_npu_call_that_sees_all(npu_operator: list[dict[str, Any]]) -> None:
    inputs, bounds = heads(9), (0, 5, 9)
    ours = KERNELS["npu_fusion_attention"].run(*inputs, Rows.packed(torch.tensor(bounds)), 0.3, False)
    torch.testing.assert_close(ours, by_hand(*inputs, bounds, 0.3, False), rtol=1e-5, atol=1e-6)
    (call,) = npu_operator
    assert not {"atten_mask", "sparse_mode"} & call.keys(), "no mask, and the default mode"


# What varlen_attn of a torch can be told beside tensors and lengths (docs.pytorch.org); it runs on CUDA alone.
ARGUMENTS = {"2.10": ["is_causal"], "2.11": ["scale", "window_size"], "2.12": ["scale", "window_size", "enable_gqa"]}


@pytest.fixture
def torch_version(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """varlen_attn for CPU tensors, as that version's document says; a window of (-1, 0) is causal."""
    version: str = request.param

    def run(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, key_ends: Tensor, *longest: int, **given: Any) -> Tensor:
        assert given.keys() <= set(ARGUMENTS[version])
        bounds = tuple(ends.tolist())
        assert torch.equal(ends, key_ends)
        assert longest == (max(stop - start for start, stop in pairwise(bounds)),) * 2
        if not given.get("enable_gqa"):
            assert k.shape == v.shape == q.shape
            k, v = (x.view(len(x), KEY_VALUE_HEADS, -1, HEAD_DIM).mean(2) for x in (k, v))
        causal = {(-1, 0): True, (-1, -1): False}[given["window_size"]]
        return by_hand(q, k, v, bounds, given["scale"], causal)

    kind = inspect.Parameter.KEYWORD_ONLY
    named = inspect.Signature([inspect.Parameter(name, kind) for name in ARGUMENTS[version]])
    monkeypatch.setattr(run, "__signature__", named, raising=False)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", run)
    _varlen_options.cache_clear()
    yield version
    _varlen_options.cache_clear()


@pytest.mark.parametrize("torch_version", ["2.11", "2.12"], indirect=True)
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.usefixtures("torch_version")
def test_cuda_call(bounds: tuple[int, ...], causal: bool) -> None:
    inputs = heads(bounds[-1])
    ours = KERNELS["varlen_attn"].run(*inputs, Rows.packed(torch.tensor(bounds)), 0.3, causal)
    wanted = by_hand(*inputs, bounds, 0.3, causal)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)
    pull = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    for grad, theirs in zip(
        torch.autograd.grad(ours, inputs, pull), torch.autograd.grad(wanted, inputs, pull), strict=True
    ):
        torch.testing.assert_close(grad, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("torch_version", ["2.10"], indirect=True)
@pytest.mark.usefixtures("torch_version")
def test_an_older_cuda_kernel_is_left_alone() -> None:
    assert "takes no scale" in str(KERNELS["varlen_attn"].refuses(shape()))


def shape(**changed: Any) -> Shape:
    usual: dict[str, Any] = {"dtype": torch.bfloat16, "heads": 16, "key_value_heads": 2, "head_dim": 128}
    return Shape(**usual | changed)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"head_dim": 1024}, "head dimensions up to 768"),
        ({"heads": 512}, "up to 256 heads"),
        ({"heads": 15}, "multiples"),
        ({"dtype": torch.float64}, "float16, bfloat16 and float32"),
    ],
)
def test_npu_refuses_with_a_reason(changed: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        choose("npu", shape(**changed))


@pytest.mark.parametrize(
    ("name", "dtype", "usable"), [("flash_attn", torch.float32, False), ("sdpa", torch.float32, True)]
)
def test_float32(name: str, dtype: torch.dtype, usable: bool) -> None:
    assert (KERNELS[name].refuses(shape(dtype=dtype)) is None) is usable


def test_choice_by_device() -> None:
    assert choose("cpu", shape()) == "sdpa"
    assert choose("npu", shape()) == "npu_fusion_attention"
    assert DEVICES["cuda"][-1] == "sdpa", "what no kernel takes still runs"
