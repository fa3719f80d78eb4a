"""The CPU kernels for the vendor's operators: their schemas, shapes and refusals, and how they come and go."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from npu import peer
from npu.fake_npu import on_npu, shapes
from npu.semantics import SEMANTICS, Semantic, installed
from npu.semantics_refusal import NotModelled, VendorRefuses

NPU, MINDIESD = torch.ops.npu, torch.ops.mindiesd
TRIANGLE = torch.ones(2048, 2048, dtype=torch.bool).triu(1)


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    peer.module()  # its operators are defined by its own library
    torch.manual_seed(0)
    with installed():
        yield


def randn(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_(grad)


def parameters(semantic: Semantic) -> dict[str, inspect.Parameter]:
    found = inspect.signature(semantic.compute).parameters.values()
    return {each.name: each for each in found if each.kind is not inspect.Parameter.VAR_KEYWORD}


def by_name(semantic: Semantic) -> str:
    return semantic.name


@pytest.mark.parametrize("semantic", SEMANTICS, ids=by_name)
def test_the_signature_is_the_vendors(semantic: Semantic) -> None:
    """Every argument that a kernel names has the vendor's name, place and default; the others are refused by it."""
    arguments = {each.name: each for each in semantic.overload()._schema.arguments}
    ours = parameters(semantic)
    assert [name for name in arguments if name in ours] == list(ours)
    for name, parameter in ours.items():
        assert (parameter.kind is parameter.KEYWORD_ONLY) == arguments[name].kwarg_only, name
        required = not arguments[name].has_default_value()
        assert (parameter.default is parameter.empty) == required, name
        default = arguments[name].default_value
        assert required or (list(parameter.default) if name == "block_shape" else parameter.default) == default, name
    others = [each for name, each in arguments.items() if name not in ours]
    refuses = any(each.kind is each.VAR_KEYWORD for each in inspect.signature(semantic.compute).parameters.values())
    assert all(each.has_default_value() and each.kwarg_only for each in others)
    assert bool(others) == refuses


@pytest.mark.parametrize("semantic", [each for each in SEMANTICS if each.schema], ids=by_name)
def test_the_definition_is_the_vendors(semantic: Semantic) -> None:
    wanted = semantic.overload()._schema
    ours = torch._C.parse_schema(f"{semantic.namespace}::{semantic.schema}")
    assert str(ours) == str(wanted)


def test_an_operator_that_nothing_defines_is_defined_for_a_while_and_all_kernels_go() -> None:
    script = """
import torch
from npu import peer, semantics
assert all(each.missing for each in semantics.SEMANTICS if each.schema)
with semantics.installed():
    x = torch.randn(2, 3, 8)
    out = torch.ops.mindiesd.layernorm(x, [8])[0]
    torch.testing.assert_close(out, torch.nn.functional.layer_norm(x, (8,)))
assert all(each.missing for each in semantics.SEMANTICS if each.schema)
from npu import peer
peer.module()
assert not any(each.missing for each in semantics.SEMANTICS)
with semantics.installed():
    torch.ops.mindiesd.layernorm(x, [8])
try:
    torch.ops.mindiesd.layernorm(x, [8])
except NotImplementedError:
    print("gone")
"""
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["gone"]), done.stderr


def test_installations_may_be_nested() -> None:
    x = randn(2, 4)
    with installed():
        NPU.npu_fast_gelu(x)
    NPU.npu_fast_gelu(x)


Q, K = randn(2, 4, 300, 64, grad=True), randn(2, 2, 200, 64, grad=True)
HQ = randn(1, 2, 256, 128, dtype=torch.float16)
STATS, ROWS = randn(2, 4, 30, 8).abs() + 1, randn(30, 2, 4 * 16)
LSE, OUT = [randn(12), randn(12)], [randn(12, 16), randn(12, 16)]
SEEN = torch.ones(1, 2, 2, 2, dtype=torch.int8)
INDEX = torch.arange(2).expand(2, 2, 2).contiguous()
COUNT = torch.full((2, 2), 2)
BNSD = {"q_input_layout": "BNSD", "kv_input_layout": "BNSD"}
LENGTHS = {"actual_seq_qlen": [256], "actual_seq_kvlen": [256]}
SPARSE_LENGTHS = {"actual_seq_lengths": [100, 156], "actual_seq_lengths_kv": [100, 156]}


def thd(x: Tensor) -> Tensor:
    return x[0].transpose(0, 1).contiguous()


