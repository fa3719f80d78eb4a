"""The published settings of each task, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from wan_infer.config import TRANSFORMERS
from wan_infer.errors import RequestError
from wan_infer.tasks import TASKS, check_frames, check_pixels, check_task, task_of

FOUR = {(720, 1280), (1280, 720), (480, 832), (832, 480)}
SMALL = {(480, 832), (832, 480)}
# As the official generate.py has them: model, sizes, frames, steps, shift at 832*480 and at 1280*720.
PUBLISHED: dict[str, tuple[Any, ...]] = {
    "t2v-14B": ("t2v", FOUR, 81, 50, 5, 5),
    "t2v-1.3B": ("t2v", SMALL, 81, 50, 5, 5),
    "i2v-14B": ("i2v", FOUR, 81, 40, 3, 5),
    "t2i-14B": ("t2v", FOUR | {(1024, 1024)}, 1, 50, 5, 5),
    "flf2v-14B": ("flf2v", FOUR, 81, 50, 16, 16),
    "vace-1.3B": ("vace", SMALL, 81, 50, 16, 16),
    "vace-14B": ("vace", FOUR, 81, 50, 16, 16),
}


def test_all_published_tasks_and_our_own() -> None:
    assert set(TASKS) == {*PUBLISHED, "t2v-mini"} == set(TRANSFORMERS)
    assert all(task.name == name for name, task in TASKS.items())


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_of(name: str) -> None:
    task = TASKS[name]
    found: tuple[Any, ...] = (
        task.model_type,
        set(task.sizes),
        task.frames,
        task.steps,
        task.shift((832, 480)),
        task.shift((1280, 720)),
    )
    assert found == PUBLISHED[name]
    assert task.shift((480, 832)) == task.shift((832, 480))
    assert task.guidance == 5.0
    assert task.size in task.sizes
    assert TRANSFORMERS[name].model_type == task.model_type


def test_negative_prompts() -> None:
    plain = TASKS["t2v-14B"].negative_prompt
    assert plain.startswith("色调艳丽，过曝，静态，细节模糊不清")
    assert plain.endswith("背景人很多，倒着走")
    assert (plain.count("，"), len(plain)) == (27, 137)
    assert TASKS["i2v-14B"].negative_prompt == "镜头晃动，" + plain
    assert TASKS["flf2v-14B"].negative_prompt == "镜头切换，镜头晃动，" + plain
    assert TASKS["vace-14B"].negative_prompt == TASKS["t2i-14B"].negative_prompt == plain


@pytest.mark.parametrize("name", TASKS)
def test_a_transformer_knows_its_task(name: str) -> None:
    found = task_of(TRANSFORMERS[name]).name
    assert found == ("t2v-14B" if name == "t2i-14B" else name)
    check_task(TASKS[name], TRANSFORMERS[name])


def test_a_transformer_of_another_shape_takes_any_size() -> None:
    other = replace(TRANSFORMERS["i2v-14B"], num_layers=3)
    task = task_of(other)
    assert (task.name, task.model_type, task.sizes) == ("i2v", "i2v", ())
    task.check_size((16, 16))
    check_task(TASKS["i2v-14B"], other)


@pytest.mark.parametrize(
    ("task", "checkpoint", "message"),
    [
        ("t2v-14B", "t2v-1.3B", "--task is t2v-14B, but this checkpoint is for t2v-1.3B"),
        ("t2v-1.3B", "i2v-14B", "--task is t2v-1.3B, but this checkpoint is for i2v-14B"),
        ("t2i-14B", "vace-14B", "but this checkpoint is for vace-14B"),
    ],
)
def test_a_task_that_is_not_the_checkpoints(task: str, checkpoint: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        check_task(TASKS[task], TRANSFORMERS[checkpoint])


def test_a_task_of_another_kind_than_an_unknown_transformer() -> None:
    with pytest.raises(RequestError, match="--task is t2v-14B, but this checkpoint's transformer is of the type vace"):
        check_task(TASKS["t2v-14B"], replace(TRANSFORMERS["vace-14B"], num_layers=3))


@pytest.mark.parametrize("frames", [1, 5, 81, 1001])
def test_frames_that_are_fine(frames: int) -> None:
    check_frames(frames)


@pytest.mark.parametrize(
    ("frames", "below", "above"), [(6, 5, 9), (8, 5, 9), (80, 77, 81), (4, 1, 5), (0, 1, 5), (-7, 1, 5)]
)
def test_frames_that_are_not_name_the_nearest_two(frames: int, below: int, above: int) -> None:
    with pytest.raises(RequestError, match=rf"frames is {frames}; it has to be 4n\+1, for example {below} or {above}$"):
        check_frames(frames)


@pytest.mark.parametrize(
    ("size", "nearest"), [((830, 480), r"832\*480"), ((8, 100), r"16\*96"), ((0, -5), r"16\*16"), ((24, 40), r"32\*32")]
)
def test_sizes_that_are_not_multiples_of_16(size: tuple[int, int], nearest: str) -> None:
    with pytest.raises(RequestError, match=rf"multiples of 16, for example {nearest}$"):
        check_pixels(size)


def test_a_size_that_is_not_offered_lists_those_that_are() -> None:
    with pytest.raises(RequestError, match=r"size 1280\*720 is not offered for t2v-1.3B; offered: 480\*832, 832\*480$"):
        TASKS["t2v-1.3B"].check_size((1280, 720))
