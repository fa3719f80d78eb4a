"""How fast is each backend of dit-fused-ops, and how near to what the device can do?

    python benchmarks/fused_ops.py --shapes 1x3120x12x128 --dtypes float32 bfloat16 --output fused.json
    python benchmarks/fused_ops.py --shapes wan-1.3b-480p wan-14b-720p --device cuda --dtypes bfloat16

For every call of a Wan block and every shape, all backends that may run are compared with the reference and timed in
turns in one process; so are code that people use today (the two lines of `apply_rotary_emb`, diffusers' Wan rope,
diffusers' modulation). Medians, and beside each: the bytes that must be moved at least as a share of this device's own
copy bandwidth, or for attention the products as a share of its own matrix product; the chosen backend has a star.
Then: what a call costs until the winner is called, once its kind was seen.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import timeit
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_fused_ops import dispatcher
from dit_fused_ops.cases import TUNED, Case, Shape, cases, parse_shape
from dit_fused_ops.dispatch.search import time_in_turns
from dit_fused_ops.errors import FusedOpsError

OVERHEAD_CALLS, OVERHEAD_ROUNDS = 2000, 21


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table; `share` is of the copy bandwidth, for attention of the matrix product's rate."""

    shape: str
    dtype: str
    op: str
    what: str
    backend: str
    chosen: bool
    milliseconds: float
    times_eager: float | None
    moved_gigabytes: float
    share: float