CALLS: list[tuple[str, str, tuple[Any, ...], dict[str, Any]]] = [
    ("npu", "npu_rotary_mul", (Q, Q.detach()[:1, :1], Q.detach()[:1, :1]), {}),
    ("npu", "npu_rotary_mul", (Q.detach()[0], Q[0, :1], Q[0, :1], "interleave"), {}),
    ("npu", "npu_rms_norm", (Q, Q.detach()[0, 0, 0]), {}),
    ("npu", "npu_rms_norm", (HQ, HQ[0].float()), {}),
    ("npu", "npu_swiglu", (Q,), {}),
    ("npu", "npu_swiglu", (Q, 1), {}),
    ("npu", "npu_fast_gelu", (Q,), {}),
    ("npu", "npu_gelu", (Q,), {"approximate": "tanh"}),
    ("npu", "npu_attention_update", (LSE, OUT, 1), {}),
    ("npu", "npu_attention_update", (LSE, OUT, 0), {}),
    ("npu", "npu_ring_attention_update", (ROWS, STATS, STATS, ROWS, STATS, STATS), {}),
    ("npu", "npu_fusion_attention", (Q, K, K, 4, "BNSD"), {}),
    ("npu", "npu_fusion_attention", (Q.transpose(1, 2), K.transpose(1, 2), K.transpose(1, 2), 4, "BSND"), {}),
    ("npu", "npu_fusion_attention", (Q[0], Q[0], Q[0], 4, "BSH"), {}),
    (
        "npu",
        "npu_fusion_attention",
        (Q[0].transpose(0, 1), K[0].transpose(0, 1), K[0].transpose(0, 1), 4, "TND"),
        {"actual_seq_qlen": [100, 300], "actual_seq_kvlen": [50, 200]},
    ),
    ("npu", "npu_prompt_flash_attention", (HQ, HQ, HQ), {"num_heads": 2, "input_layout": "BNSD"}),
    ("npu", "npu_prompt_flash_attention", (HQ, HQ, HQ), {"num_heads": 2, "input_layout": "BNSD_BSND"}),
    ("npu", "npu_fused_infer_attention_score", (HQ, HQ, HQ), {"num_heads": 2, "input_layout": "BNSD"}),
    (
        "npu",
        "npu_fused_infer_attention_score",
        (HQ, HQ, HQ),
        {"num_heads": 256, "input_layout": "BSND", "softmax_lse_flag": True},
    ),
    ("npu", "npu_block_sparse_attention", (HQ, HQ, HQ, SEEN, [128, 128]), {**BNSD, "num_key_value_heads": 2}),
    (
        "npu",
        "npu_block_sparse_attention",
        (thd(HQ), thd(HQ), thd(HQ), SEEN.expand(2, -1, -1, -1), [128, 128]),
        {**SPARSE_LENGTHS, "num_key_value_heads": 2, "softmax_lse_flag": 1},
    ),
    ("mindiesd", "block_sparse_attention", (HQ, HQ, HQ, SEEN), {"num_key_value_heads": 2}),
    ("mindiesd", "rainfusionattention", (HQ, HQ, HQ, INDEX, COUNT, [128, 128]), {**BNSD, **LENGTHS, "head_num": 2}),
    (
        "mindiesd",
        "rainfusionattention",
        (thd(HQ), thd(HQ), thd(HQ), INDEX, COUNT, [128, 128]),
        {**LENGTHS, "head_num": 2},
    ),
    ("mindiesd", "la", (HQ, HQ, HQ), {}),
    ("mindiesd", "adaln", (ROWS, ROWS[:, :1], ROWS[:, 0]), {}),
    ("mindiesd", "adaln_v2", (ROWS, ROWS[:, :1], ROWS[:, 0]), {}),
    ("mindiesd", "layernorm", (ROWS, [64]), {}),
]


def has_gradient(values: Any) -> bool:
    """Of the result proper, the first or only one: the vendor's backward ignores the gradients of the others."""
    return bool((values[0] if isinstance(values, tuple) else values).requires_grad)


