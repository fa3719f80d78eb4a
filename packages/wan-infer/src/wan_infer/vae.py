"""The causal video VAE of Wan2.1: 4n + 1 frames of pixels to n + 1 frames of latents and back.

Time runs one way only: a frame is computed from itself and the frames before it, of which every causal convolution
keeps the two that it needs. So a video is encoded and decoded as a stream, in memory that does not grow with its
length, and a shorter clip is a prefix of a longer one.

All tensors are [B, C, T, H, W]. Parameters carry the names of the original checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_infer.config import VaeConfig
from wan_infer.errors import CheckpointError, RequestError
from wan_infer.vae_layers import AttentionBlock, CausalConv3d, Downsample, Past, ResidualBlock, RMSNorm, Upsample

RGB = 3


class WanVae(nn.Module):
    """Encoder and decoder.

    Args:
        config: the shape.

    Raises:
        CheckpointError: the lists of the configuration do not fit each other.
    """

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        _check_config(config)
        self.config = config
        self.encoder = Encoder(config)
        self.conv1 = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.conv2 = CausalConv3d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)

    def encode(self, video: Tensor) -> Tensor:
        """Return the normalised latents of a video: the mean of the posterior, no sampling.

        Args:
            video: [B, 3, F, H, W] in [-1, 1]; F is 4n + 1, H and W are multiples of 8 (in general, of the strides).

        Returns:
            float32 [B, z, 1 + (F - 1) / 4, H / 8, W / 8].

        Raises:
            RequestError: the video has another shape.
        """
        mean, _ = self.encode_moments(video)
        offset, scale = self._normalisation(mean.device)
        return (mean.float() - offset) / scale

    def encode_moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and logarithm of the variance of the posterior, not normalised; shapes and errors of `encode`."""
        self.check_video(video)
        past = Past(video.shape[0])
        first, rest = video[:, :, :1], video[:, :, 1:]
        chunks = [first, *(rest.split(self.config.temporal_stride, dim=2) if rest.shape[2] else ())]
        moments = torch.cat([self._encode_chunk(chunk, past) for chunk in chunks], dim=2)
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar

    def decode(self, latents: Tensor, *, clamp: bool = True) -> Tensor:
        """Return the video of normalised latents.

        Args:
            latents: [B, z, T, h, w].
            clamp: whether to limit the result to [-1, 1]; training does not want that.

        Returns:
            [B, 3, 4 (T - 1) + 1, 8 h, 8 w] in the dtype of the parameters.

        Raises:
            RequestError: the latents have another shape.
        """
        stream = self.decode_stream(latents, clamp=clamp)
        batch, _, count, rows, columns = latents.shape
        size, stride = self.config.spatial_stride, self.config.temporal_stride
        video: Tensor | None = None
        done = 0
        for frames in stream:
            if video is None:
                video = frames.new_empty(batch, RGB, 1 + stride * (count - 1), size * rows, size * columns)
            video[:, :, done : done + frames.shape[2]] = frames
            done += frames.shape[2]
        assert video is not None, "latents without frames were refused"
        return video

    def decode_stream(self, latents: Tensor | Iterable[Tensor], *, clamp: bool = True) -> Iterator[Tensor]:
        """Yield the frames of a video as they are decoded: 1, then 4 for every further frame of latents.

        Args:
            latents: normalised, [B, z, T, h, w], or an iterable of such pieces of one video in order of time.
            clamp: whether to limit the result to [-1, 1].

        Yields:
            [B, 3, 1 or 4, 8 h, 8 w]. Nothing of what was yielded is kept.

        Raises:
            RequestError: the latents have another shape; at once for a tensor, on its turn for a piece.
        """
        if isinstance(latents, Tensor):
            self.check_latents(latents)
            latents = (latents,)
        return self._decode_pieces(latents, clamp)

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters, and so of what is computed."""
        return self.conv1.weight.dtype

    def check_video(self, video: Tensor) -> None:
        """Raise RequestError unless this is a video that can be encoded."""
        config = self.config
        if video.ndim != 5 or video.shape[1] != RGB:
            raise RequestError(f"a video is [batch, 3, frames, height, width], but this one is {list(video.shape)}")
        frames, height, width = video.shape[2:]
        extra = (frames - 1) % config.temporal_stride
        if frames < 1 or extra:
            lower = frames - extra
            nearest = f"{lower} or {lower + config.temporal_stride}" if frames > 0 else "1"
            raise RequestError(
                f"the number of frames must be {config.temporal_stride}n+1, but is {frames}; nearest: {nearest}"
            )
        if not height or not width or height % config.spatial_stride or width % config.spatial_stride:
            raise RequestError(
                f"height and width must be multiples of {config.spatial_stride}, but are {height} and {width}"
            )

    def check_latents(self, latents: Tensor, before: torch.Size | None = None) -> None:
        """Raise RequestError unless these are latents of this VAE, and can follow a piece of the shape `before`."""
        config = self.config
        if latents.ndim != 5 or latents.shape[1] != config.z_dim or not latents.numel():
            raise RequestError(
                f"latents are [batch, {config.z_dim}, frames, height, width], but these are {list(latents.shape)}"
            )
        if before is not None and (latents.shape[0], *latents.shape[3:]) != (before[0], *before[3:]):
            raise RequestError(
                f"pieces of one video have one batch and size, but {list(latents.shape)} follows {list(before)}"
            )

    def _decode_pieces(self, pieces: Iterable[Tensor], clamp: bool) -> Iterator[Tensor]:
        past, size = None, None
        for piece in pieces:
            self.check_latents(piece, size)
            past, size = past or Past(piece.shape[0]), piece.shape
            for latent in piece.split(1, dim=2):
                frames = self._decode_chunk(latent, past)
                yield frames.clamp(-1, 1) if clamp else frames

    def _encode_chunk(self, video: Tensor, past: Past) -> Tensor:
        frames = _to_frames(video.to(self.dtype))
        moments = self.conv1(self.encoder(frames, past), past)
        past.first = False
        return _to_video(moments, past.batch)

    def _decode_chunk(self, latents: Tensor, past: Past) -> Tensor:
        offset, scale = self._normalisation(latents.device)
        z = _to_frames((latents.float() * scale + offset).to(self.dtype))
        frames = self.decoder(self.conv2(z, past), past)
        past.first = False
        return _to_video(frames, past.batch)

    def _normalisation(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the latents, float32 [z, 1, 1, 1]."""
        values = (self.config.latents_mean, self.config.latents_std)
        mean, std = torch.tensor(values, dtype=torch.float32, device=device)[..., None, None, None]
        return mean, std


