"""From a prompt to a video: the parts of Wan2.1, each loaded when it is first needed, and one denoising loop."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from wan_infer.caching import CacheWish, OnSearch, cached, read_wish, searched
from wan_infer.checkpoints.loading import load_clip, load_prompt_encoder, load_transformer, load_vae, open_checkpoint
from wan_infer.clip import ClipEncoder
from wan_infer.conditioning import fit_area, frames_condition, vace_context
from wan_infer.config import TransformerConfig
from wan_infer.denoise import OnStep, denoise
from wan_infer.errors import RequestError
from wan_infer.generation import Generation, Settings
from wan_infer.lazy import Lazy
from wan_infer.parallel import Alone
from wan_infer.prompts import Embedded, Prompts, embed_prompts, read_prompts
from wan_infer.samplers import SigmaGrid, Solver, draw_noise, make_sampler
from wan_infer.sources import ImageLike, Sources, VideoLike, read_sources
from wan_infer.stopwatch import Stopwatch
from wan_infer.tasks import Size, Task, check_frames, check_pixels, task_of
from wan_infer.text import PromptEncoder
from wan_infer.transformer import TextContext, WanTransformer
from wan_infer.vae import WanVae

Device = torch.device | str | None


class WanPipeline:
    """Text, images or a video to a video.

    Args:
        transformer, vae, prompt_encoder, clip: the parts, or functions that load them, called when first needed. What
            a request does not need may be None.
        config: the shape of the transformer.
        device: where the latents are; the parts have to be there as well.
        task: whose settings are used where a call gives none; found by `config` when None.
        offload: whether a part that was loaded here is dropped when its stage is over. It comes back from the file,
            which the system keeps in memory while there is room.
        parallel: the processes that make each video together, a `Parallel`; this one makes it alone when None. All are
            called with the same arguments, and all get the whole result. The parts but the transformer are needed in
            the first process of each node only.
    """

    def __init__(
        self,
        *,
        config: TransformerConfig,
        transformer: WanTransformer | Callable[[], WanTransformer],
        vae: WanVae | Callable[[], WanVae],
        prompt_encoder: PromptEncoder | Callable[[], PromptEncoder] | None = None,
        clip: ClipEncoder | Callable[[], ClipEncoder] | None = None,
        device: Device = None,
        task: Task | None = None,
        offload: bool = False,
        parallel: Alone | None = None,
    ) -> None:
        self.config = config
        self.parallel = parallel or Alone()
        self.device = torch.device(device or "cpu")
        self.task = task or task_of(config)
        self.offload = offload
        self._transformer = Lazy("transformer", transformer, WanTransformer)
        self._vae = Lazy("vae", vae, WanVae)
        self._prompt_encoder = Lazy("prompt_encoder", prompt_encoder, PromptEncoder)
        self._clip = Lazy("clip", clip, ClipEncoder)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
        text_device: Device = None,
        embedding_cache: str | Path | None = None,
        task: Task | None = None,
        offload: bool = False,
        parallel: Alone | None = None,
    ) -> WanPipeline:
        """Open a checkpoint folder of the original or the diffusers layout; nothing big is read yet.

        Args:
            path: the folder.
            device: the accelerator of this machine by default, or else the CPU.
            dtype: of transformer and text encoder; bfloat16 on an accelerator and float32 on the CPU by default. The
                VAE is float32.
            text_device: where the text encoder runs, `device` by default.
            embedding_cache: a folder in which the embeddings of prompts are kept.
            task, offload, parallel: as for the class. Files are read by the first process of each node.

        Raises:
            CheckpointError: it is no checkpoint, or its transformer or VAE is incomplete.
        """
        device = default_device() if device is None else torch.device(device)
        dtype = dtype or default_dtype(device)
        processes = (parallel or Alone()).processes
        config = processes.once(lambda: open_checkpoint(path, parts=("transformer", "vae")).config)
        return cls(
            config=config,
            transformer=lambda: processes.module(
                lambda: load_transformer(path, device=device, dtype=dtype), lambda: WanTransformer(config)
            ),
            vae=lambda: load_vae(path, device=device),
            prompt_encoder=lambda: load_prompt_encoder(
                path, device=text_device or device, dtype=dtype, text_len=config.text_len, cache_dir=embedding_cache
            ),
            clip=lambda: load_clip(path, device=device),
            device=device,
            task=task,
            offload=offload,
            parallel=parallel,
        )

    @property
    def transformer(self) -> WanTransformer:
        """The transformer, loaded if need be."""
        return self._transformer.get()

    @property
    def vae(self) -> WanVae:
        """The VAE, loaded if need be."""
        return self._vae.get()

    def generate(self, prompt: str | Sequence[str] | None = None, **arguments: Any) -> Iterator[Tensor]:
        """Denoise, and return the frames as they are decoded, [B, 3, 1 or 4, H, W] in [-1, 1].

        Arguments and errors are those of a call.
        """
        return self(prompt, **arguments).frames

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | None = None,
        image: ImageLike | None = None,
        last_image: ImageLike | None = None,
        src_video: VideoLike | None = None,
        src_mask: VideoLike | None = None,
        src_ref_images: Sequence[ImageLike] | ImageLike = (),
        size: Size | None = None,
        frames: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        shift: float | None = None,
        seed: int | None = None,
        solver: Solver = "unipc",
        sigma_grid: SigmaGrid = "official",
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        cache: CacheWish = None,
        on_step: OnStep | None = None,
        on_search: OnSearch | None = None,
    ) -> Generation:
        """Generate one video, or one for each prompt. Decoding waits until the frames are asked for.

        What is None is taken from the task: for text to video 832 × 480, 81 frames, 50 steps, guidance 5 and shift 5.

        Args:
            prompt: what to show; several give a batch of one size.
            negative_prompt: what to avoid. The published one of the model when None; "" is really empty.
            image: the first frame (i2v, flf2v): a path, a picture of Pillow or a tensor [3, H, W] in [-1, 1].
            last_image: the last frame (flf2v), scaled and cut to the aspect of the first.
            src_video: what vace edits: a path or a tensor [3, F, H, W] in [-1, 1]; scaled and cut to `size`.
            src_mask: where it may edit: a path (white) or a tensor [1, F, H, W] (1); one frame is for all.
            src_ref_images: images of what vace shall show.
            size: (width, height), multiples of 16. i2v and flf2v take the area from it and the aspect from the image.
            frames: 4n + 1.
            steps: calls of the solver.
            guidance: scale of classifier-free guidance; 1 computes no unconditional side.
            shift: of the noise levels.
            seed: of the noise, drawn on the CPU: a seed means the same video on every device. The videos of a batch
                take seed, seed + 1, … A random one when None.
            solver: "unipc", "dpm++" or "euler".
            sigma_grid: "official" or "diffusers".
            latents: the noise itself, float32 [B, C, T, h, w]; vace takes a latent frame more for each reference image.
            prompt_embeds, negative_prompt_embeds: [B, L, text_dim] in place of the prompts; no text encoder is needed.
            cache: which steps are not computed, see :mod:`.caching`: a schedule of dit-cache or the path of one,
                "auto:0.4" to search one for 40 % of the steps, or a `CacheConfig`.
            on_step: called after every step with a `Step`.
            on_search: called with the progress of a search, where "auto" has to make one.

        Raises:
            RequestError: something is missing or not possible; nothing was computed.
            CheckpointError: a part that is needed is not in the checkpoint.
            MediaError: an image or a video cannot be read.
            NumericsError: the latents stopped being numbers; says at which step.
        """
        processes = self.parallel.processes
        settings = processes.once(lambda: self.settings(size, frames, steps, guidance, shift, solver, sigma_grid, seed))
        self.parallel.check_guidance(settings.guidance)
        sampler = make_sampler(solver, settings.steps, settings.shift, sigma_grid=sigma_grid)
        prompts = read_prompts(
            self.config,
            prompt=prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt=self._negative_prompt(negative_prompt, negative_prompt_embeds),
            negative_prompt_embeds=negative_prompt_embeds,
            guided=settings.guidance != 1,
        )
        sources = processes.by_readers(
            lambda: read_sources(
                self.config.model_type,
                settings.frames,
                image=image,
                last_image=last_image,
                src_video=src_video,
                src_mask=src_mask,
                src_ref_images=src_ref_images,
            )
        )
        settings, before = processes.once(lambda: _fitted(settings, sources))
        noise = self._noise(latents, len(prompts), settings, before=before)
        wish = processes.once(lambda: read_wish(cache)) if isinstance(cache, str | Path) else read_wish(cache)
        if isinstance(wish, float):
            wish = searched(self, settings, wish, watch=on_search)

        watch = Stopwatch(self.device)
        with watch.stage("text"):
            text = self._embedded(prompts)
        with watch.stage("image"):
            clip, condition = processes.tensors(lambda: self._conditions(sources, settings))
        with watch.stage("load transformer"):
            contexts = [self._context(each, clip) for each in text]
        levels = sampler.sigmas.tolist()
        with watch.stage("denoise"), cached(wish, self.transformer, levels, settings) as caching:
            final = denoise(
                self.transformer,
                noise.to(self.device, torch.float32),
                sampler,
                contexts,
                guidance=settings.guidance,
                condition=None if condition is None else condition.expand(len(noise), -1, -1, -1, -1),
                on_step=on_step,
                cached=caching,
                parallel=self.parallel,
            )
            self._done_with(self._transformer)
        return Generation(
            latents=final[:, :, before:],
            settings=settings,
            vae=self._vae,
            watch=watch,
            offload=self.offload,
            computed=caching.computed,
        )

    def settings(
        self,
        size: Size | None = None,
        frames: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        shift: float | None = None,
        solver: Solver = "unipc",
        sigma_grid: SigmaGrid = "official",
        seed: int | None = None,
    ) -> Settings:
        """Return the settings of a call: what is not given is taken from the task.

        Raises:
            RequestError: what can be checked without a model is not possible.
        """
        task = self.task
        size = task.size if size is None else size
        frames = task.frames if frames is None else frames
        guidance = task.guidance if guidance is None else guidance
        check_pixels(size)
        check_frames(frames)
        if not math.isfinite(guidance):
            raise RequestError(f"guidance is {guidance}; it has to be a finite number, 1 for none")
        return Settings(
            size=size,
            frames=frames,
            steps=task.steps if steps is None else steps,
            guidance=guidance,
            shift=task.shift(size) if shift is None else shift,
            solver=solver,
            sigma_grid=sigma_grid,
            seed=random.SystemRandom().randrange(2**32) if seed is None else seed,
        )

    def _negative_prompt(self, given: str | None, embeds: Tensor | None) -> str | None:
        return self.task.negative_prompt if given is None and embeds is None else given

    def _noise(self, latents: Tensor | None, count: int, settings: Settings, *, before: int) -> Tensor:
        """Return what the videos start from, [B, C, T, h, w]; `before` latent frames stand before each."""
        shape = self.latent_shape(settings, before=before)
        if latents is None:
            return torch.stack([draw_noise(shape, settings.seed + index) for index in range(count)])
        if latents.shape != (count, *shape) or not latents.is_floating_point():
            raise RequestError(
                f"latents is {latents.dtype} {list(latents.shape)}; torch.float32 {[count, *shape]} is expected "
                "for these prompts, frames and this size"
            )
        return latents

    def latent_shape(self, settings: Settings, *, before: int = 0) -> tuple[int, int, int, int]:
        """Return the shape of the latents of one video, (C, T, h, w), with `before` latent frames before it."""
        width, height = (side // 8 for side in settings.size)
        return self.config.out_dim, before + (settings.frames - 1) // 4 + 1, height, width

    def _embedded(self, prompts: Prompts) -> list[Embedded]:
        """Return rows and lengths of what is wanted and of what is to be avoided."""

        def embed() -> list[Tensor]:
            found = [tensor for side in embed_prompts(prompts, self._prompt_encoder) for tensor in side]
            self._done_with(self._prompt_encoder)
            return found

        flat = cast("list[Tensor]", self.parallel.processes.tensors(embed))
        return list(zip(flat[::2], flat[1::2], strict=True))

    def _conditions(self, sources: Sources | None, settings: Settings) -> tuple[Tensor | None, Tensor | None]:
        """Return CLIP tokens and the condition of the latents, where the model takes them."""
        assert sources is not None, "this is a process that reads"
        clip, condition = self._clip_tokens(sources), self._condition(sources, settings)
        self._done_with(self._clip, self._vae)
        return clip, condition

    def _clip_tokens(self, sources: Sources) -> Tensor | None:
        """Return the CLIP tokens of all images after each other, [1, tokens, C]."""
        if self.config.image_dim is None:
            return None
        return torch.cat([self._clip.get()(image[None]) for image in sources.images], dim=1)

    def _condition(self, sources: Sources, settings: Settings) -> Tensor | None:
        if sources.images:
            return frames_condition(self.vae, sources.images, settings.size, settings.frames)
        if self.config.model_type == "vace":
            return vace_context(self.vae, sources, settings.size, settings.frames)
        return None

    def _context(self, text: Embedded, clip: Tensor | None) -> TextContext:
        embeddings, lengths = text
        tokens = None if clip is None else clip.expand(len(embeddings), -1, -1)
        return self.transformer.prepare_text(embeddings, text_lengths=lengths, clip=tokens)

    def _done_with(self, *parts: Lazy[Any]) -> None:
        """Drop parts whose stage is over, if that is wanted."""
        if self.offload:
            for part in parts:
                part.release()


def _fitted(settings: Settings, sources: Sources | None) -> tuple[Settings, int]:
    """Return the settings with the aspect of the first image, and the number of references."""
    assert sources is not None, "the first process reads"
    if sources.images:
        settings = replace(settings, size=fit_area(sources.images[0], settings.size))
    return settings, len(sources.references)


def default_device() -> torch.device:
    """Return the accelerator that this machine has, or else the CPU."""
    # A build of torch for an accelerator names it even where there is none.
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """Return float32 for the CPU and bfloat16 for an accelerator."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16
