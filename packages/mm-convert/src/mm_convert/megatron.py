"""Megatron-style folders: a tracker file, an iteration, one file a rank.

::

    DIR/latest_checkpointed_iteration.txt          "release", or a decimal iteration
    DIR/release/mp_rank_00[_000][_000]/model_optim_rng.pt    {"model": {name: tensor}, "checkpoint_version": 3.0}
"""

from __future__ import annotations

import argparse
import pickle
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from mm_convert import vocabulary
from mm_convert.errors import CheckpointError, LayoutError
from mm_convert.families import CONVERTERS
from mm_convert.families.family import LAYER_NAMES
from mm_convert.journal import read_manifest
from mm_convert.layout import PARTS, RANK_DIR, GivenLayout, LayerLists, Layout, Part, Ranks
from mm_convert.layout import RANK_FILE as RANK_FILE
from mm_convert.plans import Ref, Spec, Specs
from mm_convert.restricted_pickle import DTYPES
from mm_convert.stored import StoredFile
from mm_convert.torch_file import read_torch_file

TRACKER = "latest_checkpointed_iteration.txt"
CHECKPOINT_VERSION = 3.0  # without it Megatron takes the file for version 0 and reorders QKV


PREFIXES: dict[Part, str] = {"vit": "image_encoder.", "audio": "audio_encoder."}
EMBEDDING = "text_decoder.embedding.word_embeddings.weight"
FINAL_NORM = "text_decoder.decoder.final_layernorm.weight"
EXPERT = ".local_experts."


@dataclass(frozen=True, kw_only=True)
class MegatronFolder:
    """A checkpoint folder as found on disk.

    Attributes:
        directory: the iteration's folder (``DIR/release`` or ``DIR/iter_0001000``).
        layout: the layout that its folders and tensor names show.
        tensors: every tensor; files are named from `directory` on.
        files: where the tensors' bytes stand.
        vocabulary: tokens of the model, as the folder's manifest tells; 0 if it does not. The tensors may have more
            rows than that.
    """

    directory: Path
    layout: Layout
    tensors: dict[Ref, Spec]
    files: dict[str, StoredFile]
    vocabulary: int = 0

    @classmethod
    def open(cls, directory: str | Path, given: Layout | GivenLayout | None = None) -> MegatronFolder:
        """Read the tracker, the rank folders and the tensors' names and shapes (no data).

        Args:
            directory: the folder with the tracker.
            given: what the caller believes of the layout.

        Raises:
            CheckpointError: incomplete or unreadable.
            LayoutError: the layout is not the given one.
        """
        iteration = iteration_dir(Path(directory))
        read = {
            f"{path.parent.name}/{path.name}": read_torch_file(path)
            for path in sorted(iteration.glob(f"mp_rank_*/{RANK_FILE}"))
        }
        files = {file: stored for file, (stored, _) in read.items()}
        tensors = {Ref(file, *name): spec for file, stored in files.items() for name, spec in stored.specs.items()}
        # Counted from the sections: the last virtual stage may hold no tensor.
        vpp_size = max((len(sections) for _, sections in read.values()), default=1)
        layout = layout_on_disk(tensors, _rank_sizes(iteration, tensors), vpp_size)
        found = vocabulary.rows(tensors, layout)
        tokens, multiple = vocabulary.recorded(read_manifest(Path(directory)), found)
        if given is not None and given.make_vocab_size_divisible_by:
            multiple = vocabulary.checked(given.make_vocab_size_divisible_by, found, iteration)
        layout = replace(layout, make_vocab_size_divisible_by=multiple)
        if isinstance(given, GivenLayout):
            given.check(layout, iteration)
        elif given is not None and replace(given, make_vocab_size_divisible_by=multiple) != layout:
            raise LayoutError(f"given: {given}; but {iteration} holds: {layout}")
        return cls(directory=iteration, layout=layout, tensors=tensors, files=files, vocabulary=tokens)


def iteration_dir(directory: Path) -> Path:
    """The folder that the tracker file names.

    Raises:
        CheckpointError: no tracker, or it names nothing.
    """
    tracker = directory / TRACKER
    if not tracker.is_file():
        raise CheckpointError(
            f"{directory} is no Megatron checkpoint: it has no {TRACKER} (an interrupted run has none)"
        )
    text = tracker.read_text().strip()
    name = "release" if text == "release" else f"iter_{int(text):07d}" if text.isdigit() else None
    if name is None or not (directory / name).is_dir():
        raise CheckpointError(
            f"{tracker} says {text!r}; it must say 'release' or the number of an iteration that is there"
        )
    return directory / name


def load_rank_file(path: Path) -> dict[str, dict[str, Any]]:
    """The sections (``model``, or ``model0``, ``model1``, …) of a rank's file; tensors are memory mapped.

    Raises:
        CheckpointError: unreadable, or it asks to run code.
    """
    import torch

    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} can't be read as a checkpoint: {str(error).splitlines()[0]}") from error
    sections = (
        {k: v for k, v in content.items() if re.fullmatch(r"model\d*", str(k))} if isinstance(content, dict) else {}
    )
    if not sections:
        raise CheckpointError(f"{path} has no entry 'model'; is it a Megatron checkpoint?")
    return {
        section: {
            name: t for name, t in names.items() if isinstance(t, torch.Tensor) and not name.endswith("_extra_state")
        }
        for section, names in sections.items()
    }


