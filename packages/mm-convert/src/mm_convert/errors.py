"""Errors of mm-convert.

::

    ConvertError
    ├── ModelError         (ValueError)       config.json or the model's own numbers
    ├── LayoutError        (ValueError)       layer lists and parallel sizes that can't be
    ├── CheckpointError    (ValueError)       a file or a tensor that is missing, extra, broken or different
    ├── TotalityError      (ValueError)       a plan that would lose or invent bytes
    └── OutputExistsError  (FileExistsError)  a target that is there already

Every message says what was given, what is legal and what to do.
"""

from __future__ import annotations


class ConvertError(Exception):
    """Base of all errors that mm-convert raises on purpose."""


class ModelError(ConvertError, ValueError):
    """``config.json`` is missing, unreadable or of a model that the converter does not know."""


class LayoutError(ConvertError, ValueError):
    """Layer lists or parallel sizes don't fit the model, or each other."""


class CheckpointError(ConvertError, ValueError):
    """A checkpoint is incomplete, damaged, or not what its configuration says."""


class TotalityError(ConvertError, ValueError):
    """A plan would leave bytes of the source unused, or bytes of the target unwritten."""


class OutputExistsError(ConvertError, FileExistsError):
    """The target exists; nothing is overwritten without being told to."""
