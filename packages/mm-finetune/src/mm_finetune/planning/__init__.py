"""How much memory a run needs, and which layout to choose, from config.json alone: no torch, no weights.

* :mod:`.architecture` reads the sizes of a model; :mod:`.load` says what goes through it;
* :mod:`.megatron` says which published weights stand in each of Megatron's, and which of them are cut;
* :mod:`.weights` counts weights, gradients and optimizer state, :mod:`.activations` what a forward pass leaves,
  :mod:`.schedule` how many micro-batches a pipeline stage holds; :mod:`.memory` puts them together;
* :mod:`.dealing` gives stages their layers, :mod:`.layouts` lists what is possible and chooses;
* :mod:`.words` writes tables.
"""
