"""Errors of mm-finetune.

::

    FinetuneError
    ├── ConfigError        (ValueError)       a key, a value or a combination of the configuration
    ├── DataError          (ValueError)       a record or a picture
    ├── CheckpointError    (ValueError)       a checkpoint that does not fit the run
    ├── AnomalyError       (ArithmeticError)  a loss or a gradient that ends the run
    ├── OutputExistsError  (FileExistsError)  a target that is there already
    ├── LostProcessError   (ConnectionError)  another process of the run is gone
    └── StoppedError       (InterruptedError) a signal asked for an end, and everything is saved

Every message says what was given, what is legal and what to do.
"""

from __future__ import annotations


class FinetuneError(Exception):
    """Base of all errors that mm-finetune raises on purpose."""


class ConfigError(FinetuneError, ValueError):
    """The configuration does not hold together."""


class DataError(FinetuneError, ValueError):
    """A record or a picture can't be used."""


class CheckpointError(FinetuneError, ValueError):
    """A checkpoint does not fit the model, the layout or the number of processes."""


class AnomalyError(FinetuneError, ArithmeticError):
    """A loss or a gradient is no number, or leaps; raised on every rank alike."""


class OutputExistsError(FinetuneError, FileExistsError):
    """The target exists; nothing is overwritten without being told to."""


class LostProcessError(FinetuneError, ConnectionError):
    """Another process of the run has ended, and this one can't go on without it."""


class StoppedError(FinetuneError, InterruptedError):
    """SIGTERM or SIGUSR1 asked the run to save and end; raised on every rank alike."""
