"""The chunked cross entropy against torch's own, and what it never holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mm_finetune.engine.loss import linear_cross_entropy
from mm_finetune.trial import while_measured

POSITIONS, HIDDEN, VOCABULARY, CHUNK = 50, 16, 301, 8


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(POSITIONS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (POSITIONS,), generator=generator)
    return hidden, weight, labels, torch.rand(POSITIONS, generator=generator)


def reference(hidden: Tensor, weight: Tensor, labels: Tensor, loss_weights: Tensor) -> Tensor:
    losses = torch.nn.functional.cross_entropy((hidden @ weight.t()).float(), labels, reduction="none")
    return (losses * loss_weights).sum()


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.elements = max(self.elements, *(t.numel() for t in tree_leaves(result) if isinstance(t, Tensor)), 0)
        return result


@pytest.mark.parametrize("chunk", [1, CHUNK, POSITIONS, 1024])
def test_equals_torch(chunk: int) -> None:
    hidden, weight, labels, loss_weights = inputs()
    expected = reference(hidden, weight, labels, loss_weights)
    wanted = torch.autograd.grad(expected * 0.3, (hidden, weight))
    ours = linear_cross_entropy(hidden, weight, labels, loss_weights, chunk=chunk)
    gradients = torch.autograd.grad(ours * 0.3, (hidden, weight))
    # Sums of 50 and 301 terms in another order: some units in the last place of float32.
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    for ours_grad, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(ours_grad, theirs, rtol=1e-5, atol=1e-6)


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, labels, loss_weights = inputs()
    scaled = (hidden * 1000).detach()
    ours = linear_cross_entropy(scaled, weight, labels, loss_weights, chunk=CHUNK)
    torch.testing.assert_close(ours, reference(scaled, weight, labels, loss_weights), rtol=1e-6, atol=0)


def test_bf16_weights_get_gradients_of_float32_sums() -> None:
    hidden, weight, labels, loss_weights = inputs(torch.bfloat16)
    exact = [t.detach().float().requires_grad_() for t in (hidden, weight)]
    expected = reference(*exact, labels, loss_weights)  # type: ignore[call-arg]
    wanted = torch.autograd.grad(expected, exact)
    ours = linear_cross_entropy(hidden, weight, labels, loss_weights, chunk=CHUNK)
    gradients = torch.autograd.grad(ours, (hidden, weight))
    assert ours.dtype == torch.float32
    # bfloat16 has 8 bits: logits of up to about 16 are off by 2^-5.
    torch.testing.assert_close(ours, expected, rtol=2**-8, atol=0)
    for ours_grad, theirs in zip(gradients, wanted, strict=True):
        assert ours_grad.dtype == torch.bfloat16
        assert (ours_grad.float() - theirs).abs().max() < 2**-6 * theirs.abs().max()


def test_no_position_carries_loss() -> None:
    hidden, weight, labels, loss_weights = inputs()
    ours = linear_cross_entropy(hidden[:0], weight, labels[:0], loss_weights[:0])
    hidden_grad, weight_grad = torch.autograd.grad(ours, (hidden, weight))
    assert float(ours.detach()) == 0
    assert not hidden_grad.any()
    assert not weight_grad.any()


def test_gradient_goes_to_main_grad() -> None:
    hidden, weight, labels, loss_weights = inputs()
    weight = torch.nn.Parameter(weight.detach())
    (wanted,) = torch.autograd.grad(reference(hidden, weight, labels, loss_weights), weight)
    weight.main_grad = torch.ones_like(weight)  # type: ignore[attr-defined]
    linear_cross_entropy(hidden, weight, labels, loss_weights, chunk=CHUNK).backward()  # type: ignore[no-untyped-call]
    assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
    torch.testing.assert_close(weight.main_grad, wanted + 1, rtol=1e-5, atol=1e-6)  # type: ignore[attr-defined]


def test_tied_weight_keeps_the_gradient_of_the_embedding() -> None:
    """Megatron marks a tied weight with zero_out_wgrad and adds what it finds in .grad to main_grad."""
    hidden, weight, labels, loss_weights = inputs()
    weight = torch.nn.Parameter(weight.detach())
    weight.zero_out_wgrad = True  # type: ignore[attr-defined]
    weight.main_grad = torch.zeros_like(weight)  # type: ignore[attr-defined]

    def tied(loss: Any) -> Tensor:
        result: Tensor = loss(hidden + torch.nn.functional.embedding(labels, weight), weight, labels, loss_weights)
        return result

    (wanted,) = torch.autograd.grad(tied(reference), weight)
    tied(linear_cross_entropy).backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    torch.testing.assert_close(weight.main_grad + weight.grad, wanted, rtol=1e-5, atol=1e-5)  # type: ignore[attr-defined]


def test_frozen_weight() -> None:
    hidden, weight, labels, loss_weights = inputs()
    (wanted,) = torch.autograd.grad(reference(hidden, weight, labels, loss_weights), hidden)
    linear_cross_entropy(hidden, weight.detach(), labels, loss_weights, chunk=CHUNK).backward()  # type: ignore[no-untyped-call]
    assert weight.grad is None
    torch.testing.assert_close(hidden.grad, wanted, rtol=1e-5, atol=1e-6)


def test_logits_are_never_whole() -> None:
    hidden, weight, labels, loss_weights = inputs()
    with Largest() as seen:
        linear_cross_entropy(hidden, weight, labels, loss_weights, chunk=CHUNK).backward()  # type: ignore[no-untyped-call]
    assert CHUNK * VOCABULARY < POSITIONS * VOCABULARY
    assert seen.elements <= max(CHUNK * VOCABULARY, HIDDEN * VOCABULARY)
    with Largest() as seen:
        reference(hidden, weight, labels, loss_weights)
    assert seen.elements == POSITIONS * VOCABULARY, "or the mode sees nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_one_chunk_stand_at_a_time(dtype: torch.dtype) -> None:
    """As torch's allocator sees it: what many chunks need at most is what one needs, and their hidden states' part."""
    chunk, vocabulary, hidden = 256, 8192, 16
    weight = torch.randn(vocabulary, hidden, dtype=dtype, requires_grad=True)

    def most(positions: int) -> int:
        states = torch.randn(positions, hidden, dtype=dtype, requires_grad=True)
        labels, loss_weights = torch.zeros(positions, dtype=torch.long), torch.ones(positions)
        _, peak = while_measured(
            lambda: linear_cross_entropy(states, weight, labels, loss_weights, chunk=chunk), torch.device("cpu")
        )
        return peak

    logits = 4 * chunk * vocabulary
    one = most(chunk)
    assert logits < one < 1.5 * logits + 3 * 4 * vocabulary * hidden, "rounded ones and a gradient of the weight beside"
    assert most(4 * chunk) < one + logits / 10
