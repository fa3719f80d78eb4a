"""A schedule: which steps are computed, what is put in the others, and what it was found for. One JSON file."""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dit_cache.engine.guards import Envelope
from dit_cache.engine.policies import Static
from dit_cache.engine.predictors import Planned
from dit_cache.engine.velocity import VelocityCache
from dit_cache.errors import CacheWarning, GenerationError, ScheduleError, ScheduleMismatch

FORMAT, VERSION = "dit-cache schedule", 1
COMPUTED, FITTED = "C", "f"
_UNKNOWN: tuple[object, ...] = ("", None, {})
_ENOUGH = 4  # calibration samples


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a schedule was found for; "" and None stand for unknown, and are not compared.

    Attributes:
        model: digest of the weights, from `model_digest`.
        solver: its name.
        shift: of the noise levels, for the reader: what counts are the levels themselves.
        guidance: scale of the guidance.
        settings: whatever else is part of it, such as the size of a video; JSON.
    """

    model: str = ""
    solver: str = ""
    shift: float | None = None
    guidance: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Which steps are computed, and what is put in the others.

    Attributes:
        plan: a character for each step: "C" computed, "f" a hole with weights of its own, a digit a hole that is
            filled by the polynomial of that degree (0 repeats the last value).
        sigmas: noise level of each step.
        fitted: hole → (computed step → weight), where the plan says "f".
        made: for what.
        calibration, validation: the samples it was found with, and those it was chosen with.
        calibration_score, score: mean of −20·log10(‖x − x_ref‖/‖x_ref‖) in dB over the final latents, x_ref being
            those of the uncached run; on calibration and on validation. None where it was not measured.
        envelope: computed step → (low, high): mean ± 3 standard deviations over the calibration samples of the relative
            change since the computed step before.
        errors: hole → relative error of its prediction, root mean square over the recorded calibration samples.
    """

    plan: str
    sigmas: tuple[float, ...]
    fitted: Mapping[int, Mapping[int, float]] = field(default_factory=dict)
    made: Made = Made()
    calibration: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    calibration_score: float | None = None
    score: float | None = None
    envelope: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    errors: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if problem := _problem(self):
            raise ScheduleError(problem)

    @property
    def computed(self) -> tuple[int, ...]:
        """The steps that are computed."""
        return tuple(step for step, kind in enumerate(self.plan) if kind == COMPUTED)

    @property
    def flops_share(self) -> float:
        """Executed share of the floating point operations of the uncached run."""
        return len(self.computed) / len(self.plan)

    @property
    def predictor(self) -> Planned:
        """What is put in the holes."""
        orders = {step: int(kind) for step, kind in enumerate(self.plan) if kind.isdigit()}
        return Planned(orders=orders, fitted=self.fitted)

    @property
    def filled_by(self) -> str:
        """What fills the holes, in words."""
        holes = set(self.plan) - {COMPUTED}
        if FITTED in holes:
            return "fitted weights"
        return "the last value" if holes <= {"0"} else "polynomials"

    def cache(self, *, extra: int = 0, **options: Any) -> ScheduleCache:
        """Return a cache that follows this schedule.

        Args:
            extra: steps that the `Envelope` guard may add where a sample changes as hardly any did in calibration.
            options: `store`, `group` and `measure` of the cache.

        Raises:
            ScheduleError: steps may be added, but there were too few samples to know what is usual.
        """
        if extra and len(self.calibration) < _ENOUGH:
            raise ScheduleError(
                f"extra is {extra}; what is usual is known from {_ENOUGH} calibration samples on, this schedule has "
                f"{len(self.calibration)}"
            )
        guards = (Envelope(bounds=self.envelope, extra=extra),) if extra else ()
        return ScheduleCache(self, guards=guards, **options)

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write it as JSON.

        Raises:
            ScheduleError: the file exists, and `overwrite` was not said.
        """
        target = Path(path)
        if target.exists() and not overwrite:
            raise ScheduleError(f"{target} exists; name another file, or say overwrite")
        record = {"format": FORMAT, "version": VERSION, "flops_share": self.flops_share, "filled_by": self.filled_by}
        record |= asdict(self)
        write_text(target, json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        return target

    @classmethod
    def load(cls, path: str | Path) -> Schedule:
        """Read one.

        Raises:
            ScheduleError: there is no such file, or it is no schedule of a version that is known.
        """
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ScheduleError(f"{path} cannot be read as a schedule: {error}") from error
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise ScheduleError(f"{path} is no schedule of dit-cache; `dit-cache search` makes one")
        if record.get("version") != VERSION:
            raise ScheduleError(f"{path} has version {record.get('version')!r}; this dit-cache reads {VERSION}")
        try:
            return cls(
                plan=record["plan"],
                sigmas=tuple(map(float, record["sigmas"])),
                fitted={int(h): {int(s): float(w) for s, w in f.items()} for h, f in record["fitted"].items()},
                made=Made(**record["made"]),
                calibration=_texts(record["calibration"]),
                validation=_texts(record["validation"]),
                calibration_score=_number(record["calibration_score"]),
                score=_number(record["score"]),
                envelope={int(step): (float(low), float(high)) for step, (low, high) in record["envelope"].items()},
                errors={int(step): float(error) for step, error in record["errors"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, ScheduleError):
                raise ScheduleError(f"{path}: {error}") from error
            raise ScheduleError(f"{path} is damaged: {type(error).__name__}: {error}") from error

    def adapted(self, sigmas: Sequence[float], made: Made | None = None) -> Schedule:
        """Return this schedule for a run, or one derived from it where the noise levels are others.

        Derived means: as dense over σ as this one, the same share of steps computed, the last value repeated in the
        holes, which is never far off. It was not verified, and a warning says so; so does one where solver, guidance
        or other settings differ.

        Args:
            sigmas: noise levels of the steps, with or without the final 0.
            made: what the run is; what is unknown is not compared.

        Raises:
            ScheduleMismatch: the model is another one.
        """
        wanted = made or Made()
        if self.made.model and wanted.model and self.made.model != wanted.model:
            raise ScheduleMismatch(
                f"the schedule was found for the model {self.made.model}, this one is {wanted.model}; schedules do not "
                "carry over: search one for this model"
            )
        for name in ("solver", "guidance", "settings"):
            ours, theirs = getattr(self.made, name), getattr(wanted, name)
            if ours not in _UNKNOWN and theirs not in _UNKNOWN and json.dumps(ours) != json.dumps(theirs):
                _warn(f"the schedule was found for {name} {ours}, this run has {theirs}; its score does not hold here")
        if self.fits(sigmas):
            return self
        levels = tuple(float(level) for level in sigmas)
        levels = levels[:-1] if len(levels) > 1 and levels[-1] == 0 else levels
        if not levels or not all(map(math.isfinite, levels)) or len(set(levels)) < len(levels):
            raise ScheduleError(f"sigmas are {list(levels)}; one is needed at least, all finite and different")
        return self._derived(levels)

    def fits(self, sigmas: Sequence[float]) -> bool:
        """Whether these are the noise levels of this schedule, with or without that of the end."""
        extra = len(sigmas) - len(self.sigmas)
        return extra in (0, 1) and all(map(_near, sigmas, self.sigmas))

    def _derived(self, levels: tuple[float, ...]) -> Schedule:
        _warn(
            f"the schedule is for {len(self.plan)} steps from {self.sigmas[0]:.4f} to {self.sigmas[-1]:.4f}, this run "
            f"has {len(levels)} from {levels[0]:.4f} to {levels[-1]:.4f}; one as dense over sigma is derived, and was "
            "not verified: search again for these steps"
        )
        computed = _spread([self.sigmas[step] for step in self.computed], levels, self.flops_share)
        plan = "".join(COMPUTED if step in computed else "0" for step in range(len(levels)))
        return replace(
            self, plan=plan, sigmas=levels, fitted={}, envelope={}, errors={}, calibration_score=None, score=None
        )


class ScheduleCache(VelocityCache):
    """Follows a schedule, in generations with the levels that it was made for and in no other."""

    def __init__(self, schedule: Schedule, **options: Any) -> None:
        super().__init__(Static(schedule.computed), predictor=schedule.predictor, **options)
        self.schedule = schedule
        self.expected = schedule.errors

    def _open(self, sigmas: Sequence[float] | int) -> None:
        if isinstance(sigmas, int):
            sigmas = self.schedule.sigmas if sigmas == len(self.schedule.sigmas) else tuple(map(float, range(sigmas)))
        if not self.schedule.fits(sigmas):
            raise GenerationError(
                f"the schedule is for {len(self.schedule.sigmas)} steps from {self.schedule.sigmas[0]:.4f} to "
                f"{self.schedule.sigmas[-1]:.4f}, this generation has other levels; schedule.adapted(sigmas).cache() "
                "derives one for them"
            )
        super()._open(self.schedule.sigmas)


def model_digest(*models: nn.Module) -> str:
    """Return a name for the weights: equal for equal weights, whatever the dtype they were loaded in.

    Of each parameter, name, shape and 64 values, rounded to bfloat16, are digested: fast for 14 billion parameters.
    """
    digest = hashlib.sha256()
    for index, model in enumerate(models):
        for name, parameter in sorted(model.named_parameters()):
            flat = parameter.detach().reshape(-1)
            picked = flat[:: max(1, flat.numel() // 64)][:64].to("cpu", torch.bfloat16).contiguous()
            digest.update(f"{index} {name} {tuple(parameter.shape)}".encode())
            digest.update(bytes(picked.view(torch.uint8).tolist()))
    return "sha256:" + digest.hexdigest()[:32]


def write_text(target: Path, text: str) -> None:
    """Write a file under a temporary name beside it, and rename it when it is complete."""
    partial = target.parent / f".{target.name}.{os.getpid()}.partial"
    try:
        partial.write_text(text, encoding="utf-8", newline="\n")
        partial.replace(target)
    except OSError as error:
        raise ScheduleError(f"{target} cannot be written: {error}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _spread(old: Sequence[float], levels: Sequence[float], share: float) -> set[int]:
    """Choose steps of `levels` that lie like `old` does, as many as the share asks for, the first among them."""
    count = max(1, min(len(levels), round(share * len(levels))))
    chosen: set[int] = {0}
    for index in range(1, count):
        place = index * (len(old) - 1) / max(1, count - 1)
        below = min(int(place), len(old) - 1)
        above = min(below + 1, len(old) - 1)
        level = old[below] + (place - below) * (old[above] - old[below])
        chosen.add(min((s for s in range(len(levels)) if s not in chosen), key=lambda s: abs(levels[s] - level)))
    return chosen


def _problem(schedule: Schedule) -> str | None:
    plan, sigmas = schedule.plan, schedule.sigmas
    legal = f"{COMPUTED}{FITTED}01234"
    if not isinstance(plan, str) or not plan or set(plan) - set(legal) or plan[0] != COMPUTED:
        return f"the plan is {plan!r}; it has to begin with {COMPUTED} and consist of {', '.join(legal)}"
    if len(sigmas) != len(plan) or not all(map(math.isfinite, sigmas)) or len(set(sigmas)) < len(sigmas):
        return (
            f"there are {len(sigmas)} sigmas for {len(plan)} steps; a finite level for each, all different, is expected"
        )
    holes = {step for step, kind in enumerate(plan) if kind == FITTED}
    if holes != set(schedule.fitted):
        return f"the plan has fitted holes at {sorted(holes)}, the weights are for {sorted(schedule.fitted)}"
    for hole, weights in schedule.fitted.items():
        earlier = [step for step, kind in enumerate(plan[:hole]) if kind == COMPUTED]
        if not weights or sorted(weights) != earlier[-len(weights) :] or not all(map(math.isfinite, weights.values())):
            return f"the weights of step {hole} are for the steps {sorted(weights)}, not for the last computed ones"
    return None


def _texts(given: Any) -> tuple[str, ...]:
    if not isinstance(given, list) or not all(isinstance(each, str) for each in given):
        raise TypeError(f"{given!r} is no list of samples")
    return tuple(given)


def _number(given: Any) -> float | None:
    return None if given is None else float(given)


def _near(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-5, abs_tol=1e-6)


def _warn(message: str) -> None:
    warnings.warn(message, CacheWarning, stacklevel=3)
