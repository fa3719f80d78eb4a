"""``ascend-envcheck``: what all its commands have in common; each command is a module of `ascend_envcheck.commands`."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Sequence

from ascend_envcheck import __version__
from ascend_envcheck.commands import COMMANDS
from ascend_envcheck.errors import EnvcheckError

FIT, UNFIT, USAGE, INTERNAL, INTERRUPTED = 0, 1, 2, 3, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
        0 fit, 1 a FAIL was found (or with --strict a WARN), 2 a wrong call or input, 3 a fault of this tool,
        130 interrupted.
    """
    options = _parser().parse_args(arguments)
    try:
        code = int(options.run(options))
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader has seen enough; without this, Python would complain once more while it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return USAGE
    except (EnvcheckError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("interrupted, nothing was written", file=sys.stderr)
        return INTERRUPTED
    except Exception:  # noqa: BLE001 - the edge of the command: a fault of ours has its own exit code
        import traceback

        traceback.print_exc()
        return INTERNAL


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ascend-envcheck",
        description="Is this machine fit to fine-tune Qwen2.5-VL and to run Wan2.1, on an Ascend NPU or without one?",
        epilog="exit status: 0 fit, 1 a FAIL was found (with --strict: or a WARN), 2 wrong call, 3 internal error",
    )
    parser.add_argument("--version", action="version", version=f"ascend-envcheck {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    return parser
