"""The CPU kernels for the vendor's operators: their numbers and gradients.

Held against torch's own operators, SDPA, layer_norm, rms_norm and so on, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from npu import peer
from npu.semantics import installed
from npu.semantics_attention import INT_MAX

# Absolute and relative. Two orders of summation of at most 300 float32 terms of size 1 differ by less than
# 300 · 2^-24 ≈ 1.8e-5.
FLOAT32 = (2e-5, 1e-5)
# One rounding to the dtype of the result: half a unit in the last place, of numbers under 8.
HALF = {torch.float16: (4e-3, 1e-3), torch.bfloat16: (3e-2, 8e-3)}
NPU, MINDIESD = torch.ops.npu, torch.ops.mindiesd
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
TRIANGLE = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
BNSD = {"q_input_layout": "BNSD", "kv_input_layout": "BNSD"}


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    peer.module()  # its operators are defined by its own library
    torch.manual_seed(0)
    with installed():
        yield


def randn(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_(grad)


def close(got: Tensor, wanted: Tensor) -> None:
    atol, rtol = HALF.get(got.dtype, FLOAT32)
    torch.testing.assert_close(got, wanted.to(got.dtype), atol=atol, rtol=rtol)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("mode", ["half", "interleave"])
def test_rotation_is_a_product_of_complex_numbers(mode: str, dtype: torch.dtype) -> None:
    x, angle = randn(2, 7, 3, 8, dtype=dtype), torch.randn(1, 7, 1, 4)
    widen = (lambda t: torch.cat((t, t), -1)) if mode == "half" else (lambda t: t.repeat_interleave(2, -1))
    cos, sin = (widen(table).to(dtype) for table in (angle.cos(), angle.sin()))
    got = NPU.npu_rotary_mul(x, cos, sin, mode)
    pairs = x.float().reshape(*x.shape[:3], 2, 4).mT if mode == "half" else x.float().reshape(*x.shape[:3], 4, 2)
    rounded = torch.complex(*(t.float()[..., :4] if mode == "half" else t.float()[..., ::2] for t in (cos, sin)))
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * rounded)
    close(got, (turned.mT if mode == "half" else turned).flatten(-2))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_norms_are_torchs(dtype: torch.dtype) -> None:
    x, weight, bias = randn(2, 5, 48, dtype=dtype), randn(48, dtype=dtype), randn(48, dtype=dtype)
    scale, shift = randn(2, 1, 48, dtype=dtype), randn(2, 1, 48, dtype=dtype)
    wide = x.float(), (48,), weight.float()
    close(NPU.npu_rms_norm(x, weight, 1e-3)[0], F.rms_norm(*wide, 1e-3))
    close(NPU.npu_rms_norm(x, weight.float(), 1e-3)[0], F.rms_norm(*wide, 1e-3))
    out, mean, rstd = MINDIESD.layernorm(x, [48], weight, bias, 1e-3)
    wanted = torch.native_layer_norm(*wide, bias.float(), 1e-3)
    for got, each in zip((out, mean, rstd), wanted, strict=True):
        close(got, each)
    modulated = F.layer_norm(x.float(), (48,), eps=1e-3) * (1 + scale.float()) + shift.float()
    close(MINDIESD.adaln(x, scale, shift[:, 0], epsilon=1e-3), modulated)
    close(MINDIESD.adaln_v2(x, scale[:, 0], shift, epsilon=1e-3)[0], modulated)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_activations_are_torchs(dtype: torch.dtype) -> None:
    x = randn(3, 50, dtype=dtype) * 4
    first, second = x.float().chunk(2, -1)
    close(NPU.npu_swiglu(x), F.silu(first) * second)
    close(NPU.npu_fast_gelu(x), x.float() * torch.sigmoid(1.702 * x.float()))
    for approximate in ("none", "tanh"):
        close(NPU.npu_gelu(x, approximate=approximate), F.gelu(x.float(), approximate=approximate))


def sdpa(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None = None, scale: float = 0.3) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), keep, scale=scale, enable_gqa=grouped)


@pytest.mark.parametrize("layout", ["BNSD", "BSND", "BSH", "SBH"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_fusion_attention_in_every_layout(layout: str, dtype: torch.dtype) -> None:
    q, k, v = randn(2, 4, 37, 16, dtype=dtype), randn(2, 2, 53, 16, dtype=dtype), randn(2, 2, 53, 16, dtype=dtype)
    order = {"BNSD": (0, 1, 2, 3), "BSND": (0, 2, 1, 3), "BSH": (0, 2, 1, 3), "SBH": (2, 0, 1, 3)}[layout]

    def arranged(x: Tensor) -> Tensor:
        x = x.permute(order)
        return x.flatten(2) if layout.endswith("H") else x

    out, greatest, total, *_ = NPU.npu_fusion_attention(*(arranged(x) for x in (q, k, v)), 4, layout, scale=0.3)
    close(out, arranged(sdpa(q, k, v)))
    scores = 0.3 * q.float() @ k.float().repeat_interleave(2, 1).mT
    close((greatest + total.log())[..., 0], scores.logsumexp(-1))
    close(greatest[..., 7], scores.amax(-1))


ROW, COLUMN = torch.arange(37)[:, None], torch.arange(53)[None, :]
KEEP = torch.rand(2, 4, 37, 53) > 0.4


@pytest.mark.parametrize(
    ("options", "keep"),
    [
        ({"atten_mask": ~KEEP}, KEEP),
        ({"atten_mask": ~KEEP[:, :1]}, KEEP[:, :1]),
        ({"atten_mask": (~KEEP[0, 0]).to(torch.uint8), "sparse_mode": 1, "next_tockens": 0}, KEEP[0, 0]),
        (
            {"atten_mask": ~KEEP, "pre_tockens": 30, "next_tockens": 20},
            KEEP & (COLUMN >= ROW - 30) & (COLUMN <= ROW + 20),
        ),
        ({"atten_mask": TRIANGLE, "sparse_mode": 2}, COLUMN <= ROW),
        ({"atten_mask": TRIANGLE, "sparse_mode": 3}, COLUMN <= ROW + 16),
        (
            {"atten_mask": TRIANGLE, "sparse_mode": 4, "pre_tockens": 5, "next_tockens": 3},
            (COLUMN <= ROW + 16 + 3) & (COLUMN >= ROW + 16 - 5),
        ),
        ({"sparse_mode": 3, "next_tockens": 0}, None),
    ],
    ids=["BNSS", "B1SS", "all", "band-and-mask", "upper-left", "lower-right", "band", "no-mask"],
)
def test_fusion_attention_masks(options: dict[str, Any], keep: Tensor | None) -> None:
    q, k, v = randn(2, 4, 37, 16), randn(2, 4, 53, 16), randn(2, 4, 53, 16)
    close(NPU.npu_fusion_attention(q, k, v, 4, "BNSD", scale=0.3, **options)[0], sdpa(q, k, v, keep))


def test_rows_without_a_key() -> None:
    """0 when the operator is told, or finds them itself in mode 3; open, so NaN, otherwise."""
    q = randn(1, 1, 4, 16)
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1] = True
    out, greatest, total, *_ = NPU.npu_fusion_attention(q, q, q, 1, "BNSD", atten_mask=mask, inner_precise=2)
    assert (out[0, 0, 1] == 0).all()
    assert greatest[0, 0, 1].isnan().all()
    assert total[0, 0, 1].isnan().all()
    close(out[:, :, 2:], sdpa(q, q, q, scale=1.0)[:, :, 2:])
    assert NPU.npu_fusion_attention(q, q, q, 1, "BNSD", atten_mask=mask)[0][0, 0, 1].isnan().all()
    found = NPU.npu_fusion_attention(q, q[:, :, :2], q[:, :, :2], 1, "BNSD", atten_mask=TRIANGLE, sparse_mode=3)[0]
    assert (found[0, 0, :2] == 0).all()


def test_fusion_attention_of_sequences_one_after_the_other() -> None:
    q, k, v = randn(30, 4, 16), randn(40, 2, 16), randn(40, 2, 16)
    ends = {"actual_seq_qlen": [12, 12, 30], "actual_seq_kvlen": [10, 25, 40]}
    options = {"scale": 0.3, "atten_mask": TRIANGLE, "sparse_mode": 3, **ends}
    out, greatest, *_ = NPU.npu_fusion_attention(q, k, v, 4, "TND", softmax_layout="TND", **options)
    parts = []
    for rows, columns in ((slice(0, 12), slice(0, 10)), (slice(12, 30), slice(25, 40))):
        q_one, k_one, v_one = (x[at].transpose(0, 1)[None] for x, at in ((q, rows), (k, columns), (v, columns)))
        q_len, k_len = q_one.shape[2], k_one.shape[2]
        one = sdpa(q_one, k_one, v_one, torch.ones(q_len, k_len).tril(k_len - q_len).bool())
        parts.append(one[0].transpose(0, 1))
    close(out, torch.cat(parts).nan_to_num())
    turned = NPU.npu_fusion_attention(q, k, v, 4, "TND", **options)[1]
    assert torch.equal(turned.reshape(4, 30, 8).transpose(0, 1).nan_to_num(), greatest.nan_to_num())


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_attention_are_torchs(masked: bool) -> None:
    q, k, v = inputs = [randn(2, n, s, 16, grad=True) for n, s in ((4, 37), (2, 53), (2, 53))]
    keep = KEEP if masked else None
    mask = ~KEEP if masked else None
    out = NPU.npu_fusion_attention(*inputs, 4, "BNSD", scale=0.3, atten_mask=mask, inner_precise=2)[0]
    grad = torch.randn_like(out)
    wanted = torch.autograd.grad(sdpa(q, k, v, keep), inputs, grad)
    for got, each in zip(torch.autograd.grad(out, inputs, grad), wanted, strict=True):
        close(got, each)


def test_gradients_of_a_row_without_a_key_are_zero() -> None:
    q = randn(1, 1, 4, 16, grad=True)
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1] = True
    out = NPU.npu_fusion_attention(q, q, q, 1, "BNSD", atten_mask=mask, inner_precise=2)[0]
    (grad,) = torch.autograd.grad(out[:, :, 1].sum(), q)
    assert (grad == 0).all()


@pytest.mark.parametrize(
    ("got", "wanted"),
    [
        (lambda x, w: NPU.npu_rms_norm(x, w)[0], lambda x, w: F.rms_norm(x, (16,), w, 1e-6)),
        (lambda x, w: NPU.npu_rotary_mul(x[None], w.view(1, 1, 1, 16), w.cos().view(1, 1, 1, 16), "interleave")[0],
         lambda x, w: x * w + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * w.cos()),
        (lambda x, w: NPU.npu_swiglu(x * w), lambda x, w: F.silu((x * w)[..., :8]) * (x * w)[..., 8:]),
        (lambda x, w: NPU.npu_fast_gelu(x * w), lambda x, w: x * w * torch.sigmoid(1.702 * x * w)),
    ],
    ids=["rms_norm", "rotary", "swiglu", "fast_gelu"],
)  # fmt: skip
def test_gradients_are_torchs(got: Callable[..., Tensor], wanted: Callable[..., Tensor]) -> None:
    inputs = [randn(3, 5, 16, grad=True), randn(16, grad=True)]
    ours, torchs = (torch.autograd.grad(f(*inputs).sin().sum(), inputs) for f in (got, wanted))
    for one, other in zip(ours, torchs, strict=True):
        close(one, other)


@pytest.mark.parametrize("layout", ["BNSD", "BSND", "BSH", "BNSD_BSND"])
def test_inference_attention(layout: str) -> None:
    q, k, v = (randn(2, n, s, 16, dtype=torch.bfloat16) for n, s in ((4, 37), (2, 53), (2, 53)))

    def arranged(x: Tensor, how: str) -> Tensor:
        return {"BNSD": x, "BSND": x.transpose(1, 2), "BSH": x.transpose(1, 2).flatten(2)}[how].contiguous()

    given, _, returned = layout.partition("_")
    inputs = [arranged(x, given) for x in (q, k, v)]
    heads = {"num_heads": 4, "num_key_value_heads": 2, "input_layout": layout}
    keep = KEEP[:, :1]
    wanted = arranged(sdpa(q, k, v, keep), returned or given)
    close(
        NPU.npu_prompt_flash_attention(*inputs, scale_value=0.3, next_tokens=INT_MAX, atten_mask=~keep, **heads), wanted
    )
    out, lse = NPU.npu_fused_infer_attention_score(*inputs, scale=0.3, atten_mask=~keep, softmax_lse_flag=True, **heads)
    close(out, wanted)
    scores = (0.3 * q.float() @ k.float().repeat_interleave(2, 1).mT).masked_fill(~keep, -torch.inf)
    close(lse, scores.logsumexp(-1, keepdim=True))


def test_inference_attention_that_is_not_told_about_later_keys_sees_none() -> None:
    q = randn(1, 1, 9, 16, dtype=torch.float16)
    got = NPU.npu_prompt_flash_attention(q, q, q, num_heads=1, input_layout="BNSD", scale_value=0.3)
    close(got, sdpa(q, q, q, torch.ones(9, 9).tril().bool()))


def test_inference_attention_with_lengths() -> None:
    q = randn(2, 1, 9, 16, dtype=torch.float16)
    options = {"num_heads": 1, "input_layout": "BNSD", "scale": 0.3, "actual_seq_lengths_kv": [9, 4]}
    got = NPU.npu_fused_infer_attention_score(q, q, q, actual_seq_lengths=[5, 9], **options)[0]
    assert got[0, 0, 5:].isnan().all()
    keep = (torch.arange(9) < torch.tensor([9, 4])[:, None])[:, None, None, :]
    wanted = sdpa(q, q, q, keep)
    close(got[0, :, :5], wanted[0, :, :5])
    close(got[1], wanted[1])


def test_a_single_query_knows_no_modes_and_bounds_in_the_operator_that_decodes_too() -> None:
    q, k = randn(2, 1, 1, 16, dtype=torch.float16), randn(2, 1, 9, 16, dtype=torch.float16)
    keep = torch.rand(2, 9) > 0.4
    options = {"num_heads": 1, "input_layout": "BNSD", "scale": 0.3, "next_tokens": 0, "sparse_mode": 3}
    got = NPU.npu_fused_infer_attention_score(q, k, k, atten_mask=~keep, **options)[0]
    close(got, sdpa(q, k, k, keep[:, None, None]))


def test_laser_attention_masks_the_padded_keys() -> None:
    q, k = randn(1, 2, 256, 128, dtype=torch.float16), randn(1, 2, 512, 128, dtype=torch.float16)
    _, out = MINDIESD.la(q, k, k, None, None, None, 0.3, 2, "BNSD", 1.0, 100, 1, True)
    close(out, sdpa(q, k[:, :, :-100], k[:, :, :-100]))
    close(MINDIESD.la(q, k, k, scale_value=0.3)[1], sdpa(q, k, k))


def block_keep(seen: Tensor, block: tuple[int, int], q_len: int, k_len: int) -> Tensor:
    return seen.bool().repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)[..., :q_len, :k_len]


def test_block_sparse_attention() -> None:
    q, k, v = (randn(2, n, s, 64, dtype=torch.bfloat16) for n, s in ((4, 70), (2, 300), (2, 300)))
    seen = (torch.rand(2, 4, 3, 3) > 0.5).to(torch.int8)
    seen[..., 1] = 1
    options = {"num_key_value_heads": 2, "scale_value": 0.3, "inner_precise": 0, "softmax_lse_flag": 1}
    out, lse = NPU.npu_block_sparse_attention(q, k, v, seen, [32, 128], **BNSD, **options)
    keep = block_keep(seen, (32, 128), 70, 300)
    close(out, sdpa(q, k, v, keep))
    scores = 0.3 * q.float() @ k.float().repeat_interleave(2, 1).mT
    close(lse, scores.masked_fill(~keep, -torch.inf).logsumexp(-1, keepdim=True))
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    lengths = {"actual_seq_lengths": [70, 70], "actual_seq_lengths_kv": [300, 300]}
    close(
        NPU.npu_block_sparse_attention(*flat, seen, [32, 128], **lengths, **options)[0],
        out.transpose(1, 2).flatten(0, 1),
    )


def test_block_sparse_attention_of_mindiesd_is_the_same_formula() -> None:
    q = randn(1, 2, 300, 128, dtype=torch.float16)
    seen = torch.eye(3, dtype=torch.int8).expand(1, 2, 3, 3)
    out = MINDIESD.block_sparse_attention(q, q, q, seen, num_key_value_heads=2, scale_value=0.3)[0]
    close(out, sdpa(q, q, q, block_keep(seen, (128, 128), 300, 300)))


def test_a_block_of_queries_that_sees_no_key_is_open() -> None:
    q = randn(1, 2, 256, 64, dtype=torch.float16)
    seen = torch.tensor([[1, 0], [0, 0]], dtype=torch.int8).expand(1, 2, 2, 2)
    out = NPU.npu_block_sparse_attention(q, q, q, seen, [128, 128], **BNSD, num_key_value_heads=2)[0]
    assert not out[:, :, :128].isnan().any()
    assert out[:, :, 128:].isnan().all()


def test_rainfusion_attention_reads_lists_of_blocks() -> None:
    q = randn(2, 2, 300, 64, dtype=torch.float16)
    seen = (torch.rand(2, 2, 3, 3) > 0.5) | torch.eye(3, dtype=torch.bool)
    rows = seen.transpose(1, 2).flatten(0, 1)
    lists = [[row.nonzero().flatten().tolist() for row in block] for block in rows]
    index = torch.tensor([[each + [-1] * (3 - len(each)) for each in block] for block in lists])
    count = torch.tensor([[len(each) for each in block] for block in lists])
    options = {"actual_seq_qlen": [300, 300], "actual_seq_kvlen": [300, 300], "head_num": 2, "scale": 0.3}
    out = MINDIESD.rainfusionattention(q, q, q, index, count, [128, 128], **BNSD, **options)[0]
    close(out, sdpa(q, q, q, block_keep(seen, (128, 128), 300, 300)))
    flat = q.transpose(1, 2).flatten(0, 1)
    tokens = MINDIESD.rainfusionattention(flat, flat, flat, index, count, [128, 128], **options)[0]
    close(tokens, out.transpose(1, 2).flatten(0, 1))


def test_partial_results_are_merged_to_the_whole() -> None:
    q, k, v = randn(2, 4, 9, 16), randn(2, 4, 20, 16), randn(2, 4, 20, 16)
    halves = [
        NPU.npu_fusion_attention(q, k[:, :, part], v[:, :, part], 4, "BNSD", scale=0.3)
        for part in (slice(0, 8), slice(8, 20))
    ]
    wanted = sdpa(q, k, v)
    lses = [(greatest + total.log())[..., 0].flatten() for _, greatest, total, *_ in halves]
    merged, whole = NPU.npu_attention_update(lses, [out.flatten(0, 2) for out, *_ in halves], 1)
    close(merged, wanted.flatten(0, 2))
    close(whole, (0.3 * q @ k.mT).logsumexp(-1).flatten())
    parts = [(out.permute(2, 0, 1, 3).flatten(2), greatest, total) for out, greatest, total, *_ in halves]
    rung, greatest, total = NPU.npu_ring_attention_update(*parts[0], *parts[1])
    close(rung, wanted.permute(2, 0, 1, 3).flatten(2))
    close((greatest + total.log())[..., 0].flatten(), whole)
