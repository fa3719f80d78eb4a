"""MindIE SD as a peer: on the stub it imports, and what it does without its own kernels runs on CPU tensors.

Its warnings about optional parts and its log line for each error are kept out of the tests' output.
"""

from __future__ import annotations

import functools
import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

_SILENT = logging.CRITICAL + 1


@functools.cache
def module(name: str = "mindiesd") -> ModuleType:
    """Import a module of MindIE SD; `module("mindiesd.layers.scale_shift")`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def selection() -> ModuleType:
    """How it orders tokens and selects blocks: get_blockwise_mask, do_tensor_rearrange_pooling, and so on."""
    return module("mindiesd.layers.flash_attn.sparse_flash_attn_rf_v2")


@contextmanager
def quiet() -> Iterator[ModuleType]:
    """MindIE SD, with its warnings and log lines suppressed."""
    found = module()
    logger = logging.getLogger("mindie-sd")
    before = logger.level
    logger.setLevel(_SILENT)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield found
    finally:
        logger.setLevel(before)
