"""Work ahead in threads. Nothing is timed: threads wait for events that the test sets."""

from __future__ import annotations

import threading
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_finetune.data.prefetch import LateError, Prefetcher


@settings(deadline=None, max_examples=30)
@given(numbers=st.lists(st.integers(0, 9), max_size=30), workers=st.integers(0, 4), limit=st.integers(0, 50))
def test_results_come_in_the_order_of_the_requests(numbers: list[int], workers: int, limit: int) -> None:
    with closing(Prefetcher(lambda n: n * n, workers=workers, limit=limit)) as ahead:
        for number in numbers:
            ahead.request(number, size=number)
        assert [ahead.take() for _ in numbers] == [number * number for number in numbers]


def test_no_more_is_held_than_allowed() -> None:
    begun: list[int] = []
    seen = threading.Semaphore(0)

    def work(number: int) -> int:
        begun.append(number)
        seen.release()
        return number

    with closing(Prefetcher(work, workers=4, limit=100)) as ahead:
        for number in range(10):
            ahead.request(number, size=40)
        for taken in range(10):
            # Two results of 40 fit into 100, a third would not.
            assert len(begun) <= taken + 2
            assert ahead.take() == taken


def test_a_result_larger_than_all_is_made_alone() -> None:
    with closing(Prefetcher(lambda n: n, workers=2, limit=10)) as ahead:
        ahead.request(1, size=99)
        ahead.request(2, size=99)
        assert [ahead.take(), ahead.take()] == [1, 2]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_is_raised_where_the_result_is_taken_and_others_still_come(workers: int) -> None:
    def work(number: int) -> int:
        if number == 1:
            raise KeyError("bad")
        return number

    with closing(Prefetcher(work, workers=workers, limit=100)) as ahead:
        for number in range(3):
            ahead.request(number, size=1)
        assert ahead.take() == 0
        with pytest.raises(KeyError, match="bad"):
            ahead.take()
        assert ahead.take() == 2


def test_work_that_hangs_is_left_behind_and_closing_does_not_wait_for_it() -> None:
    never = threading.Event()

    def work(number: int) -> int:
        if number % 2:
            never.wait()
        return number

    ahead = Prefetcher(work, workers=1, limit=100)
    for number in range(4):
        ahead.request(number, size=1)
    assert ahead.take(timeout=0.2) == 0
    with pytest.raises(LateError, match=r"0\.2 s"):
        ahead.take(timeout=0.2)
    assert ahead.take(timeout=0.2) == 2, "another thread took the place of the one that hangs"
    ahead.close()
    never.set()


def test_forgotten_requests_are_not_handed_out() -> None:
    with closing(Prefetcher(lambda n: n, workers=2, limit=100)) as ahead:
        for number in range(20):
            ahead.request(number, size=10)
        ahead.forget()
        ahead.request(77, size=1)
        assert ahead.take() == 77


def test_closing_stops_the_threads() -> None:
    before = threading.active_count()
    ahead = Prefetcher(lambda n: n, workers=3, limit=100)
    for number in range(50):
        ahead.request(number, size=1)
    ahead.take()
    ahead.close()
    assert threading.active_count() == before
