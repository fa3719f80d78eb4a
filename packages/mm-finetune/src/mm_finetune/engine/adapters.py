"""Low-rank adapters on linear layers: ``W x + alpha / r * B A dropout(x)`` (LoRA, arXiv 2106.09685).

They are cut over tensor-parallel ranks as their layer is, so that what the ranks tell one another is ``[tokens, r]``:
of a layer that is cut along its outputs every rank has all of A and its rows of B, of one that is cut along its inputs
its columns of A and all of B. Where Megatron fuses published layers into one, each has an adapter of its own.

Shape suffixes: I inputs of a layer on this rank, O outputs, R rank of the adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.nn.functional import linear

# 2**32 over the golden ratio, odd: its multiples lie far apart (Knuth, The Art of Computer Programming 3, 6.4).
GOLDEN = 2654435769

Half = Literal["lora_A", "lora_B"]


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """What an adapter starts from.

    Attributes:
        name: the published name of its layer.
        a_RI: all of A, whatever the layout.
        b_OR: all of B.
        alpha: the adapter's output is scaled with ``alpha / r``.
        dropout: probability of zeroing an input.
        rate: factor of its learning rate; 0 is not trained.
        heads: its outputs are the queries, then the keys, then the values of so many heads, and Megatron has them head
            by head; 0: they lie as they are.
    """

    name: str
    a_RI: Tensor
    b_OR: Tensor
    alpha: float
    dropout: float
    rate: float = 1.0
    heads: int = 0

    @property
    def short(self) -> str:
        """The last part of the name, ``q_proj``."""
        return self.name.rpartition(".")[2]


class Adapter(nn.Module):
    """A and B of one published layer, this rank's part.

    Args:
        spec: what it starts from.
        dtype: of the weights.
        cut: which of them is cut over tensor-parallel ranks.
        scattered: which of them sees only this rank's tokens, so that its gradient is summed over the ranks.
        alike: whether tensor-parallel ranks see the same inputs, and must drop the same of them.
        group: the tensor-parallel ranks that share the layer.
    """

    def __init__(
        self,
        spec: AdapterSpec,
        dtype: torch.dtype,
        *,
        cut: Half | None = None,
        scattered: Half | None = None,
        alike: bool = True,
        group: Any,
    ) -> None:
        super().__init__()
        self.group, self.heads = group, spec.heads
        self.name, self.alpha, self.scale = spec.name, spec.alpha, spec.alpha / len(spec.a_RI)
        self.axes = {"lora_A": {"lora_A": 1}, "lora_B": {"lora_B": 0}, None: {}}[cut]
        wholes: dict[str, Tensor] = {"lora_A": spec.a_RI, "lora_B": by_head(spec.b_OR, spec.heads)}
        for half, whole in wholes.items():
            parameter: Any = nn.Parameter(self._mine(half, whole).to(dtype), requires_grad=spec.rate > 0)
            if half in self.axes:
                set_tensor_model_parallel_attributes(parameter, True, self.axes[half], 1)
            parameter.sequence_parallel = half == scattered
            parameter.lr_mult = spec.rate
            self.register_parameter(half, parameter)
        self.dropout = Dropout(spec.dropout, 0 if alike else 1 + group.rank())

    def down(self, x: Tensor) -> Tensor:
        """``A dropout(x)``: ``[..., I]`` to ``[..., R]``."""
        return linear(self.dropout(x), cast(Tensor, self.lora_A))

    def up(self, reduced: Tensor) -> Tensor:
        """``alpha / r * B h``: ``[..., R]`` to ``[..., O]``."""
        return linear(reduced, cast(Tensor, self.lora_B)) * self.scale

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """For Megatron's checkpoints."""
        return make_sharded_tensors_for_checkpoint(  # type: ignore[no-any-return]
            self.state_dict(keep_vars=True),
            prefix,
            self.axes,
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=(metadata or {}).get("dp_cp_group")
            or parallel_state.get_data_parallel_group(with_context_parallel=True),
        )

    def _mine(self, half: str, whole: Tensor) -> Tensor:
        if half not in self.axes:
            return whole.clone()
        mine: Tensor = whole.chunk(self.group.size(), self.axes[half])[self.group.rank()]
        return mine.clone()


def by_head(b_OR: Tensor, heads: int) -> Tensor:
    """Outputs that lie kind by kind, laid head by head; see :class:`AdapterSpec`."""
    return b_OR.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2) if heads else b_OR


def by_kind(b_OR: Tensor, heads: int) -> Tensor:
    """The other way round."""
    return b_OR.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2) if heads else b_OR


class Dropout(nn.Module):
    """Dropout with a generator of its own for each call.

    Its seed is drawn from the CPU's default generator. That one stands the same on all tensor-parallel ranks, and
    whoever computes a layer again puts it back first, so the same inputs are dropped.

    Args:
        p: probability of zeroing.
        stream: ranks with different ones drop different inputs.
    """

    def __init__(self, p: float, stream: int) -> None:
        super().__init__()
        self.p, self.stream = p, stream

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        if not self.training or not self.p:
            return x
        seed = int(torch.randint(2**32, (), device="cpu"))
        # The CPU's generator takes no notice of more than 32 bits.
        generator = torch.Generator(x.device).manual_seed((seed + self.stream * GOLDEN) % 2**32)
        kept: Tensor = torch.empty_like(x).bernoulli_(1 - self.p, generator=generator).div_(1 - self.p)
        return x * kept


