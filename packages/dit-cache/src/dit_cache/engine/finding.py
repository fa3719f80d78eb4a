"""Where the blocks of a model are."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from dit_cache.errors import ConfigError

ATTENTION_NAMES = ("self_attn", "attn1", "attn")


def find_blocks(model: nn.Module, path: str | None = None) -> list[nn.Module]:
    """Return the blocks of a model: the longest list of modules of one class, or the list at `path`.

    Raises:
        ConfigError: there is none, or several are equally long; the message names them.
    """
    lists = {name: list(module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if path is not None:
        named = dict(model.named_modules()).get(path)
        if not isinstance(named, (nn.ModuleList, nn.Sequential)) or len(named) == 0:
            raise ConfigError(f"blocks is {path!r}, which is no list of modules; there are: {_names(lists)}")
        return _distinct(list(named))
    uniform = {name: found for name, found in lists.items() if len(set(map(type, found))) == 1}
    length = max(map(len, uniform.values()), default=0)
    longest = [name for name, found in uniform.items() if len(found) == length]
    if len(longest) != 1:
        raise ConfigError(
            f"which modules of {type(model).__name__} are its blocks is not clear; say it: blocks='path'. "
            f"There are: {_names(lists)}"
        )
    return _distinct(uniform[longest[0]])


def find_attention(blocks: Sequence[nn.Module], name: str | None = None) -> list[nn.Module]:
    """Return the attention of each block: the submodule `name`, or the first of `ATTENTION_NAMES` that there is.

    Raises:
        ConfigError: a block has none; the message names what it has.
    """
    found = []
    for number, block in enumerate(blocks):
        inside = dict(block.named_modules())
        module = next((inside[n] for n in ((name,) if name else ATTENTION_NAMES) if n in inside), None)
        if module is None:
            raise ConfigError(
                f"block {number} has no {name or ', '.join(ATTENTION_NAMES)}; say which module is its attention: "
                f"attention='name', one of: {', '.join(n for n, _ in block.named_children())}"
            )
        found.append(module)
    return _distinct(found)


def _distinct(modules: list[nn.Module]) -> list[nn.Module]:
    if len(set(map(id, modules))) < len(modules):
        raise ConfigError("one module stands for several blocks; what it computes in each cannot be told apart")
    return modules


def _names(lists: dict[str, list[nn.Module]]) -> str:
    return ", ".join(f"{name} ({len(found)})" for name, found in lists.items()) or "no list of modules at all"
