"""attention_forward under what torch wraps around it: compile, export, func, autocast, fake and meta tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_cases import Case, close, heads_first
from torch import Tensor
from torch._subclasses import FakeTensorMode

from dit_fused_ops.attention import attention_forward, attention_forward_varlen, attention_naive

ARGUMENTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"window": (2, 1)},
    "lengths": {"key_lengths": [3, 0]},
    "lse": {"return_lse": True},
    "masked lse": {"return_lse": True, "window": (2, 1)},
    "manual": {"opt_mode": "manual"},
    "naive": {"fused": False},
    "static": {"opt_mode": "static", "deterministic": True, "layout": "BSH"},
}


def tensors(S: int = 5, T: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, _ = Case(S=S, T=T).make()
    q, k, v = heads_first(q, k, v)
    return q.contiguous(), k.contiguous(), v.contiguous()


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> None:
    torch.compiler.reset()


class Attention(torch.nn.Module):
    """One call, with arguments that are there from the start."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.arguments = arguments

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Any:
        return attention_forward(q, k, v, mask, **self.arguments)


def first(result: Any) -> Any:
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("name", ARGUMENTS)
def test_compiles_to_one_graph(name: str) -> None:
    attention, given = Attention(**ARGUMENTS[name]), tensors()
    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*given), attention(*given), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "mask", [torch.rand(7) > 0.5, torch.randn(5, 7), torch.ones(2, 5, 7).int()], ids=["1", "2", "3"]
)
def test_masks_compile(mask: Tensor) -> None:
    mask = mask[None, None, None] if mask.dim() == 1 else mask
    attention, given = Attention(), (*tensors(), mask)
    compiled = torch.compile(attention, fullgraph=True, backend="eager", dynamic=True)
    torch.testing.assert_close(compiled(*given), attention(*given), atol=1e-6, rtol=1e-5)


def test_compiled_gradients() -> None:
    given = tensors()
    for each in given:
        each.requires_grad_()
    wanted = torch.autograd.grad(attention_forward(*given).square().sum(), given)
    compiled = torch.compile(attention_forward, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*given).square().sum(), given)
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)


def test_lengths_of_sequences_stay_symbols_when_compiled() -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph

    compiled = torch.compile(Attention(), fullgraph=True, backend=count, dynamic=True)
    for tokens in (6, 9, 30):
        given = tensors(S=tokens, T=tokens)
        torch.testing.assert_close(compiled(*given), attention_forward(*given), atol=1e-6, rtol=1e-5)
    assert len(graphs) == 1


@pytest.mark.parametrize("name", ARGUMENTS)
def test_exports(name: str) -> None:
    attention, given = Attention(**ARGUMENTS[name]), tensors()
    exported = torch.export.export(attention, given)
    torch.testing.assert_close(exported.module()(*given), attention(*given), atol=1e-6, rtol=1e-5)


def test_exports_with_any_number_of_tokens() -> None:
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    sizes = ({1: tokens}, {1: tokens}, {1: tokens})
    exported = torch.export.export(Attention(), tensors(S=6, T=6), dynamic_shapes=sizes)
    given = tensors(S=17, T=17)
    torch.testing.assert_close(exported.module()(*given), attention_forward(*given), atol=1e-6, rtol=1e-5)
    assert torch.ops.aten.scaled_dot_product_attention.default in {node.target for node in exported.graph.nodes}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_func_grad(name: str) -> None:
    q, k, v = tensors()
    arguments = ARGUMENTS[name]
    got = torch.func.grad(lambda q: first(attention_forward(q, k, v, **arguments)).square().sum())(q)
    q.requires_grad_()
    (wanted,) = torch.autograd.grad(first(attention_forward(q, k, v, **arguments)).square().sum(), q)
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_the_three_and_not_the_bias(dtype: torch.dtype) -> None:
    q, k, v = tensors()
    bias = torch.randn(1, 1, 1, 7) * 10
    with torch.autocast("cpu", dtype):
        out = attention_forward(q, k, v, bias)
    assert out.dtype == dtype
    q, k, v = heads_first(*(each.to(dtype).double() for each in (q, k, v)))
    close(out, attention_naive(q, k, v, bias)[0].transpose(1, 2), dtype)


def test_autocast_leaves_float64() -> None:
    q, k, v = (each.double() for each in tensors())
    with torch.autocast("cpu", torch.bfloat16):
        assert attention_forward(q, k, v).dtype == torch.float64


@pytest.mark.parametrize("name", ARGUMENTS)
def test_fake_and_meta_tensors(name: str) -> None:
    with FakeTensorMode():
        assert first(attention_forward(*tensors(), **ARGUMENTS[name])).shape == (2, 5, 4, 8)
    q, k, v = (each.to("meta") for each in tensors())
    assert first(attention_forward(q, k, v, **ARGUMENTS[name])).shape == (2, 5, 4, 8)


def test_choice_made_before_compiling_is_no_different() -> None:
    given = tensors(S=6, T=6)
    before = attention_forward(*given)
    torch.testing.assert_close(before.transpose(1, 2), F.scaled_dot_product_attention(*heads_first(*given)))


class Varlen(torch.nn.Module):
    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.arguments = arguments

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return attention_forward_varlen(q, k, v, [0, 2, 2, 5], [0, 3, 3, 7], **self.arguments)


@pytest.mark.parametrize(
    "arguments", [{}, {"causal": True}, {"strict": False, "window_size": (1, 1), "softcap": 2.0}], ids=str
)
def test_varlen_with_lists(arguments: dict[str, Any]) -> None:
    q, k, v = (each[0] for each in tensors())
    varlen = Varlen(**arguments)
    wanted = varlen(q, k, v)
    compiled = torch.compile(varlen, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, k, v), wanted, atol=1e-6, rtol=1e-5)
    exported = torch.export.export(varlen, (q, k, v)).module()
    torch.testing.assert_close(exported(q, k, v), wanted, atol=1e-6, rtol=1e-5)
    got = torch.func.grad(lambda q: varlen(q, k, v).square().sum())(q)
    q.requires_grad_()
    torch.testing.assert_close(got, torch.autograd.grad(varlen(q, k, v).square().sum(), q)[0], atol=1e-6, rtol=1e-5)


def test_varlen_autocast() -> None:
    q, k, v = (each[0] for each in tensors())
    with torch.autocast("cpu", torch.bfloat16):
        assert Varlen()(q, k, v).dtype == torch.bfloat16