@dataclass(frozen=True, kw_only=True)
class Fused:
    """How the outputs of published layers lie in those of one of Megatron's.

    Attributes:
        widths: outputs of each layer in a group, on this rank, by the last part of the layer's name.
        groups: how often they follow one another: the key-value heads of a fused query, key and value.
    """

    widths: Mapping[str, int]
    groups: int = 1

    def joined(self, parts: Mapping[str, Tensor]) -> Tensor:
        """``[..., O]``; zeros where a layer has no part."""
        some = next(iter(parts.values()))
        pieces = [
            parts[name].unflatten(-1, (self.groups, width))
            if name in parts
            else some.new_zeros(*some.shape[:-1], self.groups, width)
            for name, width in self.widths.items()
        ]
        return pieces[0].flatten(-2) if len(pieces) == 1 else torch.cat(pieces, -1).flatten(-2)


class AdaptableColumn(ColumnParallelLinear):
    """Megatron's layer that is cut along its outputs; adapters may be put on. It adds its bias itself."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings | {"skip_bias_add": False})
        self.adapters = nn.ModuleDict()

    def adapt(self, specs: Iterable[AdapterSpec], fused: Fused) -> None:
        """Put adapters on the published layers that are fused in this one."""
        self.fused = fused
        scattered: Half | None = "lora_A" if self.sequence_parallel else None
        for spec in specs:
            self.adapters[spec.short] = Adapter(
                spec, self.weight.dtype, cut="lora_B", scattered=scattered, alike=not self.sequence_parallel,
                group=self.tp_group,
            )  # fmt: skip

    def forward(self, input_: Tensor, *args: Any, **settings: Any) -> tuple[Tensor, Tensor | None]:
        """As Megatron's."""
        output, bias = super().forward(input_, *args, **settings)
        return (output + self._change(input_) if self.adapters else output), bias

    def _change(self, x: Tensor) -> Tensor:
        adapters = {name: cast(Adapter, module) for name, module in self.adapters.items()}
        reduced = torch.cat([adapter.down(x) for adapter in adapters.values()], -1)
        # Backward, either sums over ranks: each has the gradient of its own outputs.
        if self.sequence_parallel:
            reduced = gather_from_sequence_parallel_region(reduced, group=self.tp_group)
        else:
            reduced = copy_to_tensor_model_parallel_region(reduced, group=self.tp_group)
        parts = reduced.chunk(len(adapters), -1)
        pairs = zip(adapters.items(), parts, strict=True)
        return self.fused.joined({name: adapter.up(part) for (name, adapter), part in pairs})

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, bias: Tensor | None, **settings: Any) -> Tensor:
        if bias is None or weight.requires_grad or not bias.requires_grad:
            return super()._forward_impl(input, weight, *args, bias=bias, **settings)  # type: ignore[no-any-return]
        # Megatron's product with a frozen weight gives a bias no gradient, without an error.
        return super()._forward_impl(input, weight, *args, bias=None, **settings) + bias  # type: ignore[no-any-return]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """For Megatron's checkpoints."""
        own: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return own | _sharded(self.adapters, prefix, sharded_offsets, metadata)


class AdaptableRow(RowParallelLinear):
    """Megatron's layer that is cut along its inputs; an adapter may be put on."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.adapters = nn.ModuleDict()

    def adapt(self, specs: Iterable[AdapterSpec], fused: Fused) -> None:
        """Put the adapter on; nothing is fused in such a layer."""
        scattered: Half | None = "lora_B" if self.sequence_parallel else None
        (spec,) = specs
        self.adapters[spec.short] = Adapter(
            spec, self.weight.dtype, cut="lora_A", scattered=scattered, alike=False, group=self.tp_group
        )

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """As Megatron's."""
        output, bias = super().forward(input_)
        for adapter in map(_adapter, self.adapters.values()):
            # Megatron sums in place: of a copy, if it is given numbers that do not lie in a row.
            reduced = adapter.down(input_).contiguous()
            if self.sequence_parallel:
                reduced = reduce_scatter_to_sequence_parallel_region(reduced, group=self.tp_group)
            else:
                reduced = reduce_from_tensor_model_parallel_region(reduced, group=self.tp_group)
            output = output + adapter.up(reduced)
        return output, bias

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **settings: Any) -> Tensor:
        if weight.requires_grad:
            return super()._forward_impl(input, weight, *args, **settings)  # type: ignore[no-any-return]
        # Where rows do not lie one behind the other, torch would take them for a batch of matrices, and copy a frozen
        # weight for each of them: tokens times the weight.
        rows = input.flatten(0, 1)[:, None]
        output: Tensor = super()._forward_impl(rows, weight, *args, **settings)
        return output.view(*input.shape[:-1], -1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """For Megatron's checkpoints."""
        own: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return own | _sharded(self.adapters, prefix, sharded_offsets, metadata)


def _adapter(module: nn.Module) -> Adapter:
    return cast(Adapter, module)


def _sharded(adapters: nn.ModuleDict, prefix: str, offsets: Any, metadata: dict[str, Any] | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, adapter in adapters.items():
        found |= _adapter(adapter).sharded_state_dict(f"{prefix}adapters.{name}.", offsets, metadata)
    return found
