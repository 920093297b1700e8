"""Kernels for Vulkan and WebGPU: WGSL-safe, no subgroups, fp32 sums."""