@pytest.mark.parametrize(("namespace", "name", "args", "kwargs"), CALLS, ids=[row[1] for row in CALLS])
def test_shapes_and_gradients_are_those_of_the_vendors_shape_function(
    namespace: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    op = getattr(getattr(torch.ops, namespace), name)
    got = op(*args, **kwargs)
    with FakeTensorMode():
        wanted = op(*on_npu(args), **kwargs)
        assert shapes(got) == shapes(wanted)
        assert has_gradient(got) == has_gradient(wanted)


def test_the_calls_above_cover_every_operator() -> None:
    assert {(namespace, name) for namespace, name, *_ in CALLS} == {(each.namespace, each.name) for each in SEMANTICS}


X = randn(2, 3, 8, 16)
HALF_X = X.half()
REFUSED: list[tuple[str, Callable[[], object], type[Exception], str]] = [
    ("layout", lambda: NPU.npu_fusion_attention(X, X, X, 3, "XXXX"), VendorRefuses, "input_layout is 'XXXX'"),
    ("heads", lambda: NPU.npu_fusion_attention(X, X, X, 8, "BNSD"), VendorRefuses, "3 heads, said are 8"),
    ("float64", lambda: NPU.npu_fusion_attention(*[X.double()] * 3, 3, "BNSD"), VendorRefuses, "torch.float64"),
    ("dtypes", lambda: NPU.npu_fusion_attention(X, HALF_X, X, 3, "BNSD"), VendorRefuses, "key is torch.float16"),
    (
        "float mask",
        lambda: NPU.npu_fusion_attention(X, X, X, 3, "BNSD", atten_mask=X[0, 0, :, :8]),
        VendorRefuses,
        "dtype",
    ),
    (
        "mask shape",
        lambda: NPU.npu_fusion_attention(X, X, X, 3, "BNSD", atten_mask=TRIANGLE[:1, :8]),
        VendorRefuses,
        "shape of atten_mask",
    ),
    (
        "no triangle",
        lambda: NPU.npu_fusion_attention(X, X, X, 3, "BNSD", atten_mask=~TRIANGLE, sparse_mode=3),
        VendorRefuses,
        "above the diagonal",
    ),
    ("dropout", lambda: NPU.npu_fusion_attention(X, X, X, 3, "BNSD", keep_prob=0.9), NotModelled, "dropout"),
    ("pse", lambda: NPU.npu_fusion_attention(X, X, X, 3, "BNSD", pse=X), NotModelled, "pse"),
    ("no lengths", lambda: NPU.npu_fusion_attention(X[0], X[0], X[0], 8, "TND"), VendorRefuses, "both lists"),
    ("float32 inference", lambda: NPU.npu_prompt_flash_attention(X, X, X), VendorRefuses, "torch.float32"),
    (
        "strided inference",
        lambda: NPU.npu_prompt_flash_attention(*[HALF_X.mT] * 3, num_heads=3, input_layout="BNSD"),
        VendorRefuses,
        "query is not contiguous",
    ),
    (
        "scale of keys",
        lambda: NPU.npu_fused_infer_attention_score(HALF_X, HALF_X, HALF_X, antiquant_scale=X),
        NotModelled,
        "antiquant_scale",
    ),
    ("mode of rotation", lambda: NPU.npu_rotary_mul(X, X, X, "quarter"), VendorRefuses, "'quarter'"),
    ("tables", lambda: NPU.npu_rotary_mul(X, X[..., :8], X[..., :8]), VendorRefuses, "tables"),
    ("dtype of tables", lambda: NPU.npu_rotary_mul(HALF_X, X, X), VendorRefuses, "r1 must be torch.float16"),
    ("gamma", lambda: NPU.npu_rms_norm(X, HALF_X[0, 0, 0]), VendorRefuses, "gamma is torch.float16"),
    ("odd width", lambda: NPU.npu_swiglu(X[..., :5]), VendorRefuses, "along -1"),
    ("modulation", lambda: MINDIESD.adaln(X[0], X[0], X[0]), VendorRefuses, "shape of scale"),
    ("float16 alone", lambda: MINDIESD.layernorm(X, [16], impl_mode=2), VendorRefuses, "float16 alone"),
    ("tiles", lambda: MINDIESD.la(HALF_X, HALF_X, HALF_X, head_num=3), VendorRefuses, "query"),
    (
        "bfloat16 blocks",
        lambda: NPU.npu_block_sparse_attention(*[HQ.bfloat16()] * 3, SEEN, [128, 128], **BNSD, num_key_value_heads=2),
        VendorRefuses,
        "inner_precise=0",
    ),
    (
        "block size",
        lambda: NPU.npu_block_sparse_attention(HQ, HQ, HQ, SEEN, [128, 64], **BNSD, num_key_value_heads=2),
        VendorRefuses,
        "multiples of 128",
    ),
    (
        "lists out of order",
        lambda: MINDIESD.rainfusionattention(
            HQ, HQ, HQ, INDEX.flip(-1), COUNT, [128, 128], **BNSD, **LENGTHS, head_num=2
        ),
        VendorRefuses,
        "must ascend",
    ),
    (
        "gradient of GQA blocks",
        lambda: NPU.npu_block_sparse_attention(
            HQ.detach().requires_grad_(), HQ[:, :1], HQ[:, :1], SEEN, [128, 128], **BNSD
        ),
        VendorRefuses,
        "gradients only",
    ),
]


@pytest.mark.parametrize(("run", "error", "words"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_the_documents_do_not_allow_is_refused(
    run: Callable[[], object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        run()
