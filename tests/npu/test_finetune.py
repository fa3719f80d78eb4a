"""A training step of mm-finetune with the vendor's operators: on fake npu tensors, and in numbers by the formulas.

Nothing here runs on a device. What is shown: the language model's blocks, the vision tower's and the loss go forward
and backward through the vendor's shape functions, with the operators that are meant for training; and the whole step of
a small model, computed by the published formulas, has the loss and the gradients that the other path has.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch_npu
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Megatron says what it does not find
    import megatron.core.parallel_state  # noqa: F401

from mm_finetune.config import OptimizationConfig, ParallelConfig
from mm_finetune.data import Batch
from mm_finetune.engine import attention, pointwise
from mm_finetune.engine.attention import Rows, packed_attention
from mm_finetune.engine.device import mcore_on
from mm_finetune.engine.loss import linear_cross_entropy
from mm_finetune.engine.model import QwenVL
from mm_finetune.engine.parallel import Ranks, model_parallel
from mm_finetune.engine.pictures import Geometry
from mm_finetune.engine.stages import Stages
from mm_finetune.engine.step import Trainer
from mm_finetune.mini.model import model_config
from mm_finetune.mini.tokenizer import SPECIAL_TOKENS, VOCAB_SIZE
from npu.fake_npu import shapes
from npu.semantics import installed
from npu.test_wan import Operators

NPU, CPU = torch.device("npu", 0), torch.device("cpu")
LAYERS, VISION_LAYERS, WIDTH = 4, 4, 64  # of the mini model's decoder; of its vision tower
BOUNDS = (0, 7, 7, 20)  # samples of a packed row, one of them empty
# float32 with other orders of summation.
TOLERANCE = 2e-5


class Vocabulary:
    """All that the configuration asks of its tokenizer."""

    def get_vocab(self) -> dict[str, int]:
        """Ids of the special tokens."""
        return {token: VOCAB_SIZE - len(SPECIAL_TOKENS) + number for number, token in enumerate(SPECIAL_TOKENS)}


@pytest.fixture(params=["bf16", "fp32"])
def train(request: pytest.FixtureRequest) -> OptimizationConfig:
    return OptimizationConfig(steps=1, global_batch_size=2, dtype=request.param)


@pytest.fixture(autouse=True)
def _no_mask_of_another_mode() -> None:
    """It is kept for the whole of a run, and a fake one belongs to its mode."""
    attention._compressed_triangle.cache_clear()


@pytest.fixture
def alone() -> Iterator[None]:
    """One process, whose groups are there for both devices."""
    dist.init_process_group("cpu:gloo,npu:fake", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    yield
    dist.destroy_process_group()


def model_of(train: OptimizationConfig, ranks: Ranks) -> QwenVL:
    stages = Stages(llm=(LAYERS,), vit=(VISION_LAYERS,), pp_size=1, vit_tp_size=1)
    return QwenVL(model_config(Vocabulary()), ParallelConfig(), train, stages, ranks)


def on_npu(model: nn.Module) -> None:
    """Put fake npu tensors in the place of fake CPU tensors; `Module.to` can't."""
    for module in model.modules():
        for name, held in [*module._parameters.items(), *module._buffers.items()]:
            if held is not None:
                moved = torch.empty_strided(held.shape, held.stride(), dtype=held.dtype, device=NPU)
                if name in module._parameters:
                    moved = nn.Parameter(moved, requires_grad=held.requires_grad)
                    # Megatron's marks; where a fake tensor is said to be stands there too.
                    moved.__dict__.update(held.__dict__ | moved.__dict__)
                setattr(module, name, moved)


def zeros(*size: int, dtype: torch.dtype = torch.long, device: torch.device = NPU) -> Tensor:
    return torch.zeros(*size, dtype=dtype, device=device)


def rows(_: Tensor) -> Rows:
    """Fake tensors hold no numbers to read bounds from."""
    return Rows(bounds=BOUNDS, cu_seqlens=zeros(len(BOUNDS), dtype=torch.int32))


