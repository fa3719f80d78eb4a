"""What is kept, what a prediction makes of it, and how many bytes it takes."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from dit_cache.engine.moment import Moment
from dit_cache.engine.predictors import Offset, Planned, Reuse, Secant, Taylor
from dit_cache.engine.protocols import Predictor, Store
from dit_cache.engine.store import Keep, Memory
from dit_cache.errors import ParametersInvalid

SHAPES = [(1, 1), (3, 5, 7), (1, 4, 2, 3, 5)]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TIMES = (1.0, 0.93, 0.8, 0.7)
T_H, T_I, T_J, T = TIMES  # three computed steps, and the hole
MOMENTS = [Moment(step=step, steps=9, time=time) for step, time in enumerate(TIMES)]
HOLE = MOMENTS[-1]
# Each term is rounded once and added once, and the sum is rounded to its dtype.
ROUNDINGS = 8


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def formula(predictor: Predictor, v: list[Tensor], x: list[Tensor], here: Tensor) -> tuple[Tensor, Tensor]:
    """The prediction in float64 from three computed values, and a bound of its terms."""
    v_h, v_i, v_j = (value.double() for value in v)
    x_i, x_j, x_n = x[1].double(), x[2].double(), here.double()
    if isinstance(predictor, Reuse):
        terms = [v_j]
    elif isinstance(predictor, Offset):
        terms = [v_j, -x_j, x_n]
    elif isinstance(predictor, Secant):
        way = (T - T_J) / (T_J - T_I)
        terms = [v_j, -way * v_i, way / (T_J - T_I) * x_j, -way / (T_J - T_I) * x_i]
    elif isinstance(predictor, Planned):
        terms = [0.5 * v_h, -0.25 * v_j, 0.0 * v_i]
    elif predictor == Taylor(1):
        way = (T - T_J) / (T_J - T_I)
        terms = [v_j, way * v_j, -way * v_i]
    else:  # a parabola, by Newton
        first = (v_j - v_i) / (T_J - T_I)
        second = (first - (v_i - v_h) / (T_I - T_H)) / (T_J - T_H)
        terms = [v_j, (T - T_J) * first, (T - T_J) * (T - T_I) * second]
        bound = 40 * (v_h.abs() + v_i.abs() + v_j.abs())  # its weights are below 40 here
        return sum(terms[1:], terms[0]), bound
    return sum(terms[1:], terms[0]), sum((term.abs() for term in terms[1:]), terms[0].abs())


PREDICTORS: list[Predictor] = [
    Reuse(),
    Taylor(1),
    Taylor(2),
    Secant(),
    Offset(),
    Planned(fitted={3: {0: 0.5, 1: 0.0, 2: -0.25}}),
]


def filled(predictor: Predictor, store: Store, values: list[Tensor], latents: list[Tensor], streams: int = 1) -> Memory:
    memory = Memory(predictor, store)
    for at, value, latent in zip(MOMENTS, values, latents, strict=False):
        memory.put(at, (value, *(value * 2 for _ in range(streams - 1))), latent)
    return memory


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("predictor", PREDICTORS, ids=lambda each: type(each).__name__)
def test_a_prediction_is_the_formula(predictor: Predictor, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        v = [random(*shape, seed=seed, dtype=dtype) for seed in (1, 2, 3)]
        x = [random(*shape, seed=seed, dtype=dtype) for seed in (4, 5, 6)]
        here = random(*shape, seed=7, dtype=dtype)
        first, second = filled(predictor, Keep(), v, x, streams=2).predict(HOLE, latents=here)
        for got, factor in ((first, 1), (second, 2)):
            want, bound = formula(predictor, [value * factor for value in v], x, here)
            assert got.dtype == dtype
            assert got.shape == shape
            assert bool(((got.double() - want).abs() <= ROUNDINGS * torch.finfo(dtype).eps * bound).all())


@pytest.mark.parametrize("predictor", [Offset(), Secant()], ids=repr)
def test_latents_cancel_in_their_own_precision(predictor: Predictor) -> None:
    """Of a bfloat16 velocity and float32 latents that hardly moved, the result alone is rounded to bfloat16."""
    v = [random(3, 5, seed=seed, dtype=torch.bfloat16) for seed in (1, 2, 3)]
    x = [30 + 0.01 * random(3, 5, seed=seed) for seed in (4, 5, 6)]
    here = 30 + 0.01 * random(3, 5, seed=7)
    (got,) = filled(predictor, Keep(), v, x).predict(HOLE, latents=here)
    want, bound = formula(predictor, v, x, here)
    allowed = torch.finfo(torch.bfloat16).eps * want.abs() + ROUNDINGS * torch.finfo(torch.float32).eps * bound
    assert got.dtype == torch.bfloat16
    assert bool(((got.double() - want).abs() <= allowed).all())


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
def test_kept_in_another_dtype_given_back_in_that_of_the_value(narrow: torch.dtype) -> None:
    value = random(3, 4, seed=1)
    memory = filled(Reuse(), Keep(dtype=narrow), [value], [value])
    (got,) = memory.predict(HOLE)
    assert torch.equal(got, value.to(narrow).float())
    assert memory.nbytes == value.numel() * narrow.itemsize


def test_a_half_precision_value_is_summed_in_the_dtype_it_is_kept_in() -> None:
    v = [random(3, 4, seed=seed, dtype=torch.bfloat16) for seed in (1, 2, 3)]
    (got,) = filled(Taylor(2), Keep(dtype=torch.float32), v, v).predict(HOLE)
    want, bound = formula(Taylor(2), v, v, v[0])
    allowed = torch.finfo(torch.bfloat16).eps * want.abs() + ROUNDINGS * torch.finfo(torch.float32).eps * bound
    assert bool(((got.double() - want).abs() <= allowed).all())


@pytest.mark.parametrize("store", [Keep(), Keep(dtype=torch.float32), Keep(device="cpu")], ids=repr)
@pytest.mark.parametrize("predictor", [Reuse(), Offset()], ids=repr)
def test_nobody_writes_into_what_is_kept(predictor: Predictor, store: Store) -> None:
    value, latents = random(3, 4, seed=1), random(3, 4, seed=2)
    memory = filled(predictor, store, [value], [latents])
    before = [tensor.clone() for tensor in memory.predict(HOLE, latents=latents)]
    here = latents.clone()
    value.zero_()
    latents.zero_()
    memory.predict(HOLE, latents=here)[0].zero_()
    assert torch.equal(memory.predict(HOLE, latents=here)[0], before[0])


def test_what_is_kept_holds_no_graph() -> None:
    memory = Memory(Reuse(), Keep())
    memory.put(MOMENTS[0], (random(3, 4, seed=1).requires_grad_() * 2,))
    assert not memory.predict(HOLE)[0].requires_grad


@pytest.mark.parametrize("predictor", PREDICTORS, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_only_what_will_be_looked_at_is_kept(predictor: Predictor, dtype: torch.dtype | None) -> None:
    store, shape = Keep(dtype=dtype), (3, 5)
    memory = Memory(predictor, store)
    kinds = 1 + predictor.uses_latents
    for count, at in enumerate(MOMENTS, 1):
        memory.put(at, (random(*shape, seed=count),), random(*shape, seed=count))
        assert len(memory) == min(count, predictor.history)
        assert memory.nbytes == len(memory) * kinds * store.nbytes(shape, torch.float32)


class Watched:
    """A store that knows how many bytes of its tensors were alive at once."""

    def __init__(self) -> None:
        self.inner = Keep()
        self.kept: list[weakref.ref[Tensor]] = []
        self.peak = 0

    def keep(self, value: Tensor) -> Tensor:
        copy = self.inner.keep(value)
        self.kept.append(weakref.ref(copy))
        alive = [tensor for each in self.kept if (tensor := each()) is not None]
        self.peak = max(self.peak, sum(tensor.nbytes for tensor in alive))
        return copy

    def take(self, kept: Tensor, device: torch.device) -> Tensor:
        return self.inner.take(kept, device)

    def nbytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        return self.inner.nbytes(shape, dtype)


@pytest.mark.parametrize("predictor", PREDICTORS, ids=lambda each: type(each).__name__)
def test_no_more_is_alive_at_any_time_than_is_announced(predictor: Predictor) -> None:
    store = Watched()
    assert isinstance(store, Store)
    memory = Memory(predictor, store)
    for seed in range(6):
        at = Moment(step=seed, steps=9, time=1 - seed / 9)
        memory.put(at, (random(3, 5, seed=seed), random(2, seed=seed)), random(3, 5, seed=seed))
    one = store.nbytes((3, 5), torch.float32) * (1 + predictor.uses_latents) + store.nbytes((2,), torch.float32)
    assert store.peak == memory.nbytes == predictor.history * one


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("shape", [(), *SHAPES])
def test_bytes_are_those_of_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    value = torch.zeros(shape)
    assert Keep(dtype=dtype).nbytes(shape, torch.float32) == Keep(dtype=dtype).keep(value).nbytes
    assert Keep().nbytes(shape, dtype) == Keep().keep(value.to(dtype)).nbytes


def test_off_loaded_values_come_back_to_where_they_were_computed() -> None:
    with FakeTensorMode():  # an accelerator that is not there
        value = torch.empty(3, 4, device="cuda", dtype=torch.bfloat16)
        kept = Keep(device="cpu").keep(value)
        memory = Memory(Offset(), Keep(device="cpu"))
        memory.put(MOMENTS[0], (value,), value)
        (got,) = memory.predict(HOLE, latents=value)
    assert kept.device.type == "cpu"
    assert (got.device.type, got.dtype, got.shape) == ("cuda", torch.bfloat16, (3, 4))


@pytest.mark.parametrize("predictor", [Offset(), Secant()], ids=repr)
def test_latents_that_are_needed_are_asked_for(predictor: Predictor) -> None:
    value = random(3, 4, seed=1)
    memory = Memory(predictor, Keep())
    with pytest.raises(ParametersInvalid, match="latents"):
        memory.put(MOMENTS[0], (value,))
    assert len(memory) == 0
    memory = filled(Offset(), Keep(), [value], [value])
    with pytest.raises(ParametersInvalid, match="latents"):
        memory.predict(HOLE)


def test_the_error_of_a_prediction_is_relative_and_over_all_streams() -> None:
    first, second = random(3, 4, seed=1), random(5, seed=2)
    memory = Memory(Reuse(), Keep())
    memory.put(MOMENTS[0], (first, second))
    now = (random(3, 4, seed=3), random(5, seed=4))
    wrong = torch.cat([(first - now[0]).flatten(), second - now[1]]).double().norm()
    right = torch.cat([now[0].flatten(), now[1]]).double().norm()
    assert float(memory.error(HOLE, now)) == pytest.approx(float(wrong / right), rel=1e-6)  # sums of float32
    assert float(memory.error(HOLE, (first, second))) == 0.0
