"""The meter against counts made by hand: a multiply-add is two operations, attention is the whole score matrix."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import _global_forward_hooks

from dit_cache.errors import CacheError
from dit_cache.meter import FlopMeter, flops_share

MODES = pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
Mode = Callable[[], AbstractContextManager[Any]]


def count(run: Callable[[], object], mode: Mode = torch.no_grad, **how: Any) -> int:
    with mode(), FlopMeter(**how) as meter:
        run()
    return meter.flops


@MODES
@FLOATS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 3, 4)], ids=str)
def test_linear(mode: Mode, dtype: torch.dtype, bias: bool, lead: tuple[int, ...]) -> None:
    layer = nn.Linear(7, 11, bias=bias, dtype=dtype)
    x = torch.randn(*lead, 7, dtype=dtype)
    assert count(lambda: layer(x), mode) == 2 * torch.Size(lead).numel() * 7 * 11


@MODES
@FLOATS
@pytest.mark.parametrize("groups", [1, 2])
def test_convolution(mode: Mode, dtype: torch.dtype, groups: int) -> None:
    layer = nn.Conv3d(4, 6, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 0), groups=groups, dtype=dtype)
    x = torch.randn(2, 4, 3, 6, 9, dtype=dtype)
    out = layer(x)
    assert out.shape == (2, 6, 3, 4, 7)
    assert count(lambda: layer(x), mode) == 2 * out.numel() * (4 // groups) * 1 * 2 * 3


PRODUCTS: dict[str, tuple[Callable[[], Tensor], int]] = {
    "mm": (lambda: torch.mm(torch.ones(3, 4), torch.ones(4, 5)), 2 * 3 * 4 * 5),
    "bmm": (lambda: torch.bmm(torch.ones(2, 3, 4), torch.ones(2, 4, 5)), 2 * 2 * 3 * 4 * 5),
    "baddbmm": (lambda: torch.baddbmm(torch.ones(1), torch.ones(2, 3, 4), torch.ones(2, 4, 5)), 2 * 2 * 3 * 4 * 5),
    "broadcast matmul": (lambda: torch.ones(2, 1, 3, 4) @ torch.ones(6, 4, 5), 2 * 12 * 3 * 4 * 5),
    "matrix by vector": (lambda: torch.ones(3, 4) @ torch.ones(4), 2 * 3 * 4),
    "vector by matrices": (lambda: torch.ones(4) @ torch.ones(2, 4, 5), 2 * 2 * 4 * 5),
    "vector by vector": (lambda: torch.ones(4) @ torch.ones(4), 2 * 4),
    "vdot": (lambda: torch.vdot(torch.ones(4), torch.ones(4)), 2 * 4),
    "addmv": (lambda: torch.addmv(torch.ones(3), torch.ones(3, 4), torch.ones(4)), 2 * 3 * 4),
    "addmv in place": (lambda: torch.ones(3).addmv_(torch.ones(3, 4), torch.ones(4)), 2 * 3 * 4),
    "addmm in place": (lambda: torch.ones(3, 5).addmm_(torch.ones(3, 4), torch.ones(4, 5)), 2 * 3 * 4 * 5),
    "baddbmm in place": (
        lambda: torch.ones(2, 3, 5).baddbmm_(torch.ones(2, 3, 4), torch.ones(2, 4, 5)),
        2 * 2 * 3 * 4 * 5,
    ),
    "einsum": (lambda: torch.einsum("bik,bjk->bij", torch.ones(2, 3, 4), torch.ones(2, 5, 4)), 2 * 2 * 3 * 4 * 5),
    "out": (lambda: torch.mm(torch.ones(3, 4), torch.ones(4, 5), out=torch.empty(3, 5)), 2 * 3 * 4 * 5),
    "integers": (
        lambda: torch._int_mm(torch.ones(32, 8, dtype=torch.int8), torch.ones(8, 16, dtype=torch.int8)),
        2 * 32 * 8 * 16,
    ),
    "with activation": (
        lambda: torch._addmm_activation(torch.ones(5), torch.ones(3, 4), torch.ones(4, 5)),
        2 * 3 * 4 * 5,
    ),
    "pointwise": (lambda: F.gelu(torch.ones(3, 4) * 2 + 1).softmax(-1), 0),
}


@MODES
@pytest.mark.parametrize("name", PRODUCTS)
def test_products(mode: Mode, name: str) -> None:
    run, expected = PRODUCTS[name]
    assert count(run, mode) == expected


@MODES
@FLOATS
@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention(mode: Mode, dtype: torch.dtype, backend: SDPBackend, causal: bool, kv_heads: int) -> None:
    q = torch.randn(2, 4, 10, 16, dtype=dtype)
    k, v = torch.randn(2, 2, kv_heads, 13, 16, dtype=dtype).unbind()

    def attend() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=kv_heads < 4)

    assert count(attend, mode) == 2 * 2 * 4 * 10 * 13 * (16 + 16)


@MODES
def test_attention_of_other_head_dim_of_values(mode: Mode) -> None:
    q, k, v = torch.randn(2, 4, 10, 16), torch.randn(2, 4, 13, 16), torch.randn(2, 4, 13, 8)
    assert count(lambda: F.scaled_dot_product_attention(q, k, v), mode) == 2 * 2 * 4 * 10 * 13 * (16 + 8)


class Block(nn.Module):
    """A transformer block whose cost is easy to say."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(F.gelu(self.up(F.layer_norm(x, x.shape[-1:]))))
        return out


