"""YAML with its faults in one line, and without keys that silently count for one another."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

from mm_finetune.errors import ConfigError

if TYPE_CHECKING:
    import yaml


def read_yaml(text: str, where: str) -> Any:
    """Read a document.

    Args:
        text: of the document.
        where: what it is called in messages.

    Raises:
        ConfigError: it is no YAML, or a mapping has a key twice, of which YAML would take the last.
    """
    import yaml

    try:
        return yaml.load(text, Loader=_loader())  # a safe one
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {_in_words(error)}") from error


def _loader() -> type[yaml.SafeLoader]:
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
            seen: set[str] = set()
            for key, _ in node.value:
                if not isinstance(key.value, str) or key.tag == "tag:yaml.org,2002:merge":
                    continue
                if key.value in seen:
                    problem = f"{key.value} is there twice; keep one"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
            found: dict[Hashable, Any] = super().construct_mapping(node, deep)
            return found

    return Loader


def _in_words(error: yaml.YAMLError) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or not problem:
        return " ".join(str(error).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"
