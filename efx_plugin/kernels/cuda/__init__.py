"""Sparse linear layers on NVIDIA GPUs, from CUDA C++ that is compiled at run time."""
