"""Whether torch and torch_npu can be imported, found out in a child process.

A broken build may end the process that imports it, or hang in it, so it is never this one.
"""

from __future__ import annotations

import json
import sys
from typing import Any, Mapping

from ascend_envcheck.probes.command import last_line, run
from ascend_envcheck.probes.place import Facts, Place
from ascend_envcheck.probes.smoke import smoke
from ascend_envcheck.snapshot import FAILED, MISSING, NOT_RUN, OK, CommandFacts, ImportFacts

AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"

MARK = "envcheck:"
PIP_CHECK = "python -m pip check"

# One marked JSON line for each stage that was reached, on the stdout that the child began with; what the modules
# print goes to stderr. The first entry of sys.path is the working folder, which no console script would search.
_CHILD = """
import sys
sys.path[:] = [entry for entry in sys.path if entry]
import importlib, importlib.util, json, os
out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
def tell(**facts):
    out.write("envcheck:" + json.dumps(facts) + "\\n")
    out.flush()
def has(name):
    return name in sys.modules or importlib.util.find_spec(name) is not None
if not has("torch"):
    tell(torch="missing")
    sys.exit(0)
torch = importlib.import_module("torch")
abi = getattr(getattr(torch, "_C", None), "_GLIBCXX_USE_CXX11_ABI", None)
tell(
    torch="ok",
    torch_version=str(getattr(torch, "__version__", "")),
    accelerator_api=hasattr(torch, "accelerator"),
    cxx11_abi=None if abi is None else bool(abi),
)
if sys.argv[1:] == ["torch-only"]:
    sys.exit(0)
if has("torch_npu"):
    importlib.import_module("torch_npu")
    tell(torch_npu="ok")
else:
    tell(torch_npu="missing")
if hasattr(torch, "accelerator") and torch.accelerator.is_available():
    device = torch.accelerator.current_accelerator()
    tell(device=str(device.type) if device else "", device_count=int(torch.accelerator.device_count()))
"""


def look(place: Place) -> Facts:
    """Imports torch as the user would, once more without torch_npu when that failed, and has pip look for conflicts."""
    environ, seconds = place.environ, place.import_seconds
    outcome, detail, facts = _try(environ, seconds)
    if "torch" not in facts:
        facts["torch"] = FAILED if outcome in (OK, MISSING) else outcome
        facts["torch_detail"] = detail
        facts["torch_alone"] = _torch_alone(environ, seconds)
    elif facts["torch"] == OK and "torch_npu" not in facts:
        facts["torch_npu"], facts["torch_npu_detail"] = outcome, detail
    elif outcome != OK:
        facts["device_detail"] = detail
    imports = ImportFacts(**facts)
    return {"imports": imports, "commands": _commands(place, imports)}


def _commands(place: Place, imports: ImportFacts) -> dict[str, CommandFacts]:
    found = {}
    if place.live:  # pip sees the packages of this process, not those of a copy
        outcome, detail, out, err = run(
            [sys.executable, "-m", "pip", "check"], place.environ, seconds=place.command_seconds
        )
        found[PIP_CHECK] = CommandFacts(outcome, detail, out + err)
    if place.smoke and imports.device:
        found["smoke"] = smoke(place.environ, imports.device, imports.device_count, place.import_seconds)
    elif place.smoke:
        found["smoke"] = CommandFacts(MISSING, imports.torch_detail or "torch shows no accelerator")
    return found


def _torch_alone(environ: Mapping[str, str], seconds: float) -> str:
    # torch loads an installed torch_npu by itself, unless it is told not to.
    if environ.get(AUTOLOAD) == "0":
        return NOT_RUN
    outcome, _, facts = _try({**environ, AUTOLOAD: "0"}, seconds, "torch-only")
    return str(facts.get("torch", outcome))


def _try(environ: Mapping[str, str], seconds: float, *arguments: str) -> tuple[str, str, dict[str, Any]]:
    outcome, detail, out, err = run([sys.executable, "-c", _CHILD, *arguments], environ, seconds=seconds)
    facts: dict[str, Any] = {}
    for line in out.splitlines():
        if line.startswith(MARK):  # a .pth file may have printed before
            facts.update(json.loads(line[len(MARK) :]))
    reason = last_line(err) if outcome == FAILED else ""
    return outcome, reason or detail, facts
