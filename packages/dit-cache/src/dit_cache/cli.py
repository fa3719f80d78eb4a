"""``dit-cache``: find schedules, and look at them."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_cache.errors import CacheError, SearchError

if TYPE_CHECKING:
    from dit_cache.schedule import Schedule
    from dit_cache.searcher.progress import TerminalWatch

_COST = "this takes the time of up to {total:.0f} uncached generations of one sample"
_EXIT_CODES = "exit codes: 0 done, 2 usage or input error, 3 internal error, 130 interrupted"
_PROBLEM = (
    "MODULE:FUNCTION that returns the arguments of dit_cache.search as a dict: run, sigmas, calibration, validation, "
    "such as wan_infer.caching:problem; the folder you are in is searched as well"
)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(prog="dit-cache", description=__doc__, epilog=_EXIT_CODES)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    find = commands.add_parser("search", help="find the best schedule for a share of the steps, or for every share")
    find.add_argument("problem", metavar="PROBLEM", help=_PROBLEM)
    find.add_argument("--budget", required=True, type=_budget, help="share of the steps that is computed, or all")
    find.add_argument("--output", required=True, type=Path, help="the schedule, a .json; with --budget all, a folder")
    find.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an argument of the function, as JSON; again for more",
    )
    find.add_argument(
        "--predictor", choices=("best", "fitted", "taylor", "reuse"), default="best", help="default: best"
    )
    find.add_argument("--trials", type=int, help="live runs of neighbours (default: 20; with --budget all 0)")
    find.add_argument(
        "--journal",
        type=Path,
        help="measurements, of which those there are used; kept then (default: OUTPUT.journal, until it is done)",
    )
    find.add_argument("--overwrite", action="store_true", help="replace what exists")
    show = commands.add_parser("show", help="print what a schedule says")
    show.add_argument("file", type=Path, help="a schedule")
    show.add_argument("--json", action="store_true", help="print JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done, 2 bad input, 3 a defect of ours, 130 interrupted."""
    options = build_parser().parse_args(argv)
    try:
        _COMMANDS[options.command](options)
    except KeyboardInterrupt:
        print("dit-cache: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    except (CacheError, OSError) as error:
        print(f"dit-cache: error: {error}", file=sys.stderr)
        return 2
    except Exception:  # noqa: BLE001  # the edge of the command: a defect, shown whole
        traceback.print_exc()
        return 3
    return 0


def _search(options: argparse.Namespace) -> None:
    from dit_cache.searcher.progress import TerminalWatch

    output: Path = options.output
    if options.budget is not None and output.is_dir():
        raise SearchError(f"{output} is a folder; name a file, such as {output / 'schedule.json'}")
    if output.exists() and not options.overwrite:
        raise SearchError(f"{output} exists; name another, or say --overwrite")
    journal = options.journal or output.with_name(output.name + ".journal")
    arguments = {
        **_problem(options.problem, options.set),
        "predictor": options.predictor,
        "journal": journal,
        "about": {"problem": options.problem, "set": sorted(options.set)},
        "watch": (shown := TerminalWatch(_COST)),
    }
    if options.trials is not None:
        arguments["trials"] = options.trials
    if options.budget is None:
        _search_all(output, arguments, shown)
    else:
        _search_one(output, options.budget, arguments, shown)
    print(f"written to {output}", file=sys.stderr)
    if options.journal is None:
        journal.unlink(missing_ok=True)


def _search_one(output: Path, budget: float, arguments: dict[str, Any], shown: TerminalWatch) -> None:
    from dit_cache import search

    schedule = search(**arguments, budget=budget)
    shown.end()
    schedule.save(output, overwrite=True)  # whether it may is asked before the search
    print(_text(schedule))


def _search_all(folder: Path, arguments: dict[str, Any], shown: TerminalWatch) -> None:
    from dit_cache import plot_front, search_front

    front = search_front(**arguments)
    shown.end()
    folder.mkdir(parents=True, exist_ok=True)
    for schedule in front.schedules:
        schedule.save(folder / f"schedule-{schedule.flops_share:.3f}.json", overwrite=True)
        print(f"{schedule.flops_share:.3f}  {schedule.score:6.2f} dB  {schedule.plan}")
    try:
        plot_front(
            folder / "front.png",
            {arguments["predictor"]: front.points()},
            xlabel="share of the steps that is computed",
            ylabel="score on validation samples [dB]",
            title="Schedules",
        )
    except CacheError as error:  # matplotlib is an extra
        print(f"dit-cache: no plot: {error}", file=sys.stderr)


def _show(options: argparse.Namespace) -> None:
    from dit_cache.schedule import Schedule

    schedule = Schedule.load(options.file)
    print(options.file.read_text(encoding="utf-8") if options.json else _text(schedule))


def _text(schedule: Schedule) -> str:
    made = schedule.made
    lines = {
        "plan": schedule.plan,
        "computed": f"{len(schedule.computed)} of {len(schedule.plan)} steps ({schedule.flops_share:.1%})",
        "holes": f"filled by {schedule.filled_by}",
        "score": f"{_dB(schedule.score)} on validation, {_dB(schedule.calibration_score)} on calibration samples",
        "sigmas": f"{schedule.sigmas[0]:.4f} to {schedule.sigmas[-1]:.4f}",
        "made for": f"{made.model or 'any model'}, {made.solver or 'any solver'}",
        "settings": f"shift {made.shift}, guidance {made.guidance}",
        "samples": f"{len(schedule.calibration)} calibration, {len(schedule.validation)} validation",
    }
    return "\n".join(f"{name:<9} {text}" for name, text in lines.items())


def _dB(score: float | None) -> str:
    return "not measured" if score is None else f"{score:.2f} dB"


def _problem(target: str, settings: Sequence[str]) -> dict[str, Any]:
    """Call MODULE:FUNCTION."""
    module, _, function = target.partition(":")
    sys.path.insert(0, str(Path.cwd()))  # what runs is a script elsewhere
    try:
        made: Callable[..., Any] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise SearchError(f"{target!r} cannot be found: {error}; {_PROBLEM}") from error
    given = dict(map(_setting, settings))
    try:
        inspect.signature(made).bind(**given)
    except TypeError as error:
        raise SearchError(f"{target} does not take what --set gives: {error}") from error
    try:
        arguments = made(**given)
    except (ValueError, OSError) as error:
        raise SearchError(f"{target} refuses: {error}") from error
    if not isinstance(arguments, dict) or not {"run", "sigmas", "calibration", "validation"} <= set(arguments):
        raise SearchError(f"{target} did not return the arguments of a search; expected: {_PROBLEM}")
    return arguments


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise SearchError(f"--set {text} is no NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value  # a word needs no quotes


def _budget(text: str) -> float | None:
    if text == "all":
        return None
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share of the steps in (0, 1]; or say all")
    return share


_COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {"search": _search, "show": _show}
