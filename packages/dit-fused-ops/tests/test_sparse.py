"""sparse_attention and its backends, against torch's attention under the mask of the kept tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dit_fused_ops.dispatch import dispatcher
from dit_fused_ops.errors import BackendRefused, ParametersInvalid
from dit_fused_ops.sparse import BLOCK_SPARSE, DENSE_FROM, block_sparse_attention_naive, sparse_attention
from dit_fused_ops.sparse.backends import kept_lists
from dit_fused_ops.sparse.call import SparseCall, describe
from dit_fused_ops.sparse.selection import kept_count, select_blocks, video_blocks
from dit_fused_ops.sparse.tiles import token_order

# In units of the largest number of the output. float32: sums of 10^3 terms in another order. The others round the
# weights and the output once: two units in the last place, 2^-8 of bfloat16 and 2^-11 of float16.
BOUND = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}

# Frames, height, width and text: whole tiles, tiles with a remainder, text that begins inside a block, no text, one
# frame, less than a tile.
VIDEOS = [((4, 16, 16), 128), ((6, 12, 20), 50), ((5, 9, 17), 0), ((1, 24, 24), 300), ((90, 3, 5), 7)]

GENERAL = ("gather", "masked_sdpa", "naive")


def qkv(
    latent: tuple[int, int, int], txt_len: int, *, kv_heads: int = 2, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Two batch entries, two heads of 16 channels."""
    torch.manual_seed(latent[1])
    tokens = latent[0] * latent[1] * latent[2] + txt_len
    q, k, v = (torch.randn(2, heads, tokens, 16) for heads in (2, kv_heads, kv_heads))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def video(latent: tuple[int, int, int], txt_len: int, sparsity: float = 0.8, **more: Any) -> dict[str, Any]:
    """The arguments of a sparse call."""
    shapes = {"latent_shape_q": latent, "latent_shape_k": latent}
    return {"sparse_type": "rf_v2", "txt_len": txt_len, "sparsity": sparsity, **shapes, **more}


def kept_tokens(
    q: Tensor, k: Tensor, latent: tuple[int, int, int], txt_len: int, sparsity: float, legacy: bool = False
) -> Tensor:
    """The kept pairs of tokens, in the given order of tokens."""
    side = video_blocks(latent, txt_len, 128, legacy=legacy)
    order = token_order(latent, txt_len)
    kept = kept_count(side.count, sparsity, legacy=legacy)
    mask = select_blocks(q[:, :, order], k[:, :, order], side, side, scale=0.25, kept=kept, legacy=legacy)
    block_of_token = order.argsort() // 128
    return mask[:, :, block_of_token][..., block_of_token]


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """torch's dense attention in float64."""
    k, v = (x.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q.double(), k, v, mask)


def under_a_mask(
    q: Tensor, k: Tensor, v: Tensor, latent: tuple[int, int, int], txt_len: int, sparsity: float, legacy: bool = False
) -> Tensor:
    """Dense attention in the given order of tokens under the mask of the kept pairs."""
    return dense(q, k, v, kept_tokens(q, k, latent, txt_len, sparsity, legacy))


def sparse(q: Tensor, k: Tensor, v: Tensor, **asked: Any) -> Tensor:
    """`sparse_attention` without the density."""
    output = sparse_attention(q, k, v, **asked)
    assert isinstance(output, Tensor)
    return output


