"""Where computed values are kept, and how a prediction is made of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_cache.engine.moment import Moment, Streams
from dit_cache.engine.protocols import Predictor, Store, Weights
from dit_cache.errors import ParametersInvalid


@dataclass(frozen=True, kw_only=True)
class Keep:
    """Keeps copies.

    Args:
        dtype: in which they are kept; that of the value when None.
        device: where; that of the value when None. "cpu" costs a transfer each way for the memory of the accelerator.
    """

    dtype: torch.dtype | None = None
    device: torch.device | str | None = None

    def keep(self, value: Tensor) -> Tensor:
        """Return a copy of `value`."""
        return value.detach().to(device=self.device, dtype=self.dtype or value.dtype, copy=True)

    def take(self, kept: Tensor, device: torch.device) -> Tensor:
        """Return the kept tensor on `device`."""
        return kept.to(device)

    def nbytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Return the bytes of a copy of such a tensor."""
        return math.prod(shape) * (self.dtype or dtype).itemsize


@dataclass(frozen=True)
class _Kept:
    at: Moment
    value: Streams
    latents: Tensor | None


class Memory:
    """The last computed values of one place in one branch, as many as the predictor looks back.

    Args:
        predictor: decides how many, and how they are combined.
        store: decides where they are.
    """

    def __init__(self, predictor: Predictor, store: Store) -> None:
        self._predictor = predictor
        self._store = store
        self._kept: list[_Kept] = []
        self._forms: list[tuple[torch.dtype, torch.device]] = []  # of the streams as they were computed

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        tensors = [t for kept in self._kept for t in (*kept.value, kept.latents) if t is not None]
        return sum(tensor.numel() * tensor.itemsize for tensor in tensors)

    def put(self, at: Moment, value: Streams, latents: Tensor | None = None) -> None:
        """Keep what was computed, and drop what the predictor will not look at any more."""
        if not self._predictor.uses_latents:
            latents = None
        else:
            latents = _present(latents)
        del self._kept[: max(0, len(self._kept) + 1 - self._predictor.history)]  # first: the peak is what is announced
        self._forms = [(tensor.dtype, tensor.device) for tensor in value]
        kept_latents = None if latents is None else self._store.keep(latents)
        self._kept.append(_Kept(at, tuple(map(self._store.keep, value)), kept_latents))

    def predict(self, at: Moment, *, latents: Tensor | None = None) -> Streams:
        """Return the prediction, new tensors of the dtype and on the device of what was computed.

        Args:
            at: the hole.
            latents: those now, for predictors that use them.
        """
        weights = self._predictor.weights(at, [kept.at for kept in self._kept])
        streams = len(self._kept[-1].value)
        return tuple(self._combine(weights, n, latents) for n in range(streams))

    def error(self, at: Moment, value: Streams, latents: Tensor | None = None) -> Tensor:
        """Return ‖prediction − value‖ / ‖value‖ over all streams, a scalar tensor: what a hole here would have cost."""
        pairs = zip(self.predict(at, latents=latents), value, strict=True)
        wrong, right = zip(*(((p.float() - v.float()).norm(), v.float().norm()) for p, v in pairs), strict=True)
        relative: Tensor = torch.stack(wrong).norm() / torch.stack(right).norm().clamp(min=1e-30)
        return relative

    def _combine(self, weights: Weights, stream: int, latents: Tensor | None) -> Tensor:
        dtype, device = self._forms[stream]
        terms = self._terms(weights, stream, latents)
        # Differences of latents cancel: a velocity in half precision is summed in the precision of its latents.
        wide = max((dtype, *(tensor.dtype for tensor, _ in terms)), key=lambda each: each.itemsize)
        total: Tensor | None = None
        for tensor, weight in terms:
            term = self._store.take(tensor, device).to(wide)
            total = term * weight if total is None else torch.add(total, term, alpha=weight)
        if total is None:
            return torch.zeros_like(self._kept[-1].value[stream], dtype=dtype, device=device)
        return total.to(dtype)

    def _terms(self, weights: Weights, stream: int, latents: Tensor | None) -> list[tuple[Tensor, float]]:
        terms = list(zip((kept.value[stream] for kept in self._kept), weights.values, strict=True))
        if weights.latents:
            terms += [(_present(kept.latents), w) for kept, w in zip(self._kept, weights.latents, strict=True)]
        if weights.here:
            terms.append((_present(latents), weights.here))
        return [(tensor, weight) for tensor, weight in terms if weight]


def _present(latents: Tensor | None) -> Tensor:
    if latents is None:
        raise ParametersInvalid(
            "this predictor needs the latents, which were not given; a cache of the velocity has them"
        )
    return latents
