"""The searcher: record, disturb, plan exactly, refine in live runs, choose on other samples.

1. A recorded run of each calibration sample leaves a Gram matrix, and disturbed ones leave the propagation gains.
2. The dynamic programme gives the cheapest schedule of every length, in the model of :mod:`.costs`.
3. For a wanted budget, its neighbours are run live, the most promising first; what is better is moved to.
4. Of the best starts and the last stops of that way, the one that is best on the validation samples is taken: they had
   no part in finding it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, get_args

from dit_cache.errors import SearchError
from dit_cache.schedule import COMPUTED, FITTED, Made, Schedule
from dit_cache.searcher.bench import Bench, names_of
from dit_cache.searcher.journal import Journal
from dit_cache.searcher.measure import Run, Sample
from dit_cache.searcher.planning import Computed, Planner
from dit_cache.searcher.progress import Counter, Watch

PredictorKind = Literal["best", "fitted", "taylor", "reuse"]

# What the gaps of a schedule may be filled with; of several lines, each is planned, and live runs decide.
_POLYNOMIALS = ("0", "1", "2")
_KINDS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "best": ((FITTED,), _POLYNOMIALS),
    "fitted": ((FITTED,),),
    "taylor": (_POLYNOMIALS,),
    "reuse": (("0",),),
}
_STARTS = 3  # schedules that one planner begins refinement with at most
_STOPS = 3  # the last stops of refinement that validation chooses from, besides the best start of each planner


def search(run: Run[Sample], *, budget: float, trials: int = 20, **arguments: Any) -> Schedule:
    """Return the best schedule that was found with as many computed steps as a share `budget` of them pays for.

    Args:
        run: one generation, see :mod:`.measure`.
        budget: share of the steps, in (0, 1].
        trials: neighbours that are run live in refinement, with all calibration samples each.
        arguments: the others of `search_front`: sigmas, calibration, validation, …

    Raises:
        SearchError: an argument cannot be used, or the run is none.
    """
    (schedule,) = search_front(run, budgets=[budget], trials=trials, **arguments).schedules
    return schedule


def search_front(
    run: Run[Sample],
    *,
    sigmas: Sequence[float],
    calibration: Sequence[Sample],
    validation: Sequence[Sample],
    budgets: Sequence[float] | Literal["all"] = "all",
    predictor: PredictorKind = "best",
    made: Made | None = None,
    batch: int = 1,
    every: int = 3,
    trials: int = 0,
    journal: str | Path | None = None,
    about: Mapping[str, Any] | None = None,
    watch: Watch | None = None,
) -> Front:
    """Return a schedule for every budget, each scored on the validation samples.

    Args:
        run: one generation, see :mod:`.measure`.
        sigmas: noise levels of the steps and of the end.
        calibration: samples that schedules are found with; about 8 different ones.
        validation: others, that they are chosen with. JSON values both, as a rule [prompt, seed].
        budgets: shares of the steps, in (0, 1]; "all" for every one that is possible.
        predictor: what is put in holes. "fitted": weights for each hole, by least squares over the calibration
            samples; "taylor": a polynomial, its degree chosen for each gap; "best": the better of the two; "reuse":
            the last value.
        made: what the schedule is for; written into it.
        batch: samples in one call of `run`.
        every: at how many steps one is disturbed; the gains between are interpolated.
        trials: neighbours that are run live in refinement, with all calibration samples each.
        journal: a file in which measurements are kept; an interrupted search goes on from it.
        about: what else decides about the measurements, JSON; a journal about something else is refused.
        watch: is told the cost before anything runs, then how far the search is.

    Raises:
        SearchError: an argument cannot be used, or the run is none.
    """
    levels = [float(level) for level in sigmas]
    if len(levels) < 3 or any(after >= before for before, after in itertools.pairwise(levels)):
        raise SearchError(f"sigmas are {levels}; falling levels of at least 2 steps, and the end, are expected")
    if batch < 1 or every < 1:
        raise SearchError(f"batch is {batch}, every is {every}; both are whole numbers from 1 on")
    of = {"sigmas": levels, "made": asdict(made or Made()), "calibration": names_of(calibration), "every": every}
    kept, counter = Journal(journal, {**of, **(about or {})}), Counter(watch=watch)
    searcher = _Searcher(
        Bench(run=run, sigmas=levels, batch=batch, every=every, journal=kept, counter=counter),
        calibration=calibration,
        validation=validation,
        predictor=predictor,
        made=made,
    )
    counts = None if budgets == "all" else sorted({searcher.count(float(budget)) for budget in budgets})
    return Front(tuple(searcher.find(counts, trials)))


@dataclass(frozen=True)
class Front:
    """Schedules by rising share of computed steps."""

    schedules: tuple[Schedule, ...]

    def best(self, budget: float) -> Schedule:
        """Return the best schedule within a budget.

        Raises:
            SearchError: none is that cheap.
        """
        affordable = [schedule for schedule in self.schedules if schedule.flops_share <= budget + 1e-9]
        if not affordable:
            cheapest = min(schedule.flops_share for schedule in self.schedules)
            raise SearchError(f"the cheapest schedule has a share of {cheapest:.2f}; {budget} was asked for")
        return max(affordable, key=_score)

    def points(self) -> list[tuple[float, float]]:
        """Return (share of computed steps, score in dB) of each."""
        return [(schedule.flops_share, _score(schedule)) for schedule in self.schedules]


class _Searcher(Generic[Sample]):
    def __init__(
        self,
        bench: Bench[Sample],
        *,
        calibration: Sequence[Sample],
        validation: Sequence[Sample],
        predictor: PredictorKind,
        made: Made | None,
    ) -> None:
        if predictor not in _KINDS:
            raise SearchError(f"{predictor!r} is no predictor; there are {', '.join(get_args(PredictorKind))}")
        if not calibration or not validation:
            raise SearchError(
                "samples are missing; about 8 for calibration and 8 others for validation are a good start"
            )
        if same := set(names_of(calibration)) & set(names_of(validation)):
            raise SearchError(f"samples are in calibration and in validation: {', '.join(sorted(same))}")
        self._bench = bench
        self._calibration, self._validation = calibration, validation
        self._kinds = _KINDS[predictor]
        self._blank = Schedule(
            plan=COMPUTED * bench.steps,
            sigmas=tuple(bench.sigmas[:-1]),
            made=made or Made(),
            calibration=tuple(names_of(calibration)),
            validation=tuple(names_of(validation)),
        )

    def count(self, budget: float) -> int:
        """Steps that a budget pays for."""
        if not 0 < budget <= 1:
            raise SearchError(f"the budget is {budget}; it is a share of the steps, in (0, 1]")
        if (count := int(budget * self._bench.steps + 1e-9)) < 1:
            raise SearchError(f"a budget of {budget} is less than one of {self._bench.steps} steps")
        return count

    def find(self, counts: Sequence[int] | None, trials: int) -> list[Schedule]:
        """A schedule for each number of computed steps; for all that are possible when None."""
        self._bench.counter.announce(self._cost(counts or range(1, self._bench.steps + 1), trials))
        recording = self._bench.record(self._calibration)
        planners = [Planner(recording, kinds, self._blank) for kinds in self._kinds]
        possible = sorted({count for planner in planners for count in planner.by_count})
        if impossible := set(counts or ()) - set(possible):
            raise SearchError(
                f"{min(impossible)} computed of {self._bench.steps} steps leave gaps that are too long; the least is "
                f"{possible[0]}"
            )
        return [self._refined(planners, count, trials) for count in counts or possible]

    def _cost(self, counts: Sequence[int], trials: int) -> float:
        """Uncached generations of one sample that are needed at most."""
        lines = len(self._kinds)
        runs, stops = (_STARTS * lines + trials, lines + _STOPS) if trials else (0, lines)
        live = runs * len(self._calibration) + stops * len(self._validation)
        references = len(self._validation)
        return self._bench.recording_cost(len(self._calibration)) + references + live * sum(counts) / self._bench.steps

    def _refined(self, planners: Sequence[Planner], count: int, trials: int) -> Schedule:
        starts = [(planner, computed) for planner in planners for computed in planner.by_count.get(count, ())]
        if trials:
            stops = self._climb({start: self._calibrated(*start) for start in starts}, trials)
        else:
            stops = list({planner: (planner, computed) for planner, computed in starts}.values())
        return max((self._validated(planner.schedule(computed)) for planner, computed in stops), key=_score)

    def _climb(self, scored: dict[tuple[Planner, Computed], float], trials: int) -> list[tuple[Planner, Computed]]:
        """Move to better neighbours until the trials are used up; return the best starts and the last stops."""
        best = {planner: (planner, computed) for (planner, computed), _ in sorted(scored.items(), key=lambda at: at[1])}
        way = [max(scored, key=scored.__getitem__)]
        while trials > 0:
            planner, computed = way[-1]
            fresh = [(planner, move) for move in planner.moves(computed) if (planner, move) not in scored]
            for move in fresh[:trials]:
                trials -= 1
                scored[move] = self._calibrated(*move)
                if scored[move] > scored[way[-1]]:
                    way.append(move)
                    break
            else:
                break
        return list(dict.fromkeys((*best.values(), *way[-_STOPS:])))

    def _calibrated(self, planner: Planner, computed: Computed) -> float:
        return self._bench.score(planner.schedule(computed), self._calibration)

    def _validated(self, schedule: Schedule) -> Schedule:
        return replace(
            schedule,
            score=self._bench.score(schedule, self._validation),
            calibration_score=self._bench.known_score(schedule, self._calibration),
        )


def _score(schedule: Schedule) -> float:
    return -1e9 if schedule.score is None else schedule.score
