"""What can go wrong.

```
FusedOpsError
  ParametersInvalid (ValueError)     an argument is wrong; nothing was computed
    BackendRefused                   a backend that was asked for by name cannot carry out this call
  TuningFileError (ValueError)       a tuning file that was asked for by name cannot be read
```

`ParametersInvalid` has the name, the code and the message form of MindIE SD, so that existing handlers go on working.
"""

from __future__ import annotations


class FusedOpsError(Exception):
    """The base of every error of this package."""


class ParametersInvalid(FusedOpsError, ValueError):
    """An argument is wrong: the message says what was given, what is legal and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return f"[MIE06E000001] Parameters invalid. {self.message}"


class BackendRefused(ParametersInvalid):
    """A backend that was asked for by name cannot carry out this call; the message says why."""


class TuningFileError(FusedOpsError, ValueError):
    """A tuning file that was asked for by name cannot be read."""
