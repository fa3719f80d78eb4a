"""Make a video; the options have the names and defaults of Wan2.1's ``generate.py``."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan_infer.commands import cache_options, parallel_options
from wan_infer.errors import RequestError
from wan_infer.tasks import TASKS, Size, Task, check_frames, check_pixels, check_task

if TYPE_CHECKING:
    import torch

    from wan_infer.config import TransformerConfig
    from wan_infer.denoise import OnStep
    from wan_infer.generation import Generation
    from wan_infer.pipeline import WanPipeline
    from wan_infer.processes import OneProcess
    from wan_infer.vae_tiling import Tiling

_MINI = "t2v-mini"
_LARGE: Size = (1280, 720)
_SLOWEST, _FASTEST = 0.1, 1000  # frames a second; an .mp4 file has its limits
_SIZE_HELP = (
    "width*height; i2v and flf2v take its area and the image's aspect (default: 1280*720, or 832*480 for a task that "
    "does not offer it)"
)
_SHEET_FRAMES, _SHEET_COLUMNS, _SHEET_PIXELS = 20, 5, 2048  # pixels of the longer side
# What the sidecar says of the options besides the settings of the pipeline, where it was given.
_INPUTS = ("image", "first_frame", "last_frame", "src_video", "src_mask", "src_ref_images")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    what = parser.add_argument_group("what to make")
    what.add_argument("--prompt", help="what the video shows; an example of the task without it")
    what.add_argument("--prompt_file", type=Path, help="a text file with a prompt a line; makes a video for each")
    what.add_argument("--negative_prompt", help="what to avoid; the published one of the model without it")
    what.add_argument("--image", type=Path, help="the first frame (i2v)")
    what.add_argument("--first_frame", type=Path, help="the first frame (flf2v)")
    what.add_argument("--last_frame", type=Path, help="the last frame (flf2v)")
    what.add_argument("--src_video", type=Path, help="the video to edit, scaled and cut to --size (vace)")
    what.add_argument("--src_mask", type=Path, help="a video or image that is white where it may be edited (vace)")
    what.add_argument("--src_ref_images", help="images of what shall appear, separated by commas (vace)")
    what.add_argument("--size", type=_size, help=_SIZE_HELP)
    what.add_argument("--frame_num", type=int, help="frames, 4n+1 (default: 81, t2i: 1, mini: 17)")
    what.add_argument("--base_seed", type=int, default=-1, help="of the noise; negative for a random one (default: -1)")

    how = parser.add_argument_group("how to sample")
    how.add_argument("--sample_solver", choices=("unipc", "dpm++", "euler"), default="unipc", help="default: unipc")
    how.add_argument("--sample_steps", type=int, help="steps (default: 50, i2v: 40)")
    how.add_argument(
        "--sample_shift", type=float, help="of the noise levels (default: 5; i2v 480p: 3; flf2v, vace: 16)"
    )
    how.add_argument("--sample_guide_scale", type=float, default=5.0, help="of the guidance (default: 5)")
    how.add_argument("--sigma_grid", choices=("official", "diffusers"), default="official", help="default: official")

    model = parser.add_argument_group("the model and where it runs")
    model.add_argument("--task", choices=tuple(TASKS), help="default: t2v-14B with --ckpt_dir, else t2v-mini")
    model.add_argument("--ckpt_dir", type=Path, help="a checkpoint folder, original or diffusers layout")
    model.add_argument("--device", help="cpu, cuda, npu, … (default: the accelerator of this machine, or else cpu)")
    model.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16, on the cpu float32")
    model.add_argument("--t5_cpu", action="store_true", help="run the text encoder on the cpu")
    model.add_argument(
        "--offload_model", type=_bool, help="drop each part when its stage is over (default: true for a single video)"
    )
    model.add_argument(
        "--vae_tiling", action="store_true", help="decode large frames tile by tile: less memory, nearly the same video"
    )
    model.add_argument("--embedding_cache", type=Path, help="a folder to keep the embeddings of prompts in")

    cache_options.add_arguments(parser)
    parallel_options.add_arguments(parser)

    out = parser.add_argument_group("the result")
    out.add_argument("--save_file", type=Path, help="an .mp4, or a .png for one frame; a name is made up without it")
    out.add_argument("--contact_sheet", action="store_true", help="write FILE.png as well, an overview of the frames")
    out.add_argument("--fps", type=float, default=16.0, help="frames a second (default: 16)")
    out.add_argument("--overwrite", action="store_true", help="replace files that exist")
    out.add_argument("--json", action="store_true", help="print what was made as JSON")


@dataclass(frozen=True)
class Job:
    """One video to make."""

    prompt: str
    seed: int | None
    file: Path


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Make the videos, and return a record of each."""
    from wan_infer.processes import joined

    task = _task(options)
    parallel_options.check(options)
    with joined(_device(options.device)) as processes:
        arguments, jobs = processes.once(lambda: _planned(task, options))
        if options.ckpt_dir is None:
            other = "" if options.task in (None, _MINI) else f", with its own settings and not those of {options.task}"
            sys.stderr.write(
                f"no --ckpt_dir: this is wan-mini{other}, which knows handwritten digits that move and nothing else\n"
            )
        with _explained_lack_of_memory():
            return _make(task, options, jobs, arguments, processes)


