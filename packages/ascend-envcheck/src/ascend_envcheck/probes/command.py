"""Processes with a time limit that is kept even when the process can't be killed."""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING, Mapping, Sequence

from ascend_envcheck.snapshot import CRASHED, FAILED, MISSING, OK, TIMEOUT

if TYPE_CHECKING:
    import subprocess

MAX_CHARS = 64 * 1024
_INTERRUPTED = "interrupted"

_ALIVE: set[subprocess.Popen[bytes]] = set()
"""What runs now, in whatever thread: they are sessions of their own, which no Ctrl-C of a terminal reaches."""

_OVER = threading.Event()


def run(argv: Sequence[str], environ: Mapping[str, str], *, seconds: float) -> tuple[str, str, str, str]:
    """Runs a command without a shell and without input.

    Returns:
        The outcome (ok, failed, crashed, timeout, missing), why in words, and the ends of stdout and stderr.
    """
    import subprocess  # 6 ms, which `--help` need not pay

    if _OVER.is_set():
        return FAILED, _INTERRUPTED, "", ""
    try:
        process = subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**environ, "LC_ALL": "C"},
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        return (MISSING if isinstance(error, FileNotFoundError) else FAILED), str(error), "", ""
    _ALIVE.add(process)
    if _OVER.is_set():  # since it was asked above
        _abandon(process)
        return FAILED, _INTERRUPTED, "", ""
    try:
        raw_out, raw_err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired as error:
        _abandon(process)
        return TIMEOUT, f"no answer within {seconds:g} s", _text(error.stdout), _text(error.stderr)
    except BaseException:
        _abandon(process)
        raise
    finally:
        _ALIVE.discard(process)
    out, err = _text(raw_out), _text(raw_err)
    return (*_outcome(process.returncode), out, err)


def begin() -> None:
    """Lets `run` start processes again, after `end_all`."""
    _OVER.clear()


def end_all() -> None:
    """Ends whatever `run` has started and still waits for, and has it start no more."""
    _OVER.set()
    for process in tuple(_ALIVE):
        if process.returncode is None:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except OSError:  # it ended by itself
                continue


def last_line(text: str) -> str:
    """The last line that is not blank, cut to what a person reads; "" when there is none."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def _outcome(code: int) -> tuple[str, str]:
    if code == 0:
        return OK, ""
    if code > 0:
        return FAILED, f"exit status {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return CRASHED, f"ended by {name}"


def _text(raw: bytes | None) -> str:
    return (raw or b"")[-MAX_CHARS:].decode("utf-8", errors="replace")


def _abandon(process: subprocess.Popen[bytes]) -> None:
    """Kills the process and its children, and waits no longer: a hung driver leaves processes that never end."""
    import subprocess

    try:
        os.killpg(process.pid, signal.SIGKILL)
    except OSError:
        process.kill()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()
    try:
        process.wait(timeout=1)
    except subprocess.TimeoutExpired:
        return
