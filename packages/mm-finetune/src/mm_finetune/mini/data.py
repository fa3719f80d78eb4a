"""Questions about real pictures: handwritten digits of scikit-learn, photographs inside scikit-image's wheel."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from mm_finetune.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

DIGIT_QUESTION = "Which digit is this?"
PHOTOGRAPH_QUESTION = "Which photograph is this a part of?"
COLOUR_QUESTION = "Is this picture in colour?"

PHOTOGRAPHS = {
    "astronaut.png": "astronaut",
    "brick.png": "bricks",
    "camera.png": "cameraman",
    "chelsea.png": "cat",
    "coffee.png": "coffee",
    "coins.png": "coins",
    "grass.png": "grass",
    "gravel.png": "gravel",
    "hubble_deep_field.jpg": "galaxies",
    "moon.png": "moon",
    "retina.jpg": "retina",
    "rocket.jpg": "rocket",
}

DIGIT_PIXELS = 56
CROP_PIXELS = 112
TILES = 6  # along the shorter side of a photograph
HELDOUT_SHARE = 0.25
CROPS_PER_TILE = 3  # of training; a held-out tile is taken once, whole
MIN_CONTRAST = 8.0  # standard deviation of the grey values, of 255: flatter tiles show nothing


@dataclass(frozen=True, kw_only=True)
class Example:
    """A picture with one question and its answer."""

    name: str
    picture: Image
    question: str
    answer: str

    def record(self) -> dict[str, object]:
        """The LLaVA-Instruct record."""
        turns = [("human", f"<image>\n{self.question}"), ("gpt", self.answer)]
        return {
            "id": self.name,
            "image": f"{self.name}.png",
            "conversations": [{"from": who, "value": value} for who, value in turns],
        }


@dataclass(frozen=True, kw_only=True)
class Split:
    """What is trained on, and what is only asked."""

    train: Sequence[Example]
    heldout: Sequence[Example]


def digits(*, seed: int, train: int | None, heldout: int) -> Split:
    """Handwritten digits, 8 x 8 pixels enlarged to 56 x 56; no digit is in both parts.

    Args:
        seed: which digits are held out.
        train: how many to train on; None: all that are left.
        heldout: how many to hold out.

    Raises:
        ConfigError: there are not so many.
    """
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    bunch = load_digits()
    count = len(bunch.target)
    taken = count - heldout if train is None else train
    if not (heldout >= 1 <= taken <= count - heldout):
        raise ConfigError(
            f"{taken} training digits and {heldout} held out were asked for; each must be 1 or more, and together"
            f" not above {count}"
        )

    def example(index: int) -> Example:
        grey = np.rint(bunch.images[index] * (255 / 16)).astype(np.uint8)
        picture = Image.fromarray(grey).resize((DIGIT_PIXELS, DIGIT_PIXELS), Image.Resampling.BICUBIC)
        answer = str(bunch.target[index])
        return Example(name=f"digits/{index:04d}", picture=picture, question=DIGIT_QUESTION, answer=answer)

    order = random.Random(seed).sample(range(count), heldout + taken)
    return Split(
        train=[example(index) for index in order[heldout:]], heldout=[example(index) for index in order[:heldout]]
    )


def photographs(*, seed: int) -> Split:
    """Square crops of photographs; held-out crops share no pixel with training crops.

    Each photograph is cut into tiles, a quarter of which is held out. Every crop is asked two questions; for the one
    about colour, half of the crops of the colour photographs are turned to grey.
    """
    rng = random.Random(seed)
    train: list[Example] = []
    heldout: list[Example] = []
    for file, subject in PHOTOGRAPHS.items():
        found = list(tiles(_photograph(file)))
        rng.shuffle(found)
        kept = round(len(found) * HELDOUT_SHARE)
        for number, tile in enumerate(found):
            name = f"photographs/{subject}-{number:02d}"
            if number < kept:
                heldout += _questions(name, tile, subject, rng)
                continue
            for part in range(CROPS_PER_TILE):
                train += _questions(f"{name}-{part}", part_of(tile, rng), subject, rng)
    return Split(train=train, heldout=heldout)


def is_colour(picture: Image) -> bool:
    """Whether any pixel has different red, green and blue."""
    red, green, blue = (channel.tobytes() for channel in picture.convert("RGB").split())
    return not red == green == blue


def prose() -> list[str]:
    """English text that scikit-learn carries: the descriptions of its data sets."""
    folder = resources.files("sklearn.datasets") / "descr"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".rst")), key=lambda file: file.name)
    return [file.read_text(encoding="utf-8") for file in files]


def write_data(folder: Path, split: Split, *, seed: int, progress: bool = False) -> None:
    """Write ``images/`` and ``{train,heldout}.llava.json``, the training records shuffled.

    `progress` shows a bar, on a terminal.
    """
    from tqdm import tqdm

    train = list(split.train)
    random.Random(seed).shuffle(train)
    for part, examples in {"train": train, "heldout": split.heldout}.items():
        # disable=None: silent where there is no terminal.
        for example in tqdm(examples, desc=part, unit="pictures", delay=1, disable=None if progress else True):
            path = folder / "images" / f"{example.name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            example.picture.save(path, compress_level=1)  # a third of the time, a tenth larger
        records = [json.dumps(example.record(), ensure_ascii=False) for example in examples]
        text = "[\n" + ",\n".join(records) + "\n]\n"
        (folder / f"{part}.llava.json").write_text(text, encoding="utf-8")


def _photograph(file: str) -> Image:
    from PIL import Image

    with resources.as_file(resources.files("skimage.data") / file) as path, Image.open(path) as picture:
        whole: Image.Image = picture.copy()
        return whole


def tiles(picture: Image) -> Iterator[Image]:
    """Squares side by side that share no pixel, without those that show nothing."""
    from PIL import ImageStat

    side = min(picture.size) // TILES
    for top in range(0, picture.height - side + 1, side):
        for left in range(0, picture.width - side + 1, side):
            tile = picture.crop((left, top, left + side, top + side))
            if ImageStat.Stat(tile.convert("L")).stddev[0] >= MIN_CONTRAST:
                yield tile


def part_of(tile: Image, rng: random.Random) -> Image:
    """A square of 60 to 100 % of a tile, half of the time mirrored."""
    from PIL import ImageOps

    side = rng.randint(round(tile.width * 0.6), tile.width)
    left, top = rng.randint(0, tile.width - side), rng.randint(0, tile.height - side)
    part = tile.crop((left, top, left + side, top + side))
    return ImageOps.mirror(part) if rng.random() < 0.5 else part


def _questions(name: str, crop: Image, subject: str, rng: random.Random) -> Iterator[Example]:
    from PIL import Image

    picture = crop.resize((CROP_PIXELS, CROP_PIXELS), Image.Resampling.BICUBIC)
    yield Example(name=name, picture=picture, question=PHOTOGRAPH_QUESTION, answer=subject)
    toned = picture.convert("L") if rng.random() < 0.5 else picture
    answer = "yes" if is_colour(toned) else "no"
    yield Example(name=f"{name}-tone", picture=toned, question=COLOUR_QUESTION, answer=answer)
