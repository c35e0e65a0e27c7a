"""The engine: from calibration to a pruned and repaired model. The modifier and the callback drive it.

They differ in who runs the model and in where a decision is stored, not in what happens to a decoder block.
"""
