"""The perturbations: each argument is made wrong, in flight, and a check that looks notices; one that does not, not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from npu import perturb
from npu.semantics import installed

X, TABLE = torch.randn(2, 3, 4, 8), torch.randn(1, 1, 4, 8)
COS, SIN = TABLE.cos(), TABLE.sin()


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    with installed():
        yield


def rotated() -> torch.Tensor:
    out: torch.Tensor = torch.ops.npu.npu_rotary_mul(X, COS, SIN, "interleave")
    return out


def test_calls_are_recorded_by_the_names_of_the_schema() -> None:
    def check() -> None:
        rotated()
        torch.ops.npu.npu_rms_norm.default(X, COS[0, 0, 0], epsilon=1e-3)
        torch.add(X, X)

    first, second = perturb.record(check)
    assert first.name == "npu::npu_rotary_mul"
    assert list(first.arguments) == ["input", "r1", "r2", "rotary_mode"]
    assert second.arguments["epsilon"] == 1e-3


def test_every_argument_is_made_wrong_and_a_comparison_notices() -> None:
    wanted = rotated()

    def check() -> None:
        assert torch.equal(rotated(), wanted)

    (call,) = perturb.record(check)
    found = list(perturb.changes(call))
    assert {change.argument for change in found} == set(call.arguments)
    assert {"wrong name", "left out", "exchanged with r2", "negated", "half", "XXXX"} <= {each.what for each in found}
    for change in found:
        assert perturb.noticed(change, 0, (check,)), change


def test_a_check_that_does_not_look_notices_no_wrong_number() -> None:
    (call,) = perturb.record(rotated)
    unnoticed = {change.what for change in perturb.changes(call) if not perturb.noticed(change, 0, (rotated,))}
    assert {"negated", "half", "left out"} <= unnoticed
    assert "wrong name" not in unnoticed


def test_only_the_call_with_the_index_gets_the_change() -> None:
    wanted = rotated()
    (call,) = perturb.record(rotated)
    change = next(each for each in perturb.changes(call) if each.what == "negated")

    def second_alone() -> None:
        rotated()
        assert torch.equal(rotated(), wanted)

    assert not perturb.noticed(change, 0, (second_alone,))
    assert perturb.noticed(change, 1, (second_alone,))
    with pytest.raises(AssertionError, match="makes 2 operator calls, none has the number 2"):
        perturb.noticed(change, 2, (second_alone,))
