"""Probes: they look, they write down, they never judge and never raise.

Each returns a part of a `Snapshot`. Whatever starts a process has a time limit. Paths are looked up beneath
``root``, which is ``/`` on a real machine.
"""

from __future__ import annotations

import os
import sys
from typing import Callable, Mapping, Sequence

from ascend_envcheck.probes import ascend, host, imports
from ascend_envcheck.probes.command import run_npu_smi
from ascend_envcheck.probes.redact import redact
from ascend_envcheck.probes.tree import Tree
from ascend_envcheck.snapshot import ImportFacts, Snapshot

COMMAND_SECONDS = 10.0
IMPORT_SECONDS = 120.0
"""A first import of torch from a cold network disk takes a minute; what takes longer is broken."""


def collect(
    *,
    root: str = "/",
    environ: Mapping[str, str] | None = None,
    search_path: Sequence[str] | None = None,
    import_torch: bool = True,
    import_seconds: float = IMPORT_SECONDS,
    command_seconds: float = COMMAND_SECONDS,
    progress: Callable[[str], None] = lambda step: None,
) -> Snapshot:
    """Looks at a machine and writes down what is there.

    Args:
        root: beneath which every path is looked up; another one judges a copy of a machine's files.
        environ: the environment variables, those of this process by default.
        search_path: folders of installed distributions, ``sys.path`` by default.
        import_torch: whether a child process imports torch, the one slow probe.
        import_seconds: time limit of that child.
        command_seconds: time limit of each command.
        progress: called with what comes next, in words.

    Returns:
        The facts. Nothing is raised for a broken machine; the home folder is written ``~``.
    """
    env = os.environ if environ is None else environ
    tree = Tree(root)
    progress("reading version files")
    layout = ascend.look(tree, env)
    progress("asking npu-smi")
    npu_smi = run_npu_smi(tree, env, seconds=command_seconds)
    if import_torch:
        progress("importing torch in a child process")
    seen = imports.look(env, seconds=import_seconds) if import_torch else ImportFacts()
    snapshot = Snapshot(
        python=host.python(),
        distributions=host.distributions(sys.path if search_path is None else search_path),
        imports=seen,
        npu_smi=npu_smi,
        devices=layout.devices,
        cann_homes=layout.cann_homes,
        files=layout.files,
        paths=layout.paths,
        libraries=layout.libraries,
        variables=host.variables(env),
    )
    return redact(snapshot, home=env.get("HOME", ""))
