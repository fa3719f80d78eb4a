"""What does the exchange around attention cost, beside diffusers' context parallel and yunchang's all-to-all?

    python benchmarks/ulysses.py --ranks 2 4 --output ulysses.json

Every method gets the same queries, keys and values, spread over the same gloo ranks of one machine, and takes turns,
another first in each round.
The "exchange" is what stands around attention: from the tokens of a rank to its heads, and back; the attention is a
tensor that lies ready. "whole" has torch's attention in it: what is looked at in place, and not copied, may cost the
kernel something. Times are those of the slowest rank, medians over rounds. Then the cases that need care: every method
that does not refuse is compared with one process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dit_ulysses import sequence_lengths, ulysses_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Method = Callable[[Tensor, Tensor, Tensor, Attention, tuple[int, ...]], Tensor]

OURS = "ours"
LIMIT = 60.0  # seconds
EXACT = 1e-5  # float32: the same kernel on the same heads, in another order of them at most


@dataclass(frozen=True, kw_only=True)
class Case:
    """Tensors [batch, tokens, heads, width] on some ranks."""

    tokens: int
    heads: int
    width: int = 128
    batch: int = 1
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        return f"{self.batch} × {self.tokens} tokens × {self.heads} heads × {self.width}, {self.dtype}"


# A short sequence, 480 × 832 of 17 frames and of 81 frames of Wan2.1 1.3B, a batch of two sides.
TIMED = (
    Case(tokens=1024, heads=12),
    Case(tokens=7800, heads=12),
    Case(tokens=7800, heads=12, dtype="float32"),
    Case(tokens=3900, heads=12, batch=2),
    Case(tokens=32760, heads=12),
)
CAREFUL = (
    (2, Case(tokens=64, heads=12, dtype="float32")),
    (4, Case(tokens=63, heads=12, dtype="float32")),
    (4, Case(tokens=64, heads=10, dtype="float32")),
    (8, Case(tokens=64, heads=12, dtype="float32")),
    (8, Case(tokens=61, heads=5, dtype="float32")),
)


def methods(mesh: DeviceMesh) -> dict[str, Method]:
    """All that is measured, by name; those that are not installed are left out."""
    found: dict[str, Method] = {OURS: _ours}
    with suppress(ImportError):
        found |= _diffusers(mesh)
    with suppress(ImportError):
        found |= _yunchang(mesh)
    return found


def _ours(q: Tensor, k: Tensor, v: Tensor, attention: Attention, lengths: tuple[int, ...]) -> Tensor:
    out: Tensor = ulysses_attention(q, k, v, group=None, attention=attention, lengths=lengths)
    return out


def _diffusers(mesh: DeviceMesh) -> dict[str, Method]:
    import diffusers.models.attention_dispatch as dispatch

    parallel = SimpleNamespace(_ulysses_mesh=mesh, ulysses_degree=mesh.size())
    config = SimpleNamespace(context_parallel_config=parallel)

    def through(function: Any) -> Method:
        def run(q: Tensor, k: Tensor, v: Tensor, attention: Attention, lengths: tuple[int, ...]) -> Tensor:
            def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
                return attention(q, k, v)

            out: Tensor = function.apply(q, k, v, None, 0.0, False, None, False, False, forward, None, config)
            return out

        return run

    return {
        "diffusers Ulysses": through(dispatch.TemplatedUlyssesAttention),
        "diffusers UAA": through(dispatch.TemplatedUlyssesAnythingAttention),
    }


def _yunchang(mesh: DeviceMesh) -> dict[str, Method]:
    from yunchang.comm.all_to_all import SeqAllToAll4D, SeqAllToAll5D

    group = mesh.get_group()

    def back(out: Tensor) -> Tensor:
        returned: Tensor = SeqAllToAll4D.apply(group, out.contiguous(), 1, 2)
        return returned

    def each(q: Tensor, k: Tensor, v: Tensor, attention: Attention, lengths: tuple[int, ...]) -> Tensor:
        return back(attention(*(SeqAllToAll4D.apply(group, tensor, 2, 1) for tensor in (q, k, v))))

    def packed(q: Tensor, k: Tensor, v: Tensor, attention: Attention, lengths: tuple[int, ...]) -> Tensor:
        qkv = SeqAllToAll5D.apply(group, torch.stack((q, k, v), dim=2), 3, 1)
        return back(attention(*qkv.unbind(2)))

    return {"yunchang": each, "yunchang, packed": packed}


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Torch's attention, [B, S, N, D]."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


# ---- on the ranks ---------------------------------------------------------------------------------------------------


def timed(case: Case, rounds: int, *, whole: bool) -> dict[str, Any]:
    """Return for each method the seconds of each round, or why it refuses."""
    size = dist.get_world_size()
    q, k, v, lengths = spread(case)
    ready = torch.zeros(case.batch, case.tokens, case.heads // size, case.width, dtype=q.dtype)
    attention: Attention = attend if whole else lambda q, k, v: ready
    chosen = methods(init_device_mesh("cpu", (size,)))
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    for turn in range(rounds + 1):
        names = list(chosen)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            method = chosen[name]
            dist.barrier()
            started = time.perf_counter()
            with torch.no_grad():
                method(q, k, v, attention, lengths)
            taken = torch.tensor(time.perf_counter() - started, dtype=torch.float64)
            dist.all_reduce(taken, dist.ReduceOp.MAX)
            if turn:
                seconds[name].append(taken.item())
    return dict(seconds)


def careful(case: Case, name: str) -> str:
    """Return how far a method is from one process, or why it refuses. That breaks the ranks: one method a start."""
    q, k, v, lengths = spread(case)
    expected = attend(*_whole(case))
    start = sum(lengths[: dist.get_rank()])
    method = methods(init_device_mesh("cpu", (dist.get_world_size(),)))[name]
    try:
        with torch.no_grad():
            out = method(q, k, v, attend, lengths)
        off = (out - expected[:, start : start + q.shape[1]]).abs().max() if q.shape[1] else torch.zeros(())
        return f"{off.item():.1e}" if out.shape == q.shape else f"wrong: {list(out.shape)} for {list(q.shape)}"
    except (AssertionError, RuntimeError, ValueError, TypeError, IndexError) as error:
        return f"refused: {type(error).__name__}: {str(error).partition(chr(10))[0][:90]}"


def _whole(case: Case) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch, case.tokens, case.heads, case.width)
    return [torch.randn(shape, generator=generator).to(getattr(torch, case.dtype)) for _ in range(3)]


def spread(case: Case) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """Return queries, keys and values of this rank, and the tokens of each rank."""
    lengths = sequence_lengths(case.tokens, dist.get_world_size())
    q, k, v = (tensor.split_with_sizes(lengths, 1)[dist.get_rank()].contiguous() for tensor in _whole(case))
    return q, k, v, lengths


# ---- starting the ranks ---------------------------------------------------------------------------------------------


def on_ranks(size: int, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Return what the function returns on the first rank of so many; an exception there is one here."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    context = torch.multiprocessing.get_context("spawn")
    ends, workers = [], []
    for rank in range(size):
        here, there = context.Pipe(duplex=False)
        worker = context.Process(target=_rank, args=(there, store.port, rank, size, function, arguments, named))
        worker.start()
        there.close()
        ends.append(here)
        workers.append(worker)
    try:
        found = [_received(end) for end in ends]
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
    refused = [result for result in found if isinstance(result, str) and result.startswith("refused")]
    return refused[0] if refused else found[0]


def _received(end: Connection) -> Any:
    try:
        return end.recv() if end.poll(LIMIT) else "refused: no answer within the time limit"
    except EOFError:
        return "refused: the process was ended"


def _rank(
    end: Connection,
    port: int,
    rank: int,
    size: int,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    named: Mapping[str, Any],
) -> None:
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)})
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)  # type: ignore[attr-defined]
    limit = timedelta(seconds=LIMIT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
    end.send(function(*arguments, **named))


def main() -> int:
    """Measure, print tables, write JSON."""
    arguments = _parse()
    record: dict[str, Any] = {
        "machine": {"python": platform.python_version(), "torch": torch.__version__, "cpus": os.cpu_count()},
        "timed": [],
        "careful": [],
    }
    for size in arguments.ranks:
        for case in TIMED:
            for whole in (False, True) if case.tokens <= arguments.whole_up_to else (False,):
                seconds = on_ranks(size, timed, case, arguments.rounds, whole=whole)
                record["timed"].append({"ranks": size, "case": asdict(case), "whole": whole, "seconds": seconds})
                _print_times(size, case, seconds, whole=whole)
    names = list(seconds)
    for size, case in CAREFUL:
        found = {name: on_ranks(size, careful, case, name) for name in names}
        record["careful"].append({"ranks": size, "case": asdict(case), "off": found})
        print(f"\n{size} ranks, {case}")
        for name, result in found.items():
            print(f"  {name:<20} {result}")
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(record) + "\n", encoding="utf-8")
    return 0


def _print_times(size: int, case: Case, seconds: Mapping[str, list[float]], *, whole: bool) -> None:
    print(f"\n{size} ranks, {case}: {'whole, with attention' if whole else 'exchange'}")
    ours = statistics.median(seconds[OURS])
    for name, taken in seconds.items():
        print(f"  {name:<20} {1e3 * statistics.median(taken):8.2f} ms  {statistics.median(taken) / ours:5.2f} × ours")
    sys.stdout.flush()


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4], help="(default: 2 4)")
    parser.add_argument("--rounds", type=int, default=15, help="of which the median is taken (default: %(default)s)")
    parser.add_argument("--whole_up_to", type=int, default=1024, help="tokens, with attention (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="where the single numbers go, as JSON (default: nowhere)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
