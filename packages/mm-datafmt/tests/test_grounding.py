"""Boxes: the published notations, the bounds of rounding, what is refused, and what must stay as it is."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mm_datafmt import FormatError, Message, RecordError, Sample
from mm_datafmt.grounding import NOTATIONS, BoxConversion, rescale_boxes
from mm_datafmt.pictures import PictureFolder

QWEN25 = '```json\n[\n\t{"bbox_2d": [10, 20, 320, 480], "label": "a \\"red\\" bus"}\n]\n```'
QWEN2 = "<|object_ref_start|>the giraffe<|object_ref_end|><|box_start|>(176,106),(232,160)<|box_end|> stands."

few = settings(max_examples=40, deadline=None)


def asked(answer: str, question: str = "<image>\nWhere?", images: int = 1) -> Sample:
    return Sample((Message("user", question), Message("assistant", answer)), ("a.jpg",) * images)


def converted(answer: str, names: str, size: tuple[int, int] = (640, 480)) -> str:
    source, target = names.split(":")
    return rescale_boxes(asked(answer), [size], source=source, target=target).messages[-1].content


def code_of(answer: str, names: str, sizes: list[tuple[int, int]] | None = None) -> str:
    source, target = names.split(":")
    with pytest.raises(RecordError) as caught:
        rescale_boxes(asked(answer), sizes if sizes is not None else [(640, 480)], source=source, target=target)
    assert str(caught.value).startswith("turn 2: ")
    return caught.value.code


def test_pixels_become_those_of_the_resized_picture() -> None:
    # 640 x 480 under a cap of 262144 pixels is published to become 588 x 448: 10 * 588/640 = 9.2, 20 * 448/480 = 18.7.
    assert converted(QWEN25, "pixels:resized") == QWEN25.replace("[10, 20, 320, 480]", "[9, 19, 294, 448]")


def test_the_resize_is_the_trainers() -> None:
    # Without a cap the processor rounds 640 to 644 (23 squares of 28) and 480 to 476 (17).
    sample = rescale_boxes(
        asked('{"bbox_2d": [0, 0, 640, 480]}'), [(640, 480)], source="pixels", target="resized", pixel_cap=None
    )
    assert sample.messages[1].content == '{"bbox_2d": [0, 0, 644, 476]}'


def test_pixels_to_the_marks_of_qwen2_vl_and_back() -> None:
    there = converted('a {"bbox_2d": [64,48,320,480], "label": "bus"}, b', "pixels:qwen2_vl")
    assert there == "a <|object_ref_start|>bus<|object_ref_end|><|box_start|>(100,100),(500,1000)<|box_end|>, b"
    assert converted(there, "qwen2_vl:pixels") == 'a {"bbox_2d": [64, 48, 320, 480], "label": "bus"}, b'


def test_a_label_may_come_first_or_be_missing() -> None:
    assert converted('{"label":"x","bbox_2d":[0,0,64,48]}', "pixels:qwen2_vl").startswith("<|object_ref_start|>x<|")
    assert converted('{"bbox_2d": [0,0,64,48]}', "pixels:qwen2_vl") == "<|box_start|>(0,0),(100,100)<|box_end|>"


def test_qwen2_vls_own_example() -> None:
    text = converted(QWEN2, "qwen2_vl:pixels", (1000, 2000))
    assert text == '{"bbox_2d": [176, 212, 232, 320], "label": "the giraffe"} stands.'


def test_coco_is_corner_and_size() -> None:
    assert (
        converted('{"bbox": [10.5, 20.25, 100, 50.5], "id": 7}', "coco:pixels")
        == '{"bbox_2d": [10, 20, 110, 71], "id": 7}'
    )
    assert converted('{"bbox_2d" : [10,20,110,70]}', "pixels:coco") == '{"bbox" : [10,20,100,50]}'
    assert converted("<|box_start|>(1,1),(2,3)<|box_end|>", "qwen2_vl:coco") == '{"bbox": [0.64, 0.48, 0.64, 0.96]}'


def test_questions_too_but_not_the_system_turn() -> None:
    box = '{"bbox_2d": [64, 48, 320, 240]}'
    sample = asked("a bus", f'<image>\nWhat is at {box}? Answer as {{"bbox_2d": [x1, y1, x2, y2]}}')
    sample = sample._replace(messages=(Message("system", box), *sample.messages))
    turns = rescale_boxes(sample, [(640, 480)], source="pixels", target="resized").messages
    assert turns[0].content == box
    assert turns[1].content == sample.messages[1].content.replace("64, 48, 320, 240", "59, 45, 294, 224")


@pytest.mark.parametrize(
    ("answer", "names", "code"),
    [
        ('{"bbox_2d": [10, 10, 10, 20]}', "pixels:resized", "box_degenerate"),
        ('{"bbox_2d": [30, 10, 10, 20]}', "pixels:pixels", "box_degenerate"),
        ('{"bbox": [10, 10, 0, 20]}', "coco:pixels", "box_degenerate"),
        ('{"bbox_2d": [0, 0, 641, 480]}', "pixels:resized", "box_range"),
        ('{"bbox_2d": [-1, 0, 64, 48]}', "pixels:coco", "box_range"),
        ('{"bbox_2d": [0, 0, 1e999, 48]}', "pixels:coco", "box_range"),
        ("<|box_start|>(0,0),(1001,9)<|box_end|>", "qwen2_vl:pixels", "box_range"),
        ('{"bbox_2d": [1, 2, 3]}', "pixels:resized", "box_syntax"),
        ('{"bbox_2d": null}', "pixels:pixels", "box_syntax"),
        ('{"bbox_2d": [0, 0, NaN, 4]}', "pixels:resized", "box_syntax"),
        ('{"bbox_2d": [0, 0, 3, 4], "label": "\\ud800"}', "pixels:qwen2_vl", "box_syntax"),
        ("<|box_start|>(1,2)<|box_end|>", "qwen2_vl:pixels", "box_syntax"),
        ('{"bbox_2d": [0, 0, 3, 4], "score": 1}', "pixels:qwen2_vl", "not_carried"),
        ('{"bbox_2d": [0, 0, 3, 4], "label": "<|box_end|>"}', "pixels:qwen2_vl", "not_carried"),
        ("<|box_start|>(1,2),(3,4)<|box_end|>", "pixels:resized", "box_notation"),
        ('{"bbox": [1, 2, 3, 4]}', "pixels:resized", "box_notation"),
    ],
)  # fmt: skip
def test_what_is_refused(answer: str, names: str, code: str) -> None:
    assert code_of(answer, names) == code


def test_whose_box_it_is() -> None:
    answer = '{"bbox_2d": [0, 0, 64, 48]}'
    assert code_of(answer, "pixels:resized", []) == "box_picture"
    assert code_of(answer, "pixels:resized", [(640, 480), (480, 640)]) == "box_picture"
    rescale_boxes(asked(answer), [(640, 480)] * 2, source="pixels", target="resized")


def test_half_a_pixel_outside_is_cut_off_and_a_thin_box_stays_one() -> None:
    assert converted('{"bbox": [600, 470, 40.01, 10.3]}', "coco:pixels") == '{"bbox_2d": [600, 470, 640, 480]}'
    # A pixel of 4000 is a quarter of a thousandth: the side is rounded outwards instead of away.
    thin = converted('{"bbox_2d": [1001, 0, 1002, 48]}', "pixels:qwen2_vl", (4000, 480))
    assert thin == "<|box_start|>(250,0),(251,100)<|box_end|>"


sizes = st.tuples(st.integers(28, 5000), st.integers(28, 5000)).filter(lambda size: max(size) < 150 * min(size))


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, int], list[int]]:
    size = draw(sizes)
    (x1, x2), (y1, y2) = (
        sorted(draw(st.lists(st.integers(0, side), min_size=2, max_size=2, unique=True))) for side in size
    )
    return size, [x1, y1, x2, y2]


def numbers_of(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", text.replace("bbox_2d", ""))]


@few
@given(case=boxes(), target=st.sampled_from(["resized", "qwen2_vl", "coco"]))
def test_the_bound_of_a_round_trip(case: tuple[tuple[int, int], list[int]], target: str) -> None:
    size, box = case
    there = converted(json.dumps({"bbox_2d": box}), f"pixels:{target}", size)
    back = numbers_of(converted(there, f"{target}:pixels", size))
    if target == "coco":
        assert back == box
        return
    extents = (1000, 1000) if target == "qwen2_vl" else seen(size)
    step = [size[0] / extents[0], size[1] / extents[1]]  # one step of the target in pixels
    thin = [box[2] - box[0] < step[0], box[3] - box[1] < step[1]]  # may have been rounded outwards
    for index, (before, after) in enumerate(zip(box, back, strict=True)):
        bound = step[index % 2] * (1 if thin[index % 2] else 0.5) + 0.5
        assert abs(before - after) <= bound
        if step[index % 2] < 1 and not thin[index % 2]:
            assert before == after


def seen(size: tuple[int, int]) -> tuple[int, int]:
    """The resized picture, as a box of the whole picture tells it."""
    width, height = numbers_of(converted(json.dumps({"bbox_2d": [0, 0, *size]}), "pixels:resized", size))[2:]
    assert width % 28 == height % 28 == 0
    return int(width), int(height)


@few
@given(box=st.lists(st.integers(0, 1000), min_size=4, max_size=4), size=sizes)
def test_thousandths_survive_pixels_of_a_picture_that_has_more(box: list[int], size: tuple[int, int]) -> None:
    x1, x2, y1, y2 = *sorted(box[:2]), *sorted(box[2:])
    if x1 == x2 or y1 == y2:
        return
    text = f"<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>"
    there = numbers_of(converted(text, "qwen2_vl:pixels", size))
    for value, pixel, side in zip((x1, y1, x2, y2), there, size * 2, strict=True):
        assert abs(value * side / 1000 - pixel) < 1
    if min(size) > 1000:
        assert converted(converted(text, "qwen2_vl:pixels", size), "pixels:qwen2_vl", size) == text
    assert converted(converted(text, "qwen2_vl:coco", size), "coco:qwen2_vl", size) == text


@few
@given(
    before=st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    after=st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
)
def test_the_text_around_stays(before: str, after: str) -> None:
    text = f'{before}{{"bbox_2d":\t[ 64 ,48,\n320, 480 ], "label": "né", "z": [1]}}{after}'
    assert converted(text, "pixels:resized") == text.replace("[ 64 ,48,\n320, 480 ]", "[ 59 ,45,\n294, 448 ]")
    assert converted(text, "pixels:pixels") == text


@few
@given(
    text=st.text('[]{}(),:"\\<|>_-.0123456789eabox 2dstrlmfjn\n', max_size=120), names=st.permutations(list(NOTATIONS))
)
def test_no_text_breaks_it(text: str, names: list[str]) -> None:
    code = "box_"
    try:
        converted(text, f"{names[0]}:{names[1]}")
    except RecordError as fault:
        code = fault.code
    assert code.startswith(("box_", "not_carried"))


def test_sizes_come_from_the_files(tmp_path: Path) -> None:
    Image.new("RGB", (640, 480)).save(tmp_path / "a.jpg")
    convert, folder = BoxConversion.named("pixels:resized"), PictureFolder(tmp_path)
    assert "[9, 19, 294, 448]" in convert(asked(QWEN25), folder).messages[1].content
    missing = asked(QWEN25)._replace(images=("b.jpg",))
    with pytest.raises(RecordError) as caught:
        convert(missing, folder)
    assert caught.value.code == "missing_file"
    assert convert(missing._replace(messages=(Message("user", "x"),)), folder).images == ("b.jpg",)  # no box, no look


@pytest.mark.parametrize("names", ["pixels", "pixels:", "pixel:coco", ":", "coco:xywh"])
def test_unknown_notations(names: str) -> None:
    with pytest.raises(FormatError, match="known are pixels, resized, qwen2_vl, coco"):
        BoxConversion.named(names)
