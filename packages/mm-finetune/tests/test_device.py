"""``with mcore_on(cpu)``: cuda means cpu inside, and nothing is changed outside."""

from __future__ import annotations

import pytest
import torch

from mm_finetune.engine.device import _cpu_names, mcore_on

CPU = torch.device("cpu")


@pytest.mark.parametrize("device", ["cuda", "cuda:0", 0, torch.device("cuda", 0)])
def test_cuda_means_the_device(device: object) -> None:
    with mcore_on(CPU):
        assert torch.zeros(2, device=device).device == CPU  # type: ignore[call-overload]
        assert torch.ones(2).to(device).device == CPU  # type: ignore[call-overload]
        assert torch.ones(2).cuda().device == CPU
        assert torch.empty(2, device=device, pin_memory=True).device == CPU  # type: ignore[call-overload]
        assert torch.ones(2).type() == "torch.cuda.FloatTensor"
        assert torch.cuda.current_device() == 0


def test_backward_runs_under_the_mode_and_is_right() -> None:
    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
            return grad * torch.full((), 2.0, device="cuda")

    x = torch.ones(3, requires_grad=True)
    with mcore_on(CPU):
        Probe.apply(x).sum().backward()  # type: ignore[no-untyped-call]
        y = torch.ones(3, requires_grad=True)
        torch.autograd.backward([Probe.apply(y)], [torch.tensor([1.0, 2.0, 3.0])])  # type: ignore[no-untyped-call]
    assert torch.equal(x.grad, torch.full((3,), 2.0))  # type: ignore[arg-type]
    assert torch.equal(y.grad, torch.tensor([2.0, 4.0, 6.0]))  # type: ignore[arg-type]


def test_everything_is_put_back_also_after_an_exception_and_nested() -> None:
    def names() -> dict[str, object]:
        return {name: getattr(torch.cuda, name) for name in _cpu_names()}

    def fail_inside() -> None:
        with mcore_on(CPU), mcore_on(CPU):
            assert names() != before
            raise KeyError

    before = names()
    with pytest.raises(KeyError):
        fail_inside()
    assert names() == before
    assert torch.ones(1).type() == "torch.FloatTensor"
    with mcore_on(torch.device("cuda")):
        assert names() == before, "on CUDA there is nothing to do"
