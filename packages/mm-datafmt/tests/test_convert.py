"""Conversion: what is written, what is refused, and that a refusal leaves nothing."""

import json
import os
import pickle
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mm_datafmt import (
    BadSamplesError,
    DataFormatError,
    FolderError,
    FormatError,
    ParseError,
    Report,
    TargetError,
    check,
    convert,
    read,
)

WriteFile = Callable[..., Path]


def llava(*turns: str, image: Any = None) -> dict[str, Any]:
    speakers = ("human", "gpt")
    conversations = [{"from": speakers[i % 2], "value": turn} for i, turn in enumerate(turns)]
    return {"id": "1", "conversations": conversations, **({"image": image} if image is not None else {})}


def refused(source: Path, images: Path, **options: Any) -> Report:
    """Convert, expect a refusal, and expect nothing to be left."""
    target = images.parent / "out.json"
    before = sorted(images.parent.iterdir())
    with pytest.raises(BadSamplesError) as caught:
        convert(source, target, image_dir=images, **options)
    assert sorted(images.parent.iterdir()) == before
    return caught.value.report


def codes(report: Report) -> list[str]:
    return [problem.code for problem in report.problems]


def test_all_turns_texts_and_images_arrive(images: Path, write_array: WriteFile) -> None:
    source = write_array(
        [
            llava("<image>\nWhich?", "7", "Sure?", "Ja, schön 图", "Really?", "Yes", image="a.png"),
            llava("only text", "fine"),
            llava("<image> or <image>", "b", image=["./sub/../b.jpg", "sub/ç 图.png"]),
        ]
    )
    target = images.parent / "train.json"
    report = convert(source, target, image_dir=images)
    assert (report.ok, report.records, report.format, report.counts) == (True, 3, "llava", {})
    text = target.read_text(encoding="utf-8")
    first, second, third = json.loads(text)
    assert [turn["role"] for turn in first["messages"]] == ["user", "assistant"] * 3
    assert [turn["content"] for turn in first["messages"]][3] == "Ja, schön 图"
    assert second == {
        "messages": [{"role": "user", "content": "only text"}, {"role": "assistant", "content": "fine"}],
        "images": [],
    }
    assert first["images"] == ["images/a.png"]
    assert third["images"] == ["images/b.jpg", "images/sub/ç 图.png"]
    assert "图" in text  # not ASCII-escaped
    assert [line[:2] for line in text.split("\n")] == ["[", '{"', '{"', '{"', "]", ""]  # one record a line
    assert check(target).ok


def test_json_lines_give_the_same_file(images: Path, write_array: WriteFile, write_lines: WriteFile) -> None:
    records = [llava("<image>?", "a", image="a.png"), llava("x", "y")]
    one, two = images.parent / "1.json", images.parent / "2.json"
    convert(write_array(records), one, image_dir=images)
    convert(write_lines(records), two, image_dir=images)
    assert one.read_bytes() == two.read_bytes()


def test_the_default_folders_are_those_of_the_files(images: Path) -> None:
    source = images / "source.json"
    source.write_text(json.dumps([llava("<image>?", "a", image="a.png")]))
    convert(source, images.parent / "out.json")
    assert next(read(images.parent / "out.json")).images == ("images/a.png",)


def test_messages_are_moved_to_another_dataset_folder(images: Path, write_array: WriteFile) -> None:
    (images / "v.mp4").write_bytes(b"video")
    record = {
        "messages": [{"role": "user", "content": "<image><video>"}, {"role": "assistant", "content": "a"}],
        "images": ["a.png"],
        "videos": ["v.mp4"],
    }
    target = images.parent / "out.json"
    convert(write_array([record]), target, image_dir=images, dataset_dir=images.parent.parent)
    sample = next(read(target))
    assert (sample.images, sample.videos) == (("data/images/a.png",), ("data/images/v.mp4",))
    assert check(target, dataset_dir=images.parent.parent).ok
    assert codes(check(target)) == ["missing_file", "missing_file"]


