"""Driver, firmware and NPUs: their files, device nodes, and what npu-smi says."""

from __future__ import annotations

import re
from typing import Mapping

from ascend_envcheck.npu_smi import chips
from ascend_envcheck.probes.cann import load
from ascend_envcheck.probes.place import Facts, Place
from ascend_envcheck.probes.tree import Tree
from ascend_envcheck.snapshot import TIMEOUT, CommandFacts
from ascend_envcheck.versions import pairs

MANAGERS = ("davinci_manager", "devmm_svm", "hisi_hdc")
INSTALL_INFO = "/etc/ascend_install.info"
HAL = "libascend_hal.so"
LIBRARY_FOLDERS = ("lib64", "lib64/common", "lib64/driver")
QUESTIONS = ("board", "health", "ecc")
"""Each is asked as ``npu-smi info -t QUESTION -i N``, which only reads."""

_USUAL_ROOTS = ("/usr/local/Ascend", "/usr/local/npu")


def look(place: Place) -> Facts:
    """Version files, libraries, device nodes and the answers of npu-smi."""
    tree = place.tree
    homes = driver_homes(tree.text(INSTALL_INFO) or "", place.environ)
    wanted = [INSTALL_INFO, *(f"{home}/version.info" for home in [*homes, *map(firmware_home, homes)])]
    folders = [f"{home}/{folder}" for home in homes for folder in LIBRARY_FOLDERS]
    present = [*folders, *(f"{folder}/{HAL}" for folder in folders)]
    devices = _devices(tree)
    return {
        "devices": devices,
        "files": {path: text for path, text in ((path, tree.text(path)) for path in wanted) if text is not None},
        "paths": {path: target for path, target in ((path, tree.resolve(path)) for path in present) if target},
        "loads": load([HAL], place.environ, place.command_seconds) if place.live and devices else {},
        "commands": _answers(place),
    }


def driver_homes(install_info: str, environ: Mapping[str, str]) -> list[str]:
    """Where the driver may lie, the most telling first: its installer's note, the variable, the usual places."""
    named = pairs(install_info).get("driver_install_path_param", "")
    chosen = environ.get("ASCEND_DRIVER_PATH", "").rstrip("/")
    roots = [named, *_USUAL_ROOTS]
    homes = [f"{root.rstrip('/')}/driver" for root in roots if root.startswith("/")]
    if chosen.startswith("/"):
        homes[1 if named else 0 : 0] = [chosen, f"{chosen}/driver"]
    return list(dict.fromkeys(homes))


def firmware_home(driver_home: str) -> str:
    """The firmware's folder beside the driver's."""
    return driver_home.rpartition("/")[0] + "/firmware"


def _devices(tree: Tree) -> dict[str, str]:
    names = [name for name in tree.names("/dev") if re.fullmatch(r"davinci\d+", name) or name in MANAGERS]
    return {f"/dev/{name}": "rw" if tree.may_use(f"/dev/{name}") else "denied" for name in names}


def _answers(place: Place) -> dict[str, CommandFacts]:
    """npu-smi's table, then each question of every card side by side; none after one that is not answered in time."""
    answers = place.run_all([("npu-smi", "info"), ("npu-smi", "info", "-m")])
    listed = chips(answers["npu-smi info"].output)
    cards = dict.fromkeys(str(chip.npu) for chip in listed if chip.npu is not None)
    for question in QUESTIONS:
        if any(answer.outcome == TIMEOUT for answer in answers.values()):
            break
        answers.update(place.run_all([("npu-smi", "info", "-t", question, "-i", card) for card in cards]))
    return answers
