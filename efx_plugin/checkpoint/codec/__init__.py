"""Bit masks and the values under them: `bits` on tensors, in C++ (`native`) or numpy (`numpy_codec`)."""
