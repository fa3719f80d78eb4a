"""How much was computed, whatever decided it.

Counted are matrix products, convolutions and attention, by the convention of torch's `FlopCounterMode`: a multiply-add
is two operations; bias, softmax and everything pointwise is none. Attention is 2·B·N·S·T·(D + E), the whole score
matrix, also where a mask hides a part of it.

Legend: B batch, N heads, S queries, T keys, D head dim of queries and keys, E head dim of values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from math import prod
from types import TracebackType
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from dit_cache.errors import CacheError

Shape = Sequence[int]
Formula = Callable[..., int]

# Place of the left factor among the arguments. torch 2.13 has no formula for these. `linear`, `matmul` and attention as
# a whole are here because inference mode, or a device with a kernel of its own, shows them undivided: without an entry
# the counter would divide them, and what ran would not be what runs without a meter.
PRODUCTS = {
    "aten::linear": 0,
    "aten::matmul": 0,
    "aten::mv": 0,
    "aten::dot": 0,
    "aten::vdot": 0,
    "aten::addmv": 1,
    "aten::addmv_": 1,
    "aten::addmm_": 1,
    "aten::baddbmm_": 1,
    "aten::_addmm_activation": 1,
    "aten::_int_mm": 0,
    "aten::_scaled_mm_v2": 0,
    "aten::_weight_int8pack_mm": 0,
    "npu::npu_linear": 0,
}
# Queries, keys and values come first, heads before tokens. Those that torch knows are here too: older ones refuse
# grouped heads.
ATTENTION = (
    "aten::scaled_dot_product_attention",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "aten::_scaled_dot_product_attention_math_for_mps",
    "mindiesd::la",
)
# The argument that holds the number of heads.
NPU_ATTENTION = {
    "npu::npu_fusion_attention": "head_num",
    "npu::npu_fusion_attention_v2": "head_num",
    "npu::npu_fusion_attention_v3": "head_num",
    "npu::npu_prompt_flash_attention": "num_heads",
    "npu::npu_fused_infer_attention_score": "num_heads",
    "npu::npu_fused_infer_attention_score_v2": "num_query_heads",
}
# Where the sequences end, of the queries and of the keys.
NPU_LENGTHS = (("actual_seq_qlen", "actual_seq_lengths"), ("actual_seq_kvlen", "actual_seq_lengths_kv"))


class FlopMeter:
    """Counts the floating point operations that run inside its `with` blocks, in the thread that entered them.

    Entering it again adds to the count; entering it inside itself counts once. Meters may stand inside one another, and
    each counts all that runs in it. It works with gradients and without, in `torch.no_grad` and `torch.inference_mode`;
    a compiled module runs as if it were not. Operators without a formula count nothing (pass one), nor does what a
    replayed device graph runs.

    Args:
        custom_mapping: formulas for more operators, as `FlopCounterMode` takes them: from `torch.ops.space.name` to a
            function that gets the call's arguments with shapes in place of tensors, and `out_shape`, and returns the
            number of operations. They come before those of this module.

    Example::

        with FlopMeter() as meter:
            model(x)
        print(meter.flops)
    """

    def __init__(self, *, custom_mapping: Mapping[Any, Formula] | None = None) -> None:
        self._custom = dict(custom_mapping or {})
        self._before = 0
        self._depth = 0
        self._counter: FlopCounterMode | None = None
        self._stack = ExitStack()

    @property
    def flops(self) -> int:
        """The operations counted so far."""
        return self._before + (self._counter.get_total_flops() if self._counter else 0)

    def reset(self) -> None:
        """Start again from zero, also inside a `with` block."""
        self._before = 0
        if self._counter:
            self._counter.flop_counts.clear()

    def __enter__(self) -> FlopMeter:
        self._depth += 1
        if self._depth == 1:
            counter = FlopCounterMode(display=False, custom_mapping={**dict(_formulas()), **self._custom})
            # The tracker hooks every module of the process to say which one costs what, which nobody asks here.
            counter.mod_tracker = _Everything()  # type: ignore[assignment]
            self._stack.enter_context(counter)
            self._counter = counter
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._before, self._counter = self.flops, None
            self._stack.close()


def flops_share(run: Callable[[], object], reference: Callable[[], object]) -> float:
    """The operations that `run` executes relative to those of `reference`; each is called once.

    Raises:
        CacheError: `reference` executes no counted operation.
    """
    with FlopMeter() as whole:
        reference()
    if whole.flops == 0:
        raise CacheError(
            "the reference run executed 0 counted operations: it must run matrix products, convolutions or attention "
            "in the calling thread; operators of your own need a formula: FlopMeter(custom_mapping=...)"
        )
    with FlopMeter() as part:
        run()
    return part.flops / whole.flops


class _Everything:
    """Stands in for torch's module tracker: one place, no hooks."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


