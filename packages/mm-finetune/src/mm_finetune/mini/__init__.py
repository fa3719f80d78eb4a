"""A tiny Qwen2.5-VL or Qwen2-VL and a data set of real pictures, to try everything on a laptop without a download.

    >>> from mm_finetune.mini import make
    >>> make("demo", seed=0)

::

    demo/hf/                          a Hugging Face folder: random weights, tokenizer, image processor
    demo/data/images/                 digits of scikit-learn, crops of scikit-image's photographs
    demo/data/train.llava.json        LLaVA-Instruct records
    demo/data/heldout.llava.json      the same, of pictures that are not trained on
    demo/train.yaml                   for ``mm-finetune train``
"""

from __future__ import annotations

from pathlib import Path

from mm_finetune.errors import ConfigError
from mm_finetune.families import family_of
from mm_finetune.output import new_folder, require_free_folder

__all__ = ["make"]

TRAIN_YAML = """\
model:    {hf_dir: hf, load: mm}
data:     {path: data/train.json, seq_length: 128}
train:    {steps: 300, global_batch_size: 32, micro_batch_size: 16, lr: 1.0e-3, weight_decay: 0.05}
parallel: {tp_size: 1, pp_size: 2}
output:   {dir: run}
"""


def make(
    directory: str | Path,
    *,
    seed: int = 0,
    digits: int | None = None,
    heldout_digits: int = 300,
    family: str = "qwen2_5_vl",
    overwrite: bool = False,
    progress: bool = False,
) -> Path:
    """Make model and data; the folder appears when it is complete.

    Args:
        directory: the folder; it may exist if it is empty.
        seed: of the weights, the split and the crops. The same seed gives the same bytes with the same libraries.
        digits: handwritten digits to train on; default: all that are not held out.
        heldout_digits: handwritten digits to hold out.
        family: of the model, ``qwen2_5_vl`` or ``qwen2_vl``.
        overwrite: replace a folder that this function made, with everything in it.
        progress: show a bar, on a terminal.

    Returns:
        The folder.

    Raises:
        OutputExistsError: the folder is not empty.
        ConfigError: a number that can't be, or a library of the extra ``demo`` is missing.
    """
    family_of(family)
    folder = Path(directory).resolve()
    require_free_folder(folder, overwrite=overwrite, ours=_is_ours)
    try:
        from mm_finetune.mini import data, model, tokenizer

        digit_split = data.digits(seed=seed, train=digits, heldout=heldout_digits)
        photograph_split = data.photographs(seed=seed)
        split = data.Split(
            train=[*digit_split.train, *photograph_split.train],
            heldout=[*digit_split.heldout, *photograph_split.heldout],
        )
        said = [f"{example.question}\n{example.answer}" for example in split.train]
        trained = tokenizer.train_tokenizer([*data.prose(), *said])
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed: pip install 'mm-finetune[demo]'") from error
    with new_folder(folder) as temporary:
        data.write_data(temporary / "data", split, seed=seed, progress=progress)
        model.save_model(temporary / "hf", trained, seed=seed, family=family)
        (temporary / "train.yaml").write_text(TRAIN_YAML, encoding="utf-8")
    return folder


def _is_ours(folder: Path) -> bool:
    return all((folder / name).exists() for name in ("train.yaml", "hf/config.json", "data/train.llava.json"))