class Encoder(nn.Module):
    """Pixels to the moments of the posterior: level by level fewer pixels and frames, more channels."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths = [config.base_dim * multiple for multiple in config.dim_mult]
        self.conv1 = CausalConv3d(RGB, config.base_dim, 3)
        self.downsamples = nn.ModuleList()
        width = config.base_dim
        for level, out in enumerate(widths):
            for _ in range(config.num_res_blocks):
                self.downsamples.append(ResidualBlock(width, out))
                width = out
            if level < len(config.temporal_downsample):
                self.downsamples.append(Downsample(out, temporal=config.temporal_downsample[level]))
        self.middle = _middle(width)
        self.head = _head(width, 2 * config.z_dim)

    def forward(self, video: Tensor, past: Past) -> Tensor:
        """Return moments [t · B, 2 z, H / 8, W / 8] of a chunk of frames [T · B, 3, H, W]."""
        x: Tensor = self.conv1(video, past)
        for block in (*self.downsamples, *self.middle):
            x = block(x, past)
        return _apply_head(self.head, x, past)


class Decoder(nn.Module):
    """Latents to pixels: level by level more pixels and frames, fewer channels."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths = [config.base_dim * multiple for multiple in reversed(config.dim_mult)]
        temporal = config.temporal_downsample[::-1]
        self.conv1 = CausalConv3d(config.z_dim, widths[0], 3)
        self.middle = _middle(widths[0])
        self.upsamples = nn.ModuleList()
        width = widths[0]
        for level, out in enumerate(widths):
            for _ in range(config.num_res_blocks + 1):
                self.upsamples.append(ResidualBlock(width, out))
                width = out
            if level < len(temporal):
                self.upsamples.append(Upsample(out, temporal=temporal[level]))
                width = out // 2
        self.head = _head(width, RGB)

    def forward(self, z: Tensor, past: Past) -> Tensor:
        """Return frames [T · B, 3, 8 h, 8 w] of a chunk of latents [t · B, z, h, w]."""
        x: Tensor = self.conv1(z, past)
        for block in (*self.middle, *self.upsamples):
            x = block(x, past)
        return _apply_head(self.head, x, past)


def _middle(width: int) -> nn.ModuleList:
    return nn.ModuleList((ResidualBlock(width, width), AttentionBlock(width), ResidualBlock(width, width)))


def _head(width: int, out: int) -> nn.ModuleDict:
    return nn.ModuleDict({"0": RMSNorm(width), "2": CausalConv3d(width, out, 3)})


def _apply_head(head: nn.ModuleDict, x: Tensor, past: Past) -> Tensor:
    norm, conv = head.values()
    out: Tensor = conv(F.silu(norm(x)), past)
    return out


def _to_frames(video: Tensor) -> Tensor:
    """Lay [B, C, T, H, W] out as frames [T · B, C, H, W], the channels of a pixel next to each other in memory."""
    return video.permute(2, 0, 3, 4, 1).contiguous().flatten(0, 1).movedim(-1, 1)


def _to_video(frames: Tensor, batch: int) -> Tensor:
    """View frames [T · B, C, H, W] as [B, C, T, H, W]."""
    video: Tensor = frames.unflatten(0, (-1, batch)).permute(1, 2, 0, 3, 4)
    return video


def _check_config(config: VaeConfig) -> None:
    if len(config.temporal_downsample) != len(config.dim_mult) - 1:
        raise CheckpointError(
            f"temporal_downsample has {len(config.temporal_downsample)} entries, "
            f"but the {len(config.dim_mult)} levels of dim_mult have {len(config.dim_mult) - 1} steps between them"
        )
    for name, values in (("latents_mean", config.latents_mean), ("latents_std", config.latents_std)):
        if len(values) != config.z_dim:
            raise CheckpointError(f"{name} has {len(values)} values for {config.z_dim} latent channels (z_dim)")
