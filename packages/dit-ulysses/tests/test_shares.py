from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_ulysses import ShapeError, sequence_lengths
from dit_ulysses.shares import check_lengths, head_shares, lengths_fact, shares, spans


@given(total=st.integers(0, 500), parts=st.integers(1, 40))
def test_shares_are_as_even_as_can_be(total: int, parts: int) -> None:
    found = shares(total, parts)
    assert len(found) == parts
    assert sum(found) == total
    assert max(found) - min(found) <= 1
    assert list(found) == sorted(found, reverse=True)
    assert sequence_lengths(total, parts) == found


@given(lengths=st.lists(st.integers(0, 9), min_size=1))
def test_spans_follow_each_other(lengths: list[int]) -> None:
    found = spans(lengths)
    assert [end - start for start, end in found] == lengths
    assert [start for start, _ in found] == [0, *(end for _, end in found)][:-1]


@given(kv_heads=st.integers(1, 12), group=st.integers(1, 8), ranks=st.integers(1, 16), chunks=st.integers(1, 4))
def test_every_head_is_attended_once_beside_its_own_key_head(
    kv_heads: int, group: int, ranks: int, chunks: int
) -> None:
    heads, attended = kv_heads * group, []
    by_chunk = head_shares(heads, kv_heads, ranks, chunks)
    assert [len(of_chunk) for of_chunk in by_chunk] == [ranks] * chunks
    for rank in range(ranks):
        for share in (of_chunk[rank] for of_chunk in by_chunk):
            each = share.heads // share.kv_heads if share.heads else 0
            for at, head in enumerate(range(share.start, share.end)):
                mine = share.index[at] if share.index is not None else at // each
                assert share.kv_start + mine == head // group
                attended.append(head)
            needed = {head // group for head in range(share.start, share.end)}
            assert needed == set(range(share.kv_start, share.kv_end))  # no key head is sent for nothing
    assert attended == list(range(heads))
    totals = [sum(of_chunk[rank].heads for of_chunk in by_chunk) for rank in range(ranks)]
    assert tuple(totals) == shares(heads, ranks)


def test_lengths_that_do_not_fit() -> None:
    assert check_lengths(None, 3, 0, 4, "lengths") == (4, 4, 4)
    assert check_lengths([4, 0], 2, 1, 0, "lengths") == (4, 0)
    for lengths, said in (([4], "2 numbers"), ([4, -1], "2 numbers"), ([5, 4], "holds 4 tokens, not 5")):
        with pytest.raises(ShapeError, match=said):
            check_lengths(lengths, 2, 0, 4, "lengths")


def test_what_is_agreed_on_tells_whether_lengths_were_given() -> None:
    assert lengths_fact(None, 3, "lengths") == {"tokens, without lengths": 3}
    assert lengths_fact((3, 4), 3, "lengths") == {"lengths": [3, 4]}
