"""Checkpoints of torch.distributed.checkpoint: FSDP2's (``DCP``) and megatron-core's (``torch_dist``).

Both are a folder of ``__0_0.distcp``, … and a ``.metadata`` that says which piece of which tensor stands where.
:mod:`~mm_convert.distributed.metadata` and :mod:`~mm_convert.distributed.folder` read it,
:mod:`~mm_convert.distributed.writing` and :mod:`~mm_convert.distributed.description` lay it out,
:mod:`~mm_convert.distributed.pieces` lets a plan read tensors that are stored in pieces.
:mod:`~mm_convert.distributed.dcp` and :mod:`~mm_convert.distributed.torch_dist` are the verbs.
"""
