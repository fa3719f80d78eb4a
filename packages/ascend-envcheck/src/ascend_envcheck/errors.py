"""Errors of ascend-envcheck.

::

    EnvcheckError
    ├── SnapshotError      (ValueError)       a file that is no snapshot, or one that this version can't read
    ├── UnknownRuleError   (ValueError)       an id that no rule has, or a choice that leaves no rule
    └── OutputExistsError  (FileExistsError)  a target that is there already

Every message says what was given, what is legal and what to do. What is wrong with a *machine* is never
an error: it is a finding.
"""

from __future__ import annotations


class EnvcheckError(Exception):
    """Base of all errors that ascend-envcheck raises on purpose."""


class SnapshotError(EnvcheckError, ValueError):
    """A file is not a snapshot, or was written by a newer version."""


class UnknownRuleError(EnvcheckError, ValueError):
    """``only`` or ``skip`` names a rule that does not exist, or together they leave none."""


class OutputExistsError(EnvcheckError, FileExistsError):
    """The target exists; nothing is overwritten without being told to."""
