"""Ways to make an expert out of a model, an adapter and text of a domain: ours, its rivals, and the dense ones.

`protocol` says what a pipeline is, `registry` lists them. Importing either needs no torch.
"""