def main() -> int:
    """Measure, print the table, write JSON; the exit code is 2 when something is missing or fails."""
    arguments = _parse()
    try:
        device = torch.device(arguments.device)
        rows: list[Row] = []
        for shape in map(parse_shape, arguments.shapes):
            for dtype in (getattr(torch, name) for name in arguments.dtypes):
                for row in measure(shape, dtype, device, frozenset(arguments.ops), thorough=not arguments.quick):
                    rows.append(row)
                    print(_line(row), flush=True)
        overhead = measure_overhead(device)
        for op, microseconds in overhead.items():
            print(f"{op}: {microseconds:.2f} us from the call to the winner")
        if arguments.output is not None:
            document = {"device": str(device), "torch": torch.__version__, "overhead_us": overhead}
            rows_as_dicts = [asdict(row) for row in rows]
            arguments.output.write_text(json.dumps({**document, "rows": rows_as_dicts}, indent=2), encoding="utf-8")
    except (FusedOpsError, OSError, torch.OutOfMemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted, nothing was written", file=sys.stderr)
        return 130
    return 0


def measure(
    shape: Shape, dtype: torch.dtype, device: torch.device, ops: frozenset[str], *, thorough: bool
) -> Iterator[Row]:
    """Yield a row for each backend and each piece of today's code, per call of a block."""
    copied, multiplied = copy_rate(shape, dtype, device), matmul_rate(dtype, device)
    with torch.no_grad(), dispatcher.configured(mode="runtime", deterministic=False, thorough=thorough, file=None):
        for case in cases(shape, dtype, device, ops):
            with dispatcher.measuring_anew() as decisions:
                case.run()
            decision = decisions[-1]
            chosen = decision.ranking[0][0]
            seconds = {name: microseconds / 1e6 for name, microseconds in decision.ranking}
            seconds |= _todays(case, shape, dtype, device, winner=case.run)
            for name, taken in seconds.items():
                work = case.computed / multiplied if case.computed else case.moved / copied
                yield Row(
                    shape=str(shape),
                    dtype=str(dtype).removeprefix("torch."),
                    op=case.op,
                    what=case.what,
                    backend=name,
                    chosen=name == chosen,
                    milliseconds=taken * 1e3,
                    times_eager=seconds["eager"] / taken if "eager" in seconds else None,
                    moved_gigabytes=case.moved / 1e9,
                    share=work / taken,
                )
            for name, reason in decision.rejected.items():
                print(f"    {case.op} {case.what}: {name} was kept out: {reason}")


def _todays(
    case: Case, shape: Shape, dtype: torch.dtype, device: torch.device, *, winner: Callable[[], Any]
) -> dict[str, float]:
    """Code that people use today for the same call, in seconds; each is timed in turns with the winner."""
    peers = TODAYS.get((case.op, case.what), {})
    runs = [functools.partial(peer, *_peer_tensors(case, shape, dtype, device)) for peer in peers.values()]
    taken = time_in_turns([*runs, winner], device)
    return {f"today: {name}": seconds for name, seconds in zip(peers, taken, strict=False)}


def _peer_tensors(case: Case, shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    if case.op == "rotary_position_embedding":
        x = torch.randn(shape.batch, shape.tokens, shape.heads, shape.head_dim, dtype=dtype, device=device)
        angles = torch.randn(1, shape.tokens, 1, shape.head_dim // 2, device=device).repeat_interleave(2, dim=-1)
        return x, angles.cos(), angles.sin()
    width = shape.heads * shape.head_dim
    x, y = (torch.randn(shape.batch, shape.tokens, width, dtype=dtype, device=device) for _ in range(2))
    return x, y, *(torch.randn(shape.batch, 1, width, dtype=dtype, device=device) for _ in range(3))


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The two lines that stand in many repositories: pairs of neighbours, tables of full width."""
    rotated = torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
    return (x.float() * cos + rotated.float() * sin).to(x.dtype)


def split_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs taken apart and written into a new tensor, as diffusers' Wan transformer does."""
    a, b = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = a * cos - b * sin
    out[..., 1::2] = a * sin + b * cos
    return out.type_as(x)


def modulate(x: Tensor, _y: Tensor, _gate: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """A norm in float32, then the modulation, as diffusers' Wan transformer does."""
    return (F.layer_norm(x.float(), x.shape[-1:]) * (1 + scale) + shift).type_as(x)


def gate_and_modulate(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """The residual in float32, then the same."""
    x = (x.float() + y * gate).type_as(x)
    return x, modulate(x, y, gate, scale, shift)


def add_gated(x: Tensor, y: Tensor, gate: Tensor, _scale: Tensor, _shift: Tensor) -> Tensor:
    """The residual in float32."""
    return (x.float() + y * gate).type_as(x)


def norm(x: Tensor, *_: Tensor) -> Tensor:
    """The root mean square norm of torch."""
    return F.rms_norm(x, x.shape[-1:], torch.ones(x.shape[-1], dtype=x.dtype, device=x.device), 1e-6)


TODAYS: dict[tuple[str, str], dict[str, Callable[..., Any]]] = {
    ("rotary_position_embedding", "interleaved"): {"apply_rotary_emb": apply_rotary_emb, "diffusers": split_rope},
    ("layernorm_scale_shift", "modulated"): {"diffusers": modulate},
    ("residual_gate_norm_scale_shift", "modulated"): {"diffusers": gate_and_modulate},
    ("residual_gate_add", "gated"): {"diffusers": add_gated},
    ("rms_norm", "queries"): {"torch": norm},
}


def copy_rate(shape: Shape, dtype: torch.dtype, device: torch.device) -> float:
    """Bytes per second, read and written, of copying a tensor of the size of the residual stream."""
    x = torch.randn(shape.batch, shape.tokens, shape.heads * shape.head_dim, device=device).to(dtype)
    target = torch.empty_like(x)
    (taken,) = time_in_turns([lambda: target.copy_(x)], device)
    return 2 * x.numel() * x.itemsize / taken


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Floating point operations per second of a square matrix product: 1024 rows on a CPU, 8192 elsewhere."""
    size = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    (taken,) = time_in_turns([lambda: a @ b], device)
    return 2 * size**3 / taken


def measure_overhead(device: torch.device) -> dict[str, float]:
    """Microseconds from a public function to the winner, for a call that was seen before: the winner does nothing."""
    shape = Shape(batch=1, tokens=1, heads=1, head_dim=16)
    overhead = {}
    with torch.no_grad():
        for case in cases(shape, torch.float32, device):
            dispatcher.clear()
            case.run(opt_mode="static")
            (signature,) = dispatcher._prepared
            dispatcher._prepared[signature] = _nothing
            overhead[case.op] = (_per_call(lambda: case.run(opt_mode="static")) - _per_call(_nothing)) * 1e6  # noqa: B023
    dispatcher.clear()
    return overhead


def _nothing(*_: Any) -> None:
    return None


def _per_call(run: Callable[[], Any]) -> float:
    """Seconds of one call: the median of rounds."""
    rounds = timeit.repeat(run, number=OVERHEAD_CALLS, repeat=OVERHEAD_ROUNDS)
    return statistics.median(rounds) / OVERHEAD_CALLS


def _line(row: Row) -> str:
    star = "*" if row.chosen else " "
    gain = f"{row.times_eager:5.2f}x eager" if row.times_eager is not None else " " * 12
    what = f"{row.op} {row.what}"
    limit = "matmul" if row.op == "attention_forward" else "copy"
    return (
        f"{row.shape:>18} {row.dtype:8} {what:40} {star}{row.backend:24} {row.milliseconds:9.3f} ms {gain} "
        f"{row.moved_gigabytes:7.3f} GB {row.share:6.1%} of {limit}"
    )


def _parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["1x3120x12x128"], help="names or BATCHxTOKENSxHEADSxHEAD_DIM")
    parser.add_argument("--ops", nargs="+", default=(), choices=TUNED, help="all without it")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=("float32", "bfloat16", "float16"))
    accelerator = torch.accelerator.current_accelerator()
    parser.add_argument("--device", default=str(accelerator or "cpu"), help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="leave out backends that are compiled first")
    parser.add_argument("--output", type=Path, help="a JSON file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
