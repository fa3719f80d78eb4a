"""The VAE against diffusers' AutoencoderKLWan, and the properties that a causal stream has."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from wan_infer.config import VaeConfig
from wan_infer.errors import CheckpointError, RequestError
from wan_infer.vae import WanVae
from wan_infer.vae_layers import CausalConv3d, Past, convolve_pairs, upsampling_weight


def small(z_dim: int, **shape: Any) -> VaeConfig:
    mean, std = tuple(0.1 * i for i in range(z_dim)), tuple(1 + 0.1 * i for i in range(z_dim))
    return VaeConfig(z_dim=z_dim, latents_mean=mean, latents_std=std, **shape)


CONFIGS = {
    "published, narrow": VaeConfig(base_dim=8),
    "mini": small(4, base_dim=12, dim_mult=(1, 1, 2, 2)),
    "three levels": small(3, base_dim=8, dim_mult=(1, 2, 2), num_res_blocks=1, temporal_downsample=(True, True)),
    "frames halved once": small(5, base_dim=8, dim_mult=(1, 3, 2), temporal_downsample=(False, True)),
}
MINI = CONFIGS["mini"]

PARTS = {"conv1": "conv_in", "head.0": "norm_out", "head.2": "conv_out"}
MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
INNER = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2"}


def diffusers_name(name: str, config: VaeConfig) -> str:
    """The name in AutoencoderKLWan of a tensor with an original name."""
    name = re.sub("^conv([12])", lambda match: {"1": "quant_conv", "2": "post_quant_conv"}[match[1]], name)
    name = re.sub(r"(?<=coder\.)(conv1|head\.[02])", lambda match: PARTS[match[1]], name)
    name = re.sub(r"middle\.(\d)", lambda match: f"mid_block.{MIDDLE[match[1]]}", name)
    name = re.sub(r"residual\.\d", lambda match: INNER[match[0]], name).replace("shortcut", "conv_shortcut")
    return re.sub(r"upsamples\.(\d+)", lambda match: up_block(int(match[1]), config), name).replace(
        "downsamples", "down_blocks"
    )


def up_block(index: int, config: VaeConfig) -> str:
    level, block = divmod(index, config.num_res_blocks + 2)
    return f"up_blocks.{level}." + (f"resnets.{block}" if block <= config.num_res_blocks else "upsamplers.0")


def pair(config: VaeConfig) -> tuple[WanVae, Any]:
    """Our VAE and diffusers' with the same random weights."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    peer = diffusers.AutoencoderKLWan(
        base_dim=config.base_dim,
        z_dim=config.z_dim,
        dim_mult=list(config.dim_mult),
        num_res_blocks=config.num_res_blocks,
        temperal_downsample=list(config.temporal_downsample),
    )
    with torch.no_grad():
        for name, value in peer.named_parameters():
            if name.endswith("gamma"):
                value.uniform_(0.5, 1.5)
    ours, weights = WanVae(config), peer.state_dict()
    ours.load_state_dict({name: weights.pop(diffusers_name(name, config)) for name in ours.state_dict()})
    assert not weights, "every tensor of the peer is used"
    return ours.eval(), peer.eval()


def statistics(config: VaeConfig) -> tuple[Tensor, Tensor]:
    values = torch.tensor((config.latents_mean, config.latents_std))[..., None, None, None]
    return values[0], values[1]


