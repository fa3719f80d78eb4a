"""The building blocks of the causal video VAE; each sees a chunk of frames and what is kept of the frames before.

Inside the VAE, frames are [N, C, H, W] with N = T · B and time slowest: a stretch of time is a slice, and a convolution
over space is two-dimensional. The channels of a pixel lie next to each other in memory, which the norm and the
convolutions like best. Attributes carry the names of the original checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Past:
    """What one stream remembers: for each causal convolution, the last frames that it saw.

    The state belongs to a call and not to the modules, so streams may run interleaved and a failed one leaves nothing.

    Attributes:
        batch: videos in the stream, the B of N = T · B.
        first: whether the chunk being processed begins with the very first frame of the stream.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.first = True
        self._frames: dict[nn.Module, Tensor] = {}

    def join(self, layer: nn.Module, x: Tensor, keep: int) -> Tensor:
        """Put the remembered frames of `layer` before `x`, and remember the last `keep` frames of the whole."""
        if layer in self._frames:
            x = torch.cat((self._frames[layer], x))
        self._frames[layer] = x[-keep * self.batch :].clone()  # a view would keep all of x alive
        return x


class CausalConv3d(nn.Conv3d):
    """A convolution that never looks ahead: zeros stand before the first frame of a stream, none behind the last.

    It is a sum over its taps in time, each a convolution over space of the frames that the tap sees; frames of zeros
    are not convolved at all. Pairs of frames take four such convolutions in place of six, see :func:`convolve_pairs`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int | tuple[int, int, int], *, time_stride: int = 1
    ) -> None:
        time, rows, columns = (kernel,) * 3 if isinstance(kernel, int) else kernel
        super().__init__(in_channels, out_channels, (time, rows, columns), padding=(0, rows // 2, columns // 2))
        self.time_stride = time_stride
        self.memory = time - time_stride  # frames before a chunk that its first output sees
        # Elsewhere the sums of frames cost more than the convolutions that they save.
        self.has_pairs = self.kernel_size == (3, 3, 3) and min(in_channels, out_channels) >= 8

    def forward(self, x: Tensor, past: Past) -> Tensor:  # type: ignore[override]  # a stream has a past
        """Return one frame for every `time_stride` frames."""
        count = len(x) // past.batch
        joined = past.join(self, x, self.memory) if self.memory else x
        absent = self.memory + count - len(joined) // past.batch  # frames before the first, which are zero
        if self.has_pairs and count % 2 == 0 and x.dtype == torch.float32:
            zeros = torch.zeros_like(joined[: absent * past.batch])
            joined = torch.cat((zeros, joined)) if absent else joined
            return convolve_pairs(joined.unflatten(0, (-1, past.batch)), self.weight, self.bias)
        frames = joined.unflatten(0, (-1, past.batch))
        *earlier, last = enumerate(self.weight.unbind(2))
        out = self._tap(*last, frames, absent, self.bias)
        for tap, weight in earlier:
            blank = max(absent - tap, 0)  # outputs for which this tap sees zeros
            if blank < count:
                out[blank * past.batch :] += self._tap(tap, weight, frames, absent)
        return out

    def _tap(self, tap: int, weight: Tensor, frames: Tensor, absent: int, bias: Tensor | None = None) -> Tensor:
        """Convolve those of the frames [T, B, C, H, W] that are under a tap, of which `absent` are missing in front."""
        end = len(frames) - (self.weight.shape[2] - 1 - tap)
        seen = frames[max(tap - absent, 0) : end : self.time_stride]
        return F.conv2d(seen.flatten(0, 1), weight, bias, padding=self.padding[1:])


class RMSNorm(nn.Module):
    """The channels of each pixel divided by their root mean square (arXiv 1910.07467), times `gamma`."""

    def __init__(self, channels: int, *, dims: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * dims))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normed frames, [N, C, H, W]."""
        x = x.movedim(1, -1)
        return F.rms_norm(x, x.shape[-1:], self.gamma.flatten(), eps=1e-24).movedim(-1, 1)


class ResidualBlock(nn.Module):
    """Twice norm, SiLU and causal convolution, added to the input."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.residual = nn.ModuleDict(  # the missing numbers are the original's activations and dropout
            {
                "0": RMSNorm(in_channels),
                "2": CausalConv3d(in_channels, out_channels, 3),
                "3": RMSNorm(out_channels),
                "6": CausalConv3d(out_channels, out_channels, 3),
            }
        )
        self.shortcut = CausalConv3d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, past: Past) -> Tensor:
        """Return [N, out_channels, H, W]."""
        norm1, conv1, norm2, conv2 = self.residual.values()
        update: Tensor = conv1(F.silu(norm1(x)), past)
        update = conv2(F.silu(norm2(update)), past)
        return update + (x if self.shortcut is None else self.shortcut(x, past))


class AttentionBlock(nn.Module):
    """One head of self-attention among the pixels of a frame, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, dims=2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.proj.weight)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        """Return [N, C, H, W]; frames do not see each other."""
        pixels = self.norm(x).movedim(1, -1).flatten(1, 2)[:, None]  # [N, 1, H·W, C]
        q, k, v = F.linear(pixels, self.to_qkv.weight.flatten(1), self.to_qkv.bias).chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(q, k, v)
        update: Tensor = F.linear(attended, self.proj.weight.flatten(1), self.proj.bias)
        update = update[:, 0].unflatten(1, x.shape[2:]).movedim(-1, 1)
        return x + update


