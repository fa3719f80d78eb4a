"""The cache of MindIE SD, by the same two names: a fixed range of steps and blocks is computed every few steps only.

```python
agent = CacheAgent(CacheConfig("dit_block_cache", 40, 50, step_start=20, step_interval=2, step_end=47,
                               block_start=10, block_end=30), branches=("cond", "uncond"))
with agent.generation():
    for step in range(50):
        for branch in ("cond", "uncond"):
            with agent.branch(branch):
                for block in blocks:
                    x = agent.apply(block, hidden_states=x, vec=vec)
```
"""

from __future__ import annotations

from dit_cache.agent.agent import CacheAgent, StepCalls
from dit_cache.agent.config import CacheConfig

__all__ = ["CacheConfig", "CacheAgent", "StepCalls"]
