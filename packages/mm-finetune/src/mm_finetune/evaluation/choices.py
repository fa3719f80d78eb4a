"""Which option of a multiple-choice question an answer in free words means.

Two rules, those of VLMEvalKit's matching by rules (``vlmeval/utils/matching_util.py``), without its appeal to another
model and without its guess where both fail:

1. *The letter.* Punctuation counts as spaces. Exactly one of the letters stands by itself: that option. A capital "A"
   before a word in lower case is an article and counts for nothing, unless that word is "is" (VLMEvalKit counts it).
2. *The text.* Upper and lower case are the same. Exactly one option's text is found in the answer, and the answer is at
   most twice as long as all options together: that option.

Neither: no option, which is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_PUNCTUATION = str.maketrans(dict.fromkeys('.()[],:;!*#{}"', " "))
_LINE = re.compile(r"^\s*\(?([A-Z])[.):]\s*(\S.*?)\s*$", re.MULTILINE)


def options_in(question: str) -> dict[str, str]:
    """The options that stand in a question, each on a line of its own: ``A. red``, ``(B) green``, ``C) blue``.

    They begin with A and go on without a gap; else there are none.
    """
    found = dict(_LINE.findall(question))
    letters = [chr(ord("A") + place) for place in range(len(found))]
    return found if len(found) > 1 and sorted(found) == letters else {}


def chosen(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option that an answer means, None where no rule tells.

    Args:
        answer: what the model said.
        options: texts by letter.
    """
    return _by_letter(answer, options) or _by_text(answer, options)


def _by_letter(answer: str, options: Mapping[str, str]) -> str | None:
    words = answer.translate(_PUNCTUATION).split()
    following = [*words[1:], ""]
    alone = {
        word for word, after in zip(words, following, strict=False)
        if word in options and not (word == "A" and after.islower() and after != "is")
    }  # fmt: skip
    return alone.pop() if len(alone) == 1 else None


def _by_text(answer: str, options: Mapping[str, str]) -> str | None:
    if len(answer) > 2 * sum(map(len, options.values())):
        return None
    said = answer.lower()
    found = [letter for letter, text in options.items() if text and text.lower() in said]
    return found[0] if len(found) == 1 else None
