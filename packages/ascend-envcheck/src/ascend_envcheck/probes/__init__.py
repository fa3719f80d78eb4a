"""Probes: they look, they write down, they never judge and never raise.

Each returns fields of a `Snapshot`. They run side by side, whatever starts a process has a time limit, and a probe that
raises or hangs is itself a fact. Paths are looked up beneath ``root``, which is ``/`` on a real machine.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Callable, Iterable, Mapping, Sequence

from ascend_envcheck.probes import cann, driver, host, imports, network, python
from ascend_envcheck.probes.command import begin, end_all
from ascend_envcheck.probes.place import Facts, Place
from ascend_envcheck.probes.redact import redact, users
from ascend_envcheck.probes.tree import Tree
from ascend_envcheck.snapshot import FAILED, TIMEOUT, CommandFacts, Snapshot

COMMAND_SECONDS = 10.0
IMPORT_SECONDS = 120.0
"""A first import of torch from a cold network disk takes a minute; what takes longer is broken."""

_CHAINED = 3  # child processes that a probe starts one after the other, at most
_PATIENCE = 5.0  # seconds beyond the limits of what a probe starts; it hangs elsewhere then, as on a dead network disk
_TICK = 0.1

PROBES: Mapping[str, Callable[[Place], Facts]] = {
    "host": host.look,
    "python": python.look,
    "driver": driver.look,
    "CANN": cann.look,
    "network": network.look,
}
_IMPORT = "import torch"


def collect(
    *,
    root: str = "/",
    environ: Mapping[str, str] | None = None,
    search_path: Sequence[str] | None = None,
    import_torch: bool = True,
    import_seconds: float = IMPORT_SECONDS,
    command_seconds: float = COMMAND_SECONDS,
    smoke: bool = False,
    peers: Sequence[str] = (),
    progress: Callable[[str], None] = lambda step: None,
) -> Snapshot:
    """Looks at a machine and writes down what is there.

    Args:
        root: beneath which every path is looked up; another one judges a copy of a machine's files.
        environ: the environment variables, those of this process by default.
        search_path: folders of installed distributions, ``sys.path`` by default.
        import_torch: whether a child process imports torch, the one slow probe.
        import_seconds: time limit of each such child.
        command_seconds: time limit of each command.
        smoke: whether to run small computations on the NPUs; never by default.
        peers: addresses of NPUs of other machines that the NPUs of this one are to reach.
        progress: called with the names of the probes that still run.

    Returns:
        The facts. Nothing is raised for a broken machine. The home folder is written ``~``; addresses, serial numbers
        and secrets are replaced, see `ascend_envcheck.probes.redact`.
    """
    env = dict(os.environ if environ is None else environ)
    place = Place(
        tree=Tree(root),
        environ=env,
        search_path=list(sys.path if search_path is None else search_path),
        live=root == "/",
        command_seconds=command_seconds,
        import_seconds=import_seconds,
        smoke=smoke,
        peers=tuple(peers),
    )
    begin()
    running = [_Running(name, look, place, command_seconds * _CHAINED) for name, look in PROBES.items()]
    if import_torch:
        running.append(_Running(_IMPORT, imports.look, place, import_seconds * _CHAINED))
    try:
        _wait(running, progress)
    except BaseException:
        end_all()
        raise
    return redact(Snapshot(**_merged(running)), home=env.get("HOME", ""), users=users(env))


class _Running:
    """A probe in a thread; one that hangs in the kernel can't be ended, so it is left behind."""

    def __init__(self, name: str, look: Callable[[Place], Facts], place: Place, seconds: float) -> None:
        self.name, self.facts, self.trouble = name, {}, None  # type: str, Facts, CommandFacts | None
        self.deadline = time.monotonic() + seconds + _PATIENCE
        self._thread = threading.Thread(target=self._look, args=(look, place), name=f"probe {name}", daemon=True)
        self._thread.start()

    def _look(self, look: Callable[[Place], Facts], place: Place) -> None:
        try:
            self.facts = look(place)
        except Exception as error:  # noqa: BLE001 - a probe that fails is a fact, the others go on
            self.trouble = CommandFacts(FAILED, repr(error))

    def done(self) -> bool:
        """Whether there is nothing to wait for any more."""
        if self._thread.is_alive() and time.monotonic() < self.deadline:
            return False
        if self._thread.is_alive():
            self.trouble = CommandFacts(TIMEOUT, "it did not end; a network disk that does not answer?")
        return True

    def join(self, seconds: float) -> None:
        """Wait a little."""
        self._thread.join(seconds)


def _wait(running: Sequence[_Running], progress: Callable[[str], None]) -> None:
    told = ""
    while True:
        left = [probe for probe in running if not probe.done()]
        if not left:
            return
        names = ", ".join(probe.name for probe in left)
        if names != told:
            progress(names)
            told = names
        left[0].join(_TICK)


def _merged(running: Iterable[_Running]) -> Facts:
    merged: Facts = {"probes": {probe.name: probe.trouble for probe in running if probe.trouble is not None}}
    for probe in running:
        for name, value in ({} if probe.trouble else probe.facts).items():
            merged[name] = {**merged.get(name, {}), **value} if isinstance(value, dict) else value
    return merged
