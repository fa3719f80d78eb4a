"""Errors of ascend-envcheck.

::

    EnvcheckError
    ├── SnapshotError      (ValueError)       a file that is no snapshot, or one that this version can't read
    ├── UnknownRuleError   (ValueError)       an id that no rule has, or a choice that leaves no rule
    ├── PackError          (ValueError)       a file that is no pack of rules, or one of its ids is taken
    ├── VersionError       (ValueError)       a text that is no version, or the name of no machine or SoC
    ├── SchemaError        (ValueError)       a kind of document that has no schema
    ├── LogError           (ValueError)       there is no log, or it is not text
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


class PackError(EnvcheckError, ValueError):
    """A file is no pack of rules, or one of its ids is taken."""


class VersionError(EnvcheckError, ValueError):
    """A text that is no version, or the name of no machine or SoC."""


class SchemaError(EnvcheckError, ValueError):
    """A kind of document that has no schema."""


class LogError(EnvcheckError, ValueError):
    """There is no log, or it is not text."""
