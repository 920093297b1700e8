"""Kernels for NVIDIA GPUs from sm_75 on: tensor cores, fp32 sums."""