def spec_of(tensor: Any) -> Spec:
    """The header of a torch tensor."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    known = {name: key for key, name in DTYPES.items()}
    if dtype not in known:
        raise CheckpointError(f"a tensor has dtype {dtype}; known: {', '.join(known)}")
    return Spec(known[dtype], tuple(tensor.shape))


def _rank_sizes(iteration: Path, tensors: Iterable[Ref]) -> Ranks:
    """Tensor-, pipeline- and expert-parallel size, from the folders' names."""
    matches = [RANK_DIR.fullmatch(path.name) for path in iteration.glob("mp_rank_*")]
    numbers = [tuple(int(number) for number in m.groups() if number) for m in matches if m]
    if not numbers or len(numbers) != len(matches) or len({len(n) for n in numbers}) != 1:
        raise CheckpointError(
            f"{iteration} holds no folders mp_rank_TT, mp_rank_TT_PPP or mp_rank_TT_PPP_EEE, or others beside them"
        )
    sizes = [max(column) + 1 for column in zip(*numbers, strict=True)]
    held = {n for n, m in zip(numbers, matches, strict=True) if m and (iteration / m[0] / RANK_FILE).is_file()}
    absent = [n for n in product(*map(range, sizes)) if n not in held]
    if absent:
        raise CheckpointError(
            f"{iteration} is incomplete: no {RANK_FILE} for ranks {absent[:8]} of mp_rank_TT[_PPP][_EEE]; copy it again"
        )
    if 1 in sizes[1:]:
        raise CheckpointError(
            f"{iteration} is incomplete: {sorted(m[0] for m in matches if m)[0]} is the name of one of several pipeline"
            " or expert-parallel ranks, and the others are not there; copy it again (a single one is named without:"
            " mp_rank_00)"
        )
    if len(sizes) == 2 and _is_experts(tensors, len(numbers)):
        return Ranks(sizes[0], 1, sizes[1])
    return Ranks(*[*sizes, 1, 1][:3])


def _is_experts(tensors: Iterable[Ref], ranks: int) -> bool:
    """Whether ranks with two numbers hold different experts rather than different layers.

    Then each of them holds all names, the embedding's among them; in a pipeline one rank does.
    """
    names: dict[str, set[str]] = defaultdict(set)
    for ref in tensors:
        names[ref.file].add(ref.name)
    alike = len(names) == ranks and len(set(map(frozenset, names.values()))) == 1
    return alike and any(EXPERT in name for name in next(iter(names.values())))


def layout_on_disk(tensors: Specs, sizes: Ranks, vpp_size: int) -> Layout:
    """The layout that tensors' names and shapes show.

    Args:
        tensors: every rank's.
        sizes: how many ranks there are.
        vpp_size: how many virtual stages.

    Raises:
        CheckpointError: layers that no family's layout has.
    """
    bare = Layout(llm_pp_layers=((1,) * sizes.pp,) * vpp_size, tp_size=sizes.tp, ep_size=sizes.ep)
    layers: dict[tuple[Part, int], set[str]] = defaultdict(set)
    for ref in tensors:
        for part, pattern in _layer_patterns().items():
            match = pattern.match(ref.name)
            if match:
                layers[part, bare.stage(ref)].add(match[1])
    lists = {
        part: tuple(tuple(len(layers[part, v * sizes.pp + p]) for p in range(sizes.pp)) for v in range(vpp_size))
        for part in PARTS
    }
    own_tp = {part: _own_tp(tensors, part, sizes.tp) for part in ("vit", "audio")}
    return Layout(
        llm_pp_layers=lists["llm"],
        vit_pp_layers=_once(lists["vit"], _repetition(tensors, bare, "vit")),
        audio_pp_layers=_once(lists["audio"], _repetition(tensors, bare, "audio")),
        tp_size=sizes.tp,
        ep_size=sizes.ep,
        vit_tp_size=own_tp["vit"],
        audio_tp_size=own_tp["audio"],
        ldt=_is_ldt(tensors, bare, lists["llm"]),
    )


@cache
def _layer_patterns() -> dict[Part, re.Pattern[str]]:
    """The names of each part's layers, of all families together: a folder doesn't say whose it is."""
    known = [LAYER_NAMES, *(family.layer_names for family in CONVERTERS.values())]
    prefixes = {part: sorted({re.escape(names[part]) for names in known if part in names}) for part in PARTS}
    return {part: re.compile(rf"(?:{'|'.join(names)})(\d+)\.") for part, names in prefixes.items()}


def _repetition(tensors: Iterable[Ref], bare: Layout, part: Part) -> int:
    """After how many pipeline ranks a part begins anew: seen by what it holds once, outside of its layers."""
    outside: dict[str, set[int]] = defaultdict(set)
    for ref in tensors:
        if ref.name.startswith(PREFIXES[part]) and not _layer_patterns()[part].match(ref.name):
            outside[ref.name].add(bare.stage(ref))
    stages = sorted(outside[min(outside)]) if outside else []
    return stages[1] - stages[0] if len(stages) > 1 and bare.vpp_size == 1 else bare.pp_size


def _once(lists: LayerLists, repetition: int) -> LayerLists:
    return tuple(row[:repetition] for row in lists)


def _own_tp(tensors: Specs, part: Part, tp_size: int) -> int:
    """Over how many ranks a part is cut: the output projection of attention is square before it is."""
    for ref, spec in tensors.items():
        if ref.name.startswith(PREFIXES[part]) and ref.name.endswith(".self_attention.linear_proj.weight"):
            cut, rest = divmod(spec.shape[0], spec.shape[1])
            return cut if not rest and tp_size % cut == 0 else 0
    return 0


def _is_ldt(tensors: Iterable[Ref], bare: Layout, llm: LayerLists) -> bool:
    """Whether the language model's ends stand elsewhere than beside its first and last layer."""
    if not any(map(any, llm)):
        return False
    plain = Layout(llm_pp_layers=llm)
    ends = {EMBEDDING: plain.first_stages("llm"), FINAL_NORM: plain.last_stages("llm")}
    return any(ref.name in ends and [bare.stage(ref)] != ends[ref.name] for ref in tensors)