def test_an_absolute_path_inside_the_image_folder_is_made_relative(images: Path, write_array: WriteFile) -> None:
    target = images.parent / "out.json"
    convert(write_array([llava("<image>", "a", image=str(images / "a.png"))]), target, image_dir=images)
    assert next(read(target)).images == ("images/a.png",)


def test_images_linked_into_the_dataset_folder(images: Path, tmp_path: Path, write_array: WriteFile) -> None:
    """A link inside the data set stays a path inside it, and a link to the data set is seen through."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "linked").symlink_to(images)
    source = write_array([llava("<image>", "a", image="a.png")])
    convert(source, tmp_path / "set" / "1.json", image_dir=tmp_path / "set" / "linked")
    assert next(read(tmp_path / "set" / "1.json")).images == ("linked/a.png",)
    convert(source, images.parent / "2.json", image_dir=tmp_path / "set" / "linked")
    assert next(read(images.parent / "2.json")).images == ("images/a.png",)


def test_images_outside_the_dataset_folder_are_refused(images: Path, tmp_path: Path, write_array: WriteFile) -> None:
    other = tmp_path / "other"
    other.mkdir()
    report = refused(write_array([llava("<image>", "a", image="a.png")]), images, dataset_dir=other)
    assert codes(report) == ["outside_dataset_dir"]
    message = report.problems[0].message
    assert str(images / "a.png") in message
    assert "set --dataset_dir" in message


@pytest.mark.parametrize("path", ["../secret.png", "sub/../../secret.png", "/etc/passwd", "..", "../images2/x.png"])
def test_paths_that_lead_out_are_refused(images: Path, write_array: WriteFile, path: str) -> None:
    Image.new("L", (1, 1)).save(images.parent / "secret.png")
    assert codes(refused(write_array([llava("<image>", "a", image=path)]), images)) == ["path_escapes"]


@pytest.mark.parametrize("path", ["no.png", "sub", "a.png/b", "nul\0.png", "x" * 5000, "loop/a.png", "http://h/a.png"])
def test_files_that_are_not_there(images: Path, write_array: WriteFile, path: str) -> None:
    (images / "loop").symlink_to("loop")
    assert codes(refused(write_array([llava("<image>", "a", image=path)]), images)) == ["missing_file"]


def test_half_a_surrogate_pair(images: Path, write_lines: WriteFile) -> None:
    source = write_lines([llava("<image>\ud800", "a", image="\ud800.png")])
    with pytest.raises(ParseError, match=r"record 1 .*half a surrogate pair"):
        convert(source, images.parent / "out.json", image_dir=images)
    assert codes(check(source, dataset_dir=images, source_format="llava")) == ["surrogate"]


def test_a_pipe_for_an_image_does_not_hang(images: Path, write_array: WriteFile) -> None:
    os.mkfifo(images / "pipe.png")
    assert codes(refused(write_array([llava("<image>", "a", image="pipe.png")]), images)) == ["missing_file"]


def png(width: int, height: int, *, good_checksum: bool = True) -> bytes:
    """A PNG of a header that claims any size, and no pixels."""
    body = b""
    for kind, data in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)),
        (b"IDAT", b"x"),
        (b"IEND", b""),
    ):
        checksum = zlib.crc32(kind + data) ^ (kind == b"IDAT" and not good_checksum)
        body += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an image that Pillow knows"), (b"<html>404</html>", "not an image that Pillow knows"),
        (png(100_000, 100_000), "claims too many pixels"), (png(2**31 - 1, 2**31 - 1), "claims too many pixels"),
        (png(9, 9, good_checksum=False), "cannot be read as an image: broken PNG"),
        (png(9, 9)[:30], "not an image|cannot be read as an image"),
    ],
)  # fmt: skip
def test_files_that_are_no_images(images: Path, write_array: WriteFile, content: bytes, message: str) -> None:
    (images / "bad.png").write_bytes(content)
    report = refused(write_array([llava("<image>", "a", image="bad.png")] * 2), images)
    assert codes(report) == ["bad_image", "bad_image"]
    assert re.search(message, report.problems[0].message)


def test_an_image_that_pillow_only_warns_about_is_taken(images: Path, write_array: WriteFile) -> None:
    (images / "large.png").write_bytes(png(10_000, 10_000))
    convert(write_array([llava("<image>", "a", image="large.png")]), images.parent / "o.json", image_dir=images)


def test_an_empty_video(images: Path, write_array: WriteFile) -> None:
    (images / "v.mp4").touch()
    turns = [{"role": "user", "content": "<video>"}, {"role": "assistant", "content": "a"}]
    assert codes(refused(write_array([{"messages": turns, "videos": ["v.mp4"]}]), images)) == ["bad_video"]


def turns_of(roles: str) -> list[dict[str, str]]:
    names = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": names[role], "content": "x"} for role in roles]


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        ("ua", []), ("sua", []), ("uaua", []),
        ("u", ["no_answer"]), ("s", ["no_answer"]), ("uau", ["last_turn"]), ("su", ["no_answer"]),
        ("a", ["role_order"]), ("uaa", ["role_order"]), ("uua", ["role_order"]), ("usa", ["role_order"]),
        ("ssua", ["role_order"]), ("au", ["role_order", "last_turn"]), ("uu", ["role_order", "no_answer"]),
        ("sau", ["role_order", "last_turn"]), ("uas", ["role_order", "last_turn"]),
    ],
)  # fmt: skip
def test_the_order_of_turns(tmp_path: Path, write_array: WriteFile, roles: str, expected: list[str]) -> None:
    assert codes(check(write_array([{"messages": turns_of(roles)}]))) == expected


@pytest.mark.parametrize("answer", ["", " ", "\n\t\u3000"])
def test_empty_answers(write_array: WriteFile, answer: str) -> None:
    assert codes(check(write_array([llava("q", answer, "", "a")]))) == ["empty_answer"]


@pytest.mark.parametrize(
    ("question", "image", "expected"),
    [
        ("none", "a.png", ["image_count"]), ("<image>", None, ["image_count"]),
        ("<image><image>", "a.png", ["image_count"]),
        ("<image>", ["a.png", "a.png"], ["image_count"]), ("<video>", None, ["video_count"]), ("<Image>", None, []),
    ],
)  # fmt: skip
def test_placeholders_and_paths_are_counted(
    images: Path, write_array: WriteFile, question: str, image: Any, expected: list[str]
) -> None:
    source = write_array([llava(question, "a", image=image)])
    assert codes(check(source, dataset_dir=images)) == expected


def test_all_problems_of_all_records_in_one_message(images: Path, write_lines: WriteFile) -> None:
    bad = llava("no placeholder", "", image="no.png")
    bad["conversations"].append({"from": "human", "value": "?"})
    records = [llava("x", "y"), bad, {"conversations": [{"from": "narrator", "value": ""}]}, 7, llava("x", "y")]
    report = refused(write_lines(records), images)
    found = [(problem.record, problem.line, problem.code) for problem in report.problems]
    assert found == [
        (2, 2, "last_turn"), (2, 2, "empty_answer"), (2, 2, "image_count"), (2, 2, "missing_file"),
        (3, 3, "unknown_role"), (4, 4, "record"),
    ]  # fmt: skip
    assert (report.records, report.bad_records, report.problem_count) == (5, 3, 6)
    assert report.counts["unknown_role"] == 1
    assert "record 3 (line 3): turn 1: 'from' is 'narrator'; legal are system, human, gpt" in report.describe()


def test_twenty_are_listed_a_thousand_kept_all_counted(images: Path, write_array: WriteFile) -> None:
    report = refused(write_array([llava("x", "y")] + [llava("x", "")] * 1500), images)
    assert (report.problem_count, report.counts, len(report.problems)) == (1500, {"empty_answer": 1500}, 1000)
    lines = report.describe().splitlines()
    assert lines[0].endswith("1501 records, 1500 problems in 1500 records")
    assert lines[1] == "  record 2 (line 1): turn 2: the answer is empty"
    assert (len(lines), lines[-1]) == (22, "  and 1480 more")


def test_a_broken_file_leaves_nothing(images: Path, tmp_path: Path) -> None:
    source = tmp_path / "cut.json"
    source.write_text("[" + json.dumps(llava("x", "y")) + ", {")
    before = sorted(images.parent.iterdir())
    with pytest.raises(ParseError, match="record 2"):
        convert(source, images.parent / "out.json", image_dir=images)
    assert sorted(images.parent.iterdir()) == before


def test_an_existing_target_is_kept_without_overwrite(images: Path, write_array: WriteFile) -> None:
    source, target = write_array([llava("x", "y")]), images.parent / "out.json"
    target.write_text("mine")
    with pytest.raises(TargetError, match="exists already; add --overwrite"):
        convert(source, target, image_dir=images)
    with pytest.raises(BadSamplesError):
        convert(write_array([llava("x", "")], "bad.json"), target, image_dir=images, overwrite=True)
    assert target.read_text() == "mine"
    convert(source, target, image_dir=images, overwrite=True)
    assert len(list(read(target))) == 1


def test_a_file_can_be_converted_onto_itself(images: Path) -> None:
    path = images.parent / "same.json"
    path.write_text(json.dumps([llava("x", "y")]))
    convert(path, path, overwrite=True)
    assert check(path).format == "messages"


def test_a_target_that_appears_meanwhile_is_not_replaced(images: Path, write_array: WriteFile) -> None:
    target = images.parent / "out.json"
    with pytest.raises(TargetError):
        convert(write_array([llava("x", "y")]), target, on_format=lambda name: target.write_text("mine"))
    assert target.read_text() == "mine"
    assert len(list(images.parent.iterdir())) == 2


def test_folders_that_do_not_exist(images: Path, tmp_path: Path, write_array: WriteFile) -> None:
    source = write_array([llava("x", "y")])
    with pytest.raises(FolderError, match="its folder does not exist; create it first"):
        convert(source, tmp_path / "no" / "out.json")
    with pytest.raises(FolderError, match=r"image_dir .*no' is not an existing folder"):
        convert(source, tmp_path / "out.json", image_dir=tmp_path / "no")
    with pytest.raises(FolderError, match=r"dataset_dir .*source.json' is not an existing folder"):
        convert(source, tmp_path / "out.json", dataset_dir=source)
    with pytest.raises(TargetError, match="exists and is not a file"):
        convert(source, images, overwrite=True)


def test_the_format_is_told_or_named(images: Path, write_array: WriteFile) -> None:
    source, told = write_array([{"x": 1}]), list[str]()
    with pytest.raises(FormatError, match="cannot tell the format"):
        convert(source, images.parent / "out.json", on_format=told.append)
    assert codes(check(source, source_format="llava", on_format=told.append)) == ["record"]
    assert told == ["llava"]
    with pytest.raises(FormatError, match="known formats"):
        check(source, source_format="xml")
    with pytest.raises(FormatError, match="known formats"):
        convert(source, images.parent / "out.json", source_format="xml")


def test_errors_survive_pickling(images: Path, write_array: WriteFile, tmp_path: Path) -> None:
    (tmp_path / "cut").write_text("[")
    for call in (
        lambda: convert(write_array([llava("x", "")]), tmp_path / "o.json"),
        lambda: list(read(tmp_path / "cut")),
        lambda: list(read(write_array([3]), format="llava")),
    ):
        with pytest.raises(DataFormatError) as caught:
            call()
        copy = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 - our own bytes
        assert (str(copy), vars(copy)) == (str(caught.value), vars(caught.value))
        assert isinstance(copy, ValueError)


def test_hostile_text_cannot_steer_the_terminal(images: Path, write_array: WriteFile) -> None:
    report = refused(write_array([llava("<image>", "a", image="\x1b[2J\n" + "x" * 10_000)]), images)
    assert "\x1b" not in report.describe()
    assert len(report.describe()) < 1000
