"""The whole transformer of wan-infer on the NPU's code path: on fake npu tensors, and in numbers by the formulas."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch_npu  # noqa: F401  # registers the device and the operators
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dit_fused_ops.dispatch import Dispatcher, dispatcher
from npu.semantics import installed
from wan_infer.config import TransformerConfig
from wan_infer.transformer import WanTransformer

T2V = TransformerConfig(dim=256, ffn_dim=320, num_heads=2, num_layers=2, text_dim=40, text_len=64, freq_dim=32)
CONFIGS = {
    "t2v": T2V,
    "i2v": replace(T2V, model_type="i2v", in_dim=36, image_dim=24),
    "vace": replace(T2V, model_type="vace", vace_layers=(0,)),
}
# The whole path is float32 with other orders of summation: as between two independent implementations on a CPU.
TOLERANCE = 2e-5


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators of the vendor's namespace."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "npu":
            self.names[func.__name__.partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def as_if_on_npu() -> Iterator[Counter[str]]:
    """Let the dispatcher choose for CPU tensors what it would choose for an NPU's, and count what it chooses."""
    choose, names = Dispatcher.choose, Counter[str]()

    def chosen(self: Dispatcher, op: Any, call: Any, tensors: Any = None, **how: Any) -> Any:
        backend = choose(self, op, replace(call, device=torch.device("npu:0")))
        names[backend.name] += 1
        return backend

    dispatcher.clear()
    with patch.object(Dispatcher, "choose", chosen), installed():
        yield names
    dispatcher.clear()


def inputs(config: TransformerConfig, batch: int = 1) -> dict[str, Tensor]:
    torch.manual_seed(1)
    size = (3, 4, 6)
    given = {
        "latents": torch.randn(batch, 16, *size),
        "timestep": torch.full((batch,), 500.0),
        "text": torch.randn(batch, 23, config.text_dim),
    }
    if config.image_dim:
        given["clip"] = torch.randn(batch, 257, config.image_dim)
        given["condition"] = torch.randn(batch, 20, *size)
    if config.vace_layers:
        given["condition"] = torch.randn(batch, 96, *size)
    return given


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_whole_model_calls_the_vendor_s_kernels(config: TransformerConfig, dtype: torch.dtype) -> None:
    with FakeTensorMode(), torch.no_grad(), Operators() as operators:
        with torch.device("npu:0"):
            model = WanTransformer(config).eval()
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data if model.keeps_float32(name) else parameter.data.to(dtype)
        velocity = model(**{name: value.to("npu:0") for name, value in inputs(config).items()})
    assert velocity.device.type == "npu"
    assert velocity.shape == (1, 16, 3, 4, 6)
    assert velocity.dtype == torch.float32
    blocks = config.num_layers + len(config.vace_layers)
    assert operators.names["npu_rotary_mul"] == 2 * blocks
    assert operators.names["npu_fusion_attention"] >= blocks
    assert operators.names["npu_rms_norm"] >= 3 * blocks


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_training_step_of_a_block(config: TransformerConfig) -> None:
    with FakeTensorMode(), Operators() as operators:
        with torch.device("npu:0"):
            model = WanTransformer(replace(config, num_layers=1))
        model(**{name: value.to("npu:0") for name, value in inputs(config).items()}).square().mean().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert operators.names["npu_fusion_attention_grad"] >= 1
    assert operators.names["npu_rotary_mul_backward"] >= 2


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_numbers_are_those_of_the_other_path(config: TransformerConfig, batch: int) -> None:
    torch.manual_seed(0)
    model, given = WanTransformer(config).eval(), inputs(config, batch)
    with torch.no_grad():
        wanted = model(**given)
        with as_if_on_npu() as chosen:
            got = model(**given)
    assert {"npu_rotary_mul", "fused_attn_score", "npu_rms_norm"} <= set(chosen)
    assert (got - wanted).abs().max() < TOLERANCE * max(1.0, float(wanted.abs().max()))
