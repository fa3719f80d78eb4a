"""wan-mini: what it was trained on, that it can be trained again, and that it shows what it is asked for."""

from itertools import islice
from pathlib import Path

import pytest
import torch

from wan_infer.checkpoints.loading import load_vae, open_checkpoint
from wan_infer.config import LATENTS_MEAN, LATENTS_STD, TRANSFORMERS
from wan_infer.mini import train, wan_mini
from wan_infer.mini.clips import DIRECTIONS, FRAMES, SIZE, Clip, captions, digits, draw_clips, draw_video
from wan_infer.mini.judge import Judge, clean_judge, verdicts
from wan_infer.mini.words import make_tokenizer
from wan_infer.vae import WanVae


def clips(count: int, seed: int) -> list[Clip]:
    return list(islice(draw_clips(torch.Generator().manual_seed(seed)), count))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_digit_moves_as_its_caption_says(direction: str) -> None:
    image = digits()[0][3]
    video = draw_video(image, direction, torch.Generator().manual_seed(0))
    assert video.shape == (3, FRAMES, SIZE, SIZE)
    rows, columns = DIRECTIONS[direction]
    before, after = video[0, :-1], video[0, 1:]
    assert torch.equal(after, before.roll((2 * rows, 2 * columns), (1, 2))), "two pixels a frame, nothing cut off"
    assert torch.allclose((video[0, 0] + 1).sum(), image.sum() * 2)


def test_clips_are_drawn_again_from_the_same_seed() -> None:
    first, second, other = clips(8, 5), clips(8, 5), clips(8, 6)
    assert all(torch.equal(a.video, b.video) and a.caption == b.caption for a, b in zip(first, second, strict=True))
    assert [clip.caption for clip in first] != [clip.caption for clip in other]
    for clip in first:
        assert clip.direction in clip.caption
        assert clip.caption in captions()


def test_every_word_of_a_caption_has_a_token() -> None:
    tokenizer = make_tokenizer(captions())
    ids = [tokenizer(caption).input_ids for caption in captions()]
    assert not any(tokenizer.unk_token_id in row for row in ids)
    assert all(row[-1] == 1 for row in ids), "</s> is 1, as in UMT5"
    assert len({tuple(row) for row in ids}) == len(captions())
    assert tokenizer("The Digit 3 MOVES left").input_ids == tokenizer("the digit 3 moves left").input_ids
    assert tokenizer("色调艳丽").input_ids == [tokenizer.unk_token_id, 1]


def test_folding_leaves_the_reconstruction_and_normalises_the_latents() -> None:
    torch.manual_seed(0)
    vae = WanVae(train.VAE).eval()
    video = torch.stack([clip.video[:, :5] for clip in clips(3, 1)])
    with torch.no_grad():
        mean, _ = vae.encode_moments(video)
        constants = torch.tensor((LATENTS_MEAN, LATENTS_STD)).view(2, -1, 1, 1, 1)
        plain = vae.decode((mean - constants[0]) / constants[1], clamp=False)
        train.fold_normalisation(vae, mean)
        latents = vae.encode(video)
        folded = vae.decode(latents, clamp=False)
    assert (plain - folded).abs().max() <= 1e-4 * plain.abs().max()
    assert torch.allclose(latents.mean((0, 2, 3, 4)), torch.zeros(16), atol=1e-4)
    assert torch.allclose(latents.std((0, 2, 3, 4)), torch.ones(16), atol=1e-3)
    assert torch.allclose(latents, train.normalised(mean), atol=1e-4)


def test_training_writes_a_checkpoint(tmp_path: Path) -> None:
    """Two steps of everything: the result is a whole checkpoint of the same shape."""
    train.train(tmp_path / "new", train.Recipe(vae_steps=2, clips=16, cycles=((2, 1e-3), (1, 1e-4)), batch=4))
    made, carried = open_checkpoint(tmp_path / "new"), open_checkpoint(wan_mini())
    assert made.config == carried.config == TRANSFORMERS["t2v-mini"]
    names = {path.relative_to(made.path) for path in made.path.rglob("*") if path.is_file()}
    assert names == {path.relative_to(carried.path) for path in carried.path.rglob("*") if path.is_file()}


def test_training_refuses_a_folder_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["train", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        train.main()
    assert "exists already" in capsys.readouterr().err


def test_wan_mini_is_small() -> None:
    files = [path for path in wan_mini().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 6_000_000


@pytest.fixture(scope="module")
def judge() -> Judge:
    return clean_judge(600)


def test_the_judge_reads_clean_clips_and_reconstructions(judge: Judge) -> None:
    """It is no weaker than the bound it has to guard, and does not mind how the VAE paints."""
    unseen = clips(20, 99)
    assert sum(judge.read(clip.video) == (clip.digit, clip.direction) for clip in unseen) >= 19
    vae = load_vae(wan_mini())
    with torch.inference_mode():
        painted = vae.decode(vae.encode(torch.stack([clip.video for clip in unseen])))
    seen = [judge.read(video) for video in painted]
    assert sum(a == (b.digit, b.direction) for a, b in zip(seen, unseen, strict=True)) >= 19


def test_the_judge_is_not_pleased_by_anything(judge: Judge) -> None:
    """A clip that shows another digit, or goes another way, is not what was asked for."""
    images, labels = digits()
    for asked, shown in ((3, 8), (1, 7), (0, 6)):
        image = images[labels == shown][0]
        seen = judge.read(draw_video(image, "left", torch.Generator().manual_seed(1)))
        assert seen == (shown, "left") != (asked, "left")
    backwards = draw_video(images[0], "left", torch.Generator().manual_seed(1)).flip(1)
    assert judge.read(backwards)[1] == "right"


def test_wan_mini_tells_the_truth(judge: Judge) -> None:
    """Every digit in every direction, with seeds that training did not use; `wan_infer.mini.judge` does it with 200."""
    judged = list(verdicts(judge, 40, device="cpu"))
    wrong = [(verdict.asked, verdict.seen) for verdict in judged if verdict.asked != verdict.seen]
    assert len({verdict.asked for verdict in judged}) == 40
    assert len(wrong) <= 4, wrong
