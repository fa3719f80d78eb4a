"""What the command refuses, and what is left when it is interrupted or the disk is full: nothing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_wan
import torch
from commanding import QUICK, VIDEO, fails, left
from full_disk import full_disk

from wan_infer.cli import main
from wan_infer.commands import generate
from wan_infer.mini import wan_mini

pytestmark = pytest.mark.usefixtures("folder")  # each test works in an empty one

CKPT = ["--ckpt_dir", "absent"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--frame_num", "6"], "the number of frames is 6; it has to be 4n+1, for example 5 or 9"),
        (["--size", "60*64"], "width and height have to be multiples of 16, for example 64*64"),
        (["--size", "832*480"], "size 832*480 is not offered for t2v-mini; offered: 64*64"),
        (["--task", "t2v-1.3B", *CKPT, "--size", "1280*720"], "not offered for t2v-1.3B; offered: 480*832, 832*480"),
        (["--task", "t2i-14B"], "--task t2i-14B needs --ckpt_dir, the folder of its checkpoint; without one there is"),
        (["--task", "vace-1.3B"], "--task vace-1.3B needs --ckpt_dir"),
        (["--task", "t2i-14B", *CKPT, "--frame_num", "5"], "--frame_num is 5; t2i-14B makes 1 frame"),
        (["--sample_steps", "0"], "steps is 0; it has to be a whole number from 1 on"),
        (["--sample_shift", "-1"], "shift is -1.0; it has to be a number above 0"),
        (["--sample_guide_scale", "nan"], "guidance is nan; it has to be a finite number"),
        (["--fps", "0"], "--fps is 0.0; it has to be between 0.1 and 1000"),
        (["--fps", "1e12"], "--fps is 1000000000000.0; it has to be between"),
        (["--fps", "nan"], "--fps is nan; it has to be between"),
        (["--base_seed", str(2**64)], f"seed is {2**64}; it has to be at least 0 and less than 2**64"),
        (["--device", "abacus"], "--device abacus cannot be used here: "),
        (["--device", "meta:x"], "--device meta:x cannot be used here: "),
        (["--image", "x.png"], "of the type t2v has no use for image; it takes no image and no video"),
        (["--src_video", "x.mp4"], "of the type t2v has no use for src_video"),
        (["--image", "a", "--first_frame", "b"], "--image and --first_frame are the same thing; give one"),
        (["--task", "i2v-14B", *CKPT], "i2v-14B needs the first frame: --image FILE"),
        (
            ["--task", "flf2v-14B", *CKPT, "--first_frame", "a"],
            "needs two images: --first_frame FILE --last_frame FILE",
        ),
        (CKPT, "absent is no folder: expected is a Wan2.1 checkpoint, either original"),
        (["--ckpt_dir", "."], ". is no checkpoint folder: expected is"),
        (["--save_file", "out.gif"], "out.gif: a video ends in .mp4, a single frame in .mp4 or .png"),
        (["--save_file", "out.png"], "out.png; 5 frames are written to a file that ends in .mp4"),
        (["--save_file", "no/out.mp4"], "the folder no does not exist; create it first"),
        (["--save_file", "/proc/out.mp4"], "cannot write /proc/out.mp4: No such file or directory; nothing was left"),
        (["--save_file", "a" * 250 + ".mp4"], "File name too long"),
        (["--prompt_file", "p.txt"], "both --prompt and --prompt_file were given; give one of them"),
    ],
)
def test_refusals(argv: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in fails(capsys, *VIDEO, *argv)
    assert left(folder) == []


@pytest.mark.parametrize("existing", ["out.mp4", "out.mp4.json"])
def test_an_existing_target_is_refused_before_anything_is_loaded(
    existing: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(existing).write_text("precious")
    monkeypatch.setattr(generate, "_make", lambda *args: pytest.fail("it was about to load a model"))
    assert f"{existing} exists already; name another output" in fails(capsys, *VIDEO)
    assert left(folder) == [existing]
    assert Path(existing).read_text() == "precious"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory: 'p.txt'"),
        (b"\n \n", "p.txt holds no prompt; write one a line"),
        (b"\xff\xfea\x00", "p.txt is not UTF-8 text"),
    ],
)
def test_prompt_files(content: bytes | None, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if content is not None:
        Path("p.txt").write_bytes(content)
    assert message in fails(capsys, "--prompt_file", "p.txt", "--save_file", "out.mp4")


def test_one_existing_target_of_several_stops_all(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("p.txt").write_text("a\nb\n")
    Path("out-2.mp4").write_text("precious")
    assert "out-2.mp4 exists already" in fails(capsys, *VIDEO[2:], "--prompt_file", "p.txt")
    assert left(folder) == ["out-2.mp4", "p.txt"]


def test_one_process_of_torchrun_is_fine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert main(VIDEO) == 0


def test_an_incomplete_checkpoint_names_all_that_is_missing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny_wan.original(folder / "ckpt", "i2v")
    for name in (tiny_wan.T5, tiny_wan.CLIP):
        (path / name).unlink()
    shutil.rmtree(path / "google")
    message = fails(capsys, *VIDEO, "--task", "i2v-14B", "--ckpt_dir", "ckpt", "--image", "a.png", "--size", "832*480")
    assert "ckpt is an incomplete checkpoint (original layout); copy the whole of it. Missing: " in message
    for name in (tiny_wan.T5, tiny_wan.CLIP, "google/umt5-xxl/tokenizer.json"):
        assert name in message


def test_a_damaged_checkpoint_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(wan_mini(), "mine")
    weights = Path("mine/transformer/diffusion_pytorch_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert str(weights) in fails(capsys, *VIDEO, "--ckpt_dir", "mine", "--task", "t2v-mini")
    assert left(folder) == ["mine"]


@pytest.mark.usefixtures("small_sizes")
def test_a_checkpoint_of_another_task(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_wan.original(folder / "ckpt", "vace")
    message = fails(capsys, *VIDEO, "--ckpt_dir", "ckpt")
    assert message == "--task is t2v-14B, but this checkpoint's transformer is of the type vace"


@pytest.mark.usefixtures("small_sizes")
@pytest.mark.parametrize("content", [None, b"no image", b"\x89PNG\r\n\x1a\n\x00\x00"])
def test_an_unreadable_image(content: bytes | None, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_wan.original(folder / "ckpt", "i2v")
    if content is not None:
        Path("image.png").write_bytes(content)
    message = fails(capsys, *VIDEO, "--task", "i2v-14B", "--ckpt_dir", "ckpt", "--image", "image.png")
    assert message.startswith("the image image.png cannot be read: ")
    assert "out.mp4" not in left(folder)


def test_nan_ends_with_the_step(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(wan_mini(), "mine")
    weights = Path("mine/transformer/diffusion_pytorch_model.safetensors")
    tensors = load_file(weights)
    tensors["proj_out.bias"] = torch.full_like(tensors["proj_out.bias"], float("nan"))
    save_file(tensors, weights)
    message = fails(capsys, *VIDEO, "--ckpt_dir", "mine", "--task", "t2v-mini", code=1)
    assert message.startswith("the latents are not finite after step 1 of 2")
    assert left(folder) == ["mine"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nmore"),
        MemoryError("no more"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"
        ),
    ],
)
def test_too_little_memory(
    error: Exception, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "_make", _raiser(error))
    message = fails(capsys, *VIDEO)
    assert message.startswith(f"there is too little memory: {str(error).splitlines()[0]}; try a smaller --size")


def test_a_defect_of_ours_shows_itself(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "_make", _raiser(RuntimeError("a defect")))
    assert main(VIDEO) == 3
    assert "Traceback" in capsys.readouterr().err


def _raiser(error: BaseException) -> Callable[..., Any]:
    def function(*args: Any, **kwargs: Any) -> Any:
        raise error

    return function


def start(argv: list[str], prelude: str = "") -> subprocess.Popen[str]:
    """The command in a process that Ctrl-C reaches, which one in the background does not let it by itself."""
    code = (
        "import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"{prelude}\nfrom wan_infer.cli import main\nsys.exit(main({argv}))"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


# Runs before the command: says when the first step is done, and stays there until Ctrl-C.
_WAITING = """
import time
import wan_infer.denoise
def waiting(*args, **kwargs):
    print("reached", flush=True)
    time.sleep(60)
wan_infer.denoise.guide = waiting
"""


def test_ctrl_c_while_denoising(folder: Path) -> None:
    process = start(VIDEO, _WAITING)
    assert process.stdout is not None
    assert process.stdout.readline() == "reached\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "wan-infer: interrupted; nothing that looks finished was left" in err
    assert "Traceback" not in err
    assert left(folder) == []


def test_ctrl_c_while_writing(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(frames: torch.Tensor) -> None:
        assert len(left(folder)) == 1  # a temporary file
        raise KeyboardInterrupt

    monkeypatch.setattr("wan_infer.video.to_uint8", interrupted)
    assert main(VIDEO) == 130
    assert "interrupted; nothing that looks finished was left" in capsys.readouterr().err
    assert left(folder) == []


def test_a_full_disk(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with full_disk(2000):
        message = fails(capsys, *VIDEO)
    assert message == "cannot write out.mp4: File too large; nothing was left behind"
    assert left(folder) == []


def test_the_module_is_the_command(folder: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "wan_infer", *QUICK, "--frame_num", "1", "--save_file", "out.png"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert "out.png: seed 3" in done.stderr
    assert done.stdout == ""
    assert left(folder) == ["out.png", "out.png.json"]
