"""The command as a user meets it: exit codes, streams, interruption, start-up."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import mm_datafmt
from mm_datafmt import cli

WriteFile = Callable[..., Path]

TURNS = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "7"}]
GOOD = {"id": "1", "image": "a.png", "conversations": TURNS}


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def test_convert_then_check(images: Path, write_array: WriteFile, capsys: pytest.CaptureFixture[str]) -> None:
    records = [{**GOOD, "conversations": [{**TURNS[0], "value": f"<image>\nWhat is {n}?"}, TURNS[1]]} for n in range(3)]
    source, target = write_array(records), images.parent / "train.json"
    assert run("convert", source, target, "--image_dir", images, "--dataset_dir", images.parent) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert f"{source}: format llava (detected)" in err
    assert "3 records, no problems\n  field 'id' of 3 records has no place in messages; wrote 3 to" in err
    assert run("check", target) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"'{target}' (messages): 3 records, no problems\n")
    assert "format messages (detected)" in err


def test_check_lists_problems(images: Path, write_array: WriteFile, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_array([GOOD, {**GOOD, "image": "no.png"}])
    assert run("check", source, "--dataset_dir", images, "--from", "llava") == 1
    out, err = capsys.readouterr()
    assert "2 records, 1 problem in 1 record\n  record 2 (line 1): 'no.png' is missing: no file" in out
    assert "format llava (given by --from)" in err


def test_check_as_json(images: Path, write_lines: WriteFile, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_lines([GOOD, {**GOOD, "conversations": TURNS[:1]}])
    assert run("check", source, "--dataset_dir", images, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    expected = {
        "source": str(source),
        "format": "llava",
        "records": 2,
        "bad_records": 1,
        "problem_count": 1,
        "counts": {"no_answer": 1},
        "repaired": 0,
        "written": 0,
        "validation": 0,
        "target_format": "",
        "lost": {},
        "problems": [
            {
                "record": 2,
                "line": 2,
                "code": "no_answer",
                "message": "no turn is by the assistant: nothing to learn",
                "offset": len(json.dumps(GOOD)) + 1,
                "source": "",
                "repaired": False,
            }
        ],
    }
    assert {name: found[name] for name in expected} == expected
    assert found["lengths"]["image_tokens"] == 4  # a small picture is one square of four patches: 2 x 2 tokens


def test_a_refused_conversion(images: Path, write_array: WriteFile, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_array([{**GOOD, "image": f"{number}.png"} for number in range(25)])
    before = sorted(images.parent.iterdir())
    assert run("convert", source, images.parent / "out.json", "--image_dir", images) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "error: " in err
    assert "  record 20 (line 1): '19.png' is missing" in err
    assert "record 21" not in err
    assert err.endswith("  and 5 more\n")
    assert sorted(images.parent.iterdir()) == before


@pytest.mark.parametrize("command", ["check", "convert"])
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("[{", "cut short after 0 whole records"),
        ("", "the file is empty"),
        ('{"a": nope}', "record 1 (line 1) is not valid JSON at byte 6"),
        ('[{"prompt": 1}]', "cannot tell the format"),
        (None, "No such file"),
    ],
)
def test_files_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, body: str | None, message: str
) -> None:
    source, target = tmp_path / "in.json", tmp_path / "out.json"
    if body is not None:
        source.write_text(body)
    assert run(command, source, *([target] if command == "convert" else [])) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == ([source] if body is not None else [])


def test_an_existing_output(images: Path, write_array: WriteFile, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = write_array([GOOD]), images.parent / "out.json"
    target.write_text("mine")
    assert run("convert", source, target, "--image_dir", images) == 2
    assert "add --overwrite" in capsys.readouterr().err
    assert target.read_text() == "mine"
    assert run("convert", source, target, "--image_dir", images, "--overwrite") == 0
    assert json.loads(target.read_text())[0]["images"] == ["images/a.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"), (["conver"], "invalid choice: 'conver'"), (["convert", "x"], "required: DST"),
        (["check", "x", "--from", "lava"], "invalid choice: 'lava' (choose from"), (["check", "x", "--js"], "--js"),
    ],
)  # fmt: skip
def test_usage_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_defect_of_ours_has_its_own_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("mm_datafmt.pipeline.check", fail)
    assert run("check", "x") == 3
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["convert", "check"])
def test_interruption(tmp_path: Path, images: Path, command: str) -> None:
    """The process has read a thousand records and waits for more on a pipe when it is interrupted."""
    pipe, target = tmp_path / "pipe", images.parent / "out.json"
    os.mkfifo(pipe)
    start = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "  # whatever was inherited
        "from mm_datafmt.cli import main; sys.exit(main())"
    )
    arguments = [str(pipe), *([str(target), "--image_dir"] if command == "convert" else ["--dataset_dir"]), str(images)]
    before = sorted(images.parent.iterdir())
    with (
        subprocess.Popen(
            [sys.executable, "-c", start, command, *arguments],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process,
        pipe.open("w") as stream,
    ):
        assert process.stderr is not None
        stream.write("[" + "".join(json.dumps(GOOD) + ",\n" for _ in range(1000)))
        stream.flush()
        assert "format llava" in process.stderr.readline()  # now it is in the middle of its work
        while command == "convert" and len(list(images.parent.iterdir())) == len(before):
            time.sleep(0.01)  # until the temporary file is there
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (out, err) == ("", "interrupted, nothing was written\n")
    assert sorted(images.parent.iterdir()) == before


@pytest.mark.parametrize("arguments", [["--help"], ["convert", "--help"], ["check", "--help"], ["preview", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom mm_datafmt.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "print(sorted({'PIL', 'orjson', 'tqdm', 'pyarrow', 'torch', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"
    assert "exit codes: 0 " in done.stdout


def test_python_dash_m(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mm_datafmt", "check", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Is a directory" in done.stderr


def test_the_flags_are_a_decision(capsys: pytest.CaptureFixture[str]) -> None:
    flags = {}
    for command in ("convert", "check", "preview", "stats", "head"):
        with pytest.raises(SystemExit):
            run(command, "--help")
        flags[command] = set(re.findall(r"^  (?:-h, )?(--\w+)", capsys.readouterr().out, re.MULTILINE))
    trainer = {"--seq_length", "--tokenizer", "--image_max_pixels"}
    assert flags == {
        "convert": {
            *("--help", "--image_dir", "--dataset_dir", "--from", "--to", "--media", "--shuffle", "--seed"),
            *("--max_samples", "--val_ratio", "--on_bad", "--max_bad_ratio", "--resume", "--overwrite", "--data_json"),
            *("--workers", "--boxes", "--image_max_pixels"),
        },
        "check": {
            *("--help", "--dataset_dir", "--from", "--json", "--html", "--overwrite", "--workers", "--media"),
            *("--decode", "--min_side", "--max_side", "--max_aspect", "--image_min_pixels", *trainer),
            *("--on_bad", "--bad_file", "--max_bad_ratio", "--ignore"),
        },
        "preview": {
            *("--help", "--n", "--start", "--dataset_dir", "--from", "--html", "--overwrite", *trainer),
            *("--mask_history", "--train_on_prompt"),
        },
        "stats": {"--help", "--dataset_dir", "--from", "--no_pictures", "--json"},
        "head": {"--help", "--random", "--seed", "--overwrite"},
    }


def test_the_public_names_exist() -> None:
    assert all(hasattr(mm_datafmt, name) for name in mm_datafmt.__all__)
    assert {"read", "convert", "check", "Sample", "Message", "Report", "image_token_count"} <= set(mm_datafmt.__all__)


def test_the_formats_of_the_help_are_those_there_are() -> None:
    assert sorted(cli.FORMAT_NAMES) == sorted(mm_datafmt.FORMATS)
    assert sorted(cli.WRITTEN_FORMATS) == sorted(name for name in mm_datafmt.FORMATS if not name.startswith("coco"))