def assert_close(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    assert got.shape == wanted.shape
    assert (got.double() - wanted.double()).abs().max() <= BOUND[dtype] * wanted.abs().max()


@pytest.mark.parametrize("backend", GENERAL)
@pytest.mark.parametrize(("latent", "txt_len"), VIDEOS)
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_every_backend_attends_to_the_kept_tokens(
    latent: tuple[int, int, int], txt_len: int, kv_heads: int, backend: str
) -> None:
    q, k, v = qkv(latent, txt_len, kv_heads=kv_heads)
    got = sparse(q, k, v, **video(latent, txt_len), backend=backend)
    assert_close(got, under_a_mask(q, k, v, latent, txt_len, 0.8), torch.float32)


@pytest.mark.parametrize("backend", GENERAL)
@pytest.mark.parametrize("dtype", list(BOUND))
def test_every_dtype(dtype: torch.dtype, backend: str) -> None:
    latent, txt_len = VIDEOS[1]
    q, k, v = qkv(latent, txt_len, dtype=dtype)
    got = sparse(q, k, v, **video(latent, txt_len), backend=backend)
    assert_close(got, under_a_mask(q, k, v, latent, txt_len, 0.8), dtype)


@pytest.mark.parametrize("sparse_type", ["rf_v2", "rf_v3"])
def test_both_layouts_and_both_types_are_the_same_computation(sparse_type: str) -> None:
    latent, txt_len = VIDEOS[1]
    q, k, v = qkv(latent, txt_len)
    asked = video(latent, txt_len, sparse_type=sparse_type)
    got = sparse(q, k, v, **asked)
    q_BSND, k_BSND, v_BSND = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    other = sparse(q_BSND, k_BSND, v_BSND, input_layout="BSND", **asked)
    assert torch.equal(other.transpose(1, 2), got)
    assert_close(got, under_a_mask(q, k, v, latent, txt_len, 0.8), torch.float32)


def test_queries_and_keys_of_two_videos() -> None:
    latent_q, latent_k, txt_len = (2, 12, 20), (5, 16, 9), 30
    q = qkv(latent_q, txt_len)[0]
    _, k, v = qkv(latent_k, txt_len)
    asked = {**video(latent_q, txt_len), "latent_shape_k": latent_k}
    sides = [video_blocks(latent, txt_len, 128) for latent in (latent_q, latent_k)]
    orders = [token_order(latent, txt_len) for latent in (latent_q, latent_k)]
    kept = kept_count(sides[1].count, 0.8)
    mask = select_blocks(q[:, :, orders[0]], k[:, :, orders[1]], sides[0], sides[1], scale=0.25, kept=kept)
    rows, columns = (order.argsort() // 128 for order in orders)
    wanted = dense(q, k, v, mask[:, :, rows][..., columns])
    for backend in GENERAL:
        got = sparse(q, k, v, **asked, backend=backend)
        assert_close(got, wanted, torch.float32)


def test_each_batch_entry_selects_for_itself_unless_legacy() -> None:
    latent, txt_len = VIDEOS[0]
    q, k, v = qkv(latent, txt_len)
    asked = video(latent, txt_len, sparsity=0.9)
    alone = torch.cat([sparse(q[i : i + 1], k[i : i + 1], v[i : i + 1], **asked) for i in range(2)])
    assert_close(sparse(q, k, v, **asked), alone, torch.float32)
    legacy = sparse(q, k, v, **asked, legacy=True)
    assert_close(legacy, under_a_mask(q, k, v, latent, txt_len, 0.9, legacy=True), torch.float32)
    assert not torch.allclose(legacy[1], alone[1], atol=1e-2)


@pytest.mark.parametrize("backend", [*GENERAL, None])
def test_without_sparsity_it_is_dense_attention(backend: str | None) -> None:
    latent, txt_len = VIDEOS[1]
    q, k, v = qkv(latent, txt_len)
    got, share = sparse_attention(q, k, v, **video(latent, txt_len, 0.0), backend=backend, return_density=True)
    assert share.item() == pytest.approx(1)
    assert_close(got, dense(q, k, v), torch.float32)


def test_everything_left_out_still_leaves_text_and_first_frame() -> None:
    latent = (16, 8, 16)
    q, k, v = qkv(latent, 0)
    got, share = sparse_attention(q, k, v, **video(latent, 0, 1.0), return_density=True)
    assert_close(got, under_a_mask(q, k, v, latent, 0, 1.0), torch.float32)
    # 16 blocks: the first keeps 16, each other one the first and at most one more.
    assert (16 + 15) / 256 <= share.item() <= (16 + 30) / 256


def test_dense_is_computed_where_most_is_kept_anyway() -> None:
    latent = (4, 16, 16)
    q, k, v = qkv(latent, 0)
    # 8 blocks, 2 of them of the first frame: 4 kept are a share of at least 1/4 + 3/4 · 4/8 = 0.625, 3 of 0.53.
    assert 0.53 < DENSE_FROM <= 0.625
    got, share = sparse_attention(q, k, v, **video(latent, 0, 4 / 8), return_density=True)
    assert share.item() == 1
    assert_close(got, dense(q, k, v), torch.float32)
    got, share = sparse_attention(q, k, v, **video(latent, 0, 5 / 8), return_density=True)
    assert share.item() < 1
    _, named = sparse_attention(q, k, v, **video(latent, 0, 4 / 8), return_density=True, backend="naive")
    assert named.item() < 1, "a backend that is asked for by name does it"
    _, legacy = sparse_attention(q, k, v, **video(latent, 0, 4 / 8), return_density=True, legacy=True)
    assert legacy.item() < 1


@pytest.mark.parametrize("layout", ["BNSD", "BSND"])
def test_without_a_type_it_is_attention_with_mask_and_causal(layout: str) -> None:
    q, k, v = qkv((2, 5, 7), 3)
    keep = torch.rand(q.shape[2], k.shape[2]) > 0.3
    given = [x if layout == "BNSD" else x.transpose(1, 2) for x in (q, k, v)]
    cases: list[tuple[dict[str, Any], Tensor]] = [
        ({"attn_mask": keep, "scale": 0.3}, F.scaled_dot_product_attention(q, k, v, keep, scale=0.3)),
        ({"is_causal": True}, F.scaled_dot_product_attention(q, k, v, is_causal=True)),
    ]
    for asked, wanted in cases:
        got, share = sparse_attention(given[0], given[1], given[2], input_layout=layout, return_density=True, **asked)
        assert_close(got if layout == "BNSD" else got.transpose(1, 2), wanted, torch.float32)
        assert share.item() == 1


def test_the_reference_of_a_mask_by_hand() -> None:
    """One channel and scale 0: each query gets the mean of the values that it keeps."""
    q = torch.ones(1, 1, 5, 1)
    v = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]).view(1, 1, 5, 1)
    mask = torch.tensor([[1, 0, 0], [0, 1, 1], [0, 0, 0]]).bool()[None, None]
    got = block_sparse_attention_naive(q, q, v, mask, scale=0.0, block_size=2)
    assert got.flatten().tolist() == pytest.approx([1.5, 1.5, 28 / 3, 28 / 3, 0.0])


