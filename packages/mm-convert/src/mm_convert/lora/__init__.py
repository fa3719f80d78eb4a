"""LoRA adapters: from PEFT to a Megatron-style layout, back, and into the weights.

:mod:`~mm_convert.lora.config` what PEFT says of an adapter · :mod:`~mm_convert.lora.table` a family's rules, turned
into those of its adapters · :mod:`~mm_convert.lora.conversion` there and back · :mod:`~mm_convert.lora.merge` and
:mod:`~mm_convert.lora.weights` weights with an adapter added.
"""
