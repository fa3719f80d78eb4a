"""dit-fused-ops beside MindIE SD: the same names, arguments, results and errors.

MindIE SD runs on the stub: without its kernels where it can, else with the vendor's formulas in place of its kernels
(`semantics`), so that its own preparation of the calls is compared too. What differs on purpose stands at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dit_fused_ops as ours
from npu import peer
from npu.semantics import installed

# MindIE SD computes in the dtype of its tensors, we in float32. float32: a few roundings of sums of some hundred terms.
# Halves: each of its up to four steps (scale, product, softmax, product) rounds numbers of size 1 to 8 bits (bfloat16)
# or 11 (float16); errors of whole rows add up like a random walk.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 8e-3, torch.bfloat16: 6e-2}
FLOATS = tuple(TOLERANCE)


@pytest.fixture
def mindiesd() -> Iterator[ModuleType]:
    """MindIE SD, on the vendor's formulas."""
    torch.manual_seed(0)
    peer.module("mindiesd.layers.scale_shift")
    with installed(), peer.quiet() as found:
        yield found


def close(got: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(got, theirs, rtol=0, atol=TOLERANCE[theirs.dtype] * max(1, float(theirs.abs().max())))


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("head_first", [False, True])
@pytest.mark.parametrize("mode", ["rotated_half", "rotated_interleaved"])
def test_rotation(mindiesd: ModuleType, mode: str, head_first: bool, fused: bool, dtype: torch.dtype) -> None:
    x = randn(2, 3, 5, 16, dtype=dtype)
    angle = torch.randn(5 if head_first else 3, 8)
    wide = torch.cat((angle, angle), -1) if mode == "rotated_half" else angle.repeat_interleave(2, -1)
    for tables in (torch.float32, dtype):
        cos, sin = wide.cos().to(tables), wide.sin().to(tables)
        shape = (1, 1, 5, 16) if head_first else (1, 3, 1, 16)
        for one, other in ((cos, sin), (cos.view(shape), sin.view(shape))):
            arguments = (x, one, other, mode, head_first, fused)
            got = ours.rotary_position_embedding(*arguments)
            assert isinstance(got, Tensor)
            close(got, mindiesd.rotary_position_embedding(*arguments))


KERNELS: list[dict[str, Any]] = [
    {"fused": False},
    {"opt_mode": "static"},
    *({"opt_mode": "manual", "op_type": "fused_attn_score", "layout": layout} for layout in ("BNSD", "BSND", "BSH")),
    *({"opt_mode": "manual", "op_type": "prompt_flash_attn", "layout": layout} for layout in ("BNSD", "BSND", "BSH")),
]
# Its inference kernel is for halves and for contiguous tensors, to which MindIE SD does not bring them.
ATTENTION = [
    pytest.param(how, head_first, dtype, id="-".join(map(str, (*how.values(), head_first, dtype))))
    for how in KERNELS
    for head_first in (False, True)
    for dtype in FLOATS
    if how.get("op_type") != "prompt_flash_attn"
    or (dtype != torch.float32 and how["layout"] in ("BSH", "BNSD" if head_first else "BSND"))
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("how", "head_first", "dtype"), ATTENTION)
def test_attention(
    mindiesd: ModuleType, how: dict[str, Any], head_first: bool, masked: bool, dtype: torch.dtype
) -> None:
    sizes = ((2, 4, s, 16) if head_first else (2, s, 4, 16) for s in (37, 53, 53))
    q, k, v = (randn(*size, dtype=dtype) for size in sizes)
    mask = torch.rand(37, 53) > 0.5 if masked else None
    theirs = mindiesd.attention_forward(q, k, v, attn_mask=mask, scale=0.3, head_first=head_first, **how)
    fused = how.get("fused", True)
    got = ours.attention_forward(q, k, v, attn_mask=mask, scale=0.3, head_first=head_first, fused=fused)
    assert isinstance(got, Tensor)
    close(got, theirs)


@pytest.mark.parametrize("tokens", [2048, 2050])
def test_laser_attention(mindiesd: ModuleType, tokens: int) -> None:
    q, k, v = (randn(1, 1, tokens, 64, dtype=torch.float16) for _ in range(3))
    how = {"opt_mode": "manual", "op_type": "ascend_laser_attention", "layout": "BNSD"}
    got = ours.attention_forward(q, k, v, head_first=True)
    assert isinstance(got, Tensor)
    close(got, mindiesd.attention_forward(q, k, v, head_first=True, **how))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_attention_of_sequences(mindiesd: ModuleType, causal: bool, dtype: torch.dtype) -> None:
    q, k, v = randn(30, 4, 16, dtype=dtype), randn(50, 4, 16, dtype=dtype), randn(50, 4, 16, dtype=dtype)
    bounds = ([0, 12, 30], [0, 15, 50])
    got = ours.attention_forward_varlen(q, k, v, *bounds, causal=causal)
    assert isinstance(got, Tensor)
    close(got, mindiesd.attention_forward_varlen(q, k, v, *bounds, causal=causal))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_norms(mindiesd: ModuleType, dtype: torch.dtype) -> None:
    x, weight, bias = randn(2, 5, 48, dtype=dtype), randn(48, dtype=dtype), randn(48, dtype=dtype)
    norm = nn.LayerNorm(48, eps=1e-6, dtype=dtype)
    norm.weight, norm.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
    plain = nn.LayerNorm(48, eps=1e-6, elementwise_affine=False)
    for fused in (False, True):
        close(ours.fast_layernorm(norm, x, fused=fused), mindiesd.fast_layernorm(norm, x, fused=fused))
        for along in ((2, 48), (2, 1, 48), (2, 5, 48)):
            scale, shift = randn(*along, dtype=dtype), randn(*along, dtype=dtype)
            for each in (norm, plain):
                arguments = (each, x, scale, shift, fused)
                close(ours.layernorm_scale_shift(*arguments), mindiesd.layernorm_scale_shift(*arguments))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rms_norm(mindiesd: ModuleType, dtype: torch.dtype) -> None:
    x = randn(2, 5, 48, dtype=dtype)
    one, other = ours.RMSNorm(48, eps=1e-5), mindiesd.RMSNorm(48, eps=1e-5)
    other.load_state_dict(one.state_dict())
    with torch.no_grad():
        close(one(x), other(x))
        unfused = other(x, if_fused=False)
        assert one(x, if_fused=False).dtype == dtype  # theirs is float32 where the weight is
        close(one(x, if_fused=False).float(), unfused.to(dtype).float())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", ["swish", "silu", "mish", "gelu", "relu", "gelu-tanh", "gelu-fast", "GELU-Tanh"])
def test_activations(mindiesd: ModuleType, name: str, dtype: torch.dtype) -> None:
    x = 3 * randn(4, 50, dtype=dtype)
    close(ours.get_activation_layer(name)(x), mindiesd.get_activation_layer(name)(x))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gates_and_shifts(mindiesd: ModuleType, dtype: torch.dtype) -> None:
    layers, gathers = peer.module("mindiesd.layers"), peer.module("mindiesd.layers.scale_shift")
    x, y, z = (randn(2, 5, 48, dtype=dtype) for _ in range(3))
    one, table, other = z[:, :1], randn(3, 48, dtype=dtype), randn(3, 48, dtype=dtype)
    indices = torch.tensor([0, 2, 1, 1, 0])
    close(ours.muls_add(x, y, 1.5), layers.muls_add(x, y, 1.5))
    close(ours.swiglu(x), gathers.swiglu(x))
    for factor in (z, one):
        close(ours.residual_gate_add(x, y, factor), layers.residual_gate_add(x, y, factor))
        close(ours.scale_shift(x, factor, factor), gathers.scale_shift(x, factor, factor))
    close(ours.gather_scale_shift(x, table, other, indices), gathers.gather_scale_shift(x, table, other, indices))
    close(ours.gather_residual_gate(x, y, table, indices), gathers.gather_residual_gate(x, y, table, indices))


def video(frames: int, height: int, width: int, text: int) -> Tensor:
    """Tokens of one sample [1, 2, S, 128] whose blocks differ clearly: a tie in their scores is decided by rounding."""
    tokens = torch.randn(1, 2, frames, -(-height // 8), -(-width // 8), 128)
    tiled = tokens.repeat_interleave(8, 3)[:, :, :, :height].repeat_interleave(8, 4)[..., :width, :]
    whole = torch.cat((torch.randn(1, 2, text, 128), tiled.flatten(2, 4)), 2)
    return (whole + 0.1 * torch.randn(whole.shape)).half()


@pytest.mark.parametrize("latent", [(4, 16, 16), (2, 8, 24), (5, 10, 9)], ids=str)
@pytest.mark.parametrize("text", [0, 30, 128])
@pytest.mark.parametrize("layout", ["BNSD", "BSND"])
@pytest.mark.parametrize("sparse_type", ["rf_v2", "rf_v3"])
def test_sparse_attention(
    mindiesd: ModuleType, sparse_type: str, layout: str, text: int, latent: tuple[int, int, int]
) -> None:
    q, k, v = (video(*latent, text) for _ in range(3))
    if layout == "BSND":
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    options: dict[str, Any] = {"txt_len": text, "latent_shape_q": latent, "latent_shape_k": latent, "sparsity": 0.6}
    how = {"head_num": 2, "input_layout": layout, "sparse_type": sparse_type, **options}
    got = ours.sparse_attention(q, k, v, legacy=True, **how)
    assert isinstance(got, Tensor)
    close(got, mindiesd.sparse_attention(q, k, v, **how))


def test_attention_through_sparse_attention_without_a_sparse_type(mindiesd: ModuleType) -> None:
    q, k, v = (randn(2, 2, 30, 64) for _ in range(3))
    got = ours.sparse_attention(q, k, v, head_num=2, scale=0.3)
    assert isinstance(got, Tensor)
    close(got, mindiesd.sparse_attention(q, k, v, head_num=2, scale=0.3))


X, TABLE = torch.ones(2, 3, 5, 8), torch.ones(3, 8)
LAYER_NORM = nn.LayerNorm(8, elementwise_affine=False)
H, VECTOR = torch.ones(2, 5, 8), torch.ones(2, 8)
T, BOUNDS = torch.ones(4, 2, 8), [0, 4]
# What is wrong, the call of either package, and the words that both messages have.
ERRORS: list[tuple[str, Callable[[Any], object], str]] = [
    ("x no tensor", lambda m: m.rotary_position_embedding(1, TABLE, TABLE), ""),
    ("cos no tensor", lambda m: m.rotary_position_embedding(X, 1, TABLE), ""),
    ("mode no string", lambda m: m.rotary_position_embedding(X, TABLE, TABLE, 1), ""),
    ("head_first no bool", lambda m: m.rotary_position_embedding(X, TABLE, TABLE, head_first=1), ""),
    ("fused no bool", lambda m: m.rotary_position_embedding(X, TABLE, TABLE, fused=1), ""),
    ("rank of x", lambda m: m.rotary_position_embedding(X[0], TABLE, TABLE), ""),
    ("rank of cos", lambda m: m.rotary_position_embedding(X, TABLE[0], TABLE[0]), ""),
    ("ranks of tables", lambda m: m.rotary_position_embedding(X, TABLE, TABLE[None, :, None]), ""),
    ("mode", lambda m: m.rotary_position_embedding(X, TABLE, TABLE, "rotated"), "Unsupported rotated_mode"),
    ("query no tensor", lambda m: m.attention_forward(1, X, X), ""),
    ("rank of query", lambda m: m.attention_forward(X[0], X, X), ""),
    ("attention fused", lambda m: m.attention_forward(X, X, X, fused=1), ""),
    ("mask no tensor", lambda m: m.attention_forward(X, X, X, attn_mask=1), ""),
    ("scale no number", lambda m: m.attention_forward(X, X, X, scale="1"), ""),
    (
        "shape of mask",
        lambda m: m.attention_forward(X, X, X, attn_mask=torch.ones(2, 2), fused=False),
        "The attn_mask must be a 2D tensor",
    ),
    (
        "kernel",
        lambda m: m.attention_forward(X, X, X, opt_mode="manual", op_type="none", layout="BNSD"),
        "Unsupported FA type",
    ),
    (
        "max_seqlen",
        lambda m: m.attention_forward_varlen(T, T, T, BOUNDS, BOUNDS, 4, 4),
        "Unsupported parameters in varlen attention",
    ),
    (
        "window",
        lambda m: m.attention_forward_varlen(T, T, T, BOUNDS, BOUNDS, window_size=(1, 1)),
        "Unsupported parameters in varlen attention",
    ),
    (
        "dropout",
        lambda m: m.attention_forward_varlen(T, T, T, BOUNDS, BOUNDS, dropout_p=0.1),
        "dropout_p should be set to 0.0",
    ),
    ("rank of q", lambda m: m.attention_forward_varlen(T[None], T, T, BOUNDS, BOUNDS), "to be 3D"),
    (
        "rank of hidden states",
        lambda m: m.RMSNorm(8)(torch.ones(8)),
        "The input dimension should be greater than 1 and less than 9",
    ),
    ("impl_mode", lambda m: m.fast_layernorm(LAYER_NORM, H, impl_mode=3), "Expected impl_mode to be in [0, 1, 2]"),
    (
        "impl_mode 2",
        lambda m: m.fast_layernorm(LAYER_NORM, H, impl_mode=2),
        "only support all input dtype float16!",
    ),
    ("no layer norm", lambda m: m.layernorm_scale_shift(1, H, VECTOR, VECTOR), ""),
    ("scale no tensor", lambda m: m.layernorm_scale_shift(LAYER_NORM, H, 1, VECTOR), ""),
    ("rank of hidden", lambda m: m.layernorm_scale_shift(LAYER_NORM, H[0], VECTOR, VECTOR), ""),
    ("rank of scale", lambda m: m.layernorm_scale_shift(LAYER_NORM, H, VECTOR[0], VECTOR), ""),
    ("tokens of scale", lambda m: m.layernorm_scale_shift(LAYER_NORM, H, H[:, :3], H[:, :3]), ""),
    ("width of scale", lambda m: m.layernorm_scale_shift(LAYER_NORM, H, VECTOR[:, :4], VECTOR[:, :4]), ""),
    ("activation", lambda m: m.get_activation_layer("none"), "Unsupported activation function"),
    ("layout", lambda m: m.sparse_attention(X, X, X, input_layout="BSH"), ""),
    ("sparse type", lambda m: m.sparse_attention(X, X, X, sparse_type="none"), ""),
]


@pytest.mark.parametrize(("call", "words"), [row[1:] for row in ERRORS], ids=[row[0] for row in ERRORS])
def test_errors(mindiesd: ModuleType, call: Callable[[Any], object], words: str) -> None:
    raised = []
    for package in (mindiesd, ours):
        with pytest.raises(Exception, match=r"^\[MIE06E000001\] Parameters invalid\. ") as found:
            call(package)
        assert type(found.value).__name__ == "ParametersInvalid"
        raised.append(str(found.value))
    assert all(words in message for message in raised), raised


def test_what_is_mended(mindiesd: ModuleType) -> None:
    """MindIE SD's failures that a user of ours does not meet."""
    q, k = randn(2, 4, 5, 16), randn(2, 2, 5, 16)
    mask = torch.rand(2, 1, 5, 5) > 0.3
    with pytest.raises(RuntimeError):
        mindiesd.attention_forward(q, q, q, attn_mask=mask, head_first=True, fused=False)
    with pytest.raises(RuntimeError):
        mindiesd.attention_forward(q, k, k, head_first=True, fused=False)
    assert mindiesd.attention_forward(q, q, q, attn_mask=mask[0, 0] & False, head_first=True, fused=False).isnan().all()
    got = ours.attention_forward(q, k, k, attn_mask=mask & False, head_first=True)
    assert isinstance(got, Tensor)
    assert (got == 0).all()
