"""``dit-ulysses``: choose how to share out the ranks, and measure what it costs."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dit_ulysses.errors import PlanError, UlyssesError

if TYPE_CHECKING:
    import torch

_EXIT_CODES = "exit codes: 0 done, 2 usage or input error, 3 internal error, 130 interrupted"
_TORCHRUN = "torchrun --nproc_per_node=4 -m dit_ulysses probe"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(prog="dit-ulysses", description=__doc__, epilog=_EXIT_CODES)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    plan = commands.add_parser("plan", help="print what each way to share out the ranks costs, and the cheapest")
    for name, words in _SIZES.items():
        plan.add_argument(f"--{name}", type=int, required=name in _NEEDED, default=argparse.SUPPRESS, help=words)
    plan.add_argument("--guided", action="store_true", help="classifier-free guidance: the model runs twice")
    plan.add_argument("--tensor", action="store_true", help="your model has tensor parallelism: look at it as well")
    plan.add_argument("--memory", type=float, metavar="GB", help="that weights and activations of a rank may take")
    plan.add_argument("--costs", type=Path, metavar="FILE", help="what probe has measured (default: guesses)")
    plan.add_argument("--json", action="store_true", help="print JSON")
    probe = commands.add_parser("probe", help=f"measure the costs of this machine: {_TORCHRUN}")
    probe.add_argument("--output", type=Path, metavar="FILE", help="the costs, a .json")
    probe.add_argument("--overwrite", action="store_true", help="replace what exists")
    probe.add_argument("--seconds", type=float, default=5.0, help="that it may take, roughly (default: 5)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done, 2 bad input, 3 a defect of ours, 130 interrupted."""
    options = build_parser().parse_args(argv)
    try:
        _COMMANDS[options.command](options)
    except KeyboardInterrupt:
        print("dit-ulysses: interrupted", file=sys.stderr)
        return 130
    except PlanError as error:  # all ranks see the same input
        if os.environ.get("RANK", "0") == "0":
            print(f"dit-ulysses: error: {error}", file=sys.stderr)
        return 2
    except (UlyssesError, OSError) as error:
        print(f"dit-ulysses: error: {error}", file=sys.stderr)
        return 2
    except Exception:  # noqa: BLE001  # the edge of the command: a defect, shown whole
        traceback.print_exc()
        return 3
    return 0


def _plan(options: argparse.Namespace) -> None:
    from dit_ulysses.costs import Costs
    from dit_ulysses.estimate import Workload
    from dit_ulysses.plan import ParallelPlan

    sizes = {name: getattr(options, name) for name in _SIZES if name != "world" and hasattr(options, name)}
    comparison = ParallelPlan.explain(
        options.world,
        Workload(**sizes, guided=options.guided),
        tensor=options.tensor,
        memory=None if options.memory is None else int(options.memory * 1e9),
        costs=Costs.load(options.costs) if options.costs else None,
    )
    print(json.dumps(comparison.as_dict(), indent=2) if options.json else comparison)


def _probe(options: argparse.Namespace) -> None:
    if "RANK" not in os.environ:
        raise PlanError(f"probe measures several ranks; start them with {_TORCHRUN}")
    from dit_ulysses.probe import measure

    with _job() as rank:
        _check_output(options)
        shown = rank == 0 and sys.stderr.isatty()
        costs = measure(seconds=options.seconds, device=_device(), watch=_show if shown else None)
        if shown:
            _show("")
        if rank:
            return
        print(costs)
        if "bandwidth_between" not in costs.measured:
            print("There is one node; what sending between nodes costs stays a guess.")
        if options.output:
            costs.save(options.output, overwrite=options.overwrite)
            print(f"written to {options.output}", file=sys.stderr)


@contextmanager
def _job() -> Iterator[int]:
    """The process group of torchrun's job; yields this rank."""
    import torch
    import torch.distributed as dist

    device = _device()
    if device.type != "cpu":
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(dist.get_default_backend_for_device(device))
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def _check_output(options: argparse.Namespace) -> None:
    """Raise PlanError on every rank where rank 0 could not write later."""
    import torch.distributed as dist

    problem: list[str | None] = [None]
    if options.output and options.output.exists() and not options.overwrite:
        problem = [f"{options.output} exists; name another file, or say --overwrite"]
    elif options.output and not options.output.parent.is_dir():
        problem = [f"{options.output.parent} is no folder; make it, or name another file"]
    dist.broadcast_object_list(problem, src=0)
    if problem[0]:
        raise PlanError(problem[0])


def _device() -> torch.device:
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def _show(stage: str) -> None:
    """Replace the line of progress."""
    sys.stderr.write(f"\r{stage:<60}" if stage else f"\r{'':<60}\r")
    sys.stderr.flush()


_COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {"plan": _plan, "probe": _probe}
_NEEDED = ("world", "heads", "tokens")
_SIZES = {
    "world": "number of ranks",
    "heads": "query heads",
    "tokens": "of one sequence",
    "kv_heads": "key and value heads (default: as many as query heads)",
    "head_dim": "channels of a head (default: 128)",
    "layers": "number of layers (default: 1)",
    "batch": "sequences (default: 1)",
    "bytes_per_element": "of activations and weights (default: 2)",
    "text_tokens": "joint tokens that every rank holds (default: 0)",
    "ffn_dim": "width of the feed-forward (default: 4 times that of the model)",
    "prediction_channels": "what is predicted for a token (default: 64, Wan)",
}
