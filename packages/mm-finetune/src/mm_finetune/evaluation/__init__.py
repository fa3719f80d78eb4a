"""Let a model answer a data set, and judge what it says.

::

    from mm_finetune.evaluation import evaluate

    result = evaluate("hf-tuned", "heldout.json", "after.json")       # or DocVQA_VAL.tsv of VLMEvalKit
    print(result.accuracy, result.groups)

In the order of an evaluation:

* :mod:`.questions` opens the data: :mod:`.records` of mm-datafmt's formats, or :mod:`.tsv`;
* :mod:`.prompts` makes a question tokens and pixels, as in training; :mod:`.answerer` is the model;
* :mod:`.run` deals batches over processes (:mod:`.processes`) and keeps a :mod:`.journal` of the answers;
* :mod:`.metrics` and :mod:`.choices` judge them, :mod:`.answers` is the file;
* :mod:`.during` does the same within a training run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mm_finetune.evaluation.answers import Answer, Evaluation, Failure, Group
from mm_finetune.evaluation.metrics import METRICS, Metric, score

if TYPE_CHECKING:
    from mm_finetune.evaluation.answerer import Answerer, load_model
    from mm_finetune.evaluation.prompts import Prompt, PromptReader
    from mm_finetune.evaluation.questions import Question, Questions, open_questions
    from mm_finetune.evaluation.run import evaluate

__all__ = [
    "evaluate",
    "Evaluation",
    "Answer",
    "Group",
    "Failure",
    "METRICS",
    "Metric",
    "score",
    "open_questions",
    "Questions",
    "Question",
    "Answerer",
    "PromptReader",
    "Prompt",
    "load_model",
]

# What imports torch and transformers, at its first use.
_LATER = {
    "evaluate": "run",
    "open_questions": "questions",
    "Questions": "questions",
    "Question": "questions",
    "Answerer": "answerer",
    "load_model": "answerer",
    "PromptReader": "prompts",
    "Prompt": "prompts",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_LATER[name]}", __name__), name)
