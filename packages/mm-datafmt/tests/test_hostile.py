"""Files that are broken, or made to break a reader: a message with a place, exit code 1 or 2, little memory."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import resource
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mm_datafmt import ParseError, ResumeError, conversion, convert
from mm_datafmt.cli import main
from mm_datafmt.zstd_frames import FrameEnds

GOOD = b'{"id":"1","conversations":[{"from":"human","value":"q"},{"from":"gpt","value":"a"}]}'
IMAGE = {"image": "a.png", "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]}
MEGABYTE = 1 << 20
# Prints what the process itself held at most: what a parent held before the fork does not count.
MEASURED = """
import sys
from mm_datafmt.cli import main
code = main(sys.argv[1:])
print([line for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
sys.exit(code)
"""


def with_field(value: bytes, name: bytes = b"x") -> bytes:
    """A good record and one with a further field."""
    return b'[%b,\n{"%b":%b,%b]' % (GOOD, name, value, GOOD[1:])


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    """Run the command here; return the exit code and what was printed."""
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err, captured.err
    return code, captured.out + captured.err


def measured(*arguments: str | Path, limit: int | None = None) -> tuple[int, str, int]:
    """Run the command in a process; return the exit code, what was printed, and the memory that it took in MB."""

    def limited() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    line = [sys.executable, "-c", MEASURED, *map(str, arguments)]
    done = subprocess.run(
        line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, preexec_fn=limited, check=False
    )
    assert "Traceback" not in done.stdout, done.stdout
    found = re.search(r"VmHWM:\s*(\d+) kB", done.stdout)
    assert found, done.stdout
    return done.returncode, done.stdout, int(found[1]) // 1024


# The second record of each is bad; which code, and at which byte of the file if that is known.
SECOND_IS_BAD = {
    "nested 65 deep": (with_field(nested(65)), "too_deep"),
    "nested 1000 deep": (with_field(nested(1000)), "too_deep"),
    "nested 10,000 deep": (with_field(nested(10_000)), "too_deep"),
    "deep turns": (b'[%b,{"conversations":%b}]' % (GOOD, nested(900)), "too_deep"),
    "deep image": (with_field(nested(900), b"image"), "too_deep"),
    "NaN": (with_field(b"NaN"), "nan"),
    "Infinity": (with_field(b"-Infinity"), "nan"),
    "400 digits": (with_field(b"1" * 400), "syntax"),
    "5000 digits": (with_field(b"1" * 5000), "syntax"),
    "duplicate key": (with_field(b'"2"', b"id"), "duplicate_key"),
    "half a surrogate pair": (with_field(b'"\\ud800"'), "surrogate"),
    "a NUL byte": (with_field(b'"\0"'), "nul_byte"),
    "a NUL character": (b"[%b,%b]" % (GOOD, GOOD.replace(b'"q"', b'"q\\u0000"')), "nul"),
    "invalid UTF-8": (with_field(b'"\xc3\x28"'), "utf8"),
    "overlong UTF-8": (with_field(b'"\xc0\xaf"'), "utf8"),
    "null": (b"[%b,null]" % GOOD, "record"),
    "a string": (b'[%b,"%b"]' % (GOOD, b"a" * MEGABYTE), "record"),
    "turns null": (b'[%b,{"conversations":null}]' % GOOD, "record"),
    "turn null": (b'[%b,{"conversations":[null,null]}]' % GOOD, "record"),
    "speaker null": (b'[%b,{"conversations":[{"from":null,"value":"q"}]}]' % GOOD, "unknown_role"),
    "speaker a list": (b'[%b,{"conversations":[{"from":[],"value":"q"}]}]' % GOOD, "unknown_role"),
    "text a number": (b'[%b,{"conversations":[{"from":"human","value":5}]}]' % GOOD, "record"),
    "image a number": (with_field(b"5", b"image"), "record"),
    "image a nested list": (with_field(b'[["a.png"]]', b"image"), "record"),
    "image a dict": (with_field(b'{"path":"a.png"}', b"image"), "record"),
    "image a list with null": (with_field(b"[null]", b"image"), "record"),
    "an embedded image": (with_field(b'"data:image/png;base64,AAAA"', b"image"), "embedded_media"),
    "a trailing comma": (b"[%b,\n]" % GOOD, "syntax"),
    "two arrays": (b"[%b]\n[%b]" % (GOOD, GOOD), "trailing"),
    "no comma": (b"[%b %b]" % (GOOD, GOOD), "syntax"),
    "cut in a record": (b"[%b,\n%b" % (GOOD, GOOD[:-9]), "truncated"),
    "cut behind a backslash": (b'[%b,{"id":"\\' % GOOD, "truncated"),
    "cut line": (GOOD + b"\n" + GOOD[:-9], "truncated"),
    "CRLF, cut line": (GOOD + b"\r\n" + GOOD[:-9], "truncated"),
}


@pytest.mark.parametrize("name", SECOND_IS_BAD)
def test_a_bad_record_is_named_and_the_others_are_kept(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, code = SECOND_IS_BAD[name]
    source, target = tmp_path / "s.json", tmp_path / "o.jsonl"
    source.write_bytes(text)
    status, said = run(capsys, "check", source, "--json")
    report = json.loads(said[said.index("{") : said.rindex("}") + 1])
    problems = [problem for problem in report["problems"] if problem["code"] != "duplicate_record"]
    assert (status, problems[0]["record"], problems[0]["code"]) == (1, 2, code)
    assert len(said) < 10_000
    status, said = run(capsys, "convert", source, target)
    assert status == 2
    assert "record 2" in said
    assert list(tmp_path.iterdir()) == [source]
    for more in ([], ["--shuffle", "--overwrite"]):
        status, said = run(capsys, "convert", source, target, "--on_bad", "skip", *more)
        assert status == 0
        assert target.read_bytes().count(b"\n") == 1
        (entry,) = (tmp_path / "o.bad.jsonl").read_bytes().splitlines()
        assert (json.loads(entry)["record"], json.loads(entry)["code"]) == (2, code)


# Files of which nothing can be read, and a word that the message must hold.
NOTHING_TO_READ = {
    "empty": (b"", "empty"),
    "white space": (b" \r\n", "empty"),
    "no records": (b"[]", "no record"),
    "an empty list": (b"[[]]", "JSON object"),
    "UTF-16": (json.dumps([IMAGE]).encode("utf-16"), "UTF-8"),
    "UTF-16 without mark": (json.dumps([IMAGE]).encode("utf-16-be"), "UTF-8"),
    "UTF-32": (json.dumps([IMAGE]).encode("utf-32"), "UTF-8"),
    "one giant string": (b'"' + b"a" * MEGABYTE + b'"', "array"),
    "a number": (b"123", "array"),
    "null": (b"null", "array"),
    "cut at once": (b"[", "byte 1"),
    "deep": (nested(100_000), "64 levels"),
    "gzip, cut": (gzip.compress(b"[" + GOOD + b"]")[:-12], "unpacked"),
    "gzip of nothing": (b"\x1f\x8b" + b"x" * 99, "unpacked"),
    "gzip in gzip": (gzip.compress(gzip.compress(GOOD)), "array"),
    "no parquet": (b"PAR1" + b"x" * 99 + struct.pack("<I", 2**31 - 1) + b"PAR1", "parquet"),
    "COCO, category without a name": (
        b'{"images":[{"id":1,"file_name":"a.png"}],"annotations":[{"bbox":[1,1,1,1]}],"categories":[{"id":1}]}',
        "category",
    ),
    "COCO, image without a name": (b'{"images":[5],"annotations":[{"bbox":[]}],"categories":[]}', "image"),
    "COCO, annotations no array": (b'{"images":[],"annotations":{},"categories":[]}', "annotations"),
    "COCO, nothing in it": (b'{"images":[],"annotations":[],"categories":[]}', "no record"),
    "COCO, no annotations": (b'{"images":[{"id":1,"file_name":"a.png"}],"annotations":[]}', "no record"),
    "another format": (b'[{"prompt":1}]', "s.json: cannot tell the format"),
    "COCO, then blanks": (b'{"images":[],' + b" " * 200_000 + b'5:"annotations"', ""),
}


@pytest.mark.parametrize("name", NOTHING_TO_READ)
def test_a_file_without_records_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, word = NOTHING_TO_READ[name]
    source, target = tmp_path / "s.json", tmp_path / "o.json"
    source.write_bytes(text)
    for arguments in (("check", source), ("convert", source, target, "--on_bad", "skip")):
        status, said = run(capsys, *arguments)
        assert status == 2
        assert word in said
        assert len(said) < 3_000
        assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("bbox", ["[1e308,1,1e308,1]", "[1,2,3]", "[null,1,1,1]", '["1",1,1,1]', "5"])
def test_boxes_that_are_none(bbox: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "s.json"
    source.write_text(
        '{"images":[{"id":1,"file_name":"a.png"}],"categories":[{"id":1,"name":"x"}],"annotations":'
        f'[{{"id":1,"image_id":1,"category_id":1,"bbox":{bbox}}}]}}'
    )
    status, said = run(capsys, "check", source)
    assert status == 1
    assert "record 1" in said


def test_a_truncated_array_says_the_byte_and_the_record(tmp_path: Path) -> None:
    source = tmp_path / "s.json"
    whole = b"[" + b",\n".join([GOOD] * 5000)
    source.write_bytes(whole[:-20])
    with pytest.raises(ParseError, match=f"byte {len(whole) - 20}, in record 5000") as caught:
        convert(source, tmp_path / "o.json")
    assert (caught.value.record, caught.value.offset) == (5000, len(whole) - 20)
    report = convert(source, tmp_path / "o.jsonl", on_bad="skip")
    assert (report.records, report.written) == (5000, 4999)
    assert (tmp_path / "o.jsonl").read_bytes().count(b"\n") == 4999


@pytest.mark.parametrize("text", [b"\xef\xbb\xbf[%b]" % GOOD, GOOD + b"\r\n", b"[\r\n" + GOOD + b"\r\n]\r\n"])
def test_marks_and_line_ends_of_windows(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_bytes(text)
    assert convert(tmp_path / "s.json", tmp_path / "o.json").written == 1


# Memory


def test_a_record_of_200_megabytes_is_passed_over(tmp_path: Path) -> None:
    source = tmp_path / "s.json"
    with source.open("wb") as file:
        file.write(b'[%b,\n{"conversations":["' % GOOD)
        for _ in range(200):
            file.write(b"a" * MEGABYTE)
        file.write(b'"]},\n%b]' % GOOD)
    status, said, held = measured("convert", source, tmp_path / "o.json", "--on_bad", "skip", "--workers", "1")
    assert status == 0, said
    assert "larger than the limit" in said
    assert "wrote 2 " in said
    assert held < 450


def test_a_packed_line_of_megabytes_of_nothing(tmp_path: Path) -> None:
    source = tmp_path / "s.jsonl.gz"
    with gzip.open(source, "wb", compresslevel=1) as file:
        file.write(GOOD + b"\n")
        for _ in range(100):
            file.write(b" " * MEGABYTE)
        file.write(b"\n" + GOOD)
    status, said, held = measured("convert", source, tmp_path / "o.json", "--on_bad", "skip", "--workers", "1")
    assert status == 0, said
    assert "wrote 2 " in said
    assert held < 450


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("options", [{}, {"write_checksum": True}, {"write_content_size": False}])
def test_zstd_that_is_cut_at_the_end_of_a_line(frames: int, options: dict[str, Any], tmp_path: Path) -> None:
    """RFC 8878: a frame ends with the block that says so; the content does not show that there was more."""
    packer = zstandard.ZstdCompressor(**options).compressobj()
    blocks = [packer.compress((GOOD + b"\n") * 3) + packer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK) for _ in range(3)]
    frame = b"".join(blocks) + packer.flush()
    source = tmp_path / "s.jsonl.zst"
    source.write_bytes(frame * frames)
    assert convert(source, tmp_path / "o.jsonl").written == 9 * frames
    for cut in (len(blocks[0]), len(blocks[0]) + len(blocks[1]), len(frame) - 1):
        source.write_bytes(frame * (frames - 1) + frame[:cut])
        for on_bad in ("error", "skip"):
            with pytest.raises(ParseError, match="unpacked: it ends before a frame does"):
                convert(source, tmp_path / "cut.jsonl", on_bad=on_bad)
    source.write_bytes(frame + b"\x50\x2a\x4d\x18\3\0\0\0abc")  # a frame to be skipped
    assert convert(source, tmp_path / "skippable.jsonl").written == 9


@given(st.binary(max_size=300), st.booleans(), st.booleans(), st.data())
def test_zstd_frames_end_where_they_do(content: bytes, checksum: bool, size: bool, data: st.DataObject) -> None:
    packer = zstandard.ZstdCompressor(write_checksum=checksum, write_content_size=size)
    pieces = [packer.compress(content), packer.compress(b"x" * 200_000), b"\x5f\x2a\x4d\x18\1\0\0\0x"]
    packed = b"".join(pieces)
    cut, step = data.draw(st.integers(0, len(packed))), data.draw(st.integers(1, 40))
    frames = FrameEnds(io.BytesIO(packed[:cut]).read)
    while frames.read(step):
        pass
    ends = [0, len(pieces[0]), len(pieces[0]) + len(pieces[1]), len(packed)]
    assert frames.whole == (cut in ends)


# Media


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, more: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + more + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")


def jpeg(width: int, height: int) -> bytes:
    frame = struct.pack(">HBHHB", 17, 8, height, width, 3) + b"\1\x11\0\2\x11\0\3\x11\0"
    return b"\xff\xd8\xff\xc0" + frame + b"\xff\xd9"


@pytest.fixture
def traps(tmp_path: Path) -> Path:
    """A folder of things that are no image, or claim what they are not."""
    folder = tmp_path / "traps"
    folder.mkdir()
    (folder / "claim.png").write_bytes(png(60_000, 60_000))
    (folder / "larger.png").write_bytes(png(2**31 - 1, 2**31 - 1))
    (folder / "nothing.png").write_bytes(png(0, 0))
    (folder / "claim.jpg").write_bytes(jpeg(65_535, 65_535))
    packed = zlib.compress(b"\0" * (100 * MEGABYTE))
    (folder / "text.png").write_bytes(png(9, 9, chunk(b"zTXt", b"a\0\0" + packed) + chunk(b"iCCP", b"a\0\0" + packed)))
    (folder / "empty.png").write_bytes(b"")
    heads = {
        "huge.png": png(10, 10)[:33] + struct.pack(">I", 2**31 - 1) + b"IDAT",
        "huge.webp": b"RIFF\0\0\0\x80WEBPVP8 \xec\xff\xff\x7f\x30\x01\x00\x9d\x01\x2a\x10\x00\x10\x00",
        "huge.jpg": b"\xff\xd8\xff\xe1\xff\xff",
        "huge.gif": b"GIF89a\x0a\x00\x0a\x00\x00\x00\x00",
    }
    for name, head in heads.items():
        with (folder / name).open("wb") as file:
            file.write(head)
            file.truncate(3 << 30)  # takes no room on the disk
    (folder / "loop.png").symlink_to("pool.png")
    (folder / "pool.png").symlink_to("loop.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "passwd.png").symlink_to("/etc/passwd")
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    return folder


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
@pytest.mark.parametrize("behind", [False, True])
def test_texts_in_a_png(kind: bytes, behind: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Small ones pass. Pillow refuses more than PngImagePlugin.MAX_TEXT_CHUNK, 1 MiB, before and behind the picture."""
    named = {b"zTXt": b"a\0\0", b"iCCP": b"a\0\0", b"iTXt": b"a\0\1\0\0\0"}[kind]
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    image = (tmp_path / "a.png").read_bytes()
    (tmp_path / "s.jsonl").write_text(json.dumps(IMAGE))
    for size, status in ((1 << 16, 0), ((1 << 20) + 1, 1), (100 * MEGABYTE, 1)):
        text = chunk(kind, named + zlib.compress(b"\0" * size))
        at = len(image) - 12 if behind else 33
        (tmp_path / "a.png").write_bytes(image[:at] + text + image[at:])
        if (kind, behind, status) != (b"iCCP", True, 1):  # a profile behind the picture is not read
            assert run(capsys, "check", tmp_path / "s.jsonl")[0] == status, size
    (tmp_path / "a.png").write_bytes(image[:33] + chunk(b"tEXt", b"a\0b") * 5000 + image[33:])
    assert run(capsys, "check", tmp_path / "s.jsonl")[0] == 0


FOREIGN = (
    "../traps/../../x",
    "/etc/passwd",
    "..",
    ".",
    "a\0b",
    "x" * 300,
    "x/" * 5000,
    "file:///etc/passwd",
    "~/x",
    " ",
)


def test_no_trap_is_taken_for_an_image(traps: Path, tmp_path: Path) -> None:
    names = [path.name for path in sorted(traps.iterdir())] + list(FOREIGN)
    source = tmp_path / "s.jsonl"
    source.write_text("".join(json.dumps({**IMAGE, "image": name}) + "\n" for name in names))
    line = ("convert", source, tmp_path / "o.json", "--image_dir", traps, "--on_bad", "skip", "--workers", "1")
    status, said, held = measured(*line)
    assert status == 2, said
    assert f"{len(names)} records, {len(names)} problems in {len(names)} records" in said
    assert held < 300
    status, said, held = measured("check", source, "--dataset_dir", traps)
    assert status == 1
    assert f"problems in {len(names)} records" in said
    assert "path_escapes 4" in said
    assert held < 300


# Files that are none, and disks that are full


def test_things_that_are_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "loop.json").symlink_to("loop.json")
    for source in (tmp_path, tmp_path / "none.json", Path("/dev/zero"), Path("/dev/null"), tmp_path / "loop.json"):
        for arguments in (("check", source), ("convert", source, tmp_path / "o.json")):
            status, said = run(capsys, *arguments)
            assert status == 2
            assert source.name in said
    assert [path.name for path in tmp_path.iterdir()] == ["loop.json"]


@pytest.mark.parametrize("by", ["the same", "link", "hard link"])
def test_the_output_is_the_input(by: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "s.json", tmp_path / "o.json"
    source.write_bytes(b"[" + GOOD + b"]")
    if by == "the same":
        target = source
    elif by == "link":
        target.symlink_to("s.json")
    else:
        target.hardlink_to(source)
    status, said = run(capsys, "convert", source, target)
    assert status == 2
    assert "exists already" in said
    assert source.read_bytes() == b"[" + GOOD + b"]"
    status, said = run(capsys, "convert", source, target, "--overwrite")  # the input was read to its end before
    assert status == 0
    assert json.loads(target.read_bytes())[0]["messages"][1] == {"role": "assistant", "content": "a"}
    if by != "the same":
        assert source.read_bytes() == b"[" + GOOD + b"]"


@pytest.mark.parametrize("more", [[], ["--shuffle"], ["--workers", "1"]])
def test_a_full_disk(more: list[str], tmp_path: Path) -> None:
    source, target = tmp_path / "s.json.gz", tmp_path / "o.json"
    source.write_bytes(gzip.compress(b"[" + b",".join([GOOD] * 40_000) + b"]"))
    status, said, _ = measured("convert", source, target, *more, limit=MEGABYTE)
    assert status == 2
    assert "too large" in said  # what the system says of RLIMIT_FSIZE
    assert [path for path in tmp_path.iterdir() if path.name[0] != "."] == [source]


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "s.json").write_bytes(b"[" + GOOD + b"]")
    for target in (Path("/proc/o.json"), tmp_path / "none" / "o.json", tmp_path / "s.json" / "o.json", tmp_path):
        status, said = run(capsys, "convert", tmp_path / "s.json", target)
        assert status == 2
        assert "error: " in said


@pytest.mark.parametrize(
    "wrong",
    [
        ["--val_ratio", "nan"],
        ["--val_ratio", "1"],
        ["--max_samples", "0"],
        ["--max_bad_ratio", "2"],
        ["--seed", "9" * 40],
    ],
)
def test_numbers_out_of_range(wrong: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "s.json").write_bytes(b"[" + GOOD + b"]")
    try:
        status, said = run(capsys, "convert", tmp_path / "s.json", tmp_path / "o.json", *wrong)
    except SystemExit as stop:
        status, said = int(stop.code or 0), capsys.readouterr().err
    assert status == 2
    assert wrong[0].removeprefix("--") in said


def test_names_that_are_not_unicode(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"\xff")
    folder.mkdir()
    source, target = folder / os.fsdecode(b"\xfe.json"), folder / os.fsdecode(b"\xfd.json")
    source.write_bytes(b"[" + GOOD + b",5]")
    assert measured("convert", source, target, "--on_bad", "skip", "--shuffle")[0] == 0
    assert len(json.loads(target.read_bytes())) == 1
    assert measured("check", source)[0] == 1


def test_the_input_changes_before_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "s.jsonl", tmp_path / "o.jsonl"
    source.write_bytes((GOOD + b"\n") * 9000)
    monkeypatch.setattr(conversion, "CHECKPOINT_SECONDS", 0)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(conversion._Job, "_accept", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(source, target)
    assert not target.exists()
    source.write_bytes((GOOD.replace(b'"a"', b'"b"') + b"\n") * 9000)
    with pytest.raises(ResumeError, match="sources changed"):
        convert(source, target, resume=True)
    assert convert(source, target).written == 9000