def text_batch(device: torch.device = NPU) -> Batch:
    tokens = BOUNDS[-1]
    return Batch(
        input_ids=zeros(1, tokens, device=device),
        labels=zeros(1, tokens, device=device),
        loss_mask=torch.ones(1, tokens, device=device),
        position_ids=zeros(3, 1, tokens, device=device),
        pixel_values=None,
        image_grid_thw=None,
        tokens=tokens,
        cu_seqlens=zeros(len(BOUNDS), dtype=torch.int32, device=device),
    )


def test_a_training_step_of_the_decoder(alone: None, train: OptimizationConfig) -> None:
    """Packed row, all blocks, head; SGD, as AdamW counts its steps in tensors, which have no numbers here."""
    with FakeTensorMode(), mcore_on(NPU), model_parallel(ParallelConfig()) as ranks, Operators() as operators:
        model = model_of(train, ranks)
        on_npu(model)
        decoder: Any = model[0].text_decoder
        with patch.object(Rows, "packed", rows):
            logits = model[0](text_batch(), logits=True)
        logits.float().square().mean().backward()
        torch.optim.SGD(decoder.parameters(), lr=0.1).step()
    assert (logits.shape, logits.device) == ((1, BOUNDS[-1], VOCAB_SIZE), NPU)
    assert [name for name, parameter in decoder.named_parameters() if parameter.grad is None] == []
    norms = 2 * LAYERS + 1
    assert operators.names == {
        "npu_fusion_attention": LAYERS, "npu_fusion_attention_grad": LAYERS,
        "npu_rotary_mul": 2 * LAYERS, "npu_rotary_mul_backward": 2 * LAYERS,
        "npu_rms_norm": norms, "npu_rms_norm_backward": norms,
        "npu_swiglu": LAYERS, "npu_swiglu_backward": LAYERS,
    }  # fmt: skip


