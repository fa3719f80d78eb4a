"""Which versions fit together: given what is fixed, the best set for the rest, and the order in which it is installed.

`asked` reads what was typed · `candidates` lists and ranks the pairs of torch_npu and CANN · `stacks` fits MindSpeed-MM
and MindIE-SD · `conflict` says why nothing fits · `install` orders the steps · `solver` joins them.
"""
