"""What a pipeline returns: latents, and the video that they become when somebody asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wan_infer.errors import RequestError
from wan_infer.lazy import Lazy
from wan_infer.samplers import SigmaGrid, Solver
from wan_infer.stopwatch import Stopwatch
from wan_infer.tasks import Size
from wan_infer.vae import WanVae
from wan_infer.vae_tiling import Tiling, decode_tiled_stream
from wan_infer.video import VideoWriter


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides about a video besides the prompt; named as the arguments of a call of `WanPipeline`."""

    size: Size
    frames: int
    steps: int
    guidance: float
    shift: float
    solver: Solver
    sigma_grid: SigmaGrid
    seed: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Generation:
    """One video, or a batch of them.

    Attributes:
        latents: normalised, float32 [B, C, T, h, w].
        settings: with which they were made.
        vae: what decodes them.
        watch: has timed the stages.
        offload: whether the VAE is dropped after decoding.
        computed: share of the transformer's evaluations that a cache left to be computed; 1 without one.
    """

    latents: Tensor
    settings: Settings
    vae: Lazy[WanVae]
    watch: Stopwatch
    offload: bool = False
    computed: float = 1.0

    @property
    def frames(self) -> Iterator[Tensor]:
        """Decode, and yield chunks [B, 3, 1 or 4, H, W] in [-1, 1] on the device; nothing is kept."""
        return self._decode(self.latents)

    @property
    def timings(self) -> dict[str, float]:
        """Seconds of each stage so far; "decode" is there once frames were taken."""
        return dict(self.watch.seconds)

    @property
    def peak_memory(self) -> int:
        """Bytes: of the accelerator in this run or, on the CPU, of the process."""
        return self.watch.peak_memory

    def video(self) -> Tensor:
        """Return the whole video, [B, 3, F, H, W] in [-1, 1]."""
        return torch.cat(list(self.frames), dim=2)

    def save(
        self,
        path: str | Path,
        *,
        fps: float = 16,
        index: int = 0,
        overwrite: bool = False,
        tiling: Tiling | None = None,
        on_frames: Callable[[int], None] | None = None,
    ) -> Path:
        """Write one video of the batch to an ``.mp4``, or its single frame to a ``.png``, as it is decoded.

        Args:
            path: where to; the suffix decides.
            fps: frames a second.
            index: which video of the batch.
            overwrite: whether a file of that name is replaced.
            tiling: decode large frames tile by tile, with the error that `wan_infer.vae_tiling` states.
            on_frames: called with the number of frames that are written, whenever there are more.

        Raises:
            RequestError: the suffix is another, or there is no such video.
            OutputError: the file exists already, or cannot be written to its end; nothing broken is left.
        """
        if not -len(self.latents) <= index < len(self.latents):
            raise RequestError(f"index is {index}; there are {len(self.latents)} videos, counted from 0")
        with VideoWriter(path, fps=fps, overwrite=overwrite) as writer:
            for chunk in self._decode(self.latents[index][None], tiling):
                writer.write(chunk[0])
                if on_frames is not None:
                    on_frames(writer.count)
        return Path(path)

    def _decode(self, latents: Tensor, tiling: Tiling | None = None) -> Iterator[Tensor]:
        with self.watch.stage("load vae"):
            vae = self.vae.get()
        stream = vae.decode_stream(latents) if tiling is None else decode_tiled_stream(vae, latents, tiling)
        while True:
            with self.watch.stage("decode"), torch.no_grad():
                chunk = next(stream, None)
            if chunk is None:
                break
            yield chunk
        if self.offload:
            self.vae.release()
