"""The table of rules, in the order in which their findings are told; each group has its own."""

from __future__ import annotations

from ascend_envcheck.rules import (
    cann,
    chips,
    driver,
    driver_versions,
    host,
    imports,
    mindspeed,
    network,
    nnal,
    npu,
    operators,
    packages,
    python,
    ranks,
    resources,
    tool,
    torch_stack,
    variables,
)
from ascend_envcheck.rules.rule import Rule

RULES: tuple[Rule, ...] = (
    *tool.RULES,
    *host.RULES,
    *resources.RULES,
    *driver.RULES,
    *driver_versions.RULES,
    *npu.RULES,
    *chips.RULES,
    *cann.RULES,
    *operators.RULES,
    *nnal.RULES,
    *python.RULES,
    *torch_stack.RULES,
    *imports.RULES,
    *packages.RULES,
    *mindspeed.RULES,
    *variables.RULES,
    *network.RULES,
    *ranks.RULES,
)
"""Every rule; the ids are stable."""