@pytest.mark.parametrize("backend", GENERAL)
def test_a_block_of_queries_that_keeps_nothing_gives_zero(backend: str) -> None:
    q, k, v = qkv((1, 16, 20), 0)
    mask = torch.rand(2, 2, 3, 3) > 0.5
    mask[0, 1, 2] = False
    call = describe((q, k, v, mask), (0.25, 128, 0, 0.5))
    chosen = BLOCK_SPARSE.backend(backend)
    assert chosen is not None
    got = chosen.run(call, q, k, v, mask)
    assert not got[0, 1, 256:].any()
    by_token = mask.repeat_interleave(128, 2).repeat_interleave(128, 3)[:, :, :320, :320]
    wanted = dense(q, k, v, by_token).nan_to_num()
    assert_close(got, wanted, torch.float32)


@pytest.mark.parametrize("backend", GENERAL)
def test_gradients_are_those_of_masked_attention(backend: str) -> None:
    latent, txt_len = (9, 9, 17), 50
    q, k, v = (x.requires_grad_() for x in qkv(latent, txt_len, kv_heads=1, dtype=torch.float64))
    weight = torch.randn_like(q)
    wanted = torch.autograd.grad((under_a_mask(q, k, v, latent, txt_len, 0.7) * weight).sum(), (q, k, v))
    output = sparse(q, k, v, **video(latent, txt_len, 0.7), backend=backend)
    got = torch.autograd.grad((output * weight).sum(), (q, k, v))
    for mine, theirs in zip(got, wanted, strict=True):
        assert_close(mine, theirs, torch.float64)


