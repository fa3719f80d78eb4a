"""The one table: every op that is dispatched, with its backends in the order of preference."""

from __future__ import annotations

from typing import Any

from dit_fused_ops.attention import ATTENTION, ATTENTION_VARLEN
from dit_fused_ops.dispatch import Op
from dit_fused_ops.norms import NORM
from dit_fused_ops.pointwise import ACTIVATION, MULTIPLY_ADD
from dit_fused_ops.rope import ROPE
from dit_fused_ops.sparse import BLOCK_SPARSE

OPS: tuple[Op[Any], ...] = (ROPE, ATTENTION, ATTENTION_VARLEN, BLOCK_SPARSE, NORM, MULTIPLY_ADD, ACTIVATION)
