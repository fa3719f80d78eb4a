"""Every NPU backend of dit-fused-ops: on fake npu tensors, in numbers, and with each argument made wrong in turn.

Nothing here runs on a device. What is proved: names, arguments and shapes against the vendor's own library, the
documented limits and the published formulas through `semantics`. What is not: the kernels.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch_npu
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from dit_fused_ops.dispatch import Backend, dispatcher
from dit_fused_ops.table import OPS
from npu import peer, perturb
from npu.contract import Case, accepted, npu_backends, numbers_hold, reference_results, shapes_hold
from npu.contract_cases import all_cases
from npu.fake_npu import on_npu, shapes
from npu.semantics import installed

_PRECISION = "it chooses how precisely a kernel computes, and the documents give all choices the same formula"
_ANY_DTYPE = "the operator takes any mixture of dtypes and computes in float32; the backend casts the result"
_GAMMA = "a float32 gamma beside halves is documented, with the same result"
_SYMMETRIC = "a product does not tell its factors apart where they have one shape"
_NOT_LOOKED_AT = "it adds a result that is not looked at"
_UNBOUNDED = "without a mask, and in mode 3, the documents give it no effect"
# What nobody can notice, of each backend by `str(change)`, and why that is no harm.
EXCUSED: dict[str, dict[str, str]] = {
    "multiply_add-mindiesd": {
        **{f"mindiesd::residual_gate_add {name}: in torch.float32": _ANY_DTYPE for name in ("x", "y", "gate")},
        "mindiesd::residual_gate_add y: exchanged with gate": _SYMMETRIC,
    },
    "norm-npu_rms_norm": {"npu::npu_rms_norm gamma: in torch.float32": _GAMMA},
    "norm-mindiesd_layernorm": {
        f"mindiesd::layernorm impl_mode: {what}": _PRECISION for what in ("0", "1", "left out")
    },
    "block_sparse_attention-npu_block_sparse_attention": {
        "npu::npu_block_sparse_attention softmax_lse_flag: 1": _NOT_LOOKED_AT
    },
    "attention_forward_varlen-fused_attn_score": {
        f"npu::npu_fusion_attention {what}": _UNBOUNDED
        for what in ("pre_tockens: 0", "next_tockens: 0", "sparse_mode: 3")
    },
}

BACKENDS = {f"{op.name}-{backend.name}": backend for op in OPS for backend in npu_backends(op)}


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    with installed():
        yield


def _pairs() -> Iterator[tuple[Case, Backend[Any]]]:
    """Each case with each backend that is to carry it out."""
    peer.module()  # as a user has it: what it does not import by itself is not there
    for case in all_cases():
        for backend in npu_backends(case.op):
            if accepted(case, backend):
                yield case, backend


PAIRS = tuple(_pairs())
CASES = {case.name: case for case, _ in PAIRS}
IDS = [f"{backend.name}-{case.name}" for case, backend in PAIRS]


def test_every_backend_has_a_case_and_every_case_a_backend() -> None:
    assert {f"{case.op.name}-{backend.name}" for case, backend in PAIRS} == set(BACKENDS)
    assert {case.name for case in all_cases()} == {case.name for case, _ in PAIRS}


@pytest.mark.parametrize(("case", "backend"), PAIRS, ids=IDS)
def test_shapes(case: Case, backend: Backend[Any]) -> None:
    shapes_hold(case, backend)


@pytest.mark.parametrize(("case", "backend"), PAIRS, ids=IDS)
def test_numbers(case: Case, backend: Backend[Any]) -> None:
    numbers_hold(case, backend)


@pytest.mark.parametrize("case", CASES)
def test_the_dispatcher_takes_it_to_the_npu(case: str) -> None:
    """Without measuring it takes the first backend that torch sees through; one of the NPU's, if there is one."""
    asked = CASES[case]
    offered = [each for each in npu_backends(asked.op) if accepted(asked, each) and each.traceable]
    with FakeTensorMode():
        tensors = on_npu(asked.tensors)
        chosen = dispatcher.choose(asked.op, asked.op.describe(tensors, asked.options))
        got = tree_leaves(dispatcher(asked.op, tensors, asked.options))
        assert [shapes(each) for each in got if torch.is_tensor(each)] == shapes(reference_results(asked))
    assert not offered or chosen is offered[0] or asked.handed_to


GENERATIONS = {
    200: ("attention_forward-fused_attn_score", "attention_forward-ascend_laser_attention"),
    220: (),
    260: ("attention_forward-prompt_flash_attn", "attention_forward-ascend_laser_attention"),
}


@pytest.mark.parametrize(("soc_version", "absent"), GENERATIONS.items())
def test_kernels_that_a_generation_of_devices_lacks(
    soc_version: int, absent: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_npu.npu, "get_soc_version", lambda: soc_version)
    found = {name for name in GENERATIONS[200] + GENERATIONS[260] if (BACKENDS[name].missing() or "").count("this NPU")}
    assert found == set(absent)


@pytest.mark.parametrize("case", [case for case, backend in PAIRS if backend.name == "mindiesd_adaln"], ids=str)
def test_the_modulated_norm_of_the_newest_generation(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = BACKENDS["norm-mindiesd_adaln"]
    monkeypatch.setattr(torch_npu.npu, "get_soc_version", lambda: 260)
    calls = perturb.record(lambda: numbers_hold(case, backend))
    assert [call.name for call in calls] == ["mindiesd::adaln_v2"]
    shapes_hold(case, backend)


def _unnoticed(name: str) -> set[str]:
    """The changes that no case of the backend notices."""
    backend, tried, noticed = BACKENDS[name], set[str](), set[str]()
    for case in (case for case, other in PAIRS if f"{case.op.name}-{other.name}" == name):
        checks = (functools.partial(numbers_hold, case, backend), functools.partial(shapes_hold, case, backend))
        for index, call in enumerate(perturb.record(checks[0])):
            for change in perturb.changes(call):
                tried.add(str(change))
                if str(change) not in noticed and perturb.noticed(change, index, checks):
                    noticed.add(str(change))
    return tried - noticed


@pytest.mark.parametrize("name", BACKENDS)
def test_every_wrong_argument_is_noticed(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL + 1, logger="torch._subclasses.fake_tensor")  # it logs each refusal at length
    assert _unnoticed(name) == set(EXCUSED.get(name, ()))


def test_excuses_are_for_backends_that_there_are() -> None:
    assert set(EXCUSED) <= set(BACKENDS)
