"""Tiles: exact where they must be, close where they only can be."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from wan_infer.config import VaeConfig
from wan_infer.errors import RequestError
from wan_infer.vae import WanVae
from wan_infer.vae_tiling import Tiling, decode_tiled, decode_tiled_stream, encode_tiled

CONFIG = VaeConfig(base_dim=8, z_dim=4, dim_mult=(1, 1, 2, 2), latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4)


@pytest.fixture(scope="module")
def vae() -> WanVae:
    torch.manual_seed(0)
    return WanVae(CONFIG).eval().requires_grad_(False)


def smooth(*shape: int) -> Tensor:
    noise = torch.randn(*shape[:3], 3, 3)
    return torch.nn.functional.interpolate(noise.flatten(0, 2)[:, None], shape[3:], mode="bicubic").view(shape)


@pytest.mark.parametrize(
    "tiling", [Tiling(), Tiling(size=7, overlap=3), Tiling(size=4, overlap=0), Tiling(size=1, overlap=0)]
)
def test_tiles_cover_every_length_and_share_what_they_should(tiling: Tiling) -> None:
    for length in range(1, 100):
        spans = tiling.spans(length)
        assert spans[0].start == 0
        assert spans[-1].stop == length
        assert all(0 < span.stop - span.start <= tiling.size for span in spans)
        assert all(a.stop - b.start == tiling.overlap for a, b in pairwise(spans))
        assert all(a.stop <= b.start for a, b in zip(spans, spans[2:], strict=False)), "never three at one place"


def test_one_tile_is_the_whole(vae: WanVae) -> None:
    latents, video = torch.randn(1, 4, 2, 4, 5), torch.rand(1, 3, 5, 32, 40)
    assert torch.equal(decode_tiled(vae, latents), vae.decode(latents))
    assert torch.equal(encode_tiled(vae, video), vae.encode(video))


def test_tiles_come_close_and_more_overlap_comes_closer(vae: WanVae) -> None:
    latents = smooth(1, 4, 2, 24, 30)
    whole = vae.decode(latents)
    errors = []
    for overlap in (0, 4, 12):
        tiled = decode_tiled(vae, latents, Tiling(size=24, overlap=overlap))
        errors.append((tiled - whole).square().mean().sqrt() / whole.std())
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.03


def test_encoding_in_tiles_comes_close(vae: WanVae) -> None:
    video = smooth(1, 3, 5, 128, 192).clamp(-1, 1)
    whole = vae.encode(video)
    assert (encode_tiled(vae, video, Tiling(size=16, overlap=8)) - whole).square().mean().sqrt() < 0.05 * whole.std()


def test_a_tile_does_not_see_beyond_its_edge(vae: WanVae) -> None:
    latents = smooth(1, 4, 1, 12, 12)
    changed = latents.clone()
    changed[..., 10:, 10:] += 1
    before, after = (decode_tiled(vae, x, Tiling(size=8, overlap=4)) for x in (latents, changed))
    assert torch.equal(before[..., :32, :32], after[..., :32, :32])
    assert not torch.equal(before, after)


def test_stream_of_tiles_is_the_tiled_video(vae: WanVae) -> None:
    latents = torch.randn(2, 4, 3, 6, 9)
    tiling = Tiling(size=5, overlap=2)
    pieces = list(decode_tiled_stream(vae, latents, tiling))
    assert [piece.shape[2] for piece in pieces] == [1, 4, 4]
    assert torch.equal(torch.cat(pieces, dim=2), decode_tiled(vae, latents, tiling, device="cpu"))


def test_bad_input(vae: WanVae) -> None:
    with pytest.raises(RequestError, match="size is 4 and overlap 3"):
        Tiling(size=4, overlap=3)
    with pytest.raises(RequestError, match="overlap -1"):
        Tiling(overlap=-1)
    for decode in (decode_tiled, decode_tiled_stream):
        with pytest.raises(RequestError, match="latents are"):
            decode(vae, torch.zeros(1, 3, 1, 2, 2))
    with pytest.raises(RequestError, match="nearest: 1 or 5"):
        encode_tiled(vae, torch.zeros(1, 3, 2, 16, 16))
