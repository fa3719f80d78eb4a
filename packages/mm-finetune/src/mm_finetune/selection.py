"""Which weights train, and how fast: patterns over the published names, and a table of what they do.

>>> rates = rates_of(["visual.merger.mlp.0.weight", "lm_head.weight"], freeze=["visual.*"], lr_scale={})
>>> rates["visual.merger.mlp.0.weight"], rates["lm_head.weight"]
(0.0, 1.0)
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from mm_finetune.errors import ConfigError


def rates_of(names: Sequence[str], *, freeze: Sequence[str], lr_scale: Mapping[str, float]) -> dict[str, float]:
    """The factor of the learning rate of each weight; 0 is not trained.

    Args:
        names: every weight of the whole model, as in its Hugging Face folder, so that all ranks say the same.
        freeze: patterns of weights that are not trained; ``*`` matches dots too. They go before `lr_scale`.
        lr_scale: factors by pattern; where several match, the last counts.

    Raises:
        ConfigError: a pattern matches nothing, or nothing is left to train.
    """
    _require_matches(names, {"train.freeze": freeze, "train.lr_scale": list(lr_scale)})
    rates = {name: _rate(name, freeze, lr_scale) for name in names}
    if names and not any(rates.values()):
        raise ConfigError("nothing is left to train: train.freeze and train.lr_scale cover every weight")
    return rates


def common_rate(name: str, parts: Iterable[str], rates: Mapping[str, float]) -> float:
    """The factor of a weight that holds several published ones, such as a fused q, k and v.

    Raises:
        ConfigError: they have different factors.
    """
    found = {part: rates[part] for part in parts}
    if len(set(found.values())) != 1:
        listed = ", ".join(f"{part}: {rate:g}" for part, rate in found.items())
        raise ConfigError(f"{name} is one weight here, its parts can't train at different rates ({listed})")
    return next(iter(found.values()))


def adapted_layers(
    shapes: Mapping[str, Sequence[int]], patterns: Sequence[str], saved: Sequence[str] = ()
) -> list[str]:
    """The linear layers that get an adapter, by their published names without ``.weight``.

    Args:
        shapes: every weight of the whole model. Embedding and output layer are not adapted.
        patterns: over the layers' names, ``*`` matches dots too; or the last part of one, which then means the language
            model's: the vision tower's are taken by patterns that name it, ``visual.*``.
        saved: layers that are trained in full, see :func:`saved_layers`; they get none.

    Raises:
        ConfigError: a pattern matches no linear layer.
    """
    linear = [
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2 and not name.startswith(_NOT_ADAPTED)
    ]
    chosen: dict[str, list[str]] = {pattern: [n for n in linear if _is_meant(n, pattern)] for pattern in patterns}
    faults = [pattern for pattern, names in chosen.items() if not names]
    if faults:
        parts = sorted({_without_numbers(name) for name in linear})
        raise ConfigError(
            f"lora.target_modules: {', '.join(map(repr, faults))} matches no linear layer; there are {', '.join(parts)}"
        )
    layers = [name for name in linear if name not in saved and any(name in names for names in chosen.values())]
    if not layers:
        raise ConfigError(
            "lora.modules_to_save trains every layer of lora.target_modules in full, so no adapter is left; for full"
            " training leave the section lora out"
        )
    return layers


def saved_layers(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The layers that are trained in full beside adapters, by their published names without ``.weight``.

    Args:
        names: every weight of the whole model.
        patterns: over the names of layers or of what holds them (``visual.merger``), ``*`` matches dots too; or the
            last part of one, which then means one outside the vision tower: ``lm_head``, ``embed_tokens``, ``norm``.

    Raises:
        ConfigError: a pattern matches no layer.
    """
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    chosen = {pattern: [layer for layer in layers if _is_saved(layer, pattern)] for pattern in patterns}
    for pattern in (pattern for pattern, found in chosen.items() if not found):
        if any(fnmatchcase(name, pattern) for name in names):
            hint = "layers are trained and saved whole, as PEFT does it: name them without .weight and .bias"
        elif "lm_head" not in layers and fnmatchcase("lm_head", pattern):
            hint = "this model's output layer is its embedding: name embed_tokens, which trains both"
        else:
            hint = f"there are {', '.join(dict.fromkeys(_without_numbers(layer) for layer in layers))}"
        raise ConfigError(f"lora.modules_to_save: {pattern!r} matches no layer; {hint}")
    return [layer for layer in layers if any(layer in found for found in chosen.values())]


def trainable_table(sizes: Mapping[str, int], rates: Mapping[str, float]) -> str:
    """What trains, by module.

    Args:
        sizes: numbers in each weight.
        rates: see :func:`rates_of`.
    """
    groups: dict[tuple[str, float], int] = {}
    for name, size in sizes.items():
        groups[_module(name), rates[name]] = groups.get((_module(name), rates[name]), 0) + size
    width = max(len(module) for module, _ in groups)
    rows = [f"{module:{width}}  {size:>15,}  {_words(rate)}" for (module, rate), size in groups.items()]
    total, trained = sum(sizes.values()), sum(size for name, size in sizes.items() if rates[name])
    return "\n".join([*rows, f"{'all':{width}}  {total:>15,}  {trained:,} trained ({trained / total:.1%})"])


_NOT_ADAPTED = ("model.embed_tokens.", "lm_head.")


def _is_meant(layer: str, pattern: str) -> bool:
    if any(sign in pattern for sign in ".*?["):
        return fnmatchcase(layer, pattern)
    return layer.startswith("model.") and layer.rpartition(".")[2] == pattern


def holders(layer: str) -> list[str]:
    """The layer's name and those of what holds it: ``visual``, ``visual.merger``, ``visual.merger.ln_q``."""
    parts = layer.split(".")
    return [".".join(parts[: number + 1]) for number in range(len(parts))]


def _is_saved(layer: str, pattern: str) -> bool:
    if any(sign in pattern for sign in ".*?["):
        return any(fnmatchcase(place, pattern) for place in holders(layer))
    parts = layer.split(".")
    return parts[0] != "visual" and pattern in parts[1 if parts[0] == "model" else 0 :]


def _without_numbers(name: str) -> str:
    """``visual.blocks.*.attn.qkv``."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _require_matches(names: Sequence[str], patterns: Mapping[str, Sequence[str]]) -> None:
    faults = []
    for key, group in patterns.items():
        for pattern in group:
            if not any(fnmatchcase(name, pattern) for name in names):
                modules = list(dict.fromkeys(f"{_module(name)}.*" for name in names))
                near = difflib.get_close_matches(pattern, [*modules, *names], n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(modules)}"
                faults.append(f"{key}: pattern {pattern!r} matches no weight; {hint}")
    if faults:
        raise ConfigError("; ".join(faults))


def _rate(name: str, freeze: Sequence[str], lr_scale: Mapping[str, float]) -> float:
    if any(fnmatchcase(name, pattern) for pattern in freeze):
        return 0.0
    found = [scale for pattern, scale in lr_scale.items() if fnmatchcase(name, pattern)]
    return found[-1] if found else 1.0


def _module(name: str) -> str:
    """The part of the model: the name up to its first number, or without its last part; ``visual.blocks``."""
    parts = name.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[: min(number, 2)])


def _words(rate: float) -> str:
    return "frozen" if not rate else "trained" if rate == 1 else f"trained, lr x {rate:g}"
