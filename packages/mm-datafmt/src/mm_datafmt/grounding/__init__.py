"""Boxes in questions and answers, from one notation to another and to the size that the model sees.

::

    rescale_boxes(sample, [(1920, 1080)], source="pixels", target="resized")      # what Qwen2.5-VL learns from
    BoxConversion.named("coco:qwen2_vl")(sample, PictureFolder(Path("images")))     # sizes from the files
"""

from .notations import NOTATIONS, Notation
from .rescaling import BoxConversion, rescale_boxes

__all__ = ["rescale_boxes", "BoxConversion", "NOTATIONS", "Notation"]
