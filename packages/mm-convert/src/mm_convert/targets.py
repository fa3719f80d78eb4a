"""A planned conversion, and the folders that it makes: what stands in them beside the tensors' bytes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from mm_convert.errors import OutputExistsError
from mm_convert.execution import Target, execute
from mm_convert.huggingface import INDEX, HuggingFaceFolder
from mm_convert.journal import MANIFEST
from mm_convert.layout import Layout
from mm_convert.megatron import CHECKPOINT_VERSION, RANK_FILE, TRACKER
from mm_convert.output import check_free, resolved
from mm_convert.plans import Plan, Spec, Specs
from mm_convert.restricted_pickle import DTYPES
from mm_convert.safetensors_file import SafetensorsLayout
from mm_convert.stacked import whole
from mm_convert.stored import StoredFile
from mm_convert.torch_layout import TorchLayout

if TYPE_CHECKING:
    from typing_extensions import Unpack

# The types that weights are computed in; others are packed forms, of which config.json speaks elsewhere.
COMPUTED = frozenset({"F32", "BF16", "F16"})

__all__ = ["Conversion", "RunOptions", "huggingface_target", "index", "megatron_target", "rank_sections"]


class RunOptions(TypedDict, total=False):
    """How a conversion is carried out.

    Attributes:
        overwrite: replace an existing checkpoint.
        resume: go on where an earlier run was broken off; a finished result is left as it is.
        workers: threads that copy (default: the processors, at most 4).
        ram_cap: bytes that the buffers of all workers may take together.
        fsync: force everything to the disk before the folder appears.
    """

    overwrite: bool
    resume: bool
    workers: int | None
    ram_cap: int | None
    fsync: bool


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """A conversion that was planned: nothing is written before :meth:`run`.

    Attributes:
        plan: what goes where, proved total.
        source: what is read, in words.
        files: the files that are read, by their names in the plan.
        target: the folder to write.
        folders: the folders that are read.
    """

    plan: Plan
    source: str
    files: Mapping[str, StoredFile]
    target: Target
    folders: Sequence[Path] = ()

    def __post_init__(self) -> None:
        """Refuse to write into a folder that is read.

        Raises:
            OutputExistsError: the target is that folder, or would stand in it.
        """
        target = self.target.directory
        for folder in self.folders:
            if resolved(target) == resolved(folder):
                raise OutputExistsError(
                    f"{target} can't be written: {folder}, which is read, stands in it, and the result is a folder of"
                    f" its own; give another one, {target.absolute().with_name(target.absolute().name + '-converted')}"
                    " for example"
                )
            if resolved(target).is_relative_to(resolved(folder)):
                raise OutputExistsError(
                    f"{target} can't be written: it would stand in {folder}, which is read and stays as it is; give a"
                    f" folder outside, {folder.absolute().with_name(folder.absolute().name + '-converted')} for"
                    " example"
                )

    def run(self, **how: Unpack[RunOptions]) -> Plan:
        """Carry it out.

        Args:
            how: see :class:`RunOptions`.

        Raises:
            ConvertError: see :mod:`mm_convert.errors`; nothing is left behind.
        """
        directory = self.target.directory
        # Whether a finished folder is what is wanted shows later.
        may_be_finished = how.get("resume", False) and (directory / MANIFEST).is_file()
        check_free(directory, overwrite=how.get("overwrite", False) or may_be_finished, sources=self.folders)
        execute(self.plan, self.files, self.target, **how)
        return self.plan


def megatron_target(
    plan: Plan, layout: Layout, directory: str | Path, options: Mapping[str, Any], *, generative: bool = False
) -> Target:
    """A Megatron-style folder.

    Args:
        plan: what it holds.
        layout: how the model is cut.
        directory: the folder.
        options: what the user chose.
        generative: rank files without virtual stages have no ``checkpoint_version``.
    """
    files = plan.files()
    numbers = {} if generative and layout.vpp_size == 1 else {"checkpoint_version": CHECKPOINT_VERSION}
    stem = RANK_FILE.removesuffix(".pt")
    layouts = {
        file: TorchLayout.of(stem, sections, {ref: plan.targets[ref] for ref in files.get(file, [])}, numbers)
        for file, sections in rank_sections(layout).items()
    }
    others = {TRACKER: b"release"}
    return Target(directory=Path(directory), layouts=layouts, inside="release", others=others, options=options)


def huggingface_target(
    written: Specs,
    template: HuggingFaceFolder,
    directory: str | Path,
    options: Mapping[str, Any],
    config: Mapping[str, Any] | None = None,
) -> Target:
    """A Hugging Face folder like the template, with its shards and whatever stands beside them.

    Where ``config.json`` names a type, it is that of the weights.

    Args:
        written: the tensors, in the template's files.
        template: the folder that it is made after.
        directory: the folder.
        options: what the user chose.
        config: its ``config.json``, if not the template's.
    """
    files: dict[str, dict[Any, Any]] = {}
    for ref, spec in written.items():
        files.setdefault(ref.file, {})[ref] = spec
    layouts = {file: SafetensorsLayout.of(held) for file, held in files.items()}
    others: dict[str, bytes | Path] = {path.name: path for path in template.other_files()}
    config = with_type_of(written.values(), template.config if config is None else config)
    if config != template.config:
        others["config.json"] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    others |= index(written, template.stem)
    return Target(directory=Path(directory), layouts=layouts, others=others, options=options)


def with_type_of(tensors: Iterable[Spec], config: Mapping[str, Any]) -> dict[str, Any]:
    """``config.json`` with the type that most bytes of the weights have, wherever it names one.

    Readers with ``dtype="auto"`` turn weights into what stands there. transformers 5 writes ``dtype``; published files
    and older readers have ``torch_dtype``, in the file itself or in its sections.
    """
    sizes: Counter[str] = Counter()
    for spec in tensors:
        sizes[spec.dtype] += spec.nbytes
    (found, _), *_ = sizes.most_common(1) or [("", 0)]
    named = {"dtype": DTYPES.get(found), "torch_dtype": DTYPES.get(found)} if found in COMPUTED else {}

    def typed(section: Mapping[str, Any]) -> dict[str, Any]:
        return {**section, **{key: name for key, name in named.items() if section.get(key) is not None}}

    return typed({key: typed(part) if isinstance(part, dict) else part for key, part in config.items()})


def rank_sections(layout: Layout) -> dict[str, list[str]]:
    """Every rank's file and the sections in it, those without a tensor included."""
    return {
        f"{layout.rank_dir(t, p, e)}/{RANK_FILE}": [
            layout.section(v * layout.pp_size + p) for v in range(layout.vpp_size)
        ]
        for t in range(layout.tp_size)
        for p in range(layout.pp_size)
        for e in range(layout.ep_size)
    }


def index(written: Specs, stem: str = "model") -> dict[str, bytes]:
    """The index of a Hugging Face folder's shards by its name; none if one file holds everything.

    Args:
        written: the tensors.
        stem: what the names of its weights begin with.
    """
    if {ref.file for ref in written} == {f"{stem}.safetensors"}:
        return {}
    weight_map = {ref.name: ref.file for ref in sorted(map(whole, written), key=lambda ref: ref.name)}
    nbytes = sum(spec.nbytes for spec in written.values())
    text = json.dumps({"metadata": {"total_size": nbytes}, "weight_map": weight_map}, indent=2)
    return {f"{stem}{INDEX}": (text + "\n").encode()}