# torch's compiler brings torch.utils.mkldnn, which is made with what torch itself calls deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_flex_attention_compiled() -> None:
    latent, txt_len = VIDEOS[1]
    q, k, v = qkv(latent, txt_len, kv_heads=1)
    got = sparse(q, k, v, **video(latent, txt_len), backend="flex_cpu")
    assert_close(got, under_a_mask(q, k, v, latent, txt_len, 0.8), torch.float32)
    with pytest.raises(BackendRefused, match=r"it has no gradient.*These can: gather, masked_sdpa, naive"):
        sparse_attention(q.requires_grad_(), k, v, **video(latent, txt_len), backend="flex_cpu")


def test_torch_compile_sees_one_graph() -> None:
    latent, txt_len = VIDEOS[1]
    q, k, v = qkv(latent, txt_len)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sparse(q, k, v, **video(latent, txt_len))

    got = torch.compile(attend, fullgraph=True, backend="aot_eager")(q, k, v)
    assert_close(got, under_a_mask(q, k, v, latent, txt_len, 0.8), torch.float32)


def test_torch_func_sees_through_it() -> None:
    latent, txt_len = (9, 9, 17), 50
    q, k, v = qkv(latent, txt_len, dtype=torch.float64)
    got = torch.func.grad(lambda q: sparse(q, k, v, **video(latent, txt_len, 0.7)).square().sum())(q)
    q.requires_grad_()
    (wanted,) = torch.autograd.grad(under_a_mask(q, k, v, latent, txt_len, 0.7).square().sum(), q)
    assert_close(got, wanted, torch.float64)


def test_autocast_lowers_the_attention_and_not_the_selection() -> None:
    latent, txt_len = VIDEOS[1]
    q, k, v = qkv(latent, txt_len)
    with torch.autocast("cpu", torch.bfloat16):
        got = sparse(q, k, v, **video(latent, txt_len))
    kept = kept_tokens(q, k, latent, txt_len, 0.8)
    assert_close(got, dense(q.bfloat16(), k.bfloat16(), v.bfloat16(), kept), torch.bfloat16)


def test_a_search_finds_every_backend_right() -> None:
    latent, txt_len = VIDEOS[1]
    q, k, v = qkv(latent, txt_len)
    with dispatcher.configured(mode="runtime"):
        got = sparse(q, k, v, **video(latent, txt_len))
        (decision,) = dispatcher.store._read().values()
    assert {name for name, _ in decision.ranking} == {"gather", "masked_sdpa"}
    assert not decision.rejected
    assert_close(got, under_a_mask(q, k, v, latent, txt_len, 0.8), torch.float32)


def test_kept_lists_are_ascending_and_padded() -> None:
    index, count = kept_lists(torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]]).bool()[None, None])
    assert index[0, 0].tolist() == [[0, 2, 3, -1], [-1, -1, -1, -1], [1, -1, -1, -1]]
    assert count[0, 0].tolist() == [3, 0, 1]
    assert index.dtype == count.dtype == torch.int64