BATCH, TOKENS, WIDTH, HEADS = 2, 9, 16, 4
BLOCK_FLOPS = 2 * BATCH * TOKENS * 12 * WIDTH**2 + 4 * BATCH * TOKENS**2 * WIDTH


@MODES
def test_transformer(mode: Mode) -> None:
    blocks = nn.Sequential(Block(WIDTH, HEADS), Block(WIDTH, HEADS), Block(WIDTH, HEADS))
    x = torch.randn(BATCH, TOKENS, WIDTH)
    assert count(lambda: blocks(x), mode) == 3 * BLOCK_FLOPS


@MODES
def test_what_is_measured_is_what_runs(mode: Mode) -> None:
    block, x = Block(WIDTH, HEADS), torch.randn(BATCH, TOKENS, WIDTH)
    with mode():
        bare = block(x)
        with FlopMeter():
            metered = block(x)
    assert torch.equal(bare, metered)


@MODES
def test_fused_encoder_layers_of_torch(mode: Mode) -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, batch_first=True).eval()
    attention, x = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval(), torch.randn(BATCH, TOKENS, WIDTH)
    assert count(lambda: layer(x), mode) == BLOCK_FLOPS
    assert count(lambda: attention(x, x, x), mode) == BLOCK_FLOPS - 2 * BATCH * TOKENS * 8 * WIDTH**2


def test_backward_counts() -> None:
    layer, x = nn.Linear(7, 11), torch.randn(5, 7, requires_grad=True)
    assert count(lambda: layer(x).sum().backward(), torch.enable_grad) == 3 * (2 * 5 * 7 * 11)


def test_compiled_modules_count() -> None:
    block, x = Block(WIDTH, HEADS), torch.randn(BATCH, TOKENS, WIDTH)
    compiled = torch.compile(block, backend="eager")
    with torch.no_grad():
        compiled(x)
    assert count(lambda: compiled(x)) == BLOCK_FLOPS


def product() -> Tensor:
    return torch.ones(3, 4) @ torch.ones(4, 5)


ONE = 2 * 3 * 4 * 5


def test_it_adds_up_and_starts_again() -> None:
    meter = FlopMeter()
    assert meter.flops == 0
    with meter:
        product()
        assert meter.flops == ONE
        product()
    product()
    with meter:
        product()
    assert meter.flops == 3 * ONE
    with meter:
        meter.reset()
        product()
    assert meter.flops == ONE
    meter.reset()
    assert meter.flops == 0


def test_inside_itself_it_counts_once() -> None:
    meter = FlopMeter()
    with meter:
        with meter:
            product()
        product()
    assert meter.flops == 2 * ONE


def test_each_of_nested_meters_counts_what_runs_in_it() -> None:
    with FlopMeter() as outer:
        product()
        with FlopMeter() as inner:
            product()
    assert (outer.flops, inner.flops) == (2 * ONE, ONE)


def test_an_exception_leaves_it_usable() -> None:
    meter = FlopMeter()

    def fail() -> None:
        with meter:
            product()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    product()
    with meter:
        product()
    assert meter.flops == 2 * ONE


def test_other_threads_are_not_counted() -> None:
    with FlopMeter() as meter:
        thread = threading.Thread(target=product)
        thread.start()
        thread.join()
    assert meter.flops == 0


def test_it_hooks_no_modules() -> None:
    with FlopMeter():
        assert not _global_forward_hooks


def test_custom_formulas_come_first() -> None:
    mapping = {torch.ops.aten.gelu: lambda x, **_: 8 * x.numel(), torch.ops.aten.mm: lambda a, b, **_: 1}
    assert count(lambda: F.gelu(product()), custom_mapping=mapping) == 8 * 15 + 1


