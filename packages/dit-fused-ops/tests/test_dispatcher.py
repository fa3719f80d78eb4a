"""The right backend carries out a call, is looked up from then on, and is never replaced behind one's back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from toy_op import Doubling

from dit_fused_ops.attention import ATTENTION
from dit_fused_ops.dispatch import Dispatcher, Settings, spread_rows
from dit_fused_ops.dispatch.store import Decision, read_decisions
from dit_fused_ops.errors import BackendRefused, ParametersInvalid
from dit_fused_ops.norms import NORM
from dit_fused_ops.rope import ROPE

X = torch.arange(6.0)


@pytest.fixture
def dispatcher(tmp_path: Path) -> Dispatcher:
    return Dispatcher(Settings(mode="runtime", file=tmp_path / "tuning.json"))


@pytest.fixture
def deterministic_algorithms() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_a_call_is_described_once_and_looked_up_afterwards(dispatcher: Dispatcher) -> None:
    toy = Doubling("right", "plain")
    for _ in range(3):
        torch.testing.assert_close(dispatcher(toy.op, (X,), (2,)), 2 * X)
    assert toy.runs["describe"] == 1


@pytest.mark.parametrize(
    "other",
    [X.double(), X[:3], X.clone().requires_grad_(), X.reshape(2, 3)],
    ids=["dtype", "length", "gradient", "rank"],
)
def test_what_may_change_the_choice_is_looked_at_anew(dispatcher: Dispatcher, other: torch.Tensor) -> None:
    toy = Doubling("right", "plain")
    dispatcher(toy.op, (X,), (2,))
    dispatcher(toy.op, (other,), (2,))
    assert toy.runs["describe"] == 2


def test_a_gradient_is_only_needed_where_it_is_recorded(dispatcher: Dispatcher) -> None:
    toy = Doubling("no_gradient", "plain")
    x = X.clone().requires_grad_()
    with torch.no_grad():
        dispatcher(toy.op, (x,), (2,), mode="static")
    assert toy.runs["no_gradient"] == 1
    dispatcher(toy.op, (x,), (2,), mode="static").sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.full_like(X, 2.0))


def test_a_wrong_kernel_cannot_win(dispatcher: Dispatcher) -> None:
    toy = Doubling("wrong", "plain")
    torch.testing.assert_close(dispatcher(toy.op, (X,), (2,)), 2 * X)
    (decision,) = _decisions(dispatcher)
    assert "error is 2.5e-01 of the largest" in decision.rejected["wrong"]
    assert [name for name, _ in decision.ranking] == ["plain"]


def test_a_backend_that_raises_is_kept_out_with_the_reason(dispatcher: Dispatcher) -> None:
    toy = Doubling("broken", "plain")
    torch.testing.assert_close(dispatcher(toy.op, (X,), (2,)), 2 * X)
    (decision,) = _decisions(dispatcher)
    assert decision.rejected == {"broken": "it raised RuntimeError: this machine cannot"}


def test_when_all_candidates_are_wrong_the_reference_does_it_and_others_are_not_told(dispatcher: Dispatcher) -> None:
    toy = Doubling("wrong", "broken")
    for _ in range(2):
        torch.testing.assert_close(dispatcher(toy.op, (X,), (2,)), 2 * X)
    assert toy.runs["reference"] == 2
    assert _decisions(dispatcher) == []


def test_nothing_is_decided_where_there_is_nothing_to_compute(dispatcher: Dispatcher) -> None:
    toy = Doubling("right", "plain")
    assert dispatcher(toy.op, (torch.empty(0),), (2,)).shape == (0,)
    assert _decisions(dispatcher) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_that_float32_hardly_holds_are_judged_in_float64(dispatcher: Dispatcher, dtype: torch.dtype) -> None:
    norm, zero = nn.LayerNorm(64, elementwise_affine=False), torch.zeros(1, 64)
    far = torch.randn(1, 40, 64) + 1000
    call = (far, None, None, zero, zero, None, None), ("layer", norm.eps, 0, False, True, (64,))
    with torch.no_grad():
        dispatcher(NORM, *call)
        big = (torch.randn(1, 8, 2, 16) * 60000).to(dtype)  # float16 overflows, and so does a right kernel
        table = torch.randn(8, 8)
        dispatcher(ROPE, (big, table, table), ("rotated_half", False, True, None, None))
    norms, rotations = sorted(_decisions(dispatcher), key=lambda decision: "folded" not in dict(decision.ranking))
    assert {name for name, _ in norms.ranking} == {"folded", "tiled", "eager"}
    assert {name for name, _ in rotations.ranking} == {"split", "eager"}


def test_numbers_that_tell_nothing_decide_nothing(dispatcher: Dispatcher) -> None:
    zero, constant = torch.zeros(1, 64), torch.full((1, 40, 64), 0.1)
    with torch.no_grad():
        dispatcher(NORM, (constant, None, None, zero, zero, None, None), ("layer", 1e-5, 0, False, True, (64,)))
    assert _decisions(dispatcher) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_default_dtype_does_not_matter(dispatcher: Dispatcher, dtype: torch.dtype) -> None:
    x = torch.randn(1, 4100, 1, 8)
    torch.set_default_dtype(dtype)
    try:
        dispatcher(ROPE, (x, torch.ones(4100, 4), torch.zeros(4100, 4)), ("rotated_half", False, True, None, None))
        dispatcher(NORM, (x.reshape(4100, 8), *[None] * 6), ("rms", 1e-6, 0, False, True, None))
        options = (None, True, False, None, False, None, False, False, False)
        dispatcher(ATTENTION, (x, x[:, :8], x[:, :8], None, None), options)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(not decision.rejected for decision in _decisions(dispatcher))


@pytest.mark.parametrize(("rows", "wanted"), [(1, 64), (2, 64), (64, 64), (2**24 + 4, 64), (75600, 3)])
def test_probed_rows_reach_from_the_first_to_the_last(rows: int, wanted: int) -> None:
    chosen = spread_rows(rows, wanted, torch.device("cpu")).tolist()
    assert chosen[0] == 0
    assert chosen[-1] == rows - 1 or len(chosen) == 1
    assert len(set(chosen)) == len(chosen) == min(rows, wanted)


def test_settings_take_paths_as_text_and_name_what_they_do_not_know(dispatcher: Dispatcher, tmp_path: Path) -> None:
    dispatcher.configure(file=str(tmp_path / "other.json"))
    assert dispatcher.settings.file == tmp_path / "other.json"
    with pytest.raises(ParametersInvalid, match=r"settings are mode, .*, given nope"):
        dispatcher.configure(nope=1)


def test_the_reference_competes_with_nobody(dispatcher: Dispatcher) -> None:
    toy = Doubling("right", "plain")
    dispatcher(toy.op, (X,), (2,))
    assert toy.runs["reference"] == 0


def test_a_backend_that_does_not_honour_an_argument_is_no_candidate(dispatcher: Dispatcher) -> None:
    toy = Doubling("right", "plain")
    torch.testing.assert_close(dispatcher(toy.op, (X,), (3,)), 3 * X)
    assert toy.runs["right"] == 0


def test_a_decision_outlives_the_process(dispatcher: Dispatcher) -> None:
    first = Doubling("right", "plain")
    dispatcher(first.op, (X,), (2,))
    later, other = Doubling("right", "plain"), Dispatcher(dispatcher.settings)
    other(later.op, (X,), (2,))
    assert later.runs["right"] + later.runs["plain"] == 1, "it was measured again"


def test_lengths_of_one_bucket_share_a_decision(dispatcher: Dispatcher) -> None:
    toy = Doubling("right", "plain")
    dispatcher(toy.op, (torch.ones(1025),), (2,))
    measured = toy.runs.total()
    dispatcher(toy.op, (torch.ones(1030),), (2,))
    assert toy.runs.total() == measured + 2, "one description and one run are expected"


def test_a_remembered_winner_that_refuses_leaves_it_to_the_next(dispatcher: Dispatcher) -> None:
    toy = Doubling("picky", "plain")
    key_holder = Doubling("picky", "plain")
    dispatcher(key_holder.op, (torch.ones(10),), (2,))
    (decision,) = _decisions(dispatcher)
    assert {name for name, _ in decision.ranking} == {"picky", "plain"}
    torch.testing.assert_close(dispatcher(toy.op, (torch.ones(9),), (2,)), torch.full((9,), 2.0))
    assert toy.runs["picky"] == 0


def test_static_never_measures(dispatcher: Dispatcher) -> None:
    toy = Doubling("right", "plain")
    dispatcher(toy.op, (X,), (2,), mode="static")
    assert toy.runs == {"describe": 1, "right": 1}


def test_static_takes_what_was_measured_before(dispatcher: Dispatcher) -> None:
    toy = Doubling("broken", "plain")
    dispatcher(toy.op, (X,), (2,))
    dispatcher.clear()
    torch.testing.assert_close(dispatcher(toy.op, (X,), (2,), mode="static"), 2 * X)


def test_deterministic_never_measures(dispatcher: Dispatcher) -> None:
    toy = Doubling("right", "plain")
    dispatcher.configure(deterministic=True)
    dispatcher(toy.op, (X,), (2,))
    assert toy.runs == {"describe": 1, "right": 1}


@pytest.mark.usefixtures("deterministic_algorithms")
def test_torch_s_own_switch_for_determinism_counts(dispatcher: Dispatcher) -> None:
    toy = Doubling("right", "plain")
    dispatcher(toy.op, (X,), (2,))
    assert toy.runs == {"describe": 1, "right": 1}


def test_a_costly_backend_is_tried_only_when_asked(dispatcher: Dispatcher) -> None:
    toy = Doubling("costly", "right", "plain")
    dispatcher(toy.op, (X,), (2,))
    assert toy.runs["costly"] == 0
    thorough = Dispatcher(Settings(thorough=True, file=None))
    thorough(toy.op, (X,), (2,))
    assert toy.runs["costly"] > 0


def test_a_named_backend_does_it(dispatcher: Dispatcher) -> None:
    toy = Doubling("right", "plain")
    dispatcher(toy.op, (X,), (2,), named="plain")
    assert toy.runs == {"describe": 1, "plain": 1}


def test_a_named_backend_that_cannot_says_why_and_who_can(dispatcher: Dispatcher) -> None:
    toy = Doubling("picky", "plain")
    with pytest.raises(BackendRefused, match=r"picky cannot .*: x must be longer than 9\. These can: plain, reference"):
        dispatcher(toy.op, (X,), (2,), named="picky")


def test_a_backend_that_does_not_exist_is_an_error(dispatcher: Dispatcher) -> None:
    toy = Doubling("right", "plain")
    with pytest.raises(BackendRefused, match="no backend 'fast', legal are right, plain, reference"):
        dispatcher(toy.op, (X,), (2,), named="fast")


def test_an_unknown_mode_is_an_error(dispatcher: Dispatcher) -> None:
    with pytest.raises(ParametersInvalid, match="mode is 'fastest', legal are runtime, static"):
        dispatcher.configure(mode="fastest")
    with pytest.raises(ParametersInvalid, match="mode is 'fastest', legal are runtime, static"):
        dispatcher(Doubling("right").op, (X,), (2,), mode="fastest")


def test_measuring_anew_replaces_what_is_known(dispatcher: Dispatcher) -> None:
    toy = Doubling("right", "plain")
    dispatcher(toy.op, (X,), (2,))
    before = toy.runs["plain"]
    with dispatcher.measuring_anew() as decisions:
        dispatcher(toy.op, (X,), (2,))
    assert toy.runs["plain"] > before
    assert decisions == _decisions(dispatcher)


def test_settings_for_a_while_end(dispatcher: Dispatcher) -> None:
    with pytest.raises(ParametersInvalid), dispatcher.configured(mode="static"):
        dispatcher.configure(mode="an error in between")
    assert dispatcher.settings.mode == "runtime"


def test_wrappers_of_torch_get_a_backend_that_they_see_through(dispatcher: Dispatcher) -> None:
    toy = Doubling("opaque", "costly", "plain")
    torch.testing.assert_close(
        torch.func.grad(lambda x: dispatcher(toy.op, (x,), (2,)).sum())(X), torch.full((6,), 2.0)
    )
    torch.testing.assert_close(
        torch.func.vmap(lambda x: dispatcher(toy.op, (x,), (2,)))(X.reshape(2, 3)).flatten(), 2 * X
    )
    with FakeTensorMode():
        assert dispatcher(toy.op, (torch.empty(5),), (2,)).shape == (5,)
    assert dispatcher(toy.op, (torch.empty(5, device="meta"),), (2,)).device.type == "meta"
    assert toy.runs["opaque"] == toy.runs["costly"] == 0
    assert toy.runs["plain"] == toy.runs["describe"] == 4, "something was measured, or a choice was kept"


def test_an_option_that_cannot_be_hashed_is_left_to_the_description(dispatcher: Dispatcher) -> None:
    with pytest.raises(ParametersInvalid, match=r"rotated_mode must be a str, given \[\]"):
        dispatcher(ROPE, (torch.ones(1, 2, 1, 2), torch.ones(2, 1), torch.ones(2, 1)), ([], False, True, None, None))


@pytest.mark.parametrize(("casts", "dtype"), [(1, torch.bfloat16), (0, torch.float32)])
def test_autocast_casts_what_the_op_lets_it(dispatcher: Dispatcher, casts: int, dtype: torch.dtype) -> None:
    toy = Doubling("right", "plain", casts=casts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert dispatcher(toy.op, (X,), (2,)).dtype == dtype


def test_a_shape_by_shape_program_does_not_grow_without_end(
    dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dit_fused_ops.dispatch.choosing._SIGNATURES", 4)
    toy = Doubling("plain")
    for length in range(1, 20):
        dispatcher(toy.op, (torch.ones(length),), (2,))
    assert len(dispatcher._prepared) <= 4


def _decisions(dispatcher: Dispatcher) -> list[Decision]:

    assert dispatcher.settings.file is not None
    return list(read_decisions(dispatcher.settings.file).values())
