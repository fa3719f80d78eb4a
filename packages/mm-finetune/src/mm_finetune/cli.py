"""The command line: a table of subcommands, one file each."""

from __future__ import annotations

import argparse
import signal
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType

from mm_finetune.commands import check, export, import_mindspeed, infer, mini, plan, report, train
from mm_finetune.commands import eval as eval_command
from mm_finetune.errors import FinetuneError
from mm_finetune.launch import process_rank

COMMANDS: dict[str, tuple[ModuleType, str]] = {
    "train": (train, "fine-tune a converted model; under torchrun for several processes"),
    "check": (check, "one batch through everything without training: data, layout, memory, loss"),
    "plan": (plan, "memory for each device of a layout, and the layout to choose"),
    "eval": (eval_command, "let a Hugging Face model answer a data set and count what is right"),
    "infer": (infer, "answer one question about pictures and videos"),
    "export": (export, "a checkpoint as a Hugging Face folder, or its adapter as PEFT's"),
    "report": (report, "a run and its evaluations as one HTML file"),
    "import-mindspeed": (import_mindspeed, "write the configuration of a published MindSpeed MM example"),
    "mini": (mini, "make a tiny Qwen2.5-VL and a data set of real pictures, to try everything on a laptop"),
}


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(prog="mm-finetune", description="Fine-tune Qwen2.5-VL on megatron-core.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, text) in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=text, description=text))
    return parser


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Like ``parse_args``, but overrides may also stand after options, where argparse gives up on them."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    strange = [word for word in rest if word.startswith("-") or not hasattr(args, "overrides")]
    if strange:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    if rest:
        args.overrides += rest
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 0 when done, 2 for bad input, 130 when interrupted, 3 for a defect of ours."""
    args = _parse(argv)
    module, _ = COMMANDS[args.command]
    try:
        return int(module.run(args))
    except (FinetuneError, OSError) as error:
        print(f"mm-finetune: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        # Under torchrun the signal comes twice: from the terminal and from the launcher.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if process_rank()[0] == 0:
            print("mm-finetune: interrupted; nothing that looks finished was left", file=sys.stderr)
        return 130
    except Exception:  # noqa: BLE001  # the edge of the command: a defect of ours, shown whole
        traceback.print_exc()
        return 3
