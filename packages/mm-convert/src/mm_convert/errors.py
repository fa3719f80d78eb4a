"""Errors of mm-convert.

::

    ConvertError
    ├── ModelError         (ValueError)       config.json or the model's own numbers
    ├── LayoutError        (ValueError)       layer lists and parallel sizes that can't be
    ├── CheckpointError    (ValueError)       a file or a tensor that is missing, extra, broken or different
    ├── TotalityError      (ValueError)       a plan that would lose or invent bytes
    ├── RamCapError        (ValueError)       less memory than one worker's buffers take
    ├── OutputExistsError  (FileExistsError)  a target that is there already
    ├── OutputAccessError  (PermissionError)  a target that may not be written
    └── OutputSpaceError   (OSError)          a disk that is too small for the result

Every message says what was given, what is legal and what to do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mm_convert.plans import Ref


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


class RamCapError(ConvertError, ValueError):
    """The memory that a user allows is less than the buffers of one worker."""


class OutputExistsError(ConvertError, FileExistsError):
    """The target exists; nothing is overwritten without being told to."""


class OutputAccessError(ConvertError, PermissionError):
    """The result may not be written where it was asked for: no right to, or a disk that is read-only."""


class OutputSpaceError(ConvertError, OSError):
    """The result would not fit on its disk."""


def unequal(again: Ref, first: Ref, target: Ref) -> str:
    """The words for two sources that must hold the same bytes, but do not."""
    return (
        f"{again.name} in {again.file} must equal {first.name} in {first.file} (both make {target.name}), but it"
        " does not"
    )
