"""Compile the kernels for two generations of NVIDIA devices, from the launches that real calls make; needs no device.

Prints one line a kernel; a process of its own, because the other tests interpret the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dit_fused_ops.dispatch import Op
from dit_fused_ops.norms import NORM
from dit_fused_ops.norms import triton_kernels as norm_kernels
from dit_fused_ops.pointwise import MULTIPLY_ADD
from dit_fused_ops.pointwise import triton_kernels as pointwise_kernels
from dit_fused_ops.rope import ROPE
from dit_fused_ops.rope import triton_kernels as rope_kernels

TARGETS = (GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32))
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


class Compiling:
    """Stands where a kernel stands, and compiles it for the arguments of a launch."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.compile

    def compile(self, *values: Any, num_warps: int, **constants: Any) -> None:
        names = self.kernel.arg_names
        given = {**dict(zip(names, values, strict=False)), **constants}
        kinds = {name: kind_of(given[name], constant=name in constants) for name in names}
        fixed = {(names.index(name),): given[name] for name, kind in kinds.items() if kind == "constexpr"}
        for target in TARGETS:
            source = ASTSource(fn=self.kernel, signature=kinds, constexprs=fixed)
            compiled = triton.compile(source, target=target, options={"num_warps": num_warps})
            print(self.kernel.__name__, target.arch, len(compiled.asm["cubin"]), "bytes")


def kind_of(value: Any, *, constant: bool) -> str:
    """How Triton's launcher would see an argument: it makes a constant of an integer 1."""
    if constant or (isinstance(value, int) and value == 1):
        return "constexpr"
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def calls() -> Iterator[tuple[Op[Any], tuple[torch.Tensor | None, ...], tuple[Any, ...]]]:
    """Wan's block at 1.3B, and every switch of the kernels at least once in each position."""
    x, y, vector = torch.empty(2, 3, 1536), torch.empty(2, 3, 1536).bfloat16(), torch.empty(2, 1, 1536)
    weight = torch.empty(1536)
    layer, rms = (("layer", 1e-6, 0, False, True, None), ("rms", 1e-6, 0, False, True, None))
    yield NORM, (y, weight, None, None, None, None, None), rms
    yield NORM, (y, weight, weight, None, None, None, None), layer
    yield NORM, (y, None, None, vector, vector, None, None), layer
    yield NORM, (x, None, None, vector, vector, y, vector), layer
    yield NORM, (x, weight, weight, x, x, y, None), rms
    for table in (torch.empty(3, 64), torch.empty(3, 128)):
        for mode in ("rotated_half", "rotated_interleaved"):
            yield ROPE, (torch.empty(2, 3, 12, 128).bfloat16(), table, table), (mode, False, True, None, None)
            yield ROPE, (torch.empty(2, 3, 12, 160), table, table), (mode, False, True, None, 128)
    yield MULTIPLY_ADD, (x, y, vector), (False,)
    yield MULTIPLY_ADD, (vector, y, vector), (True,)


def main() -> None:
    """Compile everything; the first kernel that does not compile raises."""
    for module, name in (
        (norm_kernels, "_norm_kernel"),
        (rope_kernels, "_rotate_kernel"),
        (pointwise_kernels, "_multiply_add_kernel"),
    ):
        setattr(module, name, Compiling(getattr(module, name)))
    for op, tensors, options in calls():
        backend = op.backend("triton")
        assert backend is not None
        backend.run(op.describe(tensors, options), *tensors)


if __name__ == "__main__":
    main()
