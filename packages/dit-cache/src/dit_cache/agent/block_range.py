"""dit_block_cache: by how much a range of blocks changed what went in is added instead of computing the range."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from dit_cache.agent.calling import ENCODER, HIDDEN, call
from dit_cache.agent.config import Plan
from dit_cache.errors import ModelExecError, ParametersInvalid

_NEVER = -1
_NO_ENCODER = f"[DiTBlockCache] '{ENCODER}' is required when the output count of cache function is 2."


class BlockRange:
    """What one branch keeps: one difference output − input per stream, from the refresh to its last use."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.clear()

    def clear(self) -> None:
        """Drop all."""
        self._kept: dict[str, Tensor] = {}
        self._kept_at = _NEVER
        self._outputs: tuple[str, ...] = ()
        self._as_tuple = False
        self._skipping = False

    def expire(self, step: int) -> None:
        """Drop what no pass of `step` or later can use."""
        if not self._plan.serves(self._kept_at, step):
            self.clear()

    def tensors(self) -> list[Tensor]:
        """Return what is held now."""
        return list(self._kept.values())

    def run(
        self, step: int, block: int, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, bool]:
        """Return the block's result, or what stands for it, and whether it was computed.

        Raises:
            ParametersInvalid: `hidden_states` is missing or no tensor; or a block returns two tensors and was given no
                `encoder_hidden_states`.
            ModelExecError: on a step that refreshes, what a block returned cannot be kept.
        """
        plan = self._plan
        streams = _streams(kwargs)
        if block == plan.block_start:
            self._skipping = plan.reuses(step) and plan.serves(self._kept_at, step)
        if self._skipping and plan.block_start <= block < plan.block_end:
            return self._stand_in(step, block, streams), False
        if block == plan.block_start and plan.keeps(step):
            self._open(step, streams)
        result = call(function, args, kwargs)
        if plan.refreshes(step):
            _check_count(result)
            if block == plan.block_end - 1:
                self._close(result, streams)
        return result, True

    def _open(self, step: int, streams: dict[str, Tensor]) -> None:
        # A block may overwrite its input: a copy is needed, and −input + output rounds as output − input does.
        self.clear()
        self._kept = {name: tensor.neg() for name, tensor in streams.items()}
        self._kept_at = step

    def _close(self, result: Any, streams: dict[str, Tensor]) -> None:
        outputs = _named(result, streams)
        self._outputs, self._as_tuple = tuple(outputs), isinstance(result, (tuple, list))
        if self._kept:
            self._kept = {name: _sum(name, self._kept[name], output) for name, output in outputs.items()}

    def _stand_in(self, step: int, block: int, streams: dict[str, Tensor]) -> Any:
        if any(name not in streams for name in self._outputs):
            raise ParametersInvalid(_NO_ENCODER)
        results = tuple(streams[name] for name in self._outputs)
        if block == self._plan.block_start:
            results = tuple(streams[name] + self._kept[name] for name in self._outputs)
            if self._plan.last_reuse(step):
                self._kept = {}
        return results if self._as_tuple else results[0]


def _streams(kwargs: dict[str, Any]) -> dict[str, Tensor]:
    if HIDDEN not in kwargs:
        raise ParametersInvalid(f"[DiTBlockCache]: Cannot find '{HIDDEN}' in kwargs.")
    hidden, encoder = kwargs[HIDDEN], kwargs.get(ENCODER)
    if hidden is None:
        raise ParametersInvalid(f"[DiTBlockCache]: Input '{HIDDEN}' is None.")
    if not isinstance(hidden, Tensor):
        raise ParametersInvalid(f"[DiTBlockCache]: Input '{HIDDEN}' must be a Tensor, but got {type(hidden).__name__}.")
    return {HIDDEN: hidden} if not isinstance(encoder, Tensor) else {HIDDEN: hidden, ENCODER: encoder}


def _check_count(result: Any) -> None:
    if isinstance(result, (tuple, list)) and len(result) not in (1, 2):
        raise ModelExecError(
            f"[DiTBlockCache] The output count of cache function must be 1 or 2, but got {len(result)}."
        )


def _named(result: Any, streams: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the outputs of the last block of the range by the names of their streams."""
    values: Sequence[Any] = result if isinstance(result, (tuple, list)) else (result,)
    for value in values:
        if value is None:
            raise ModelExecError("[DiTBlockCache] The output of cache function is None.")
        if not isinstance(value, Tensor):
            raise ModelExecError(
                f"[DiTBlockCache] The output of cache function must be Tensors, but got {type(value).__name__}."
            )
    if len(values) == 2 and ENCODER not in streams:
        raise ParametersInvalid(_NO_ENCODER)
    return dict(zip((HIDDEN, ENCODER), values, strict=False))


def _sum(name: str, negated: Tensor, output: Tensor) -> Tensor:
    if negated.shape != output.shape:
        raise ModelExecError(
            f"[DiTBlockCache] '{name}' went into the range of blocks as {list(negated.shape)} and came out as "
            f"{list(output.shape)}: only a range that keeps the shape can be skipped. Two streams are returned in the "
            f"order ({HIDDEN}, {ENCODER})."
        )
    return negated.add_(output) if negated.dtype == output.dtype else negated + output
