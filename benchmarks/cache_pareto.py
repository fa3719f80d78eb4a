"""What does each way to skip compute cost in quality, at equal compute, on one network and the same noise?

    python benchmarks/cache_pareto.py --output cache.json --plot cache.png
    python benchmarks/cache_pareto.py --quick --methods "cache-dit" "fewer steps"

Every method generates the same held-out (prompt, seed) pairs with diffusers' Wan transformer and the weights of
wan-mini, one at a time, with guidance. Measured against the uncached videos of the same solver: executed floating point
operations, PSNR, SSIM, relative L2, error of the motion, and whether a judge that knows neither still reads the digit
and its direction. Time is taken in turns with an uncached run, and that second run has to repeat the first bit for bit.
A peer that changes nothing is called a no-op and one that fails a crash; neither is left out. A first block that is
always computed is a sixth of this network and a thirtieth of Wan2.1's: peers that watch it look dearer than there.

Then, for each budget: the best of ours, of the peers and of the controls, on the front of each family between its
settings, how many dB lie between ours and the rest, and how much compute the rest needs for the same PSNR.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import platform
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from cache_peers import GUIDANCE, LATENTS, Hook, Method, Problem, Run, Sample, controls, load, peers
from torch import Tensor
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from dit_cache import Front, VelocityCache, search_front
from dit_cache.errors import CacheError
from dit_cache.meter import FlopMeter, compare, plot_front
from dit_cache.searcher.searching import PredictorKind
from wan_infer import draw_noise, guide
from wan_infer.mini.judge import Judge, clean_judge

BUDGETS = (0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7)
UNCACHED = Method(family="uncached", setting="", side="control")


OUR_BUDGETS = (0.2, *BUDGETS)


def ours(problem: Problem) -> list[Method]:
    """Ours: a method a setting, families named "ours …", `side="ours"`; what they are fitted to is in `problem`."""

    @functools.cache
    def front(kind: PredictorKind) -> Front:
        run = functools.partial(_batch, problem)
        return search_front(
            run,
            sigmas=problem.sampler().sigmas.tolist(),
            budgets=OUR_BUDGETS,
            calibration=[asdict(sample) for sample in problem.calibration],
            validation=[asdict(sample) for sample in problem.validation],
            predictor=kind,
            batch=len(problem.calibration),
            every=1,
            trials=20,
        )

    def method(kind: PredictorKind, budget: float) -> Method:
        def start(run: Run) -> Hook:
            cache = front(kind).best(budget).cache()
            run.stack.enter_context(cache.generation(run.sampler.sigmas.tolist()))
            return lambda predict, latents, index: cache.velocity(predict, latents)

        return Method(family=f"ours, {kind}", setting=f"{budget:g}", side="ours", start=start)

    ablations: tuple[PredictorKind, ...] = ("taylor", "reuse")
    return [
        *(method("best", budget) for budget in OUR_BUDGETS),
        *(method(kind, budget) for kind in ablations for budget in OUR_BUDGETS[1::2]),
    ]


def _batch(problem: Problem, samples: Sequence[Mapping[str, Any]], cache: VelocityCache) -> Tensor:
    """Generations of several samples at once: what a search runs."""
    chosen = [Sample(**sample) for sample in samples]
    latents = torch.stack([draw_noise(LATENTS, sample.seed) for sample in chosen])
    sampler = problem.sampler()
    texts = [torch.cat([problem.texts[s.prompt] for s in chosen]), problem.texts[""].expand(len(chosen), -1, -1)]

    def predict() -> Tensor:
        times = sampler.timesteps[sampler.index].float().expand(len(chosen))
        cond, uncond = (problem.network(latents, times, text, return_dict=False)[0] for text in texts)
        return guide(cond, uncond, GUIDANCE)

    with cache.generation(sampler.sigmas.tolist()):
        for _ in sampler.timesteps:
            latents = sampler.step(cache.velocity(predict, latents), latents)
    return latents


def methods(problem: Problem) -> list[Method]:
    """All that is measured; nothing is fitted or imported before a method starts."""
    return [*controls(problem), *ours(problem), *peers(problem)]


@dataclass(frozen=True, kw_only=True)
class Look:
    """What became of one test sample.

    Attributes:
        share: executed operations, of those of the uncached run.
        psnr, ssim, relative_l2, temporal: against the uncached video.
        digit, direction: whether the judge reads what was asked for.
    """

    share: float
    psnr: float
    ssim: float
    relative_l2: float
    temporal: float
    digit: bool
    direction: bool


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one setting did.

    Attributes:
        status: "active", "no-op", "reference", or "crash: " and the reason.
        looks: one a test sample, none after a crash.
        seconds, uncached_seconds: of the steps, taken in turns.
        repeats: whether second runs, and uncached ones after them, gave the same bits: nothing is left behind.
    """

    solver: str
    family: str
    setting: str
    side: str
    status: str
    looks: tuple[Look, ...] = ()
    seconds: tuple[float, ...] = ()
    uncached_seconds: tuple[float, ...] = ()
    repeats: bool = True

    def mean(self, what: str) -> float:
        """Over the samples."""
        return statistics.fmean(getattr(look, what) for look in self.looks)

    @property
    def worst(self) -> float:
        """The lowest PSNR."""
        return min(look.psnr for look in self.looks)

    @property
    def times_uncached(self) -> float:
        """How long it takes, in uncached runs."""
        return statistics.median(self.seconds) / statistics.median(self.uncached_seconds)


