"""Samples as the model will see them: resized pictures, token ids, loss, and where a long one is cut.

::

    tokenizer = PreviewTokenizer(Path("Qwen2.5-VL-7B-Instruct"))
    for view in preview("data/train.json", tokenizer=tokenizer, options=PreviewOptions(seq_length=1024)):
        print(view.tokens, view.learnt, view.notes)
"""

from .tokenizer import PreviewTokenizer
from .view import PictureView, Piece, PreviewOptions, View, Viewer, preview

__all__ = ["preview", "PreviewOptions", "PreviewTokenizer", "View", "Piece", "PictureView", "Viewer"]
