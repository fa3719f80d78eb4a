"""The compiled reference stays compiled, however many kinds of calls a program makes."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_fused_ops.dispatch import Settings
from dit_fused_ops.dispatch.choosing import Dispatcher
from dit_fused_ops.dispatch.compiling import CompiledRun
from dit_fused_ops.rope import ROPE

KINDS = 12  # more than the eight after which dynamo gives up on a piece of code


def _double(call: Any, x: Tensor) -> Tensor:
    return x * (2 if call.rotary_dim else 0)


def test_every_kind_of_call_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    def counting(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counting))
    run = CompiledRun(_double)
    for pairs in range(1, KINDS + 1):
        x, table = torch.ones(1, 2, 1, 2 * pairs), torch.ones(2, pairs)
        call = ROPE.describe((x, table, table), ("rotated_half", False, True, None, None))
        for _ in range(2):
            torch.testing.assert_close(run(call, x), 2 * x)
    assert len(graphs) == KINDS


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own use
def test_a_thorough_search_measures_it() -> None:
    dispatcher = Dispatcher(Settings(mode="runtime", thorough=True, file=None))
    x, table = torch.randn(1, 64, 2, 8), torch.randn(64, 4)
    with torch.no_grad(), dispatcher.measuring_anew() as decisions:
        dispatcher(ROPE, (x, table, table), ("rotated_half", False, True, None, None))
    assert {name for name, _ in decisions[0].ranking} == {"split", "eager", "compiled"}
