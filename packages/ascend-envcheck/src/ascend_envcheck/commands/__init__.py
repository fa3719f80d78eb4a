"""The commands, in the order of the help."""

from __future__ import annotations

from ascend_envcheck.commands import (
    check,
    diff,
    env,
    explain,
    fix,
    listing,
    matrix,
    schema,
    snapshot,
)

COMMANDS = (check, snapshot, diff, explain, env, matrix, fix, listing, schema)
"""Each module has ``add``, which declares the command and sets its ``run``; heavy imports wait until it runs."""
