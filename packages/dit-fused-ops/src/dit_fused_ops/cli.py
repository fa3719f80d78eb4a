"""``dit-fused-ops``: what can be used here, and measuring it beforehand."""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from dit_fused_ops.errors import FusedOpsError, TuningFileError

_EXIT_CODES = "exit codes: 0 done, 2 usage or input error, 3 internal error, 130 interrupted"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(prog="dit-fused-ops", description=__doc__, epilog=_EXIT_CODES)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    shown = commands.add_parser("capabilities", help="per op, which backends can be used here, and why not the others")
    shown.add_argument("--json", action="store_true", help="print JSON")
    tune = commands.add_parser("tune", help="measure the backends of every op at given shapes, and keep the decisions")
    tune.add_argument(
        "--shapes",
        nargs="+",
        required=True,
        metavar="SHAPE",
        help="wan-1.3b-480p, wan-14b-480p, wan-14b-720p, or BATCHxTOKENSxHEADSxHEAD_DIM such as 1x32760x12x128",
    )
    tune.add_argument("--ops", nargs="+", default=(), metavar="OP", help="such as attention_forward; all without it")
    tune.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"), help="of the tensors")
    tune.add_argument("--device", help="cpu, cuda, npu …; this machine's accelerator, if any, without it")
    tune.add_argument("--quick", action="store_true", help="leave out backends whose first call takes seconds")
    tune.add_argument("--file", type=Path, help="where decisions are kept, and added to what is there")
    tune.add_argument("--json", action="store_true", help="print JSON")
    kept = commands.add_parser("show", help="print what a tuning file holds")
    kept.add_argument("file", nargs="?", type=Path, help="the user's own without it")
    kept.add_argument("--json", action="store_true", help="print JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done, 2 bad input, 3 a defect of ours, 130 interrupted."""
    options = build_parser().parse_args(argv)
    try:
        _COMMANDS[options.command](options)
    except KeyboardInterrupt:
        print("dit-fused-ops: interrupted; what was measured until now is kept", file=sys.stderr)
        return 130
    except (FusedOpsError, OSError) as error:
        print(f"dit-fused-ops: error: {error}", file=sys.stderr)
        return 2
    except Exception:  # noqa: BLE001  # the edge of the command: a defect of ours, shown whole
        traceback.print_exc()
        return 3
    return 0


def _capabilities(options: argparse.Namespace) -> None:
    from dit_fused_ops.inventory import capabilities

    found = capabilities()
    print(json.dumps(found.as_dicts(), indent=2) if options.json else found)


def _tune(options: argparse.Namespace) -> None:
    from dit_fused_ops.cases import parse_shape
    from dit_fused_ops.tuning import Tuning

    tuning = Tuning.of(
        device=options.device,
        dtype=options.dtype,
        thorough=not options.quick,
        file=options.file,
        ops=options.ops,
    )
    shapes = [parse_shape(text) for text in options.shapes]
    results = []
    for measured in tuning.measure(shapes):
        print(measured, file=sys.stderr)
        results.append(measured.as_dict())
    if options.json:
        print(json.dumps(results, indent=2))
    print(f"kept in {tuning.file}", file=sys.stderr)


def _show(options: argparse.Namespace) -> None:
    from dit_fused_ops.dispatch.store import default_path, read_decisions

    path: Path | None = options.file or default_path()
    if options.file is not None and not options.file.exists():
        raise TuningFileError(f"{path} does not exist; `dit-fused-ops tune --file {path}` makes it")
    decisions = {} if path is None else read_decisions(path.expanduser())
    if options.json:
        print(json.dumps({key: {"ranking": d.ranking, "rejected": dict(d.rejected)} for key, d in decisions.items()}))
        return
    for key, decision in decisions.items():
        print(key)
        for name, microseconds in decision.ranking:
            print(f"  {name}: {microseconds / 1000:.3f} ms")
        for name, reason in decision.rejected.items():
            print(f"  {name}: {reason}")
    if not decisions:
        print("this user has no home folder, and so no file" if path is None else f"{path} holds nothing yet")


_COMMANDS = {"capabilities": _capabilities, "tune": _tune, "show": _show}
