"""Runs a function on several ranks, in processes that a server which has imported everything is split into."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

LIMIT = 60.0  # seconds; a test that hangs ends with this
_CONTEXT = multiprocessing.get_context("forkserver")


def run_ranks(size: int, function: Callable[..., Any], *arguments: Any, limit: float = LIMIT) -> list[Any]:
    """Return what `function(*arguments)` returns on each rank, or the exception that it raises there.

    A rank that leaves without either, or is not ready in time, has None.
    """
    _start_server()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]  # torch forgot to list it
    ends, processes = [], []
    for rank in range(size):
        here, there = _CONTEXT.Pipe(duplex=False)
        process = _CONTEXT.Process(target=_rank, args=(there, rank, size, store.port, limit, function, arguments))
        process.start()
        there.close()
        ends.append(here)
        processes.append(process)
    try:
        return _collected(ends, limit)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _start_server() -> None:
    _CONTEXT.set_forkserver_preload(["parallel_cases"])
    with pytest.MonkeyPatch.context() as patch:  # the server knows the folder of the tests by nothing else
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
        forkserver.ensure_running()


def run_all(size: int, function: Callable[..., Any], *arguments: Any, limit: float = LIMIT) -> list[Any]:
    """As `run_ranks`, where nothing may go wrong."""
    results = run_ranks(size, function, *arguments, limit=limit)
    for rank, result in enumerate(results):
        if isinstance(result, BaseException):
            raise AssertionError(f"rank {rank}: {result}") from result
    return results


def _collected(ends: list[Connection], limit: float) -> list[Any]:
    results: dict[Connection, Any] = dict.fromkeys(ends)
    open_ends = set(ends)
    while open_ends and (ready := wait(list(open_ends), timeout=limit)):
        for end in ready:
            assert isinstance(end, Connection), "pipes were waited for"
            open_ends.discard(end)
            try:
                results[end] = end.recv()
            except EOFError:
                results[end] = None
    return [results[end] for end in ends]


def _rank(
    end: Connection,
    rank: int,
    size: int,
    port: int,
    limit: float,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)})
    torch.set_num_threads(1)
    # More ranks than cores: who gets a message waits for its turn instead of taking it from the one who sends others.
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)  # type: ignore[attr-defined]  # torch forgot to list it
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=limit))
    dist.barrier()  # nobody leaves while others are still connecting
    try:
        end.send(function(*arguments))
    except Exception as error:  # noqa: BLE001  # handed to the test
        setattr(error, "__notes__", [traceback.format_exc()])  # noqa: B010  # a traceback itself does not travel
        end.send(error)
    finally:
        end.close()
        dist.destroy_process_group()
