"""`__init__.py` is the manual: what it lists can be had, and says what it is."""

import importlib
import inspect
import re

import pytest

from house.tree import read_packages

PACKAGES = {package.import_name: package for package in read_packages().values()}


@pytest.mark.parametrize("module_name", PACKAGES)
def test_the_manual_shows_an_example_of_something_public(module_name: str) -> None:
    module = importlib.import_module(module_name)
    manual = module.__doc__ or ""
    assert re.search(r">>> |^    \S", manual, re.MULTILINE), "no worked example"
    assert any(re.search(rf"\b{name}\b", manual) for name in module.__all__), "no public name in it"


@pytest.mark.parametrize("module_name", PACKAGES)
def test_every_public_name_can_be_had_once(module_name: str) -> None:
    module = importlib.import_module(module_name)
    assert module.__all__
    assert len(set(module.__all__)) == len(module.__all__)
    assert [name for name in module.__all__ if not hasattr(module, name)] == []
    assert [name for name in module.__all__ if name.startswith("_") and name != "__version__"] == []


@pytest.mark.parametrize("module_name", PACKAGES)
def test_every_public_class_and_function_is_documented(module_name: str) -> None:
    module = importlib.import_module(module_name)
    public = {name: getattr(module, name) for name in module.__all__}
    bare = [name for name, thing in public.items() if _needs_words(thing) and not _has_own_words(thing)]
    assert bare == []


def _needs_words(thing: object) -> bool:
    return inspect.isclass(thing) or inspect.isroutine(thing) or inspect.ismodule(thing)


def _has_own_words(thing: object) -> bool:
    """Whether the docstring was written: not inherited, and not the signature that a dataclass gets by default."""
    words = vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
    return bool(words) and not str(words).startswith(f"{getattr(thing, '__name__', '')}(")