# Names, order and defaults of the arguments as in torch_npu 2.13; what the formulas do not look at is left out.
FUSION = (
    "(Tensor query, Tensor key, Tensor value, int head_num, str input_layout, Tensor? pse=None, "
    "int[]? actual_seq_qlen=None, int[]? actual_seq_kvlen=None) -> Tensor"
)
FUSION_V3 = FUSION.replace("int[]?", "Tensor?")
PROMPT = (
    "(Tensor query, Tensor key, Tensor value, *, int[]? actual_seq_lengths=None, int num_heads=1, "
    'str input_layout="BSH", int num_key_value_heads=0, int[]? actual_seq_lengths_kv=None) -> Tensor'
)
B, N, K, S, T, D, E = 2, 4, 2, 6, 10, 8, 16
ATTENTION = 2 * B * N * S * T * (D + E)


def laid_out(layout: str, heads: int, tokens: int, head_dim: int) -> Tensor:
    sizes = {"B": B, "N": heads, "S": tokens, "D": head_dim, "H": heads * head_dim, "T": B * tokens}
    return torch.zeros([sizes[axis] for axis in layout])


def inputs(layout: str) -> tuple[Tensor, Tensor, Tensor]:
    return laid_out(layout, N, S, D), laid_out(layout, K, T, D), laid_out(layout, K, T, E)


@MODES
@pytest.mark.parametrize("layout", ["BNSD", "BSND", "BSH", "SBH"])
def test_ascend_attention_in_each_layout(mode: Mode, layout: str) -> None:
    with torch.library._scoped_library("npu", "FRAGMENT") as library:
        register(library)
        q, k, v = inputs(layout)
        assert count(lambda: torch.ops.npu.npu_fusion_attention(q, k, v, N, layout), mode) == ATTENTION
        assert (
            count(lambda: torch.ops.npu.npu_prompt_flash_attention(q, k, v, num_heads=N, input_layout=layout), mode)
            == ATTENTION
        )
        if layout == "BSH":
            assert count(lambda: torch.ops.npu.npu_prompt_flash_attention(q, k, v, num_heads=N), mode) == ATTENTION


def test_ascend_attention_of_sequences_end_to_end() -> None:
    q, k, v = torch.zeros(9, N, D), torch.zeros(12, K, D), torch.zeros(12, K, E)
    each = 2 * N * (D + E)
    with torch.library._scoped_library("npu", "FRAGMENT") as library:
        register(library)
        fusion, v3 = torch.ops.npu.npu_fusion_attention, torch.ops.npu.npu_fusion_attention_v3
        expected = each * (4 * 2 + 5 * 10)
        assert count(lambda: fusion(q, k, v, N, "TND", None, [4, 9], [2, 12])) == expected
        assert count(lambda: fusion(q, k, v, N, "TND", actual_seq_qlen=[4, 9], actual_seq_kvlen=[2, 12])) == expected
        assert count(lambda: fusion(q, q, q, N, "TND", actual_seq_qlen=[4, 9])) == 2 * N * (D + D) * (16 + 25)
        assert count(lambda: fusion(q, k, v, N, "TND")) == each * 9 * 12
        ends = torch.tensor([3, 6, 9]), torch.tensor([4, 8, 12])
        assert count(lambda: v3(q, k, v, N, "TND", None, *ends)) == each * 3 * (3 * 4)


def register(library: torch.library.Library) -> None:
    """Kernels of Ascend by name, without what they compute."""
    for name, schema in {
        "npu_fusion_attention": FUSION,
        "npu_fusion_attention_v3": FUSION_V3,
        "npu_prompt_flash_attention": PROMPT,
    }.items():
        library.define(name + schema)  # type: ignore[no-untyped-call]
        library.impl(name, lambda query, *_, **__: query.clone(), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


def test_share() -> None:
    block, x = Block(WIDTH, HEADS), torch.randn(BATCH, TOKENS, WIDTH)
    calls: list[str] = []

    def run(times: int, name: str) -> None:
        calls.append(name)
        for _ in range(times):
            block(x)

    assert flops_share(lambda: run(2, "run"), lambda: run(5, "reference")) == 2 / 5
    assert flops_share(lambda: None, lambda: run(1, "reference")) == 0
    assert sorted(calls) == ["reference", "reference", "run"]


def test_share_of_nothing() -> None:
    with pytest.raises(CacheError, match=r"0 counted operations.*custom_mapping"):
        flops_share(product, lambda: None)