def main() -> int:
    """Measure, print tables, write JSON and plot; the exit code is 2 when something is missing or fails."""
    arguments = _parse()
    torch.set_num_threads(arguments.threads)
    rows: list[Row] = []
    try:
        judge = clean_judge()
        problem = load(solver=arguments.solvers[0], steps=arguments.steps, samples=arguments.samples)
        for solver in arguments.solvers:
            found: list[Row] = []
            for row in measure(replace(problem, solver=solver), judge, arguments.methods, arguments.rounds):
                found.append(row)
                if arguments.output is not None:  # as it goes: an interrupted run keeps what it has measured
                    write_json(arguments, [*rows, *found])
            print_rows(found)
            print_budgets(budgets(found))
            rows += found
        if arguments.plot is not None:
            plot(rows, arguments.plot)
    except (CacheError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; --output holds what was measured until now", file=sys.stderr)
        return 130
    return 0


# ---- measuring ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """The uncached runs of one solver: what every method is compared with."""

    problem: Problem
    judge: Judge
    flops: int
    latents: list[Tensor]
    videos: list[Tensor]


def measure(problem: Problem, judge: Judge, prefixes: Sequence[str], rounds: int) -> Iterator[Row]:
    """Yield the uncached row, then one for each method whose name starts with one of `prefixes`."""
    chosen = [method for method in methods(problem) if method.name.startswith(tuple(prefixes))]
    with tqdm(total=(len(chosen) + 2) * len(problem.test), desc=problem.solver, disable=None) as progress:
        reference = _refer(problem, judge, progress)
        for method in (UNCACHED, *chosen):
            progress.set_postfix_str(method.name)
            before = progress.n
            yield _try(method, reference, rounds, progress)
            progress.update(before + len(problem.test) - progress.n)  # what a crash left out


def _refer(problem: Problem, judge: Judge, progress: tqdm[None]) -> Reference:
    latents, flops = [], 0
    for sample in problem.test:
        made, flops = _metered(problem, sample, UNCACHED)
        latents.append(made)
        progress.update()
    videos = [_decode(problem, made) for made in latents]
    return Reference(problem=problem, judge=judge, flops=flops, latents=latents, videos=videos)


def _try(method: Method, reference: Reference, rounds: int, progress: tqdm[None]) -> Row:
    """The row of a method; that a peer crashes is one as well."""
    try:
        return _measured(method, reference, rounds, progress)
    except Exception as error:
        if method.side != "peer" or isinstance(error, ModuleNotFoundError):
            raise
        return _row(method, reference, f"crash: {type(error).__name__}: {str(error).partition(chr(10))[0]}")


def _row(method: Method, reference: Reference, status: str, **measured: Any) -> Row:
    return Row(
        solver=reference.problem.solver,
        family=method.family,
        setting=method.setting,
        side=method.side,
        status=status,
        **measured,
    )


def _measured(method: Method, reference: Reference, rounds: int, progress: tqdm[None]) -> Row:
    problem, repeats, differs = reference.problem, True, False
    looks: list[Look] = []
    seconds: list[tuple[float, float]] = []
    for sample, expected, video in zip(problem.test, reference.latents, reference.videos, strict=True):
        latents, flops = _metered(problem, sample, method)
        looks.append(_look(sample, flops / reference.flops, video, _decode(problem, latents), reference.judge))
        differs |= not torch.equal(latents, expected)
        if len(seconds) < rounds:
            clean, uncached = problem.generate(sample)
            again, taken = problem.generate(sample, method.start, steps=method.steps)
            seconds.append((taken, uncached))
            repeats &= torch.equal(again, latents) and torch.equal(clean, expected)
        progress.update()
    active = differs and min(look.share for look in looks) < 1
    return _row(
        method,
        reference,
        "reference" if method is UNCACHED else "active" if active else "no-op",
        looks=tuple(looks),
        seconds=tuple(taken for taken, _ in seconds),
        uncached_seconds=tuple(uncached for _, uncached in seconds),
        repeats=repeats,
    )


class Counter(TorchFunctionMode):
    """Counts what this network is made of: linear layers, the patch embedding, attention; by torch's convention.

    A `FlopMeter` sees everything and takes five times as long as the network; every method is held against one once.
    """

    def __init__(self) -> None:
        self.flops = 0

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        if function is F.linear:
            self.flops += 2 * out.numel() * args[1].shape[1]
        elif function is F.conv3d:
            self.flops += 2 * out.numel() * args[1][0].numel()
        elif function is F.scaled_dot_product_attention:
            query, key = (args[n] if len(args) > n else (kwargs or {})[name] for n, name in enumerate(("query", "key")))
            self.flops += 4 * query.numel() * key.shape[-2]
        return out


def _metered(problem: Problem, sample: Sample, method: Method) -> tuple[Tensor, int]:
    counter = Counter()
    latents, _ = problem.generate(sample, method.start, steps=method.steps, meter=counter)
    if sample is problem.test[0]:
        meter = FlopMeter()
        problem.generate(sample, method.start, steps=method.steps, meter=meter)
        assert counter.flops == meter.flops, f"{method.name}: {counter.flops} counted, {meter.flops} metered"
    return latents, counter.flops


@torch.inference_mode()
def _decode(problem: Problem, latents: Tensor) -> Tensor:
    video: Tensor = problem.vae.decode(latents).clamp(-1, 1)
    return video


def _look(sample: Sample, share: float, reference: Tensor, video: Tensor, judge: Judge) -> Look:
    scores = compare(reference, video).mean  # of one video, with at most 100 dB
    digit, direction = judge.read(video[0])
    return Look(
        share=share,
        psnr=scores.psnr,
        ssim=scores.ssim,
        relative_l2=scores.relative_l2,
        temporal=scores.temporal,
        digit=digit == sample.digit,
        direction=direction == sample.direction,
    )


# ---- the fronts -----------------------------------------------------------------------------------------------------

Curve = list[tuple[float, float]]  # (share, mean PSNR), both rising


def fronts(rows: Sequence[Row], side: str) -> dict[str, Curve]:
    """For each family, those active settings that no other of it beats in both."""
    points: dict[str, Curve] = {}
    for row in rows:
        if row.side == side and row.status == "active":
            points.setdefault(row.family, []).append((row.mean("share"), row.mean("psnr")))
    return {family: _rising(found) for family, found in points.items()}


def _rising(points: Curve) -> Curve:
    front: Curve = []
    for share, psnr in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or psnr > front[-1][1]:
            front.append((share, psnr))
    return front


def psnr_at(front: Curve, share: float) -> float | None:
    """Mean PSNR that a family reaches with this share: on the line between settings; None below its cheapest."""
    shares, values = zip(*front, strict=True)
    return None if share < shares[0] else float(np.interp(share, shares, values))


def share_for(front: Curve, psnr: float) -> float | None:
    """The least share with which a family reaches a mean PSNR; None if none of its settings does."""
    shares, values = zip(*front, strict=True)
    return None if psnr > values[-1] else float(np.interp(psnr, values, shares))


Leader = tuple[str, float]  # a family, and its PSNR


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Who is best with a share of the compute.

    Attributes:
        ours, peer, control: the best of each side; None where its cheapest setting costs more.
        others_need: the least share with which any other family reaches our PSNR, over the share; None where none does.
    """

    solver: str
    share: float
    ours: Leader | None
    peer: Leader | None
    control: Leader | None
    others_need: float | None

    @property
    def lead(self) -> float | None:
        """Our PSNR less that of the best other, in dB; None where one is missing."""
        others = [leader[1] for leader in (self.peer, self.control) if leader is not None]
        return self.ours[1] - max(others) if self.ours is not None and others else None


def budgets(rows: Sequence[Row]) -> list[Budget]:
    """Compare the sides at every share of `BUDGETS`, of the rows of one solver."""
    sides = {side: fronts(rows, side) for side in ("ours", "peer", "control")}
    others = [*sides["peer"].values(), *sides["control"].values()]
    compared = []
    for share in BUDGETS:
        leaders = {side: _best(families, share) for side, families in sides.items()}
        need: list[float] = []
        if leaders["ours"] is not None:
            shares = (share_for(front, leaders["ours"][1]) for front in others)
            need = [each / share for each in shares if each is not None]
        compared.append(Budget(solver=rows[0].solver, share=share, **leaders, others_need=min(need, default=None)))
    return compared


def _best(families: Mapping[str, Curve], share: float) -> Leader | None:
    reached = ((family, psnr_at(front, share)) for family, front in families.items())
    known = [(family, psnr) for family, psnr in reached if psnr is not None]
    return max(known, key=lambda leader: leader[1], default=None)


# ---- what is said ---------------------------------------------------------------------------------------------------


def print_rows(rows: Sequence[Row]) -> None:
    """The table of one solver, by executed operations; crashes last."""
    print(f"\n{rows[0].solver}, {len(rows[0].looks)} pairs")
    print(
        f"{'method':36} {'FLOPs':>6} {'PSNR':>6} {'worst':>6} {'SSIM':>6} {'rel L2':>7} {'motion':>7} "
        f"{'digit':>6} {'way':>5} {'s':>6} {'time':>5}"
    )
    for row in sorted(rows, key=lambda row: row.mean("share") if row.looks else math.inf):
        print(_line(row), flush=True)


def _line(row: Row) -> str:
    name = f"{row.family} {row.setting}"
    if not row.looks:
        return f"{name:36} {row.status}"
    taken = f"{statistics.median(row.seconds):6.2f} {row.times_uncached:5.2f}" if row.seconds else f"{'':12}"
    notes = [row.status] * (row.status != "active") + ["does not repeat"] * (not row.repeats)
    return (
        f"{name:36} {row.mean('share'):6.3f} {row.mean('psnr'):6.2f} {row.worst:6.2f} {row.mean('ssim'):6.3f} "
        f"{row.mean('relative_l2'):7.4f} {row.mean('temporal'):7.4f} {row.mean('digit'):6.0%} "
        f"{row.mean('direction'):5.0%} {taken}  {', '.join(notes)}"
    )


def print_budgets(compared: Sequence[Budget]) -> None:
    """Who is best at each budget, by how much, and what the same PSNR costs the others."""
    print(f"\n{'FLOPs':>5}  {'ours':34} {'best peer':44} {'best control':30} {'lead':>5}  others need for our PSNR")
    for each in compared:
        cells = ["-" if who is None else f"{who[1]:.2f} {who[0]}" for who in (each.ours, each.peer, each.control)]
        lead = "-" if each.lead is None else f"{each.lead:+.2f}"
        need = "-" if each.ours is None else "none reaches it"
        if each.others_need is not None:
            need = f"{each.others_need:.2f} times the compute"
        print(f"{each.share:5.2f}  {cells[0]:34} {cells[1]:44} {cells[2]:30} {lead:>5}  {need}")
    behind = [f"{each.share:.2f}" for each in compared if each.lead is not None and each.lead <= 0]
    if any(each.ours for each in compared):
        print(f"ours is behind at {', '.join(behind)}" if behind else "ours leads at every budget that it can meet")


def plot(rows: Sequence[Row], path: Path) -> None:
    """Mean PSNR over executed operations, a line a family; a file a solver, whose name is put before the suffix."""
    for solver in dict.fromkeys(row.solver for row in rows):
        points: dict[str, Curve] = {}
        for row in rows:
            if row.solver == solver and row.status == "active":
                points.setdefault(row.family, []).append((row.mean("share"), row.mean("psnr")))
        plot_front(path.with_stem(f"{path.stem}-{solver}"), points, title=solver)


def write_json(arguments: argparse.Namespace, rows: Sequence[Row]) -> None:
    """Write every single number, the comparison by budget, and what they were taken on."""
    machine = {"python": platform.python_version(), "torch": torch.__version__, "cpus": os.cpu_count()}
    settings = {key: getattr(arguments, key) for key in ("steps", "samples", "rounds", "threads")}
    solvers = [[row for row in rows if row.solver == solver] for solver in arguments.solvers]
    compared = [asdict(each) for of_solver in solvers for each in budgets(of_solver)]
    record = {"machine": machine, "settings": settings, "budgets": compared, "rows": [asdict(row) for row in rows]}
    partial = arguments.output.with_name(f".{arguments.output.name}.partial")
    partial.write_text(json.dumps(record, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(arguments.output)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--solvers", nargs="+", choices=("unipc", "euler"), default=("unipc", "euler"))
    parser.add_argument("--steps", type=_positive, default=30, help="of an uncached run (default: %(default)s)")
    parser.add_argument("--samples", type=_positive, default=16, help="test pairs (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="pairs that are timed (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", default=[""], help="only those whose names begin so (default: all)")
    parser.add_argument("--quick", action="store_true", help="as --solvers unipc --samples 4 --rounds 1")
    parser.add_argument("--threads", type=_positive, default=torch.get_num_threads(), help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, help="where the single numbers go, as JSON (default: nowhere)")
    parser.add_argument("--plot", type=Path, help="where plots go, .png or .svg, one a solver (default: nowhere)")
    arguments = parser.parse_args()
    if arguments.steps < 16:
        parser.error(f"--steps {arguments.steps}: at least 16 are needed, for a quarter of them to be four")
    if arguments.quick:
        arguments.solvers, arguments.samples, arguments.rounds = ("unipc",), 4, 1
    return arguments


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number from 1 on is expected")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
