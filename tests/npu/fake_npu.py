"""Fake `npu:0` tensors: shapes and dtypes without numbers, which the vendor's own shape functions take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


def on_npu(values: Any) -> Any:
    """Tensors of the same shapes, strides, dtypes and wish for gradients on npu:0; call it under a `FakeTensorMode`."""
    return tree_map_only(Tensor, _alike, values)


def _alike(tensor: Tensor) -> Tensor:
    return torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device="npu:0", requires_grad=tensor.requires_grad
    )


def shapes(values: Any) -> Any:
    """Shape and dtype in place of each tensor."""
    return tree_map_only(Tensor, lambda tensor: (tuple(tensor.shape), tensor.dtype), values)