def test_a_training_step_of_the_vision_tower(alone: None, train: OptimizationConfig) -> None:
    with FakeTensorMode(), mcore_on(NPU), model_parallel(ParallelConfig()) as ranks, Operators() as operators:
        model = model_of(train, ranks)
        on_npu(model)
        tower: Any = model[0].image_encoder
        encoder = tower.encoder
        angles = torch.randn(BOUNDS[-1], WIDTH // 4, device=NPU)
        row = rows(zeros(1))
        places = Geometry(order_M=None, back_M=None, windows=row, frames=row, rotary=(angles.cos(), angles.sin()))
        out = encoder(torch.randn(BOUNDS[-1], 1176, device=NPU), places)
        out.float().square().mean().backward()
    assert (out.shape, out.device) == ((BOUNDS[-1], 1, WIDTH), NPU)
    assert [name for name, parameter in encoder.named_parameters() if parameter.grad is None] == []
    assert operators.names == {
        "npu_fusion_attention": VISION_LAYERS, "npu_fusion_attention_grad": VISION_LAYERS,
        "npu_rotary_mul": 2 * VISION_LAYERS, "npu_rotary_mul_backward": 2 * VISION_LAYERS,
        "npu_rms_norm": 2 * VISION_LAYERS, "npu_rms_norm_backward": 2 * VISION_LAYERS,
        "npu_swiglu": VISION_LAYERS, "npu_swiglu_backward": VISION_LAYERS,
    }  # fmt: skip


def test_the_loss(train: OptimizationConfig) -> None:
    dtype = torch.bfloat16 if train.dtype == "bf16" else torch.float32
    with FakeTensorMode():
        hidden, weight = (torch.empty(n, 32, dtype=dtype, device=NPU, requires_grad=True) for n in (10, 64))
        loss = linear_cross_entropy(hidden, weight, zeros(10), torch.ones(10, device=NPU), chunk=4)
        loss.backward()  # type: ignore[no-untyped-call]
    assert (loss.shape, loss.dtype, loss.device) == ((), torch.float32, NPU)
    assert shapes((hidden.grad, weight.grad)) == shapes((hidden, weight))


def test_megatron_s_cuda_is_the_npu() -> None:
    with FakeTensorMode(), mcore_on(NPU):
        made = torch.zeros(2, device="cuda")
        assert made.device == torch.ones(2).cuda().device == torch.empty(2, device=0).device == NPU
        assert made.type() == "torch.cuda.FloatTensor"
        assert made.to(torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
        for name in ("Stream", "stream", "current_stream", "synchronize", "get_rng_state", "set_rng_state"):
            assert getattr(torch.cuda, name) is getattr(torch_npu.npu, name), name
        assert len(torch.cuda.default_generators) == torch_npu.npu.device_count(), "Megatron sets the state of them"
    assert torch.zeros(2).type() == "torch.FloatTensor"


PIECES: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "norm": (lambda x, weight: pointwise.rms_norm(x, weight, 1e-3), ((5, 2, 32), (32,))),
    "swiglu": (pointwise.swiglu, ((5, 2, 32),)),
    "rotate": (lambda x: pointwise.rotate(x, *angles(x.shape[0], x.shape[2])), ((20, 3, 8),)),
    "causal": (lambda q, k, v: packed_attention(q, k, v, real_rows()), ((20, 4, 8), (20, 2, 8), (20, 2, 8))),
    "windows": (
        lambda q, k, v: packed_attention(q, k, v, real_rows(), causal=False),
        ((20, 4, 8), (20, 4, 8), (20, 4, 8)),
    ),
}


def angles(tokens: int, width: int) -> tuple[Tensor, Tensor]:
    turned = torch.linspace(0, 3, tokens * width // 2).reshape(tokens, -1).repeat(1, 2)
    return turned.cos(), turned.sin()


def real_rows() -> Rows:
    return Rows(bounds=BOUNDS, cu_seqlens=torch.tensor(BOUNDS, dtype=torch.int32))


@contextmanager
def as_if_on_npu() -> Iterator[None]:
    """Let CPU tensors take the way of an NPU's, computed by the vendor's formulas."""
    tables = (pointwise.NORMS, pointwise.GATES, pointwise.ROTATIONS, attention.DEVICES)
    patches = [patch.dict(table, {"cpu": table["npu"]}) for table in tables]
    attention.choose.cache_clear()
    with installed(), patches[0], patches[1], patches[2], patches[3]:
        yield
    attention.choose.cache_clear()


@pytest.mark.parametrize("piece", PIECES)
def test_numbers_of_each_operator(piece: str) -> None:
    run, sizes = PIECES[piece]

    def computed() -> list[Tensor]:
        torch.manual_seed(0)
        given = [torch.randn(size, requires_grad=True) for size in sizes]
        out = run(*given)
        return [out, *torch.autograd.grad(out, given, torch.linspace(-1, 1, out.numel()).view_as(out))]

    wanted = computed()
    with as_if_on_npu():
        got = computed()
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE * max(1.0, float(theirs.detach().abs().max())))


def picture_batch() -> Batch:
    """A packed row of three samples, the second of them with a picture."""
    ids = torch.arange(24) % 200
    ids[9:17] = Vocabulary().get_vocab()["<|image_pad|>"]
    return replace(
        text_batch(CPU),
        input_ids=ids[None],
        labels=ids.roll(-1)[None].clamp(max=199),
        loss_mask=(ids < 150).float()[None],
        position_ids=torch.arange(24).expand(3, 1, 24),
        pixel_values=torch.randn(32, 1176),
        image_grid_thw=torch.tensor([[1, 4, 8]]),
        tokens=24,
        cu_seqlens=torch.tensor([0, 7, 19, 24], dtype=torch.int32),
    )


@pytest.mark.filterwarnings(r"ignore:`torch\.distributed\.\w+` is deprecated:FutureWarning")
def test_numbers_of_a_whole_step(alone: None) -> None:
    train = OptimizationConfig(steps=1, global_batch_size=3)
    with mcore_on(CPU), model_parallel(ParallelConfig()) as ranks:
        torch.manual_seed(0)
        trainer, batch = Trainer(model_of(train, ranks), train, ranks), picture_batch()

        def step() -> tuple[float, dict[str, Tensor]]:
            loss, _ = trainer.accumulate([batch])
            found: Any = dict(trainer.model.named_parameters())
            return loss, {name: parameter.main_grad.clone() for name, parameter in found.items()}

        wanted_loss, wanted = step()
        with as_if_on_npu():
            loss, got = step()
    assert abs(loss - wanted_loss) < TOLERANCE * wanted_loss
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=TOLERANCE * float(gradient.abs().max()))
        assert gradient.abs().max() > 0, name
