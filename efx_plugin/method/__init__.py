"""The mathematics of EfficientXpert on tensors: statistics, scores, masks and repair.

Notation: a linear layer computes y = U x with U of shape [out, in]; o indexes outputs (rows) and i inputs (columns);
G = E[x xᵀ] is the Gram of its calibration inputs and e_i = G_ii their energy; c_o is the sensitivity of what follows
to the layer's output o. Modules here import torch and nothing else.
"""
