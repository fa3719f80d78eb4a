"""Many layouts in one torchrun: how a test asks a worker's processes, and how they answer.

Of each list the first layouts are compared in every run of the tests, all of them with ``FINETUNE_LAYOUTS=all``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch

Cases = TypeVar("Cases", list[dict[str, Any]], dict[str, Any])
MARK = "RESULT "


def first(cases: Cases, count: int) -> Cases:
    """The first `count` cases, or all: ``nox -s finetune-layouts`` compares them."""
    if os.environ.get("FINETUNE_LAYOUTS") == "all":
        return cases
    return dict(islice(cases.items(), count)) if isinstance(cases, dict) else cases[:count]


def ask(worker: str, processes: int, folder: Path, cases: list[dict[str, Any]]) -> list[Any]:
    """What rank 0 of `worker` says of each case, all in one set of processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    file = Path(__file__).with_name(worker)
    done = subprocess.run(
        [*launch, file, folder, json.dumps(cases)], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    results = [json.loads(line.split(MARK, 1)[1]) for line in done.stdout.splitlines() if MARK in line]
    assert len(results) == len(cases)
    return results


def answer(compare: Callable[[dict[str, Any], Path, torch.device], Any]) -> None:
    """In the worker: do what :func:`ask` asks. `compare` gets a case with its ``number``, the folder and the device."""
    import torch.distributed as dist

    from mm_finetune.engine.device import mcore_on
    from mm_finetune.engine.parallel import processes

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    with processes() as device, mcore_on(device):
        for number, case in enumerate(cases):
            result = compare(case | {"number": number}, folder, device)
            if dist.get_rank() == 0:
                sys.stdout.write(MARK + json.dumps(result) + "\n")
                sys.stdout.flush()
