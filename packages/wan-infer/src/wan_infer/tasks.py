"""The tasks of Wan2.1: which transformer, which sizes, and the settings that are used when none are given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from wan_infer.config import TRANSFORMERS, ModelType, TransformerConfig
from wan_infer.errors import RequestError

Size = tuple[int, int]  # width, height

PIXELS = 16  # width and height are multiples of it: 8 of the VAE times 2 of a patch
_480P = 832 * 480

_VIDEO_SIZES: tuple[Size, ...] = ((720, 1280), (1280, 720), (480, 832), (832, 480))
_SMALL_SIZES: tuple[Size, ...] = ((480, 832), (832, 480))

# Part of the published configuration: the models were tuned with it as the unconditional side of the guidance.
_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，"
    "残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，"
    "三条腿，背景人很多，倒着走"
)
_NEGATIVE_PROMPTS: Mapping[ModelType, str] = MappingProxyType(
    {
        "t2v": _NEGATIVE_PROMPT,
        "i2v": f"镜头晃动，{_NEGATIVE_PROMPT}",
        "flf2v": f"镜头切换，镜头晃动，{_NEGATIVE_PROMPT}",
        "vace": _NEGATIVE_PROMPT,
    }
)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a model is used for.

    Attributes:
        name: as ``--task`` spells it.
        model_type: what the transformer is conditioned on besides text.
        sizes: (width, height) that the command offers; empty for any multiple of 16.
        size: the one taken when none is given to the pipeline.
        frames, steps, guidance: taken when none are given.
        example_prompt: taken when the command is given none.
    """

    name: str
    model_type: ModelType
    sizes: tuple[Size, ...] = _VIDEO_SIZES
    size: Size = (832, 480)
    frames: int = 81
    steps: int = 50
    guidance: float = 5.0
    example_prompt: str = "A grey cat in a yellow raincoat walks along a pier at sunrise, gulls fly over the water."

    @property
    def negative_prompt(self) -> str:
        """The published negative prompt of this kind of model."""
        return _NEGATIVE_PROMPTS[self.model_type]

    def shift(self, size: Size) -> float:
        """Return the shift of the noise levels that is used at a size."""
        if self.model_type in ("flf2v", "vace"):
            return 16.0
        return 3.0 if self.model_type == "i2v" and size[0] * size[1] <= _480P else 5.0

    def check_size(self, size: Size) -> None:
        """Refuse a size that the command does not offer for this task.

        Raises:
            RequestError: names the sizes that it does.
        """
        if self.sizes and size not in self.sizes:
            offered = ", ".join(f"{width}*{height}" for width, height in self.sizes)
            raise RequestError(f"size {size[0]}*{size[1]} is not offered for {self.name}; offered: {offered}")


TASKS: Mapping[str, Task] = MappingProxyType(
    {
        task.name: task
        for task in (
            Task(name="t2v-14B", model_type="t2v"),
            Task(name="t2v-1.3B", model_type="t2v", sizes=_SMALL_SIZES),
            Task(name="i2v-14B", model_type="i2v", steps=40),
            Task(name="t2i-14B", model_type="t2v", sizes=(*_VIDEO_SIZES, (1024, 1024)), frames=1),
            Task(name="flf2v-14B", model_type="flf2v"),
            Task(name="vace-1.3B", model_type="vace", sizes=_SMALL_SIZES),
            Task(name="vace-14B", model_type="vace"),
            Task(
                name="t2v-mini",
                model_type="t2v",
                sizes=((64, 64),),
                size=(64, 64),
                frames=17,
                example_prompt="the digit 7 moves up",
            ),
        )
    }
)


def task_of(config: TransformerConfig) -> Task:
    """Return the task of a transformer: the first whose published shape it has, else one without a list of sizes."""
    for name, task in TASKS.items():
        if TRANSFORMERS[name] == config:
            return task
    return Task(name=config.model_type, model_type=config.model_type, sizes=())


def check_task(task: Task, config: TransformerConfig) -> None:
    """Refuse a task that the transformer of a checkpoint is not for.

    Raises:
        RequestError: names the task that it is for.
    """
    if TRANSFORMERS[task.name] != config and task_of(config).sizes:
        raise RequestError(f"--task is {task.name}, but this checkpoint is for {task_of(config).name}")
    if task.model_type != config.model_type:
        raise RequestError(
            f"--task is {task.name}, but this checkpoint's transformer is of the type {config.model_type}"
        )


def check_frames(frames: int) -> None:
    """Refuse a number of frames that is not 4n + 1.

    Raises:
        RequestError: names the nearest two that are.
    """
    if frames < 1 or (frames - 1) % 4:
        below = max(1, (frames - 1) // 4 * 4 + 1)
        raise RequestError(f"the number of frames is {frames}; it has to be 4n+1, for example {below} or {below + 4}")


def check_pixels(size: Size) -> None:
    """Refuse a width or height that is not a multiple of 16.

    Raises:
        RequestError: names the nearest size that is.
    """
    if any(side < PIXELS or side % PIXELS for side in size):
        width, height = (max(PIXELS, round(side / PIXELS) * PIXELS) for side in size)
        raise RequestError(
            f"the size is {size[0]}*{size[1]}; width and height have to be multiples of {PIXELS}, "
            f"for example {width}*{height}"
        )