def npu_call(**changes: Any) -> SparseCall:
    """A call that both of the vendor's ops take, but for the device, which torch alone cannot name."""
    fields = {
        "device": torch.device("cpu"),
        "dtype": torch.bfloat16,
        "needs_grad": False,
        "q_shape": (1, 2, 300, 128),
        "k_shape": (1, 2, 300, 128),
        "block_size": 128,
        "scale": 1.0,
        "inner_precise": 0,
        "density": 0.2,
        **changes,
    }
    return SparseCall(**fields)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("npu_block_sparse_attention", {"q_shape": (1, 2, 300, 96)}, "64 or 128"),
        ("npu_block_sparse_attention", {"dtype": torch.float32}, "bfloat16, float16"),
        ("npu_block_sparse_attention", {"inner_precise": 1}, "inner_precise=0"),
        ("npu_block_sparse_attention", {"needs_grad": True, "k_shape": (1, 1, 300, 128)}, "for a gradient"),
        ("npu_block_sparse_attention", {}, "torch_npu is not installed"),
        ("rainfusionattention", {"k_shape": (1, 1, 300, 128)}, "equally many heads"),
        ("rainfusionattention", {"inner_precise": 1}, "inner_precise=0"),
        ("rainfusionattention", {"needs_grad": True}, "no gradient"),
        ("rainfusionattention", {}, "mindiesd is not installed"),
    ],
)
def test_the_vendors_ops_say_what_they_cannot_do(
    name: str, changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    backend = BLOCK_SPARSE.backend(name)
    assert backend is not None
    assert backend.devices == frozenset({"npu"})
    refused = replace(backend, devices=None).refuses(npu_call(**changes))
    assert refused is not None
    assert reason in refused


LATENT, TXT = (6, 12, 20), 50


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparse_type": "rf_v9"}, r"sparse_type must be None, 'rf_v2' or 'rf_v3', but got rf_v9"),
        ({"sparse_type": "ada_bsa"}, r"'ada_bsa' is not implemented; legal are None, 'rf_v2' and 'rf_v3'"),
        ({"input_layout": "SBH"}, r"input_layout must in \['BSND', 'BNSD'\], but got SBH"),
        (
            {"latent_shape_q": None},
            r"latent_shape_q is None.*\(frames, height, width\).*txt_len=50 are the 1490 tokens",
        ),
        ({"latent_shape_k": None}, r"latent_shape_k is None"),
        ({"latent_shape_q": (6, 240)}, r"\(6, 240\), legal are three positive integers"),
        ({"latent_shape_q": (6, 12, 0)}, r"\(6, 12, 0\), legal are three positive"),
        ({"latent_shape_q": (6, 12, 21)}, r"\(6, 12, 21\) and txt_len=50 are 50 \+ 1512 tokens, q has 1490; pass"),
        ({"txt_len": -1}, r"txt_len is -1, legal is"),
        ({"block_size": 100}, r"block_size is 100, legal are multiples of 128"),
        ({"sparsity": 1.5}, r"sparsity is 1.5, legal is the share of blocks to leave out, 0 to 1"),
        ({"sparsity": float("nan")}, r"sparsity is nan"),
        ({"scale": "half"}, r"scale is 'half', legal are None and numbers"),
        ({"head_num": 3}, r"head_num is 3, and q has 2 heads in BNSD; leave it out"),
        ({"inner_precise": 4}, r"inner_precise is 4, legal are 0 and 1"),
        ({"precision": "fp8"}, r"precision is 'fp8', only 'bf16'"),
        ({"is_causal": True}, r"is_causal is given, and a sparse type takes none; pass it with sparse_type=None"),
        ({"attn_mask": torch.ones(1490, 1490).bool()}, r"attn_mask is given"),
        ({"video_spans": [(0, 1440)]}, r"video_spans is \[\(0, 1440\)\], and is not implemented"),
        ({"cdf_threshold": 0.9}, r"cdf_threshold=0.9 are given, and rf_v2 has no use for them"),
        ({"keep_sink": False}, r"keep_sink=False"),
    ],
)
def test_what_is_wrong_is_refused_with_the_remedy(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ParametersInvalid, match=message):
        sparse_attention(*qkv(LATENT, TXT), **{**video(LATENT, TXT), **changes})


def test_tensors_that_do_not_fit_are_refused() -> None:
    q, k, v = qkv(LATENT, TXT)
    asked = video(LATENT, TXT)
    with pytest.raises(ParametersInvalid, match=r"q must be a Tensor, given list"):
        sparse_attention([q], k, v, **asked)  # type: ignore[arg-type]
    with pytest.raises(ParametersInvalid, match=r"k must be 4-D, given the shape \[2, 1490, 16\]"):
        sparse_attention(q, k[:, 0], v, **asked)
    with pytest.raises(ParametersInvalid, match=r"\[2, 2, 1490, 16\], \[2, 2, 1490, 8\].*k and v must be alike"):
        sparse_attention(q, k[..., :8], v, **asked)
    with pytest.raises(ParametersInvalid, match=r"one dtype, given torch.float32, torch.float16 and torch.float32"):
        sparse_attention(q, k.half(), v, **asked)
    assert sparse(q, k, v, **{**asked, "head_num": 2}).shape == q.shape, "the true number of heads is fine"
