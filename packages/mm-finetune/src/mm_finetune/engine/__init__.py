"""The training engine: megatron-core, on whatever device torch knows.

``device`` lets megatron-core run off CUDA · ``parallel`` process groups and megatron's configuration ·
``layers``, ``attention``, ``vision``, ``model`` Qwen2.5-VL · ``loss`` cross entropy in chunks ·
``weights`` checkpoints · ``micro_batches``, ``step`` one optimizer step.
"""

import warnings

with warnings.catch_warnings():
    # Importing megatron-core warns about each optional part that is not installed (Apex, Transformer
    # Engine), of which none is used here, and about its own deprecations.
    warnings.simplefilter("ignore")
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.core.optimizer
    import megatron.core.pipeline_parallel
    import megatron.core.transformer  # noqa: F401
