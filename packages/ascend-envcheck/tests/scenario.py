"""A machine in words, and what has to be found on it."""

from __future__ import annotations

from typing import Callable, NamedTuple

from fake_machine import FakeMachine


class Scenario(NamedTuple):
    """What is wrong, how to build it, and every FAIL and WARN that follows."""

    name: str
    build: Callable[[FakeMachine], None]
    faults: dict[str, str]  # id to severity, complete
    cpu: str  # the answer to: fine-tune Qwen2.5-VL
    npu: str
    words: str = ""  # in the cause of a fault
    infer: tuple[str, str] | None = None  # the answers to: run Wan2.1, where they are others
