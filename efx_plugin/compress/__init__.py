"""What `efx prune` runs: from a model on disk, an adapter, a recipe and a text to a sparse checkpoint.

`request` and what it imports need no torch: they refuse within a second what was typed wrongly. `preflight` looks at
everything else before a weight is loaded, and `prune` does the work.
"""
