"""The command line: a table of subcommands, one file each."""

from __future__ import annotations

import argparse
import difflib
import signal
import sys
import traceback
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

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
    return _parsers()[0]


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The whole command line, and that of each command."""
    parser = argparse.ArgumentParser(prog="mm-finetune", description="Fine-tune Qwen2.5-VL on megatron-core.")
    parser.add_argument("--version", action=_Version, help="say the version")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    found: dict[str, argparse.ArgumentParser] = {}
    for name, (module, text) in COMMANDS.items():
        found[name] = commands.add_parser(name, help=text, description=text)
        module.add_arguments(found[name])
    return parser, found


class _Version(argparse.Action):
    """The installed version, looked up when it is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *rest: object) -> None:
        from importlib.metadata import version

        sys.stdout.write(f"mm-finetune {version('mm-finetune')}\n")
        parser.exit()


class _Parser(argparse.ArgumentParser):
    """Of a command. A flag is written out: a beginning of it may be another one's tomorrow."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Like ``parse_args``, but overrides may also stand after options, where argparse gives up on them."""
    parser, commands = _parsers()
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-") and words[0] not in commands:
        parser.error(f"there is no command {words[0]!r}; {_near(words[0], commands)}")
    args, rest = parser.parse_known_args(words)
    own = commands[args.command]
    strange = [word for word in rest if word.startswith("-") or not hasattr(args, "overrides")]
    if strange:
        flag, known = strange[0].partition("=")[0], own._option_string_actions
        hint = f"; {_near(flag, known)}" if flag.startswith("-") else ""
        own.error(f"unrecognized arguments: {' '.join(strange)}{hint}")
    if rest:
        args.overrides += rest
    return args


def _in_words(error: Exception) -> str:
    """What the system says of a file, without its numbers; our own words as they are."""
    if isinstance(error, OSError) and not isinstance(error, FinetuneError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _near(word: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {found[0]}?" if found else f"known: {', '.join(sorted(known))}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 0 when done, 2 for bad input, 130 when interrupted, 3 for a defect of ours."""
    args = _parse(argv)
    module, _ = COMMANDS[args.command]
    try:
        return int(module.run(args))
    except (FinetuneError, OSError) as error:
        print(f"mm-finetune: error: {_in_words(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        # Under torchrun the signal comes twice: from the terminal and from the launcher.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if process_rank()[0] == 0:
            left = getattr(module, "interrupted", lambda args: "nothing that looks finished was left")(args)
            print(f"mm-finetune: interrupted; {left}", file=sys.stderr)
        return 130
    except Exception:  # noqa: BLE001  # the edge of the command: a defect of ours, shown whole
        traceback.print_exc()
        return 3
