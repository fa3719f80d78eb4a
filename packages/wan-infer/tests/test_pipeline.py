"""What a pipeline promises besides the numbers of `test_pipeline_parity`: seeds, lazy parts, steps, refusals."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_pipeline as tiny
import tiny_wan
import torch
from PIL import Image
from torch import Tensor, nn

from wan_infer.checkpoints.convert import convert
from wan_infer.denoise import Step
from wan_infer.errors import CheckpointError, MediaError, NumericsError, RequestError
from wan_infer.generation import Generation
from wan_infer.lazy import Lazy
from wan_infer.pipeline import WanPipeline, default_device, default_dtype
from wan_infer.samplers import Solver, draw_noise
from wan_infer.tasks import TASKS
from wan_infer.text import PromptEncoder, TextEncoder, load_tokenizer
from wan_infer.vae_tiling import Tiling
from wan_infer.video import read_frames

SHORT: dict[str, Any] = {"size": (32, 32), "frames": 5, "steps": 2}
# What a batch adds up in another order; the latents are of a few units.
BATCH = 2e-5
PROMPTS = ["the digit 3 moves left", "a 7", "the digit 7 moves up the digit 3"]


def prompt_encoder(tmp_path: Path) -> PromptEncoder:
    tiny_wan.write_tokenizer(tmp_path / "tokenizer")
    torch.manual_seed(4)
    return PromptEncoder(load_tokenizer(tmp_path / "tokenizer"), TextEncoder(tiny_wan.umt5()))


@pytest.fixture
def pipe(tmp_path: Path) -> WanPipeline:
    return tiny.ours("t2v", prompt_encoder=prompt_encoder(tmp_path))


def refuse() -> Any:
    raise AssertionError("this part is not needed")


# ---- seeds ----------------------------------------------------------------------------------------------------------


def test_a_seed_is_the_same_video_alone_and_in_a_batch(pipe: WanPipeline) -> None:
    batch = pipe(PROMPTS, seed=11, **SHORT).latents
    assert batch.shape == (3, 16, 2, 4, 4)
    for index, prompt in enumerate(PROMPTS):
        alone = pipe(prompt, seed=11 + index, **SHORT).latents
        assert (batch[index] - alone[0]).abs().max() <= BATCH
    assert (batch[0] - batch[1]).abs().max() > 0.1


def test_the_seed_is_that_of_the_noise(pipe: WanPipeline) -> None:
    noise = torch.stack([draw_noise((16, 2, 4, 4), seed) for seed in (5, 6, 7)])
    assert torch.equal(pipe(PROMPTS, latents=noise, **SHORT).latents, pipe(PROMPTS, seed=5, **SHORT).latents)


def test_a_random_seed_is_told_and_works_again(pipe: WanPipeline) -> None:
    first, second = (pipe("a", **SHORT) for _ in range(2))
    assert first.settings.seed != second.settings.seed
    assert torch.equal(pipe("a", seed=first.settings.seed, **SHORT).latents, first.latents)


def test_given_latents_are_left_alone(pipe: WanPipeline) -> None:
    noise = draw_noise((16, 2, 4, 4), 1)[None]
    before = noise.clone()
    pipe("a", latents=noise, **SHORT)
    assert torch.equal(noise, before)


# ---- text -----------------------------------------------------------------------------------------------------------


def test_none_is_the_published_negative_prompt_and_empty_is_empty(pipe: WanPipeline) -> None:
    published = TASKS["t2v-14B"].negative_prompt
    default, spelled, empty = (
        pipe("a", negative_prompt=text, seed=1, **SHORT).latents for text in (None, published, "")
    )
    assert torch.equal(default, spelled)
    assert not torch.equal(default, empty)


def test_embeddings_stand_for_prompts(pipe: WanPipeline) -> None:
    encoder = pipe._prompt_encoder.get()
    text, negative = encoder.encode_prompts(["a 7"])[0], encoder.encode_prompts(["b"])[0]
    embedded = pipe(prompt_embeds=text, negative_prompt_embeds=negative, seed=1, **SHORT)
    assert torch.equal(embedded.latents, pipe("a 7", negative_prompt="b", seed=1, **SHORT).latents)
    mixed = pipe("a 7", negative_prompt_embeds=negative, seed=1, **SHORT)
    assert torch.equal(embedded.latents, mixed.latents)


def test_embeddings_need_no_text_encoder(tmp_path: Path) -> None:
    path = tiny_wan.original(tmp_path / "ckpt")
    (path / tiny_wan.T5).unlink()
    shutil.rmtree(path / "google")
    pipe = WanPipeline.from_pretrained(path, device="cpu")
    made = pipe(prompt_embeds=tiny.embeds(), negative_prompt_embeds=tiny.embeds(seed=9), seed=1, **SHORT)
    assert made.latents.isfinite().all()
    assert pipe(prompt_embeds=tiny.embeds(), guidance=1, seed=1, **SHORT).latents.isfinite().all()
    with pytest.raises(
        CheckpointError, match=r"negative prompt needs.*missing.*give negative_prompt_embeds.*guidance=1"
    ):
        pipe(prompt_embeds=tiny.embeds(), **SHORT)
    with pytest.raises(CheckpointError, match=r"the tokenizer is incomplete.*tokenizer.json"):
        pipe("a", **SHORT)


# ---- steps ----------------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Counts the calls of a transformer; a wrapper as `torch.compile` makes one, not a WanTransformer."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.calls = 0
        self.prepared = 0

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        result: Tensor = self.inner(*args, **kwargs)
        return result

    def prepare_text(self, *args: Any, **kwargs: Any) -> Any:
        self.prepared += 1
        return self.inner.prepare_text(*args, **kwargs)


@pytest.mark.parametrize(("guidance", "sides"), [(1, 1), (5.0, 2), (0.0, 2)])
def test_calls_of_the_transformer(guidance: float, sides: int) -> None:
    counting = Counting(tiny.transformer("t2v"))
    pipe = tiny.ours("t2v", transformer=counting)
    pipe(prompt_embeds=tiny.embeds(), negative_prompt_embeds=tiny.embeds(), guidance=guidance, **SHORT | {"steps": 3})
    assert counting.calls == 3 * sides
    assert counting.prepared == sides  # keys and values of the text, once and not every step


def test_on_step_sees_every_step(pipe: WanPipeline) -> None:
    seen: list[Step] = []
    made = pipe("a", seed=1, on_step=seen.append, **SHORT | {"steps": 4})
    assert [(step.index, step.steps) for step in seen] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [step.timestep for step in seen] == sorted((step.timestep for step in seen), reverse=True)
    assert all(step.latents.shape == (1, 16, 2, 4, 4) for step in seen)
    assert torch.equal(seen[-1].latents, made.latents)


def test_an_error_in_on_step_ends_the_run(pipe: WanPipeline) -> None:
    def stop(step: Step) -> None:
        raise RuntimeError(f"enough after {step.index}")

    with pytest.raises(RuntimeError, match="enough after 1"):
        pipe("a", on_step=stop, **SHORT)


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
def test_all_solvers_come_to_an_end(pipe: WanPipeline, solver: Solver) -> None:
    made = pipe("a", seed=1, solver=solver, **SHORT)
    assert made.latents.isfinite().all()
    assert made.settings.solver == solver


def test_nan_in_the_weights_stops_with_the_step() -> None:
    broken = tiny.transformer("t2v")
    broken.head.head.bias.data[3] = math.nan
    pipe = tiny.ours("t2v", transformer=broken)
    with pytest.raises(NumericsError, match=r"not finite after step 1 of 2 \(timestep 999\); check the checkpoint"):
        pipe(prompt_embeds=tiny.embeds(), guidance=1, **SHORT)


def test_nan_that_appears_later_names_its_step() -> None:
    model = tiny.transformer("t2v")

    def poison(step: Step) -> None:
        if step.index == 2:
            model.head.head.bias.data[0] = math.inf

    pipe = tiny.ours("t2v", transformer=model)
    with pytest.raises(NumericsError, match="after step 3 of 4"):
        pipe(prompt_embeds=tiny.embeds(), guidance=1, on_step=poison, **SHORT | {"steps": 4})


# ---- the result -----------------------------------------------------------------------------------------------------


def test_streaming_is_the_whole_video(pipe: WanPipeline) -> None:
    made = pipe(PROMPTS[:2], seed=1, **SHORT | {"frames": 9})
    chunks = list(pipe.generate(PROMPTS[:2], seed=1, **SHORT | {"frames": 9}))
    assert [chunk.shape[2] for chunk in chunks] == [1, 4, 4]
    video = made.video()
    assert video.shape == (2, 3, 9, 32, 32)
    assert torch.equal(torch.cat(chunks, dim=2), video)
    assert torch.equal(torch.cat(list(made.frames), dim=2), video)  # a second time as well
    assert video.abs().max() <= 1


def test_nothing_is_decoded_until_somebody_asks(tmp_path: Path) -> None:
    pipe = tiny.ours("t2v", vae=refuse)
    made = pipe(prompt_embeds=tiny.embeds(), guidance=1, seed=1, **SHORT)
    assert "decode" not in made.timings
    with pytest.raises(AssertionError, match="not needed"):
        next(made.frames)


def test_what_comes_out_is_the_users_to_change(pipe: WanPipeline) -> None:
    made = pipe("a", seed=1, **SHORT)
    made.video().mul_(0.5)
    for chunk in made.frames:
        chunk.clamp_(0, 1)
    made.latents.add_(1).requires_grad_()  # would fail for a tensor of inference mode
    assert all(not parameter.is_inference() for parameter in pipe.transformer.parameters())


def test_timings_and_memory(pipe: WanPipeline) -> None:
    made = pipe("a", seed=1, **SHORT)
    assert list(made.timings) == ["text", "image", "load transformer", "denoise"]
    made.video()
    assert list(made.timings) == ["text", "image", "load transformer", "denoise", "load vae", "decode"]
    assert all(seconds >= 0 for seconds in made.timings.values())
    assert made.peak_memory > 10_000_000


def test_saving_each_of_a_batch(pipe: WanPipeline, tmp_path: Path) -> None:
    made = pipe(PROMPTS[:2], seed=1, **SHORT)
    counts: list[int] = []
    saved = [made.save(tmp_path / f"{n}.mp4", index=n, fps=8, on_frames=counts.append) for n in (0, -1)]
    assert counts == [1, 5, 1, 5]
    videos = [read_frames(path) for path in saved]
    assert all(video.shape == (3, 5, 32, 32) for video in videos)
    assert (videos[0] - videos[1]).abs().max() > 0.1
    for index in (2, -3):
        with pytest.raises(RequestError, match=rf"index is {index}; there are 2 videos"):
            made.save(tmp_path / "none.mp4", index=index)


def test_a_video_of_one_tile_is_the_same_video(pipe: WanPipeline, tmp_path: Path) -> None:
    """Frames that fit into one tile are not blended with anything; smaller tiles give another file."""
    made = pipe("a", seed=1, **SHORT)
    tilings = {"whole": None, "one": Tiling(size=8, overlap=2), "many": Tiling(size=3, overlap=1)}
    files = {name: made.save(tmp_path / f"{name}.mp4", tiling=tiling) for name, tiling in tilings.items()}
    content = {name: file.read_bytes() for name, file in files.items()}
    assert content["one"] == content["whole"] != content["many"]


def test_a_single_frame_is_a_picture(pipe: WanPipeline, tmp_path: Path) -> None:
    made = pipe("a", seed=1, **SHORT | {"frames": 1})
    made.save(tmp_path / "one.png")
    expected = ((made.video()[0, :, 0] + 1) * 127.5).to(torch.uint8)
    read = (read_frames(tmp_path / "one.png")[:, 0] + 1) * 127.5
    assert (read - expected).abs().max() < 0.01


# ---- parts ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the parts that were loaded, in order."""
    seen: list[str] = []

    def counted(name: str, load: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return load(*args, **kwargs)

        return wrapper

    from wan_infer import pipeline

    for name in ("transformer", "vae", "prompt_encoder", "clip"):
        monkeypatch.setattr(pipeline, f"load_{name}", counted(name, getattr(pipeline, f"load_{name}")))
    return seen


def test_parts_are_loaded_once_and_when_needed(tmp_path: Path, loads: list[str]) -> None:
    pipe = WanPipeline.from_pretrained(tiny_wan.diffusers(tmp_path / "ckpt"), device="cpu")
    assert loads == []
    made = pipe("a", seed=1, **SHORT)
    assert loads == ["prompt_encoder", "transformer"]
    made.video()
    pipe("a", seed=1, **SHORT).video()
    assert loads == ["prompt_encoder", "transformer", "vae"]


def test_offload_drops_parts_and_loads_them_again(tmp_path: Path, loads: list[str]) -> None:
    path = tiny_wan.original(tmp_path / "ckpt", "i2v")
    kept, offloaded = (WanPipeline.from_pretrained(path, device="cpu", offload=off) for off in (False, True))
    image = Image.new("RGB", (32, 32), "red")
    expected = kept("a", image=image, seed=1, **SHORT).video()
    loads.clear()
    for _ in range(2):
        made = offloaded("a", image=image, seed=1, **SHORT)
        parts = (offloaded._transformer, offloaded._vae, offloaded._clip, offloaded._prompt_encoder)
        assert all(part._part is None for part in parts)
        assert torch.equal(made.video(), expected)
        assert offloaded._vae._part is None
    assert loads == ["prompt_encoder", "clip", "vae", "transformer", "vae"] * 2


def test_both_layouts_give_the_same_bits(tmp_path: Path) -> None:
    """Values are cast on arrival here. float32 files are used where they lie, at addresses that differ by layout, and a
    matrix product on the CPU may then round another way (5e-6 in latents)."""
    for model_type in ("t2v", "i2v"):
        first = tiny_wan.original(tmp_path / model_type, model_type, dtype=torch.bfloat16)
        second = tmp_path / f"{model_type}-diffusers"
        convert(first, second, to="diffusers")
        arguments: dict[str, Any] = {"seed": 1, **SHORT}
        if model_type == "i2v":
            arguments["image"] = Image.new("RGB", (40, 40), "green")
        runs = [WanPipeline.from_pretrained(path, device="cpu")("a 7", **arguments) for path in (first, second)]
        assert torch.equal(runs[0].latents, runs[1].latents)
        assert torch.equal(runs[0].video(), runs[1].video())


def test_embeddings_come_from_the_cache_without_the_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_wan.original(tmp_path / "ckpt")
    first = WanPipeline.from_pretrained(path, device="cpu", embedding_cache=tmp_path / "cache")("a", seed=1, **SHORT)
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2
    monkeypatch.setattr("wan_infer.checkpoints.loading.load_text_encoder", lambda *args, **kwargs: refuse())
    second = WanPipeline.from_pretrained(path, device="cpu", embedding_cache=tmp_path / "cache")("a", seed=1, **SHORT)
    assert torch.equal(first.latents, second.latents)


def test_a_bfloat16_pipeline_works(tmp_path: Path) -> None:
    path = tiny_wan.original(tmp_path / "ckpt")
    low, high = (
        WanPipeline.from_pretrained(path, device="cpu", dtype=dtype)("a", seed=1, guidance=1, **SHORT).latents
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert low.dtype == torch.float32
    assert (low - high).norm() / high.norm() < 0.03  # bfloat16 has 8 bits


def test_a_pipeline_without_a_part_says_so() -> None:
    with pytest.raises(RequestError, match="needs a prompt_encoder, and the pipeline was made without one"):
        tiny.ours("t2v")("a", **SHORT)
    with pytest.raises(RequestError, match="needs a clip"):
        tiny.ours("i2v", clip=None)(prompt_embeds=tiny.embeds(), guidance=1, image=torch.zeros(3, 32, 32), **SHORT)


def test_defaults_of_the_machine() -> None:
    assert default_dtype(torch.device("cpu")) == torch.float32
    assert default_dtype(torch.device("npu" if hasattr(torch, "npu") else "cuda")) == torch.bfloat16
    assert (default_device().type == "cpu") == (not torch.accelerator.is_available())


def test_release_keeps_what_cannot_be_loaded_again() -> None:
    given: Lazy[Counting] = Lazy("part", Counting(nn.Identity()), Counting)
    given.release()
    assert isinstance(given.get(), Counting)


# ---- defaults -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", tiny_wan.MODEL_TYPES)
def test_defaults_come_from_the_task(model_type: str) -> None:
    pipe = tiny.ours(model_type)
    settings = pipe.settings(None, None, None, None, None, "unipc", "official", 0)
    assert (settings.size, settings.frames, settings.guidance) == ((832, 480), 81, 5.0)
    assert settings.shift == {"t2v": 5.0, "i2v": 3.0, "flf2v": 16.0, "vace": 16.0}[model_type]
    assert settings.steps == 50


def test_size_of_images_to_video() -> None:
    """The area is that of `size`, the aspect that of the image."""
    made = tiny.ours("i2v")(
        prompt_embeds=tiny.embeds(), guidance=1, image=torch.zeros(3, 100, 200), **SHORT | {"size": (64, 64)}
    )
    assert made.settings.size == (80, 32)
    assert made.latents.shape[3:] == (4, 10)


# ---- refusals -------------------------------------------------------------------------------------------------------

PICTURE = torch.zeros(3, 32, 32)
VIDEO, MASK = torch.zeros(3, 5, 32, 32), torch.zeros(1, 5, 32, 32)
TEXT = tiny.embeds()


@pytest.mark.parametrize(
    ("model_type", "arguments", "message"),
    [
        ("t2v", {"prompt": None}, "neither prompt nor prompt_embeds was given; say what to show"),
        ("t2v", {"prompt_embeds": TEXT}, "both prompt and prompt_embeds were given; give one"),
        ("t2v", {"negative_prompt": "x", "negative_prompt_embeds": TEXT}, "both negative_prompt and negative_prompt_e"),
        ("t2v", {"prompt": []}, r"prompt is \[\]; a text is expected, or a list with one text at least"),
        ("t2v", {"prompt": ["a", 7]}, r"prompt is \['a', 7\]; a text is expected"),
        ("t2v", {"prompt": None, "prompt_embeds": TEXT[0]}, r"prompt_embeds is torch.float32 \[7, 16\]; a floating"),
        ("t2v", {"prompt": None, "prompt_embeds": TEXT.int()}, "prompt_embeds is torch.int32"),
        ("t2v", {"prompt": None, "prompt_embeds": TEXT[..., :9]}, r"\[1, 7, 9\].*\[prompts, 1 to 512, 16\] is expect"),
        ("t2v", {"prompt": None, "prompt_embeds": tiny.embeds(rows=513)}, r"\[1, 513, 16\]"),
        ("t2v", {"prompt": None, "prompt_embeds": TEXT[:0]}, r"\[0, 7, 16\]"),
        (
            "t2v",
            {"negative_prompt_embeds": tiny.embeds(3)},
            "3 negative prompts for 1 prompts; give one for all, or as",
        ),
        ("t2v", {"image": PICTURE}, "of the type t2v has no use for image; it takes no image and no video"),
        ("t2v", {"src_video": VIDEO, "last_image": PICTURE}, "no use for last_image, src_video; it takes no"),
        ("i2v", {}, "of the type i2v needs image; give an image file"),
        ("i2v", {"image": PICTURE, "last_image": PICTURE}, "i2v has no use for last_image; it takes image"),
        ("flf2v", {"image": PICTURE}, "flf2v needs last_image; give"),
        ("flf2v", {}, "flf2v needs image and last_image; give"),
        ("flf2v", {"image": PICTURE, "last_image": PICTURE, "frames": 1}, "frames is 1.*ask for 5 frames at least"),
        ("i2v", {"image": PICTURE[0]}, r"an image is torch.float32 \[32, 32\]; .*\[3, height, width\]"),
        ("i2v", {"image": PICTURE.byte()}, "an image is torch.uint8"),
        ("i2v", {"image": torch.zeros(3, 2, 4000)}, r"an image of 4000\*2 is too narrow for an area of 32\*32; cut it"),
        ("vace", {"image": PICTURE}, "no use for image; it takes src_video, src_mask, src_ref_images"),
        ("vace", {"src_mask": MASK}, "src_mask says what may change in src_video, which is missing; give both"),
        ("vace", {"src_video": VIDEO, "frames": 9}, "src_video has 5 frames and 9 are to be made; ask for 5 at most"),
        ("vace", {"src_video": VIDEO[:, :4], "frames": 9}, "src_video has 4 frames.*ask for 1 at most"),
        ("vace", {"src_video": VIDEO, "src_mask": MASK[:, :3]}, "src_mask has 3 frames and 5 are to be made"),
        (
            "vace",
            {"src_video": VIDEO[:2]},
            r"a video is torch.float32 \[2, 5, 32, 32\]; .*\[3, frames, height, width\]",
        ),
        ("vace", {"src_video": VIDEO, "src_mask": VIDEO}, r"a mask has the shape \[3, 5, 32, 32\]; \[1, frames"),
        ("t2v", {"size": (40, 32)}, r"the size is 40\*32; .*multiples of 16, for example 32\*32"),
        ("t2v", {"size": (0, 32)}, r"the size is 0\*32; .*for example 16\*32"),
        ("t2v", {"frames": 6}, r"the number of frames is 6; it has to be 4n\+1, for example 5 or 9"),
        ("t2v", {"frames": 0}, "the number of frames is 0; .*for example 1 or 5"),
        ("t2v", {"frames": -3}, "the number of frames is -3; .*for example 1 or 5"),
        ("t2v", {"steps": 0}, "steps is 0; it has to be a whole number from 1 on"),
        ("t2v", {"guidance": math.nan}, "guidance is nan; it has to be a finite number, 1 for none"),
        ("t2v", {"shift": 0.0}, "shift is 0.0; it has to be a number above 0"),
        ("t2v", {"solver": "heun"}, "'heun' is no solver; there are unipc, dpm"),
        ("t2v", {"sigma_grid": "mine"}, "'mine' is no sigma grid; there are official, diffusers"),
        ("t2v", {"seed": -1}, "seed is -1; it has to be at least 0"),
        (
            "t2v",
            {"latents": torch.zeros(1, 16, 2, 4, 5)},
            r"latents is torch.float32 \[1, 16, 2, 4, 5\]; .*\[1, 16, 2, 4, 4\]",
        ),
        ("t2v", {"latents": torch.zeros(1, 16, 2, 4, 4).int()}, "latents is torch.int32"),
        ("t2v", {"prompt": ["a", "b"], "latents": torch.zeros(1, 16, 2, 4, 4)}, r"\[2, 16, 2, 4, 4\] is expected"),
    ],
)
def test_refusals_come_before_any_work(model_type: str, arguments: dict[str, Any], message: str) -> None:
    parts = dict.fromkeys(("transformer", "vae", "clip", "prompt_encoder"), refuse)
    pipe = tiny.ours(model_type, **parts)
    with pytest.raises(RequestError, match=message):
        pipe(**{"prompt": "a", **SHORT, **arguments})


def test_unreadable_files_are_refused_before_any_work(tmp_path: Path) -> None:
    file = tmp_path / "broken.png"
    Image.new("RGB", (64, 64), "red").save(file)
    file.write_bytes(file.read_bytes()[:60])
    (tmp_path / "text.jpg").write_text("no image")
    parts = dict.fromkeys(("transformer", "vae", "clip", "prompt_encoder"), refuse)
    for name in ("broken.png", "text.jpg", "absent.png", "."):
        with pytest.raises(MediaError, match=r"the image .* cannot be read: "):
            tiny.ours("i2v", **parts)("a", image=tmp_path / name, **SHORT)
        with pytest.raises(MediaError, match=r"the image .* cannot be read: "):
            tiny.ours("vace", **parts)("a", src_ref_images=[tmp_path / name], **SHORT)
    for name in ("text.jpg", "absent.mp4"):
        with pytest.raises(MediaError, match=name):
            tiny.ours("vace", **parts)("a", src_video=tmp_path / name, **SHORT)


def test_a_generation_is_what_was_asked_for(pipe: WanPipeline) -> None:
    made = pipe("a", seed=3, guidance=2.5, shift=4.0, solver="euler", sigma_grid="diffusers", **SHORT)
    assert isinstance(made, Generation)
    settings = made.settings
    assert (settings.size, settings.frames, settings.steps, settings.seed) == ((32, 32), 5, 2, 3)
    assert (settings.guidance, settings.shift, settings.solver) == (2.5, 4.0, "euler")
    assert settings.sigma_grid == "diffusers"
