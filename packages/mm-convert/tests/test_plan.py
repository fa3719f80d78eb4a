"""A plan that would lose or invent a byte is not a plan."""

import pytest

from mm_convert.errors import TotalityError
from mm_convert.plans import Plan, Ref, Segment, Spec

A, B = Ref("a", "", "a"), Ref("b", "", "b")
SPEC = {A: Spec("F32", (4, 2))}, {B: Spec("F32", (4, 2))}


def build(*segments: tuple[int, int, int], dim: int = 0) -> Plan:
    return Plan.build(*SPEC, [Segment(A, s, B, t, n, dim) for s, t, n in segments])


def test_whole_and_reordered_are_total() -> None:
    assert build((0, 0, 4)).nbytes == 32
    assert [s.source_start for s in build((2, 0, 2), (0, 2, 2)).writes[B]] == [2, 0]
    assert build((0, 0, 2), dim=1).nbytes == 32


@pytest.mark.parametrize(
    "segments",
    [
        [(0, 0, 3)],  # a row of the target unmade
        [(0, 1, 3)],
        [(0, 0, 3), (2, 2, 2)],  # a row made twice
        [(0, 0, 2), (0, 2, 2)],  # rows of the source unused
        [(0, 0, 4), (0, 0, 2)],  # claims that overlap in part
    ],
)
def test_anything_else_is_refused(segments: list[tuple[int, int, int]]) -> None:
    with pytest.raises(TotalityError):
        build(*segments)


def test_a_second_claim_to_the_same_rows_becomes_a_check() -> None:
    plan = build((0, 0, 4), (0, 0, 4))
    assert len(plan.writes[B]) == len(plan.checks[B]) == 1


def test_source_or_target_that_no_segment_touches() -> None:
    with pytest.raises(TotalityError):
        Plan.build(SPEC[0] | {Ref("c", "", "c"): Spec("F32", (1,))}, SPEC[1], [Segment(A, 0, B, 0, 4, 0)])
    with pytest.raises(TotalityError, match="no target"):
        Plan.build(SPEC[0], {}, [Segment(A, 0, B, 0, 4, 0)])
