"""What can go wrong.

```
CacheError
  ConfigError (ValueError)          a configuration cannot be used; nothing was computed
  ParametersInvalid (ValueError)    a call is wrong: its function or its tensors
  ModelExecError (RuntimeError)     what the model returned cannot be cached
  GenerationError (RuntimeError)    a generation is not what the cache was told: order, branch, thread, number of steps
  ScheduleError (ValueError)        a schedule file cannot be read
    ScheduleMismatch                it belongs to another model
  SearchError (ValueError)          a search cannot be done as asked
  ComparisonError (ValueError)      two videos cannot be compared
  PlotError (ValueError)            a plot cannot be drawn, or not to this file
    PlotUnavailable (ImportError)   matplotlib is not installed
CacheWarning (UserWarning)          something was put right, or is not verified
```

`ConfigError`, `ParametersInvalid` and `ModelExecError` have the names, the codes and the message form of MindIE SD, so
that existing handlers go on working.
"""

from __future__ import annotations

from typing import ClassVar


class CacheError(Exception):
    """The base of every error of this package."""


class _Coded(CacheError):
    """An error with a code in front of its message; `message` is the bare one."""

    _prefix: ClassVar[str]

    def __init__(self, message: str) -> None:
        super().__init__(message)  # args stay what __init__ takes: the error survives a trip between processes
        self.message = message

    def __str__(self) -> str:
        return f"{self._prefix} {self.message}"


class ConfigError(_Coded, ValueError):
    """A configuration cannot be used; nothing was computed."""

    _prefix = "[MIE06E000002] Config parameter err."


class ParametersInvalid(_Coded, ValueError):
    """A call is wrong: its function or its tensors."""

    _prefix = "[MIE06E000001] Parameters invalid."


class ModelExecError(_Coded, RuntimeError):
    """What the model returned cannot be cached."""

    _prefix = "[MIE06E000005] Model exec err."


class GenerationError(CacheError, RuntimeError):
    """A generation is not what the cache was told; the message says what was expected."""


class ScheduleError(CacheError, ValueError):
    """A schedule file cannot be read, or holds what no schedule holds."""


class ScheduleMismatch(ScheduleError):
    """A schedule was found for another model."""


class SearchError(CacheError, ValueError):
    """A search cannot be done as asked."""


class ComparisonError(CacheError, ValueError):
    """Two videos cannot be compared; the message says what was given."""


class PlotError(CacheError, ValueError):
    """A plot cannot be drawn, or not to this file."""


class PlotUnavailable(PlotError, ImportError):
    """matplotlib is not installed."""


class CacheWarning(UserWarning):
    """Something was put right, or is not verified; the message says what."""
