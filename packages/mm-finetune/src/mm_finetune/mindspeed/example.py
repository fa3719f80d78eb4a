"""``data.json``, ``model.json`` and a shell script, put together."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from mm_finetune.config import TrainConfig
from mm_finetune.config_tree import section_of
from mm_finetune.errors import DataError
from mm_finetune.mindspeed.script import training_arguments
from mm_finetune.mindspeed.tables import ATTRIBUTES, DATA, DEFAULTS, FLAGS, HEADINGS, MODULES, Key, Remark, Words

SECTIONS = ("model", "data", "train", "lora", "parallel", "output")
PATHS = ("model.hf_dir", "model.load", "data.path", "data.dataset_dir", "data.cache_dir", "output.dir")


@dataclass(frozen=True, kw_only=True)
class Imported:
    """A configuration, and what did not get into it.

    Attributes:
        tree: sections with keys, as in a YAML file.
        remarks: every other flag and field.
    """

    tree: dict[str, dict[str, Any]]
    remarks: tuple[Remark, ...]

    @property
    def yaml(self) -> str:
        """The text of the YAML file, a section a line where it fits."""
        import yaml

        return "".join(
            yaml.safe_dump({name: self.tree[name]}, sort_keys=False, allow_unicode=True, width=110)
            if len(str(self.tree[name])) > 400
            else f"{name}: {_flow(self.tree[name])}"
            for name in SECTIONS
            if self.tree.get(name)
        )

    def describe(self) -> str:
        """The remarks, for a terminal: what needs a decision first."""
        parts = []
        for kind, heading in HEADINGS.items():
            found = [f"  {remark.item}: {remark.why}" for remark in self.remarks if remark.kind == kind]
            if found:
                parts.append("\n".join([f"What {heading}:", *found]))
        return "\n".join(parts)


def import_example(data: str | Path, model: str | Path, script: str | Path, *, beside: str | Path) -> Imported:
    """Read a published example.

    Args:
        data: its data.json.
        model: its model.json.
        script: its shell script; nothing of it is run.
        beside: the YAML file that will be written: relative paths of the example, which are relative to the folder
            that one stands in, become relative to it.

    Raises:
        DataError: a file is missing or is no such file.
    """
    flags = training_arguments(_text(Path(script)))
    fields_of_data, fields_of_model = _json(Path(data)), _json(Path(model))
    if "dataset_param" not in fields_of_data:
        where = f"; {model} does: give it first" if "dataset_param" in fields_of_model else ""
        raise DataError(f"{data} holds no dataset_param, as the data.json of an example does{where}")
    found: dict[str, Any] = {}
    remarks = [
        *_flag_keys(flags, found),
        *_data_keys(fields_of_data, found),
        *_model_keys(fields_of_model, found),
        *_habits(flags, found),
    ]
    base = Path(beside).absolute().parent
    for key in PATHS:
        if key in found:
            found[key] = Path(os.path.relpath(found[key], base)).as_posix()
    return Imported(tree=_tree(DEFAULTS | found), remarks=tuple(remarks))


def _flag_keys(flags: Mapping[str, list[str]], found: dict[str, Any]) -> Iterator[Remark]:
    for flag, values in flags.items():
        text = " ".join([flag, *values])
        if flag == "--lora-target-modules":
            found["lora.target_modules"] = [part for value in values for part in MODULES.get(value, (value,))]
            continue
        rule = FLAGS.get(flag)
        value = values[0] if values else None
        if rule is None:
            yield Remark(kind="missing", item=text, why="it is not known here")
        elif isinstance(rule, Words):
            yield _remark(rule, text, value)
        else:
            _put(rule, value, text, found)
    if "--lr-decay-style" not in flags:
        yield Remark(kind="missing", item="(no --lr-decay-style)", why="Megatron's is then linear; here it is a cosine")


def _put(rule: Key, value: Any, item: str, found: dict[str, Any]) -> None:
    try:
        read = rule.read(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"{item}: this is not a value for {rule.name}: {error}") from error
    if read is not None:
        found[rule.name] = read


def _remark(rule: Words, item: str, value: Any) -> Remark:
    if rule.usual is not None and value in rule.usual:
        return Remark(kind="same", item=item, why="always so here")
    return Remark(kind=rule.kind, item=item, why=rule.why)


def _data_keys(tree: Mapping[str, Any], found: dict[str, Any]) -> Iterator[Remark]:
    for name, value in _leaves(tree):
        short = name.removeprefix("dataset_param.") if name != "dataset_param.dataset_type" else name
        rule = DATA.get(short)
        if short.startswith("attr."):
            if value is not None and ATTRIBUTES.get(short.removeprefix("attr.")) != value:
                why = "records have the columns that mm-datafmt writes; convert the file with it"
                yield Remark(kind="missing", item=f"{name}: {value}", why=why)
        elif isinstance(rule, Key):
            _put(rule, value, name, found)
        elif isinstance(rule, Words):
            yield _remark(rule, f"{name}: {value}", value)
        elif value not in (None, False):
            yield Remark(kind="missing", item=f"{name}: {value}", why="it is not known here")
    first, *others = str(found.get("data.path", "")).split(",")
    if others:
        found["data.path"] = first
        why = "one file is read; join them with mm-datafmt convert"
        yield Remark(kind="missing", item=f"dataset_param.basic_parameters.dataset: {','.join(others)}", why=why)


def _model_keys(tree: Mapping[str, Any], found: dict[str, Any]) -> Iterator[Remark]:
    leaves = dict(_leaves(tree))
    # The vision tower is frozen unless the example says otherwise, the projector is not.
    if leaves.pop("image_encoder.vision_encoder.freeze", True):
        found["train.freeze"] = ["visual.patch_embed.*", "visual.blocks.*"]
    if leaves.pop("image_encoder.vision_projector.freeze", False):
        found["train.freeze"] = ["visual.*"] if "train.freeze" in found else ["visual.merger.*"]
    granularity = leaves.pop("text_decoder.recompute_granularity", None)
    if granularity:
        found["train.recompute"] = granularity
    lists = {
        "vit_pp_layers": leaves.pop("image_encoder.vision_encoder.pipeline_num_layers", None),
        "llm_pp_layers": leaves.pop("text_decoder.pipeline_num_layers", None),
    }
    for name, layers in lists.items():
        if layers:
            rows = layers if isinstance(layers[0], list) else [layers]
            text = json.dumps(rows, separators=(",", ":"))
            why = f"the layout is that of model.load: mm-convert … --cfg.parallel_config.{name} {text}"
            yield Remark(kind="same", item=f"pipeline_num_layers: {layers}", why=why)
    rest = ", ".join(name for name, value in leaves.items() if value is not None)
    if rest:
        yield Remark(kind="same", item=rest, why="the model is what hf_dir/config.json says")


def _habits(flags: Mapping[str, list[str]], found: dict[str, Any]) -> Iterator[Remark]:
    """What MindSpeed MM does without being told."""
    found |= {"data.truncate": "trim_text", "data.on_bad": "skip"}
    if "data.pixel_cap" in found:
        found["data.resample"] = "nearest"
    if not {"--calculate-per-token-loss", "--calculate-per-sample-loss"} & flags.keys():
        # The mean of a micro-batch of one sample is the sample's own.
        found["train.loss"] = "sample"
        if found.get("train.micro_batch_size", 1) > 1:
            why = "there: the mean over each micro-batch, then over these; train.loss is the nearest"
            yield Remark(kind="differs", item="(no --calculate-per-…-loss)", why=why)
    yield Remark(kind="differs", item="learning rate of step 1", why="there 0, so that the step does nothing; here not")
    yield Remark(kind="differs", item="order of the records", why="there by the epoch alone; here by train.seed too")


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _tree(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Sections with those keys that differ from our defaults."""
    tree: dict[str, dict[str, Any]] = {}
    for section in SECTIONS:
        known = {item.name: item for item in fields(section_of(TrainConfig, section))}
        keys = {name: found[f"{section}.{name}"] for name in known if f"{section}.{name}" in found}
        kept = {name: value for name, value in keys.items() if not _is_default(known[name], value)}
        if kept or (section == "lora" and keys):
            tree[section] = kept
    return tree


def _is_default(item: Any, value: Any) -> bool:
    plain = tuple(value) if isinstance(value, list) else value
    return item.default is not MISSING and bool(item.default == plain)


def _flow(section: Mapping[str, Any]) -> str:
    import yaml

    return str(
        yaml.safe_dump(dict(section), sort_keys=False, allow_unicode=True, default_flow_style=True, width=1000)
    )  # fmt: skip


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text: {error}") from error
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} must hold an object, as the examples of MindSpeed MM do")
    return value
