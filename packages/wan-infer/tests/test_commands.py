"""The command as a user meets it: what it makes, and what it says of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_wan
import torch
from commanding import PROMPT, QUICK, VIDEO, fails, left
from PIL import Image

from wan_infer.cli import main
from wan_infer.commands import generate
from wan_infer.mini import wan_mini
from wan_infer.pipeline import WanPipeline
from wan_infer.tasks import TASKS
from wan_infer.video import read_frames

pytestmark = pytest.mark.usefixtures("folder")  # each test works in an empty one


def test_a_video_and_its_record(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(VIDEO) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "no --ckpt_dir: this is wan-mini" in captured.err
    assert "out.mp4: seed 3, " in captured.err
    assert left(folder) == ["out.mp4", "out.mp4.json"]
    assert read_frames(folder / "out.mp4").shape == (3, 5, 64, 64)
    record = json.loads((folder / "out.mp4.json").read_text(encoding="utf-8"))
    versions, seconds, memory = (record.pop(name) for name in ("versions", "seconds", "peak_memory_bytes"))
    assert record == {
        "file": "out.mp4",
        "task": "t2v-mini",
        "ckpt_dir": None,
        "prompt": PROMPT,
        "negative_prompt": TASKS["t2v-mini"].negative_prompt,
        "size": [64, 64],
        "frames": 5,
        "steps": 2,
        "guidance": 5.0,
        "shift": 5.0,
        "solver": "unipc",
        "sigma_grid": "official",
        "seed": 3,
        "fps": 16.0,
        "vae_tiling": False,
        "parallel": {"cfg": 1, "ulysses": 1, "ring": 1},
        "cache": None,
        "computed": 1.0,
        "dtype": "float32",
    }
    assert versions.keys() == {"wan-infer", "torch", "python", "device"}
    assert seconds.keys() == {"text", "image", "load transformer", "denoise", "load vae", "decode"}
    assert memory > 10_000_000


def test_a_seed_gives_the_same_bytes(folder: Path) -> None:
    assert main(VIDEO) == 0
    assert main([*VIDEO[:-1], "again.mp4"]) == 0
    assert main([*VIDEO[:-1], "other.mp4", "--base_seed", "4"]) == 0
    first, again, other = ((folder / name).read_bytes() for name in ("out.mp4", "again.mp4", "other.mp4"))
    assert first == again != other


def test_the_options_reach_the_video(folder: Path) -> None:
    options = "--negative_prompt|nothing|--sample_solver|dpm++|--sample_shift|3|--sample_guide_scale|2|--fps|8|--dtype|"
    assert main([*VIDEO, *f"{options}bfloat16|--sigma_grid|diffusers|--t5_cpu".split("|")]) == 0
    record = json.loads((folder / "out.mp4.json").read_text())
    named = ("negative_prompt", "solver", "shift", "guidance", "fps", "dtype", "sigma_grid")
    assert [record[name] for name in named] == ["nothing", "dpm++", 3.0, 2.0, 8.0, "bfloat16", "diffusers"]
    pipe = WanPipeline.from_pretrained(wan_mini(), device="cpu", dtype=torch.bfloat16)
    made = pipe(
        PROMPT,
        negative_prompt="nothing",
        frames=5,
        steps=2,
        seed=3,
        solver="dpm++",
        shift=3,
        guidance=2,
        sigma_grid="diffusers",
    )
    made.save("expected.mp4", fps=8)
    assert (folder / "expected.mp4").read_bytes() == (folder / "out.mp4").read_bytes()


def test_one_frame_is_a_png_with_a_name_made_up(folder: Path) -> None:
    assert main([*QUICK, "--frame_num", "1"]) == 0
    image, record = left(folder)
    assert image.startswith("t2v-mini_64x64_the_digit_7_moves_up_2")
    assert image.endswith(".png")
    assert record == f"{image}.json"
    with Image.open(folder / image) as picture:
        assert picture.size == (64, 64)


def test_a_random_seed_is_recorded(folder: Path) -> None:
    assert main([*VIDEO, "--base_seed", "-1"]) == 0
    seed = json.loads((folder / "out.mp4.json").read_text())["seed"]
    assert main([*VIDEO[:-1], "again.mp4", "--base_seed", str(seed)]) == 0
    assert (folder / "out.mp4").read_bytes() == (folder / "again.mp4").read_bytes()


def test_json_is_all_that_stdout_gets(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*VIDEO, "--json"]) == 0
    (printed,) = json.loads(capsys.readouterr().out)
    assert printed == json.loads((folder / "out.mp4.json").read_text(encoding="utf-8"))


def test_a_file_of_prompts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("prompts.txt").write_text(f"\ufeff{PROMPT}\n\n  the digit 3 moves left \n", encoding="utf-8")
    arguments = [*VIDEO[2:], "--prompt_file", "prompts.txt", "--json"]
    assert main(arguments) == 0
    records = json.loads(capsys.readouterr().out)
    assert [record["prompt"] for record in records] == [PROMPT, "the digit 3 moves left"]
    assert [record["seed"] for record in records] == [3, 4]
    assert [record["file"] for record in records] == ["out-1.mp4", "out-2.mp4"]
    assert left(folder) == ["out-1.mp4", "out-1.mp4.json", "out-2.mp4", "out-2.mp4.json", "prompts.txt"]
    assert main(VIDEO) == 0
    assert Path("out.mp4").read_bytes() == Path("out-1.mp4").read_bytes()


def test_overwrite(folder: Path) -> None:
    for name in ("out.mp4", "out.mp4.json"):
        Path(name).write_text("old")
    assert main([*VIDEO, "--overwrite"]) == 0
    assert read_frames("out.mp4").shape[1] == 5
    assert json.loads(Path("out.mp4.json").read_text())["seed"] == 3


def test_a_contact_sheet_beside_the_video(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*VIDEO, "--contact_sheet"]) == 0
    assert left(folder) == ["out.mp4", "out.mp4.json", "out.mp4.png"]
    with Image.open("out.mp4.png") as sheet:
        assert sheet.size == (5 * 64 + 4 * 2, 64), "five frames side by side"
    Path("out.mp4").unlink()
    Path("out.mp4.json").unlink()
    capsys.readouterr()
    assert "out.mp4.png exists" in fails(capsys, *VIDEO, "--contact_sheet")


@pytest.mark.parametrize(
    ("extra", "prompts", "expected"),
    [([], 1, True), ([], 2, False), (["--offload_model", "true"], 2, True), (["--offload_model", "no"], 1, False)],
)
def test_offloading(extra: list[str], prompts: int, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def pipeline(*_: Any, offload: bool) -> Any:
        seen.append(offload)
        raise OSError("enough")

    monkeypatch.setattr(generate, "_pipeline", pipeline)
    Path("prompts.txt").write_text("a\n" * prompts)
    assert main(["--prompt_file", "prompts.txt", *extra]) == 2
    assert seen == [expected]


def test_the_example_of_a_task(folder: Path) -> None:
    assert main([*VIDEO[2:]]) == 0
    assert json.loads(Path("out.mp4.json").read_text())["prompt"] == TASKS["t2v-mini"].example_prompt


def test_a_copy_of_the_mini_model_is_taken_by_name(folder: Path) -> None:
    shutil.copytree(wan_mini(), "mine")
    assert main([*VIDEO, "--ckpt_dir", "mine", "--task", "t2v-mini"]) == 0
    assert json.loads(Path("out.mp4.json").read_text())["ckpt_dir"] == "mine"


# ---- images and videos ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_sizes")
def test_images_to_video(folder: Path) -> None:
    tiny_wan.original(folder / "i2v", "i2v")
    tiny_wan.original(folder / "flf2v", "flf2v")
    Image.new("RGB", (40, 80), "red").save("first.png")
    Image.new("RGB", (50, 50), "blue").save("last.jpg")
    common = ["--prompt", "a", "--sample_steps", "1", "--frame_num", "5", "--device", "cpu", "--base_seed", "1"]
    i2v = [*common, "--task", "i2v-14B", "--ckpt_dir", "i2v", "--image", "first.png", "--save_file", "i2v.mp4"]
    assert main(i2v) == 0
    record = json.loads(Path("i2v.mp4.json").read_text())
    assert (record["image"], record["size"], record["shift"]) == ("first.png", [32, 80], 3.0)
    assert read_frames("i2v.mp4").shape == (3, 5, 80, 32)
    flf2v = ["--task", "flf2v-14B", "--ckpt_dir", "flf2v", "--first_frame", "first.png", "--last_frame", "last.jpg"]
    assert main([*common, *flf2v, "--save_file", "flf2v.mp4"]) == 0
    record = json.loads(Path("flf2v.mp4.json").read_text())
    assert (record["first_frame"], record["last_frame"], record["shift"]) == ("first.png", "last.jpg", 16.0)


def test_what_vace_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    class Pipe:
        def __call__(self, prompt: str, **arguments: Any) -> Any:
            given.update(arguments)
            raise OSError("enough")

    monkeypatch.setattr(generate, "_pipeline", lambda *args, **kwargs: Pipe())
    paths = ["--src_video", "a.mp4", "--src_mask", "b.png", "--src_ref_images", "c.png, d.jpg,"]
    assert main(["--task", "vace-1.3B", "--ckpt_dir", "x", "--prompt", "a", *paths]) == 2
    assert (given["src_video"], given["src_mask"]) == (Path("a.mp4"), Path("b.png"))
    assert given["src_ref_images"] == [Path("c.png"), Path("d.jpg")]
    assert given["size"] == (832, 480)


def test_convert(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_wan.original(folder / "a")
    assert main(["convert", "a", "b", "--to", "diffusers", "--json"]) == 0
    captured = capsys.readouterr()
    record = json.loads(captured.out)
    assert (record["target"], record["layout"]) == ("b", "diffusers")
    assert record["tensors"] > 100
    assert "b: " in captured.err
    assert "b" in fails(capsys, "convert", "a", "b", "--to", "diffusers")
    assert "no folder" in fails(capsys, "convert", "absent", "c", "--to", "diffusers")
    assert left(folder) == ["a", "b"]
