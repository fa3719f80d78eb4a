"""``mm-finetune train``: train on one process, or on many under torchrun."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mm_finetune.training import PreparedRun

# The first process that fails makes torchrun end the others: rank 0 must be it, or its words are never said.
WAITS_SECONDS = 15

# What a shell says of a process that SIGTERM ended.
STOPPED = 128 + 15
LOST = 3

# Megatron's names of what the configuration has too; `--flag [value]` is `key=value`.
SWITCHES = {
    "--no-load-optim": "output.no_load_optim",
    "--no-load-rng": "output.no_load_rng",
    "--no-save-optim": "output.no_save_optim",
    "--no-save-rng": "output.no_save_rng",
    "--log-tps": "output.log_tps",
}
VALUES = {
    "--save-interval": "output.save_every",
    "--log-interval": "output.log_every",
    "--max-samples": "data.max_samples",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("config", type=Path, help="YAML file; see mm_finetune.config")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for example train.lr=1e-4")
    parser.add_argument("--print_config", action="store_true", help="print the whole configuration, and do nothing")
    same = parser.add_argument_group("Megatron's names", "for scripts that have them; each is also a key")
    for flag, key in SWITCHES.items():
        same.add_argument(
            flag, action="append_const", const=f"{key}=true", dest="flags", default=[], help=f"{key}=true"
        )
    for flag, key in VALUES.items():
        same.add_argument(
            flag, action="append", type=f"{key}={{}}".format, dest="flags", metavar="N", help=f"{key}=N"
        )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Check everything, then train.

    All checks give the same result on every process; rank 0 alone reports them.
    """
    from mm_finetune.config import load_config
    from mm_finetune.errors import FinetuneError, LostProcessError, StoppedError
    from mm_finetune.launch import process_rank

    rank, world_size = process_rank()
    try:
        config = load_config(args.config, [*args.overrides, *args.flags])
        if args.print_config:
            sys.stdout.write(config.as_yaml() if rank == 0 else "")
            return 0
        from mm_finetune.output import require_room
        from mm_finetune.training import prepare

        require_room(config.output.dir)
        prepared = prepare(config, world_size=world_size)
    except (FinetuneError, OSError) as error:
        return leave_it_to_the_first(rank, error)
    if rank == 0:
        sys.stdout.writelines(f"{note}\n" for note in notes(prepared))
        sys.stdout.flush()
    from mm_finetune.training import train

    try:
        folder = train(prepared)
    except StoppedError:
        return STOPPED
    except LostProcessError as error:
        # Each tells it: the one that is lost may be the first.
        sys.stderr.write(f"mm-finetune: error: process {rank}: {error}\n")
        return LOST
    except FinetuneError as error:
        return leave_it_to_the_first(rank, error)
    if rank == 0:
        sys.stdout.write(f"checkpoint: {folder}\n")
    return 0


def notes(run: PreparedRun) -> list[str]:
    """What is no fault, and may not be what was meant."""
    config, records = run.config, len(run.dataset.index.usable)
    said = []
    if run.first_step > config.train.steps:
        said.append(f"all {config.train.steps} steps are done; for more of them raise train.steps")
    if config.train.global_batch_size > records:
        said.append(
            f"train.global_batch_size {config.train.global_batch_size} is above the {records} record(s) there are: a"
            " step sees some of them several times"
        )
    return said


def interrupted(args: argparse.Namespace) -> str:
    """What is told after Ctrl-C."""
    from mm_finetune.config import load_config
    from mm_finetune.errors import FinetuneError
    from mm_finetune.run_folder import left_by

    try:
        return left_by(load_config(args.config, [*args.overrides, *args.flags]))
    except (FinetuneError, OSError):
        return "nothing has begun"


def leave_it_to_the_first(rank: int, error: Exception) -> int:
    """Of an error that every rank has: the first one tells it, the others wait until it has."""
    if rank == 0:
        raise error
    time.sleep(WAITS_SECONDS)
    return 2
