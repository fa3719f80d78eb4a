"""What can go wrong.

UlyssesError
├── PlanError (ValueError)              a plan that does not fit the ranks, or numbers that are none
├── ShapeError (ValueError)             tensors, lengths or a layout that do not fit each other
├── GroupError (ValueError)             a process group that cannot be used by this process or for these tensors
├── DisagreementError (RuntimeError)    ranks that were called with different things; every one of them raises it
└── LostRankError (RuntimeError)        a rank that died, or stopped answering
"""

from __future__ import annotations


class UlyssesError(Exception):
    """Base of all errors of this package."""


class PlanError(UlyssesError, ValueError):
    """A plan does not fit the ranks, or a number in it is none."""


class ShapeError(UlyssesError, ValueError):
    """Tensors, lengths or a layout do not fit each other."""


class GroupError(UlyssesError, ValueError):
    """A process group cannot be used by this process, or for these tensors."""


class DisagreementError(UlyssesError, RuntimeError):
    """The ranks of a group were called with different things; every one of them raises this."""


class LostRankError(UlyssesError, RuntimeError):
    """A rank died, or stopped answering.

    Attributes:
        ranks: which, in the numbers of the whole job; empty when it is not known.
    """

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.ranks = ranks
