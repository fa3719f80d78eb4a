"""Checkpoints on disk: reading, checking and converting the original layout and that of diffusers.

Read `names` first (what each tensor is called where), then `loading` (a part of a checkpoint as a module) and `convert`
(one layout from the other). Below them: `layout` (where a part lies), `metadata` (its shape, from configurations and
headers), `parts` (the empty module), `tensors` and `tensor_writer` (files), `manifest` (configurations to write).
"""
