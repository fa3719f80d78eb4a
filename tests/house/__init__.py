"""What `noxfile.py` and the cross-package tests both need to know about this repository.

Read `tree` first (which packages there are), then `boundaries` (who may import whom), `environment` (a virtual
environment with a recipe), `wheels` (build one, look inside it) and `isolation` (test a package as its user has it).
Nothing here imports a package of ours, and nothing but the standard library and `packaging` is needed.
"""
