"""Everything this package raises on purpose.

::

    WanError
    ├── CheckpointError (ValueError)      a checkpoint folder or file is not what it should be
    ├── RequestError (ValueError)         what was asked for cannot be generated: frames, size, steps, a missing image
    ├── MediaError (ValueError)           an image cannot be read
    ├── OutputError (OSError)             a file exists already, or could not be written to its end
    ├── NumericsError (ArithmeticError)   the latents hold NaN or infinity
    └── ProcessError (RuntimeError)       of several processes, one was lost, or they were asked for different things

All can be caught as :class:`WanError` or as the built-in type beside them.
"""

from __future__ import annotations


class WanError(Exception):
    """Base of every error that the user can repair."""


class CheckpointError(WanError, ValueError):
    """A checkpoint folder or file lacks something, holds something unknown, or has another shape than it should."""


class RequestError(WanError, ValueError):
    """What was asked for cannot be generated; the message names what can."""


class MediaError(WanError, ValueError):
    """An image cannot be read."""


class OutputError(WanError, OSError):
    """A file exists already, or could not be written to its end; nothing broken is left behind."""


class NumericsError(WanError, ArithmeticError):
    """The latents stopped being numbers; the message says at which step."""


class ProcessError(WanError, RuntimeError):
    """Of several processes, one was lost, or they were asked for different things."""