class Downsample(nn.Module):
    """Half the rows and columns and, when asked, half the frames; the first frame of a stream has no partner."""

    def __init__(self, channels: int, *, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.Identity(), nn.Conv2d(channels, channels, 3, stride=2))
        self.time_conv = CausalConv3d(channels, channels, (3, 1, 1), time_stride=2) if temporal else None

    def forward(self, x: Tensor, past: Past) -> Tensor:
        """Return [N', C, H / 2, W / 2]; without `temporal` N' = N, otherwise T becomes 1 + (T - 1) / 2."""
        x = self.resample[1](F.pad(x, (0, 1, 0, 1)))
        if self.time_conv is None:
            return x
        if past.first:
            past.join(self.time_conv, x[: past.batch], self.time_conv.memory)
        return except_first(self.time_conv, x, past)


class Upsample(nn.Module):
    """Twice the rows and columns and, when asked, twice the frames; the first frame of a stream stays one."""

    def __init__(self, channels: int, *, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.Identity(), nn.Conv2d(channels, channels // 2, 3, padding=1))
        self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, past: Past) -> Tensor:
        """Return [N', C / 2, 2 H, 2 W]; without `temporal` N' = N, otherwise T becomes 1 + 2 (T - 1)."""
        if self.time_conv is not None:
            x = except_first(self._double_frames, x, past)
        weight, bias = self.resample[1].parameters()
        return F.conv_transpose2d(x, upsampling_weight(weight), bias, stride=2, padding=1)

    def _double_frames(self, x: Tensor, past: Past) -> Tensor:
        assert self.time_conv is not None, "only called with one"
        pairs: Tensor = self.time_conv(x, past).movedim(1, -1).unflatten(-1, (2, -1)).unflatten(0, (-1, past.batch))
        return pairs.movedim(-2, 1).flatten(0, 2).movedim(-1, 1)  # from [T, B, H, W, 2, C] to [T, 2, B, H, W, C]


def convolve_pairs(frames: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve frames in time and space by Winograd's F(2, 3) in time (arXiv 1509.09308).

    Two neighbouring outputs of three taps g are a + b + c and b - c + d, where a = (x0 - x2) g0, d = (x3 - x1) g2,
    b = (x1 + x2) (g0 + g1 + g2) / 2 and c = (x2 - x1) (g0 - g1 + g2) / 2: four products of a frame and a kernel in
    place of six. In float32 the rounding error is 1.3 times that of the plain sum; coarser formats keep to that sum.

    Args:
        frames: [2 + T, B, C, H, W], T even.
        weight: [out, C, 3, 3, 3].
        bias: [out].

    Returns:
        [T · B, out, H, W].
    """
    x0, x1, x2, x3 = (frames[i : len(frames) - 2 + i : 2] for i in (0, 1, 2, 3))
    g0, g1, g2 = weight.unbind(2)
    outer, inner = (g0 + g2) / 2, g1 / 2
    b = F.conv2d((x1 + x2).flatten(0, 1), outer + inner, padding=1)
    c = F.conv2d((x2 - x1).flatten(0, 1), outer - inner, padding=1)
    even = F.conv2d((x0 - x2).flatten(0, 1), g0, bias, padding=1).add_(b).add_(c)  # a + b + c
    odd = F.conv2d((x3 - x1).flatten(0, 1), g2, bias, padding=1).add_(b).sub_(c)  # d + b - c
    pairs = torch.stack([x.movedim(1, -1).unflatten(0, (-1, frames.shape[1])) for x in (even, odd)], dim=1)
    return pairs.flatten(0, 2).movedim(-1, 1)  # [T / 2, 2, B, H, W, out] to frames


def upsampling_weight(weight: Tensor) -> Tensor:
    """Return the weight [C, out, 4, 4] of the transposed convolution that equals doubling pixels, then convolving.

    A pixel of the small grid becomes a pair, and an output sees two pairs in each direction, not three pixels: 16
    multiplications instead of 36. Weights of taps that see the same pixel are added up.

    Args:
        weight: [out, C, 3, 3], of the convolution over the doubled pixels.
    """
    pairs = weight.new_tensor(((0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0)))
    return (pairs @ weight @ pairs.T).transpose(0, 1)


def except_first(function: Callable[[Tensor, Past], Tensor], x: Tensor, past: Past) -> Tensor:
    """Apply a function to every frame but the very first one of the stream."""
    if not past.first:
        return function(x, past)
    first, rest = x[: past.batch], x[past.batch :]
    return torch.cat((first, function(rest, past))) if len(rest) else first
