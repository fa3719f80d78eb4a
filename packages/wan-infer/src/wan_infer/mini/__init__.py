"""wan-mini: a Wan-architecture model of a few MB that is always there, trained on moving handwritten digits.

``WanPipeline.from_pretrained(wan_mini())`` is what `wan-infer` does when no ``--ckpt_dir`` is given. `clips` draws what
it was trained on; ``python -m wan_infer.mini.train FOLDER`` trains it again.
"""

from __future__ import annotations

from pathlib import Path


def wan_mini() -> Path:
    """The checkpoint folder of wan-mini, in the diffusers layout."""
    return Path(__file__).parent / "weights"
