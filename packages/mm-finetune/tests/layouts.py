"""Many layouts in one set of processes: how a test asks a worker's processes, and how they answer.

Of long lists the first layouts are compared in every run of the tests, all of them with ``FINETUNE_LAYOUTS=all``.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mm_finetune.engine.device import mcore_on
from mm_finetune.engine.parallel import processes

Cases = TypeVar("Cases", list[dict[str, Any]], dict[str, Any])
MARK = "RESULT "


def first(cases: Cases, count: int) -> Cases:
    """The first `count` cases, or all: ``nox -s finetune-layouts`` compares them."""
    if os.environ.get("FINETUNE_LAYOUTS") == "all":
        return cases
    return dict(islice(cases.items(), count)) if isinstance(cases, dict) else cases[:count]


def ask(worker: str, world_size: int, folder: Path, cases: list[dict[str, Any]]) -> list[Any]:
    """What rank 0 of `worker` says of each case, all in one set of processes."""
    file = Path(__file__).with_name(worker)
    command = [sys.executable, str(file), str(world_size), str(folder), json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    results = [json.loads(line.split(MARK, 1)[1]) for line in done.stdout.splitlines() if MARK in line]
    assert len(results) == len(cases)
    return results


def answer(compare: Callable[[dict[str, Any], Path, torch.device], Any]) -> None:
    """In the worker: do what :func:`ask` asks. `compare` gets a case with its ``number``, the folder and the device.

    The processes are forked, as torchrun would start them: what all of them import is imported once.
    """
    torch.set_num_threads(1)
    world_size = int(sys.argv[1])
    port, told = os.pipe()
    children = [_forked(rank, world_size, port, compare) for rank in range(world_size)]
    # After the forks: it has a thread.
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    os.write(told, f"{store.port:5}".encode() * world_size)
    while children:
        child, status = os.wait()
        children.remove(child)
        if status:
            for other in children:
                os.kill(other, signal.SIGKILL)
            os._exit(1)
    os._exit(0)


def _forked(rank: int, world_size: int, port: int, compare: Callable[[dict[str, Any], Path, torch.device], Any]) -> int:
    child = os.fork()
    if child:
        return child
    try:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": int(os.read(port, 5))}
        os.environ |= {name: str(value) for name, value in names.items()}
        os.environ |= {"MASTER_ADDR": "localhost", "TORCHELASTIC_USE_AGENT_STORE": "True"}
        _work(compare)
    except BaseException:  # noqa: BLE001 - the parent sees the code, a person the words
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _work(compare: Callable[[dict[str, Any], Path, torch.device], Any]) -> None:
    warnings.simplefilter("ignore")
    folder, cases = Path(sys.argv[2]), json.loads(sys.argv[3])
    with processes() as device, mcore_on(device):
        for number, case in enumerate(cases):
            result = compare(case | {"number": number}, folder, device)
            if dist.get_rank() == 0:
                sys.stdout.write(MARK + json.dumps(result) + "\n")
                sys.stdout.flush()