def _formulas() -> Iterator[tuple[Any, Formula]]:
    """Formulas by operator packet and by each of its overloads, of those operators that are registered now."""
    for name, formula in _formulas_by_name().items():
        space, _, short = name.partition("::")
        packet = getattr(getattr(torch.ops, space), short, None)
        if packet is None:
            continue
        # The counter divides a composite operator unless it finds the overload, and counts by the packet.
        for key in (packet, *(getattr(packet, overload) for overload in packet.overloads())):
            yield key, formula if name in PRODUCTS or name in ATTENTION else _named(packet, formula)


def _formulas_by_name() -> dict[str, Formula]:
    return {
        **{name: partial(_product, place) for name, place in PRODUCTS.items()},
        **dict.fromkeys(ATTENTION, _attention),
        **{name: partial(_npu_attention, heads) for name, heads in NPU_ATTENTION.items()},
        "aten::_native_multi_head_attention": _multi_head_attention,
        "aten::_transformer_encoder_layer_fwd": _encoder_layer,
    }


def _named(packet: Any, formula: Formula) -> Formula:
    """Call a formula with all arguments by the names in the operator's schema, defaults included."""
    schema = packet.default._schema.arguments
    names = [argument.name for argument in schema]
    defaults = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}

    def call(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return formula({**defaults, **dict(zip(names, args, strict=False)), **kwargs})

    return call


def _product(place: int, *args: Any, out_shape: Shape, **_: Any) -> int:
    return 2 * prod(out_shape) * int(args[place][-1])


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _multi_head_attention(call: Mapping[str, Any]) -> int:
    """Four projections of H·H and the attention between them: of queries and output by S, of keys and values by T."""
    batch, queries, width = (int(size) for size in call["query"])
    keys = int(call["key"][1])
    return 4 * batch * width * (width * (queries + keys) + queries * keys)


def _encoder_layer(call: Mapping[str, Any]) -> int:
    source: Shape = call["src"]
    feed_forward: Shape = call["ffn_weight_1"]
    return _multi_head_attention({"query": source, "key": source}) + 4 * prod(source[:-1]) * prod(feed_forward)


def _npu_attention(heads_name: str, call: Mapping[str, Any]) -> int:
    """Attention in any layout of Ascend's kernels, where H is N·D and T counts tokens of all sequences, end to end."""
    layout = call["input_layout"].partition("_")[0]
    query, key, value = (
        {axis: int(size) for axis, size in zip(layout, call[name], strict=True)} for name in ("query", "key", "value")
    )
    heads = int(call[heads_name])
    if "H" in layout:
        kv_heads = key["H"] * heads // query["H"]
        head_dims = query["H"] // heads + value["H"] // kv_heads
    else:
        head_dims = query["D"] + value["D"]
    return 2 * heads * head_dims * _pairs(layout, query, key, call)


def _pairs(layout: str, query: Mapping[str, int], key: Mapping[str, int], call: Mapping[str, Any]) -> int:
    """B·S·T, or the sum of S·T over the sequences that stand one after the other."""
    if "T" not in layout:
        return query.get("B", 1) * query["S"] * key["S"]
    query_ends, key_ends = ([call[name] for name in names if call.get(name) is not None] for names in NPU_LENGTHS)
    if not query_ends:
        return query["T"] * key["T"]
    if isinstance(query_ends[0], torch.Size):  # a tensor whose numbers stay on the device: taken as equally long
        return query["T"] * key["T"] // int(query_ends[0][0])
    ends = zip(_lengths(query_ends[0]), _lengths((key_ends or query_ends)[0]), strict=True)
    return sum(queries * keys for queries, keys in ends)


def _lengths(ends: Sequence[int]) -> list[int]:
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