@pytest.fixture(scope="module")
def mini() -> WanVae:
    torch.manual_seed(0)
    return WanVae(MINI).eval()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_is_diffusers_vae(config: VaeConfig) -> None:
    ours, peer = pair(config)
    mean, std = statistics(config)
    stride = config.spatial_stride
    for frames in (1, 5, 9, 13):
        video = torch.rand(2, 3, frames, 3 * stride, 5 * stride) * 2 - 1
        latents = torch.randn(2, config.z_dim, 1 + (frames - 1) // config.temporal_stride, 3, 5)
        with torch.inference_mode():
            posterior = peer.encode(video).latent_dist
            moments = ours.encode_moments(video)
            torch.testing.assert_close(moments[0], posterior.mean, atol=1e-5, rtol=0)
            torch.testing.assert_close(moments[1].clamp(-30, 20), posterior.logvar, atol=1e-5, rtol=0)
            torch.testing.assert_close(ours.encode(video), (posterior.mean - mean) / std, atol=1e-5, rtol=0)
            decoded = peer.decode(latents * std + mean).sample
            torch.testing.assert_close(ours.decode(latents), decoded, atol=1e-5, rtol=0)


def test_gradients_are_those_of_diffusers() -> None:
    ours, peer = pair(MINI)
    with torch.no_grad():
        for weight in (ours.get_parameter("decoder.head.2.weight"), peer.get_parameter("decoder.conv_out.weight")):
            weight.mul_(0.1)
    video = torch.rand(1, 3, 9, 16, 24) * 2 - 1
    mean, std = statistics(MINI)

    ours_z, _ = ours.encode_moments(video)
    torch.autograd.backward(ours.decode((ours_z - mean) / std, clamp=False).square().mean())
    peer_z = peer.encode(video).latent_dist.mean
    decoded = peer.decode(peer_z).sample
    assert decoded.abs().max() < 1, "clamping would hide gradients"
    torch.autograd.backward(decoded.square().mean())

    theirs = dict(peer.named_parameters())
    for name, value in ours.named_parameters():
        expected = theirs[diffusers_name(name, MINI)].grad
        torch.testing.assert_close(value.grad, expected, atol=1e-6, rtol=1e-3, msg=name)


def test_published_parameters() -> None:
    with torch.device("meta"):
        vae = WanVae(VaeConfig())
    shapes = {name: tuple(value.shape) for name, value in vae.state_dict().items()}
    count = {side: sum(p.numel() for p in getattr(vae, side).parameters()) for side in ("encoder", "decoder")}
    assert len(shapes) == 194
    assert round(sum(p.numel() for p in vae.parameters()) / 1e6, 1) == 126.9
    assert {side: round(n / 1e6, 1) for side, n in count.items()} == {"encoder": 53.6, "decoder": 73.3}
    expected = {
        "conv1.weight": (32, 32, 1, 1, 1),
        "conv2.bias": (16,),
        "encoder.conv1.weight": (96, 3, 3, 3, 3),
        "encoder.downsamples.0.residual.0.gamma": (96, 1, 1, 1),
        "encoder.downsamples.3.residual.2.weight": (192, 96, 3, 3, 3),
        "encoder.downsamples.3.shortcut.weight": (192, 96, 1, 1, 1),
        "encoder.downsamples.5.resample.1.weight": (192, 192, 3, 3),
        "encoder.downsamples.5.time_conv.weight": (192, 192, 3, 1, 1),
        "encoder.middle.1.norm.gamma": (384, 1, 1),
        "encoder.middle.1.to_qkv.weight": (1152, 384, 1, 1),
        "encoder.middle.2.residual.6.bias": (384,),
        "encoder.head.0.gamma": (384, 1, 1, 1),
        "encoder.head.2.weight": (32, 384, 3, 3, 3),
        "decoder.conv1.weight": (384, 16, 3, 3, 3),
        "decoder.upsamples.3.time_conv.weight": (768, 384, 3, 1, 1),
        "decoder.upsamples.3.resample.1.weight": (192, 384, 3, 3),
        "decoder.upsamples.14.residual.3.gamma": (96, 1, 1, 1),
        "decoder.head.2.weight": (3, 96, 3, 3, 3),
    }
    assert {name: shapes[name] for name in expected} == expected
    assert "encoder.downsamples.2.time_conv.weight" not in shapes, "the first level keeps its frames"


def test_stream_is_the_whole_bit_for_bit(mini: WanVae) -> None:
    latents = torch.randn(2, 4, 4, 2, 3)
    with torch.inference_mode():
        whole = mini.decode(latents)
        pieces = list(mini.decode_stream(latents))
        fed = list(mini.decode_stream(iter(torch.split(latents, [1, 2, 1], dim=2))))
    assert [piece.shape[2] for piece in pieces] == [1, 4, 4, 4]
    assert torch.equal(torch.cat(pieces, dim=2), whole)
    assert torch.equal(torch.cat(fed, dim=2), whole)


def test_streams_may_interleave_and_fail(mini: WanVae) -> None:
    one, two = torch.randn(2, 1, 4, 3, 2, 2).unbind(0)
    with torch.inference_mode():
        broken = mini.decode_stream(iter((one[:, :, :1], torch.zeros(1, 4, 1, 9, 9))))
        next(broken)
        with pytest.raises(RequestError, match="pieces of one video"):
            next(broken)
        together = list(zip(mini.decode_stream(one), mini.decode_stream(two), strict=True))
        for alone, streamed in zip((one, two), zip(*together, strict=True), strict=True):
            assert torch.equal(torch.cat(streamed, dim=2), mini.decode(alone))


def test_stream_asks_for_latents_only_when_it_needs_them(mini: WanVae) -> None:
    asked: list[int] = []

    def source() -> Iterator[Tensor]:
        for i in range(3):
            asked.append(i)
            yield torch.zeros(1, 4, 1, 1, 1)

    stream = mini.decode_stream(source())
    assert not asked
    next(stream)
    assert asked == [0]


def test_a_shorter_clip_is_a_prefix(mini: WanVae) -> None:
    video, latents = torch.rand(1, 3, 13, 16, 16), torch.randn(1, 4, 4, 2, 2)
    with torch.inference_mode():
        assert torch.equal(mini.encode(video[:, :, :5]), mini.encode(video)[:, :, :2])
        assert torch.equal(mini.decode(latents[:, :, :2]), mini.decode(latents)[:, :, :5])


def test_clamp_is_optional(mini: WanVae) -> None:
    latents = 100 * torch.randn(1, 4, 2, 2, 2)
    with torch.inference_mode():
        free = 50 * mini.decode(latents, clamp=False)
        assert free.abs().max() > 1
        assert torch.equal(mini.decode(latents), mini.decode(latents, clamp=False).clamp(-1, 1))


def test_bfloat16_weights_take_float32_latents(mini: WanVae) -> None:
    half = WanVae(MINI).eval()
    half.load_state_dict(mini.state_dict())
    half.to(torch.bfloat16)
    video = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    with torch.inference_mode():
        latents = mini.encode(video)
        rough = half.encode(video)
        decoded = half.decode(latents)
        assert rough.dtype == torch.float32
        assert decoded.dtype == torch.bfloat16
        torch.testing.assert_close(rough, latents, atol=0.05, rtol=0)
        torch.testing.assert_close(decoded.float(), mini.decode(latents), atol=0.05, rtol=0)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("chunks", [(1, 1, 1, 1, 1, 1), (1, 2, 3), (2, 4), (5, 1), (6,), (3, 3)])
def test_causal_convolution_is_a_padded_one_in_any_chunks(batch: int, chunks: tuple[int, ...]) -> None:
    layer = CausalConv3d(8, 9, 3).double()
    video = torch.randn(batch, 8, 6, 4, 5, dtype=torch.float64)
    padded = torch.nn.functional.pad(video, (0, 0, 0, 0, 2, 0))
    expected = torch.nn.functional.conv3d(padded, layer.weight, layer.bias, padding=(0, 1, 1))
    for dtype, atol in ((torch.float64, 1e-12), (torch.float32, 1e-5)):  # float32 goes in pairs where it can
        past = Past(batch)
        frames = video.movedim(2, 0).to(dtype)
        out = [layer.to(dtype)(chunk.flatten(0, 1), past) for chunk in torch.split(frames, list(chunks))]
        got = torch.unflatten(torch.cat(out), 0, (-1, batch)).movedim(0, 2)
        torch.testing.assert_close(got.double(), expected, atol=atol, rtol=0)


def test_pairs_are_the_convolution() -> None:
    frames, weight, bias = torch.randn(8, 2, 3, 4, 5), torch.randn(6, 3, 3, 3, 3), torch.randn(6)
    frames, weight, bias = frames.double(), weight.double(), bias.double()
    expected = torch.nn.functional.conv3d(frames.permute(1, 2, 0, 3, 4), weight, bias, padding=(0, 1, 1))
    got = torch.unflatten(convolve_pairs(frames, weight, bias), 0, (-1, 2)).permute(1, 2, 0, 3, 4)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


def test_upsampling_weight_is_doubling_then_convolving() -> None:
    x, weight = torch.randn(2, 3, 4, 5).double(), torch.randn(6, 3, 3, 3).double()
    doubled = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    expected = torch.nn.functional.conv2d(doubled, weight, padding=1)
    got = torch.nn.functional.conv_transpose2d(x, upsampling_weight(weight), stride=2, padding=1)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 4, 16, 16), "must be 4n[+]1, but is 4; nearest: 1 or 5"),
        ((1, 3, 11, 16, 16), "nearest: 9 or 13"),
        ((1, 3, 0, 16, 16), "but is 0; nearest: 1$"),
        ((1, 3, 5, 12, 16), "multiples of 8, but are 12 and 16"),
        ((1, 3, 5, 16, 20), "multiples of 8, but are 16 and 20"),
        ((1, 3, 5, 0, 16), "multiples of 8"),
        ((1, 4, 5, 16, 16), r"\[batch, 3, frames, height, width\]"),
        ((3, 5, 16, 16), r"this one is \[3, 5, 16, 16\]"),
    ],
)
def test_bad_videos(mini: WanVae, shape: tuple[int, ...], message: str) -> None:
    for encode in (mini.encode, mini.encode_moments):
        with pytest.raises(RequestError, match=message):
            encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 3, 2, 2, 2), (4, 2, 2, 2), (1, 4, 0, 2, 2), (1, 4, 2, 0, 2), (0, 4, 1, 2, 2)])
def test_bad_latents(mini: WanVae, shape: tuple[int, ...]) -> None:
    for decode in (mini.decode, mini.decode_stream):
        with pytest.raises(RequestError, match=r"latents are \[batch, 4, frames, height, width\]"):
            decode(torch.zeros(shape))


def test_bad_configs() -> None:
    with pytest.raises(CheckpointError, match="temporal_downsample has 3 entries, but the 2 levels"):
        WanVae(VaeConfig(dim_mult=(1, 2)))
    with pytest.raises(CheckpointError, match="latents_mean has 16 values for 4 latent channels"):
        WanVae(VaeConfig(z_dim=4))
