"""Layer lists that a pipeline can run, and those that it can't."""

from __future__ import annotations

from typing import Any

import pytest

from mm_convert import Layout
from mm_finetune.engine.stages import Stages
from mm_finetune.errors import CheckpointError


def stages(llm: Any, vit: Any, **sizes: int) -> Stages:
    return Stages.of(Layout(llm_pp_layers=llm, vit_pp_layers=vit, **sizes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("llm", "vit", "merger", "embedding"),
    [
        ([[28]], [[32]], 0, 0),
        ([[12, 16]], [[32, 0]], 0, 0),
        ([[0, 28]], [[16, 16]], 1, 1),
        ([[0, 28]], [[32, 0]], 0, 1),
        ([[0, 0, 12, 16]], [[16, 16, 0, 0]], 1, 2),
        ([[0, 7], [7, 14]], [[16, 16], [0, 0]], 1, 1),
    ],
)
def test_where_the_parts_meet(llm: Any, vit: Any, merger: int, embedding: int) -> None:
    found = stages(llm, vit)
    assert (found.merger, found.embedding) == (merger, embedding)
    assert found.embedding_rank == embedding % len(llm[0])


@pytest.mark.parametrize(
    ("llm", "vit", "sizes", "words"),
    [
        ([[12, 16]], [[16, 16]], {}, "must begin on the last stage with vision layers or the one behind it, 1 or 2"),
        ([[0, 0, 28]], [[32, 0, 0]], {}, "0 or 1, not on stage 2"),
        ([[28, 0]], [[32, 0]], {}, "a stage without language layers stands behind"),
        ([[0, 0, 28]], [[16, 0, 16]], {}, "a stage without vision layers stands between"),
        ([[0, 28]], [[0, 32]], {}, "the first stage must have vision layers"),
        ([[14, 14]], [[32]], {}, "shorter than llm_pp_layers"),
        ([[28]], [[32]], {"tp_size": 4, "vit_tp_size": 2}, "vit_tp_size 2 must be tp_size 4 or 1"),
        ([[0, 28], [0, 0]], [[32, 0], [0, 0]], {"ldt": True}, "LDT"),
    ],
)
def test_refused(llm: Any, vit: Any, sizes: dict[str, int], words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        stages(llm, vit, **sizes)
    assert "Legal are for example" in str(caught.value)


def test_a_tied_weight_between_virtual_stages() -> None:
    """Megatron sums the gradients of both copies only where each is on a rank of its own, in its end chunk."""
    assert not stages([[0, 1, 1], [1, 1, 1]], [[2, 2, 0], [0, 0, 0]]).tied_faults()
    assert stages([[0, 2], [1, 1]], [[2, 2], [0, 0]]).tied_faults()
    assert stages([[0, 0], [2, 2]], [[1, 2], [1, 0]]).tied_faults()
