"""Sparse linear layers behind one operator, `efx::sparse_linear`."""

from efx_plugin.kernels.op import PackedWeight, kernel_summary, pack, sparse_linear, unpack

__all__ = ["PackedWeight", "kernel_summary", "pack", "sparse_linear", "unpack"]