def _task(options: argparse.Namespace) -> Task:
    task = TASKS[options.task or ("t2v-14B" if options.ckpt_dir else _MINI)]
    if options.ckpt_dir is not None:
        return task
    if task.model_type != "t2v" or task.frames == 1:
        raise RequestError(
            f"--task {task.name} needs --ckpt_dir, the folder of its checkpoint; without one there is wan-mini, "
            "which makes videos from text"
        )
    return TASKS[_MINI]


def _planned(task: Task, options: argparse.Namespace) -> tuple[dict[str, Any], list[Job]]:
    """Return what all videos have in common, and what is to be made, once all that is cheap to check is checked."""
    arguments = {**_settings(task, options), **_sources(task, options)}
    cache_options.check(options)
    return arguments, _jobs(task, options, arguments["size"], arguments["frames"])


def _settings(task: Task, options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that all videos have in common; what a task restricts is checked here."""
    size = options.size or (_LARGE if _LARGE in task.sizes else task.size)
    frames = task.frames if options.frame_num is None else options.frame_num
    check_pixels(size)
    task.check_size(size)
    check_frames(frames)
    if task.name == "t2i-14B" and frames != 1:
        raise RequestError(f"--frame_num is {frames}; t2i-14B makes 1 frame")
    if not _SLOWEST <= options.fps <= _FASTEST:
        raise RequestError(f"--fps is {options.fps}; it has to be between {_SLOWEST} and {_FASTEST}")
    return {
        "negative_prompt": options.negative_prompt,
        "size": size,
        "frames": frames,
        "steps": task.steps if options.sample_steps is None else options.sample_steps,
        "guidance": options.sample_guide_scale,
        "shift": task.shift(size) if options.sample_shift is None else options.sample_shift,
        "solver": options.sample_solver,
        "sigma_grid": options.sigma_grid,
    }


def _sources(task: Task, options: argparse.Namespace) -> dict[str, Any]:
    """Return the images and videos by the names of the pipeline, which reads them."""
    if options.image and options.first_frame:
        raise RequestError("--image and --first_frame are the same thing; give one")
    first = options.image or options.first_frame
    if task.model_type == "i2v" and not first:
        raise RequestError(f"{task.name} needs the first frame: --image FILE")
    if task.model_type == "flf2v" and not (first and options.last_frame):
        raise RequestError(f"{task.name} needs two images: --first_frame FILE --last_frame FILE")
    references = (options.src_ref_images or "").split(",")
    return {
        "image": first,
        "last_image": options.last_frame,
        "src_video": options.src_video,
        "src_mask": options.src_mask,
        "src_ref_images": [Path(name.strip()) for name in references if name.strip()],
    }


def _jobs(task: Task, options: argparse.Namespace, size: Size, frames: int) -> list[Job]:
    """Return what is to be made, once it is sure that every file can be written."""
    from wan_infer.output import PartialFile
    from wan_infer.video import VideoWriter

    prompts = _prompts(task, options)
    suffix = ".png" if frames == 1 else ".mp4"
    jobs = []
    for index, prompt in enumerate(prompts):
        file = options.save_file or Path(_made_up_name(task, size, prompt) + suffix)
        if len(prompts) > 1:
            file = file.with_stem(f"{file.stem}-{index + 1:0{len(str(len(prompts)))}}")
        if file.suffix == ".png" and frames != 1:
            raise RequestError(f"--save_file is {file}; {frames} frames are written to a file that ends in .mp4")
        VideoWriter(file, fps=options.fps, overwrite=options.overwrite)  # refuses now what it would refuse at the end
        beside = [_sidecar(file), *([_sheet(file)] if options.contact_sheet else [])]
        for target in (file, *beside):
            PartialFile(target, overwrite=options.overwrite).discard()
        jobs.append(Job(prompt, None if options.base_seed < 0 else options.base_seed + index, file))
    return jobs


def _prompts(task: Task, options: argparse.Namespace) -> list[str]:
    if options.prompt_file is None:
        return [task.example_prompt if options.prompt is None else options.prompt]
    if options.prompt is not None:
        raise RequestError("both --prompt and --prompt_file were given; give one of them")
    try:
        lines = options.prompt_file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise RequestError(f"{options.prompt_file} is not UTF-8 text: {error}; save it as UTF-8") from error
    if not (prompts := [line.strip() for line in lines if line.strip()]):
        raise RequestError(f"{options.prompt_file} holds no prompt; write one a line")
    return prompts


def _made_up_name(task: Task, size: Size, prompt: str) -> str:
    words = re.sub(r"[^\w.-]+", "_", prompt)[:50].strip("_.")
    return f"{task.name}_{size[0]}x{size[1]}_{words}_{datetime.now():%Y%m%d_%H%M%S}"


def _make(
    task: Task, options: argparse.Namespace, jobs: Sequence[Job], arguments: dict[str, Any], processes: OneProcess
) -> list[dict[str, Any]]:
    offload = len(jobs) == 1 if options.offload_model is None else options.offload_model
    pipe = _pipeline(task, options, arguments, processes, offload=offload)
    arguments = {**arguments, **cache_options.arguments(options, pipe, arguments["steps"])}
    records = []
    for job in jobs:
        with cache_options.notes(), _progress(arguments["steps"], "step", job.prompt) as show:
            made = pipe(job.prompt, seed=job.seed, on_step=_shown_by(show), **arguments)
        records.append(processes.once(partial(_written, job, made, options, task, pipe)))
    return records


def _written(job: Job, made: Generation, options: argparse.Namespace, task: Task, pipe: WanPipeline) -> dict[str, Any]:
    """Write a video and what belongs beside it, and return its record."""
    tiling = _tiling() if options.vae_tiling else None
    with _progress(made.settings.frames, "frame", "decoding") as show:
        made.save(job.file, fps=options.fps, overwrite=options.overwrite, tiling=tiling, on_frames=show)
    if options.contact_sheet:
        _write_sheet(job.file, made.settings.frames, overwrite=options.overwrite)
    return _record(job, made, options, task, pipe)


def _tiling() -> Tiling:
    from wan_infer.vae_tiling import Tiling

    return Tiling()


def _sidecar(file: Path) -> Path:
    return Path(f"{file}.json")


def _sheet(file: Path) -> Path:
    return Path(f"{file}.png")


def _write_sheet(file: Path, frames: int, *, overwrite: bool) -> None:
    """Write an overview of a video beside it: up to 20 frames, evenly from all."""
    from wan_infer.output import PartialFile, write_errors
    from wan_infer.video import contact_sheet, read_frames

    sheet = contact_sheet(read_frames(file, every=-(-frames // _SHEET_FRAMES)), columns=_SHEET_COLUMNS)
    sheet.thumbnail((_SHEET_PIXELS, _SHEET_PIXELS))
    partial = PartialFile(_sheet(file), overwrite=overwrite)
    try:
        with write_errors(_sheet(file)):
            sheet.save(partial.path, format="png")
        partial.complete()
    finally:
        partial.discard()


def _pipeline(
    task: Task, options: argparse.Namespace, arguments: dict[str, Any], processes: OneProcess, *, offload: bool
) -> WanPipeline:
    import torch

    from wan_infer.checkpoints.loading import open_checkpoint
    from wan_infer.mini import wan_mini
    from wan_infer.pipeline import WanPipeline, default_dtype

    folder = options.ckpt_dir or wan_mini()
    dtype = getattr(torch, options.dtype) if options.dtype else default_dtype(processes.device)

    def config() -> TransformerConfig:
        found = open_checkpoint(folder).config
        check_task(task, found)
        return found

    return WanPipeline.from_pretrained(
        folder,
        device=processes.device,
        dtype=dtype,
        text_device="cpu" if options.t5_cpu else None,
        embedding_cache=options.embedding_cache,
        task=task,
        offload=offload,
        parallel=parallel_options.parallel(options, processes.once(config), processes, arguments, dtype),
    )


def _record(job: Job, made: Generation, options: argparse.Namespace, task: Task, pipe: WanPipeline) -> dict[str, Any]:
    """Write what a video was made from beside it, and return that."""
    from wan_infer.pipeline import default_dtype
    from wan_infer.sidecar import versions, write_sidecar

    inputs = {name: getattr(options, name) for name in _INPUTS}
    record = {
        "file": str(job.file),
        "task": task.name,
        "ckpt_dir": None if options.ckpt_dir is None else str(options.ckpt_dir),
        "prompt": job.prompt,
        "negative_prompt": task.negative_prompt if options.negative_prompt is None else options.negative_prompt,
        **{name: str(value) for name, value in inputs.items() if value is not None},
        **asdict(made.settings),
        "fps": options.fps,
        "vae_tiling": options.vae_tiling,
        "parallel": pipe.parallel.layout,
        "cache": cache_options.described(options),
        "computed": round(made.computed, 4),
        "dtype": options.dtype or str(default_dtype(pipe.device)).removeprefix("torch."),
        "versions": versions(pipe.device),
        "seconds": {stage: round(seconds, 3) for stage, seconds in made.timings.items()},
        "peak_memory_bytes": made.peak_memory,
    }
    write_sidecar(job.file, record, overwrite=options.overwrite)
    seconds = sum(made.timings.values())
    sys.stderr.write(f"{job.file}: seed {made.settings.seed}, {seconds:.1f} s\n")
    return record


@contextmanager
def _progress(total: int, unit: str, title: str) -> Iterator[Callable[[int], None]]:
    """A bar with the time that is left, where somebody watches; yields what takes how much is done."""
    from tqdm import tqdm

    with tqdm(total=total, desc=title[:40], unit=unit, disable=None, leave=False) as bar:

        def show(done: int) -> None:
            bar.update(done - bar.n)

        yield show


def _shown_by(show: Callable[[int], None]) -> OnStep:
    return lambda step: show(step.index)


@contextmanager
def _explained_lack_of_memory() -> Iterator[None]:
    import torch

    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # The allocator of the CPU has no class of its own for it.
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        reason = str(error).partition("\n")[0]
        raise RequestError(
            f"there is too little memory: {reason}; try a smaller --size, fewer frames, --t5_cpu, --dtype bfloat16 "
            "or --offload_model true"
        ) from error


def _device(name: str | None) -> torch.device:
    import torch

    from wan_infer.pipeline import default_device

    if name is None:
        return default_device()
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ModuleNotFoundError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise RequestError(f"--device {name} cannot be used here: {reason}; cpu always can") from error
    return device


def _size(text: str) -> Size:
    found = re.fullmatch(r"(\d+)[*x](\d+)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write width*height, for example 832*480")
    return int(found[1]), int(found[2])


def _bool(text: str) -> bool:
    words = {"true": True, "t": True, "yes": True, "y": True, "1": True}
    words |= {"false": False, "f": False, "no": False, "n": False, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return words[text.lower()]
