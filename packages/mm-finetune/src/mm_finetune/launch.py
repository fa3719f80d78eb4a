"""What torchrun says to a process that it started."""

from __future__ import annotations

import os

from mm_finetune.errors import ConfigError


def process_rank() -> tuple[int, int]:
    """Rank and number of processes: 0 and 1 for a process that nobody started with others.

    Raises:
        ConfigError: the variables that a launcher sets do not fit together.
    """
    values = [os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")]
    rank, size = (int(value) if value.isdecimal() else -1 for value in values)
    if not 0 <= rank < size:
        raise ConfigError(
            f"RANK is {values[0]} and WORLD_SIZE is {values[1]}; a launcher sets both, RANK from 0 to WORLD_SIZE - 1:"
            " start with torchrun or Slurm, or unset them for a single process"
        )
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if "RANK" in os.environ and missing:
        raise ConfigError(
            f"RANK is set, {' and '.join(missing)} not; a launcher sets all of them: start with torchrun or Slurm, or"
            " unset RANK for a single process"
        )
    return rank, size
