"""Learning from pairs of answers, a better and a worse one (DPO and its relatives).

In the order of a run:

* :mod:`.pairs` reads the layouts that the field has, :mod:`.encoder` makes a pair one record of two sequences, which
  then goes its way through :mod:`mm_finetune.data` as any other record does;
* :mod:`.reference` works out what the model before the first step thinks of each answer, once;
* :mod:`.objective` turns the loss of a pair, one of :mod:`.losses`, into weights of tokens, which the engine knows.
"""

from __future__ import annotations

from mm_finetune.preference.encoder import PairEncoder
from mm_finetune.preference.pairs import parse_pair, read_pairs

__all__ = ["PairEncoder", "read_pairs", "parse_pair"]
