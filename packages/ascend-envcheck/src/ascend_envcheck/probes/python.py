"""The interpreter, its installed distributions and the environment variables."""

from __future__ import annotations

from pathlib import Path
from typing import Mapping, Sequence

from ascend_envcheck.probes.cann import is_of_ascend
from ascend_envcheck.probes.place import Facts, Place
from ascend_envcheck.probes.tree import Tree
from ascend_envcheck.snapshot import Distribution, PythonFacts

DISTRIBUTIONS = (
    *("torch", "torch_npu", "torchvision", "torchaudio", "triton", "triton-ascend"),
    *("transformers", "diffusers", "accelerate", "tokenizers", "safetensors", "peft"),
    *("megatron-core", "mindspeed", "mindspeed-mm", "mindspeed-llm", "mindiesd", "vllm", "vllm-ascend"),
    *("mm-finetune", "wan-infer", "apex", "decord", "av", "ftfy", "pillow", "tqdm", "zlib-ng"),
    # what CANN's operator compiler imports
    *("absl-py", "attrs", "cffi", "decorator", "numpy", "protobuf", "psutil", "pyyaml", "requests"),
    *("scipy", "sympy"),
    # made for CUDA
    *("bitsandbytes", "deepspeed", "flash-attn", "transformer-engine", "xformers"),
)

_ENVIRONMENTS = ("VIRTUAL_ENV", "CONDA_PREFIX")

_SEARCH_PATHS = ("PATH", "PYTHONPATH")
"""Of these only the folders of Ascend: the others tell of the user, and nothing of the NPU."""

_CLONES = ("mindspeed-mm", "mindspeed")
"""Mostly installed as a link to a clone, whose folder tells more than its metadata."""

_CLONE_FILES = ("megatron/core/package_info.py", ".git/HEAD")
_CLONE_PATHS = ("megatron", "mindspeed_mm", "mindspeed/megatron_adaptor.py")


def look(place: Place) -> Facts:
    """The interpreter, distributions, variables, and clones of MindSpeed-MM on the search path."""
    return {
        "python": interpreter(which(place, "python3") if place.live else ""),
        "distributions": distributions(place.search_path),
        "variables": variables(place.environ),
        **_clones(place),
    }


def interpreter(on_path: str = "") -> PythonFacts:
    """The interpreter that runs this."""
    import platform
    import sys

    return PythonFacts(
        version=platform.python_version(),
        implementation=platform.python_implementation(),
        system=platform.system(),
        machine=platform.machine(),
        executable=sys.executable or "",
        on_path=on_path,
    )


def which(place: Place, program: str) -> str:
    """The first file of that name in the folders of PATH, as the machine names it; "" when there is none."""
    for folder in place.environ.get("PATH", "").split(":"):
        if place.tree.resolve(f"{folder}/{program}") is not None:
            return f"{folder}/{program}"
    return ""


def variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of the tables that are set; an environment holds secrets under any other name."""
    from ascend_envcheck.variables import names  # reads a table

    found = {name: environ[name] for name in (*names(), *_ENVIRONMENTS) if name in environ}
    for name in _SEARCH_PATHS:
        if name in environ:
            found[name] = ":".join(entry for entry in environ[name].split(":") if is_of_ascend(entry))
    return found


def distributions(search_path: Sequence[str]) -> dict[str, Distribution]:
    """The distributions that the rules ask about, from metadata; a half-removed one counts as not installed."""
    found = {name: _distribution(name, list(search_path)) for name in DISTRIBUTIONS}
    return {name: distribution for name, distribution in found.items() if distribution is not None}


def _distribution(name: str, search_path: Sequence[str]) -> Distribution | None:
    import importlib.metadata  # 20 ms, which `--help` need not pay

    for candidate in importlib.metadata.distributions(name=name, path=list(search_path)):
        try:
            version = candidate.version
            requires = candidate.requires or ()
        except (OSError, ValueError, KeyError, TypeError):  # metadata that is gone, empty or not text
            continue
        if version:
            return Distribution(str(version), tuple(line for line in requires if _is_on_torch(line)))
    return None


def _is_on_torch(requirement: str) -> bool:
    name = requirement.replace("(", " ").replace("=", " ").replace(">", " ").split()
    return bool(name) and name[0].lower() == "torch"


def _clones(place: Place) -> Facts:
    """What lies in the folders where a clone of MindSpeed-MM, MindSpeed and Megatron may be."""
    disk = Tree()  # the search path names folders of this process, beneath whatever root
    roots = [entry for entry in place.search_path if entry.startswith("/")]
    roots += [root for name in _CLONES for root in _linked(name, place.search_path)]
    if place.live:
        roots.append(str(Path.cwd()))
    roots = [root for root in dict.fromkeys(roots) if disk.resolve(f"{root}/mindspeed_mm") or _is_mindspeed(disk, root)]
    files = {f"{root}/{name}": disk.text(f"{root}/{name}") for root in roots for name in _CLONE_FILES}
    paths = {f"{root}/{name}": disk.resolve(f"{root}/{name}") for root in roots for name in _CLONE_PATHS}
    ffmpeg = which(place, "ffmpeg")
    paths[ffmpeg] = place.tree.resolve(ffmpeg)
    return {
        "files": {path: text for path, text in files.items() if text is not None},
        "paths": {path: target for path, target in paths.items() if target is not None},
    }


def _is_mindspeed(disk: Tree, root: str) -> bool:
    return disk.resolve(f"{root}/mindspeed/megatron_adaptor.py") is not None


def _linked(name: str, search_path: Sequence[str]) -> list[str]:
    """The folders that a distribution was installed from as a link (``pip install -e``)."""
    import importlib.metadata
    import json

    found = []
    for candidate in importlib.metadata.distributions(name=name, path=list(search_path)):
        try:
            url = str(json.loads(candidate.read_text("direct_url.json") or "{}").get("url", ""))
        except (OSError, ValueError, AttributeError):
            continue
        if url.startswith("file:///"):
            found.append(url[len("file://") :].rstrip("/"))
    return found
